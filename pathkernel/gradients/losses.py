r"""The loss of a batch and its derivatives.

The batch loss L is decomposed by the network's outputs: with :math:`\lambda_i = \partial L / \partial z_i`,

.. math:: \nabla_\theta L = \sum_{i \in B} J_i^\top \lambda_i = \sum_{i \in B} c_i\, g_i ,

so that means, sums, class weights, label smoothing and losses that couple samples all come out right without being
named: c_i g_i is what sample i contributed to the gradient that autograd computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pathkernel._typing import Float, Loss, Parameters, PyTree
from pathkernel.errors import InputError, SampleIdError
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import leaf_parameters, output_products, pulled_back
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.gradients.returned import batch_outputs, map_outputs, output_leaves
from pathkernel.runtime.interrupts import deliver_interrupt
from pathkernel.runtime.workspace import give_back_freed_memory

RETURNED = "returned"
"""Stands for the loss that the network itself returns."""


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

    Raises
    ------
    InputError
        For a loss that returns no tensor.
    """
    value = loss(outputs, targets)
    if not isinstance(value, Tensor):
        raise InputError(
            f"The loss returned a {type(value).__name__}",
            "Its value is a tensor, which gradients can be taken of",
            "Leave `.item()` and `float(...)` out of the loss",
        )
    if value.dim() > 0:
        per_sample = value.reshape(value.shape[0], -1).mean(dim=1)
        if weights is not None:
            return per_sample @ weights.to(per_sample)
        return per_sample.mean() if reduction == "mean" else per_sample.sum()
    if weights is None:
        return value
    singles = [loss(take(outputs, slice(i, i + 1)), take(targets, slice(i, i + 1))) for i in range(len(weights))]
    return torch.stack(singles) @ weights.to(value)


@dataclass(frozen=True)
class Objective:
    """Objective that the training loop differentiates.

    Attributes
    ----------
    loss
        ``(output, target)`` of a batch; `RETURNED` for the one that the network itself returns, None where it is not
        known.
    reduction
        See `batch_loss`.
    regularizers
        Terms added to the loss that depend on the parameters alone, by name: ``parameters -> scalar``.
    """

    loss: Loss | str | None
    reduction: str = "mean"
    regularizers: Mapping[str, Callable[[Parameters], Tensor]] = field(default_factory=dict)

    @property
    def known(self) -> Loss | None:
        """The loss where it is a function of outputs and targets."""
        return None if self.loss is None or isinstance(self.loss, str) else self.loss

    def function(self, asker: str) -> Loss:
        """The loss, for who cannot do without.

        Raises
        ------
        InputError
            Where it is not known as a function of outputs and targets.
        """
        loss = self.known
        if loss is None:
            known = "it was not given" if self.loss is None else "the network returns it"
            raise InputError(
                f"{asker} needs the loss as a function of outputs and targets, and {known}",
                "Shares, predictions and path kernels of outputs need no loss; the loss itself, probabilities, and the "
                "path kernel of the loss do",
                "Write `KernelRecorder(..., loss=nn.CrossEntropyLoss())`, and `Trajectory.open(..., loss=...)`",
            )
        return loss

    def regularizer_gradients(self, function: ModelFunction, vector: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """Gradient of each regulariser at θ, (P,)."""
        if not self.regularizers:
            return {}
        theta = function.cast(vector).detach().requires_grad_(True)
        gradients = {}
        for name, regularizer in self.regularizers.items():
            with torch.enable_grad():
                value = regularizer(function.layout.unflatten(theta)) + 0 * theta.sum()  # it may use none of them
                (gradients[name],) = torch.autograd.grad(value, theta)
        return gradients


def batch_gradient(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    objective: Objective,
    inputs: PyTree,
    targets: PyTree,
    weights: Tensor | None = None,
) -> Float[Tensor, " P"]:
    """∇L of a whole batch at θ, (P,), by one reverse sweep; regularisers are left out."""
    leaves = leaf_parameters(function, vector)
    with function.evaluating(gradients=True, fused_attention=True), function.kept():
        outputs = function.call(leaves, function.cast(inputs))
        targets = function.cast(targets)
        loss = objective.function("The gradient of a batch")
        value = batch_loss(loss, outputs, targets, weights, objective.reduction)
        gradients = pulled_back(leaves, value, torch.ones_like(value), retain=False)
    return function.layout.flatten(gradients)


def output_cotangents(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    objective: Objective,
    inputs: PyTree,
    targets: PyTree,
    weights: Tensor | None = None,
) -> Tensor:
    """λ = ∂L/∂z for the outputs of a batch, (B, C) in the order of `batch_outputs`."""
    with function.evaluating(gradients=False):
        outputs = function.call(function.parameters(vector), function.cast(inputs))
    return loss_slopes(function, objective, outputs, targets, weights, count(inputs))


def loss_slopes(
    function: ModelFunction,
    objective: Objective,
    outputs: PyTree,
    targets: PyTree,
    weights: Tensor | None,
    n: int,
) -> Tensor:
    """λ = ∂L/∂z of what the network returned for n samples, (n, C) in the order of `batch_outputs`."""
    floating = lambda leaf: isinstance(leaf, Tensor) and leaf.is_floating_point()  # noqa: E731
    outputs = map_outputs(lambda z: z.detach().requires_grad_(True) if floating(z) else z, outputs)
    leaves = [leaf for leaf in output_leaves(outputs) if floating(leaf)]
    with function.evaluating(gradients=True):
        targets = function.cast(targets)
        loss = objective.function("The slope of a batch")
        value = batch_loss(loss, outputs, targets, weights, objective.reduction)
        found = torch.autograd.grad(value, leaves, allow_unused=True)
    zeros = [torch.zeros_like(z) if gradient is None else gradient for z, gradient in zip(leaves, found, strict=True)]
    return batch_outputs(zeros, n)


def check_slopes(outputs: Float[Tensor, "B C"], cotangents: Tensor) -> None:
    """Refuse slopes from the training pass that are of other outputs than those of the recorded samples.

    Raises
    ------
    SampleIdError
        With both numbers of outputs.
    """
    if outputs.shape != cotangents.shape:
        raise SampleIdError(
            f"A batch of {len(outputs)} samples has outputs of {outputs.shape[1]} numbers each, and slopes of the loss "
            f"at {cotangents.shape[1]} of each were taken from the training pass",
            "The pass of the loop is of the samples that were announced, as the recorder was given them",
            "Check that the ids are those of this batch, and that inputs which differ from the data are passed as "
            "`recorder.batch(ids, inputs=x)`",
        )


def coupled_rows(
    function: ModelFunction, vector: Float[Tensor, " P"], inputs: PyTree, cotangents: Float[Tensor, "B C"]
) -> Float[Tensor, "B P"]:
    """Rows J_iᵀ λ_i where the samples of a batch are coupled (BatchNorm) or the pass is random (dropout).

    One forward pass of the whole batch as it was, then one reverse sweep for each sample's outputs alone: the rows
    still add up to the batch gradient.
    """
    return next(coupled_row_blocks(function, vector, inputs, cotangents, len(cotangents)))


def coupled_row_blocks(
    function: ModelFunction, vector: Float[Tensor, " P"], inputs: PyTree, cotangents: Float[Tensor, "B C"], size: int
) -> Iterator[Float[Tensor, "n P"]]:
    """The rows of `coupled_rows`, a few samples at a time, each few by a forward pass of the whole batch."""
    for block in blocks(len(cotangents), size):
        rows: Tensor | None = None
        samples = range(block.start, block.stop)
        for place, row in enumerate(swept_rows(function, vector, inputs, cotangents, samples)):
            rows = row.new_empty(len(samples), len(row)) if rows is None else rows
            rows[place] = row
        assert rows is not None
        yield rows


def swept_rows(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    cotangents: Float[Tensor, "B C"],
    samples: Iterable[int],
) -> Iterator[Float[Tensor, " P"]]:
    """Rows of `coupled_rows` of some samples, one reverse sweep after the other, behind one forward pass of all."""
    leaves = leaf_parameters(function, vector)
    with function.evaluating(gradients=True), function.kept():
        outputs = function.batch(leaves, function.cast(inputs))
        check_slopes(outputs, cotangents)
        dtype = torch.promote_types(outputs.dtype, function.dtype)  # that of the outputs may be coarser
        for sample in samples:
            own = torch.zeros_like(outputs)
            own[sample] = cotangents[sample].to(outputs)
            yield function.layout.flatten(pulled_back(leaves, outputs, own, retain=True)).to(dtype)
            give_back_freed_memory()
            deliver_interrupt()  # no pass comes between them


def weighted_gradient(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    cotangents: Float[Tensor, "B C"],
    *,
    as_trained: bool = False,
) -> Float[Tensor, " P"]:
    """Σ_i J_iᵀ λ_i by one reverse sweep; ``as_trained`` as for `ModelFunction.evaluating`."""
    leaves = leaf_parameters(function, vector)
    with function.evaluating(gradients=True, as_trained=as_trained, fused_attention=True), function.kept():
        outputs = function.batch(leaves, function.cast(inputs))
        check_slopes(outputs, cotangents)
        return function.layout.flatten(pulled_back(leaves, outputs, cotangents.to(outputs), retain=False))


def batch_products(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    directions: Float[Tensor, "Q P"],
) -> Float[Tensor, "Q B C"]:
    """∇z·v for all outputs of a batch and a few directions, float64, by forward differentiation.

    Where torch has no rule for it, by one row of gradients for each output.
    """
    found = output_products(function, vector, inputs, directions)
    if found is None:
        n, rows = count(inputs), []
        c = function.outputs(vector, take(inputs, slice(0, 1))).shape[1]
        for k in range(c):
            one = torch.zeros(n, c)
            one[:, k] = 1
            own = coupled_rows(function, vector, inputs, one).double()
            rows.append(own @ directions.to(own).T)
        found = torch.stack(rows, dim=1).permute(2, 0, 1)
    return found


TASKS = ("classification", "regression")
"""Tasks that a network may have been trained for."""


def check_task(task: Any) -> str | None:
    """Accept one of `TASKS`, or None."""
    if task is not None and task not in TASKS:
        raise InputError(
            f"`task={task!r}` was given",
            f"It is one of {', '.join(map(repr, TASKS))}, or left out: then the loss and the targets tell",
            'Write `KernelRecorder(..., task="classification")`',
        )
    return task


def check_reduction(reduction: str) -> str:
    """Accept ``"mean"`` or ``"sum"``."""
    if reduction not in ("mean", "sum"):
        raise InputError(
            f"`reduction={reduction!r}` was given",
            'A loss with one number per sample is reduced by `"mean"` or `"sum"`, or by the `weights` of each batch',
            'Write `reduction="mean"`',
        )
    return reduction


def check_recorded_loss(loss: Any) -> Loss | str | None:
    """Accept a function of output and target, `RETURNED`, or None."""
    return loss if loss is None or (isinstance(loss, str) and loss == RETURNED) else check_loss(loss)


def check_loss(loss: Any) -> Loss:
    """Accept a function of output and target; a class is not one yet."""
    if isinstance(loss, type) or not callable(loss):
        given = f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
        made = f"{loss.__name__}()" if isinstance(loss, type) else "nn.CrossEntropyLoss()"
        raise InputError(
            f"`loss` is {given}",
            "A loss is called with the network's output and the target: an instance of a module, or a function",
            f"Write `loss={made}`",
        )
    return loss
