"""Original MiB checkpoints to model folders of everseg, and back (floor 6)."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from everseg.engine.checkpoint import save_folder, write_bytes
from everseg.errors import CheckpointError, ConfigError
from everseg.interop import mib
from everseg.predictor import load


def import_mib(
    checkpoint: str | Path,
    out: str | Path,
    *,
    norm: str = "iabn",
    output_stride: int = 16,
    classes: Sequence[str] = (),
) -> Path:
    """Turn an original MiB step checkpoint into a model folder that `load` and `predict` read.

    Args:
        norm: "iabn" for checkpoints trained with In-place ABN (the authors' default), "abn" otherwise.
        classes: class names in output order; default background, class 1, ...

    Raises:
        CheckpointError: not readable without running code from it, or its keys do not make a whole model.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is {'not empty' if out.is_dir() else 'a file'}; give a new folder")
    state = mib.read(Path(checkpoint))
    try:
        model = mib.load(state, norm=norm, output_stride=output_stride)
    except CheckpointError as error:
        raise CheckpointError(
            f"'{checkpoint}': {error}; give the .pth that MiB's run.py wrote for a step"
        ) from None
    (branch,) = model.branches
    sizes = model.head(branch).sizes
    total = sum(sizes)
    names = tuple(classes) or ("background", *(f"class {i}" for i in range(1, total)))
    if len(names) != total:
        raise ConfigError(f"--classes: the checkpoint has {total} outputs, {len(names)} names were given")
    starts = np.cumsum([0, *sizes])
    groups = [list(range(int(a), int(b))) for a, b in itertools.pairwise(starts)]
    document = {
        "architecture": model.describe(),
        "branches": {branch: {"groups": groups, "names": names, "background": 0}},
        "step": len(sizes) - 1,
        "source": f"MiB checkpoint {Path(checkpoint).name}",
    }
    folder = out / "final"
    save_folder(folder, {"model": model.state_dict(), "method_state": {}}, {"classes": document})
    return folder


def export_mib(path: str | Path, checkpoint: str | Path) -> Path:
    """Write a model back in the original MiB layout (`model_state` with `module.` names), loadable by that code."""
    target = Path(checkpoint)
    if target.exists():
        raise ConfigError(f"{target} exists; give a new file name")
    state = {name: value.cpu() for name, value in mib.dump(load(path).model).items()}
    buffer = io.BytesIO()
    torch.save({"epoch": 0, "model_state": state, "best_score": 0.0, "trainer_state": {}}, buffer)
    write_bytes(target, buffer.getvalue())
    return target
