"""Fine-tuning, the lower bound; on a joint scenario the upper bound."""

from __future__ import annotations

from dataclasses import dataclass

from everseg.methods.base import Method
from everseg.methods.terms import at_label_size, label_terms


@dataclass(kw_only=True)
class FineTuning(Method):
    """Learn the labels of the step and nothing else."""

    bce: bool = False
    """Sigmoid cross-entropy summed over classes instead of softmax cross-entropy."""

    def losses(self, batch, ctx):
        student = ctx.student(batch)
        yield at_label_size(label_terms(student.logits, batch, ctx, bce=self.bce), student, batch)
