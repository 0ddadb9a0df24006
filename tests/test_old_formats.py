"""Run folders and bundles of format 1, written once and kept in fixtures/, are read and continued by every version.

Weights, counts and masks in fixtures/ are what everseg 0.1.0 found; fixtures/README.md says how they were made. They
are never written anew: a change of a format gets fixtures of its own beside them.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import everseg
from command_line import begin
from forklifts import write_forklifts

FIXTURES = Path(__file__).with_name("fixtures")
FIRST = ("background", "road", "building", "tree", "car")
CLASSES = (*FIRST, "person", "sign")
SCENES = [
    f"data.domains.{name}.{key}"
    for name, folder in (("day", "scenes"), ("dusk", "scenes-dusk"))
    for key in (f"dataset={folder}/data.yaml", "options={}")
]
"""Where the scenes of the run over domains lie; those that `demo` generates may change."""
TIES = 0.005 if torch.cuda.is_available() else 0.0
"""Share of pixels that may be of another class. The best two logits of a pixel are at least 4e-5 apart: every
processor finds the same class, but a GPU that multiplies in TF32 need not."""
Outcome = Callable[..., tuple[int, str, str]]


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with copies of all fixtures."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def done(at: Path, call: Outcome) -> Callable[..., Any]:
    """Runs a command that must succeed; the JSON it printed, or the text."""

    def run(*arguments: object) -> Any:
        code, out, err = call(*arguments)
        assert code == 0, err
        return json.loads(out) if "--json" in arguments else out

    return run


def stored_counts(run: str, step: int) -> dict[str, list[list[int]]]:
    with np.load(FIXTURES / run / f"steps/{step:02d}/confusion.npz", allow_pickle=False) as archive:
        return {name: archive[name].tolist() for name in archive.files}


def weights(model: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(model) / "model.safetensors")


def same_weights(one: Path | str, other: Path | str) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mask(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path))


def assert_same_counts(found: dict[str, list], wanted: dict[str, list]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        one, other = np.array(found[name]), np.array(wanted[name])
        np.testing.assert_array_equal(one.sum(1), other.sum(1), err_msg=name)
        assert np.abs(one - other).sum() <= 2 * TIES * other.sum(), name


def assert_same_mask(found: np.ndarray, name: str) -> None:
    """Compare a mask with one of fixtures/predicted."""
    wanted = mask(FIXTURES / "predicted" / f"{name}.png")
    assert found.shape == wanted.shape
    assert (found != wanted).mean() <= TIES


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- the run


def test_a_run_is_loaded_with_the_classes_of_each_step(at: Path) -> None:
    assert everseg.load(at / "run-format-1", step=0).classes == FIRST
    assert everseg.load(at / "run-format-1").classes == CLASSES
    found = everseg.load(at / "run-format-1").predict(at / "scenes/images/val/0.png")
    assert_same_mask(found.ids, "run-format-1")


@pytest.mark.parametrize("step", [0, 1])
def test_a_run_is_scored_to_the_counts_it_holds(done: Callable[..., Any], at: Path, step: int) -> None:
    """On scenes that were stored with it: those that `demo` generates may change."""
    options = ("data=scenes/data.yaml", "--step", step, "--json", "--quiet")
    found = done("eval", "run-format-1", *options)
    stored = stored_counts("run-format-1", step)
    assert_same_counts(found["confusion"], stored)
    counts = np.array(found["confusion"]["default"])
    right = counts.diagonal()
    iou = right / (counts.sum(0) + counts.sum(1) - right)
    assert found["branches"]["default"]["class_iou"] == pytest.approx(iou.tolist())
    assert found["branches"]["default"]["miou"]["all"] == pytest.approx(iou.mean())
    assert iou.mean() == pytest.approx((0.6408, 0.4353)[step], abs=5e-5)


def test_reading_a_run_or_a_bundle_leaves_it_as_it_was(done: Callable[..., Any], at: Path) -> None:
    done("eval", "run-format-1", "data=scenes/data.yaml", "--quiet")
    done("compare", "run-format-1", "run-domains-format-1", "--out", "compared")
    for model in ("run-format-1", "bundle-format-1"):
        done("predict", model, "scenes/images/val", "-o", f"out-{model}")
    done("diff", "bundle-format-1", "run-format-1", "--images", "scenes/images/val", "-o", "diff")
    for name in ("run-format-1", "run-domains-format-1", "bundle-format-1"):
        assert contents(at / name) == contents(FIXTURES / name)


def test_a_run_is_reported_with_its_scores(done: Callable[..., Any], at: Path) -> None:
    made = done("report", "run-format-1", "data=scenes/data.yaml", "--out", "page.html", "--json", "--quiet")
    for number in ("64.1", "60.3", "1.6", "43.5"):
        assert number in made["sentence"]
    page = (at / "page.html").read_text()
    assert all(name in page for name in CLASSES)
    assert made["pictures"] == 4


def test_a_run_is_compared_with_its_scores(done: Callable[..., Any]) -> None:
    (table,) = done("compare", "run-format-1", "--json")["tables"]
    (group,) = table["groups"]
    assert group["name"] == "mib"
    assert group["seeds"] == [4]
    wanted = {"old": 0.6031, "new": 0.0156, "all": 0.4353, "average": 0.5380, "forgetting": 0.0376}
    for name, value in wanted.items():
        assert group["values"][name] == pytest.approx([value], abs=5e-5)


def test_a_run_is_exported_to_the_bundle_that_was_made_of_it_then(done: Callable[..., Any], at: Path) -> None:
    done("export", "run-format-1", "-o", "new", "--no-onnx", "--json")
    assert same_weights("new", "bundle-format-1")
    assert everseg.load("new").classes == CLASSES
    done("predict", "new", "scenes/images/val/0.png", "-o", "out")
    assert_same_mask(mask("out/0_mask.png"), "run-format-1")


def recorded_command(run: str) -> list[str]:
    """What was typed then, with the learning rates of then: the demo's presets may take others."""
    stored = json.loads((FIXTURES / run / "run.json").read_text())
    program, *arguments = stored["argv"]
    assert program == "everseg"
    return [
        *arguments,
        *(f"train.{key}={json.dumps(stored['config']['train'][key])}" for key in ("lr", "lr_next")),
    ]


@pytest.mark.parametrize("run", ["run-format-1", "run-domains-format-1"])
def test_the_command_of_a_finished_run_finds_nothing_to_do(
    done: Callable[..., Any], at: Path, run: str
) -> None:
    done(*recorded_command(run), "--quiet")
    assert contents(at / run) == contents(FIXTURES / run)


def test_the_command_of_an_unfinished_run_goes_on_from_its_last_step(at: Path, call: Outcome) -> None:
    """Step 1 starts again from the model of step 0; a time budget ends it at once."""
    shutil.rmtree(at / "run-format-1/steps/01")
    code, _, err = call(*recorded_command("run-format-1"), "train.max_time=0.01", "--quiet")
    assert code == 75
    assert "step 1, iteration 1 of 560" in err
    (begun,) = (at / "run-format-1/steps/01").rglob("model.safetensors")
    found, wanted = load_file(begun), weights(FIXTURES / "run-format-1/steps/01/final")
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in wanted.items()}
    first = contents(FIXTURES / "run-format-1/steps/00")
    assert contents(at / "run-format-1/steps/00") == first


# ---------------------------------------------------------------- the run over domains


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_run_over_domains_is_scored_to_the_counts_it_holds(
    done: Callable[..., Any], at: Path, step: int
) -> None:
    stored = stored_counts("run-domains-format-1", step)
    assert list(stored) == (["day", "dusk"] if step == 2 else ["day"])
    found = done("eval", "run-domains-format-1", *SCENES, "--step", step, "--json", "--quiet")
    assert_same_counts(found["confusion"], stored)


@pytest.mark.parametrize("name", ["dusk", "dim"])
def test_a_run_over_domains_predicts_through_the_branch_of_a_domain(
    done: Callable[..., Any], at: Path, name: str
) -> None:
    """By the name of the domain or of its branch; the picture is twice as large as the model sees it."""
    done("predict", "run-domains-format-1", "scenes-dusk/large.png", "--domain", name, "-o", "out")
    assert_same_mask(mask("out/large_mask.png"), "run-domains-format-1")
    assert json.loads(Path("out/classes.json").read_text()) == {str(i): n for i, n in enumerate(CLASSES)}
    done("predict", "run-domains-format-1", "scenes-dusk/large.png", "--domain", "day", "-o", "day")
    assert (mask("day/large_mask.png") != mask("out/large_mask.png")).any()


def test_a_run_over_domains_is_reported_compared_and_exported(done: Callable[..., Any], at: Path) -> None:
    page = ("--out", "page.html", "--images", 2, "--json", "--quiet")
    assert done("report", "run-domains-format-1", *SCENES, *page)["pictures"] > 0
    assert all(name in (at / "page.html").read_text() for name in (*CLASSES, "day", "dusk"))
    (table,) = done("compare", "run-domains-format-1", "--json")["tables"]
    assert table["groups"][0]["name"] == "mdil+mib"
    done("export", "run-domains-format-1", "-o", "new", "--no-onnx", "--json")
    assert same_weights("new", "run-domains-format-1/steps/02/final")
    for number, name in enumerate(("dusk", "dim")):
        done("predict", "new", "scenes-dusk/large.png", "--domain", name, "-o", f"out{number}")
        assert_same_mask(mask(f"out{number}/large_mask.png"), "run-domains-format-1")


# ---------------------------------------------------------------- the bundle


def test_a_bundle_is_loaded_and_predicts_what_it_did(done: Callable[..., Any], at: Path) -> None:
    assert everseg.load(at / "bundle-format-1").classes == CLASSES
    done("predict", "bundle-format-1", "scenes/images/val/0.png", "-o", "out")
    assert_same_mask(mask("out/0_mask.png"), "run-format-1")
    assert json.loads(Path("out/classes.json").read_text()) == {str(i): n for i, n in enumerate(CLASSES)}


def test_a_bundle_and_the_run_it_was_made_of_agree_on_every_pixel(done: Callable[..., Any]) -> None:
    images = ("--images", "scenes/images/val", "-o", "diff")
    found = done("diff", "bundle-format-1", "run-format-1", *images, "--json")
    assert (found["share"], found["only_a"], found["only_b"]) == (0.0, [], [])
    assert len(found["images"]) == 4


def test_a_bundle_learns_a_further_class(done: Callable[..., Any], at: Path) -> None:
    write_forklifts(at / "site")
    few = ["data.workers=0", "train.max_iterations=2", "train.threads=1", "train.batch=4", "report=false"]
    new = ["--data", "site/data.yaml", "--add", "forklift", "--no-onnx", "--quiet"]
    done("extend", "bundle-format-1", *new, "-o", "grown", *few)
    assert everseg.load("grown").classes == (*CLASSES, "forklift")
    old, grown = (
        json.loads((at / name / "lineage.json").read_text()) for name in ("bundle-format-1", "grown")
    )
    assert grown["history"][:2] == old["history"]
    assert len(grown["history"]) == 3
    assert grown["parent"] is not None
    assert same_weights("runs/grown/steps/01/final", "bundle-format-1")
    assert contents(at / "bundle-format-1") == contents(FIXTURES / "bundle-format-1")


def test_a_bundle_is_served(at: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = begin("serve", "bundle-format-1", "--port", port, "--quiet", cwd=at)
    try:
        info = json.loads(ask(f"http://127.0.0.1:{port}/info", server))
        assert [entry["name"] for entry in info["classes"]] == list(CLASSES)
        picture = (at / "scenes/images/val/0.png").read_bytes()
        answer = json.loads(ask(f"http://127.0.0.1:{port}/predict", server, picture))
        found = mask(io.BytesIO(b64decode(answer["mask"].partition("base64,")[2])))
        assert_same_mask(found, "run-format-1")
    finally:
        server.terminate()
        server.communicate(timeout=30)


def ask(url: str, server: Any, body: bytes | None = None) -> bytes:
    """The answer of a server that may still be starting."""
    request = urllib.request.Request(url, body, {"Content-Type": "image/png"})
    until = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            assert server.poll() is None, server.stderr.read()
            assert time.monotonic() < until, "the server never answered"
            time.sleep(0.1)


def test_the_onnx_file_of_a_bundle_still_gives_its_mask(at: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(at / "bundle-format-1/model.onnx")
    pixels = np.asarray(Image.open(at / "scenes/images/val/0.png"))
    (found,) = session.run(["mask"], {"image": pixels[None]})
    assert_same_mask(found[0], "run-format-1")


# ---------------------------------------------------------------- the fixtures themselves


@pytest.mark.parametrize("name", ["run-format-1", "run-domains-format-1", "bundle-format-1"])
def test_the_fixtures_are_small_and_name_no_place_of_a_machine(name: str) -> None:
    files = contents(FIXTURES / name)
    assert files
    assert sum(map(len, files.values())) < 600_000
    place = re.compile(rb"(?<![\w.])/(home|root|tmp|work|mnt|opt|usr|Users|var)/|[A-Z]:\\\\")
    assert [path for path, data in files.items() if place.search(data)] == []


@pytest.mark.parametrize("changed", ["model.safetensors", "classes.json"])
def test_a_fixture_is_verified_when_it_is_read(call: Outcome, at: Path, changed: str) -> None:
    for folder in (at / "bundle-format-1", at / "run-format-1/steps/01/final"):
        data = bytearray((folder / changed).read_bytes())
        data[-30] ^= 1
        (folder / changed).write_bytes(bytes(data))
        code, _, err = call("predict", folder, "scenes/images/val/0.png", "-o", "out")
        assert code == 4
        assert changed in err
