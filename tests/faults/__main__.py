"""`python -m tests.faults --long`: everything that is tried against everseg, as often as docs/reliability.md says.

Run it in the folder of a checkout. It ends with 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def _prepare() -> None:
    """Import what the tests import, as pytest does, and run on one thread like them."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]
    folders = ["src", "tests", *options["ini_options"]["pythonpath"]]
    sys.path[:0] = [str(ROOT / folder) for folder in folders]
    os.environ["PYTHONPATH"] = str(ROOT / "src")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["EVERSEG_CACHE"] = tempfile.mkdtemp(prefix="everseg-faults-cache-")


def _tell(trial: Any) -> None:
    if trial.problem:
        print(f"  BROKEN {trial.what}: {trial.problem}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="campaigns; default all")
    parser.add_argument("--long", action="store_true", help="all trials; default those of every day")
    parser.add_argument("--number", type=int, metavar="N", help="so many trials of each")
    parser.add_argument("--list", action="store_true", help="say which campaigns there are")
    parser.add_argument("--fuzz", type=float, metavar="MINUTES", help="fuzz every reader for so long instead")
    parser.add_argument("--only", metavar="READER", help="with --fuzz: this reader alone")
    parser.add_argument(
        "--seed", type=int, default=None, help="with --fuzz: the random seed; default the time"
    )
    given = parser.parse_args()
    _prepare()
    import torch
    from campaigns import all_campaigns, carry_out

    torch.set_num_threads(1)
    if given.fuzz is not None:
        from fuzzing import READERS, fuzz

        if given.only is not None and given.only not in READERS:
            parser.error(f"no reader {given.only}; there are {', '.join(READERS)}")
        return fuzz(given.fuzz, only=given.only, seed=given.seed)
    known = all_campaigns()
    if unknown := set(given.names) - set(known):
        parser.error(f"no campaign {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if given.list:
        print("\n".join(f"{one.name} ({one.everyday}, {one.long}): {one.about}" for one in known.values()))
        return 0
    gc.collect()
    gc.freeze()  # as tests/conftest.py does, and for its reason
    failed = False
    for name in given.names or known:
        one = known[name]
        number = given.number or (one.long if given.long else one.everyday)
        outcome = carry_out(one, number, _tell)
        print(outcome, flush=True)
        for trial in outcome.harmless[:400] if given.long else []:
            print(f"  harmless {trial.what}: {trial.harmless}", flush=True)
        failed |= bool(outcome.broken)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
