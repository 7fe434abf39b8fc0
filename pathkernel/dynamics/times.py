"""Points of time: those that a flow keeps, the weights of an integral over them, and those of a recorded run."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pathkernel.dynamics.system import System
from pathkernel.errors import SENSELESS, InputError, brief, is_number, is_whole
from pathkernel.trajectory.trajectory import Trajectory


def grid_of(time: float, times: ArrayLike | None = None, points: int = 65) -> list[float]:
    """Points of time that are kept, from 0 on: those that are given, or so many over [0, time].

    Raises
    ------
    InputError
        For times that do not rise from 0.
    """
    if times is None:
        if not (is_number(time) and time > 0 and is_whole(points) and points >= 2):
            raise InputError(
                f"A flow was asked for with `time={time!r}` and `points={points!r}`",
                "It lasts for a time above 0, and 2 points or more of it are kept",
                "Write for example `time=2.0, points=65`",
            )
        return [float(t) for t in np.linspace(0.0, time, points)]
    given = points_of(times)
    if given.ndim != 1 or len(given) < 2 or given[0] != 0 or not ((np.diff(given) > 0) & (given[1:] < np.inf)).all():
        raise InputError(
            f"A flow was asked for with `times={shown(given)}`",
            "Two or more points of time rise from 0",
            "Write for example `times=numpy.linspace(0, 2, 65)`",
        )
    return [float(t) for t in given]


def times_of(system: System, trajectory: Trajectory) -> list[float]:
    """Times of the recorded points θ_0 … θ_S by a flow's own clock.

    Raises
    ------
    InputError
        For parameter groups with rates of their own, which have no common time.
    """
    times = [0.0]
    for position in range(len(trajectory)):
        record = trajectory.store.summary(position).record
        for settings in record.hyperparameters:
            if settings.get("maximize") or (settings.get("momentum") and settings.get("dampening")):
                raise InputError(
                    f"Step {position} was taken with `maximize` or `dampening`",
                    f"The {system.name} goes downhill, and its clock is that of steps without dampening",
                    "Train with `maximize=False, dampening=0` to compare a run with a flow",
                )
        own = {system.time_of_step(settings) for settings in record.hyperparameters}
        if len(own) > 1:
            raise InputError(
                f"Parameter groups of step {position} have different rates",
                "A run and a flow are compared at equal times, and time is a rate that all parameters share",
                "Train all parameters at one rate to compare them with a flow",
            )
        times.append(times[-1] + own.pop())
    return times


def time_weights(times: np.ndarray) -> np.ndarray:
    """Weights of Simpson's rule for an odd number of evenly spaced times, else of the trapezoid rule, (T,).

    Raises
    ------
    InputError
        For one point alone.
    """
    if len(times) < 2:
        raise InputError(
            "An integral over time was asked of a flow that has one point",
            "Path kernels and explanations are integrals, which need two points or more",
            "Write a later `time`, or `points=65`",
        )
    lengths = np.diff(times)
    if len(times) % 2 and np.allclose(lengths, lengths[0], rtol=1e-9):
        pattern = np.ones(len(times))
        pattern[1:-1:2], pattern[2:-1:2] = 4.0, 2.0
        return pattern * lengths[0] / 3
    return (np.append(lengths, 0.0) + np.append(0.0, lengths)) / 2


def points_of(times: ArrayLike) -> np.ndarray:
    """Points of time as float64 numbers.

    Raises
    ------
    InputError
        For what is no array of numbers.
    """
    try:
        return np.asarray(times, dtype=np.float64)
    except SENSELESS:
        raise InputError(
            f"`times={brief(times)}` was given",
            "Points of time are numbers",
            "Write for example `times=[0.0, 0.5, 1.0]`",
        ) from None


def shown(values: np.ndarray) -> str:
    """Numbers for a message, cut where they are many."""
    return np.array2string(values, threshold=6, edgeitems=2, precision=4)
