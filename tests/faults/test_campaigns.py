"""A few trials of every campaign in every run of the tests; `python -m tests.faults --long` makes all of them."""

from __future__ import annotations

import pytest
from campaigns import CAMPAIGNS, Trial, all_campaigns, campaign, carry_out

EVERYDAY = [name for name, one in all_campaigns().items() if one.everyday]


@pytest.mark.parametrize("name", EVERYDAY)
def test_everseg_holds(name: str) -> None:
    outcome = carry_out(CAMPAIGNS[name], CAMPAIGNS[name].everyday)
    assert outcome.tried == CAMPAIGNS[name].everyday
    assert [f"{trial.what}: {trial.problem}" for trial in outcome.broken] == []


def test_a_broken_promise_is_counted() -> None:
    @campaign("of this test", everyday=0, long=3)
    def trials(place, number):
        """A promise that is not held."""
        assert not any(place.iterdir())
        yield from [Trial("one"), Trial("two", "no"), Trial("three", harmless="as it says nothing")]
        yield Trial("four", skipped="not on this machine")

    outcome = carry_out(CAMPAIGNS.pop("of this test"), 4)
    assert (outcome.tried, [t.what for t in outcome.broken], len(outcome.harmless)) == (3, ["two"], 1)
    assert "2 of 3" in str(outcome)
    assert "1 skipped (not on this machine)" in str(outcome)


def test_what_could_not_be_tried_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    import disk_faults

    monkeypatch.setattr(disk_faults, "can_mount", lambda place: False)
    outcome = carry_out(CAMPAIGNS["a real disk that is full or read-only"], 8)
    assert (outcome.tried, len(outcome.skipped)) == (0, 8)
