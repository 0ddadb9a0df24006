"""The segmentation model: an encoder, a decoder, and growing classifiers per branch."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from everseg.errors import ConfigError, first_line
from everseg.models.blocks import (
    ATTENTION,
    PRE,
    BranchDict,
    MakeClassifier,
    NormKind,
    Restructured,
    is_norm,
)
from everseg.models.domain_statistics import DomainStatistics
from everseg.models.heads import GrowingHead, Growth, Head, HeadOutput, background_layer, last_layer
from everseg.models.kinds import KINDS
from everseg.models.open_sizes import sizes_at_hand
from everseg.types import Readout, SegOutput, Tap, Taps

TRIAL = (64, 128)
"""Height and width of an image that is run to see what a network gives."""


@dataclass(frozen=True)
class Frozen:
    """The arguments of the last `SegmentationModel.freeze`."""

    branches: tuple[str, ...] = ()
    encoder: bool = False
    norm: bool = False
    statistics: bool = True
    decoder: bool = False
    heads: Mapping[str, int | tuple[str, ...]] = field(default_factory=dict)
    dropout: bool = False
    shared_statistics: bool = False


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
        norm: kind of the norms in trunks of heads.
        make_head: makes a branch's head, for networks with heads of their own; default a `GrowingHead`.

    Attributes:
        readout: how the outputs become classes. It is no part of the description; model folders hold it beside it.
        domain_statistics: branch -> what its training images look like, where the choice of a branch needs that
            (`branch_choice`). Model folders hold it in a file of its own.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        description: Mapping[str, Any] | None = None,
        *,
        make_classifier: MakeClassifier | None = None,
        norm: NormKind = "bn",
        make_head: Callable[[], GrowingHead] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self._head_parts = cast(int, decoder.out_channels), make_classifier, norm
        self.heads = BranchDict(make_head or partial(GrowingHead, *self._head_parts))
        self.description: dict[str, Any] = dict(description or {"name": None, "options": {}})
        self.growth: list[dict[str, Any]] = []
        self.changes: list[str] = []
        self.frozen = Frozen()
        self.readout = Readout()
        self.domain_statistics: dict[str, DomainStatistics] = {}

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches in the order they were met."""
        return tuple(self.heads)

    @property
    def is_by_branch(self) -> bool:
        """Whether the encoder has parts per branch, and so is run once for each."""
        return _by_branch(self.encoder)

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

    def grow(
        self,
        grows: Mapping[str, Any],
        init_from: str | None = None,
        *,
        heads: Mapping[str, Head] | None = None,
    ) -> None:
        """Add outputs: a new branch gets modules of its own and a head, a known branch's head grows, 0 does nothing.

        Weights are drawn on the CPU whatever the model's device, so a seed gives the same ones everywhere.

        Args:
            grows: branch -> number of classes it gains, or an entry of a description's growth.
            init_from: branch whose modules in encoder and decoder a *new* branch copies, as each `BranchDict` says;
                its classifiers always start afresh.
            heads: branch -> what it gains beside the number; default plain classifiers.

        Raises:
            ConfigError: negative number, bad branch name, unknown `init_from`, or a head that cannot grow so; the model
                is unchanged then.
        """
        entries = {branch: Growth.of_json(entry) for branch, entry in grows.items()}
        entries = {branch: entry for branch, entry in entries.items() if entry.classes != 0}
        for branch, head in (heads or {}).items():
            if branch in entries:
                entries[branch] = Growth(entries[branch].classes, head)
        if init_from is not None:
            self._check_branches([init_from])
        owners = [
            m for part in (self.encoder, self.decoder) for m in part.modules() if isinstance(m, BranchDict)
        ]
        # Everything that can fail is tried before anything is added: a model must not stay half grown.
        for branch, entry in entries.items():
            if entry.classes < 0:
                raise ConfigError(f"branch '{branch}': cannot grow by {entry.classes} classes")
            if branch in self.heads:
                self._asked(branch, partial(self.head(branch).check, entry))
                continue
            for owner in [*owners, self.heads]:
                owner.check(branch)
            with torch.device("meta"):  # draws no random numbers
                self._asked(branch, partial(self._check_new, entry))
        like = next(self.parameters(), None)
        for branch, entry in entries.items():
            # The order of drawing random weights (encoder's owners, decoder's, head) is part of every run's numbers.
            added = []
            if branch not in self.heads:
                added = [owner.add(branch, init_from) for owner in owners]
                self.heads[branch] = self._make_head(entry.head)
            self.head(branch).grow(*entry)
            for module in [*added, self.heads[branch]]:
                if like is not None:
                    module.to(like.device, like.dtype)
        self.train(self.training)  # new modules are in training mode; frozen ones go back to eval mode
        if entries:
            self.growth.append({branch: entry.to_json() for branch, entry in entries.items()})
            for owner in owners:
                owner.pretrained = None  # for the first branches only: a model read from disk has none either

    def _check_new(self, growth: Growth) -> None:
        self._make_head(growth.head).check(growth)

    def _make_head(self, head: Head) -> GrowingHead:
        if not head.kind:
            return cast(GrowingHead, self.heads.make())
        if head.kind not in KINDS:
            raise ConfigError(f"unknown kind of head '{head.kind}'; known: {', '.join(KINDS) or 'none'}")
        return KINDS[head.kind](*self._head_parts)

    @staticmethod
    def _asked(branch: str, question: Callable[[], object]) -> None:
        try:
            question()
        except ConfigError as error:
            raise ConfigError(f"branch '{branch}': {error}") from None

    def freeze(
        self,
        *,
        branches: Iterable[str] = (),
        encoder: bool = False,
        norm: bool = False,
        statistics: bool = True,
        decoder: bool = False,
        heads: Mapping[str, int | Iterable[str]] | None = None,
        dropout: bool = False,
        shared_statistics: bool = False,
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
            heads: branch -> which of its classifiers get no gradient: a number, the oldest ones and with them the
                background's own; or the names of parts (`GrowingHead.parts`), exactly these.
            dropout: dropout layers drop nothing.
            shared_statistics: norms that no branch owns keep their running statistics, and normalise by them. Their
                weights are trained as the others are.

        Raises:
            ConfigError: unknown branch, more classifiers than the branch has, or an unknown part.
        """
        branches = tuple(branches)
        self._check_branches([*branches, *(heads or {})])
        chosen: dict[str, int | tuple[str, ...]] = {
            branch: which if isinstance(which, int) else tuple(which)
            for branch, which in (heads or {}).items()
        }
        for branch, which in chosen.items():
            self._asked(branch, partial(self.head(branch).chosen, which))
        self.frozen = Frozen(branches, encoder, norm, statistics, decoder, chosen, dropout, shared_statistics)
        # From a clean slate, so that a second call means what it says and nothing of the first.
        self.requires_grad_(True)
        for part in self._frozen_parts:
            part.requires_grad_(False)
            for module in self._trained_in(part):
                module.requires_grad_(True)
        for part in self._frozen_classifiers:
            part.requires_grad_(False)
        for branch in branches:
            for weight in self.branch_parameters(branch):
                weight.requires_grad_(False)
        if norm:
            for module in self.modules():
                if is_norm(module):
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
            roots = self._frozen_parts + self._frozen_classifiers
            roots += [m for branch in self.frozen.branches for m in self._branch_modules(branch)]
            kept = [] if self.frozen.norm else [m for part in roots for m in self._trained_in(part)]
            # A frozen encoder may hold norms of a branch that is trained; these go on learning.
            trained = {id(inner) for module in kept for inner in module.modules()}
            for root in [self] if self.frozen.norm else roots:
                for module in root.modules():
                    if is_norm(module) and id(module) not in trained:
                        module.training = False
        if mode and self.frozen.shared_statistics:
            owned = {
                id(inner)
                for name in self.branches
                for own in self._branch_modules(name)
                for inner in own.modules()
            }
            for module in self.modules():
                if is_norm(module) and id(module) not in owned:
                    module.training = False
        if self.frozen.dropout:
            for module in self.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
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

    @property
    def _frozen_classifiers(self) -> list[nn.Module]:
        """The parts of heads that are frozen."""
        return [
            part for branch, which in self.frozen.heads.items() for part in self.head(branch).chosen(which)
        ]

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
        extra: Mapping[str, Tensor] | None = None,
    ) -> dict[str, SegOutput]:
        """Run the model through some branches over the same images.

        Args:
            image: (B, 3, H, W) float, normalised.
            branches: which; None = all.
            encoded: what the encoder made of the image, where it is known already and the same for all branches.
            taps: maps to give beside the usual ones. Kinds, where the network has them: "before_activation", each
                stage's before its last activation, named as the stage with ".pre" behind; they cost a copy of each
                map; "attention", those of a transformer's blocks, "attention1", "attention2", ...; see
                `LibraryEncoder`. Or names of single ones, such as "layer3.pre"; see `tap_names`.
            extra: the maps in `reads_extra`, name -> (B, H, W).

        Returns:
            Branch -> logits (B, C, h, w) at the head's stride (cut to the image's size where they are larger), the
            auxiliary outputs, and the taps: "layer1" ... "layer4" (or what the encoder names), "encoder" (its last map,
            after the activation), "decoder" (the classifiers' input), and "head0", "head1", ... behind the trunks of
            heads.

        Raises:
            ConfigError: unknown branch or kind of tap, a tap that the network does not have, no outputs yet, or
                `extra` lacks a map.
        """
        branches = self.branches if branches is None else tuple(branches)
        self._check_branches(branches)
        if not branches:
            raise ConfigError("the model has no outputs yet: grow it first")
        found = self._maps(image, branches, encoded, self._wanted(taps))
        height, width = image.shape[2:]
        outputs = {}
        for branch, all_maps in found.items():
            maps = self._only(all_maps, taps)
            logits, auxiliary, own = self._through_head(branch, maps["decoder"], extra)
            # A transposed convolution may reach beyond an image whose size is no multiple of its stride. With sizes at
            # hand the maps are cut to whole cells already, and an image never has more cells than pixels.
            if sizes_at_hand() is None:
                logits = logits[..., :height, :width]
                auxiliary = {name: value[..., :height, :width] for name, value in auxiliary.items()}
            outputs[branch] = SegOutput(logits, maps | own, auxiliary)
        return outputs

    def _through_head(self, branch: str, decoded: Tensor, extra: Mapping[str, Tensor] | None) -> HeadOutput:
        head = self.head(branch)
        if not head.reads_extra:
            return head(decoded)
        if missing := [name for name in head.reads_extra if name not in (extra or {})]:
            raise ConfigError(f"the network needs {', '.join(missing)} of every image (data.extra)")
        return head(decoded, extra)

    @property
    def reads_extra(self) -> tuple[str, ...]:
        """Names of the pixel-aligned maps that the network needs beside the image."""
        return tuple(dict.fromkeys(n for b in self.branches for n in self.head(b).reads_extra))

    def encode(self, image: Tensor, *, taps: Taps = ()) -> dict[str, Tensor]:
        """Run an encoder that all branches share: (B, 3, H, W) to its maps by name, finest first."""
        return self._only(self.encoder(image, **self._wanted(taps)), taps)

    @property
    def gives_attention(self) -> bool:
        """Whether the network has attention maps over the whole image that it can give."""
        return bool(getattr(self.encoder, "attention_grids", ()))

    @property
    def gives_tokens(self) -> bool:
        """Whether the network's classes are tokens; see `everseg.models.token_head`."""
        with torch.device("meta"):  # draws no random numbers
            return bool(getattr(self.heads.make(), "gives_tokens", False))

    def tap_names(self) -> tuple[str, ...]:
        """Names of the taps that the network has, with those that are given only where they are asked for.

        A small image is run to see them. Taps of heads ("head0") are not among them.

        Raises:
            ConfigError: every branch has an encoder of its own, and there is no branch yet; or the encoder, one of the
                user's own, cannot run such an image.
        """
        if _by_branch(self.encoder) and not self.branches:
            raise ConfigError("the model has no outputs yet: grow it first")
        # The first convolution knows the number of channels.
        like = next((weight for weight in self.encoder.parameters() if weight.ndim == 4), None)
        image = torch.zeros(1, 3, *TRIAL) if like is None else like.new_zeros(1, like.shape[1], *TRIAL)
        asked = self._wanted(get_args(Tap))
        training = {module: module.training for module in self.encoder.modules()}
        self.encoder.eval()
        try:
            with torch.no_grad():
                if not _by_branch(self.encoder):
                    maps = self.encoder(image, **asked)
                else:
                    maps = self.encoder(image, self.branches[:1], **asked)[self.branches[0]]
        except Exception as error:  # whatever a network of the user's raises
            raise ConfigError(
                f"taps: the network cannot run an image of {TRIAL[1]} x {TRIAL[0]} pixels with {image.shape[1]} "
                f"channels, so its taps are not known: {first_line(error)}"
            ) from error
        finally:
            for module, mode in training.items():
                module.training = mode
        return (*maps, "encoder", "decoder")

    def _wanted(self, taps: Taps) -> dict[str, Taps]:
        """What the encoder is called with for these taps: their kinds; nothing where it has no such argument."""
        kinds = tuple(dict.fromkeys(_kind(tap) or tap for tap in taps))
        if [kind for kind in kinds if kind not in get_args(Tap)]:
            unknown = next(tap for tap in taps if _kind(tap) is None)
            raise ConfigError(
                f"taps: '{unknown}' is neither a kind of tap ({', '.join(get_args(Tap))}) nor the name of one that is "
                f"given where it is asked for; the network has {', '.join(self.tap_names())}"
            )
        asks = bool(taps) and "taps" in inspect.signature(self.encoder.forward).parameters
        return {"taps": kinds} if asks else {}

    def _only(self, maps: Mapping[str, Tensor], taps: Taps) -> dict[str, Tensor]:
        """Leave out what was not asked for: of kinds that only single names were asked of.

        Raises:
            ConfigError: the network lacks a tap that was asked for by its name.
        """
        if missing := [tap for tap in taps if tap not in get_args(Tap) and tap not in maps]:
            raise ConfigError(
                f"taps: the network has no {', '.join(missing)}; it has {', '.join(self.tap_names())}"
            )
        return {
            name: map for name, map in maps.items() if _kind(name) is None or {name, _kind(name)} & {*taps}
        }

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


def _kind(tap: str) -> str | None:
    """The kind of a tap that is given only where it is asked for, or of a kind itself; None = another tap."""
    if tap in get_args(Tap):
        return tap
    if tap.endswith(PRE):
        return "before_activation"
    return ATTENTION if tap.startswith(ATTENTION) and tap.removeprefix(ATTENTION).isdigit() else None


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
    first, new = background_layer(head), last_layer(head.classifiers[-1])
    if first.bias is None or new.bias is None:
        raise ConfigError(f"branch '{branch}': the classifiers need a bias")
    # Of a background that was merged with other classes only the first part is shared out.
    plain = [replace(growth.head, sums=()) for growth in (head.growths[0], head.growths[-1])]
    if any(kind != Head() for kind in plain):
        raise ConfigError(
            f"branch '{branch}': its classifiers are of another method's kind; a new one cannot start from the "
            "background's as it does in MiB"
        )
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
