"""`everseg data init`: layouts guessed, values read, names taken, a page to look at, commands that work."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import chromium
import numpy as np
import pytest
import trees
from PIL import Image

from everseg.config import loading as config_loading
from everseg.config import yaml as config_yaml
from everseg.config.fields import DataConfig
from everseg.data.datasets import load_dataset
from everseg.data.doctor import doctor
from everseg.data.proposal import preview
from everseg.data.proposal.describe import _flow, describe, propose
from everseg.errors import ConfigError, DataError
from saying import must_say

Call = Callable[..., tuple[int, str, str]]


def pictures(
    root: Path, images: str, masks: str, count: int = 3, ids: tuple[int, ...] = (0, 1, 2, 255)
) -> None:
    """`images` and `masks` are paths with {} for the number."""
    for number in range(count):
        trees.save(root / images.format(number), trees.image_of(number + len(images)))
        trees.save(root / masks.format(number), trees.mask_of(list(ids)))


def init(root: Path, names: list[str] | None = None) -> tuple[dict, doctor.Report]:
    """Keys of the description of a folder, and what the check says of it."""
    text = describe(propose(root), names, here=root.parent).yaml()
    file = trees.write(root.parent / "data.yaml", text)
    report = doctor.check(load_dataset(DataConfig(dataset=str(file))), cache=False)
    return config_yaml.parse(text, "x").value, report


def splits_of(root: Path, images: str, masks: str, names: tuple[str, ...] = ("train", "val")) -> None:
    for split in names:
        pictures(
            root, images.replace("SPLIT", split), masks.replace("SPLIT", split), 4 if split == names[0] else 2
        )


LAYOUTS: dict[str, tuple[Callable[[Path], object], dict]] = {
    "images and masks": (
        lambda r: splits_of(r, "images/SPLIT/a{}.png", "masks/SPLIT/a{}.png"),
        {"images": "images/{split}", "masks": "masks/{split}", "splits": {"train": "train", "val": "val"}}),
    "splits first": (
        lambda r: splits_of(r, "SPLIT/Images/a{}.png", "SPLIT/Labels/a{}.png", ("training", "validation")),
        {"images": "{split}/Images", "masks": "{split}/Labels", "splits": {"train": "training", "val": "validation"}}),
    "split in the name": (
        lambda r: splits_of(r, "SPLIT_images/a{}.png", "SPLIT_masks/a{}.png", ("train", "test")),
        {"images": "{split}_images", "masks": "{split}_masks", "splits": {"train": "train", "test": "test"}}),
    "SegNet's": (
        lambda r: splits_of(r, "SPLIT/a{}.png", "SPLITannot/a{}.png"),
        {"images": "{split}", "masks": "{split}annot", "splits": {"train": "train", "val": "val"}}),
    "no splits": (
        lambda r: pictures(r, "img/a{}.png", "gt/a{}.png", 12),
        {"images": "img", "masks": "gt", "split": {"val": 0.2, "seed": 0}}),
    "train only": (
        lambda r: splits_of(r, "train/images/a{}.png", "train/masks/a{}.png", ("train",)),
        {"images": "train/images", "masks": "train/masks", "split": {"val": 0.2, "seed": 0}}),
    "endings": (
        lambda r: pictures(r, "images/a{}_rgb.png", "masks/a{}_label.png", 12),
        {"pair": {"image_suffix": "_rgb", "mask_suffix": "_label"}}),
    "side by side": (
        lambda r: pictures(r, "all/a{}.png", "all/a{}_mask.png", 12),
        {"images": "all", "masks": "all", "pair": {"mask_suffix": "_mask"}}),
    "cities": (
        lambda r: [splits_of(r, f"images/SPLIT/{c}/{c}{{}}.png", f"labels/SPLIT/{c}/{c}{{}}.png") for c in ("x", "y")],
        {"images": "images/{split}", "masks": "labels/{split}"}),
    "VOC's folders": (
        lambda r: (pictures(r, "JPEGImages/a{}.png", "SegmentationClass/a{}.png", 6),
                   trees.write(r / "ImageSets/Segmentation/train.txt", "a0\na1\na2\na3\n"),
                   trees.write(r / "ImageSets/Segmentation/val.txt", "a4\na5\n")),
        {"splits": {"train": "ImageSets/Segmentation/train.txt", "val": "ImageSets/Segmentation/val.txt"}}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_guessed_and_the_description_passes_the_check(tmp_path: Path, layout: str) -> None:
    make, expected = LAYOUTS[layout]
    make(tmp_path / "data")
    keys, report = init(tmp_path / "data", ["road", "tree"])
    assert keys.items() >= expected.items()
    assert keys["classes"] == ["background", "road", "tree"]
    assert (keys["background"], keys["ignore"], keys["root"]) == ("background", 255, "data")
    assert {f.code for f in report.findings if f.level == "error"} <= {"same-image"}  # the toy images repeat
    files = sum(1 for p in (tmp_path / "data").rglob("*.png"))
    assert sum(report.images.values()) == files // 2


@pytest.mark.parametrize("name", ["voc", "ade", "camvid"])
def test_published_layouts_keep_their_reader(tmp_path: Path, name: str) -> None:
    getattr(trees, name)(tmp_path / "data")
    keys, report = init(tmp_path / "data")
    assert keys == {"layout": name, "root": "data"}
    assert report.images["train"] >= 2
    with pytest.raises(ConfigError, match="own class names"):
        init(tmp_path / "data", ["a"])


def test_coco_and_cvat(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    pictures(root, "images/a{}.png", "away/a{}.png", 5)
    shutil.rmtree(root / "away")
    content = {
        "images": [{"id": i, "file_name": f"a{i}.png", "width": 16, "height": 12} for i in range(5)],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [
            {"image_id": i, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]} for i in range(5)
        ],
    }
    trees.write(root / "annotations.json", json.dumps(content))
    keys, report = init(root)
    assert keys == {"layout": "coco", "root": "coco"}
    assert [row.name for row in report.classes] == ["background", "car"]
    root = tmp_path / "cvat"
    colours = np.array([[0, 0, 0], [250, 50, 83]], np.uint8)
    for i in range(5):
        trees.save(root / f"JPEGImages/a{i}.jpg", trees.image_of(i))
        trees.save(root / f"SegmentationClass/a{i}.png", colours[trees.mask_of([0, 1])])
        trees.save(root / f"SegmentationObject/a{i}.png", colours[trees.mask_of([0, 1])])
    trees.write(
        root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:250,50,83::\n"
    )
    trees.write(root / "ImageSets/Segmentation/default.txt", "\n".join(f"a{i}" for i in range(5)))
    keys, report = init(root)
    assert keys["labels"] == {"palette": {"background": [0, 0, 0], "car": [250, 50, 83]}}
    assert report.ok
    assert sum(report.images.values()) == 5


@pytest.mark.parametrize(
    ("ids", "names", "expected"),
    [
        ((0, 255), ["crack"], {"classes": {0: "background", 255: "crack"}, "ignore": None}),
        ((1, 2), ["a", "b"], {"classes": {1: "a", 2: "b"}, "background": None}),
        ((0, 7, 9), ["a", "b"], {"classes": {0: "background", 7: "a", 9: "b"}}),
        ((0, 1), ["ground", "car"], {"classes": ["ground", "car"], "background": None}),
        ((0, 1), None, {"classes": ["background", "class_1"]}),
    ],
)
def test_ids_become_classes(tmp_path: Path, ids: tuple, names: list[str] | None, expected: dict) -> None:
    pictures(tmp_path / "data", "images/a{}.png", "masks/a{}.png", 8, ids)
    keys, report = init(tmp_path / "data", names)
    assert keys.items() >= expected.items()
    assert report.ok


def test_large_ids_and_colours_are_mapped(tmp_path: Path) -> None:
    for i in range(8):
        trees.save(tmp_path / f"data/images/a{i}.png", trees.image_of(i))
        trees.save(tmp_path / f"data/masks/a{i}.png", trees.mask_of([0, 2]).astype(np.uint16) * 1000)
    keys, report = init(tmp_path / "data", ["car"])
    assert keys["labels"] == {"map": {0: "background", 2000: "car"}}
    assert report.ok
    for i in range(8):
        rgb = np.array([[0, 0, 0], [0, 128, 0], [128, 0, 0]], np.uint8)[trees.mask_of([0, 1, 1, 2])]
        trees.save(tmp_path / f"data/masks/a{i}.png", rgb)
    keys, report = init(tmp_path / "data", ["grass", "car"])
    palette = {"background": [0, 0, 0], "grass": [0, 128, 0], "car": [128, 0, 0]}
    assert keys["labels"] == {"palette": palette}
    assert report.ok


def test_names_are_found_beside_the_data_and_checked(tmp_path: Path) -> None:
    pictures(tmp_path / "data", "images/a{}.png", "masks/a{}.png", 8)
    trees.write(tmp_path / "data/classes.txt", "road\ntree: old\n")
    assert init(tmp_path / "data")[0]["classes"] == ["background", "road", "tree: old"]
    for names, message in (
        (["a"], "1 name for 2 classes"), (["a", "A"], "of its own"), (["a", "ignore"], "other than 'ignore'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            init(tmp_path / "data", names)


def test_folders_that_say_nothing_are_refused_with_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        propose(tmp_path / "empty")
    trees.save(tmp_path / "a/one/x.png", trees.image_of(0))
    trees.save(tmp_path / "a/two/y.png", trees.image_of(0))
    with pytest.raises(DataError, match=r"one/ \(1 picture\), two/ \(1 picture\)"):
        propose(tmp_path / "a")
    for i in range(2):
        trees.save(tmp_path / f"b/images/{i}.jpg", trees.image_of(0))
        trees.save(tmp_path / f"b/masks/{i}.jpg", trees.mask_of([0, 1]))
    with pytest.raises(DataError, match="stored as JPEG"):
        propose(tmp_path / "b")


@pytest.mark.parametrize(
    "value", ["a b", "no", "12", "x: y", '"', "é🚦", "<b>", "", None, True, {3: ["a", -1]}, 0.5]
)
def test_what_is_written_is_what_is_read(value: object) -> None:
    assert config_yaml.parse(f"k: {_flow(value)}\n", "x").value["k"] == value


def test_large_pictures_become_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "data", "images/a{}.png", "masks/a{}.png", 8)
    assert "tiles" not in init(tmp_path / "data")[0]
    monkeypatch.setattr("everseg.data.proposal.describe.LARGE", 100)
    assert init(tmp_path / "data")[0]["tiles"] == {"size": 1024, "overlap": 64}


# ---------------------------------------------------------------- the command


class Page(HTMLParser):
    """Sources of the pictures, and the tags, of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for key, value in attributes if key in ("src", "href")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "site", "images/a{}.png", "masks/a{}.png", 30)
    return tmp_path


def test_the_command_writes_a_description_and_a_page_and_says_what_to_type(call: Call, here: Path) -> None:
    (here / "site/images/a3.png").write_bytes(b"")
    hostile = "<script>alert(1)</script>"
    code, out, _ = call("data", "init", "site", "--classes", f"road,{hostile}")
    assert code == 0
    text = (here / "data_preview.html").read_text()
    page = Page(text)
    assert len(page.sources) in (46, 48)  # 24 pairs, one of them may be the one that cannot be read
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "script" not in page.tags
    assert "&lt;script&gt;" in text
    assert not re.search(r"https?://", text)
    assert len(text) < 3_000_000
    commands = re.findall(r"^  everseg (.*)$", out, re.MULTILINE)
    assert [c.split()[0] for c in commands] == ["data", "run", "run"]
    config = config_loading.load(commands[2].split()[1], commands[2].split()[2:])
    assert (config.data.dataset, config.scenario.task, config.scenario.test_split) == (
        "data.yaml",
        "offline",
        "val",
    )
    before = (here / "data.yaml").read_bytes()
    code, _, err = call("data", "init", "site")
    assert code == 2
    assert "data.yaml exists" in err
    assert "--force" in err
    assert (here / "data.yaml").read_bytes() == before
    code, out, _ = call("data", "init", "site", "--force", "--yes")
    assert code == 0
    told = [out.index(text) for text in (f"Wrote {here}/data.yaml", "First: the classes have no names yet", "Next:",
                                         "everseg show camvid-6-5-mib")]  # fmt: skip
    assert told == sorted(told)
    assert b"class_1" in (here / "data.yaml").read_bytes()


def test_the_commands_it_prints_work(call: Call, here: Path) -> None:
    out = call("data", "init", "site", "--classes", "road,tree", "--out", "mine.yaml")[1]
    check, dry, _ = (line.split() for line in re.findall(r"^  everseg (.*)$", out, re.MULTILINE))
    assert "near-same-image" in call(*check)[1] or "same-image" in call(*check)[1]  # toy images repeat
    small = [
        "model.options.widths=[8,8,8,8]",
        "model.options.hidden=8",
        "model.options.out_channels=8",
        "data.crop=16",
    ]
    code, out, err = call(*dry, *small, "--quiet")
    assert code == 0, err
    must_say(out, "dry run", "works")


def test_wrong_arguments_are_all_told(call: Call, here: Path) -> None:
    code, _, err = call("data", "init", "nowhere", "--out", "none/data.txt")
    assert code == 2
    for text in ("nowhere is missing", ".yaml", "no folder none"):
        assert text in err


def test_names_are_asked_for_on_a_terminal(call: Call, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return "road, tree\n"

    monkeypatch.setattr("sys.stdin", Terminal())
    code, out, _ = call("data", "init", "site")
    assert code == 0
    assert "Names for 1, 2" in out
    assert b"[background, road, tree]" in (here / "data.yaml").read_bytes()


def test_the_page_shows_every_class_and_the_image_under_its_labels(tmp_path: Path) -> None:
    pictures(tmp_path, "images/train/a{}.png", "masks/train/a{}.png", 60, (0, 1))
    trees.save(tmp_path / "masks/train/a33.png", trees.mask_of([2]))
    trees.write(tmp_path / "data.yaml", "classes: [background, road, tree]\n")
    text = preview.preview(load_dataset(DataConfig(dataset=str(tmp_path / "data.yaml"))), images=3)
    assert "train/a33" in text
    assert Page(text).tags.count("figure") == 3
    images = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', text)
    assert len(images) == 6
    plain, labelled = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(i)))).astype(int) for i in images[:2]
    )
    left = np.abs(plain - labelled)[:, : plain.shape[1] // 2 - 4].mean()
    right = np.abs(plain - labelled)[:, plain.shape[1] // 2 + 4 :].mean()
    assert left < 6 < 30 < right or "a33" in text.split("<figcaption>")[1][:12]


def few_pixels(root: Path) -> None:
    """Ids with gaps: 13 in every mask, 58 in a single pixel of two of twelve."""
    for i in range(12):
        mask = np.zeros((120, 160), np.uint8)
        mask[20:100, 30:140] = 13
        if i in (3, 4):
            mask[1, 1] = 58
        trees.save(root / f"masks/a{i}.png", mask)
        trees.save(root / f"images/a{i}.png", np.full((*mask.shape, 3), 90 + i, np.uint8))


def legend_of(text: str) -> list[str]:
    rows = re.findall(r"<li><span class=\"chip\".*?</li>", text, re.DOTALL)
    return [" ".join(re.sub(r"<[^>]*>", " ", row).replace("&lt;", "<").split()) for row in rows]


def test_the_page_says_what_is_rare_and_what_to_do_next(call: Call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    few_pixels(tmp_path / "site")
    code, out, err = call("data", "init", "site", "--yes")
    assert code == 0, err
    text = (tmp_path / "data_preview.html").read_text()
    rows = legend_of(text)
    assert [row.split()[:3] for row in rows] == [
        ["0", "=", "background"],
        ["13", "=", "class_13"],
        ["58", "=", "class_58"],
    ]
    assert rows[1].endswith("12 images")
    assert rows[2].endswith("< 0.01 %, 2 images")
    must_say(out, "58", "class_58", "< 0.01 %")
    steps = re.search(r"<ol>(.*?)</ol>", text, re.DOTALL)[1]  # type: ignore[index]
    assert "--classes" in steps
    assert re.findall(r"<code>(.*?)</code>", steps) == re.findall(r"^  (everseg .*)$", out, re.MULTILINE)
    assert text.count("class_58 (ring)") == 2
    assert call("data", "init", "site", "--force", "--classes", "road,tree")[0] == 0
    assert "--classes" not in (tmp_path / "data_preview.html").read_text()


def test_outlines_are_drawn_where_two_labels_meet() -> None:
    ids = np.zeros((9, 12), np.uint8)
    ids[2:6, 3:9] = 4
    picture = np.full((9, 12, 3), 100, np.uint8)
    preview.draw_outlines(picture, ids)
    line = (picture != 100).any(axis=2)
    meets = np.zeros_like(line)
    for y, x in np.ndindex(ids.shape):  # pixels with a neighbour of another id, one by one
        for b, a in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            meets[y, x] |= 0 <= b < 9 and 0 <= a < 12 and ids[b, a] != ids[y, x]
    np.testing.assert_array_equal(line, meets)
    assert {tuple(c) for c in picture[line].tolist()} == {(0, 0, 0), (255, 255, 255)}


@pytest.mark.slow
@pytest.mark.skipif(chromium.BROWSER is None, reason="no Chromium here (apt-get install chromium)")
def test_the_page_prints_on_one_sheet(tmp_path: Path) -> None:
    """24 upright pictures, which need most room, and a legend of 40 classes."""
    for i in range(24):
        mask = np.full((320, 200), i, np.uint8)
        trees.save(tmp_path / f"masks/a{i}.png", mask)
        trees.save(tmp_path / f"images/a{i}.png", np.full((320, 200, 3), 5 * i, np.uint8))
    names = [f"class number {i}" for i in range(40)]
    trees.write(tmp_path / "data.yaml", json.dumps({"images": "images", "masks": "masks", "classes": names,
                                                    "split": {"val": 0.2, "seed": 0}}))  # fmt: skip
    dataset = load_dataset(DataConfig(dataset=str(tmp_path / "data.yaml")))
    (tmp_path / "page.html").write_text(
        preview.preview(dataset, commands=["everseg data check data.yaml"] * 3)
    )
    with chromium.page(tmp_path / "profile") as page:
        page.call("Page.navigate", url=(tmp_path / "page.html").as_uri())
        page.wait("document.readyState == 'complete'")
        printed = page.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)[
            "data"
        ]
    assert len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(printed))) == 1


# ---------------------------------------------------------------- the background


@pytest.mark.parametrize(
    ("ids", "classes", "options", "expected"),
    [
        ((0, 1), "BG,car", (), {"background": "BG"}),
        ((0, 1), "car,Background", (), {"background": "Background"}),
        ((1, 2), "background,car", (), {"background": "background"}),
        ((0, 1), "ground,car", ("--background", "Ground"), {"background": "ground"}),
        ((0, 1), "ground,car", ("--background", "none"), {"background": None}),
        ((0, 1), "ground,car", (), {"background": None}),
    ],
)
def test_the_background_is_known_by_name_by_option_or_told(
    call: Call, tmp_path: Path, ids: tuple, classes: str, options: tuple, expected: dict
) -> None:
    pictures(tmp_path / "site", "images/a{}.png", "masks/a{}.png", 8, ids)
    file = tmp_path / "data.yaml"
    code, _, err = call("data", "init", tmp_path / "site", "--classes", classes, *options, "--out", file)
    assert code == 0, err
    assert config_yaml.parse(file.read_text(), "x").value.items() >= expected.items()
    guessed = classes == "ground,car" and not options
    assert ("'ground'" in err and "--background NAME" in err) is guessed


@pytest.mark.parametrize(
    ("classes", "options", "facts"),
    [
        (
            "car,background",
            (),
            ("2 names for 3 values", "'background'"),
        ),
        ("bg,car,Background", (), ("of its own",)),
        ("bg,car,CAR", (), ("of its own",)),
        (
            "bg,car,tree",
            ("--background", "sky"),
            ("--background: 'sky'", "bg, car, tree", "none"),
        ),
    ],
)
def test_names_that_leave_the_background_open_are_refused(
    call: Call, tmp_path: Path, classes: str, options: tuple, facts: tuple[str, ...]
) -> None:
    pictures(tmp_path / "site", "images/a{}.png", "masks/a{}.png", 8, (0, 1, 2))
    file = tmp_path / "data.yaml"
    code, _, err = call("data", "init", tmp_path / "site", "--classes", classes, *options, "--out", file)
    assert code == 2
    must_say(err, *facts)
    assert not file.exists()


def test_the_background_is_asked_for_on_a_terminal(
    call: Call, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return "ground\n"

    monkeypatch.setattr("sys.stdin", Terminal())
    code, out, _ = call("data", "init", "site", "--classes", "ground,road,tree")
    assert code == 0
    must_say(out, "background", "[none]")
    assert "background: ground" in (here / "data.yaml").read_text()
