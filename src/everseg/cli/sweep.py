"""The verbs `everseg sweep` and `everseg compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from everseg.cli.output import Json, Overrides, Quiet, give
from everseg.errors import ConfigError
from everseg.files import whole_number


def sweep(
    source: Annotated[
        str, typer.Argument(metavar="PRESET_OR_YAML", help="A preset, with or without its method, or a file.")
    ],
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(metavar="A,B,...", help="Methods (everseg list methods), joint; or all.")
    ] = "",
    seeds: Annotated[str, typer.Option(metavar="0,1,...", help="Seeds of the runs.")] = "0",
    tasks: Annotated[str, typer.Option(metavar="A,B,...", help="Tasks instead of the preset's own.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the runs; default runs/<preset>-sweep.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Number of runs at a time on this machine; they share the CPU threads.")
    ] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="On a Ray cluster (extra ray).")] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Write a SLURM array script; submit it if there is sbatch.")
    ] = False,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="CPU threads per run; default this machine's share, on Ray 1.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(help="GPUs per run on Ray; default 1 where there are any, else 0.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="RUN", help="Train only this run of the sweep.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would run.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train methods x seeds x tasks; first steps that runs share are trained once. The same command continues."""
    from everseg import api

    if ray and slurm:
        raise ConfigError("--ray and --slurm: give one of them")
    on: Literal["here", "ray", "slurm"] = "ray" if ray else "slurm" if slurm else "here"
    done = api.sweep(
        source,
        _words(methods),
        _numbers(seeds),
        _words(tasks),
        out=out,
        overrides=overrides or [],
        jobs=jobs,
        on=on,
        cpus=cpus,
        gpus=gpus,
        only=only,
        dry_run=dry_run,
        quiet=quiet,
    )
    give(done, as_json)
    codes = {run.exit_code for run in done.runs if run.exit_code}
    if codes:
        raise typer.Exit(codes.pop() if len(codes) == 1 else 1)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, and folders of runs.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Method that differences are taken from; default ft."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of compare.html, .csv, .tex, .md, .svg.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Mean and standard deviation over seeds, differences, costs, published numbers: table, HTML, Markdown, CSV."""
    from everseg import api

    give(api.compare(runs, against=against, out=out), as_json)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    words = _words(text)
    if wrong := [word for word in words if whole_number(word) is None]:
        raise ConfigError(f"--seeds: expected whole numbers of at least 0, got {', '.join(wrong)}")
    return [int(word) for word in words]
