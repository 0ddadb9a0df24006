"""`everseg sweep`: the grid, what waits for what, failures, other engines; and one real sweep."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
from everseg.errors import ConfigError
from everseg.runs.commit import save_folder, write_json
from everseg.runs.run_folder import RunFolder
from everseg.sweeps import launch
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

    def __call__(self, command: list[str], log: Path, threads: int, alive: Any = None) -> dict[str, Any]:
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
        "pathlib.Path('ready').touch(); time.sleep(60)\n"
    )
    parent = (
        "import sys, pathlib\nfrom everseg.sweeps import launch\n"
        "with launch.processes(1) as (submit, _):\n"
        f"    submit([sys.executable, '-c', {child!r}], pathlib.Path('c.log')).result()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (tmp_path / "saved").exists()
    assert b"the same command continues them" in err


# ---------------------------------------------------------------- other engines


def test_ray_gets_the_runs_as_tasks_with_their_threads(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Ray's interface imitated: init, remote, options, and a reference that gives a future."""
    asked: list[dict[str, Any]] = []
    pool = ThreadPoolExecutor(4)

    class Reference:
        def __init__(self, future: Future) -> None:
            self.future = lambda: future

    class Task:
        def __init__(self, function: Callable[..., Any]) -> None:
            self.function = function

        def options(self, **options: Any) -> Task:
            asked.append(options)
            return self

        def remote(self, *arguments: Any) -> Reference:
            return Reference(pool.submit(self.function, *arguments))

    module = types.SimpleNamespace(
        is_initialized=lambda: False, init=lambda **_: asked.append({}), remote=Task
    )
    monkeypatch.setitem(sys.modules, "ray", module)
    done = sweep_here(tmp_path, ["ft", "lwf", "mib"], seeds=(0, 1), on="ray")
    assert {row.state for row in done.runs} == {"finished"}
    assert sorted(fake.trained) == ["demo-ft-s0", "demo-ft-s1"]
    assert fake.most >= 2
    assert asked[1]["num_cpus"] == 1


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
    assert words[1:3] == ["-m", "everseg"]
    assert call(*words[3:])[0] == 0
    assert fake.started == ["demo-mib-s0"]


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
