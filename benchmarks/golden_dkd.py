"""Compares DKD, with and without memory, with the numbers of the authors' code: functions and training runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_checks import Row, Tally
from benchmarks.golden_replay import BRANCH, Comparison
from benchmarks.golden_tiny import TinyRun, as_theirs, set_weights, tiny_network
from everseg.config.fields import LrFactors, TrainConfig
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer, set_learning_rate
from everseg.engine.param_groups import split_by_rate
from everseg.engine.step import train_batch
from everseg.labels import IGNORED
from everseg.losses import (
    Term,
    binary_cross_entropy,
    binary_negatives,
    decomposed_logits,
    icarl_distillation,
    pixelwise_losses,
)
from everseg.losses.argmax import predict_ids
from everseg.methods import switches
from everseg.methods.base import Method, StepContext
from everseg.methods.dkd import AUXILIARY, DKD
from everseg.models.heads import Head, start_from
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.scenarios.steps import Step
from everseg.types import Batch


def rename(key: str, auxiliary: bool = True) -> str:
    """Their name of a tensor behind the ASPP -> ours.

    Args:
        auxiliary: classifier 0 is the auxiliary one (DKD), and that of step k has the number k + 1.
    """
    part, number, leaf = key.removeprefix("aspp.").split(".")
    if part == "last_conv":
        return f"decoder.{('last_conv', 'last_norm')[int(number)]}.{leaf}"
    if auxiliary and number == "0":
        return f"heads.{BRANCH}.others.{AUXILIARY}.{leaf}"
    return f"heads.{BRANCH}.classifiers.{int(number) - auxiliary}.{leaf}"


class SigmoidRun(TinyRun):
    """A file of DKD or STAR, whose tasks do not name the background."""

    method: Method
    auxiliary = True
    """Whether the network has the auxiliary classifier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 not in self.groups[0]:
            self.groups[0] = (0, *self.groups[0])
        self.model = tiny_network(int(self.meta.get("stride", 2)), last_conv=True)

    def run(self) -> dict[str, Comparison]:
        """Train every step again; quantity -> values compared and largest relative difference."""
        for index in range(len(self.groups)):
            if f"step{index}/order" in self.golden:
                self._step(index)
        return self.found

    # -- what a method's own run differs in

    def begin(self, ctx: StepContext) -> None:
        switches.begin(self.method, ctx)

    def finish(self, ctx: StepContext) -> None:
        switches.finish(self.method, ctx)

    def before_iteration(self, iteration: int) -> None:
        """Prepare random draws."""

    def start(self, index: int) -> None:
        """Set what the original drew at random, and compare the rest."""
        prefix = f"step{index}/start/"
        if index == 0:
            set_weights(self.model, self.stored(prefix), self.rename)
        else:
            self.compare_weights("weights at the start", self.model, prefix, self.rename)

    def logged(self, terms: Mapping[str, Tensor], index: int) -> dict[str, Any]:
        """Our terms under the file's names."""
        raise NotImplementedError

    # --

    def rename(self, key: str) -> str:
        return rename(key, self.auxiliary)

    def setting(self, index: int) -> dict[str, Any]:
        """The step's own options in the file."""
        return self.meta["cfg"][index]

    def batch(self, index: int, iteration: int) -> Batch:
        """The batch of an iteration; images of the memory carry the labels of the step, as all others."""
        at = f"step{index}/"
        which = self.golden[f"{at}order"][iteration]
        label = self.labels(which, self.groups[index])
        self.same("labels", label, self.golden[f"{at}labels"][iteration])
        return Batch(self.images[which], label, BRANCH)

    def _step(self, index: int) -> None:
        at, step, model, method = f"step{index}/", self.step(index), self.model, self.method
        teacher = frozen_copy(model) if index else None
        method.prepare_model(model, step)
        model.double()
        self.start(index)
        given = self.setting(index)["optimizer"]["args"]
        train = self._config(index)
        groups = split_by_rate(method.param_groups(model, step), model, step, train)
        check_param_groups(model, groups)
        optimizer = make_optimizer(groups, train, lr=given["lr"])
        ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
        self.begin(ctx)
        model.train()
        total = len(self.golden[f"{at}order"])
        for i in range(total):
            batch = self.batch(index, i)
            set_learning_rate(optimizer, learning_rate(train, given["lr"], i, total))
            self._compare_rates(optimizer, step, self.golden[f"{at}lr"][i])
            self.before_iteration(i)
            logged = train_batch(method, batch, ctx, optimizer)
            for name, value in self.logged(logged, index).items():
                self.compare(name, float(value), self.golden[f"{at}term/{name}"][i])
            self._compare_gradients(index, i)
        self.finish(ctx)
        self.compare_weights("final weights", model, f"{at}final/", self.rename)
        self._compare_confusion(index)

    def _config(self, index: int) -> TrainConfig:
        """The optimiser and schedule of a step; a warm-up is read from the rates of the file."""
        given = self.setting(index)["optimizer"]["args"]
        rates = self.golden[f"step{index}/lr"][:, 0]
        plain = given["lr"] * (1 - np.arange(len(rates)) / len(rates)) ** 0.9
        share = rates / plain
        warm = int((share < 1 - 1e-9).sum())
        warmup = {"warmup": warm, "warmup_from": float(share[0]), "warmup_power": 1.0} if warm else {}
        return TrainConfig(
            lr=given["lr"],
            momentum=given["momentum"],
            nesterov=given["nesterov"],
            weight_decay=given["weight_decay"],
            lr_factors=LrFactors(decoder=10, heads=10),
            **warmup,
        )

    def _compare_rates(self, optimizer: torch.optim.Optimizer, step: Step, theirs: np.ndarray) -> None:
        """Compare the rates of body, ASPP, old classifiers and new ones (in the first step: all classifiers)."""
        rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        head = self.model.head(BRANCH)
        parts = [self.model.encoder, self.model.decoder, head.classifiers[-1]]
        if not step.is_first:
            parts.insert(2, head.classifiers[0])
        found = [next(rates[id(w)] for w in part.parameters() if id(w) in rates) for part in parts]
        self.compare("learning rate", found, theirs)

    def _compare_gradients(self, index: int, iteration: int) -> None:
        """Compare gradient norms. From step 1 on the original never zeroes those of its frozen norms: left out."""
        at = f"step{index}/"
        theirs = self.golden[f"{at}gradnorm"][iteration]
        whole = float(np.linalg.norm(theirs[theirs >= 0]))
        grads = {name: w.grad if w.requires_grad else None for name, w in self.model.named_parameters()}
        for key, norm in zip(self.golden[f"{at}names"].tolist(), theirs.tolist(), strict=True):
            ours = as_theirs(grads, key, self.rename)
            if ours is None and index:
                continue
            value = -1.0 if ours is None else float(ours.norm())
            self.compare("gradient norms, of the total", value, norm, whole)
            if norm > 1e-10 * whole:
                self.compare("gradient norms", value, norm)

    @torch.no_grad()
    def _compare_confusion(self, index: int) -> None:
        """Count the test images that hold a class seen so far; classes to come are background."""
        key = f"step{index}/test_cm"
        if key not in self.golden:
            return
        self.model.eval()
        seen = self.seen(index)
        counts = np.zeros((len(seen), len(seen)), int)
        for number in range(self.num_train, len(self.raw)):
            if not set(seen[1:]) & set(self.raw[number].unique().tolist()):
                continue
            truth = self.labels(np.array([number]), seen)
            output = self.model(self.images[number][None], (BRANCH,))[BRANCH]
            found = predict_ids(output.logits, truth.shape[1:])
            valid = truth != IGNORED
            np.add.at(counts, (truth[valid].numpy(), found[valid].numpy()), 1)
        self.same("confusion counts", counts, self.golden[key])


class _Replay(SigmoidRun):
    def __post_init__(self) -> None:
        super().__post_init__()
        own = [self.setting(index)["hyperparameter"] for index in range(len(self.groups))]
        first, later = own[0], own[min(1, len(own) - 1)]
        self.method = DKD(
            pos_weight=first["pos_weight"],
            pos_weight_next=later["pos_weight"],
            kd_weight=later["kd"],
            positive_weight=later["dkd_pos"],
            negative_weight=later["dkd_neg"],
            auxiliary_weight=later["ac"],
            unlabelled="negative",
        )

    def logged(self, terms: Mapping[str, Tensor], index: int) -> dict[str, Any]:
        method: Any = self.method
        new, old = len(set(self.groups[index]) - {0}), len(self.seen(index - 1)) - 1
        found = {
            "loss": sum(terms.values()),
            "loss_mbce": terms["mbce"] / new,
            "loss_ac": terms["auxiliary"] / method.auxiliary_weight,
        }
        if index:
            found |= {
                "loss_kd": terms["kd"] / method.kd_weight / old,
                "loss_dkd_pos": terms["positive"] / method.positive_weight / old,
                "loss_dkd_neg": terms["negative"] / method.negative_weight / old,
            }
        return found


def replay_dkd(folder: Path, stem: str) -> dict[str, Comparison]:
    """Train one `train_dkd*.npz` again, in the authors' form.

    Returns:
        Quantity -> values compared and largest relative difference: of scalars to each value, of tensors to the
        largest value of the tensor; of labels and confusion counts the share that differs.
    """
    return _Replay(folder, stem).run()


def check_dkd(folder: Path) -> list[Row]:
    """Losses, decomposed logits, start of new classifiers and readout of every `dkd_losses_*.npz`."""
    return [row for path in sorted(folder.glob("dkd_losses_*.npz")) for row in _check_file(path)]


def _check_file(path: Path) -> list[Row]:
    arrays, tally = dict(np.load(path)), Tally(path.name)
    check_positives(arrays, tally)
    teacher = torch.from_numpy(arrays["old_logits"])
    check_value(arrays, tally, "kd", lambda x: icarl_distillation(x, teacher, first=1))
    check_value(arrays, tally, "ac", lambda x: binary_negatives(x, last=1))
    head = SegmentationModel(*_nothing(arrays["features"].shape[1])).double()
    names = sorted({key.split(".")[1] for key in arrays if key.startswith("cls_before/")})
    sizes = [len(arrays[f"cls_before/cls.{name}.bias"]) for name in names]
    head.grow({BRANCH: sizes[1] + 1}, heads={BRANCH: Head(background="constant", auxiliary={AUXILIARY: 1})})
    for size in sizes[2:]:
        head.grow({BRANCH: size})
    given = {key.removeprefix("cls_before/"): value for key, value in arrays.items() if "cls_before/" in key}
    set_weights(head, given, rename)
    for sign, name in (("positive", "pos"), ("negative", "neg")):
        _check_decomposed(arrays, tally, head, sign, name)
    start_from(head.head(BRANCH), AUXILIARY)
    state = head.state_dict()
    for key, value in arrays.items():
        if key.startswith("cls_after_init/"):
            tally.add("start of new classifiers", state[rename(key.removeprefix("cls_after_init/"))], value)
    logits = torch.from_numpy(arrays["inference/logits"]).clone()
    logits[:, :1] = 0
    tally.add("readout", logits.argmax(dim=1), arrays["inference/pred"], 0.0)
    return tally.rows()


def check_positives(arrays: Mapping[str, np.ndarray], tally: Tally) -> None:
    """The loss of the new classes for every factor of positives, plain and in bands."""
    first = 1 + int(arrays["K_old_without_bg"])
    label = torch.from_numpy(arrays["labels"])
    # STAR has no output in the background's place.
    missing = first + int(arrays["N_new"]) - arrays["logits"].shape[1]

    def whole(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(len(x), missing, *x.shape[2:]), x], dim=1)

    for key in arrays:
        if not (key.startswith("mbce_pw") and key.endswith("/out")):
            continue
        name = key.split("/")[0]
        options = {
            "first": first,
            "pos_weight": float(name.removeprefix("mbce_pw")),
            "unlabelled": "negative",
        }
        term = {"mbce": Term(binary_cross_entropy, options=options)}
        plain = partial(binary_cross_entropy, label=label, **options)
        check_value(arrays, tally, name, lambda x, loss=plain: loss(whole(x)))
        banded = partial(pixelwise_losses, term, label=label, band=2)
        check_value(arrays, tally, name, lambda x, loss=banded: loss(whole(x))["mbce"], " in bands")


def check_value(
    arrays: Mapping[str, np.ndarray],
    tally: Tally,
    name: str,
    loss: Callable[[Tensor], Tensor],
    told: str = "",
    wanted: str = "logits",
) -> None:
    """Compare a loss and its gradient; the file has the values by class, ours is their sum."""
    x = torch.from_numpy(arrays[wanted]).requires_grad_()
    value = loss(x)
    value.backward()
    tally.add(f"{name}{told}, value", value, arrays[f"{name}/out"].sum())
    tally.add(f"{name}{told}, gradient", x.grad, arrays[f"{name}/grad_{wanted}"])


def _check_decomposed(
    arrays: Mapping[str, np.ndarray], tally: Tally, model: SegmentationModel, sign: Any, name: str
) -> None:
    x = torch.from_numpy(arrays["features"]).requires_grad_()
    weights = [part.weight.detach().clone().requires_grad_() for part in model.head(BRANCH).classifiers]
    found = decomposed_logits(x, torch.cat(weights), sign)
    (found * torch.from_numpy(arrays[f"decomp_{name}/cot"])).sum().backward()
    tally.add(f"{sign} part, value", found, arrays[f"decomp_{name}/out"])
    tally.add(f"{sign} part, gradient", x.grad, arrays[f"decomp_{name}/grad_features"])
    for number, weight in enumerate(weights, 1):
        tally.add(f"{sign} part, gradient", weight.grad, arrays[f"decomp_{name}/grad_w{number}"])


class _Nothing(torch.nn.Module):
    """An encoder and decoder for a model that is used for its classifiers alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


def _nothing(channels: int) -> tuple[_Nothing, _Nothing]:
    return _Nothing(channels), _Nothing(channels)
