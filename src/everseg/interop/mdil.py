"""Read and write the checkpoints of MDIL's original code.

Their names: `encoder.initial_block`, `encoder.layers.<i>` and `decoder.<domain>`, usually after `module.`; what a
domain owns in the encoder ends in its number: `bn_ini.<t>`, `bns_1.<t>`, `parallel_conv_1.<t>`. The ImageNet-pretrained
encoder from which the first domain starts is a plain ERFNet's, after `module.features.`: norms `bn`, `bn1`, `bn2`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everseg.display import counted
from everseg.errors import CheckpointError, ConfigError, some
from everseg.interop.unwrap import tensors_of, weights_at
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel
from everseg.models.pretrained import (
    ERFNET_BLOCK,
    ERFNET_DOWN,
    erfnet_modules,
    load_encoder_weights,
)
from everseg.models.tensor_file import read_tensors

__all__ = ["dump", "dump_encoder", "is_encoder", "load", "load_encoder", "names", "read"]

DECODER = ("up2", "blocks2.0", "blocks2.1", "up1", "blocks1.0", "blocks1.1")
"""Our names of the `layers` of a domain's decoder."""


def names(branches: Sequence[str], blocks: Sequence[int] = (5, 8)) -> dict[str, str]:
    """Name the modules of the whole network in the original code and here.

    Args:
        branches: our branches in the order of the domains.
        blocks: blocks of the encoder's second and third stage.

    Returns:
        Their name (without `module.`) -> ours, of everything that has weights or statistics.
    """
    table = {f"encoder.{t}": f"encoder.{o}" for t, o in erfnet_modules(blocks, branches).items()}
    for number, branch in enumerate(branches):
        for layer, ours in enumerate(DECODER):
            # A doubling has the names of a halving there: `conv` and `bn`. "paths" is part of our tensors' names.
            shared, plain, _ = ERFNET_DOWN if ours.startswith("up") else ERFNET_BLOCK
            for part, own in {**shared, **plain}.items():
                table[f"decoder.{number}.layers.{layer}.{part}"] = f"decoder.paths.{branch}.{ours}.{own}"
        table[f"decoder.{number}.output_conv"] = f"heads.{branch}.classifiers.0"
    return table


def read(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of an original checkpoint without running code from it.

    Returns:
        Their state dict, without `module.`.

    Raises:
        ConfigError: no such file.
        CheckpointError: damaged, unsafe, or without weights.
    """
    file = weights_at(path, "give the .pth.tar that MDIL's training scripts wrote for a step")
    return tensors_of(read_tensors(file), "state_dict", "MDIL", f"'{path}'")


def load(
    state_dict: Mapping[str, Any],
    *,
    domains: Sequence[str] = (),
    dropout: Sequence[float] = (0.03, 0.3),
) -> SegmentationModel:
    """Build the model of an original checkpoint; domains, classes and sizes follow from its names and shapes.

    Args:
        state_dict: their weights, with or without `module.`, or the whole checkpoint with `state_dict`.
        domains: names of the branches in the order they were learnt; default domain1, domain2, ...
        dropout: of the encoder; the file does not contain it.

    Returns:
        The model in training mode, with its own copies of the tensors, in the tensors' dtype.

    Raises:
        ConfigError: another number of names than the checkpoint has domains.
        CheckpointError: leftover, missing or ill-shaped entries (at most 20 are listed).
    """
    theirs = tensors_of(state_dict, "state_dict", "MDIL", "state dict")
    options, classes = _dimensions(theirs)
    branches = tuple(domains) or tuple(f"domain{number}" for number in range(1, len(classes) + 1))
    if len(set(branches)) != len(classes) or len(branches) != len(classes):
        raise ConfigError(
            f"--domains: the checkpoint has {counted(len(classes), 'domain')}; give as many different names, "
            f"not {', '.join(branches)}"
        )
    # On "meta" neither memory nor random numbers are spent; `assign=True` below puts the file's tensors in place.
    with torch.device("meta"):
        model = _built(dropout=dropout, **options)
        for branch, number in zip(branches, classes, strict=True):
            model.grow({branch: number})
    table, own = names(branches, options["blocks"]), model.state_dict()
    ours = {_renamed(name, table): value for name, value in theirs.items()}
    back = {new: old for old, new in table.items()}
    _stop("unexpected", [name for name in theirs if _renamed(name, table) not in own])
    _stop("missing", [str(_renamed(name, back)) for name in own if name not in ours])
    _stop(
        "ill-shaped",
        [
            f"{_renamed(name, back)} {tuple(ours[name].shape)} instead of {tuple(value.shape)}"
            for name, value in own.items()
            if ours[name].shape != value.shape
        ],
    )
    model.load_state_dict({n: ours[n].detach().clone() for n in own}, strict=True, assign=True)
    return model


def dump(model: SegmentationModel, prefix: str = "module.") -> dict[str, Tensor]:
    """Give a model's weights their original names: the inverse of `load`.

    Args:
        model: an ERFNet with adapters per branch; its branches become the domains in their order.
        prefix: put before every name; the original code writes "module.".

    Raises:
        ConfigError: the original code cannot express the model: another architecture, what its branches own, or a
            branch whose classes were taught in several steps.
    """
    options = model.description.get("options", {})
    if model.description.get("name") != "erfnet" or options.get("per_branch") != "adapter":
        raise ConfigError("the original MDIL code has one network: erfnet with per_branch 'adapter'")
    # There a domain has one classifier; a branch that grew has several.
    grown = [branch for branch in model.branches if len(model.head(branch).sizes) != 1]
    if grown or not model.branches:
        what = (
            f"branch '{grown[0]}' learnt its classes in several steps"
            if grown
            else "the model has no outputs"
        )
        raise ConfigError(f"the original MDIL code cannot express this model: {what}")
    back = {new: old for old, new in names(model.branches, options["blocks"]).items()}
    return {f"{prefix}{_renamed(n, back)}": v.detach().clone() for n, v in model.state_dict().items()}


def is_encoder(state_dict: Mapping[str, Any]) -> bool:
    """Whether weights, as `read` gives them, are those of the ImageNet-pretrained encoder alone."""
    return any(name.startswith("features.encoder.") for name in state_dict)


def load_encoder(path: str | Path) -> dict[str, Tensor]:
    """Read the ImageNet-pretrained encoder in our names, checked whole: what `model.weights` takes.

    Returns:
        Names without `encoder.`, float32: convolutions and norms, or the convolutions alone if the file has no norms
        (255 and 110 tensors in ERFNet's published size). Classifiers are dropped.

    Raises:
        ConfigError: no such file.
        CheckpointError: damaged, unsafe, or not such an encoder: leftover, missing or ill-shaped entries.
    """
    theirs = {name.removeprefix("features."): value for name, value in read(path).items()}
    # A model with plain norms asks the file for them; one with adapters takes the shared convolutions only.
    has_norms = any(re.search(r"\.bn[12]?\.", name) for name in theirs)
    try:
        model = _built(per_branch="decoder" if has_norms else "adapter", **_encoder_options(theirs))
    except CheckpointError as error:
        raise CheckpointError(f"'{path}': {error}") from None
    load_encoder_weights(model, str(path))
    return model.encoder.state_dict()


def dump_encoder(
    model: SegmentationModel, branch: str | None = None, prefix: str = "module.features."
) -> dict[str, Tensor]:
    """Give a model's encoder the names of the ImageNet-pretrained one: the inverse of `load_encoder`.

    Args:
        model: an ERFNet.
        branch: the branch whose norms are written, where each branch has its own; None: the shared convolutions
            alone. Adapters have no name in that file and are left out.
        prefix: put before every name; the original file has "module.features.".

    Raises:
        ConfigError: another architecture.
    """
    if model.description.get("name") != "erfnet":
        raise ConfigError(
            "the ImageNet-pretrained encoder of MDIL's code belongs to ERFNet; this model has another encoder"
        )
    table = erfnet_modules(model.description["options"]["blocks"])
    back = {ours: f"encoder.{theirs}" for theirs, ours in table.items()}
    # A branch's own norms get the names of the plain ones. What is in no table (adapters, other branches) is dropped.
    if branch is not None:
        back |= {f"{ours}.{branch}": theirs for ours, theirs in back.items()}
    renamed = {_renamed(name, back): value for name, value in model.encoder.state_dict().items()}
    return {f"{prefix}{name}": value.detach().clone() for name, value in renamed.items() if name is not None}


def _built(**options: Any) -> SegmentationModel:
    """Build a network of the dimensions inferred from a file; an impossible one means that the file is incomplete."""
    try:
        return erfnet(**options)
    except ConfigError as error:
        raise CheckpointError(f"not a complete checkpoint of MDIL's code; {error}") from None


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    """Translate the name of a tensor by its module's; None if it is unknown."""
    module, _, leaf = name.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else None


def _stop(what: str, found: list[str]) -> None:
    if found:
        raise CheckpointError(f"not a complete checkpoint of MDIL's code; {what}: {some(found)}")


def _dimensions(theirs: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[int]]:
    """Infer the builder's dimensions and each domain's number of classes."""
    domains = _numbers(theirs, r"decoder\.(\d{1,4})\.output_conv\.weight")
    heads = [f"decoder.{number}.output_conv.weight" for number in range(max(len(domains), 1))]
    _stop("missing", [name for name in heads if name not in theirs])
    _stop("ill-shaped", [name for name in heads if theirs[name].ndim != 4 or theirs[name].shape[1] < 1])
    return _encoder_options(theirs), [theirs[name].shape[1] for name in heads]


def _encoder_options(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the encoder's dimensions from its names and shapes."""
    # `layers` are numbered through: 0 changes the resolution, then come the blocks of the second stage, then the last
    # change of resolution (the highest number with `conv`), then the blocks of the third stage.
    last = max(_numbers(theirs, r"encoder\.layers\.(\d{1,4})\.(?:conv|bn|bn_ini)\..*"), default=1)
    blocks = _numbers(theirs, r"encoder\.layers\.(\d{1,4})\.conv3x1_1\..*")
    convs = [f"encoder.{part}.conv.weight" for part in ("initial_block", "layers.0", f"layers.{last}")]
    _stop("missing", [name for name in convs if name not in theirs])
    _stop("ill-shaped", [name for name in convs if theirs[name].ndim != 4 or not theirs[name].numel()])
    return {
        # A change of resolution joins its pooled input to its convolution's output: out + in channels.
        "widths": [sum(theirs[name].shape[:2]) for name in convs],
        "blocks": [last - 1, max(blocks, default=last) - last],
    }


def _numbers(theirs: Mapping[str, Tensor], pattern: str) -> list[int]:
    return [int(found[1]) for name in theirs if (found := re.fullmatch(pattern, name))]
