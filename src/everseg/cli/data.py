"""The verbs of `everseg data`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everseg import data
from everseg.cli.output import Json, Overrides, give, note, say, write_json
from everseg.errors import ConfigError, DataError

if TYPE_CHECKING:
    from everseg.data.proposal.describe import Proposal

data_app = typer.Typer(
    help="Check, download and prepare data sets.", no_args_is_help=True, rich_markup_mode=None
)

DatasetName = Annotated[
    str, typer.Argument(metavar="DATASET", help="A data set's name, a data.yaml, or file.py:build.")
]


@data_app.command()
def check(
    dataset: DatasetName,
    overrides: Overrides = None,
    write_skiplist: Annotated[
        Path | None,
        typer.Option("--write-skiplist", help="Write split and name of every faulty sample to this file."),
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="Check only so many samples of each split.")
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
    report = data.check(
        dataset,
        overrides or [],
        write_skiplist=write_skiplist,
        sample=sample,
        lock=lock,
        cache=not no_cache,
        quiet=as_json,
    )
    give(report, as_json)
    if not report.ok:
        raise typer.Exit(3)


@data_app.command()
def download(
    dataset: Annotated[str, typer.Argument(metavar="voc|ade")],
    to: Annotated[Path, typer.Option("--to", help="Folder to download and unpack to.")],
    as_json: Json = False,
) -> None:
    """Fetch and unpack a data set; a second call goes on where the first stopped."""
    give(data.download(dataset, to, quiet=as_json), as_json)


@data_app.command()
def prepare(
    dataset: Annotated[str, typer.Argument(metavar="cityscapes|idd")],
    root: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that holds gtFine/ (IDD: or its parts).")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Draw existing masks again too.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only verify the masks that exist.")] = False,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out polygons of unknown labels.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw the id masks from the polygons; a second call does what is left (exit code 3 if files are refused)."""
    done = data.prepare(
        dataset, root, overwrite=overwrite, check=check, skip_unknown=skip_unknown, quiet=as_json
    )
    if as_json:
        write_json(done.to_json())
    else:
        say(done.counts())
    if done.faults:
        raise DataError(done.refusal())


@data_app.command()
def weights(
    dataset: DatasetName,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="Split whose pixels are counted.")] = "train",
    encoder: Annotated[
        bool, typer.Option("--encoder", help="1/ln(1.2 + p), for training ERFNet's encoder alone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compute class weights 1/ln(1.1 + p), p = share of the pixels. Void has weight 0, but its pixels count."""
    give(data.weights(dataset, overrides or [], split=split, encoder=encoder, quiet=as_json), as_json)


@data_app.command()
def saliency(
    dataset: DatasetName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write OUT/SPLIT/ID.png to.")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="Split whose images get a map.")] = "train",
    as_json: Json = False,
) -> None:
    """Write a simple saliency map of every training image (colours only, no detector) for data.extra.saliency."""
    give(data.saliency(dataset, overrides or [], out=out, split=split, quiet=as_json), as_json)


@data_app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with images and masks in any layout.")
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            help="Names in the order of the values, a,b,c; or tied to them, a=1,b=128,64,128,ignore=255.",
        ),
    ] = None,
    names_from: Annotated[
        int | None,
        typer.Option("--names-from", min=0, max=1, help="Id of the first name of a list, where both fit."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like", help="Take classes, colours, ids and names from this data.yaml, run or bundle."
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            "--background",
            metavar="NAME|none",
            help="Which class is the background, if its name does not tell.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The description to write.")] = Path("data.yaml"),
    yes: Annotated[
        bool, typer.Option("--yes", help="Ask nothing; classes without name become class_1, ...")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the description if it exists.")] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Use files and folders that links lead to.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Guess the layout and the classes of a folder; write a data.yaml and a page with 24 labelled images."""
    from everseg.data.proposal.naming import split_classes

    given = None if classes is None else split_classes(classes)

    may_ask = not (yes or as_json) and sys.stdin.isatty()

    def ask(proposal: Proposal) -> list[str] | None:
        say(proposal.text())
        asked = may_ask and given is None and like is None and proposal.unnamed
        return _ask(proposal) if asked else None

    made = data.init(
        folder,
        classes=given,
        background=background,
        names_from=names_from,
        like=like,
        out=out,
        force=force,
        ask=None if as_json else ask,
        ask_background=_ask_background if may_ask else None,
        follow_links=follow_links,
        ask_reading=_ask_reading if may_ask else None,
        quiet=as_json,
    )
    for text in made.notes:
        note(f"note: {text}")
    if as_json:
        write_json(made.to_json())
    else:
        say(made.outcome())


def _ask_background(default: str) -> str:
    """Ask for the background on the terminal; an empty answer takes the proposal."""
    sys.stdout.write(f"Which class is the background, or none? [{default}] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip() or default


def _ask_reading(readings: Sequence[str]) -> int:
    """Ask on the terminal which way to understand the names is right; nothing is proposed."""
    say("The names can be read in several ways:")
    for number, text in enumerate(readings, 1):
        say(f"  {number}) {text}")
    sys.stdout.write(f"Which one, 1 to {len(readings)}? ")
    sys.stdout.flush()
    answer = sys.stdin.readline().strip()
    if answer not in map(str, range(1, len(readings) + 1)):
        raise ConfigError(f"'{answer}' is not a number from 1 to {len(readings)}; nothing was written")
    return int(answer) - 1


def _ask(proposal: Proposal) -> list[str] | None:
    """Ask for the names on the terminal; an empty answer takes the proposal."""
    from everseg.data.mask_values import shown
    from everseg.data.proposal.naming import default_name, split_classes

    values = "; ".join(shown(v) for v in proposal.unnamed)
    if all(isinstance(v, int) for v in proposal.unnamed):
        values = values.replace(";", ",")
    default = ",".join(proposal.names) or ",".join(default_name(v) for v in proposal.unnamed)
    sys.stdout.write(f"Names for {values}, with commas between? [{default}] ")
    sys.stdout.flush()
    answer = sys.stdin.readline().strip()
    return split_classes(answer) if answer else None
