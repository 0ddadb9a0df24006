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
from everseg.metrics.confusion import ConfusionMatrix
from everseg.metrics.continual import (
    defined_mean,
    first_last_scores,
    relative_drop,
    sequence_scores,
    step_scores,
)
from everseg.metrics.scores import (
    class_accuracy,
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
    "class_accuracy",
    "defined_mean",
    "defined_means",
    "false_share",
    "first_last_scores",
    "frequency_weighted_iou",
    "group_miou",
    "interval",
    "iou",
    "iou_eval",
    "iou_of_sums",
    "mean_accuracy",
    "mean_iou",
    "overall_accuracy",
    "relative_drop",
    "resampled_sums",
    "sequence_scores",
    "step_scores",
    "sums_of",
]
