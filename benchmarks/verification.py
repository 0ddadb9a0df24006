"""Measures how far everseg is from MiB's and MDIL's original code: `python -m benchmarks.verification GOLDEN_DIR`.

The folder holds numbers produced by the authors' own code. With `--write FILE` the table is written as Markdown.
Exit status 1 if any difference is above its limit.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch

from benchmarks.golden_checks import EXACT, Row, all_checks
from benchmarks.golden_mdil import LIMITS, forms, replay_mdil
from benchmarks.golden_mdil_checks import all_mdil_checks
from benchmarks.golden_replay import CASES, replay, tags

ROUNDING = {
    "MiB_2epochs": {"gradient norms": 3e-6, "gradient norms, of the total": 3e-8},
    "ILT": {"gradient norms": 5e-7},
}
"""Limits of quantities that the file itself makes ill-conditioned: over the 12 iterations of MiB_2epochs rounding is
multiplied by 1e9. Images scaled by 1 + 2e-16 move everseg's own gradient norms by 4e-7, two threads instead of one by
1e-7. In ILT's run the same scaling moves them by 1e-7, and another processor by 1e-8. Losses and weights keep the
general limit."""

INTRODUCTION = """# Agreement with the original code

Numbers produced by the authors' own code of MiB and MDIL (run on CPU, one process) against everseg's. Differences are
relative: for loss terms and norms to each value, for tensors to the tensor's largest value. `0` means bit-equal. Made
by

    python -m benchmarks.verification GOLDEN_DIR --write docs/verification.md

`train_mib_*` are whole training runs in float64, replayed through `everseg.engine.step.train_batch` from the stored
initial weights and batches: loss terms, gradient norms and weight norms at every iteration of every step, all final
weights, buffers and regulariser statistics. Terms: `ce` classification, `lkd` output distillation, `lde` feature
distillation, `icarl` LwF-MC's distillation, `reg` penalty, all without their weights.

Gradient norms are compared twice: each tensor's to itself, and to the norm of the whole gradient. `MiB_2epochs`
multiplies rounding by 1e9 over its 12 iterations: images scaled by 1 + 2e-16 move everseg's own per-tensor gradient
norms there by 4e-7, two threads instead of one by 1e-7; in ILT's run the scaling moves them by 1e-7. So these have a
wider limit in these runs, and may be above 1e-8; their losses and weights are not.

`train_mdil*` are the three steps of MDIL in float64 (the small one two epochs, the wide one with images large enough
for the largest dilation), replayed with method `mdil` in the authors' form: `kl=probabilities`,
`teacher_statistics=authors`, `frozen_statistics=false`, and `updates=two-legacy` ("legacy": gradients zeroed between
the updates) or `two` ("modern": absent). Steps also stored with a distillation weight of 50 are replayed too. `kld` is
the authors' divergence, `kld_corrected` the one of logarithms, both from the outputs met in training. Gradients and
weights are compared at every update (two per batch in the third step), each gradient to its tensor's norm and to the
whole gradient's; those below 1e-10 of the whole, which are zero but for rounding, to the whole only. Sums are relative
to norm * sqrt(size). Validation runs through every domain's path. `model_mdil_*`: every path of networks with one, two
and three domains; `mdil_transfer`: what each tensor of a grown network starts from; `mdil_param_groups`: which weights
are trained at which rate.
"""


def measure(folder: Path, progress: bool = True) -> list[Row]:
    """Make every comparison that the folder allows.

    Raises:
        FileNotFoundError: no golden file in the folder.
    """
    rows = [*all_checks(folder), *all_mdil_checks(folder)]
    for tag in tags(folder):
        if progress:
            print(f"replaying {tag}", file=sys.stderr)
        file = f"train_mib_{tag}.npz"
        if tag not in CASES:
            rows.append(Row(file, "not described in benchmarks/golden_replay.py", 0, float("inf")))
            continue
        limits = ROUNDING.get(tag, {})
        for quantity, comparison in replay(folder, tag).items():
            rows.append(
                Row(file, quantity, comparison.count, comparison.largest, limits.get(quantity, EXACT))
            )
    for path in sorted(folder.glob("train_mdil*.npz")):
        for form in forms(path):
            if progress:
                print(f"replaying {path.stem}, {form}", file=sys.stderr)
            for quantity, comparison in replay_mdil(path, form).items():
                limit = LIMITS.get(quantity, EXACT)
                rows.append(Row(f"{path.name} {form}", quantity, comparison.count, comparison.largest, limit))
    if not rows:
        raise FileNotFoundError(f"no golden file in {folder}")
    return rows


def markdown(rows: list[Row]) -> str:
    """The table with its introduction."""
    versions = (
        f"Measured with torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
    )
    lines = [
        INTRODUCTION,
        f"{versions}{torch.get_num_threads()} thread(s).\n",
        "| file | quantity | compared | largest relative difference | limit |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        mark = "" if row.difference <= row.limit else " **above**"
        lines.append(
            f"| {row.file} | {row.quantity} | {row.count} | {_number(row.difference)}{mark} | {_number(row.limit)} |"
        )
    above = sum(row.difference > row.limit for row in rows)
    return "\n".join([*lines, "", f"{len(rows)} quantities, {above} above their limit.", ""])


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verification", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="GOLDEN_DIR")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table here")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"no folder {options.folder}")
    torch.set_num_threads(options.threads)
    rows = measure(options.folder)
    text = markdown(rows)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)
    print(text)
    return int(any(not row.difference <= row.limit for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
