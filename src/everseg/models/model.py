"""The segmentation model: an encoder, a decoder, and growing classifiers per branch."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.models.blocks import NORM_TYPES, BranchDict, Classifier, GrowingHead, MakeClassifier
from everseg.types import SegOutput, Tap, Taps


@dataclass(frozen=True)
class Frozen:
    """The arguments of the last `SegmentationModel.freeze`."""

    branches: tuple[str, ...] = ()
    encoder: bool = False
    norm: bool = False
    statistics: bool = True
    decoder: bool = False
    heads: Mapping[str, int] = field(default_factory=dict)


class SegmentationModel(nn.Module):
    """A network that learns further classes and further branches.

    A branch owns its entries in all `BranchDict`s of encoder and decoder, and its classifiers. Everything else is
    shared by all branches.

    Args:
        encoder: maps an image to a dict of feature maps, finest first. With `by_branch = True` it is called with the
            branches as well and returns such a dict for each; it runs once what the branches have in common.
        decoder: maps that dict, with the last map also under "encoder", to one map; has `out_channels`. With
            `by_branch = True` it is called with the branch as well.
        description: {"name": ..., "options": {...}}, the builder's name and *all* its arguments, ready for JSON.
        make_classifier: layer of a branch's classifiers, as for `GrowingHead`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        description: Mapping[str, Any] | None = None,
        *,
        make_classifier: MakeClassifier | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.heads = BranchDict(partial(GrowingHead, cast(int, decoder.out_channels), make_classifier))
        self.description: dict[str, Any] = dict(description or {"name": None, "options": {}})
        self.growth: list[dict[str, int]] = []
        self.changes: list[str] = []
        self.frozen = Frozen()

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches in the order they were met."""
        return tuple(self.heads)

    @property
    def parameter_count(self) -> int:
        """Number of weights, frozen ones included."""
        return sum(p.numel() for p in self.parameters())

    def head(self, branch: str) -> GrowingHead:
        """The classifiers of a branch.

        Raises:
            ConfigError: unknown branch.
        """
        self._check_branches([branch])
        return cast(GrowingHead, self.heads[branch])

    def grow(self, grows: Mapping[str, int], init_from: str | None = None) -> None:
        """Add outputs: a new branch gets modules of its own and a head, a known branch's head grows, 0 does nothing.

        Weights are drawn on the CPU whatever the model's device, so a seed gives the same ones everywhere.

        Args:
            grows: branch -> number of classes it gains.
            init_from: branch whose modules in encoder and decoder a *new* branch copies, as each `BranchDict` says;
                its classifiers always start afresh.

        Raises:
            ConfigError: negative number, bad branch name, unknown `init_from`; the model is unchanged then.
        """
        grows = {branch: int(n) for branch, n in grows.items() if n != 0}
        if init_from is not None:
            self._check_branches([init_from])
        owners = [
            m for part in (self.encoder, self.decoder) for m in part.modules() if isinstance(m, BranchDict)
        ]
        # Everything that can fail is tried before anything is added: a model must not stay half grown.
        for branch, n in grows.items():
            if n < 0:
                raise ConfigError(f"branch '{branch}': cannot grow by {n} classes")
            for owner in [*owners, self.heads] if branch not in self.heads else ():
                owner.check(branch)
        like = next(self.parameters(), None)
        for branch, n in grows.items():
            # The order of drawing random weights (encoder's owners, decoder's, head) is part of every run's numbers.
            added = []
            if branch not in self.heads:
                added = [owner.add(branch, init_from) for owner in owners]
                self.heads.add(branch)
            self.head(branch).grow(n)
            for module in [*added, self.heads[branch]]:
                if like is not None:
                    module.to(like.device, like.dtype)
        self.train(self.training)  # new modules are in training mode; frozen ones go back to eval mode
        if grows:
            self.growth.append(grows)
            for owner in owners:
                owner.pretrained = None  # for the first branches only: a model read from disk has none either

    def freeze(
        self,
        *,
        branches: Iterable[str] = (),
        encoder: bool = False,
        norm: bool = False,
        statistics: bool = True,
        decoder: bool = False,
        heads: Mapping[str, int] | None = None,
    ) -> None:
        """Freeze exactly this; everything else becomes trainable. Outlives `.train()`.

        Args:
            branches: branches whose own modules get no gradient.
            encoder: the encoder's weights get no gradient, but for what the other branches own in it: a new
                branch's norms and adapters would stay untrained. Where branches own nothing in it and `statistics` is
                set, it stays in eval mode whole, its dropout included.
            norm: the affine weights of all norms get no gradient.
            statistics: the frozen norms also keep their running statistics (they stay in eval mode). False lets
                them move, as in MiB's code, where `model.train()` undid the freezing.
            decoder: the decoder's weights get no gradient, but for what the other branches own in it.
            heads: branch -> how many of its classifiers, the oldest first, get no gradient.

        Raises:
            ConfigError: unknown branch, or more classifiers than the branch has.
        """
        branches, heads = tuple(branches), dict(heads or {})
        self._check_branches([*branches, *heads])
        for branch, number in heads.items():
            if not 0 <= number <= len(self.head(branch).classifiers):
                raise ConfigError(
                    f"branch '{branch}': cannot freeze {number} of its {len(self.head(branch).classifiers)} classifiers"
                )
        self.frozen = Frozen(branches, encoder, norm, statistics, decoder, heads)
        # From a clean slate, so that a second call means what it says and nothing of the first.
        self.requires_grad_(True)
        for part in self._frozen_parts:
            part.requires_grad_(False)
            for module in self._trained_in(part):
                module.requires_grad_(True)
        for branch, number in heads.items():
            self.head(branch).classifiers[:number].requires_grad_(False)
        for branch in branches:
            for weight in self.branch_parameters(branch):
                weight.requires_grad_(False)
        if norm:
            for module in self.modules():
                if isinstance(module, NORM_TYPES):
                    module.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Restructured):
                module.freeze_changed()
        self.train(self.training)

    def train(self, mode: bool = True) -> SegmentationModel:
        """Set training or eval mode; norms with frozen statistics, and an encoder frozen whole, stay in eval mode."""
        # `nn.Module.train` knows nothing of freezing: it sets every norm to update its statistics. What is frozen is
        # put back below, on every call, so no caller can undo it.
        super().train(mode)
        if self._encoder_is_frozen:
            self.encoder.eval()
        if mode and self.frozen.statistics:
            roots = self._frozen_parts
            roots += [m for branch in self.frozen.branches for m in self._branch_modules(branch)]
            kept = [] if self.frozen.norm else [m for part in roots for m in self._trained_in(part)]
            # A frozen encoder may hold norms of a branch that is trained; these go on learning.
            trained = {id(inner) for module in kept for inner in module.modules()}
            for root in [self] if self.frozen.norm else roots:
                for module in root.modules():
                    if isinstance(module, NORM_TYPES) and id(module) not in trained:
                        module.training = False
        for module in self.modules():
            if isinstance(module, Restructured):
                module.rest_changed()
        return self

    @property
    def _frozen_parts(self) -> list[nn.Module]:
        """Encoder and decoder, if they are frozen."""
        parts = ((self.encoder, self.frozen.encoder), (self.decoder, self.frozen.decoder))
        return [part for part, frozen in parts if frozen]

    def _trained_in(self, part: nn.Module) -> list[nn.Module]:
        """What the branches that are not frozen own in the encoder or the decoder."""
        owners = [m for m in part.modules() if isinstance(m, BranchDict)]
        trained = [branch for branch in self.branches if branch not in self.frozen.branches]
        return [owner[branch] for owner in owners for branch in trained]

    @property
    def encoder_is_constant(self) -> bool:
        """Whether the encoder is frozen whole, so that training changes nothing in its maps of an image.

        Frozen weights and statistics, the same for all branches, and nothing drawn at random inside.
        """
        return (
            self._encoder_is_frozen
            and not any(weight.requires_grad for weight in self.encoder.parameters())
            and not any(module.training for module in self.encoder.modules())
        )

    @property
    def _encoder_is_frozen(self) -> bool:
        return self.frozen.encoder and self.frozen.statistics and not _by_branch(self.encoder)

    def branch_parameters(self, name: str) -> list[nn.Parameter]:
        """The weights that only this branch owns.

        Raises:
            ConfigError: unknown branch.
        """
        self._check_branches([name])
        return [weight for module in self._branch_modules(name) for weight in module.parameters()]

    def shared_parameters(self) -> list[nn.Parameter]:
        """The weights that no branch owns."""
        owned = {
            id(p) for branch in self.branches for p in self.branch_parameters(branch)
        }  # tensors compare by value
        return [weight for weight in self.parameters() if id(weight) not in owned]

    def forward(
        self,
        image: Tensor,
        branches: Iterable[str] | None = None,
        *,
        encoded: Mapping[str, Tensor] | None = None,
        taps: Taps = (),
    ) -> dict[str, SegOutput]:
        """Run the model through some branches over the same images.

        Args:
            image: (B, 3, H, W) float, normalised.
            branches: which; None = all.
            encoded: what the encoder made of the image, where it is known already and the same for all branches.
            taps: maps to give beside the usual ones, where the network has them. "before_activation": each stage's
                before its last activation, named as the stage with ".pre" behind; they cost a copy of each map.
                "attention": those of a transformer's blocks, "attention1", "attention2", ...; see `LibraryEncoder`.

        Returns:
            Branch -> logits (B, C, h, w) at the head's stride (cut to the image's size where they are larger), and the
            taps "layer1" ... "layer4" (or what the encoder names), "encoder" (its last map, after the activation) and
            "decoder" (the classifiers' input).

        Raises:
            ConfigError: unknown branch or kind of tap, or the model has no outputs yet.
        """
        branches = self.branches if branches is None else tuple(branches)
        self._check_branches(branches)
        if not branches:
            raise ConfigError("the model has no outputs yet: grow it first")
        found = self._maps(image, branches, encoded, self._wanted(taps))
        height, width = image.shape[2:]
        # A transposed convolution may reach beyond an image whose size is no multiple of its stride.
        return {
            branch: SegOutput(self.heads[branch](maps["decoder"])[..., :height, :width], maps)
            for branch, maps in found.items()
        }

    def encode(self, image: Tensor, *, taps: Taps = ()) -> dict[str, Tensor]:
        """Run an encoder that all branches share: (B, 3, H, W) to its maps by name, finest first."""
        return self.encoder(image, **self._wanted(taps))

    @property
    def gives_attention(self) -> bool:
        """Whether the network has attention maps over the whole image that it can give."""
        return bool(getattr(self.encoder, "attention_grids", ()))

    def _wanted(self, taps: Taps) -> dict[str, Taps]:
        """What the encoder is called with for these taps: nothing where it has no such argument."""
        unknown = [tap for tap in taps if tap not in get_args(Tap)]
        if unknown:
            raise ConfigError(f"taps: '{unknown[0]}' is no kind of tap; kinds: {', '.join(get_args(Tap))}")
        asks = bool(taps) and "taps" in inspect.signature(self.encoder.forward).parameters
        return {"taps": taps} if asks else {}

    def _maps(
        self,
        image: Tensor,
        branches: tuple[str, ...],
        known: Mapping[str, Tensor] | None,
        wanted: Mapping[str, Taps],
    ) -> dict[str, dict[str, Tensor]]:
        """The named maps of every branch; encoder and decoder run once for branches that share them."""
        if known is None and _by_branch(self.encoder):
            encoded = self.encoder(image, branches, **wanted)
        else:
            own = self.encoder(image, **wanted) if known is None else known
            encoded = dict.fromkeys(branches, own)
        found = {}
        # Branches with the very same encoder maps share the decoder's result, too: keyed by the maps' identity.
        decoded: dict[int, Tensor] = {}
        for branch in branches:
            maps = dict(encoded[branch])
            maps["encoder"] = maps[next(reversed(maps))]  # the coarsest; encoders give theirs finest first
            if _by_branch(self.decoder):
                maps["decoder"] = self.decoder(maps, branch)
            else:
                same = id(encoded[branch])
                maps["decoder"] = decoded[same] = decoded[same] if same in decoded else self.decoder(maps)
            found[branch] = maps
        return found

    def describe(self) -> dict[str, Any]:
        """What rebuilds the model without its weights: name, options, growth in order. Ready for JSON."""
        # Through JSON, so that a description compares equal to one read back (tuples become lists).
        changes = {"changes": self.changes} if self.changes else {}
        return json.loads(json.dumps({**self.description, "growth": self.growth, **changes}))

    def restructure(self, name: str) -> None:
        """Change the structure of every module that knows this change, such as merging two convolutions into one.

        The change becomes part of the description, so that a model rebuilt from it has the same weights by name.

        Raises:
            ConfigError: no module of this model knows the change.
        """
        # A list: a change may replace modules below the one that makes it.
        known = [m for m in list(self.modules()) if isinstance(m, Restructured) and name in m.changes_known]
        if not known:
            raise ConfigError(f"the model has no part for the structural change '{name}'")
        for module in known:
            module.restructure(name)
        self.changes.append(name)
        self.train(self.training)

    def _branch_modules(self, branch: str) -> list[nn.Module]:
        return [m[branch] for m in self.modules() if isinstance(m, BranchDict) and branch in m]

    def _check_branches(self, branches: Iterable[str]) -> None:
        unknown = [branch for branch in branches if branch not in self.heads]
        if unknown:
            raise ConfigError(f"the model has no branch '{unknown[0]}'; it has {list(self.branches)}")


class Restructured(nn.Module):
    """A module whose structure may change between steps; see `SegmentationModel.restructure`."""

    changes_known: tuple[str, ...] = ()
    """Names of the changes that it takes part in."""

    def restructure(self, name: str) -> None:
        """Make the change: first with the weights at hand, and again on fresh weights when a model is rebuilt."""
        raise NotImplementedError

    def freeze_changed(self) -> None:
        """Take the gradient from weights that the change has settled; called at the end of every `freeze`."""

    def rest_changed(self) -> None:
        """Put norms that the change has settled into eval mode; called at the end of every `train`."""


def _by_branch(part: nn.Module) -> bool:
    return bool(
        getattr(part, "by_branch", False)
    )  # an attribute, since encoders of other libraries know no class of ours


def frozen_copy(model: SegmentationModel) -> SegmentationModel:
    """Copy a model as a teacher: eval mode, no gradients; what the model has frozen is not the teacher's matter."""
    teacher = copy.deepcopy(model)
    teacher.frozen = Frozen()
    teacher.eval()
    return teacher.requires_grad_(False)


def channels_last(model: SegmentationModel) -> SegmentationModel:
    """Lay a model's convolutions out with the channels innermost, in place; no value changes."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def init_from_background(model: SegmentationModel, branch: str, *, biases: bool = True) -> None:
    """Start the newest classifier of a branch from the background's, so that old probabilities stay.

    With N new classes, every new weight row becomes the background's (class 0 of the first classifier); the new
    biases *and* the background's become the old background bias - ln(N + 1).

    As in the authors' code the subtraction is done in float32, also in a float64 model.

    Args:
        model: a model that has just grown.
        branch: which of its branches.
        biases: False leaves all biases as they are, as RCIL's code does: old probabilities do not stay then.

    Raises:
        ConfigError: the branch has grown only once, or is unknown.

    Source: Cermelli et al., "Modeling the Background", CVPR 2020, eq. 10-11.
    """
    head = model.head(branch)
    if len(head.classifiers) < 2:
        raise ConfigError(f"branch '{branch}': there is no older classifier to start the new one from")
    first, new = cast(Classifier, head.classifiers[0]), cast(Classifier, head.classifiers[-1])
    if first.bias is None or new.bias is None:
        raise ConfigError(f"branch '{branch}': the classifiers need a bias")
    outputs = (
        1 if isinstance(first, nn.ConvTranspose2d) else 0
    )  # dimension of the weights that counts classes
    new.weight.copy_(first.weight.narrow(outputs, 0, 1).expand_as(new.weight))
    if not biases:
        return
    # softmax over N + 1 equal logits: each gets the background's old probability / (N + 1), together all of it
    share = torch.log(torch.tensor(new.out_channels + 1, dtype=torch.float32))
    bias = first.bias[0].to(torch.float32) - share.to(first.bias.device)
    new.bias.fill_(bias)
    first.bias[0] = bias
