r"""The loss of a batch and its derivatives.

The batch loss L is decomposed by the network's outputs: with :math:`\lambda_i = \partial L / \partial z_i`,

.. math:: \nabla_\theta L = \sum_{i \in B} J_i^\top \lambda_i = \sum_{i \in B} c_i\, g_i ,

so that means, sums, class weights, label smoothing and losses that couple samples all come out right without being
named: c_i g_i is what sample i contributed to the gradient that autograd computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathkernel._typing import Float, Loss, PyTree
from pathkernel.errors import InputError
from pathkernel.functional import ModelFunction, cast_floating, take


def batch_loss(loss: Loss, outputs: PyTree, targets: PyTree, weights: Tensor | None, reduction: str) -> Tensor:
    """The scalar whose gradient the loop took.

    Parameters
    ----------
    loss
        ``(output, target) -> `` a scalar, or one number per sample.
    outputs, targets
        Of one batch.
    weights
        (B,) coefficients of the samples' own losses, or None.
    reduction
        ``"mean"`` or ``"sum"`` over a loss that returns one number per sample.
    """
    value = loss(outputs, targets)
    if value.dim() > 0:
        per_sample = value.reshape(value.shape[0], -1).mean(dim=1)
        if weights is not None:
            return per_sample @ weights.to(per_sample)
        return per_sample.mean() if reduction == "mean" else per_sample.sum()
    if weights is None:
        return value
    singles = [loss(take(outputs, slice(i, i + 1)), take(targets, slice(i, i + 1))) for i in range(len(weights))]
    return torch.stack(singles) @ weights.to(value)


def batch_gradient(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    loss: Loss,
    inputs: PyTree,
    targets: PyTree,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Float[Tensor, " P"]:
    """∇L of a whole batch at θ, (P,), by one reverse sweep."""
    theta = vector.to(function.dtype).detach().requires_grad_(True)
    with torch.enable_grad(), function.running():
        outputs = function.call(function.layout.unflatten(theta), cast_floating(inputs, function.dtype))
        targets = cast_floating(targets, function.dtype)
        (gradient,) = torch.autograd.grad(batch_loss(loss, outputs, targets, weights, reduction), theta)
    return gradient


def output_cotangents(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    loss: Loss,
    inputs: PyTree,
    targets: PyTree,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """λ = ∂L/∂z for the outputs of a batch, (B, C)."""
    with torch.no_grad(), function.running():
        outputs = function.call(function.parameters(vector), cast_floating(inputs, function.dtype))
    outputs = outputs.detach().requires_grad_(True)
    with torch.enable_grad():
        targets = cast_floating(targets, function.dtype)
        (cotangents,) = torch.autograd.grad(batch_loss(loss, outputs, targets, weights, reduction), outputs)
    return cotangents.reshape(cotangents.shape[0], -1)


def check_reduction(reduction: str) -> str:
    """Accept ``"mean"`` or ``"sum"``."""
    if reduction not in ("mean", "sum"):
        raise InputError(
            f"`reduction={reduction!r}` was given",
            'A loss with one number per sample is reduced by `"mean"` or `"sum"`, or by the `weights` of each batch',
            'Write `KernelRecorder(..., reduction="mean")`',
        )
    return reduction
