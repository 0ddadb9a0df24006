"""PLOP: learning without forgetting by pseudo-labels and local distillation of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from everseg.losses import pixelwise_losses
from everseg.losses.pod import Cells, Channels
from everseg.losses.pseudo import EntropyNorm
from everseg.losses.thresholds import Median
from everseg.methods.base import Method
from everseg.methods.plop_terms import PodRule, Pseudo, PseudoRule, find_thresholds, pod_term, pseudo_terms
from everseg.methods.terms import Weight, init_backgrounds

Share = Annotated[float, Field(ge=0, le=1)]
Scales = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


@dataclass(kw_only=True)
class PLOP(Method):
    """Label old classes by the teacher where it is certain, and keep pooled features of all depths in place.

    Source: Douillard et al., CVPR 2021: local POD eq. 3-6, pseudo-labels eq. 7-8, adaptive factor eq. 9. The defaults
    are those of the authors' code on VOC, whose entropies and thresholds differ from the paper's.
    """

    uses_teacher: ClassVar[bool] = True

    pod_weight: Weight = 0.01
    """Factor of local POD on the encoder's stages and the decoder's map (VOC 0.01, ADE 0.001)."""
    pod_logits_weight: Weight | None = 0.0005
    """Factor of local POD on the logits (VOC 0.0005, ADE 0.00001); null leaves them out."""
    pod: Literal["local", "spatial"] = "local"
    """Cells at several scales, or sums over whole rows and columns, without the logits."""
    pod_scales: Scales = (1, 2, 4)
    """Numbers of cells along each axis."""
    pod_square: bool = True
    """Square the maps before they are pooled."""
    pod_cells: Cells = "both"
    """Cells share height and width; or the width alone, as in the authors' code. Square maps give the same."""
    pod_new_logits: Channels = "sum"
    """New classes' logits are added to the background's before the comparison, or left out ("trim")."""
    pod_schedule: bool = True
    """Multiply POD by sqrt(all classes / new classes)."""
    pseudo: Pseudo = "entropy"
    """Accept the teacher's class by its entropy, or its probability, against a threshold of each class ("median");
    by its probability against one threshold; always, weighted by its probability ("confidence") or not ("naive");
    or never ("none")."""
    threshold: Annotated[float, Field(ge=0)] = 0.001
    """Least threshold for "entropy", largest for "median" (the authors' default 0.9), the one for "threshold"."""
    bins: Annotated[int, Field(ge=1)] | None = None
    """Bins of the histograms that thresholds come from; null = 100 for "entropy", 20 for "median"."""
    median: Median = "official"
    """The authors' loop over the bins, which adds bin numbers instead of counts, or the exact median."""
    finite_thresholds: bool = False
    """Replace thresholds of nan (rejects everything) and inf (accepts everything) by the base."""
    entropy_norm: EntropyNorm = "code"
    """Scale of the entropy: the code's H / (K ln K ln C), or the paper's H / ln K."""
    rejected: Literal["ignored", "kept", "soft"] = "ignored"
    """Old pixels that are not accepted: ignored, learnt as background, or the authors' soft term."""
    learn: Literal["all", "agreeing", "new"] = "all"
    """Pixels that are learnt: all; without accepted ones that contradict the label; or those of new classes alone."""
    adaptive_factor: bool = True
    """Multiply each image's loss by its share of accepted old pixels."""
    min_factor: Share = 0.0
    """Least adaptive factor."""
    empty_factor: Share | None = None
    """Adaptive factor of an image without old pixels; null = 0, as in the authors' code: nothing of it is learnt."""
    unbiased_ce: bool = False
    """Learn what is not accepted by MiB's unbiased cross-entropy."""
    init_background: bool = True
    """Start the new classifiers from the background's, as MiB does."""

    def __post_init__(self) -> None:
        if self.unbiased_ce and (self.pseudo == "confidence" or self.rejected != "ignored"):
            raise ValueError(
                "unbiased_ce: it says how pixels that are not accepted are learnt, so it does not go with "
                "pseudo=confidence, rejected=kept or rejected=soft"
            )
        self.thresholds: dict[str, Tensor] = {}

    def prepare_model(self, model, step):
        super().prepare_model(model, step)
        if self.init_background:
            init_backgrounds(model, step)

    def begin_step(self, ctx):
        if not self.thresholds:  # else they come from a checkpoint inside this step
            self.thresholds = find_thresholds(ctx, PseudoRule.of(self))

    def losses(self, batch, ctx):
        student, teacher = ctx.compare(batch, taps=("before_activation",) if ctx.taught(batch) else ())
        own, known = student[batch.branch].logits, teacher.get(batch.branch)
        terms, label = pseudo_terms(own, known, batch, ctx, PseudoRule.of(self), self.thresholds)
        learnt = pixelwise_losses(terms, own, label, known and known.logits)
        yield learnt | pod_term(student, teacher, ctx, PodRule.of(self))

    def end_step(self, ctx):
        self.thresholds = {}  # they belong to the step

    def state_dict(self):
        return {f"thresholds/{branch}": value for branch, value in self.thresholds.items()}

    def load_state_dict(self, state):
        self.thresholds = {key.removeprefix("thresholds/"): value.clone() for key, value in state.items()}
