"""What is asked of a trajectory before anything is computed from it."""

from __future__ import annotations

from typing import Any

from pathkernel.errors import check_instance
from pathkernel.trajectory.trajectory import Trajectory


def check_is_trajectory(trajectory: Any) -> None:
    """Refuse what is no trajectory: a folder, a network, a recorder, a class.

    Raises
    ------
    InputError
        With what it is.
    """
    check_instance(
        "trajectory",
        trajectory,
        Trajectory,
        "It is the `Trajectory` of a run that was recorded",
        "Write `recorder.trajectory`, or `Trajectory.open(path, model=model, data=(X, y))` for a run on disk",
    )


def required_path(trajectory: Any, asker: str, at: int | None = None) -> Trajectory:
    """The path, or its first part, found to hold what is asked of it.

    Parameters
    ----------
    trajectory
        The recorded path.
    asker
        What it is asked by; see `Trajectory.require_steps`.
    at
        After how many optimizer steps it ends; None for all of it.

    Raises
    ------
    InputError
        For what is no trajectory, and for a step that there is not.
    TrajectoryError
        For an empty path, and one of which too little was kept.
    ModelMismatchError
        For a network that is no longer the recorded one.
    """
    check_is_trajectory(trajectory)
    path: Trajectory = trajectory if at is None else trajectory.until(at)
    path.require_steps(asker)
    return path
