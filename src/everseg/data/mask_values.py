"""Which values stand in mask files whose meaning is not known yet (floor 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from everseg.data.datasets.decode import Colour, Reading, open_inside, open_picture
from everseg.data.parallel import Progress, map_samples
from everseg.errors import DataError

MANY = 256
"""A mask with more values than this was not drawn class by class."""
_LOSSY = ("JPEG", "MPO", "WEBP")


@dataclass(frozen=True)
class Values:
    """What the masks of a data set hold."""

    ids: dict[int, int] = field(default_factory=dict)
    """Id -> pixels, of the masks with one channel."""
    colours: dict[Colour, int] = field(default_factory=dict)
    """Colour -> pixels, of the colour masks."""
    faults: tuple[str, ...] = ()
    """One line per mask that tells nothing: unreadable, lossy, or of too many values."""


def mask_values(root: Path, masks: Sequence[str], *, progress: Progress | None = None) -> Values:
    """Read masks on all cores and count their values.

    Args:
        root: data folder, resolved.
        masks: paths below it.
    """
    found = map_samples(_values, (root, list(masks)), len(masks), progress=progress)
    ids: Counter[int] = Counter()
    colours: Counter[Colour] = Counter()
    for one in found:
        ids.update(one.ids)
        colours.update(one.colours)
    return Values(
        dict(sorted(ids.items())), dict(colours.most_common()), tuple(f for v in found for f in v.faults)
    )


def _values(job: tuple[Path, list[str]], index: int) -> Values:
    root, name = job[0], job[1][index]
    try:
        with open_inside(root, name) as file:
            picture = open_picture(file, root / name, Reading())
            if picture.format in _LOSSY:
                return Values(faults=(f"{name}: stored as {picture.format}, which changes values",))
            picture.load()
            bits = picture.mode in ("RGB", "RGBA", "RGBX")
            pixels = np.asarray(picture.convert("RGB") if bits else picture)
    except DataError as error:
        return Values(faults=(str(error),))
    except Exception as error:  # decoders raise nearly anything on damaged files
        return Values(faults=(f"{name}: {error}",))
    if bits:
        wide = pixels.astype(np.uint32)
        pixels = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    if pixels.ndim != 2 or pixels.dtype.kind not in "uib":
        return Values(faults=(f"{name}: a mask of mode {picture.mode}",))
    values, counts = np.unique(pixels, return_counts=True)
    if len(values) > MANY:
        return Values(faults=(f"{name}: {len(values)} different values; no mask of classes",))
    pairs = [(int(v), int(n)) for v, n in zip(values, counts, strict=True)]
    if bits:
        return Values(colours={(v >> 16, v >> 8 & 255, v & 255): n for v, n in pairs})
    return Values(ids=dict(pairs))
