"""The report in headless Chromium: quiet console, no request, every chart drawn, nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import domain_toy
import numpy as np
import pytest
from PIL import Image
from toy import settings

import everseg

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)"),
]
OWN_HOSTS = re.compile(
    r"(accounts|update|clients\d?|optimizationguide-pa|content-autofill)\.(google|googleapis)\.com"
)
"""What the browser itself asks for, whatever the page."""
PROBE = """<script>
const boxes = [...document.querySelectorAll("svg.chart")].map(chart => {
  const whole = chart.getBoundingClientRect(), drawn = chart.getBBox();
  return {id: chart.closest("figure").id, width: whole.width, height: whole.height, drawn: drawn.width * drawn.height,
          marks: [...chart.querySelectorAll("path, use")].filter(mark => {
            const box = mark.getBoundingClientRect(), style = getComputedStyle(mark);
            return box.width + box.height > 2 && (style.stroke !== "none" || style.fill !== "none"); }).length};
});
const pictures = [...document.images].map(image => image.naturalWidth);
const zoom = document.querySelector("details.zoom"), image = zoom && zoom.querySelector("img");
const small = image && image.getBoundingClientRect().width;
if (zoom) zoom.open = true;
const large = image && image.getBoundingClientRect();
if (zoom) zoom.open = false;
const cells = [...document.querySelectorAll(".matrix input")].slice(0, 3).map(size => {
  size.checked = true;
  return document.querySelector("table.confusion td").getBoundingClientRect().width;
});
document.body.dataset.probe = JSON.stringify({boxes, pictures, small, cells,
  large: large && [large.left, large.top, large.right, large.bottom], window: [innerWidth, innerHeight],
  wide: document.documentElement.scrollWidth,
  background: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color});
</script>"""


def browse(path: Path, tmp_path: Path, *arguments: str, window: str = "1280,900") -> tuple[str, list[str]]:
    """What the browser prints, and the lines of the page's console."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", f"--window-size={window}",
        *arguments, path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probed(path: Path, tmp_path: Path, *arguments: str, window: str = "1280,900") -> dict:
    """Measures of a copy of the page that may run one script."""
    text = path.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    other = tmp_path / "probed.html"
    other.write_text(text.replace("</body>", f"{PROBE}</body>"))
    dom, _ = browse(other, tmp_path, "--dump-dom", *arguments, window=window)
    (found,) = re.findall(r'data-probe="([^"]+)"', dom)
    return json.loads(found.replace("&quot;", '"'))


def requested(path: Path, tmp_path: Path) -> tuple[set[str], list[str]]:
    """Hosts asked for something beside those of the browser itself, and the console's lines."""
    log = tmp_path / "net.json"
    _, console = browse(path, tmp_path, f"--log-net-log={log}", "--dump-dom")
    urls = re.findall(r'"url":"((?:https?|wss?)://[^"]+)"', log.read_text())
    hosts = {urlsplit(url).hostname or "" for url in urls}
    return {host for host in hosts if not OWN_HOSTS.fullmatch(host)}, console


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The reports of a class-incremental run and of one over domains."""
    out = tmp_path_factory.mktemp("pages")
    one = everseg.run(settings(out, report=True, train={"max_iterations": 4}), quiet=True)
    two = everseg.run(domain_toy.settings(out, report=True, train={"max_iterations": 4}), quiet=True)
    return [run.path / "report.html" for run in (one, two)]


def test_the_console_is_quiet_and_nothing_is_asked_for(pages: list[Path], tmp_path: Path) -> None:
    for page in pages:
        assert requested(page, tmp_path) == (set(), [])


def test_a_page_that_asks_for_something_would_be_found_out(pages: list[Path], tmp_path: Path) -> None:
    text = pages[0].read_text()
    guilty = tmp_path / "guilty.html"
    guilty.write_text(text.replace("</body>", '<img src="http://example.invalid/x.png" alt=""></body>'))
    hosts, console = requested(guilty, tmp_path)
    assert hosts == set(), "the page's own policy forbids it"
    assert "Content Security Policy" in console[0]
    free = text.replace("Content-Security-Policy", "no-policy")
    guilty.write_text(free.replace("</body>", '<img src="http://example.invalid/x.png" alt=""></body>'))
    assert requested(guilty, tmp_path)[0] == {"example.invalid"}


def test_every_chart_is_drawn_and_every_picture_shown(pages: list[Path], tmp_path: Path) -> None:
    for page, charts in zip(pages, (7, 9), strict=True):
        found = probed(page, tmp_path)
        assert len(found["boxes"]) == charts
        for box in found["boxes"]:
            assert box["width"] > 300, box
            assert box["height"] > 60, box
            assert box["drawn"] > 10_000, box
            assert box["marks"] > 5, box
        assert found["pictures"]
        assert min(found["pictures"]) > 0


def test_a_picture_enlarges_into_the_window_and_the_confusion_matrix_has_three_sizes(
    pages: list[Path], tmp_path: Path
) -> None:
    for size in ("1280,900", "500,900"):
        found = probed(pages[0], tmp_path, window=size)
        left, top, right, bottom = found["large"]
        assert right - left > 2 * found["small"]
        assert 0 <= left < right <= found["window"][0]
        assert 0 <= top < bottom <= found["window"][1]
        assert found["cells"] == sorted(found["cells"])
        assert found["cells"][2] > 3 * found["cells"][0]


def test_it_fits_a_phone(pages: list[Path], tmp_path: Path) -> None:
    for page in pages:
        assert probed(page, tmp_path, window="500,900")["wide"] <= 500, (
            "nothing sticks out of a narrow window"
        )
        frame, shot = tmp_path / "frame.html", tmp_path / "phone.png"
        style = "border:0;width:390px;height:800px"
        frame.write_text(f"<body style='margin:0'><iframe src='{page.as_uri()}' style='{style}'>")
        browse(frame, tmp_path, f"--screenshot={shot}", window="500,800")
        with Image.open(shot) as opened:
            pixels = np.asarray(opened.convert("L"))[:, :390]
        assert len(np.unique(pixels)) > 20
        assert (pixels[:, 386:] > 225).all(), "an empty margin at the right edge of a phone"


def test_it_follows_light_and_dark(pages: list[Path], tmp_path: Path) -> None:
    light = probed(pages[0], tmp_path)
    dark = probed(pages[0], tmp_path, "--blink-settings=preferredColorScheme=0")
    assert sum(map(int, re.findall(r"\d+", light["background"]))) > 600
    assert sum(map(int, re.findall(r"\d+", dark["background"]))) < 150
    assert sum(map(int, re.findall(r"\d+", dark["ink"]))) > 600


def test_it_prints(pages: list[Path], tmp_path: Path) -> None:
    for page in pages:
        target = tmp_path / "page.pdf"
        browse(page, tmp_path, f"--print-to-pdf={target}", "--no-pdf-header-footer")
        data = target.read_bytes()
        assert data.startswith(b"%PDF")
        assert 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 12
