"""The transforms against the original code's output and against their own rules."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from everseg.data.batches import transforms
from everseg.data.batches.transforms import (
    center_transform,
    flip_and_shift,
    normalise,
    random_resized_crop_params,
    resize_transform,
    sample_rng,
    train_transform,
    whole_transform,
)

SCALE = (0.5, 2.0)


def _picture(height: int = 30, width: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return (
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        rng.choice(np.array([0, 1, 7, 255], np.uint8), (height, width)),
    )


@pytest.mark.golden
def test_crop_boxes_and_random_stream_equal_the_original(golden: Path) -> None:
    cases = json.loads((golden / "scenario.json").read_text())["random_resized_crop_params"]
    assert len(cases) == 30
    for case in cases:
        rng = random.Random(case["seed"])
        box = random_resized_crop_params(case["w"], case["h"], scale=SCALE, rng=rng)
        assert (*box, rng.random()) == (case["i"], case["j"], case["hh"], case["ww"], case["next_random"])


@pytest.mark.golden
@pytest.mark.parametrize("seed", [0, 1, 5, 42])
def test_training_sample_equals_the_original(golden: Path, seed: int) -> None:
    stored = np.load(golden / "mib_transforms.npz")
    x, y = train_transform(
        stored["img"], stored["lbl"], crop=48, scale=SCALE, flip=0.5, rng=random.Random(seed)
    )
    np.testing.assert_array_equal(y, stored[f"train_seed{seed}/lbl"])
    np.testing.assert_array_equal(normalise(torch.from_numpy(x)).numpy(), stored[f"train_seed{seed}/img"])


@pytest.mark.golden
def test_validation_sample_equals_the_original(golden: Path) -> None:
    stored = np.load(golden / "mib_transforms.npz")
    x, y = center_transform(stored["img"], stored["lbl"], crop=48)
    np.testing.assert_array_equal(y, stored["val/lbl"])
    np.testing.assert_array_equal(normalise(torch.from_numpy(x)).numpy(), stored["val/img"])
    x, y = whole_transform(stored["img"], stored["lbl"])
    np.testing.assert_array_equal(y, stored["nocrop/lbl"])
    total = normalise(torch.from_numpy(x)).double().sum().item()
    assert total == pytest.approx(float(stored["nocrop/img_sum"]), rel=1e-6)


@pytest.mark.golden
def test_mdil_training_samples_equal_the_original(golden: Path) -> None:
    stored = np.load(golden / "mdil_transforms.npz")
    seeds = sorted(int(name[4:].split("/")[0]) for name in stored if name.endswith("/y") and name[0] == "s")
    assert len(seeds) == 10
    for seed in seeds:
        x, y = resize_transform(stored["img"], stored["label"], size=(32, 64))
        x, y = flip_and_shift(x, y, flip=0.5, shift=2, fill="authors", rng=random.Random(seed))
        np.testing.assert_array_equal(x, stored[f"seed{seed}/x_u8"])
        np.testing.assert_array_equal(np.where(y == 255, 19, y), stored[f"seed{seed}/y"][0])


@pytest.mark.golden
def test_mdil_validation_sample_equals_the_original(golden: Path) -> None:
    stored = np.load(golden / "mdil_transforms.npz")
    x, y = resize_transform(stored["img"], stored["label"], size=(32, 64))
    np.testing.assert_array_equal(x, stored["val/x_u8"])
    np.testing.assert_array_equal(np.where(y == 255, 19, y), stored["val/y"][0])


def test_sample_stream_is_the_same_in_another_process() -> None:
    code = (
        "from everseg.data.batches.transforms import sample_rng; "
        "print([sample_rng(3, 1, 2, 'a/ä').random() for _ in range(2)])"
    )
    text = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": "src", "PYTHONHASHSEED": "77"},
        cwd=Path(__file__).resolve().parents[2],
    ).stdout
    assert text.strip() == str([sample_rng(3, 1, 2, "a/ä").random()] * 2)


def test_sample_stream_differs_by_every_part_of_its_key() -> None:
    keys = [(0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b"), (0, 1, 1, "a"),
            (0, 0, 11, "a"), (0, 0, 1, "1a")]  # fmt: skip
    assert len({sample_rng(*key).random() for key in keys}) == len(keys)


def test_box_area_and_aspect_stay_in_range() -> None:
    rng = random.Random(0)
    for _ in range(500):
        top, left, h, w = random_resized_crop_params(400, 300, scale=(0.3, 0.6), rng=rng)
        assert 0 <= top <= 300 - h
        assert 0 <= left <= 400 - w
        assert 0.29 < h * w / 120_000 < 0.61
        assert 0.74 < w / h < 1.35


def test_fallback_is_the_centred_box_of_the_nearest_aspect() -> None:
    wide = random_resized_crop_params(900, 90, scale=(3.0, 4.0), rng=random.Random(0))
    assert wide == (0, 390, 90, 120)
    tall = random_resized_crop_params(90, 900, scale=(3.0, 4.0), rng=random.Random(0))
    assert tall == (390, 0, 120, 90)
    assert random_resized_crop_params(100, 90, scale=(3.0, 4.0), rng=random.Random(0)) == (0, 0, 90, 100)


def test_flip_mirrors_image_and_label_together() -> None:
    image, label = _picture()
    plain = train_transform(image, label, crop=16, scale=SCALE, flip=0.0, rng=random.Random(4))
    flipped = train_transform(image, label, crop=16, scale=SCALE, flip=1.0, rng=random.Random(4))
    np.testing.assert_array_equal(flipped[0], plain[0][:, :, ::-1])
    np.testing.assert_array_equal(flipped[1], plain[1][:, ::-1])
    assert not np.array_equal(flipped[1], plain[1])


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (7, 7), (300, 20)])
@pytest.mark.parametrize("crop", [8, 33])
def test_any_size_gives_squares_without_new_ids(size: tuple[int, int], crop: int) -> None:
    image, label = _picture(*size)
    for x, y in (
        train_transform(image, label, crop=crop, scale=SCALE, flip=0.5, rng=random.Random(1)),
        center_transform(image, label, crop=crop),
    ):
        assert x.shape == (3, crop, crop)
        assert y.shape == (crop, crop)
        assert x.dtype == y.dtype == np.uint8
        assert x.flags.c_contiguous
        assert y.flags.c_contiguous
        assert set(np.unique(y)) <= set(np.unique(label))


@pytest.mark.parametrize("size", [(8, 20), (33, 9), (30, 40)])
def test_resize_gives_exactly_the_size_without_new_ids(size: tuple[int, int]) -> None:
    image, label = _picture()
    x, y = resize_transform(image, label, size=size)
    assert x.shape == (3, *size)
    assert y.shape == size
    assert x.flags.c_contiguous
    assert y.flags.c_contiguous
    assert set(np.unique(y)) <= set(np.unique(label))
    if size == label.shape:
        np.testing.assert_array_equal(x, image.transpose(2, 0, 1))
        np.testing.assert_array_equal(y, label)


def _moved(label: np.ndarray, right: int, down: int, fill: str) -> np.ndarray:
    """Pixel by pixel: where it comes from, and what stands where nothing comes from."""
    height, width = label.shape
    out = np.zeros_like(label)
    for row, column in np.ndindex(height, width):
        r, c = row - down, column - right
        if 0 <= r < height and 0 <= c < width:
            out[row, column] = label[r, c]
        else:
            beyond = r >= height or c >= width
            out[row, column] = 0 if fill == "authors" and beyond else 255
    return out


@pytest.mark.parametrize("fill", ["void", "authors"])
@pytest.mark.parametrize("shift", [0, 2, 9])  # 9: more than the picture is high
def test_every_move_equals_the_move_pixel_by_pixel(fill: str, shift: int) -> None:
    rng = np.random.default_rng(5)
    image, label = rng.integers(1, 256, (3, 6, 11), np.uint8), rng.integers(1, 9, (6, 11), np.uint8)
    met = set()
    for seed in range(120):
        draws = random.Random(seed)
        flipped = draws.random() < 0.5
        right, down = draws.randint(-shift, shift), draws.randint(-shift, shift)
        met.add((flipped, right, down))
        stream = random.Random(seed)
        x, y = flip_and_shift(image, label, flip=0.5, shift=shift, fill=fill, rng=stream)
        source = label[:, ::-1] if flipped else label
        np.testing.assert_array_equal(y, _moved(source, right, down, fill))
        for channel, plane in enumerate(image):
            expected = _moved(plane[:, ::-1] if flipped else plane, right, down, "void")
            outside = _moved(np.full_like(label, 7), right, down, "void") == 255
            np.testing.assert_array_equal(x[channel], np.where(outside, 0, expected))
        assert stream.random() == draws.random(), "the stream goes on where the original's does"
    assert {right for _, right, _ in met} == {down for _, _, down in met} == set(range(-shift, shift + 1))


def test_moves_of_zero_and_no_flip_change_nothing_and_leave_the_input_alone() -> None:
    image, label = _picture()
    x, y = resize_transform(image, label, size=(30, 40))
    before = x.copy(), y.copy()
    same = flip_and_shift(x, y, flip=0.0, shift=0, fill="void", rng=random.Random(0))
    np.testing.assert_array_equal(same[0], x)
    np.testing.assert_array_equal(same[1], y)
    moved = flip_and_shift(x, y, flip=1.0, shift=2, fill="authors", rng=random.Random(0))
    assert moved[0].flags.c_contiguous
    assert moved[1].flags.c_contiguous
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


def test_centre_of_an_image_of_the_right_height_is_cut_unchanged() -> None:
    image, label = _picture(30, 41)
    x, y = center_transform(image, label, crop=30)
    np.testing.assert_array_equal(y, label[:, 6:36])  # (41 - 30) / 2 = 5.5, rounded to even
    np.testing.assert_array_equal(x, image[:, 6:36].transpose(2, 0, 1))


def test_normalise_gives_the_standard_values() -> None:
    x = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(normalise(x).flatten(), expected)
    assert x.flatten().tolist() == [0, 255, 51]


def test_a_trace_leaves_normalise_as_it_was() -> None:
    class Network(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return normalise(image)

    transforms._mean_and_deviation.cache_clear()
    x = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    torch.export.export(Network(), (x,))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transforms.IMAGENET_MEAN, transforms.IMAGENET_STD))
    found = normalise(x)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, (x / 255 - mean) / std)


def test_normalise_to_the_unit_range_only_divides() -> None:
    x = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(normalise(x, "unit").flatten(), torch.tensor([0.0, 1.0, 0.2]))
    assert x.flatten().tolist() == [0, 255, 51]


def _by_pillow(image: np.ndarray, label: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    shape = size[1], size[0]
    x = Image.fromarray(np.ascontiguousarray(image)).resize(shape, Image.Resampling.BILINEAR)
    y = Image.fromarray(np.ascontiguousarray(label)).resize(shape, Image.Resampling.NEAREST)
    return np.asarray(x).transpose(2, 0, 1), np.asarray(y)


@pytest.mark.parametrize(
    "size", [(512, 512), (256, 64), (32, 1024), (8, 8), (513, 512), (500, 500), (7, 300)]
)
def test_every_size_is_resized_as_pillow_does_to_the_bit(size: tuple[int, int]) -> None:
    """Noise, from one pixel to larger than the result: powers of two go through another code than the rest."""
    rng = np.random.default_rng(sum(size))
    for height, width in ((1, 1), (2, 3), (333, 499), (375, 500), (512, 64), (5, 512), (90, 7), (600, 700)):
        image, label = _picture(height, width)
        image = rng.permutation(image.reshape(-1)).reshape(image.shape)
        image.setflags(write=False)  # as decoded pictures are
        for ours, theirs in zip(
            resize_transform(image, label, size=size), _by_pillow(image, label, size), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_torch_resizes_where_its_weights_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would pass without it; and torch's own rounding is not Pillow's elsewhere."""
    image, label = _picture(375, 500)
    used = []
    monkeypatch.setattr(transforms.F, "interpolate", lambda *_, **__: used.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resize_transform(image, label, size=(512, 512))
    for size in ((500, 600), (256, 256), (512, 600), (2**14, 2**14)):
        if size[0] < 2**14:
            resize_transform(image, label, size=size)
        else:
            assert not transforms._weights_are_exact(375, size[0])
    assert used == [1]


def test_the_table_gives_what_it_gives_on_the_result() -> None:
    image, label = _picture()
    table = np.random.default_rng(1).permutation(256).astype(np.uint8)
    for seed in range(6):
        x, y = train_transform(image, label, crop=32, scale=SCALE, flip=0.5, rng=random.Random(seed))
        with_table = train_transform(
            image, label, crop=32, scale=SCALE, flip=0.5, rng=random.Random(seed), table=table
        )
        np.testing.assert_array_equal(with_table[0], x)
        np.testing.assert_array_equal(with_table[1], table[y])
        assert with_table[1].flags.c_contiguous
