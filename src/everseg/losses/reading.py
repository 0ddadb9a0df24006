"""From a network's outputs to the class of every pixel of whole images, as its readout says."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from everseg.losses.argmax import predict_ids
from everseg.losses.readout import full_values, merged_outputs, small_values
from everseg.losses.regions import region_ids
from everseg.types import REGIONS, Readout, SegOutput, of_regions


def read_ids(output: SegOutput, readout: Readout, size: tuple[int, int] | torch.Size) -> Tensor:
    """Find the class of every pixel of whole images, without logits at their resolution.

    Args:
        size: (H, W) of the images; of a readout of regions also that of their map.

    Returns:
        (B, H, W) train ids, as `predict_ids` gives them.

    Raises:
        ValueError: an output or a map that the readout names is missing.
    """
    if not readout.regions:
        return predict_ids(small_values(output, readout), size, merged_outputs(readout))
    if missing := [name for name in (REGIONS, readout.regions) if name not in output.features]:
        raise ValueError(f"the model has no tap '{missing[0]}', which its readout needs")
    inside = of_regions(output)
    values = full_values(inside, replace(readout, regions=""), inside.logits.shape[2:])  # (B, C, N, 1)
    return region_ids(values[..., 0].transpose(1, 2), output.features[readout.regions])
