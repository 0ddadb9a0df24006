"""Keep losses, gradients and weights that are not finite away from the model and the disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from everseg.distributed import all_reduce_max, all_reduce_sum
from everseg.errors import DivergedError, some


@dataclass
class _Seen:
    """One check, as tensors that the host has not read yet."""

    iteration: int
    ids: tuple[str, ...]
    names: tuple[str, ...]
    values: Tensor
    """(n + 1,) float: the terms, then the gradient's norm."""


class Guard:
    """Stops on a loss or gradient that is not finite, before any weight is changed by it.

    On the CPU every check is read at once. On other devices that would make the host wait in every iteration. There a
    flag on the device makes the fused optimiser skip all updates from the first bad check on, and `look` reads the
    checks later: the weights are still those before the first bad one. With fp16 the loss scaler answers overflows.

    Args:
        model: holds the weights trained: the unwrapped student, alone or with others beside it.
        optimizer: fused, as `make_optimizer` builds it.
        accelerator: processes and device.
        scaled: losses are scaled (fp16); the scaler handles gradients that are not finite.
        where: the step, for messages.
        remedy: end of the messages.
        end: called before an error is raised.
        unscale: divides the gradients by the scale of the losses (fp16) before they are clipped.
        cut: the model is this process's part of one that is cut over the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        scaled: bool,
        where: str,
        remedy: str,
        end: Callable[[], None],
        unscale: Callable[[], None] = lambda: None,
        cut: bool = False,
    ) -> None:
        self.model, self.optimizer, self.accelerator, self.scaled = model, optimizer, accelerator, scaled
        self.where, self.remedy, self.end, self.unscale = where, remedy, end, unscale
        self.cut = cut
        self.at_once = accelerator.device.type == "cpu"
        """Whether reading a value costs nothing."""
        self.norm = math.nan
        """Gradient norm of the last check that was read. It is the norm before any clipping."""
        self.average: Mapping[str, Tensor] = {}
        """Averages of the weights that `check_weights` looks at as well."""
        self._bad = torch.zeros((), device=accelerator.device)
        self._seen: list[_Seen] = []

    def watch(self, iteration: int, ids: tuple[str, ...]) -> Callable[[dict[str, Tensor]], None]:
        """Make the check of one iteration.

        Args:
            iteration: its number.
            ids: the batch's images.
        """

        def check(terms: dict[str, Tensor]) -> None:
            if terms:
                self._check(terms, iteration, ids)

        return check

    @torch.no_grad()
    def clip(self, limit: float, iteration: int, ids: tuple[str, ...]) -> None:
        """Scale all gradients down, together, so that their norm is at most `limit`.

        The gradients are checked once more first: scaling could turn one that is infinite into 0. As torch's
        `clip_grad_norm_`: the factor is limit / (norm + 1e-6), at most 1.

        Raises:
            DivergedError: as `look`.
        """
        self.unscale()
        norm = self._check({}, iteration, ids)
        gradients = self._gradients()
        if gradients:
            torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _check(self, terms: dict[str, Tensor], iteration: int, ids: tuple[str, ...]) -> Tensor:
        gradients = self._gradients()
        # The norm of all gradients is not finite as soon as one element is not: one number stands for all of them.
        norms = torch._foreach_norm(gradients) if gradients else [self._bad.new_zeros(())]
        norm = torch.linalg.vector_norm(torch.stack([*norms]))
        if self.cut:  # in float64, in which the square of a float32 is finite
            norm = all_reduce_sum(self.accelerator)(norm.double().square()).sqrt().to(norm)
        values = torch.stack([term.detach().to(norm) for term in terms.values()] + [norm])
        self._seen.append(_Seen(iteration, ids, tuple(terms), values))
        if self.at_once:
            self.look()
        elif not self.scaled:
            # Once 1, it stays 1. Fused optimisers read `found_inf` on the device, as they do for a loss scaler.
            self._bad = torch.maximum(self._bad, 1 - values.isfinite().all().to(self._bad))
            self.optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        return norm

    def look(self) -> None:
        """Read the checks made since the last look.

        Raises:
            DivergedError: names the first bad iteration and its images.
        """
        if not self._seen:
            return
        rows = [one.values.tolist() for one in self._seen]
        self.norm = rows[-1][-1]
        # With a loss scaler only the terms are judged: an infinite gradient norm is part of its search for a scale.
        judged = [row[:-1] if self.scaled else row for row in rows]
        bad = next((i for i, row in enumerate(judged) if not all(map(math.isfinite, row))), None)
        seen, self._seen = self._seen, []
        # All processes stop together: one that ended alone would leave the others waiting for its gradients.
        if not all_reduce_max(int(bad is not None), self.accelerator):
            return
        state = "It changed no weight" if self.at_once or not self.scaled else "None of it was saved"
        if bad is None:
            span = f"iterations {seen[0].iteration} to {seen[-1].iteration}"
            self._stop(f"{span}: not finite on another process", seen[-1].ids, f"{state}.")
        one, row = seen[bad], rows[bad]
        told = [f"{name}={value:g}" for name, value in zip(one.names, row, strict=False)]
        told.append(f"gradient norm {row[-1]:g}")
        self._stop(
            f"iteration {one.iteration}: not finite: {', '.join(told)}",
            one.ids,
            f"{state}; checkpoints before it are whole.",
        )

    def check_weights(self, iteration: int, ids: tuple[str, ...]) -> None:
        """Stop before weights or running statistics that an update made infinite are written to disk.

        Raises:
            DivergedError: names them.
        """
        self.look()
        state = {
            **self.model.state_dict(),
            **{f"average of {name}": value for name, value in self.average.items()},
        }
        bad = [name for name, value in state.items() if not bool(value.isfinite().all())]
        if all_reduce_max(int(bool(bad)), self.accelerator):
            found = some(bad, 5) or "on another process"
            self._stop(
                f"iteration {iteration}: the update left weights that are not finite: {found}",
                ids,
                "They were not saved; checkpoints before it are whole.",
            )

    def _stop(self, what: str, ids: tuple[str, ...], state: str) -> NoReturn:
        self.end()
        raise DivergedError(
            f"{self.where}, {what}\nimages of the batch: {', '.join(ids)}\n{state} {self.remedy}"
        )
