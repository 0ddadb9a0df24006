"""Prediction through overlapping windows, which bounds the memory for images of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from everseg.losses.argmax import Strip, argmax_of_sum, ids_type
from everseg.losses.pixelwise import full_precision
from everseg.models.branch_choice import branch_distances
from everseg.models.model import SegmentationModel
from everseg.runs.input_form import Windows

See = Callable[[Tensor], Tensor]
"""Windows of one image, (n, 3, h, w) -> small logits (n, C, h', w'), or values of a readout."""


@torch.no_grad()
def sliding_ids(see: See, image: Tensor, windows: Windows, merged: int = 0) -> Tensor:
    """Predict every pixel of an image from the mean logits of all windows that contain it.

    The logits of each window are resized bilinearly to the size of the window and summed where windows overlap. Every
    class has the same number of summands at a pixel, so the arg-max of the sum is the arg-max of the mean. The image is
    processed in bands of rows. Memory holds only the small logits of the windows that overlap the current band.

    Args:
        see: maps windows cut out of the image to the network's logits.
        image: (3, H, W), any type, on the network's device.
        merged: as for `predict_ids`.

    Returns:
        (H, W) train ids, as `predict_ids` gives them, on that device.
    """
    height, width = image.shape[1:]
    tall = min(windows.side, height)
    tops = set(windows.starts(height))
    ids: Tensor | None = None
    seen: list[Strip] = []
    # Band borders lie where a row of windows begins or ends, so all rows of a band have the same windows.
    for start, stop in pairwise(sorted(tops | {top + tall for top in tops})):
        seen = [strip for strip in seen if strip.top + tall > start]  # drop windows that end above this band
        if start in tops:
            seen.append(_strip(see, image, windows, start))
        if ids is None:
            kind = ids_type(seen[0].logits.shape[1] - merged)
            ids = torch.empty(height, width, dtype=kind, device=image.device)
        argmax_of_sum(seen, start, ids[start:stop], merged)
    assert ids is not None  # an image has a row
    return ids


def infer_sliding_branch(
    model: SegmentationModel,
    prepare: Callable[[Tensor], Tensor],
    image: Tensor,
    windows: Windows,
    branches: Sequence[str] | None = None,
) -> str:
    """Choose the branch of one large image: the branch with the smallest mean distance over the image's windows.

    Args:
        prepare: turns windows (n, 3, h, w) cut out of the image into inputs of the network.
        image: (3, H, W), any type, on the network's device.
        branches: the candidates; None = all.

    Raises:
        ConfigError: as `everseg.models.branch_choice.branch_distances`.
    """
    names = model.branches if branches is None else tuple(branches)
    # Every branch sees the same number of windows, so the smallest sum is the smallest mean.
    total = sum(
        branch_distances(model, prepare(torch.stack(crops)), names).sum(dim=0)
        for top in windows.starts(image.shape[1])
        for crops in _batches(image, windows, top)
    )
    return names[int(torch.as_tensor(total).argmin())]


def _strip(see: See, image: Tensor, windows: Windows, top: int) -> Strip:
    """Compute the logits of all windows whose top edge is at row `top`."""
    height, width = (min(windows.side, length) for length in image.shape[1:])
    logits = [full_precision(see(torch.stack(crops))) for crops in _batches(image, windows, top)]
    return Strip(torch.cat(logits), top, windows.starts(image.shape[2]), height, width)


def _batches(image: Tensor, windows: Windows, top: int) -> list[list[Tensor]]:
    """Cut out all windows whose top edge is at row `top`, in batches. The windows are views, not copies."""
    rows = image[:, top : top + windows.side]
    crops = [rows[:, :, left : left + windows.side] for left in windows.starts(image.shape[2])]
    return [crops[i : i + windows.batch] for i in range(0, len(crops), windows.batch)]
