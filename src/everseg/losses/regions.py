"""Outputs per region instead of per pixel: losses, labels and classes made of them.

An image has N regions without overlap: a map (B, H, W) holds the region's number, 0 to N - 1, of each pixel, and any
other value where there is none. Every pixel of a region has the region's logits, and one without region logits of 0. So
all that follows is computed from pixel counts, and no logits of full resolution are made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.labels import ignored_id
from everseg.losses.argmax import ids_type
from everseg.losses.classification import LINEAR_FROM
from everseg.losses.pixelwise import checked_label, checked_logits

_SMALLEST = 1e-12
"""Least norm that a map is divided by, as in `torch.nn.functional.normalize`."""


def region_binary_cross_entropy(logits: Tensor, regions: Tensor, label: Tensor) -> Tensor:
    """`binary_cross_entropy` (over="valid") of the regions' logits at every pixel.

    Args:
        logits: (B, N, C), unnormalised; half precision is computed in float32.
        regions: (B, H, W) integers; values outside 0..N-1 belong to no region, and have logits of 0.
        label: (B, H, W) integers in [0, C), or 255 = ignored.

    Returns:
        Scalar: the mean over pixels that are not ignored of the sum over outputs; 0 if all are ignored.

    Raises:
        ValueError: shapes that do not fit, or a label out of range (checked on the CPU only).

    >>> logits, regions = torch.zeros(1, 2, 3), torch.tensor([[[0, 1], [1, 255]]])
    >>> round(region_binary_cross_entropy(logits, regions, torch.zeros(1, 2, 2).long()).item(), 4)
    2.0794
    """
    logits = _with_none("region_binary_cross_entropy", logits)
    number, outputs = logits.shape[1] - 1, logits.shape[2]
    regions = _checked("region_binary_cross_entropy", regions, len(logits), number)
    at_size = logits.new_empty(()).expand(len(logits), outputs, *regions.shape[1:])
    label = checked_label("region_binary_cross_entropy", label, at_size)
    valid = label != ignored_id(outputs)
    # How many pixels of each image have this region and that label; ignored ones fall into a column that is cut off.
    column = torch.where(valid, label, outputs)
    image = torch.arange(len(logits), device=label.device)[:, None, None]
    cell = (image * (number + 1) + regions) * (outputs + 1) + column
    counts = _counted(cell.flatten(), len(logits) * (number + 1) * (outputs + 1))
    counts = counts.view(len(logits), number + 1, outputs + 1)[..., :outputs].to(logits)
    softplus = F.softplus(logits, threshold=LINEAR_FROM).sum(dim=2, keepdim=True)
    total = counts.sum()
    return (counts * (softplus - logits)).sum() / torch.where(total > 0, total, torch.ones_like(total))


@torch.no_grad()
def region_ids(values: Tensor, regions: Tensor) -> Tensor:
    """The class of every pixel: that of the largest value of its region, and 0 where there is no region.

    Args:
        values: (B, N, C).
        regions: (B, H, W) integers; values outside 0..N-1 belong to no region.

    Returns:
        (B, H, W) of `argmax.ids_type`.
    """
    regions = _checked("region_ids", regions, len(values), values.shape[1])
    best = F.pad(values.argmax(dim=2), (0, 1))  # (B, N + 1), class 0 for no region
    return best.gather(1, regions.flatten(1)).view_as(regions).to(ids_type(values.shape[2]))


@torch.no_grad()
def completed_by_regions(
    teacher_logits: Tensor,
    regions: Tensor,
    label: Tensor,
    *,
    num_classes: int,
    threshold: float,
    num_open: int = 1,
) -> Tensor:
    """`completed_labels` by the sigmoids of the regions' logits.

    Args:
        teacher_logits: (B, N, K).
        regions: (B, H, W); a pixel without region keeps its label.
        label: (B, H, W) integers: train ids, 255 = ignored.
        num_classes: C >= K, the outputs known now.
        threshold: least sigmoid that is accepted.
        num_open: outputs 0..num_open-1 are open.

    Returns:
        (B, H, W) int64.

    Raises:
        ValueError: shapes that do not fit, or no open output.
    """
    if num_open < 1 or num_classes < teacher_logits.shape[2]:
        raise ValueError(
            f"completed_by_regions: expected at least one open output and {teacher_logits.shape[2]} outputs in all, "
            f"got {num_open} and {num_classes}"
        )
    logits = _with_none("completed_by_regions", teacher_logits)
    regions = _checked("completed_by_regions", regions, len(logits), logits.shape[1] - 1)
    largest, best = torch.sigmoid(logits).max(dim=2)  # (B, N + 1)
    best = torch.where((largest >= threshold) & (best >= num_open), best, 0)
    found = best.gather(1, regions.flatten(1)).view_as(regions)
    return torch.where((label < num_open) & (found > 0), found, label.long())


def cluster_separation(clusters: Tensor, regions: Tensor) -> Tensor:
    """Keep several maps of one image apart: cross-entropy of each map's similarity with itself among all.

    Each of the U maps is divided by its norm over the pixels. Its products with all maps, without gradient on their
    side, are the logits, and the map itself is the label.

    Args:
        clusters: (B, N, U) logits of the regions.
        regions: (B, H, W) integers; pixels without region are 0 in every map.

    Returns:
        Scalar: the mean over images and maps.

    Raises:
        ValueError: shapes that do not fit.

    Source: Zhang et al. (MicroSeg), NeurIPS 2022, its code (`unseen_multi`).

    >>> round(cluster_separation(torch.ones(1, 1, 3), torch.zeros(1, 2, 2).long()).exp().item(), 4)
    3.0
    """
    clusters = _with_none("cluster_separation", clusters)[:, :-1]
    number = clusters.shape[1]
    regions = _checked("cluster_separation", regions, len(clusters), number)
    image = torch.arange(len(clusters), device=regions.device)[:, None, None]
    pixels = _counted((image * (number + 1) + regions).flatten(), len(clusters) * (number + 1))
    pixels = pixels.view(len(clusters), number + 1)[:, :number]
    # A product over pixels is one over regions, each as often as it has pixels.
    weighted = clusters * pixels.to(clusters).sqrt()[..., None]
    normed = weighted / weighted.norm(dim=1, keepdim=True).clamp(min=_SMALLEST)
    similarity = normed.transpose(1, 2) @ normed.detach()  # (B, U, U)
    return -similarity.log_softmax(dim=2).diagonal(dim1=1, dim2=2).mean()


def _counted(numbers: Tensor, most: int) -> Tensor:
    """How often each of the numbers 0 to `most` - 1 occurs; unlike `torch.bincount` it never waits for a device."""
    return torch.zeros(most, dtype=torch.int64, device=numbers.device).scatter_add_(
        0, numbers, torch.ones_like(numbers)
    )


def _with_none(loss: str, logits: Tensor) -> Tensor:
    """The logits in full precision, with zeros for "no region" at the end: (B, N + 1, C)."""
    if logits.dim() != 3:
        raise ValueError(f"{loss}: expected logits (B, N, C) of N regions, got shape {tuple(logits.shape)}")
    logits = checked_logits(loss, logits[..., None])[..., 0]
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)


def _checked(loss: str, regions: Tensor, images: int, number: int) -> Tensor:
    """The map of regions, int64, N where there is none."""
    if regions.dim() != 3 or len(regions) != images or regions.is_floating_point():
        raise ValueError(
            f"{loss}: expected whole numbers (B, H, W) of {images} images, got {regions.dtype} of shape "
            f"{tuple(regions.shape)}"
        )
    regions = regions.long()
    return torch.where((regions >= 0) & (regions < number), regions, number)
