"""Bundles: folders that hold a complete model with its classes, documents and ONNX files."""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everseg.data.batches.transforms import resize_transform
from everseg.deploy.card import at_sizes, model_card
from everseg.deploy.class_ids import register, with_ids
from everseg.deploy.memory import Bundled
from everseg.deploy.onnx import Deployed, Parity, check_parity, require_onnx, to_onnx
from everseg.deploy.precisions import Reduce, Reduced, reduced_text, stored
from everseg.display import Piece, Result, counted, percent
from everseg.errors import CheckpointError, ConfigError, GateError, first_clause
from everseg.inference.predict import LoadedModel, load
from everseg.labels import LabelSpace
from everseg.models.heads import sizes_of
from everseg.models.model import SegmentationModel
from everseg.runs.commit import read_committed, read_document, save_folder, verify
from everseg.runs.input_form import InputForm
from everseg.runs.memory import FILE as MEMORY
from everseg.runs.model_folder import FILE as CLASSES
from everseg.runs.model_folder import (
    LINEAGE,
    ModelFile,
    Registry,
    is_bundle,
    is_model_folder,
    load_model,
    read_lineage,
    read_model_file,
    save_model,
)
from everseg.runs.place import what_is
from everseg.runs.run_folder import RunFolder
from everseg.runs.signature import require_signature as signed
from everseg.runs.sketch import Sketch, read_sketch, tensors
from everseg.runs.versions import versions

log = logging.getLogger("everseg")

CARD, EXAMPLE = "MODEL_CARD.md", "example.py"
PACKAGES = ("everseg", "torch", "numpy", "pillow", "safetensors")


@dataclass
class Contents:
    """A trained model and the information that goes into its bundle."""

    model: SegmentationModel
    """In eval mode, on the CPU."""
    spaces: Mapping[str, LabelSpace]
    method_state: Mapping[str, Tensor] = field(default_factory=dict)
    form: InputForm = field(default_factory=InputForm)
    """How images are prepared for the model."""
    domains: Mapping[str, str] = field(default_factory=dict)
    """Domain -> branch that predicts its images."""
    steps: Sequence[int] = ()
    """Training step of each growth; default 0, 1, ..."""
    before: Registry | None = None
    """Classes of the bundle that the model was extended from, if any."""
    parent: str | None = None
    """Digest of that bundle."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of `lineage.json`."""
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the model's file that a later everseg wrote; the bundle gets them unchanged."""
    memory: Bundled | None = None
    """Makes the memory that goes into the bundle, if any does."""
    sketch: Callable[[Registry], Mapping[str, Sketch]] | None = None
    """Makes the samples of the features that go into the bundle, if any do."""


@dataclass(frozen=True, repr=False)
class Bundle(Result):
    """A verified bundle on disk."""

    path: Path
    digest: str
    about: ModelFile
    lineage: Mapping[str, Any]

    @property
    def registry(self) -> Registry:
        """The classes with their lasting ids."""
        return self.about.lasting_ids(self.path)

    @property
    def spaces(self) -> dict[str, LabelSpace]:
        """Label space of each branch. Its raw ids are the lasting ids of the classes."""
        return dict(self.about.spaces)

    @property
    def steps(self) -> int:
        """Number of steps that the model was trained in. This is also the index of the next step."""
        return int(self.lineage["steps"])

    def model(self, builder: Any = None) -> SegmentationModel:
        """Load the model, in eval mode on the CPU."""
        return load_model(self.path, builder, self.about)[0]

    @property
    def parity(self) -> Mapping[str, Mapping[str, Any]]:
        """Branch -> difference between its ONNX file and PyTorch. Empty without ONNX files."""
        found: Mapping[str, Mapping[str, Any]] = self.lineage.get("parity", {})
        return found

    def parity_text(self) -> list[str]:
        """Describe `parity` in one line for each branch."""
        lines = []
        for branch, found in self.parity.items():
            through = f" of branch '{branch}'" if len(self.parity) > 1 else ""
            lines.append(
                f"ONNX{through} against PyTorch on {found['source']} {at_sizes(found)}: largest "
                f"difference of a logit {found['logit_difference']:.1e}, same class on "
                f"{percent(found['equal_pixels'], digits=4)} % of the pixels"
            )
        return lines

    @property
    def reduced(self) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """Branch -> precision -> what its smaller ONNX file gives beside the full one. Empty without smaller files."""
        found: Mapping[str, Mapping[str, Mapping[str, Any]]] = self.lineage.get("reduced", {})
        return found

    def shown(self) -> Iterator[Piece]:
        yield from self.parity_text()
        for branch, each in self.reduced.items():
            for precision, one in each.items():
                yield reduced_text(branch, precision, one, several=len(self.about.spaces) > 1)
        yield f"wrote {self.path}: {counted(len(self.registry.classes), 'class')}, MODEL_CARD.md says the rest"

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "sha256": self.digest, "parity": self.parity, "reduced": self.reduced}


def open_bundle(path: str | Path) -> Bundle:
    """Verify a bundle byte by byte and read its documents.

    Raises:
        CheckpointError: the folder is missing, damaged, or not a bundle.
    """
    path = Path(path)
    if not is_bundle(path):
        # A run or the model folder of a step becomes a bundle; anything else is another path.
        run, model = RunFolder(path).is_begun, is_model_folder(path)
        more = "" if run else " -o FOLDER"
        made = f": make a bundle of it with everseg export {path}{more}" if run or model else ""
        raise CheckpointError(
            f"{path} {what_is(path)}{made or '; this needs a bundle (everseg export RUN makes one)'}"
        )
    digest = verify(path)
    about = read_model_file(path)
    about.lasting_ids(path)
    return Bundle(path, digest, about, read_lineage(path))


def open_signed(path: str | Path, key: str | Path | None) -> Bundle:
    """Open a bundle that must be signed.

    Args:
        key: PEM file of the public key; None = any bundle will do.

    Raises:
        CheckpointError: as `open_bundle` and `require_signature`, or the bundle changed between the two.
        ConfigError: the file holds no key, or the package `cryptography` is missing.
    """
    if key is None:
        return open_bundle(path)
    digest = signed(Path(path), key).digest
    bundle = open_bundle(path)
    if bundle.digest != digest:
        raise CheckpointError(f"{path} changed after its signature was checked; try again")
    return bundle


def new_folder(out: str | Path) -> Path:
    """Return `out` as a path, after checking that nothing exists there.

    Raises:
        ConfigError: something exists there.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out} exists already; bundles are never overwritten: give another folder (--out)")
    return out


def write_bundle(
    out: str | Path,
    contents: Contents,
    *,
    images: Sequence[np.ndarray] = (),
    source: str = "",
    onnx: bool = True,
    reduce: Reduce | None = None,
) -> Bundle:
    """Write a bundle. If anything fails, no bundle is left behind.

    Args:
        out: a new folder.
        images: images, (H, W, 3) uint8, for comparing the ONNX file with the model.
        source: description of these images.
        onnx: write the ONNX files.
        reduce: makes smaller ONNX files of them (`everseg.deploy.precisions`); None = none are wanted.

    Raises:
        ConfigError: the folder exists, or the ONNX file cannot be made on this machine.
        GateError: the ONNX file gives other results than the model, or a smaller one loses too much.
        CheckpointError: the files cannot be written.
    """
    out = new_folder(out)
    # Fail on missing packages before the model is exported.
    if onnx:
        require_onnx()
    growth = sizes_of(contents.model.describe()["growth"])
    steps = contents.steps or range(len(growth))
    registry = register(contents.spaces, growth, steps, contents.before)
    files: dict[str, bytes | Callable[[], bytes]] = {}
    parity = {}
    names = _file_names(contents.spaces) if onnx else {}
    graphs: dict[str, bytes] = {}
    only: tuple[int, int] | None = None  # the one size that the graphs take; None = they take any
    for branch in names:
        graphs[branch], parity[branch], only = _graph(contents, registry, branch, images, source, only)
    # preprocessing.json says one size for all graphs, so a graph that came before the first bound one is bound as well.
    for branch in [branch for branch, one in parity.items() if only is not None and not one.one_size]:
        graphs[branch], parity[branch], _ = _graph(contents, registry, branch, images, source, only)
    files |= {names[branch]: graph for branch, graph in graphs.items()}
    reduced: Reduced = {}
    if reduce is not None:
        loaded = LoadedModel(contents.model, contents.spaces, contents.form, contents.domains)
        ids = {branch: registry.ids(space) for branch, space in contents.spaces.items()}
        reduced = _reduced_by(reduce, loaded, names, graphs, ids)
    files |= _files_of(reduced)
    described = ModelFile(
        contents.model.describe(),
        {branch: with_ids(space, registry) for branch, space in contents.spaces.items()},
        contents.domains,
        contents.form,
        registry=registry,
        onnx=names,
        reduced=_names_of(reduced),
        readout=contents.model.readout,
        unknown=contents.unknown,
    )
    lineage = {
        "format": 1,
        "created": datetime.now(UTC).date().isoformat(),
        "parent": contents.parent,
        "steps": max(steps, default=-1) + 1,
        "history": [],
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
        **contents.lineage,
        "parity": {branch: asdict(one) for branch, one in parity.items()},
        **({"reduced": stored(reduced)} if reduced else {}),
    }
    if onnx:
        files[EXAMPLE] = example_script(contents.form)
    documents = {Path(LINEAGE).stem: lineage, "preprocessing": _preprocessing(contents, only)}
    images_kept = 0
    if contents.memory is not None:
        memory, copies = contents.memory(registry)
        files |= copies
        documents[Path(MEMORY).stem] = memory.document()
        images_kept = len(memory.images)
    sketch = contents.sketch(registry) if contents.sketch is not None else {}
    vectors = _vectors(sketch)
    card = model_card(out.name, described, lineage, contents.model.parameter_count, images_kept, vectors)
    files[CARD] = card.encode()
    save_model(
        out,
        described,
        contents.model.state_dict(),
        contents.method_state,
        domains=contents.model.domain_statistics,
        sketch=tensors(sketch),
        parent=contents.parent,
        documents=documents,
        files=files,
        among_others=True,
    )
    return open_bundle(out)


def write_reduced(bundle: Bundle, out: str | Path, reduce: Reduce, builder: Any = None) -> Bundle:
    """Write a copy of a bundle that also has smaller ONNX files. Those that it had before are replaced.

    Args:
        out: a new folder.
        reduce: makes the files.
        builder: the builder of your own architecture, if the model is not a built-in one.

    Raises:
        ConfigError: the folder exists, or the bundle has no ONNX file.
        GateError: a file loses too much. Nothing is written.
    """
    out, about = new_folder(out), bundle.about
    if not about.onnx:
        raise ConfigError(
            f"{bundle.path} has no ONNX file to make smaller; export its run again, without --no-onnx"
        )
    committed = read_committed(bundle.path)
    graphs = {branch: committed.read(name) for branch, name in about.onnx.items()}
    model = load(bundle.path, builder=builder)
    ids = {branch: bundle.registry.ids(space) for branch, space in about.spaces.items()}
    reduced = _reduced_by(reduce, model, about.onnx, graphs, ids)
    about = replace(about, reduced=_names_of(reduced))
    lineage = {**bundle.lineage, "reduced": stored(reduced)}
    before = {name for each in bundle.about.reduced.values() for name in each.values()}
    made = {CLASSES, LINEAGE, CARD, *before}
    files: dict[str, bytes | Callable[[], bytes]] = {
        name: partial(committed.read, name) for name in committed.files if name not in made
    }
    images = len(committed.files.keys() & {MEMORY}) and len(read_document(bundle.path / MEMORY)["images"])
    vectors = _vectors(read_sketch(bundle.path, committed))
    card = model_card(out.name, about, lineage, model.model.parameter_count, images, vectors)
    if "form" in read_document(
        bundle.path / "preprocessing.json"
    ):  # bundles of 0.1 have a script of their own
        files[EXAMPLE] = example_script(about.form)
    documents = {Path(CLASSES).stem: about.document(), Path(LINEAGE).stem: lineage}
    files |= {CARD: card.encode(), **_files_of(reduced)}
    save_folder(out, {}, documents, committed.parent, files, among_others=True)
    return open_bundle(out)


def _vectors(sketch: Mapping[str, Sketch]) -> int:
    return sum(len(one.ids) for one in sketch.values())


def example_script(form: InputForm) -> bytes:
    """Return the script `example.py` of bundles."""
    script = "example.txt" if form.channels is None else "example_channels.txt"
    return resources.files("everseg.deploy").joinpath(script).read_bytes()


def _reduced_by(
    reduce: Reduce,
    model: LoadedModel,
    names: Mapping[str, str],
    graphs: Mapping[str, bytes],
    ids: Mapping[str, Sequence[int]],
) -> Reduced:
    device = model.device
    model.device = torch.device("cpu")  # onnxruntime's results are read there
    try:
        return reduce(model, names, graphs, ids)
    finally:
        model.onnx, model.device = None, device


def _names_of(reduced: Reduced) -> dict[str, dict[str, str]]:
    """Branch -> precision -> file name."""
    return {
        branch: {key: one.file for key, (_, one) in each.items()} for branch, each in reduced.items() if each
    }


def _files_of(reduced: Reduced) -> dict[str, bytes]:
    return {one.file: file for each in reduced.values() for file, one in each.values()}


def _graph(
    contents: Contents,
    registry: Registry,
    branch: str,
    images: Sequence[np.ndarray],
    source: str,
    only: tuple[int, int] | None,
) -> tuple[bytes, Parity, tuple[int, int] | None]:
    """Export a branch to ONNX, and compare the file with the model.

    A network of another library that has no graph with open sizes gets one for a single size.

    Args:
        only: the size that the graph of an earlier branch is bound to.

    Returns:
        The file, the comparison, and the size that the graph is bound to; None = none.
    """
    ids = registry.ids(contents.spaces[branch])
    deployed = Deployed(contents.model, branch, ids, contents.form)

    def attempt(size: tuple[int, int] | None) -> tuple[bytes, Parity, tuple[int, int] | None]:
        file = to_onnx(deployed, _metadata(contents, registry, branch, ids, size), size)
        fitted = _resized(images, size or contents.form.resized_to)
        return file, check_parity(deployed, file, fitted, source, one_size=size is not None), size

    if only is not None or not deployed.foreign:
        return attempt(only)
    try:
        return attempt(None)
    except (ConfigError, GateError) as error:
        size = _one_size(deployed, images)
        # A warning, so that it is seen: what fails may also be the comparison with the model.
        log.warning(
            "no ONNX graph with open sizes, so the file takes %d x %d pixels only (%s)",
            *size,
            first_clause(error),
        )
        return attempt(size)


def _one_size(deployed: Deployed, images: Sequence[np.ndarray]) -> tuple[int, int]:
    """The size (H, W) of a graph that takes one size only: as the model sees images, in whole cells."""
    form, multiple = deployed.form, deployed.multiple or 1
    shape = images[0].shape if images else (512, 512)
    size = form.resized_to or ((form.window,) * 2 if form.window else (shape[0], shape[1]))
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def _resized(images: Sequence[np.ndarray], size: tuple[int, int] | None) -> list[np.ndarray]:
    """Resize images (H, W, 3) as evaluation does; None = leave them."""
    if size is None:
        return list(images)
    fitted = (resize_transform(image, np.zeros(image.shape[:2], np.uint8), size=size)[0] for image in images)
    return [image.transpose(1, 2, 0) for image in fitted]  # (H, W, 3) again


def _metadata(
    contents: Contents, registry: Registry, branch: str, ids: list[int], only: tuple[int, int] | None
) -> dict[str, Any]:
    """Collect the metadata of a branch's ONNX file."""
    entries = {entry.id: entry for entry in registry.classes}
    return {
        "classes": [{"id": i, "name": entries[i].name, "colour": entries[i].colour} for i in ids],
        "branch": branch,
        "preprocessing": _preprocessing(contents, only),
    }


def _preprocessing(contents: Contents, only: tuple[int, int] | None = None) -> dict[str, Any]:
    """What other readers must know to run the network, and how its outputs become classes if not by arg-max.

    Args:
        only: the one size that the graphs take; everseg itself goes by `form`.
    """
    readout = contents.model.readout.to_json()
    size = {} if only is None else {"size": list(only), "one_size": True}
    return contents.form.preprocessing() | size | ({"readout": readout} if readout else {})


def _file_names(spaces: Mapping[str, LabelSpace]) -> dict[str, str]:
    """Choose the name of each branch's ONNX file: model.onnx, or model-NAME.onnx if there are several branches."""
    if len(spaces) == 1:
        return dict.fromkeys(spaces, "model.onnx")
    names = {branch: re.sub(r"[^\w-]", "_", branch) for branch in spaces}
    # Two branches may get the same file name once special characters are replaced; then a number is added.
    twice = len(set(names.values())) < len(names)
    return {
        branch: f"model-{i}-{n}.onnx" if twice else f"model-{n}.onnx"
        for i, (branch, n) in enumerate(names.items())
    }
