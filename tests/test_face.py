"""The Python face: every verb of the command line under the same name, with the same words and typed results."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import everseg
from everseg.api import Demo, DemoRow, Model
from everseg.cli.main import app
from everseg.config.loading import load
from everseg.data.doctor.findings import ClassRow, Report, finding
from everseg.data.get.draw_masks import Prepared
from everseg.data.proposal.describe import Proposal, Values
from everseg.data.proposal.guess import Guess
from everseg.data.verbs import ClassWeight, Downloaded, NewDescription, Weights
from everseg.deploy.adopt import Adopted
from everseg.deploy.asked import Preview
from everseg.deploy.bench import Bench, Form
from everseg.deploy.browser import BrowserPage
from everseg.deploy.bundle import Bundle, Contents, write_bundle
from everseg.deploy.diff import Became, Difference, ImageDifference
from everseg.deploy.extend import Extension
from everseg.deploy.history import Ancestor, History, Rollback
from everseg.deploy.hub import Pulled, Pushed
from everseg.deploy.old_classes import Gate, Kept
from everseg.deploy.sign import Signed, Verified
from everseg.display import OnceADictionary, Result
from everseg.engine.rescore import Scores, StepScores
from everseg.inference.predict import Prediction, Predictions, WrittenPrediction
from everseg.labels import LabelSpace
from everseg.models.build import deeplabv3_tiny
from everseg.reports.compare.comparison import Comparison
from everseg.reports.feature_shift import Drift, FeatureDrift
from everseg.reports.html import ReportFile
from everseg.reports.outline import Outline
from everseg.reports.run_scores import Change, RelativeDrop, RunStep, RunTable, SequenceScores
from everseg.runs.results import Taught
from everseg.sweeps.sweep import SlurmJobs, Sweep, SweepRun

NOT_IN_PYTHON = {
    "list": "prints names that a configuration may use",
    "docs": "prints pages",
    "import mib": "`everseg.api` has import_mib and export_mib: one verb there is two functions, one for each way",
    "weights list": "`everseg.interop.weights.catalogue`",
    "weights get": "`everseg.interop.weights.get`",
    "import mdil": "`everseg.api` has import_mdil, export_mdil and export_mdil_encoder",
}
NOT_COMMANDS = {
    "load": "a model in memory is of no use on a command line; `predict` loads one",
    "preview": "extend --dry-run",
}
NAMED = {"eval": "evaluate"}
"""`eval` is a built-in function of Python."""
TURNED = {"no_onnx": "onnx", "no_cache": "cache"}
"""Switches that leave something out -> the argument that has it."""
NAMED_ARGUMENTS = {**TURNED, "model": "builder"}
"""Option -> argument, where the argument of the same name is not there. `--model FILE.py:NAME` names a function on the
command line; Python passes the function itself."""
ONLY_OPTIONS = {
    "extend": {"dry_run": "everseg.preview(...)"},
    "show": {"as_yaml": "print(result.yaml)"},
    "sweep": {"ray": "on='ray'", "slurm": "on='slurm'"},
    "data init": {"yes": "Python never asks unless told to (ask)"},
}
ONLY_ARGUMENTS = {
    "sign": {"password": "the command line asks for it where the key's file is encrypted"},
    "run": {"sections": "further settings as keywords; on the command line all settings are KEY=VALUE"},
    "show": {"sections": "as for run"},
    "sweep": {"on": "--ray, --slurm"},
    "compare": {"write": "a notebook may want the tables alone"},
    "demo": {"shown": "where the command line prints its table, before the reports are made"},
    "data init": {
        "ask": "what the command line asks on the terminal",
        "ask_background": "what the command line asks on the terminal",
        "ask_reading": "what the command line asks on the terminal",
    },
}
UNEQUAL = {
    ("sweep", "methods"): "without it the command line tells which there are",
    ("run", "source"): "Python may give every setting as a keyword",
    ("show", "source"): "as for run",
}
"""Arguments that only one of the two needs."""
QUIET = "whether progress is shown; `--json` decides it for verbs without --quiet"


def commands(group: typer.Typer = app, above: str = "") -> Iterator[tuple[str, Callable[..., None]]]:
    """Every command with the function behind it."""
    for info in group.registered_commands:
        yield above + (info.name or info.callback.__name__), info.callback
    for info in group.registered_groups:
        yield from commands(info.typer_instance, f"{above}{info.name} ")


COMMANDS = {name: function for name, function in commands() if name not in NOT_IN_PYTHON}


def python_of(command: str) -> Callable[..., Any]:
    home, name = (
        (everseg.data, command.removeprefix("data ")) if command.startswith("data ") else (everseg, command)
    )
    return getattr(home, NAMED.get(name, name))


def arguments(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_every_command_has_a_function_of_its_name_and_every_function_a_command() -> None:
    functions = {name for name in everseg.__all__ if inspect.isfunction(getattr(everseg, name))}
    functions |= {f"data {name}" for name in everseg.data.__all__}
    wanted = {NAMED.get(name, name) for name in COMMANDS} | set(NOT_COMMANDS)
    assert functions == wanted
    assert set(NOT_IN_PYTHON) <= {name for name, _ in commands()}, "no entry is stale"
    for command in COMMANDS:
        function = python_of(command)
        assert function.__name__ == NAMED.get(command, command.removeprefix("data ")), (
            "one name all the way down"
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_options_and_arguments_have_the_same_names(command: str) -> None:
    options, taken = arguments(COMMANDS[command]), arguments(python_of(command))
    names = {name if name in taken else NAMED_ARGUMENTS.get(name, name) for name in options}
    only_options, only_arguments = ONLY_OPTIONS.get(command, {}), ONLY_ARGUMENTS.get(command, {})
    assert names - set(taken) == {"as_json", *only_options} - (set() if "as_json" in options else {"as_json"})
    assert set(taken) - names - {"quiet"} == set(only_arguments), QUIET
    assert "as_json" in options or command == "serve", "every result can be had as JSON"


def plain(value: Any) -> Any:
    """A default as it would be typed; what is left out is None."""
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    return str(value) if value not in (None, "") else None


@pytest.mark.parametrize("command", COMMANDS)
def test_options_and_arguments_have_the_same_defaults(command: str) -> None:
    options, taken = arguments(COMMANDS[command]), arguments(python_of(command))
    needed = inspect.Parameter.empty
    for name, option in options.items():
        argument = taken.get(name) or taken.get(NAMED_ARGUMENTS.get(name, ""))
        if argument is None or (command, name) in UNEQUAL:
            continue
        if name in TURNED:
            assert (option.default, argument.default) in ((False, True), (False, None)), name
        else:
            assert (option.default is needed) == (argument.default is needed), name
            assert plain(option.default) == plain(argument.default), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_result_has_a_type_that_shows_itself(command: str) -> None:
    function = python_of(command)
    given = typing.get_type_hints(function)["return"]
    assert (function.__doc__ or "").strip()
    for kind in typing.get_args(given) or (given,):
        assert isinstance(kind, type)
        assert issubclass(kind, Result)
        assert kind.__doc__
        for name in ("shown", "to_json"):
            assert getattr(kind, name) is not getattr(Result, name), name
        assert "__repr__" not in vars(kind) or command == "run", (
            "repr=False: the dataclass must not hide the table"
        )


def bundle(out: Path, names: list[str]) -> Bundle:
    """A bundle of a network that was never trained."""
    model = deeplabv3_tiny(widths=[8, 8, 8, 8], hidden=8, out_channels=8, norm="bn")
    model.grow({"default": len(names)})
    space = LabelSpace((tuple(range(len(names))),), tuple(names), background=0)
    return write_bundle(out, Contents(model.eval(), {"default": space}), onnx=False)


def test_a_loaded_model_says_what_it_knows(tmp_path: Path) -> None:
    model = everseg.load(bundle(tmp_path / "b", ["background", "road", "car\x1b"]).path)
    assert isinstance(model, Model)
    assert repr(model) == f"Model of {tmp_path / 'b'} that knows\n  background, road, car\\x1b"


# ---------------------------------------------------------------- what names from outside may not do

HOSTILE = '<script>alert("x")</script>\x1b[31m&'


class Seen(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


def scores() -> Scores:
    groups = {"old": 0.5, "new": None, "base": 0.5, "all": 0.25}
    each = {HOSTILE: 0.5, "road": None}
    return Scores(HOSTILE, groups, groups, None, 0.9, 0.8, 0.7, each, each, ("road",))


def estimate() -> dict[str, Any]:
    return {"old": {"mean": 0.5, "sd": 0.1, "n": 2, "interval": [0.4, 0.6]}}


def comparison() -> Comparison:
    group = {"name": HOSTILE, "joint": False, "seeds": [0, 1], "runs": [HOSTILE, "b"], "values": {"old": [0.4, 0.6]},
             "scores": estimate(), "differences": None}  # fmt: skip
    source = {"title": HOSTILE, "paper": HOSTILE, "source": HOSTILE, "url": HOSTILE, "conventions": [HOSTILE],
              "columns": ["old"], "ours": [{"group": HOSTILE, "old": {"mean": 50.0, "sd": None, "n": 1}}],
              "rows": [{"method": HOSTILE, "old": 49.0}]}  # fmt: skip
    other = {"source": HOSTILE, "groups": [HOSTILE], "because": [HOSTILE]}
    table = {"title": HOSTILE, "question": HOSTILE, "facts": {"data": HOSTILE}, "reasons": [HOSTILE],
             "numbers": ["old"], "base": HOSTILE,
             "groups": [group], "settings": [], "published": [source], "not_comparable": [other]}  # fmt: skip
    return Comparison.of({"everseg": "0", "tables": [table], "notes": [HOSTILE], "files": [HOSTILE]})


def results(folder: Path) -> dict[str, Result]:
    """One result of every kind, with hostile names wherever names come from outside."""
    made = bundle(folder / "b", ["background", "road", HOSTILE])
    miou = {"base": 0.5, "old": 0.5, "new": 0.5, "all": 0.5}
    ids = np.array([[0, 1, 1]], np.uint8)
    image = np.zeros((1, 3, 3), np.uint8)
    kept = Kept("measured", 0.9, {}, {}, HOSTILE)
    drift = Drift(HOSTILE, HOSTILE, 3, 1.0, 1.0, None, None, 0.5, 0.5, new=True)
    means = {"distance": 1.0, "spread": 1.0, "relative": None, "cosine": None, "accuracy_before": 0.5,
             "accuracy_after": 0.5}  # fmt: skip
    run = SweepRun(HOSTILE, Path(HOSTILE), HOSTILE, 0, HOSTILE, "failed", None, 5, HOSTILE)
    became = (Became(HOSTILE, "road", 0.5),)
    seen = {"index": 0, "new_classes": [HOSTILE], "train": 1, "test": 1, "background_pixels": 1, "ignored_pixels": 0,
            "hidden": {"old": {HOSTILE: 1}, "future": {}}, "leaks": {"shared_images": {}}, "domains": [HOSTILE],
            "classes": {HOSTILE: {"images": 1, "pixels": 2}}, "class_weights": {HOSTILE: 1.5}}  # fmt: skip
    proposal = Proposal(Path(HOSTILE), Guess(HOSTILE, {"images": HOSTILE, "masks": HOSTILE}), Values())
    return {
        "StepScores": StepScores(
            HOSTILE, 1, 3, {HOSTILE: scores()}, {HOSTILE: np.eye(2, dtype=np.int64)}, {HOSTILE: {HOSTILE: 3}}, 0.5
        ),
        "Prediction": Prediction(ids, ("background", HOSTILE), image, HOSTILE, 0),
        "Predictions": Predictions(
            Path(HOSTILE), (WrittenPrediction(Path(HOSTILE), Path(HOSTILE)),), {HOSTILE: HOSTILE}
        ),
        "Demo": Demo((DemoRow(HOSTILE, Path(HOSTILE), 0.5, **miou, forgetting=0.1),)),
        "ReportFile": ReportFile(Path(HOSTILE), 10, HOSTILE, 1, 1, (HOSTILE,)),
        "FeatureDrift": FeatureDrift(
            HOSTILE, 0, 1, "encoder", 8, 0, {HOSTILE: HOSTILE}, (drift,), {HOSTILE: means}, (HOSTILE,), (HOSTILE,),
            Path(HOSTILE),
        ),
        "Comparison": comparison(),
        "Sweep": Sweep(Path(HOSTILE), 1, (run,), SlurmJobs(Path(HOSTILE), (HOSTILE,), ())),
        "Bundle": made,
        "Extension": Extension(made, Path(HOSTILE), kept, (Taught(HOSTILE, 0.5, 0.1, 2, 0.2),), Gate(0.9)),
        "Preview": Preview((HOSTILE,), (HOSTILE,), (HOSTILE,), (HOSTILE,), HOSTILE, 1, 0.5, 2, 3.0),
        "History": History(
            Path(HOSTILE), HOSTILE,
            ({"step": 1, "method": HOSTILE, "classes": [HOSTILE], "train": [], "test": [],
              "scores": {HOSTILE: {"miou": {"old": 0.5}}}},),
            (Ancestor(1, HOSTILE, Path(HOSTILE)), Ancestor(1, HOSTILE, None)),
        ),
        "Bench": Bench(Path(HOSTILE), (32, 48), 1, 4, (Form(HOSTILE, 1, 0.1, 0.1, 0.1, 9.0, 1, 5),), (HOSTILE,)),
        "BrowserPage": BrowserPage(Path(HOSTILE), 1, "fp32"),
        "Pushed": Pushed(Path(HOSTILE), HOSTILE, HOSTILE, HOSTILE, 1, (HOSTILE,)),
        "Pulled": Pulled(made, HOSTILE, HOSTILE, (HOSTILE,)),
        "Signed": Signed(Path(HOSTILE), HOSTILE, Path(HOSTILE)),
        "Verified": Verified(Path(HOSTILE), HOSTILE, 1, None, (HOSTILE,), (HOSTILE,)),
        "Rollback": Rollback(Path(HOSTILE), Ancestor(1, HOSTILE, Path(HOSTILE)), True),
        "Difference": Difference(
            HOSTILE, HOSTILE, (ImageDifference(HOSTILE, 0.5, became),), 0.5, became, (HOSTILE,), (HOSTILE,),
            Path(HOSTILE),
        ),
        "Adopted": Adopted(made, HOSTILE, False),
        "Report": Report(
            HOSTILE,
            (finding("error", "layout", HOSTILE, HOSTILE, HOSTILE),),
            {HOSTILE: 1},
            (ClassRow(0, HOSTILE, {HOSTILE: 1}, {HOSTILE: 1}),),
            notes=(HOSTILE,),
        ),
        "Weights": Weights(HOSTILE, HOSTILE, 1.1, (ClassWeight(HOSTILE, 1, 2.0),)),
        "Prepared": Prepared(1, 2, (HOSTILE,)),
        "RunStep": RunStep(**vars(scores()), index=1, name=HOSTILE, classes=(HOSTILE,)),
        "RunTable": RunTable.of([{"step": 0, HOSTILE: HOSTILE, "all": 50.04, "old": None}], HOSTILE),
        "SequenceScores": SequenceScores(
            0.5, Change(0.1, domains={HOSTILE: 0.1}), Change(-0.1, domains={HOSTILE: -0.1}), miou={HOSTILE: 0.5},
            domains={HOSTILE: SequenceScores(0.5, Change(0.1), Change(-0.1))},
            relative_drop=RelativeDrop(-0.1, {HOSTILE: -0.1}, {HOSTILE: 0.6}, HOSTILE),
        ),
        "Outline": Outline(load({"out": HOSTILE}), (seen,), (HOSTILE,)),
        "Downloaded": Downloaded(HOSTILE, Path(HOSTILE)),
        "NewDescription": NewDescription(folder / "data.yaml", folder / "page.html", proposal, False, (HOSTILE,)),
    }  # fmt: skip


def test_names_from_outside_are_text_in_every_result(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f"<p>{HOSTILE}</p>")
    for name, result in results(tmp_path).items():
        shown = result._repr_html_()
        assert "script" not in Seen(shown).tags, name
        assert "\x1b" not in shown, name
        assert "\x1b" not in str(result), name
        assert str(result) == repr(result), name
        assert str(result).strip(), name
        assert result.to_json() is not None, name


def test_results_that_were_dictionaries_still_understand_their_keys(tmp_path: Path) -> None:
    """For one minor version, each with a warning."""
    (tmp_path / "page.html").write_text("")
    made = results(tmp_path)
    found = [one for one in (*made.values(), *made["Demo"].rows) if isinstance(one, OnceADictionary)]
    assert {type(one).__name__ for one in found} == {
        "StepScores", "ReportFile", "FeatureDrift", "Comparison", "Sweep", "Difference", "DemoRow", "RunStep",
        "SequenceScores",
    }  # fmt: skip
    for result in found:
        for key, value in result.to_json().items():
            with pytest.warns(DeprecationWarning, match="to_json"):
                assert result[key] == value
