"""What the progress display prints, and when."""

from __future__ import annotations

import io

import pytest

from everseg.progress import Progress, resident_bytes, time_text


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(clock: Clock, seconds_each: float, iterations: int, **options) -> list[str]:
    stream = io.StringIO()
    progress = Progress(stream=stream, clock=clock, **options)
    progress.begin("step 1/2", iterations)
    for iteration in range(1, iterations + 1):
        clock.now += seconds_each
        progress.update(iteration, {"ce": 1.0, "kd": 0.25}, lr=0.01, images_per_second=8.0)
    progress.end()
    return stream.getvalue().splitlines()


def test_plain_lines_come_at_most_every_ten_seconds_and_at_the_end() -> None:
    lines = run(Clock(), 4.0, 10)
    assert [line.split()[2] for line in lines] == ["3/10", "6/10", "9/10", "10/10"]


def test_fast_bars_print_one_line() -> None:
    assert len(run(Clock(), 0.01, 100)) == 1


def test_a_line_shows_loss_terms_lr_speed_memory_and_time_left() -> None:
    line = run(Clock(), 10.0, 4)[0]
    assert "loss 1.250 (ce 1.000 kd 0.250)" in line
    assert "lr 1.0e-02" in line
    assert "8.0 img/s" in line
    assert "G" in line
    assert line.endswith("left 0:30")


def test_time_left_ignores_what_was_done_before_a_restart() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream=stream, clock=clock)
    progress.begin("resumed", 100, start=80)
    clock.now = 20.0
    progress.update(90, {"ce": 1.0}, 0.01, 1.0)
    assert stream.getvalue().strip().endswith("left 0:20")


@pytest.mark.parametrize("options", [{"quiet": True}, {"rank": 1}])
def test_quiet_and_other_ranks_print_nothing(options: dict) -> None:
    assert run(Clock(), 20.0, 3, **options) == []


def test_messages_with_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().message("saved [bold]here[/bold]")
    captured = capsys.readouterr()
    assert captured.err == "saved [bold]here[/bold]\n"
    assert captured.out == ""


def test_a_terminal_gets_a_bar_that_leaves_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with Progress(stream=stream, columns=120) as progress:
        progress.begin("step 1/1", 2)
        progress.update(1, {"ce": 0.5}, 0.01, 3.0)
        progress.update(2, {"ce": 0.5}, 0.01, 3.0)
    assert "\x1b[" in stream.getvalue()
    assert "\x1b[2Kstep 1/1  2/2  ce 0.500" in stream.getvalue().splitlines()[-1]


def test_end_and_begin_twice_are_harmless() -> None:
    progress = Progress(stream=io.StringIO())
    progress.end()
    progress.begin("a", 1)
    progress.begin("b", 1)
    progress.end()
    progress.end()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (-3, "0:00")])
def test_time_text(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_resident_memory_is_of_this_process() -> None:
    assert 5 * 2**20 < resident_bytes() < 2**37
