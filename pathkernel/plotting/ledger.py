"""Ledgers of a run as pictures: what finite steps did to the loss, and what samples, modules and steps did to it."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pathkernel.dynamics.finite_steps import RegularizationLedger
from pathkernel.dynamics.loss_shares import LossLedger
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, RAISES, TASK, several_axes, styled, written

COLORS = {
    "flow": RAISES,
    "regularization": LOWERS,
    "batches": TASK,
    "weight_decay": "#CC79A7",
    "start": "#E69F00",
    "remainder": NEUTRAL,
}
"""Of the parts of a ledger; those written as numbers, of Okabe and Ito's palette, mean nothing elsewhere."""


class RegularizationDisplay:
    """Change of the loss by each cause: over the run on a scale that small ones are seen on, and in all.

    Parameters
    ----------
    ledger
        As `pathkernel.dynamics.regularization_ledger` returns it.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes
        Over the run, and in all.
    ax_ : matplotlib Axes
        The first.
    figure_ : matplotlib Figure
        Their figure.
    """

    axes_: NDArray[np.object_]
    ax_: Axes
    figure_: Figure

    def __init__(self, ledger: RegularizationLedger) -> None:
        self.ledger = ledger

    def plot(self, ax: Axes | None = None) -> RegularizationDisplay:
        """Draw both panels.

        Parameters
        ----------
        ax
            Axes whose place the two take, or None for a new figure.

        Returns
        -------
        RegularizationDisplay
            This object, with `axes_`, `ax_` and `figure_`.
        """
        with styled():
            self.figure_, grid = several_axes(ax, (9.2, 3.6), 1, 2, width_ratios=[1.3, 1.0], wspace=0.1)
            self.axes_ = np.array([self.figure_.add_subplot(grid[k]) for k in range(2)], dtype=object)
            self.ax_ = self.axes_[0]
            self._draw_course(self.axes_[0])
            self._draw_sums(self.axes_[1])
        return self

    def _draw_course(self, panel: Axes) -> None:
        for name, steps in self.ledger.steps.items():
            course = np.concatenate([[0.0], np.cumsum(steps)])
            panel.plot(self.ledger.times, course, color=COLORS[name], label=name.replace("_", " "))
        smallest = min(max(np.abs(np.cumsum(steps)).max(), 1e-12) for steps in self.ledger.steps.values())
        panel.set_yscale("symlog", linthresh=smallest)
        panel.axhline(0.0, color=NEUTRAL, linewidth=0.8)
        panel.set(xlabel="time", ylabel="change of the loss so far", title="What moved the training loss")
        panel.margins(x=0.02)
        panel.legend(loc="best")

    def _draw_sums(self, panel: Axes) -> None:
        sums = {name: float(value) for name, value in self.ledger.loss.parts.items()}
        sums["remainder"] = float(self.ledger.loss.remainder)
        scale = max(abs(value) for value in sums.values())
        places = np.arange(len(sums))[::-1]
        panel.barh(places, [abs(v) for v in sums.values()], color=[COLORS[name] for name in sums], height=0.62)
        for place, value in zip(places, sums.values(), strict=True):
            panel.annotate(
                written(value, abs(value) or scale, sign=True),
                (abs(value), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        panel.set_yticks(places, [name.replace("_", " ") for name in sums])
        if scale:
            panel.set_xscale("log")
            panel.set_xlim(min(abs(value) for value in sums.values() if value) / 3, 30 * scale)  # room for the numbers
        panel.set(xlabel="size of its change of the loss", title="In all")
        panel.tick_params(axis="y", length=0)


class LossLedgerDisplay:
    """Training loss as a sum: sorted samples, modules, and steps.

    Parameters
    ----------
    ledger
        As `pathkernel.dynamics.loss_ledger` returns it.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes
        Samples, modules, steps.
    ax_ : matplotlib Axes
        The samples.
    figure_ : matplotlib Figure
        Their figure.
    """

    axes_: NDArray[np.object_]
    ax_: Axes
    figure_: Figure

    def __init__(self, ledger: LossLedger) -> None:
        self.ledger = ledger

    def plot(self, ax: Axes | None = None) -> LossLedgerDisplay:
        """Draw the three panels.

        Parameters
        ----------
        ax
            Axes whose place the three take, or None for a new figure.

        Returns
        -------
        LossLedgerDisplay
            This object, with `axes_`, `ax_` and `figure_`.
        """
        with styled():
            self.figure_, grid = several_axes(ax, (10.4, 3.4), 1, 3, wspace=0.12)
            self.axes_ = np.array([self.figure_.add_subplot(grid[k]) for k in range(3)], dtype=object)
            self.ax_ = self.axes_[0]
            self._draw_samples(self.axes_[0])
            self._draw_modules(self.axes_[1])
            self._draw_steps(self.axes_[2])
        return self

    def _draw_samples(self, panel: Axes) -> None:
        ordered = np.sort(self.ledger.samples)
        places = np.arange(len(ordered))
        panel.fill_between(places, ordered, where=ordered <= 0, color=RAISES, step="mid", linewidth=0)
        panel.fill_between(places, ordered, where=ordered >= 0, color=LOWERS, step="mid", linewidth=0)
        panel.axhline(0.0, color=NEUTRAL, linewidth=0.8)
        lowered = int((ordered < 0).sum())
        panel.set(
            xlabel=f"training samples, sorted: {lowered} of {len(ordered)} lowered it",
            ylabel="change of the training loss",
            title="Samples",
        )
        panel.margins(x=0.02)

    def _draw_modules(self, panel: Axes) -> None:
        sums = {**self.ledger.modules, **{k.replace("_", " "): v for k, v in self.ledger.channels.items() if v}}
        places = np.arange(len(sums))[::-1]
        values = list(sums.values())
        panel.barh(places, values, color=[LOWERS if value > 0 else RAISES for value in values], height=0.62)
        panel.axvline(0.0, color=NEUTRAL, linewidth=0.8)
        panel.set_yticks(places, [name or "network" for name in sums])
        panel.set(xlabel="change of the training loss", title="Modules and channels")
        panel.tick_params(axis="y", length=0)
        panel.locator_params(axis="x", nbins=5)

    def _draw_steps(self, panel: Axes) -> None:
        course = self.ledger.start + np.concatenate([[0.0], np.cumsum(self.ledger.steps)])
        panel.plot(np.arange(len(course)), course, color=RAISES)
        panel.axhline(self.ledger.end, color=NEUTRAL, linestyle="--", linewidth=1.0)
        panel.set(xlabel="optimizer step", ylabel="training loss so far", title="Steps")
        panel.margins(x=0.02)
