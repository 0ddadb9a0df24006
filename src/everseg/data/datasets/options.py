"""Check the arguments that all readers share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everseg.data.channels import channels_of
from everseg.data.datasets.decode import Reading
from everseg.errors import ConfigError, near_miss
from everseg.files import MOST_LIST, UnreadableError, read_regular, real_path

SHARED = ("max_pixels", "follow_links", "exif", "bit_depth", "channels", "on_missing", "skip")
"""Options of every reader of files; also keys of a data.yaml."""


def root_of(root: str | Path | None) -> Path:
    """Check a reader's root and resolve it.

    Raises:
        ConfigError: not given, or no such folder.
    """
    if root is None:
        raise ConfigError("data.root: this data set needs its folder; pass data.root=DIR")
    path = Path(root).expanduser()
    if not path.exists():
        looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        raise ConfigError(f"data.root: {root} does not exist{looked}; pass data.root=DIR")
    if not path.is_dir():
        raise ConfigError(f"data.root: {root} is a file; pass the folder it was unpacked to as data.root=DIR")
    return real_path(path)


def own_file(path: Path, roots: Sequence[Path | None], key: str) -> Path:
    """Check that a file that a data.yaml names lies with the data: whoever wrote the data.yaml may be somebody else.

    Args:
        path: the file.
        roots: folders of the data; None stands for a user who names the file and may name any.
        key: the key that names it.

    Raises:
        ConfigError: it lies outside of all of them.
    """
    if None in roots:
        return path
    try:
        real = real_path(path)
        if any(real.is_relative_to(real_path(root)) for root in roots if root is not None):
            return path
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL: no file that could be read
        pass
    raise ConfigError(f"{key}: {path} lies outside of the data folder and of the data.yaml's; copy it there")


def reading_of(
    given: Mapping[str, Any],
    *,
    here: Path | None = None,
    below: str = "data.options.",
    roots: Sequence[Path | None] = (None,),
) -> Reading:
    """Check the options that all readers share.

    Args:
        given: some of `SHARED`. `max_pixels`: larger pictures are refused. `follow_links`: allow links out of the
            data folder. `exif`: "apply" or "ignore" the images' EXIF orientation. `bit_depth`: 8, or 16 for images
            of up to 16 bits per channel, reduced to their higher byte. `channels`: what the images' channels are, if
            not RGB with 8 bits (`everseg.data.channels.channels_of`). `on_missing`: "stop", or "skip" to leave out
            images without mask and masks without image. `skip`: file with a line "split<tab>sample" for each sample
            to leave out, as `everseg data check --write-skiplist` writes it.
        here: folder that a relative `skip` starts from; default the working directory.
        below: text that messages put before an option's name.
        roots: folders that `skip` must lie in, as for `own_file`.

    Raises:
        ConfigError: wrong or unknown options (all of them).
    """
    problems: list[str] = []

    def expected(key: str, what: str, values: Mapping[str, Any]) -> None:
        problems.append(f"{below}{key}: expected {what}, got {values[key]!r}")

    for key in given:
        if key not in SHARED:
            problems.append(f"{below}{key}: no such option{near_miss(key, SHARED)}")
    values = {key: given.get(key, getattr(Reading, key)) for key in SHARED if key != "skip"}
    values["channels"], wrong = channels_of(given.get("channels"))
    problems += [f"{below}{text}" for text in wrong]
    if values["channels"] is not None and "bit_depth" in given:
        problems.append(f"{below}bit_depth: channels.bits states it; leave bit_depth out")
    if type(values["max_pixels"]) is not int or values["max_pixels"] < 1:
        expected("max_pixels", "a positive whole number", values)
    if not isinstance(values["follow_links"], bool):
        expected("follow_links", "true or false", values)
    if values["exif"] not in ("apply", "ignore"):
        expected("exif", "'apply' or 'ignore'", values)
    if type(values["bit_depth"]) is not int or values["bit_depth"] not in (8, 16):
        expected("bit_depth", "8 or 16", values)
    if values["on_missing"] not in ("stop", "skip"):
        expected("on_missing", "'stop' or 'skip'", values)
    skip: frozenset[tuple[str, str]] = frozenset()
    if given.get("skip") is not None:
        if isinstance(given["skip"], str | Path):
            try:
                file = (here or Path.cwd()) / Path(given["skip"]).expanduser()
                skip = read_skiplist(own_file(file, roots, f"{below}skip"), below)
            except ConfigError as error:
                problems += error.problems
        else:
            expected("skip", "a file that data check --write-skiplist wrote", given)
    if problems:
        raise ConfigError(problems)
    return Reading(**values, skip=skip)


def skiplist_line(split: str, sample: str) -> str:
    """Write one line of a skip list; a name that a line cannot hold becomes JSON text."""
    return f"{split}\t{sample if sample.isprintable() and sample[:1] not in (chr(34), '#') else json.dumps(sample)}"


def read_skiplist(path: Path, below: str = "data.options.") -> frozenset[tuple[str, str]]:
    """Read a skip list: "split<tab>sample" per line; blank lines and lines starting with # are ignored.

    Raises:
        ConfigError: it cannot be read, or a line is not of this form.
    """
    try:
        text = read_regular(path, MOST_LIST).decode("utf-8-sig", "surrogateescape")
    except UnreadableError as error:
        raise ConfigError(f"{below}skip: {path} cannot be read ({error})") from None
    found, problems = set(), []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        split, tab, sample = line.partition("\t")
        try:
            found.add((split, json.loads(sample) if sample.startswith('"') else sample))
        except ValueError:
            tab = ""
        if not (tab and split and sample):
            problems.append(f"{below}skip: {path}, line {number}: expected 'split<tab>sample'")
    if problems:
        raise ConfigError(problems[:20])
    return frozenset(found)
