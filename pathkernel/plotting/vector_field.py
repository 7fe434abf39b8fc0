"""Vector field of a game of two numbers, with trajectories in it; and the variants of the Dirac GAN side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pathkernel.dynamics.dirac_gan import UPDATES, DiracGAN, variants
from pathkernel.errors import GameError, PathKernelError
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, RAISES, TASK, several_axes, single_axes, styled

COLORS = (LOWERS, RAISES, TASK)
ARROWS = 15  # along each axis
COLUMNS = 4


class VectorFieldDisplay:
    """Arrows of a vector field in the plane, and paths in it.

    Made by `from_field`.

    Parameters
    ----------
    x, y
        Where the arrows stand, (n, n) each.
    u, v
        The field there, (n, n) each.
    paths
        (T, 2) points of each path, by its name.
    title
        Title above.
    labels
        Names of the two axes.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Where it was drawn.
    figure_ : matplotlib Figure
        The figure of `ax_`.
    arrows_ : matplotlib Quiver
        The arrows, all of one length; their shades tell the speed.
    lines_ : dict of str to matplotlib Line2D
        The paths.

    Examples
    --------
    >>> display = VectorFieldDisplay.from_field(lambda x, y: (-y, x), limit=1.0)
    >>> display.u.shape
    (15, 15)
    """

    ax_: Axes
    figure_: Figure
    arrows_: Any
    lines_: dict[str, Any]

    def __init__(
        self,
        *,
        x: NDArray[np.float64],
        y: NDArray[np.float64],
        u: NDArray[np.float64],
        v: NDArray[np.float64],
        paths: Mapping[str, NDArray[np.float64]],
        title: str,
        labels: tuple[str, str],
    ) -> None:
        self.x = x
        self.y = y
        self.u = u
        self.v = v
        self.paths = paths
        self.title = title
        self.labels = labels

    @classmethod
    def from_field(
        cls,
        field: Callable[[Any, Any], tuple[Any, Any]],
        limit: float,
        paths: Mapping[str, ArrayLike] | None = None,
        title: str = "",
        labels: tuple[str, str] = (r"discriminator $\varphi$", r"generator $\theta$"),
    ) -> VectorFieldDisplay:
        """Evaluate a field on a grid and make its display.

        Parameters
        ----------
        field
            ``(x, y) -> (ẋ, ẏ)`` of arrays.
        limit
            The picture is of [−limit, limit]².
        paths
            (T, 2) points of each path, by its name.
        title, labels
            Above, and along the axes.

        Raises
        ------
        PathKernelError
            If a path has another shape.
        """
        ticks = np.linspace(-limit, limit, ARROWS)
        x, y = np.meshgrid(ticks, ticks)
        u, v = (np.broadcast_to(np.asarray(part, dtype=np.float64), x.shape) for part in field(x, y))
        drawn = {name: np.asarray(path, dtype=np.float64) for name, path in (paths or {}).items()}
        for name, path in drawn.items():
            if path.ndim != 2 or path.shape[1] != 2:
                raise PathKernelError(
                    f"The path {name!r} has shape {path.shape}",
                    "A path is a sequence of points in the plane, (T, 2)",
                    "Pass what `DiracGAN.trajectory` returns",
                )
        return cls(x=x, y=y, u=u, v=v, paths=drawn, title=title, labels=labels)

    def plot(self, ax: Axes | None = None, *, legend: bool = True) -> VectorFieldDisplay:
        """Draw the field and the paths, a dot where each begins.

        Parameters
        ----------
        ax
            Axes to draw in, or None for a new figure.
        legend
            Whether the paths are named.

        Returns
        -------
        VectorFieldDisplay
            This object, with `ax_`, `figure_`, `arrows_` and `lines_`.
        """
        with styled():
            self.figure_, self.ax_ = single_axes(ax, size=(4.4, 4.4))
            speed = np.hypot(self.u, self.v)
            length = np.where(speed > 0, speed, 1.0)
            self.arrows_ = self.ax_.quiver(
                self.x, self.y, self.u / length, self.v / length, speed,
                cmap="Greys", norm=_shades(speed), pivot="mid", scale=22.0, width=0.005,
            )  # fmt: skip
            self.lines_ = {}
            for (name, path), color in zip(self.paths.items(), cycle(COLORS), strict=False):
                (self.lines_[name],) = self.ax_.plot(*path.T, color=color, linewidth=1.2, label=name)
                self.ax_.plot(*path[0], marker="o", markersize=4, color=NEUTRAL, zorder=3)
            limit = float(self.x.max())
            self.ax_.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel=self.labels[0], ylabel=self.labels[1])
            self.ax_.set_aspect("equal")
            self.ax_.set_title(self.title)
            if legend and self.paths:
                self.ax_.legend(loc="upper right")
        return self


def _shades(speed: NDArray[np.float64]) -> Any:
    """Speeds as shades that stay visible on white and below the paths."""
    fastest = float(speed.max()) or 1.0
    return Normalize(-0.35 * fastest, 1.5 * fastest)


class DiracGANDisplay:
    """Variants of the Dirac GAN, a vector field each with its trajectories under the three kinds of updates.

    Made by `from_variants`.

    Parameters
    ----------
    fields
        A display of each variant.
    rate
        Of the steps.

    Attributes
    ----------
    axes_ : list of matplotlib Axes
        A panel of each variant.
    figure_ : matplotlib Figure
        Their figure.
    """

    axes_: list[Axes]
    figure_: Figure

    def __init__(self, *, fields: Sequence[VectorFieldDisplay], rate: float) -> None:
        self.fields = fields
        self.rate = rate

    @classmethod
    def from_variants(
        cls,
        chosen: Sequence[DiracGAN] | None = None,
        *,
        rate: float = 0.2,
        steps: int = 250,
        start: tuple[float, float] = (1.0, 1.0),
        limit: float = 3.0,
    ) -> DiracGANDisplay:
        """Follow the variants and make their display.

        Parameters
        ----------
        chosen
            The variants; all by default.
        rate
            Of the steps of both players.
        steps
            Rounds; of a trajectory that diverges, those before.
        start
            (φ, θ).
        limit
            The pictures are of [−limit, limit]².
        """
        fields = []
        for variant in variants() if chosen is None else chosen:
            paths = {}
            for name, updates in UPDATES.items():
                try:
                    paths[name] = variant.trajectory(start, rate, steps, updates)
                except GameError as error:
                    paths[name] = error.path
            fields.append(VectorFieldDisplay.from_field(variant.field, limit, paths, variant.name))
        return cls(fields=fields, rate=rate)

    def plot(self, ax: Axes | None = None) -> DiracGANDisplay:
        """Draw the panels, four to a row, and name the updates once below.

        Parameters
        ----------
        ax
            Axes whose place the panels take, or None for a new figure.

        Returns
        -------
        DiracGANDisplay
            This object, with `axes_` and `figure_`.
        """
        rows = -(-len(self.fields) // COLUMNS)
        columns = min(COLUMNS, len(self.fields))
        with styled():
            size = (2.9 * columns + 0.4, 3.0 * rows + 0.5)
            self.figure_, grid = several_axes(ax, size, rows, columns)
            self.axes_ = []
            for place, field in enumerate(self.fields):
                panel = self.figure_.add_subplot(grid[place // columns, place % columns])
                field.plot(panel, legend=False)
                if place + columns < len(self.fields):
                    panel.set_xlabel("")
                if place % columns:
                    panel.set_ylabel("")
                self.axes_.append(panel)
            lines = self.fields[0].lines_
            self.figure_.legend(
                lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False,
                title=f"updates, at a rate of {self.rate:g}",
            )  # fmt: skip
        return self
