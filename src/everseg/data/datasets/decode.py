"""Open and decode one image or mask file, and refuse everything that would silently give wrong pixels."""

from __future__ import annotations

import io
import math
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, TiffImagePlugin

from everseg.data.channels import TYPES, Channels
from everseg.data.datasets.tiff import UnreadTiffError, directories, layout_of, numbers, pages, pixels_of
from everseg.display import counted, percent
from everseg.errors import DataError
from everseg.files import real_path

HEIC = find_spec("pillow_heif") is not None
"""Whether HEIC pictures can be read (the extra `heic`)."""
HEIC_ENDINGS = (".heic", ".heif")
ENDINGS: Mapping[str, tuple[str, ...]] = {
    "PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "BMP": (".bmp",), "TIFF": (".tif", ".tiff"), "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    **({"HEIF": HEIC_ENDINGS} if HEIC else {}),
}  # fmt: skip
"""Formats of pictures that are ever decoded, and how the names of such files end; the only list of either."""
FORMATS = tuple(form for form in ENDINGS if form != "HEIF")
"""What Pillow may try; exotic decoders (EPS and its like) are never reached. HEIF is tried for files that begin so."""
PICTURE_ENDINGS = tuple(ending for endings in ENDINGS.values() for ending in endings)
CHANNEL_ENDINGS = (*PICTURE_ENDINGS, ".npy")
"""How the names of images end whose channels a data.yaml states."""
Colour = tuple[int, int, int]
LOSSY = frozenset({"JPEG", "MPO", "WEBP", "HEIF"})
"""Formats, as Pillow calls an opened picture, that change values when they compress. MPO is JPEG with more pictures."""
_COLOURS_SHOWN = 12
FEW, CUT_SHARE = 3, 0.005
"""A mask of so few values was drawn sharply; dark ones may not be cut away on more than this share of its pixels."""
_GIVEN = "the image"
"""What messages call a picture that has no file name."""
_DAMAGED = "damaged or cut off ({}); restore the file, or leave it out"
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureTooLargeError(DataError):
    """A picture with more pixels than the limit allows."""


@dataclass(frozen=True)
class Reading:
    """How the files of a data set are read."""

    max_pixels: int = 100_000_000
    """Larger pictures are refused before they are decoded (decompression bombs)."""
    follow_links: bool = False
    """Allow links that lead out of the data folder."""
    exif: Literal["apply", "ignore"] = "apply"
    """Whether images are turned as their EXIF orientation says, as viewers and labelling tools do."""
    bit_depth: Literal[8, 16] = 8
    """Bits per channel of the images; with 16 their values 0..65535 become 0..255 (their higher byte)."""
    channels: Channels | None = None
    """What the images' channels are, if not RGB with 8 bits. `bit_depth` and `exif` do not matter then."""
    on_missing: Literal["stop", "skip"] = "stop"
    """Whether images without mask and masks without image stop everything, or are left out with a warning."""
    skip: frozenset[tuple[str, str]] = frozenset()
    """(split, sample) to leave out, as a skip list names them."""


@dataclass(frozen=True)
class MaskCoding:
    """How the pixels of a mask encode raw ids. Without either field the pixels are the ids."""

    palette: Mapping[Colour, int] | None = None
    """Colour -> raw id, for colour masks; any other colour is an error."""
    id_table: Mapping[int, int] | None = None
    """Stored id -> raw id; any other stored id is an error."""
    most: int = 255
    """Largest raw id: 255, or 65,535 where a data set declares larger ids than a byte holds."""


def open_inside(root: Path, relative: str, *, follow_links: bool = False) -> BinaryIO:
    """Open a regular file below `root` for reading.

    Args:
        root: resolved folder.
        relative: path with forward slashes, without `..`.
        follow_links: allow links out of `root`.

    Raises:
        DataError: the file is missing, unreadable, not a regular file (a FIFO or device would block), or
            outside `root`.
    """
    parts = relative.split("/")
    if "\0" in relative or relative.startswith("/") or ".." in parts:
        raise DataError(f"{relative!r}: leads out of the data folder {root}; list only files inside it")
    path: Path | str = f"{root}{os.sep}{relative}"  # pathlib would take longer than opening the file does
    try:
        info = _below(root, parts)
        if info is None:  # some part of the path is a link
            path = Path(path)
            if not follow_links and not path.resolve(strict=True).is_relative_to(root):
                raise DataError(
                    f"{path}: a link leads out of the data folder to {real_path(path)}; copy the files into it,"
                    " or set data.options.follow_links=true (data init: --follow-links)"
                )
            info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{path}: is not a regular file; put the picture in its place, or leave it out")
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        return os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; restore it, or leave it out") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be opened ({reason}); check its permissions and links") from None


def _below(root: Path, parts: list[str]) -> os.stat_result | None:
    """Get the `stat` result of a file below the resolved `root`; None if any part of the path is a link.

    This calls `lstat` a few times. Resolving the path would cost ten times as much.
    """
    place = str(root)
    info = None
    for part in parts:
        place = f"{place}{os.sep}{part}"
        info = os.lstat(place)
        if stat.S_ISLNK(info.st_mode):
            return None
    return info


UNLIMITED = Reading(max_pixels=2**62)
"""For looking at headers: nothing is decoded, so no size is too large."""


def open_picture(file: BinaryIO, shown: Path | str, reading: Reading) -> Image.Image:
    """Read a picture's header and check its size against `reading.max_pixels`; nothing is decoded yet.

    Raises:
        DataError: empty, not a picture of an allowed format, or too large.
    """
    formats = _formats(file)
    if _has_endless_header(file):
        raise DataError(
            f"{shown}: its header has more than {_MOST_HEADER >> 10} KiB of comments; save the picture without them"
        )
    try:
        with _own_limit():
            picture = Image.open(file, formats=formats)
    except Exception as error:  # decoders raise almost any exception on damaged files
        raise DataError(f"{shown}: {_what_instead(file, error)}") from None
    _check_size(picture.width, picture.height, shown, reading)
    return picture


_MOST_HEADER = 64 << 10
"""Bytes of a PPM's header. Pillow reads it byte by byte, which takes half a minute for a comment of 50 MB."""


def _has_endless_header(file: BinaryIO) -> bool:
    """Whether a PPM or its like (PGM, PBM, PFM) does not state its size within `_MOST_HEADER`."""
    begun = file.read(2)
    head = file.read(_MOST_HEADER) if re.match(b"P[0-6fy]", begun) else b""
    file.seek(0)
    numbers = 2 if begun in (b"P1", b"P4") else 3  # width, height, and the largest value if it is not 1
    return len(head) == _MOST_HEADER and len(re.sub(rb"#[^\r\n]*", b" ", head).split(maxsplit=3)) < numbers


def _formats(file: BinaryIO) -> tuple[str, ...]:
    """The formats that Pillow may try on a file."""
    head = file.read(12)
    file.seek(0)
    if not (HEIC and head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS):
        return FORMATS
    import pillow_heif

    pillow_heif.register_heif_opener()
    return ("HEIF",)


_opening = threading.Lock()


@contextmanager
def _own_limit() -> Iterator[None]:
    """Switch off Pillow's pixel limit while a header is read. Our limit is checked right after, and states the size.

    Pillow's limit is one variable for the whole process. If it stayed raised after one picture, it would be raised for
    all code, and what is refused would depend on what was opened before. So it is restored at once, and a lock lets
    only one thread change it at a time.
    """
    with _opening:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_size(width: int, height: int, shown: Path | str, reading: Reading) -> None:
    if width * height > reading.max_pixels:
        raise PictureTooLargeError(
            f"{shown}: {width}x{height} pixels, more than the limit of {reading.max_pixels};"
            " if the picture is genuine, raise data.options.max_pixels, or cut it into tiles"
        )


def read_image(given: Any, reading: Reading | None = None) -> np.ndarray:
    """Read one picture from the user as RGB, turned upright by its EXIF orientation.

    A file, its bytes, the Pillow image opened from it and an array of its pixels give the same result, and are refused
    for the same reasons. Grey is copied to all three channels, and alpha is dropped.

    Args:
        given: path of a file (links are followed), its bytes, a binary stream, a Pillow image, or anything that
            `numpy.asarray` takes, a tensor too: (H, W), (H, W, 1 to 4), integers; 2 and 4 channels have alpha last.
        reading: largest size, EXIF, bits per channel; None = the defaults.

    Where `reading.channels` is set, the given file or array has to hold all these channels, (H, W, channels).

    Returns:
        (H, W, 3) uint8 RGB, a copy; or (H, W, channels) of `channels.array_type`.

    Raises:
        DataError: missing, unreadable, damaged, too large, more bits per channel than declared, or too many channels.
    """
    reading = reading or Reading(follow_links=True)
    if reading.channels is not None:
        return _all_channels(given, reading, reading.channels)
    if isinstance(given, str | os.PathLike):
        path = Path(given).absolute()
        with open_inside(path.parent, path.name, follow_links=True) as file:
            return _upright(open_picture(file, path, reading), path, reading)
    if isinstance(given, bytes | bytearray | memoryview):
        given = io.BytesIO(given)
    if hasattr(given, "read"):
        return _upright(open_picture(given, _GIVEN, reading), _GIVEN, reading)
    if isinstance(given, Image.Image):
        _check_size(given.width, given.height, _GIVEN, reading)
        return _upright(given, _GIVEN, reading)
    return _from_array(given, reading)


def _all_channels(given: Any, reading: Reading, channels: Channels) -> np.ndarray:
    """Read an image of stated channels from one file, its bytes, or an array."""
    if isinstance(given, str | os.PathLike):
        path = Path(given).absolute()
        with open_inside(path.parent, path.name, follow_links=True) as file:
            return join_channels([read_bands(file, path, reading)], path, channels)
    if isinstance(given, bytes | bytearray | memoryview):
        given = io.BytesIO(given)
    if hasattr(given, "read"):
        return join_channels([read_bands(given, _GIVEN, reading)], _GIVEN, channels)
    if isinstance(given, Image.Image):
        _check_size(given.width, given.height, _GIVEN, reading)
        return join_channels([_bands_of_picture(given, _GIVEN)], _GIVEN, channels)
    try:
        pixels = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    except Exception as error:  # a foreign object may raise any exception when it is converted to an array
        raise DataError(f"{_GIVEN}: {type(given).__name__} is not an image ({error})") from None
    return join_channels([_three_axes(pixels, _GIVEN, reading)], _GIVEN, channels)


def read_bands(file: BinaryIO, shown: Path | str, reading: Reading) -> np.ndarray:
    """Read all bands of one file: NPY, TIFF of any number of bands, or a picture of up to 4 channels, PNG of 16 bits.

    A TIFF is read without Pillow, which drops what comes after the fourth band (`everseg.data.datasets.tiff`).

    Returns:
        (H, W, bands) with the values and the type of the file; nothing is scaled, and no EXIF orientation applied.

    Raises:
        DataError: damaged, too large, or of another kind.
    """
    head = file.read(8)
    file.seek(0)
    if head[:6] == b"\x93NUMPY":
        return _read_npy(file, shown, reading)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0"):
        return _read_tiff(file, shown, reading)
    return _bands_of_picture(open_picture(file, shown, reading), shown)


def join_channels(parts: list[np.ndarray], shown: Path | str, channels: Channels) -> np.ndarray:
    """Put the bands of a sample's files behind each other and check them against what the data.yaml states.

    Args:
        parts: (H, W, bands) each, with the files' values.
        shown: the (first) file, for messages.
        channels: what is expected.

    Returns:
        (H, W, channels), contiguous, of `channels.array_type`.

    Raises:
        DataError: other sizes, another number of channels, values that the stated bits do not hold, or no numbers.
    """
    sizes = {part.shape[:2] for part in parts}
    if len(sizes) > 1:
        found = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise DataError(f"{shown}: its files differ in size ({found}); export all channels at one size")
    found = sum(part.shape[2] for part in parts)
    if found != len(channels):
        raise DataError(
            f"{shown}: {found} channels where {len(channels)} are stated ({', '.join(channels.names[:12])}); "
            "give all of them in this order, in one TIFF or NPY file"
            + (", or correct channels.names" if len(parts) == 1 else ", or correct channels.folders")
        )
    kind = TYPES[channels.bits]
    for part in parts:
        if not np.can_cast(part.dtype, kind, "safe"):
            raise DataError(
                f"{shown}: values of type {part.dtype} where {kind} is stated; set channels.bits to 16 for whole "
                "numbers up to 65535, to 32 for floating-point numbers, or convert the files"
            )
    image = np.ascontiguousarray(np.concatenate(parts, axis=2, dtype=channels.array_type))
    if not np.isfinite(image).all():
        raise DataError(
            f"{shown}: holds NaN or infinite values; fill them, and mark their pixels as ignored in the mask"
        )
    return image


def _three_axes(pixels: np.ndarray, shown: Path | str, reading: Reading) -> np.ndarray:
    """Check an array of an image; (H, W) becomes (H, W, 1)."""
    shape = "x".join(map(str, pixels.shape))
    if pixels.ndim not in (2, 3) or pixels.dtype.kind not in "buif" or 0 in pixels.shape:
        raise DataError(
            f"{shown}: an array of shape {shape or '()'} and type {pixels.dtype}; give numbers of shape "
            "(height, width, channels)"
        )
    _check_size(pixels.shape[1], pixels.shape[0], shown, reading)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _read_npy(file: BinaryIO, shown: Path | str, reading: Reading) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, _, dtype = header(file)
        _three_axes(
            np.broadcast_to(np.zeros((), dtype), shape), shown, reading
        )  # checked before memory is taken
        begin, end = file.tell(), file.seek(0, os.SEEK_END)
        if begin + math.prod(shape) * dtype.itemsize > end:
            raise DataError(f"{shown}: {_DAMAGED.format('it holds less than its header says')}")
        file.seek(0)
        return _three_axes(np.load(file, allow_pickle=False), shown, reading)
    except DataError:
        raise
    except Exception as error:  # damaged headers raise almost any exception
        raise DataError(f"{shown}: {_DAMAGED.format(error)}") from None


def _bands_of_picture(picture: Image.Image, shown: Path | str) -> np.ndarray:
    _check_single(picture, shown)
    raw_mode = _raw_mode(picture)
    if picture.mode not in ("L", "LA", "RGB", "RGBA", "F") and not picture.mode.startswith("I;16"):
        raise DataError(f"{shown}: an image of mode {picture.mode}; save its channels as TIFF or NPY")
    if ";16" in raw_mode and not picture.mode.startswith("I;16"):
        raise DataError(
            f"{shown}: several channels of 16 bits ({raw_mode}), which are not read here; save TIFF or NPY"
        )
    _decode(picture, shown)
    pixels = np.asarray(picture)
    if pixels.dtype.byteorder == ">":
        pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _read_tiff(file: BinaryIO, shown: Path | str, reading: Reading) -> np.ndarray:
    try:
        layout = layout_of(file)
        _check_size(layout.width, layout.height, shown, reading)
        pixels = pixels_of(file, layout)
        if reading.channels is not None:
            _require_in_range(pixels, _number(layout.no_data), shown, reading.channels)
        return pixels
    except DataError:
        raise
    except UnreadTiffError as error:
        raise DataError(f"{shown}: {error}") from None
    except Exception as error:  # damaged directories, or cut off in the middle, or offsets that lead nowhere
        raise DataError(f"{shown}: {_DAMAGED.format(str(error) or type(error).__name__)}") from None


def _require_in_range(pixels: np.ndarray, value: float | None, shown: Path | str, channels: Channels) -> None:
    """Refuse "no data" that is no value of any channel, as -9999: the network would see it as one."""
    if value is None or min(channels.low) <= value <= max(channels.high):
        return
    share = float((pixels == value).mean())
    if share:
        raise DataError(
            f"{shown}: holds {value:g}, its 'no data' (GDAL_NODATA), in {percent(share)} % of its values, outside of "
            "channels.range; fill them (gdal_fillnodata), and mark their pixels as ignored in the mask"
        )


def check_readable(path: Path, reading: Reading) -> None:
    """Check an image file by its header, which is fast; damage in its pixels is not found.

    An image whose channels are stated is read whole: only its values tell whether it fits.

    Raises:
        DataError: as `read_image`.
    """
    if reading.channels is not None:
        read_image(path, reading)
        return
    path = path.absolute()
    with open_inside(path.parent, path.name, follow_links=True) as file:
        check_image(open_picture(file, path, reading), path, bit_depth=reading.bit_depth)


def _upright(picture: Image.Image, shown: Path | str, reading: Reading) -> np.ndarray:
    image = decode_image(picture, shown, bit_depth=reading.bit_depth)
    return np.array(turn(image, orientation(picture) if reading.exif == "apply" else 1))


def _from_array(given: Any, reading: Reading) -> np.ndarray:
    """Convert pixels given as an array to (H, W, 3) uint8."""
    try:
        pixels = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    except Exception as error:  # a foreign object may raise any exception when it is converted to an array
        raise DataError(f"{_GIVEN}: {type(given).__name__} is not a picture ({error})") from None
    if pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    shape = "x".join(map(str, pixels.shape))
    if pixels.ndim not in (2, 3) or pixels.dtype == object or 0 in pixels.shape:
        raise DataError(
            f"{_GIVEN}: {type(given).__name__} of shape {shape or '()'} and type {pixels.dtype} is not a picture; "
            "give a path, bytes, a Pillow image, or an array (H, W, 3) uint8"
        )
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    height, width, channels = pixels.shape
    if channels > 4:
        what = (
            "the channels come last: give (H, W, 3)"
            if height in (1, 3, 4)
            else "give the three that are meant"
        )
        raise DataError(f"{_GIVEN}: an array {shape} of {channels} channels; {what}")
    _check_size(width, height, _GIVEN, reading)
    if pixels.dtype == np.uint16 and reading.bit_depth == 16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise DataError(
            f"{_GIVEN}: an array of {pixels.dtype}, where 8 bits per channel (uint8, 0 to 255) are expected; its "
            "brightness would be cut off. Convert it with the contrast you want"
            + (
                ", or set bit_depth: 16 to take the higher byte of each value"
                if pixels.dtype == np.uint16
                else ""
            )
        )
    colours = pixels[:, :, : 1 if channels < 3 else 3]  # without alpha
    return np.array(np.broadcast_to(colours, (height, width, 3)), order="C")


def decode_image(picture: Image.Image, shown: Path | str, *, bit_depth: int = 8) -> Image.Image:
    """Decode an opened image to RGB. Grey is copied to all three channels, and alpha is dropped.

    Args:
        bit_depth: 16 allows channels of 16 bits and reduces them to their higher byte.

    Raises:
        DataError: truncated or damaged, more bits per channel than declared, several pages, or an unusual colour
            model.
    """
    check_image(picture, shown, bit_depth=bit_depth)
    _decode(picture, shown)
    if bit_depth == 16 and picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def check_image(picture: Image.Image, shown: Path | str, *, bit_depth: int = 8) -> None:
    """Check what an opened image's header says; nothing is decoded.

    Raises:
        DataError: as `decode_image`, except damage, which only decoding finds.
    """
    _check_single(picture, shown)
    if bit_depth == 16 and picture.mode.startswith("I;16"):
        return
    deep = (";16" in _raw_mode(picture) and bit_depth == 8) or picture.mode[:1] in ("I", "F")
    if deep:
        raise DataError(
            f"{shown}: an image of more than 8 bits per channel ({picture.mode}); its brightness would be cut off."
            " Convert it to 8 bits with the contrast you want"
            + (
                ", or set bit_depth: 16 (data.options.bit_depth=16) to take the higher byte of each value"
                if ";16" in _raw_mode(picture)
                else ""
            )
        )
    if picture.mode not in ("RGB", "RGBA", "RGBX", "RGBa", "L", "LA", "La", "P", "PA", "1", "CMYK", "YCbCr"):
        raise DataError(f"{shown}: colour model {picture.mode} is not supported; convert the image to RGB")


def orientation(picture: Image.Image) -> int:
    """Read the EXIF orientation of an image, 1 (upright) to 8; 1 where there is none.

    Call it after `decode_image`: for PNG, Pillow decodes the pixels to find the EXIF block.
    """
    try:
        value = picture.getexif().get(0x0112, 1)
    except Exception:  # the pixels are usable even if the EXIF block is damaged
        return 1
    return value if value in _TURN else 1


def turn(picture: Image.Image, how: int) -> Image.Image:
    """Turn an image as its EXIF orientation states."""
    return picture.transpose(_TURN[how]) if how in _TURN else picture


def decode_mask(picture: Image.Image, shown: Path | str, coding: MaskCoding) -> np.ndarray:
    """Decode an opened mask to (H, W) raw ids; the array may be read-only.

    Ids are uint8, and uint16 in a mask that holds larger ones.

    Raises:
        DataError: lossy file format, a colour mask without palette, an unknown colour or id, an id outside
            0..`coding.most`, damaged.
    """
    if picture.format in LOSSY:
        raise DataError(
            f"{shown}: a mask stored as {picture.format}, which changes ids when it compresses;"
            " export the masks as PNG again (converting this file does not bring the ids back)"
        )
    _check_single(picture, shown)
    if coding.palette is not None:
        _decode(picture, shown)
        return _from_colours(picture, shown, coding.palette)
    if picture.mode in ("RGB", "RGBA", "RGBX"):
        _decode(picture, shown)
        raise DataError(_colours_found(picture, shown))
    ids = stored_ids(picture, shown)
    if coding.id_table is not None:
        return _from_table(ids, shown, coding.id_table)
    if ids.dtype != np.uint8:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > coding.most:
            wider = ", or declare the classes with these ids (up to 65534)" if high < 2**16 else ""
            raise DataError(
                f"{shown}: ids from {low} to {high}, but a class id must lie in 0..{coding.most} (instance or panoptic"
                f" ids?); export the class ids, or map them in the data.yaml: labels: {{map: {{...}}}}{wider}"
            )
        if high > 255:
            return ids.astype(np.uint16, copy=False)
    return ids.astype(np.uint8, copy=False)


def stored_ids(picture: Image.Image, shown: Path | str) -> np.ndarray:
    """Decode a mask of one channel to the integers that it stores, (H, W); the array may be read-only.

    Raises:
        DataError: a colour picture, or damaged.
    """
    raw_mode = _raw_mode(picture)  # known before the pixels are decoded only
    _decode(picture, shown)
    if picture.mode.startswith("I"):
        return np.asarray(picture)
    if picture.mode not in ("P", "L", "1"):
        raise DataError(f"{shown}: a mask of mode {picture.mode}; save one integer channel of ids as PNG")
    ids = np.asarray(picture).astype(np.uint8, copy=False)
    if raw_mode in ("L;2", "L;4"):
        # Pillow stretches 2- and 4-bit grey to 0..255, but in masks the unscaled values are the ids
        ids = ids // np.uint8(85 if raw_mode == "L;2" else 17)
    return ids


def palette_of_picture(picture: Image.Image) -> bytes:
    """Red, green, blue of the indices from 0 on; empty for pictures without palette. A PNG is not decoded for it."""
    if picture.mode != "P":
        return b""
    stored = picture.palette
    # Pillow decodes the picture when it is asked for the colours, which stand in a PNG's header already.
    if (
        picture.format == "PNG"
        and stored is not None
        and stored.mode == "RGB"
        and stored.rawmode in (None, "RGB")
    ):
        return bytes(stored.palette)
    return bytes(picture.getpalette("RGB") or ())


def no_data(picture: Image.Image) -> float | None:
    """Read the value that a GeoTIFF calls "no data"; None where there is none, or it is no number (NaN)."""
    return _number(getattr(picture, "tag_v2", {}).get(_GDAL_NODATA))


def whole(value: float | None) -> int | None:
    """A number that is a whole one; else None."""
    return int(value) if value is not None and value == int(value) else None


_GDAL_NODATA = 42113


def _number(text: object) -> float | None:
    try:
        found = float(str(text).strip("\0 "))
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def transparent_pixels(picture: Image.Image) -> np.ndarray | None:
    """Find the fully transparent pixels of a colour picture, (H, W) bool; None without an alpha channel."""
    return np.asarray(picture.getchannel("A")) == 0 if picture.mode == "RGBA" else None


def _from_table(ids: np.ndarray, shown: Path | str, table: Mapping[int, int]) -> np.ndarray:
    values = np.unique(ids)
    unknown = [v for v in values.tolist() if v not in table]
    if unknown:
        raise DataError(
            f"{shown}: ids {unknown[:_COLOURS_SHOWN]} are not in labels.map (or the layout's own table of ids);"
            " add them there, or repair the mask"
        )
    wanted = [table[v] for v in values.tolist()]
    targets = np.array(wanted, np.uint8 if max(wanted, default=0) <= 255 else np.uint16)
    # A table of all greys cuts smoothed masks into dark and bright. A mask of very few values was not smoothed: a
    # dark one of them, 1 say, is a class of another way to count, and would become background.
    if len(table) >= 256 and 1 < len(values) <= FEW:
        dark = [v for v in values.tolist() if v != 0 and table[v] == table.get(0)]
        share = float(np.isin(ids, dark).mean())
        if share > CUT_SHARE:
            raise DataError(
                f"{shown}: holds the values {values.tolist()}, and labels.map makes {dark} the same as 0, on "
                f"{percent(share)} % of the mask (limit {percent(CUT_SHARE)} %); export it like the others"
            )
    if ids.dtype == np.uint8:
        lut = np.zeros(256, targets.dtype)
        lut[values] = targets
        return lut[ids]
    return targets[np.searchsorted(values, ids)]


def _from_colours(picture: Image.Image, shown: Path | str, palette: Mapping[Colour, int]) -> np.ndarray:
    packed = packed_colours(picture)
    keys = np.array(sorted(r << 16 | g << 8 | b for r, g, b in palette), np.uint32)
    ids = np.array([palette[(k >> 16, k >> 8 & 255, k & 255)] for k in keys.tolist()])
    ids = ids.astype(np.uint8 if ids.max(initial=0) <= 255 else np.uint16)
    place = np.minimum(np.searchsorted(keys, packed), len(keys) - 1)
    wrong = keys[place] != packed
    if wrong.any():
        values, counts = np.unique(packed[wrong], return_counts=True)
        found = ", ".join(
            f"{list(unpack_colour(v))} on {counted(n, 'pixel')}"
            for v, n in zip(values[:_COLOURS_SHOWN], counts, strict=False)
        )
        raise DataError(
            f"{shown}: colours that labels.palette does not name: {found}; add them, or repair the mask"
        )
    clear = transparent_pixels(picture)
    if clear is not None and clear.any():
        both = np.intersect1d(packed[clear], packed[~clear])
        if both.size:
            lost = min(int(np.isin(packed[where], both).sum()) for where in (clear, ~clear))
            colours = ", ".join(str(list(unpack_colour(v))) for v in both[:_COLOURS_SHOWN])
            raise DataError(
                f"{shown}: objects stand in the alpha channel, which is not read: {colours} is transparent on some "
                f"pixels and opaque on others ({percent(lost / packed.size)} % of the mask); export it as an "
                "opaque picture"
            )
    return ids[place]


def packed_colours(picture: Image.Image) -> np.ndarray:
    """Pack colours into (H, W) uint32: red << 16 | green << 8 | blue."""
    rgb = np.asarray(picture.convert("RGB")).astype(np.uint32)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def unpack_colour(value: int) -> Colour:
    """The reverse of `packed_colours`, for one pixel."""
    return int(value) >> 16, int(value) >> 8 & 255, int(value) & 255


def _colours_found(picture: Image.Image, shown: Path | str) -> str:
    values, counts = np.unique(packed_colours(picture), return_counts=True)
    most = values[np.argsort(-counts, kind="stable")][:_COLOURS_SHOWN]
    lines = [f"    name_{i}: {list(unpack_colour(v))}" for i, v in enumerate(most)]
    more = f" (the {_COLOURS_SHOWN} most frequent of {len(values)})" if len(values) > _COLOURS_SHOWN else ""
    return (
        f"{shown}: a colour mask where ids are expected. Describe the data in a data.yaml with the colours"
        f" found{more}, each under its class name:\nlabels:\n  palette:\n" + "\n".join(lines)
    )


def _raw_mode(picture: Image.Image) -> str:
    """Find the pixel layout inside the file ("RGB;16B", "L;4"), which Pillow's mode does not state."""
    tiles = getattr(picture, "tile", None)
    if not tiles:
        return picture.mode
    args = tiles[0][3]
    return str(args[0] if isinstance(args, tuple) and args else args)


def _check_single(picture: Image.Image, shown: Path | str) -> None:
    try:
        if picture.format == "TIFF":
            pages = _tiff_pages(picture)
        else:
            pages = 1 if picture.format in ("MPO", "HEIF") else getattr(picture, "n_frames", 1)
    except Exception as error:  # counting the pages reads more of the file
        raise DataError(f"{shown}: {_DAMAGED.format(error)}") from None
    if pages > 1:
        raise DataError(f"{shown}: holds {pages} pages; save the one page that you want")


def _tiff_pages(picture: Image.Image) -> int:
    file = picture.fp  # type: ignore[attr-defined]
    if file is None:  # it is decoded already, and was checked before
        return 1
    place = file.tell()
    try:
        return pages(file)[1]
    finally:
        file.seek(place)


def _decode(picture: Image.Image, shown: Path | str) -> None:
    try:
        picture.load()
    except Exception as error:  # decoders raise almost any exception on damaged files
        raise DataError(f"{shown}: {_DAMAGED.format(error)}") from None


def _what_instead(file: BinaryIO, error: Exception) -> str:
    file.seek(0)
    head = file.read(64)
    if not head:
        return "is empty (0 bytes); restore the file, or leave it out"
    if head.lstrip()[:1] == b"<":
        return "is a web page or XML, not a picture (a failed download?); fetch it again"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return "is text, not a picture; restore the file, or leave it out"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and (text := _about_tiff(file)):
        return text
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return HEIF_ADVICE
    reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    return f"is not a readable {'/'.join(FORMATS)} picture ({reason}); restore the file, or leave it out"


_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
HEIF_ADVICE = (
    "is a HEIC picture, as phones store them: pip install 'everseg[heic]' reads it; or save it as JPEG or PNG"
)
_SAMPLES = {
    1: "whole numbers",
    2: "signed whole numbers",
    3: "floats",
    5: "complex numbers",
    6: "complex numbers",
}


def _about_tiff(file: BinaryIO) -> str:
    """Say of a TIFF that Pillow does not read what it holds and how to convert it; "" if nothing explains it."""
    try:
        tags = next(directories(file))
        bands = int(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
        # The type of a tag is the file's own choice: text and fractions may stand where numbers are expected.
        deep = max(numbers(tags.get(TiffImagePlugin.BITSPERSAMPLE, 1)))
        kind = _SAMPLES.get(
            numbers(tags.get(TiffImagePlugin.SAMPLEFORMAT, 1))[0], "an unknown kind of numbers"
        )
        colours = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
    except Exception:  # decoders raise almost any exception on damaged files
        return ""
    stretch = " -ot Byte -scale LOW HIGH 0 255" if deep > 8 else ""
    pick = " -b RED -b GREEN -b BLUE" if bands > 1 else ""
    way = (
        f"gdal_translate{pick} -co PHOTOMETRIC={'RGB' if bands > 1 else 'MINISBLACK'}{stretch} IN.tif OUT.tif"
    )
    if bands > 4:
        return f"is a TIFF of {bands} bands; export the three that are meant as an RGB picture ({way})"
    if bands > 1 and colours in (0, 1):
        return (
            f"is a TIFF of {bands} bands of {deep} bits, which does not say which of them are red, green and blue; "
            f"export the three that are meant as an RGB picture ({way})"
        )
    if deep > 8:
        return f"is a TIFF of bands: {bands}, bits: {deep} ({kind}); export 8 bits per band ({way})"
    return ""
