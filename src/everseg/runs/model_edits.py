"""Changes of a finished model that need no training: norms for each branch, and a branch that begins as a copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from everseg.errors import CheckpointError, ConfigError
from everseg.labels import spelling
from everseg.models.blocks import BranchDict
from everseg.models.build import from_description
from everseg.models.model import SegmentationModel
from everseg.models.stored import Sizes
from everseg.runs.model_folder import ModelFile, Registry


def check_branch_name(name: str) -> None:
    """Stop unless a new branch may have this name.

    Raises:
        ConfigError: it has a dot, or is a word that a module of PyTorch uses.
    """
    BranchDict(nn.Identity).check(name)


def own_norms(architecture: Mapping[str, Any], sizes: Sizes) -> dict[str, Any] | None:
    """Describe a network with norms and a decoder for each branch, where it now has such that all branches share.

    Args:
        architecture: a description, which may come from somebody else.
        sizes: how much there is of its weights.

    Returns:
        The changed description; None where the network has norms of its own already, cannot have any, is the user's
        own, or is larger than its weights (who loads it is told).
    """
    options = architecture["options"]
    if options.get("per_branch") not in ("head", "decoder") or architecture.get("changes"):
        return None
    changed = {**architecture, "options": {**options, "per_branch": "norm"}}
    # No part is there more often than there are branches, and each branch has a tensor at least.
    number = min(len({branch for grows in architecture["growth"] for branch in grows}), sizes.tensors)
    try:
        with torch.random.fork_rng(devices=[]):
            from_description(changed, sizes=Sizes(number * sizes.tensors, number * sizes.elements))
    except CheckpointError:  # no norms are found in it, or an option excludes them
        return None
    return changed


@torch.no_grad()
def with_own_norms(model: SegmentationModel, architecture: Mapping[str, Any]) -> SegmentationModel:
    """Build the network of `own_norms` with the weights of a model. Each branch gives bit-equal outputs.

    Args:
        model: the model whose branches share norms.
        architecture: the result of `own_norms`.

    Returns:
        A model in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        changed = from_description(architecture)
    owners = [
        f"{part}.{name}" if name else part
        for part in ("encoder", "decoder")
        for name, module in getattr(changed, part).named_modules()
        if isinstance(module, BranchDict)
    ]
    state = model.state_dict()
    changed.load_state_dict({name: state[_shared(name, owners, state)] for name in changed.state_dict()})
    changed.readout, changed.domain_statistics = model.readout, model.domain_statistics
    return changed.eval()


def _shared(name: str, owners: Iterable[str], known: Mapping[str, Any]) -> str:
    """Name of the weight that all branches shared, from that of a branch's own."""
    if name in known:
        return name
    owner = next(one for one in owners if name.startswith(f"{one}."))
    _, rest = name.removeprefix(f"{owner}.").split(".", 1)
    return f"{owner.removesuffix('.paths')}.{rest}"


@torch.no_grad()
def with_branch(model: SegmentationModel, about: ModelFile, name: str, like: str) -> ModelFile:
    """Give a model a further branch that is equal to another one in every weight, statistic and class.

    The copy has the same growths as its origin. So its logits are bit-equal, and a later step finds old classes in it.

    Args:
        model: gets the branch; in eval mode.
        about: the content of its folder's file.
        name: the new branch, and the name under which its images are known.
        like: the branch that is copied.

    Returns:
        The content of the file of the changed model.

    Raises:
        ConfigError: the name is known or not usable, or the model's structure was changed after its growth.
    """
    if model.changes:
        raise ConfigError(
            f"branch '{name}': the network was changed after its training ({', '.join(model.changes)}), so it takes no "
            f"further branch; let the images take the branch '{like}' (--shared)"
        )
    # The weights that are drawn are all overwritten; the caller's random numbers stay as they are.
    with torch.random.fork_rng(devices=[]):
        for number, growth in enumerate(list(model.head(like).growths)):
            model.grow({name: growth.to_json()}, init_from=None if number else like)
    for owner in model.modules():
        if isinstance(owner, BranchDict) and name in owner:
            owner[name].load_state_dict(owner[like].state_dict(), strict=True)
    model.eval()
    space = about.spaces[like]
    return replace(
        about,
        architecture=model.describe(),
        spaces={**about.spaces, name: space},
        domains={**(about.domains or {branch: branch for branch in about.spaces}), name: name},
        registry=None if about.registry is None else _also_in(about.registry, space.names, name),
    )


def _also_in(registry: Registry, names: Iterable[str], branch: str) -> Registry:
    """Enter a branch at the classes of these names."""
    known = {spelling(name) for name in names}
    return replace(
        registry,
        classes=tuple(
            replace(one, branches=(*one.branches, branch)) if spelling(one.name) in known else one
            for one in registry.classes
        ),
    )
