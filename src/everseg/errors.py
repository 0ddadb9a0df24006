"""The errors a user can cause, each with the exit code of its kind, and what their messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MORE = "more: "
"""How the last line of an error on the terminal begins: where its kind is explained stands behind it."""


def near_miss(name: object, known: Iterable[str], otherwise: str = "", *, below: str = "") -> str:
    """The end of a message: "; did you mean 'x'?", or `otherwise` where no known name is close.

    Args:
        below: what stands before the name where it is typed ("train.").
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean '{below}{close[0]}'?" if close else otherwise


def some(items: Sequence[str], most: int = 20, between: str = ", ") -> str:
    """The first items and how many more there are; one more than `most` is still shown.

    >>> some(["a", "b", "c", "d"], 2)
    'a, b, and 2 more'
    >>> some(["a", "b", "c"], 2)
    'a, b, c'
    """
    more = len(items) - most
    return between.join(items if more <= 1 else [*items[:most], f"and {more} more"])


class EversegError(Exception):
    """A problem to tell the user about: what, where, and what to do; shown without a traceback."""

    exit_code = 1
    topic = "internal"
    """Section of docs/errors.md that tells more."""


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
            text = "\n  ".join([head, *self.problems])
        super().__init__(text)


class DataError(EversegError):
    """A fault in the images, the masks, or their lists."""

    exit_code = 3
    topic = "data"


class CheckpointError(EversegError):
    """A checkpoint that is damaged, missing, or of another model or run; or one that cannot be written."""

    exit_code = 4
    topic = "checkpoint"


class DivergedError(EversegError):
    """A loss, an input or a weight that is no longer finite."""

    exit_code = 5
    topic = "diverged"


class GateError(EversegError):
    """A model that does not pass a check it had to pass: the quality kept, the parity of an exported file."""

    exit_code = 6
    topic = "gate"


class TimeBudgetReached(EversegError):  # noqa: N818 - an outcome, not a fault
    """The time budget is used up; the run is saved and the same command continues it."""

    exit_code = 75
    topic = "time-budget"


class Interrupted(EversegError):  # noqa: N818
    """A signal stopped the run at an iteration boundary; it is saved."""

    topic = "interrupted"

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
