"""What stands in a model folder's classes.json: one writer, one reader, read whole or refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

import everseg
from everseg.errors import CheckpointError
from everseg.labels import SYNTHETIC_VOID, LabelSpace
from everseg.runs.commit import save_folder
from everseg.runs.input_form import InputForm
from everseg.runs.model_folder import (
    FILE,
    FORMAT,
    BundleClass,
    ModelFile,
    Registry,
    is_model_folder,
    read_lineage,
    read_model_file,
    save_model,
)
from everseg.runs.place import model_folder_at

DAY = LabelSpace(((0, 3, 1), (4,)), ("background", "cat", "cow", "sheep"))
DUSK = LabelSpace(((0, 7, SYNTHETIC_VOID),), ("road", "sky", "void"), background=None)
ARCHITECTURE = {
    "name": "erfnet",
    "options": {"widths": [4, 6]},
    "growth": [{"day": 3, "dusk": 3}, {"day": 1}],
}
REGISTRY = Registry(
    tuple(
        BundleClass(i, name, (i, 20, 30), 0, paths)
        for i, (name, paths) in enumerate(
            [("background", ("day",)), ("cat", ("day",)), ("gone", ()), ("cow", ("day",)), ("road", ("dusk",)),
             ("sky", ("dusk",)), ("void", ("dusk",)), ("sheep", ("day",))]
        )
    ),
    next_id=9,
)  # fmt: skip
RUN = ModelFile(ARCHITECTURE, {"day": DAY, "dusk": DUSK}, {"noon": "day", "dusk": "dusk"}, fresh=True)
MODELS = {
    "run": RUN,
    "import": ModelFile(ARCHITECTURE, RUN.spaces, form=InputForm("resize", (512, 1024), "unit"), source="MDIL x.pth"),
    "bundle": ModelFile(
        ARCHITECTURE, RUN.spaces, RUN.domains, InputForm("sliding", (4, 4), window=24, overlap=0.25, bit_depth=16),
        registry=REGISTRY, onnx={"day": "model-day.onnx", "dusk": "model-dusk.onnx"},
    ),
    "bundle without ONNX": ModelFile(ARCHITECTURE, RUN.spaces, registry=REGISTRY),
    "of a later everseg": ModelFile(ARCHITECTURE, RUN.spaces, unknown={"ensemble": {"kind": "mean"}}),
}  # fmt: skip


def placed(folder: Path, document: Any) -> Path:
    """A folder with this document and a manifest that fits."""
    save_folder(folder, {"model": {}, "method_state": {}}, {"classes": document})
    return folder


def written(about: ModelFile) -> dict[str, Any]:
    return json.loads(json.dumps(about.document()))


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_written_reads_back_equal(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path / "m", MODELS[kind], {})
    assert read_model_file(tmp_path / "m") == MODELS[kind]
    assert written(MODELS[kind])["format"] == FORMAT == 2


def test_the_keys_of_older_versions_are_all_there() -> None:
    run, bundle = written(RUN), written(MODELS["bundle"])
    assert {"architecture", "branches", "domains", "fresh", "normalisation"} <= run.keys()
    assert run["branches"]["day"] == {
        "groups": [[0, 3, 1], [4]], "names": ["background", "cat", "cow", "sheep"], "background": 0,
    }  # fmt: skip
    assert {"size", "evaluation", "normalisation", "window", "overlap", "classes", "next_id"} <= bundle.keys()
    assert bundle["branches"]["dusk"] | {"groups": 0} == {
        "groups": 0, "names": ["road", "sky", "void"], "background": None, "ids": [4, 5, 6], "onnx": "model-dusk.onnx",
    }  # fmt: skip
    assert bundle["classes"][2] == {"id": 2, "name": "gone", "colour": [2, 20, 30], "step": 0, "branches": []}
    assert "classes" not in run


def test_files_without_a_number_are_read(tmp_path: Path) -> None:
    """The first layout: a run of then, an import of then (no form at all), and one with a list of domains."""
    old = {key: value for key, value in written(RUN).items() if key not in ("format", "bit_depth", "exif")}
    assert read_model_file(placed(tmp_path / "run", old)) == RUN
    bare = {key: old[key] for key in ("architecture", "branches")} | {"source": "MiB checkpoint a.pth"}
    found = read_model_file(placed(tmp_path / "import", bare))
    assert (found.form, found.fresh, dict(found.domains)) == (InputForm(), False, {})
    assert read_model_file(placed(tmp_path / "list", {**old, "domains": ["noon"]})).domains == {}


@pytest.mark.parametrize("number", [3, 99])
def test_a_later_format_says_what_to_do(tmp_path: Path, number: int) -> None:
    placed(tmp_path / "m", {**written(RUN), "format": number, "branches": "otherwise"})
    with pytest.raises(CheckpointError, match=rf"format {number}.* up to 2.*update everseg"):
        read_model_file(tmp_path / "m")


def test_unknown_entries_are_kept(tmp_path: Path) -> None:
    found = read_model_file(placed(tmp_path / "m", {**written(RUN), "ensemble": [1]}))
    assert found.unknown == {"ensemble": [1]}
    assert found.document()["ensemble"] == [1]


WRONG = {
    "branches": (["branches"], [3, [], {}, {"day": 3}], "branches"),
    "groups": (["branches", "day", "groups"], [3, [0, 1, 2, 3], [[0, 3, "a"], [4]], [[0, 3, True], [4]]], "groups"),
    "raw id": (["branches", "day", "groups"], [[[0, 3, 10**6], [4]], [[0, 3, -99], [4]], [[0, -1, -1], [4]]], "day"),
    "names": (["branches", "day", "names"], [3, "abcd", ["a", "b", "c"], ["a", "b", "c", 4], ["a", "b", "b", "c"],
                                             ["a", "b", "c", ""]], "day"),
    "background": (["branches", "day", "background"], [4, -1, True, "0", 0.0], "background"),
    "no architecture": (["architecture"], [None, 3, {"name": "erfnet"}], "architecture"),
    "name": (["architecture", "name"], [3, ["erfnet"]], "architecture"),
    "options": (["architecture", "options"], [3, []], "architecture"),
    "growth": (["architecture", "growth"], [3, {}, [3], [{"day": "4"}], [{"day": True}]], "growth"),
    "outputs": (["architecture", "growth"], [[], [{"day": 4}], [{"day": 4, "dusk": 2}], [{"day": -4, "dusk": 3}],
                                             [{"day": 4, "dusk": 3, "fog": 1}], [{"day": 10**400, "dusk": 3}]],
                "outputs"),
    "domains": (["domains"], [3, ["noon"], {"noon": "fog"}, {"noon": 3}], "domains"),
    "fresh": (["fresh"], [0, "no", []], "fresh"),
    "source": (["source"], [3, ["a"]], "source"),
    "size": (["size"], [3, [4], [4, "4"], [0, 4], [4, 10**9], [4, True]], "size"),
    "evaluation": (["evaluation"], [3, "tiles", ["crop"]], "evaluation"),
    "no window": (["window"], [None], "needs a window"),
    "window": (["window"], [0, "24", 24.0, 10**9], "window"),
    "overlap": (["overlap"], [1, -0.1, "a", float("nan"), float("inf")], "overlap"),
    "normalisation": (["normalisation"], [3, "zscore"], "normalisation"),
    "bit_depth": (["bit_depth"], [12, 8.0, "8", True], "bit_depth"),
    "exif": (["exif"], ["turn", 1], "exif"),
    "format": (["format"], [0, -1, True, "2", 2.0, None], "format"),
    "classes": (["classes"], [3, [3], [{}]], "classes"),
    "class id": (["classes", 0, "id"], [255, -1, True, "0", 1], "id"),
    "class name": (["classes", 0, "name"], ["", 3, "cat"], "name"),
    "colour": (["classes", 0, "colour"], [3, [1, 2], [1, 2, 256], [1, 2, -1], [1, 2, 0.5]], "colour"),
    "step": (["classes", 0, "step"], [-1, "0", 2**40], "step"),
    "branches of a class": (["classes", 0, "branches"], ["day", [3], ["fog"]], "branch"),
    "next id": (["next_id"], [7, 65_536, "9", None], "next_id"),
    "ids": (["branches", "day", "ids"], [[0, 1, 3], [0, 1, 3, 8], None], "ids"),
    "a class that is none": (["branches", "day", "names"], [["background", "cat", "cow", "goat"]], "goat"),
    "onnx": (["branches", "day", "onnx"], ["../model.onnx", "/model.onnx", "a/b", "a\\b", "..", "", "a\n/b", 3],
             "onnx"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, case: str) -> None:
    """Types, shapes, ranges, things that stand twice: each a CheckpointError that names the entry."""
    way, values, said = WRONG[case]
    for number, value in enumerate(values):
        document = copy.deepcopy(written(MODELS["bundle"]))
        place: Any = document
        for key in way[:-1]:
            place = place[key]
        place[way[-1]] = value
        placed(tmp_path / str(number), document)
        with pytest.raises(CheckpointError, match=f"(?i){FILE} is damaged.*{re.escape(said)}"):
            read_model_file(tmp_path / str(number))


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    document = {**written(RUN), "fresh": 3, "normalisation": "zscore", "domains": 4}
    document["branches"]["dusk"]["names"] = ["a", "a", "b"]
    with pytest.raises(CheckpointError) as caught:
        read_model_file(placed(tmp_path / "m", document))
    assert all(word in str(caught.value) for word in ("fresh", "normalisation", "domains", "twice"))


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"3", b"{}", b"[" * 100_000, b'{"branches": ' + b"9" * 5000 + b"}", b"\xff"]
)
def test_what_is_no_document_is_told(tmp_path: Path, text: bytes) -> None:
    save_folder(tmp_path / "m", {}, {}, files={FILE: text})
    with pytest.raises(CheckpointError, match=re.escape(FILE)):
        read_model_file(tmp_path / "m")


def test_a_changed_file_is_not_read(tmp_path: Path) -> None:
    path = placed(tmp_path / "m", written(RUN)) / FILE
    path.write_text(path.read_text().replace("cat", "dog"))
    with pytest.raises(CheckpointError, match="sha256 mismatch"):
        read_model_file(tmp_path / "m")


def test_where_a_model_lies(tmp_path: Path) -> None:
    placed(tmp_path / "step" / "final", written(RUN))
    assert (
        model_folder_at(tmp_path / "step")
        == model_folder_at(tmp_path / "step/final")
        == tmp_path / "step/final"
    )
    assert not is_model_folder(tmp_path / "step")
    with pytest.raises(CheckpointError, match="give a run folder"):
        model_folder_at(tmp_path)
    with pytest.raises(CheckpointError, match=r"not a bundle: .*classes\.json .*lasting ids"):
        RUN.lasting_ids(tmp_path)


@pytest.mark.parametrize(
    "change", [{"steps": -1}, {"steps": True}, {"steps": "1"}, {"history": 3}, {"history": [3]}]
)
def test_a_lineage_of_another_form_is_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    whole = {"steps": 1, "parent": None, "history": []}
    (tmp_path / "lineage.json").write_text(json.dumps({**whole, "more": 1}))
    assert read_lineage(tmp_path)["more"] == 1
    (tmp_path / "lineage.json").write_text(json.dumps({**whole, **change}))
    with pytest.raises(CheckpointError, match=f"lineage.json is damaged: {next(iter(change))}"):
        read_lineage(tmp_path)


# ---------------------------------------------------------------- one owner

ELSEWHERE = {
    "deploy/example.txt": "a bundle's example stands alone, without everseg",
    "deploy/example_channels.txt": "the same for images of N channels",
    "deploy/templates/browser.js": "a page that runs a bundle in the browser stands alone, too",
    "inference/for_tools.py": "as inference/predict.py, beside masks on the map",
    "inference/predict.py": "the file beside masks that names their ids: another thing of the same name",
}


def test_nobody_else_knows_the_file() -> None:
    """A second reader or writer asks runs/model_folder.py; texts for the user say what they mean in other words."""
    package = Path(everseg.__file__).parent
    texts = [
        path for path in package.rglob("*") if path.suffix in (".py", ".txt", ".yaml", ".j2", ".js", ".html")
    ]
    found = {path.relative_to(package).as_posix() for path in texts if "classes.json" in path.read_text()}
    assert found == {"runs/model_folder.py", *ELSEWHERE}
    writers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r'"(next_id|ids|onnx)":|\[["\']branches["\']\]\[', path.read_text())
    }
    # memory.json has an entry of the same name: whether the masks beside it hold raw or lasting ids
    assert writers <= {"runs/model_folder.py", "runs/memory.py", "deploy/serve.py"}
