"""Conversion of a model trained elsewhere into a bundle. Its classifier becomes the first classifier of the head."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from everseg.data.batches.transforms import normalise
from everseg.deploy.bundle import Bundle, Contents, new_folder, write_bundle
from everseg.deploy.onnx import require_onnx
from everseg.deploy.trial_images import generated, images_of
from everseg.display import Piece, Result, counted
from everseg.errors import CheckpointError, ConfigError, GateError, first_line, near_miss, some
from everseg.files import UnreadableError, json_of, read_regular, read_text
from everseg.interop.unwrap import tensors_of, weights_at
from everseg.labels import BACKGROUND, LabelSpace, is_background_name
from everseg.losses import upsample
from everseg.models.adapters import timm as from_timm
from everseg.models.adapters.whole import Classifier, build_network, find_classifiers
from everseg.models.build import ARCHITECTURES
from everseg.models.model import SegmentationModel
from everseg.models.stored import Sizes, within
from everseg.models.tensor_file import read_tensors
from everseg.runs.input_form import InputForm
from everseg.runs.model_folder import load_strictly

TOLERANCE = 1e-5
"""Largest allowed difference of a logit from the original network's, relative to the largest logit (at least 1)."""
REFERENCE_TOLERANCE = 1e-3
"""The same for a reference's logits, which another machine may have computed."""
Normalisation = Literal["imagenet", "unit"]
NORMALISATIONS: tuple[Normalisation, ...] = ("imagenet", "unit")
NORMS = ("bn", "abn", "iabn")
AUXILIARY = "use_auxiliary_head"
"""Entry of a transformers configuration that adds a second head, which only its training reads."""
TORCHVISION = {
    "deeplabv3_resnet50": ("torchvision-deeplabv3", (3, 4, 6, 3)),
    "deeplabv3_resnet101": ("torchvision-deeplabv3", (3, 4, 23, 3)),
    "fcn_resnet50": ("torchvision-fcn", (3, 4, 6, 3)),
    "fcn_resnet101": ("torchvision-fcn", (3, 4, 23, 3)),
}


@dataclass(frozen=True, repr=False)
class Adopted(Result):
    """A bundle made from another project's model."""

    bundle: Bundle
    check: str
    """Result of the check by a forward pass, in words."""
    background: bool
    """Whether the first class is the background. Only then can the bundle be extended."""
    notes: tuple[str, ...] = ()
    """Remarks on the class names and their consequences for the bundle."""

    def shown(self) -> Iterator[Piece]:
        yield f"check: {self.check}"
        yield from self.bundle.parity_text()
        yield f"wrote {self.bundle.path}: {counted(len(self.bundle.registry.classes), 'class')}"

    def to_json(self) -> dict[str, Any]:
        return {
            **self.bundle.to_json(),
            "check": self.check,
            "background": self.background,
            "notes": list(self.notes),
        }


def adopt(
    weights: str | Path,
    *,
    arch: str,
    classes: str | Path | Sequence[str] | None = None,
    out: str | Path,
    normalisation: Normalisation | None = None,
    norm: Literal["bn", "abn", "iabn"] | None = None,
    reference: str | Path | None = None,
    images: str | Path | None = None,
    onnx: bool = True,
) -> Adopted:
    """Turn a state dict of another library and its list of classes into a bundle.

    Args:
        weights: a safetensors file, or a .pth that holds tensors only.
        arch: "torchvision:NAME" (deeplabv3_resnet50, deeplabv3_resnet101, fcn_resnet50, fcn_resnet101), or
            "transformers:DIR", a folder with the config.json of a SegFormer, UPerNet or the like (extra `hf`), or
            "timm:NAME", an encoder of timm (extra `timm`) under everseg's all-MLP or DeepLabV3 head.
        classes: names in output order: a sequence, "a,b,c", or a file with one name per line or a JSON list; default
            the config.json's. A first class with one of the background's usual names (background, __background__, BG,
            ...) is the background.
        out: a new folder.
        normalisation: how the inputs of the model are normalised, see `everseg.data.batches.transforms.normalise`;
            default "imagenet". A timm encoder needs it, or `reference`.
        norm: norm and activation of the head on a timm encoder, as `model.norm`; it needs that, or `reference`.
        reference: for a timm encoder: a safetensors file with "image" (H, W, 3) uint8 and "logits" (C, h, w), what
            the original network gives for it. The model must give the same; what was not given of the two above is
            found so.
        images: as for `export`. The forward pass is also checked on one of them.
        onnx: write the ONNX file.

    Raises:
        ConfigError: the architecture is unknown, or there are not as many names as outputs.
        CheckpointError: some weights do not fit; the message lists all of them.
        GateError: the adopted model does not reproduce the original's logits, or its logits are not finite.
    """
    new_folder(out)
    if onnx:
        require_onnx()
    kind, _, name = arch.partition(":")
    if kind == "torchvision" and name not in TORCHVISION:
        known = [f"torchvision:{known}" for known in TORCHVISION]
        raise ConfigError(f"--arch {arch}: unknown{near_miss(arch, known)} (one of {', '.join(known)})")
    if kind not in ("torchvision", "transformers", "timm") or not name:
        raise ConfigError(
            f"--arch {arch}: expected torchvision:NAME, transformers:FOLDER with a config.json, or timm:NAME"
        )
    state = _state(weights)
    pictures, source = images_of(images) if images is not None else generated()
    if kind != "timm" and (norm is not None or reference is not None):
        raise ConfigError(f"--norm and --reference are for --arch timm:NAME; {arch} says its norms itself")
    own: list[str] = []
    size: tuple[int, int] | None = None
    form: Normalisation = normalisation or "imagenet"
    if kind == "timm":
        path = None if reference is None else Path(reference).expanduser()
        model, form, check = _timm(name, state, pictures[0], norm, normalisation, path)
    elif kind == "torchvision":
        model, own, check = _torchvision(name, state, _input(pictures[0], form))
    else:
        model, own, check, size = _transformers(Path(name), state, _input(pictures[0], form))
    names = list(own) if classes is None else class_names(classes)
    total = model.head("default").num_classes
    if not names:
        raise ConfigError(
            "--classes: this architecture's weights name no classes; give them: a,b,c or a file"
        )
    if len(names) != total:
        raise ConfigError(
            f"--classes: the model has {counted(total, 'output')}, "
            f"{counted(len(names), 'name', 'was', 'were')} given"
        )
    space, notes = _space(names)
    contents = Contents(
        model, {"default": space}, form=InputForm("whole" if size is None else "resize", size, form),
        lineage={"source": f"{kind if kind == 'transformers' else arch} weights {Path(weights).name}", "check": check},
    )  # fmt: skip
    bundle = write_bundle(out, contents, images=pictures if onnx else (), source=source, onnx=onnx)
    return Adopted(bundle, check, space.background is not None, notes)


def _space(names: Sequence[str]) -> tuple[LabelSpace, tuple[str, ...]]:
    """Build the label space of the outputs, and remarks on what their names mean for the bundle.

    Raises:
        ConfigError: two outputs have the same name.
    """
    first = is_background_name(names[0])
    named = (BACKGROUND, *names[1:]) if first else tuple(names)
    space = LabelSpace((tuple(range(len(names))),), named, 0 if first else None)
    if problems := space.problems():
        raise ConfigError([f"--classes: {problem}" for problem in problems])
    if not first:
        later = [i for i, name in enumerate(names) if is_background_name(name)]
        what = (
            f"the background is output {later[0]}, not the first"
            if later
            else "its first class is not the background"
        )
        return space, (f"{what}, so everseg extend cannot teach this bundle more classes",)
    if names[0] != BACKGROUND:
        return space, (f"class '{names[0]}' is the background, and the bundle calls it background",)
    return space, ()


def class_names(given: str | Path | Sequence[str]) -> list[str]:
    """Return class names given as a sequence, as "a,b,c", or as a file.

    Raises:
        ConfigError: the file does not exist or holds no list of names.
    """
    if not isinstance(given, str | Path):
        return [str(name) for name in given]
    path = Path(given).expanduser()
    if not path.is_file():
        if path.suffix in (".txt", ".json"):
            raise ConfigError(f"--classes {given}: no such file")
        return [name.strip() for name in str(given).split(",") if name.strip()]
    try:
        text = read_text(path)
    except UnreadableError as error:
        raise ConfigError(f"--classes {given}: cannot be read ({error})") from None
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        value = json_of(text.encode())
    except UnreadableError:
        value = None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"--classes {given}: expected a JSON list of names")
    return value


def _state(given: str | Path) -> dict[str, Tensor]:
    path = weights_at(given, "give the file of weights")
    loaded = read_tensors(path)
    key = next(
        (key for key in ("state_dict", "model", "model_state") if isinstance(loaded.get(key), Mapping)), ""
    )
    return tensors_of(loaded, key, "a known library", f"'{path}'")


def _torchvision(
    name: str, state: dict[str, Tensor], sample: Tensor
) -> tuple[SegmentationModel, list[str], str]:
    """Convert a network of torchvision. All dimensions are derived from the shapes of the weights."""
    architecture, blocks = TORCHVISION[name]
    # Rename torchvision's weights as in everseg: backbone -> encoder, classifier -> decoder, last layer -> head.
    ours, last = {}, "classifier.4"
    for theirs, value in state.items():
        if theirs.startswith("aux_classifier."):
            continue  # the auxiliary head is used in training only
        moved = (
            theirs.replace(last, "heads.default.classifiers.0") if theirs.startswith(f"{last}.") else theirs
        )
        ours[re.sub(r"^backbone\.", "encoder.", re.sub(r"^classifier\.", "decoder.", moved))] = value
    try:
        counted = tuple(
            len({key.split(".")[2] for key in state if key.startswith(f"backbone.layer{k}.")})
            for k in range(1, 5)
        )
        options = {
            "blocks": counted,
            "stem": len(state["backbone.conv1.weight"]),
            "widths": [len(state[f"backbone.layer{k}.0.conv1.weight"]) for k in range(1, 5)],
            "outputs": [len(state[f"backbone.layer{k}.0.conv3.weight"]) for k in range(1, 5)],
            "hidden": state[f"{last}.weight"].shape[1],
        }
        outputs = len(state[f"{last}.weight"])
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"these weights do not belong to torchvision's {name}: {error} is missing"
        ) from None
    if counted != blocks:
        raise CheckpointError(
            f"these weights have {', '.join(map(str, counted))} blocks in the stages, {name} has "
            f"{', '.join(map(str, blocks))}: give the right --arch"
        )
    model = ARCHITECTURES[architecture](**options)
    model.grow({"default": outputs})
    _fill(model, ours, f"torchvision's {name}")
    return model, [], _finite(model, name, sample)


def _timm(
    name: str,
    state: dict[str, Tensor],
    picture: np.ndarray,
    norm: str | None,
    normalisation: Normalisation | None,
    reference: Path | None,
) -> tuple[SegmentationModel, Normalisation, str]:
    """Convert an encoder of timm with one of everseg's heads.

    Weights do not show which activation stands behind a norm, nor how images were normalised. Both are asked for, or
    found by a reference: the only combination that gives its logits.

    Returns:
        The model, the normalisation of its images, and what was checked.
    """
    _described(name)  # says that a name is wrong before anything is asked for
    kinds = {"--norm": norm, "--normalisation": normalisation}
    missing = [key for key, value in kinds.items() if value is None]
    if missing and reference is None:
        raise ConfigError(
            f"--arch timm:{name}: {' and '.join(missing)} needed: no weight shows whether the head's norm is followed "
            "by a ReLU (--norm bn) or a leaky one (abn; iabn with In-place ABN's weights), nor whether images were "
            "normalised by ImageNet's mean and deviation (--normalisation imagenet) or lie in [0, 1] (unit). "
            "--reference FILE finds both: a .safetensors with an image (H, W, 3) uint8 and its logits (C, h, w)"
        )
    image, wanted = (picture, None) if reference is None else _reference(reference)
    differences: dict[str, float] = {}
    for kind in NORMS if norm is None else (norm,):
        model, ours = network(name, state, kind)
        head = model.describe()["name"].removeprefix("library-")
        _fill(model, ours, f"timm's {name} under everseg's {head} head")
        for way in NORMALISATIONS if normalisation is None else (normalisation,):
            check = _finite(model, name, _input(image, way))
            if wanted is None:
                return (
                    model,
                    way,
                    f"{check}; norm {kind} and normalisation {way} as given, dilations everseg's own",
                )
            found = _logits(model, _input(image, way))[0]
            same = found.shape == wanted.shape
            difference = float((found - wanted).abs().max()) if same else float("inf")
            if difference <= REFERENCE_TOLERANCE * max(1.0, float(wanted.abs().max())):
                return (
                    model,
                    way,
                    f"{check}, within {difference:.1e} of the reference: norm {kind}, images {way}",
                )
            differences[f"norm {kind}, images {way}"] = difference
    tried = "; ".join(f"{what}: {value:.3g}" for what, value in differences.items())
    raise GateError(
        f"the adopted {name} does not give the logits of {reference}; largest differences: {tried}. Nothing was written"
    )


def _input(image: np.ndarray, normalisation: Normalisation) -> Tensor:
    """Turn an image (H, W, 3) uint8 into a network's input (1, 3, H, W)."""
    return normalise(torch.from_numpy(image.transpose(2, 0, 1).copy())[None], normalisation)


def _reference(path: Path) -> tuple[np.ndarray, Tensor]:
    """Read an image (H, W, 3) and the logits (C, h, w) that the original network gives for it."""
    if not path.is_file():
        raise ConfigError(f"--reference {path}: no such file")
    found = read_tensors(path)
    image, logits = found.get("image"), found.get("logits")
    if not isinstance(image, Tensor) or not isinstance(logits, Tensor):
        raise ConfigError(
            f"--reference {path}: needs two tensors, image and logits; it has {some(sorted(map(str, found)))}"
        )
    logits = logits[0] if logits.ndim == 4 and len(logits) == 1 else logits
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or logits.ndim != 3:
        raise ConfigError(
            f"--reference {path}: expected image (H, W, 3) uint8 and logits (C, h, w), got {tuple(image.shape)} "
            f"{image.dtype} and {tuple(logits.shape)}"
        )
    if not logits.numel() or not bool(logits.isfinite().all()):
        # A difference from nothing, or in units of an infinite logit, would pass for small.
        raise ConfigError(
            f"--reference {path}: the logits {tuple(logits.shape)} are empty or not finite; store what the original "
            "network gives for the image"
        )
    return image.numpy(), logits.float()


def _finite(model: SegmentationModel, name: str, sample: Tensor) -> str:
    if not bool(_logits(model, sample).isfinite().all()):
        raise GateError(f"the adopted {name} gives logits that are not finite; nothing was written")
    outputs = model.head("default").num_classes
    return f"all weights loaded strictly; a forward pass gives {outputs} finite logits per cell"


def _transformers(
    folder: Path, state: dict[str, Tensor], sample: Tensor
) -> tuple[SegmentationModel, list[str], str, tuple[int, int] | None]:
    """Convert a network of the transformers library, and check that its logits stay the same.

    Returns:
        The model, the names of its classes, what was checked, and the only (H, W) that it takes; None = it takes any.
    """
    config, network = _original(folder, state)
    outputs = int(network.config.num_labels)
    expected, sample, size = _run_original(network, sample)
    if getattr(network.config, AUXILIARY, False):
        config = {**config, AUXILIARY: False}  # used in training only
    own = network.state_dict()
    differences: dict[str, float] = {}
    for classifier in find_classifiers(network, sample, outputs):
        model = _without(own, config, classifier, outputs)
        if model is None:
            continue  # it belongs to the auxiliary head
        found = upsample(_logits(model, sample), expected.shape[2:])
        difference = float((found - expected).abs().max())
        if difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            break
        differences[classifier.layer] = difference
    else:
        tried = "; ".join(f"'{layer}': {value:.3g}" for layer, value in differences.items())
        raise GateError(
            f"no layer of this network with {outputs} outputs is its last one: with a classifier of everseg in its "
            f"place the logits differ from the original's by up to {tried}. Nothing was written"
        )
    names = network.config.id2label or {}
    own_names = [str(names[i]) for i in range(outputs)] if set(names) == set(range(outputs)) else []
    check = f"classifier '{classifier.layer}'; logits within {difference:.1e} of the original network's"
    if size is not None:
        check += f"; it takes images of {size[0]} x {size[1]} only, and every image is resized to that"
    return model, own_names, check, size


@torch.no_grad()
def _run_original(network: Any, sample: Tensor) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """Run a network on an image, which is resized where it takes one size only.

    Returns:
        The logits, the image, and that size.
    """
    try:
        return network(pixel_values=sample).logits, sample, None
    except Exception as error:  # whatever the library raises
        stated = getattr(network.config, "image_size", None)
        sides = [stated, stated] if isinstance(stated, int) else stated
        size = tuple(sides) if isinstance(sides, list | tuple) else None
        why = first_line(error)
        if size is not None and len(size) == 2 and size != tuple(sample.shape[2:]):
            try:  # `size` may be anything that stands in the config.json
                fitted = upsample(sample, size)
                return network(pixel_values=fitted).logits, fitted, (int(size[0]), int(size[1]))
            except Exception as second:
                why += f"; then: {first_line(second)}"
        raise ConfigError(
            f"this network runs neither an image of {sample.shape[2]} x {sample.shape[3]} pixels nor one of its "
            f"configuration's image_size: {why}"
        ) from error


def _without(
    own: Mapping[str, Tensor], config: Mapping[str, Any], classifier: Classifier, outputs: int
) -> SegmentationModel | None:
    """Build the network with a classifier of ours in the place of its own; None = it has no such place."""
    place = f"{classifier.place}."
    parts = {name.rpartition(".")[2]: value for name, value in own.items() if name.startswith(place)}
    parts.setdefault("bias", torch.zeros(outputs))
    try:
        model = ARCHITECTURES["transformers"](
            config=dict(config), classifier=classifier.place, channels=classifier.channels
        )
    except AttributeError:  # PyTorch's word for a module that is not there
        return None
    model.grow({"default": outputs})
    # The classifier moves to the head of the new model; all other weights belong to the encoder.
    rest = {
        f"encoder.network.{name}": value
        for name, value in own.items()
        if not name.startswith((place, *(("auxiliary_head.",) if config.get(AUXILIARY) is False else ())))
    }
    _fill(model, rest | {f"heads.default.classifiers.0.{name}": value for name, value in parts.items()},
          "this network")  # fmt: skip
    return model


def _original(folder: Path, state: dict[str, Tensor]) -> tuple[dict[str, Any], Any]:
    """Build the original network with the transformers library. All weights must fit.

    Returns:
        The content of config.json, and the network in eval mode.
    """
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        config = json_of(read_regular(path))
        config["model_type"]
    except (UnreadableError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--arch transformers:{folder}: no readable config.json ({type(error).__name__})"
        ) from None
    sizes = Sizes.of(state)
    sizes.check(config, "config.json")
    with within(sizes):  # somebody else may have made it
        network: Any = build_network(config)
    try:  # load through the library, which also knows older names of its weights
        network, info = type(network).from_pretrained(
            None, config=network.config, state_dict=dict(state), output_loading_info=True
        )
    except Exception as error:  # the library can raise almost any exception
        raise CheckpointError(f"transformers cannot load these weights: {first_line(error)}") from None
    problems = [f"missing: {name}" for name in sorted(info["missing_keys"])]
    problems += [f"not in this network: {name}" for name in sorted(info["unexpected_keys"])]
    problems += [f"another shape: {entry[0]}" for entry in info["mismatched_keys"]]
    if problems:
        raise CheckpointError("these weights are of another network:\n  " + some(problems, between="\n  "))
    return config, network.eval()


def _fill(model: SegmentationModel, state: dict[str, Tensor], what: str) -> None:
    """Load a state dict strictly, and set the model to eval mode."""
    own = model.state_dict()
    # Some files lack these counters of batch norm, which predictions do not use.
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros_like(value))
    load_strictly(model, {name: value.float() if value.is_floating_point() else value for name, value in state.items()},
                  f"--arch: {what}")  # fmt: skip
    model.eval()


@torch.no_grad()
def _logits(model: SegmentationModel, sample: Tensor) -> Tensor:
    return model(sample, ("default",))["default"].logits


ENCODERS = ("encoder.body.", "encoder.", "backbone.")
"""Possible prefixes of the encoder's weights. everseg uses the first one."""
CLASSIFIER = re.compile(
    r"(?:heads\.(?P<branch>.+)\.classifiers\.(?P<number>\d+)|classifier)\.(?P<part>weight|bias)"
)


def network(
    name: str, state: Mapping[str, Tensor], norm: str = "bn"
) -> tuple[SegmentationModel, dict[str, Tensor]]:
    """Build the network that fits a state dict, and rename the tensors as in everseg.

    Args:
        name: name of the encoder in timm, without a tag.
        state: `encoder.body.*`, `encoder.*` or `backbone.*` as timm's `features_only` networks name their weights;
            `decoder.*` as everseg's all-MLP or DeepLabV3 head names them; `heads.default.classifiers.0.*` (classifiers
            of several growths are joined) or `classifier.*`.
        norm: of the head, as `model.norm`.

    Returns:
        The grown model with random weights, and the state to load into it.

    Raises:
        ConfigError: timm does not know the encoder or is not installed, or the name has a tag.
        CheckpointError: the weights hold no known head, or no classifier.
    """
    encoder = _described(name)
    head, options = _head(state)
    parts = _classifier(state)
    model = ARCHITECTURES[head](encoder=encoder, norm=norm, **options)
    model.grow({"default": len(parts["weight"])})
    prefix = next((p for p in ENCODERS if any(key.startswith(p) for key in state)), ENCODERS[0])
    ours = {f"heads.default.classifiers.0.{part}": value for part, value in parts.items()}
    for key, value in state.items():
        if not CLASSIFIER.fullmatch(key):
            ours[ENCODERS[0] + key.removeprefix(prefix) if key.startswith(prefix) else key] = value
    return model, ours


def _described(name: str) -> dict[str, Any]:
    """Describe an encoder of timm.

    Raises:
        ConfigError: timm does not know it or is not installed, or the name has a tag.
    """
    if "." in name:
        raise ConfigError(
            f"--arch timm:{name}: leave out the part after the dot: it names weights, and yours come from the file; "
            f"write timm:{name.partition('.')[0]}"
        )
    return {**from_timm.describe(name, {}, None), "inputs": None}


def _head(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Find the head and its dimensions from the shapes of the weights.

    Dilation rates keep their defaults, because the shapes do not show them.
    """
    try:
        if "decoder.project.0.weight" in state:
            return "mlp", {"hidden": len(state["decoder.project.0.weight"])}
        if "decoder.aspp.0.weight" in state:
            hidden, out = state["decoder.aspp.0.weight"], state["decoder.reduce.weight"]
            return "library-deeplabv3", {"hidden": len(hidden), "out_channels": len(out)}
    except KeyError as error:
        raise CheckpointError(
            f"these weights hold only part of a DeepLabV3 head: {error} is missing"
        ) from None
    raise CheckpointError(
        "these weights have none of everseg's heads: neither decoder.project.0.weight (all-MLP, model.name=mlp) nor "
        "decoder.aspp.0.weight (DeepLabV3, model.name=deeplabv3) is there"
    )


def _classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join weight and bias of all outputs of the branch, in the order of the growths.

    Raises:
        CheckpointError: there is no classifier, there are several branches, or the growths do not fit each other.
    """
    found: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    classifiers = set[str]()
    for key, value in state.items():
        match = CLASSIFIER.fullmatch(key)
        if match:
            classifiers.add(f"heads.{match['branch']}" if match["branch"] else "classifier")
            found[match["part"]][int(match["number"] or 0)] = value
    if len(classifiers) > 1:
        raise CheckpointError(
            f"these weights have several classifiers ({', '.join(sorted(classifiers))}); "
            "only a model with one branch can be adopted"
        )
    if not found["weight"] or found["weight"].keys() != found["bias"].keys():
        raise CheckpointError(
            "these weights have no classifier: heads.default.classifiers.0.weight and .bias, or classifier.weight and "
            ".bias, are missing"
        )
    for part, values in found.items():
        widths = {tuple(value.shape[1:]) for value in values.values()}
        if len(widths) > 1 or not all(value.dim() for value in values.values()):
            shapes = ", ".join(str(tuple(values[i].shape)) for i in sorted(values))
            raise CheckpointError(
                f"these weights do not form one head: the parts of its {part} do not fit together ({shapes})"
            )
    return {part: torch.cat([values[i] for i in sorted(values)]) for part, values in found.items()}
