"""How the tangent kernel turned, and turned towards the task, while the network trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pathkernel.analysis.alignment import target_alignment
from pathkernel.analysis.velocity import kernel_distance
from pathkernel.errors import PathKernelError
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, RAISES, TASK, several_axes, styled

# Where the kernel was measured; not clipped, because a distance is often exactly zero.
POINTS: dict[str, Any] = {"marker": "o", "markersize": 3.0, "clip_on": False}


class KernelEvolutionDisplay:
    """Kernel distance, target alignment and training loss over training.

    Parameters
    ----------
    steps
        Optimizer steps, shape (T,), strictly increasing.
    distance_from_start, distance_from_end
        Kernel distance of each step's tangent kernel from the first and from the last,
        shape (T,), in [0, 1]; see `pathkernel.analysis.velocity`.
    alignment
        Centred alignment of each step's tangent kernel with the labels, shape (T,).
    train_loss
        Loss at the same steps, shape (T,), or None to leave its panel out.

    Raises
    ------
    PathKernelError
        If a curve is not as long as `steps`, or `steps` do not increase.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes
        One panel below the other: distance, alignment, and loss if it was given.
    ax_ : matplotlib Axes
        The panel of the distances.
    figure_ : matplotlib Figure
        Their figure.

    References
    ----------
    Fort et al., "Deep learning versus kernel learning", NeurIPS 2020 (arXiv 2010.15110).

    Examples
    --------
    >>> display = KernelEvolutionDisplay([0, 10], [0.0, 0.3], [0.3, 0.0], [0.1, 0.6])
    >>> display.steps
    array([ 0., 10.])
    """

    axes_: NDArray[np.object_]
    ax_: Axes
    figure_: Figure

    def __init__(
        self,
        steps: ArrayLike,
        distance_from_start: ArrayLike,
        distance_from_end: ArrayLike,
        alignment: ArrayLike,
        train_loss: ArrayLike | None = None,
    ) -> None:
        self.steps = np.asarray(steps, dtype=np.float64)
        if self.steps.ndim != 1 or len(self.steps) == 0 or not (np.diff(self.steps) > 0).all():
            raise PathKernelError(
                f"`steps` has shape {self.steps.shape} and is not a rising sequence",
                "Steps have shape (T,) and strictly increase",
                "Pass the step numbers at which the kernels were taken, in order",
            )
        self.distance_from_start = self._curve("distance_from_start", distance_from_start)
        self.distance_from_end = self._curve("distance_from_end", distance_from_end)
        self.alignment = self._curve("alignment", alignment)
        self.train_loss = None if train_loss is None else self._curve("train_loss", train_loss)

    @classmethod
    def from_grams(
        cls, steps: ArrayLike, grams: Sequence[ArrayLike], y: ArrayLike, train_loss: ArrayLike | None = None
    ) -> KernelEvolutionDisplay:
        """Measure a sequence of tangent kernels and make its display.

        Parameters
        ----------
        steps
            Optimizer steps, shape (T,).
        grams
            Tangent kernel of one set of samples at each step, shape (T, n, n).
        y
            Labels of those samples, shape (n,), as for `pathkernel.analysis.alignment.target_kernel`.
        train_loss
            Loss at the same steps, shape (T,), or None.

        Returns
        -------
        KernelEvolutionDisplay
            Not yet drawn.

        Raises
        ------
        PathKernelError
            As the class, `kernel_distance` and `target_alignment`.
        """
        return cls(
            steps,
            distance_from_start=[kernel_distance(gram, grams[0]) for gram in grams],
            distance_from_end=[kernel_distance(gram, grams[-1]) for gram in grams],
            alignment=[target_alignment(gram, y) for gram in grams],
            train_loss=train_loss,
        )

    def plot(self, ax: Axes | None = None) -> KernelEvolutionDisplay:
        """Draw the panels, one below the other.

        Parameters
        ----------
        ax
            Axes whose place the panels take, or None for a new figure.

        Returns
        -------
        KernelEvolutionDisplay
            This object, with `axes_`, `ax_` and `figure_`.
        """
        panels = 2 if self.train_loss is None else 3
        with styled():
            self.figure_, grid = several_axes(
                ax, (6.4, 1.4 + 1.6 * panels), panels, 1, height_ratios=[1.5, 1.0, 1.0][:panels], hspace=0.08
            )
            self.axes_ = np.empty(panels, dtype=object)
            for k in range(panels):
                self.axes_[k] = self.figure_.add_subplot(grid[k], sharex=self.axes_[0] if k else None)
            self.ax_ = self.axes_[0]
            self._draw_distances(self.axes_[0])
            self._draw_alignment(self.axes_[1])
            if self.train_loss is not None:
                self._draw_loss(self.axes_[2], self.train_loss)
            for panel in self.axes_:
                panel.grid(True, axis="y")
                panel.margins(x=0.02)
            for panel in self.axes_[:-1]:
                panel.tick_params(labelbottom=False)
            self.axes_[-1].set_xlabel("optimizer step")
            self.figure_.align_ylabels(list(self.axes_))
        return self

    def _draw_distances(self, panel: Axes) -> None:
        panel.plot(self.steps, self.distance_from_start, color=RAISES, label="from the first step", **POINTS)
        panel.plot(
            self.steps, self.distance_from_end, color=LOWERS, linestyle="--", label="from the last step", **POINTS
        )
        panel.set(ylabel="kernel distance", title="Tangent kernel in training")
        panel.set_ylim(bottom=0.0)
        panel.legend(loc="best")

    def _draw_alignment(self, panel: Axes) -> None:
        panel.plot(self.steps, self.alignment, color=TASK, **POINTS)
        panel.set_ylabel("target\nalignment")
        panel.set_ylim(bottom=min(0.0, 1.05 * float(self.alignment.min())))

    def _draw_loss(self, panel: Axes, train_loss: NDArray[np.float64]) -> None:
        panel.plot(self.steps, train_loss, color=NEUTRAL, **POINTS)
        panel.set_ylabel("training loss")
        if (train_loss > 0).all():
            panel.set_yscale("log")

    def _curve(self, name: str, values: ArrayLike) -> NDArray[np.float64]:
        curve = np.asarray(values, dtype=np.float64)
        if curve.shape != self.steps.shape:
            raise PathKernelError(
                f"`{name}` has shape {curve.shape} for {len(self.steps)} steps",
                f"One value per step: shape ({len(self.steps)},)",
                "Take every curve at the same steps",
            )
        return curve
