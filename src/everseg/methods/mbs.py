"""Mitigating Background Shift, for networks with class tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from everseg.losses import (
    Term,
    completed_labels,
    distillation,
    feature_distillation,
    moved_distillation,
    old_share,
    pixelwise_losses,
    token_orthogonality,
    weighted_feature_distance,
    without_doubted,
)
from everseg.losses.prototypes import label_at
from everseg.methods.base import Method
from everseg.methods.plop_terms import Share, hides_old
from everseg.methods.terms import Weight, label_terms
from everseg.models.token_head import CLASSES, PATCHES, TOKENS


@dataclass(kw_only=True)
class MBS(Method):
    """Complete the labels, ignore what the teacher doubts, and keep outputs, features and class tokens.

    The background of the labels gets the teacher's classes where it is certain, and is ignored where the teacher rather
    sees some class. The teacher's outputs are kept, its background's share moved to the new class where one is
    labelled; the features of each cell as far as the teacher sees nothing new there; and each new class's token turns
    away from the others'.

    Source: Park et al., ECCV 2024, with the weights of the authors' code. Their network's attention was not at hand.
    """

    uses_teacher: ClassVar[bool] = True
    reads_tokens: ClassVar[bool] = True

    threshold: Share = 0.7
    """Least probability at which the teacher's class is taken (authors' code: 0.7)."""
    ignore_doubted: bool = True
    """Ignore background where the teacher's other classes together are likelier than its background."""
    kd_weight: Weight = 25.0
    """Weight of the distillation of outputs (authors' code: 25)."""
    moved: bool = True
    """The teacher's background goes to the new class where one is labelled; false = plain distillation."""
    feature_weight: Weight = 1.0
    """Weight of the squared distance of the cells' features (authors' code: 1)."""
    adaptive: bool = True
    """Weigh each cell's features by what the teacher sees there; false = all alike."""
    class_weight: Weight = 1.0
    """Weight of the squared distance of the old classes' features (authors' code: 1)."""
    orthogonality_weight: Weight = 1.0
    """Weight of the cosines of new class tokens with all others (authors' code: 1)."""

    def targets(self, batch, ctx, teacher):
        """What the cross-entropy learns (B, H, W): the labels, completed by the teacher and without what it doubts."""
        if teacher is None or not hides_old(ctx, batch.branch):
            return batch.label
        number = ctx.step.spaces[batch.branch].num_classes
        sure = {"threshold": self.threshold, "num_classes": number, "activation": "softmax"}
        label = completed_labels(teacher.logits, batch.label, **sure)
        return without_doubted(teacher.logits, label, num_classes=number) if self.ignore_doubted else label

    def losses(self, batch, ctx):
        teacher, student = ctx.teach(batch), ctx.student(batch)
        logits, label = student.logits, self.targets(batch, ctx, teacher)
        number, hidden = logits.shape[1], hides_old(ctx, batch.branch)
        learnt = {name: replace(t, over="valid") for name, t in label_terms(logits, batch, ctx).items()}
        terms = pixelwise_losses(learnt, logits, label)
        if teacher is None:
            yield terms
            return
        kept = Term(moved_distillation if self.moved and hidden else distillation, weight=self.kd_weight)
        terms |= pixelwise_losses({"kd": kept}, logits, batch.label, teacher.logits)
        ours, theirs = student.features, teacher.features
        if self.adaptive and hidden:
            cells = label_at(label, teacher.logits.shape[2:])
            weight = old_share(teacher.logits, cells, num_classes=number)
            distance = weighted_feature_distance(ours[PATCHES], theirs[PATCHES], weight)
        else:
            distance = feature_distillation(ours[PATCHES], theirs[PATCHES])
        terms["feature"] = self.feature_weight * distance
        num_old = teacher.logits.shape[1]
        terms["class"] = self.class_weight * feature_distillation(ours[CLASSES][:, :num_old], theirs[CLASSES])
        if number > num_old:
            terms["token"] = self.orthogonality_weight * token_orthogonality(ours[TOKENS], num_old)
        yield terms
