"""`everseg --version`, `everseg env`, completion, and output that the terminal's encoding cannot hold."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import everseg
from everseg.cli import main as cli
from everseg.cli.output import give
from everseg.display import Result, table
from everseg.reports import installation

Call = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


def python(*words: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    kept = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **variables}
    return subprocess.run([sys.executable, *words], env=kept, capture_output=True, check=False, timeout=120)


def test_the_version_is_told_with_torch_device_and_extras(call: Call) -> None:
    code, out, err = call("--version")
    assert (code, err) == (0, "")
    first, second, *rest = out.splitlines()
    assert first == f"everseg {everseg.__version__}"
    assert torch.__version__ in second
    assert "device" in second
    assert "tensorboard" in " ".join(rest)


def test_env_tells_what_a_bug_report_needs_and_no_place(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EVERSEG_CACHE", str(tmp_path / "anna"))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    code, out, _ = call("env")
    assert code == 0
    for text in ("processor", "CPU threads", "memory", "numpy", metadata.version("numpy"), "extra timm"):
        assert text in out
    assert "anna" not in out
    told = json.loads(call("env", "--json")[1])
    assert told["variables"]["EVERSEG_CACHE"] == "set"
    assert told["variables"]["OMP_NUM_THREADS"] == "3"
    assert told["threads"] == torch.get_num_threads()
    assert told["packages"]["torch"] == torch.__version__
    assert not {"dev", "docs"} & set(told["extras"])
    assert str(everseg.env()) == out.rstrip() or "everseg" in str(everseg.env())


def test_an_extra_is_installed_if_all_its_packages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ['torch>=2; extra == "a"', 'numpy>=2; extra == "b"', 'no-such>=2 ; extra == "b"', "rich>=13"]
    monkeypatch.setattr(installation.metadata, "requires", lambda _: needs)
    told = installation.env()
    assert told.installed == ("a",)
    assert told.extras["b"] == {"numpy": metadata.version("numpy"), "no-such": "not installed"}
    assert told.packages == {"rich": metadata.version("rich")}
    assert "not installed: b" in told.summary()


def test_env_answers_where_torch_cannot_be_imported() -> None:
    code = (
        "import sys, builtins; sys.modules['torch'] = None\n"
        "from everseg.cli.main import main; main(['env', '--json'])"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["threads"] is None
    assert "cannot be imported" in told["device"]


def test_help_needs_no_torch_and_shells_complete_commands_and_presets() -> None:
    code = (
        "import sys\n"
        "try:\n from everseg.cli.main import main; main(['--help'])\n"
        "finally:\n assert 'torch' not in sys.modules\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert b"--version" in done.stdout
    assert b"--install-completion" in done.stdout
    for words, number, wanted in (("everseg sw", "1", "sweep"), ("everseg run demo-m", "2", "demo-mib")):
        found = python(
            "-m", "everseg", _EVERSEG_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number
        )
        assert wanted in found.stdout.decode().split()


class Told(Result):
    notes = ("\u9053\u8def \u00e9",)

    def shown(self) -> list[Any]:
        return ["\u9053\u8def \u00e9", table(["\u9053"], [["\u00e9 \u2500 \u8def"]], title="\u8def")]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_an_encoding_lacks_is_an_escape_and_no_error(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, "strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(cli, "guarded", lambda *_: give(Told()) or 0)
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 0
    for stream in streams.values():
        stream.flush()
        shown = stream.buffer.getvalue()
        assert ("\u9053\u8def".encode() if encoding == "utf-8" else rb"\u9053\u8def") in shown
        assert ("\u00e9".encode(encoding) if encoding != "ascii" else rb"\xe9") in shown


def test_the_locale_of_nobody_is_no_error() -> None:
    done = python(
        "-m", "everseg", "list", "\u9053", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", LANG="C"
    )
    assert done.returncode == 2
    assert b"error: list" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_source_distribution_has_all_tests() -> None:
    """Whatever git knows below the folders that `MANIFEST.in` names; the rest would have no reason to be left out."""
    manifest = (ROOT / "MANIFEST.in").read_text()
    told = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=False)
    if told.returncode:
        pytest.skip("no git checkout")
    folders = {name.partition("/")[0] for name in told.stdout.splitlines() if "/" in name} - {"src"}
    assert {f"graft {folder}" for folder in folders} <= set(manifest.splitlines())


@pytest.mark.slow
def test_a_built_source_distribution_holds_what_git_knows(tmp_path: Path) -> None:
    told = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=False)
    if told.returncode:
        pytest.skip("no git checkout")
    if int(metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools of this environment is older than the build asks for")
    copy = tmp_path / "checkout"
    for name in told.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=copy, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in told.stdout.splitlines() if (ROOT / name).is_file()} <= held
