"""Images seen through overlapping windows: bounded memory at any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from everseg.losses.argmax import Strip, argmax_of_sum
from everseg.losses.pixelwise import full_precision
from everseg.models.branch_choice import branch_distances
from everseg.models.model import SegmentationModel
from everseg.runs.input_form import Windows

See = Callable[[Tensor], Tensor]
"""Windows of one image, (n, 3, h, w) -> small logits (n, C, h', w')."""


@torch.no_grad()
def sliding_ids(see: See, image: Tensor, windows: Windows) -> Tensor:
    """Arg-max class of every pixel of the mean logits of all windows that see it.

    Each window's logits are resized bilinearly to its pixels, summed where windows overlap (every class has the same
    number of summands, so the sum's arg-max is the mean's), and compared a band of rows at a time. Of the logits only
    the small ones of the rows of windows that a band lies in are kept.

    Args:
        see: what the network says of windows cut out of the image.
        image: (3, H, W), any type, on the network's device.

    Returns:
        (H, W) uint8 train ids on that device.
    """
    height, width = image.shape[1:]
    tall = min(windows.side, height)
    tops = set(windows.starts(height))
    ids = torch.empty(height, width, dtype=torch.uint8, device=image.device)
    seen: list[Strip] = []
    for start, stop in pairwise(sorted(tops | {top + tall for top in tops})):
        seen = [strip for strip in seen if strip.top + tall > start]
        if start in tops:
            seen.append(_strip(see, image, windows, start))
        argmax_of_sum(seen, start, ids[start:stop])
    return ids


def infer_sliding_branch(
    model: SegmentationModel,
    prepare: Callable[[Tensor], Tensor],
    image: Tensor,
    windows: Windows,
    branches: Sequence[str] | None = None,
) -> str:
    """Choose the branch of one large image: the one with the smallest mean distance over its windows.

    Args:
        prepare: windows (n, 3, h, w) as the network takes them, from those cut out of the image.
        image: (3, H, W), any type, on the network's device.
        branches: the candidates; None = all.

    Raises:
        ConfigError: as `everseg.models.branch_choice.branch_distances`.
    """
    names = model.branches if branches is None else tuple(branches)
    total = sum(
        branch_distances(model, prepare(torch.stack(crops)), names).sum(dim=0)
        for top in windows.starts(image.shape[1])
        for crops in _batches(image, windows, top)
    )
    return names[int(torch.as_tensor(total).argmin())]


def _strip(see: See, image: Tensor, windows: Windows, top: int) -> Strip:
    """What the network says of the windows that begin at one row."""
    height, width = (min(windows.side, length) for length in image.shape[1:])
    logits = [full_precision(see(torch.stack(crops))) for crops in _batches(image, windows, top)]
    return Strip(torch.cat(logits), top, windows.starts(image.shape[2]), height, width)


def _batches(image: Tensor, windows: Windows, top: int) -> list[list[Tensor]]:
    """Views of the windows that begin at one row, in batches."""
    rows = image[:, top : top + windows.side]
    crops = [rows[:, :, left : left + windows.side] for left in windows.starts(image.shape[2])]
    return [crops[i : i + windows.batch] for i in range(0, len(crops), windows.batch)]
