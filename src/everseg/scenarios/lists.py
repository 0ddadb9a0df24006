"""Image lists per step: the published ones, and a user's own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from everseg.config.fields import ScenarioConfig
from everseg.data.base import Dataset
from everseg.display import counted
from everseg.errors import ConfigError, DataError, near_miss, some
from everseg.files import MOST_LIST, UnreadableError, array_of, read_regular, read_text, whole_number
from everseg.scenarios.tasks import Groups, canonical_task

_TABLES = "everseg.scenarios"


def sha1_int64(indices: np.ndarray) -> str:
    """SHA-1 of an index list as little-endian int64: the checksums that everseg stores are of this form."""
    return hashlib.sha1(np.ascontiguousarray(indices, "<i8").tobytes()).hexdigest()


@functools.cache
def _checksums() -> dict[str, Any]:
    text = resources.files(_TABLES).joinpath("tables/mib_lists.json").read_text(encoding="utf-8")
    return json.loads(text)


def unpack(name: str, array: np.ndarray) -> np.ndarray:
    """Restore one packed list: `.bits` holds a mask of an ascending list, anything else the list itself."""
    if name.endswith(".bits"):
        # One bit per image of the split, set for those in the list: eight times smaller than a byte each.
        return np.flatnonzero(np.unpackbits(array)).astype(np.int64)
    return array.astype(np.int64)


def published_length(dataset_name: str) -> int | None:
    """Number of images in the training split that the published lists index; None for a data set without lists."""
    return _checksums()["images"].get(dataset_name)


def published_lists(dataset_name: str) -> tuple[tuple[str, str], ...]:
    """The (task, protocol) pairs with published lists."""
    folders = sorted({name.rsplit("/", 1)[0] for name in _checksums()["lists"]})
    pairs: list[tuple[str, str]] = []
    for folder in folders:
        owner, _, task = folder.partition("/")
        if owner == dataset_name:
            # Folders are named "voc/15-5-ov" and "voc/15-5"; the latter serves every protocol but overlapped.
            protocols = ["overlapped"] if task.endswith("-ov") else ["disjoint", "sequential"]
            if dataset_name == "ade":
                protocols.append("partitioned")
            pairs += [(task.removesuffix("-ov"), protocol) for protocol in protocols]
    return tuple(pairs)


def published(dataset_name: str, task: str, protocol: str) -> list[np.ndarray] | None:
    """Read the authors' training lists: positions in VOC's train_aug (10 582) or ADE20K's training split (20 210).

    VOC has lists for disjoint (also used by sequential) and overlapped; ADE20K one set per task, in which every
    image belongs to one step, for disjoint, sequential and partitioned.

    Returns:
        One int64 array per step in the published order, or None if nothing is published.

    Raises:
        DataError: the table of this installation is damaged.

    Source: index files of github.com/fcdl94/MiB (MIT), checked against their SHA-1.
    """
    task = canonical_task(task, dataset_name)
    if (task, protocol) not in published_lists(dataset_name):
        return None
    folder = f"{dataset_name}/{task}" + ("-ov" if protocol == "overlapped" else "")
    checksums = {k: v for k, v in _checksums()["lists"].items() if k.rsplit("/", 1)[0] == folder}
    lists = []
    # Every list is compared with the checksum of the authors' own file, so that an unpacking fault cannot pass.
    for step in range(len(checksums)):
        key = f"{folder}/train-{step}"
        try:
            indices = _read_packed(key)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"published list {key}: unreadable ({error}); install everseg again") from None
        if sha1_int64(indices) != checksums[key]["sha1_int64"]:
            raise DataError(f"published list {key}: checksum differs; install everseg again")
        lists.append(indices)
    return lists


def _read_packed(key: str) -> np.ndarray:
    table = resources.files(_TABLES).joinpath("tables/mib_lists.npz")
    with resources.as_file(table) as path, np.load(path, allow_pickle=False) as packed:
        name = key if key in packed else f"{key}.bits"
        return unpack(name, packed[name])


def resolve_lists(config: ScenarioConfig, dataset: Dataset, num_steps: int) -> list[np.ndarray] | None:
    """Read the image lists that a configuration asks for; None leaves the choice to the protocol.

    Raises:
        ConfigError: no such published lists, no such folder, or files missing in it.
        DataError: lists that do not fit the data set.
    """
    if config.lists is None:
        return None
    split = dataset.splits.get("train")
    if split is None:
        raise ConfigError(f"scenario.lists: data set '{dataset.name}' has no split 'train'")
    if config.lists != "published":
        return read_lists(Path(config.lists), num_steps, [split.id(i) for i in range(len(split))])
    lists = None
    if isinstance(config.task, str) and config.order is None:
        lists = published(dataset.name, config.task, config.protocol)
    if lists is None:
        known = "; ".join(f"{task} {protocol}" for task, protocol in published_lists(dataset.name)) or "none"
        order = " in an order of your own" if config.order is not None else ""
        raise ConfigError(
            f"scenario.lists: no published lists for {dataset.name}, task {config.task}{order}, "
            f"{config.protocol} (published: {known}); leave scenario.lists out to select by the protocol's rule"
        )
    expected = published_length(dataset.name)
    if len(split) != expected:
        raise DataError(
            f"scenario.lists: the published lists of {dataset.name} need the full training split ({expected} images); "
            f"yours has {len(split)}; complete the data set, or leave scenario.lists out"
        )
    return lists


def read_lists(folder: Path, num_steps: int, ids: Sequence[str]) -> list[np.ndarray]:
    """Read a user's lists: train-0, train-1, ... as .npy (integers) or .txt (one image per line).

    Lines of a .txt are sample ids, or all of them 0-based positions: a file of ids with one that is mistyped is an
    error. Where ids are numbers, all files hold the same of the two, and numbers that could mean either are refused.
    Empty lines and lines beginning with # are skipped.

    Args:
        ids: sample ids of the training split, in its order.

    Returns:
        One int64 array per step, in the file's order.

    Raises:
        ConfigError: folder or files missing, or more files than steps.
        DataError: unreadable file, unknown id, position outside the split, an image twice in a file, or numbers that
            may be ids or positions.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"scenario.lists: no folder '{folder}' (give a folder with train-0.npy, train-1.npy, ...)"
        )
    files, problems = [], []
    for step in range(num_steps):
        # Exactly one of the two forms: with both it is unclear which one the user means.
        found = [p for p in (folder / f"train-{step}.npy", folder / f"train-{step}.txt") if p.is_file()]
        if len(found) != 1:
            what = "both .npy and .txt for" if found else "neither .npy nor .txt for"
            problems.append(f"scenario.lists: '{folder}' has {what} train-{step}")
        files += found
    # A list for a step that the task does not have: folder and task belong to different scenarios.
    for suffix in (".npy", ".txt"):
        if (folder / f"train-{num_steps}{suffix}").is_file():
            problems.append(
                f"scenario.lists: '{folder}' has train-{num_steps}{suffix}, but the task has {num_steps} steps"
            )
    if problems:
        raise ConfigError(problems)
    lists, faults = [], []
    read = _reader(files, ids)
    for path in files:
        try:
            indices = _read_npy(path) if path.suffix == ".npy" else read(path)
        except (OSError, ValueError) as error:
            faults.append(f"{path}: {error}")
            continue
        faults += check_list(indices, len(ids), str(path))
        lists.append(indices)
    if faults:
        raise DataError("\n  ".join(["scenario.lists: the image lists cannot be used:", *faults]))
    return [indices.astype(np.int64) for indices in lists]


def check_own_lists(
    lists: Sequence[np.ndarray], config: ScenarioConfig, dataset: Dataset, groups: Groups, counts: np.ndarray
) -> None:
    """Refuse a user's lists for a protocol without future classes if an image shows one.

    Args:
        counts: (N, 256) pixels per raw id of the training images.

    Raises:
        DataError: every list with such images.
    """
    if (
        config.lists in (None, "published")
        or config.protocol not in ("disjoint", "sequential")
        or config.joint
    ):
        return
    problems = []
    for step, indices in enumerate(lists):
        later = [raw for group in groups[step + 1 :] for raw in group]
        shown = counts[indices][:, later] > 0
        where = indices[shown.any(axis=1)]
        if where.size:
            names = some([dataset.labels.names[raw] for raw in np.array(later)[shown.any(axis=0)]], 6)
            images = some([dataset.splits["train"].id(int(i)) for i in where], 3)
            problems.append(
                f"step {step}: {counted(where.size, 'image', 'shows', 'show')} classes of later steps ({names}): "
                f"{images}"
            )
    if problems:
        raise DataError(
            "\n  ".join([f"scenario.lists: not lists of the {config.protocol} protocol:", *problems])
            + "\nleave these images out of the lists, or say scenario.protocol=overlapped"
        )


def check_list(indices: np.ndarray, length: int, where: str) -> list[str]:
    """Describe what is wrong with a list of positions in a split of `length` images; [] if nothing."""
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        return [f"{where}: expected one row of integers, got shape {indices.shape} of {indices.dtype}"]
    problems = []
    outside = indices[(indices < 0) | (indices >= length)]
    if outside.size:
        problems.append(f"{where}: position {outside[0]} is outside the split (0 to {length - 1})")
    values, number = np.unique(indices, return_counts=True)
    if (number > 1).any():
        problems.append(f"{where}: image {values[number > 1][0]} is listed {number[number > 1][0]} times")
    return problems


def _read_npy(path: Path) -> np.ndarray:
    try:
        data = read_regular(path, MOST_LIST)
        return array_of(io.BytesIO(data), len(data), MOST_LIST)
    except UnreadableError as error:
        raise ValueError(str(error)) from None


def _reader(files: Sequence[Path], ids: Sequence[str]) -> Callable[[Path], np.ndarray]:
    """Make the function that reads one of the text files, after a look at all of them.

    Where ids are numbers, the files decide together whether they hold ids: one mistyped id alone in a file, beside
    files of ids, would make it a file of positions.
    """
    position = {name: i for i, name in enumerate(ids)}
    texts: dict[Path, list[str]] = {}
    for path in files:
        if path.suffix == ".txt":
            with contextlib.suppress(OSError, ValueError):  # told when it is its turn
                texts[path] = _lines(path)
    numbers = any(name.isdecimal() for name in ids)
    listed = {path for path, lines in texts.items() if any(line in position for line in lines)}

    def read(path: Path) -> np.ndarray:
        lines = texts[path] if path in texts else _lines(path)
        by_id = path in listed or (numbers and listed)
        return _ids(lines, position) if by_id else _positions(lines, position)

    return read


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in read_text(path, MOST_LIST).splitlines()]
    except UnreadableError as error:
        raise ValueError(str(error)) from None
    return [line for line in lines if line and not line.startswith("#")]


def _ids(lines: Sequence[str], position: Mapping[str, int]) -> np.ndarray:
    """Positions of samples listed by id.

    Raises:
        ValueError: lines that are no id of the split.
    """
    unknown = [line for line in lines if line not in position]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(lines)} lines are not ids of the training split, but other lines are; "
            f"first '{unknown[0]}'{near_miss(unknown[0], position)}"
        )
    return np.array([position[line] for line in lines], np.int64)


def _positions(lines: Sequence[str], position: Mapping[str, int]) -> np.ndarray:
    """Positions that are listed as such.

    Raises:
        ValueError: lines that are no positions, or that could be ids written in another way, such as 7 for "007".
    """
    if not all(line.isascii() and line.isdecimal() and len(line) < 10 for line in lines):
        unknown = [line for line in lines if not line.isdecimal()]
        raise ValueError(
            f"{len(unknown or lines)} of {len(lines)} lines are neither ids of the training split nor all positions, "
            f"first '{(unknown or lines)[0]}'{near_miss((unknown or lines)[0], position)}"
        )
    numbered = {number: name for name in position if (number := whole_number(name)) is not None}
    open_to_both = [
        line for line in lines if int(line) in numbered and position[numbered[int(line)]] != int(line)
    ]
    if open_to_both:
        line = open_to_both[0]
        raise ValueError(
            f"'{line}' may be the position {int(line)}, or the id '{numbered[int(line)]}' written in another way "
            f"({len(open_to_both)} of {len(lines)} lines are of this kind); write ids as the data set does, or put "
            "positions into a .npy file"
        )
    return np.array([int(line) for line in lines], np.int64)
