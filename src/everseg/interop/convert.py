"""Original MiB and MDIL checkpoints to model folders of everseg, and back."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from everseg.data.datasets.street_labels import CITYSCAPES_CLASSES, IDD_CLASSES
from everseg.display import counted
from everseg.errors import CheckpointError, ConfigError
from everseg.inference.predict import load
from everseg.interop import mdil, mib
from everseg.labels import BACKGROUND, SYNTHETIC_VOID, LabelSpace, is_background_name
from everseg.models.model import SegmentationModel
from everseg.runs.commit import write_bytes
from everseg.runs.input_form import InputForm
from everseg.runs.model_folder import ModelFile, save_model

MDIL_SIZE = (512, 1024)
"""Height and width to which MDIL's code resizes all images."""


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
        classes: class names in output order, the background's first; default background, class 1, ...

    Raises:
        ConfigError: another number of names than outputs, the background elsewhere, or one name twice.
        CheckpointError: not readable without running code from it, or its keys do not make a whole model.
    """
    out = _new_folder(out)
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
    names = tuple(classes) or (BACKGROUND, *(f"class {i}" for i in range(1, total)))
    if len(names) != total:
        raise ConfigError(
            f"--classes: the checkpoint has {counted(total, 'output')}, "
            f"{counted(len(names), 'name', 'was', 'were')} given"
        )
    later = [i for i, name in enumerate(names) if i and is_background_name(name)]
    if later and not is_background_name(names[0]):
        raise ConfigError(
            f"--classes: output 0 of MiB's checkpoints is the background, but '{names[0]}' is named there and "
            f"'{names[later[0]]}' for output {later[0]}; name the outputs in their order"
        )
    if is_background_name(names[0]):
        names = (BACKGROUND, *names[1:])
    starts = np.cumsum([0, *sizes])
    groups = tuple(tuple(range(int(a), int(b))) for a, b in itertools.pairwise(starts))
    spaces = {branch: LabelSpace(groups, names, background=0)}
    return _save(
        out, model, ModelFile(model.describe(), spaces, source=f"MiB checkpoint {Path(checkpoint).name}")
    )


def export_mib(path: str | Path, checkpoint: str | Path) -> Path:
    """Write a model back in the original MiB layout (`model_state` with `module.` names), loadable by that code."""
    target = _new_file(checkpoint)
    state = {name: value.cpu() for name, value in mib.dump(load(path).model).items()}
    _write(target, {"epoch": 0, "model_state": state, "best_score": 0.0, "trainer_state": {}})
    return target


def import_mdil(
    checkpoint: str | Path,
    out: str | Path,
    *,
    domains: Sequence[str] = (),
    classes: Sequence[Sequence[str]] = (),
) -> Path:
    """Turn an original MDIL checkpoint of any step into a model folder that `load` and `predict` read.

    The ImageNet-pretrained encoder alone becomes a safetensors file that `model.weights` takes; loaded from there or
    from the original, it gives the same model.

    Args:
        out: a new folder; of the encoder alone a new file that ends in .safetensors.
        domains: names of the domains in the order they were learnt; default domain1, domain2, ...
        classes: for each domain its class names in output order; the last output is the original's void and may be
            left out. Default: Cityscapes' names for 20 outputs (BDD100K's are the same), IDD's for 27, else class 0,
            class 1, ...

    Raises:
        ConfigError: wrong numbers of names, or `out` is in use.
        CheckpointError: not readable without running code from it, or its keys do not make a whole model.
    """
    state = mdil.read(Path(checkpoint))
    if mdil.is_encoder(state):
        if domains or classes:
            raise ConfigError(
                f"'{checkpoint}' is the ImageNet-pretrained encoder alone: it has no domains and no classes to name"
            )
        return _import_encoder(Path(checkpoint), out)
    out = _new_folder(out)
    try:
        model = mdil.load(state, domains=domains)
    except CheckpointError as error:
        raise CheckpointError(
            f"'{checkpoint}': {error}; give the .pth.tar that MDIL's training scripts wrote for a step"
        ) from None
    if classes and len(classes) != len(model.branches):
        raise ConfigError(
            f"--classes: the checkpoint has {counted(len(model.branches), 'domain')}, and --classes was given "
            f"{counted(len(classes), 'time')}; give it once for each domain"
        )
    spaces = {}
    for number, branch in enumerate(model.branches):
        total = model.head(branch).num_classes
        names = _with_void(branch, total, tuple(classes[number]) if classes else ())
        spaces[branch] = LabelSpace(((*range(total - 1), SYNTHETIC_VOID),), names, background=None)
    about = ModelFile(
        model.describe(),
        spaces,
        {branch: branch for branch in spaces},
        InputForm("resize", MDIL_SIZE, "unit"),
        source=f"MDIL checkpoint {Path(checkpoint).name}",
    )
    return _save(out, model, about)


def export_mdil(path: str | Path, checkpoint: str | Path) -> Path:
    """Write a model back in the original MDIL layout (`state_dict` with `module.` names), loadable by that code."""
    target = _new_file(checkpoint)
    state = {name: value.cpu() for name, value in mdil.dump(load(path).model).items()}
    _write(target, {"epoch": 0, "arch": "erfnet", "state_dict": state, "best_acc": 0.0, "optimizer": {}})
    return target


def export_mdil_encoder(path: str | Path, checkpoint: str | Path, *, domain: str | None = None) -> Path:
    """Write a model's encoder under the names of the ImageNet-pretrained one, for `model.weights` and `import_mdil`.

    Args:
        domain: whose norms are taken where each domain has its own; None: the shared convolutions alone, which is
            what models with adapters start from.

    Raises:
        ConfigError: no ERFNet, no such domain, or `checkpoint` exists.
    """
    target, loaded = _new_file(checkpoint), load(path)
    if domain is not None and domain not in loaded.branch_of:
        raise ConfigError(f"--domain {domain}: the model has the branches {', '.join(loaded.branch_of)}")
    branch = None if domain is None else loaded.branch_of[domain]
    state = {name: value.cpu() for name, value in mdil.dump_encoder(loaded.model, branch).items()}
    _write(target, {"epoch": 0, "arch": "erfnet", "state_dict": state})
    return target


def _import_encoder(checkpoint: Path, out: str | Path) -> Path:
    target = _new_file(out)
    if target.suffix != ".safetensors":
        raise ConfigError(
            f"'{checkpoint}' is the ImageNet-pretrained encoder alone, which becomes a file: give {target}.safetensors"
        )
    write_bytes(target, save(mdil.load_encoder(checkpoint)))
    return target


def _with_void(branch: str, total: int, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of a domain's outputs, the last one void's."""
    if not names:
        known = {len(known) + 1: known for known in (CITYSCAPES_CLASSES, IDD_CLASSES)}
        names = tuple(known.get(total, [f"class {i}" for i in range(total - 1)]))
    if len(names) == total - 1:
        return (*names, "void")
    if len(names) != total:
        raise ConfigError(
            f"--classes: domain '{branch}' has {counted(total, 'output')}, the last one void; "
            f"{counted(len(names), 'name', 'was', 'were')} given"
        )
    return names


def _new_folder(out: str | Path) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is {'not empty' if out.is_dir() else 'a file'}; give a new folder")
    return out


def _new_file(target: str | Path) -> Path:
    target = Path(target)
    if target.exists():
        raise ConfigError(f"{target} exists; give a new file name")
    return target


def _save(out: Path, model: SegmentationModel, about: ModelFile) -> Path:
    problems = [f"--classes: {problem}" for space in about.spaces.values() for problem in space.problems()]
    if problems:
        raise ConfigError(problems)
    save_model(out / "final", about, model.state_dict())
    return out / "final"


def _write(target: Path, checkpoint: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_bytes(target, buffer.getvalue())
