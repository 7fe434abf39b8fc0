"""Eigenvalues of a game in the complex plane, beside the line and the circle that they must not cross."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from pathkernel.dynamics.local_stability import Stability
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, RAISES, several_axes, styled


class StabilityDisplay:
    """Eigenvalues of the flow and of the map of the steps; those that make it unstable have another colour.

    Those within `report.rounding` of the line or the circle are neutral: rounding alone says on which side they are.
    Made by `from_stability`.

    Parameters
    ----------
    report
        What `pathkernel.dynamics.stability` returned.

    Attributes
    ----------
    axes_ : dict of str to matplotlib Axes
        ``"flow"`` and ``"map"``.
    figure_ : matplotlib Figure
        Their figure.
    """

    axes_: dict[str, Axes]
    figure_: Figure

    def __init__(self, *, report: Stability) -> None:
        self.report = report

    @classmethod
    def from_stability(cls, report: Stability) -> StabilityDisplay:
        """Make the display of a report."""
        return cls(report=report)

    def plot(self, ax: Axes | None = None) -> StabilityDisplay:
        """Draw both panels.

        Parameters
        ----------
        ax
            Axes whose place the panels take, or None for a new figure.

        Returns
        -------
        StabilityDisplay
            This object, with `axes_` and `figure_`.
        """
        report = self.report
        with styled():
            self.figure_, grid = several_axes(ax, (8.4, 4.0), 1, 2, wspace=0.3)
            flow, steps = (self.figure_.add_subplot(grid[0, column]) for column in range(2))
            self.axes_ = {"flow": flow, "map": steps}
            flow.axvline(0.0, color=NEUTRAL, linewidth=1.0)
            _scatter(flow, report.flow, report.flow.real, report.rounding)
            flow.set_title(f"Flow: real parts up to {report.abscissa:+.3g}")
            steps.add_patch(Circle((0.0, 0.0), 1.0, fill=False, color=NEUTRAL, linewidth=1.0))
            _scatter(steps, report.map, np.abs(report.map) - 1, report.rounding)
            steps.set_title(f"Steps: radius {report.radius:.4g}")
            steps.set_aspect("equal", adjustable="datalim")
            for panel in (flow, steps):
                panel.set(xlabel="real part", ylabel="imaginary part")
                panel.grid(True)
        return self


def _scatter(panel: Axes, values: np.ndarray, beyond: np.ndarray, rounding: float) -> None:
    """Draw eigenvalues in the colours of how far they lie beyond the line or the circle."""
    classes = {
        "stable": (RAISES, beyond < -rounding),
        "neutral": (NEUTRAL, np.abs(beyond) <= rounding),
        "unstable": (LOWERS, beyond > rounding),
    }
    for name, (color, part) in classes.items():
        if part.any():
            panel.plot(
                values.real[part], values.imag[part], "o", color=color, markersize=5, label=f"{name}: {part.sum()}"
            )
    panel.legend(loc="best")
