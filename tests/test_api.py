"""`everseg.run / load / evaluate / predict` and the verbs on top of them, on a run of a second."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import loading
from torch.nn import functional as F
from toy import HERE, settings

import everseg
from everseg.config import presets
from everseg.data.batches.transforms import normalise
from everseg.errors import CheckpointError, ConfigError, DataError
from everseg.interop import mib
from everseg.models.build import deeplabv3
from everseg.reports import terminal as tables
from everseg.runs.run_folder import RunFolder
from saying import must_say
from sealed import rewrite

USER_CODE = f"data={HERE}"
Outcome = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> everseg.Run:
    """A run of two steps: background, red, green; then blue."""
    out = tmp_path_factory.mktemp("finished")
    return everseg.run(settings(out, train={"max_iterations": 12}), quiet=True)


@pytest.fixture
def copy(finished: everseg.Run, tmp_path: Path) -> Path:
    """The same run in a folder of its own, somewhere else."""
    return Path(shutil.copytree(finished.path, tmp_path / "elsewhere" / "moved"))


# ---------------------------------------------------------------- Run


def iou(counts: np.ndarray) -> list[float]:
    """By hand, class by class."""
    return [counts[c, c] / (counts[c].sum() + counts[:, c].sum() - counts[c, c]) for c in range(len(counts))]


def test_the_table_follows_from_the_counts_on_disk(finished: everseg.Run) -> None:
    first, second = (
        np.load(finished.path / "steps" / f"{i:02d}" / "confusion.npz")["default"] for i in (0, 1)
    )
    assert first.shape == (3, 3)
    assert second.shape == (4, 4)
    a, b = iou(first), iou(second)
    rows = finished.table()
    assert [row["step"] for row in rows] == [0, 1]
    assert [row["new classes"] for row in rows] == ["red, green", "blue"]
    expected = [
        (None, np.mean(a), np.mean(a), np.mean(a), None, np.mean(a[1:]), np.mean(a[1:]), np.mean(a[1:])),
        (np.mean(b[:3]), b[3], np.mean(b[:3]), np.mean(b), np.mean(b[1:3]), b[3], np.mean(b[1:3]), np.mean(b[1:])),
    ]  # fmt: skip
    for row, numbers in zip(rows, expected, strict=True):
        for key, number in zip(list(row)[2:], numbers, strict=True):
            if number is None:
                assert row[key] is None
            else:
                assert row[key] == pytest.approx(100 * number, abs=0.00501), key
    assert max(b) > 0, "the toy learns nothing; these comparisons say nothing"
    assert finished.sequence.average_miou == pytest.approx((np.mean(a) + np.mean(b)) / 2, rel=1e-8)
    assert finished.sequence.forgetting.mean == pytest.approx(np.mean(a) - np.mean(b[:3]), abs=1e-8)


def test_steps_name_every_class(finished: everseg.Run) -> None:
    assert finished.path == finished.folder.path
    steps = finished.steps
    assert list(steps[1].class_iou) == ["background", "red", "green", "blue"]
    assert [step.classes for step in steps] == [("red", "green"), ("blue",)]
    assert {"miou", "miou_without_background", "overall_accuracy", "mean_accuracy", "frequency_weighted_iou",
            "harmonic_mean", "class_iou", "class_accuracy", "index", "branch",
            "classes"} <= set(steps[0].to_json())  # fmt: skip


def test_the_result_is_json_and_feeds_the_tables(finished: everseg.Run) -> None:
    result = json.loads(json.dumps(finished.to_json(), allow_nan=False))
    assert result["name"] == "toy"
    assert result["config"]["method"]["kd_weight"] == 10.0
    assert tables.step_table(result).row_count == 2
    assert "forgetting" in tables.sequence_text(result)


def test_a_run_shows_its_table_wherever_it_is_printed(finished: everseg.Run, tmp_path: Path) -> None:
    assert str(finished) == repr(finished)
    assert "red, green" in str(finished)
    assert "forgetting" in str(finished)
    assert "<table>" in finished._repr_html_()
    nothing_yet = everseg.Run(RunFolder(tmp_path / "absent"))
    assert repr(nothing_yet) == f"Run('{tmp_path / 'absent'}')", "what cannot be read must still be printed"


def test_run_json_prints_nothing_but_json_on_stdout(
    finished: everseg.Run, tmp_path: Path, call: Outcome
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings(tmp_path, train={"max_iterations": 2})))
    code, out, err = call("run", config, "--json")
    assert code == 0, err
    assert [step["index"] for step in json.loads(out)["steps"]] == [0, 1]
    assert "step 0" in err, "progress goes to stderr"
    code, again, _ = call("run", config, "--json", "--quiet")
    assert code == 0
    assert json.loads(again) == json.loads(out)


def test_a_finished_run_prints_its_table_without_the_data(tmp_path: Path, call: Outcome) -> None:
    reader = tmp_path / "data" / "reader.py"
    reader.parent.mkdir()
    shutil.copy(Path(HERE.rpartition(":")[0]), reader)
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps(settings(tmp_path, data={"dataset": f"{reader}:build"}, train={"max_iterations": 1}))
    )
    code, before, err = call("run", config)
    assert code == 0, err
    shutil.rmtree(reader.parent)
    code, after, err = call("run", config)
    assert code == 0, err
    assert after == before
    assert "red, green" in after


# ---------------------------------------------------------------- demo


@pytest.mark.slow
def test_the_demo_shows_its_rows_before_any_report_and_gives_the_threads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = loading(presets.load_preset)
    monkeypatch.setattr(presets, "load_preset", lambda name: {**tiny(name), "report": True})
    found: list[everseg.api.Demo] = []

    def shown(rows: everseg.api.Demo) -> None:
        assert torch.get_num_threads() == 1
        assert list(tmp_path.glob("*/report.html")) == []
        found.append(rows)

    torch.set_num_threads(2)
    try:
        rows = everseg.demo(out=tmp_path, quiet=True, shown=shown)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert found == [rows]
    assert [row.method for row in rows] == ["ft", "mib", "joint"]
    assert len(list(tmp_path.glob("*/report.html"))) == 3
    assert "the upper bound" in (tmp_path / "demo-mib/report.html").read_text()
    made = (tmp_path / "demo-mib/report.html").read_bytes()
    assert everseg.demo(out=tmp_path, quiet=True) == rows
    assert (tmp_path / "demo-mib/report.html").read_bytes() == made, "a second call makes nothing again"


# ---------------------------------------------------------------- evaluate


@pytest.mark.parametrize("step", [0, 1])
def test_eval_afterwards_gives_exactly_the_numbers_of_the_run(
    finished: everseg.Run, call: Outcome, step: int
) -> None:
    code, out, err = call("eval", finished.path, USER_CODE, "--step", step, "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    stored = json.loads((finished.path / "steps" / f"{step:02d}" / "metrics.json").read_text())
    assert found["branches"] == stored["branches"]
    assert found["confusion"]["default"] == finished.folder.counts(step)["default"].tolist()
    assert found["images"] == 10
    assert found["step"] == step


def test_eval_takes_the_last_step_by_default_and_says_which_there_are(
    finished: everseg.Run, call: Outcome
) -> None:
    assert everseg.evaluate(finished.path, overrides=[USER_CODE], quiet=True).step == 1
    code, _, err = call("eval", finished.path, USER_CODE, "--step", 7)
    assert code == 2
    assert "--step 7" in err
    assert "0, 1" in err
    code, _, err = call("eval", finished.path.parent, USER_CODE)
    assert code == 4
    must_say(err, "needs a run folder")


def test_eval_on_another_split_counts_that_split(finished: everseg.Run) -> None:
    found = everseg.evaluate(finished.path, overrides=[USER_CODE, "scenario.test_split=train"], quiet=True)
    assert found.policy == found.to_json()["policy"] == "ignore-void"
    assert "label policy ignore-void" in str(found)
    assert found.images == 24
    assert np.sum(found.confusion["default"]) == 24 * 32 * 32
    with pytest.raises(ConfigError, match=r"split 'trian'; .*train, val"):
        everseg.evaluate(finished.path, overrides=[USER_CODE, "scenario.test_split=trian"], quiet=True)


OTHER = """
import importlib.util
import numpy as np
from everseg.data.base import Dataset
from everseg.labels import RawLabels
from sealed import rewrite
spec = importlib.util.spec_from_file_location("toy_of_other", {toy!r})
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
RAW = np.array([{table}], np.uint8)
class Renamed(toy.Toy):
    def read_mask(self, index):
        return RAW[super().read_mask(index)]
    def read(self, index):
        image, mask = toy.Toy(self.name, self.count, self.size).read(index)
        return image, RAW[mask]
    def fingerprint(self):
        return super().fingerprint() + {salt!r}
def build(root=None):
    return Dataset("other", RawLabels({names!r}, background={background!r}), {{"val": Renamed("val", 10, 40)}})
"""


def other(tmp_path: Path, names: dict[int, str], table: str, background: int | None = 0) -> str:
    path = tmp_path / f"other{len(list(tmp_path.iterdir()))}.py"
    text = OTHER.format(
        toy=HERE.rpartition(":")[0], names=names, table=table, background=background, salt=f"{names}{table}"
    )
    path.write_text(text)
    return f"data={path}:build"


@pytest.mark.skipif(torch.cuda.is_available(), reason="synchronised norms work here")
def test_a_run_with_synchronised_norms_is_scored_without_cuda_too(finished: everseg.Run, copy: Path) -> None:
    rewrite(copy / "run.json", lambda stored: stored["config"]["train"].update(sync_norm=True))
    found = everseg.evaluate(copy, overrides=[USER_CODE], quiet=True)
    assert found.confusion["default"].tolist() == finished.folder.counts(1)["default"].tolist()


def test_another_data_set_is_matched_by_class_name_not_by_id(finished: everseg.Run, tmp_path: Path) -> None:
    """The same images with other ids, and a class the model does not know: the same counts, its pixels not scored."""
    same = other(tmp_path, {0: "background", 7: "blue", 9: "red", 11: "green"}, "0, 9, 11, 7")
    found = everseg.evaluate(finished.path, overrides=[same], quiet=True)
    assert found.confusion["default"].tolist() == finished.folder.counts(1)["default"].tolist()
    unknown = other(tmp_path, {0: "background", 7: "violet", 9: "red", 11: "green"}, "0, 9, 11, 7")
    found = np.array(everseg.evaluate(finished.path, overrides=[unknown], quiet=True).confusion["default"])
    expected = finished.folder.counts(1)["default"].copy()
    expected[3] = 0
    np.testing.assert_array_equal(found, expected)


def test_the_same_reader_with_other_ids_is_matched_by_class_name_too(tmp_path: Path) -> None:
    """An option (or an edited description) may give the classes other ids: the model's outputs keep their names."""
    plug_in = tmp_path / "swapped.py"
    plug_in.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(HERE.rpartition(':')[0]).parent)!r})\n"
        "import numpy as np\nfrom toy import Toy\nfrom everseg.data.base import Dataset\n"
        "from everseg.labels import RawLabels\n"
        "class Swapped(Toy):\n"
        "    def read(self, index):\n"
        "        image, mask = super().read(index)\n"
        "        return image, np.array([0, 3, 2, 1], np.uint8)[mask]\n"
        "def build(root=None, *, swap: bool = False):\n"
        "    kind, names = (Swapped, ['blue', 'green', 'red']) if swap else (Toy, ['red', 'green', 'blue'])\n"
        "    labels = RawLabels({0: 'background', **dict(enumerate(names, 1))}, background=0)\n"
        "    return Dataset('toy', labels, {'train': kind('train', 24, 40), 'val': kind('val', 10, 40)})\n"
    )
    data = f"data={plug_in}:build"
    done = everseg.run(
        settings(tmp_path, data={"dataset": f"{plug_in}:build"}, train={"max_iterations": 6}), quiet=True
    )
    found = everseg.evaluate(done.path, overrides=[data, "data.options.swap=true"], quiet=True)
    assert found.confusion["default"].tolist() == done.folder.counts(1)["default"].tolist()


def test_a_data_set_without_a_common_class_is_told(finished: everseg.Run, tmp_path: Path) -> None:
    strange = other(tmp_path, {0: "background", 7: "violet"}, "0, 7, 7, 7")
    with pytest.raises(DataError, match=r"no class name.*violet.*red, green, blue"):
        everseg.evaluate(finished.path, overrides=[strange], quiet=True)


@pytest.mark.parametrize(
    "override",
    ["model=deeplabv3-resnet18", "model.norm=abn", "method=ft", "task=1-1", "train.lr=1", "seed=9"],
)
def test_settings_of_training_are_refused_not_ignored(finished: everseg.Run, override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        everseg.evaluate(finished.path, overrides=[USER_CODE, override], quiet=True)


# ---------------------------------------------------------------- load and predict


def expected_ids(model: everseg.api.LoadedModel, image: np.ndarray) -> np.ndarray:
    """Straight through the model, without everseg's predictor."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = model.model(normalise(pixels), ("default",))["default"].logits
    full = F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
    return full[0].argmax(0).numpy().astype(np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 65), (40, 40), (101, 3)])
def test_predict_takes_any_size_as_path_array_picture_or_tensor(
    finished: everseg.Run, tmp_path: Path, size: tuple[int, int]
) -> None:
    image = np.random.RandomState(5).randint(0, 256, (*size, 3), dtype=np.uint8)
    file = tmp_path / "näme with blank.png"
    Image.fromarray(image).save(file)
    model = everseg.load(finished.path)
    assert model.classes == ("background", "red", "green", "blue")
    wanted = expected_ids(model, image)
    for given in (
        file,
        str(file),
        image,
        image[:, ::-1][:, ::-1],
        Image.fromarray(image),
        torch.from_numpy(image),
    ):
        found = model.predict(given)
        np.testing.assert_array_equal(found.ids, wanted)
        assert found.ids.dtype == np.uint8
        assert found.classes == model.classes
        assert found.overlay().shape == (*size, 3)
        assert not model.model.training
    grey = Image.fromarray(image).convert("L")
    np.testing.assert_array_equal(model.predict(grey).ids, model.predict(grey.convert("RGB")).ids)


def test_a_prediction_is_a_picture_with_its_classes(finished: everseg.Run) -> None:
    image = np.random.RandomState(5).randint(0, 256, (40, 64, 3), dtype=np.uint8)
    found = everseg.load(finished.path).predict(image)
    shown = np.asarray(Image.open(io.BytesIO(found._repr_png_())))
    np.testing.assert_array_equal(shown, found.overlay())
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert found.shares == {
        name: pytest.approx(float((found.ids == i).mean()))
        for i, name in enumerate(found.classes)
        if (found.ids == i).any()
    }
    assert list(found.shares.values()) == sorted(found.shares.values(), reverse=True)
    assert str(found).startswith("64x40 pixels: ")
    page = found._repr_html_()
    assert "data:image/png;base64," in page
    assert all(name in page for name in found.shares)


def test_what_is_no_image_is_told(finished: everseg.Run, tmp_path: Path) -> None:
    model = everseg.load(finished.path)
    for wrong in (
        np.zeros((4, 4, 3)),
        np.zeros((3, 8, 9), np.uint8),
        torch.zeros(4, 4, 3),
        {"an": "object"},
    ):
        with pytest.raises(DataError, match=r"uint8|\(H, W, 3\)"):
            model.predict(wrong)
    (tmp_path / "text.png").write_text("hello")
    for path in (tmp_path / "text.png", tmp_path / "absent.png"):
        with pytest.raises(DataError, match=path.name):
            model.predict(path)
    with pytest.raises((ConfigError, DataError), match="night"):
        model.predict(np.zeros((4, 4, 3), np.uint8), branch="night")


def test_each_finished_step_can_be_loaded_and_what_is_none_is_told(
    finished: everseg.Run, tmp_path: Path
) -> None:
    assert everseg.load(finished.path, step=0).classes == ("background", "red", "green")
    for folder in (finished.folder.step(0), finished.folder.final(0)):
        assert everseg.load(folder).classes == ("background", "red", "green")
    for wrong in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="give a run folder"):
            everseg.load(wrong)
    with pytest.raises(ConfigError, match="--step 5"):
        everseg.load(finished.path, step=5)


def test_a_damaged_model_is_never_used(copy: Path) -> None:
    weights = copy / "steps" / "01" / "final" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        everseg.load(copy)
    assert len(everseg.load(copy, step=0).classes) == 3


def pictures(folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.RandomState(0)
    found = {}
    for name, size in (("a.png", (30, 41)), ("deep/b.jpg", (24, 24)), ("deep/c.PNG", (25, 17))):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.randint(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        found[name] = np.asarray(Image.open(path).convert("RGB"))
    (folder / "notes.txt").write_text("not an image")
    return found


def test_predict_writes_exact_masks_and_overlays(
    finished: everseg.Run, tmp_path: Path, call: Outcome
) -> None:
    images = pictures(tmp_path / "in")
    out = tmp_path / "out"
    code, text, err = call("predict", finished.path, tmp_path / "in", "-o", out)
    assert code == 0, err
    assert text.startswith("masks and overlays of 3 images")
    model = everseg.load(finished.path)
    for name, image in images.items():
        stem = out / Path(name).with_suffix("")
        mask = Image.open(f"{stem}_mask.png")
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), model.predict(image).ids)
        over = np.asarray(Image.open(f"{stem}_overlay.png"))
        np.testing.assert_array_equal(over, model.predict(image).overlay())
        assert over.shape == image.shape
    names = json.loads((out / "classes.json").read_text())
    assert "blue" in json.dumps(names)
    assert not list(out.rglob("*.tmp"))


def test_written_predictions_are_a_sequence_that_shows_its_overlays(
    finished: everseg.Run, tmp_path: Path
) -> None:
    pictures(tmp_path / "in")
    found = everseg.predict(finished.path, [tmp_path / "in"], tmp_path / "out")
    assert len(found) == 3
    mask, over = found[0]
    assert (found[0].mask, found[0].overlay) == (mask, over)
    assert [row["image"] for row in found.to_json()["images"]] == ["a", "deep/b", "deep/c"]
    assert found._repr_html_().count("<img") == 3
    told = str(found).splitlines()
    assert (
        told[-1] == f"masks and overlays of 3 images in {tmp_path / 'out'}; classes.json there names the ids"
    )
    assert "notes.txt" in told[0], "what was left out"
    over.unlink()
    assert found._repr_html_().count("<img") == 2, "one that was deleted since"


def test_predict_replaces_older_files_and_leaves_the_input_alone(
    finished: everseg.Run, tmp_path: Path
) -> None:
    """Decided: results of an earlier call are replaced, each file atomically; inputs are never written to."""
    images = pictures(tmp_path / "in")
    before = {p: p.read_bytes() for p in (tmp_path / "in").rglob("*") if p.is_file()}
    (first,) = everseg.predict(finished.path, [tmp_path / "in" / "a.png"], tmp_path / "in")
    assert first[0] == tmp_path / "in" / "a_mask.png"
    old = first[0].read_bytes()
    first[0].write_bytes(b"older")
    everseg.predict(finished.path, [tmp_path / "in" / "a.png"], tmp_path / "in")
    assert first[0].read_bytes() == old
    assert {p: p.read_bytes() for p in before} == before
    assert images


def test_predict_never_overwrites_an_image_it_was_given(
    finished: everseg.Run, tmp_path: Path, call: Outcome
) -> None:
    """Labels are often named photo_mask.png; and a second call must not take the first one's masks for photos."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("photo.jpg", "photo_mask.png"):
        Image.fromarray(np.full((8, 8, 3), 40, np.uint8)).save(folder / name)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, err = call("predict", finished.path, folder, "-o", tmp_path / "in" / ".." / "in")
    assert code == 2
    assert str(folder / "photo_mask.png") in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert call("predict", finished.path, folder, "-o", tmp_path / "out")[0] == 0


def test_predict_tells_what_it_cannot_read_before_it_writes(
    finished: everseg.Run, tmp_path: Path, call: Outcome
) -> None:
    pictures(tmp_path / "in")
    (tmp_path / "in" / "z.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "in" / "y.jpg").write_bytes(b"")
    out = tmp_path / "out"
    code, _, err = call("predict", finished.path, tmp_path / "in", "-o", out)
    assert code == 3
    assert "z.png" in err
    assert "y.jpg" in err
    assert not out.exists()
    code, _, err = call("predict", finished.path, tmp_path / "absent", "-o", out)
    assert (code, out.exists()) == (3, False)
    assert "absent" in err


def test_two_images_of_one_name_do_not_overwrite_each_other(finished: everseg.Run, tmp_path: Path) -> None:
    for folder, level in (("a", 20), ("b", 230)):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / folder / "x.png")
    given = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"]
    with pytest.raises(DataError, match=r"one name: x"):
        everseg.predict(finished.path, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- a run that moved


def test_a_moved_run_still_evaluates_predicts_and_resumes(
    finished: everseg.Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = finished.folder.counts(1)["default"]
    weights = (finished.folder.final(1) / "model.safetensors").read_bytes()
    monkeypatch.chdir(copy.parent)
    relative = Path("moved")
    found = everseg.evaluate(relative, overrides=[USER_CODE], quiet=True)
    assert found.confusion["default"].tolist() == counts.tolist()
    assert everseg.load(relative).classes[-1] == "blue"
    shutil.rmtree(copy / "steps" / "01")
    done = everseg.run(settings(Path(), name="moved", train={"max_iterations": 12}), quiet=True)
    assert done.path.resolve() == copy
    np.testing.assert_array_equal(done.folder.counts(1)["default"], counts)
    assert (RunFolder(copy).final(1) / "model.safetensors").read_bytes() == weights


# ---------------------------------------------------------------- the original project's checkpoints


def test_original_checkpoints_become_models_and_go_back_unchanged(tmp_path: Path, call: Outcome) -> None:
    torch.manual_seed(4)
    model = deeplabv3(
        norm="iabn", blocks=(1, 1, 1, 1), bottleneck=True, stem=8, widths=(4, 4, 8, 8), outputs=(8, 8, 16, 16),
        hidden=8, out_channels=8,
    )  # fmt: skip
    model.grow({"default": 3})
    model.grow({"default": 2})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        image = np.random.RandomState(1).randint(0, 256, (37, 50, 3), dtype=np.uint8)
        pixels = normalise(torch.from_numpy(image).permute(2, 0, 1)[None])
        levels = model.eval()(pixels, ("default",))["default"].logits.mean((0, 2, 3))
        for classifier, level in zip(model.heads["default"].classifiers, levels.split([3, 2]), strict=True):
            classifier.bias -= level  # so that every class wins somewhere
    state = mib.dump(model)
    assert "module.cls.1.weight" in state
    theirs = tmp_path / "15-5-voc_MiB_1.pth"
    torch.save(
        {"epoch": 29, "model_state": state, "best_score": np.float64(0.6), "trainer_state": {}}, theirs
    )
    out = tmp_path / "ours"
    code, text, err = call("import", "mib", theirs, "-o", out, "--classes", "background,cat,dog,cow,sheep")
    assert code == 0, err
    assert str(out) in text
    loaded = everseg.load(out)
    found = loaded.predict(image)
    assert found.classes == ("background", "cat", "dog", "cow", "sheep")
    with torch.no_grad():
        logits = model(pixels, ("default",))["default"].logits
    full = F.interpolate(logits, (37, 50), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(found.ids, full[0].argmax(0).numpy())
    assert len(np.unique(found.ids)) > 1
    back = tmp_path / "back.pth"
    code, _, err = call("import", "mib", out, "--back", "-o", back)
    assert code == 0, err
    again = torch.load(back, weights_only=True)["model_state"]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    code, _, err = call("import", "mib", out, "--back", "-o", back)
    assert code == 2
    assert "exists" in err
    code, _, err = call("import", "mib", theirs, "-o", out)
    assert code == 2
    assert "not empty" in err


def test_an_import_that_fails_leaves_nothing_behind(tmp_path: Path, call: Outcome) -> None:
    broken = tmp_path / "x.pth"
    torch.save({"model_state": {"module.body.mod1.conv1.weight": torch.zeros(2, 3, 7, 7)}}, broken)
    for source, code in ((broken, 4), (tmp_path / "absent.pth", 2)):
        found, _, err = call("import", "mib", source, "-o", tmp_path / "ours")
        assert found == code, err
        assert not (tmp_path / "ours").exists()


def test_scores_are_typed_and_show_themselves(finished: everseg.Run) -> None:
    table, sequence, last = finished.table(), finished.sequence, finished.steps[-1]
    assert [row["step"] for row in table[:1]] == [0]
    assert "blue" in table._repr_html_()
    assert table.to_json() == list(table)
    assert f"{100 * last.miou['new']:.1f}" in str(table).splitlines()[-1]
    assert sequence.to_json() == finished.results.sequence, "nothing is lost on the way"
    assert "forgetting" in sequence._repr_html_()
    assert last.to_json() == finished.to_json()["steps"][-1]
    stored = finished.folder.metrics(1)["branches"]["default"]
    assert list(last.class_iou.values()) == stored["class_iou"]
    with pytest.warns(DeprecationWarning, match="to_json"):
        assert sequence["forgetting"]["mean"] == sequence.forgetting.mean
    with pytest.raises(CheckpointError, match="no finished step"):
        _ = everseg.Run(RunFolder(finished.path.parent / "absent")).sequence


def test_show_says_what_a_configuration_asks_for() -> None:
    outline = everseg.show("demo-mib", overrides=["train.lr=0.125"], seed=3, quiet=True)
    (rate,) = [one for one in outline.settings if one.key == "train.lr"]
    assert rate.value == 0.125
    assert rate.help
    assert outline.config.seed == 3
    assert outline.scenario is not None
    assert outline.scenario[1]["new_classes"] == ["person", "sign"]
    assert "<td" in outline._repr_html_()
    assert "train.lr" in outline._repr_html_()
    assert everseg.show("demo-mib", scenario=False).scenario is None
