"""Losses as pure functions of tensors at equal resolution, and their evaluation from small logits."""

from everseg.losses.banded import Term, pixelwise_losses
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
from everseg.losses.pooled_cube import pooled_cube_distillation

__all__ = [
    "Term",
    "binary_cross_entropy",
    "cross_entropy",
    "distillation",
    "feature_distillation",
    "focal",
    "icarl",
    "icarl_distillation",
    "kl_divergence",
    "pixelwise_losses",
    "pooled_cube_distillation",
    "unbiased_cross_entropy",
    "unbiased_distillation",
    "upsample",
]
