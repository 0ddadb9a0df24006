"""The cross-entropy of images from the memory, labelled as they were when they were stored."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.labels import ignored_id
from everseg.losses.pixelwise import (
    Over,
    Reduction,
    checked_label,
    checked_logits,
    checked_num_old,
    reduce,
)

Void = Literal["ignored", "background"]
"""What an ignored pixel of an image from the memory counts as."""


def replayed_cross_entropy(
    logits: Tensor,
    label: Tensor,
    *,
    num_old: int,
    void: Void = "ignored",
    over: Over = "all",
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy in which a background pixel may be the background or any new class: MiB-AugM's on memory images.

    The labels of an image from the memory know nothing of the classes that came later, so its background may hide them.
    With K = num_old: log p(background) = logsumexp(x_0, x_K..x_{C-1}) - logsumexp(x), log p(old c) = x_c -
    logsumexp(x). Computed as the plain cross-entropy of the K logits [logsumexp(background, new), x_1..x_{K-1}], which
    is the same number.

    Args:
        logits: (B, C, H, W), unnormalised; channel 0 is the background, old classes come first.
        label: (B, H, W) in [0, C) or 255 = ignored; K..C-1 are treated as background.
        num_old: classes known before this step, background included, 1 <= num_old < C.
        void: "ignored" pixels have loss 0; as "background" they are background pixels, as in the authors' code.
        over: as in `cross_entropy`.
        reduction: as in `cross_entropy`.

    Returns:
        Scalar >= 0. With over="valid" and no pixel that counts it is 0.

    Raises:
        ValueError: as `cross_entropy`, or no old or no new class, or an unknown `void`.

    Source: MiB-AugM, the behaviour of the code of Kwak et al., "Class-incremental semantic segmentation in the
    partitioned scenario".

    >>> logits, label = torch.zeros(1, 4, 1, 2), torch.tensor([[[0, 1]]])
    >>> loss = replayed_cross_entropy(logits, label, num_old=2, reduction="none")
    >>> [round(value, 4) for value in loss.exp().flatten().tolist()]
    [1.3333, 4.0]
    """
    logits = checked_logits("replayed_cross_entropy", logits)
    checked_num_old("replayed_cross_entropy", num_old, logits.shape[1])
    if void not in ("ignored", "background"):
        raise ValueError(f"replayed_cross_entropy: void: expected 'ignored' or 'background', got {void!r}")
    label = checked_label("replayed_cross_entropy", label, logits)
    ignored = ignored_id(logits.shape[1])
    left_out = label == ignored
    background, old, new = logits.split([1, num_old - 1, logits.shape[1] - num_old], dim=1)
    background = torch.logaddexp(background, torch.logsumexp(new, dim=1, keepdim=True))
    label = label.masked_fill(label >= num_old, 0)
    if void == "ignored":
        label = label.masked_fill(left_out, ignored)
    joined = torch.cat([background, old], dim=1)  # (B, K, H, W)
    per_pixel = F.cross_entropy(joined, label, ignore_index=ignored, reduction="none")
    return reduce(per_pixel, label, over, reduction=reduction, ignored=ignored)
