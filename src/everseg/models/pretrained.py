"""Initial encoder weights from local files or the Hugging Face hub, whatever their names."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everseg.display import counted
from everseg.errors import CheckpointError, ConfigError, some
from everseg.models import erfnet
from everseg.models.blocks import (
    NORM_EPS,
    AbsBatchNorm,
    BranchDict,
    SyncAbsBatchNorm,
    absolute_gamma,
    is_norm,
)
from everseg.models.compensation import new_beside_old
from everseg.models.model import SegmentationModel
from everseg.models.tensor_file import read_tensors

log = logging.getLogger("everseg")

CLASSIFIER = ("fc.", "classifier.", "head.", "last_linear.")
"""Beginnings of the names that belong to the image classifier, which is dropped."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of a hub repository's weights, the better one first."""
WRAPPERS = ("model_state", "state_dict", "model")
ERFNET_DOWN = ({"conv": "conv"}, {"bn": "norm"}, {"bn_ini": "norm"})
"""Names in the original ERFNet -> ours of what a change of resolution has: shared; plain norms; owned by domains."""
ERFNET_BLOCK = (
    {
        "conv3x1_1": "vertical1",
        "conv1x3_1": "horizontal1",
        "conv3x1_2": "vertical2",
        "conv1x3_2": "horizontal2",
    },
    {"bn1": "norm1", "bn2": "norm2"},
    {"parallel_conv_1": "adapter1", "bns_1": "norm1", "parallel_conv_2": "adapter2", "bns_2": "norm2"},
)
"""The same for a block."""
_ABN_BLOCK = re.compile(
    r"mod([2-5])\.block([1-9]\d*)\.(convs\.(conv|bn)([123](?:_new)?)|proj_(conv|bn))\.(\w+)"
)
_ABN_STEM = re.compile(r"mod1\.(conv1|bn1)\.(\w+)")
_OUR_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.(?:(conv|bn)([123](?:_new)?)|downsample\.([01]))\.(\w+)")


def load_encoder_weights(model: SegmentationModel, spec: str, download: bool = False) -> str:
    """Fill the encoder from a file in torchvision, timm, In-place ABN or ERFNet names; the classifier is dropped.

    Args:
        model: a model, not grown yet, whose encoder is our ResNet or ERFNet or named as torchvision's ResNet.
        spec: a local .safetensors, .pth, .pt or .tar file, or `hf:org/name[@revision]`.
        download: allow `hf:` to use the network; a file that is in the cache already needs no permission.

    In-place ABN files hold weights w that mean gamma = |w| + 1e-5. Loaded into a "bn" or "abn" model, that gamma is
    written; loaded into an "iabn" model, w itself. Torchvision and timm files hold gamma; an "iabn" model gets
    w = gamma - 1e-5, which is impossible for negative gamma.

    A model of N channels takes the first convolution of a file for RGB: channel i gets the filter of red, green or
    blue, i mod 3, times 3 / N, so that the response keeps its size; a single channel gets the sum of the three. It is
    timm's rule (R. Wightman, `adapt_input_conv`, Apache 2.0).

    With `compensation`, the new convolutions start as copies of the old ones, unless the file holds them.

    Where each branch has norms of its own, the branches of the model's first growth start from the file's norms.
    MDIL's ERFNet ("adapter") takes the 110 tensors of the shared convolutions only, as the authors' code does; the
    file may have no norms then.

    Returns:
        One sentence saying what was loaded.

    Raises:
        ConfigError: the file does not exist, or a download that was not allowed.
        CheckpointError: damaged or unsafe file; names or shapes that do not fit, or values that are not finite
            (all listed, at most 20 lines).
    """
    path = weight_file(spec, download)
    # Files know one network without branches. So they are loaded, strictly, into a copy of the encoder that has no
    # parts per branch, and the model takes over from there what its branches share.
    state = encoder_state(read_tensors(path), str(spec))
    plain = _without_branches(model.encoder)
    from_abn = any(name.startswith("mod1.") for name in state)
    unknown: list[str] = []
    if from_abn:
        state, unknown = convert_encoder_names(state)
    elif isinstance(plain, erfnet.Encoder):
        state, unknown = _convert_erfnet_names(state, plain)
    state = new_beside_old(state, list(plain.state_dict()))
    _spread_channels(plain, state)
    # The copy has norms that the model will not take from it, and the file need not have them: fill them with the
    # copy's own, so that the strict check below asks for the shared weights only.
    if getattr(model.encoder, "fresh_norms", False):
        used = model.encoder.state_dict()
        state = {name: value for name, value in plain.state_dict().items() if name not in used} | state
    where = f"weights '{spec}'"
    _check_names(plain, state, unknown, where)
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(f"{where} are not finite: {some(broken)}; fetch or save the file again")
    note = _convert_gammas(plain, state, from_abn, where)
    # Older files lack this counter; a batch norm with a momentum does not use it.
    for name, value in plain.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros_like(value))
    plain.load_state_dict(state, strict=True)
    count = _adopt(model.encoder, plain)
    sentence = f"encoder: {counted(count, 'tensor')} from {spec}{note}"
    log.info(sentence)
    return sentence


def _spread_channels(plain: nn.Module, state: dict[str, Tensor]) -> None:
    """Fit the RGB filters of the first convolution to the model's number of channels, as the docstring above says."""
    first = next((name for name, module in plain.named_modules() if isinstance(module, nn.Conv2d)), "")
    name = f"{first}.weight"
    wanted, given = plain.state_dict().get(name), state.get(name)
    if wanted is None or given is None or given.ndim != 4 or given.shape[1] != 3:
        return
    state[name] = spread_channels(given, wanted.shape[1])


def spread_channels(filters: Tensor, count: int) -> Tensor:
    """Make filters (out, count, h, w) for images of `count` channels of those for RGB; see `load_encoder_weights`."""
    if count == 3:
        return filters
    if count == 1:
        return filters.sum(1, keepdim=True)
    return filters[:, [channel % 3 for channel in range(count)]] * (3 / count)


def weight_file(spec: str, download: bool, key: str = "model.weights") -> Path:
    """Return the file that a path or `hf:org/name[@revision]` stands for.

    A name without a folder that is not in the working folder is looked for in `shared_folder`.

    Raises:
        ConfigError: a download that failed or was not allowed.
    """
    if not spec.startswith("hf:"):
        path, shared = Path(spec).expanduser(), shared_folder()
        elsewhere = shared / path if shared and path.name == spec and not path.exists() else path
        return elsewhere if elsewhere.is_file() else path
    found = fetch(spec[3:], WEIGHT_FILES, download=download, key=key)
    assert found is not None
    return found


def _without_branches(encoder: nn.Module) -> nn.Module:
    """Copy an encoder that has not grown, as a file knows it: one norm where each branch would get its own."""
    plain = copy.deepcopy(encoder)
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BranchDict) and child.makes_norms():
                setattr(parent, name, child.make())
    return plain


def _adopt(encoder: nn.Module, plain: nn.Module) -> int:
    """Take over the weights of `_without_branches`'s copy; return how many tensors were used."""
    loaded = plain.state_dict()
    used = {name: loaded[name] for name in encoder.state_dict()}
    encoder.load_state_dict(used, strict=True)
    count = len(used)
    for name, owner in encoder.named_modules():
        norm = None if getattr(encoder, "fresh_norms", False) else plain.get_submodule(name)
        # Branches do not exist before the model grows: their `BranchDict` keeps the norm for the first ones.
        if isinstance(owner, BranchDict) and norm is not None and is_norm(norm):
            owner.pretrained = norm.state_dict()
            count += len(owner.pretrained)
    return count


def encoder_state(
    loaded: Mapping[str, Any], where: str, classifier: tuple[str, ...] = CLASSIFIER
) -> dict[str, Tensor]:
    """Unwrap a checkpoint's weights, strip `module.`, and drop the classifier, by the beginnings of its names.

    Raises:
        CheckpointError: something else than tensors among the weights.
    """
    for key in WRAPPERS:
        if isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    state = {str(name).removeprefix("module."): value for name, value in loaded.items()}
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"weights '{where}': not a tensor: {', '.join(others[:20])}")
    return {name: value for name, value in state.items() if not name.startswith(classifier)}


def convert_encoder_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename In-place ABN's ResNet weights (`mod2.block1.convs.conv1.weight`) to torchvision's.

    Returns:
        The renamed tensors (the same objects), and the names that fit no pattern.
    """
    renamed, unknown = {}, []
    for name, value in state.items():
        new = _from_abn(name)
        if new is None:
            unknown.append(name)
        else:
            renamed[new] = value
    return renamed, unknown


def erfnet_modules(blocks: Sequence[int], branches: Sequence[str] | None = None) -> dict[str, str]:
    """Name the modules of ERFNet's encoder in the original projects and here.

    Args:
        blocks: blocks of its second and third stage.
        branches: our branches in the order of MDIL's domains, which number them; None = the plain ERFNet.

    Returns:
        Their name -> ours, without `encoder.`, of everything that has weights.
    """
    stages = ["down1", "down2", *(f"blocks2.{i}" for i in range(blocks[0]))]
    stages += ["down3", *(f"blocks3.{i}" for i in range(blocks[1]))]
    names: dict[str, str] = {}
    for index, stage in enumerate(stages):
        layer = f"layers.{index - 1}" if index else "initial_block"
        shared, plain, owned = ERFNET_DOWN if stage.startswith("down") else ERFNET_BLOCK
        names |= {f"{layer}.{theirs}": f"{stage}.{ours}" for theirs, ours in shared.items()}
        if branches is None:
            names |= {f"{layer}.{theirs}": f"{stage}.{ours}" for theirs, ours in plain.items()}
        for number, branch in enumerate(branches or ()):
            names |= {f"{layer}.{t}.{number}": f"{stage}.{o}.{branch}" for t, o in owned.items()}
    return names


def _convert_erfnet_names(
    state: Mapping[str, Tensor], encoder: erfnet.Encoder
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the plain ERFNet encoder's weights (`features.encoder.initial_block.conv.weight`) to ours; keep ours."""
    modules = erfnet_modules((len(encoder.blocks2), len(encoder.blocks3)))
    modules |= {ours: ours for ours in modules.values()}  # files that everseg wrote keep their names
    renamed, unknown = {}, []
    for name, value in state.items():
        module, _, leaf = name.removeprefix("features.").removeprefix("encoder.").rpartition(".")
        if module in modules:
            renamed[f"{modules[module]}.{leaf}"] = value
        elif module != "output_conv":  # the classifier of the encoder's own training
            unknown.append(name)
    return renamed, unknown


def _from_abn(name: str) -> str | None:
    if stem := _ABN_STEM.fullmatch(name):
        return f"{stem[1]}.{stem[2]}"
    if block := _ABN_BLOCK.fullmatch(name):
        # Their stages begin at mod2 and their blocks at 1; torchvision's begin at layer1 and at 0.
        part = f"{block[4]}{block[5]}" if block[4] else f"downsample.{int(block[6] == 'bn')}"
        return f"layer{int(block[1]) - 1}.{int(block[2]) - 1}.{part}.{block[7]}"
    return None


def to_abn_name(name: str) -> str | None:
    """Rename one of our encoder's weights to In-place ABN's name; None if there is no such name."""
    if block := _OUR_BLOCK.fullmatch(name):
        part = f"convs.{block[3]}{block[4]}" if block[3] else f"proj_{('conv', 'bn')[int(block[5])]}"
        return f"mod{int(block[1]) + 1}.block{int(block[2]) + 1}.{part}.{block[6]}"
    return f"mod1.{name}" if re.fullmatch(r"(conv1|bn1)\.\w+", name) else None


def _check_names(encoder: nn.Module, state: Mapping[str, Tensor], unknown: list[str], where: str) -> None:
    own = {n: v for n, v in encoder.state_dict().items() if not n.endswith("num_batches_tracked")}
    given = {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}
    lines = [f"missing: {name}" for name in own if name not in given]
    lines += [f"unexpected: {name}" for name in [*unknown, *(n for n in given if n not in own)]]
    lines += [
        f"{name}: {tuple(given[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if lines:
        raise CheckpointError(f"{where} do not fit this encoder:\n  " + some(lines, 19, "\n  "))


def _convert_gammas(encoder: nn.Module, state: dict[str, Tensor], from_abn: bool, where: str) -> str:
    """Bring the norm weights into the model's meaning; return a remark about it."""
    norms = {n: m for n, m in encoder.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    absolute = {n for n, m in norms.items() if isinstance(m, AbsBatchNorm | SyncAbsBatchNorm)}
    if from_abn:
        for name in norms.keys() - absolute:
            state[f"{name}.weight"] = absolute_gamma(state[f"{name}.weight"])
        return (
            " (In-place ABN names)" if absolute else " (In-place ABN names; gamma = |weight| + 1e-5 applied)"
        )
    negative = sum(int((state[f"{name}.weight"] < 0).sum()) for name in absolute)
    if negative:
        raise CheckpointError(
            f"{where}: {counted(negative, 'norm weight', 'is', 'are')} negative, which norm 'iabn' cannot express; "
            "use model.norm=abn"
        )
    for name in absolute:
        # A gamma below 1e-5 becomes w = 0, the smallest that |w| + 1e-5 can express.
        state[f"{name}.weight"] = (state[f"{name}.weight"] - NORM_EPS).clamp(min=0)
    return " (weight = gamma - 1e-5 for norm 'iabn')" if absolute else ""


def shared_folder() -> Path | None:
    """Return the folder of weights that a team shares, `$EVERSEG_WEIGHTS` (`everseg.interop.weights`); None = none."""
    named = os.environ.get("EVERSEG_WEIGHTS")
    return Path(named).expanduser() if named else None


def cached(spec: str, names: Sequence[str]) -> Path | None:
    """Return the first of some files of a repository that is in the hub's cache; None = none."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = spec.partition("@")
    found = (try_to_load_from_cache(repo, name, revision=revision or None) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def fetch(spec: str, names: Sequence[str], *, download: bool, key: str, needed: bool = True) -> Path | None:
    """Find the first of some files of a repository in the shared folder or the hub's cache, or download it if allowed.

    The shared folder either has all of a repository that is needed or counts as not having it: parts of two revisions
    must not meet.

    Args:
        spec: "org/name" or "org/name@revision".
        names: files, the best first.
        download: allow the network; a file that is in the cache already needs no permission.
        key: setting that named the repository, for messages.
        needed: a missing file is an error; else the answer is None.

    Raises:
        ConfigError: another form of name, no such file, or a download that was not allowed.
    """
    repo, _, revision = spec.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConfigError(f"{key}: 'hf:{spec}' is not of the form hf:org/name[@revision]")
    shared = shared_folder()
    if shared is not None and any((shared / spec / name).is_file() for name in WEIGHT_FILES):
        if found := next((shared / spec / name for name in names if (shared / spec / name).is_file()), None):
            return found
        if not needed:
            return None
        raise ConfigError(f"{key}: folder '{shared / spec}' (EVERSEG_WEIGHTS) has no {' or '.join(names)}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    # A missing file is no failure yet: the next name may exist. A network error is one at once.
    problem: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repo, name, revision=revision or None, local_files_only=not download))
        except (EntryNotFoundError, LocalEntryNotFoundError) as error:
            problem = error
        except (HfHubHTTPError, OSError) as error:
            raise ConfigError(f"{key}: 'hf:{spec}' could not be downloaded: {error}") from error
    if not needed:
        return None
    if download:
        raise ConfigError(f"{key}: 'hf:{spec}' could not be downloaded: {problem}")
    raise ConfigError(
        f"{key}: 'hf:{spec}' is not on this machine; allow the download with model.download=true, or put it into the "
        "folder EVERSEG_WEIGHTS (everseg weights)"
    )
