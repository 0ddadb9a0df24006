"""Every figure of docs/performance.md that the CPU gives: `python -m benchmarks [--only PART ...] [--json FILE]`.

Run it on a machine that does nothing else: under ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from benchmarks.common import Figure, table, write_json

PARTS = ("losses", "step", "data", "evaluation", "startup", "growth", "ranks", "ridge")
"""Modules with `figures(quick)`."""


def main() -> None:
    """Run the parts, print one table and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds of small sizes, to try the benchmarks themselves"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    found: list[Figure] = []
    for part in options.only:
        start = time.perf_counter()
        found += importlib.import_module(f"benchmarks.{part}").figures(options.quick)
        sys.stderr.write(f"{part}: {time.perf_counter() - start:.0f} s\n")
    sys.stdout.write(table(found) + "\n")
    if options.json:
        write_json(found, options.json)


if __name__ == "__main__":
    main()
