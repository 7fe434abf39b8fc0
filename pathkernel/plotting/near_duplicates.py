"""Near-duplicates: the samples of each pair side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pathkernel.errors import PathKernelError, is_whole
from pathkernel.influence.duplicates import NearDuplicates
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, several_axes, styled
from pathkernel.plotting.attribution import as_image, draw_image
from pathkernel.plotting.doubtful_labels import written

PAIRS = 4
"""Pairs side by side."""

Images = Mapping[int, ArrayLike] | Sequence[ArrayLike] | NDArray[Any]


class NearDuplicatesDisplay:
    """Pairs of near-duplicates, framed in colour where their labels disagree.

    Made by `from_near_duplicates`.

    Parameters
    ----------
    pairs
        For each pair its two images with their captions, and whether its labels disagree.

    Attributes
    ----------
    axes_ : list of tuple of matplotlib Axes
        The two images of each pair.
    figure_ : matplotlib Figure
        Their figure.
    """

    axes_: list[tuple[Axes, Axes]]
    figure_: Figure

    def __init__(self, *, pairs: list[tuple[NDArray[Any], str, NDArray[Any], str, bool]]) -> None:
        self.pairs = pairs

    @classmethod
    def from_near_duplicates(
        cls, found: NearDuplicates, images: Images, other_images: Images | None = None, *, k: int = 12
    ) -> NearDuplicatesDisplay:
        """Choose the first pairs.

        Parameters
        ----------
        found
            Result of `pathkernel.influence.near_duplicates`.
        images
            Images by sample id, as of `AttributionDisplay`.
        other_images
            Images of the other samples, where such were given.
        k
            How many pairs at most.

        Returns
        -------
        NearDuplicatesDisplay
            Not yet drawn.

        Raises
        ------
        PathKernelError
            Where there is no pair, where images of the others are missing, and for what is no image.
        """
        if not (is_whole(k) and k >= 1 and len(found)):
            raise PathKernelError(
                f"A picture of `k={k!r}` pairs was asked of {len(found)} pairs of near-duplicates",
                "One pair or more is shown",
                "Ask for a picture where `len(found)` is not 0, with `k=12`",
            )
        if found.across and other_images is None:
            raise PathKernelError(
                "Pairs of training samples and others were given with images of the training samples alone",
                "The second image of each pair is of the others",
                "Pass `from_near_duplicates(found, images, other_images)`",
            )
        disagree = np.zeros(len(found), dtype=bool) if found.labels is None else found.conflicts
        pairs = []
        for place, (i, j) in enumerate(found.pairs[:k].tolist()):
            one, other = (
                f"#{sample}{'' if found.labels is None else f': {written(found.labels[side][place])}'}"
                for side, sample in enumerate((i, j))
            )
            following = "identical" if found.identical[place] else f"next {found.next_cosine[place]:.3f}"
            pairs.append(
                (
                    as_image(images[i], "images"),
                    f"{one}\ncos {found.cosine[place]:.4f}",
                    as_image((images if other_images is None else other_images)[j], "images"),
                    f"{'test ' if found.across else ''}{other}\n{following}",
                    bool(disagree[place]),
                )
            )
        return cls(pairs=pairs)

    def plot(self, ax: Axes | None = None, *, cmap: str = "gray") -> NearDuplicatesDisplay:
        """Draw the pairs, the least likely by chance first.

        Parameters
        ----------
        ax
            Axes whose place the images take, or None for a new figure.
        cmap
            Colour map of images without colours.

        Returns
        -------
        NearDuplicatesDisplay
            This object, with `axes_` and `figure_`.
        """
        across = min(PAIRS, len(self.pairs))
        down = -(-len(self.pairs) // across)
        ratios = ([1.0, 1.0, 0.25] * across)[:-1]
        with styled():
            size = (1.1 * sum(ratios) + 0.4, 1.55 * down + 0.2)
            self.figure_, grid = several_axes(ax, size, down, len(ratios), width_ratios=ratios, hspace=0.1, wspace=0.05)
            self.axes_ = []
            for place, (one, caption, other, other_caption, disagrees) in enumerate(self.pairs):
                row, column = divmod(place, across)
                panels = []
                for side, (image, text) in enumerate(((one, caption), (other, other_caption))):
                    frame = LOWERS if disagrees else NEUTRAL
                    panel = draw_image(self.figure_, grid[row, 3 * column + side], image, frame, cmap)
                    panel.set_xlabel(text, fontsize=8.5, labelpad=3)
                    panels.append(panel)
                self.axes_.append((panels[0], panels[1]))
        return self
