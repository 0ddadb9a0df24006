"""What each method costs: `python -m benchmarks.methods [--methods A ...] [--json FILE]`.

One iteration of a later step (DeepLabV3 on ResNet-101, output stride 16, 16 old classes and 5 new) of each method,
taken in turn with one of fine-tuning; the bytes that its forward pass keeps for the backward pass, and those of the
state that it carries into the next step. `rcil` runs on the network with its new convolutions. What a method does
once per step (thresholds, prototypes, pre-tuning, fusion) is not in the iteration.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.common import Figure, in_turn, main, medians, ratio
from benchmarks.step import NEW, OLD, TRAIN, Iteration, ours, steps_of
from everseg import registry
from everseg.engine.optim import make_optimizer
from everseg.engine.step import train_batch
from everseg.labels import IGNORED
from everseg.methods import switches
from everseg.methods.base import StepContext
from everseg.models.build import deeplabv3_resnet101
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.scenarios.steps import Step
from everseg.types import Batch

BASE = "ft"
ELSEWHERE = ("mdil", "mdil+mib", "sats", "mbs", "microseg", "acil")
"""Methods that an iteration of new classes on a convolutional network does not show: over domains, on transformers,
over given regions, or without iterations."""
RATE = 1e-9
"""Learning rate: hundreds of iterations on one random batch must not diverge, and cost what any other rate costs."""
OPTIONS = {"ssul": {"unknown": "all"}}
"""Method -> hyper-parameters without which it needs more than images and labels."""


def figures(quick: bool = False, *, methods: list[str] | None = None, size: int = 256) -> list[Figure]:
    """Time as a multiple of fine-tuning's, memory of the forward pass, and state, of every method."""
    size, repeat = (64, 1) if quick else (size, 5)
    names = methods or [name for name in registry.names("method") if name not in ELSEWHERE]
    torch.manual_seed(0)
    label = torch.randint(OLD, OLD + NEW, (2, size, size))
    label[:, : size // 2] = 0  # half of the pixels show what earlier steps taught
    label[:, -8:] = IGNORED
    batch = Batch(torch.randn(2, 3, size, size), label, "default", ("a", "b"))
    found, what = [], f"{size} px, 2 images, {torch.get_num_threads()} threads"
    base, base_bytes, _ = _iteration(BASE, batch)
    for name in names:
        own, kept, state = (base, base_bytes, 0) if name == BASE else _iteration(name, batch)
        seconds = in_turn({BASE: base, "own": own}, repeat)
        note = (
            f"{medians(seconds, 1e3, 0)}; kept {kept / base_bytes:.2f} x {BASE}'s; state {state / 1e6:.1f} MB"
        )
        found.append(Figure("methods", f"{name}, {what}", ratio(seconds, "own", BASE), "x", note=note))
        del own
        gc.collect()
    return found


def _iteration(name: str, batch: Batch) -> tuple[Iteration, int, int]:
    """An iteration of a method, the bytes that its forward pass keeps, and the bytes of the method's state."""
    cls = registry.resolve("method", name)
    method = cls(**OPTIONS.get(name, {}))
    options = {"compensation": True, "norm": "iabn"} if name == "rcil" else {}
    torch.manual_seed(0)
    first, step = steps_of([{"default": OLD}, {"default": NEW}])
    model = deeplabv3_resnet101(**options)
    method.prepare_model(model, first)
    # What a method gathers in the first step, such as prototypes, the later one needs.
    learnt = Batch(batch.image, batch.label.masked_fill(batch.label >= OLD, 1), batch.branch, batch.ids)
    ctx = _context(first, model, None, learnt)
    switches.begin(method, ctx)
    train_batch(method, learnt, ctx, make_optimizer(method.param_groups(model, first), TRAIN, lr=RATE))
    switches.finish(method, ctx)
    model.zero_grad(set_to_none=True)
    teacher = frozen_copy(model)
    method.prepare_model(model, step)
    ctx = _context(step, model, teacher, batch)
    switches.begin(method, ctx)
    model.train()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = next(iter(method.losses(batch, ctx)))
    forward = sum(size for at, size in kept.items() if at not in weights)
    del terms
    state = sum(value.nbytes for value in method.state_dict().values())
    return ours(method, model, teacher, step, batch, "fp32", RATE), forward, state


def _context(
    step: Step, model: SegmentationModel, teacher: SegmentationModel | None, batch: Batch
) -> StepContext:
    def batches() -> Iterator[Batch]:
        return iter((batch,))

    return StepContext(step, model, model, teacher, train_batches=batches, epoch_batches=batches)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--size", type=int, default=256, help="side of the images (default 256)")
    main(figures, parser)
