"""Losses as pure functions of tensors at equal resolution, and their evaluation from small logits."""

from everseg.losses.attention import attention_distance
from everseg.losses.background_shift import (
    moved_distillation,
    old_share,
    token_orthogonality,
    weighted_feature_distance,
    without_doubted,
)
from everseg.losses.banded import Term, pixelwise_losses
from everseg.losses.classification import (
    binary_cross_entropy,
    binary_negatives,
    cross_entropy,
    focal,
    icarl,
    icarl_distillation,
    unbiased_cross_entropy,
)
from everseg.losses.decomposed import decomposed_distillation, decomposed_logits
from everseg.losses.distillation import distillation, kl_divergence, unbiased_distillation
from everseg.losses.features import feature_distillation
from everseg.losses.pixelwise import upsample
from everseg.losses.pod import local_pod
from everseg.losses.pooled_cube import pooled_cube_distillation
from everseg.losses.pseudo import (
    PseudoLabels,
    accepted_share,
    completed_labels,
    pseudo_labels,
    soft_uncertain,
    uncertainty,
)
from everseg.losses.replayed import replayed_cross_entropy
from everseg.losses.residual import (
    adapted_logits,
    label_cells,
    masked_feature_distance,
    residual_margin,
    residual_negatives,
)
from everseg.losses.similarity import class_similarity, class_sums, similarity_distillation
from everseg.losses.thresholds import certainty_histogram, histogram_thresholds

__all__ = [
    "PseudoLabels",
    "Term",
    "accepted_share",
    "adapted_logits",
    "attention_distance",
    "binary_cross_entropy",
    "binary_negatives",
    "certainty_histogram",
    "class_similarity",
    "class_sums",
    "completed_labels",
    "cross_entropy",
    "decomposed_distillation",
    "decomposed_logits",
    "distillation",
    "feature_distillation",
    "focal",
    "histogram_thresholds",
    "icarl",
    "icarl_distillation",
    "kl_divergence",
    "label_cells",
    "local_pod",
    "masked_feature_distance",
    "moved_distillation",
    "old_share",
    "pixelwise_losses",
    "pooled_cube_distillation",
    "pseudo_labels",
    "replayed_cross_entropy",
    "residual_margin",
    "residual_negatives",
    "similarity_distillation",
    "soft_uncertain",
    "token_orthogonality",
    "unbiased_cross_entropy",
    "unbiased_distillation",
    "uncertainty",
    "upsample",
    "weighted_feature_distance",
    "without_doubted",
]
