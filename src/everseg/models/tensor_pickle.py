"""The pickle in a file of `torch.save`: read without an unpickler, so that nothing in it can run.

A pickle is a small program that may name any function of any installed package. Here it is stepped through instruction
by instruction; some thirty of them are known, enough for tensors, numbers, text and the containers around them. A name
in it is compared with a short list of names, and one on the list stands for a function of this file. Nothing is ever
imported or looked up because of a name, so no name can lead to code. What the file claims (sizes, strides, counts) is
checked against the bytes that it has.

Neither PyTorch nor numpy is needed here: tensors are described, not made. `tensor_layout` runs this in a process of its
own, and `tensor_file` makes the tensors.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

MAX_WORK = 1_000_000
"""Most instructions of the pickle, some 20,000 tensors. One that takes much time or memory counts as several."""
MAX_DEPTH = 50
"""Most containers inside each other."""
MAX_SIZE = 1 << 62
"""Above any size, stride or place in a tensor."""
MAX_GROWTH = 8
"""Most bytes of all tensors per byte of the file, each counted as if it had memory of its own.

Files below 128 KiB count as that large.
"""

ITEMSIZE = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64"), 8),
}
"""Types of elements -> bytes of one."""
FLOATING = ("float16", "bfloat16", "float32", "float64")
STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in (
        ("Bool", "bool"), ("Byte", "uint8"), ("Char", "int8"), ("Short", "int16"), ("Int", "int32"), ("Long", "int64"),
        ("Half", "float16"), ("BFloat16", "bfloat16"), ("Float", "float32"), ("Double", "float64"),
    )
}  # fmt: skip
"""Kinds of storage -> type of their elements."""
BYTES = "torch.storage.UntypedStorage"
"""The storage of tensors whose type stands beside it: those of `UNTYPED`."""
UNTYPED = ("uint16", "uint32", "uint64")
LEGACY_TENSORS = {name.replace("Storage", "Tensor"): dtype for name, dtype in STORAGES.items()}
"""Classes of tensors that PyTorch before 0.2 named."""
NUMPY_NUMBERS = {"f8": 8, "f4": 4, "i8": 8, "i4": 4}
"""Types of numpy numbers -> bytes of one: old checkpoints hold their best score as one."""
REFUSED = {
    f"torch.{name}": kind
    for kind, names in (
        ("complex", "ComplexFloatStorage ComplexDoubleStorage complex32 complex64 complex128"),
        ("quantised", "QUInt8Storage QInt8Storage QInt32Storage QUInt4x2Storage QUInt2x4Storage"),
        ("quantised", "_utils._rebuild_qtensor quint8 qint8 qint32 quint4x2 quint2x4"),
        ("float8", "float8_e5m2 float8_e4m3fn float8_e5m2fnuz float8_e4m3fnuz float8_e8m0fnu"),
        ("float4", "float4_e2m1fn_x2"),
        ("sparse", "_utils._rebuild_sparse_tensor"),
        ("nested", "_utils._rebuild_nested_tensor"),
        ("empty (meta)", "_utils._rebuild_meta_tensor_no_storage"),
    )
    for name in names.split()
}
"""Harmless names, of kinds of tensors that no model of everseg has -> the kind."""
KEYS = (str, int, float, bool, type(None), bytes)
"""Types of keys and of what sets hold: hashing them runs nothing and goes no level deeper."""
DICTIONARIES = (dict, OrderedDict, Counter)


ALONE = "save the weights alone, or ask its author to: torch.save(model.state_dict(), FILE)"


class Refusal(Exception):  # noqa: N818 - becomes a CheckpointError
    """Says what is wrong with a file and what to do, without the file's name."""


def damaged(what: str) -> NoReturn:
    raise Refusal(f"it is damaged or was not written by torch.save ({what}); fetch or save it again")


def limit(what: str) -> NoReturn:
    raise Refusal(f"{what}, which no file of weights needs; {ALONE}")


def shown(name: object) -> str:
    """A name of the file's choice in a message: short, control characters made visible."""
    return ascii(str(name)[:80])


# ---------------------------------------------------------------- what a file describes


@dataclass(frozen=True, eq=False)
class Storage:
    """Memory that tensors are views of."""

    number: int
    """Counts them in the order of their first mention."""
    dtype: str | None
    """None: the type stands beside each tensor."""
    count: int
    """Elements."""
    size: int
    """Bytes."""


@dataclass(eq=False)
class View:
    """A tensor."""

    storage: Storage | None
    """None: it has no elements, and no memory."""
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    grad: bool = False
    parameter: bool = False


@dataclass(frozen=True)
class Dtype:
    """A torch.dtype."""

    name: str


@dataclass(frozen=True)
class Device:
    """A torch.device."""

    name: str


@dataclass(frozen=True)
class Size:
    """A torch.Size."""

    sides: tuple[int, ...]


@dataclass(frozen=True)
class NumpyNumber:
    """A number of numpy, as its bytes."""

    code: str
    raw: bytes


LEAVES = (*KEYS, View, Dtype, Device, Size, NumpyNumber)
"""Types of what a file may hold besides dictionaries, lists, tuples and sets."""


@dataclass
class Claims:
    """The memory that a file asks for, bounded by its size."""

    size: int
    """Bytes of the file."""
    storages: dict[str, Storage] = field(default_factory=dict)
    stored: int = 0
    """Bytes of the storages so far: distinct, so together no larger than the file."""
    viewed: int = 0
    """Bytes of the tensors so far, each as if it had memory of its own."""
    work: int = 0
    """Instructions so far; see `MAX_WORK`."""

    def spend(self, work: int) -> None:
        """Count some work before it is done."""
        self.work += work
        if self.work > MAX_WORK:
            limit(f"its description of the tensors takes more than {MAX_WORK:,} instructions")

    def storage(self, kind: Any, key: Any, count: Any) -> Storage:
        """The storage of a key, made at its first mention."""
        if not isinstance(kind, _Name) or kind.name not in (*STORAGES, BYTES) or type(key) is not str:
            damaged("a storage without type or key")
        dtype = STORAGES.get(kind.name)
        wanted = _natural(count) * (1 if dtype is None else ITEMSIZE[dtype])
        known = self.storages.get(key)
        if known is not None:
            if (known.dtype, known.count) != (dtype, count):
                damaged(f"two descriptions of storage {shown(key)}")
            return known
        self.stored += wanted
        if self.stored > self.size:
            damaged("its tensors need more bytes than it has")
        storage = Storage(len(self.storages), dtype, count, wanted)
        self.storages[key] = storage
        return storage

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: str | None = None) -> View:
        """A view of a storage that lies inside it.

        Args:
            dtype: of tensors that lie in bytes without a type.
        """
        for number in (offset, *_list(size), *_list(stride)):
            _natural(number)
        dtype = storage.dtype if isinstance(storage, Storage) and dtype is None else dtype
        if not isinstance(storage, Storage) or dtype is None or storage.dtype not in (None, dtype):
            damaged("a tensor without storage or type")
        if len(_list(size)) != len(_list(stride)) or len(_list(size)) > 64:
            damaged("a tensor of unclear shape")
        self.spend(10)
        view = View(storage, offset, tuple(_list(size)), tuple(_list(stride)), dtype)
        # A tensor without elements takes no memory, but what is made from it may: its other sides count as well.
        self.viewed += bytes_of(view)
        if self.viewed > most_viewed(self.size):
            limit(f"its tensors would take more than {MAX_GROWTH} times its own size")
        if not inside(view, storage.size):
            damaged("a tensor that reaches beyond its storage")
        return view


def bytes_of(view: View) -> int:
    """Bytes of a tensor as if it had memory of its own, sides of 0 counted as 1."""
    return ITEMSIZE[view.dtype] * math.prod(max(1, side) for side in view.size)


def most_viewed(size: int) -> int:
    """Most bytes of all tensors together for a file of `size` bytes."""
    return MAX_GROWTH * max(size, 128 << 10)


def inside(view: View, size: int) -> bool:
    """Whether a tensor lies inside the `size` bytes of its storage."""
    last = view.offset + sum((side - 1) * step for side, step in zip(view.size, view.stride, strict=True))
    return not all(view.size) or (last + 1) * ITEMSIZE[view.dtype] <= size


def _natural(number: Any) -> int:
    if type(number) is not int or not 0 <= number < MAX_SIZE:
        damaged("a size, stride or place that is negative, too large, or no number")
    return number


# ---------------------------------------------------------------- pickle


@dataclass(frozen=True, eq=False)
class _Name:
    """A name of the lists above as it is written in the file; not the object that it names."""

    name: str


@dataclass(eq=False)
class _NumpyType:
    """A type of numpy numbers, while the pickle is read."""

    code: str


@dataclass
class Pickle:
    """Steps through the pickles in some bytes, one per `run`.

    The stack machine of Python's `pickle`, reduced to the instructions that `torch.save` writes. It differs in two
    points: a name is pushed as `_Name`, and calling one means a function of `CALLS`.
    """

    data: bytes
    claims: Claims
    position: int = 0

    def run(self) -> Any:
        """The content of the next pickle, checked to be plain."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        # `before`: the file's instructions are counted over all of its pickles, the check below is for this one.
        before = self.claims.work
        try:
            while (code := self._take(1)) != b".":  # STOP
                self.claims.spend(1)
                self._step(code, stack, marks, memo)
            result = stack.pop()
        except IndexError:
            damaged("its pickle takes from an empty stack")
        _check_plain(result, 4 * (self.claims.work - before) + 100)
        return result

    def _take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            damaged("its pickle ends too early")
        self.position += count
        return taken

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 200)
        if end < 0:
            damaged("a name without an end")
        line = self.data[self.position : end]
        self.position = end + 1
        return line.decode("utf-8", "replace")

    def _step(self, code: bytes, stack: list[Any], marks: list[int], memo: dict[int, Any]) -> None:
        """Carry out one instruction; comments give the names of Python's `pickletools`."""
        if code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            stack.append(_EMPTY[code]())
        elif code in _NUMBERS:
            form = _NUMBERS[code]
            stack.append(form.unpack(self._take(form.size))[0])
        elif code in _TUPLES:
            count = _TUPLES[code]
            if len(stack) < count:  # a slice of a short stack would quietly give fewer
                raise IndexError
            stack[-count:] = [tuple(stack[-count:])]
        elif code == b"(":  # MARK
            marks.append(len(stack))
        elif code in b"teu":  # TUPLE, APPENDS, SETITEMS: all that lies above the last mark
            mark = marks.pop()
            items = stack[mark:]
            del stack[mark:]
            if code == b"t":
                stack.append(tuple(items))
            else:
                _add(stack[-1], items, list if code == b"e" else dict)
        elif code == b"a":  # APPEND
            _add(stack[-2], [stack.pop()], list)
        elif code == b"s":  # SETITEM
            items = stack[-2:]
            del stack[-2:]
            _add(stack[-1], items, dict)
        else:
            self._step_longer(code, stack, memo)

    def _step_longer(self, code: bytes, stack: list[Any], memo: dict[int, Any]) -> None:
        """Carry out the instructions that use more than the order of the stack."""
        if code in _MEMO:
            form, writes = _MEMO[code]
            number = form.unpack(self._take(form.size))[0]
            if writes:
                memo[number] = stack[-1]
            elif number in memo:
                stack.append(memo[number])
            else:
                damaged("its pickle refers to nothing")
        elif code in _LENGTHS:
            form = _LENGTHS[code]
            text = self._take(form.unpack(self._take(form.size))[0])
            try:
                stack.append(text.decode())
            except UnicodeDecodeError:
                damaged("text that is not UTF-8")
        elif code == b"\x8a":  # LONG1
            stack.append(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))
        elif code == b"c":  # GLOBAL
            stack.append(_known(f"{self._line()}.{self._line()}"))
        elif code in b"R\x81":  # REDUCE, NEWOBJ
            given, name = stack.pop(), stack.pop()
            stack.append(_call(self.claims, name, given))
        elif code == b"b":  # BUILD
            state = stack.pop()
            _complete(self.claims, stack[-1], state)
        elif code == b"Q":  # BINPERSID
            stack.append(self._persistent(stack.pop()))
        elif code == b"\x80":  # PROTO
            protocol = self._take(1)[0]
            if protocol not in (2, 3):
                raise Refusal(
                    f"it is a pickle of protocol {protocol}; save it with torch.save, which writes protocol 2"
                )
        else:
            damaged(f"the instruction {code!r}, which torch.save does not write")

    def _persistent(self, reference: Any) -> Storage:
        """Resolve a reference to a storage: ("storage", type, key, device, number of elements[, view])."""
        if type(reference) is not tuple or len(reference) not in (5, 6) or type(reference[0]) is not str:
            raise Refusal(
                f"it refers to something other than the memory of a tensor, which could run code; {ALONE}"
            )
        # A sixth entry stands for a storage that is a part of another; PyTorch wrote such storages before 0.4.
        if reference[0] != "storage" or (len(reference) == 6 and reference[5] is not None):
            damaged("a reference to no storage, or to a part of another one")
        return self.claims.storage(reference[1], reference[2], reference[4])


_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_EMPTY: dict[bytes, Callable[[], Any]] = {b"}": dict, b"]": list, b")": tuple}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_BYTE, _HALF, _INT, _WORD, _DOUBLE = (struct.Struct(form) for form in ("<B", "<H", "<i", "<I", ">d"))
_NUMBERS = {b"K": _BYTE, b"M": _HALF, b"J": _INT, b"G": _DOUBLE}
_LENGTHS = {b"X": _WORD, b"U": _BYTE}
"""BINUNICODE; SHORT_BINSTRING, the text of Python 2."""
_MEMO = {b"q": (_BYTE, True), b"r": (_WORD, True), b"h": (_BYTE, False), b"j": (_WORD, False)}
"""BINPUT, LONG_BINPUT, BINGET, LONG_BINGET."""


# ---------------------------------------------------------------- what names in a file stand for


def _known(name: str) -> Any:
    """What a name becomes on the stack."""
    if name.startswith("torch.") and name[len("torch.") :] in ITEMSIZE:
        return Dtype(name[len("torch.") :])
    if name in CALLS or name in STORAGES or name in (BYTES, "torch.Tensor"):
        return _Name(name)
    if name in REFUSED:
        raise Refusal(
            f"it holds {REFUSED[name]} tensors, which no model here has; save the weights as ordinary float tensors"
        )
    raise Refusal(
        f"it holds {shown(name)}, which is not a tensor, number, text or container and could run code; {ALONE}"
    )


def _call(claims: Claims, name: Any, given: Any) -> Any:
    """Run our own function for a call in the file."""
    function, least, most = CALLS.get(name.name, (None, 0, 0)) if isinstance(name, _Name) else (None, 0, 0)
    if function is None or type(given) is not tuple or not least <= len(given) <= most:
        damaged("a call that torch.save does not write")
    return function(claims, *given)


# Each of these gets whatever the file gives, and checks it.


def _tensor(
    claims: Claims, storage: Any, offset: Any, size: Any, stride: Any, grad: Any = False, hooks: Any = None,
    marks: Any = None,
) -> View:  # fmt: skip
    # Hooks are functions, for which there is no name here: whatever stands there is left out.
    if marks is not None and (type(marks) is not dict or marks):
        damaged("a tensor that is a conjugate or negative view")
    return _with_grad(claims.tensor(storage, offset, size, stride), grad)


def _tensor_in_bytes(
    claims: Claims, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any,
    marks: Any = None,
) -> View:  # fmt: skip
    if not isinstance(dtype, Dtype) or dtype.name not in UNTYPED:
        damaged("a tensor of unclear type")
    return _with_grad(claims.tensor(storage, offset, size, stride, dtype.name), grad)


def _parameter(
    claims: Claims, data: Any = None, grad: Any = True, hooks: Any = None, state: Any = None
) -> View:
    claims.spend(10)
    data = _empty("float32") if data is None else data
    if not isinstance(data, View):
        damaged("a parameter without a tensor")
    return _with_grad(replace(data, grad=False, parameter=True), grad)


def _with_attributes(claims: Claims, make: Any, kind: Any, given: Any, attributes: Any) -> View:
    """A tensor with Python attributes: the call that makes it, its class, and the attributes, which are no weights."""
    if not isinstance(kind, _Name) or kind.name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        damaged("a tensor of another class")
    # Not this function itself: calls inside calls would go as deep as the file wants.
    if not isinstance(make, _Name) or not make.name.startswith("torch._utils."):
        damaged("a tensor with attributes that is no tensor")
    return _call(claims, make, given)


def _empty(dtype: str) -> View:
    return View(None, 0, (0,), (1,), dtype)


def _legacy_tensor(dtype: str) -> Callable[[Claims], View]:
    def make(claims: Claims) -> View:
        claims.spend(10)
        return _empty(dtype)

    return make


def _ordered(claims: Claims, pairs: Any = ()) -> OrderedDict[Any, Any]:
    """Empty, or of the list of pairs that Python 2 wrote."""
    claims.spend(len(_list(pairs)))
    ordered: OrderedDict[Any, Any] = OrderedDict()
    for pair in _list(pairs):
        _add(ordered, _list(pair), dict)
    return ordered


def _counter(claims: Claims, counts: Any) -> Counter[Any]:
    if type(counts) is not dict:
        damaged("a counter without a dictionary of counts")
    claims.spend(len(counts))
    # `Counter.update` would add the counts up, whatever type they have; `dict.update` only stores them.
    counter: Counter[Any] = Counter()
    dict.update(counter, counts)
    return counter


def _set(claims: Claims, items: Any) -> set[Any]:
    claims.spend(len(_list(items)))
    return {_key(item) for item in _list(items)}


def _size(claims: Claims, sides: Any) -> Size:
    claims.spend(len(_list(sides)))
    return Size(tuple(_natural(side) for side in _list(sides)))


def _device(claims: Claims, kind: Any, index: Any = None) -> Device:
    if type(kind) is str and index is not None and type(index) is int and 0 <= index < 1000:
        kind = f"{kind}:{index}"
    elif index is not None:
        damaged("an unknown device")
    if type(kind) is not str or not re.fullmatch(r"[a-z]{1,20}(:\d{1,3})?", kind, re.ASCII):
        damaged("an unknown device")
    return Device(kind)


def _encoded(claims: Claims, text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or type(encoding) is not str or encoding != "latin1":
        damaged("invalid bytes")
    claims.spend(len(text) // 16)
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        damaged("invalid bytes")


def _numpy_type(claims: Claims, code: Any, align: Any, copy: Any) -> _NumpyType:
    if type(code) is not str or code not in NUMPY_NUMBERS:
        damaged("a numpy number of another type than " + ", ".join(NUMPY_NUMBERS))
    return _NumpyType(code)


def _numpy_number(claims: Claims, kind: Any, raw: Any) -> Any:
    if not isinstance(kind, _NumpyType) or type(raw) is not bytes or len(raw) != NUMPY_NUMBERS[kind.code]:
        damaged("a numpy number without type or value")
    return NumpyNumber(kind.code, raw)


CALLS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "torch._utils._rebuild_tensor": (_tensor, 4, 4),
    "torch._utils._rebuild_tensor_v2": (_tensor, 6, 7),
    "torch._utils._rebuild_tensor_v3": (_tensor_in_bytes, 7, 8),
    "torch._utils._rebuild_parameter": (_parameter, 3, 3),
    "torch._utils._rebuild_parameter_with_state": (_parameter, 4, 4),
    "torch._tensor._rebuild_from_type_v2": (_with_attributes, 4, 4),
    "torch.nn.parameter.Parameter": (_parameter, 0, 2),
    **{name: (_legacy_tensor(dtype), 0, 0) for name, dtype in LEGACY_TENSORS.items()},
    "torch.Size": (_size, 1, 1),
    "torch.device": (_device, 1, 2),
    "collections.OrderedDict": (_ordered, 0, 1),
    "collections.Counter": (_counter, 1, 1),
    "builtins.set": (_set, 1, 1),
    "__builtin__.set": (_set, 1, 1),
    "_codecs.encode": (_encoded, 2, 2),
    "numpy.dtype": (_numpy_type, 3, 3),
    "numpy.core.multiarray.scalar": (_numpy_number, 2, 2),
    "numpy._core.multiarray.scalar": (_numpy_number, 2, 2),
}
"""Name in a file -> our own function for it, the fewest and the most arguments of a call."""


def _complete(claims: Claims, target: Any, state: Any) -> None:
    """Give an object that was made before the rest of its content."""
    if type(target) is OrderedDict and type(state) is dict:
        if [*state] != ["_metadata"] or type(state["_metadata"]) not in DICTIONARIES:
            damaged("a dictionary with attributes")
        vars(target).update(state)  # versions of the modules, which load_state_dict reads
    elif type(target) is _NumpyType and type(state) is tuple:
        # The numbers of `state` describe structures, which none of NUMPY_NUMBERS is; its text is the byte order.
        if ">" in [part for part in state if type(part) is str]:
            damaged("a numpy number of another byte order")
    elif type(target) is View and type(state) is tuple and len(state) in (3, 4, 5):
        # Before PyTorch 0.4. Tensors: (storage, offset, size, stride). Parameters, which had no storage of their own:
        # (requires_grad, volatile, hooks), earlier (data, creator, hooks, requires_grad, volatile).
        if len(state) > 3:
            data = claims.tensor(*state) if len(state) == 4 else state[0]
            if type(data) is not View or data.parameter or data.dtype != target.dtype:
                damaged("a parameter without a tensor of its type")
            target.storage, target.offset, target.size, target.stride = (
                data.storage, data.offset, data.size, data.stride,
            )  # fmt: skip
        if len(state) != 4:
            _with_grad(target, state[0] if len(state) == 3 else state[3])
    else:
        damaged("an object with more content than torch.save gives it")


# ---------------------------------------------------------------- containers


def _add(target: Any, items: Sequence[Any], kind: type) -> None:
    """Add items to a list, or keys and values, which alternate, to a dictionary."""
    if kind is list and type(target) is list:
        target.extend(items)
    elif kind is dict and type(target) in DICTIONARIES and len(items) % 2 == 0:
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value
    else:
        damaged(f"items for something that is not a {kind.__name__}")


def _key(key: Any) -> Any:
    if type(key) not in KEYS:
        damaged("a key that is neither text nor number")
    return key


def _list(items: Any) -> Sequence[Any]:
    items = items.sides if type(items) is Size else items
    if type(items) not in (list, tuple):
        damaged("something else where a list belongs")
    return items


def _with_grad(tensor: View, grad: Any) -> View:
    if type(grad) is not bool or (grad and tensor.dtype not in FLOATING):
        damaged("gradients for a tensor that has none")
    tensor.grad = grad
    return tensor


def _check_plain(content: Any, most: int) -> None:
    """See that only tensors, numbers, text and containers are left, and that walking through them comes to an end.

    A pickle can put a container into itself, or ten times into another and that ten times into a third: small on disk,
    endless for whoever walks through it. Shared containers count each time they are met.

    Args:
        most: items in all; a file that shares little has fewer than it has instructions.
    """
    # Level by level instead of by recursion: a file can nest deeper than Python's stack.
    level, seen = [content], 1
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if type(item) in LEAVES:
                continue
            if type(item) not in (*DICTIONARIES, list, tuple, set):
                damaged("a name where a value belongs")
            seen += len(item)
            if seen > most:
                limit("its containers hold one another again and again")
            inner.extend(item.values() if isinstance(item, dict) else item)
            inner.extend(vars(item).values() if type(item) is OrderedDict else ())
        if not inner:
            return
        level = inner
    limit(f"it has more than {MAX_DEPTH} levels of containers")
