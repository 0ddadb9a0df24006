"""The command that a run was started with: as it is recorded, and as text that can be typed again."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import PurePath
from types import ModuleType

PROGRAM = "everseg"
_MODULES = ("everseg.__main__", "everseg.cli.__main__", "everseg.cli.main")
"""What `python -m` and `torchrun -m` run."""
_OLD_NAMES = ("cli.py", "main.py", "__main__.py")
"""What stood for the program in older records, and stands there for any program that is a package's."""
_VERBS = ("run", "demo", "extend", "sweep")
"""Commands that train."""
FROM_PYTHON = "from Python, not by a command"


def given() -> list[str] | None:
    """The words of the command that this process was started with; None where Python code of the user's own was.

    However the command line was reached (its script, `python -m everseg`, torchrun), the first word is `everseg`.
    """
    return [PROGRAM, *sys.argv[1:]] if _is_command_line(sys.modules.get("__main__")) else None


def _is_command_line(main: ModuleType | None) -> bool:
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name in _MODULES
    return PurePath(getattr(main, "__file__", None) or "").stem in (PROGRAM, f"{PROGRAM}-script")


def text(recorded: Sequence[str] | None) -> str | None:
    """A recorded command, quoted for a shell; None where the run was started from Python.

    Older runs recorded the name of the file that was running; what is no command of everseg's was Python then too.

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
