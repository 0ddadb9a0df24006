"""A web page for trying bundles on this machine.

Clients send the bytes of pictures, never names of files. The server refuses requests that other web sites could make a
browser send.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from everseg.data.class_colours import palette, png
from everseg.data.datasets.decode import (
    PictureTooLargeError,
    Reading,
    open_picture,
    read_image,
)
from everseg.data.demo.scenes import scene
from everseg.deploy.bundle import Bundle, open_signed
from everseg.deploy.class_ids import mask_type
from everseg.deploy.history import taught_text
from everseg.deploy.http_server import Answer, HttpServer, Patience, RefusedError, Request, Work
from everseg.deploy.page_files import template
from everseg.deploy.workers import Job, Workers
from everseg.display import UNDEFINED, Piece, Result, count, counted, escaped, percent, printable, share, size
from everseg.errors import CheckpointError, ConfigError, DataError, first_clause, some
from everseg.files import real_path
from everseg.inference.predict import LoadedModel, load
from everseg.labels import IGNORED, Matching, match_names
from everseg.models.branch_choice import can_choose
from everseg.models.folding import united

HOST = "127.0.0.1"
TIMEOUT = 120.0
"""Seconds that one prediction may take."""
_LONGEST = 86_400.0
"""Seconds of the longest timer: a day."""
_GRACE = 10.0
"""Seconds beyond that for sending its answer when the server is stopped."""
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/draw.js": ("draw.js", "text/javascript; charset=utf-8"),
    "/batch.js": ("batch.js", "text/javascript; charset=utf-8"),
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


class Server(HttpServer):
    """Serves one or two bundles until `shutdown`. It runs one prediction at a time, or a few (`workers`)."""

    def __init__(
        self,
        bundles: Sequence[str | Path],
        port: int = 8000,
        *,
        builder: Any = None,
        precision: str | None = None,
        require_signature: str | Path | None = None,
        workers: int = 1,
        timeout: float = TIMEOUT,
        patience: Patience | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Load the bundles and listen on the loopback address.

        Args:
            bundles: one or two bundles.
            port: the port to listen on; 0 chooses a free one.
            builder: the builder of your own architecture, if the models are not built-in ones.
            precision: predict with the bundles' ONNX files of this precision; None = with PyTorch.
            require_signature: file of the public key that must have signed the bundles.
            workers: predictions at a time. With more than 1 each runs in a process of its own, which holds the models.
            timeout: seconds that one prediction may take.
            patience: seconds that clients have.
            log: receives a line about each prediction and each unexpected failure. The line says nothing about the
                content of the picture.

        Raises:
            ConfigError: there are not one or two bundles, `timeout` is not above 0, a name may mean two classes of a
                bundle, or the server cannot listen on the port.
            CheckpointError: a bundle is missing or damaged.
        """
        if not 1 <= len(bundles) <= 2:
            raise ConfigError(f"serve shows one or two bundles, not {len(bundles)}")
        if not timeout > 0:  # NaN is not either
            raise ConfigError(
                f"timeout: expected the seconds that one prediction may take, more than 0, got {timeout}"
            )
        if workers < 1 or (workers > 1 and builder is not None):
            raise ConfigError(
                f"--workers {workers}: expected 1 or more"
                if workers < 1
                else "--workers and an architecture of your own (--model) exclude each other"
            )
        self.served = [Served(path, builder, timeout, precision, require_signature) for path in bundles]
        self.classes, self.notes = class_list(self.served), class_notes(self.served)
        try:
            super().__init__(HOST, port, replace(patience or Patience(), end=timeout + _GRACE), log, workers)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--port {port}: cannot listen there ({reason}); give another port") from None
        self.workers: Workers | None = None
        self._counting = threading.Lock()
        if workers > 1:
            job = Job(
                predictor,
                {
                    "bundles": [(str(one.bundle.path), one.bundle.digest) for one in self.served],
                    "precision": precision, "require_signature": require_signature,
                    "threads": max(1, torch.get_num_threads() // workers),
                },
            )  # fmt: skip
            try:
                self.workers = Workers(workers, job, timeout)
            except BaseException:
                super().server_close()
                raise
        names = [f"{name}:{self.server_port}" for name in (HOST, "localhost")]
        self.hosts = frozenset([*names, *([HOST, "localhost"] if self.server_port == 80 else [])])
        self.files = {path: (template(name), kind) for path, (name, kind) in _FILES.items()}
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
            "limits": {
                "bytes": self.limits.upload, "pixels": min(one.max_pixels for one in self.served), "side": MAX_SIDE,
            },
            "types": TYPES,
        }  # fmt: skip

    def check(self, request: Request) -> None:
        """Refuse foreign host names that resolve to this machine (DNS rebinding), and requests from other sites."""
        hosts = request.all("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            raise RefusedError(403, f"This page is at {self.url} only.")
        origin = request.one("origin").lower()
        if origin and origin not in {f"http://{host}" for host in self.hosts}:
            raise RefusedError(403, "Requests of other sites are refused.")
        if request.one("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise RefusedError(403, "Requests of other sites are refused.")

    def get(self, request: Request) -> Answer:
        """Give the page, what it needs to know, or how the server is."""
        if request.path == "/info":
            return _json(self.info())
        if request.path == "/share":
            return _json({"text": share_text(request.query)})
        if request.path == "/health":
            return _json({"status": "ok", "bundles": [one.name for one in self.served]})
        if request.path == "/metrics":
            return Answer(
                self.metrics().encode(), "text/plain; version=0.0.4; charset=utf-8", headers=_HEADERS
            )
        if request.path not in self.files:
            raise RefusedError(404, "There is no such page.")
        return Answer(*self.files[request.path], headers=_HEADERS)

    def post(self, request: Request) -> Work:
        """Check what is to be predicted with which bundle."""
        if request.path != "/predict":
            raise RefusedError(404, "There is no such page.")
        if unknown := sorted(set(request.query) - {"bundle", "domain"}):
            raise RefusedError(400, f"Only bundle and domain may be given, not {len(unknown)} more.")
        which = request.query.get("bundle", "0")
        if which not in [str(i) for i in range(len(self.served))]:
            raise RefusedError(400, f"bundle: 0 to {len(self.served) - 1} are here.")
        served = self.served[int(which)]
        branch = request.query.get("domain")
        served.check_branch(branch)
        check_type(request.one("content-type"))

        def work(file: BinaryIO) -> Answer:
            # Decoding is a part of the work, so that large pictures are decoded one at a time.
            if self.workers is None:
                done = served.predict(decode_upload(file, served.reading), branch)
            else:
                done = self._elsewhere(self.workers, int(which), file.read(), branch)
            self.log(f"bundle {which}: {done['width']}x{done['height']} in {done['seconds']:.2f} s")
            return _json(done)

        return work

    def _elsewhere(self, workers: Workers, which: int, data: bytes, branch: str | None) -> dict[str, Any]:
        """Let another process predict, and count it as if it had been done here."""
        begun, served = time.monotonic(), self.served[which]
        try:
            done: dict[str, Any] = workers.call(which, data, branch)
        finally:
            with self._counting:
                served.seconds += time.monotonic() - begun
        with self._counting:
            served.done += 1
        return done

    def server_close(self) -> None:
        """Free the port, and end the other processes."""
        super().server_close()
        if self.workers is not None:
            self.workers.close()

    def refusal(self, status: int, text: str) -> Answer:
        """Word a refusal as the page expects it."""
        return replace(_json({"error": text}), status=status)

    def give_up(self) -> None:
        """End the prediction that runs, and begin no other."""
        for one in self.served:
            one.give_up()
        if self.workers is not None:
            self.workers.kill()

    def metrics(self) -> str:
        """Return what happened since the start and what is going on, as Prometheus reads it."""
        rows: list[tuple[str, str, Sequence[tuple[str, float]]]] = [
            ("requests_total", "counter", [(f'{{status="{code}"}}', n) for code, n in sorted(self._answered.items())]),
            ("predictions_total", "counter", [(f'{{bundle="{i}"}}', one.done) for i, one in enumerate(self.served)]),
            ("prediction_seconds_total", "counter",
             [(f'{{bundle="{i}"}}', round(one.seconds, 3)) for i, one in enumerate(self.served)]),
            *((name, "gauge", [("", value)]) for name, value in self.figures().items()),
        ]  # fmt: skip
        return "".join(
            f"# TYPE everseg_serve_{name} {kind}\n"
            + "".join(f"everseg_serve_{name}{labels} {value}\n" for labels, value in values)
            for name, kind, values in rows
        )


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
        """Finish and answer the prediction that runs, then stop and free the port."""
        if self._thread.is_alive():  # `shutdown` would wait for ever for a thread that has ended
            try:
                self._server.shutdown()
            except KeyboardInterrupt:  # a second Ctrl-C
                self._server.give_up()
                raise
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
    precision: str | None = None,
    require_signature: str | Path | None = None,
    workers: int = 1,
    timeout: float = TIMEOUT,
    quiet: bool = False,
) -> Serving:
    """Serve a page on this machine that shows the classes of one or two bundles on images dropped there.

    The page answers in the background, and the call returns at once.

    Args:
        bundle: the bundle to try.
        other: another bundle to compare it with.
        port: the port on 127.0.0.1; 0 chooses a free one.
        builder: the builder of your own architecture, if a bundle has one. It is never imported automatically.
        precision: predict with the bundles' ONNX files of this precision ("fp32", "fp16", "int8"); None = with PyTorch.
        require_signature: file of the public key that must have signed the bundles (`everseg sign`).
        workers: predictions at a time. With more than 1 each runs in a process of its own, which holds the models.
        timeout: seconds that one prediction may take, more than 0; then it is given up, and the next one begins.
        quiet: do not print a line on stderr about each prediction.

    Raises:
        ConfigError: the port is taken, or `timeout` is not above 0.
        CheckpointError: a bundle is missing or damaged.
    """
    bundles = [bundle] if other is None else [bundle, other]
    log = (lambda text: None) if quiet else _to_stderr
    server = Server(
        bundles, port, builder=builder, precision=precision, require_signature=require_signature,
        workers=workers, timeout=timeout, log=log,
    )  # fmt: skip
    return Serving(server)


def _to_stderr(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")


def _json(value: Any) -> Answer:
    return Answer(json.dumps(value).encode(), "application/json", headers=_HEADERS)


_SHOWN = ("PNG", "JPEG", "WEBP", "BMP")
"""Formats that browsers can show and everseg can decode."""
TYPES = tuple(f"image/{form.lower()}" for form in _SHOWN)
"""Content types of these formats."""
AUTO = "auto"
"""What to give as the domain if the model shall choose it, where it can."""
MAX_PIXELS = 16_000_000
"""Largest number of pixels. A larger picture is refused before it is decoded."""
MAX_SIDE = 16_384
"""Longest side of a picture. Networks and browsers pad or cut what is longer."""
_LEAST = 64
"""Pixels that a short side counts as: a network pads to as many, so 16 million x 1 would become a billion."""
_MOST_LOGITS = 1_000_000_000
"""Largest number of logits of a picture at its own size (4 GB). It limits the pictures for models of many classes."""
_FORMATS = frozenset({*_SHOWN, "MPO"})
EXAMPLE = 3
"""Seed of the example picture; the demo's own scenes have other ones."""
_NAME = Path("image")
"""Name of an upload in messages. The real name of the file never leaves the browser."""


class TookTooLongError(Exception):
    """A prediction has had its time."""


class Served:
    """A bundle whose model is loaded into memory."""

    def __init__(
        self,
        path: str | Path,
        builder: Any = None,
        timeout: float = TIMEOUT,
        precision: str | None = None,
        require_signature: str | Path | None = None,
    ) -> None:
        self.bundle: Bundle = open_signed(path, require_signature)
        self.model: LoadedModel = load(
            path, builder=builder, precision=precision, require_signature=require_signature
        )
        self.model.check_alone()
        if (channels := self.model.form.channels) is not None:
            raise ConfigError(
                f"{path}: the model sees {counted(len(channels), 'channel')} of {channels.bits} bits, which no "
                "browser shows; "
                "use everseg predict"
            )
        self.model.model = united(self.model.model)
        self.precision = precision
        self.timeout, self.done, self.seconds = timeout, 0, 0.0
        """Seconds that a prediction may take; predictions so far; seconds that all of them took, failures included."""
        self._until, self._given_up = math.inf, False
        # A thread cannot be stopped from outside, so it looks at the clock itself.
        for module in self.model.model.modules():
            module.register_forward_pre_hook(self._look_at_the_clock)
        self.name = real_path(self.bundle.path).name
        ids = [raw for space in self.model.spaces.values() for raw in self.bundle.registry.ids(space)]
        if mask_type(ids) is not np.uint8:
            # A browser reads 8 bits of every channel from a picture: ids of 16 bits would become others.
            raise ConfigError(
                f"{path}: class ids up to {max(ids)}, and the page shows masks of bytes (ids to {IGNORED - 1}); use "
                "everseg predict, or the ONNX file, whose masks have 16 bits"
            )
        names = tuple(self.model.branch_of) if len(self.model.spaces) > 1 else ()
        self.chooses = can_choose(self.model.model) and AUTO not in names
        self.branches = (*names, AUTO) if self.chooses else names
        """Names for choosing a branch; empty if there is only one branch. The last one may be AUTO."""
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
            rows.append(
                (f"Step {entry['step']}", f"{taught_text(entry)} ({method}{counted(images, 'image')})")
            )
        last = lineage["history"][-1] if lineage["history"] else {}
        tested = "; ".join(
            f"{counted(source['images'], 'image')} of {source['data']}" for source in last.get("test", ())
        )
        for name, scores in last.get("scores", {}).items():
            # The name of the result says something only where there are several.
            where = tested if len(last["scores"]) == 1 else name
            if (value := scores["miou"]["all"]) is not None:
                rows.append(("mIoU", f"{percent(value)} %" + (f" on {where}" if where else "")))
        weights = sum(weight.numel() for weight in self.model.model.parameters())
        name = "model.safetensors"
        if self.model.onnx is not None:
            name = next(iter(self.bundle.about.onnx_files(self.precision or "").values()))
            rows.append(("Run by", f"onnxruntime, {self.precision}"))
        rows.append(("Model", f"{count(weights)} weights, {size((self.bundle.path / name).stat().st_size)}"))
        return rows

    def _look_at_the_clock(self, module: Any, inputs: Any) -> None:
        if self._given_up or time.monotonic() > self._until:
            raise TookTooLongError

    def give_up(self) -> None:
        """End the prediction that runs, and every later one at its first layer: its image may still be decoded now."""
        self._given_up = True
        if self.model.onnx is not None:
            self.model.onnx.give_up()

    @contextlib.contextmanager
    def _having(self, seconds: float) -> Iterator[None]:
        """Give a prediction so much time.

        Raises:
            TookTooLongError: it took longer.
        """
        self._until = time.monotonic() + seconds
        onnx = self.model.onnx
        timer = (
            None if onnx is None else threading.Timer(min(seconds, _LONGEST), onnx.give_up)
        )  # it does not look at the clock
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
        except RuntimeError:
            if onnx is not None and (self._given_up or time.monotonic() >= self._until):
                raise TookTooLongError from None
            raise
        finally:
            self._until = math.inf
            if timer is not None and onnx is not None:
                timer.cancel()
                if not self._given_up:
                    onnx.go_on()

    def check_branch(self, branch: str | None) -> None:
        """See that it is clear which branch to use.

        Raises:
            RefusedError: it is not.
        """
        if (branch not in self.branches) if self.branches else (branch is not None):
            names = ", ".join(self.branches) or "one branch only: leave domain out"
            raise RefusedError(400, f"domain: {self.name} has {names}.")

    def predict(self, image: np.ndarray, branch: str | None) -> dict[str, Any]:
        """Classify an image.

        Args:
            image: (H, W, 3) uint8.
            branch: one of `branches`; None for a model with one.

        Returns:
            A dictionary with width, height, mask (data URI of a grey PNG of lasting class ids), pixels (id -> number of
            pixels), shares (id -> its share of the pixels as text), seconds, and of a model with several branches
            domain (the branch taken).

        Raises:
            RefusedError: it is unclear which branch to use, the model failed, or it took longer than `timeout`.
        """
        self.check_branch(branch)
        begun = time.monotonic()
        try:
            auto = self.chooses and branch == AUTO
            with self._having(self.timeout):
                found = self.model.predict(image, branch=None if auto else branch, infer_domain=auto)
        except TookTooLongError:
            if self._given_up:
                raise RefusedError(503, "The server is being stopped.") from None
            raise RefusedError(
                504, f"{self.name} took longer than {self.timeout:g} s for this image; try a smaller one."
            ) from None
        except (MemoryError, RuntimeError):
            raise RefusedError(
                500, f"{self.name} could not classify this image; a smaller one may fit into memory."
            ) from None
        finally:
            self.seconds += time.monotonic() - begun
        self.done += 1
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
            **({"domain": found.branch} if self.branches else {}),
        }


def predictor(
    bundles: Sequence[tuple[str, str]],
    precision: str | None,
    require_signature: str | Path | None,
    threads: int,
) -> Callable[[int, bytes, str | None], dict[str, Any]]:
    """Load bundles in another process. Return what predicts an upload with one of them, as `Server` does.

    Args:
        bundles: folder of each, and digest of the bundle that the main process has loaded from it. A process may begin
            hours later, in the place of one that died; the folder may hold another bundle by then.
        precision: as for `Server`.
        require_signature: as for `Server`.
        threads: how many this process uses.

    Raises:
        CheckpointError: a bundle is missing, damaged, not signed with the key, or another one by now.
    """
    torch.set_num_threads(threads)
    # The main process ends a process that takes too long.
    served = [
        Served(path, timeout=math.inf, precision=precision, require_signature=require_signature)
        for path, _ in bundles
    ]
    for one, (_, digest) in zip(served, bundles, strict=True):
        if one.bundle.digest != digest:
            raise CheckpointError(
                f"{one.bundle.path} is another bundle than when the server started; start it again"
            )

    def predict(which: int, data: bytes, branch: str | None) -> dict[str, Any]:
        one = served[which]
        return one.predict(decode_upload(io.BytesIO(data), one.reading), branch)

    return predict


def example_picture() -> bytes:
    """Make the picture of the page's example: a generated street scene, because bundles hold no pictures of their own.

    Returns:
        A PNG file.
    """
    image, _ = scene(EXAMPLE, (128, 192))
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
    free = iter([tuple(colour) for colour in palette(256, background=None).tolist()])
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


def decode_upload(file: BinaryIO, reading: Reading) -> np.ndarray:
    """Decode an uploaded picture to (H, W, 3) uint8.

    Raises:
        RefusedError: the data are no picture, are damaged or too large, or have a format that browsers do not show.
    """
    try:
        picture = open_picture(file, _NAME, reading)
        if picture.format not in _FORMATS:
            raise RefusedError(415, f"{picture.format} pictures are not taken here: use {_names()}.")
        width, height = picture.size
        if max(width, height) > MAX_SIDE or max(width, _LEAST) * max(height, _LEAST) > reading.max_pixels:
            raise RefusedError(
                413, f"The image has {width}x{height} pixels; at most {MAX_SIDE} a side are taken here, and "
                f"{reading.max_pixels} in all, where a side counts as {_LEAST} at least."
            )  # fmt: skip
        return read_image(picture, reading)
    except PictureTooLargeError as error:
        raise RefusedError(413, f"The {first_clause(error)}.") from None
    except DataError as error:
        raise RefusedError(400, f"The {first_clause(error)}.") from None


def check_type(content_type: str) -> None:
    """Raise a RefusedError if the content type of a body is not that of a picture."""
    if content_type.partition(";")[0].strip().lower() not in TYPES:
        raise RefusedError(415, f"Send the picture itself, as {_names()}.")


def _known(colour: tuple[int, ...], served: Sequence[Served]) -> bool:
    return any(colour == tuple(entry.colour) for one in served for entry in one.bundle.registry.classes)


def _names() -> str:
    return ", ".join(name.removeprefix("image/").upper() for name in TYPES)


def _data_uri(ids: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(ids).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
