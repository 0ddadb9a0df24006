"""`everseg compare`: numbers known beforehand, tables that keep apart what differs, files that can be read."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_runs import counts, made_run, two_steps
from parsed_pages import Parsed, parsed

import everseg
from everseg.errors import CheckpointError, ConfigError
from everseg.reports import charts
from everseg.reports.compare import tables
from everseg.reports.compare.answer import winners
from everseg.reports.compare.comparison import Estimate, collect
from everseg.reports.compare.statistics import spread
from everseg.reports.figures import old_new_chart
from everseg.runs.run_folder import RunFolder
from saying import must_say

Call = Callable[..., tuple[int, str, str]]
VOC = ["model.weights=resnet101.pth"]


def group(made: dict[str, Any], name: str, table: int = 0) -> dict[str, Any]:
    (found,) = [g for g in made["tables"][table]["groups"] if g["name"] == name]
    return found


def near(value: Any) -> Any:
    return pytest.approx(value, abs=1e-6)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Fine-tuning over three seeds, MiB over two of them, joint training over one."""
    for seed, (old, new) in enumerate([(0.10, 0.50), (0.20, 0.60), (0.30, 0.70)]):
        made_run(tmp_path, f"ft-{seed}", "demo-ft", **two_steps(0.8, old, new), overrides=[f"seed={seed}"],
                 seconds=[10, 20 + seed])  # fmt: skip
    for seed, (old, new) in ((0, (0.70, 0.40)), (2, (0.80, 0.50))):
        made_run(tmp_path, f"mib-{seed}", "demo-mib", **two_steps(0.8, old, new), overrides=[f"seed={seed}"])
    made_run(tmp_path, "a-joint", "demo-joint", [{"default": counts(0.9, 0.9, 0.8)}], [(3, 1)])
    (tmp_path / "sweep.json").write_text("{}")
    return tmp_path


def test_spread_is_the_mean_and_the_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 4.0]).to_json() == near({"mean": 7 / 3, "sd": 1.5275252316519468, "n": 3})
    assert spread([5.0]).to_json() == {"mean": 5.0, "sd": None, "n": 1}
    assert spread([None]).to_json() == {"mean": None, "sd": None, "n": 0}


def test_means_and_deviations_are_the_known_ones(sweep: Path) -> None:
    made = collect([sweep])[0]
    assert len(made["tables"]) == 1
    ft = group(made, "ft")
    assert (ft["seeds"], ft["joint"]) == ([0, 1, 2], False)
    assert ft["scores"]["old (no bg)"] == near({"mean": 0.2, "sd": 0.1, "n": 3, "interval": None})
    assert ft["scores"]["new (no bg)"] == near({"mean": 0.6, "sd": 0.1, "n": 3, "interval": None})
    assert ft["scores"]["all (no bg)"] == near(
        {"mean": (0.2 * 2 + 0.6) / 3, "sd": 0.1, "n": 3, "interval": None}
    )
    assert ft["scores"]["forgetting (no bg)"] == near({"mean": 0.6, "sd": 0.1, "n": 3, "interval": None})
    average = [(0.8 + (2 * old + new) / 3) / 2 for old, new in ((0.1, 0.5), (0.2, 0.6), (0.3, 0.7))]
    assert ft["values"]["average (no bg)"] == near(average)
    missed = 1000 * (2 * 0.9 + 0.5)
    background = 10_000 / (10_000 + missed)
    assert ft["values"]["old"][0] == near((background + 2 * 0.1) / 3), "background counted among the old"
    assert ft["scores"]["time"] == near({"mean": 31.0, "sd": 1.0, "n": 3, "interval": None})
    assert group(made, "mib")["scores"]["time"]["mean"] is None, "no journal, no time"


def test_the_result_has_the_numbers_as_attributes(sweep: Path) -> None:
    made = everseg.compare([sweep], write=False)
    (stored,) = made.to_json()["tables"]
    (table,) = made.tables
    assert (table.title, table.base, table.numbers) == (stored["title"], "ft", tuple(stored["numbers"]))
    mib, ft, joint = table.groups
    assert (ft.name, ft.seeds, ft.joint, joint.joint) == ("ft", (0, 1, 2), False, True)
    assert ft.scores["old (no bg)"] == Estimate(near(0.2), near(0.1), 3, None)
    assert ft.values["old (no bg)"] == near((0.1, 0.2, 0.3))
    assert ft.differences is None
    assert mib.differences["old (no bg)"].mean == near(0.55)
    assert ft.runs[0] == sweep / "ft-0"
    assert made.files == ()
    assert "20.0 ± 10.0" in str(made)
    assert "<td" in made._repr_html_()


def test_differences_are_paired_by_seed(sweep: Path) -> None:
    made = collect([sweep])[0]
    assert made["tables"][0]["base"] == "ft"
    assert group(made, "ft")["differences"] is None
    mib = group(made, "mib")["differences"]
    assert mib["old (no bg)"] == near({"mean": 0.55, "sd": 0.05 * 2**0.5, "n": 2, "interval": None})
    assert mib["new (no bg)"] == near({"mean": -0.15, "sd": 0.05 * 2**0.5, "n": 2, "interval": None})
    assert group(made, "joint")["differences"]["all (no bg)"]["n"] == 1
    turned = collect([sweep], against="mib")[0]
    assert group(turned, "ft")["differences"]["old (no bg)"]["mean"] == near(-0.55)
    with pytest.raises(ConfigError, match=r"no group 'mb'; did you mean 'mib'"):
        collect([sweep], against="mb")[0]


def test_joint_training_is_the_upper_bound_below_the_others(sweep: Path) -> None:
    made = collect([sweep])[0]
    assert [g["name"] for g in made["tables"][0]["groups"]] == ["mib", "ft", "joint"]
    joint = group(made, "joint")
    assert joint["scores"]["old (no bg)"]["mean"] == near(0.9)
    assert joint["scores"]["forgetting"]["mean"] is None
    (row,) = [r for r in tables.score_rows(made["tables"][0]) if r["method"] == "joint (upper bound)"]
    assert (row["forgetting"], row["old (no bg)"]) == ("-", "90.0")


def test_both_background_conventions_are_shown_where_they_differ(sweep: Path, tmp_path: Path) -> None:
    (table,) = collect([sweep])[0]["tables"]
    (first, counted), (second, without) = tables.conventions(table)
    assert (first, second) == ("background counted", "background left out of the means")
    assert list(counted) == ["old", "new", "all", "average", "forgetting", "time"]
    assert tables.score_rows(table, without)[1]["old"] == "20.0 ± 10.0"
    assert tables.score_rows(table, counted)[1]["old"] != "20.0 ± 10.0"
    made_run(tmp_path / "n", "a", "demo-ft", **two_steps(0.8, 0.1, 0.5), background=None)
    (table,) = collect([tmp_path / "n"])[0]["tables"]
    assert [title for title, _ in tables.conventions(table)] == [""]


def test_a_sequence_of_several_steps_is_parted_after_its_first_one_as_the_fields_tables_are(
    tmp_path: Path,
) -> None:
    for name, first, second, third in (("a", 0.9, 0.2, 0.1), ("b", 0.5, 0.6, 0.3)):
        steps = [counts(first, first), counts(first, first, second), counts(first, first, second, third)]
        made_run(tmp_path, name, "demo-ft" if name == "a" else "demo-mib",
                 steps=[{"default": one} for one in steps], groups=[(3,), (3, 1), (3, 1, 1)])  # fmt: skip
    made = collect([tmp_path])[0]
    found = {name: score["mean"] for name, score in group(made, "ft")["scores"].items()}
    assert (found["base (no bg)"], found["later (no bg)"]) == (near(0.9), near(0.15))
    assert found["old (no bg)"] == near((0.9 + 0.9 + 0.2) / 3)
    (table,) = made["tables"]
    (_, counted), _ = tables.conventions(table)
    assert list(counted)[:5] == ["base", "later", "old", "new", "all"]
    said = {one.what: (one.names, one.more) for one in winners(table)}
    assert [said[what][0] for what in ("Keeps the old best", "Learns the new best")] == ["ft", "mib"]
    assert said["Keeps the old best"][1].startswith("later")
    chart = old_new_chart(table, "x")
    must_say(chart.title, "First", "later")


@pytest.mark.parametrize(
    ("overrides", "options", "reason"),
    [
        (["protocol=disjoint"], {}, 'protocol (scenario.protocol): "overlapped" there, "disjoint" here'),
        (
            ["scenario.policy=plop"],
            {},
            'label policy (scenario.policy): "ignore-void" there, "plop-voc" here',
        ),
        (["scenario.task=4-1"], {}, 'task (scenario.task): "4-2" there, "4-1" here'),
        (["data.options.num_val=7"], {}, "options of the reader (data.options): "),
        (["data.crop=64"], {}, "training crop (data.crop): not used there, "),
        ([], {"digest": "other"}, "other test images or labels"),
    ],
)
def test_runs_made_otherwise_get_a_table_of_their_own(
    tmp_path: Path, overrides: list[str], options: dict[str, Any], reason: str
) -> None:
    made_run(tmp_path, "one", "demo-ft", **two_steps(0.8, 0.1, 0.5))
    base = ["data.evaluation=crop"] if "data.crop" in str(overrides) else []
    made_run(
        tmp_path, "two", "demo-mib", **two_steps(0.8, 0.1, 0.5), overrides=[*base, *overrides], **options
    )
    made = collect([tmp_path / "one", tmp_path / "two"])[0]
    assert [len(table["groups"]) for table in made["tables"]] == [1, 1]
    assert made["tables"][0]["reasons"] == []
    assert any(text.startswith(reason) for text in made["tables"][1]["reasons"]), made["tables"][1]["reasons"]
    assert any(isinstance(piece, str) and "the same table" in piece for piece in tables.terminal(made))


def test_other_labels_are_told_apart_and_how_to_get_one_table(tmp_path: Path, call: Call) -> None:
    made_run(tmp_path, "a", "demo-ft", **two_steps(0.8, 0.1, 0.5), overrides=["scenario.policy=mib-voc"])
    for seed, policy in enumerate(("plop", "plop-voc")):  # the name of older runs, and that of today
        overrides = [f"scenario.policy={policy}", f"seed={seed}"]
        made_run(tmp_path, policy, "demo-mib", **two_steps(0.8, 0.1, 0.5), overrides=overrides)
    made = collect([tmp_path])[0]
    first, second = made["tables"]
    assert [group["seeds"] for group in second["groups"]] == [[0, 1]], "two names of one policy"
    assert (first["facts"]["labels"], second["facts"]["labels"]) == ("mib-voc", "plop-voc")
    (reason,) = second["reasons"]
    must_say(reason, "mib-voc", "there", "plop-voc", "not learnt yet", "background under plop-voc")
    must_say(reason, "one table", "scenario.policy=mib-voc")
    _, out, _ = call("compare", tmp_path)
    must_say(out, "4-2", "label policy mib-voc", "mIoU")
    must_say(out, "4-2", "label policy plop-voc", "mIoU")
    rows = list(csv.DictReader((tmp_path / "compare.csv").read_text().splitlines()))
    assert {(row["table"], row["labels"]) for row in rows} == {("1", "mib-voc"), ("2", "plop-voc")}
    assert "labels: plop-voc" in (tmp_path / "compare.tex").read_text()
    must_say(parsed(tmp_path / "compare.html").text, "scenario.policy=mib-voc")
    made_run(
        tmp_path / "n", "a", "demo-ft", **two_steps(0.8, 0.1, 0.5), overrides=["scenario.policy=mib-voc"]
    )
    other = ["scenario.policy=plop-voc", "scenario.task=4-1-1"]
    made_run(tmp_path / "n", "b", "demo-ft", **two_steps(0.8, 0.1, 0.5), overrides=other)
    reasons = collect([tmp_path / "n"])[0]["tables"][1]["reasons"]
    assert len(reasons) == 2
    assert not any("scenario.policy=" in reason for reason in reasons), "labels alone would not do"


def test_other_training_is_one_table_with_what_differs(tmp_path: Path) -> None:
    for name, overrides in (("a", []), ("b", ["train.lr_next=0.5"]), ("c", ["train.lr_next=0.5", "seed=1"])):
        made_run(tmp_path, name, "demo-ft", **two_steps(0.8, 0.1, 0.5), overrides=overrides)
    made = collect([tmp_path])[0]
    (table,) = made["tables"]
    usual = RunFolder(tmp_path / "a").config().train.lr_next
    assert [(g["name"], g["seeds"]) for g in table["groups"]] == [
        (f"ft, later learning rate {usual}", [0]),
        ("ft, later learning rate 0.5", [0, 1]),
    ]
    assert list(table["settings"][0].values())[1] == f"later learning rate (train.lr_next): {usual} -> 0.5"


def test_aliases_are_one_task(tmp_path: Path) -> None:
    sizes = [(16,), *[(16, *[1] * n) for n in range(1, 6)]]
    steps = [{"default": counts(*[0.5] * (sum(size) - 1))} for size in sizes]
    for name, preset in (("a", "voc-15-1-mib"), ("b", "voc-15-5s-ft")):
        made_run(tmp_path, name, preset, steps, sizes)
    assert len(collect([tmp_path])[0]["tables"]) == 1


def test_the_same_run_twice_counts_once_and_other_versions_are_told(tmp_path: Path) -> None:
    made_run(tmp_path, "a", "demo-ft", **two_steps(0.8, 0.1, 0.5))
    made_run(tmp_path, "b", "demo-ft", **two_steps(0.8, 0.9, 0.9))
    made_run(
        tmp_path, "c", "demo-mib", **two_steps(0.8, 0.9, 0.9), versions={"everseg": "0.1.0", "torch": "1.0"}
    )
    made = collect([tmp_path, tmp_path / "a"])[0]
    assert group(made, "ft")["seeds"] == [0]
    assert group(made, "ft")["scores"]["old (no bg)"]["mean"] == near(0.1)
    must_say(made["notes"], "b is", "same run")
    must_say(made["notes"], "torch: 2.0, 1.0")


def test_unfinished_and_foreign_folders(tmp_path: Path) -> None:
    made_run(tmp_path / "x", "half", "demo-mib", **two_steps(0.8, 0.1, 0.5), finished=False)
    with pytest.raises(ConfigError, match=r"half.* is not"):
        everseg.compare([tmp_path / "x"])
    made_run(tmp_path / "x", "whole", "demo-ft", **two_steps(0.8, 0.1, 0.5))
    made = collect([tmp_path / "x"])[0]
    assert [g["name"] for g in made["tables"][0]["groups"]] == ["ft"]
    must_say(made["notes"][0], "half", "left out")
    with pytest.raises(ConfigError, match="needs run folders") as caught:
        everseg.compare([tmp_path, tmp_path / "nothing"])
    assert len(caught.value.problems) == 2
    (tmp_path / "x/whole/journal.jsonl").write_text('{"event": "train", "step": 0}\n')
    with pytest.raises(CheckpointError, match=r"journal\.jsonl is damaged"):
        everseg.compare([tmp_path / "x"])


def test_over_domains_numbers_are_per_domain_and_the_drop_is_against_the_same_seed(tmp_path: Path) -> None:
    def run(name: str, preset: str, seed: int, *steps: dict[str, float]) -> None:
        given = [{domain: counts(iou, iou) for domain, iou in step.items()} for step in steps]
        made_run(
            tmp_path, name, preset, given, [(3,)] * len(given), background=None, overrides=[f"seed={seed}"]
        )

    for seed in (0, 1):
        run(f"mdil-{seed}", "camvid-day-dusk-mdil", seed, {"day": 0.8}, {"day": 0.6, "dusk": 0.4 + seed / 10})
        run(f"single-{seed}", "camvid-day-dusk-single", seed, {"day": 0.8}, {"dusk": 0.8 + seed / 10})
    made = collect([tmp_path])[0]
    (table,) = made["tables"]

    def miou(iou: float) -> float:
        return (10_000 / (10_000 + 2000 * (1 - iou)) + 2 * iou) / 3

    mdil = group(made, "mdil")
    assert mdil["values"]["mIoU day"] == near([miou(0.6), miou(0.6)])
    assert mdil["values"]["mIoU dusk"] == near([miou(0.4), miou(0.5)])
    assert mdil["values"]["mIoU mean"][0] == near((miou(0.6) + miou(0.4)) / 2)
    assert mdil["values"]["forgetting"][0] == near(miou(0.8) - miou(0.6))
    drops = [
        (miou(0.6) / miou(0.8) - 1 + miou(0.4 + seed / 10) / miou(0.8 + seed / 10) - 1) / 2 for seed in (0, 1)
    ]
    assert mdil["values"]["relative drop"] == near(drops)
    assert "single" in [g["name"] for g in table["groups"]]
    assert tables.score_rows(table)[0]["relative drop"].startswith("-")


def test_published_rows_stand_only_where_conventions_match(tmp_path: Path) -> None:
    for seed, iou in ((0, 0.5), (1, 0.7)):
        steps = [{"default": counts(*[0.8] * 15)}, {"default": counts(*[iou] * 15, *[0.2] * 5)}]
        given = {"steps": steps, "groups": [(16,), (16, 5)]}
        made_run(tmp_path, f"m{seed}", "voc-15-5-overlapped-mib", **given, overrides=[*VOC, f"seed={seed}"])
    made_run(tmp_path, "f", "voc-15-5-overlapped-ft", **given)
    (table,) = collect([tmp_path])[0]["tables"]
    (source,) = [s for s in table["published"] if s["paper"].startswith("MiB")]
    assert [row["group"] for row in source["ours"]] == ["mib"], "fine-tuning began from random weights"
    assert source["ours"][0]["1-15"] == near({"mean": 60.0, "sd": 200**0.5, "n": 2})
    assert source["ours"][0]["16-20"] == near({"mean": 20.0, "sd": 0.0, "n": 2})
    (typed,) = [
        s for s in everseg.compare([tmp_path], write=False).tables[0].published if s.title == source["title"]
    ]
    assert typed.ours["mib"]["1-15"] == Estimate(near(60.0), near(200**0.5), 2, None)
    assert typed.rows["mib"] == {"1-15": 75.5, "16-20": 49.4, "all": 69.0}
    rows = tables.published_rows(source)
    assert rows[0] == {
        "method": "mib (here, 2 runs)",
        "1-15": "60.0 ± 14.1",
        "16-20": "20.0 ± 0.0",
        "all": "50.0 ± 10.6",
    }
    (mib,) = [row for row in rows if row["method"] == "mib"]
    assert list(mib.values()) == ["mib", "75.5", "49.4", "69.0"]
    refused = [one for one in table["not_comparable"] if "ft" in one["groups"]]
    must_say(
        (text for one in refused for text in one["because"]), "ImageNet weights there", "random ones here"
    )


def test_rows_of_the_plop_family_stand_beside_runs_with_their_labels(tmp_path: Path) -> None:
    """VOC 15-5: the columns first, last, all and average, of a family where an absent class counts 0."""
    steps = [{"default": counts(*[0.8] * 15)}, {"default": counts(*[0.5] * 15, *[0.2] * 5)}]
    last = steps[1]["default"]
    last[20] = 0  # no true pixel of the last class
    given = {"steps": steps, "groups": [(16,), (16, 5)]}
    for name, policy in (("mine", "plop-voc"), ("other", "mib-voc")):
        overrides = [*VOC, f"scenario.policy={policy}"]
        made_run(tmp_path, name, "voc-15-5-overlapped-mib", **given, overrides=overrides)
    mine, other = collect([tmp_path / "mine", tmp_path / "other"])[0]["tables"]
    assert [s["title"].partition(":")[0] for s in other["published"]] == ["MiB, Table 1"]
    assert "MiB, Table 1: voc 15-5 overlapped" in [one["source"] for one in mine["not_comparable"]]
    (source,) = [s for s in mine["published"] if s["paper"].startswith("PLOP")]
    background = 10_000 / (10_000 + 1000 * (15 * 0.5 + 4 * 0.8))
    start = (10_000 / (10_000 + 1000 * 15 * 0.2) + 15 * 0.8) / 16
    first, late = (background + 15 * 0.5) / 16, 4 * 0.2 / 5
    mean = (16 * first + 5 * late) / 21
    means = {column: source["ours"][0][column]["mean"] for column in source["columns"]}
    expected = {"first": first, "last": late, "all": mean, "average": (start + mean) / 2}
    assert means == {column: near(100 * value) for column, value in expected.items()}
    must_say(source["conventions"], "average", "steps")
    refused = {one["source"]: one for one in other["not_comparable"]}[source["title"]]
    assert refused["because"] == ["label policy plop-voc there, mib-voc here"]
    assert refused["rows"][-1] == {
        "method": "plop",
        "first": 75.73,
        "last": 51.71,
        "all": 70.09,
        "average": 75.19,
    }
    said = [piece for piece in tables.terminal({"tables": [other]}) if isinstance(piece, str)]
    must_say(said, "PLOP", "README image", "policy plop-voc there")
    page = Parsed(tables.html(collect([tmp_path / "other"])[0]))
    must_say(page.text, "not to be compared")
    assert "75.7" in page.text


# ---------------------------------------------------------------- files


def test_the_page_needs_nothing_else_and_says_the_numbers(sweep: Path) -> None:
    made = everseg.compare([sweep])
    page = parsed(sweep / "compare.html")
    drawn = ["compare.svg"] if charts.can_draw() else []
    assert [path.name for path in made.files] == [
        *(f"compare.{ending}" for ending in ("html", "csv", "tex", "md")),
        *drawn,
    ]
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            if name in attributes and tag != "a":
                assert attributes[name].startswith(("data:", "#")), (tag, attributes)
    text = page.text
    assert "20.0 ± 10.0" in text
    assert "+55.0 ± 7.1" in text
    assert "joint (upper bound)" in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_csv_holds_full_numbers(sweep: Path) -> None:
    everseg.compare([sweep], out=sweep / "out")
    rows = list(csv.DictReader((sweep / "out/compare.csv").read_text().splitlines()))
    (row,) = [r for r in rows if (r["group"], r["number"]) == ("mib", "old (no bg)")]
    assert float(row["mean"]) == near(0.75)
    assert float(row["difference"]) == near(0.55)
    assert (row["against"], row["pairs"], row["n"], row["seeds"]) == ("ft", "2", "2", "0 2")
    assert [float(v) for v in row["values"].split()] == near([0.7, 0.8])


def test_the_latex_is_a_plain_table_with_every_name_escaped(sweep: Path) -> None:
    made = collect([sweep])[0]
    group(made, "ft")["name"] = r"f_t & 50% {x} \input{a} $~^#"
    text = tables.latex(made)
    assert r"f\_t \& 50\% \{x\} \textbackslash{}input\{a\} \$\textasciitilde{}\textasciicircum{}\#" in text
    assert r"20.0 $\pm$ 10.0" in text
    assert "±" not in text
    assert re.search(r"\\(top|mid|bottom)rule", text) is None
    for block in re.findall(r"\\begin{tabular}{(lr*)}(.*?)\\end{tabular}", text, re.DOTALL):
        lines = [line for line in block[1].strip().splitlines() if line != r"\hline"]
        assert {len(re.split(r"(?<!\\)&", line)) for line in lines} == {len(block[0])}
        assert all(line.endswith(r"\\") for line in lines)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 5
    assert r"old $\uparrow$" in text
    assert r"forgetting $\downarrow$" in text
    assert all(line.startswith("%") or "%" not in line.replace(r"\%", "") for line in text.splitlines())


def test_a_hostile_name_is_text_everywhere(tmp_path: Path) -> None:
    made_run(tmp_path, "a", "demo-ft", **two_steps(0.8, 0.1, 0.5), overrides=["data.options.light=dusk"])
    made = collect([tmp_path])[0]
    made["tables"][0]["groups"][0]["name"] = '<script>alert("x")</script>\x1b[31m'
    page = Parsed(tables.html(made))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "\x1b" not in tables.html(made) + tables.latex(made)


def test_the_command_prints_the_table_and_json(sweep: Path, call: Call) -> None:
    code, out, err = call("compare", sweep, "--against", "mib")
    assert (code, err) == (0, "")
    assert re.search(r"^ft\s+3\s", out, re.MULTILINE)
    assert "20.0 ± 10.0" in out
    assert "0:31 ± 0:01" in out
    assert "compare.tex" in out
    code, out, _ = call("compare", sweep / "ft-0", sweep / "mib-0", "--out", sweep / "o", "--json")
    assert code == 0
    assert [g["name"] for g in json.loads(out)["tables"][0]["groups"]] == ["mib", "ft"]
    code, _, err = call("compare", sweep / "nothing")
    assert code == 2
    assert "needs run folders" in err
