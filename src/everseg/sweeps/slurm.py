"""Submit a sweep to SLURM, as an array with one task per run; a repeated sweep submits only what the queue lacks."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from everseg.errors import EversegError
from everseg.files import real_path
from everseg.runs.commit import write_bytes
from everseg.sweeps.plan import GridRun, donor

SAVING = 60
"""Seconds before its time limit at which a task is told to save its run."""


@dataclass
class Submission:
    """What a call handed to SLURM."""

    script: Path | None = None
    """None: nothing was left to submit."""
    commands: list[str] = field(default_factory=list)
    """That submit it."""
    jobs: list[str] = field(default_factory=list)
    """The ids of the arrays; [] where there is no sbatch."""
    queued: list[str] = field(default_factory=list)
    """Runs that were pending or running before."""


def submit(
    runs: Sequence[GridRun],
    command: Sequence[str],
    out: Path,
    *,
    threads: int,
    before: Mapping[str, str],
    say: Callable[[str], None],
    changed: Callable[[dict[str, str]], None],
) -> Submission:
    """Write an array script of the runs that are neither finished nor queued, and submit it where there is `sbatch`.

    Runs that train a first step for others form the first array. Those that hope for a first step wait for the one run
    that trains it, or for that array.

    Args:
        command: the sweep's own command, to which every task adds `--only NAME`.
        before: run -> its task in an earlier submission, ARRAY_NUMBER.
        changed: called with the same of this submission after each array.

    Raises:
        EversegError: SLURM refuses the job, or does not say what is queued.
    """
    unfinished = [run for run in runs if not run.is_finished]
    tasks = {run.name: before[run.name] for run in unfinished if run.name in before}
    waiting = _queue() if tasks and shutil.which("sbatch") else set()
    queued = {name: task for name, task in tasks.items() if task in waiting}
    made = Submission(queued=list(queued))
    for name in queued:
        say(f"{name}: in the queue already, as {queued[name]}")
    left = [run for run in unfinished if run.name not in queued]
    # One script with all names; the two arrays are two ranges of its task numbers.
    ahead = [run for run in unfinished if run.name in queued]
    leaders = {run.name: _leader(run, [*ahead, *left[:number]], runs) for number, run in enumerate(left)}
    first = [run for run in left if leaders[run.name] is None]
    ordered = [*first, *(run for run in left if run not in first)]
    if not ordered:
        return made
    made.script = out / "sweep.sbatch"
    (out / "logs").mkdir(parents=True, exist_ok=True)
    write_bytes(made.script, _script(ordered, command, out, threads).encode())
    commands = []
    if first:
        commands.append(["sbatch", "--parsable", f"--array=0-{len(first) - 1}", str(made.script)])
    if len(first) < len(ordered):
        array = f"--array={len(first)}-{len(ordered) - 1}"
        awaited = {leader.name for leader in leaders.values() if leader is not None}
        ids = sorted({queued[name] for name in awaited if name in queued})
        if awaited - queued.keys():
            ids.insert(0, "$FIRST")
        # "afterany": where a first step failed, the runs that hoped for it train their own.
        commands.append(
            ["sbatch", "--parsable", f"--dependency=afterany:{':'.join(ids)}", array, str(made.script)]
        )
    if shutil.which("sbatch"):
        numbers = iter(range(len(ordered)))
        for words in commands:
            job = _submitted([word.replace("$FIRST", "".join(made.jobs[:1])) for word in words])
            made.jobs.append(job)
            say(f"submitted job {job}")
            of_first = bool(first) and len(made.jobs) == 1
            count = len(first) if of_first else len(ordered) - len(first)
            changed({ordered[n].name: f"{job}_{n}" for n in (next(numbers) for _ in range(count))})
    else:
        say("no sbatch here; nothing was submitted")
    lines = [" ".join(w if "$FIRST" in w else shlex.quote(w) for w in words) for words in commands]
    if len(lines) > 1:
        lines[0] = f"FIRST=$({lines[0]})"
    made.commands = lines
    return made


def _leader(run: GridRun, before: Sequence[GridRun], runs: Sequence[GridRun]) -> GridRun | None:
    """Find the run among those `before` it that trains the first step which a run can take over."""
    if run.first_step is None or run.folder.step(0).exists() or donor(run, runs) is not None:
        return None
    return next((other for other in before if other.first_step == run.first_step), None)


def _script(runs: Sequence[GridRun], command: Sequence[str], out: Path, threads: int) -> str:
    names = "\n".join(f"  {shlex.quote(run.name)}" for run in runs)
    logs = shlex.quote(str(real_path(out / "logs") / "slurm-%A-%a.out"))
    return (
        "#!/bin/bash\n"
        "#SBATCH --job-name=everseg-sweep\n"
        f"#SBATCH --cpus-per-task={threads}\n"
        f"#SBATCH --output={logs}\n"
        "#SBATCH --open-mode=append\n"
        f"#SBATCH --signal=B:USR1@{SAVING}\n"
        "# Add partition, time and GPUs here or on sbatch's command line.\n"
        f"cd {shlex.quote(str(Path.cwd()))} || exit 2\n"
        f"NAMES=(\n{names}\n)\n"
        "# exec: SLURM's signals (scancel, preemption, the time limit) reach everseg, which saves the run.\n"
        f'exec {shlex.join(command)} --only "${{NAMES[$SLURM_ARRAY_TASK_ID]}}"\n'
    )


def _queue() -> set[str]:
    """Ask SLURM which array tasks of this user are pending or running, as ARRAY_NUMBER.

    Raises:
        EversegError: it does not say.
    """
    told = _asked(["squeue", "--noheader", "--array", "--format=%F_%K", f"--user={os.getuid()}"])
    return set(told.split())


def _submitted(command: list[str]) -> str:
    return _asked(command).strip().partition(";")[0]  # --parsable prints "id" or "id;cluster"


def _asked(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise EversegError(f"{command[0]} cannot be started: {error.strerror}") from None
    if done.returncode:
        raise EversegError(f"{shlex.join(command)} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout
