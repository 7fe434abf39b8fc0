"""What rounding left of the gradients of steps that were run together: gathered where it is small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.layers.factors import Dense, Piece
from pathkernel.gradients.layers.stacked_pieces import StackedPieces
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.kernel_machine.accumulator import Accumulator
from pathkernel.kernel_machine.scaled_steps import ScaledSteps
from pathkernel.trajectory.stage_gradients import ROUNDING

QUERIES, SIZE, POINTS = 3, 5, 4
LAYOUT = ParameterLayout(("weight",), (torch.Size([SIZE]),))
EPSILON = torch.finfo(torch.float64).eps


def gradients_at_points() -> tuple[Tensor, list[FactoredGradients]]:
    """Gradients of a few queries at points that differ much, (k, Q, P), and in factored form."""
    values = torch.randn(POINTS, QUERIES, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stack = StackedPieces([Piece(slice(0, SIZE), Dense(values[0].unsqueeze(1)))], [[values.unsqueeze(2)]])
    return values, [FactoredGradients(LAYOUT, QUERIES, stack.at(s), stack=(stack, s)) for s in range(POINTS)]


@pytest.mark.parametrize("dense", [False, True], ids=["one rate", "a rate of each entry"])
@pytest.mark.parametrize("size", [0.1, 1e3])
def test_rests_are_gathered_below_the_rounding_of_the_weights(size: float, dense: bool) -> None:
    values, gradients = gradients_at_points()
    generator = torch.Generator().manual_seed(1)
    rests = size * EPSILON * torch.randn(POINTS, SIZE, dtype=torch.float64, generator=generator)
    rate = torch.linspace(-0.2, -0.1, SIZE, dtype=torch.float64) if dense else -0.1
    theta = torch.ones(SIZE, dtype=torch.float64)
    steps = ScaledSteps(LAYOUT, Accumulator.start(torch.zeros(QUERIES, dtype=torch.float64)), 2**20)
    for q, rest in zip(gradients, rests, strict=True):
        assert ROUNDING not in steps.accumulator.channels
        steps._gather(q, rest, rate, theta)
    found = steps.accumulator.channels[ROUNDING]
    each = torch.einsum("sqp,sp->q", values, rests * rate)
    together = values[-1] @ (rests * rate).sum(dim=0)
    torch.testing.assert_close(found, together if size < 1 else each, rtol=1e-9, atol=0)
    assert (found - each).norm() <= POINTS * EPSILON * theta.norm() * values.norm()


def test_rests_of_steps_that_break_off_are_not_lost() -> None:
    values, gradients = gradients_at_points()
    _, others = gradients_at_points()
    theta, rest = torch.ones(SIZE, dtype=torch.float64), torch.full((SIZE,), EPSILON, dtype=torch.float64)
    steps = ScaledSteps(LAYOUT, Accumulator.start(torch.zeros(QUERIES, dtype=torch.float64)), 2**20)
    steps._gather(gradients[0], rest, -0.5, theta)
    steps._gather(others[1], rest, -0.5, theta)  # of steps that were run together with other ones
    first = values[0] @ (-0.5 * rest)
    torch.testing.assert_close(steps.accumulator.channels[ROUNDING], first, rtol=1e-12, atol=0)
    steps.settle()  # where the sweep ends
    second = values[1] @ (-0.5 * rest)
    torch.testing.assert_close(steps.accumulator.channels[ROUNDING], first + second, rtol=1e-12, atol=0)
    steps.settle()
    torch.testing.assert_close(steps.accumulator.channels[ROUNDING], first + second, rtol=1e-12, atol=0)
