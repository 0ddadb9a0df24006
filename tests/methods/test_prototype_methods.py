"""SDR and UCD: what they keep, when their terms act, and what each option does."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from everseg.labels import LabelSpace
from everseg.losses.prototypes import label_at
from everseg.methods.base import StepContext
from everseg.methods.sdr import SDR
from everseg.methods.ucd import UCD
from everseg.models.build import deeplabv3_tiny
from everseg.scenarios.steps import Source, Step
from everseg.types import Batch


@pytest.fixture
def large(toy):
    """The toy with maps of 4 x 4."""
    toy.side = 64
    return toy


def under(protocol: str, steps):
    """The same steps under a protocol."""
    return [dataclasses.replace(step, protocol=protocol) for step in steps]


def second_step(toy, method, *, sees_old: float = 100.0, protocol: str = ""):
    """The second step, begun; the teacher calls everything class 1, or as little as `sees_old` says."""
    model, steps = toy.model(), under(protocol, toy.steps)
    toy.train(method, model, steps[0])
    toy.teacher_sees = sees_old
    return toy.begin(method, model, steps[1])


def test_prototypes_are_the_means_of_all_features_met(large):
    """Over two steps, counted from the student's own outputs."""
    method, model = SDR(), large.model()
    sums, count = torch.zeros(5, 8, dtype=torch.float64), Counter()
    for step in under("sequential", large.steps):
        run = large.begin(method, model, step)
        for batch in large.batches(step):
            seen = []
            hook = model.encoder.register_forward_hook(
                lambda *a, seen=seen: seen.append([*a[2].values()][-1])
            )
            run.take(batch)
            hook.remove()
            features, label = seen[0].detach().double(), label_at(batch.label, seen[0].shape[2:])
            for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).tolist():
                number = int(label[b, i, j])
                if number != 255:
                    sums[number] += features[b, :, i, j]
                    count[number] += 1
        method.end_step(run.ctx)
    rows, met = method.prototypes.of_branch["a"]
    assert met.tolist() == [count[c] for c in range(5)]
    assert rows.dtype == torch.float64
    assert_close(rows, sums / torch.tensor([[count[c]] for c in range(5)]))


@pytest.mark.parametrize(
    ("protocol", "collected"),
    [
        ("", [0, 0]),
        ("overlapped", [0, 0]),
        ("partitioned", [0, 0]),
        ("disjoint", [1, 0]),
        ("sequential", [1, 1]),
    ],
)
def test_the_background_is_collected_where_it_is_nothing_else(large, protocol, collected):
    method, model, number = SDR(), large.model(), 0
    for step, grows in zip(under(protocol, large.steps), collected, strict=True):
        large.train(method, model, step)
        now = int(method.prototypes.of_branch["a"][1][0])
        assert (now > number) == bool(grows)
        number = now


def test_the_authors_form_drops_the_first_class_where_there_is_no_background(large):
    step = large.steps[0]
    batch = large.batches(step, 1)[0]
    batch.label[batch.label == 0] = 255
    counts = []
    for form in ("fixed", "authors"):
        method = SDR(form=form)
        large.begin(method, large.model(), step).take(batch)
        counts.append(method.prototypes.of_branch["a"][1].tolist())
    assert counts[0][1] > 0
    assert counts[1][1] == 0
    assert counts[0][2] == counts[1][2] > 0


def test_matching_acts_where_the_teacher_sees_an_old_class(large):
    batch = large.batches(large.steps[1], 1)[0]
    terms = {}
    for options in ({}, {"matching_weight": 0.02}, {"match_pixels": True}, {"form": "authors"}):
        terms[str(options)] = second_step(large, SDR(**options)).take(batch).terms[0]
    plain, twice, pixels, authors = (term["matching"].item() for term in terms.values())
    assert plain > 0
    assert twice == pytest.approx(2 * plain)
    assert len({plain, pixels, authors}) == 3
    blind = second_step(large, SDR(), sees_old=-100.0)
    assert blind.take(batch).terms[0]["matching"].item() == 0
    labelled = dataclasses.replace(batch, label=torch.where(batch.label == 0, 2, batch.label))
    reads = second_step(large, SDR(), sees_old=-100.0, protocol="sequential")
    assert reads.take(labelled).terms[0]["matching"] > 0


def test_an_old_class_without_prototype_is_not_matched(large):
    """As in a model that another method has taught: pulling its features to 0 would only harm."""
    run = second_step(large, SDR())
    run.method.prototypes.of_branch = {}
    terms = run.take(large.batches(large.steps[1], 1)[0]).terms[0]
    assert terms["matching"].item() == 0
    assert terms["attraction"].item() > 0


def test_the_certainty_weighs_pairs_of_old_classes(large):
    batch = large.batches(large.steps[1], 1)[0]
    found = []
    for certainty in (True, False):
        run = second_step(large, UCD(certainty=certainty), sees_old=1.0)  # likelier, and not certain
        found.append(run.take(batch).terms[0]["contrast"].item())
    assert found[0] < found[1]


@pytest.mark.parametrize("method", [SDR(), SDR(form="authors"), UCD(), UCD(form="authors")])
def test_one_image_no_background_and_no_new_class(large, method):
    run = second_step(large, method)
    batch = large.batches(large.steps[1], 1)[0]
    model = run.model.eval()  # batch norm needs two images in training mode
    for change in (lambda y: y, lambda y: y.masked_fill(y == 0, 255), lambda y: y.masked_fill(y > 2, 0)):
        one = Batch(batch.image[:1], change(batch.label[:1]), "a")
        terms = next(iter(method.losses(one, run.ctx)))
        assert all(torch.isfinite(value) for value in terms.values())
        model.zero_grad()
        sum(terms.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("cls", [SDR, UCD])
def test_a_branch_without_background_trains_by_what_makes_sense(large, cls):
    steps = [
        dataclasses.replace(
            step, spaces={b: LabelSpace(s.groups, s.names, background=None) for b, s in step.spaces.items()}
        )
        for step in large.steps
    ]
    method, model = cls(init_background=True), large.model()
    large.train(method, model, steps[0])
    run = large.begin(method, model, steps[1]).take(*large.batches(steps[1]))
    expected = {"ce", "kd"} | ({"attraction", "repulsion", "sparsity"} if cls is SDR else set())
    assert all(set(terms) == expected for terms in run.terms)
    if cls is SDR:  # class 0 is a class
        assert method.prototypes.of_branch["a"][1][0] > 0


def test_each_branch_keeps_its_own_prototypes(large):
    method, model = SDR(), large.model()
    for step in large.domains:
        before = {b: (p.clone(), n.clone()) for b, (p, n) in method.prototypes.of_branch.items()}
        large.train(method, model, step)
        for branch, old in before.items():
            if branch != step.branch:
                assert all(
                    torch.equal(a, b) for a, b in zip(old, method.prototypes.of_branch[branch], strict=True)
                )
    assert {b: len(n) for b, (_, n) in method.prototypes.of_branch.items()} == {"a": 5, "b": 4, "c": 2}


def test_a_step_from_scratch_forgets_the_prototypes(large):
    method = SDR()
    large.train(method, large.model(), large.steps[0])
    fresh = dataclasses.replace(large.steps[1], grows={"a": 5}, fresh=True)
    method.begin_step(large.begin(SDR(), large.model(), fresh, begin=False).ctx)
    assert method.prototypes.of_branch == {}


def test_the_first_head_is_never_trained_and_the_second_is(large):
    method, model = UCD(init_background=False), large.model()
    third = large.step(2, {"a": (3, 2, 1)}, {"a": 1}, "a")
    large.train(method, model, large.steps[0])
    drawn = [p.clone() for p in model.head("a").classifiers[0].parameters()]
    large.train(method, model, large.steps[1])
    second = model.head("a").classifiers[1].weight.clone()
    large.train(method, model, third)
    head = model.head("a").classifiers
    assert all(torch.equal(a, b) for a, b in zip(drawn, head[0].parameters(), strict=True))
    assert not torch.equal(second, head[1].weight)
    model = large.model()
    large.train(UCD(freeze_heads="old", init_background=False), model, *large.steps)
    second = model.head("a").classifiers[1].weight.clone()
    large.train(UCD(freeze_heads="old", init_background=False), model, third)
    assert torch.equal(second, model.head("a").classifiers[1].weight)


@pytest.mark.parametrize("form", ["fixed", "authors"])
def test_two_processes_keep_the_same_prototypes_as_one(tmp_path, form):
    """In the authors' form, which mixes the channels of a process's images, of one image each."""
    mp.spawn(_collect, (tmp_path, form), nprocs=2)
    one, other, whole = (torch.load(tmp_path / name) for name in ("0.pt", "1.pt", "whole.pt"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(one["count/a"], whole["count/a"])
    assert whole["count/a"].sum() > 0
    assert_close(one["prototypes/a"], whole["prototypes/a"], rtol=1e-9, atol=1e-12)


def _collect(rank: int, folder, form: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

    def reduce(tensor):
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    space = LabelSpace(((0, 1, 2),), ("background", "one", "two"))
    source = Source("a", "toy", "train", (), bytes(range(256)))
    step = Step(0, (source,), (), {"a": space}, {"a": 3}, protocol="disjoint")
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(4, 3, 64, 64, generator=generator).double()  # float32 rounds by the batch's size
    label = torch.randint(0, 3, (4, 64, 64), generator=generator)

    def collected(all_reduce, parts):
        torch.manual_seed(1)
        model = deeplabv3_tiny(stem_pool=True)
        model.grow({"a": 3})
        model.double().eval()
        method = SDR(form=form)
        ctx = StepContext(step=step, model=model, module=model, teacher=None, all_reduce=all_reduce)
        method.begin_step(ctx)
        for part in parts:
            next(iter(method.losses(Batch(image[part], label[part], "a"), ctx)))
        return method.state_dict()

    torch.save(collected(reduce, [slice(rank, rank + 1), slice(2 + rank, 3 + rank)]), folder / f"{rank}.pt")
    if rank == 0:
        whole = [slice(i, i + 1) for i in range(4)] if form == "authors" else [slice(0, 2), slice(2, 4)]
        torch.save(collected(lambda tensor: tensor, whole), folder / "whole.pt")
    dist.destroy_process_group()


def test_the_teacher_is_read_at_the_features_size_whatever_the_head(large):
    """A head that enlarges the decoder's map gives larger logits than features."""
    run = second_step(large, UCD())
    batch = large.batches(large.steps[1], 1)[0]
    teach = run.ctx.teach

    def enlarged(batch):
        output = teach(batch)
        logits = torch.nn.functional.interpolate(output.logits, scale_factor=2, mode="bilinear")
        return output._replace(logits=logits)

    run.ctx.teach = enlarged
    assert torch.isfinite(next(iter(run.method.losses(batch, run.ctx)))["contrast"])
