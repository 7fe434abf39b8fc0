"""Before a step is taken: whether the gradient at hand is that of the announced samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pathkernel.errors import SampleIdError
from pathkernel.losses import batch_gradient
from pathkernel.trajectory.gradients import GRADIENT_TOLERANCE, fit_gradient, samples_of
from pathkernel.trajectory.step import MicroBatch
from pathkernel.trajectory.trajectory import Trajectory


def is_due(index: int, every: int | None) -> bool:
    """Whether a step is audited: every so many, never (0), or, for None, steps 0, 1, 2, 4, 8, … ."""
    if every is None:
        return index & (index - 1) == 0
    return every > 0 and index % every == 0


def audit(
    trajectory: Trajectory,
    index: int,
    batches: Sequence[MicroBatch],
    at: Tensor,
    found: Tensor,
    active: frozenset[str],
    changes: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> None:
    """Compare a gradient with Σ c_i g_i of the announced samples, up to a factor.

    Parameters
    ----------
    trajectory, index
        The record so far, and the number of the step.
    batches
        The announced micro-batches.
    at, found
        θ and the gradient, (P,).
    active
        Names of the parameters that have a gradient; the optimizer skips the others.
    changes
        Named changes of the gradient since the backward pass.
    buffers
        Buffers that have changed since recording began.

    Raises
    ------
    SampleIdError
        Naming the parameters that differ most, and the usual causes.
    """
    function, objective = trajectory.function(), trajectory.objective
    expected = torch.zeros_like(at)
    for batch in batches:
        inputs, targets = samples_of(batch, trajectory.data)
        found_buffers = buffers if batch.state.buffers is None else batch.state.buffers
        replayed = function.replaced(constants=found_buffers, state=batch.state)
        expected += batch_gradient(replayed, at, objective, inputs, targets, batch.weights)
    for gradient in objective.regularizer_gradients(function, at).values():
        expected += gradient
    found = found - sum(changes.values(), torch.zeros_like(found))
    for name, where in trajectory.layout.slices.items():
        if name not in active:
            expected[where] = 0
    types = {trajectory.precision, *(batch.state.autocast[1] for batch in batches if batch.state.autocast)}
    tolerance = max(GRADIENT_TOLERANCE[dtype] for dtype in types)
    fit = fit_gradient(trajectory.layout, found, expected, tolerance)
    largest = max(found.norm().item(), expected.norm().item())
    if fit.relative > tolerance and largest > 1e3 * torch.finfo(at.dtype).eps:
        worst = sorted(fit.parameters, key=lambda name: -fit.parameters[name])[:3]
        raise SampleIdError(
            f"At step {index} the gradient differs from that of the announced samples by {fit.relative:.1%}, most in "
            + ", ".join(f"`{name}` ({fit.parameters[name]:.1%})" for name in worst),
            "The gradient must be the sum over the announced samples of the recorded loss, up to a factor; the "
            "optimizer has not moved",
            "Check that the ids are those of this batch (not shifted or shuffled again), that augmented inputs are "
            "passed as `recorder.batch(ids, inputs=x)`, that `loss` is the loss of the loop, that terms added to it "
            'are named in `regularizers=`, and that edits of gradients stand inside `with recorder.channel("name")`',
        )
