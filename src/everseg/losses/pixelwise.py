"""What all pixel-wise losses share: precision, upsampling, checks of shapes and labels, reduction."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.labels import IGNORED, IGNORED_WIDE, ignored_id

Over = Literal["all", "valid"]
"""Pixels in the denominator of a mean: every pixel, or only those that count."""
Reduction = Literal["mean", "sum", "none"]


def full_precision(tensor: Tensor) -> Tensor:
    """Give the tensor in float32 at least: bfloat16 and float16 become float32, float64 stays."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize small logits bilinearly to the label's resolution, in float32 or float64.

    Args:
        logits: (B, C, h, w), any floating type.
        size: (H, W) of the label.

    Returns:
        (B, C, H, W); corners not aligned (`align_corners=False`), as in the authors' code.

    Raises:
        ValueError: wrong number of dimensions.

    >>> upsample(torch.tensor([[[[0.0, 4.0]]]]), (1, 4))
    tensor([[[[0., 1., 3., 4.]]]])
    """
    if logits.dim() != 4 or len(size) != 2:
        raise ValueError(
            f"upsample: expected logits (B, C, h, w) and a size (H, W), "
            f"got logits of shape {tuple(logits.shape)} and size {tuple(size)}"
        )
    logits = full_precision(logits)
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def checked_logits(loss: str, logits: Tensor) -> Tensor:
    """Give logits (B, C, H, W) in full precision.

    Raises:
        ValueError: not a floating tensor of four non-empty dimensions, or more classes than train ids.
    """
    if logits.dim() != 4 or not logits.is_floating_point() or logits.numel() == 0:
        raise ValueError(
            f"{loss}: expected non-empty floating logits (B, C, H, W), "
            f"got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    if logits.shape[1] >= IGNORED_WIDE:
        raise ValueError(f"{loss}: {logits.shape[1]} classes; train ids end at {IGNORED_WIDE - 2}")
    return full_precision(logits)


def checked_label(loss: str, label: Tensor, logits: Tensor) -> Tensor:
    """Give the label (B, H, W) as int64 after checking it against the logits.

    Values are checked on the CPU only: on CUDA the check would wait for the device, and the kernels that pick
    a class abort on a value out of range.

    Raises:
        ValueError: wrong shape or type, or a value that is neither in [0, C) nor `ignored_id(C)`.
    """
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(label.shape) != expected:
        raise ValueError(
            f"{loss}: expected a label of shape {expected} for logits of shape {tuple(logits.shape)}, "
            f"got {tuple(label.shape)}; upsample the logits first"
        )
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise ValueError(f"{loss}: expected an integer label, got {label.dtype}")
    label = label.long()
    # Reading a tensor's values on CUDA makes the host wait for the device in every iteration.
    if label.device.type == "cpu":
        num_classes = logits.shape[1]
        ignored = ignored_id(num_classes)
        bad = ((label < 0) | (label >= num_classes)) & (label != ignored)
        if bad.any():
            values = torch.unique(label[bad])[:5].tolist()
            raise ValueError(
                f"{loss}: label values {values} out of range; "
                f"expected 0..{num_classes - 1} for {num_classes} classes, or {ignored} for ignored pixels"
            )
    return label


def checked_teacher(loss: str, teacher_logits: Tensor, logits: Tensor, num_old: int | None = None) -> Tensor:
    """Give the teacher's logits (B, K, H, W) in full precision, without gradient.

    Raises:
        ValueError: other batch or resolution than the student's, more classes than the student, or not
            `num_old` classes where that is given.
    """
    teacher_logits = checked_logits(f"{loss}: teacher", teacher_logits).detach()
    same = teacher_logits.shape[0] == logits.shape[0] and teacher_logits.shape[2:] == logits.shape[2:]
    if not same or teacher_logits.shape[1] > logits.shape[1]:
        raise ValueError(
            f"{loss}: expected teacher logits (B, K, H, W) with K <= C for student logits of shape "
            f"{tuple(logits.shape)}, got {tuple(teacher_logits.shape)}"
        )
    if num_old is not None and num_old != teacher_logits.shape[1]:
        raise ValueError(
            f"{loss}: num_old is {num_old}, but the teacher has {teacher_logits.shape[1]} classes"
        )
    return teacher_logits


def checked_num_old(loss: str, num_old: int, num_classes: int) -> None:
    """Check that old and new classes both exist.

    Raises:
        ValueError: num_old outside 1..C-1.
    """
    if not 1 <= num_old < num_classes:
        raise ValueError(
            f"{loss}: num_old must be in 1..{num_classes - 1} for {num_classes} classes (there must be new "
            f"classes, and an old background), got {num_old}"
        )


def checked_alpha(loss: str, alpha: float) -> None:
    """Check the teacher's sharpening.

    Raises:
        ValueError: alpha not positive and finite.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"{loss}: alpha must be positive and finite, got {alpha}")


def reduce(
    per_pixel: Tensor,
    label: Tensor | None,
    over: Over = "all",
    *,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    ignored: int = IGNORED,
) -> Tensor:
    """Reduce a loss per pixel, in which ignored pixels are 0 already, to a scalar.

    Args:
        per_pixel: (B, H, W).
        label: (B, H, W) with 255 = ignored; None where no pixel is ignored.
        over: "all" divides the sum by B*H*W (the authors' trainer); "valid" by the number of non-ignored
            pixels, or by the sum of `weight` where that is given.
        reduction: "mean", "sum", or "none" (gives `per_pixel` back).
        weight: (B, H, W) weight of each pixel, 0 on ignored ones, already multiplied into `per_pixel`.
        ignored: the label of ignored pixels, `everseg.labels.ignored_id(C)`.

    Returns:
        Scalar; 0, with zero gradient, when "valid" finds no pixel to count (torch and the authors give nan).

    Raises:
        ValueError: unknown `over` or `reduction`.

    >>> per_pixel, label = torch.tensor([[[1.0, 5.0, 0.0]]]), torch.tensor([[[0, 1, 255]]])
    >>> reduce(per_pixel, label, "all").item(), reduce(per_pixel, label, "valid").item()
    (2.0, 3.0)
    """
    if over not in ("all", "valid"):
        raise ValueError(f"over: expected 'all' or 'valid', got {over!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if reduction == "none":
        return per_pixel
    if reduction == "sum":
        return per_pixel.sum()
    if weight is None and label is not None:
        weight = label != ignored
    if over == "all" or weight is None:  # ignored pixels are 0 and stay in the denominator
        return per_pixel.mean()
    # Without a pixel to count the sum is 0 as well: dividing by 1 gives 0 with gradient 0. `where` instead of an `if`:
    # the host need not wait for the value.
    total = weight.sum()
    return per_pixel.sum() / torch.where(total > 0, total, torch.ones_like(total))
