from __future__ import annotations

import builtins
import io
import itertools
import math
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from everseg.engine.events import Events, safe_tag, safe_tags
from everseg.engine.tensorboard import tensorboard
from everseg.inference.pictures import confusion_picture, legend, triplet
from everseg.metrics import sequence_scores
from saying import must_say

NAMES = ["background", "road", "sky/<b>"]
COUNTS = np.array([[8, 1, 1], [0, 5, 5], [0, 0, 0]], dtype=np.int64)
SCORES = {
    "miou": {"all": 0.6, "base": 0.7, "old": 0.65, "new": None},
    "miou_without_background": {"all": 0.5, "base": 0.4, "old": 0.45, "new": math.nan},
    "overall_accuracy": 0.65,
    "harmonic_mean": None,
    "class_iou": [0.8, 0.45, None],
    "class_accuracy": [0.8, 0.5, math.nan],
    "classes": NAMES,
}


def in_files(folder: Path, notify=None) -> Events:
    return Events(tensorboard(folder, notify), notify=notify)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Every look at the clock is a second later: `SummaryWriter` names its files after the second."""
    module = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: next(seconds)))


@pytest.fixture
def read():
    """Read a folder back the way TensorBoard does."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def events(folder: Path):
        found = accumulators.EventAccumulator(
            str(folder), size_guidance=accumulators.STORE_EVERYTHING_SIZE_GUIDANCE
        )
        return found.Reload()

    return events


def series(found, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 6)) for event in found.Scalars(tag)]


def text_of(found, tag: str) -> str:
    return found.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def picture_of(found, tag: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(found.Images(tag)[-1].encoded_image_string)))


def sample(height: int = 6, width: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    return image, np.full((height, width), 255, dtype=np.int64), np.ones((height, width), dtype=np.uint8)


def train(events: Events, iterations: range, shift: float = 0.0) -> None:
    for iteration in iterations:
        events.scalars(iteration, {"ce": iteration + shift}, lr=0.1, images_per_second=2.0)


def test_training_numbers_stand_under_their_tags_at_the_iteration(tmp_path, read):
    events = in_files(tmp_path)
    assert events.active
    events.scalars(
        7,
        {"ce": 1.5, "kd": 0.25},
        lr=0.01,
        images_per_second=12.5,
        data_wait=0.25,
        grad_norm=3.0,
        memory=2**30,
        gpu_memory=2**31,
        extra={"pseudo_label_share": 0.5},
    )
    events.close()
    found = read(tmp_path)
    expected = {
        "train/loss": 1.75,
        "train/loss/ce": 1.5,
        "train/loss/kd": 0.25,
        "train/lr": 0.01,
        "train/grad_norm": 3.0,
        "train/pseudo_label_share": 0.5,
        "sys/img_s": 12.5,
        "sys/data_wait": 0.25,
        "sys/mem": 1.0,
        "sys/gpu_mem": 2.0,
    }
    assert {tag: series(found, tag) for tag in found.Tags()["scalars"]} == {
        tag: [(7, value)] for tag, value in expected.items()
    }


def test_absent_measurements_leave_no_curve_and_groups_of_lr_have_one_each(tmp_path, read):
    events = in_files(tmp_path)
    events.scalars(1, {"ce": 1.0}, lr={"encoder": 0.1, "head": 1.0}, images_per_second=1.0)
    events.close()
    assert sorted(read(tmp_path).Tags()["scalars"]) == [
        "sys/img_s",
        "train/loss",
        "train/loss/ce",
        "train/lr/encoder",
        "train/lr/head",
    ]


def test_a_diverged_loss_is_shown_as_such(tmp_path, read):
    events = in_files(tmp_path)
    events.scalars(1, {"ce": math.inf, "kd": -math.inf}, lr=0.1, images_per_second=1.0)
    events.close()
    found = read(tmp_path)
    assert found.Scalars("train/loss/ce")[0].value == math.inf
    assert math.isnan(found.Scalars("train/loss")[0].value)


def test_evaluation_writes_groups_classes_and_leaves_out_absent_scores(tmp_path, read):
    events = in_files(tmp_path)
    events.evaluation(30, 1, NAMES, SCORES, COUNTS, background=0)
    events.close()
    found = read(tmp_path)
    expected = {
        "val/miou/all": 0.6,
        "val/miou/base": 0.7,
        "val/miou/old": 0.65,
        "val/miou_without_background/all": 0.5,
        "val/miou_without_background/base": 0.4,
        "val/miou_without_background/old": 0.45,
        "val/overall_accuracy": 0.65,
        "val/iou/background": 0.8,
        "val/iou/road": 0.45,
    }
    assert {tag: series(found, tag) for tag in found.Tags()["scalars"]} == {
        tag: [(30, value)] for tag, value in expected.items()
    }


def test_evaluation_writes_a_table_of_classes(tmp_path, read):
    events = in_files(tmp_path)
    events.evaluation(30, 1, NAMES, SCORES, COUNTS, background=0)
    events.close()
    assert text_of(read(tmp_path), "val/classes").splitlines() == [
        "Step 1, iteration 30",
        "",
        "| id | class | iou | accuracy | label pixels |",
        "|---:|:---|---:|---:|---:|",
        "| 0 | background | 80.00 | 80.00 | 10 |",
        "| 1 | road | 45.00 | 50.00 | 10 |",
        "| 2 | sky/&#60;b&#62; | - | - | 0 |",
    ]


def test_evaluation_writes_pictures_of_samples_confusion_and_legend(tmp_path, read):
    events = in_files(tmp_path)
    large = sample(300, 1000)
    events.evaluation(30, 1, NAMES, SCORES, COUNTS, [sample(), large], background=0)
    events.evaluation(40, 1, NAMES, SCORES, COUNTS, [sample()], background=0)
    events.close()
    found = read(tmp_path)
    assert sorted(found.Tags()["images"]) == ["val/confusion", "val/legend", "val/pred/0", "val/pred/1"]
    np.testing.assert_array_equal(picture_of(found, "val/pred/0"), triplet(*sample(), background=0))
    np.testing.assert_array_equal(picture_of(found, "val/confusion"), confusion_picture(COUNTS, NAMES))
    np.testing.assert_array_equal(picture_of(found, "val/legend"), legend(NAMES, background=0))
    assert picture_of(found, "val/pred/1").shape == (153, 1536, 3), "a large picture is reduced"
    assert [event.step for event in found.Images("val/pred/0")] == [30, 40]
    assert [event.step for event in found.Images("val/legend")] == [30], "once, until the classes change"


def test_domains_stand_apart(tmp_path, read):
    events = in_files(tmp_path)
    for domain, value in (("city", 0.5), ("country/side", 0.25)):
        events.evaluation(3, 0, NAMES, {"miou": {"all": value}}, COUNTS, domain=domain, background=0)
    events.close()
    found = read(tmp_path)
    assert series(found, "val/city/miou/all") == [(3, 0.5)]
    assert series(found, "val/country_side/miou/all") == [(3, 0.25)]
    assert "val/country_side/legend" in found.Tags()["images"]


def test_scores_of_the_sequence_have_short_tags(tmp_path, read):
    events = in_files(tmp_path)
    events.sequence(9, {"forgetting": 0.2, "backward_transfer": -0.1, "average_miou": 0.6, "absent": None})
    events.close()
    found = read(tmp_path)
    assert {tag: series(found, tag) for tag in found.Tags()["scalars"]} == {
        "cl/forgetting": [(9, 0.2)],
        "cl/bwt": [(9, -0.1)],
        "cl/avg_miou": [(9, 0.6)],
    }


def test_of_the_sequence_scores_only_single_numbers_are_written(tmp_path, read):
    """Lists per class or group and the matrix of steps stay in the files they come from."""
    events = in_files(tmp_path)
    first, second = np.diag([5, 5]), np.array([[5, 0, 0], [0, 0, 5], [0, 0, 5]])
    events.sequence(9, sequence_scores([first, second], [(2,), (2, 1)], background=0))
    events.close()
    found = read(tmp_path)
    assert series(found, "cl/forgetting/mean") == [(9, 0.5)]
    assert series(found, "cl/forgetting_without_background/mean") == [(9, 1.0)]
    assert sorted(found.Tags()["scalars"]) == [
        "cl/average_miou_without_background", "cl/avg_miou", "cl/backward_transfer_without_background/mean",
        "cl/bwt/mean", "cl/forgetting/mean", "cl/forgetting_without_background/mean",
    ]  # fmt: skip


def test_iterations_done_again_after_a_crash_show_once(tmp_path, read):
    first = in_files(tmp_path)
    train(first, range(1, 11))
    first.evaluation(10, 0, NAMES, SCORES, COUNTS, [sample()], background=0)
    first.close()
    resumed = in_files(tmp_path)
    train(resumed, range(6, 9), shift=0.5)
    resumed.close()
    found = read(tmp_path)
    expected = [(i, float(i)) for i in range(1, 6)] + [(i, i + 0.5) for i in range(6, 9)]
    assert series(found, "train/loss/ce") == expected
    assert series(found, "val/miou/all") == [], "what came after the crash point is gone"
    assert found.Images("val/pred/0") == []


def test_events_torn_by_a_kill_do_not_spoil_the_resumed_ones(tmp_path, read):
    first = in_files(tmp_path)
    train(first, range(1, 11))
    first.close()
    (file,) = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - 7)
    resumed = in_files(tmp_path)
    train(resumed, range(10, 12))
    resumed.close()
    assert series(read(tmp_path), "train/loss/ce") == [(i, float(i)) for i in range(1, 12)]


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("road", "road"),
        ("traffic light", "traffic light"),
        ("Fahrbahn-äöü 路面", "Fahrbahn-äöü 路面"),
        ("wall/other", "wall_other"),
        ("../../etc", "_.._etc"),
        ("<script>alert(1)</script>", "_script_alert_1_script_"),
        ("a\nb\x00c\x1b[0m", "a_b_c_0m"),
        ("x\ud800", "x_"),
        ("  .. ", "_"),
        ("", "_"),
        ("n" * 500, "n" * 80),
    ],
)
def test_any_class_name_becomes_a_harmless_tag(name, tag):
    assert safe_tag(name) == tag


def test_names_that_fall_together_keep_distinct_tags():
    assert safe_tags(["a/b", "a_b", "a<b", "a_b_2", "c"]) == ["a_b", "a_b_1", "a_b_2", "a_b_2_3", "c"]
    many = ["/"] * 300
    assert len(set(safe_tags(many))) == 300
    assert safe_tags(["a/b", "a_b"]) == safe_tags(["a/b", "a_b", "a|b"])[:2], "growing keeps the tags"


def test_hostile_class_names_go_through_the_whole_evaluation(tmp_path, read):
    names = ["a/b", "a_b", "<img src=x onerror=alert(1)>|\n# title\x00*b* `c` [d](e)"]
    events = in_files(tmp_path)
    events.scalars(1, {"kd/<x>\n": 1.0}, lr=0.1, images_per_second=1.0)
    events.evaluation(1, 0, names, SCORES | {"class_iou": [0.1, 0.2, 0.3]}, COUNTS, [sample()], background=0)
    events.close()
    found = read(tmp_path)
    iou = [tag for tag in found.Tags()["scalars"] if tag.startswith("val/iou/")]
    assert [round(found.Scalars(tag)[0].value, 6) for tag in iou] == [0.1, 0.2, 0.3]
    assert all(tag.count("/") == 2 and tag.isprintable() and "<" not in tag for tag in iou)
    assert "train/loss/kd_x_" in found.Tags()["scalars"]
    lines = text_of(found, "val/classes").splitlines()
    assert len(lines) == 7
    row = lines[-1]
    assert row.count("|") == 6
    assert not set("<>*`[]\x00") & set(row)


def test_scores_for_another_number_of_classes_are_refused(tmp_path, read):
    events = in_files(tmp_path)
    with pytest.raises(ValueError, match="class_iou has 2 entries for 3"):
        events.evaluation(1, 0, NAMES, {"class_iou": [0.1, 0.2]}, COUNTS, background=0)
    with pytest.raises(ValueError, match="C x C"):
        events.evaluation(1, 0, NAMES, {}, COUNTS[:2, :2], background=0)
    events.close()


def use_everything(events: Events) -> None:
    train(events, range(1, 3))
    events.evaluation(1, 0, NAMES, SCORES, COUNTS, [sample()], background=0)
    events.sequence(1, {"forgetting": 0.1})
    events.close()
    events.close()


@pytest.mark.parametrize("error", [ImportError("no tensorboard"), TypeError("broken descriptors")])
def test_without_a_working_tensorboard_one_note_says_how_to_get_it(tmp_path, monkeypatch, error):
    original = builtins.__import__

    def broken(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise error
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    notes: list[str] = []
    events = in_files(tmp_path / "events", notes.append)
    assert not events.active
    use_everything(events)
    assert len(notes) == 1
    assert str(error) in notes[0]
    assert "pip install 'everseg[tensorboard]'" in notes[0]
    assert not (tmp_path / "events").exists()
    use_everything(in_files(tmp_path / "events"))


def test_without_a_place_it_writes_nothing_and_says_nothing(tmp_path):
    notes: list[str] = []
    use_everything(Events(notify=notes.append))
    assert notes == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_note_not_an_end(tmp_path, read):
    (tmp_path / "events").write_text("a file")
    notes: list[str] = []
    use_everything(in_files(tmp_path / "events", notes.append))
    assert len(notes) == 1
    assert "cannot be written" in notes[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_up_ends_the_events_with_one_note(tmp_path, monkeypatch, read):
    module = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    notes: list[str] = []
    events = in_files(tmp_path, notes.append)
    train(events, range(1, 3))

    def full(writer: object, record: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.RecordWriter, "write", full)
    train(events, range(3, 50))
    assert not events.active
    use_everything(events)
    for thread in threading.enumerate():  # what the writer's thread prints belongs to this test
        if isinstance(thread, module._AsyncWriterThread):
            thread.join(10)
    assert len(notes) == 1
    must_say(notes[0], "No space left")
    assert series(read(tmp_path), "train/loss/ce") == [(1, 1.0), (2, 2.0)]


def test_what_was_written_can_be_read_before_the_file_is_closed(tmp_path, read):
    events = in_files(tmp_path)
    train(events, range(1, 3))
    assert series(read(tmp_path), "train/loss/ce") == [(1, 1.0), (2, 2.0)]
    events.close()


def test_many_restarts_keep_their_order(tmp_path, read):
    for start in range(1, 13):
        events = in_files(tmp_path)
        train(events, range(start, start + 3), shift=start / 100)
        events.close()
    expected = [(i, round(i * 1.01, 2)) for i in range(1, 13)] + [(13, 13.12), (14, 14.12)]
    assert series(read(tmp_path), "train/loss/ce") == expected


def test_a_run_that_writes_nothing_leaves_no_file(tmp_path):
    in_files(tmp_path / "events").close()
    assert not (tmp_path / "events").exists()
