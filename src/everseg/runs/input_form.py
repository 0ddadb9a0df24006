"""How a model sees an image: size, windows, normalisation, bits per channel.

The network gets RGB with 8 bits per channel, without alpha, unless the data set states other channels.
One class holds everything that differs between models, whether it comes from a configuration, a model folder or an
ONNX file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from everseg.config.fields import DataConfig
from everseg.data.base import Dataset, channels_of_split
from everseg.data.channels import Channels, channels_of, same_channels
from everseg.data.datasets.decode import Reading
from everseg.errors import ConfigError, some
from everseg.types import IMAGENET_MEAN, IMAGENET_STD

Evaluation = Literal["crop", "whole", "resize", "sliding"]
Normalisation = Literal["imagenet", "unit"]
LARGEST = 65536
"""Longest side of an image or window that is accepted, in pixels."""


@dataclass(frozen=True)
class Windows:
    """The sliding windows through which the network sees an image."""

    side: int
    """Side of the square windows in pixels. If an axis of the image is shorter, the window covers the whole axis."""
    overlap: float = 1 / 3
    """Minimum share of its side that a window has in common with the next one."""
    batch: int = 4
    """Number of windows that go through the network at once."""

    def starts(self, length: int) -> tuple[int, ...]:
        """Compute the first pixel of each window along an axis. The last window ends at the border.

        >>> Windows(512, 0.25).starts(1024), Windows(512).starts(300)
        ((0, 384, 512), (0,))
        """
        if length <= self.side:
            return (0,)
        step = max(1, int(self.side * (1 - self.overlap)))
        return (*range(0, length - self.side, step), length - self.side)


@dataclass(frozen=True)
class InputForm:
    """How a model saw its images in training and wants to see them from now on."""

    evaluation: Evaluation | None = None
    """How the model sees test images, as in `data.evaluation`. None, as in imported checkpoints, means whole images."""
    size: tuple[int, int] | None = None
    """(H, W) in pixels, as in `data.size`. Images are resized to it if `evaluation` is "resize"."""
    normalisation: Normalisation = "imagenet"
    """Kind of `everseg.data.batches.transforms.normalise`."""
    window: int | None = None
    """Side of the windows in pixels if `evaluation` is "sliding"."""
    overlap: float = 1 / 3
    """Minimum share of its side that such a window has in common with the next one."""
    bit_depth: Literal[8, 16] = 8
    """Bits per channel of the files that the model learnt from. Of 16 bits the model sees the higher byte."""
    exif: Literal["apply", "ignore"] = "apply"
    """Whether images are turned upright according to their EXIF orientation."""
    channels: Channels | None = None
    """What the images' channels are, if not RGB with 8 bits; `normalisation`, `bit_depth`, `exif` do not count then."""

    @property
    def resized_to(self) -> tuple[int, int] | None:
        """(H, W) in pixels to which every image is resized; None if images keep their own size."""
        return self.size if self.evaluation == "resize" else None

    def windows(self, batch: int = Windows.batch) -> Windows | None:
        """Return the windows through which the model sees an image; None if it sees the image at once.

        Args:
            batch: number of windows that go through the network at once. It changes speed and memory, not the result.
        """
        if self.evaluation != "sliding" or self.window is None:
            return None
        return Windows(self.window, self.overlap, batch)

    @property
    def reading(self) -> Reading:
        """How an image file that the user gives is opened for the model."""
        return Reading(follow_links=True, bit_depth=self.bit_depth, exif=self.exif, channels=self.channels)

    @classmethod
    def of_config(cls, data: DataConfig, datasets: Iterable[Dataset] = ()) -> InputForm:
        """Derive the form from a run: how its model sees the test images.

        Args:
            data: the `data` section of the run's configuration.
            datasets: the run's data sets, if they are open. Only they know how their files are read, because a
                data.yaml may set it too.
        """
        sliding = data.evaluation == "sliding"
        datasets = list(datasets)
        readings = [
            split.reading
            for dataset in datasets
            for split in dataset.splits.values()
            if hasattr(split, "reading")  # generated images have no files
        ]
        return cls(
            data.evaluation,
            data.size,
            data.normalisation,
            (data.window or data.crop) if sliding else None,
            data.overlap if sliding else cls.overlap,
            max((reading.bit_depth for reading in readings), default=8),
            "ignore" if readings and all(reading.exif == "ignore" for reading in readings) else "apply",
            one_kind_of_channels(datasets),
        )

    def settings(self) -> dict[str, Any]:
        """Collect the `data` settings that a next step must share to see its images alike. Skip unknown ones."""
        known = {"size": self.size, "evaluation": self.evaluation, "normalisation": self.normalisation}
        return {key: value for key, value in known.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Convert the form to the JSON value that files hold: the settings that are known."""
        sliding = {"window": self.window, "overlap": self.overlap} if self.windows() is not None else {}
        reading = {"bit_depth": self.bit_depth, "exif": self.exif}
        size = {} if self.size is None else {"size": list(self.size)}
        channels = {} if self.channels is None else {"channels": self.channels.to_json()}
        return {**self.settings(), **size, **sliding, **reading, **channels}

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> tuple[InputForm, list[str]]:
        """Read the form back. Settings that older files or imported models lack get their default.

        Args:
            stored: a document that holds these settings among others.

        Returns:
            The form and a list of problems. If there are problems, the form must not be used.
        """
        problems = []

        def value(key: str, expected: str, good: Any) -> Any:
            found = stored.get(key)
            if found is None or good(found):
                return found
            problems.append(f"{key}: expected {expected}")
            return None

        evaluation = value(
            "evaluation", f"one of {', '.join(get_args(Evaluation))}", _one_of(get_args(Evaluation))
        )
        kinds = get_args(Normalisation)
        normalisation = (
            value("normalisation", f"one of {', '.join(kinds)}", _one_of(kinds)) or cls.normalisation
        )
        size = value("size", f"height and width in 1 ... {LARGEST} pixels", _is_size)
        window = value("window", f"a side in 1 ... {LARGEST} pixels", _is_side)
        overlap = value("overlap", "a share from 0 to below 1", _is_share)
        depth = value("bit_depth", "8 or 16", _one_of((8, 16))) or cls.bit_depth
        exif = value("exif", "apply or ignore", _one_of(("apply", "ignore"))) or cls.exif
        channels, wrong = channels_of(stored.get("channels"))
        problems += wrong
        for kind, key, found in (("resize", "size", size), ("sliding", "window", window)):
            if evaluation == kind and found is None and not problems:
                problems.append(f"evaluation: '{kind}' needs a {key}")
        form = cls(
            evaluation, None if size is None else (size[0], size[1]), normalisation, window,
            cls.overlap if overlap is None else float(overlap), depth, exif, channels,
        )  # fmt: skip
        return form, problems

    def preprocessing(self) -> dict[str, Any]:
        """Describe how an image becomes the network's input. Bundles and ONNX files hold it for other readers.

        An ONNX network does all of it itself, except the resizing and the windows.
        """
        windows, imagenet = self.windows(), self.normalisation == "imagenet"
        scale, mean, std = 1 / 255, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
        if imagenet:
            mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
        kind, count = "uint8 RGB", 3
        if (channels := self.channels) is not None:
            scale, mean, std = 1.0, list(channels.mean), list(channels.std)
            kind, count = f"{channels.array_type} of the channels {', '.join(channels.names)}", len(channels)
        return {
            "input": f"image: {kind}, (batch, height, width, {count})",
            "size": None if self.resized_to is None else list(self.resized_to),
            "resize": "bilinear, antialiased",
            "windows": None if windows is None else {"side": windows.side, "overlap": windows.overlap},
            "scale": scale,
            "mean": mean,
            "std": std,
            "outputs": "logits: float32, (batch, outputs of the branch, h, w); mask: class ids, uint8 (uint16 "
            "where an id is above 254), (batch, height, width)",
            "form": self.to_json(),
        }

    @classmethod
    def of_preprocessing(cls, stored: Mapping[str, Any]) -> InputForm:
        """Read back what `preprocessing` wrote.

        Raises:
            ValueError: `stored` does not have that form; the message says what is wrong.
        """
        form = stored.get("form")
        found, problems = (
            cls.of_json(form) if isinstance(form, Mapping) else (cls(), ["form: expected settings"])
        )
        if problems:
            raise ValueError("; ".join(problems))
        return found


def one_kind_of_channels(datasets: Iterable[Dataset]) -> Channels | None:
    """Find what the channels of a run's images are, if not RGB with 8 bits.

    Raises:
        ConfigError: data sets of a run that state different channels; one network cannot see both.
    """
    found = {
        dataset.name: channels_of_split(split) for dataset in datasets for split in dataset.splits.values()
    }
    first = next(iter(found.values()), None)
    if not all(same_channels(first, other) for other in found.values()):
        each = "; ".join(
            f"{name}: "
            + ("RGB with 8 bits" if one is None else f"{some(list(one.names), 6)} with {one.bits} bits")
            for name, one in found.items()
        )
        raise ConfigError(
            f"data.domains: the images have different channels, or different mean and std ({each}); state the same ones"
        )
    return first


def _one_of(choices: tuple[Any, ...]) -> Any:
    return lambda found: any(type(found) is type(choice) and found == choice for choice in choices)


def _is_side(found: Any) -> bool:
    return type(found) is int and 1 <= found <= LARGEST


def _is_size(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 2 and all(map(_is_side, found))


def _is_share(found: Any) -> bool:
    return type(found) in (int, float) and 0 <= found < 1
