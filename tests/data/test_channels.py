"""Images of stated channels: what a data.yaml may say, the files that are read, and what becomes of them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from safetensors.torch import save_file

from everseg.data.batches.transforms import normalise, resize_transform
from everseg.data.channels import Channels, channels_of
from everseg.data.datasets import tiles
from everseg.data.datasets.decode import Reading, read_bands, read_image
from everseg.data.datasets.files import FileSplit
from everseg.data.datasets.folder import build
from everseg.errors import ConfigError, DataError
from everseg.models.build import deeplabv3_tiny
from everseg.models.pretrained import load_encoder_weights
from saying import must_say


def _channels(**given: Any) -> Channels:
    channels, problems = channels_of(given)
    assert channels is not None, problems
    return channels


def tiff(
    image: np.ndarray, *, order: str = "<", planar: bool = False, deflate: bool = False, rows: int = 5
) -> bytes:
    """Write a TIFF by the specification (TIFF 6.0): strips of some rows, interleaved or band after band."""
    height, width, bands = image.shape
    stored = image.astype(image.dtype.newbyteorder(order))
    planes = [stored[:, :, band] for band in range(bands)] if planar else [stored]
    strips = [plane[top : top + rows].tobytes() for plane in planes for top in range(0, height, rows)]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    bits, form = image.dtype.itemsize * 8, {"u": 1, "i": 2, "f": 3}[image.dtype.kind]
    places = list(np.cumsum([8, *map(len, strips)]))
    tags: list[tuple[int, int, list[int]]] = [
        (256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * bands), (259, 3, [8 if deflate else 1]),
        (262, 3, [1]), (273, 4, places[:-1]), (277, 3, [bands]), (278, 4, [rows]), (279, 4, [len(s) for s in strips]),
        (284, 3, [2 if planar else 1]), (339, 3, [form] * bands),
    ]  # fmt: skip
    start = places[-1]
    behind = start + 2 + 12 * len(tags) + 4
    directory, far = struct.pack(f"{order}H", len(tags)), b""
    for tag, kind, values in tags:
        data = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'L'}", *values)
        place = data.ljust(4, b"\0")
        if len(data) > 4:
            place, far = struct.pack(f"{order}L", behind + len(far)), far + data
        directory += struct.pack(f"{order}HHL", tag, kind, len(values)) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", start)
    return head + b"".join(strips) + directory + struct.pack(f"{order}L", 0) + far


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_band_of_a_tiff_is_read(kind: str, planar: bool, deflate: bool, order: str) -> None:
    image = (np.random.default_rng(0).random((13, 7, 5)) * 250).astype(kind)
    file = io.BytesIO(tiff(image, planar=planar, deflate=deflate, order=order))
    found = read_bands(file, "a.tif", Reading())
    assert found.dtype == image.dtype
    np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "tiff_adobe_deflate"}, {"tiffinfo": {317: 2}, "compression": "tiff_deflate"}],
)
def test_tiffs_of_pillow_are_read_as_pillow_reads_them(options: dict[str, Any]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (33, 21, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image, "RGBA").save(file, "TIFF", **options)
    file.seek(0)
    np.testing.assert_array_equal(read_bands(file, "a.tif", Reading()), image)


def test_damaged_files_are_told_as_such() -> None:
    image = np.random.default_rng(0).integers(0, 60000, (40, 30, 5)).astype(np.uint16)
    npy = io.BytesIO()
    np.save(npy, image)
    for data in (tiff(image), tiff(image, deflate=True), npy.getvalue()):
        for cut in (3, 20, len(data) // 2, len(data) - 2):
            with pytest.raises(DataError) as caught:
                read_bands(io.BytesIO(data[:cut]), "a.tif", Reading())
            must_say(caught.value, "a.tif", *(["damaged"] if cut > 3 else []))


@pytest.mark.parametrize(("kinds", "several"), [((0, 1, 4), False), ((0, 0), True), ((0, 1, 0), True)])
def test_a_page_behind_an_overview_is_not_dropped(kinds: tuple[int, ...], several: bool) -> None:
    file = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(file, True) as writer:
        for number, kind in enumerate(kinds):
            Image.new("RGB", (8, 6), (number, 0, 0)).save(writer, "TIFF", tiffinfo={254: kind})
            writer.newFrame()
    file.seek(0)
    if several:
        with pytest.raises(DataError, match="pages"):
            read_bands(file, "a.tif", Reading())
    else:
        assert read_bands(file, "a.tif", Reading()).shape == (6, 8, 3)


def test_a_tiff_too_large_or_of_another_compression_is_refused() -> None:
    image = np.zeros((40, 30, 5), np.uint8)
    with pytest.raises(DataError) as caught:
        read_bands(io.BytesIO(tiff(image)), "a.tif", Reading(max_pixels=1000))
    must_say(caught.value, "30x40", 1000)
    with pytest.raises(DataError) as caught:
        read_bands(
            io.BytesIO(tiff(image).replace(struct.pack("<HHLL", 259, 3, 1, 1), struct.pack("<HHLL", 259, 3, 1, 5))),
            "a.tif", Reading(),
        )  # fmt: skip
    must_say(caught.value, "compression 5", "deflate")


@pytest.mark.parametrize(
    ("shape", "fact"), [((10**6, 10**6, 5), "1000000x1000000"), ((1, 1, 10**12), "header says")]
)
def test_a_huge_npy_header_takes_no_memory(shape: tuple[int, ...], fact: str) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})
    file.seek(0)
    with pytest.raises(DataError) as caught:
        read_bands(file, "a.npy", Reading())
    must_say(caught.value, fact)


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({}, ["channels.count"]),
        ({"count": 0}, ["channels.count", 0]),
        ({"names": ["a", "a"]}, ["channels.names"]),
        ({"count": 3, "names": ["a"]}, ["channels.count", 1]),
        ({"count": 2, "bits": 12}, ["channels.bits", 12]),
        ({"count": 2, "mean": 3}, ["channels", "std"]),
        ({"count": 2, "mean": [1, 2, 3], "std": [1, 1]}, ["channels.mean", 2]),
        ({"count": 2, "mean": 0, "std": 0}, ["channels.std"]),
        ({"count": 2, "bits": 32}, ["channels.range"]),
        ({"count": 2, "range": [5, 5]}, ["channels.range"]),
        ({"count": 2, "shown": ["x"]}, ["channels.shown"]),
        ({"count": 2, "folders": ["../x"]}, ["channels.folders"]),
        ({"count": 2, "name": ["a"]}, ["channels.name", "names"]),
        ("five", ["channels", "five"]),
    ],
)
def test_faults_of_the_statement_are_named(given: Any, facts: list[Any]) -> None:
    channels, problems = channels_of(given)
    assert channels is None
    must_say(problems, *facts)


def test_the_statement_survives_the_model_file() -> None:
    channels = _channels(
        names=["a", "b"], bits=16, range=[[0, 9], [1, 7]], mean=[1, 2], std=[3, 4], shown=["b"]
    )
    assert channels_of(channels.to_json()) == (channels, [])


def test_the_network_sees_value_minus_mean_over_deviation() -> None:
    image = torch.tensor([[[0.0, 20000.0]], [[5.0, 65535.0]]])
    stated = normalise(image, "imagenet", _channels(count=2, bits=16, mean=[10000, 5], std=[2000, 4]))
    torch.testing.assert_close(stated, torch.tensor([[[-5.0, 5.0]], [[0.0, 16382.5]]]))
    ranged = normalise(image, "imagenet", _channels(count=2, bits=16, range=[[0, 40000], [5, 15]]))
    torch.testing.assert_close(ranged[:, 0, 1], torch.tensor([0.5, 6553.0]))
    assert image[0, 0, 1] == 20000, "the raw values stay"


def test_deep_channels_are_resized_without_loss_of_depth() -> None:
    image = np.full((8, 8, 2), 40001, np.float32)
    image[..., 1] = 3
    x, _ = resize_transform(image, np.zeros((8, 8), np.uint8), size=(5, 12))
    np.testing.assert_allclose(x[0], 40001)
    np.testing.assert_allclose(x[1], 3)


def test_values_that_the_stated_bits_do_not_hold_are_refused(tmp_path: Path) -> None:
    reading = Reading(follow_links=True, channels=_channels(count=1))
    np.save(tmp_path / "deep.npy", np.zeros((4, 4), np.uint16))
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "deep.npy", reading)
    must_say(caught.value, "deep.npy", "uint16", "channels.bits")
    np.save(tmp_path / "nan.npy", np.full((4, 4), np.nan, np.float32))
    with pytest.raises(DataError) as caught:
        read_image(
            tmp_path / "nan.npy",
            Reading(follow_links=True, channels=_channels(count=1, bits=32, range=[0, 1])),
        )
    must_say(caught.value, "nan.npy", "NaN")


@pytest.mark.parametrize("listed", [False, True])
def test_a_sample_of_several_files_joins_them_in_order(tmp_path: Path, listed: bool) -> None:
    rng = np.random.default_rng(0)
    for folder in ("images/train", "masks/train", "nir/train", "depth/train"):
        (tmp_path / folder).mkdir(parents=True)
    rgb, nir, depth = (rng.integers(0, high, (2, 6, 9, n)) for high, n in ((256, 3), (256, 1), (60000, 2)))
    for i in range(2):
        Image.fromarray(rgb[i].astype(np.uint8)).save(tmp_path / f"images/train/{i}.png")
        Image.fromarray(nir[i, :, :, 0].astype(np.uint8)).save(tmp_path / f"nir/train/{i}.png")
        (tmp_path / f"depth/train/{i}.tif").write_bytes(tiff(depth[i].astype(np.uint16)))
        Image.fromarray(np.zeros((6, 9), np.uint8)).save(tmp_path / f"masks/train/{i}.png")
    (tmp_path / "train.txt").write_text("1\n0\n")
    options: dict[str, Any] = {
        "classes": ["background", "roof"],
        "channels": {"count": 6, "bits": 16, "folders": ["nir/{split}", "depth/{split}"]},
        "splits": {"train": "train.txt"} if listed else ["train"],
    }
    split = build(tmp_path, **options).splits["train"]
    for index in range(2):
        i = int(split.id(index))
        image, mask = split.read(index)
        np.testing.assert_array_equal(image, np.concatenate([rgb[i], nir[i], depth[i]], axis=2))
        assert image.dtype == np.float32
        assert mask.shape == (6, 9)
    (tmp_path / "nir/train/1.png").unlink()
    with pytest.raises(DataError) as caught:
        build(tmp_path, **options)
    must_say(caught.value, "channels.folders", "nir/{split}: 1")
    options["channels"] = {"count": 6, "bit": 16}
    with pytest.raises(ConfigError) as caught_again:
        build(tmp_path, **options)
    must_say(caught_again.value, "data.options.channels.bit", "bits")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_rgb_weights_become_weights_of_n_channels_by_the_stated_rule(tmp_path: Path, count: int) -> None:
    torch.manual_seed(0)
    rgb, model = deeplabv3_tiny(), deeplabv3_tiny(in_channels=count)
    save_file(rgb.encoder.state_dict(), tmp_path / "w.safetensors")
    load_encoder_weights(model, str(tmp_path / "w.safetensors"))
    before, after = rgb.encoder.conv1.weight, model.encoder.conv1.weight
    assert after.shape[1] == count
    for channel in range(count):
        expected = before.sum(1) if count == 1 else before[:, channel % 3] * 3 / count
        torch.testing.assert_close(after[:, channel], expected)
    # A grey image on all channels gets the same response where N is a multiple of 3, or 1.
    if count == 1:
        torch.testing.assert_close(after.sum(1), before.sum(1))
    assert model.describe()["options"]["in_channels"] == count
    assert "in_channels" not in rgb.describe()["options"], "descriptions of other networks stay as they were"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", ["rgb", "deep"])
def test_windows_keep_the_types_of_image_and_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kept: bool
) -> None:
    monkeypatch.setattr(tiles, "KEEP", 1 if kept else 2**40)
    monkeypatch.setattr(tiles, "default_cache_dir", lambda: tmp_path / "cache")
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 900, (40, 40)).astype(np.uint16)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8 if kind == "rgb" else np.uint16)
    if kind == "rgb":
        Image.fromarray(image).save(tmp_path / "image.png")
    else:
        np.save(tmp_path / "image.npy", image)
    reading = Reading(channels=None if kind == "rgb" else _channels(count=3, bits=16))
    name = "image.png" if kind == "rgb" else "image.npy"
    whole = FileSplit("train", tmp_path, [("a", name, "mask.png")], reading=reading, most=65535)
    split = tiles.TiledSplit(whole, tiles.Tiles(16, 0), reading)
    for _ in range(2):  # a kept picture is mapped the second time
        window, ids = split.read(0)
        np.testing.assert_array_equal(window, image[:16, :16])
        np.testing.assert_array_equal(ids, mask[:16, :16])
        assert (window.dtype, ids.dtype) == (np.uint8 if kind == "rgb" else np.float32, np.uint16)
    assert len(list(tmp_path.glob("cache/tiles/*.npy"))) == kept
