"""A pass over a step's images in which a method adds up what it needs, without gradients."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """How the images are gone through. `Method.accumulates` returns one for the steps that have such a pass."""

    crops: bool = True
    """Training crops, as training draws them, in a random order; or images as tests see them, in the data's order."""
    every_image: bool = True
    """Each image is seen in each epoch. False drops the last batch where it is not whole, as training does."""
    epochs: int = 1
    """Passes over the images. Without crops each would see the same."""
    batch: int | None = None
    """Images at once, over all processes. None = `train.batch`; without crops `train.eval_batch` in each process."""
