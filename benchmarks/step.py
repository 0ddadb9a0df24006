"""A whole training step: `python -m benchmarks.step [--size N] [--batch N] [--device cuda] [--json FILE]`.

MiB (DeepLabV3 on ResNet-101, output stride 16, 16 old classes and 5 new; student, teacher, losses, backward, SGD), the
same with a frozen encoder, and MDIL (ERFNet, two old domains), each in two ways: "straightforward" is what the papers'
code does in eager float32 (logits at full size, log-softmax forms, one forward per branch, plain optimiser), "everseg"
is `train_batch` with everything the engine sets up around it. Both start from the same weights and see the same batch.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Figure, in_turn, main, medians, ratio
from benchmarks.losses import direct
from everseg.config.fields import TrainConfig
from everseg.engine.finite import Guard
from everseg.engine.optim import make_optimizer
from everseg.engine.step import train_batch
from everseg.labels import LabelSpace
from everseg.methods.base import Method, StepContext
from everseg.methods.mdil import MDIL
from everseg.methods.mib import MiB
from everseg.models.build import deeplabv3_resnet101
from everseg.models.erfnet import erfnet
from everseg.models.folding import folded_copy
from everseg.models.model import SegmentationModel, channels_last, frozen_copy
from everseg.scenarios.steps import Source, Step
from everseg.types import Batch

TRAIN = TrainConfig(lr=1e-3)
OLD, NEW, STREET = 16, 5, 19
Iteration = Callable[[], dict[str, Tensor]]


def steps_of(sizes: list[dict[str, int]]) -> list[Step]:
    """Steps in which branches grow by so many classes; the last branch named is trained."""
    found, total = [], dict[str, tuple[int, ...]]()
    for index, grows in enumerate(sizes):
        for branch, number in grows.items():
            total[branch] = (*total.get(branch, ()), number)
        spaces = {}
        for branch, groups in total.items():
            ids = iter(range(sum(groups)))
            spaces[branch] = LabelSpace(
                tuple(tuple(next(ids) for _ in range(n)) for n in groups),
                tuple(f"class {i}" for i in range(sum(groups))),
                0 if branch == "default" else None,
            )
        branch = [*grows][-1]
        source = Source(branch, branch, "train", (0,), bytes(256))
        found.append(Step(index, (source,), (), spaces, grows))
    return found


def begin(
    method: Method, model: SegmentationModel, steps: list[Step], device: torch.device
) -> tuple[SegmentationModel, SegmentationModel]:
    """Grow a model through all steps, as the engine does; student and teacher of the last one."""
    for step in steps:
        teacher = frozen_copy(model) if step.index else None
        method.prepare_model(model, step)
    assert teacher is not None
    return model.to(device).train(), teacher.to(device)


def ours(
    method: Method,
    model: SegmentationModel,
    teacher: SegmentationModel,
    step: Step,
    batch: Batch,
    precision: str,
    lr: float = TRAIN.lr,
) -> Iteration:
    """An iteration as the engine runs it."""
    half = precision == "bf16"
    if half:
        channels_last(model)
    optimizer = make_optimizer(method.param_groups(model, step), TRAIN, lr=lr)
    device = batch.image.device
    ctx = StepContext(
        step,
        model,
        model,
        teacher,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=half),
        folded_teacher=channels_last(folded_copy(teacher)),
    )
    here: Any = SimpleNamespace(device=device, num_processes=1)
    guard = Guard(model, optimizer, here, scaled=False, where="", remedy="", end=lambda: None)

    def run() -> dict[str, Tensor]:
        fresh = Batch(batch.image, batch.label, batch.branch)  # the encoder's maps are kept by batch
        return train_batch(method, fresh, ctx, optimizer, check=guard.watch(0, ()))

    return run


def straightforward_mib(
    method: Method, model: SegmentationModel, teacher: SegmentationModel, step: Step, batch: Batch
) -> Iteration:
    """MiB's iteration as its formulas and its trainer stand."""
    optimizer = _plain_optimizer(method, model, step)

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            old = teacher(batch.image)["default"].logits
        loss = direct(model(batch.image)["default"].logits, batch.label, old)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return run


def straightforward_mdil(
    method: Method, model: SegmentationModel, teacher: SegmentationModel, step: Step, batch: Batch
) -> Iteration:
    """MDIL's iteration: one forward per domain of student and teacher, divergence from softmaxes."""
    optimizer = _plain_optimizer(method, model, step)

    def run() -> dict[str, Tensor]:
        size = batch.label.shape[1:]
        total = F.cross_entropy(_full(model(batch.image, (batch.branch,)), batch.branch, size), batch.label)
        for branch in step.old_branches:
            with torch.no_grad():
                target = _full(teacher(batch.image, (branch,)), branch, size).log_softmax(dim=1)
            log_prob = _full(model(batch.image, (branch,)), branch, size).log_softmax(dim=1)
            total = total + 0.1 * F.kl_div(log_prob, target, reduction="none", log_target=True).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return {"loss": total.detach()}

    return run


def _full(outputs: dict[str, Any], branch: str, size: torch.Size) -> Tensor:
    return F.interpolate(outputs[branch].logits, size, mode="bilinear", align_corners=False)


def _plain_optimizer(method: Method, model: SegmentationModel, step: Step) -> torch.optim.Optimizer:
    groups = [
        {"params": group["params"], "lr": TRAIN.lr * group["lr_scale"]}
        for group in method.param_groups(model, step)
    ]
    return torch.optim.SGD(groups, lr=TRAIN.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """Floating-point operations per second of a matrix product."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)

    def run() -> None:
        torch.mm(a, b)
        _wait(device)

    return 2 * side**3 / min(in_turn({"mm": run}, 5)["mm"])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    what: str,
    ways: dict[str, Iteration],
    device: torch.device,
    repeat: int,
    rate: float,
    target: float | None,
) -> list[Figure]:
    """Images per second against the straightforward way, the share of the matrix rate, and the losses' agreement."""
    curves: dict[str, list[float]] = {name: [] for name in ways}

    def timed(name: str) -> Callable[[], None]:
        def run() -> None:
            terms = ways[name]()
            _wait(device)
            curves[name].append(float(torch.stack([*terms.values()]).sum()))

        return run

    with FlopCounterMode(display=False) as counter:
        timed("straightforward")()
    timed("everseg")()
    seconds = in_turn({name: timed(name) for name in ways}, repeat, warm=0)
    apart = [abs(a / b - 1) for a, b in zip(*curves.values(), strict=True)]
    achieved = counter.get_total_flops() / statistics.median(seconds["everseg"])
    note = medians(seconds, scale=1, digits=2, unit="s")
    return [
        Figure("step", f"{what}: images/s over straightforward eager float32", ratio(seconds, *ways), "x", target,
               note=note),
        Figure("step", f"{what}: the straightforward step's work per second of ours, of the matrix rate",
               100 * achieved / rate, "%", note=f"{achieved / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s"),
        Figure("step", f"{what}: largest relative difference of the loss over {len(apart)} updates", max(apart), "",
               note=f"of the first {apart[0]:.1e}"),
    ]  # fmt: skip


def figures(
    quick: bool = False, *, size: int = 512, batch: int = 2, device: str = "cpu", precision: str = "fp32"
) -> list[Figure]:
    """All figures; `quick` is for trying the benchmark itself."""
    size, repeat = (64, 1) if quick else (size, 2)
    where = torch.device(device)
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    rate = matrix_rate(
        where, torch.bfloat16 if precision == "bf16" else torch.float32, 512 if quick else 2048
    )
    found = []
    for frozen in (False, True):
        torch.manual_seed(0)
        method, (first, second) = MiB(freeze_encoder=frozen), steps_of([{"default": OLD}, {"default": NEW}])
        model, teacher = begin(method, deeplabv3_resnet101(), [first, second], where)
        label = torch.randint(OLD - 1, OLD + NEW, (batch, size, size), device=where)
        label[label < OLD] = 0
        given = Batch(torch.randn(batch, 3, size, size, device=where), label, "default")
        ways = {
            "straightforward": straightforward_mib(method, copy.deepcopy(model), teacher, second, given),
            "everseg": ours(method, model, teacher, second, given, precision),
        }
        name = f"MiB{', frozen encoder' if frozen else ''}, batch {batch} at {size}x{size}, {threads}, {precision}"
        found += measure(name, ways, where, repeat, rate, 2)
    torch.manual_seed(0)
    steps = steps_of([{name: STREET} for name in ("a", "b", "c")])
    mdil = MDIL()
    model, teacher = begin(mdil, erfnet(dropout=(0, 0)), steps, where)
    shape = (batch, size, 2 * size)
    image, label = (
        torch.rand(shape[0], 3, *shape[1:], device=where),
        torch.randint(0, STREET, shape, device=where),
    )
    given = Batch(image, label, "c")
    ways = {
        "straightforward": straightforward_mdil(mdil, copy.deepcopy(model), teacher, steps[-1], given),
        "everseg": ours(mdil, model, teacher, steps[-1], given, precision),
    }
    name = f"MDIL, 2 old domains, batch {batch} at {size}x{2 * size}, {threads}, {precision}"
    return found + measure(name, ways, where, repeat, rate, 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    main(figures, parser)
