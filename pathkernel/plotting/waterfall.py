"""The account of one prediction as a waterfall: initial output, what samples and channels added, output."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from pathkernel.errors import PathKernelError
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, RAISES, written

INITIAL = "initial network"
OUTPUT = "network output"
VISIBLE = 0.005  # a residual narrower than this part of the figure cannot be seen, and gets no bar


def waterfall(attributions: Attributions, query: int) -> list[tuple[str, float, float]]:
    """Add one query's account up, from the initial network to the output.

    initial → + Σ positive shares → + Σ negative shares → + Σ other channels (→ + residual) = output

    Parameters
    ----------
    attributions
        Shares, channels and output.
    query
        Which query, 0 … Q - 1.

    Returns
    -------
    list of (str, float, float)
        Name, start and end of each bar, in units of the output; the first and the last start
        at 0. A bar for the other channels is there if there are any, and one for the
        residual if it is large enough to be seen.

    Raises
    ------
    PathKernelError
        If the query is out of range.
    """
    queries = len(attributions.output)
    if not 0 <= query < queries:
        raise PathKernelError(
            f"`query` is {query}",
            f"These attributions explain queries 0 to {queries - 1}",
            "Count queries in the order they were given to machine.explain",
        )
    shares = np.asarray(attributions.shares[query], dtype=np.float64)
    channels = {name: float(values[query]) for name, values in attributions.channels.items()}
    output = float(attributions.output[query])
    position = channels.pop("initial", 0.0)
    bars = [(INITIAL, 0.0, position)]
    additions = [
        ("samples, raising", float(shares[shares > 0].sum())),
        ("samples, lowering", float(shares[shares < 0].sum())),
    ]
    if channels:
        additions.append(("other channels" if len(channels) > 1 else next(iter(channels)), sum(channels.values())))
    for name, addition in additions:
        bars.append((name, position, position + addition))
        position += addition
    ends = [end for _, _, end in bars]
    if abs(output - position) > VISIBLE * (max(*ends, output, 0.0) - min(*ends, output, 0.0)):
        bars.append(("residual", position, output))
    bars.append((OUTPUT, 0.0, output))
    return bars


def draw_waterfall(panel: Axes, bars: list[tuple[str, float, float]]) -> None:
    """Draw the bars from top to bottom, each beginning where the one above ends.

    Parameters
    ----------
    panel
        Axes to draw in.
    bars
        From `waterfall`.
    """
    edges = [edge for _, start, end in bars for edge in (start, end)]
    low, high = min(edges), max(edges)
    span = (high - low) or 1.0
    for row, (name, start, end) in enumerate(bars):
        total = name in (INITIAL, OUTPUT)
        color = NEUTRAL if total else RAISES if end >= start else LOWERS
        panel.barh(row, end - start, left=start, height=0.62, color=color)
        text = written(end, span) if total else written(end - start, span, sign=True)
        panel.annotate(text, (max(start, end), row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
        if row + 1 < len(bars):
            panel.plot([end, end], [row + 0.31, row + 0.69], color=NEUTRAL, linewidth=0.9)
    panel.axvline(0.0, color=NEUTRAL, linewidth=0.9, zorder=0)
    panel.set_yticks(range(len(bars)), [name.replace("_", " ") for name, _, _ in bars])
    panel.set_ylim(len(bars) - 0.45, -0.55)
    panel.set_xlim(low - 0.04 * span, high + 0.24 * span)  # room for the numbers
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.locator_params(axis="x", nbins=5)
    panel.set(xlabel="output", title="Account of this output")
