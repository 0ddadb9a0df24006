"""The verdict of a report: each light goes on where it should and stays off where it should not."""

from __future__ import annotations

import doctest
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import counts, made_run, two_steps
from parsed_pages import parsed
from torch import ones

from everseg.reports import verdict as module
from everseg.reports.extension import gate_line
from everseg.reports.figures import curves_of
from everseg.reports.html import write_report
from everseg.reports.kinds import kind_of
from everseg.reports.picture_grid import Looked, alternating
from everseg.reports.verdict import Finding, Light, checkerboards, verdict
from everseg.runs.results import Results
from everseg.runs.run_folder import RunFolder

NORM = {"encoder.norm.running_mean": ones(2)}


def found(out: Path, preset: str = "demo-mib", *, name: str = "r", **made: Any) -> dict[str, Finding]:
    """What the verdict says of a run, by what it is about."""
    results = Results(RunFolder(made_run(out, name, preset, **{"tests": 50, **made})))
    curves = curves_of(results.journal)
    return {one.about: one for one in verdict(results, kind_of(results), curves)}


def lights(findings: Mapping[str, Finding]) -> dict[str, Light]:
    return {about: one.light for about, one in findings.items()}


def test_a_run_without_a_fault_has_green_lights_only_and_nothing_to_do(tmp_path: Path) -> None:
    told = found(tmp_path, **two_steps(0.8, 0.79, 0.7), weights=[NORM, NORM])
    assert set(told) == {"classes at 0", "old classes", "share of new classes", "flooding", "test images",
                         "batch norm"}, "without a journal nothing is said of the length of training"  # fmt: skip
    assert {one.light for one in told.values()} == {Light.GREEN}
    assert {one.then for one in told.values()} == {""}


def test_a_class_at_0_is_named_and_whether_it_is_predicted_at_all(tmp_path: Path) -> None:
    told = found(tmp_path, **two_steps(0.8, 0.79, 0.0))["classes at 0"]
    assert told.light is Light.RED
    assert "c3 (1 of 3 classes; never predicted)" in told.said
    assert "scenario.class_weights" in told.then
    assert "share of new classes" not in found(tmp_path, name="t", **two_steps(0.8, 0.79, 0.0))
    wrong = counts(0.8, 0.8)
    wrong[1] = [1000, 0, 0]
    wrong[2, 1] = 5
    said = found(tmp_path, "demo-offline-ft", name="s", steps=[{"default": wrong}], groups=[(3,)])[
        "classes at 0"
    ].said
    assert "c1 (1 of 2 classes)" in said


def test_a_class_that_was_forgotten_is_told_apart_from_one_that_was_never_learnt(tmp_path: Path) -> None:
    lost = found(tmp_path, "demo-ft", **two_steps(0.8, 0.0, 0.7))["classes at 0"]
    assert "forgotten since: c1, c2" in lost.said
    assert "train.epochs" not in lost.then
    both = found(tmp_path, "demo-ft", name="s", **two_steps(0.8, 0.0, 0.0))["classes at 0"]
    assert "forgotten since: c1, c2" in both.said
    assert "train.epochs" in both.then


def test_an_extension_is_told_no_setting_that_it_refuses(tmp_path: Path) -> None:
    overrides = ["scenario.kind=extension", "scenario.bundle=old", "scenario.task=[[c3]]"]
    for name, iou in (("r", 0.0), ("s", 0.3)):
        made = {"steps": [{"default": counts(0.8, 0.6, iou)}], "groups": [(3, 1)], "extends": True}
        told = found(tmp_path, name=name, overrides=overrides, **made)
        about = told["share of new classes" if iou else "classes at 0"]
        assert about.light is not Light.GREEN
        assert "train.epochs" in about.then
        assert "class_weights" not in about.then


def test_an_extension_that_lost_an_old_class_is_not_told_to_teach_it_more(tmp_path: Path) -> None:
    overrides = ["scenario.kind=extension", "scenario.bundle=old", "scenario.task=[[c3]]"]
    made = {"steps": [{"default": counts(0.8, 0.0, 0.6)}], "groups": [(3, 1)], "extends": True}
    about = found(tmp_path, name="r", overrides=overrides, **made)["classes at 0"]
    assert about.light is Light.RED
    assert "knew c2:" in about.then
    assert "--how thorough" in about.then
    assert "train.epochs" not in about.then


@pytest.mark.parametrize(
    ("kept", "said"),
    [({"share": 0.9, "gate": 0.8}, "PASS"), ({"share": 0.7, "gate": 0.8}, "FAIL"),
     ({"share": None, "gate": 0.8}, "FAIL"), ({"share": 0.7, "gate": None}, ""),
     ({"share": 0.7, "gate": 0.8, "verdict": "PASS, as it was written"}, "PASS, as"),
     ({}, "")],
)  # fmt: skip
def test_the_gate_of_runs_that_stored_no_sentence_is_said_too(kept: dict[str, Any], said: str) -> None:
    assert gate_line(kept).startswith(said)
    assert bool(gate_line(kept)) == bool(said)


@pytest.mark.parametrize(
    ("after", "light"), [(0.78, Light.GREEN), (0.7, Light.AMBER), (0.5, Light.RED)]
)  # fmt: skip
def test_old_classes_that_fell(tmp_path: Path, after: float, light: Light) -> None:
    told = found(tmp_path, **two_steps(0.8, after, 0.7))["old classes"]
    assert told.light is light
    assert f"{100 * after:.1f} mIoU without background now, 80.0" in told.said
    assert bool(told.then) == (light is not Light.GREEN)


def test_one_class_that_fell_is_seen_although_the_mean_stands(tmp_path: Path) -> None:
    steps = [{"default": counts(0.9, 0.1)}, {"default": counts(0.95, 0.04, 0.6)}]
    told = found(tmp_path, steps=steps, groups=[(3,), (3, 1)])["old classes"]
    assert told.light is Light.AMBER
    assert "less than half is left of c2" in told.said


def test_fine_tuning_is_told_to_use_a_method(tmp_path: Path) -> None:
    told = found(tmp_path, "demo-ft", **two_steps(0.8, 0.1, 0.7))["old classes"]
    assert "everseg list methods" in told.then
    assert "Fine-tuning" in told.then


@pytest.mark.parametrize(
    ("kept", "light"),
    [({}, Light.AMBER), ({"share": 0.97}, Light.GREEN), ({"share": 0.9}, Light.AMBER), ({"share": 0.5}, Light.RED),
     ({"share": 0.97, "verdict": "FAIL, less is left of c1"}, Light.RED)],
)  # fmt: skip
def test_what_an_extension_kept(tmp_path: Path, kept: dict[str, Any], light: Light) -> None:
    overrides = ["scenario.kind=extension", "scenario.bundle=old", "scenario.task=[[c3]]"]
    made = {"steps": [{"default": counts(0.8, 0.6, 0.5)}], "groups": [(3, 1)], "extends": True}
    path = made_run(tmp_path, "r", "demo-mib", overrides=overrides, **made)
    if kept:
        RunFolder(path).save_kept(1, {"how": "measured", "text": "", **kept})
    results = Results(RunFolder(path))
    told = {one.about: one for one in verdict(results, kind_of(results), None)}["old classes"]
    assert told.light is light
    assert bool(told.then) == (light is not Light.GREEN)


def test_new_classes_below_their_share(tmp_path: Path) -> None:
    told = found(tmp_path, **two_steps(0.8, 0.79, 0.4))["share of new classes"]
    assert told.light is Light.AMBER
    assert "c3 (3.1 % of the pixels called so, 7.7 % true)" in told.said
    assert found(tmp_path, name="s", **two_steps(0.8, 0.79, 0.6))["share of new classes"].light is Light.GREEN


def flooded(false: int, shown: int = 10) -> dict[str, Any]:
    """Ten images without class 3, in each of which so many of 1000 pixels are called so, and some with it."""
    images = np.zeros((10 + shown, 3, 4), np.int64)  # true, called so, and both
    images[:, :, 0] = 1000
    images[10:, :, 3] = 100
    images[:10, 1, 3] = false
    images[:10, 1:, 0] -= false
    last = np.diag(images[:, 2].sum(axis=0))
    last[0, 3] = 10 * false
    steps = [{"default": counts(0.8, 0.8)}, {"default": last}]
    return {"steps": steps, "groups": [(3,), (3, 1)], "images": {"default": images}}


@pytest.mark.parametrize(("false", "light"), [(5, Light.GREEN), (50, Light.AMBER), (500, Light.RED)])
def test_a_new_class_where_it_is_not(tmp_path: Path, false: int, light: Light) -> None:
    told = found(tmp_path, **flooded(false))["flooding"]
    assert told.light is light
    if light is not Light.GREEN:
        assert f"c3 on {false / 10:.1f} % of the area of 10 images without it" in told.said


def test_a_first_training_floods_nothing_and_has_no_old_classes(tmp_path: Path) -> None:
    told = found(tmp_path, "demo-offline-ft", steps=[{"default": counts(0.8, 0.6)}], groups=[(3,)])
    assert not {"flooding", "old classes"} & told.keys()


@pytest.mark.parametrize(("tests", "light"), [(3, Light.RED), (10, Light.AMBER), (50, Light.GREEN)])
def test_few_test_images(tmp_path: Path, tests: int, light: Light) -> None:
    assert found(tmp_path, **two_steps(0.8, 0.79, 0.7), tests=tests)["test images"].light is light


def test_few_images_of_one_class(tmp_path: Path) -> None:
    told = found(tmp_path, **flooded(0, shown=2))["test images"]
    assert told.light is Light.AMBER
    assert "c3 (2)" in told.said


def test_training_that_was_cut_short(tmp_path: Path) -> None:
    about = "length of training"
    cut = found(tmp_path, name="a", **two_steps(0.8, 0.79, 0.7), overrides=["train.max_iterations=40"])[about]
    assert cut.light is Light.AMBER
    assert "40 iterations" in cut.said
    overrides = ["train.max_iterations=40"]
    beyond = found(tmp_path, name="d", **two_steps(0.8, 0.79, 0.7), overrides=overrides, seconds=[9, 9])[
        about
    ]
    assert "max_iterations" not in beyond.said + beyond.then, "ten iterations do not reach the limit"
    few = found(tmp_path, name="b", **two_steps(0.8, 0.79, 0.7), seconds=[9, 9])[about]
    assert "step 0: 10, step 1: 10" in few.said
    missing = found(
        tmp_path, name="c", steps=[{"default": counts(0.8, 0.6)}], groups=[(3,)], planned_steps=3
    )[about]
    assert "2 of 3 steps" in missing.said
    assert "continues" in missing.then


@pytest.mark.parametrize(("last", "seen"), [(0.5, True), (0.97, False)])
def test_a_loss_that_still_falls(tmp_path: Path, last: float, seen: bool) -> None:
    path = made_run(tmp_path, "r", "demo-offline-ft", steps=[{"default": counts(0.8, 0.6)}], groups=[(3,)])
    values = [1.0] * 24 + [last] * 6
    lines = [
        {"event": "train", "step": 0, "iteration": 10 * n, "terms": {"ce": v}}
        for n, v in enumerate(values, 1)
    ]
    (path / "journal.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    results = Results(RunFolder(path))
    told = {one.about: one for one in verdict(results, kind_of(results), curves_of(results.journal))}
    assert ("loss still fell" in told["length of training"].said) == seen
    assert told["length of training"].light is (Light.AMBER if seen else Light.GREEN)


@pytest.mark.parametrize(
    ("batch", "parts", "light"), [(1, 1, Light.RED), (4, 2, Light.AMBER), (4, 1, Light.GREEN)]
)
def test_batch_norm_with_tiny_batches(tmp_path: Path, batch: int, parts: int, light: Light) -> None:
    given = [f"train.batch={batch}", f"train.accumulate={parts}"]
    made = two_steps(0.8, 0.79, 0.7)
    assert found(tmp_path, **made, overrides=given, weights=[NORM, NORM])["batch norm"].light is light
    assert "batch norm" not in found(tmp_path, name="without", **made, overrides=given)


def test_checkerboards_are_seen_in_predictions_and_thin_things_are_none() -> None:
    board = (np.indices((32, 32)).sum(0) // 1 % 2).astype(np.uint8)
    coarse = np.kron(board[:8, :8], np.ones((4, 4), np.uint8)).astype(np.uint8)
    poles = np.tile(np.array([0, 0, 0, 1], np.uint8), (32, 8))
    half = np.tile(np.repeat(np.array([0, 1], np.uint8), 16), (32, 1))

    def of(*predictions: np.ndarray, label: np.ndarray = half) -> float:
        looked = [Looked("x", "x", np.zeros((32, 32, 3), np.uint8), label, {0: p}) for p in predictions]
        return alternating(looked)["x"]

    assert of(board) == 1.0
    assert of(coarse) > 0.4
    assert of(poles) == of(half) == 0.0
    assert of(board, label=board) == 0.0, "what the labels have is no fault"
    (told,) = checkerboards({"day": of(board, half, half), "dusk": 0.0})
    assert told.light is Light.RED
    assert "day" in told.said
    assert checkerboards({}) == []
    assert checkerboards({"day": 0.001})[0].light is Light.GREEN


def test_domains_are_named_and_problems_come_first_on_the_page_and_in_its_file(tmp_path: Path) -> None:
    both = {"day": counts(0.8, 0.0), "dusk": counts(0.7, 0.5)}
    path = made_run(
        tmp_path, "r", "demo-day-dusk-ft", [{"day": counts(0.8, 0.6)}, both], [(3,), (3,)], tests=50
    )
    results = Results(RunFolder(path))
    page = parsed(write_report(results, results.config, images=0).path)
    stored = json.loads(page.download("r.json"))["verdict"]
    assert stored[0]["about"] == "classes at 0"
    assert stored[0]["said"].startswith("day: ")
    order = [str(light) for light in Light]
    assert [order.index(one["light"]) for one in stored] == sorted(
        order.index(one["light"]) for one in stored
    )
    assert page.text.index("What to look at") < page.text.index("Every domain after every step")
    for one in stored:
        assert one["said"] in page.text
        assert one["then"] in page.text


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(module, extraglobs={"np": np})
    assert result.attempted
    assert not result.failed
