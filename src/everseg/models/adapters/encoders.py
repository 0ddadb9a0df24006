"""Models on encoders of other libraries: taps by name, odd image sizes, DeepLabV3 or an all-MLP decoder."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everseg.config.fields import ModelConfig
from everseg.errors import ConfigError, some
from everseg.models.adapters import timm as from_timm
from everseg.models.adapters import transformers as from_transformers
from everseg.models.adapters.per_branch import RANK, BranchLayer, merge, own_parts, through_branch
from everseg.models.adapters.windows import Windowed, given_windows, strides_of, windowed_layers
from everseg.models.blocks import (
    ATTENTION,
    PRE,
    BranchDecoder,
    PerBranch,
    check_norm,
    check_per_branch,
    is_norm,
)
from everseg.models.deeplab import RATES, DeepLabV3
from everseg.models.mlp import MLPDecoder
from everseg.models.model import SegmentationModel
from everseg.models.open_sizes import picked, sizes_at_hand
from everseg.models.patches import PatchDecoder, plain
from everseg.models.token_head import TokenHead
from everseg.types import IMAGENET_MEAN, IMAGENET_STD, Taps

log = logging.getLogger("everseg")

FORM = "hf:NAME or timm:NAME"
MAX_TAPS = 4
INPUTS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "unit": ((0.0,) * 3, (1.0,) * 3)}
"""`data.normalisation` -> mean and deviation that images are given with."""
ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations", "timm.layers.activations")
"""Python modules that define activations."""
_BLOCK = re.compile(
    r"(.*?(?<![A-Za-z_])(?:(?:layers?|blocks?|stages?)[._]\d+(?:\.(?:(?:layers?|blocks?)\.)?\d+)?|layer\d+\.\d+))"
    r"(?=\.)"
)
"""Name of a stage, or of a block in it, at the beginning of the name of a module in it."""


class LibraryEncoder(nn.Module):
    """An encoder of another library, with everseg's taps "layer1", "layer2", ..., finest first.

    Images are enlarged to multiples of the coarsest stride by repeating their last row and column; every map is cut
    to ceil(side / stride) cells again, so that it covers the image and no more than a part of a cell beyond.

    Weights that no used tap depends on (a mask token, the norm behind the last stage of a classifier) become buffers:
    kept and stored under their names, never trained. While none of its weights is trained, the encoder runs as in
    evaluation (no dropout, no stochastic depth), but for the statistics of its norms, which `SegmentationModel.freeze`
    decides on.

    Args:
        description: the result of `from_transformers.describe` or `from_timm.describe`, with "inputs" added: "scale"
            and "shift" per channel, applied to the images; None = images as they are.
        last_only: the decoder uses the last tap only; None = where all taps have one stride.
        per_branch: with "norm" each branch owns norms, with "adapter" adapters too (`own_parts`). The encoder runs
            once for each branch then.
        rank: of the adapters beside projections.

    Raises:
        ConfigError: a description that cannot be built; an encoder whose maps do not lie on a grid over the image, or
            that takes images of one size only; or parts per branch that it cannot have.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        *,
        last_only: bool | None,
        per_branch: PerBranch = "head",
        rank: int = RANK,
    ) -> None:
        super().__init__()
        module = _module(description)
        self.body: nn.Module = module.build(description)
        self._read = module.read_maps
        self.in_channels: int = module.channels(description)
        self._attends = module is from_transformers
        self._grids: list[tuple[int, int]] | None = None
        unit = from_timm.unit(self.body) if module is from_timm else from_transformers.unit(description)
        # A trial image shows which maps there are and how large.
        maps, activations = self._trial(unit)
        self._unit = unit
        asked = module.positions(description, len(maps))
        self._indices = _per_resolution(maps) if asked is None else asked
        maps = [maps[i] for i in self._indices]
        # The trial image has 2 * unit rows, so a map of h rows has stride 2 * unit / h.
        self.taps = {f"layer{k + 1}": (map.shape[1], 2 * unit // map.shape[2]) for k, map in enumerate(maps)}
        """Name -> channels, stride."""
        self._last_activations = {
            name: called
            for name, map in zip(self.taps, maps, strict=True)
            for called, output in activations.items()
            if output is map
        }
        """Tap -> name of the activation that gives it, where a stage ends in one."""
        strides = [stride for _, stride in self.taps.values()]
        if strides != sorted(strides):
            raise ConfigError(f"model.options: taps must go from fine to coarse; their strides are {strides}")
        self.multiple = math.lcm(*strides)
        self.out_channels, self.stride = list(self.taps.values())[-1]
        if last_only is None:
            last_only = plain(self.taps)
        _keep_unused(self.body, maps[-1:] if last_only else maps)
        inputs = _checked_inputs(description.get("inputs"))
        self.scale: Tensor | None
        self.shift: Tensor | None
        for name in ("scale", "shift"):
            value = (
                None if inputs is None else torch.tensor(inputs[name], dtype=torch.float32).view(1, 3, 1, 1)
            )
            self.register_buffer(name, value, persistent=False)
        self.by_branch = per_branch in ("norm", "adapter")
        if self.by_branch:
            self.attention_grids  # noqa: B018  (found while the network still runs without a branch)
            own_parts(self.body, self._run_trial, adapters=per_branch == "adapter", rank=rank)
            # An activation inside a norm, as some of timm's have it, belongs to the branches now.
            inside = {name for name, _ in self.body.named_modules()}
            self._last_activations = {k: v for k, v in self._last_activations.items() if v in inside}

    def forward(
        self, image: Tensor, branches: Iterable[str] | None = None, *, taps: Taps = ()
    ) -> dict[str, Any]:
        """Map (B, in_channels, H, W) to the taps (B, C, ceil(H / stride), ceil(W / stride)); by branch if `by_branch`.

        Asked for "attention" also "attention1", "attention2", ... of every transformer block, before the maps: (B,
        heads, h, w, h', w') from each cell of the block's map to each cell of the map that it looks at, cut to the
        image alike. Asked for "before_activation" also "layer1.pre", ... of the stages that end in an activation (a
        ResNet's or a RegNet's; those of transformers and of ConvNeXt do not), before it.
        """
        if not self.by_branch:
            return self._taps(image, taps)
        found = {}
        for branch in branches or ():
            with through_branch(branch):
                found[branch] = self._taps(image, taps)
        return found

    def _taps(self, image: Tensor, taps: Taps) -> dict[str, Tensor]:
        height, width = image.shape[2:]
        if self.scale is not None and self.shift is not None:
            image = image * self.scale + self.shift
        if (sizes := sizes_at_hand()) is not None:
            with given_windows(*self._windowed, sizes.windows):
                maps = self._read(self.body, picked(image, *sizes.whole))
            return {
                name: picked(maps[index], *sizes.cells[stride])
                for index, (name, (_, stride)) in zip(self._indices, self.taps.items(), strict=True)
            }
        # Images grow to a multiple of every stride, so that all maps are grids over the same area.
        down, right = -height % self.multiple, -width % self.multiple
        if down or right:
            image = F.pad(image, (0, right, 0, down), mode="replicate")
        found: dict[str, Tensor] = {}
        with self._before_activations("before_activation" in taps) as before:
            if "attention" in taps and self.attention_grids:
                maps, attentions = from_transformers.read_attention(self.body, image)
            else:
                maps, attentions = self._read(self.body, image), []
        if attentions:
            for number, (rows, (fine, coarse)) in enumerate(
                zip(attentions, self.attention_grids, strict=True), start=1
            ):
                sides = [side // stride for stride in (fine, coarse) for side in image.shape[2:]]
                grid = rows.unflatten(3, sides[2:]).unflatten(2, sides[:2])
                h, w, to_h, to_w = (
                    -(-side // stride) for stride in (fine, coarse) for side in (height, width)
                )
                found[f"{ATTENTION}{number}"] = grid[:, :, :h, :w, :to_h, :to_w]
        for index, (name, (_, stride)) in zip(self._indices, self.taps.items(), strict=True):
            h, w = -(-height // stride), -(-width // stride)  # ceil(side / stride)
            if name in before:
                found[name + PRE] = before[name][..., :h, :w]
            found[name] = maps[index][..., :h, :w]
        return found

    @contextlib.contextmanager
    def _before_activations(self, asked: bool) -> Iterator[dict[str, Tensor]]:
        """Note what goes into the activation that ends a stage: tap -> (B, C, h, w), where `asked`."""
        found: dict[str, Tensor] = {}

        def note(name: str, activation: nn.Module, given: tuple[Tensor, ...]) -> None:
            # An activation that works in place would change the map under our hands.
            found[name] = given[0].clone() if getattr(activation, "inplace", False) else given[0]

        ends = self._last_activations.items() if asked else ()
        hooks = [
            self.body.get_submodule(called).register_forward_pre_hook(partial(note, name))
            for name, called in ends
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """Maps that layers of the encoder cut into windows: their stride, and the windows' side in cells; each once."""
        layers, strides = self._windowed
        return tuple(dict.fromkeys((stride, one.side) for one, stride in zip(layers, strides, strict=True)))

    @cached_property
    def _windowed(self) -> tuple[list[Windowed], list[int]]:
        """These layers, and the stride of each one's map."""
        layers, unit, weight = windowed_layers(self.body), self._unit, next(self.body.parameters())
        image = weight.new_zeros(1, self.in_channels, 2 * unit, 4 * unit)
        with self._trying(), torch.no_grad():
            return layers, strides_of(layers, lambda: self._read(self.body, image), 2 * unit)

    @property
    def attention_grids(self) -> list[tuple[int, int]]:
        """Strides of the queries' and the keys' grid of every attention map; [] where there is none.

        Attention inside windows, and attention with tokens beside the grid's, are left out: they are no relation of
        regions of the image.
        """
        if self._grids is None:
            self._grids = self._attention_grids() if self._attends else []
        return self._grids

    def _attention_grids(self) -> list[tuple[int, int]]:
        unit, weight = self._unit, next(self.body.parameters())
        with self._trying(), torch.no_grad():
            found = from_transformers.read_attention(
                self.body, weight.new_zeros(1, self.in_channels, 2 * unit, 4 * unit)
            )[1]
        # Half as many rows as columns, so h rows hold 2 h^2 tokens.
        heights = [[math.isqrt(tokens // 2) for tokens in rows.shape[2:]] for rows in found]
        whole = all(
            len(rows) == 1
            and all(2 * h * h == tokens for h, tokens in zip(sides, rows.shape[2:], strict=True))
            for rows, sides in zip(found, heights, strict=True)
        )
        return [(2 * unit // h, 2 * unit // to) for h, to in heights] if whole else []

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """Run the body in eval mode, and leave every part in the mode that it had."""
        training = {module: module.training for module in self.body.modules()}
        self.body.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode

    def train(self, mode: bool = True) -> LibraryEncoder:
        """Set training or eval mode; see the class for an encoder that is not trained."""
        super().train(mode)
        if mode and not any(weight.requires_grad for weight in self.parameters()):
            for module in self.body.modules():
                module.training = is_norm(module)
        return self

    def parameter_layers(self) -> list[list[nn.Parameter]]:
        """The weights of the stem and of each block, in the order in which the encoder runs them.

        Blocks are known by their names, such as stages.1.blocks.0 or layer.7. Weights between two blocks belong to the
        latter, weights after the last block to that one.

        Raises:
            ConfigError: no two blocks can be told by their names.
        """
        called = self._order_of_calls()
        keys, blocks = self._keys()
        if len(blocks) < 2:
            raise ConfigError(
                "train.layer_decay: the names of this encoder's modules do not tell its blocks apart; leave it out"
            )
        starts = {block: min(called[name] for name, key in keys.items() if key == block) for block in blocks}
        ordered = sorted(blocks, key=lambda block: starts[block])
        layers: list[list[nn.Parameter]] = [[] for _ in range(len(ordered) + 1)]
        for name, key in keys.items():
            if key in blocks:
                place = 1 + ordered.index(key)
            else:
                before = sum(starts[block] < called[name] for block in ordered)
                place = 0 if before == 0 else min(before + 1, len(ordered))
            layers[place] += self.body.get_submodule(name).parameters(recurse=False)
        return layers if layers[0] else layers[1:]

    def blocks(self) -> list[str]:
        """Names of the blocks in `body`, such as stages.1.blocks.0 or layer.7; [] where none can be told."""
        return sorted(self._keys()[1])

    def _keys(self) -> tuple[dict[str, str], set[str]]:
        """Name of each module with weights of its own -> name of its stage or block ("" = none); and all blocks."""
        keys = {}
        for name, module in self.body.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                match = _BLOCK.match(f"{name}.")
                keys[name] = match[1] if match else ""
        # "stages.1" is no block where there is a "stages.1.blocks.0": then its own weights lie between blocks.
        known = set(keys.values()) - {""}
        return keys, {key for key in known if not any(other.startswith(f"{key}.") for other in known)}

    def merged(self, branch: str) -> LibraryEncoder:
        """Copy it as the plain encoder of one branch, adapters merged into the weights beside them."""
        plain = copy.deepcopy(self)
        if self.by_branch:
            merge(plain.body, branch)
            plain.by_branch = False
        return plain

    def _order_of_calls(self) -> dict[str, int]:
        """Run a small image; name of each module -> when it was called first (else its parent's, for those never)."""
        called: dict[str, int] = {}
        modules = dict(self.body.named_modules())
        branch = next((name for m in modules.values() if isinstance(m, BranchLayer) for name in m), "")

        def note(name: str, *_: Any) -> None:
            called.setdefault(name, len(called))

        hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in modules.items()]
        try:
            with through_branch(branch):
                self._run_trial()
        finally:
            for hook in hooks:
                hook.remove()
        for name in modules:  # parents come before their children
            called.setdefault(name, called.get(name.rpartition(".")[0], 0))
        return called

    def _run_trial(self) -> list[Tensor]:
        """Run a small image in eval mode, the same at every call, and leave every part in the mode that it had."""
        weight = next(self.body.parameters())
        image = torch.rand(
            1, self.in_channels, 2 * self._unit, 4 * self._unit, generator=torch.Generator().manual_seed(0)
        )
        with self._trying(), torch.no_grad():
            return self._read(self.body, image.to(weight))

    def _trial(self, unit: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Run a small image of 2 x 4 units, and check that every map is a grid over it.

        Returns:
            The maps, and what each activation gave, by its name.
        """
        activations: dict[str, Tensor] = {}

        def note(name: str, _module: nn.Module, _given: Any, output: Any) -> None:
            activations[name] = output

        hooks = [
            module.register_forward_hook(partial(note, name))
            for name, module in self.body.named_modules()
            if type(module).__module__ in ACTIVATIONS
        ]
        # In eval mode, so that running statistics stay as they are; with gradients, for `_keep_unused` reads the graph.
        self.body.eval()
        try:
            with torch.enable_grad():
                maps = self._read(self.body, torch.zeros(1, self.in_channels, 2 * unit, 4 * unit))
        except Exception as error:  # whatever the library raises
            text = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"model.encoder: it cannot run an image of {4 * unit} x {2 * unit} pixels (perhaps it takes "
                f"one size only): {type(error).__name__}: {text}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        self.body.train()
        for map in maps:
            grid = map.ndim == 4 and 2 * unit % map.shape[2] == 0 and map.shape[3] == 2 * map.shape[2]
            if not grid:
                raise ConfigError(
                    f"model.encoder: its output of shape {tuple(map.shape)} does not match an image of {4 * unit} x "
                    f"{2 * unit} pixels; choose another encoder or other taps (model.options.taps)"
                )
        return maps, activations


def mlp(
    *,
    encoder: Mapping[str, Any],
    norm: str = "bn",
    hidden: int = 256,
    dropout: float = 0.1,
    per_branch: str = "head",
    rank: int | None = None,
) -> SegmentationModel:
    """Build SegFormer's all-MLP head on an encoder of another library (model.encoder=hf:NAME or timm:NAME).

    Args:
        encoder: description of the encoder, made of `model.encoder` and the options `config` (entries of the library's
            own configuration) and `taps`.
        norm: "bn" (ReLU), "abn" (leaky ReLU 0.01) or "iabn", of the decoder; the encoder has its own.
        hidden: as for `MLPDecoder`; so is `dropout`.
        per_branch: what each branch owns: "head" = its classifiers, "decoder" = its decoder too, "norm" = the encoder's
            norms too, "adapter" = adapters beside the encoder's layers too (`own_parts`).
        rank: of the adapters beside projections; default 8.

    Raises:
        ConfigError: a dimension or an encoder that cannot be.
    """
    kind = check_norm(norm)
    body = _encoder(encoder, per_branch, rank, last_only=False)
    make = partial(MLPDecoder, body.taps, hidden=hidden, norm=kind, dropout=dropout)
    options = {
        "encoder": encoder,
        "norm": norm,
        "hidden": hidden,
        "dropout": dropout,
        **_per_branch(per_branch, rank),
    }
    return _model("mlp", body, make, options)


def library_deeplabv3(
    *,
    encoder: Mapping[str, Any],
    norm: str = "bn",
    hidden: int = 256,
    out_channels: int = 256,
    rates: Sequence[int] | None = None,
    pool_size: int | None = None,
    per_branch: str = "head",
    rank: int | None = None,
) -> SegmentationModel:
    """Build DeepLabV3's head on the last tap of an encoder of another library; options as for `mlp` and `DeepLabV3`.

    Args:
        encoder: as for `mlp`; so are `norm`, `per_branch` and `rank`.
        hidden: as for `DeepLabV3`; so are `out_channels`, `rates`, `pool_size`.
        rates: default 12, 24, 32 up to stride 8, 6, 12, 18 up to 16, and 3, 6, 9 above.
        pool_size: default 512 pixels, 0 = the whole map.

    Raises:
        ConfigError: a dimension or an encoder that cannot be.
    """
    kind = check_norm(norm)
    body = _encoder(encoder, per_branch, rank, last_only=True)
    usual = RATES[8] if body.stride <= 8 else RATES[16] if body.stride <= 16 else (3, 6, 9)
    make = partial(
        DeepLabV3, body.out_channels, hidden=hidden, out_channels=out_channels, rates=rates or usual, norm=kind,
        pool_size=512 // body.stride if pool_size is None else pool_size,
    )  # fmt: skip
    options = {
        "encoder": encoder, "norm": norm, "hidden": hidden, "out_channels": out_channels,
        "rates": None if rates is None else list(rates), "pool_size": pool_size, **_per_branch(per_branch, rank),
    }  # fmt: skip
    return _model("library-deeplabv3", body, make, options)


def segmenter(
    *,
    encoder: Mapping[str, Any],
    hidden: int | None = None,
    stride: int = 16,
    layers: int = 2,
    heads: int | None = None,
    dropout: float = 0.1,
    per_branch: str = "head",
    rank: int | None = None,
) -> SegmentationModel:
    """Build Segmenter's mask transformer, whose classes are tokens, on an encoder of another library.

    The transformer belongs to the head, so each branch has one.

    Args:
        encoder: as for `mlp`; so are `per_branch` and `rank`.
        hidden: width of the transformer; default the channels of the encoder's last map.
        stride: as for `PatchDecoder`.
        layers: blocks of the transformer (published: 2).
        heads: of each block's attention; default one for each 64 channels, at least one.
        dropout: probability in the blocks (published: 0.1).

    Raises:
        ConfigError: a dimension or an encoder that cannot be.
    """
    body = _encoder(encoder, per_branch, rank, last_only=None)
    make = partial(PatchDecoder, body.taps, hidden=hidden, stride=stride)
    options = {
        "encoder": encoder, "hidden": hidden, "stride": stride, "layers": layers, "heads": heads,
        "dropout": dropout, **_per_branch(per_branch, rank),
    }  # fmt: skip
    make_head = partial(TokenHead, layers=layers, heads=heads, dropout=dropout)
    return _model("segmenter", body, make, options, make_head)


DECODERS: dict[str, Callable[..., SegmentationModel]] = {
    "mlp": mlp,
    "deeplabv3": library_deeplabv3,
    "segmenter": segmenter,
}
"""`model.name` -> builder, where there is a `model.encoder`."""


def describe(
    config: ModelConfig, normalisation: Literal["imagenet", "unit"] = "imagenet", in_channels: int = 3
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Turn `model.encoder` into a description, ready for JSON, and its pretrained weights (None = random).

    Pretrained weights expect images with the mean and deviation they were trained with. Where these are known, the
    description's "inputs" converts to them from the run's own `normalisation`. Images of other channels than RGB keep
    the mean and deviation that their data set states.

    Raises:
        ConfigError, CheckpointError: as for the library's `describe` and `load_weights`; `model.weights` where
            the encoder brings its own.
    """
    prefix, sign, name = str(config.encoder).partition(":")
    given, taps = config.options.get("config", {}), config.options.get("taps")
    if not sign or not name or prefix not in ("hf", "timm"):
        raise ConfigError(f"model.encoder: expected {FORM}, got '{config.encoder}'")
    if not isinstance(given, Mapping):
        raise ConfigError(f"model.options: config needs keys and values, got {given!r}")
    state, said, note = None, None, "encoder: random weights"
    if prefix == "hf":
        if config.weights is not None:
            raise ConfigError(
                f"model.weights: '{config.encoder}' takes no file of weights; name a folder with config.json and "
                "model.safetensors, or org/name, as model.encoder=hf:..."
            )
        description, source = from_transformers.describe(
            name, given, taps, download=config.download, channels=in_channels
        )
        if source is not None:
            # A network without values (device "meta") takes nothing but the names of its weights.
            with torch.device("cpu"):
                state, note = from_transformers.load_weights(description, source)
            said = from_transformers.preprocessing(source) if in_channels == 3 else None
    else:
        description = from_timm.describe(name, given, taps, channels=in_channels)
        if config.weights is not None or "." in name:
            with torch.device("cpu"):
                state, note = from_timm.load_weights(
                    description, name, config.weights, download=config.download
                )
            said = from_timm.preprocessing(name) if "." in name and in_channels == 3 else None
    description["inputs"] = None if said is None else _conversion(INPUTS[normalisation], said)
    if description["inputs"] is not None:
        note += f"; inputs converted to its mean {said[0]} and deviation {said[1]}"  # type: ignore[index]
    log.info(note)
    return description, state


def load_body(model: SegmentationModel, state: Mapping[str, Tensor]) -> None:
    """Put pretrained weights into the encoder of a model that has not grown; strict.

    Where branches own norms, those of the model's first growth start from these.

    Raises:
        ConfigError: names that differ.
    """
    body: nn.Module = model.encoder.body  # type: ignore[assignment]
    norms = {
        name: owner
        for name, owner in body.named_modules(remove_duplicate=False)
        if isinstance(owner, BranchLayer) and owner.makes_norms()
    }
    own = {name: [f"{name}.{key}" for key in owner.make().state_dict()] for name, owner in norms.items()}
    shared = body.state_dict().keys()
    if wrong := sorted(state.keys() ^ {*shared, *(key for keys in own.values() for key in keys)}):
        raise ConfigError(f"model.encoder: the weights do not fit the encoder: {some(wrong)}")
    if not any(value.is_meta for value in body.state_dict().values()):
        body.load_state_dict({name: state[name] for name in shared}, strict=True)
    for name, owner in norms.items():
        owner.pretrained = {key.removeprefix(f"{name}."): state[key] for key in own[name]}


def _module(description: Mapping[str, Any]) -> Any:
    """The module that knows the library of a description."""
    modules = {"hf": from_transformers, "timm": from_timm}
    keys = {"library", "type", "config", "taps"}
    if not isinstance(description, Mapping) or not keys <= description.keys() <= keys | {"inputs"}:
        raise ConfigError(
            f"model.options: encoder needs {', '.join(sorted(keys))}; give model.encoder={FORM} instead"
        )
    library = description["library"]
    if not isinstance(library, str) or library not in modules:
        raise ConfigError(f"model.options: encoder: unknown library '{library}'")
    return modules[library]


def _checked_inputs(inputs: Any) -> Mapping[str, list[float]] | None:
    if inputs is None:
        return None
    if not isinstance(inputs, Mapping) or inputs.keys() != {"scale", "shift"}:
        raise ConfigError(f"model.options: encoder: inputs needs scale and shift, got {inputs}")
    for values in inputs.values():
        if (
            not isinstance(values, list)
            or len(values) != 3
            or not all(type(v) in (int, float) for v in values)
        ):
            raise ConfigError(f"model.options: encoder: inputs needs three numbers each, got {values}")
    return inputs


def _encoder(
    description: Mapping[str, Any], per_branch: str, rank: int | None, *, last_only: bool | None
) -> LibraryEncoder:
    choice = check_per_branch(per_branch)
    if rank is not None and choice != "adapter":
        raise ConfigError(
            f"model.options: rank is that of adapters, and per_branch '{choice}' has none; leave it out, or choose "
            "'adapter'"
        )
    return LibraryEncoder(
        description, last_only=last_only, per_branch=choice, rank=RANK if rank is None else rank
    )


def _per_branch(choice: str, rank: int | None) -> dict[str, Any]:
    """What a description says of a branch's parts; the rank only where it was chosen."""
    return {"per_branch": choice, **({} if rank is None else {"rank": rank})}


def _model(
    name: str, encoder: LibraryEncoder, make: Any, options: Mapping[str, Any], make_head: Any = None
) -> SegmentationModel:
    decoder = make() if options["per_branch"] == "head" else BranchDecoder(make)
    if make_head is not None:
        make_head = partial(make_head, decoder.out_channels)
    return SegmentationModel(encoder, decoder, {"name": name, "options": dict(options)}, make_head=make_head)


def _per_resolution(maps: Sequence[Tensor]) -> list[int]:
    """Choose the last map of each size, or all maps where they have one size; at most the last four."""
    last = {map.shape[2]: index for index, map in enumerate(maps)}
    kept = sorted(last.values()) if len(last) > 1 else list(range(len(maps)))
    return kept[-MAX_TAPS:]


def _keep_unused(body: nn.Module, maps: Sequence[Tensor]) -> None:
    """Make buffers of the weights that these maps do not depend on: DDP wants a gradient of every weight."""
    # Walk the autograd graph back from the maps. Its leaves hold the weights that were used, as `variable`.
    seen, reached = set(), set()
    todo = [map.grad_fn for map in maps]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    for module in body.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in reached:
                delattr(module, name)
                module.register_buffer(name, weight.data)


def _conversion(
    given: tuple[Sequence[float], Sequence[float]], wanted: tuple[Sequence[float], Sequence[float]]
) -> dict[str, list[float]] | None:
    """Per channel x * scale + shift, from values (v - mean) / deviation of the first pair to those of the second."""
    # v = x * s1 + m1, and (v - m2) / s2 = x * (s1 / s2) + (m1 - m2) / s2.
    scale = [s1 / s2 for s1, s2 in zip(given[1], wanted[1], strict=True)]
    shift = [(m1 - m2) / s2 for m1, m2, s2 in zip(given[0], wanted[0], wanted[1], strict=True)]
    same = max(abs(v - 1) for v in scale) < 1e-6 and max(map(abs, shift)) < 1e-6
    return None if same else {"scale": scale, "shift": shift}
