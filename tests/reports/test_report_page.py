"""`everseg report`: one page that carries everything, made of the stored counts alone."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import domain_toy
import numpy as np
import pytest
from made_runs import counts, made_run, two_steps
from parsed_pages import Parsed, parsed
from PIL import Image
from toy import HERE, build, settings

import everseg
from everseg import api
from everseg.config.loading import difference, load
from everseg.data.base import Dataset
from everseg.errors import CheckpointError
from everseg.labels import LabelSpace
from everseg.reports import figures, html, page, picture_grid
from everseg.reports import html as assemble
from everseg.reports.html import write_report
from everseg.reports.provenance import cite, command, provenance
from everseg.reports.published import Match, published
from everseg.runs.results import Results, Track
from everseg.runs.run_folder import RunFolder
from saying import must_say
from sealed import content, put_arrays, rewrite

USER_CODE = f"data={HERE}"
Outcome = Callable[..., tuple[int, str, str]]
HOSTILE = '<script>alert("x")</script> & $\\frac{1}{0}$'


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> everseg.Run:
    """Two steps on one data set, with the report made at the end."""
    out = tmp_path_factory.mktemp("reported")
    return everseg.run(settings(out, report=True, train={"max_iterations": 12}), quiet=True)


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> everseg.Run:
    out = tmp_path_factory.mktemp("domains")
    config = domain_toy.settings(out, report=True, train={"max_iterations": 4})
    return everseg.run(config, quiet=True)


@pytest.fixture
def copy(finished: everseg.Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.path, tmp_path / "toy"))


def made(path: Path, **options: Any) -> Parsed:
    results = Results(RunFolder(path))
    return parsed(write_report(results, results.config, **options).path)


# ---------------------------------------------------------------- the end of a run


def test_a_finished_run_has_its_report_and_making_it_again_gives_the_same_bytes(
    finished: everseg.Run, copy: Path
) -> None:
    first = (finished.path / "report.html").read_bytes()
    result = write_report(Results(RunFolder(copy)), finished.config, images=html.AUTOMATIC_IMAGES)
    assert (copy / "report.html").read_bytes() == first
    assert result.bytes == len(first) < page.LIMIT
    assert result.charts == 7
    assert result.pictures > 3
    assert result.notes == ()


def test_the_report_changes_nothing_else(finished: everseg.Run, copy: Path) -> None:
    def content(path: Path) -> dict[str, bytes]:
        return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}

    before = content(copy)
    del before["report.html"]
    write_report(Results(RunFolder(copy)), finished.config, images=4)
    after = content(copy)
    del after["report.html"]
    assert after == before


def test_a_report_that_fails_is_a_warning_and_never_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no room for charts")

    monkeypatch.setattr("everseg.reports.html.write_report", fails)
    done = everseg.run(settings(tmp_path, report=True, train={"max_iterations": 1}))
    assert len(done.steps) == 2
    warning = [line for line in capsys.readouterr().err.splitlines() if "charts" in line]
    assert len(warning) == 1
    assert "everseg report" in warning[0]
    assert not (done.path / "report.html").exists()


def test_the_report_can_be_switched_off_and_a_finished_run_is_not_reported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, train={"max_iterations": 1})
    done = everseg.run(config, quiet=True)
    target = done.path / "report.html"
    assert not target.exists()
    everseg.run({**config, "report": True}, quiet=True)
    assert target.exists(), "missing: made when the same command meets the finished run"
    before = target.stat().st_mtime_ns
    everseg.run({**config, "report": True}, quiet=True)
    assert target.stat().st_mtime_ns == before


# ---------------------------------------------------------------- numbers


def test_every_number_follows_the_stored_counts(copy: Path) -> None:
    """Other counts, other numbers, although the scores in metrics.json stay."""
    path = copy / "steps" / "01" / "confusion.npz"
    counts = np.array([[50, 0, 0, 0], [20, 60, 0, 20], [0, 30, 70, 0], [0, 0, 10, 40]])
    put_arrays(path, default=counts)
    given = made(copy, images=0)
    tables = json.loads(given.download("toy.json"))["tables"]
    iou = [100 * counts[c, c] / (counts[c].sum() + counts[:, c].sum() - counts[c, c]) for c in range(4)]
    last = tables["steps"][-1]
    assert last["old"] == pytest.approx(np.mean(iou[:3]), abs=0.006)
    assert last["new"] == pytest.approx(iou[3], abs=0.006)
    assert last["all (no background)"] == pytest.approx(np.mean(iou[1:]), abs=0.006)
    assert tables["step-matrix"][-1] == {
        "after step": 1, "learnt in step 0": last["old"], "learnt in step 1": last["new"]
    }  # fmt: skip
    first = np.load(copy / "steps" / "00" / "confusion.npz")["default"]
    before = [100 * first[c, c] / (first[c].sum() + first[:, c].sum() - first[c, c]) for c in range(3)]
    assert tables["forgetting"][0]["forgetting"] == pytest.approx(
        np.mean(before) - np.mean(iou[:3]), abs=0.011
    )
    classes = {row["class"]: row for row in tables["classes"]}
    assert classes["red"]["IoU after step 0"] == pytest.approx(before[1], abs=0.006)
    assert classes["red"]["forgetting"] == pytest.approx(before[1] - iou[1], abs=0.011)
    assert classes["blue"]["IoU after step 0"] is None
    assert classes["blue"]["test pixels"] == 50
    flow = {row["class"]: row for row in tables["flow"]}
    assert flow["red"] == {
        "class": "red", "right": 60.0, "background": 20.0, "classes learnt later": 20.0, "classes learnt with it": 0.0,
        "classes learnt before it": 0.0, "taken for": "background 20.0 %, blue 20.0 %", "test pixels": 100,
    }  # fmt: skip
    assert set(flow) == {"background", "red", "green"}
    (taken,) = tables["taken"]
    assert (taken["class"], taken["classes learnt before it"], taken["taken for"]) == (
        "blue",
        20.0,
        "green 20.0 %",
    )
    assert tables["confusion-counts"][2] == {
        "true class": "green", "called background": 0, "called red": 30, "called green": 70, "called blue": 0
    }  # fmt: skip
    must_say(given.text, f"from {np.mean(before):.1f} to {np.mean(iou[:3]):.1f} mIoU")


def test_the_tables_are_the_runs_own_and_come_as_csv_and_json(finished: everseg.Run) -> None:
    given = parsed(finished.path / "report.html")
    rows = list(csv.DictReader(io.StringIO(given.download("steps.csv"))))
    for row, own in zip(rows, finished.table(), strict=True):
        for group in ("old", "new", "base", "all"):
            assert (float(row[group]) if row[group] else None) == own[group]
            plain = row[f"{group} (no background)"]
            assert (float(plain) if plain else None) == own[f"{group} (no background)"]
    document = json.loads(given.download("toy.json"))
    assert document["tables"]["steps"][0]["new"] == finished.table()[0]["new"]
    assert document["provenance"]["models"][1]["continues"] == document["provenance"]["models"][0]["model"]
    assert document["tables"]["classes-per-step"], "pixels per class of each step"


def test_joint_training_beside_the_run_ends_the_step_matrix(finished: everseg.Run, copy: Path) -> None:
    assert "joint training" not in made(copy).text
    joint = settings(copy.parent, name="upper", scenario={"joint": True}, method={"name": "ft"},
                     train={"max_iterations": 12})  # fmt: skip
    everseg.run(joint, quiet=True)
    shown = made(copy)
    must_say(shown.text, "joint training", "upper bound (upper, beside this run")
    rows = json.loads(shown.download("json"))["tables"]["step-matrix"]
    assert [row["after step"] for row in rows] == [0, 1, "joint"]
    scores = RunFolder(copy.parent / "upper").metrics(0)["branches"]["default"]["miou"]
    assert list(rows[-1].values())[1:] == [round(100 * scores[key], 2) for key in ("old", "new")]


def test_domains_have_a_matrix_per_domain_and_their_drop(domains: everseg.Run) -> None:
    given = parsed(domains.path / "report.html")
    tables = json.loads(given.download("domains.json"))["tables"]
    assert tables["domains"] == domains.table().to_json()
    assert [row["domain"] for row in tables["domain-forgetting"]] == ["day", "dusk"]
    lost = domains.sequence.forgetting.domains["day"]
    assert tables["domain-forgetting"][0]["forgetting"] == pytest.approx(100 * lost, abs=0.006)
    assert {"day-steps", "dusk-steps", "day-flow"} <= tables.keys()
    assert "dusk-flow" not in tables, "nothing of dusk is old yet"
    must_say(given.text, "trained on dusk: day went")
    must_say(given.text, "Relative drop: no single-task")
    single = Results(RunFolder(domains.path))
    config = domains.config.model_copy(
        update={
            "scenario": domains.config.scenario.model_copy(
                update={"single_task": {"day": 50.0, "dusk": 50.0}}
            )
        }
    )
    again = parsed(write_report(single, config, images=0, out=domains.path / "other.html").path)
    assert "against scenario.single_task" in again.text


def test_an_unfinished_run_says_so(copy: Path) -> None:
    (copy / "steps" / "01" / "metrics.json").unlink()
    given = made(copy, images=0)
    must_say(given.text, "not finished: only 1 of 2 steps")
    must_say(given.text, "After its first step")
    shutil.rmtree(copy / "steps" / "00")
    with pytest.raises(CheckpointError, match="no finished step"):
        made(copy)


def test_counts_that_do_not_fit_the_classes_are_an_error_that_says_what_to_do(copy: Path) -> None:
    put_arrays(copy / "steps" / "01" / "confusion.npz", default=np.ones((2, 2), np.int64))
    with pytest.raises(CheckpointError, match=r"fit the classes.*same command"):
        _ = Results(RunFolder(copy)).tracks


def test_groups_taught_in_one_step_keep_names_of_their_own(tmp_path: Path) -> None:
    done = everseg.run(
        settings(tmp_path, scenario={"joint": True}, method={"name": "ft"}, train={"max_iterations": 2}),
        quiet=True,
    )
    given = made(done.path, images=0)
    must_say(given.text, "all 3 classes at once")
    tables = json.loads(given.download("toy.json"))["tables"]
    assert list(tables["step-matrix"][0]) == ["after step", "classes of step 0", "classes of step 1"]
    assert "flow" not in tables
    # A model in the field: it is not known which of its steps brought a class.
    space = LabelSpace(((0, 1), (2,)), ("background", "car", "bus"), 0)
    extended = Track("default", "default", (4,), (np.eye(3, dtype=int),), (space,))
    assert extended.group_titles == ["classes, group 0", "classes, group 1"]


def test_published_numbers_stand_beside_the_runs_in_their_own_convention_only(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mib,) = [
        e
        for e in published()
        if (e.dataset, e.task, e.protocol, e.background) == ("voc", "15-5", "disjoint", "excluded")
    ]
    mine = replace(mib, columns=("1-2", "3-3", "all"))
    told = [
        Match(mine, (), ("seeds: not stated",)),
        Match(mib, ("protocol disjoint there, overlapped here",), ()),
    ]
    monkeypatch.setattr(assemble, "matches_of", lambda *_: told)
    given = made(copy, images=0)
    rows = list(csv.DictReader(io.StringIO(given.download("published-1.csv"))))
    last = everseg.Run(RunFolder(copy)).table()[-1]
    assert rows[0]["method"] == "this run (mib)"
    assert [float(rows[0][column]) for column in mine.columns] == pytest.approx(
        [last[f"{group} (no background)"] for group in ("old", "new", "all")], abs=0.011
    )
    assert {row["method"]: row["all"] for row in rows}["mib"] == "64.7"
    must_say(given.text, "background left out", "mean over classes", "seeds: not stated")
    assert "voc-tab.png in fcdl94/MiB" in given.text
    must_say(given.text, "protocol disjoint there", "overlapped here")
    assert not [a for a in given.all("a") if a.get("download", "").endswith("published-2.csv")]


def test_the_label_policy_is_told_and_runs_with_plops_labels_have_the_figures_of_its_rule(
    copy: Path, tmp_path: Path
) -> None:
    given = made(copy, images=0)
    facts = json.loads(given.download("toy.json"))
    assert facts["facts"]["label policy"] == "ignore-void"
    assert "plop-rule" not in facts["tables"]
    steps = [{"default": counts(0.8, 0.6)}, {"default": counts(0.5, 0.4, 0.2)}]
    overrides = ["scenario.policy=plop", "report=false"]
    folder = made_run(tmp_path, "p", "demo-mib", steps, [(3,), (3, 1)], overrides=overrides)
    given = made(folder, images=0)
    told = json.loads(given.download("p.json"))
    assert told["facts"]["label policy"] == "plop-voc"
    before, after = 10_000 / (10_000 + 1000 * (0.2 + 0.4)), 10_000 / (10_000 + 1000 * (0.5 + 0.6 + 0.8))
    everything = (after + 1.1) / 4
    (row,) = told["tables"]["plop-rule"]
    expected = {"first": (after + 0.9) / 3, "last": 0.2, "all": everything,
                "average": ((before + 1.4) / 3 + everything) / 2}  # fmt: skip
    assert row == {name: pytest.approx(100 * value, abs=0.006) for name, value in expected.items()}
    must_say(given.text, "PLOP's rule", "count 0", "first", "step 0")
    must_say(str(everseg.Run(RunFolder(folder))), "label policy plop-voc")
    must_say(str(everseg.Run(RunFolder(folder))), "PLOP's rule", "last 20.0")


# ---------------------------------------------------------------- the page


def test_the_page_needs_no_network_and_no_script(finished: everseg.Run, domains: everseg.Run) -> None:
    for run in (finished, domains):
        text = (run.path / "report.html").read_text()
        given = Parsed(text)
        assert not given.all("script")
        assert not [name for _, attributes in given.tags for name in attributes if name.startswith("on")]
        assert all(a.get("src", "data:").startswith("data:") for _, a in given.tags)
        assert all(
            a["href"].startswith(("data:", "#", "https://github.com/")) for _, a in given.tags if "href" in a
        )
        assert [a["rel"] for a in given.all("link")] == ["icon"]
        assert not re.search(r"@import|url\((?!#)", text)
        (policy,) = [
            a["content"] for a in given.all("meta") if a.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_chart_and_picture_has_a_text_alternative(finished: everseg.Run) -> None:
    text = (finished.path / "report.html").read_text()
    given = Parsed(text)
    charts = given.all("svg")
    assert len(charts) == 7
    ids = [a["id"] for _, a in given.tags if "id" in a]
    assert len(ids) == len(set(ids)), "an id is the page's only one"
    for chart in charts:
        assert chart["role"] == "img"
        title, description = chart["aria-labelledby"].split()
        assert re.search(rf'<title id="{title}">[^<]+</title>', text)
        assert re.search(rf'<desc id="{description}">[^<]+</desc>', text)
    assert re.findall(r"url\(#([^)]+)\)", text)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert all(len(image["alt"]) > 5 for image in given.all("img"))
    assert "#01" not in re.sub(r"data:[^\"]*", "", text), "every colour has become a role"


def test_the_pictures_are_what_the_model_saw_and_said(finished: everseg.Run) -> None:
    given = parsed(finished.path / "report.html")
    images = given.all("img")
    assert len(images) % 5 == 0, "image, truth, two steps, change"
    assert "12 test images" not in given.text
    must_say(given.text, "10 test images", "seed 3")
    first = {a["alt"].split()[-1]: a for a in images if a["alt"].startswith("test image")}
    name, picture = next(iter(first.items()))
    with Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))) as opened:
        assert opened.size == (32, 32), "as tested: crop 32"
    (truth,) = [a for a in images if a["alt"] == f"true classes of {name}"]
    with Image.open(io.BytesIO(base64.b64decode(truth["src"].partition(",")[2]))) as opened:
        assert opened.mode == "P"
        assert set(np.unique(np.asarray(opened))) <= {0, 1, 2, 3, 255}


def test_names_of_users_are_text_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["red", HOSTILE, "_blue"]
    config = domain_toy.settings(tmp_path, "day", report=True, train={"max_iterations": 1})
    config["data"]["domains"]["day"]["options"]["names"] = names
    config["name"] = "<b>run&amp;'"
    done = everseg.run(config, quiet=True)
    text = (done.path / "report.html").read_text()
    assert "<script" not in text
    assert "<b>run" not in text
    given = Parsed(text)
    assert not given.all("script")
    assert HOSTILE in given.text
    assert "<b>run&amp;'" in given.text
    assert [row["class"] for row in json.loads(given.download(".json"))["tables"]["classes"]][1:] == names


def test_a_page_that_would_be_too_large_gives_up_its_pictures_and_says_so(copy: Path) -> None:
    large = made(copy)
    assert "reduced" not in large.text
    assert len(large.all("img")) == 40
    small = made(copy, limit=(copy / "report.html").stat().st_size - 20_000)
    assert "Pictures are" in small.text
    assert 0 < len(small.all("img")) < 40
    none = made(copy, limit=1)
    assert none.all("img") == []
    must_say(none.text, "Pictures are left out")


def test_without_matplotlib_there_are_tables_and_a_word_how_to_get_charts(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert not figures.charts.can_draw()
    given = made(copy, images=0)
    assert given.all("svg") == []
    assert "pip install 'everseg[plot]'" in given.text
    assert len([a for a in given.all("details") if "open" in a]) == 3, "the numbers of the charts stand open"


def test_without_the_data_the_report_is_made_without_pictures(tmp_path: Path) -> None:
    reader = tmp_path / "data" / "reader.py"
    reader.parent.mkdir()
    shutil.copy(HERE.rpartition(":")[0], reader)
    config = settings(tmp_path, data={"dataset": f"{reader}:build"}, train={"max_iterations": 1})
    done = everseg.run(config, quiet=True)
    shutil.rmtree(reader.parent)
    given = parsed(done.report(tmp_path / "r.html"))
    assert given.all("img") == []
    must_say(given.text, "not at hand", "no pictures")
    assert len(given.all("svg")) > 3


def only_tests(root: str | None = None) -> Dataset:
    """The toy's data as they lie where training images were left out."""
    whole = build(root)
    return replace(whole, splits={"val": whole.splits["val"]})


def test_the_test_images_alone_are_enough_for_the_pictures(finished: everseg.Run, copy: Path) -> None:
    given = [f"data={Path(__file__).resolve()}:only_tests"]
    made = api.report(copy, overrides=given, images=html.AUTOMATIC_IMAGES, quiet=True)
    must_say(made.notes[0], "only the test images", "no pixels per class")
    assert "train" in made.notes[0]
    pictures = parsed(copy / "report.html").all("img")
    assert pictures == parsed(finished.path / "report.html").all("img"), "the same as with all data"


def test_rankings_of_pictures_say_over_which_classes_they_rank(
    finished: everseg.Run, domains: everseg.Run
) -> None:
    text = parsed(finished.path / "report.html").text
    assert "over old: red, green; new: blue." in text
    assert re.search(
        r"val-\d+ · mean IoU [\d.]+ · old classes [\d.]+ \((red|green)[^)]*\) · new classes [\d.]+ \(blue\)",
        text,
    )
    text = parsed(domains.path / "report.html").text
    assert text.count("over red, green, blue.") == 2, "background does not rank"


def test_feature_plots_are_shown_where_they_were_made(copy: Path) -> None:
    result = api.features(copy, overrides=[USER_CODE], quiet=True, pixels=10, images=4)
    given = made(copy, images=0)
    shown = [a["alt"] for a in given.all("img")]
    assert len(shown) == len(result.pictures)
    assert "Step 0 against step 1" in given.text
    (copy / "features" / "before-0-after-1" / "drift.json").write_text("{")
    page = made(copy, images=0)
    assert page.all("img") == [], "a damaged one is left out"
    must_say(page.text, "before-0-after-1", "left out")


def _linked(folder: Path) -> None:
    (folder / "a.png").symlink_to(folder.parents[2] / "private.png")


def _elsewhere(folder: Path) -> None:
    folder.rmdir()
    folder.symlink_to(folder.parents[2] / "other")


ROW = {
    "domain": "d",
    "class_name": "c",
    "pixels": 1,
    "relative": None,
    "accuracy_before": 0.5,
    "accuracy_after": 0.5,
}
HOSTILE_TABLES = {
    "a link out": (_linked, {}),
    "a FIFO": (lambda folder: os.mkfifo(folder / "a.png"), {}),
    "a folder elsewhere": (_elsewhere, {}),
    "a path up": (lambda folder: None, {"pictures": ["../../../private.png"]}),
    "an absolute path": (lambda folder: None, {"pictures": ["/private.png"]}),
    "no picture": (lambda folder: (folder / "a.png").write_bytes(b"%!PS-Adobe"), {}),
    "a number as text": (lambda folder: None, {"pictures": [], "classes": [{**ROW, "pixels": "x"}]}),
    "a number too large": (lambda folder: None, {"pictures": [], "classes": [{**ROW, "relative": 10**400}]}),
    "no rows": (lambda folder: None, {"pictures": [], "classes": {}}),
}


@pytest.mark.parametrize("kind", HOSTILE_TABLES)
def test_stored_features_lead_nowhere_else(tmp_path: Path, kind: str) -> None:
    """A run folder from elsewhere must not put a private picture of this machine into a page that is passed on."""
    run, (make, changes) = tmp_path / "run", HOSTILE_TABLES[kind]
    folder = run / "features/x"
    folder.mkdir(parents=True)
    for path in (tmp_path / "private.png", tmp_path / "other/a.png"):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    stored = {"before": 0, "after": 1, "pictures": ["a.png"], "classes": [ROW], **changes}
    (tmp_path / "other/drift.json").write_text(json.dumps(stored))
    make(folder)
    if not folder.is_symlink():
        (folder / "drift.json").write_text(json.dumps(stored))
    notes: list[str] = []
    assert picture_grid.stored_features(run, notes) == []
    must_say(notes[0], "left out", "x")


# ---------------------------------------------------------------- command and provenance


def test_the_command_in_the_report_does_the_same_run_again() -> None:
    config = load(
        "demo-mib", ["train.epochs=3", "method.alpha=2", "scenario.task=4-1", "data.options={seed: 1}"]
    )
    words = shlex.split(command(config))
    assert words[:3] == ["everseg", "run", "demo-mib"]
    assert difference(load(words[2], words[3:]), config) == []
    assert not [word for word in words if word.startswith(("out=", "name="))]
    assert command(load({"name": "mine"})) == "everseg run mine.yaml"


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["cli.py", "run", "my toy.yaml"], "everseg run 'my toy.yaml'"),
        (None, "from Python"),
    ],
)
def test_the_command_that_started_a_run_is_shown_as_it_can_be_typed(
    argv: list[str] | None, shown: str, copy: Path
) -> None:
    assert content(copy / "run.json")["argv"] is None, "this test calls everseg.run"
    rewrite(copy / "run.json", lambda stored: stored.update(argv=argv))
    given = made(copy, images=0)
    facts = json.loads(given.download("toy.json"))["provenance"]["facts"]
    assert shown in facts["started"]
    assert shown in given.text


def test_what_to_cite_names_the_tool_the_method_the_data_and_the_model() -> None:
    config = load("cs-bdd-idd-mdil")
    lines = " ".join(cite(config.method.name, config.data, config.model.name))
    for part in (
        everseg.__version__,
        "Garg et al.",
        "Cordts et al.",
        "Yu et al.",
        "Varma et al.",
        "Romera et al.",
    ):
        assert part in lines


@pytest.mark.parametrize("method", ["plop", "rcil", "ewf", "reminder", "sdr", "nest", "ucd"])
def test_every_method_of_a_paper_is_cited(method: str) -> None:
    config = load(f"voc-15-1-overlapped-{method}")
    lines = cite(config.method.name, config.data, config.model.name)
    assert len(lines) == 4, "the tool, the method, the data, the model"


def test_switches_are_cited_beside_the_method(tmp_path: Path) -> None:
    overrides = ["method.fuse=all", "method.pretune=2"]
    folder = made_run(tmp_path, "a", "demo-mib", **two_steps(0.8, 0.1, 0.5), overrides=overrides)
    lines = provenance(Results(RunFolder(folder)))["cite"]
    for author in ("Cermelli", "Xiao", "Xie"):
        must_say(lines, author)


def test_the_verb(copy: Path, call: Outcome) -> None:
    code, _, err = call("report", copy)
    assert code == 2
    assert "your own code" in err
    code, out, err = call(
        "report", copy, USER_CODE, "--images", 6, "--json", "--out", copy / "x.html", "--quiet"
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["path"] == str(copy / "x.html")
    assert (copy / "x.html").stat().st_size == result["bytes"]
    code, out, err = call("report", copy, USER_CODE, "--images", 0)
    assert code == 0
    assert out.splitlines()[-1].startswith(f"report: {copy / 'report.html'} (")
    assert "Made without pictures." in err
    code, _, err = call("report", copy / "steps")
    assert code == 4
    must_say(err, "run folder", "run.json")
