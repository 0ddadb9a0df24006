"""A web page for trying bundles on this machine: a small HTTP server on the loopback address.

Clients send the bytes of pictures, never names of files. The server refuses requests that other web sites could make a
browser send.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

import numpy as np
from PIL import Image

from everseg.data.class_colours import palette, png
from everseg.data.datasets.decode import (
    PictureTooLargeError,
    Reading,
    open_picture,
    read_image,
)
from everseg.data.demo.scenes import scene
from everseg.deploy.bundle import Bundle, open_bundle
from everseg.deploy.class_ids import mask_type
from everseg.deploy.history import taught_text
from everseg.display import UNDEFINED, Piece, Result, count, escaped, percent, printable, share, size
from everseg.errors import ConfigError, DataError, some
from everseg.inference.predict import LoadedModel, load
from everseg.labels import IGNORED, Matching, match_names
from everseg.models.folding import united

HOST = "127.0.0.1"
MAX_BYTES = 25_000_000
"""Largest upload, in bytes."""
WAITING = 3
"""Number of uploads that may wait while one is predicted."""
CONNECTIONS = 16
PATIENCE = 30.0
"""Seconds within which a request has to arrive completely."""
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/draw.js": ("draw.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """Serves one or two bundles until `shutdown`. It runs one prediction at a time."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # on other systems it would share the port with another program

    def __init__(
        self,
        bundles: Sequence[str | Path],
        port: int = 8000,
        *,
        builder: Any = None,
        patience: float = PATIENCE,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Load the bundles and listen on the loopback address.

        Args:
            bundles: one or two bundles.
            port: the port to listen on; 0 chooses a free one.
            builder: the builder of your own architecture, if the models are not built-in ones.
            patience: seconds within which a request has to arrive completely.
            log: receives a line about each prediction and each unexpected failure. The line says nothing about the
                content of the picture.

        Raises:
            ConfigError: there are not one or two bundles, a name may mean two classes of a bundle, or the server cannot
                listen on the port.
            CheckpointError: a bundle is missing or damaged.
        """
        if not 1 <= len(bundles) <= 2:
            raise ConfigError(f"serve shows one or two bundles, not {len(bundles)}")
        self.served = [Served(path, builder) for path in bundles]
        self.classes, self.notes = class_list(self.served), class_notes(self.served)
        self.patience, self.log = patience, log
        self.places = threading.BoundedSemaphore(1 + WAITING)
        self.predicting = threading.Lock()
        self._connections = threading.BoundedSemaphore(CONNECTIONS)
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--port {port}: cannot listen there ({reason}); give another port") from None
        names = [f"{name}:{self.server_port}" for name in (HOST, "localhost")]
        self.hosts = frozenset([*names, *([HOST, "localhost"] if self.server_port == 80 else [])])
        folder = resources.files("everseg.deploy").joinpath("templates")
        self.files = {
            path: (folder.joinpath(name).read_bytes(), kind) for path, (name, kind) in _FILES.items()
        }
        self.files["/example.png"] = (example_picture(), "image/png")

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def info(self) -> dict[str, Any]:
        """Return what the page needs to know: bundles, classes, limits."""
        return {
            "bundles": [
                {"name": one.name, "branches": one.branches, "about": one.about()} for one in self.served
            ],
            "classes": self.classes,
            "notes": self.notes,
            "undefined": UNDEFINED,
            "limits": {"bytes": MAX_BYTES, "pixels": min(one.max_pixels for one in self.served)},
            "types": TYPES,
        }

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # the base class would look up the host name
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection. If there are too many connections, close it."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that closed the connection. The handler reports failures of its own."""


class Serving(Result):
    """A page that answers in the background until `stop`. `with everseg.serve(...)` stops it at the block's end."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Address of the page. It works on this machine only."""
        return self._server.url

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on classes of the two bundles that differ in spelling, or that only one of them knows."""
        return tuple(self._server.notes)

    def wait(self) -> None:
        """Wait until the page is stopped. Ctrl-C raises KeyboardInterrupt as usual."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # without a time limit, Windows would not notice Ctrl-C

    def stop(self) -> None:
        """Stop answering requests and free the port."""
        if self._thread.is_alive():  # `shutdown` would wait for ever for a thread that has ended
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def shown(self) -> Iterator[Piece]:
        yield f"open {self.url} in a browser"

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>note: {escaped(text)}</p>" for text in self.notes)
        return f'{notes}<p>open <a href="{escaped(self.url)}" target="_blank">{escaped(self.url)}</a></p>'

    def to_json(self) -> dict[str, Any]:
        return {"url": self.url, "notes": list(self.notes)}


def serve(
    bundle: str | Path,
    other: str | Path | None = None,
    *,
    port: int = 8000,
    builder: Any = None,
    quiet: bool = False,
) -> Serving:
    """Serve a page on this machine that shows the classes of one or two bundles on images dropped there.

    The page answers in the background, and the call returns at once.

    Args:
        bundle: the bundle to try.
        other: another bundle to compare it with.
        port: the port on 127.0.0.1; 0 chooses a free one.
        builder: the builder of your own architecture, if a bundle has one. It is never imported automatically.
        quiet: do not print a line on stderr about each prediction.

    Raises:
        ConfigError: the port is taken.
        CheckpointError: a bundle is missing or damaged.
    """
    bundles = [bundle] if other is None else [bundle, other]
    return Serving(Server(bundles, port, builder=builder, log=(lambda text: None) if quiet else _to_stderr))


def _to_stderr(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")


class Handler(BaseHTTPRequestHandler):
    """Answers one request per connection."""

    server: Server
    server_version, sys_version = "everseg", ""

    def setup(self) -> None:
        super().setup()
        # Replace the reader of the base class by one with a deadline for the whole request.
        self.rfile.close()
        self.rfile = io.BufferedReader(_Patient(self.connection, self.server.patience))

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, answer: Callable[[str, dict[str, str]], tuple[bytes, str]]) -> None:
        """Check the origin of a request, then send the result of `answer` or one sentence about the problem."""
        try:
            self._check_origin()
            address = _address(self.path)
            body, kind = answer(address.path, dict(parse_qsl(address.query, keep_blank_values=True)))
            self._send(HTTPStatus.OK, body, kind)
        except RefusedError as refused:
            self.send_error(refused.status, str(refused))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:  # whatever happened, the client gets an answer
            self.server.log(f"a request failed: {type(error).__name__}")
            self.send_error(500, "Something went wrong on the server.")

    def _check_origin(self) -> None:
        """Refuse foreign host names that resolve to this machine (DNS rebinding), and requests from other sites."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            raise RefusedError(403, f"This page is at {self.server.url} only.")
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() not in {f"http://{host}" for host in self.server.hosts}:
            raise RefusedError(403, "Requests of other sites are refused.")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise RefusedError(403, "Requests of other sites are refused.")

    def _get(self, path: str, query: dict[str, str]) -> tuple[bytes, str]:
        if path == "/info":
            return _json(self.server.info())
        if path == "/share":
            return _json({"text": share_text(query)})
        if path not in self.server.files:
            raise RefusedError(404, "There is no such page.")
        return self.server.files[path]

    def _post(self, path: str, query: dict[str, str]) -> tuple[bytes, str]:
        if path != "/predict":
            raise RefusedError(404, "There is no such page.")
        if unknown := sorted(set(query) - {"bundle", "domain"}):
            raise RefusedError(400, f"Only bundle and domain may be given, not {len(unknown)} more.")
        which = query.get("bundle", "0")
        if which not in [str(i) for i in range(len(self.server.served))]:
            raise RefusedError(400, f"bundle: 0 to {len(self.server.served) - 1} are here.")
        served = self.server.served[int(which)]
        check_type(self.headers.get("Content-Type", ""))
        length = self._length()
        # Check for a free place before reading the body, so that waiting uploads do not fill the memory.
        if not self.server.places.acquire(blocking=False):
            raise RefusedError(503, "Busy with other images: try again in a moment.")
        try:
            data = self.rfile.read(length)
            if len(data) < length:
                raise RefusedError(400, "The upload ended early.")
            # Decoding is inside the lock too, so that large pictures are decoded one at a time.
            with self.server.predicting:
                image = decode_upload(data, served.reading)
                done = served.predict(image, query.get("domain"))
        finally:
            self.server.places.release()
        self.server.log(f"bundle {which}: {done['width']}x{done['height']} in {done['seconds']:.2f} s")
        return _json(done)

    def _length(self) -> int:
        """Return the length of the body in bytes, after checking the headers."""
        text = self.headers.get("Content-Length")
        if text is None or self.headers.get("Transfer-Encoding") is not None:
            raise RefusedError(411, "The length of the upload must be given (Content-Length).")
        if not (text.isascii() and text.isdigit()) or len(self.headers.get_all("Content-Length", [])) > 1:
            raise RefusedError(400, "Content-Length is no number.")
        if len(text) > 12 or int(text) > MAX_BYTES:
            raise RefusedError(413, f"The image is larger than {MAX_BYTES // 1_000_000} MB.")
        if int(text) == 0:
            raise RefusedError(400, "The upload is empty.")
        return int(text)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with a sentence. The base class also calls this for malformed requests."""
        body, kind = _json({"error": message or HTTPStatus(code).phrase})
        self.close_connection = True
        with contextlib.suppress(OSError):
            self._send(HTTPStatus(code), body, kind)
            self._drain()

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.connection.settimeout(self.server.patience)
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "2")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _drain(self) -> None:
        """Read part of a refused upload, because closing the connection earlier would lose the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        until = time.monotonic() + min(2.0, self.server.patience)
        for _ in range(2 * MAX_BYTES // 65536):
            self.connection.settimeout(max(0.01, until - time.monotonic()))
            if time.monotonic() > until or not self.connection.recv(65536):
                return

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing here. `Server.log` gets the lines that matter."""


class _Patient(io.RawIOBase):
    """Reads from a connection until a deadline for the whole request, however slowly the bytes arrive."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._until = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


def _address(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:
        raise RefusedError(400, "The address cannot be read.") from None


def _json(value: Any) -> tuple[bytes, str]:
    return json.dumps(value).encode(), "application/json"


_SHOWN = ("PNG", "JPEG", "WEBP", "BMP")
"""Formats that browsers can show and everseg can decode."""
TYPES = tuple(f"image/{form.lower()}" for form in _SHOWN)
"""Content types of these formats."""
MAX_PIXELS = 16_000_000
"""Largest number of pixels. A larger picture is refused before it is decoded."""
_MOST_LOGITS = 1_000_000_000
"""Largest number of logits of a picture at its own size (4 GB). It limits the pictures for models of many classes."""
_FORMATS = frozenset({*_SHOWN, "MPO"})
EXAMPLE = 3
"""Seed of the example picture; the demo's own scenes have other ones."""
_NAME = Path("image")
"""Name of an upload in messages. The real name of the file never leaves the browser."""


class RefusedError(Exception):
    """A request is refused. The answer is a status and one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Served:
    """A bundle whose model is loaded into memory."""

    def __init__(self, path: str | Path, builder: Any = None) -> None:
        self.bundle: Bundle = open_bundle(path)
        self.model: LoadedModel = load(path, builder=builder)
        self.model.check_alone()
        if (channels := self.model.form.channels) is not None:
            raise ConfigError(
                f"{path}: the model sees {len(channels)} channels of {channels.bits} bits, which no browser shows; "
                "use everseg predict"
            )
        self.model.model = united(self.model.model)
        self.name = self.bundle.path.resolve().name
        ids = [raw for space in self.model.spaces.values() for raw in self.bundle.registry.ids(space)]
        if mask_type(ids) is not np.uint8:
            # A browser reads 8 bits of every channel from a picture: ids of 16 bits would become others.
            raise ConfigError(
                f"{path}: class ids up to {max(ids)}, and the page shows masks of bytes (ids to {IGNORED - 1}); use "
                "everseg predict, or the ONNX file, whose masks have 16 bits"
            )
        self.branches = tuple(self.model.branch_of) if len(self.model.spaces) > 1 else ()
        """Names for choosing a branch; empty if there is only one branch."""
        outputs = max(space.num_classes for space in self.model.spaces.values())
        self.max_pixels = min(MAX_PIXELS, _MOST_LOGITS // outputs)
        # browsers rotate pictures as their EXIF data say, and the mask has to fit
        self.reading = replace(self.model.form.reading, max_pixels=self.max_pixels, exif="apply")

    def about(self) -> list[tuple[str, str]]:
        """Describe the bundle for people: pairs of what is said and the text, with all numbers formatted."""
        lineage = self.bundle.lineage
        rows = [("Made", str(lineage["created"]))] if lineage.get("created") else []
        for entry in lineage["history"]:
            images = sum(source["images"] for source in entry["train"])
            method = f"{entry['method']}, " if entry.get("method") else ""
            rows.append((f"Step {entry['step']}", f"{taught_text(entry)} ({method}{images:,} images)"))
        last = lineage["history"][-1] if lineage["history"] else {}
        tested = "; ".join(
            f"{source['images']:,} images of {source['data']}" for source in last.get("test", ())
        )
        for name, scores in last.get("scores", {}).items():
            # The name of the result says something only where there are several.
            where = tested if len(last["scores"]) == 1 else name
            rows.append(("mIoU", f"{percent(scores['miou']['all'])} %" + (f" on {where}" if where else "")))
        weights = sum(weight.numel() for weight in self.model.model.parameters())
        stored = sum(file.stat().st_size for file in self.bundle.path.glob("model.safetensors"))
        rows.append(("Model", f"{count(weights)} weights, {size(stored)}"))
        return rows

    def predict(self, image: np.ndarray, branch: str | None) -> dict[str, Any]:
        """Classify an image.

        Args:
            image: (H, W, 3) uint8.
            branch: one of `branches`; None for a model with one.

        Returns:
            A dictionary with width, height, mask (data URI of a grey PNG of lasting class ids), pixels (id -> number of
            pixels), shares (id -> its share of the pixels as text) and seconds.

        Raises:
            RefusedError: it is unclear which branch to use, or the model failed.
        """
        if (branch not in self.branches) if self.branches else (branch is not None):
            names = ", ".join(self.branches) or "one branch only: leave domain out"
            raise RefusedError(400, f"domain: {self.name} has {names}.")
        begun = time.monotonic()
        try:
            found = self.model.predict(image, branch=branch)
        except (MemoryError, RuntimeError):
            raise RefusedError(
                500, f"{self.name} could not classify this image; a smaller one may fit into memory."
            ) from None
        # Look up the lasting id of every pixel's train id, (H, W).
        known = np.array(self.bundle.registry.ids(self.model.spaces[found.branch]))
        known = known.astype(mask_type(known.tolist()))
        ids = known[found.ids]
        counts = np.bincount(ids.ravel(), minlength=int(known.max()) + 1)
        return {
            "width": ids.shape[1],
            "height": ids.shape[0],
            "mask": _data_uri(ids),
            "pixels": {str(i): int(counts[i]) for i in np.flatnonzero(counts)},
            "shares": {str(i): share(counts[i] / ids.size) for i in np.unique(known)},
            "seconds": round(time.monotonic() - begun, 3),
        }


def example_picture() -> bytes:
    """Make the picture of the page's example: a generated street scene, because bundles hold no pictures of their own.

    Returns:
        A PNG file.
    """
    image, _ = scene(EXAMPLE, (288, 384))
    return png(Image.fromarray(image))


def share_text(query: Mapping[str, str]) -> str:
    """Format `part` of `whole` pixels as the page shows it. The page counts where two masks differ by itself.

    Raises:
        RefusedError: the two are no numbers of pixels.
    """
    texts = [query.get(name, "") for name in ("part", "whole")]
    if set(query) != {"part", "whole"} or not all(t.isascii() and t.isdigit() and len(t) < 13 for t in texts):
        raise RefusedError(400, "Give part and whole, two numbers of pixels.")
    part, whole = map(int, texts)
    if not 0 <= part <= whole or not whole:
        raise RefusedError(400, "part: a number of pixels up to whole, which is at least 1.")
    return share(part / whole)


def class_list(served: Sequence[Served]) -> list[dict[str, Any]]:
    """List the classes of the bundles: name, colour, background, and the id in each bundle (None if unknown).

    A class of both bundles has the name and colour of the first. If the colour of a class is taken already, the class
    gets the next free colour.

    Raises:
        ConfigError: two classes of a bundle have the same name, so the match with the other bundle is unclear.
    """
    ours = {} if len(served) == 1 else _matched(served).pairs
    rows: dict[str, dict[str, Any]] = {}
    taken: set[tuple[int, ...]] = set()
    free = iter([tuple(colour) for colour in palette(256).tolist()])
    for position, one in enumerate(served):
        empty = {
            space.names[space.background]
            for space in one.model.spaces.values()
            if space.background is not None
        }
        for entry in one.bundle.registry.classes:
            if not entry.branches:
                continue
            name = ours.get(entry.name, entry.name) if position else entry.name
            if name not in rows:
                colour = tuple(entry.colour)
                if colour in taken:
                    colour = next(c for c in free if c not in taken and not _known(c, served))
                taken.add(colour)
                ids: list[int | None] = [None] * len(served)
                rows[name] = {
                    "name": name, "colour": list(colour), "background": entry.name in empty, "ids": ids,
                }  # fmt: skip
            rows[name]["ids"][position] = entry.id
    return list(rows.values())


def class_notes(served: Sequence[Served]) -> list[str]:
    """Report class names of two bundles that differ in spelling, or that only one of them knows."""
    if len(served) == 1:
        return []
    a, b = (one.name for one in served)
    found = _matched(served)
    notes = [f"class '{theirs}' of {b} is shown as '{ours}' of {a}" for theirs, ours in found.respelt.items()]
    for name, lonely in ((a, found.unmatched_known), (b, found.unmatched_wanted)):
        if lonely:
            notes.append(f"only {name} knows {some(lonely, 12)}: pixels that it gives to them always differ")
    return notes


def _matched(served: Sequence[Served]) -> Matching:
    """Match the classes of the second bundle with those of the first."""
    first, second = (
        [entry.name for entry in one.bundle.registry.classes if entry.branches] for one in served
    )
    return match_names(second, first, what=(f"classes of {served[1].name}", f"classes of {served[0].name}"))


def decode_upload(data: bytes, reading: Reading) -> np.ndarray:
    """Decode an uploaded picture to (H, W, 3) uint8.

    Raises:
        RefusedError: the data are no picture, are damaged or too large, or have a format that browsers do not show.
    """
    try:
        picture = open_picture(io.BytesIO(data), _NAME, reading)
        if picture.format not in _FORMATS:
            raise RefusedError(415, f"{picture.format} pictures are not taken here: use {_names()}.")
        return read_image(picture, reading)
    except PictureTooLargeError as error:
        raise RefusedError(413, f"The {_first_clause(error)}.") from None
    except DataError as error:
        raise RefusedError(400, f"The {_first_clause(error)}.") from None


def check_type(content_type: str) -> None:
    """Raise a RefusedError if the content type of a body is not that of a picture."""
    if content_type.partition(";")[0].strip().lower() not in TYPES:
        raise RefusedError(415, f"Send the picture itself, as {_names()}.")


def _known(colour: tuple[int, ...], served: Sequence[Served]) -> bool:
    return any(colour == tuple(entry.colour) for one in served for entry in one.bundle.registry.classes)


def _first_clause(error: DataError) -> str:
    """Return the part of a message that says what is wrong. The rest is advice for files of a data set."""
    return str(error).partition(";")[0]


def _names() -> str:
    return ", ".join(name.removeprefix("image/").upper() for name in TYPES)


def _data_uri(ids: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(ids).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
