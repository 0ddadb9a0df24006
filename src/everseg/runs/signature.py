"""Signatures of committed folders: who vouches for the files of a bundle that travelled.

What is signed is the manifest's list of names, sizes and SHA-256 digests. So a signature covers every file that everseg
reads from the folder, and no file needs to be read for signing that is not read for verifying. Keys are Ed25519 in PEM
files, as `openssl genpkey -algorithm ed25519` makes them too.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from everseg.data.writing import flush_folder, write_flushed
from everseg.errors import CheckpointError, ConfigError, first_line
from everseg.files import UnreadableError, read_regular
from everseg.runs.commit import (
    MANIFEST,
    Committed,
    read_committed,
    read_document,
    verify,
    write_json,
    writing,
)
from everseg.runs.documents import SIGNATURE
from everseg.runs.model_folder import is_bundle
from everseg.runs.place import what_is

FILE = "SIGNATURE.json"
FORMAT = 1
_MOST = 65_536
"""Bytes of a key or of the file of signatures."""
_PURPOSE = "everseg bundle, files signed with ed25519, format 1"
"""A signature made for another purpose does not fit this one."""


def sign_folder(folder: Path, key: Path, password: str | None = None) -> str:
    """Sign a committed folder after checking every byte of it. An earlier signature with the same key is replaced.

    Args:
        key: PEM file of an Ed25519 private key.
        password: of the file, if it is encrypted.

    Returns:
        The fingerprint of the key.

    Raises:
        CheckpointError: the folder is damaged, or cannot be written to.
        ConfigError: the file holds no such key, or the package is missing.
    """
    private = _private(key, password)
    verify(folder)
    found = fingerprint(private.public_key())
    signature = base64.b64encode(private.sign(_message(read_committed(folder)))).decode()
    others = [one for one in signatures(folder) if one["key"] != found]
    write_json(
        folder / FILE, {"format": FORMAT, "signatures": [*others, {"key": found, "signature": signature}]}
    )
    return found


def signatures(folder: Path) -> list[dict[str, str]]:
    """Read the signatures of a folder, unchecked: the fingerprint of each key, and the signature.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not (folder / FILE).exists():
        return []
    found = read_document(
        folder / FILE, shape=SIGNATURE, most=_MOST, advice="sign the bundle again, or fetch it again"
    )
    if found["format"] != FORMAT:
        raise CheckpointError(
            f"{folder / FILE} has format {found['format']}; this everseg reads format {FORMAT}"
        )
    entries: list[dict[str, str]] = found["signatures"]
    return entries


def require_signature(folder: Path, key: str | Path) -> Committed:
    """Check that a folder is signed with a key.

    Args:
        key: PEM file of the public key.

    Returns:
        The folder as the signed manifest describes it. What is read through it is what was signed, even if somebody
        changes the folder in the meantime.

    Raises:
        CheckpointError: it is not signed, not with this key, or its manifest is another than the one that was signed.
        ConfigError: the file holds no such key, or the package is missing.
    """
    public = _public(Path(key))
    wanted = fingerprint(public)
    if not (folder / MANIFEST).is_file() or not is_bundle(folder):
        raise CheckpointError(
            f"{folder} {what_is(folder)}; only a bundle can be signed (everseg export, everseg sign)"
        )
    committed = read_committed(folder)
    found = [one["signature"] for one in signatures(folder) if one["key"] == wanted]
    if not found:
        others = [one["key"][:16] for one in signatures(folder)]
        by = f"signed with other keys only ({', '.join(others)})" if others else "not signed"
        raise CheckpointError(
            f"{folder} is {by}; the key {key} ({wanted[:16]}) is required. Do not use it, unless you know another way "
            "where it comes from"
        )
    if not any(_fits(public, one, _message(committed)) for one in found):
        raise CheckpointError(
            f"{folder} was changed after it was signed, or the signature is forged: it does not fit the files that the "
            f"manifest lists (key {key}, {wanted[:16]}). Do not use it; fetch it again"
        )
    return committed


def key_fingerprint(key: str | Path) -> str:
    """Fingerprint of the public key in a PEM file. Errors as `require_signature`."""
    return fingerprint(_public(Path(key)))


def new_key(private: Path, password: str | None = None) -> Path:
    """Make a key: the private one in a file that only you may read, the public one beside it with `.pub` added.

    Returns:
        The file of the public key.

    Raises:
        ConfigError: one of the files exists, or the package is missing.
    """
    ed25519, serialization = _library()
    public = private.with_name(private.name + ".pub")
    if taken := [str(path) for path in (private, public) if path.exists()]:
        raise ConfigError(
            f"{' and '.join(taken)} exists already; a key is never overwritten: give another name"
        )
    made = ed25519.Ed25519PrivateKey.generate()
    encryption = (
        serialization.NoEncryption()
        if password is None
        else serialization.BestAvailableEncryption(password.encode())
    )
    with writing(private):
        write_flushed(
            private,
            made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption),
            rights=0o600,
        )
        write_flushed(
            public,
            made.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
        )
        flush_folder(private.parent)
    return public


def is_encrypted(key: Path) -> bool:
    """Whether the file of a private key needs a password."""
    return b"ENCRYPTED" in _bytes(key)


def fingerprint(public: Any) -> str:
    """SHA-256 of the public key's 32 bytes."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()


def _message(committed: Committed) -> bytes:
    files = [
        [name, committed.files[name]["size"], committed.files[name]["sha256"]]
        for name in sorted(committed.files)
    ]
    body = {"purpose": _PURPOSE, "files": files, "parent": committed.parent}
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _fits(public: Any, signature: str, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(base64.b64decode(signature, validate=True), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _private(key: Path, password: str | None) -> Any:
    ed25519, serialization = _library()
    try:
        found = serialization.load_pem_private_key(
            _bytes(key), None if password is None else password.encode()
        )
    except (ValueError, TypeError) as error:
        kind = (
            "is a public key; signing needs the private one"
            if b"PUBLIC KEY" in _bytes(key)
            else (f"holds no private key that can be read ({first_line(error)})")
        )
        raise ConfigError(f"{key} {kind}") from None
    if not isinstance(found, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{key} holds a key of another kind than Ed25519; make one: everseg sign --new-key")
    return found


def _public(key: Path) -> Any:
    ed25519, serialization = _library()
    data = _bytes(key)
    if b"PRIVATE KEY" in data:
        raise ConfigError(
            f"{key} is a private key; give the public one ({key}.pub), and keep this one to yourself"
        )
    try:
        found = serialization.load_pem_public_key(data)
    except ValueError as error:
        raise ConfigError(f"{key} holds no public key that can be read ({first_line(error)})") from None
    if not isinstance(found, ed25519.Ed25519PublicKey):
        raise ConfigError(f"{key} holds a key of another kind than Ed25519")
    return found


def _bytes(key: Path) -> bytes:
    try:
        return read_regular(key, _MOST)
    except UnreadableError as error:
        raise ConfigError(f"key {key}: cannot be read ({error})") from None


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except Exception as error:  # a broken installation can raise almost any exception
        raise ConfigError(
            f"signatures need the package cryptography ({first_line(error)}): pip install 'everseg[sign]'"
        ) from None
    return ed25519, serialization
