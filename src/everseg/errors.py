"""The errors that a user can cause, each kind with its exit code, and helpers for writing their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MORE = "more: "
"""Beginning of the last line of an error on the terminal. The place where its kind is explained follows."""


MOST_LISTED = 100
"""Most problems that a message lists. A file of 60,000 unknown keys has one fault, not 60,000."""


def near_miss(name: object, known: Iterable[str], otherwise: str = "", *, below: str = "") -> str:
    """Return the end of a message: "; did you mean 'x'?", or `otherwise` if no known name is close.

    A name in other letters (PLOP for plop) is close too, unless one in the same letters is.

    Args:
        below: the prefix that the user types before the name ("train.").
    """
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    if not close:
        folded = {one.casefold(): one for one in known}
        close = [folded[one] for one in difflib.get_close_matches(str(name).casefold(), folded, n=1)]
    return f"; did you mean '{below}{close[0]}'?" if close else otherwise


def some(items: Sequence[str], most: int = 20, between: str = ", ") -> str:
    """List the first items and say how many more there are. If only one item is left over, it is shown too.

    >>> some(["a", "b", "c", "d"], 2)
    'a, b, and 2 more'
    >>> some(["a", "b", "c"], 2)
    'a, b, c'
    """
    more = len(items) - most
    # "and 1 more" would be no shorter than the item itself.
    return between.join(items if more <= 1 else [*items[:most], f"and {more} more"])


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the kind of the error if it says nothing.

    >>> first_line(ValueError("too long: more follows")), first_line(ValueError())
    ('too long: more follows', 'ValueError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_clause(error: BaseException) -> str:
    """Return the part of one of our messages that says what is wrong. What to do follows its first semicolon.

    >>> first_clause(ValueError("no such file; give another"))
    'no such file'
    """
    return str(error).partition(";")[0]


class EversegError(Exception):
    """A problem that the user can mend. The message says what, where, and what to do; no traceback is shown."""

    exit_code = 1
    topic = "internal"
    """Section of docs/errors.md that explains this kind of error."""


class ConfigError(EversegError):
    """A wrong configuration, name, or command line."""

    exit_code = 2
    topic = "config"

    def __init__(self, problems: str | Sequence[str], where: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            text = f"{where}: {self.problems[0]}" if where else self.problems[0]
        else:
            head = f"{len(self.problems)} problems" + (f" in {where}" if where else "")
            text = f"{head}\n  " + some(self.problems, MOST_LISTED, "\n  ")
        super().__init__(text)


class DataError(EversegError):
    """A fault in the images, the masks, or their lists."""

    exit_code = 3
    topic = "data"


class CheckpointError(EversegError):
    """A checkpoint is damaged, missing, belongs to another model or run, or cannot be written."""

    exit_code = 4
    topic = "checkpoint"


class DivergedError(EversegError):
    """A loss, an input or a weight is no longer finite."""

    exit_code = 5
    topic = "diverged"


class GateError(EversegError):
    """A model fails a required check: the old classes' quality, or the parity of an exported file."""

    exit_code = 6
    topic = "gate"


class PeerError(EversegError):
    """Another process of the run is gone, or never came. What was saved counts, and the same command continues."""

    exit_code = 7
    topic = "peers"


class TimeBudgetReached(EversegError):  # noqa: N818 - an outcome, not a fault
    """The time budget is used up. The run is saved, and the same command continues it."""

    exit_code = 75
    topic = "time-budget"


class Interrupted(EversegError):  # noqa: N818
    """A signal stopped the run between two iterations. The run is saved."""

    topic = "interrupted"

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the convention of shells
