"""Every method, protocol, option and plug-in from the command line to the scores, on coloured rectangles."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import need_transformers
from PIL import Image
from processes import complete, killed, start, wait
from safetensors.torch import load_file
from toy import HERE, MAPS, NEEDED, NETWORKS, build, maps, settings

import everseg
from everseg import registry
from everseg.errors import CheckpointError, ConfigError
from everyday import some

METHODS = list(registry.BUILTIN["method"])
SOLVED = ("acil",)
"""Methods whose later steps have no gradients."""
BASE = {"max_iterations": 3, "log_every": 1, "batch": 4}
USER_CODE = f"data={HERE}"
Outcome = Callable[..., tuple[int, str, str]]


def with_maps(config: dict, folder: Path) -> dict:
    """Give the run the maps that its method reads beside the images."""
    kind = MAPS.get(config["method"]["name"])
    if kind is not None:
        config["data"] = config["data"] | {"extra": {kind: maps(folder / "maps", kind)}}
    return config


def written(folder: Path, **changes: object) -> Path:
    """A configuration file of a three-step run: one class per step."""
    config = settings(folder / "runs", **{"scenario": {"task": "1-1"}, "train": BASE, **changes})
    with_maps(config, folder)
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))
    return path


def journal(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- every method


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_three_steps_and_evaluates_to_the_same_numbers(
    tmp_path: Path, call: Outcome, method: str
) -> None:
    if method in NETWORKS:
        need_transformers()
    needed = NEEDED.get(method, [])
    config = written(tmp_path, method={"name": method})
    code, out, err = call("run", config, f"method={method}", *needed, "--json", "--quiet")
    assert (code, err) == (0, "")
    done = json.loads(out)
    assert [step["classes"] for step in done["steps"]] == [["red"], ["green"], ["blue"]]
    lines = journal(tmp_path / "runs" / "toy")
    terms = [line["terms"] for line in lines if line["event"] == "train"]
    passed = {line["step"] for line in lines if line["event"] == "pass"}
    assert len(terms) == (3 if method in SOLVED else 9)
    assert passed == ({0, 1, 2} if method in SOLVED else set())
    assert all(math.isfinite(value) for line in terms for value in line.values())
    for index in range(3):
        code, out, err = call(
            "eval", tmp_path / "runs" / "toy", USER_CODE, "--step", index, "--json", "--quiet"
        )
        assert (code, err) == (0, "")
        found = json.loads(out)
        counts = np.load(tmp_path / "runs" / "toy" / "steps" / f"{index:02d}" / "confusion.npz")["default"]
        assert found["confusion"]["default"] == counts.tolist()
        scores, step = found["branches"]["default"], done["steps"][index]
        assert counts.shape == (index + 2, index + 2)
        for name in ("miou", "miou_without_background", "overall_accuracy", "mean_accuracy", "harmonic_mean"):
            assert scores[name] == step[name]
        assert scores["class_iou"] == list(step["class_iou"].values())


@pytest.mark.parametrize("method", some(METHODS, "ft", "mdil"))
def test_a_dry_run_goes_through_every_stage_and_leaves_nothing(
    tmp_path: Path, call: Outcome, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    if method in NETWORKS:
        need_transformers()
    config = written(tmp_path, tracker=["tensorboard"], method={"name": method})
    before = sorted(tmp_path.iterdir())
    needed = NEEDED.get(method, [])
    code, text, err = call(
        "run", config, f"method={method}", *needed, "--dry-run", "train.max_iterations=null"
    )
    assert code == 0, err
    assert "dry run" in text
    assert [line.split()[0] for line in text.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"])] == [
        "0", "1", "2",
    ]  # fmt: skip
    assert list(scratch.glob("everseg-*")) == []
    assert sorted(tmp_path.iterdir()) == before
    assert "2/2" in err, "two iterations of each step"


def test_a_dry_run_that_fails_leaves_nothing_either(
    tmp_path: Path, call: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    code, _, err = call("run", written(tmp_path), "train.lr=1e30", "train.lr_next=1e30", "--dry-run")
    assert code == 5, err
    assert list(scratch.glob("everseg-*")) == []


def test_a_preset_under_another_name_lies_in_runs_of_the_working_folder(
    tmp_path: Path, call: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["data.options.num_train=24", "data.options.num_val=8", "train.max_iterations=1"]
    code, out, err = call("run", "demo-mib", "name=X", *small)
    assert code == 0, err
    assert "run folder: runs/X" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["X"]
    code, out, err = call("eval", "runs/X", "--json", "--quiet")
    assert (code, err) == (0, ""), "nobody's own code: nothing to name again"
    metrics = json.loads((tmp_path / "runs/X/steps/01/metrics.json").read_text())
    assert json.loads(out)["branches"] == metrics["branches"]


# ---------------------------------------------------------------- scenarios


@pytest.mark.parametrize("protocol", ["disjoint", "overlapped", "sequential", "partitioned"])
def test_every_protocol_runs(tmp_path: Path, protocol: str) -> None:
    done = everseg.run(
        settings(tmp_path, scenario={"task": "2-1", "protocol": protocol}, train=BASE), quiet=True
    )
    record = json.loads((done.path / "scenario.json").read_text())
    assert len(done.steps) == 2
    assert protocol in json.dumps(record)


def test_joint_training_teaches_all_classes_at_once_and_scores_the_groups(tmp_path: Path) -> None:
    done = everseg.run(
        settings(tmp_path, scenario={"task": "2-1", "joint": True}, method="ft", train=BASE), quiet=True
    )
    (step,) = done.steps
    assert list(step.class_iou) == ["background", "red", "green", "blue"]
    iou = list(step.class_iou.values())
    assert step.miou["base"] == pytest.approx(np.mean(iou[:3]))
    assert step.miou["new"] == pytest.approx(iou[3])
    found = everseg.evaluate(done.path, overrides=[USER_CODE], quiet=True)
    assert found.confusion["default"].tolist() == done.folder.counts(0)["default"].tolist()


@pytest.mark.parametrize(
    ("validation", "images"), [("none", None), ("split", 10), ("cross", None), ("train", None)]
)
def test_validation_is_scored_on_the_images_asked_for(
    tmp_path: Path, validation: str, images: int | None
) -> None:
    scenario = {"task": "2-1", "validation": validation}
    done = everseg.run(settings(tmp_path, scenario=scenario, train=BASE), quiet=True)
    for index in (0, 1):
        metrics = json.loads((done.folder.step(index) / "metrics.json").read_text())
        assert ("validation" in metrics) is (validation != "none")
        if validation == "split":
            assert images == 10
            assert (
                metrics["validation"]["default"]["miou"].keys()
                == metrics["branches"]["default"]["miou"].keys()
            )
        found = everseg.evaluate(done.path, step=index, overrides=[USER_CODE], quiet=True)
        assert found.to_json()["branches"] == metrics["branches"]


# ---------------------------------------------------------------- options of methods and precision


@pytest.mark.parametrize("method", ["mib", "ft", "lwf-mc"])
def test_a_frozen_encoder_and_frozen_norms_do_not_move(tmp_path: Path, method: str) -> None:
    options = {"name": method, "freeze_encoder": True, "freeze_norm": True}
    done = everseg.run(settings(tmp_path, method=options, train=BASE), quiet=True)
    before, after = (load_file(done.folder.final(i) / "model.safetensors") for i in (0, 1))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("decoder.") for name in moved)
    assert not [name for name in moved if name.startswith("encoder.")]
    assert not [name for name in moved if "norm" in name], "norms of the decoder"


def test_without_the_switches_everything_moves(tmp_path: Path) -> None:
    done = everseg.run(settings(tmp_path, train=BASE), quiet=True)
    before, after = (load_file(done.folder.final(i) / "model.safetensors") for i in (0, 1))
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_mib_with_binary_cross_entropy(tmp_path: Path) -> None:
    done = everseg.run(settings(tmp_path, method={"name": "mib", "bce": True}, train=BASE), quiet=True)
    plain = everseg.run(settings(tmp_path, name="plain", train=BASE), quiet=True)
    one, other = (
        [line["terms"] for line in journal(run.path) if line["event"] == "train"] for run in (done, plain)
    )
    assert one[0] != other[0]
    assert all(math.isfinite(value) for line in one for value in line.values())


@pytest.mark.parametrize("method", some(METHODS, "mib", "plop", "mdil"))
def test_bf16_gives_nearly_the_losses_of_fp32(tmp_path: Path, method: str) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        config = settings(
            tmp_path,
            name=precision,
            method={"name": method},
            train={**BASE, "precision": precision, "lr": 0.002, "lr_next": 0.0004},
        )
        done = everseg.run(with_maps(config, tmp_path), quiet=True)
        losses[precision] = [line["terms"] for line in journal(done.path) if line["event"] == "train"]
        weights = load_file(done.folder.final(1) / "model.safetensors")
        assert {value.dtype for value in weights.values()} - {torch.int64} == {torch.float32}
        state = load_file(done.folder.final(1) / "method_state.safetensors")
        assert all(value.dtype != torch.bfloat16 for value in state.values())
        found = everseg.evaluate(done.path, overrides=[USER_CODE], quiet=True)
        assert found.confusion["default"].tolist() == done.folder.counts(1)["default"].tolist()
    for rough, exact in zip(losses["bf16"], losses["fp32"], strict=True):
        assert all(math.isfinite(value) for value in rough.values())
        # ILT compares features of two networks that are nearly the same: mostly rounding, of each processor's kind
        feature, of = rough.pop("feature", 0.0), exact.pop("feature", 0.0)
        assert feature == pytest.approx(of, rel=0.5)
        # sums of many sigmoids' losses, over features drawn at random or pooled over regions
        tolerance = 0.06 if method in ("star", "microseg") else 0.03
        assert sum(rough.values()) == pytest.approx(sum(exact.values()), rel=tolerance)
    assert losses["bf16"] != losses["fp32"], "bf16 was not used"


@pytest.mark.parametrize("able", [False, True])
def test_a_processor_without_bf16_is_warned_about(
    tmp_path: Path, call: Outcome, monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    monkeypatch.setattr("everseg.engine.run.computes_bf16", lambda device: able)
    code, _, err = call("run", written(tmp_path), "train.precision=bf16", "--dry-run")
    assert code == 0
    assert ("no bf16 instructions" in err) is not able


@pytest.mark.parametrize("method", METHODS)
def test_fp16_is_refused_with_a_reason(tmp_path: Path, call: Outcome, method: str) -> None:
    reads = registry.resolve("method", method).reads_gradients
    assert reads is (method in ("ewc", "pi", "rw"))
    if torch.cuda.is_available() and not reads:
        pytest.skip("fp16 works on this machine")
    code, _, err = call("run", written(tmp_path), f"method={method}", "train.precision=fp16")
    assert code == 2
    told = "reads gradients" if reads else "method.pretune" if method == "nest" else "needs a CUDA device"
    assert told in err
    assert "bf16" in err
    assert not (tmp_path / "runs" / "toy").exists()


# ---------------------------------------------------------------- a user's own code

METHOD = """
from dataclasses import dataclass
from everseg.methods.ft import FineTuning

@dataclass(kw_only=True)
class Louder(FineTuning):
    '''Fine-tuning times a factor.'''
    factor: float = 2.0
    '''Factor of the loss.'''
    def losses(self, batch, ctx):
        for terms in super().losses(batch, ctx):
            yield {f"loud_{name}": self.factor * value for name, value in terms.items()}
"""
MODEL = """
from everseg.models.build import deeplabv3_tiny

def build(*, output_stride=16, norm="bn", **options):
    return deeplabv3_tiny(output_stride=output_stride, norm=norm, widths=(8, 8, 8, 8), hidden=8, **options)
"""
SCENARIO = """
from everseg.scenarios.class_incremental import build as usual

def build(config, dataset, counts, *, seed):
    return usual(config.model_copy(update={"task": [["blue"], ["red", "green"]]}), dataset, counts, seed=seed)
"""


@pytest.fixture
def plug_ins(tmp_path: Path) -> Path:
    """A method, a model and a scenario in one file; the data set of the toy is another."""
    path = tmp_path / "mine.py"
    path.write_text(
        "\n".join(
            (METHOD, MODEL.replace("def build", "def network"), SCENARIO.replace("def build", "def plan"))
        )
    )
    return path


def test_method_data_model_and_scenario_from_files_of_ones_own(
    tmp_path: Path, call: Outcome, plug_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths, and hyper-parameters of the user's method checked like any other's."""
    monkeypatch.chdir(tmp_path)
    config = written(tmp_path, model={"name": "mine.py:network", "options": {}, "norm": "bn"})
    names = ["method=mine.py:Louder", "scenario.kind=mine.py:plan"]
    code, _, err = call("run", config, *names, "method.facto=3", "--quiet")
    assert code == 2
    assert "method.facto" in err
    assert "factor" in err
    code, out, err = call("run", config, *names, "method.factor=3", "--json", "--quiet")
    assert (code, err) == (0, "")
    done = json.loads(out)
    assert [step["classes"] for step in done["steps"]] == [["blue"], ["red", "green"]]
    assert done["config"]["method"]["factor"] == 3.0
    assert {name for line in journal(tmp_path / "runs" / "toy") for name in line.get("terms", {})} == {
        "loud_ce"
    }
    code, again, err = call("run", config, *names, "method.factor=3", "--json", "--quiet")
    assert (code, json.loads(again)) == (0, done)


def test_a_step_of_ones_own_plan_may_train_two_branches_in_turn(tmp_path: Path, call: Outcome) -> None:
    """The same images through a second branch, whose classes are swapped: each head learns its own labels."""
    plan = tmp_path / "plan.py"
    plan.write_text(
        "from dataclasses import replace\nfrom everseg.scenarios.class_incremental import build as usual\n"
        "def build(*arguments, **options):\n    first, *rest = usual(*arguments, **options)\n"
        "    swapped = lambda s: replace(s, branch='night', lut=s.lut.translate(bytes([0, 2, 1, *range(3, 256)])))\n"
        "    both = lambda sources: (*sources, *map(swapped, sources))\n"
        "    spaces = {**first.spaces, 'night': first.spaces['default']}\n"
        "    return (replace(first, train=both(first.train), test=both(first.test), spaces=spaces,\n"
        "                    grows={'default': 3, 'night': 3}),)\n"
    )
    train = {"epochs": 24, "batch": 4, "lr": 0.05, "log_every": 1}
    config = settings(tmp_path, method="ft", scenario={"kind": f"{plan}:build"}, train=train)
    done = everseg.run(config, quiet=True)
    one, other = (done.folder.counts(0)[branch] for branch in ("default", "night"))
    swap = [0, 2, 1]
    np.testing.assert_array_equal(one.sum(1), other.sum(1)[swap])
    for counts in (one, other):
        assert counts[1, 1] + counts[2, 2] > 4 * (counts[1, 2] + counts[2, 1]), (
            "a head learnt the other's labels"
        )
        assert counts[1, 1] + counts[2, 2] > 200
    code, out, err = call(
        "eval", tmp_path / "toy", USER_CODE, f"scenario.kind={plan}:build", "--json", "--quiet"
    )
    assert code == 0, err
    assert json.loads(out)["confusion"] == {"default": one.tolist(), "night": other.tolist()}


def test_stored_code_is_not_imported_unless_it_is_named_again(
    tmp_path: Path, call: Outcome, plug_ins: Path
) -> None:
    model, scenario, method = (f"{plug_ins}:{name}" for name in ("network", "plan", "Louder"))
    config = settings(
        tmp_path, method=method, model={"name": model, "options": {}}, scenario={"kind": scenario}, train=BASE
    )
    code = wait(start(config))
    assert code == 0
    imported = tmp_path / "imported"
    plug_ins.write_text(f"open({str(imported)!r}, 'w').close()\n" + plug_ins.read_text())
    named: list[str] = []
    for key, name in (("model", model), ("data", HERE), ("scenario.kind", scenario)):
        code, _, err = call("eval", tmp_path / "toy", *named, "--quiet")
        assert code == 2
        assert f"{key}={name}" in err, "the message says how to allow it"
        assert not imported.exists()
        named.append(f"{key}={name}")
    code, out, err = call("eval", tmp_path / "toy", *named, "--json", "--quiet")
    assert code == 0, err
    assert imported.exists()
    counts = np.load(tmp_path / "toy" / "steps" / "01" / "confusion.npz")["default"]
    assert json.loads(out)["confusion"]["default"] == counts.tolist()
    imported.unlink()
    with pytest.raises(CheckpointError, match="unknown model"):
        everseg.load(tmp_path / "toy")
    assert not imported.exists()
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "x.png")
    arguments = ("predict", tmp_path / "toy", tmp_path / "x.png", "-o", tmp_path / "out")
    code, _, err = call(*arguments)
    assert code == 4
    assert not imported.exists()
    assert not (tmp_path / "out").exists()
    assert "--model" in err
    code, _, err = call(*arguments, "--model", model)
    assert code == 0, err
    assert Image.open(tmp_path / "out" / "x_mask.png").size == (30, 20)


@pytest.mark.slow
def test_entry_points_of_an_installed_package_are_names_like_the_built_in_ones(tmp_path: Path) -> None:
    """A package with its metadata on sys.path is all that pip would install."""
    site = tmp_path / "site"
    info = site / "everseg_theirs-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: everseg-theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[everseg.methods]\nlouder = everseg_theirs:Louder\n"
        "[everseg.models]\nsmall = everseg_theirs:network\n"
        "[everseg.scenarios]\nbackwards = everseg_theirs:plan\n"
        "[everseg.datasets]\nrectangles = toy:build\n"
    )
    (site / "everseg_theirs.py").write_text(
        "\n".join(
            (METHOD, MODEL.replace("def build", "def network"), SCENARIO.replace("def build", "def plan"))
        )
    )
    config = settings(
        tmp_path, method="louder", data={"dataset": "rectangles"}, scenario={"kind": "backwards"}, train=BASE
    )
    config["model"] = {"name": "small", "norm": "bn"}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    paths = [str(site), str(Path(HERE.rpartition(":")[0]).parent), str(Path(everseg.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

    def everseg_cli(*arguments: str) -> str:
        command = [sys.executable, "-m", "everseg", *arguments]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "louder" in everseg_cli("list", "methods", "loud")
    done = json.loads(everseg_cli("run", str(tmp_path / "run.yaml"), "--json", "--quiet"))
    assert [step["classes"] for step in done["steps"]] == [["blue"], ["red", "green"]]
    assert done["config"]["method"] == {**done["config"]["method"], "name": "louder", "factor": 2.0}
    named = [
        "model=small",
        "data=rectangles",
        "scenario.kind=backwards",
    ]  # an installed package's code is foreign too
    found = json.loads(everseg_cli("eval", str(tmp_path / "toy"), *named, "--json", "--quiet"))
    counts = np.load(tmp_path / "toy" / "steps" / "01" / "confusion.npz")["default"]
    assert found["confusion"]["default"] == counts.tolist()


# ---------------------------------------------------------------- the record of a run


def test_the_journal_has_one_line_per_interval_with_everything(tmp_path: Path) -> None:
    train = {"epochs": 2, "epochs_next": 1, "batch": 4, "log_every": 4}
    done = everseg.run(settings(tmp_path, train=train), quiet=True)
    lines = journal(done.path)
    found = [(line["event"], line["step"], line["iteration"]) for line in lines]
    totals = [max(i for event, s, i in found if event == "train" and s == step) for step in (0, 1)]
    expected = []
    for step, total in enumerate(totals):
        expected += [("train", step, i) for i in range(1, total + 1) if i % 4 == 0 or i == total]
        expected.append(("test", step, sum(totals[: step + 1])))
    assert found == expected
    assert totals[0] > 4
    for line in lines:
        if line["event"] == "train":
            assert {"ce"} <= line["terms"].keys() <= {"ce", "kd"}
            assert ("kd" in line["terms"]) is (line["step"] == 1)
            assert line["lr"] > 0
            assert line["images_per_second"] > 0
            assert 0 < line["data_wait"] < 1
            assert line["memory"] > 2**20  # bytes
            assert math.isfinite(line["grad_norm"])
    rates = [line["lr"] for line in lines if line["event"] == "train" and line["step"] == 0]
    assert rates == sorted(rates, reverse=True)
    last = next(line for line in reversed(lines) if line["event"] == "train")
    assert last["lr"] == pytest.approx(0.02 * (1 - (totals[1] - 1) / totals[1]) ** 0.9)


def test_a_resumed_run_writes_no_line_twice(tmp_path: Path) -> None:
    undisturbed = settings(tmp_path, name="whole", train={"log_every": 1})
    assert complete(undisturbed) == 0
    config = settings(tmp_path, train={"log_every": 1, "checkpoint_every": 3})
    path = tmp_path / "toy" / "journal.jsonl"
    for iteration in (5, 4, 11):
        killed(config, "iteration", iteration)
        with path.open("a") as file:
            file.write('{"event": "train", "st')  # what a kill inside a write leaves
    assert complete(config) == 0
    keys = ("event", "step", "iteration", "epoch", "lr", "terms", "grad_norm", "scores")
    one, two = (
        [{key: line.get(key) for key in keys} for line in journal(tmp_path / name)]
        for name in ("whole", "toy")
    )
    assert two == one


def test_tensorboard_shows_losses_groups_classes_pictures_and_the_confusion_matrix(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = everseg.run(settings(tmp_path, tracker=["tensorboard"], train=BASE), quiet=True)
    events = EventAccumulator(
        str(done.path / "events"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    )
    events.Reload()
    tags = {kind: set(names) for kind, names in events.Tags().items() if isinstance(names, list)}
    assert {"train/loss", "train/loss/ce", "train/loss/kd", "train/lr", "sys/img_s", "sys/data_wait"} <= tags[
        "scalars"
    ]
    for group in ("all", "base", "old", "new"):
        series = [(e.step, e.value) for e in events.Scalars(f"val/miou/{group}")]
        wanted = [
            (3 * (i + 1), pytest.approx(step.miou[group], rel=1e-6))
            for i, step in enumerate(done.steps)
            if step.miou[group] is not None
        ]
        assert series == wanted
    assert [e.step for e in events.Scalars("train/loss/ce")] == [1, 2, 3, 4, 5, 6]
    terms = [line["terms"]["ce"] for line in journal(done.path) if line["event"] == "train"]
    assert [e.value for e in events.Scalars("train/loss/ce")] == pytest.approx(terms, rel=1e-6)
    assert events.Scalars("val/iou/blue")[0].value == pytest.approx(done.steps[1].class_iou["blue"], rel=1e-6)
    assert {"val/confusion", "val/pred/0", "val/legend"} <= tags["images"]
    picture = events.Images("val/pred/0")[0]
    assert (picture.width, picture.height) == (3 * 32 + 8, 32)
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("val/classes/text_summary")]
    assert all(name in texts[-1] for name in ("background", "red", "green", "blue"))
    assert events.Scalars("cl/forgetting/mean")[0].value == pytest.approx(
        done.sequence.forgetting.mean, rel=1e-5
    )


@pytest.mark.slow
def test_without_tensorboard_the_same_run_ends_the_same(tmp_path: Path) -> None:
    config = settings(tmp_path, name="with", tracker=["tensorboard"], train=BASE)
    done = everseg.run(config, quiet=True)
    code = (
        "import sys, json\nsys.modules['tensorboard'] = None\nimport everseg\n"
        f"everseg.run(json.loads({json.dumps(json.dumps({**config, 'name': 'without'}))}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(everseg.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "no TensorBoard events" in ended.stderr
    assert ended.stderr.count("no TensorBoard events") == 1
    other = tmp_path / "without"
    assert not (other / "events").exists()
    for index in (0, 1):
        name = Path("steps") / f"{index:02d}" / "final" / "model.safetensors"
        assert (other / name).read_bytes() == (done.path / name).read_bytes()


# ---------------------------------------------------------------- data sets on disk


def test_a_folder_with_a_descriptor_trains_from_another_place_and_another_root_gives_the_same(
    tmp_path: Path, call: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = build()
    root = tmp_path / "data"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for index in range(len(toy.splits[split])):
            image, mask = toy.splits[split].read(index)
            Image.fromarray(image).save(root / "images" / split / f"{index:03d}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{index:03d}.png")
    (root / "data.yaml").write_text(
        "name: rectangles\nimages: images/{split}\nmasks: masks/{split}\n"
        "classes: {0: background, 1: red, 2: green, 3: blue}\nbackground: background\nignore: [255]\n"
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    # The path starts from the file that names it, wherever the command is given.
    config = written(tmp_path, data={"dataset": "data/data.yaml"}, scenario={"task": "2-1"})
    code, out, err = call("run", config, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert [step["classes"] for step in json.loads(out)["steps"]] == [["red", "green"], ["blue"]]
    moved = tmp_path / "moved"
    shutil.move(root, moved)
    code, out, err = call(
        "eval", tmp_path / "runs" / "toy", f"data={moved / 'data.yaml'}", "--json", "--quiet"
    )
    assert code == 0, err
    counts = np.load(tmp_path / "runs" / "toy" / "steps" / "01" / "confusion.npz")["default"]
    assert json.loads(out)["confusion"]["default"] == counts.tolist()


def test_unknown_presets_and_keys_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        everseg.run(settings(tmp_path), overrides=["train.epoch=3", "data.crop=two"])
    assert "train.epoch" in str(caught.value)
    assert "data.crop" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_ft_and_mib_train_the_first_step_alike_so_the_demo_may_share_it(tmp_path: Path) -> None:
    for method in ("ft", "mib"):
        assert complete(settings(tmp_path / method, method={"name": method})) == 0
    one, other = (tmp_path / method / "toy/steps/00/final" for method in ("ft", "mib"))
    assert (one / "MANIFEST.json").read_bytes() == (other / "MANIFEST.json").read_bytes()
