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
from typing import Any, NamedTuple

from everseg.errors import ConfigError, near_miss, some
from everseg.files import real_path


class Builtin(NamedTuple):
    """Something of everseg that a configuration may name."""

    address: str
    """"package.module:Attr"."""
    summary: str
    """First line of its docstring, for `everseg list`; stored here because the lists import none of these modules."""


BUILTIN: dict[str, dict[str, Builtin]] = {
    # No configuration names these: the room of data asks for what a higher room owns.
    "classes": {
        "is_bundle": Builtin(
            "everseg.runs.model_folder:is_bundle", "Tell whether a folder holds a model with its lineage."
        ),
        "of_bundle": Builtin(
            "everseg.runs.known_classes:of_bundle",
            "Read the lasting id, the name and the colour of each class of a bundle.",
        ),
    },
    "method": {
        "ft": Builtin("everseg.methods.ft:FineTuning", "Learn the labels of the step and nothing else."),
        "lwf": Builtin(
            "everseg.methods.lwf:LwF", "Keep the softmax over the old classes as the teacher had it."
        ),
        "lwf-mc": Builtin(
            "everseg.methods.lwf_mc:LwFMC",
            "Sigmoid cross-entropy on every class, with the teacher's sigmoids as targets of the old ones.",
        ),
        "ilt": Builtin(
            "everseg.methods.ilt:ILT",
            "LwF plus the mean squared distance of the encoder's output from the teacher's.",
        ),
        "ewc": Builtin(
            "everseg.methods.ewc:EWC",
            "Importance = moving average of the squared gradient of the batch's mean loss.",
        ),
        "rw": Builtin(
            "everseg.methods.rw:RW",
            "Importance = EWC's Fisher information plus a weight's gain in loss per distance in Fisher's metric.",
        ),
        "pi": Builtin(
            "everseg.methods.pi:PI",
            "Importance = how much a weight's way through the step lowered the loss, per squared distance it went.",
        ),
        "mib": Builtin(
            "everseg.methods.mib:MiB",
            "Treat the background as what it is in each step: old classes in the labels, new ones in the teacher.",
        ),
        "complete": Builtin(
            "everseg.methods.complete:Complete",
            "For deployed models: missing labels of old classes are the model's own where it is sure, else ignored.",
        ),
        "plop": Builtin(
            "everseg.methods.plop:PLOP",
            "Label old classes by the teacher where it is certain, and keep pooled features of all depths in place.",
        ),
        "dkd": Builtin(
            "everseg.methods.dkd:DKD",
            "Learn each class by a sigmoid of its own, and keep what speaks for and against every old class apart.",
        ),
        "star": Builtin(
            "everseg.methods.star:STAR",
            "Learn each class by a sigmoid of its own, beside features drawn of the old classes and their background.",
        ),
        "reminder": Builtin(
            "everseg.methods.reminder:REMINDER",
            "PLOP, and on each new class's pixels a distillation of the old classes that resemble it.",
        ),
        "ewf": Builtin(
            "everseg.methods.ewf:EWF",
            "MiB with frozen old classifiers, whose weights are fused with the old ones after each step.",
        ),
        "nest": Builtin(
            "everseg.methods.nest:NeST",
            "MiB whose new classifiers start as mixtures of the old ones, learnt before each step.",
        ),
        "rcil": Builtin(
            "everseg.methods.rcil:RCIL",
            "Learn in new convolutions beside frozen ones, and keep squared features, pooled in space and channels.",
        ),
        "mdil": Builtin(
            "everseg.methods.mdil:MDIL",
            "Learn a new domain in a branch of its own while distillation holds the old domains' branches.",
        ),
        "mdil+mib": Builtin(
            "everseg.methods.mdil_mib:MDILMiB",
            "Combine both methods: MiB holds a branch that grows, MDIL holds the branches of other domains.",
        ),
        "sats": Builtin(
            "everseg.methods.sats:SATS",
            "PLOP's labels and MiB's distillation, and what each class's region attends to is kept in every block.",
        ),
        "mbs": Builtin(
            "everseg.methods.mbs:MBS",
            "Complete the labels, ignore what the teacher doubts, and keep outputs, features and class tokens.",
        ),
        "sdr": Builtin(
            "everseg.methods.sdr:SDR",
            "Keep every class's encoder features near its running prototype, away from other classes', and sparse.",
        ),
        "ucd": Builtin(
            "everseg.methods.ucd:UCD",
            "MiB, with pixels of one class held together and apart from all others, as far as the teacher is certain.",
        ),
        "acil": Builtin(
            "everseg.methods.acil:ACIL",
            "Train the network in the first step only; then solve for the classifier in one pass, without forgetting.",
        ),
        "dft": Builtin(
            "everseg.methods.dft:DFT",
            "Learn the labels of each step with the whole network: what DFT* begins from, the same as `ft`.",
        ),
        "dft*": Builtin(
            "everseg.methods.dft:DFTStar",
            "Give the classes of all steps their outputs from the start; train only classifiers after the first.",
        ),
        "ssul": Builtin(
            "everseg.methods.ssul:SSUL",
            "Learn each step in a head of its own, on features frozen after the first; what stands out is unknown.",
        ),
        "barm": Builtin(
            "everseg.methods.barm:BARM",
            "Learn each step in a head of its own, with an output that takes its classes out of the background.",
        ),
        "microseg": Builtin(
            "everseg.methods.microseg:MicroSeg",
            "SSUL in given regions, each classified as a whole; the unknown are several clusters that are kept apart.",
        ),
    },
    "dataset": {
        "voc": Builtin("everseg.data.datasets.voc:build", "Read Pascal VOC 2012."),
        "ade": Builtin("everseg.data.datasets.ade:build", "Read ADE20K."),
        "camvid": Builtin("everseg.data.datasets.camvid:build", "Read CamVid."),
        "cityscapes": Builtin("everseg.data.datasets.cityscapes:build", "Read Cityscapes."),
        "bdd100k": Builtin("everseg.data.datasets.bdd100k:build", "Read BDD100K's semantic segmentation."),
        "idd": Builtin("everseg.data.datasets.idd:build", "Read IDD with the 26 classes of level 3."),
        "folder": Builtin(
            "everseg.data.datasets.folder:build", "Read folders of images and masks of the same names."
        ),
        "coco": Builtin(
            "everseg.data.datasets.coco:build",
            "Read COCO-style annotations: `images`, `categories` and `annotations` with polygons or run lengths.",
        ),
        "annotated": Builtin(
            "everseg.data.datasets.annotated:build",
            "Read the polygons and bitmaps of a labelling tool's export: labelme, Supervisely, V7, Label Studio, YOLO.",
        ),
        "segments": Builtin(
            "everseg.data.datasets.segments:build",
            "Read a release of Segments.ai whose images (and bitmaps, `NAME_label_LABELSET.png`) lie below the root.",
        ),
        "hf": Builtin(
            "everseg.data.datasets.hf:build",
            "Read a set of the `datasets` library in a folder of `save_to_disk` or of Parquet files.",
        ),
        "demo": Builtin(
            "everseg.data.demo:build", "Generate street scenes by day or at dusk; nothing is read from disk."
        ),
    },
    "model": {
        "deeplabv3-resnet18": Builtin(
            "everseg.models.build:deeplabv3_resnet18",
            "Build DeepLabV3 on ResNet-18; options as for `deeplabv3`.",
        ),
        "deeplabv3-resnet34": Builtin(
            "everseg.models.build:deeplabv3_resnet34",
            "Build DeepLabV3 on ResNet-34; options as for `deeplabv3`.",
        ),
        "deeplabv3-resnet50": Builtin(
            "everseg.models.build:deeplabv3_resnet50",
            "Build DeepLabV3 on ResNet-50; options as for `deeplabv3`.",
        ),
        "deeplabv3-resnet101": Builtin(
            "everseg.models.build:deeplabv3_resnet101",
            "Build DeepLabV3 on ResNet-101 (MiB's network); options as for `deeplabv3`.",
        ),
        "deeplabv3": Builtin(
            "everseg.models.build:deeplabv3",
            "Build DeepLabV3 on a ResNet with every dimension open; it has no outputs until it is grown.",
        ),
        "deeplabv3-tiny": Builtin(
            "everseg.models.build:deeplabv3_tiny",
            "Build a small DeepLabV3 that learns images of 64 to 128 pixels on a CPU in seconds.",
        ),
        "erfnet": Builtin(
            "everseg.models.erfnet:erfnet",
            "Build ERFNet, alone or with MDIL's norms and adapters per branch; it has no outputs until it is grown.",
        ),
        "mlp": Builtin(
            "everseg.models.adapters.encoders:mlp",
            "Build SegFormer's all-MLP head on an encoder of another library (model.encoder=hf:NAME or timm:NAME).",
        ),
        "segmenter": Builtin(
            "everseg.models.adapters.encoders:segmenter",
            "Build Segmenter's mask transformer, whose classes are tokens, on an encoder of another library.",
        ),
        "torchvision-deeplabv3": Builtin(
            "everseg.models.adapters.whole:torchvision_deeplabv3",
            "Build torchvision's DeepLabV3 on a ResNet of bottlenecks, output stride 8; no outputs until it is grown.",
        ),
        "torchvision-fcn": Builtin(
            "everseg.models.adapters.whole:torchvision_fcn",
            "Build torchvision's FCN on a ResNet of bottlenecks at output stride 8; options as for its DeepLabV3.",
        ),
        "transformers": Builtin(
            "everseg.models.adapters.whole:transformers_network",
            "Build a semantic-segmentation network of the transformers library; it has no outputs until it is grown.",
        ),
    },
    "scenario": {
        "class-incremental": Builtin(
            "everseg.scenarios.class_incremental:build",
            "Teach the classes of one data set in steps, as `task`, `order` and `protocol` say.",
        ),
        "domain-incremental": Builtin(
            "everseg.scenarios.domain_incremental:build",
            "Teach one domain after the other, each in a branch of its own; steps may add classes too.",
        ),
        "extension": Builtin(
            "everseg.scenarios.extension:build",
            "Teach new classes to the model of a bundle, or refine it on more images of its own, in one step.",
        ),
    },
}


def names(kind: str) -> list[str]:
    """List the names known for a kind: built-in ones first, then installed entry points."""
    installed = [e.name for e in entry_points(group=f"everseg.{kind}s")]
    return [*BUILTIN[kind], *sorted(set(installed) - set(BUILTIN[kind]))]


def summaries(kind: str) -> dict[str, str]:
    """Every name of `names(kind)` with one line about it; "" for installed entry points, which are not imported."""
    built_in = BUILTIN[kind]
    return {name: built_in[name].summary if name in built_in else "" for name in names(kind)}


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
    if name in BUILTIN[kind]:
        address = BUILTIN[kind][name].address
    else:
        for entry in entry_points(group=f"everseg.{kind}s", name=name):
            return entry.load()
        address = name
    module_name, sep, attribute = address.rpartition(":")
    if not sep and name.endswith(".py") and Path(name).expanduser().is_file():
        raise ConfigError(
            f"{kind}: write which of '{name}': {name}:NAME{_offers(kind, _from_file(kind, name))}"
        )
    if not sep:
        hint = near_miss(name, names(kind))
        raise ConfigError(
            f"{kind}: unknown name '{name}'{hint} (everseg list {kind}s, or your own file.py:Name)"
        )
    module = (
        _from_file(kind, module_name) if module_name.endswith(".py") else _from_package(kind, module_name)
    )
    if not hasattr(module, attribute):
        hint = near_miss(attribute, _own_names(kind, module))
        raise ConfigError(f"{kind}: '{module_name}' has no '{attribute}'{hint}{_offers(kind, module)}")
    return getattr(module, attribute)


def _own_names(kind: str, module: Any) -> list[str]:
    """List what a module defines itself and a configuration could name: classes for a method, else functions too."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and (isinstance(value, type) and hasattr(value, "losses") if kind == "method" else callable(value))
    ]


def _offers(kind: str, module: Any) -> str:
    """Return the end of a message that lists a module's own names; "" if it has none."""
    found = _own_names(kind, module)
    return f" (it has {some(found)})" if found else ""


def _from_package(kind: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ConfigError(f"{kind}: no module named '{module_name}'") from None
    except (ValueError, TypeError):  # an empty name, or one that begins with a dot
        raise ConfigError(f"{kind}: '{module_name}' is not the name of a module") from None


def _from_file(kind: str, file_name: str) -> Any:
    path = real_path(Path(file_name).expanduser())
    if not path.is_file():
        raise ConfigError(f"{kind}: no file '{file_name}' (looked in {path.parent})")
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
