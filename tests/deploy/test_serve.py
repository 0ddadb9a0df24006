"""The local page's server: what it answers, what it refuses, and how it ends."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from untrained import make_bundle
from untrained import picture as squares

import everseg
from everseg.deploy import serve as serve_module
from everseg.deploy.bundle import open_bundle
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
        self.server = Server(bundles, 0, log=self.lines.append, **options)
        self.server.lines = self.lines

    def __enter__(self) -> Server:
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
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
    ],
)  # fmt: skip
def test_wrong_content_gets_a_sentence(server, body, kind, status, text):
    found, answer, _ = ask(server, body=body, Content_Type=kind)
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
    monkeypatch.setattr(serve_module, "MAX_BYTES", 1_000_000)
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
    with running(bundles[:1], patience=0.4) as server:
        begun = time.monotonic()
        assert raw(server, b"GET / HT") == b""
        head = f"POST /predict HTTP/1.1\r\nHost: {server.url[7:-1]}\r\nContent-Type: image/png\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n")
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
        assert ask(server, body=picture()[1])[0] == 200, "its place is free again"


def test_one_prediction_at_a_time_and_a_short_queue(bundles, monkeypatch):
    monkeypatch.setattr(serve_module, "WAITING", 1)
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
    with running(bundles[:1]) as server:
        results: list[int] = []
        threads = [
            threading.Thread(target=lambda: results.append(ask(server, body=data)[0])) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while server.places._value and time.monotonic() < until:
            time.sleep(0.01)
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


def test_one_connection_too_many_is_closed(bundles, monkeypatch):
    monkeypatch.setattr(serve_module, "CONNECTIONS", 2)
    with running(bundles[:1], patience=5) as server:
        idle = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(2)]
        time.sleep(0.2)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            ask(server, "GET", "/info")
        for connection in idle:
            connection.close()
        time.sleep(0.2)
        assert ask(server, "GET", "/info")[0] == 200


def test_faults_of_ours_are_no_news_for_the_client(bundles, monkeypatch, capfd):
    def broken(self, image, path):
        raise KeyError("a secret of the program")

    monkeypatch.setattr(Served, "predict", broken)
    with running(bundles[:1]) as server:
        status, answer, _ = ask(server, body=picture()[1])
        assert (status, answer) == (500, {"error": "Something went wrong on the server."})
        assert server.lines == ["a request failed: KeyError"]
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


def test_the_command_says_where_and_ends_with_an_interrupt(bundles):
    command = [sys.executable, "-m", "everseg", "serve", *map(str, bundles), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a shell that runs the tests in the background has them ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as one:
        try:
            line = one.stdout.readline()
            assert line.startswith("open http://127.0.0.1:"), line
            port = int(line.split("/")[2].split(":")[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", "/info")
            assert json.loads(connection.getresponse().read())["bundles"][0]["name"] == "a"
            connection.close()
            one.send_signal(signal.SIGINT)
            _, errors = one.communicate(timeout=20)
        finally:
            one.kill()
    *notes, last = errors.splitlines()
    assert (one.returncode, last) == (0, "stopped")
    assert [note.partition(":")[2].strip()[:12] for note in notes] == ["only a knows", "only b knows"]
