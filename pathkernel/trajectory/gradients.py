"""The gradient of a recorded batch, sample by sample, and how it compares with the one on record."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pathkernel._typing import Float, PyTree
from pathkernel.functional import ModelFunction, ParameterLayout, as_tensors, blocks, sample_gradients, take
from pathkernel.trajectory.samples import Samples
from pathkernel.trajectory.step import MicroBatch

GRADIENT_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}
"""Relative difference between a recorded gradient and its recomputation that is still rounding.

Near interpolation the residuals p − y of a softmax cancel: in float32 a correct recomputation is then off by up to a
percent, while a single wrong sample in a batch of 64 moves the gradient by far more.
"""


def samples_of(batch: MicroBatch, data: Samples) -> tuple[PyTree, PyTree]:
    """Inputs and targets as the network saw them."""
    inputs, targets = (batch.inputs, batch.targets)
    if inputs is None or targets is None:
        stored_inputs, stored_targets = data[batch.ids]
        inputs = stored_inputs if inputs is None else inputs
        targets = stored_targets if targets is None else targets
    return as_tensors(inputs, data.dtype), as_tensors(targets, data.dtype)


def sample_rows(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    cotangents: Float[Tensor, "B C"],
    memory: int,
) -> Float[Tensor, "B P"]:
    """Rows c_i g_i = J_iᵀ λ_i of a batch, (B, P), in pieces that fit a memory budget in bytes."""
    row_bytes = 4 * function.layout.size * torch.finfo(function.dtype).bits // 8
    pieces = []
    for piece in blocks(len(cotangents), memory // row_bytes):
        gradients = sample_gradients(
            function,
            vector,
            take(inputs, piece),
            lambda outputs, weight: outputs @ weight,
            cotangents[piece],
            scalar=True,
        )
        pieces.append(function.layout.flatten(gradients))
    return torch.cat(pieces)


def mismatch(layout: ParameterLayout, found: Tensor, expected: Tensor) -> tuple[float, float, Mapping[str, float]]:
    """How far a recorded gradient is from a multiple of its recomputation.

    Returns
    -------
    scale
        κ that minimises ‖found − κ expected‖: 1, or what accumulation, clipping and loss scaling made of it.
    relative
        ‖found − κ expected‖ / ‖found‖.
    parameters
        The same by parameter name, relative to the whole ‖found‖.
    """
    found, expected = found.double(), expected.double()
    squared = (expected @ expected).item()
    scale = (found @ expected).item() / squared if squared > 0 else 1.0
    norm = max(found.norm().item(), torch.finfo(torch.float64).tiny)
    difference = found - scale * expected
    by_name = {name: difference[where].norm().item() / norm for name, where in layout.slices.items()}
    return scale, difference.norm().item() / norm, by_name
