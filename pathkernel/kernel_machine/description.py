"""How a kernel machine takes gradients, in words."""

from __future__ import annotations

import torch

from pathkernel.gradients.gradient_source import BY_ROWS, GradientSource
from pathkernel.gradients.layers.plain import lines_on
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.trajectory.trajectory import Trajectory

FEW = 8
"""Training samples that are passed through the network to see what a tape covers. Chosen, not measured."""


def described(trajectory: Trajectory, function: ModelFunction, engine: str) -> str:
    """Parameters whose gradients come from layers, and those whose gradients are rows, each with the reason.

    Proved of a few training samples at the end of the record, in evaluation mode; some five passes of these.
    """
    if engine in BY_ROWS:
        return f"gradients of all parameters as rows, by engine {engine!r} as asked"
    source = GradientSource(function, engine, 0)
    inputs, _ = trajectory.data[torch.arange(min(FEW, len(trajectory.data)))]
    source.prove(trajectory.final, inputs, function.with_(constants=trajectory.final_buffers))
    coverage = source.tapes.coverage
    assert coverage is not None
    return "\n".join(lines_on(coverage.plain, function.layout))
