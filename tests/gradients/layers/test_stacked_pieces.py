"""What is asked of the gradients at several points at once, against the same asked of each."""

from __future__ import annotations

import pytest
import torch
from networks import network
from torch import Tensor, nn

from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.gradient_source import GradientSource
from pathkernel.gradients.inner_products import contracted, paired_names
from pathkernel.gradients.layers import proved_stacks
from pathkernel.gradients.layers.coverage import ProvedTapes
from pathkernel.gradients.layers.proved_stacks import ProvedStacks
from pathkernel.gradients.layers.stacked_pieces import Directions, StackedPieces
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout

POINTS, MEMORY = 3, 2**28


def taken(name: str, components: int | None) -> tuple[list[FactoredGradients], list[FactoredGradients]]:
    """Gradients of two sets of samples at a few points: of functions of the outputs, and of batches of their own."""
    module, inputs = network(name)
    parameters = {key: p.detach() for key, p in module.named_parameters() if p.requires_grad}
    layout = ParameterLayout.of(parameters)
    theta = layout.flatten(parameters)
    generator = torch.Generator().manual_seed(2)
    thetas = theta + 0.1 * torch.randn(POINTS, layout.size, dtype=theta.dtype, generator=generator)
    function = ModelFunction(module, layout, dtype=theta.dtype)
    source = GradientSource(function, "auto", 0)
    functional = (lambda z, c: z.sum() * c) if components is None else (lambda z, c: z.reshape(-1)[:components] * c)
    context = torch.arange(len(inputs)) + 1.0
    queries = source.gradients_at_points(thetas, inputs, functional, context, components, function)
    batches = torch.stack([inputs.roll(s, 0)[:-1] for s in range(POINTS)])
    outputs = torch.stack([function.outputs(t, own) for t, own in zip(thetas, batches, strict=True)])
    slopes = torch.randn(outputs.shape, dtype=outputs.dtype, generator=generator)
    rows = source.pulled_back_at_points(thetas, batches, slopes, function)
    assert queries is not None and rows is not None
    return queries, rows


def alone(gradients: FactoredGradients) -> FactoredGradients:
    """The same, as if nothing had been taken with them."""
    return FactoredGradients(gradients.layout, gradients.count, gradients.pieces)


@pytest.mark.parametrize("components", [None, 2])
@pytest.mark.parametrize("name", ["mlp", "normalised", "embedding", "convolutions"])
def test_what_is_asked_of_all_points_is_that_of_each(name: str, components: int | None) -> None:
    queries, rows = taken(name, components)
    directions = Directions(torch.randn(POINTS, queries[0].layout.size, dtype=torch.float64))
    for gradients in (queries, rows):
        for s, own in enumerate(gradients):
            assert own.stack is not None and own.stack[1] == s
            own.stack[0].meet(directions)
            torch.testing.assert_close(own @ directions.rows[s], alone(own) @ directions.rows[s])
            torch.testing.assert_close(own.total(), alone(own).total())
            moved = own.plus(torch.ones(len(own), dtype=torch.float64), directions.rows[0])
            torch.testing.assert_close(
                moved @ directions.rows[s],
                alone(own).plus(torch.ones(len(own), dtype=torch.float64), directions.rows[0]) @ directions.rows[s],
            )
    names = paired_names(queries[0], [rows[0]])
    for rates in (dict.fromkeys(names, -0.1), {one: -0.1 * (i + 1) for i, one in enumerate(names)}):
        for q, own in zip(queries, rows, strict=True):
            expected = contracted(alone(q), alone(own), rates, MEMORY)
            torch.testing.assert_close(contracted(q, own, rates, MEMORY), expected)


def test_other_directions_and_other_points_are_taken_by_themselves() -> None:
    queries, rows = taken("mlp", None)
    stack, _ = queries[0].stack or (None, 0)
    assert stack is not None
    matrix = torch.randn(POINTS, queries[0].layout.size, dtype=torch.float64)
    directions = Directions(matrix)
    stack.meet(directions)
    assert stack.along(0, directions.rows[0]) is not None
    assert stack.along(1, directions.rows[0]) is None  # another point's
    assert stack.along(0, matrix[0]) is None  # equal numbers, which nobody compares
    stack.meet(Directions(matrix[:2]))
    assert stack.directions is directions  # of fewer points
    rates = dict.fromkeys(paired_names(queries[0], [rows[0]]), 1.0)
    crossed = contracted(queries[0], rows[1], rates, MEMORY)
    torch.testing.assert_close(crossed, contracted(alone(queries[0]), alone(rows[1]), rates, MEMORY))


def test_weighted_sums_forget_what_they_were_taken_with() -> None:
    queries, _ = taken("mlp", None)
    v = torch.ones(queries[0].layout.size, dtype=torch.float64)
    mean = 0.5 * queries[0] + 0.5 * queries[1]
    assert mean.stack is None
    torch.testing.assert_close(mean @ v, 0.5 * (queries[0] @ v) + 0.5 * (queries[1] @ v))


@pytest.mark.parametrize("broken", ["_summed", "_products", "_paired"])
def test_results_that_are_those_of_other_points_are_seen_before_use(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, inputs = network("mlp")
    parameters = {key: p.detach() for key, p in module.named_parameters()}
    layout = ParameterLayout.of(parameters)
    function = ModelFunction(module, layout, dtype=torch.float64)
    theta = layout.flatten(parameters)
    thetas = torch.stack([theta, 1.1 * theta, 0.9 * theta])
    right = getattr(StackedPieces, broken)

    def turned(self: StackedPieces, *asked: object) -> Tensor | None:
        found = right(self, *asked)
        return None if found is None else found.roll(1, 0)

    assert ProvedStacks(ProvedTapes(function)).record(thetas, inputs, True, 1, function) is not None
    monkeypatch.setattr(StackedPieces, broken, turned)
    assert ProvedStacks(ProvedTapes(function)).record(thetas, inputs, True, 1, function) is None


def test_the_proof_compares_every_layer_that_is_met_in_pairs() -> None:
    """A layer of several positions has no batched product of pairs; it hides none of the others."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each, self.last = nn.Linear(2, 3, dtype=torch.float64), nn.Linear(9, 2, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.each(x.unflatten(1, (3, 2)))).flatten(1))

    module = Mixed()
    parameters = {key: p.detach() for key, p in module.named_parameters()}
    layout = ParameterLayout.of(parameters)
    function, inputs = ModelFunction(module, layout, dtype=torch.float64), network("mlp")[1]
    thetas = torch.stack([layout.flatten(parameters) * (1 + 0.1 * s) for s in range(POINTS)])
    stack = ProvedStacks(ProvedTapes(function)).record(thetas, inputs, True, 1, function)
    assert stack is not None
    found = stack.pieces(stack.outputs[..., :1])
    found.meet(Directions(thetas.double()))
    compared = list(proved_stacks._results(found, 1, layout))
    assert [one.dim() for one, _ in compared] == [1, 1, 2]  # sums, products, and pairs of the last layer alone
    for one, other in compared:
        torch.testing.assert_close(one, other)
