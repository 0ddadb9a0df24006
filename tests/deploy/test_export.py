"""Bundles: complete, verified, with an ONNX file that gives what the model gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import domain_toy
import numpy as np
import pytest
import torch
from PIL import Image
from toy import settings
from untrained import make_bundle

import everseg
from everseg.data.class_colours import BACKGROUND_COLOUR
from everseg.deploy import bundle as bundle_module
from everseg.deploy.bundle import Contents, open_bundle, write_bundle
from everseg.deploy.class_ids import register, with_ids
from everseg.deploy.export import export
from everseg.deploy.onnx import Deployed, Parity, check_parity, to_onnx
from everseg.errors import CheckpointError, ConfigError, GateError
from everseg.labels import SYNTHETIC_BACKGROUND, LabelSpace
from everseg.models.build import deeplabv3_tiny
from everseg.models.erfnet import erfnet
from everseg.runs.commit import load_tensors, parent_of, verify
from everseg.runs.input_form import InputForm
from everseg.runs.model_folder import BundleClass, Registry, read_model_file, save_model
from everseg.runs.run_folder import RunFolder
from saying import must_say

FILES = {
    "MANIFEST.json", "MODEL_CARD.md", "classes.json", "lineage.json", "method_state.safetensors", "model.safetensors",
    "preprocessing.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps on coloured rectangles."""
    out = tmp_path_factory.mktemp("runs")
    return everseg.run(settings(out, train={"epochs": 2, "epochs_next": 1}), quiet=True).path


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory) -> Path:
    """The same as a bundle with its ONNX file, exported by a process that has done nothing else."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra `export` is not installed")
    path = tmp_path_factory.mktemp("bundles") / "bundle"
    command = [sys.executable, "-m", "everseg", "export", run, "-o", path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr
    return path


def test_a_bundle_holds_what_is_needed_and_no_pixels(run, tmp_path):
    made = export(run, tmp_path / "b", onnx=False)
    assert {path.name for path in made.path.iterdir()} == FILES
    assert verify(made.path) == made.digest
    assert made.lineage["final"] == verify(RunFolder(run).final(1))
    assert made.lineage["parent"] is None
    assert made.steps == 2
    assert [(c.id, c.name, c.step) for c in made.registry.classes] == [
        (0, "background", 0), (1, "red", 0), (2, "green", 0), (3, "blue", 1),
    ]  # fmt: skip
    recorded = json.loads((run / "scenario.json").read_text())["steps"]
    lists = [[source["sha256"] for source in entry["train"]] for entry in made.lineage["history"]]
    assert lists == [[source["sha256"] for source in step["train"]] for step in recorded]
    scores = made.lineage["history"][1]["scores"]["default"]
    assert scores["miou"] == RunFolder(run).metrics(1)["branches"]["default"]["miou"]
    card = (made.path / "MODEL_CARD.md").read_text()
    for text in (
        "| 3 | blue | 1 |",
        "## Steps",
        "## Weak classes",
        "Started from Python",
        made.lineage["run"]["config_hash"][:12],
    ):
        assert text in card, text


def test_a_bundle_is_loaded_and_predicts_like_the_run(run, tmp_path, call):
    made = export(run, tmp_path / "b", onnx=False).path
    image = np.random.RandomState(1).randint(0, 255, (50, 70, 3), dtype=np.uint8)
    assert np.array_equal(everseg.load(made).predict(image).ids, everseg.load(run).predict(image).ids)
    Image.fromarray(image).save(tmp_path / "one.png")
    code, _, err = call("predict", made, tmp_path / "one.png", "-o", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["3"] == "blue"
    code, _, err = call("predict", made, tmp_path / "one.png", "-o", tmp_path / "early", "--step", "0")
    assert code == 2
    must_say(err, "--step", str(made))


def test_an_earlier_step_and_a_model_folder_become_bundles_too(run, tmp_path):
    first = export(run, tmp_path / "first", step=0, onnx=False)
    assert [c.name for c in first.registry.classes] == ["background", "red", "green"]
    assert first.steps == 1
    plain = export(RunFolder(run).final(1), tmp_path / "plain", onnx=False)
    assert plain.registry == export(run, tmp_path / "whole", onnx=False).registry
    assert plain.lineage["history"] == []


def test_entries_that_a_later_everseg_wrote_are_carried_into_the_bundle(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    final = copy / "steps/01/final"
    about, parent = read_model_file(final), parent_of(final)
    weights, state = (load_tensors(final / f"{name}.safetensors") for name in ("model", "method_state"))
    shutil.rmtree(final)
    later = {"ensemble": {"kind": "mean"}}
    save_model(final, replace(about, unknown=later), weights, state, parent=parent)
    for number, source in enumerate((copy, final)):
        assert export(source, tmp_path / f"b{number}", onnx=False).about.unknown == later
    assert json.loads((tmp_path / "b0/classes.json").read_text())["ensemble"] == later["ensemble"]


def test_nothing_is_overwritten_and_nothing_left_half_written(run, tmp_path, call):
    (tmp_path / "b").mkdir()
    code, _, err = call("export", run, "--out", tmp_path / "b", "--no-onnx")
    assert code == 2
    assert "exists already" in err
    with pytest.raises(ConfigError, match="a bundle already"):
        export(export(run, tmp_path / "c", onnx=False).path, tmp_path / "d", onnx=False)
    with pytest.raises(CheckpointError, match="give a run folder"):
        export(tmp_path, tmp_path / "d", onnx=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_without_the_extra_the_message_names_it(run, tmp_path, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = call("export", run, "-o", tmp_path / "b")
    assert code == 2
    assert "everseg[export]" in err
    assert "--no-onnx" in err
    assert not (tmp_path / "b").exists()
    assert call("export", run, "-o", tmp_path / "b", "--no-onnx")[0] == 0


def test_a_damaged_bundle_is_not_used(run, tmp_path):
    made = export(run, tmp_path / "b", onnx=False).path
    (made / "MODEL_CARD.md").write_text("better")
    with pytest.raises(CheckpointError, match="MODEL_CARD"):
        open_bundle(made)
    with pytest.raises(CheckpointError, match="everseg export"):
        open_bundle(run)


def test_a_bundle_of_a_run_with_windows_predicts_through_them(tmp_path):
    data = {"evaluation": "sliding", "window": 24, "overlap": 0.25}
    config = settings(tmp_path, data=data, train={"epochs": 1, "epochs_next": 1})
    path = everseg.run(config, quiet=True).path
    made = export(path, tmp_path / "b", onnx=False).path
    assert json.loads((made / "preprocessing.json").read_text())["windows"] == {
        "side": 24, "overlap": 0.25,
    }  # fmt: skip
    image = np.random.RandomState(0).randint(0, 255, (60, 70, 3), dtype=np.uint8)
    one, other = everseg.load(path), everseg.load(made)
    assert other.form == one.form != InputForm()
    np.testing.assert_array_equal(one.predict(image).ids, other.predict(image).ids)


def test_ids_are_kept_and_never_used_again():
    space = LabelSpace(((0, 5), (7,)), ("background", "car", "bus"))
    first = register({"a": space}, [{"a": 2}, {"a": 1}], [0, 1])
    assert [(c.id, c.name, c.step) for c in first.classes] == [
        (0, "background", 0),
        (1, "car", 0),
        (2, "bus", 1),
    ]
    without = Registry(first.classes[:2], next_id=3)  # a later bundle that has no bus any more
    grown = LabelSpace(((0, 1), (9,)), ("background", "car", "van"))
    second = register({"a": grown}, [{"a": 2}, {"a": 1}], [0, 2], without)
    assert [(c.id, c.name, c.step) for c in second.classes] == [
        (0, "background", 0),
        (1, "car", 0),
        (3, "van", 2),
    ]
    assert second.classes[1].colour == first.classes[1].colour
    assert with_ids(grown, second).groups == ((0, 1), (3,))
    shared = register({"a": space, "b": grown}, [{"a": 2}, {"a": 1}, {"b": 3}], [0, 1, 2])
    assert [(c.id, c.name, c.branches) for c in shared.classes] == [
        (0, "background", ("a", "b")), (1, "car", ("a", "b")), (2, "bus", ("a",)), (3, "van", ("b",)),
    ]  # fmt: skip


def test_only_a_background_is_near_black_wherever_its_id_is():
    """A road model has none. Where another domain brings one later, all others keep the colour that they have."""
    street = LabelSpace(((0, 1),), ("road", "car"), background=None)
    first = register({"a": street}, [{"a": 2}], [0])
    assert BACKGROUND_COLOUR not in [entry.colour for entry in first.classes]
    field = LabelSpace(((0, 1),), ("background", "cow"))
    both = register({"a": street, "b": field}, [{"a": 2}, {"b": 2}], [0, 1], first)
    assert both.classes[:2] == first.classes
    assert [entry.name for entry in both.classes if entry.colour == BACKGROUND_COLOUR] == ["background"]
    assert len({entry.colour for entry in both.classes}) == 4
    old = Registry((BundleClass(0, "road", BACKGROUND_COLOUR, 0, ("a",)),), next_id=1)  # of earlier versions
    assert len({entry.colour for entry in register({"a": street}, [{"a": 2}], [0], old).classes}) == 2


def test_outputs_that_share_a_raw_id_have_lasting_ids_of_their_own():
    """Two data sets may number two classes alike in a branch that their domains share; outputs of ours have no id."""
    space = LabelSpace(((SYNTHETIC_BACKGROUND, 3, 1), (3, 1)), ("background", "sky", "road", "car", "bus"))
    registry = register({"street": space}, [{"street": 3}, {"street": 2}], [0, 1])
    assert with_ids(space, registry).groups == ((SYNTHETIC_BACKGROUND, 1, 2), (3, 4))


def test_more_classes_than_a_byte_holds_get_ids_beyond_it():
    space = LabelSpace(
        (tuple(range(250)), (250, 251, 252, 253, 254, 256)), tuple(f"c{i}" for i in range(256))
    )
    registry = register({"a": space}, [{"a": 250}, {"a": 6}], [0, 1])
    assert [entry.id for entry in registry.classes] == list(range(256))
    assert registry.next_id == 256


def test_the_onnx_file_says_what_it_is(bundle):
    import onnx

    assert {path.name for path in bundle.iterdir()} == {*FILES, "model.onnx", "example.py"}
    model = onnx.load(bundle / "model.onnx")
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert [entry["name"] for entry in about["classes"]] == ["background", "red", "green", "blue"]
    assert about["preprocessing"]["size"] is None
    opened = open_bundle(bundle)
    beside = json.loads((bundle / "preprocessing.json").read_text())
    assert (
        InputForm.of_preprocessing(about["preprocessing"])
        == InputForm.of_preprocessing(beside)
        == opened.about.form
    )
    assert [
        [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input
    ] == [["batch", "height", "width", 3]]
    parity = open_bundle(bundle).lineage["parity"]["default"]
    assert parity["logit_difference"] < 1e-4
    assert parity["equal_pixels"] > 0.9999
    assert len(parity["sizes"]) == 3


def test_the_onnx_file_names_no_file_of_this_machine(bundle):
    """PyTorch writes the stack of code lines to every node; a bundle is given away."""
    data = (bundle / "model.onnx").read_bytes()
    for place in (Path(everseg.__file__).parent, Path(torch.__file__).parent, Path.home(), Path.cwd()):
        if len(place.parts) > 1:
            assert str(place).encode() not in data, place
    assert b".py" not in data


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "everseg", "safetensors", "onnx", "onnxscript", "accelerate"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_example_needs_three_packages_only_and_predicts_like_everseg(bundle, run, tmp_path):
    assert len((bundle / "example.py").read_text().splitlines()) <= 36
    copy = tmp_path / "elsewhere"
    shutil.copytree(bundle, copy)
    image = np.asarray(
        Image.fromarray(np.random.RandomState(0).randint(0, 255, (9, 12, 3), np.uint8)).resize((75, 53))
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: the pixels lie on their side
    Image.fromarray(np.rot90(image)).save(tmp_path / "photo.png", exif=exif)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(copy / "example.py"), "photo.png"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "photo.png" in done.stdout
    with Image.open(tmp_path / "photo.mask.png") as mask:
        ids = np.asarray(mask)
    assert (ids == everseg.load(run).predict(image).ids).mean() > 0.999


def example(bundle: Path, image: np.ndarray, place: Path) -> np.ndarray:
    """The mask that a bundle's example.py gives, run without everseg and torch."""
    Image.fromarray(image).save(place / "given.png")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(bundle / "example.py"), "given.png"],
        cwd=place, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(place / "given.mask.png") as mask:
        return np.asarray(mask)


def test_a_network_without_a_graph_of_open_sizes_gets_one_of_a_single_size(
    run, bundle, tmp_path, monkeypatch, caplog
):
    """The bundle says the size, its example keeps to it, and everseg itself goes on taking any size."""
    file, asked = (bundle / "model.onnx").read_bytes(), []

    def one_size_alone(deployed, about, size=None):
        asked.append((size, about["preprocessing"].get("one_size", False)))
        if size is None:
            raise ConfigError("its layers ask for the size; leave it out")
        return file

    monkeypatch.setattr(bundle_module, "to_onnx", one_size_alone)
    monkeypatch.setattr(Deployed, "foreign", True)
    loaded = everseg.load(run)
    noise = np.random.RandomState(3)
    images = [noise.randint(0, 255, (*size, 3), dtype=np.uint8) for size in ((40, 52), (60, 30))]
    contents = Contents(loaded.model.cpu(), loaded.spaces, form=loaded.form)
    made = write_bundle(tmp_path / "b", contents, images=images, source="noise")
    assert asked == [(None, False), ((40, 52), True)]
    must_say(caplog.text, "40 x 52", "ask for the size")
    how = json.loads((made.path / "preprocessing.json").read_text())
    assert (how["size"], how["one_size"]) == ([40, 52], True)
    assert (made.parity["default"]["sizes"], made.parity["default"]["one_size"]) == ([[40, 52]], True)
    must_say((made.path / "MODEL_CARD.md").read_text(), "40 x 52", "only size")

    image = np.asarray(Image.fromarray(images[0][:9, :12]).resize((75, 53)))
    smaller = np.asarray(Image.fromarray(image).resize((52, 40), Image.Resampling.BILINEAR))
    predict = everseg.load(made.path).predict
    expected = Image.fromarray(predict(smaller).ids.astype(np.uint8)).resize(
        (75, 53), Image.Resampling.NEAREST
    )
    assert (example(made.path, image, tmp_path) == np.asarray(expected)).mean() > 0.999
    np.testing.assert_array_equal(predict(image).ids, loaded.predict(image).ids)


def test_a_graph_that_gives_something_else_is_refused(run, tmp_path, bundle, monkeypatch):
    images = [np.random.RandomState(3).randint(0, 255, (40, 52, 3), dtype=np.uint8)]
    loaded = everseg.load(run)
    deployed = Deployed(loaded.model.cpu(), "default", [0, 1, 2, 3], InputForm())
    file = (bundle / "model.onnx").read_bytes()
    assert check_parity(deployed, file, images, "noise").equal_pixels > 0.999
    next(deployed.model.parameters()).data.mul_(3)
    with pytest.raises(GateError, match=r"differs .*on noise"):
        check_parity(deployed, file, images, "noise")
    monkeypatch.setattr(bundle_module, "to_onnx", lambda *_: file)
    whole = Contents(deployed.model, loaded.spaces)
    with pytest.raises(GateError):
        write_bundle(tmp_path / "b", whole, images=images, source="noise")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda: deeplabv3_tiny(norm="iabn", pool_size=8, output_stride=8, widths=[8, 8, 8, 8]),
        lambda: erfnet(widths=[4, 8, 12], blocks=[0, 1]),
    ],
    ids=["deeplabv3", "erfnet"],
)
def test_every_size_gives_what_the_model_gives(build, tmp_path, monkeypatch):
    """Also maps smaller than the pooling window, and sides that are no multiple of the stride."""
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    traced = []
    trace = torch.export.export
    monkeypatch.setattr(
        torch.export, "export", lambda *given, **named: traced.append(1) or trace(*given, **named)
    )
    model = build()
    model.grow({"default": 3})
    model.eval()
    spaces = {"default": LabelSpace(((0, 1, 2),), ("background", "a", "b"))}
    sizes = [(33, 57), (40, 200), (97, 131), (160, 160)]
    images = [np.random.RandomState(0).randint(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]
    made = write_bundle(tmp_path / "b", Contents(model, spaces), images=images, source="noise")
    assert made.lineage["parity"]["default"]["logit_difference"] < 1e-5
    assert len(made.lineage["parity"]["default"]["sizes"]) >= 6
    assert (
        len(traced) == 1
    )  # a second time is as long again, and happens where the sides' least value is not given


def test_every_branch_has_its_file_and_a_shared_class_one_id(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(bundle_module, "require_onnx", lambda: None)
    monkeypatch.setattr(
        bundle_module, "to_onnx", lambda deployed, about, size: asked.append((deployed.branch, about)) or b"x"
    )
    monkeypatch.setattr(
        bundle_module, "check_parity", lambda *_, **__: Parity(1, "noise", ((33, 33),), 0.0, 1.0)
    )
    model = deeplabv3_tiny(widths=[8, 8, 8, 8], per_branch="norm")
    spaces = {}
    for path, last in (("day", "b"), ("night/1", "c")):
        model.grow({path: 3})
        spaces[path] = LabelSpace(((0, 1, 2),), ("background", "a", last))
    made = write_bundle(tmp_path / "b", Contents(model.eval(), spaces, domains={"dusk": "day"}))
    assert made.about.onnx == {"day": "model-day.onnx", "night/1": "model-night_1.onnx"}
    written = json.loads((made.path / "classes.json").read_text())["branches"]["night/1"]
    assert (written["ids"], written["onnx"]) == ([0, 1, 3], "model-night_1.onnx")
    assert [path for path, _ in asked] == ["day", "night/1"]
    assert [entry["id"] for entry in asked[1][1]["classes"]] == [0, 1, 3]
    image = np.zeros((40, 40, 3), np.uint8)
    loaded = everseg.load(made.path)
    assert loaded.predict(image, branch="dusk").branch == "day"


def test_where_one_graph_takes_one_size_only_all_of_the_bundle_do(tmp_path, monkeypatch):
    """One preprocessing.json states the size for all of them."""

    def graph(contents, registry, branch, images, source, only):
        size = only or ((32, 48) if branch == "dusk" else None)
        return f"{branch} {size}".encode(), Parity(1, "", ((32, 48),), 0.0, 1.0, size is not None), size

    def made(name: str, *branches: str) -> tuple[dict, dict, list[bytes]]:
        where = make_bundle(
            tmp_path / name, {branch: ["background", "crate"] for branch in branches}, onnx=True
        )
        how, lineage = (
            json.loads((where / f"{document}.json").read_text()) for document in ("preprocessing", "lineage")
        )
        return how, lineage["parity"], [path.read_bytes() for path in sorted(where.glob("*.onnx"))]

    monkeypatch.setattr(bundle_module, "require_onnx", lambda: None)
    monkeypatch.setattr(bundle_module, "_graph", graph)
    how, parity, files = made("bound", "day", "dusk")
    assert (how["size"], how["one_size"]) == ([32, 48], True)
    assert [one["one_size"] for one in parity.values()] == [True, True]
    assert files == [b"day (32, 48)", b"dusk (32, 48)"]
    how, parity, files = made("open", "day", "dawn")
    assert "one_size" not in how
    assert [one["one_size"] for one in parity.values()] == [False, False]
    assert files == [b"dawn None", b"day None"]


def test_a_wrong_architecture_is_told(monkeypatch):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")

    def refuse(*_, **__):
        raise RuntimeError("data-dependent control flow\nmore")

    monkeypatch.setattr("torch.onnx.export", refuse)
    model = deeplabv3_tiny()
    model.grow({"default": 2})
    with pytest.raises(ConfigError, match=r"open sizes .*control flow.*--no-onnx"):
        to_onnx(Deployed(model.eval(), "default", [0, 1], InputForm()), {})

    def refuse_at_length(*_, **__):
        raise RuntimeError(
            "Failed. \x1b[96mThis is step 1/3\x1b[0m\n- Modify the model\n## Exception summary\n\n"
            "<class 'torch.Violation'>: 4 not in range\n\nmore"
        )

    monkeypatch.setattr("torch.onnx.export", refuse_at_length)
    with pytest.raises(ConfigError) as error:
        to_onnx(Deployed(model.eval(), "default", [0, 1], InputForm()), {})
    must_say(error.value, "(torch.Violation: 4 not in range)")


def test_a_run_over_domains_keeps_its_branches_and_results(tmp_path, call):
    config = domain_toy.settings(tmp_path, train={"epochs": 1})
    made = export(everseg.run(config, quiet=True).path, tmp_path / "b", onnx=False)
    assert made.about.domains == {"day": "day", "dusk": "dusk"}
    assert {c.name: c.branches for c in made.registry.classes}["red"] == ("day", "dusk")
    card = (made.path / "MODEL_CARD.md").read_text()
    assert "branches day, dusk" in card
    assert card.count("| 1 | ") >= 2  # the second step was tested on both domains
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "one.png")
    assert call("predict", made.path, tmp_path / "one.png", "-o", tmp_path / "out")[0] == 2
    assert (
        call("predict", made.path, tmp_path / "one.png", "-o", tmp_path / "out", "--domain", "dusk")[0] == 0
    )
