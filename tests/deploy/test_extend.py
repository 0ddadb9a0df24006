"""The next step of a deployed model, from its bundle alone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import complete, killed, results
from toy import settings

import everseg
from everseg.config.fields import ScenarioConfig
from everseg.config.loading import to_json
from everseg.data.batches.index import class_counts
from everseg.data.datasets.folder import build as folder_data
from everseg.deploy.asked import configuration
from everseg.deploy.bundle import Contents, open_bundle, write_bundle
from everseg.deploy.export import export
from everseg.deploy.extend import Extension, extend
from everseg.deploy.old_classes import Gate, Kept, Pair, estimated, measured
from everseg.display import percent, share
from everseg.engine.prepare import known_in
from everseg.engine.run import prepare
from everseg.engine.runtime import make_accelerator
from everseg.errors import CheckpointError, ConfigError, GateError
from everseg.inference.predict import LoadedModel
from everseg.labels import LabelSpace
from everseg.models.build import deeplabv3_tiny
from everseg.progress import Progress
from everseg.reports.picture_grid import CHANGES, Looked, change, image_score
from everseg.runs.commit import load_tensors, parent_of, verify
from everseg.runs.run_folder import RunFolder
from everseg.scenarios.extension import build
from saying import must_say


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


QUICK = ["data.workers=0", "train.max_iterations=1", "report=false"]


def quickly(bundle: Path, data: Path, *more: str, **options: object) -> Extension:
    """One iteration of the step that teaches forklifts."""
    return extend(bundle, data=data, add=["forklift"], quiet=True, overrides=[*QUICK, *more], **options)


@pytest.fixture
def at(tmp_path, monkeypatch, deployed) -> Path:
    """A working folder with a copy of the deployed bundle."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(deployed, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_the_new_bundle_knows_more_and_the_old_one_is_untouched(at, new_data, call):
    before = hashes(at)
    code, out, err = call(
        "extend", at, "--data", new_data, "--add", "forklift", "--keep-at-least", 0.2, "data.workers=0",
        "report=false",
    )  # fmt: skip
    assert code == 0, err
    assert hashes(at) == before
    assert "estimated, not measured" in out
    assert "gate: PASS" in out
    must_say(err, "no old data")
    assert "--old-val DATA measures" in err
    old, new = open_bundle(at), open_bundle(at.with_name("bundle-v2"))
    assert new.lineage["parent"] == old.digest == parent_of(new.path)
    assert [(c.id, c.name, c.step) for c in new.registry.classes] == [
        *((c.id, c.name, c.step) for c in old.registry.classes), (3, "forklift", 1),
    ]  # fmt: skip
    assert [entry["step"] for entry in new.lineage["history"]] == [0, 1]
    assert new.lineage["history"][0] == old.lineage["history"][0]
    assert "estimated, not measured" in (new.path / "MODEL_CARD.md").read_text()
    run = RunFolder(Path("runs/bundle-v2"))
    start = load_tensors(run.final(0) / "model.safetensors")
    assert all(
        torch.equal(value, start[name]) for name, value in load_tensors(at / "model.safetensors").items()
    )
    assert parent_of(run.final(1)) == verify(run.final(0))
    assert parent_of(run.final(0)) == old.digest
    terms = [json.loads(line) for line in (run.path / "journal.jsonl").read_text().splitlines()]
    assert all(line["terms"]["kd"] > 0 for line in terms if "terms" in line)  # the teacher is there
    # the same command again trains nothing and writes nothing
    second = hashes(new.path)
    assert (
        call("extend", at, "--data", new_data, "--add", "forklift", "data.workers=0", "report=false")[0] == 0
    )
    assert hashes(new.path) == second
    # and the next extension goes on from there, under the next name and id
    third = everseg.load(new.path).extend(
        data=new_data.parent / "crates.yaml" if crates(new_data) else "", add=["crate"], method="ft", quiet=True,
        overrides=["train.max_iterations=2", "data.workers=0", "report=false"],
    )  # fmt: skip
    assert third.bundle.path.name == "bundle-v3"
    assert [(c.id, c.name, c.step) for c in third.bundle.registry.classes][3:] == [
        (3, "forklift", 1),
        (4, "crate", 2),
    ]
    assert third.bundle.lineage["parent"] == new.digest
    assert third.bundle.model().head("default").sizes == (3, 1, 1)


def crates(data: Path) -> bool:
    """A second description of the same folder, in which id 1 is a crate."""
    text = data.read_text().replace("forklift", "x").replace("crate", "forklift").replace("x", "crate")
    (data.parent / "crates.yaml").write_text(text.replace("site", "crates"))
    return True


def test_a_kill_and_the_same_command_give_the_same_bytes(at, new_data):
    def config(name: str) -> dict:
        changes = ["data.workers=0", "train.checkpoint_every=2", "train.threads=1", "tracker=[]"]
        return to_json(configuration(open_bundle(at), new_data, ["forklift"], "mib", name, changes))

    assert complete(config("whole")) == 0
    for flush in (7, 14, 9):  # while the start is copied, and inside saves
        killed(config("killed"), "flush", flush)
    assert complete(config("killed")) == 0
    found = results(Path("runs/killed"))
    assert "steps/01/final/model.safetensors" in found
    assert found == results(Path("runs/whole"))


def test_another_bundle_under_the_same_name_is_not_gone_on_with(at, new_data):
    quickly(at, new_data)
    run = Path("runs/bundle-v2/steps/01/metrics.json")
    run.unlink()
    bundle = open_bundle(at)
    model = bundle.model()
    next(model.parameters()).data.add_(1)
    lineage = {key: value for key, value in bundle.lineage.items() if key != "parity"}
    changed = Contents(model, bundle.spaces, form=bundle.about.form, lineage=lineage, before=bundle.registry)
    other = write_bundle(at.with_name("other"), changed, onnx=False)
    shutil.rmtree(at)
    other.path.rename(at)
    shutil.rmtree("bundle-v2")
    with pytest.raises(CheckpointError, match="not the bundle"):
        quickly(at, new_data)


def test_below_the_gate_no_bundle_is_written(at, new_data, call):
    arguments = [
        "extend",
        at,
        "--data",
        new_data,
        "--add",
        "forklift",
        "--method",
        "ft",
        "--keep-at-least",
        1.0,
    ]
    code, out, err = call(*arguments, "train.lr=0.3", "data.workers=0", "--quiet")
    assert code == 6
    page = Path("runs/bundle-v2/report.html").read_text()
    must_say(page, "Gate", "FAIL", "100.0")
    assert "gate: FAIL" in err
    assert "everseg diff" in err
    assert out == ""
    assert not Path("bundle-v2").exists()
    code, _, err = call(
        *arguments[:-2], "--keep-each-at-least", 1.0, "train.lr=0.3", "data.workers=0", "--quiet"
    )
    assert code == 6
    must_say(err, "gate: FAIL", "of each class", "red")
    assert not Path("bundle-v2").exists()
    code, _, err = call(*arguments[:-1], 1.5, "--keep-each-at-least", 0, "data.workers=0")
    assert code == 2
    must_say(err, "--keep-at-least 1.5", "--keep-each-at-least 0")
    assert call("export", "runs/bundle-v2", "-o", "anyway", "--no-onnx")[0] == 0
    assert open_bundle("anyway").lineage["parent"] == open_bundle(at).digest


def test_old_labels_measure_what_is_kept(at, new_data, old_data, call):
    code, out, err = call(
        "extend",
        at,
        "--data",
        new_data,
        "--add",
        "forklift",
        "--old-val",
        old_data,
        "--json",
        "data.workers=0",
        "-o",
        "out",
    )
    assert code == 0, err
    kept = json.loads(out)["kept"]
    assert kept["how"] == "measured"
    assert kept["share"] == pytest.approx(kept["figures"]["new_miou"] / kept["figures"]["deployed_miou"])
    own = everseg.load(at)
    split = folder_data(None, descriptor=str(old_data)).splits["val"]
    hit = false = missed = 0
    for index in range(len(split)):
        image, mask = split.read(index)
        found, truth = own.predict(image).ids == 1, mask == 2
        hit, false, missed = (
            hit + (found & truth).sum(),
            false + (found & ~truth).sum(),
            missed + (~found & truth).sum(),
        )
    assert kept["classes"]["red"]["deployed"] == pytest.approx(hit / (hit + false + missed), abs=0.15)
    assert kept["classes"]["green"]["deployed"] is None


def test_all_that_is_wrong_is_said_before_anything_is_written(at, new_data, call):
    code, _, err = call(
        "extend", at, "--data", new_data, "--add", "red,forklit,forklift,forklift", "data.workers=0"
    )
    assert code == 2
    must_say(err, "'red'", "knows it already")
    assert "did you mean 'forklift'" in err
    assert "named twice" in err
    assert call("extend", at, "--data", new_data, "--add", "forklift", "--keep-at-least", 97)[0] == 2
    assert call("extend", at, "--data", "nowhere.yaml", "--add", "forklift")[0] in (2, 3)
    assert call("extend", "nowhere", "--data", new_data, "--add", "forklift")[0] == 4
    Path("taken").mkdir()
    assert call("extend", at, "--data", new_data, "--add", "forklift", "-o", "taken")[0] == 2
    assert call("extend", at, "--data", new_data, "--add", "forklift", "method.kd_weigth=1")[0] == 2
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["bundle", "taken"]


def test_a_method_with_a_memory_needs_its_own_bundle(at, new_data, call, tmp_path):
    code, _, err = call(
        "extend", at, "--data", new_data, "--add", "forklift", "--method", "ewc", "data.workers=0"
    )
    assert code == 2
    must_say(err, "ewc", "statistics")
    run = everseg.run(
        settings(tmp_path, method={"name": "ewc"}, scenario={"task": [["red"]]}, train={"epochs": 1}),
        quiet=True,
    )
    made = run.export(tmp_path / "ewc", onnx=False)
    assert load_tensors(made.path / "method_state.safetensors")
    done = extend(
        made.path, data=new_data, add=["forklift"], method="ewc", quiet=True,
        overrides=["data.workers=0", "train.log_every=1", "train.lr=0.01"],
    )  # fmt: skip
    lines = [json.loads(line) for line in (done.run / "journal.jsonl").read_text().splitlines()]
    assert [line["terms"]["penalty"] > 0 for line in lines if "terms" in line][-1]


def test_of_several_branches_one_must_be_named(tmp_path, new_data):
    model = deeplabv3_tiny(widths=[8, 8, 8, 8], per_branch="norm")
    model.grow({"day": 2})
    street = LabelSpace(((0, 1),), ("road", "car"), None)
    model.grow({"dusk": 2})
    two = write_bundle(tmp_path / "two", Contents(model.eval(), {"day": street, "dusk": street}), onnx=False)
    with pytest.raises(ConfigError, match="several branches"):
        extend(two.path, data=new_data, add=["forklift"], quiet=True)


def test_figures_of_a_new_class_are_of_every_image(at, new_data, call):
    """An own count with `predict` over the whole split, images without a forklift included, gives the same figures."""
    arguments = ["extend", at, "--data", new_data, "--add", "forklift", "--method", "ft", "--no-onnx", "--quiet",
                 "data.workers=0", "train.max_iterations=3", "train.lr=0.03"]  # fmt: skip
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    (told,) = json.loads(out)["taught"]
    model = everseg.load("bundle-v2")
    split = folder_data(None, descriptor=str(new_data)).splits["val"]
    found, truth = zip(
        *((model.predict(image).ids == 3, mask == 1) for image, mask in map(split.read, range(len(split)))),
        strict=True,
    )
    without = [one for one, true in zip(found, truth, strict=True) if not true.any()]
    found, truth = np.stack(found), np.stack(truth)
    assert told["images_without"] == len(without) > 0
    assert told["iou"] == pytest.approx((found & truth).sum() / (found | truth).sum())
    assert told["false_share"] == pytest.approx(found[~truth].mean())
    assert told["false_without"] == pytest.approx(np.stack(without).mean())
    assert 0 < told["false_share"] < 1
    said = ("forklift", percent(told["iou"]), share(told["false_share"]), share(told["false_without"]))
    must_say(Path("bundle-v2/MODEL_CARD.md").read_text(), "every", *said, len(without))
    must_say(call(*arguments)[1], "new", *said, len(without))
    code, _, err = call(*arguments, "--keep-at-least", 1.0, "-o", "third")
    assert code == 6
    must_say(err, "forklift", "without", "%")
    report = everseg.report("runs/bundle-v2", quiet=True).path.read_text()
    for number in (told["iou"], told["false_share"], told["false_without"]):
        assert f">{percent(number)}</td>" in report
    # the run scores itself again on the same images
    again = everseg.evaluate("runs/bundle-v2", quiet=True)
    assert again.images == len(split)
    assert again.branches["default"].class_iou["forklift"] == told["iou"]


def test_other_images_are_all_scored_too(deployed, old_data, tmp_path, call):
    """What a model finds in images that show none of its classes is wrong, not left out."""
    data = shutil.copytree(old_data.parent, tmp_path / "other") / "data.yaml"
    for path in (data.parent / "masks" / "val").glob("*0.png"):
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(path)
    everything = [f"data={data}", "data.options={}", "data.workers=0"]
    code, out, err = call("eval", deployed.parent / "toy", *everything, "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == 6
    must_say(json.loads(out)["notes"], "show", "no class", "wrong")


def test_labels_go_by_name(deployed, old_data):
    """Raw ids of the new data: 0 background, 1 forklift, 2 red, 3 crate; the bundle knows background, red, green."""
    data = folder_data(None, descriptor=str(old_data))
    counts = {name: class_counts(split, data.labels) for name, split in data.splits.items()}
    tables = {}
    for protocol in ("sequential", "overlapped"):
        config = ScenarioConfig(
            kind="extension", bundle=str(deployed), task=[["forklift"]], protocol=protocol
        )
        (step,) = build(config, data, counts, seed=0, read=known_in)
        tables[protocol] = list(step.train[0].lut[:4])
        assert list(step.test[0].lut[:4]) == [0, 3, 1, 0]  # a crate is no forklift
        assert step.train[0].lut[255] == 255
        assert step.protocol == protocol
        assert step.index == 1
        assert step.spaces["default"].groups == ((0, 1, 2), (3,))
        has = [(data.splits["train"].read_mask(i) == 1).any() for i in range(12)]
        assert not all(has)
        # no benchmark: images without a forklift are trained and tested too
        assert step.train[0].indices == tuple(range(12))
        assert step.test[0].indices == tuple(range(6))
    assert tables == {"sequential": [0, 3, 1, 0], "overlapped": [0, 3, 0, 0]}
    for wrong in (
        {"bundle": None},
        {"task": "2-1"},
        {"task": [["forklift"], ["crate"]]},
        {"protocol": "disjoint"},
        {"joint": True},
    ):
        given = {
            "kind": "extension",
            "bundle": str(deployed),
            "task": [["forklift"]],
            "protocol": "overlapped",
            **wrong,
        }
        with pytest.raises(ConfigError):
            build(ScenarioConfig(**given), data, counts, seed=0, read=known_in)


def test_agreement_is_that_of_the_two_models(deployed, new_data):
    """A new class that is never said changes nothing; one that is said everywhere leaves nothing."""
    bundle = open_bundle(deployed)
    config = configuration(bundle, new_data, ["forklift"], "mib", "x", ["data.workers=0"])
    prepared = prepare(config.data, config.scenario, Progress(quiet=True), seed=config.seed)
    source = prepared.steps[0].test[0]
    accelerator = make_accelerator(config.train, training=False)
    after = bundle.model()
    after.grow({"default": 1})
    pair = Pair(
        bundle.model(), after.eval(), bundle.spaces["default"], prepared.steps[0].spaces["default"], "default"
    )
    new = after.head("default").classifiers[1]
    shares, between = [], []
    for bias in (-100.0, 100.0):
        torch.nn.init.constant_(new.bias, bias)
        torch.nn.init.zeros_(new.weight)
        kept = estimated(
            pair, source, prepared.datasets, config.data, accelerator, batch=config.train.eval_batch
        )
        assert kept.how == "estimated"
        shares.append((kept.share, kept.figures["agreement"], kept.figures["agreement_miou"]))
        between.append(kept.interval)
    assert shares[0] == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
    assert shares[1] == (0.0, 0.0, 0.0)
    assert between == [(1.0, 1.0), (0.0, 0.0)]


def kept_of(**shares: float | None) -> Kept:
    known = [share for share in shares.values() if share is not None]
    classes = {name: {"share": share} for name, share in shares.items()}
    return Kept("measured", sum(known) / len(known) if known else None, classes, {}, "old classes")


@pytest.mark.parametrize(
    ("gate", "left", "facts"),
    [
        (Gate(0.7), kept_of(red=0.9, green=0.5), ()),
        (Gate(0.8), kept_of(red=0.9, green=0.5), ("70.0 %", "80.0 %")),
        (Gate(None, 0.6), kept_of(red=0.9, green=0.5), ("60.0 % of each", "green 50.0")),
        (Gate(0.6, 0.5), kept_of(red=0.9, green=0.5, blue=None), ()),
        (Gate(0.8, 0.4), kept_of(red=0.9, green=0.5), ("80.0 % and", "40.0 % of each")),
        (Gate(0.1), kept_of(red=None), ("not known",)),
        (Gate(None, 0.1), kept_of(red=None), ("not known",)),
        (Gate(), kept_of(red=None), ()),
    ],
)
def test_a_gate_judges_the_mean_and_every_class(gate, left, facts):
    why = gate.fails(left)
    assert bool(why) == bool(facts)
    if facts:
        must_say(why, *facts)
    assert gate.verdict(left).startswith("FAIL" if facts else "PASS" if gate.text else "")


def test_the_interval_of_a_measurement_is_that_of_its_ratio_over_drawn_images(deployed, new_data, old_data):
    """Of the old classes only red is labelled; its figures are counted again from masks, image by image."""
    bundle = open_bundle(deployed)
    config = configuration(
        bundle, new_data, ["forklift"], "mib", "x", ["data.workers=0", "scenario.test_split=train"]
    )
    before, after = bundle.model(), bundle.model()
    before.head("default").classifiers[0].bias.data[1] += 1000  # all red: no draw is without it
    after.head("default").classifiers[0].bias.data[1] += 5
    space = bundle.spaces["default"]
    dataset = folder_data(None, descriptor=str(old_data))
    kept = measured(
        Pair(before.eval(), after.eval(), space, space, "default"), dataset, config.data, config.scenario,
        make_accelerator(config.train, training=False), Progress(quiet=True), batch=1,
    )  # fmt: skip
    split = dataset.splits["train"]
    pairs = [split.read(index) for index in range(len(split))]
    counts = []  # one row per model and image: pixels that are both, and that are at least one
    for model in (before, after):
        predict = LoadedModel(model, bundle.spaces, bundle.about.form).predict
        # forklifts (1) are no class of the models, so their pixels are ignored
        found = [(predict(image).ids[mask != 1] == 1, mask[mask != 1] == 2) for image, mask in pairs]
        counts.append([((said & true).sum(), (said | true).sum()) for said, true in found])
    one, other = np.array(counts, float)

    def ratio(images: np.ndarray) -> float:
        (a, b), (c, d) = one[images].sum(0), other[images].sum(0)
        return (c / d) / (a / b)

    assert kept.share == pytest.approx(ratio(np.arange(len(split))), abs=1e-9)
    drawn = np.random.RandomState(0)
    draws = [ratio(drawn.randint(0, len(split), len(split))) for _ in range(1000)]
    assert kept.interval == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=1e-9)
    assert kept.interval[0] < kept.interval[1]
    assert kept.classes["red"]["share"] == pytest.approx(kept.share)


def test_only_a_bundle_is_extended(deployed, new_data):
    run = deployed.parent / "toy"
    with pytest.raises(CheckpointError, match="everseg export"):
        extend(run, data=new_data, add=["forklift"])
    with pytest.raises(CheckpointError, match="not loaded from"):
        everseg.load(run).extend(data=new_data, add=["forklift"])
    with pytest.raises(ConfigError, match="exists already"):
        export(run, deployed)


def test_what_cannot_be_estimated_passes_no_gate(at, new_data):
    """A deployed model that sees nothing but background tells nothing of its old classes."""
    bundle = open_bundle(at)
    model = bundle.model()
    model.head("default").classifiers[0].bias.data[0] = 1e4
    made = write_bundle("blind", Contents(model, bundle.spaces), onnx=False).path
    changes = ["data.crop=32", "train.batch=4"]
    with pytest.raises(GateError, match="how much"):
        quickly(made, new_data, *changes, keep_at_least=0.1)
    done = quickly(made, new_data, *changes)
    assert done.kept.share is None
    assert "cannot be estimated" in done.kept.text


def heading(page: str) -> str:
    return re.findall(r"<h1>(.*?)</h1>", page)[0]


def section(page: str, title: str) -> list[list[str]]:
    """The cells of the rows below a heading of a page."""
    part = page.split(f"<h3>{title}</h3>")[1].split("</table>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", part)][1:]


def test_report_and_card_tell_what_an_extension_measured(at, new_data, call):
    """The new images label no old class, so nothing is said about one but the estimate."""
    code, out, err = call("extend", at, "--data", new_data, "--add", "forklift", *QUICK[:2], "--no-onnx")
    assert code == 0, err
    run = RunFolder(Path("runs/bundle-v2"))
    page = (run.path / "report.html").read_text(encoding="utf-8")  # written without being asked for
    must_say(out, run.path / "report.html")
    share = run.kept(1)["share"]
    must_say(heading(page), "Step 1", "forklift", percent(share), "old", "estimated")
    assert "first step" not in page
    assert "other classes now" not in page
    assert "no pictures" not in page
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    must_say(facts["initial weights"], "bundle", open_bundle(at).digest[:12])
    rows = section(page, "Before and after, on the new images")
    assert [row[:4] for row in rows[:2]] == [
        [n, "old", "not measured", "not measured"] for n in ("red", "green")
    ]
    assert rows[2][:3] == ["forklift", "taught now", "-"]
    assert "Old, new and all classes" not in page
    assert "IoU per class" not in page
    heads = re.findall(r'<div class="head">([a-z ]+)', page)
    assert heads == ["image", "truth", "deployed model", "extended model", "change"]
    card = Path("bundle-v2/MODEL_CARD.md").read_text(encoding="utf-8")
    (row,) = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| 1 | mib")]
    assert row.count("not measured") == 3  # old, all, all without background
    must_say(card, "old classes", "not measured", "red, green")
    weak = card.split("## Weak classes")[1].split("## Use")[0]
    assert "background" not in weak.splitlines()[2]
    must_say(weak, "Old", "not measured")


def test_report_of_an_extension_whose_data_label_old_classes(at, old_data):
    """Red is labelled in the new images: the deployed model and its extension are compared there, by an own count."""
    done = quickly(at, old_data, "train.lr=0.02", onnx=False)
    page = everseg.report(done.run, quiet=True).path.read_text(encoding="utf-8")
    split = folder_data(None, descriptor=str(old_data)).splits["val"]
    ious = []
    for model in (everseg.load(at), everseg.load(done.bundle.path)):
        pairs = [
            (model.predict(image).ids == 1, mask == 2) for image, mask in map(split.read, range(len(split)))
        ]
        hit, either = (
            sum(map(np.sum, ones)) for ones in zip(*((a & b, a | b) for a, b in pairs), strict=True)
        )
        ious.append(percent(hit / either))
    rows = section(page, "Before and after, on the new images")
    assert rows[0][:4] == ["red", "old", *ious]
    assert rows[1][:4] == ["green", "old", "not measured", "not measured"]
    must_say(heading(page), "forklift", "1 of 2", *ious)
    must_say(page, "not label green")
    card = (done.bundle.path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "not measured" not in next(line for line in card.splitlines() if line.startswith("| 1 | mib"))
    must_say(card, "red", f"{ious[0]} before", f"{ious[1]} after", "green")


def test_pictures_of_an_extension_judge_what_the_new_images_label():
    """Of the old outputs 0 to 2 the background may be anything; class 3 is new."""
    label = np.array([[0, 0, 0, 3, 3, 1, 255]], np.uint8)
    one = Looked("default", "a", np.zeros((1, 7, 3), np.uint8), label, old=3, background=0)
    one.predictions = {0: np.array([[2, 2, 0, 2, 2, 2, 2]]), 1: np.array([[2, 3, 0, 3, 2, 1, 3]])}
    told = [CHANGES[i] for i in change(one)[0]]
    assert told == ["ignored", "wrong", "ignored", "learnt", "wrong", "learnt", "ignored"]
    # everything else: 3 of 5; the new class: 1 of 3
    assert image_score(one, [1, 2], 4) == pytest.approx((3 / 5 + 1 / 3) / 2, abs=1e-5)
    one.label[:] = 0  # an image without the new class has a score too
    assert image_score(one, [1, 2], 4) == pytest.approx(4 / 7, abs=1e-5)
