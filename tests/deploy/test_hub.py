"""Bundles go to the hub and come back byte by byte; what comes from it is verified, pinned, and never run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from local_hub import TOKEN, Hub, local_hub

import everseg
from everseg.deploy.bundle import open_bundle
from everseg.errors import CheckpointError, ConfigError
from everseg.runs.commit import MANIFEST
from saying import must_say
from sealed import reseal

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
BUNDLE = Path(__file__).parent.parent / "fixtures/bundle-format-1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub.constants

    with local_hub() as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            huggingface_hub.constants, "HF_HUB_DISABLE_XET", True
        )  # its storage is no HTTP interface
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield stand_in


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bundle_comes_back_as_it_went(hub: Hub, tmp_path: Path, call: Callable) -> None:
    code, out, err = call("push", BUNDLE, "hf:me/street", "--license", "apache-2.0", "--json")
    assert code == 0, err
    pushed = json.loads(out)
    assert set(hub.files("me/street")) == {*contents(BUNDLE), "README.md"}
    assert pushed["address"] == f"hf:me/street@{pushed['revision']}"
    (tmp_path / "back.tmp").mkdir()  # the user's own
    code, out, err = call("pull", pushed["address"], "-o", tmp_path / "back", "--json")
    assert code == 0, err
    (tmp_path / "back.tmp").rmdir()
    assert json.loads(out)["revision"] == pushed["revision"]
    assert contents(tmp_path / "back") == contents(BUNDLE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back"]
    # Asked for by the hash alone: what main is by then does not count.
    hub.commit("me/street", {"README.md": b"gone"})
    assert everseg.pull(pushed["address"], tmp_path / "again", quiet=True).revision == pushed["revision"]
    with pytest.raises(CheckpointError, match=r"MANIFEST"):
        everseg.pull("hf:me/street", tmp_path / "new", quiet=True)


def test_the_hub_reads_license_tags_data_and_metrics(hub: Hub) -> None:
    everseg.push(BUNDLE, "hf:me/street", license="apache-2.0", private=True)
    assert hub.private["me/street"]
    card = hub.files("me/street")["README.md"].decode()
    assert card.endswith((BUNDLE / "MODEL_CARD.md").read_text())
    _, text, _ = card.split("---\n", 2)
    assert text == hub.headers[""], "what the hub was asked to check"
    header = yaml.safe_load(text)
    assert header["license"] == "apache-2.0"
    assert {"everseg", "semantic-segmentation", "onnx"} <= set(header["tags"])
    assert header["library_name"] == "everseg"
    last = open_bundle(BUNDLE).lineage["history"][-1]
    (index,) = header["model-index"]
    (result,) = index["results"]
    assert (index["name"], result["task"]["type"]) == ("street", "image-segmentation")
    assert result["dataset"]["name"] == last["test"][0]["data"]
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    (scores,) = last["scores"].values()
    assert values["mIoU"] == pytest.approx(100 * scores["miou"]["all"], abs=0.06)
    assert len(values) == 1 + sum(value is not None for value in scores["class_iou"].values())


def test_a_second_push_takes_away_what_the_new_bundle_lacks(hub: Hub, tmp_path: Path) -> None:
    everseg.push(BUNDLE, "hf:me/street")
    hub.commit("me/street", {**hub.files("me/street"), "photo.jpg": b"theirs"})
    smaller = shutil.copytree(BUNDLE, tmp_path / "b")
    (smaller / "example.py").unlink()
    reseal(smaller)
    assert everseg.push(smaller, "hf:me/street").notes, "no license was stated"
    names = set(hub.files("me/street"))
    assert "example.py" not in names
    assert {"photo.jpg", "model.onnx"} <= names


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "sha256"),
        ("model.safetensors", lambda data: data + b"x" * 99, "bytes"),
        ("classes.json", None, "classes.json"),
        (MANIFEST, lambda data: data.replace(b"classes.json", b"../x.json"), "MANIFEST"),
    ],
)  # fmt: skip
def test_what_is_damaged_or_forged_leaves_nothing(
    hub: Hub, tmp_path: Path, name: str, change: Callable[[bytes], bytes] | None, word: str
) -> None:
    everseg.push(BUNDLE, "hf:me/street")
    files = dict(hub.files("me/street"))
    if change is None:
        del files[name]
    else:
        files[name] = change(files[name])
    hub.commit("me/street", files)
    with pytest.raises(CheckpointError, match=word):
        everseg.pull("hf:me/street", tmp_path / "back", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_only_what_the_manifest_lists_is_fetched_and_a_strange_script_is_told(
    hub: Hub, tmp_path: Path
) -> None:
    copy = shutil.copytree(BUNDLE, tmp_path / "b")
    (copy / "example.py").write_text("print('mine')")
    reseal(copy)
    everseg.push(copy, "hf:me/street")
    hub.commit(
        "me/street", {**hub.files("me/street"), "setup.py": b"raise SystemExit", "pytorch_model.bin": b"x"}
    )
    hub.asked.clear()
    pulled = everseg.pull("hf:me/street", tmp_path / "back", quiet=True)
    assert not any("setup.py" in one or ".bin" in one or "README" in one for one in hub.asked)
    must_say(pulled.notes, "example.py")
    assert not (tmp_path / "back/setup.py").exists()


def test_signed_bundles_are_pulled_with_their_signature(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="the extra `sign` is not installed")
    copy = shutil.copytree(BUNDLE, tmp_path / "b")
    everseg.sign(copy, key=tmp_path / "mine", new_key=True)
    everseg.push(copy, "hf:me/street")
    key = tmp_path / "mine.pub"
    assert everseg.pull("hf:me/street", tmp_path / "back", require_signature=key, quiet=True).path.is_dir()
    everseg.push(BUNDLE, "hf:me/other")
    with pytest.raises(CheckpointError, match="signed"):
        everseg.pull("hf:me/other", tmp_path / "no", require_signature=key, quiet=True)
    assert not (tmp_path / "no").exists()


def test_refusals_say_what_to_do(
    hub: Hub, tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(code: int, *arguments: object) -> str:
        found, _, err = call(*arguments)
        assert found == code, err
        return err

    must_say(told(2, "push", BUNDLE, "me/street"), "hf:ORG/NAME")
    must_say(told(2, "push", BUNDLE, "hf:me/street@main"), "main")
    must_say(told(2, "pull", "hf:me/../street", "-o", tmp_path / "o"), "hf:ORG/NAME")
    must_say(told(2, "pull", "hf:me/nothing", "-o", tmp_path / "o"), "me/nothing", "no such repository")
    everseg.push(BUNDLE, "hf:me/street")
    must_say(told(2, "pull", f"hf:me/street@{'0' * 40}", "-o", tmp_path / "o"), "revision")
    must_say(told(2, "pull", "hf:me/street", "-o", tmp_path), "exists")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    must_say(told(2, "push", BUNDLE, "hf:me/street"), "me/street", "hf auth login")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    must_say(told(4, "pull", "hf:me/street", "-o", tmp_path / "o"), "me/street", "reached")
    assert list(tmp_path.iterdir()) == []


def test_training_images_are_not_published_unless_asked(hub: Hub, tmp_path: Path) -> None:
    copy = shutil.copytree(BUNDLE, tmp_path / "b")
    (copy / "memory.json").write_text("{}")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"]["memory.json"] = {}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    reseal(copy)
    with pytest.raises(ConfigError, match="--memory"):
        everseg.push(copy, "hf:me/street")
    assert hub.commits == {}
    everseg.push(copy, "hf:me/street", memory=True)
    assert "memory.json" in hub.files("me/street")
