"""Heads: the classifiers of a branch, what each growth adds to them, and outputs that are no class."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.models.blocks import (
    Classifier,
    MakeClassifier,
    NormKind,
    Restructured,
    build_activation,
    build_norm,
)

Background = Literal["joint", "own", "constant"]
EXPAND = "expand"
"""The structural change that puts a random expansion between the decoder and the classifiers; see `GrowingHead`."""
BACKGROUND, FUTURE = "background", "future"
"""Names of the part that holds a background of its own, and of the output that holds reserved classifiers."""
HEAD = "head"
"""Beginning of the name of a tap behind a trunk: "head0" behind that of the first growth, "head1", ..."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a growth adds to a branch beside the number of classes. The default is one plain classifier."""

    kind: str = ""
    """Name of the head's class in `everseg.models.kinds.KINDS`; "" = the model's own. The first growth decides."""
    hidden: int | None = None
    """Width of a trunk in front of each classifier of this growth: 3x3 convolution without bias, norm, activation.
    None = no trunk."""
    background: Background = "joint"
    """Where the branch's first class comes from, in its first growth: from the classifier of the other classes; from an
    "own" classifier; or "constant": no weights, its logit is 0, which is a probability of 0.5 under a sigmoid."""
    auxiliary: Mapping[str, int] = field(default_factory=dict)
    """Name -> number of outputs that are no class. Each name has a classifier, and a trunk, of its own."""
    beside: Mapping[str, int] = field(default_factory=dict)
    """Name -> number of outputs that are no class and come from the classifier of the growth's classes, ahead of these.
    Outputs of one name from several growths stand side by side."""
    detached: tuple[str, ...] = ()
    """Names in `auxiliary` whose classifiers send no gradient back into the network."""
    reserve: tuple[int, ...] = ()
    """Numbers of classes of growths to come, in the first growth. Their classifiers exist from now on and give the
    output "future"; the growths take them over one by one."""
    expansion: int = 0
    """Width of the random expansion that the change "expand" inserts, in the first growth; 0 = none."""
    regions: int = 0
    """Regions of an image that a head of regions pools over, in the first growth; 0 = none."""
    sums: tuple[int, ...] = ()
    """For each class of this growth's classifier the number of its outputs. The logit of a class of several ones is the
    logarithm of the sum of their exponentials, so that under a softmax its probability is the sum of theirs. () = one
    each. Classes that were merged after they were learnt are such ones."""

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON value: what differs from the default."""
        default = asdict(Head())
        return json.loads(
            json.dumps({key: value for key, value in asdict(self).items() if value != default[key]})
        )

    @classmethod
    def of_json(cls, stored: Any) -> Head:
        """Read back what `to_json` gave.

        Raises:
            ConfigError: it has another form.
        """
        if not isinstance(stored, Mapping):
            raise ConfigError("head: expected settings by name")
        unknown = [key for key in stored if key not in {entry.name for entry in fields(cls)}]
        if unknown:
            raise ConfigError(
                f"head: unknown setting '{unknown[0]}'; a later everseg may have written it: update everseg"
            )
        good: dict[str, Callable[[Any], bool]] = {
            "kind": lambda value: isinstance(value, str),
            "hidden": _positive,
            "background": lambda value: value in get_args(Background),
            "auxiliary": _counts,
            "beside": _counts,
            "detached": lambda value: _items(value, lambda item: isinstance(item, str)),
            "reserve": lambda value: _items(value, _positive),
            "expansion": _positive,
            "regions": _positive,
            "sums": lambda value: _items(value, _positive),
        }
        wrong = [key for key, value in stored.items() if not good[key](value)]
        if wrong:
            raise ConfigError(f"head: no usable {', '.join(wrong)}")
        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
        }
        return cls(**settings)


def _positive(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**20


def _counts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and _positive(n) for k, n in value.items())


def _items(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(good, value))


class Growth(NamedTuple):
    """One growth of one branch."""

    classes: int
    head: Head = Head()

    @classmethod
    def of_json(cls, stored: Any) -> Growth:
        """Read an entry of a description: a number of classes, or {"classes": number, "head": settings}.

        Raises:
            ConfigError: it is neither.
        """
        if type(stored) is int:
            return cls(stored)
        if not isinstance(stored, Mapping) or stored.keys() != {"classes", "head"}:
            raise ConfigError("growth: expected a number of classes, or classes and head")
        if type(stored["classes"]) is not int:
            raise ConfigError("growth: expected a number of classes")
        return cls(stored["classes"], Head.of_json(stored["head"]))

    def to_json(self) -> Any:
        """Convert to an entry of a description; a plain classifier is its number of classes."""
        head = self.head.to_json()
        return {"classes": self.classes, "head": head} if head else self.classes


def sizes_of(growth: Iterable[Mapping[str, Any]]) -> list[dict[str, int]]:
    """Read a description's growth: for each growth in order, branch -> number of classes it gained.

    Raises:
        ConfigError: an entry is none.
    """
    return [{branch: Growth.of_json(entry).classes for branch, entry in one.items()} for one in growth]


class HeadOutput(NamedTuple):
    """What a head makes of the decoder's map."""

    logits: Tensor
    """(B, C, h, w): the classes in output order."""
    auxiliary: dict[str, Tensor]
    """Name -> (B, n, h, w): outputs that are no class."""
    features: dict[str, Tensor]
    """Further taps."""


class Trunk(nn.Module):
    """A 3x3 convolution without bias, a norm and an activation in front of a classifier.

    Args:
        in_channels: channels of the decoder's map.
        hidden: channels in front of the classifier.
        classifier: the classifier, of `hidden` channels.
        norm: kind of norm, and of activation.
    """

    folds = ((("conv",), "norm"),)

    def __init__(self, in_channels: int, hidden: int, classifier: Classifier, norm: NormKind) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, hidden, 3, padding=1, bias=False)
        self.norm = build_norm(norm, hidden)
        self.act = build_activation(norm)
        self.classifier = classifier

    def features(self, input: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to what the classifier sees, (B, hidden, h, w)."""
        return self.act(self.norm(self.conv(input)))

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to logits."""
        return self.classifier(self.features(input))


class GrowingHead(Restructured):
    """The classifiers of a branch: one with bias per growth, their outputs concatenated.

    Old layers keep their names and shapes, so the logits of old classes are bit-equal after a growth.

    The change "expand" inserts relu(B f) of the decoder's map f, with fixed random weights B of `Head.expansion` rows.
    The classifiers become 1x1 convolutions without bias behind it, of zeros, which no gradient trains; those of later
    growths are made so.

    Args:
        in_channels: channels of the decoder's map.
        make_classifier: (in_channels, num_classes) -> a convolution, plain or transposed; default 1x1.
        norm: kind of the trunks' norms.

    Attributes:
        classifiers: one per growth, a convolution or a `Trunk`.
        others: name -> classifier of a background of its own, and of auxiliary outputs.
        future: reserved classifiers that no growth has taken over.
        growths: what each growth added.
    """

    reads_extra: tuple[str, ...] = ()
    """Names of pixel-aligned maps beside the image that the head's forward needs."""

    def __init__(
        self,
        in_channels: int,
        make_classifier: MakeClassifier | None = None,
        norm: NormKind = "bn",
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.make_classifier = make_classifier or partial(nn.Conv2d, kernel_size=1)
        self.norm = norm
        self.classifiers = nn.ModuleList()
        self.others = nn.ModuleDict()
        self.future = nn.ModuleList()
        self.expansion: nn.Conv2d | None = None
        self.growths: list[Growth] = []

    # -- growing

    def check(self, growth: Growth) -> None:
        """Stop unless the head can grow like this.

        Raises:
            ConfigError: it cannot.
        """
        number, head = growth
        first = not self.growths
        least = 1 if head.background == "joint" else 2
        if number < least:
            raise ConfigError(f"a head grows by at least {least} classes here, not by {number}")
        if not first and (
            head.background != "joint" or head.reserve or head.expansion or head.kind or head.regions
        ):
            raise ConfigError("a head's background, kind, reserve and expansion belong to its first growth")
        if self.future and (number, head) != (last_layer(self.future[0]).out_channels, Head()):
            raise ConfigError(
                f"the model has outputs reserved for {last_layer(self.future[0]).out_channels} classes in its next "
                f"step, and this one has {number}; the number of classes of every step must be known from the start"
            )
        known = {*self.others, FUTURE, *(name for one in self.growths for name in one.head.beside)}
        both = set(head.auxiliary) & ({*known, BACKGROUND} | set(head.beside))
        if both or set(head.beside) & {*self.others, BACKGROUND, FUTURE}:
            raise ConfigError(
                f"the name of an output appears twice: {', '.join(sorted(both or set(head.beside)))}"
            )
        if head.sums and len(head.sums) != number - (head.background != "joint"):
            raise ConfigError("head: `sums` has another number of classes than the growth")
        if not set(head.detached) <= set(head.auxiliary):
            raise ConfigError("head: `detached` names no auxiliary output")
        for name in head.auxiliary:
            if not name.isidentifier() or hasattr(self.others, name):
                raise ConfigError(f"head: '{name}' is not a usable name of an output")

    def grow(self, num_classes: int, head: Head = Head()) -> None:
        """Append outputs for `num_classes` >= 1 more classes, with PyTorch's default initialisation.

        Raises:
            ConfigError: as `check`.
        """
        growth = Growth(num_classes, head)
        self.check(growth)
        # The generator is the CPU's and its seed the caller's: the same first weights on every device. The order of
        # drawing is part of every run's numbers.
        like = next(self.parameters(), None)
        for name, number in head.auxiliary.items():
            self.others[name] = self._made(number, head, like)
        if head.background == "own":
            self.others[BACKGROUND] = self._made(1, head, like)
        if self.future:
            # Taken out of one list and into the other: the very same weights.
            taken = self.future[0]
            del self.future[0]
            self.classifiers.append(taken)
        else:
            own = 1 if head.background != "joint" else 0
            rows = sum(head.sums) or num_classes - own
            self.classifiers.append(self._made(rows + sum(head.beside.values()), head, like))
        for number in head.reserve:
            self.future.append(self._made(number, head, like))
        if head.expansion:
            self.changes_known = (EXPAND,)
        self.growths.append(growth)
        self.freeze_changed()

    def _made(self, number: int, head: Head, like: Tensor | None) -> nn.Module:
        made = self.make_part(number, head)
        return made if like is None else made.to(like.device, like.dtype)

    def make_part(self, number: int, head: Head) -> nn.Module:
        """Make a classifier of `number` outputs."""
        if self.expansion is not None:
            made = nn.Conv2d(self.expansion.out_channels, number, 1, bias=False)
            nn.init.zeros_(made.weight)
            return made
        if head.hidden is None:
            return self.make_classifier(self.in_channels, number)
        classifier = self.make_classifier(head.hidden, number)
        return Trunk(self.in_channels, head.hidden, classifier, self.norm)

    # -- parts

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of classes added by each growth."""
        return tuple(growth.classes for growth in self.growths)

    @property
    def num_classes(self) -> int:
        return sum(self.sizes)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Every classifier by name: "0", "1", ... of the growths, then those of `others`, then "future.0", ..."""
        return (
            {str(number): module for number, module in enumerate(self.classifiers)}
            | dict(self.others.items())
            | {f"{FUTURE}.{number}": module for number, module in enumerate(self.future)}
        )

    @property
    def newest(self) -> str:
        """Name of the part that the last growth added its classes in."""
        return str(len(self.classifiers) - 1)

    def chosen(self, which: int | Iterable[str]) -> list[nn.Module]:
        """Find parts: the first `which` classifiers and, from 1 on, the background's own; or those of these names.

        Raises:
            ConfigError: there are no such parts.
        """
        parts = self.parts
        if isinstance(which, int):
            if not 0 <= which <= len(self.classifiers):
                raise ConfigError(f"cannot freeze {which} of its {len(self.classifiers)} classifiers")
            which = [str(number) for number in range(which)] + [BACKGROUND] * (
                BACKGROUND in parts and which > 0
            )
        names = list(which)
        if unknown := [name for name in names if name not in parts]:
            raise ConfigError(f"it has no part '{unknown[0]}'; it has {', '.join(parts)}")
        return [parts[name] for name in names]

    # -- running

    def forward(self, features: Tensor, extra: Mapping[str, Tensor] | None = None) -> HeadOutput:
        """Map (B, in_channels, h, w) to logits and auxiliary outputs (B, n, h * stride, w * stride).

        Args:
            extra: the maps named in `reads_extra`; this class reads none.
        """
        seen = self.expanded(features)
        taps: dict[str, Tensor] = {}
        auxiliary: dict[str, list[Tensor]] = {}
        logits: list[Tensor] = []
        for number, (classifier, (_, head)) in enumerate(zip(self.classifiers, self.growths, strict=True)):
            for name in head.auxiliary:
                auxiliary[name] = [self.others[name](seen.detach() if name in head.detached else seen)]
            # One product per growth, not one over joined weights: kernels may sum those in another order, and the
            # logits of the old classes would change in their last digits.
            if isinstance(classifier, Trunk):
                taps[f"{HEAD}{number}"] = inner = classifier.features(seen)
                found = classifier.classifier(inner)
            else:
                found = classifier(seen)
            if head.background == "own":
                logits.append(self.others[BACKGROUND](seen))
            elif head.background == "constant":
                logits.append(torch.zeros_like(found[:, :1]))
            at = 0
            for name, count in head.beside.items():
                auxiliary.setdefault(name, []).append(found[:, at : at + count])
                at += count
            found = found[:, at:] if at else found
            logits.append(summed(found, head.sums) if head.sums else found)
        if self.future:
            auxiliary[FUTURE] = [classifier(seen) for classifier in self.future]
        joined = {name: torch.cat(maps, dim=1) for name, maps in auxiliary.items()}
        return HeadOutput(torch.cat(logits, dim=1), joined, taps)  # (B, C, h, w)

    def expanded(self, features: Tensor) -> Tensor:
        """What the classifiers see: the decoder's map (B, in_channels, h, w), or its expansion (B, n, h, w)."""
        return features if self.expansion is None else self.expansion(features).relu()

    # -- the expansion

    def restructure(self, name: str) -> None:
        """Insert the expansion and start the classifiers afresh behind it.

        Raises:
            ConfigError: it is there already, or the head has outputs that are no class.
        """
        if self.expansion is not None:
            raise ConfigError("the expansion is there already")
        if self.others or self.future or any(one.head.beside for one in self.growths):
            raise ConfigError("an expansion goes with plain classifiers only")
        like = next(self.parameters())
        width = self.growths[0].head.expansion
        self.expansion = nn.Conv2d(self.in_channels, width, 1, bias=False).to(like.device, like.dtype)
        for number, growth in enumerate(self.growths):
            self.classifiers[number] = self._made(growth.classes, growth.head, like)
        self.freeze_changed()

    def freeze_changed(self) -> None:
        """Take the gradient from the expansion and the classifiers behind it."""
        if self.expansion is not None:
            self.requires_grad_(False)


def summed(outputs: Tensor, sums: Iterable[int]) -> Tensor:
    """Make one logit of the outputs of each class, as `Head.sums` says.

    Args:
        outputs: (B, n, h, w); n is the sum of `sums`.

    Returns:
        (B, classes, h, w).
    """
    parts = outputs.split(list(sums), dim=1)
    return torch.cat([one if one.shape[1] == 1 else one.logsumexp(1, keepdim=True) for one in parts], dim=1)


def last_layer(part: nn.Module) -> Classifier:
    """The layer of a part that gives its outputs: the part itself, or the one behind its trunk."""
    return cast(Classifier, part.classifier if isinstance(part, Trunk) else part)


@torch.no_grad()
def start_from(head: GrowingHead, name: str, *, statistics: bool = True) -> None:
    """Start the newest classifier as a copy of another part: its trunk, and its first output for each new class.

    Outputs ahead of the classes (`Head.beside`) keep their fresh rows.

    Args:
        head: a head that has just grown.
        name: a part of it, such as "unknown".
        statistics: copy the running statistics of the trunk's norm as well.

    Raises:
        ConfigError: no such part, or one of another form.
    """
    [origin] = head.chosen([name])
    copy_trunk(head, name, statistics=statistics)
    first, new = last_layer(origin), last_layer(head.parts[head.newest])
    if first.bias is None or new.bias is None or not isinstance(first, nn.Conv2d):
        raise ConfigError("a classifier starts from another one only where both are convolutions with a bias")
    ahead = sum(head.growths[-1].head.beside.values())
    new.weight[ahead:] = first.weight[:1]
    new.bias[ahead:] = first.bias[:1]


@torch.no_grad()
def copy_trunk(head: GrowingHead, name: str, *, statistics: bool = True) -> None:
    """Start the trunk of the newest classifier as a copy of another part's; parts without trunks are left alone.

    Args:
        statistics: copy the running statistics of the norm as well; else they stay fresh (mean 0, variance 1).

    Raises:
        ConfigError: no such part, or the trunks have other widths.
    """
    [origin] = head.chosen([name])
    new = head.parts[head.newest]
    if not isinstance(origin, Trunk) and not isinstance(new, Trunk):
        return
    if (
        not isinstance(origin, Trunk)
        or not isinstance(new, Trunk)
        or new.conv.weight.shape != origin.conv.weight.shape
    ):
        raise ConfigError(f"the newest classifier cannot start from '{name}': their trunks have other widths")
    new.conv.weight.copy_(origin.conv.weight)
    copied = origin.norm.state_dict() if statistics else dict(origin.norm.named_parameters())
    for key, value in copied.items():
        new.norm.state_dict()[key].copy_(value)


def background_layer(head: GrowingHead) -> Classifier:
    """The layer whose first output is the background: that of the first growth, or the background's own.

    Raises:
        ConfigError: the background has no weights.
    """
    if head.growths[0].head.background == "constant":
        raise ConfigError("the background of this model has no weights of its own: its logit is constant")
    parts = head.parts
    return last_layer(parts.get(BACKGROUND, parts["0"]))
