"""Boundary IoU: how well the outlines of classes are met, as integer counts that sum over images and processes.

Source: Cheng, Girshick, Dollár, Berg and Kirillov, "Boundary IoU: Improving Object-Centric Image Segmentation
Evaluation", CVPR 2021.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.labels import ignored_id

SHARE = 0.02
"""Width of a boundary region as a share of the image's diagonal, as in the paper."""


def boundary_width(height: int, width: int, share: float = SHARE) -> int:
    """Width of a boundary region in pixels: the share of the diagonal, rounded (half to even), at least 1.

    >>> boundary_width(512, 512), boundary_width(10, 10)
    (14, 1)
    """
    return max(1, round(share * math.hypot(height, width)))


def boundary_region(ids: Tensor, ignored: Tensor, width: int) -> Tensor:
    """Find the pixels within `width` of the outline of their own class, for all classes at once.

    A pixel of class c is in the region of c if a pixel of another class, or the outside of the image, lies within
    `width` rows and `width` columns of it. That is the class's mask minus its erosion by a square of 2 * width + 1
    pixels, which equals `width` erosions by 3x3, as the paper's code does them.

    Args:
        ids: (H, W) integer class ids, at least 0; those of ignored pixels may be anything.
        ignored: (H, W) bool. These pixels are in no region, and where a class meets them there is no outline.
        width: in pixels, at least 1.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: shapes differ or are not two-dimensional, or the width is below 1.

    >>> ids = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    >>> boundary_region(ids, torch.zeros(3, 5, dtype=torch.bool), 1).int()
    tensor([[1, 1, 1, 1, 1],
            [1, 0, 0, 0, 1],
            [1, 1, 1, 1, 1]], dtype=torch.int32)
    """
    if ids.ndim != 2 or ids.shape != ignored.shape or width < 1:
        raise ValueError(
            f"boundary_region: expected ids and ignored of one shape (H, W) and a width of 1 or more, got "
            f"{tuple(ids.shape)}, {tuple(ignored.shape)} and {width}"
        )
    values = ids.int()
    beyond = torch.iinfo(torch.int32).max
    # All pixels of a window have the class of its centre, if both the largest and the smallest id there are that class.
    # Ignored pixels are made to win neither; what is outside of the image always wins the largest.
    largest = _window_max(F.pad(values.masked_fill(ignored, -1), [width] * 4, value=beyond), width)
    smallest = -_window_max(F.pad((-values).masked_fill(ignored, -beyond), [width] * 4, value=-beyond), width)
    return ((largest != values) | (smallest != values)) & ~ignored


def boundary_sums(
    prediction: Tensor,
    label: Tensor,
    num_classes: int,
    *,
    ignored: int | None = None,
    share: float = SHARE,
) -> Tensor:
    """Count the pixels of the boundary regions of one image.

    Boundary IoU of class c is both / (true + predicted - both), so counts add up over images and processes, and
    `iou_of_sums(sums, eps=0.0)` gives the scores. A prediction that equals the label on all pixels that are not ignored
    has boundary IoU 1 whatever lies under the ignored ones.

    Args:
        prediction: (H, W) integer class ids below `num_classes`.
        label: (H, W) integer train ids on the same device.
        num_classes: C.
        ignored: label of ignored pixels; None = `everseg.labels.ignored_id(C)`. They count nowhere. An outline between
            a class and ignored pixels is no outline, neither of the label nor of the prediction.
        share: width of the regions as a share of the diagonal of these maps (`boundary_width`). So it depends on the
            size at which images are evaluated.

    Returns:
        (3, C) int64 on the device: pixels of each class in the true region, in the predicted region, and in both.

    Raises:
        ValueError: shapes or devices differ.

    Source: Cheng et al., CVPR 2021, eq. 1, summed over images as for semantic classes. The border of the image is an
    outline, as in the paper's code. The paper says nothing of ignored pixels.

    >>> label = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    >>> boundary_sums(torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]]), label, 2).tolist()
    [[4, 4], [5, 3], [4, 3]]
    """
    if prediction.shape != label.shape or prediction.device != label.device or label.ndim != 2:
        raise ValueError(
            f"boundary_sums: prediction {tuple(prediction.shape)} on {prediction.device} and label "
            f"{tuple(label.shape)} on {label.device} must be (H, W) of the same size and device"
        )
    label, prediction = label.int(), prediction.int()
    without = label == (ignored_id(num_classes) if ignored is None else ignored)
    width = boundary_width(label.shape[0], label.shape[1], share)
    truth, found = (boundary_region(ids, without, width) for ids in (label, prediction))
    both = truth & found & (label == prediction)
    return torch.stack(
        [
            torch.bincount(ids[region], minlength=num_classes)
            for ids, region in ((label, truth), (prediction, found), (label, both))
        ]
    )


def _window_max(padded: Tensor, reach: int) -> Tensor:
    """Largest value in the square of 2 * reach + 1 pixels around each pixel, (H + 2 reach, W + 2 reach) -> (H, W)."""
    span = 2 * reach + 1
    for axis in (0, 1):
        covered = 1
        # Windows of 1, 2, 4, ... pixels, each from two of the former: log2(span) passes instead of span.
        while covered < span:
            step = min(covered, span - covered)
            length = padded.shape[axis] - step
            padded = torch.maximum(padded.narrow(axis, 0, length), padded.narrow(axis, step, length))
            covered += step
    return padded
