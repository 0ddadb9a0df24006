"""Features in the plane, before | after: PCA and t-SNE as PNG, coloured by class and by domain (floor 6).

matplotlib and scikit-learn (the extra `plot`) are imported where they are used.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from everseg.inference.pictures import palette
from everseg.report.features import Pixels
from everseg.report.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TSNE_PIXELS = 2500
"""t-SNE shows at most so many pixels; its time grows faster than their number."""
_SEED = 0x66656174
_LONGEST_NAME = 24
_LEGEND_WIDTH = 125
"""Letters in a line of the legend."""


@dataclass(frozen=True)
class Projection:
    """Features in the plane."""

    title: str
    before: np.ndarray
    """(Q, 2)."""
    after: np.ndarray
    """(Q, 2), the same pixels."""
    chosen: np.ndarray
    """(Q,) int64, positions of these pixels in `Pixels`."""
    axes: tuple[str, str]
    linear: bool
    """A centre in the plane is the projected centre."""


def pca(pixels: Pixels) -> Projection:
    """The two principal components of the features before; the features after are projected on the same axes."""
    from sklearn.decomposition import PCA

    fitted = PCA(2, random_state=0).fit(pixels.before)
    with np.errstate(invalid="ignore"):
        shares = 100 * np.nan_to_num(fitted.explained_variance_ratio_)
    return Projection(
        "PCA fitted on the features before; large dots: centres, lines: from where they were",
        fitted.transform(pixels.before),
        fitted.transform(pixels.after),
        np.arange(len(pixels.label)),
        (f"component 1 ({shares[0]:.0f} % of the variance)", f"component 2 ({shares[1]:.0f} %)"),
        linear=True,
    )


def tsne(pixels: Pixels, *, seed: int, most: int = TSNE_PIXELS) -> Projection:
    """One t-SNE map of the features before and after together; a function of its arguments.

    Args:
        most: of more pixels than this, as many of every class and domain as fit are shown.
    """
    from sklearn.manifold import TSNE

    groups = [at for _, _, at in pixels.groups()]
    each = max(map(len, groups))
    while each > 1 and sum(min(len(at), each) for at in groups) > most:
        each -= 1
    chosen = np.concatenate([at[:each] for at in groups])
    both = np.concatenate([pixels.before[chosen], pixels.after[chosen]])
    perplexity = min(30.0, (len(both) - 1) / 3)
    flat = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(both)
    before, after = flat[: len(chosen)], flat[len(chosen) :]
    return Projection("t-SNE of both together", before, after, chosen, ("t-SNE 1", "t-SNE 2"), linear=False)


def pictures(pixels: Pixels, *, run: str, steps: tuple[int, int], seed: int) -> dict[str, bytes]:
    """File name -> PNG: both projections coloured by class and, where there are several, by domain.

    Args:
        run: name for the titles.
        steps: before and after.
        seed: of t-SNE.
    """
    colourings = {"class": (pixels.label, pixels.classes, palette(len(pixels.classes)))}
    if len(pixels.domains) > 1:
        colourings["domain"] = (pixels.domain, pixels.domains, palette(len(pixels.domains) + 1)[1:])
    files = {}
    for kind, flat in (("pca", pca(pixels)), ("tsne", tsne(pixels, seed=seed))):
        for what, (groups, names, colours) in colourings.items():
            title = (
                f"{printable(run)}: encoder features of {len(flat.chosen):,} pixels by {what}\n{flat.title}"
            )
            figure = _figure(flat, groups[flat.chosen], names, colours / 255, title, steps)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            files[f"{kind}_{what}.png"] = buffer.getvalue()
    return files


def _figure(
    flat: Projection,
    groups: np.ndarray,
    names: Sequence[str],
    colours: np.ndarray,
    title: str,
    steps: tuple[int, int],
) -> Figure:
    """Two square panels with the same axes and a legend of the groups below.

    Args:
        groups: (Q,) index of each pixel's name and colour.
        colours: one RGB in [0, 1] per name.
    """
    from matplotlib.figure import Figure

    shown = {group: _short(names[group]) for group in np.unique(groups).tolist()}
    columns = min(len(shown), 5, _LEGEND_WIDTH // (max(map(len, shown.values())) + 6))
    figure = Figure(figsize=(12, 7 + 0.28 * -(-len(shown) // columns)), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=15, parse_math=False)
    points = np.concatenate([flat.before, flat.after])
    middle = (points.min(0) + points.max(0)) / 2
    half = 0.53 * max(float(np.ptp(points, axis=0).max()), 1e-6)
    panels: list[Axes] = list(figure.subplots(1, 2))
    for panel, where, step, name in zip(
        panels, (flat.before, flat.after), steps, ("before", "after"), strict=True
    ):
        order = np.random.default_rng(_SEED).permutation(len(where))  # no class lies on top of the others
        x, y = where[order].T
        panel.scatter(x, y, c=colours[groups[order]], s=14, alpha=0.75, linewidths=0)
        if flat.linear:
            _centres(panel, flat.before, where, groups, colours)
        panel.set_title(f"{name}: step {step}", fontsize=14)
        panel.set_xlabel(flat.axes[0], fontsize=12)
        panel.set_ylabel(flat.axes[1], fontsize=12)
        panel.set_xlim(middle[0] - half, middle[0] + half)
        panel.set_ylim(middle[1] - half, middle[1] + half)
        panel.set_box_aspect(1)
        panel.grid(color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    _legend(figure, shown, colours, columns)
    return figure


def _legend(figure: Figure, shown: Mapping[int, str], colours: np.ndarray, columns: int) -> None:
    """A dot and a name per group, below the panels."""
    from matplotlib.lines import Line2D

    dots = [
        Line2D([], [], linestyle="", marker="o", markersize=9, color=tuple(colours[group])) for group in shown
    ]
    legend = figure.legend(
        dots, [str(group) for group in shown], loc="outside lower center", ncols=columns, fontsize=12,
        frameon=False,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), shown.values(), strict=True):
        text.set_text(name)  # afterwards: the library reads a leading "_" and "$" as its own signs
        text.set_parse_math(False)


def _centres(
    panel: Axes, before: np.ndarray, where: np.ndarray, groups: np.ndarray, colours: np.ndarray
) -> None:
    """Mark every group's centre, with a line from where it was before."""
    for group in np.unique(groups).tolist():
        start, end = before[groups == group].mean(0), where[groups == group].mean(0)
        panel.plot(*np.stack([start, end]).T, color="black", linewidth=1.2)
        panel.plot(
            *end, marker="o", markersize=10, color=tuple(colours[group]), markeredgecolor="black", zorder=5
        )


def _short(name: str) -> str:
    clean = printable(name)
    return clean if len(clean) <= _LONGEST_NAME else clean[: _LONGEST_NAME - 3] + "..."
