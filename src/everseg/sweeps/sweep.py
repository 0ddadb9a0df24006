"""`everseg sweep`: a grid of methods, seeds and tasks, with every shared first step trained once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from everseg.display import OnceADictionary, Piece, table
from everseg.errors import ConfigError, near_miss
from everseg.labels import policies_apart, policy_name
from everseg.progress import Progress
from everseg.runs.documents import MOST_THREADS
from everseg.sweeps import launch, slurm
from everseg.sweeps.plan import (
    EVERY,
    GridRun,
    every_method,
    grid,
    planned_first_step,
    state_of,
    store,
    stored,
)
from everseg.sweeps.ray_cluster import ray

_SAVED = (75, 130, 143)
"""Exit codes of runs that were stopped and saved themselves."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    path: Path
    """Run folder."""
    method: str
    seed: int
    task: str | None
    """None: the preset's own."""
    state: str
    """"finished", "failed", "unfinished" (the same command continues it) or "new"."""
    shared_from: str | None
    """Run whose first step it copies, instead of training the same again."""
    exit_code: int | None
    """Of its process; None where it was not started."""
    error: str | None
    """Why it failed."""
    policy: str = ""
    """Label policy: figures under different ones are not of one kind."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class SlurmJobs:
    """What was handed to SLURM."""

    script: Path | None
    """None: every run is finished or queued."""
    commands: tuple[str, ...]
    """That submit it."""
    jobs: tuple[str, ...]
    """Their ids; () where nothing was submitted."""
    queued: tuple[str, ...] = ()
    """Runs that were pending or running already, and so were not submitted again."""

    def to_json(self) -> dict[str, Any]:
        return {
            "script": None if self.script is None else str(self.script),
            "commands": list(self.commands),
            "jobs": list(self.jobs),
            "queued": list(self.queued),
        }


@dataclass(frozen=True, repr=False)
class Sweep(OnceADictionary):
    """The runs of a sweep, and how far they are."""

    out: Path
    """Folder of the runs."""
    threads: int
    """CPU threads per process."""
    runs: tuple[SweepRun, ...]
    slurm: SlurmJobs | None = None
    """None: the runs were trained here or on Ray."""
    dry_run: bool = False
    """Whether it only lists what would run."""
    left_out: tuple[str, ...] = ()
    """Methods that "all" does not train, each with the reason."""

    @property
    def failed(self) -> tuple[SweepRun, ...]:
        """Runs that ended with an exit code other than 0."""
        return tuple(run for run in self.runs if run.exit_code)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why methods were left out, and why runs failed."""
        return (
            *self.left_out,
            *(f"{run.name}: exit code {run.exit_code}: {run.error}" for run in self.failed),
        )

    def shown(self) -> Iterator[Piece]:
        rows = [[run.name, run.state, _first(run), run.policy] for run in self.runs]
        yield table(["run", "state", "first step", "label policy"], rows)
        if apart := _policies(self.runs):
            yield apart
        if self.dry_run:
            yield f"dry run: nothing was started; the runs would lie in {self.out}"
        elif self.slurm is not None:
            script = self.slurm.script
            if queued := len(self.slurm.queued):
                yield f"{queued} of {len(self.runs)} runs are pending or running already (squeue)"
            yield "nothing to submit" if script is None else f"script: {script}"
            if self.slurm.commands:
                yield "\n".join(
                    ["submitted as:" if self.slurm.jobs else "submit it with:", *self.slurm.commands]
                )
        elif self.failed:
            yield f"{len(self.failed)} of {len(self.runs)} runs stopped; the same command continues them"
        else:
            yield f"everseg compare {self.out}"

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "threads": self.threads,
            "runs": [run.to_json() for run in self.runs],
            **({} if self.slurm is None else {"slurm": self.slurm.to_json()}),
            **({"left_out": list(self.left_out)} if self.left_out else {}),
        }


def _policies(runs: Sequence[SweepRun]) -> str:
    """Say why `compare` will give tables per label policy, and how to get one; "" if each task has one policy only."""
    of_task: dict[str | None, dict[str, list[str]]] = {}
    for run in runs:
        methods = of_task.setdefault(run.task, {}).setdefault(run.policy, [])
        methods += [run.method] if run.method not in methods else []
    apart = next((policies for policies in of_task.values() if len(policies) > 1), None)
    if apart is None:
        return ""
    one, other, *_ = apart
    told = "; ".join(f"{policy} ({', '.join(methods)})" for policy, methods in apart.items())
    return (
        f"Label policies: {told}. They treat some pixels differently ({'; '.join(policies_apart(one, other))}), so "
        "figures under them are not of one kind and compare gives each a table of its own; for one table give all "
        f"runs one policy, as with scenario.policy={one}"
    )


def _first(run: SweepRun) -> str:
    """Where a run's first step comes from."""
    if run.shared_from:
        return f"copy of {run.shared_from}"
    return "" if run.state == "finished" else "trained here"


def sweep(
    source: str | Path,
    methods: Sequence[str],
    seeds: Sequence[int] = (0,),
    tasks: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    on: Literal["here", "ray", "slurm"] = "here",
    cpus: int | None = None,
    gpus: float | None = None,
    only: str | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Sweep:
    """Train methods x seeds x tasks; the same call again continues what is unfinished.

    A first step that several runs have in common is trained once per seed and copied with its digests verified. A run
    that fails does not stop the others.

    Args:
        source: a preset, with or without its method (camvid-6-5-mib, camvid-6-5), or a YAML file.
        methods: names of methods, or joint; ("all",) = every method that has a preset of this data and task.
        seeds: seeds of the runs.
        tasks: tasks instead of the preset's own.
        out: folder of the runs; default runs/<preset>-sweep.
        overrides: "key=value" for all runs.
        jobs: processes at a time on this machine; each gets its share of the CPU threads.
        on: this machine, a Ray cluster (extra `ray`), or SLURM (a script is written, and submitted if sbatch is here).
        cpus: CPU threads of each run (train.threads wins), and CPUs that Ray keeps for it; default this machine's
            divided by `jobs`, on Ray OMP_NUM_THREADS or 1.
        gpus: GPUs that Ray keeps for each run, 1 or a share of one; default 1 if the cluster has any, else 0.
        only: run only the run of this name, here.
        dry_run: train nothing; return what would be run.
        quiet: print no progress.

    Raises:
        EversegError: what is wrong, where, and what to do. The failure of a single run stands in `runs` instead.
    """
    _check_resources(jobs, on, cpus, gpus)
    left_out: list[str] = []
    if list(methods) == [EVERY]:
        methods, left_out = every_method(str(source), overrides)
    done = _sweep(
        str(source), methods, seeds, tasks, out=out, overrides=overrides, jobs=jobs, on=on,
        cpus=cpus, gpus=gpus, only=only, dry_run=dry_run, quiet=quiet,
    )  # fmt: skip
    return replace(done, left_out=tuple(left_out))


def _sweep(
    source: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    tasks: Sequence[str],
    *,
    out: str | Path | None,
    overrides: Sequence[str],
    jobs: int,
    on: Literal["here", "ray", "slurm"],
    cpus: int | None,
    gpus: float | None,
    only: str | None,
    dry_run: bool,
    quiet: bool,
) -> Sweep:
    """Do what `sweep` does, with the methods by name."""
    runs = grid(source, methods, seeds, tasks, out=out, overrides=overrides)
    folder = runs[0].folder.path.parent
    before = stored(folder)
    threads = _threads(before, jobs, on, cpus, only)
    given = {"source": source, "methods": list(methods), "seeds": list(seeds), "tasks": list(tasks),
             "overrides": list(overrides)}  # fmt: skip
    if dry_run:
        return Sweep(folder, threads, tuple(_row(run, runs, {}) for run in runs), dry_run=True)
    progress = Progress(quiet=quiet)
    if only is not None:
        chosen = next((run for run in runs if run.name == only), None)
        if chosen is None:
            names = [run.name for run in runs]
            raise ConfigError(
                f"--only: no run '{only}' in this sweep{near_miss(only, names)}: {', '.join(names)}"
            )
        code = launch.one(chosen, runs, threads=threads, say=progress.message)
        return Sweep(folder, threads, (_row(chosen, runs, {"exit_code": code}),))
    # Before anything starts: the number of threads must survive a crash.
    store(folder, given, threads, runs, {})
    if on == "slurm":
        command = [
            sys.executable,
            "-m",
            "everseg",
            *_words(source, methods, seeds, tasks, folder, overrides),
        ]
        made = slurm.submit(
            runs,
            command,
            folder,
            threads=threads,
            before={entry["name"]: entry["job"] for entry in before.get("runs", []) if entry.get("job")},
            say=progress.message,
            changed=lambda tasks: store(
                folder, given, threads, runs, {name: {"job": task} for name, task in tasks.items()}
            ),
        )
        jobs_there = SlurmJobs(made.script, tuple(made.commands), tuple(made.jobs), tuple(made.queued))
        return Sweep(folder, threads, tuple(_row(run, runs, {}) for run in runs), jobs_there)
    place = ray(runs, threads, cpus, gpus) if on == "ray" else launch.processes(threads, jobs)
    with place as (submit, at_once):
        results = launch.work_off(
            runs,
            submit,
            jobs=at_once,
            threads=threads,
            say=progress.message,
            changed=lambda known: store(folder, given, threads, runs, known),
        )
    store(folder, given, threads, runs, results)
    return Sweep(folder, threads, tuple(_row(run, runs, results.get(run.name, {})) for run in runs))


def _check_resources(jobs: int, on: str, cpus: int | None, gpus: float | None) -> None:
    problems = []
    if jobs < 1:
        problems.append(f"--jobs: expected at least 1, got {jobs}")
    if on == "ray" and jobs > 1:
        problems.append(
            "--jobs: it is for runs on this machine alone; Ray runs as many at once as fit, so use --cpus and --gpus"
        )
    if cpus is not None and not 1 <= cpus <= MOST_THREADS:
        problems.append(f"--cpus: expected 1 to {MOST_THREADS}, got {cpus}")
    if gpus is not None and on != "ray":
        problems.append("--gpus: only Ray is asked for GPUs; add --ray, or leave --gpus out")
    elif gpus is not None and not 0 <= gpus <= 1:
        problems.append(f"--gpus: a run is one process: expected 0, 1 or a share such as 0.5, got {gpus:g}")
    if problems:
        raise ConfigError(problems)


def _threads(before: dict[str, Any], jobs: int, on: str, cpus: int | None, only: str | None) -> int:
    """CPU threads per process: as the sweep was begun with, else as asked for, else this machine's share of each."""
    # A first step is copied only between runs of the same number of threads (`begin`), so it stays for a whole sweep. A
    # task of a SLURM array takes what SLURM gave it.
    if only is not None:
        return cpus or torch.get_num_threads()
    begun = before.get("threads")
    if begun and cpus and begun != cpus:
        raise ConfigError(
            f"--cpus {cpus}: this sweep was begun with {begun} CPU threads per run, and another number may change the "
            "last bits of a result; leave --cpus out, or give the sweep another folder (--out)"
        )
    if begun or cpus:
        return begun or cpus or 1
    if on == "ray":  # this machine's cores say nothing of the nodes'
        given = os.environ.get("OMP_NUM_THREADS", "")
        return torch.get_num_threads() if given else 1
    return max(1, torch.get_num_threads() // jobs)


def _row(run: GridRun, runs: Sequence[GridRun], result: dict[str, Any]) -> SweepRun:
    state, code = state_of(run), result.get("exit_code")
    failed = code and state != "finished" and code not in _SAVED
    return SweepRun(
        name=run.name,
        path=run.folder.path,
        method=run.method,
        seed=run.seed,
        task=run.task,
        state="failed" if failed else state,
        shared_from=result.get("shared_from") or planned_first_step(run, runs) or None,
        exit_code=code,
        error=result.get("error"),
        policy=policy_name(run.config.scenario.policy, run.config.data.dataset),
    )


def _words(
    source: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    tasks: Sequence[str],
    out: Path,
    overrides: Sequence[str],
) -> list[str]:
    """The sweep as a command line."""
    words = ["sweep", source, "--methods", ",".join(methods), "--seeds", ",".join(map(str, seeds))]
    return [*words, *(["--tasks", ",".join(tasks)] if tasks else []), "--out", str(out), *overrides]
