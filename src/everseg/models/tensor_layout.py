"""What a file of `torch.save` holds and where, found in a process of its own.

Two forms are known: the zip archive (PyTorch 1.6 and later) and the plain stream before it, in which the original MiB
and MDIL checkpoints and many published encoders are stored. Both hold a pickle, which `tensor_pickle` reads, and the
bytes of the storages.

`tensor_file` starts this as a program. It gets the file as its standard input, already open, and writes a layout: where
the bytes of each storage lie, and which tensors, numbers, text and containers the pickle describes. It needs nothing
but Python's own library. Before it reads the first byte it gives up opening files and sockets and starting processes.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from typing import Any, NoReturn
from zlib import crc32

from everseg.models.tensor_pickle import (
    ALONE,
    Claims,
    Device,
    Dtype,
    NumpyNumber,
    Pickle,
    Refusal,
    Size,
    View,
    damaged,
    limit,
    shown,
)

try:
    import resource
except ImportError:  # Windows: then only the parent's time limit holds, and the watch over what is called
    resource = None  # type: ignore[assignment]

MAX_PICKLE = 32 << 20
"""Most bytes of the pickle, the part that says which tensors there are; large real ones have a few MB."""
MAX_DIRECTORY = 4 << 20
"""Most bytes of a zip archive's directory: some 40,000 storages. Python's zipfile takes ten times that in memory."""
MAX_MEMORY = 1 << 30
"""Most bytes of memory that reading may take. The tensors themselves are not read here."""
MAX_SECONDS = 60
"""Most seconds of a processor."""
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
"""The first two values of the stream that PyTorch wrote before 1.6."""
BIG = 3
"""Exit code where `MAX_MEMORY` is not enough."""


# ---------------------------------------------------------------- the program


def main() -> NoReturn:
    """Read the file that is the standard input, and write its layout, or why there is none, to the standard output."""
    code, answer = 0, b""
    try:
        file = Given(0)
        lock_up()
        answer = json.dumps(layout_of(file)).encode()
    except Refusal as refusal:
        answer = json.dumps({"refused": str(refusal)}).encode()
    except OSError as error:
        answer = json.dumps({"refused": f"it cannot be read: {error.strerror or error}"}).encode()
    except MemoryError:
        code = BIG
    while answer:
        answer = answer[os.write(1, answer) :]
    os._exit(code)  # not through the interpreter's end, which would want to do what it may not do any more


def lock_up() -> None:
    """Give up files, network, programs and most of the machine's memory and time, for good.

    The limits are the operating system's: whatever a hole in this reader or in Python led to would be bound by them.
    They do not stop calls that need no descriptor, such as deleting a file: only `_refuse` does.
    """
    for codec in ("cp437", "utf-8", "latin-1", "ascii"):  # zipfile would import one when it meets a name
        codecs.lookup(codec)
    if resource is not None:
        # No further file or socket can be opened, not even in the place of 0, 1 or 2 after closing it. These stay open,
        # for the limit is on new ones. What is open cannot grow on a disk.
        for what, most in (
            ("RLIMIT_NOFILE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0), ("RLIMIT_NPROC", 0),
            ("RLIMIT_CPU", MAX_SECONDS), ("RLIMIT_AS", MAX_MEMORY),
        ):  # fmt: skip
            if hasattr(resource, what):
                _lower(getattr(resource, what), most)
    sys.addaudithook(_refuse)


def _lower(what: int, most: int) -> None:
    try:
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    except (OSError, ValueError):
        pass  # macOS knows no limit of the address space


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Stop whatever Python tells of: opening, connecting, importing, compiling, starting. Reading needs none of it."""
    if event != "builtins.id":
        os._exit(4)


# ---------------------------------------------------------------- layouts


def layout_of(file: Given) -> dict[str, Any]:
    """Find what a file holds.

    Returns:
        `storages`: [place, bytes, checksum or 0] of each; `nodes`: tensors and containers, each after what it holds;
        `content`: what the file holds, as text, a number, None, or a list of a letter and details (`_Writer`).

    Raises:
        Refusal: it is damaged, or holds what no file of weights needs.
        MemoryError: it takes too much.
    """
    content, places = _read(file)
    writer = _Writer()
    content = writer.value(content)
    return {"storages": places, "nodes": writer.nodes, "content": content}


class _Writer:
    """Writes plain values as JSON that keeps their types, and which of them are the same object.

    A letter says what a list is: b bytes, t type of elements, d device, s size of a tensor, n number of numpy, r
    reference to a node. The nodes: T tensor, D dictionary, L list, U tuple, S set.
    """

    def __init__(self) -> None:
        self.nodes: list[list[Any]] = []
        self.known: dict[int, int] = {}

    def value(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) is bytes:
            return ["b", value.hex()]
        if type(value) is Dtype:
            return ["t", value.name]
        if type(value) is Device:
            return ["d", value.name]
        if type(value) is Size:
            return ["s", list(value.sides)]
        if type(value) is NumpyNumber:
            return ["n", value.code, value.raw.hex()]
        if id(value) not in self.known:
            node = self._node(value)  # first what it holds; containers are no deeper than MAX_DEPTH
            self.known[id(value)] = len(self.nodes)
            self.nodes.append(node)
        return ["r", self.known[id(value)]]

    def _node(self, value: Any) -> list[Any]:
        if type(value) is View:
            number = None if value.storage is None else value.storage.number
            return [
                "T", number, value.offset, value.size, value.stride, value.dtype, value.grad, value.parameter,
            ]  # fmt: skip
        if isinstance(value, dict):
            kinds: dict[type, str] = {OrderedDict: "ordered", Counter: "counter"}
            kind = kinds.get(type(value), "plain")
            pairs = [self.value(part) for pair in value.items() for part in pair]
            more = vars(value) if type(value) is OrderedDict else {}
            return ["D", kind, pairs, {name: self.value(part) for name, part in more.items()}]
        letters: dict[type, str] = {list: "L", tuple: "U", set: "S"}
        return [letters[type(value)], [self.value(part) for part in value]]


# ---------------------------------------------------------------- files


class Given(io.FileIO):
    """A file that Python's zipfile can ask for a directory, but not for one of whatever size it claims to have."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, closefd=False)
        self.size = os.fstat(descriptor).st_size

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > MAX_DIRECTORY:
            limit(f"its directory has {wanted >> 20} MiB")
        return super().read(wanted) or b""

    def fill(self, target: memoryview) -> None:
        """Read exactly as many bytes as `target` has."""
        while target:
            count = self.readinto(target)
            if not count:
                damaged("it ends too early")
            target = target[count:]


def _read(file: Given) -> tuple[Any, list[list[int]]]:
    head = file.read(4)
    file.seek(0)
    if head == b"PK\x03\x04":
        return _read_zip(file)
    if head[:1] == b"\x80":
        return _read_stream(file)
    return damaged("it begins like neither of PyTorch's two formats" if head else "it is empty")


def _read_zip(file: Given) -> tuple[Any, list[list[int]]]:
    """The archive: NAME/data.pkl is the pickle, NAME/data/KEY the bytes of a storage, both stored as they are."""
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (
        zipfile.BadZipFile,
        struct.error,
        ValueError,
        OverflowError,
        OSError,
        NotImplementedError,
    ) as error:
        damaged(f"{error or 'its directory'}")
    names = {entry.filename: entry for entry in entries}
    if len(names) != len(entries):
        damaged("two entries with the same name")
    strange = [name for name in names if ".." in name.split("/") or name.startswith("/") or "\\" in name]
    if strange:
        damaged(f"an entry called {shown(strange[0])}")
    # torch.save neither compresses nor encrypts (which adds 12 bytes): what is read is never larger than the file.
    if any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
        damaged("compressed or encrypted entries")
    roots = [
        name[: -len("/data.pkl")] for name in names if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        damaged("a zip archive without the one entry data.pkl")
    root = roots[0]
    if f"{root}/constants.pkl" in names:
        raise Refusal(f"it is a TorchScript program, which would have to be run; {ALONE}")
    order = names.get(f"{root}/byteorder")
    if order is not None:
        _check_order(_content(file, order) == b"little")
    # The pickle says how many bytes each storage has. `Claims` keeps the sum within the size of the file.
    claims = Claims(file.size)
    loaded = Pickle(_content(file, names[f"{root}/data.pkl"]), claims).run()
    places = []
    for key, storage in claims.storages.items():
        entry = names.get(f"{root}/data/{key}")
        if entry is None or entry.file_size != storage.size:
            damaged(
                f"the bytes of storage {shown(key)} are missing, or their number differs from the one stated"
            )
        places.append([_place(file, entry), storage.size, entry.CRC])
    return loaded, places


def _content(file: Given, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > MAX_PICKLE:
        limit(f"its description of the tensors has {entry.file_size >> 20} MiB")
    content = bytearray(entry.file_size)
    file.seek(_place(file, entry))
    file.fill(memoryview(content))
    check_sum(content, entry.CRC, entry.filename)
    return bytes(content)


def check_sum(content: bytes | bytearray | memoryview, stated: int, name: str) -> None:
    """Compare a checksum, which torch.load does not: damaged weights look whole there.

    Raises:
        Refusal: it is another. 0 says that there is none: PyTorch can be told to write none.
    """
    if stated not in (0, crc32(content)):
        damaged(f"entry {shown(name)} does not match its checksum")


def _place(file: Given, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored entry begin."""
    # The directory at the end of the archive says where an entry's own header is. That header repeats the name and may
    # have other extra bytes than the directory, so its two lengths decide where the content begins.
    start = entry.header_offset
    file.seek(start if 0 <= start <= file.size else file.size)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        damaged(f"entry {shown(entry.filename)} is not where the directory says")
    name, extra = struct.unpack("<HH", header[26:])
    return start + 30 + name + extra


def _read_stream(file: Given) -> tuple[Any, list[list[int]]]:
    """Read the form before PyTorch 1.6.

    Five pickles (magic number, version, machine, the content, the keys of the storages), then for each key the number
    of its elements and their bytes.
    """
    # The length of the pickles is not stored: read as much as they may have, then go back to where they ended.
    head = bytearray(min(file.size, MAX_PICKLE))
    file.fill(memoryview(head))
    claims = Claims(file.size)
    reader = Pickle(bytes(head), claims)
    for expected in (MAGIC, VERSION):
        found = reader.run()
        if type(found) is not int or found != expected:
            damaged("its beginning")
    machine = reader.run()
    _check_order(isinstance(machine, dict) and machine.get("little_endian") is True)
    loaded, keys = reader.run(), reader.run()
    if type(keys) is not list or not all(type(key) is str for key in keys):
        damaged("its list of storages")
    if sorted(keys) != sorted(claims.storages):
        damaged("its list of storages")
    file.seek(reader.position)
    places = [[0, 0, 0]] * len(keys)
    for key in keys:
        storage, count = claims.storages[key], bytearray(8)
        file.fill(memoryview(count))
        if int.from_bytes(count, "little", signed=True) != storage.count:
            damaged(f"storage {shown(key)} has another number of elements than stated")
        places[storage.number] = [file.tell(), storage.size, 0]
        if file.seek(storage.size, io.SEEK_CUR) > file.size:
            damaged("it ends too early")
    return loaded, places


def _check_order(little: bool) -> None:
    if little != (sys.byteorder == "little"):
        raise Refusal("its bytes have the order of another kind of machine; save it again on one like this")
