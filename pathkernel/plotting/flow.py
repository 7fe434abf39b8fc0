"""Flows as pictures: a network's way in continuous time beside a recorded run, and the energies of a body in motion."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from pathkernel.dynamics.flow import Flow
from pathkernel.dynamics.momentum_flows import EnergyLedger
from pathkernel.errors import PathKernelError
from pathkernel.plotting.appearance import LOWERS, NEUTRAL, RAISES, TASK, several_axes, single_axes, styled
from pathkernel.trajectory.trajectory import Trajectory

RUN: dict[str, Any] = {"color": LOWERS, "marker": "o", "markersize": 2.5, "linewidth": 0.7}
"""A recorded run: its points are what was measured."""


class FlowDisplay:
    """A flow, and a recorded run beside it: the way in the plane in which it moved most, the loss, the distance.

    Parameters
    ----------
    times, losses
        Of the flow, (T,).
    plane
        The flow in the plane of its two principal components, (T, 2).
    run_times, run_losses, run_plane, distance
        The same of a recorded run at its points, (S + 1,) and (S + 1, 2), and ‖θ_s − θ(t_s)‖ at each; None for the flow
        alone.
    name
        What the flow is called.

    Raises
    ------
    PathKernelError
        If the parts of a run are not given together.

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes
        Plane, loss and, with a run, distance.
    ax_ : matplotlib Axes
        The plane.
    figure_ : matplotlib Figure
        Their figure.

    Examples
    --------
    >>> FlowDisplay([0, 1], [2.0, 1.0], [[0, 0], [1, 0]]).losses
    array([2., 1.])
    """

    axes_: NDArray[np.object_]
    ax_: Axes
    figure_: Figure

    def __init__(
        self,
        times: ArrayLike,
        losses: ArrayLike,
        plane: ArrayLike,
        *,
        run_times: ArrayLike | None = None,
        run_losses: ArrayLike | None = None,
        run_plane: ArrayLike | None = None,
        distance: ArrayLike | None = None,
        name: str = "flow",
    ) -> None:
        self.times, self.losses = np.asarray(times, dtype=np.float64), np.asarray(losses, dtype=np.float64)
        self.plane, self.name = np.asarray(plane, dtype=np.float64), name
        given = [run_times, run_losses, run_plane, distance]
        if any(one is None for one in given) != all(one is None for one in given):
            raise PathKernelError(
                "Part of a recorded run was given to a picture of a flow",
                "`run_times`, `run_losses`, `run_plane` and `distance` come together",
                "Write `FlowDisplay.from_flow(flow, trajectory)`",
            )
        found = (None if one is None else np.asarray(one, dtype=np.float64) for one in given)
        self.run_times, self.run_losses, self.run_plane, self.distance = found

    @classmethod
    def from_flow(cls, flow: Flow, trajectory: Trajectory | None = None) -> FlowDisplay:
        """Compare a flow with a run and make their display.

        Parameters
        ----------
        flow
            As the functions of `pathkernel.dynamics` return it.
        trajectory
            A recorded run from the same start; None for the flow alone.

        Returns
        -------
        FlowDisplay
            Not yet drawn.

        Raises
        ------
        InputError
            As `Flow.distance`.
        """
        theta = flow.theta.double().cpu().numpy()
        away = theta - theta[0]
        directions = np.linalg.svd(away, full_matrices=False)[2][:2]
        directions = np.pad(directions, ((0, 2 - len(directions)), (0, 0)))
        if trajectory is None:
            return cls(flow.times, flow.losses, away @ directions.T, name=flow.system.name)
        beside = flow.distance(trajectory)
        points = [trajectory.vector(s).to(flow.theta) for s in range(len(beside.times))]
        run = np.stack([point.double().cpu().numpy() for point in points])
        with flow.system.loss.held():
            losses = [float(flow.system.loss.value(point)) for point in points]
        return cls(
            flow.times,
            flow.losses,
            away @ directions.T,
            run_times=beside.times,
            run_losses=losses,
            run_plane=(run - theta[0]) @ directions.T,
            distance=beside.distance,
            name=flow.system.name,
        )

    def plot(self, ax: Axes | None = None) -> FlowDisplay:
        """Draw the panels side by side.

        Parameters
        ----------
        ax
            Axes whose place the panels take, or None for a new figure.

        Returns
        -------
        FlowDisplay
            This object, with `axes_`, `ax_` and `figure_`.
        """
        panels = 2 if self.distance is None else 3
        with styled():
            self.figure_, grid = several_axes(ax, (1.2 + 3.1 * panels, 3.2), 1, panels, wspace=0.12)
            self.axes_ = np.array([self.figure_.add_subplot(grid[k]) for k in range(panels)], dtype=object)
            self.ax_ = self.axes_[0]
            self._draw_plane(self.axes_[0])
            self._draw_losses(self.axes_[1])
            if self.distance is not None:
                self._draw_distance(self.axes_[2])
        return self

    def _draw_plane(self, panel: Axes) -> None:
        panel.plot(self.plane[:, 0], self.plane[:, 1], color=RAISES, label=self.name)
        if self.run_plane is not None:
            panel.plot(self.run_plane[:, 0], self.run_plane[:, 1], label="recorded run", **RUN)
        panel.plot(*self.plane[0], marker="s", markersize=5, color=NEUTRAL, linestyle="none", label="start")
        panel.set(xlabel="first principal direction", ylabel="second", title="Way of the parameters")
        panel.locator_params(nbins=5)
        panel.legend(loc="best")

    def _draw_losses(self, panel: Axes) -> None:
        panel.plot(self.times, self.losses, color=RAISES)
        if self.run_times is not None and self.run_losses is not None:
            panel.plot(self.run_times, self.run_losses, **RUN)
        if (self.losses > 0).all():
            panel.set_yscale("log")
        panel.set(xlabel="time", ylabel="training loss", title="Loss")
        panel.grid(True, axis="y")

    def _draw_distance(self, panel: Axes) -> None:
        assert self.distance is not None
        panel.plot(self.run_times, self.distance, **RUN)
        panel.set(xlabel="time", ylabel=r"$\|\theta_s - \theta(t_s)\|$", title="Distance of the run")
        panel.set_ylim(bottom=0.0)
        panel.grid(True, axis="y")


class EnergyDisplay:
    """Energies of a body with friction over time, one above the other: their sum stays where it was.

    Parameters
    ----------
    ledger
        As `pathkernel.dynamics.energy_ledger` returns it.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The picture.
    figure_ : matplotlib Figure
        Its figure.

    Examples
    --------
    >>> ledger = EnergyLedger(np.arange(2.0), np.array([1.0, 0.5]), np.array([0.0, 0.3]), np.array([0.0, 0.2]))
    >>> EnergyDisplay(ledger).ledger.residual < 1e-12
    True
    """

    ax_: Axes
    figure_: Figure

    def __init__(self, ledger: EnergyLedger) -> None:
        self.ledger = ledger

    def plot(self, ax: Axes | None = None) -> EnergyDisplay:
        """Draw the energies.

        Parameters
        ----------
        ax
            Axes to draw in, or None for a new figure.

        Returns
        -------
        EnergyDisplay
            This object, with `ax_` and `figure_`.
        """
        kinds = {
            "loss": (self.ledger.potential, RAISES),
            "kinetic energy": (self.ledger.kinetic, TASK),
            "lost to friction": (self.ledger.dissipated, NEUTRAL),
        }
        with styled():
            self.figure_, self.ax_ = single_axes(ax, (6.4, 3.6))
            values, colors = zip(*kinds.values(), strict=True)
            self.ax_.stackplot(self.ledger.times, *values, labels=list(kinds), colors=colors, alpha=0.75, linewidth=0)
            self.ax_.axhline(
                self.ledger.potential[0], color=LOWERS, linestyle="--", linewidth=1.2, label="at the start"
            )
            self.ax_.set(xlabel="time", ylabel="energy", title="Where the loss goes")
            self.ax_.margins(x=0)
            self.ax_.set_ylim(bottom=min(0.0, float(self.ledger.potential.min())))
            self.ax_.legend(loc="center right", frameon=True, framealpha=0.9, edgecolor="none")
        return self
