"""The losses once more: one pixel at a time, in float64, straight from the formulas, without torch."""

from __future__ import annotations

import math

import numpy as np


def lse(values) -> float:
    values = [float(v) for v in values]
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def bce(x: float, target: float) -> float:
    """-(target log sigmoid(x) + (1 - target) log(1 - sigmoid(x)))."""
    return max(x, 0.0) - x * target + math.log1p(math.exp(-abs(x)))


def cross_entropy(x, y, *, weight=None):
    if y == 255:
        return 0.0
    return (1.0 if weight is None else float(weight[y])) * (lse(x) - x[y])


def unbiased_cross_entropy(x, y, *, num_old, weight=None):
    if y == 255:
        return 0.0
    w = 1.0 if weight is None else float(weight[0 if y < num_old else y])
    return w * (lse(x) - (lse(x[:num_old]) if y < num_old else x[y]))


def replayed_cross_entropy(x, y, *, num_old, void="ignored"):
    if y == 255 and void == "ignored":
        return 0.0
    if 0 < y < num_old:
        return lse(x) - x[y]
    return lse(x) - lse([v for c, v in enumerate(x) if c == 0 or c >= num_old])


def binary_cross_entropy(x, y, *, pos_weight=1.0, first=0, unlabelled="left out"):
    if y == 255 and unlabelled == "left out":
        return 0.0
    return sum((pos_weight if c == y else 1.0) * bce(v, float(c == y)) for c, v in enumerate(x) if c >= first)


def binary_negatives(x, *, first=0, last=None):
    return sum(bce(v, 0.0) for v in list(x)[first:last])


def icarl(x, y, t, *, background_from_label=False):
    targets = [float(c == y) for c in range(len(x))]
    for c in range(1 if background_from_label else 0, len(t)):
        targets[c] = sigmoid(t[c])
    return sum(bce(v, target) for v, target in zip(x, targets, strict=True))


def icarl_distillation(x, t, *, first=0):
    return sum(bce(x[c], sigmoid(t[c])) for c in range(first, len(t)))


def focal(x, y, *, alpha=1.0, gamma=2.0):
    if y == 255:
        return 0.0
    log_p = x[y] - lse(x)
    return -alpha * (1 - math.exp(log_p)) ** gamma * log_p


def _teacher(t, alpha):
    return [math.exp(alpha * v - lse([alpha * u for u in t])) for v in t]


def distillation(x, t, *, alpha=1.0):
    k = len(t)
    return -sum(q * (x[c] - lse(x[:k])) for c, q in enumerate(_teacher(t, alpha))) / k


def moved_distillation(x, y, t):
    target = [*_teacher(t, 1.0), *[0.0] * (len(x) - len(t))]
    if len(t) <= y < len(x):
        target[y], target[0] = target[0], 0.0
    return -sum(q * (v - lse(x)) for q, v in zip(target, x, strict=True)) / len(x)


def unbiased_distillation(x, t, *, alpha=1.0):
    k = len(t)
    logs = [lse([x[0], *x[k:]]) - lse(x)] + [x[c] - lse(x) for c in range(1, k)]
    return -sum(q * log for q, log in zip(_teacher(t, alpha), logs, strict=True)) / k


def kl_divergence(x, t, *, form="log"):
    total = 0.0
    for c, q in enumerate(_teacher(t, 1.0)):
        if q > 0:
            p = math.exp(x[c] - lse(x))
            total += q * (math.log(q) - (x[c] - lse(x) if form == "log" else p))
    return total / len(x)


def per_pixel(loss, logits, *others, **kwargs) -> np.ndarray:
    """Apply a loss of one pixel to arrays (B, C, H, W) and (B, H, W); (B, H, W) float64."""
    batch, _, height, width = logits.shape
    out = np.zeros((batch, height, width))
    for b, i, j in np.ndindex(*out.shape):
        pixel = [o[b, :, i, j].astype(float) if o.ndim == 4 else int(o[b, i, j]) for o in others]
        out[b, i, j] = loss(logits[b, :, i, j].astype(float), *pixel, **kwargs)
    return out
