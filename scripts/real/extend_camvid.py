"""A model in the field, month by month, on CamVid: everything by the command line, the tables at the end.

    python scripts/real/extend_camvid.py CAMVID WORK      # CAMVID holds train/, trainannot/, test/, testannot/

WORK keeps the runs, the bundles and what each command told; the same command goes on where it was stopped. It takes
about 15 minutes of one processor core, and another one for the loader.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

BASE = ["sky", "building", "pole", "road", "pavement", "tree", "fence"]
HELD_BACK = ["car", "sign"]
IMAGES = ["data.evaluation=resize", "data.size=[144,192]", "data.crop=128", "data.workers=1"]
APRIL = [
    *IMAGES, "train.threads=1", "train.epochs=32", "train.epochs_next=12", "train.batch=8", "train.lr=0.05",
    "train.lr_next=0.02", "train.eval_batch=8",
]  # fmt: skip
# A few images of the first month go into a bundle, for --how thorough.
MEMORY = ["scenario.memory.size=24", "scenario.memory.keep=files"]
DATA = {
    "day": ["Seq05VD", "0016E5_"],
    "may": ["0006R0_f00", "0006R0_f01", "Seq05VD"],
    "june": ["0006R0_f02", "0006R0_f03", "Seq05VD"],
    "joint": ["0016E5_", "0006R0_f00", "0006R0_f01", "Seq05VD"],
    "dusk": ["0001TP"],
    "both": ["0016E5_", "Seq05VD", "0001TP"],
}
"""Name of a description -> the drives whose frames it has. Seq05VD is the test by day, 0001TP all that is at dusk."""
TESTED = "scenario.test_split=test"
# The new images label the new class alone, as those of a month do. Labels of old ones are not read.
ONLY_NEW = "scenario.protocol=overlapped"
MORE = [TESTED, "--no-onnx"]
# A month brings 36 to 65 images. A whole network needs more passes over so few than the bundle's 12, a classifier not.
PASSES = "train.epochs=30"
MONTHS = [
    ("May", "car, by day", ["--data", "may.yaml", "--add", "car", "--how", "quick", ONLY_NEW]),
    ("June", "more images by day", ["--data", "june.yaml", PASSES]),
    ("July", "dusk, a branch of its own", ["--data", "dusk.yaml", "--domain", "dusk", PASSES]),
    ("August", "pedestrian, bicyclist at dusk",
     ["--data", "dusk.yaml", "--domain", "dusk", "--add", "pedestrian,bicyclist", "--how", "quick",
      ONLY_NEW]),
]  # fmt: skip
"""Month, what it brings, arguments of `everseg extend`."""
HOW = {
    "quick": ["--how", "quick"],
    "balanced": ["--how", "balanced", PASSES],
    "thorough": ["--how", "thorough", PASSES],
}
"""Row of the second table -> arguments of `everseg extend`."""


@dataclass(frozen=True)
class Told:
    """What a command printed as JSON, and what it took."""

    value: Any
    seconds: float
    processor: float
    """Seconds, its processes together."""


@dataclass(frozen=True)
class Field:
    """The folder in which all commands run."""

    work: Path

    def everseg(self, *words: str, keep: str = "") -> Told:
        """Run a command.

        Args:
            keep: name under which its answer is kept, so that it is not run again.
        """
        file = self.work / "told" / f"{keep}.json"
        if keep and file.exists():
            return Told(**json.loads(file.read_text()))
        print("$ everseg", *words, file=sys.stderr, flush=True)
        before, began = _processor(), perf_counter()
        command = [sys.executable, "-m", "everseg", *words, "--json"]
        done = subprocess.run(command, cwd=self.work, check=True, stdout=subprocess.PIPE, text=True)
        told = Told(json.loads(done.stdout), perf_counter() - began, _processor() - before)
        if keep:
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(vars(told)))
        return told

    def scores(self, bundle: str, place: str, several: bool) -> dict[str, float | None]:
        """IoU in percent of each class on the test images of a place."""
        where = ["--domain", "dusk" if place == "dusk" else "default"] if several else []
        told = self.everseg("eval", bundle, f"data={place}.yaml", TESTED, *where, keep=f"{bundle}-{place}")
        (one,) = told.value["branches"].values()
        return {
            name: None if value is None else 100 * value
            for name, value in zip(one["classes"], one["class_iou"], strict=True)
            if name != "background"
        }

    def megabytes(self, bundle: str) -> str:
        return f"{sum(file.stat().st_size for file in (self.work / bundle).iterdir()) / 1e6:.2f}"


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def mean(values: dict[str, float | None], names: Sequence[str] | None = None) -> str:
    """Mean over the classes that were measured, one digit; a dash without any."""
    chosen = [v for name, v in values.items() if v is not None and (names is None or name in names)]
    return f"{sum(chosen) / len(chosen):.1f}" if chosen else "-"


def months(field: Field) -> list[list[str]]:
    """Extend month by month; a row of the table each."""
    rows, bundle, several = list[list[str]](), "april", False
    day, dusk = (field.scores(bundle, place, several) for place in ("day", "dusk"))
    size = field.megabytes(bundle)
    rows.append(["April", "seven classes by day", mean(day), "-", mean(day), mean(dusk), "-", "-", size])
    for month, brings, arguments in MONTHS:
        name = month.lower()
        measured = ["--old-val", f"{'default=' if several else ''}day.yaml"]
        told = field.everseg("extend", bundle, *arguments, *measured, "-o", name, *MORE, keep=name)
        bundle, several = name, several or "--domain" in arguments
        new = [one["name"] for one in told.value["taught"]]
        place = "dusk" if "--domain" in arguments else "day"
        found = {one: field.scores(bundle, one, several) for one in ("day", "dusk")}
        kept = told.value["kept"]
        rows.append(
            [
                month, brings, mean(found["day"], BASE), mean(found[place], new) if new else "-", mean(found["day"]),
                mean(found["dusk"]), f"{100 * kept['share']:.1f} ({kept['how']})",
                f"{told.seconds:.0f} ({told.processor:.0f})", field.megabytes(bundle),
            ]
        )  # fmt: skip
    return rows


def words(field: Field) -> list[list[str]]:
    """Two classes held back, learnt by each word of `--how`, and all nine at once."""
    before = field.scores("april", "day", several=False)
    rows = [["before", "-", mean(before), "-", "-"]]
    for how, arguments in HOW.items():
        bundle = "april-memory" if how == "thorough" else "april"
        more = ["--data", "may.yaml", "--add", ",".join(HELD_BACK), ONLY_NEW, "--old-val", "day.yaml", *MORE]
        told = field.everseg("extend", bundle, *more, *arguments, "-o", f"by-{how}", keep=f"by-{how}")
        found = field.scores(f"by-{how}", "day", several=False)
        rows.append(_row(how, told, found))
    joint = train(field, "joint", "joint", [*BASE, *HELD_BACK])
    field.everseg("export", "runs/joint", "-o", "joint", "--no-onnx", keep="joint-export")
    rows.append(_row("all nine at once", joint, field.scores("joint", "day", several=False)))
    return rows


def _row(name: str, told: Told, found: dict[str, float | None]) -> list[str]:
    each = ", ".join(f"{one} {mean(found, [one])}" for one in HELD_BACK)
    return [name, f"{told.seconds:.0f} ({told.processor:.0f})", mean(found, BASE), each, mean(found)]


def train(field: Field, name: str, data: str, classes: Sequence[str]) -> Told:
    """Train all classes at once."""
    task = f"scenario.task=[[{','.join(classes)}]]"
    return field.everseg(
        "run", "camvid-offline-ft", f"name={name}", f"data={data}.yaml", task, TESTED, *APRIL, *MEMORY,
        keep=f"run-{name}",
    )  # fmt: skip


def small(field: Field) -> list[list[str]]:
    """The last month's files for devices: what a smaller one loses, and how fast each is."""
    more = ["--precision", "fp16,int8", "--calibrate", "both.yaml", "--max-drop", "5", TESTED]
    field.everseg("export", "runs/august", "-o", "august-small", *more, keep="small")
    rows = []
    for branch in ("default", "dusk"):
        told = field.everseg(
            "bench", "august-small", "--domain", branch, "--size", "144x192", keep=f"bench-{branch}"
        )
        for form in told.value["forms"]:
            rows.append([branch, *(_plain(value) for value in form.values())])
    return [["branch", *told.value["forms"][0]], *rows]


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(head: str | list[str], rows: list[list[str]]) -> str:
    names = head.split(" | ") if isinstance(head, str) else head
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(camvid: str, place: str) -> None:
    work = Path(place)
    work.mkdir(parents=True, exist_ok=True)
    root = Path(camvid).resolve()
    for name, drives in DATA.items():
        (work / f"{name}.yaml").write_text(f"layout: camvid\nroot: {root}\nsequence: {json.dumps(drives)}\n")
    field = Field(work)
    train(field, "april", "day", BASE)
    for out, more in (("april", []), ("april-memory", ["--memory"])):
        field.everseg("export", "runs/april", "-o", out, "--no-onnx", *more, keep=f"export-{out}")
    print(table("how | seconds (of processor time) | old | new | all", words(field)), flush=True)
    print()
    head = "month | brings | first seven by day | new | all by day | all at dusk | kept, % | seconds (processor) | MB"
    print(table(head, months(field)), flush=True)
    print()
    history = [sys.executable, "-m", "everseg", "history", "august"]
    print(subprocess.run(history, cwd=work, check=True, stdout=subprocess.PIPE, text=True).stdout, flush=True)
    head, *rows = small(field)
    print(table(head, rows))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
