"""The pre-tuning of new classifiers: each starts as a mixture of the old ones, learnt before the step's training."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.losses.pixelwise import full_precision, upsample
from everseg.methods.base import Method, StepContext
from everseg.methods.terms import at_label_size, background_terms
from everseg.models.heads import GrowingHead, Head
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Step
from everseg.types import Batch, LossTerms, SegOutput

SIDE = 128
"""Height and width at which similarities are measured, whatever the images' size."""


def pretuned_branch(step: Step) -> str | None:
    """Find the branch whose new classifier a pre-tuning prepares.

    Returns:
        The branch that the step trains and gives new classes, beside old ones that include the background; else None.
    """
    branch = step.branch
    old = 0 if step.is_first else step.num_old(branch)
    fits = old and step.grows.get(branch) and step.spaces[branch].background == 0
    return branch if fits and len(step.trained_branches) == 1 else None


def check_classifiers(model: SegmentationModel) -> None:
    """Check that the model's classifiers are of the kind that a pre-tuning can mix.

    Raises:
        ConfigError: they are no 1x1 convolutions with a bias.
    """
    with torch.device("meta"):  # draws no random numbers
        head = cast(GrowingHead, model.heads.make())
        layer = head.make_classifier(1, 1)
    growths = [growth for branch in model.branches for growth in model.head(branch).growths]
    plain = type(head) is GrowingHead and all(growth.head == Head() for growth in growths)
    if not plain or not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or layer.bias is None:
        raise ConfigError(
            "method.pretune: it mixes the rows of 1x1 classifiers with a bias, and this model has others; "
            "take a model such as deeplabv3, or leave method.pretune out"
        )


def pretune(method: Method, ctx: StepContext) -> None:
    """Run the pre-tuning that the method asks for, where the step adds classes to old ones.

    Raises:
        ConfigError: the model's classifiers are of another kind.
    """
    branch = pretuned_branch(ctx.step)
    if branch is None:
        return
    work = Pretuning(ctx, branch, kd_weight=method.pretune_kd_weight, unbiased_ce=method.pretune_unbiased_ce)
    work.start(work.similarity())
    work.tune(method.pretune, method.pretune_lr_scale)
    work.finish()


class Pretuning:
    """The new classifiers of one branch as mixtures of the old ones.

    With N new and K old classes and D channels, row n of the new classifier is sum_k T[n, k] (M[n, k] * W[k]). The
    background's row is T_b (M_b * W[0]), since it must make room for the new classes. All other old rows and all old
    biases are those of the teacher, whatever the method has done to them before.

    Args:
        kd_weight: weight of MiB's distillation beside the class loss; 0 = none.
        unbiased_ce: MiB's cross-entropy, else the plain one.

    Source: Xie et al., "Early Preparation Pays Off", ECCV 2024.
    """

    def __init__(
        self, ctx: StepContext, branch: str, *, kd_weight: float = 0.0, unbiased_ce: bool = True
    ) -> None:
        assert ctx.teacher is not None
        check_classifiers(ctx.module)
        self.ctx, self.branch, self.kd_weight, self.unbiased_ce = ctx, branch, kd_weight, unbiased_ce
        self.head, taught = ctx.module.head(branch), ctx.teacher.head(branch)
        known = [cast(nn.Conv2d, layer) for layer in taught.classifiers]
        with torch.no_grad():
            for layer, old in zip(self.head.classifiers, known, strict=False):
                layer.load_state_dict(old.state_dict())
            self.old_weight = torch.cat([layer.weight.flatten(1) for layer in known])
            """(K, D)"""
            self.old_bias = torch.cat([cast(Tensor, layer.bias) for layer in known])
            """(K,)"""
        self.num_new = self.head.num_classes - len(self.old_weight)
        # As the bias of a layer that was just made: all new classes start with the same one.
        fresh = self.head.make_classifier(self.head.in_channels, 1).bias
        like = self.old_weight
        self.bias = nn.Parameter(cast(Tensor, fresh).detach().to(like).expand(self.num_new).clone())
        """(N,): b."""
        self.channels = nn.Parameter(like.new_ones(self.num_new, *like.shape))
        """(N, K, D): M."""
        self.mixture = nn.Parameter(like.new_zeros(self.num_new, len(like)))
        """(N, K): T."""
        self.background_channels = nn.Parameter(like.new_ones(1, like.shape[1]))
        self.background_mixture = nn.Parameter(like.new_ones(1, 1))

    @torch.no_grad()
    def similarity(self) -> Tensor:
        """Measure how each new class looks to the old classifiers, over one epoch of the training images.

        B[n, k, d] is the mean, over all pixels of class n of all images and processes, of the teacher's probability of
        class k where channel d speaks for class k (feature times weight above 0), else of 0. Labels, logits of the
        image's size and features are brought to `SIDE` x `SIDE` first, labels by nearest neighbour.

        Returns:
            (N, K, D). A class without any pixel takes after the background: 1 for k = 0, else 0.
        """
        ctx, weight = self.ctx, self.old_weight
        num_old, channels = weight.shape
        # Whether feature times weight is above 0 depends on two signs, so sums for either sign of the feature will do.
        sums = torch.zeros(2, self.num_new, num_old, channels, dtype=torch.float64, device=weight.device)
        pixels = torch.zeros(self.num_new, dtype=torch.float64, device=weight.device)
        for batch in ctx.epoch_batches():
            teacher = ctx.teach(batch) if batch.branch == self.branch else None
            if teacher is None:
                continue
            # One image at a time: logits of the image's size are large.
            for logits, maps, label in zip(
                teacher.logits, teacher.features["decoder"], batch.label, strict=True
            ):
                whole = upsample(logits[None], label.shape)
                chances = _at_side(whole).softmax(dim=1)[0].flatten(1)  # (K, pixels)
                features = _at_side(full_precision(maps[None]))[0].flatten(1)  # (D, pixels)
                small = F.interpolate(label[None, None].float(), size=(SIDE, SIDE))[0, 0].flatten()
                for n in range(self.num_new):
                    of_class = small == num_old + n
                    q, f = chances[:, of_class], features[:, of_class]
                    sums[0, n] += q @ (f > 0).to(q).T
                    sums[1, n] += q @ (f < 0).to(q).T
                    pixels[n] += of_class.sum()
        received = ctx.all_reduce(torch.cat([sums.flatten(), pixels]))
        sums, pixels = received[: sums.numel()].view_as(sums), received[sums.numel() :].view(-1, 1, 1)
        agreeing = torch.where(weight > 0, sums[0], torch.where(weight < 0, sums[1], 0.0))
        as_background = torch.zeros_like(agreeing)
        as_background[:, 0] = 1
        return torch.where(pixels > 0, agreeing / pixels, as_background).to(weight)

    @torch.no_grad()
    def start(self, similarity: Tensor) -> None:
        """Begin with M = B, and T = the softmax over old classes of B's sum over channels."""
        self.channels.copy_(similarity)
        self.mixture.copy_(similarity.sum(dim=2).softmax(dim=1))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is tuned."""
        return {
            "channels": self.channels,
            "mixture": self.mixture,
            "bias": self.bias,
            "background_channels": self.background_channels,
            "background_mixture": self.background_mixture,
        }

    def rows(self) -> tuple[Tensor, Tensor]:
        """Mix the old rows: those of the new classes (N, D), and the background's (1, D)."""
        new = (self.mixture.unsqueeze(2) * self.channels * self.old_weight).sum(dim=1)
        return new, self.background_mixture * self.background_channels * self.old_weight[:1]

    def losses(self, batch: Batch) -> LossTerms:
        """Evaluate the class loss, and MiB's distillation if asked for, of the mixed classifiers."""
        with torch.no_grad():  # nothing but the mixture is trained
            features = full_precision(self.ctx.student(batch).features["decoder"])
        new, background = self.rows()
        weight = torch.cat([background, self.old_weight[1:], new])
        logits = F.conv2d(features, weight[:, :, None, None], torch.cat([self.old_bias, self.bias]))
        teacher = self.ctx.teach(batch) if self.kd_weight else None
        terms = background_terms(
            logits, teacher, batch, self.ctx, kd_weight=self.kd_weight, unbiased_ce=self.unbiased_ce
        )
        return at_label_size(terms, SegOutput(logits, {}), batch, teacher)

    def tune(self, epochs: int, lr_scale: float) -> None:
        """Train the mixture. The rate falls before each update, as in the authors' code: the last one is 0."""
        self.ctx.tune(
            self.parameters,
            self.losses,
            epochs=epochs,
            lr_scale=lr_scale,
            rate=lambda iteration, total: (1 - (iteration + 1) / total) ** 0.9,
        )

    @torch.no_grad()
    def finish(self) -> None:
        """Write the mixed rows into the classifiers, as long as the old ones are.

        The background's row gets its old length, the new rows the mean length of the old ones on average, and the
        vector of the new biases the length of that of the old biases. What has no length at all stays as it is.
        """
        new, background = self.rows()
        lengths = self.old_weight.norm(dim=1)
        first, newest = (cast(nn.Conv2d, self.head.classifiers[i]) for i in (0, -1))
        row = _resized(background, lengths[0], background.norm())
        first.weight[:1] = (row if background.norm() > 0 else self.old_weight[:1])[:, :, None, None]
        new = _resized(new, lengths.mean(), new.norm(dim=1).mean())
        newest.weight.copy_(new[:, :, None, None])
        bias = _resized(self.bias, self.old_bias.norm(), self.bias.norm())
        cast(Tensor, newest.bias).copy_(bias)


def _at_side(maps: Tensor) -> Tensor:
    return F.interpolate(maps, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def _resized(values: Tensor, wanted: Tensor, length: Tensor) -> Tensor:
    """Scale values by wanted / length; without any length they stay as they are."""
    return values * torch.where(length > 0, wanted / length, 1.0)
