"""The hostile corpus: files that lie, made when they are needed, and what everseg must say of each.

Nothing here does harm: where a file would run code, the code makes a file called `owned` or `imported` in the
trial's own folder, and no trial may leave one.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import test_doctor_catalogue as catalogue
import test_download as archives
import test_hostile_documents as stored
import test_tensor_file as pickles
import trees
from apart import Ended, apart, everseg
from campaigns import Trial, campaign
from miniature import SETTINGS
from PIL import Image

from hostile_documents import NO_DOCUMENT, special_files

FIXTURES = Path(__file__).parents[1] / "fixtures"
SENTINELS = ("owned", "imported", "evil")
MOST_SECONDS, MOST_MEMORY = 15.0, 1 << 30
"""Of the processor, and bytes beside those of the test: an import of torch's parts alone may take some seconds."""

Work = Callable[[], object]


class Hostile(NamedTuple):
    """One file of the corpus."""

    name: str
    make: Callable[[Path], Work]
    """Puts it into a folder; what then reads it."""
    codes: tuple[int, ...]
    """Exit codes that are right."""
    facts: tuple[str, ...] = ()
    """What the message must hold."""


# ---------------------------------------------------------------- ground that files are put on


def run_in(place: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "run-format-1", place / "x"))


def bundle_in(place: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "bundle-format-1", place / "bundle"))


def tree_in(place: Path, text: str = trees.FOLDER_YAML) -> Path:
    trees.folder(place / "data", text)
    (place / "run.yaml").write_text(json.dumps(SETTINGS))
    return place / "data"


def refit(bundle: Path, name: str, data: bytes) -> None:
    """Another file in a bundle, and a manifest that fits: who forges one writes both."""
    from everseg.runs.commit import MANIFEST, _json, _self_hash

    (bundle / name).write_bytes(data)
    body = json.loads((bundle / MANIFEST).read_text())
    del body["self"]
    body["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / MANIFEST).write_bytes(_json({**body, "self": _self_hash(body)}))


def picture(place: Path) -> Path:
    return trees.save(place / "photo.png", trees.image_of(1))


# ---------------------------------------------------------------- weights: pickles


def _import(place: Path, write: Callable[[Path], object], name: str = "x.pth") -> Work:
    (place / "owned_module.py").write_text("open('owned', 'w')\n")
    write(place / name)
    return everseg("import", "mib", name, "-o", "out")


def _weights(place: Path, write: Callable[[Path], object], name: str = "x.pth") -> Work:
    tree_in(place)
    write(place / name)
    return everseg("run", "run.yaml", f"model.weights={name}", "--quiet")


def _pickle_files() -> Iterator[Hostile]:
    code = {name: pickles.dictionary(a=content) for name, content in pickles.CODE.items()}
    for number, (name, content) in enumerate(code.items()):
        archive = partial(lambda path, content: pickles.archive(path, content, pickles.ONE), content=content)
        stream = partial(lambda path, content: pickles.stream(path, content, pickles.ONE), content=content)
        raw = partial(lambda path, content: path.write_bytes(pickles.program(content)), content=content)
        reads = _weights if number % 8 == 0 else _import
        yield Hostile(f"pickle in a zip: {name}", partial(reads, write=archive), (4,), ("x.pth",))
        if number % 3 == 0:
            yield Hostile(f"pickle in a stream: {name}", partial(_import, write=stream), (4,), ("x.pth",))
            yield Hostile(f"bare pickle: {name}", partial(_import, write=raw), (4,), ("x.pth",))
    for group in pickles.MEMORY.values():
        for name, content in group.items():
            if len(content) < 500_000:
                whole = pickles.dictionary(a=content)
                write = partial(lambda path, whole: pickles.archive(path, whole, pickles.ONE), whole=whole)
                yield Hostile(f"claims in a pickle: {name}", partial(_import, write=write), (4,), ("x.pth",))
    system = pickles.program(code["system"])
    for name in ("x.safetensors", "x.bin", "x.ckpt", "x.pt", "x.npz"):
        yield Hostile(
            f"a pickle called {name}",
            partial(_weights, write=lambda path: path.write_bytes(system), name=name),
            (4,),
        )
    for name in (
        "model.safetensors",
        "classes.json",
        "lineage.json",
        "preprocessing.json",
        "method_state.safetensors",
    ):

        def put(place: Path, name: str = name) -> Work:
            refit(bundle_in(place), name, system)
            return everseg("predict", "bundle", picture(place), "-o", "out")

        # What is not needed to predict is not read for it.
        needed = name in ("model.safetensors", "classes.json")
        yield Hostile(f"a pickle as {name} of a bundle", put, (4,) if needed else (0, 4))

    def distributed(place: Path) -> Work:
        (place / "dcp").mkdir()
        (place / "dcp/.metadata").write_bytes(system)
        return everseg("import", "mib", "dcp", "-o", "out")

    yield Hostile("the .metadata of a distributed checkpoint", distributed, (2, 4))


# ---------------------------------------------------------------- weights: safetensors


def _header(text: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def _one(**entry: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}).encode()


SAFETENSORS: dict[str, bytes] = {
    "a header of 100 MB": _header(b"{}", b"", 101 << 20),
    "a header longer than the file": _header(b"{}", b"", 1000),
    "a header of 2^64-1": _header(b"{}", b"", 2**64 - 1),
    "no header": b"\x01\x02",
    "empty": b"",
    "overlap": _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                       b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "a hole": _header(_one(data_offsets=[4, 8]), bytes(8)),
    "negative offsets": _header(_one(data_offsets=[-4, 0]), bytes(4)),
    "offsets turned round": _header(_one(data_offsets=[4, 0]), bytes(4)),
    "keys twice": _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                          b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "a JSON bomb": _header(b"[" * 100_000 + b"]" * 100_000),
    "levels": _header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "a wrong type of element": _header(_one(dtype="V1500000000"), bytes(4)),
    "a type of another size": _header(_one(dtype="F64"), bytes(4)),
    "data behind": _header(_one(), bytes(400)),
    "cut data": _header(_one(), bytes(2)),
    "a shape beyond 64 bits": _header(_one(shape=[2**63, 2**63]), bytes(4)),
    "a negative shape": _header(_one(shape=[-1]), bytes(4)),
    "ten terabytes": _header(_one(shape=[10**13], data_offsets=[0, 4 * 10**13]), bytes(4)),
    "no JSON": _header(b"not json"),
    "a list": _header(b"[1, 2]"),
    "not UTF-8": _header(b'{"\xff\xfe": 1}'),
    "an entry that is a number": _header(b'{"a": 3}'),
    "metadata that is no text": _header(b'{"__metadata__": {"a": 3}}'),
    "not finite": _header(_one(), struct.pack("<f", float("nan"))),
    "a name with an escape": _header(b'{"\\u001b[31mred":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
}  # fmt: skip


def _safetensors_files() -> Iterator[Hostile]:
    for name, data in SAFETENSORS.items():

        def weights(place: Path, data: bytes = data) -> Work:
            return _weights(place, lambda path: path.write_bytes(data), "x.safetensors")

        def bundle(place: Path, data: bytes = data) -> Work:
            refit(bundle_in(place), "model.safetensors", data)
            return everseg("predict", "bundle", picture(place), "-o", "out")

        yield Hostile(f"safetensors as weights: {name}", weights, (4,), ("x.safetensors",))
        yield Hostile(f"safetensors in a bundle: {name}", bundle, (4,), ("bundle",))


# ---------------------------------------------------------------- archives


def _archive_files() -> Iterator[Hostile]:
    from everseg.data.get.unpack import Limits, extract

    for name, (make, _) in archives.HOSTILE.items():

        def put(place: Path, make: Callable[[], bytes] = make) -> Work:
            (place / "archive").write_bytes(make())
            limits = Limits(entries=30, ratio=20, ratio_from=300_000)
            return lambda: extract(place / "archive", place / "deep" / "out", limits=limits)

        yield Hostile(f"archive: {name}", put, (3,), ("archive",))


# ---------------------------------------------------------------- pictures, masks, lists


def _pixels(width: int, height: int) -> bytes:
    """A PNG that claims a size."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    whole = bytearray(buffer.getvalue())
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", archives.zlib.crc32(whole[12:29]))
    return bytes(whole)


PICTURES: dict[str, bytes] = {
    "65535 x 65535": _pixels(65535, 65535),
    "one row of 2^31": _pixels(2**31 - 1, 1),
    "negative": _pixels(2**32 - 1, 2**32 - 1),
    "no pixels": _pixels(0, 0),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(owned) (w) file closefile\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n",
    "GIF of one byte": b"G",
    "PPM of 10^18 pixels": b"P6 1000000000 1000000000 255\n",
    "PPM with a long comment": b"P6 #" + b"x" * 300_000 + b"\n1 1 255\n",
    "TIFF in a circle": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "BMP of -2^31 rows": b"BM" + struct.pack("<IHHI", 60, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 9, -(2**31),
    1, 24, 0, 0,
                                                                                0, 0, 0, 0),
    "ICO": b"\0\0\1\0\1\0\0\0\0\0\1\0 \0\xff\xff\xff\xff\x16\0\0\0",
    "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3\x7f\xff\xff\xff\x7f\xff\xff\xff\0\x08\0\3",
    "WEBP of nothing": b"RIFF\x04\0\0\0WEBP",
    "HTML": b"<!DOCTYPE html><script>alert(1)</script>",
    "a zip": b"PK\x05\x06" + bytes(18),
    "JPEG without end": b"\xff\xd8" + b"\xff\xe0\0\x10JFIF" * 9,
}  # fmt: skip
LISTS: dict[str, str] = {
    "parent": "../../etc/passwd\n", "hidden parent": "a/../../../etc/passwd\n", "absolute": "/etc/passwd\n",
    "home": "~/x\n",
    "URL": "https://example.org/a.png\n", "file URL": "file:///etc/passwd\n", "NUL": "a\0b\n",
    "long": "x" * 70_000 + "\n",
    "backslashes": "..\\..\\x.png\n", "device": "/dev/zero\n", "process": "/proc/self/mem\n", "escape": "\x1b[31mred\n",
    "right to left": "\u202egnp.exe\n", "quotes": '"a\n"b', "many columns": "a b c d e f\n" * 50,
    "a folder": "images\n",
    "empty": "", "comments only": "#\n# more\n", "twice": "train/a_0\n" * 3, "UTF-16": "a\0_\0000\0\n\0",
}  # fmt: skip


def _picture_files() -> Iterator[Hostile]:
    for name, (spoil, kind) in catalogue.ERRORS.items():

        def errors(place: Path, spoil: catalogue.Spoil = spoil) -> Work:
            spoil(catalogue.Tree(place / "data"))
            return everseg("data", "check", "data/data.yaml", "--no-cache")

        # On the command line each option is what the user has said, so a doubt is no error there.
        yield Hostile(f"bad data: {name}", errors, (3,), (kind,) if kind not in ("layout",) else ())
    for name, (spoil, _) in catalogue.FINE.items():

        def fine(place: Path, spoil: catalogue.Spoil = spoil) -> Work:
            spoil(catalogue.Tree(place / "data"))
            return everseg("data", "check", "data/data.yaml", "--no-cache")

        yield Hostile(f"odd data: {name}", fine, (0,))
    for name, data in PICTURES.items():

        def predict(place: Path, data: bytes = data) -> Work:
            bundle_in(place)
            (place / "x.png").write_bytes(data)
            return everseg("predict", "bundle", "x.png", "-o", "out")

        yield Hostile(f"picture: {name}", predict, (3,), ("x.png",))
    for name, text in LISTS.items():

        def listed(place: Path, text: str = text) -> Work:
            tree_in(place, trees.FOLDER_YAML + catalogue.LISTS)
            (place / "data/train.txt").write_bytes(text.encode())
            return everseg("data", "check", "data/data.yaml", "--no-cache")

        codes = (0, 3) if name == "twice" else (3,)
        yield Hostile(f"list: {name}", listed, codes)


# ---------------------------------------------------------------- documents


RUN_DOCUMENTS = ("run.json", "scenario.json", "steps/01/metrics.json")
BUNDLE_DOCUMENTS = ("classes.json", "lineage.json", "MANIFEST.json")


def _document_files() -> Iterator[Hostile]:
    for document in RUN_DOCUMENTS:
        for name, data in NO_DOCUMENT.items():

            def run(place: Path, document: str = document, data: bytes = data) -> Work:
                (run_in(place) / document).write_bytes(data)
                return everseg("report", "x", "--images", "0", "--quiet")

            yield Hostile(f"{document}: {name}", run, (4,), (Path(document).name,))
    for document in BUNDLE_DOCUMENTS:
        for name, data in NO_DOCUMENT.items():

            def bundle(place: Path, document: str = document, data: bytes = data) -> Work:
                folder = bundle_in(place)
                if document == "MANIFEST.json":
                    (folder / document).write_bytes(data)
                else:
                    refit(folder, document, data)
                return everseg("history", "bundle")

            yield Hostile(f"{document} of a bundle: {name}", bundle, (4,), ("bundle",))


def _special_files() -> Iterator[Hostile]:
    specials = (
        "a FIFO",
        "a folder",
        "a link out",
        "a link to a device",
        "a link to itself",
        "a link to nothing",
    )
    for document in (*RUN_DOCUMENTS, "journal.jsonl", "steps/01/confusion.npz"):
        for name in specials:

            def special(place: Path, document: str = document, name: str = name) -> Work:
                run = run_in(place)
                shutil.copy(run / document, place / "outside")
                special_files(run / document, place / "outside")[name]()
                return everseg("report", "x", "--images", "0", "--quiet")

            # A journal that is not there is told on the page; a step without results counts as not finished.
            gone = document.endswith("metrics.json") and name in ("a link to itself", "a link to nothing")
            codes = (0, 4) if document == "journal.jsonl" or gone else (4,)
            yield Hostile(f"{document} is {name}", special, codes)
    for document in ("classes.json", "model.safetensors", "MANIFEST.json"):
        for name in specials:

            def beside(place: Path, document: str = document, name: str = name) -> Work:
                folder = bundle_in(place)
                shutil.copy(folder / document, place / "outside")
                special_files(folder / document, place / "outside")[name]()
                return everseg("predict", "bundle", picture(place), "-o", "out")

            yield Hostile(f"{document} of a bundle is {name}", beside, (4,), ("bundle",))


def _array_files() -> Iterator[Hostile]:
    for archive in ("confusion.npz", "images.npz"):
        for name, data in stored.ARRAYS.items():
            # Runs of 0.1.0 have no checksum of these files, which would stand in the way.
            def arrays(place: Path, archive: str = archive, data: bytes = data) -> Work:
                run = run_in(place)
                path = run / "steps/01" / archive
                with zipfile.ZipFile(path, "w") as packed:
                    packed.writestr("default.npy", data)
                return lambda: stored.everything(run)  # a report without pictures reads no images.npz

            yield Hostile(f"{archive}: {name}", arrays, (4,), (archive,))


SETTINGS_FILES: dict[str, bytes] = {
    "a tag": b"method: !!python/object/apply:os.system ['touch owned']\n",
    "a tag of a name": b"a: !!python/name:os.system\n",
    "an own tag": b"a: !evil x\n",
    "laughs": b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c]\n",
    "keys twice": b"seed: 1\nseed: 2\n",
    "merge": b"x: &x {a: 1}\ntrain: {<<: *x}\n",
    "levels": b"a: " + b"[" * 20_000,
    "mappings in mappings": b"".join(b" " * n + b"a:\n" for n in range(3000)),
    "tabs": b"train:\n\tlr: 1\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "a directive": b"%YAML 1.1\n---\nseed: 1\n",
    "UTF-16": "seed: 1\n".encode("utf-16"),
    "a NUL": b"seed: \0\n",
    "a list": b"- a\n- b\n",
    "a number": b"3\n",
    "empty": b"",
    "two megabytes": b"#" + b"x" * 2_000_000 + b"\nseed: 1\n",
    "a huge number": b"seed: " + b"9" * 5000 + b"\n",
    "base in a circle": b"base: run.yaml\n",
    "base of a device": b"base: /dev/zero\n",
    "base of the system": b"base: /etc/passwd\n",
    "code as method": b"method: evil.py:Mine\n",
    "true as key": b"true: 1\n",
    "null as key": b"? null\n: 1\n",
    "a list as key": b"? [a]\n: 1\n",
    "infinite": b"train: {lr: .inf}\n",
    "not a number": b"train: {lr: .nan}\n",
    "many unknown keys": b"".join(b"k%d: 1\n" % n for n in range(3000)),
    "bidirectional": "\u202eseed: 1\n".encode(),
    "escapes": b'"\\x1b[31mred": 1\n',
}  # fmt: skip
RUN_NAMES = (
    "../x",
    "..",
    ".",
    "a/b",
    "/tmp/x",
    "a\\b",
    "x" * 300,
    "a\nb",
    " ",
    "-rf",
    "a\x1b[31m",
    "\u202ex",
    "con:",
    "~",
)
CLASS_NAMES = (
    "<script>alert(1)</script>", "=HYPERLINK(1)", "@SUM(1)", "\\input{x}", "a|b", "../../etc", "a\nb",
    "\x1b[31mred", "\u202egnp",
    "{}{0.__class__}", "%s%n", "x" * 5000, "'; DROP TABLE", "\u200b", "a\tb", "$(touch owned)", "`touch owned`",
)  # fmt: skip


def _settings_files() -> Iterator[Hostile]:
    fine = {"empty", "merge", "a directive"}  # the last one changes nothing of how values are read
    for name, data in SETTINGS_FILES.items():
        if (
            name == "code as method"
        ):  # the user names the file, and so the code: this is how own methods are used
            continue

        def settings(place: Path, data: bytes = data) -> Work:
            (place / "evil.py").write_text("open('imported', 'w').close()\n")
            (place / "run.yaml").write_bytes(data)
            return everseg("show", "run.yaml", "train.epochs=1")

        yield Hostile(
            f"settings: {name}",
            settings,
            (0, 2) if name in fine else (2,),
            () if name in fine or name.startswith("base of") else ("run.yaml",),  # else the base is named
        )

        def description(place: Path, data: bytes = data) -> Work:
            tree_in(place)
            (place / "data/data.yaml").write_bytes(data)
            return everseg("data", "check", "data/data.yaml", "--no-cache")

        yield Hostile(f"data.yaml: {name}", description, (2, 3), ("data.yaml",))
    for name in RUN_NAMES:

        def named(place: Path, name: str = name) -> Work:
            tree_in(place)
            return everseg("run", "run.yaml", f"name={name}", "--dry-run", "--quiet")

        allowed = name in ("-rf", "~")
        yield Hostile(
            f"name of a run: {name[:20]!r}", named, (0, 2) if allowed else (2,), () if allowed else ("name",)
        )
    for name in CLASS_NAMES:

        def classes(place: Path, name: str = name) -> Work:
            tree_in(place, f"classes: [background, road, {json.dumps(name)}]\nignore: 9\n")
            return everseg("data", "check", "data/data.yaml", "--no-cache")

        yield Hostile(f"name of a class: {name[:20]!r}", classes, (0, 2, 3))

        def stored_name(place: Path, name: str = name) -> Work:
            run = run_in(place)
            for path in ("steps/01/metrics.json", "scenario.json"):
                text = (run / path).read_text()
                content = {k: v for k, v in json.loads(text.replace('"tree"', json.dumps(name))).items()
                           if k not in ("sealed", "sha256")}  # fmt: skip
                stored.write_document(run / path, content)
            return everseg("compare", "x", "--out", "compared")

        yield Hostile(f"name of a class in a run: {name[:20]!r}", stored_name, (0, 2, 4))


KINDS: dict[str, list[Hostile]] = {
    "weights": [*_pickle_files(), *_safetensors_files()],
    "data": [*_picture_files(), *_archive_files()],
    "documents": [*_document_files(), *_special_files(), *_array_files()],
    "settings and names": [*_settings_files()],
}
"""The corpus: what can be handed to everseg, by kind."""


# ---------------------------------------------------------------- trials


def _spoken(text: str) -> str:
    """What is wrong with the characters of a message; "" if nothing."""
    for character in text:
        if character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co"):
            return f"the character {character!a} is shown as it is"
    return "" if text.count("\n") <= 200 else f"{text.count(chr(10))} lines"


def _fault(hostile: Hostile, ended: Ended, place: Path) -> str:
    if wrong := ended.wrong(*hostile.codes, facts=hostile.facts if ended.code else ()):
        return wrong
    if found := [str(path) for name in SENTINELS for path in place.parent.rglob(name) if path.name == name]:
        return f"it made {found}"
    if sorted(path.name for path in place.parent.iterdir() if path.name != "cache") != [place.name]:
        return f"something lies beside its folder: {[path.name for path in place.parent.iterdir()]}"
    if ended.seconds > MOST_SECONDS or ended.memory > MOST_MEMORY:
        return f"{ended.seconds:.1f} s, {ended.memory >> 20} MB"
    return _spoken(ended.text)


def _tried(hostiles: list[Hostile], place: Path, number: int) -> Iterator[Trial]:
    step = max(1, len(hostiles) // number)
    for hostile in hostiles[::step][:number] if number < len(hostiles) else hostiles:
        ground = place / "ground"
        here = ground / "here"
        here.mkdir(parents=True)
        ended = apart(hostile.make(here), here, watch=True, cache=ground / "cache", timeout=60)
        yield Trial(hostile.name, _fault(hostile, ended, here))
        shutil.rmtree(ground)


@campaign("hostile weights", everyday=5, long=len(KINDS["weights"]))
def weights(place: Path, number: int) -> Iterator[Trial]:
    """Pickles that would run code or take memory, safetensors that lie: exit code 4 and a message; nothing runs, and
    nothing is written elsewhere."""
    return _tried(KINDS["weights"], place, number)


@campaign("hostile data", everyday=6, long=len(KINDS["data"]))
def data(place: Path, number: int) -> Iterator[Trial]:
    """Pictures, masks, lists and archives that are damaged, lie or lead out: exit code 3 and the file's name; odd
    ones that are no fault are read."""
    return _tried(KINDS["data"], place, number)


@campaign("hostile documents", everyday=4, long=len(KINDS["documents"]))
def documents(place: Path, number: int) -> Iterator[Trial]:
    """JSON and arrays of run folders and bundles that are none, nest, repeat keys, or are links, FIFOs and devices:
    exit code 4 and the file's name."""
    return _tried(KINDS["documents"], place, number)


@campaign("hostile settings and names", everyday=4, long=len(KINDS["settings and names"]))
def settings(place: Path, number: int) -> Iterator[Trial]:
    """YAML with tags, aliases or levels, names of runs that lead out, names of classes with markup and escapes: exit
    code 2 or 3, or they are shown as text."""
    return _tried(KINDS["settings and names"], place, number)
