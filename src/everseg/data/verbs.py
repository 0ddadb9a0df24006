"""The commands of `everseg data` as Python functions: `everseg.data.check` and the others."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from everseg.config.fields import DataConfig
from everseg.config.loading import load_data
from everseg.config.yaml import read
from everseg.data.base import Dataset
from everseg.data.class_weights import CONSTANT, ENCODER_CONSTANT, class_weights, dataset_pixels, output_order
from everseg.data.datasets import annotated, load_dataset
from everseg.data.doctor import findings
from everseg.data.doctor.doctor import check_source
from everseg.data.get import download as archives
from everseg.data.get import draw_masks
from everseg.data.proposal.describe import MOST, NO_BACKGROUND, Described, Proposal, describe, propose
from everseg.data.proposal.guess import data_sets_below
from everseg.data.proposal.like import class_names_of, is_bundle, matching, near, read_like
from everseg.data.proposal.naming import TwoReadingsError
from everseg.data.proposal.preview import preview
from everseg.data.saliency_maps import Saliency, write_saliency
from everseg.data.writing import write_atomically
from everseg.display import Piece, Result, counted, escaped, table
from everseg.errors import ConfigError, DataError, EversegError, some
from everseg.files import real_path
from everseg.labels import spelling
from everseg.progress import counting, counting_bytes

# ---------------------------------------------------------------- check


def check(
    dataset: str | Path | Dataset,
    overrides: Sequence[str] = (),
    *,
    write_skiplist: str | Path | None = None,
    sample: int | None = None,
    lock: str | Path | None = None,
    cache: bool = True,
    quiet: bool = False,
) -> findings.Report:
    """Read every image and mask of a data set once, on all cores, and report all faults.

    Args:
        dataset: a name from `everseg list datasets`, a data.yaml, your own file.py:build, or an opened data set.
        overrides: "key=value", such as `root=DIR`; not allowed for a data set that is already open.
        write_skiplist: file to write the names of all faulty samples to; `data.options.skip` reads it and skips them.
        sample: number of samples to check per split, drawn with a fixed seed; default all.
        lock: file with the samples' SHA-256. It is written if it does not exist; otherwise the samples are compared
            with it.
        cache: do not read files again that have not changed since the last check.
        quiet: print no progress.

    Returns:
        The findings; its `ok` is False if there are errors.

    Raises:
        ConfigError: wrong settings, or a requested file that cannot be written.
    """
    skip, lock = (None if given is None else Path(given) for given in (write_skiplist, lock))
    for option, file in (("--write-skiplist", skip), ("--lock", lock)):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise ConfigError(f"{option}: {file} cannot be a file there; name a file in a folder that exists")
    if isinstance(dataset, Dataset):
        name, build, lenient = dataset.name, lambda: dataset, None
    else:
        data = load_data(dataset, overrides)
        forgiving = data.model_copy(update={"options": {**data.options, "on_missing": "skip"}})
        name, build, lenient = str(dataset), lambda: load_dataset(data), lambda: load_dataset(forgiving)
    locked = findings.read_lock(lock) if lock is not None and lock.exists() else None
    with counting(f"checking {name}", quiet=quiet) as advance:
        report = check_source(
            build,
            lenient=lenient,
            sample=sample,
            cache=cache and lock is None,
            lock=locked,
            progress=advance,
        )
    notes = []
    if skip is not None:
        count = findings.write_skiplist(skip, report)
        notes.append(
            f"{counted(count, 'faulty sample')} in {skip}; leave them out with data.options.skip={skip}"
        )
    if lock is not None and locked is None:
        findings.write_lock(lock, report)
        notes.append(
            f"hashes of {counted(len(report.digests), 'sample')} in {lock}; the same command compares with them"
        )
    return replace(report, notes=tuple(notes))


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class ClassWeight:
    """How often a class occurs, and its weight in the cross-entropy."""

    name: str
    """Name of the class; "void" for the pixels without annotation."""
    pixels: int
    """In all masks of the split, as they are stored."""
    weight: float


@dataclass(frozen=True, repr=False)
class Weights(Result):
    """Class weights 1/ln(constant + share of pixels) of a split."""

    dataset: str
    split: str
    constant: float
    """Bounds the weights of rare classes."""
    classes: tuple[ClassWeight, ...]
    """In the order of a model's outputs, void last; void counts as pixels but weighs 0."""

    def shown(self) -> Iterable[Piece]:
        rows = [(one.name, one.pixels, f"{one.weight:.6f}") for one in self.classes]
        yield table(["class", "pixels", "weight"], rows, right="pixels|weight")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "classes": [asdict(one) for one in self.classes]}


def weights(
    dataset: str | Path | Dataset,
    overrides: Sequence[str] = (),
    *,
    split: str = "train",
    encoder: bool = False,
    quiet: bool = False,
) -> Weights:
    """Compute the class weights 1/ln(1.1 + p), where p is the share of pixels. Void counts, but has weight 0.

    Args:
        dataset: as for `check`; `overrides` too.
        split: split whose pixels are counted.
        encoder: use 1/ln(1.2 + p), the weights for training only ERFNet's encoder.
        quiet: print no progress.

    Raises:
        ConfigError: wrong settings.
        DataError: no such split, or faulty masks.
    """
    data = dataset if isinstance(dataset, Dataset) else load_dataset(load_data(dataset, overrides))
    with counting(f"counting {data.name}", quiet=quiet) as advance:
        pixels = dataset_pixels(data, split, progress=advance)
    constant = ENCODER_CONSTANT if encoder else CONSTANT
    names = [*(data.labels.names[raw] for raw in output_order(data.labels)), "void"]
    rows = zip(names, pixels.tolist(), class_weights(pixels, constant).tolist(), strict=True)
    return Weights(data.name, split, constant, tuple(ClassWeight(*row) for row in rows))


# ---------------------------------------------------------------- saliency


def saliency(
    dataset: str | Path | Dataset,
    overrides: Sequence[str] = (),
    *,
    out: str | Path,
    split: str = "train",
    quiet: bool = False,
) -> Saliency:
    """Write a simple saliency map of every image, for methods that read one (`data.extra.saliency`).

    Salient are pixels whose colour is far from the image's mean (`everseg.data.saliency_maps.frequency_tuned`). The
    maps that SSUL's authors publish come from a trained detector, and are better.

    Args:
        dataset: as for `check`; `overrides` too.
        out: folder to write OUT/SPLIT/ID.png to; maps that are there are replaced.
        split: split whose images get a map.
        quiet: print no progress.

    Raises:
        ConfigError: wrong settings.
        DataError: no such split, or images that cannot be read.
    """
    data = dataset if isinstance(dataset, Dataset) else load_dataset(load_data(dataset, overrides))
    with counting(f"saliency of {data.name}", quiet=quiet) as advance:
        return write_saliency(data, Path(out), split, progress=advance)


# ---------------------------------------------------------------- download and prepare


@dataclass(frozen=True, repr=False)
class Downloaded(Result):
    """A data set that has been downloaded to disk."""

    dataset: str
    root: Path
    """Folder to give as `data.root`."""

    def shown(self) -> Iterable[Piece]:
        yield f"ready: data.root={self.root}"

    def to_json(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "root": str(self.root)}


def download(dataset: str, to: str | Path, *, quiet: bool = False) -> Downloaded:
    """Download and unpack a data set. A second call continues where the first stopped.

    Args:
        dataset: "voc" or "ade".
        to: folder to download and unpack to; created if it does not exist.
        quiet: print no progress.

    Raises:
        ConfigError: unknown name.
        DataError: the download fails, an archive is faulty, or a file cannot be written.
    """
    return Downloaded(dataset, archives.download(dataset, to, progress=counting_bytes(dataset, quiet=quiet)))


def prepare(
    dataset: str,
    root: str | Path,
    *,
    overwrite: bool = False,
    check: bool = False,
    skip_unknown: bool = False,
    quiet: bool = False,
) -> draw_masks.Prepared:
    """Draw the id masks of Cityscapes or IDD from their polygons. A second call draws only missing masks.

    Args:
        dataset: "cityscapes" or "idd".
        root: folder that holds gtFine/ (IDD: or its parts).
        overwrite: also redraw masks that exist.
        check: write nothing; only verify the masks that exist.
        skip_unknown: leave out polygons with unknown labels instead of refusing the file.
        quiet: print no progress.

    Returns:
        The number of masks written and kept, and the files that were refused.

    Raises:
        ConfigError: unknown data set, or no such folder.
        DataError: no polygon files in the folder.
        OSError: the disk is full or read-only.
    """
    with counting(f"preparing {dataset}", quiet=quiet) as advance:
        return draw_masks.prepare(
            dataset, root, overwrite=overwrite, check=check, skip_unknown=skip_unknown, progress=advance
        )


# ---------------------------------------------------------------- init

RECIPE = "camvid-6-5-mib"
"""The preset whose network and training the commands begin with."""


@dataclass(frozen=True, repr=False)
class NewDescription(Result):
    """A data.yaml that `init` just wrote, and the next steps."""

    path: Path
    """The data.yaml."""
    page: Path
    """The page of images with their labels over them, to look at."""
    proposal: Proposal
    """What was found in the folder."""
    named: bool
    """Whether the classes have names, given, found or brought by the layout; else they are called by their values."""
    commands: tuple[str, ...]
    """What to type next."""
    notes: tuple[str, ...] = ()
    """What was decided and can be decided otherwise, and what is new or missing beside `like` or was left out."""
    table: tuple[str, ...] = ()
    """A line for each class: what masks store = id = name, and its share of the pixels."""

    def outcome(self) -> str:
        """State what was written and the next commands, in several lines."""
        lines = [
            f"Wrote {real_path(self.path)}, and {self.page.name} beside it: labels over images; open it in a browser."
        ]
        if self.table:
            lines += [
                "\nMask value = id in results = class: share of the pixels",
                *(f"  {line}" for line in self.table),
            ]
        if not self.named:
            lines += [f"\nFirst: {_nameless(self.path)}"]
        lines += ["\nNext:", *(f"  {line}" for line in self.commands)]
        if any(RECIPE in command for command in self.commands):
            lines += [
                f"\nThis uses the settings of the preset {RECIPE} (small model, short training); your data replace",
                f"CamVid. To see them: everseg show {RECIPE}. Any other preset works too; key=value changes one.",
            ]
        return "\n".join(lines)

    def shown(self) -> Iterable[Piece]:
        yield self.proposal.text()
        yield self.outcome()

    def _repr_html_(self) -> str:
        """Show the texts and the page itself; scripts in the page do not run."""
        try:
            page = self.page.read_text(encoding="utf-8")
        except OSError:  # the page has been moved or deleted since
            return super()._repr_html_()
        frame = f'<iframe sandbox srcdoc="{escaped(page)}" style="width: 100%; height: 32em"></iframe>'
        return f"{super()._repr_html_()}\n{frame}"

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "page": str(self.page),
            "found": self.proposal.text(),
            "named": self.named,
            "commands": list(self.commands),
            "notes": list(self.notes),
            "table": list(self.table),
        }


@dataclass(frozen=True, repr=False)
class NewDomains(NewDescription):
    """The run over several data sets that `init` found below one folder, and the next steps.

    `path` is the configuration of the run; `page` and `proposal` are those of the first data set.
    """

    sets: Mapping[str, NewDescription] = field(default_factory=dict)
    """Domain -> its description, in the order in which the run teaches them."""

    def outcome(self) -> str:
        """State what was written and the next commands, in several lines."""
        files = ", ".join(str(one.path) for one in self.sets.values())
        unnamed = [str(one.path) for one in self.sets.values() if not one.named]
        lines = [
            f"{len(self.sets)} data sets side by side: {', '.join(self.sets)}. Wrote {files}, each with a page "
            f"*_preview.html to look at, and {real_path(self.path)}, a run over them, one domain after the other."
        ]
        if unnamed:
            lines.append(f"\nFirst: the classes have no names yet in {', '.join(unnamed)}; write them there")
        return "\n".join([*lines, "\nNext:", *(f"  {line}" for line in self.commands)])

    def shown(self) -> Iterable[Piece]:
        for name, one in self.sets.items():
            yield f"{name}:\n{one.proposal.text()}"
        yield self.outcome()

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "sets": {name: one.to_json() for name, one in self.sets.items()},
            "commands": list(self.commands),
            "notes": list(self.notes),
        }


@annotated.parsing_once()
def init(
    folder: str | Path,
    *,
    classes: Sequence[str] | None = None,
    background: str | None = None,
    names_from: int | None = None,
    like: str | Path | None = None,
    out: str | Path = "data.yaml",
    force: bool = False,
    ask: Callable[[Proposal], Sequence[str] | None] | None = None,
    ask_background: Callable[[str], str] | None = None,
    follow_links: bool = False,
    ask_reading: Callable[[Sequence[str]], int] | None = None,
    quiet: bool = False,
) -> NewDescription:
    """Guess the layout and the classes of a folder; write a data.yaml and a page with 24 labelled images.

    Where several folders below it hold a data set each, every one gets its description (NAME.yaml) and page, and
    `domains.yaml` (or `out`) becomes a run over them, one domain after the other. If anything fails, nothing is left.

    Args:
        folder: images and masks in any layout.
        classes: names of the classes in the order of their values, or "name=id", "name=red,green,blue" for each value
            ("ignore=255": without annotation; "crack=128-255": a range); default the names found beside the data, else
            names made of the values.
        background: name of the background class, or "none"; default the class with a usual background name, else the
            value 0 or black if nothing else names it.
        names_from: id of the first name of a list of names, 0 or 1; needed only where both fit.
        like: a data.yaml, a run or a bundle whose classes, colours, ids and names are taken over.
        out: path of the description to write; the page is written beside it.
        force: replace both if they exist.
        ask: called with the findings before anything is written; may return the names if `classes` does not give them.
        ask_background: called with the proposed background instead of adding a note about it; returns the answer.
        follow_links: use files and folders that links lead to, also out of the folder.
        ask_reading: called with the ways to understand a list of names if several fit; returns the position of one.
        quiet: print no progress.

    Raises:
        ConfigError: no such folder, existing files, or names that do not fit the values or fit them in several ways.
        DataError: no layout fits, no mask can be read, masks contradict each other or can be read in several ways, or
            there are more values than a mask can have classes.
        OSError: the disk is full, or the file cannot be written.
    """
    folder, out = Path(folder), Path(out)
    sets = data_sets_below(folder, follow_links=follow_links) if folder.is_dir() else []
    if sets and out == Path("data.yaml"):
        out = Path("domains.yaml")
    outs = {place: out.with_name(f"{_file_name(place.name)}.yaml") for place in sets} or {folder: out}
    pages = [one.with_name(f"{one.stem}_preview.html") for one in outs.values()]
    _refuse(folder, out, [*outs.values(), *pages, *([out] if sets else [])], force)

    earlier = None if like is None else read_like(Path(like))

    def one(place: Path, file: Path) -> NewDescription:
        with counting(f"reading the masks of {place}", quiet=quiet) as advance:
            proposal = propose(place, follow_links=follow_links, progress=advance)
        answer = None if ask is None or len(proposal.unnamed) > MOST else ask(proposal)
        names = answer if classes is None else classes

        def finished(background: str | None, first: int | None) -> Described:
            return describe(
                proposal, names, here=file.parent, background=background, first=first, like=earlier
            )

        start = names_from
        try:
            described = finished(background, start)
        except TwoReadingsError as error:
            starts = [reading.first for reading in error.readings]
            if ask_reading is None or None in starts:
                raise
            start = starts[ask_reading(error.lines)]
            described = finished(background, start)
        if described.open_background and ask_background is not None:
            described = finished(ask_background(NO_BACKGROUND), start)
        write_atomically(file, described.yaml().encode())
        dataset = load_dataset(DataConfig(dataset=str(file), options={"on_missing": "skip"}))
        notes = (*described.notes, *proposal.layout.notes, *dataset.notes)
        if earlier is None and not sets:
            notes = (*notes, *_near(folder, out, proposal))
        named = names is not None or earlier is not None or bool(proposal.names) or not proposal.unnamed
        compared = [] if sets or not named else _compared(file, place, like)
        commands = _next_commands(dataset, file, compared)
        page = file.with_name(f"{file.stem}_preview.html")
        # One data set of several is only checked: the run over all of them is in the file beside it.
        after = commands[:1] if sets else commands
        text = preview(dataset, first="" if named else _nameless(file), commands=after)
        write_atomically(page, text.encode())
        return NewDescription(file, page, proposal, named, commands, notes, described.table)

    with _nothing_left([*outs.values(), *pages, *([out] if sets else [])]):
        if not sets:
            return one(folder, out)
        made: list[NewDescription] = []
        problems: list[EversegError] = []
        for place, file in outs.items():
            try:
                made.append(one(place, file))
            except (ConfigError, DataError) as error:
                problems.append(type(error)(f"{place.name}: {error}"))
        if problems:
            texts = [str(problem) for problem in problems]
            raise (
                ConfigError(texts)
                if all(isinstance(p, ConfigError) for p in problems)
                else DataError(
                    "\n  ".join(texts if len(texts) == 1 else [counted(len(texts), "problem"), *texts])
                )
            )
        return _domains(out, dict(zip((_file_name(place.name) for place in sets), made, strict=True)))


def _nameless(file: Path) -> str:
    """Say what to do about classes without names."""
    return (
        f"the classes have no names yet, so they are called by their values; write names into {file} (classes: ...), "
        "or run init again with --classes NAME=VALUE,... --force"
    )


@contextmanager
def _nothing_left(files: Sequence[Path]) -> Iterator[None]:
    """Put files back as they were, or delete them, where the work within fails."""
    before = {file: file.read_bytes() if file.is_file() else None for file in files}
    try:
        yield
    except BaseException:
        for file, content in before.items():
            if content is None:
                file.unlink(missing_ok=True)
            elif file.read_bytes() != content:
                write_atomically(file, content)
        raise


def _file_name(text: str) -> str:
    """A text as the name of a file and of a domain."""
    return re.sub(r"[^\w-]+", "-", text).strip("-") or "data"


DOMAIN_RECIPE = "camvid-day-dusk-mdil"
"""The preset whose network and training a run over one's own domains begins with."""
DOMAIN_METHODS = "single,multi,fe,mdil-authors,ft"


def _domains(out: Path, made: Mapping[str, NewDescription]) -> NewDomains:
    """Write the run over several data sets, one after the other."""
    datasets = {
        name: load_dataset(DataConfig(dataset=str(one.path), options={"on_missing": "skip"}))
        for name, one in made.items()
    }
    test = next((s for s in ("val", "test") if all(s in d.splits for d in datasets.values())), "train")
    lines = [
        f"# Settings of {DOMAIN_RECIPE}. The domains are taught in this order. Paths start from this file.",
        f"preset: {DOMAIN_RECIPE}",
        f"name: {out.stem}",
        "data:",
        "  domains:",
        *(f"    {json.dumps(name)}: {{dataset: {json.dumps(one.path.name)}}}" for name, one in made.items()),
        f"scenario: {{test_split: {test}}}",
    ]
    write_atomically(out, ("\n".join(lines) + "\n").encode())
    shown = shlex.quote(str(out))
    commands = (
        *(f"everseg data check {shlex.quote(str(one.path))}" for one in made.values()),
        f"everseg run {shown} --dry-run",
        f"everseg run {shown}",
        f"everseg sweep {shown} --methods {DOMAIN_METHODS}",
    )
    notes = tuple(f"{name}: {text}" for name, one in made.items() for text in one.notes)
    first = next(iter(made.values()))
    named = all(one.named for one in made.values())
    return NewDomains(out, first.page, first.proposal, named, commands, notes, sets=dict(made))


def _near(folder: Path, out: Path, proposal: Proposal) -> list[str]:
    """Point to descriptions, runs and bundles nearby whose classes these masks seem to show."""
    values: list[Any] = [*proposal.values.colours, *proposal.values.ids, *proposal.values.own.values()]
    places = (out.parent, real_path(folder).parent, Path())
    found = [path for path in near(places, out) if matching(path, values) is not None]
    if not found:
        return []
    return [
        f"{some([str(path) for path in found], 3)} may describe the same classes; to give them the same names, ids and "
        f"colours: everseg data init {shlex.quote(str(folder))} --like {shlex.quote(str(found[0]))} --force"
    ]


def _next_commands(dataset: Dataset, out: Path, places: Sequence[Path] = ()) -> tuple[str, ...]:
    """List the commands to run after writing a description: what fits best comes first.

    Where a run or bundle near knows some of the classes and others are new, it is extended. Where another description
    near has the same classes and another folder, the place is new: a run over both, one domain after the other.
    Otherwise all classes are learnt in one step.

    Args:
        places: descriptions, runs and bundles to compare with, the most likely first.
    """
    shown = shlex.quote(str(out))
    name = re.sub(r"[^\w.-]+", "-", dataset.name).strip("-.") or "run"
    test = next((s for s in ("val", "test") if s in dataset.splits), "train")
    ours = {spelling(dataset.labels.names[raw]): dataset.labels.names[raw] for raw in dataset.labels.classes}
    commands = [f"everseg data check {shown}"]
    for place in places:
        known = {spelling(one) for one in class_names_of(place)}
        new = [one for key, one in ours.items() if key not in known]
        if new and known & set(ours) and place.is_dir():
            return (*commands, *_extending(place, shown, new, name, test))
        other = known == set(ours) and not place.is_dir() and _root_at(place) != _root_at(out)
        if other and test in _splits_at(place):
            two = {place.stem: str(place), out.stem if out.stem != place.stem else f"{out.stem}-2": str(out)}
            domains = ", ".join(
                f"{json.dumps(key)}: {{dataset: {json.dumps(file)}}}" for key, file in two.items()
            )
            run = (
                f"everseg run {DOMAIN_RECIPE} {shlex.quote(f'data.domains={{{domains}}}')} "
                f"scenario.test_split={test} name={name}"
            )
            return (*commands, f"{run} --dry-run", run)
    run = f"everseg run {RECIPE} data={shown} task=offline scenario.test_split={test} name={name}"
    return (*commands, f"{run} --dry-run", run)


def _extending(place: Path, data: str, new: Sequence[str], name: str, test: str) -> tuple[str, ...]:
    """Commands that teach a run's model, or a bundle, the classes that it does not know."""
    bundle = place if is_bundle(place) else Path(f"{place.name}-bundle")
    export = (
        ()
        if bundle == place
        else (f"everseg export {shlex.quote(str(place))} -o {shlex.quote(str(bundle))}",)
    )
    add = shlex.quote(",".join(new))
    out = shlex.quote(f"{bundle.name}-{name}")  # not in runs/, where the run of the extension gets this name
    settings = "" if test == "val" else f" scenario.test_split={test}"
    return (
        *export,
        f"everseg extend {shlex.quote(str(bundle))} --data {data} --add {add} -o {out}{settings}",
    )


def _root_at(file: Path) -> Path:
    """The folder that a description is about."""
    content = read(file).value
    return real_path(real_path(file).parent / Path(str(content.get("root", "."))).expanduser())


def _splits_at(file: Path) -> tuple[str, ...]:
    """Splits of a described data set; () if it cannot be opened."""
    try:
        return tuple(load_dataset(DataConfig(dataset=str(file))).splits)
    except (EversegError, OSError):
        return ()


def _compared(out: Path, folder: Path, like: str | Path | None) -> list[Path]:
    """Descriptions, runs and bundles whose classes are compared with those of a new description."""
    here = Path.cwd()
    found = near((out.parent, real_path(folder).parent, Path()), out)
    shown = [path.relative_to(here) if path.is_relative_to(here) else path for path in found]
    first = [Path(like)] if like is not None else []
    return [*first, *(path for path in shown if real_path(path) not in [real_path(one) for one in first])]


def _refuse(folder: Path, out: Path, files: Sequence[Path], force: bool) -> None:
    """Raise a ConfigError that lists everything that prevents writing new files."""
    problems = []
    if not folder.is_dir():
        problems.append(
            f"{folder} is {'not a folder' if folder.exists() else 'missing'}; name the folder of the images"
        )
    if out.suffix.lower() not in (".yaml", ".yml"):
        problems.append(f"--out: {out} must end in .yaml")
    if not out.parent.is_dir():
        problems.append(f"--out: there is no folder {out.parent}")
    twice = [str(file) for file in dict.fromkeys(files) if list(files).count(file) > 1]
    if twice:
        problems.append(f"--out: {some(twice)} would be written twice; name another file, or rename a folder")
    if not force:
        problems += [f"{file} exists; name another file with --out, or replace it with --force"
                     for file in files if file.exists()]  # fmt: skip
    if problems:
        raise ConfigError(problems)
