"""Published numbers: complete, tagged, and never beside a run that was made otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everseg.config.loading import load
from everseg.labels import POLICIES, LabelSpace, RawLabels
from everseg.reports.published import (
    COLUMN_TEXT,
    KIND_TEXT,
    REPORTING,
    Match,
    Published,
    matches,
    own_domain_numbers,
    own_numbers,
    published,
)
from everseg.scenarios.tasks import task_groups
from saying import must_say

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "published_numbers.json"
ADDITIONS = REFERENCE.with_name("published_additions.json")
METHODS = {"FT": "ft", "PI": "pi", "EWC": "ewc", "RW": "rw", "LwF": "lwf", "LwF-MC": "lwf-mc", "ILT": "ilt",
           "MiB": "mib", "Joint": "joint", "MDIL": "mdil"}  # fmt: skip
SETS = {"CS": "cityscapes", "BDD": "bdd100k", "IDD": "idd"}
IMAGENET = "model.weights=resnet101.pth"


def found(preset: str, *overrides: str, domains: tuple[str, ...] = ()) -> list[Match]:
    config = load(preset, overrides)
    cut = config.train.max_iterations
    return matches(config.data, config.scenario, config.model, domains, cut=cut)


def one(**wanted: Any) -> Published:
    (entry,) = [e for e in published() if all(getattr(e, key) == value for key, value in wanted.items())]
    return entry


def test_mib_on_voc_stands_beside_the_same_task_protocol_and_backbone_only() -> None:
    comparable = [m for m in found("voc-15-5-overlapped-mib", IMAGENET) if m.comparable]
    assert [m.published.paper[:3] for m in comparable] == ["MiB"]
    entry = comparable[0].published
    assert (entry.task, entry.protocol, entry.background) == ("15-5", "overlapped", "excluded")
    assert entry.methods["mib"] == (75.5, 49.4, 69.0)
    assert any("resnet101.pth" in remark for remark in comparable[0].remarks), (
        "whose weights is for the reader"
    )
    must_say(comparable[0].remarks, "iabn there", "abn here")


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        ([], ["ImageNet weights there", "random ones here"]),
        ([IMAGENET, "protocol=disjoint"], ["protocol overlapped there", "disjoint here"]),
        ([IMAGENET, "model.name=deeplabv3-resnet50"], ["deeplabv3-resnet101 there", "deeplabv3-resnet50 here"]),
        ([IMAGENET, "model.options={hidden: 128}"], ["hidden changed"]),
        ([IMAGENET, "model.output_stride=8"], ["stride 16 there", "8 here"]),
        ([IMAGENET, "model.norm=bn"], ["norm iabn there", "bn here"]),
        ([IMAGENET, "data.evaluation=whole"], ["images", "crop 512 there", "whole here"]),
        ([IMAGENET, "data.crop=256"], ["crop 512 there", "crop 256 here"]),
        ([IMAGENET, "scenario.policy=plop-voc"], ["policy mib-voc there", "plop-voc here"]),
        ([IMAGENET, "scenario.policy=plop"], ["policy mib-voc there", "plop-voc here"]),
        ([IMAGENET, "scenario.test_split=train"], ["split val there", "train here"]),
        ([IMAGENET, "train.max_iterations=5"], ["cut short"]),
        ([IMAGENET, "scenario.order=[2,1,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20]"], ["order of its own"]),
    ],
)  # fmt: skip
def test_one_difference_is_enough_not_to_compare(overrides: list[str], facts: list[str]) -> None:
    entry = one(dataset="voc", task="15-5", protocol="overlapped", background="excluded")
    (match,) = [m for m in found("voc-15-5-overlapped-mib", *overrides) if m.published == entry]
    assert not match.comparable
    must_say(match.differences, *facts)


def test_aliases_are_the_same_task_and_other_tasks_are_not_mentioned() -> None:
    names = {m.published.task for m in found("voc-15-5s-mib")}
    assert names == {"15-1"}
    assert {m.published.task for m in found("voc-10-5-5-mib")} == set()
    assert found("camvid-6-5-mib") == []
    assert found("demo-mib") == []


def test_a_mean_over_two_class_orders_is_compared_with_no_run() -> None:
    listed = found("ade-100-50-mib", IMAGENET)
    assert listed
    assert not any(match.comparable for match in listed)
    must_say((d for m in listed for d in m.differences), "a and b there")
    mean = one(dataset="ade", task="100-50", protocol="disjoint")
    assert (mean.policy, mean.single_run) == ("mib-ade", False)


PLOP = [IMAGENET, "scenario.policy=plop-voc", "model.norm=iabn"]


def test_rows_of_the_plop_family_stand_beside_runs_with_their_labels() -> None:
    listed = {m.published.title: m for m in found("voc-15-1-overlapped-mib", *PLOP)}
    comparable = [title for title, match in listed.items() if match.comparable]
    assert {title.partition(",")[0] for title in comparable} == {"PLOP", "REMINDER", "RCIL"}
    (plop,) = [listed[title] for title in comparable if title.startswith("PLOP")]
    assert plop.rows[-1] == {"method": "plop", "first": 65.12, "last": 21.11, "all": 54.64, "average": 67.21}
    must_say(plop.conventions, "background counted")
    must_say(plop.conventions, "policy plop-voc")
    must_say(plop.conventions, "PLOP's rule", "count 0")
    must_say(plop.conventions, "first", "step 0")
    must_say(plop.conventions, "checkpoint last")
    (mib,) = [
        m for title, m in listed.items() if title.startswith("MiB") and m.published.protocol == "overlapped"
    ]
    assert mib.differences == ("label policy mib-voc there, plop-voc here",)
    own = found("voc-15-1-overlapped-mib", *PLOP, "model.options={compensation: true}")
    assert [m.published.title for m in own if m.comparable] == comparable, "RCIL's branches are of the method"


def test_what_everseg_cannot_do_or_the_source_does_not_say_is_the_reason_not_to_compare() -> None:
    listed = {m.published.title: m for m in found("voc-15-1-overlapped-mib", *PLOP)}

    def reasons(start: str) -> list[str]:
        return [d for title, m in listed.items() if title.startswith(start) for d in m.differences]

    must_say(reasons('SSUL, README, "Exp'), "checkpoint", "best", "test images", "last one here")
    must_say(reasons('SSUL, README, "Exp'), "crop 513 there", "crop 512 here")
    must_say(reasons("SSUL, README, rows"), "quoted")
    must_say(reasons("MicroSeg"), "listing")
    must_say(reasons("STAR"), "not stated", "checkpoint")
    must_say(reasons("UCD"), "policy not known there", "plop-voc here")
    same = [*PLOP, "model.norm=bn"]
    assert [m.published.paper[:3] for m in found("voc-15-1-overlapped-mib", *same) if m.comparable] == ["DKD"]
    (failed,) = [
        m for m in found("ade-100-50-mib", "scenario.task=100-5", "scenario.lists=null", "protocol=overlapped")
        if m.published.title.startswith("SegACIL")
    ]  # fmt: skip
    must_say(failed.differences, "0.00", "101-150")


def test_ssul_as_its_preset_trains_it_differs_from_its_table_in_the_checkpoint_alone() -> None:
    (own,) = [
        m for m in found("voc-15-1-ssul", IMAGENET) if m.published.title.startswith('SSUL, README, "Exp')
    ]
    (only,) = own.differences
    must_say(only, "checkpoint", "best", "last one here")


def test_steps_of_single_cities_are_listed_for_runs_over_parts_of_cityscapes_only() -> None:
    parts = [f"data.domains.{name}.dataset=cityscapes" for name in load("cs-bdd-idd-mdil").data.domains]
    listed = found("cs-bdd-idd-mdil", *parts, domains=("cityscapes",) * 3)
    assert {m.published.task for m in listed} == {"11-1", "1-1"}
    assert not any(m.comparable for m in listed)
    must_say(listed[0].differences, "cities", "11-1")


def test_domains_compare_by_their_data_sets_in_order() -> None:
    sets = ("cityscapes", "bdd100k", "idd")
    (match,) = [m for m in found("cs-bdd-idd-mdil", "model.weights=erfnet.pth", domains=sets) if m.comparable]
    assert match.published.methods["mdil"] == (59.19, 49.66, 59.16, -10.39)
    must_say(match.conventions, "checkpoint mixed")
    scratch = found("cs-bdd-idd-mdil", domains=sets)
    assert not any(m.comparable for m in scratch)
    other = found("cs-idd-bdd-mdil", "model.weights=x.pth", domains=("cityscapes", "idd", "bdd100k"))
    assert [m.published.domains for m in other if m.comparable] == [("cityscapes", "idd", "bdd100k")]
    assert found("cs-bdd-idd-multi", "model.weights=x.pth", domains=sets) == []
    (single,) = [m for m in found("cs-bdd-idd-single", "model.weights=x.pth", domains=sets) if m.comparable]
    assert single.published.methods == {"single": (72.55, 54.1, 61.97)}


def test_own_numbers_are_taken_in_the_columns_and_the_convention_of_the_source() -> None:
    """VOC 15-1 after its last step: columns 1-15 and 16-20 cut across the six steps."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 50, (21, 21)) + np.diag(rng.integers(100, 900, 21))
    space = LabelSpace(
        ((tuple(range(16))), *((i,) for i in range(16, 21))), tuple(f"c{i}" for i in range(21)), 0
    )
    iou = [counts[c, c] / (counts[c].sum() + counts[:, c].sum() - counts[c, c]) for c in range(21)]
    without = one(dataset="voc", task="15-1", protocol="overlapped", background="excluded")
    assert own_numbers(without, [counts], space) == pytest.approx(
        [100 * np.mean(iou[1:16]), 100 * np.mean(iou[16:]), 100 * np.mean(iou[1:])], abs=1e-4
    )
    counted = titled('SSUL, README, "Exp', "15-1", "voc")
    assert own_numbers(counted, [counts], space) == pytest.approx([100 * np.mean(iou)], abs=1e-4)


def titled(start: str, task: str, dataset: str, protocol: str = "overlapped") -> Published:
    (entry,) = [
        e for e in published()
        if e.title.startswith(start) and (e.task, e.dataset, e.protocol) == (task, dataset, protocol)
    ]  # fmt: skip
    return entry


def test_own_numbers_follow_the_reporting_rule_of_the_plop_family() -> None:
    """VOC 15-1 with a class of step 0 and one of a later step that no test pixel shows: they count 0."""
    counts = [np.diag(np.full(n, 100)) for n in range(16, 22)]
    counts[-1][0, 16] = 100  # half of the background is taken for the first later class: both have IoU 1/2
    for n in counts:
        n[3, 3] = 0
    counts[-1][18, 18] = 0
    space = LabelSpace(
        ((tuple(range(16))), *((i,) for i in range(16, 21))), tuple(f"c{i}" for i in range(21)), 0
    )
    first, last = (0.5 + 14) / 16, (0.5 + 3) / 5
    average = np.mean([15 / 16, 16 / 17, 17 / 18, 18 / 19, 19 / 20, (0.5 + 14 + 0.5 + 3) / 21])
    counts[-1][0, 0] = 100
    found = own_numbers(titled("PLOP", "15-1", "voc"), counts, space)
    assert found == pytest.approx(
        [100 * v for v in (first, last, (16 * first + 5 * last) / 21, average)], abs=1e-4
    )
    harmonic = 2 * (14.5 / 15) * (3.5 / 4) / (14.5 / 15 + 3.5 / 4)
    dkd = own_numbers(titled("DKD, README", "15-1", "voc"), counts, space)
    assert dkd == pytest.approx([100 * harmonic, 100 * 18 / 19], abs=1e-4), "DKD's rule is not known: MiB's"
    steps = own_numbers(titled("SegACIL, lines", "15-1", "voc"), counts, space)
    assert steps[0] == pytest.approx(100, abs=1e-4)
    assert steps[-1] == pytest.approx(100 * 18 / 19, abs=1e-4)
    assert own_numbers(titled("PLOP", "15-1", "voc"), counts[-1:], space)[-1] is None, (
        "joint training: no steps"
    )


def test_own_numbers_over_domains() -> None:
    entry = one(domains=("cityscapes", "bdd100k"))
    assert own_domain_numbers(entry, {"bdd100k": 0.5, "cityscapes": 0.25}, None) == (25.0, 50.0, None)


def test_the_shipped_numbers_are_those_of_the_reference() -> None:
    if not REFERENCE.is_file():
        pytest.skip("the reference numbers (../shared/reference) are not at hand")
    given = json.loads(REFERENCE.read_text())
    for task in ("19-1", "15-5", "15-1"):
        for protocol, methods in given["mib_voc"][task].items():
            entry = one(dataset="voc", task=task, protocol=protocol, background="excluded")
            assert entry.methods == {METHODS[name]: tuple(values) for name, values in methods.items()}
    for name, task in (("100-50", "100-50"), ("100-10", "100-10"), ("50-50", "50")):
        entry = one(dataset="ade", task=task, protocol="disjoint")
        expected = dict(given["mib_ade"][name])
        assert list(entry.columns) == expected.pop("groups")
        assert entry.methods == {METHODS[method]: tuple(values) for method, values in expected.items()}
    for name, methods in ((k, v) for k, v in given["mdil"].items() if "->" in k):
        entry = one(domains=tuple(SETS[part] for part in name.split("->")), single=False)
        for method, values in methods.items():
            assert dict(zip(entry.columns, entry.methods[METHODS[method]], strict=True)) == {
                **{SETS[k]: v for k, v in values.items() if k in SETS}, "relative drop": values["dm"]
            }  # fmt: skip


def given_additions() -> dict[str, Any]:
    if not ADDITIONS.is_file():
        pytest.skip("the reference numbers (../shared/reference) are not at hand")
    return json.loads(ADDITIONS.read_text())


def rows(tasks: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(task, method, numbers) of a table in the reference; remarks and what is not available are no rows."""
    return [
        ("50" if task == "50-50" else task, name.lower(), value)
        for task, methods in tasks.items()
        for name, value in (methods.items() if isinstance(methods, dict) else ())
    ]


def assert_shipped(start: str, dataset: str, tasks: dict[str, Any], protocol: str = "overlapped") -> None:
    found = rows(tasks)
    assert found
    for task, method, value in found:
        values = titled(start, task, dataset, protocol).methods[method]
        assert list(values) == (value if isinstance(value, list) else [value]), (start, task, method)


@pytest.mark.parametrize("dataset", ["voc", "ade"])
def test_the_shipped_additions_are_those_of_the_reference(dataset: str) -> None:
    given = given_additions()
    assert_shipped('SSUL, README, "Exp', dataset, given["ssul"][dataset])
    quoted: dict[str, dict[str, float]] = {}
    for name, tasks in given["ssul"]["quoted_baselines"][dataset].items():
        for task, value in tasks.items():
            quoted.setdefault(task, {})[name] = value
    assert_shipped("SSUL, README, rows", dataset, quoted)
    assert_shipped("BARM", dataset, given["barm"][dataset])
    for protocol in ("overlapped", "disjoint") if dataset == "voc" else ("overlapped",):
        assert_shipped("DKD, README", dataset, given["dkd"][f"{dataset}_{protocol}"], protocol)
        assert_shipped("STAR", dataset, given["star"][f"{dataset}_{protocol}"], protocol)
    microseg = given["microseg"]["voc_overlapped" if dataset == "voc" else "ade"]
    unsure = {
        task: dict.fromkeys(["microseg-m (unsure)"], each["MicroSeg-M?"]) for task, each in microseg.items()
    }
    assert_shipped("MicroSeg", dataset, unsure)


def test_the_shipped_logs_are_those_of_the_reference() -> None:
    given = given_additions()["segacil"]
    for protocol in ("overlapped", "disjoint", "sequential"):
        tasks = given[f"voc_{protocol}"]
        named = {
            t: {f"segacil ({name.partition(' (')[0]})": v for name, v in each.items()}
            for t, each in tasks.items()
        }
        assert_shipped("SegACIL, final", "voc", named, protocol)
    for key, values in given["per_step_all"].items():
        protocol, task, *_ = key.split(" ")
        (found,) = titled("SegACIL, lines of every step of the logs", task, "voc", protocol).methods.values()
        assert list(found) == values
    for task in ("11-1", "1-1"):
        (found,) = titled("SegACIL", task, "cityscapes", "domain-incremental").methods.values()
        assert list(found) == given["cityscapes_domain"][task]["per_step"]
        assert found[-1] == given["cityscapes_domain"][task]["final"]
    (failed,) = given["ade"].values()
    assert list(titled("SegACIL", "100-5", "ade").methods["segacil"]) == failed["all_per_step"]


def test_means_of_the_plop_family_close_with_the_background_among_the_first_classes() -> None:
    """What tells that their tables count class 0: all = (16 first + 5 last) / 21, on ADE20K (101, 50) of 151."""
    closed = 0
    for entry in published():
        if entry.reporting != "plop" or "last" not in entry.columns or entry.kind == "quoted":
            continue
        total, first = {"voc": 21, "ade": 151}[entry.dataset or ""], 1 + int((entry.task or "").split("-")[0])
        for name, values in entry.methods.items():
            row = dict(zip(entry.columns, values, strict=True))
            mean = (first * row["first"] + (total - first) * row["last"]) / total
            # Two rows of the sources do not close: REMINDER's SDR (0.21), PLOP on 15-5 (0.08).
            assert mean == pytest.approx(row["all"], abs=0.25 if name in ("sdr", "plop") else 0.02), (
                entry.title
            )
            closed += 1
    assert closed > 35


def test_every_row_names_a_known_task_protocol_and_convention() -> None:
    sizes = {"voc": 20, "ade": 150}
    for entry in published():
        assert entry.kind in KIND_TEXT
        assert entry.reporting is None or entry.reporting in REPORTING
        assert entry.policy in (None, "not stated", *POLICIES.keys() - {"plop"}), entry.title
        assert entry.checkpoint
        assert entry.evaluation["kind"] in ("crop", "resize", "not stated")
        assert all(method in entry.methods for method in entry.memory), entry.title
        if entry.domains:
            assert all(column in (*entry.domains, "relative drop") for column in entry.columns)
            continue
        if entry.dataset == "cityscapes":
            assert entry.cannot, "city by city: no task of everseg"
            continue
        labels = RawLabels({i: f"class {i}" for i in range(sizes[entry.dataset or ""] + 1)})
        steps = task_groups(entry.task or "", labels, entry.dataset or "")
        assert entry.protocol in ("disjoint", "overlapped", "sequential", "partitioned")
        for column in entry.columns:
            assert (
                column in ("all", *COLUMN_TEXT, *(f"step {i}" for i in range(len(steps))))
                or column.replace("-", "").isdigit()
            ), column
    assert len({entry.title for entry in published()}) == len(published()), "a comparison tells them by title"


def test_every_entry_says_how_it_was_made() -> None:
    assert len(published()) > 120
    for entry in published():
        assert all((entry.paper, entry.table, entry.source, entry.mean, entry.seeds))
        assert entry.url.startswith("https://")
        assert {"model", "norm", "weights"} <= entry.backbone.keys()
        assert bool(entry.domains) != bool(entry.dataset and entry.task and entry.protocol)
