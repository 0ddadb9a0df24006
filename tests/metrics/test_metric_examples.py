"""The examples in the docstrings of the metrics hold."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("module", ["boundary", "confusion", "continual", "per_image", "scores"])
def test_docstring_examples_hold(module):
    result = doctest.testmod(import_module(f"everseg.metrics.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
