"""The verb `everseg report` (floor 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everseg.cli_support import Json, Overrides, note, say, write_json


def report(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default RUN/report.html.")] = None,
    images: Annotated[
        int, typer.Option(min=0, help="Test images looked at for the pictures; 0 = none.")
    ] = 64,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Write one HTML page with everything a run says: scores, charts, pictures, where they come from."""
    from everseg import api

    made = api.report(path, overrides=overrides or [], out=out, images=images, quiet=quiet)
    if as_json:
        write_json(made)
        return
    for text in made["notes"]:
        note(f"note: {text}")
    say(made["sentence"])
    say(f"report: {made['path']} ({made['bytes'] / 1e6:.1f} MB)")
