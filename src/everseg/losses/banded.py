"""All pixel-wise losses of a branch in one pass over bands of rows, without tensors of full resolution (floor 1)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from everseg.losses.bilinear import BandedResize
from everseg.losses.classification import cross_entropy, unbiased_cross_entropy
from everseg.losses.closed_form import Buffers, ClosedForm
from everseg.losses.forms import Pixels, parts_of, shift_invariant
from everseg.losses.pixelwise import Over, checked_label, checked_logits, checked_teacher
from everseg.types import IGNORED, LossTerms

_BAND_BYTES = 2**21
"""Size of a band of student logits that is looked for: with its like it stays in a core's cache (measured)."""


@dataclass(frozen=True)
class Term:
    """One pixel-wise loss, and how it enters the total.

    Args:
        loss: function of everseg.losses, or any function of `logits` (b, C, r, W) and, where its parameters name
            them, `label` (b, r, W) and `teacher_logits` (b, K, r, W), that gives the loss of each pixel
            (b, r, W), 0 where the pixel is ignored. Where it has a parameter `reduction` it is called with "none".
            Functions without closed form (see `forms`) are differentiated by autograd, a band at a time.
        options: further keyword arguments of the loss.
        weight: factor of the term.
        mask: (B, H, W) bool or float factor of each pixel; None = 1.
        over: "all" divides the sum by all B*H*W pixels; "valid" by what counts: the sum over pixels of mask times,
            for losses that read the label, 1 where it is not ignored, and for the (unbiased) cross-entropy with
            class weights, the weight of the pixel's class.
    """

    loss: Callable[..., Tensor]
    _: KW_ONLY
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    mask: Tensor | None = None
    over: Over = "all"

    def reads(self, name: str) -> bool:
        """Whether the loss has a parameter of that name."""
        return name in inspect.signature(self.loss).parameters

    def per_pixel(self, logits: Tensor, label: Tensor, teacher_logits: Tensor | None) -> Tensor:
        """The loss of each pixel, (b, r, W), without weight and mask."""
        given = {"label": label, "teacher_logits": teacher_logits, "reduction": "none"}
        return self.loss(logits, **{k: v for k, v in given.items() if self.reads(k)}, **self.options)


def pixelwise_losses(
    terms: Mapping[str, Term],
    logits: Tensor,
    label: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    band: int | None = None,
    align_corners: bool = False,
) -> LossTerms:
    """Evaluate pixel-wise losses at the label's resolution from small logits, together and band by band.

    Every number is that of the loss applied to bilinearly resized logits, but nothing of full resolution is made:
    each band of rows is resized, all terms are computed, and the gradient of their sum on the small logits is
    accumulated in the same pass. Terms whose gradients are not equal (the total is not their plain sum) cost a
    second pass in backward.

    Args:
        terms: by name; none of the names or terms depends on another.
        logits: student, (B, C, h, w), any resolution; half precision is computed in float32.
        label: (B, H, W) integers in [0, C), or 255 = ignored.
        teacher_logits: (B, K, h', w') with K <= C; no gradient flows into it. None for losses that read none.
        band: rows per band; None chooses. It changes memory and time, and results in the last digits only.
        align_corners: of the bilinear resizing, for student and teacher.

    Returns:
        One scalar per term, weight applied; differentiable once.

    Raises:
        ValueError: wrong shapes or types, a label out of range (checked on the CPU only), an option that the loss
            refuses, a term that needs a teacher where there is none, or a band below 1.

    >>> logits, label = torch.zeros(1, 4, 1, 1), torch.tensor([[[3, 255], [0, 1]]])
    >>> losses = pixelwise_losses({"ce": Term(cross_entropy, weight=2.0)}, logits, label)
    >>> round(losses["ce"].item(), 4)
    2.0794
    """
    if not terms:
        return {}
    logits = checked_logits("pixelwise_losses", logits)
    if label.dim() != 3:
        raise ValueError(f"pixelwise_losses: expected a label (B, H, W), got shape {tuple(label.shape)}")
    if band is not None and band < 1:
        raise ValueError(f"pixelwise_losses: band must be at least 1 row, got {band}")
    size = label.shape[1:]
    label = checked_label("pixelwise_losses", label, _at_size(logits, size))
    if teacher_logits is not None:
        teacher_logits = checked_logits("pixelwise_losses: teacher", teacher_logits)
        checked_teacher("pixelwise_losses", _at_size(teacher_logits, size), _at_size(logits, size))
        teacher_logits = teacher_logits.detach().to(logits)
    plan = _Plan(terms, logits, label, teacher_logits, band, align_corners)
    values = _Banded.apply(logits, plan, logits.requires_grad and torch.is_grad_enabled())
    return dict(zip(terms, values.unbind(), strict=True))


def _at_size(logits: Tensor, size: torch.Size) -> Tensor:
    """What the resized logits would be, shape and type, without memory."""
    return logits.new_empty(()).expand(*logits.shape[:2], *size)


class _Banded(torch.autograd.Function):
    """Loss terms whose gradient on the small logits is computed along with them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, plan: _Plan, needs_grad: bool) -> Tensor:
        values, grad = plan.run(logits, None, needs_grad)
        if needs_grad:
            ctx.plan = plan
            ctx.save_for_backward(logits, grad)
        return values

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "pixelwise_losses is differentiable once: no create_graph=True; for second derivatives, "
                "upsample the logits and call the losses themselves"
            )
        logits, grad = ctx.saved_tensors
        if (grad_values == grad_values[0]).all():
            return grad * grad_values[0], None, None
        return ctx.plan.run(logits, grad_values, True)[1], None, None


class _Plan:
    """Everything of a call but the student's logits: terms made ready, and the walk over the bands."""

    def __init__(
        self,
        terms: Mapping[str, Term],
        logits: Tensor,
        label: Tensor,
        teacher_logits: Tensor | None,
        band: int | None,
        align_corners: bool,
    ) -> None:
        for name, term in terms.items():
            _check(name, term, logits, label, teacher_logits)
        self.terms = [*terms.values()]
        self.label, self.teacher = label, teacher_logits
        self.factors = [term.weight / _divisor(term, label, logits) for term in self.terms]
        self.options = [_ready(term.options, logits) for term in self.terms]
        height, width = label.shape[1:]
        row = logits.shape[1] * width * logits.element_size()
        self.rows = min(height, band or max(1, _BAND_BYTES // row))
        self.resize = BandedResize(logits.shape[2:], label.shape[1:], align_corners, logits)
        if teacher_logits is not None:
            self.resize_teacher = BandedResize(
                teacher_logits.shape[2:], label.shape[1:], align_corners, logits
            )

    def run(self, logits: Tensor, scales: Tensor | None, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        """Evaluate all terms.

        Args:
            logits: student, small.
            scales: factor of each term in the gradient, (n,); None = 1.
            needs_grad: whether to compute it.

        Returns:
            Values (n,), and the gradient of their sum on the small logits.
        """
        values = torch.zeros(len(self.terms), dtype=torch.float64, device=logits.device)
        grad = torch.empty_like(logits) if needs_grad else None
        factors = (
            self.factors if scales is None else [f * s for f, s in zip(self.factors, scales, strict=True)]
        )
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            buffers = Buffers(self.rows * self.label.shape[2], logits)
            for image in range(logits.shape[0]):
                maps = [
                    self._map(term, image, factor, logits)
                    for term, factor in zip(self.terms, factors, strict=True)
                ]
                small = _Image(self, image, maps, buffers, values).run(logits[image], needs_grad)
                if grad is not None and small is not None:
                    grad[image] = small
        return values.to(logits.dtype), grad

    def _map(self, term: Term, image: int, factor: Tensor | float, logits: Tensor) -> Tensor:
        """Factor of each pixel of an image, (H * W,)."""
        if term.mask is None:
            return logits.new_ones(self.label[image].numel()) * factor
        return term.mask[image].reshape(-1).to(logits) * factor


class _Image:
    """One image of a call: the terms' forms, and the terms that have none."""

    def __init__(self, plan: _Plan, image: int, maps: list[Tensor], buffers: Buffers, values: Tensor) -> None:
        self.plan, self.maps, self.buffers, self.values = plan, maps, buffers, values
        self.label = plan.label[image]
        self.teacher = None if plan.teacher is None else plan.teacher[image]
        self.num_old = 0 if self.teacher is None else self.teacher.shape[0]

    def run(self, logits: Tensor, needs_grad: bool) -> Tensor | None:
        """Add the values of all terms, and give the gradient (C, h, w) on the image's small logits (C, h, w)."""
        plan, (height, width), num_classes = self.plan, self.label.shape, logits.shape[0]
        pixels = Pixels(self.label.reshape(-1), num_classes, self.num_old)
        parts = [
            parts_of(term.loss, options, pixels, map_)
            for term, options, map_ in zip(plan.terms, plan.options, self.maps, strict=True)
        ]
        # softmax does not change with a shift of all logits of a pixel, and a small image is quickly shifted
        shifted = logits[0].numel() < self.label.numel() // 4 and all(
            p is not None and all(shift_invariant(stat) for stat, _ in p) for p in parts
        )
        closed = ClosedForm([p or [] for p in parts], num_classes, logits, self.buffers, shifted)
        rows = plan.resize.rows(_shifted(logits) if shifted else logits)
        rows_teacher = None
        if self.teacher is not None:
            rows_teacher = plan.resize_teacher.rows(_shifted(self.teacher) if shifted else self.teacher)
        grad_rows = rows.new_empty(rows.shape) if needs_grad else None
        left = [number for number, listed in enumerate(parts) if listed is None]
        del parts, pixels  # the maps of a whole image that are not needed on
        for start in range(0, height, plan.rows):
            here = slice(start, min(height, start + plan.rows))
            there = slice(here.start * width, here.stop * width)
            size = there.stop - there.start
            x = self._full(plan.resize, "logits", rows[:, here], size)
            t = None
            if rows_teacher is not None:
                t = self._full(plan.resize_teacher, "teacher", rows_teacher[:, here], size)
            grad = self.buffers.view("exp", num_classes, size)
            by_autograd = left
            if not closed.band(x, t, there, grad, needs_grad):
                by_autograd = [*range(len(plan.terms))]
                grad.zero_()
            for number in by_autograd:
                self._by_autograd(number, x, t, there, grad if needs_grad else None)
            if grad_rows is not None:
                plan.resize.columns_adjoint(grad, grad_rows[:, here])
        closed.add_values(self.values)
        return None if grad_rows is None else plan.resize.rows_adjoint(grad_rows)

    def _full(self, resize: BandedResize, name: str, band: Tensor, size: int) -> Tensor:
        """A band (C, r, w) at full width, (C, r * W): itself where it has it already, or in a buffer."""
        if resize.keeps_columns:
            return band.flatten(1)
        out = self.buffers.view(name, band.shape[0], size)
        resize.columns(band, out)
        return out

    def _by_autograd(
        self, number: int, logits: Tensor, teacher: Tensor | None, there: slice, grad: Tensor | None
    ) -> None:
        """Add a term's value, and its gradient to `grad` (C, P), from its plain function."""
        term, width = self.plan.terms[number], self.label.shape[1]
        x = logits.view(1, logits.shape[0], -1, width).detach().requires_grad_(grad is not None)
        t = None if teacher is None else teacher.view(1, self.num_old, -1, width)
        with torch.set_grad_enabled(grad is not None):
            per_pixel = term.per_pixel(x, self.label.reshape(-1)[there].view(1, -1, width), t)
            value = torch.dot(per_pixel.reshape(-1), self.maps[number][there])
        self.values[number] += value.detach()
        if grad is not None:
            grad += torch.autograd.grad(value, x)[0].view(grad.shape)


def _shifted(logits: Tensor) -> Tensor:
    """The logits (C, h, w) less the largest of each pixel."""
    return logits - logits.amax(dim=0)


def _check(name: str, term: Term, logits: Tensor, label: Tensor, teacher_logits: Tensor | None) -> None:
    """Refuse what the loss refuses, by applying it to one pixel of zeros."""
    if term.over not in ("all", "valid"):
        raise ValueError(f"{name}: over: expected 'all' or 'valid', got {term.over!r}")
    if term.mask is not None and term.mask.shape != label.shape:
        raise ValueError(
            f"{name}: expected a mask of shape {tuple(label.shape)}, got {tuple(term.mask.shape)}"
        )
    if term.reads("teacher_logits") and teacher_logits is None:
        raise ValueError(f"{name}: the loss reads the teacher's logits, and there are none")
    one = (1, 1)
    teacher = None if teacher_logits is None else teacher_logits.new_zeros(1, teacher_logits.shape[1], *one)
    with torch.no_grad():
        result = term.per_pixel(logits.new_zeros(1, logits.shape[1], *one), label.new_zeros(1, *one), teacher)
    if result.shape != (1, *one):
        raise ValueError(
            f"{name}: a pixel-wise loss gives (b, r, W) of (b, C, r, W); for one pixel it gave {tuple(result.shape)}"
        )


def _divisor(term: Term, label: Tensor, logits: Tensor) -> Tensor | int:
    """What the sum over pixels is divided by; 1 where nothing counts."""
    if term.over == "all":
        return label.numel()
    counted = torch.ones_like(label, dtype=logits.dtype) if term.mask is None else term.mask.to(logits)
    if term.reads("label"):
        ignored = label == IGNORED
        weight = term.options.get("weight")
        if weight is not None and term.loss in (cross_entropy, unbiased_cross_entropy):
            # entry 0 is the weight of all old classes in the unbiased form
            old = label < term.options.get("num_old", 0)
            counted = counted * weight.to(logits)[label.masked_fill(ignored | old, 0)]
        counted = counted.masked_fill(ignored, 0)
    total = counted.sum()
    return torch.where(total > 0, total, torch.ones_like(total))


def _ready(options: Mapping[str, Any], logits: Tensor) -> dict[str, Any]:
    """The options with tensors in the logits' type, on their device."""
    return {k: v.to(logits) if isinstance(v, Tensor) else v for k, v in options.items()}
