"""Compares losses, metrics, networks, scenarios and transforms with the numbers of MiB's original code."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_replay import difference, generated_image, generated_weight, original_names, tensors
from everseg import losses, metrics
from everseg.data.base import Dataset
from everseg.data.batches.transforms import (
    center_transform,
    normalise,
    random_resized_crop_params,
    train_transform,
    whole_transform,
)
from everseg.interop import mib
from everseg.labels import RawLabels
from everseg.models.build import deeplabv3
from everseg.models.model import SegmentationModel, init_from_background
from everseg.scenarios import class_incremental, task_groups
from everseg.scenarios.steps import Step

SCALE = (0.5, 2.0)
EXACT = 1e-8
"""Limit of everything in float64."""
SINGLE = 1e-4
"""Limit in float32, where the original does not repeat itself better."""
Terms = Callable[[dict[str, np.ndarray], torch.dtype], dict[str, Callable[[Tensor], Tensor]]]
NUM_CLASSES = {"voc": 20, "ade": 150}
ROLES = {
    "train_disjoint": ("disjoint", "train"),
    "train_overlap": ("overlapped", "train"),
    "train_disjoint_nomask": ("sequential", "train"),
    "val": ("overlapped", "val"),
    "val_nomask": ("sequential", "val"),
    "test": ("disjoint", "test"),
}


class Row(NamedTuple):
    """One line of the table."""

    file: str
    quantity: str
    count: int
    """Arrays, cases or tensors compared."""
    difference: float
    """Largest relative difference; 0 = bit-equal."""
    limit: float = EXACT


class Tally:
    """Gathers the largest difference per quantity."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: dict[str, tuple[int, float, float]] = {}

    def add(self, quantity: str, ours: Any, theirs: Any, limit: float = EXACT) -> None:
        """Compare two arrays, relative to the largest value of theirs."""
        theirs = np.asarray(theirs, np.float64)
        ours = ours.detach().double().numpy() if isinstance(ours, Tensor) else ours
        self.note(quantity, difference(ours, theirs, np.abs(theirs).max(initial=0.0)), limit)

    def note(self, quantity: str, gap: float, limit: float = EXACT) -> None:
        """Count one comparison."""
        count, worst, _ = self.found.get(quantity, (0, 0.0, limit))
        self.found[quantity] = (count + 1, max(worst, gap), limit)

    def rows(self) -> list[Row]:
        return [Row(self.file, quantity, *values) for quantity, values in self.found.items()]


def check_losses(path: Path, terms: Terms | None = None) -> list[Row]:
    """Values and gradients of every loss, in every reduction the file holds.

    Args:
        terms: (arrays, dtype) -> name in the file -> loss of the logits; default MiB's.
    """
    arrays, tally = dict(np.load(path)), Tally(path.name)
    for precision, dtype, limit in (("f64", torch.float64, EXACT), ("f32", torch.float32, SINGLE)):
        logits = torch.from_numpy(arrays["logits"]).to(dtype)
        cotangent = torch.from_numpy(arrays["grad_weight"]).to(dtype)
        for name, term in (terms or _loss_terms)(arrays, dtype).items():
            if f"{precision}/{name}/out" not in arrays:
                continue
            x = logits.clone().requires_grad_()
            value = term(x)
            value.backward(cotangent if value.dim() else None)
            tally.add(
                f"{name.split('.')[0]}, value, {precision}", value, arrays[f"{precision}/{name}/out"], limit
            )
            gradient = arrays[f"{precision}/{name}/grad"]
            tally.add(f"{name.split('.')[0]}, gradient, {precision}", x.grad, gradient, limit)
    return tally.rows()


def _loss_terms(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    old = torch.from_numpy(arrays["old_logits"]).to(dtype)
    new, full, mask = (torch.from_numpy(arrays[name]) for name in ("labels", "labels_full", "mask"))
    alpha, num_old = float(arrays["alpha"]), int(arrays["old_cl"])
    kd, ukd, uce = losses.distillation, losses.unbiased_distillation, losses.unbiased_cross_entropy
    ce, bce, icarl = losses.cross_entropy, losses.binary_cross_entropy, losses.icarl
    table: dict[str, Callable[[Tensor], Tensor]] = {
        "UnbiasedCrossEntropy.trainer": lambda x: uce(x, new, num_old=num_old),
        "PlainCE255.trainer": lambda x: ce(x, full),
        "BCE.trainer": lambda x: bce(x, full),
        "IcarlCombinedTerm": lambda x: 10 * losses.icarl_distillation(x, old),
    }
    for form in ("none", "mean", "sum"):
        how: dict[str, Any] = {"reduction": form}
        table |= {
            f"UnbiasedCrossEntropy.{form}": lambda x, how=how: uce(
                x, new, num_old=num_old, over="valid", **how
            ),
            f"KD.{form}": lambda x, how=how: kd(x, old, **how),
            f"KD_alpha.{form}": lambda x, how=how: kd(x, old, alpha=alpha, **how),
            f"KD_mask.{form}": lambda x, how=how: kd(x, old, mask=mask, **how),
            f"UnbiasedKD.{form}": lambda x, how=how: ukd(x, old, **how),
            f"UnbiasedKD_alpha.{form}": lambda x, how=how: ukd(x, old, alpha=alpha, **how),
            f"UnbiasedKD_mask.{form}": lambda x, how=how: ukd(x, old, mask=mask, **how),
            f"BCE.{form}": lambda x, how=how: bce(x, full, over="valid", **how),
            f"PlainCE255.{form}": lambda x, how=how: ce(x, full, over="valid", **how),
            f"Icarl.{form}": lambda x, how=how: icarl(x, full, old, **how),
            f"Icarl_bkg.{form}": lambda x, how=how: icarl(x, full, old, background_from_label=True, **how),
        }
        if form != "none":
            table[f"Focal.{form}"] = lambda x, how=how: losses.focal(x, full, **how)
    return table


def check_metrics(path: Path) -> list[Row]:
    """Confusion counts and every score of MiB's metric."""
    arrays, tally = dict(np.load(path)), Tally(path.name)
    matrix = metrics.ConfusionMatrix(int(arrays["n_classes"]))
    for prediction, label in zip(arrays["pred"], arrays["gt"], strict=True):
        matrix.update(torch.from_numpy(prediction), torch.from_numpy(label))
    tally.add("confusion counts", matrix.counts, arrays["mib/confusion"], 0.0)
    for name, ours in (("class_iou", matrix.iou()), ("class_acc", matrix.accuracy())):
        theirs = arrays[f"mib/{name}"]
        present = ~np.isnan(theirs)
        tally.add("IoU and accuracy per class", ours.numpy()[present], theirs[present])
    for score, name in (
        (metrics.overall_accuracy, "Overall_Acc"),
        (metrics.mean_accuracy, "Mean_Acc"),
        (metrics.frequency_weighted_iou, "FreqW_Acc"),
        (metrics.mean_iou, "Mean_IoU"),
    ):
        tally.add("means over classes", score(matrix.counts), arrays[f"mib/{name}"])
    return tally.rows()


def check_network(path: Path) -> list[Row]:
    """Logits, features, gradients, running statistics and classifier initialisation of a small network."""
    arrays, tally = dict(np.load(path)), Tally(path.name)
    state = tensors({n.removeprefix("state/"): v for n, v in arrays.items() if n.startswith("state/")})
    for name in arrays:
        if "/logits_" in name and not name.startswith("wide/"):
            _check_logits(arrays, name, state, tally)
    for stride in (16, 8):
        for norm in ("abn", "iabn"):
            _check_gradients(arrays, stride, norm, state, tally)
            _check_wide(arrays, stride, norm, state, tally)
    _check_initialisation(arrays, state, tally)
    return tally.rows()


def _upsampled(model: SegmentationModel, image: Tensor) -> Tensor:
    return losses.upsample(model(image)["default"].logits, image.shape[2:])


def _check_logits(arrays: dict[str, np.ndarray], name: str, state: dict[str, Tensor], tally: Tally) -> None:
    stride, norm, precision, pool, image_name, what = name.split("/")
    _, mode, *every = what.split("_")
    dtype = torch.float64 if precision == "f64" else torch.float32
    step = int(every[0].removeprefix("s")) if every else 1
    model = mib.load(
        state,
        norm=norm,
        output_stride=int(stride.removeprefix("os")),
        pool_size=int(pool.removeprefix("pool")),
    )
    model.to(dtype).train(mode == "train")
    with torch.no_grad():
        ours = _upsampled(model, torch.from_numpy(arrays[f"input/{image_name}"]).to(dtype))
    limit = EXACT if precision == "f64" else SINGLE
    tally.add(f"logits, {norm}, {precision}", ours[..., ::step, ::step], arrays[name], limit)


def _check_gradients(
    arrays: dict[str, np.ndarray], stride: int, norm: str, state: dict[str, Tensor], tally: Tally
) -> None:
    key = f"os{stride}/{norm}/f64/pool32/batch64"
    if f"{key}/grad_names" not in arrays:
        return
    model = mib.load(state, norm=norm, output_stride=stride).double()
    image = torch.from_numpy(arrays["input/batch64"]).double()
    with torch.no_grad():
        features = model.eval()(image)["default"].features
    for tap, stored in (("encoder", "body_eval_f32"), ("decoder", "pre_logits_eval_f32")):
        tally.add("features (stored in f32)", features[tap], arrays[f"{key}/{stored}"], 1e-6)
    logits = _upsampled(model.train(), image)
    seed = 10 * int(arrays["det_init_seed"]) + 7
    logits.backward(torch.from_numpy(generated_image(tuple(logits.shape), seed) / 64).double())
    names = original_names(model, "")
    gradients = {names[n]: p.grad for n, p in model.named_parameters()}
    buffers = {names[n]: v for n, v in model.state_dict().items() if n in names}
    order = arrays[f"{key}/grad_names"].tolist()
    norms = np.array([float(gradients[n].norm()) for n in order])
    tally.note("gradient norms", difference(norms, arrays[f"{key}/grad_norm"]))
    for name, theirs in arrays.items():
        if name.startswith(f"{key}/grad/"):
            tally.add("gradients", gradients[name.removeprefix(f"{key}/grad/")], theirs)
        if name.startswith(f"{key}/after_train_fwd/"):
            tally.add("running statistics", buffers[name.removeprefix(f"{key}/after_train_fwd/")], theirs)


def _check_wide(
    arrays: dict[str, np.ndarray], stride: int, norm: str, state: dict[str, Tensor], tally: Tally
) -> None:
    key = f"wide/os{stride}/{norm}"
    if f"{key}/logits_eval_s8" not in arrays:
        return
    seed, *shape = arrays["wide/input_seed_shape"].tolist()
    image = torch.from_numpy(generated_image(tuple(shape), seed)).double()
    model = mib.load(state, norm=norm, output_stride=stride).double()
    with torch.no_grad():
        ours = _upsampled(model.eval(), image)
    tally.add("wide images: logits", ours[..., ::8, ::8], arrays[f"{key}/logits_eval_s8"])
    logits = _upsampled(model.train(), image)
    tally.add("wide images: logits", logits[..., ::8, ::8], arrays[f"{key}/logits_train_s8"])
    seed = 10 * int(arrays["det_init_seed"]) + 8
    logits.backward(torch.from_numpy(generated_image(tuple(logits.shape), seed) / 1024).double())
    names = original_names(model, "")
    gradients = {names[n]: p.grad for n, p in model.named_parameters()}
    norms = np.array([float(gradients[n].norm()) for n in arrays[f"{key}/grad_names"].tolist()])
    tally.note("wide images: gradient norms", difference(norms, arrays[f"{key}/grad_norm"]))
    for name, theirs in arrays.items():
        if name.startswith(f"{key}/grad/") and name.endswith("_tapnorm"):
            weight = gradients[name.removeprefix(f"{key}/grad/").removesuffix("_tapnorm")]
            tally.add("wide images: gradients per kernel tap", weight.square().sum((0, 1)).sqrt(), theirs)


def _check_initialisation(arrays: dict[str, np.ndarray], state: dict[str, Tensor], tally: Tally) -> None:
    for precision in ("f32", "f64"):
        at = f"init_new/{precision}/"
        before = {
            n.removeprefix(f"{at}before/"): v for n, v in arrays.items() if n.startswith(f"{at}before/")
        }
        if not before:
            continue
        model = mib.load(state | tensors(before), norm="abn")
        init_from_background(model.double() if precision == "f64" else model, "default")
        after = mib.dump(model, "")
        for name, theirs in arrays.items():
            if name.startswith(f"{at}after/"):
                tally.add("classifier initialisation", after[name.removeprefix(f"{at}after/")], theirs)


def check_official_width(path: Path) -> list[Row]:
    """Logits of the network at its published widths, one block per stage."""
    arrays, tally = dict(np.load(path)), Tally(path.name)
    seed = int(arrays["det_init_seed"])
    with torch.device("meta"):
        model = deeplabv3(blocks=(1, 1, 1, 1), norm="abn")
        for size in (4, 2):
            model.grow({"default": size})
    shapes = {name: tuple(value.shape) for name, value in mib.dump(model, "").items()}
    if set(shapes) != set(arrays["keys"].tolist()):
        raise ValueError(f"{path.name}: the network's weights have other names than the file's")
    state = tensors({name: generated_weight(name, shape, seed) for name, shape in shapes.items()})
    for precision, dtype in (("f64", torch.float64), ("f32", torch.float32)):
        model = mib.load(state, norm="abn").to(dtype)
        for mode in ("eval", "train"):
            theirs = arrays[f"{precision}/logits_{mode}"]
            with torch.no_grad():
                ours = _upsampled(model.train(mode == "train"), torch.from_numpy(arrays["input"]).to(dtype))
            limit = EXACT if theirs.dtype == np.float64 else SINGLE
            tally.add(f"logits, {precision} (stored in {theirs.dtype})", ours[..., ::4, ::4], theirs, limit)
    return tally.rows()


def check_scenarios(folder: Path) -> list[Row]:
    """Selected images and label tables of all cases, and the boxes of the random resized crop."""
    spec = json.loads((folder / "scenario.json").read_text())
    maps = dict(np.load(folder / "scenario_maps.npz"))
    tally = Tally("scenario.json")
    built: dict[tuple[str, str, str], tuple[Step, ...]] = {}
    for case in spec["cases"]:
        name, (protocol, role) = case["dataset"], ROLES[case["role"]]
        key = (name, case["task"], protocol)
        if key not in built:
            built[key] = _scenario(name, case["task"], protocol, maps)
        (source,) = getattr(built[key][case["step"]], role)
        num_images = len(maps[f"{name}_{'train' if role == 'train' else 'val'}"])
        table = np.full(256, case["lut_default"], np.uint8)
        for raw, train_id in case["lut"].items():
            table[int(raw)] = train_id
        table[255] = case["lut_255"]
        same = [i for i in source.indices if i < num_images] == case["selected"]
        same &= (num_images in source.indices) == case["lut_map_selected"]
        tally.note("selected images", 0.0 if same else 1.0, 0.0)
        tally.note("label tables", 0.0 if source.lut == table.tobytes() else 1.0, 0.0)
    for case in spec["random_resized_crop_params"]:
        rng = random.Random(case["seed"])
        box = random_resized_crop_params(case["w"], case["h"], scale=SCALE, rng=rng)
        same = (*box, rng.random()) == (case["i"], case["j"], case["hh"], case["ww"], case["next_random"])
        tally.note("boxes of the random crop", 0.0 if same else 1.0, 0.0)
    return tally.rows()


def _scenario(name: str, task: str, protocol: str, maps: dict[str, np.ndarray]) -> tuple[Step, ...]:
    labels = RawLabels({0: "background", **{i: f"class {i}" for i in range(1, NUM_CLASSES[name] + 1)}})
    extra = maps["all_bytes_map"][None]
    counts = {}
    for split in ("train", "val"):
        images = np.concatenate([maps[f"{name}_{split}"], extra])
        counts[split] = np.stack([np.bincount(image.ravel(), minlength=256) for image in images])
    return class_incremental(
        Dataset(name, labels, {}),
        task_groups(task, labels, name),
        counts,
        protocol=protocol,
        policy=f"mib-{name}",
        validation="split",
        strict=False,
    )


def check_transforms(path: Path) -> list[Row]:
    """Training and test samples, images and labels."""
    arrays, tally = dict(np.load(path)), Tally(path.name)
    image, label = arrays["img"], arrays["lbl"]

    def sample(name: str, x: np.ndarray, y: np.ndarray) -> None:
        tally.add("labels", y, arrays[f"{name}/lbl"], 0.0)
        if f"{name}/img" in arrays:
            tally.add("images", normalise(torch.from_numpy(x)), arrays[f"{name}/img"], 0.0)

    for key in arrays:
        if key.startswith("train_seed") and key.endswith("/img"):
            rng = random.Random(int(key.removeprefix("train_seed").removesuffix("/img")))
            sample(key[:-4], *train_transform(image, label, crop=48, scale=SCALE, flip=0.5, rng=rng))
    sample("val", *center_transform(image, label, crop=48))
    sample("nocrop", *whole_transform(image, label))
    return tally.rows()


def all_checks(folder: Path) -> Iterator[Row]:
    """Every check whose file lies in the folder, replays excepted."""
    for pattern, check in (
        ("losses_*.npz", check_losses),
        ("metrics_*.npz", check_metrics),
        ("model_mib_[A-Z].npz", check_network),
        ("model_mib_official_width.npz", check_official_width),
    ):
        for path in sorted(folder.glob(pattern)):
            yield from check(path)
    if (folder / "scenario.json").exists():
        yield from check_scenarios(folder)
    if (folder / "mib_transforms.npz").exists():
        yield from check_transforms(folder / "mib_transforms.npz")
