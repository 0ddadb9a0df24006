"""Several processes of one run: how srun's tasks find each other, and what happens when one is gone."""

from __future__ import annotations

import os
import signal
import time

import pytest
from processes import At, ranks
from toy import settings

from everseg.engine import peers, run
from everseg.engine.peers import refuse_sharding, srun_processes
from everseg.errors import ConfigError
from everyday import some
from saying import must_say

STEP = {
    "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-04],login", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip


def test_the_tasks_of_an_srun_are_the_processes_of_a_run():
    found = srun_processes(STEP)
    assert (found["RANK"], found["WORLD_SIZE"]) == ("3", "5")
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("1", "2")
    assert found["MASTER_ADDR"] == "gpu03"
    assert found["MASTER_PORT"] == srun_processes({**STEP, "SLURM_PROCID": "0"})["MASTER_PORT"]
    assert found["MASTER_PORT"] != srun_processes({**STEP, "SLURM_STEP_ID": "3"})["MASTER_PORT"]
    last = srun_processes({**STEP, "SLURM_NODEID": "2", "SLURM_LOCALID": "0"})
    assert (last["LOCAL_RANK"], last["LOCAL_WORLD_SIZE"]) == ("0", "1")


@pytest.mark.parametrize(
    ("nodes", "head"), [("a", "a"), ("a,b[1-2]", "a"), ("n[9,11-12]-ib,b", "n9-ib"), ("n[009-010]", "n009")]
)
def test_the_processes_meet_on_the_first_host(nodes, head):
    assert srun_processes({**STEP, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == head


def test_on_one_host_they_meet_there_and_a_task_with_one_gpu_of_its_own_takes_that():
    one = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_LOCALID": "3"}
    assert srun_processes(one)["MASTER_ADDR"] == "127.0.0.1"
    assert [srun_processes(one, seen)["LOCAL_RANK"] for seen in (0, 1, 5)] == ["3", "0", "3"]


@pytest.mark.parametrize(
    "other",
    [
        {**STEP, "RANK": "0", "WORLD_SIZE": "2"},  # srun torchrun
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {
            "SLURM_JOB_ID": "41",
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
        },  # a job script of four tasks, without srun
        {},
    ],
)
def test_other_launchers_and_single_tasks_are_left_alone(other):
    assert srun_processes(other) == {}


@pytest.mark.parametrize("key", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_model_in_shards_is_refused(key):
    with pytest.raises(ConfigError) as raised:
        refuse_sharding({f"ACCELERATE_USE_{key}": "true"})
    must_say(str(raised.value), "everseg", "train.shard=true")
    refuse_sharding({f"ACCELERATE_USE_{key}": "false"})


@pytest.mark.parametrize("who", some([0, 1], 1))
def test_where_one_is_killed_the_other_ends_with_7_within_seconds_and_the_same_command_continues(
    tmp_path, capfd, who
):
    config = settings(tmp_path, train={"peer_timeout": 30})
    start = time.monotonic()
    codes = ranks(config, 2, at={who: At("iteration", 6)})
    assert time.monotonic() - start < 25
    assert codes == [[-signal.SIGKILL, 7], [7, -signal.SIGKILL]][who]
    must_say(capfd.readouterr().err, "process 0" if who == 0 else "process 1 on host", "same command")
    if who == 1:
        assert not (tmp_path / "toy" / "LOCK").exists()
        assert ranks(config, 2) == [0, 0]


@pytest.mark.parametrize("who", some([0, 1], 1))
def test_where_one_falls_silent_the_other_ends_with_7_after_the_timeout(tmp_path, capfd, who):
    """As if its host had crashed or its network had gone: nothing is closed, so only the silence tells."""
    config = settings(tmp_path, train={"peer_timeout": 2})
    codes = ranks(config, 2, at={who: At("iteration", 6, signal=signal.SIGSTOP)}, stopped=who)
    assert codes == [[-signal.SIGKILL, 7], [7, -signal.SIGKILL]][who]
    must_say(capfd.readouterr().err, "2 s", "process 1 on host" if who else "process 0")


@pytest.mark.slow
def test_a_process_that_is_only_slow_is_waited_for(tmp_path, monkeypatch):
    """The first process prepares for longer than the timeout, as it may with a large data set."""
    prepare = run.prepare

    def slowly(*given, **named):
        if os.environ["RANK"] == "0":
            time.sleep(5)
        return prepare(*given, **named)

    monkeypatch.setattr(run, "prepare", slowly)
    train = {"peer_timeout": 2, "epochs": 1, "epochs_next": 1}
    assert ranks(settings(tmp_path, train=train), 2) == [0, 0]


def test_processes_that_were_given_different_runs_are_refused(tmp_path, capfd, monkeypatch):
    """As if each task of an srun had made a run of its own of its number."""
    monkeypatch.setattr(peers, "GRACE", 0.5)
    config = settings(tmp_path)
    codes = ranks(config, 2, change={1: {"seed": 8}})
    assert codes == [7, 2]
    must_say(capfd.readouterr().err, "srun", "process 1", "process 0")
