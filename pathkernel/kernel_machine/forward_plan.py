"""Cutting of forward passes to a memory budget; see `pathkernel.kernel_machine.memory_plan`."""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import count, take
from pathkernel.kernel_machine.batch_sizes import BatchSizes, kinds_of_batches
from pathkernel.kernel_machine.memory_budget import refusal, usable_bytes
from pathkernel.kernel_machine.memory_plan import PASSING, STAGE, shortened
from pathkernel.kernel_machine.queries import ProductStep, Queries, Rests
from pathkernel.quadrature import DiscreteGradient, Quadrature
from pathkernel.runtime.allocations import Allocations, allocated, footprint, footprint_of, proportional
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.stage_gradients import WHOLE, Passes

WITHOUT_GRAPH = 2.5
"""`PASSING` for a pass without a graph, in which little else is held than what an operation works on."""

OF_DIRECTION = 3
"""Vectors of P numbers in float64 that a step holds for each direction: as it is given, beside Δ, and without it."""

AT_ONCE = 4096
"""Samples that go through a network at once, at most, for nothing but their outputs. Chosen, not measured."""


def outputs_at_once(function: ModelFunction, theta: Tensor, inputs: PyTree, memory: int) -> int:
    """Samples that go through a network at once for nothing but their outputs; one where a budget is too small.

    What follows takes more, and refuses such a budget with all that it takes.
    """
    usable, n = usable_bytes(memory) / 2, min(AT_ONCE, count(inputs))

    def outputs(n: int) -> Tensor:
        return function.outputs(theta, take(inputs, torch.arange(n) % count(inputs)))

    with Allocations() as allocations:
        outputs(2)
    if WITHOUT_GRAPH * allocations.peak * n / 2 <= usable:
        return AT_ONCE
    most = max(1, footprint(outputs).times(WITHOUT_GRAPH).most(usable, n))
    return AT_ONCE if most == n else most


def plan_forward(
    queries: Queries, gradients: RecordedGradients, quadrature: Quadrature, memory: int
) -> tuple[int, Passes]:
    """Query samples, and samples of a batch, that go through the network at once in a forward sweep.

    Raises
    ------
    InputError
        With both sizes, where the budget does not hold one of each.
    """
    trajectory, samples, usable = gradients.trajectory, count(queries.inputs), usable_bytes(memory)
    segment = next(iter(trajectory.segments()))
    channels, vector = _channels(gradients), 8.0 * trajectory.layout.size
    # Directions along which queries are pushed one after the other, see `forward_sweep`; one of them is tried.
    apart = 2 + bool(gradients.discrepancies)
    others = OF_DIRECTION * vector * (apart - 1)

    def pushed(n: int) -> Any:
        few = queries.block(torch.arange(n) % samples)
        few.forward = None
        zeros = torch.zeros(1, trajectory.layout.size, dtype=torch.float64, device=trajectory.device)
        rests = Rests(0.0, 1) if isinstance(quadrature, DiscreteGradient) else None
        step = ProductStep(few, segment, zeros, rests=rests)
        return shortened(quadrature).average(step)

    # Gradients, displacement, memory and directions of each channel.
    rule, values = trajectory.rule, 8.0 * queries.components * (channels + 8)
    fixed = vector * (STAGE + channels * (2 * rule.stages + len(rule.memory) + 2))
    seen = cache(partial(allocated, pushed))
    kinds = kinds_of_batches(gradients, total=True)
    batch = max(BatchSizes.of_trial(kinds, gradients.most))
    at_once = proportional(seen, vector).plus(others).peak(samples)
    if PASSING * (at_once + batch) + values * samples + fixed <= usable:
        return samples, WHOLE
    query = footprint_of(seen).plus(others).times(PASSING)
    query = query.plus(fixed - vector * channels)
    batches = BatchSizes.of(gradients, kinds)
    resting = fixed + values * samples
    separate = batches.separate.times(PASSING)
    least = max(query.peak(1) + values * samples, resting + max(PASSING * batches.whole, separate.peak(1)))
    if least > usable:
        raise refusal(least, memory)
    passes = separate.most(usable - resting, batches.largest)
    return query.most(usable - values * samples, samples), Passes(sys.maxsize if passes == batches.largest else passes)


def _channels(gradients: RecordedGradients) -> int:
    """Number of channels a displacement is split into, with that of the samples."""
    trajectory = gradients.trajectory
    last = trajectory.store.summary(len(trajectory) - 1).record
    names = {"samples", "rounding", *trajectory.objective.regularizers, *last.gradient_changes}
    if trajectory.initial_memory:
        names.add("memory")
    if gradients.discrepancies:
        names.add("unexplained")
    step = trajectory.store.read(0)  # where a forward sweep begins
    for name in list(step.active)[:1]:
        parameter = trajectory.layout.unflatten(step.before)[name].double()
        for of in (trajectory.rule.gradient_sources, trajectory.rule.displacement_sources):
            names |= of(parameter, step.frozen[name], step.hyperparameters_of(name)).keys()
    return len(names)
