"""`everseg sweep`: a grid of methods, seeds and tasks, with every shared first step trained once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from everseg.errors import ConfigError, near_miss
from everseg.progress import Progress
from everseg.sweeps import launch
from everseg.sweeps.plan import GridRun, grid, planned_first_step, state_of, store, stored

_SAVED = (75, 130, 143)
"""Exit codes of runs that were stopped and saved themselves."""


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
    only: str | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train methods x seeds x tasks; the same call again continues what is unfinished.

    A first step that several runs have in common is trained once per seed and copied with its digests verified. A run
    that fails does not stop the others.

    Args:
        source: a preset, with or without its method (camvid-6-5-mib, camvid-6-5), or a YAML file.
        methods: names of methods, or joint.
        seeds: of the runs.
        tasks: instead of the preset's own task.
        out: folder of the runs; default runs/<preset>-sweep.
        overrides: "key=value" for all runs.
        jobs: processes at a time on this machine; each gets its share of the CPU threads.
        on: this machine, a Ray cluster (extra `ray`), or SLURM (a script is written, and submitted if sbatch is here).
        only: work off this one run and return.
        dry_run: say what would be done.

    Returns:
        out, threads (per process), and `runs`: name, path, method, seed, task, state, shared_from, exit_code,
        error; with SLURM also `slurm` (script, commands, jobs).

    Raises:
        EversegError: with what, where and what to do; the failure of a single run is told in `runs`.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs: expected at least 1, got {jobs}")
    runs = grid(str(source), methods, seeds, tasks, out=out, overrides=overrides)
    folder = runs[0].folder.path.parent
    before = stored(folder)
    threads = _threads(before, jobs, only)
    given = {"source": str(source), "methods": list(methods), "seeds": list(seeds), "tasks": list(tasks),
             "overrides": list(overrides)}  # fmt: skip
    result: dict[str, Any] = {"out": str(folder), "threads": threads}
    if dry_run:
        return {**result, "runs": [_row(run, runs, {}) for run in runs]}
    progress = Progress(quiet=quiet)
    if only is not None:
        chosen = next((run for run in runs if run.name == only), None)
        if chosen is None:
            names = [run.name for run in runs]
            raise ConfigError(
                f"--only: no run '{only}' in this sweep{near_miss(only, names)}: {', '.join(names)}"
            )
        code = launch.one(chosen, runs, threads=threads, say=progress.message)
        return {**result, "runs": [_row(chosen, runs, {"exit_code": code})]}
    store(folder, given, threads, runs, {})
    if on == "slurm":
        command = [
            sys.executable,
            "-m",
            "everseg",
            *_words(source, methods, seeds, tasks, folder, overrides),
        ]
        told = launch.slurm(runs, command, folder, threads=threads, say=progress.message)
        return {**result, "runs": [_row(run, runs, {}) for run in runs], "slurm": told}
    place = launch.ray(threads) if on == "ray" else launch.processes(threads, jobs)
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
    return {**result, "runs": [_row(run, runs, results.get(run.name, {})) for run in runs]}


def _threads(before: dict[str, Any], jobs: int, only: str | None) -> int:
    """CPU threads per process: those the sweep was begun with, else this machine's divided by the processes."""
    if only is not None:
        return torch.get_num_threads()
    return before.get("threads") or max(1, torch.get_num_threads() // jobs)


def _row(run: GridRun, runs: Sequence[GridRun], result: dict[str, Any]) -> dict[str, Any]:
    state, code = state_of(run), result.get("exit_code")
    failed = code and state != "finished" and code not in _SAVED
    return {
        "name": run.name,
        "path": str(run.folder.path),
        "method": run.method,
        "seed": run.seed,
        "task": run.task,
        "state": "failed" if failed else state,
        "shared_from": result.get("shared_from") or planned_first_step(run, runs) or None,
        "exit_code": code,
        "error": result.get("error"),
    }


def _words(
    source: str | Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    tasks: Sequence[str],
    out: Path,
    overrides: Sequence[str],
) -> list[str]:
    """The sweep as a command line."""
    words = ["sweep", str(source), "--methods", ",".join(methods), "--seeds", ",".join(map(str, seeds))]
    return [*words, *(["--tasks", ",".join(tasks)] if tasks else []), "--out", str(out), *overrides]
