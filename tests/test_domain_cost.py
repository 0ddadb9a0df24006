"""What a domain costs an iteration, counted in multiply-adds: what paths share is run once."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.domain_cost import iteration_of, multiply_adds

BATCH, HEIGHT, WIDTH = 2, 16, 32
WIDTHS = (6, 12, 24)
DEEP = (5, 8)
FIRST_CONVOLUTION = BATCH * (HEIGHT // 2) * (WIDTH // 2) * (WIDTHS[0] - 3) * 3 * 9


@cache
def cost(kind: str, domains: int, blocks: tuple[int, int] = (1, 3)) -> int:
    options = {"widths": WIDTHS, "blocks": blocks}
    return multiply_adds(iteration_of(kind, domains, BATCH, (HEIGHT, WIDTH), options))


def added(kind: str, old: int, blocks: tuple[int, int] = (1, 3)) -> int:
    """What the last of so many old domains adds to an iteration."""
    return cost(kind, old + 1, blocks) - cost(kind, old, blocks)


def test_every_old_domain_costs_mdil_the_same() -> None:
    """But for the teacher's first convolution, which comes with the first of them and is run once for all."""
    assert added("mdil, adapter", 1) == added("mdil, adapter", 2) + FIRST_CONVOLUTION
    assert added("mdil, adapter", 2) == added("mdil, adapter", 3)


def test_an_old_domain_costs_less_than_one_and_a_half_iterations() -> None:
    assert added("mdil, adapter", 1) < 1.5 * cost("mdil, adapter", 1)


def test_with_a_decoder_per_domain_the_encoder_is_run_once_for_all() -> None:
    """So an old domain costs what the decoder costs, however deep the encoder."""
    assert added("mdil, decoder", 2) == added("mdil, decoder", 3) == added("mdil, decoder", 2, DEEP)
    assert added("mdil, decoder", 2) < added("mdil, adapter", 2, DEEP) / 4
    assert added("mdil, adapter", 2) < added("mdil, adapter", 2, DEEP)


@pytest.mark.parametrize("domains", [2, 4])
def test_an_iteration_of_multi_task_training_costs_one_domain(domains: int) -> None:
    run = iteration_of("multi-task", domains, BATCH, (HEIGHT, WIDTH), {"widths": WIDTHS, "blocks": (1, 3)})
    assert [multiply_adds(run) for _ in range(domains)] == domains * [cost("mdil, adapter", 1)]
