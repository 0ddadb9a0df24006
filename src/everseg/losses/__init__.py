"""Losses as pure functions of tensors at equal resolution (floor 1)."""

from everseg.losses.classification import (
    binary_cross_entropy,
    cross_entropy,
    focal,
    icarl,
    icarl_distillation,
    unbiased_cross_entropy,
)
from everseg.losses.distillation import distillation, kl_divergence, unbiased_distillation
from everseg.losses.features import feature_distillation
from everseg.losses.pixelwise import upsample

__all__ = [
    "binary_cross_entropy",
    "cross_entropy",
    "distillation",
    "feature_distillation",
    "focal",
    "icarl",
    "icarl_distillation",
    "kl_divergence",
    "unbiased_cross_entropy",
    "unbiased_distillation",
    "upsample",
]
