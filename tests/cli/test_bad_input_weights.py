"""Foreign weights and checkpoints that do not fit: refused, and no code in them runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from miniature import SETTINGS, Everseg, cut, everything, refused
from safetensors.torch import save_file

from everseg.models.build import build_model


class Touch:
    """Pickled, it would create a file when unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch owned",)


def test_import_refuses_what_is_no_mib_checkpoint_and_never_runs_code(
    everseg: Everseg, tmp_path: Path
) -> None:
    torch.save({"model_state": {"a": torch.zeros(1)}, "trainer_state": Touch()}, tmp_path / "code.pth")
    torch.save({"model_state": {"module.body.a": torch.zeros(1)}}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model_state": {}}, tmp_path / "bare.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    shutil.copy(tmp_path / "other.pth", tmp_path / "cut.pth")
    cut(tmp_path / "cut.pth")
    before = everything(tmp_path)
    for name, part in (
        ("code.pth", "could run code"), ("other.pth", "not a complete checkpoint of MiB"), ("list.pth", "a list"),
        ("bare.pth", "holds no weights"), ("other.safetensors", "not a complete checkpoint of MiB"),
        ("text.pth", "damaged"), ("empty.pth", "damaged"), ("cut.pth", "damaged"),
    ):  # fmt: skip
        refused(everseg("import", "mib", name, "-o", "out"), 4, name, part)
    refused(everseg("import", "mib", "nowhere.pth", "-o", "out"), 2, "'nowhere.pth': no such file")
    refused(everseg("import", "mib", ".", "-o", "out"), 2, "'.': is a folder")
    assert everything(tmp_path) == before


def test_initial_weights_that_do_not_fit_or_are_not_finite_are_refused(everseg: Everseg, here: Path) -> None:
    from everseg.config.fields import ModelConfig

    model = build_model(ModelConfig(**SETTINGS["model"]))
    state = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    save_file(state, here / "good.safetensors")
    first = next(name for name in state if name.endswith("weight"))
    state[first].view(-1)[3] = float("nan")
    save_file(state, here / "nan.safetensors")
    torch.save({"a": torch.zeros(1), "b": Touch()}, here / "code.pth")
    torch.save({"a": torch.zeros(1)}, here / "other.pth")
    before = everything(here)
    for name, parts in (
        ("nan.safetensors", ("not finite", first)), ("code.pth", ("could run code",)), ("other.pth", ("conv1",)),
    ):  # fmt: skip
        refused(everseg("run", "run.yaml", f"model.weights={name}", "--quiet"), 4, name, *parts)
    assert everything(here) == before
    assert everseg("run", "run.yaml", "model.weights=good.safetensors", "--quiet", "--dry-run").code == 0


def test_import_back_of_a_model_the_original_cannot_express_is_refused(everseg: Everseg, done: Path) -> None:
    outcome = everseg("import", "mib", "runs/x", "--back", "-o", "x.pth")
    refused(outcome, 2, "cannot express", "pools after the stem", "dilations")
    assert list(done.glob("x.pth*")) == []
