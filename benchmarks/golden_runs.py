"""Replays training runs of the methods' original code, files `train_<method>*.npz`, in float64.

One harness for all of them; a method's own file says how its options are called here, and what else is to be compared.
What a file does not hold follows from its kind: a run without options is of task `tiny` where it has two steps, of
`tiny3` where it has more; one without `step0/` goes on from the end of MiB's first step; initial weights are generated
from a seed, which is found by the first classifier.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_checks import EXACT
from benchmarks.golden_replay import (
    BRANCH,
    GROWTH,
    RATES,
    Comparison,
    difference,
    epoch_order,
    first_seed,
    generated_weight,
    original_names,
    step_batches,
    steps_of,
    tensors,
)
from everseg import losses
from everseg.config.fields import TrainConfig
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.interop import mib
from everseg.methods import plop_terms, switches
from everseg.methods.base import Method, StepContext
from everseg.models.build import deeplabv3
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.scenarios.steps import Step
from everseg.types import Batch

SETS = {"A": 777, "B": 782}
"""Set of a file -> seed of its weights, where the file holds no first classifier that tells it."""
GAIN = 4.0
"""Of the generated kernels of encoder and decoder; the classifiers' is 1."""
TERMS = {
    "loss": ("ce", "pseudo", "soft"),
    "lkd": ("kd",),
    "pod_loss": ("pod", "spatial", "channel"),
    "csw": ("csw",),
    "lfc": ("attraction",),
    "lsep_clusters": ("repulsion",),
    "ldeprototype": ("matching",),
    "lfs": ("sparsity",),
}
"""A loss as the files call it -> our terms whose sum it is."""
TENSORS = ("init", "init_before_pretuning", "after_init", "prefusion", "final")
"""Parts of a step that hold the network's tensors, whole or some."""
Options = Mapping[str, Any]
"""The original's command line; {} where the file does not hold it."""


class RunReplay:
    """One file, trained again.

    Args:
        folder: holds the file, `train_mib_common.npz`, and `train_mib_MiB.npz` for files without a first step.
        stem: the file's name without `.npz`.
        method_of: the method with the options of a step; what it keeps is carried from step to step.
        protocol: of the run's data.
    """

    norm: str = "abn"
    options_of_model: ClassVar[Mapping[str, Any]] = {}
    """Options of the network beside those that MiB's code has."""
    rounding = 0.0
    """Gradients up to this share of the whole are nothing but rounding: compared to the whole only."""
    tells_frozen = True
    """Weights that get no gradient have none in the file either."""

    def __init__(
        self, folder: Path, stem: str, method_of: Callable[[Options], Method], protocol: str = "overlapped"
    ) -> None:
        self.folder, self.stem, self.method_of = folder, stem, method_of
        with np.load(folder / f"{stem}.npz") as file:
            self.golden = {name: file[name] for name in file.files}
        self.common = np.load(folder / "train_mib_common.npz")
        self.found: dict[str, Comparison] = {}
        indices = sorted({int(k[4 : k.index("/")]) for k in self.golden if k.endswith("/lr")})
        self.first, last = indices[0], indices[-1]
        self.task: str = self.options(last).get("task", "tiny" if last == 1 else "tiny3")
        rows = self.golden[f"step{last}/names"]
        self.prefix = "module." if str(rows[0]).startswith("module.") else ""
        self.steps = [dataclasses.replace(step, protocol=protocol) for step in steps_of(self._growth(last))]
        self.model = self.network()
        if self.first:
            self.model.grow(self.steps[0].grows)
            self.model.double()
            with np.load(folder / "train_mib_MiB.npz") as earlier:
                self.set_weights(
                    {k.removeprefix("step0/final/"): earlier[k] for k in earlier.files if "step0/final/" in k}
                )

    def run(self) -> dict[str, Comparison]:
        """Train all steps of the file.

        Returns:
            Quantity -> values compared and largest relative difference: of scalars to each value, of tensors to the
            largest value of the tensor. Loss terms that are 0 on both sides are left out.
        """
        # A method's state from before the first step that the file trains, where the file holds it.
        before = self.golden.get(f"step{self.first - 1}/prototypes")
        state = {} if before is None else {f"prototypes/{BRANCH}": torch.from_numpy(before)}
        for step in self.steps[self.first :]:
            method = self.method_of(self.options(step.index))
            if state:
                method.load_state_dict(state)
            self.train(step, method)
            state = method.state_dict()
        return self.found

    # ------------------------------------------------------------ what a method's own file may replace

    def before_step(self, step: Step) -> None:
        """What the original does between two steps."""

    def begin(self, method: Method, ctx: StepContext, options: Options) -> None:
        """What comes before the first iteration."""
        switches.begin(method, ctx)

    def before_iteration(self, step: Step, i: int) -> None:
        """Give the network what the original drew."""

    def logged(self, terms: Mapping[str, float], method: Method, step: Step) -> dict[str, float]:
        """The file's losses of one iteration from our terms."""
        return {name: sum(terms.get(term, 0.0) for term in ours) for name, ours in TERMS.items()}

    def compare_state(self, step: Step, state: Mapping[str, Tensor]) -> None:
        """Compare what the method keeps, at the end of a step."""
        at = f"step{step.index}/"
        if f"{at}prototypes" in self.golden:
            self.whole("prototypes", state[f"prototypes/{BRANCH}"], self.golden[f"{at}prototypes"])
        if f"{at}count_features" in self.golden:
            self.compare("counts", state[f"count/{BRANCH}"], self.golden[f"{at}count_features"])

    def train_config(self, step: Step, options: Options) -> TrainConfig:
        """How the step was optimised; `lr` is its rate at the start."""
        base = float(options.get("lr", self.golden[f"step{step.index}/lr"].flat[0]))
        names = {
            "momentum": "momentum",
            "weight_decay": "weight_decay",
            "schedule": "lr_policy",
            "power": "lr_power",
        }
        given = {ours: options[theirs] for ours, theirs in names.items() if theirs in options}
        return RATES.model_copy(update={"lr": base, "lr_next": None, **given})

    def batches(self, step: Step, number: int) -> list[Batch]:
        """So many batches in the original's order, an epoch after the other."""
        folder = "tiny" if self.task == "tiny3" and step.index == 0 else self.task
        images = len(self.common[f"{folder}/step{step.index}/train/labels"])
        found: list[Batch] = []
        for epoch in count():
            if len(found) >= number:
                break
            found += step_batches(self.common, self.task, step.index, epoch_order(images, epoch))
        return found

    def network(self) -> SegmentationModel:
        """The network of the files, not grown yet."""
        start = {k.removeprefix("init/"): self.common[k] for k in self.common.files if k.startswith("init/")}
        like = mib.load(tensors(start), norm=self.norm).description["options"]
        return deeplabv3(**like | self.options_of_model).double()

    def start(self, step: Step) -> dict[str, np.ndarray]:
        """Weights of the original as a step starts."""
        return self.stored(f"step{step.index}/init/")

    def drawn(self, method: Method, step: Step) -> str:
        """What the names of weights contain that the original draws at random as a step starts; "-" = none.

        They take the file's values, or are generated where it has none.
        """
        if step.index == 0:
            return ""
        return "-" if getattr(method, "init_background", False) else f"cls.{step.index}."

    # ------------------------------------------------------------ tools

    def options(self, index: int) -> Options:
        """The original's command line in a step."""
        if f"step{index}/meta" not in self.golden:
            return {}
        found = json.loads(str(self.golden[f"step{index}/meta"]))
        return found.get("opts", found)

    def stored(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose name begins so, by the rest of their name."""
        return {k.removeprefix(prefix): v for k, v in self.golden.items() if k.startswith(prefix)}

    def compare(self, quantity: str, ours: Any, theirs: Any, scale: Any = None) -> None:
        """Count one comparison; the default scale is theirs, element by element."""
        ours = ours.detach().double().cpu().numpy() if isinstance(ours, Tensor) else ours
        entry = self.found.setdefault(quantity, Comparison())
        entry.count += np.size(theirs)
        entry.largest = max(entry.largest, difference(ours, theirs, scale))

    def whole(self, quantity: str, ours: Any, theirs: np.ndarray) -> None:
        """Compare two arrays, relative to the largest value of theirs."""
        self.compare(quantity, ours, theirs, np.abs(theirs).max(initial=0.0))

    def names(self) -> dict[str, str]:
        """Our name of a weight or buffer -> the file's."""
        return original_names(self.model, self.prefix)

    def state(self) -> dict[str, Tensor]:
        """The model's tensors under the file's names."""
        state = self.model.state_dict()
        return {original: state[name] for name, original in self.names().items()}

    def set_weights(self, values: Mapping[str, np.ndarray]) -> None:
        """Set every weight that is given, under names with or without "module."."""
        given = {name.removeprefix("module."): value for name, value in values.items()}
        for name, tensor in self.state().items():
            value = given.get(name.removeprefix("module."))
            if value is not None:
                tensor.copy_(torch.from_numpy(value))

    @cached_property
    def seed(self) -> int:
        """Of the generator of weights."""
        first = self.stored("step0/init/")
        if first:
            return first_seed(first)
        return next((SETS[part] for part in self.stem.split("_") if part in SETS), SETS["A"])

    def _growth(self, last: int) -> list[int]:
        """Outputs that each step adds, from the classifiers that the file holds of its last step."""
        told = re.compile(rf"step{last}/({'|'.join(TENSORS)})/(module\.)?cls\.(\d+)\.bias")
        found = ((told.fullmatch(name), value) for name, value in self.golden.items())
        sizes = {int(match[3]): len(value) for match, value in found if match}
        if not sizes:
            return [*GROWTH[self.task]][: last + 1]
        return [sizes.get(index, 0) for index in range(last + 1)]

    # ------------------------------------------------------------ a step

    def train(self, step: Step, method: Method) -> None:
        """Train one step and compare everything that the file holds of it."""
        golden, at, options = self.golden, f"step{step.index}/", self.options(step.index)
        self.before_step(step)
        model = self.model
        teacher = frozen_copy(model) if method.needs_teacher and step.index else None
        model.zero_grad(set_to_none=True)
        method.prepare_model(model, step)
        model.double()
        self._start(method, step)
        groups = method.param_groups(model, step)
        check_param_groups(model, groups)
        train = self.train_config(step, options)
        optimizer = make_optimizer(groups, train, lr=train.lr)
        ctx = StepContext(
            step=step, model=model, module=model, teacher=teacher,
            epoch_batches=lambda: iter(self.batches(step, 1)),
        )  # fmt: skip
        self.begin(method, ctx, options)
        if f"{at}thresholds" in golden:
            self.compare("thresholds", method.state_dict()[f"thresholds/{BRANCH}"], golden[f"{at}thresholds"])
            self.compare(
                "largest entropy", np.log(step.spaces[BRANCH].num_classes), golden[f"{at}max_entropy"]
            )
        model.train()
        batches = self.batches(step, len(golden[f"{at}lr"]))
        for i, batch in enumerate(batches):
            self.before_iteration(step, i)
            lr, theirs = learning_rate(train, train.lr, i, len(batches)), golden[f"{at}lr"][i]
            set_learning_rate(optimizer, lr)
            self.compare("learning rate", np.full(theirs.shape, lr), theirs)
            with watched() as seen:
                terms = {n: float(v) for n, v in train_batch(method, batch, ctx, optimizer).items()}
            for name, value in (self.logged(terms, method, step) | {"loss_tot": sum(terms.values())}).items():
                if at + name in golden and (value != 0 or golden[at + name][i] != 0):
                    self.compare(name, value, golden[at + name][i])
            self._compare_labels(batch, seen, at, i)
            self._compare_norms(at, i)
        before = {name: value.clone() for name, value in self.state().items()}
        kept = method.state_dict()
        switches.finish(method, ctx)
        self.compare_state(step, kept | method.state_dict())
        for quantity, part, state in (
            ("weights before the fusion", "prefusion/", before),
            ("final weights", "final/", self.state()),
        ):
            for name, value in self.stored(at + part).items():
                if name in state:
                    self.whole(quantity, state[name], value)
        self._compare_sums(at)

    def _start(self, method: Method, step: Step) -> None:
        """Give the step the weights that the original drew, and compare what the file holds of its start."""
        at, drawn = f"step{step.index}/", self.drawn(method, step)
        state = self.state()
        if drawn != "-":
            given = {name: value for name, value in self.start(step).items() if drawn in name}
            shapes = {
                name.removeprefix("module."): tuple(state[name].shape) for name in state if drawn in name
            }
            generated = {
                name: generated_weight(name, shape, self.seed, 1.0 if name.startswith("cls.") else GAIN)
                for name, shape in shapes.items()
                if not {name, f"module.{name}"} & given.keys()
            }
            self.set_weights(generated | given)
        for name, value in self.stored(f"{at}init/").items():
            self.whole("classifiers at the start", state[name], value)
        for name, value in self.stored(f"{at}merged/").items():
            self.whole("merged units", state[name], value)

    def _compare_labels(self, batch: Batch, seen: Mapping[str, Tensor], at: str, i: int) -> None:
        """Labels that an iteration learns, and weights of its images."""
        if f"{at}t_labels" in self.golden:
            quantity = "pseudo-labels" if "labels" in seen else "labels"
            self.compare(quantity, seen.get("labels", batch.label), self.golden[f"{at}t_labels"][i], 1.0)
        if "factor" in seen and f"{at}t_classif_adaptive_factor" in self.golden:
            self.compare("adaptive factor", seen["factor"], self.golden[f"{at}t_classif_adaptive_factor"][i])

    def _compare_norms(self, at: str, i: int) -> None:
        rows = {name: row for row, name in enumerate(self.golden[f"{at}names"].tolist())}
        theirs, weights = self.golden[f"{at}gradnorm"][i], self.golden[f"{at}pnorm"][i]
        total, names = float(np.linalg.norm(theirs[theirs > 0])), self.names()
        for name, weight in self.model.named_parameters():
            row = rows[names[name]]
            self.compare("weight norms", weight.detach().norm(), weights[row])
            if (
                self.tells_frozen
            ):  # a gradient that nothing uses, since no loss reaches it, may be 0 or absent
                frozen = weight.grad is None and not weight.requires_grad
                self.compare("frozen weights", float(frozen), float(theirs[row] == -1), 1.0)
            if weight.grad is not None:
                gradient = float(weight.grad.norm())
                self.compare("gradient norms, of the total", gradient, theirs[row], total)
                if gradient > self.rounding * total:
                    self.compare("gradient norms", gradient, theirs[row])

    def _compare_sums(self, at: str) -> None:
        """The final tensors by sum and norm, where the file holds these."""
        if f"{at}final_keys" not in self.golden:
            return
        state = self.state()
        keys = self.golden[f"{at}final_keys"].tolist()
        for key, (total, norm) in zip(keys, self.golden[f"{at}final_sum_norm"], strict=True):
            if key in state:
                scale = max(norm, 1e-300)
                self.compare("final sums", state[key].sum(), total, scale * state[key].numel() ** 0.5)
                self.compare("final norms", state[key].norm(), norm, scale)


@contextmanager
def watched() -> Iterator[dict[str, Tensor]]:
    """Catch the pseudo-labels ("labels") and the weights of images ("factor") that a method makes on its way."""
    seen: dict[str, Tensor] = {}

    def labelled(*values: Any, **options: Any) -> losses.PseudoLabels:
        found = losses.pseudo_labels(*values, **options)
        seen["labels"] = found.label
        return found

    def shared(*values: Any, **options: Any) -> Tensor:
        seen["factor"] = losses.accepted_share(*values, **options)
        return seen["factor"]

    with (
        patch.object(plop_terms, "pseudo_labels", labelled),
        patch.object(plop_terms, "accepted_share", shared),
    ):
        yield seen


def limit(folder: Path, stem: str, quantity: str) -> float:
    """Largest relative difference that counts as agreement.

    In the third step rounding has grown: images scaled by 1 + 2e-16 move SDR's losses by 6e-9, its weights by 2e-8, and
    the smallest of its gradient norms, each relative to itself, by 7e-7.
    """
    if "step2/loss_tot" not in np.load(folder / f"{stem}.npz").files or quantity == "counts":
        return EXACT
    return 1e-5 if quantity == "gradient norms" else 1e-7
