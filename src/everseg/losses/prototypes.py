"""Losses on features sorted by class: running prototypes, attraction, repulsion, matching, sparsity.

Here features are (B, D, h, w), a label is (B, h, w) at their size, and 255 = ignored. C = number of classes. Nothing
waits for the device: every class is computed, and absent ones are masked out.

Source: Michieli and Zanuttigh (SDR), "Continual Semantic Segmentation via Repulsion-Attraction of Sparse and
Disentangled Latent Representations", CVPR 2021. `scrambled` is the authors' code, which gathers the features of a class
in memory order (image, channel, pixel) and reshapes that list as if it were sorted by channel: with more than one
image the channels are mixed.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.labels import IGNORED
from everseg.losses.bilinear import grid_points
from everseg.losses.pixelwise import full_precision

Norm = Literal["class_max", "channel_max", "batch_max", "l1", "l2", "softmax"]
"""What features are divided by before their sparsity is measured, see `sparsity`."""
Shrink = Literal["exponential", "squared", "cubed"]
Measure = Literal["ratio", "entropy", "lasso"]
_TINY = 1e-15
"""What the authors add to a divisor."""


def label_at(label: Tensor, size: tuple[int, int] | torch.Size, *, centred: bool = False) -> Tensor:
    """Sample a label (B, H, W) at the size (h, w) of a feature map, at the points of `bilinear.grid_points`.

    >>> label_at(torch.arange(6).view(1, 1, 6), (1, 4))
    tensor([[[0, 1, 3, 4]]])
    """
    rows, columns = (
        grid_points(large, small, label.device, centred=centred)
        for large, small in zip(label.shape[-2:], size, strict=True)
    )
    return label[:, rows[:, None], columns]


class ByClass:
    """The features of a batch sorted by class.

    Args:
        features: (B, D, h, w).
        label: (B, h, w) integers; values outside [0, C), such as 255, belong to no class.
        num_classes: C.
        order: "channels" keeps the channel of each value. "scrambled" and "scrambled pixels" are what the authors'
            code takes for the channel: a class's values, listed in the order (image, channel, pixel), reshaped to
            (channels, pixels) or to (pixels, channels).

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        features: Tensor,
        label: Tensor,
        num_classes: int,
        order: Literal["channels", "scrambled", "scrambled pixels"] = "channels",
    ) -> None:
        _check(features, label)
        self.features = full_precision(features).flatten(2)  # (B, D, P)
        index = label.flatten(1).long()  # (B, P)
        known = (index >= 0) & (index < num_classes)
        self._index = torch.where(known, index, num_classes)  # one row more, for pixels of no class
        # By comparison, not by `F.one_hot`, which reads the values.
        one_hot = (
            self._index[..., None] == torch.arange(num_classes, device=index.device)
        ).long()  # (B, P, C)
        self.count = one_hot.sum(dim=(0, 1))
        """(C,) int64, pixels of each class."""
        self._one_hot = one_hot.to(self.features)
        self._channel: Tensor | None = None
        self._pixel: Tensor | None = None
        if order != "channels":
            self._scramble(one_hot, order)

    @property
    def present(self) -> Tensor:
        """(C,) bool, which classes have a pixel."""
        return self.count > 0

    def sums(self, values: Tensor) -> Tensor:
        """Sum values (B, D, P) over the pixels of each class: (C, D)."""
        if self._channel is None:
            return torch.einsum("bpc,bdp->cd", self._one_hot, values)
        rows, channels = len(self.count) + 1, values.shape[1]
        found = values.new_zeros(rows * channels).scatter_add(0, self._slots.flatten(), values.flatten())
        return found.view(rows, channels)[:-1]

    def at(self, rows: Tensor) -> Tensor:
        """Each class's row of (C, D) at its pixels: (B, D, P); 0 at pixels of no class."""
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        if self._channel is None:
            return rows[self._index].transpose(1, 2)
        return rows.flatten()[self._slots]

    def means(self) -> Tensor:
        """Mean feature of each class, (C, D); 0 for absent ones."""
        return self.sums(self.features) / self.count.clamp(min=1)[:, None]

    def distances(self, prototypes: Tensor) -> Tensor:
        """Mean squared difference of each class's features from its prototype, (C,); 0 for absent ones."""
        gaps = self.sums((self.features - self.at(prototypes)).square()).mean(dim=1)
        return gaps / self.count.clamp(min=1)

    def normalise(self) -> None:
        """Divide every pixel's features by their norm over channels (over what was taken for them)."""
        if self._channel is None or self._pixel is None:
            self.features = F.normalize(self.features, dim=1)
            return
        squares = self.features.square().flatten()
        sums = squares.new_zeros(self._one_hot[..., 0].numel() + 1).scatter_add(
            0, self._pixel.flatten(), squares
        )
        # Pixels of no class share one sum, which nothing reads; `clamp` as in torch's normalize.
        self.features = self.features / sums.clamp(min=1e-24).sqrt()[self._pixel]

    def _scramble(self, one_hot: Tensor, order: str) -> None:
        """Find the channel and the pixel that the authors' code takes each value for."""
        depth = self.features.shape[1]
        per_image = one_hot.sum(dim=1)  # (B, C)
        before = per_image.cumsum(dim=0) - per_image  # pixels of the class in earlier images
        rank = (one_hot.cumsum(dim=1) * one_hot).sum(
            dim=2
        ) - 1  # (B, P), place among the image's pixels of its class
        own = self._index.clamp(max=len(self.count) - 1)
        of_image, earlier, total = (
            of_class.gather(1, own) for of_class in (per_image, before, self.count.expand_as(per_image))
        )  # (B, P) each
        channel = torch.arange(depth, device=own.device)[:, None]
        # Place of each value in its class's list: all channels of earlier images, then the channels before it.
        place = (depth * earlier + rank)[:, None] + channel * of_image[:, None]  # (B, D, P)
        total = total.clamp(min=1)[:, None]
        no_class = (self._index == len(self.count))[:, None]
        place = place.masked_fill(no_class, 0)
        if order == "scrambled":
            self._channel = torch.div(place, total, rounding_mode="floor")
            first = (self.count.cumsum(dim=0) - self.count).expand_as(per_image).gather(1, own)[:, None]
            pixel = first + place % total
            self._pixel = pixel.masked_fill(no_class, own.numel())
        else:
            self._channel = place % depth
        self._slots = self._index[:, None] * depth + self._channel


def class_sums(
    features: Tensor, label: Tensor, num_classes: int, *, scrambled: bool = False
) -> tuple[Tensor, Tensor]:
    """Sum the features of each class over a batch, in float64.

    Args:
        features: (B, D, h, w); no gradient flows.
        label: (B, h, w); 255 and whatever else is no class is left out.
        num_classes: C.
        scrambled: channels as the authors' code takes them.

    Returns:
        Sums (C, D) float64 and numbers of pixels (C,) int64, 0 for absent classes.

    Raises:
        ValueError: sizes that do not fit.
    """
    sorted_ = ByClass(features.detach().double(), label, num_classes, _order(scrambled))
    return sorted_.sums(sorted_.features), sorted_.count


def collected(number: Tensor, *, background: bool, first_dropped: bool = False) -> Tensor:
    """Choose the classes whose prototypes take in a batch's features.

    Args:
        number: (C,), pixels of each class in the batch.
        background: whether class 0 is collected: the pixels so labelled must be background and nothing else.
        first_dropped: the authors' code, which means to drop the background and drops the first class of the batch.

    Returns:
        (C,) bool.

    >>> number = torch.tensor([0, 3, 5])
    >>> collected(number, background=False), collected(number, background=False, first_dropped=True)
    (tensor([False,  True,  True]), tensor([False, False,  True]))
    """
    present = number > 0
    if background:
        return present
    order = present.cumsum(dim=0) if first_dropped else torch.arange(1, len(number) + 1, device=number.device)
    return present & (order > 1)


def updated_prototypes(
    prototypes: Tensor, count: Tensor, sums: Tensor, number: Tensor
) -> tuple[Tensor, Tensor]:
    """Take further features into running means: P <- (sums + count P) / (count + number), count <- count + number.

    Args:
        prototypes: (C, D), means so far.
        count: (C,), features that they are means of.
        sums: (C, D) of the new features.
        number: (C,) of them.

    Returns:
        Prototypes and count; rows of classes without any feature are unchanged.

    >>> updated_prototypes(torch.tensor([[2.0]]), torch.tensor([1]), torch.tensor([[7.0]]), torch.tensor([2]))
    (tensor([[3.]]), tensor([3]))
    """
    total = count + number
    moved = (sums + count[:, None] * prototypes) / total.clamp(min=1)[:, None]
    return torch.where(number[:, None] > 0, moved, prototypes), total


def attraction(
    features: Tensor,
    label: Tensor,
    prototypes: Tensor,
    *,
    background: bool = True,
    normalise: bool = False,
    nested: bool = False,
    scrambled: bool = False,
) -> Tensor:
    """Pull features to their class's prototype: the mean over classes of the mean squared difference.

    Args:
        features: (B, D, h, w).
        label: (B, h, w); 255 is left out.
        prototypes: (C, D); no gradient flows into them.
        background: whether class 0 counts.
        normalise: each pixel's features have norm 1, and each channel of the prototypes has norm 1 over the classes.
        nested: the authors' code, which divides by the number of classes n inside its loop, A <- (A + mean) / n: the
            k-th of the n classes weighs n^-(n - k + 1) instead of 1/n.
        scrambled: channels as the authors' code takes them.

    Returns:
        Scalar >= 0; 0 without a labelled pixel.

    Raises:
        ValueError: sizes that do not fit.

    >>> one = torch.ones(1, 2, 1, 1)
    >>> attraction(one, torch.zeros(1, 1, 1).long(), torch.tensor([[1.0, 3.0]])).item()
    2.0
    """
    prototypes = _checked(prototypes, features)
    by_class = ByClass(features, label, len(prototypes), _order(scrambled))
    if normalise:
        by_class.normalise()
        prototypes = F.normalize(prototypes, dim=0)
    present = _counted(by_class, background)
    number = present.sum().clamp(min=1).to(prototypes)
    weight = 1 / number
    if nested:
        weight = number ** (present.cumsum(dim=0) - 1 - number)
    return (by_class.distances(prototypes) * weight * present).sum()


def repulsion(
    features: Tensor,
    label: Tensor,
    num_classes: int,
    *,
    background: bool = True,
    normalise: bool = False,
    scrambled: bool = False,
) -> Tensor:
    """Push the batch's class means apart: the mean over pairs of classes of 1 / their distance.

    Args:
        features: (B, D, h, w); gradients flow through the means.
        label: (B, h, w); 255 is left out.
        num_classes: C.
        background: whether class 0 counts.
        normalise: each pixel's features have norm 1.
        scrambled: channels as the authors' code takes them.

    Returns:
        Scalar >= 0; 0 with fewer than two classes. Two classes of exactly the same mean are left out, where the
        authors' code gives infinity.

    Raises:
        ValueError: sizes that do not fit.

    >>> features = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    >>> repulsion(features, torch.tensor([[[0, 1]]]), 2).item()
    0.25
    """
    by_class = ByClass(features, label, num_classes, _order(scrambled))
    if normalise:
        by_class.normalise()
    present = _counted(by_class, background)
    means = by_class.means()
    # The form with a matrix product loses the digits of small distances.
    gaps = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")  # (C, C)
    pair = present[:, None] & present & (gaps > 0)
    inverse = torch.where(pair, 1 / torch.where(pair, gaps, 1), 0)
    number = present.sum()
    return inverse.sum() / (number * (number - 1)).clamp(min=1)


def orthogonality(
    features: Tensor,
    label: Tensor,
    prototypes: Tensor,
    *,
    background: bool = True,
    largest: bool = False,
    scrambled: bool = False,
) -> Tensor:
    """Product of the batch's class means with the prototypes of all other classes: `repulsion`'s alternative.

    Args:
        features: (B, D, h, w); gradients flow through the means.
        label: (B, h, w); 255 is left out.
        prototypes: (C, D), all rows count, also of classes that the batch has not; no gradient flows into them.
        background: whether class 0 counts among the batch's classes.
        largest: the largest product instead of the mean; 0 if all are negative.
        scrambled: channels as the authors' code takes them.

    Returns:
        Scalar; 0 without a labelled pixel.

    Raises:
        ValueError: sizes that do not fit.
    """
    prototypes = _checked(prototypes, features)
    by_class = ByClass(features, label, len(prototypes), _order(scrambled))
    present = _counted(by_class, background)
    counted = present & ~torch.eye(len(present), dtype=torch.bool, device=present.device)  # (C, C)
    products = (prototypes @ by_class.means().t()) * counted
    return products.amax() if largest else products.sum() / counted.sum().clamp(min=1)


def hidden_label(
    label: Tensor,
    teacher_ids: Tensor,
    num_old: int,
    *,
    labelled: bool = False,
    known: Tensor | None = None,
    ignored: int = IGNORED,
) -> Tensor:
    """Find the old classes in a batch: what `matching` compares.

    Args:
        label: (B, h, w) train ids, at the features' size.
        teacher_ids: (B, h, w), the teacher's likeliest class of each pixel.
        num_old: K, old classes, background included.
        labelled: old classes are in the label (sequential data), so the teacher is not asked.
        known: (C,) bool, the classes that have a prototype; None = all.
        ignored: label of ignored pixels, `everseg.labels.ignored_id(C)`.

    Returns:
        (B, h, w) int64 in 1..K-1; `ignored` where there is no old class, and for the background.
    """
    found = label.long() if labelled else teacher_ids.long().masked_fill(label != 0, ignored)
    outside = (found == 0) | (found >= num_old)
    if known is not None:
        outside = outside | ~known[found.clamp(max=len(known) - 1)]
    return found.masked_fill(outside, ignored)


def matching(
    features: Tensor,
    hidden: Tensor,
    prototypes: Tensor,
    *,
    per_pixel: bool = False,
    scrambled: bool = False,
) -> Tensor:
    """Keep the features of old classes at their prototypes.

    The mean over the classes met of the mean squared difference between the class's mean feature and its prototype.

    Args:
        features: (B, D, h, w); gradients flow.
        hidden: (B, h, w), from `hidden_label`.
        prototypes: (C, D); no gradient flows into them.
        per_pixel: the features themselves are compared, not their mean, and the classes are summed.
        scrambled: the list of a class's values is taken for (pixels, channels), as in the authors' code.

    Returns:
        Scalar >= 0; 0 where no old class is met.

    Raises:
        ValueError: sizes that do not fit.

    >>> features = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    >>> matching(features, torch.tensor([[[1, 1]]]), torch.tensor([[9.0], [0.0]])).item()
    4.0
    """
    prototypes = _checked(prototypes, features)
    by_class = ByClass(features, hidden, len(prototypes), "scrambled pixels" if scrambled else "channels")
    if per_pixel:
        return by_class.distances(prototypes).sum()
    gaps = (by_class.means() - prototypes).square().mean(dim=1) * by_class.present
    return gaps.sum() / by_class.present.sum().clamp(min=1)


def sparsity(
    features: Tensor,
    label: Tensor,
    *,
    norm: Norm = "class_max",
    shrink: Shrink = "exponential",
    measure: Measure = "ratio",
    ignored: int = IGNORED,
) -> Tensor:
    """How evenly a pixel's features lie over the channels: lowest where one channel holds them all.

    Features are normalised to g first. "ratio" is the mean over positions of sum_d s(g_d) / sum_d g_d.

    Args:
        features: (B, D, h, w), not negative but for a leaky activation's small values; gradients flow.
        label: (B, h, w); for `norm="class_max"` `ignored` is a class as well.
        norm: "class_max" divides by the largest value of all channels and pixels of the pixel's class;
            "channel_max" by that of the position, "batch_max" by that of the batch; "l1" and "l2" by the position's
            norm over channels; "softmax" is over channels.
        shrink: s(g) = exp(g), g^2 or g^3.
        measure: "ratio"; "entropy" = the mean of -sum_d g ln(g + 1e-10); "lasso" = half the sum of |f| over all values
            of the raw features, whatever `norm` and `shrink`.

    Returns:
        Scalar. "ratio" is 0 if the sum of all g is not positive. Positions without any feature, and for "class_max"
        those of a class whose largest value is not positive, add 0 to it: the authors' code divides by nearly nothing.

    Raises:
        ValueError: unknown option, or sizes that do not fit.
    """
    _check(features, label)
    features = full_precision(features)
    if measure == "lasso":
        return features.abs().sum() / 2
    scaled = _normalised(features, label, norm, ignored)
    if measure == "entropy":
        return -(scaled * torch.log(scaled + 1e-10)).sum(dim=1).mean()
    shrunk = {"exponential": torch.exp, "squared": torch.square, "cubed": lambda g: g**3}
    if measure != "ratio" or shrink not in shrunk:
        raise ValueError(f"sparsity: unknown measure or shrink: {measure!r}, {shrink!r}")
    left_out = (scaled == 0).all(dim=1)  # (B, h, w), positions without any feature
    sums = scaled.sum(dim=1) + _TINY
    ratio = shrunk[shrink](scaled).sum(dim=1) / torch.where(left_out, 1, sums)
    counts = ~left_out & (scaled.sum() > 0)
    return torch.where(counts, ratio, 0).mean()


def _normalised(features: Tensor, label: Tensor, norm: str, ignored: int) -> Tensor:
    """Features g (B, D, h, w) that `sparsity` measures."""
    if norm == "class_max":
        index = torch.where(label == ignored, 0, label.long() + 1).flatten()  # ignored counts as a class
        peaks = features.amax(dim=1).flatten()
        largest = peaks.new_zeros(ignored + 1).scatter_reduce(0, index, peaks, "amax", include_self=False)
        divisor = largest[index].view_as(label)[:, None]
        return torch.where(divisor > 0, features / torch.where(divisor > 0, divisor + _TINY, 1), 0)
    if norm == "channel_max":
        return features / (features.amax(dim=1, keepdim=True) + _TINY)
    if norm == "batch_max":
        return features / (features.amax() + _TINY)
    if norm in ("l1", "l2"):
        return F.normalize(features, p=float(norm[1]), dim=1)
    if norm == "softmax":
        return features.softmax(dim=1)
    raise ValueError(f"sparsity: unknown norm {norm!r}")


def _counted(by_class: ByClass, background: bool) -> Tensor:
    """(C,) bool, the classes that attraction and repulsion count."""
    if background:
        return by_class.present
    return by_class.present & (torch.arange(len(by_class.count), device=by_class.count.device) > 0)


def _order(scrambled: bool) -> Literal["channels", "scrambled"]:
    return "scrambled" if scrambled else "channels"


def _check(features: Tensor, label: Tensor) -> None:
    if features.dim() != 4 or label.shape != (features.shape[0], *features.shape[2:]):
        raise ValueError(
            f"expected features (B, D, h, w) and a label (B, h, w) at their size, got {tuple(features.shape)} and "
            f"{tuple(label.shape)}; see label_at"
        )


def _checked(prototypes: Tensor, features: Tensor) -> Tensor:
    """Prototypes (C, D) without gradient, in the features' type."""
    if prototypes.dim() != 2 or features.dim() != 4 or prototypes.shape[1] != features.shape[1]:
        raise ValueError(
            f"expected prototypes (C, {features.shape[1]}), one row per class, got {tuple(prototypes.shape)}"
        )
    return prototypes.detach().to(full_precision(features))
