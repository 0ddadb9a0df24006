"""Integer confusion counts, gathered on the device that predicts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from everseg.display import counted
from everseg.labels import IGNORED, IGNORED_WIDE, ignored_id
from everseg.metrics import scores

_BLOCK = 2**16
"""Pixels counted at once on the CPU (measured)."""


class ConfusionMatrix:
    """Count pixels by (true class, predicted class).

    Counts are int64 and live on the device of the first update; on CUDA an update never waits for the device.
    Pixels labelled 255 are ignored (65,535 above 255 classes). Any other value outside [0, C), in labels or predictions
    (also predictions under ignored pixels), is an error: raised by the update itself on the CPU, by the next reading of
    the counts elsewhere.

    Source: rows are the truth, as in the authors' code; unlike there, labels out of range raise instead of vanishing.

    >>> matrix = ConfusionMatrix(2)
    >>> matrix.update(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 255]))
    >>> matrix.counts.tolist()
    [[1, 1], [0, 1]]
    >>> matrix.iou(eps=0.0).tolist()
    [0.5, 0.5]
    """

    def __init__(self, num_classes: int, ignored: int | None = None) -> None:
        """Start with no pixel counted.

        Args:
            num_classes: C, in 1..65,534. Tables have C^2 entries of 8 bytes.
            ignored: label of ignored pixels; None = `everseg.labels.ignored_id(C)`.

        Raises:
            ValueError: C outside 1..65,534.
        """
        if not 1 <= num_classes < IGNORED_WIDE:
            raise ValueError(
                f"ConfusionMatrix: num_classes must be in 1..{IGNORED_WIDE - 1}, got {num_classes}"
            )
        self.num_classes = num_classes
        self.ignored = ignored_id(num_classes) if ignored is None else ignored
        # Rows of the internal table: labels below 0, 0..255, above 255. With more classes a row for every label up to
        # 65,535 would be mostly empty: there the row behind the classes is the ignored label's.
        self._last = IGNORED if self.ignored == IGNORED and num_classes <= IGNORED else num_classes
        self._table: Tensor | None = None

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of one batch.

        Args:
            prediction: integer class ids, any shape.
            label: integer train ids of the same shape on the same device; 255 = ignored.

        Raises:
            ValueError: shapes or devices differ, a type is not an integer, or (on the CPU) a value is out of range;
                nothing is counted then.
        """
        if prediction.shape != label.shape or prediction.device != label.device:
            raise ValueError(
                f"ConfusionMatrix: prediction {tuple(prediction.shape)} on {prediction.device} and "
                f"label {tuple(label.shape)} on {label.device} must have the same shape and device"
            )
        for name, tensor in (("prediction", prediction), ("label", label)):
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise ValueError(f"ConfusionMatrix: expected an integer {name}, got {tensor.dtype}")
        # The fast count on the CPU needs predictions that are classes and labels that fit a byte. Labels from C to 254
        # do fit and are still wrong, so the finished table is checked all the same.
        with torch.no_grad():
            if prediction.device.type == "cpu" and self._in_range(prediction, label):
                table = self._count_on_the_cpu(prediction.reshape(-1).numpy(), label.reshape(-1).numpy())
                self._raise_if_out_of_range(table, prediction, label)
            else:
                table = self._count(prediction, label)
                if table.device.type == "cpu":
                    self._raise_if_out_of_range(table, prediction, label)
            # Not in place: the sum may have been started under torch.inference_mode(), whose tensors cannot be changed.
            self._table = table if self._table is None else self._table + table.to(self._table.device)

    @property
    def counts(self) -> Tensor:
        """(C, C) int64: pixels of true class (row) predicted as class (column).

        Raises:
            ValueError: an update off the CPU met values out of range.
        """
        if self._table is None:
            return torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        self._raise_if_out_of_range(self._table)
        return self._classes(self._table).clone()

    @property
    def sums(self) -> Tensor:
        """(3, C) int64 on the device, unchecked: per class the true pixels, the predicted ones, and those both."""
        if self._table is None:
            return torch.zeros(3, self.num_classes, dtype=torch.int64)
        n = self._classes(self._table)
        return torch.stack([n.sum(1), n.sum(0), n.diagonal()])

    def iou(self, eps: float = scores.EPS) -> Tensor:
        """Intersection over union of each class, see `scores.iou`.

        Returns:
            (C,) float64 on the CPU, NaN for classes without a true pixel.
        """
        return torch.from_numpy(scores.iou(self.counts, eps))

    def accuracy(self, eps: float = scores.EPS) -> Tensor:
        """Share of each class's true pixels that were found, see `scores.class_accuracy`.

        Returns:
            (C,) float64 on the CPU, NaN for classes without a true pixel.
        """
        return torch.from_numpy(scores.class_accuracy(self.counts, eps))

    def merge(self, other: ConfusionMatrix | Tensor | np.ndarray) -> None:
        """Add the counts of another matrix, for instance of another process.

        Args:
            other: a matrix of as many classes, or its (C, C) integer counts.

        Raises:
            ValueError: another number of classes, or not integer counts >= 0.
        """
        if isinstance(other, ConfusionMatrix):
            if other.num_classes != self.num_classes:
                raise ValueError(
                    f"ConfusionMatrix: cannot merge {other.num_classes} classes into {self.num_classes}"
                )
            table = other._table
        else:
            array = scores.checked_counts(other)
            if len(array) != self.num_classes:
                raise ValueError(
                    f"ConfusionMatrix: cannot merge {counted(len(array), 'class')} into {self.num_classes}"
                )
            device = other.device if isinstance(other, Tensor) else "cpu"
            table = torch.zeros(self._last + 3, self.num_classes + 2, dtype=torch.int64)
            self._classes(table).copy_(torch.from_numpy(array))
            table = table.to(device)
        if table is not None:
            self._table = table.clone() if self._table is None else self._table + table.to(self._table.device)

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """A new matrix with the counts of both."""
        if not isinstance(other, ConfusionMatrix):
            return NotImplemented
        total = ConfusionMatrix(self.num_classes, self.ignored)
        total.merge(self)
        total.merge(other)
        return total

    def __repr__(self) -> str:
        return f"ConfusionMatrix(num_classes={self.num_classes})"

    def _in_range(self, prediction: Tensor, label: Tensor) -> bool:
        """Whether all predictions are classes and all labels bytes."""
        if self._last != IGNORED or self.num_classes > IGNORED:
            return False
        if not prediction.numel():
            return True
        (least, most), (lowest, highest) = prediction.aminmax(), label.aminmax()
        return bool(least >= 0 and most < self.num_classes and lowest >= 0 and highest <= IGNORED)

    def _count_on_the_cpu(self, prediction: np.ndarray, label: np.ndarray) -> Tensor:
        """Make the table of `_count` for values in range, by blocks whose index stays in the cache."""
        width = self.num_classes + 2
        counts = np.zeros((IGNORED + 3) * width, np.int64)
        index = np.empty(min(_BLOCK, len(label)), np.int64)
        for start in range(0, len(label), _BLOCK):
            rows, columns = label[start : start + _BLOCK], prediction[start : start + _BLOCK]
            block = index[: len(rows)]
            # Index of (label, prediction) in the table, written over the same block: label * width + prediction.
            np.multiply(rows, width, out=block, dtype=np.int64, casting="unsafe")
            np.add(block, columns, out=block, casting="unsafe")
            found = np.bincount(block, minlength=256 * width)
            # One row and one column later: the table's first ones are for values below 0.
            counts[width + 1 : width + 1 + len(found)] += found
        return torch.from_numpy(counts).view(IGNORED + 3, width)

    def _count(self, prediction: Tensor, label: Tensor) -> Tensor:
        """Pixels by label (rows: below 0, 0..255, above 255) and prediction (columns: below 0, 0..C-1, above)."""
        rows = label.reshape(-1).long()
        if self._last != IGNORED:
            rows = torch.where(
                rows == self.ignored, self._last, torch.where(rows == self._last, self._last + 1, rows)
            )
        rows = rows.clamp(-1, self._last + 1)
        columns = prediction.reshape(-1).long().clamp(-1, self.num_classes)
        width = self.num_classes + 2
        index = torch.add(columns, rows, alpha=width).add_(width + 1)
        # Not bincount: on CUDA it waits for the largest index. Integer sums are exact in any order.
        one = torch.ones((), dtype=torch.int64, device=index.device)
        flat = torch.zeros((self._last + 3) * width, dtype=torch.int64, device=index.device)
        return flat.index_add_(0, index, one.expand_as(index)).view(self._last + 3, width)

    def _classes(self, table: Tensor) -> Tensor:
        return table[1 : self.num_classes + 1, 1 : self.num_classes + 1]

    def _raise_if_out_of_range(
        self, table: Tensor, prediction: Tensor | None = None, label: Tensor | None = None
    ) -> None:
        classes = self.num_classes
        # Zero what is allowed; whatever is left was out of range. Labels may also be 255, predictions may not.
        labels, predictions = table.sum(1), table.sum(0)
        labels[1 : classes + 1] = 0
        labels[self._last + 1] = 0
        predictions[1 : classes + 1] = 0
        if not labels.any() and not predictions.any():
            return
        found = []
        for name, counts, values, allowed in (
            ("label", labels, label, f"0..{classes - 1}, or {self.ignored} = ignored"),
            ("prediction", predictions, prediction, f"0..{classes - 1}"),
        ):
            if not counts.any():
                continue
            # An update on the CPU still has the values. Later only the table is left, whose outer rows and columns
            # hold everything beyond.
            if values is None:
                seen = [_name(row - 1, len(counts) - 2) for row in counts.nonzero().flatten().tolist()]
            else:
                bad = (values < 0) | (values >= classes)
                seen = torch.unique(
                    values[bad & (values != self.ignored) if name == "label" else bad]
                ).tolist()
            listed = ", ".join(str(value) for value in seen[:5]) + (", ..." if len(seen) > 5 else "")
            found.append(
                f"{counted(int(counts.sum()), 'pixel', 'has', 'have')} a {name} of {listed}, expected {allowed}"
            )
        raise ValueError("ConfusionMatrix: " + "; ".join(found))


def _name(value: int, last: int) -> str:
    """The value of a row or column of the table; the outer ones hold all values beyond."""
    return "below 0" if value < 0 else f"{last} or more" if value == last else str(value)
