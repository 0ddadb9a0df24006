"""Read weight files of other projects without running code from them: safetensors, and what `torch.save` writes.

Two forms of the latter are known: the zip archive (PyTorch 1.6 and later) and the plain stream before it, in which the
original MiB and MDIL checkpoints and many published encoders are stored. Both hold a pickle, which `tensor_pickle`
reads, and the bytes of the storages.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

from everseg.errors import CheckpointError, ConfigError
from everseg.models.tensor_pickle import ALONE, Claims, Pickle, Refusal, damaged, limit, shown

MAX_PICKLE = 32 << 20
"""Most bytes of the pickle, the part that says which tensors there are; large real ones have a few MB."""
MAX_DIRECTORY = 4 << 20
"""Most bytes of a zip archive's directory: some 40,000 storages. Python's zipfile takes ten times that in memory."""
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
"""The first two values of the stream that PyTorch wrote before 1.6."""


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a weight file without running code from it: .safetensors, or else what `torch.save` wrote.

    Tensors lie on the CPU, whatever device they were saved from; those that shared memory share it again. Python
    attributes of tensors and parameters are dropped, as they are no weights.

    Returns:
        The dictionary in the file: tensors (bool, all integers, float16, bfloat16, float32, float64), numbers, text
        and containers of them, equal to what `torch.load` gives.

    Raises:
        ConfigError: no such file.
        CheckpointError: damaged; holds names that could run code, or tensors of other kinds (complex, quantised,
            float8, sparse); claims more than its bytes can hold; or holds no dictionary.
    """
    if not path.is_file():
        raise ConfigError(f"model.weights: no file '{path}'")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{path}' is damaged or not a safetensors file: {error}") from None
    try:
        with _File(path) as file:
            loaded = _read(file)
    except Refusal as refusal:
        raise CheckpointError(f"'{path}' cannot be read safely: {refusal}") from None
    except MemoryError:
        raise CheckpointError(f"'{path}' does not fit into this machine's memory") from None
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"'{path}' holds no dictionary of weights, but a {type(loaded).__name__}; {ALONE}"
        )
    return loaded


# ---------------------------------------------------------------- files


class _File(io.FileIO):
    """A file that Python's zipfile can ask for a directory, but not for one of whatever size it claims to have."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.size = os.fstat(self.fileno()).st_size

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


def _read(file: _File) -> Any:
    head = file.read(4)
    file.seek(0)
    if head == b"PK\x03\x04":
        return _read_zip(file)
    if head[:1] == b"\x80":
        return _read_stream(file)
    return damaged("it begins like neither of PyTorch's two formats" if head else "it is empty")


def _read_zip(file: _File) -> Any:
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
    # The pickle says how many bytes each storage has; memory for them is made before a single one is read. `Claims`
    # keeps the sum within the size of the file.
    claims = Claims(file.size)
    loaded = Pickle(_content(file, names[f"{root}/data.pkl"]), claims).run()
    for key, storage in claims.storages.items():
        entry = names.get(f"{root}/data/{key}")
        if entry is None or entry.file_size != storage.bytes.numel():
            damaged(
                f"the bytes of storage {shown(key)} are missing, or their number differs from the one stated"
            )
        _load(file, entry, storage.memory())
    return loaded


def _content(file: _File, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > MAX_PICKLE:
        limit(f"its description of the tensors has {entry.file_size >> 20} MiB")
    content = bytearray(entry.file_size)
    _load(file, entry, memoryview(content))
    return bytes(content)


def _load(file: _File, entry: zipfile.ZipInfo, target: memoryview) -> None:
    """Read a stored entry and compare its checksum, which torch.load does not: damaged weights look whole there."""
    # The directory at the end of the archive says where an entry's own header is. That header repeats the name and may
    # have other extra bytes than the directory, so its two lengths decide where the content begins.
    start = entry.header_offset
    file.seek(start if 0 <= start <= file.size else file.size)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        damaged(f"entry {shown(entry.filename)} is not where the directory says")
    name, extra = struct.unpack("<HH", header[26:])
    file.seek(start + 30 + name + extra)
    file.fill(target)
    # 0: PyTorch can be told to write no checksums.
    if entry.CRC not in (0, zlib.crc32(target)):
        damaged(f"entry {shown(entry.filename)} does not match its checksum")


def _read_stream(file: _File) -> Any:
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
    for key in keys:
        storage, count = claims.storages[key], bytearray(8)
        file.fill(memoryview(count))
        if int.from_bytes(count, "little", signed=True) != storage.count:
            damaged(f"storage {shown(key)} has another number of elements than stated")
        file.fill(storage.memory())
    return loaded


def _check_order(little: bool) -> None:
    if little != (sys.byteorder == "little"):
        raise Refusal("its bytes have the order of another kind of machine; save it again on one like this")
