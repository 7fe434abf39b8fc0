r"""Cotangents :math:`\lambda_i = \partial L / \partial z_i` of a recorded batch: as on record, or computed again."""

from __future__ import annotations

import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.errors import RecordingError, TrajectoryError
from pathkernel.gradients.losses import RETURNED, Objective, output_cotangents
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import leaf_parameters
from pathkernel.gradients.pytrees import count
from pathkernel.gradients.returned import batch_outputs, output_leaves, returned_loss, selected
from pathkernel.trajectory.step import MicroBatch, sampled_places

FEW = 4096
"""Numbers of λ that are kept however small the network is."""

MANY = 2**20
"""Numbers of λ that are kept of a batch where nothing else tells them."""

AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}
"""Difference between λ on record and λ that is computed again, relative to its largest entry, that is rounding: near
interpolation p - y of a softmax cancels."""


def kept_cotangents(cotangents: Tensor, parameters: int, objective: Objective) -> tuple[Tensor | None, Tensor | None]:
    """``cotangents`` and ``sampled_cotangents`` of `MicroBatch`: all of λ while that is little beside θ, else some.

    Raises
    ------
    RecordingError
        Where all of it would have to be kept and is too much.
    """
    numbers = cotangents.numel()
    if numbers <= max(parameters // 4, FEW):
        return cotangents, None
    if objective.loss is None:
        if numbers <= max(parameters, MANY):
            return cotangents, None
        raise RecordingError(
            f"The slopes of the loss at the outputs of a batch are {numbers * cotangents.element_size():,} bytes, for "
            f"{cotangents.shape[0]} samples of {cotangents.shape[1]} outputs each",
            "Without a loss they are kept, while they are no more than the parameters; with one they are computed "
            "again when they are needed",
            'Write `KernelRecorder(..., loss=loss)`, or `loss="returned"` for a network that returns its own loss',
        )
    return None, cotangents.reshape(-1)[sampled_places(numbers).to(cotangents.device)].clone()


def cotangents_of(
    batch: MicroBatch, function: ModelFunction, point: Tensor, objective: Objective, inputs: PyTree, targets: PyTree
) -> Tensor:
    """λ of a recorded batch that is run whole, (B, C) in the order of `pathkernel.gradients.returned.batch_outputs`.

    Raises
    ------
    TrajectoryError
        Where a loss that is evaluated again has other slopes than the one that was trained with.
    """
    if batch.cotangents is not None:
        return batch.cotangents.to(point.device)
    if objective.loss == RETURNED:
        return scaled(batch, returned_cotangents(batch, function, point, inputs))
    return scaled(batch, output_cotangents(function, point, objective, inputs, targets, batch.weights))


def scaled(batch: MicroBatch, cotangents: Tensor) -> Tensor:
    """λ that was computed again, scaled as the loop did (accumulation, loss scaling), and compared with what was kept.

    Raises
    ------
    TrajectoryError
        Where they differ by more than a factor.
    """
    kept = batch.sampled_cotangents
    if kept is None:
        return cotangents
    found = cotangents.reshape(-1)[sampled_places(cotangents.numel()).to(cotangents.device)].double()
    kept = kept.to(found)
    square = (found @ found).item()
    factor = (found @ kept).item() / square if square > 0 else 0.0
    difference, largest = (kept - factor * found).abs().max().item(), kept.abs().max().item()
    if difference > AGREEMENT[min(batch_type(batch), cotangents.dtype, key=lambda d: -torch.finfo(d).eps)] * largest:
        raise TrajectoryError(
            f"The loss has other slopes at the outputs of a recorded batch than in training, by "
            f"{difference / largest:.1%} of the largest",
            "What is too large to be kept is computed again, with the loss that was given: that of the loop, up to a "
            "factor",
            "Give the recorder the loss of the loop as a function of outputs and targets, without a state of its own; "
            'or `loss="returned"` for a network that returns its loss',
        )
    return cotangents * factor


def batch_type(batch: MicroBatch) -> torch.dtype:
    """Floating type of the outputs in training."""
    kept = batch.sampled_cotangents if batch.cotangents is None else batch.cotangents
    return torch.float32 if kept is None else kept.dtype


def returned_cotangents(batch: MicroBatch, function: ModelFunction, point: Tensor, inputs: PyTree) -> Tensor:
    """λ of a network that returns its own loss, by its slope on record, (B, C)."""
    whole = function.whole()
    leaves_of_theta = leaf_parameters(whole, point)
    with whole.evaluating(gradients=True), whole.kept():
        returned = whole.call(leaves_of_theta, whole.cast(inputs))
        loss = returned_loss(returned)
        every = output_leaves(selected(returned, function.returns))
        leaves = [leaf for leaf in every if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if loss is None or not loss.requires_grad:
            raise TrajectoryError(
                "The network returned no loss with a gradient when a recorded batch was run again",
                'With `loss="returned"` it returns one: under the name `loss`, or as the only number without axes',
                "Give the recorder the loss as a function of outputs and targets",
            )
        slope = torch.ones_like(loss) if batch.loss_slope is None else batch.loss_slope.to(loss)
        found = torch.autograd.grad(loss, leaves, slope, allow_unused=True)
    zeros = [torch.zeros_like(z) if gradient is None else gradient for z, gradient in zip(leaves, found, strict=True)]
    return batch_outputs([value.detach() for value in zeros], count(inputs))
