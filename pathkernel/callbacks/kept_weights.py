"""Where a network stands on its path, which frameworks may lead back to its best checkpoint when training ends."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pathkernel.trajectory.trajectory import Trajectory


def steps_of_weights(trajectory: Trajectory) -> int | None:
    """After how many steps of its path a network had the weights that it has now.

    Returns
    -------
    The last such number; None where the path ends with them, and where they are not on it.

    Raises
    ------
    TrajectoryError
        Where too little of the path was kept for a kernel machine.
    """
    trajectory.schedule.require("KernelMachine")
    theta = weights_now(trajectory)
    if theta is None or not len(trajectory):
        return None
    if torch.equal(trajectory.end_of_steps.to(theta), theta):
        return len(trajectory) if trajectory.tail else None
    earlier = (steps for steps in range(len(trajectory) - 1, 0, -1) if _is_after(trajectory, steps, theta))
    return next(earlier, None)


def is_at_end(trajectory: Trajectory, model: nn.Module | None = None) -> bool:
    """Test that a network, by default the recorded one, has the weights that its path ends with."""
    theta = weights_now(trajectory, model)
    return theta is not None and torch.equal(trajectory.final.to(theta), theta)


def weights_now(trajectory: Trajectory, model: nn.Module | None = None) -> Tensor | None:
    """θ as a network, by default the recorded one, has it now, (P,); None where it has other parameters."""
    live, layout = dict((model or trajectory.model).named_parameters()), trajectory.layout
    if not all(name in live for name in layout.names):
        return None
    return layout.flatten({name: live[name].detach() for name in layout.names})


def _is_after(trajectory: Trajectory, steps: int, theta: Tensor) -> bool:
    return torch.equal(trajectory.until(steps).end_of_steps.to(theta), theta)
