"""Read and write the checkpoints of MiB's original code, and those of RCIL's, whose network adds convolutions to it.

Their names: `body.` (In-place ABN's ResNet), `head.` (DeepLabV3), `cls.<step>.` (classifiers), usually after
`module.`. In-place ABN 1.0 stores no `num_batches_tracked`; version 1.1 does, and both are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from everseg.errors import CheckpointError, ConfigError, some
from everseg.interop.unwrap import tensors_of, weights_at
from everseg.models.blocks import absolute_gamma
from everseg.models.build import deeplabv3
from everseg.models.compensation import MERGE
from everseg.models.deeplab import RATES
from everseg.models.heads import Head
from everseg.models.model import SegmentationModel
from everseg.models.pretrained import convert_encoder_names, to_abn_name
from everseg.models.tensor_file import read_tensors
from everseg.types import Readout

__all__ = ["convert_encoder_names", "dump", "load", "read"]

HEAD = {
    "map_convs": "aspp",
    "map_bn": "aspp_norm",
    "map_convs_new": "aspp_new",
    "map_bn_new": "aspp_norm_new",
    "global_pooling_conv": "pool_conv",
    "global_pooling_bn": "pool_norm",
    "red_conv": "reduce",
    "pool_red_conv": "pool_reduce",
    "red_bn": "norm",
}
"""Their name of a part of the head -> ours."""
TRACKED = "num_batches_tracked"


def read(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of an original .pth file without running code from it.

    Returns:
        Their state dict, names as in the file.

    Raises:
        ConfigError: no such file.
        CheckpointError: damaged, unsafe, or not a checkpoint of MiB's code.
    """
    file = weights_at(path, "give the .pth that MiB's run.py wrote for a step")
    return tensors_of(read_tensors(file), "model_state", "MiB", f"'{path}'")


def load(
    state_dict: Mapping[str, Any],
    *,
    norm: str = "iabn",
    output_stride: int = 16,
    branch: str = "default",
    pool_size: int | None = 32,
    trained_with: str | None = None,
) -> SegmentationModel:
    """Build the model of an original checkpoint; all dimensions follow from the shapes, every key is used.

    Args:
        state_dict: their weights, with or without `module.`, or the whole checkpoint with `model_state`.
        norm: norm of the model built, "iabn" or "abn".
        output_stride: 16 or 8; the file does not contain it.
        branch: name of the branch that gets the classifiers, one growth per classifier.
        pool_size: window of the pooled branch in eval mode; None = the whole map.
        trained_with: norm of the checkpoint; default `norm`. "iabn" weights in an "abn" model become |w| + 1e-5.

    Returns:
        The model in training mode, with its own copies of the tensors, in the tensors' dtype.

    Raises:
        ConfigError: another norm, or weights of "abn" for an "iabn" model.
        CheckpointError: leftover, missing or ill-shaped entries (at most 20 are listed).
    """
    trained_with = trained_with or norm
    if norm not in ("iabn", "abn") or trained_with not in ("iabn", "abn"):
        raise ConfigError("interop.mib: MiB's networks have norm 'iabn' or 'abn'")
    if (norm, trained_with) == ("iabn", "abn"):
        raise ConfigError(
            "interop.mib: 'abn' weights may be negative, which 'iabn' cannot express; use norm='abn'"
        )
    theirs = tensors_of(state_dict, "model_state", "MiB", "state dict")
    ours, unknown = _our_names(theirs, branch)
    _stop("unexpected", unknown)
    dims, sizes = _dimensions(theirs)
    # On "meta" neither memory nor random numbers are spent; `assign=True` below puts the file's tensors in place.
    with torch.device("meta"):
        model = deeplabv3(norm=norm, output_stride=output_stride, pool_size=pool_size, **dims)
        for size in sizes:
            model.grow({branch: size})
        # RCIL's merges leave a bias in the old convolutions. How many there were changes nothing any more.
        if "body.mod2.block1.convs.conv2.bias" in theirs and "compensation" in dims:
            model.restructure(MERGE)
    own = model.state_dict()
    # In-place ABN 1.0 stores no counters. Ours begin at 0 then.
    for name in own:
        if name.endswith(TRACKED) and name not in ours:
            ours[name] = torch.zeros((), dtype=torch.int64, device=next(iter(theirs.values())).device)
    _stop("missing", [_their_name(name, branch) or name for name in own if name not in ours])
    _stop("unexpected", [_their_name(name, branch) or name for name in ours if name not in own])
    _stop(
        "ill-shaped",
        [
            f"{_their_name(name, branch)} {tuple(ours[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if ours[name].shape != own[name].shape
        ],
    )
    # The checkpoint's weights stand for gamma = |w| + 1e-5; an "abn" model takes gamma itself.
    if (norm, trained_with) == ("abn", "iabn"):
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                ours[f"{name}.weight"] = absolute_gamma(ours[f"{name}.weight"])
    model.load_state_dict({n: v.detach().clone() for n, v in ours.items()}, strict=True, assign=True)
    return model


def dump(
    model: SegmentationModel, prefix: str = "module.", *, branch: str | None = None
) -> dict[str, Tensor]:
    """Give a model's weights their original names: the inverse of `load`, without `num_batches_tracked`.

    Args:
        model: a DeepLabV3 on a ResNet.
        prefix: put before every name; the original code writes "module.".
        branch: the branch whose classifiers are written; needed if the model has several.

    Raises:
        ConfigError: the model has no such branch, weights without an original name, or computes what the original
            code cannot (ReLU norms, no pooling after the stem, other dilations).
    """
    # Names alone would hide it: a model with another activation has the same tensors.
    _check_expressible(model.description.get("options", {}))
    if branch is None:
        if len(model.branches) != 1:
            raise ConfigError(f"interop.mib: choose one of the model's branches: {list(model.branches)}")
        branch = model.branches[0]
    plain = all(growth.head == Head() for growth in model.head(branch).growths)
    if not plain or model.readout != Readout():
        raise ConfigError(
            "interop.mib: the original code has plain classifiers and the arg-max of their logits; the outputs of this "
            "model are of another method's kind"
        )
    state, strange = {}, []
    for name, value in model.state_dict().items():
        if name.endswith(TRACKED) or (name.startswith("heads.") and not name.startswith(f"heads.{branch}.")):
            continue
        new = _their_name(name, branch)
        if new is None:
            strange.append(name)
        else:
            state[prefix + new] = value.detach().clone()
    if strange:
        raise ConfigError(f"interop.mib: no original name for {some(strange)}")
    return state


def _check_expressible(options: Mapping[str, Any]) -> None:
    """Refuse models that compute something else in the original code: it has one activation, stem and dilations."""
    rates = options.get("rates")
    problems = [
        text
        for wrong, text in (
            (options.get("norm") == "bn", "norm 'bn' has ReLU, the original leaky ReLU 0.01"),
            (options.get("stem_pool") is False, "the original pools after the stem"),
            (
                rates is not None and tuple(rates) != tuple(RATES[options.get("output_stride", 16)]),
                f"dilations {rates}",
            ),
        )
        if wrong
    ]
    if problems:
        raise ConfigError(f"the original MiB code cannot express this model: {'; '.join(problems)}")


def _stop(what: str, names: list[str]) -> None:
    if names:
        raise CheckpointError(f"not a complete checkpoint of MiB's code; {what}: {some(names)}")


def _our_names(theirs: Mapping[str, Tensor], branch: str) -> tuple[dict[str, Tensor], list[str]]:
    body = {n.removeprefix("body."): v for n, v in theirs.items() if n.startswith("body.")}
    encoder, strange = convert_encoder_names(body)
    ours = {f"encoder.{name}": value for name, value in encoder.items()}
    unknown = [f"body.{name}" for name in strange]
    for name, value in theirs.items():
        root, _, rest = name.partition(".")
        part, _, leaf = rest.partition(".")
        # The head's parts have other names here; classifiers only move under their branch.
        if root == "head" and part in HEAD:
            ours[f"decoder.{HEAD[part]}.{leaf}"] = value
        elif root == "cls":
            ours[f"heads.{branch}.classifiers.{rest}"] = value
        elif root != "body":
            unknown.append(name)
    return ours, unknown


def _their_name(name: str, branch: str) -> str | None:
    root, _, rest = name.partition(".")
    if root == "encoder":
        new = to_abn_name(rest)
        return None if new is None else f"body.{new}"
    if root == "decoder":
        part, _, leaf = rest.partition(".")
        back = {ours: theirs for theirs, ours in HEAD.items()}
        return f"head.{back[part]}.{leaf}" if part in back else None
    start = f"{branch}.classifiers."
    return f"cls.{rest.removeprefix(start)}" if rest.startswith(start) else None


def _dimensions(theirs: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[int]]:
    """Infer the builder's dimensions and the classifiers' sizes from shapes."""
    needed = ["body.mod1.conv1.weight", "head.map_convs.0.weight", "head.red_conv.weight", "cls.0.weight"]
    needed += [f"body.mod{k}.block1.convs.conv{i}.weight" for k in range(2, 6) for i in (1, 2)]
    _stop("missing", [name for name in needed if name not in theirs])
    bottleneck = "body.mod2.block1.convs.conv3.weight" in theirs
    last = "conv3" if bottleneck else "conv2"  # the convolution that gives a block's output
    blocks, widths, outputs = [], [], []
    for k in range(2, 6):  # mod2 to mod5 are the four stages; mod1 is the stem
        numbers = {int(m[1]) for name in theirs if (m := re.match(rf"body\.mod{k}\.block(\d+)\.", name))}
        blocks.append(max(numbers))
        first = f"body.mod{k}.block1.convs"
        _stop("missing", [n for n in [f"{first}.{last}.weight"] if n not in theirs])
        widths.append(theirs[f"{first}.conv1.weight"].shape[0])
        outputs.append(theirs[f"{first}.{last}.weight"].shape[0])
    steps = sorted(int(m[1]) for name in theirs if (m := re.fullmatch(r"cls\.(\d+)\.weight", name)))
    # As many classifiers as steps, numbered without a gap.
    _stop("missing", [f"cls.{s}.weight" for s in range(len(steps)) if s not in steps])
    dims = {
        "blocks": blocks,
        "bottleneck": bottleneck,
        "stem": theirs["body.mod1.conv1.weight"].shape[0],
        "widths": widths,
        "outputs": outputs,
        "hidden": theirs["head.map_convs.0.weight"].shape[0],
        "out_channels": theirs["head.red_conv.weight"].shape[0],
    }
    if "head.map_bn_new.weight" in theirs:
        dims["compensation"] = True
    return dims, [cast(int, theirs[f"cls.{s}.weight"].shape[0]) for s in steps]
