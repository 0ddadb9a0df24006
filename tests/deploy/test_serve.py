"""The local page's server: what it answers, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from untrained import make_bundle
from untrained import picture as squares

import everseg
from everseg.deploy import serve
from everseg.deploy.bundle import open_bundle
from everseg.deploy.http_server import Limits, Patience, RefusedError, parse_head
from everseg.deploy.serve import Served, Server, class_list
from everseg.display import count, share
from everseg.errors import CheckpointError, ConfigError
from saying import must_say


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> list[Path]:
    """One of four classes, and one over two domains that shares two of them."""
    out = tmp_path_factory.mktemp("bundles")
    a = make_bundle(out / "a", {"all": ["background", "red", "green", "blue"]})
    b = make_bundle(out / "b", {"day": ["background", "blue", "crate"], "dusk": ["background", "crate"]}, 1)
    return [a, b]


@pytest.fixture(scope="module")
def server(bundles) -> Iterator[Server]:
    with running(bundles) as one:
        yield one


class running:  # noqa: N801
    """A server in a thread."""

    def __init__(self, bundles: list[Path], **options) -> None:
        self.lines: list[str] = []
        limits = options.pop("limits", None)
        self.server = Server(bundles, 0, log=self.lines.append, **options)
        if limits is not None:
            self.server.limits = limits
        self.server.lines = self.lines

    def __enter__(self) -> Server:
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def ask(
    server: Server, method: str = "POST", path: str = "/predict", body: bytes | None = None, **headers: str
) -> tuple[int, dict | bytes, http.client.HTTPMessage]:
    """Status, body and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    sent = {"Content-Type": "image/png"} if method == "POST" else {}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    if answer.headers.get_content_type() == "application/json" and data:
        return answer.status, json.loads(data), answer.headers
    return answer.status, data, answer.headers


def raw(server: Server, text: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(text)
        received = b""
        while data := connection.recv(65536):
            received += data
        return received


def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=20)


def upload(server: Server, length: int, more: bytes = b"") -> bytes:
    """The head of an upload."""
    head = f"POST /predict HTTP/1.1\r\nHost: {server.url[7:-1]}\r\nContent-Type: image/png\r\n".encode()
    return head + more + f"Content-Length: {length}\r\n\r\n".encode()


def until_true(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def picture(kind: str = "PNG", size: tuple[int, int] = (96, 128), **options) -> tuple[np.ndarray, bytes]:
    pixels = squares(*size)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return pixels, file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a huge picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def mask_of(answer: dict) -> np.ndarray:
    data = base64.b64decode(answer["mask"].removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_mask_holds_the_lasting_ids_of_what_the_model_predicts(server, bundles):
    pixels, data = picture()
    for bundle, domain in ((0, None), (1, "day"), (1, "dusk")):
        path = f"/predict?bundle={bundle}" + (f"&domain={domain}" if domain else "")
        status, answer, _ = ask(server, "POST", path, data)
        assert status == 200, answer
        found = everseg.load(bundles[bundle]).predict(pixels, branch=domain)
        ids = {entry.name: entry.id for entry in open_bundle(bundles[bundle]).registry.classes}
        expected = np.vectorize(lambda i, f=found, n=ids: n[f.classes[i]])(found.ids)
        np.testing.assert_array_equal(mask_of(answer), expected)
        assert len(np.unique(expected)) == len(found.classes), "every class is somewhere"
        values, counts = np.unique(expected, return_counts=True)
        assert answer["pixels"] == {str(v): c for v, c in zip(values.tolist(), counts.tolist(), strict=True)}
        assert answer["shares"] == {str(v): share((expected == v).mean()) for v in values.tolist()}
        assert (answer["width"], answer["height"]) == (128, 96)


@pytest.mark.parametrize(("query", "text"), [
    ("part=0&whole=5", "0.0 %"), ("part=1&whole=5000", "< 0.1 %"), ("part=5&whole=5", "100.0 %"),
    ("", None), ("part=1", None), ("part=1&whole=0", None), ("part=2&whole=1", None), ("part=-1&whole=5", None),
    ("part=1&whole=5&more=1", None), ("part=²&whole=5", None), ("part=1&whole=" + "9" * 500, None),
])  # fmt: skip
def test_the_server_words_the_share_of_pixels_where_two_masks_differ(server, query, text):
    status, answer, _ = ask(server, "GET", f"/share?{quote(query, safe='=&')}")
    assert (status, answer.get("text")) == (400 if text is None else 200, text)


def test_pictures_are_turned_as_browsers_turn_them(server):
    exif = Image.Exif()
    exif[0x0112] = 6
    status, answer, _ = ask(server, body=picture("JPEG", exif=exif)[1], Content_Type="image/jpeg")
    assert (status, answer["width"], answer["height"]) == (200, 96, 128)


def test_the_page_and_what_it_may_do(server):
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        status, body, headers = ask(server, "GET", path)
        assert status == 200
        assert headers.get_content_type() == kind
        assert body
        assert b"http:" not in body
        assert b"https:" not in body
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_info_names_bundles_branches_and_classes_once(server, bundles):
    status, info, _ = ask(server, "GET", "/info")
    assert status == 200
    named = [(one["name"], one["branches"]) for one in info["bundles"]]
    assert named == [("a", []), ("b", ["day", "dusk"])]
    weights = sum(weight.numel() for weight in everseg.load(bundles[0]).model.parameters())
    assert dict(info["bundles"][0]["about"])["Model"].startswith(f"{count(weights)} weights, ")
    assert [(row["name"], row["ids"], row["background"]) for row in info["classes"]] == [
        ("background", [0, 0], True), ("red", [1, None], False), ("green", [2, None], False),
        ("blue", [3, 1], False), ("crate", [None, 2], False),
    ]  # fmt: skip
    assert str(bundles[0].parent) not in json.dumps(info)


def test_the_page_says_when_and_from_what_a_bundle_was_made():
    about = Served(Path(__file__).parents[1] / "fixtures" / "bundle-format-1").about()
    assert [what for what, _ in about] == ["Made", "Step 0", "Step 1", "mIoU", "Model"]
    told = dict(about)
    assert told["Made"] == "2026-11-28"
    must_say(told["Step 0"], "road, building, tree, car", "mib", "128 images")
    must_say(told["Step 1"], "person, sign", "115 images")
    must_say(told["mIoU"], "%", "4 images of demo/val")


def test_the_example_is_a_picture_that_the_page_can_take(server):
    status, body, headers = ask(server, "GET", "/example.png")
    assert (status, headers.get_content_type()) == (200, "image/png")
    assert np.ptp(np.asarray(Image.open(io.BytesIO(body)))) > 100


def test_two_classes_never_share_a_colour(bundles):
    rows = class_list([Served(path) for path in bundles])
    assert len({tuple(row["colour"]) for row in rows}) == len(rows)
    first = open_bundle(bundles[0]).registry.classes
    assert [row["colour"] for row in rows[:4]] == [list(entry.colour) for entry in first]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Host": "LOCALHOST:{port}", "Origin": "http://localhost:{port}"}, 200),
    ],
)
def test_other_names_and_other_sites_are_refused(server, headers, status):
    filled = {name: value.format(port=server.server_port) for name, value in headers.items()}
    assert ask(server, "GET", "/info", **filled)[0] == status
    assert ask(server, body=picture()[1], **filled)[0] == status


def test_it_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/predict?bundle=2", 400), ("/predict?bundle=-1", 400), ("/predict?bundle=a", 400), ("/predict?bundle=", 400),
        ("/predict?bundle=1", 400), ("/predict?bundle=1&domain=night", 400), ("/predict?bundle=0&domain=day", 400),
        ("/predict?path=photo.png", 400), ("/../../etc/passwd", 404), ("/photo.png", 404),
    ],
)  # fmt: skip
def test_what_may_be_asked_for(server, path, status):
    found, answer, _ = ask(server, "POST", path, picture()[1])
    assert found == status
    assert answer["error"].endswith(".")
    if status == 404:
        assert ask(server, "GET", path)[0] == status


def test_a_missing_domain_is_told_by_name(server):
    assert "day, dusk" in ask(server, "POST", "/predict?bundle=1", picture()[1])[1]["error"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "text"),
    [
        (b"", "image/png", 400, "empty"),
        (b"hello, I am text", "image/png", 400, "is text"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/png", 400, "not a picture"),
        (picture()[1][:-60], "image/png", 400, "damaged"),
        (picture()[1], "image/tiff", 415, "the picture itself"),
        (picture()[1], "application/x-www-form-urlencoded", 415, "the picture itself"),
        (picture()[1], "text/plain", 415, "the picture itself"),
        (picture("TIFF")[1], "image/png", 415, "TIFF"),
        (bomb(5000, 5000), "image/png", 413, "5000x5000"),
        (bomb(60_000, 60_000), "image/png", 413, "60000x60000"),
        (bomb(16_000_000, 1), "image/png", 413, "16000000x1"),
        (bomb(1, 16_385), "image/png", 413, "1x16385"),
        (picture(size=(1, 16_384))[1], "image/png", 200, None),
    ],
)  # fmt: skip
def test_wrong_content_gets_a_sentence(server, body, kind, status, text):
    found, answer, _ = ask(server, body=body, Content_Type=kind)
    if status == 200:
        assert found == status
        return
    assert (found, list(answer)) == (status, ["error"])
    assert text in answer["error"]
    assert status != 413 or "16000000" in answer["error"]
    assert "data.options" not in answer["error"]
    assert answer["error"].endswith(".")


def test_many_classes_lower_the_limit_of_pixels(bundles, monkeypatch):
    monkeypatch.setattr("everseg.deploy.serve._MOST_LOGITS", 4 * 96 * 128 - 1)
    with running(bundles[:1]) as server:
        assert ask(server, body=picture()[1])[0] == 413
        assert ask(server, body=picture(size=(96, 127))[1])[0] == 200


def test_lengths_are_given_and_bounded(server, monkeypatch):
    monkeypatch.setattr(server, "limits", Limits(upload=1_000_000))
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Type: image/png\r\n".encode()
    for lines, status in (
        (b"", b"411"),
        (b"Transfer-Encoding: chunked\r\n", b"411"),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"411"),
        (b"Content-Length: -5\r\n", b"400"),
        (b"Content-Length: 5\r\nContent-Length: 6\r\n", b"400"),
        (b"Content-Length: 1000001\r\n", b"413"),
        (b"Content-Length: " + b"9" * 5000 + b"\r\n", b"413"),
    ):
        assert raw(server, head + lines + b"\r\nhello").split()[1] == status, lines
    assert ask(server, body=bytes(1_000_001))[1] == {"error": "The image is larger than 1 MB."}


def test_other_methods_are_refused(server):
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD"):
        assert ask(server, method, "/")[0] == 501
    host = f"Host: 127.0.0.1:{server.server_port}".encode()
    assert b" 400 " in raw(server, b"GET http://[/ HTTP/1.1\r\n" + host + b"\r\n\r\n")
    assert b"Traceback" not in raw(server, b"rubbish\r\n\r\n")


def test_slow_clients_are_let_go(bundles):
    with running(bundles[:1], patience=Patience(head=0.3, idle=0.3, body=0.6)) as server:
        begun = time.monotonic()
        assert raw(server, b"GET / HT") == b"", "a head that stalls"
        assert b" 408 " in raw(server, upload(server, 1000)), "an upload that stalls"
        with connected(server) as connection:
            connection.sendall(upload(server, 1000))
            ended = False
            for _ in range(40):  # a byte now and then does not prolong it
                time.sleep(0.05)
                try:
                    connection.sendall(b"x")
                except OSError:
                    ended = True
                    break
            assert ended
        assert time.monotonic() - begun < 4
        assert ask(server, body=picture()[1])[0] == 200
        assert server.figures()["busy"] == server.figures()["upload_bytes"] == 0


def test_one_prediction_at_a_time_and_a_short_queue(bundles, monkeypatch):
    at_once, most, gate = [0], [0], threading.Event()
    true = Served.predict

    def slow(self, image, path):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        gate.wait(10)
        at_once[0] -= 1
        return true(self, image, path)

    monkeypatch.setattr(Served, "predict", slow)
    data = picture()[1]
    with running(bundles[:1], limits=Limits(waiting=1)) as server:
        results: list[int] = []
        threads = [
            threading.Thread(target=lambda: results.append(ask(server, body=data)[0])) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until_true(lambda: server.figures()["busy"] == 2)
        status, answer, headers = ask(server, body=data)
        assert (status, headers["Retry-After"]) == (503, "2")
        assert "Busy" in answer["error"]
        assert ask(server, "GET", "/info")[0] == 200, "the page still answers"
        gate.set()
        for thread in threads:
            thread.join()
        assert results == [200, 200]
        assert most == [1]
        assert ask(server, body=data)[0] == 200


def test_a_newcomer_pushes_out_who_has_been_sending_its_head_for_longest(bundles):
    with running(bundles[:1]) as server:
        server._most = 2
        with connected(server) as first, connected(server) as second:
            until_true(lambda: server.figures()["connections"] == 2)
            assert ask(server, "GET", "/info")[0] == 200
            assert first.recv(10) == b""
            second.settimeout(0.05)
            with pytest.raises(TimeoutError):
                second.recv(10)
            first.close()
            with connected(server) as third:  # with two uploads that arrive there is no room
                for one in (second, third):
                    one.sendall(upload(server, 1000))
                until_true(lambda: list(server._open.values()) == ["body", "body"])
                status, answer, headers = ask(server, "GET", "/info")
                assert (status, headers["Retry-After"]) == (503, "2")
                must_say(answer["error"], "connections")
            until_true(lambda: server.figures()["connections"] < 2)
            assert ask(server, "GET", "/info")[0] == 200


def test_dripping_and_stalled_clients_hold_up_nobody(bundles):
    """40 heads that drip and 40 uploads that stall: page and prediction answer as if they were not there."""
    data = picture()[1]
    with running(bundles[:1]) as server, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(server)) for _ in range(80)]
        for number, one in enumerate(slow):
            one.sendall(b"GET / HTTP/1.1\r\nX: " if number % 2 else upload(server, 1000) + b"x")
        until_true(lambda: server.figures()["connections"] == 80)
        begun = time.monotonic()
        assert ask(server, "GET", "/")[0] == 200
        for one in slow:
            one.sendall(b"x")
        assert time.monotonic() - begun < 1
        begun = time.monotonic()
        assert ask(server, body=data)[0] == 200
        assert time.monotonic() - begun < 3
        until_true(
            lambda: server.figures()["connections"] == 80
        )  # the prediction's is closed, and none of theirs


def test_uploads_and_answers_together_are_bounded(bundles):
    with running(bundles[:1], limits=Limits(arriving=2000, in_memory=500)) as server:
        with connected(server) as first:
            first.sendall(upload(server, 3000) + bytes(1500))
            until_true(lambda: server.figures()["upload_bytes"] == 1500)
            assert ask(server, body=bytes(400))[0] == 400
            status, _, headers = ask(server, body=bytes(1000))
            assert (status, headers["Retry-After"]) == (503, "2")
        until_true(lambda: server.figures()["upload_bytes"] == 0)
    with running(bundles[:1], limits=Limits(unsent=-1)) as server:
        assert ask(server, body=picture()[1])[0] == 503


class Full(io.BytesIO):
    """A file on a full disk. What it has in its buffer can be written neither later nor when it is closed."""

    when = "write"

    def write(self, data: bytes) -> int:
        if self.when == "write":
            raise OSError(28, "No space left on device")
        return super().write(data)

    def seek(self, place: int, *how: int) -> int:
        if place == 0:
            raise OSError(28, "No space left on device")
        return super().seek(place, *how)

    def close(self) -> None:
        was_open = not self.closed
        super().close()
        if was_open:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("when", ["open", "write", "rewind"])
def test_a_full_disk_for_uploads_is_said(bundles, monkeypatch, when):
    def full(*_: object, **__: object) -> object:
        if when == "open":
            raise OSError(28, "No space left on device")
        return Full()

    monkeypatch.setattr(Full, "when", when)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with running(bundles[:1], limits=Limits(in_memory=10)) as server:
        status, answer, _ = ask(server, body=picture()[1])
        assert status == 503
        must_say(answer["error"], "room")


def test_a_prediction_has_its_time(bundles, monkeypatch):
    with running(bundles[:1], timeout=0.2) as server:
        true = server.served[0].model._ids
        monkeypatch.setattr(server.served[0].model, "_ids", lambda *given: (time.sleep(0.3), true(*given))[1])
        status, answer, _ = ask(server, body=picture()[1])
        assert status == 504, "not 503, after which the page would try again"
        must_say(answer["error"], "0.2 s", "smaller")
        must_say(server.lines, "504", "0.2 s")
        monkeypatch.undo()
        server.served[0].timeout = 60
        assert ask(server, body=picture()[1])[0] == 200, "the next one begins anew"


def test_stopping_lets_the_running_prediction_finish_and_no_other(bundles, monkeypatch):
    gate, begun = threading.Event(), threading.Event()
    true = Served.predict

    def slow(self, image, path):
        begun.set()
        gate.wait(10)
        return true(self, image, path)

    monkeypatch.setattr(Served, "predict", slow)
    results: list[tuple] = []
    with running(bundles[:1]) as server, connected(server) as idle:
        threads = [
            threading.Thread(target=lambda: results.append(ask(server, body=picture()[1]))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until_true(lambda: server.figures()["busy"] == 2 and begun.is_set())
        stop = threading.Thread(target=server.shutdown)
        stop.start()
        assert idle.recv(10) == b"", "who has not asked yet is let go at once"
        with pytest.raises(OSError, match=r"refused|reset"):
            raw(server, b"GET / HTTP/1.1\r\n\r\n")
        gate.set()
        for thread in [*threads, stop]:
            thread.join(10)
    assert sorted(status for status, _, _ in results) == [200, 503]


def test_what_is_given_up_while_its_image_is_decoded_is_not_begun(bundles, monkeypatch):
    """A second Ctrl-C ends the work wherever it is."""
    true = serve.decode_upload
    with running(bundles[:1]) as server:

        def slow(file, reading):
            server.give_up()
            return true(file, reading)

        monkeypatch.setattr(serve, "decode_upload", slow)
        status, answer, _ = ask(server, body=picture()[1])
    assert (status, server.served[0].done) == (503, 0)
    must_say(answer["error"], "stopped")


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan])
def test_a_time_that_is_none_is_refused_before_anything_is_loaded(seconds):
    with pytest.raises(ConfigError) as caught:
        everseg.serve("nowhere", timeout=seconds)
    must_say(caught.value, "timeout", str(seconds))


def test_health_and_metrics(bundles):
    with running(bundles[:1]) as server:
        assert ask(server, "GET", "/health")[1] == {"status": "ok", "bundles": ["a"]}
        assert ask(server, body=picture()[1])[0] == 200
        assert ask(server, "GET", "/nothing")[0] == 404
        _, text, headers = ask(server, "GET", "/metrics")
        assert headers.get_content_type() == "text/plain"
        rows = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
        assert rows['everseg_serve_requests_total{status="200"}'] == "2"
        assert rows['everseg_serve_requests_total{status="404"}'] == "1"
        assert rows['everseg_serve_predictions_total{bundle="0"}'] == "1"
        assert float(rows['everseg_serve_prediction_seconds_total{bundle="0"}']) > 0
        assert rows["everseg_serve_busy"] == "0"


@pytest.mark.parametrize("text", [
    b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
    b"GET / HTTP/1.1\r\nA: b\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nA: \0\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n",
    b"GET  / HTTP/1.1\r\n\r\n", b"get / HTTP/1.1\r\n\r\n", b"GET /\xe9 HTTP/1.1\r\n\r\n", b"\r\n\r\n",
    b"GET http://[/ HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n",
    b"GET /?" + b"a=1&" * 200 + b" HTTP/1.1\r\n\r\n", b"GET /?a=1&a=2 HTTP/1.1\r\n\r\n",
])  # fmt: skip
def test_heads_are_read_strictly(text):
    with pytest.raises(RefusedError):
        parse_head(text)


def test_blanks_around_a_value_are_no_part_of_it_and_take_no_time():
    assert parse_head(b"GET / HTTP/1.1\r\nA: \t b c \t\r\n\r\n").headers == (("a", "b c"),)
    began = time.monotonic()
    with pytest.raises(RefusedError):
        parse_head(b"GET / HTTP/1.1\r\nA:" + b" " * 800 + b"\0\r\n\r\n")
    assert time.monotonic() - began < 1, "all clients wait for it"


def test_who_asks_first_whether_to_send_is_told(server):
    data = picture()[1]
    with connected(server) as connection:
        connection.sendall(upload(server, len(data), b"Expect: 100-continue\r\n"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(data)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    assert b" 431 " in raw(server, b"GET / HTTP/1.1\r\nA: " + b"x" * 20_000 + b"\r\n\r\n")


@pytest.mark.parametrize("kind", [KeyError, OSError, TimeoutError])
def test_faults_of_ours_are_no_news_for_the_client(bundles, monkeypatch, capfd, kind):
    def broken(self, image, path):
        raise kind("a secret of the program")

    monkeypatch.setattr(Served, "predict", broken)
    with running(bundles[:1]) as server:
        status, answer, _ = ask(server, body=picture()[1])
        assert (status, answer) == (500, {"error": "Something went wrong on the server."})
        assert server.lines == [f"a request failed: {kind.__name__}"]
        monkeypatch.setattr(Served, "about", lambda self: open("no such file"))  # noqa: SIM115, PTH123
        assert ask(server, "GET", "/info")[0] == 500
    assert capfd.readouterr().err == ""


def test_a_model_that_runs_out_of_memory_says_so(bundles, monkeypatch):
    with running(bundles[:1]) as server:
        monkeypatch.setattr(server.served[0].model, "predict", lambda *_, **__: 1 / 0)
        assert ask(server, body=picture()[1])[1]["error"].startswith("Something went wrong")

        def full(*_, **__):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(server.served[0].model, "predict", full)
        must_say(ask(server, body=picture()[1])[1]["error"], "smaller")


def test_what_cannot_be_served(bundles, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Server([tmp_path / "none"], 0)
    with pytest.raises(ConfigError, match="one or two"):
        Server([*bundles, bundles[0]], 0)
    with running(bundles[:1]) as server, pytest.raises(ConfigError, match="cannot listen there"):
        Server(bundles[:1], server.server_port)


@pytest.mark.parametrize("ends", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_command_says_where_and_ends_with_an_interrupt(bundles, ends):
    with command(bundles) as one:
        try:
            line = one.stdout.readline()
            assert line.startswith("open http://127.0.0.1:"), line
            port = int(line.split("/")[2].split(":")[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/info")
            assert json.loads(connection.getresponse().read())["bundles"][0]["name"] == "a"
            connection.close()
            one.send_signal(ends)
            _, errors = one.communicate(timeout=60)
        finally:
            one.kill()
    *notes, last = errors.splitlines()
    assert (one.returncode, last) == (0, "stopped")
    assert [note.partition(":")[2].strip()[:12] for note in notes] == ["only a knows", "only b knows"]


def command(bundles: list[Path]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "everseg", "serve", *map(str, bundles), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a shell that runs the tests in the background has them ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux tells it")
def test_200_uploads_at_once_take_100_mb_at_most(bundles, tmp_path):
    """200 pictures of 3 MB: nine places, and everybody else is told to come back; memory as `docs/deploy.md` says."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)).save(file, "PNG")
    data = file.getvalue()
    with command(bundles[:1]) as one:
        try:
            port = int(one.stdout.readline().split("/")[2].split(":")[1])
            memory = Path(f"/proc/{one.pid}")
            (memory / "clear_refs").write_text("5")
            asyncio.run(flood(port, data, 1))
            before = peak(memory)  # with what one prediction takes
            begun = time.monotonic()
            answers = asyncio.run(flood(port, data, 200))
            seconds, taken = time.monotonic() - begun, peak(memory) - before
        finally:
            one.kill()
    print(f"{len(data) / 1e6:.1f} MB each: {seconds:.1f} s, {taken / 1e6:.0f} MB, {Counter(answers)}")
    assert set(answers) <= {200, 503}
    assert answers.count(200) >= 8
    assert taken < 100e6


async def flood(port: int, data: bytes, count: int) -> list[int]:
    """Status of each of so many uploads at once."""

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /predict HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: image/png\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode())
        writer.write(data)
        status = int((await reader.readline()).split()[1])
        await reader.read()
        writer.close()
        return status

    return await asyncio.wait_for(asyncio.gather(*(one() for _ in range(count))), 120)


def peak(process: Path) -> int:
    """The most memory that a process had since its count was reset, in bytes."""
    text = (process / "status").read_text()
    return 1024 * int(text.split("VmHWM:")[1].split()[0])
