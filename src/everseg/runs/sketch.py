"""The sketch in a bundle: a few vectors of the features that its old images gave, without labels, images or places.

They are samples of the map that the classifiers see, sorted by the class that the model predicted there. A later
extension asks its new classifiers about them, long after the images are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from everseg.errors import CheckpointError
from everseg.runs.commit import Committed, load_tensors, read_committed
from everseg.runs.model_folder import MOST_IDS, SKETCH

PER_CLASS = 64
"""Most vectors of one class of one branch."""
MOST_NUMBERS = 4_000_000
"""Most numbers of one branch's vectors, 8 MB."""


@dataclass(frozen=True)
class Sketch:
    """Vectors of one branch."""

    features: Tensor
    """(N, D) float16: what the classifiers see at one place of one image."""
    ids: Tensor
    """(N,) int32: the lasting id of the class that the model predicted there, ascending."""

    def most(self, classes: int) -> int:
        """Most vectors of each of so many classes."""
        return most(self.features.shape[1], classes)


def most(width: int, classes: int) -> int:
    """Most vectors of each class, so that a branch's stay below `MOST_NUMBERS`.

    Args:
        width: numbers in a vector.
        classes: number of classes of the branch.
    """
    return min(PER_CLASS, MOST_NUMBERS // (max(1, width) * max(1, classes)))


def tensors(sketches: Mapping[str, Sketch]) -> dict[str, Tensor]:
    """The content of the file: branch -> its sketch, as named tensors."""
    named = {}
    for branch, one in sketches.items():
        named[f"{branch}.features"] = one.features.to(torch.float16).contiguous()
        named[f"{branch}.ids"] = one.ids.to(torch.int32).contiguous()
    return named


def read_sketch(folder: Path, committed: Committed | None = None) -> dict[str, Sketch]:
    """Read the sketch of a bundle: branch -> its vectors; {} where the bundle has none.

    Args:
        committed: the folder's manifest, if the caller has read it before.

    Raises:
        CheckpointError: the file is damaged or changed.
    """
    path = folder / SKETCH
    if not path.exists():
        return {}
    stored = load_tensors(path, (committed or read_committed(folder)).read(SKETCH))
    branches = {name.rpartition(".")[0] for name in stored}
    found = {}
    for branch in sorted(branches):
        features, ids = stored.get(f"{branch}.features"), stored.get(f"{branch}.ids")
        if (
            features is None
            or ids is None
            or features.dtype != torch.float16
            or ids.dtype != torch.int32
            or features.ndim != 2
            or ids.shape != features.shape[:1]
            or features.numel() > MOST_NUMBERS
            or not bool(features.isfinite().all())
            or not bool(((ids >= 0) & (ids < MOST_IDS)).all())
        ):
            raise CheckpointError(
                f"{path} is damaged: expected finite vectors and the class of each, by branch; restore the bundle"
            )
        found[branch] = Sketch(features, ids)
    if len(stored) != 2 * len(found):
        raise CheckpointError(
            f"{path} is damaged: it holds more than vectors and classes; restore the bundle"
        )
    return found
