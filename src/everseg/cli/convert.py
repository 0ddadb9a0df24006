"""The verbs of `everseg import` and `everseg weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from everseg.cli.output import Json, give, say
from everseg.errors import ConfigError

Back = Annotated[bool, typer.Option("--back", help="Write a model of everseg in the original layout.")]
import_app = typer.Typer(
    help="Read (and write) other projects' checkpoints.", no_args_is_help=True, rich_markup_mode=None
)


weights_app = typer.Typer(
    help="Pretrained weights of encoders: where they come from, and a folder for them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@weights_app.command("list")
def list_weights(as_json: Json = False) -> None:
    """List the weights that presets use: size, licence, and whether they are on this machine."""
    from everseg.interop import weights

    give(weights.catalogue(), as_json)


@weights_app.command("get")
def get_weights(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of `everseg weights list`.")],
    to: Annotated[Path | None, typer.Option("--to", help="Folder; default EVERSEG_WEIGHTS.")] = None,
    as_json: Json = False,
) -> None:
    """Download weights into the shared folder, or check those that are there against their checksum."""
    from everseg.interop import weights

    give(weights.get(name, to), as_json)


@import_app.command("mib")
def import_mib(
    source: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="The original .pth. With --back: everseg's model folder."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder. With --back: the .pth to write.")],
    back: Back = False,
    norm: Annotated[
        Literal["abn", "iabn"], typer.Option(help="Norm that the checkpoint was trained with.")
    ] = "iabn",
    output_stride: Annotated[int, typer.Option(help="8 or 16, as in the original's options.")] = 16,
    classes: Annotated[str, typer.Option(help="Class names in output order, separated by commas.")] = "",
) -> None:
    """Turn an original MiB step checkpoint into a model folder, or back."""
    from everseg import api

    if back:
        say(f"wrote {api.export_mib(source, out)}")
        return
    if output_stride not in (8, 16):
        raise ConfigError(f"--output-stride: expected 8 or 16, got {output_stride}")
    folder = api.import_mib(source, out, norm=norm, output_stride=output_stride, classes=_listed(classes))
    say(f"wrote {folder}; use it with: everseg predict {folder} IMAGES -o out")


@import_app.command("mdil")
def import_mdil(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="The original .pth.tar. With --back: everseg's model folder."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="New folder; for the encoder alone a .safetensors file. With --back: the file to write.",
        ),
    ],
    back: Back = False,
    encoder: Annotated[
        bool,
        typer.Option(
            "--encoder", help="With --back: write the encoder only, as the ImageNet-pretrained file has it."
        ),
    ] = False,
    domain: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="With --encoder: the domain whose norms are written, if each has its own."
        ),
    ] = None,
    domains: Annotated[
        str, typer.Option(help="Names of the domains in the order they were learnt, separated by commas.")
    ] = "",
    classes: Annotated[
        list[str] | None,
        typer.Option(
            help="Class names of a domain in output order, without void, separated by commas. Once per domain."
        ),
    ] = None,
) -> None:
    """Turn an original MDIL checkpoint, or MDIL's ImageNet-pretrained encoder, into everseg's form, or back."""
    from everseg import api

    if encoder and not back:
        raise ConfigError(
            "--encoder works with --back only; an original encoder file is recognised without it"
        )
    if domain is not None and not encoder:
        raise ConfigError("--domain works with --back --encoder only")
    if back:
        wrote = (
            api.export_mdil_encoder(source, out, domain=domain) if encoder else api.export_mdil(source, out)
        )
        say(f"wrote {wrote}")
        return
    made = api.import_mdil(
        source, out, domains=_listed(domains), classes=[_listed(names) for names in classes or ()]
    )
    if made.is_file():
        say(f"wrote {made}; start a run from it with: model.name=erfnet model.weights={made}")
    else:
        say(f"wrote {made}; use it with: everseg predict {made} IMAGES -o out")


def _listed(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",")] if text else []
