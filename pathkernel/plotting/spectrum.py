"""Eigenvalues of a Gram matrix against their rank, with the effective rank."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

from pathkernel.analysis.spectrum import effective_rank_of, rounding_floor, spectrum
from pathkernel.plotting.appearance import RAISES, single_axes, styled


class SpectrumDisplay:
    """Eigenvalues of a Gram matrix on logarithmic axes.

    A straight line is a power law λ_k ∝ k^-a. Eigenvalues at or below rounding, n · ε · λ₁,
    say nothing and are left out; the legend counts them. The diamond marks the effective rank.

    Parameters
    ----------
    eigenvalues
        Descending, shape (n,).
    effective_rank
        exp(entropy of the normalised eigenvalues), see `pathkernel.analysis.spectrum`.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Where it was drawn.
    figure_ : matplotlib Figure
        The figure of `ax_`.
    line_ : matplotlib Line2D
        The eigenvalues.

    Examples
    --------
    >>> import numpy as np
    >>> round(SpectrumDisplay.from_gram(np.eye(5)).effective_rank, 12)
    5.0
    """

    ax_: Axes
    figure_: Figure
    line_: Line2D

    def __init__(self, *, eigenvalues: NDArray[np.float64], effective_rank: float) -> None:
        self.eigenvalues = eigenvalues
        self.effective_rank = effective_rank

    @classmethod
    def from_gram(cls, K: ArrayLike) -> SpectrumDisplay:
        """Compute the spectrum of a Gram matrix and make its display.

        Parameters
        ----------
        K
            Gram matrix, shape (n, n). Time O(n³).

        Returns
        -------
        SpectrumDisplay
            Not yet drawn.

        Raises
        ------
        PathKernelError
            If `K` is not a finite symmetric matrix or is zero.
        """
        eigenvalues = spectrum(K)
        return cls(eigenvalues=eigenvalues, effective_rank=effective_rank_of(eigenvalues))

    def plot(self, ax: Axes | None = None, *, label: str | None = None, color: str = RAISES) -> SpectrumDisplay:
        """Draw the spectrum.

        Parameters
        ----------
        ax
            Axes to draw in, or None for a new figure. Several spectra may share one.
        label
            Name of this kernel in the legend.
        color
            Colour of the eigenvalues.

        Returns
        -------
        SpectrumDisplay
            This object, with `ax_`, `figure_` and `line_`.
        """
        count = len(self.eigenvalues)
        drawn = int((self.eigenvalues > rounding_floor(self.eigenvalues)).sum())
        lines = [label or "eigenvalues", f"effective rank {self.effective_rank:.1f} of {count}"]
        if drawn < count:
            lines.append(f"{count - drawn} eigenvalues at rounding")
        with styled():
            self.figure_, self.ax_ = single_axes(ax, size=(5.6, 4.0))
            (self.line_,) = self.ax_.loglog(
                np.arange(1, drawn + 1),
                self.eigenvalues[:drawn],
                color=color,
                marker="o",
                markersize=3.2,
                linewidth=1.0,
                markeredgewidth=0,
                label="\n".join(lines),
            )
            self._mark_effective_rank(drawn, color)
            self.ax_.set(xlabel="rank k", ylabel=r"eigenvalue $\lambda_k$")
            self.ax_.grid(True, which="major")
            self.ax_.legend(loc="upper right", labelspacing=0.8)
        return self

    def _mark_effective_rank(self, drawn: int, color: str) -> None:
        """Mark the effective rank on the curve and let it fall to the axis."""
        rank = self.effective_rank
        ranks = np.arange(1, drawn + 1)
        value = float(np.exp(np.interp(np.log(rank), np.log(ranks), np.log(self.eigenvalues[:drawn]))))
        self.ax_.plot(rank, value, marker="D", markersize=7, color=color, markeredgecolor="white", zorder=3)
        self.ax_.annotate(
            "",
            xy=(rank, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(rank, value),
            textcoords="data",
            arrowprops={"arrowstyle": "-", "linestyle": (0, (4, 3)), "color": color, "shrinkA": 0, "shrinkB": 0},
        )
