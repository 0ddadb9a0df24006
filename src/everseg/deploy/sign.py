"""Sign a bundle, and verify one that travelled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everseg.deploy.bundle import open_bundle
from everseg.display import Piece, Result, counted
from everseg.errors import CheckpointError, ConfigError, some
from everseg.runs import signature
from everseg.runs.commit import MANIFEST, read_committed


@dataclass(frozen=True, repr=False)
class Signed(Result):
    """A bundle with its new signature."""

    path: Path
    key: str
    """Fingerprint of the key: SHA-256 of the public key."""
    public: Path | None
    """File of the public key, if the key was made now."""

    def shown(self) -> Iterator[Piece]:
        if self.public is not None:
            yield f"made a key: {self.public.with_suffix('')} (keep it), {self.public} (give it to those who verify)"
        yield f"signed {self.path} with the key {self.key[:16]}"

    def to_json(self) -> dict[str, Any]:
        public = None if self.public is None else str(self.public)
        return {"path": str(self.path), "key": self.key, "public": public}


@dataclass(frozen=True, repr=False)
class Verified(Result):
    """A bundle whose every byte fits its manifest."""

    path: Path
    digest: str
    files: int
    key: str | None
    """Fingerprint of the key that the signature was checked with; None = no key was given."""
    signed_by: tuple[str, ...]
    """Fingerprints that the file of signatures names. They say nothing until they are checked with a key."""
    notes: tuple[str, ...] = ()

    def shown(self) -> Iterator[Piece]:
        yield f"{self.path}: {counted(self.files, 'file')} as the manifest says (sha256 {self.digest[:16]})"
        if self.key is not None:
            yield f"signed with the key {self.key[:16]}"
        elif self.signed_by:
            names = ", ".join(name[:16] for name in self.signed_by)
            yield f"signatures are there and were not checked ({names}); --key PUBLIC-KEY checks one"
        else:
            yield "not signed: this finds damage, not a forger"

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path), "sha256": self.digest, "files": self.files, "key": self.key,
            "signed_by": list(self.signed_by), "notes": list(self.notes),
        }  # fmt: skip


def sign(
    bundle: str | Path, *, key: str | Path, new_key: bool = False, password: str | None = None
) -> Signed:
    """Sign a bundle: the list of its files with their digests, in a file SIGNATURE.json beside them.

    The bundle itself is not changed, and several keys may sign it.

    Args:
        key: file of an Ed25519 private key (PEM).
        new_key: make the key first, in this file, with the public one in KEY.pub.
        password: of the key's file; None = it is not encrypted.

    Raises:
        ConfigError: there is no such key, or it exists already; or the package `cryptography` is missing.
        CheckpointError: the bundle is missing or damaged.
    """
    opened, path = open_bundle(bundle), Path(key)
    public = signature.new_key(path, password) if new_key else None
    if not path.exists():
        raise ConfigError(f"--key {key}: there is no such file; --new-key makes one")
    return Signed(opened.path, signature.sign_folder(opened.path, path, password), public)


def verify(bundle: str | Path, *, key: str | Path | None = None) -> Verified:
    """Compare every byte of a bundle with its manifest, and the manifest with a signature.

    Args:
        key: file of the public key that must have signed; None = only the bytes are compared.

    Raises:
        CheckpointError: the bundle is missing or damaged, or not signed with the key.
        ConfigError: the file holds no key, or the package `cryptography` is missing.
    """
    opened = open_bundle(bundle)
    found = None if key is None else signature.key_fingerprint(key)
    committed = read_committed(opened.path) if key is None else signature.require_signature(opened.path, key)
    if committed.digest != opened.digest:
        raise CheckpointError(f"{opened.path} changed while it was verified; try again")
    known = {MANIFEST, signature.FILE, *committed.files}
    others = sorted(path.name for path in opened.path.iterdir() if path.name not in known)
    notes = (f"not part of the bundle, and never read: {some(others, 8)}",) if others else ()
    signed_by = tuple(one["key"] for one in signature.signatures(opened.path))
    return Verified(opened.path, opened.digest, len(committed.files), found, signed_by, notes)
