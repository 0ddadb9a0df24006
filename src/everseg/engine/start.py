"""The model a run starts from where that is a bundle: a verified copy of it is the first step's parent (floor 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everseg.config.fields import RunConfig
from everseg.engine.checkpoint import load_tensors, parent_of, read_document, save_folder, verify
from everseg.engine.folder import RunFolder
from everseg.errors import CheckpointError, ConfigError
from everseg.methods.build import build_method
from everseg.scenarios.steps import Step


def place_start(folder: RunFolder, step: Step, config: RunConfig) -> None:
    """Copy the bundle to where the step looks for its parent, or check that the copy there is of this bundle.

    The copy's parent is the bundle's digest, so that the chain of hashes goes on. A method's state is taken over where
    the same method made it.

    Raises:
        CheckpointError: the bundle is missing or damaged, or another one than the run began with.
        ConfigError: the method needs the state it gathered in earlier steps, and the bundle was made by another one.
    """
    source, target = Path(str(config.scenario.bundle)), folder.final(step.index - 1)
    if target.is_dir():
        if source.is_dir() and verify(source) != parent_of(target):
            raise CheckpointError(
                f"{source} is not the bundle that {folder.path} began with; restore it, or take another name (name=...)"
            )
        return
    digest = verify(source)
    lineage = read_document(source / "lineage.json", "history")
    tensors = {
        "model": load_tensors(source / "model.safetensors"),
        "method_state": _state(source, lineage, config),
    }
    documents = {"classes": read_document(source / "classes.json", "branches"), "lineage": lineage}
    save_folder(target, tensors, documents, parent=digest)


def _state(source: Path, lineage: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The method's state in a bundle; {} where another method made it."""
    method = config.method.name
    if lineage.get("method") == method:
        return load_tensors(source / "method_state.safetensors")
    if build_method(config.method).state_dict():
        made_by = f"trained with '{lineage['method']}'" if lineage.get("method") else "not trained by everseg"
        raise ConfigError(
            f"method '{method}' goes on from what it gathered in earlier steps, and {source} was {made_by}, which "
            "gathered nothing for it; take a method that needs the model alone, such as mib or lwf"
        )
    return {}
