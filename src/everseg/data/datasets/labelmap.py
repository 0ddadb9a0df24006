"""Label maps with colours: CVAT's labelmap.txt (floor 2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everseg.data.datasets.decode import Colour
from everseg.errors import ConfigError

VOID_NAMES = frozenset({"ignore", "void", "unlabeled", "unlabelled"})
"""Names that label maps give to pixels without annotation."""
MAX_BYTES = 1_000_000


def read_labelmap(path: Path) -> dict[str, Colour]:
    """Read a label map: a line `name:red,green,blue:parts:actions` per class; # starts a comment.

    Raises:
        ConfigError: it cannot be read, lines are of another form, or a name or colour stands twice; lists them all.
    """
    try:
        text = path.read_bytes()[:MAX_BYTES].decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"labels.palette: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"labels.palette: {path} is not a text file (UTF-8)") from None
    found: dict[str, Colour] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, rest = line.partition(":")
        numbers = rest.split(":")[0].split(",")
        values = [int(n) for n in numbers if n.strip().isdecimal()]
        if len(numbers) != 3 or len(values) != 3 or max(values) > 255 or not name.strip():
            problems.append(f"line {number}: expected 'name:red,green,blue::', got {line.strip()!r}")
        elif name.strip() in found:
            problems.append(f"line {number}: '{name.strip()}' stands there twice")
        elif (values[0], values[1], values[2]) in found.values():
            problems.append(f"line {number}: the colour {values} is given to another class already")
        else:
            found[name.strip()] = (values[0], values[1], values[2])
    if not found and not problems:
        problems.append("names no class")
    if problems:
        raise ConfigError(problems, str(path))
    return found


def palette_of(labelmap: Mapping[str, Colour]) -> tuple[list[str], dict[str, list[int]]]:
    """The classes of a label map, background first, and its palette; names for void become "ignore"."""
    names = [name for name in labelmap if name.lower() not in VOID_NAMES]
    names.sort(key=lambda name: name.lower() != "background")
    palette = {name: list(labelmap[name]) for name in names}
    ignored = [list(colour) for name, colour in labelmap.items() if name.lower() in VOID_NAMES]
    return names, {**palette, **({"ignore": ignored} if ignored else {})}  # type: ignore[dict-item]


def with_labelmap(given: Mapping[str, Any], here: Path) -> dict[str, Any]:
    """Put the content of a label map in the place of its name in `labels.palette`.

    Args:
        given: keys of a data.yaml.
        here: folder that a relative name starts from.

    Raises:
        ConfigError: as `read_labelmap`.
    """
    labels = given.get("labels")
    if not isinstance(labels, Mapping) or not isinstance(labels.get("palette"), str):
        return dict(given)
    names, palette = palette_of(read_labelmap(here / Path(labels["palette"]).expanduser()))
    background = {"background": "background"} if names[:1] == ["background"] else {}
    return {"classes": names, **background, **given, "labels": {**labels, "palette": palette}}
