"""Functions take what they read: a section, an `InputForm`, a `Session`, a value; few take the whole configuration."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import everseg

PACKAGE = Path(everseg.__file__).parent
WHOLE = "RunConfig"

STARTS = "starts or continues a run with it, or checks before that whether the run can work"
COMPARES = "compares it with another configuration"
HASHES = "hashes it"
DUMPS = "writes settings of many sections to a file, a command or a recipe"
LOADS = "applies the user's overrides to a stored configuration"
OPENS = "opens the data and models of a finished run as its stored configuration and the user's overrides say"

HANDLERS = {
    "deploy/export.py": {"recipe": DUMPS},
    "engine/rescore.py": {"stored_config": LOADS, "_job": COMPARES, "_refuse_training_settings": COMPARES},
    "engine/run.py": {
        "execute": STARTS, "_check_plan": STARTS, "_trial": STARTS, "_open": STARTS, "_run": STARTS,
        "_refused_preparation": STARTS, "_together": STARTS,
    },
    "engine/sharing.py": {"first_step_hash": HASHES, "_settings": COMPARES},
    "reports/baselines.py": {
        "drop_against_single": COMPARES, "_data": COMPARES, "_setting": COMPARES,
    },
    "reports/feature_shift.py": {"write_features": OPENS},
    "reports/html.py": {"write_report": OPENS, "report_at_the_end": OPENS},
    "reports/provenance.py": {"deviations": COMPARES, "command": DUMPS},
    "runs/results.py": {"is_complete": COMPARES},
    "sweeps/plan.py": {"_differences": COMPARES},
    "runs/run_folder.py": {"is_finished": COMPARES, "open": DUMPS},
}  # fmt: skip
"""File -> functions that handle the configuration as a whole, with the reason. A function that reads one section, or
two, does not belong here: pass it the sections. `config/`, which makes, checks and writes configurations, is free."""

FIELDS = {
    "api.py": {"Run.asked"},
    "engine/session.py": {"Session.config"},
    "reports/outline.py": {"Outline.config"},
    "sweeps/plan.py": {"GridRun.config"},
}
"""File -> fields that hold a whole configuration: that of one run, for whoever gets the object."""


def takers(source: str) -> Iterator[str]:
    """Functions with a parameter, and fields of classes, whose annotation names the whole configuration."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            told = [one.annotation for one in every if one is not None and one.annotation is not None]
            if any(WHOLE in ast.unparse(annotation) for annotation in told):
                yield getattr(node, "name", "lambda")
        elif isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and WHOLE in ast.unparse(line.annotation):
                    yield f"{node.name}.{ast.unparse(line.target)}"


def found() -> dict[str, set[str]]:
    names = {
        path.relative_to(PACKAGE).as_posix(): set(takers(path.read_text()))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "config"
    }
    return {file: each for file, each in names.items() if each}


def test_only_these_take_the_whole_configuration() -> None:
    listed = {file: {*HANDLERS.get(file, {}), *FIELDS.get(file, ())} for file in {*HANDLERS, *FIELDS}}
    taken = found()
    more = {file: sorted(each - listed.get(file, set())) for file, each in taken.items()}
    assert {file: each for file, each in more.items() if each} == {}, "pass the sections that these read"
    gone = {file: sorted(each - taken.get(file, set())) for file, each in listed.items()}
    assert {file: each for file, each in gone.items() if each} == {}, "these entries are stale"


def test_nobody_hides_it_behind_another_name() -> None:
    """Under an alias, or as a base class, the check above would not see it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.asname for a in node.names if a.name == WHOLE] if isinstance(node, ast.ImportFrom) else []
            )
            assert names in ([], [None]), path.name
            if isinstance(node, ast.Assign):
                assert ast.unparse(node.value) != WHOLE, path.name
            if isinstance(node, ast.ClassDef):
                assert WHOLE not in [ast.unparse(base) for base in node.bases], path.name


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(config: RunConfig): ...", ["f"]),
        ("def f(*, config: RunConfig | None = None): ...", ["f"]),
        ("def f(*configs: RunConfig): ...", ["f"]),
        ("def f(given: Mapping[str, 'RunConfig']): ...", ["f"]),
        ("def f(shown: Callable[[fields.RunConfig], None]): ...", ["f"]),
        (
            "class A:\n    config: RunConfig | None = None\n    def f(self, b: RunConfig): ...",
            ["A.config", "f"],
        ),
        ("def f():\n    async def g(a: RunConfig): ...", ["g"]),
        ("def f(data: DataConfig) -> RunConfig: ...", []),
    ],
)
def test_the_check_sees_it(source: str, names: list[str]) -> None:
    assert sorted(takers(source)) == names
