"""The runs of a sweep as tasks of a Ray cluster.

A task runs on some node, started in some folder. So what leaves this process says where everything is: the working
folder, from which relative paths count, and the folder of the sweep, both absolute.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from everseg.errors import ConfigError, Interrupted, some
from everseg.sweeps import process
from everseg.sweeps.launch import stopping
from everseg.sweeps.plan import FILE, GridRun
from everseg.sweeps.process import Outcome, Submit, run_process

_START = 120.0
"""Seconds in which Ray must be reached or started; it tries on for ever where nobody answers."""
_REACH = 10.0
"""Seconds in which the port of a cluster must answer."""
_PASSED_ON = re.compile(
    "EVERSEG_.*|PYTHON(PATH|HASHSEED|IOENCODING|UTF8)|LANG|LC_.*"
    "|HF_.*|TRANSFORMERS_.*|TORCH.*|PYTORCH_.*|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE|MKL_.*|KMP_.*|OMP_.*"
)
"""Variables that a run has on every node as it has them here, whatever Ray's worker was started with."""
_KILLED = 137
"""Exit code of a run whose worker or node died, as of a process that SIGKILL ended."""


@contextlib.contextmanager
def ray(
    runs: Sequence[GridRun], threads: int, cpus: int | None = None, gpus: float | None = None
) -> Iterator[tuple[Submit, int]]:
    """Run commands as tasks of a Ray cluster; its nodes must share the file system and have Python at one place.

    A signal that ends the sweep is passed on: every run saves itself. A worker that dies fails its own run only.

    Args:
        runs: the runs of the sweep.
        threads: CPU threads of each; settings of a run (train.threads) win.
        cpus: CPUs that Ray keeps for a run; None = as many as it has threads.
        gpus: GPUs that Ray keeps for a run; None = 1 if the cluster has any or the settings need one, else 0.

    Raises:
        ConfigError: Ray is not installed, cannot be reached or started, or has no node for such a run.
    """
    try:
        # Ray reports its use to its makers unless told otherwise; everseg sends nothing that nobody asked for.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # `ray start` asks for a token as soon as this machine has one, but a program that connects gives it only where
        # it is told to, and else waits for ever. A cluster that asks for none takes no notice.
        with contextlib.suppress(RuntimeError, OSError):  # no home folder, or none that may be looked into
            if Path.home().joinpath(".ray", "auth_token").is_file():
                os.environ.setdefault("RAY_AUTH_MODE", "token")
        engine = importlib.import_module("ray")
    except ImportError:
        raise ConfigError("--ray needs Ray: pip install 'everseg[ray]'") from None
    ours, over = not engine.is_initialized(), threading.Event()
    try:
        if ours:
            _connect(engine, over)
        # Only now: Ray's core takes SIGTERM for itself while it starts, and would end this process with a core dump.
        with stopping():
            nodes = [node for node in engine.nodes() if node.get("Alive", True)]
            kept = {
                run.name: _kept(run, cpus or run.config.train.threads or threads, gpus, nodes)
                for run in runs
                if not run.is_finished
            }
            _check_room(kept.values(), nodes)
            # By value: the task's Python is Ray's, and everseg need not be installed beside it.
            for module in (process, importlib.import_module(__name__)):
                engine.cloudpickle.register_pickle_by_value(module)
            task, references, futures = engine.remote(_on_a_node), [], []

            def submit(run: GridRun) -> Future[Outcome]:
                processors, share = kept[run.name]
                reference = task.options(num_cpus=processors, num_gpus=share, max_retries=0).remote(
                    run.command, threads, _task(run, share)
                )
                references.append(reference)
                futures.append(_told(reference.future(), run))
                return futures[-1]

            try:
                yield submit, len(runs) or 1
            except Interrupted:
                for reference in references:
                    engine.cancel(reference, force=False)  # a task that has ended is left as it is
                wait(futures)
                raise
    finally:
        if ours:
            engine.shutdown()
        over.set()


def _connect(engine: Any, over: threading.Event) -> None:
    """Reach the cluster (RAY_ADDRESS, or the one started on this machine), or start one here.

    Args:
        over: set when nobody needs Ray any more.

    Raises:
        ConfigError: nobody answers there, the versions differ, or Ray cannot start.
    """
    address, source = _address()
    if address and not _answers(address):
        raise ConfigError(
            f"--ray: nobody answers at {address} ({source}); start the cluster, mend the address, or unset it to "
            "start Ray on this machine"
        )
    failure: list[BaseException] = []
    begun = threading.Event()

    def start() -> None:
        try:
            # The dashboard is a web server that nobody asked for (SECURITY.md says what was wrong with it).
            engine.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except BaseException as error:
            failure.append(error)
        begun.set()
        # The kernel ends what Ray has started on this machine together with the thread that started it: Ray asks for
        # the signal of the parent's death (PR_SET_PDEATHSIG), and that parent is a thread.
        over.wait()

    # In a thread of its own, as Ray tries on for ever where nobody answers.
    threading.Thread(target=start, name="ray-init", daemon=True).start()
    begun.wait(_START)
    where = f"the cluster at {address} ({source})" if address else "Ray on this machine"
    if not begun.is_set():
        token = "a cluster that asks for a token needs RAY_AUTH_MODE=token here; " if address else ""
        raise ConfigError(
            f"--ray: {where} was not ready within {_START:.0f} seconds; {token}`ray status` says more"
        )
    if failure:
        raise ConfigError(f"--ray: {_said(str(failure[0]), where)}") from None


def _address() -> tuple[str, str]:
    """Return the address of the cluster that Ray will look for, and who named it; "" = it will start one here."""
    named = os.environ.get("RAY_ADDRESS", "")
    if named not in ("", "auto"):
        return ("" if named == "local" else named), "RAY_ADDRESS"
    # Where `ray start` leaves the address of a cluster, which may have died since.
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        return file.read_text(encoding="utf-8").strip(), str(file)
    except OSError:
        return "", ""


def _answers(address: str) -> bool:
    """Tell whether somebody listens at HOST:PORT or ray://HOST:PORT; an address of another form is Ray's to judge."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return True
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH):
            return True
    except (OSError, OverflowError):
        return False


def _said(message: str, where: str) -> str:
    """Put in one sentence why Ray could not be reached or started."""
    versions = re.findall(r"(Ray|Python): (\S+)", message)
    if "ersion mismatch" in message and len(versions) == 4:
        theirs, ours = (
            " and ".join(f"{name} {version}" for name, version in pair)
            for pair in (versions[:2], versions[2:])
        )
        return (
            f"{where} runs {theirs}, this process {ours}; both must be the same: install Ray {versions[0][1]} "
            f"for Python {versions[1][1]} here, or start the cluster anew"
        )
    return f"{where} could not be reached or started: {' '.join(message.split()) or 'no reason given'}"


def _kept(
    run: GridRun, cpus: int, gpus: float | None, nodes: Sequence[Mapping[str, Any]]
) -> tuple[int, float]:
    """CPUs and GPUs that Ray keeps for a run."""
    if gpus is None:
        needed = run.config.train.precision == "fp16" or run.config.train.sync_norm
        gpus = float(needed or any(node["Resources"].get("GPU", 0) >= 1 for node in nodes))
    return cpus, gpus


def _check_room(kept: Iterable[tuple[int, float]], nodes: Sequence[Mapping[str, Any]]) -> None:
    """Refuse runs that no node could ever take."""
    has = [(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in nodes]
    cluster = [
        f"node {node.get('NodeManagerAddress', '?')} has {_amount(cpus, 'CPU')} and {_amount(gpus, 'GPU')}"
        for node, (cpus, gpus) in zip(nodes, has, strict=True)
    ]
    problems = [
        f"--ray: a run asks for {_amount(cpus, 'CPU')} and {_amount(gpus, 'GPU')}, and no node can give them: "
        f"{some(cluster) or 'there is none'}; choose --cpus and --gpus (or train.threads, train.precision, "
        "train.sync_norm) that fit"
        for cpus, gpus in dict.fromkeys(kept)
        if not any(cpus <= most and gpus <= others for most, others in has)
    ]
    if problems:
        raise ConfigError(problems)


def _amount(number: float, what: str) -> str:
    return f"{number:g} {what}" + ("" if number == 1 else "s")


def _task(run: GridRun, gpus: float) -> dict[str, Any]:
    """What a node must know of a run beside its command: every place absolute, and the variables of this process."""
    here = Path.cwd()
    out = here / run.folder.path.parent
    passed = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
    passed.pop(process.LIFELINE, None)
    if not gpus:
        passed["CUDA_VISIBLE_DEVICES"] = ""  # else a run without a GPU would take all that the node has
    return {
        "folder": here,
        "log": out / "logs" / f"{run.name}.log",
        "sweep": out / FILE,
        "environment": passed,
    }


def _on_a_node(command: list[str], threads: int, given: Mapping[str, Any]) -> Outcome:
    """Do the task: run a command on this node, if the node has the places that the command needs."""
    host = socket.gethostname()
    needed = {given["folder"]: "the working folder", given["sweep"]: "the folder of the sweep",
              Path(command[0]): "Python"}  # fmt: skip
    missing = [f"{path} ({what})" for path, what in needed.items() if not path.exists()]
    if missing:
        told = (
            f"node {host} has no {', no '.join(missing)}; nodes need the file system of the sweep's machine"
        )
        return {"exit_code": 2, "error": told, "host": host}
    kept = {name: value for name, value in os.environ.items() if not _PASSED_ON.fullmatch(name)}
    environment = {**kept, **given["environment"]}
    try:
        done = run_process(
            [command[0], "-c", process.RELAY, *command], given["log"], threads, folder=given["folder"],
            environment=environment,
        )  # fmt: skip
    except OSError as error:
        done = {"exit_code": 4, "error": f"node {host} could not start the run: {error}"}
    return {**done, "host": host}


def _told(future: Future[Outcome], run: GridRun) -> Future[Outcome]:
    """Turn what Ray says of a task into the outcome of a run: a worker that died fails this run and no other."""
    told: Future[Outcome] = Future()

    def done(ended: Future[Outcome]) -> None:
        try:
            told.set_result(ended.result())
        except Exception as error:
            told.set_result(_failure(error, run))

    future.add_done_callback(done)
    return told


def _failure(error: Exception, run: GridRun) -> Outcome:
    kind = type(error).__name__
    if kind == "TaskCancelledError":
        return {"exit_code": 130, "error": "not started"}
    reasons: dict[str, str] = {
        "WorkerCrashedError": "its worker process died",
        "NodeDiedError": "its node died",
        "OutOfMemoryError": "Ray ended it, as its node ran out of memory",
    }
    reason = reasons.get(kind, f"Ray lost it ({kind}: {' '.join(str(error).split())[:300]})")
    log = Path.cwd() / run.folder.path.parent / "logs" / f"{run.name}.log"
    return {
        "exit_code": _KILLED,
        "error": f"{reason}; the same command continues it from its last checkpoint (log: {log})",
    }
