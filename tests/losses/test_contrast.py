"""UCD's contrast against loops over anchors, positives and negatives, without torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from everseg.losses.contrast import contrast, contrast_labels, mixed_labels, same_class

OLD = 3


def case(images=2, side=3, *, seed=0):
    """Features of student and teacher, a label with old pixels as background, and the teacher's logits."""
    rng = np.random.RandomState(seed)
    shape = (images, 4, side, side)
    label = rng.choice([0, 0, 3, 4, 255], size=(images, side, side))
    return rng.randn(*shape), rng.randn(*shape), label, 2 * rng.randn(images, OLD, side, side)


def expected(student, teacher, label, logits, *, first_new, temperature, certainty, shifted):
    """The formula, one anchor after the other."""
    pixels = list(np.ndindex(label.shape))

    def unit(maps, at):
        b, i, j = at
        norm = math.sqrt(sum(v * v for v in maps[b, :, i, j]))
        return [v / norm for v in maps[b, :, i, j]]

    def belief(at):
        b, i, j = at
        powers = [math.exp(v) for v in logits[b, :, i, j]]
        return [v / sum(powers) for v in powers]

    def number(at):
        b, i, j = at
        return int(np.argmax(logits[b, :, i, j])) if label[at] == 0 else int(label[at])

    seen = [(at, number(at)) for at in pixels if number(at) not in (0, 255)]
    others = [(unit(student, at), n, at) for at, n in seen]
    others += [(unit(teacher, at), n, None) for at, n in seen if label[at] == 0]
    beliefs = [belief(at) for at, _ in seen] + [belief(at) for at, _ in seen if label[at] == 0]
    losses = []
    for at, mine in seen:
        anchor, mine_belief = unit(student, at), belief(at)
        s = [sum(a * b for a, b in zip(anchor, f, strict=True)) / temperature for f, _, _ in others]
        top = max(s) if shifted else 0.0
        pushed = sum(math.exp(v) for v, (_, n, _) in zip(s, others, strict=True) if n != mine)
        found = []
        for v, (_, n, where), q in zip(s, others, beliefs, strict=True):
            if n == mine and where != at:
                weight = sum(a * b for a, b in zip(mine_belief, q, strict=True))
                if not certainty or (mine >= first_new and n >= first_new):
                    weight = 1.0
                found.append(weight * (v - top - math.log(math.exp(v - top) + pushed)))
        if found:
            losses.append(-sum(found) / len(found))
    return sum(losses) / len(losses) if losses else 0.0


def ours(given, **options):
    x, t, y, z = (torch.from_numpy(array) for array in given)
    return contrast(x, t, y, z, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("certainty", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_contrast_against_the_loops(seed, temperature, certainty, shifted):
    given = case(seed=seed)
    options = {"first_new": OLD, "temperature": temperature, "certainty": certainty, "shifted": shifted}
    theirs = expected(*given, **options)
    assert theirs > 0
    assert ours(given, **options).item() == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_blocks_change_neither_value_nor_gradient(block):
    given = [torch.from_numpy(array) for array in case(seed=1)]
    results = []
    for rows in (None, block):
        x = given[0].clone().requires_grad_()
        value = contrast(x, *given[1:], first_new=OLD, block=rows)
        value.backward()
        results.append((value, x.grad))
    assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_the_gradient_flows_into_the_anchors_alone():
    x, t, y, z = (torch.from_numpy(array) for array in case(seed=2))
    for tensor in (x, t, z):
        tensor.requires_grad_()
    value = contrast(x, t, y, z, first_new=OLD, temperature=0.5)
    value.backward()
    assert t.grad is None
    assert z.grad is None
    # Numerically, with the set held still: the gradient of the formula in which only the anchor moves.
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    moved = 0.0
    for at in np.ndindex(y.shape):
        b, i, j = at
        step = torch.zeros_like(x)
        step[b, :, i, j] = direction[b, :, i, j]
        moved += _slope(x.detach(), t.detach(), y, z.detach(), step, at)
    assert moved == pytest.approx((x.grad * direction).sum().item(), rel=1e-5)


def _slope(x, t, y, z, step, at):
    """Central difference of the loss when one anchor moves and its copy in the set does not."""
    ids = mixed_labels(y, z)
    known = (ids > 0) & (ids != 255)
    if not known[at]:
        return 0.0
    rows = {n: F.normalize(m.movedim(1, 3).flatten(0, 2), dim=1) for n, m in (("x", x), ("t", t))}
    belief = z.movedim(1, 3).flatten(0, 2).softmax(1)
    place = int(np.ravel_multi_index(at, y.shape))
    everyone, taught = known.flatten(), (known & (y == 0)).flatten()
    others = torch.cat([rows["x"][everyone], rows["t"][taught]])
    numbers = torch.cat([ids.flatten()[everyone], ids.flatten()[taught]])
    places = torch.cat([torch.arange(y.numel())[everyone], torch.full((int(taught.sum()),), -1)])
    weight = (torch.cat([belief[everyone], belief[taught]]) @ belief[place]).masked_fill(
        (numbers >= OLD) & (ids[at] >= OLD), 1
    )
    positive = (numbers == ids[at]) & (places != place)

    def value(h):
        anchor = F.normalize((x + h * step).movedim(1, 3).flatten(0, 2)[place], dim=0)
        s = others @ anchor / 0.5
        pushed = s[numbers != ids[at]].exp().sum()
        return -(weight * (s - torch.log(s.exp() + pushed)))[positive].mean()

    anchors = sum(
        bool(((numbers == ids.flatten()[p]) & (places != p)).any()) for p in range(y.numel()) if everyone[p]
    )
    return float(value(1e-6) - value(-1e-6)) / 2e-6 / anchors if positive.any() else 0.0


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("kind", ["ignored", "background", "one pixel", "one class", "no new class", "zeros"])
def test_extreme_batches_are_finite_with_their_gradients(kind, shifted):
    x, t, y, z = (torch.from_numpy(array) for array in case(1, seed=3))
    if kind in ("ignored", "one pixel"):
        y.fill_(255)
    if kind == "background":
        y.fill_(0)
        z[:, 0] = 9.0
    if kind == "one pixel":
        y[0, 0, 0] = 3
    if kind == "one class":
        y.fill_(3)
    if kind == "no new class":
        y.fill_(0)
    if kind == "zeros":
        x, t = torch.zeros_like(x), torch.zeros_like(t)
    x.requires_grad_()
    for first_new in (OLD, None):
        value = contrast(x, t, y, z, first_new=first_new, shifted=shifted)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(x.grad).all()
        # With one class there is nothing to keep apart; shifting lowers both sides alike.
        assert (value.item() == 0) == (kind in ("ignored", "background", "one pixel", "one class"))


def test_the_authors_smallest_new_class_is_that_of_the_batch():
    given = case(seed=4)
    label = np.where(given[2] == 4, 0, given[2])
    low = label.copy()
    low[0, 0, 0] = 1  # an id that interpolation has made up
    both = [ours((*given[:2], one, given[3]), first_new=None) for one in (label, low)]
    assert_close(both[0], ours((*given[:2], label, given[3]), first_new=3))
    assert_close(both[1], ours((*given[:2], low, given[3]), first_new=1))
    assert both[1] != ours((*given[:2], low, given[3]), first_new=3)


def test_labels_are_sampled_or_interpolated():
    label = torch.zeros(1, 4, 8).long()
    label[:, :, 3:] = 4
    label[:, :2, 6:] = 255
    assert contrast_labels(label, (2, 4)).tolist() == [[[0, 4, 4, 255], [0, 4, 4, 4]]]
    # Bilinear: a border of 0 and 4 gives 2; 255 gives background, as does any class above 20.
    assert contrast_labels(label, (2, 4), interpolated=True).tolist() == [[[0, 2, 4, 0], [0, 2, 4, 4]]]
    assert contrast_labels(torch.full((1, 4, 4), 21), (2, 2), interpolated=True).unique().tolist() == [0]
    assert contrast_labels(torch.full((1, 4, 4), 21), (2, 2)).unique().tolist() == [21]


def test_certainty_is_one_between_new_classes_alone():
    belief = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    ids = torch.tensor([1, 2])
    assert_close(same_class(belief, belief, ids, ids, 2), torch.tensor([[0.82, 0.42], [0.42, 1.0]]))
    assert_close(same_class(belief, belief, ids, ids, 3), belief @ belief.t())


def test_wrong_sizes_are_refused():
    x, t, y, z = (torch.from_numpy(array) for array in case())
    for given in ((x, t[:1], y, z), (x, t, y[:, :2], z), (x, t, y, z[..., :2])):
        with pytest.raises(
            ValueError, match=r"contrast: expected features and teacher_features \(B, D, h, w\)"
        ):
            contrast(*given, first_new=OLD)
    with pytest.raises(ValueError, match="temperature must be positive"):
        contrast(x, t, y, z, first_new=OLD, temperature=0.0)
