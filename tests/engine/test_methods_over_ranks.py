"""What methods find over two processes is what one process finds: thresholds, prototypes, merged weights, attention,
class tokens, the images of a memory.

Norms stand still (`freeze_from` 0), for a batch norm sees the images of its own process alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import complete, ranks
from safetensors.torch import load_file
from toy import settings

from everseg.runs.run_folder import RunFolder

HERE = Path(__file__).parent
STILL = {"freeze_norm": True, "freeze_from": 0}
PLAIN = {"name": f"{HERE / 'plain_model.py'}:build", "norm": None, "options": {}}


def both(
    out: Path, method: dict[str, Any], model: dict[str, Any] | None = None, **changes: dict[str, Any]
) -> tuple[RunFolder, RunFolder]:
    """The same short run by one process and by two."""
    folders = []
    for world in (1, 2):
        config = settings(
            out / str(world),
            method=method,
            scenario=changes.get("scenario", {"validation": "none"}),
            train={"epochs": 2, "epochs_next": 1, **changes.get("train", {})},
        )
        config["model"] = model or config["model"]
        assert (ranks(config, world) if world > 1 else [complete(config)]) == [0] * world
        folders.append(RunFolder(out / str(world) / "toy"))
    return folders[0], folders[1]


def tensors(folder: RunFolder, step: int, file: str) -> dict[str, torch.Tensor]:
    return load_file(folder.final(step) / f"{file}.safetensors")


def same(
    pair: tuple[RunFolder, RunFolder], step: int, file: str = "model", rtol: float = 2e-3, atol: float = 1e-4
) -> None:
    one, two = (tensors(folder, step, file) for folder in pair)
    assert one
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("median", [pytest.param("official", marks=pytest.mark.slow), "exact"])
def test_plops_thresholds_come_from_the_counts_of_all_processes(tmp_path, median):
    method = {"name": f"{HERE / 'kept_method.py'}:KeptPLOP", "entropy_norm": "paper", "median": median}
    pair = both(tmp_path, method, PLAIN)
    one, two = (tensors(folder, 1, "method_state") for folder in pair)
    assert one.keys() == two.keys() == {"histogram", "found/default"}
    counts, other = one["histogram"], two["histogram"]
    assert counts.sum() == other.sum() > 1000
    # The weights of step 0 agree but for rounding, so a few pixels are in the bin beside.
    assert (counts - other).abs().sum() <= 0.02 * counts.sum()
    found, again = one["found/default"], two["found/default"]
    assert (found > 0.001).any()
    torch.testing.assert_close(found, again, rtol=0, atol=0.0101 if median == "exact" else 0.0501)


@pytest.mark.slow
def test_rcils_merged_convolutions(tmp_path):
    same(pair := both(tmp_path, {"name": f"{HERE / 'kept_method.py'}:SteadyRCIL", **STILL}, COMPENSATED), 0)
    same(pair, 1)


COMPENSATED = {
    "name": "deeplabv3-tiny",
    "options": {"widths": [8, 8, 8, 8], "hidden": 8, "compensation": True},
}


@pytest.mark.slow
def test_sats_attention(tmp_path):
    model = {"name": f"{HERE / 'attentive_model.py'}:attentive", "norm": None, "options": {}}
    pair = both(tmp_path, {"name": "sats", "entropy_norm": "paper", "threshold": 0.3, **STILL}, model)
    same(pair, 0)
    same(pair, 1)


@pytest.mark.slow
def test_sdrs_prototypes(tmp_path):
    """Of the first step; later losses compare the classes of a batch, which is each process's own."""
    pair = both(tmp_path, {"name": "sdr", "attract_background": False}, PLAIN)
    same(pair, 0, "method_state")
    one, two = (tensors(folder, 1, "method_state")["count/default"] for folder in pair)
    assert torch.equal(one, two)


def memories(pair: tuple[RunFolder, RunFolder], step: int) -> list[dict[str, Any]]:
    """The images that the memory holds after a step, by one process; two must have chosen the same for the same."""
    one, two = (json.loads((folder.final(step) / "memory.json").read_text()) for folder in pair)
    assert one == two
    return list(one["images"])


@pytest.mark.slow
def test_mbs_keeps_outputs_features_and_tokens(tmp_path):
    """Dropout is off, which each process draws for its own images; so are the two parts whose means are over what the
    teacher does not doubt and over the cells that are held, as each process divides by the number of its own."""
    model = {"name": f"{HERE / 'token_model.py'}:tokens", "norm": None, "options": {"dropout": 0.0}}
    method = {"name": "mbs", "threshold": 0.3, "ignore_doubted": False, "adaptive": False, **STILL}
    pair = both(tmp_path, method, model, train={"lr": 0.005, "lr_next": 0.005})
    same(pair, 0, rtol=1e-5, atol=1e-6)
    same(pair, 1, rtol=1e-5, atol=1e-6)
    learnt, before = tensors(pair[1], 1, "model"), tensors(pair[1], 0, "model")
    assert max((learnt[name] - value).abs().max() for name, value in before.items()) > 0.01


@pytest.mark.slow
def test_mib_with_a_memory_chooses_the_same_images_and_learns_the_same_from_them(tmp_path):
    scenario = {"task": "1-1", "memory": {"size": 4, "selection": "reservoir", "pseudo": 0.5}}
    method = {"name": "mib", "later_rate": 2.0, "decay_encoder": False}
    pair = both(tmp_path, method, PLAIN, scenario=scenario)
    chosen = [memories(pair, step) for step in range(3)]
    assert [len(images) for images in chosen] == [4, 4, 4]
    assert chosen[0] != chosen[1] != chosen[2]
    for step in range(3):
        same(pair, step)
