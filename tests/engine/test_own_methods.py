"""A method of one's own that hands over something else than named scalar losses is told so at the first batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy import settings

import everseg
from everseg.errors import ConfigError
from saying import must_say

SOURCE = """
from dataclasses import dataclass

from everseg import Method
from everseg.losses import cross_entropy, upsample


@dataclass(kw_only=True)
class Own(Method):
    def losses(self, batch, ctx):
        logits = upsample(ctx.student(batch).logits, batch.label.shape[-2:])
        ce = cross_entropy(logits, batch.label)
        {losses}

    def after_backward(self, ctx):
        {after}
"""


def train(folder: Path, losses: str = 'yield {"ce": ce}', after: str = "return {}", **train) -> list[dict]:
    """Train with a method of these lines; what the journal says of its iterations."""
    (folder / "own.py").write_text(SOURCE.replace("{losses}", losses).replace("{after}", after))
    config = settings(folder, method={"name": f"{folder / 'own.py'}:Own"}, train={"epochs": 1, **train})
    everseg.run(quiet=True, **config)
    lines = (folder / "toy" / "journal.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry.get("kind", entry.get("event")) == "train"]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("losses", "facts"),
    [
        (
            "if ctx: return {'ce': ce}\n        yield {}",
            ("'Own'", "losses", "no loss terms", "dict", "yield"),
        ),
        ("if ctx: return\n        yield {}", ("'Own'", "losses", "no loss terms")),
        ("yield {}", ("'Own'", "losses", "empty")),
        ("yield ce", ("'Own'", "Tensor", "yield {...}")),
        ("return {'ce': ce}", ("'Own'", "str", "yield {...}")),
        ("return None", ("'Own'", "NoneType", "yield {...}")),
        ("import torch; yield {'ce': ce * torch.ones(3)}", ("'ce'", "(3,)", "scalar")),
        ("yield {'ce': ce[None]}", ("'ce'", "(1,)", "scalar")),
        ("yield {'ce': ce, 'more': 0.5, 'n': None}", ("'more'", "float", "'n'", "NoneType", "scalar")),
        ("yield {'ce': ce, 'n': ce.long()}", ("'n'", "int64")),
        ("yield {'ce': ce.detach()}", ("ce", "gradient")),
    ],
)
def test_what_is_no_dict_of_scalar_losses_is_refused_at_the_first_batch(tmp_path, losses, facts, parts):
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, losses, accumulate=parts)
    must_say(caught.value, *facts)
    assert not [*(tmp_path / "toy").glob("steps/*/ckpt/*")]


@pytest.mark.parametrize(
    ("after", "facts"),
    [
        ("import torch; return {'x': torch.ones(3)}", ("after_backward", "'x'", "(3,)")),
        ("return {'x': 'much'}", ("after_backward", "'x'", "str")),
        ("return 3.0", ("after_backward", "float")),
    ],
)
def test_what_after_backward_returns_must_be_scalars(tmp_path, after, facts):
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, after=after)
    must_say(caught.value, *facts)


def test_scalars_of_after_backward_may_be_numbers_and_are_logged(tmp_path):
    logged = train(tmp_path, after="import numpy; return {'x': 1.5, 'n': 2, 'y': numpy.float32(0.25)}")
    assert logged
    assert all({**entry["terms"], "ce": 0} == {"ce": 0, "x": 1.5, "n": 2.0, "y": 0.25} for entry in logged)


def test_after_backward_may_return_nothing(tmp_path):
    assert all([*entry["terms"]] == ["ce"] for entry in train(tmp_path, after="pass"))
