"""The page that runs a bundle in the browser gives Python's masks, to the pixel."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import chromium
import numpy as np
import pytest
from PIL import Image

import everseg
from everseg.deploy.browser import RUNTIME
from everseg.errors import ConfigError
from saying import must_say

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures"
BUNDLE, PICTURE = FIXTURES / "bundle-format-1", FIXTURES / "scenes/images/val/0.png"
PLACES = (os.environ.get("EVERSEG_ONNXRUNTIME_WEB", ""), str(ROOT / "node_modules/onnxruntime-web"))
PACKAGE = next(
    (Path(place) for place in PLACES if place and (Path(place) / "dist" / RUNTIME[0]).is_file()), None
)
PREDICT = """(async () => {
  const { predict } = await import("./browser.js");
  const done = await predict(await (await fetch("NAME")).blob());
  return { width: done.width, height: done.height, mask: [...done.mask] };
})()"""


def test_what_is_missing_is_told(tmp_path: Path, call: Callable) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    code, _, err = call("page", BUNDLE, "-o", tmp_path / "p", "--runtime", tmp_path)
    assert code == 2
    must_say(err, "--runtime", RUNTIME[0], "npm install onnxruntime-web")
    with pytest.raises(ConfigError, match="int8"):
        everseg.page(BUNDLE, out=tmp_path / "p", runtime=tmp_path, precision="int8")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_holds_all_that_the_page_needs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    package = tmp_path / "package"
    (package / "dist").mkdir(parents=True)
    for name in RUNTIME:
        (package / "dist" / name).write_text(name)
    (tmp_path / "p.tmp").mkdir()  # the user's own
    made = everseg.page(BUNDLE, out=tmp_path / "p", runtime=package)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "p.tmp", "package"]
    files = {path.name: path.read_bytes() for path in made.path.iterdir()}
    assert set(files) == {
        "index.html", "browser.js", "page.css", "page.json", "classes.json", "preprocessing.json", "model.onnx",
        *RUNTIME,
    }  # fmt: skip
    assert json.loads(files["page.json"])["files"] == {"default": "model.onnx"}
    for name in ("index.html", "page.css", "browser.js"):
        assert b"<!--" not in files[name], "every part of a page is in its place"
    assert files["index.html"].index(b"Content-Security-Policy") < files["index.html"].index(
        b'href="page.css"'
    )
    assert made.bytes == sum(map(len, files.values()))
    assert b"://" not in files["browser.js"]
    assert b"default-src 'none'" in files["index.html"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The page of the bundle, handed out by a plain web server, with pictures beside it."""
    out = tmp_path_factory.mktemp("page") / "p"
    everseg.page(BUNDLE, out=out, runtime=PACKAGE)
    handler = functools.partial(Quiet, directory=str(out))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield out, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(chromium.BROWSER is None, reason="no Chromium here (apt-get install chromium)")
@pytest.mark.skipif(
    PACKAGE is None,
    reason="no npm package onnxruntime-web here (npm install onnxruntime-web, or EVERSEG_ONNXRUNTIME_WEB=its folder)",
)
def test_pixels_in_chromium_are_python_s(served: tuple[Path, str], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    out, url = served
    session = onnxruntime.InferenceSession(BUNDLE / "model.onnx")
    with Image.open(PICTURE) as picture:
        whole = picture.convert("RGB")
    pictures = {"whole.png": whole, "odd.png": whole.crop((3, 5, 70, 44))}
    with chromium.page(tmp_path / "profile") as browser:
        browser.call("Network.setCacheDisabled", cacheDisabled=True)
        browser.call("Page.navigate", url=url)
        browser.wait("document.body && document.body.dataset.ready", 60)
        for name, image in pictures.items():
            image.save(out / name)
            (expected,) = session.run(["mask"], {"image": np.asarray(image)[None]})
            found = browser.script(PREDICT.replace("NAME", name))
            assert (found["width"], found["height"]) == image.size
            assert np.array_equal(np.array(found["mask"]).reshape(image.height, image.width), expected[0])
        # A model of one size: the page resizes as Pillow does.
        how = json.loads((out / "preprocessing.json").read_text())
        (out / "preprocessing.json").write_text(json.dumps({**how, "size": [61, 90]}))
        browser.call("Page.navigate", url="about:blank")
        browser.call("Page.navigate", url=url)
        browser.wait("document.body && document.body.dataset.ready", 60)
        small = whole.resize((90, 61), Image.Resampling.BILINEAR)
        (expected,) = session.run(["mask"], {"image": np.asarray(small)[None]})
        nearest = Image.fromarray(expected[0]).resize(whole.size, Image.Resampling.NEAREST)
        found = browser.script(PREDICT.replace("NAME", "whole.png"))
        assert np.array_equal(np.array(found["mask"]).reshape(whole.height, whole.width), np.asarray(nearest))
        # What a person does.
        browser.choose_file("#file", PICTURE)
        browser.wait('!document.getElementById("canvas").hidden')
        assert browser.script('document.querySelectorAll("#legend tr").length') >= 2
        # Each class has its colour before its name, large enough to be seen.
        wide = 'Math.min(...[...document.querySelectorAll("#legend th i")].map((one) => one.offsetWidth))'
        assert browser.script(wide) >= 16
        assert browser.script('document.getElementById("error").hidden')
        assert browser.console == []
        assert {urlsplit(one).netloc for one in browser.requests if one.startswith("http")} == {
            urlsplit(url).netloc
        }
