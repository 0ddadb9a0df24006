"""The verbs for finished models: export, extend, diff, adopt, serve."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from everseg.cli.output import Builder, Json, Overrides, Quiet, Step, give, note, say

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the new bundle.")]
NewFolder = Annotated[Path, typer.Option("--out", "-o", help="A new folder.")]
Domain = Annotated[str | None, typer.Option("--domain", metavar="NAME", help="Domain whose branch is used.")]
Images = Annotated[
    Path | None,
    typer.Option("--images", metavar="DIR", help="Images to compare the ONNX file with the model on."),
]
Precision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Predict with the bundle's ONNX file: fp32, fp16 or int8."),
]
RequireSignature = Annotated[
    Path | None,
    typer.Option("--require-signature", metavar="KEY", help="Public key that must have signed the bundle."),
]
NoOnnx = Annotated[bool, typer.Option("--no-onnx", help="Leave the ONNX file out. Then no extra is needed.")]


def add_deploy_commands(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command()(export)
    app.command()(extend)
    app.command()(history)
    app.command()(rollback)
    app.command()(diff)
    app.command()(adopt)
    app.command()(bench)
    app.command()(sign)
    app.command()(verify)
    app.command()(page)
    app.command()(push)
    app.command()(pull)
    app.command()(serve)


def export(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a model folder.")],
    overrides: Overrides = None,
    out: Out = None,
    step: Step = None,
    images: Images = None,
    no_onnx: NoOnnx = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Put the images of the run's memory into the bundle, with their labels."
        ),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            metavar="fp16,int8", help="Smaller ONNX files beside the full one, measured against it on images."
        ),
    ] = "",
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images for --precision: a data.yaml, a data set, or a folder; default the run's.",
        ),
    ] = None,
    max_drop: Annotated[
        float, typer.Option(min=0, metavar="POINTS", help="Points of mIoU that a smaller file may lose.")
    ] = 1.0,
    model: Builder = None,
    as_json: Json = False,
) -> None:
    """Write a bundle: weights, ONNX, class ids, model card, example. It holds no training image unless asked."""
    from everseg import api

    bundle = api.export(
        path,
        out,
        step=step,
        images=images,
        onnx=not no_onnx,
        memory=memory,
        precision=names_in(precision),
        calibrate=calibrate,
        max_drop=max_drop,
        overrides=overrides or [],
        builder=builder(model),
    )
    give(bundle, as_json)
    if not as_json:
        say(f"use it with: everseg predict {bundle.path} IMAGES -o out")


def extend(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Bundle of the deployed model. It is not changed.")
    ],
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(help="A data.yaml: it labels the new classes, or more images of known ones."),
    ] = None,
    add: Annotated[
        str,
        typer.Option(
            help="Names of the new classes, separated by commas; default none, known ones are refined."
        ),
    ] = "",
    drop: Annotated[str, typer.Option(metavar="A,B", help="Classes that the model loses.")] = "",
    merge: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B=C", help="Classes that become one class, named C; may be repeated."),
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="A=B", help="A new name of a class; may be repeated.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="A name of `everseg list methods`; default mib, or complete (see the docs)."),
    ] = None,
    how: Annotated[
        Literal["quick", "balanced", "thorough"] | None,
        typer.Option(
            help="Instead of --method: train classifiers alone; as by default; or with earlier images."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Instead of both: take the most thorough way that fits this time here (90s, 10min).",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what is taught and kept, and how long it takes here. Nothing is kept."
        ),
    ] = False,
    out: Out = None,
    keep_at_least: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of the old classes' quality that must be left, 0 to 1."),
    ] = None,
    keep_each_at_least: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="The same share, for every old class that can be judged."),
    ] = None,
    old_val: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DATA",
            help="Data with labels of old classes, to measure that quality; of several branches one each.",
        ),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Place or device of the new images: a known one, or a new branch."),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch that a new one begins as a copy of; default the nearest."),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="A new place takes the nearest branch itself, none of its own.")
    ] = False,
    images: Images = None,
    no_onnx: NoOnnx = False,
    require_signature: RequireSignature = None,
    model: Builder = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Teach a deployed model classes, more images or another place, without old data; or drop, merge, rename some."""
    from everseg import api

    names = names_in(add)
    edits: dict[str, Any] = {
        "drop": names_in(drop),
        "merge": {new: names_in(parts) for parts, new in _pairs("--merge A,B=C", merge)},
        "rename": dict(_pairs("--rename A=B", rename)),
    }
    if dry_run:
        seen = api.preview(
            bundle, data=data, add=names, **edits, method=method, how=how, budget=budget, overrides=overrides or [],
            model=model, old_val=old_val, domain=domain, like=like, shared=shared,
            keep_at_least=keep_at_least, keep_each_at_least=keep_each_at_least,
            require_signature=require_signature, quiet=quiet,
        )  # fmt: skip
        give(seen, as_json)
        return
    done = api.extend(
        bundle,
        data=data,
        add=names,
        **edits,
        method=method,
        how=how,
        budget=budget,
        out=out,
        keep_at_least=keep_at_least,
        keep_each_at_least=keep_each_at_least,
        old_val=old_val,
        domain=domain,
        like=like,
        shared=shared,
        images=images,
        onnx=False if no_onnx else None,
        require_signature=require_signature,
        overrides=overrides or [],
        model=model,
        quiet=quiet,
    )
    give(done, as_json)


def _pairs(option: str, given: list[str] | None) -> list[tuple[str, str]]:
    """What stands before and behind the last "=" of each text.

    Args:
        option: with the form that is expected, for the message.
    """
    from everseg.errors import ConfigError

    if wrong := [text for text in given or [] if "=" not in text]:
        raise ConfigError(f"{option}: no '=' in {', '.join(wrong)}")
    found = [text.rpartition("=") for text in given or []]
    pairs = [(before.strip(), behind.strip()) for before, _, behind in found]
    for place, what in ((0, "before"), (1, "behind")):
        seen = [pair[place] for pair in pairs]
        if twice := sorted({name for name in seen if seen.count(name) > 1}):
            raise ConfigError(f"{option}: {', '.join(twice)} stands twice {what} the '='")
    return pairs


Look = Annotated[
    list[Path] | None,
    typer.Option(
        "--look", metavar="DIR", help="A further folder in which earlier bundles are; may be repeated."
    ),
]


def history(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to tell of.")],
    look: Look = None,
    as_json: Json = False,
) -> None:
    """Tell how a bundle's model came about: data, methods and figures of every step, and the bundles before it."""
    from everseg import api

    give(api.history(bundle, look=look or []), as_json)


def rollback(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to go back from.")],
    to: Annotated[
        int | None,
        typer.Option(min=1, metavar="STEPS", help="Steps of the earlier model; default the one before."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder for a copy; default none is made.")
    ] = None,
    look: Look = None,
    as_json: Json = False,
) -> None:
    """Find an earlier bundle of the same line and verify it; bundles are never changed, so it is as it was."""
    from everseg import api

    give(api.rollback(bundle, to=to, out=out, look=look or []), as_json)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Bundle, run folder or model folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    images: Annotated[Path, typer.Option(metavar="DIR", help="Images to compare them on.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for diff.png and diff.json.")
    ] = None,
    largest: Annotated[
        int, typer.Option(min=1, help="Number of images on the picture and in the table.")
    ] = 8,
    domain: Domain = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show where two models disagree on the same images, and which class became which."""
    from everseg import api

    give(api.diff(a, b, images, out=out, largest=largest, domain=domain, quiet=quiet), as_json)


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
        Literal["imagenet", "unit"] | None,
        typer.Option(
            help="How the model wants its inputs, as data.normalisation; default imagenet, not of timm."
        ),
    ] = None,
    norm: Annotated[
        Literal["bn", "abn", "iabn"] | None,
        typer.Option(help="Of a head on timm's encoder: bn has a ReLU behind it, abn and iabn a leaky one."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="For timm: .safetensors with an image and the original's logits for it."),
    ] = None,
    images: Images = None,
    no_onnx: NoOnnx = False,
    as_json: Json = False,
) -> None:
    """Turn a model that was not trained here into a bundle, checked by a forward pass."""
    from everseg import api

    done = api.adopt(
        weights,
        arch=arch,
        classes=classes,
        out=out,
        normalisation=normalisation,
        norm=norm,
        reference=reference,
        images=images,
        onnx=not no_onnx,
    )
    give(done, as_json)


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to measure.")],
    size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Size of the image; default the model's own, or 512x512."),
    ] = None,
    domain: Domain = None,
    runs: Annotated[int, typer.Option(min=5, help="Timed runs of each form.")] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default one for each usable processor.")
    ] = None,
    model: Builder = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency, throughput and memory of each form of a bundle on this machine."""
    from everseg import api

    give(
        api.bench(
            bundle, size=size, domain=domain, runs=runs, threads=threads, model=model, quiet=quiet or as_json
        ),
        as_json,
    )


def sign(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to sign.")],
    key: Annotated[
        Path, typer.Option(metavar="FILE", help="Private key (Ed25519, PEM); its password is asked for.")
    ],
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make the key first: FILE, and FILE.pub for those who verify.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Sign a bundle with a key of yours, so that others can trust it after it travelled."""
    from everseg import api
    from everseg.runs.signature import is_encrypted

    locked = not new_key and key.is_file() and is_encrypted(key)
    password = typer.prompt(f"password of {key}", hide_input=True, err=True) if locked else None
    give(api.sign(bundle, key=key, new_key=new_key, password=password), as_json)


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to verify.")],
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Public key that must have signed it; default bytes only."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare every byte of a bundle with its manifest, and the manifest with a signature."""
    from everseg import api

    give(api.verify(bundle, key=key), as_json)


def page(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle with its ONNX file.")],
    out: NewFolder,
    runtime: Annotated[
        Path, typer.Option(metavar="DIR", help="The npm package onnxruntime-web; its files are copied.")
    ],
    precision: Annotated[str, typer.Option(metavar="NAME", help="fp32, fp16 or int8.")] = "fp32",
    as_json: Json = False,
) -> None:
    """Write a folder with a web page that runs the bundle in the browser, without a server of ours."""
    from everseg import api

    give(api.page(bundle, out=out, runtime=runtime, precision=precision), as_json)


def push(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to publish.")],
    to: Annotated[str, typer.Argument(metavar="hf:ORG/NAME", help="Repository of the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    license: Annotated[
        str | None, typer.Option(metavar="NAME", help="License that you give the model, such as apache-2.0.")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Publish the training images that the bundle holds, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a bundle to the hub, with a model card that the hub reads."""
    from everseg import api

    give(api.push(bundle, to, private=private, license=license, memory=memory), as_json)


def pull(
    source: Annotated[
        str, typer.Argument(metavar="hf:ORG/NAME[@REVISION]", help="Repository; a commit's hash pins it.")
    ],
    out: NewFolder,
    require_signature: RequireSignature = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a bundle from the hub and verify every byte of it. Nothing of it is run."""
    from everseg import api

    give(api.pull(source, out, require_signature=require_signature, quiet=quiet or as_json), as_json)


def serve(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to look at.")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE2]", help="Another one to compare it with.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")
    ] = 8000,
    model: Builder = None,
    precision: Precision = None,
    require_signature: RequireSignature = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Predictions at a time; above 1 each in a process of its own.")
    ] = 1,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Time that one prediction may take.")
    ] = 120.0,
    quiet: Quiet = False,
) -> None:
    """Show a web page, on this machine only: drop an image there, and see the classes of one or two bundles."""
    from everseg import api

    # Service managers end a program with SIGTERM. Like Ctrl-C, it lets the prediction that runs finish.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with api.serve(
            bundle,
            other,
            port=port,
            builder=builder(model),
            precision=precision,
            require_signature=require_signature,
            workers=workers,
            timeout=timeout,
            quiet=quiet,
        ) as serving:
            give(serving)
            say("end with Ctrl-C")
            sys.stdout.flush()
            with contextlib.suppress(KeyboardInterrupt):
                serving.wait()
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    note("stopped")


def names_in(text: str) -> list[str]:
    """The names of an option that takes several, separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def builder(model: str | None) -> Any:
    """The builder that `--model FILE.py:NAME` names; Python passes the function itself."""
    from everseg import registry

    return None if model is None else registry.resolve("model", model)
