"""Masks from polygon files: where, once, whole, and by name where not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from everseg.config.fields import DataConfig
from everseg.data.datasets import load_dataset
from everseg.data.get import draw_masks as module
from everseg.data.get.draw_masks import Prepared, prepare
from everseg.errors import ConfigError, DataError
from saying import must_say

ENDING = {"idd": "_gtFine_labellevel3Ids.png", "cityscapes": "_gtFine_labelTrainIds.png"}
CAR = {"idd": 9, "cityscapes": 13}


def annotate(root: Path, name: str, *, label: str = "car", size: tuple[int, int] = (3, 5)) -> Path:
    """A polygon file `SPLIT/FOLDER/X` whose upper two rows are a car."""
    points = [[0, 0], [size[1] - 1, 0], [size[1] - 1, 1], [0, 1]]
    content = {"imgHeight": size[0], "imgWidth": size[1], "objects": [{"label": label, "polygon": points}]}
    path = root / "gtFine" / f"{name}_gtFine_polygons.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def mask_of(file: Path, kind: str) -> Path:
    return file.with_name(file.name.removesuffix("_gtFine_polygons.json") + ENDING[kind])


def pixels(path: Path) -> list[list[int]]:
    with Image.open(path) as picture:
        assert (picture.mode, picture.format) == ("L", "PNG")
        return np.asarray(picture).tolist()


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("kind", ["idd", "cityscapes"])
def test_every_polygon_file_gets_its_mask_beside_it(tmp_path: Path, kind: str) -> None:
    files = [annotate(tmp_path, name) for name in ("train/1/a", "train/2/a", "val/3/b")]
    assert prepare(kind, tmp_path) == Prepared(3, 0, ())
    for file in files:
        car = CAR[kind]
        assert pixels(mask_of(file, kind)) == [[car] * 5, [car] * 5, [255] * 5]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("idd", ("IDD_Segmentation", "idd20kII")),
        ("idd", ("idd-segmentation/IDD_Segmentation", "idd-20k-II/idd20kII")),
        ("cityscapes", ("cityscapes",)),
    ],
)
def test_the_folder_above_is_enough(tmp_path: Path, kind: str, places: tuple[str, ...]) -> None:
    files = [annotate(tmp_path / place, "train/1/a") for place in places]
    assert prepare(kind, tmp_path).written == len(places)
    assert all(mask_of(file, kind).exists() for file in files)


@pytest.mark.parametrize("kind", ["idd", "cityscapes"])
def test_the_reader_finds_what_was_prepared(tmp_path: Path, kind: str) -> None:
    annotate(tmp_path, "train/1/a")
    image = tmp_path / "leftImg8bit/train/1/a_leftImg8bit.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (5, 3)).save(image)
    with pytest.raises(DataError, match=f"everseg data prepare {kind}"):
        load_dataset(DataConfig(dataset=kind, root=str(tmp_path)))
    prepare(kind, tmp_path)
    dataset = load_dataset(DataConfig(dataset=kind, root=str(tmp_path)))
    assert dataset.splits["train"].read(0)[1].tolist() == [[CAR[kind]] * 5, [CAR[kind]] * 5, [255] * 5]
    assert dataset.labels.names[CAR[kind]] == "car"


def test_whole_masks_are_kept_until_they_shall_be_overwritten(tmp_path: Path) -> None:
    file = annotate(tmp_path, "train/1/a")
    mask = mask_of(file, "idd")
    Image.new("L", (5, 3), 7).save(mask)
    before = mask.read_bytes()
    assert prepare("idd", tmp_path) == Prepared(0, 1, ())
    assert mask.read_bytes() == before
    assert prepare("idd", tmp_path, overwrite=True) == Prepared(1, 0, ())
    assert pixels(mask) == [[9] * 5, [9] * 5, [255] * 5]


def spoil_cut(mask: Path) -> None:
    mask.write_bytes(mask.read_bytes()[:-30])


def spoil_empty(mask: Path) -> None:
    mask.write_bytes(b"")


def spoil_size(mask: Path) -> None:
    Image.new("L", (3, 5), 7).save(mask)


def spoil_ids(mask: Path) -> None:
    Image.fromarray(np.array([[9, 9, 9, 9, 30]] * 3, np.uint8)).save(mask)


def spoil_colour(mask: Path) -> None:
    Image.new("RGB", (5, 3)).save(mask)


SPOILT: list[tuple[Callable[[Path], None], str]] = [
    (spoil_cut, "damaged or cut off"),
    (spoil_empty, "is empty"),
    (spoil_size, "is 3x5, but the polygons are of 5x3"),
    (spoil_ids, "holds ids 30, which are not declared"),
    (spoil_colour, "a colour mask"),
    (Path.unlink, "has no mask"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=[s.__name__ for s, _ in SPOILT])
def test_masks_that_are_not_whole_are_found_by_the_check_and_drawn_again(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    file = annotate(tmp_path, "train/1/a")
    annotate(tmp_path, "train/1/b")
    prepare("idd", tmp_path)
    assert prepare("idd", tmp_path, check=True) == Prepared(0, 2, ())
    mask = mask_of(file, "idd")
    good = mask.read_bytes()
    spoil(mask)
    bad = mask.read_bytes() if mask.exists() else None
    found = prepare("idd", tmp_path, check=True)
    assert (found.written, found.kept, len(found.faults)) == (0, 1, 1)
    assert found.faults[0].startswith(f"{file}: ")
    assert message in found.faults[0]
    assert (mask.read_bytes() if mask.exists() else None) == bad, "the check writes nothing"
    assert prepare("idd", tmp_path) == Prepared(1, 1, ())
    assert mask.read_bytes() == good


def test_faulty_files_are_all_named_and_the_others_drawn(tmp_path: Path) -> None:
    good = [annotate(tmp_path, f"train/1/good{i}") for i in range(2)]
    unknown = annotate(tmp_path, "train/1/odd", label="ufo")
    broken = [annotate(tmp_path, f"val/1/bad{i}") for i in range(25)]
    for path in broken:
        path.write_text("[1")
    done = prepare("idd", tmp_path)
    assert (done.written, done.kept) == (2, 0)
    assert [fault.partition(": ")[0] for fault in done.faults] == [str(unknown), *sorted(map(str, broken))]
    assert "'ufo'" in done.faults[0]
    assert all(mask_of(file, "idd").exists() for file in good)
    assert not any(mask_of(file, "idd").exists() for file in [unknown, *broken])
    assert prepare("idd", tmp_path, skip_unknown=True).written == 1
    assert pixels(mask_of(unknown, "idd")) == [[255] * 5] * 3


def test_links_folders_and_pipes_in_place_of_files_are_named(tmp_path: Path) -> None:
    annotate(tmp_path, "train/1/a")
    folder = tmp_path / "gtFine/train/1"
    (folder / "b_gtFine_polygons.json").mkdir()
    (folder / "c_gtFine_polygons.json").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "d_gtFine_polygons.json")
    blocked = annotate(tmp_path, "train/1/e")
    mask_of(blocked, "idd").mkdir()
    faults = prepare("idd", tmp_path).faults
    assert [Path(f.partition(": ")[0]).name[0] for f in faults] == ["b", "c", "d", "e"]
    assert "cannot be written" in faults[3]


def test_companion_files_of_other_systems_are_not_annotations(tmp_path: Path) -> None:
    annotate(tmp_path, "train/1/a")
    (tmp_path / "gtFine/train/1/._a_gtFine_polygons.json").write_bytes(b"\0\5")
    assert prepare("idd", tmp_path) == Prepared(1, 0, ())


def test_several_processes_make_the_same_masks_and_report_progress(tmp_path: Path) -> None:
    names = [f"train/{i % 3}/{i:03}" for i in range(70)]
    for place in ("one", "two"):
        for i, name in enumerate(names):
            annotate(tmp_path / place, name, size=(2 + i % 5, 3 + i % 7))
    seen: list[tuple[int, int]] = []
    prepare("idd", tmp_path / "one", workers=1)
    done = prepare("idd", tmp_path / "two", workers=2, progress=lambda n, total: seen.append((n, total)))
    assert done == Prepared(70, 0, ())
    assert seen[-1] == (70, 70)
    for file in (tmp_path / "one").rglob("*.png"):
        other = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert other.read_bytes() == file.read_bytes()


def test_a_full_disk_stops_and_leaves_no_partial_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = annotate(tmp_path, "train/1/a")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        prepare("idd", tmp_path)
    assert not mask_of(file, "idd").exists()
    assert leftovers(tmp_path) == []


def test_a_new_mask_takes_the_place_of_the_old_one_which_is_never_written_to(tmp_path: Path) -> None:
    mask = mask_of(annotate(tmp_path, "train/1/a"), "idd")
    Image.new("L", (5, 3), 7).save(mask)
    old = mask.read_bytes()
    os.link(mask, tmp_path / "second name")
    prepare("idd", tmp_path, overwrite=True)
    assert (tmp_path / "second name").read_bytes() == old != mask.read_bytes()


def test_a_mask_that_reads_back_differently_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotate(tmp_path, "train/1/a")
    blank = Image.new("L", (5, 3), 255)

    def faulty_disk(path: Path, _: bytes) -> None:
        blank.save(path)

    monkeypatch.setattr(module, "write_atomically", faulty_disk)
    done = prepare("idd", tmp_path)
    assert done.written == 0
    must_say(done.faults[0], "read back")


KILLED = """
import os, signal, sys
from everseg.data.get.draw_masks import prepare

real, seen = os.fsync, []

def fsync(handle):
    seen.append(handle)
    if len(seen) == 11:  # the sixth mask; each flushes its file and its folder
        os.killpg(0, signal.SIGKILL)
    real(handle)

os.fsync = fsync
prepare("idd", sys.argv[1], workers=2)
"""


def test_a_kill_leaves_whole_masks_only_and_the_next_call_does_the_rest(tmp_path: Path) -> None:
    for i in range(100):
        annotate(tmp_path, f"train/1/{i:03}")
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], start_new_session=True, timeout=60, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    masks = list(tmp_path.rglob("*.png"))
    assert 5 <= len(masks) < 100
    assert leftovers(tmp_path), "killed between writing and renaming"
    assert all(pixels(mask) == [[9] * 5, [9] * 5, [255] * 5] for mask in masks)
    assert prepare("idd", tmp_path) == Prepared(100 - len(masks), len(masks), ())
    assert prepare("idd", tmp_path, check=True) == Prepared(0, 100, ())


def test_wrong_arguments_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'voc'.*cityscapes, idd"):
        prepare("voc", tmp_path)
    with pytest.raises(ConfigError, match=r"none .*not a folder"):
        prepare("idd", tmp_path / "none")
    with pytest.raises(DataError, match="folder that holds gtFine/"):
        prepare("idd", tmp_path)
    with pytest.raises(ConfigError, match="choose one"):
        prepare("idd", tmp_path, overwrite=True, check=True)


def test_the_command_says_what_it_did_and_fails_where_files_were_refused(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    annotate(tmp_path, "train/1/a")
    code, out, err = call("data", "prepare", "cityscapes", tmp_path)
    assert (code, out.startswith("1 mask written, 0 kept, 0 files refused in ")) == (0, True)
    assert "preparing cityscapes  1/1" in err
    bad = annotate(tmp_path, "train/1/b", label="ufo")
    code, out, err = call("data", "prepare", "cityscapes", tmp_path)
    assert (code, out.startswith("0 masks written, 1 kept, 1 file refused in ")) == (3, True)
    assert f"{bad}: " in err
    assert "'ufo'" in err
    assert "--skip-unknown" in err
    code, out, _ = call("data", "prepare", "cityscapes", tmp_path, "--skip-unknown")
    assert code == 0
    code, out, _ = call("data", "prepare", "cityscapes", tmp_path, "--check")
    assert (code, out.startswith("2 masks whole, 0 files refused in ")) == (0, True)


def test_the_command_prints_the_weights(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    annotate(tmp_path, "train/1/a")
    image = tmp_path / "leftImg8bit/train/1/a_leftImg8bit.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (5, 3)).save(image)
    prepare("cityscapes", tmp_path)
    code, out, _ = call("data", "weights", "cityscapes", f"root={tmp_path}", "--json", "--encoder")
    report: dict[str, Any] = json.loads(out)
    rows = {row["name"]: (row["pixels"], row["weight"]) for row in report["classes"]}
    assert (code, report["constant"], len(rows)) == (0, 1.2, 20)
    # 10 car and 5 void pixels of 15, and one more for each of the 20 outputs: car has 11 of 35
    assert rows["car"] == (10, pytest.approx(1 / np.log(1.2 + 11 / 35)))
    assert rows["void"] == (5, 0.0)
    code, out, _ = call("data", "weights", "cityscapes", f"root={tmp_path}")
    assert code == 0
    line = next(line for line in out.splitlines() if "car" in line)
    assert line.split() == ["car", "10", f"{1 / np.log(1.1 + 11 / 35):.6f}"]
