"""The table that the scripts of this folder print while their cases run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from ray_cases import FailedError, asked

Bench = TypeVar("Bench")


def run_cases(cases: Mapping[str, Callable[[Bench], str]], bench: Bench, only: str = "") -> int:
    """Run cases one after the other, and print a row for each as soon as it has ended.

    Args:
        only: leave out cases that `asked` does not ask for.

    Returns:
        How many failed.
    """
    failed = 0
    print("| case | result | seconds |\n|---|---|---|", flush=True)
    for name, case in cases.items():
        if not asked(name, only):
            continue
        start = time.monotonic()
        try:
            result = case(bench)
        except FailedError as error:
            failed += 1
            result = f"FAILED: {error}"
        print(f"| {name} | {result} | {time.monotonic() - start:.0f} |", flush=True)
    return failed
