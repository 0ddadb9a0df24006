"""Model folders: a folder with the weights of one model and a file that describes the model.

Finished steps of runs, bundles and imported checkpoints are model folders. Only this module knows the layout of the
file. All other modules read and write a `ModelFile`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from everseg.errors import CheckpointError, ConfigError, some
from everseg.labels import IGNORED_WIDE, LabelSpace, known_as, spelling
from everseg.models.build import ARCHITECTURES, from_description
from everseg.models.domain_statistics import DomainStatistics, of_tensors, to_tensors
from everseg.models.heads import sizes_of
from everseg.models.model import SegmentationModel
from everseg.models.stored import Sizes
from everseg.runs.commit import Committed, load_tensors, read_committed, read_document, save_folder
from everseg.runs.documents import LINEAGE as LINEAGE_SHAPE
from everseg.runs.input_form import InputForm
from everseg.types import Readout

FILE = "classes.json"
FORMAT = 2
"""Number of the layout. Files of layout 1 hold no number. A higher number is refused, because the keys of that layout
may have another meaning.

A new key does not raise the number: this everseg keeps keys that it does not know, and ignores them."""
WEIGHTS = "model.safetensors"
DOMAINS = "domains.safetensors"
"""File of what the images of each branch look like; see `everseg.models.domain_statistics`. Most models have none."""
SKETCH = "sketch.safetensors"
"""File in which a bundle keeps samples of its features (`everseg.runs.sketch`)."""
PRECISIONS = ("fp32", "fp16", "int8")
"""Precisions of the weights of an ONNX file; the first is that of the model."""
LINEAGE = "lineage.json"
"""File in which a bundle records how its model was made."""
MOST_IDS = IGNORED_WIDE
"""Number of lasting ids that fit a mask of 16 bits. The next number marks ignored pixels."""
_RAW_IDS = range(-16, 65536)
"""Raw ids that a file may hold. Negative ones stand for outputs that no pixel of a mask shows."""


@dataclass(frozen=True)
class BundleClass:
    """One class of a bundle."""

    id: int
    """The class's id in masks, in this bundle and in all bundles that are made from it."""
    name: str
    colour: tuple[int, int, int]
    step: int
    """Step that taught the class first."""
    branches: tuple[str, ...]
    """Branches of the model that have an output for it."""


@dataclass(frozen=True)
class Registry:
    """Every class that a bundle, or a bundle it was made from, has ever had."""

    classes: tuple[BundleClass, ...]
    next_id: int
    """Smallest id that no class has had so far."""

    def ids(self, space: LabelSpace) -> list[int]:
        """Look up the ids of a branch's outputs, in output order."""
        by_name = {entry.name: entry.id for entry in self.classes}
        return [by_name[known_as(name, by_name)] for name in space.names]


@dataclass(frozen=True)
class ModelFile:
    """The content of a model folder's file: how the model is built, what its outputs mean, how it sees an image."""

    architecture: Mapping[str, Any]
    """The result of `SegmentationModel.describe`: name, options, growth, and structural changes if there were any."""
    spaces: Mapping[str, LabelSpace]
    """Branch -> its classes. In a bundle the raw ids are the lasting ids of the classes."""
    domains: Mapping[str, str] = field(default_factory=dict)
    """Domain -> branch that its images take; {} for runs on one data set and in older files."""
    form: InputForm = field(default_factory=InputForm)
    fresh: bool = False
    """Whether the step was trained from scratch."""
    source: str = ""
    """What an imported model was made from; "" for other models."""
    registry: Registry | None = None
    """The classes under their lasting ids; bundles only."""
    onnx: Mapping[str, str] = field(default_factory=dict)
    """Branch -> name of its ONNX file in the same folder; {} without ONNX files."""
    reduced: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Branch -> precision ("fp16", "int8") -> name of a smaller ONNX file of it; {} where none was asked for."""
    readout: Readout = field(default_factory=Readout)
    """How the outputs become classes."""
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the file that this everseg does not know, unchanged."""

    def lasting_ids(self, where: str | Path) -> Registry:
        """Return the registry, which every bundle has.

        Args:
            where: the folder, for the message.

        Raises:
            CheckpointError: the file has no registry, so the folder is no bundle.
        """
        if self.registry is None:
            raise CheckpointError(
                f"{where} is not a bundle: its {FILE} gives the classes no lasting ids; make one: everseg export RUN"
            )
        return self.registry

    def document(self) -> dict[str, Any]:
        """Convert to the JSON value that the file holds."""
        registry = {} if self.registry is None else asdict(self.registry)
        return {
            "format": FORMAT,
            "architecture": dict(self.architecture),
            "branches": {name: self._branch(name, space) for name, space in self.spaces.items()},
            "domains": dict(self.domains),
            "fresh": self.fresh,
            **self.form.to_json(),
            **({"readout": readout} if (readout := self.readout.to_json()) else {}),
            **({"source": self.source} if self.source else {}),
            **registry,
            **self.unknown,
        }

    def _branch(self, name: str, space: LabelSpace) -> dict[str, Any]:
        entry: dict[str, Any] = {"groups": space.groups, "names": space.names, "background": space.background}
        if space.formerly:
            entry["formerly"] = dict(space.formerly)
        if self.registry is None:
            return entry
        reduced = {"reduced": dict(self.reduced[name])} if self.reduced.get(name) else {}
        return {**entry, "ids": self.registry.ids(space), "onnx": self.onnx.get(name), **reduced}

    def onnx_files(self, precision: str) -> dict[str, str]:
        """Branch -> name of its ONNX file of a precision, of the branches that have one."""
        if precision == PRECISIONS[0]:
            return dict(self.onnx)
        return {branch: files[precision] for branch, files in self.reduced.items() if precision in files}


# ---------------------------------------------------------------- folders


def is_model_folder(folder: Path) -> bool:
    """Tell whether a folder holds a model."""
    return (folder / FILE).is_file()


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder holds a model with its lineage."""
    return is_model_folder(folder) and (folder / LINEAGE).is_file()


def save_model(
    folder: Path,
    about: ModelFile,
    weights: Mapping[str, Tensor],
    method_state: Mapping[str, Tensor] | None = None,
    *,
    domains: Mapping[str, DomainStatistics] | None = None,
    raw: Mapping[str, Tensor] | None = None,
    sketch: Mapping[str, Tensor] | None = None,
    parent: str | None = None,
    documents: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Callable[[], bytes]] | None = None,
    among_others: bool = False,
) -> str:
    """Commit a model folder, whole or not at all.

    Args:
        folder: the folder to make; see `everseg.runs.commit.save_folder`.
        weights: the model's `state_dict`.
        method_state: state that the method carries from step to step.
        domains: the model's `domain_statistics`.
        raw: where `weights` are a moving average, the weights that training left. Nothing reads them back.
        sketch: samples of the features (`everseg.runs.sketch.tensors`).
        parent: digest of the folder that this one continues.
        documents: file name without ending -> JSON value of a further file.
        files: file name -> bytes of any other file, or what makes them when they are written.
        among_others: as for `save_folder`.

    Returns:
        The folder's digest.
    """
    further = {
        "raw": raw,
        Path(DOMAINS).stem: to_tensors(domains) if domains else None,
        Path(SKETCH).stem: sketch or None,
    }
    return save_folder(
        folder,
        {
            "model": weights,
            "method_state": method_state or {},
            **{name: values for name, values in further.items() if values is not None},
        },
        {FILE.removesuffix(".json"): about.document(), **(documents or {})},
        parent=parent,
        files=files,
        among_others=among_others,
    )


def load_model(
    folder: Path,
    builder: Any = None,
    about: ModelFile | None = None,
    weights: bytes | None = None,
    committed: Committed | None = None,
) -> tuple[SegmentationModel, ModelFile]:
    """Rebuild a model from its folder: repeat its growth, then load weights that must fit exactly.

    Args:
        builder: builder of the user's architecture, if it is not a built-in one.
        about: the result of `read_model_file`, if the caller has read it before.
        weights: the bytes of the weights' file, if the caller has read them before.
        committed: the folder as read before.

    Returns:
        The model in eval mode on the CPU, and the content of its file.

    Raises:
        CheckpointError: weights and architecture do not fit.
    """
    about = about or read_model_file(folder)
    state = load_tensors(folder / WEIGHTS, weights)
    # A user's own builder may make anything, and is the user's own.
    known = about.architecture.get("name") in ARCHITECTURES
    try:
        model = from_description(
            about.architecture, builder=builder, sizes=Sizes.of(state) if known else None
        )
    except CheckpointError as error:  # it knows no folder
        raise CheckpointError(f"{folder}: {error}") from error
    load_strictly(model, state, str(folder))
    model.readout = about.readout
    model.domain_statistics = read_domains(folder, model.branches, committed)
    model.eval()
    return model, about


def read_domains(
    folder: Path, branches: Collection[str], committed: Committed | None = None
) -> dict[str, DomainStatistics]:
    """Read what the images of each branch look like; {} if the folder does not say it.

    Args:
        branches: those of the model.
        committed: the folder as read before.

    Raises:
        CheckpointError: the file is changed or damaged, or of another model.
    """
    committed = committed or read_committed(folder)
    if DOMAINS not in committed.files:
        return {}
    path = folder / DOMAINS
    return of_tensors(load_tensors(path, committed.read(DOMAINS)), branches, str(path))


def load_strictly(model: torch.nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        CheckpointError: names or shapes differ, or a number is not finite; the message lists some of the names.
    """
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own.keys() - state.keys()]
    problems += [f"not in this model: {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name}: {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        listing = some(sorted(problems), between="\n  ")
        raise CheckpointError(f"{where} is a checkpoint of another model:\n  {listing}")
    if broken := sorted(name for name, value in state.items() if not bool(value.isfinite().all())):
        raise CheckpointError(
            f"{where}: its weights are not finite: {some(broken)}; make it again or fetch it again"
        )
    model.load_state_dict(state)


def sizes_of_weights(folder: Path) -> Sizes:
    """Count a model folder's weights without reading them.

    Raises:
        CheckpointError: the file is unreadable or not a safetensors file.
    """
    try:
        with safe_open(folder / WEIGHTS, "pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be read ({error})") from None
    return Sizes(len(shapes), sum(map(math.prod, shapes)))


STATISTICS = ("running_mean", "running_var")
"""Ends of the names of tensors that normalisation measures and no optimiser changes. PyTorch gives them these names."""


def changed_parameters(after: Path, before: Path | None) -> tuple[int, int]:
    """Count the parameters of a model that are new or differ from an earlier model's, and all of its parameters.

    Whole numbers and the running statistics of normalisation are no parameters. A tensor that grew is compared where
    both have elements; the rest of it is new. Only one tensor of each model is in memory at a time, and none where the
    names and shapes decide.

    Args:
        after: file of the weights.
        before: file of the earlier model's weights; None = everything is new.

    Raises:
        CheckpointError: a file is unreadable or not a safetensors file.
    """
    changed = total = 0
    try:
        with ExitStack() as files:
            now = files.enter_context(safe_open(after, "pt"))
            then = None if before is None else files.enter_context(safe_open(before, "pt"))
            earlier = {}
            if then is not None:
                earlier = {name: then.get_slice(name).get_shape() for name in then.keys()}  # noqa: SIM118
            for name in now.keys():  # noqa: SIM118
                part = now.get_slice(name)
                if name.rpartition(".")[2] in STATISTICS or not part.get_dtype().startswith(("F", "BF")):
                    continue
                shape, old = part.get_shape(), earlier.get(name, [])
                total += math.prod(shape)
                if then is None or name not in earlier or len(shape) != len(old):
                    changed += math.prod(shape)
                    continue
                common = tuple(slice(min(sides)) for sides in zip(shape, old, strict=True))
                mine, theirs = now.get_tensor(name)[common], then.get_tensor(name)[common]
                changed += math.prod(shape) - int((mine == theirs).sum())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{after}: its weights cannot be compared ({error})") from None
    return changed, total


def read_lineage(bundle: Path) -> dict[str, Any]:
    """Read how a bundle's model was made: `steps` (the number of steps it was trained in), `history`, and more.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return read_document(bundle / LINEAGE, shape=LINEAGE_SHAPE)


# ---------------------------------------------------------------- reading


def read_model_file(folder: Path, committed: Committed | None = None) -> ModelFile:
    """Read a model folder's file and check it: first its bytes against the manifest, then every entry.

    Args:
        committed: the folder's manifest, if the caller has read it before.

    Raises:
        CheckpointError: the file is missing, unreadable, changed, damaged, or written by a later everseg. The message
            for a damaged file lists its faults together.
    """
    path = folder / FILE
    stored = read_document(path, "branches", data=(committed or read_committed(folder)).read(FILE))
    number = stored.get("format", 1)
    if type(number) is not int or number < 1:
        _raise_damage(path, ["format: expected a whole number"])
    if number > FORMAT:
        raise CheckpointError(
            f"{path} has format {number}, this everseg reads up to {FORMAT}: it was written by a later everseg; "
            "update everseg to read it"
        )
    reader = _Reader(stored)
    about = reader.read()
    _raise_damage(path, reader.problems)
    return about


def _raise_damage(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise CheckpointError(
            f"{path} is damaged: {some(problems, 8, between='; ')}; restore it or start again under another name"
        )


class _Reader:
    """Reads a document entry by entry and collects the problems. If there are any, the result must not be used."""

    KNOWN = frozenset(
        {"format", "architecture", "branches", "domains", "fresh", "source", "classes", "next_id"}
        | {"readout", "size", "evaluation", "normalisation", "window", "overlap", "bit_depth", "exif"}
    )

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self.stored = stored
        self.problems: list[str] = []

    def read(self) -> ModelFile:
        branches = self.stored["branches"]
        if not (branches and isinstance(branches, dict) and _is_list_of(list(branches.values()), dict)):
            self.problems.append("branches: expected the classes of each branch")
            branches = {}
        spaces = {name: self._space(name, entry) for name, entry in branches.items()}
        form, wrong = InputForm.of_json(self.stored)
        self.problems += wrong
        readout, wrong = Readout.of_json(self.stored.get("readout", {}))
        self.problems += wrong
        registry = self._registry(spaces)
        if registry is not None and not self.problems:  # the comparison of ids needs valid spaces and classes
            self._check_ids(branches, spaces, registry)
        return ModelFile(
            self._architecture(spaces),
            spaces,
            self._domains(spaces),
            form,
            self._plain("fresh", bool, False, "true or false"),
            self._plain("source", str, "", "a text"),
            registry,
            {} if registry is None else self._onnx(branches),
            {} if registry is None else self._reduced(branches),
            readout,
            {key: value for key, value in self.stored.items() if key not in self.KNOWN},
        )

    def _plain(self, key: str, kind: type, default: Any, expected: str) -> Any:
        value = self.stored.get(key, default)
        if type(value) is not kind:
            self.problems.append(f"{key}: expected {expected}")
            return default
        return value

    def _space(self, branch: str, entry: Mapping[str, Any]) -> LabelSpace:
        values: list[Any] = [entry.get(key) for key in ("groups", "names", "background")]
        groups, names, background = values
        where = f"branches.{branch}"
        if not _is_list_of(groups, list) or not all(_is_list_of(group, int) for group in groups):
            self.problems.append(f"{where}.groups: expected the raw ids of each growth")
            groups = []
        if not _is_list_of(names, str):
            self.problems.append(f"{where}.names: expected the names of the classes")
            names = []
        formerly: Any = entry.get("formerly", {})
        if not isinstance(formerly, dict) or not all(now in names for now in formerly.values()):
            self.problems.append(f"{where}.formerly: expected today's class of each earlier name")
            formerly = {}
        space = LabelSpace(tuple(map(tuple, groups)), tuple(names), background, tuple(formerly.items()))
        if not all(raw in _RAW_IDS for raw in space.order):
            self.problems.append(f"{where}.groups: a raw id that no mask can hold")
        self.problems += [f"{where}: {problem}" for problem in space.problems(stored=True)]
        return space

    def _architecture(self, spaces: Mapping[str, LabelSpace]) -> Mapping[str, Any]:
        """Check the entry that the model is built from: every branch needs as many outputs as classes."""
        found = self.stored.get("architecture")
        if not isinstance(found, dict) or not {"name", "options", "growth"} <= found.keys():
            self.problems.append("architecture: expected name, options and growth")
            return {}
        if not isinstance(found["name"], str | None) or not isinstance(found["options"], dict):
            self.problems.append("architecture: expected a name, and options by name")
        if not _is_list_of(found.get("changes", []), str):
            self.problems.append("architecture.changes: expected the names of structural changes")
        growth = found["growth"]
        if not _is_list_of(growth, dict):
            self.problems.append("architecture.growth: expected the number of outputs each branch gained")
            return found
        try:
            sizes = sizes_of(growth)
        except ConfigError as error:
            self.problems.append(f"architecture.growth: {error}")
            return found
        for branch in dict.fromkeys([*spaces, *(name for one in sizes for name in one)]):
            outputs = sum(one.get(branch, 0) for one in sizes)
            classes = spaces[branch].num_classes if branch in spaces else 0
            if outputs != classes:
                self.problems.append(f"branch '{branch}' has {outputs} outputs and {classes} classes")
        return found

    def _domains(self, spaces: Mapping[str, LabelSpace]) -> Mapping[str, str]:
        found = self.stored.get("domains") or {}
        if not isinstance(found, dict):
            if type(self.stored.get("format")) is int:
                self.problems.append("domains: expected the branch of each domain")
            return {}  # files of layout 1 may hold a list of names here, which does not tell the branches
        if not all(isinstance(branch, str) and branch in spaces for branch in found.values()):
            self.problems.append("domains: expected a known branch for each domain")
        return found

    # -- bundles

    def _registry(self, spaces: Mapping[str, LabelSpace]) -> Registry | None:
        if "classes" not in self.stored and "next_id" not in self.stored:
            return None
        entries: Any = self.stored.get("classes")
        next_id: Any = self.stored.get("next_id")
        if not _is_list_of(entries, dict):
            self.problems.append("classes: expected an entry for each class")
            return None
        found = tuple(
            entry for position, stored in enumerate(entries) for entry in self._class(position, stored)
        )
        for key in ("id", "name"):
            values = [getattr(entry, key) for entry in found]
            if twice := sorted({value for value in values if values.count(value) > 1}):
                self.problems.append(f"classes: {key} {', '.join(map(str, twice))} stands twice")
        if any(branch not in spaces for entry in found for branch in entry.branches):
            self.problems.append("classes: a class has a branch that the model does not have")
        least = max((entry.id for entry in found), default=-1) + 1
        if type(next_id) is not int or not least <= next_id <= MOST_IDS:
            self.problems.append(f"next_id: expected a whole number from {least} to {MOST_IDS}")
            return None
        return Registry(found, next_id)

    def _class(self, position: int, stored: Mapping[str, Any]) -> Iterator[BundleClass]:
        values: list[Any] = [stored.get(key) for key in ("id", "name", "colour", "step")]
        number, name, colour, step = values
        branches: Any = stored.get("branches", stored.get("paths"))  # "paths" in bundles of 0.1
        good = {
            "id": type(number) is int and 0 <= number < MOST_IDS,
            "name": isinstance(name, str) and name != "",
            "colour": _is_list_of(colour, int)
            and len(colour) == 3
            and all(0 <= part <= 255 for part in colour),
            "step": type(step) is int and 0 <= step < 2**31,
            "branches": _is_list_of(branches, str),
        }
        if wrong := [key for key, fine in good.items() if not fine]:
            self.problems.append(f"classes[{position}]: no usable {', '.join(wrong)}")
        else:
            yield BundleClass(number, name, tuple(colour), step, tuple(branches))

    def _check_ids(
        self, branches: Mapping[str, Mapping[str, Any]], spaces: Mapping[str, LabelSpace], registry: Registry
    ) -> None:
        """Check the ids in each branch's entry. They repeat the registry's ids for readers other than everseg."""
        known = {spelling(entry.name) for entry in registry.classes}
        for branch, space in spaces.items():
            if unknown := [name for name in space.names if spelling(name) not in known]:
                self.problems.append(f"branches.{branch}: {some(unknown, 6)} not among the classes")
            elif branches[branch].get("ids") != registry.ids(space):
                self.problems.append(f"branches.{branch}.ids: others than the classes have")

    def _onnx(self, branches: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        found = {name: entry["onnx"] for name, entry in branches.items() if entry.get("onnx") is not None}
        for name, file in found.items():
            self._file(f"branches.{name}.onnx", file)
        return found

    def _reduced(self, branches: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
        found = {name: entry["reduced"] for name, entry in branches.items() if entry.get("reduced")}
        for name, files in found.items():
            if not isinstance(files, dict) or not set(files) <= set(PRECISIONS[1:]):
                self.problems.append(
                    f"branches.{name}.reduced: expected files of {' and '.join(PRECISIONS[1:])}"
                )
                continue
            for precision, file in files.items():
                self._file(f"branches.{name}.reduced.{precision}", file)
        return found

    def _file(self, key: str, file: Any) -> None:
        if not isinstance(file, str) or re.fullmatch(r"\.*|.*[/\\\0].*", file, re.DOTALL):
            self.problems.append(f"{key}: expected the name of a file beside this one")


def _is_list_of(value: Any, kind: type) -> bool:
    """Tell whether a value is a list of items of exactly this type; a bool does not count as an int."""
    return isinstance(value, list) and all(type(item) is kind for item in value)
