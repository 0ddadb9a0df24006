"""Class weights of the cross-entropy, from the pixels of each class or as published."""

from __future__ import annotations

from importlib import resources

import numpy as np
import yaml

from everseg.data.base import Dataset
from everseg.data.batches.index import class_counts
from everseg.data.batches.parallel import Progress
from everseg.errors import ConfigError, DataError
from everseg.labels import RawLabels

CONSTANT = 1.1
"""Bounds the weights of rare classes: 1/ln(1.1) = 10.49."""
ENCODER_CONSTANT = 1.2
"""The same where ERFNet's encoder is trained alone: 1/ln(1.2) = 5.48."""


def class_weights(pixels: np.ndarray, constant: float = CONSTANT) -> np.ndarray:
    """Weigh rare classes more: w_c = 1 / ln(constant + p_c), p_c = (pixels_c + 1) / sum(pixels + 1).

    Args:
        pixels: (C+1,) counts of the classes in output order, void last; void is one more class in the sum.
        constant: > 1.

    Returns:
        (C+1,) float64, the weight of void 0.

    Raises:
        ValueError: no class beside void, a negative or non-finite count, or a constant that makes no weight.

    Source: ENet (Paszke et al., 2016), section 5.2; as ERFNet and MDIL (Garg et al., WACV 2022) use it.
    """
    counts = np.asarray(pixels, np.float64)
    if counts.ndim != 1 or counts.size < 2:
        raise ValueError(f"expected counts of at least one class and void, got shape {counts.shape}")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"pixel counts must be finite and not negative, got {counts}")
    if not constant > 1:
        raise ValueError(f"the constant must be above 1, got {constant}")
    # Void counts in the sum, but the weight of its own output is 0.
    share = (counts + 1) / (counts + 1).sum()
    weights = 1 / np.log(constant + share)
    weights[-1] = 0
    return weights


def output_order(labels: RawLabels) -> tuple[int, ...]:
    """Raw ids in the output order of a model that learns all classes at once: background, if any, then classes."""
    first = () if labels.background is None else (labels.background,)
    return (*first, *labels.classes)


def dataset_pixels(
    dataset: Dataset, split: str = "train", *, workers: int | None = None, progress: Progress | None = None
) -> np.ndarray:
    """Count the pixels of every class of a split, through the cached class index.

    Args:
        dataset: its masks are counted as they are, before any resizing.
        split: name.
        workers: processes; None = all cores.
        progress: called with (done, total) while masks are read; not called if the cache serves.

    Returns:
        (C+1,) int64 in the order of `output_order`, all void ids together last.

    Raises:
        DataError: no such split, or faulty masks.
    """
    if split not in dataset.splits:
        raise DataError(
            f"data set '{dataset.name}' has no split '{split}'; it has {', '.join(dataset.splits)}"
        )
    counts = class_counts(dataset.splits[split], dataset.labels, workers=workers, progress=progress)
    total = counts.sum(axis=0, dtype=np.int64)
    void = total[list(dataset.labels.void)].sum()
    return np.append(total[list(output_order(dataset.labels))], void)


def published_weights(dataset_name: str) -> dict[str, float]:
    """Look up the weights MDIL was trained with.

    Args:
        dataset_name: "cityscapes", "bdd100k" or "idd".

    Returns:
        Class name -> weight, without void (0).

    Raises:
        ConfigError: none are published for this data set.
    """
    text = (
        resources.files("everseg.data").joinpath("tables/published_weights.yaml").read_text(encoding="utf-8")
    )
    table: dict[str, dict[str, float]] = yaml.safe_load(text)
    if dataset_name not in table:
        raise ConfigError(
            f"scenario.class_weights: none are published for data set '{dataset_name}' (only for"
            f" {', '.join(table)}); use class_weights=computed"
        )
    return table[dataset_name]
