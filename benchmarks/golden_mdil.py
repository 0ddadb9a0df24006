"""Replays the training runs of MDIL's original code with everseg's method, in float64.

Images, labels, order of the images and results come from the files `train_mdil*.npz`; initial weights from the
generator of golden values.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_replay import Comparison, difference, generated_image, generated_weight
from benchmarks.golden_watch import Watch, original_names, original_state
from everseg.config.fields import TrainConfig
from everseg.engine.optim import check_param_groups, learning_rate, make_optimizer, set_learning_rate
from everseg.engine.step import train_batch
from everseg.labels import IGNORED, SYNTHETIC_VOID, LabelSpace
from everseg.losses import cross_entropy, kl_divergence
from everseg.methods import switches
from everseg.methods.base import StepContext
from everseg.methods.mdil import MDIL
from everseg.metrics import ConfusionMatrix, iou_eval
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.scenarios.steps import Source, Step
from everseg.types import Batch

DOMAINS = ("cityscapes", "BDD", "IDD")
"""Branches in the order they are learnt, named as the files name the data."""
FORMS: dict[str, Literal["two", "two-legacy"]] = {"legacy": "two-legacy", "modern": "two"}
"""Form of the second update in the files -> `MDIL.updates`."""
KL: dict[str, Literal["probabilities", "log"]] = {"kld": "probabilities", "kld_corrected": "log"}
"""Stored divergence -> form of `kl_divergence`."""
RATES = TrainConfig(lr=5e-4, lr_next=None, optimizer="adam", schedule_by="epoch")
VANISHING = 1e-10
"""Gradients below this share of the whole gradient's norm are zero but for rounding: biases before a batch norm."""
STORED_SINGLE = "final norms (stored in f32)"
LIMITS = {
    STORED_SINGLE: 1e-7,
    "which weights have no gradient": 0.0,
    "Adam's step counts": 0.0,
    "teacher's mode": 0.0,
    "which tensors of the teacher moved": 0.0,
}
"""Limits of the quantities for which it is not the general one."""
VALIDATED = {1: (0,), 2: (1, 0), 3: (0, 1, 2)}
"""Step of the files -> domains validated after an epoch, in the order of the stored rows."""


def domain_step(folder: Path, number: int) -> Step:
    """The step that teaches one domain with an extra output for void, as a scenario would build it.

    Args:
        folder: of the files; the class weights are read there.
        number: of the step, from 1 as in the files.
    """
    weights = json.loads((folder / "mdil_class_weights.json").read_text())
    spaces = {}
    for domain in DOMAINS[:number]:
        raw = (*range(len(weights[domain]) - 1), SYNTHETIC_VOID)
        spaces[domain] = LabelSpace((raw,), tuple(f"class {i}" for i in raw), background=None)
    new = DOMAINS[number - 1]
    source = Source(new, new, "train", (), bytes(range(256)), domain=new)
    known = {domain: tuple(weights[domain]) for domain in spaces}
    return Step(number - 1, (source,), (), spaces, {new: spaces[new].num_classes}, class_weights=known)


def authors_form(form: str, kd_weight: float = 0.1) -> MDIL:
    """The method as the authors' code computes it, with one form ("legacy" or "modern") of the second update."""
    return MDIL(
        kl="probabilities",
        updates=FORMS[form],
        teacher_statistics="authors",
        frozen_statistics=False,
        kd_weight=kd_weight,
    )


def new_model() -> SegmentationModel:
    """The network of the files, not grown yet."""
    return erfnet(dropout=(0, 0)).double()


def replay_mdil(path: Path, form: str) -> dict[str, Comparison]:
    """Train one file's steps again in one form of the second update and compare them with the file.

    Steps whose distillation weighs 50 (`step<k>_lambda50`), which start where the plain ones do, are replayed where
    stored.

    Returns:
        As `golden_replay.replay`; gradients are compared to the tensor's norm and to the whole gradient's.
    """
    golden, model, found = dict(np.load(path)), new_model(), dict[str, Comparison]()
    for number in range(1, len(DOMAINS) + 1):
        heavy = f"step{number}_lambda50"
        if f"f64/{form}/{heavy}/ce" in golden:
            start = copy.deepcopy(model)
            merge(
                found,
                replay_step(
                    path.parent, golden, start, number, authors_form(form, 50.0), f"f64/{form}/{heavy}"
                ),
            )
        merge(
            found,
            replay_step(path.parent, golden, model, number, authors_form(form), f"f64/{form}/step{number}"),
        )
    return found


def forms(path: Path) -> list[str]:
    """Forms of the second update that a file holds."""
    with np.load(path) as arrays:
        return [form for form in FORMS if f"f64/{form}/step1/ce" in arrays.files]


def merge(found: dict[str, Comparison], more: dict[str, Comparison]) -> None:
    """Add comparisons to those made before."""
    for quantity, comparison in more.items():
        entry = found.setdefault(quantity, Comparison())
        entry.count += comparison.count
        entry.largest = max(entry.largest, comparison.largest)


def replay_step(
    folder: Path,
    golden: dict[str, np.ndarray],
    model: SegmentationModel,
    number: int,
    method: MDIL,
    at: str,
    batches: int | None = None,
) -> dict[str, Comparison]:
    """Train one step again and compare it.

    Args:
        folder: of the files.
        golden: arrays of the file.
        model: as it was after the step before; changed in place.
        number: of the step, from 1 as in the files.
        at: prefix of the file's arrays.
        batches: stop after so many; what comes after the training is not compared then.
    """
    replay = _Replay(golden, model, domain_step(folder, number), method, at)
    replay.train(json.loads((folder / "mdil_transfer.json").read_text()), batches)
    return replay.found


class _Replay:
    """One step, trained and compared."""

    def __init__(
        self, golden: dict[str, np.ndarray], model: SegmentationModel, step: Step, method: MDIL, at: str
    ) -> None:
        self.golden, self.model, self.step, self.method, self.at = golden, model, step, method, at
        self.number = step.index + 1
        self.found: dict[str, Comparison] = {}

    def stored(self, name: str) -> np.ndarray:
        return self.golden[f"{self.at}/{name}"]

    def compare(self, quantity: str, ours: Any, theirs: Any, scale: Any = None) -> None:
        more = Comparison(np.size(theirs), difference(ours, theirs, scale))
        merge(self.found, {quantity: more})

    def train(self, transfer: dict[str, Any], first: int | None) -> None:
        model, method, step = self.model, self.method, self.step
        model.zero_grad()  # the original starts a process per step, everseg reads the step before from disk
        teacher = frozen_copy(model) if step.index else None
        before = {} if teacher is None else original_state(copy.deepcopy(teacher))
        method.prepare_model(model, step)
        self._set_constructor_values(transfer)
        if f"{self.at}/init_sum_norm" in self.golden:
            self._compare_sums("initial weights, sums and norms", "init_sum_norm")
        groups = method.param_groups(model, step)
        check_param_groups(model, groups)
        optimizer = make_optimizer(groups, RATES, lr=RATES.lr)
        ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
        watch = Watch(model, teacher, optimizer, self.golden[f"step{self.number}/param_names"].tolist())
        switches.begin(method, ctx)
        model.train()
        batches = self._batches(step.branch, "train", self.stored("order"))
        epoch = len(batches) // int(self.golden["epochs"])
        rows: list[list[float]] = []
        for i, batch in enumerate(batches[:first]):
            set_learning_rate(optimizer, learning_rate(RATES, RATES.lr, i, len(batches), epoch))
            logged = train_batch(method, batch, ctx, optimizer)
            self._compare_losses(i, logged, watch)
            if (i + 1) % epoch == 0 and len(rows) < len(self.stored("evals")):
                rows += self._validate()
        watch.remove()
        self._compare_trajectory(watch, slice(None if first is None else len(watch.rates)))
        if first is not None:
            return
        switches.finish(method, ctx)
        self._compare_validation(np.array(rows))
        self._compare_final(optimizer)
        if teacher is not None:
            self._compare_teacher(teacher, before)

    def _set_constructor_values(self, transfer: dict[str, Any]) -> None:
        """Give what is not copied from the domain before the values that the original's constructor gave it."""
        own = original_state(self.model)
        fresh = list(own) if self.number == 1 else transfer[f"step{self.number}"]["init_keys"]
        seed, gain = int(self.golden["seeds"][self.number - 1]), float(self.golden["gain"])
        for key in fresh:
            value = generated_weight(key.removeprefix("module."), tuple(own[key].shape), seed, gain)
            own[key].copy_(torch.from_numpy(value))

    def _batches(self, domain: str, split: str, order: np.ndarray) -> list[Batch]:
        """Images in [0, 1) and labels of one domain, void ignored, in batches."""
        at, size = f"data/{domain}/{split}", int(self.golden["batch"])
        if f"{at}/images_u16" in self.golden:
            images = self.golden[f"{at}/images_u16"] / 256
        else:
            seed, *shape = self.golden[f"{at}/image_seed_shape"].tolist()
            images = (generated_image(tuple(shape), seed) + 2) / 4
        labels = self.golden[f"{at}/labels"].astype(np.int64)
        labels[labels == self.model.head(domain).num_classes - 1] = IGNORED
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        return [
            Batch(torch.from_numpy(images[c]).double(), torch.from_numpy(labels[c]), domain) for c in chunks
        ]

    @torch.no_grad()
    def _compare_losses(self, i: int, logged: dict[str, Tensor], watch: Watch) -> None:
        """The terms as logged, and both forms of the divergence of each old domain, the newest first."""
        self.compare("ce", logged["ce"], self.stored("ce")[i])
        student, teacher = watch.take()
        old = self.step.old_branches[::-1]
        if not old:
            return
        rows = slice(i * len(old), (i + 1) * len(old))
        self.compare("kd, as logged", logged["kd"] / self.method.kd_weight, self.stored("kld")[rows].sum())
        for name, form in KL.items():
            ours = [kl_divergence(student[b].logits, teacher[b].logits, form=form) for b in old]
            self.compare(f"{name} per domain", ours, self.stored(name)[rows])

    def _compare_trajectory(self, watch: Watch, updates: slice) -> None:
        """Learning rates, gradients and weights at every update."""
        self.compare("learning rate", watch.rates, self.stored("lr")[updates])
        self.compare("weight norms", watch.weights, self.stored("param_norm")[updates])
        ours, theirs = np.array(watch.gradients), self.stored("grad_norm_sum")[updates]
        absent = theirs[..., 0] == -1
        self.compare("which weights have no gradient", ours[..., 0] == -1, absent, 1.0)
        norm = np.where(absent, 0.0, theirs[..., 0])
        whole = np.linalg.norm(norm, axis=1, keepdims=True) + np.zeros_like(norm)
        root = np.sqrt(watch.sizes) + np.zeros_like(norm)  # |sum| <= norm * sqrt(size)
        seen = norm > VANISHING * whole
        for column, (name, bound) in enumerate(
            (("gradient norms", np.ones_like(norm)), ("gradient sums", root))
        ):
            a, b = ours[..., column], theirs[..., column]
            self.compare(name, a[seen], b[seen], (bound * norm)[seen])
            self.compare(f"{name}, of the total", a[~absent], b[~absent], (bound * whole)[~absent])

    @torch.no_grad()
    def _validate(self) -> list[list[float]]:
        """Loss and mean IoU of every domain on its validation images."""
        self.model.eval()
        rows = []
        for number in VALIDATED[self.number]:
            domain = DOMAINS[number]
            matrix, losses = ConfusionMatrix(self.model.head(domain).num_classes), []
            weight = torch.tensor(self.step.class_weights[domain], dtype=torch.float64)
            size = len(self.golden[f"data/{domain}/val/labels"])
            for batch in self._batches(domain, "val", np.arange(size)):
                logits = self.model(batch.image, (domain,))[domain].logits
                losses.append(float(cross_entropy(logits, batch.label, weight=weight, over="valid")))
                matrix.update(logits.argmax(1), batch.label)
            void = matrix.num_classes - 1
            rows.append([float(np.mean(losses)), iou_eval(matrix.counts, void)["miou"]])
        self.model.train()
        return rows

    def _compare_validation(self, rows: np.ndarray) -> None:
        theirs = self.stored("evals")
        self.compare("validation loss", rows[:, 0], theirs[:, 0])
        self.compare("validation loss", rows[:, 0], self.stored("val_ce"))
        self.compare("validation mIoU", rows[:, 1], theirs[:, 1])

    def _compare_final(self, optimizer: torch.optim.Optimizer) -> None:
        self._compare_sums("final weights, sums and norms", "final_sum_norm")
        state, names = original_state(self.model), original_names(self.model)
        for name, theirs in self._below("final"):
            self.compare(STORED_SINGLE, state[name], theirs, np.abs(theirs).max())
        own = {names[name]: weight for name, weight in self.model.named_parameters()}
        steps = [
            optimizer.state[own[n]]["step"] for n in self.golden[f"step{self.number}/adam_names"].tolist()
        ]
        self.compare("Adam's step counts", steps, self.stored("adam_steps"))

    def _compare_sums(self, quantity: str, stored: str) -> None:
        """Sum and norm of every tensor, relative to norm * sqrt(size) and to the norm."""
        state, names, theirs = (
            original_state(self.model),
            self.stored("final_keys").tolist(),
            self.stored(stored),
        )
        if set(names) != set(state):
            raise ValueError(f"{self.at}: the model's tensors have other names than the file's")
        ours = [[float(state[n].double().sum()), float(state[n].double().norm())] for n in names]
        roots = np.sqrt([[state[n].numel(), 1] for n in names])
        self.compare(quantity, ours, theirs, roots * theirs[:, 1:])

    def _below(self, part: str) -> list[tuple[str, np.ndarray]]:
        """Stored tensors under a prefix: (original name, values)."""
        prefix = f"{self.at}/{part}/"
        return [(key.removeprefix(prefix), v) for key, v in self.golden.items() if key.startswith(prefix)]

    def _compare_teacher(self, teacher: SegmentationModel, before: dict[str, Tensor]) -> None:
        """Mode of the teacher at the end, and which of its buffers the training moved."""
        self.compare("teacher's mode", teacher.training, self.stored("old_model_training_flag_at_end"), 1.0)
        after = original_state(teacher)
        ours = [not torch.equal(value, before[name]) for name, value in after.items()]
        changed = set(self.stored("old_model_changed_keys").tolist())
        self.compare("which tensors of the teacher moved", ours, [name in changed for name in after], 1.0)
        for name, theirs in self._below("old_final"):
            self.compare("teacher's statistics", after[name], theirs, np.abs(theirs).max())
