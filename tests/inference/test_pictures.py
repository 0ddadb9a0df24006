from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import everseg
from everseg.data.class_colours import BACKGROUND_COLOUR, IGNORED_COLOUR, SAFE, colourise, overlay, palette
from everseg.errors import CheckpointError, DataError
from everseg.inference.pictures import confusion_picture, legend, shrink, triplet, write_prediction


def grey(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_palette_starts_with_a_dark_neutral_background_then_okabe_and_ito():
    colours = palette(8, background=0).astype(int)
    assert colours[0].max() < 64
    assert np.ptp(colours[0]) < 10
    expected = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0)]
    assert colours[1:7].tolist() == [list(colour) for colour in expected]


def test_a_class_keeps_its_colour_when_the_palette_grows():
    longest = palette(256, background=0)
    for n in (0, 1, 7, 21, 151):
        assert palette(n, background=0).shape == (n, 3)
        assert palette(n, background=0).dtype == np.uint8
        np.testing.assert_array_equal(palette(n, background=0), longest[:n])


def test_generated_colours_do_not_change_from_release_to_release():
    assert palette(12, background=0)[8:].tolist() == [
        [135, 0, 255],
        [150, 15, 105],
        [15, 0, 180],
        [90, 90, 30],
    ]


def test_no_two_of_256_colours_are_alike_and_the_ignored_colour_belongs_to_no_class():
    colours = palette(256, background=0)
    assert len(np.unique(colours, axis=0)) == 256
    assert tuple(colours[255]) == IGNORED_COLOUR


@pytest.mark.parametrize(("n", "least"), [(12, 60), (21, 40)])
def test_the_first_colours_are_far_apart_even_in_plain_rgb(n, least):
    colours = palette(n, background=0).astype(float)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 1e9 * np.eye(n)
    assert distance.min() > least


def test_red_and_green_of_equal_brightness_do_not_stand_for_two_of_the_first_classes():
    # Oracle independent of OKLab: Vienot, Brettel and Mollon (1999), a deuteranope's view of linear RGB.
    matrix = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    seen = ((palette(12, background=0) / 255.0) ** 2.2 @ matrix.T).clip(0, 1) ** (1 / 2.2)
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=2) + 1e9 * np.eye(12)
    assert distance.min() > 0.08


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB; typed again here, so that a wrong digit in the
# code under test would be seen.
MACHADO = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(linear):
    """CIE L*a*b* (D65) of linear RGB: a space of its own, while the palette was chosen in OKLab."""
    to_xyz = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
    xyz = linear @ np.array(to_xyz).T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def least_distances(colours):
    """Eyes -> the smallest distance of two colours in L*a*b*, for normal eyes and three kinds of colour blindness."""
    value = np.asarray(colours) / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    seen = {"normal": linear, **{eyes: (linear @ np.array(m).T).clip(0, 1) for eyes, m in MACHADO.items()}}
    far = 1e9 * np.eye(len(value))
    return {
        eyes: (np.linalg.norm(lab(one)[:, None] - lab(one)[None], axis=2) + far).min()
        for eyes, one in seen.items()
    }


def test_the_first_twelve_colours_are_as_far_apart_as_okabe_and_itos_for_every_kind_of_eyes():
    """2.3 is just noticed side by side. With more classes the report writes numbers into its pictures."""
    for eyes, distance in least_distances(palette(SAFE, background=0)).items():
        assert distance > 15, eyes
    for eyes, distance in least_distances(palette(21, background=0)).items():
        assert distance > 10, eyes


@pytest.mark.parametrize("background", [None, 3])
def test_only_the_background_is_near_black(background):
    """Where there is none, the first class is a class like the others. Else the background has its colour anywhere."""
    colours, longest = palette(21, background=background), palette(255, background=background)
    np.testing.assert_array_equal(colours, longest[:21])
    assert len(np.unique(longest, axis=0)) == 255
    dark = np.flatnonzero((colours == BACKGROUND_COLOUR).all(1)).tolist()
    assert dark == ([] if background is None else [background])
    usual = palette(21, background=0)[1:].tolist()
    assert [c for i, c in enumerate(colours.tolist()) if i != background][:20] == usual
    for eyes, distance in least_distances(colours[:SAFE]).items():
        assert distance > 15, eyes
    wide = colourise(np.array([[0, 3, 254, 300, 65535]], np.uint16), background=background)[0].tolist()
    assert wide[-1] == list(IGNORED_COLOUR)
    assert wide[:2] == colours[[0, 3]].tolist()


def test_the_colours_of_the_charts_are_apart_for_every_kind_of_eyes_in_light_dark_and_print():
    style = (Path(everseg.__file__).parent / "reports/templates/report.css").read_text()
    themes = re.findall(r"((?:--s[1-8]: #[0-9a-f]{6}; ?){8})", style)
    assert len(themes) == 3
    for theme in themes:
        colours = [
            [int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in re.findall(r"#([0-9a-f]{6})", theme)
        ]
        for eyes, distance in least_distances(colours).items():
            assert distance > 10, (eyes, theme)


def test_impossible_palette_is_refused():
    with pytest.raises(ValueError, match="-1 colours"):
        palette(-1, background=0)


def test_returned_palette_can_be_changed_without_changing_the_next_one():
    palette(3, background=0)[:] = 7
    assert palette(3, background=0)[1].tolist() == [230, 159, 0]


def test_every_pixel_gets_the_colour_of_its_id_and_ignored_ones_light_grey():
    ids = np.array([[0, 1], [20, 255]], dtype=np.int64)
    picture = colourise(ids, background=0)
    assert picture.dtype == np.uint8
    for row, column in ((0, 0), (0, 1), (1, 0)):
        assert picture[row, column].tolist() == palette(21, background=0)[ids[row, column]].tolist()
    assert tuple(picture[1, 1]) == IGNORED_COLOUR


@pytest.mark.parametrize(
    "ids", [np.array([[-1]]), np.array([[256]]), np.zeros((1, 2, 3), np.uint8), np.zeros((2, 2), np.float32)]
)
def test_ids_that_have_no_colour_are_refused(ids):
    with pytest.raises(ValueError, match="ids"):
        colourise(ids, background=0)


def test_overlay_mixes_image_and_colour_by_alpha():
    image, ids = grey(1, 1, 100), np.array([[1]], dtype=np.uint8)
    np.testing.assert_array_equal(overlay(image, ids, alpha=0.0, background=0), image)
    np.testing.assert_array_equal(overlay(image, ids, alpha=1.0, background=0), colourise(ids, background=0))
    assert overlay(image, ids, alpha=0.25, background=0)[0, 0].tolist() == [
        132,
        115,
        75,
    ]  # 0.75 * 100 + 0.25 * (230, 159, 0)


def test_overlay_refuses_another_size_another_type_and_another_alpha():
    ids = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match="same size"):
        overlay(grey(2, 3), ids, background=0)
    with pytest.raises(ValueError, match="uint8"):
        overlay(grey(2, 2).astype(np.float32), ids, background=0)
    with pytest.raises(ValueError, match="alpha"):
        overlay(grey(2, 2), ids, alpha=1.5, background=0)


def test_triplet_shows_image_label_and_prediction_from_left_to_right():
    image, label, prediction = grey(4, 6), np.full((4, 6), 255), np.full((4, 6), 3)
    picture = triplet(image, label, prediction, background=0)
    assert picture.shape == (4, 26, 3)
    np.testing.assert_array_equal(picture[:, :6], image)
    np.testing.assert_array_equal(picture[:, 10:16], colourise(label, background=0))
    np.testing.assert_array_equal(picture[:, 20:], colourise(prediction, background=0))
    assert (picture[:, 6:10] == 255).all()
    assert (picture[:, 16:20] == 255).all()


def test_shrink_keeps_the_shape_and_never_enlarges():
    assert shrink(grey(100, 400), 50, 100).shape == (25, 100, 3)
    small = grey(10, 10)
    assert shrink(small, 50, 100) is small


def test_confusion_cells_darken_with_the_share_of_their_row_not_with_the_count():
    # 26 classes: cells without text, so that every pixel of a cell has its colour.
    counts = np.zeros((26, 26), dtype=np.int64)
    counts[0, 0], counts[0, 1] = 1, 3
    counts[1, 1] = 1_000_000
    picture = confusion_picture(counts, [str(i) for i in range(26)])
    cell = picture.shape[0] // 26
    assert picture.shape == (26 * cell, 26 * cell, 3)
    corner = picture[::cell, ::cell].astype(int)
    brightness = corner.sum(axis=2)
    assert brightness[1, 1] < brightness[0, 1] < brightness[0, 0] < brightness[0, 2]
    light, dark = corner[0, 2], corner[1, 1]
    np.testing.assert_allclose(corner[0, 1], light + 0.75 * (dark - light), atol=1)
    assert np.ptp(corner[2, 2]) == 0, "a class without pixels is neutral grey"
    np.testing.assert_array_equal(corner[2, 0], corner[2, 25])


def test_small_confusion_picture_carries_names_and_percentages():
    counts = np.array([[9, 1], [0, 4]])
    picture = confusion_picture(counts, ["cat", "dog"])
    np.testing.assert_array_equal(picture, confusion_picture(counts * 1000, ["cat", "dog"]))
    side = 2 * 34
    swapped = confusion_picture(counts, ["dog", "cat"])
    top = picture.shape[0] - side - 8
    left = top
    np.testing.assert_array_equal(picture[top:, left:], swapped[top:, left:])
    assert not np.array_equal(picture[top:, :left], swapped[top:, :left]), "names of the rows"
    assert not np.array_equal(picture[:top, left:], swapped[:top, left:]), "names of the columns"
    cells = picture[top : top + side, left : left + side].reshape(2, 34, 2, 34, 3).swapaxes(1, 2)
    inked = [
        [len(np.unique(cells[r, c, :30, :30].reshape(-1, 3), axis=0)) > 1 for c in (0, 1)] for r in (0, 1)
    ]
    assert inked == [[True, True], [False, True]], "90 and 10 / nothing and 100"


@pytest.mark.parametrize("count", [1, 2, 25, 26, 151])
def test_confusion_picture_and_legend_exist_for_any_number_of_classes(count):
    counts = np.eye(count, dtype=np.int64)
    names = [f"class {i}" for i in range(count)]
    for picture in (confusion_picture(counts, names), legend(names, background=0)):
        assert picture.dtype == np.uint8
        assert picture.ndim == 3
        assert picture.shape[2] == 3
        assert max(picture.shape) < 2000


def test_confusion_picture_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="C x C"):
        confusion_picture(np.zeros((2, 3)), ["a", "b"])
    with pytest.raises(ValueError, match="C x C"):
        confusion_picture(np.zeros((2, 2)), ["a"])
    with pytest.raises(ValueError, match="negative"):
        confusion_picture(np.array([[1, -1], [0, 1]]), ["a", "b"])


def test_hostile_class_names_are_drawn_on_one_line():
    names = ["a\nb\tc\x00\x1b[31m", "<script>x</script>" * 50, "", "路面", "\ud800"]
    plain = ["a b c [31m", "y" * 30, "z", "w", "v"]
    hostile, tame = legend(names, background=0), legend(plain, background=0)
    assert hostile.shape[0] == tame.shape[0]
    assert hostile.shape[1] < 400
    assert max(confusion_picture(np.eye(5), names).shape) < 500


def test_legend_shows_every_colour():
    picture = legend(["background", "cat", "dog"], background=0).reshape(-1, 3)
    found = {tuple(colour) for colour in np.unique(picture, axis=0).tolist()}
    assert {tuple(colour) for colour in palette(3, background=0).tolist()} | {IGNORED_COLOUR} <= found


def test_prediction_mask_gives_back_the_exact_ids_and_shows_colours(tmp_path):
    ids = np.arange(256, dtype=np.int64).reshape(16, 16)
    mask, mixed = write_prediction(tmp_path / "new" / "scene.01", ids, grey(16, 16), background=0)
    assert (mask.name, mixed.name) == ("scene.01_mask.png", "scene.01_overlay.png")
    with Image.open(mask) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), ids)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), colourise(ids, background=0))
    with Image.open(mixed) as picture:
        np.testing.assert_array_equal(np.asarray(picture), overlay(grey(16, 16), ids, background=0))
    assert sorted(path.name for path in mask.parent.iterdir()) == [mask.name, mixed.name]


def test_few_ids_are_exact_too(tmp_path):
    ids = np.array([[0, 1, 255], [2, 2, 0]], dtype=np.uint8)
    mask, _ = write_prediction(tmp_path / "x", ids, grey(2, 3), background=0)
    np.testing.assert_array_equal(np.asarray(Image.open(mask)), ids)


def test_an_id_above_255_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match=r"class id 300 .*0 to 255"):
        write_prediction(tmp_path / "out" / "x", np.array([[300]]), grey(1, 1), background=0)
    with pytest.raises(ValueError, match="same size"):
        write_prediction(tmp_path / "out" / "x", np.zeros((2, 2), np.uint8), grey(1, 1), background=0)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_earlier_prediction_whole(tmp_path, monkeypatch):
    mask, _ = write_prediction(tmp_path / "x", np.zeros((2, 2), np.uint8), grey(2, 2), background=0)
    before = mask.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="disk full"):
        write_prediction(tmp_path / "x", np.ones((2, 2), np.uint8), grey(2, 2), background=0)
    assert mask.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_in_place_of_the_folder_is_one_clear_error(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_prediction(tmp_path / "out" / "x", np.zeros((1, 1), np.uint8), grey(1, 1), background=0)


def test_real_image_and_mask_make_pictures(camvid: Path, tmp_path):
    image_path = sorted((camvid / "val").iterdir())[0]
    image = np.asarray(Image.open(image_path).convert("RGB"))
    label = np.asarray(Image.open(next((camvid / "valannot").glob(f"{image_path.stem}.*")))).astype(np.uint8)
    assert triplet(image, label, label, background=0).shape == (image.shape[0], 3 * image.shape[1] + 8, 3)
    mask, _ = write_prediction(tmp_path / image_path.stem, label, image, background=0)
    np.testing.assert_array_equal(np.asarray(Image.open(mask)), label)
