"""Cutting one set of images into splits, and reading `split: {val: 0.2, seed: 0}` (floor 2)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everseg.errors import near_miss


@dataclass(frozen=True)
class Division:
    """Shares of the images that are held out; the rest is `train`."""

    val: float = 0.2
    test: float = 0.0
    seed: int = 0

    def parts(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Positions of each split's samples.

        Where a sample goes depends on the seed and its own name only: samples that are added or left out move no
        other. The shares are therefore met on average. `train` and `val` get one sample each if there are two.
        """
        draws = [_draw(self.seed, name) for name in names]
        parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        for position, draw in enumerate(draws):
            held_out = "val" if draw < self.val else "test" if draw < self.val + self.test else "train"
            parts[held_out].append(position)
        if len(names) > 1:
            for empty, full in (("val", "train"), ("train", "val")):
                if not parts[empty] and parts[full] and (empty == "train" or self.val):
                    parts[empty].append(parts[full].pop())
        return {name: positions for name, positions in parts.items() if positions or name == "train"}


def division_of(given: Any) -> tuple[Division | None, list[str]]:
    """Check a `split` key.

    Returns:
        The division, None if there is none or it is wrong, and what is wrong.
    """
    if given is None:
        return None, []
    if not isinstance(given, Mapping):
        return None, [f"split: expected shares such as {{val: 0.2, seed: 0}}, got {given!r}"]
    known = ("val", "test", "seed")
    problems = [f"split.{key}: unknown key{near_miss(key, known)}" for key in given if key not in known]
    shares = {key: given.get(key, getattr(Division, key)) for key in ("val", "test")}
    for key, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            problems.append(f"split.{key}: expected a share from 0 to below 1, got {share!r}")
    seed = given.get("seed", 0)
    if type(seed) is not int:
        problems.append(f"split.seed: expected a whole number, got {seed!r}")
    if not problems and sum(shares.values()) >= 1:
        problems.append("split: val and test together leave nothing for train")
    return (None, problems) if problems else (Division(shares["val"], shares["test"], seed), [])


def _draw(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on seed and name only."""
    text = f"{seed}:{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
