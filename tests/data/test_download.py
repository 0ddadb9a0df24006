from __future__ import annotations

import hashlib
import io
import json
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from everseg.data.datasets.voc import build as read_voc
from everseg.data.get import download as module
from everseg.data.get.download import RECEIPT, Source, download
from everseg.data.get.fetch import fetch
from everseg.data.get.unpack import Limits, extract
from everseg.errors import ConfigError, DataError

BODY = bytes(range(256)) * 4000
QUICK = {"attempts": 4, "pause": 0.01, "timeout": 5.0}


def md5(data: bytes) -> str:
    return "md5:" + hashlib.md5(data, usedforsecurity=False).hexdigest()


class Site:
    """A web server whose faults are set by the test."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etag: str | None = '"v1"'
        self.ranges = True
        self.cut_after: list[int] = []  # bytes of the body after which the next connections break
        self.statuses: list[int] = []  # answers of the next requests
        self.redirects: dict[str, str] = {}
        self.chunked = False
        self.requests: list[tuple[str, str | None, str | None]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                site.answer(self)

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that hung up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/{name}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.lstrip("/")
        wanted, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        self.requests.append((name, wanted, condition))
        handler.close_connection = True
        if name in self.redirects:
            handler.send_response(302)
            handler.send_header("Location", self.redirects[name])
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        status = self.statuses.pop(0) if self.statuses else 200
        if name not in self.files:
            status = 404
        if status != 200:
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body, start = self.files[name], 0
        if wanted and self.ranges and condition in (None, self.etag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(body)}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            handler.send_response(200)
        if self.etag:
            handler.send_header("ETag", self.etag)
        if self.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        rest = body[start:]
        if self.cut_after:
            rest = rest[: self.cut_after.pop(0)]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(rest), rest) if self.chunked else rest)
        elif self.chunked:
            handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest))
        else:
            handler.wfile.write(rest)


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site()
    site.files["a.bin"] = BODY
    yield site
    site.close()


def only_file(folder: Path, name: str) -> bool:
    return [p.name for p in folder.iterdir()] == [name]


def test_a_file_arrives_whole_with_its_hash(site, tmp_path):
    seen = []
    got = fetch(site.url("a.bin"), tmp_path / "a.bin", progress=lambda d, t: seen.append((d, t)), **QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert (got.size, got.sha256) == (len(BODY), hashlib.sha256(BODY).hexdigest())
    assert seen[-1] == (len(BODY), len(BODY))
    assert only_file(tmp_path, "a.bin")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_broken_connection_goes_on_where_it_stopped(site, tmp_path, chunked):
    site.cut_after = [100_000, 200_000]
    site.chunked = chunked
    fetch(site.url("a.bin"), tmp_path / "a.bin", **QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert [r[1] for r in site.requests] == [None, "bytes=100000-", "bytes=300000-"]
    assert site.requests[1][2] == '"v1"'


def test_an_interrupted_call_is_continued_by_the_next_call(site, tmp_path):
    site.cut_after = [300_000, 0, 0, 0, 0]
    with pytest.raises(DataError, match="same command") as error:
        fetch(site.url("a.bin"), tmp_path / "a.bin", **QUICK)
    assert "300000 bytes are kept" in str(error.value)
    assert not (tmp_path / "a.bin").exists()
    site.cut_after = []
    site.requests.clear()
    fetch(site.url("a.bin"), tmp_path / "a.bin", **QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert site.requests == [("a.bin", "bytes=300000-", '"v1"')]


def test_a_file_that_changed_on_the_server_starts_again(site, tmp_path):
    site.cut_after = [300_000, 0, 0, 0, 0]
    with pytest.raises(DataError):
        fetch(site.url("a.bin"), tmp_path / "a.bin", **QUICK)
    site.cut_after, site.etag, site.files["a.bin"] = [], '"v2"', b"new" * 200_000
    fetch(site.url("a.bin"), tmp_path / "a.bin", **QUICK)
    assert (tmp_path / "a.bin").read_bytes() == b"new" * 200_000


def test_without_validator_and_checksum_it_never_joins_two_halves(site, tmp_path):
    site.etag = None
    site.cut_after = [300_000]
    fetch(site.url("a.bin"), tmp_path / "a.bin", **QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert [r[1] for r in site.requests] == [None, None]


def test_without_validator_a_checksum_allows_to_go_on(site, tmp_path):
    site.etag = None
    site.cut_after = [300_000]
    fetch(site.url("a.bin"), tmp_path / "a.bin", checksum=md5(BODY), **QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert [r[1] for r in site.requests] == [None, "bytes=300000-"]


def test_a_server_without_ranges_sends_all_again(site, tmp_path):
    site.ranges = False
    site.cut_after = [100_000]
    fetch(site.url("a.bin"), tmp_path / "a.bin", **QUICK)
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_shorter_file_than_what_is_there_starts_again(site, tmp_path):
    site.cut_after = [300_000, 0, 0, 0, 0]
    with pytest.raises(DataError):
        fetch(site.url("a.bin"), tmp_path / "a.bin", **QUICK)
    site.cut_after, site.files["a.bin"] = [], b"short"
    fetch(site.url("a.bin"), tmp_path / "a.bin", **QUICK)
    assert (tmp_path / "a.bin").read_bytes() == b"short"


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(site, tmp_path):
    with pytest.raises(DataError, match=r"md5 is .* not 0123"):
        fetch(site.url("a.bin"), tmp_path / "a.bin", checksum="md5:0123", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_spoilt_part_file_costs_one_fresh_start(site, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    notes = {"url": site.url("a.bin"), "validator": '"v1"', "total": len(BODY)}
    (tmp_path / "a.bin.part.json").write_text(json.dumps(notes))
    fetch(
        site.url("a.bin"), tmp_path / "a.bin", checksum="sha256:" + hashlib.sha256(BODY).hexdigest(), **QUICK
    )
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert [r[1] for r in site.requests] == ["bytes=1000-", None]


def test_a_missing_file_is_not_tried_again(site, tmp_path):
    with pytest.raises(DataError, match="HTTP 404"):
        fetch(site.url("nothing"), tmp_path / "a.bin", **QUICK)
    assert len(site.requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_tried_again_and_given_up_in_the_end(site, tmp_path):
    site.statuses = [503, 500]
    fetch(site.url("a.bin"), tmp_path / "a.bin", **QUICK)
    assert len(site.requests) == 3
    site.statuses = [503] * 10
    with pytest.raises(DataError, match="gave up after 4 tries"):
        fetch(site.url("a.bin"), tmp_path / "b.bin", **QUICK)


def test_no_server_at_all(tmp_path):
    with pytest.raises(DataError, match="gave up"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x", attempts=2, pause=0.01, timeout=2.0)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_only_web_addresses_are_followed(site, tmp_path, target):
    site.redirects["jump"] = target
    for url in (target, site.url("jump")):
        with pytest.raises(DataError, match=r"only http|not followed|not allowed"):
            fetch(url, tmp_path / "x", **QUICK)


def test_a_file_larger_than_the_disk_is_refused_before_it_is_fetched(site, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("everseg.data.get.download.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"1024000 bytes.*1000"):
        fetch(site.url("a.bin"), tmp_path / "a.bin", **QUICK)


# --- archives ---------------------------------------------------------------------------------------------------


def tar_of(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as bundle:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data)
            bundle.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


def zip_of(*members: tuple[str, bytes, int]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            bundle.writestr(info, data)
    return buffer.getvalue()


def lying_zip() -> bytes:
    """An entry that declares 10 bytes and holds 100 000."""
    data = bytearray(zip_of(("bomb", b"0" * 100_000, 0)))
    at = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 10)
    struct.pack_into("<I", data, 22, 10)
    return bytes(data)


def encrypted_zip() -> bytes:
    data = bytearray(zip_of(("secret", b"x", 0)))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + at] |= 1
    return bytes(data)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def huge_name_tar() -> bytes:
    """A gzip of some kilobytes whose first header claims a name of 20 MB."""
    info = member("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    info.size = 20 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    chunks = [packer.compress(info.tobuf(tarfile.GNU_FORMAT))]
    chunks += [packer.compress(b"a" * (1 << 20)) for _ in range(20)]
    return b"".join([*chunks, packer.flush()])


F = member
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "tar parent": (lambda: tar_of((F("ok"), b"x"), (F("../evil"), b"x")), r"'\.\./evil' leads out"),
    "tar hidden parent": (lambda: tar_of((F("a/../../evil"), b"x")), "leads out"),
    "tar absolute": (lambda: tar_of((F("/tmp/evil"), b"x")), "'/tmp/evil' has an absolute"),
    "tar symlink": (lambda: tar_of((F("l", tarfile.SYMTYPE, "/etc"), b"")), "'l' is a link to '/etc'"),
    "tar link then write": (
        lambda: tar_of((F("d", tarfile.SYMTYPE, ".."), b""), (F("d/evil"), b"x")),
        "'d' is a link",
    ),
    "tar hard link": (lambda: tar_of((F("h", tarfile.LNKTYPE, "/etc/passwd"), b"")), "'h' is a link"),
    "tar character device": (lambda: tar_of((F("dev", tarfile.CHRTYPE), b"")), "'dev' is a device"),
    "tar block device": (lambda: tar_of((F("dev", tarfile.BLKTYPE), b"")), "device"),
    "tar pipe": (lambda: tar_of((F("fifo", tarfile.FIFOTYPE), b"")), "'fifo' is a device or pipe"),
    "tar case": (lambda: tar_of((F("a/File"), b"1"), (F("a/file"), b"2")), "collides with 'a/File'"),
    "tar case of folders": (lambda: tar_of((F("A/x"), b"1"), (F("a/y"), b"2")), "collides with 'A'"),
    "tar unicode": (lambda: tar_of((F("\u00e9"), b"1"), (F("e\u0301"), b"2")), "collides"),
    "tar twice": (lambda: tar_of((F("f"), b"1"), (F("f"), b"2")), "'f' collides"),
    "tar file as folder": (lambda: tar_of((F("f"), b"1"), (F("f/g"), b"2")), "collides with 'f'"),
    "tar bomb": (lambda: tar_of((F("zero"), b"0" * 400_000), mode="w:gz"), "'zero' would unpack to more"),
    "tar many": (lambda: tar_of(*((F(f"f{i}"), b"") for i in range(40))), "more than 30 entries"),
    "tar name bomb": (huge_name_tar, "unreasonable size"),
    "tar cut": (lambda: tar_of((F("f"), b"x" * 5000))[:3000], "damaged"),
    "tar cut between files": (lambda: tar_of((F("f"), b"x" * 512), (F("g"), b"y"))[:1024], "cut off"),
    "tar header damaged": (
        lambda: tar_of((F("f"), b"x" * 512))[:1024] + b"\x01" * 512 + b"\0" * 1024,
        "damaged header",
    ),
    "tar.gz cut": (lambda: tar_of((F("f"), bytes(range(256)) * 40), mode="w:gz")[:-30], "damaged"),
    "tar deep": (lambda: tar_of((F("d/" * 40 + "f"), b"")), "too long a path"),
    "tar escape sequence": (lambda: tar_of((F("\x1b[31m"), b"")), "control character"),
    "zip parent": (lambda: zip_of(("../evil", b"x", 0)), r"'\.\./evil' leads out"),
    "zip absolute": (lambda: zip_of(("/evil", b"x", 0)), "absolute"),
    "zip drive": (lambda: zip_of(("C:/evil", b"x", 0)), "absolute"),
    "zip backslash": (lambda: zip_of(("..\\evil", b"x", 0)), "backslash"),
    "zip symlink": (lambda: zip_of(("l", b"/etc", stat.S_IFLNK | 0o777)), "'l' is a link"),
    "zip device": (lambda: zip_of(("d", b"", stat.S_IFCHR | 0o666)), "'d' is a device"),
    "zip case": (lambda: zip_of(("a", b"1", 0), ("A", b"2", 0)), "collides with 'a'"),
    "zip bomb": (lambda: zip_of(("zero", b"0" * 400_000, 0)), "'zero' and the others would unpack"),
    "zip that lies about its size": (lying_zip, "damaged|declares"),
    "zip damaged": (
        lambda: flipped(zip_of(("a", bytes(range(256)) * 9, 0)), 100),
        "damaged",
    ),
    "zip encrypted": (encrypted_zip, "'secret' is encrypted"),
    "zip without a name": (lambda: zip_of(("\0x", b"x", 0)), "has no name"),
    "neither": (lambda: b"<html>not found</html>", "not an archive"),
    "empty": (lambda: b"", "not an archive"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_or_damaged_archives_leave_nothing(tmp_path, name):
    make, words = HOSTILE[name]
    archive = tmp_path / "in" / "archive"
    archive.parent.mkdir()
    archive.write_bytes(make())
    limits = Limits(entries=30, ratio=20, ratio_from=300_000)
    with pytest.raises(DataError, match=words) as error:
        extract(archive, tmp_path / "deep" / "out", limits=limits)
    assert str(archive) in str(error.value)
    assert "\x1b" not in str(error.value)
    assert list((tmp_path / "deep").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "in"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_good_tar_is_unpacked_without_its_permissions(tmp_path, mode):
    data = bytes(range(256)) * 30
    (tmp_path / "a").write_bytes(
        tar_of(
            (F("./top", tarfile.DIRTYPE), b""),
            (F("./top/one.png", mode=0o4777), data),
            (F("top/sub/two"), b""),
            (F("n" * 150), b"long"),
            mode=mode,
        )
    )
    assert extract(tmp_path / "a", tmp_path / "out") == 3
    assert (tmp_path / "out/top/one.png").read_bytes() == data
    assert stat.S_IMODE((tmp_path / "out/top/one.png").stat().st_mode) & 0o7133 == 0
    assert (tmp_path / "out/top/sub/two").read_bytes() == b""
    assert (tmp_path / "out" / ("n" * 150)).read_bytes() == b"long"


def test_a_good_zip_is_unpacked_without_macos_litter(tmp_path):
    (tmp_path / "a").write_bytes(
        zip_of(
            ("top/", b"", stat.S_IFDIR | 0o755),
            ("top/one", b"1", stat.S_IFREG | 0o644),
            ("__MACOSX/._one", b"", 0),
        )
    )
    assert extract(tmp_path / "a", tmp_path / "out") == 1
    assert [p.relative_to(tmp_path / "out").as_posix() for p in sorted((tmp_path / "out").rglob("*"))] == [
        "top",
        "top/one",
    ]


# --- data sets --------------------------------------------------------------------------------------------------


def voc_tar() -> bytes:
    base = "VOCdevkit/VOC2012"
    names = ["2007_000032", "2007_000033", "2008_000002"]
    members = [(F(f"{base}/JPEGImages/{n}.jpg"), b"jpg" + n.encode()) for n in names]
    members += [(F(f"{base}/SegmentationClass/{n}.png"), b"png") for n in names[:2]]
    members += [(F(f"{base}/ImageSets/Segmentation/val.txt"), b"2007_000033\n")]
    return tar_of(*members)


def aug_zip(*extra: tuple[str, bytes, int]) -> bytes:
    names = ("2008_000002", "2007_000033", "2007_000032")
    return zip_of(*((f"SegmentationClassAug/{n}.png", b"aug" + n.encode(), 0) for n in names), *extra)


@pytest.fixture
def voc(site) -> tuple[Source, ...]:
    site.files["voc.tar"], site.files["aug.zip"] = voc_tar(), aug_zip()
    first, second = module.SOURCES["voc"]
    return (
        Source(first.file, (site.url("voc.tar"),), md5(site.files["voc.tar"]), first.folder, first.place),
        Source(second.file, (site.url("gone.zip"), site.url("aug.zip")), None, second.folder, second.place),
    )


@pytest.mark.filterwarnings("ignore:.*not the 10582")
def test_voc_comes_with_masks_list_and_receipt_and_a_second_call_does_nothing(site, voc, tmp_path):
    root = download("voc", tmp_path / "data", sources=voc, **QUICK)
    assert root == tmp_path / "data/VOCdevkit/VOC2012"
    assert (root / "SegmentationClassAug/2008_000002.png").read_bytes() == b"aug2008_000002"
    assert (root / "JPEGImages/2007_000032.jpg").read_bytes() == b"jpg2007_000032"
    assert (root / "ImageSets/Segmentation/train_aug.txt").read_text().splitlines() == [
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png",
        "/JPEGImages/2008_000002.jpg /SegmentationClassAug/2008_000002.png",
    ]
    receipt = json.loads((tmp_path / "data" / RECEIPT).read_text())
    body = site.files["aug.zip"]
    assert receipt["files"]["SegmentationClassAug.zip"] == {
        "url": site.url("aug.zip"),
        "size": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
        "checksum": None,
        "unpacked": True,
    }
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        ".everseg-download.json",
        ".everseg-download.lock",
        "VOCdevkit",
    ]
    asked = len(site.requests)
    assert download("voc", tmp_path / "data", sources=voc, **QUICK) == root
    assert len(site.requests) == asked


def test_a_short_voc_is_warned_of(voc, tmp_path):
    with pytest.warns(UserWarning, match=r"2 training images.* 10582"):
        download("voc", tmp_path, sources=voc, **QUICK)


@pytest.mark.filterwarnings("ignore:.*not the 10582")
def test_a_list_inside_the_archive_is_used(site, voc, tmp_path):
    published = b"/JPEGImages/2008_000002.jpg /SegmentationClassAug/2008_000002.png\n"
    site.files["aug.zip"] = aug_zip(("list/train_aug.txt", published, 0))
    root = download("voc", tmp_path, sources=voc, keep_archives=True, **QUICK)
    assert (root / "ImageSets/Segmentation/train_aug.txt").read_bytes() == published
    assert (tmp_path / "SegmentationClassAug.zip").exists()


@pytest.mark.filterwarnings("ignore:.*not the 10582")
def test_a_failure_half_way_keeps_what_is_done(site, voc, tmp_path):
    good = site.files.pop("aug.zip")
    with pytest.raises(DataError, match=r"(?s)gone\.zip.*aug\.zip"):
        download("voc", tmp_path, sources=voc, **QUICK)
    site.files["aug.zip"] = good
    site.requests.clear()
    download("voc", tmp_path, sources=voc, **QUICK)
    assert [r[0] for r in site.requests] == ["gone.zip", "aug.zip"]


def test_a_hostile_archive_is_dropped_and_fetched_again(site, voc, tmp_path):
    site.files["aug.zip"] = aug_zip(("../evil", b"x", 0))
    with pytest.raises(DataError, match="leads out"):
        download("voc", tmp_path, sources=voc, **QUICK)
    assert not (tmp_path / "SegmentationClassAug.zip").exists()
    assert not (tmp_path / "VOCdevkit/VOC2012/SegmentationClassAug").exists()
    assert not list(tmp_path.glob(".everseg-unpack*"))
    site.files["aug.zip"] = zip_of(("Other/a.png", b"", 0))
    with pytest.raises(DataError, match=r"no folder SegmentationClassAug.* Other"):
        download("voc", tmp_path, sources=voc, **QUICK)


def test_a_killed_unpacking_is_done_again_without_fetching(site, tmp_path, monkeypatch):
    site.files["ade.zip"] = zip_of(("ADEChallengeData2016/images/training/a.jpg", b"x", 0))
    sources = (
        Source("ade.zip", (site.url("ade.zip"),), None, "ADEChallengeData2016", "ADEChallengeData2016"),
    )

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_find", killed)
        with pytest.raises(KeyboardInterrupt):
            download("ade", tmp_path, sources=sources, **QUICK)
    (tmp_path / ".everseg-unpack-left").mkdir()
    root = download("ade", tmp_path, sources=sources, **QUICK)
    assert (root / "images/training/a.jpg").read_bytes() == b"x"
    assert len(site.requests) == 1
    assert not (tmp_path / ".everseg-unpack-left").exists()


def test_a_folder_of_the_users_own_is_not_touched(site, voc, tmp_path):
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit/mine").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        download("voc", tmp_path, sources=voc, **QUICK)
    assert (tmp_path / "VOCdevkit/mine").read_text() == "mine"
    assert site.requests == []


def test_two_downloads_into_one_folder_are_refused(site, voc, tmp_path):
    with module._alone(tmp_path), pytest.raises(DataError, match="another download"):
        download("voc", tmp_path, sources=voc, **QUICK)


def test_wrong_names_and_places(tmp_path, voc):
    with pytest.raises(ConfigError, match="voc, sbd, ade"):
        download("coco", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose a folder"):
        download("voc", tmp_path / "file" / "x", sources=voc)
    (tmp_path / RECEIPT).write_text("[")
    with pytest.raises(DataError, match="delete it"):
        download("voc", tmp_path, sources=voc)


@pytest.mark.filterwarnings("ignore:.*not the 10582")
def test_the_voc_reader_reads_what_the_download_leaves(voc, tmp_path):
    root = download("voc", tmp_path, sources=voc, **QUICK)
    for start in (root, tmp_path):
        splits = read_voc(start).splits
        assert [splits["train"].id(i) for i in range(2)] == ["2007_000032", "2008_000002"]
        assert splits["train"].mask_path(0) == (root / "SegmentationClassAug/2007_000032.png").resolve()
        assert [splits["val"].id(i) for i in range(len(splits["val"]))] == ["2007_000033"]


def test_the_table_has_web_addresses_and_known_checksums():
    for sources in module.SOURCES.values():
        for source in sources:
            assert all(url.startswith(("http://", "https://")) for url in source.urls)
            assert source.checksum is None or len(source.checksum) == len("md5:") + 32
