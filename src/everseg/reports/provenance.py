"""Record where a run's numbers come from: command, versions, hashes, what to cite."""

from __future__ import annotations

import json
import shlex
from importlib import resources
from typing import Any

import everseg
from everseg.config import presets
from everseg.config.fields import DataConfig, RunConfig
from everseg.config.loading import difference, dump, load, settings
from everseg.config.show import is_harmless
from everseg.config.yaml import parse
from everseg.display import UNDEFINED
from everseg.errors import EversegError
from everseg.runs.command import FROM_PYTHON, text
from everseg.runs.results import Results, source_name


def preset_of(name: str) -> str | None:
    """Return the preset of the same name as a run, or None."""
    return name if presets.is_preset(name) else None


def deviations(config: RunConfig) -> list[str]:
    """List the identity settings that differ from the preset's: "train.epochs: 30 -> 3"; [] without a preset."""
    preset = preset_of(config.name)
    return [] if preset is None else difference(load(preset), config)


def command(config: RunConfig) -> str:
    """Write a command that repeats the run: its preset with the differences, else the configuration as a file."""
    preset = preset_of(config.name)
    if preset is not None:
        usual = settings(load(preset))
        changed = [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in settings(config).items()
            if (key not in usual or usual[key] != value) and (not is_harmless(key) or key.endswith(".root"))
        ]
        try:
            if not difference(load(preset, changed, import_own=False), config):
                return shlex.join(["everseg", "run", preset, *changed])
        except EversegError:
            pass
    return shlex.join(["everseg", "run", f"{config.name}.yaml"])


def provenance(results: Results) -> dict[str, Any]:
    """Collect everything that states how the numbers were made.

    Returns:
        command, yaml (the configuration), preset, deviations, facts (machine and versions), models (per
        finished step: the digest of its folder and of the one it continues), lists (SHA-256 of every image list), masks
        (their fingerprints), cite (lines).
    """
    record, config = results.record, results.config
    facts = {
        "seed": config.seed,
        **{f"{name} version": value for name, value in record.versions.items()},
        "machine": record.machine,
        "CPU threads": record.threads,
        "started": text(record.argv) or FROM_PYTHON,
        "configuration (SHA-256)": record.hash,
    }
    models = [
        {"step": step.index, "model": step.final.digest, "continues": step.final.parent or UNDEFINED}
        for step in results.steps
    ]
    lists = [
        {
            "step": step["index"],
            "role": role,
            "data": source_name(source),
            "split": source["split"],
            "images": source["images"],
            "sha256": source["sha256"],
        }
        for step in results.planned
        for role in ("train", "val", "test")
        for source in step.get(role, [])
    ]
    return {
        "command": command(config),
        "yaml": dump(config),
        "preset": preset_of(config.name),
        "deviations": deviations(config),
        "facts": {key: value for key, value in facts.items() if value not in (None, "")},
        "models": models,
        "lists": lists,
        "masks": results.scenario.get("masks") or {},
        "cite": cite(_methods(config.method), config.data, config.model.name),
    }


def _methods(method: Any) -> str:
    """Name the method and the switches that are papers of their own, joined by "+"."""
    switches = (
        ("ewf", getattr(method, "fuse", "none") != "none"),
        ("nest", getattr(method, "pretune", 0) > 0),
    )
    return "+".join([method.name, *(name for name, on in switches if on)])


def cite(method: str, data: DataConfig, model: str) -> list[str]:
    """List the citations: the tool, the method, the data and the model.

    Args:
        method: name of the method; names of several are joined by "+".
        model: name of the architecture.
    """
    written = resources.files(__package__ or "").joinpath("citations.yaml").read_text(encoding="utf-8")
    known = parse(written, "report/citations.yaml").value
    sets = [domain.dataset for domain in data.domains.values()] or [data.dataset]
    architecture = "deeplabv3" if model.startswith("deeplabv3") else model
    wanted = [
        *(known["methods"].get(name) for name in method.split("+")),
        *(known["data"].get(name) for name in sets),
        known["models"].get(architecture),
    ]
    return [f"everseg {everseg.__version__} (Apache-2.0).", *dict.fromkeys(line for line in wanted if line)]
