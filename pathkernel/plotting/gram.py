"""Heat map of a Gram matrix with its samples sorted by class: blocks are what a kernel has learnt."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pathkernel.analysis.gram_matrix import as_gram_matrix
from pathkernel.errors import PathKernelError
from pathkernel.plotting.appearance import single_axes, styled

MOST_BOUNDARIES = 32  # classes beyond which lines between them would hide the map


class GramDisplay:
    """Heat map of a Gram matrix, samples sorted by class.

    Made by `from_gram`.

    Parameters
    ----------
    gram
        Kernel values as drawn: rows and columns in drawing order, shape (n, n).
    order
        Sample drawn in each row, shape (n,).
    classes
        Names of the classes in drawing order, or None without classes.
    boundaries
        First row of each class and n at the end, shape (len(classes) + 1,), or None.
    normalized
        Whether `gram` holds cosines.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Where it was drawn.
    figure_ : matplotlib Figure
        The figure of `ax_`.
    im_ : matplotlib AxesImage
        The heat map.
    colorbar_ : matplotlib Colorbar or None
        Its scale.

    Examples
    --------
    >>> import numpy as np
    >>> y = np.array([0, 1, 0, 1])
    >>> GramDisplay.from_gram(np.eye(4), y).order
    array([0, 2, 1, 3])
    """

    ax_: Axes
    figure_: Figure
    im_: Any
    colorbar_: Any

    def __init__(
        self,
        *,
        gram: NDArray[np.float64],
        order: NDArray[np.intp],
        classes: list[str] | None,
        boundaries: NDArray[np.intp] | None,
        normalized: bool,
    ) -> None:
        self.gram = gram
        self.order = order
        self.classes = classes
        self.boundaries = boundaries
        self.normalized = normalized

    @classmethod
    def from_gram(cls, K: ArrayLike, y: ArrayLike | None = None, normalize: bool = True) -> GramDisplay:
        """Sort a Gram matrix by class and make its display.

        Parameters
        ----------
        K
            Gram matrix, shape (n, n).
        y
            Class labels, shape (n,): samples are sorted by them, those of one class stay in
            their order. Floating-point targets sort the samples and draw no boundaries. None
            keeps the order.
        normalize
            Draw the cosines K_ij / √(K_ii K_jj) instead of the values, so that samples with
            large gradients do not outshine the rest.

        Returns
        -------
        GramDisplay
            Not yet drawn.

        Raises
        ------
        PathKernelError
            If `K` is not a finite symmetric matrix, if `y` has another length, or if cosines
            are asked of a matrix with a diagonal entry that is not positive.
        """
        matrix = as_gram_matrix(K)
        if normalize:
            matrix = _cosines(matrix)
        if y is None:
            return cls(gram=matrix, order=np.arange(len(matrix)), classes=None, boundaries=None, normalized=normalize)
        labels = np.asarray(y)
        if labels.shape != (len(matrix),):
            raise PathKernelError(
                f"`y` has shape {labels.shape} for a Gram matrix of {len(matrix)} samples",
                f"One label per sample: shape ({len(matrix)},)",
                "Pass the labels of the same samples in the same order, or y=None",
            )
        order = np.argsort(labels, kind="stable")
        matrix = matrix[np.ix_(order, order)]
        if np.issubdtype(labels.dtype, np.floating):
            return cls(gram=matrix, order=order, classes=None, boundaries=None, normalized=normalize)
        classes, counts = np.unique(labels, return_counts=True)
        boundaries = np.concatenate([[0], np.cumsum(counts)])
        names = [str(name) for name in classes]
        return cls(gram=matrix, order=order, classes=names, boundaries=boundaries, normalized=normalize)

    def plot(self, ax: Axes | None = None, *, cmap: str | None = None, colorbar: bool = True) -> GramDisplay:
        """Draw the heat map.

        Parameters
        ----------
        ax
            Axes to draw in, or None for a new figure.
        cmap
            Colour map. By default ``"cividis"`` between the smallest and the largest value,
            or, when a value is clearly negative, ``"PuOr"`` around zero.
        colorbar
            Whether to draw the scale.

        Returns
        -------
        GramDisplay
            This object, with `ax_`, `figure_`, `im_` and `colorbar_`.
        """
        with styled():
            self.figure_, self.ax_ = single_axes(ax, size=(5.6, 4.7))
            largest = float(np.abs(self.gram).max())
            if self.gram.min() < -0.02 * largest:
                limits, default = (-largest, largest), "PuOr"
            else:
                limits, default = (float(self.gram.min()), float(self.gram.max())), "cividis"
            self.im_ = self.ax_.imshow(
                self.gram, cmap=cmap or default, vmin=limits[0], vmax=limits[1], interpolation="nearest"
            )
            self.ax_.spines[:].set_visible(False)
            self.ax_.tick_params(length=0)
            if self.boundaries is None:
                self.ax_.set(xlabel="sample", ylabel="sample")
            else:
                self._draw_classes(line_color="black" if default == "PuOr" else "white")
            self.colorbar_ = None
            if colorbar:
                name = r"$K_{ij}\,/\,\sqrt{K_{ii}K_{jj}}$" if self.normalized else r"$K_{ij}$"
                self.colorbar_ = self.figure_.colorbar(self.im_, ax=self.ax_, label=name, shrink=0.9, pad=0.02)
                self.colorbar_.outline.set_visible(False)
                self.colorbar_.ax.set_ylim(self.gram.min(), self.gram.max())
        return self

    def _draw_classes(self, line_color: str) -> None:
        assert self.boundaries is not None and self.classes is not None
        drawn = self.boundaries[1:-1] if len(self.classes) <= MOST_BOUNDARIES else self.boundaries[:0]
        for boundary in drawn - 0.5:
            self.ax_.axhline(boundary, color=line_color, linewidth=0.7, alpha=0.9)
            self.ax_.axvline(boundary, color=line_color, linewidth=0.7, alpha=0.9)
        centres = np.asarray(0.5 * (self.boundaries[:-1] + self.boundaries[1:]) - 0.5, dtype=np.float64)
        shown = _ticks_apart(centres, least=len(self.gram) / 24)
        names = [self.classes[k] for k in shown]
        self.ax_.set_yticks(centres[shown], names)
        upright = sum(map(len, names)) > 48  # characters that fit side by side below the map
        self.ax_.set_xticks(centres[shown], names, rotation=90 if upright else 0)
        self.ax_.set(xlabel="class", ylabel="class")


def _cosines(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """K_ij / √(K_ii K_jj)."""
    diagonal = np.diag(matrix)
    if not (diagonal > 0).all():
        sample = int(np.argmin(diagonal))
        raise PathKernelError(
            f"Sample {sample} has K_ii = {diagonal[sample]:.3g}",
            "Cosines K_ij / √(K_ii K_jj) need a positive diagonal",
            "Leave that sample out, or write normalize=False",
        )
    length = np.sqrt(diagonal)
    cosines: NDArray[np.float64] = matrix / length[:, None] / length[None, :]
    return cosines


def _ticks_apart(positions: NDArray[np.float64], least: float) -> list[int]:
    """Choose positions, from the first on, that lie at least `least` apart: labels must not overlap."""
    chosen: list[int] = []
    for k, position in enumerate(positions):
        if not chosen or position - positions[chosen[-1]] >= least:
            chosen.append(k)
    return chosen
