"""The command line: verbs, messages, exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.main import get_command

from everseg import errors
from everseg.api import Demo, DemoRow, Run
from everseg.cli import main as cli
from everseg.cli.output import guarded
from everseg.engine.rescore import Scores, StepScores
from everseg.inference.predict import Predictions, WrittenPrediction
from everseg.reports import terminal as tables
from everseg.runs.run_folder import RunFolder
from saying import must_say

MIOU = {"all": 0.5, "base": 0.75, "old": 0.25, "new": 0.625}
STEP = {
    "classes": ["car", "b\x1b[31mus"], "miou": MIOU, "miou_without_background": {**MIOU, "all": None},
    "overall_accuracy": 0.9, "mean_accuracy": 0.8, "frequency_weighted_iou": 0.7, "harmonic_mean": 0.357,
    "class_iou": {"car": 0.5, "b\x1b[31mus": None},
}  # fmt: skip
RUN = {
    "name": "demo-mib", "path": "runs/demo-mib", "config": {}, "steps": [{"index": 0, **STEP}, {"index": 1, **STEP}],
    "average_miou": 0.5, "forgetting": {"mean": 0.123}, "backward_transfer": {"mean": -0.123},
}  # fmt: skip

Outcome = Callable[..., tuple[int, str, str]]


class Done(Run):
    """A run that nobody trained."""

    notes = ()

    def to_json(self) -> dict[str, Any]:
        return RUN


@pytest.fixture
def everseg(capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Call the command line in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the Python API by one that records its calls; values may be replaced, exceptions are raised."""
    known = {**STEP, "class_iou": [0.5, None], "class_accuracy": [None, None]}
    scores = Scores.of({**known, "branch": "main", "new_classes": ["car"]})
    answers: dict[str, Any] = {
        "run": Done(RunFolder(Path("runs/demo-mib"))),
        "evaluate": StepScores(
            "runs/x",
            1,
            7,
            {"main": scores},
            {"main": np.eye(2, dtype=np.int64)},
            notes=("class x met nobody",),
        ),
        "predict": Predictions(Path("out"), (WrittenPrediction(Path("a"), Path("b")),), {"a": "default"}),
        "demo": Demo(
            tuple(
                DemoRow(method, Path(f"runs/demo-{method}"), first, **MIOU, forgetting=lost)
                for method, first, lost in (("ft", 0.7, 0.6), ("mib", 0.7, 0.1), ("joint", None, None))
            )
        ),
        "import_mib": Path("out/final"),
        "export_mib": Path("x.pth"),
        "calls": [],
    }
    from everseg.api import show

    module = types.ModuleType("everseg.api")
    module.show = show  # writes nothing and trains nothing, so it is the real one

    def make(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            answers["calls"].append((name, args, kwargs))
            if isinstance(answers[name], BaseException):
                raise answers[name]
            if "shown" in kwargs:
                kwargs.pop("shown")(answers[name])
                print("reports")
            return answers[name]

        return call

    for name in ("run", "evaluate", "predict", "demo", "import_mib", "export_mib"):
        setattr(module, name, make(name))
    monkeypatch.setitem(sys.modules, "everseg.api", module)
    monkeypatch.setattr(sys.modules["everseg"], "api", module, raising=False)
    return answers


# ---------------------------------------------------------------- verbs


def test_run_passes_everything_on_and_prints_the_table(everseg: Outcome, api: dict[str, Any]) -> None:
    code, out, err = everseg("run", "demo-mib", "seed=1", "--dry-run", "train.lr=1e-3", "--quiet")
    assert (code, err) == (0, "")
    expected = {"overrides": ["seed=1", "train.lr=1e-3"], "dry_run": True, "quiet": True}
    assert api["calls"] == [("run", ("demo-mib",), expected)]
    row = next(line for line in out.splitlines() if line.split()[:1] == ["1"])
    assert row.split()[-8:] == ["25.0", "62.5", "50.0", "25.0", "62.5", "-", "35.7", "90.0"]
    assert "average over steps 50.0 · forgetting 12.3 · backward transfer -12.3" in out
    assert "dry run" in out


def test_run_json_is_the_whole_stdout(everseg: Outcome, api: dict[str, Any]) -> None:
    code, out, _ = everseg("run", "demo-mib", "--json")
    assert code == 0
    assert json.loads(out) == RUN


def test_only_the_first_process_prints(
    everseg: Outcome, api: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert everseg("run", "demo-mib") == (0, "", "")


def test_eval_prints_groups_and_classes(everseg: Outcome, api: dict[str, Any]) -> None:
    code, out, _ = everseg("eval", "runs/x", "--step", "1", "data=camvid")
    assert code == 0
    given = {"step": 1, "overrides": ["data=camvid"], "domain": None, "infer_domain": False, "quiet": False}
    assert api["calls"] == [("evaluate", (Path("runs/x"),), given)]
    rows = [line.split() for line in out.splitlines()]
    assert ["mIoU", "old", "25.0", "25.0"] in rows
    assert ["mIoU", "all", "50.0", "-"] in rows
    assert ["class", "IoU", "accuracy"] in rows, "a run of a version without Dice shows none"
    assert ["car", "50.0", "-"] in rows
    assert json.loads(everseg("eval", "runs/x", "--json")[1])["step"] == 1


def test_every_command_that_writes_somewhere_takes_the_short_option() -> None:
    def commands(group: Any) -> Iterator[Any]:
        for command in group.commands.values():
            yield from commands(command) if hasattr(command, "commands") else [command]

    written = [o for c in commands(get_command(cli.app)) for o in c.params if "--out" in o.opts]
    assert len(written) > 10
    assert [option for option in written if "-o" not in option.opts] == []


def test_predict_needs_a_folder_to_write_to(everseg: Outcome, api: dict[str, Any]) -> None:
    code, _, err = everseg("predict", "runs/x", "a.png")
    assert code == 2
    assert "--out" in err
    code, out, _ = everseg(
        "predict", "runs/x", "a.png", "b", "-o", "out", "--step", "0", "--domain", "dusk",
        "--extra", "proposals=maps", "--extra", "depth=a=b",
    )  # fmt: skip
    assert code == 0
    must_say(out, "1 image", "in out")
    given = {"step": 0, "builder": None, "domain": "dusk", "infer_domain": False, "quiet": False,
             "extra": {"proposals": "maps", "depth": "a=b"}, "precision": None, "require_signature": None,
             "format": "masks", "window": None}  # fmt: skip
    assert api["calls"] == [("predict", (Path("runs/x"), [Path("a.png"), Path("b")], Path("out")), given)]
    for wrong in ("proposals", "=maps", "proposals="):
        code, _, err = everseg("predict", "runs/x", "a.png", "-o", "out", "--extra", wrong)
        assert code == 2
        must_say(err, f"--extra {wrong}", "NAME=VALUE")


def test_demo_shows_methods_bars_runs_and_what_is_next(everseg: Outcome, api: dict[str, Any]) -> None:
    code, out, _ = everseg("demo", "--out", "here")
    assert code == 0
    assert api["calls"] == [("demo", (), {"out": Path("here"), "seed": 0, "quiet": False})]
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["joint"][1] != "70.0"
    lines = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert lines.index("joint") < lines.index("reports") < lines.index("Next:"), "the table waits for nothing"
    assert "runs/demo-mib" in out
    assert "everseg predict runs/demo-mib" in out
    after = out[out.index("reports") :]
    assert (
        after.index("runs/demo-mib/report.html")
        < after.index("everseg data init")
        < after.index("everseg show")
    )
    assert max(map(len, after.splitlines())) <= 80
    ft = next(line for line in out.splitlines() if line.split()[:1] == ["ft"])
    assert ft.split()[1:6] == ["70.0", "25.0", "62.5", "50.0", "60.0"]
    assert ft.count("▇") + ft.count("#") == 6


def test_import_goes_both_ways(everseg: Outcome, api: dict[str, Any]) -> None:
    assert everseg("import", "mib", "x.pth", "-o", "out", "--classes", "bg, cat")[0] == 0
    assert everseg("import", "mib", "out", "--back", "-o", "y.pth")[0] == 0
    expected = {"norm": "iabn", "output_stride": 16, "classes": ["bg", "cat"]}
    assert api["calls"] == [
        ("import_mib", (Path("x.pth"), Path("out")), expected),
        ("export_mib", (Path("out"), Path("y.pth")), {}),
    ]


def test_data_check_lists_faults_and_fails(everseg: Outcome, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "from everseg.errors import DataError\ndef build(root=None):\n    raise DataError('no image in it')\n"
    )
    skip = tmp_path / "skip.txt"
    code, out, _ = everseg("data", "check", f"{source}:build", "--write-skiplist", str(skip))
    assert code == 3
    must_say(out, "no image")
    assert skip.read_text() == ""
    code, out, _ = everseg("data", "check", f"{source}:build", "--json")
    assert code == 3
    assert json.loads(out)["ok"] is False


def test_data_download_refuses_other_data_sets(everseg: Outcome, tmp_path: Path) -> None:
    code, _, err = everseg("data", "download", "cityscapes", "--to", str(tmp_path / "x"))
    assert code == 2
    assert "cityscapes" in err


@pytest.mark.parametrize(
    ("what", "some"),
    [
        ("methods", "lwf-mc"), ("tasks", "voc 15-5s"), ("presets", "voc-15-5-mib"), ("models", "deeplabv3-tiny"),
        ("datasets", "folder"), ("policies", "plop"), ("scenarios", "class-incremental"),
    ],
)  # fmt: skip
def test_lists_name_what_a_configuration_may_use(everseg: Outcome, what: str, some: str) -> None:
    code, out, _ = everseg("list", what)
    assert code == 0
    assert what == "presets" or any(line.strip().startswith(some) for line in out.splitlines())
    assert some in [row["name"] for row in json.loads(everseg("list", what, "--json")[1])]
    assert some not in everseg("list", what, "zzz")[1]


def test_presets_stand_under_headings_that_say_what_is_new_and_which_data(everseg: Outcome) -> None:
    lines = everseg("list", "presets", "--all")[1].splitlines()
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert len(headings) == len(set(headings)) == 7
    at = [line.split()[:1] for line in lines].index(["camvid-day-dusk-mdil"])
    assert [line for line in lines[:at] if line in headings][-1].startswith(
        "New domains: CamVid by day and at dusk"
    )
    assert everseg("list", "presets", "demo-mib")[1].splitlines() == [
        "New classes on generated scenes (no data needed)",
        "  demo-mib       overlapped, ignore-void",
        "  demo-mib-augm  overlapped, ignore-void",
    ]  # fmt: skip


def test_presets_say_protocol_and_policy_and_are_found_by_every_spelling(everseg: Outcome) -> None:
    every = everseg("list", "presets", "--all")[1].splitlines()
    rows = {line.split()[0]: line for line in every if line[:1] == " "}
    assert rows["voc-15-1-plop"].split()[1:] == ["overlapped,", "plop-voc"]
    assert rows["voc-15-1-mib"].split()[1:] == ["disjoint,", "mib-voc"]
    assert rows["ade-100-50-rcil"].split()[1:] == ["overlapped,", "plop-ade"]
    assert rows["cs-bdd-mdil"].split()[1:] == ["ignore-void"]
    lines = everseg("list", "presets", "15-1-overlapped-plop")[1].splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["voc-15-1-plop", "overlapped,", "plop-voc", "(=", "voc-15-1-overlapped-plop)"]
    ]
    (entry,) = json.loads(everseg("list", "presets", "15-1-overlapped-plop", "--json")[1])
    assert (entry["protocol"], entry["policy"]) == ("overlapped", "plop-voc")
    assert "voc-15-5s-plop" in entry["also"]
    # What nobody published is named only where nothing else is.
    assert "disjoint-plop" not in everseg("list", "presets", "plop")[1]
    assert "voc-15-1-disjoint-plop" in everseg("list", "presets", "15-1-disjoint-plop")[1]


def test_presets_without_a_filter_are_groups_that_say_how_names_are_made(everseg: Outcome) -> None:
    out = everseg("list", "presets")[1]
    lines = out.splitlines()
    assert len(lines) < 70
    assert max(map(len, lines)) <= 80
    every = [row["name"] for row in json.loads(everseg("list", "presets", "--json")[1])]
    must_say(out, f"{len(every)} presets")
    must_say(out, "everseg list presets", "--all")
    parts = [line.split("  ")[-1].strip() for line in lines if line.startswith(" ")]
    named = {word.strip() for part in parts for word in part.split(",")}
    for example in re.findall(r"such as (\S+)", out):
        assert example in every
    for word in ("15-1", "100-50b", "overlapped", "lwf-mc", "mdil+mib", "cs-idd-bdd"):
        assert word in named, word


def test_policies_say_what_becomes_of_each_kind_of_pixels(everseg: Outcome) -> None:
    rows = {row["name"]: row["help"] for row in json.loads(everseg("list", "policies", "--json")[1])}
    tests = {name: text.split("test: ")[1].split(";")[0].split(", ") for name, text in rows.items()}
    assert all("earlier classes: own id" in parts for parts in tests.values())
    assert tests["mib-voc"] == [
        "void + later classes: ignored",
        "background: background",
        "earlier classes: own id",
    ]
    assert tests["mib-ade"][0] == "void + background + later classes: ignored"
    assert tests["plop-voc"] == tests["plop"] == tests["plop-ade"]
    must_say(rows["plop-ade"], "raw 0")
    must_say(rows["plop-voc"], "same table", "plop-ade", "plop")
    must_say(rows["plop"], "older name", "plop-voc", "plop-ade")
    assert "same table" not in rows["mib-voc"] + rows["ignore-void"]


def test_show_explains_every_key_and_hyper_parameter(everseg: Outcome) -> None:
    code, out, _ = everseg("show", "voc-15-1-mib", "train.lr=1e-3")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert rows["train.lr"].split()[1] == "0.001"
    assert rows["method.kd_weight"].split()[1] == "100.0"
    assert "distillation" in rows["method.kd_weight"]


def test_show_begins_with_the_steps(everseg: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    out = everseg("show", "voc-15-1-mib")[1]
    steps = out[: out.index("train.lr")].splitlines()
    assert [line.split()[:2] for line in steps if line.split()[:1] == ["5"]] == [["5", "1"]]
    must_say(out[: out.index("train.lr")], "0", "15", "aeroplane")
    must_say(out[: out.index("train.lr")], "data.root=DIR")
    monkeypatch.setenv("COLUMNS", "80")
    out = everseg("show", "demo-mib")[1]
    assert out.index("person, sign") < out.index("train.lr")
    lines = out[: out.index("Settings")].splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines), "no blanks at the ends of lines"
    assert "building, tree" in out


def test_show_yaml_is_a_file_to_start_from(everseg: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(everseg("show", "camvid-6-5-mib", "--yaml")[1])
    assert json.loads(everseg("show", str(path), "--json")[1]) == json.loads(
        everseg("show", "camvid-6-5-mib", "--json")[1]
    )


def test_scenario_tables_show_images_pixels_and_leaks() -> None:
    step = {
        "index": 0, "new_classes": ["car"], "train": 12, "test": 7, "background_pixels": 1234, "ignored_pixels": 5,
        "hidden": {"old": {}, "future": {"bus": 88}}, "leaks": {"shared_images": {"1": 3}},
        "classes": {"car": {"images": 12, "pixels": 4321}},
    }  # fmt: skip
    from rich.console import Console

    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    for table in tables.scenario_tables([step]):
        console.print(table)
    text = console.export_text()
    for part in ("1,234", "88", "3 with step 1", "4,321", "12"):
        assert part in text


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("a"), 2), (errors.DataError("a"), 3), (errors.CheckpointError("a"), 4),
        (errors.DivergedError("a"), 5), (errors.TimeBudgetReached("a"), 75), (errors.Interrupted("a", 2), 130),
        (errors.Interrupted("a", 15), 143), (KeyboardInterrupt(), 130), (OSError(28, "No space left", "x"), 4),
        (RuntimeError("a"), 1),
    ],
)  # fmt: skip
def test_every_failure_is_one_message_and_its_exit_code(
    everseg: Outcome, api: dict[str, Any], error: BaseException, code: int
) -> None:
    api["run"] = error
    found, out, err = everseg("run", "demo-mib")
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    more = [] if isinstance(error, KeyboardInterrupt | RuntimeError) else ["more: everseg docs errors#"]
    assert [line[: len("more: everseg docs errors#")] for line in err.splitlines()[1:]] == more


def test_debug_adds_the_traceback(everseg: Outcome, api: dict[str, Any]) -> None:
    api["run"] = RuntimeError("oh")
    assert "--debug" in everseg("run", "demo-mib")[2]
    assert "Traceback" in everseg("run", "demo-mib", "--debug")[2]


def test_control_characters_are_shown_not_sent(everseg: Outcome, api: dict[str, Any]) -> None:
    assert "\x1b" not in everseg("run", "demo-mib")[1]
    assert "b\\x1b[31mus" in everseg("run", "demo-mib")[1]
    api["run"] = errors.DataError("bad \x1b[2Jname")
    assert everseg("run", "x")[2].splitlines()[0] == "error: bad \\x1b[2Jname"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["rnu", "x"], "'run'"),
        (["run", "x", "--dryrun"], "--dry-run"),
        (["data", "chek", "voc"], "'check'"),
        (["list", "method"], "'methods'"),
        (["show", "voc-15-5-mibb"], "'voc-15-5-mib'"),
        (["show", "demo-mib", "train.epoch=3"], "'train.epochs'"),
    ],
)
def test_typos_get_the_nearest_name(everseg: Outcome, arguments: list[str], hint: str) -> None:
    code, _, err = everseg(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert hint in err


words = st.sampled_from(
    ["run", "show", "list", "eval", "data", "check", "import", "mib", "predict", "--json", "--step", "-1", "1", "-o",
     "--yaml", "--", "methods", "presets", "demo-mib", "voc-15-5-mib", "train.lr=1", "x=", "=", "--debug=1", "\x1b"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(words | st.text(st.characters(codec="utf-8"), max_size=4), max_size=6))
def test_any_arguments_end_in_a_known_exit_code(
    everseg: Outcome, api: dict[str, Any], arguments: list[str]
) -> None:
    code, _, err = everseg(*arguments)
    assert code in (0, 2, 3, 4)
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 50


# ---------------------------------------------------------------- a process of its own


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    source = str(Path(cli.__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": source}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=60, **options
    )


@pytest.mark.parametrize(
    "line",
    ["--help", "run --help", "data --help", "list methods", "list presets", "list models", "list datasets",
     "list scenarios", "list tasks", "list policies", "docs", "docs errors#data"],
)  # fmt: skip
def test_help_lists_and_pages_do_not_import_torch(line: str) -> None:
    """So that they answer at once; `python -m benchmarks.startup` has the times."""
    code = (
        f"import sys\nfrom everseg.cli.main import main\ntry:\n main({line.split()!r})\nexcept SystemExit as stop:\n"
        " assert not stop.code, stop.code\n"
        "assert not {'torch', 'accelerate'} & set(sys.modules)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_importing_everseg_imports_next_to_nothing() -> None:
    code = "import sys\nimport everseg\nassert not {'torch', 'numpy', 'pydantic', 'typer'} & set(sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    source = str(Path(cli.__file__).resolve().parents[2])
    done = subprocess.run(
        f'"{sys.executable}" -m everseg list presets | head -n 1; echo "${{PIPESTATUS[0]}}"',
        shell=True, executable="/bin/bash", capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["New classes on Pascal VOC 2012 (data.root=DIR)", "0"]
    assert done.stderr == ""


def test_a_reader_that_is_gone_before_the_first_line_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command-line library would end with 1, which means a fault."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # the library replaces both
    assert guarded(cli.app, ["list", "methods"], False) == -1


def test_a_closed_stdout_is_no_error() -> None:
    done = python(
        "-c", "import os\nos.close(1)\nfrom everseg.cli import main as cli\ncli.main(['list', 'presets'])"
    )
    assert "Traceback" not in done.stderr
