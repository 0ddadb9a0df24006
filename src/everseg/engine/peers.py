"""The processes of one run: how srun's tasks find each other, and how the others learn that one is gone.

A process that was killed closes its connections, and whoever waits for it learns that at once. A host that crashed, or
whose network went away, closes nothing: the others would wait for half an hour. So every process counts up a number of
its own in the store in which the processes met. Each looks at the number of the next one. A number that does not move
for `train.peer_timeout` seconds means that its process is gone. A process that is only slow goes on counting.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta

from accelerate import Accelerator
from torch import distributed

from everseg.config.fields import TrainConfig
from everseg.errors import (
    MORE,
    ConfigError,
    DivergedError,
    EversegError,
    Interrupted,
    PeerError,
    TimeBudgetReached,
    first_line,
    some,
)
from everseg.runs.lock import release

PULSE = 1.0
"""Most seconds between two signs of life."""
GRACE = 5.0
"""Seconds that a process gets to end by itself when another one is gone, before it is ended."""
_CONNECTION = re.compile(r"gloo|NCCL|[Cc]onnection|Timed out|timed out|Broken pipe|[Ss]ocket")
_NO_STORE = (distributed.DistError, RuntimeError, OSError)
"""Errors of a store that does not answer: where the processes met, nobody listens any more."""
_RUNS = itertools.count()
_AGREED = (Interrupted, TimeBudgetReached, DivergedError)
"""Errors with which all processes stop together."""


def srun_processes(environment: Mapping[str, str], devices: int = 0) -> dict[str, str]:
    """Say in torchrun's variables what SLURM says to the tasks of an `srun`.

    Args:
        devices: GPUs that this process sees.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; {} if there is a single task, or if
        another launcher has set them.
    """
    given = environment.get
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environment.keys() or int(given("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return {}
    here = [
        int(count)
        for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", given("SLURM_STEP_TASKS_PER_NODE", "1"))
        for _ in range(int(times or 1))
    ]
    node = int(given("SLURM_NODEID", 0))
    local = int(given("SLURM_LOCALID", 0))
    head = "127.0.0.1" if len(here) == 1 else _first_host(given("SLURM_STEP_NODELIST", ""))
    # Every step of every job has a port of its own, below those that the system gives away by itself.
    port = 10000 + (int(given("SLURM_JOB_ID", 0)) * 7 + int(given("SLURM_STEP_ID", 0))) % 20000
    return {
        "RANK": given("SLURM_PROCID", "0"),
        "WORLD_SIZE": given("SLURM_STEP_NUM_TASKS", "1"),
        # With --gpus-per-task each task sees its own GPU only, as number 0.
        "LOCAL_RANK": str(local % devices if devices else local),
        "LOCAL_WORLD_SIZE": str(here[node] if node < len(here) else 1),
        "MASTER_ADDR": given("MASTER_ADDR", head),
        "MASTER_PORT": given("MASTER_PORT", str(port)),
    }


def _first_host(listed: str) -> str:
    """The first of SLURM's list of hosts, such as node[03-07,9],other."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", listed)
    return "".join(part or "" for part in found.groups()) if found else "127.0.0.1"


@contextlib.contextmanager
def all_present(accelerator: Accelerator, timeout: float, given: str) -> Iterator[None]:
    """Do the work of a run in several processes; if one of them is gone, all others end.

    Args:
        timeout: seconds without a sign of life after which a process counts as gone.
        given: what all processes must have been given alike: a digest of the settings.

    Raises:
        PeerError: another process is gone.
        ConfigError: this process was given other settings than the first one.
    """
    if accelerator.num_processes == 1:
        yield
        return
    peers = _Peers(accelerator.process_index, accelerator.num_processes, timeout)
    try:
        peers.agree(given)
        yield
    except _AGREED:
        raise
    except EversegError as error:
        peers.leave(first_line(error))
        raise
    except Exception as error:
        broken = isinstance(error, distributed.DistError) or _CONNECTION.search(str(error)) is not None
        if reason := peers.reason or (peers.search() if broken else None):
            raise peers.error(reason) from error
        peers.leave(f"{type(error).__name__}: {error}")
        raise
    finally:
        peers.close()


class _Peers:
    """The signs of life of this process, and its watch over the next one."""

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.next = (rank + 1) % world
        self.pulse = min(PULSE, timeout / 5)
        self.reason: str | None = None
        """Which process is gone; None = none."""
        self.meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        host, port = self.meeting.rsplit(":", 1)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # A connection of its own: a collective that waits for the store would make the signs of life wait, too.
        self._store = distributed.PrefixStore(
            f"everseg/{attempt}/{next(_RUNS)}/",
            distributed.TCPStore(
                host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
            ),
        )
        self._store.set(f"host/{rank}", socket.gethostname())
        self._answered = True
        self._ended = threading.Event()
        for work in (self._talk, self._judge):
            threading.Thread(target=work, name=f"everseg{work.__name__}", daemon=True).start()

    def agree(self, given: str) -> None:
        """Check that the first process was given the same.

        Raises:
            ConfigError: it was not.
        """
        if self.rank == 0:
            self._store.set("given", given)
        elif not self._agrees(given):
            raise ConfigError(
                f"process {self.rank} has other settings than process 0, but srun or the launcher started them as one "
                "run; give all processes the same settings, or start separate runs (srun --ntasks=1)"
            )

    def _agrees(self, given: str) -> bool:
        while not self._store.check(
            ["given"]
        ):  # `get` would block the signs of life, which use the same connection
            time.sleep(0.05)
        return bool(self._store.get("given").decode() == given)

    def leave(self, reason: str) -> None:
        """Tell the others that this process ends before the run does."""
        self._announce(f"process {self.rank} on host {socket.gethostname()} stopped ({reason})")

    def close(self) -> None:
        """End the watch; the others do not miss this process any more."""
        self._ended.set()
        # Without an answer nobody can be told; the others then miss this process, and name it themselves.
        with contextlib.suppress(*_NO_STORE):
            self._store.set(f"left/{self.rank}", "1")

    def search(self) -> str:
        """Find out which process is gone after a connection broke."""
        try:
            before = [self._store.add(f"beat/{rank}", 0) for rank in range(self.world)]
            for _ in range(4):  # a process that ends may just be saying why
                time.sleep(self.pulse)
                if self._store.check(["gone"]):
                    return str(self._store.get("gone").decode())
            silent = [
                rank for rank in range(self.world) if self._store.add(f"beat/{rank}", 0) == before[rank]
            ]
        except Exception:
            return self._no_answer("does not answer any more")
        if not silent:
            return "a connection to another process broke"
        names = some([self._name(rank) for rank in silent], 4)
        reason = f"{names} is gone" if len(silent) == 1 else f"{names} are gone"
        self._announce(reason)
        return reason

    def error(self, reason: str) -> PeerError:
        return PeerError(
            f"{reason}; process {self.rank} ends, as the run needs all {self.world}; what was saved counts: the same "
            "command continues the run"
        )

    def _announce(self, reason: str) -> None:
        """Tell the others which process is gone. This process raises or prints the reason itself, whoever hears it."""
        # Without an answer of the store the others learn it from the silence, after `train.peer_timeout`.
        with contextlib.suppress(*_NO_STORE):
            if not self._store.check(["gone"]):
                self._store.set("gone", reason)

    def _name(self, rank: int) -> str:
        host = self._store.get(f"host/{rank}").decode() if self._store.check([f"host/{rank}"]) else "?"
        return f"process {rank} on host {host}"

    def _no_answer(self, how: str) -> str:
        return f"{self.meeting}, where the processes met (process 0 or its launcher), {how}"

    def _talk(self) -> None:
        """Give signs of life and look for those of the next process. Only this thread waits for the store."""
        last, silence = -1, 0.0
        while not self._ended.wait(self.pulse):
            try:
                self._store.add(f"beat/{self.rank}", 1)
                number = self._store.add(f"beat/{self.next}", 0)
                # Its own pauses (SIGSTOP, a suspended machine) do not count: only what it was awake for.
                silence = 0.0 if number != last else silence + self.pulse
                last = number
                if self._store.check(["gone"]):
                    self.reason = self._store.get("gone").decode()
                elif silence >= self.timeout and not self._store.check([f"left/{self.next}"]):
                    self.reason = f"{self._name(self.next)} has given no sign of life for {self.timeout:g} s"
                    self._announce(self.reason)
                self._answered = True
            except Exception:  # the store does not answer: `_judge` measures for how long
                continue

    def _judge(self) -> None:
        """End this process if another is gone and the main thread still waits for it."""
        silence, step = 0.0, self.pulse / 2
        while self.reason is None:
            if self._ended.wait(step):
                return
            silence = 0.0 if self._answered else silence + step
            self._answered = False
            if silence >= self.timeout + self.pulse:
                self.reason = self._no_answer(f"has not answered for {self.timeout:g} s")
        if self._ended.wait(GRACE):
            return
        error = self.error(self.reason)
        os.write(2, f"error: {error}\n{MORE}everseg docs errors#{error.topic}\n".encode())
        release()
        os._exit(error.exit_code)


def did_not_meet(error: Exception) -> PeerError:
    """Make the error of processes that did not find each other."""
    meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return PeerError(
        f"the {os.environ.get('WORLD_SIZE')} processes of the run did not meet at {meeting} "
        f"({first_line(error)[:160]}); start them all together, and see that the hosts reach each other there"
    )


def refuse_sharding(environment: Mapping[str, str]) -> None:
    """Stop where a launcher asks for a model cut into shards: a run is described by its own configuration.

    Raises:
        ConfigError: it does.
    """
    for key, name in (("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if environment.get(f"ACCELERATE_USE_{key}", "false").lower() in ("true", "1"):
            instead = (
                "set train.shard=true here, which cuts the model so"
                if key == "FSDP"
                else "set train.shard=true for a model that does not fit one device"
            )
            raise ConfigError(
                f"{name} is set in accelerate's configuration, which everseg does not read: leave {name} out there "
                f"(accelerate launch --multi_gpu), and {instead}"
            )


def unfit_for_shards(train: TrainConfig, method: str, *, reads_gradients: bool, domains: bool) -> list[str]:
    """List what `train.shard` cannot be combined with, each as a sentence.

    Args:
        method: its name.
        reads_gradients: whether the method reads them in every iteration.
        domains: whether the run is over domains, or its model has several branches.
    """
    if not train.shard:
        return []
    problems = []
    if train.precision == "fp16":
        problems.append(
            "train.shard: the loss scaling of fp16 does not work with shards; set train.precision=bf16 or fp32"
        )
    if train.sync_norm:
        problems.append(
            "train.shard: norms that are synchronised over processes cannot be cut into shards; set "
            "train.sync_norm=false"
        )
    if domains:
        problems.append(
            "train.shard: it takes neither runs over domains nor models of several branches, because in trials it gave "
            "other weights than training without it; leave train.shard out"
        )
    if reads_gradients:
        problems.append(
            f"train.shard: method '{method}' reads whole weights and their gradients in every iteration, but each "
            "process holds only a part of them; leave train.shard out, or take another method"
        )
    return problems
