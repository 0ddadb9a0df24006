"""Parameter groups with a learning rate by part and depth of the network, and weight decay for matrices alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from everseg.config.fields import LrFactors, TrainConfig
from everseg.errors import ConfigError
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Step

Groups = list[dict[str, Any]]


def split_by_rate(groups: Groups, model: SegmentationModel, step: Step, train: TrainConfig) -> Groups:
    """Split a method's parameter groups by what the configuration asks for.

    The factors of `train.lr_factors` and `train.layer_decay` multiply the "lr_scale" of the method's group, so a method
    that slows down the shared weights still does. Without `train.decay_norms`, weights of one dimension (norms, biases,
    scales of layers) come into groups with a "weight_decay" of 0.

    Returns:
        Groups with the weights in the order of the method's groups. Those that were given where nothing is asked for.

    Raises:
        ConfigError: `train.layer_decay` for an encoder that does not say what its layers are.
    """
    if train.lr_factors == LrFactors() and train.layer_decay in (None, 1) and train.decay_norms:
        return groups
    factors = rate_factors(model, step, train)
    split: Groups = []
    for group in groups:
        # Weights of equal factor and decay share a group; dicts keep the order in which these were met.
        parts: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for weight in group["params"]:
            decays = train.decay_norms or weight.ndim > 1
            parts.setdefault((factors[id(weight)], decays), []).append(weight)
        for (factor, decays), weights in parts.items():
            scale = group.get("lr_scale", 1.0) * factor
            split.append(
                {**group, "params": weights, "lr_scale": scale, **({} if decays else {"weight_decay": 0.0})}
            )
    return split


def rate_factors(model: SegmentationModel, step: Step, train: TrainConfig) -> dict[int, float]:
    """Compute the factor on the learning rate of every weight.

    With L layers, layer k of the encoder (1 = stem, L = last) has `lr_factors.encoder` * `layer_decay` ** (L + 1 - k):
    the decoder is as far from the last layer as that is from the one before (Bao et al., "BEiT", ICLR 2022).

    Returns:
        `id` of the weight -> factor: tensors compare by value and cannot be keys.

    Raises:
        ConfigError: `train.layer_decay` for an encoder that does not say what its layers are.
    """
    chosen = train.lr_factors
    found = {id(weight): chosen.encoder for weight in model.encoder.parameters()}
    found |= {id(weight): chosen.decoder for weight in model.decoder.parameters()}
    old, new = chosen.old_heads or chosen.heads, chosen.new_heads or chosen.heads
    found |= {id(weight): old for weight in model.heads.parameters()}
    for branch, number in step.grows.items():
        if number:  # the classifier of the last growth is the one that this step has added
            found |= {id(weight): new for weight in model.head(branch).classifiers[-1].parameters()}
    if train.layer_decay is not None:
        layers = encoder_layers(model.encoder)
        for k, layer in enumerate(layers, 1):
            factor = chosen.encoder * train.layer_decay ** (len(layers) + 1 - k)
            found |= {id(weight): factor for weight in layer}
    return found


def encoder_layers(encoder: nn.Module) -> list[list[nn.Parameter]]:
    """Return the weights of an encoder's layers, from the image on, as its `parameter_layers` says.

    Raises:
        ConfigError: it has no such method, or leaves weights out.
    """
    read = getattr(encoder, "parameter_layers", None)
    if read is None:
        raise ConfigError(
            f"train.layer_decay: the encoder {type(encoder).__name__} does not say what its layers are; give it a "
            "method parameter_layers() that returns the weights of each layer, or leave train.layer_decay out"
        )
    layers = cast(Callable[[], list[list[nn.Parameter]]], read)()
    known = {id(weight) for layer in layers for weight in layer}
    missing = [name for name, weight in encoder.named_parameters() if id(weight) not in known]
    if missing:
        raise ConfigError(
            f"train.layer_decay: parameter_layers() of the encoder {type(encoder).__name__} leaves out {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return layers
