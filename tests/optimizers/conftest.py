"""What the tests of optimizers share: a potential with a known gradient, and a recorded training run by closures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCHES, LOSSES, QUERIES, SAMPLES, make_inputs, make_model
from torch import Tensor, nn
from torch.optim import Optimizer

import pathkernel as pk

HESSIAN = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.5]])
START = np.array([1.0, -0.8, 0.6])


class Potential:
    """L(θ) = ½ θᵀHθ + ¼ Σ θ⁴, its gradient by hand, and what an optimizer makes of it."""

    start = START

    def value(self, theta: np.ndarray) -> float:
        return theta @ HESSIAN @ theta / 2 + (theta**4).sum() / 4

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        return HESSIAN @ theta + theta**3

    def descend(self, make: Callable[[list[Tensor]], Optimizer], steps: int) -> np.ndarray:
        """θ_0 … θ_S by an optimizer, which sees two parameters, (S + 1, 3)."""
        theta = torch.tensor(START)
        parameters = [theta[:1].clone().requires_grad_(), theta[1:].clone().requires_grad_()]
        optimizer, hessian, path = make(parameters), torch.tensor(HESSIAN), []

        def closure() -> Tensor:
            optimizer.zero_grad()
            joined = torch.cat(parameters)
            value = joined @ hessian @ joined / 2 + (joined**4).sum() / 4
            value.backward()
            return value

        for _ in range(steps):
            path.append(torch.cat(parameters).detach().numpy().copy())
            optimizer.step(closure)
        return np.stack([*path, torch.cat(parameters).detach().numpy()])


@pytest.fixture
def potential() -> Potential:
    return Potential()


def _record(
    make: Callable[[Any], Optimizer],
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float64,
    edit: Callable[[pk.KernelRecorder, nn.Module], None] | None = None,
) -> tuple[pk.Trajectory, nn.Module, Tensor]:
    """Train a small tanh network in mini-batches by ``step(closure)``: the record, the network, and some queries."""
    case = LOSSES["ce_mean"]
    model = make_model("tanh", case.outputs, dtype) if model is None else model
    X, y = make_inputs(SAMPLES, dtype=dtype), case.targets(SAMPLES, dtype)
    X[:, 0] = 0  # so that some entries of the gradient are exactly 0
    optimizer = make(model.parameters())
    with pk.KernelRecorder(model, optimizer, case.loss, data=(X, y), rule=optimizer.rule()) as recorder:
        for ids in (*BATCHES, *BATCHES):
            x, target = recorder.batch(list(ids))

            def closure(x: Tensor = x, target: Tensor = target) -> Tensor:
                optimizer.zero_grad()
                value = case.loss(model(x), target)
                value.backward()
                if edit is not None:
                    edit(recorder, model)
                return value

            optimizer.step(closure)
    return recorder.trajectory, model, make_inputs(QUERIES, dtype=dtype, seed=3)


@pytest.fixture
def record() -> Callable[..., tuple[pk.Trajectory, nn.Module, Tensor]]:
    return _record


def _assert_complete(
    trajectory: pk.Trajectory, model: nn.Module, queries: Tensor, quadrature: Any, tolerance: float
) -> None:
    machine = pk.KernelMachine(trajectory, quadrature=quadrature)
    why = machine.explain(queries, outputs=1)
    with torch.no_grad():
        says = model.eval()(queries).double().numpy()
    assert why.relative_residual < tolerance
    np.testing.assert_allclose(why.output, says[:, 1], rtol=0, atol=tolerance)
    np.testing.assert_allclose(machine.decision_function(queries), says, rtol=0, atol=tolerance)
    unexplained = why.channels.get("rounding", np.zeros(QUERIES))
    assert np.abs(unexplained).max() < tolerance
    assert np.abs(why.shares).max() > 1e-3


@pytest.fixture
def assert_complete() -> Callable[..., None]:
    return _assert_complete
