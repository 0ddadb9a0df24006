"""`everseg sweep`: the grid, what waits for what, failures, other engines; and one real sweep."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from processes import complete, results
from toy import settings

import everseg
from everseg.config import presets
from everseg.config.loading import load, to_json
from everseg.errors import ConfigError, Interrupted
from everseg.runs.commit import save_folder, write_json
from everseg.runs.run_folder import RunFolder
from everseg.sweeps import launch, process, ray_cluster
from everseg.sweeps.plan import grid
from everseg.sweeps.sweep import Sweep
from saying import must_say

Call = Callable[..., tuple[int, str, str]]


# ---------------------------------------------------------------- the grid


def test_runs_are_named_and_configured_by_method_seed_and_task(tmp_path: Path) -> None:
    runs = grid("voc-15-5-mib", ["ft", "mib", "joint"], [0, 3], ["15-1", "19-1"], out=tmp_path,
                overrides=["data.root=x"])  # fmt: skip
    assert len(runs) == 12
    one = next(run for run in runs if run.name == "voc-15-5-mib-s3-15-1")
    assert (one.config.scenario.task, one.config.seed, one.config.data.root) == ("15-1", 3, "x")
    assert one.config.method.options["kd_weight"] == 100, "the preset of this task, not of the one named"
    assert one.config.out == str(tmp_path)
    joint = next(run for run in runs if run.name == "voc-15-5-joint-s0-19-1")
    assert joint.config.scenario.joint


@pytest.mark.parametrize("source", ["demo", "demo-mib", "demo-joint"])
def test_a_preset_is_named_with_or_without_its_method(source: str) -> None:
    runs = grid(source, ["lwf-mc"], [0])
    assert [(run.name, run.config.method.name) for run in runs] == [("demo-lwf-mc-s0", "lwf-mc")]
    assert runs[0].config.out == "runs/demo-sweep"
    assert not runs[0].config.scenario.joint


def test_a_method_without_preset_and_joint_work_on_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: demo-mib\nmethod: {kd_weight: 3}\n")
    runs = {run.method: run.config for run in grid(str(file), ["mib", "ft", "joint"], [0])}
    assert runs["mib"].method.options["kd_weight"] == 3
    assert (runs["ft"].method.name, runs["ft"].name) == ("ft", "mine-ft-s0")
    assert (runs["joint"].method.name, runs["joint"].scenario.joint) == ("ft", True)
    assert grid("camvid-day-dusk", ["mib"], [0])[0].config.method.name == "mib"
    assert grid("demo", ["mdil"], [0])[0].config.method.name == "mdil", "no preset: the method's defaults"


def test_all_means_every_method_with_a_preset_and_names_what_cannot_run(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call("sweep", "voc-15-1", "--methods", "all", "data.root=x", "--dry-run", "--json")
    assert code == 0, err
    told = json.loads(out)
    methods = [run["method"] for run in told["runs"]]
    known = presets.names(every=True)
    assert {f"voc-15-1-{method}" for method in methods} <= set(known)
    assert {"mib", "joint", "dkd-m", "dft", "dft*"} <= set(methods)
    assert len({run["name"] for run in told["runs"]}) == len(methods)
    assert not {"ssul", "microseg"} & set(methods)
    must_say(told["left_out"], "ssul", "data.extra.saliency=DIR")
    must_say(err, "microseg", "data.extra.proposals=DIR")
    given = ("data.root=x", "data.extra.saliency=maps", "--dry-run", "--json")
    told = json.loads(call("sweep", "voc-15-1-mib", "--methods", "all", *given)[1])
    assert "ssul" in [run["method"] for run in told["runs"]]
    assert call("sweep", "mine.yaml", "--methods", "all")[0] == 2


def test_every_variant_of_a_preset_is_one() -> None:
    known = presets.names(every=True)
    for name in known:
        assert presets.variant(name) == name
        assert name.startswith(presets.without_method(name) + "-")
        assert presets.variant(name, method="ft") in known
    assert presets.variant("voc-15-1-overlapped-mib", task="19-1", method="ft") == "voc-19-1-overlapped-ft"
    assert presets.variant("demo-mib", task="3-3") is None
    assert presets.variant("cs-bdd-idd-mdil", method="single") == "cs-bdd-idd-single"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["ft", "mibb"]}, "did you mean 'mib'"),
        ({"methods": []}, "--methods: .*at least one"),
        ({"methods": ["ft", "ft"]}, "--methods: ft .*twice"),
        ({"seeds": [1, 1]}, "--seeds: 1 .*twice"),
        ({"overrides": ["seed=4"]}, "seed: .*--seeds"),
        ({"overrides": ["train.epoch=4"]}, "train.epoch"),
        ({"source": "demoo"}, "'demoo'.*'demo'"),
        ({"source": "nothing.yaml"}, "nothing.yaml"),
    ],
)
def test_mistakes_are_told_before_anything_runs(given: dict[str, Any], message: str) -> None:
    full = {"source": "demo", "methods": ["ft"], "seeds": [0], **given}
    with pytest.raises(ConfigError, match=message):
        grid(full.pop("source"), full.pop("methods"), full.pop("seeds"), **full)


def test_a_folder_with_other_settings_stops_the_sweep_at_once(fake: Fake, tmp_path: Path) -> None:
    sweep_here(tmp_path, ["ft"])
    with pytest.raises(ConfigError, match=r"demo-ft-s0.*other settings: train\.epochs"):
        sweep_here(tmp_path, ["ft"], overrides=["train.epochs=1"])
    assert fake.started == ["demo-ft-s0"]


def test_a_dry_run_lists_and_writes_nothing(tmp_path: Path, call: Call) -> None:
    code, out, _ = call("sweep", "demo", "--methods", "ft,mib,ewc", "--seeds", "0,1", "--out", tmp_path / "x",
                        "--dry-run", "--json")  # fmt: skip
    assert code == 0
    assert {row["name"]: row["shared_from"] for row in json.loads(out)["runs"]} == {
        "demo-ft-s0": None, "demo-ft-s1": None, "demo-mib-s0": "demo-ft-s0", "demo-mib-s1": "demo-ft-s1",
        "demo-ewc-s0": None, "demo-ewc-s1": None,
    }  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_methods_of_two_families_are_told_to_get_tables_of_their_own(tmp_path: Path, call: Call) -> None:
    words = ("sweep", "voc-15-1-overlapped", "--methods", "mib,ft,plop", "--out", tmp_path, "--dry-run")
    code, out, _ = call(*words)
    assert code == 0
    must_say(out, "voc-15-1-overlapped-plop-s0", "plop-voc")
    (said,) = [line for line in out.splitlines() if "scenario.policy" in line]
    must_say(
        said, "mib-voc (mib, ft)", "plop-voc (plop)", "not learnt yet", "compare", "scenario.policy=mib-voc"
    )
    code, out, _ = call(*words, "scenario.policy=mib-voc")
    assert (code, "scenario.policy" in out, "plop-voc" in out) == (0, False, False), "one policy, one table"
    rows = json.loads(call(*words, "--json")[1])["runs"]
    assert {row["method"]: row["policy"] for row in rows} == {
        "mib": "mib-voc",
        "ft": "mib-voc",
        "plop": "plop-voc",
    }


# ---------------------------------------------------------------- what waits for what


class Fake:
    """Takes the place of the processes: a run leaves the folder of a finished one, without training."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.trained: list[str] = []
        """Runs that had no first step when they were started."""
        self.threads: set[int] = set()
        self.failing: set[str] = set()
        self.alive = self.most = 0
        self.lock = threading.Lock()

    def __call__(self, command: list[str], log: Path, threads: int, *_: Any, **__: Any) -> dict[str, Any]:
        words = command[command.index("run") + 1 : command.index("--quiet")]
        config = load(words[0], words[1:])
        folder = RunFolder(Path(config.out) / config.name)
        with self.lock:
            self.started.append(config.name)
            self.threads.add(threads)
            self.alive += 1
            self.most = max(self.most, self.alive)
        time.sleep(0.05)
        try:
            if config.name in self.failing:
                return {"exit_code": 5, "error": "step 0, iteration 3: the loss is not finite"}
            if not folder.step(0).exists():
                self.trained.append(config.name)
            self.leave(folder, config, config.train.threads or threads)
            return {"exit_code": 0, "error": None}
        finally:
            with self.lock:
                self.alive -= 1

    @staticmethod
    def leave(folder: RunFolder, config: Any, threads: int) -> None:
        from importlib.metadata import version

        packages = ("everseg", "torch", "numpy", "pillow", "accelerate")
        folder.path.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in packages}
        write_json(
            folder.path / "run.json", {"config": to_json(config), "threads": threads, "versions": versions}
        )
        steps = [{"index": i, "branches": {}, "train": [], "test": []} for i in (0, 1)]
        write_json(folder.path / "scenario.json", {"steps": steps})
        for index in (0, 1):
            save_folder(folder.final(index), {"model": {}}, {"classes": {"branches": {}}})
            if not (folder.step(index) / "metrics.json").exists():
                folder.save_result(
                    index, {"default": np.eye(2, dtype=np.int64)}, {"step": index, "branches": {}}
                )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(launch, "run_process", made)
    monkeypatch.setattr(ray_cluster, "run_process", made)
    monkeypatch.setattr(launch, "_POLL", 0.01)
    return made


def sweep_here(out: Path, methods: list[str], **options: Any) -> Sweep:
    return everseg.sweep("demo", methods, out=out, quiet=True, **options)


def test_a_shared_first_step_is_trained_once_per_seed(fake: Fake, tmp_path: Path) -> None:
    done = sweep_here(tmp_path, ["ft", "lwf", "mib", "ewc"], seeds=(0, 1))
    assert sorted(fake.trained) == ["demo-ewc-s0", "demo-ewc-s1", "demo-ft-s0", "demo-ft-s1"]
    assert fake.most == 1
    shared = {row.name: row.shared_from for row in done.runs}
    assert shared["demo-mib-s1"] == shared["demo-lwf-s1"] == "demo-ft-s1"
    assert {row.state for row in done.runs} == {"finished"}
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert {run["name"]: run.get("shared_from") for run in document["runs"]} == shared
    again = sweep_here(tmp_path, ["ft", "lwf", "mib", "ewc"], seeds=(0, 1))
    assert len(fake.started) == 8, "nothing is done twice"
    assert {row.state for row in again.runs} == {"finished"}
    sweep_here(tmp_path, ["ilt"], seeds=(0,))
    assert "demo-ilt-s0" in fake.trained, "only runs of the same call share"


def test_runs_in_parallel_wait_for_their_first_step_only(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    done = sweep_here(tmp_path, ["ft", "lwf", "mib"], seeds=(0, 1), jobs=2)
    assert sorted(fake.trained) == ["demo-ft-s0", "demo-ft-s1"]
    assert fake.most == 2
    assert (done.threads, fake.threads) == (2, {2})
    sweep_here(tmp_path, ["ft", "ewc"], jobs=1)
    assert fake.threads == {2}, "a sweep keeps the threads it was begun with"


def test_a_failure_is_listed_and_stops_nothing_and_another_run_trains_the_first_step(
    fake: Fake, tmp_path: Path, call: Call
) -> None:
    fake.failing = {"demo-ft-s0"}
    arguments = ("sweep", "demo", "--methods", "ft,lwf,mib", "--out", tmp_path, "--quiet")
    code, out, err = call(*arguments)
    assert code == 5
    must_say(err, "demo-ft-s0", "exit code 5")
    must_say(err, "step 0, iteration 3", "not finite")
    assert "1 of 3 runs stopped" in out
    assert "the same command" in out
    assert fake.trained == ["demo-lwf-s0"]
    document = {run["name"]: run for run in json.loads((tmp_path / "sweep.json").read_text())["runs"]}
    assert document["demo-ft-s0"]["exit_code"] == 5
    assert document["demo-mib-s0"]["shared_from"] == "demo-lwf-s0"
    fake.failing = set()
    code, out, _ = call(*arguments)
    assert code == 0
    assert f"everseg compare {tmp_path}" in out
    assert fake.started.count("demo-mib-s0") == 1
    document = {run["name"]: run for run in json.loads((tmp_path / "sweep.json").read_text())["runs"]}
    assert document["demo-ft-s0"]["exit_code"] == 0
    assert document["demo-ft-s0"]["shared_from"] == "demo-lwf-s0"


@pytest.mark.parametrize(("code", "state"), [(5, "failed"), (75, "new"), (143, "new")])
def test_a_run_that_saved_itself_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, state: str
) -> None:
    monkeypatch.setattr(launch, "run_process", lambda *_, **__: {"exit_code": code, "error": "stopped"})
    (row,) = sweep_here(tmp_path, ["ft"]).runs
    assert (row.state, row.exit_code) == (state, code)


def test_one_run_alone(fake: Fake, tmp_path: Path, call: Call) -> None:
    arguments = ("sweep", "demo", "--methods", "ft,mib", "--out", tmp_path, "--quiet", "--only")
    assert call(*arguments, "demo-mib-s0")[0] == 0
    assert fake.started == ["demo-mib-s0"]
    assert not (tmp_path / "sweep.json").exists()
    code, _, err = call(*arguments, "demo-mb-s0")
    assert code == 2
    assert "did you mean 'demo-mib-s0'" in err


# ---------------------------------------------------------------- processes


def test_a_process_gives_its_code_its_last_words_and_its_threads(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit('x\\nerror: no such thing\\n  nor this')"
    done = launch.run_process([sys.executable, "-c", code], tmp_path / "logs/a.log", 3)
    assert done == {"exit_code": 1, "error": "no such thing\n  nor this"}
    assert (tmp_path / "logs/a.log").read_text().startswith("3\n") or "3\n" in (
        tmp_path / "logs/a.log"
    ).read_text()
    done = launch.run_process(
        [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "b.log", 1
    )
    assert done["exit_code"] == 137
    assert "b.log" in done["error"]


def test_a_signal_reaches_the_runs(tmp_path: Path) -> None:
    child = (
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), sys.exit(143)))\n"
        "pathlib.Path('ready').touch(); time.sleep(300)\n"
    )
    parent = (
        "import sys, types\nfrom pathlib import Path\nfrom everseg.sweeps import launch\n"
        "folder = types.SimpleNamespace(path=Path('runs/c'))\n"
        f"run = types.SimpleNamespace(name='c', folder=folder, command=[sys.executable, '-c', {child!r}])\n"
        "with launch.processes(1) as (submit, _):\n"
        "    submit(run).result()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240  # a busy machine takes its time to import torch
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (tmp_path / "saved").exists()
    assert b"the same command continues them" in err


@pytest.mark.parametrize("told_before", [False, True])
def test_a_run_whose_starter_is_killed_stops_itself_once(tmp_path: Path, told_before: bool) -> None:
    child = (
        "import os, signal, sys, time, pathlib\nfrom everseg.sweeps.process import follow\n"
        "signal.signal(signal.SIGTERM, lambda *_: open('signals', 'a').write('x'))\n"
        "follow(); assert 'EVERSEG_LIFELINE' not in os.environ; pathlib.Path('ready').touch()\n"
        "while not pathlib.Path('end').exists(): time.sleep(0.02)\n"
        "pathlib.Path('ended').touch()\n"
    )
    parent = (
        "import os, signal, sys, time, pathlib\nfrom everseg.sweeps.process import Child\n"
        f"child = Child([sys.executable, '-c', {child!r}], os.environ)\n"
        "while not pathlib.Path('ready').exists(): time.sleep(0.02)\n"
        f"child.stop(signal.SIGTERM) if {told_before} else None\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], cwd=tmp_path, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    _wait_for(tmp_path / "signals")
    time.sleep(0.2)
    (tmp_path / "end").touch()
    _wait_for(tmp_path / "ended")
    assert (tmp_path / "signals").read_text() == "x"


def test_a_lifeline_that_is_none_is_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    for text in ("", "x", "987654"):
        monkeypatch.setenv(process.LIFELINE, text)
        process.follow()
        assert process.LIFELINE not in os.environ
    assert threading.active_count() == before


def test_a_relay_passes_on_a_signal_and_its_end_ends_the_run(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys, time\nfrom everseg.sweeps.process import follow\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1] + '-saved').touch(), sys.exit(143)))\n"
        "follow()\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)\n"
    )
    for name, number, told in (("asked", signal.SIGTERM, 143), ("lost", signal.SIGKILL, 137)):
        command = [sys.executable, "-c", process.RELAY, sys.executable, "-c", code, str(tmp_path / name)]
        child = process.Child(command, os.environ)
        _wait_for(tmp_path / name)
        os.kill(child._process.pid, number)
        assert child.wait() == told
        _wait_for(tmp_path / f"{name}-saved")


def test_a_relay_passes_on_a_signal_that_comes_while_it_starts_the_run() -> None:
    # Popen that is interrupted between the start of the process and its return
    slow = (
        "import os, signal, subprocess\n"
        "class Slow(subprocess.Popen):\n"
        "    def __init__(self, *given, **named):\n"
        "        super().__init__(*given, **named)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "subprocess.Popen = Slow\n"
    )
    command = [
        sys.executable,
        "-c",
        slow + process.RELAY,
        sys.executable,
        "-c",
        "import time; time.sleep(60)",
    ]
    start = time.monotonic()
    assert process.Child(command, os.environ).wait() == 143
    assert time.monotonic() - start < 50


def test_a_task_that_ray_interrupts_has_its_run_save_itself(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print(1, flush=True); time.sleep(60)"
    log = tmp_path / "a.log"

    def interrupt() -> None:
        while not (log.exists() and log.read_text()):
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)  # what ray.cancel does

    thread = threading.Thread(target=lambda: (interrupt(), None))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        done = launch.run_process([sys.executable, "-c", code], log, 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done["exit_code"] == 143


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


# ---------------------------------------------------------------- other engines


class FakeRay(types.SimpleNamespace):
    """Ray's interface imitated: tasks are threads. `scripts/real/ray_cases.py` starts the real one."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(is_initialized=lambda: False, init=self._init, remote=self._remote, cancel=self._cancel,
                         shutdown=self._shutdown, nodes=lambda: self.cluster, cloudpickle=self)  # fmt: skip
        self.asked: list[dict[str, Any]] = []
        self.given: list[tuple[Any, ...]] = []
        self.cancelled: list[Any] = []
        self.cluster = [{"Alive": True, "NodeManagerAddress": "10.0.0.7", "Resources": {"CPU": 8.0}},
                        {"Alive": False, "NodeManagerAddress": "10.0.0.8", "Resources": {"CPU": 64.0}}]  # fmt: skip
        self.dying: set[str] = set()
        self.failure: BaseException | None = None
        self.starter = threading.main_thread()
        self.pool = ThreadPoolExecutor(4)
        vars(self).update(changes)

    def register_pickle_by_value(self, module: Any) -> None:
        pass

    def _init(self, **_: Any) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)
        self.starter = threading.current_thread()
        if self.failure:
            raise self.failure

    def _shutdown(self) -> None:
        # With the thread that started them, the kernel ends the processes that Ray has started on this machine.
        self.lived = self.starter.is_alive()

    def _cancel(self, reference: Any, *, force: bool) -> None:
        self.cancelled.append((reference, force))

    def _remote(self, function: Callable[..., Any]) -> Any:
        def options(**wanted: Any) -> Any:
            def remote(command: list[str], *arguments: Any) -> Any:
                self.asked.append(wanted)
                self.given.append((command, *arguments))
                future = self.pool.submit(self._task, function, command, *arguments)
                return types.SimpleNamespace(future=lambda: future)

            return types.SimpleNamespace(remote=remote)

        return types.SimpleNamespace(options=options)

    def _task(self, function: Callable[..., Any], command: list[str], *arguments: Any) -> Any:
        if any(f"name={name}" in command for name in self.dying):
            raise type("WorkerCrashedError", (Exception,), {})("no more words")
        return function(command, *arguments)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    made = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "nowhere")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return made


def test_ray_gets_the_runs_as_tasks_with_all_that_they_need(
    fake: Fake, engine: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERSEG_CACHE", "cache")
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    done = sweep_here(Path("mine"), ["ft", "lwf", "mib"], seeds=(0, 1), on="ray")
    assert {row.state for row in done.runs} == {"finished"}
    assert sorted(fake.trained) == ["demo-ft-s0", "demo-ft-s1"]
    assert fake.most >= 2
    assert engine.lived
    engine.starter.join(10)
    assert not engine.starter.is_alive()
    assert engine.asked[0] == {"num_cpus": 1, "num_gpus": 0.0, "max_retries": 0}
    command, threads, places = engine.given[0]
    assert (Path(command[0]).is_absolute(), threads) == (True, 1)
    assert places["folder"] == tmp_path, "relative paths count from the folder of the sweep"
    assert places["log"] == tmp_path / "mine/logs/demo-ft-s0.log"
    assert places["environment"]["EVERSEG_CACHE"] == "cache"
    assert places["environment"]["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(("token", "mode"), [(True, "token"), (False, None)])
def test_a_token_of_this_machine_is_given(
    fake: Fake,
    engine: FakeRay,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: bool,
    mode: str | None,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE")
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("x")
    assert sweep_here(tmp_path / "mine", ["ft"], on="ray").runs[0].state == "finished"
    assert os.environ.get("RAY_AUTH_MODE") == mode


def test_gpus_are_asked_for_where_the_cluster_has_them(fake: Fake, engine: FakeRay, tmp_path: Path) -> None:
    engine.cluster[0]["Resources"]["GPU"] = 2.0
    sweep_here(tmp_path / "a", ["ft"], on="ray", cpus=3)
    sweep_here(tmp_path / "b", ["ft"], on="ray", gpus=0.5)
    sweep_here(tmp_path / "c", ["ft"], on="ray", overrides=["train.threads=4"], gpus=0)
    assert [(asked["num_cpus"], asked["num_gpus"]) for asked in engine.asked] == [(3, 1), (1, 0.5), (4, 0)]
    assert ["CUDA_VISIBLE_DEVICES" in given[2]["environment"] for given in engine.given] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"cpus": 9}, ("9 CPUs", "--cpus", "node 10.0.0.7", "8 CPUs and 0 GPUs")),
        ({"gpus": 1}, ("1 GPU", "--gpus", "node 10.0.0.7")),
        ({"overrides": ["train.precision=fp16"]}, ("1 GPU", "train.precision")),
        ({"jobs": 2}, ("--jobs", "--cpus")),
        ({"gpus": 2}, ("--gpus", "got 2")),
        ({"cpus": 0}, ("--cpus", "got 0")),
    ],
)
def test_what_ray_can_never_run_is_said_at_once(
    fake: Fake, engine: FakeRay, tmp_path: Path, options: dict[str, Any], facts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as stop:
        sweep_here(tmp_path, ["ft"], on="ray", **options)
    must_say(str(stop.value), *facts)
    assert "10.0.0.8" not in str(stop.value), "a dead node has nothing"
    assert fake.started == []


def test_a_sweep_keeps_its_threads_and_gpus_are_rays(fake: Fake, engine: FakeRay, tmp_path: Path) -> None:
    own = ["train.threads=null"]
    sweep_here(tmp_path, ["ft"], cpus=2, overrides=own)
    sweep_here(tmp_path, ["ft", "mib"], on="ray", overrides=own)
    assert (fake.threads, engine.asked[-1]["num_cpus"]) == ({2}, 2)
    with pytest.raises(ConfigError, match=r"--cpus 3: .*2 CPU threads"):
        sweep_here(tmp_path, ["ft"], cpus=3, overrides=own)
    with pytest.raises(ConfigError, match=r"--gpus: .*--ray"):
        sweep_here(tmp_path, ["ft"], gpus=1)


def test_a_dead_worker_fails_its_own_run_only(
    fake: Fake, engine: FakeRay, tmp_path: Path, call: Call
) -> None:
    engine.dying = {"demo-lwf-s0"}
    arguments = ("sweep", "demo", "--methods", "ft,lwf,mib", "--out", tmp_path, "--quiet", "--ray")
    code, out, err = call(*arguments)
    assert code == 137
    must_say(
        err, "demo-lwf-s0", "worker process died", "same command", str(tmp_path / "logs/demo-lwf-s0.log")
    )
    assert "1 of 3 runs stopped" in out
    states = {run["name"]: run["state"] for run in json.loads((tmp_path / "sweep.json").read_text())["runs"]}
    assert states["demo-mib-s0"] == states["demo-ft-s0"] == "finished"
    engine.dying = set()
    assert call(*arguments)[0] == 0
    assert fake.started.count("demo-ft-s0") == 1


@pytest.mark.parametrize("on", ["here", "ray"])
def test_a_run_that_is_not_where_the_sweep_looks_for_it_has_failed(
    fake: Fake, engine: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: Any
) -> None:
    monkeypatch.setattr(Fake, "leave", staticmethod(lambda *_: None))
    (row,) = sweep_here(tmp_path, ["ft"], on=on).runs
    assert (row.state, row.exit_code) == ("failed", 4)
    must_say(row.error or "", str(tmp_path / "demo-ft-s0"), "no finished run", "file system")
    code = launch.one(grid("demo", ["ft"], [0], out=tmp_path)[0], [], threads=1, say=lambda _: None)
    assert code == 4


def test_files_of_another_machine_may_be_seen_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_POLL", 0.01)
    answers = iter([False, False, True])
    run: Any = type(
        "Run", (), {"folder": RunFolder(tmp_path), "is_finished": property(lambda _: next(answers))}
    )()
    assert launch._checked({"exit_code": 0, "error": None, "host": "other"}, run)["exit_code"] == 0


def test_a_signal_has_ray_interrupt_every_run(
    fake: Fake, engine: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []

    def waiting(futures: Any) -> None:
        signal.raise_signal(signal.SIGTERM)  # the launcher's, after the system's: one request
        waited.append(len(futures))

    monkeypatch.setattr(launch, "wait", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(ray_cluster, "wait", waiting)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="the same command continues") as stop:
        sweep_here(tmp_path, ["ft", "ewc"], on="ray")
    assert waited == [2]
    assert stop.value.exit_code == 143
    assert [force for _, force in engine.cancelled] == [False, False]
    assert engine.handler == before, (
        "Ray's core sets a handler of its own while it starts; ours must come after it"
    )
    assert signal.getsignal(signal.SIGTERM) == before


def test_nobody_at_an_address_is_said_at_once(
    engine: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    for address in (f"127.0.0.1:{free}", f"ray://127.0.0.1:{free}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError) as stop:
            sweep_here(tmp_path, ["ft"], on="ray")
        must_say(str(stop.value), address, "RAY_ADDRESS")
    monkeypatch.delenv("RAY_ADDRESS")
    left = tmp_path / "ray" / "ray_current_cluster"
    left.parent.mkdir()
    left.write_text(f"127.0.0.1:{free}\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ConfigError, match=str(left)):
        sweep_here(tmp_path, ["ft"], on="ray")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    engine.failure = ValueError("no memory\n left")
    with pytest.raises(ConfigError, match="no memory left"):
        sweep_here(tmp_path, ["ft"], on="ray")


def test_other_versions_and_a_cluster_that_never_answers_are_said(
    engine: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.failure = RuntimeError(
        "Version mismatch: The cluster was started with:\n    Ray: 2.56.0\n    Python: 3.12.1\n"
        "This process on node 10.0.0.7 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )
    with pytest.raises(ConfigError) as stop:
        sweep_here(tmp_path, ["ft"], on="ray")
    must_say(str(stop.value), "Ray 2.56.0 and Python 3.12.1", "Ray 2.60.0 and Python 3.11.7")
    monkeypatch.setattr(ray_cluster, "_START", 0.05)
    engine.init = lambda **_: time.sleep(0.5)
    with pytest.raises(ConfigError, match="0 seconds"):
        sweep_here(tmp_path, ["ft"], on="ray")


def test_a_node_without_the_places_of_a_run_says_which(tmp_path: Path) -> None:
    given = {"folder": tmp_path / "no", "sweep": tmp_path / "sweep.json", "log": tmp_path / "l/a.log",
             "environment": {}}  # fmt: skip
    done = ray_cluster._on_a_node([str(tmp_path / "python")], 1, given)
    assert done["exit_code"] == 2
    must_say(
        done["error"], socket.gethostname(), str(tmp_path / "no"), "sweep.json", str(tmp_path / "python")
    )
    (tmp_path / "sweep.json").touch()
    code = "import os; print(os.getcwd(), os.environ.get('EVERSEG_X'), os.environ.get('PYTHONPATH'))"
    given |= {"folder": tmp_path, "environment": {"EVERSEG_X": "y"}}
    done = ray_cluster._on_a_node([sys.executable, "-c", code], 1, given)
    assert (done["exit_code"], done["host"]) == (0, socket.gethostname())
    assert (tmp_path / "l/a.log").read_text().split() == [str(tmp_path), "y", "None"]


def test_without_ray_the_extra_is_named(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = call("sweep", "demo", "--methods", "ft", "--out", tmp_path, "--ray", "--quiet")
    assert code == 2
    assert "pip install 'everseg[ray]'" in err


def test_slurm_gets_an_array_and_those_that_share_depend_on_the_first(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    arguments = (
        "sweep",
        "demo",
        "--methods",
        "ft,mib,ewc",
        "--seeds",
        "0,1",
        "--out",
        tmp_path / "o",
        "--slurm",
    )
    bash, tools = shutil.which("bash"), os.environ["PATH"]
    assert bash is not None
    monkeypatch.setenv("PATH", str(bin_folder))  # no sbatch, whatever this machine has
    code, out, _ = call(*arguments, "train.epochs=1")
    assert code == 0
    script = tmp_path / "o" / "sweep.sbatch"
    assert "submit it with:" in out
    assert f"FIRST=$(sbatch --parsable --array=0-3 {script})" in out
    assert f"sbatch --parsable --dependency=afterany:$FIRST --array=4-5 {script}" in out
    names = [line.strip() for line in script.read_text().split("NAMES=(\n")[1].split(")")[0].splitlines()]
    assert names[:2] == ["demo-ft-s0", "demo-ft-s1"]
    assert names[4:] == ["demo-mib-s0", "demo-mib-s1"]
    assert subprocess.run([bash, "-n", script], check=False).returncode == 0
    fake_sbatch = bin_folder / "sbatch"
    fake_sbatch.write_text(f'#!/bin/sh\necho "$@" >> {calls}\necho "$(wc -l < {calls})7;cluster"\n')
    fake_sbatch.chmod(fake_sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{tools}")
    code, out, _ = call(*arguments, "train.epochs=1", "--json")
    assert code == 0
    assert json.loads(out)["slurm"]["jobs"] == ["17", "27"]
    assert "--dependency=afterany:17" in calls.read_text().splitlines()[1]


def test_the_slurm_tasks_command_is_the_sweeps_own(
    fake: Fake, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # nothing is submitted, even where there is sbatch
    call("sweep", "demo", "--methods", "ft,mib", "--out", tmp_path / "o", "--slurm", "train.epochs=1")
    line = (tmp_path / "o/sweep.sbatch").read_text().splitlines()[-1]
    words = line.replace('"${NAMES[$SLURM_ARRAY_TASK_ID]}"', "demo-mib-s0").split()
    assert words[0] == "exec"  # else SLURM's signals would reach bash, which does not pass them on
    assert words[2:4] == ["-m", "everseg"]
    assert call(*words[4:])[0] == 0
    assert fake.started == ["demo-mib-s0"]


def test_a_repeated_slurm_sweep_submits_only_what_is_neither_finished_nor_queued(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, calls, queue = tmp_path / "bin", tmp_path / "calls", tmp_path / "queue"
    tools.mkdir()
    for name, script in {
        "sbatch": f'echo "$@" >> {calls}\necho "$(wc -l < {calls})7"',
        "squeue": f"test -e {queue} || exit 1\ncat {queue}",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")

    def submitted(methods: str = "ft,mib,ewc") -> tuple[dict[str, Any], list[str]]:
        calls.write_text("")
        code, out, err = call(
            "sweep", "demo", "--methods", methods, "--out", tmp_path / "o", "--slurm", "--json", "train.epochs=1",
        )  # fmt: skip
        assert code == 0, err
        names = (tmp_path / "o/sweep.sbatch").read_text().split("NAMES=(\n")[1].split(")")[0].split()
        return json.loads(out)["slurm"], [*calls.read_text().splitlines(), *names]

    first, told = submitted()
    assert (first["jobs"], first["queued"]) == (["17", "27"], [])
    assert told[2:] == ["demo-ft-s0", "demo-ewc-s0", "demo-mib-s0"]

    queue.write_text("17_0\n99_1\n27_2\n")  # ewc has ended, without being finished
    again, told = submitted()
    assert sorted(again["queued"]) == ["demo-ft-s0", "demo-mib-s0"]
    assert told[1:] == ["demo-ewc-s0"]
    assert "--array=0-0" in told[0]
    assert "dependency" not in told[0]

    queue.write_text("17_0\n17_1\n27_2\n")  # the last one, as its task 17_0
    more, told = submitted("ft,mib,ewc,lwf")  # lwf takes the first step of ft, which is queued
    assert len(more["queued"]) == 3
    assert told[1:] == ["demo-lwf-s0"]
    assert "--dependency=afterany:17_0" in told[0]

    queue.write_text("17_0\n17_1\n27_2\n17_0\n")
    calls.write_text("")
    assert submitted("ft,mib,ewc")[0]["script"] is None
    assert calls.read_text() == ""

    queue.unlink()  # SLURM does not answer: nothing may be submitted twice
    code, _, err = call(
        "sweep", "demo", "--methods", "ft", "--out", tmp_path / "o", "--slurm", "train.epochs=1"
    )
    assert code == 1
    assert "squeue" in err
    assert calls.read_text() == ""


# ---------------------------------------------------------------- for real


@pytest.mark.slow
def test_a_real_sweep_gives_the_runs_that_training_alone_gives(tmp_path: Path, call: Call) -> None:
    given = settings(
        tmp_path / "unused", train={**settings(tmp_path)["train"], "epochs": 1, "epochs_next": 1}
    )
    given = {key: value for key, value in given.items() if key not in ("name", "out", "seed")}
    file = tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(given))
    code, _, err = call(
        "sweep", file, "--methods", "ft,mib", "--seeds", "3", "--out", tmp_path / "sweep", "--quiet"
    )
    assert (code, err) == (0, "")
    alone = {
        **given,
        "name": "toy-mib-s3",
        "out": str(tmp_path / "alone"),
        "seed": 3,
        "method": {"name": "mib"},
    }
    assert complete(alone) == 0
    assert results(tmp_path / "sweep/toy-mib-s3") == results(tmp_path / "alone/toy-mib-s3")
    made = everseg.compare([tmp_path / "sweep"])
    assert [group.name for group in made.tables[0].groups] == ["ft", "mib"]
    assert made.tables[0].groups[1].scores["time"].mean > 0


def test_a_network_stays_behind_the_presets_of_a_sweep() -> None:
    runs = grid("voc-15-1@swin-b", ["mib", "plop"], [0], overrides=["data.root=x"])
    assert [run.source for run in runs] == ["voc-15-1-mib@swin-b", "voc-15-1-plop@swin-b"]
