"""The split of all data sets that consist of files."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from everseg.data.channels import Channels
from everseg.data.datasets.decode import (
    ENDINGS,
    Colour,
    MaskCoding,
    Reading,
    decode_image,
    decode_mask,
    join_channels,
    no_data,
    open_inside,
    open_picture,
    orientation,
    palette_of_picture,
    read_bands,
    turn,
    whole,
)
from everseg.display import counted
from everseg.errors import DataError
from everseg.files import real_path


class FileSplit:
    """Images and masks in files below one folder; satisfies `everseg.data.base.Split`.

    The paths are kept in one byte string, so that loader workers share its memory instead of copying lists.

    Args:
        name: name of the split.
        root: folder that the paths are relative to; may itself be a link.
        samples: (id, image path, mask path), forward slashes; ids unique. Behind them the files of further channels.
        palette: colour -> raw id, for colour masks.
        id_table: stored id -> raw id, for masks whose ids are not the raw ids.
        most: largest raw id, see `MaskCoding`.
        reading: limits and switches of the decoder.
        warnings: notes about what the reader corrected (duplicate list entries).
        void_share: share of the pixels that may lack an annotation, as a description states it; 0 = it states none, and
            the check doubts an ignore value that looks like objects; None = the data set is a published one.
        no_data_stated: whether ids that GeoTIFFs call "no data" are surely classes; otherwise they are refused.

    Raises:
        DataError: no samples, or an id twice.
    """

    def __init__(
        self,
        name: str,
        root: str | os.PathLike[str],
        samples: Sequence[tuple[str, ...]],
        *,
        palette: Mapping[Colour, int] | None = None,
        id_table: Mapping[int, int] | None = None,
        reading: Reading | None = None,
        warnings: Sequence[str] = (),
        most: int = 255,
        void_share: float | None = None,
        no_data_stated: bool = True,
    ) -> None:
        self.name = name
        self.root = real_path(Path(root))
        self._root = str(self.root)
        self.warnings = tuple(warnings)
        self._coding = MaskCoding(palette, id_table, most)
        self.reading = reading or Reading()
        self.void_share, self.no_data_stated = void_share, no_data_stated
        self._fingerprint = ""
        kept = [s for s in samples if (name, s[0]) not in self.reading.skip]
        if not kept:
            left_out = (
                f" ({counted(len(samples), 'sample', 'is', 'are')} in the skip list)" if samples else ""
            )
            raise DataError(
                f"split '{name}' of {self.root} is empty{left_out}; check the folder, or the list of the split"
            )
        samples = kept
        if len({s[0] for s in samples}) != len(samples):
            raise DataError(f"split '{name}' of {self.root} names a sample twice; ids must be unique")
        # Lists of strings are copied page by page in forked workers, as reading them changes reference counts. One byte
        # string with the end of each sample is not.
        packed = ["\0".join(s).encode("utf-8", "surrogateescape") for s in samples]
        self._bytes = b"".join(packed)
        self._ends = np.cumsum([len(p) for p in packed])

    def __len__(self) -> int:
        return len(self._ends)

    def id(self, index: int) -> str:
        """Name of a sample, unique in the split."""
        return self._sample(index)[0]

    def image_path(self, index: int) -> Path:
        """Path of a sample's image."""
        return self.root / self._sample(index)[1]

    def mask_path(self, index: int) -> Path:
        """Path of a sample's mask."""
        return self.root / self._sample(index)[2]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Decode one sample: image (H, W, 3) uint8 RGB and mask (H, W) uint8 raw ids.

        Where `reading.channels` is set, the image is (H, W, channels) of `channels.array_type`. Else an image with an
        EXIF orientation is turned upright if the mask then fits it, as labelling tools show it.

        Raises:
            DataError: missing, unreadable, truncated, of different sizes, or not a mask of ids.
        """
        if self.reading.channels is not None:
            return self._read_channels(index, self.reading.channels)
        image, how = self._image(index)
        mask = self.read_mask(index)
        # Masks carry no EXIF. A labelling tool that showed the image upright drew the mask upright, so the sizes must
        # agree after turning.
        upright = turn(image, how) if self.reading.exif == "apply" else image
        size = mask.shape[1], mask.shape[0]
        if upright.size != size:
            where = f"{self.image_path(index)} and {self.mask_path(index)}"
            if image.size == size:
                raise DataError(
                    f"{where}: the image carries EXIF orientation {how}, but the mask fits its unturned pixels only;"
                    " turn the mask as well, or set data.options.exif=ignore"
                )
            raise DataError(
                f"{where}: the image is {upright.size[0]}x{upright.size[1]} but the mask {size[0]}x{size[1]};"
                " export the mask at the image's size, or leave the sample out"
            )
        return np.asarray(upright), mask

    def read_mask(self, index: int) -> np.ndarray:
        """Decode the mask only, (H, W) uint8 raw ids.

        Raises:
            DataError: missing, unreadable, truncated, or not a mask of ids.
        """
        relative = self._sample(index)[2]
        shown = f"{self._root}{os.sep}{relative}"
        with open_inside(self.root, relative, follow_links=self.reading.follow_links) as file:
            return decode_mask(open_picture(file, shown, self.reading), shown, self._coding)

    @property
    def colours(self) -> dict[int, list[Colour]]:
        """Raw id -> the colours that masks store for it; {} where masks hold ids."""
        found: dict[int, list[Colour]] = {}
        for colour, raw in (self._coding.palette or {}).items():
            found.setdefault(raw, []).append(colour)
        return found

    def own_palette(self, index: int) -> tuple[bytes, dict[int, int]]:
        """Read the palette that an indexed mask carries, which nothing is read from; only its header is read.

        Returns:
            Red, green, blue of the stored ids from 0 on, and raw id -> stored id. Empty where the labels go by colour,
            where the mask has no palette, and where several stored ids become one.

        Raises:
            DataError: missing or unreadable.
        """
        table = self._coding.id_table
        if self.colours or (table and len(set(table.values())) < len(table)):
            return b"", {}
        relative = self._sample(index)[2]
        with open_inside(self.root, relative, follow_links=self.reading.follow_links) as file:
            palette = palette_of_picture(open_picture(file, self.root / relative, self.reading))
        stored = {raw: raw for raw in range(256)} if table is None else {raw: s for s, raw in table.items()}
        return palette, stored

    def no_data(self, index: int) -> int | None:
        """Read the stored id that a GeoTIFF mask calls "no data", from its header.

        Returns:
            None where there is none, and where labels go by colour.

        Raises:
            DataError: missing or unreadable.
        """
        relative = self._sample(index)[2]
        if self.colours or not relative.lower().endswith(ENDINGS["TIFF"]):
            return None
        with open_inside(self.root, relative, follow_links=self.reading.follow_links) as file:
            return whole(no_data(open_picture(file, self.root / relative, self.reading)))

    def raw_id(self, stored: int) -> int:
        """The raw id of a stored id, which may be undeclared."""
        return (self._coding.id_table or {}).get(stored, stored)

    def decoding(self) -> str:
        """Describe as text everything besides the files that decides what `read` returns."""
        reading = self.reading
        channels = () if reading.channels is None else (reading.channels,)
        return repr((reading.max_pixels, reading.exif, reading.bit_depth, self._coding, *channels))

    def read_digested(self, index: int) -> tuple[np.ndarray, str]:
        """Decode the mask and return its file's SHA-256 as well, so that `fingerprint` need not read the file again.

        Raises:
            DataError: as `read_mask`.
        """
        relative = self._sample(index)[2]
        shown = f"{self._root}{os.sep}{relative}"
        data = self._mask_bytes(relative)
        mask = decode_mask(open_picture(io.BytesIO(data), shown, self.reading), shown, self._coding)
        return mask, hashlib.sha256(data).hexdigest()

    def fingerprint(self, digests: Sequence[str] | None = None) -> str:
        """SHA-256 over the ids, the masks' bytes and how their pixels are read; computed once and remembered.

        It does not depend on where the data lie, nor on the images.

        Args:
            digests: SHA-256 of every mask's file, if known (`read_digested`); then nothing is read.

        Raises:
            DataError: a mask is missing or unreadable.
        """
        if not self._fingerprint:
            head = {
                "format": 1,
                "palette": sorted(self._coding.palette.items()) if self._coding.palette is not None else None,
                "id_table": sorted(self._coding.id_table.items())
                if self._coding.id_table is not None
                else None,
            }
            total = hashlib.sha256(json.dumps(head).encode())
            for index, digest in enumerate(self._mask_digests() if digests is None else digests):
                total.update(f"\n{self.id(index)}\0{digest}".encode("utf-8", "surrogateescape"))
            self._fingerprint = total.hexdigest()
        return self._fingerprint

    def _sample(self, index: int) -> tuple[str, str, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        text = self._bytes[start : int(self._ends[index])].decode("utf-8", "surrogateescape")
        name, image, mask, *_ = text.split("\0")
        return name, image, mask

    def image_files(self, index: int) -> list[str]:
        """All image files of a sample, relative to `root`: the first, and those of further channels."""
        start = int(self._ends[index - 1]) if index else 0
        parts = self._bytes[start : int(self._ends[index])].decode("utf-8", "surrogateescape").split("\0")
        return [parts[1], *parts[3:]]

    def _read_channels(self, index: int, channels: Channels) -> tuple[np.ndarray, np.ndarray]:
        """Decode a sample whose channels are stated; EXIF orientations are not looked at."""
        parts = []
        for relative in self.image_files(index):
            with open_inside(self.root, relative, follow_links=self.reading.follow_links) as file:
                parts.append(read_bands(file, f"{self._root}{os.sep}{relative}", self.reading))
        image, mask = join_channels(parts, self.image_path(index), channels), self.read_mask(index)
        if image.shape[:2] != mask.shape:
            raise DataError(
                f"{self.image_path(index)} and {self.mask_path(index)}: the image is "
                f"{image.shape[1]}x{image.shape[0]} but the mask {mask.shape[1]}x{mask.shape[0]}; export the mask at "
                "the image's size, or leave the sample out"
            )
        return image, mask

    def _image(self, index: int) -> tuple[Image.Image, int]:
        relative = self._sample(index)[1]
        shown = f"{self._root}{os.sep}{relative}"
        with open_inside(self.root, relative, follow_links=self.reading.follow_links) as file:
            picture = open_picture(file, shown, self.reading)
            return decode_image(picture, shown, bit_depth=self.reading.bit_depth), orientation(picture)

    def _mask_digests(self) -> Iterator[str]:
        with ThreadPoolExecutor(
            min(8, os.cpu_count() or 1)
        ) as pool:  # several reads wait for the disk at once
            yield from pool.map(self._mask_digest, range(len(self)))

    def _mask_digest(self, index: int) -> str:
        return hashlib.sha256(self._mask_bytes(self._sample(index)[2])).hexdigest()

    def _mask_bytes(self, relative: str) -> bytes:
        with open_inside(self.root, relative, follow_links=self.reading.follow_links) as file:
            try:
                return file.read()
            except OSError as error:
                raise DataError(f"{self.root / relative}: cannot be read ({error.strerror})") from None
