"""Doubtful labels: the samples themselves, and those that pulled the other way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pathkernel.errors import PathKernelError
from pathkernel.influence.labels import LabelQuality
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, several_axes, styled
from pathkernel.plotting.attribution import as_image, draw_image


class DoubtfulLabelsDisplay:
    """The most doubtful labels of a training set, a row each: the sample, and what pulled the other way.

    Made by `from_quality`.

    Parameters
    ----------
    rows
        For each sample its tile and those of the samples beside it: images with captions, the sample first.

    Attributes
    ----------
    axes_ : list of list of matplotlib Axes
        The tiles, row by row.
    figure_ : matplotlib Figure
        Their figure.
    """

    axes_: list[list[Axes]]
    figure_: Figure

    def __init__(self, *, rows: list[list[tuple[NDArray[Any], str]]]) -> None:
        self.rows = rows

    @classmethod
    def from_quality(
        cls,
        quality: LabelQuality,
        images: Mapping[int, ArrayLike] | Sequence[ArrayLike],
        *,
        against: Sequence[Sequence[int]] | None = None,
        k: int = 10,
    ) -> DoubtfulLabelsDisplay:
        """Choose the samples with the most doubtful labels.

        Parameters
        ----------
        quality
            Result of `pathkernel.label_quality`.
        images
            Images by sample id, as of `AttributionDisplay`.
        against
            Ids of the samples that pulled the other way, for each of the k samples; None for none.
        k
            How many samples.

        Returns
        -------
        DoubtfulLabelsDisplay
            Not yet drawn.

        Raises
        ------
        PathKernelError
            Where there are not as many groups of other samples, and for what is no image.
        """
        ids = quality.top(k)
        others = [[] for _ in ids] if against is None else against
        if len(others) != len(ids):
            raise PathKernelError(
                f"`against` has {len(others)} groups of samples for {len(ids)} doubtful labels",
                "It has one for each, in their order",
                f"Pass {len(ids)} groups, or write `k={len(others)}`",
            )
        rows = []
        for i, group in zip(ids.tolist(), others, strict=True):
            said, predicted = (written(values[i]) for values in (quality.targets, quality.predictions))
            row = [(as_image(images[i], "images"), f"#{i}: {said}\nnetwork: {predicted}")]
            row += [(as_image(images[j], "images"), f"#{j}\n{written(quality.targets[j])}") for j in group]
            rows.append(row)
        return cls(rows=rows)

    def plot(self, ax: Axes | None = None, *, cmap: str = "gray") -> DoubtfulLabelsDisplay:
        """Draw the rows from the most doubtful label down.

        Parameters
        ----------
        ax
            Axes whose place the tiles take, or None for a new figure.
        cmap
            Colour map of images without colours.

        Returns
        -------
        DoubtfulLabelsDisplay
            This object, with `axes_` and `figure_`.
        """
        columns = max(map(len, self.rows))
        with styled():
            size = (1.2 * columns + 0.6, 1.5 * len(self.rows) + 0.2)
            self.figure_, grid = several_axes(ax, size, len(self.rows), columns, hspace=0.1, wspace=0.1)
            self.axes_ = []
            for place, row in enumerate(self.rows):
                panels = []
                for column, (image, caption) in enumerate(row):
                    frame = NEUTRAL if column else LOWERS
                    panel = draw_image(self.figure_, grid[place, column], image, frame, cmap)
                    panel.set_xlabel(caption, fontsize=8.5, labelpad=3)
                    panels.append(panel)
                self.axes_.append(panels)
        return self


def written(label: Any) -> str:
    """A label, or the first numbers of a regression's target."""
    values = np.asarray(label)
    if values.ndim == 0:
        return f"{values.item():.4g}" if values.dtype.kind == "f" else str(values.item())
    return ", ".join(f"{one:.3g}" for one in values.ravel()[:3])
