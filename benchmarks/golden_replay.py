"""Replays the training runs of MiB's original code with everseg's methods, in float64.

Inputs (initial weights, images, labels, order of the images) and results come from the files `train_mib_*.npz`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everseg.config.fields import TrainConfig
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.interop import mib
from everseg.labels import LabelSpace
from everseg.methods import switches
from everseg.methods.base import Method, StepContext
from everseg.methods.ewc import EWC
from everseg.methods.ft import FineTuning
from everseg.methods.ilt import ILT
from everseg.methods.lwf import LwF
from everseg.methods.lwf_mc import LwFMC
from everseg.methods.mib import MiB
from everseg.methods.pi import PI
from everseg.methods.rw import RW
from everseg.models.build import deeplabv3
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.scenarios.steps import Source, Step
from everseg.types import Batch

BRANCH = "default"
BATCH = 2
GROWTH = {"tiny": (4, 2), "tiny3": (4, 1, 1), "wide": (4, 2)}
"""Outputs added per step of each task."""
SEEDS = (777, 782, 783, *range(100_000))
"""Seeds of the value generator that are tried, the known ones first."""
RATES = TrainConfig(lr=0.01, lr_next=0.001)


@dataclass(frozen=True)
class Case:
    """How one original run is expressed here."""

    method: Callable[[], Method]
    task: str = "tiny"
    norm: str = "abn"
    train: TrainConfig = RATES


CASES = {
    "FT": Case(FineTuning),
    "FT_BCE": Case(lambda: FineTuning(bce=True)),
    "LWF": Case(LwF),
    "LWF-MC": Case(LwFMC),
    "ICARL_disjoint": Case(lambda: LwFMC(form="disjoint")),
    "ICARL_disjoint_bkg": Case(lambda: LwFMC(form="disjoint", background_from_labels=True)),
    "ILT": Case(ILT),
    "ILT_de0.01": Case(lambda: ILT(feature_weight=0.01)),
    "ILT_wide": Case(lambda: ILT(feature_weight=0.01), task="wide"),
    "EWC": Case(EWC),
    "EWC_nonorm": Case(lambda: EWC(normalise=False)),
    "EWC_3step": Case(EWC, task="tiny3"),
    "RW": Case(RW),
    "RW_it2": Case(lambda: RW(period=2)),
    "RW_3step": Case(lambda: RW(period=2), task="tiny3"),
    "PI": Case(PI),
    "PI_3step": Case(PI, task="tiny3"),
    "MiB": Case(MiB),
    "MiB_3step": Case(MiB, task="tiny3"),
    "MiB_wide": Case(MiB, task="wide"),
    "MiB_iabn": Case(MiB, norm="iabn"),
    "MiB_2epochs": Case(MiB),
    "MiB_alpha2": Case(lambda: MiB(alpha=2.0)),
    "MiB_steplr": Case(
        MiB, train=TrainConfig(lr=0.01, lr_next=0.001, schedule="step", step_size=2, step_factor=0.5)
    ),
    # The authors' flags act from step 0 on, and `model.train()` sets the running statistics free again.
    "MiB_freeze": Case(lambda: MiB(freeze_encoder=True, freeze_from=0, frozen_statistics=False)),
    "MiB_fixbn": Case(lambda: MiB(freeze_norm=True, freeze_from=0, frozen_statistics=False)),
}
"""File name without `train_mib_` -> the same run here."""


def tags(folder: Path) -> list[str]:
    """List the runs that a folder holds."""
    found = (path.stem.removeprefix("train_mib_") for path in sorted(folder.glob("train_mib_*.npz")))
    return [tag for tag in found if tag != "common"]


@dataclass
class Comparison:
    """How many values were compared, and their largest relative difference."""

    count: int = 0
    largest: float = 0.0


def replay(folder: Path, tag: str) -> dict[str, Comparison]:
    """Train one run again and compare it with its file.

    Returns:
        Quantity -> values compared and largest relative difference, over all steps and iterations. Of scalars,
        element by element; of weights and statistics, the largest difference in a tensor over the tensor's largest
        value. Loss terms that are 0 on both sides are left out.

    Raises:
        KeyError: a run that `CASES` does not describe.
    """
    case, method = CASES[tag], CASES[tag].method()
    common, golden = np.load(folder / "train_mib_common.npz"), np.load(folder / f"train_mib_{tag}.npz")
    found: dict[str, Comparison] = {}

    def compare(quantity: str, ours: Any, theirs: Any, scale: Any = None) -> None:
        entry = found.setdefault(quantity, Comparison())
        entry.count += np.size(theirs)
        entry.largest = max(entry.largest, difference(ours, theirs, scale))

    start = {k.removeprefix("init/"): common[k] for k in common.files if k.startswith("init/")}
    model = _initial_model(case, start)
    for step in _steps(case.task):
        _replay_step(case, method, model, step, common, golden, start, compare)
    return found


def difference(ours: Any, theirs: Any, scale: Any = None) -> float:
    """Largest |ours - theirs| / scale; the default scale is |theirs|, element by element. 0 / 0 counts as 0."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes differ: {ours.shape} here, {theirs.shape} in the file")
    scale = np.abs(theirs) if scale is None else np.asarray(scale, np.float64)
    gap = np.abs(ours - theirs)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(gap == 0, 0.0, gap / scale)
    return float(np.where(np.isnan(relative), np.inf, relative).max(initial=0.0))


def _initial_model(case: Case, start: dict[str, np.ndarray]) -> SegmentationModel:
    """The network of the files, not grown yet; its weights are set in step 0, when it is."""
    template = mib.load(tensors(start), norm=case.norm)
    return deeplabv3(**template.description["options"]).double()


def _steps(task: str) -> Iterator[Step]:
    groups: list[tuple[int, ...]] = []
    for index, size in enumerate(GROWTH[task]):
        first = sum(len(group) for group in groups)
        groups.append(tuple(range(first, first + size)))
        names = tuple(f"class {i}" for i in range(first + size))
        source = Source(BRANCH, "golden", "train", (), bytes(range(256)))
        space = LabelSpace(tuple(groups), names)
        yield Step(index, (source,), (), {BRANCH: space}, {BRANCH: size})


def _replay_step(
    case: Case,
    method: Method,
    model: SegmentationModel,
    step: Step,
    common: Any,
    golden: Any,
    start: dict[str, np.ndarray],
    compare: Callable[..., None],
) -> None:
    at, k = f"step{step.index}/", step.index
    teacher = frozen_copy(model) if method.needs_teacher and k else None
    method.prepare_model(model, step)
    model.double()
    names = original_names(model)
    if k == 0:
        _set_weights(model, names, start)
    else:
        given = {key.removeprefix(at + "init/"): golden[key] for key in golden.files if f"{at}init/" in key}
        if not getattr(method, "init_background", False):  # random in the original too
            _set_weights(
                model, names, {key: v for key, v in given.items() if f"cls.{k}." in key}, partial=True
            )
        ours = {names[name]: value for name, value in model.state_dict().items() if name in names}
        for key, value in given.items():
            compare("new classifiers", ours[key], value, np.abs(value).max())
    groups = method.param_groups(model, step)
    check_param_groups(model, groups)
    base = case.train.lr if k == 0 or case.train.lr_next is None else case.train.lr_next
    optimizer = make_optimizer(groups, case.train, lr=base)
    ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
    switches.begin(method, ctx)
    model.train()
    batches = step_batches(common, case.task, k, golden[at + "order"])
    for i, batch in enumerate(batches):
        lr = learning_rate(case.train, base, i, len(batches))
        set_learning_rate(optimizer, lr)
        compare("learning rate", lr, golden[at + "lr"][i])
        logged = train_batch(method, batch, ctx, optimizer)
        for term, value in _unweighted(method, logged, step.num_old(BRANCH)).items():
            if value != 0 or golden[at + term][i] != 0:
                compare(term, value, golden[at + term][i])
        rows = golden[at + "names"].tolist()
        theirs = golden[at + "gradnorm"][i]
        for name, weight in model.named_parameters():
            row = rows.index(names[name])
            compare("weight norms", weight.detach().norm(), golden[at + "pnorm"][i, row])
            if weight.grad is not None:  # frozen ones: the original computes gradients that nothing uses
                compare("gradient norms", weight.grad.norm(), theirs[row])
                compare(
                    "gradient norms, of the total", weight.grad.norm(), theirs[row], np.linalg.norm(theirs)
                )
    before = method.state_dict()
    switches.finish(method, ctx)
    for name, value in model.state_dict().items():
        if name in names:
            theirs = golden[f"{at}final/{names[name]}"]
            compare("final weights", value, theirs, np.abs(theirs).max())
    _compare_statistics(before | method.state_dict(), names, golden, f"{at}reg_state/", compare)


def _compare_statistics(
    state: dict[str, Tensor], names: dict[str, str], golden: Any, at: str, compare: Callable[..., None]
) -> None:
    """Compare EWC's, RW's and PI's statistics: large tensors by sum, sum |.|, sum of squares, min and max."""
    here = {
        f"{key.partition('/')[0]}/{names[key.partition('/')[2]]}": v for key, v in state.items() if "/" in key
    }
    for key in golden.files:
        if not key.startswith(at):
            continue
        part, _, name = key.removeprefix(at).partition("/")
        quantity = part.removesuffix("_stats")
        ours = here[f"{'old' if quantity == 'starting_model' else quantity}/{name}"]
        theirs = golden[key]
        if part == quantity:
            compare(f"statistic {quantity}", ours, theirs, np.abs(theirs).max())
        else:
            _, absolute, squares, low, high = theirs
            summary = [ours.sum(), ours.abs().sum(), ours.square().sum(), ours.min(), ours.max()]
            largest = max(abs(low), abs(high))
            scale = [absolute, absolute, squares, largest, largest]
            compare(f"statistic {quantity}", [float(x) for x in summary], theirs, scale)


def _unweighted(method: Method, logged: dict[str, Tensor], num_old: int) -> dict[str, float]:
    """Loss terms as the files name them, without their weights."""
    term = {name: float(value) for name, value in logged.items()}
    combined = isinstance(method, LwFMC)
    return {
        "ce": term.get("ce", 0.0) + term.get("bce", 0.0),
        "lkd": 0.0 if combined else term.get("kd", 0.0) / getattr(method, "kd_weight", 1.0),
        "lde": term.get("feature", 0.0) / getattr(method, "feature_weight", 1.0),
        "icarl": term.get("icarl", 0.0)
        + (term.get("kd", 0.0) / (method.importance * num_old) if combined and num_old else 0.0),
        "reg": term.get("penalty", 0.0) / getattr(method, "weight", 1.0),
    }


def step_batches(common: Any, task: str, step: int, order: np.ndarray) -> list[Batch]:
    at = f"{'tiny' if task == 'tiny3' and step == 0 else task}/step{step}/train/"
    if at + "image_seed_shape" in common.files:
        seed, *shape = common[at + "image_seed_shape"].tolist()
        images = 0.5 * generated_image(tuple(shape), seed)
    else:
        images = common[at + "images"]
    labels = common[at + "labels"]
    chunks = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    return [
        Batch(torch.from_numpy(images[c]).double(), torch.from_numpy(labels[c]).long(), BRANCH)
        for c in chunks
    ]


def generated_image(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The files' deterministic images: 64 levels in [-63/32, 63/32]."""
    levels = np.random.RandomState(seed).randint(0, 64, size=shape)
    return ((2 * levels - 63) / 32.0).astype(np.float32)


def generated_weight(name: str, shape: tuple[int, ...], seed: int, gain: float = 1.0) -> np.ndarray:
    """The files' deterministic weights and statistics: 16 levels, exact in float32; `gain` is of the kernels."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()) & 0x7FFFFFFF)
    leaf = name.rsplit(".", 1)[-1]
    level = rng.randint(0, 16, size=shape)
    if len(shape) >= 2:
        bound = 2.0 ** np.round(np.log2(np.sqrt(6.0 / int(np.prod(shape[1:])))))
        value = (2 * level - 15) / 16.0 * bound * gain
    elif leaf == "running_var":
        value = 0.5 + level / 8.0
    elif leaf == "weight":  # of a norm, about one in eight negative
        value = 0.5 + level / 16.0
        value = np.where(rng.randint(0, 8, size=shape) == 0, -value, value)
    else:
        value = (2 * level - 15) / 64.0
    return np.asarray(value, np.float32)


def epoch_order(images: int, epoch: int = 0) -> np.ndarray:
    """The order of the images in an epoch: the files' loaders are seeded by the epoch's number."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(epoch)).numpy()


def first_seed(stored: Mapping[str, np.ndarray]) -> int:
    """Seed of the generator that gave a first classifier its values, which the files do not name.

    Args:
        stored: "cls.0.weight" and "cls.0.bias" as the file holds them, under names with or without "module.".

    Raises:
        ValueError: no seed that is tried gives these values.
    """
    given = {name.removeprefix("module."): value for name, value in stored.items()}
    wanted = {name: given[name] for name in ("cls.0.bias", "cls.0.weight") if name in given}
    for seed in SEEDS if wanted else ():
        if all(np.array_equal(generated_weight(n, v.shape, seed), v) for n, v in wanted.items()):
            return seed
    raise ValueError(f"no seed below {SEEDS[-1]} generates the first classifier of the file")


def original_names(model: SegmentationModel, prefix: str = "module.") -> dict[str, str]:
    """Our name of a weight or buffer -> the original's; counters, which it does not have, are left out."""
    own = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    return dict(zip(own, mib.dump(model, prefix), strict=True))


def _set_weights(
    model: SegmentationModel, names: dict[str, str], values: dict[str, np.ndarray], *, partial: bool = False
) -> None:
    state = model.state_dict()
    for name, original in names.items():
        if original in values or not partial:
            state[name].copy_(torch.from_numpy(values[original]))


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
