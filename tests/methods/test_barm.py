"""BARM: its loss by hand, what starts from what, rates and frozen parts, its switches, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import nn

from everseg.errors import ConfigError
from everseg.labels import LabelSpace
from everseg.losses.reading import read_ids
from everseg.methods import switches
from everseg.methods.barm import BARM
from everseg.methods.mib import MiB
from everseg.models.blocks import NORM_TYPES
from everseg.models.heads import Head
from everseg.types import Batch
from saying import must_say

WIDTH = {"head_width": 6}
full = partial(nn.functional.interpolate, mode="bilinear")


@pytest.fixture
def large(toy):
    """The toy with maps of 4 x 4, and a third step."""
    toy.side = 64
    toy.steps = (*toy.steps, toy.step(2, {"a": (3, 2, 1)}, {"a": 1}, "a"))
    return toy


def cost(x: float, target: float) -> float:
    """Binary cross-entropy of one sigmoid."""
    p = 1 / (1 + math.exp(-x))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def outputs(run, batch):
    batch.image = batch.image.double()
    with torch.no_grad():
        return [m(batch.image, ("a",))["a"] for m in (run.model, run.teacher)]


def learnt(output) -> torch.Tensor:
    """The logits of the student, background as it is trained."""
    residual = output.auxiliary["residual"]
    logits = output.logits.clone()
    logits[:, 0] += residual[:, :-1].clamp(max=0).sum(dim=1) + residual[:, -1]
    return logits


def targets_by_hand(teacher, label: torch.Tensor, threshold: float) -> tuple[torch.Tensor, int]:
    """Labels with the teacher's classes, and how many pixels have one."""
    logits = teacher.logits.clone()
    if "residual" in teacher.auxiliary:
        logits[:, 0] += teacher.auxiliary["residual"].clamp(max=0).sum(dim=1)
    scores = full(logits, label.shape[1:]).sigmoid().permute(0, 2, 3, 1)
    wanted, filled = label.clone(), 0
    for place in torch.nonzero(label == 0).tolist():
        values = scores[tuple(place)].tolist()
        best = values.index(max(values))
        if best and values[best] >= threshold:
            wanted[tuple(place)] = best
            filled += 1
    return wanted, filled


@pytest.mark.parametrize("index", [1, 2])
def test_the_loss_of_a_later_step_by_hand(large, index):
    """With weights of its own for every term; in the third step there is a residual of an earlier step."""
    weights = {"triplet_weight": 2.0, "feature_weight": 3.0, "kd_weight": 0.5, "residual_weight": 1.5}
    method, model = BARM(threshold=0.6, **weights, **WIDTH), large.model()
    large.train(method, model, *large.steps[:index])
    model.double()
    large.teacher_sees = 1.5
    run = large.begin(method, model, large.steps[index])
    # Away from the teacher, so that features and old outputs differ.
    *first, batch = large.batches(large.steps[index])
    run.take(*(dataclasses.replace(one, image=one.image.double()) for one in first))
    student, teacher = outputs(run, batch)
    wanted, filled = targets_by_hand(teacher, batch.label, 0.6)
    assert filled
    logits = full(learnt(student), batch.label.shape[1:]).permute(0, 2, 3, 1)
    valid = [tuple(place) for place in torch.nonzero(wanted != 255).tolist()]
    bce = sum(
        cost(x, float(c == int(wanted[place])))
        for place in valid
        for c, x in enumerate(logits[place].tolist())
    ) / len(valid)
    newest, maps = student.auxiliary["residual"][:, -1], [f"head{k}" for k in range(index)]
    old, small = teacher.logits.shape[1], batch.label[:, ::16, ::16]
    back, new = newest[small == 0].tolist(), newest[(small >= old) & (small != 255)].tolist()
    assert back
    assert new
    features = 0.0
    for name in maps:
        apart = (student.features[name] - teacher.features[name]).square() * (small == 0)[:, None]
        features += float(apart.mean())
    pairs = [(student.logits[:, c], teacher.logits[:, c]) for c in range(old)]
    pairs += [
        (student.auxiliary["residual"][:, k], teacher.auxiliary["residual"][:, k]) for k in range(index - 1)
    ]
    kd = 0.0
    for mine, theirs in pairs:
        both = zip(mine.flatten().tolist(), theirs.sigmoid().flatten().tolist(), strict=True)
        kd += sum(cost(x, t) for x, t in both) / mine.numel()
    expected = {
        "bce": bce,
        "triplet": 2 * sum(max(0.0, 1 - 2 / (1 + math.exp(-x))) for x in back) / len(back),
        "residual": 1.5 * sum(cost(x, 0.0) for x in new) / (len(new) + 1e-8),
        "features": 3 * features,
        "kd": 0.5 * kd,
    }
    assert features > 0
    terms = run.take(batch).terms[-1]
    assert {name: float(value.detach()) for name, value in terms.items()} == pytest.approx(expected, rel=1e-9)


def test_the_first_step_learns_the_labels_alone(large):
    method, model = BARM(**WIDTH), large.model()
    model.double()
    run = large.begin(method, model, large.steps[0])
    batch = large.batches(large.steps[0], 1)[0]
    batch.image = batch.image.double()
    with torch.no_grad():
        logits = full(model(batch.image, ("a",))["a"].logits, batch.label.shape[1:])
    one_hot = torch.stack([batch.label == c for c in range(3)], dim=1).double()
    each = nn.functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(dim=1)
    terms = run.take(batch).terms[0]
    assert {*terms} == {"bce"}
    assert float(terms["bce"].detach()) == pytest.approx(float(each[batch.label != 255].mean()), rel=1e-9)


def test_labels_train_the_new_head_alone_and_distillation_the_old_ones(large):
    """Only new classes and the newest residual learn labels; without the other terms the rest stays as it is."""
    off = {"triplet_weight": 0.0, "feature_weight": 0.0, "kd_weight": 0.0, "residual_weight": 0.0}
    for changed, moves in (({}, False), ({"kd_weight": 1.0}, True)):
        method, model = BARM(**WIDTH, **off | changed), large.model()
        large.train(method, model, large.steps[0])
        run = large.begin(method, model, large.steps[1])
        run.optimizer.param_groups[0]["weight_decay"] = 0.0
        head = model.head("a")
        before = [w.clone() for w in head.parts["0"].parameters()]
        run.take(*large.batches(large.steps[1]))
        same = all(torch.equal(a, b) for a, b in zip(before, head.parts["0"].parameters(), strict=True))
        assert same != moves
        assert head.parts["1"].conv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("statistics", ["copied", "fresh"])
def test_a_new_head_starts_from_the_first_ones_convolution(large, statistics):
    method, model = BARM(ear_statistics=statistics, **WIDTH), large.model()
    large.train(method, model, large.steps[0])
    with torch.no_grad():
        model.head("a").parts["0"].norm.weight.mul_(1.5)
    run = large.begin(method, model, large.steps[1])
    old, new = (model.head("a").parts[name] for name in "01")
    for mine, theirs in (
        (new.conv.weight, old.conv.weight),
        (new.norm.weight, old.norm.weight),
        (new.norm.bias, old.norm.bias),
    ):
        assert torch.equal(mine, theirs)
    assert (old.norm.running_var != 1).any()
    if statistics == "copied":
        assert torch.equal(new.norm.running_var, old.norm.running_var)
        assert torch.equal(new.norm.running_mean, old.norm.running_mean)
    else:
        assert (new.norm.running_var == 1).all()
        assert (new.norm.running_mean == 0).all()
    assert new.classifier.weight.shape[0] == 1 + 2  # the residual and the classes
    kept = {k: v.clone() for k, v in model.state_dict().items() if "norm" in k or "bn" in k}
    run.take(*large.batches(large.steps[1]))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in kept.items())  # norms rest, statistics too


def test_norms_rest_in_a_later_step_while_dropout_goes_on(large):
    method, model = BARM(**WIDTH), large.model()
    model.decoder.dropout = nn.Dropout(0.1)
    large.train(method, model, large.steps[0])
    large.begin(method, model, large.steps[1])
    assert model.decoder.dropout.training
    norms = [m for m in model.modules() if isinstance(m, NORM_TYPES)]
    assert not any(m.training or m.weight.requires_grad for m in norms)


def test_every_part_has_the_rate_that_it_is_to_have(large):
    method, model = BARM(encoder_rate=0.25, decoder_rate=0.5, old_rate=0.125, **WIDTH), large.model()

    def rates(run) -> dict[str, float]:
        found = {id(w): group["lr_scale"] for group in run.optimizer.param_groups for w in group["params"]}
        return {name: found[id(w)] for name, w in model.named_parameters() if w.requires_grad}

    first = rates(large.begin(method, model, large.steps[0]))
    assert first == {name: 0.25 if name.startswith("encoder.") else 1.0 for name in first}
    large.begin(method, model, large.steps[1])
    later = rates(large.begin(method, model, large.steps[2]))
    places = {"encoder.": 0.125, "decoder.": 0.5, "heads.a.classifiers.0": 0.125, "heads.a.classifiers.1": 0.125,
              "heads.a.classifiers.2": 1.0}  # fmt: skip
    assert {name: next(r for place, r in places.items() if name.startswith(place)) for name in later} == later
    assert {next(place for place in places if name.startswith(place)) for name in later} == {*places}


def test_the_outputs_are_read_by_the_rule_of_the_finished_model(large):
    method, model = BARM(**WIDTH), large.model()
    large.train(method, model, *large.steps)
    model.eval()
    with torch.no_grad():
        output = model(torch.randn(2, 3, 64, 64), ("a",))["a"]
        output.auxiliary["residual"].mul_(5)
        logits = output.logits.clone()
        logits[:, 0] += output.auxiliary["residual"].clamp(max=0).sum(dim=1)
        wanted = full(logits.sigmoid(), (64, 64)).argmax(dim=1)
    assert output.auxiliary["residual"].shape[1] == 2
    assert (read_ids(output, model.readout, (64, 64)) != wanted).float().mean() < 1e-3


def test_a_batch_without_background_or_without_new_classes_is_finite_unless_asked_otherwise(large):
    method, model = BARM(**WIDTH), large.model()
    large.train(method, model, large.steps[0])
    batch = large.batches(large.steps[1], 1)[0]
    for label, zero in ((3, "triplet"), (0, "residual"), (255, "bce")):
        model.zero_grad()
        one = dataclasses.replace(batch, label=torch.full_like(batch.label, label))
        terms = large.begin(BARM(**WIDTH), copied(model, large), large.steps[1]).take(one).terms[0]
        assert all(math.isfinite(float(value.detach())) for value in terms.values())
        assert float(terms[zero].detach()) == 0
    method.empty_background = "nan"
    one = dataclasses.replace(batch, label=torch.full_like(batch.label, 3))
    assert math.isnan(float(large.begin(method, model, large.steps[1]).take(one).terms[0]["triplet"]))


def copied(model, toy):
    """Another model with the same weights after the first step."""
    other = toy.model()
    BARM(**WIDTH).prepare_model(other, toy.steps[0])
    other.load_state_dict(model.state_dict())
    return other


def test_class_weights_and_the_threshold_act(large):
    def bce(step, **options) -> float:
        torch.manual_seed(0)
        method, model = BARM(**WIDTH, **options), large.model()
        large.train(method, model, large.steps[0])
        large.teacher_sees = 2.0
        run = large.begin(method, model, step)
        large.teacher_sees = 0.0
        return float(run.take(large.batches(large.steps[1], 1)[0]).terms[0]["bce"].detach())

    plain = bce(large.steps[1])
    assert bce(large.steps[1], threshold=0.9) != plain
    weighed = dataclasses.replace(large.steps[1], class_weights={"a": (1.0, 1.0, 1.0, 9.0, 1.0)})
    assert bce(weighed) > plain


def test_candidates_of_a_memory_are_labelled_by_their_own_classes_and_the_models(large):
    method, model = BARM(**WIDTH), large.model()
    large.train(method, model, *large.steps[:2])
    model.head("a").classifiers[0].classifier.bias.data[1] += 3.0
    run = large.begin(method, model, large.steps[2], begin=False)
    run.ctx.module.eval()
    batch = large.batches(large.steps[2], 1)[0]
    one = Batch(batch.image, batch.label, "a")
    with torch.no_grad():
        found = method.memory_labels(one, run.ctx, 0.6)
        wanted, filled = targets_by_hand(run.model(batch.image, ("a",))["a"], batch.label, 0.6)
    assert filled
    assert (found != wanted).float().mean() < 1e-3


def test_what_it_cannot_do_is_refused_in_a_sentence(toy):
    with pytest.raises(ValueError, match="freeze_heads"):
        BARM(freeze_heads="all")
    step = toy.steps[0]
    space = step.spaces["a"]
    bare = dataclasses.replace(step, spaces={"a": LabelSpace(space.groups, space.names, background=None)})
    for problem in (*switches.unfit(BARM(), [bare]), _refusal(BARM(), toy.model(), bare)):
        must_say(problem, "'barm'", "background", "'a'")
    [several] = switches.unfit(BARM(), list(toy.domains))
    must_say(several, "'barm'", "one domain")
    [pretuning] = switches.unfit(BARM(pretune=1), list(toy.steps))
    must_say(pretuning, "method.pretune", "heads")
    model = toy.model()
    toy.train(MiB(), model, step)
    must_say(_refusal(BARM(), model, toy.steps[1]), "method", "residual")
    model = toy.model()
    BARM(**WIDTH).prepare_model(model, step)
    must_say(_refusal(BARM(head_width=7), model, toy.steps[1]), "widths")
    model = toy.model()
    model.readout = BARM().readout
    model.grow({"a": 3}, heads={"a": Head()})
    must_say(_refusal(BARM(), model, toy.steps[1]), "'barm'", "3x3")


def _refusal(method, model, step) -> str:
    with pytest.raises(ConfigError) as error:
        method.prepare_model(model, step)
    return str(error.value)
