"""Floating type that a kernel machine works in."""

from __future__ import annotations

import torch

from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.low_types import low_types
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.trajectory.trajectory import Trajectory


def unrounded_type(trajectory: Trajectory) -> torch.dtype | None:
    """Type in which a network that enters autocast by itself rounds nothing; None for the recorded one."""

    def low() -> bool:
        with generators_untouched():
            return bool(low_types(trajectory.function(), trajectory.initial, trajectory.data.example[0]))

    return torch.float64 if result_or_error(low, (Exception,)) is True else None
