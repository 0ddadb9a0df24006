"""Files that a check writes for later: the samples to leave out, and the hashes of the good ones (floor 2)."""

from __future__ import annotations

import json
from pathlib import Path

from everseg.data.datasets.options import read_skiplist, skiplist_line
from everseg.data.findings import Report
from everseg.data.writing import write_atomically
from everseg.errors import ConfigError

Digests = dict[tuple[str, str], tuple[str, str]]


def write_skiplist(path: Path, report: Report) -> int:
    """Write every sample with an error, one per line; lines that an existing skip list holds stay.

    Returns:
        Number of samples in the file.

    Raises:
        ConfigError: a file is there that is no skip list.
        OSError: the disk does not allow it.
    """
    kept = sorted(read_skiplist(path)) if path.exists() else []
    bad = [(f.split, f.sample) for f in report.findings if f.level == "error" and f.sample]
    places = list(dict.fromkeys([*kept, *bad]))
    text = "".join(f"{skiplist_line(*place)}\n" for place in places)
    write_atomically(path, text.encode("utf-8", "surrogateescape"))
    return len(places)


def write_lock(path: Path, report: Report) -> None:
    """Write the SHA-256 of image and mask of every sample that can be read.

    Raises:
        OSError: the disk does not allow it.
    """
    rows = [[split, sample, *digests] for (split, sample), digests in report.digests.items()]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_lock(path: Path) -> Digests:
    """Read what `write_lock` wrote.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        return {(split, sample): (image, mask) for split, sample, image, mask in rows}
    except OSError as error:
        raise ConfigError(f"--lock: {path} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError):
        raise ConfigError(f"--lock: {path} was not written by data check --lock; name another file") from None
