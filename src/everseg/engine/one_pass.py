"""The pass of a step without gradients: a method takes in every batch once. Stopped, it continues exactly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from everseg.config.fields import DataConfig, TrainConfig
from everseg.data.batches.loader import PassOrder, Timed, pass_batches, pass_order
from everseg.data.batches.samples import Loaded, View
from everseg.distributed import all_reduce_max, all_reduce_sum, derive_seed
from everseg.engine.bad_samples import BadSamples
from everseg.engine.runtime import StopRequest
from everseg.engine.session import Session
from everseg.engine.updates import scalars_of
from everseg.errors import CheckpointError, DataError, DivergedError, some
from everseg.methods.base import Method, Pass, StepContext
from everseg.models.model import SegmentationModel
from everseg.progress import resident_bytes
from everseg.runs.commit import load_tensors, purge, read_document, save_folder
from everseg.runs.documents import STATE
from everseg.runs.model_folder import load_strictly
from everseg.types import Batch

FOLDER = "pass"
"""Name of the folder of a pass's checkpoints among those of its step."""
MARK = {"pass": True}
"""What the journal's lines of a pass say in addition."""


def order_of(
    plan: Pass,
    views: Sequence[View],
    data: DataConfig,
    train: TrainConfig,
    *,
    seed: int,
    step: int,
    world: int = 1,
) -> PassOrder:
    """Decide which image a pass shows when.

    Args:
        seed: the run's.
        step: the number that seeds the step's random draws.
        world: number of processes.
    """
    size = plan.batch or (train.batch if plan.crops else train.eval_batch * world)
    return pass_order(
        views, data, seed=derive_seed(seed, FOLDER), step=step, batch=size, world=world,
        crops=plan.crops, every_image=plan.every_image, epochs=plan.epochs,
    )  # fmt: skip


def length_of(order: PassOrder, train: TrainConfig) -> int:
    """Count the batches of a pass, at most `train.max_iterations`."""
    return min(len(order), train.max_iterations or len(order))


@torch.no_grad()
def take_in(method: Method, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
    """Give a method one batch of its pass.

    Returns:
        The scalars that it wants logged.
    """
    return scalars_of(method.accumulate(batch, ctx), type(method).__name__, "accumulate")


@dataclass
class OnePass:
    """The pass of one step; `run` makes it."""

    session: Session
    plan: Pass
    step: int
    stream: int
    """Number that seeds the step's random draws."""
    views: Sequence[View]
    model: SegmentationModel
    method: Method
    title: str
    newest: Callable[[Path], Path | None]
    """Finds the newest valid checkpoint in a folder."""
    offset: int = 0
    """Iterations of the run before the pass, for the x axis of TensorBoard."""
    raw: dict[str, Tensor] | None = None
    """Weights beside the average of them that the pass works with."""

    def __post_init__(self) -> None:
        self.config, self.accelerator = self.session.config, self.session.accelerator
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.folder = self.session.folder.checkpoints(self.step) / FOLDER
        data, train = self.config.data, self.config.train
        self.order = order_of(
            self.plan, self.views, data, train, seed=self.config.seed, step=self.stream, world=self.world
        )
        self.total = length_of(self.order, train)
        self.where = f"the pass of step {self.step}"

    def restore(self) -> int | None:
        """Load the newest checkpoint of the pass into model and method.

        Returns:
            The number of batches that it holds; None if there is no checkpoint.

        Raises:
            CheckpointError: it was made for another number of batches.
        """
        path = self.newest(self.folder)
        if path is None:
            return None
        state = read_document(path / "state.json", shape=STATE)
        if state["total"] != self.total:
            before = state["processes"]
            what = (
                f"where the shares of a batch depend on their number; go on with {before}"
                if before != self.world
                else "the images of the step have changed"
            )
            raise CheckpointError(
                f"{path} was made for {state['total']} batches by {before} processes, and {self.world} would make "
                f"{self.total}: {what}; or start again under another name (name=...)"
            )
        if state["processes"] != self.world:
            self.session.progress.message(
                f"warning: {path.name} was made by {state['processes']} processes, now there are {self.world}; "
                "the run continues, but not bit-identical"
            )
        load_strictly(self.model, load_tensors(path / "model.safetensors"), str(path))
        self.method.load_state_dict(load_tensors(path / "method.safetensors"))
        if (path / "raw.safetensors").exists():
            self.raw = load_tensors(path / "raw.safetensors")
        start = int(state["iteration"])
        self.session.progress.message(f"continuing {self.where} at batch {start} of {self.total}")
        return start

    def run(self, ctx: StepContext, bad: BadSamples, held: int | None, *, after_training: bool) -> None:
        """Make the pass.

        Args:
            bad: account of unreadable samples.
            held: number of batches that the checkpoint holds; None = there is none.
            after_training: the step has trained weights, which are saved before the pass begins.

        Raises:
            DivergedError: what was added up is not finite. The files on disk are not changed.
            Interrupted, TimeBudgetReached: the run was asked to stop, and its state has been saved.
        """
        # Unwrapped: DDP would exchange buffers in every forward pass, and processes may have unequal numbers of them.
        ctx = replace(ctx, model=self.model)
        self._share_buffers()
        self.model.eval()
        self._keep_one_copy()
        start = held or 0
        if held is None and after_training:
            self._save(0)
        done, progress = start, self.session.progress
        loaded = pass_batches(
            self.views, self.config.data, self.order, start=start, stop=self.total, rank=self.rank,
            world=self.world, pin=self.accelerator.device.type == "cuda",
        )  # fmt: skip
        progress.begin(self.title, self.total, start)
        timed = Timed(loaded)
        clock, images = time.perf_counter(), 0
        logged: dict[str, Tensor] = {}
        for one in self._saved_on_bad_data(timed, bad, start):
            if one is not None:
                batch = one.on(self.accelerator.device, self.config.data.normalisation)
                torch.manual_seed(derive_seed(self.config.seed, self.stream, FOLDER, done, self.rank))
                logged = take_in(self.method, batch, ctx)
                images += len(batch.ids) * self.world
            done += 1
            due_log = done % self.config.train.log_every == 0 or done == self.total
            due = done % self.config.train.checkpoint_every == 0
            if due_log:
                self._check(done)
                spent = time.perf_counter() - clock
                self._log(done, logged, images / spent, timed.seconds / spent)
                clock, images, timed.seconds = time.perf_counter(), 0, 0.0
            # As in training: processes decide together, and on a GPU seldom, because deciding waits for the device.
            agree = self.accelerator.device.type == "cpu" or self.world == 1 or due_log or due
            code = all_reduce_max(self.session.stop.code(), self.accelerator) if agree else 0
            if agree:
                bad.share(self.step, done, MARK)
            if done < self.total and (code or due):
                self._check(done)
                self._add_over_processes()
                self._save(done)
            if code and done < self.total:
                progress.end()
                raise StopRequest.error(code, f"{self.where}, batch {done} of {self.total}")
        progress.end()
        self._check(done)
        self._add_over_processes(everywhere=True)

    def _keep_one_copy(self) -> None:
        """Clear the sums of all processes but the first: what they hold at the start is the same in all of them."""
        if self.rank:
            for value in self.method.sums().values():
                value.zero_()

    def _add_over_processes(self, *, everywhere: bool = False) -> None:
        """Add the sums over the processes; the first one gets the totals, or all of them."""
        if self.world == 1:
            return
        add = all_reduce_sum(self.accelerator)
        for value in self.method.sums().values():
            total = add(value.to(self.accelerator.device))
            if everywhere or self.rank == 0:
                value.copy_(total)
            else:
                value.zero_()

    def _share_buffers(self) -> None:
        """Give all processes the running statistics of the first: they may differ, and only these are stored."""
        if self.world > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _check(self, done: int) -> None:
        bad = [name for name, value in self.method.sums().items() if not bool(value.isfinite().all())]
        if all_reduce_max(int(bool(bad)), self.accelerator):
            self.session.progress.end()
            raise DivergedError(
                f"{self.where}, before batch {done + 1} of {self.total}: sums that are not finite: "
                f"{some(bad, 5) or 'on another process'}\nThey were not saved; checkpoints before it are whole. "
                "Look at the images of the step, and at the weights of the step before"
            )

    def _saved_on_bad_data(
        self, batches: Iterator[Loaded | None], bad: BadSamples, start: int
    ) -> Iterator[Loaded | None]:
        """Yield the batches. If one cannot be made, save what was added up so far, then raise its error."""
        done = start
        try:
            for loaded in batches:
                if loaded is not None:
                    bad.note(loaded.bad)
                yield loaded
                done += 1
        except DataError as error:
            if done == start or self.world > 1:
                raise
            self._check(done)
            self._save(done)
            self.session.progress.end()
            raise DataError(
                f"{error}\nThe run is saved at {self.where}, batch {done} of {self.total}: "
                "the same command continues it"
            ) from None

    def _log(self, done: int, logged: Mapping[str, Tensor], speed: float, data_wait: float) -> None:
        measured = {name: float(value) for name, value in logged.items()}
        memory = resident_bytes()
        self.session.progress.update(done, images_per_second=speed, measured=measured)
        self.session.journal.add(
            "pass",
            step=self.step,
            **MARK,
            iteration=done,
            epoch=round(done / self.order.per_epoch, 4),
            images=self.order.batch,
            images_per_second=round(speed, 2),
            data_wait=round(data_wait, 4),
            memory=memory,
            measured=measured,
        )
        self.session.events.measured(
            self.offset + done, measured, images_per_second=speed, data_wait=data_wait, memory=memory
        )

    def _save(self, done: int) -> None:
        if self.accelerator.is_main_process:
            tensors = {
                "model": self.model.state_dict(),
                "method": self.method.state_dict(),
                **({} if self.raw is None else {"raw": self.raw}),
            }
            state = {"iteration": done, "total": self.total, "processes": self.world}
            save_folder(self.folder / f"it-{done:08d}", tensors, {"state": state})
            purge(self.folder)
        self.accelerator.wait_for_everyone()
