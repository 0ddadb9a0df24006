"""Fuzz every reader of everseg: honest files are spoilt at random, and each reader must read or refuse them.

`python -m tests.faults --fuzz MINUTES`. A reader may end with an error for people (`EversegError`, or the reason that
`everseg.files` gives its callers), never with another exception, a crash, more than a few seconds or much memory. What
breaks this is kept in `seeds/`, as READER-DIGEST.bin, and read again by every run of the tests.

Nothing measures which lines an input reaches. Instead an input is kept for further spoiling if it makes its reader say
something that it has not said before.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hostile_documents import WRONG, changed, places, without
from peak import new_peak, peak

KEPT = Path(__file__).with_name("seeds")
FIXTURES = Path(__file__).parents[1] / "fixtures"
MOST_SECONDS = 5.0
"""Of the processor, for one input."""
MOST_WAITING = 60.0
"""Seconds on the clock; the machine may have other work."""
MOST_MEMORY = 700 << 20
"""Bytes of new memory that one input may take."""
STRETCH = {"command line": 30.0}
"""Seconds of the processor for which a reader is fuzzed at a time, where it is not 8."""
POOL = 300
"""Inputs of a reader that are spoilt further."""


class Reader(NamedTuple):
    """A reader of everseg, and honest inputs for it."""

    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], object]
    """Gets a folder of its own, and the input."""
    words: tuple[bytes, ...] = ()
    """What its inputs are made of, to be put in anywhere."""


READERS: dict[str, Reader] = {}


class Slow(BaseException):
    """An input takes too long. No reader catches it by `except Exception`."""


def reader(
    name: str, seeds: Callable[[Path], list[bytes]], words: tuple[bytes, ...] = ()
) -> Callable[[Callable[[Path, bytes], object]], Callable[[Path, bytes], object]]:
    def register(read: Callable[[Path, bytes], object]) -> Callable[[Path, bytes], object]:
        READERS[name] = Reader(seeds, read, words)
        return read

    return register


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def each_of(*reads: Callable[[], object]) -> None:
    """Read in each of these ways. Where all of them refuse, the first refusal is raised."""
    refused = []
    for read in reads:
        try:
            read()
        except _errors() as error:
            refused.append(error)
    if len(refused) == len(reads):
        raise refused[0]


# ---------------------------------------------------------------- pictures


def pictures(_: Path) -> list[bytes]:
    """The same few pixels in every format and kind."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    made: list[tuple[Any, str, dict[str, Any]]] = [
        (colours, form, {}) for form in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
    ]
    made += [
        (colours[..., 0], "PNG", {}), (colours[..., 0] > 99, "PNG", {}), (colours[..., 0].astype(np.uint16), "PNG", {}),
        (colours[..., 0].astype(np.int32), "TIFF", {}), (colours[..., 0].astype(np.float32), "TIFF", {}),
        (np.dstack([colours, colours[..., :1]]), "PNG", {}), (colours, "TIFF", {"compression": "tiff_lzw"}),
        (colours, "TIFF", {"compression": "tiff_deflate"}), (colours, "JPEG", {"progressive": True}),
    ]  # fmt: skip
    found = []
    for pixels, form, options in made:
        buffer = io.BytesIO()
        with contextlib.suppress(OSError, KeyError):  # a Pillow without this format
            Image.fromarray(pixels).save(buffer, form, **options)
            found.append(buffer.getvalue())
    buffer = io.BytesIO()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(colours).save(buffer, "JPEG", exif=turned)
    palette = Image.fromarray(colours[..., 0] % 4).convert("P")
    palette.putpalette(list(range(256)) * 3)
    other = io.BytesIO()
    palette.save(other, "PNG", transparency=3)
    return [*found, buffer.getvalue(), other.getvalue()]


PICTURE_WORDS = (b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"eXIf", b"\xff\xd8\xff", b"\xff\xe1", b"II*\0", b"MM\0*", b"RIFF",
                 b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"P6 ", b"999999999")  # fmt: skip


@reader("image", pictures, PICTURE_WORDS)
def _image(folder: Path, data: bytes) -> None:
    from everseg.data.datasets.decode import Reading, check_readable, read_image

    path = put(folder, "x.png", data)
    with contextlib.suppress(_errors()):
        check_readable(path, Reading())
    read_image(path)


@reader("mask", pictures, PICTURE_WORDS)
def _mask(folder: Path, data: bytes) -> None:
    from everseg.data.datasets.files import FileSplit

    put(folder, "x.png", data)
    FileSplit("train", folder, [("a", "x.png", "x.png")]).read_mask(0)


# ---------------------------------------------------------------- lists and descriptions


def _lists(_: Path) -> list[bytes]:
    return [
        b"a\nb/c.png b/c_mask.png\n# more\n", b"\xef\xbb\xbfimage,mask,split\r\na.png,b.png,train\r\n",
        b'"a b.png" "c d.png"\nx\ty\n', b"name;label\na;b\n", b"0\n1\n2\n", b"/x/a.png /y/b.png", b"a.png, b.png",
    ]  # fmt: skip


@reader(
    "list", _lists, (b'"', b"\t", b",", b";", b"\r", b"../", b"file://", b"\0", b"image", b"split", b"\xff")
)
def _list(folder: Path, data: bytes) -> None:
    from everseg.data.datasets.listing import csv_splits, read_list

    text, table = (put(folder, name, data) for name in ("l.txt", "l.csv"))
    each_of(
        lambda: list(read_list(text, "train")), lambda: list(read_list(table, "train")),
        lambda: csv_splits(text), lambda: csv_splits(table),
    )  # fmt: skip


def _step_lists(_: Path) -> list[bytes]:
    import numpy as np

    made = []
    for array in (np.arange(3), np.arange(4.0), np.zeros((2, 2), bool), np.array(["a", "b"])):
        buffer = io.BytesIO()
        np.save(buffer, array)
        made.append(buffer.getvalue())
    return [*made, b"id-0\nid-1\n", b"0\n1\n"]


@reader(
    "lists of a step", _step_lists, (b"'descr'", b"'|O'", b"'<i8'", b"(", b"99999999999", b"-1", b"\x93NUMPY")
)
def _step_list(folder: Path, data: bytes) -> None:
    from everseg.scenarios.lists import read_lists

    ids = [f"id-{n}" for n in range(5)]
    for name in ("train-0.npy", "train-0.txt"):
        put(folder, f"{name}.d/{name}", data)
        with contextlib.suppress(_errors()):
            read_lists(folder / f"{name}.d", 1, ids)


@reader("label map", lambda _: [b"# label:colour\nroad:1,2,3::\ncar:0,0,0:a:b\n", b"ignore:255,255,255::\nx:9,9,9::"],
        (b":", b",", b"256", b"-1", b"\xd9\xa3", b"\n"))  # fmt: skip
def _label_map(folder: Path, data: bytes) -> None:
    from everseg.data.datasets.descriptor import palette_of, read_labelmap

    palette_of(read_labelmap(put(folder, "labelmap.txt", data)))


def _descriptions(_: Path) -> list[bytes]:
    return [text.encode() for text in (
        "classes: [background, road, tree]\nignore: 9\n",
        "classes: [background, road]\nimages: images\nmasks: masks\nsplits: {train: train.txt, val: 0.3}\nseed: 3\n",
        "classes: [a, b]\nlabels: {map: {-1: ignore, 0: a, 7: b}}\non_missing: skip\nfollow_links: true\n",
        "classes: [a, b]\nlabels: {palette: {a: [0, 0, 0], b: [255, 0, 0]}}\nbackground: null\nbit_depth: 16\n",
        "layout: voc\nroot: .\n", "layout: coco\nroot: .\noptions: {a: 1}\n",
        "classes: [a, b]\nchannels: [red, green, nir]\nmax_pixels: 1000\n",
    )]  # fmt: skip


YAML_WORDS = (b": ", b"\n  ", b"- ", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"!!python/object:os.system ", b"|", b">",
              b"---\n", b"\t", b"null", b".nan", b"1e999", b"0x", b"'", b'"', b"<<: ", b"? ", b"%YAML 1.1\n", b"train",
              b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"base: x", b"layout: evil", b"images", b"../..", b"-1")  # fmt: skip


def _tree(folder: Path) -> None:
    if (folder / "images").is_dir():
        return
    import trees

    trees.folder(folder)


@reader("data.yaml", _descriptions, YAML_WORDS)
def _description(folder: Path, data: bytes) -> None:
    from everseg.config.fields import DataConfig
    from everseg.data.datasets import load_dataset

    _tree(folder)
    load_dataset(DataConfig(dataset=str(put(folder, "data.yaml", data))))


def _configurations(_: Path) -> list[bytes]:
    from everseg.config import presets

    folder = Path(presets.__file__).parent
    made = [path.read_bytes()[:6000] for path in sorted(folder.glob("*.yaml"))]
    stored = json.loads((FIXTURES / "run-format-1/run.json").read_text())["config"]
    return [*made, json.dumps(stored).encode(), b"preset: demo-mib\nname: x\ntrain: {lr: 0.1}\n",
            b"data: {dataset: demo, crop: 32}\nmethod: {name: mib, kd_weight: 3}\ntask: 2-1\n"]  # fmt: skip


@reader(
    "configuration",
    _configurations,
    (*YAML_WORDS, b"preset: ", b"task: ", b"method: ", b"model: ", b"scenario: "),
)
def _configuration(folder: Path, data: bytes) -> None:
    from everseg.config.loading import from_stored, load
    from everseg.config.yaml import read

    path = put(folder, "run.yaml", data)
    with contextlib.suppress(_errors()):
        load(path, import_own=False)
    with contextlib.suppress(ValueError):
        overrides = [word for word in data[:300].decode().split("\n") if "=" in word]
        with contextlib.suppress(_errors()):
            load(None, overrides, import_own=False)
    from_stored(read(path).value)


# ---------------------------------------------------------------- annotations


def _annotations(_: Path) -> list[bytes]:
    square = [[0, 0], [5, 0], [5, 5]]
    coco = {
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b", "supercategory": "a"}],
        "images": [{"id": 1, "file_name": "a.png", "width": 16, "height": 12}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 5, 0, 5, 5]], "bbox": [0, 0, 5, 5]},
            {"id": 2, "image_id": 1, "category_id": 2, "segmentation": {"size": [12, 16], "counts": [5, 9, 178]}},
            {"id": 3, "image_id": 1, "category_id": 2, "segmentation": {"size": [12, 16], "counts": "52203"}},
        ],
    }  # fmt: skip
    polygons = {
        "imgHeight": 12,
        "imgWidth": 16,
        "objects": [{"label": "road", "polygon": square, "deleted": 0}],
    }
    labelme = {"imagePath": "a.png", "imageHeight": 12, "imageWidth": 16, "shapes": [
        {"label": "a", "points": square, "shape_type": "polygon"},
        {"label": "b", "points": [[1, 1], [3, 3]], "shape_type": "circle"}]}  # fmt: skip
    supervisely = {"size": {"height": 12, "width": 16}, "objects": [
        {"classTitle": "a", "geometryType": "polygon", "points": {"exterior": square, "interior": []}},
        {"classTitle": "b", "geometryType": "bitmap", "bitmap": {"origin": [1, 1],
            "data": "eJwDAAAAAAE="}}]}  # fmt: skip
    darwin = {"version": "2.0", "item": {"name": "a.png", "slots": [{"width": 16, "height": 12}]}, "annotations": [
        {"name": "a", "polygon": {"paths": [[{"x": 0, "y": 0}, {"x": 5, "y": 0}, {"x": 5, "y": 5}]]}},
        {"name": "b", "raster_layer": {"dense_rle": [0, 100, 1, 92],
            "mask_annotation_ids_mapping": {"u": 1}}}]}  # fmt: skip
    studio = [{"data": {"image": "/data/upload/1/0123abcd-a.png"}, "annotations": [{"result": [
        {"type": "polygonlabels", "original_width": 16, "original_height": 12,
         "value": {"points": [[0, 0], [50, 0], [50, 50]], "polygonlabels": ["a"]}},
        {"type": "brushlabels", "original_width": 16, "original_height": 12,
         "value": {"format": "rle", "rle": [0, 0, 3, 0, 1, 2, 3], "brushlabels": ["b"]}}]}]}]  # fmt: skip
    segments = {"name": "r", "dataset": {
        "task_type": "segmentation-bitmap", "task_attributes": {"categories": [{"id": 1, "name": "a"}]},
        "samples": [{"name": "a.png", "attributes": {"image": {"url": "https://x.org/a.png"}}, "labels": {
            "ground-truth": {"attributes": {"segmentation_bitmap": {"url": "https://x.org/b.png"}, "annotations": [
                {"id": 1, "category_id": 1, "type": "polygon", "points": square}]}}}}]}}  # fmt: skip
    vectors = {**segments, "dataset": {**segments["dataset"], "task_type": "vector"}}
    made = (coco, polygons, labelme, supervisely, darwin, studio, segments, vectors)
    return [json.dumps(one).encode() for one in made] + [b"0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.5 0.5 0.2 0.2\n"]


JSON_WORDS = (b"null", b"1e999", b"NaN", b"Infinity", b"-1", b"{}", b"[]", b'""', b"9" * 400, b"[" * 3000,
    b"\xed\xa0\x80",
              b'"\\ud800"', b"true", b",", b":", b'"id": 1,')  # fmt: skip


@reader("annotations", _annotations, JSON_WORDS)
def _annotation(folder: Path, data: bytes) -> None:
    from everseg.config.fields import DataConfig
    from everseg.data import polygons
    from everseg.data.datasets import load_dataset
    from everseg.data.datasets.tool_files import yolo

    tree = folder / "tree"
    if not tree.is_dir():
        import trees

        trees.save(tree / "a.png", trees.image_of(1))
    put(tree, "a.json", data)
    with contextlib.suppress(_errors()):
        polygons.draw(polygons.parse(data), {"road": 1}, background=0)
    for name in ("coco", "annotated", "segments"):
        with contextlib.suppress(_errors()):
            split = next(iter(load_dataset(DataConfig(dataset=name, root=str(tree))).splits.values()))
            for index in range(min(len(split), 3)):
                split.read(index)
    with contextlib.suppress(UnicodeDecodeError, *_errors()):
        yolo(data.decode(), {0: "a", 1: "b"}, 12, 16)


# ---------------------------------------------------------------- run folders, bundles, weights


def _documents(_: Path) -> list[bytes]:
    run = FIXTURES / "run-format-1"
    return [(run / name).read_bytes() for name in RUN_FILES]


RUN_FILES = ("run.json", "scenario.json", "steps/01/metrics.json")


@reader("run documents", _documents, JSON_WORDS)
def _document(folder: Path, data: bytes) -> None:
    """The input stands for each document in turn, as it is and with a checksum that fits."""
    from everseg.runs.commit import write_document
    from everseg.runs.results import Results
    from everseg.runs.run_folder import RunFolder

    run = folder / "run"
    if not run.is_dir():
        shutil.copytree(FIXTURES / "run-format-1", run)
    for name in RUN_FILES:
        honest = (FIXTURES / "run-format-1" / name).read_bytes()
        put(run, name, data)
        for again in (False, True):
            if again:
                try:
                    write_document(run / name, json.loads(data))
                except (ValueError, TypeError, RecursionError):
                    break
            with contextlib.suppress(_errors()):
                RunFolder(run).config()
            with contextlib.suppress(_errors()):
                results = Results(RunFolder(run))
                for track in results.tracks:
                    repr(track.scores)
        put(run, name, honest)


def _journals(_: Path) -> list[bytes]:
    from everseg.runs.journal import Journal

    with tempfile.TemporaryDirectory() as place:
        journal = Journal(Path(place) / "journal.jsonl")
        for number in range(3):
            journal.add("iteration", step=0, iteration=number, loss=1.5, lr=0.1)
        journal.add("bad_sample", step=0, dataset="d", sample="s", reason="r")
        sealed = (Path(place) / "journal.jsonl").read_bytes()
    return [sealed, (FIXTURES / "run-format-1/journal.jsonl").read_bytes()[:3000]]


@reader("journal", _journals, (*JSON_WORDS, b"\n", b'"event"', b'"n"', b'"check"'))
def _journal(folder: Path, data: bytes) -> None:
    from everseg.runs.journal import Journal, replaced_samples

    journal = Journal(put(folder, "journal.jsonl", data))
    replaced_samples(journal.lines("bad_sample"))
    journal.rewind(0, 1)
    journal.add("note", step=0)


def _archives_of_arrays(_: Path) -> list[bytes]:
    run = FIXTURES / "run-format-1/steps/01"
    return [(run / name).read_bytes() for name in ("confusion.npz", "images.npz")]


@reader(
    "npz",
    _archives_of_arrays,
    (b"PK\x03\x04", b"PK\x01\x02", b"\xff\xff\xff\xff", b"'|O'", b"\x93NUMPY", b".npy"),
)
def _arrays(_: Path, data: bytes) -> None:
    from everseg.files import arrays_of

    arrays_of(data)


def _safetensors(_: Path) -> list[bytes]:
    import torch
    from safetensors.torch import save

    return [
        save({"a": torch.ones(2, 3), "b": torch.zeros(1, dtype=torch.int64)}), save({}),
        save({"x" * 40: torch.ones(1, dtype=torch.bfloat16), "e": torch.ones(0)}, {"format": "pt"}),
        save({"d.features": torch.ones(2, 3, dtype=torch.half), "d.ids": torch.ones(2, dtype=torch.int32)}),
    ]  # fmt: skip


@reader("safetensors", _safetensors, (b'"dtype"', b'"F32"', b'"F4"', b"[0,9]", b"-1", b"99999999999999999999",
    b"__metadata__",
        b"\xff\xff\xff\xff\xff\xff\xff\xff", b"{", b"}", b'"shape"'))  # fmt: skip
def _weights(folder: Path, data: bytes) -> None:
    from everseg.models.tensor_file import read_tensors
    from everseg.runs.commit import Committed, load_tensors
    from everseg.runs.model_folder import SKETCH, changed_parameters
    from everseg.runs.sketch import read_sketch

    path = put(folder, "w.safetensors", data)
    put(folder, SKETCH, data)
    listed = {SKETCH: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    each_of(
        lambda: load_tensors(path), lambda: load_tensors(path, data), lambda: read_tensors(path),
        lambda: changed_parameters(path, path), lambda: read_sketch(folder, Committed(folder, listed, None, "")),
    )  # fmt: skip


def _foreign(_: Path) -> list[bytes]:
    import torch

    made = []
    state = {"a": torch.ones(2, 3), "n": {"b": torch.zeros(2, dtype=torch.int64), "e": [1, 2.5, "x", None]}}
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
        made.append(buffer.getvalue())
    return made


@reader("pth", _foreign, (b"PK\x01\x02", b"cos\nsystem\n", b"R", b"b", b"\x81", b"\x93", b"(", b"t", b"}",
    b"q\x01h\x01",
        b"Q", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"ctorch._utils\n_rebuild_tensor_v2\n", b"."))  # fmt: skip
def _pth(folder: Path, data: bytes) -> None:
    from everseg.models.tensor_file import read_tensors

    read_tensors(put(folder, "w.pth", data))


BUNDLE_FILES = ("classes.json", "lineage.json", "preprocessing.json")


def _bundle_documents(_: Path) -> list[bytes]:
    return [(FIXTURES / "bundle-format-1" / name).read_bytes() for name in (*BUNDLE_FILES, "MANIFEST.json")]


@reader("bundle documents", _bundle_documents, JSON_WORDS)
def _bundle(folder: Path, data: bytes) -> None:
    """The input stands for each document in turn, with a manifest that fits; and for the manifest."""
    from everseg.deploy.bundle import open_bundle
    from everseg.runs.commit import MANIFEST, _json, _self_hash
    from everseg.runs.model_folder import load_model

    bundle = folder / "bundle"
    if not bundle.is_dir():
        shutil.copytree(FIXTURES / "bundle-format-1", bundle)
    honest = (FIXTURES / "bundle-format-1" / MANIFEST).read_bytes()
    for name in (*BUNDLE_FILES, MANIFEST):
        put(bundle, name, data)
        if name != MANIFEST:
            body = json.loads(honest)
            del body["self"]
            body["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            put(bundle, MANIFEST, _json({**body, "self": _self_hash(body)}))
        with contextlib.suppress(_errors()):
            load_model(bundle)
        with contextlib.suppress(_errors()):
            open_bundle(bundle)
        put(bundle, MANIFEST, honest)
        put(bundle, name, (FIXTURES / "bundle-format-1" / name).read_bytes())


def _packed(_: Path) -> list[bytes]:
    import tarfile
    import zipfile

    made = []
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as bundle:  # type: ignore[call-overload]
            for name in ("a/b.txt", "a/c.txt"):
                info = tarfile.TarInfo(name)
                info.size = 5
                bundle.addfile(info, io.BytesIO(b"hello"))
        made.append(buffer.getvalue())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/b.txt", b"hello" * 40)
        packed.writestr("c.txt", b"x")
    return [*made, buffer.getvalue()]


@reader(
    "archive",
    _packed,
    (b"../", b"/etc/", b"\0", b"ustar", b"PK\x03\x04", b"PK\x01\x02", b"\xff\xff\xff\xff", b"7777777"),
)
def _archive(folder: Path, data: bytes) -> None:
    from everseg.data.get.unpack import extract

    shutil.rmtree(folder / "deep", ignore_errors=True)
    try:
        extract(put(folder, "archive", data), folder / "deep" / "out")
    finally:
        assert {path.name for path in folder.iterdir()} <= {"archive", "deep"}, (
            "something was unpacked elsewhere"
        )


# ---------------------------------------------------------------- the command line

VERBS = (
    "run", "eval", "predict", "features", "list", "show", "report", "env", "compare", "docs", "export", "extend",
    "history",
    "rollback", "diff", "adopt", "data check", "data prepare", "data weights", "data init", "import mib", "import mdil",
)  # fmt: skip
"""All but those that fetch something, start other processes, or go on until somebody ends them."""
WORDS = (
    "run.yaml", "data/data.yaml", "runs/x", "bundle", "data", "nowhere", "camvid", "voc-15-5-mib", "demo-mib",
    "methods",
    "0", "-1", "1e400", "", "=", "a=", "=b", "train.epochs=0", "train={", "task=[[1],[1]]", "method=ft", "method=x",
    "data=voc",
    "data.root=data", "scenario=.py:x", "model=:", "seed=99999999999999999999", "\0", "\udcff", "é",
    "data/images/val", "name=a/b",
    "train.lr=nan", "x.pth", "~", ".", "base=run.yaml", "--help", "--", "transformers:bundle", "wor\x1b[31m", "train",
)  # fmt: skip


def _vectors(_: Path) -> list[bytes]:
    return [f"{verb}\n{word}".encode("utf-8", "surrogateescape") for verb in VERBS for word in WORDS[:5]]


def _options() -> tuple[bytes, ...]:
    import typer

    from everseg.cli.main import app

    def names(command: Any) -> Iterator[str]:
        for inner in getattr(command, "commands", {}).values():
            yield from names(inner)
        for one in command.params:
            yield from (name for name in one.opts if name.startswith("-"))

    return tuple(sorted({name.encode() for name in names(typer.main.get_command(app))} - {b"--debug"}))


@reader("command line", _vectors)
def _command(folder: Path, data: bytes) -> None:
    """Words from the parser's own tables and others; nothing trains, and nothing outside of the folder is named."""
    import torch.onnx

    from everseg import api
    from everseg.cli import main as cli
    from everseg.errors import DataError

    words = data.decode("utf-8", "surrogateescape").split("\n")
    verb = next((verb for verb in VERBS if data.startswith(verb.encode())), "run")
    words = [*verb.split(), *words[1:12]]
    if any(".." in word or "=/" in word or word.startswith(("/", "~/", "--debug")) for word in words):
        return
    _tree(folder / "data")
    if not (folder / "run.yaml").exists():
        from miniature import SETTINGS

        put(folder, "run.yaml", json.dumps(SETTINGS).encode())
        shutil.copytree(FIXTURES / "bundle-format-1", folder / "bundle")
        shutil.copytree(FIXTURES / "run-format-1", folder / "runs/x")

    def stop(*_: Any, **__: Any) -> Any:
        raise DataError("training is not part of this")

    before, api.execute = api.execute, stop  # type: ignore[attr-defined]
    exporter, torch.onnx.export = torch.onnx.export, stop  # which takes seconds
    here, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
        assert code in (0, 2, 3, 4, 6), f"{words}: exit code {code}: {err.getvalue()[-1500:]}"
    finally:
        os.chdir(here)
        api.execute, torch.onnx.export = before, exporter  # type: ignore[attr-defined]
    for bad in ("Traceback", "fault of everseg"):
        assert bad not in err.getvalue(), f"{words}: {err.getvalue()[-1500:]}"
    if code:
        raise DataError(re.sub(r"'[^']*'", "", err.getvalue())[:60])  # to tell new answers from known ones


# ---------------------------------------------------------------- spoiling


def spoilt(data: bytes, others: list[bytes], words: tuple[bytes, ...], draw: random.Random) -> bytes:
    """The input with some changes: of the document where it is one, else of its bytes."""
    if data[:1] in (b"{", b"[") and draw.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError):
            return _spoilt_document(json.loads(data), draw)
    whole = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        at, kind = draw.randrange(len(whole) + 1), draw.randrange(9)
        if kind == 0 and whole:
            whole[at % len(whole)] ^= 1 << draw.randrange(8)
        elif kind == 1 and whole:
            whole[at % len(whole)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            del whole[at:]
        elif kind == 3:
            del whole[at : at + draw.choice((1, 2, 4, 16, 200))]
        elif kind == 4 and words:
            whole[at:at] = draw.choice(words)
        elif kind == 5 and words:
            word = draw.choice(words)
            whole[at : at + len(word)] = word
        elif kind == 6:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            whole[at:at] = other[start : start + draw.choice((4, 40, 400))]
        elif kind == 7:
            piece = whole[at : at + draw.choice((1, 8, 64))]
            whole[at:at] = piece * draw.choice((1, 3, 50))
        elif kind == 8:
            whole[at : at + 4] = draw.choice((0, 1, 2**31 - 1, 2**32 - 1, draw.getrandbits(32))).to_bytes(
                4, draw.choice(("little", "big"))
            )
    return bytes(whole[:300_000])


def _spoilt_document(document: Any, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = list(places(document))
        if not at:
            break
        path = draw.choice(at)
        kind = draw.randrange(4)
        if kind == 0:
            document = without(document, path)
        elif kind == 1:  # what stands elsewhere in it
            value = document
            for key in draw.choice(at):
                value = value[key]
            document = changed(document, path, copy.deepcopy(value))
        else:
            document = changed(document, path, draw.choice(WRONG))
    return json.dumps(document).encode()


# ---------------------------------------------------------------- one input


def _errors() -> tuple[type[Exception], ...]:
    """What a reader may raise for people."""
    from everseg.errors import EversegError
    from everseg.files import UnreadableError

    return EversegError, UnreadableError


def said_by(name: str, folder: Path, data: bytes) -> tuple[str, str]:
    """What a reader says of an input, in a form that tells new answers from known ones; and the fault, or ""."""

    def late(*_: Any) -> None:
        raise Slow

    # Not since the process began: then the hungriest input so far would hide all others.
    before = new_peak(trim=False)
    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, MOST_WAITING)
    said, fault = "read", ""
    try:
        READERS[name].read(folder, data)
    except _errors() as error:
        said = re.sub(r"[\d'\"/\\]+", "", str(error))[:80]
    except Slow:
        fault = f"more than {MOST_SECONDS} s of the processor, or {MOST_WAITING} s: " + traceback.format_exc(
            limit=-4
        )
    except BaseException:
        fault = traceback.format_exc(limit=-8)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = peak() - before
    if not fault and grown > MOST_MEMORY:
        fault = f"it took {grown >> 20} MB"
    return said, fault


def kept(name: str, data: bytes) -> Path:
    return KEPT / f"{name.replace(' ', '_')}-{hashlib.sha256(data).hexdigest()[:10]}.bin"


# ---------------------------------------------------------------- the loop


def fuzz(minutes: float, *, only: str | None = None, seed: int | None = None, keep: bool = True) -> int:
    """Spoil inputs of every reader in turn; 1 if one of them failed.

    Each reader works in a process of its own for some seconds at a time, so that a crash is found like an exception.
    """
    names = [only] if only else list(READERS)
    seed = int(time.time()) if seed is None else seed
    end, counts, faults, turn = time.monotonic() + 60 * minutes, Counter[str](), 0, 0
    print(f"fuzzing {len(names)} readers for {minutes:g} minutes, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="everseg-fuzz-") as place:
        while time.monotonic() < end:
            for name in names:
                left = end - time.monotonic()
                if left <= 0:
                    break
                turn += 1
                done, found = _stretch(
                    name, Path(place).resolve(), seed + turn, min(left, STRETCH.get(name, 8.0))
                )
                counts[name] += done
                for data, fault in found:
                    faults += 1
                    path = kept(name, data)
                    if keep:
                        path.write_bytes(data)
                    print(f"FAULT {path.name} of {name} (seed {seed + turn}):\n{fault}", flush=True)
    for name in names:
        print(f"  {counts[name]:8,} {name}")
    used = os.times()
    worked = (used.children_user + used.children_system) / 60
    print(
        f"{sum(counts.values()):,} inputs, {faults} faults, {minutes:g} minutes, {worked:.1f} of the processor",
        flush=True,
    )
    return int(faults > 0)


def _stretch(name: str, place: Path, seed: int, seconds: float) -> tuple[int, list[tuple[bytes, str]]]:
    """One reader for some seconds in a forked process: how many inputs, and those that failed."""
    report, current = place / "report", place / "current"
    for path in (report, current):
        path.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            warnings.simplefilter("ignore")
            noise = os.open(place / "noise", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(noise, 2)  # libtiff speaks of every damage
            os.fsync = lambda _: None  # type: ignore[assignment]
            _loop(name, place / name.replace(" ", "_"), random.Random(seed), seconds, report, current)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found: list[tuple[bytes, str]] = []
    done = 0
    if report.exists():
        for line in report.read_text().splitlines():
            entry = json.loads(line)
            done = entry["done"]
            if entry["fault"]:
                found.append((bytes.fromhex(entry["data"]), entry["fault"]))
    if status:
        said = (place / "noise").read_text(errors="replace")[-2000:]
        found.append(
            (current.read_bytes() if current.exists() else b"", f"the process ended with {status}\n{said}")
        )
    return done, found


def _loop(name: str, folder: Path, draw: random.Random, seconds: float, report: Path, current: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = READERS[name].words or _options() + tuple(
        word.encode("utf-8", "surrogateescape") for word in WORDS
    )
    if name == "command line":
        words = tuple(b"\n" + word for word in words)
    seeds = READERS[name].seeds(folder)
    pool, known, told = list(seeds), set[str](), set[str]()
    done = 0
    with report.open("w") as out:
        for data in seeds[
            :: max(1, len(seeds) // 20)
        ]:  # modules that are imported late are no fault of an input
            with contextlib.suppress(_errors()):
                READERS[name].read(folder, data)
        # Of the processor, and from here on: a busy machine would spend the whole stretch on what comes before.
        # With that of other processes: some readers read in one. And never five times as long on the clock.
        end, late = sum(os.times()[:4]) + seconds, time.monotonic() + 5 * seconds
        while sum(os.times()[:4]) < end and time.monotonic() < late:
            data = spoilt(draw.choice(pool if draw.random() < 0.7 else seeds), pool, words, draw)
            current.write_bytes(data)
            said, fault = said_by(name, folder, data)
            done += 1
            place = "".join(re.findall(r'File "[^"]*", line \d+', fault)[-1:])
            if fault and place not in told:
                told.add(place)  # the same place once
                out.write(json.dumps({"done": done, "fault": fault, "data": data.hex()}) + "\n")
                out.flush()
            if said not in known and len(data) < 100_000:
                known.add(said)
                pool.append(data)
                if len(pool) > POOL + len(seeds):
                    del pool[len(seeds)]
        out.write(json.dumps({"done": done, "fault": ""}) + "\n")
