"""The documentation site: it builds without a warning, every link leads somewhere, nothing comes from the network."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import re
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import chromium
import pytest
import typer

import everseg
from everseg import registry
from everseg.cli.main import app
from everseg.config import presets
from everseg.config.fields import RunConfig
from everseg.config.hyperparameters import method_options

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts" / "site"
EXTRA = ("zensical", "mkdocstrings_handlers.python")
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}
STYLES = ("stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "icon", "modulepreload")
"""Values of rel with which <link> loads something."""


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


settings, reference = script("settings"), script("reference")

CUT = """[...document.querySelectorAll("html, .md-content *, .md-sidebar *")].filter(box =>
  (box === document.documentElement || ["auto", "scroll", "hidden"].includes(getComputedStyle(box).overflowX)) &&
  box.clientWidth > 0 && box.scrollWidth > box.clientWidth + 1
).map(box => box.textContent.trim().slice(0, 60))"""
"""What of a page is wider than the room it has, so that one must scroll to read it or cannot."""


class Html(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADS and given.get(LOADS[tag]):
            self.loads.append(given[LOADS[tag]])
        if tag == "link" and set(given.get("rel", "").split()) & set(STYLES):
            self.loads.append(given["href"])


def faults(site: Path) -> list[str]:
    """Links and loads of all pages that lead nowhere, and loads from other hosts."""
    pages = {file: Html(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}
    found = []
    for file, page in pages.items():
        if file.name == "404.html":  # its addresses are those of a server's root
            continue
        where = file.relative_to(site)
        for target in [*page.links, *page.loads]:
            split = urlsplit(target)
            if split.scheme or split.netloc:
                if target in page.loads and split.scheme != "data":
                    found.append(f"{where} loads {target}")
                continue
            place = (file.parent / unquote(split.path)).resolve() if split.path else file
            place = place / "index.html" if place.is_dir() else place
            if not place.is_file():
                found.append(f"{where}: {target} does not exist")
            elif split.fragment and place in pages and unquote(split.fragment) not in pages[place].anchors:
                found.append(f"{where}: {target} has no such anchor")
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ImportError:
            pytest.skip(f"{name} is not installed (pip install 'everseg[docs]')")
    folder = tmp_path_factory.mktemp("site") / "everseg"
    done = script("build").build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr
    return folder / "html"


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    build = script("build")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/thesis.md").write_text("years of work")
    (tmp_path / "zensical.toml").write_text("")
    with pytest.raises(SystemExit, match="holds files"):
        build.clear(tmp_path)
    assert (tmp_path / "pages/thesis.md").read_text() == "years of work"
    build.clear(tmp_path / "site")
    (tmp_path / "site/old.html").write_text("")
    build.clear(tmp_path / "site")
    assert [path.name for path in (tmp_path / "site").iterdir()] == [build.MARK]


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere_and_nothing_comes_from_elsewhere(built: Path) -> None:
    assert len(list(built.rglob("*.html"))) > 30
    assert faults(built) == []
    for style in built.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8").replace('"', "").replace("'", "")


@pytest.mark.slow
@pytest.mark.skipif(chromium.BROWSER is None, reason="no Chromium here (apt-get install chromium)")
def test_nothing_is_cut_at_the_right_edge_of_a_window_of_1280_pixels(built: Path, tmp_path: Path) -> None:
    wide: dict[str, Any] = {}
    with chromium.page(tmp_path) as page:
        page.window(1280, 900)
        # Half of a page's time is the index of the search, which is seen only once somebody searches (the test below).
        page.call("Network.setBlockedURLs", urls=["*/search.js*", "*/search.json*", "*/workers/*"])
        for file in sorted(built.rglob("*.html")):
            page.call("Page.navigate", url=file.as_uri())
            page.wait("document.readyState === 'complete' && document.querySelector('.md-content') !== null")
            wide[str(file.relative_to(built))] = page.script(CUT)
    assert {name: found for name, found in wide.items() if found} == {}


FOUND = """(() => {
  const all = root => [...root.querySelectorAll("*")].flatMap(e => e.shadowRoot ? [e, ...all(e.shadowRoot)] : [e])
  const every = all(document), box = every.find(e => e.tagName === "INPUT" && e.type === "text")
  const links = every.filter(e => e.tagName === "A" && /[?]h=/.test(e.href)).map(e => e.href.split("/html/").pop())
  return box && links.length ? [box.value, ...links] : null
})()"""
"""What the search box holds and where its results lead."""


@pytest.mark.slow
@pytest.mark.skipif(chromium.BROWSER is None, reason="no Chromium here (apt-get install chromium)")
def test_the_search_finds_the_same_from_disk_as_over_http(built: Path, tmp_path: Path) -> None:
    handler = functools.partial(QuietHandler, directory=str(built.parent))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        chromium.page(tmp_path) as page,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.window(1280, 900)
        found: dict[tuple[str, str], Any] = {}
        for base in (built.as_uri(), f"http://127.0.0.1:{server.server_port}/html"):
            for words in ("forgetting", "cuda out of memory"):
                page.call("Page.navigate", url=f"{base}/docs/quickstart.html")
                page.wait(
                    "document.readyState === 'complete' && document.querySelector('.md-search__button') !== null"
                )
                page.script("document.querySelector('.md-search__button').click()")
                page.wait(FOUND.replace("links.length", "true"))
                for key in words:
                    page.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
                    page.call("Input.dispatchKeyEvent", type="keyUp", key=key)
                page.wait(f"({FOUND} ?? [])[0] === {words!r}")
                found[base[:4], words] = [re.sub(r"[?]h=[^#]*", "", link) for link in page.script(FOUND)]
        server.shutdown()
    for words, first in (("forgetting", "docs/glossary.html"), ("cuda out of memory", "docs/how-to.html")):
        assert found["file", words] == found["http", words]
        assert found["file", words][0] == words
        assert first in found["file", words][1]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
def test_every_page_is_in_the_navigation(built: Path) -> None:
    links = {link.removeprefix("./") for link in Html((built / "index.html").read_text()).links}
    pages = {str(file.relative_to(built)) for file in built.rglob("*.html")} - {"404.html", "index.html"}
    assert pages - links == set()


@pytest.mark.slow
def test_the_python_reference_holds_every_public_name(built: Path) -> None:
    anchors = set().union(*(Html(f.read_text()).anchors for f in (built / "reference").glob("python*.html")))
    for name, address in everseg._LAZY.items():
        if ":" in address:
            assert address.replace(":", ".") in anchors, name
    for module in (everseg.losses, everseg.metrics, everseg.scenarios):
        for name in module.__all__:
            hidden = f"{module.__name__}.{name}.{name}"  # where a file of the package has the name too
            assert {f"{module.__name__}.{name}", hidden} & anchors, name
    assert {"everseg.data.base.Dataset", "everseg.methods.base.Method.losses"} <= anchors


def test_the_check_sees_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "b.html").write_text('<h1 id="x">B</h1>')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#x"></a><a href="b.html#y"></a><a href="c.html"></a><a href="https://example.org">'
        '<script src="https://example.org/x.js"></script><link rel="stylesheet" href="//example.org/x.css">'
        '<link rel="canonical" href="https://example.org"><img src="data:image/png;base64,xx">'
    )
    assert faults(tmp_path) == [
        "a.html: b.html#y has no such anchor",
        "a.html: c.html does not exist",
        "a.html loads https://example.org/x.js",
        "a.html loads //example.org/x.css",
    ]


def test_the_reference_of_commands_holds_every_option() -> None:
    text = reference.commands()
    verbs = list(reference.leaves(typer.main.get_command(app), "everseg"))
    assert len(verbs) > 18
    for name, command in verbs:
        part = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert (command.help or "???") in part
        for parameter in command.params:
            shown = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
            assert parameter.name == "help" or f"{shown or parameter.name.upper()}" in part, (
                name,
                parameter.name,
            )


def test_the_reference_of_settings_holds_every_key() -> None:
    text = settings.settings()
    for section, field in RunConfig.model_fields.items():
        if section in settings.SECTIONS:
            for key in field.annotation.model_fields:
                assert f"| `{section}.{key}` |" in text
    for method in registry.BUILTIN["method"]:
        for key in method_options(method):
            assert f"| `method.{key}` |" in text
    for row in (
        "| `train.momentum` | number >= 0, < 1 | `0.9` | Momentum of SGD. |",
        "| `data.crop` | whole number >= 8, <= 65536 | `512` | Side of the square training crop, in pixels. |",
        "| `model.output_stride` | `8`, `16` or null | `null` |",
        "| `train.lr_factors.new_heads` | number > 0 or null | `null` | Classifiers that the step adds;",
        "| `data.size` | [whole number >= 8, <= 65536, whole number >= 8, <= 65536] | `[512, 1024]` |",
    ):
        assert row in text


def test_the_reference_of_presets_rebuilds_each() -> None:
    """What is common to a family and what a preset sets beside are together the preset."""
    text = "\n".join(settings.preset_pages().values())
    for name in presets.names():
        (family,) = [part for part in re.split("\n##? ", text) if f"| `{name}` |" in part]
        common = dict(
            line.strip("| ").split(" | ") for line in family.split("| preset |")[0].splitlines()[4:] if line
        )
        own = next(line for line in family.splitlines() if line.startswith(f"| `{name}` |"))
        for key, value in settings.flat(presets.load_preset(name)):
            shown = settings.code(value)
            assert key == "name" or common.get(f"`{key}`") == shown or f"`{key}={shown.strip('`')}`" in own, (
                name,
                key,
            )
