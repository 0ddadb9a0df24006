"""The house: every import points down, there is no circle, and public names stay."""

from __future__ import annotations

import ast
import types
from pathlib import Path

import pytest

import everseg

PACKAGE = Path(everseg.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

HOUSE = """
cli > api > deploy > sweeps, reports > engine, interop > inference > runs, methods > scenarios
> data, models, losses, metrics > config > types, labels, registry > errors, files, progress, distributed,
display > everseg
"""
"""Rooms from the top of the house to its bottom; those between commas stand side by side and do not know each other.

`everseg` is the package's own file: the version, and addresses of public names, which are imported when first used."""

FLOORS = {
    room: height
    for height, floor in enumerate(reversed(HOUSE.split(">")))
    for room in floor.replace(",", " ").split()
}
LAUNCHERS = ("everseg.__main__",)
"""Files that only call the command line."""


def room(module: str) -> str:
    name = [*module.split("."), ""][1]
    return name if (name and (PACKAGE / name).is_dir()) or (PACKAGE / f"{name}.py").is_file() else "everseg"


def module_of(path: Path) -> str:
    parts = ("everseg", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


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
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if base == "everseg" or name in MODULES else base for name in names}
    return {name for name in found if name.split(".")[0] == "everseg"}


def faults(module: str, source: str, is_package: bool = False) -> list[str]:
    own = room(module)
    return [
        f"{module} imports {name}: {room(name)} does not stand below {own}"
        for name in sorted(imported(source, module, is_package))
        if room(name) != own and not FLOORS[room(name)] < FLOORS[own]
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    if module in LAUNCHERS:
        return
    assert room(module) in FLOORS, "a new room needs a place in HOUSE"
    assert faults(module, path.read_text(), path.name == "__init__.py") == []


def graph() -> dict[str, set[str]]:
    """Module -> modules of everseg it imports, inside functions too."""
    found = {}
    for module, path in MODULES.items():
        names = imported(path.read_text(), module, path.name == "__init__.py")
        found[module] = {name for name in names if name in MODULES} - {module, "everseg"}
    return found


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules along one circle of imports; [] = there is none."""
    state: dict[str, int] = {}
    way: list[str] = []

    def visit(module: str) -> list[str]:
        state[module] = 1
        way.append(module)
        for other in sorted(arrows[module]):
            if state.get(other) == 1:
                return [*way[way.index(other) :], other]
            if other not in state and (found := visit(other)):
                return found
        state[module] = 2
        way.pop()
        return []

    return next((found for module in sorted(arrows) if module not in state and (found := visit(module))), [])


def test_no_circle_of_imports() -> None:
    assert circle(graph()) == []


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_docstring_names_a_floor() -> None:
    assert [path.name for path in FILES if "(floor " in path.read_text()] == []


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("everseg.losses.x", "from everseg.models import build", True),
        ("everseg.data.x", "import everseg.models.blocks", True),
        ("everseg.losses.x", "from everseg.metrics import iou", True),
        ("everseg.types", "from everseg.labels import IGNORED", True),
        ("everseg.inference.x", "def f():\n    from everseg.deploy.extend import extend", True),
        ("everseg.methods.x", "def f():\n    from everseg import engine", True),
        ("everseg.methods.x", "from ..engine import step", True),
        ("everseg.runs.x", "from everseg.methods.base import Method", True),
        ("everseg.deploy.x", "from everseg.api import run", True),
        ("everseg.sweeps.x", "from everseg.reports import terminal", True),
        ("everseg.methods.x", "from .base import Method\nfrom everseg.losses import distillation", False),
        ("everseg.engine.x", "from everseg.methods.base import Method", False),
        ("everseg.cli.main", "from everseg import api", False),
        ("everseg.reports.x", "from everseg import __version__", False),
    ],
)
def test_the_floor_test_sees_wrong_imports(module: str, source: str, bad: bool) -> None:
    assert bool(faults(module, source)) is bad


def test_the_engine_knows_methods_only_through_their_contract() -> None:
    for path in (PACKAGE / "engine").glob("*.py"):
        names = {
            n for n in imported(path.read_text(), module_of(path), False) if n.startswith("everseg.methods")
        }
        files = {name for name in names if name.count(".") == 2}
        assert files <= {"everseg.methods.base", "everseg.methods.build", "everseg.methods.switches"}, (
            path.name
        )


def test_torchvision_is_never_imported() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torchvision" for name in names), path.name


def test_public_names() -> None:
    """What others rely on; removing a name needs a deprecation, adding one a line here."""
    assert sorted(everseg.__all__) == [
        "LabelPolicy", "LabelSpace", "Method", "Run", "__version__", "adopt", "bench", "compare", "data", "demo",
        "diff", "env", "evaluate", "export", "extend", "features", "history", "interop", "load", "losses", "metrics",
        "page", "predict", "preview", "pull", "push", "report", "rollback", "run", "scenarios", "serve", "show", "sign",
        "sweep", "verify",
    ]  # fmt: skip
    for name in everseg.__all__:
        assert getattr(everseg, name) is not None
    assert sorted(everseg.data.__all__) == ["check", "download", "init", "prepare", "saliency", "weights"]
    for name in everseg.data.__all__:
        assert callable(getattr(everseg.data, name))


def test_unknown_public_names_fail_as_usual() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = everseg.nothing
    with pytest.raises(AttributeError, match=r"'everseg\.data' has no attribute 'nothing'"):
        _ = everseg.data.nothing


def test_addresses_of_names_imported_when_used_point_down_too() -> None:
    """An address is an import that waits: those in a room's file obey the house like any other."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and any(
                ast.unparse(target) == "_LAZY" for target in node.targets
            ):
                names = {address.partition(":")[0] for address in ast.literal_eval(node.value).values()}
                assert module == "everseg" or all(faults(module, f"import {name}") == [] for name in names)


@pytest.mark.parametrize("package", [everseg, everseg.data], ids=lambda package: package.__name__)
def test_type_checkers_read_the_same_addresses(package: types.ModuleType) -> None:
    """Names that are imported when first used are `Any` to a type checker, but for the stub file beside them."""
    stub = Path(package.__file__).with_suffix(".pyi")
    found = {}
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "everseg":
            for alias in node.names:
                whole = node.module == "everseg"
                found[alias.asname] = (
                    f"{node.module}.{alias.name}" if whole else f"{node.module}:{alias.name}"
                )
    assert found == package._LAZY
