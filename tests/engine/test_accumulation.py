"""A batch cut into parts gives the gradients and updates of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from plain_model import build
from torch import Tensor

from everseg.config.fields import TrainConfig
from everseg.engine.optim import make_optimizer
from everseg.engine.step import train_batch
from everseg.errors import ConfigError
from everseg.labels import LabelSpace
from everseg.methods.base import Method, StepContext
from everseg.methods.ewc import EWC
from everseg.methods.ft import FineTuning
from everseg.methods.mdil import MDIL
from everseg.methods.mib import MiB
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.scenarios.steps import Source, Step
from everseg.types import Batch

SPACE = {
    "a": LabelSpace(((0, 1, 2),), ("a0", "a1", "a2")),
    "b": LabelSpace(((0, 1),), ("b0", "b1")),
    "c": LabelSpace(((0, 1),), ("c0", "c1")),
}
GROWN = LabelSpace(((0, 1, 2), (3, 4)), ("a0", "a1", "a2", "a3", "a4"))


def make_step(index: int, grows: dict[str, int], **spaces: LabelSpace) -> Step:
    source = Source(next(iter(grows)), "toy", "train", (), bytes(range(256)))
    return Step(index, (source,), (), spaces, grows)


FIRST = make_step(0, {"a": 3}, a=SPACE["a"])
SECOND = make_step(1, {"a": 2}, a=GROWN)
DOMAINS = (
    FIRST,
    make_step(1, {"b": 2}, a=SPACE["a"], b=SPACE["b"]),
    make_step(2, {"c": 2}, **SPACE),
)


def batch(step: Step, size: int, seed: int = 0) -> Batch:
    """Every image has another share of ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    branch = step.train[0].branch
    old = step.num_old(branch)
    image = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    label = torch.randint(old, step.spaces[branch].num_classes, (size, 16, 16), generator=generator)
    for number in range(size):
        label[number, : 1 + 2 * number] = 255
    return Batch(image, label, branch, tuple(f"i{number}" for number in range(size)))


@dataclass
class Trained:
    model: SegmentationModel
    method: Method
    logged: list[dict[str, Tensor]] = field(default_factory=list)
    calls: int = 0


def trained(make, steps, parts: int, size: int, *, dtype: torch.dtype = torch.float64) -> Trained:
    """Two batches of every step, without batch norm, each cut into so many parts."""
    torch.manual_seed(4)
    model = build()
    made = Trained(model, make())
    for step in steps:
        torch.manual_seed(10 + step.index)
        teacher = frozen_copy(model).to(dtype) if step.index else None
        made.method.prepare_model(model, step)
        model.to(dtype)
        train = TrainConfig(lr=0.1, weight_decay=0.01)
        optimizer = make_optimizer(made.method.param_groups(model, step), train, lr=0.1)
        ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
        made.method.begin_step(ctx)
        for seed in range(2):
            given = batch(step, size, seed)
            made.logged.append(train_batch(made.method, given, ctx, optimizer, parts=parts))
        made.method.end_step(ctx)
    return made


CASES = {
    "ft": (FineTuning, (FIRST,)),
    "mib": (MiB, (FIRST, SECOND)),
    "ewc": (lambda: EWC(weight=50.0), (FIRST, SECOND)),
    "mdil-two": (lambda: MDIL(updates="two", kd_weight=1.0), DOMAINS),
}


@pytest.mark.parametrize("parts", [2, 3, 6, 9])
@pytest.mark.parametrize("name", CASES)
def test_parts_give_the_weights_state_and_terms_of_the_whole_batch(name, parts):
    """Also parts of unequal size, more parts than images, and several updates per batch."""
    make, steps = CASES[name]
    size = 5 if parts == 3 else 6
    whole, cut = (trained(make, steps, each, size) for each in (1, parts))
    for (key, one), other in zip(
        whole.model.state_dict().items(), cut.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12, msg=key)
    for key, one in whole.method.state_dict().items():
        torch.testing.assert_close(cut.method.state_dict()[key], one, rtol=1e-8, atol=1e-12, msg=key)
    for one, other in zip(whole.logged, cut.logged, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=1e-9, atol=1e-12)


def test_parts_give_what_torch_alone_makes_of_the_large_batch():
    """The oracle uses nothing of everseg's but the network."""
    cut = trained(FineTuning, (FIRST,), 3, 6)
    torch.manual_seed(4)
    model = build()
    torch.manual_seed(10)
    model.grow({"a": 3})
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for seed in range(2):
        given = batch(FIRST, 6, seed)
        logits = F.interpolate(
            model(given.image)["a"].logits, size=(16, 16), mode="bilinear", align_corners=False
        )
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, given.label, ignore_index=255, reduction="sum") / given.label.numel()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(cut.logged[seed]["ce"], loss.detach(), rtol=1e-10, atol=0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(cut.model.state_dict()[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_a_mean_over_valid_pixels_becomes_the_mean_of_the_parts_means():
    """With class weights the divisor belongs to each part, as it belongs to each process."""
    step = Step(0, FIRST.train, (), FIRST.spaces, {"a": 3}, class_weights={"a": (1.0, 2.0, 3.0)})
    cut = trained(FineTuning, (step,), 2, 6)
    torch.manual_seed(4)
    model = build()
    torch.manual_seed(10)
    model.grow({"a": 3})
    given = batch(step, 6)
    logits = F.interpolate(model.double()(given.image)["a"].logits, size=(16, 16), mode="bilinear")
    weight = torch.tensor((1.0, 2.0, 3.0), dtype=torch.float64)
    parts = [
        F.cross_entropy(logits[part], given.label[part], weight, ignore_index=255)
        for part in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(cut.logged[0]["ce"], (parts[0] + parts[1]) / 2, rtol=1e-10, atol=0)
    assert not torch.isclose(
        cut.logged[0]["ce"], F.cross_entropy(logits, given.label, weight, ignore_index=255)
    )


def test_after_backward_check_and_clip_come_once_per_update_with_the_gradient_of_the_whole():
    seen = []

    class Reader(FineTuning):
        def after_backward(self, ctx):
            seen.append(("after", len(ctx.module.decoder.layer.bias.grad)))
            return {}

    torch.manual_seed(0)
    model, method = build(), Reader()
    method.prepare_model(model, FIRST)
    model.double()
    optimizer = make_optimizer(method.param_groups(model, FIRST), TrainConfig(), lr=0.1)
    ctx = StepContext(step=FIRST, model=model, module=model, teacher=None)
    entered = []

    class Alone:
        def __enter__(self):
            entered.append(len(seen))

        def __exit__(self, *_):
            pass

    train_batch(
        method,
        batch(FIRST, 4),
        ctx,
        optimizer,
        check=lambda terms: seen.append(("check", tuple(terms))),
        parts=4,
        alone=Alone,
        clip=lambda: seen.append(("clip", None)),
    )
    assert [what for what, _ in seen] == ["check", "after", "check", "clip"]
    # The last part's gradients are exchanged between processes. The fourth time the method is asked for more updates.
    assert entered == [0, 0, 0, 4]


def test_methods_that_yield_unequally_often_are_refused():
    class Odd(FineTuning):
        def losses(self, batch, ctx):
            for _ in range(1 if "i0" in batch.ids else 2):
                yield {"ce": ctx.student(batch).logits.square().mean()}

    with pytest.raises(ConfigError, match=r"as often.*train\.accumulate=1"):
        trained(Odd, (FIRST,), 2, 4)


@dataclass
class Rich(Batch):
    score: Tensor | None = None
    names: ClassVar[tuple[str, ...]] = ("x",)


def test_everything_of_an_image_is_cut_with_it():
    given = Rich(
        torch.arange(5.0).view(5, 1, 1, 1), torch.arange(5).view(5, 1, 1), "a", tuple("vwxyz"),
        extra={"depth": torch.arange(5)}, memory=torch.arange(5) > 2, score=torch.arange(5.0),
    )  # fmt: skip
    parts = given.split(2)
    assert [part.ids for part in parts] == [("v", "w"), ("x", "y", "z")]
    assert [part.extra["depth"].tolist() for part in parts] == [[0, 1], [2, 3, 4]]
    assert [part.memory.tolist() for part in parts] == [[False, False], [False, True, True]]
    assert [part.score.tolist() for part in parts] == [[0, 1], [2, 3, 4]]
    assert [part.image.flatten().tolist() for part in parts] == [[0, 1], [2, 3, 4]]
    assert all(type(part) is Rich and part.branch == "a" for part in parts)
    assert [len(part.image) for part in given.split(9)] == [1] * 5
    # as processes share a batch
    assert [
        part.ids for part in Batch(torch.zeros(7, 1), torch.zeros(7), "a", tuple("abcdefg")).split(3)
    ] == [tuple("abcdefg"[rank * 7 // 3 : (rank + 1) * 7 // 3]) for rank in range(3)]
