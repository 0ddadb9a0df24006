"""What a method hands to the engine for each update, checked at the first batch: loss terms, and scalars to log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real

import torch
from torch import Tensor

from everseg.errors import ConfigError, some
from everseg.types import LossTerms


class Updates:
    """What a method's `losses` yields for one part of a batch, checked before it is used."""

    def __init__(self, yielded: object, method: str) -> None:
        if not isinstance(yielded, Iterable):
            raise ConfigError(_not_terms(method, yielded))
        self._yielded = iter(yielded)
        self._method = method
        self._started = False

    def next(self) -> LossTerms | None:
        """Return the terms of the next update; None after the last one.

        Raises:
            ConfigError: there is no update at all, or it is no dict of scalar tensors.
        """
        try:
            terms = next(self._yielded)
        except StopIteration as end:
            if self._started:
                return None
            returned = "" if end.value is None else f"; it returned {type(end.value).__name__}"
            raise ConfigError(
                f"method '{self._method}': losses yielded no loss terms, so there is nothing to train{returned}. "
                "In a function with `yield`, `return` yields nothing: write `yield {...}` on every way through it"
            ) from None
        self._started = True
        if not isinstance(terms, dict):
            raise ConfigError(_not_terms(self._method, terms))
        if not terms:
            raise ConfigError(
                f"method '{self._method}': losses yielded an empty dict; an update needs one loss term at least"
            )
        wrong = [f"'{name}' is {_described(value)}" for name, value in terms.items() if not _is_scalar(value)]
        if wrong:
            raise ConfigError(
                f"method '{self._method}': loss terms must be scalar tensors, but {some(wrong, 5)}; reduce each to one "
                "number per batch (mean() or sum()) and keep it a tensor, so that it has a gradient"
            )
        if not any(value.requires_grad for value in terms.values()):
            raise ConfigError(
                f"method '{self._method}': no loss term ({some(list(map(str, terms)), 5)}) has a gradient, so nothing "
                "would be trained; compute one from the student's output, without detach() or no_grad()"
            )
        return terms


def _not_terms(method: str, got: object) -> str:
    return (
        f"method '{method}': losses must yield dicts of loss terms, got {type(got).__name__} "
        "(`yield {...}`, not `return`)"
    )


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"


def scalars_of(values: object, method: str, hook: str = "after_backward") -> dict[str, Tensor]:
    """Give the scalars that a hook returned as tensors; numbers are taken as well, None is no scalar.

    Raises:
        ConfigError: not a mapping of names to single numbers.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"method '{method}': {hook} must return a dict of scalars to log, got {type(values).__name__}"
        )
    scalars: dict[str, Tensor] = {}
    wrong = []
    for name, value in values.items():
        if isinstance(value, Tensor) and value.dim() == 0:
            scalars[name] = value
        elif isinstance(value, Real):
            scalars[name] = torch.tensor(float(value))
        else:
            wrong.append(f"'{name}' is {_described(value)}")
    if wrong:
        raise ConfigError(
            f"method '{method}': {hook} must return scalars to log, but {some(wrong, 5)}; give single numbers"
        )
    return scalars
