"""A folder with a web page that runs a bundle's ONNX files in the browser, by onnxruntime-web."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everseg.data.writing import flush_folder, unfinished, write_flushed
from everseg.deploy.bundle import new_folder, open_bundle
from everseg.deploy.page_files import template
from everseg.display import Piece, Result, counted, size
from everseg.errors import ConfigError
from everseg.files import real_path
from everseg.inference.onnx_files import files_of
from everseg.runs.commit import read_committed, writing
from everseg.runs.model_folder import FILE as CLASSES
from everseg.runs.model_folder import PRECISIONS

RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""Files of the npm package onnxruntime-web that run models on the processor."""
PREPROCESSING = "preprocessing.json"
_PAGE = ("browser.html", "browser.js", "page.css")


@dataclass(frozen=True, repr=False)
class BrowserPage(Result):
    """A folder that a web server can hand out as it is."""

    path: Path
    bytes: int
    precision: str

    def shown(self) -> Iterator[Piece]:
        yield f"wrote {self.path}: {size(self.bytes)}, model in {self.precision}"
        yield f"look at it: python -m http.server --bind 127.0.0.1 --directory {self.path}, then http://127.0.0.1:8000/"

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "bytes": self.bytes, "precision": self.precision}


def page(
    bundle: str | Path, *, out: str | Path, runtime: str | Path, precision: str = PRECISIONS[0]
) -> BrowserPage:
    """Write a folder with a page that runs a bundle in the browser. It fetches nothing from elsewhere.

    The page gives the masks that the ONNX file gives in Python, for whole images.

    Args:
        out: a new folder.
        runtime: folder of the npm package onnxruntime-web (`npm install onnxruntime-web`); its files are copied.
        precision: which ONNX file of the bundle.

    Raises:
        ConfigError: the bundle has no such file, sees other images than a browser shows, or the package is not there.
        CheckpointError: the bundle is missing or damaged.
    """
    opened, out = open_bundle(bundle), new_folder(out)
    about = opened.about
    files = files_of(opened.path, about, precision)
    problems = []
    if about.form.channels is not None:
        problems.append(
            f"{bundle}: the model sees {counted(len(about.form.channels), 'channel')}, and a browser shows three; use "
            "everseg predict"
        )
    folder = Path(runtime)
    folder = folder / "dist" if (folder / "dist").is_dir() else folder
    if missing := [name for name in RUNTIME if not (folder / name).is_file()]:
        problems.append(
            f"--runtime {runtime}: there is no {', '.join(missing)}; npm install onnxruntime-web, then give "
            "node_modules/onnxruntime-web"
        )
    if problems:
        raise ConfigError(problems)
    committed = read_committed(opened.path)
    contents = {name: template(name) for name in _PAGE}
    contents["index.html"] = contents.pop("browser.html")
    contents |= {name: committed.read(name) for name in (CLASSES, PREPROCESSING, *files.values())}
    contents |= {name: (folder / name).read_bytes() for name in RUNTIME}
    described = {"name": real_path(opened.path).name, "branches": list(files), "files": files}
    contents["page.json"] = json.dumps(described).encode()
    temporary = unfinished(out)
    with writing(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in contents.items():
            write_flushed(temporary / name, data)
        flush_folder(temporary)
        temporary.rename(out)
    return BrowserPage(out, sum(map(len, contents.values())), precision)
