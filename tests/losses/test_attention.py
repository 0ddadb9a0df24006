"""Pooled attention against loops in numpy, and what it does where nothing is to be pooled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from everseg import losses


def by_loops(own: np.ndarray, taught: np.ndarray, label: np.ndarray, classes: int, keys: str) -> float:
    """The distance, image by image, class by class, cell by cell."""
    images, heads, h, w, kh, kw = own.shape
    rows, columns = label.shape[1:]
    at = lambda b, y, x, th, tw: label[b, y * rows // th, x * columns // tw]  # noqa: E731
    total = 0.0
    for b in range(images):
        squares, present = 0.0, 0
        for head in range(heads):
            for c in range(classes):
                cells = [(y, x) for y in range(h) for x in range(w) if at(b, y, x, h, w) == c]
                if not cells:
                    continue
                present += 1
                paid = [np.mean([m[b, head, y, x] for y, x in cells], axis=0) for m in (own, taught)]
                gap = paid[0] - paid[1]
                if keys == "cells":
                    squares += float((gap**2).sum())
                else:
                    for d in range(classes):
                        inside = [(y, x) for y in range(kh) for x in range(kw) if at(b, y, x, kh, kw) == d]
                        squares += sum(gap[y, x] for y, x in inside) ** 2
        total += math.sqrt(squares / max(present, 1))
    return total / images


def attention(seed: int, shape=(2, 3, 5, 4, 3, 2)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape[:4], math.prod(shape[4:]), generator=generator, dtype=torch.float64)
    return rows.softmax(dim=-1).view(shape)


@pytest.mark.parametrize("keys", ["cells", "classes"])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.9])
def test_loops_give_the_same(keys, ignored):
    generator = torch.Generator().manual_seed(3)
    label = torch.randint(0, 4, (2, 11, 9), generator=generator)
    label[torch.rand(label.shape, generator=generator) < ignored] = 255
    own, taught = attention(1).requires_grad_(), attention(2)
    found = losses.attention_distance(own, taught, label, num_classes=4, keys=keys)
    expected = by_loops(own.detach().numpy(), taught.numpy(), label.numpy(), 4, keys)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert expected > 0
    assert torch.autograd.gradcheck(
        lambda x: losses.attention_distance(x, taught, label, num_classes=4, keys=keys), own
    )


@pytest.mark.parametrize("keys", ["cells", "classes"])
@pytest.mark.parametrize("case", ["all ignored", "the teacher's own", "no class known"])
def test_where_nothing_differs_the_distance_and_its_gradient_are_zero(case, keys):
    own = attention(1).requires_grad_()
    taught = own.detach() if case == "the teacher's own" else attention(2)
    label = torch.full((2, 8, 8), 255 if case == "all ignored" else 3)
    classes = 0 if case == "no class known" else 4
    found = losses.attention_distance(own, taught, label, num_classes=classes, keys=keys)
    found.backward()
    assert found.item() == 0
    assert torch.equal(own.grad, torch.zeros_like(own))


def test_an_image_without_regions_counts_as_zero():
    label = torch.zeros(2, 8, 8, dtype=torch.long)
    own, taught = attention(1), attention(2)
    both = losses.attention_distance(own, taught, label, num_classes=1)
    label[1] = 255
    alone = losses.attention_distance(own[:1], taught[:1], label[:1], num_classes=1)
    assert losses.attention_distance(own, taught, label, num_classes=1).item() == pytest.approx(
        alone.item() / 2
    )
    assert both > alone / 2


def test_one_cell_and_half_precision():
    one = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bfloat16)
    label = torch.zeros(1, 3, 3, dtype=torch.uint8)
    found = losses.attention_distance(one, one / 2, label, num_classes=1)
    assert (found.dtype, found.item()) == (torch.float32, 0.5)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"teacher_attention": attention(2)[:1]}, r"\(1, 3, 5, 4, 3, 2\)"),
        ({"attention": torch.zeros(2, 3, 4, 4)}, r"\(B, heads, h, w, h', w'\)"),
        ({"attention": attention(1)[:0], "teacher_attention": attention(1)[:0]}, r"\(0, 3"),
        ({"label": torch.zeros(1, 8, 8, dtype=torch.long)}, r"of 2 images.*\(1, 8, 8\)"),
        ({"label": torch.zeros(2, 8, 8)}, "float32"),
        ({"label": torch.zeros(2, 0, 8, dtype=torch.long)}, r"\(2, 0, 8\)"),
        ({"keys": "rows"}, "keys: .*'rows'"),
    ],
)
def test_bad_input_is_named(change, fact):
    given = {"attention": attention(1), "teacher_attention": attention(2), "num_classes": 4,
             "label": torch.zeros(2, 8, 8, dtype=torch.long)}  # fmt: skip
    with pytest.raises(ValueError, match=rf"attention_distance: .*{fact}"):
        losses.attention_distance(**given | change)
