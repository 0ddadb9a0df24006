"""Parse the annotation files of labelling tools into pictures with objects, as COCO's are read.

Every parser takes the content of a file, and knows nothing of folders. It tells what users get wrong; content of
another form than the tool's may raise any of `coco_shapes.FOREIGN`, which the caller tells as such. Shapes become
COCO's polygons (x, y, x, y, ...) and run lengths, so that all tools' objects have pixels by one rule. Lines and
points have no pixels; they become objects without a shape, which the check names.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everseg.config.checks import shown
from everseg.data.datasets.coco_shapes import even_odd, is_point, packed_runs
from everseg.data.datasets.decode import Reading, open_picture, stored_ids
from everseg.display import counted
from everseg.errors import DataError


@dataclass(frozen=True)
class Drawn:
    """The annotation of one image."""

    image: str
    """As the file names it; "" if it does not."""
    height: int
    width: int
    """0 where the file does not give the size."""
    objects: list[tuple[str, Any]] = field(default_factory=list)
    """(class name, segmentation), in the order of the file."""
    names: list[str] = field(default_factory=list)
    """How messages call each object."""
    split: str = ""
    """The split that the file itself states; "" if none."""


def is_labelme(content: Any) -> bool:
    """Whether parsed JSON is an annotation of labelme."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def labelme(content: Mapping[str, Any], reading: Reading) -> Drawn:
    """Parse one file of labelme (and of tools that write its form).

    Raises:
        DataError: a shape without label or points, or of an unknown type.
    """
    height, width = _size(content.get("imageHeight"), content.get("imageWidth"), reading)
    objects, names = [], []
    for number, shape in enumerate(content["shapes"]):
        called = f"shapes[{number}]"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise DataError(f"{called}: has no label")
        kind, points = shape.get("shape_type") or "polygon", shape.get("points")
        if not isinstance(points, list) or not all(map(is_point, points)):
            raise DataError(f"{called} ({shape['label']}): its points are not pairs of numbers")
        objects.append((shape["label"], _labelme_shape(called, kind, points, shape, height, width)))
        names.append(f"{called} ({kind} {shape['label']})")
    return Drawn(str(content["imagePath"]), height, width, objects, names)


def _labelme_shape(
    called: str, kind: str, points: list[list[float]], shape: Mapping[str, Any], height: int, width: int
) -> Any:
    if kind in ("line", "linestrip", "point", "points"):
        return []
    if kind == "polygon":
        return [[float(v) for point in points for v in point]] if len(points) > 2 else []
    if len(points) != 2:
        raise DataError(f"{called}: a {kind} of {len(points)} points, expected 2")
    (left, top), (right, bottom) = points
    if kind == "rectangle":
        return [[left, top, right, top, right, bottom, left, bottom]]
    if kind == "circle":
        return [_ellipse(left, top, *[math.hypot(right - left, bottom - top)] * 2)]
    if kind == "mask" and height and width:
        part = _png(shape.get("mask"), called)
        return _placed(part, round(left), round(top), height, width, called)
    raise DataError(f"{called}: the shape type {shown(kind)} is not known")


def is_supervisely(content: Any) -> bool:
    """Whether parsed JSON is an annotation of Supervisely."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("size"), dict)
        and isinstance(content.get("objects"), list)
    )


SPLIT_TAGS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def supervisely(content: Mapping[str, Any], reading: Reading) -> Drawn:
    """Parse one file of Supervisely. It does not name its image; that goes by the name of the file.

    Raises:
        DataError: an object without class or points, or of an unknown kind.
    """
    height, width = _size(content["size"].get("height"), content["size"].get("width"), reading)
    objects, names = [], []
    for number, item in enumerate(content["objects"]):
        called = f"objects[{number}]"
        if not isinstance(item, dict) or not isinstance(item.get("classTitle"), str):
            raise DataError(f"{called}: has no classTitle")
        objects.append((item["classTitle"], _supervisely_shape(called, item, height, width)))
        names.append(f"{called} ({item.get('geometryType')} {item['classTitle']})")
    tags = [tag.get("name") if isinstance(tag, dict) else tag for tag in content.get("tags") or []]
    splits = {SPLIT_TAGS[t.lower()] for t in tags if isinstance(t, str) and t.lower() in SPLIT_TAGS}
    return Drawn("", height, width, objects, names, splits.pop() if len(splits) == 1 else "")


def _supervisely_shape(called: str, item: Mapping[str, Any], height: int, width: int) -> Any:
    kind = item.get("geometryType") or ("bitmap" if "bitmap" in item else "polygon")
    if kind in ("point", "line", "polyline", "graph", "keypoints"):
        return []
    if kind == "bitmap":
        bitmap: Any = item.get("bitmap")
        origin: Any = bitmap.get("origin") if isinstance(bitmap, dict) else None
        if not is_point(origin):
            raise DataError(f"{called}: its bitmap has no origin")
        part = _png(bitmap.get("data"), called, packed=True)
        return _placed(part, round(origin[0]), round(origin[1]), height, width, called)
    points = item.get("points")
    exterior = points.get("exterior") if isinstance(points, dict) else None
    interior = points.get("interior") or [] if isinstance(points, dict) else []
    if (
        not isinstance(exterior, list)
        or not all(map(is_point, exterior))
        or not all(isinstance(hole, list) and all(map(is_point, hole)) for hole in interior)
    ):
        raise DataError(f"{called}: its points are not pairs of numbers")
    if kind == "rectangle" and len(exterior) == 2:
        (left, top), (right, bottom) = exterior
        return [[left, top, right, top, right, bottom, left, bottom]]
    if kind != "polygon":
        raise DataError(f"{called}: the geometry {shown(kind)} is not known")
    outline = [float(v) for point in exterior for v in point]
    holes = [[float(v) for point in hole for v in point] for hole in interior]
    if len(outline) < 6:
        return []
    return even_odd([outline, *holes], height, width) if holes else [outline]


def is_v7(content: Any) -> bool:
    """Whether parsed JSON is an annotation of V7 Darwin, version 1 or 2."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("annotations"), list)
        and (
            (isinstance(content.get("item"), dict) and isinstance(content["item"].get("slots"), list))
            or (isinstance(content.get("image"), dict) and "filename" in content["image"])
        )
    )


def v7(content: Mapping[str, Any], reading: Reading) -> list[Drawn]:
    """Parse one file of V7 Darwin. Every slot of an item is an image of its own: `item/slot/file`.

    Raises:
        DataError: a slot that holds no picture, an annotation without name or points, or one of no slot; lists all.
    """
    if "item" not in content:
        size = content["image"]
        image = "/".join((str(size.get("path") or ""), str(size["filename"])))
        return [_v7_image(image, size, [*enumerate(content["annotations"])], reading)]
    item, slots = content["item"], content["item"]["slots"]
    faults = [fault for slot in slots if (fault := _v7_fault(slot, len(slots) == 1))]
    called = [str(slot.get("slot_name")) if isinstance(slot, dict) else "" for slot in slots]
    own: dict[str, list[tuple[int, Any]]] = {name: [] for name in called}
    for number, entry in enumerate(content["annotations"]):
        named = entry.get("slot_names") if isinstance(entry, dict) else None
        for name in called if named is None and len(called) == 1 else named or [""]:
            if name not in own:
                faults.append(f"annotations[{number}] is in slot {shown(name)}, which the item does not have")
            else:
                own[name].append((number, entry))
    if not slots:
        faults.append("the item has no slot")
    if faults:
        raise DataError("; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else ""))
    place = "/".join((str(item.get("path") or ""), str(item.get("name"))))
    if len(slots) == 1:
        return [_v7_image(place, slots[0], own[called[0]], reading)]
    return [
        _v7_image(f"{place}/{name}/{slot['source_files'][0]['file_name']}", slot, own[name], reading)
        for name, slot in zip(called, slots, strict=True)
    ]


def _v7_fault(slot: Any, alone: bool) -> str:
    """Say why a slot is no picture; "" if it is one. The picture of an item's only slot is called as the item."""
    if not isinstance(slot, dict):
        return "a slot is not an object"
    name, files = shown(slot.get("slot_name")), slot.get("source_files")
    kind, frames = slot.get("type") or "image", slot.get("frame_count") or 1
    if kind != "image" or frames != 1:
        return f"slot {name} is of type {kind} with {frames} frames; export its frames as pictures"
    named = alone or (
        isinstance(files, list) and len(files) == 1 and isinstance(files[0], dict) and "file_name" in files[0]
    )
    return "" if named else f"slot {name} does not name one file (source_files)"


def _v7_image(
    image: str, size: Mapping[str, Any], annotations: Sequence[tuple[int, Any]], reading: Reading
) -> Drawn:
    """Draw the annotations (number in the file, content) of one picture."""
    height, width = _size(size.get("height"), size.get("width"), reading)
    layer: Any = next(
        (a["raster_layer"] for _, a in annotations if isinstance(a, dict) and a.get("raster_layer")), None
    )
    pixels = _dense(layer, height, width) if layer is not None else None
    objects, names = [], []
    for number, item in annotations:
        called = f"annotations[{number}]"
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise DataError(f"{called}: has no name")
        if item.get("raster_layer") or "tag" in item:
            continue
        if "mask" in item:
            value = layer["mask_annotation_ids_mapping"].get(item.get("id")) if pixels is not None else None
            if value is None:
                raise DataError(f"{called}: its mask is not in the raster layer")
            segmentation: Any = packed_runs(pixels == value)
        else:
            segmentation = _v7_polygons(called, item, height, width)
        objects.append((item["name"], segmentation))
        names.append(f"{called} ({item['name']})")
    return Drawn(image.lstrip("/"), height, width, objects, names)


def _v7_polygons(called: str, item: Mapping[str, Any], height: int, width: int) -> Any:
    box = item.get("bounding_box")
    if isinstance(item.get("polygon"), dict):
        shape = item["polygon"]
        paths = shape.get("paths") or [shape.get("path"), *(shape.get("additional_paths") or [])]
    elif isinstance(item.get("complex_polygon"), dict):
        paths = item["complex_polygon"].get("path")
    elif isinstance(item.get("ellipse"), dict):
        ellipse = item["ellipse"]
        centre, radius = ellipse["center"], ellipse["radius"]
        turn = math.degrees(ellipse.get("angle") or 0)
        return [_ellipse(centre["x"], centre["y"], radius["x"], radius["y"], turn)]
    elif isinstance(box, dict) and not {"line", "keypoint", "skeleton", "polyline"} & set(item):
        left, top, right, bottom = box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"]
        return [[left, top, right, top, right, bottom, left, bottom]]
    else:
        return []
    try:
        parts = [[float(point[axis]) for point in path for axis in ("x", "y")] for path in paths]
    except (TypeError, KeyError, ValueError):
        raise DataError(f"{called}: its paths are not points x, y") from None
    parts = [part for part in parts if len(part) >= 6]
    return even_odd(parts, height, width) if len(parts) > 1 else parts


def _dense(layer: Any, height: int, width: int) -> np.ndarray:
    """Decode V7's raster layer, (H, W): pairs of value and length, along the rows."""
    runs = layer.get("dense_rle") if isinstance(layer, dict) else None
    if (
        not isinstance(runs, list)
        or len(runs) % 2
        or not all(type(n) is int and n >= 0 for n in runs)
        or sum(runs[1::2]) != height * width
        or not isinstance(layer.get("mask_annotation_ids_mapping"), dict)
    ):
        raise DataError(f"the raster layer does not fill the picture of {width}x{height}")
    return np.repeat(runs[0::2], runs[1::2]).reshape(height, width)


def is_label_studio(content: Any) -> bool:
    """Whether parsed JSON is a list of tasks of Label Studio, in either form (JSON, JSON-MIN)."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(task, dict) for task in content)
        and (
            all(
                isinstance(task.get("data"), dict) and isinstance(task.get("annotations"), list)
                for task in content
            )
            or all("annotation_id" in task and "annotator" in task for task in content)
        )
    )


_UPLOAD = re.compile(r"^[0-9a-f]{8}-")
"""What Label Studio puts before the name of an uploaded file."""


def without_upload(name: str) -> str:
    """Take away what Label Studio puts before the name of an uploaded file."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + _UPLOAD.sub("", file)


def label_studio(content: Sequence[Mapping[str, Any]], reading: Reading) -> list[Drawn]:
    """Parse the tasks of Label Studio.

    Raises:
        DataError: several annotations of one task, or objects that cannot be read; lists all tasks.
    """
    found, faults = [], []
    for number, task in enumerate(content):
        called = f"task {task.get('id', number)}"
        try:
            drawn = _task(task, reading)
        except DataError as error:
            faults.append(f"{called}: {error}")
        else:
            found += drawn
    if faults:
        raise DataError("; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else ""))
    return found


def _task(task: Mapping[str, Any], reading: Reading) -> list[Drawn]:
    data = task["data"] if isinstance(task.get("data"), dict) else task
    pictures = [v for v in data.values() if isinstance(v, str) and re.search(r"\.\w{3,5}($|[?#])", v)]
    image = str(data.get("image") or data.get("img") or (pictures[0] if pictures else ""))
    if not image:
        raise DataError("names no image")
    if isinstance(task.get("annotations"), list):
        done = [a for a in task["annotations"] if isinstance(a, dict) and not a.get("was_cancelled")]
        if len(done) > 1:
            raise DataError(f"{counted(len(done), 'annotation')}; keep the one that counts, and export again")
        if not done:
            return []
        results = done[0].get("result")
    else:
        lists = [v for v in task.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        results = [r for values in lists for r in values]
    regions: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for number, item in enumerate(results or []):
        if not isinstance(item, dict):
            raise DataError(f"result {number} is not an object")
        value = item.get("value") if isinstance(item.get("value"), dict) else item
        assert isinstance(value, dict)
        kinds = ("brushlabels", "polygonlabels", "rectanglelabels", "ellipselabels", "labels")
        labels = [name for kind in kinds for name in value.get(kind) or [] if isinstance(name, str)]
        key = str(item.get("id", f"#{number}"))
        before = regions.get(key)
        shaped = {"rle", "points", "width", "radiusX"} & set(value)
        if before is None:
            regions[key] = {**item, "value": value} if shaped else {}, labels
        else:
            regions[key] = (before[0] or {**item, "value": value}), list(dict.fromkeys([*before[1], *labels]))
    objects, names, size = [], [], (0, 0)
    for key, (item, labels) in regions.items():
        if not item:
            continue
        if len(labels) != 1:
            raise DataError(
                f"region {key} has {counted(len(labels), 'label')} ({', '.join(labels)}), expected one"
            )
        size = _size(item.get("original_height"), item.get("original_width"), reading)
        objects.append((labels[0], _region(key, item["value"], *size)))
        names.append(f"region {key} ({labels[0]})")
    return [Drawn(image, *size, objects, names)]


def _region(key: str, value: Mapping[str, Any], height: int, width: int) -> Any:
    if not height or not width:
        raise DataError(f"region {key}: original_width and original_height are missing")
    across, down = width / 100, height / 100
    try:
        if "rle" in value:
            return packed_runs(_brush(value["rle"], height, width))
        if "points" in value:
            points = [
                float(v) * (across, down)[axis] for point in value["points"] for axis, v in enumerate(point)
            ]
            return [points] if len(points) >= 6 else []
        x, y, turn = float(value["x"]) * across, float(value["y"]) * down, float(value.get("rotation") or 0)
        if "radiusX" in value:
            return [_ellipse(x, y, float(value["radiusX"]) * across, float(value["radiusY"]) * down, turn)]
        w, h = float(value["width"]) * across, float(value["height"]) * down
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"region {key}: cannot be read ({error})") from None
    return [_turned([(0, 0), (w, 0), (w, h), (0, h)], x, y, turn)]


def _brush(rle: Any, height: int, width: int) -> np.ndarray:
    """Decode Label Studio's run lengths of a brush, (H, W) bool: where the picture's alpha is at least 128.

    A stream of bits: 32 for the number of values (4 for each pixel), 5 for the bits of a value less 1, 4 times 4 for
    the sizes of a length less 1; then, for each run, one bit (1: one value repeated), two that choose the size, the
    length less 1, and the value or values.
    """
    if not isinstance(rle, list) or not all(type(byte) is int and 0 <= byte <= 255 for byte in rle):
        raise ValueError("run lengths that are not bytes")
    bits, place = "".join(f"{byte:08b}" for byte in rle), 0

    def take(count: int) -> int:
        nonlocal place
        if place + count > len(bits):
            raise ValueError("the run lengths break off")
        place += count
        return int(bits[place - count : place], 2)

    total, word = take(32), take(5) + 1
    if total != 4 * height * width:
        raise ValueError(f"run lengths of {counted(total, 'value')} for a picture of {width}x{height}")
    sizes = [take(4) + 1 for _ in range(4)]
    kind: type[np.unsignedinteger] = np.uint8 if word <= 8 else np.uint32
    values, at = np.zeros(total, kind), 0
    while at < total:
        repeated = take(1)
        length = take(sizes[take(2)]) + 1
        if at + length > total:
            raise ValueError("the run lengths are longer than the picture")
        values[at : at + length] = take(word) if repeated else [take(word) for _ in range(length)]
        at += length
    return values.reshape(height, width, 4)[:, :, 3] >= 128


def yolo(text: str, names: Mapping[int, str], height: int, width: int) -> Drawn:
    """Parse the lines of YOLO's text for segmentation: class, then x and y of every corner as shares of the sides.

    The text does not name its image.

    Raises:
        DataError: a line of another form, a box (5 numbers), or a class without a name.
    """
    objects, called, faults = [], [], []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            key, values = int(fields[0]), [float(field) for field in fields[1:]]
        except ValueError:
            faults.append(f"line {number} is not a class and numbers")
            continue
        if len(values) == 4:
            faults.append(f"line {number} is a box, a label for detection; export polygons (segmentation)")
        elif len(values) < 6 or len(values) % 2:
            faults.append(
                f"line {number} has {counted(len(values), 'number')} behind the class, expected x, y of 3 or more "
                "corners"
            )
        elif key not in names:
            faults.append(f"line {number} has the class {key}, which has no name")
        elif not all(-0.1 <= value <= 1.1 for value in values):
            faults.append(f"line {number} has corners in pixels; YOLO's are shares of the sides, from 0 to 1")
        else:
            points = [value * (width, height)[axis % 2] for axis, value in enumerate(values)]
            objects.append((names[key], [points]))
            called.append(f"line {number} ({names[key]})")
    if faults:
        raise DataError("; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else ""))
    return Drawn("", height, width, objects, called)


def _size(height: Any, width: Any, reading: Reading) -> tuple[int, int]:
    """Height and width as a file states them; 0 where it states none.

    Raises:
        DataError: more pixels than may be drawn: a few bytes of text can claim any size.
    """
    high, wide = (value if type(value) is int and value > 0 else 0 for value in (height, width))
    if high * wide > reading.max_pixels:
        raise DataError(
            f"claims {shown(wide)}x{shown(high)} pixels, more than the limit of {reading.max_pixels}"
        )
    return high, wide


def _ellipse(x: float, y: float, across: float, down: float, turn: float = 0) -> list[float]:
    """Corners of an ellipse, as many as its outline has pixels, at least 24."""
    count = max(24, min(2000, round(2 * math.pi * max(across, down))))
    angles = [2 * math.pi * k / count for k in range(count)]
    return _turned([(across * math.cos(a), down * math.sin(a)) for a in angles], x, y, turn)


def _turned(corners: Sequence[tuple[float, float]], x: float, y: float, degrees: float) -> list[float]:
    """Turn corners around (0, 0), clockwise on the screen, and move them to (x, y)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [v for a, b in corners for v in (x + a * c - b * s, y + a * s + b * c)]


def _png(data: Any, called: str, *, packed: bool = False) -> np.ndarray:
    """Decode a small mask that stands in the file as text, (h, w) bool."""
    if not isinstance(data, str):
        raise DataError(f"{called}: its mask is missing")
    try:
        content = base64.b64decode(data, validate=False)
        if packed:
            unpacker = zlib.decompressobj()
            content = unpacker.decompress(content, 2**28)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise DataError(f"{called}: its mask cannot be unpacked ({error})") from None
    picture = open_picture(io.BytesIO(content), called, Reading())
    if picture.mode in ("RGBA", "LA"):
        picture.load()
        return np.asarray(picture.getchannel("A")) > 0
    return stored_ids(picture, called) > 0


def _placed(part: np.ndarray, left: int, top: int, height: int, width: int, called: str) -> Any:
    """Put a small mask into an empty picture at its place."""
    if left < 0 or top < 0 or top + part.shape[0] > height or left + part.shape[1] > width:
        raise DataError(
            f"{called}: a mask of {part.shape[1]}x{part.shape[0]} at {left}, {top} leads out of the image of "
            f"{width}x{height}"
        )
    mask = np.zeros((height, width), bool)
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return packed_runs(mask)
