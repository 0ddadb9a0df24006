from __future__ import annotations

from rich.console import Console

from everseg.reports import terminal as tables
from saying import must_say


def lines(table, width: int = 80) -> list[str]:
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as found:
        console.print(table)
    return [line.rstrip() for line in found.get().splitlines()]


def test_a_title_longer_than_its_table_stays_on_one_line() -> None:
    row = {"step": 1, "trained": "dusk", "day": 60.0, "dusk": None}
    steps = [{"index": 1, "name": "day", "miou": {"all": 0.6}}]
    found = lines(tables.run_table({"name": "camvid-day-dusk-mdil", "table": [row], "steps": steps}))
    assert found[0] == "camvid-day-dusk-mdil: mIoU in percent of each domain after each step"
    assert found[1].split() == ["step", "trained", "day", "dusk"]
    assert found[3].split() == ["1", "dusk", "60.0", "-"]
    assert found[4:] == [""]


def test_the_label_policy_and_plops_rule_stand_beside_the_figures() -> None:
    group = {"old": 0.111, "new": 0.222, "all": 0.333}
    step = {"index": 0, "classes": ["sky"], "miou": group, "miou_without_background": group}
    config = {"scenario": {"policy": "plop"}, "data": {"dataset": "ade"}}
    figures = {"first": 0.651, "last": 0.211, "all": 0.546, "average": 0.672, "harmonic_mean": 0.3}
    run = {"name": "a", "config": config, "steps": [step], "plop_rule": figures}
    assert lines(tables.run_table(run))[0].endswith("label policy plop-ade")
    must_say(tables.reporting_text(run), "first 65.1", "last 21.1", "all 54.6", "average 67.2", "count 0")
    assert tables.reporting_text({**run, "plop_rule": {}}) == ""


def test_a_narrow_terminal_cuts_no_number_and_no_heading() -> None:
    group = {"old": 0.111, "new": 0.222, "all": 0.333}
    step = {"index": 0, "classes": ["sky", "building", "pole", "road"], "miou": group,
            "miou_without_background": group, "harmonic_mean": 0.444, "overall_accuracy": 0.999}  # fmt: skip
    text = "\n".join(lines(tables.step_table({"name": "a-long-name-of-a-run", "steps": [step]})))
    assert "…" not in text
    for word in ("11.1", "22.2", "33.3", "44.4", "99.9", "accuracy", "building,"):
        assert word in text


def test_control_characters_are_escaped() -> None:
    text = "\n".join(lines(tables.table(["a\x1b"], [["b\x1b[31m"]], title="c\x07")))
    assert "\x1b" not in text
    assert "\x07" not in text
