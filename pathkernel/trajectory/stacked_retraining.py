r"""Runs with other weights trained together: one network with parameters (R, …), R times the work in one call.

Gradients come from `torch.func.vmap` over the networks, and the optimizer steps on parameters of shape (R, …), which
for steps that go entry by entry is each network's own step. Rounding differs from the plain replay's, so the gradient
of every network is compared with the plain one before the result is believed.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from pathkernel._typing import Parameters, PyTree
from pathkernel.gradients.losses import batch_loss
from pathkernel.gradients.pytrees import blocks, moved
from pathkernel.gradients.returned import map_outputs
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.trajectory.samples import samples_of
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.weighted_replay import Retraining, WeightedReplay

WORTH_STACKING = 4
"""Runs from which on they are trained together. Chosen: a stacked step costs about two plain ones of a small one."""

STACKED_BYTES = 2**28
"""Room for parameters, gradients and states of networks that are trained together. Chosen, not measured."""

VECTORS = 6
"""Vectors of the size of θ that a network takes meanwhile: θ, gradient, two moments, and what a step makes of them."""

ROUNDINGS = 2**14
"""Roundings up to which two gradients of one batch are the same, relative to their norm: sums in another order, and
what the layers above make of these."""

REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError, KeyError)
"""What torch raises for networks, losses and optimizers that do not run under `torch.func.vmap`."""


class StackedReplay(WeightedReplay):
    """A replay of several networks at once, their parameters (R, …).

    Attributes
    ----------
    weights
        (R, N).
    """

    weights: Tensor

    def spread(self) -> None:
        """Give every network parameters of its own, before the optimizer has a state."""
        n = len(self.weights)
        for name, parameter in self._parameters.items():
            self._parameters[name] = nn.Parameter(parameter.detach().repeat(n, *(1,) * parameter.dim()))

    def vectors(self) -> Tensor:
        """θ of every network, (R, P)."""
        return torch.cat([parameter.detach().flatten(1) for parameter in self._parameters.values()], dim=1)

    def gradients(self) -> Tensor:
        """The gradients at hand, (R, P)."""
        return torch.cat([g.flatten(1) for g in self._gradients()], dim=1)

    def _backward(self, step: Step, batch: MicroBatch, divisor: int, last: bool) -> None:
        objective, state = self.run.objective, batch.state
        loss = objective.function("A replay of steps")
        buffers = step.buffers if state.buffers is None else state.buffers
        assert self._network is not None
        function = self._network.with_(constants=buffers, state=state)
        inputs, targets = samples_of(batch, self.run.data)
        targets = moved(targets, function.device)
        regularizers = objective.regularizers.values() if divisor > 1 or last else ()

        def value(parameters: Parameters, rows: Tensor) -> Tensor:
            outputs = function.call(parameters, inputs)
            if batch.source is None:
                outputs = weighed(outputs, rows)
            found = batch_loss(loss, outputs, targets, batch.weights, objective.reduction)
            for regularizer in regularizers:
                found = found + regularizer(parameters)
            return found / divisor

        taken = {name: self._parameters[name].detach() for name in step.active}
        rest = {name: p.detach() for name, p in self._parameters.items() if name not in step.active}
        rows = self.weights[:, batch.ids]
        with function.evaluating(as_trained=True):
            slopes = vmap(grad(lambda p, frozen, w: value({**frozen, **p}, w)), randomness="same")(taken, rest, rows)
        for name, slope in slopes.items():
            parameter = self._parameters[name]
            parameter.grad = slope if parameter.grad is None else parameter.grad + slope


def weighed(outputs: PyTree, rows: Tensor) -> PyTree:
    """The same outputs, their slopes multiplied by the weights of their rows, (B,)."""

    def weigh(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        own, still = rows.reshape(-1, *(1,) * (leaf.dim() - 1)).to(leaf), leaf.detach()
        return still + own * (leaf - still)

    return map_outputs(weigh, outputs)


def stacked(run: Retraining, rows: Tensor) -> Tensor | None:
    """θ_S under each row of weights (R, N), (R, P), or None where these runs cannot be trained together."""
    per_run = VECTORS * run.run.initial.nbytes
    size = STACKED_BYTES // per_run
    if run.state or not run.run.rule.elementwise or size < WORTH_STACKING:
        return None
    parts = []
    for piece in blocks(len(rows), size):
        found = result_or_error(partial(_trained_together, run, rows[piece]), REFUSALS)
        if found is None or isinstance(found, Exception):
            return None
        parts.append(found)
    return torch.cat(parts)


def _trained_together(run: Retraining, rows: Tensor) -> Tensor | None:
    """θ_S, (R, P), or None where some gradient was another one than the plain replay's."""
    replay = run.replay(StackedReplay)
    replay.weights = rows
    replay.spread()
    plain = run.replay(WeightedReplay)
    seen: set[Hashable] = set()
    for step, divisor in zip(run.steps, run.divisors, strict=True):
        replay.differentiate(step, divisor)
        kind = tuple((batch.ids.shape, repr(batch.state.modes), batch.state.autocast) for batch in step.batches)
        if kind not in seen or step is run.steps[-1]:
            seen.add(kind)
            if not _same_gradients(replay, plain, step, divisor):
                return None
        replay.step_optimizer(step)
    return replay.vectors()


def _same_gradients(replay: StackedReplay, plain: WeightedReplay, step: Step, divisor: int) -> bool:
    """Test that the gradient of each network is that of the plain replay at its own θ with its own weights."""
    found, limit = replay.gradients(), ROUNDINGS * torch.finfo(replay.run.dtype).eps
    for theta, weights, own in zip(replay.vectors(), replay.weights, found, strict=True):
        plain.restore(theta, {})
        plain.weights = weights
        plain.differentiate(step, divisor)
        expected = plain.gradient()
        if not bool((own - expected).norm() <= limit * expected.norm()):
            return False
    return True
