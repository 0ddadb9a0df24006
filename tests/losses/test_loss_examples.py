"""The examples in the docstrings of the losses hold."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "background_shift",
        "classification",
        "decomposed",
        "distillation",
        "features",
        "pixelwise",
        "pod",
        "pooled_cube",
        "prototypes",
        "pseudo",
        "regions",
        "repair",
        "replayed",
        "similarity",
        "thresholds",
    ],
)
def test_docstring_examples_hold(module):
    result = doctest.testmod(import_module(f"everseg.losses.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
