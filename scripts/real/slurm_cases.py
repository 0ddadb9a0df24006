"""Cases of everseg on a real SLURM of one node, started here on loopback and ended again.

    python scripts/real/slurm_cases.py                # every case; installs Debian's packages that lack (root)
    python scripts/real/slurm_cases.py --only scancel # only cases whose name contains this
    python scripts/real/slurm_cases.py --python PATH  # with another environment that has everseg's dependencies

Starts munged, slurmctld and slurmd with a configuration of their own in a folder that goes away. Every case submits a
job of a tiny run, disturbs it, submits the same job again, and compares all results with those of a run that nobody
disturbed, by SHA-256. Prints a table of the cases with their times, and the versions; exit code 1 if a case failed.
Needs Linux and root.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray_cases import PLUGIN, SETTINGS, FailedError, check
from table import run_cases

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("slurmctld", "slurmd", "munge", "slurm-client")
CONFIGURATION = """
ClusterName=everseg
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
SlurmUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
SlurmdTimeout=600
SchedulerParameters=sched_interval=5,bf_interval=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Bench:
    """The cluster, and the folder that the jobs work in."""

    def __init__(self, root: Path, python: Path) -> None:
        self.root, self.python = root, python
        self.project = root / "project"
        (self.project / "data").mkdir(parents=True)
        (self.project / "data" / "pause.txt").write_text("0.05\n")
        (self.project / "plug.py").write_text(PLUGIN)
        (self.project / "mine.yaml").write_text(SETTINGS)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        self.environment = {
            **kept, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{python.parent}:{kept['PATH']}", "TORCH_CPP_LOG_LEVEL": "ERROR",
        }  # fmt: skip
        self.whole: dict[int, dict[str, str]] = {}

    @contextmanager
    def cluster(self) -> Iterator[None]:
        """Start the three daemons and end them, with all that they started."""
        text = CONFIGURATION.format(
            root=self.root, host=socket.gethostname(), controller=free_port(), daemon=free_port()
        )
        (self.root / "slurm.conf").write_text(text)
        for name in ("state", "spool"):
            (self.root / name).mkdir()
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = [f"--{name}={self.root}/munge.{name.partition('-')[0]}"
                 for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")]  # fmt: skip
        daemons = []
        try:
            for words in (
                ["munged", "--foreground", "--force", *munge],
                ["slurmctld", "-D"],
                ["slurmd", "-D"],
            ):
                log = (self.root / f"{words[0]}.out").open("w")
                daemons.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))
                time.sleep(1)
            self.until("the node is idle", lambda: "idle" in self.said("sinfo", "-h", "-o", "%T"), 60)
            yield
        finally:
            with suppress(FailedError, OSError):
                self.said("scancel", "--user=root", "--signal=KILL")
                self.said("scancel", "--user=root", "--signal=KILL", "--full")
            for daemon in reversed(daemons):
                daemon.terminate()
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()

    def said(self, *words: str, refused: bool = False) -> str:
        done = subprocess.run(
            words, env=self.environment, cwd=self.project, text=True, capture_output=True, check=False
        )
        check(refused or done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout + (done.stderr if refused else "")

    def until(self, what: str, answer: Callable[[], object], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not answer():
            check(time.monotonic() < deadline, f"not within {seconds:.0f} seconds: {what}")
            time.sleep(0.2)

    def submit(self, name: str, line: str, *options: str) -> str:
        """Submit a job script of one command; gives the job's id."""
        script = self.project / f"{name}.sh"
        script.write_text(f"#!/bin/bash\n{line}\n")
        return self.said(
            "sbatch", "--parsable", "--open-mode=append", f"--output={name}.out", *options, str(script)
        ).strip()

    def state(self, job: str) -> str:
        """State and exit code of a job: RUNNING 0:0."""
        told = dict(
            word.partition("=")[::2]
            for word in self.said("scontrol", "show", "job", job).split()
            if "=" in word
        )
        return f"{told['JobState']} {told['ExitCode']}"

    def ended(self, job: str) -> str:
        """Wait for the end of a job; gives its state."""
        self.until(
            f"job {job} ends",
            lambda: self.state(job).split()[0] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"),
        )
        return self.state(job)

    def at_work(self, name: str) -> None:
        """Wait until a run has a checkpoint of its own that it could continue from."""
        folder = self.project / "runs" / name
        self.until(f"{name} at work", lambda: [*folder.glob("steps/*/ckpt/*/MANIFEST.json")])

    def text(self, name: str) -> str:
        return (self.project / f"{name}.out").read_text()

    def results(self, name: str) -> dict[str, str]:
        folder = self.project / "runs" / name
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "steps").rglob("*.*"))
        }

    def equal(self, name: str, processes: int = 1) -> str:
        """Compare a run with one of as many processes that nobody disturbed."""
        if processes not in self.whole:
            whole = f"whole-{processes}"
            start = [
                str(self.python),
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node=2",
                "-m",
            ]
            words = start if processes > 1 else [str(self.python), "-m"]
            self.said(*words, "everseg", "run", "mine.yaml", f"name={whole}", "--quiet")
            self.whole[processes] = self.results(whole)
        found, expected = self.results(name), self.whole[processes]
        same = sum(found.get(path) == digest for path, digest in expected.items())
        check(len(expected) >= 10, f"only {len(expected)} files to compare")
        check(found == expected, f"{same} of {len(expected)} files equal an undisturbed run's")
        return f"{same} of {len(expected)} files equal"


RUN = "everseg run mine.yaml name={name} --quiet {more}"
PLAIN = "exec python -m " + RUN
SRUN = "exec srun -n 2 --overlap python -m " + RUN
TORCHRUN = (
    "exec srun -n 1 --overlap python -m torch.distributed.run --standalone --nproc_per_node=2"
    " --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 -m " + RUN
)


def disturbed(
    bench: Bench, name: str, line: str, processes: int, how: Callable[[str], object], *options: str
) -> str:
    """Submit a job, disturb it, and submit it again until it is done."""
    line = line.format(name=name, more="")
    job = bench.submit(name, line, *options)
    bench.at_work(name)
    start = time.monotonic()
    how(job)
    state = bench.ended(job)
    spent = time.monotonic() - start
    said = bench.text(name)
    check("saved at" in said, f"nothing was saved ({state}): {said[-600:]}")
    check("a fault of everseg" not in said, said[-600:])
    again = bench.submit(name, line, *options)
    check(bench.ended(again).startswith("COMPLETED"), f"not finished: {bench.text(name)[-600:]}")
    return f"{state} after {spent:.0f} s, saved; {bench.equal(name, processes)}"


def plain_scancel(bench: Bench) -> str:
    return disturbed(bench, "plain", PLAIN, 1, lambda job: bench.said("scancel", job))


def plain_usr1(bench: Bench) -> str:
    usr1 = ("scancel", "--batch", "--signal=USR1")
    return disturbed(bench, "plain-usr1", PLAIN, 1, lambda job: bench.said(*usr1, job))


def plain_time_limit(bench: Bench) -> str:
    """The shortest limit is a minute; the run is made to last longer."""
    (bench.project / "data" / "pause.txt").write_text("1.5\n")
    try:
        name, line = "limit", PLAIN.format(name="limit", more="")
        job = bench.submit(name, line, "--time=1", "--signal=B:USR1@30")
        bench.at_work(name)
        state = bench.ended(job)
    finally:
        (bench.project / "data" / "pause.txt").write_text("0.05\n")
    check("saved at" in bench.text(name), f"{state}: {bench.text(name)[-600:]}")
    check(bench.ended(bench.submit(name, line)).startswith("COMPLETED"), bench.text(name)[-600:])
    return f"{state}, saved; {bench.equal(name)}"


def srun_scancel(bench: Bench) -> str:
    return disturbed(bench, "srun", SRUN, 2, lambda job: bench.said("scancel", job), "--ntasks=2")


def srun_killed_task(bench: Bench) -> str:
    """One of two tasks is killed; the other ends by itself, and srun does not wait."""
    name, line = "killed", SRUN.format(name="killed", more="train.peer_timeout=20")
    job = bench.submit(name, line, "--ntasks=2")
    bench.at_work(name)
    start = time.monotonic()
    tasks = [pid for pid, rank in bench_tasks(name) if rank == "1"]
    check(len(tasks) == 1, f"tasks of rank 1: {tasks}")
    os.kill(tasks[0], signal.SIGKILL)
    state = bench.ended(job)
    spent = time.monotonic() - start
    said = bench.text(name)
    check("process 1 on host" in said, said[-800:])
    check("same command" in said, said[-800:])
    check("a fault of everseg" not in said, said[-800:])
    again = bench.submit(name, line, "--ntasks=2")
    check(bench.ended(again).startswith("COMPLETED"), bench.text(name)[-600:])
    return f"{state} after {spent:.0f} s, names process 1; {bench.equal(name, 2)}"


def bench_tasks(name: str) -> Iterator[tuple[int, str]]:
    """Processes of a run that srun started, each with its rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = dict(
                entry.decode(errors="replace").partition("=")[::2]
                for entry in (folder / "environ").read_bytes().split(b"\0")
            )
            if f"name={name}".encode() in words and b"srun" not in words[0] and "SLURM_STEP_ID" in variables:
                yield int(folder.name), variables.get("SLURM_PROCID", "")


def torchrun_term(bench: Bench) -> str:
    return disturbed(bench, "torchrun", TORCHRUN, 2, lambda job: bench.said("scancel", job))


def torchrun_usr1(bench: Bench) -> str:
    usr1 = ("scancel", "--signal=USR1")
    return disturbed(bench, "torchrun-usr1", TORCHRUN, 2, lambda job: bench.said(*usr1, job))


def sweep(bench: Bench) -> str:
    """Submitted twice, nothing is doubled; a cancelled task saves itself and is all that the third call submits."""
    words = (
        "sweep",
        "mine.yaml",
        "--methods",
        "ft,mib",
        "--seeds",
        "0",
        "--out",
        "sweep",
        "--slurm",
        "--json",
    )

    def call() -> dict[str, list[str]]:
        done = subprocess.run(
            [bench.python, "-m", "everseg", *words], env=bench.environment, cwd=bench.project, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        check(done.returncode == 0, done.stderr)
        return dict(json.loads(done.stdout)["slurm"])

    first = call()
    check(len(first["jobs"]) == 2, f"{first}")
    again = call()
    check((again["jobs"], len(again["queued"])) == ([], 2), f"{again}")
    out = bench.project / "sweep"
    bench.until("the first run at work", lambda: [*out.glob("mine-ft-s0/steps/*/ckpt/*/MANIFEST.json")])
    bench.said("scancel", f"{first['jobs'][0]}_0")
    bench.until("both end", lambda: not bench.said("squeue", "-h", "-r").strip())
    log = (out / "logs" / "mine-ft-s0.log").read_text()
    check("saved at" in log, log[-600:])
    third = call()
    names = (out / "sweep.sbatch").read_text().split("NAMES=(\n")[1].split(")")[0].split()
    check((len(third["jobs"]), names) == (1, ["mine-ft-s0"]), f"{third} {names}")
    finished = out / "mine-ft-s0/steps/01/metrics.json"
    bench.until("the cancelled run is finished", finished.exists)
    last = call()
    check((last["script"], last["queued"]) in ((None, []), (None, ["mine-ft-s0"])), f"{last}")
    return "2 jobs; again 0; after scancel of one task 1, which finished; again 0"


CASES: dict[str, Callable[[Bench], str]] = {
    "plain job script, scancel (SIGTERM)": plain_scancel,
    "plain job script, SIGUSR1": plain_usr1,
    "plain job script, time limit with --signal=B:USR1@30": plain_time_limit,
    "srun -n 2 everseg, scancel (SIGTERM)": srun_scancel,
    "srun -n 2 everseg, one task killed": srun_killed_task,
    "srun torchrun, scancel (SIGTERM)": torchrun_term,
    "srun torchrun, SIGUSR1": torchrun_usr1,
    "sweep --slurm, repeated": sweep,
}


def ready() -> None:
    """Install what is missing of Debian's packages."""
    if all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        return
    for words in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", *PACKAGES]):
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name contains this, or one of these (A,B)")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    given = parser.parse_args()
    if os.geteuid():
        print("left out: SLURM's daemons need root")
        return 0
    ready()
    root = Path(tempfile.mkdtemp(prefix="everseg-slurm-"))
    try:
        bench = Bench(root, given.python.absolute())
        with bench.cluster():
            version = bench.said("sinfo", "--version").strip()
            torch = bench.said(str(given.python), "-c", "import torch; print(torch.__version__)").strip()
            print(f"{version}, PyTorch {torch}, Python {sys.version.split()[0]}\n")
            failed = run_cases(CASES, bench, given.only)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
