"""`everseg data init`: from a folder of images to a data.yaml and a page to look at (floor 6)."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everseg.cli_data import data_app
from everseg.cli_support import sample_progress, say
from everseg.errors import ConfigError

if TYPE_CHECKING:
    from everseg.data.base import Dataset
    from everseg.data.describe import Proposal


RECIPE = "camvid-6-5-mib"
"""The preset whose network and training the commands begin with."""


@data_app.command("init")
def data_init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with images and masks in any layout.")
    ],
    classes: Annotated[
        str | None,
        typer.Option("--classes", help="Names of the classes, a,b,c, in the order of their values."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The description to write.")] = Path("data.yaml"),
    yes: Annotated[
        bool, typer.Option("--yes", help="Ask nothing; classes without name become class_1, ...")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the description if it exists.")] = False,
) -> None:
    """Guess the layout and the classes of a folder; write a data.yaml and a page with 24 labelled images."""
    from everseg.config import DataConfig
    from everseg.data.datasets import load_dataset
    from everseg.data.describe import describe, propose
    from everseg.engine.checkpoint import write_bytes
    from everseg.report.data_preview import data_preview

    page = out.with_name(f"{out.stem}_preview.html")
    _refuse(folder, out, page, force)
    with sample_progress(f"reading the masks of {folder}") as advance:
        proposal = propose(folder, progress=advance)
    say(proposal.text())
    given = None if classes is None else [name.strip() for name in classes.split(",")]
    if given is None and not yes and proposal.unnamed and sys.stdin.isatty():
        given = _ask(proposal)
    described = describe(proposal, given, here=out.parent)
    write_bytes(out, described.yaml().encode())
    forgiving = DataConfig(dataset=str(out), options={"on_missing": "skip"})
    dataset = load_dataset(forgiving)
    write_bytes(page, data_preview(dataset).encode())
    say(f"Wrote {out.resolve()}, and {page.name} beside it: labels over images, please look at it.")
    if proposal.unnamed and given is None and not proposal.names:
        say(
            f"\nFirst: the classes have no names yet; write them into {out}, or use --classes NAME,NAME,... --force"
        )
    say("\nNext:\n" + "\n".join(f"  {line}" for line in next_commands(dataset, out)))
    say(
        f"\n{RECIPE} gives the recipe only, a small network that two CPU cores can train (everseg show {RECIPE});\n"
        "data and task are yours. Any other preset can stand there, and key=value changes each setting."
    )


def next_commands(dataset: Dataset, out: Path) -> list[str]:
    """What to type after a description was written."""
    shown = shlex.quote(str(out))
    count = len(dataset.labels.classes)
    task = "offline" if count == 1 else f"{count - 1}-1"
    name = re.sub(r"[^\w.-]+", "-", dataset.name).strip("-.") or "run"
    test = next((s for s in ("val", "test") if s in dataset.splits), "train")
    settings = f"data={shown} task={task} scenario.test_split={test} name={name}"
    run = f"everseg run {RECIPE} {settings}"
    return [f"everseg data check {shown}", f"{run} --dry-run", run]


def _refuse(folder: Path, out: Path, page: Path, force: bool) -> None:
    problems = []
    if not folder.is_dir():
        problems.append(
            f"{folder} is {'not a folder' if folder.exists() else 'missing'}; name the folder of the images"
        )
    if out.suffix.lower() not in (".yaml", ".yml"):
        problems.append(f"--out: {out} must end in .yaml")
    if not out.parent.is_dir():
        problems.append(f"--out: there is no folder {out.parent}")
    if not force:
        problems += [f"{file} exists; name another file with --out, or replace it with --force"
                     for file in (out, page) if file.exists()]  # fmt: skip
    if problems:
        raise ConfigError(problems)


def _ask(proposal: Proposal) -> list[str] | None:
    """Ask for the names on the terminal; an empty answer takes the proposal."""
    values = ", ".join(str(list(v)) if isinstance(v, tuple) else str(v) for v in proposal.unnamed)
    default = ",".join(proposal.names) or ",".join(f"class_{i + 1}" for i in range(len(proposal.unnamed)))
    sys.stdout.write(f"Names for {values}, with commas between? [{default}] ")
    sys.stdout.flush()
    answer = sys.stdin.readline().strip()
    return [name.strip() for name in answer.split(",")] if answer else None
