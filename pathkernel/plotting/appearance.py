"""Appearance of every figure: colours told apart by all readers, sizes legible in a report, room on a page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec, SubplotSpec

from pathkernel.errors import PathKernelError

# Okabe and Ito's palette (2008), distinct under every common colour-vision deficiency.
RAISES = "#0072B2"  # a share that raised the output
LOWERS = "#D55E00"  # a share that lowered it
TASK = "#009E73"  # what concerns the labels
NEUTRAL = "#6E7781"  # initial network, totals, guides; readable on white and on black

# Sizes and spines only: text and background colours stay those of the user's own style.
STYLE: dict[str, Any] = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelsize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.35,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@contextmanager
def styled() -> Iterator[None]:
    """`STYLE` inside, and the user's own values of the same settings again afterwards.

    `matplotlib.rc_context` puts back *all* settings: a session's first figure chooses the backend, and with it the
    interactive mode, without which a notebook shows nobody's figures any more.
    """
    before = {key: plt.rcParams[key] for key in STYLE}
    plt.rcParams.update(STYLE)
    try:
        yield
    finally:
        plt.rcParams.update(before)


MINUS = "\N{MINUS SIGN}"


def single_axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return the given axes and its figure, or new ones.

    Parameters
    ----------
    ax
        Axes to draw in, or None for a figure of its own.
    size
        Width and height of a new figure, inches.
    """
    if ax is None:
        return plt.subplots(figsize=size, layout="constrained")
    return figure_of(ax), ax


def several_axes(
    ax: Axes | None, size: tuple[float, float], rows: int, columns: int, **spacing: Any
) -> tuple[Figure, GridSpecFromSubplotSpec]:
    """Return a grid to draw in: a new figure's, or one that takes the place of the given axes.

    Parameters
    ----------
    ax
        Axes whose place the grid takes, as in scikit-learn's composite displays; None for a
        figure of its own.
    size
        Width and height of a new figure, inches.
    rows, columns
        Shape of the grid.
    **spacing
        Ratios and spaces, handed to matplotlib's ``subgridspec``.

    Raises
    ------
    PathKernelError
        If `ax` was placed by hand, so that it has no cell to divide.
    """
    figure, host = single_axes(ax, size)
    cell = host.get_subplotspec()
    if cell is None:
        raise PathKernelError(
            "The axes were placed by hand, with add_axes",
            "This display divides the cell of its axes into several",
            "Pass axes made by plt.subplots or figure.add_subplot, or none",
        )
    host.set_axis_off()
    return figure, cell.subgridspec(rows, columns, **spacing)


def heading(figure: Figure, cell: SubplotSpec, text: str, **font: Any) -> Axes:
    """Write a heading into a cell of its own: it widens no column, however long it is."""
    panel = figure.add_subplot(cell)
    panel.set_axis_off()
    panel.text(0.0, 0.4, text, va="center", fontweight="bold", in_layout=False, **font)
    return panel


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as an image, by the ending of its name, and let go of it; pyplot keeps it otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def figure_of(ax: Axes) -> Figure:
    """Return the outermost figure of an axes."""
    figure = ax.get_figure(root=True)
    assert figure is not None, "axes taken off their figure cannot be drawn in"
    return figure


def written(value: float, scale: float, sign: bool = False) -> str:
    """Write a number beside others of its kind, all with the same decimals.

    Parameters
    ----------
    value
        The number.
    scale
        Largest size among its kind; it gets three significant digits.
    sign
        Whether positive numbers carry a plus.

    Returns
    -------
    str
        With a true minus sign.
    """
    exponent = int(np.floor(np.log10(scale))) if scale > 0 else 0
    digits = f".{max(0, 2 - exponent)}f" if -3 <= exponent <= 5 else ".2e"
    if float(f"{value:{digits}}") == 0:
        value, sign = 0.0, False  # no sign for what is nothing at this scale
    return f"{value:{'+' if sign else ''}{digits}}".replace("-", MINUS)
