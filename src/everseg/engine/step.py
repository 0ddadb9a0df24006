"""The training of one step. An interrupted step continues exactly as if it had not stopped."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from everseg.config.fields import RunConfig, TrainConfig
from everseg.data.base import Dataset
from everseg.data.batches.loader import Timed, epoch_length, normalised_batches, train_batches
from everseg.data.batches.samples import Loaded, View
from everseg.distributed import all_reduce_max, all_reduce_sum, derive_seed
from everseg.engine.bad_samples import BadSamples
from everseg.engine.finite import Guard
from everseg.engine.optim import (
    check_param_groups,
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)
from everseg.engine.runtime import StopRequest
from everseg.engine.tensorboard import Events
from everseg.errors import CheckpointError, ConfigError, DataError
from everseg.labels import BACKGROUND
from everseg.methods import switches
from everseg.methods.base import Method, StepContext
from everseg.models.blocks import synchronise_norms
from everseg.models.folding import folded_copy
from everseg.models.model import SegmentationModel, channels_last
from everseg.progress import Progress, resident_bytes
from everseg.runs.commit import load_tensors, newest_valid, purge, read_json, save_folder
from everseg.runs.journal import Journal
from everseg.runs.model_folder import load_strictly
from everseg.runs.run_folder import RunFolder
from everseg.scenarios.steps import Step
from everseg.types import Batch


def train_batch(
    method: Method,
    batch: Batch,
    ctx: StepContext,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[Tensor], None] = lambda loss: loss.backward(),
    check: Callable[[dict[str, Tensor]], None] = lambda terms: None,
) -> dict[str, Tensor]:
    """Take every optimiser update that the method asks for on one batch.

    Args:
        check: called after each backward pass with the loss terms, and again with the scalars of `after_backward`.
            No weight has changed by then. It may raise to stop the run.

    Returns:
        Every loss term (weights applied) and every scalar of `after_backward`, detached. If several updates give the
        same name, its values are summed.
    """
    logged: dict[str, Tensor] = {}
    for terms in method.losses(batch, ctx):
        if not isinstance(terms, dict):
            raise ConfigError(
                f"method '{type(method).__name__}': losses must yield dicts of loss terms, got {type(terms).__name__} "
                "(`yield {...}`, not `return`)"
            )
        # `None` instead of zeros: an optimiser leaves a weight without gradient alone, while weight decay and
        # momentum move one whose gradient is 0.
        optimizer.zero_grad(set_to_none=True)
        backward(torch.stack([*terms.values()]).sum())
        check(terms)  # gradients are there, weights still untouched: the last moment to stop without harm
        extra = method.after_backward(ctx)
        check(extra)
        optimizer.step()
        for name, value in {**terms, **extra}.items():
            value = value.detach()
            logged[name] = logged[name] + value if name in logged else value
    return logged


def epoch_of(step: Step, batch: int) -> int:
    """Count the iterations of an epoch. Branches take turns until the shortest has no whole batch left.

    Args:
        batch: images per iteration over all processes.
    """
    counts = Counter[str]()
    for source in step.train:
        counts[source.branch] += len(source.indices)
    return epoch_length(counts.values(), batch)


def iterations_of(step: Step, train: TrainConfig) -> int:
    """Count the iterations of a step: epochs times iterations per epoch, at most `train.max_iterations`.

    A single-task model is trained as long as the step that it is compared with.
    """
    epochs = train.epochs if step.index == 0 else train.epochs_next or train.epochs
    total = epochs * epoch_of(step, train.batch)
    return min(total, train.max_iterations or total)


def _named(recent: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name the latest loss terms of several branches by term and branch, such as "ce/day"."""
    return {f"{term}/{branch}": value for branch, terms in recent.items() for term, value in terms.items()}


@dataclass(frozen=True)
class Session:
    """The objects that all steps of a run share."""

    config: RunConfig
    datasets: Mapping[str, Dataset]
    folder: RunFolder
    accelerator: Accelerator
    journal: Journal
    progress: Progress
    events: Events
    stop: StopRequest


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

    def __post_init__(self) -> None:
        self.config, self.accelerator = self.session.config, self.session.accelerator
        self.stream = 0 if self.step.fresh else self.step.index
        """Number that seeds the step's random draws. It is 0 for a step from scratch, as if that step ran alone."""

    def train(self) -> None:
        """Train the step to its end, starting from its newest checkpoint if there is one.

        Raises:
            DivergedError: a loss, a gradient or an updated weight is not finite. The files on disk are not changed.
            Interrupted, TimeBudgetReached: the run was asked to stop, and its state has been saved.
        """
        self.total = iterations_of(self.step, self.config.train)
        self.epoch = epoch_of(self.step, self.config.train.batch)
        self._prepare()
        start = self._restore()
        ctx = self._context()
        session = self.session
        # Iterations that a killed process logged after its last checkpoint are done and logged again.
        session.journal.rewind(self.step.index, start)
        self.bad = BadSamples(self.config.data.skip_bad, self.accelerator, session.journal, session.progress)
        if start == 0:  # a checkpoint already holds the state that `begin_step` made
            switches.begin(self.method, ctx)
        self.student.train()
        self._loop(ctx, start)
        switches.finish(self.method, ctx)
        self.bad.share(self.step.index, self.total)

    def _prepare(self) -> None:
        config = self.config
        # New weights depend on (seed, step) only, so a step that is started again draws the same ones.
        torch.manual_seed(derive_seed(config.seed, "grow", self.stream))
        self.method.prepare_model(self.model, self.step)
        if config.train.sync_norm:
            self.model = synchronise_norms(self.model)
        self.model.to(self.accelerator.device)
        if config.train.precision != "fp32":
            channels_last(self.model)  # half-precision kernels are faster in this layout: docs/performance.md
        groups = self.method.param_groups(self.model, self.step)
        check_param_groups(self.model, groups)
        lr_next = config.train.lr_next if config.train.lr_next is not None else config.train.lr
        self.lr = config.train.lr if self.step.is_first else lr_next
        self.optimizer = make_optimizer(groups, config.train, lr=self.lr)

    def _restore(self) -> int:
        """Load the newest checkpoint, let Accelerate wrap model and optimiser, and return the iteration to start at."""
        # The first process moves damaged checkpoints away before the others look.
        with self.accelerator.main_process_first():
            path = newest_valid(
                self.session.folder.checkpoints(self.step.index),
                lambda text: self.session.progress.message(f"warning: {text}"),
            )
        start = 0
        if path is not None:
            state = read_json(path / "state.json")
            if state["total"] != self.total:
                raise CheckpointError(
                    f"{path} was made for {state['total']} iterations, this run has {self.total}: "
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
            load_strictly(self.model, load_tensors(path / "model.safetensors"), str(path))
            load_optimizer_state(
                self.optimizer, self.model, load_tensors(path / "optim.safetensors"), state["optimizer"]
            )
            self.method.load_state_dict(load_tensors(path / "method.safetensors"))
            self.session.progress.message(
                f"continuing step {self.step.index} at iteration {start} of {self.total}"
            )
        self.student, self.prepared = self.accelerator.prepare(self.model, self.optimizer)
        # Accelerate's own forward copies every feature map to float32. It is removed here, because `StepContext`
        # already runs the model under Accelerate's autocast.
        self.model.__dict__.pop("forward", None)
        return start

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
        )

    def _plain_pass(self) -> Iterator[Batch]:
        accelerator = self.accelerator
        batches = normalised_batches(
            self.views,
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

    def _batches(self, start: int, stop: int) -> Iterator[Loaded]:
        """The training batches of this process from one iteration to another."""
        config, accelerator = self.config, self.accelerator
        return train_batches(
            self.views,
            config.data,
            seed=config.seed,
            step=self.stream,
            batch=config.train.batch,
            start=start,
            stop=stop,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            pin=accelerator.device.type == "cuda",
        )

    def _loop(self, ctx: StepContext, start: int) -> None:
        config, accelerator = self.config, self.accelerator
        world = accelerator.num_processes
        batches = self._batches(start, self.total)
        self.session.progress.begin(f"step {self.step.index} ({self._what()})", self.total, start)
        batches = Timed(batches)
        clock, images = time.perf_counter(), 0
        recent: dict[str, dict[str, Tensor]] = {}
        guard = self._guard()
        # Batch, seed and learning rate of an iteration follow from its number alone. So a checkpoint of weights,
        # optimiser and method state is enough to continue from any iteration.
        for iteration, loaded in enumerate(self._saved_on_bad_data(batches, guard, start), start):
            batch = loaded.on(accelerator.device, config.data.normalisation)
            torch.manual_seed(derive_seed(config.seed, self.stream, iteration, accelerator.process_index))
            lr = learning_rate(config.train, self.lr, iteration, self.total, self.epoch)
            set_learning_rate(self.optimizer, lr)
            check = guard.watch(iteration, batch.ids)
            logged = train_batch(self.method, batch, ctx, self.prepared, accelerator.backward, check)
            recent[batch.branch] = logged
            done = iteration + 1  # number of finished iterations; logs and checkpoints use it
            images += len(batch.ids) * world
            due_log = done % config.train.log_every == 0 or done == self.total
            if due_log:
                guard.look()
                spent = time.perf_counter() - clock
                speed, data_wait = images / spent, batches.seconds / spent
                clock, images, batches.seconds = time.perf_counter(), 0, 0.0
                named = _named(recent) if len(self.step.trained_branches) > 1 else logged
                self._log(done, named, lr, speed, guard.norm, data_wait)
            due = done % config.train.checkpoint_every == 0
            # A signal reaches the processes at different iterations. If one stopped alone, the others would wait
            # forever for its gradients, so all processes decide together. Deciding together waits for the device, so
            # on a GPU it happens only at log lines and checkpoints. A single process can look at every iteration.
            agree = guard.at_once or world == 1 or due_log or due
            code = all_reduce_max(self.session.stop.code(), accelerator) if agree else 0
            if agree:
                self.bad.share(self.step.index, done)
            if code or due or done == self.total:  # weights that are not finite must never reach the disk
                guard.check_weights(iteration, batch.ids)
            if code or (due and done < self.total):
                self._save(done)
            if code and done < self.total:
                self.session.progress.end()
                raise StopRequest.error(code, f"{guard.where}, iteration {done} of {self.total}")
        self.session.progress.end()

    def _saved_on_bad_data(self, batches: Iterator[Loaded], guard: Guard, start: int) -> Iterator[Loaded]:
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
            self._save(done)
            self.session.progress.end()
            raise DataError(
                f"{error}\nThe run is saved at step {self.step.index}, iteration {done} of {self.total}: "
                "the same command continues it"
            ) from None

    def _guard(self) -> Guard:
        rate = "train.lr / train.lr_next" if self.step.index else "train.lr"
        return Guard(
            self.model,
            self.optimizer,
            self.accelerator,
            scaled=self.config.train.precision == "fp16",
            where=f"step {self.step.index}",
            remedy=f"Try a lower {rate}, or train.precision=fp32, and look at these images.",
            end=self.session.progress.end,
        )

    def _what(self) -> str:
        """Describe what the step teaches: its domains in a run over domains, otherwise its new classes."""
        domains = dict.fromkeys(source.domain for source in self.step.train if source.domain)
        branch = self.step.branch
        names = self.step.spaces[branch].names[self.step.num_old(branch) :]
        return ", ".join(domains or [name for name in names if name != BACKGROUND])

    def _log(
        self, done: int, logged: dict[str, Tensor], lr: float, speed: float, norm: float, data_wait: float
    ) -> None:
        terms = {name: float(value) for name, value in logged.items()}
        epoch = done / self.epoch
        memory = resident_bytes()
        on_gpu = self.accelerator.device.type == "cuda"
        self.session.progress.update(done, terms, lr, speed)
        self.session.journal.add(
            "train",
            step=self.step.index,
            iteration=done,
            epoch=round(epoch, 4),
            lr=lr,
            grad_norm=norm,
            images_per_second=round(speed, 2),
            data_wait=round(data_wait, 4),
            memory=memory,
            terms=terms,
        )
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

    def _progress_state(self, iteration: int) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "iteration": iteration,
            "total": self.total,
            "processes": self.accelerator.num_processes,
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def _save(self, iteration: int) -> None:
        if self.accelerator.is_main_process:
            tensors, document = optimizer_state(self.optimizer, self.model)
            target = self.session.folder.checkpoints(self.step.index)
            save_folder(
                target / f"it-{iteration:08d}",
                {"model": self.model.state_dict(), "optim": tensors, "method": self.method.state_dict()},
                {"state": {**self._progress_state(iteration), "optimizer": document}},
            )
            purge(target)
        self.accelerator.wait_for_everyone()
