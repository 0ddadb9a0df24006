"""Arg-max class of every pixel from small logits, a band of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.labels import IGNORED, IGNORED_WIDE
from everseg.losses.banded import on_all_threads
from everseg.losses.pixelwise import full_precision
from everseg.losses.readout import merge_background

_BAND_PIXELS = 2**16
"""Pixels of a band on the CPU: its buffers then stay in a core's cache (measured)."""
_BAND_BYTES = 2**26
"""Bytes of a band of logits on other devices, where many small operations would mostly wait for their start."""


def ids_type(num_classes: int) -> torch.dtype:
    """Type of a map of predicted train ids: bytes wherever they suffice."""
    return torch.uint8 if num_classes <= IGNORED else torch.int32


@dataclass(frozen=True)
class Strip:
    """Logits of windows that lie side by side in an image, each resized bilinearly to its window's size."""

    logits: Tensor
    """(N, C, h, w) float32 or float64, small. Behind the classes may stand logits to merge; see `argmax_of_sum`."""
    top: int
    """First row of the windows in the image."""
    lefts: tuple[int, ...]
    """First column of each of the N windows."""
    height: int
    width: int
    """Size of every window in pixels."""


@torch.no_grad()
def predict_ids(logits: Tensor, size: tuple[int, int] | torch.Size, merged: int = 0) -> Tensor:
    """Arg-max class of every pixel, from small logits, without logits at full resolution.

    Args:
        logits: (B, C, h, w), finite, any floating type and resolution; C <= 65,534. Values of a readout
            (`losses.readout.small_values`) too; then (B, C + merged, h, w).
        size: (H, W) wanted.
        merged: number of logits behind those of the classes that are merged with the first class once they are
            resized: its probability under a sigmoid is the sum of theirs.

    Returns:
        (B, H, W) train ids of `ids_type` on the logits' device: the arg-max of the logits resized bilinearly (corners
        not aligned), of equal ones the first. Resized values are those of `torch.nn.functional.interpolate` up to their
        last digits, so the class can be another only where the two largest agree but for these. Beside the result
        the memory taken depends on the width and the number of classes, not on the height. Nothing waits for the
        device.

    Raises:
        ValueError: not (B, C, h, w), or more classes than train ids.

    >>> predict_ids(torch.tensor([[[[4.0, 0.0]], [[1.0, 1.0]]]]), (1, 8)).tolist()
    [[[0, 0, 0, 0, 0, 1, 1, 1]]]
    """
    if logits.dim() != 4 or not 1 <= logits.shape[1] - merged < IGNORED_WIDE:
        raise ValueError(
            f"predict_ids: expected logits (B, C, h, w) of at most {IGNORED_WIDE - 1} classes, "
            f"got shape {tuple(logits.shape)}"
        )
    height, width = size
    kind = ids_type(logits.shape[1] - merged)
    ids = torch.empty(len(logits), height, width, dtype=kind, device=logits.device)
    for one, out in zip(full_precision(logits), ids, strict=True):
        argmax_of_sum([Strip(one[None], 0, (0,), height, width)], 0, out, merged)
    return ids


@torch.no_grad()
def argmax_of_sum(strips: Sequence[Strip], top: int, out: Tensor, merged: int = 0) -> None:
    """Write the arg-max of the sum of windows' logits into rows of an image.

    Args:
        strips: all windows that see the rows, at least one over every pixel. Where every class has the same number
            of summands, as here, the arg-max of the sum is that of the mean.
        top: first of the rows.
        out: (r, W) of `ids_type`, the rows to write, of the image's full width.
        merged: as for `predict_ids`. What is merged is the mean over windows.
    """
    number = _windows_over(strips, out.shape[1]) if merged else None
    if out.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            _on_the_cpu(strips, top, out, merged, number)
    else:
        _elsewhere(strips, top, out, merged, number)


def _windows_over(strips: Sequence[Strip], width: int) -> Tensor:
    """Number of windows that see each column, (W,), in the logits' type."""
    number = strips[0].logits.new_zeros(width)
    for strip in strips:
        for left in strip.lefts:
            number[left : left + strip.width] += 1
    return number


def _merged(background: Tensor, others: Sequence[Tensor], number: Tensor) -> Tensor:
    """Merge the sums over windows of logits (r, W) with the background's; the result is as large as such a sum."""
    return merge_background(background / number, [other / number for other in others]) * number


def _on_the_cpu(strips: Sequence[Strip], top: int, out: Tensor, merged: int, windows: Tensor | None) -> None:
    """One class after the other over a band that fits a core's cache; threads share the bands."""
    width = out.shape[1]
    rows = min(len(out), max(1, _BAND_PIXELS // width))
    # One iterator for all threads: each takes the next band when it has finished one.
    starts = iter(range(0, len(out), rows))

    def work() -> None:
        best, value = strips[0].logits.new_empty(2, rows, width)
        above = np.empty((rows, width), bool)
        for start in starts:
            band = out[start : start + rows].numpy()
            number = len(band)
            parts = [_part(strip, top + start, number, width) for strip in strips]
            _argmax_band(parts, best[:number], value[:number], above[:number], band, merged, windows)

    on_all_threads(work, out.device)


def _argmax_band(
    parts: Sequence[tuple[Tensor | None, Tensor]],
    best: Tensor,
    value: Tensor,
    above: np.ndarray,
    ids: np.ndarray,
    merged: int,
    windows: Tensor | None,
) -> None:
    """Arg-max over classes of sum_p M_p X_p for parts (M (r, k) or None = identity, X (C, k, W)) into ids (r, W)."""
    classes = len(parts[0][1]) - merged
    if windows is not None:
        others = [_sum_of(parts, classes + i, torch.empty_like(value)) for i in range(merged)]
    # The loop keeps the best value so far and the class that holds it, so only one class's logits exist at a time.
    largest, mark = best.numpy(), above.view(np.uint8)  # (r, W) both
    ids.fill(0)
    for number in range(classes):
        into = value if number else best
        into = _sum_of(parts, number, into, copied=number == 0)
        if number == 0 and windows is not None:
            best.copy_(_merged(best, others, windows))
        if number:
            new = into.numpy()
            np.greater(new, largest, out=above)
            np.maximum(largest, new, out=largest)
            if ids.dtype != np.uint8:
                np.copyto(ids, number, where=above)
                continue
            # `mark` is `above` seen as bytes: times the class it holds the class where it won and 0 elsewhere. Classes
            # ascend, so the largest mark is the latest winner: no condition per pixel.
            np.multiply(mark, number, out=mark)
            np.maximum(ids, mark, out=ids)


def _sum_of(
    parts: Sequence[tuple[Tensor | None, Tensor]], number: int, into: Tensor, copied: bool = True
) -> Tensor:
    """Value (r, W) of one class, in `into`; or as it stands in a single part, if it need not be `copied`."""
    for first, (matrix, wide) in enumerate(parts):
        if matrix is None:
            into = wide[number] if not copied and len(parts) == 1 else _put(into, wide[number], first > 0)
        elif first == 0:
            torch.mm(matrix, wide[number], out=into)
        else:
            into.addmm_(matrix, wide[number])
    return into


def _put(into: Tensor, value: Tensor, add: bool) -> Tensor:
    return into.add_(value) if add else into.copy_(value)


def _elsewhere(strips: Sequence[Strip], top: int, out: Tensor, merged: int, windows: Tensor | None) -> None:
    """Few operations over large bands, none of which waits for the device."""
    width = out.shape[1]
    row = strips[0].logits.shape[1] * width * strips[0].logits.element_size()
    rows = max(1, _BAND_BYTES // row)
    for start in range(0, len(out), rows):
        band = out[start : start + rows]
        parts = [_part(strip, top + start, len(band), width) for strip in strips]
        total = torch.as_tensor(
            sum(wide if matrix is None else torch.matmul(matrix, wide) for matrix, wide in parts)
        )
        if windows is not None:
            classes = len(total) - merged
            first = _merged(total[0], total[classes:].unbind(), windows)
            total = torch.cat([first[None], total[1:classes]])
        band.copy_(total.argmax(0))


def _part(strip: Strip, start: int, number: int, width: int) -> tuple[Tensor | None, Tensor]:
    """What a strip gives to rows start...: the matrix (r, k) of its row weights, None = identity, and (C, k, W)."""
    small = strip.logits.shape[2]
    first = start - strip.top  # in the window's own rows
    if small == strip.height:
        return None, _columns(strip, first, first + number, width)
    like = strip.logits
    # Where each row's centre falls among the small rows, as `interpolate` computes it with align_corners=False.
    source = torch.arange(first, first + number, dtype=like.dtype).add_(0.5).mul_(small / strip.height)
    source = source.sub_(0.5).clamp_(min=0)  # (r,)
    above = source.floor().long().clamp_(max=small - 1)
    below = (above + 1).clamp_(max=small - 1)
    share = (source - above)[:, None]
    # Only small rows begin..end-1 are needed. At the border `above` and `below` are one row, so the weights are added.
    begin, end = int(above[0]), int(below[-1]) + 1
    matrix = torch.zeros(number, end - begin, dtype=like.dtype)
    matrix.scatter_add_(1, above[:, None] - begin, 1 - share)
    matrix.scatter_add_(1, below[:, None] - begin, share)
    return matrix.to(like.device, non_blocking=True), _columns(strip, begin, end, width)


def _columns(strip: Strip, begin: int, end: int, width: int) -> Tensor:
    """Small rows begin..end-1 of the windows at full width, summed where they overlap: (C, k, W)."""
    small = strip.logits[:, :, begin:end]
    if small.shape[3] != strip.width:
        small = F.interpolate(small, (end - begin, strip.width), mode="bilinear", align_corners=False)
    if len(small) == 1 and strip.width == width:
        return small[0]
    wide = small.new_zeros(small.shape[1], end - begin, width)  # (C, k, W)
    for left, one in zip(strip.lefts, small, strict=True):
        wide[..., left : left + strip.width] += one
    return wide
