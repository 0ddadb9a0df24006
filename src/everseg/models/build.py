"""Models by name: builders, building from the configuration and from a checkpoint's description."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch.nn.modules.batchnorm import _BatchNorm

from everseg.config.fields import ModelConfig
from everseg.errors import CheckpointError, ConfigError
from everseg.models.adapters import encoders
from everseg.models.adapters.whole import torchvision_deeplabv3, torchvision_fcn, transformers_network
from everseg.models.blocks import BranchDecoder, PerBranch, check_in_channels, check_norm, check_per_branch
from everseg.models.deeplab import RATES, DeepLabV3
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel
from everseg.models.pretrained import load_encoder_weights
from everseg.models.resnet import ResNet
from everseg.models.stored import Sizes, TooLargeError, no_network, within
from everseg.registry import BUILTIN, resolve

Builder = Callable[..., SegmentationModel]


def deeplabv3(
    *,
    output_stride: int = 16,
    norm: str = "abn",
    blocks: Sequence[int] = (3, 4, 23, 3),
    bottleneck: bool = True,
    stem: int = 64,
    widths: Sequence[int] = (64, 128, 256, 512),
    outputs: Sequence[int] | None = None,
    stem_pool: bool = True,
    hidden: int = 256,
    out_channels: int = 256,
    rates: Sequence[int] | None = None,
    pool_size: int | None = 32,
    per_branch: str = "head",
    compensation: bool = False,
    dropout: float = 0.0,
    last_conv: bool = False,
    encoder_momentum: float | None = None,
    in_channels: int = 3,
) -> SegmentationModel:
    """Build DeepLabV3 on a ResNet with every dimension open; it has no outputs until it is grown.

    Args:
        output_stride: 16 or 8.
        norm: "bn" (ReLU), "abn" (leaky ReLU 0.01) or "iabn" (the same with gamma = |weight| + eps).
        blocks: as for `ResNet`; so are `bottleneck`, `stem`, `widths`, `outputs`, `stem_pool`.
        hidden: as for `DeepLabV3`; so are `out_channels`, `rates`, `pool_size`. Default rates: 6, 12, 18 at
            stride 16 and 12, 24, 32 at stride 8.
        per_branch: what each branch owns: "head" = its classifiers, "decoder" = its DeepLabV3 head too, "norm" = the
            encoder's norms too, "adapter" = 1x1 convolutions beside the encoder's 3x3 ones too.
        compensation: RCIL's network: a new convolution beside each 3x3 one and beside those of the head, no
            activation after the stem. Needs per_branch "head".
        dropout: as for `DeepLabV3`; so is `last_conv`.
        encoder_momentum: share of a new value in the running statistics of the encoder's norms; default 0.1, as in the
            other norms.
        in_channels: channels of the images; a run sets it as its data set states.

    Raises:
        ConfigError: a dimension that cannot be.
    """
    options: dict[str, Any] = {
        "output_stride": output_stride,
        "norm": norm,
        "blocks": list(blocks),
        "bottleneck": bottleneck,
        "stem": stem,
        "widths": list(widths),
        "outputs": None if outputs is None else list(outputs),
        "stem_pool": stem_pool,
        "hidden": hidden,
        "out_channels": out_channels,
        "rates": None if rates is None else list(rates),
        "pool_size": pool_size,
        "per_branch": per_branch,
    }
    if compensation:  # only where it is set: descriptions of other networks stay as they were
        options["compensation"] = True
    if dropout:
        options["dropout"] = dropout
    if last_conv:
        options["last_conv"] = True
    if encoder_momentum is not None:
        options["encoder_momentum"] = encoder_momentum
    if check_in_channels(in_channels) != 3:
        options["in_channels"] = in_channels
    kind, choice = check_norm(norm), check_per_branch(per_branch)
    if compensation and choice != "head":
        raise ConfigError(
            f"model.options: compensation goes with per_branch 'head' only, not '{choice}': the convolutions it merges "
            "are those that all branches share"
        )
    encoder = ResNet(
        blocks, bottleneck=bottleneck, stem=stem, widths=widths, outputs=outputs, output_stride=output_stride,
        norm=kind, stem_pool=stem_pool, per_branch=choice, compensation=compensation,
        in_channels=in_channels,
    )  # fmt: skip
    make = partial(
        DeepLabV3, encoder.out_channels, hidden=hidden, out_channels=out_channels,
        rates=rates or RATES[output_stride], norm=kind, pool_size=pool_size, compensation=compensation,
        dropout=dropout, last_conv=last_conv,
    )  # fmt: skip
    if encoder_momentum is not None:
        _set_momentum(encoder, encoder_momentum, choice)
    decoder = make() if choice == "head" else BranchDecoder(make)
    return SegmentationModel(encoder, decoder, {"name": "deeplabv3", "options": options}, norm=kind)


def _set_momentum(encoder: ResNet, momentum: float, choice: PerBranch) -> None:
    if not 0 < momentum <= 1 or choice not in ("head", "decoder"):
        raise ConfigError(
            "model.options: encoder_momentum needs a share above 0 and up to 1, and norms that all branches share "
            "(per_branch head or decoder)"
        )
    for module in encoder.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum


def deeplabv3_resnet18(*, output_stride: int = 16, norm: str = "abn", **options: Any) -> SegmentationModel:
    """Build DeepLabV3 on ResNet-18; options as for `deeplabv3`."""
    return _variant("deeplabv3-resnet18", output_stride, norm, options, blocks=(2, 2, 2, 2), bottleneck=False)


def deeplabv3_resnet34(*, output_stride: int = 16, norm: str = "abn", **options: Any) -> SegmentationModel:
    """Build DeepLabV3 on ResNet-34; options as for `deeplabv3`."""
    return _variant("deeplabv3-resnet34", output_stride, norm, options, blocks=(3, 4, 6, 3), bottleneck=False)


def deeplabv3_resnet50(*, output_stride: int = 16, norm: str = "abn", **options: Any) -> SegmentationModel:
    """Build DeepLabV3 on ResNet-50; options as for `deeplabv3`."""
    return _variant("deeplabv3-resnet50", output_stride, norm, options, blocks=(3, 4, 6, 3))


def deeplabv3_resnet101(*, output_stride: int = 16, norm: str = "abn", **options: Any) -> SegmentationModel:
    """Build DeepLabV3 on ResNet-101 (MiB's network); options as for `deeplabv3`."""
    return _variant("deeplabv3-resnet101", output_stride, norm, options, blocks=(3, 4, 23, 3))


def deeplabv3_tiny(
    *,
    output_stride: int = 16,
    norm: str = "abn",
    widths: Sequence[int] = (16, 32, 48, 64),
    **options: Any,
) -> SegmentationModel:
    """Build a small DeepLabV3 that learns images of 64 to 128 pixels on a CPU in seconds.

    One basic block per stage, no pooling after the stem, and dilations that fit maps of 8 to 16 cells.
    Options as for `deeplabv3`.
    """
    return _variant(
        "deeplabv3-tiny", output_stride, norm, options, blocks=(1, 1, 1, 1), bottleneck=False, stem=16,
        widths=widths, stem_pool=False, hidden=48, out_channels=48, rates=(2, 4, 6), pool_size=None,
    )  # fmt: skip


def _variant(
    name: str, output_stride: int, norm: str, options: Mapping[str, Any], **defaults: Any
) -> SegmentationModel:
    model = deeplabv3(output_stride=output_stride, norm=norm, **{**defaults, **options})
    model.description["name"] = name
    return model


ARCHITECTURES: dict[str, Builder] = {
    "deeplabv3": deeplabv3,
    "deeplabv3-resnet18": deeplabv3_resnet18,
    "deeplabv3-resnet34": deeplabv3_resnet34,
    "deeplabv3-resnet50": deeplabv3_resnet50,
    "deeplabv3-resnet101": deeplabv3_resnet101,
    "deeplabv3-tiny": deeplabv3_tiny,
    "erfnet": erfnet,
    "mlp": encoders.mlp,
    "library-deeplabv3": encoders.library_deeplabv3,
    "segmenter": encoders.segmenter,
    "torchvision-deeplabv3": torchvision_deeplabv3,
    "torchvision-fcn": torchvision_fcn,
    "transformers": transformers_network,
}
"""The only builders that a checkpoint may name."""


def configured_name(architecture: str) -> str:
    """The `model.name` under which a configuration knows an architecture of ARCHITECTURES; others as they are."""
    builder = ARCHITECTURES.get(architecture)
    return next((name for name, one in encoders.DECODERS.items() if one is builder), architecture)


def build_model(
    config: ModelConfig, normalisation: Literal["imagenet", "unit"] = "imagenet", in_channels: int = 3
) -> SegmentationModel:
    """Build the model of a configuration and load its initial encoder weights.

    The weights are drawn from PyTorch's global generator: seed it first.

    Args:
        config: the `model` section.
        normalisation: how the run's images are normalised; a library's encoder may want another form.
        in_channels: channels of the run's images. Builders that take `in_channels` get other numbers than 3, and
            so do encoders of libraries whose type can have them.

    Raises:
        ConfigError: unknown name, option, or value; an output stride or norm for an architecture that has no such
            choice; or a download that was not allowed.
        CheckpointError: the initial weights are damaged or of another network.
    """
    if config.encoder is not None:
        return _on_library_encoder(config, normalisation, in_channels)
    builder = resolve("model", config.name)
    if builder in encoders.DECODERS.values():
        raise ConfigError(f"model.name: '{config.name}' needs an encoder: model.encoder={encoders.FORM}")
    options: dict[str, Any] = {
        key: value
        for key, value in (("output_stride", config.output_stride), ("norm", config.norm))
        if value is not None
    }
    if wrong := [key for key in options if not _accepts(builder, key)]:
        # null and not "leave it out": the value may come from the preset.
        given = " and ".join(f"model.{key}={options[key]}" for key in wrong)
        raise ConfigError(
            f"model.name: '{config.name}' has no such choice as {given}, given by you or by the preset; set "
            f"{' '.join(f'model.{key}=null' for key in wrong)}"
        )
    options |= config.options
    if options.get("in_channels", in_channels) != in_channels:
        raise ConfigError(
            f"model.options: in_channels is {options['in_channels']}, and the images have {in_channels} channels; "
            "leave it out"
        )
    if in_channels != 3:
        if not _accepts(builder, "in_channels"):
            raise ConfigError(
                f"model.name: '{config.name}' sees three channels, and the images have {in_channels}; choose "
                "deeplabv3, erfnet, or a builder of your own that takes in_channels"
            )
        options["in_channels"] = in_channels
    model = _call(config.name, builder, options)
    if config.name not in BUILTIN["model"]:
        if not isinstance(model, SegmentationModel):
            raise ConfigError(f"model.name: '{config.name}' must return an everseg SegmentationModel")
        model.description = {"name": config.name, "options": options}
    if config.weights is not None:
        load_encoder_weights(model, config.weights, download=config.download)
    return model


def _on_library_encoder(
    config: ModelConfig, normalisation: Literal["imagenet", "unit"], in_channels: int
) -> SegmentationModel:
    """Build a decoder on an encoder of another library, with its weights."""
    builder = encoders.DECODERS.get(config.name)
    if builder is None:
        raise ConfigError(
            f"model.encoder: '{config.name}' has an encoder of its own; encoders of other libraries go with "
            f"model.name={' or '.join(encoders.DECODERS)}"
        )
    if config.output_stride is not None:
        raise ConfigError(
            "model.output_stride: an encoder of another library has its own strides; give model.output_stride=null"
        )
    encoder, weights = encoders.describe(config, normalisation, in_channels)
    options = {key: value for key, value in config.options.items() if key not in ("config", "taps")}
    norm = {} if config.norm is None else {"norm": config.norm}
    model = _call(config.name, builder, {**norm, **options, "encoder": encoder})
    if weights is not None:
        encoders.load_body(model, weights)
    return model


def _call(name: str, builder: Builder, options: Mapping[str, Any]) -> SegmentationModel:
    """Call a builder after checking that it takes these options."""
    try:
        inspect.signature(builder).bind(**options)
        _signature(builder).bind(**options)
    except TypeError as error:
        known = ", ".join(_signature(builder).parameters)
        raise ConfigError(f"model.options: '{name}' {error}; it takes {known}") from None
    try:
        return builder(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.options: '{name}' cannot be built: {error}") from error


def _signature(builder: Builder) -> inspect.Signature:
    """The arguments a builder takes; our variants of DeepLabV3 hand theirs on."""
    signature = inspect.signature(builder)
    handed_on = builder in ARCHITECTURES.values() and _has_others(signature)
    return inspect.signature(deeplabv3) if handed_on else signature


def _accepts(builder: Builder, key: str) -> bool:
    signature = _signature(builder)
    return key in signature.parameters or _has_others(signature)


def _has_others(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def from_description(
    description: Mapping[str, Any], builder: Builder | None = None, sizes: Sizes | None = None
) -> SegmentationModel:
    """Rebuild a model from what `SegmentationModel.describe` gave, by replaying its growth.

    The weights are fresh: load the saved ones with `load_state_dict(strict=True)`.

    Args:
        description: name, options, growth, and structural changes if there were any.
        builder: the user's own builder, for a name that is not one of `ARCHITECTURES`. Nothing is ever imported
            because a description names it, and nothing is fetched.
        sizes: how much there is of its weights; a description of a larger network is refused before it takes memory.

    Raises:
        CheckpointError: unknown name, or a description that cannot be built or is larger than its weights.
    """
    try:
        name, options, growth = description["name"], description["options"], description["growth"]
    except (KeyError, TypeError):
        raise CheckpointError("model description: needs the entries name, options and growth") from None
    build = ARCHITECTURES.get(name, builder) if isinstance(name, str) else None
    if build is None:
        raise CheckpointError(
            f"model description: unknown model '{name}'; known: {', '.join(ARCHITECTURES)}. "
            "If it came from your own builder, name it again: builder=... in Python, --model FILE.py:NAME for predict"
        )
    try:
        if sizes is not None and sum(map(len, growth)) > sizes.tensors:  # each adds a classifier to a branch
            raise TooLargeError(f"it describes more growths than its {sizes.tensors} tensors")
        if sizes is not None:
            sizes.check(options)
        with no_network(), within(sizes) if sizes is not None else contextlib.nullcontext():
            model = _call(name, build, options)
            for grows in growth:
                model.grow(grows)
            for change in description.get("changes", ()):
                model.restructure(change)
    except Exception as error:  # what a file says can make a builder raise nearly anything
        raise CheckpointError(f"model description of '{name}' cannot be built: {error}") from error
    if name not in ARCHITECTURES:
        model.description = {"name": name, "options": dict(options)}
    return model
