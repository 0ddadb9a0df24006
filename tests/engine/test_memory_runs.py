"""Runs with a memory: kills, processes and workers change nothing; copies stand for data that are gone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from processes import complete, killed, ranks, results
from toy import build, settings

import everseg
from everseg import registry
from everseg.config.loading import load
from everseg.engine.run import execute
from everseg.errors import CheckpointError, ConfigError
from everseg.runs.memory import read_memory
from everseg.runs.run_folder import RunFolder
from saying import must_say

SHORT = {"epochs": 1, "epochs_next": 1, "checkpoint_every": 2}
SPLIT = build().splits["train"]
PLAIN = {"name": f"{Path(__file__).with_name('plain_model.py')}:build"}


def memory(out, train=SHORT, **options) -> dict:
    """A run of three steps."""
    given = {"size": 6, "pseudo": 0.2, **options}
    return settings(out, scenario={"task": "1-1", "memory": given}, train=train)


def document(folder: Path, step: int) -> dict:
    return json.loads((folder / "toy" / "steps" / f"{step:02d}" / "final" / "memory.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    execute(load(memory(out, keep="files")), quiet=True)
    return out


def test_every_step_leaves_a_memory_balanced_over_the_classes_known(whole):
    for step in range(3):
        found = read_memory(RunFolder(whole / "toy").final(step))
        assert found is not None
        assert len(found.images) == 6
        owners = [kept.image.stored_for for kept in found.images]
        assert sorted(set(owners)) == list(range(1, step + 2))
        for kept in found.images:
            assert set(kept.image.labelled) <= set(kept.image.classes)
            assert kept.image.stored_for in kept.image.classes
            # Every step from the one that stored it on annotates it, if its class is there; nothing else is known.
            raw = set(SPLIT.read_mask(int(kept.image.id.split("-")[1])).flat)
            assert [s for s in range(min(kept.image.steps), step + 1) if s + 1 in raw] == [*kept.image.steps]
            assert [*kept.image.labelled] == [s + 1 for s in kept.image.steps]
        again = json.loads(json.dumps(found.document()))
        assert again == document(whole, step)
    # The model of a later step adds classes that no label shows.
    assert any(set(k["classes"]) > set(k["labelled"]) for k in document(whole, 2)["images"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"keep": "files"}, {"mix": "append", "selection": "reservoir", "keep": "files"}]
)
def test_kills_at_any_moments_change_nothing(tmp_path, options):
    undisturbed, config = memory(tmp_path / "a", **options), memory(tmp_path / "b", **options)
    assert complete(undisturbed) == 0
    for count in random.Random(str(options)).sample(range(25), 6):
        killed(config, "any", count)
    assert complete(config) == 0
    found = results(tmp_path / "b" / "toy")
    assert found == results(tmp_path / "a" / "toy")
    assert any("memory-" in name for name in found)


def test_a_kill_before_the_choice_changes_nothing(tmp_path, whole):
    config = memory(tmp_path, keep="files")
    killed(config, "name", pattern="*/steps/01/ckpt/it-00000002")
    assert complete(config) == 0
    assert results(tmp_path / "toy") == results(whole / "toy")


@pytest.mark.slow
def test_two_processes_choose_what_one_chooses(tmp_path):
    """Networks without batch statistics, so that one and two processes learn the same but for rounding."""
    for mix in ("replace", "append"):
        for world in (1, 2):
            config = {
                **memory(tmp_path / f"{mix}{world}", mix=mix, selection="reservoir", pseudo=0.5),
                "model": PLAIN,
            }
            codes = ranks(config, world) if world > 1 else [complete(config)]
            assert codes == [0] * world
        for step in range(3):
            one, two = (document(tmp_path / f"{mix}{world}", step) for world in (1, 2))
            assert [k["id"] for k in one["images"]] == [k["id"] for k in two["images"]]
            assert [k["stored_for"] for k in one["images"]] == [k["stored_for"] for k in two["images"]]


@pytest.mark.slow
def test_workers_change_nothing(tmp_path, whole):
    config = memory(tmp_path, keep="files")
    config["data"]["workers"] = 2
    assert complete(config) == 0
    assert results(tmp_path / "toy") == results(whole / "toy")


def test_copies_train_as_the_data_do(tmp_path, whole):
    execute(load(memory(tmp_path)), quiet=True)
    for step in range(3):
        name = f"toy/steps/{step:02d}/final/model.safetensors"
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
        for one, other in zip(
            document(tmp_path, step)["images"], document(whole, step)["images"], strict=True
        ):
            assert {**one, "files": None} == {**other, "files": None}
            assert one["files"] is None
            assert other["files"] is not None


@pytest.mark.parametrize("labels", ["as_stored", "seen", "current"])
def test_labels_of_the_memory_are_those_asked_for(tmp_path, labels):
    plug_in = tmp_path / "looks.py"
    plug_in.write_text(
        "from dataclasses import dataclass\nfrom everseg.methods.ft import FineTuning\nSEEN = {}\n"
        "@dataclass(kw_only=True)\nclass Looks(FineTuning):\n"
        "    def losses(self, batch, ctx):\n"
        "        if batch.memory is not None:\n"
        "            for name, label, old in zip(batch.ids, batch.label, batch.memory):\n"
        "                if old: SEEN.setdefault(ctx.step.index, set()).update(label.unique().tolist())\n"
        "        else:\n            assert ctx.step.index == 0\n"
        "        yield from super().losses(batch, ctx)\n"
    )
    config = memory(tmp_path, labels=labels, pseudo=None)
    config["method"] = {"name": f"{plug_in}:Looks"}
    execute(load(config), quiet=True)
    seen = registry.resolve("method", f"{plug_in}:Looks").losses.__globals__["SEEN"]
    expected = {
        "as_stored": [{0, 1}, {0, 1, 2}],
        "seen": [{0, 1, 2}, {0, 1, 2, 3}],
        "current": [{0, 2}, {0, 3}],
    }
    for step in (1, 2):
        assert seen[step] - {255} <= expected[labels][step - 1]
        assert max(seen[step] - {255}) == max(expected[labels][step - 1]) or labels == "as_stored"


def test_the_method_may_choose(tmp_path):
    plug_in = tmp_path / "own.py"
    plug_in.write_text(
        "from dataclasses import dataclass\nfrom everseg.methods.ft import FineTuning\n"
        "@dataclass(kw_only=True)\nclass Own(FineTuning):\n"
        "    wrong: bool = False\n"
        "    def select(self, ctx, candidates, size):\n"
        "        places = [place for place, batch in ctx.candidate_batches()]\n"
        "        assert sorted(places) == list(range(len(candidates)))\n"
        "        return [0, 0] if self.wrong else list(range(len(candidates)))[-size:]\n"
    )
    config = memory(tmp_path, selection="method", pseudo=None)
    config["method"] = {"name": f"{plug_in}:Own"}
    execute(load(config), quiet=True)
    assert len(document(tmp_path, 1)["images"]) == 6
    with pytest.raises(ConfigError) as error:
        execute(
            load({**config, "name": "other", "method": {"name": f"{plug_in}:Own", "wrong": True}}), quiet=True
        )
    must_say(error.value, "Own", "select", "6")


def test_a_list_of_names_is_kept_in_its_order(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("train-007\n\ntrain-002\ntrain-007\ntrain-011\n")
    execute(load(memory(tmp_path, selection="list", file=str(names), pseudo=None)), quiet=True)
    found = [k["id"] for k in document(tmp_path, 2)["images"]]
    assert found == [name for name in ("train-007", "train-002", "train-011") if name in found]
    names.write_text("train-007\nnobody\n")
    with pytest.raises(ConfigError) as error:
        execute(load({**memory(tmp_path, selection="list", file=str(names)), "name": "b"}), quiet=True)
    must_say(error.value, "scenario.memory.file", "nobody")


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"share": 0.2}, ["scenario.memory.share", "train.batch >= 5"]),
        ({"share": 0.25, "mix": "append"}, ["scenario.memory.share", "mix=replace"]),
        ({"selection": "list"}, ["scenario.memory.file"]),
        ({"pseudo": None, "pseudo_network": "unloaded"}, ["scenario.memory.pseudo"]),
        ({"size": 0, "share": 0.25}, ["scenario.memory.share", "scenario.memory.size"]),
        ({"sise": 3}, ["scenario.memory.sise", "'scenario.memory.size'"]),
    ],
)
def test_settings_that_cannot_work_are_refused_with_their_key(tmp_path, options, facts):
    with pytest.raises(ConfigError) as error:
        load(memory(tmp_path, **options))
    must_say(error.value, *facts)


def test_a_method_that_needs_material_is_refused_before_the_first_step(tmp_path):
    plug_in = tmp_path / "needy.py"
    plug_in.write_text(
        "from dataclasses import dataclass\nfrom everseg.methods.ft import FineTuning\n"
        "@dataclass(kw_only=True)\nclass Needy(FineTuning):\n"
        "    needs_memory = True\n    needs_extra = ('saliency', 'depth')\n"
    )
    config = settings(tmp_path, method={"name": f"{plug_in}:Needy"})
    with pytest.raises(ConfigError) as error:
        execute(load(config), quiet=True)
    for fact in ("scenario.memory.size", "data.extra.saliency", "data.extra.depth"):
        must_say(error.value, fact)
    assert not (tmp_path / "toy").exists()


def test_images_that_are_gone_are_named(tmp_path):
    config = memory(tmp_path, pseudo=None)
    execute(load(config), quiet=True)
    folder = RunFolder(tmp_path / "toy")
    found = read_memory(folder.final(0))
    assert found is not None
    damaged = (folder.final(0) / "memory.json").read_text().replace('"train-', '"lost-')
    (folder.final(0) / "memory.json").write_text(damaged)
    with pytest.raises(CheckpointError) as error:
        read_memory(folder.final(0))
    must_say(error.value, "memory.json")


@pytest.mark.slow
def test_the_unloaded_network_is_another_choice_and_repeats(tmp_path):
    for name in ("a", "b"):
        execute(load(memory(tmp_path / name, pseudo_network="unloaded", pseudo=0.0)), quiet=True)
    assert document(tmp_path / "a", 2) == document(tmp_path / "b", 2)


def test_a_memory_without_later_step_is_kept_for_a_bundle(tmp_path):
    config = settings(tmp_path, scenario={"task": "offline", "memory": {"size": 4}}, train=SHORT)
    everseg.run(config, quiet=True)
    assert len(document(tmp_path, 0)["images"]) == 4


def test_show_says_what_the_memory_will_hold(tmp_path):
    text = str(everseg.show(memory(tmp_path, size=100), scenario=True, quiet=True))
    (line,) = [one for one in text.splitlines() if one.startswith("memory:")]
    must_say(line, 100, "2 of the 4", "'ssul'", "references")
    appended = str(everseg.show(memory(tmp_path, mix="append"), scenario=True, quiet=True))
    must_say(appended, "memory:", "6", "longer")
