"""Layers of other libraries that cut their map into windows, while a graph with open sizes is exported.

Swin, SwinV2 and MobileViT enlarge their map to whole windows first. How far depends on the image's size, in expressions
and conditions that PyTorch's exporter cannot follow; see `models.open_sizes`. While a graph is exported, these layers
run as written here: the same numbers, with the enlarged sizes given as inputs of the graph and no condition on them.
In every other run the library's own code is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everseg.models.open_sizes import Places


@dataclass(frozen=True)
class Windowed:
    """A layer that cuts its map into windows."""

    layer: nn.Module
    method: str
    """Name of the method that is replaced."""
    run: Callable[..., Any]
    """What replaces it, called with the layer, `Places` of the map in whole windows, and the method's arguments."""
    side: int
    """Of a window, in cells."""
    height: Callable[..., int]
    """The method's arguments -> rows of the layer's map."""


def windowed_layers(body: nn.Module) -> list[Windowed]:
    """Find these layers in an encoder."""
    found = []
    for layer in body.modules():
        kind = (type(layer).__module__.partition(".")[0], type(layer).__name__)
        one = KINDS[kind](layer) if kind in KINDS else None
        if one is not None and hasattr(layer, one.method):
            found.append(one)
    return found


def strides_of(layers: list[Windowed], run: Callable[[], object], rows: int) -> list[int]:
    """Return the stride of each layer's map, in pixels.

    Args:
        run: runs the encoder once.
        rows: height of the image that it runs on, in pixels.
    """
    heights: dict[int, int] = {}

    def note(index: int, layer: Windowed, *given: Any, **named: Any) -> Any:
        heights[index] = layer.height(*given, **named)
        return getattr(type(layer.layer), layer.method)(layer.layer, *given, **named)

    with _replaced({i: partial(note, i, layer) for i, layer in enumerate(layers)}, layers):
        run()
    return [rows // heights[index] for index in range(len(layers))]


@contextlib.contextmanager
def given_windows(
    layers: list[Windowed], strides: list[int], places: Mapping[tuple[int, int], Places]
) -> Iterator[None]:
    """Let the layers take the places of whole windows from here.

    Args:
        strides: of each layer's map.
        places: (stride, side of the windows) -> places.
    """
    runs = {i: partial(one.run, one.layer, places[strides[i], one.side]) for i, one in enumerate(layers)}
    with _replaced(runs, layers):
        yield


@contextlib.contextmanager
def _replaced(runs: Mapping[int, Callable[..., Any]], layers: list[Windowed]) -> Iterator[None]:
    """Replace each layer's method by what stands in its instance, which Python looks up before the class."""
    try:
        for index, run in runs.items():
            layers[index].layer.__dict__[layers[index].method] = run
        yield
    finally:
        for index in runs:
            layers[index].layer.__dict__.pop(layers[index].method, None)


def _enlarged(map: Tensor, places: Places) -> Tensor:
    """Enlarge (B, h, w, C) to whole windows by zeros."""
    rows, columns = places
    height, width = map.shape[1:3]
    # Places beyond the map pick its last row or column, and are then set to 0.
    picked = map.index_select(1, rows.clamp(max=height - 1)).index_select(2, columns.clamp(max=width - 1))
    inside = (rows < height)[:, None, None] & (columns < width)[:, None]  # (h', w', 1)
    return picked * inside.to(map.dtype)


def _cut(map: Tensor, height: int, width: int) -> Tensor:
    """Cut (B, h', w', C) to (B, height, width, C)."""
    rows, columns = (torch.arange(side, device=map.device) for side in (height, width))
    return map.index_select(1, rows).index_select(2, columns)


def _into_windows(map: Tensor, side: int) -> Tensor:
    """(B, h', w', C) -> (windows, side * side, C)."""
    batch, height, width, channels = map.shape
    cells = map.view(batch, height // side, side, width // side, side, channels)
    return cells.transpose(2, 3).contiguous().view(-1, side * side, channels)


def _from_windows(windows: Tensor, side: int, height: int, width: int) -> Tensor:
    """(windows, side * side, C) -> (B, height, width, C)."""
    channels = windows.shape[-1]
    cells = windows.view(-1, height // side, width // side, side, side, channels)
    return cells.transpose(2, 3).contiguous().view(-1, height, width, channels)


def _regions(map: Tensor, side: int, shift: int) -> Tensor | None:
    """What Swin adds to the attention in a shifted map: -100 between cells that did not lie side by side before.

    Returns:
        (windows of one image, side * side, side * side); None where nothing is shifted.
    """
    if shift <= 0:
        return None
    parts = []
    for length in map.shape[1:3]:
        place = torch.arange(length, device=map.device)
        parts.append((place >= length - side).long() + (place >= length - shift).long())
    number = (parts[0][:, None] * 3 + parts[1])[None, :, :, None].to(map.dtype)  # (1, h', w', 1)
    windows = _into_windows(number, side)[..., 0]  # (windows, side * side)
    return (windows[:, None, :] != windows[:, :, None]).to(map.dtype) * -100.0


def _swin(
    layer: Any,
    places: Places,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    *_: Any,
    **named: Any,
) -> tuple[Tensor, Any]:
    """Run transformers' SwinLayer on (B, h w, C)."""
    normed = layer.layernorm_before(hidden_states)
    attended, weights = _shifted(layer, places, normed, input_dimensions, **named)
    hidden_states = hidden_states + layer.drop_path(attended)
    return hidden_states + layer.dropout(layer.mlp(layer.layernorm_after(hidden_states))), weights


def _swin2(
    layer: Any,
    places: Places,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    *_: Any,
    **named: Any,
) -> tuple[Tensor]:
    """Run transformers' Swinv2Layer on (B, h w, C)."""
    attended, _weights = _shifted(layer, places, hidden_states, input_dimensions)
    hidden_states = hidden_states + layer.drop_path(layer.layernorm_before(attended))
    output = layer.output(layer.intermediate(hidden_states))
    return (hidden_states + layer.drop_path(layer.layernorm_after(output)),)


def _shifted(
    layer: Any, places: Places, hidden_states: Tensor, dimensions: tuple[int, int], **named: Any
) -> tuple[Tensor, Any]:
    """Attention of transformers' Swin inside shifted windows: (B, h w, C) to the same."""
    (height, width), side, shift = dimensions, layer.window_size, layer.shift_size
    batch, _, channels = hidden_states.shape
    map = _enlarged(hidden_states.view(batch, height, width, channels), places)
    regions = _regions(map, side, shift)
    if shift > 0:
        map = torch.roll(map, (-shift, -shift), (1, 2))
    attended, weights = (*layer.attention(_into_windows(map, side), regions, **named), None)[:2]
    result = _from_windows(attended, side, map.shape[1], map.shape[2])
    if shift > 0:
        result = torch.roll(result, (shift, shift), (1, 2))
    return _cut(result, height, width).reshape(batch, height * width, channels), weights


def _timm_swin(block: Any, places: Places, x: Tensor) -> Tensor:
    """Run `_attn` of timm's SwinTransformerBlock on (B, h, w, C)."""
    (side, _), (shift, _) = block.window_size, block.shift_size
    height, width = x.shape[1:3]
    if shift > 0:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    map = _enlarged(x, places)  # timm enlarges the shifted map, transformers shifts the enlarged one
    attended = block.attn(_into_windows(map, side), mask=_regions(map, side, shift))
    result = _cut(_from_windows(attended, side, map.shape[1], map.shape[2]), height, width)
    return torch.roll(result, (shift, shift), (1, 2)) if shift > 0 else result


def _mobilevit(layer: Any, places: Places, features: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Run `unfolding` of transformers' MobileViTLayer on (B, C, h, w)."""
    side = layer.patch_width
    batch, channels, *size = features.shape
    height, width = (indices.shape[0] for indices in places)
    # To the size that it has, this changes nothing, so no condition is needed.
    map = F.interpolate(features, (height, width), mode="bilinear", align_corners=False)
    down, across = height // side, width // side
    patches = map.reshape(batch * channels * down, side, across, side).transpose(1, 2)
    patches = patches.reshape(batch, channels, down * across, side * side).transpose(1, 3)
    about = {
        "orig_size": tuple(size), "batch_size": batch, "channels": channels, "interpolate": True,
        "num_patches": down * across, "num_patches_width": across, "num_patches_height": down,
    }  # fmt: skip
    return patches.reshape(batch * side * side, down * across, -1), about


KINDS: dict[tuple[str, str], Callable[[Any], Windowed]] = {
    ("transformers", "SwinLayer"): lambda layer: Windowed(
        layer, "forward", _swin, layer.window_size, lambda hidden, size, *_, **__: size[0]
    ),
    ("transformers", "Swinv2Layer"): lambda layer: Windowed(
        layer, "forward", _swin2, layer.window_size, lambda hidden, size, *_, **__: size[0]
    ),
    ("transformers", "MobileViTLayer"): lambda layer: Windowed(
        layer, "unfolding", _mobilevit, layer.patch_width, lambda map: map.shape[2]
    ),
    ("timm", "SwinTransformerBlock"): lambda block: Windowed(
        block, "_attn", _timm_swin, block.window_size[0], lambda map: map.shape[1]
    ),
}
"""Library and class -> what stands for its windows."""
