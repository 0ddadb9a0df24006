"""Images for trying models: from a folder, from the test images of a run, or generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from everseg.data.base import Dataset
from everseg.data.channels import Channels
from everseg.data.datasets.decode import read_image
from everseg.data.datasets.listing import image_files
from everseg.data.demo import build as demo
from everseg.display import counted
from everseg.engine.prepare import open_datasets
from everseg.engine.rescore import stored_config
from everseg.errors import ConfigError, DataError
from everseg.runs.input_form import InputForm
from everseg.runs.run_folder import RunFolder

T = TypeVar("T")
FEW = 6
"""Number of images for comparing an ONNX file with the model."""
SKETCHED = 16
"""Number of images that a model's features are sampled on."""


def images_of(folder: str | Path, form: InputForm | None = None) -> tuple[list[np.ndarray], str]:
    """Read a few evenly spread images of a folder with the reading settings of `form`. Also return a description."""
    reading = (form or InputForm()).reading
    files = spread(image_files(folder, reading))
    return [
        read_image(path, reading) for path in files
    ], f"{counted(len(files), 'image')} of {Path(folder).name}"


def shown_in_tests(
    folder: RunFolder, overrides: Sequence[str] = (), number: int = FEW
) -> dict[str, list[np.ndarray]]:
    """Read some evenly spread test images of a run: domain, or name of the one data set -> its images.

    Raises:
        ConfigError, DataError: the data cannot be read.
    """
    config = stored_config(folder, overrides, kinds=("dataset",))
    datasets = open_datasets(config.data)
    return {key: [*_images(dataset, config.scenario.test_split, number)] for key, dataset in datasets.items()}


def shown_in_training(
    folder: RunFolder, overrides: Sequence[str], number: int
) -> dict[str, Iterator[np.ndarray]]:
    """Read some evenly spread training images of a run, one by one: domain, or name of the one data set -> its images.

    Raises:
        ConfigError, DataError: the data cannot be read; of an image when its turn comes.
    """
    config = stored_config(folder, overrides, kinds=("dataset",))
    return {key: _images(dataset, "train", number) for key, dataset in open_datasets(config.data).items()}


def images_of_run(folder: RunFolder, overrides: Sequence[str] = ()) -> tuple[list[np.ndarray], str]:
    """Read a few test images of a run. Also return a description.

    If the data cannot be read and no `overrides` name them, generated images are used instead.
    """
    try:
        images = [image for each in shown_in_tests(folder, overrides).values() for image in each]
    except (ConfigError, DataError):
        if overrides:
            raise
        return generated(folder.about(folder.chosen_step(None)).form.channels)
    return images, f"{counted(len(images), 'test image')} of the run"


def generated(channels: Channels | None = None) -> tuple[list[np.ndarray], str]:
    """Generate a few street scenes, or noise of the given channels. Also return a description."""
    if channels is not None:
        rng = np.random.default_rng(0)
        low, high = np.array(channels.low), np.array(channels.high)
        noise = low + rng.random((FEW, 240, 320, len(channels))) * (high - low)
        if channels.bits < 32:
            noise = np.rint(np.clip(noise, 0, 2**channels.bits - 1))
        text = f"{FEW} images of noise, no real images (--images DIR compares on yours)"
        return list(noise.astype(channels.array_type)), text
    split = demo(size=(240, 320), num_val=FEW).splits["val"]
    text = f"{FEW} generated scenes, no real images (--images DIR compares on yours)"
    return [split.read(i)[0] for i in range(FEW)], text


def _images(dataset: Dataset, name: str, number: int) -> Iterator[np.ndarray]:
    if name not in dataset.splits:
        raise DataError(f"data set '{dataset.name}' has no split '{name}'")
    split = dataset.splits[name]
    for index in spread(range(len(split)), number):
        yield split.read(index)[0]


def spread(items: Sequence[T], number: int = FEW) -> list[T]:
    """Choose so many evenly spread items, or all where there are fewer."""
    if not items:
        return []
    positions = np.unique(np.linspace(0, len(items) - 1, number).round().astype(int))
    return [items[position] for position in positions.tolist()]
