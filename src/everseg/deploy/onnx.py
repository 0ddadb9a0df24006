"""Export of a branch as an ONNX graph from pixels to masks, and comparison of the graph with PyTorch."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everseg.data.batches.transforms import normalise, resized_image
from everseg.deploy.class_ids import mask_type
from everseg.display import percent
from everseg.errors import ConfigError, GateError, first_line
from everseg.losses.argmax import predict_ids
from everseg.losses.readout import full_values, merged_outputs, small_values
from everseg.models.adapters.attention import plain_attention
from everseg.models.adapters.encoders import LibraryEncoder
from everseg.models.adapters.whole import WholeNetwork
from everseg.models.folding import united
from everseg.models.model import SegmentationModel
from everseg.models.open_sizes import given_sizes, of_tensors, places
from everseg.runs.input_form import InputForm

LOGIT_TOLERANCE = 1e-3
"""Largest allowed difference of a logit, relative to the largest logit of its image (at least 1)."""
PIXEL_TOLERANCE = 1e-3
"""Largest share of pixels whose class may differ. Rounding decides where two logits are nearly equal."""
TORCH_TYPES = {"uint8": torch.uint8, "float32": torch.float32}
"""Types of the graph's input."""
EXAMPLE_SIZE = (77, 107)
"""Sides are odd and unequal, so that the exporter does not assume a multiple of the stride."""
OPSET, IR = 18, 8
"""Version of the operators and of the file, chosen for `OLDEST`."""
OLDEST = "1.15"
"""Oldest onnxruntime that the files are for. All three precisions were run by 1.15.1 and 1.32, the full one also by
onnxruntime-web 1.30 and OpenVINO 2026.4."""
SCALES = (0.75, 0.4)
"""Every image is compared at its own size and reduced by one of these factors."""


def require_onnx() -> None:
    """Check that the packages of the extra `export` can be imported.

    Raises:
        ConfigError: some are missing. The message names them and says what to do.
    """
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except Exception:  # a broken installation can raise almost any exception
            missing.append(name)
    if missing:
        raise ConfigError(
            f"ONNX needs {', '.join(missing)}: pip install 'everseg[export]', or leave the ONNX file out with --no-onnx"
        )


class Deployed(nn.Module):
    """The computation of the ONNX file: one branch from pixels to masks.

    Args:
        model: in eval mode, on the CPU.
        branch: name of the branch.
        ids: lasting id of each output.
        form: how images are prepared for the model. Resizing to `form.size` happens before the graph.

    Raises:
        ConfigError: the network reads further maps beside the image.
    """

    def __init__(self, model: SegmentationModel, branch: str, ids: Sequence[int], form: InputForm) -> None:
        super().__init__()
        if model.reads_extra:
            raise ConfigError(
                f"the network reads {', '.join(model.reads_extra)} beside every image, and an ONNX file takes "
                "images alone; leave it out with --no-onnx"
            )
        self.model, self.branch, self.form = united(model, branch), branch, form
        self.ids: Tensor
        # Tables of 16 bits are looked up as 32: runtimes support more operations on them.
        self.wide = mask_type(ids) is np.uint16
        self.register_buffer("ids", torch.tensor(ids, dtype=torch.int32 if self.wide else torch.uint8))

    @property
    def foreign(self) -> bool:
        """Whether the encoder, or the whole network, is another library's."""
        return isinstance(self.model.encoder, LibraryEncoder | WholeNetwork)

    @property
    def multiple(self) -> int | None:
        """What an encoder of whole cells enlarges sides to a multiple of; None = it takes any size as it is."""
        encoder = self.model.encoder
        return encoder.multiple if isinstance(encoder, LibraryEncoder) else None

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of that encoder's maps, each once."""
        encoder = self.model.encoder
        taps = encoder.taps.values() if isinstance(encoder, LibraryEncoder) else ()
        return tuple(dict.fromkeys(stride for _, stride in taps))

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """Strides of maps that the encoder cuts into windows, and the windows' sides in cells; each pair once."""
        encoder = self.model.encoder
        return encoder.windows if isinstance(encoder, LibraryEncoder) else ()

    def forward(self, image: Tensor, *places: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, H, W, 3) uint8 RGB, or stated channels, to logits (B, C, h, w) float32 and ids (B, H, W).

        Args:
            places: in an exported graph with open sizes, `Sizes` one after the other; see `open_sizes`.

        The ids are of `mask_type`.
        """
        if places:
            with given_sizes(of_tensors(places, self.strides, self.windows)):
                return self(image)
        inputs = normalise(image.permute(0, 3, 1, 2), self.form.normalisation, self.form.channels)
        output = self.model(inputs, (self.branch,))[self.branch]
        values = full_values(output, self.model.readout, (image.shape[1], image.shape[2]))
        mask = self.ids[values.argmax(1)]
        return output.logits, mask.to(torch.uint16) if self.wide else mask


def to_onnx(deployed: Deployed, about: Mapping[str, Any], size: tuple[int, int] | None = None) -> bytes:
    """Export to ONNX with variable batch, and with variable height and width unless `size` is given.

    Args:
        about: entries of the file's metadata. Every value is stored as JSON under its key.
        size: the only (H, W) that the graph is to take.

    Raises:
        ConfigError: packages are missing, or the architecture cannot be exported.
    """
    require_onnx()
    channels = deployed.form.channels
    count, kind = (
        (3, torch.uint8) if channels is None else (len(channels), TORCH_TYPES[channels.array_type.name])
    )
    example: tuple[Tensor, ...] = (torch.zeros(2, *(size or EXAMPLE_SIZE), count, dtype=kind),)
    names = ["image"]
    dims: tuple[Any, ...] = ({0: torch.export.Dim("batch")},)
    if size is None:
        least = _least_side(deployed.eval(), count)
        dims[0].update(
            {axis: torch.export.Dim(name, min=least) for axis, name in ((1, "height"), (2, "width"))}
        )
    if deployed.multiple is not None and size is None:
        extra, extra_dims = _places(deployed.multiple, deployed.strides, deployed.windows)
        example, dims, names = (*example, *extra.values()), (dims[0], tuple(extra_dims)), [*names, *extra]
    with _quiet(), plain_attention(deployed.model):
        try:
            program = torch.onnx.export(
                deployed.eval(), example, dynamo=True, verbose=False, input_names=names,
                output_names=["logits", "mask"], dynamic_shapes=dims, opset_version=OPSET,
            )  # fmt: skip
        except Exception as error:  # the exporter can raise almost any exception
            how = "with open sizes" if size is None else f"at {size[0]} x {size[1]} pixels"
            raise ConfigError(
                f"the model cannot be exported to ONNX {how} ({_reason(error)}); leave it out with --no-onnx: "
                "predict, serve and extend do without it"
            ) from error
    assert program is not None
    proto = program.model_proto
    proto.ir_version = IR
    if len(names) > 1:
        _compute_places(proto.graph, deployed.multiple or 1, deployed.strides, deployed.windows)
    _forget_sources(proto.graph)
    for function in proto.functions:
        _forget_sources(function)
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    return proto.SerializeToString()


def _least_side(deployed: Deployed, channels: int) -> int:
    """The least side of an image that the exporter takes for general: more than one cell of the coarsest map.

    The exporter finds it by itself, too, but only by tracing the network a second time. Images may be smaller.

    Returns:
        0 if it cannot be told: the network takes whole cells (see `_places`), or no image of 128 x 128.
    """
    if deployed.multiple is not None:
        return 0
    side, strides = 128, {1}

    def see(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3]:
            strides.add(side // output.shape[2])

    hooks = [one.register_forward_hook(see) for one in deployed.modules() if isinstance(one, nn.Conv2d)]
    try:
        with torch.no_grad():
            deployed.model(torch.zeros(1, channels, side, side), (deployed.branch,))
    except Exception:  # another library's network may refuse an image in any way
        return 0
    finally:
        for hook in hooks:
            hook.remove()
    # Maps of a few cells are pooled ones.
    return 1 + max(stride for stride in strides if stride in (1, 2, 4, 8, 16, 32))


def _reason(error: Exception) -> str:
    """What the exporter says of the cause: one line, further down in a page of advice to programmers."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # colours of a terminal
    found = re.search(r"## Exception summary\s+(?:<class '(?P<kind>[^']*)'>: )?(?P<what>.+)", text)
    if found is None:
        return first_line(Exception(text or type(error).__name__))
    return ": ".join(filter(None, found.groups()))


def _places(
    multiple: int, strides: Sequence[int], windows: Sequence[tuple[int, int]]
) -> tuple[dict[str, Tensor], list[dict[int, Any]]]:
    """Inputs of a graph with open sizes: `Sizes` by name, for an image of EXAMPLE_SIZE, and their open lengths."""
    # At least two cells and two windows: the exporter takes lengths of 0 and 1 for special.
    least = max([multiple, *(stride * cells for stride, cells in windows)])
    height, width = (side // least * least + least + 1 for side in EXAMPLE_SIZE)
    sizes = places(height, width, multiple, strides, windows)
    found: dict[str, Tensor] = {}
    dims: list[dict[int, Any]] = []
    for axis, side in enumerate(("row", "column")):
        found[f"{side}s"] = sizes.whole[axis]
        dims.append({0: multiple * torch.export.Dim(f"{side}_cells", min=2)})
    for stride, pair in sizes.cells.items():
        for axis, side in enumerate(("row", "column")):
            found[f"{side}s_of_{stride}"] = pair[axis]
            dims.append({0: torch.export.Dim(f"{side}s_{stride}", min=2)})
    for (stride, cells), pair in sizes.windows.items():
        for axis, side in enumerate(("row", "column")):
            found[f"{side}s_of_{stride}_in_{cells}"] = pair[axis]
            dims.append({0: cells * torch.export.Dim(f"{side}s_{stride}_in_{cells}", min=2)})
    return found, dims


def _compute_places(
    graph: Any, multiple: int, strides: Sequence[int], windows: Sequence[tuple[int, int]]
) -> None:
    """Compute the inputs of `_places` from the image's shape, and take them away from the graph's inputs."""
    from onnx import TensorProto, helper

    nodes: list[Any] = []

    def number(value: int) -> str:
        name = f"size_number_{value}"
        if not any(name in node.output for node in nodes):
            tensor = helper.make_tensor(name, TensorProto.INT64, [], [value])
            nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def made(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def cells(side: str, stride: int, output: str) -> str:
        """ceil(side / stride)."""
        raised = made("Add", [side, number(stride - 1)], f"{output}_raised")
        return made("Div", [raised, number(stride)], output)

    for axis, name in enumerate(("row", "column")):
        shape = made("Shape", ["image"], f"{name}_shape", start=axis + 1, end=axis + 2)
        side = made("Squeeze", [shape], f"{name}_side")
        whole = made("Mul", [cells(side, multiple, f"{name}_cells"), number(multiple)], f"{name}_whole")
        last = made("Sub", [side, number(1)], f"{name}_last")
        every = made("Range", [number(0), whole, number(1)], f"{name}_every")
        made("Min", [every, last], f"{name}s")  # the last row or column repeats
        for stride in strides:
            count = cells(side, stride, f"{name}_count_{stride}")
            made("Range", [number(0), count, number(1)], f"{name}s_of_{stride}")
        for stride, side_of_window in windows:
            key = f"{name}s_of_{stride}_in_{side_of_window}"
            count = cells(whole, stride * side_of_window, f"{key}_count")
            length = made("Mul", [count, number(side_of_window)], f"{key}_length")
            made("Range", [number(0), length, number(1)], key)
    computed = {output for node in nodes for output in node.output}
    kept = [value for value in graph.input if value.name not in computed]
    del graph.input[:]
    graph.input.extend(kept)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def _forget_sources(graph: Any) -> None:
    """Remove the notes that PyTorch attaches to every node: source lines, with paths of this machine.

    Bundles are given to others, who should not see these paths. The notes also make up half of the file.
    """
    for noted in (graph, *graph.node, *graph.value_info, *getattr(graph, "initializer", ())):
        if hasattr(noted, "metadata_props"):
            del noted.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _forget_sources(inner)


@dataclass(frozen=True)
class Parity:
    """Difference between an ONNX file and PyTorch."""

    images: int
    source: str
    """Description of the images."""
    sizes: tuple[tuple[int, int], ...]
    """The sizes (H, W) at which the two were compared."""
    logit_difference: float
    """Largest absolute difference of a logit."""
    equal_pixels: float
    """Share of pixels with the same class."""
    one_size: bool = False
    """Whether the file takes no other size."""


@torch.no_grad()
def check_parity(
    deployed: Deployed, file: bytes, images: Sequence[np.ndarray], source: str, *, one_size: bool = False
) -> Parity:
    """Run images through PyTorch and onnxruntime and compare. Each image is used at its own size and a smaller one.

    Args:
        file: the result of `to_onnx`.
        images: (H, W, 3) uint8 each, already resized for the model.
        source: description of the images.
        one_size: the graph takes the size of these images only, so the smaller one is left out.

    Raises:
        GateError: a logit or more than a few pixels differ. The message says by how much.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    sizes: dict[tuple[int, int], None] = {}
    worst = relative = 0.0
    equal = total = 0
    for image in map(np.ascontiguousarray, images) if one_size else _at_sizes(images):
        inputs = normalise(
            torch.from_numpy(image.transpose(2, 0, 1).copy())[None],
            deployed.form.normalisation,
            deployed.form.channels,
        )
        output = deployed.model(inputs, (deployed.branch,))[deployed.branch]
        logits, readout = output.logits, deployed.model.readout
        values = small_values(output, readout)
        size = (image.shape[0], image.shape[1])
        mask = deployed.ids.numpy()[predict_ids(values, size, merged_outputs(readout)).numpy()]
        try:
            found, found_mask = session.run(["logits", "mask"], {"image": image[None]})
        except Exception as error:  # onnxruntime has its own exception classes
            raise GateError(
                f"onnxruntime cannot run the exported model at {image.shape[0]} x {image.shape[1]}: "
                f"{first_line(error)}; nothing was written; --no-onnx leaves the ONNX file out"
            ) from error
        # Logits of another shape cannot be subtracted; they count as infinitely different.
        same = found.shape == tuple(logits.shape)
        difference = float(np.abs(found - logits.numpy()).max()) if same else float("inf")
        worst = max(worst, difference)
        relative = max(relative, difference / max(1.0, float(logits.abs().max())))
        equal += int((found_mask == mask).sum())
        total += mask.size
        sizes[(image.shape[0], image.shape[1])] = None
    result = Parity(len(images), source, tuple(sizes), worst, equal / total, one_size)
    if not (relative <= LOGIT_TOLERANCE and 1 - result.equal_pixels <= PIXEL_TOLERANCE):
        raise GateError(
            f"the ONNX model of branch '{deployed.branch}' differs from the trained one on {source}: a logit by "
            f"{worst:.3g}, {percent(1 - result.equal_pixels, digits=4)} % of the pixels; nothing was written. Please "
            "report it; --no-onnx leaves the ONNX file out"
        )
    return result


def _at_sizes(images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield each image at its own size, then reduced to an odd size."""
    for position, image in enumerate(images):
        yield np.ascontiguousarray(image)
        scale = SCALES[position % len(SCALES)]
        height, width = (max(33, int(side * scale) | 1) for side in image.shape[:2])
        yield resized_image(image, height, width)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's log messages and warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
