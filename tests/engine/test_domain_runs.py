"""Runs over domains: every method and sharing, kills, ranks, from scratch and all at once, on lit rectangles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from domain_toy import DEEPLAB, ERFNET, build, domain, settings
from encoders import need_transformers
from processes import complete, killed, ranks, results
from safetensors.torch import load_file
from toy import MAPS, NETWORKS, maps

import everseg
from everseg import registry
from everseg.errors import CheckpointError, ConfigError
from everseg.methods.ft import FineTuning
from everseg.reports.run_scores import Change
from everseg.runs.run_folder import RunFolder
from everyday import some

LIGHTS = ("day", "dusk", "fog")
BLUE_IS_VOID = {"blue": "ignore"}
AUTHORS = {"name": "mdil", "kl": "probabilities", "updates": "two-legacy", "teacher_statistics": "authors",
           "frozen_statistics": False}  # fmt: skip
FEW = {"train": 8, "val": 4}


def few(*lights: str) -> dict[str, dict]:
    return {light: domain(light, **FEW) for light in lights}


def data_of(domains: dict[str, dict]) -> dict:
    return {**settings(Path())["data"], "domains": domains}


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> everseg.Run:
    """MDIL over three domains, the last one with a class less."""
    domains = {**few("day", "dusk"), "fog": domain("fog", rename=BLUE_IS_VOID, **FEW)}
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("sequence")
    return everseg.run(
        settings(out, data=data_of(domains), train={"epochs": 12, "epochs_next": 3, "batch": 2, "lr": 0.02}),
        quiet=True,
    )


def terms(run: Path, step: int) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "journal.jsonl").read_text().splitlines())
    return [line["terms"] for line in lines if line["event"] == "train" and line["step"] == step]


def weights(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder.final(step) / "model.safetensors")


def of_branch(state: dict[str, torch.Tensor], branch: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if f".{branch}." in name}


# ---------------------------------------------------------------- MDIL from end to end


def test_every_domain_met_is_tested_through_its_own_branch(sequence):
    """Counted again from the images, one by one, without everseg's loader."""
    for step, met in enumerate((LIGHTS[:1], LIGHTS[:2], LIGHTS)):
        counts = sequence.folder.counts(step)
        assert tuple(counts) == met
        model, spaces, _, _ = sequence.folder.load_final(step)
        assert tuple(spaces) == met
        for light in met:
            size = 3 if light == "fog" else 4
            wanted = np.zeros((size, size), np.int64)
            split = build(light=light, **FEW).splits["val"]
            for index in range(len(split)):
                image, mask = split.read(index)
                pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
                with torch.no_grad():
                    found = model(pixels, (light,))[light].logits[0].argmax(0).numpy()
                for truth, predicted in zip(mask.ravel(), found.ravel(), strict=True):
                    if truth < size:
                        wanted[truth, predicted] += 1
            np.testing.assert_array_equal(counts[light], wanted)


def test_the_table_has_a_row_per_step_and_a_column_per_domain(sequence):
    rows = sequence.table()
    assert [row["trained"] for row in rows] == list(LIGHTS)
    for step, row in enumerate(rows):
        values = {}
        for light, counts in sequence.folder.counts(step).items():
            true = counts.sum(1) > 0
            union = counts.sum(0) + counts.sum(1) - np.diag(counts)
            values[light] = 100 * np.mean((np.diag(counts) / np.maximum(union, 1))[true])
        for light in LIGHTS:
            assert row[light] == (pytest.approx(values[light], abs=0.00501) if light in values else None)
        assert row["mean"] == pytest.approx(np.mean(list(values.values())), abs=0.00501)
    assert rows[0]["day"] > 20, "the toy learns nothing; these comparisons say nothing"


def test_old_branches_stay_bit_identical_and_shared_weights_move(sequence):
    states = [weights(sequence.folder, step) for step in range(3)]
    for step, old in ((1, ("day",)), (2, ("day", "dusk"))):
        for branch in old:
            before, after = of_branch(states[step - 1], branch), of_branch(states[step], branch)
            assert any("running_mean" in name for name in before)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
        shared = [name for name in states[step] if not any(f".{light}." in name for light in LIGHTS)]
        assert len(shared) > 10
        assert not any(torch.equal(states[step - 1][name], states[step][name]) for name in shared)


def test_in_the_authors_form_the_statistics_of_old_branches_drift_and_nothing_else(tmp_path):
    config = settings(tmp_path, data=data_of(few(*LIGHTS)), method=AUTHORS, train={"max_iterations": 2})
    folder = everseg.run(config, quiet=True).folder
    states = [weights(folder, step) for step in range(3)]
    for step in (1, 2):
        before, after = of_branch(states[step - 1], "day"), of_branch(states[step], "day")
        for name in before:
            moved = not torch.equal(before[name], after[name])
            assert moved == ("running_" in name or "num_batches" in name), name


def test_a_term_holds_every_old_domain_and_nothing_in_the_first_step(sequence):
    assert all(set(line) == {"ce"} for line in terms(sequence.path, 0))
    for step in (1, 2):
        lines = terms(sequence.path, step)
        assert lines
        assert all(set(line) == {"ce", "kd"} and line["kd"] >= 0 for line in lines)


# ---------------------------------------------------------------- kills and ranks


@pytest.mark.parametrize("method", some([{"name": "mdil"}, AUTHORS], AUTHORS), ids=["corrected", "authors"])
def test_kills_in_later_domains_change_nothing(tmp_path, method):
    """Dropout is active, in the authors' form in the teacher too: it depends on the iteration alone."""
    train = {"epochs": 2, "checkpoint_every": 1}
    whole, config = (
        settings(tmp_path / name, data=data_of(few(*LIGHTS)), method=method, train=train)
        for name in ("whole", "killed")
    )
    assert complete(whole) == 0
    folder = RunFolder(tmp_path / "killed" / "domains")
    for step in (1, 2):
        killed(config, "name", 1, f"{step:02}/ckpt/it-*[0-9]")
    assert complete(config) == 0
    assert results(folder.path) == results(tmp_path / "whole" / "domains")


CHECKED = """
from dataclasses import dataclass
import torch
from everseg.methods.ft import FineTuning
from everseg.methods.mdil import MDIL
from everseg.methods.mdil_mib import MDILMiB
class Same:
    def end_step(self, ctx):
        world = ctx.all_reduce(torch.ones(()))
        assert world == 2
        for name, value in ctx.module.named_parameters():
            assert torch.equal(ctx.all_reduce(value.detach()), value.detach() * world), name
        super().end_step(ctx)
@dataclass(kw_only=True)
class Ft(Same, FineTuning): pass
@dataclass(kw_only=True)
class Mdil(Same, MDIL): pass
@dataclass(kw_only=True)
class Mixed(Same, MDILMiB): pass
"""
OWN_PLAN = """
from everseg.scenarios.combine import joint
from everseg.scenarios.domain_incremental import build
def plan(config, datasets, counts, *, seed):
    return joint(build(config, datasets, counts, seed=seed))
"""


@pytest.mark.parametrize(
    ("method", "scenario"),
    [
        pytest.param({"name": "Mdil"}, {}, marks=pytest.mark.slow),
        pytest.param({"name": "Mdil", "updates": "two"}, {}, marks=pytest.mark.slow),
        pytest.param({"name": "Mdil", "updates": "two-legacy"}, {}, marks=pytest.mark.slow),
        ({"name": "Mixed"}, {}),
        ({"name": "Ft"}, {"joint": True}),
        ({"name": "Ft"}, {"kind": "plan"}),
    ],
    ids=["mdil", "mdil-two-updates", "mdil-two-legacy", "mdil+mib", "multi-task", "own-plan"],
)
def test_two_processes_agree_on_every_weight(tmp_path, method, scenario):
    """Each batch leaves weights of other paths without gradient: nobody waits for them."""
    plug_in = tmp_path / "mine.py"
    plug_in.write_text(CHECKED + OWN_PLAN)
    method = {**method, "name": f"{plug_in}:{method['name']}"}
    if "kind" in scenario:
        scenario = {"kind": f"{plug_in}:plan"}
    config = settings(
        tmp_path, data=data_of(few(*LIGHTS)), method=method, scenario=scenario, train={"max_iterations": 3}
    )
    assert ranks(config, 2) == [0, 0]
    assert len(RunFolder(tmp_path / "domains").finished_steps) == (1 if scenario else 3)


def test_two_processes_agree_on_every_weight_of_batches_in_parts(tmp_path):
    """Two updates per batch, each of two parts: gradients are exchanged once per update, those not used included."""
    plug_in = tmp_path / "mine.py"
    plug_in.write_text(CHECKED + OWN_PLAN)
    method = {"name": f"{plug_in}:Mdil", "updates": "two"}
    train = {"max_iterations": 3, "accumulate": 2, "clip_norm": 0.1, "ema": 0.5}
    assert ranks(settings(tmp_path, data=data_of(few(*LIGHTS)), method=method, train=train), 2) == [0, 0]
    assert len(RunFolder(tmp_path / "domains").finished_steps) == 3


# ---------------------------------------------------------------- from scratch, and all at once


def test_every_step_from_scratch_is_the_run_of_its_domain_alone_also_after_a_kill(tmp_path):
    """`freeze_encoder` acts from step 1 on, but not on a network that has learnt nothing."""
    options = {"method": {"name": "ft", "freeze_encoder": True}, "train": {"checkpoint_every": 1}}
    alone = settings(tmp_path / "alone", data=data_of(few("dusk")), **options)
    single = settings(tmp_path, data=data_of(few("day", "dusk")), scenario={"single": True}, **options)
    assert complete(alone) == 0
    folder = RunFolder(tmp_path / "domains")
    killed(single, "name", 1, "01/ckpt/it-*[0-9]")
    assert complete(single) == 0
    one, other = (f.final(i) for f, i in ((folder, 1), (RunFolder(tmp_path / "alone/domains"), 0)))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert [tuple(folder.counts(step)) for step in (0, 1)] == [("day",), ("dusk",)]
    assert folder.load_final(1)[0].branches == ("dusk",)
    done = everseg.run(single, quiet=True)
    assert done.sequence.miou.keys() == {"day", "dusk"}
    assert done.sequence.relative_drop is None


def test_single_task_models_of_a_mixed_sequence_are_scored_apart(tmp_path):
    """The second model of a domain does not continue the first one: no forgetting between them."""
    steps = [{"domain": "day", "classes": ["red", "green"]}, {"domain": "day", "add": ["blue"]}]
    config = settings(
        tmp_path,
        data=data_of(few("day")),
        scenario={"single": True, "steps": steps},
        train={"max_iterations": 1},
    )
    done = everseg.run(config, quiet=True)
    assert [row.classes for row in done.steps] == [("red", "green"), ("blue",)]
    assert done.sequence.forgetting == Change(None, domains={"day": None})
    assert done.sequence.miou == {"day": done.steps[1].miou["all"]}


def test_multi_task_training_takes_turns_and_every_head_learns(tmp_path, monkeypatch):
    seen, losses = [], FineTuning.losses

    def spied(self, batch, ctx):
        seen.append((batch.branch, tuple(batch.ids)))
        return losses(self, batch, ctx)

    monkeypatch.setattr(FineTuning, "losses", spied)
    config = settings(tmp_path, data=data_of(few("day", "dusk")), method={"name": "ft"},
                      scenario={"joint": True}, train={"epochs": 8, "lr": 0.01})  # fmt: skip
    done = everseg.run(config, quiet=True)
    assert [branch for branch, _ in seen] == ["day", "dusk"] * 16
    assert all(name.startswith(branch) for branch, names in seen for name in names)
    assert sorted(name for branch, names in seen[:4] for name in names) == sorted(
        f"{light}-train-{i:03d}" for light in ("day", "dusk") for i in range(8)
    ), "an epoch shows every image of both"
    lines = terms(done.path, 0)
    assert [sorted(line) for line in lines] == [["ce/day"], *[["ce/day", "ce/dusk"]] * 31]
    for number, branch in enumerate(("day", "dusk")):
        own = [line[f"ce/{branch}"] for line in lines[number::2]]
        assert sum(own[-4:]) < 0.8 * sum(own[:4])
    assert tuple(done.folder.counts(0)) == ("day", "dusk")


# ---------------------------------------------------------------- every method, paths of its own and shared ones

REGULARISED = {"lwf": "kd", "lwf-mc": "kd", "ilt": "kd", "ewc": "penalty", "rw": "penalty", "pi": "penalty",
               "mdil": "kd", "mdil+mib": "kd_domains", "complete": "kd", "rcil": "kd", "plop": "pod",
               "reminder": "pod"}  # fmt: skip
FEATURES = {"feature", "spatial", "channel", "attention"}
"""Names of terms that compare features."""
PRETUNED = ("nest",)
"""Methods that begin with a pre-tuning, which a run without a path that grows refuses."""
SHARED_DECODER = ("rcil",)
"""Methods that change what domains share, decoder included, and refuse a decoder per domain."""
ONE_DOMAIN = ("acil", "dft*", "dkd", "star", "ssul", "barm", "microseg")
"""Methods of one domain's classes."""
ADDS_CLASSES = ("nest",)
"""Methods that act where classes join others of their branch, and refuse a run without such a step."""


@pytest.mark.parametrize(
    "method", [m for m in registry.BUILTIN["method"] if m not in (*SHARED_DECODER, *ADDS_CLASSES)]
)
def test_every_method_runs_with_a_decoder_per_domain(tmp_path, method):
    """Distillation keeps the old domain's outputs; MiB, which knows one path only, learns plainly."""
    model = DEEPLAB
    if method in NETWORKS:
        need_transformers()
        network = NETWORKS[method]
        model = {**network, "options": {**network["options"], "per_branch": "decoder"}}
    config = settings(tmp_path, data=data_of(few("day", "dusk")), model=model, method={"name": method},
                      train={"max_iterations": 2})  # fmt: skip
    if method in PRETUNED or method in ONE_DOMAIN:
        with pytest.raises(ConfigError, match="one domain" if method in ONE_DOMAIN else r"method\.pretune"):
            everseg.run(config, quiet=True)
        return
    done = everseg.run(config, quiet=True)
    assert tuple(done.folder.counts(1)) == ("day", "dusk")
    names = set(terms(done.path, 1)[-1])
    wanted = {REGULARISED[method]} if method in REGULARISED else set()
    assert names - {"ce", "bce"} - FEATURES == wanted
    before, after = (of_branch(weights(done.folder, step), "day") for step in (0, 1))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", registry.BUILTIN["method"])
def test_every_method_runs_through_a_branch_that_domains_share(tmp_path, method):
    """The second domain brings one class more: the shared path grows, and both domains are tested through it."""
    domains = {**few("day"), "dusk": domain("dusk", names=["red", "green", "violet"], **FEW)}
    steps = [{"domain": "day", "branch": "street"}, {"domain": "dusk", "branch": "street"}]
    model = DEEPLAB
    if method in NETWORKS:
        need_transformers()
        model = NETWORKS[method]
    if method in SHARED_DECODER:
        model = {**DEEPLAB, "options": {**DEEPLAB["options"], "per_branch": "head", "compensation": True}}
    if method in MAPS:
        for name, one in domains.items():
            one["extra"] = {
                MAPS[method]: maps(tmp_path / "maps" / name, MAPS[method], build(**one["options"]))
            }
    config = settings(tmp_path, data=data_of(domains), model=model, method={"name": method},
                      scenario={"steps": steps}, train={"max_iterations": 2})  # fmt: skip
    done = everseg.run(config, quiet=True)
    assert {name: counts.shape for name, counts in done.folder.counts(1).items()} == {
        "day": (5, 5),
        "dusk": (5, 5),
    }
    assert done.folder.spaces(1)["street"].names == ("background", "red", "green", "blue", "violet")
    if method == "acil":  # no terms: its later steps have no gradients
        assert not terms(done.path, 1)
        return
    names = set(terms(done.path, 1)[-1]) - {"ce", "bce"} - FEATURES
    wanted = {
        "mib": {"kd"},
        "mdil+mib": {"kd"},
        "mdil": set(),
        "ft": set(),
        "sats": {"kd"},
        "ewf": {"kd"},
        "complete": {"kd"},
        "nest": {"kd"},
        "mbs": {"kd", "class", "token"},
    }
    wanted |= {
        "sdr": {"kd", "attraction", "repulsion", "matching", "sparsity"},
        "ucd": {"kd", "contrast"},
        "reminder": {"pod", "csw"},
        "dkd": {"mbce", "kd", "positive", "negative", "auxiliary"},
        "star": {"mbce", "features", "background", "drawn", "contrast"},
        "microseg": {"unseen"},
        "barm": {"triplet", "residual", "features", "kd"},
    }
    assert names == wanted.get(method, {REGULARISED[method]} if method in REGULARISED else set())


@pytest.mark.parametrize(
    "model", [DEEPLAB, {**ERFNET, "options": {**ERFNET["options"], "per_branch": "decoder"}}]
)
def test_feature_extraction_leaves_the_encoder_alone(tmp_path, model):
    config = settings(tmp_path, data=data_of(few("day", "dusk")), model=model, train={"max_iterations": 2},
                      method={"name": "ft", "freeze_encoder": True})  # fmt: skip
    folder = everseg.run(config, quiet=True).folder
    one, two = (weights(folder, step) for step in (0, 1))
    encoder = [name for name in two if name.startswith("encoder.")]
    assert any("running_var" in name for name in encoder)
    assert all(torch.equal(one[name], two[name]) for name in encoder)
    assert any(name.startswith("decoder.paths.dusk.") for name in two)


def test_domains_share_classes_under_other_names(tmp_path):
    german = domain("dusk", names=["rot", "green", "blau"], rename={"rot": "red", "blau": "blue"}, **FEW)
    steps = [{"domain": "day"}, {"domain": "dusk", "branch": "day"}]
    config = settings(tmp_path, data=data_of({**few("day"), "dusk": german}), scenario={"steps": steps},
                      train={"max_iterations": 1})  # fmt: skip
    folder = everseg.run(config, quiet=True).folder
    assert folder.spaces(1)["day"].names == ("background", "red", "green", "blue")
    assert folder.load_final(1)[0].head("day").sizes == (4,)
    truth = build(light="dusk", **FEW).splits["val"]
    pixels = np.bincount(np.concatenate([truth.read_mask(i).ravel() for i in range(4)]), minlength=4)
    np.testing.assert_array_equal(folder.counts(1)["dusk"].sum(1), pixels)


def test_class_weights_change_the_loss(tmp_path):
    found = {}
    for kind in ("none", "computed"):
        config = settings(tmp_path / kind, scenario={"class_weights": kind}, train={"max_iterations": 1})
        found[kind] = terms(everseg.run(config, quiet=True).path, 0)[0]["ce"]
    assert abs(found["none"] - found["computed"]) > 1e-3


# ---------------------------------------------------------------- classes and domains in one sequence


def test_a_mixed_sequence_holds_a_grown_branch_with_mib_and_the_others_with_mdil(tmp_path):
    steps = [
        {"domain": "day", "classes": ["red", "green"]},
        {"domain": "dusk"},
        {"domain": "day", "add": ["blue"]},
    ]
    config = settings(tmp_path, data=data_of(few("day", "dusk")), scenario={"steps": steps},
                      method={"name": "mdil+mib"}, train={"max_iterations": 2})  # fmt: skip
    done = everseg.run(config, quiet=True)
    assert [set(terms(done.path, step)[-1]) for step in range(3)] == [
        {"ce"},
        {"ce", "kd_domains"},
        {"ce", "kd", "kd_domains"},
    ]
    assert [{n: len(c) for n, c in done.folder.counts(step).items()} for step in range(3)] == [
        {"day": 3},
        {"day": 3, "dusk": 4},
        {"day": 4, "dusk": 4},
    ]
    assert done.folder.load_final(2)[0].head("day").sizes == (3, 1)
    before, after = (of_branch(weights(done.folder, step), "dusk") for step in (1, 2))
    assert all(torch.equal(before[name], after[name]) for name in before)
    forgotten = done.sequence.forgetting.domains
    assert forgotten.keys() == {"day", "dusk"}
    assert None not in forgotten.values()


def test_a_checkpoint_with_other_domains_is_named(tmp_path):
    """A finished step of another run, whole in itself, lies where this run's own should."""
    for name, lights in (("a", ("day", "dusk")), ("b", ("fog", "dusk"))):
        config = settings(tmp_path, name=name, data=data_of(few(*lights)), train={"max_iterations": 1})
        everseg.run(config, quiet=True)
    folder = RunFolder(tmp_path / "b")
    for name in ("final", "metrics.json"):
        (folder.step(1) / name).rename(folder.step(1) / f"away-{name}")
    for path in RunFolder(tmp_path / "a").final(0).iterdir():
        (folder.final(0) / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"domains.*knows day .*continues fog "):
        everseg.run(config, quiet=True)
