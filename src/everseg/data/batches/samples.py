"""Load samples of views as arrays, and replace samples that cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from everseg.config.fields import DataConfig
from everseg.data.base import Split, channels_of_split, require_sample
from everseg.data.batches.augmentation import appearance, own_stream, padded, scaled_crop, turned
from everseg.data.batches.transforms import (
    center_transform,
    flip_and_shift,
    normalise,
    parted,
    resize_transform,
    sample_rng,
    train_transform,
    translated,
    whole_transform,
    with_maps,
)
from everseg.data.channels import Channels
from everseg.display import counted
from everseg.errors import DataError, EversegError, some
from everseg.types import Batch


class Maps(Protocol):
    """Further maps of a split's images, one for each image, such as saliency."""

    def read(self, index: int) -> np.ndarray:
        """Decode the map of one image: (H, W) uint8 or uint16, of the image's size.

        Raises:
            DataError: missing, unreadable, or not a map of one channel.
        """
        ...


@dataclass(frozen=True)
class View:
    """Some samples of a split, with the table raw id -> train id and the branch they are seen through."""

    split: Split
    indices: np.ndarray
    lut: np.ndarray
    branch: str = "default"
    dataset: str = ""
    """Key of the split's data set in the run (the domain); with a sample's id it names the sample in the run."""
    extra: Mapping[str, Maps] = field(default_factory=dict)
    """Name of a further map -> the maps of the split's images."""
    memory: bool = False
    """Whether the samples come from the memory of earlier steps."""


SampleKey = tuple[str, str]
"""(`View.dataset`, id): ids are unique in one split only."""


@dataclass
class Loaded:
    """A batch of one branch as the workers make it: bytes, not yet normalised."""

    image: Tensor
    """(B, 3, H, W) uint8, or (B, channels, H, W) of `channels.array_type`."""
    label: Tensor
    """(B, H, W) train ids, uint8; uint16 where there are more than 255 outputs."""
    ids: tuple[str, ...]
    """The samples seen, stand-ins under their own name."""
    branch: str = "default"
    channels: Channels | None = None
    """What the images' channels are, if not RGB with 8 bits."""
    bad: Mapping[SampleKey, str] = field(default_factory=dict)
    """Samples that could not be read and were replaced -> why."""
    memory: Tensor | None = None
    """(B,) bool, or None, as in `Batch`."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> (B, H, W) uint8 or uint16."""

    def pin_memory(self) -> Loaded:
        """Copy the batch to page-locked memory; torch's loader calls this for batches that go to a GPU."""
        return replace(
            self,
            image=self.image.pin_memory(),
            label=self.label.pin_memory(),
            memory=None if self.memory is None else self.memory.pin_memory(),
            extra={name: one.pin_memory() for name, one in self.extra.items()},
        )

    def normalised(self, device: torch.device, normalisation: Literal["imagenet", "unit"]) -> Tensor:
        """Move the images to a device and normalise them there, (B, C, H, W) float32."""
        return normalise(self.image.to(device, non_blocking=True), normalisation, self.channels)

    def on(self, device: torch.device, normalisation: Literal["imagenet", "unit"]) -> Batch:
        """Move the batch to a device, in the form that models and losses take."""

        def whole(ids: Tensor) -> Tensor:
            return ids.to(device, non_blocking=True).long()

        return Batch(
            self.normalised(device, normalisation),
            whole(self.label),
            self.branch,
            self.ids,
            None if self.memory is None else self.memory.to(device, non_blocking=True),
            {name: whole(one) for name, one in self.extra.items()},
        )


class _Sample(NamedTuple):
    image: np.ndarray
    label: np.ndarray
    id: str
    branch: str
    channels: Channels | None
    memory: bool | None
    """Whether it comes from the memory; None where nothing does."""
    extra: Mapping[str, np.ndarray]


Keys = list[tuple[int | None, int]]
"""What `Samples` is asked for to make a batch."""


class Samples(Dataset):
    """Map-style access by (epoch, position); epoch None means no augmentation.

    Args:
        replace: how many samples may be unreadable before a readable one of the same branch replaces them. The choice
            of the replacement depends only on seed, step, epoch, position and on which samples can be read.
    """

    def __init__(
        self, views: Sequence[View], data: DataConfig, seed: int, step: int, *, replace: int = 0
    ) -> None:
        self.views = views
        self.data = data
        self.seed = seed
        self.step = step
        self.replace = replace
        self.starts = np.cumsum([0, *(len(view.indices) for view in views)])
        self.has_memory = any(view.memory for view in views)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def branches(self, memory: bool | None = None) -> dict[str, np.ndarray]:
        """Positions of each branch's samples, with branches in the order of their first appearance in the views.

        Args:
            memory: only samples of the memory, or only others; None = all.
        """
        parts: dict[str, list[np.ndarray]] = {}
        for view, start, stop in zip(self.views, self.starts[:-1], self.starts[1:], strict=True):
            if memory is None or view.memory is memory:
                parts.setdefault(view.branch, []).append(np.arange(start, stop))
        return {branch: np.concatenate(positions) for branch, positions in parts.items()}

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[_Sample, dict[SampleKey, str]] | EversegError:
        """Load a sample, with a list of the unreadable samples it replaces. Errors go to the main process as values."""
        epoch, position = key
        bad: dict[SampleKey, str] = {}
        try:
            for candidate in self._candidates(epoch, position):
                view, index = self._place(candidate)
                try:
                    return self._sample(view, index, epoch), bad
                except DataError as error:
                    bad[view.dataset, view.split.id(index)] = str(error)
                    if not self.replace:
                        raise
                    if len(bad) > self.replace:
                        return too_many(bad, self.replace)
            return DataError("no training sample of the step can be read:\n  " + _listing(bad))
        except EversegError as error:
            return error

    def _candidates(self, epoch: int | None, position: int) -> Iterator[int]:
        yield position
        # Reached only if the sample cannot be read. The order of the replacements is drawn from seed, step, epoch and
        # position, so that a second run, other workers or a restart get the same ones.
        digest = hashlib.blake2b(
            f"replace:{self.seed}:{self.step}:{epoch}:{position}".encode(), digest_size=4
        )
        # An image of the memory is replaced by another one of the memory, so that each batch keeps its share of them.
        view = self._place(position)[0]
        others = self.branches(view.memory)[view.branch]
        order = np.random.RandomState(int.from_bytes(digest.digest(), "big")).permutation(others)
        yield from (int(other) for other in order if other != position)

    def _place(self, position: int) -> tuple[View, int]:
        # Positions run through all views: view k has the positions starts[k] to starts[k + 1] - 1.
        which = int(np.searchsorted(self.starts, position, side="right")) - 1
        view = self.views[which]
        return view, int(view.indices[position - self.starts[which]])

    def _sample(self, view: View, index: int, epoch: int | None) -> _Sample:
        sample_id = view.split.id(index)
        image, label = view.split.read(index)
        channels = channels_of_split(view.split)
        require_sample(sample_id, image, label, channels)
        label = with_maps(label, {name: _read_map(maps, index, label) for name, maps in view.extra.items()})
        image, label = self._seen(image, label, view, sample_id, epoch)
        label, extra = parted(label)
        memory = view.memory if self.has_memory else None
        return _Sample(image, label, sample_id, view.branch, channels, memory, extra)

    def _seen(
        self, image: np.ndarray, label: np.ndarray, view: View, sample_id: str, epoch: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bring image and raw ids to the form that the network sees, channels first and train ids."""
        if epoch is None:
            image, label = self._plain(image, label)
            return image, translated(label, view.lut)
        data, rng = self.data, sample_rng(self.seed, self.step, epoch, sample_id)
        own = own_stream(self.seed, self.step, epoch, sample_id)
        if data.transform == "resize":
            # The table raw id -> train id is applied before the shift, because the shift fills with a train id.
            image, label = resize_transform(image, label, size=data.size)
            image = appearance(image, data, own)
            image, label = flip_and_shift(
                image,
                translated(label, view.lut),
                flip=data.flip,
                shift=data.shift,
                fill=data.shift_fill,
                rng=rng,
            )
        elif data.scale_range is not None:
            image, label = scaled_crop(image, label, crop=data.crop, scale_range=data.scale_range, stream=own)
            image, label = padded(appearance(image, data, own), translated(label, view.lut), crop=data.crop)
            if rng.random() < data.flip:
                image, label = image[:, :, ::-1], label[:, ::-1]
        else:
            image, label = train_transform(
                image, label, crop=data.crop, scale=data.scale, flip=data.flip, rng=rng, table=view.lut
            )
            image = appearance(image, data, own)
        return turned(image, label, data, own)

    def _plain(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        data = self.data
        if data.evaluation == "crop":
            return center_transform(image, label, crop=data.crop)
        if data.evaluation == "resize":
            return resize_transform(image, label, size=data.size)
        return whole_transform(image, label)


def _read_map(maps: Maps, index: int, label: np.ndarray) -> np.ndarray:
    """Read a further map of an image.

    Raises:
        DataError: as `Maps.read`, or the map has another size than the label.
    """
    found = maps.read(index)
    if found.shape != label.shape:
        (height, width), (rows, columns) = label.shape, found.shape
        where = maps.path(index) if hasattr(maps, "path") else f"map {index}"
        raise DataError(
            f"{where}: {columns}x{rows} pixels, and its image {width}x{height}; give the map the image's size"
        )
    return found


def too_many(bad: Mapping[SampleKey, str], allowed: int) -> DataError:
    """Make the error that ends a run with more unreadable samples than it may replace."""
    return DataError(
        f"{counted(len(bad), 'training sample')} cannot be read, and data.skip_bad allows {allowed}:\n  {_listing(bad)}"
    )


def _listing(bad: Mapping[SampleKey, str]) -> str:
    return some(list(bad.values()), between="\n  ")


def collate(samples: Sequence[tuple[_Sample, dict[SampleKey, str]] | EversegError]) -> Loaded | EversegError:
    """Make one batch of samples. An error among them, or a difference in size, becomes the batch's error."""
    read = []
    for sample in samples:
        if isinstance(sample, EversegError):
            return sample
        read.append(sample)
    images, labels, ids, branches, channels, memory, extra = zip(*(sample for sample, _ in read), strict=True)
    shapes = {label.shape for label in labels}
    if len(shapes) > 1:
        return DataError(
            f"images of one batch differ in size: {dict(zip(ids, map(np.shape, labels), strict=True))}"
        )
    bad = {key: why for _, found in read for key, why in found.items()}
    return Loaded(
        _stacked(images),
        _stacked(labels),
        ids,
        branches[0],
        channels[0],
        bad,
        None if memory[0] is None else torch.tensor(memory),
        {name: _stacked([one[name] for one in extra]) for name in extra[0]},
    )


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    """Stack arrays into one tensor. In a worker, torch allocates it in memory shared with the main process."""
    return default_collate([torch.from_numpy(array) for array in arrays])
