"""The augmentations against independent oracles: colorsys, numpy's turns, whole resized images, a sum by hand."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from everseg.config.fields import DataConfig
from everseg.config.loading import load
from everseg.data.batches.augmentation import (
    appearance,
    blur,
    contrast,
    hue,
    own_stream,
    padded,
    saturation,
    scaled_crop,
    turned,
)
from everseg.data.batches.loader import train_batches
from everseg.data.batches.samples import Samples, View
from everseg.errors import ConfigError
from saying import must_say

TABLE = np.arange(256, dtype=np.uint8)
ALL: dict[str, Any] = {
    "vertical_flip": 0.5, "rotate": 0.5, "brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.5, 1.5),
    "hue": (-0.2, 0.2), "blur": (0.0, 2.0), "scale_range": (0.4, 1.6),
}  # fmt: skip


@dataclass
class Pictures:
    """Pictures whose label is made of their pixels: id = red // 32."""

    count: int = 6
    size: tuple[int, int] = (40, 56)
    name: str = "train"

    def __len__(self) -> int:
        return self.count

    def id(self, index: int) -> str:
        return f"p{index}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        blocks = rng.integers(0, 8, (-(-self.size[0] // 8), -(-self.size[1] // 8)), dtype=np.uint8)
        label = np.kron(blocks, np.ones((8, 8), np.uint8))[: self.size[0], : self.size[1]]
        image = np.stack([label * 32, label * 16 + 50, 255 - label * 20], axis=2)
        return image, label

    def read_mask(self, index: int) -> np.ndarray:
        return self.read(index)[1]

    def fingerprint(self) -> str:
        return "0"


def _samples(**settings: Any) -> Samples:
    data = DataConfig(**{"crop": 32, "workers": 0, **settings})
    pictures = Pictures()
    return Samples([View(pictures, np.arange(len(pictures)), TABLE)], data, 3, 1)


def _colours(count: int = 400) -> np.ndarray:
    """(3, 1, count) float32: noise, greys, pure colours, black and white."""
    rng = np.random.default_rng(0)
    special = [
        [0, 0, 0],
        [255, 255, 255],
        [7, 7, 7],
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [255, 255, 0],
        [9, 200, 200],
    ]
    values = np.concatenate([rng.integers(0, 256, (count, 3)), special])
    return values.T[:, None].astype(np.float32)


@pytest.mark.parametrize("turn", [-0.5, -0.21, 0.0, 0.05, 1 / 3, 0.5])
def test_hue_equals_colorsys(turn: float) -> None:
    image = _colours()
    found = hue(image, turn)
    for pixel, ours in zip(image[:, 0].T.tolist(), found[:, 0].T, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in pixel))
        np.testing.assert_allclose(
            ours / 255, colorsys.hsv_to_rgb((h + turn) % 1, s, v), atol=2e-6, err_msg=str(pixel)
        )


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.8])
def test_brightness_contrast_and_saturation_equal_pillow(factor: float) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture, image = Image.fromarray(pixels), pixels.transpose(2, 0, 1)
    for key, enhance in (
        ("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ):  # fmt: skip
        data = DataConfig(**{key: (factor, factor)})
        ours = appearance(image, data, own_stream(0, 0, 0, "a")).astype(int)
        theirs = np.asarray(enhance(picture).enhance(factor)).transpose(2, 0, 1).astype(int)
        # Pillow rounds the grey to whole numbers, and cuts off instead of rounding.
        assert np.abs(ours - theirs).max() <= 2, key


def test_contrast_of_other_images_is_about_each_channels_own_mean() -> None:
    image = np.random.default_rng(1).random((5, 6, 7)).astype(np.float32) * 1000
    found = contrast(image, 0.25)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), image.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.std(axis=(1, 2)), image.std(axis=(1, 2)) / 4, rtol=1e-5)


def test_saturation_of_zero_is_grey_and_of_one_nothing() -> None:
    image = _colours()
    plain = saturation(image, 0.0)
    np.testing.assert_array_equal(plain[0], plain[1])
    np.testing.assert_array_equal(plain[0], plain[2])
    np.testing.assert_allclose(saturation(image, 1.0), image, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
def test_blur_equals_the_sum_by_hand(sigma: float) -> None:
    image = np.random.default_rng(2).random((2, 9, 5)).astype(np.float32)
    radius = int(np.ceil(3 * sigma))
    places = np.arange(-radius, radius + 1)
    kernel = np.exp(-(places[:, None] ** 2 + places[None] ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    around = np.pad(image, [(0, 0), (radius, radius), (radius, radius)], mode="symmetric")
    expected = np.zeros_like(image)
    for row, column in np.ndindex(9, 5):
        window = around[:, row : row + 2 * radius + 1, column : column + 2 * radius + 1]
        expected[:, row, column] = (window * kernel).sum(axis=(1, 2))
    np.testing.assert_allclose(blur(image, sigma), expected, atol=1e-6)


@pytest.mark.parametrize("key", ["brightness", "contrast", "saturation", "hue", "blur"])
def test_neutral_ranges_change_nothing_and_extremes_stay_bytes(key: str) -> None:
    image = _colours().astype(np.uint8)
    neutral = 0.0 if key in ("hue", "blur") else 1.0
    stream = own_stream(0, 0, 0, "a")
    np.testing.assert_array_equal(appearance(image, DataConfig(**{key: (neutral, neutral)}), stream), image)
    for extreme in {"hue": (-0.5, 0.5), "blur": (64.0,)}.get(key, (0.0, 1e9)):
        found = appearance(image, DataConfig(**{key: (extreme, extreme)}), stream)
        assert found.dtype == np.uint8
        assert found.shape == image.shape
    assert appearance(image, DataConfig(), stream) is image


def test_right_angles_are_numpys_and_all_of_them_happen() -> None:
    image, label = Pictures(size=(16, 16)).read(0)
    image = image.transpose(2, 0, 1)
    met = set()
    for number in range(40):
        x, y = turned(image, label, DataConfig(rotate=1.0), own_stream(number, 0, 0, "a"))
        quarters = next(k for k in range(4) if np.array_equal(y, np.rot90(label, k)))
        met.add(quarters)
        for ours, plane in zip(x, image, strict=True):
            np.testing.assert_array_equal(ours, np.rot90(plane, quarters))
        assert x.flags.c_contiguous
        assert y.flags.c_contiguous
    assert met == {1, 2, 3}
    x, y = turned(image, label, DataConfig(vertical_flip=1.0), own_stream(0, 0, 0, "a"))
    np.testing.assert_array_equal(y, np.flipud(label))
    np.testing.assert_array_equal(x[1], np.flipud(image[1]))


@pytest.mark.parametrize("factor", [0.3, 0.77, 1.0, 2.0, 3.1])
def test_a_scaled_crop_is_cut_out_of_the_whole_resized_image(factor: float) -> None:
    image, label = Pictures().read(1)
    height, width = (round(side * factor) for side in label.shape)
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    ids = np.asarray(Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST))
    for seed in range(8):
        stream = own_stream(seed, 0, 0, "a")
        draws = stream("scale_range")
        draws.uniform(factor, factor)
        top, left = draws.randint(0, max(0, height - 24)), draws.randint(0, max(0, width - 24))
        x, y = scaled_crop(image, label, crop=24, scale_range=(factor, factor), stream=stream)
        box = slice(top, top + 24), slice(left, left + 24)
        np.testing.assert_array_equal(y, ids[box])
        inner = slice(2, -2)
        difference = x.astype(int)[:, inner, inner] - whole[box].transpose(2, 0, 1)[:, inner, inner]
        assert np.abs(difference).max() <= 1


def test_padding_is_black_ignored_and_beside_the_image_only() -> None:
    image, label = Pictures(size=(12, 20)).read(0)
    x, y = padded(image.transpose(2, 0, 1), label, crop=24)
    np.testing.assert_array_equal(y[:12, :20], label)
    assert (y[12:] == 255).all()
    assert (y[:, 20:] == 255).all()
    assert (x[:, 12:] == 0).all()
    assert (x[:, :, 20:] == 0).all()


@pytest.mark.parametrize("transform", ["crop", "resize"])
def test_the_label_follows_the_image_through_every_geometry(transform: str) -> None:
    settings = {key: ALL[key] for key in ("vertical_flip", "rotate", "scale_range")}
    if transform == "resize":
        del settings["scale_range"]
    samples = _samples(transform=transform, size=(32, 32), **settings)
    for epoch in range(8):
        for position in range(6):
            sample, _ = samples[epoch, position]
            inside = sample.label != 255
            right = np.abs(sample.image[0].astype(int) - sample.label * 32) <= 16
            # Pixels between two blocks hold a mixture of their colours.
            assert right[inside].mean() > 0.5, "an eighth by chance"
            assert (sample.image[:, ~inside] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (50, 1), (300, 20)])
def test_every_size_gives_full_squares(size: tuple[int, int]) -> None:
    pictures = Pictures()
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    label = np.zeros(size, np.uint8)
    pictures.read = lambda index: (image, label)  # type: ignore[method-assign]
    samples = Samples([View(pictures, np.arange(6), TABLE)], DataConfig(crop=32, **ALL), 0, 0)
    for epoch in range(5):
        sample, _ = samples[epoch, 0]
        assert sample.image.shape == (3, 32, 32)
        assert sample.label.shape == (32, 32)
        assert set(np.unique(sample.label)) <= {0, 255}


@pytest.mark.parametrize("key", sorted(ALL))
def test_switching_one_on_leaves_the_draws_of_the_others(key: str) -> None:
    """All but one, and all: what the one does is all that differs. Streams are compared, as pixels cannot be."""
    drawn: dict[str, list[float]] = {}
    for settings in (ALL, {name: value for name, value in ALL.items() if name != key}):
        data, stream = DataConfig(crop=32, **settings), own_stream(3, 1, 2, "p0")
        asked: dict[str, Any] = {}

        def recorded(name: str, stream: Any = stream, asked: Any = asked) -> Any:
            asked[name] = stream(name)
            return asked[name]

        image, label = Pictures().read(0)
        if data.scale_range is not None:
            scaled_crop(image, label, crop=32, scale_range=data.scale_range, stream=recorded)
        appearance(image.transpose(2, 0, 1), data, recorded)
        turned(image.transpose(2, 0, 1), label, data, recorded)
        assert asked.keys() == settings.keys()
        for name, rng in asked.items():
            drawn.setdefault(name, []).append(rng.random())
    assert all(len(set(values)) == 1 for values in drawn.values())
    assert len({values[0] for values in drawn.values()}) == len(drawn), "streams differ from each other"


def test_colours_leave_crop_flip_and_label_as_they_are() -> None:
    """The labels, and so crop and flip, are those of a run without any augmentation."""
    colours = {key: ALL[key] for key in ("brightness", "contrast", "saturation", "hue", "blur")}
    plain, coloured = _samples(), _samples(**colours)
    for position in range(6):
        np.testing.assert_array_equal(plain[4, position][0].label, coloured[4, position][0].label)
        assert not np.array_equal(plain[4, position][0].image, coloured[4, position][0].image)


def test_pixels_do_not_depend_on_workers_ranks_and_restarts() -> None:
    views = _samples().views

    def images(start: int, workers: int = 0, rank: int = 0, world: int = 1) -> list[np.ndarray]:
        data = DataConfig(crop=32, workers=workers, **ALL)
        batches = train_batches(
            views, data, seed=3, step=1, batch=2, start=start, stop=6, rank=rank, world=world
        )
        return [batch.image.numpy() for batch in batches]

    whole = images(0)
    for ours, theirs in zip(images(0, workers=2), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(images(4), whole[4:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for first, second, theirs in zip(images(0, 0, 0, 2), images(0, 0, 1, 2), whole, strict=True):
        np.testing.assert_array_equal(np.concatenate([first, second]), theirs)


@pytest.mark.parametrize(
    ("overrides", "key", "facts"),
    [
        (["data.hue=[0.1,-0.1]"], "data.hue", ["0.1", "-0.1"]),
        (["data.scale_range=[2,1]"], "data.scale_range", ["2", "1"]),
        (["data.transform=resize", "data.scale_range=[1,2]"], "data.scale_range", ["data.transform=crop"]),
        (["data.transform=resize", "data.rotate=1", "data.size=[32,64]"], "data.rotate", ["32x64"]),
        (["data.hue=[0,0.7]"], "data.hue", ["0.5"]),
    ],
)
def test_impossible_settings_are_refused(overrides: list[str], key: str, facts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load("demo-ft", overrides)
    must_say(str(caught.value), key, *facts)
