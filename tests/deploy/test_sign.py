"""Signatures: a bundle that travelled is trusted only if its files are those that the key signed."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import everseg
from everseg.deploy.serve import Served
from everseg.errors import CheckpointError, ConfigError
from everseg.runs import signature
from everseg.runs.commit import verify
from hostile_documents import NO_DOCUMENT, variants
from saying import must_say
from sealed import reseal

pytest.importorskip("cryptography", reason="the extra `sign` is not installed")
FIXTURES = Path(__file__).parent.parent / "fixtures"
PICTURE = FIXTURES / "scenes/images/val/0.png"


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A signed bundle, with the keys mine and mine.pub beside it."""
    bundle = shutil.copytree(FIXTURES / "bundle-format-1", tmp_path / "b")
    everseg.sign(bundle, key=tmp_path / "mine", new_key=True)
    return bundle


def test_signing_changes_no_file_and_verifying_tells_who(
    signed: Path, tmp_path: Path, call: Callable
) -> None:
    assert verify(signed) == verify(FIXTURES / "bundle-format-1")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    code, out, err = call("verify", signed, "--key", tmp_path / "mine.pub", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["key"] == told["signed_by"][0] == everseg.sign(signed, key=tmp_path / "mine").key
    code, out, _ = call("verify", signed)
    assert code == 0
    must_say(out, "not checked", told["key"][:16])
    code, out, _ = call("verify", FIXTURES / "bundle-format-1")
    assert code == 0
    must_say(out, "not signed")
    (signed / "run_me.py").write_text("")
    code, _, err = call("verify", signed, "--key", tmp_path / "mine.pub")
    assert code == 0
    must_say(err, "run_me.py")


@pytest.mark.parametrize("name", ["model.safetensors", "example.py", "MODEL_CARD.md"])
def test_a_forged_file_with_a_manifest_that_fits_is_found(signed: Path, tmp_path: Path, name: str) -> None:
    data = bytearray((signed / name).read_bytes())
    data[-1] ^= 1
    (signed / name).write_bytes(data)
    reseal(signed)
    assert verify(signed), "without the key the forgery fits"
    with pytest.raises(CheckpointError, match="signed"):
        everseg.verify(signed, key=tmp_path / "mine.pub")


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_what_is_read_is_what_was_verified(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str | None
) -> None:
    """Somebody puts another whole bundle in the place of the one whose signature was just checked."""
    if precision:
        pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    forged = shutil.copytree(signed, tmp_path / "forged")
    for name in ("model.safetensors", "model.onnx"):
        data = bytearray((forged / name).read_bytes())
        data[-1] ^= 1
        (forged / name).write_bytes(data)
    reseal(forged)
    assert verify(forged)
    checked = signature.require_signature

    def and_swapped(folder: Path, key: Path) -> object:
        found = checked(folder, key)
        shutil.rmtree(signed)
        shutil.copytree(forged, signed)
        return found

    for module in (everseg.inference.predict, everseg.deploy.bundle):
        monkeypatch.setattr(module, "signed", and_swapped)
    with pytest.raises(CheckpointError, match="damaged"):
        everseg.load(signed, require_signature=tmp_path / "mine.pub", precision=precision)
    for use in (partial(everseg.extend, drop=["car"]), partial(everseg.preview, drop=["car"]), Served):
        shutil.rmtree(signed)
        shutil.copytree(FIXTURES / "bundle-format-1", signed)
        everseg.sign(signed, key=tmp_path / "mine")
        with pytest.raises(CheckpointError, match="signature"):
            use(signed, require_signature=tmp_path / "mine.pub")


def test_what_predicts_serves_and_extends_asks_for_the_key(
    signed: Path, tmp_path: Path, call: Callable
) -> None:
    other = tmp_path / "other"
    signature.new_key(other)
    data = FIXTURES / "scenes/data.yaml"
    for key, code in ((tmp_path / "mine.pub", 0), (tmp_path / "other.pub", 4)):
        found, _, err = call(
            "predict", signed, PICTURE, "-o", tmp_path / f"out{code}", "--require-signature", key, "--quiet"
        )
        assert found == code, err
        if code:
            must_say(err, "other.pub", "signed")
    assert not (tmp_path / "out4").exists()
    with pytest.raises(CheckpointError, match="signed"):
        Served(signed, require_signature=tmp_path / "other.pub")
    with pytest.raises(CheckpointError, match="signed"):
        everseg.extend(signed, data=data, require_signature=tmp_path / "other.pub")
    assert Served(signed, require_signature=tmp_path / "mine.pub").name == "b"
    code, _, err = call(
        "extend", signed, "--data", data, "--dry-run", "--require-signature", tmp_path / "other.pub"
    )
    assert code == 4
    must_say(err, "other.pub", "signed")
    with pytest.raises(CheckpointError, match="bundle"):
        everseg.load(FIXTURES / "run-format-1", require_signature=tmp_path / "mine.pub")


def test_several_keys_may_sign(signed: Path, tmp_path: Path) -> None:
    everseg.sign(signed, key=tmp_path / "second", new_key=True)
    everseg.sign(signed, key=tmp_path / "mine")
    assert len(signature.signatures(signed)) == 2
    for name in ("mine.pub", "second.pub"):
        assert everseg.verify(signed, key=tmp_path / name).key


def test_keys_that_are_none_are_told(signed: Path, tmp_path: Path, call: Callable) -> None:
    def told(*arguments: object) -> str:
        code, _, err = call(*arguments)
        assert code == 2, err
        return err

    must_say(told("sign", signed, "--key", tmp_path / "mine", "--new-key"), "mine", "exists")
    must_say(told("sign", signed, "--key", tmp_path / "absent"), "absent", "--new-key")
    must_say(told("sign", signed, "--key", tmp_path / "mine.pub"), "public")
    must_say(told("verify", signed, "--key", tmp_path / "mine"), "private", "mine.pub")
    (tmp_path / "text").write_text("hello")
    must_say(told("verify", signed, "--key", tmp_path / "text"), "text")
    must_say(told("verify", signed, "--key", tmp_path), "cannot")
    signature.new_key(tmp_path / "locked", "secret")
    with pytest.raises(ConfigError, match="locked"):
        everseg.sign(signed, key=tmp_path / "locked")
    assert everseg.sign(signed, key=tmp_path / "locked", password="secret").key


def test_a_key_of_openssl_does_and_one_of_another_kind_does_not(signed: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    for kind in ("ed25519", "ed448"):
        made = ["openssl", "genpkey", "-algorithm", kind, "-out", str(tmp_path / kind)]
        subprocess.run(made, check=True, capture_output=True)
    public = [
        "openssl",
        "pkey",
        "-in",
        str(tmp_path / "ed25519"),
        "-pubout",
        "-out",
        str(tmp_path / "open.pub"),
    ]
    subprocess.run(public, check=True, capture_output=True)
    everseg.sign(signed, key=tmp_path / "ed25519")
    assert everseg.verify(signed, key=tmp_path / "open.pub").key
    with pytest.raises(ConfigError, match="Ed25519"):
        everseg.sign(signed, key=tmp_path / "ed448")


def test_a_strange_file_of_signatures_is_refused(signed: Path, tmp_path: Path) -> None:
    path = signed / signature.FILE
    honest = json.loads(path.read_text())
    (one,) = honest["signatures"]
    flipped = bytearray(base64.b64decode(one["signature"]))
    flipped[5] ^= 1
    for value in (
        [],
        {},
        {**honest, "format": 9},
        {**honest, "signatures": {}},
        {**honest, "signatures": []},
        {**honest, "signatures": [{"key": one["key"]}]},
        {**honest, "signatures": [{**one, "signature": "é"}]},
        {**honest, "signatures": [{**one, "signature": ""}]},
        {**honest, "signatures": [{**one, "signature": base64.b64encode(flipped).decode()}]},
        {**honest, "signatures": [{**one, "key": "0" * 64}]},
    ):
        path.write_text(json.dumps(value))
        with pytest.raises(CheckpointError):
            everseg.verify(signed, key=tmp_path / "mine.pub")
    accepted = 0
    for case, value in variants(honest):
        path.write_text(json.dumps(value))
        try:
            signature.require_signature(signed, tmp_path / "mine.pub")
        except CheckpointError:
            continue
        accepted += 1
        assert one in value["signatures"], f"{case}: no other text stands for the signature"
    assert accepted < 10
    for case, data in NO_DOCUMENT.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            signature.require_signature(signed, tmp_path / "mine.pub")
        assert case
    path.write_text(json.dumps({**honest, "padding": "x" * 70_000}))
    with pytest.raises(CheckpointError):
        everseg.verify(signed, key=tmp_path / "mine.pub")
