"""Run folders and bundles of somebody else: reading them runs none of the code they name, and ends with a sentence."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import everseg
from everseg import registry
from everseg.deploy.asked import configuration
from everseg.deploy.bundle import Contents, open_bundle, write_bundle
from everseg.deploy.extend import extend
from everseg.engine.rescore import stored_config
from everseg.engine.sharing import share_first_step
from everseg.errors import CheckpointError, ConfigError
from everseg.labels import LabelSpace
from everseg.models.build import deeplabv3_tiny
from everseg.runs.commit import MANIFEST, save_folder
from everseg.runs.run_folder import RunFolder
from sealed import content, rewrite

Call = Callable[..., tuple[int, str, str]]

SMALL = {
    "dataset": "demo",
    "options": {"size": [48, 64], "num_train": 8, "num_val": 4},
    "crop": 32,
    "workers": 0,
}
TINY = {"widths": [8, 8, 8, 8], "hidden": 8, "norm": "bn"}
READERS = ("eval", "export", "report", "features", "compare")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps on generated images."""
    settings = {
        "name": "demo-mib", "out": str(tmp_path_factory.mktemp("honest")), "tracker": [], "report": False,
        "data": SMALL, "model": {"name": "deeplabv3-tiny", "options": TINY}, "method": "mib",
        "train": {"batch": 4, "max_iterations": 1, "threads": 1},
    }  # fmt: skip
    return everseg.run(settings, quiet=True).path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with code that leaves a mark when it is imported, by each way a name can lead to code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "imported"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nMine = build = None\n")
    (tmp_path / "evil.yaml").write_text("method: evil.py:Mine\n")

    class Installed:
        name = "evil"

        def load(self) -> None:
            mark.touch()

    monkeypatch.setattr(registry, "entry_points", lambda **_: [Installed()])
    return tmp_path


@pytest.fixture
def hostile(honest: Path, here: Path) -> Callable[[Any], Path]:
    """Make a copy of the run whose run.json holds another configuration (or, as bytes, anything at all)."""

    def make(config: Any) -> Path:
        run = here / "demo-mib"
        shutil.copytree(honest, run)
        if isinstance(config, bytes):
            (run / "run.json").write_bytes(config)
        else:  # an attacker makes the checksum fit
            rewrite(run / "run.json", lambda stored: stored.update(config=config))
        return run

    return make


def changed(run: Path, **sections: Any) -> dict[str, Any]:
    """The run's own configuration with some entries replaced."""
    config = json.loads((run / "run.json").read_text())["config"]
    for key, value in sections.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return config


def arguments(verb: str, run: Path) -> list[object]:
    more = {"export": ["--no-onnx", "-o", run.parent / "bundle"], "compare": ["--out", run.parent / "out"]}
    return [verb, run, *more.get(verb, [])]


# ---------------------------------------------------------------- what run.json may hold

NO_MAPPING = {
    "a preset": "demo-mib",
    "a file": "evil.yaml",
    "a list": [{"base": "evil.yaml"}],
    "base: a file": {"base": "evil.yaml"},
    "base: a preset": {"base": "demo-mib"},
    "preset": {"preset": "demo-mib"},
    "a shorthand": {"method": "evil.py:Mine"},
    "nested base": {"data": {"base": "evil.yaml"}},
    "a shorthand of data": {"data": "evil.py:build"},
    "an alias": {"task": "4-2", "protocol": "overlapped"},
    "deep": {"data": {"options": {"a": [[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]}}},
    "a huge number": {"train": {"epochs": 10**4000}},
    "not finite": {"train": {"lr": float("inf")}},
}


@pytest.mark.parametrize("case", NO_MAPPING)
@pytest.mark.parametrize("verb", READERS)
def test_anything_but_plain_settings_is_refused(
    hostile: Callable[[Any], Path], here: Path, call: Call, verb: str, case: str
) -> None:
    run = hostile(NO_MAPPING[case])
    code, _, err = call(*arguments(verb, run))
    assert code == 4, err
    assert "run.json" in err
    assert not (here / "imported").exists()


@pytest.mark.parametrize(
    "config", [{"base": "evil.yaml"}, {"method": {"name": "evil.py:Mine"}}], ids=["base", "method"]
)
def test_predicting_does_not_ask_the_configuration(
    hostile: Callable[[Any], Path], here: Path, call: Call, config: Any
) -> None:
    """What a model is stands beside its weights, so these verbs have no reason to read run.json."""
    run = hostile(config)
    Image.fromarray(np.full((40, 48, 3), 90, np.uint8)).save(here / "x.png")
    code, _, err = call("predict", run, here / "x.png", "-o", here / "masks")
    assert code == 0, err
    assert everseg.load(run).classes[0] == "background"
    with pytest.raises(CheckpointError, match="everseg export"):
        extend(run, data="demo", add=["tree"])
    assert not (here / "imported").exists()


def test_a_run_does_not_go_on_in_such_a_folder(
    hostile: Callable[[Any], Path], here: Path, call: Call
) -> None:
    hostile({"base": "evil.yaml"})
    code, _, err = call("run", "demo-mib", f"out={here}", "--quiet")
    assert code == 4, err
    assert not (here / "imported").exists()


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"config": {}, "threads": ' + b"9" * 5000 + b"}", b'{"config": {}, "threads": true}',
     b'{"config": {}, "threads": 1, "versions": [1]}', b'{"config": {}, "threads": 1, "argv": "rm"}', b"\xff\xfe"],
    ids=["nested deeply", "a huge number", "threads", "versions", "argv", "no text"],
)  # fmt: skip
def test_a_run_json_of_another_form_is_damage(
    hostile: Callable[[Any], Path], call: Call, verb: str, text: bytes
) -> None:
    code, _, err = call(*arguments(verb, hostile(text)))
    assert code == 4, err
    assert "run.json" in err


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [({"base": "evil.yaml"}, 4, "run.json"), ({"method": {"name": "evil.py:Mine"}}, 2, "other settings")],
)
def test_a_sweep_reads_what_lies_where_its_runs_would_no_other_way(
    hostile: Callable[[Any], Path], here: Path, call: Call, config: Any, code: int, said: str
) -> None:
    hostile(config).rename(here / "demo-mib-s0")
    found, _, err = call("sweep", "demo", "--methods", "mib", "--out", here, "--dry-run")
    assert found == code, err
    assert said in err
    assert not (here / "imported").exists()


@pytest.mark.parametrize("text", ["[1]", '{"runs": 3}', '{"runs": [3]}', '{"runs": [{}]}', "[" * 100_000])
def test_a_sweep_json_of_another_form_is_damage(here: Path, call: Call, text: str) -> None:
    (here / "out").mkdir()
    (here / "out" / "sweep.json").write_text(text)
    code, _, err = call("sweep", "demo", "--methods", "ft", "--out", here / "out", "--dry-run")
    assert code == 4, err
    assert "sweep.json" in err


# ---------------------------------------------------------------- names of code

NAMES = ["evil.py:Mine", "evil:Mine", "evil"]
"""A file, a module, and the entry point of an installed package."""
PLACES = {
    "method": ("method", {"name": "NAME"}),
    "model": ("model", {"name": "NAME"}),
    "data": ("data", {"dataset": "NAME"}),
    "scenario.kind": ("scenario", {"kind": "NAME"}),
    "data.domains.day.dataset": ("data", {"domains": {"day": {"dataset": "NAME"}}}),
}
NEEDED_BY = {"eval", "report", "features"}
"""What looks at images again, and so needs the run's data, scenario and model."""


def filled(value: Any, name: str) -> Any:
    return json.loads(json.dumps(value).replace("NAME", name))


@pytest.mark.parametrize(
    ("verb", "place", "name"),
    [
        (verb, place, name)
        for verb in READERS
        for place in PLACES
        for name in (
            NAMES if verb in ("eval", "compare") else NAMES[:1]
        )  # the others read through the same function
    ],
)
def test_code_that_a_run_names_is_never_imported_for_it(
    hostile: Callable[[Any], Path], honest: Path, here: Path, call: Call, verb: str, place: str, name: str
) -> None:
    section, value = PLACES[place]
    run = hostile(changed(honest, **{section: filled(value, name)}))
    code, _, err = call(*arguments(verb, run))
    assert not (here / "imported").exists()
    if verb in NEEDED_BY and place != "method":
        assert code == 2, err
        assert f"{place}={name}" in err, "the message says how to allow it"
    elif place == "data.domains.day.dataset":
        assert code in (0, 2, 4), err
    else:
        assert code == 0, err


DESCRIBED = {
    "data": {"dataset": "evil/data.yaml"},
    "data.domains.day.dataset": {"domains": {"day": {"dataset": "evil/data.yaml"}}},
}


@pytest.mark.parametrize("place", DESCRIBED)
@pytest.mark.parametrize("verb", READERS)
def test_a_data_yaml_that_a_run_names_imports_no_reader_of_an_installed_package(
    hostile: Callable[[Any], Path], honest: Path, here: Path, call: Call, verb: str, place: str
) -> None:
    """The folder's owner wrote both: run.json names the data.yaml, and its layout names a package installed here."""
    (here / "evil").mkdir()
    (here / "evil/data.yaml").write_text("layout: evil\nroot: .\n")
    run = hostile(changed(honest, data=DESCRIBED[place]))
    code, _, err = call(*arguments(verb, run))
    assert not (here / "imported").exists()
    if verb in NEEDED_BY:
        assert code == 2, err
        assert "layout 'evil'" in err
        assert f"{place}=evil/data.yaml" in err, "the message says how to allow it"


def test_a_data_yaml_that_the_user_names_may_name_an_installed_reader(
    hostile: Callable[[Any], Path], honest: Path, here: Path, call: Call
) -> None:
    (here / "data.yaml").write_text("layout: evil\nroot: .\n")
    run = hostile(changed(honest))
    stored_config(RunFolder(run), ["data=data.yaml"])
    assert not (here / "imported").exists(), "naming it is not importing it yet"
    call("eval", run, "data=data.yaml")
    assert (here / "imported").exists()
    # A description that cannot be read names nobody; the message is about the file.
    code, _, err = call("eval", hostile_again(run, "gone.yaml"), "--quiet")
    assert code == 2
    assert "gone.yaml: no such file" in err


def hostile_again(run: Path, dataset: str) -> Path:
    """The same run with another data set in its run.json."""
    rewrite(run / "run.json", lambda stored: stored["config"]["data"].update(dataset=dataset))
    return run


def test_code_runs_once_the_user_names_it(hostile: Callable[[Any], Path], honest: Path, here: Path) -> None:
    run = RunFolder(
        hostile(changed(honest, scenario={"kind": "evil.py:Mine"}, model={"name": "evil.py:build"}))
    )
    with pytest.raises(ConfigError) as caught:
        stored_config(run, ["scenario.kind=evil.py:Mine"])
    assert len(caught.value.problems) == 1, "the other one is still not named"
    stored_config(run, ["scenario.kind=evil.py:Mine", "model=evil.py:build"])
    assert not (here / "imported").exists(), "naming it is not importing it yet"


def test_a_run_object_reports_no_other_way(hostile: Callable[[Any], Path], honest: Path, here: Path) -> None:
    """Made of a folder alone, it was asked for by nobody."""
    run = hostile(changed(honest, scenario={"kind": "evil.py:Mine"}))
    with pytest.raises(ConfigError, match=r"scenario\.kind=evil\.py:Mine"):
        everseg.api.Run(RunFolder(run)).report()
    assert not (here / "imported").exists()


def test_the_command_in_a_report_is_made_without_the_method(
    hostile: Callable[[Any], Path], honest: Path, here: Path, call: Call
) -> None:
    """A run named like a preset is said as that preset with what differs, its method and numbers among it."""
    run = hostile({**changed(honest), "method": {"name": "evil.py:Mine", "kd_weight": 3.0}})
    code, _, err = call("report", run, "--images", 0)
    assert code == 0, err
    assert "method.name=evil.py:Mine method.kd_weight=3.0" in (run / "report.html").read_text()
    assert not (here / "imported").exists()


def test_a_first_step_is_shared_without_the_method(
    hostile: Callable[[Any], Path], honest: Path, here: Path
) -> None:
    source = hostile(changed(honest, method={"name": "evil.py:Mine"}))
    target = here / "target"
    target.mkdir()
    document = content(source / "run.json")
    for learning_rate, same in ((0.5, True), (0.4, False)):
        told = copy.deepcopy(document)
        told["config"]["train"] |= {
            "lr_next": 0.1,
            "lr": document["config"]["train"]["lr"] if same else learning_rate,
        }
        (target / "run.json").write_text(json.dumps(told))
        assert share_first_step(RunFolder(source), RunFolder(target)) is same
        shutil.rmtree(target / "steps", ignore_errors=True)
    assert not (here / "imported").exists()


# ---------------------------------------------------------------- models that name code


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "classes.json") -> Path:
    """The same folder with another document and a manifest that fits: an attacker writes both."""
    documents = {
        path.stem: json.loads(path.read_text()) for path in folder.glob("*.json") if path.name != MANIFEST
    }
    change(documents[Path(name).stem])
    tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    parent = json.loads((folder / MANIFEST).read_text())["parent"]
    shutil.rmtree(folder)
    save_folder(folder, tensors, documents, parent)
    return folder


def named(document: dict[str, Any]) -> None:
    document["architecture"]["name"] = "evil.py:build"


def test_a_model_that_names_its_builder_is_not_built(
    hostile: Callable[[Any], Path], honest: Path, here: Path, call: Call
) -> None:
    run = hostile(changed(honest))
    rewritten(run / "steps/01/final", named)
    for given in (("predict", run, here / "x.png", "-o", here / "o"), arguments("export", run)):
        code, _, err = call(*given)
        assert code == 4, err
        assert "--model" in err
    for place in (run, run / "steps/01/final"):
        with pytest.raises(CheckpointError, match="unknown model"):
            everseg.load(place)
    assert not (here / "imported").exists()


@pytest.fixture
def bundle(here: Path) -> Path:
    model = deeplabv3_tiny(**TINY)
    model.grow({"default": 2})
    contents = Contents(model.eval(), {"default": LabelSpace(((0, 1),), ("background", "road"))})
    return write_bundle(here / "bundle", contents, onnx=False).path


def test_a_bundle_that_names_its_builder_is_extended_once_the_user_names_one(
    here: Path, bundle: Path
) -> None:
    opened = open_bundle(rewritten(bundle, named))
    with pytest.raises(CheckpointError, match="unknown model"):
        everseg.load(bundle)

    def asked(model: str | None) -> str:
        return configuration(opened, "demo", ["tree"], "mib", "next", [], model).model.name

    with pytest.raises(ConfigError, match=r"model=evil\.py:build"):
        asked(None)
    assert asked("evil.py:build") == "evil.py:build"
    assert asked("mine.py:build") == "mine.py:build"
    assert not (here / "imported").exists()


def test_a_bundle_hands_on_settings_of_its_training_only(here: Path, bundle: Path) -> None:
    recipe = {
        "data": {"dataset": "evil.py:build", "root": "elsewhere", "options": {"a": 1}, "crop": 40},
        "scenario": {"kind": "evil.py:build", "bundle": "other", "policy": "plop", "lists": "elsewhere"},
        "train": {"epochs": 3, "epochs_next": 2, "max_time": 1.0},
        "model": {"name": "evil.py:build"}, "method": {"name": "evil.py:Mine", "a": 1}, "out": "elsewhere",
    }  # fmt: skip
    rewritten(bundle, lambda lineage: lineage.update(recipe=recipe), "lineage.json")
    config = configuration(open_bundle(bundle), "demo", ["tree"], "mib", "next")
    assert (config.data.dataset, config.data.root, config.data.options, config.data.crop) == (
        "demo",
        None,
        {},
        40,
    )
    assert (config.scenario.kind, config.scenario.policy, config.scenario.lists) == (
        "extension",
        "ignore-void",  # a label policy is a benchmark's rule, which no bundle hands on
        None,
    )
    assert (config.train.epochs, config.train.max_time, config.out) == (2, None, "runs")
    assert (config.model.name, config.method.name) == ("deeplabv3-tiny", "mib")
    assert "a" not in config.method.options
    assert not (here / "imported").exists()


@pytest.mark.parametrize(
    "recipe",
    [3, {"train": 3}, {"data": {"crop": "large"}}, {"data": {"crop": 10**4000}}, {"method": {"name": ["a"]}}],
)
def test_a_bundle_that_hands_on_nonsense_is_refused(here: Path, bundle: Path, recipe: Any) -> None:
    rewritten(bundle, lambda lineage: lineage.update(recipe=recipe), "lineage.json")
    with pytest.raises(CheckpointError, match="bundle"):
        configuration(open_bundle(bundle), "demo", ["tree"], "mib", "next")
