"""The memory of a run in a bundle: images of the training data with the labels that they were stored with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from everseg.deploy.class_ids import mask_type
from everseg.errors import ConfigError, DataError
from everseg.labels import IGNORED, IGNORED_WIDE, LabelSpace, ignored_id
from everseg.runs.memory import CopiedSplit, Copy, Kept, Memory, png, read_memory
from everseg.runs.model_folder import Registry
from everseg.runs.run_folder import RunFolder

Files = dict[str, Callable[[], bytes]]
Bundled = Callable[[Registry], tuple[Memory, Files]]
"""Makes a bundle's memory and its files, once the lasting ids of the classes are known."""


def bundled_memory(
    folder: RunFolder, index: int, recorded: Mapping[int, Mapping[str, Any]], spaces: Mapping[str, LabelSpace]
) -> Bundled:
    """Prepare the memory of a finished step for a bundle.

    The masks in the bundle hold the lasting ids of the classes that were annotated when the images were stored.
    Everything else is background or ignored in them, as it was in training.

    Args:
        folder: the run.
        index: the step.
        recorded: step -> its entry in scenario.json.
        spaces: the model's classes.

    Raises:
        ConfigError: the run has no memory, or keeps references only.
    """
    memory = read_memory(folder.final(index))
    if memory is None or not memory.images:
        raise ConfigError(
            f"--memory: {folder.path} keeps no images of earlier steps; a run keeps some with scenario.memory.size=100"
        )
    if len(memory.copies) < len(memory.images):
        raise ConfigError(
            f"--memory: {folder.path} keeps the names of its images only; a run keeps copies with "
            "scenario.memory.keep=files"
        )

    def make(registry: Registry) -> tuple[Memory, Files]:
        images, files = list[Kept](), Files()
        for number, kept in enumerate(memory.images):
            assert kept.copy is not None
            copied, made = _bundled(folder, index, number, kept, kept.copy, recorded, spaces, registry)
            images.append(replace(kept, copy=copied))
            files |= made
        return replace(memory, images=tuple(images)), files

    return make


def _bundled(
    folder: RunFolder,
    index: int,
    number: int,
    kept: Kept,
    copy: Copy,
    recorded: Mapping[int, Mapping[str, Any]],
    spaces: Mapping[str, LabelSpace],
    registry: Registry,
) -> tuple[Copy, Files]:
    where, stem = folder.final(copy.step), f"memory-{number:05d}"
    extra = {name: f"{stem}-map-{place}.png" for place, name in enumerate(sorted(copy.extra))}
    result = Copy(index, f"{stem}{Path(copy.image).suffix}", f"{stem}-mask.png", extra, lasting=True)

    def mask() -> bytes:
        split = CopiedSplit(kept.image.split, [(kept.image.id, copy, where)])
        raw = split.read_mask(0)
        if copy.lasting:
            return png(raw)
        space = spaces[kept.image.branch]
        table = _table(kept, recorded, space)
        ids = registry.ids(space)
        kind = mask_type(ids)
        ignored = IGNORED if kind is np.uint8 else IGNORED_WIDE
        lasting = np.array([ids[t] if t < len(ids) else ignored for t in table], kind)
        wide = np.append(lasting, np.full(max(0, int(raw.max(initial=0)) + 1 - len(lasting)), ignored, kind))
        return png(wide[raw])

    files: Files = {result.image: (where / copy.image).read_bytes, result.mask: mask}
    for name, file in extra.items():
        files[file] = (where / copy.extra[name]).read_bytes
    return result, files


def _table(kept: Kept, recorded: Mapping[int, Mapping[str, Any]], space: LabelSpace) -> Sequence[int]:
    """Raw id -> train id as the steps that annotated the image had it; classes win over background and ignored."""
    image = kept.image
    found: list[int] = []
    ignored = ignored_id(space.num_classes)
    for step in image.steps:
        for source in recorded[step]["train"]:
            if (source["dataset"], source["split"]) != (image.dataset, image.split):
                continue
            own = IGNORED if len(source["lut"]) and max(source["lut"]) <= IGNORED else IGNORED_WIDE
            table = [ignored if t == own else t for t in source["lut"]]
            before = found or table
            found = [
                old if new in (space.background, ignored) and old not in (space.background, ignored) else new
                for old, new in zip(before, table, strict=True)
            ]
    if not found:
        raise DataError(f"scenario.json names no step that trained {image.dataset}/{image.split}")
    return found
