"""Texts of somebody else where they leave everseg: files that other programs read, the terminal, names of folders."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from everseg.cli import output
from everseg.config.loading import from_stored, load
from everseg.display import for_csv, for_latex, for_markdown, printable
from everseg.errors import ConfigError
from everseg.files import system_text
from everseg.reports.page import csv_text
from saying import must_say

FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1")


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_of_a_csv_is_a_formula(text: str) -> None:
    assert str(for_csv(text))[0] == "'"
    assert csv_text([{"class": text}]).splitlines()[1].lstrip('"')[0] == "'"


@pytest.mark.parametrize("value", ["-12.5", "12.5 ± 0.4", "+3", "-1.5 – 2.0", "1e-5", -3.5, None, "road"])
def test_numbers_and_words_stay_as_they_are(value: object) -> None:
    assert for_csv(value) == value


HIDDEN = "a\u202eb\x1b[31m\x07\u2066c"


@pytest.mark.parametrize("escape", [for_csv, for_latex, for_markdown, printable])
def test_control_and_bidirectional_characters_are_shown_as_escapes(escape: Callable[[str], object]) -> None:
    assert not set(str(escape(HIDDEN))) & set("\u202e\u2066\x1b\x07")


def test_markdown_and_latex_show_markup_as_text() -> None:
    shown = for_markdown("[a](javascript:x) <img src=x>|`x`\n# b")
    assert "\n" not in shown
    assert all(shown[place - 1] == "\\" for place, letter in enumerate(shown) if letter in "[]<>|`#")
    assert for_latex(r"\input{/etc/passwd}$x$") == r"\textbackslash{}input\{/etc/passwd\}\$x\$"


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        " ",
        "/abs",
        "a/b",
        "../x",
        "a\\b",
        "c:x",
        "a\0b",
        "a\nb",
        "\u202ex",
        "x" * 201,
        "ä" * 101,
    ],
)
def test_the_name_of_a_run_is_the_name_of_one_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="name: expected") as caught:
        load({"name": name})
    must_say(str(caught.value), "out=DIR")
    assert from_stored({"name": name}).name == name, "a run that has such a name is read all the same"


@pytest.mark.parametrize("name", ["run", "a b", "ä", "voc-15-5", "x" * 200, "a.b", "..a"])
def test_other_names_are_allowed(name: str) -> None:
    assert load({"name": name}).name == name
    with pytest.raises(ConfigError, match="out: expected"):
        load({"name": name, "out": "a\0b"})


# ---------------------------------------------------------------- the operating system

ERRORS = {
    errno.ENAMETOOLONG: "shorter",
    errno.EXDEV: "one disk",
    errno.EDQUOT: "quota",
    errno.ENOSPC: "free some space",
    errno.ENOMEM: "memory",
    errno.EMFILE: "ulimit -n",
    errno.EIO: "disk",
    errno.EROFS: "read-only",
    errno.ELOOP: "link",
    errno.ENOTDIR: "no folder",
    errno.EFBIG: "ulimit -f",
}


@pytest.mark.parametrize("number", ERRORS)
def test_each_error_of_the_system_has_a_sentence_and_an_exit_code(
    number: int, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    error = OSError(number, os.strerror(number), "x.bin")
    must_say(system_text(error, "x.bin"), "x.bin", ERRORS[number])

    def fail(what: str) -> list[tuple[str, str]]:
        raise error

    monkeypatch.setattr("everseg.cli.main.listing", fail)
    code, _, err = call("list", "methods")
    assert code == 4, err
    must_say(err, "x.bin", ERRORS[number])
    assert "fault of everseg" not in err


def test_a_disk_without_inodes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.statvfs(tmp_path)
    full = os.statvfs_result((*found[:5], max(found.f_files, 1), 0, 0, *found[8:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    must_say(system_text(OSError(errno.ENOSPC, "x"), tmp_path / "a" / "b"), "disk full", "inodes")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_no_memory_has_a_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    def fail(what: str) -> list[tuple[str, str]]:
        raise error

    monkeypatch.setattr("everseg.cli.main.listing", fail)
    code, _, err = call("list", "methods")
    assert code == 4
    assert output.OUT_OF_MEMORY in err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_closed_and_full_streams_end_without_a_traceback(closed: str) -> None:
    words = f"{sys.executable} -m everseg list {'x' if '2>' in closed else 'scenarios'} {closed}"
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "fault of everseg" not in done.stderr
    assert done.returncode in (0, 2, 4), (done.returncode, done.stderr)
