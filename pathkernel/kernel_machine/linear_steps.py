"""Optimizer steps on new samples, with the network replaced by its first-order expansion at the end of training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.errors import CertificateWarning, TrajectoryError
from pathkernel.gradients.losses import batch_gradient, batch_products, loss_slopes, weighted_gradient
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.gradients.pytrees import count
from pathkernel.gradients.targets import check_targets
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.trajectory.final_state import replay_at_end
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import Memory, UpdateRule, adjoint

SAME = 1e-4
"""Relative difference of outputs in train mode and in evaluation below which they are the same to rounding. Chosen."""


@dataclass(frozen=True)
class LinearStep:
    """One step of the optimizer on the new samples, with the network replaced by its expansion at θ_S.

    Attributes
    ----------
    record
        θ before and after, the gradient, settings and what the rule freezes.
    slopes
        λ of the new samples, (n, C).
    regularizers
        Gradients of terms of the loss that depend on θ alone, by name, (P,) each.
    """

    record: Step
    slopes: Tensor
    regularizers: Mapping[str, Tensor]


def linear_steps(
    trajectory: Trajectory,
    function: ModelFunction,
    inputs: PyTree,
    targets: PyTree,
    steps: int,
    learning_rate: float | None,
) -> tuple[tuple[LinearStep, ...], dict[str, Memory], float]:
    """The steps, the optimizer's linear memory before the first, and `AddedSamples.gradient_error`."""
    theta, objective, n = trajectory.end_of_steps, trajectory.objective, count(inputs)
    with function.evaluating(gradients=False):
        outputs = function.call(function.parameters(theta), function.cast(inputs))
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != (n,):
        raise TrajectoryError(
            f"The network returns a {type(outputs).__name__} for {n} samples",
            "New samples are added to networks that return one tensor with a row for each sample",
            "Give the recorder `returns=` with the key or index of the outputs that the loss takes",
        )
    loss = objective.function("`add_samples`")
    check_targets(lambda: loss(outputs, function.cast(targets)), loss, tuple(outputs.shape[1:]), targets)
    replay = replay_at_end(trajectory)
    last = trajectory.store.summary(len(trajectory) - 1).record
    _warn_of_modes(function.with_(state=replace(last.batches[-1].state, buffers=None)), theta, inputs, outputs)
    changed = {} if learning_rate is None else {"lr": float(learning_rate)}
    settings = tuple({**group, **changed} for group in last.hyperparameters)
    template = replace(last, hyperparameters=settings, batches=(), changes=(), frozen={}, replay=None)
    memory = _memory(replay.state(), trajectory.rule, template)
    taken: list[LinearStep] = []
    largest = 0.0
    for step in range(steps + 1):
        moved = replay.vector() - theta.double()
        pushed = batch_products(function, theta, inputs, moved[None])[0]
        expanded = outputs.double() + pushed.reshape(outputs.shape)
        slopes = loss_slopes(function, objective, expanded.to(outputs.dtype), targets, None, n)
        gradient = weighted_gradient(function, theta, inputs, slopes).double()
        largest = max(largest, gradient.norm().item())
        if step == steps:
            break
        terms = objective.regularizer_gradients(function.converted(torch.float64), replay.vector())
        whole = gradient + sum(terms.values(), torch.zeros_like(gradient))
        taken.append(LinearStep(replay.take(replace(template, gradient=whole)), slopes, terms))
    there = batch_gradient(function, replay.vector().to(function.dtype), objective, inputs, targets).double()
    error = (there - gradient).norm().item() / largest if largest else 0.0
    return tuple(taken), memory, error


def _warn_of_modes(function: ModelFunction, theta: Tensor, inputs: PyTree, evaluated: Tensor) -> None:
    """Warn where the network trains on other outputs than it has in evaluation, of which the expansion is."""
    if function.state.modes is False:
        return
    with function.evaluating(gradients=False):
        # Batch statistics of one sample are an error of torch's.
        trained = result_or_error(
            lambda: function.call(function.parameters(theta), function.cast(inputs)), (ValueError,)
        )
    if isinstance(trained, Tensor):
        difference = float((trained.double() - evaluated.double()).norm() / evaluated.double().norm().clamp_min(1e-300))
        if difference < SAME:
            return
        found = (
            f"In train mode the network returns other outputs for the new samples, by {difference:.1e} of their size"
        )
    else:
        found = f"In train mode the network does not take the new samples ({trained})"
    warnings.warn(
        CertificateWarning(
            found,
            "The prediction is of steps in evaluation mode, as with the running statistics of batch normalization and "
            "without dropout; its remainder does not see what steps in train mode do otherwise",
            "Compare with training on these samples, or record a network without such layers",
        ),
        stacklevel=4,
    )


def _memory(state: Mapping[str, Mapping[str, Any]], rule: UpdateRule, step: Step) -> dict[str, Memory]:
    """Linear memory of the optimizer by parameter name, where there is any."""
    found = {}
    for name in step.active:
        slots = [state.get(name, {}).get(key) for key in rule.of(step.hyperparameters_of(name)).memory]
        if any(isinstance(slot, Tensor) for slot in slots):
            like = next(slot for slot in slots if isinstance(slot, Tensor))
            found[name] = tuple(slot if isinstance(slot, Tensor) else torch.zeros_like(like) for slot in slots)
    return found


def pull_back(
    step: LinearStep, rule: UpdateRule, layout: ParameterLayout, weights: Tensor, memory: dict[str, Memory]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights of a step's gradient, (Q, P), and what its sources and regularisers add, (Q,) each.

    ``memory`` holds the weights of the optimizer's memory after the step, and of that before it afterwards.
    """
    record, pulled = step.record, torch.zeros_like(weights)
    at = layout.unflatten(record.before)
    terms: dict[str, Tensor] = {}

    def add(name: str, weight: Tensor, term: Tensor) -> None:
        terms[name] = terms.get(name, 0) + weight.flatten(1) @ term.flatten().to(weight)

    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in record.active:
            continue
        where, settings, frozen = layout.slices[name], record.hyperparameters_of(name), record.frozen[name]
        own, q = rule.of(settings), weights[:, layout.slices[name]].reshape(-1, *shape)
        after = memory.get(name) or tuple(torch.zeros_like(q) for _ in own.memory)
        (u,), memory[name] = adjoint(own, frozen, settings, q, after)
        pulled[:, where] = u.flatten(1)
        for channel, term in own.gradient_sources(at[name], frozen, settings).items():
            add(channel, u, term)
        for channel, term in own.displacement_sources(at[name], frozen, settings).items():
            add(channel, q, term)
    for channel, gradient in step.regularizers.items():
        add(channel, pulled, gradient)
    return pulled, terms
