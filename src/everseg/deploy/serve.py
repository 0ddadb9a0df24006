"""A page on this machine to try bundles on: a small HTTP server on the loopback address.

It takes bytes of pictures and never names of files; what other sites could make a browser send is refused.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

import numpy as np
from PIL import Image

from everseg.data.class_colours import palette
from everseg.data.datasets.decode import (
    PictureTooLargeError,
    Reading,
    open_picture,
    read_image,
)
from everseg.deploy.bundle import Bundle, open_bundle
from everseg.display import Piece, Result, escaped, printable
from everseg.errors import ConfigError, DataError, some
from everseg.inference.predict import LoadedModel, load
from everseg.labels import Matching, match_names

HOST = "127.0.0.1"
MAX_BYTES = 25_000_000
"""Largest upload."""
WAITING = 3
"""Uploads that may wait while one is predicted."""
CONNECTIONS = 16
PATIENCE = 30.0
"""Seconds in which a request has to arrive whole."""
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
    """Serves one or two bundles until `shutdown`; one prediction at a time."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere it would share the port with another program

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
            port: 0 takes a free one.
            builder: your own architecture's builder, if the models are not built-in ones.
            patience: seconds in which a request has to arrive whole.
            log: takes a line about each prediction and each unexpected failure; nothing of the picture is in it.

        Raises:
            ConfigError: not one or two bundles, a name that may mean two of a bundle's classes, or the port is taken.
            CheckpointError: a bundle that is missing or damaged.
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

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def info(self) -> dict[str, Any]:
        """What the page needs to know: bundles, classes, limits."""
        return {
            "bundles": [{"name": one.name, "branches": one.branches} for one in self.served],
            "classes": self.classes,
            "notes": self.notes,
            "limits": {"bytes": MAX_BYTES, "pixels": min(one.max_pixels for one in self.served)},
            "types": TYPES,
        }

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # the base class would ask the name service
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread; one too many is closed."""
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
        """Leave clients that went away alone: what fails in answering is told by the handler."""


class Serving(Result):
    """A page that answers in the background, until `stop`; `with everseg.serve(...)` stops it at the end."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the page is, on this machine only."""
        return self._server.url

    @property
    def notes(self) -> tuple[str, ...]:
        """Classes of the two bundles that differ in spelling, or that one of them knows alone."""
        return tuple(self._server.notes)

    def wait(self) -> None:
        """Return when the page is stopped; Ctrl-C raises KeyboardInterrupt as usual."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # with a limit: without one, Windows would not notice Ctrl-C

    def stop(self) -> None:
        """Answer no more requests, and free the port."""
        if self._thread.is_alive():  # else nobody would answer the request to end
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
        return f'<p>open <a href="{escaped(self.url)}" target="_blank">{escaped(self.url)}</a></p>'

    def to_json(self) -> dict[str, Any]:
        return {"url": self.url}


def serve(
    bundle: str | Path,
    other: str | Path | None = None,
    *,
    port: int = 8000,
    builder: Any = None,
    quiet: bool = False,
) -> Serving:
    """Serve a page, on this machine only, to drop images on and see the classes of one or two bundles.

    The page answers in the background: the call returns at once.

    Args:
        bundle: what to look at.
        other: another bundle to compare it with.
        port: on 127.0.0.1; 0 takes a free one.
        builder: your own architecture's builder, if a bundle has one. Never imported by itself.
        quiet: do not print a line on stderr about each prediction.

    Raises:
        ConfigError: the port is taken.
        CheckpointError: a bundle that is missing or damaged.
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
        self.rfile.close()
        self.rfile = io.BufferedReader(_Patient(self.connection, self.server.patience))

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, answer: Callable[[str, dict[str, str]], tuple[bytes, str]]) -> None:
        """Check where a request comes from, and send what `answer` gives or one sentence why not."""
        try:
            self._check_origin()
            address = _address(self.path)
            body, kind = answer(address.path, dict(parse_qsl(address.query, keep_blank_values=True)))
            self._send(HTTPStatus.OK, body, kind)
        except RefusedError as refused:
            self.send_error(refused.status, str(refused))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:  # whatever it was, the client gets a sentence
            self.server.log(f"a request failed: {type(error).__name__}")
            self.send_error(500, "Something went wrong on the server.")

    def _check_origin(self) -> None:
        """Refuse names that only point here (DNS rebinding), and what other sites make a browser send."""
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
        if not self.server.places.acquire(blocking=False):
            raise RefusedError(503, "Busy with other images: try again in a moment.")
        try:
            data = self.rfile.read(length)
            if len(data) < length:
                raise RefusedError(400, "The upload ended early.")
            with self.server.predicting:
                image = decode_upload(data, served.reading)
                done = served.predict(image, query.get("domain"))
        finally:
            self.server.places.release()
        self.server.log(f"bundle {which}: {done['width']}x{done['height']} in {done['seconds']:.2f} s")
        return _json(done)

    def _length(self) -> int:
        """Bytes of the body."""
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
        """Answer with a sentence, also where the base class refuses a malformed request."""
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
        """Take in some of a refused upload: a connection closed before would lose the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        until = time.monotonic() + min(2.0, self.server.patience)
        for _ in range(2 * MAX_BYTES // 65536):
            self.connection.settimeout(max(0.01, until - time.monotonic()))
            if time.monotonic() > until or not self.connection.recv(65536):
                return

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `Server.log` is told what is worth a line."""


class _Patient(io.RawIOBase):
    """What a connection sends, until its time is up, however slowly it drips."""

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
        raise RefusedError(400, "The address makes no sense.") from None


def _json(value: Any) -> tuple[bytes, str]:
    return json.dumps(value).encode(), "application/json"


_SHOWN = ("PNG", "JPEG", "WEBP", "BMP")
"""Formats that browsers show and everseg decodes."""
TYPES = tuple(f"image/{form.lower()}" for form in _SHOWN)
"""How a browser announces them."""
MAX_PIXELS = 16_000_000
"""Largest picture; refused before it is decoded."""
_MOST_LOGITS = 1_000_000_000
"""Values of a picture's logits at its own size (4 GB): models of many classes take smaller pictures."""
_FORMATS = frozenset({*_SHOWN, "MPO"})
_NAME = Path("image")
"""What messages call an upload; the file's own name never leaves the browser."""


class RefusedError(Exception):
    """A request that is answered with a status and one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Served:
    """A bundle with its model in memory."""

    def __init__(self, path: str | Path, builder: Any = None) -> None:
        self.bundle: Bundle = open_bundle(path)
        self.model: LoadedModel = load(path, builder=builder)
        self.name = self.bundle.path.resolve().name
        self.branches = tuple(self.model.branch_of) if len(self.model.spaces) > 1 else ()
        """Names to choose a branch by; empty where there is one branch only."""
        outputs = max(space.num_classes for space in self.model.spaces.values())
        self.max_pixels = min(MAX_PIXELS, _MOST_LOGITS // outputs)
        # browsers turn what they show upright, and the mask has to fit that
        self.reading = replace(self.model.form.reading, max_pixels=self.max_pixels, exif="apply")

    def predict(self, image: np.ndarray, branch: str | None) -> dict[str, Any]:
        """Classify an image.

        Args:
            image: (H, W, 3) uint8.
            branch: one of `branches`; None for a model with one.

        Returns:
            width, height; mask: the lasting class ids as a grey PNG, as a data URI; pixels: id -> number of pixels;
            seconds.

        Raises:
            RefusedError: not clear which branch, or the model could not do it.
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
        ids = np.array(self.bundle.registry.ids(self.model.spaces[found.branch]), np.uint8)[found.ids]
        counts = np.bincount(ids.ravel(), minlength=256)
        return {
            "width": ids.shape[1],
            "height": ids.shape[0],
            "mask": _data_uri(ids),
            "pixels": {str(i): int(counts[i]) for i in np.flatnonzero(counts)},
            "seconds": round(time.monotonic() - begun, 3),
        }


def class_list(served: Sequence[Served]) -> list[dict[str, Any]]:
    """Every class of the bundles, by name: name, colour, background, its id in each bundle (None where unknown).

    A class has the first bundle's name and colour; where another's colour is taken already, the next free one.

    Raises:
        ConfigError: two classes of one bundle are one name, so that it is open which of them another bundle's is.
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
    """What was made of the class names of two bundles that differ in spelling or that one of them knows alone."""
    if len(served) == 1:
        return []
    a, b = (one.name for one in served)
    found = _matched(served)
    notes = [f"class '{theirs}' of {b} is shown as '{ours}' of {a}" for theirs, ours in found.respelt.items()]
    for name, lonely in ((a, found.unmatched_known), (b, found.unmatched_wanted)):
        if lonely:
            notes.append(f"only {name} knows {some(lonely, 12)}: where it sees them the two always differ")
    return notes


def _matched(served: Sequence[Served]) -> Matching:
    """The second bundle's classes among the first one's."""
    first, second = (
        [entry.name for entry in one.bundle.registry.classes if entry.branches] for one in served
    )
    return match_names(second, first, what=(f"classes of {served[1].name}", f"classes of {served[0].name}"))


def decode_upload(data: bytes, reading: Reading) -> np.ndarray:
    """Decode an uploaded picture: (H, W, 3) uint8.

    Raises:
        RefusedError: no picture, damaged, of a format that browsers do not show, or too large.
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
    """Raise where a body is not announced as a picture."""
    if content_type.partition(";")[0].strip().lower() not in TYPES:
        raise RefusedError(415, f"Send the picture itself, as {_names()}.")


def _known(colour: tuple[int, ...], served: Sequence[Served]) -> bool:
    return any(colour == tuple(entry.colour) for one in served for entry in one.bundle.registry.classes)


def _first_clause(error: DataError) -> str:
    """What is wrong with the picture; what to do with files of a data set does not fit here."""
    return str(error).partition(";")[0]


def _names() -> str:
    return ", ".join(name.removeprefix("image/").upper() for name in TYPES)


def _data_uri(ids: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(ids).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
