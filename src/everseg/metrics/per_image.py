"""Scores of each image on its own, and their mean, median and lowest value over the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from everseg.metrics.bootstrap import defined_means

WORST = 10
"""Number of images that are named as the worst."""


def image_scores(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and Dice of each class in each image.

    Args:
        images: (N, 3, C) integers: per image and class the true pixels, the predicted ones, and those that are both.

    Returns:
        Two arrays (N, C) in [0, 1]; NaN where the image has no true pixel of the class, also if it is predicted there.

    >>> iou, dice = image_scores(np.array([[[4, 0], [3, 1], [3, 0]]]))
    >>> iou.tolist(), dice.round(3).tolist()
    ([[0.75, nan]], [[0.857, nan]])
    """
    truth, predicted, both = np.asarray(images).astype(np.int64).transpose(1, 0, 2)
    present = truth > 0
    total = np.where(present, truth + predicted, 1)
    iou = np.where(present, both / np.where(present, total - both, 1), np.nan)
    return iou, np.where(present, 2 * both / total, np.nan)


def image_statistics(images: np.ndarray, names: Sequence[str] = (), *, worst: int = WORST) -> dict[str, Any]:
    """Summarise the scores of single images. They weigh each image alike; counts over a data set weigh each pixel.

    Args:
        images: (N, 3, C) integers, as in `image_scores`. Ignored pixels are in none of the counts.
        names: the images' names, in order; () = their positions.
        worst: number of worst images to name.

    Returns:
        Ready for JSON, floats in [0, 1] or None where no image decides:

        * `iou` and `dice`: `mean`, `median` and `lowest` over the images of an image's mean over its classes. These are
          the classes with true pixels in it, the background among them.
        * `class_iou` and `class_dice`: the same three, each a list with one value per class, over the images that show
          the class.
        * `images`: number of images; `class_images`: of those that show each class; `class_false_alarms`: of those that
          do not show it and in which pixels are called so.
        * `worst`: the images with the lowest IoU, worst first: `image`, `iou`, `dice`.

    Raises:
        ValueError: not (N, 3, C), or another number of names.

    >>> two = np.array([[[4, 4], [4, 4], [4, 4]], [[8, 0], [4, 4], [4, 0]]])
    >>> found = image_statistics(two, ["a", "b"])
    >>> found["iou"], found["class_false_alarms"], found["worst"][0]["image"]
    ({'mean': 0.75, 'median': 0.75, 'lowest': 0.5}, [0, 1], 'b')
    """
    images = np.asarray(images)
    if images.ndim != 3 or images.shape[1] != 3 or (len(names) not in (0, len(images))):
        raise ValueError(
            f"image_statistics: expected counts (N, 3, C) and N names or none, got {images.shape} and {len(names)}"
        )
    truth, predicted = images[:, 0] > 0, images[:, 1] > 0
    iou, dice = image_scores(images)
    each = {"iou": defined_means(iou), "dice": defined_means(dice)}
    order = np.argsort(each["iou"], kind="stable")  # images without a labelled pixel are NaN, and come last
    order = order[~np.isnan(each["iou"][order])][:worst]
    return {
        "images": len(images),
        **{key: _three(values) for key, values in each.items()},
        **{
            f"class_{key}": {
                name: [_three(column)[name] for column in values.T] for name in ("mean", "median", "lowest")
            }
            for key, values in (("iou", iou), ("dice", dice))
        },
        "class_images": truth.sum(0).tolist(),
        "class_false_alarms": (~truth & predicted).sum(0).tolist(),
        "worst": [
            {
                "image": names[i] if len(names) else str(i),
                "iou": float(each["iou"][i]),
                "dice": float(each["dice"][i]),
            }
            for i in order.tolist()
        ],
    }


def _three(values: np.ndarray) -> dict[str, float | None]:
    known = values[~np.isnan(values)]
    if not len(known):
        return {"mean": None, "median": None, "lowest": None}
    return {"mean": float(known.mean()), "median": float(np.median(known)), "lowest": float(known.min())}
