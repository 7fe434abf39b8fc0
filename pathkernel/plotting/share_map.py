"""Shares of samples in the plane: which real points and which fakes moved an output, where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pathkernel.errors import PathKernelError
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, RAISES, several_axes, styled

SHADES = LinearSegmentedColormap.from_list("shares", [LOWERS, "#E6E6E6", RAISES])

SHOWN = 0.99
"""Part of the points that lie within the picture, and of the shares within the scale of colours: few may be far out."""


class ShareMapDisplay:
    """Samples in the plane, a panel for each group of them, coloured by their shares in one output.

    Parameters
    ----------
    groups
        Points (n, 2) and shares (n,) of each group by its name, such as ``"real"`` and ``"generated"``.
    query
        (2,) the point whose output is explained.
    title
        Title above.

    Raises
    ------
    PathKernelError
        If a group is not of points in the plane, with a share each.

    Attributes
    ----------
    axes_ : dict of str to matplotlib Axes
        A panel of each group.
    figure_ : matplotlib Figure
        Their figure.
    """

    axes_: dict[str, Axes]
    figure_: Figure

    def __init__(
        self, groups: Mapping[str, tuple[ArrayLike, ArrayLike]], query: ArrayLike, title: str = "Shares in one output"
    ) -> None:
        self.groups: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
        for name, (points, shares) in groups.items():
            where, how_much = np.asarray(points, dtype=np.float64), np.asarray(shares, dtype=np.float64)
            if where.shape != (len(how_much), 2) or how_much.ndim != 1:
                raise PathKernelError(
                    f"The group {name!r} has points {where.shape} and shares {how_much.shape}",
                    "A group has n points in the plane, (n, 2), and a share of each, (n,)",
                    "Pass `why.shares[query, why.sources[name]]` beside `game.samples(player, name)`",
                )
            self.groups[name] = where, how_much
        self.query = np.asarray(query, dtype=np.float64).reshape(2)
        self.title = title

    def plot(self, ax: Axes | None = None) -> ShareMapDisplay:
        """Draw the panels side by side, each on a scale of its own: a real sample is seen often, a fake once.

        Parameters
        ----------
        ax
            Axes whose place the panels take, or None for a new figure.

        Returns
        -------
        ShareMapDisplay
            This object, with `axes_` and `figure_`.
        """
        with styled():
            size = (4.4 * len(self.groups), 3.9)
            self.figure_, grid = several_axes(ax, size, 1, len(self.groups), wspace=0.15)
            self.axes_, limits = {}, self._limits()
            for column, (name, (points, shares)) in enumerate(self.groups.items()):
                panel = self.axes_[name] = self.figure_.add_subplot(grid[0, column])
                order = np.argsort(np.abs(shares))  # the strongest on top
                largest = (float(np.quantile(np.abs(shares), SHOWN)) if len(shares) else 0.0) or 1.0
                drawn = panel.scatter(
                    *points[order].T, c=shares[order], cmap=SHADES, vmin=-largest, vmax=largest, s=14, linewidths=0
                )
                panel.plot(*self.query, marker="*", markersize=13, color="black", markeredgecolor="white")
                panel.set_title(f"{name}: {shares.sum():+.3g} in all", fontsize=10)
                self.figure_.colorbar(drawn, ax=panel, label="share", shrink=0.8)
                panel.set(xlim=limits[0], ylim=limits[1], aspect="equal")
                panel.grid(True, color=NEUTRAL)
            self.figure_.suptitle(self.title, fontweight="bold", fontsize=11)
        return self

    def _limits(self) -> NDArray[np.float64]:
        """Limits of both axes, (2, 2), of a square that holds nearly all points of every group, and the query."""
        points = np.concatenate([self.query[None], *(points for points, _ in self.groups.values())])
        low, high = np.quantile(points, [1 - SHOWN, SHOWN], axis=0)
        low, high = np.minimum(low, self.query), np.maximum(high, self.query)
        half = 0.55 * max(float((high - low).max()), 1e-12)
        middle = (low + high) / 2
        return np.stack([middle - half, middle + half], axis=1)
