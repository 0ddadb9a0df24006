"""Published numbers: complete, tagged, and never beside a run that was made otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everseg.config.loading import load
from everseg.labels import LabelSpace
from everseg.reports.published import Match, Published, matches, own_domain_numbers, own_numbers, published
from saying import must_say

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "published_numbers.json"
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
    must_say((d for m in listed for d in m.differences), "not stated", "background")


def test_domains_compare_by_their_data_sets_in_order() -> None:
    sets = ("cityscapes", "bdd100k", "idd")
    (match,) = [m for m in found("cs-bdd-idd-mdil", "model.weights=erfnet.pth", domains=sets) if m.comparable]
    assert match.published.methods["mdil"] == (59.19, 49.66, 59.16, -10.39)
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
    assert own_numbers(without, counts, space) == pytest.approx(
        [100 * np.mean(iou[1:16]), 100 * np.mean(iou[16:]), 100 * np.mean(iou[1:])], abs=1e-4
    )
    counted = one(dataset="voc", task="15-1", protocol="overlapped", background="included")
    assert own_numbers(counted, counts, space) == pytest.approx([100 * np.mean(iou)], abs=1e-4)


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


def test_every_entry_says_how_it_was_made() -> None:
    assert len(published()) > 20
    for entry in published():
        assert all((entry.paper, entry.table, entry.source, entry.mean, entry.seeds))
        assert entry.url.startswith("https://")
        assert {"model", "norm", "weights"} <= entry.backbone.keys()
        assert bool(entry.domains) != bool(entry.dataset and entry.task and entry.protocol)
