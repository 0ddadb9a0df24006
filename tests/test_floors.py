"""Ratchets: imports point down the floors, files stay short, public names stay."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import everseg

PACKAGE = Path(everseg.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# Unit -> floor. A unit imports units of lower floors, and its own files.
FLOORS = {
    "everseg": 0, "types": 0, "labels": 0, "errors": 0, "registry": 0,
    "losses": 1, "metrics": 1, "config": 1,
    "data": 2, "models": 2,
    "scenarios": 3,
    "methods": 4,
    "engine": 5,
    "cli": 6, "api": 6, "evaluation": 6, "predictor": 6, "report": 6, "interop": 6,
    "deploy": 6, "many": 6,
}  # fmt: skip
SAME_UNIT = {
    "config_checks": "config", "config_loading": "config", "config_text": "config", "config_yaml": "config",
    "config_methods": "config", "presets": "config", "cli_support": "cli", "cli_data": "cli",
    "cli_import": "cli", "cli_init": "cli", "cli_docs": "cli",
    "cli_report": "cli", "cli_many": "cli", "cli_deploy": "cli",
}  # fmt: skip
FREE = (0, 6)
"""Floors whose units may use one another."""


def unit(module: str) -> str:
    name = [*module.split("."), ""][1]
    return SAME_UNIT.get(name, name or "everseg")


def module_of(path: Path) -> str:
    parts = ("everseg", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Modules of everseg that a file imports, those under TYPE_CHECKING and inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "everseg" else {base}
    return {name for name in found if name.split(".")[0] == "everseg"}


def faults(module: str, source: str, is_package: bool = False) -> list[str]:
    own = unit(module)
    wrong = []
    for name in imported(source, module, is_package):
        other = unit(name)
        if (
            other != own
            and not FLOORS[other] < FLOORS[own]
            and not (FLOORS[own] == FLOORS[other] and FLOORS[own] in FREE)
        ):
            wrong.append(f"{module} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    assert unit(module_of(path)) in FLOORS, "a new unit needs a floor"
    assert faults(module_of(path), path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("everseg.losses.x", "from everseg.models import build", True),
        ("everseg.data.x", "import everseg.models.blocks", True),
        ("everseg.losses.x", "from everseg.metrics import iou", True),
        ("everseg.methods.x", "def f():\n    from everseg import engine", True),
        ("everseg.methods.x", "from ..engine import step", True),
        ("everseg.methods.x", "from .base import Method\nfrom everseg.losses import distillation", False),
        ("everseg.engine.x", "from everseg.methods.base import Method", False),
        ("everseg.cli.main", "from everseg import api", False),
    ],
)
def test_the_floor_test_sees_wrong_imports(module: str, source: str, bad: bool) -> None:
    assert bool(faults(module, source)) is bad


def test_the_engine_knows_methods_only_through_their_contract() -> None:
    for path in (PACKAGE / "engine").glob("*.py"):
        names = {
            n for n in imported(path.read_text(), module_of(path), False) if n.startswith("everseg.methods")
        }
        assert names <= {"everseg.methods.base", "everseg.methods.build"}, path.name


def test_torchvision_is_never_imported() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torchvision" for name in names), path.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_public_names() -> None:
    """What others rely on; removing a name needs a deprecation, adding one a line here."""
    assert sorted(everseg.__all__) == [
        "LabelPolicy", "LabelSpace", "Method", "Run", "__version__", "compare", "evaluate", "interop", "load", "losses",
        "metrics", "predict", "run", "scenarios", "sweep",
    ]  # fmt: skip
    for name in everseg.__all__:
        assert getattr(everseg, name) is not None


def test_unknown_public_names_fail_as_usual() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = everseg.nothing
