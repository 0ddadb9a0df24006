"""Cases of everseg on two hosts, which are network, name and process namespaces of this machine.

    python scripts/real/hosts_cases.py                # every case; needs root, iproute2 and util-linux
    python scripts/real/hosts_cases.py --only network # only cases whose name contains this
    python scripts/real/hosts_cases.py --python PATH  # with another environment that has everseg's dependencies

The hosts have names and addresses of their own, a cable between them, and one file system. They do not see each other's
processes. Prints a table of the cases with their times, and the versions; exit code 1 if a case failed. A case over two
hosts leaves the same results as an undisturbed run (SHA-256), or says what it measured.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ray_cases import PLUGIN, SETTINGS, FailedError, check
from table import run_cases

ROOT = Path(__file__).resolve().parents[2]
HOSTS = {"evhost1": "10.213.7.1", "evhost2": "10.213.7.2"}
FIRST, SECOND = HOSTS
LEASE = 60
"""Seconds that `everseg.runs.lock` waits for a sign of life."""


class Bench:
    """The two hosts, and the folder that both work in."""

    def __init__(self, root: Path, python: Path) -> None:
        self.root, self.python, self.project = root, python, root / "project"
        (self.project / "data").mkdir(parents=True)
        (self.project / "data" / "pause.txt").write_text("0.05\n")
        (self.project / "plug.py").write_text(PLUGIN)
        (self.project / "mine.yaml").write_text(SETTINGS)
        self.whole: dict[int, dict[str, str]] = {}
        self.started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Bench:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", FIRST, "type", "veth", "peer", "name", SECOND)
        for name, address in HOSTS.items():
            ip("link", "set", name, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            for device in ("lo", name):
                ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in HOSTS:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    def start(self, host: str, name: str, *settings: str, **variables: str) -> subprocess.Popen[str]:
        """Start a run on a host; killing what is given back kills it too."""
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host,
            **variables,
        }  # fmt: skip
        inside = f'hostname {host}; exec "$@"'
        process = subprocess.Popen(
            ["ip", "netns", "exec", host, "unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
             "sh", "-c", inside, "sh", self.python, "-m", "everseg", "run", "mine.yaml", f"name={name}", "--quiet",
             *settings],
            cwd=self.project, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def both(self, name: str, *settings: str, port: int = 29641) -> list[subprocess.Popen[str]]:
        """Start a run of two processes, one on each host."""
        return [
            self.start(host, name, *settings, RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1",
                       MASTER_ADDR=HOSTS[FIRST], MASTER_PORT=str(port))
            for rank, host in enumerate(HOSTS)
        ]  # fmt: skip

    def training(self, name: str, host: str) -> int:
        """Process of a run on a host, in this machine's numbers."""
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                variables = (folder / "environ").read_bytes().split(b"\0")
                if (
                    f"name={name}".encode() in words
                    and b"python" in words[0]
                    and f"GLOO_SOCKET_IFNAME={host}".encode() in variables
                ):
                    return int(folder.name)
        raise FailedError(f"no process of {name} on {host}")

    def at_work(self, name: str) -> None:
        folder, deadline = self.project / "runs" / name, time.monotonic() + 400
        while not [*folder.glob("steps/*/ckpt/*/MANIFEST.json")]:
            check(time.monotonic() < deadline, f"{name} never got to work")
            time.sleep(0.1)

    def files(self, name: str) -> dict[str, str]:
        folder = self.project / "runs" / name
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "steps").rglob("*.*"))
        }

    def undisturbed(self, processes: int = 1) -> dict[str, str]:
        """The files of a run that nobody disturbed."""
        if processes not in self.whole:
            whole = f"whole-{processes}"
            started = self.both(whole) if processes == 2 else [self.start(FIRST, whole)]
            for process in started:
                check(ended(process)[0] == 0, "the undisturbed run failed")
            self.whole[processes] = self.files(whole)
        return self.whole[processes]

    def equal(self, name: str, processes: int = 1) -> str:
        """Compare a run with one of as many processes that nobody disturbed."""
        found, expected = self.files(name), self.undisturbed(processes)
        same = sum(found.get(path) == digest for path, digest in expected.items())
        check(len(expected) >= 10, f"only {len(expected)} files to compare")
        check(found == expected, f"{same} of {len(expected)} files equal an undisturbed run's")
        return f"{same} of {len(expected)} files equal"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def ended(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str]:
    """Wait for the end of a run; gives its exit code and its messages."""
    try:
        _, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise FailedError(f"did not end within {seconds:.0f} s") from None
    return process.returncode, told


def lock_of_a_living_host(bench: Bench) -> str:
    pause = bench.project / "data" / "pause.txt"
    pause.write_text("1\n")  # else the first host may be done before the second has begun
    try:
        first = bench.start(FIRST, "living")
        bench.at_work("living")
        start = time.monotonic()
        code, told = ended(bench.start(SECOND, "living"))
        spent = time.monotonic() - start
    finally:
        pause.write_text("0.05\n")
    check(code == 2 and FIRST in told, f"{code}: {told}")
    check(ended(first)[0] == 0, "the first host's run was disturbed")
    return f"refused with 2 after {spent:.0f} s, names the host; {bench.equal('living')}"


def lock_of_a_dead_host(bench: Bench) -> str:
    first = bench.start(FIRST, "dead")
    bench.at_work("dead")
    os.kill(bench.training("dead", FIRST), signal.SIGKILL)
    ended(first)
    start = time.monotonic()
    code, told = ended(bench.start(SECOND, "dead"))
    check(code == 0, f"{code}: {told}")
    return f"taken over and finished {time.monotonic() - start:.0f} s after its end; {bench.equal('dead')}"


def lock_of_a_paused_host(bench: Bench) -> str:
    first = bench.start(FIRST, "paused")
    bench.at_work("paused")
    pid = bench.training("paused", FIRST)
    os.kill(pid, signal.SIGSTOP)
    code, told = ended(bench.start(SECOND, "paused"))
    check(code == 0, f"{code}: {told}")
    before = bench.files("paused")
    os.kill(pid, signal.SIGCONT)
    code, told = ended(first)
    check(code == 2 and "LOCK" in told, f"{code}: {told}")
    check(bench.files("paused") == before, "the woken run wrote something")
    return f"taken over and finished; the woken run ended with 2 and wrote nothing; {bench.equal('paused')}"


def killed_process(bench: Bench) -> str:
    first, second = bench.both("killed", "train.peer_timeout=20")
    bench.at_work("killed")
    start = time.monotonic()
    os.kill(bench.training("killed", SECOND), signal.SIGKILL)
    ended(second)
    code, told = ended(first)
    spent = time.monotonic() - start
    check(code == 7 and f"process 1 on host {SECOND}" in told, f"{code}: {told}")
    codes = [ended(process)[0] for process in bench.both("killed", "train.peer_timeout=20", port=29642)]
    check(codes == [0, 0], f"the same command ended with {codes}")
    return f"the other ended with 7 after {spent:.0f} s, names it; {bench.equal('killed', 2)}"


def network_gone(bench: Bench) -> str:
    timeout = 10
    both = bench.both("cut", f"train.peer_timeout={timeout}", port=29643)
    bench.at_work("cut")
    start = time.monotonic()
    for name in HOSTS:  # no connection is closed: packets just get lost
        ip("netns", "exec", name, "ip", "link", "set", name, "down")
    told = [ended(process, 120) for process in both]
    spent = time.monotonic() - start
    for name in HOSTS:
        ip("-n", name, "link", "set", name, "up")
    check([code for code, _ in told] == [7, 7], f"{told}")
    check(f"process 1 on host {SECOND}" in told[0][1] and HOSTS[FIRST] in told[1][1], f"{told}")
    check("a fault of everseg" not in told[0][1] + told[1][1], f"{told}")
    codes = [ended(process)[0] for process in bench.both("cut", f"train.peer_timeout={timeout}", port=29644)]
    check(codes == [0, 0], f"the same command ended with {codes}")
    return f"both ended with 7 after {spent:.0f} s (peer_timeout {timeout}); {bench.equal('cut', 2)}"


def fewer_hosts(bench: Bench) -> str:
    """Stopped on two hosts, continued on one."""
    both = bench.both("elastic", port=29645)
    bench.at_work("elastic")
    for host in HOSTS:
        os.kill(bench.training("elastic", host), signal.SIGTERM)
    codes = [ended(process)[0] for process in both]
    check(codes == [143, 143], f"{codes}")
    code, told = ended(bench.start(FIRST, "elastic"))
    check(code == 0, f"{code}: {told}")
    check(set(bench.files("elastic")) == set(bench.undisturbed()), "other files than an undisturbed run's")
    return "two processes ended with 143, one finished the run"


CASES: dict[str, Callable[[Bench], str]] = {
    "lock of a living host": lock_of_a_living_host,
    "lock of a dead host": lock_of_a_dead_host,
    "lock of a paused host": lock_of_a_paused_host,
    "process on the other host killed": killed_process,
    "network between the hosts gone": network_gone,
    "continued on fewer hosts": fewer_hosts,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name contains this, or one of these (A,B)")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    given = parser.parse_args()
    if os.geteuid() or not (shutil.which("ip") and shutil.which("unshare")):
        print("left out: namespaces need root, iproute2 and util-linux")
        return 0
    root = Path(tempfile.mkdtemp(prefix="everseg-hosts-"))
    try:
        with Bench(root, given.python.absolute()) as bench:
            words = [given.python, "-c", "import torch; print(torch.__version__)"]
            torch = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
            print(f"Linux {os.uname().release}, PyTorch {torch} (gloo), Python {sys.version.split()[0]}\n")
            failed = run_cases(CASES, bench, given.only)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
