"""Runs of acil and dft*: kills, ranks, ONNX, extension of a bundle, and what is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import At, complete, killed, ranks, results
from safetensors.torch import load_file
from toy import settings

import everseg
from everseg.engine.sharing import share_first_step
from everseg.errors import ConfigError
from everseg.runs.run_folder import RunFolder
from saying import must_say

ACIL = {"name": "acil", "features": 24}
SHORT = {"epochs": 1, "epochs_next": 1, "checkpoint_every": 2, "log_every": 1}


def config(out: Path, method: dict, **changes) -> dict:
    return settings(out, method=method, train=SHORT, **changes)


def test_kills_of_acil_change_no_byte(tmp_path):
    assert complete(config(tmp_path / "a", ACIL)) == 0
    given = config(tmp_path / "b", ACIL)
    killed(given, "name", pattern="00/ckpt/pass/it-*[0-9]")
    killed(given, "name", pattern="01/ckpt/pass/it-*[0-9]")
    assert complete(given) == 0
    assert results(tmp_path / "a" / "toy") == results(tmp_path / "b" / "toy")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 7, 13, 19, 24])
@pytest.mark.parametrize("method", [{**ACIL, "precision": "fast"}, {"name": "dft*"}], ids=lambda m: m["name"])
def test_kills_at_other_moments_neither(tmp_path, method, count):
    assert complete(config(tmp_path / "a", method)) == 0
    given = config(tmp_path / "b", method)
    complete(given, at=At("any", count))
    assert complete(given) == 0
    assert results(tmp_path / "a" / "toy") == results(tmp_path / "b" / "toy")


@pytest.mark.parametrize(
    "method", [ACIL, {**ACIL, "teacher": "live", "every_image": False, "pseudo": "sigmoid"}]
)
def test_two_processes_solve_what_one_does(tmp_path, method):
    """On a network without batch statistics, and the same first step for both."""
    found = []
    for world in (1, 2):
        given = config(tmp_path / str(world), {**method, "pass_batch": 4})
        given["model"] = {"name": f"{Path(__file__).with_name('plain_model.py')}:build"}
        assert (ranks(given, world) if world > 1 else [complete(given)]) == [0] * world
        found.append(load_file(RunFolder(tmp_path / str(world) / "toy").final(1) / "model.safetensors"))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=2e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_in_mixed_precision_only_the_network_is_of_half_precision(tmp_path, precision):
    """From the same first step: its features have 8 bits, and nothing is added up or solved with so few.

    Without labels by the model, which turn a small difference into another class.
    """
    method, found = {**ACIL, "precision": precision, "pseudo": "none"}, {}
    for kind in ("fp32", "bf16"):
        given = config(tmp_path / kind, method)
        given["train"] = given["train"] | {"precision": kind}
        if found:
            assert share_first_step(RunFolder(tmp_path / "fp32" / "toy"), RunFolder(tmp_path / kind / "toy"))
        run = everseg.run(given, quiet=True)
        model, state = (
            load_file(run.folder.final(1) / f"{stem}.safetensors") for stem in ("model", "method_state")
        )
        stored = torch.float64 if precision == "exact" else torch.float32
        assert (state["gram"].dtype, state["cross"].dtype) == (stored, stored)
        classifiers = [value for name, value in sorted(model.items()) if "classifiers" in name]
        found[kind] = torch.cat([value.flatten() for value in classifiers]), state["gram"]
    (full, gram), (half, other) = found["fp32"], found["bf16"]
    assert not torch.equal(gram, other), "the network runs in bf16"
    assert (other - gram).norm() < 0.01 * gram.norm()
    assert (half - full).norm() < 0.05 * full.norm()


@pytest.mark.slow
@pytest.mark.parametrize("method", [ACIL, {"name": "dft*"}], ids=lambda m: m["name"])
def test_bundles_export_to_onnx_and_are_extended(tmp_path, method, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the run of an extension stands in runs/
    pytest.importorskip("onnxruntime")
    run = everseg.run(config(tmp_path, method, scenario={"task": "1-1"}), quiet=True)
    bundle = everseg.export(run.path, step=0, out=tmp_path / "bundle")
    assert bundle.parity  # measured by `export`, which refuses more than rounding
    if method["name"] != "acil":
        return
    toy = f"{Path(__file__).with_name('toy.py')}:build"
    longer = everseg.extend(
        tmp_path / "bundle", data=toy, add=["green"], method="acil", out=tmp_path / "longer", quiet=True, onnx=False,
        overrides=["method.features=24", "train.max_iterations=3"],
    )  # fmt: skip
    assert [one.name for one in longer.taught] == ["green"]


@pytest.mark.parametrize(
    ("method", "changes", "facts"),
    [
        (ACIL, {"scenario": {"memory": {"size": 4}}}, ("scenario.memory", "'acil'", "step 1")),
        ({**ACIL, "fuse": "all"}, {}, ("method.fuse", "step 1", "gradients")),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_trained(tmp_path, method, changes, facts):
    with pytest.raises(ConfigError) as told:
        everseg.run(config(tmp_path, method, **changes), quiet=True)
    must_say(told.value, *facts)
    assert not list(tmp_path.rglob("*.safetensors"))
