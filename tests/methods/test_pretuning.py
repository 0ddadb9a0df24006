"""NeST's pre-tuning: similarities, mixtures and lengths against formulas written out, its edges, and its replays."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from everseg import registry
from everseg.errors import ConfigError
from everseg.methods import switches
from everseg.methods.ft import FineTuning
from everseg.methods.mib import MiB
from everseg.methods.nest import NeST
from everseg.methods.pretuning import SIDE, Pretuning, check_classifiers, pretuned_branch
from everseg.models.erfnet import erfnet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.golden_checks import EXACT  # noqa: E402
from benchmarks.golden_nest import NestRun, replay_nest  # noqa: E402

from saying import must_say  # noqa: E402

FOLDER = ROOT.parent / "shared" / "golden"
STEMS = sorted(path.stem for path in FOLDER.glob("train_nest_*.npz")) if FOLDER.is_dir() else []


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def second_step(toy, method, **options):
    """The second step of the toy, not begun yet."""
    model = toy.train(MiB(), toy.model(), toy.steps[0]).model
    return toy.begin(method, model, toy.steps[1], begin=False, **options)


def resized(map_: np.ndarray, size: int) -> np.ndarray:
    """Bilinear resizing (C, h, w) -> (C, size, size), half pixels, as a product with one matrix per axis."""

    def matrix(cells: int) -> np.ndarray:
        rows = np.zeros((size, cells))
        for i in range(size):
            at = min(max((i + 0.5) * cells / size - 0.5, 0.0), cells - 1.0)
            low = int(at)
            high = min(low + 1, cells - 1)
            rows[i, low] += 1 - (at - low)
            rows[i, high] += at - low
        return rows

    return np.einsum("yh,chw,xw->cyx", matrix(map_.shape[1]), map_, matrix(map_.shape[2]))


def test_similarity_is_the_mean_chance_where_feature_and_weight_agree(toy, double):
    run = second_step(toy, NeST())
    step, teacher = toy.steps[1], run.teacher
    weight = torch.cat([layer.weight for layer in teacher.head("a").classifiers])[:, :, 0, 0].numpy()
    sums, pixels = np.zeros((2, *weight.shape)), np.zeros(2)
    for batch in toy.batches(step):
        out = teacher(batch.image, ("a",))["a"]
        for small, features, label in zip(out.logits, out.features["decoder"], batch.label, strict=True):
            logits = resized(resized(small.numpy(), 16), SIDE)
            chances = np.exp(logits) / np.exp(logits).sum(axis=0)
            map_ = resized(features.numpy(), SIDE)
            nearest = label.numpy()[np.ix_(np.arange(SIDE) * 16 // SIDE, np.arange(SIDE) * 16 // SIDE)]
            for n in range(2):
                for y, x in zip(*np.nonzero(nearest == 3 + n), strict=True):
                    agreeing = (map_[:, y, x][None] * weight) > 0
                    sums[n] += chances[:, y, x][:, None] * agreeing
                    pixels[n] += 1
    found = Pretuning(run.ctx, "a").similarity()
    np.testing.assert_allclose(found.numpy(), sums / pixels[:, None, None], rtol=1e-10, atol=1e-12)


def test_pretuning_is_nesterov_on_the_mixture_and_ends_at_the_old_lengths(toy, double):
    run = second_step(toy, NeST(pretune=2, pretune_lr_scale=3.0))
    before, mirror, step = copy.deepcopy(run.model.state_dict()), copy.deepcopy(run.model), toy.steps[1]
    torch.manual_seed(5)
    work = Pretuning(run.ctx, "a")
    bias, similarity = work.bias.detach().clone(), work.similarity()
    assert len(set(bias.tolist())) == 1
    torch.manual_seed(5)
    switches.begin(run.method, run.ctx)

    old = run.teacher.head("a").classifiers[0]
    weight, old_bias = old.weight[:, :, 0, 0], old.bias
    p = [similarity.clone(), similarity.sum(2).softmax(1), bias, torch.ones(1, 6), torch.ones(1, 1)]
    p = [value.requires_grad_() for value in p]
    velocity = [torch.zeros_like(value) for value in p]
    mirror.train()
    batches = toy.batches(step) * 2
    for i, batch in enumerate(batches):
        with torch.no_grad():
            features = mirror(batch.image, ("a",))["a"].features["decoder"]
        new = torch.einsum("nk,nkd,kd->nd", p[1], p[0], weight)
        rows = torch.cat([p[4] * p[3] * weight[:1], weight[1:], new])
        z = torch.einsum("cd,bdhw->bchw", rows, features)
        z = z + torch.cat([old_bias, p[2]]).view(1, -1, 1, 1)
        logp = F.interpolate(z, size=(16, 16), mode="bilinear").log_softmax(1)
        merged = torch.cat([logp[:, :3].logsumexp(1, keepdim=True), logp[:, 3:]], dim=1)
        target = torch.where(batch.label == 255, -100, (batch.label - 2).clamp(min=0))
        loss = F.nll_loss(merged, target, reduction="sum") / target.numel()
        lr = 0.05 * 3 * (1 - (i + 1) / len(batches)) ** 0.9
        for value, v, g in zip(p, velocity, torch.autograd.grad(loss, p), strict=True):
            with torch.no_grad():
                g = g + 1e-4 * value
                v.mul_(0.9).add_(g)
                value -= lr * (g + 0.9 * v)
    with torch.no_grad():
        new = torch.einsum("nk,nkd,kd->nd", p[1], p[0], weight)
        background = p[4] * p[3] * weight[:1]
        background *= weight[0].norm() / background.norm()
        new *= weight.norm(dim=1).mean() / new.norm(dim=1).mean()
        bias = p[2] * old_bias.norm() / p[2].norm()
    first, newest = run.model.head("a").classifiers
    torch.testing.assert_close(newest.weight[:, :, 0, 0].detach(), new, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(newest.bias.detach(), bias, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(first.weight[:1, :, 0, 0].detach(), background, rtol=1e-9, atol=1e-12)
    assert torch.equal(first.weight[1:], old.weight[1:])
    assert torch.equal(first.bias, old.bias)
    for name, value in run.model.state_dict().items():
        if "running" in name:
            assert not torch.equal(value, before[name]), name
            torch.testing.assert_close(value, mirror.state_dict()[name], rtol=1e-12, atol=1e-12)
        elif not name.startswith("heads.") and "num_batches" not in name:
            assert torch.equal(value, before[name]), name


def test_everything_is_as_it_was_after_the_tuning(toy):
    run = second_step(toy, NeST(pretune=1, freeze_heads="old"))
    flags = {name: weight.requires_grad for name, weight in run.model.named_parameters()}
    run.model.eval()
    switches.begin(run.method, run.ctx)
    assert {name: weight.requires_grad for name, weight in run.model.named_parameters()} == flags
    assert len(set(flags.values())) == 2
    assert not run.model.training
    assert all(weight.grad is None for weight in run.model.parameters())


def test_a_method_that_made_room_in_the_background_gets_the_old_classifiers_back(toy):
    found = []
    for method in (FineTuning(pretune=1), MiB(pretune=1)):
        run = second_step(toy, method)
        with torch.no_grad():
            run.model.head("a").classifiers[0].bias[0] -= 1  # as MiB's start does
        switches.begin(method, run.ctx)
        old, kept = run.teacher.head("a").classifiers[0], run.model.head("a").classifiers[0]
        assert torch.equal(kept.bias, old.bias)
        assert torch.equal(kept.weight[1:], old.weight[1:])
        assert not torch.equal(kept.weight[0], old.weight[0])
        found.append(kept.weight)
    assert torch.equal(*found)


def test_a_class_without_pixels_takes_after_the_background(toy):
    run = second_step(toy, NeST())
    empty = toy.batches(toy.steps[1])
    for batch in empty:
        batch.label[batch.label == 4] = 255
    run.ctx.epoch_batches = lambda: iter(empty)
    work = Pretuning(run.ctx, "a")
    similarity = work.similarity()
    assert similarity[1, 0].tolist() == [1.0] * 6
    assert not similarity[1, 1:].any()
    work.start(similarity)
    new = work.rows()[0][1]
    torch.testing.assert_close(new, work.old_weight[0], rtol=0.05, atol=0.02)
    run.ctx.epoch_batches = lambda: iter(())
    assert torch.isfinite(Pretuning(run.ctx, "a").similarity()).all()


def test_no_length_and_ignored_batches_stay_finite(toy):
    run = second_step(toy, NeST(pretune=1))
    for model in (run.teacher, run.model):
        with torch.no_grad():
            for weight in model.head("a").classifiers[0].parameters():
                weight.zero_()
    ignored = toy.batches(toy.steps[1])
    for batch in ignored:
        batch.label.fill_(255)
    run.ctx.epoch_batches = lambda: iter(ignored)
    run.ctx.tuner = lambda ctx, tuning: [
        term.backward() for b in ignored for term in tuning.terms(b).values()
    ]
    switches.begin(run.method, run.ctx)
    assert all(torch.isfinite(weight).all() for weight in run.model.parameters())


def test_which_steps_are_pretuned(toy):
    assert [pretuned_branch(step) for step in toy.steps] == [None, "a"]
    assert [pretuned_branch(step) for step in toy.domains] == [None, None, None, "a"]
    assert switches.unfit(NeST(), toy.domains) == []
    (problem,) = switches.unfit(NeST(), toy.domains[:3])
    assert problem.startswith("method.pretune: ")
    must_say(problem, "domain", "background")
    assert switches.unfit(NeST(), toy.steps) == []
    (problem,) = switches.unfit(NeST(), toy.steps[:1])
    must_say(problem, "method.pretune", "single step", "method.pretune=0")
    assert "branch" not in problem
    assert switches.unfit(NeST(pretune=0), toy.domains[:3]) == []


def test_settings_of_switches_that_are_off_are_told():
    assert switches.idle(FineTuning()) == switches.idle(NeST(pretune_lr_scale=500.0)) == []
    assert switches.idle(FineTuning(pretune=1, pretune_lr_scale=2.0, fuse="changed", fuse_changed=0.1)) == []
    told = switches.idle(
        FineTuning(fuse="all", fuse_changed=0.1, pretune_lr_scale=2.0, pretune_unbiased_ce=False)
    )
    must_say(told[0], "method.fuse_changed=0.1", "method.fuse=changed")
    must_say(told[1], "method.pretune_lr_scale=2.0", "method.pretune=EPOCHS")
    must_say(told[2], "method.pretune_unbiased_ce=false")
    assert len(told) == 3


def test_other_classifiers_are_refused(toy):
    check_classifiers(toy.model())
    with pytest.raises(ConfigError, match=r"method\.pretune"):
        check_classifiers(erfnet())


def test_without_an_engine_tuning_says_what_is_missing(toy):
    run = second_step(toy, NeST())
    run.ctx.tuner = None
    with pytest.raises(ConfigError, match=r"ctx\.tune: .*tuner"):
        switches.begin(run.method, run.ctx)


REFUSING = ("acil", "dft*")
"""Methods that neither switch can serve: no gradients in later steps, or nothing trained that was there before."""
OWN_HEADS = ("ssul", "microseg")
"""Methods whose classifiers cannot be pre-tuned."""
OTHER_CLASSIFIERS = ("dkd", "star", "mbs", "barm")
"""Methods that make classifiers of another kind, or need a network that does, which a pre-tuning refuses."""
PAIRS = [
    (name, fuse, pretune)
    for name, fuse, pretune in itertools.product(
        registry.BUILTIN["method"], ("none", "all", "changed"), (0, 1)
    )
    if fuse != "none" or pretune
]


@pytest.mark.parametrize(("name", "fuse", "pretune"), PAIRS)
def test_the_switches_work_with_every_method_and_with_each_other(toy, name, fuse, pretune):
    """Two iterations are finite, differ from those without the switches, and are the same from a stored state on."""
    cls = registry.resolve("method", name)
    if name in REFUSING:
        problems = switches.unfit(cls(fuse=fuse, pretune=pretune), toy.steps)
        assert [problem for problem in problems if problem.startswith(("method.fuse", "method.pretune"))]
        return
    if cls.restructures and fuse != "none":
        (problem,) = switches.unfit(cls(fuse=fuse), toy.steps)
        must_say(problem, "method.fuse", "structure")
        return
    if pretune and name in OWN_HEADS:
        with pytest.raises(ValueError, match=f"pretune: {name}"):
            cls(pretune=pretune)
        return
    if pretune and name in OTHER_CLASSIFIERS:
        method = cls(pretune=pretune)
        with pytest.raises(ConfigError, match=r"method\.pretune"):
            switches.check_model(method, toy.train(cls(), toy.model(name), toy.steps[0]).model)
        return

    def run(**options):
        method = cls(**options)
        model = toy.train(method, toy.model(name), toy.steps[0]).model
        made = toy.begin(method, model, toy.steps[1])
        started = {key: value.clone() for key, value in model.state_dict().items()}
        state = {key: value.clone() for key, value in method.state_dict().items()}
        made.take(*toy.batches(toy.steps[1], 2))
        switches.finish(method, made.ctx)
        return made, started, state

    made, started, state = run(fuse=fuse, pretune=pretune, freeze_heads="old")
    plain, _, _ = run(fuse="none", pretune=0, freeze_heads="old")
    final = made.model.state_dict()
    assert all(torch.isfinite(value).all() for value in final.values())
    assert all(torch.isfinite(value) for terms in made.terms for value in terms.values())
    assert any(not torch.equal(value, plain.model.state_dict()[key]) for key, value in final.items())

    method = cls(fuse=fuse, pretune=pretune, freeze_heads="old")
    model = toy.train(method, toy.model(name), toy.steps[0]).model
    again = toy.begin(method, model, toy.steps[1], begin=False)
    model.load_state_dict(started)
    if state:
        method.load_state_dict(state)
    again.take(*toy.batches(toy.steps[1], 2))
    switches.finish(method, again.ctx)
    assert all(torch.equal(value, final[key]) for key, value in model.state_dict().items())


@pytest.mark.golden
@pytest.mark.parametrize("stem", STEMS)
def test_replay_agrees_with_the_original(golden, stem):
    found = replay_nest(golden, stem)
    assert {k: v for k, v in found.items() if not v.largest <= EXACT} == {}
    assert {
        "similarity", "transform at the start", "loss of the pre-tuning", "transform at the end",
        "running statistics after the pre-tuning", "classifiers at the start", "final weights",
    } <= found.keys()  # fmt: skip


def _in_eval_mode(self, batch, losses=Pretuning.losses):
    self.ctx.module.eval()
    return losses(self, batch)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("mistake", "quantity"),
    [
        (lambda m: m.setattr(Pretuning, "finish", lambda self: None), "classifiers at the start"),
        (lambda m: m.setattr("everseg.methods.pretuning.SIDE", 64), "similarity"),
        (lambda m: m.setattr(Pretuning, "losses", _in_eval_mode), "loss of the pre-tuning"),
    ],
)
def test_replay_notices_a_mistake(golden, monkeypatch, mistake, quantity):
    run = NestRun(golden, "train_nest_A")
    mistake(monkeypatch)
    assert run.run()[quantity].largest > 1e-5
