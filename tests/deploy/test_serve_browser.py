"""The local page in headless Chromium: drop a picture, see classes, move the opacity, switch between two bundles."""

from __future__ import annotations

import base64
import csv
import io
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import chromium
import numpy as np
import pytest
from PIL import Image, ImageOps
from untrained import make_bundle, picture

import everseg
from everseg.deploy import serve
from everseg.deploy.bundle import open_bundle
from everseg.deploy.http_server import RefusedError
from everseg.deploy.serve import Server
from everseg.display import share
from saying import must_say

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.BROWSER is None, reason="no Chromium here (apt-get install chromium)"),
]
PIXELS = """(() => {{ const shown = document.getElementById("canvas{0}"), {{width, height}} = shown;
  const context = Object.assign(document.createElement("canvas"), {{width, height}}).getContext("2d");
  context.drawImage(shown, 0, 0);
  return {{width, height, data: [...context.getImageData(0, 0, width, height).data]}};
}})()"""
LEGEND = """[...document.querySelectorAll("#legend tr")].map(row =>
  [...row.cells].map(cell => cell.textContent).concat(getComputedStyle(row.querySelector("i")).backgroundColor))"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> list[Path]:
    """One of red and green, and one that knows blue too."""
    out = tmp_path_factory.mktemp("bundles")
    a = make_bundle(out / "bundle", {"all": ["background", "red", "green"]})
    return [a, make_bundle(out / "bundle-v2", {"all": ["background", "red", "green", "blue"]}, 1)]


@contextmanager
def running(bundles: list[Path]) -> Iterator[Server]:
    with Server(bundles, 0) as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        try:
            yield one
        finally:
            one.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(bundles) -> Iterator[Server]:
    with running(bundles) as one:
        yield one


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[chromium.Page]:
    with chromium.page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser, server) -> chromium.Page:
    """The page, freshly loaded in a wide window."""
    browser.window(1200, 900)
    browser.call("Page.navigate", url="about:blank")
    browser.console.clear()
    browser.requests.clear()
    browser.call("Page.navigate", url=server.url)
    browser.wait("document.body && document.body.dataset.ready")
    return browser


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(picture()).save(path)
    return path


def pixels(page: chromium.Page, place: int = 0) -> np.ndarray:
    found = page.script(PIXELS.format(place))
    return np.array(found["data"], np.uint8).reshape(found["height"], found["width"], 4)[..., :3]


def click(page: chromium.Page, selector: str) -> None:
    """A click of the mouse in the middle of an element."""
    x, y = page.script(
        f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
        " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def show(page: chromium.Page, photo: Path) -> None:
    page.choose_file("#file", photo)
    page.wait("!document.getElementById('pictures').hidden")


def opacity(page: chromium.Page, value: int) -> None:
    page.script(
        f"(() => {{ const e = document.getElementById('opacity'); e.value = {value};"
        " e.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def expected(bundle: Path, photo: Path, alpha: float, *, background: bool = False) -> np.ndarray:
    """What the package itself paints; the page leaves the background transparent at first."""
    found = everseg.load(bundle).predict(photo)
    table = np.array([entry.colour for entry in open_bundle(bundle).registry.classes])
    mixed = np.rint((1 - alpha) * found.image + alpha * table[found.ids])
    return mixed if background else np.where(found.ids[..., None] == 0, found.image, mixed)


def clean(page: chromium.Page, server: Server) -> None:
    """No complaint on the console, and nothing asked of anyone else."""
    assert page.console == []
    own = f"127.0.0.1:{server.server_port}"
    strange = [
        url for url in page.requests if urlsplit(url).netloc != own and not url.startswith(("data:", "blob:"))
    ]
    assert strange == []
    assert any("/predict" in url for url in page.requests)


def test_an_image_shows_its_classes_and_the_legend_their_shares(page, server, bundles, photo):
    assert page.script("document.getElementById('notes').innerText") == server.notes[0]
    assert "only bundle-v2 knows blue" in server.notes[0]
    assert page.script(LEGEND)[1] == ["red", "-", "-", "rgb(230, 159, 0)"]
    show(page, photo)
    found = everseg.load(bundles[0]).predict(photo)
    areas = np.bincount(found.ids.ravel(), minlength=4)
    rows = page.script(LEGEND)
    names = ["background", "red", "green", "blue"]
    assert [row[0] for row in rows] == sorted(names, key=lambda name: -areas[names.index(name)])
    by_name = {row[0]: row for row in rows}
    for train_id, name in enumerate(names[:3]):
        assert by_name[name][1] == share((found.ids == train_id).mean())
    assert by_name["blue"][1] == "-", "a class that this bundle does not know"
    assert len(np.unique(found.ids)) == 3
    np.testing.assert_allclose(pixels(page), expected(bundles[0], photo, 0.6), atol=2)
    clean(page, server)


def test_opacity_and_boxes_change_what_is_painted(page, server, bundles, photo):
    show(page, photo)
    for value in (0, 100, 30):
        opacity(page, value)
        np.testing.assert_allclose(pixels(page), expected(bundles[0], photo, value / 100), atol=2)
        assert page.script("document.getElementById('percent').textContent") == f"{value} %"
    click(page, "#all")
    np.testing.assert_allclose(pixels(page), expected(bundles[0], photo, 0.3, background=True), atol=2)
    click(page, "#none")
    image = np.asarray(Image.open(photo).convert("RGB"))
    np.testing.assert_allclose(pixels(page), image, atol=1)
    click(page, "#legend [data-position='1'] input")
    red = everseg.load(bundles[0]).predict(photo).ids == 1
    changed = (np.abs(pixels(page).astype(int) - image) > 3).any(axis=2)
    assert red.any()
    np.testing.assert_array_equal(changed, red)
    clean(page, server)


def test_two_bundles_are_switched_and_compared(page, server, bundles, photo):
    show(page, photo)
    assert page.requests[-1].startswith("data:")
    assert not any("bundle=1" in url for url in page.requests), "only what is looked at is asked for"
    click(page, "[value=b]")
    page.wait("document.getElementById('caption0').textContent.startsWith('B: bundle-v2')")
    np.testing.assert_allclose(pixels(page), expected(bundles[1], photo, 0.6), atol=2)
    click(page, "[value=both]")
    page.wait("document.getElementById('canvas1').getBoundingClientRect().width > 50")
    for place in (0, 1):
        np.testing.assert_allclose(pixels(page, place), expected(bundles[place], photo, 0.6), atol=2)
    a, b = (everseg.load(path).predict(photo).ids for path in bundles)
    differing = a != b
    assert 0.02 < differing.mean() < 0.9
    click(page, "[value=difference]")
    page.wait("document.getElementById('caption0').textContent.includes('differ')")
    assert not page.script("document.getElementById('canvas1').parentElement.hidden"), (
        "both answers are shown"
    )
    said = page.script("document.getElementById('caption0').textContent")
    assert said == f"A: bundle: {share(differing.mean())} of the pixels differ"
    grey = np.ptp(pixels(page, 1).astype(int), axis=2) <= 2
    assert grey[~differing].all()
    assert (~grey)[differing & (b == 3)].all(), "blue, in its colour"
    opacity(page, 100)
    for place, ids in enumerate((a, b)):
        colours = np.array([entry.colour for entry in open_bundle(bundles[place]).registry.classes])
        where = differing & ((a > 0) | (b > 0))
        np.testing.assert_array_equal(pixels(page, place)[where], colours[ids][where])
    told = page.script(
        "[...document.querySelectorAll('#pairs tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    names = ["background", "red", "green", "blue"]
    found = {(names[i], names[j]): ((a == i) & (b == j)).sum() for i in range(4) for j in range(4) if i != j}
    largest = sorted(found, key=lambda pair: -found[pair])[: len(told)]
    assert len(told) == min(8, sum(n > 0 for n in found.values()))
    assert {tuple(row[:2]) for row in told} == set(largest)
    assert told[0] == [*largest[0], share(found[largest[0]] / a.size)]
    assert sum("bundle=1" in url for url in page.requests) == 1, "asked once"
    clean(page, server)


def test_an_image_is_dropped_and_the_pointed_class_named(page, server, bundles, photo):
    page.drop_file(photo, 600, 500)
    page.wait("!document.getElementById('pictures').hidden")
    ids = everseg.load(bundles[0]).predict(photo).ids
    y, x = np.argwhere(ids == 2)[0].tolist()
    box = page.script("(() => { const b = document.getElementById('canvas0').getBoundingClientRect();"
                      " return [b.x, b.y, b.width / 128]; })()")  # fmt: skip
    at = {"x": box[0] + (x + 0.5) * box[2], "y": box[1] + (y + 0.5) * box[2]}
    page.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
    assert page.wait("document.getElementById('pointed').textContent") == "A: green"
    click(page, "[value=both]")
    page.wait("!document.getElementById('canvas1').parentElement.hidden")
    page.script("document.getElementById('canvas0').focus()")
    page.press("ArrowRight", 39)
    ids_b = everseg.load(bundles[1]).predict(photo).ids
    y, x = ids.shape[0] // 2, ids.shape[1] // 2 + max(1, round(max(ids.shape) / 40))
    names = ["background", "red", "green", "blue"]
    said = f"A: {names[ids[y, x]]}  ·  B: {names[ids_b[y, x]]}"
    assert page.script("document.getElementById('pointed').textContent") == said
    clean(page, server)


def test_an_example_is_at_hand_and_the_mask_can_be_taken_along(page, server, bundles):
    click(page, "#example")
    page.wait("!document.getElementById('pictures').hidden")
    image = np.asarray(Image.open(io.BytesIO(server.files["/example.png"][0])))
    ids = everseg.load(bundles[0]).predict(image).ids
    (name, address), *_ = page.script(
        "[...document.querySelectorAll('#downloads a')].map(a => [a.download, a.href])"
    )
    assert name == "example-mask-a.png"
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
    lasting = np.array(open_bundle(bundles[0]).registry.ids(everseg.load(bundles[0]).spaces["all"]))
    np.testing.assert_array_equal(mask, lasting[ids])
    told = page.script("document.getElementById('about').innerText")
    for fact in ("A: bundle", "B: bundle-v2", "weights", "s for an image"):
        must_say(told, fact)
    clean(page, server)


def test_several_images_become_a_zip_that_compares_the_bundles(page, server, bundles, photo, tmp_path):
    whole = Image.open(photo).convert("RGB")
    for name, image in (
        ("=a.png", whole),
        ("b.png", whole.rotate(180)),
        ("c.png", whole.crop((0, 0, 64, 48))),
    ):
        image.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    names = ["=a.png", "b.png", "notes.txt", "c.png"]
    page.choose_file("#file", *(tmp_path / name for name in names))
    page.wait("!document.getElementById('zip').hidden")
    assert page.script("document.getElementById('doing').textContent").startswith("3 of 4 ")
    assert "notes.txt" in page.script("document.getElementById('problems').textContent")
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    click(page, "#zip")
    until = time.monotonic() + 20
    while not (taken := tmp_path / "everseg-results.zip").is_file():
        assert time.monotonic() < until
        time.sleep(0.05)
    with zipfile.ZipFile(taken) as archive:
        assert archive.testzip() is None
        found = {name: archive.read(name) for name in archive.namelist()}
    stems = ["=a", "b", "c"]
    masks = {f"masks-{letter}/{stem}.png" for letter in "ab" for stem in stems}
    assert set(found) == masks | {"shares.csv", "differences.csv", "problems.txt"}
    models = [everseg.load(path) for path in bundles]
    rows = list(csv.DictReader(io.StringIO(found["shares.csv"].decode())))
    differ = {}
    for stem in stems:
        ids = [model.predict(tmp_path / f"{stem}.png").ids for model in models]
        differ[stem] = int((ids[0] != ids[1]).sum())
        for letter, expected_ids, path in zip("ab", ids, bundles, strict=True):
            mask = np.asarray(Image.open(io.BytesIO(found[f"masks-{letter}/{stem}.png"])))
            assert (mask == expected_ids).all(), "the ids of a fresh bundle are its outputs"
            own = [row for row in rows if row["image"].lstrip("'") == stem and row["bundle"] == path.name]
            assert {int(row["class id"]): int(row["pixels"]) for row in own} == dict(
                zip(*map(np.ndarray.tolist, np.unique(mask, return_counts=True)), strict=True)
            )
    told = list(csv.DictReader(io.StringIO(found["differences.csv"].decode())))
    assert {row["image"].lstrip("'"): int(row["pixels that differ"]) for row in told} == differ
    assert not any(row["image"].startswith("=") for row in rows), "no formula"
    shown = page.script("document.querySelector('#images td').textContent")
    assert shown == max(
        stems, key=lambda stem: differ[stem] / np.asarray(Image.open(tmp_path / f"{stem}.png"))[..., 0].size
    )
    show(page, photo)
    assert page.script("document.getElementById('batch').hidden"), "one image is shown as before"
    clean(page, server)


def test_what_is_no_picture_is_told(page, tmp_path, photo):
    show(page, photo)
    (tmp_path / "notes.txt").write_text("no picture")
    page.choose_file("#file", tmp_path / "notes.txt")
    assert "use PNG" in page.wait("document.getElementById('error').textContent")
    assert page.script("document.getElementById('pictures').hidden")
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:40])
    page.choose_file("#file", tmp_path / "broken.png")
    page.wait("document.getElementById('error').textContent.includes('broken.png is damaged')")
    show(page, photo)
    assert page.script("document.getElementById('error').hidden")
    assert page.console == []


def test_what_the_server_refuses_is_shown_in_its_words(page, server, photo, monkeypatch):
    """A refused share of the pixels stood on the page as `undefined`."""

    def refuse(query):
        raise RefusedError(503, "Too many connections: try again.")

    show(page, photo)
    monkeypatch.setattr(serve, "share_text", refuse)
    click(page, "input[value=difference]")
    page.wait("!document.getElementById('error').hidden")
    must_say(page.script("document.getElementById('error').textContent"), "Too many")
    assert "undefined" not in page.script("document.body.innerText")


def test_the_keyboard_reaches_everything(page, photo):
    show(page, photo)
    reached = []
    for _ in range(14):
        page.press("Tab", 9)
        reached.append(page.script("document.activeElement.id || document.activeElement.type || 'link'"))
    assert reached[:6] == ["file", "example", "pick", "radio", "opacity", "checkbox"]
    assert {"all", "none", "canvas0"} <= set(reached)
    unnamed = """[...document.querySelectorAll("input, select, button")].filter(e =>
      !(e.labels && e.labels.length && e.labels[0].textContent.trim()) && !e.textContent.trim()).length"""
    assert page.script(unnamed) == 0


def test_phone_and_dark(page, photo):
    show(page, photo)
    page.window(390, 800)
    page.wait("document.documentElement.scrollWidth <= 390")
    for view in ("both", "difference"):
        click(page, f"[value={view}]")
        page.wait(
            "!document.getElementById('pictures').hidden && document.documentElement.scrollWidth <= 390"
        )
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.script(ground) == "rgb(246, 247, 248)"
    page.window(390, 800, dark=True)
    assert page.script(ground) == "rgb(16, 19, 23)"


def test_a_turned_photo_lies_as_its_mask(page, server, bundles, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.jpg"
    Image.fromarray(picture()).save(turned, exif=exif, quality=95, subsampling=0)
    show(page, turned)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(turned)))
    assert upright.shape[:2] == (128, 96)
    opacity(page, 0)
    np.testing.assert_allclose(pixels(page), upright, atol=6)
    opacity(page, 100)
    ids = everseg.load(bundles[0]).predict(upright).ids
    table = np.array([entry.colour for entry in open_bundle(bundles[0]).registry.classes])
    np.testing.assert_array_equal(pixels(page)[ids > 0], table[ids][ids > 0])
    clean(page, server)


def test_a_model_of_several_branches_asks_for_the_domain(browser, photo, tmp_path):
    domains = {"day": ["background", "red", "green"], "dusk": ["background", "green", "blue", "red"]}
    path = make_bundle(tmp_path / "b", domains)
    browser.console.clear()
    with running([path]) as server:
        browser.call("Page.navigate", url="about:blank")
        browser.requests.clear()
        browser.call("Page.navigate", url=server.url)
        browser.wait("document.body && document.body.dataset.ready")
        assert browser.script("document.getElementById('views').hidden"), "one bundle: nothing to switch"
        show(browser, photo)
        for domain in ("dusk", "day"):
            browser.script(
                f"(() => {{ const e = document.getElementById('branch0'); e.value = {domain!r};"
                " e.dispatchEvent(new Event('change')); })()"
            )
            found = everseg.load(path).predict(photo, branch=domain)
            share = 100 * (found.ids == found.classes.index("green")).mean()
            shown = "parseFloat(document.querySelector('#legend [data-position=\"2\"]').cells[1].textContent)"
            browser.wait(f"Math.abs({shown} - {share}) < 0.051")
        clean(browser, server)


def test_the_page_may_ask_nobody_else(page):
    """The policy holds, and the check for it sees what it forbids."""
    blocked = page.script("fetch('http://example.invalid/').then(() => false, () => true)")
    assert blocked
    assert any("Content Security Policy" in line for line in page.console)
