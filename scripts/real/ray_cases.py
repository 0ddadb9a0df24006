"""Cases of `everseg sweep --ray` on a real Ray cluster, started here and ended again.

    python scripts/real/ray_cases.py                    # every case; Ray from PyPI, in a folder that goes away
    python scripts/real/ray_cases.py --python PYTHON    # with an environment that has everseg and Ray already
    python scripts/real/ray_cases.py --only dead        # only cases whose name contains this

The cluster is a head that takes no tasks and two workers of one CPU each, started in another folder. Prints a table of
the cases with their times and the versions; exit code 1 if a case failed. Needs Linux; the cases with another file
system need root (mount namespaces) and are left out without it.
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

ROOT = Path(__file__).resolve().parents[2]
OLDER = "2.56.0"
"""A release of Ray that the newest one refuses to talk to."""
PLUGIN = '''
import time
from pathlib import Path

import numpy as np

from everseg.data.base import Dataset
from everseg.labels import RawLabels

COLOURS = np.array([[40, 40, 40], [220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)


class Squares:
    """Drawn from their index; each takes a while, so that a run can be met at work."""

    def __init__(self, name, count, pause):
        self.name, self.count, self.pause = name, count, pause

    def __len__(self):
        return self.count

    def id(self, index):
        return f"{self.name}-{index:03d}"

    def read_mask(self, index):
        mask = np.zeros((40, 40), np.uint8)
        draw = np.random.RandomState(index + (1000 if self.name == "val" else 0))
        for raw in draw.permutation([1, 2, 3])[: 2 + index % 2]:
            y, x = draw.randint(0, 26, 2)
            mask[y : y + 20, x : x + 13] = raw
        return mask

    def read(self, index):
        time.sleep(self.pause)
        mask = self.read_mask(index)
        return COLOURS[mask] + np.random.RandomState(index).randint(0, 30, (40, 40, 3), np.uint8), mask

    def fingerprint(self):
        return self.name.encode().hex().ljust(64, "0")


def build(root=None):
    pause = float((Path(root) / "pause.txt").read_text())
    labels = RawLabels({0: "background", 1: "red", 2: "green", 3: "blue"}, background=0)
    return Dataset("squares", labels, {"train": Squares("train", 24, pause), "val": Squares("val", 8, 0)})
'''
SETTINGS = """
report: false
tracker: []
data: {dataset: "plug.py:build", root: data, crop: 32, workers: 0}
scenario: {task: "2-1"}
model: {name: deeplabv3-tiny, norm: bn, options: {widths: [8, 8, 8, 8], hidden: 8}}
train: {epochs: 4, epochs_next: 4, batch: 4, lr: 0.05, lr_next: 0.02, checkpoint_every: 4, log_every: 3}
"""
SWEEP = ("sweep", "mine.yaml", "--methods", "ft,mib", "--seeds", "0,1", "--quiet")
NAMES = ("mine-ft-s0", "mine-ft-s1", "mine-mib-s0", "mine-mib-s1")


class FailedError(Exception):
    """A case did not go as promised."""


def check(fact: bool, what: str) -> None:
    if not fact:
        raise FailedError(what)


def asked(name: str, only: str) -> bool:
    """Tell whether `--only A,B` asks for a case: its name contains one of these."""
    return any(part in name for part in only.split(","))


class Bench:
    """The project folder, the environment with Ray, and the clusters that are up."""

    def __init__(self, root: Path, python: Path) -> None:
        self.root, self.python, self.ray = root, python, python.with_name("ray")
        self.project, self.elsewhere = root / "project", root / "elsewhere"
        self.elsewhere.mkdir()
        (self.project / "data").mkdir(parents=True)
        (self.project / "data" / "pause.txt").write_text("0.04\n")
        (self.project / "plug.py").write_text(PLUGIN)
        (self.project / "mine.yaml").write_text(SETTINGS)
        self.address = ""
        self.started: list[subprocess.Popen[str]] = []
        self.sequential: dict[str, dict[str, str]] = {}

    # ------------------------------------------------------------ everseg

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        address = {"RAY_ADDRESS": self.address} if self.address else {}
        # Ray that starts on this machine else leaves a token in the home folder, and later clusters then ask for it.
        own = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
        return {**kept, **own, **address, **changes}

    def start(self, *words: str, **changes: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [self.python, "-m", "everseg", *words], cwd=self.project, env=self.environment(**changes), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def end_all(self) -> None:
        """End what a case that failed has left at work."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
        self.started.clear()
        for pid in self.training():
            signalled(pid, signal.SIGKILL)

    def sweep(self, out: str, *words: str, **changes: str) -> tuple[int, str, str]:
        process = self.start(*SWEEP, "--out", out, *words, **changes)
        stdout, stderr = process.communicate(timeout=3000)
        return process.returncode, stdout, stderr

    def files(self, out: str) -> dict[str, dict[str, str]]:
        """SHA-256 of everything that a run must give again, by run."""
        return {
            name: {
                str(path.relative_to(self.project / out / name)): hashlib.sha256(
                    path.read_bytes()
                ).hexdigest()
                for path in sorted((self.project / out / name / "steps").rglob("*.*"))
            }
            for name in NAMES
        }

    def equal(self, out: str) -> str:
        """Compare all runs with those of the sweep in one process at a time."""
        if not self.sequential:
            code, _, stderr = self.sweep("sequential", RAY_ADDRESS="")
            check(code == 0, f"the sequential sweep failed: {stderr}")
            self.sequential = self.files("sequential")
        found = self.files(out)
        count = sum(map(len, self.sequential.values()))
        same = sum(
            found[name].get(path) == digest
            for name in NAMES
            for path, digest in self.sequential[name].items()
        )
        check(count >= 4 * 10, f"only {count} files to compare")
        check(found == self.sequential, f"{same} of {count} files equal the sequential sweep's")
        return f"{same} of {count} files equal"

    def states(self, out: str) -> dict[str, str]:
        told = json.loads((self.project / out / "sweep.json").read_text())
        return {run["name"]: run["state"] for run in told["runs"]}

    def training(self) -> list[int]:
        """Processes of `everseg run` that belong to this bench."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                relay = words[1:2] == [b"-c"]  # it starts the run and waits for it
                ours = not relay and (folder / "cwd").resolve() == self.project
                if b"run" in words and b"everseg" in words and ours:
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def parent(self, pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def until(self, what: str, answer: Callable[[], object], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not answer():
            check(time.monotonic() < deadline, f"not within {seconds:.0f} seconds: {what}")
            time.sleep(0.1)

    def at_work(self, out: str, count: int = 2) -> None:
        """Wait until so many runs have a checkpoint that they could continue from."""
        pattern = f"{out}/*/steps/*/ckpt/*/MANIFEST.json"
        self.until(
            f"{count} runs at work",
            lambda: len({path.parts[-6] for path in self.project.glob(pattern)}) >= count and self.training(),
        )

    # ------------------------------------------------------------ clusters

    @contextmanager
    def cluster(
        self, workers: int = 2, wrap: tuple[str, ...] = (), ray: Path | None = None
    ) -> Iterator[list[int]]:
        """Start a head without CPUs and workers of one CPU each, in another folder; gives the workers' sessions."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets in it: their paths must be short
        own = (*self._node, "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false",
               f"--temp-dir={temporary}")  # fmt: skip
        nodes: list[subprocess.Popen[bytes]] = []
        log = self.root / f"ray-{port}.log"

        def node(words: tuple[str, ...]) -> None:
            variables = {key: value for key, value in self.environment().items() if key != "PYTHONPATH"}
            variables |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
            variables.pop("RAY_ADDRESS", None)
            with log.open("ab") as file:
                nodes.append(
                    subprocess.Popen(
                        [*(wrap if nodes else ()), ray or self.ray, *words], cwd=self.elsewhere, env=variables,
                        stdout=file, stderr=file, start_new_session=True,
                    )
                )  # fmt: skip

        try:
            for number in range(workers + 1):
                node(own if not number else (*self._node, f"--address=127.0.0.1:{port}", "--num-cpus=1"))
                self.until(
                    f"node {number} of the cluster",
                    lambda count=number + 1: nodes[-1].poll() is not None or self._alive(port, count, ray),
                )
                check(nodes[-1].poll() is None, f"`ray start` gave up: {log.read_text()[-600:]}")
            self.address = f"127.0.0.1:{port}"
            yield [process.pid for process in nodes[1:]]
        finally:
            self.address = ""
            for process in reversed(nodes):
                end_session(process)
            shutil.rmtree(temporary, ignore_errors=True)

    _node = ("start", "--block", "--disable-usage-stats", "--object-store-memory=80000000", "--num-gpus=0")

    def _alive(self, port: int, count: int, ray: Path | None) -> bool:
        python = self.python if ray is None else ray.with_name("python")
        code = (
            "import sys, ray; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False);"
            "print(sum(node['Alive'] for node in ray.nodes()))"
        )
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            done = subprocess.run([python, "-c", code, f"127.0.0.1:{port}"], capture_output=True, text=True,
                                  check=False, timeout=60, cwd=self.elsewhere, env=self.environment())  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.stdout.strip() == str(count)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything in its session, asked first."""
    for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
    for pid in members(process.pid):
        signalled(pid, signal.SIGKILL)


def members(session: int) -> list[int]:
    """Processes of a session, as Ray starts some in groups of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if stat.read_text().rpartition(")")[2].split()[3] == str(session):
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def signalled(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


# ---------------------------------------------------------------- cases on one cluster


def equal(bench: Bench) -> str:
    """Relative YAML, plug-in, data and out folder; workers started elsewhere: equal to the sequential sweep."""
    code, stdout, stderr = bench.sweep("runs/equal", "--ray", "--json")
    check(code == 0, stderr)
    check(len(json.loads(stdout)["runs"]) == 4, stdout)
    check(not any(bench.elsewhere.iterdir()), f"written elsewhere: {list(bench.elsewhere.iterdir())}")
    return bench.equal("runs/equal")


def dead_worker(bench: Bench) -> str:
    """A worker process is killed: its run fails alone, its training saves itself; the same command finishes."""
    process = bench.start(*SWEEP, "--out", "runs/worker", "--ray")
    bench.at_work("runs/worker")
    victim = bench.training()[0]
    os.kill(bench.parent(bench.parent(victim)), signal.SIGKILL)  # behind the relay
    killed = time.monotonic()
    bench.until("the orphan ended", lambda: not Path(f"/proc/{victim}").exists(), 120)
    gone = time.monotonic() - killed
    stdout, stderr = process.communicate(timeout=3000)
    check(process.returncode == 137, f"exit code {process.returncode}: {stderr}")
    check("worker process died" in stderr and "1 of 4 runs stopped" in stdout, stdout + stderr)
    check(sorted(bench.states("runs/worker").values()) == ["finished"] * 3 + ["unfinished"], stdout)
    return f"orphan saved itself after {gone:.1f} s, 3 of 4 finished; {again(bench, 'runs/worker')}"


def again(bench: Bench, out: str) -> str:
    code, _, stderr = bench.sweep(out, "--ray")
    check(code == 0, f"the same command again: {stderr}")
    return f"same command again: {bench.equal(out)}"


def stopped(number: signal.Signals) -> Callable[[Bench], str]:
    def case(bench: Bench) -> str:
        out = f"runs/{number.name.lower()}"
        process = bench.start(*SWEEP, "--out", out, "--ray")
        bench.at_work(out)
        process.send_signal(number)
        asked = time.monotonic()
        if number == signal.SIGTERM:  # as a launcher passes on what the system has sent already
            time.sleep(0.3)
            process.send_signal(number)
        _, stderr = process.communicate(timeout=600)
        took = time.monotonic() - asked
        check(process.returncode == 128 + number, f"exit code {process.returncode}: {stderr}")
        check("the same command continues" in stderr, stderr)
        check(not bench.training(), "a training goes on")
        logs = [path.read_text() for path in (bench.project / out / "logs").iterdir()]
        check(sum("saved at" in text for text in logs) == 2, f"not every run saved itself: {logs}")
        return f"2 runs saved in {took:.1f} s; {again(bench, out)}"

    case.__doc__ = f"{number.name} to the sweep: every run saves itself; the same command finishes"
    return case


def killed_sweep(bench: Bench) -> str:
    """The sweep itself is killed: its runs save themselves; the same command finishes."""
    process = bench.start(*SWEEP, "--out", "runs/driver", "--ray")
    bench.at_work("runs/driver")
    process.kill()
    process.communicate()
    bench.until("every training ended", lambda: not bench.training(), 300)
    logs = [path.read_text() for path in (bench.project / "runs/driver/logs").iterdir()]
    check(sum("saved at" in text for text in logs) == 2, f"not every run saved itself: {logs}")
    return again(bench, "runs/driver")


def never(bench: Bench) -> str:
    """More CPUs or GPUs than any node has: said at once, with what the cluster has."""
    for words, asked in ((("--cpus", "64"), "64 CPUs"), (("--gpus", "1"), "1 GPU")):
        begun = time.monotonic()
        code, _, stderr = bench.sweep("runs/never", "--ray", *words)
        check(code == 2 and asked in stderr and "has 1 CPU" in stderr, stderr)
        check(len(stderr.splitlines()) == 2, stderr)
    return f"{time.monotonic() - begun:.1f} s: {stderr.splitlines()[0][:160]}"


def dead_node(bench: Bench, sessions: list[int]) -> str:
    """A whole node is killed: its run fails alone, the others go on; the same command finishes on what is left."""
    process = bench.start(*SWEEP, "--out", "runs/node", "--ray")
    bench.at_work("runs/node")
    for pid in members(sessions[0]):
        signalled(pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=3000)
    check(process.returncode not in (0, None), stdout)
    states = sorted(bench.states("runs/node").values())
    check(states == ["finished"] * 3 + ["unfinished"], f"{states}: {stderr}")
    check(not bench.training(), "a training goes on")
    return f"exit code {process.returncode}, 3 of 4 finished; {again(bench, 'runs/node')}"


# ---------------------------------------------------------------- cases with a cluster of their own, or none


def other_files(bench: Bench, *, half: bool) -> str:
    """Do a sweep on a node that sees another file system in place of the project."""
    copy = bench.root / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    out = "runs/half" if half else "runs/none"
    if half:  # all that the run reads is there, and what it writes is nowhere else
        shutil.copytree(
            bench.project, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", "sequential")
        )
        (copy / out).mkdir(parents=True)
        (copy / out / "sweep.json").write_text("{}")
    script = f'mount --bind {copy} {bench.project} && exec "$@"'
    with bench.cluster(1, ("unshare", "--mount", "sh", "-c", script, "sh")):
        code, stdout, stderr = bench.sweep(out, "--ray", "--methods", "ft", "--seeds", "0")
    check(code not in (0, None), stdout)
    check(("no finished run" if half else "nodes need the file system") in stderr, stderr)
    check(
        not half or (copy / out / "mine-ft-s0/steps/01/metrics.json").is_file(), "the run was to finish there"
    )
    return f"exit code {code}"


def not_there(bench: Bench) -> str:
    """A node without the project folder: said before anything is trained."""
    return other_files(bench, half=False)


def written_elsewhere(bench: Bench) -> str:
    """A run that ends well on another file system: the sweep calls it failed."""
    return other_files(bench, half=True)


def unreachable(bench: Bench) -> str:
    """Nobody listens at RAY_ADDRESS: one sentence at once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    begun = time.monotonic()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "nowhere.invalid:6379"):
        code, _, stderr = bench.sweep("runs/unreachable", "--ray", RAY_ADDRESS=address)
        check(code == 2 and address in stderr and len(stderr.splitlines()) == 2, stderr)
    return f"3 addresses, {(time.monotonic() - begun) / 3:.1f} s each"


def silent(bench: Bench) -> str:
    """Somebody listens at RAY_ADDRESS and never answers: one sentence after the time limit (10 s here)."""
    code = "import sys, everseg.sweeps.ray_cluster as r; r._START = 10.0; from everseg.cli.main import main; main()"
    with socket.create_server(("127.0.0.1", 0)) as server:
        begun = time.monotonic()
        done = subprocess.run(
            [bench.python, "-c", code, *SWEEP, "--out", "runs/silent", "--ray"], cwd=bench.project, text=True,
            env=bench.environment(RAY_ADDRESS=f"127.0.0.1:{server.getsockname()[1]}"), capture_output=True,
            check=False, timeout=120,
        )  # fmt: skip
    check(done.returncode == 2 and "within 10 seconds" in done.stderr, f"{done.returncode}: {done.stderr}")
    return f"{time.monotonic() - begun:.1f} s"


def other_version(bench: Bench) -> str:
    """A cluster of another release of Ray: one sentence with both."""
    folder = bench.root / "older"
    make_environment(folder, f"ray=={OLDER}", base=False)
    with bench.cluster(0, ray=folder / "bin" / "ray"):
        code, _, stderr = bench.sweep("runs/version", "--ray")
    check(code == 2 and f"Ray {OLDER}" in stderr, stderr)
    return next(line for line in stderr.splitlines() if OLDER in line)[:160]


def local(bench: Bench) -> str:
    """No cluster anywhere: Ray is started on this machine and ended again."""
    begun = time.monotonic()
    code, _, stderr = bench.sweep("runs/local", "--ray", RAY_ADDRESS="local", RAY_TMPDIR=str(bench.root))
    check(code == 0, stderr)
    return f"{time.monotonic() - begun:.1f} s; {bench.equal('runs/local')}"


ON_ONE: dict[str, Callable[[Bench], str]] = {
    "equal": equal, "dead worker": dead_worker, "SIGINT": stopped(signal.SIGINT), "SIGTERM": stopped(signal.SIGTERM),
    "killed sweep": killed_sweep, "never fits": never,
}  # fmt: skip
ALONE: dict[str, Callable[[Bench], str]] = {
    "not there": not_there, "written elsewhere": written_elsewhere, "unreachable": unreachable, "silent": silent,
    "other version": other_version, "local": local,
}  # fmt: skip


# ---------------------------------------------------------------- the table


def make_environment(folder: Path, *packages: str, base: bool = True) -> Path:
    """Make a virtual environment with packages from PyPI; with `base` it sees this Python's packages as well."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    if base:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        sites = [
            subprocess.run([each, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
            for each in (sys.executable, python)
        ]
        Path(sites[1], "zz_base.pth").write_text(f"import site; site.addsitedir({sites[0]!r})\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def versions(python: Path) -> str:
    code = (
        "import platform, importlib.metadata as m;"
        "print('Python', platform.python_version(), *(f'{n} {m.version(n)}' for n in ('ray', 'torch', 'numpy')))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", type=Path, help="Python of an environment with everseg's dependencies and Ray"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this, or one of these (A,B)")
    parser.add_argument("--keep", action="store_true", help="leave the folder with all runs and logs")
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="everseg-ray-"))
    rows: list[tuple[str, str, float, str]] = []
    try:
        bench = Bench(root, given.python or make_environment(root / "venv", "ray"))

        def do(name: str, what: str | None, case: Callable[[], str]) -> None:
            begun = time.monotonic()
            try:
                result, told = "ok", case()
            except Exception as error:
                result, told = "FAILED", f"{type(error).__name__}: {error}"
            bench.end_all()
            rows.append((name, result, time.monotonic() - begun, told))
            print(f"{result:6}  {rows[-1][2]:6.1f} s  {name}: {what}\n{'':18}{told}", flush=True)

        print(f"{versions(bench.python)}; {os.uname().sysname} {os.uname().release}", flush=True)
        chosen = {name: case for name, case in ON_ONE.items() if asked(name, given.only)}
        node = asked("dead node", given.only)
        if chosen or node:
            with bench.cluster() as sessions:
                for name, case in chosen.items():
                    do(name, case.__doc__, lambda case=case: case(bench))
                if node:
                    do("dead node", dead_node.__doc__, lambda: dead_node(bench, sessions))
        for name, case in ALONE.items():
            if asked(name, given.only):
                if case in (not_there, written_elsewhere) and os.geteuid() != 0:
                    print(f"left out  {name}: needs root", flush=True)
                    continue
                do(name, case.__doc__, lambda case=case: case(bench))
    finally:
        if not given.keep:
            shutil.rmtree(root, ignore_errors=True)
    failed = [name for name, result, *_ in rows if result != "ok"]
    print(f"{len(rows) - len(failed)} of {len(rows)} cases ok, {sum(row[2] for row in rows):.0f} s")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
