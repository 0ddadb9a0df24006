"""The contract between a method and the engine.

A method returns named loss terms; it never steps the optimiser and never changes the engine or a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from everseg.data.batches.selection import Candidate
from everseg.errors import ConfigError
from everseg.losses.pixelwise import full_precision
from everseg.losses.pseudo import pseudo_labels
from everseg.methods.single_pass import Pass
from everseg.methods.tuning import Tuning, polynomial
from everseg.scenarios.steps import Step
from everseg.types import Batch, LossTerms, Readout, SegOutput, Taps

if TYPE_CHECKING:
    from everseg.models.heads import Head
    from everseg.models.model import SegmentationModel

__all__ = ["Fuse", "Method", "Pass", "StepContext", "Tuning", "groups_of", "split_groups"]

Fuse = Literal["none", "all", "changed"]
"""Weights that are fused at the end of a step."""


@dataclass
class StepContext:
    """Everything a method may use while one step is trained."""

    step: Step
    model: nn.Module
    """The student as the engine wrapped it (DDP, autocast): call it only through `student`."""
    module: SegmentationModel
    """The same student, unwrapped: parameters and buffers."""
    teacher: SegmentationModel | None
    """Frozen copy of the model before this step; None in the first step and for methods without one."""
    train_batches: Callable[[], Iterator[Batch]] = lambda: iter(())
    """One pass over the step's training images, un-shuffled, without augmentation."""
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Sum over processes."""
    autocast: Callable[[], Any] = field(default=lambda: torch.autocast("cpu", enabled=False))
    """Arithmetic the student runs in; the teacher uses the same."""
    folded_teacher: SegmentationModel | None = None
    """The teacher with its norms folded (`models.folding`): what `teach` runs where it is given."""
    epoch_batches: Callable[[], Iterator[Batch]] = lambda: iter(())
    """One epoch of the batches that this process trains on, in the order and with the crops of the first epoch."""
    tuner: Callable[[StepContext, Tuning], None] | None = None
    """What carries out `tune`: the engine, or another loop over batches."""
    candidate_batches: Callable[[], Iterator[tuple[int, Batch]]] = lambda: iter(())
    """In `Method.select`: one pass over this process's share of the candidates, each as its position and a batch of one
    image, without augmentation."""
    _encoded: tuple[Batch, Taps, dict[str, Tensor]] | None = field(default=None, init=False, repr=False)

    def student(self, batch: Batch, *, taps: Taps = ()) -> SegOutput:
        """Run the student through the batch's own branch.

        Args:
            batch: the images.
            taps: maps to give beside the usual ones, such as ("before_activation",); see `everseg.types.Taps`.
        """
        return self.student_through(batch, (batch.branch,), taps=taps)[batch.branch]

    def student_through(
        self, batch: Batch, branches: tuple[str, ...], *, taps: Taps = ()
    ) -> dict[str, SegOutput]:
        """Run the student through several branches over the same images, in one forward."""
        encoded = self._encode(batch, taps)
        with self.autocast():
            outputs = self.model(batch.image, branches, encoded=encoded, taps=taps, **self._extra(batch))
        return _precise(outputs)

    def tune(
        self,
        parameters: Mapping[str, nn.Parameter],
        losses: Callable[[Batch], LossTerms],
        *,
        epochs: int,
        lr_scale: float = 1.0,
        rate: Callable[[int, int], float] = polynomial,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
    ) -> None:
        """Train some weights before the step, inside `begin_step`, over batches of a random stream of their own.

        All other weights of the model are frozen meanwhile, and the student runs in training mode, so that its norms go
        on gathering statistics. The gradients are the mean over processes. The engine saves checkpoints as in training,
        so a run that was stopped in the middle continues exactly there. Whatever stands before the call in `begin_step`
        is then done once more, on the model as it was before the tuning, and must give the same again.

        Args:
            parameters: name -> weight, of the model (`ctx.module`) or of the method's own; changed in place.
            losses: loss terms of a batch, their weights applied; each name a scalar.
            epochs: passes over the step's training images.
            lr_scale: factor on the step's learning rate.
            rate: factor on it from the number of an iteration, from 0, and their total.
            momentum: Nesterov momentum of SGD.
            weight_decay: L2 penalty on every weight that is tuned.

        Raises:
            ConfigError: no engine carries it out, or the run computes in fp16.
        """
        if self.tuner is None:
            raise ConfigError("ctx.tune: nothing carries it out here; give the StepContext a `tuner`")
        module, wrapped = self.module, self.model
        flags = [(weight, weight.requires_grad) for weight in module.parameters()]
        training = module.training
        module.requires_grad_(False)
        for weight in parameters.values():
            weight.requires_grad_(True)
        module.train()
        # Unwrapped: DDP would wait for the gradients of all weights.
        self.model, self._encoded = module, None
        try:
            self.tuner(self, Tuning(parameters, losses, epochs, lr_scale, rate, momentum, weight_decay))
        finally:
            for weight in parameters.values():
                weight.grad = None
                weight.requires_grad_(False)
            for weight, flag in flags:
                weight.requires_grad_(flag)
            module.train(training)
            self.model, self._encoded = wrapped, None

    def _extra(self, batch: Batch) -> dict[str, Mapping[str, Tensor]]:
        """The maps beside the images, where the network reads some."""
        return {"extra": batch.extra} if self.module.reads_extra else {}

    def _encode(self, batch: Batch, taps: Taps) -> dict[str, Tensor] | None:
        """Run the encoder once per batch where student and teacher share it for good; None where they do not."""
        # An encoder that this step does not change is still the teacher's. The teacher's copy is run for both, because
        # its norms may be folded.
        teacher = self._teacher
        if teacher is None or teacher.training or not self.module.encoder_is_constant:
            return None
        # Identity, not equality: methods call this several times with the very same batch object.
        known = self._encoded
        if known is None or known[0] is not batch or not {*taps} <= {*known[1]}:
            with torch.no_grad(), self.autocast():
                maps = teacher.encode(batch.image, taps=taps)
            self._encoded = known = batch, taps, maps
        return known[2]

    @property
    def _teacher(self) -> SegmentationModel | None:
        """The teacher as it is run: folded, unless the method has it use the batch's own statistics."""
        # Folding writes running statistics into the weights, so a teacher in training mode cannot be folded.
        if self.teacher is None or self.teacher.training:
            return self.teacher
        return self.folded_teacher or self.teacher

    def taught(self, batch: Batch) -> tuple[str, ...]:
        """Branches the teacher knows and this step can forget: the batch's own unless it is new, and the old ones."""
        if self.teacher is None:
            return ()
        own = (batch.branch,) if self.step.num_old(batch.branch) else ()
        return own + self.step.old_branches

    def teach(self, batch: Batch, *, taps: Taps = ()) -> SegOutput | None:
        """Run the teacher through the batch's own branch; None without a teacher, or if it never met that branch."""
        own = tuple({batch.branch} & set(self.taught(batch)))
        return self.teach_through(batch, own, taps=taps)[own[0]] if own else None

    @torch.no_grad()
    def teach_through(
        self, batch: Batch, branches: tuple[str, ...], *, taps: Taps = ()
    ) -> dict[str, SegOutput]:
        """Run the teacher through several branches over the same images; {} for none."""
        teacher = self._teacher
        if teacher is None or not branches:
            return {}
        encoded = self._encode(batch, taps)
        with self.autocast():
            outputs = teacher(batch.image, branches, encoded=encoded, taps=taps, **self._extra(batch))
        return _precise(outputs)

    def compare(self, batch: Batch, *, taps: Taps = ()) -> tuple[dict[str, SegOutput], dict[str, SegOutput]]:
        """Run teacher and student over the batch: what distillation compares.

        Returns:
            The student's outputs, of the batch's own branch and of every branch in `taught`, and the teacher's of
            `taught`. In class-incremental runs the two hold the one branch (the teacher's none in the first step).
        """
        branches = self.taught(batch)
        teacher = self.teach_through(batch, branches, taps=taps)
        # The batch's own branch comes first; `dict.fromkeys` drops its second mention and keeps the order.
        every = tuple(dict.fromkeys((batch.branch, *branches)))
        return self.student_through(batch, every, taps=taps), teacher


def _precise(outputs: dict[str, SegOutput]) -> dict[str, SegOutput]:
    """Convert logits and auxiliary outputs to at least float32; the taps keep the network's precision.

    Feature losses convert them.
    """
    return {
        name: SegOutput(
            full_precision(out.logits),
            out.features,
            {key: full_precision(value) for key, value in out.auxiliary.items()},
        )
        for name, out in outputs.items()
    }


@dataclass(kw_only=True)
class Method:
    """Base of all methods: plain fine-tuning hooks, to be overridden. Fields are the hyper-parameters."""

    uses_teacher: ClassVar[bool] = False
    """The engine keeps a frozen copy of the model from before the step."""
    partial_updates: ClassVar[bool] = False
    """Some update leaves trainable weights without gradient (DDP must look for them)."""
    reads_gradients: ClassVar[bool] = False
    """`after_backward` reads gradients, so loss-scaled fp16 and weights in shards are refused."""
    reads_attention: ClassVar[bool] = False
    """The losses compare attention maps, so networks without any are refused."""
    reads_before_activation: ClassVar[bool] = False
    """The losses compare the stages' maps before their last activation; a note says which network has none there."""
    reads_tokens: ClassVar[bool] = False
    """The losses compare class tokens, so networks without any are refused."""
    restructures: ClassVar[bool] = False
    """`prepare_model` changes the network's structure in later steps, so `fuse` is refused."""
    replaces_heads: ClassVar[bool] = False
    """Later steps may go on from a model of any readout."""

    freeze_encoder: bool = False
    """Train only the decoder and the classifiers from step `freeze_from` on."""
    freeze_norm: bool = False
    """Freeze the affine weights of all norms from step `freeze_from` on."""
    freeze_decoder: bool = False
    """Train only the encoder and the classifiers from step `freeze_from` on."""
    freeze_heads: Literal["none", "old", "all"] = "none"
    """Classifiers that are not trained from step `freeze_from` on: none, those of earlier steps, or all."""
    freeze_from: int = 1
    """First step in which the four switches above act (0: from the start, as the authors' flags do). Steps from
    scratch count as step 0."""
    frozen_statistics: bool = True
    """Frozen norms keep their running statistics too. The authors' code lets them move (set false to reproduce)."""
    keep_shared_statistics: bool = False
    """Norms that several branches share keep their running statistics in a step that does not train all of these
    branches. Its images would replace them, and the losses, which see those images only, would not notice."""
    fuse: Fuse = "none"
    """After each later step, move its weights back towards those from before it (EWF): none, all, or "changed", only
    those that changed most."""
    fuse_changed: Annotated[float, Field(ge=0, le=1)] = 0.45
    """Share of all weights that "changed" moves."""
    pretune: Annotated[int, Field(ge=0)] = 0
    """Epochs of pre-tuning before each step that adds classes to old ones (NeST): new classifiers start as learnt
    mixtures of the old ones. 0 = none."""
    pretune_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the step's learning rate during the pre-tuning."""
    pretune_kd_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of MiB's distillation during the pre-tuning; 0 = none (the authors' option has 10)."""
    pretune_unbiased_ce: bool = True
    """MiB's cross-entropy during the pre-tuning instead of the plain one."""

    def unfit(self, steps: Sequence[Step]) -> list[str]:
        """List what the method cannot do in a run, each as a sentence; asked before the first step.

        Args:
            steps: all steps of the run.
        """
        return []

    @property
    def readout(self) -> Readout:
        """How the outputs of a model that this method trains become classes; stored with the model."""
        return Readout()

    def heads(self, step: Step) -> Mapping[str, Head]:
        """What each branch gains in a step beside its number of classes; default plain classifiers."""
        return {}

    def prepare_model(self, model: SegmentationModel, step: Step) -> None:
        """Grow, initialise and freeze, before the optimiser exists.

        Raises:
            ConfigError: the model's outputs are read in another way than this method trains them.
        """
        self._check_readout(model, step)
        model.readout = self.readout
        self.grow(model, step)
        # A step from scratch counts as step 0 whatever its index: nothing learnt earlier is there to be kept.
        later = (0 if step.is_first else step.index) >= self.freeze_from
        model.freeze(
            branches=step.old_branches,
            encoder=self.freeze_encoder and later,
            norm=self.freeze_norm and later,
            statistics=self.frozen_statistics,
            decoder=self.freeze_decoder and later,
            heads=self._frozen_heads(model, step) if later else {},
            shared_statistics=self.keep_shared_statistics and bool(step.old_branches),
        )

    def _check_readout(self, model: SegmentationModel, step: Step) -> None:
        if step.is_first or self.replaces_heads or model.readout == self.readout:
            return
        told = [
            ", ".join(f"{key} {value}" for key, value in readout.to_json().items()) or "arg-max of the logits"
            for readout in (model.readout, self.readout)
        ]
        raise ConfigError(
            f"method: the model's outputs become classes by another rule ({told[0]}) than this method trains "
            f"({told[1]}); go on with the method that trained it, or start with this one from step 0"
        )

    def _frozen_heads(self, model: SegmentationModel, step: Step) -> dict[str, int]:
        """How many classifiers of each branch are frozen, the oldest first."""
        if self.freeze_heads == "none":
            return {}
        numbers = {branch: len(model.head(branch).classifiers) for branch in model.branches}
        if self.freeze_heads == "old":
            return {b: n - 1 if step.grows.get(b) else n for b, n in numbers.items()}
        return numbers

    @property
    def needs_teacher(self) -> bool:
        """Whether the engine keeps a copy of the model from before the step: for the losses, or for a switch."""
        return self.uses_teacher or self.fuse != "none" or self.pretune > 0

    @property
    def needs_memory(self) -> bool:
        """Whether the method cannot work without a memory of earlier images (`scenario.memory`)."""
        return False

    @property
    def needs_extra(self) -> tuple[str, ...]:
        """Names of the further maps (`data.extra`) that the method reads from `Batch.extra`."""
        return ()

    def memory_labels(self, batch: Batch, ctx: StepContext, threshold: float) -> Tensor:
        """Complete the labels of a candidate for the memory by what the model sees in its background.

        The engine calls it at the end of every step but the first, if `scenario.memory.pseudo` gives a threshold, and
        counts the classes of the result. The model, `ctx.module`, is that of the finished step, in evaluation mode.

        Args:
            batch: one image with its labels.
            ctx: the step's context. `ctx.module` is called directly: `ctx.student` would wait for other processes.
            threshold: score from which a class is believed, in [0, 1].

        Returns:
            (B, H, W) train ids. By default background pixels get the class with the largest softmax probability where
            that class is no background and its probability is at least the threshold.
        """
        space = ctx.step.spaces[batch.branch]
        if space.background is None:
            return batch.label
        with ctx.autocast():
            logits = ctx.module(batch.image, (batch.branch,))[batch.branch].logits
        found = pseudo_labels(
            full_precision(logits),
            batch.label,
            num_classes=space.num_classes,
            measure="probability",
            thresholds=threshold,
            keep_rejected=True,
        )
        return torch.where(batch.label == space.background, found.label, batch.label)

    def select(self, ctx: StepContext, candidates: Sequence[Candidate], size: int) -> Sequence[int]:
        """Choose the images that the memory keeps, where `scenario.memory.selection` leaves it to the method.

        Args:
            ctx: the finished step's context. `ctx.candidate_batches` reads the images; what a process finds there must
                be combined with `ctx.all_reduce`, because every process has to choose the same.
            candidates: first the images that the memory holds, then those of the step.
            size: largest number of images.

        Returns:
            Positions of at most `size` different candidates, in the order of storing.
        """
        raise ConfigError(
            f"scenario.memory.selection: method '{type(self).__name__}' chooses no images; take ssul, "
            "reservoir or random"
        )

    def grow(self, model: SegmentationModel, step: Step) -> None:
        """Add the step's outputs and branches; part of `prepare_model`."""
        model.grow(step.grows, heads=self.heads(step))

    def param_groups(self, model: SegmentationModel, step: Step) -> list[dict[str, Any]]:
        """Split the trainable weights: dicts with "params" and "lr_scale", each weight in exactly one.

        A step that trains T branches in turn (multi-task) moves the shared weights T times as often as a branch's
        own, so they learn at 1/T of the rate, as in MDIL's multi-task code.
        """
        several = len(step.trained_branches)
        if several < 2:
            return [{"params": [p for p in model.parameters() if p.requires_grad], "lr_scale": 1.0}]
        return split_groups(model, 1 / several)

    def begin_step(self, ctx: StepContext) -> None:
        """Prepare state from the data (for instance one teacher pass)."""

    def losses(self, batch: Batch, ctx: StepContext) -> Iterator[LossTerms]:
        """Yield one dict of weighted terms, scalar tensors, per optimiser update, and at least one per batch."""
        raise NotImplementedError

    def after_backward(self, ctx: StepContext) -> Mapping[str, Tensor | float] | None:
        """Read the final gradients or add to them; the scalars returned, tensors or numbers, are logged."""
        return {}

    def trains(self, step: Step) -> bool:
        """Whether the step has iterations with gradients. Without them `losses` is never called in it."""
        return True

    def accumulates(self, step: Step) -> Pass | None:
        """Describe the pass over the step's images that follows the iterations; None = there is none.

        The model is in eval mode and does not change by itself. Each batch goes to `accumulate`; what it has added up
        is turned into weights by `finish_model`.
        """
        return None

    def accumulate(self, batch: Batch, ctx: StepContext) -> Mapping[str, Tensor | float] | None:
        """Take in one batch of the pass, without gradients; the scalars returned are logged.

        What is added up over the batches must stand in `sums`, changed in place; anything else that `state_dict`
        returns must be the same in all processes.
        """
        raise NotImplementedError

    def sums(self) -> dict[str, Tensor]:
        """Return the tensors that `accumulate` adds to; each process adds its own images.

        They may hold what earlier steps have added up. Part of `state_dict`, too. The engine adds them over the
        processes before a checkpoint is written and before `finish_model`, and there all processes have the totals.
        """
        return {}

    def finish_model(self, ctx: StepContext) -> None:
        """Change the trained model before it is saved, such as averaging it with the teacher or merging its parts.

        It runs after the last iteration (and the pass, see `accumulates`) and before `end_step`. A run that was stopped
        in between repeats it on the weights of the last iteration, so it must depend on these, the teacher and the
        method's state alone.
        """

    def end_step(self, ctx: StepContext) -> None:
        """Turn what this step has gathered into what the next step needs."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything the method must carry over a restart or into the next step, as flat tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""


def groups_of(
    model: SegmentationModel, *groups: tuple[Any, float] | tuple[Any, float, float | None]
) -> list[dict[str, Any]]:
    """Parameter groups by parts of the model.

    Args:
        groups: (weights, factor on the learning rate[, weight decay]). The weights are parameters, modules, or lists of
            these; frozen ones are left out. A weight that stands in several groups goes into the first.

    Returns:
        A group for each, and a last one at factor 1 for all other trainable weights. Empty groups are left out.
    """
    left = {id(p): p for p in model.parameters() if p.requires_grad}  # by identity: tensors compare by value
    found = []
    for weights, scale, *decay in [*groups, (model, 1.0)]:
        taken = [left.pop(id(p)) for p in _weights(weights) if id(p) in left]
        group: dict[str, Any] = {"params": taken, "lr_scale": scale}
        if decay and decay[0] is not None:
            group["weight_decay"] = decay[0]
        if taken:
            found.append(group)
    return found


def _weights(given: Any) -> Iterator[nn.Parameter]:
    if isinstance(given, nn.Parameter):
        yield given
    elif isinstance(given, nn.Module):
        yield from given.parameters()
    else:
        for one in given:
            yield from _weights(one)


def split_groups(model: SegmentationModel, shared_scale: float) -> list[dict[str, Any]]:
    """Two parameter groups of the trainable weights: the shared ones at a fraction of the rate, the branches' own.

    An empty group is left out.
    """
    shared = [p for p in model.shared_parameters() if p.requires_grad]
    known = {id(p) for p in shared}  # by identity: `in` on tensors compares their values
    own = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": shared, "lr_scale": shared_scale}, {"params": own, "lr_scale": 1.0}]
    return [group for group in groups if group["params"]]
