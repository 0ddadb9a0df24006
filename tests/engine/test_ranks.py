"""Two processes over gloo: one run, the same weights, every test image counted once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import At, complete, ranks, results
from safetensors.torch import load_file
from toy import build, settings

from everseg.data.batches.transforms import center_transform
from everseg.runs.commit import read_json
from everseg.runs.journal import Journal
from everseg.runs.run_folder import RunFolder
from everyday import some


def center(mask: np.ndarray) -> np.ndarray:
    return center_transform(np.zeros((*mask.shape, 3), np.uint8), mask, crop=32)[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[RunFolder, RunFolder]:
    """The same run by one and by two processes."""
    folders = []
    for world in (1, 2):
        out = tmp_path_factory.mktemp(f"world{world}")
        config = alike(out)
        codes = ranks(config, world) if world > 1 else [complete(config)]
        assert codes == [0] * world
        folders.append(RunFolder(out / "toy"))
    return folders[0], folders[1]


def alike(out: Path) -> dict:
    """A run whose norms have no batch statistics, so that any number of processes agrees on its weights."""
    config = settings(out, method={"name": "ewc", "weight": 5.0}, scenario={"validation": "none"})
    config["model"] = {"name": f"{Path(__file__).with_name('plain_model.py')}:build"}
    return config


def agree(first: RunFolder, second: RunFolder) -> None:
    for step in (0, 1):
        one, two = (load_file(folder.final(step) / "model.safetensors") for folder in (first, second))
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
        one, two = (load_file(folder.final(step) / "method_state.safetensors") for folder in (first, second))
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=2e-2, atol=1e-4, msg=name)


def test_two_processes_learn_the_weights_of_one_at_the_same_global_batch(pair):
    agree(*pair)


@pytest.mark.parametrize(("before", "after"), some([(2, 1), (1, 2)], (2, 1)))
def test_the_same_command_goes_on_with_another_number_of_processes(pair, tmp_path, before, after):
    """The global batch stays: the run learns what it would have learnt, to rounding."""
    config, at = alike(tmp_path), At("iteration", 7)  # after the first checkpoint
    codes = ranks(config, 2, at={0: at}) if before == 2 else [complete(config, at=at)]
    assert codes[0] == -signal.SIGKILL
    state = read_json(next((tmp_path / "toy").glob("steps/00/ckpt/it-*/state.json")))
    assert state["processes"] == before
    assert (ranks(config, 2) if after == 2 else [complete(config)]) == [0] * after
    agree(pair[0], RunFolder(tmp_path / "toy"))
    lines = [line["iteration"] for line in Journal(tmp_path / "toy/journal.jsonl").lines("train")]
    assert lines == [line["iteration"] for line in Journal(pair[0].path / "journal.jsonl").lines("train")]


def test_evaluation_counts_every_pixel_once(pair):
    for step in (0, 1):
        one, two = (folder.counts(step)["default"] for folder in pair)
        assert one.sum() == two.sum()
        # truth pixels per class: no sample twice, none left out
        np.testing.assert_array_equal(one.sum(1), two.sum(1))


def test_the_same_weights_give_the_same_counts_in_one_and_two_processes(pair, tmp_path):
    """Seven test images over two processes: an uneven last share."""
    further = ["boundary-iou", "per-image"]
    config = settings(tmp_path, data={"options": {"val": 7}}, method={"name": "ft"}, metrics=further)
    assert complete(config) == 0
    whole = RunFolder(tmp_path / "toy")
    before = {step: whole.counts(step)["default"] for step in (0, 1)}
    each = {step: whole.images(step)["default"] for step in (0, 1)}
    outlines = {step: whole.boundary(step)["default"] for step in (0, 1)}
    scores = {step: whole.metrics(step) for step in (0, 1)}
    for step in (0, 1):
        (whole.step(step) / "metrics.json").unlink()
        (whole.step(step) / "confusion.npz").unlink()
    assert ranks(config, 2) == [0, 0]
    for step in (0, 1):
        np.testing.assert_array_equal(whole.counts(step)["default"], before[step])
        np.testing.assert_array_equal(whole.images(step)["default"], each[step])
        np.testing.assert_array_equal(whole.boundary(step)["default"], outlines[step])
        assert outlines[step].shape == each[step].shape
        assert whole.metrics(step) == scores[step]
        found = scores[step]["branches"]["default"]
        assert found["per_image"]["images"] == 7
        assert len(found["class_boundary_iou"]) == len(found["classes"])


def test_the_counts_of_every_image_stand_in_the_order_of_the_images(pair):
    for folder in pair:
        found = folder.images(1)["default"]
        (source,) = read_json(folder.path / "scenario.json")["steps"][1]["test"]
        assert len(found) == source["images"] == 10
        split = build().splits["val"]
        for index, (truth, predicted, both) in enumerate(found):
            label = np.frombuffer(bytes(source["lut"]), np.uint8)[center(split.read_mask(index))]
            assert truth.tolist() == np.bincount(label[label != 255], minlength=4).tolist()
            assert predicted.sum() == truth.sum()
            assert (both <= np.minimum(truth, predicted)).all()


def test_both_ranks_hold_the_same_weights_and_a_second_time_gives_the_same_bytes(tmp_path):
    """With real batch norms; the plug-in method compares the weights of the ranks after each step."""
    digests = []
    for name in ("a", "b"):
        method = {"name": f"{Path(__file__).with_name('checked_method.py')}:Checked"}
        config = settings(tmp_path / name, train={"epochs": 1, "epochs_next": 1}, method=method)
        assert ranks(config, 2) == [0, 0]
        digests.append(results(tmp_path / name / "toy"))
    assert digests[0] == digests[1]


def test_two_processes_take_a_dry_run_through_one_folder_that_is_gone_afterwards(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert ranks(settings(tmp_path), 2, dry_run=True) == [0, 0]
    assert list(scratch.glob("everseg-*")) == []
    assert list(tmp_path.iterdir()) == [scratch]


def test_every_process_uses_the_number_of_threads_that_the_run_recorded(tmp_path):
    """The plug-in's import gives each rank another number, as another machine's default would."""
    plug_in = tmp_path / "threads.py"
    plug_in.write_text(
        "import os\nfrom dataclasses import dataclass\nimport torch\nfrom everseg.methods.ft import FineTuning\n"
        "torch.set_num_threads(1 + int(os.environ['RANK']))\n"
        "@dataclass(kw_only=True)\nclass Threads(FineTuning):\n"
        "    def begin_step(self, ctx):\n        assert torch.get_num_threads() == 1\n"
    )
    train = {"epochs": 1, "epochs_next": 1, "threads": None}
    assert ranks(settings(tmp_path, method=f"{plug_in}:Threads", train=train), 2) == [0, 0]


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    assert ranks(settings(tmp_path, train={"batch": 3}), 2) == [2, 2]


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    script = tmp_path / "go.py"
    config = settings(tmp_path, train={"epochs": 1, "epochs_next": 1})
    script.write_text(f"import everseg\neverseg.run({config!r}, quiet=True)\n")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "toy" / "steps" / "01" / "metrics.json").read_text())
    assert metrics["step"] == 1
