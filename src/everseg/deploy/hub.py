"""Bundles on the Hugging Face Hub: `push` uploads one with a card that the hub reads, `pull` fetches one, verified.

Nothing that comes from the hub is run. A bundle is only what its manifest lists; other files of the repository are not
fetched. Which commit was fetched is always known by its hash.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everseg.data.writing import flush_folder, unfinished, write_flushed
from everseg.deploy.bundle import CARD, EXAMPLE, Bundle, example_script, new_folder, open_bundle
from everseg.display import Piece, Result, counted, in_percent, printable
from everseg.errors import CheckpointError, ConfigError, EversegError, first_line
from everseg.files import MOST, UnreadableError, read_regular, real_path
from everseg.progress import counting
from everseg.runs.commit import MANIFEST, read_committed, writing
from everseg.runs.memory import FILE as MEMORY
from everseg.runs.signature import FILE as SIGNATURE
from everseg.runs.signature import require_signature as signed

_ADDRESS = re.compile(r"hf:([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,200}))?")
_HASH = re.compile(r"[0-9a-f]{40}")
_MOST_BYTES = 64 * 1024**3
"""Largest bundle that is fetched."""


@dataclass(frozen=True, repr=False)
class Pushed(Result):
    """A bundle on the hub."""

    path: Path
    repository: str
    revision: str
    """Hash of the commit that holds it."""
    url: str
    files: int
    notes: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """What `pull` takes: the repository, pinned to this commit."""
        return f"hf:{self.repository}@{self.revision}"

    def shown(self) -> Iterator[Piece]:
        yield f"pushed {self.path} ({counted(self.files, 'file')}) to {self.url}"
        yield f"fetch exactly this with: everseg pull {self.address} -o OUT"

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path), "repository": self.repository, "revision": self.revision, "url": self.url,
            "address": self.address, "files": self.files, "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class Pulled(Result):
    """A bundle from the hub, verified byte by byte."""

    bundle: Bundle
    repository: str
    revision: str
    """Hash of the commit that it came from."""
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The bundle's folder."""
        return self.bundle.path

    def shown(self) -> Iterator[Piece]:
        yield f"pulled hf:{self.repository}@{self.revision} to {self.path}, verified (sha256 {self.bundle.digest[:16]})"

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path), "sha256": self.bundle.digest, "repository": self.repository,
            "revision": self.revision, "notes": list(self.notes),
        }  # fmt: skip


def push(
    bundle: str | Path,
    to: str,
    *,
    private: bool = False,
    license: str | None = None,
    memory: bool = False,
) -> Pushed:
    """Upload a bundle to a repository of the hub, which is made if it does not exist.

    Beside the bundle's files goes a README.md: the model card, with the header that the hub reads (license, tags, data
    sets, metrics as a model index). Files of an earlier bundle in the repository that this one lacks are removed.

    Args:
        to: "hf:ORG/NAME".
        private: make a new repository private.
        license: identifier of the license that you give the model, such as "apache-2.0".
        memory: push a bundle that holds images of its training data; else such a bundle is refused.

    Raises:
        ConfigError: no such address, no right to write there, or the bundle holds training images.
        CheckpointError: the bundle is missing or damaged, or the hub cannot be reached.
    """
    opened = open_bundle(bundle)
    repository, revision = _address(to)
    if revision is not None:
        raise ConfigError(f"{to}: a push goes to the main branch of the repository; leave @{revision} out")
    committed = read_committed(opened.path)
    if MEMORY in committed.files and not memory:
        raise ConfigError(
            f"{opened.path} holds images of its training data (memory.json), and a push publishes them; --memory says "
            "that they may be"
        )
    names = [*committed.files, MANIFEST, *([SIGNATURE] if (opened.path / SIGNATURE).is_file() else [])]
    card = header(opened, repository.partition("/")[2], license) + (opened.path / CARD).read_text()
    hub = _hub()
    with _told(repository):
        api = hub.HfApi(endpoint=_endpoint())
        if not api.repo_exists(repository):
            api.create_repo(repository, private=private)
        before = _listed(hub, api, repository)
        operations: list[Any] = [hub.CommitOperationAdd(name, opened.path / name) for name in names]
        operations.append(hub.CommitOperationAdd("README.md", card.encode()))
        operations += [hub.CommitOperationDelete(name) for name in sorted(before - set(names))]
        done = api.create_commit(
            repository, operations, commit_message=f"everseg bundle {opened.digest[:16]}"
        )
    notes = (
        ()
        if license
        else (
            "no license is stated; --license NAME states one (https://hf.co/docs/hub/repositories-licenses)",
        )
    )
    url = f"{api.endpoint}/{repository}"
    return Pushed(opened.path, repository, str(done.oid), url, len(names) + 1, notes)


def pull(
    source: str,
    out: str | Path,
    *,
    require_signature: str | Path | None = None,
    quiet: bool = False,
) -> Pulled:
    """Fetch a bundle from the hub, and verify every byte of it. Nothing of it is run.

    Args:
        source: "hf:ORG/NAME" or "hf:ORG/NAME@REVISION"; a revision that is the hash of a commit is always the same.
        out: a new folder.
        require_signature: file of the public key that must have signed the bundle (`everseg sign`).
        quiet: print no progress.

    Raises:
        ConfigError: no such address or repository, or the folder exists.
        CheckpointError: it holds no bundle, the bundle is damaged or not signed with the key, or the hub cannot be
            reached. Nothing is left behind.
    """
    repository, asked = _address(source)
    out = new_folder(out)
    temporary = unfinished(out)
    hub = _hub()
    with _told(repository):
        info = hub.HfApi(endpoint=_endpoint()).model_info(repository, revision=asked)
    revision, there = str(info.sha), {str(one.rfilename) for one in info.siblings or ()}
    if not _HASH.fullmatch(revision):
        raise CheckpointError(f"hf:{repository}: the hub names no commit by its hash")
    if asked and _HASH.fullmatch(asked) and asked != revision:
        raise CheckpointError(f"hf:{repository}: the hub answers with commit {revision} instead of {asked}")
    if MANIFEST not in there:
        raise CheckpointError(f"hf:{repository}@{revision} holds no bundle of everseg: it has no {MANIFEST}")
    with writing(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(dir=temporary.parent, prefix=".pull-") as cache:
            fetch = _Fetch(hub, repository, revision, Path(cache), temporary)
            fetch(MANIFEST, MOST)
            files = read_committed(temporary).files
            if sum(about["size"] for about in files.values()) > _MOST_BYTES:
                raise CheckpointError(
                    f"hf:{repository}@{revision}: a bundle of more than 64 GB is not fetched"
                )
            with counting("fetching", quiet=quiet) as advance:
                for number, (name, about) in enumerate(files.items(), 1):
                    fetch(name, about["size"])
                    advance(number, len(files))
            if SIGNATURE in there:
                fetch(SIGNATURE, MOST)
        if require_signature is not None:
            signed(temporary, require_signature)
        open_bundle(temporary)
        with writing(out):
            flush_folder(temporary)
            temporary.rename(out)
            flush_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    pulled = open_bundle(out)
    return Pulled(pulled, repository, revision, tuple(_remarks(pulled)))


def _remarks(bundle: Bundle) -> Iterator[str]:
    path = bundle.path / EXAMPLE
    if path.is_file() and path.read_bytes() != example_script(bundle.about.form):
        yield f"{EXAMPLE} is not the script of this everseg: read it before you run it; everseg never does"


@dataclass(frozen=True)
class _Fetch:
    """Fetches files of one commit."""

    hub: Any
    repository: str
    revision: str
    cache: Path
    folder: Path

    def __call__(self, name: str, most: int) -> None:
        """Fetch a file of at most so many bytes."""
        where = f"hf:{self.repository}@{self.revision}: {name}"
        missing = self.hub.errors.EntryNotFoundError
        with _told(self.repository), _else(missing, f"{where}: the manifest lists it, and it is not there"):
            url = self.hub.hf_hub_url(self.repository, name, revision=self.revision, endpoint=_endpoint())
            size = self.hub.get_hf_file_metadata(url).size
            if size is None or size > most:
                raise CheckpointError(f"{where} has {size} bytes, at most {most} were expected")
            path = self.hub.hf_hub_download(
                self.repository, name, revision=self.revision, cache_dir=self.cache, endpoint=_endpoint()
            )
        try:
            data = read_regular(Path(path), most, root=self.cache)
        except UnreadableError as error:
            raise CheckpointError(f"{where}: cannot be read ({error})") from None
        with writing(self.folder):
            write_flushed(self.folder / name, data)
        real_path(path).unlink()


def header(bundle: Bundle, name: str, license: str | None = None) -> str:
    """Write the header of the card for the hub, in YAML between two lines of dashes: what the history measured last."""
    hub = _hub()
    lineage = bundle.lineage
    last: Mapping[str, Any] = lineage["history"][-1] if lineage["history"] else {}
    tested = ", ".join(dict.fromkeys(source["data"] for source in last.get("test", ())))
    found = []
    for result, scores in last.get("scores", {}).items():
        where = tested if len(last["scores"]) == 1 else result
        values = {"mIoU": scores["miou"].get("all")}
        values |= {f"IoU of {label}": value for label, value in scores["class_iou"].items()}
        found += [
            hub.EvalResult(
                task_type="image-segmentation", task_name="Semantic segmentation",
                dataset_type=_slug(where), dataset_name=printable(where) or "test images",
                metric_type="mean_iou" if metric == "mIoU" else "iou", metric_name=printable(metric),
                metric_value=in_percent(value),
            )
            for metric, value in values.items()
            if value is not None
        ]  # fmt: skip
    trained = [source["data"].partition("/")[0] for entry in lineage["history"] for source in entry["train"]]
    data = hub.ModelCardData(
        license=license,
        library_name="everseg",
        pipeline_tag="image-segmentation",
        tags=["everseg", "image-segmentation", "semantic-segmentation", "continual-learning",
              *(["onnx"] if bundle.about.onnx else [])],
        datasets=list(dict.fromkeys(_slug(one) for one in trained)) or None,
        metrics=["mean_iou"] if found else None,
        model_name=printable(name),
        eval_results=found or None,
    )  # fmt: skip
    if not found:
        data.model_name = None
    return f"---\n{data.to_yaml()}\n---\n\n"


def _slug(name: str) -> str:
    """A name as the hub's identifiers are made."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "own-data"


def _address(text: str) -> tuple[str, str | None]:
    found = _ADDRESS.fullmatch(text)
    if found is None or ".." in text or "--" in text:
        raise ConfigError(f"{text}: expected hf:ORG/NAME, or hf:ORG/NAME@REVISION to pull")
    return found[1], found[2]


def _listed(hub: Any, api: Any, repository: str) -> set[str]:
    """Names that the manifest of the bundle lists which the repository holds now; none if there is no bundle."""
    there = {str(one.rfilename) for one in api.model_info(repository).siblings or ()}
    if MANIFEST not in there:
        return set()
    with tempfile.TemporaryDirectory() as folder:
        path = hub.hf_hub_download(repository, MANIFEST, cache_dir=folder, endpoint=_endpoint())
        try:
            (Path(folder) / MANIFEST).write_bytes(read_regular(Path(path), root=Path(folder)))
            listed = set(read_committed(Path(folder)).files)
        except (UnreadableError, CheckpointError):
            return set()
    return there & {*listed, SIGNATURE}


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except Exception as error:  # a broken installation can raise almost any exception
        raise ConfigError(
            f"the hub needs huggingface_hub ({first_line(error)}): pip install huggingface_hub"
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _else(kind: type[Exception], text: str) -> Iterator[None]:
    try:
        yield
    except kind:
        raise CheckpointError(text) from None


class _told:  # noqa: N801 - used as a statement
    """Turn the library's errors into ours."""

    def __init__(self, repository: str) -> None:
        self.repository = repository

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None or isinstance(error, EversegError) or not isinstance(error, Exception):
            return
        from huggingface_hub.errors import (
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        where, said = f"hf:{self.repository}", printable(first_line(error))
        if isinstance(error, RevisionNotFoundError):
            raise ConfigError(f"{where}: there is no such revision") from None
        if isinstance(error, RepositoryNotFoundError):
            raise ConfigError(
                f"{where}: there is no such repository, or you may not see it (hf auth login, or HF_TOKEN)"
            ) from None
        if isinstance(error, OfflineModeIsEnabled):
            raise ConfigError(f"{where}: HF_HUB_OFFLINE forbids the network; unset it") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, HfHubHTTPError) and status in (401, 403):
            raise ConfigError(
                f"{where}: the hub refuses it ({said}); log in with rights to write (hf auth login)"
            ) from None
        if isinstance(error, (HfHubHTTPError, OSError)) or type(error).__module__.startswith(
            ("httpx", "httpcore")
        ):
            raise CheckpointError(
                f"{where}: the hub cannot be reached, or failed ({said}); try again"
            ) from None
