"""Measures how far everseg is from the authors' original code: `python -m benchmarks.verification GOLDEN_DIR`.

The folder holds numbers produced by the authors' own code, in files named after the method: other seeds, numbers of
steps and options than those that everseg was written with are read from the files themselves. With `--write FILE` the
table is written as Markdown. Exit status 1 if any difference is above its limit.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import golden_runs
from benchmarks.golden_barm import check_barm, replay_barm
from benchmarks.golden_checks import EXACT, Row, all_checks
from benchmarks.golden_dft import replay_dft
from benchmarks.golden_dkd import check_dkd, replay_dkd
from benchmarks.golden_ewf import check_ewf, replay_ewf
from benchmarks.golden_labels import check_label_maps
from benchmarks.golden_mbs import check_mbs, replay_mbs
from benchmarks.golden_mdil import LIMITS, forms, replay_mdil
from benchmarks.golden_mdil_checks import all_mdil_checks
from benchmarks.golden_memory import check_memory
from benchmarks.golden_mib import CASES, replay, tags
from benchmarks.golden_mibaugm import check_mibaugm, replay_mibaugm
from benchmarks.golden_microseg import check_microseg, replay_microseg
from benchmarks.golden_nest import replay_nest
from benchmarks.golden_plop import check_plop, replay_plop
from benchmarks.golden_rcil import check_rcil, replay_rcil
from benchmarks.golden_reminder import check_reminder, replay_reminder
from benchmarks.golden_replay import Comparison
from benchmarks.golden_sdr import check_sdr, replay_sdr
from benchmarks.golden_segacil import check_segacil, limit_segacil, replay_segacil
from benchmarks.golden_ssul import check_ssul, replay_ssul
from benchmarks.golden_star import check_star, limit_star, replay_star
from benchmarks.golden_ucd import check_ucd, replay_ucd

ROUNDING = {
    "MiB_2epochs": {"gradient norms": 3e-6, "gradient norms, of the total": 3e-8},
    "ILT": {"gradient norms": 5e-7},
}
"""Limits of quantities that the file itself makes ill-conditioned: over the 12 iterations of MiB_2epochs rounding is
multiplied by 1e9. Images scaled by 1 + 2e-16 move everseg's own gradient norms by 4e-7, two threads instead of one by
1e-7. In ILT's run the same scaling moves them by 1e-7, and another processor by 1e-8. Losses and weights keep the
general limit."""

INTRODUCTION = """# Agreement with the original code

Numbers produced by the authors' own code (run on CPU, one process) against everseg's. The later methods were built from
a description of what that code does. Where its licence does not allow it, nobody here has opened it. Differences are
relative: for loss terms and norms to each value, for tensors to the tensor's largest value. `0` means bit-equal. Made
by

    python -m benchmarks.verification GOLDEN_DIR --write docs/verification.md

`train_mib_*` are whole training runs in float64. They are replayed through `everseg.engine.step.train_batch` from the
stored
initial weights and batches. Compared are loss terms, gradient norms and weight norms at every iteration of every
step, all final
weights, buffers and regulariser statistics. Terms: `ce` classification, `lkd` output distillation, `lde` feature
distillation, `icarl` LwF-MC's distillation, `reg` penalty, all without their weights.

Gradient norms are compared twice: each tensor's to itself, and to the norm of the whole gradient. `MiB_2epochs`
multiplies rounding by 1e9 over its 12 iterations. Images scaled by 1 + 2e-16 move everseg's own per-tensor gradient
norms there by 4e-7, two threads instead of one by 1e-7; in ILT's run the scaling moves them by 1e-7. So these have a
wider limit in these runs, and may be above 1e-8; their losses and weights are not.

`train_mdil*` are the three steps of MDIL in float64 (the small one two epochs, the wide one with images large enough
for the largest dilation), replayed with method `mdil` in the authors' form: `kl=probabilities`,
`teacher_statistics=authors`, `frozen_statistics=false`, and `updates=two-legacy` ("legacy": gradients zeroed between
the updates) or `two` ("modern": absent). Steps also stored with a distillation weight of 50 are replayed too. `kld` is
the authors' divergence, `kld_corrected` the one of logarithms, both from the outputs met in training. Gradients and
weights are compared at every update (two per batch in the third step), each gradient to its tensor's norm and to the
whole gradient's. Those below 1e-10 of the whole, which are zero but for rounding, to the whole only. Sums are relative
to norm * sqrt(size). Validation runs through every domain's path. `model_mdil_*`: every path of networks with one, two
and three domains; `mdil_transfer`: what each tensor of a grown network starts from; `mdil_param_groups`: which weights
are trained at which rate.

`train_*` of the later methods are whole steps in float64: every loss term at every iteration, thresholds,
pseudo-labels, adaptive factors, prototypes, merged branches, the course of the pre-tuning, and all final weights. In a
third step rounding has grown, and its limits are wider. `*_losses_*` are their functions with gradients,
`label_maps.json` the images and labels that each step sees.
"""


@dataclass(frozen=True)
class Original:
    """One method and the code that it is compared with."""

    method: str
    files: tuple[str, ...]
    """What the names of its files begin with."""
    repository: str
    licence: str
    switches: str
    """The options that choose between the authors' code and their paper, or a mended form of it."""
    comparable: str
    """Published rows that a run may stand beside."""
    check: Callable[[Path], list[Row]] | None = None
    """Compares its functions, over every file of the folder that holds them."""
    replay: Callable[[Path, str], dict[str, Comparison]] | None = None
    """Trains one of its `train_*` files again."""
    limit: Callable[[Path, str, str], float] = golden_runs.limit
    """Folder, file without ending and quantity of a training run -> the largest difference that counts as agreement."""


def _each_rcil(folder: Path) -> list[Row]:
    return [row for path in sorted(folder.glob("rcil_losses_*.npz")) for row in check_rcil(path)]


ORIGINALS = (
    Original(
        "MiB, FT, LwF, LwF-MC, ILT, EWC, PI, RW",
        ("losses", "metrics", "model_mib", "scenario.", "mib_", "train_mib"),
        "fcdl94/MiB", "MIT", "`frozen_statistics`, `form`, `background_from_labels`, `scenario.policy=mib-*`",
        "MiB, tables 1 and 2",
    ),
    Original(
        "MDIL", ("model_mdil", "mdil", "train_mdil"), "prachigarg23/MDIL-SS", "none (not opened)",
        "`kl`, `teacher_statistics`, `updates`, `frozen_statistics`, `data.shift_fill`", "MDIL, table 1",
    ),
    Original(
        "PLOP", ("plop", "train_plop"), "arthurdouillard/CVPR2021_PLOP 4b4a060", "MIT",
        "`median`, `entropy_norm`, `finite_thresholds`, `empty_factor`, `pod_cells`", "PLOP's, with `plop-*` labels",
        check_plop, replay_plop,
    ),
    Original(
        "RCIL", ("rcil", "train_rcil"), "zhangchbin/RCIL b9aad58", "MIT", "see the method's section",
        "RCIL's, with `plop-*` labels", _each_rcil, replay_rcil,
    ),
    Original(
        "EWF", ("ewf", "train_ewf"), "schuy1er/EWF_official 560382d", "MIT", "`fuse`", "EWF's, with `plop-*` labels",
        check_ewf, replay_ewf,
    ),
    Original(
        "REMINDER", ("reminder", "train_reminder"), "HieuPhan33/REMINDER f8d225e", "GPL-3.0 (not opened)",
        "see the method's section", "REMINDER's, with `plop-*` labels", check_reminder, replay_reminder,
    ),
    Original(
        "SDR", ("sdr", "train_sdr"), "LTTM/SDR 8638296", "Apache-2.0 text of other authors", "`form`",
        "SDR's, with `mib-*` labels", check_sdr, replay_sdr,
    ),
    Original(
        "NeST", ("train_nest",), "zhengyuan-xie/ECCV24_NeST f96185b", "CC BY-NC 4.0 (not opened)",
        "see the method's section", "NeST's, with `plop-*` labels", None, replay_nest,
    ),
    Original(
        "UCD", ("ucd", "train_ucd"), "ygjwd12345/UCD cc73546", "none (not opened)", "`form`",
        "none: the released code does not run, so the replay is partly official", check_ucd, replay_ucd,
    ),
    Original(
        "MiB-AugM", ("mibaugm_losses", "train_mibaugm"), "jihwankwak/CISS_partitioned 7353b46", "none (not opened)",
        "`memory_void`, `memory_loss`, `scenario.memory.pseudo_network`", "MiB-AugM's 15-1, protocol `partitioned`",
        check_mibaugm, replay_mibaugm,
    ),
    Original(
        "MBS", ("mbs", "train_mbs"), "RoadoneP/ECCV2024_MBS dc83e50", "MIT", "`ignore_doubted`, `moved`, `adaptive`",
        "MBS' 15-1, with a vision transformer: the files' network is a stand-in without attention",
        check_mbs, replay_mbs,
    ),
    Original(
        "SSUL, SSUL-M", ("ssul", "train_ssul"), "clovaai/SSUL e08ee9c", "MIT",
        "`unknown`, `memory_offset`, `scenario.memory.labels`", "SSUL's, with `ignore-void` labels",
        check_ssul, replay_ssul,
    ),
    Original(
        "DKD, DKD-M", ("dkd_losses", "train_dkd"), "cvlab-yonsei/DKD fb4693f", "GPL-3.0 (not opened)",
        "`unlabelled`, `scenario.memory.pseudo_network`", "DKD's, with `plop-*` labels", check_dkd, replay_dkd,
    ),
    Original(
        "STAR, STAR-M", ("star", "train_star"), "jinpeng0528/STAR 9e31f36", "none (not opened)",
        "`noise`, `unlabelled`", "STAR's, with `plop-*` labels", check_star, replay_star, limit_star,
    ),
    Original(
        "BARM", ("barm", "train_barm"), "ANDYZAQ/BARM 0a59203", "MIT", "`ear_statistics`, `empty_background`",
        "BARM's, with `ignore-void` labels", check_barm, replay_barm,
    ),
    Original(
        "SegACIL", ("segacil", "train_segacil"), "LIJIAXU137/SegACIL a782479", "none (not opened)",
        "`teacher`, `pseudo`, `every_image`", "SegACIL's, with `ignore-void` labels",
        check_segacil, replay_segacil, limit_segacil,
    ),
    Original(
        "DFT, DFT*", ("train_dft",), "BladeDancer957/RevisitingCSS 4610e3b", "no licence file (not opened)",
        "`future`", "DFT*'s, with `plop-*` labels", None, replay_dft,
    ),
    Original(
        "MicroSeg", ("microseg", "train_microseg"), "zkzhang98/MicroSeg 0e287e8", "none (not opened)",
        "`memory_offset`",
        "MicroSeg's, with `ignore-void` labels and its proposals", check_microseg, replay_microseg,
    ),
    Original(
        "memories", ("dkd_memory", "mibaugm_memory"), "of SSUL, DKD and MiB-AugM", "MIT; GPL-3.0, none (not opened)",
        "`scenario.memory.*`, see docs/methods.md", "-", check_memory,
    ),
    Original(
        "label rules", ("label_maps",), "of PLOP, MiB and SDR", "as above", "`scenario.policy`", "-",
        lambda folder: [row for path in sorted(folder.glob("label_maps*.json")) for row in check_label_maps(path)],
    ),
)  # fmt: skip
"""Every method with the numbers that it is compared with. `sats` is missing: no numbers of its authors' code exist."""


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
            rows.append(Row(file, "not described in benchmarks/golden_mib.py", 0, float("inf")))
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
    for original in ORIGINALS:
        rows += _compared(folder, original, progress)
    if not rows:
        raise FileNotFoundError(f"no golden file in {folder}")
    return rows


def _compared(folder: Path, original: Original, progress: bool) -> list[Row]:
    """Every comparison with one method's code."""
    rows = [] if original.check is None else original.check(folder)
    for path in _trained(folder, original):
        if progress:
            print(f"replaying {path.stem}", file=sys.stderr)
        assert original.replay is not None
        for quantity, comparison in original.replay(folder, path.stem).items():
            limit = original.limit(folder, path.stem, quantity)
            rows.append(Row(path.name, quantity, comparison.count, comparison.largest, limit))
    return rows


def _trained(folder: Path, original: Original) -> list[Path]:
    """The training runs of a method in the folder."""
    if original.replay is None:
        return []
    names = [name for name in original.files if name.startswith("train_")]
    return [path for name in names for path in sorted(folder.glob(f"{name}*.npz"))]


def overview(rows: list[Row]) -> list[str]:
    """One line per method: what was compared, the largest difference, and what its numbers may stand beside."""
    lines = [
        "| method | replayed | largest difference | options between code and paper | original code, licence "
        "| comparable with |",
        "|---|---|---:|---|---|---|",
    ]
    for original in ORIGINALS:
        own = [row for row in rows if row.file.startswith(original.files)]
        if not own:
            continue
        files = len({row.file.split()[0] for row in own})
        largest = max(row.difference for row in own)
        lines.append(
            f"| {original.method} | {len(own)} quantities of {files} files | {_number(largest)} | {original.switches} "
            f"| {original.repository}, {original.licence} | {original.comparable} |"
        )
    lines.append("| SATS | not replayed: no numbers of its authors' code are at hand | - | - | - | none |")
    return lines


def unread(folder: Path, rows: list[Row]) -> list[str]:
    """Files of the folder that no comparison names."""
    known = {row.file.split()[0] for row in rows}
    found = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".npz", ".json")]
    helping = ("train_mib_common.npz", "scenario_maps.npz")  # inputs of other files
    return [name for name in found if name not in known and name not in helping]


def markdown(rows: list[Row], missing: Sequence[str] = ()) -> str:
    """Both tables with their introduction."""
    versions = (
        f"Measured with torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
    )
    lines = [
        INTRODUCTION,
        f"{versions}{torch.get_num_threads()} thread(s).\n",
        *overview(rows),
        "\n## Every quantity\n",
        "| file | quantity | compared | largest relative difference | limit |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        mark = "" if row.difference <= row.limit else " **above**"
        lines.append(
            f"| {row.file} | {row.quantity} | {row.count} | {_number(row.difference)}{mark} | {_number(row.limit)} |"
        )
    above = sum(row.difference > row.limit for row in rows)
    told = [f"{len(rows)} quantities, {above} above their limit."]
    if missing:
        told.append(
            f"Files of the folder that no comparison reads (methods not built yet): {', '.join(missing)}."
        )
    return "\n".join([*lines, "", *told, ""])


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
    text = markdown(rows, unread(options.folder, rows))
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)
    print(text)
    return int(any(not row.difference <= row.limit for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
