"""How a player came to see a sample as it does: the real samples and the earlier fakes that shaped its view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pathkernel.dynamics.origins import Origins
from pathkernel.errors import PathKernelError
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, RAISES, heading, several_axes, styled
from pathkernel.plotting.attribution import (
    HEADING,
    Sample,
    as_image,
    draw_image,
    draw_samples,
    samples_with_images,
    strongest,
)

BARS = 24
"""Most bars over the generator's time."""


class PlayerViewDisplay:
    """A query, the real and the generated samples that moved a player's output for it most, and when these were made.

    Made by `from_attributions`.

    Parameters
    ----------
    real, generated
        Samples that raised the output most and those that lowered it most, strongest first, by ``"raising"`` and
        ``"lowering"``.
    times
        For each of the generated ones, how many steps its maker had taken, by the same names.
    edges
        Steps of the maker, (B + 1,): the bars over its time.
    raised, lowered
        (B,) sums of the positive and of the negative shares of the samples that it made meanwhile.
    query_image
        Image of the query, or None.
    title
        Title above the query.
    maker
        Name of the maker.

    Attributes
    ----------
    axes_ : dict of str to (list of) matplotlib Axes
        ``"query"`` (absent without an image), ``"real raising"``, ``"real lowering"``, ``"generated raising"``,
        ``"generated lowering"``, ``"time"``.
    ax_ : matplotlib Axes
        The bars over time.
    figure_ : matplotlib Figure
        Their figure.
    """

    axes_: dict[str, Any]
    ax_: Axes
    figure_: Figure

    def __init__(
        self,
        *,
        real: dict[str, list[Sample]],
        generated: dict[str, list[Sample]],
        times: dict[str, list[int]],
        edges: NDArray[np.float64],
        raised: NDArray[np.float64],
        lowered: NDArray[np.float64],
        query_image: NDArray[Any] | None,
        title: str,
        maker: str,
    ) -> None:
        self.real = real
        self.generated = generated
        self.times = times
        self.edges = edges
        self.raised = raised
        self.lowered = lowered
        self.query_image = query_image
        self.title = title
        self.maker = maker

    @classmethod
    def from_attributions(
        cls,
        attributions: Attributions,
        query: int,
        images: ArrayLike | Sequence[ArrayLike],
        generated: ArrayLike | Sequence[ArrayLike],
        origins: Origins,
        *,
        source: str = "generated",
        k: int = 4,
        query_image: ArrayLike | None = None,
        title: str | None = None,
    ) -> PlayerViewDisplay:
        """Choose the samples of one query and make its display.

        Parameters
        ----------
        attributions
            What ``game.machine("D").explain(X)`` returned.
        query
            Which query of it, 0 … Q - 1.
        images
            Real images in id order, of shapes as `pathkernel.plotting.AttributionDisplay` takes them.
        generated
            Images of the source in the order of its columns: ``game.samples("D", "generated")``.
        origins
            Their origins: ``game.origins("D")["generated"]``.
        source
            Its name.
        k
            How many samples on either side, real and generated.
        query_image
            Image of the query, or None.
        title
            By default the query.

        Returns
        -------
        PlayerViewDisplay
            Not yet drawn.

        Raises
        ------
        PathKernelError
            If `query` or `source` is not of these attributions, or there is not one image and one origin for each
            column.
        """
        if source not in attributions.sources or not 0 <= query < len(attributions.shares):
            raise PathKernelError(
                f"Query {query} and the source {source!r} were asked for",
                f"There are {len(attributions.shares)} queries and the sources {list(attributions.sources)}",
                "Explain the player that was trained on generated samples, and name their source",
            )
        columns = attributions.sources[source]
        shares = np.asarray(attributions.shares[query], dtype=np.float64)
        of_real = shares[: min(part.start for part in attributions.sources.values())]
        of_source = shares[columns]
        for name, given, expected in (
            ("images", images, len(of_real)),
            ("generated", generated, len(of_source)),
            ("origins", origins, len(of_source)),
        ):
            if len(given) != expected:  # type: ignore[arg-type]
                raise PathKernelError(
                    f"There are {len(given)} `{name}` for {expected} columns of the shares",  # type: ignore[arg-type]
                    "Images and origins are in the order of the columns, one for each",
                    f"Pass `game.samples(player, {source!r})` and `game.origins(player)[{source!r}]`",
                )
        chosen = {name: strongest(of_source, name, k) for name in ("raising", "lowering")}
        known = origins.known
        makers = sorted(set(origins.maker[known]))
        edges = _edges(origins.made_at[known])
        sums = [
            np.histogram(origins.made_at[known], bins=edges, weights=part(of_source[known], 0.0))[0]
            for part in (np.maximum, np.minimum)
        ]
        return cls(
            real={name: samples_with_images(of_real, strongest(of_real, name, k), images, "images") for name in chosen},
            generated={
                name: samples_with_images(of_source, own, generated, "generated") for name, own in chosen.items()
            },
            times={name: [int(origins.made_at[i]) for i in own] for name, own in chosen.items()},
            edges=edges,
            raised=sums[0],
            lowered=sums[1],
            query_image=None if query_image is None else as_image(query_image, "query_image"),
            title=f"Query {int(attributions.query_index[query])}" if title is None else title,
            maker=", ".join(makers) or "nobody",
        )

    def plot(self, ax: Axes | None = None, *, cmap: str = "gray") -> PlayerViewDisplay:
        """Draw query, real samples, generated samples and the bars over time from left to right.

        Parameters
        ----------
        ax
            Axes whose place the parts take, or None for a new figure.
        cmap
            Colour map of images without colours; ``"gray_r"`` suits ink on paper.

        Returns
        -------
        PlayerViewDisplay
            This object, with `axes_`, `ax_` and `figure_`.
        """
        counts = {kind: max(map(len, (*getattr(self, kind).values(), [0]))) for kind in ("real", "generated")}
        widths = {"query": 1.5, **{kind: 0.95 * count for kind, count in counts.items()}, "time": 3.4}
        if self.query_image is None:
            del widths["query"]
        with styled():
            size = (sum(widths.values()) + 0.9, 3.6)
            self.figure_, page = several_axes(ax, size, 2, 1, height_ratios=[0.08, 1.0], hspace=0.0)
            heading(self.figure_, page[0], self.title, fontsize=12)
            grid = page[1].subgridspec(1, len(widths), width_ratios=list(widths.values()), wspace=0.12)
            cells = dict(zip(widths, grid, strict=True))
            self.axes_ = {}
            if self.query_image is not None:
                query = cells["query"].subgridspec(2, 1, height_ratios=[HEADING, 2.0 + HEADING], hspace=0.0)
                heading(self.figure_, query[0], "Query", fontsize=10)
                self.axes_["query"] = draw_image(self.figure_, query[1], self.query_image, NEUTRAL, cmap)
            for kind, words in (("real", "Real samples that"), ("generated", "Fakes that")):
                self._draw_rows(cells[kind], kind, words, counts[kind], cmap)
            self.ax_ = self.axes_["time"] = self.figure_.add_subplot(cells["time"])
            self._draw_time(self.ax_)
        return self

    def _draw_rows(self, cell: Any, kind: str, words: str, columns: int, cmap: str) -> None:
        ratios = [HEADING, 1.0, HEADING, 1.0]
        rows = cell.subgridspec(4, columns, height_ratios=ratios, hspace=0.0, wspace=0.05)
        for row, name, what, color in ((0, "raising", "raised it", RAISES), (2, "lowering", "lowered it", LOWERS)):
            samples: list[Sample] = getattr(self, kind)[name]
            title = f"{words} {what}" if samples else f"{words} {what}: none"
            heading(self.figure_, rows[row, :], title, fontsize=10, color=color)
            places = [rows[row + 1, column] for column in range(len(samples))]
            captions = [f"{self.maker} {time}" if time >= 0 else "?" for time in self.times[name]]
            self.axes_[f"{kind} {name}"] = draw_samples(
                self.figure_, places, samples, color, cmap, captions if kind == "generated" else ()
            )

    def _draw_time(self, panel: Axes) -> None:
        middle, width = (self.edges[:-1] + self.edges[1:]) / 2, np.diff(self.edges)
        panel.bar(middle, self.raised, 0.86 * width, color=RAISES, label="raised it")
        panel.bar(middle, self.lowered, 0.86 * width, color=LOWERS, label="lowered it")
        panel.step(
            self.edges, np.append(self.raised + self.lowered, 0.0), where="post", color=NEUTRAL, label="together"
        )
        panel.axhline(0.0, color=NEUTRAL, linewidth=0.8)
        panel.set_title("Fakes by their time", fontsize=10)
        panel.set(xlabel=f"step of {self.maker} at which they were made", ylabel="sum of shares")
        panel.legend(loc="best")


def _edges(times: NDArray[np.int64]) -> NDArray[np.float64]:
    """Steps between which shares are added up, at most `BARS` stretches of whole steps."""
    last = int(times.max()) + 1 if len(times) else 1
    stretch = -(-last // BARS)
    return np.arange(0, last + stretch, stretch, dtype=np.float64)
