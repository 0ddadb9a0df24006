"""Integer confusion counts and the scores derived from them."""

from everseg.metrics.bootstrap import (
    LEVEL,
    RESAMPLES,
    defined_means,
    group_miou,
    interval,
    resampled_sums,
    sums_of,
)
from everseg.metrics.boundary import boundary_region, boundary_sums, boundary_width
from everseg.metrics.confusion import ConfusionMatrix
from everseg.metrics.continual import (
    boundary_scores,
    class_spans,
    defined_mean,
    first_last_scores,
    named_groups,
    relative_drop,
    sequence_scores,
    step_scores,
)
from everseg.metrics.per_image import image_scores, image_statistics
from everseg.metrics.scores import (
    class_accuracy,
    dice,
    false_share,
    frequency_weighted_iou,
    iou,
    iou_eval,
    iou_of_sums,
    mean_accuracy,
    mean_iou,
    overall_accuracy,
)

__all__ = [
    "LEVEL",
    "RESAMPLES",
    "ConfusionMatrix",
    "boundary_region",
    "boundary_scores",
    "boundary_sums",
    "boundary_width",
    "class_accuracy",
    "class_spans",
    "defined_mean",
    "defined_means",
    "dice",
    "false_share",
    "first_last_scores",
    "frequency_weighted_iou",
    "group_miou",
    "image_scores",
    "image_statistics",
    "interval",
    "iou",
    "iou_eval",
    "iou_of_sums",
    "mean_accuracy",
    "mean_iou",
    "named_groups",
    "overall_accuracy",
    "relative_drop",
    "resampled_sums",
    "sequence_scores",
    "step_scores",
    "sums_of",
]
