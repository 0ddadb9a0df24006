"""Which cases of a test the everyday run keeps; the others run with --slow, as in `.ci/run`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Mark every case as slow but those to keep, which stand for the others day by day.

    A tuple is a case of several arguments.

    >>> [bool(case.marks) for case in some(["ft", "mib", "plop"], "mib")]
    [True, False, True]
    """
    cases = list(cases)
    unknown = [case for case in kept if case not in cases]
    assert not unknown, f"no case {unknown}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if case in kept else pytest.mark.slow
        )
        for case in cases
    ]
