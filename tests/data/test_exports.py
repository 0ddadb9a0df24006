"""Exports of labelling tools, each in the tool's own tree: `data init` opens them by itself, every pixel right."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from everseg.cli import main as cli
from everseg.config.fields import DataConfig
from everseg.data.base import Dataset
from everseg.data.datasets import annotated, load_dataset, tool_files
from everseg.errors import DataError
from saying import must_say

HEIGHT, WIDTH, COUNT = 48, 64, 8
COLOURS = np.array([(0, 0, 0), (250, 50, 83), (51, 221, 255)], np.uint8)
Say = Callable[..., tuple[int, str]]


def place(number: int, kind: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the object of class `kind`: 1 road, 2 tree. Other in every image."""
    return 3 + number + 30 * (kind - 1), 5, 18 + number + 30 * (kind - 1), 25 + number


def truth(number: int, kinds: tuple[int, ...] = (1, 2)) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for kind in kinds:
        left, top, right, bottom = place(number, kind)
        mask[top:bottom, left:right] = kind
    return mask


def corners(number: int, kind: int) -> list[list[float]]:
    left, top, right, bottom = place(number, kind)
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def photo(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def part_of(number: int) -> Callable[[str], str]:
    return lambda text: text.replace("SPLIT", "train" if number < 6 else "val")


# ---------------------------------------------------------------- the trees


def labelme(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"scan {n}.jpg", n)
        shapes = [{"label": "tree", "points": corners(n, 2), "shape_type": "polygon", "group_id": None, "flags": {}},
                  {"label": "road", "points": [corners(n, 1)[0], corners(n, 1)[2]], "shape_type": "rectangle"},
                  {"label": "road", "points": [[1, 1], [9, 9]], "shape_type": "line"}]  # fmt: skip
        write(root / f"scan {n}.json", {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"scan {n}.jpg",
                                       "imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH})  # fmt: skip


def labelme_masks(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"img/{n}.jpg", n)
        left, top, right, bottom = place(n, 2)
        drawn = base64.b64encode(png(np.full((bottom - top, right - left), True))).decode()
        box = [[left, top], [right, bottom]]
        shapes = [{"label": "road", "points": corners(n, 1), "shape_type": "polygon"},
                  {"label": "tree", "points": box, "shape_type": "mask", "mask": drawn}]  # fmt: skip
        write(root / f"json/{n}.json", {"shapes": shapes, "imagePath": f"..\\img\\{n}.jpg", "imageHeight": HEIGHT,
                                       "imageWidth": WIDTH})  # fmt: skip


def _voc(root: Path, masks: str) -> None:
    for n in range(COUNT):
        photo(root / f"JPEGImages/{n}.jpg", n)
        mask = Image.fromarray(truth(n))
        mask.putpalette(COLOURS.tobytes())
        (root / masks).mkdir(exist_ok=True)
        mask.save(root / masks / f"{n}.png")
        picture(root / f"SegmentationClassVisualization/{n}.jpg", COLOURS[truth(n)])
    write(root / "class_names.txt", "_background_\nroad\ntree\n")


def labelme2voc_old(root: Path) -> None:
    _voc(root, "SegmentationClassPNG")
    (root / "SegmentationClass").mkdir()
    for n in range(COUNT):
        np.save(root / f"SegmentationClass/{n}.npy", truth(n))


def labelme2voc_new(root: Path) -> None:
    _voc(root, "SegmentationClass")
    (root / "SegmentationClassNpy").mkdir()
    for n in range(COUNT):
        np.save(root / f"SegmentationClassNpy/{n}.npy", truth(n))


def cvat_masks(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"JPEGImages/{n}.jpg", n)
        picture(root / f"SegmentationClass/{n}.png", COLOURS[truth(n)])
        picture(root / f"SegmentationObject/{n}.png", COLOURS[truth(n)] // 2)
    write(
        root / "labelmap.txt",
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:250,50,83::\ntree:51,221,255::\n",
    )
    write(root / "ImageSets/Segmentation/default.txt", "".join(f"{n}\n" for n in range(COUNT)))


def cvat_mask_subsets(root: Path) -> None:
    cvat_masks(root)
    (root / "ImageSets/Segmentation/default.txt").unlink()
    write(root / "ImageSets/Segmentation/Train.txt", "".join(f"{n}\n" for n in range(6)))
    write(root / "ImageSets/Segmentation/Validation.txt", "6\n7\n")


def coco(numbers: range, names: str = "{}.jpg", categories: Any = None) -> dict[str, Any]:
    return {
        "licenses": [], "info": {},
        "categories": categories or [{"id": 1, "name": "road", "supercategory": ""},
                                     {"id": 2, "name": "tree", "supercategory": ""}],
        "images": [{"id": n + 1, "width": WIDTH, "height": HEIGHT, "file_name": names.format(n)} for n in numbers],
        "annotations": [
            {"id": 10 * n + k, "image_id": n + 1, "category_id": k, "iscrowd": 0,
             "segmentation": [[v for corner in corners(n, k) for v in corner]]} for n in numbers for k in (1, 2)],
    }  # fmt: skip


def cvat_coco(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"images/default/{n}.jpg", n)
    write(root / "annotations/instances_default.json", coco(range(COUNT)))


def cvat_coco_subsets(root: Path) -> None:
    for n in range(COUNT):
        photo(root / part_of(n)("images/SPLIT") / f"{n}.jpg", n)
    write(root / "annotations/instances_Train.json", coco(range(6)))
    write(root / "annotations/instances_Validation.json", coco(range(6, COUNT)))


def label_studio_coco(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"images/3f2a8c1{n}-{n}.jpg", n)
    write(root / "result.json", coco(range(COUNT), "images/3f2a8c1{0}-{0}.jpg"))


def brush(pixels: np.ndarray) -> list[int]:
    """Label Studio's stream of bits for a mask, one run for each change along the rows."""
    values = np.repeat((pixels * 255).astype(np.int64).reshape(-1), 4)
    starts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    bits = f"{len(values):032b}{7:05b}{2:04b}{7:04b}{11:04b}{15:04b}"
    for start, end in pairwise(starts):
        bits += "1" + "11" + f"{end - start - 1:016b}" + f"{values[start]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def _region(number: int, kind: int) -> dict[str, Any]:
    left, top, right, bottom = place(number, kind)
    common = {
        "id": f"r{kind}",
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "from_name": "tag",
        "to_name": "image",
    }
    if kind == 1:
        value = {"format": "rle", "rle": brush(truth(number, (1,)) > 0), "brushlabels": ["road"]}
        return {**common, "type": "brushlabels", "value": value}
    value = {"x": 100 * left / WIDTH, "y": 100 * top / HEIGHT, "width": 100 * (right - left) / WIDTH,
             "height": 100 * (bottom - top) / HEIGHT, "rotation": 0, "rectanglelabels": ["tree"]}  # fmt: skip
    return {**common, "type": "rectanglelabels", "value": value}


def label_studio_json(root: Path) -> None:
    tasks = []
    for n in range(COUNT):
        photo(root / f"images/{n}.jpg", n)
        result = [_region(n, k) for k in (1, 2)]
        tasks.append({"id": n + 1, "data": {"image": f"/data/upload/1/3f2a8c1{n}-{n}.jpg"},
                      "annotations": [{"id": 9, "was_cancelled": False, "result": result}]})  # fmt: skip
    write(root / "project-1-at-2024-05-01.json", tasks)


def label_studio_min(root: Path) -> None:
    tasks = []
    for n in range(COUNT):
        photo(root / f"images/{n}.jpg", n)
        regions = [{**r, **r["value"]} for r in (_region(n, k) for k in (1, 2))]
        for region in regions:
            del region["value"], region["id"]
        tasks.append({"id": n + 1, "image": f"/data/local-files/?d=images/{n}.jpg", "annotation_id": 1, "annotator": 1,
                      "tag": regions})  # fmt: skip
    write(root / "min.json", tasks)


def label_studio_png(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"images/{n}.jpg", n)
        for kind, name in ((1, "road"), (2, "tree")):
            file = f"task-{n}-annotation-{n + 4}-by-1-tag-{name}-0.png"
            picture(root / file, (truth(n, (kind,)) > 0).astype(np.uint8) * 255)


def roboflow_masks(root: Path) -> None:
    for n in range(COUNT):
        folder = root / ("train" if n < 6 else "valid")
        photo(folder / f"{n}_jpg.rf.0a{n}.jpg", n)
        picture(folder / f"{n}_jpg.rf.0a{n}_mask.png", truth(n))
        write(folder / "_classes.csv", "Pixel Value, Class\n0, background\n1, road\n2, tree\n")


def roboflow_coco(root: Path) -> None:
    categories = [{"id": 0, "name": "things", "supercategory": "none"},
                  {"id": 1, "name": "road", "supercategory": "things"},
                  {"id": 2, "name": "tree", "supercategory": "things"}]  # fmt: skip
    for folder, numbers in (("train", range(6)), ("valid", range(6, COUNT))):
        for n in numbers:
            photo(root / folder / f"{n}.jpg", n)
        write(root / folder / "_annotations.coco.json", coco(numbers, categories=categories))


def _meta(root: Path) -> None:
    classes = [
        {"title": "road", "shape": "bitmap", "color": "#FA3253"},
        {"title": "tree", "shape": "polygon"},
    ]
    write(root / "meta.json", {"classes": classes, "tags": [{"name": "train", "value_type": "none"}]})


def supervisely_json(root: Path) -> None:
    _meta(root)
    for n in range(COUNT):
        photo(root / f"ds0/img/{n}.jpg", n)
        left, top, right, bottom = place(n, 1)
        data = zlib.compress(png(np.full((bottom - top, right - left), True)))
        road = {"data": base64.b64encode(data).decode(), "origin": [left, top]}
        objects = [{"classTitle": "road", "geometryType": "bitmap", "bitmap": road},
                   {"classTitle": "tree", "geometryType": "polygon",
                    "points": {"exterior": corners(n, 2), "interior": []}}]  # fmt: skip
        tags = [{"name": "train" if n < 6 else "val", "value": None}]
        write(root / f"ds0/ann/{n}.jpg.json", {"description": "", "tags": tags, "objects": objects,
                                               "size": {"height": HEIGHT, "width": WIDTH}})  # fmt: skip


def supervisely_masks(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"ds0/img/{n}.jpg", n)
        picture(root / f"ds0/masks_machine/{n}.jpg.png", truth(n))
        mixed = np.random.default_rng(n).integers(0, 128, (HEIGHT, WIDTH, 3)) + COLOURS[truth(n)] // 2
        picture(root / f"ds0/masks_human/{n}.jpg.png", mixed.astype(np.uint8))
    write(root / "obj_class_to_machine_color.json", {"road": [1, 1, 1], "tree": [2, 2, 2]})


def v7_two(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"images/{n}.jpg", n)
        road = truth(n, (1,)).reshape(-1)
        starts = [0, *(np.flatnonzero(np.diff(road)) + 1).tolist(), len(road)]
        dense = [v for a, b in pairwise(starts) for v in (int(road[a]), b - a)]
        layer = {"dense_rle": dense, "mask_annotation_ids_mapping": {"a": 1}, "total_pixels": len(road)}
        paths = [[{"x": x, "y": y} for x, y in corners(n, 2)]]
        annotations = [{"id": "a", "name": "road", "mask": {}, "slot_names": ["0"]},
                       {"id": "b", "name": "tree", "polygon": {"paths": paths}, "slot_names": ["0"]},
                       {"id": "c", "name": "__raster_layer__", "raster_layer": layer}]  # fmt: skip
        slot = {
            "slot_name": "0",
            "width": WIDTH,
            "height": HEIGHT,
            "source_files": [{"file_name": f"{n}.jpg"}],
        }
        write(root / f"annotations/{n}.json", {"version": "2.0", "annotations": annotations,
              "item": {"name": f"{n}.jpg", "path": "/", "slots": [slot]}})  # fmt: skip


def _v7_slots(number: int) -> dict[str, Any]:
    """An item of two slots that shows images `number` and `number` + 1."""
    annotations, slots = [], []
    for n in (number, number + 1):
        slot = f"view {n - number}"
        slots.append({"slot_name": slot, "type": "image", "width": WIDTH, "height": HEIGHT,
                      "source_files": [{"file_name": f"{n}.jpg"}]})  # fmt: skip
        drawn = truth(n, (1,)).reshape(-1)
        starts = [0, *(np.flatnonzero(np.diff(drawn)) + 1).tolist(), len(drawn)]
        dense = [v for a, b in pairwise(starts) for v in (int(drawn[a]), b - a)]
        layer = {"dense_rle": dense, "mask_annotation_ids_mapping": {f"a{n}": 1}}
        paths = [[{"x": x, "y": y} for x, y in corners(n, 2)]]
        own = [{"name": "road", "mask": {}}, {"name": "tree", "polygon": {"paths": paths}},
               {"name": "__raster_layer__", "raster_layer": layer}]  # fmt: skip
        annotations += [{"id": f"{'abc'[k]}{n}", "slot_names": [slot], **one} for k, one in enumerate(own)]
    return {"version": "2.0", "annotations": annotations,
            "item": {"name": f"pair {number}", "path": "/site", "slots": slots}}  # fmt: skip


def v7_slots(root: Path) -> None:
    for n in range(0, COUNT, 2):
        for k in range(2):
            photo(root / f"images/site/pair {n}/view {k}/{n + k}.jpg", n + k)
        write(root / f"annotations/site/pair {n}.json", _v7_slots(n))


def v7_video(root: Path) -> None:
    v7_slots(root)
    content = _v7_slots(2)
    content["item"]["slots"][1] |= {"type": "video", "frame_count": 90}
    write(root / "annotations/site/pair 2.json", content)


def v7_stray(root: Path) -> None:
    v7_slots(root)
    content = _v7_slots(2)
    content["annotations"][1]["slot_names"] = ["view 7"]
    del content["annotations"][3]["slot_names"]
    write(root / "annotations/site/pair 2.json", content)


def v7_one(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"images/{n}.jpg", n)
        annotations = [
            {"name": name, "polygon": {"path": [{"x": x, "y": y} for x, y in corners(n, k)]}}
            for k, name in ((1, "road"), (2, "tree"))
        ]
        image = {"filename": f"{n}.jpg", "path": "/", "width": WIDTH, "height": HEIGHT}
        write(root / f"annotations/{n}.json", {"dataset": "x", "image": image, "annotations": annotations})


def v7_masks(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"images/{n}.jpg", n)
        picture(root / f"masks/{n}.png", COLOURS[truth(n)])
    write(
        root / "class_mapping.csv",
        "class_name,class_color\n__background__,0 0 0\nroad,250 50 83\ntree,51 221 255\n",
    )


def segments(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"{n}.jpg", n)
        picture(root / f"{n}_label_ground-truth_semantic.png", truth(n))
    write(root / "classes.txt", "0 background\n1 road\n2 tree\n")


def _release(samples: list[dict[str, Any]], task: str = "segmentation-bitmap") -> dict[str, Any]:
    categories = [{"id": 4, "name": "road", "color": [1, 2, 3]}, {"id": 9, "name": "tree"}]
    dataset = {"name": "site", "owner": "ann", "task_type": task, "labelsets": [{"name": "ground-truth"}],
               "task_attributes": {"format_version": "0.1", "categories": categories}, "samples": samples}  # fmt: skip
    return {"name": "v0.1", "dataset": dataset}


def _release_sample(number: int, attributes: dict[str, Any]) -> dict[str, Any]:
    address = f"https://assets.example/5f/{number}0a.jpg?X-Signature=b.c"
    label = {"label_status": "REVIEWED", "attributes": {"format_version": "0.1", **attributes}}
    return {"name": f"site/{number}.png", "uuid": f"u{number}", "attributes": {"image": {"url": address}},
            "metadata": {"split": "train" if number < 6 else "val"}, "labels": {"ground-truth": label}}  # fmt: skip


def segments_release(root: Path) -> None:
    """As SegmentsDataset(release) stores it: images named by the sample, bitmaps of objects by number."""
    samples = []
    for n in range(COUNT):
        here = root / "segments/ann_site/v0.1/site"
        photo(here / f"{n}.jpg", n)
        objects = {1: 7 - n % 2, 2: 300 + n}
        numbered = np.select([truth(n) == 1, truth(n) == 2], [objects[1], objects[2]], 0).astype(np.uint32)
        stored = (numbered | 255 << 24).astype("<u4").view(np.uint8).reshape(HEIGHT, WIDTH, 4)
        picture(here / f"{n}_label_ground-truth.png", stored)
        address = {"url": f"https://assets.example/{n}.png"}
        listed = [{"id": objects[k], "category_id": {1: 4, 2: 9}[k]} for k in (1, 2)]
        samples.append(_release_sample(n, {"annotations": listed, "segmentation_bitmap": address}))
    samples.append({**_release_sample(COUNT, {}), "labels": {"ground-truth": None}})
    write(root / "site-v0.1.json", _release(samples))


def segments_release_semantic(root: Path) -> None:
    """The same with masks of classes, without bitmaps."""
    segments_release(root)
    for n in range(COUNT):
        here = root / "segments/ann_site/v0.1/site"
        (here / f"{n}_label_ground-truth.png").unlink()
        picture(here / f"{n}_label_ground-truth_semantic.png", np.array([0, 4, 9], np.uint8)[truth(n)])


def segments_polygons(root: Path) -> None:
    samples = []
    for n in range(COUNT):
        photo(root / f"images/site/{n}.jpg", n)
        listed = [
            {"id": k, "category_id": {1: 4, 2: 9}[k], "type": "polygon", "points": corners(n, k)}
            for k in (1, 2)
        ]
        listed.append({"id": 3, "category_id": 4, "type": "polyline", "points": [[1, 1], [9, 9]]})
        samples.append(_release_sample(n, {"annotations": listed}))
    write(root / "site-v0.1.json", _release(samples, "vector"))


def segments_boxes(root: Path) -> None:
    segments_polygons(root)
    file = root / "site-v0.1.json"
    write(file, file.read_text().replace('"polygon"', '"bbox"'))


def segments_two_releases(root: Path) -> None:
    segments_release(root)
    write(root / "site-v0.2.json", (root / "site-v0.1.json").read_text())


def segments_without_files(root: Path) -> None:
    segments_release(root)
    for file in root.rglob("*_label_ground-truth.png"):
        file.unlink()


def segments_object_unknown(root: Path) -> None:
    segments_release(root)
    file = root / "site-v0.1.json"
    write(file, file.read_text().replace('"category_id": 9', '"category_id": 8'))


def yolo(root: Path, images: str = "images/SPLIT", labels: str = "labels/SPLIT") -> None:
    for n in range(COUNT):
        photo(root / part_of(n)(images) / f"{n}.jpg", n)
        lines = [
            " ".join(
                [
                    str(k - 1),
                    *(f"{v / (WIDTH, HEIGHT)[at]:.8f}" for c in corners(n, k) for at, v in enumerate(c)),
                ]
            )
            for k in (1, 2)
        ]
        write(root / part_of(n)(labels) / f"{n}.txt", "\n".join(lines) + "\n")
    write(
        root / "dataset.yaml", "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: road\n  1: tree\n"
    )


def yolo_roboflow(root: Path) -> None:
    yolo(root, "SPLIT/images", "SPLIT/labels")
    (root / "dataset.yaml").unlink()
    write(
        root / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['road', 'tree']\n"
    )


def cvat_cityscapes(root: Path) -> None:
    for n in range(COUNT):
        split = part_of(n)("SPLIT")
        photo(root / f"imgsFine/leftImg8bit/{split}/{n}_leftImg8bit.png", n)
        picture(root / f"gtFine/{split}/{n}_gtFine_color.png", COLOURS[truth(n)])
    write(root / "label_colors.txt", "0 0 0 background\n250 50 83 road\n51 221 255 tree\n")


def stored(image: str, mask: str, parquet: str = "") -> Callable[[Path], None]:
    def make(root: Path) -> None:
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        columns = {image: [], mask: []}
        for n in range(COUNT):
            pixels = np.random.default_rng(n).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
            columns[image].append(Image.fromarray(pixels))
            columns[mask].append(Image.fromarray(truth(n)))
        features = datasets.Features({image: datasets.Image(), mask: datasets.Image()})
        table = datasets.Dataset.from_dict(columns, features=features)
        root.mkdir(exist_ok=True)
        write(root / "id2label.json", {"0": "background", "1": "road", "2": "tree"})
        for part, rows in (("train", range(6)), ("validation", range(6, COUNT))) if parquet else ():
            file = root / parquet.replace("SPLIT", part)
            file.parent.mkdir(parents=True, exist_ok=True)
            several = [rows[:1], rows[1:]] if "NUMBER" in parquet else [rows]
            for number, some in enumerate(several):
                table.select(some).to_parquet(str(file).replace("NUMBER", f"{number:05d}"))
        if not parquet:
            table.save_to_disk(str(root))

    return make


def bitmaps(
    kind: str = "RGBA", column: str = "label.annotations", how: Callable[[Any], Any] = lambda x: x
) -> Callable[[Path], None]:
    """Segments.ai's release as its SDK stores it: objects by number, and their classes in another column."""

    def make(root: Path) -> None:
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        rows = []
        for n in range(COUNT):
            pixels = np.random.default_rng(n).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
            objects = {1: 7 - n % 2, 2: 300 + n}  # the number of the object of each class changes
            drawn = truth(n)
            numbered = np.select([drawn == 1, drawn == 2], [objects[1], objects[2]], 0).astype(np.uint32)
            if kind == "RGBA":
                stored = Image.fromarray(
                    (numbered | 255 << 24).astype("<u4").view(np.uint8).reshape(HEIGHT, WIDTH, 4)
                )
            else:
                stored = Image.fromarray(numbered.astype(np.uint16))
            classes = [{"id": number, "category_id": c} for c, number in objects.items()]
            rows.append({"image": pixels, "label.segmentation_bitmap": stored, column: how(classes)})
        for row in rows:
            for name in ("image", "label.segmentation_bitmap"):
                content = io.BytesIO()
                (Image.fromarray(row[name]) if name == "image" else row[name]).save(content, "PNG")
                row[name] = {"bytes": content.getvalue(), "path": None}
        table = datasets.Dataset.from_list(rows)
        for name in ("image", "label.segmentation_bitmap"):
            table = table.cast_column(name, datasets.Image())
        root.mkdir(exist_ok=True)
        write(root / "id2label.json", {"0": "background", "1": "road", "2": "tree"})
        table.save_to_disk(str(root))

    return make


EXPORTS: dict[str, tuple[Callable[[Path], None], bool]] = {
    "labelme JSON": (labelme, False),
    "labelme JSON with masks": (labelme_masks, False),
    "labelme2voc, old": (labelme2voc_old, False),
    "labelme2voc, new": (labelme2voc_new, False),
    "CVAT masks": (cvat_masks, False),
    "CVAT masks, subsets": (cvat_mask_subsets, True),
    "CVAT COCO": (cvat_coco, False),
    "CVAT COCO, subsets": (cvat_coco_subsets, True),
    "CVAT Cityscapes": (cvat_cityscapes, True),
    "Label Studio COCO": (label_studio_coco, False),
    "Label Studio JSON": (label_studio_json, False),
    "Label Studio JSON-MIN": (label_studio_min, False),
    "Label Studio brush PNG": (label_studio_png, False),
    "Roboflow masks": (roboflow_masks, True),
    "Roboflow COCO": (roboflow_coco, True),
    "Supervisely JSON": (supervisely_json, True),
    "Supervisely masks": (supervisely_masks, False),
    "V7 JSON 2.0": (v7_two, False),
    "V7 JSON 2.0, slots": (v7_slots, False),
    "V7 JSON 1.0": (v7_one, False),
    "V7 masks": (v7_masks, False),
    "Segments.ai masks": (segments, False),
    "Segments.ai release": (segments_release, True),
    "Segments.ai release, masks": (segments_release_semantic, False),
    "Segments.ai release, polygons": (segments_polygons, True),
    "YOLO": (yolo, True),
    "YOLO, Roboflow's": (yolo_roboflow, True),
}
"""Export -> (its tree, whether images 6 and 7 are its val)."""
STORED = {
    "save_to_disk": stored("image", "label"),
    "Segments.ai's columns": stored("pixel_values", "label"),
    "Segments.ai's bitmaps": bitmaps(),
    "Segments.ai's bitmaps, 16 bits": bitmaps("I;16"),
    "Segments.ai's bitmaps, JSON": bitmaps(how=json.dumps),
    "Parquet": stored("image", "label", "data/SPLIT-00000-of-00001.parquet"),
    "Parquet in parts, with hashes": stored(
        "image", "annotation", "data/SPLIT-NUMBER-of-00002-3cc742d323f73634.parquet"
    ),
    "Parquet of the hub's branch": stored("pixel_values", "labels", "default/SPLIT/0000.parquet"),
    "Parquet of one name": stored("image", "mask", "SPLIT.parquet"),
    "unusual columns": stored("photo_before", "drawn_by_hand"),
}


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERSEG_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    return call


def opened(say: Say, root: Path, *options: str) -> Dataset:
    """`data init` and `data check` of a folder, which both have to pass; the data set."""
    code, text = say("data", "init", str(root), "--yes", "--out", "made.yaml", *options)
    assert code == 0, text
    code, text = say("data", "check", "made.yaml")
    assert code == 0, text
    return load_dataset(DataConfig(dataset="made.yaml"))


def require_true(data: Dataset, splits: bool, *, val_from: int = 0) -> None:
    """Compare every pixel. Where samples are named by their place in the split, `val` begins with image `val_from`."""
    names = data.labels.names
    road, tree = (next(i for i, name in names.items() if name == wanted) for wanted in ("road", "tree"))
    assert set(names) == {data.labels.background, road, tree}
    found: dict[int, str] = {}
    for split_name, split in data.splits.items():
        for index in range(len(split)):
            number = int(
                "".join(c for c in split.id(index).split("/")[-1].split("_")[0].split("-")[-1] if c.isdigit())
            )
            number += val_from if split_name == "val" else 0
            found[number] = split_name
            mask = split.read(index)[1]
            wanted = np.array([data.labels.background, road, tree], np.uint8)[truth(number)]
            np.testing.assert_array_equal(mask, wanted)
    assert sorted(found) == list(range(COUNT))
    if splits:
        assert [n for n, name in sorted(found.items()) if name == "val"] == [6, 7]


@pytest.mark.parametrize("export", EXPORTS)
def test_an_export_is_opened_by_itself(say: Say, tmp_path: Path, export: str) -> None:
    make, splits = EXPORTS[export]
    make(tmp_path / "data")
    before = sorted(tmp_path.joinpath("data").rglob("*"))
    require_true(opened(say, tmp_path / "data"), splits)
    assert sorted(tmp_path.joinpath("data").rglob("*")) == before


@pytest.mark.parametrize("kind", STORED)
def test_a_stored_set_is_opened_by_itself(
    say: Say, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    STORED[kind](tmp_path / "data")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    data = opened(say, tmp_path / "data")
    parquet = kind.startswith("Parquet")
    require_true(data, parquet, val_from=6 if parquet else 0)


def test_objects_by_number_without_their_classes_are_refused(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    bitmaps(column="notes", how=lambda classes: f"{len(classes)} objects")(tmp_path / "data")
    code, text = say("data", "init", str(tmp_path / "data"), "--yes", "--out", "made.yaml")
    assert code == 3, text
    must_say(text, "label.segmentation_bitmap", "annotations=NAME", "annotations=none", "semantic")


def test_an_object_without_annotation_is_an_error_of_its_sample(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    bitmaps(how=lambda classes: classes[:1] if classes[1]["id"] == 303 else classes)(tmp_path / "data")
    write(tmp_path / "made.yaml", "layout: hf\nroot: data\nclasses: [background, road, tree]\n")
    code, text = say("data", "check", "made.yaml")
    assert code == 3, text
    must_say(text, 303, "annotation")


@pytest.mark.parametrize("stated", [None, "none", "annotations"])
def test_masks_beside_annotations_are_objects_or_classes_as_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: str | None
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    drawn = [{"bytes": png(truth(n)), "path": None} for n in range(4)]
    swapped = [[{"id": 1, "category_id": 2}, {"id": 2, "category_id": 1}]] * 4
    table = datasets.Dataset.from_dict({"image": drawn, "mask": drawn, "annotations": swapped})
    for name in ("image", "mask"):
        table = table.cast_column(name, datasets.Image())
    table.save_to_disk(str(tmp_path / "data"))
    options = {"root": str(tmp_path / "data"), "classes": ["background", "road", "tree"]}
    if stated is None:
        with pytest.raises(DataError) as refused:
            load_dataset(
                DataConfig(dataset="hf", root=options["root"], options={"classes": options["classes"]})
            )
        must_say(str(refused.value), "annotations=none", "annotations")
        return
    data = load_dataset(
        DataConfig(
            dataset="hf", root=options["root"], options={"classes": options["classes"], "annotations": stated}
        )
    )
    split = next(iter(data.splits.values()))
    wanted = truth(int(split.id(0)))
    if stated == "annotations":
        wanted = np.array([0, 2, 1], np.uint8)[wanted]
    np.testing.assert_array_equal(split.read_mask(0), wanted)


# ---------------------------------------------------------------- what is refused, with the way out


def segments_bitmaps(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"{n}.jpg", n)
        picture(root / f"{n}_label_ground-truth.png", truth(n))
    write(root / "ground-truth-v0.1.json", {"dataset": {"samples": []}})


def segments_bitmaps_in_folders(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"images/{n}.jpg", n)
        picture(root / f"labels/{n}_label_ground-truth.png", truth(n))


def cityscapes_like(
    ids: tuple[int, int], beside: str = "", label: str = "", city: str = "here", suffix: str = "labelIds"
) -> Callable[[Path], None]:
    """Cityscapes' folders and names with other classes: by their ids, a file of names, or polygons."""

    def make(root: Path) -> None:
        for n in range(COUNT):
            folder, name = f"{'train' if n < 6 else 'val'}/{city}", f"{city}_{n:06d}_000019"
            photo(root / f"leftImg8bit/{folder}/{name}_leftImg8bit.png", n)
            drawn = np.array([7 if ids[0] > 6 else 0, *ids], np.uint8)[truth(n)]
            picture(root / f"gtFine/{folder}/{name}_gtFine_{suffix}.png", drawn)
            if label:
                shapes = [{"label": one, "polygon": corners(n, 1)} for one in label.split(",")]
                write(root / f"gtFine/{folder}/{name}_gtFine_polygons.json", {"objects": shapes})
        if beside:
            write(root / "classes.txt", beside)

    return make


def instance_ids(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"images/{n}.jpg", n)
        picture(root / f"masks/{n}_instanceIds.png", truth(n))


def photos_only(root: Path) -> None:
    for n in range(COUNT):
        photo(root / f"images/{n}.jpg", n)


def cvat_xml(root: Path) -> None:
    photos_only(root)
    write(
        root / "annotations.xml",
        '<?xml version="1.0"?>\n<annotations>\n  <version>1.1</version>\n</annotations>\n',
    )


def voc_boxes(root: Path) -> None:
    photos_only(root)
    write(root / "Annotations/0.xml", "<annotation><object><bndbox></bndbox></object></annotation>")


def via(root: Path) -> None:
    photos_only(root)
    write(root / "via_project.json", {"_via_settings": {}, "_via_img_metadata": {}})


def arrays(root: Path) -> None:
    photos_only(root)
    (root / "masks").mkdir()
    np.save(root / "masks/0.npy", truth(0))


def brushes_without_images(root: Path) -> None:
    label_studio_png(root)
    for n in range(COUNT):
        (root / f"images/{n}.jpg").rename(root / f"images/photo_{n + 40}.jpg")


def brushes_that_overlap(root: Path) -> None:
    label_studio_png(root)
    picture(root / "task-3-annotation-7-by-1-tag-tree-1.png", (truth(3, (1,)) > 0).astype(np.uint8) * 255)


def two_annotators(root: Path) -> None:
    label_studio_json(root)
    file = root / "project-1-at-2024-05-01.json"
    tasks = json.loads(file.read_text())
    tasks[2]["annotations"] *= 2
    write(file, tasks)


def damaged_brush(root: Path) -> None:
    label_studio_json(root)
    file = root / "project-1-at-2024-05-01.json"
    tasks = json.loads(file.read_text())
    tasks[2]["annotations"][0]["result"][0]["value"]["rle"] = [0, 0, 0, 9, 1]
    write(file, tasks)


def yolo_boxes(root: Path) -> None:
    yolo(root)
    write(root / "labels/train/2.txt", "0 0.5 0.5 0.2 0.2\n")


def yolo_nameless(root: Path) -> None:
    yolo(root)
    (root / "dataset.yaml").unlink()


def yolo_pixels(root: Path) -> None:
    yolo(root)
    write(root / "labels/train/2.txt", "0 10 10 30 10 30 30\n")


def labelme_images_missing(root: Path) -> None:
    labelme(root)
    (root / "scan 3.jpg").unlink()


def supervisely_unknown(root: Path) -> None:
    supervisely_json(root)
    ann = json.loads((root / "ds0/ann/3.jpg.json").read_text())
    ann["objects"][1]["geometryType"] = "cuboid"
    write(root / "ds0/ann/3.jpg.json", ann)


def roboflow_two_lists(root: Path) -> None:
    roboflow_masks(root)
    write(root / "valid/_classes.csv", "Pixel Value, Class\n0, background\n1, tree\n2, road\n")


REFUSED: dict[str, tuple[Callable[[Path], None], tuple[object, ...]]] = {
    "CVAT for images": (cvat_xml, ("annotations.xml", "CVAT", "COCO")),
    "VOC boxes": (voc_boxes, ("0.xml", "boxes", "detection")),
    "VIA project": (via, ("via_project.json", "COCO")),
    "Segments.ai's bitmaps": (segments_bitmaps, ("_label_ground-truth", "semantic", "number")),
    "Segments.ai's bitmaps in folders": (
        segments_bitmaps_in_folders,
        ("_label_ground-truth", "semantic", "number"),
    ),
    "Segments.ai's boxes": (segments_boxes, ("site-v0.1.json", 24, "polygon")),
    "Segments.ai, two releases": (
        segments_two_releases,
        ("site-v0.1.json", "site-v0.2.json", "release=FILE.json"),
    ),
    "Segments.ai, no bitmaps": (segments_without_files, ("site-v0.1.json", "ground-truth", "files")),
    "Segments.ai, foreign categories": (segments_object_unknown, ("site-v0.1.json", 8, "categories")),
    "masks of objects by number": (instance_ids, ("_instanceIds", "number", "rename")),
    "Cityscapes' tree, ids beyond": (
        cityscapes_like((8, 40)),
        ("Cityscapes", 40, "_gtFine_labelIds.png", "data.yaml"),
    ),
    "Cityscapes' tree, ids ignored": (cityscapes_like((1, 2)), ("Cityscapes", 1, 2, "ignores", "data.yaml")),
    "Cityscapes' tree, own list": (
        cityscapes_like((8, 11), "kerb\nroad\n"),
        ("Cityscapes", "kerb", "data.yaml"),
    ),
    "Cityscapes' tree, own polygons": (
        cityscapes_like((8, 11), label="kerb"),
        ("Cityscapes", "kerb", "data.yaml"),
    ),
    "Cityscapes' tree, ids alone": (
        cityscapes_like((8, 10)),
        ("Cityscapes", 7, 8, 10, "data.dataset=cityscapes", "data.yaml"),
    ),
    "Cityscapes' tree, trainIds alone": (
        cityscapes_like((1, 2), suffix="labelTrainIds"),
        ("Cityscapes", "_gtFine_labelTrainIds.png", "data.dataset=cityscapes", "data.yaml"),
    ),
    "Cityscapes' tree, ids of other labels": (
        cityscapes_like((8, 11), label="road,car"),
        ("Cityscapes", 8, 11, "car", "_gtFine_labelIds.png"),
    ),
    "NumPy masks": (arrays, ("0.npy", "PNG")),
    "brushes without the images' names": (brushes_without_images, ("task", "JSON", "12.jpg")),
    "brushes that overlap": (brushes_that_overlap, ("task", 3, "JSON")),
    "two annotators": (two_annotators, ("task", 3, 2, "annotations")),
    "a damaged brush": (damaged_brush, ("task", 3, "r1")),
    "YOLO boxes": (yolo_boxes, ("2.txt", "line", 1, "box", "polygons")),
    "YOLO without names": (yolo_nameless, ("YAML", "names", "classes.txt")),
    "YOLO in pixels": (yolo_pixels, ("2.txt", "line", 1, "pixels")),
    "Supervisely's cuboids": (supervisely_unknown, ("3.jpg.json", "cuboid")),
    "V7, a film": (v7_video, ("pair 2.json", "view 1", "video", 90)),
    "V7, annotations of no slot": (v7_stray, ("pair 2.json", "annotations[1]", "view 7", "annotations[3]")),
    "Roboflow's lists that differ": (roboflow_two_lists, ("_classes.csv", "tree", "road")),
}
"""What cannot be read -> (its tree, what a line of the message has to say)."""


@pytest.mark.parametrize(
    "tree",
    [
        cityscapes_like((8, 26), label="road,sidewalk,cargroup"),
        cityscapes_like((8, 11), city="aachen"),
        cityscapes_like((1, 2), city="aachen", suffix="labelTrainIds"),
        cityscapes_like((8, 11), "road\nsidewalk\nbuilding\n"),
    ],
    ids=["polygons", "city", "city, trainIds", "names"],
)
def test_cityscapes_itself_is_recognised(say: Say, tmp_path: Path, tree: Callable[[Path], None]) -> None:
    tree(tmp_path / "data")
    code, text = say("data", "init", str(tmp_path / "data"), "--yes", "--out", "made.yaml")
    assert code == 0, text
    assert "layout: cityscapes" in (tmp_path / "made.yaml").read_text()


def test_own_pictures_named_by_years_are_not_taken_for_pascal_voc(say: Say, tmp_path: Path) -> None:
    for n in range(COUNT):
        name = f"2024_{n:06d}"
        photo(tmp_path / f"data/JPEGImages/{name}.jpg", n)
        picture(tmp_path / f"data/SegmentationClass/{name}.png", truth(n))
    for part, numbers in (("train", range(6)), ("val", range(6, COUNT))):
        lines = "".join(f"2024_{n:06d}\n" for n in numbers)
        write(tmp_path / f"data/ImageSets/Segmentation/{part}.txt", lines)
    data = opened(say, tmp_path / "data", "--classes", "road,tree", "--names-from", "1")
    assert data.labels.names == {0: "background", 1: "road", 2: "tree"}
    np.testing.assert_array_equal(data.splits["val"].read(1)[1], truth(7))


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_says_what_it_is_and_the_way_out(say: Say, tmp_path: Path, what: str) -> None:
    make, facts = REFUSED[what]
    make(tmp_path / "data")
    code, text = say("data", "init", str(tmp_path / "data"), "--yes", "--out", "made.yaml")
    assert code == 3, text
    must_say(text, *facts)
    assert "--follow-links" not in text  # there are no links
    assert not (tmp_path / "made.yaml").exists()


def test_an_annotation_without_its_image_costs_itself_only(say: Say, tmp_path: Path) -> None:
    labelme_images_missing(tmp_path / "data")
    code, text = say("data", "init", str(tmp_path / "data"), "--yes", "--out", "made.yaml")
    assert code == 0, text
    code, text = say("data", "check", "made.yaml")
    assert code == 3
    must_say(text, "scan 3.jpg")
    data = load_dataset(DataConfig(dataset="made.yaml", options={"on_missing": "skip"}))
    assert sum(map(len, data.splits.values())) == COUNT - 1


def test_ids_stay_when_more_files_come(say: Say, tmp_path: Path) -> None:
    labelme(tmp_path / "data")
    before = opened(say, tmp_path / "data").labels.names
    photo(tmp_path / "data/late.jpg", 50)
    shape = {"label": "asphalt", "points": corners(0, 1), "shape_type": "polygon"}
    late = {"shapes": [shape], "imagePath": "late.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH}
    write(tmp_path / "data/late.json", late)
    code, text = say("data", "check", "made.yaml")
    assert code == 3
    must_say(text, "asphalt", 1)
    write(tmp_path / "data/late.json", {**late, "shapes": [{**shape, "label": "tree"}]})
    assert say("data", "check", "made.yaml")[0] == 0
    assert load_dataset(DataConfig(dataset="made.yaml")).labels.names == before


def test_holes_stay_open(say: Say, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for n in range(COUNT):
        photo(root / f"ds0/img/{n}.jpg", n)
        hole = [[20, 20], [30, 20], [30, 30], [20, 30]]
        outline = [[10, 10], [40, 10], [40, 40], [10, 40]]
        ring = {
            "classTitle": "ring",
            "geometryType": "polygon",
            "points": {"exterior": outline, "interior": [hole]},
        }
        size = {"height": HEIGHT, "width": WIDTH}
        write(root / f"ds0/ann/{n}.jpg.json", {"size": size, "tags": [], "objects": [ring]})
    mask = opened(say, root).splits["train"].read_mask(0)
    wanted = np.zeros((HEIGHT, WIDTH), np.uint8)
    wanted[10:40, 10:40] = 1
    wanted[20:30, 20:30] = 0
    np.testing.assert_array_equal(mask, wanted)


def _of_many_classes(count: int, name: Callable[[int], str]) -> dict[str, Any]:
    """COCO of so many categories: category n + 1 is `name(n)`, and the image's objects are 1 and the last."""
    content = coco(range(COUNT), categories=[{"id": i + 1, "name": name(i)} for i in range(count)])
    for n, entry in enumerate(content["annotations"]):
        entry["category_id"] = (count if n % 2 else 1) if n < 6 else 260
    return content


@pytest.mark.parametrize("tool", ["COCO", "labelme"])
def test_annotations_of_more_than_254_classes_become_masks_of_16_bits(
    say: Say, tmp_path: Path, tool: str
) -> None:
    if tool == "COCO":
        for n in range(COUNT):
            photo(tmp_path / f"data/images/{n}.jpg", n)
        content = _of_many_classes(1203, lambda i: f"thing {i}")
        content["annotations"].append({"id": 999, "image_id": 1, "category_id": 7, "bbox": [0, 40, 4, 4]})
        write(tmp_path / "data/annotations.json", content)
    else:
        labelme(tmp_path / "data")
        for n in range(COUNT):
            file = tmp_path / f"data/scan {n}.json"
            content = json.loads(file.read_text())
            wanted = ("thing 1202", "thing 0") if n < 3 else ("thing 259", "thing 259")
            for shape, label in zip(content["shapes"], wanted, strict=False):
                shape["label"] = label
            content["shapes"][2] = {
                "label": "ignore",
                "points": [[0, 40], [4, 44]],
                "shape_type": "rectangle",
            }
            write(file, content)
        write(tmp_path / "data/labels.txt", "".join(f"thing {i}\n" for i in range(1203)))
    data = opened(say, tmp_path / "data")
    assert [data.labels.names[i] for i in (0, 1, 255, 1203)] == [
        "background",
        "thing 0",
        "thing 254",
        "thing 1202",
    ]
    found = {
        int(s.id(i).split("/")[-1].split()[-1]): s.read(i)[1]
        for s in data.splits.values()
        for i in range(len(s))
    }
    for n, mask in found.items():
        kinds = np.array([0, 1, 1203] if n < 3 else [0, 260, 260])
        expected = kinds[truth(n)]
        if tool == "labelme" or n == 0:
            (void,) = data.labels.void
            expected[40:44, :4] = void
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    "export", ["labelme JSON", "Label Studio JSON", "V7 JSON 2.0", "Supervisely JSON", "YOLO"]
)
@pytest.mark.parametrize("side_by_side", [False, True])
def test_init_parses_every_annotation_once(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: str, side_by_side: bool
) -> None:
    for place in ("data/one", "data/two") if side_by_side else ("data",):
        EXPORTS[export][0](tmp_path / place)
    seen: list[int] = []
    for name in ("labelme", "supervisely", "v7", "label_studio", "yolo"):
        parse = getattr(tool_files, name)
        monkeypatch.setattr(
            tool_files, name, lambda *a, _parse=parse, **k: (seen.append(id(a[0])), _parse(*a, **k))[1]
        )
    read = annotated._json
    paths: list[Path] = []
    monkeypatch.setattr(annotated, "_json", lambda path: (paths.append(path), read(path))[1])
    code, text = say("data", "init", str(tmp_path / "data"), "--yes", "--out", "made.yaml")
    assert code == 0, text
    sets = 2 if side_by_side else 1
    assert len(seen) == sets * (1 if "Studio" in export else COUNT)
    own = [path for path in paths if path.name != "meta.json"]
    assert len(own) == len(set(own)) == sets * {"YOLO": 0, "Label Studio JSON": 1}.get(export, COUNT)


SQUARE = [[0, 0], [5, 0], [5, 5]]
FOREIGN: dict[str, Any] = {
    "labelme: a number beyond floats": {"imagePath": "a", "shapes": [{"label": "a", "points": [[10**400, 0]] * 3}]},
    "supervisely: tags that are a number": {"size": {}, "objects": [], "tags": 3},
    "supervisely: holes that are a number": {"size": {"height": 9, "width": 9}, "objects": [
        {"classTitle": "a", "geometryType": "polygon", "points": {"exterior": SQUARE, "interior": 5}}]},
    "v7: slots in a list": {"item": {"name": "a", "slots": [{"slot_name": "0"}]}, "annotations": [
        {"name": "a", "slot_names": [["0"]]}]},
    "v7: an ellipse without centre": {"item": {"name": "a", "slots": [{"width": 9, "height": 9}]}, "annotations": [
        {"name": "a", "ellipse": {}}]},
    "v7: a box of texts": {"item": {"name": "a", "slots": [{"width": 9, "height": 9}]}, "annotations": [
        {"name": "a", "bounding_box": {"x": "0", "y": 0, "w": 1, "h": 1}}]},
    "label-studio: labels that are a number": [{"data": {"image": "a.png"}, "annotations": [{"result": [
        {"original_width": 9, "original_height": 9, "value": {"points": SQUARE, "polygonlabels": 7}}]}]}],
    "labelme: a picture of 10^18 pixels": {"imagePath": "a", "imageHeight": 10**9, "imageWidth": 10**9, "shapes": []},
    "supervisely: a picture of 10^18 pixels": {"size": {"height": 10**9, "width": 10**9}, "objects": []},
    "v7: a picture of 10^18 pixels": {"item": {"name": "a", "slots": [{"width": 10**9, "height": 10**9}]},
                                      "annotations": []},
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_of_another_form_than_its_tool_writes_is_told(case: str, tmp_path: Path) -> None:
    """Found by fuzzing (tests/faults): lists, texts and numbers in each other's places, and sizes that nobody has."""
    write(tmp_path / "a.json", FOREIGN[case])
    tool, _, fact = case.partition(": ")
    with pytest.raises(DataError, match=r"a\.json") as caught:
        load_dataset(DataConfig(dataset="annotated", root=str(tmp_path)))
    must_say(caught.value, "1000000000x1000000000" if "10^18" in fact else "a.json")
    assert "10^18" in fact or "pairs" in str(caught.value) or f"form that {tool} writes" in str(caught.value)


def test_a_release_with_points_that_are_none_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", np.zeros((9, 9, 3), np.uint8))
    for points in ([3, 4, 5], [[10**400, 0]] * 3, [["a", "b"]]):
        entry = {"id": 1, "category_id": 1, "type": "polygon", "points": points}
        label = {"attributes": {"annotations": [entry]}}
        sample = {
            "name": "a.png",
            "attributes": {"image": {"url": "a.png"}},
            "labels": {"ground-truth": label},
        }
        about = {"categories": [{"id": 1, "name": "a"}]}
        write(
            tmp_path / "r.json",
            {"dataset": {"task_type": "vector", "task_attributes": about, "samples": [sample]}, "name": "r"},
        )
        with pytest.raises(DataError, match=r"annotation 1.*pairs of numbers"):
            load_dataset(DataConfig(dataset="segments", root=str(tmp_path)))
