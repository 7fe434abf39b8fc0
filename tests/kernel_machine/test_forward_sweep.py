"""Predictions: samples and channels are added up before queries are pushed along them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.kernel_machine.curves import PathCurve
from pathkernel.kernel_machine.forward_sweep import BLOCK, forward_sweep
from pathkernel.kernel_machine.queries import Queries, Rests

D = torch.float64

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def recorded(
    optimizer: str, dtype: torch.dtype = D, width: int = 8, epochs: int = 2
) -> tuple[pk.Trajectory, nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
    model = model.to(dtype)
    X, y = torch.randn(40, 4, dtype=dtype), torch.randint(3, (40,))
    made, loss = OPTIMIZERS[optimizer](model.parameters()), nn.CrossEntropyLoss()
    penalty = {"penalty": lambda p: 1e-3 * sum(value.square().sum() for value in p.values())}
    with pk.KernelRecorder(model, made, loss, data=(X, y), regularizers=penalty) as recorder:
        for _ in range(epochs):
            for x, target in recorder.batches(4):
                made.zero_grad()
                total = loss(model(x), target) + 1e-3 * sum(p.square().sum() for p in model.parameters())
                total.backward()
                made.step()
    return recorder.trajectory, model, X[:5]


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of directions along which queries are pushed, pass by pass."""
    found: list[int] = []
    products = Queries.products

    def counted(self: Queries, theta: Tensor, directions: Tensor) -> Tensor:
        found.append(len(directions))
        return products(self, theta, directions)

    monkeypatch.setattr(Queries, "products", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_queries_are_pushed_along_one_direction_at_most_a_step(
    optimizer: str, dtype: torch.dtype, pushed: list[int]
) -> None:
    trajectory, model, X = recorded(optimizer, dtype)
    machine = pk.KernelMachine(trajectory)
    machine.decision_function(X)  # makes its plan
    pushed.clear()
    with torch.no_grad():
        expected = model(X).double()
    limit = 1e-12 if dtype == D else 1e-5
    np.testing.assert_allclose(machine.decision_function(X), expected, rtol=0, atol=limit * expected.abs().max().item())
    assert len(trajectory) == 20
    assert set(pushed) == {1} and len(pushed) <= 3


def test_fixed_nodes_are_pushed_along_the_step_as_well(pushed: list[int]) -> None:
    trajectory, _, X = recorded("momentum")
    machine = pk.KernelMachine(trajectory, quadrature="midpoint")
    machine.decision_function(X)
    pushed.clear()
    machine.decision_function(X)
    assert pushed == [2] * 20


@pytest.mark.parametrize("quadrature", ["auto", "gauss_legendre"])
@pytest.mark.parametrize("form", ["folded", "chord"])
def test_predictions_are_the_sums_of_explanations(form: str, quadrature: str) -> None:
    trajectory, _, X = recorded("adamw")
    machine = pk.KernelMachine(trajectory, form=form, quadrature=quadrature)
    why = machine.explain(X, outputs="all")
    summed = why.shares.sum(axis=1) + sum(why.channels.values())
    np.testing.assert_allclose(machine.decision_function(X).reshape(-1), summed, rtol=0, atol=1e-12)


def test_points_inside_a_step_are_let_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, _, X = recorded("adamw")
    points: list[weakref.ref[Tensor]] = []
    products = Queries.products

    def noted(self: Queries, theta: Tensor, directions: Tensor) -> Tensor:
        assert sum(point() is not None for point in points) == 0
        points.append(weakref.ref(theta))
        return products(self, theta, directions)

    monkeypatch.setattr(Queries, "products", noted)
    pk.KernelMachine(trajectory, quadrature=pk.GaussLegendre(3)).predict(X)
    assert len(points) >= 3 * len(trajectory)


def test_a_displacement_that_is_not_the_samples_is_not_made_up_for() -> None:
    """The change of f is known for the step alone: what is off it is pushed."""
    trajectory, _, X = recorded("momentum", epochs=1)
    machine = pk.KernelMachine(trajectory)
    curve = machine._curve(machine._selection.every_output(X))
    assert isinstance(curve, PathCurve)
    right = forward_sweep(curve, machine._recorded)
    stages = machine._recorded.stages

    def off(*arguments: Any, **named: Any) -> Any:
        found = stages(*arguments, **named)
        found[0].total.mul_(1.0 + 1e-3)
        return found

    machine._recorded.stages = off  # type: ignore[method-assign]
    wrong = forward_sweep(curve, machine._recorded)
    moved = (curve.final - curve.initial).abs().max()
    apart = (sum(wrong.channels.values()) - sum(right.channels.values())).abs().max()
    assert 1e-4 < apart / moved < 1e-2


def test_long_vectors_step_in_blocks() -> None:
    trajectory, model, X = recorded("adamw", width=200, epochs=1)
    assert trajectory.layout.size > BLOCK
    with torch.no_grad():
        expected = model(X)
    found = pk.KernelMachine(trajectory).decision_function(X)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_rests_are_gathered_while_they_are_rounding() -> None:
    theta, rests = torch.ones(4, dtype=D), Rests(1e-3, steps=3)
    small, large = torch.full((1, 4), 1e-4, dtype=D), torch.full((1, 4), 1e-1, dtype=D)
    assert rests.due(small.clone(), theta) is None and rests.due(small.clone(), theta) is None
    third = rests.due(small.clone(), theta)
    assert third is not None and rests.held is None
    torch.testing.assert_close(third, 3 * small)
    assert rests.due(small.clone(), theta) is None
    together = rests.due(large.clone(), theta)
    assert together is not None
    torch.testing.assert_close(together, small + large)
    two = torch.cat([small, small])
    apart = rests.due(two.clone(), theta)
    assert apart is not None
    torch.testing.assert_close(apart, two)
