"""Predictions in the forms of labelling tools and maps: a person corrects them, and the tool's export is new data."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from everseg.data.class_colours import all_colours, palette, png
from everseg.data.datasets.coco_shapes import packed_runs
from everseg.display import counted
from everseg.errors import ConfigError, DataError, some
from everseg.files import real_path
from everseg.labels import BACKGROUND, LabelSpace
from everseg.runs.commit import write_bytes, write_json, writing

MASKS = "masks"
"""The usual form: masks of ids and overlays."""
_LOCAL = "/data/local-files/?d="
"""How Label Studio calls a file of its local storage."""
_OURS = "predicted by everseg"
"""What the COCO file says of itself. A person's corrections may lie under the same name."""


def _voc_colours() -> np.ndarray:
    """The colours of Pascal VOC's devkit, (256, 3) uint8: three bits of the number at a time, one for each channel."""
    numbers = np.arange(256)[:, None] >> np.arange(3)  # the lowest bit is that of the channel
    bits = [((numbers >> 3 * place) & 1) << 7 - place for place in range(3)]
    return np.bitwise_or.reduce(bits).astype(np.uint8)


_OBJECT_COLOURS = _voc_colours()
"""Colours of objects, by number in their image. Whoever reads CVAT's form knows no others."""


class Writer(Protocol):
    """Takes one prediction after the other. What it has taken is kept in memory, packed, until `finish`."""

    def add(self, name: str, ids: np.ndarray, classes: Sequence[str], image: Path) -> None:
        """Take a prediction.

        Args:
            name: of the image, as the tool calls it: its path below the folder given.
            ids: (H, W) train ids.
            classes: name of each train id.
            image: the image's file.
        """
        ...

    def finish(self) -> list[Path]:
        """Write the files that hold all predictions together. Return what was written."""
        ...


def writer_of(
    form: str, out: Path, spaces: Sequence[LabelSpace], images: Sequence[tuple[Path, Path]]
) -> Writer:
    """Make the writer of a form, after checking that it can hold the model's classes and images.

    Args:
        form: one of FORMATS.
        out: folder for its files.
        spaces: label spaces of the branches that may predict. Their backgrounds are what nothing is drawn for.
        images: the files that will be predicted, and of each its path below `out` without ending.

    Raises:
        ConfigError: no such form, it cannot hold a class name, or a result would overwrite an image or annotations.
        DataError: an image has no place on the map.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: expected one of {', '.join((MASKS, *FORMATS))}")
    backgrounds = {space.names[space.background] for space in spaces if space.background is not None}
    names = list(dict.fromkeys(name for space in spaces for name in space.names if name not in backgrounds))
    if form == "geotiff":
        files = [image for image, _ in images]
        _check_places(files)
        _check_apart(out, files, [_mask_of(out, stem) for _, stem in images])
        whole = list(dict.fromkeys(name for space in spaces for name in space.names))
        return _GeoTiff(out, whole)
    if form == "cvat":
        return _Cvat(out, names)
    return _Coco(out, names) if form == "coco" else _LabelStudio(out, names)


class _Cvat:
    """CVAT's "Segmentation mask 1.1": a zip of masks in colours, to be uploaded to a task that holds the images."""

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        if bad := [name for name in names if set(name) & set(":\n\r") or name.startswith("#")]:
            raise ConfigError(
                f"--format cvat: labelmap.txt cannot hold the class names {some(bad, 5)} (a colon, a line end, or # in "
                "front); rename the classes, or take --format coco"
            )
        self.out, self.names = out, list(names)
        # The background is black in CVAT; a first class without background gets a colour of its own.
        self.colours = dict(zip(names, palette(len(names) + 1, background=0)[1:].tolist(), strict=True))
        if len({tuple(colour) for colour in self.colours.values()}) < len(names):
            raise ConfigError(
                f"--format cvat: a class is a colour there, and there are fewer colours than the {len(names)} classes; "
                "take --format coco"
            )
        self.listed: list[str] = []
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        self.file = io.BytesIO()
        self.archive = zipfile.ZipFile(self.file, "w", zipfile.ZIP_STORED)

    def add(self, name: str, ids: np.ndarray, classes: Sequence[str], image: Path) -> None:
        table = np.array([self.colours.get(known, (0, 0, 0)) for known in classes], np.uint8)
        stem = str(Path(name).with_suffix("").as_posix())
        # One object of each class.
        present = [i for i in np.unique(ids).tolist() if classes[i] in self.colours]
        if len(present) >= len(_OBJECT_COLOURS):
            raise ConfigError(
                f"--format cvat: {name} shows {counted(len(present), 'class')}, and the form holds "
                f"{counted(len(_OBJECT_COLOURS) - 1, 'object')} in an image; take --format coco"
            )
        objects = np.zeros((len(classes), 3), np.uint8)
        objects[present] = _OBJECT_COLOURS[1 : len(present) + 1]
        for folder, colours in (("SegmentationClass", table), ("SegmentationObject", objects)):
            self.archive.writestr(f"{folder}/{stem}.png", png(Image.fromarray(colours[ids])))
        self.listed.append(stem)

    def finish(self) -> list[Path]:
        lines = ["# label:color_rgb:parts:actions", f"{BACKGROUND}:0,0,0::"]
        lines += [f"{name}:{','.join(map(str, colour))}::" for name, colour in self.colours.items()]
        self.archive.writestr("labelmap.txt", "\n".join(lines) + "\n")
        self.archive.writestr("ImageSets/Segmentation/default.txt", "\n".join(self.listed) + "\n")
        self.archive.close()
        path = self.out / "cvat.zip"
        write_bytes(path, self.file.getvalue())
        return [path]


class _Coco:
    """COCO's JSON: an annotation with run lengths for each class of each image."""

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        self.path = out / "annotations" / "instances_default.json"
        if self.path.exists() and not _is_ours(self.path):
            raise ConfigError(
                f"{self.path} holds annotations that everseg has not predicted, and they would be lost; give another "
                "folder (--out)"
            )
        self.ids = {name: number for number, name in enumerate(names, 1)}
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, name: str, ids: np.ndarray, classes: Sequence[str], image: Path) -> None:
        number = len(self.images) + 1
        height, width = ids.shape
        self.images.append({"id": number, "file_name": name, "width": width, "height": height})
        for known, mask in _masks(ids, classes, self.ids):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            left, top = int(columns[0]), int(rows[0])
            box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1, "image_id": number, "category_id": self.ids[known], "iscrowd": 1,
                    "area": int(mask.sum()), "bbox": box, "segmentation": packed_runs(mask),
                }
            )  # fmt: skip

    def finish(self) -> list[Path]:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        categories = [{"id": number, "name": name, "supercategory": ""} for name, number in self.ids.items()]
        whole = {"images": self.images, "annotations": self.annotations, "categories": categories}
        write_json(self.path, {"info": {"description": _OURS}, **whole})
        return [self.path]


def _is_ours(path: Path) -> bool:
    """Whether a COCO file says first that it was predicted. Other tools say something else of what they export."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _OURS.encode() in file.read(256)  # it may have gigabytes


class _LabelStudio:
    """Label Studio's tasks with pre-annotations by the brush, and the labelling configuration that shows them."""

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        self.out, self.names = out, list(names)
        self.tasks: list[dict[str, Any]] = []

    def add(self, name: str, ids: np.ndarray, classes: Sequence[str], image: Path) -> None:
        height, width = ids.shape
        result = [
            {
                "id": f"{len(self.tasks)}-{number}", "type": "brushlabels", "from_name": "tag", "to_name": "image",
                "original_width": width, "original_height": height, "image_rotation": 0,
                "value": {"format": "rle", "rle": brush(mask), "brushlabels": [known]},
            }
            for number, (known, mask) in enumerate(_masks(ids, classes, self.names))
        ]  # fmt: skip
        prediction = {"model_version": "everseg", "result": result}
        self.tasks.append({"data": {"image": _LOCAL + quote(name)}, "predictions": [prediction]})

    def finish(self) -> list[Path]:
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        colours = [
            "#{:02x}{:02x}{:02x}".format(*colour) for colour in palette(len(self.names) + 1, background=0)[1:]
        ]
        labels = "".join(
            f"    <Label value={quoteattr(name)} background={quoteattr(colour)}/>\n"
            for name, colour in zip(self.names, colours, strict=True)
        )
        view = (
            '<View>\n  <Image name="image" value="$image" zoom="true"/>\n  <BrushLabels name="tag" toName="image">\n'
            f"{labels}  </BrushLabels>\n</View>\n"
        )
        tasks, config = self.out / "tasks.json", self.out / "label_config.xml"
        write_json(tasks, self.tasks)
        write_bytes(config, view.encode())
        return [tasks, config]


class _GeoTiff:
    """Masks of ids that lie on the map where their images do."""

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        self.out, self.names = out, list(names)
        self.files: list[Path] = []

    def add(self, name: str, ids: np.ndarray, classes: Sequence[str], image: Path) -> None:
        table = np.array(
            [self.names.index(known) for known in classes], np.uint8 if len(self.names) < 256 else np.uint16
        )
        mask = Image.fromarray(table[ids])
        if mask.mode == "L":
            mask.putpalette(all_colours(0).tobytes())
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        place, types = _place(image)
        for tag, value in place.items():
            tags[tag] = value
            tags.tagtype[tag] = types[tag]
        content = io.BytesIO()
        mask.save(content, "TIFF", compression="tiff_deflate", tiffinfo=tags)
        path = _mask_of(self.out, Path(name).with_suffix(""))
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())
        self.files.append(path)

    def finish(self) -> list[Path]:
        path = self.out / "classes.json"
        write_json(path, {str(number): name for number, name in enumerate(self.names)})
        return [*self.files, path]


def _mask_of(out: Path, stem: Path) -> Path:
    """The mask on the map of an image, whose path below the folder given is `stem` without its ending."""
    return out / stem.with_name(f"{stem.name}.tif")


def _check_apart(out: Path, images: Sequence[Path], masks: Sequence[Path]) -> None:
    """Raise a ConfigError if a mask would take the place of an image: both end in `.tif`."""
    results = {real_path(mask) for mask in masks if mask.exists()}
    if inputs := [str(image) for image in images if real_path(image) in results]:
        raise ConfigError(
            f"--out {out}: the results would overwrite images given to predict: {some(inputs, 5)}; give another folder"
        )


FORMATS = ("cvat", "coco", "labelstudio", "geotiff")


def _masks(
    ids: np.ndarray, classes: Sequence[str], wanted: Sequence[str] | Mapping[str, Any]
) -> list[tuple[str, np.ndarray]]:
    """Cut a prediction into (class, mask (H, W) bool), without empty masks and the background."""
    present = np.flatnonzero(np.bincount(ids.ravel(), minlength=len(classes)))
    return [(classes[i], ids == i) for i in present.tolist() if classes[i] in wanted]


# ---------------------------------------------------------------- Label Studio's brush


def brush(mask: np.ndarray) -> list[int]:
    """Pack a mask, (H, W) bool, as Label Studio's brush does; `data.datasets.tool_files` reads it back.

    The picture has four channels, all 255 where the mask is. A stream of bits: 32 for the number of values, 5 for the
    bits of a value less 1, 4 times 4 for the sizes of a length less 1; then each run: a bit (1: one value, repeated),
    two that choose the size, the length less 1, and the value.
    """
    sizes = (4, 8, 12, 16)
    flat = np.repeat(mask.ravel(), 4)
    edges = np.flatnonzero(np.diff(flat)) + 1
    starts = np.concatenate([[0], edges])
    lengths = np.diff(np.concatenate([starts, [flat.size]]))
    bits = [f"{flat.size:032b}", f"{7:05b}", *(f"{size - 1:04b}" for size in sizes)]
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        value = 255 if flat[start] else 0
        while length:
            part = min(length, 1 << sizes[-1])
            choice = next(i for i, size in enumerate(sizes) if part <= 1 << size)
            bits.append(f"1{choice:02b}{part - 1:0{sizes[choice]}b}{value:08b}")
            length -= part
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


# ---------------------------------------------------------------- places on the map

_PLACE = (33550, 33922, 34264, 34735, 34736, 34737)
"""Tags of GeoTIFF: scale, tie points, transformation, and the keys of the coordinate system."""


def _place(image: Path) -> tuple[dict[int, Any], dict[int, int]]:
    """Read where an image lies on the map: tags and their types; {} if it does not say."""
    try:
        with Image.open(image, formats=["TIFF"]) as picture:
            tags: Any = getattr(picture, "tag_v2", {})
            return {tag: tags[tag] for tag in _PLACE if tag in tags}, dict(tags.tagtype)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return {}, {}


def _check_places(images: Sequence[Path]) -> None:
    lost = []
    for image in images:
        place, _ = _place(image)
        if not (34264 in place or {33550, 33922} <= place.keys()):
            lost.append(str(image))
    if lost:
        raise DataError(
            f"--format geotiff: {len(lost)} of {len(images)} images do not say where they lie on the map "
            f"({some(lost, 5)}); give GeoTIFF files, or leave --format out"
        )
