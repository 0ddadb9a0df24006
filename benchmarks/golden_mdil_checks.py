"""Compares losses, metrics, network, transfer, data and optimiser with the numbers of MDIL's original code."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.golden_checks import EXACT, SINGLE, Row, Tally, check_losses
from benchmarks.golden_mdil import DOMAINS, KL, RATES, domain_step
from benchmarks.golden_replay import difference, generated_image, generated_weight, tensors
from benchmarks.golden_watch import original_names, original_state
from everseg import losses, metrics
from everseg.data.batches.transforms import flip_and_shift, resize_transform
from everseg.data.class_weights import published_weights
from everseg.engine.optim import learning_rate, make_optimizer, set_learning_rate
from everseg.interop import mdil
from everseg.labels import IGNORED
from everseg.methods.mdil import MDIL
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel

DATASETS = {"cityscapes": "cityscapes", "BDD": "bdd100k", "IDD": "idd"}
VOID = 19
"""Void in the files' labels of the transforms, the last of Cityscapes' 20 outputs."""
WIDEST = 16
"""Dilation whose gradients are compared for each tap of the kernel."""


def loss_terms(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """MDIL's cross-entropy and divergence, as `check_losses` wants them."""
    if "mdil/labels" not in arrays:
        return {}
    label, weight = (torch.from_numpy(arrays[f"mdil/{name}"]) for name in ("labels", "class_weights"))
    teacher = torch.from_numpy(arrays["mdil/teacher_logits"]).to(dtype)
    ce = partial(losses.cross_entropy, label=label, weight=weight.to(dtype), over="valid")
    table: dict[str, Callable[[Tensor], Tensor]] = {"mdil_CE_nll": ce, "mdil_CE_nll2d": ce}
    batch, classes = teacher.shape[:2]
    for name, form in (("as_written", KL["kld"]), ("logprob", KL["kld_corrected"])):
        kl = partial(losses.kl_divergence, teacher_logits=teacher, form=form)
        table |= {  # ours is a mean over the classes whatever the reduction over pixels, theirs is not
            f"mdil_KLD_{name}_mean": kl,
            f"mdil_KLD_{name}_sum": lambda x, kl=kl: classes * kl(x, reduction="sum"),
            f"mdil_KLD_{name}_batchmean": lambda x, kl=kl: classes / batch * kl(x, reduction="sum"),
        }
    return table | {"mdil_KLD_as_written": table["mdil_KLD_as_written_mean"]}


def check_metrics(path: Path) -> list[Row]:
    """Counts and IoU of iouEval, with and without a void class."""
    arrays, tally = dict(np.load(path)), Tally(path.name)
    last = int(arrays["n_classes"])
    prediction, label = arrays["pred"].copy(), arrays["gt"].copy()
    prediction[..., 0:2, 0:3] = last  # as for the stored numbers
    label[label == IGNORED] = last
    matrix = metrics.ConfusionMatrix(last + 1)
    matrix.update(torch.from_numpy(prediction), torch.from_numpy(label))
    for key in arrays:
        if key.startswith("mdil/") and key.endswith("/ignoreIndex"):
            at = key.removesuffix("/ignoreIndex")
            ignored = int(arrays[key])
            result = metrics.iou_eval(matrix.counts, ignored)
            for name in ("tp", "fp", "fn"):
                tally.add("iouEval, counts", result[name], arrays[f"{at}/{name}"], 0.0)
            for name in ("iou", "miou"):
                tally.add("iouEval, IoU and mean", result[name], arrays[f"{at}/{name}"])
    return tally.rows()


def check_network(path: Path) -> list[Row]:
    """Logits of every path, encoder maps, running statistics and gradients, for 1, 2 and 3 domains."""
    arrays, tally = dict(np.load(path)), Tally(path.name)
    seed, gain = int(arrays["det_init_seed"]), float(arrays["det_init_gain"])
    state: dict[str, Tensor] = {}
    for key in sorted(name for name in arrays if name.endswith("/shapes")):
        at = key.removesuffix("/shapes")
        shapes = json.loads(str(arrays[key]))
        state = tensors({n: generated_weight(n, tuple(shape), seed, gain) for n, shape in shapes.items()})
        _check_size(arrays, at, state, tally)
        for precision, dtype in (("f64", torch.float64), ("f32", torch.float32)):
            for task in range(len(mdil.load(state).branches)):
                _check_path(arrays, f"{at}/{precision}/task{task}", _network(state, dtype), task, tally)
    for name, theirs in arrays.items():
        if name.startswith("state/"):
            tally.add("generated weights", state[name.removeprefix("state/")], theirs, 0.0)
    if "wide/input_seed_shape" in arrays:
        for task in range(len(mdil.load(state).branches)):
            _check_wide(arrays, task, _network(state, torch.float64), seed, tally)
    return tally.rows()


def _network(state: dict[str, Tensor], dtype: torch.dtype) -> SegmentationModel:
    """The network of the files; dropout was off in them."""
    return mdil.load(state, dropout=(0, 0)).to(dtype)


def _check_size(arrays: dict[str, np.ndarray], at: str, state: dict[str, Tensor], tally: Tally) -> None:
    model = _network(state, torch.float64)
    own = original_state(model, "")
    tally.note("number of weights", difference(model.parameter_count, arrays[f"{at}/n_params"]), 0.0)
    rows = [
        [float(v.double().sum()), float(v.double().square().sum()), v.numel()]
        for v in (own[name] for name in arrays[f"{at}/keys"].tolist())
    ]
    if set(own) != set(arrays[f"{at}/keys"].tolist()):
        raise ValueError(f"{tally.file}: the network's tensors have other names than the file's")
    tally.add("every tensor, sums and size", np.array(rows), arrays[f"{at}/sum_sqsum_numel"])


@torch.no_grad()
def _check_path(
    arrays: dict[str, np.ndarray], at: str, model: SegmentationModel, task: int, tally: Tally
) -> None:
    single = "/f32/" in at
    precision, limit = ("f32", SINGLE) if single else ("f64", EXACT)
    dtype = torch.float32 if single else torch.float64
    branch = model.branches[task]
    output = model.eval()(torch.from_numpy(arrays["input/x"]).to(dtype))[branch]  # all paths in one forward
    theirs = arrays[f"{at}/logits_eval"]
    tally.add(f"logits, {precision}", _every(output.logits, theirs), theirs, limit)
    if f"{at}/encoder_eval_s" in arrays:
        theirs = arrays[f"{at}/encoder_eval_s"]
        features = output.features["encoder"]
        stride = features.shape[1] // theirs.shape[1]
        tally.add(f"encoder maps, {precision}", features[:, ::stride], theirs, limit)
    image = torch.from_numpy(arrays["input/x2"]).to(dtype)
    output = model.train()(image, (branch,))[branch]
    theirs = arrays[f"{at}/logits_train_nodrop"]
    tally.add(f"logits, {precision}", _every(output.logits, theirs), theirs, limit)
    after = original_state(model, "")
    for name, theirs in arrays.items():
        if name.startswith(f"{at}/after_train_fwd/"):
            ours = after[name.removeprefix(f"{at}/after_train_fwd/")]
            tally.add(f"running statistics of all paths, {precision}", ours, theirs, limit)


def _every(ours: Tensor, theirs: np.ndarray) -> Tensor:
    """Every n-th row and column: many outputs are stored thinned out."""
    step = ours.shape[-1] // theirs.shape[-1]
    return ours[..., ::step, ::step]


def _check_wide(
    arrays: dict[str, np.ndarray], task: int, model: SegmentationModel, seed: int, tally: Tally
) -> None:
    """Images large enough that dilation 16 sees more than padding."""
    at, branch = f"wide/task{task}", model.branches[task]
    image_seed, *shape = arrays["wide/input_seed_shape"].tolist()
    image = torch.from_numpy(generated_image(tuple(shape), image_seed)).double()
    with torch.no_grad():
        logits = model.eval()(image, (branch,))[branch].logits
    tally.add("wide images: logits", logits[..., ::4, ::4], arrays[f"{at}/logits_eval_s4"])
    logits = model.train()(image, (branch,))[branch].logits
    tally.add("wide images: logits", logits[..., ::4, ::4], arrays[f"{at}/logits_train_nodrop_s4"])
    logits.backward(torch.from_numpy(generated_image(tuple(logits.shape), seed + 9) / 1024).double())
    names = original_names(model, "")
    own = {names[name]: weight.grad for name, weight in model.named_parameters()}
    found = (own[name] for name in arrays[f"{at}/grad_names"].tolist())
    norms = np.array([-1.0 if gradient is None else float(gradient.norm()) for gradient in found])
    theirs = arrays[f"{at}/grad_norm"]
    absent = theirs == -1
    tally.note("wide images: which weights have no gradient", difference(norms == -1, absent, 1.0), 0.0)
    whole = np.linalg.norm(theirs[~absent])
    gap = difference(norms[~absent], theirs[~absent], np.maximum(theirs[~absent], 1e-8 * whole))
    tally.note("wide images: gradient norms", gap)
    convolutions = [module for module in model.encoder.modules() if isinstance(module, nn.Conv2d)]
    widest = next(module.weight for module in convolutions if module.dilation == (WIDEST, 1))
    taps = torch.linalg.vector_norm(torch.as_tensor(widest.grad), dim=(0, 1))
    tally.add("wide images: gradient of each tap at dilation 16", taps, arrays[f"{at}/dil16_tapnorm"])


def check_transfer(folder: Path) -> list[Row]:
    """Which tensor each tensor of a grown network starts from."""
    path = folder / "mdil_transfer.json"
    spec, tally = json.loads(path.read_text()), Tally(path.name)
    model, method = erfnet(), MDIL()
    for number in range(1, len(DOMAINS) + 1):
        before = {n: v.clone() for n, v in original_state(model).items()} if number > 1 else {}
        method.prepare_model(model, domain_step(folder, number))
        if number > 1:
            _check_sources(spec[f"step{number}"]["source_of_key"], before, original_state(model), tally)
        _scramble(model, number)
    return tally.rows()


def _check_sources(
    rule: dict[str, str], before: dict[str, Tensor], after: dict[str, Tensor], tally: Tally
) -> None:
    """Compare each tensor with the one it is copied from; "<init>" = as a new network has it."""
    if set(rule) != set(after):
        raise ValueError(f"{tally.file}: the network's tensors have other names than the file's")
    for name, source in rule.items():
        if source != "<init>":
            tally.note("copied tensors", _unequal(after[name], before[source]), 0.0)
        elif "output_conv" in name:
            copied = any(torch.equal(after[name], value) for value in before.values())
            tally.note("last layers, not copied", float(copied), 0.0)
        else:
            start = torch.ones_like if name.endswith("running_var") else torch.zeros_like
            tally.note("fresh statistics", _unequal(after[name], start(after[name])), 0.0)


def _unequal(ours: Tensor, theirs: Tensor) -> float:
    return float(not torch.equal(ours, theirs))


def _scramble(model: SegmentationModel, seed: int) -> None:
    """Give every tensor values of its own, as training would, so that a wrong source shows."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        random_values = torch.rand(value.shape, generator=generator) * 100 + 1
        value.copy_(random_values.to(value.dtype))


def check_param_groups(folder: Path) -> list[Row]:
    """Which weights each step trains, at which rate, and with which constants of Adam."""
    path = folder / "mdil_param_groups.json"
    spec, tally = json.loads(path.read_text()), Tally(path.name)
    model, method = erfnet(), MDIL()
    for number in range(1, len(DOMAINS) + 1):
        method.prepare_model(model, domain_step(folder, number))
        names = original_names(model)
        own = {id(weight): names[name] for name, weight in model.named_parameters()}
        optimizer = make_optimizer(
            method.param_groups(model, domain_step(folder, number)), RATES, lr=RATES.lr
        )
        set_learning_rate(optimizer, learning_rate(RATES, RATES.lr, 3, 6, 3))  # as stored: epoch 2 of 2
        theirs = spec[f"step{number}"]
        groups = [{own[id(p)] for p in group["params"]} for group in optimizer.param_groups]
        tally.note("weights of each group", float(groups != [set(g) for g in theirs["groups"]]), 0.0)
        for which, trained in (("trainable", True), ("frozen", False)):
            found = {own[id(p)] for p in model.parameters() if p.requires_grad is trained}
            tally.note(f"{which} weights", float(found != set(theirs[which])), 0.0)
        for ours, constants in zip(optimizer.param_groups, theirs["group_hp"], strict=True):
            for name in sorted(set(constants) - {"initial_lr"}):
                tally.note(f"Adam's {name}", difference(ours[name], constants[name]))
    return tally.rows()


def check_class_weights(path: Path) -> list[Row]:
    """The published class weights that ship with everseg."""
    authors, tally = json.loads(path.read_text()), Tally(path.name)
    for theirs, ours in DATASETS.items():
        weights = np.array([*published_weights(ours).values(), 0.0])
        tally.add("class weights", weights, authors[theirs], 0.0)
    return tally.rows()


def check_transforms(path: Path) -> list[Row]:
    """Training and validation samples, images and labels."""
    arrays, tally = dict(np.load(path)), Tally(path.name)
    for key in arrays:
        if not key.endswith("/x_u8"):
            continue
        name = key.removesuffix("/x_u8")
        size = arrays[key].shape[-2:]
        x, y = resize_transform(arrays["img"], arrays["label"], size=size)
        if name.startswith("seed"):
            rng = random.Random(int(name.removeprefix("seed")))
            x, y = flip_and_shift(x, y, flip=0.5, shift=2, fill="authors", rng=rng)
        tally.add("images", x, arrays[key], 0.0)
        tally.add("labels", np.where(y == IGNORED, VOID, y), arrays[f"{name}/y"][0], 0.0)
    return tally.rows()


def all_mdil_checks(folder: Path) -> Iterator[Row]:
    """Every check of MDIL whose file lies in the folder, replays excepted."""
    checks: list[tuple[str, Callable[[Path], list[Row]]]] = [
        ("losses_*.npz", partial(check_losses, terms=loss_terms)),
        ("metrics_*.npz", check_metrics),
        ("model_mdil_*.npz", check_network),
        ("mdil_transfer.json", lambda path: check_transfer(path.parent)),
        ("mdil_param_groups.json", lambda path: check_param_groups(path.parent)),
        ("mdil_class_weights.json", check_class_weights),
        ("mdil_transforms*.npz", check_transforms),
    ]
    for pattern, check in checks:
        for path in sorted(folder.glob(pattern)):
            yield from check(path)
