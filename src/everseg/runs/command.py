"""The command that started a run: record it, and print it as text that a user can type again."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import PurePath
from types import ModuleType

PROGRAM = "everseg"
_MODULES = ("everseg.__main__", "everseg.cli.__main__", "everseg.cli.main")
"""Modules that `python -m` and `torchrun -m` may run as everseg's command line."""
_OLD_NAMES = ("cli.py", "main.py", "__main__.py")
"""File names that older records hold in place of `everseg`. Other packages' programs may have the same names."""
_VERBS = ("run", "demo", "extend", "sweep")
"""Commands that train."""
FROM_PYTHON = "from Python, not by a command"


def given() -> list[str] | None:
    """Return the words of the command that started this process, or None if the user's own Python code started it.

    The first word is always `everseg`, whether its script, `python -m everseg` or torchrun started the command line.
    """
    return [PROGRAM, *sys.argv[1:]] if _is_command_line(sys.modules.get("__main__")) else None


def _is_command_line(main: ModuleType | None) -> bool:
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name in _MODULES
    return PurePath(getattr(main, "__file__", None) or "").stem in (PROGRAM, f"{PROGRAM}-script")


def text(recorded: Sequence[str] | None) -> str | None:
    """Quote a recorded command for a shell; None if the run was started from Python.

    Older runs recorded the name of the running file. If the words are no command of everseg, it was Python then too.

    >>> text(["cli.py", "run", "my file.yaml"])
    "everseg run 'my file.yaml'"
    >>> text(["ipykernel_launcher.py", "-f", "kernel.json"])
    """
    if not recorded:
        return None
    program, *words = map(str, recorded)
    if PurePath(program).stem == PROGRAM or (program in _OLD_NAMES and set(words) & set(_VERBS)):
        return shlex.join([PROGRAM, *words])
    return None
