"""Names -> objects, resolved lazily: built-in table, entry point, `package.module:Attr` or `file.py:Attr`.

Nothing is ever resolved because a checkpoint says so: callers pass only names the user wrote.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from everseg.errors import ConfigError, near_miss

BUILTIN: dict[str, dict[str, str]] = {
    "method": {
        "ft": "everseg.methods.ft:FineTuning",
        "lwf": "everseg.methods.lwf:LwF",
        "lwf-mc": "everseg.methods.lwf_mc:LwFMC",
        "ilt": "everseg.methods.ilt:ILT",
        "ewc": "everseg.methods.ewc:EWC",
        "rw": "everseg.methods.rw:RW",
        "pi": "everseg.methods.pi:PI",
        "mib": "everseg.methods.mib:MiB",
        "mdil": "everseg.methods.mdil:MDIL",
        "mdil+mib": "everseg.methods.mdil_mib:MDILMiB",
    },
    "dataset": {
        "voc": "everseg.data.datasets.voc:build",
        "ade": "everseg.data.datasets.ade:build",
        "camvid": "everseg.data.datasets.camvid:build",
        "cityscapes": "everseg.data.datasets.cityscapes:build",
        "bdd100k": "everseg.data.datasets.bdd100k:build",
        "idd": "everseg.data.datasets.idd:build",
        "folder": "everseg.data.datasets.folder:build",
        "coco": "everseg.data.datasets.coco:build",
        "hf": "everseg.data.datasets.hf:build",
        "demo": "everseg.data.demo:build",
    },
    "model": {
        "deeplabv3-resnet18": "everseg.models.build:deeplabv3_resnet18",
        "deeplabv3-resnet34": "everseg.models.build:deeplabv3_resnet34",
        "deeplabv3-resnet50": "everseg.models.build:deeplabv3_resnet50",
        "deeplabv3-resnet101": "everseg.models.build:deeplabv3_resnet101",
        "deeplabv3": "everseg.models.build:deeplabv3",
        "deeplabv3-tiny": "everseg.models.build:deeplabv3_tiny",
        "erfnet": "everseg.models.erfnet:erfnet",
        "mlp": "everseg.models.adapters.encoders:mlp",
        "torchvision-deeplabv3": "everseg.models.adapters.whole:torchvision_deeplabv3",
        "torchvision-fcn": "everseg.models.adapters.whole:torchvision_fcn",
        "transformers": "everseg.models.adapters.whole:transformers_network",
    },
    "scenario": {
        "class-incremental": "everseg.scenarios.class_incremental:build",
        "domain-incremental": "everseg.scenarios.domain_incremental:build",
        "extension": "everseg.scenarios.extension:build",
    },
}


def names(kind: str) -> list[str]:
    """List the names known for a kind: built-in ones first, then installed entry points."""
    installed = [e.name for e in entry_points(group=f"everseg.{kind}s")]
    return [*BUILTIN[kind], *sorted(set(installed) - set(BUILTIN[kind]))]


def is_builtin(kind: str, name: object) -> bool:
    """Whether a name is one of everseg's own; any other stands for code that somebody else wrote."""
    return isinstance(name, str) and name in BUILTIN[kind]


def resolve(kind: str, name: str) -> Any:
    """Import the object a name stands for.

    Args:
        kind: "method", "dataset", "model" or "scenario".
        name: a name of `names(kind)`, `package.module:Attr`, or `path/to/file.py:Attr`.

    Raises:
        ConfigError: unknown name, or the module or attribute does not exist.
    """
    address = BUILTIN[kind].get(name)
    if address is None:
        for entry in entry_points(group=f"everseg.{kind}s", name=name):
            return entry.load()
        address = name
    module_name, sep, attribute = address.rpartition(":")
    if not sep:
        hint = near_miss(name, names(kind))
        raise ConfigError(
            f"{kind}: unknown name '{name}'{hint} (everseg list {kind}s, or your own file.py:Name)"
        )
    module = (
        _from_file(kind, module_name) if module_name.endswith(".py") else _from_package(kind, module_name)
    )
    if not hasattr(module, attribute):
        raise ConfigError(f"{kind}: '{module_name}' has no '{attribute}'")
    return getattr(module, attribute)


def _from_package(kind: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ConfigError(f"{kind}: no module named '{module_name}'") from None


def _from_file(kind: str, file_name: str) -> Any:
    path = Path(file_name).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{kind}: no file '{file_name}'")
    module_name = f"everseg_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{kind}: cannot import '{file_name}'")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(
            f"{kind}: '{file_name}' cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module
