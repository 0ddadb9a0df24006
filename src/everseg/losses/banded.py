"""All pixel-wise losses of a branch in one pass over bands of rows, without tensors of full resolution."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from everseg.labels import ignored_id
from everseg.losses.bilinear import BandedResize, banded_resize
from everseg.losses.classification import cross_entropy, unbiased_cross_entropy
from everseg.losses.closed_form import Buffers, ClosedForm
from everseg.losses.forms import Parts, Pixels, parts_of, shift_invariant
from everseg.losses.pixelwise import Over, checked_label, checked_logits, checked_teacher
from everseg.types import LossTerms

_BAND_BYTES, _LARGE_BAND_BYTES = 2**20, 2**26
"""Size of a band of student logits that is looked for: on the CPU it and its like stay in a core's cache (measured);
on other devices there should be few."""
_WHOLE_BYTES, _STRIPE_BYTES = 2**25, 2**24
"""Rows of an image (C, H, w) up to the first size are resized at once; larger ones in stripes of about the second, so
that memory does not follow classes times rows."""
_CLOSED_ON = frozenset({"cpu"})
"""Devices on which closed forms are used: they look for underflow after every band, which waits for the device."""


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
        image_weight: (B,) factor of every pixel of an image, without gradient; None = 1. It does not enter the
            divisor: an image with a small weight counts less in the whole, as in PLOP's adaptive factor.
    """

    loss: Callable[..., Tensor]
    _: KW_ONLY
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    mask: Tensor | None = None
    over: Over = "all"
    image_weight: Tensor | None = None

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
    accumulated in the same pass. Where the total is not the plain sum of the terms, backward makes a second pass.

    On the CPU terms that have a closed form (see `forms`) are evaluated by it; other devices, and other terms, get
    the plain functions with autograd, a band at a time. Nothing waits for the device.

    Args:
        terms: by name; none of the names or terms depends on another.
        logits: student, (B, C, h, w), any resolution; half precision is computed in float32.
        label: (B, H, W) integers in [0, C), or 255 = ignored. Where no term reads it, only its size counts.
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
    if any(term.reads("label") for term in terms.values()):
        label = checked_label("pixelwise_losses", label, _at_size(logits, size))
    if teacher_logits is not None:
        teacher_logits = checked_logits("pixelwise_losses: teacher", teacher_logits)
        checked_teacher("pixelwise_losses", _at_size(teacher_logits, size), _at_size(logits, size))
        teacher_logits = teacher_logits.detach().to(logits)
    plan = _Plan(terms, logits, label, teacher_logits, band, align_corners)
    # Autograd sees one operation from the small logits to the values of all terms: it keeps neither the bands nor
    # anything made of them.
    values = _Banded.apply(logits, plan, logits.requires_grad and torch.is_grad_enabled())
    return dict(zip(terms, values, strict=True))


def _at_size(logits: Tensor, size: torch.Size) -> Tensor:
    """What the resized logits would be, shape and type, without memory."""
    return logits.new_empty(()).expand(*logits.shape[:2], *size)


class _Banded(torch.autograd.Function):
    """Loss terms whose gradient on the small logits is computed along with them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, plan: _Plan, needs_grad: bool) -> tuple[Tensor, ...]:
        values, grad = plan.run(logits, None, needs_grad)
        if needs_grad:
            ctx.plan = plan
            ctx.save_for_backward(logits, grad)
        return tuple(
            value.clone() for value in values
        )  # rows of one tensor may not leave a Function as outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "pixelwise_losses is differentiable once: no create_graph=True; for second derivatives, "
                "upsample the logits and call the losses themselves"
            )
        logits, grad = ctx.saved_tensors
        # The gradient in memory is that of the plain sum of the terms. `sum(losses).backward()` hands every term the
        # very same scalar, which its address shows; reading the values instead would wait for the device.
        if len({value.data_ptr() for value in grads}) == 1:
            return grad * grads[0], None, None
        # Each term has a factor of its own (somebody weighed them after the call): walk over the bands once more.
        return ctx.plan.run(logits, torch.stack(grads), True)[1], None, None


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
        self.num_old = 0 if teacher_logits is None else teacher_logits.shape[1]
        # What multiplies the loss of every pixel: the term's weight and the mean's divisor in one, so that a band needs
        # to know nothing of the other bands.
        self.factors = [term.weight / _divisor(term, label, logits) for term in self.terms]
        self.options = [_ready(term.options, logits) for term in self.terms]
        size = label.shape[1:]
        row = (
            logits.shape[1] * size[1] * logits.element_size()
        )  # bytes of one full row of logits, all classes
        bytes_wanted = _BAND_BYTES if logits.device.type == "cpu" else _LARGE_BAND_BYTES
        self.rows = min(size[0], band or max(1, bytes_wanted // row))
        self.stripes = _stripes(logits, size[0], self.rows)
        self.resize = banded_resize(logits.shape[2:], size, align_corners, logits.dtype, logits.device)
        if teacher_logits is not None:
            self.resize_teacher = banded_resize(
                teacher_logits.shape[2:], size, align_corners, logits.dtype, logits.device
            )
        # One made-up pixel tells which statistics the terms are made of; which ones does not depend on the pixel.
        pixel = Pixels(label.new_zeros(1), logits.shape[1], self.num_old)
        parts = self.parts(pixel, [logits.new_ones(1)] * len(terms))
        # Softmax does not change when all logits of a pixel are shifted. If every statistic is of that kind, the
        # largest logit is subtracted once at small resolution (cheap: at most a quarter of the pixels), and no band has
        # to look for its own. Bilinear resizing keeps the shifted logits at or below 0, so no exponential overflows.
        self.shifted = logits[0, 0].numel() < label[0].numel() // 4 and all(
            listed is not None and all(shift_invariant(stat) for stat, _ in listed) for listed in parts
        )

    def parts(self, at: Pixels, factors: list[Tensor]) -> list[Parts | None]:
        """The parts of every term at some pixels, times factors (P,); None for a term without form here."""
        if at.label.device.type not in _CLOSED_ON:
            return [None] * len(factors)
        return [
            parts_of(term.loss, options, at, factor)
            for term, options, factor in zip(self.terms, self.options, factors, strict=True)
        ]

    def run(self, logits: Tensor, scales: Tensor | None, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
        """Evaluate all terms.

        Args:
            logits: student, small.
            scales: factor of each term in the gradient, (n,); None = 1.
            needs_grad: whether to compute it.

        Returns:
            Values (n,), and the gradient of their sum on the small logits.
        """
        factors = [
            factor.to(logits) if isinstance(factor, Tensor) else logits.new_full((), factor)
            for factor in self.factors
        ]
        if scales is not None:
            factors = [factor * scale for factor, scale in zip(factors, scales, strict=True)]
        grad = torch.zeros_like(logits) if needs_grad else None
        values = torch.zeros(len(self.terms), dtype=torch.float64, device=logits.device)
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            spare: list[Buffers] = []  # handed from image to image: a call allocates once per thread
            for number, here in product(range(logits.shape[0]), self.stripes):
                stripe = _Stripe(self, number, here, factors, logits[number], spare, needs_grad)
                on_all_threads(stripe.work, logits.device)
                # Summed in the order of the bands, whichever thread did which: the same digits every time.
                values += torch.stack(stripe.values).sum(dim=0)
                if grad is not None and stripe.grad_rows is not None:
                    part = self.resize.rows_adjoint(stripe.grad_rows, here)
                    if len(self.stripes) == 1:
                        grad[number] = part
                    else:  # neighbouring stripes share the small rows between them
                        grad[number, :, self.resize.sources(here)] += part
        return values.to(logits.dtype), grad


class _Stripe:
    """Some rows of one image of a call; all of them, unless that takes much memory."""

    def __init__(
        self,
        plan: _Plan,
        number: int,
        here: slice,
        factors: list[Tensor],
        logits: Tensor,
        spare: list[Buffers],
        needs_grad: bool,
    ) -> None:
        self.plan, self.number, self.factors, self.needs_grad = plan, number, factors, needs_grad
        self.label = plan.label[number, here]  # (R, W)
        self.here = here
        self.rows = _rows(plan.resize, logits, here, plan.shifted)  # (C, R, w)
        self.rows_teacher = None
        if plan.teacher is not None:
            self.rows_teacher = _rows(
                plan.resize_teacher, plan.teacher[number], here, plan.shifted
            )  # (K, R, w)
        self.grad_rows = (
            self.rows.new_empty(self.rows.shape) if needs_grad else None
        )  # (C, R, w), filled band by band
        bands = range(0, len(self.label), plan.rows)
        self.values = [torch.empty(0)] * len(bands)
        """Of every term, by band."""
        # One iterator for all threads: `next` of it is atomic, so each band is taken exactly once.
        self._todo, self._spare = iter(enumerate(bands)), spare

    def work(self) -> None:
        """Take bands until none is left."""
        pixels = self.plan.rows * self.label.shape[1]
        try:  # rather than ask first: another thread may take the last one in between
            buffers = self._spare.pop()
        except IndexError:
            buffers = Buffers(pixels, self.rows)
        for number, start in self._todo:
            self.values[number] = self._band(slice(start, start + self.plan.rows), buffers)
        self._spare.append(buffers)

    def _band(self, here: slice, buffers: Buffers) -> Tensor:
        """Values of all terms over a band of the stripe's rows, (n,) float64; its gradient goes into `grad_rows`."""
        plan = self.plan
        label = self.label[here].reshape(-1)  # (P,), P = rows of the band times W
        factors = []  # of each term, (P,)
        for term, factor in zip(plan.terms, self.factors, strict=True):
            mask = (
                None if term.mask is None else term.mask[self.number, self.here][here].reshape(-1).to(factor)
            )
            if term.image_weight is not None:
                factor = factor * term.image_weight[self.number].to(factor)
            factors.append(factor.expand(len(label)) if mask is None else mask * factor)
        x = self._full(plan.resize, "logits", self.rows[:, here], buffers)  # (C, P)
        t = None
        if self.rows_teacher is not None:
            t = self._full(plan.resize_teacher, "teacher", self.rows_teacher[:, here], buffers)  # (K, P)
        grad = buffers.view("grad", *x.shape)
        parts = plan.parts(Pixels(label, len(x), plan.num_old), factors)
        closed = ClosedForm(x, t, grad, buffers, needs_grad=self.needs_grad, shifted=plan.shifted)
        values = closed.evaluate([listed or [] for listed in parts])
        # Left for autograd: terms without closed form; and all of them in a band where exponentials underflow, since
        # the closed form takes logarithms of sums of exponentials, and the plain functions do not.
        left = [number for number, listed in enumerate(parts) if values is None or listed is None]
        if values is None:
            values = torch.zeros(len(parts), dtype=torch.float64, device=x.device)
            grad.zero_()  # the closed form has written into it before it gave up
        for number in left:
            values[number] += self._by_autograd(plan.terms[number], x, t, label, factors[number], grad)
        if self.grad_rows is not None:
            plan.resize.columns_adjoint(grad, self.grad_rows[:, here])
        return values

    def _full(self, resize: BandedResize, name: str, band: Tensor, buffers: Buffers) -> Tensor:
        """A band (C, r, w) at full width, (C, r * W): itself where it has it already, or in a buffer."""
        if resize.keeps_columns:
            return band.flatten(1)
        out = buffers.view(name, band.shape[0], band.shape[1] * self.label.shape[1])
        resize.columns(band, out)
        return out

    def _by_autograd(
        self, term: Term, x: Tensor, t: Tensor | None, label: Tensor, factor: Tensor, grad: Tensor
    ) -> Tensor:
        """A term's value, from its plain function; its gradient is added to `grad` (C, P)."""
        shape = (-1, self.label.shape[1])
        logits = x.view(1, len(x), *shape).detach().requires_grad_(self.needs_grad)
        teacher = None if t is None else t.view(1, len(t), *shape)
        with torch.set_grad_enabled(self.needs_grad):
            value = torch.dot(term.per_pixel(logits, label.view(1, *shape), teacher).reshape(-1), factor)
        if self.needs_grad:
            grad += torch.autograd.grad(value, logits)[0].view(grad.shape)
        return value.detach()


def on_all_threads(work: Callable[[], None], device: torch.device) -> None:
    """Do a work that several threads can share, on as many as torch may use on the CPU.

    Each operation then runs on one thread. Bands are small: threads that share every operation would wait for each
    other after each, and long where other processes want the cores too (measured).
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        work()
        return

    def of_one_thread() -> None:
        with torch.no_grad():  # gradient mode belongs to a thread, and a new one begins with it switched on
            work()

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(of_one_thread) for _ in range(threads)]:
                done.result()
    finally:
        torch.set_num_threads(threads)


def _stripes(logits: Tensor, height: int, band: int) -> list[slice]:
    """Cut the rows of an image into stripes, each of whole bands; one stripe where that is small enough."""
    if logits.shape[2] == height:  # nothing is resized, so nothing of that size is made
        return [slice(0, height)]
    row = logits.shape[1] * logits.shape[3] * logits.element_size()
    step = height if row * height <= _WHOLE_BYTES else max(1, _STRIPE_BYTES // (row * band)) * band
    return [slice(start, min(start + step, height)) for start in range(0, height, step)]


def _rows(resize: BandedResize, logits: Tensor, stripe: slice, shifted: bool) -> Tensor:
    """A stripe (C, R, w) of the logits (C, h, w); shifted: less the largest logit of each small pixel."""
    logits = logits[:, resize.sources(stripe)]
    return resize.rows(logits - logits.amax(dim=0) if shifted else logits, stripe)


def _check(name: str, term: Term, logits: Tensor, label: Tensor, teacher_logits: Tensor | None) -> None:
    """Refuse what the loss refuses, by applying it to one pixel of zeros."""
    if term.over not in ("all", "valid"):
        raise ValueError(f"{name}: over: expected 'all' or 'valid', got {term.over!r}")
    if term.mask is not None and term.mask.shape != label.shape:
        raise ValueError(
            f"{name}: expected a mask of shape {tuple(label.shape)}, got {tuple(term.mask.shape)}"
        )
    if term.image_weight is not None and term.image_weight.shape != label.shape[:1]:
        raise ValueError(
            f"{name}: expected an image_weight of shape {tuple(label.shape[:1])}, got {tuple(term.image_weight.shape)}"
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
        ignored = label == ignored_id(logits.shape[1])
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
