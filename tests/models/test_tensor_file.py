"""Weight files of strangers: equal to what torch.load reads, and never a way to code or to memory."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import pickletools
import random
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import everseg
from everseg.errors import CheckpointError, ConfigError
from everseg.models import tensor_file
from everseg.models.tensor_file import read_tensors
from everseg.models.tensor_layout import MAGIC, VERSION, Given, layout_of
from saying import must_say

FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
]  # fmt: skip
NEW_DTYPES = [torch.uint16, torch.uint32, torch.uint64]
"""Their storages have no type. PyTorch writes them in the old form as well, but cannot read that."""


IN_ANOTHER_PROCESS = tensor_file._layout


@pytest.fixture(autouse=True)
def _in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Find layouts in this process, thousands of them, where a test is not about the other one."""
    if request.node.get_closest_marker("other_process") is None:
        monkeypatch.setattr(
            tensor_file, "_layout", lambda file: json.loads(json.dumps(layout_of(Given(file.fileno()))))
        )


def saved(content: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Bit patterns of all kinds, NaN and infinities among them."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(shape)


def assert_same(own: Any, reference: Any) -> None:
    """Same types, same bits, same strides, same place in storages of the same size, all the way down."""
    assert type(own) is type(reference)
    if isinstance(own, torch.Tensor):
        assert (own.dtype, own.shape, own.stride()) == (reference.dtype, reference.shape, reference.stride())
        assert own.storage_offset() == reference.storage_offset()
        assert own.requires_grad == reference.requires_grad
        whole = [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in (own, reference)]
        assert torch.equal(*whole)
    elif isinstance(own, dict):
        assert list(own) == list(reference)
        for key in own:
            assert_same(own[key], reference[key])
        if type(own) is OrderedDict:
            assert_same(vars(own), vars(reference))
    elif isinstance(own, list | tuple):
        assert len(own) == len(reference)
        for a, b in zip(own, reference, strict=True):
            assert_same(a, b)
    else:
        assert own == reference


def assert_reads_like_torch(path: Path) -> dict[str, Any]:
    own = read_tensors(path)
    scalar = np.float64(0).__reduce__()[0]
    numpy_numbers = [(scalar, "numpy.core.multiarray.scalar"), scalar, np.dtype]
    numpy_numbers += [type(np.dtype(code)) for code in ("f8", "f4", "i8", "i4")]
    with torch.serialization.safe_globals(numpy_numbers):
        assert_same(own, torch.load(path, map_location="cpu", weights_only=True))
    return own


# ---------------------------------------------------------------- what torch.save writes


@FORMS
@pytest.mark.parametrize("dtype", [*DTYPES, *NEW_DTYPES], ids=str)
def test_every_type_of_element_arrives_bit_for_bit(tmp_path, dtype, zipped):
    content = {
        "a": numbers(3, 5, dtype=dtype),
        "none": numbers(0, 4, dtype=dtype),
        "one": numbers(1, dtype=dtype)[0],
    }
    path = saved(content, tmp_path / "w.pth", zipped)
    assert_same(read_tensors(path), content)
    if zipped or dtype in DTYPES:
        assert_reads_like_torch(path)


@FORMS
def test_views_share_memory_as_they_did(tmp_path, zipped):
    whole = numbers(4, 6)
    row = numbers(1, 5)
    content = {
        "whole": whole, "again": whole, "turned": whole.t(), "part": whole[1:3, 2:5], "every": whole[:, ::2],
        "expanded": row.expand(7, 5), "other": whole.clone(),
    }  # fmt: skip
    own = assert_reads_like_torch(saved(content, tmp_path / "w.pth", zipped))
    assert own["again"] is own["whole"]
    own["whole"][1, 2] = 7.0
    assert own["part"][0, 0] == own["turned"][2, 1] == own["every"][1, 1] == 7.0
    assert own["other"][1, 2] != 7.0
    assert len({own[n].untyped_storage().data_ptr() for n in ("whole", "turned", "part", "every")}) == 1


@FORMS
def test_a_whole_training_state_arrives(tmp_path, zipped):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1))
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    optimiser.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimiser, [3, 5])
    noted = torch.ones(3)
    noted.note = "kept by torch, no weight"
    content = {
        "state_dict": model.state_dict(), "optimizer": optimiser.state_dict(), "scheduler": scheduler.state_dict(),
        "weights": list(model.parameters()), "tied": [model[0].weight, model[0].weight], "noted": noted,
        "epoch": 3, "best": np.float64(0.5), "last": np.float32(0.25), "count": np.int64(-3), "some": np.int32(4),
        "size": torch.Size([1, 2]), "device": torch.device("cuda", 1), "cpu": torch.device("cpu"),
        "dtype": torch.float16, "none": None, "name": "Zürich \U0001f600", "bytes": b"\x00\xff", "set": {1, "a"},
        "long": -(2**80), "real": 1e-300, "yes": True, "empty": [(), {}, []], "tuple": (1, (2, (3, 4, 5, 6))),
        "counter": Counter("aab"), 7: {None: 1, 1.5: 2},
    }  # fmt: skip
    own = assert_reads_like_torch(saved(content, tmp_path / "w.pth", zipped))
    assert own["tied"][0] is own["tied"][1]
    fresh = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1))
    fresh.load_state_dict(own["state_dict"], strict=True)
    assert vars(own["state_dict"])["_metadata"][""] == {"version": 1}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), zipped=st.booleans())
def test_any_view_of_any_storage_arrives(tmp_path_factory, data, zipped):
    tensors = {}
    for name in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
        tensor = numbers(*shape, dtype=data.draw(st.sampled_from(DTYPES)))
        if shape:
            tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
            start, step = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3))
            tensor = tensor[start::step]
        tensors[str(name)] = tensor
    path = tmp_path_factory.mktemp("any") / "w.pth"
    assert_reads_like_torch(saved(tensors, path, zipped))


def rewritten(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], **how: Any) -> Path:
    """The archive with other entries, and checksums that match them."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in change(entries).items():
            archive.writestr(name, content)
    return path


def test_archives_without_byte_order_or_checksums_are_read(tmp_path):
    content = {"a": numbers(3, 3)}
    path = saved(content, tmp_path / "old.pth")
    rewritten(path, lambda entries: {n: c for n, c in entries.items() if not n.endswith("byteorder")})
    assert_reads_like_torch(path)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        saved(content, tmp_path / "fast.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_reads_like_torch(tmp_path / "fast.pth")


# ---------------------------------------------------------------- what older versions wrote, put together by hand


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def old_text(value: str) -> bytes:
    """As Python 2 wrote it."""
    return b"U" + bytes([len(value)]) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def items(*parts: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def dictionary(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


NO_HOOKS = name("collections", "OrderedDict") + b")R"
TENSOR = name("torch._utils", "_rebuild_tensor_v2")


def storage(count: int, key: str = "0", kind: str = "FloatStorage", *more: bytes) -> bytes:
    return items(text("storage"), name("torch", kind), text(key), text("cpu"), number(count), *more) + b"Q"


def remade(*arguments: bytes) -> bytes:
    """A call of _rebuild_tensor_v2."""
    return TENSOR + items(*arguments) + b"R"


def tensor(held: bytes, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    shape = [items(*map(number, sides)) for sides in (size, stride)]
    return remade(held, number(offset), *shape, b"\x89", NO_HOOKS)


def program(content: bytes) -> bytes:
    return b"\x80\x02" + content + b"."


def archive(path: Path, content: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A zip archive around a pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("w/data.pkl", program(content))
        for key, raw in (storages or {}).items():
            file.writestr(f"w/data/{key}", raw)
        file.writestr("w/version", "3\n")
    return path


def stream(path: Path, content: bytes, storages: dict[str, bytes] | None = None, itemsize: int = 4) -> Path:
    """The form before PyTorch 1.6 around a pickle."""
    machine = {
        "protocol_version": VERSION,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    parts = [pickle.dumps(value, protocol=2) for value in (MAGIC, VERSION, machine)]
    parts += [program(content), pickle.dumps(list(storages or {}), protocol=2)]
    for raw in (storages or {}).values():
        parts += [struct.pack("<q", len(raw) // itemsize), raw]
    path.write_bytes(b"".join(parts))
    return path


def test_what_pytorch_wrote_before_0_4_in_python_2_is_read(tmp_path):
    """Names as bytes, dictionaries as lists of pairs, tensors and parameters that get their content afterwards."""
    held = (
        items(old_text("storage"), name("torch", "FloatStorage"), old_text("94"), old_text("cpu"), b"K\x06N")
        + b"Q"
    )
    shape = [held, b"K\x00", items(b"K\x02", b"K\x03"), items(b"K\x03", b"K\x01")]
    rebuilt = name("torch._utils", "_rebuild_tensor") + items(*shape) + b"R"
    size = name("torch", "Size") + items(items(b"K\x02", b"K\x03")) + b"R"
    sized = name("torch._utils", "_rebuild_tensor") + items(held, b"K\x00", size, shape[3]) + b"R"
    parameter = name("torch.nn.parameter", "Parameter")
    pairs = {
        "rebuilt": rebuilt,
        "sized": sized,
        "filled": name("torch", "FloatTensor") + b")R" + items(*shape) + b"b",
        "parameter": parameter + items(rebuilt) + b"R" + items(b"\x88", b"\x89", NO_HOOKS) + b"b",
        "frozen": parameter + items(rebuilt, b"\x89") + b"R",
        "new": parameter + b")\x81" + items(rebuilt, b"N", NO_HOOKS, b"\x88", b"\x89") + b"b",
    }
    listed = b"](" + b"".join(b"](" + old_text(key) + value + b"e" for key, value in pairs.items()) + b"e"
    content = name("collections", "OrderedDict") + items(listed) + b"R"
    path = stream(tmp_path / "w.pth", content, {"94": np.arange(6, dtype="<f4").tobytes()})
    own = assert_reads_like_torch(path)
    assert own["new"].tolist() == own["filled"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert own["parameter"].requires_grad
    assert not own["frozen"].requires_grad


# ---------------------------------------------------------------- what is refused


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 500 + len(str(path))
    assert message.isprintable()
    return message


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8)


@FORMS
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("complex", lambda: torch.ones(2, dtype=torch.complex64)),
        ("quantised", quantised),
        ("float8", lambda: torch.ones(2).to(torch.float8_e4m3fn)),
        ("sparse", lambda: torch.eye(2).to_sparse()),
        ("empty (meta)", lambda: torch.ones(2, device="meta")),
    ],
)
def test_tensors_of_kinds_that_no_model_has_are_named(tmp_path, kind, make, zipped):
    message = refusal(saved({"a": make()}, tmp_path / "w.pth", zipped))
    assert f"holds {kind} tensors" in message
    assert "float tensors" in message


def test_other_kinds_of_files_are_named(tmp_path):
    path = saved({"a": torch.ones(1)}, tmp_path / "w.pth")
    assert "TorchScript" in refusal(rewritten(path, lambda e: {**e, "w/constants.pkl": b""}))
    saved({"a": torch.ones(1)}, path)
    assert "kind of machine" in refusal(
        rewritten(path, lambda e: {n: b"big" if n.endswith("byteorder") else c for n, c in e.items()})
    )
    torch.save({"a": torch.ones(1)}, path, pickle_protocol=4)
    assert "protocol 4" in refusal(path)
    path.write_bytes(b"")
    assert "empty" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arrays/a.npy", b"")
    assert "entry data.pkl" in refusal(path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    assert "not written by torch.save" in refusal(path)
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert "PyTorch's two formats" in refusal(path)
    assert "a list" in refusal(saved([torch.ones(1)], path))
    with pytest.raises(ConfigError, match="no file"):
        read_tensors(tmp_path / "absent.pth")


def test_a_description_larger_than_any_real_one_is_not_read(tmp_path):
    content = dictionary(a=text("x" * (33 << 20)))
    assert "tensors has 33 MiB" in refusal(archive(tmp_path / "w.pth", content))
    assert "ends too early" in refusal(stream(tmp_path / "w.pth", content))


def test_damage_that_torch_load_does_not_see_is_found(tmp_path):
    path = saved({"a": torch.full((1000,), 1.5)}, tmp_path / "w.pth")
    data = bytearray(path.read_bytes())
    data[data.find(struct.pack("<4f", *[1.5] * 4)) + 9] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["a"].unique().numel() == 2
    assert "checksum" in refusal(path)


@FORMS
def test_a_file_cut_anywhere_is_refused(tmp_path, zipped):
    path = saved({"a": numbers(4, 3), "b": {"c": numbers(2), "d": [1, 2.5, "x"]}}, tmp_path / "w.pth", zipped)
    data = path.read_bytes()
    for length in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:length])
        assert "damaged" in refusal(path), length


# ---------------------------------------------------------------- attacks: code


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + items(*arguments) + b"R"


COMMAND = text("touch owned")
CODE = {
    "system": call("os", "system", COMMAND),
    "system of Python 2": call("posix", "system", COMMAND),
    "eval": call("builtins", "eval", text("open('owned', 'w')")),
    "exec of Python 2": call("__builtin__", "exec", text("open('owned', 'w')")),
    "import": call("builtins", "__import__", text("owned_module")),
    "importing by naming": name("owned_module", "anything"),
    "chain of getattr": call(
        "builtins", "getattr", call("builtins", "__import__", text("os")), text("system")
    ),
    "dotted name": call("torch", "os.system", COMMAND),
    "name through a module": call("torch.serialization", "os.system", COMMAND),
    "torch.load without restriction": call("torch.storage", "_load_from_bytes", text("x")),
    "torch.load": call("torch", "load", text("other.pth")),
    "torch.hub": call("torch.hub", "load_state_dict_from_url", text("https://example.org/x")),
    "partial": call("functools", "partial", name("os", "system"), COMMAND),
    "map": call("builtins", "map", name("os", "system"), b"](" + COMMAND + b"e"),
    "numpy.load": call("numpy", "load", text("x.npy")),
    "new object": name("subprocess", "Popen") + items(COMMAND) + b"\x81",
    "INST": b"(" + COMMAND + b"ios\nsystem\n",
    "OBJ": b"(" + name("os", "system") + COMMAND + b"o",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93" + items(COMMAND) + b"R",
    "EXT1": b"\x82\x01" + items(COMMAND) + b"R",
    "PERSID": b"Pos.system\n",
    "whole module": items(text("module"), name("os", "system"), text("f"), text("s")) + b"Q",
    "whole module in old words": items(text("module"), b"N", text("f"), text("s"), b"N") + b"Q",
    "calling a container": b"]" + items(COMMAND) + b"R",
    "calling a type": name("torch", "float32") + items(COMMAND) + b"R",
    "calling a storage": name("torch", "FloatStorage") + items(number(1 << 40)) + b"R",
    "calling the class of tensors": call("torch", "Tensor", number(1 << 40)),
    "BUILD of a dictionary": b"}" + dictionary(__class__=text("x")) + b"b",
    "BUILD of methods": NO_HOOKS + dictionary(items=text("x")) + b"b",
    "BUILD of a name": name("torch", "Tensor") + dictionary(x=text("y")) + b"b",
    "BUILD of strange versions": NO_HOOKS + dictionary(_metadata=text("x")) + b"b",
    "BUILD of slots": NO_HOOKS + items(dictionary(x=text("y")), dictionary(x=text("y"))) + b"b",
    "wrapper": name("torch._tensor", "_rebuild_from_type_v2")
    + items(name("os", "system"), name("torch", "Tensor"), items(COMMAND), b"}") + b"R",
    "wrapper in itself": name("torch._tensor", "_rebuild_from_type_v2")
    + items(name("torch._tensor", "_rebuild_from_type_v2"), name("torch", "Tensor"), items(), b"}") + b"R",
    "wrapper of another class": name("torch._tensor", "_rebuild_from_type_v2")
    + items(TENSOR, name("collections", "OrderedDict"), items(storage(1), b"K\x00", b")", b")", b"\x89", b"N"), b"}")
    + b"R",
    "wrapper of no tensor": name("torch._tensor", "_rebuild_from_type_v2")
    + items(name("collections", "OrderedDict"), name("torch", "Tensor"), b")", b"}") + b"R",
    "subclass": call("torch._utils", "_rebuild_wrapper_subclass", name("os", "system")),
    "hook": remade(storage(1), b"K\x00", b")", b")", b"\x88", dictionary(a=name("os", "system"))),
    "lazy view": remade(storage(1), b"K\x00", b")", b")", b"\x89", NO_HOOKS, dictionary(neg=b"\x88")),
    "encoding": call("_codecs", "encode", COMMAND, text("rot13")),
    "numpy object": call("numpy", "dtype", text("O8"), b"\x89", b"\x88"),
    "a name as value": name("torch", "Tensor"),
    "a name as item": b"](" + name("collections", "OrderedDict") + b"e",
    "a storage as value": storage(1),
}  # fmt: skip
"""Ways from a pickle to code, or to something that is no plain value."""


@pytest.mark.parametrize("attack", CODE)
def test_nothing_in_a_file_can_run(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("owned_module.py").write_text("open('owned', 'w')\n")
    content, raw = dictionary(a=CODE[attack]), {"0": bytes(4)}
    archive(Path("zip.pth"), content, raw)
    stream(Path("stream.pth"), content, raw)
    Path("raw.pth").write_bytes(program(content))
    for file in ("zip.pth", "stream.pth", "raw.pth"):
        assert "read safely" in refusal(Path(file))
    assert not Path("owned").exists()
    assert "owned_module" not in sys.modules


def test_the_attacks_are_real(tmp_path, monkeypatch):
    """Most of them work on an ordinary unpickler: the list above would prove nothing if they were only malformed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("owned_module.py").write_text("open('owned', 'w')\n")
    for attack in ("system", "eval", "import", "importing by naming", "map", "INST", "OBJ", "STACK_GLOBAL"):
        sys.modules.pop("owned_module", None)
        data = program(dictionary(a=CODE[attack]))
        pickletools.dis(data, io.StringIO())
        with contextlib.suppress(TypeError, AttributeError, OSError):  # the result is no list
            list(pickle.loads(data)["a"])
        assert Path("owned").exists(), attack
        Path("owned").unlink()
    sys.modules.pop("owned_module", None)


def test_what_could_run_is_named_and_what_to_do_is_said(tmp_path):
    message = refusal(archive(tmp_path / "w.pth", dictionary(a=CODE["system of Python 2"])))
    assert "'posix.system'" in message
    assert "could run code" in message
    assert "torch.save(model.state_dict(), FILE)" in message
    strange = name("\x1b[31mred", "x" * 150)
    assert "\\x1b[31mred.xxx" in refusal(archive(tmp_path / "w.pth", dictionary(a=strange)))


# ---------------------------------------------------------------- attacks: memory


def laughs(empty: bytes, full: bytes) -> bytes:
    """A container of ten times a container of ten times a container ...; in a tuple, as instructions leave each."""
    return items(empty + b"q\x01", *[full.replace(b"*", b"h\x01" * 10) + b"q\x01" for _ in range(9)])


def repeated(function: bytes, arguments: bytes, count: int) -> bytes:
    """The same call again and again, five bytes each: name and arguments come out of the memo."""
    return items(function + b"q\x01", arguments + b"q\x02", b"](" + b"h\x01h\x02R" * count + b"e")


ONE = {"0": bytes(4)}
MEMORY = {
    "reaches beyond its storage": {
        "offset beyond the storage": tensor(storage(1), (1,), (1,), offset=1),
        "size beyond the storage": tensor(storage(1), (2,), (1,)),
        "stride beyond the storage": tensor(storage(1), (2,), (1 << 20,)),
    },
    "negative, too large, or no number": {
        "negative offset": tensor(storage(1), (1,), (1,), offset=-1),
        "negative size": tensor(storage(1), (-1,), (1,)),
        "negative stride": tensor(storage(1), (2,), (-1,)),
        "sizes beyond 64 bits": tensor(storage(1), (1 << 70,), (1,)),
        "strides beyond 64 bits": tensor(storage(1), (1,), (1 << 70,)),
        "size that is no number": remade(storage(1), b"K\x00", items(text("x")), items(b"K\x01"), b"\x89", b"N"),
        "size that is true": remade(storage(1), b"K\x00", items(b"\x88"), items(b"K\x01"), b"\x89", b"N"),
        "negative storage": tensor(storage(-1), (0,), (1,)),
    },
    "8 times its own size": {
        "product of sizes beyond 64 bits": tensor(storage(1), (1 << 40, 1 << 40), (0, 0)),
        "expanded": tensor(storage(1), (1 << 40,), (0,)),
        "expanded with a side of 0": tensor(storage(1), (0, 1 << 40), (1, 1)),
    },
    "unclear shape": {
        "other number of strides": tensor(storage(1), (1,), ()),
        "hundred sides": tensor(storage(1), (1,) * 100, (1,) * 100),
    },
    "more bytes": {
        "storage larger than the file": tensor(storage(1 << 40), (1,), (1,)),
    },
    "two descriptions of storage": {
        "storage of two sizes": b"](" + tensor(storage(1), (1,), (1,)) + tensor(storage(0), (0,), (1,)) + b"e",
        "storage of two types": b"](" + tensor(storage(1), (1,), (1,))
        + tensor(storage(1, kind="IntStorage"), (1,), (1,)) + b"e",
    },
    "a part of another": {
        "part of a storage": remade(
            storage(1, "0", "FloatStorage", items(text("9"), b"K\x00", b"K\x01")), b"K\x00", b")", b")", b"\x89", b"N"
        ),
    },
    "gradients": {
        "gradient of integers": remade(storage(1, kind="IntStorage"), b"K\x00", b")", b")", b"\x88", b"N"),
    },
    "without a tensor of its type": {
        "old tensor of another type": name("torch", "HalfTensor") + b")R"
        + items(storage(1), b"K\x00", b")", b")") + b"b",
    },
    "levels of containers": {
        "containers in themselves": b"]q\x01h\x01a",
        "deep lists": b"]" * 100_000 + b"a" * 99_999,
        "deep tuples": b")" + b"\x85" * 100_000,
    },
    "hold one another again and again": {
        "laughs": laughs(b"]", b"](*e"),
        "laughs of tuples": laughs(b")", b"(*t"),
    },
    "1,000,000 instructions": {
        "two million instructions": b"](" + b"}" * 2_100_000 + b"e",
        "many tensors": repeated(TENSOR, items(storage(1), b"K\x00", b")", b")", b"\x89", b"N"), 200_000),
        "many parameters": repeated(
            name("torch._utils", "_rebuild_parameter"), items(tensor(storage(1), (), ()), b"\x88", b"N"), 200_000
        ),
        "many old tensors": repeated(name("torch", "FloatTensor"), b")", 200_000),
        "many dictionaries of many pairs": repeated(
            name("collections", "OrderedDict"),
            items(b"](" + b"".join(items(number(i), b"N") for i in range(50_000)) + b"e"), 400_000,
        ),
        "many counters of many": repeated(
            name("collections", "Counter"),
            items(b"}(" + b"".join(number(i) + b"N" for i in range(50_000)) + b"u"), 400_000,
        ),
        "many sets of many": repeated(
            name("builtins", "set"), items(b"](" + b"".join(number(i) for i in range(50_000)) + b"e"), 400_000
        ),
        "many sizes of many": repeated(name("torch", "Size"), items(items(*[b"K\x01"] * 100_000)), 400_000),
        "many bytes of a long text": repeated(
            name("_codecs", "encode"), items(text("x" * 1_000_000), text("latin1")), 400_000
        ),
    },
    "ends too early": {
        "text longer than the file": b"X\xff\xff\xff\xff",
    },
    "text that is not UTF-8": {
        "text that is not UTF-8": b"X\x01\x00\x00\x00\xff",
        "half a character": text("x").replace(b"x", b"\xed\xb2\x80").replace(b"\x01", b"\x03"),
    },
    "refers to nothing": {
        "far place in the memo": b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff",
    },
    "key that is neither text nor number": {
        "key that is a list": b"}]Ns",
        "key that is a tensor": b"}" + tensor(storage(1), (1,), (1,)) + b"Ns",
        "key that is deep": b"})" + b"\x85" * 100_000 + b"Ns",
    },
    "for something that is not a dict": {
        "key without value": b"}(Nu",
        "deep marks": b"(" * 100_000,
    },
    "for something that is not a list": {
        "item for a tuple": b")Na",
        "item for a text": text("x") + b"(Ne",
    },
    "without type or value": {
        "numpy number without bytes": call(
            "numpy.core.multiarray", "scalar", call("numpy", "dtype", text("f8"), b"\x89", b"\x88"),
            call("_codecs", "encode", text("x"), text("latin1")),
        ),
    },
    "an unknown device": {
        "device of no name": call("torch", "device", text("\x00nowhere")),
        "device of a far number": call("torch", "device", text("cpu"), number(1 << 70)),
    },
}  # fmt: skip
"""What the message says -> files that claim what they have not, or that want more than they are."""


def write_all(folder: Path) -> dict[str, tuple[str, str]]:
    """Files' names -> the attack, and what the message says."""
    written = {}
    for words, group in MEMORY.items():
        for attack, content in group.items():
            number = len(written)
            written[archive(folder / f"{number}.zip.pth", dictionary(a=content), ONE).name] = attack, words
            if len(content) < 500_000:  # of the others, one each: they take the longest
                written[stream(folder / f"{number}.stream.pth", dictionary(a=content), ONE).name] = (
                    attack,
                    words,
                )
    return written


READ_ALL = """
import resource, sys
from pathlib import Path
from everseg.errors import CheckpointError
from everseg.models.tensor_file import read_tensors

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_tensors(path)
        print(f"{path.name}\\tREAD")
    except CheckpointError as error:
        print(f"{path.name}\\t{error}")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="bounds memory as Linux does")
@pytest.mark.slow
def test_no_file_takes_more_than_it_has(tmp_path):
    """All in one process that may take 600 MiB: the largest file has 2 MB, and one wants a terabyte."""
    written = write_all(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split("\t") for line in done.stdout.splitlines())
    assert said.keys() == written.keys()
    for file, (attack, words) in written.items():
        assert "read safely" in said[file], (attack, said[file])
        assert words in said[file], (attack, said[file])


def test_storages_that_the_file_does_not_hold_are_refused(tmp_path):
    """Without checksums, so that nothing else finds it."""
    path, content = tmp_path / "w.pth", dictionary(a=tensor(storage(1), (1,), (1,)))
    archive(path, content, ONE)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", zlib.crc32(ONE["0"])), bytes(4)))
    assert read_tensors(path)["a"].tolist() == [0]
    for raw in ({"0": bytes(8)}, {"0": b""}, {"1": bytes(4)}, {}):
        archive(path, content, raw)
        path.write_bytes(path.read_bytes().replace(struct.pack("<I", zlib.crc32(bytes(8))), bytes(4)))
        assert "bytes of storage '0' are missing" in refusal(path)
    for key in ("../version", "../../w/version", "/etc/passwd"):
        archive(path, dictionary(a=tensor(storage(1, key), (1,), (1,))), ONE)
        assert "are missing" in refusal(path)
    stream(path, content, {"0": bytes(8)})
    assert "number of elements" in refusal(path)
    keys: list[dict[Any, bytes]] = [{}, {"1": bytes(4)}, {"0": bytes(4), "1": b""}, {"0": bytes(4), 1: b""}]
    for raw in keys:
        stream(path, content, raw)
        assert "list of storages" in refusal(path)
    stream(path, content, {"0": bytes(4)})
    path.write_bytes(path.read_bytes()[:-1])
    assert "ends too early" in refusal(path)


def test_hostile_archives_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    content = {"a": torch.zeros(100_000)}
    rewritten(saved(content, path), lambda e: e, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    assert "compressed or encrypted" in refusal(path)
    for strange in ("../../x", "w/../../x", "/etc/x", "w\\x"):
        rewritten(saved(content, path), lambda e, strange=strange: {**e, strange: b""})
        assert "an entry called" in refusal(path)
    saved(content, path)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("w/data.pkl", program(b"}"))
    assert "same name" in refusal(path)
    # Two storages that claim the same bytes of the file.
    archive(
        path,
        dictionary(
            a=b"](" + b"".join(tensor(storage(1000, str(k)), (1000,), (1,)) for k in range(50)) + b"e"
        ),
        {str(k): bytes(4000) if k == 0 else b"" for k in range(50)},
    )
    assert "more bytes" in refusal(path)


def test_a_directory_of_any_size_is_not_read(tmp_path):
    path = saved({"a": torch.zeros(2)}, tmp_path / "w.pth")
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\x05\x06")
    with path.open("wb") as file:  # 4 MiB of directory and a bit, in a file with a hole
        file.write(data[:end])
        file.seek((4 << 20) + end)
        directory = (4 << 20) + end - int.from_bytes(data[end + 16 : end + 20], "little")
        file.write(data[end : end + 12] + directory.to_bytes(4, "little") + data[end + 16 :])
    assert "directory has 4 MiB" in refusal(path)


def test_entries_that_lie_elsewhere_are_refused(tmp_path):
    path = saved({"a": torch.zeros(2)}, tmp_path / "w.pth")
    good = path.read_bytes()
    at = good.find(b"PK\x01\x02")
    for offset, value in ((42, 0xFFFFFF00), (42, 10), (20, 1 << 30), (24, 1 << 30)):
        data = bytearray(good)
        data[at + offset : at + offset + 4] = value.to_bytes(4, "little")
        path.write_bytes(data)
        assert "damaged" in refusal(path)
    for place in (1 << 40, (1 << 63) + 5):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("w/data.pkl", program(b"}"))
            file.infolist()[0].header_offset = place
        assert "directory says" in refusal(path)


@FORMS
def test_whatever_is_changed_in_a_file_it_is_read_or_refused(tmp_path, zipped):
    """Changed bytes lead to no other error: a thousand here, some 100,000 when this was written."""
    content = {
        "a": numbers(4, 3).t(),
        "p": torch.nn.Parameter(numbers(2)),
        "n": np.float64(1),
        "l": [1, (2.5, {3})],
    }
    path = saved(content, tmp_path / "w.pth", zipped)
    good, draw = path.read_bytes(), random.Random(0)
    with zipfile.ZipFile(path) if zipped else io.BytesIO() as file:
        inner = file.read("w/data.pkl") if zipped else b""
    checksum = struct.pack("<I", zlib.crc32(inner))
    start, length = (good.find(inner), len(inner)) if zipped else (0, len(good))
    for _ in range(500):
        data = bytearray(good)
        for _ in range(draw.choice((1, 2, 4))):
            data[start + draw.randrange(length)] = draw.choice((draw.randrange(256), *b"(.0RQbcsuteah\x85"))
        path.write_bytes(bytes(data).replace(checksum, bytes(4)) if zipped else bytes(data))
        with contextlib.suppress(CheckpointError):
            read_tensors(path)


# ---------------------------------------------------------------- the other process


@pytest.mark.other_process
@FORMS
def test_the_other_process_gives_what_this_one_would(tmp_path, zipped):
    whole = numbers(4, 6)
    content = {
        "a": whole, "turned": whole.t(), "p": torch.nn.Parameter(torch.ones(2)), "n": np.float32(1.5),
        "nan": float("nan"), "more": [OrderedDict(b=b"\xff"), (None, {1, 2})], "name": "Zürich \U0001f600",
    }  # fmt: skip
    path = saved(content, tmp_path / "a file.pth", zipped)
    own = read_tensors(path)
    assert own["a"].untyped_storage().data_ptr() == own["turned"].untyped_storage().data_ptr()
    for one in (own, content):
        assert str(one.pop("nan")) == "nan"
    assert_same(own, content)
    path.write_bytes(path.read_bytes()[:-70])
    assert "damaged" in refusal(path)


LOCKED = """
import sys
sys.path.insert(0, {root!r})
import ctypes, socket, subprocess
from everseg.models.tensor_layout import lock_up
{before}
lock_up()
try:
    {attempt}
except (OSError, MemoryError, ImportError) as error:
    print(type(error).__name__, getattr(error, "errno", None), flush=True)
else:
    print("done", flush=True)
"""
ATTEMPTS = {
    "read a file": "open('/etc/hostname')", "write a file": "open('owned', 'w')", "socket": "socket.socket()",
    "start a program": "subprocess.Popen(['touch', 'owned'])", "import": "import wave",
    "compile": "eval('1')", "fork": "__import__('os').fork()",
}  # fmt: skip


def locked(folder: Path, attempt: str, before: str = "") -> subprocess.CompletedProcess[str]:
    root = str(Path(everseg.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", LOCKED.format(root=root, attempt=attempt, before=before)],
        capture_output=True, text=True, check=False, cwd=folder, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_the_other_process_can_do_nothing_else(tmp_path, attempt):
    """Python's own watch ends it at once."""
    done = locked(tmp_path, ATTEMPTS[attempt])
    assert (done.returncode, done.stdout) == (4, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits as Linux knows them")
@pytest.mark.parametrize(("attempt", "said"), [
    ("open('/etc/hostname')", "OSError 24"), ("socket.socket()", "OSError 24"), ("import wave", "OSError 24"),
    ("__import__('os').close(2) or open('/etc/hostname')", "OSError 24"),
    ("bytearray(1 << 30)", "MemoryError None"), ("__import__('os').write(9, b'x')", "OSError 27"),
    ("sum(range(100))", "done"),
])  # fmt: skip
def test_nor_where_that_watch_is_got_round(tmp_path, attempt, said):
    """The limits are the operating system's: no new file or socket, no write to a file, no memory."""
    nine = "import os; os.dup2(os.open('there', os.O_CREAT | os.O_WRONLY), 9); import signal;"
    nine += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    done = locked(tmp_path, attempt, f"sys.addaudithook = lambda hook: None; {nine}")
    assert done.stdout.strip() == said, done.stderr
    assert not (tmp_path / "there").read_bytes()


@pytest.mark.other_process
@pytest.mark.parametrize(("program", "facts"), [
    ("import time; time.sleep(60)", ["s,", "memory left"]), ("import os; os._exit(3)", ["1073 MB", "memory"]),
    ("import os; os.abort()", ["without an answer", "-6"]), ("print('[')", ["without an answer"]),
    ("print('{}')", ["layout"]), ("print('x' * 2_000_000)", ["larger than 1 MB"]),
    ("print('{\"refused\": \"it is of cheese\"}')", ["it is of cheese"]),
])  # fmt: skip
def test_however_the_other_process_ends_it_is_said(tmp_path, monkeypatch, program, facts):
    path = saved({"a": torch.zeros(2)}, tmp_path / "w.pth")
    monkeypatch.setattr(tensor_file, "_PROGRAM", program)
    monkeypatch.setattr(tensor_file, "_PATIENCE", 0.5)
    monkeypatch.setattr(tensor_file, "_MOST_LAYOUT", 1_000_000)
    must_say(refusal(path), *facts)


@pytest.mark.other_process
def test_without_a_python_to_start_it_is_said(tmp_path, monkeypatch):
    path = saved({"a": torch.zeros(2)}, tmp_path / "w.pth")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    assert "cannot be read" in refusal(path)
    monkeypatch.setattr(sys, "executable", "")
    assert "Python program" in refusal(path)


def tensor_node(**changed: Any) -> dict[str, Any]:
    """A layout of one tensor of two numbers."""
    node = {
        "number": 0,
        "offset": 0,
        "size": [2],
        "stride": [1],
        "dtype": "float32",
        "grad": False,
        "own": False,
    }
    nodes = [["T", *(node | changed).values()], ["D", "plain", ["a", ["r", 0]], {}]]
    return {"storages": [[0, 8, 0]], "nodes": nodes, "content": ["r", 1]}


LIES = [
    None, [], {}, {**tensor_node(), "more": 1}, {**tensor_node(), "nodes": {}}, {**tensor_node(), "content": ["r", 2]},
    {**tensor_node(), "content": ["r", -1]}, {**tensor_node(), "content": ["r", "0"]},
    {**tensor_node(), "content": ["x", 1]}, {**tensor_node(), "content": []}, {**tensor_node(), "nodes": [["X"]]},
    *({**tensor_node(), "storages": given} for given in (
        [[0, -8, 0]], [[-1, 8, 0]], [[0, 1 << 40, 0]], [[0, 8]], [[0, 8, "0"]], [8], {}, [[1 << 61, 8, 0]], [[0, 8, 1]],
        [[0, 1000, 0], [0, 1000, 0], [0, 1000, 0]], [[0, True, 0]],
    )),
    *(tensor_node(**{key: value}) for key, value in (
        ("number", 1), ("number", -1), ("number", "0"), ("offset", -1), ("offset", 1), ("offset", 1 << 70),
        ("size", [3]), ("size", [-2]), ("size", [1 << 40]), ("size", 2), ("size", [2.0]), ("size", [1] * 65),
        ("stride", [2]), ("stride", []), ("dtype", "load"), ("dtype", ["float32"]), ("dtype", "complex64"),
    )),
    tensor_node(dtype="uint8", grad=True), tensor_node(size=[1 << 20, 1 << 20], stride=[0, 0]),
    *({**tensor_node(), "nodes": [["D", *given]]} for given in (
        ("dict", [], {}), ("plain", ["a"], {}), ("plain", [["s", []], 1, 2], {}), ("plain", [], {"__class__": 1}),
        ("ordered", [], {"__dict__": 1}), ("plain",), ("plain", [["t", "load"], 1], {}),
        ("plain", [1, ["n", "O8", "00"]], {}), ("plain", [1, ["d", "nowhere"]], {}), ("plain", [1, ["s", [-1]]], {}),
        ("plain", [1, ["b", "zz"]], {}), ("plain", [1, {"a": 1}], {}),
    )),
]  # fmt: skip


@pytest.mark.parametrize("lie", range(len(LIES)))
def test_nothing_that_the_other_process_says_is_believed(tmp_path, monkeypatch, lie):
    path = saved({"a": torch.zeros(2)}, tmp_path / "w.pth")
    monkeypatch.setattr(tensor_file, "_layout", lambda file: tensor_node())
    assert read_tensors(path)["a"].shape == (2,)
    monkeypatch.setattr(tensor_file, "_layout", lambda file: LIES[lie])
    assert "damaged" in refusal(path)


# ---------------------------------------------------------------- one reader


def test_nothing_else_reads_pickles():
    """No other file of the package opens a pickle, directly or through a library that would."""
    ways = re.compile(
        r"(?<!safetensors\.)torch\.load\b|torch\.(jit|hub|package)\.|load_state_dict_from_url|Unpickler\(|weights_only"
        r"|pickle\.loads?\b|from pickle|\b(dill|joblib|shelve|marshal)\.|\bcloudpickle\.loads?\b|read_pickle"
        r"|allow_pickle=True"
        r"|from_pretrained\((?!\s*None\b)"
    )
    root = Path(everseg.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        source = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        found += [f"{path.relative_to(root)}: {match[0]}" for match in ways.finditer(source)]
    assert found == []
