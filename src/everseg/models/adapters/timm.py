"""Encoders of the timm library. Needs torchvision, which must fit the installed torch."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from everseg.display import counted
from everseg.errors import CheckpointError, ConfigError, near_miss, some
from everseg.models.blocks import check_in_channels
from everseg.models.pretrained import encoder_state, weight_file
from everseg.models.tensor_file import read_tensors

OWN = ("pretrained", "checkpoint", "features", "feature_cls", "out_", "cache_dir", "num_classes")
"""Beginnings of the arguments of `timm.create_model` that users cannot set: they fetch files or are set here."""
COMMON = frozenset({"output_stride", "in_chans"})
"""Arguments that timm takes for any network, whatever its class does."""
CHANNELS = "in_chans"
"""The argument that says how many channels the images have."""


def library() -> Any:
    """Import timm.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    try:
        import timm

        return timm
    except Exception as error:  # a torchvision that does not fit torch raises nearly anything
        raise ConfigError(
            "model.encoder: timm: needs the packages timm and torchvision (pip install 'everseg[timm]'), which cannot "
            f"be imported here: {error}"
        ) from error


def describe(name: str, given: Mapping[str, Any], taps: Any, *, channels: int = 3) -> dict[str, Any]:
    """Turn the name after `timm:` into a description.

    Args:
        name: an architecture ("resnet50": random weights) or one with the tag of its weights ("resnet50.a1_in1k").
        given: further arguments of `timm.create_model`.
        taps: numbers of the feature maps; None = timm's own choice, of which the last of each resolution are kept.
        channels: of the images.

    Raises:
        ConfigError: unknown name or argument.
    """
    description = {"library": "timm", "type": name.partition(".")[0], "config": dict(given), "taps": taps}
    _check(description)
    if CHANNELS in given:
        raise ConfigError(f"model.options: config: {CHANNELS} cannot be set here: the images say it")
    if channels != 3:
        description["config"][CHANNELS] = channels
    return description


def channels(description: Mapping[str, Any]) -> int:
    """Channels of the images that a described encoder takes."""
    return check_in_channels(description["config"].get(CHANNELS, 3))


def build(description: Mapping[str, Any]) -> nn.Module:
    """Build a described encoder with random weights from PyTorch's global generator; float32.

    Raises:
        ConfigError: unknown name or argument.
    """
    return _create(description, pretrained=False)


def positions(description: Mapping[str, Any], count: int) -> list[int] | None:
    """Return which of the maps are taps: all of those that the user asked for; None = everseg chooses."""
    return None if description["taps"] is None else list(range(count))


def read_maps(body: nn.Module, image: Tensor) -> list[Tensor]:
    """Run the encoder: its feature maps as (B, C, h, w), finest first."""
    # Some models give (B, h, w, C) and say so in this attribute, as an enum or as text.
    form = getattr(body, "output_fmt", "NCHW")
    channels_last = getattr(form, "value", form) == "NHWC"
    return [map.permute(0, 3, 1, 2) if channels_last else map for map in body(image)]


def unit(body: nn.Module) -> int:
    """Pixels that the sides of a trial image must be a multiple of."""
    return int(max(body.feature_info.reduction()))  # type: ignore[union-attr, operator]


def load_weights(
    description: Mapping[str, Any], name: str, weights: str | None, *, download: bool
) -> tuple[dict[str, Tensor], str]:
    """Read pretrained weights of a described encoder in timm's names; timm adapts older forms of them.

    Args:
        name: the name after `timm:`, with the tag of its weights unless `weights` is given.
        weights: a local file or `hf:org/name`; None = the file that the tag names.
        download: allow the network.

    Returns:
        The encoder's state, complete, and a sentence about it.

    Raises:
        ConfigError: no such weights, or a download that was not allowed.
        CheckpointError: damaged; of another network; not finite.
    """
    if weights is None:
        stored = _pretrained_cfg(name)
        repository = getattr(stored, "hf_hub_id", None)
        if not repository:
            raise ConfigError(
                f"model.encoder: timm names no file for 'timm:{name}'; give it as model.weights=FILE"
            )
        # "timm/" alone means the repository of the model's own name there.
        repository = f"timm/{name}" if repository == "timm/" else str(repository)
        path = weight_file(f"hf:{repository}", download, key="model.encoder")
    else:
        path = weight_file(weights, download)
    where = f"weights '{path}'"
    classifier = getattr(_pretrained_cfg(name), "classifier", None) or ()
    classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    tensors = encoder_state(read_tensors(path), str(path), tuple(f"{part}." for part in classifier))
    if "_conv_stem.weight" in tensors:
        tensors = _from_efficientnet_pytorch(tensors, _create(description, pretrained=False).state_dict())
    try:
        body = _create(description, pretrained=True, state_dict=tensors)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{where} do not fit '{description['type']}': {' '.join(str(error).split())[:500]}"
        ) from error
    state = body.state_dict()
    broken = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(f"{where} are not finite: {some(broken)}; fetch or save the file again")
    return state, f"encoder: {counted(len(state), 'tensor')} from {path}"


def _from_efficientnet_pytorch(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename the weights of the package efficientnet_pytorch, and of those that follow it, to timm's names.

    Its blocks are numbered through, timm's within their stage; norms and convolutions of a block have the numbers of
    the blocks that expand first, which the first stage's do not.

    Args:
        wanted: timm's names, in their order.
    """
    blocks = list(
        dict.fromkeys(match[0] for name in wanted if (match := re.match(r"blocks\.\d+\.\d+\.", name)))
    )
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    parts = {"_depthwise_conv": "conv_dw", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    expanding = {
        "_expand_conv": "conv_pw",
        "_project_conv": "conv_pwl",
        "_bn0": "bn1",
        "_bn1": "bn2",
        "_bn2": "bn3",
    }
    plain = {"_project_conv": "conv_pw", "_bn1": "bn1", "_bn2": "bn2"}
    renamed = {}
    for name, value in state.items():
        match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(_\w+)\.(\w+)", name)
        if match is None or match[2] == "_fc":
            continue
        number, part, leaf = match.groups()
        if number is None:
            stem, names = "", top
        else:
            stem = blocks[int(number)] if int(number) < len(blocks) else f"blocks.{number}."
            names = parts | (expanding if f"_blocks.{number}._expand_conv.weight" in state else plain)
        renamed[f"{stem}{names.get(part, part)}.{leaf}"] = value
    return renamed


def preprocessing(name: str) -> tuple[list[float], list[float]] | None:
    """Mean and deviation per channel that the tagged weights were trained with, for values in [0, 1]."""
    stored = _pretrained_cfg(name)
    mean, std = getattr(stored, "mean", None), getattr(stored, "std", None)
    return ([float(v) for v in mean], [float(v) for v in std]) if mean and std else None


def _check(description: Mapping[str, Any]) -> None:
    name, given, taps = description["type"], description["config"], description["taps"]
    timm = library()
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or not timm.is_model(name):
        raise ConfigError(
            f"model.encoder: timm has no model '{name}' (timm.list_models('*...*') in Python searches its names)"
        )
    if not isinstance(given, Mapping):
        raise ConfigError("model.options: config needs keys and values")
    refused = [str(key) for key in given if str(key).startswith(OWN)]
    if refused:
        raise ConfigError(f"model.options: config: {some(refused)} cannot be set here")
    allowed = _arguments(name)
    if unknown := [str(key)[:60] for key in given if key not in allowed]:
        hint = near_miss(unknown[0], allowed, f"; it knows {some(sorted(allowed), 40)}")
        raise ConfigError(f"model.options: config: '{name}' has no argument {some(unknown)}{hint}")
    if strange := [str(key) for key, value in given.items() if not _is_plain(value)]:
        raise ConfigError(
            f"model.options: config: {some(strange)}: expected numbers, texts, true, false, or lists of them"
        )
    if taps is not None and not (
        isinstance(taps, list) and taps and all(isinstance(tap, int) for tap in taps)
    ):
        raise ConfigError(
            f"model.options: taps needs numbers of timm's feature maps, such as [1, 2, 3], got {taps}"
        )


def _arguments(name: str) -> frozenset[str]:
    """The arguments that the networks of a model's family take: of all networks in the file that defines the model.

    timm hands unknown arguments on from function to function, and some of these functions fetch what they are given.
    """
    entry = library().model_entrypoint(name)
    networks = [
        one
        for one in vars(sys.modules[entry.__module__]).values()
        if isinstance(one, type) and issubclass(one, nn.Module)
    ]
    found = set(COMMON)
    for one in networks:
        with contextlib.suppress(ValueError, TypeError):  # of some classes Python knows no arguments
            found |= {key for key in inspect.signature(one).parameters if not key.startswith(OWN)}
    return frozenset(found)


def _is_plain(value: Any) -> bool:
    """Whether it is a number, a short text, a flag, or a list of them, as sizes and kinds of layers are."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return (
        value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) < 60)
    )


def _pretrained_cfg(name: str) -> Any:
    return library().get_pretrained_cfg(name)


def _create(description: Mapping[str, Any], *, pretrained: bool, **weights: Any) -> nn.Module:
    """Build an encoder without classifier, so that timm loads its weights strictly."""
    _check(description)
    chosen = {} if description["taps"] is None else {"out_indices": tuple(description["taps"])}
    name = description["type"]
    try:
        with _quiet():
            body = library().create_model(
                name, features_only=True, pretrained=pretrained, **chosen, **description["config"],
                pretrained_cfg_overlay={"num_classes": 0, "label_offset": 0, **weights},
            )  # fmt: skip
    except (TypeError, AssertionError, IndexError, NotImplementedError) as error:
        raise ConfigError(f"model.encoder: 'timm:{name}' cannot be built as an encoder: {error}") from error
    return body.to(torch.float32)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence timm's warnings of weights that an encoder without classifier has no place for."""
    logger = logging.getLogger("timm")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
