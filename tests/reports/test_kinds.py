"""The kind of a run and every sentence that is true for some kinds only."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import counts, made_run, two_steps
from parsed_pages import Parsed, parsed

from everseg.labels import LabelSpace
from everseg.reports.figures import classes_chart, steps_chart
from everseg.reports.glossary import words
from everseg.reports.html import write_report
from everseg.reports.kinds import WORDS, Kind, Words, kind_of
from everseg.reports.picture_grid import CHANGES, change_legend
from everseg.runs.results import Results, Track
from everseg.runs.run_folder import RunFolder

ONE = {"steps": [{"default": counts(0.8, 0.6)}], "groups": [(3,)]}
BOTH = {"day": counts(0.8, 0.6), "dusk": counts(0.7, 0.5)}
EXTENDS = ["scenario.kind=extension", "scenario.bundle=old"]

MADE: dict[Kind, Callable[[Path], Path]] = {
    Kind.FIRST: lambda out: made_run(out, "r", "demo-offline-ft", **ONE, seconds=[9]),
    Kind.SEQUENCE: lambda out: made_run(out, "r", "demo-mib", **two_steps(0.8, 0.5, 0.4), seconds=[9, 9]),
    Kind.DOMAINS: lambda out: made_run(
        out, "r", "demo-day-dusk-ft", [{"day": BOTH["day"]}, BOTH], [(3,), (3,)], seconds=[9, 9]
    ),
    Kind.EXTENSION: lambda out: made_run(
        out, "r", "demo-mib", [{"default": counts(0.8, 0.6, 0.4)}], [(3, 1)], extends=True, seconds=[9],
        overrides=[*EXTENDS, "scenario.task=[[c3]]"],
    ),
    Kind.REFINEMENT: lambda out: made_run(
        out, "r", "demo-mib", **ONE, extends=True, new=0, seconds=[9], overrides=[*EXTENDS, "scenario.task=[]"]
    ),
    Kind.JOINT: lambda out: made_run(
        out, "r", "demo-joint", [{"default": counts(0.8, 0.6, 0.4)}], [(3, 1)], seconds=[9]
    ),
    Kind.SINGLE: lambda out: made_run(
        out, "r", "demo-day-dusk-single", [{"day": BOTH["day"]}, {"dusk": BOTH["dusk"]}], [(3,), (3,)], seconds=[9, 9]
    ),
}  # fmt: skip

TRUE: dict[Kind, list[str]] = {
    Kind.FIRST: ["learnt c1, c2", "no class is old", "What classes are taken for"],
    Kind.SEQUENCE: ["Step 1 added c3", "old classes went from", "when it was learnt", "Forgetting", "backward transfer",
                    "What old classes turned into", "What new classes are taken for", "protocol overlapped"],
    Kind.DOMAINS: ["Step 1 trained on", "day went from", "dusk reaches", "Every domain after every step",
                   "relative drop", "Forgetting of every domain"],
    Kind.EXTENSION: ["Step 1 taught c3 to a deployed model", "What classes are taken for", "extended model",
                     "Before and after"],
    Kind.REFINEMENT: ["taught a deployed model more images", "refined model"],
    Kind.JOINT: ["Taught all 3 classes at once", "at the same time", "What classes are taken for",
                 "which sees every label. Usually the upper bound"],
    Kind.SINGLE: ["one domain each reach day", "dusk", "Every domain with a model of its own", "relative drop"],
}  # fmt: skip
"""What the page of each kind must say, beside the sentences of `WORDS`."""

FALSE: dict[Kind, list[str]] = {
    Kind.FIRST: ["Step matrix", "Forgetting", "old classes", "protocol", "upper bound", "deployed",
                 "learnt with it", "step that taught them", "grew most"],
    Kind.SEQUENCE: ["deployed", "domain", "no class is old"],
    Kind.DOMAINS: ["deployed", "added", "protocol", "one domain each"],
    Kind.EXTENSION: ["at once", "Step matrix", "Forgetting by", "Every domain"],
    Kind.REFINEMENT: ["at once", "Step matrix", "added", "new classes", "Old, new", "Every domain"],
    Kind.JOINT: ["Step matrix", "Forgetting", "went from", "when it was learnt", "deployed",
                 "turned into", "learnt before it", "step that taught them", "model of step", "grew most"],
    Kind.SINGLE: ["Forgetting", "Step matrix", "went from", "deployed", "when it was", "not tested yet",
                  "learnt before it", "step that taught them", "grew most"],
}  # fmt: skip
"""What would be wrong or mislead on the page of each kind."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Parsed]:
    found = {}
    for kind, make in MADE.items():
        results = Results(RunFolder(make(tmp_path_factory.mktemp(kind.name.lower()))))
        assert kind_of(results) is kind
        found[kind] = parsed(write_report(results, results.config, images=0).path)
    return found


def shown(kind: Kind) -> dict[str, str]:
    """The sentences of a kind that stand on a page without pictures; only their fixed parts."""
    words = WORDS[kind]
    parted = "" if kind is Kind.DOMAINS else words.parted  # no class of these pages is old
    said = {"scores": words.scores, "parted": parted, "per_class": words.per_class.partition("{step}")[0],
            "training": words.training, "data": words.data, "domains": words.domains,
            "per_domain": words.per_domain}  # fmt: skip
    if kind in (Kind.FIRST, Kind.SEQUENCE, Kind.EXTENSION, Kind.REFINEMENT, Kind.JOINT):
        said |= {"domains": "", "per_domain": ""}
    return {name: " ".join(text.split()) for name, text in said.items() if text}


@pytest.mark.parametrize("kind", list(Kind))
def test_the_page_of_a_kind_says_what_is_true_for_it_and_nothing_of_another(
    kind: Kind, pages: dict[Kind, Parsed]
) -> None:
    whole = pages[kind].text  # without the configuration, which names every setting
    text = whole[: whole.index("Do it again")] + whole[whole.index("Words on this page") :]
    assert f"kind of run {kind}" in text
    for said in (*shown(kind).values(), *TRUE[kind]):
        assert said in text, said
    own = set(shown(kind).values())
    others = {said for other in Kind for said in shown(other).values()}
    others = {said for said in others if not any(said in mine for mine in own)}
    for said in (*others, *FALSE[kind], "After its first step"):
        assert said not in text, said


@pytest.mark.parametrize("kind", list(Kind))
def test_the_table_has_a_sentence_for_every_kind_and_place(kind: Kind) -> None:
    words = WORDS[kind]
    empty = {field.name for field in fields(Words) if not getattr(words, field.name)}
    domains = set() if kind in (Kind.DOMAINS, Kind.JOINT, Kind.SINGLE) else {"domains", "per_domain"}
    mark = {"mark"} if kind in (Kind.FIRST, Kind.JOINT, Kind.SINGLE) else set()
    scores = {"scores"} if kind is Kind.REFINEMENT else set()
    parted = {"parted", "base"} if kind in (Kind.FIRST, Kind.REFINEMENT, Kind.SINGLE) else set()
    apart = set() if kind in (Kind.FIRST, Kind.JOINT, Kind.SINGLE) else {"together"}
    assert empty == domains | mark | scores | parted | apart
    assert len(words.changes) == len(CHANGES)
    assert ("steps" in words.models) == (
        kind in (Kind.SEQUENCE, Kind.DOMAINS, Kind.EXTENSION, Kind.REFINEMENT)
    )
    legend = [text for _, text in change_legend(words)]
    assert any("forgotten" in text for text in legend) == (not mark)


def test_a_sequence_stays_one_when_only_its_first_step_is_finished(tmp_path: Path) -> None:
    path = made_run(tmp_path, "r", "demo-mib", **ONE, planned_steps=2)
    results = Results(RunFolder(path))
    assert kind_of(results) is Kind.SEQUENCE
    page = parsed(write_report(results, results.config, images=0).path)
    assert "After its first step" in page.text
    assert "learnt c1, c2" not in page.text


def test_a_step_without_a_new_class_is_not_said_to_add_those_of_the_first(tmp_path: Path) -> None:
    steps = [{"default": counts(0.8, 0.6)}, {"default": counts(0.9, 0.7)}]
    path = made_run(tmp_path, "r", "demo-mib", steps, [(3,), (3,)], new=0)
    results = Results(RunFolder(path))
    text = json.loads(parsed(write_report(results, results.config, images=0).path).download("r.json"))[
        "sentence"
    ]
    assert "added no class" in text
    assert "c1" not in text


def test_columns_that_say_the_same_stand_once_on_the_page_and_in_full_in_the_files(tmp_path: Path) -> None:
    def heads(background: int | None, name: str) -> tuple[str, Any]:
        path = made_run(tmp_path, name, "demo-mib", **two_steps(0.8, 0.5, 0.4), background=background)
        results = Results(RunFolder(path))
        page = parsed(write_report(results, results.config, images=0).path)
        return page.text, json.loads(page.download(f"{name}.json"))["tables"]

    text, tables = heads(None, "without")
    assert "(no background)" not in text
    assert "all (no background)" in tables["steps"][0]
    text, _ = heads(0, "with")
    assert "all (no background)" in text
    assert " base accuracy" not in text, "base is old under another name where there are two steps"


def test_the_deployed_model_is_the_mark_of_an_extension(tmp_path: Path) -> None:
    results = Results(RunFolder(MADE[Kind.EXTENSION](tmp_path)))
    (track,) = results.tracks
    chart = classes_chart(track, "k", WORDS[Kind.EXTENSION], before={"c1": 0.9, "c2": 0.6, "c3": None})
    assert chart is not None
    assert ("mark", "with the deployed model") in chart.legend
    assert "deployed model" in chart.caption
    if chart.svg:
        assert ">90.0<" in chart.svg
    assert np.isclose(track.scores[-1]["class_iou"][1], 0.8)


def test_every_loss_term_and_setting_on_the_page_is_explained_there(tmp_path: Path) -> None:
    results = Results(RunFolder(MADE[Kind.SEQUENCE](tmp_path)))
    told = dict(words(results, Kind.SEQUENCE, ["ce", "kd", "odd"], joint=True))
    assert {"IoU", "mIoU", "forgetting", "protocol overlapped", "label policy ignore-void", "seed", "joint training",
            "loss term ce", "loss term kd"} <= set(told)  # fmt: skip
    assert "mib" in told["loss term odd"], "whose term it is"
    assert "joint training" not in dict(words(results, Kind.SEQUENCE, [], joint=False))
    assert not [text for text in told.values() if text.endswith(".")], "the page ends each with one"


def test_more_than_eight_groups_of_classes_get_a_hatching_in_chart_and_legend() -> None:
    number = 10
    spaces = [LabelSpace(tuple((c,) for c in range(n)), tuple(f"c{c}" for c in range(n)), None)
              for n in range(1, number + 1)]  # fmt: skip
    tested = [np.diag(np.full(n, 10)) for n in range(1, number + 1)]
    track = Track("default", "default", tuple(range(number)), tuple(tested), tuple(spaces))
    chart = classes_chart(track, "k", WORDS[Kind.SEQUENCE])
    assert chart is not None
    colours = [colour for colour, name in chart.legend if name.startswith("learnt in")]
    assert len(set(colours)) == number
    assert [colour.startswith("repeating-linear-gradient") for colour in colours] == [False] * 8 + [True] * 2
    assert chart.svg is None or chart.svg.count("<pattern") > 0


def test_a_background_that_no_pixel_is_is_not_spoken_of() -> None:
    """CamVid labels every pixel: its model has an output for background, which the means do not count."""
    space = LabelSpace(((0,), (1, 2)), ("background", "road", "tree"), 0)
    for true, counted in ((0, False), (7, True)):
        counts = np.array([[true, 0, 0], [1, 5, 0], [0, 2, 4]])
        track = Track("one", "default", (0, 1), (counts, counts), (space, space))
        assert track.counts_background is counted
        chart = steps_chart(track, "steps")
        assert chart is not None
        assert ("background" in chart.caption) is counted
