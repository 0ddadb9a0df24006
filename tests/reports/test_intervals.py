"""Intervals over test images in a comparison: what they hold, where they are absent, where they are told."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import made_run

import everseg
from everseg.errors import CheckpointError
from everseg.metrics import step_scores, sums_of
from everseg.reports.compare import statistics as intervals
from everseg.reports.compare import tables
from everseg.reports.compare.comparison import collect
from everseg.reports.compare.groups import read
from everseg.runs.results import Results
from everseg.runs.run_folder import RunFolder
from saying import must_say
from sealed import put_arrays

SIZES = (3, 1)


def images_of(seed: int, hit: float) -> np.ndarray:
    """Confusion matrices of 40 images of four classes, about `hit` of the pixels right."""
    rng = np.random.RandomState(seed)
    truth = rng.randint(50, 400, (40, 4))
    right = rng.binomial(truth, rng.uniform(hit - 0.1, hit + 0.1, (40, 1)))
    matrices = np.zeros((40, 4, 4), np.int64)
    for c in range(4):
        matrices[:, c, c] = right[:, c]
        matrices[:, c, (c + 1) % 4] = truth[:, c] - right[:, c]
    return matrices


def run_of(
    out: Path, name: str, preset: str, matrices: np.ndarray, *, seed: int, stored: bool = True
) -> Path:
    each = np.stack([sums_of(one) for one in matrices])
    return made_run(
        out, name, preset, [{"default": matrices[:, :3, :3].sum(0)}, {"default": matrices.sum(0)}],
        [(3,), SIZES], overrides=[f"seed={seed}"], images={"default": each} if stored else None,
    )  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for seed in (0, 1):
        run_of(tmp_path, f"ft-{seed}", "demo-ft", images_of(seed, 0.5), seed=seed)
        run_of(tmp_path, f"mib-{seed}", "demo-mib", images_of(10 + seed, 0.8), seed=seed)
    return tmp_path


def group(made: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [g for g in made["tables"][0]["groups"] if g["name"] == name]
    return found


def test_an_interval_holds_the_middle_of_the_means_over_seeds(sweep: Path) -> None:
    """Drawn here one by one, from whole matrices."""
    rng = np.random.RandomState(intervals.zlib.crc32(b"default"))
    rows: dict[str, list[float]] = {"mib": [], "minus": []}
    matrices = {name: [images_of(start + seed, hit) for seed in (0, 1)]
                for name, start, hit in (("ft", 0, 0.5), ("mib", 10, 0.8))}  # fmt: skip
    for _ in range(intervals.RESAMPLES):
        chosen = rng.randint(0, 40, 40)
        means = {
            name: np.mean([step_scores(one[chosen].sum(0), SIZES, 0)["miou"]["old"] for one in each])
            for name, each in matrices.items()
        }
        rows["mib"].append(means["mib"])
        rows["minus"].append(means["mib"] - means["ft"])
    found = group(collect([sweep])[0], "mib")
    for name, where in (("mib", "scores"), ("minus", "differences")):
        low, high = found[where]["old"]["interval"]
        assert [low, high] == pytest.approx(np.percentile(rows[name], [2.5, 97.5]), abs=1e-12)
        assert low < found[where]["old"]["mean"] < high
    assert found["scores"]["forgetting"]["interval"] is None
    assert found["scores"]["average"]["interval"] is None


def test_two_calls_give_the_same(sweep: Path) -> None:
    assert collect([sweep])[0] == collect([sweep])[0]


def test_a_group_with_a_run_that_stored_no_images_has_none(sweep: Path) -> None:
    run_of(sweep, "ft-2", "demo-ft", images_of(2, 0.5), seed=2, stored=False)
    made = collect([sweep])[0]
    assert group(made, "ft")["scores"]["old"]["interval"] is None
    assert group(made, "mib")["scores"]["old"]["interval"] is not None
    assert group(made, "mib")["differences"]["old"]["interval"] is not None, "its pairs have them"
    names = [row["method"] for row in tables.interval_rows(made["tables"][0])]
    assert names == ["mib", "mib minus ft"]


def test_counts_of_other_images_are_refused(sweep: Path) -> None:
    path = RunFolder(sweep / "ft-0").step(1) / "images.npz"
    put_arrays(path, default=np.load(path)["default"] + 1)
    with pytest.raises(CheckpointError, match=r"images\.npz.*confusion\.npz"):
        collect([sweep])[0]
    path.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"images\.npz.*SHA-256"):
        collect([sweep])[0]


def test_all_files_and_the_terminal_state_them(
    sweep: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    made = everseg.compare([sweep]).to_json()
    low, high = group(made, "mib")["scores"]["old (no bg)"]["interval"]
    shown = f"{100 * low:.1f} – {100 * high:.1f}"
    told, signed = (
        group(made, "mib")["differences"]["new"]["interval"],
        re.compile(r"\+\d+\.\d \$?to\$? \+\d+\.\d"),
    )
    page = (sweep / "compare.html").read_text(encoding="utf-8")
    assert f">{shown}</td>" in page
    must_say(page, "Intervals over test")
    must_say(page, "1000 resamples", "same images")
    rows = list(csv.DictReader((sweep / "compare.csv").read_text().splitlines()))
    (row,) = [r for r in rows if (r["group"], r["number"]) == ("mib", "old (no bg)")]
    assert [float(row["low"]), float(row["high"])] == [low, high]
    (row,) = [r for r in rows if (r["group"], r["number"]) == ("mib", "new")]
    assert [float(row["difference_low"]), float(row["difference_high"])] == told
    (row,) = [r for r in rows if (r["group"], r["number"]) == ("ft", "forgetting")]
    assert (row["low"], row["difference_low"]) == ("", "")
    latex = (sweep / "compare.tex").read_text(encoding="utf-8")
    must_say(latex, "95 %", "intervals", "1000 draws")
    assert shown.replace("–", "to") in latex
    assert signed.search(latex)
    code, out, _ = call("compare", sweep)
    assert code == 0
    assert shown in out
    assert "bootstrap of 1000 draws" in out


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
def test_latex_typesets_the_tables_even_with_hostile_names(sweep: Path) -> None:
    made = collect([sweep])[0]
    made["tables"][0]["groups"][0]["name"] = r"f_t & 50% {x} \input{a} $~^#<>|\"- é"
    (sweep / "compare.tex").write_text(tables.latex(made), encoding="utf-8")
    (sweep / "page.tex").write_text(r"\documentclass{article}\begin{document}\input{compare}\end{document}")
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "page.tex"],
        cwd=sweep,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in (sweep / "page.log").read_text(errors="replace")


def test_over_domains_each_has_its_own_images(tmp_path: Path) -> None:
    day, dusk = images_of(0, 0.7), images_of(1, 0.6)[:25]
    tested = {"day": day.sum(0), "dusk": dusk.sum(0)}
    each = {"day": np.stack([sums_of(m) for m in day]), "dusk": np.stack([sums_of(m) for m in dusk])}
    made_run(tmp_path, "mdil", "camvid-day-dusk-mdil", [{"day": day.sum(0)}, tested], [(4,), (4,)],
             background=None, images=each)  # fmt: skip
    scores = group(collect([tmp_path])[0], "mdil")["scores"]
    width = {name: np.ptp(scores[name]["interval"]) for name in ("mIoU day", "mIoU dusk", "mIoU mean")}
    assert all(value > 0 for value in width.values())
    assert width["mIoU mean"] < max(width.values()), "domains vary independently of each other"


def test_a_domain_without_a_true_pixel_in_a_draw_is_left_out_of_the_mean_as_in_the_score(
    tmp_path: Path,
) -> None:
    matrices = images_of(3, 0.8)[:, :3, :3]
    two = matrices.copy()
    two[2:] = 0  # two images with labels: in some draws there is neither
    counts = {"day": matrices.sum(0), "dusk": two.sum(0)}
    each = {
        "day": np.stack([sums_of(one) for one in matrices]),
        "dusk": np.stack([sums_of(one) for one in two]),
    }
    path = made_run(
        tmp_path, "ft", "camvid-day-dusk-ft", [{"day": counts["day"]}, counts], [(3,)] * 2,
        background=None, images=each,
    )  # fmt: skip
    draws = intervals.draws_of(read(Results(RunFolder(path))))
    absent = np.isnan(draws["mIoU dusk"])
    assert 0 < absent.sum() < intervals.RESAMPLES / 2
    assert np.array_equal(draws["mIoU mean"][absent], draws["mIoU day"][absent])
    both = (draws["mIoU day"] + draws["mIoU dusk"]) / 2
    assert draws["mIoU mean"][~absent] == pytest.approx(both[~absent])
