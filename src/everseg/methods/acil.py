"""SegACIL: a classifier on random features of a frozen network, computed in closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from everseg.errors import ConfigError
from everseg.losses import completed_labels, ridge
from everseg.losses.pixelwise import full_precision
from everseg.losses.prototypes import label_at
from everseg.methods.base import Method, Pass, StepContext, groups_of
from everseg.methods.terms import Positive, at_label_size, has_background, label_terms
from everseg.models.heads import EXPAND, Head
from everseg.models.model import SegmentationModel
from everseg.types import Batch, Readout, SegOutput

Count = Annotated[int, Field(ge=1)]


@dataclass(kw_only=True)
class ACIL(Method):
    """Train the network in the first step only; then solve for the classifier in one pass, without forgetting.

    The classifier is the ridge regression of all labels met so far on relu(B f) of the decoder's map f, B random. Its
    sums are carried from step to step, so after any number of steps it is the one that all of their pixels together
    would give.

    Source: SegACIL (Xu et al., 2024), after ACIL (Zhuang et al., NeurIPS 2022).
    """

    readout: ClassVar[Readout] = Readout("sigmoid", before=True)

    features: Count = 1024
    """Number of random features. Time grows with its square, and so does memory: 8 bytes times its square in a step,
    half of that between steps (authors' results: 16384)."""
    gamma: Positive = 10.0
    """Weight of the squares of the classifier's weights (authors' results: 10)."""
    balance: Annotated[float, Field(ge=0, le=1)] = 0.4
    """How far the classes of a step weigh alike: a pixel counts as its class's number of pixels to the power of minus
    this. 0 = all count once, as in the authors' results; then rare classes hardly ever win. From about 0.5 on, rare new
    classes take pixels from old ones."""
    bce: bool = True
    """The first step learns by sigmoid cross-entropy, as in the authors' code, instead of softmax cross-entropy."""
    encoder_rate: Positive = 0.1
    """Factor on the encoder's learning rate in the first step (authors: 0.1)."""
    pseudo: Literal["value", "sigmoid", "none"] = "value"
    """Old classes are labelled by the model where its output is large enough ("value"), where the output's sigmoid is
    ("sigmoid", the authors' form), or not at all. Outputs lie near 0 and 1."""
    threshold: Annotated[float, Field(ge=0)] = 0.3
    """Least output, or sigmoid of it, that is believed (authors: 0.7, an output of 0.85; 0.9 would be one of 2.2)."""
    unsure: Literal["ignored", "background"] = "ignored"
    """Background pixels where the model sees an old class with less than that are ignored, or learnt as background, as
    in the authors' code. There the labels speak against an old class only because a step does not show it."""
    teacher: Literal["frozen", "live"] = "frozen"
    """The model that labels old classes: that of the step before; or the authors', solved anew after every batch, which
    also labels new classes, and whose result depends on the order of the images."""
    crops: bool = True
    """The pass sees training crops, as the authors' does; or images as tests see them."""
    passes: Count = 1
    """Epochs of the pass; more than one makes sense with crops only."""
    every_image: bool = True
    """The pass sees every image; the authors' drops the last batch where it is not whole."""
    pass_batch: Count = 2
    """Images at once in the pass, over all processes (authors: 2)."""
    precision: Literal["exact", "fast"] = "exact"
    """Products and stored sums in float64; or in float32, added up in float64."""

    def __post_init__(self) -> None:
        self.gram, self.cross = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        self.expansion: Tensor | None = None
        """B until the model has it, (features, d)."""
        self.classes = 0
        self.solves_each_batch = False
        self.weights = torch.zeros(0, dtype=torch.float64)
        """What a pixel of each class counts in this step."""
        if self.teacher == "live" and self.every_image:
            raise ValueError(
                "teacher: a live one sees whole batches only, which all processes take part in; set every_image=false"
            )

    # -- the parts of a step

    def trains(self, step):
        return step.is_first

    def accumulates(self, step):
        return Pass(self.crops, self.every_image, self.passes, self.pass_batch)

    def heads(self, step):
        return {step.branch: Head(expansion=self.features)} if step.is_first else {}

    def prepare_model(self, model, step):
        if len(step.spaces) > 1:
            raise ConfigError(
                "method 'acil' works on one domain only, because its features are frozen after the first step; "
                "for several domains choose a method such as mdil"
            )
        if not step.is_first:
            self._check_expansion(model, step.branch)
        super().prepare_model(model, step)
        self.classes = step.spaces[step.branch].num_classes
        self.solves_each_batch = self.teacher == "live" and not step.is_first
        if step.is_first:
            # Drawn by the engine's seed of the step; the model takes it over at the end of the step.
            limit = model.decoder.out_channels**-0.5
            self.expansion = torch.empty(self.features, model.decoder.out_channels).uniform_(-limit, limit)
        else:
            model.freeze(encoder=True, decoder=True, norm=True)

    def _check_expansion(self, model: SegmentationModel, branch: str) -> None:
        width = model.head(branch).growths[0].head.expansion
        if not width:
            raise ConfigError(
                "method 'acil' can continue only a model that it trained itself; start with it at step 0"
            )
        if width != self.features:
            raise ConfigError(f"method.features: the model has {width} random features; set it to that")

    def param_groups(self, model, step):
        return groups_of(model, (model.encoder, self.encoder_rate))

    def losses(self, batch, ctx):
        student = ctx.student(batch)
        terms = label_terms(student.logits, batch, ctx, bce=self.bce)
        if self.bce:  # the authors' is the mean over pixels that are not ignored
            terms = {name: replace(term, over="valid") for name, term in terms.items()}
        yield at_label_size(terms, student, batch)

    # -- the pass

    def _make_room(self) -> None:
        """Give the sums the size of the step, in float64. Not before the pass: the training needs no such memory."""
        if self.gram.dtype != torch.float64 or len(self.gram) < self.features:
            gram = torch.zeros(self.features, self.features, dtype=torch.float64, device=self.gram.device)
            self.gram = gram if not len(self.gram) else self.gram.double()
        if self.cross.dtype != torch.float64 or self.cross.shape[1] < self.classes:
            cross = torch.zeros(self.features, self.classes, dtype=torch.float64, device=self.cross.device)
            cross[: len(self.cross), : self.cross.shape[1]] = self.cross
            self.cross = cross

    def begin_step(self, ctx):
        """Count the step's labels, for the weights of its classes."""
        if not self.balance:
            return
        counts = torch.zeros(self.classes, dtype=torch.float64, device=next(ctx.module.parameters()).device)
        for batch in ctx.train_batches():
            label = batch.label[batch.label < self.classes]
            counts += torch.bincount(label, minlength=self.classes)
        self.weights = class_weights(ctx.all_reduce(counts), self.balance).cpu()

    def accumulate(self, batch, ctx):
        out = ctx.student(batch)
        features = full_precision(out.features["decoder"])
        label = label_at(self.labels(out, batch, ctx), features.shape[2:])
        known = label < self.classes  # all but ignored pixels
        pixels = features.movedim(1, -1)[known], label[known]
        options: dict[str, Any] = {"weight": self._expansion(ctx), "exact": self.precision == "exact"}
        if self.balance:
            options["of_pixel"] = self.weights.to(features.device)[pixels[1]]
        self._make_room()
        self.gram, self.cross = (one.to(features.device) for one in (self.gram, self.cross))
        if self.solves_each_batch:
            added = torch.zeros_like(self.gram), torch.zeros_like(self.cross)
            ridge.add_pixels(*added, *pixels, **options)
            self.gram += ctx.all_reduce(added[0])
            self.cross += ctx.all_reduce(added[1])
            self._write_weights(ctx)
        else:
            ridge.add_pixels(self.gram, self.cross, *pixels, **options)
        return {"pixels": known.sum(), "condition": ridge.condition_bound(self.gram, self.gamma)}

    def labels(self, out: SegOutput, batch: Batch, ctx: StepContext) -> Tensor:
        """The class of each pixel that is learnt, (B, H, W), old classes by the model where it can be believed."""
        step, branch = ctx.step, batch.branch
        if self.pseudo == "none" or step.is_first or step.protocol == "sequential":
            return batch.label  # in "sequential" the labels show the old classes
        if not has_background(step, branch):
            return batch.label
        outputs = out.logits if self.teacher == "live" else out.logits[:, : step.num_old(branch)]
        return completed_labels(
            outputs.sigmoid() if self.pseudo == "sigmoid" else outputs,
            batch.label,
            num_classes=out.logits.shape[1],
            threshold=self.threshold,
            activation="none",
            ignore_unsure=self.unsure == "ignored",
        )

    def sums(self):
        self._make_room()
        # With the live teacher every process has the totals after each batch.
        return {} if self.solves_each_batch else {"gram": self.gram, "cross": self.cross}

    # -- the solution

    def finish_model(self, ctx):
        self._make_room()  # for a pass without images
        head = ctx.module.head(ctx.step.branch)
        if head.expansion is None:
            drawn = self._expansion(ctx)
            ctx.module.restructure(EXPAND)
            with torch.no_grad():
                cast(nn.Conv2d, head.expansion).weight.copy_(drawn[..., None, None])
        self._write_weights(ctx)

    def _expansion(self, ctx: StepContext) -> Tensor:
        """B, (features, d)."""
        layer = ctx.module.head(ctx.step.branch).expansion
        given = cast(Tensor, self.expansion) if layer is None else layer.weight[..., 0, 0]
        return given.to(next(ctx.module.parameters()).device)

    @torch.no_grad()
    def _write_weights(self, ctx: StepContext) -> None:
        """Solve, and give every classifier of the model its rows."""
        try:
            weights = ridge.ridge_weights(self.gram, self.cross, self.gamma).T  # (C, n)
        except ValueError as error:
            raise ConfigError(f"method.{error}") from None
        head = ctx.module.head(ctx.step.branch)
        for classifier, rows in zip(head.classifiers, weights.split(head.sizes), strict=True):
            cast(nn.Conv2d, classifier).weight.copy_(rows[..., None, None])

    def end_step(self, ctx):
        self.weights = self.weights[:0]
        if self.precision == "fast":
            self.gram, self.cross = self.gram.float(), self.cross.float()

    def state_dict(self):
        return {"gram": ridge.pack(self.gram), "cross": self.cross, "weights": self.weights}

    def load_state_dict(self, state):
        self.gram, self.cross = ridge.unpack(state["gram"]), state["cross"].clone()
        self.weights = state["weights"].clone()


def class_weights(counts: Tensor, balance: float) -> Tensor:
    """What a pixel of each class counts, from the numbers of pixels (C,): their mean over the pixels is 1.

    A class without a label in the step, which a pixel can only have from the model, counts as the background, output 0.

    >>> class_weights(torch.tensor([3.0, 1.0, 0.0]), 1.0)
    tensor([0.6667, 2.0000, 0.6667])
    """
    weights = counts.clamp(min=1) ** -balance
    weights = torch.where(counts > 0, weights, weights[0])
    return weights * counts.sum().clamp(min=1) / (weights * counts).sum().clamp(min=1e-12)
