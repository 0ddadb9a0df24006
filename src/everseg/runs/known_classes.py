"""Classes of a bundle, for descriptions of new data (`data init --like BUNDLE`).

The room of data lies below this one, so it finds this function by name, in `everseg.registry`.
"""

from __future__ import annotations

from pathlib import Path

from everseg.runs.model_folder import read_model_file


def of_bundle(folder: Path) -> tuple[tuple[int, str, tuple[int, int, int]], ...]:
    """Read the lasting id, the name and the colour of each class of a bundle.

    Raises:
        CheckpointError: the file is damaged, or the folder is no bundle.
    """
    registry = read_model_file(folder).lasting_ids(folder)
    return tuple((entry.id, entry.name, entry.colour) for entry in registry.classes)
