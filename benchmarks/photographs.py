"""Pictures like Pascal VOC's for the benchmarks: scenes drawn from a seed, written as JPEG and palette PNG.

An image is 500x375: shapes on a background, both textured with noise of a photograph's spectrum (amplitude 1/f) and a
little grain, saved at quality 92 (about 90 kB, as VOC's images are on average). Its mask holds the shapes' class ids,
1 to 20, with a void border (255), on background 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.voc import NAMES
from everseg.labels import RawLabels

SIZE = (500, 375)
LABELS = RawLabels(names=dict(enumerate(NAMES)), background=0, void=(255,))


def write_split(folder: Path, count: int, name: str = "train") -> FileSplit:
    """Write `count` images and masks below a folder; the same numbers on every machine."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    samples = []
    for index in range(count):
        image, mask = scene(index)
        paths = f"images/{index:05d}.jpg", f"masks/{index:05d}.png"
        image.save(folder / paths[0], quality=92)
        mask.save(folder / paths[1])
        samples.append((f"{index:05d}", *paths))
    return FileSplit(name, folder, samples)


def scene(seed: int, size: tuple[int, int] = SIZE) -> tuple[Image.Image, Image.Image]:
    """One image (RGB) and its mask (palette of ids); `size` is width and height, pixels."""
    rng = np.random.default_rng(seed)
    colours = Image.new("RGB", size, tuple(rng.integers(60, 200, 3).tolist()))
    mask = Image.new("P", size, 0)
    mask.putpalette(_palette())
    for _ in range(int(rng.integers(2, 6))):
        corners = _shape(rng, size)
        ImageDraw.Draw(colours).polygon(corners, fill=tuple(rng.integers(20, 235, 3).tolist()))
        ImageDraw.Draw(mask).polygon(corners, fill=int(rng.integers(1, 21)), outline=255, width=5)
    pixels = np.asarray(colours, np.float32) + _texture(rng, size)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), mask


def _shape(rng: np.random.Generator, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Corners of a blob: a circle whose radius varies."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    waves = sum(rng.normal(0, 0.25 / k) * np.sin(k * angles + rng.uniform(0, 6.28)) for k in range(1, 6))
    radius = rng.uniform(40, 150) * np.clip(1 + waves, 0.3, 2)
    x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
    return list(
        zip((x + radius * np.cos(angles)).tolist(), (y + radius * np.sin(angles)).tolist(), strict=True)
    )


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Noise (H, W, 3) with amplitude 1/f: bright and dark areas, edges and detail, alike in the channels."""
    width, height = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.normal(size=(height, width))) / frequency
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, s=(height, width))
    grain = rng.normal(0, 3, (height, width, 3))
    return (28 * noise / noise.std())[..., None] + grain


def _palette() -> list[int]:
    """VOC's colours: the bits of the id, spread over red, green and blue."""
    return [
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]
