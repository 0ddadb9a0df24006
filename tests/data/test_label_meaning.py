"""What a pixel of a mask means: `data init` and `data check` never give a wrong label in silence."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import label_trees
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from everseg import data
from everseg.config import yaml as config_yaml
from everseg.config.fields import DataConfig, ScenarioConfig
from everseg.data.datasets import load_dataset
from everseg.engine.prepare import prepare
from everseg.engine.rescore import source_by_name
from everseg.errors import ConfigError, DataError
from everseg.labels import LabelSpace
from everseg.progress import Progress
from saying import must_say

Call = Callable[..., tuple[int, str, str]]
SIZE = (48, 64)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


FIXTURES = Path(__file__).parents[1] / "fixtures"


def square(value: int, at: tuple[int, int] = (8, 8)) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    mask[at[0] : at[0] + 20, at[1] : at[1] + 20] = value
    return mask


def both(low: int, high: int) -> np.ndarray:
    return np.maximum(square(low), square(high, (25, 35)))


def tree(root: Path, masks: Sequence[np.ndarray | Image.Image], names: str = "") -> Path:
    for number, mask in enumerate(masks):
        noise = np.random.default_rng(number).integers(0, 255, (*SIZE, 3)).astype(np.uint8)
        picture = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        for kind, one in (("images", Image.fromarray(noise)), ("masks", picture)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            one.save(root / kind / f"{number}.png")
    if names:
        (root / "classes.txt").write_text(names)
    return root


def indexed(mask: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    picture = Image.fromarray(mask).convert("L")
    picture.putpalette([part for colour in colours for part in colour])
    return picture


def keys_of(file: Path) -> dict:
    return config_yaml.parse(file.read_text(), str(file)).value


def masks_of(file: Path) -> dict[str, np.ndarray]:
    dataset = load_dataset(DataConfig(dataset=str(file)))
    return {s.id(i): s.read_mask(i) for s in dataset.splits.values() for i in range(len(s))}


# ---------------------------------------------------------------- indexed masks


def test_palettes_that_differ_go_by_colour(call: Call, tmp_path: Path) -> None:
    truth = [both(1, 2) if i % 2 else both(2, 3) for i in range(8)]
    colours = [(0, 0, 0), RED, GREEN, BLUE]
    masks = []
    for mask in truth:
        held = np.unique(mask)
        masks.append(indexed(np.searchsorted(held, mask).astype(np.uint8), [colours[v] for v in held]))
    root, file = tree(tmp_path / "site", masks), tmp_path / "data.yaml"
    tied = "red=255,0,0,green=0,255,0,blue=0,0,255"
    code, out, err = call("data", "init", root, "--classes", tied, "--out", file)
    assert code == 0, err
    must_say(out, "palettes", "differ", "colour")
    must_say(out, "255,0,0", "id 1", "red")
    assert keys_of(file)["classes"] == ["background", "red", "green", "blue"]
    read = masks_of(file)
    assert all((read[str(i)] == mask).all() for i, mask in enumerate(truth))
    code, out, _ = call("data", "check", file)
    must_say(out, "red 255,0,0")
    must_say(out, "NOTE", "palette-colours")
    page = (tmp_path / "data_preview.html").read_text()
    assert "255,0,0 =" in page


def test_palettes_that_cannot_be_told_apart_are_refused(call: Call, tmp_path: Path) -> None:
    palettes = [[(0, 0, 0), RED, RED], [(0, 0, 0), GREEN, GREEN]]
    root = tree(tmp_path / "site", [indexed(both(1, 2), palettes[i % 2]) for i in range(6)])
    code, _, err = call("data", "init", root, "--out", tmp_path / "data.yaml")
    assert code == 3
    must_say(err, "indices 1 and 2", "255,0,0")
    assert not (tmp_path / "data.yaml").exists()


def test_one_palette_of_one_colour_says_nothing_and_ids_count(tmp_path: Path) -> None:
    grey = [(7, 7, 7)] * 3
    root = tree(tmp_path / "site", [indexed(both(1, 2), grey) for _ in range(6)])
    data.init(root, classes=["a", "b"], out=tmp_path / "data.yaml", quiet=True)
    assert keys_of(tmp_path / "data.yaml")["classes"] == ["background", "a", "b"]


def test_the_check_finds_palettes_that_differ(call: Call, tmp_path: Path) -> None:
    palettes = [[(0, 0, 0), RED, GREEN], [(0, 0, 0), GREEN, RED]]
    tree(tmp_path, [indexed(both(1, 2), palettes[i % 2]) for i in range(6)])
    file = tmp_path / "data.yaml"
    file.write_text("images: images\nmasks: masks\nsplit: {val: 0.2, seed: 0}\nclasses: [background, a, b]\n")
    for _ in range(2):  # the second time from the cache
        code, out, _ = call("data", "check", file)
        assert code == 3
        must_say(out, "ERROR", "palettes-differ")
        must_say(out, "index 1", "255,0,0", "0,255,0")


@pytest.mark.parametrize("where", ["one split", "two splits", "renamed"])
def test_a_run_and_a_score_refuse_palettes_that_differ(tmp_path: Path, where: str) -> None:
    palettes = [[(0, 0, 0), RED, GREEN, BLUE], [(0, 0, 0), GREEN, RED, BLUE]]
    masks = [both(2, 3), *[both(1, 2)] * 5]
    for split in ("train", "val"):
        other = int(where == "two splits" and split == "val")
        use = [palettes[other if i or where == "two splits" else 1] for i in range(6)]
        root = tree(tmp_path / split, [indexed(m, p) for m, p in zip(masks, use, strict=True)])
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (root / kind).rename(tmp_path / kind / split)
    (tmp_path / "data.yaml").write_text(
        "images: images/{split}\nmasks: masks/{split}\nsplits: [train, val]\nclasses: [background, a, b, c]\n"
    )
    settings = DataConfig(dataset=str(tmp_path / "data.yaml"))
    scenario = ScenarioConfig(task="offline", test_split="val")
    prepared = settings, scenario
    if where == "renamed":
        domain = {"dataset": str(tmp_path / "data.yaml"), "rename": {"a": "b"}}
        steps = [{"domain": "here"}]
        prepared = (
            DataConfig(domains={"here": domain}),
            ScenarioConfig(kind="domain-incremental", steps=steps, test_split="val"),
        )
    with pytest.raises(DataError) as caught:
        prepare(*prepared, Progress(quiet=True), seed=0)
    must_say(caught.value, "255,0,0", "0,255,0", "data init")
    if where == "one split":
        report = data.check(tmp_path / "data.yaml", quiet=True)
        assert "palettes-differ" in [f.code for f in report.findings if f.level == "error"]
        space, dataset = LabelSpace(((0, 1, 2, 3),), ("background", "a", "b", "c")), load_dataset(settings)
        with pytest.raises(DataError) as caught:
            source_by_name(dataset, scenario, "default", space)
        must_say(caught.value, "255,0,0", "0,255,0")


def test_the_check_shows_the_masks_own_colours(call: Call, tmp_path: Path) -> None:
    tree(tmp_path, [indexed(both(1, 2), [(0, 0, 0), (128, 64, 128), GREEN]) for _ in range(6)])
    file = tmp_path / "data.yaml"
    file.write_text(
        "images: images\nmasks: masks\nsplit: {val: 0.2, seed: 0}\nclasses: [background, road, tree]\n"
    )
    code, out, _ = call("data", "check", file)
    assert code == 0
    must_say(out, "road", "128,64,128", f"{100 * 400 / (48 * 64):.1f} %")
    page = data.check(file, quiet=True)._repr_html_()
    for shown in (
        "dark pink 128,64,128",
        f"{100 * 400 / (48 * 64):.1f} %",
        "Is that what the pictures show?",
    ):
        assert shown in page
    rows = json.loads(call("data", "check", file, "--json")[1])["classes"]
    assert [row["colours"] for row in rows] == [[[0, 0, 0]], [[128, 64, 128]], [[0, 255, 0]]]


# ---------------------------------------------------------------- colours


def painted(shares: dict[tuple[int, int, int], int]) -> list[np.ndarray]:
    mask = np.zeros((*SIZE, 3), np.uint8)
    row = 2
    for colour, rows in shares.items():
        mask[row : row + rows] = colour
        row += rows
    return [mask] * 6


ROAD, HOUSE, SKY, NEW = (128, 64, 128), (70, 70, 70), (70, 130, 180), (220, 20, 60)


def test_the_order_of_colours_does_not_depend_on_the_pixels(tmp_path: Path) -> None:
    found = []
    for name, shares in (("june", {ROAD: 20, HOUSE: 14, SKY: 8}), ("dusk", {HOUSE: 20, SKY: 14, ROAD: 8})):
        data.init(
            tree(tmp_path / name, painted(shares)),
            classes=["a", "b", "c"],
            out=tmp_path / f"{name}.yaml",
            quiet=True,
        )
        found.append(keys_of(tmp_path / f"{name}.yaml")["labels"])
    assert found[0] == found[1]


def test_like_takes_classes_colours_and_ids_and_tells_what_is_new_or_missing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    june = tree(tmp_path / "june", painted({ROAD: 20, HOUSE: 14, SKY: 8}))
    tied = "sky=70,130,180,road=128,64,128,house=70,70,70"
    assert call("data", "init", june, "--classes", tied, "--out", "june.yaml")[0] == 0
    dusk = tree(tmp_path / "dusk", painted({HOUSE: 20, NEW: 4, ROAD: 8}))
    code, _, err = call("data", "init", dusk, "--like", "june.yaml", "--out", "dusk.yaml")
    assert code == 2
    must_say(err, "220,20,60", "june.yaml", "--classes")
    code, _, err = call(
        "data", "init", dusk, "--like", "june.yaml", "--classes", "person=220,20,60", "--out", "dusk.yaml"
    )
    assert code == 0, err
    must_say(err, "note", "new", "person", "id 4")
    must_say(err, "note", "june.yaml", "sky", "no mask")
    before, after = keys_of(tmp_path / "june.yaml"), keys_of(tmp_path / "dusk.yaml")
    assert after["classes"] == [*before["classes"], "person"]
    assert after["labels"]["palette"].items() >= before["labels"]["palette"].items()
    code, _, err = call("data", "init", dusk, "--out", "again.yaml")  # it is pointed to by itself
    must_say(err, "note", "--like", "june.yaml")


def test_like_takes_the_data_of_a_run_and_the_classes_of_a_bundle(tmp_path: Path) -> None:
    june = tree(tmp_path / "june", [both(1, 2)] * 6)
    data.init(june, classes=["road", "tree"], out=tmp_path / "june.yaml", quiet=True)
    run = tmp_path / "runs/june"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"config": {"data": {"dataset": "june.yaml"}}}))
    bundle = FIXTURES / "bundle-format-1"  # background, road, building, tree, ...
    july, out = tree(tmp_path / "july", [both(2, 1)] * 6), tmp_path / "july.yaml"
    data.init(july, like=run, out=out, force=True, quiet=True)
    assert keys_of(out)["classes"] == ["background", "road", "tree"]
    # A bundle's ids are its own: the same numbers may be other classes in the masks.
    with pytest.raises(ConfigError) as refused:
        data.init(july, like=bundle, out=out, force=True, quiet=True)
    must_say(str(refused.value), "--classes road=1,building=2")
    must_say(str(refused.value), "--classes NAME=1,NAME=2")
    data.init(july, like=bundle, classes=["road=1", "building=2"], out=out, force=True, quiet=True)
    assert list(keys_of(out)["classes"])[:3] == ["background", "road", "building"]
    assert "labels" not in keys_of(out)
    data.init(july, like=bundle, classes=["building=1", "road=2"], out=out, force=True, quiet=True)
    assert list(keys_of(out)["classes"])[:3] == ["background", "road", "building"]
    assert keys_of(out)["labels"]["map"] == {0: "background", 1: "building", 2: "road", 255: "ignore"}


# ---------------------------------------------------------------- GeoTIFF


def geotiffs(folder: Path, no_data: str) -> None:
    """Turn the pictures of a folder into GeoTIFFs that call a value "no data"."""
    for picture in sorted(folder.iterdir()):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[42113] = no_data
        Image.open(picture).save(picture.with_suffix(".tif"), tiffinfo=tags)
        picture.unlink()


@pytest.mark.parametrize("nodata", ["0", "2", "255", "-9999"])
def test_what_a_geotiff_calls_no_data_is_asked_for(call: Call, tmp_path: Path, nodata: str) -> None:
    root, out = tree(tmp_path / "site", [both(1, 2)] * 6), tmp_path / "data.yaml"
    geotiffs(root / "masks", nodata)
    code, _, err = call("data", "init", root, "--out", out)
    if nodata in ("255", "-9999"):  # no mask shows them
        assert code == 0, err
        return
    assert code == 3, err
    must_say(err, "GDAL_NODATA", nodata, "%", f"ignore={nodata}")
    tied = {"0": ["ignore=0", "road=1", "tree=2"], "2": ["background=0", "road=1", "ignore=2"]}[nodata]
    code, _, err = call("data", "init", root, "--classes", ",".join(tied), "--out", out)
    assert code == 0, err
    assert keys_of(out)["ignore"] == int(nodata)
    assert "no_data" not in keys_of(out)
    tied = ["background=0", "road=1", "tree=2"]
    assert call("data", "init", root, "--classes", ",".join(tied), "--out", out, "--force")[0] == 0
    assert keys_of(out)["no_data"] == "class"
    assert call("data", "check", out)[0] == 0


def test_an_object_that_a_geotiff_calls_no_data_is_asked_for(call: Call, tmp_path: Path) -> None:
    root, out = tree(tmp_path / "site", [square(255)] * 6), tmp_path / "data.yaml"
    geotiffs(root / "masks", "255.0")
    code, _, err = call("data", "init", root, "--out", out)
    assert code == 3, err
    must_say(err, "GDAL_NODATA", 255, "%", "ignore=255")


@pytest.mark.parametrize(
    "stated",
    ["", "no_data: class", "ignore: 0", "labels: {map: {0: ignore, 1: road, 2: tree}}\nvoid_share: 0.8"],
)
@pytest.mark.parametrize("tiled", [False, True])
def test_no_data_in_a_description_by_hand(call: Call, tmp_path: Path, stated: str, tiled: bool) -> None:
    tree(tmp_path, [both(1, 2)] * 6)
    geotiffs(tmp_path / "masks", "0")
    classes = "{1: road, 2: tree}" if "ignore" in stated else "[soil, road, tree]"
    file = tmp_path / "data.yaml"
    more = "tiles: {size: 64, overlap: 0}" if tiled else ""
    file.write_text(
        f"images: images\nmasks: masks\nsplit: {{val: 0.3}}\nclasses: {classes}\n{stated}\n{more}\n"
    )
    settings = DataConfig(dataset=str(file)), ScenarioConfig(task="offline", test_split="val")
    for _ in range(2):  # the second time from the cache
        code, out, _ = call("data", "check", file)
        assert code == (0 if stated else 3), out
        if not stated:
            must_say(out, "GDAL_NODATA", 0, "%", "soil")
    if stated:
        prepare(*settings, Progress(quiet=True), seed=0)
        return
    with pytest.raises(DataError) as caught:
        prepare(*settings, Progress(quiet=True), seed=0)
    must_say(caught.value, "GDAL_NODATA", 0, "%", "soil", "ignore: 0", "no_data: class")


@pytest.mark.parametrize("ignored", [False, True])
def test_labels_where_an_image_has_no_data_are_named(call: Call, tmp_path: Path, ignored: bool) -> None:
    tree(tmp_path, [both(1, 2)] * 6)
    for place in sorted((tmp_path / "images").iterdir()):
        pixels = np.maximum(np.asarray(Image.open(place)), 1)
        pixels[:, :16] = 0
        Image.fromarray(pixels).save(place)
        mask = np.asarray(Image.open(tmp_path / "masks" / place.name)).copy()
        mask[:, :16] = 255 if ignored else 1
        Image.fromarray(mask).save(tmp_path / "masks" / place.name)
    geotiffs(tmp_path / "images", "0")
    file = tmp_path / "data.yaml"
    file.write_text("images: images\nmasks: masks\nsplit: {val: 0.3}\nclasses: [soil, road, tree]\n")
    for _ in range(2):
        code, out, _ = call("data", "check", file)
        assert code == 0
        assert ("no-data-image" in out) is not ignored
        if not ignored:
            must_say(out, "GDAL_NODATA", "road (25.0 %")


@pytest.mark.parametrize("value", [-9999, 0.5])
def test_no_data_outside_of_the_range_of_channels_is_an_error(
    call: Call, tmp_path: Path, value: float
) -> None:
    tree(tmp_path, [both(1, 2)] * 6)
    for place in sorted((tmp_path / "images").iterdir()):
        heights = np.random.default_rng(int(place.stem)).random(SIZE, np.float32)
        heights[:4] = value
        Image.fromarray(heights).save(place.with_suffix(".tif"), tiffinfo={42113: str(value)})
        place.unlink()
    file = tmp_path / "data.yaml"
    file.write_text(
        "images: images\nmasks: masks\nsplit: {val: 0.3}\nclasses: [soil, road, tree]\n"
        "channels: {names: [height], bits: 32, range: [0, 1]}\n"
    )
    code, out, _ = call("data", "check", file)
    assert code == (3 if value < 0 else 0), out
    must_say(out, *(["GDAL_NODATA", -9999, "channels.range"] if value < 0 else ["GDAL_NODATA", "soil"]))


# ---------------------------------------------------------------- names of ids


@pytest.mark.parametrize(
    ("ids", "file", "options", "expected"),
    [
        ((1, 2), "road\ntree\nbuilding\n", (), None),
        ((1, 2), "road\ntree\nbuilding\n", ("--names-from", 1), ["background", "road", "tree", "building"]),
        ((1, 2), "road\ntree\nbuilding\n", ("--names-from", 0), ["road", "tree", "building"]),
        ((1, 2), "background\nroad\ntree\nbuilding\n", (), ["background", "road", "tree", "building"]),
        ((1, 3), "null\na\nb\nc\nd\n", (), ["null", "a", "b", "c", "d"]),
        ((1, 2), "road\ntree\n", (), ["background", "road", "tree"]),
        ((1, 2), "0 drivable\n1 grass\n2 water\n", (), ["drivable", "grass", "water"]),
        ((1, 7), "7: tree\n1: road\n", (), {0: "background", 1: "road", 7: "tree"}),
        ((1, 2), "", ("--classes", "drivable,grass,water"), ["drivable", "grass", "water"]),
        ((1, 13), "", (), {0: "background", 1: "class_1", 13: "class_13"}),
    ],
)
def test_names_meet_ids(
    call: Call, tmp_path: Path, ids: tuple[int, int], file: str, options: tuple, expected: object
) -> None:
    root, out = tree(tmp_path / "site", [both(*ids)] * 6, file), tmp_path / "data.yaml"
    code, _, err = call("data", "init", root, *options, "--out", out)
    if expected is None:
        assert code == 2
        must_say(err, "0 = road", "1 = tree", "--names-from 0")
        must_say(err, "1 = road", "building", "--names-from 1")
        assert not out.exists()
        return
    assert code == 0, err
    assert keys_of(out)["classes"] == expected
    names = list(expected.values() if isinstance(expected, dict) else expected)
    assert keys_of(out)["background"] == ("background" if "background" in names else None)


def test_two_readings_are_asked_about_on_a_terminal(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["\n", "2\n"]

    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return answers.pop(0)

    monkeypatch.setattr("sys.stdin", Terminal())
    root = tree(tmp_path / "site", [both(1, 2)] * 6, "road\ntree\nbuilding\n")
    code, out, _ = call("data", "init", root, "--out", tmp_path / "data.yaml")
    assert code == 0
    must_say(out, "2)", "1 = road", "--names-from 1")
    assert keys_of(tmp_path / "data.yaml")["classes"] == ["background", "road", "tree", "building"]


# ---------------------------------------------------------------- black and white, lossy, alpha


def lossy(mask: np.ndarray) -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "JPEG", quality=90)
    return Image.open(file).convert("L")


def alpha(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([np.zeros((*SIZE, 3), np.uint8), mask]), "RGBA")


REFUSED = {
    "0/1 beside 0/255": ([square(1 if i % 2 else 255, (5 + i, 5)) for i in range(8)], ("255", "50.0 %", "NAME=255")),
    "JPEG residue": ([lossy(square(255, (5 + i, 6))) for i in range(8)], ("crowd", "0-127", "128-255")),
    "253 to 255": ([square(253 + i % 3) for i in range(8)], ("253-255", "NAME=128-255")),
    "0/1 beside 0/254": ([square(1 if i % 2 else 254) for i in range(8)], ("254", "50.0 %")),
    "spread evenly": ([both(128, 255)] * 6, ("128", "255", "ignore=255")),
    "void covers most": ([np.where(both(1, 2) == 0, 255, both(1, 2)).astype(np.uint8)] * 6, ("255", "%", "50.0 %")),
    "only alpha": ([alpha(square(255, (5 + i, 5))) for i in range(8)], ("alpha", "0,0,0", "%")),
    "nothing": ([square(0)] * 6, ("nothing", "0")),
    "two ways to count": ([both(1, 2), both(1, 2), both(50, 100), both(50, 100)], ("never", "50, 100", "1, 2")),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused_with_its_figure(
    call: Call, tmp_path: Path, kind: str
) -> None:
    masks, facts = REFUSED[kind]
    code, _, err = call("data", "init", tree(tmp_path / "site", masks), "--out", tmp_path / "data.yaml")
    assert code == 3
    must_say(err, *facts)
    assert not (tmp_path / "data.yaml").exists()


def test_ties_decide(call: Call, tmp_path: Path) -> None:
    mixed = tree(tmp_path / "mixed", [square(1 if i % 2 else 255, (5 + i, 5)) for i in range(8)])
    file = tmp_path / "data.yaml"
    for tied, share in (("crack=1,crack=255", 1.0), ("crack=1,ignore=255", 0.5)):
        assert call("data", "init", mixed, "--classes", tied, "--out", file, "--force")[0] == 0
        assert call("data", "check", file)[0] == 0
        assert sum((m == 1).sum() for m in masks_of(file).values()) == share * 8 * 400
    grey = tree(tmp_path / "grey", [lossy(square(255, (5 + i, 6))) for i in range(8)])
    cut = "background=0-127,crack=128-255"
    assert call("data", "init", grey, "--classes", cut, "--out", file, "--force")[0] == 0
    assert sum((m == 1).sum() for m in masks_of(file).values()) == 8 * 400
    Image.fromarray(square(1)).save(grey / "masks/0.png")  # another annotator's 0/1 would become background
    code, out, _ = call("data", "check", file)
    assert code == 3
    must_say(out, "masks/0.png", "0, 1", "%")


def test_the_check_doubts_an_ignore_value_that_shows_objects(call: Call, tmp_path: Path) -> None:
    tree(tmp_path, [square(1 if i % 2 else 255, (5 + i, 5)) for i in range(8)])
    file = tmp_path / "data.yaml"
    text = "images: images\nmasks: masks\nsplit: {val: 0.2, seed: 0}\nclasses: [background, crack]\n"
    for line, code in (("", 3), ("ignore: 255\n", 3), ("void_share: 0.1\n", 0), ("void_share: 0.01\n", 3)):
        file.write_text(text + line)
        found, out, _ = call("data", "check", file, "--no-cache")
        assert found == code
        if code:
            must_say(out, "ERROR", "void-share")


def test_transparent_background_is_no_fault(tmp_path: Path) -> None:
    masks = []
    for i in range(6):
        shape = square(255, (5 + i, 5))
        rgb = np.zeros((*SIZE, 3), np.uint8)
        rgb[shape > 0] = RED
        masks.append(Image.fromarray(np.dstack([rgb, shape]), "RGBA"))
    data.init(
        tree(tmp_path / "site", masks), classes=["crack=255,0,0"], out=tmp_path / "data.yaml", quiet=True
    )
    assert data.check(tmp_path / "data.yaml", quiet=True).ok


# ---------------------------------------------------------------- random trees


SEEDS = (*range(6), 13, 24, 157, 159, 199, 314, 400, 402, 441, 731, 5208, 10254, 20590, 30158, 30837, 31064)
"""The first ones, and those whose labels were wrong once."""


@pytest.mark.parametrize("seed", SEEDS)
def test_random_trees_are_right_or_refused(tmp_path: Path, seed: int) -> None:
    what, why, tree = label_trees.outcome(seed, tmp_path)
    assert what != "wrong", (why, tree.way, tree.saying)


@pytest.mark.slow
def test_many_random_trees_are_right_or_refused(tmp_path: Path) -> None:
    found = [label_trees.outcome(seed, tmp_path / str(seed))[0] for seed in range(60)]
    assert "wrong" not in found
    assert found.count("right") > 20
