"""The scale of the loss under which a step is taken: `torch.amp.GradScaler` takes it, and says so to nobody else."""

from __future__ import annotations

import sys
from types import FrameType

from torch.amp import GradScaler

STEP = GradScaler.step.__code__


def loss_scale() -> float:
    """Factor on the loss in the backward passes of the step being taken; 1 without scaling.

    `GradScaler.step` has divided the gradients by it when it calls the optimizer, or lets a fused optimizer do so. It
    is found among the callers, as optimizers are told of it only where they are fused.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is STEP:
            return float(frame.f_locals["self"].get_scale())
        frame = frame.f_back
    return 1.0
