"""Losses on features sorted by class against loops over pixels, lists and sums, without torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everseg.losses import prototypes as sdr
from everseg.losses.bilinear import resized_at
from everseg.losses.pixelwise import upsample

CLASSES, DEPTH = 5, 4


def case(images: int = 3, side: int = 3, *, seed: int = 0, classes: int = CLASSES):
    """Features, a label with ignored pixels and a missing class, prototypes and counts."""
    rng = np.random.RandomState(seed)
    features = rng.rand(images, DEPTH, side, side) + 0.1
    label = rng.choice([0, 1, 2, 4, 255], size=(images, side, side))
    label[0, 0, 0], label[-1, -1, -1] = 0, 255
    return features, label, rng.randn(classes, DEPTH)


def gathered(features, label, number, how="channels"):
    """The features of a class as a list of pixels, each a list of its channels."""
    images, depth, height, width = features.shape
    if how == "channels":
        return [
            [features[b, d, i, j] for d in range(depth)]
            for b in range(images)
            for i in range(height)
            for j in range(width)
            if label[b, i, j] == number
        ]
    flat = [
        features[b, d, i, j]
        for b in range(images)
        for d in range(depth)
        for i in range(height)
        for j in range(width)
        if label[b, i, j] == number
    ]
    pixels = len(flat) // depth
    if how == "pixels first":
        return [flat[p * depth : (p + 1) * depth] for p in range(pixels)]
    return [[flat[d * pixels + p] for d in range(depth)] for p in range(pixels)]


def mean(pixels):
    return [sum(p[d] for p in pixels) / len(pixels) for d in range(len(pixels[0]))]


def unit(values):
    norm = math.sqrt(sum(v * v for v in values))
    return [v / norm for v in values]


def sorted_classes(features, label, how, background=True, normalise=False):
    found = {}
    for number in range(CLASSES):
        pixels = gathered(features, label, number, how)
        if pixels and (background or number):
            found[number] = [unit(p) for p in pixels] if normalise else pixels
    return found


def attraction(features, label, rows, how, *, background, normalise, nested):
    if normalise:
        rows = np.stack([unit(rows[:, d]) for d in range(DEPTH)], axis=1)
    classes = sorted_classes(features, label, how, background, normalise)
    total = 0.0
    for number, pixels in classes.items():
        gaps = [(p[d] - rows[number][d]) ** 2 for p in pixels for d in range(DEPTH)]
        total += sum(gaps) / len(gaps)
        if nested:
            total /= len(classes)
    return total if nested else total / len(classes)


def repulsion(features, label, how, *, background, normalise):
    means = [mean(p) for p in sorted_classes(features, label, how, background, normalise).values()]
    pairs = [(a, b) for i, a in enumerate(means) for j, b in enumerate(means) if i != j]
    return sum(1 / math.dist(a, b) for a, b in pairs) / len(pairs)


def orthogonality(features, label, rows, how, *, background, largest):
    products, removed = [], False
    for number, pixels in sorted_classes(features, label, how, background).items():
        centre = mean(pixels)
        for other in range(CLASSES):
            if other == number:
                removed = True
            else:
                products.append(sum(a * b for a, b in zip(centre, rows[other], strict=True)))
    if largest:
        return max([*products, *([0.0] if removed else [])])
    return sum(products) / len(products)


def matching(features, hidden, rows, how, *, per_pixel):
    total, count = 0.0, 0
    for number in range(CLASSES):
        pixels = gathered(features, hidden, number, how)
        if not pixels:
            continue
        compared = pixels if per_pixel else [mean(pixels)]
        gaps = [(p[d] - rows[number][d]) ** 2 for p in compared for d in range(DEPTH)]
        total, count = total + sum(gaps) / len(gaps), count + 1
    return total if per_pixel or not count else total / count


def sparsity(features, label, norm, shrink, measure):
    images, depth, height, width = features.shape
    if measure == "lasso":
        return sum(abs(v) for v in features.ravel()) / 2
    shrunk = {"exponential": math.exp, "squared": lambda g: g * g, "cubed": lambda g: g**3}[shrink]
    total = 0.0
    for b in range(images):
        for i in range(height):
            for j in range(width):
                f = features[b, :, i, j].tolist()
                same = [
                    features[a, d, y, x]
                    for a in range(images)
                    for d in range(depth)
                    for y in range(height)
                    for x in range(width)
                    if label[a, y, x] == label[b, i, j]
                ]
                divisor = {
                    "class_max": max(same),
                    "channel_max": max(f),
                    "batch_max": features.max(),
                    "l1": sum(abs(v) for v in f),
                    "l2": math.sqrt(sum(v * v for v in f)),
                    "softmax": 1.0,
                }[norm]
                powers = [math.exp(v) for v in f]
                g = [v / sum(powers) for v in powers] if norm == "softmax" else [v / divisor for v in f]
                if measure == "entropy":
                    total -= sum(v * math.log(v + 1e-10) for v in g)
                else:
                    total += sum(shrunk(v) for v in g) / sum(g)
    return total / (images * height * width)


def tensors(features, label, rows):
    return torch.from_numpy(features), torch.from_numpy(label), torch.from_numpy(rows)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("scrambled", [False, True])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_attraction_and_repulsion_against_the_loops(images, scrambled, background, normalise):
    features, label, rows = case(images, seed=images)
    x, y, p = tensors(features, label, rows)
    how = "scrambled" if scrambled else "channels"
    options = {"background": background, "normalise": normalise}
    for nested in (False, True):
        ours = sdr.attraction(x, y, p, nested=nested, scrambled=scrambled, **options)
        assert ours.item() == pytest.approx(
            attraction(features, label, rows, how, nested=nested, **options), rel=1e-12
        )
    ours = sdr.repulsion(x, y, CLASSES, scrambled=scrambled, **options)
    assert ours.item() == pytest.approx(repulsion(features, label, how, **options), rel=1e-12)


@pytest.mark.parametrize("scrambled", [False, True])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("largest", [False, True])
def test_orthogonality_against_the_loops(scrambled, background, largest):
    features, label, rows = case()
    x, y, p = tensors(features, label, rows)
    ours = sdr.orthogonality(x, y, p, background=background, largest=largest, scrambled=scrambled)
    how = "scrambled" if scrambled else "channels"
    theirs = orthogonality(features, label, rows, how, background=background, largest=largest)
    assert ours.item() == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("scrambled", [False, True])
@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_matching_against_the_loops(scrambled, per_pixel, labelled):
    features, label, rows = case(seed=2)
    teacher = np.random.RandomState(3).randint(0, 4, label.shape)
    x, y, p = tensors(features, label, rows)
    hidden = np.full_like(label, 255)
    for at in np.ndindex(label.shape):
        guess = label[at] if labelled else teacher[at] if label[at] == 0 else 255
        if 0 < guess < 4:
            hidden[at] = guess
    found = sdr.hidden_label(y, torch.from_numpy(teacher), 4, labelled=labelled)
    assert torch.equal(found, torch.from_numpy(hidden))
    ours = sdr.matching(x, found, p, per_pixel=per_pixel, scrambled=scrambled)
    how = "pixels first" if scrambled else "channels"
    theirs = matching(features, hidden, rows, how, per_pixel=per_pixel)
    assert theirs > 0
    assert ours.item() == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("norm", ["class_max", "channel_max", "batch_max", "l1", "l2", "softmax"])
@pytest.mark.parametrize("shrink", ["exponential", "squared", "cubed"])
@pytest.mark.parametrize("measure", ["ratio", "entropy", "lasso"])
def test_sparsity_against_the_loops(norm, shrink, measure):
    features, label, rows = case(2, seed=4)
    x, y, _ = tensors(features, label, rows)
    ours = sdr.sparsity(x, y, norm=norm, shrink=shrink, measure=measure)
    assert ours.item() == pytest.approx(sparsity(features, label, norm, shrink, measure), rel=1e-10)


@pytest.mark.parametrize("scrambled", [False, True])
def test_sums_and_running_means_are_those_of_all_features_met(scrambled):
    how, count = "scrambled" if scrambled else "channels", torch.zeros(CLASSES, dtype=torch.long)
    rows, met = torch.zeros(CLASSES, DEPTH, dtype=torch.float64), {c: [] for c in range(CLASSES)}
    for seed in range(3):
        features, label, _ = case(2, seed=seed)
        sums, number = sdr.class_sums(
            torch.from_numpy(features), torch.from_numpy(label), CLASSES, scrambled=scrambled
        )
        rows, count = sdr.updated_prototypes(rows, count, sums, number)
        for c in range(CLASSES):
            met[c] += gathered(features, label, c, how)
    assert count.tolist() == [len(met[c]) for c in range(CLASSES)]
    for c in range(CLASSES):
        assert_close(rows[c], torch.tensor(mean(met[c]) if met[c] else [0.0] * DEPTH, dtype=torch.float64))


def test_scrambling_changes_several_images_and_not_one():
    features, label, rows = case(3)
    x, y, p = tensors(features, label, rows)
    assert sdr.attraction(x, y, p) != sdr.attraction(x, y, p, scrambled=True)
    assert_close(sdr.attraction(x[:1], y[:1], p), sdr.attraction(x[:1], y[:1], p, scrambled=True))
    hidden = torch.where(y == 255, 255, 1)
    assert sdr.matching(x[:1], hidden[:1], p) != sdr.matching(x[:1], hidden[:1], p, scrambled=True)


def terms(x, y, p, scrambled=False):
    """Every loss, with every option that changes what may go wrong."""
    hidden = sdr.hidden_label(y, torch.ones_like(y), 3)
    yield from (sdr.attraction(x, y, p, normalise=n, nested=n, scrambled=scrambled) for n in (False, True))
    yield from (sdr.repulsion(x, y, len(p), normalise=n, scrambled=scrambled) for n in (False, True))
    yield from (sdr.orthogonality(x, y, p, largest=n, scrambled=scrambled) for n in (False, True))
    yield from (sdr.matching(x, hidden, p, per_pixel=n, scrambled=scrambled) for n in (False, True))
    for norm in ("class_max", "channel_max", "batch_max", "l1", "l2", "softmax"):
        yield sdr.sparsity(x, y, norm=norm)


@pytest.mark.parametrize("scrambled", [False, True])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("label", ["ignored", "no background", "one pixel", "one class", "all alike"])
def test_extreme_batches_are_finite_with_their_gradients(label, images, scrambled):
    torch.manual_seed(0)
    x = torch.rand(images, DEPTH, 3, 3, dtype=torch.float64).requires_grad_()
    y = torch.full((images, 3, 3), {"ignored": 255, "no background": 2, "one class": 0}.get(label, 0))
    if label in ("no background", "one pixel"):
        y[0, 1, 1] = 3
    if label == "all alike":  # two classes of the very same mean
        x = torch.ones_like(x).requires_grad_()
        y[0, 0] = 1
    values = [*terms(x, y, torch.rand(CLASSES, DEPTH, dtype=torch.float64), scrambled)]
    assert all(torch.isfinite(value) for value in values)
    torch.stack(values).sum().backward()
    assert torch.isfinite(x.grad).all()
    if label == "ignored":
        assert [value.item() for value in values[:8]] == [0.0] * 8


def test_features_of_zero_and_below_are_left_out_of_sparsity():
    x = torch.rand(1, DEPTH, 2, 2, dtype=torch.float64) + 0.5
    y = torch.tensor([[[0, 0], [1, 1]]])
    x[:, :, 1] = -1.0  # all of class 1
    x.requires_grad_()
    value = sdr.sparsity(x, y)
    value.backward()
    assert value.item() == pytest.approx(sdr.sparsity(x[:, :, :1], y[:, :1]).item() / 2, rel=1e-9)
    assert torch.isfinite(x.grad).all()
    assert not x.grad[:, :, 1].any()
    assert sdr.sparsity(torch.zeros(1, DEPTH, 2, 2), y).item() == 0


def test_background_and_first_class_are_dropped_as_asked():
    number = torch.tensor([0, 3, 0, 5])
    assert sdr.collected(number, background=True).tolist() == [False, True, False, True]
    assert sdr.collected(number, background=False).tolist() == [False, True, False, True]
    assert sdr.collected(number, background=False, first_dropped=True).tolist() == [False, False, False, True]
    assert not sdr.collected(0 * number, background=False, first_dropped=True).any()


def test_a_label_is_sampled_at_the_rows_that_integers_say():
    for large, small in ((64, 4), (513, 33), (97, 7), (5, 5), (3, 8)):
        label = torch.arange(large)[None, :, None].expand(1, large, 2)
        expected = [i * large // small for i in range(small)]
        assert sdr.label_at(label, (small, 1))[0, :, 0].tolist() == expected
        logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
        whole = upsample(logits, (large, large))[:, :, expected][..., expected]
        assert_close(resized_at(logits, (large, large), (small, small)), whole)


def test_wrong_sizes_and_options_are_refused():
    x, y, p = torch.rand(1, DEPTH, 2, 2), torch.zeros(1, 2, 2).long(), torch.zeros(CLASSES, DEPTH)
    for wrong in (
        lambda: sdr.attraction(x, y[:, :1], p),
        lambda: sdr.repulsion(x, y[:, :1], CLASSES),
        lambda: sdr.sparsity(x, y[:, :1]),
        lambda: sdr.class_sums(x, y[:, :1], CLASSES),
    ):
        with pytest.raises(ValueError, match="see label_at"):
            wrong()
    with pytest.raises(ValueError, match=r"expected prototypes \(C, 4\)"):
        sdr.matching(x, y, p[:, :2])
    with pytest.raises(ValueError, match="unknown norm"):
        sdr.sparsity(x, y, norm="max")
    with pytest.raises(ValueError, match="unknown measure or shrink"):
        sdr.sparsity(x, y, shrink="power3")


def test_no_gradient_flows_into_prototypes_and_sums():
    features, label, rows = case()
    x, y, p = tensors(features, label, rows)
    p.requires_grad_()
    x.requires_grad_()
    torch.stack([*terms(x, y, p)]).sum().backward()
    assert p.grad is None
    assert not sdr.class_sums(x, y, CLASSES)[0].requires_grad
