"""What runs cost, and the leaderboard: known numbers, the best of each column, Markdown and the picture."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from made_runs import made_run, two_steps
from parsed_pages import Parsed
from torch import Tensor

import everseg
from everseg.data.batches.selection import Candidate
from everseg.errors import CheckpointError
from everseg.reports import charts
from everseg.reports.compare import tables
from everseg.reports.compare.answer import winners
from everseg.reports.compare.columns import best, column
from everseg.reports.compare.comparison import collect
from everseg.reports.figures import old_new_chart
from everseg.reports.label_layout import Box, Dot, place
from everseg.runs.memory import Copy, Kept, Memory
from saying import must_say

Json = dict[str, Any]


def weights(encoder: float, old: list[float], new: list[float] | None = None) -> dict[str, Tensor]:
    """A model of six encoder weights with statistics, and a head per step."""
    return {
        "encoder.weight": torch.full((2, 3), float(encoder)),
        "encoder.norm.running_mean": torch.tensor([float(encoder)]),
        "encoder.norm.num_batches_tracked": torch.tensor(int(encoder)),
        "heads.0.bias": torch.tensor(old, dtype=torch.float32),
        **({} if new is None else {"heads.1.bias": torch.tensor(new, dtype=torch.float32)}),
    }


def kept(number: int, *, files: bool = False) -> Memory:
    copies = [Copy(0, f"memory-{n}.png", f"memory-{n}-mask.png") if files else None for n in range(number)]
    images = [
        Kept(Candidate(f"i{n}", "demo", "train", (1,), (9,), (1,), (0,)), copy)
        for n, copy in enumerate(copies)
    ]
    return Memory(number, "random", number, tuple(images))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Fine-tuning twice, a memory and a frozen encoder, a run without journal and weights, joint training."""
    first = weights(1, [1, 2])
    for seed in (0, 1):
        made_run(tmp_path, f"ft-{seed}", "demo-ft", **two_steps(0.8, 0.1 + seed / 10, 0.5), seconds=[10, 20 + seed],
                 overrides=[f"seed={seed}"], weights=[first, weights(2, [1, 3], [5, 6, 7])])  # fmt: skip
    made_run(tmp_path, "ssul", "demo-ssul-m", **two_steps(0.8, 0.7, 0.4), seconds=[10, 5],
             weights=[first, weights(1, [1, 2], [5, 6, 7])], memory=kept(4, files=True))  # fmt: skip
    made_run(tmp_path, "mib", "demo-mib", **two_steps(0.8, 0.6, 0.4))
    joint = two_steps(0.8, 0.9, 0.9)
    made_run(tmp_path, "joint", "demo-joint", joint["steps"][1:], joint["groups"][1:], seconds=[40],
             weights=[weights(2, [1, 3], [5, 6, 7])])  # fmt: skip
    return tmp_path


def found(made: Json, name: str) -> Json:
    (one,) = [g for g in made["tables"][0]["groups"] if g["name"] == name]
    return one


def means(made: Json, name: str) -> Json:
    return {key: score["mean"] for key, score in found(made, name)["scores"].items()}


def test_time_memory_parameters_and_images_are_the_known_ones(sweep: Path) -> None:
    made = collect([sweep])[0]
    ft = means(made, "ft")
    assert ft["time"] == pytest.approx(30.5)
    assert ft["time per later step"] == pytest.approx(20.5)
    assert ft["memory"] == 200 * 2**20, "of the later step alone"
    assert ft["parameters trained"] == 6 + 1 + 3, "encoder, one of the old head, the new head"
    assert ft["parameters"] == 11, "neither statistics nor whole numbers"
    assert (ft["images kept"], ft["bytes kept"]) == (0, None)
    ssul = means(made, "ssul-m")
    assert ssul["parameters trained"] == 3, "the encoder did not change"
    names = [name for copy in kept(4, files=True).copies for name in copy.names]
    assert (ssul["images kept"], ssul["bytes kept"]) == (4, sum(map(len, names)))
    joint = means(made, "joint")
    assert (joint["time per later step"], joint["parameters trained"]) == (None, None)
    assert (joint["memory"], joint["parameters"]) == (100 * 2**20, 11)
    mib = means(made, "mib")
    assert {
        mib[n] for n in ("time", "time per later step", "memory", "parameters trained", "parameters")
    } == {None}


def test_a_tensor_that_grew_is_new_only_where_it_grew(tmp_path: Path) -> None:
    grown = [{"head": torch.ones(2, 3)}, {"head": torch.cat([torch.ones(2, 3), torch.zeros(1, 3)])}]
    made_run(tmp_path, "a", "demo-ft", **two_steps(0.8, 0.1, 0.5), weights=grown)
    assert means(collect([tmp_path])[0], "ft")["parameters trained"] == 3


def test_weights_that_are_gone_leave_out_only_what_they_say(sweep: Path) -> None:
    (sweep / "ssul/steps/00/final/model.safetensors").unlink()
    made = collect([sweep])[0]
    assert means(made, "ssul-m")["parameters trained"] is None
    assert means(made, "ssul-m")["old (no bg)"] == pytest.approx(0.7)
    must_say(made["notes"], "ssul", "parameters", "model.safetensors is missing")


def test_a_copy_that_is_not_there_is_damage(tmp_path: Path) -> None:
    memory = kept(2, files=True)
    lost = Memory(
        2, "random", 2, (*memory.images[:1], Kept(memory.images[1].image, Copy(7, "a.png", "b.png")))
    )
    made_run(tmp_path, "a", "demo-ssul-m", **two_steps(0.8, 0.1, 0.5), memory=lost)
    with pytest.raises(CheckpointError, match="07"):
        collect([tmp_path])


def test_the_leaderboard_marks_the_best_of_each_column_but_not_joint_training(sweep: Path) -> None:
    (table,) = collect([sweep])[0]["tables"]
    board = tables.leaderboard(table)
    assert [group["name"] for group, _ in board.rows] == ["ssul-m", "mib", "ft", "joint"]
    cells = {g["name"]: dict(zip(board.numbers, row, strict=True)) for g, row in board.rows}
    assert board.numbers == (
        "old", "new", "all", "average", "forgetting", "old (no bg)", "new (no bg)", "all (no bg)",
        "time per later step", "memory", "parameters trained", "images kept", "time",
    )  # fmt: skip
    marked = {name: [n for n, cell in row.items() if cell.best] for name, row in cells.items()}
    assert marked["joint"] == []
    assert {"old", "all", "forgetting", "time per later step", "parameters trained"} <= set(marked["ssul-m"])
    assert {"new", "new (no bg)"} <= set(marked["ft"])
    assert cells["ssul-m"]["parameters trained"].text == "3 (27.3 %)"
    assert cells["ft"]["time per later step"].text == "20.5 ± 0.7 s"
    assert cells["ft"]["memory"].text == "200 MiB"
    assert [row["images kept"].text for row in cells.values()] == ["4, 116 B", "none", "none", "all"]


def test_every_number_says_what_it_is_and_which_direction_is_better(sweep: Path) -> None:
    (table,) = collect([sweep])[0]["tables"]
    better = {name: column(name).better for name in table["numbers"]}
    less = {"forgetting", "forgetting (no bg)", "time", "time per later step", "memory", "parameters trained"}
    assert {name for name, way in better.items() if way == "less"} == less | {
        "parameters", "images kept", "bytes kept"
    }  # fmt: skip
    assert column("mIoU day").better == column("relative drop").better == "more"
    assert best([0.1, None, 0.3], "old") == 0.3
    assert best([0.1, None, 0.3], "forgetting") == 0.1
    assert best([0.1, 0.1], "old") is None, "equal ones are no best"
    page = Parsed(tables.html(collect([sweep])[0]))
    must_say(page.text, "forgetting ↓", "average ↑", "Negative: they got better")


def test_fine_tuning_is_what_others_are_measured_by(sweep: Path) -> None:
    assert collect([sweep])[0]["tables"][0]["base"] == "ft", "though mib and ssul-m come before it"


def test_the_markdown_is_one_table_with_the_best_in_bold(sweep: Path) -> None:
    made = everseg.compare([sweep], out=sweep / "o")
    text = (sweep / "o/compare.md").read_text()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == 2 + 4
    assert rows[2][0].strip() == "ssul-m"
    assert rows[2][-3].strip() == "4, 116 B"
    assert "**3 (27.3 %)**" in text
    assert "joint (upper bound)" in text
    if charts.can_draw():
        assert "](compare.svg)" in text
        assert (sweep / "o/compare.svg") in made.files
    table = made.to_json()["tables"][0]
    found(made.to_json(), "ft")["name"] = "f|t*_<b>"
    assert r"f\|t\*\_\<b\>" in tables.markdown({"tables": [table], "notes": []}, [None])


# ---------------------------------------------------------------- the answer and the names


def test_the_first_screen_says_the_question_and_who_is_best(sweep: Path) -> None:
    made = collect([sweep])[0]
    (table,) = made["tables"]
    assert [(one.what, one.names) for one in winners(table)] == [
        ("Best over all", "ssul-m"), ("Keeps the old best", "ssul-m"), ("Learns the new best", "ft"),
        ("Fastest later step", "ssul-m"),
    ]  # fmt: skip
    first, _, new, _ = winners(table)
    must_say(first.more, "joint")
    assert new.more == f"old: {tables.text('old', found(made, 'ft')['scores']['old'])}", (
        "what it was bought with"
    )
    head = tables.html(made).split("<dl")[0]
    assert head.index("<h1>demo 4-2: which method") < head.index("Best over all") < head.index("<table")
    alone = {**table, "groups": [group for group in table["groups"] if group["name"] in ("ft", "joint")]}
    assert winners(alone) == [], "one method has nobody to be better than"


def test_those_within_the_leaders_deviation_are_named(tmp_path: Path) -> None:
    for seed, old in ((0, 0.5), (1, 0.7)):
        made_run(tmp_path, f"a{seed}", "demo-ft", **two_steps(0.8, old, 0.5), overrides=[f"seed={seed}"])
    for name, old in (("mib", 0.55), ("lwf", 0.2)):
        made_run(tmp_path, name, f"demo-{name}", **two_steps(0.8, old, 0.5))
    best_over_all = winners(collect([tmp_path])[0]["tables"][0])[0]
    assert best_over_all.names == "ft"
    assert best_over_all.more == "within its ±: mib"


def test_names_say_in_words_what_differs_and_no_more(tmp_path: Path) -> None:
    same = two_steps(0.8, 0.1, 0.5)
    for name, overrides in (
        ("a", []),
        ("b", ["scenario.memory.size=7"]),
        ("c", ["scenario.memory.size=9", "train.lr=0.3", "train.nesterov=false"]),
    ):
        made_run(tmp_path / "memory", name, "demo-ft", **same, overrides=overrides)
    names = [group["name"] for group in collect([tmp_path / "memory"])[0]["tables"][0]["groups"]]
    assert names == ["ft, no memory", "ft, memory of 7 images", "ft, memory of 9 images"]
    for name, overrides in (("plain", []), ("other", ["train.nesterov=false"])):
        made_run(tmp_path / "flag", name, "demo-ft", **same, overrides=overrides)
    names = [group["name"] for group in collect([tmp_path / "flag"])[0]["tables"][0]["groups"]]
    assert sorted(names) == ["ft, with Nesterov momentum", "ft, without Nesterov momentum"]
    for name, file in (("short", "a.txt"), ("long", "/a/very/long/path/to/some/weights/of/an/encoder.pth")):
        made_run(tmp_path / "file", name, "demo-ft", **same, overrides=[f"model.weights={file}"])
    names = [group["name"] for group in collect([tmp_path / "file"])[0]["tables"][0]["groups"]]
    assert sorted(names) == ["ft, long", "ft, short"], "the runs' own names"


def test_rows_of_charts_are_set_in_lines_and_never_cut() -> None:
    pytest.importorskip("matplotlib")
    name = "a method, with several settings that differ"
    words = {"key": "k", "title": "t", "description": "d"}
    svg = charts.dots({name: [[0.5]], "ft": [[0.4]]}, **words)
    said = " ".join(
        text for node in ElementTree.fromstring(svg).iter() if (text := (node.text or "").strip())
    )
    assert "…" not in said
    assert name in " ".join(said.split())


# ---------------------------------------------------------------- the picture


def test_the_picture_names_every_group_and_is_a_file_of_its_own(sweep: Path) -> None:
    pytest.importorskip("matplotlib")
    made = collect([sweep])[0]
    (svg,) = tables.pictures(made)
    root = ElementTree.fromstring(svg)
    said = [text for node in root.iter() if (text := (node.text or "").strip())]
    for name in ("ft", "ssul-m", "mib", "joint", "keeps images of earlier steps", "20 s"):
        assert name in said, name
    assert "var(--ink)" in svg
    assert re.search(r"--ink:\s*#", svg), "a file has no page to take its colours from"
    assert "url(" not in svg.replace("url(#", "")
    chart = old_new_chart(made["tables"][0], "k")
    assert chart.svg == old_new_chart(made["tables"][0], "k").svg, "the same numbers, the same picture"


def test_over_domains_the_first_stands_against_the_last(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from made_runs import counts

    steps = [{"day": counts(0.8, 0.8)}, {"day": counts(0.6, 0.6), "dusk": counts(0.4, 0.4)}]
    made_run(tmp_path, "a", "camvid-day-dusk-mdil", steps, [(3,), (3,)], background=None)
    chart = old_new_chart(collect([tmp_path])[0]["tables"][0], "k")
    assert chart.title == "Day against dusk"
    assert old_new_chart({"numbers": ["all"], "groups": []}, "k") is None


def crowd(number: int, *, spread: float) -> list[Dot]:
    """Dots on a spiral around one point, with names of several lengths."""
    turns = [(spread * n**0.5, 2.4 * n) for n in range(number)]
    return [
        Dot(190 + far * math.cos(angle), 140 + far * math.sin(angle), 2 + n % 5, 20 + 7 * (n % 6), 11)
        for n, (far, angle) in enumerate(turns)
    ]


@pytest.mark.parametrize("spread", [1.0, 8.0, 20.0])
def test_names_of_thirty_dots_cover_neither_each_other_nor_leave_the_picture(spread: float) -> None:
    dots, area = crowd(30, spread=spread), Box(0, 0, 390, 290)
    placed = place(dots, area)
    assert placed is not None
    assert placed == place(dots, area)
    for one, other in itertools.combinations(placed, 2):
        assert not one.box.meets(other.box)
    for dot, found_place in zip(dots, placed, strict=True):
        assert area.holds(found_place.box)
        if found_place.line is None:
            assert found_place.box.distance((dot.x, dot.y)) < dot.radius + 5.1, "beside its dot"
        else:
            assert found_place.box.distance(found_place.line[1]) == pytest.approx(0, abs=1e-9)


def test_too_small_an_area_has_no_places_and_the_picture_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(crowd(30, spread=1), Box(150, 120, 240, 160)) is None
    pytest.importorskip("matplotlib")
    marks = [charts.Mark(f"method number {n}", 0.4 + n / 1e4, 0.2 + n / 1e4, seconds=10) for n in range(40)]
    words = {"x": "x", "y": "y", "cost": "c", "key": "k", "title": "t", "description": "d"}
    root = ElementTree.fromstring(charts.against(marks, ["a", "b"], **words))
    shown = [node.text for node in root.iter() if (node.text or "").startswith("method number")]
    assert len(set(shown)) == 40
