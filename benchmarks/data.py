"""Speed and memory of the data's way: `python -m benchmarks.data [--quick] [--json FILE]`.

Pictures are generated ones like Pascal VOC's (`benchmarks.photographs`: 500x375, JPEG of about 90 kB, palette PNG),
and everything runs on one thread but where cores or workers are named. A sample's times are processor times, the least
of several runs per image, averaged over the images: what the code costs where nothing disturbs it. The index's ratio is
the median of runs in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import Figure, in_turn, main, medians, ratio
from benchmarks.photographs import LABELS, SIZE, write_split
from everseg.config.fields import DataConfig
from everseg.data.batches.index import class_counts
from everseg.data.batches.loader import Timed, View, train_batches
from everseg.data.batches.parallel import available_cores, keep_memory
from everseg.data.batches.samples import Samples, collate
from everseg.data.batches.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    _channels_first,
    _resize,
    random_resized_crop_params,
    sample_rng,
)
from everseg.data.datasets.files import FileSplit
from everseg.models.build import deeplabv3_tiny

CROP = 512
DATA = DataConfig(crop=CROP, workers=2)
TABLE = np.full(256, 255, np.uint8)
TABLE[:16] = np.arange(16)


def figures(quick: bool = False) -> list[Figure]:
    """All figures of the data's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_memory()
    try:
        with tempfile.TemporaryDirectory() as name:
            split = write_split(Path(name) / "voc", 8 if quick else 16)
            return [
                *sample_figures(split, 2 if quick else 7),
                *decoder_figures(split, 2 if quick else 7),
                *augmentation_figures(split, 2 if quick else 5),
                *batch_figures(split, 2 if quick else 5),
                index_figure(split, Path(name) / "many", 200 if quick else 4000, 1 if quick else 3),
                *loader_figures(split, 3 if quick else 6),
                plan_figure(split),
            ]
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- one sample


def sample_figures(split: FileSplit, repeat: int) -> list[Figure]:
    """Time of a training sample, against the original's way, against the floor and from raw pixels."""
    samples = Samples([View(split, np.arange(len(split)), TABLE)], DATA, 0, 0)
    raw = Samples([View(Raw(split), np.arange(len(split)), TABLE)], DATA, 0, 0)
    ways: dict[str, Callable[[int], object]] = {
        "sample": lambda index: samples[0, index],
        "floor": lambda index: floor_sample(split, index),
        "raw": lambda index: raw[0, index],
    }
    best = least(ways, len(split), repeat)
    few = least(
        {"original": lambda index: original_sample(split, index), "sample": ways["sample"]}, 4, repeat
    )
    mask = np.asarray(Image.fromarray(split.read_mask(0)).resize((CROP, CROP), Image.Resampling.NEAREST))
    mapping = least(
        {
            "by pixel": lambda _: mapped_by_pixel(torch.from_numpy(mask.copy())),
            "table": lambda _: TABLE.take(mask),
        },
        1,
        repeat,
    )
    parts = ", ".join(f"{name} {1e3 * value:.2f}" for name, value in stages(split, repeat).items())
    size = f"{SIZE[0]}x{SIZE[1]} JPEG + mask -> {CROP}"
    return [
        Figure("data", f"training sample, {size}, one core", 1e3 * best["sample"], "ms", 6, "lower", parts),
        Figure(
            "data",
            f"label table of a {CROP}x{CROP} mask, times faster than the original's mapping by pixel",
            mapping["by pixel"] / mapping["table"],
            "x",
            10,
            note=f"by pixel {1e3 * mapping['by pixel']:.1f} ms, table {1e3 * mapping['table']:.2f} ms",
        ),
        Figure(
            "data",
            "whole training sample, times faster than the original's (apply_ per pixel)",
            few["original"] / few["sample"],
            "x",
            10,
            note=f"original {1e3 * few['original']:.1f} ms, sample {1e3 * few['sample']:.2f} ms",
        ),
        Figure(
            "data",
            "the same over its floor: Pillow's decoding and resizing alone",
            best["sample"] / best["floor"],
            "x",
            note=f"floor {1e3 * best['floor']:.2f} ms",
        ),
        Figure(
            "data",
            "gain of a packed cache: sample from raw pixels instead of JPEG and PNG",
            best["sample"] / best["raw"],
            "x",
            note=f"raw {1e3 * best['raw']:.2f} ms; built only if at least 2",
        ),
    ]


def least(ways: dict[str, Callable[[int], object]], count: int, repeat: int) -> dict[str, float]:
    """Processor seconds of each way per index: the least of `repeat` runs, averaged over the indices."""
    best = {name: [float("inf")] * count for name in ways}
    for _ in range(repeat + 1):
        for index in range(count):
            for name, way in ways.items():
                start = time.process_time()
                way(index)
                best[name][index] = min(best[name][index], time.process_time() - start)
    return {name: statistics.mean(seconds) for name, seconds in best.items()}


def stages(split: FileSplit, repeat: int) -> dict[str, float]:
    """Seconds of each part of a sample."""
    pairs = [split.read(index) for index in range(len(split))]
    boxes = []
    for index in range(len(split)):
        rng = sample_rng(0, 0, 0, split.id(index))
        top, left, h, w = random_resized_crop_params(*SIZE, scale=DATA.scale, rng=rng)
        boxes.append((slice(top, top + h), slice(left, left + w)))
    resized = [
        _resize(image[box], mask[box], CROP, CROP) for (image, mask), box in zip(pairs, boxes, strict=True)
    ]
    ways: dict[str, Callable[[int], object]] = {
        "decode both": split.read,
        "decode mask": split.read_mask,
        "table": lambda i: TABLE.take(pairs[i][1][boxes[i]]),
        "crop + resize": lambda i: _resize(pairs[i][0][boxes[i]], pairs[i][1][boxes[i]], CROP, CROP),
        "flip + channels first": lambda i: (
            _channels_first(resized[i][0][:, ::-1]),
            np.array(resized[i][1][:, ::-1], order="C"),
        ),
    }
    best = least(ways, len(split), repeat)
    return {"decode image": best.pop("decode both") - best["decode mask"], **best}


def floor_sample(split: FileSplit, index: int) -> None:
    """What no loader with Pillow can do without: decode both files, resize the crop."""
    top, left, h, w = random_resized_crop_params(
        *SIZE, scale=DATA.scale, rng=sample_rng(0, 0, 0, split.id(index))
    )
    box = left, top, left + w, top + h
    with Image.open(split.image_path(index)) as image, Image.open(split.mask_path(index)) as mask:
        image.crop(box).resize((CROP, CROP), Image.Resampling.BILINEAR)
        mask.crop(box).resize((CROP, CROP), Image.Resampling.NEAREST)


def original_sample(split: FileSplit, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same sample as MiB's code makes it: float at once, and a Python call per pixel for the labels."""
    rng = sample_rng(0, 0, 0, split.id(index))
    with Image.open(split.image_path(index)) as opened:
        image = opened.convert("RGB")
    with Image.open(split.mask_path(index)) as opened:
        mask = opened.copy()
    top, left, h, w = random_resized_crop_params(*SIZE, scale=DATA.scale, rng=rng)
    box = left, top, left + w, top + h
    image = image.crop(box).resize((CROP, CROP), Image.Resampling.BILINEAR)
    mask = mask.crop(box).resize((CROP, CROP), Image.Resampling.NEAREST)
    if rng.random() < DATA.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    for channel, mean, deviation in zip(pixels, IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.sub_(mean).div_(deviation)
    label = torch.from_numpy(np.array(mask))
    return pixels, mapped_by_pixel(label)


def mapped_by_pixel(label: Tensor) -> Tensor:
    """The original's mapping of a mask, a Python call per pixel; `keep` is a list, as there."""
    order = {raw: train_id for raw, train_id in enumerate(TABLE.tolist()) if train_id != 255}
    keep = [*order, 255]
    order[255] = 255
    return label.apply_(lambda raw: order[raw] if raw in keep else 0)


class Raw:
    """The samples of a split from files of raw pixels, as a packed cache would give them."""

    def __init__(self, split: FileSplit) -> None:
        self.name, self._split = split.name, split
        self._files = []
        for index in range(len(split)):
            image, mask = split.read(index)
            path = split.image_path(index).with_suffix(".raw")
            path.write_bytes(image.tobytes() + mask.tobytes())
            self._files.append((path, mask.shape))

    def __len__(self) -> int:
        return len(self._split)

    def id(self, index: int) -> str:
        return self._split.id(index)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        path, shape = self._files[index]
        data = np.fromfile(path, np.uint8)
        pixels = shape[0] * shape[1]
        return data[: 3 * pixels].reshape(*shape, 3), data[3 * pixels :].reshape(shape)

    def read_mask(self, index: int) -> np.ndarray:
        return self.read(index)[1]

    def fingerprint(self) -> str:
        return self._split.fingerprint()


class Decoded:
    """The samples of a split, the picture decoded by a library of JPEG alone; the mask as the split reads it."""

    def __init__(self, split: FileSplit, decode: Callable[[bytes], np.ndarray]) -> None:
        self.name, self._split, self._decode = split.name, split, decode

    def __len__(self) -> int:
        return len(self._split)

    def id(self, index: int) -> str:
        return self._split.id(index)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = self._decode(self._split.image_path(index).read_bytes())
        return image, self._split.read_mask(index)

    def read_mask(self, index: int) -> np.ndarray:
        return self._split.read_mask(index)

    def fingerprint(self) -> str:
        return self._split.fingerprint()


def decoder_figures(split: FileSplit, repeat: int) -> list[Figure]:
    """What other decoders of JPEG, where they are installed, gain for a whole training sample."""

    def sample_of(source: object) -> Callable[[int], object]:
        samples = Samples([View(source, np.arange(len(split)), TABLE)], DATA, 0, 0)  # type: ignore[arg-type]
        return lambda index: samples[0, index]

    decoders = dict(_decoders())
    ways = {"Pillow": sample_of(split)} | {
        name: sample_of(Decoded(split, decode)) for name, decode in decoders.items()
    }
    best = least(ways, len(split), repeat)
    found = []
    for name, decode in decoders.items():
        ours, theirs = split.read(0)[0], decode(split.image_path(0).read_bytes())
        apart = int(np.abs(ours.astype(int) - theirs.astype(int)).max())
        found.append(
            Figure("data", f"training sample, picture decoded by {name} instead of Pillow, times faster",
                   best["Pillow"] / best[name], "x", 1.2,
                   note=f"Pillow {1e3 * best['Pillow']:.2f} ms, {name} {1e3 * best[name]:.2f} ms; pixels at most "
                        f"{apart} apart")
        )  # fmt: skip
    return found


def _decoders() -> Iterator[tuple[str, Callable[[bytes], np.ndarray]]]:
    """Decoders of JPEG that are installed."""
    with suppress(ImportError):
        import simplejpeg

        yield "simplejpeg", simplejpeg.decode_jpeg
    with suppress(ImportError):
        from torchvision.io import ImageReadMode, decode_jpeg

        def decode(data: bytes) -> np.ndarray:
            given = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(given, mode=ImageReadMode.RGB).permute(1, 2, 0).contiguous().numpy()

        yield "torchvision", decode


def augmentation_figures(split: FileSplit, repeat: int) -> list[Figure]:
    """What each augmentation adds to a training sample, over the plain sample's time."""
    views = [View(split, np.arange(len(split)), TABLE)]
    settings: dict[str, dict[str, object]] = {
        "plain": {},
        "brightness": {"brightness": (0.6, 1.4)},
        "contrast": {"contrast": (0.6, 1.4)},
        "saturation": {"saturation": (0.6, 1.4)},
        "hue": {"hue": (-0.05, 0.05)},
        "blur": {"blur": (1.0, 1.0)},
        "turns": {"vertical_flip": 0.5, "rotate": 0.5},
        "scale_range": {"scale_range": (0.5, 2.0)},
    }
    settings["all"] = {key: value for given in settings.values() for key, value in given.items()}
    ways = {
        name: Samples(views, DataConfig(**{**DATA.model_dump(), **given}), 0, 0)
        for name, given in settings.items()
    }
    best = least(
        {name: lambda index, samples=samples: samples[0, index] for name, samples in ways.items()},
        len(split),
        repeat,
    )
    parts = ", ".join(
        f"{name} {1e3 * (seconds - best['plain']):+.1f} ms"
        for name, seconds in best.items()
        if name not in ("plain", "all")
    )
    return [
        Figure(
            "data",
            "training sample with every augmentation, over the plain one",
            best["all"] / best["plain"],
            "x",
            note=parts,
        )
    ]


# ---------------------------------------------------------------- batches, index, loader


def batch_figures(split: FileSplit, repeat: int) -> list[Figure]:
    """What a batch of 24 adds per sample: stacking in the worker, normalising on the device (here the CPU)."""
    samples = Samples([View(split, np.arange(len(split)), TABLE)], DATA, 0, 0)
    batch = [samples[0, index % len(split)] for index in range(24)]
    loaded = collate(batch)
    assert not isinstance(loaded, Exception)
    seconds = in_turn(
        {
            "stack": lambda: collate(batch),
            "normalise": lambda: loaded.on(torch.device("cpu"), "imagenet"),
        },
        repeat,
    )
    return [
        Figure("data", f"{what}, per sample of a batch of 24", 1e3 * min(seconds[name]) / 24, "ms")
        for name, what in (("stack", "stacking"), ("normalise", "normalising on the CPU"))
    ]


def index_figure(split: FileSplit, folder: Path, count: int, repeat: int) -> Figure:
    """Speed of a class index without cache, over merely decoding the same masks times the number of cores."""
    (folder / "masks").mkdir(parents=True)
    names = []
    for number in range(count):
        name = f"masks/{number:05d}.png"
        (folder / name).write_bytes(split.mask_path(number % len(split)).read_bytes())
        names.append((f"{number:05d}", f"images/{number:05d}.jpg", name))

    def decode() -> None:
        for _, _, name in names:
            with Image.open(folder / name) as mask:
                np.asarray(mask)

    def index() -> None:
        with tempfile.TemporaryDirectory() as cache:
            class_counts(FileSplit("train", folder, names), LABELS, cache_dir=Path(cache))

    seconds = in_turn({"decode": decode, "index": index}, repeat)
    cores = available_cores()
    return Figure(
        "data",
        f"class index of {count} masks, cold, over one core's decoding times {cores} cores",
        ratio(seconds, "decode", "index") / cores,
        "x",
        1,
        note=medians(seconds),
    )


def loader_figures(split: FileSplit, iterations: int) -> list[Figure]:
    """Share of a step's time spent waiting for the loader, and what two workers give without a step."""
    view = View(split, np.arange(len(split)), TABLE)
    torch.manual_seed(0)
    model = deeplabv3_tiny()
    model.grow({"default": 16})
    model.train()

    def batches(count: int, batch: int) -> Timed:
        return Timed(train_batches([view], DATA, seed=0, step=0, batch=batch, start=0, stop=count))

    timed = batches(iterations + 3, 4)
    for number in range(iterations + 2):  # one batch is left: the loader's end, once a run, is no waiting
        if number == 2:  # the workers have started and filled their queues
            timed.seconds, start = 0.0, time.perf_counter()
        batch = next(timed).on(torch.device("cpu"), "imagenet")
        logits = model(batch.image, ("default",))["default"].logits
        logits = torch.nn.functional.interpolate(logits, batch.label.shape[-2:], mode="bilinear")
        torch.nn.functional.cross_entropy(logits, batch.label, ignore_index=255).backward()
    step = (time.perf_counter() - start) / iterations
    waited = timed.seconds / iterations
    free = batches(6 * iterations + 2, 8)
    next(free), next(free)
    start = time.perf_counter()
    images = sum(len(loaded.ids) for loaded in free)
    speed = images / (time.perf_counter() - start)
    return [
        Figure(
            "data",
            "time spent waiting for 2 workers, smallest network, batch 4, one thread",
            100 * waited / step,
            "%",
            2,
            "lower",
            f"step {1e3 * step:.0f} ms, wait {1e3 * waited:.1f} ms",
        ),
        Figure(
            "data",
            "what 2 workers give without a step",
            speed,
            "images/s",
            note=f"on {available_cores()} cores",
        ),
    ]


@contextmanager
def _traced() -> Iterator[list[int]]:
    peak = [0]
    tracemalloc.start()
    try:
        yield peak
    finally:
        peak[0] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def plan_figure(split: FileSplit) -> Figure:
    """Memory of the plan of batches for a million iterations over that for ten."""
    view, peaks = View(split, np.arange(len(split)), TABLE), []
    data = DATA.model_copy(update={"workers": 0, "crop": 64})
    for stop in (10, 10, 1_000_000):  # the first time some things are made once
        with _traced() as peak:
            next(train_batches([view], data, seed=0, step=0, batch=4, start=0, stop=stop))
        peaks.append(peak[0])
    return Figure(
        "data",
        "memory of the first batch of 1 000 000 iterations over that of 10",
        peaks[2] / peaks[1],
        "x",
        1.1,
        "lower",
        f"{peaks[2] / 1e6:.1f} and {peaks[1] / 1e6:.1f} MB",
    )


if __name__ == "__main__":
    main(figures, argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]))
