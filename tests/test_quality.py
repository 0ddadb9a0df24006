"""The tree is formatted, lint-free and typed; the package imports with its core dependencies alone."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import numpy as np
import pytest

import everseg
from everseg.runs import versions as recorded

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
OPTIONAL = (
    "tensorboard",
    "matplotlib",
    "pytest",
    "hypothesis",
    "sklearn",
    "datasets",
    "torchvision",
    "timm",
    "transformers",
    "mypy",
    "scipy",
    "ray",
    "wandb",
    "mlflow",
    "trackio",
)
"""Packages that only some users have; nothing may need them to be imported."""

BLOCKER = """
import importlib, importlib.machinery, json, pkgutil, sys
class Without:
    finders = sys.meta_path[:]
    find_distributions = staticmethod(importlib.machinery.PathFinder.find_distributions)
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in BLOCKED:
            for finder in self.finders:
                if (spec := finder.find_spec(name, path, target)) is not None:
                    return spec
sys.meta_path[:] = [Without()]
"""


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec(arguments[0]) is None:
        pytest.skip(f"{arguments[0]} is not installed (pip install 'everseg[dev]')")
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "error::DeprecationWarning:everseg", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables, check=False)


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=["lint", "format"])
def test_ruff_has_nothing_to_say(arguments: tuple[str, ...]) -> None:
    done = tool("ruff", *arguments, "--no-cache", ".")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_the_ci_runs_the_slow_tests_too(request: pytest.FixtureRequest) -> None:
    assert isinstance(request.config.getoption("--slow"), bool)
    assert 'export PYTEST_ADDOPTS="--slow ' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_mypy_has_nothing_to_say() -> None:
    done = tool("mypy")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_every_module_imports_with_the_core_dependencies_alone() -> None:
    code = (
        f"BLOCKED = {OPTIONAL!r}\n{BLOCKER}\n"
        "import everseg\n"
        "names = [m.name for m in pkgutil.walk_packages(everseg.__path__, 'everseg.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "for name in everseg.__all__: getattr(everseg, name)\n"
        "from everseg import registry\n"
        "for kind, table in registry.BUILTIN.items():\n"
        "    for name in table: registry.resolve(kind, name)\n"
        "print(json.dumps(names))\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr[-3000:]
    found = set(json.loads(done.stdout))
    files = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for path in (SOURCE / "everseg").rglob("*.py")
    }
    missing = {name for name in files if not name.endswith("__init__")} - found
    assert not missing, "not importable as part of the package"


def test_importing_the_package_is_cheap_and_changes_nothing() -> None:
    code = (
        "import os, signal, sys, warnings\n"
        "before = (dict(os.environ), signal.getsignal(signal.SIGINT), list(warnings.filters), list(sys.path))\n"
        "import everseg\n"
        "assert before == (dict(os.environ), signal.getsignal(signal.SIGINT), list(warnings.filters), sys.path)\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'PIL', 'accelerate')))\n"
        "everseg.LabelSpace, everseg.LabelPolicy\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_the_core_needs_only_what_it_declares() -> None:
    """Every package imported anywhere in src is a declared dependency, of the standard library, or an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=!~\[; ]", text)[0].lower() for text in project["dependencies"]}
    modules = {"pyyaml": "yaml", "pillow": "PIL"}
    allowed = (
        {modules.get(name, name) for name in declared}
        | {"everseg", "tensorboard"}
        | set(sys.stdlib_module_names)
    )
    optional = {
        "huggingface_hub",
        "matplotlib",
        "sklearn",
        "transformers",
        "timm",
        "datasets",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "pillow_heif",
        "wandb",
        "mlflow",
        "cryptography",
        "openvino",
    }  # used on request only, and told if absent
    strange = set()
    for path in (SOURCE / "everseg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            strange |= {
                f"{path.name}: {name}" for name in names if name.split(".")[0] not in allowed | optional
            }
    assert not strange


def test_every_dependency_is_explained() -> None:
    """docs/dependencies.md has a row for each package of the core and of the extras, and for no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *(text for texts in extras.values() for text in texts)]
    names = {re.split(r"[<>=!~\[; ]", text)[0].lower() for text in listed} - {"everseg"}
    page = (ROOT / "docs" / "dependencies.md").read_text().partition("## Own code")[0]
    page = page.partition("## PyTorch and Python")[0]  # its rows are of versions that were tried
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in page.splitlines() if row[:1] == "|"
    ]
    cells = [row[-2] for row in rows if set(row[0]) != set("-")]
    explained = {name.lower() for cell in cells for name in cell.split(", ")} - {"package", "packages"}
    assert explained == names
    assert {row[0].strip("`") for row in rows if len(row) == 3} - {"extra", "---"} == set(extras)


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert "version" in project["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", everseg.__version__)
    try:
        assert distribution("everseg").version == everseg.__version__
    except PackageNotFoundError:
        pytest.skip("everseg is not installed; its metadata cannot be compared")


def test_a_checkout_that_nobody_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installation says of everseg is asked for nowhere but where its absence is looked after."""

    def absent(name: str) -> str:
        if name == "everseg":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(recorded, "version", absent)
    assert recorded.versions("everseg", "numpy") == {"everseg": everseg.__version__, "numpy": np.__version__}
    files = SOURCE.rglob("*.py")
    asking = {file.name for file in files if "metadata import version" in file.read_text(encoding="utf-8")}
    assert asking == {"versions.py"}


def test_names_that_others_rely_on() -> None:
    """Fixed in the issue; removing one breaks somebody's script."""
    from everseg import api, losses, metrics
    from everseg.config import presets

    for name in (
        "cross_entropy",
        "unbiased_cross_entropy",
        "distillation",
        "unbiased_distillation",
        "binary_cross_entropy",
    ):
        assert callable(getattr(losses, name))
    assert {"update", "counts", "iou"} <= set(dir(metrics.ConfusionMatrix))
    assert callable(everseg.interop.mib.load)
    assert {
        "demo-ft",
        "demo-mib",
        "demo-joint",
        "voc-15-5-mib",
        "voc-15-1-overlapped-mib",
        "ade-100-50b-lwf",
    } <= set(presets.names(every=True))
    for name in (
        "run",
        "load",
        "evaluate",
        "predict",
        "Run",
        "demo",
        "show",
        "import_mib",
        "export_mib",
    ):
        assert callable(getattr(api, name)), name
    for name in ("run", "load", "evaluate", "predict", "Run"):
        assert getattr(everseg, name) is getattr(api, name)
    assert {"table", "steps", "path", "to_json"} <= set(dir(everseg.Run))


def test_no_tracked_file_names_a_machine() -> None:
    if shutil.which("git") is None:
        pytest.skip("no git here")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(?:work|root|home/\w+|tmp/v)/")
    guilty = []
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".sh", ".json"}
            and path != Path(__file__).resolve()
        ):
            guilty += [
                f"{name}:{number}"
                for number, line in enumerate(
                    path.read_text(encoding="utf-8", errors="replace").splitlines(), 1
                )
                if pattern.search(line)
            ]
    assert guilty == []
