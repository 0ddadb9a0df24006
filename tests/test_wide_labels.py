"""More than 255 classes: masks and label maps of 16 bits, from data.yaml to training, scores, bundles and ONNX."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import everseg
from everseg.config.fields import DataConfig
from everseg.data.batches.index import class_counts
from everseg.data.class_colours import colourise
from everseg.data.datasets import load_dataset
from everseg.errors import ConfigError, DataError
from everseg.labels import IGNORED, IGNORED_WIDE, LabelPolicy, LabelSpace, ignored_id
from everseg.losses import Term, pixelwise_losses
from everseg.losses import classification as losses
from everseg.losses.argmax import predict_ids
from everseg.losses.pseudo import pseudo_labels
from everseg.metrics import ConfusionMatrix
from saying import must_say

CLASSES = 300
SIDE = 72


def wide_data(folder: Path, ignore: int | None = 65535, classes: int = CLASSES) -> Path:
    """Tiles of all ids, some of them in masks of 16 bits, with a border of void; colours tell the ids."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 6), ("val", 2)):
        for place in range(number):
            tiles = rng.permutation(np.resize(np.arange(classes), 18 * 18)).reshape(18, 18)
            mask = tiles.repeat(4, 0).repeat(4, 1).astype(np.uint16)
            image = np.stack([mask % 16 * 16, mask // 16 % 16 * 16, mask // 256 * 90], -1).astype(np.uint8)
            if ignore is not None:
                mask[:3] = ignore
            for kind, pixels in (("images", image), ("masks", mask)):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / kind / split / f"{place}.png")
    names = ", ".join(f"{raw}: c{raw}" for raw in range(classes))
    void = "" if ignore is None else f"ignore: {ignore}\n"
    (folder / "data.yaml").write_text(
        f"classes: {{{names}}}\nbackground: c0\n{void}"
        "images: images/{split}\nmasks: masks/{split}\nsplits: [train, val]\n"
    )
    return folder / "data.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first step has 201 outputs and labels of bytes, and whose second has 300 and labels of 16 bits."""
    here = tmp_path_factory.mktemp("wide")
    wide_data(here / "data")
    everseg.run(
        "demo-mib", quiet=True, name="w", out=str(here / "runs"), tracker=["tensorboard"], report=True,
        data={"dataset": str(here / "data/data.yaml"), "crop": SIDE, "workers": 0, "evaluation": "whole"},
        scenario={"task": "200-99", "test_split": "val"},
        train={"epochs": 1, "epochs_next": 1, "batch": 3, "threads": 1},
    )  # fmt: skip
    return here


def test_the_ignored_id_is_one_number_of_each_label_space():
    assert (ignored_id(255), ignored_id(256)) == (IGNORED, IGNORED_WIDE) == (255, 65535)
    narrow = LabelSpace((tuple(range(255)),), tuple(map(str, range(255))))
    wide = LabelSpace((tuple(range(256)),), tuple(map(str, range(256))))
    policy = LabelPolicy(void=IGNORED)
    for space, kind in ((narrow, np.uint8), (wide, np.uint16)):
        table = space.lut(space.order, policy, [*space.order, 400])
        assert (table.dtype, len(table)) == (kind, 401)
        assert table[: space.num_classes].tolist() == list(range(space.num_classes))
        assert table[399] == space.ignored  # void


def test_every_pixel_is_counted_under_its_class_in_narrow_and_wide_steps(trained):
    truth = np.concatenate(
        [np.asarray(Image.open(p)).ravel() for p in (trained / "data/masks/val").iterdir()]
    )
    counts = np.bincount(truth[truth != 65535], minlength=CLASSES)
    steps = [
        next(iter(np.load(trained / f"runs/w/steps/{step:02}/confusion.npz").values())).sum(1)
        for step in (0, 1)
    ]
    assert steps[1].tolist() == counts.tolist()
    assert steps[0][1:].tolist() == counts[1:201].tolist()
    assert counts[255] > 0


def test_predictions_are_masks_of_16_bits_with_the_ids_of_the_model(trained, tmp_path, call):
    model = everseg.load(trained / "runs/w")
    image = trained / "data/images/val/0.png"
    found = model.predict(image)
    assert found.ids.dtype == np.uint16
    assert call("predict", str(trained / "runs/w"), str(image), "-o", str(tmp_path / "out"))[0] == 0
    mask = Image.open(tmp_path / "out/0_mask.png")
    assert mask.mode.startswith("I;16")
    assert (np.asarray(mask) == found.ids).all()
    assert len(json.loads((tmp_path / "out/classes.json").read_text())) == CLASSES
    narrow = everseg.load(trained / "runs/w", step=0).predict(image)
    assert narrow.ids.dtype == np.uint8


@pytest.mark.slow
def test_scoring_again_gives_the_same_and_the_bundle_its_onnx_has_16_bits(trained, tmp_path, call):
    run = str(trained / "runs/w")
    code, out, _ = call("eval", run, "--json", "--quiet")
    assert code == 0
    again = json.loads(out)
    stored = json.loads((trained / "runs/w/steps/01/metrics.json").read_text())["branches"]["default"]
    assert again["branches"]["default"]["miou"] == stored["miou"]
    assert call("report", run)[0] == 0
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert call("export", run, "-o", str(tmp_path / "bundle"))[0] == 0
    (file,) = (tmp_path / "bundle").glob("*.onnx")
    image = np.asarray(Image.open(trained / "data/images/val/1.png"))
    _, mask = onnxruntime.InferenceSession(file).run(["logits", "mask"], {"image": image[None]})
    assert mask.dtype == np.uint16
    assert (mask[0] == everseg.load(tmp_path / "bundle").predict(image).ids).mean() > 0.999
    code, _, err = call("serve", tmp_path / "bundle", "--port", "0")
    assert code == 2
    must_say(err, "299", "254", "predict")


def test_a_check_of_wide_masks_passes_and_names_foreign_ids(tmp_path, call):
    file = wide_data(tmp_path)
    assert call("data", "check", str(file))[0] == 0
    mask = np.asarray(Image.open(tmp_path / "masks/train/0.png")).copy()
    mask[40:42, 40:45] = 4711
    mask[50, 50] = 300
    Image.fromarray(mask).save(tmp_path / "masks/train/0.png")
    dataset = load_dataset(DataConfig(dataset=str(file)))
    with pytest.raises(DataError) as caught:
        class_counts(dataset.splits["train"], dataset.labels)
    must_say(caught.value, "0", "4711", "10 pixels")
    code, *said = call("data", "check", file)
    assert code == 3
    assert "4711" in "".join(said)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_void_of_16_bits_over_few_classes_needs_no_wide_tables(tmp_path, kind):
    file = wide_data(tmp_path, classes=9, ignore=255 if kind is np.uint8 else 65535)
    dataset = load_dataset(DataConfig(dataset=str(file)))
    counts = class_counts(dataset.splits["train"], dataset.labels)
    assert counts.shape == (6, 256)
    (void,) = dataset.labels.void
    assert counts[:, void].tolist() == [3 * SIDE] * 6
    assert dataset.splits["train"].read(0)[1].dtype == np.uint8
    mask = np.asarray(Image.open(tmp_path / "masks/train/0.png")).copy()
    mask[40, 40] = void if kind is np.uint16 else 254  # a value that nothing declares must not become void
    Image.fromarray(mask).save(tmp_path / "masks/train/0.png")
    dataset = load_dataset(DataConfig(dataset=str(file)))
    with pytest.raises(DataError):
        class_counts(dataset.splits["train"], dataset.labels)


def test_ids_that_no_16_bits_hold_are_refused(tmp_path):
    file = wide_data(tmp_path)
    file.write_text(file.read_text().replace("299: c299", "65535: c299"))
    with pytest.raises(ConfigError) as caught:
        load_dataset(DataConfig(dataset=str(file)))
    must_say(caught.value, "classes.65535", "65534")


def test_losses_learn_class_255_and_leave_out_65535():
    torch.manual_seed(0)
    logits = torch.randn(2, CLASSES, 6, 8, dtype=torch.float64)
    label = torch.randint(0, CLASSES, (2, 6, 8))
    label[0, 0, :4], label[1, 2] = 255, IGNORED_WIDE
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.5
    kept = label != IGNORED_WIDE
    right = F.cross_entropy(logits, label, ignore_index=IGNORED_WIDE, reduction="none")
    assert torch.equal(losses.cross_entropy(logits, label, reduction="none"), right)
    valid = losses.cross_entropy(logits, label, over="valid", weight=weight)
    torch.testing.assert_close(valid, F.cross_entropy(logits, label, weight, ignore_index=IGNORED_WIDE))
    one_hot = F.one_hot(label.masked_fill(~kept, 0), CLASSES).movedim(3, 1).double()
    plain = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(1)
    torch.testing.assert_close(losses.binary_cross_entropy(logits, label, reduction="none"), plain * kept)
    for num_old in (10, 280):  # after merging, the second has fewer outputs than a byte tells apart
        old = logits[:, :num_old].logsumexp(1)
        expected = torch.where(
            label < num_old, old, logits.gather(1, label.masked_fill(~kept, 0)[:, None])[:, 0]
        )
        expected = (logits.logsumexp(1) - expected) * kept
        found = losses.unbiased_cross_entropy(logits, label, num_old=num_old, reduction="none")
        torch.testing.assert_close(found, expected)
        terms = {
            "ce": Term(losses.cross_entropy, over="valid"),
            "unce": Term(losses.unbiased_cross_entropy, options={"num_old": num_old}, over="valid"),
            "bce": Term(losses.binary_cross_entropy, over="valid"),
            "icarl": Term(losses.icarl),
        }
        together = pixelwise_losses(terms, logits, label, logits[:, :num_old])
        torch.testing.assert_close(together["ce"], right.sum() / kept.sum())
        torch.testing.assert_close(together["unce"], expected.sum() / kept.sum())
        torch.testing.assert_close(together["bce"], (plain * kept).sum() / kept.sum())
        torch.testing.assert_close(together["icarl"], losses.icarl(logits, label, logits[:, :num_old]))
    with pytest.raises(ValueError, match="65535 for ignored"):
        losses.cross_entropy(logits, label.masked_fill(label == 255, 300))


def test_pseudo_labels_reject_with_the_ignored_id():
    logits = torch.zeros(1, 280, 1, 2)
    logits[0, 270, 0, 0] = 60
    found = pseudo_labels(
        logits, torch.zeros(1, 1, 2).long(), num_classes=300, measure="probability", thresholds=0.9
    )
    assert found.label.tolist() == [[[270, IGNORED_WIDE]]]


@pytest.mark.parametrize("classes", [256, 300, 1200])
def test_arg_max_and_confusion_of_many_classes(classes):
    torch.manual_seed(0)
    logits = torch.randn(2, classes, 9, 7)
    ids = predict_ids(logits, (9, 7))
    assert torch.equal(ids.long(), logits.argmax(1))
    large = predict_ids(logits, (33, 21))
    assert (
        large.long() == F.interpolate(logits, (33, 21), mode="bilinear").argmax(1)
    ).double().mean() > 0.999
    label = torch.randint(0, classes, (2, 9, 7))
    label[:, :2], label[0, 3, 3] = IGNORED_WIDE, 255
    matrix = ConfusionMatrix(classes)
    matrix.update(ids, label)
    matrix.merge(ConfusionMatrix(classes))
    expected = torch.zeros(classes, classes, dtype=torch.int64)
    for truth, guess in zip(label.flatten().tolist(), ids.flatten().tolist(), strict=True):
        if truth != IGNORED_WIDE:
            expected[truth, guess] += 1
    assert torch.equal(matrix.counts, expected)
    assert torch.equal(matrix.sums[0], expected.sum(1))
    for wrong in (classes, classes + 1, -1):
        with pytest.raises(ValueError, match=f"label of {wrong}"):
            matrix.update(ids, label.masked_fill(label == 255, wrong))


def test_colours_of_many_classes_repeat_and_ignored_pixels_are_grey():
    ids = np.array([[0, 1, 255, 256, 65535]], np.uint16)
    drawn = colourise(ids, background=0)[0].tolist()
    few = colourise(np.array([[0, 1, 2, 255]], np.uint8), background=0)[0].tolist()
    assert drawn == [few[0], few[1], few[1], few[2], few[3]]


def test_init_takes_masks_of_16_bits_whose_ids_a_list_names(tmp_path, call):
    wide_data(tmp_path / "site")
    (tmp_path / "site/data.yaml").unlink()
    code, _, err = call("data", "init", tmp_path / "site", "--yes", "--out", tmp_path / "a.yaml")
    assert code == 3
    must_say(err, "classes.txt", "data.yaml", 65534)
    (tmp_path / "site/classes.txt").write_text(
        "background\n" + "".join(f"thing {i}\n" for i in range(1, 400))
    )
    code, _, err = call("data", "init", tmp_path / "site", "--yes", "--out", tmp_path / "a.yaml")
    assert code == 0, err
    dataset = load_dataset(DataConfig(dataset=str(tmp_path / "a.yaml")))
    assert [dataset.labels.names[i] for i in (0, 255, 399)] == ["background", "thing 255", "thing 399"]
    for name, split in dataset.splits.items():
        for index in range(len(split)):
            stored = np.asarray(Image.open(tmp_path / f"site/masks/{name}/{split.id(index)}.png"))
            (void,) = dataset.labels.void
            np.testing.assert_array_equal(split.read_mask(index), np.where(stored == 65535, void, stored))
    assert call("data", "check", tmp_path / "a.yaml")[0] == 0


def test_255_among_ids_of_16_bits_is_asked_for(tmp_path, call):
    for place in range(4):
        mask = np.zeros((40, 40), np.uint16)
        mask[5:15, 5:15], mask[20:30, 5:15], mask[5:15, 20:30] = 300, 7, 255
        for kind, pixels in (("masks", mask), ("images", (mask % 251 + place).astype(np.uint8))):
            (tmp_path / "site" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "site" / kind / f"{place}.png")
    code, _, err = call("data", "init", tmp_path / "site", "--yes", "--out", tmp_path / "a.yaml")
    assert code == 3
    must_say(err, 255, "%", "ignore=255", "NAME=255")
    tied = "background=0,a=7,b=300,ignore=255"
    assert call("data", "init", tmp_path / "site", "--classes", tied, "--out", tmp_path / "a.yaml")[0] == 0


def test_masks_of_16_bits_in_a_stored_set(tmp_path, call, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    wide_data(tmp_path / "files")
    masks = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "files/masks/train").iterdir())]
    photos = [Image.open(p) for p in sorted((tmp_path / "files/images/train").iterdir())]
    columns = {"image": photos, "label": [Image.fromarray(m) for m in masks]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "set/id2label.json").write_text(json.dumps({i: f"c{i}" for i in range(CLASSES)}))
    code, _, err = call("data", "init", tmp_path / "set", "--yes", "--out", tmp_path / "a.yaml")
    assert code == 0, err
    dataset = load_dataset(DataConfig(dataset=str(tmp_path / "a.yaml")))
    (void,) = dataset.labels.void
    for split in dataset.splits.values():
        for index in range(len(split)):
            stored = masks[int(split.id(index))]
            np.testing.assert_array_equal(split.read_mask(index), np.where(stored == 65535, void, stored))
