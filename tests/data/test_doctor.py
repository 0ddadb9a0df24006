from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from everseg.data.base import Dataset
from everseg.data.datasets.files import FileSplit
from everseg.data.doctor import doctor
from everseg.errors import ConfigError, DataError
from everseg.labels import RawLabels
from saying import must_say

LABELS = RawLabels({0: "ground", 1: "cat", 2: "dog"})


class Folder:
    """A small healthy data set in files; tests break single files of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rng = np.random.default_rng(0)
        self.samples: dict[str, list[tuple[str, str, str]]] = {"train": [], "val": [], "test": []}
        for split, count in (("train", 4), ("val", 2), ("test", 1)):
            for i in range(count):
                self.add(split, f"{split[0]}{i}", np.array([[0, 1, 1], [2, 2, 255]]))

    def add(self, split: str, name: str, mask: np.ndarray) -> None:
        sample = (name, f"{split}/{name}.png", f"{split}/{name}_mask.png")
        (self.root / split).mkdir(exist_ok=True)
        image = self.rng.integers(0, 256, (*mask.shape, 3)).astype(np.uint8)
        Image.fromarray(image).save(self.root / sample[1])
        Image.fromarray(mask.astype(np.uint8)).save(self.root / sample[2])
        self.samples[split].append(sample)

    def image(self, split: str, name: str) -> Path:
        return self.root / split / f"{name}.png"

    def mask(self, split: str, name: str) -> Path:
        return self.root / split / f"{name}_mask.png"

    def dataset(self, labels: RawLabels = LABELS) -> Dataset:
        return Dataset("pets", labels, {n: FileSplit(n, self.root, s) for n, s in self.samples.items()})

    def check(self, labels: RawLabels = LABELS, **options) -> doctor.Report:
        return doctor.check(self.dataset(labels), **options)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def only(report: doctor.Report, code: str) -> doctor.Finding:
    (finding,) = report.findings
    assert finding.code == code
    return finding


def test_a_healthy_set_has_no_finding_and_the_right_class_table(folder):
    seen = []
    report = folder.check(progress=lambda done, total: seen.append((done, total)))
    assert report.findings == ()
    assert report.ok
    assert seen == [(i, 7) for i in range(1, 8)]
    assert [(row.id, row.name) for row in report.classes] == [(0, "ground"), (1, "cat"), (2, "dog")]
    assert dict(report.classes[1].images) == {"train": 4, "val": 2, "test": 1}
    assert dict(report.classes[1].pixels) == {"train": 8, "val": 4, "test": 2}
    assert dict(report.classes[0].pixels) == {"train": 4, "val": 2, "test": 1}
    assert report.summary().endswith("0 errors, 0 warnings, 0 notes: ready to train.")


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


@pytest.mark.parametrize(
    "spoil", [cut, lambda p: p.write_bytes(b""), lambda p: p.write_text("<html>"), Path.unlink]
)
def test_an_image_that_cannot_be_read(folder, spoil):
    spoil(folder.image("train", "t2"))
    report = folder.check()
    finding = only(report, "unreadable-image")
    assert (finding.level, finding.split, finding.sample) == ("error", "train", "t2")
    assert str(folder.image("train", "t2")) in finding.message
    assert not report.ok


@pytest.mark.parametrize("spoil", [cut, lambda p: p.write_bytes(b""), Path.unlink])
def test_a_mask_that_cannot_be_read(folder, spoil):
    spoil(folder.mask("val", "v1"))
    finding = only(folder.check(), "unreadable-mask")
    assert (finding.split, finding.sample) == ("val", "v1")
    assert str(folder.mask("val", "v1")) in finding.message


def test_image_and_mask_of_one_sample_both_bad_are_both_listed(folder):
    cut(folder.image("train", "t0"))
    cut(folder.mask("train", "t0"))
    assert {f.code for f in folder.check().findings} == {"unreadable-image", "unreadable-mask"}


def test_both_are_listed_for_a_reader_that_stops_at_the_mask(folder):
    class MaskFirst(FileSplit):
        def read(self, index):
            self.read_mask(index)
            return super().read(index)

    cut(folder.image("train", "t0"))
    cut(folder.mask("train", "t0"))
    dataset = Dataset("pets", LABELS, {"train": MaskFirst("train", folder.root, folder.samples["train"])})
    findings = doctor.check(dataset).findings
    assert [f.code for f in findings] == ["unreadable-mask", "unreadable-image"]
    assert str(folder.image("train", "t0")) in findings[1].message


def test_a_mask_of_another_size(folder):
    Image.fromarray(np.zeros((5, 3), np.uint8)).save(folder.mask("train", "t1"))
    finding = only(folder.check(), "size-mismatch")
    assert "3x5" in finding.message
    assert "3x2" in finding.message


def test_a_colour_mask(folder):
    Image.new("RGB", (3, 2), (128, 0, 0)).save(folder.mask("train", "t1"))
    assert "[128, 0, 0]" in only(folder.check(), "colour-mask").message


def test_a_lossy_mask(folder):
    Image.new("L", (3, 2)).save(folder.mask("train", "t1"), format="JPEG")
    assert "PNG" in only(folder.check(), "lossy-mask").remedy


def test_a_mask_of_ids_beyond_a_byte(folder):
    Image.fromarray(np.full((2, 3), 26001, np.uint16)).save(folder.mask("train", "t1"))
    assert "26001" in only(folder.check(), "bad-mask").message


def test_undeclared_ids_with_pixel_counts_and_a_fitting_remedy(folder):
    Image.fromarray(np.array([[0, 1, 9], [9, 7, 2]], np.uint8)).save(folder.mask("val", "v0"))
    finding = only(folder.check(), "undeclared-id")
    assert (finding.split, finding.sample) == ("val", "v0")
    assert finding.message == "id 7 (1 pixel), id 9 (2 pixels); declared: 0-2, 255"
    assert "Declare these ids" in finding.remedy


def test_a_mask_of_void_only_is_a_warning(folder):
    folder.add("train", "empty", np.full((2, 2), 255))
    report = folder.check()
    assert only(report, "all-void").sample == "empty"
    assert report.ok


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_a_picture_of_one_row_is_a_warning_and_a_small_one_is_fine(folder, shape):
    folder.add("train", "thin", np.zeros(shape))
    folder.add("train", "small", np.zeros((2, 2)))
    assert only(folder.check(), "tiny-image").sample == "thin"


def test_a_declared_class_that_no_image_has(folder):
    report = folder.check(RawLabels({**LABELS.names, 3: "bird"}))
    must_say(only(report, "class-missing").message, "class 3 'bird'", "no image")
    assert report.ok


def test_a_class_outside_training_only(folder):
    labels = RawLabels({**LABELS.names, 3: "bird"})
    folder.add("val", "b", np.full((2, 2), 3))
    must_say(only(folder.check(labels), "class-untrained").message, "class 3 'bird'", "only in val")


def test_a_class_in_two_training_images_is_rare_and_in_three_is_not(folder):
    labels = RawLabels({**LABELS.names, 3: "bird"})
    for i in range(2):
        folder.add("train", f"b{i}", np.full((2, 2), 3))
    assert "2 training images only" in only(folder.check(labels), "class-rare").message
    folder.add("train", "b2", np.full((2, 2), 3))
    assert folder.check(labels).findings == ()


def test_a_training_image_in_another_split_is_an_error(folder):
    folder.image("val", "v1").write_bytes(folder.image("train", "t3").read_bytes())
    report = folder.check()
    finding = only(report, "same-image")
    assert (finding.level, finding.split, finding.sample) == ("error", "val", "v1")
    assert finding.message == "byte-identical to train/t3"


def test_val_and_test_sharing_some_images_is_a_warning_and_all_a_note(folder):
    folder.image("test", "t0").write_bytes(folder.image("val", "v1").read_bytes())
    assert only(folder.check(), "same-image").level == "warning"
    folder.samples["test"] = folder.samples["val"]
    finding = only(folder.check(), "same-split")
    assert finding.level == "note"
    assert finding.message == "holds the same 2 images as 'val'"


def test_what_the_reader_corrected_is_passed_on(folder):
    dataset = folder.dataset()
    dataset.splits["train"].warnings = ("list.txt: 2 duplicate entries, used once",)
    must_say(only(doctor.check(dataset), "list").message, "list.txt", "2 duplicate entries")


class Arrays:
    """A split that does not lie in files."""

    def __init__(self, name: str, items: list) -> None:
        self.name, self.items = name, items

    def __len__(self) -> int:
        return len(self.items)

    def id(self, index: int) -> str:
        return f"{self.name}{index}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]

    def read_mask(self, index: int) -> np.ndarray:
        return self.read(index)[1]

    def fingerprint(self) -> str:
        return ""


def picture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(seed).integers(0, 256, (2, 3, 3)).astype(np.uint8)
    return image, np.array([[0, 1, 2], [0, 1, 2]], np.uint8)


def test_splits_without_files_are_checked_too():
    train = Arrays("train", [picture(i) for i in range(70)])
    val = Arrays("val", [picture(33), DataError("broken"), (np.zeros((4, 4, 3), np.uint8), picture(0)[1])])
    report = doctor.check(Dataset("made", LABELS, {"train": train, "val": val}), workers=2)
    assert [(f.code, f.sample) for f in report.findings] == [
        ("bad-mask", "val1"),
        ("size-mismatch", "val2"),
        ("same-image", "val0"),
    ]
    assert report.findings[2].message == "byte-identical to train/train33"
    assert report.classes[1].images["train"] == 70


def test_an_empty_split_is_an_error():
    dataset = Dataset(
        "made", LABELS, {"train": Arrays("train", [picture(i) for i in range(3)]), "val": Arrays("val", [])}
    )
    assert only(doctor.check(dataset), "empty-split").split == "val"


def test_all_faults_come_at_once_and_the_summary_lists_every_one(folder):
    labels = RawLabels({**LABELS.names, 3: "bird"})
    for i in range(30):
        folder.add("train", f"x{i:02d}", np.full((2, 2), 50))
    cut(folder.image("val", "v0"))
    folder.add("train", "esc\x1b[31m", np.full((2, 2), 255))
    report = folder.check(labels)
    text = report.summary()
    assert all(f"train/x{i:02d}" in text for i in range(30))
    assert text.count("id 50 (4 pixels)") == 3
    assert "ERROR undeclared-id (30)" in text
    assert "ERROR unreadable-image (1)" in text
    assert "WARNING class-missing (1)" in text
    assert "\x1b" not in text
    assert "esc\\x1b[31m" in text
    assert text.endswith("31 errors, 2 warnings, 0 notes: correct the errors before training.")
    assert text.index("ERROR unreadable-image") < text.index("WARNING all-void")


def test_the_report_goes_through_json(folder):
    cut(folder.image("train", "t2"))
    report = folder.check()
    data = json.loads(json.dumps(report.to_json()))
    assert data["ok"] is False
    assert data["findings"][0]["code"] == "unreadable-image"
    assert data["classes"][1] == {
        "id": 1,
        "name": "cat",
        "colours": [],
        "images": {"train": 3, "val": 2, "test": 1},
        "pixels": {"train": 6, "val": 4, "test": 2},
    }


def test_chosen_splits_only(folder):
    cut(folder.image("train", "t2"))
    assert folder.check(splits=["val"]).findings == ()
    with pytest.raises(DataError, match="no split"):
        folder.check(splits=["trian"])


def test_a_build_that_fails_is_a_finding_but_a_wrong_option_is_not(folder):
    def unpaired():
        raise DataError("images: 2 images without mask: a.png, b.png")

    report = doctor.check_source(unpaired)
    assert only(report, "layout").message == "images: 2 images without mask: a.png, b.png"
    assert not report.ok
    assert "a.png" in report.summary()
    assert doctor.check_source(folder.dataset).images == {"train": 4, "val": 2, "test": 1}

    def wrong():
        raise ConfigError("data.roto: unknown key")

    with pytest.raises(ConfigError):
        doctor.check_source(wrong)


def test_what_many_samples_share_is_written_out_a_few_times_and_every_sample_is_named() -> None:
    many = [
        doctor.finding("error", "unreadable-image", "train", f"{n:02}", f"/data/{n:02}.png: 16 bits")
        for n in range(9)
    ]
    other = doctor.finding("error", "unreadable-image", "train", "other", "/data/other.png: is a text")
    lines = doctor.Report("street", (*many, other)).summary().splitlines()
    assert sum("16 bits" in line for line in lines) == 3
    must_say(next(line for line in lines if "same" in line), "6", "train/03", "train/08")
    assert any("other.png: is a text" in line for line in lines)


def test_classes_are_not_missed_where_no_image_could_be_read(folder: Folder) -> None:
    for mask in folder.root.rglob("*_mask.png"):
        mask.write_bytes(b"no picture")
    assert {one.code for one in folder.check().findings} == {"unreadable-mask"}
    folder.add("train", "seen", np.ones((2, 2)))
    missing = [one.message for one in folder.check().findings if one.code == "class-missing"]
    assert missing
    assert all("could be read" in one for one in missing)
