"""STAR: what it keeps of every class, what a step plans and draws, its loss by hand, restarts and processes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from everseg.errors import ConfigError
from everseg.losses.classification import binary_cross_entropy
from everseg.methods import switches
from everseg.methods.star import STAR
from everseg.types import Batch
from saying import must_say


@pytest.fixture
def large(toy):
    """The toy with maps of 4 x 4."""
    toy.side = 64
    return toy


def middle(label: torch.Tensor) -> torch.Tensor:
    """The label in the middle of each cell of 16 x 16 pixels."""
    return label[:, 8::16, 8::16]


def three(toy):
    return [*toy.steps, toy.step(2, {"a": (3, 2, 1)}, {"a": 1}, "a")]


def cells(model, batches) -> dict[int, np.ndarray]:
    """Class -> features of its cells, by the model in eval mode."""
    found: dict[int, list[np.ndarray]] = {}
    model.eval()
    with torch.no_grad():
        for batch in batches:
            features = model(batch.image, ("a",))["a"].features["decoder"].double()
            label = middle(batch.label)
            for b, i, j in np.ndindex(*label.shape):
                found.setdefault(int(label[b, i, j]), []).append(features[b, :, i, j].numpy())
    return {c: np.array(rows) for c, rows in found.items()}


@pytest.mark.parametrize("noise", ["fixed", "authors"])
def test_the_statistics_of_every_class_by_hand(large, noise):
    """Over three steps; in the authors' form the noise of later classes is around the prototypes of the first ones."""
    method, model, expected = STAR(noise=noise), large.model(), {}
    for step in three(large):
        run = large.train(method, model, step)
        assert method.old.plan is None
        for c, rows in cells(model, large.batches(step)).items():
            if c not in (0, 255) and c not in expected:
                norms = np.linalg.norm(rows, axis=1)
                directions = rows / np.maximum(norms, 1e-12)[:, None]
                centre = directions.sum(axis=0)
                expected[c] = (centre / np.linalg.norm(centre), directions, norms)
        model.train(run.model.training)
    kept = method.old.kept
    assert sorted(expected) == [1, 2, 3, 4, 5]
    around = {c: c for c in expected} if noise == "fixed" else {1: 1, 2: 2, 3: 1, 4: 2, 5: 1}
    for c, (centre, directions, norms) in expected.items():
        assert_close(kept.prototypes[c - 1].numpy(), centre)
        assert kept.mean[c - 1].item() == pytest.approx(norms.mean())
        assert kept.deviation[c - 1].item() == pytest.approx(norms.std(ddof=1) if len(norms) > 1 else 0.0)
        gaps = directions - expected[around[c]][0]
        assert_close(kept.noise[c - 1].numpy(), np.sqrt((gaps**2).mean(axis=0)), rtol=1e-6, atol=1e-9)
        assert kept.number[c] == len(norms)
    assert kept.prototypes.dtype == torch.float64


def begun(toy, *, sees: float = 0.0, protocol: str = "overlapped", number=(40.0, 30.0, 20.0), **options):
    """The second step, begun, with made-up numbers of cells of the first one.

    Args:
        sees: added to the teacher's logits of old classes, of which else half of all cells show one.
    """
    method, model = STAR(**options), toy.model()
    toy.train(method, model, toy.steps[0])
    method.old.kept = dataclasses.replace(method.old.kept, number=torch.tensor(number, dtype=torch.float64))
    run = toy.begin(method, model, dataclasses.replace(toy.steps[1], protocol=protocol), begin=False)
    with torch.no_grad():
        best = [run.teacher(b.image, ("a",))["a"].logits[:, 1:].amax(dim=1) for b in toy.batches(run.step)]
        run.teacher.head("a").classifiers[0].bias += method.old_logit + sees - torch.cat(best).median()
    switches.begin(method, run.ctx)
    return run


@pytest.mark.parametrize("protocol", ["overlapped", "disjoint"])
@pytest.mark.parametrize("sees", [-100.0, 0.0, 100.0])
def test_the_plan_of_a_step_by_hand(large, protocol, sees):
    """Three batches of two images of 4 x 4 cells; the old numbers of cells are 40 (background), 30 and 20."""
    run = begun(large, sees=sees, protocol=protocol, old_logit=0.1)
    seen = [0, 0, 0]
    with torch.no_grad():
        for batch in large.batches(run.step):
            logits = run.teacher(batch.image, ("a",))["a"].logits
            wide = nn.functional.interpolate(logits, (64, 64), mode="bilinear")
            best = torch.where(wide[:, 1:].amax(dim=1) >= 0.1, wide[:, 1:].argmax(dim=1) + 1, 0)
            for label, c in zip(middle(batch.label).flatten(), middle(best).flatten(), strict=True):
                if label == 0:
                    seen[c] += 1
    plan = run.method.old.plan
    overlaps = protocol == "overlapped"
    assert plan.drawn == tuple(
        int(max(n - overlaps * s, 0) / 3) for n, s in zip((30, 20), seen[1:], strict=True)
    )
    assert plan.cells == 32
    assert plan.open == seen[0]
    ratio = 40 * (1 - 0.02) / seen[0] - 0.5 * overlaps if seen[0] else 0.0
    assert plan.background == pytest.approx(max(ratio, 0.0))
    assert (seen[0] == 0) == (sees == 100.0)


def test_new_classes_take_their_share_of_the_old_background(large):
    factors = [
        begun(large, sees=-100.0, background_decay=decay).method.old.plan.background for decay in (0.0, 0.2)
    ]
    assert factors[1] == pytest.approx((factors[0] + 0.5) * (1 - 2 * 0.2) - 0.5)


def test_the_number_of_the_background_goes_on_from_what_a_step_has_seen(large):
    run = begun(large, sees=-100.0)
    plan = run.method.old.plan
    run.take(*large.batches(run.step))
    run.method.end_step(run.ctx)
    number = run.method.old.kept.number
    assert number[0].item() == pytest.approx(plan.open * (1 + plan.background))
    assert number[1:3].tolist() == [30, 20]
    assert len(number) == 5


def test_the_loss_of_a_later_step_by_hand(large):
    run = begun(large, old_logit=0.2, number=(200.0, 300.0, 200.0))
    method, model = run.method, run.model
    drawn = torch.randn(1, 6, 9, 1, generator=torch.Generator().manual_seed(3)).abs()
    method.old.draw = lambda like: drawn.to(like)
    batch = large.batches(run.step, 1)[0]
    model.train()
    with torch.no_grad():
        student, teacher = (m(batch.image, ("a",))["a"] for m in (model, run.teacher))
        wide = nn.functional.interpolate(teacher.logits, (64, 64), mode="bilinear")
        best = torch.where(wide[:, 1:].amax(dim=1) >= 0.2, wide[:, 1:].argmax(dim=1) + 1, 0)
        old = torch.where(batch.label == 0, best, 0)
        plan = method.old.plan
        open_cells = middle((batch.label == 0) & (best == 0))
        assert open_cells.any()
        assert old.any()
        w_f = sum(plan.drawn) / 32
        w_b = plan.background * float(open_cells.sum()) / 32
        assert w_f > 0
        assert w_b > 0
        share = 1 / (1 + w_f + w_b)
        logits = nn.functional.interpolate(student.logits, (64, 64), mode="bilinear")
        fakes = model.head("a").classifiers[1](drawn)
        low = nn.functional.softplus(student.logits[:, 3:]).sum(dim=1)
        mask = nn.functional.interpolate((old > 0)[:, None].float(), (4, 4), mode="bilinear")
        f, g = (out.features["decoder"] for out in (student, teacher))
        directions = nn.functional.normalize(f, dim=1)
        inverse = []
        for c in (3, 4):
            at = nn.functional.interpolate((batch.label == c)[:, None].float(), (4, 4), mode="bilinear")
            centre = nn.functional.normalize((directions * at).sum(dim=(0, 2, 3)), dim=0)
            gaps = (centre - method.old.kept.prototypes.float()).norm(dim=1)
            inverse.append(1 / gaps.min())
        expected = {
            "mbce": share * binary_cross_entropy(logits, batch.label, first=3, pos_weight=4.0),
            "drawn": share * w_f * nn.functional.softplus(fakes).mean(dim=(0, 2, 3)).sum(),
            "background": share * w_b * low[open_cells].mean(),
            "features": 5 * (mask * (f - g) ** 2).sum() / mask.sum() / 6,
            "contrast": 0.05 * sum(inverse) / 2,
        }
    terms = run.take(batch).terms[0]
    assert {name: float(value.detach()) for name, value in terms.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=2e-5
    )


@pytest.mark.parametrize(("sees", "absent"), [(-100.0, "features"), (100.0, "background")])
def test_a_teacher_that_sees_no_old_class_or_no_background_leaves_the_loss_finite(large, sees, absent):
    """The authors' code gives nan in both."""
    run = begun(large, sees=sees)
    run.take(*large.batches(run.step))
    assert all(terms[absent].item() == 0 for terms in run.terms)
    assert all(torch.isfinite(value) for terms in run.terms for value in terms.values())


def test_a_class_that_no_cell_shows_is_neither_drawn_nor_pushed_from(large):
    method, model = STAR(), large.model()
    run = large.begin(method, model, large.steps[0])
    batches = large.batches(large.steps[0])
    for batch in batches:
        batch.label[batch.label == 2] = 0
    run.ctx.epoch_batches = lambda: iter(batches)
    run.take(*batches)
    method.end_step(run.ctx)
    assert method.old.kept.number.tolist()[2] == 0
    second = large.begin(method, model, large.steps[1]).take(*large.batches(large.steps[1]))
    assert all(torch.isfinite(value) for terms in second.terms for value in terms.values())
    assert method.old.plan.drawn[1] == 0


def test_the_new_classifier_learns_faster(large):
    run = begun(large, new_lr_scale=7.0)
    scales = {id(p): group["lr_scale"] for group in run.optimizer.param_groups for p in group["params"]}
    head = run.model.head("a")
    assert {scales[id(p)] for p in head.classifiers[1].parameters()} == {7.0}
    assert {scales[id(p)] for p in head.classifiers[0].parameters()} == {1.0}
    first = large.begin(STAR(new_lr_scale=7.0), large.model(), large.steps[0])
    assert {group["lr_scale"] for group in first.optimizer.param_groups} == {1.0}


def test_statistics_and_plan_survive_a_restart(large):
    run = begun(large)
    again = STAR()
    again.load_state_dict(run.method.state_dict())
    assert again.old.plan == run.method.old.plan
    for name, value in vars(run.method.old.kept).items():
        assert torch.equal(getattr(again.old.kept, name), value)
    fresh = STAR()
    fresh.load_state_dict(STAR().state_dict())
    assert fresh.old.kept is fresh.old.plan is None


def test_it_does_not_go_on_without_statistics_of_the_old_classes(large):
    method, model = STAR(), large.model()
    large.train(method, model, large.steps[0])
    with pytest.raises(ConfigError) as told:
        large.begin(STAR(), model, large.steps[1])
    must_say(str(told.value), "'star'", "2 old classes", "those of 0")


def test_a_step_from_scratch_forgets_the_statistics(large):
    method = STAR()
    large.train(method, large.model(), large.steps[0])
    fresh = dataclasses.replace(large.steps[1], grows={"a": 5}, fresh=True)
    large.begin(method, large.model(), fresh)
    assert method.old.kept is None


@pytest.mark.slow
def test_two_processes_keep_and_plan_the_same_as_one(tmp_path):
    mp.spawn(_gather, (tmp_path,), nprocs=2)
    one, other, whole = (torch.load(tmp_path / name) for name in ("0.pt", "1.pt", "whole.pt"))
    assert one.keys() == other.keys() == whole.keys()
    assert {key.split("/")[0] for key in whole} == {"kept", "plan"}
    for key in one:
        assert torch.equal(one[key], other[key])
        assert_close(one[key], whole[key], rtol=1e-9, atol=1e-12)


def _gather(rank: int, folder) -> None:
    # A process of its own may find the tests' outer conftest.py first.
    sys.path.insert(0, str(Path(__file__).parent))
    sys.modules.pop("conftest", None)
    from conftest import Toy

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

    def total(tensor):
        dist.all_reduce(tensor)
        return tensor

    for world in (2, 1) if rank == 0 else (2,):
        toy, method = Toy(), STAR()
        toy.side = 64
        model = toy.model().double()  # float32 rounds by the batch's size
        for step in toy.steps:
            run = toy.begin(method, model, step, begin=False)
            mine = [_part(batch, rank if world == 2 else None) for batch in toy.batches(step)]
            run.ctx.epoch_batches = lambda mine=mine: iter(mine)
            if world == 2:
                run.ctx.all_reduce = total
            method.begin_step(run.ctx)
            if step.index == 0:
                method.end_step(run.ctx)
        name = f"{rank}.pt" if world == 2 else "whole.pt"
        torch.save({key: value.clone() for key, value in method.state_dict().items()}, folder / name)
    dist.barrier()
    dist.destroy_process_group()


def _part(batch: Batch, rank: int | None) -> Batch:
    own = slice(None) if rank is None else slice(rank, rank + 1)
    return Batch(batch.image[own].double(), batch.label[own], batch.branch)
