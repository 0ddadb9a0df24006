"""Take classes, colours, ids and names from a description, a run or a bundle that exists already."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everseg import registry
from everseg.config.yaml import read
from everseg.data.datasets.descriptor import parse, with_labelmap
from everseg.data.mask_values import Value
from everseg.errors import ConfigError, EversegError
from everseg.files import UnreadableError, json_of, read_regular, real_path
from everseg.labels import IGNORE_NAME, is_background_name

MOST_TRIED = 200
"""So many files and folders are looked at when a description is searched for beside the data."""


@dataclass(frozen=True)
class Like:
    """The classes of an earlier description, and how its masks store them."""

    source: str
    classes: Mapping[int, str]
    """Raw id -> name."""
    values: Mapping[Value, str]
    """What masks store -> class, or `IGNORE_NAME`."""
    background: str | None
    ignore: tuple[int, ...]
    """Raw ids without annotation."""
    colours: Mapping[Value, str] = field(default_factory=dict)
    """Further colours by which coloured masks may store the classes: those of a bundle's predictions."""
    lasting: bool = False
    """Whether the ids are those a bundle gives its classes. The masks that it learnt from may have stored others."""

    @property
    def by_colour(self) -> bool:
        """Whether its masks are told by colour."""
        return any(isinstance(value, tuple) for value in self.values)


def read_like(path: Path) -> Like:
    """Read a data.yaml, the data.yaml of a run, or the classes of a bundle.

    Raises:
        ConfigError: nothing of these, or a data.yaml that describes a published layout.
    """
    if path.is_dir():
        if (path / "run.json").is_file():
            return _of_run(path)
        if is_bundle(path):
            return _of_bundle(path)
        raise ConfigError(f"--like: {path} is neither a run's folder (no run.json) nor a bundle")
    if not path.is_file():
        raise ConfigError(f"--like: {path} is missing; name a data.yaml, a run's folder or a bundle")
    return _of_file(path, str(path))


def _of_file(path: Path, source: str) -> Like:
    content = read(path).value
    if not isinstance(content, dict) or content.get("layout", "folders") != "folders":
        raise ConfigError(f"--like: {path} describes no plain folders, so it holds no classes to take over")
    found = parse(with_labelmap(content, real_path(path).parent), str(path))
    labels = found.labels
    names: dict[int, str] = {**labels.names, **dict.fromkeys(labels.void, IGNORE_NAME)}
    table: Mapping[Any, int] = found.palette or found.id_table or {raw: raw for raw in names}
    values: dict[Value, str] = {value: names[raw] for value, raw in table.items()}
    background = None if labels.background is None else labels.names[labels.background]
    return Like(source, dict(labels.names), values, background, labels.void)


def _of_run(folder: Path) -> Like:
    try:
        data = json_of(read_regular(folder / "run.json", root=folder))["config"]["data"]
        dataset = Path(data["dataset"]).expanduser()
    except (UnreadableError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--like: {folder / 'run.json'} cannot be read ({error}); restore it") from None
    if data.get("domains") or not re.fullmatch(r"\.ya?ml", dataset.suffix, re.IGNORECASE):
        raise ConfigError(f"--like: the run {folder} read no data.yaml, so name one with --like FILE.yaml")
    places = (
        [dataset]
        if dataset.is_absolute()
        else [base / dataset for base in (Path(), *real_path(folder).parents)]
    )
    for place in places[:6]:
        if place.is_file():
            return _of_file(place, f"{place} of the run {folder}")
    raise ConfigError(
        f"--like: the run {folder} read {dataset}, which is not there any more (looked in "
        f"{', '.join(str(p.parent) for p in places[:6])}); name the file with --like FILE.yaml"
    )


def is_bundle(folder: Path) -> bool:
    """Whether a path is the folder of a bundle."""
    return folder.is_dir() and registry.resolve("classes", "is_bundle")(folder)


def _of_bundle(folder: Path) -> Like:
    try:
        entries = registry.resolve("classes", "of_bundle")(folder)
    except EversegError as error:
        raise ConfigError(f"--like: {error}; or name a data.yaml") from None
    classes = {raw: name for raw, name, _ in entries}
    values: dict[Value, str] = {raw: name for raw, name, _ in entries}
    values.setdefault(255, IGNORE_NAME)
    background = next((name for name in classes.values() if name == "background"), None)
    colours: dict[Value, str] = {(c[0], c[1], c[2]): name for _, name, c in entries}
    return Like(f"the bundle {folder}", classes, values, background, (255,), colours, lasting=True)


def class_names_of(path: Path) -> list[str]:
    """Names of the classes of a description, run or bundle, without the background; [] if it cannot be read."""
    try:
        like = read_like(path)
    except (EversegError, OSError):
        return []
    background = like.background
    return [n for n in like.classes.values() if n != background and not is_background_name(n)]


def near(places: Iterable[Path], out: Path) -> list[Path]:
    """Find descriptions, runs and bundles beside some folders; the newest first."""
    found: dict[Path, float] = {}
    tried = 0
    for place in dict.fromkeys(real_path(p) for p in places):
        for folder in (place, place / "runs"):
            try:
                entries = sorted(folder.iterdir())
            except OSError:
                continue
            for entry in entries:
                tried += 1
                if tried > MOST_TRIED or entry == real_path(out) or entry.name.startswith("."):
                    continue
                usable = (
                    entry.suffix in (".yaml", ".yml") or (entry / "run.json").is_file() or is_bundle(entry)
                )
                if usable:
                    found[entry] = entry.stat().st_mtime
    return sorted(found, key=lambda path: -found[path])


def matching(path: Path, values: Iterable[Value]) -> Like | None:
    """The classes of a description if its masks store most of these values, else None."""
    try:
        like = read_like(path)
    except (EversegError, OSError):
        return None
    wanted = {v for v in values if v not in (0, 255, (0, 0, 0))}
    known = {v for v, name in (*like.values.items(), *like.colours.items()) if name != IGNORE_NAME}
    return like if wanted and len(wanted & known) * 2 > len(wanted) else None
