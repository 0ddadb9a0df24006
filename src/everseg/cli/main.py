"""The command line: verbs, messages and exit codes.

torch is imported only where a verb needs it, so that --help and the lists answer at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from everseg.cli.convert import import_app, weights_app
from everseg.cli.data import data_app
from everseg.cli.deploy import Precision, RequireSignature, add_deploy_commands, builder
from everseg.cli.docs import docs
from everseg.cli.output import (
    Builder,
    Json,
    Overrides,
    Quiet,
    Step,
    give,
    guarded,
    listing,
    pairs,
    preset_groups,
    preset_list,
    say,
    speaks,
    write_json,
)
from everseg.cli.sweep import compare, sweep
from everseg.reports.text import columns

if TYPE_CHECKING:
    from everseg.api import Demo

app = typer.Typer(
    name="everseg",
    epilog="Add --debug to any command for the traceback of an error.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from everseg.reports.installation import env

        say(env().summary())
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Versions, device and extras; everseg env says more.",
        ),
    ] = False,
) -> None:
    """Keep a semantic-segmentation model learning: new classes, new domains, without the old data."""


app.add_typer(data_app, name="data")
app.add_typer(import_app, name="import")
app.add_typer(weights_app, name="weights")


def _presets(incomplete: str) -> list[str]:
    """Name the presets that a shell may complete a word to; without one the shell completes file names."""
    from everseg.config import presets

    preset, sign, _ = incomplete.partition(presets.NETWORK)
    if sign:
        return [f"{preset}{sign}{network}" for network in presets.networks()]
    return [name for name in presets.names(every=True) if name.startswith(incomplete)]


Source = Annotated[
    str,
    typer.Argument(
        metavar="PRESET_OR_YAML",
        help="A name of `everseg list presets`, or a file.",
        autocompletion=_presets,
    ),
]
Domain = Annotated[
    str | None, typer.Option("--domain", metavar="NAME", help="Domain whose branch is used (and tested).")
]
InferDomain = Annotated[
    bool,
    typer.Option(
        "--infer-domain", help="Choose the branch per image: the one whose images look most like it."
    ),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs.")] = Path("runs"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of initial weights, order and augmentation.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train fine-tuning, MiB and joint on generated scenes and show what was forgotten."""
    from everseg import api

    def show(result: Demo) -> None:
        """Print the result as soon as it is known. The reports are written after it, which takes longer."""
        give(result, as_json)
        sys.stdout.flush()  # into a pipe too the table comes before the reports

    done = api.demo(out=out, seed=seed, quiet=quiet, shown=show)
    if as_json or not speaks():
        return
    path = next((row.path for row in done if row.method == "mib"), done[-1].path)
    commands = {
        "everseg data init DIR": "your own images and masks: a description, and a page to look at",
        f"everseg predict {path} IMAGES -o out": "masks and overlays of your images",
        f"everseg eval {path}": "all scores of the last step",
        "everseg run camvid-6-5-mib data.root=DIR": "the same on real images",
        "everseg show demo-mib": "what each step sees, and every setting with its meaning",
        "everseg list presets": "the published settings",
    }
    # A command stands on a line of its own: beside it the words would not fit into 80 columns.
    lines = [f"  {command}\n      {what}" for command, what in commands.items()]
    say("\n".join([f"\nOpen in a browser: {path / 'report.html'}", "\nNext:", *lines]))


@app.command()
def run(
    source: Source,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Try every stage with two iterations of every step. Nothing is kept."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train and score every step; the same command continues an unfinished run."""
    from everseg import api
    from everseg.sweeps import process

    process.follow()
    done = api.run(source, overrides=overrides or [], dry_run=dry_run, quiet=quiet)
    give(done, as_json)
    if as_json or not speaks():
        return
    if dry_run:
        say("dry run: every stage works; these scores mean nothing and nothing was kept")
    else:
        say(f"run folder: {done.path}")


@app.command("eval")
def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="Run folder, or a bundle (with data=...).")
    ],
    overrides: Overrides = None,
    step: Step = None,
    domain: Domain = None,
    infer_domain: InferDomain = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a finished step again, on its own test images or on others (data=... scenario.test_split=...)."""
    from everseg import api

    scores = api.evaluate(
        path, step=step, overrides=overrides or [], domain=domain, infer_domain=infer_domain, quiet=quiet
    )
    give(scores, as_json)


@app.command()
def predict(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a model folder.")],
    images: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Images, and folders of images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for masks and overlays.")],
    step: Step = None,
    domain: Domain = None,
    infer_domain: InferDomain = False,
    model: Builder = None,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR", help="Further maps that the model reads, such as proposals; repeatable."
        ),
    ] = None,
    precision: Precision = None,
    require_signature: RequireSignature = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="FORM", help="masks, or for labelling tools and maps: cvat, coco, labelstudio, geotiff."
        ),
    ] = "masks",
    window: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Look at windows of this side one by one, to need less memory."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the id mask and an overlay of every image."""
    from everseg import api

    written = api.predict(
        path,
        images,
        out,
        step=step,
        builder=builder(model),
        domain=domain,
        infer_domain=infer_domain,
        extra=pairs("--extra", extra or []),
        precision=precision,
        require_signature=require_signature,
        format=format,
        window=window,
        quiet=quiet or as_json,
    )
    give(written, as_json)


@app.command()
def features(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    overrides: Overrides = None,
    before: Annotated[int | None, typer.Option(min=0, help="Earlier step; default --after minus 1.")] = None,
    after: Annotated[int | None, typer.Option(min=0, help="Later step; default the last.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder; default RUN/features/before-K-after-L.")
    ] = None,
    pixels: Annotated[int, typer.Option(min=1, help="Most pixels per class and domain.")] = 200,
    images: Annotated[int, typer.Option(min=1, help="Most test images per domain.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw and of t-SNE.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the encoder's features before and after a step: PCA, t-SNE and the drift of class centres."""
    from everseg import api

    drift = api.features(
        path,
        before=before,
        after=after,
        overrides=overrides or [],
        quiet=quiet,
        out=out,
        pixels=pixels,
        images=images,
        seed=seed,
    )
    give(drift, as_json)


@app.command("list")
def list_names(
    what: Annotated[
        str, typer.Argument(help="methods, scenarios, tasks, presets, models, datasets, policies.")
    ],
    contains: Annotated[str, typer.Argument(help="Only names that contain this.")] = "",
    every: Annotated[
        bool, typer.Option("--all", help="Every preset by its name, not only what names are made of.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the names that a configuration may use."""
    if what == "presets":
        from everseg.config import presets

        entries = presets.entries(contains)
        rows = [(entry.name, entry.title) for entry in entries]
    else:
        rows = [row for row in listing(what) if contains in row[0]]
    if as_json and what == "presets":
        write_json(
            [
                {"name": e.name, "help": e.title, "protocol": e.protocol, "policy": e.policy, "also": e.also}
                for e in entries
            ]
        )
    elif as_json:
        write_json([{"name": name, "help": text} for name, text in rows])
    elif not rows:
        from everseg.errors import ConfigError

        raise ConfigError(f"none of the {what} contains '{contains}' (everseg list {what})")
    elif what == "presets" and not (contains or every):
        say(preset_groups())
    elif what == "presets":
        say(preset_list(entries, contains))
    elif any(text for _, text in rows):
        say(columns(["name", "what"], rows))
    else:
        say("\n".join(name for name, _ in rows))


@app.command()
def show(
    source: Source,
    overrides: Overrides = None,
    scenario: Annotated[
        bool | None,
        typer.Option(
            "--scenario/--no-scenario", help="What every step sees; default if the data are at hand."
        ),
    ] = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print a YAML file to start from.")] = False,
    as_json: Json = False,
) -> None:
    """Print what every step will see, and the resolved configuration with each field's help."""
    from everseg import api

    outline = api.show(source, overrides=overrides or [], scenario=scenario)
    if as_yaml:
        say(outline.yaml.rstrip())
    else:
        give(outline, as_json)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; default RUN/report.html.")
    ] = None,
    images: Annotated[
        int, typer.Option(min=0, help="Test images looked at for the pictures; 0 = none.")
    ] = 64,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a run: its scores, charts and pictures, and how they were made."""
    from everseg import api

    give(api.report(path, overrides=overrides or [], out=out, images=images, quiet=quiet), as_json)


@app.command()
def env(as_json: Json = False) -> None:
    """Versions, processors, devices and extras, to copy into a bug report."""
    # Not through `everseg.api`, which needs PyTorch: where that cannot be imported, this says so.
    from everseg.reports import installation

    give(installation.env(), as_json)


app.command()(sweep)
app.command()(compare)
app.command()(docs)
add_deploy_commands(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of what happened (see `everseg.errors`)."""
    for stream in (sys.stdout, sys.stderr):
        # What a terminal or a file of another encoding cannot show becomes an escape, not an error.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    if not debug:
        # Before torch is imported: of a lost connection it would print its stack of C++ calls, in every process.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    given = [argument for argument in given if argument != "--debug"]
    # Started without stdout or stderr (`>&-`), Python has None there: then nobody wants to read it.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - until the end
    try:
        code = guarded(app, given, debug)
    except OSError:  # the message itself cannot be written
        code = 4
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = code or -1
    if code == -1 or _is_broken(sys.stdout):  # keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0 if code == -1 else code)


def _is_broken(stream: TextIO) -> bool:
    """Whether a stream still holds text that cannot be written."""
    try:
        stream.flush()
    except OSError:
        return True
    except ValueError:  # it is closed
        return False
    return False
