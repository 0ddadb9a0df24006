"""The verbs for finished models: export, extend, diff, adopt, serve."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from everseg.cli.output import Json, Overrides, console_of_stdout, note, say, speaks, write_json
from everseg.reports.text import percent

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the new bundle.")]
Images = Annotated[
    Path | None,
    typer.Option("--images", metavar="DIR", help="Images to compare the ONNX file with the model on."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
NoOnnx = Annotated[bool, typer.Option("--no-onnx", help="Leave the ONNX file out (needs no extra).")]


def add_deploy_commands(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command()(export)
    app.command()(extend)
    app.command()(diff)
    app.command()(adopt)
    app.command()(serve)


def export(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a model folder.")],
    overrides: Overrides = None,
    out: Out = None,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="Which finished step; default the last.")
    ] = None,
    images: Images = None,
    no_onnx: NoOnnx = False,
    model: Annotated[
        str | None, typer.Option(metavar="FILE.py:NAME", help="Your own architecture, if the run has one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a bundle: weights, ONNX, class ids, model card, example; complete by itself, no training images inside."""
    from everseg import registry
    from everseg.deploy.export import export as make

    bundle = make(
        path,
        out,
        step=step,
        images=images,
        onnx=not no_onnx,
        overrides=overrides or [],
        builder=None if model is None else registry.resolve("model", model),
    )
    if as_json:
        write_json({"path": str(bundle.path), "sha256": bundle.digest, "parity": bundle.lineage["parity"]})
        return
    say_parity(bundle.lineage["parity"])
    say(f"wrote {bundle.path}: {len(bundle.registry.classes)} classes, MODEL_CARD.md says the rest")
    say(f"use it with: everseg predict {bundle.path} IMAGES -o out")


def extend(
    path: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Bundle of the deployed model; stays as it is.")
    ],
    data: Annotated[str, typer.Option(help="A data.yaml that labels the new classes.")],
    add: Annotated[str, typer.Option(help="Names of the new classes, separated by commas.")],
    overrides: Overrides = None,
    method: Annotated[str, typer.Option(help="A name of `everseg list methods`.")] = "mib",
    out: Out = None,
    keep_at_least: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Gate: share of the old classes' quality to keep, 0 to 1."),
    ] = None,
    old_val: Annotated[
        str | None, typer.Option(metavar="DATA", help="Data with labels of old classes, to measure it on.")
    ] = None,
    images: Images = None,
    no_onnx: NoOnnx = False,
    model: Annotated[
        str | None, typer.Option(metavar="FILE.py:NAME", help="Your own architecture, if the bundle has one.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Teach a deployed model new classes from its bundle alone, without old data; the same command continues."""
    from everseg.deploy.extend import extend as grow

    done = grow(
        path,
        data=data,
        add=[name.strip() for name in add.split(",") if name.strip()],
        method=method,
        out=out,
        keep_at_least=keep_at_least,
        old_val=old_val,
        images=images,
        onnx=False if no_onnx else None,
        overrides=overrides or [],
        model=model,
        quiet=quiet,
    )
    if not speaks():
        return
    if as_json:
        write_json(done.to_json())
        return
    say(
        "new:  "
        + ", ".join(f"{name} {percent(value)}" for name, value in done.new.items())
        + " (IoU in percent)"
    )
    say(f"old:  {done.kept.text}")
    if keep_at_least is not None:
        say(f"gate: PASS, at least {percent(keep_at_least)} % asked for, {percent(done.kept.share)} % left")
    say_parity(done.bundle.lineage["parity"])
    say(f"wrote {done.bundle.path} ({path} is untouched; the run is {done.run})")


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Bundle, run folder or model folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    images: Annotated[Path, typer.Option(metavar="DIR", help="Images to compare them on.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for diff.png and diff.json.")
    ] = None,
    largest: Annotated[int, typer.Option(min=1, help="Images on the picture and in the table.")] = 8,
    domain: Annotated[
        str | None, typer.Option("--domain", metavar="NAME", help="Path that the images take.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show where two models disagree on the same images, and which class became which."""
    from everseg.deploy.diff import diff as compare
    from everseg.reports.terminal import table

    found = compare(a, b, images, out=out, largest=largest, domain=domain, quiet=quiet)
    if as_json:
        write_json(found)
        return
    rows = [
        [row["image"], percent(row["share"]), ", ".join(_became(one) for one in row["became"][:3])]
        for row in found["images"][:largest]
    ]
    console = console_of_stdout()
    title = (
        f"{a} and {b}: pixels that differ, {percent(found['share'])} % of {len(found['images'])} images; "
        "ranked by them, all classes counted"
    )
    console.print(
        table(
            ["image", "percent", "what became what (percent of the image)"],
            rows,
            title=title,
            right="percent",
        )
    )
    say("over all images: " + (", ".join(_became(one) for one in found["became"]) or "no difference"))
    for name, which in (("only_a", a), ("only_b", b)):
        if found[name]:
            say(f"only {which} knows: {', '.join(found[name])}")
    if found["sheet"]:
        say(f"wrote {found['sheet']} and diff.json beside it")


def adopt(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="State dict: .safetensors or .pth.")],
    arch: Annotated[
        str,
        typer.Option(
            metavar="KIND:NAME",
            help="torchvision:deeplabv3_resnet50 (or fcn), transformers:CONFIG_DIR, timm:ENCODER.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new bundle.")],
    classes: Annotated[
        str | None, typer.Option(help="Class names in output order: a,b,c or a file; default config.json's.")
    ] = None,
    normalisation: Annotated[
        Literal["imagenet", "unit"],
        typer.Option(help="How the model wants its inputs, as data.normalisation."),
    ] = "imagenet",
    images: Images = None,
    no_onnx: NoOnnx = False,
) -> None:
    """Turn a model that was not trained here into a bundle, checked by a forward pass."""
    from everseg.deploy.adopt import adopt as take

    done = take(
        weights,
        arch=arch,
        classes=classes,
        out=out,
        normalisation=normalisation,
        images=images,
        onnx=not no_onnx,
    )
    say(f"check: {done.check}")
    say_parity(done.bundle.lineage["parity"])
    say(f"wrote {done.bundle.path}: {len(done.bundle.registry.classes)} classes")
    if not done.background:
        say("note: its first class is not the background, so everseg extend cannot go on from it")


def _became(one: dict) -> str:
    return f"{one['a']} -> {one['b']} {percent(one['share'])}"


def say_parity(parity: dict) -> None:
    """Say how far the ONNX files and PyTorch are apart."""
    for path, found in parity.items():
        through = f" of path '{path}'" if len(parity) > 1 else ""
        say(
            f"ONNX{through} against PyTorch on {found['source']} at {len(found['sizes'])} sizes: largest difference of "
            f"a logit {found['logit_difference']:.1e}, same class on "
            f"{percent(found['equal_pixels'], digits=4)} % of the pixels"
        )


def serve(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to look at.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE2]", help="Another one to compare it with.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")
    ] = 8000,
    model: Annotated[
        str | None, typer.Option(metavar="FILE.py:NAME", help="Your own architecture, if a bundle has one.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Show a page, on this machine only, to drop images on and see the classes of one or two bundles."""
    from everseg import registry
    from everseg.deploy.serve import Server

    with Server(
        [path] if other is None else [path, other],
        port,
        builder=None if model is None else registry.resolve("model", model),
        log=(lambda text: None) if quiet else note,
    ) as server:
        say(f"open {server.url} in a browser; end with Ctrl-C")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    note("stopped")
