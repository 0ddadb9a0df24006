"""Results over domains: relative drop, forgetting, scoring again, paths chosen per image, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from domain_toy import DEEPLAB, HERE, build, domain, settings
from safetensors.torch import load_file

import everseg
from everseg.deploy.serve import Served
from everseg.errors import ConfigError, DataError
from everseg.inference.domains import _table, _with_other
from everseg.labels import LabelSpace
from everseg.models.branch_choice import infer_branch
from everseg.reports.baselines import drop_against_single
from everseg.runs.commit import save_folder
from everseg.runs.model_folder import DOMAINS
from everseg.runs.run_folder import RunFolder
from saying import must_say

USER_CODE = [f"data.domains.{light}.dataset={HERE}" for light in ("day", "fog")]
FEW: dict[str, Any] = {"train": 8, "val": 4}
Outcome = Callable[..., tuple[int, str, str]]


def data_of(**domains: dict) -> dict:
    return {**settings(Path())["data"], "domains": domains}


def day_and_fog(**more: Any) -> dict:
    """Two domains; fog has no blue, and its label space is smaller."""
    return data_of(day=domain("day", **FEW), fog=domain("fog", rename={"blue": "ignore"}, **{**FEW, **more}))


LONG = {"epochs": 12, "batch": 2, "lr": 0.02}
SHORT = {"epochs": 1, "batch": 4}
"""Two iterations; a run that `train.max_iterations` cuts short would be no baseline for that reason alone."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run of MDIL and three single-task runs, of which only the last one's numbers compare with it."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs")
    everseg.run(settings(out, name="mdil", data=day_and_fog(), train=LONG), quiet=True)
    single = {"scenario": {"single": True}, "method": {"name": "ft"}}
    everseg.run(
        settings(out, name="a-other-images", data=day_and_fog(val=5), train=SHORT, **single), quiet=True
    )
    steps = [
        {"domain": "day", "classes": ["red"]},
        {"domain": "day", "add": ["green", "blue"]},
        {"domain": "fog"},
    ]
    parts = {**single, "scenario": {"single": True, "steps": steps}}
    everseg.run(settings(out, name="b-other-classes", data=day_and_fog(), train=SHORT, **parts), quiet=True)
    everseg.run(
        settings(out, name="c-joint", data=day_and_fog(), train=SHORT, scenario={"joint": True}), quiet=True
    )
    wider = {**day_and_fog()["domains"], "dusk": domain("dusk", **FEW)}
    everseg.run(settings(out, name="single", data=data_of(**wider), train=LONG, **single), quiet=True)
    return out


@pytest.fixture
def mdil(runs: Path) -> everseg.Run:
    return everseg.Run(RunFolder(runs / "mdil"))


def miou(counts: np.ndarray) -> float:
    """By hand, over the classes with true pixels, with the authors' eps."""
    values = [
        counts[c, c] / (counts[c].sum() + counts[:, c].sum() - counts[c, c] + 1e-6)
        for c in range(len(counts))
        if counts[c].sum()
    ]
    return float(np.mean(values))


# ---------------------------------------------------------------- over the sequence


def test_forgetting_is_the_best_earlier_score_less_the_last(mdil: everseg.Run) -> None:
    first, last = (mdil.folder.counts(step) for step in (0, 1))
    forgetting = mdil.sequence.forgetting
    lost = miou(first["day"]) - miou(last["day"])
    assert forgetting.domains == {"day": pytest.approx(lost, abs=1e-8), "fog": None}
    assert forgetting.mean == pytest.approx(lost, abs=1e-8)
    assert mdil.sequence.backward_transfer.domains["day"] == pytest.approx(-lost, abs=1e-8)
    means = [miou(first["day"]), (miou(last["day"]) + miou(last["fog"])) / 2]
    assert mdil.sequence.average_miou == pytest.approx(np.mean(means), abs=1e-8)
    assert mdil.sequence.miou == {
        name: pytest.approx(miou(counts), abs=1e-8) for name, counts in last.items()
    }
    assert abs(lost) > 1e-4, "nothing moved; this comparison says nothing"


def test_relative_drop_is_from_the_single_task_run_with_the_same_data_and_classes(
    runs: Path, mdil: everseg.Run
) -> None:
    """Other images, other classes, a joint run: earlier by name, yet not taken; a further domain does no harm."""
    alone = RunFolder(runs / "single")
    baselines = {"day": miou(alone.counts(0)["day"]), "fog": miou(alone.counts(1)["fog"])}
    last = mdil.folder.counts(1)
    drops = {name: (miou(last[name]) - base) / base for name, base in baselines.items()}
    drop = mdil.sequence.relative_drop
    assert drop is not None
    assert drop.source == "single"
    assert drop.baselines == {name: pytest.approx(value, abs=1e-8) for name, value in baselines.items()}
    assert drop.domains == {name: pytest.approx(value, abs=1e-6) for name, value in drops.items()}
    assert drop.mean == pytest.approx(np.mean(list(drops.values())), abs=1e-6)


def test_relative_drop_is_unknown_beside_other_data(runs: Path, tmp_path: Path, call: Outcome) -> None:
    for name in ("mdil", "a-other-images", "b-other-classes", "c-joint"):
        shutil.copytree(runs / name, tmp_path / name)
    mdil = everseg.Run(RunFolder(tmp_path / "mdil"))
    assert mdil.sequence.relative_drop is None
    refused = list[str]()
    assert drop_against_single(mdil.results, mdil.config, refused) is None
    assert refused == [
        "b-other-classes is not a baseline: domain 'day' was tested with other classes (red only here)."
    ]
    (tmp_path / "run.yaml").write_text(
        json.dumps(settings(tmp_path, name="mdil", data=day_and_fog(), train=LONG))
    )
    code, out, _ = call("run", tmp_path / "run.yaml")
    assert code == 0
    must_say(out, "relative drop: no single-task")


def test_given_single_task_numbers_win_also_for_a_finished_run(
    runs: Path, tmp_path: Path, call: Outcome
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings(runs, name="mdil", data=day_and_fog(), train=LONG)))
    code, out, err = call("run", config, "scenario.single_task={day: 40.0, fog: 80}", "--json", "--quiet")
    assert code == 0, err
    drop = json.loads(out)["relative_drop"]
    last = RunFolder(runs / "mdil").counts(1)
    assert drop["source"] == "scenario.single_task"
    assert drop["domains"] == {
        "day": pytest.approx(miou(last["day"]) / 0.4 - 1, abs=1e-6),
        "fog": pytest.approx(miou(last["fog"]) / 0.8 - 1, abs=1e-6),
    }
    code, text, _ = call("run", config, "scenario.single_task={day: 40, fog: 80}", "--quiet")
    assert f"{100 * drop['mean']:.1f} %" in text
    code, _, err = call("run", config, "scenario.single_task={day: 40, frog: 80}", "--quiet")
    assert code == 2
    assert "(day, fog)" in err
    assert "got day, frog" in err


# ---------------------------------------------------------------- scoring again


@pytest.mark.parametrize("step", [0, 1])
def test_eval_gives_the_numbers_of_the_run(mdil: everseg.Run, call: Outcome, step: int) -> None:
    code, out, err = call("eval", mdil.path, *USER_CODE, "--step", step, "--json", "--quiet")
    assert code == 0, err
    found, counts = json.loads(out), mdil.folder.counts(step)
    assert found["confusion"] == {name: value.tolist() for name, value in counts.items()}
    assert found["branches"] == mdil.folder.metrics(step)["branches"]
    assert found["images"] == 4 * (step + 1)


def test_eval_of_one_domain_needs_the_data_of_that_domain_alone(mdil: everseg.Run) -> None:
    found = everseg.evaluate(mdil.path, overrides=USER_CODE, domain="fog", quiet=True)
    ((name, counts),) = found.confusion.items()
    assert (name, counts.tolist()) == ("fog", mdil.folder.counts(1)["fog"].tolist())
    with pytest.raises(ConfigError, match=r"--domain dawn: step 1 of .* knows day, fog"):
        everseg.evaluate(mdil.path, overrides=USER_CODE, domain="dawn", quiet=True)
    with pytest.raises(ConfigError, match=r"--domain fog: step 0 of .* knows day"):
        everseg.evaluate(mdil.path, overrides=USER_CODE, step=0, domain="fog", quiet=True)


def test_eval_of_what_only_a_part_of_a_shared_branch_knows_gives_the_numbers_of_the_run(
    tmp_path: Path,
) -> None:
    """Day was not taught blue, so its blue pixels are not scored, though the path learnt blue from fog; images
    without any class are scored where the run scored them."""
    domains = data_of(day=domain("day", **FEW), fog=domain("fog", **FEW))
    steps = [{"domain": "day", "branch": "road", "classes": ["red"]}, {"domain": "fog", "branch": "road"}]
    done = everseg.run(
        settings(tmp_path, data=domains, model=DEEPLAB, scenario={"steps": steps}, train=SHORT), quiet=True
    )
    assert done.folder.counts(1)["day"].sum(1)[2:].tolist() == [0, 0]
    assert done.folder.counts(1)["fog"].sum(1)[2:].min() > 0
    found = everseg.evaluate(done.path, overrides=USER_CODE, quiet=True)
    for name, counts in done.folder.counts(1).items():
        assert found.confusion[name].tolist() == counts.tolist()
    with pytest.raises(ConfigError, match=r"--domain road: step 1 of .* knows day, fog"):
        everseg.evaluate(done.path, overrides=USER_CODE, domain="road", quiet=True)
    other = [f"data={HERE}", "data.options.light=dusk"]
    assert everseg.evaluate(done.path, overrides=[*USER_CODE, *other], domain="road", quiet=True).images == 6
    image, bare = build(light="fog").splits["val"].read(0)[0], tmp_path / "elsewhere"
    shutil.copytree(done.folder.final(1), bare)
    for place in (done.path, bare):
        model = everseg.load(place)
        by_domain, by_branch = (model.predict(image, branch=name) for name in ("fog", "road"))
        assert by_domain.branch == by_branch.branch == "road"
        np.testing.assert_array_equal(by_domain.ids, by_branch.ids)
        with pytest.raises(ConfigError, match=r"--domain dusk: .*road, day, fog"):
            model.check_branch("dusk")
    assert done.folder.about(0).domains == {"day": "road"}


def test_a_model_folder_of_before_domains_were_recorded_still_loads(
    mdil: everseg.Run, tmp_path: Path
) -> None:
    final = mdil.folder.final(1)
    document = {**json.loads((final / "classes.json").read_text()), "domains": ["day", "fog"], "crop": 32}
    del document["format"]
    tensors = {name: load_file(final / f"{name}.safetensors") for name in ("model", "method_state")}
    save_folder(tmp_path / "old", tensors, {"classes": document})
    assert everseg.load(tmp_path / "old").branch_of == {"day": "day", "fog": "fog"}


def test_images_of_the_background_alone_count_as_in_the_run(tmp_path: Path) -> None:
    plug_in = tmp_path / "bare.py"
    plug_in.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(HERE.rpartition(':')[0]).parent)!r})\n"
        "import domain_toy\nfrom domain_toy import Lit\nfrom dataclasses import replace\n"
        "class Bare(Lit):\n"
        "    def read_mask(self, index):\n"
        "        return super().read_mask(index) * (index > 1)\n"
        "    def fingerprint(self):\n        return super().fingerprint() + 'bare'\n"
        "def build(root=None, *, light='day', swap: bool = False):\n"
        "    names = ['green', 'red', 'blue'] if swap else None\n"
        "    made = domain_toy.build(light=light, train=8, names=names)\n"
        "    return replace(made, splits={**made.splits, 'val': Bare('val', 4, 32, light)})\n"
    )
    entry = {"dataset": f"{plug_in}:build", "options": {}}
    done = everseg.run(settings(tmp_path, data=data_of(day=entry), train=SHORT), quiet=True)
    counts = done.folder.counts(0)["day"]
    assert counts.sum() == 4 * 32 * 32
    named = f"data.domains.day.dataset={plug_in}:build"
    assert (
        everseg.evaluate(done.path, overrides=[named], quiet=True).confusion["day"].tolist()
        == counts.tolist()
    )
    swapped = everseg.evaluate(done.path, overrides=[named, "data.domains.day.options.swap=true"], quiet=True)
    rows = np.array(swapped.confusion["day"])[1:].sum(1)
    np.testing.assert_array_equal(rows, counts[[2, 1, 3]].sum(1), "classes are matched by name, not by id")


# ---------------------------------------------------------------- a domain never trained


def test_other_images_go_through_the_branch_that_is_named(mdil: everseg.Run, call: Outcome) -> None:
    """The images of dusk through the branch of day, counted again one by one."""
    other = [*USER_CODE, f"data={HERE}", "data.options.light=dusk", "data.options.val=5"]
    code, out, err = call("eval", mdil.path, *other, "--domain", "day", "--json", "--quiet")
    assert code == 0, err
    model = mdil.folder.load_final(1)[0]
    wanted = np.zeros((4, 4), np.int64)
    split = build(light="dusk", val=5).splits["val"]
    for index in range(5):
        image, mask = split.read(index)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            found = model(pixels, ("day",))["day"].logits[0].argmax(0).numpy()
        np.add.at(wanted, (mask.astype(int), found), 1)
    ((name, counts),) = json.loads(out)["confusion"].items()
    assert name == "toy-dusk"
    assert counts == wanted.tolist()


def test_a_data_set_that_is_named_is_never_taken_for_the_run_s_own(mdil: everseg.Run) -> None:
    """Also the one that runs over domains have in their unused `data.dataset`."""
    for named in ("data=demo", "data.dataset=demo", "data={dataset: demo}"):
        with pytest.raises(ConfigError, match=r"branch.*'demo'"):
            everseg.evaluate(mdil.path, overrides=[*USER_CODE, named], quiet=True)


def test_without_a_branch_other_images_are_refused(mdil: everseg.Run, call: Outcome) -> None:
    other = [*USER_CODE, f"data={HERE}", "data.options.light=dusk"]
    code, _, err = call("eval", mdil.path, *other, "--quiet")
    assert code == 2
    assert "'toy-dusk'" in err
    assert "--domain day or fog" in err
    assert "--infer-domain" in err
    code, _, err = call("eval", mdil.path, *other, "--domain", "day", "--infer-domain", "--quiet")
    assert code == 2
    assert "give one" in err
    strange = [*USER_CODE, f"data={HERE}", "data.options={names: [violet, pink, grey], background: false}"]
    with pytest.raises(DataError, match="no class name"):
        everseg.evaluate(mdil.path, overrides=strange, infer_domain=True, quiet=True)


@pytest.mark.parametrize("fog", ["fog", "day"])
def test_the_branch_of_each_image_is_chosen_and_told(mdil: everseg.Run, call: Outcome, fog: str) -> None:
    """Counted again one by one. Fog has no blue: what the path of day calls blue there is in a last column.

    Images of the day under the name of fog take that path.
    """
    arguments = (*USER_CODE, f"data.domains.fog.options.light={fog}", "--infer-domain", "--json", "--quiet")
    code, out, err = call("eval", mdil.path, *arguments)
    assert code == 0, err
    result = json.loads(out)
    model = mdil.folder.load_final(1)[0]
    right = 0
    for name, light, classes in (("day", "day", 4), ("fog", fog, 3)):
        wanted, taken = np.zeros((4, 4), np.int64), {"day": 0, "fog": 0}
        split = build(light=light, **FEW).splits["val"]
        for index in range(4):
            image, mask = split.read(index)
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
            (path,) = infer_branch(model, pixels)
            taken[path] += 1
            right += path == name
            with torch.no_grad():
                found = model(pixels, (path,))[path].logits[0].argmax(0).numpy()
            scored = mask < classes
            np.add.at(wanted, (mask[scored].astype(int), found[scored]), 1)
        assert result["inferred"][name] == taken
        assert result["confusion"][name] == wanted.tolist()
    assert result["accuracy"] == right / 8
    if fog == "day":
        assert wanted[:, 3].sum() > 0, "nothing was called blue; this comparison says nothing"
    for name, known in (("fog", ["red", "green"]), ("day", ["red", "green", "blue"])):
        scores = result["branches"][name]
        assert scores["classes"] == scores["new_classes"] == ["background", *known]
        assert len(scores["class_iou"]) == len(scores["class_accuracy"]) == 1 + len(known)
    assert result["branches"]["fog"]["miou"]["all"] == pytest.approx(miou(wanted), abs=1e-8)


def test_branches_for_other_images_are_chosen_among_all(mdil: everseg.Run) -> None:
    other = [*USER_CODE, f"data={HERE}", "data.options.light=dusk"]
    found = everseg.evaluate(mdil.path, overrides=other, infer_domain=True, quiet=True)
    assert found.accuracy is None
    assert sum(found.inferred["toy-dusk"].values()) == 6
    assert np.sum(found.confusion["toy-dusk"]) == 6 * 32 * 32


def test_branches_that_share_the_encoder_are_chosen_by_stored_features(tmp_path: Path) -> None:
    done = everseg.run(settings(tmp_path, data=day_and_fog(), model=DEEPLAB, train=SHORT), quiet=True)
    model = done.folder.load_final(1)[0]
    for light, stored in model.domain_statistics.items():
        split = build(light=light, **FEW).splits["train"]
        pixels = [torch.from_numpy(split.read(i)[0]).permute(2, 0, 1)[None] / 255 for i in range(len(split))]
        measured = model if light == "fog" else done.folder.load_final(0)[0]
        with torch.no_grad():
            maps = [measured.encode(one)["layer1"][0].numpy() for one in pixels]
        found = np.stack([np.concatenate([map.mean((1, 2)), map.std((1, 2))]) for map in maps])
        assert stored.count == len(split)
        np.testing.assert_allclose(stored.mean, found.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stored.covariance, np.cov(found.T, bias=True), rtol=1e-3, atol=1e-6)
    result = everseg.evaluate(done.path, overrides=USER_CODE, infer_domain=True, quiet=True)
    assert result.accuracy == 1
    bundle = everseg.export(done.path, tmp_path / "bundle", onnx=False).path
    assert (bundle / DOMAINS).read_bytes() == (done.folder.final(1) / DOMAINS).read_bytes()
    pixels = build(light="fog", **FEW).splits["val"].read(0)[0]
    assert everseg.load(bundle).predict(pixels, infer_domain=True).branch == "fog"
    served = Served(bundle)
    assert served.branches == ("day", "fog", "auto")
    assert served.predict(pixels, "auto")["domain"] == "fog"
    assert served.predict(pixels, "day")["domain"] == "day"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"scenario": {"steps": [{"domain": "day"}, {"domain": "fog"}, {"domain": "day"}]}},
            ["scenario.steps[2]: domain 'day' is named twice"],
        ),
        (
            {"scenario": {"steps": [{"domain": "dey"}]}},
            ["scenario.steps[0].domain", "no domain 'dey'", "'day'?"],
        ),
        (
            {"scenario": {"test_split": "test"}},
            ["domain 'day' has no split 'test'", "domain 'fog'", "train, val"],
        ),
        (
            {"scenario": {"kind": "class-incremental"}},
            ["data.domains names day, fog", "kind=domain-incremental"],
        ),
        ({"data": {"domains": {}}}, ["'domain-incremental' needs data.domains"]),
        (
            {"data": {"domains": {"day": {"dataset": "demo", "options": {"light": "noon"}}}}},
            ["data.domains.day.options.light", "'noon'"],
        ),
        ({"scenario": {"joint": True, "single": True}}, ["scenario.single"]),
        (
            {"model": {"name": "erfnet", "norm": "iabn"}},
            ["'erfnet'", "model.norm=iabn"],
        ),
        ({"model": {"name": "erfnet", "output_stride": 8}}, ["'erfnet'", "model.output_stride=8"]),
        (
            {"model": {"name": "erfnet", "options": {"per_branch": "norms"}}},
            ["per_branch 'norms'", "adapter"],
        ),
        (
            {"model": {"name": "deeplabv3-tiny", "options": {"per_branch": "x"}}},
            ["per_branch 'x'", "decoder"],
        ),
        ({"method": {"name": "mdil", "updates": "three"}}, ["method.updates", "two-legacy"]),
        ({"scenario": {"single_task": {"day": 30.0}}}, ["scenario.single_task", "day, fog", "got day"]),
    ],
    ids=lambda value: (
        "" if isinstance(value, list) else "-".join(f"{k}" for part in value.values() for k in part)
    ),
)
def test_settings_that_do_not_fit_are_one_message_and_write_nothing(
    tmp_path: Path, call: Outcome, changes: dict, parts: list[str]
) -> None:
    changes = {"data": day_and_fog(), **changes}
    if "domains" in changes["data"] and "size" not in changes["data"]:
        changes["data"] = {**day_and_fog(), **changes["data"]}
    (tmp_path / "run.yaml").write_text(json.dumps(settings(tmp_path / "runs", **changes)))
    code, out, err = call("run", tmp_path / "run.yaml", "--quiet")
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in err, err
    assert not (tmp_path / "runs").exists()


def test_a_domain_without_images_is_a_fault_of_the_data(tmp_path: Path, call: Outcome) -> None:
    config = settings(tmp_path / "runs", data=data_of(day=domain("day", train=8, val=0)))
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    code, _, err = call("run", tmp_path / "run.yaml", "--quiet")
    assert code == 3
    assert "data.domains.day: split 'val' has no image" in err


@pytest.mark.parametrize(
    ("domains", "part"),
    [
        (data_of(day=domain("day", **FEW), dusk=domain("dusk", **FEW)), "data.domains.dusk"),
        (data_of(fog=day_and_fog()["domains"]["fog"], day=domain("day", **FEW)), "data.domains"),
        (data_of(day=domain("day", **FEW)), "data.domains.fog"),
        (data_of(day=domain("day", **FEW), fog=domain("fog", **FEW)), "data.domains.fog.rename"),
    ],
    ids=["another", "order", "fewer", "rename"],
)
def test_a_run_is_not_continued_with_other_domains(
    runs: Path, tmp_path: Path, call: Outcome, domains: dict, part: str
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(settings(runs, name="mdil", data=domains, train=LONG)))
    before = sorted((runs / "mdil").rglob("*"))
    code, _, err = call("run", tmp_path / "run.yaml", "--quiet")
    assert code == 2
    must_say(err, "run with other settings")
    assert part in err
    assert sorted((runs / "mdil").rglob("*")) == before


def test_branches_are_chosen_for_images_whose_classes_are_spelt_otherwise(
    mdil: everseg.Run, call: Outcome
) -> None:
    """The same counts under the branches' names; what met nobody is told."""

    def found(names: str) -> dict[str, Any]:
        other = (*USER_CODE, f"data={HERE}", "data.options.light=dusk", f"data.options.names={names}")
        code, out, err = call("eval", mdil.path, *other, "--infer-domain", "--json", "--quiet")
        assert code == 0, err
        result = json.loads(out)
        assert all(f"note: {note}" in err for note in result["notes"])
        return result

    plain, spelt = found("[red, green, violet]"), found("[RED, gre-en, violet]")
    assert spelt["confusion"] == plain["confusion"]
    assert spelt["branches"] == plain["branches"]
    assert plain["branches"]["toy-dusk"]["classes"] == ["background", "red", "green"]
    assert [note.split(" ")[:3] for note in plain["notes"]] == [
        ["the", "model", "does"],
        ["data", "set", "'toy-dusk'"],
    ]
    assert "'violet' (" in plain["notes"][0]
    assert "no class 'blue'" in plain["notes"][1]
    assert spelt["notes"][2:] == plain["notes"]
    assert ["'RED'" in spelt["notes"][0], "'gre-en'" in spelt["notes"][1]] == [True, True]


def test_a_class_called_other_is_not_the_column_of_strange_classes() -> None:
    space = _with_other(LabelSpace(((0, 1),), ("background", "other")))
    assert _table(["background", "Other", "car"], space).tolist() == [0, 1, 2]
