"""Pack published image lists (FOLDER/<data set>/<task>[-ov]/train-<step>.npy) into the tables everseg ships.

Usage: python scripts/pack_lists.py FOLDER [TABLES]

Ascending lists are stored as bit masks, others as 16-bit positions in their published order; every list is
unpacked again and compared before anything is written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from everseg.scenarios.lists import sha1_int64, unpack

IMAGES = {"voc": 10582, "ade": 20210}
TABLES = Path(__file__).resolve().parents[1] / "src" / "everseg" / "scenarios" / "tables"


def pack(indices: np.ndarray, length: int) -> tuple[str, np.ndarray]:
    """Return the name's ending and the packed array of one list of positions below `length`."""
    if indices.min() < 0 or indices.max() >= length:
        raise SystemExit(f"position outside 0 to {length - 1}")
    if (np.diff(indices) > 0).all():
        mask = np.zeros(length, bool)
        mask[indices] = True
        return ".bits", np.packbits(mask)
    return "", indices.astype(np.uint16)


def main() -> None:
    """Read a folder of lists and write mib_lists.npz and mib_lists.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tables", type=Path, nargs="?", default=TABLES)
    args = parser.parse_args()
    packed: dict[str, np.ndarray] = {}
    lists: dict[str, dict[str, int | str]] = {}
    for path in sorted(args.folder.glob("*/*/train-*.npy")):
        key = path.relative_to(args.folder).with_suffix("").as_posix()
        indices = np.load(path, allow_pickle=False).astype(np.int64)
        ending, array = pack(indices, IMAGES[key.split("/")[0]])
        if not np.array_equal(unpack(key + ending, array), indices):
            raise SystemExit(f"{path}: does not survive packing")
        packed[key + ending] = array
        lists[key] = {"n": len(indices), "sha1_int64": sha1_int64(indices)}
    if not packed:
        raise SystemExit(f"no <data set>/<task>/train-<step>.npy under {args.folder}")
    table = {
        "source": "github.com/fcdl94/MiB, data/<data set>/<task>[-ov]/train-<step>.npy (MIT licence, "
        "Copyright (c) 2020 Fabio Cermelli), for Cermelli et al., Modeling the Background, CVPR 2020",
        "images": IMAGES,
        "lists": lists,
    }
    np.savez_compressed(args.tables / "mib_lists.npz", **packed)  # type: ignore[arg-type]
    (args.tables / "mib_lists.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
