"""The verbs of `everseg data`."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everseg.cli.output import (
    Json,
    Overrides,
    byte_progress,
    console_of_stdout,
    note,
    sample_progress,
    say,
    write_json,
)
from everseg.errors import ConfigError, DataError

if TYPE_CHECKING:
    from everseg.config.fields import DataConfig
    from everseg.data.base import Dataset
    from everseg.data.proposal.describe import Proposal

data_app = typer.Typer(
    help="Check, download and prepare data sets.", no_args_is_help=True, rich_markup_mode=None
)

DatasetName = Annotated[
    str, typer.Argument(metavar="DATASET", help="A data set's name, a data.yaml, or file.py:build.")
]


@data_app.command("check")
def data_check(
    dataset: DatasetName,
    overrides: Overrides = None,
    skiplist: Annotated[
        Path | None,
        typer.Option("--write-skiplist", help="Write split and name of every faulty sample to this file."),
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="Look at so many samples of each split only.")
    ] = None,
    lock: Annotated[
        Path | None,
        typer.Option("--lock", help="Write the files' hashes here; if the file exists, compare with it."),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Read files again that have not changed since the last check.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every file once and list all faults (exit code 3 if there are errors)."""
    from everseg.data.datasets import load_dataset
    from everseg.data.doctor.doctor import check_source
    from everseg.data.doctor.findings import read_lock, write_lock, write_skiplist

    for option, file in (("--write-skiplist", skiplist), ("--lock", lock)):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise ConfigError(f"{option}: {file} cannot be a file there; name a file in a folder that exists")
    data = _data_config(dataset, overrides)
    forgiving = data.model_copy(update={"options": {**data.options, "on_missing": "skip"}})
    locked = read_lock(lock) if lock is not None and lock.exists() else None
    with sample_progress(f"checking {dataset}", quiet=as_json) as advance:
        report = check_source(
            lambda: load_dataset(data),
            lenient=lambda: load_dataset(forgiving),
            sample=sample,
            cache=not no_cache and lock is None,
            lock=locked,
            progress=advance,
        )
    if as_json:
        write_json(report.to_json())
    else:
        say(report.summary())
    if skiplist is not None:
        count = write_skiplist(skiplist, report)
        note(f"{count} faulty samples in {skiplist}; leave them out with data.options.skip={skiplist}")
    if lock is not None and locked is None:
        write_lock(lock, report)
        note(f"hashes of {len(report.digests)} samples in {lock}; the same command compares with them")
    if not report.ok:
        raise typer.Exit(3)


@data_app.command("download")
def data_download(
    dataset: Annotated[str, typer.Argument(metavar="voc|ade")],
    to: Annotated[Path, typer.Option("--to", help="Folder to download and unpack to.")],
) -> None:
    """Fetch and unpack a data set; a second call goes on where the first stopped."""
    from everseg.data.get.download import download

    root = download(dataset, to, progress=byte_progress(dataset))
    say(f"ready: data.root={root}")


@data_app.command("prepare")
def data_prepare(
    dataset: Annotated[str, typer.Argument(metavar="cityscapes|idd")],
    root: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that holds gtFine/ (IDD: or its parts).")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Draw masks that exist again too.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only verify the masks that exist.")] = False,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out polygons of unknown labels.")
    ] = False,
) -> None:
    """Draw the id masks from the polygons; a second call does what is left (exit code 3 if files are refused)."""
    from everseg.data.get.draw_masks import prepare

    begun = time.monotonic()
    with sample_progress(f"preparing {dataset}") as advance:
        done = prepare(
            dataset, root, overwrite=overwrite, check=check, skip_unknown=skip_unknown, progress=advance
        )
    counts = f"{done.kept} masks whole" if check else f"{done.written} masks written, {done.kept} kept"
    say(f"{counts}, {len(done.faults)} files refused in {time.monotonic() - begun:.1f} s")
    if done.faults:
        head = f"{len(done.faults)} without a mask of these polygons (a mask made before is left as it was):"
        remedy = "Restore these files, or leave the images out."
        if any("not of this data set" in fault for fault in done.faults):
            remedy += " --skip-unknown draws the rest of files with unknown labels."
        raise DataError("\n  ".join([head, *done.faults]) + f"\n{remedy}")


@data_app.command("weights")
def data_weights(
    dataset: DatasetName,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="Split whose pixels are counted.")] = "train",
    encoder: Annotated[
        bool, typer.Option("--encoder", help="1/ln(1.2 + p), for training ERFNet's encoder alone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compute the class weights 1/ln(1.1 + p), p the share of pixels; void counts but weighs 0."""
    from everseg.data.class_weights import (
        CONSTANT,
        ENCODER_CONSTANT,
        class_weights,
        dataset_pixels,
        output_order,
    )
    from everseg.data.datasets import load_dataset
    from everseg.reports import terminal

    data = load_dataset(_data_config(dataset, overrides))
    with sample_progress(f"counting {dataset}", quiet=as_json) as advance:
        pixels = dataset_pixels(data, split, progress=advance)
    constant = ENCODER_CONSTANT if encoder else CONSTANT
    names = [*(data.labels.names[raw] for raw in output_order(data.labels)), "void"]
    rows = list(zip(names, pixels.tolist(), class_weights(pixels, constant).tolist(), strict=True))
    if as_json:
        classes = [{"name": name, "pixels": count, "weight": weight} for name, count, weight in rows]
        write_json({"dataset": data.name, "split": split, "constant": constant, "classes": classes})
        return
    lines = [(name, str(count), f"{weight:.6f}") for name, count, weight in rows]
    console_of_stdout().print(terminal.table(["class", "pixels", "weight"], lines, right="pixels|weight"))


def _data_config(dataset: str, overrides: list[str] | None) -> DataConfig:
    """`root=DIR` is short for data.root=DIR here."""
    from everseg.config.loading import load

    keys = [text if text.startswith("data.") else f"data.{text}" for text in overrides or []]
    return load({}, [f"data.dataset={dataset}", *keys]).data


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
    from everseg.config.fields import DataConfig
    from everseg.data.datasets import load_dataset
    from everseg.data.proposal.describe import describe, propose
    from everseg.reports.data_preview import data_preview
    from everseg.runs.commit import write_bytes

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
