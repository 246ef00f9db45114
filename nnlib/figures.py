"""Figures that look the same in every chapter and read on light and on dark pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsFloat

import matplotlib as mpl
import matplotlib.pyplot as plt
import matplotlib.ticker as mticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

# Each has a contrast of 3 or more on white and on the dark theme, and they stay apart for colour-blind readers.
PALETTE = {
    "blue": "#3f98d8",
    "orange": "#df790a",
    "green": "#1fa47a",
    "purple": "#a1518e",
    "red": "#c0372c",
    "indigo": "#6666df",
}
INK = "#808080"  # a grey with about the same contrast on white and on the dark theme
WIDTH, HEIGHT = 4.2, 3.1  # inches of one panel


def use_style() -> None:
    """Set Matplotlib's defaults: transparent ground, grey axes, the palette, sizes for a page 700 pixels wide."""
    mpl.rcParams.update(
        {
            "figure.figsize": (1.4 * WIDTH, HEIGHT),
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "figure.dpi": 120,
            "savefig.dpi": 120,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": mpl.cycler(color=list(PALETTE.values())),
            "lines.linewidth": 2.0,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "svg.hashsalt": "nnlib",
        }
    )


def panels(columns: int = 1, rows: int = 1, **keywords: object) -> tuple[Figure, Axes | np.ndarray]:
    """A figure of equal panels; `axes` is one `Axes` if there is one panel, otherwise an array of them."""
    width = 1.4 * WIDTH if columns == 1 else WIDTH * columns
    return plt.subplots(rows, columns, figsize=(width, HEIGHT * rows), **keywords)


def band(
    ax: Axes,
    x: Iterable[SupportsFloat],
    runs: Iterable[Any],
    *,
    label: str,
    color: str,
    percent: tuple[SupportsFloat, SupportsFloat] = (10, 90),
) -> None:
    """Draw the median of many runs as a line, and a band between two percentiles.

    Parameters
    ----------
    x : (points,).
    runs : (runs, points).
    percent : lower and upper percentile of the band.

    Raises
    ------
    ValueError : `runs` is not (runs, points) with as many points as `x`.
    """
    x, runs = np.asarray(x), np.asarray(runs)
    if runs.ndim != 2 or runs.shape[1] != len(x):
        raise ValueError(f"runs must have shape (runs, {len(x)}), got {runs.shape}")
    low, middle, high = np.percentile(runs, [percent[0], 50, percent[1]], axis=0)
    ax.plot(x, middle, color=color, label=label)
    ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def theory(
    ax: Axes, x: Iterable[SupportsFloat], y: Iterable[SupportsFloat], label: str = "theory"
) -> None:
    """Draw what the paper or the mathematics predicts: a thin dashed grey line, above the data."""
    ax.plot(x, y, color=INK, linestyle="--", linewidth=1.4, zorder=5, label=label)


def log_ticks(axis: Axis, values: Iterable[float]) -> None:
    """Label a logarithmic axis at just these values, as plain numbers; `axis` is `ax.xaxis` or `ax.yaxis`."""
    axis.set_major_locator(mticker.FixedLocator(list(values)))
    axis.set_major_formatter(mticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(mticker.NullLocator())
