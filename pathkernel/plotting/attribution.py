"""Why the network said it: the training samples that moved one prediction most, and the whole account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from numpy.typing import ArrayLike, NDArray

from pathkernel.errors import PathKernelError
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, RAISES, heading, several_axes, styled, written
from pathkernel.plotting.waterfall import draw_waterfall, waterfall

HEADING = 0.26  # height of a heading above a row of samples, in heights of the row
TILE_LETTERS = 12  # how many letters fit below a tile


@dataclass(frozen=True)
class Sample:
    """One training sample beside a prediction.

    Parameters
    ----------
    index
        Sample id.
    share
        How much it raised the output.
    image
        Shape (height, width) or (height, width, colours).
    label
        Its label, or None.
    """

    index: int
    share: float
    image: NDArray[Any]
    label: str | None


def strongest(shares: NDArray[np.float64], side: str, k: int) -> list[int]:
    """Places of the k largest shares of one side, ``"raising"`` or ``"lowering"``, the strongest first.

    Raises
    ------
    PathKernelError
        If `k` is below 1.
    """
    if k < 1:
        raise PathKernelError(f"`k` is {k}", "At least one sample is shown on either side", "Write k=5")
    signed = shares if side == "raising" else -shares
    order = np.argsort(-signed, kind="stable")[:k]  # ties in id order
    return [int(i) for i in order if signed[i] > 0]


def samples_with_images(
    shares: NDArray[np.float64], chosen: Sequence[int], images: Any, name: str, labels: NDArray[Any] | None = None
) -> list[Sample]:
    """The chosen samples of some shares; ``name`` is what the images are called in errors."""
    return [
        Sample(i, float(shares[i]), as_image(images[i], name), None if labels is None else str(labels[i]))
        for i in chosen
    ]


class AttributionDisplay:
    """A query, the training samples that pushed its output up and down most, and the account.

    Made by `from_attributions`.

    Parameters
    ----------
    raising, lowering
        Samples with the largest positive and the largest negative shares, strongest first.
    bars
        The account as (name, start, end) in units of the output, see
        `pathkernel.plotting.waterfall.waterfall`.
    query_image
        Image of the query, or None.
    title
        Title above the query.

    Attributes
    ----------
    axes_ : dict of str to (list of) matplotlib Axes
        ``"query"`` (absent without an image), ``"raising"``, ``"lowering"``, ``"waterfall"``.
    ax_ : matplotlib Axes
        The waterfall.
    figure_ : matplotlib Figure
        Their figure.
    """

    axes_: dict[str, Any]
    ax_: Axes
    figure_: Figure

    def __init__(
        self,
        *,
        raising: list[Sample],
        lowering: list[Sample],
        bars: list[tuple[str, float, float]],
        query_image: NDArray[Any] | None,
        title: str,
    ) -> None:
        self.raising = raising
        self.lowering = lowering
        self.bars = bars
        self.query_image = query_image
        self.title = title

    @classmethod
    def from_attributions(
        cls,
        attributions: Attributions,
        query: int,
        images: ArrayLike | Sequence[ArrayLike],
        labels: ArrayLike | None = None,
        k: int = 5,
        query_image: ArrayLike | None = None,
        title: str | None = None,
    ) -> AttributionDisplay:
        """Choose the samples of one query and make its display.

        Parameters
        ----------
        attributions
            What ``machine.explain(X)`` returned.
        query
            Which query of it, 0 … Q - 1.
        images
            Training images in id order, N of shape (height, width), (height, width, colours)
            or (colours, height, width); colours 1, 3 or 4.
        labels
            Their labels, shape (N,), or None.
        k
            How many samples on either side, at least 1. Only samples that did raise (or
            lower) the output are shown, so there may be fewer.
        query_image
            Image of the query, of a shape as in `images`, or None.
        title
            By default the query and the explained output.

        Returns
        -------
        AttributionDisplay
            Not yet drawn.

        Raises
        ------
        PathKernelError
            If `query` or `k` is out of range, if there is not one image and label per
            training sample, or an array is not an image.
        """
        bars = waterfall(attributions, query)
        shares = np.asarray(attributions.shares[query], dtype=np.float64)
        raising, lowering = (strongest(shares, side, k) for side in ("raising", "lowering"))
        names = None if labels is None else np.asarray(labels)
        for name, given in (("images", images), ("labels", names)):
            if given is not None and len(given) != len(shares):  # type: ignore[arg-type]
                raise PathKernelError(
                    f"There are {len(given)} {name} for {len(shares)} training samples",  # type: ignore[arg-type]
                    f"Sample ids index `{name}`, so there is one per training sample, in id order",
                    f"Pass the {name} of the whole training set",
                )

        return cls(
            raising=samples_with_images(shares, raising, images, "images", names),
            lowering=samples_with_images(shares, lowering, images, "images", names),
            bars=bars,
            query_image=None if query_image is None else as_image(query_image, "query_image"),
            title=title if title is not None else _default_title(attributions, query),
        )

    def plot(self, ax: Axes | None = None, *, cmap: str = "gray") -> AttributionDisplay:
        """Draw query, samples and waterfall from left to right.

        Parameters
        ----------
        ax
            Axes whose place the parts take, or None for a new figure.
        cmap
            Colour map of images without colours; ``"gray_r"`` suits ink on paper.

        Returns
        -------
        AttributionDisplay
            This object, with `axes_`, `ax_` and `figure_`.
        """
        columns = max(len(self.raising), len(self.lowering), 1)
        widths = {"query": 1.5, "samples": 0.95 * columns, "waterfall": 3.9}
        if self.query_image is None:
            del widths["query"]
        with styled():
            size = (sum(widths.values()) + 0.7, 3.6)
            self.figure_, page = several_axes(ax, size, 2, 1, height_ratios=[0.08, 1.0], hspace=0.0)
            heading(self.figure_, page[0], self.title, fontsize=12)
            grid = page[1].subgridspec(1, len(widths), width_ratios=list(widths.values()), wspace=0.1)
            cells = dict(zip(widths, grid, strict=True))
            self.axes_ = {}
            if self.query_image is not None:
                query = cells["query"].subgridspec(2, 1, height_ratios=[HEADING, 2.0 + HEADING], hspace=0.0)
                heading(self.figure_, query[0], "Query", fontsize=10)
                self.axes_["query"] = draw_image(self.figure_, query[1], self.query_image, NEUTRAL, cmap)
            rows = cells["samples"].subgridspec(
                4, columns, height_ratios=[HEADING, 1.0, HEADING, 1.0], hspace=0.0, wspace=0.05
            )
            for row, name, title, color in (
                (0, "raising", "Raised the output most", RAISES),
                (2, "lowering", "Lowered it most", LOWERS),
            ):
                samples: list[Sample] = getattr(self, name)
                heading(self.figure_, rows[row, :], title if samples else f"{title}: none", fontsize=10, color=color)
                places = [rows[row + 1, column] for column in range(len(samples))]
                self.axes_[name] = draw_samples(self.figure_, places, samples, color, cmap)
            self.ax_ = self.axes_["waterfall"] = self.figure_.add_subplot(cells["waterfall"])
            draw_waterfall(self.ax_, self.bars)
        return self


def draw_samples(
    figure: Figure,
    places: list[SubplotSpec],
    samples: list[Sample],
    color: str,
    cmap: str,
    captions: Sequence[str] = (),
) -> list[Axes]:
    """Draw tiles of samples with their shares below them.

    Parameters
    ----------
    figure
        Where.
    places
        A cell for each.
    samples
        Strongest first.
    color
        Of the frames and of the shares.
    cmap
        Colour map of images without colours.
    captions
        A line for each; by default its id and label.
    """
    largest = max((abs(sample.share) for sample in samples), default=0.0)
    panels = []
    for place, sample, caption in zip(places, samples, captions or map(_name, samples), strict=True):
        panel = draw_image(figure, place, sample.image, color, cmap)
        panel.set_xlabel(f"{caption}\n", fontsize=8.5, labelpad=3, linespacing=1.3)
        panel.annotate(
            written(sample.share, largest, sign=True),
            (0.5, 0.0),  # the label's empty second line
            xycoords=panel.xaxis.label,
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=color,
            fontsize=9,
            fontweight="bold",
        )
        panels.append(panel)
    return panels


def as_image(values: ArrayLike, name: str) -> NDArray[Any]:
    """Return an image as matplotlib draws it: (height, width) or (height, width, colours).

    Parameters
    ----------
    values
        Shape (height, width), (height, width, colours) or (colours, height, width). Colours
        in floating point are clipped to [0, 1].
    name
        How error messages call it.

    Raises
    ------
    PathKernelError
        If the shape is none of these.
    """
    image = np.asarray(values)
    if image.ndim == 3 and image.shape[-1] not in (1, 3, 4) and image.shape[0] in (1, 3, 4):
        image = np.moveaxis(image, 0, -1)
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.ndim == 2 and image.size:
        return image
    if image.ndim == 3 and image.shape[-1] in (3, 4) and image.size:
        return np.clip(image, 0.0, 1.0) if np.issubdtype(image.dtype, np.floating) else image
    raise PathKernelError(
        f"An entry of `{name}` has shape {image.shape}",
        "An image has shape (height, width), (height, width, colours) or (colours, height, width)",
        "Reshape flat rows first, e.g. X.reshape(-1, 8, 8) for 8 × 8 digits",
    )


def draw_image(figure: Figure, cell: SubplotSpec, image: NDArray[Any], frame: str, cmap: str) -> Axes:
    """Draw an image in a frame of a colour, without axes."""
    panel = figure.add_subplot(cell)
    panel.imshow(image, cmap=cmap, interpolation="nearest")
    panel.set_anchor("N")  # close to its heading, whatever the shape of the cell
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set(visible=True, color=frame, linewidth=1.6)
    return panel


def _name(sample: Sample) -> str:
    """Id and label on one line where both fit below a tile, on two otherwise."""
    if sample.label is None:
        return f"#{sample.index}"
    name = f"#{sample.index} · {sample.label}"
    if len(name) <= TILE_LETTERS:
        return name
    label = sample.label if len(sample.label) <= TILE_LETTERS else sample.label[: TILE_LETTERS - 1] + "…"
    return f"#{sample.index}\n{label}"


def _default_title(attributions: Attributions, query: int) -> str:
    sample, output = int(attributions.query_index[query]), int(attributions.output_index[query])
    return f"Query {sample}" if output < 0 else f"Query {sample}, output {output}"
