"""The training of one step. An interrupted step continues exactly as if it had not stopped."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from everseg.config.fields import TrainConfig
from everseg.data.batches.loader import Timed, epoch_length, normalised_batches, train_batches
from everseg.data.batches.samples import Loaded, SampleKey, View
from everseg.distributed import all_reduce_max, all_reduce_sum, derive_seed
from everseg.engine.average import MovingAverage
from everseg.engine.bad_samples import BadSamples
from everseg.engine.domain_measures import measure_domains
from everseg.engine.finite import Guard
from everseg.engine.memory import Choice, Chosen, Shelf
from everseg.engine.one_pass import OnePass
from everseg.engine.optim import (
    check_param_groups,
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)
from everseg.engine.param_groups import split_by_rate
from everseg.engine.runtime import StopRequest
from everseg.engine.session import Session
from everseg.engine.updates import Updates, scalars_of
from everseg.errors import CheckpointError, ConfigError, DataError
from everseg.labels import BACKGROUND
from everseg.methods import switches
from everseg.methods.base import Method, StepContext, Tuning
from everseg.models.blocks import synchronise_norms
from everseg.models.folding import folded_copy
from everseg.models.model import SegmentationModel, channels_last
from everseg.progress import resident_bytes
from everseg.runs.commit import load_tensors, newest_valid, purge, read_document, save_folder
from everseg.runs.documents import STATE
from everseg.runs.memory import Memory
from everseg.runs.model_folder import load_strictly
from everseg.scenarios.steps import Step
from everseg.types import Batch, LossTerms

if TYPE_CHECKING:
    from everseg.engine.shards import Cut


class Trained(Protocol):
    """What a batch trains: a method, or a pre-tuning."""

    def losses(self, batch: Batch, ctx: StepContext) -> Iterator[LossTerms]: ...

    def after_backward(self, ctx: StepContext) -> Mapping[str, Tensor | float] | None: ...


def train_batch(
    method: Trained,
    batch: Batch,
    ctx: StepContext,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Tensor], None] = lambda loss: loss.backward(),
    check: Callable[[dict[str, Tensor]], None] = lambda terms: None,
    *,
    parts: int = 1,
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
    clip: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Take every optimiser update that the method asks for on one batch.

    Args:
        check: called after each backward pass with the loss terms, and again with the scalars of `after_backward`.
            No weight has changed by then. It may raise to stop the run.
        parts: number of parts that the batch is cut into to save memory; see `_backward`.
        alone: makes the context of every backward pass but an update's last: processes need not exchange gradients.
        clip: called before each update, when the gradients are complete.

    Returns:
        Every loss term (weights applied) and every scalar of `after_backward`, detached. If several updates give the
        same name, its values are summed.

    Raises:
        ConfigError: the method yields nothing, or something else than named scalars.
    """
    logged: dict[str, Tensor] = {}
    name = type(method).__name__
    cut = batch.split(parts) if parts > 1 else [batch]
    shares = [len(part.image) / len(batch.image) for part in cut]
    runs = [Updates(method.losses(part, ctx), name) for part in cut]
    while (terms := _backward(runs, shares, name, optimizer, backward, alone)) is not None:
        check(terms)  # gradients are there, weights still untouched: the last moment to stop without harm
        extra = scalars_of(method.after_backward(ctx), name)
        check(extra)
        clip()
        optimizer.step()
        for term, value in {**terms, **extra}.items():
            value = value.detach()
            logged[term] = logged[term] + value if term in logged else value
    return logged


def _backward(
    runs: Sequence[Updates],
    shares: Sequence[float],
    method: str,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Tensor], None],
    alone: Callable[[], AbstractContextManager[Any]],
) -> LossTerms | None:
    """Leave the gradients of the next update: of the losses' mean over the parts of a batch, weighted by their images.

    Where a loss is a mean over images or pixels, and no norm looks at the batch, the mean over the parts is the loss of
    the whole batch. All parts take their first update together, then all take their second, as the whole batch would.

    Args:
        runs: the method's losses of each part. A run keeps what it has computed, such as taps, until its batch is done:
            with a ResNet-101 the taps are 5 % of the maps that the part's backward pass has just freed.
        shares: share of each part in the images of the batch.

    Returns:
        The loss terms of the whole batch; None if the method asks for no further update.
    """
    total: LossTerms = {}
    for number, (run, share) in enumerate(zip(runs, shares, strict=True), 1):
        with nullcontext() if number == len(runs) else alone():
            terms = run.next()
            if terms is None and number == 1 and all(other.next() is None for other in runs[1:]):
                return None
            if terms is None:
                raise ConfigError(
                    f"method '{method}': losses must yield as often for each part of a batch; use train.accumulate=1"
                )
            if number == 1:
                # `None` instead of zeros: an optimiser leaves a weight without gradient alone, while weight decay and
                # momentum move one whose gradient is 0.
                optimizer.zero_grad(set_to_none=True)
            loss = torch.stack([*terms.values()]).sum()
            if len(runs) == 1:
                backward(loss)
                return terms
            backward(loss * share)
        for name, value in terms.items():
            value = value.detach() * share
            total[name] = total[name] + value if name in total else value
    return total


def epoch_of(step: Step, batch: int, appended: int = 0) -> int:
    """Count the iterations of an epoch. Branches take turns until the shortest has no whole batch left.

    Args:
        batch: images per iteration over all processes.
        appended: images of the memory that are trained like the step's own.
    """
    counts = Counter[str]({step.branch: appended})
    for source in step.train:
        counts[source.branch] += len(source.indices)
    return epoch_length(counts.values(), batch)


def iterations_of(step: Step, train: TrainConfig, appended: int = 0) -> int:
    """Count the iterations of a step: epochs times iterations per epoch, at most `train.max_iterations`.

    A single-task model is trained as long as the step that it is compared with.

    Args:
        appended: as for `epoch_of`.
    """
    epochs = train.epochs if step.index == 0 else train.epochs_next or train.epochs
    total = epochs * epoch_of(step, train.batch, appended)
    return min(total, train.max_iterations or total)


def _named(recent: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name the latest loss terms of several branches by term and branch, such as "ce/day"."""
    return {f"{term}/{branch}": value for branch, terms in recent.items() for term, value in terms.items()}


@dataclass
class Phase:
    """Iterations under one optimiser: the training of a step, or a pre-tuning before it.

    Batch, seed and learning rate of an iteration follow from its number alone. So a checkpoint of weights, optimiser
    and method state is enough to continue from any iteration.
    """

    trained: Trained
    model: nn.Module
    """Holds every weight of the optimiser under its name, and all weights and statistics that it changes."""
    optimizer: torch.optim.Optimizer
    prepared: Any
    """The optimiser as the loop steps it."""
    total: int
    """Number of iterations."""
    rate: Callable[[int], float]
    """Learning rate of an iteration."""
    folder: Path
    """Its checkpoints."""
    stored: Callable[[], dict[str, Mapping[str, Tensor]]]
    """What a checkpoint holds beside the optimiser: file -> tensors."""
    load: Callable[[Path], None]
    """Reads that back from a checkpoint."""
    title: str
    where: str
    """Its name in messages."""
    tuning: int | None = None
    """Number of a pre-tuning in its step, from 0. None = the training."""
    clip_norm: float | None = None
    average: MovingAverage | None = None
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext
    """As for `train_batch`."""
    cut: Cut | None = None
    """The model, cut over the processes; then `model` is this process's part."""

    @property
    def mark(self) -> dict[str, int]:
        """What the journal's lines of a pre-tuning say in addition."""
        return {} if self.tuning is None else {"tuning": self.tuning}

    @property
    def seeds(self) -> tuple[str | int, ...]:
        """What tells its random draws from those of the step's other phases."""
        return () if self.tuning is None else ("tune", self.tuning)


class _Tuned(nn.Module):
    """The student together with the weights that a pre-tuning trains beside it."""

    def __init__(self, model: SegmentationModel, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.model = model
        known = {id(weight) for weight in model.parameters()}  # tensors compare by value
        # Torch forbids dots in these names.
        self.own = nn.ParameterDict(
            {f"own/{n.replace('.', '/')}": w for n, w in weights.items() if id(w) not in known}
        )


@dataclass
class StepJob:
    """Everything that the training of one step needs; `train` runs it."""

    session: Session
    step: Step
    views: Sequence[View]
    model: SegmentationModel
    """The model as it was after the step before, on the CPU."""
    teacher: SegmentationModel | None
    """Frozen copy of it, on the CPU too."""
    method: Method
    offset: int = 0
    """Iterations of all earlier steps, for the x axis of TensorBoard."""
    parent: str | None = None
    """Digest of the finished step this one continues."""
    memory: Memory | None = None
    """Images of earlier steps that the step is trained with."""

    def __post_init__(self) -> None:
        self.config, self.accelerator = self.session.config, self.session.accelerator
        self.stream = 0 if self.step.fresh else self.step.index
        """Number that seeds the step's random draws. It is 0 for a step from scratch, as if that step ran alone."""
        self.cuts = self.config.train.shard and self.accelerator.num_processes > 1
        """Whether the iterations work on shards."""
        self.tunings = 0
        """Pre-tunings begun so far."""
        self.average_state: dict[str, Tensor] | None = None
        """The average that the checkpoint holds."""
        self.raw: dict[str, Tensor] | None = None
        """Where the step ended with the average of its weights: the weights that the last update left."""
        self.chosen: Chosen | None = None
        """The memory that the step leaves to later ones."""
        self.shelf = Shelf(self.session.steps, self.session.datasets, self.session.folder)
        mix = self.config.scenario.memory
        if self.memory is not None:
            kept, _ = self.shelf.views(self.memory.images, self.step, mix.labels)
            self.views = [*self.views, *kept]
        self.appended = len(self.memory.images) if self.memory is not None and mix.mix == "append" else 0
        """Images of the memory that are trained like the step's own."""

    def train(self) -> None:
        """Train the step to its end, starting from its newest checkpoint if there is one.

        Iterations with gradients come first, then the pass without, each where the method has it.

        Raises:
            DivergedError: a loss, a gradient or an updated weight is not finite. The files on disk are not changed.
            Interrupted, TimeBudgetReached: the run was asked to stop, and its state has been saved.
        """
        trains = self.method.trains(self.step)
        self.total = iterations_of(self.step, self.config.train, self.appended) if trains else 0
        self.epoch = epoch_of(self.step, self.config.train.batch, self.appended)
        self._prepare()
        phase = self._phase() if trains else None
        gathering = self._pass()
        held = None if gathering is None else gathering.restore()
        start = 0 if phase is None or held is not None else self._restore(phase)
        self._wrap(phase)
        ctx = self._context()
        self._rewind(start, held)
        journal, progress = self.session.journal, self.session.progress
        self.bad = BadSamples(self.config.data.skip_bad, self.accelerator, journal, progress)
        if start == 0 and held is None:  # a checkpoint already holds the state that `begin_step` made
            switches.begin(self.method, ctx)
        if phase is not None and held is None:
            self._train(ctx, phase, start)
        if gathering is not None:
            if held is None:
                gathering.raw = self.raw
            gathering.run(ctx, self.bad, held, after_training=phase is not None)
            self.raw = gathering.raw
        switches.finish(self.method, ctx)
        # A run that keeps to one domain asks for no choice; where its model is extended, the bundle holds statistics.
        if self.config.data.domains or self.config.scenario.domain or self.model.domain_statistics:
            measure_domains(
                self.model, [view for view in self.views if not view.memory], self.config.data, self.accelerator,
                batch=self.config.train.eval_batch, note=self.bad.note,
            )  # fmt: skip
        self.bad.share(self.step.index, self.total)
        if self.config.scenario.memory.size:
            self.chosen = self._choice(ctx).make()

    def _train(self, ctx: StepContext, phase: Phase, start: int) -> None:
        """Make the iterations with gradients."""
        before = self._cut(ctx, phase) if self.cuts else None
        if self.config.train.ema is not None:
            phase.average = MovingAverage(phase.model, self.config.train.ema, self.average_state)
        self.student.train()
        self._loop(ctx, phase, start)
        if before is not None:
            self._join(ctx, phase, *before)
        if phase.average is not None:
            # Before the method finishes the step: what it measures or changes then is the model that is kept.
            self.raw = phase.average.take_over(self.model, self.accelerator)

    def _cut(self, ctx: StepContext, phase: Phase) -> tuple[SegmentationModel | None, ...]:
        """Cut student, teacher and optimiser over the processes, and return the teachers as they were."""
        from everseg.engine.shards import Cut, cut_teacher  # takes a second to import

        teachers = ctx.teacher, ctx.folded_teacher
        phase.cut = phase.prepared = cut = Cut(self.model, phase.optimizer, self.accelerator)
        phase.model, phase.alone = cut.part, cut.alone
        if self.average_state is not None:
            self.average_state = cut.mine(self.average_state)
        self.student = cut.module
        ctx.model = ctx.module = cut.module
        ctx.teacher, ctx.folded_teacher = (
            None if one is None else cut_teacher(one, self.accelerator) for one in teachers
        )
        return teachers

    def _join(
        self,
        ctx: StepContext,
        phase: Phase,
        teacher: SegmentationModel | None,
        folded: SegmentationModel | None,
    ) -> None:
        """Make the student whole again: what ends the step works with plain weights."""
        assert phase.cut is not None
        if phase.average is not None:
            device = self.accelerator.device
            phase.average.values = {n: v.to(device) for n, v in phase.cut.whole(phase.average.values).items()}
        self.student = phase.model = ctx.model = ctx.module = phase.cut.give_back()
        self.student.train()
        ctx.teacher, ctx.folded_teacher = teacher, folded
        for one in (teacher, folded):
            if one is not None:
                one.to(self.accelerator.device)
        phase.cut = None

    def _wrap(self, phase: Phase | None) -> None:
        """Prepare student and optimiser for the device and the processes."""
        # With `train.shard` the model stays as it is until the loop begins: what comes before works with plain weights.
        # Without a phase nothing has a gradient, and DDP refuses such a model.
        if phase is None or self.cuts:
            self.student = self.model
            return
        self.student, phase.prepared = self.accelerator.prepare(self.model, phase.optimizer)
        # Accelerate's own forward copies every feature map to float32. It is removed here, because `StepContext`
        # already runs the model under Accelerate's autocast.
        self.model.__dict__.pop("forward", None)
        phase.alone = partial(self.accelerator.no_sync, self.student)

    def _rewind(self, start: int, held: int | None) -> None:
        """Drop the journal's lines of iterations that a killed process logged after its last checkpoint.

        They are done and logged again.

        Args:
            start: iteration of training that the step continues from.
            held: number of batches of the pass that it continues from, if it is there already.
        """
        journal = self.session.journal
        if held is not None:
            journal.rewind(self.step.index, held, passing=True)
        elif start:
            journal.rewind(self.step.index, start)
        else:
            tuning, tuned = self._newest_tuning()
            journal.rewind(self.step.index, tuned, tuning)

    def _pass(self) -> OnePass | None:
        """The pass of the step, if the method has one."""
        plan = self.method.accumulates(self.step)
        if plan is None:
            return None
        title = f"step {self.step.index} ({self._what()}), one pass without gradients"
        return OnePass(
            self.session, plan, self.step.index, self.stream, self.views, self.model, self.method, title,
            newest=self._newest, offset=self.offset + self.total,
        )  # fmt: skip

    def _prepare(self) -> None:
        """Let the method grow and freeze the model, and move it to the device."""
        config = self.config
        # New weights depend on (seed, step) only, so a step that is started again draws the same ones.
        torch.manual_seed(derive_seed(config.seed, "grow", self.stream))
        self.method.prepare_model(self.model, self.step)
        if config.train.sync_norm:
            self.model = synchronise_norms(self.model)
        self.model.to(self.accelerator.device)
        if config.train.precision != "fp32":
            channels_last(self.model)  # half-precision kernels are faster in this layout: docs/performance.md

    def _phase(self) -> Phase:
        """The iterations with gradients, with their optimiser."""
        config = self.config
        groups = self.method.param_groups(self.model, self.step)
        check_param_groups(self.model, groups)
        groups = split_by_rate(groups, self.model, self.step, config.train)
        lr_next = config.train.lr_next if config.train.lr_next is not None else config.train.lr
        self.lr = config.train.lr if self.step.is_first else lr_next
        optimizer = make_optimizer(groups, config.train, lr=self.lr)
        phase = Phase(
            trained=self.method,
            model=self.model,
            optimizer=optimizer,
            prepared=optimizer,
            total=self.total,
            rate=lambda i: learning_rate(config.train, self.lr, i, self.total, self.epoch),
            folder=self.session.folder.checkpoints(self.step.index),
            stored=lambda: {
                "model": phase.model.state_dict(),
                "method": self.method.state_dict(),
                **({} if phase.average is None else {"average": phase.average.values}),
            },
            load=self._load,
            title=f"step {self.step.index} ({self._what()})",
            where=f"step {self.step.index}",
            clip_norm=config.train.clip_norm,
        )
        return phase

    def _load(self, path: Path) -> None:
        load_strictly(self.model, load_tensors(path / "model.safetensors"), str(path))
        self.method.load_state_dict(load_tensors(path / "method.safetensors"))
        if self.config.train.ema is not None:
            self.average_state = load_tensors(path / "average.safetensors")

    def _newest(self, folder: Path) -> Path | None:
        # The first process moves damaged checkpoints away before the others look.
        with self.accelerator.main_process_first():
            return newest_valid(folder, lambda text: self.session.progress.message(f"warning: {text}"))

    def _restore(self, phase: Phase) -> int:
        """Load the newest checkpoint of a phase, and return the iteration to start at."""
        path = self._newest(phase.folder)
        if path is None:
            return 0
        state = read_document(path / "state.json", "scaler", "optimizer", shape=STATE)
        if state["total"] != phase.total:
            raise CheckpointError(
                f"{path} was made for {state['total']} iterations, this run has {phase.total}: "
                f"the images of the step have changed; start again under another name (name=...)"
            )
        start = int(state["iteration"])
        if state["processes"] != self.accelerator.num_processes:
            self.session.progress.message(
                f"warning: {path.name} was made by {state['processes']} processes, now there are "
                f"{self.accelerator.num_processes}; the run continues, but not bit-identical"
            )
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        phase.load(path)  # first: weights of another model are refused by their names and shapes
        tensors = load_tensors(path / "optim.safetensors")
        try:
            load_optimizer_state(phase.optimizer, phase.model, tensors, state["optimizer"])
        except CheckpointError as error:
            raise CheckpointError(
                f"{path}: {error}; delete this folder, and the same command continues without it"
            ) from None
        self.session.progress.message(f"continuing {phase.where} at iteration {start} of {phase.total}")
        return start

    def _tuning_folder(self, number: int) -> Path:
        return self.session.folder.checkpoints(self.step.index) / f"tune-{number}"

    def _newest_tuning(self) -> tuple[int, int]:
        """Find the pre-tuning that this step goes on with: its number, and the iteration that its checkpoint holds."""
        number, iteration = 0, 0
        while (path := self._newest(self._tuning_folder(number))) is not None:
            state = read_document(path / "state.json", shape=STATE)
            number, iteration = number + 1, int(state["iteration"])
        return max(number - 1, 0), iteration

    def _tune(self, ctx: StepContext, tuning: Tuning) -> None:
        """Carry out `StepContext.tune`: continue its newest checkpoint, or begin; nothing is left to do if it is done.

        Raises:
            ConfigError: the run computes in fp16.
            DivergedError, Interrupted, TimeBudgetReached: as in training.
        """
        config, number = self.config, self.tunings
        self.tunings += 1
        if self.accelerator.scaler is not None:
            raise ConfigError(
                "train.precision: pre-tuning does not scale its losses as fp16 needs it; use bf16 or fp32"
            )
        total = tuning.epochs * self.epoch
        total = min(total, config.train.max_iterations or total)
        held = _Tuned(self.model, tuning.parameters)
        lr = self.lr * tuning.lr_scale
        settings = config.train.model_copy(
            update={
                "optimizer": "sgd",
                "momentum": tuning.momentum,
                "nesterov": tuning.momentum > 0,
                "weight_decay": tuning.weight_decay,
                "min_lr": 0.0,
            }
        )
        optimizer = make_optimizer([{"params": tuning.parameters.values()}], settings, lr=lr)

        def load(path: Path) -> None:
            load_strictly(self.model, load_tensors(path / "model.safetensors"), str(path))
            load_strictly(held.own, load_tensors(path / "tuned.safetensors"), str(path))

        phase = Phase(
            trained=tuning,
            model=held,
            optimizer=optimizer,
            prepared=optimizer,
            total=total,
            rate=lambda i: lr * tuning.rate(i, total),
            folder=self._tuning_folder(number),
            stored=lambda: {"model": self.model.state_dict(), "tuned": held.own.state_dict()},
            load=load,
            title=f"step {self.step.index} (pre-tuning for {self._what()})",
            where=f"the pre-tuning of step {self.step.index}",
            tuning=number,
        )
        self._loop(ctx, phase, self._restore(phase))
        # What comes after must draw the same whether the tuning was done now or read from its checkpoint.
        torch.manual_seed(derive_seed(config.seed, self.stream, *phase.seeds, "end"))

    def _context(self) -> StepContext:
        folded = None
        if self.teacher is not None:
            self.teacher.to(self.accelerator.device)
            folded = channels_last(folded_copy(self.teacher))
        return StepContext(
            step=self.step,
            model=self.student,
            module=self.model,
            teacher=self.teacher,
            train_batches=self._plain_pass,
            epoch_batches=self._first_epoch,
            all_reduce=all_reduce_sum(self.accelerator),
            autocast=self.accelerator.autocast,
            folded_teacher=folded,
            tuner=self._tune,
        )

    def _choice(self, ctx: StepContext) -> Choice:
        def unreadable() -> Mapping[SampleKey, str]:
            self.bad.share(self.step.index, self.total)
            return self.bad.known

        return Choice(
            self.config.scenario.memory, self.config.data, self.config.model, self.config.seed,
            self.shelf, self.session.counts, self.step, self.method, ctx, self.memory,
            self.accelerator.device, self.accelerator.process_index, self.accelerator.num_processes,
            self.bad.note, unreadable,
        )  # fmt: skip

    def _plain_pass(self) -> Iterator[Batch]:
        accelerator = self.accelerator
        appended = self.config.scenario.memory.mix == "append"
        batches = normalised_batches(
            [view for view in self.views if appended or not view.memory],
            self.config.data,
            accelerator.device,
            batch=self.config.train.eval_batch,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            replace=self.config.data.skip_bad,
        )
        for loaded, batch in batches:
            self.bad.note(loaded.bad)
            yield batch

    def _first_epoch(self) -> Iterator[Batch]:
        for loaded in self._batches(0, self.epoch):
            self.bad.note(loaded.bad)
            yield loaded.on(self.accelerator.device, self.config.data.normalisation)

    def _batches(self, start: int, stop: int, seeds: tuple[str | int, ...] = ()) -> Iterator[Loaded]:
        """The training batches of this process from one iteration to another.

        Args:
            seeds: what tells the random draws from those of the training.
        """
        config, accelerator = self.config, self.accelerator
        mix = config.scenario.memory
        return train_batches(
            self.views,
            config.data,
            seed=derive_seed(config.seed, *seeds) if seeds else config.seed,
            step=self.stream,
            batch=config.train.batch,
            start=start,
            stop=stop,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            pin=accelerator.device.type == "cuda",
            memory_share=None if mix.mix == "append" else mix.share,
        )

    def _loop(self, ctx: StepContext, phase: Phase, start: int) -> None:
        if start == phase.total:
            return
        config, accelerator = self.config, self.accelerator
        world, total = accelerator.num_processes, phase.total
        batches = self._batches(start, total, phase.seeds)
        self.session.progress.begin(phase.title, total, start)
        batches = Timed(batches)
        clock, images = time.perf_counter(), 0
        recent: dict[str, dict[str, Tensor]] = {}
        guard = self._guard(phase)
        limit = phase.clip_norm
        backward = accelerator.backward if phase.cut is None else phase.cut.backward
        for iteration, loaded in enumerate(self._saved_on_bad_data(batches, guard, phase, start), start):
            batch = loaded.on(accelerator.device, config.data.normalisation)
            place = (self.stream, *phase.seeds, iteration, accelerator.process_index)
            torch.manual_seed(derive_seed(config.seed, *place))
            lr = phase.rate(iteration)
            set_learning_rate(phase.optimizer, lr)
            check = guard.watch(iteration, batch.ids)
            clip = partial(guard.clip, limit, iteration, batch.ids) if limit is not None else lambda: None
            with nullcontext() if phase.cut is None else phase.cut.explained():
                logged = train_batch(
                    phase.trained, batch, ctx, phase.prepared, backward, check,
                    parts=config.train.accumulate, alone=phase.alone, clip=clip,
                )  # fmt: skip
            if phase.average is not None:
                phase.average.update(phase.model)
            recent[batch.branch] = logged
            done = iteration + 1  # number of finished iterations; logs and checkpoints use it
            images += len(batch.ids) * world
            due_log = done % config.train.log_every == 0 or done == total
            if due_log:
                guard.look()
                spent = time.perf_counter() - clock
                speed, data_wait = images / spent, batches.seconds / spent
                clock, images, batches.seconds = time.perf_counter(), 0, 0.0
                named = _named(recent) if len(self.step.trained_branches) > 1 else logged
                self._log(phase, done, named, lr, speed, guard.norm, data_wait)
            due = done % config.train.checkpoint_every == 0
            # A signal reaches the processes at different iterations. If one stopped alone, the others would wait
            # forever for its gradients, so all processes decide together. Deciding together waits for the device, so
            # on a GPU it happens only at log lines and checkpoints. A single process can look at every iteration.
            agree = guard.at_once or world == 1 or due_log or due
            code = all_reduce_max(self.session.stop.code(), accelerator) if agree else 0
            if agree:
                self.bad.share(self.step.index, done, phase.mark)
            if code or due or done == total:  # weights that are not finite must never reach the disk
                guard.check_weights(iteration, batch.ids)
            # Training ends with the step's final model; a pre-tuning with a checkpoint, from which the step goes on.
            ends_here = done == total and phase.tuning is None
            if code or (not ends_here and (due or done == total)):
                self._save(phase, done)
            if code and not ends_here:
                self.session.progress.end()
                raise StopRequest.error(code, f"{guard.where}, iteration {done} of {total}")
        self.session.progress.end()

    def _saved_on_bad_data(
        self, batches: Iterator[Loaded], guard: Guard, phase: Phase, start: int
    ) -> Iterator[Loaded]:
        """Yield the batches. If one cannot be made, save what was trained so far, then raise its error.

        With several processes nothing is saved, because the others are waiting for the gradients of this one.
        """
        done = start
        try:
            for loaded in batches:
                self.bad.note(loaded.bad)
                yield loaded
                done += 1
        except DataError as error:
            if done == start or self.accelerator.num_processes > 1:
                raise
            guard.check_weights(done - 1, ())
            self._save(phase, done)
            self.session.progress.end()
            raise DataError(
                f"{error}\nThe run is saved at {phase.where}, iteration {done} of {phase.total}: "
                "the same command continues it"
            ) from None

    def _guard(self, phase: Phase) -> Guard:
        rate = "train.lr / train.lr_next" if self.step.index else "train.lr"
        guard = Guard(
            phase.model,
            phase.optimizer,
            self.accelerator,
            scaled=self.config.train.precision == "fp16",
            where=phase.where,
            remedy=f"Try a lower {rate}, or train.precision=fp32, and look at these images.",
            end=self.session.progress.end,
            unscale=partial(self.accelerator.unscale_gradients, phase.prepared),
            cut=phase.cut is not None,
        )
        guard.average = {} if phase.average is None else phase.average.values
        return guard

    def _what(self) -> str:
        """Describe what the step teaches: its domains in a run over domains, otherwise its new classes."""
        domains = dict.fromkeys(source.domain for source in self.step.train if source.domain)
        branch = self.step.branch
        names = self.step.spaces[branch].names[self.step.num_old(branch) :]
        return ", ".join(domains or [name for name in names if name != BACKGROUND])

    def _log(
        self,
        phase: Phase,
        done: int,
        logged: dict[str, Tensor],
        lr: float,
        speed: float,
        norm: float,
        data_wait: float,
    ) -> None:
        terms = {name: float(value) for name, value in logged.items()}
        epoch = done / self.epoch
        memory = resident_bytes()
        on_gpu = self.accelerator.device.type == "cuda"
        self.session.progress.update(done, terms, lr, speed)
        self.session.journal.add(
            "train" if phase.tuning is None else "tune",
            step=self.step.index,
            **phase.mark,
            iteration=done,
            epoch=round(epoch, 4),
            lr=lr,
            grad_norm=norm,
            images_per_second=round(speed, 2),
            data_wait=round(data_wait, 4),
            memory=memory,
            terms=terms,
        )
        if phase.tuning is not None:  # the curves of events count the iterations of training only
            return
        self.session.events.scalars(
            self.offset + done,
            terms,
            lr=lr,
            images_per_second=speed,
            data_wait=data_wait,
            grad_norm=norm,
            memory=memory,
            gpu_memory=torch.cuda.max_memory_allocated() if on_gpu else None,
        )

    def _save(self, phase: Phase, iteration: int) -> None:
        cut = phase.cut
        if self.accelerator.is_main_process or cut is not None:
            tensors, document = optimizer_state(phase.optimizer, phase.model)
            files = {**phase.stored(), "optim": tensors}
            if cut is not None:
                # All processes together, so in one order: that of a set differs from process to process, and weights
                # would be put together with the optimiser's values, which have their shapes.
                for name in ("model", "average", "optim"):
                    if name in files:
                        files[name] = cut.whole(files[name])
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "iteration": iteration,
                "total": phase.total,
                "processes": self.accelerator.num_processes,
                "scaler": None if scaler is None else scaler.state_dict(),
                "optimizer": document,
            }
            save_folder(phase.folder / f"it-{iteration:08d}", files, {"state": state})
            purge(phase.folder)
        self.accelerator.wait_for_everyone()
