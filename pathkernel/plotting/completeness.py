"""Network against kernel machine, query by query: whether the account of every prediction is closed."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from pathkernel.errors import PathKernelError
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.plotting.appearance import LOWERS, MINUS, NEUTRAL, RAISES, several_axes, styled


class CompletenessDisplay:
    """Network output against machine output, and the sizes of residual and errors.

    Left, one point per query: on the diagonal, shares and channels add up to the network.
    Right, the certificate on a logarithmic scale: `residual` is what is left over,
    `quadrature_error` the error along the steps, and `shares_error` the error bar of the shares.

    Parameters
    ----------
    network, machine
        Outputs in units of the output, shape (Q,).
    residual, quadrature_error
        As on the attributions, relative to abs(f(x; θ_S) - f(x; θ_0)), shape (Q,).
    shares_error
        The same, or None where it was not measured.

    Raises
    ------
    PathKernelError
        If any of them holds NaN or infinity: such a query must not vanish from the picture.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes
        Scatter and histogram, shape (2,).
    ax_ : matplotlib Axes
        The scatter.
    figure_ : matplotlib Figure
        Their figure.

    Examples
    --------
    >>> import numpy as np
    >>> zero, one = np.zeros(3), np.ones(3)
    >>> CompletenessDisplay(network=one, machine=one, residual=zero, quadrature_error=zero).largest_difference
    0.0
    """

    axes_: NDArray[np.object_]
    ax_: Axes
    figure_: Figure

    def __init__(
        self,
        *,
        network: NDArray[np.float64],
        machine: NDArray[np.float64],
        residual: NDArray[np.float64],
        quadrature_error: NDArray[np.float64],
        shares_error: NDArray[np.float64] | None = None,
    ) -> None:
        given = {"network": network, "machine": machine, "residual": residual, "quadrature_error": quadrature_error}
        if shares_error is not None:
            given["shares_error"] = shares_error
        broken = [name for name, values in given.items() if not np.isfinite(values).all()]
        if broken:
            raise PathKernelError(
                f"There are values that are not finite in {', '.join(broken)}",
                "Outputs, residuals and quadrature errors are finite",
                "Find the query, e.g. np.flatnonzero(~np.isfinite(attributions.output)), and leave it out",
            )
        self.network = network
        self.machine = machine
        self.residual = residual
        self.quadrature_error = quadrature_error
        self.shares_error = shares_error

    @classmethod
    def from_attributions(cls, attributions: Attributions) -> CompletenessDisplay:
        """Add the accounts up and make their display.

        Parameters
        ----------
        attributions
            What ``machine.explain(X)`` returned.

        Returns
        -------
        CompletenessDisplay
            Not yet drawn.
        """
        return cls(
            network=np.asarray(attributions.output, dtype=np.float64),
            machine=np.asarray(attributions.reconstruction, dtype=np.float64),
            residual=np.asarray(attributions.residual, dtype=np.float64),
            quadrature_error=np.asarray(attributions.quadrature_error, dtype=np.float64),
            shares_error=attributions.shares_error,
        )

    @property
    def largest_difference(self) -> float:
        """max abs(network - machine) over the queries, in units of the output."""
        return float(np.abs(self.network - self.machine).max())

    def plot(self, ax: Axes | None = None) -> CompletenessDisplay:
        """Draw scatter and histogram side by side.

        Parameters
        ----------
        ax
            Axes whose place the two take, or None for a new figure.

        Returns
        -------
        CompletenessDisplay
            This object, with `axes_`, `ax_` and `figure_`.
        """
        with styled():
            self.figure_, grid = several_axes(ax, (8.8, 3.9), 1, 2, width_ratios=[1.0, 1.15], wspace=0.08)
            self.axes_ = np.array([self.figure_.add_subplot(grid[k]) for k in range(2)], dtype=object)
            self.ax_ = self.axes_[0]
            self._draw_scatter(self.axes_[0])
            self._draw_certificate(self.axes_[1])
        return self

    def _draw_scatter(self, panel: Axes) -> None:
        both = np.concatenate([self.network, self.machine])
        low, high = float(both.min()), float(both.max())
        panel.axline((low, low), slope=1.0, color=NEUTRAL, linewidth=1.0, zorder=1)
        panel.scatter(self.network, self.machine, s=16, color=RAISES, alpha=0.55, linewidths=0, zorder=2)
        margin = 0.06 * (high - low) or 1.0
        panel.set(
            xlim=(low - margin, high + margin),
            ylim=(low - margin, high + margin),
            xlabel="network output",
            ylabel="kernel machine output",
            title="Network and kernel machine",
        )
        panel.set_aspect("equal", adjustable="box")
        panel.locator_params(nbins=6)
        panel.text(
            0.04,
            0.96,
            f"largest difference\n{self.largest_difference:.2g}".replace("-", MINUS),
            transform=panel.transAxes,
            va="top",
            fontsize=9,
        )

    def _draw_certificate(self, panel: Axes) -> None:
        kinds = [("residual", self.residual, RAISES), ("quadrature error", self.quadrature_error, LOWERS)]
        if self.shares_error is not None:
            kinds.append(("shares error", self.shares_error, NEUTRAL))
        sizes = [np.abs(values) for _, values, _ in kinds]
        smallest, largest = _decades(np.concatenate(sizes))
        bins = np.logspace(smallest, largest, 3 * (largest - smallest) + 1)
        for (name, _, color), size in zip(kinds, sizes, strict=True):
            positive = size[size > 0]
            label = name if (zeros := int((size == 0).sum())) == 0 else f"{name} ({zeros} exactly 0)"
            panel.hist(positive, bins=bins, color=color, alpha=0.8, label=label)
        panel.set_xscale("log")
        panel.set_xlim(10.0**smallest, 10.0**largest)
        panel.xaxis.set_major_locator(LogLocator(base=10, numticks=7))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.get_major_locator().set_params(integer=True)
        panel.set(xlabel=r"relative to $|f(\theta_S) - f(\theta_0)|$", ylabel="queries", title="Certificate")
        tallest = max((bar.get_height() for bar in panel.patches), default=0.0)
        panel.set_ylim(0.0, 1.35 * max(tallest, 1.0))  # room for the legend
        panel.legend(loc="upper left")


def _decades(sizes: NDArray[np.float64]) -> tuple[int, int]:
    """Whole powers of ten around the positive sizes, at least two apart."""
    positive = sizes[sizes > 0]
    if len(positive) == 0:
        return -17, -15
    smallest = int(np.floor(np.log10(positive.min())))
    largest = int(np.ceil(np.log10(positive.max())))
    return (smallest, largest) if largest - smallest >= 2 else (smallest - 1, largest + 1)
