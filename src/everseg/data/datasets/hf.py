"""Read semantic-segmentation sets stored by the Hugging Face `datasets` library."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from everseg.data.base import Dataset
from everseg.data.datasets.decode import (
    LOSSY,
    UNLIMITED,
    MaskCoding,
    Reading,
    decode_image,
    decode_mask,
    open_inside,
    open_picture,
    orientation,
    turn,
)
from everseg.data.datasets.descriptor import division_of, parse
from everseg.data.datasets.file_names import split_in_name
from everseg.data.datasets.numbered import annotated_objects, classes_of, numbers
from everseg.data.datasets.options import reading_of, root_of
from everseg.data.datasets.relabel import most_id
from everseg.errors import ConfigError, DataError, some
from everseg.files import UnreadableError, json_of, read_regular

IMAGES = ("image", "pixel_values", "img", "images", "photo", "picture", "rgb", "input_image", "input")
"""Usual names of the images' column, the first ones first."""
BITMAP = "segmentation_bitmap"
"""How Segments.ai names its column of objects by number; their classes stand in a column of annotations."""
MASKS = ("label", "annotation", "mask", "labels", "segmentation_mask", "semantic_segmentation", "semantic_mask",
         "semantic_bitmap", "label_map", "masks", "annotations", "gt", "ground_truth", "seg", "segmentation", "target",
         BITMAP, f"label.{BITMAP}")  # fmt: skip
"""Usual names of the masks' column, the first ones first."""
NO_ANNOTATIONS = "none"
"""What `annotations` is where the masks hold the ids of classes themselves."""
LOOKED_AT = 5
"""So many pictures of a column show whether it holds masks."""


def build(
    root: str | Path | None = None,
    *,
    image: str | None = None,
    mask: str | None = None,
    annotations: str | None = None,
    classes: Any = None,
    ignore: Any = 255,
    background: str | None = None,
    split: Mapping[str, Any] | None = None,
    **shared: Any,
) -> Dataset:
    """Read a set of the `datasets` library in a folder of `save_to_disk` or of Parquet files.

    Nothing is downloaded.

    Args:
        root: the folder.
        image: column of the images; default the picture column with one of the names `IMAGES`, or the one that is left.
        mask: column of the masks, pictures of ids; default the picture column with one of the names `MASKS`, or the one
            that is left. Of two columns of other names the one whose pictures have a single channel holds the masks.
        annotations: column that says for each object (`id`) of a mask which class (`category_id`) it is; `none`: the
            masks hold the ids of classes. Default: the only such column for Segments.ai's `segmentation_bitmap`; for
            other masks none, unless the masks may hold objects by number.
        classes: list of names, or id -> name; default `id2label.json` in the folder.
        ignore: id or ids without annotation, or null.
        background: name of the background class; null: there is none, or it has one of its usual names.
        split: shares of the images that are held out where the set has no splits; default {val: 0.2, seed: 0}.
        shared: options of all readers, see `everseg.data.datasets.options.reading_of`.

    Returns:
        The set's splits ("validation" is `val`), samples named by their position.

    Raises:
        ConfigError: the library is missing (extra `hf-data`), no such root, no classes, or a wrong option.
        DataError: no such set there, or no such column.
    """
    reading = reading_of(shared)
    base = root_of(root)
    division, problems = division_of({"val": 0.2} if split is None else split)
    if problems:
        raise ConfigError([f"data.options.{problem}" for problem in problems])
    named = {"classes": _classes(base, classes), "ignore": ignore, "images": "i", "masks": "m", "split": {}}
    labels = parse({**named, **({"background": background} if background else {})}, "data.options").labels
    most = most_id(labels)
    splits = {}
    for name, table in _tables(base).items():
        columns = _columns(table, image, mask, f"{base}, split '{name}'" if name else str(base))
        place = f"{base}, split '{name}'" if name else str(base)
        objects = _objects(table, columns[1], annotations, place)
        parts = {name: list(range(len(table)))}
        if not name and division is not None:
            parts = division.parts([f"{i:06d}" for i in range(len(table))])
        for part, rows in parts.items():
            stored = _undecoded(table, (*columns, *([objects] if objects else [])))
            splits[part] = ColumnSplit(part, base, stored, columns, rows, reading, objects=objects, most=most)
    return Dataset("hf", labels, splits)


class ColumnSplit:
    """Images and masks in two columns of a table; satisfies `everseg.data.base.Split`.

    `most` is the largest raw id that masks may hold.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        table: Any,
        columns: tuple[str, str],
        rows: list[int],
        reading: Reading,
        *,
        objects: str | None = None,
        most: int = 255,
    ) -> None:
        if reading.channels is not None:
            raise ConfigError(
                "data.options.channels: images in a table are RGB pictures; give files, described by a data.yaml"
            )
        self.name, self.warnings, self._objects, self.most = name, (), objects, most
        self._root, self._table, self._columns, self.reading = root, table, columns, reading
        self._rows = [row for row in rows if (name, f"{row:06d}") not in reading.skip]
        if not self._rows:
            raise DataError(f"split '{name}' of {root} is empty")

    def __len__(self) -> int:
        return len(self._rows)

    def id(self, index: int) -> str:
        """Position in the stored table, six digits."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return f"{self._rows[index]:06d}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Decode one sample: image (H, W, 3) uint8 RGB and mask (H, W) uint8 raw ids.

        Raises:
            DataError: as for files.
        """
        shown = self._shown(index, 0)
        with self._open(index, 0) as file:
            picture = open_picture(file, shown, self.reading)
            image = decode_image(picture, shown, bit_depth=self.reading.bit_depth)
            how = orientation(picture) if self.reading.exif == "apply" else 1
        mask, upright = self.read_mask(index), turn(image, how)
        if upright.size != (mask.shape[1], mask.shape[0]):
            size = f"{upright.size[0]}x{upright.size[1]}"
            raise DataError(f"{shown}: the image is {size} but the mask {mask.shape[1]}x{mask.shape[0]}")
        return np.asarray(upright), mask

    def read_mask(self, index: int) -> np.ndarray:
        """Decode the mask only, (H, W) raw ids, uint8 (uint16 if there are larger ids)."""
        shown = self._shown(index, 1)
        with self._open(index, 1) as file:
            picture = open_picture(file, shown, self.reading)
            if self._objects is None:
                return decode_mask(picture, shown, MaskCoding(most=self.most))
            return classes_of(numbers(picture, shown), self._annotations(index), shown, self.most)

    def fingerprint(self) -> str:
        """SHA-256 over the samples' names, the masks' bytes and the objects' classes."""
        total = hashlib.sha256()
        for index in range(len(self)):
            with self._open(index, 1) as file:
                total.update(f"{self.id(index)}\0{hashlib.sha256(file.read()).hexdigest()}\n".encode())
            if self._objects is not None:
                total.update(f"{sorted(self._annotations(index).items())}\n".encode())
        return total.hexdigest()

    def _annotations(self, index: int) -> dict[int, int]:
        found = annotated_objects(self._table[self._rows[index]][self._objects])
        if found is None:
            raise DataError(f"{self._shown(index, 1)}: column '{self._objects}' gives no id and category_id")
        return found

    def _shown(self, index: int, column: int) -> Path:
        return self._root / f"{self.name}[{self._rows[index]}].{self._columns[column]}"

    def _open(self, index: int, column: int) -> BinaryIO:
        value = self._table[self._rows[index]][self._columns[column]]
        if isinstance(value, bytes):
            return io.BytesIO(value)
        # An undecoded picture is {"bytes", "path"}: its content, or where its file lies.
        if isinstance(value, dict) and value.get("bytes") is not None:
            return io.BytesIO(value["bytes"])
        if isinstance(value, dict) and value.get("path"):
            path = Path(value["path"])
            inside = path.relative_to(self._root) if path.is_relative_to(self._root) else path
            return open_inside(self._root, str(inside), follow_links=self.reading.follow_links)
        raise DataError(f"{self._shown(index, column)}: holds no picture; leave the sample out")


def _tables(base: Path) -> dict[str, Any]:
    """Split -> stored table; "" where the set has no splits."""
    try:
        import datasets
    except Exception as error:
        raise ConfigError(
            f"data set 'hf': the library datasets cannot be imported ({error}); pip install 'everseg[hf-data]'"
        ) from None
    datasets.disable_progress_bars()
    try:
        if (base / "dataset_dict.json").is_file() or (base / "state.json").is_file():
            stored = datasets.load_from_disk(str(base))
        else:
            files = sorted(p for p in base.rglob("*.parquet") if not p.name.startswith("."))
            if not files:
                raise DataError(f"{base}: neither a folder of save_to_disk nor one with Parquet files")
            by_split: dict[str, list[str]] = {}
            for file in files:
                by_split.setdefault(_split_of(file.relative_to(base)) or _ALL, []).append(str(file))
            if _ALL in by_split and len(by_split) > 1:
                lonely = [Path(file).name for file in by_split.pop(_ALL)]
                raise DataError(
                    f"{base}: {some(lonely, 5)} name no split, beside files of {', '.join(by_split)}; rename them "
                    "(train-00000-of-00001.parquet), or move them away"
                )
            stored = datasets.load_dataset("parquet", data_files=by_split)
            stored = stored[_ALL] if _ALL in by_split else stored
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{base}: the stored data set cannot be read ({error}); store it again") from None
    if not isinstance(stored, dict):
        return {"": stored}
    return {"val" if name == "validation" else name: table for name, table in stored.items()}


_ALL = "all"


def _split_of(file: Path) -> str:
    """The split that a Parquet file is a part of: of `train-00000-of-00002.parquet`, `train/0000.parquet`; or ""."""
    part = re.fullmatch(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?", file.stem)
    return split_in_name(PurePosixPath(file.as_posix())) or (part[1] if part else "")


def _undecoded(table: Any, columns: tuple[str, ...]) -> Any:
    """Select the columns with pictures as bytes, so that everseg decodes and refuses them as it does files."""
    import datasets

    table = table.select_columns(list(dict.fromkeys(columns)))
    for column in table.column_names:
        if isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _pictures(table: Any) -> list[str]:
    """Columns that hold pictures: as `datasets.Image`, or, in Parquet files of other writers, as bytes."""
    import datasets

    def holds(feature: Any) -> bool:
        if isinstance(feature, dict):
            return "bytes" in feature
        return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in (
            "binary",
            "large_binary",
        )

    return [name for name, feature in table.features.items() if holds(feature)]


def _columns(table: Any, image: str | None, mask: str | None, where: str) -> tuple[str, str]:
    """Find the columns of images and masks.

    Raises:
        DataError: a column that was asked for is missing or holds no pictures, or it is open which column is which.
    """
    pictures = _pictures(table)
    for column in (image, mask):
        if column is not None and column not in table.column_names:
            raise DataError(f"{where}: no column '{column}'; it has {', '.join(table.column_names)}")
        if column is not None and column not in pictures:
            raise DataError(
                f"{where}: column '{column}' holds {table.features[column]}, expected pictures (datasets.Image)"
            )
    free = [name for name in pictures if name not in (image, mask)]
    usual = [
        given or next((name for name in names if name in free), None)
        for given, names in ((image, IMAGES), (mask, MASKS))
    ]
    if usual == [None, None] and len(free) == 2:
        single = [name for name in free if _is_single_channel(table, name)]
        if len(single) == 1:
            usual = [next(name for name in free if name not in single), single[0]]
    left = [name for name in free if name not in usual]
    if None in usual and usual != [None, None] and len(left) == 1:
        usual[usual.index(None)] = left[0]
    found_image, found_mask = usual
    if found_image is None or found_mask is None:
        holding = f"pictures are in {', '.join(pictures)}" if pictures else "no column holds pictures"
        raise DataError(
            f"{where}: which columns hold the images and the masks? It has {', '.join(table.column_names)}; {holding}. "
            "Set data.options.image=NAME and data.options.mask=NAME"
        )
    return found_image, found_mask


def _is_single_channel(table: Any, column: str) -> bool:
    """Whether the first pictures of a column are lossless and have one channel, as masks are."""
    values = _undecoded(table.select(range(min(LOOKED_AT, len(table)))), (column, column))[column]
    for value in values:
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            return False
        try:
            picture = open_picture(io.BytesIO(data), column, UNLIMITED)
        except DataError:
            return False
        if picture.format in LOSSY or picture.mode not in ("1", "L", "P", "I", "I;16"):
            return False
    return True


def _objects(table: Any, mask: str, given: str | None, where: str) -> str | None:
    """Find the column that says which class an object is; None: the masks hold classes.

    Raises:
        DataError: no such column, or the masks hold objects by number and nothing says their classes, or may do so.
    """
    if given == NO_ANNOTATIONS:
        return None
    if given is not None and given not in table.column_names:
        raise DataError(f"{where}: no column '{given}'; it has {', '.join(table.column_names)}")
    rest = table.select_columns([c for c in table.column_names if c not in _pictures(table)])
    rows = [rest[i] for i in range(min(LOOKED_AT, len(rest)))] if rest.column_names else []
    holding = [c for c in rest.column_names if any(annotated_objects(row[c]) for row in rows)]
    if given is not None:
        if given not in holding:
            raise DataError(f"{where}: column '{given}' does not hold a list of id and category_id")
        return given
    prefix = mask.rpartition(".")[0]
    if mask.rpartition(".")[2].lower() == BITMAP:
        own = [c for c in holding if c.rpartition(".")[0] == prefix] or holding
        if len(own) != 1:
            found = f"several columns may say it ({', '.join(own)})" if own else "no column says it"
            raise DataError(
                f"{where}: column '{mask}' holds objects by number, and which class each is: {found}. Set "
                "data.options.annotations=NAME to a column with lists of id and category_id; store masks of classes "
                "(Segments.ai: export_format='semantic', or get_semantic_bitmap); or, if its pixels are classes, set "
                f"data.options.annotations={NO_ANNOTATIONS}"
            )
        return own[0]
    bitmaps = {c.rpartition(".")[0] for c in _pictures(table) if c.rpartition(".")[2].lower() == BITMAP}
    for column in holding:
        if column.rpartition(".")[0] not in bitmaps and _may_be_objects(table, mask, column):
            raise DataError(
                f"{where}: the pixels of column '{mask}' may be classes, or objects whose class column '{column}' "
                f"gives; set data.options.annotations={NO_ANNOTATIONS} for classes, or ={column} for objects"
            )
    return None


def _may_be_objects(table: Any, mask: str, column: str) -> bool:
    """Whether all values of the first masks are objects of their annotations."""
    rows = _undecoded(table.select(range(min(LOOKED_AT, len(table)))), (mask, column))
    for row in rows:
        data = row[mask].get("bytes") if isinstance(row[mask], dict) else row[mask]
        classes = annotated_objects(row[column])
        if data is None or classes is None:
            continue
        try:
            found = numbers(open_picture(io.BytesIO(data), Path(mask), UNLIMITED), Path(mask))
        except DataError:
            continue
        if not {*np.unique(found).tolist()} <= {0, *classes}:
            return False
    return True


def _classes(base: Path, given: Any) -> Any:
    if given is not None:
        return given
    file = base / "id2label.json"
    try:
        return {int(key): name for key, name in json_of(read_regular(file)).items()}
    except (UnreadableError, ValueError, AttributeError):
        raise ConfigError(
            f"data.options.classes: name the classes, or put an id2label.json into {base}"
        ) from None
