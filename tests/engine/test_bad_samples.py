"""A run over images that go bad while it trains: `data.skip_bad` of them are replaced, each told once."""

from __future__ import annotations

import json
from pathlib import Path

import domain_toy
import flaky_toy
import pytest
from processes import complete, killed, ranks, results
from toy import settings

import everseg
from everseg import api
from everseg.data.batches.loader import epoch_order
from everseg.engine.sharing import share_first_step
from everseg.errors import DataError
from everseg.runs.run_folder import RunFolder
from saying import must_say


def config(tmp_path: Path, *bad: str, allowed: int = 0, out: str = "runs", **train) -> dict:
    (tmp_path / "bad.txt").write_text(" ".join(bad))
    data = {"dataset": flaky_toy.HERE, "root": str(tmp_path), "skip_bad": allowed, "options": {"train": 16}}
    return settings(tmp_path / out, data=data, train={"epochs": 4, **train})


def told(tmp_path: Path, out: str = "runs") -> list[tuple[int, str, str]]:
    lines = map(json.loads, (tmp_path / out / "toy" / "journal.jsonl").read_text().splitlines())
    return [(e["step"], e["sample"], e["reason"]) for e in lines if e["event"] == "bad_sample"]


BAD = ("train-004", "train-009")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("undisturbed")
    assert complete(config(place, *BAD, allowed=2)) == 0
    return results(place / "runs" / "toy")


def test_each_is_told_once_and_the_run_goes_on(tmp_path, capsys):
    everseg.run(config(tmp_path, *BAD, allowed=2))
    assert sorted(told(tmp_path)) == [(0, name, f"{name}: truncated image") for name in BAD]
    shown = capsys.readouterr().err
    for name in BAD:
        assert shown.count(f"warning: training sample {name} of toy cannot be read and is replaced") == 1


def test_one_more_stops_with_3_before_it_is_used_saved_and_named(tmp_path, undisturbed):
    with pytest.raises(DataError) as caught:
        everseg.run(config(tmp_path, *BAD, allowed=1), quiet=True)
    message = str(caught.value)
    assert "2 training samples" in message
    assert "data.skip_bad allows 1" in message
    assert all(f"{name}: truncated image" in message for name in BAD)
    must_say(message, "saved at step 0, iteration")
    assert len(told(tmp_path)) == 1
    assert complete(config(tmp_path, *BAD, allowed=2)) == 0, "a higher limit continues the run"
    assert results(tmp_path / "runs" / "toy") == undisturbed


def test_by_default_the_first_one_stops_and_the_mended_run_is_as_if_nothing_had_been(tmp_path):
    assert complete(config(tmp_path, out="whole")) == 0
    with pytest.raises(DataError, match=r"train-004: truncated image\n.*saved.*step 0, iteration \d+ of 16"):
        everseg.run(config(tmp_path, "train-004", checkpoint_every=100), quiet=True)
    assert list((tmp_path / "runs" / "toy" / "steps" / "00" / "ckpt").glob("it-*"))
    assert complete(config(tmp_path)) == 0
    assert results(tmp_path / "runs" / "toy") == results(tmp_path / "whole" / "toy")


def test_a_kill_with_replaced_samples_changes_nothing(tmp_path, undisturbed):
    killed(config(tmp_path, *BAD, allowed=2), "name", pattern="00/ckpt/it-*[0-9]")
    assert complete(config(tmp_path, *BAD, allowed=2)) == 0
    assert results(tmp_path / "runs" / "toy") == undisturbed
    assert sorted(name for _, name, _ in told(tmp_path)) == list(BAD)


def test_two_processes_keep_one_account(tmp_path):
    assert ranks(config(tmp_path, *BAD, allowed=2), 2) == [0, 0]
    assert sorted(name for _, name, _ in told(tmp_path)) == list(BAD)
    codes = ranks(config(tmp_path, *BAD, allowed=1, out="few"), 2)
    assert 3 in codes
    assert 0 not in codes


def over_domains(tmp_path: Path, allowed: int) -> dict:
    (tmp_path / "bad.txt").write_text("train-004")
    one = {"dataset": flaky_toy.HERE, "root": str(tmp_path), "options": {"train": 16, "val": 4}}
    data = {"domains": {"day": one, "dusk": one}, "skip_bad": allowed}
    return domain_toy.settings(tmp_path, data=data, method={"name": "ft"}, train={"epochs": 1})


def test_one_id_in_two_domains_is_two_samples(tmp_path):
    with pytest.raises(DataError, match="2 training samples"):
        everseg.run(over_domains(tmp_path, 1), quiet=True)
    done = everseg.run(over_domains(tmp_path, 2), quiet=True)
    lines = map(json.loads, (done.path / "journal.jsonl").read_text().splitlines())
    found = [(e["step"], e["dataset"], e["sample"]) for e in lines if e["event"] == "bad_sample"]
    assert found == [(0, "day", "train-004"), (1, "dusk", "train-004")]


@pytest.fixture
def replaced(tmp_path: Path) -> everseg.Run:
    return everseg.run(config(tmp_path, *BAD, allowed=2, epochs=1, max_iterations=4), quiet=True)


def test_the_report_and_a_comparison_tell_what_was_replaced(replaced):
    said = ("2 training samples", "replaced by others", "data.skip_bad")
    page = replaced.path / "report.html"
    api.report(replaced.path, overrides=[f"data={flaky_toy.HERE}"], images=0, quiet=True)
    text = page.read_text()
    assert all(part in text for part in (*said, *(f"{name} of toy" for name in BAD)))
    (note,) = everseg.compare([replaced.path], write=False).notes
    must_say(note, f"{replaced.path}:", *said)
    journal = replaced.path / "journal.jsonl"
    kept = [line for line in journal.read_text().splitlines() if "bad_sample" not in line]
    journal.write_text("\n".join([*kept, "5", ""]))
    api.report(replaced.path, overrides=[f"data={flaky_toy.HERE}"], images=0, quiet=True)
    assert "replaced by others" not in page.read_text()


def test_a_first_step_with_more_replaced_samples_than_a_run_may_have_is_not_its_own(replaced, tmp_path):
    target = RunFolder(tmp_path / "other")
    with pytest.raises(DataError, match=r"toy.* 2 unreadable.*skip_bad.* 1"):
        share_first_step(replaced.folder, target, skip_bad=1)
    assert not target.path.exists()
    assert share_first_step(replaced.folder, target, skip_bad=2)


def test_a_loader_process_that_dies_leaves_a_saved_run_that_the_same_command_continues(tmp_path):
    last = f"train-{epoch_order(3, 0, 0, 16)[-1]:03d}"
    given = config(tmp_path, f"{last}!")
    given["data"]["workers"] = 1
    with pytest.raises(DataError, match=r"loader process(?s:.*)\n.*saved at") as caught:
        everseg.run(given, quiet=True)
    assert str(caught.value).endswith("same command continues it")
    assert "mend" not in str(caught.value)
    assert list((tmp_path / "runs" / "toy" / "steps" / "00" / "ckpt").glob("it-*"))


def test_a_test_image_that_cannot_be_read_stops_whatever_is_allowed(tmp_path):
    with pytest.raises(DataError, match=r"^val-002: truncated image"):
        everseg.run(config(tmp_path, "val-002", allowed=9), quiet=True)
