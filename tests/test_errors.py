"""What the messages of errors share."""

from __future__ import annotations

import doctest

import pytest

from everseg import errors, labels
from everseg.errors import near_miss, some


@pytest.mark.parametrize("module", [errors, labels])
def test_docstring_examples_hold(module: object) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_long_lists_end_with_how_many_more() -> None:
    assert some([]) == ""
    assert some([str(i) for i in range(5)], 3, "; ") == "0; 1; 2; and 2 more"
    assert some([str(i) for i in range(4)], 3, "; ") == "0; 1; 2; 3"


def test_near_misses_are_told_else_what_there_is() -> None:
    assert near_miss("raod", ["road", "sky"], "; it has road, sky") == "; did you mean 'road'?"
    assert near_miss("zebra", ["road", "sky"], "; it has road, sky") == "; it has road, sky"
    assert near_miss(7, []) == ""
    assert near_miss("PLOP", ["mib", "plop"]) == "; did you mean 'plop'?"
    assert near_miss("Cat", ["car", "Cab", "CAT"]) == "; did you mean 'Cab'?"  # the same letters come first
