"""Smaller ONNX files of a model: weights in half precision or in 8 bits, measured against the full one on images."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everseg.config.fields import DataConfig, ScenarioConfig
from everseg.config.loading import from_stored
from everseg.data.base import Dataset, Split
from everseg.data.batches.transforms import resize_transform
from everseg.data.datasets.decode import read_image
from everseg.data.datasets.listing import image_files
from everseg.deploy.onnx import require_onnx
from everseg.deploy.trial_images import spread
from everseg.display import counted, figure, percent, size
from everseg.engine.prepare import open_datasets
from everseg.engine.rescore import source_by_name, stored_config
from everseg.errors import ConfigError, DataError, GateError, first_line
from everseg.inference.count import padded_table
from everseg.inference.onnx_files import OnnxFiles, session_of
from everseg.inference.predict import LoadedModel
from everseg.labels import LabelSpace
from everseg.metrics import ConfusionMatrix
from everseg.runs.input_form import InputForm
from everseg.runs.model_folder import PRECISIONS
from everseg.runs.run_folder import RunFolder

MAX_DROP = 1.0
"""Points that a smaller file may lose."""
CALIBRATION = 32
"""Number of images whose activations give the ranges of 8 bits."""
MEASURED = 200
"""Largest number of images that a file is measured on."""
_QUANTISED = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Relu", "LeakyRelu", "Concat", "MaxPool", "AveragePool",
    "GlobalAveragePool",
)  # fmt: skip
"""Operations in 8 bits: those with weights, and those that pass values of 8 bits on."""


@dataclass(frozen=True)
class Trial:
    """Images for making and measuring the smaller files of a branch. They are read when they are needed."""

    calibration: Callable[[], Iterator[np.ndarray]]
    """Images (H, W, C) as stored."""
    measured: Callable[[], Iterator[tuple[np.ndarray, np.ndarray | None]]]
    """Other images, with their labels (H, W) as train ids of the branch; None without labels."""
    calibrated_on: str
    measured_on: str


@dataclass(frozen=True)
class Measured:
    """What a smaller ONNX file gives, beside the full one, on the same images."""

    file: str
    bytes: int
    full_bytes: int
    images: int
    source: str
    """Description of these images."""
    calibrated_on: str
    """Description of the images that gave the ranges; "" where none are needed."""
    measure: str
    """"mIoU" against labels, or "agreement" with the full file where there are none."""
    full: float
    reduced: float
    equal_pixels: float
    """Share of all pixels with the same class."""
    classes: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Class -> its IoU with the full and with the smaller file; {} without labels."""

    @property
    def drop(self) -> float:
        """Points lost."""
        return 100 * (self.full - self.reduced)


Reduced = Mapping[str, Mapping[str, tuple[bytes, Measured]]]
"""Branch -> precision -> file and what it gives."""
Reduce = Callable[[LoadedModel, Mapping[str, str], Mapping[str, bytes], Mapping[str, Sequence[int]]], Reduced]
"""Makes them of the model, the names and bytes of its full files, and the lasting ids of its outputs, by branch."""


def asked_precisions(precision: Sequence[str], onnx: bool) -> list[str]:
    """Check which precisions were asked for, and return those beside the full one.

    Raises:
        ConfigError: an unknown one, or there is to be no ONNX file.
    """
    if unknown := [name for name in precision if name not in PRECISIONS]:
        raise ConfigError(f"--precision {', '.join(unknown)}: expected some of {', '.join(PRECISIONS)}")
    found = [name for name in PRECISIONS[1:] if name in precision]
    if found and not onnx:
        raise ConfigError(f"--precision {','.join(found)} and --no-onnx exclude each other")
    return found


def reducer(precisions: Sequence[str], trials: Mapping[str, Trial], max_drop: float) -> Reduce:
    """Return what makes and measures smaller files of every branch.

    Args:
        precisions: of PRECISIONS, without the first.
        trials: branch -> images.
        max_drop: points that a file may lose.
    """

    def reduce(
        model: LoadedModel,
        names: Mapping[str, str],
        full: Mapping[str, bytes],
        ids: Mapping[str, Sequence[int]],
    ) -> Reduced:
        found: dict[str, dict[str, tuple[bytes, Measured]]] = {}
        for branch, file in full.items():
            trial = trials[branch]
            side = _one_size(file) or model.form.resized_to
            made = {name: _made(name, file, trial, side) for name in precisions}
            measured = _measured(
                model, branch, names[branch], ids[branch], {PRECISIONS[0]: file, **made}, trial
            )
            found[branch] = {name: (made[name], measured[name]) for name in precisions}
        _gate(found, max_drop)
        return found

    return reduce


def _gate(found: Reduced, max_drop: float) -> None:
    failed = [
        f"{name}{f' of branch {branch!r}' if len(found) > 1 else ''} loses {figure(one.drop, digits=2)} points of "
        f"{one.measure} ({percent(one.full)} -> {percent(one.reduced)} on {one.source})"
        for branch, each in found.items()
        for name, (_, one) in each.items()
        if not one.drop <= max_drop
    ]
    if failed:
        advice = (
            "labelled images (--calibrate DATA) measure the quality itself; "
            if any(one.measure != "mIoU" for each in found.values() for _, one in each.values())
            else ""
        )
        raise GateError(
            f"{'; '.join(failed)}; --max-drop {figure(max_drop, digits=2)} was asked for, so nothing was "
            f"written. {advice}leave this precision out, or allow more (--max-drop)"
        )


# ---------------------------------------------------------------- making


def _one_size(file: bytes) -> tuple[int, int] | None:
    return OnnxFiles({"": session_of(file, "the ONNX file")}, {}).one_size


def _made(precision: str, file: bytes, trial: Trial, side: tuple[int, int] | None) -> bytes:
    """Make a smaller file of a full one.

    Raises:
        ConfigError: onnxruntime's tools cannot.
    """
    try:
        with _quiet():
            if precision == "fp16":
                return _half(file)
            return _quantised(file, (_fitted(image, side) for image in trial.calibration()))
    except (DataError, MemoryError):
        raise
    except Exception as error:  # the tools can raise almost any exception
        raise ConfigError(
            f"--precision {precision}: onnxruntime cannot convert this network ({first_line(error)}); leave it out"
        ) from error


def _half(file: bytes) -> bytes:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    # Inputs and outputs keep their types, so that whoever reads the file need not know.
    made = convert_float_to_float16(onnx.load_from_string(file), keep_io_types=True)
    found: bytes = made.SerializeToString()
    return found


def _quantised(file: bytes, images: Iterator[np.ndarray]) -> bytes:
    """Quantise statically: weights per output channel, activations with the ranges that the images give."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(images, None)
            return None if image is None else {"image": np.ascontiguousarray(image)[None]}

    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("whole", "prepared", "made"))
        named = onnx.load_from_string(file)
        for number, node in enumerate(named.graph.node):  # the tools go by names
            node.name = node.name or f"node_{number}"
        onnx.save(named, whole)
        # Symbolic shapes are left out: they are for networks that other tools exported, and need one more package.
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        quantize_static(
            prepared,
            made,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Weights of 7 bits: processors without VNNI add two products in 16 bits, which 8 bits overflow. So the
            # file gives the same results everywhere, also those that were measured.
            reduce_range=True,
            calibrate_method=CalibrationMethod.MinMax,
            op_types_to_quantize=list(_QUANTISED),
            nodes_to_exclude=_kept_whole(graph),
        )
        result = onnx.load(made)
    result.ir_version = named.ir_version
    # The tools declare every set of operations that this onnxruntime knows; an older one refuses the file for versions
    # of sets that no node uses.
    del result.opset_import[:]
    result.opset_import.extend(named.opset_import)
    found: bytes = result.SerializeToString()
    return found


def _kept_whole(graph: Any) -> list[str]:
    """Nodes that stay in full precision: the classifiers, and what comes behind the logits.

    The class is the largest of the logits. In 8 bits many pixels would have two largest ones.
    """
    made_by = {output: node for node in graph.node for output in node.output}
    kept, front = [], ["logits"]
    while front:  # up to the layers with weights that give the logits
        node = made_by.get(front.pop())
        if node is not None and node.name not in kept:
            kept.append(node.name)
            if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                front += node.input[:1] if node.op_type != "Concat" else node.input
    behind = {"logits"}
    for node in graph.node:  # in the order in which they run
        if behind & set(node.input):
            behind |= set(node.output)
            kept.append(node.name)
    return kept


def _fitted(image: np.ndarray, side: tuple[int, int] | None) -> np.ndarray:
    if side is None:
        return image
    found: np.ndarray = resize_transform(image, np.zeros(image.shape[:2], np.uint8), size=side)[0]
    return found.transpose(1, 2, 0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tools' log messages and warnings."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# ---------------------------------------------------------------- measuring


def _measured(
    model: LoadedModel,
    branch: str,
    name: str,
    ids: Sequence[int],
    files: Mapping[str, bytes],
    trial: Trial,
) -> dict[str, Measured]:
    """Predict the same images with every file as `predict` does, and compare each with the first, the full one."""
    space = model.spaces[branch]
    sessions = {
        key: OnnxFiles({branch: session_of(file, name)}, {branch: ids}) for key, file in files.items()
    }
    matrices = {key: ConfusionMatrix(space.num_classes) for key in files}
    equal, total, images, labelled = dict.fromkeys(files, 0), 0, 0, True
    for image, label in trial.measured():
        full: np.ndarray | None = None
        for key, onnx in sessions.items():
            model.onnx = onnx
            found = model.predict(image, branch=branch).ids
            full = found if full is None else full
            equal[key] += int((found == full).sum())
            if label is not None:
                matrices[key].update(
                    torch.from_numpy(found.astype(np.int64)), torch.from_numpy(label.astype(np.int64))
                )
        total += 0 if full is None else full.size
        images += 1
        labelled = labelled and label is not None
    if not images:
        raise DataError("there is no image to measure the smaller ONNX files on")
    first, *others = files
    each = {key: matrices[key].iou().tolist() for key in files}
    result = {}
    for key in others:
        same = equal[key] / total
        full_score, score = (_mean(each[first]), _mean(each[key])) if labelled else (1.0, same)
        classes = {
            space.names[i]: (_defined(a), _defined(b))
            for i, (a, b) in enumerate(zip(each[first], each[key], strict=True))
        }
        result[key] = Measured(
            reduced_name(name, key), len(files[key]), len(files[first]), images, trial.measured_on,
            trial.calibrated_on if key == "int8" else "", "mIoU" if labelled else "agreement", full_score, score, same,
            classes if labelled else {},
        )  # fmt: skip
    return result


def reduced_name(name: str, precision: str) -> str:
    """Name of a smaller file beside the full one: model.int8.onnx beside model.onnx."""
    return f"{Path(name).stem}.{precision}.onnx"


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value == value]
    if not known:
        raise DataError("the images to measure on show no class that the model knows")
    return sum(known) / len(known)


def _defined(value: float) -> float | None:
    return None if value != value else value


def reduced_text(branch: str, precision: str, one: Measured | Mapping[str, Any], several: bool) -> str:
    """Describe a smaller file in one line."""
    about = Measured(**one) if isinstance(one, Mapping) else one
    of = f" of branch '{branch}'" if several else ""
    bytes_ = f"{size(about.bytes)} instead of {size(about.full_bytes)}"
    same = f"same class on {percent(about.equal_pixels, digits=2)} % of the pixels"
    scored = (
        f"mIoU {percent(about.reduced)} instead of {percent(about.full)}, {same}"
        if about.measure == "mIoU"
        else same
    )
    calibrated = f"; calibrated on {about.calibrated_on}" if about.calibrated_on else ""
    return f"ONNX in {precision}{of}: {bytes_}; on {about.source}: {scored}{calibrated}"


def stored(reduced: Reduced) -> dict[str, dict[str, Any]]:
    """What lineage.json says about the smaller files."""
    return {
        branch: {name: asdict(one) for name, (_, one) in each.items()}
        for branch, each in reduced.items()
        if each
    }


# ---------------------------------------------------------------- images


def trials_of_run(
    folder: RunFolder, spaces: Mapping[str, LabelSpace], domains: Mapping[str, str], overrides: Sequence[str]
) -> dict[str, Trial]:
    """Take a run's own data: training images to calibrate, test images to measure.

    Raises:
        ConfigError, DataError: they are not at hand, or a branch has none; the message says what to give instead.
    """
    config = stored_config(folder, overrides, kinds=("dataset",))
    try:
        datasets = open_datasets(config.data)
    except (ConfigError, DataError) as error:
        raise type(error)(
            f"--precision measures on the run's own images, and they cannot be read ({first_line(error)}); say where "
            "they are (data.root=DIR), or give others (--calibrate DATA)"
        ) from None
    found: dict[str, Trial] = {}
    for key, dataset in datasets.items():
        if config.data.domains:
            branch, domain = domains.get(key), key
        else:  # one data set: of a run that extended a model with several branches, it is that of one place
            branch, domain = config.scenario.branch or next(iter(spaces)), config.scenario.domain or ""
        if branch is not None and branch in spaces and branch not in found:
            found[branch] = _of_dataset(
                dataset, config.scenario, branch, spaces[branch], domain, foreign=False
            )
    if lost := [branch for branch in spaces if branch not in found]:
        raise ConfigError(
            f"--precision measures every branch on images, and the run's own show none of {', '.join(lost)}; give "
            "others (--calibrate DATA)"
        )
    return found


def trials_of(
    where: str | Path, spaces: Mapping[str, LabelSpace], form: InputForm, overrides: Sequence[str]
) -> dict[str, Trial]:
    """Take images that the user names: a folder of images, or data with labels.

    Raises:
        ConfigError, DataError: there are none, or the data share no class with a branch.
    """
    require_onnx()
    path = Path(where)
    if path.is_dir() and not (path / "data.yaml").is_file():
        trial = _of_folder(path, form)
        return dict.fromkeys(spaces, trial)
    if path.is_dir():
        path = path / "data.yaml"
    named = str(path) if path.is_file() else str(where)
    config = from_stored({"data": form.settings()}, [f"data={named}", *overrides])
    return _of_data(config.data, config.scenario, spaces)


def _of_data(
    data: DataConfig, scenario: ScenarioConfig, spaces: Mapping[str, LabelSpace]
) -> dict[str, Trial]:
    ((_, dataset),) = open_datasets(data).items()
    return {branch: _of_dataset(dataset, scenario, branch, space, "") for branch, space in spaces.items()}


def _of_folder(path: Path, form: InputForm) -> Trial:
    files = image_files(path, form.reading)
    calibration = spread(files, CALIBRATION)
    others = [file for file in files if file not in set(calibration)] or calibration
    measured = spread(others, MEASURED)
    return Trial(
        lambda: (read_image(file, form.reading) for file in calibration),
        lambda: ((read_image(file, form.reading), None) for file in measured),
        f"{counted(len(calibration), 'image')} of {path.name}",
        f"{counted(len(measured), 'image')} of {path.name}{'' if others is not calibration else ', the same'}",
    )


def _of_dataset(
    dataset: Dataset,
    scenario: ScenarioConfig,
    branch: str,
    space: LabelSpace,
    domain: str,
    *,
    foreign: bool = True,
) -> Trial:
    source, _ = source_by_name(dataset, scenario, branch, space, domain=domain, foreign=foreign)
    test, table = dataset.splits[source.split], padded_table(source)
    rows = spread(source.indices, MEASURED)
    name = "train" if "train" in dataset.splits and len(dataset.splits["train"]) else source.split
    train = dataset.splits[name]
    places = spread(range(len(train)), CALIBRATION)

    def measured() -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for row in rows:
            image, mask = test.read(row)
            yield image, table[mask]

    def images(split: Split) -> Iterator[np.ndarray]:
        return (split.read(place)[0] for place in places)

    return Trial(
        lambda: images(train),
        measured,
        f"{counted(len(places), 'image')} of {dataset.name}/{name}",
        f"{counted(len(rows), 'image')} of {dataset.name}/{source.split}",
    )
