"""Original names of a model's tensors, and a record of what happens to them while MDIL's runs are replayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everseg.interop import mdil
from everseg.models.model import SegmentationModel
from everseg.types import SegOutput


def original_names(model: SegmentationModel, prefix: str = "module.") -> dict[str, str]:
    """Our name of a weight or buffer -> the original's."""
    return dict(zip(model.state_dict(), mdil.dump(model, prefix), strict=True))


def original_state(model: SegmentationModel, prefix: str = "module.") -> dict[str, Tensor]:
    """The model's own tensors under the original names."""
    names = original_names(model, prefix)
    return {names[name]: value for name, value in model.state_dict().items()}


class Watch:
    """Records the outputs, and at each update of the optimiser its rates, the gradients and the weights.

    Args:
        student: the model trained.
        teacher: the frozen one, if any.
        optimizer: of the student.
        names: original names of the weights, in the order of the rows.
    """

    def __init__(
        self,
        student: SegmentationModel,
        teacher: SegmentationModel | None,
        optimizer: torch.optim.Optimizer,
        names: list[str],
    ) -> None:
        table = original_names(student)
        own = {table[name]: weight for name, weight in student.named_parameters()}
        self._own = [own[name] for name in names]
        self.sizes = [weight.numel() for weight in self._own]
        self._optimizer = optimizer
        self.rates: list[list[float]] = []
        self.gradients: list[list[tuple[float, float]]] = []
        self.weights: list[list[float]] = []
        self._student: dict[str, SegOutput] = {}
        self._teacher: dict[str, SegOutput] = {}
        self._handles = [
            student.register_forward_hook(lambda *args: self._student.update(args[-1])),
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        if teacher is not None:
            self._handles.append(teacher.register_forward_hook(lambda *args: self._teacher.update(args[-1])))

    def take(self) -> tuple[dict[str, SegOutput], dict[str, SegOutput]]:
        """Give and forget the newest outputs of student and teacher."""
        outputs = dict(self._student), dict(self._teacher)
        self._student.clear()
        self._teacher.clear()
        return outputs

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, *_: Any) -> None:
        self.rates.append([group["lr"] for group in self._optimizer.param_groups])
        grads = [weight.grad for weight in self._own]
        self.gradients.append(
            [(-1.0, -1.0) if g is None else (float(g.norm()), float(g.sum())) for g in grads]
        )

    def _after(self, *_: Any) -> None:
        self.weights.append([float(weight.detach().norm()) for weight in self._own])
