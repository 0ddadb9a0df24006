"""A segmentation network of the transformers library as one encoder, its classifier taken out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from everseg.errors import CheckpointError, ConfigError, first_line
from everseg.models.adapters.elsewhere import from_elsewhere
from everseg.models.blocks import BatchNorm
from everseg.models.model import SegmentationModel
from everseg.models.resnet import ResNet
from everseg.models.stored import no_network


class WholeNetwork(nn.Module):
    """A network whose last layer, the classifier, is left out.

    Args:
        network: maps (B, 3, H, W) to an object with `logits`, here the classifier's input (B, C, h, w).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Map (B, 3, H, W) to {"network": (B, C, h, w)}."""
        return {"network": self.network(pixel_values=image).logits}


class _AsItIs(nn.Module):
    """A decoder that adds nothing."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """The tap "encoder"."""
        return features["encoder"]


def transformers_network(*, config: Mapping[str, Any], classifier: str, channels: int) -> SegmentationModel:
    """Build a semantic-segmentation network of the transformers library; it has no outputs until it is grown.

    Nothing is downloaded and no code outside the library is run.

    Args:
        config: the library's configuration, as its config.json holds it.
        classifier: name of the 1x1 convolution that gives the logits, or of a module that does nothing beside it;
            everseg's growing classifiers replace it.
        channels: channels of its input.

    Raises:
        ConfigError: the library is missing, or does not know the configuration.
    """
    network = build_network(config)
    parent, _, name = classifier.rpartition(".")
    # With the classifier gone, the network's `logits` are the classifier's input.
    setattr(network.get_submodule(parent), name, nn.Identity())
    options = {"config": dict(config), "classifier": classifier, "channels": channels}
    return SegmentationModel(
        WholeNetwork(network), _AsItIs(channels), {"name": "transformers", "options": options}
    )


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """The network of a configuration with fresh weights.

    Raises:
        ConfigError: as `transformers_network`.
    """
    library = transformers_library()
    if found := from_elsewhere(config):
        raise ConfigError(
            f"this configuration fetches a part or runs code from elsewhere ({', '.join(found)}); give one that holds "
            "the whole network (backbone_config instead of backbone)"
        )
    try:
        with no_network():
            known = library.AutoConfig.for_model(**_known_entries(library, config))
            return library.AutoModelForSemanticSegmentation.from_config(known, trust_remote_code=False)
    except CheckpointError:  # more than its weights hold
        raise
    except Exception as error:  # the library raises nearly anything
        raise ConfigError(
            "transformers cannot build a semantic-segmentation network of this configuration: "
            f"{first_line(error)}"
        ) from error


def _known_entries(library: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a configuration of its type has, and those of the configurations in it that name their type.

    Others are left out: the network does not know them, and the library may act on them.
    """
    default = library.AutoConfig.for_model(str(config.get("model_type"))).to_dict()
    known = {*default, *library.PretrainedConfig().to_dict(), "model_type"}
    return {
        key: _known_entries(library, value) if isinstance(value, Mapping) and "model_type" in value else value
        for key, value in config.items()
        if key in known
    }


def transformers_library() -> Any:
    """Import the library when it is first needed.

    Raises:
        ConfigError: it is not there.
    """
    try:
        import transformers
    except Exception as error:  # a broken installation raises nearly anything
        raise ConfigError(
            f"this model needs the transformers library ({type(error).__name__}): pip install 'everseg[hf]'"
        ) from None
    return transformers


@dataclass(frozen=True)
class Classifier:
    """A layer that may give a network's logits."""

    layer: str
    """Name of the 1x1 convolution."""
    place: str
    """Name of what is taken out: the layer, or the outermost module that does nothing beside it."""
    channels: int
    """Of the layer's input."""


@torch.no_grad()
def find_classifiers(network: nn.Module, image: Tensor, outputs: int) -> list[Classifier]:
    """Locate the layers that may give the logits: 1x1 convolutions of a forward pass with that many outputs.

    An auxiliary head has such a layer too, and may run last. Which one it is shows only when it is taken out.

    Args:
        network: in eval mode.
        image: (1, 3, H, W).
        outputs: number of classes.

    Returns:
        The one that ran last first.

    Raises:
        ConfigError: there is none.
    """
    layers = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.out_channels == outputs
    ]
    around = {".".join(name.split(".")[:k]) for name in layers for k in range(1, name.count(".") + 2)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with _watching(network, around, seen):
        network(pixel_values=image)
    found = []
    for name in reversed([name for name in seen if name in layers]):
        place = name
        while (parent := place.rpartition(".")[0]) in seen and all(
            map(torch.equal, seen[parent], seen[name])
        ):
            place = parent
        found.append(Classifier(name, place, cast(nn.Conv2d, network.get_submodule(name)).in_channels))
    if not found:
        raise ConfigError(
            f"the network has no 1x1 convolution with {outputs} outputs at its end, so its classifier cannot grow; "
            "SegFormer and UPerNet have one"
        )
    return found


@contextlib.contextmanager
def _watching(network: nn.Module, names: set[str], seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Note what goes into these modules and what comes out, in the order in which they end."""

    def note(name: str) -> Any:
        def hook(_module: nn.Module, given: Any, output: Any) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                seen[name] = (given[0], output)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in sorted(names)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


RATES = (12, 24, 36)
"""Dilations at output stride 8 (the paper's; everseg's own DeepLabV3 follows MiB's code)."""


class _Stack(nn.Sequential):
    """A decoder of layers in a row, named by their number."""

    def __init__(self, out_channels: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.out_channels = out_channels

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Map the tap "encoder" (B, C, h, w) to (B, out_channels, h, w)."""
        return super().forward(features["encoder"])


class _Pooled(nn.Sequential):
    """The mean of the whole map, through a convolution, at every cell."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, hidden, h, w)."""
        return super().forward(input).expand(-1, -1, *input.shape[2:])


class _Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: side by side, concatenated, projected."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        dilated = [_layers(channels, hidden, 3, rate) for rate in RATES]
        pooled = _Pooled(nn.AdaptiveAvgPool2d(1), *_layers(channels, hidden, 1))
        self.convs = nn.ModuleList([_layers(channels, hidden, 1), *dilated, pooled])
        self.project = nn.Sequential(*_layers(5 * hidden, hidden, 1), nn.Dropout(0.5))

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, hidden, h, w)."""
        # (B, 5 * hidden, h, w) before the projection.
        return self.project(torch.cat([conv(input) for conv in self.convs], dim=1))


def _layers(channels: int, out: int, size: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation if size == 3 else 0
    conv = nn.Conv2d(channels, out, size, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, BatchNorm(out), nn.ReLU())


def torchvision_deeplabv3(
    *,
    blocks: Sequence[int] = (3, 4, 6, 3),
    stem: int = 64,
    widths: Sequence[int] = (64, 128, 256, 512),
    outputs: Sequence[int] | None = None,
    hidden: int = 256,
) -> SegmentationModel:
    """Build torchvision's DeepLabV3 on a ResNet of bottlenecks, output stride 8; no outputs until it is grown.

    Args:
        blocks: of each stage; 3, 4, 6, 3 for ResNet-50 and 3, 4, 23, 3 for ResNet-101.
        stem: as for `ResNet`; so are `widths` and `outputs`.
        hidden: channels of the pyramid and of the map before the classifiers.

    Source: Chen et al., "Rethinking Atrous Convolution" (2017), as torchvision builds it.
    """
    encoder, options = _encoder(blocks, stem, widths, outputs)
    decoder = _Stack(hidden, _Pyramid(encoder.out_channels, hidden), *_layers(hidden, hidden, 3))
    return SegmentationModel(
        encoder, decoder, {"name": "torchvision-deeplabv3", "options": {**options, "hidden": hidden}}
    )


def torchvision_fcn(
    *,
    blocks: Sequence[int] = (3, 4, 6, 3),
    stem: int = 64,
    widths: Sequence[int] = (64, 128, 256, 512),
    outputs: Sequence[int] | None = None,
    hidden: int = 512,
) -> SegmentationModel:
    """Build torchvision's FCN on a ResNet of bottlenecks at output stride 8; options as for its DeepLabV3.

    Source: Long et al., "Fully Convolutional Networks", CVPR 2015, as torchvision builds it.
    """
    encoder, options = _encoder(blocks, stem, widths, outputs)
    decoder = _Stack(hidden, *_layers(encoder.out_channels, hidden, 3), nn.Dropout(0.1))
    return SegmentationModel(
        encoder, decoder, {"name": "torchvision-fcn", "options": {**options, "hidden": hidden}}
    )


def _encoder(
    blocks: Sequence[int], stem: int, widths: Sequence[int], outputs: Sequence[int] | None
) -> tuple[ResNet, dict[str, Any]]:
    encoder = ResNet(
        blocks, stem=stem, widths=widths, outputs=outputs, output_stride=8, norm="bn", late_dilation=True
    )
    options = {
        "blocks": list(blocks), "stem": stem, "widths": list(widths),
        "outputs": None if outputs is None else list(outputs),
    }  # fmt: skip
    return encoder, options
