"""Say of files that no reader opens what they are, and how to export something that is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from everseg.data.datasets.decode import HEIC, HEIC_ENDINGS
from everseg.data.datasets.file_names import walk
from everseg.display import counted
from everseg.errors import some

MAX_FILES = 200_000
_BEGINNING = 4000
KINDS: tuple[tuple[str, bytes, str, str], ...] = (
    (r".*\.xml", b"<annotations>", "CVAT's XML ('CVAT for images')", "export 'Segmentation mask 1.1' or 'COCO 1.0'"),
    (r".*\.xml", b"<bndbox>", "Pascal VOC's boxes, for detection",
     "export masks or polygons; boxes do not say which pixels the object has"),
    (r".*\.(tfrecords?|record)(-\d+-of-\d+)?", b"", "TFRecord", "export pictures and masks, or COCO JSON"),
    (r".*\.ndjson", b"", "NDJSON (Labelbox, Ultralytics)", "export COCO JSON or masks as PNG"),
    (r".*\.json", b"_via_", "VGG Image Annotator's project", "export COCO JSON (VIA: Annotations, Export as COCO)"),
    (r".*\.json", b'"shape_attributes"', "VGG Image Annotator's JSON", "export COCO JSON"),
    (r".*\.json", b'"segments_info"', "COCO's panoptic JSON", "use the instances file, or masks of class ids"),
    (r".*\.nii(\.gz)?", b"", "NIfTI volumes", "save the slices and their masks as PNG"),
    (r".*\.dcm", b"", "DICOM", "save the images and their masks as PNG"),
    (r".*\.(npy|npz)", b"", "NumPy arrays", "save the masks as PNG (PIL.Image.fromarray(mask.astype('uint8')))"),
    (r".*\.mat", b"", "MATLAB files", "save the masks as PNG (imwrite(uint8(mask), 'mask.png'))"),
    (r".*\.(gpkg|shp|geojson)", b"", "shapes on a map",
     "rasterise them onto the pictures (gdal_rasterize -burn ... -ot Byte), and save the masks as PNG or TIFF"),
    (r".*\.(h5|hdf5)", b"", "HDF5", "save the images and their masks as PNG"),
)  # fmt: skip
"""(file name, bytes at its beginning, what it is, the way out)."""


def explained(root: Path) -> list[str]:
    """Describe the files below a folder that are annotations or pictures of a kind that is not read."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in islice(_files(root), MAX_FILES):
        name = path.name.lower()
        kind = next(
            (
                (what, way)
                for pattern, head, what, way in KINDS
                if re.fullmatch(pattern, name) and _begins(path, head)
            ),
            None,
        )
        if name.endswith(HEIC_ENDINGS) and not HEIC:
            kind = "HEIC pictures", "pip install 'everseg[heic]' reads them; or save them as JPEG"
        if kind is not None:
            found.setdefault(kind, []).append(path.relative_to(root).as_posix())
    return [
        f"{counted(len(files), 'file', 'is', 'are')} {what} ({some(files, 3)}): {way}"
        for (what, way), files in found.items()
    ]


def _files(root: Path) -> Iterator[Path]:
    for here, _, files in walk(root):
        yield from (Path(here) / name for name in sorted(files) if not name.startswith("."))


def _begins(path: Path, head: bytes) -> bool:
    if not head:
        return True
    try:
        with path.open("rb") as file:
            return head in file.read(_BEGINNING)
    except OSError:
        return False
