"""Quadratures: exact as far as they claim, and of the order that they claim on the training of a network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import LOSSES, SAMPLES, make_inputs, make_model
from hypothesis import given
from hypothesis import strategies as st
from tolerances import ORDER, TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import reference
from pathkernel.quadrature import FixedQuadrature, as_quadrature

DOUBLE = TOLERANCES[torch.float64]
FIXED: list[tuple[FixedQuadrature, int]] = [
    (pk.LeftEndpoint(), 0),
    (pk.Trapezoid(), 1),
    (pk.Midpoint(), 1),
    *((pk.GaussLegendre(n), 2 * n - 1) for n in (1, 2, 3, 4, 8)),
]


class Curve:
    """Scalar functions f_q(θ) along a step θ = start + t Δ in a space of D dimensions, all as functions of t.

    The gradient is f_q'(t) Δ/‖Δ‖² plus a part at right angles to Δ.
    """

    rounding = torch.finfo(torch.float64).eps

    def __init__(self, functions: Any, derivatives: Any, dimensions: int = 3) -> None:
        self.functions, self.derivatives, self.asked = functions, derivatives, 0
        self.displacement = self.change = torch.linspace(0.5, 1.5, dimensions, dtype=torch.float64)
        self.squared_length = float(self.displacement @ self.displacement)
        self.start_value, self.end_value = self.values(0.0), self.values(1.0)
        self.scale = torch.maximum(self.start_value.abs(), self.end_value.abs())
        across = torch.ones(dimensions, dtype=torch.float64)
        self.across = across - (across @ self.displacement) / self.squared_length * self.displacement

    def values(self, t: float) -> Tensor:
        return torch.tensor([f(t) for f in self.functions], dtype=torch.float64)

    def row(self, q: int, t: float) -> Tensor:
        self.asked += 1
        return self.derivatives[q](t) * self.displacement / self.squared_length + math.sin(t) * self.across

    def gradient(self, time: float) -> Tensor:
        return torch.stack([self.row(q, time) for q in range(len(self.functions))])

    def plus_displacement(self, gradient: Tensor, multiples: Tensor) -> Tensor:
        return torch.addr(gradient, multiples, self.displacement)

    def value_and_gradient_at(self, times: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        pairs = list(zip(queries.tolist(), times.tolist(), strict=True))
        values = [self.functions[q](t) for q, t in pairs]
        return torch.tensor(values, dtype=torch.float64), torch.stack([self.row(q, t) for q, t in pairs])


def kink(at: float, before: float = -2.0, after: float = 5.0):
    """|t − at| with two slopes, as a ReLU network crosses a kink."""
    return lambda t: (before if t < at else after) * (t - at) + 1.0, lambda t: before if t < at else after


def at_kinks(*pairs: Any) -> Curve:
    """The step of some functions given with their derivatives."""
    return Curve([f for f, _ in pairs], [derivative for _, derivative in pairs])


@pytest.mark.parametrize(("quadrature", "degree"), FIXED, ids=repr)
def test_nodes_and_weights(quadrature: FixedQuadrature, degree: int) -> None:
    times, weights = np.array(quadrature.nodes).T
    assert weights.sum() == pytest.approx(1, abs=1e-14) and (weights > 0).all()
    assert (times >= 0).all() and (times <= 1).all()
    for power in range(degree + 1):
        assert weights @ times**power == pytest.approx(1 / (power + 1), abs=1e-14)
    assert abs(weights @ times ** (degree + 1) - 1 / (degree + 2)) > 1e-12, "exact beyond its degree"


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_gauss_nodes_are_those_of_the_jacobi_matrix(n: int) -> None:
    np.testing.assert_allclose(np.array(pk.GaussLegendre(n).nodes).T, reference.gauss_legendre(n), atol=1e-14)


@pytest.mark.parametrize(("quadrature", "degree"), FIXED, ids=repr)
def test_a_fixed_average_and_what_it_misses(quadrature: FixedQuadrature, degree: int) -> None:
    powers = [degree + 1, degree + 2]
    step = Curve([lambda t, p=p: t**p for p in powers], [lambda t, p=p: p * t ** (p - 1) for p in powers])
    average = quadrature.average(step)
    changes = average.gradient @ step.change
    assert changes[0] == pytest.approx(1, abs=1e-13), "the derivative has the degree that is exact"
    assert average.error[0] < 1e-13
    assert float(average.error[1]) == pytest.approx(abs(1 - float(changes[1])), abs=1e-14)
    assert float(average.error[1]) > 1e-12
    assert average.evaluations == len(quadrature.nodes) == step.asked / 2


# -- adaptive and discrete --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9, 1e-12])
def test_bisection_meets_its_tolerance_at_kinks(tolerance: float) -> None:
    step = at_kinks(kink(0.3), kink(1 / math.pi, 0.0, 1.0), kink(0.5), (math.exp, math.exp))
    average = pk.Adaptive(tolerance).average(step)
    missed = (step.end_value - step.start_value - average.gradient @ step.change).abs()
    allowed = tolerance * torch.maximum(step.start_value.abs(), step.end_value.abs())
    intervals = 1 + math.log2(1 / tolerance) + 2  # one more for each halving
    assert (missed <= intervals * allowed + 1e-15).all()
    assert (missed <= average.error + 1e-14).all()
    assert average.evaluations == pytest.approx(step.asked / 4)
    assert average.evaluations < 5 * intervals  # a halving costs two times two nodes and the value between


@given(at=st.floats(0.01, 0.99), before=st.floats(-5, 5), after=st.floats(-5, 5))
def test_bisection_at_any_kink(at: float, before: float, after: float) -> None:
    step = at_kinks(kink(at, before, after))
    average = pk.Adaptive(1e-10).average(step)
    missed = float(step.end_value - step.start_value - average.gradient @ step.change)
    scale = max(abs(float(step.start_value)), abs(float(step.end_value)))
    assert abs(missed) <= 64e-10 * scale + 1e-14
    # Off the step's own direction it is an ordinary average: ∫ sin = 1 − cos 1.
    assert float((average.gradient @ step.across) / (step.across @ step.across)) == pytest.approx(
        1 - math.cos(1), abs=2e-4
    )


def test_bisection_refines_only_where_it_has_to() -> None:
    smooth, kinked = Curve([lambda t: t**3], [lambda t: 3 * t**2]), at_kinks(kink(0.3))
    assert pk.Adaptive(1e-9).average(smooth).evaluations == 2
    assert 100 < pk.Adaptive(1e-9).average(kinked).evaluations < 160  # five for each of thirty halvings


def test_bisection_gives_up_in_the_open() -> None:
    jump = Curve([lambda t: float(t > 0.3)], [lambda t: 0.0])  # no gradient accounts for a jump
    for quadrature in (pk.Adaptive(1e-9, max_depth=5), pk.Adaptive(1e-9, max_intervals=2)):
        average = quadrature.average(jump)
        assert float(average.error) == pytest.approx(1)
        assert torch.isfinite(average.gradient).all()


def test_a_step_of_no_length() -> None:
    for quadrature in (pk.Adaptive(), pk.DiscreteGradient(), pk.Trapezoid()):
        still = Curve([lambda t: 2.0], [lambda t: 0.0])
        still.displacement = still.change = torch.zeros(3, dtype=torch.float64)
        still.squared_length = 0.0
        still.row = lambda q, t: torch.ones(3, dtype=torch.float64)  # type: ignore[method-assign]
        average = quadrature.average(still)
        assert torch.equal(average.gradient, torch.ones(1, 3, dtype=torch.float64)) and float(average.error) == 0


@pytest.mark.parametrize("pair", [kink(0.3), kink(0.9, 1.0, -4.0), (math.exp, math.exp)], ids=["-2|5", "1|-4", "exp"])
def test_the_discrete_gradient_is_exact(pair) -> None:
    step = at_kinks(pair, pair)
    average = pk.DiscreteGradient().average(step)
    exact = step.end_value - step.start_value
    torch.testing.assert_close(average.gradient @ step.change, exact, rtol=0, atol=1e-14)
    midpoint = step.gradient(0.5)
    torch.testing.assert_close(average.error, (exact - midpoint @ step.change).abs(), rtol=0, atol=1e-14)
    # The correction is the smallest: along Δ, and nothing at right angles to it.
    torch.testing.assert_close((average.gradient - midpoint) @ step.across, torch.zeros(2).double(), rtol=0, atol=1e-14)
    assert average.evaluations == 1


# -- order of convergence ---------------------------------------------------------------------------------------------

TIME, STEPS = 2.0, (10, 20, 40)


@pytest.fixture(scope="module")
def flows() -> list[tuple[pk.Trajectory, Tensor]]:
    """Full-batch gradient descent for a fixed time with ever smaller steps."""
    X, y = make_inputs(SAMPLES), LOSSES["ce_mean"].targets(SAMPLES)
    found = []
    for steps in STEPS:
        model, loss = make_model("tanh"), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=TIME / steps)
        with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=0) as recorder:
            for _ in range(steps):
                x, target = recorder.batch(range(SAMPLES))
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
        found.append((recorder.trajectory, make_inputs(2, seed=3)))
    return found


ORDERS = [
    (pk.LeftEndpoint(), 1),
    (pk.Trapezoid(), 2),
    (pk.Midpoint(), 2),
    (pk.GaussLegendre(1), 2),
    (pk.GaussLegendre(2), 4),
]


@pytest.mark.parametrize(("quadrature", "order"), ORDERS, ids=repr)
def test_order_of_convergence_in_the_step_size(flows, quadrature, order: int) -> None:
    residuals, bars = [], []
    for trajectory, queries in flows:
        why = pk.KernelMachine(trajectory, quadrature=quadrature).explain(queries, outputs="all")
        residuals.append(np.linalg.norm(why.left_over))
        bars.append(np.linalg.norm(why.quadrature_error * np.abs(why.output - why.initial)))
    slopes = np.log2(np.array(residuals[:-1]) / residuals[1:])
    assert abs(slopes[-1] - order) < ORDER, slopes
    # The error bar is an upper bound of the same order.
    assert all(residual <= bar * (1 + 1e-6) for residual, bar in zip(residuals, bars, strict=True))
    assert abs(np.log2(bars[-2] / bars[-1]) - order) < ORDER


def test_the_error_bar_of_the_discrete_gradient_is_of_second_order(flows) -> None:
    bars = []
    for trajectory, queries in flows:
        why = pk.KernelMachine(trajectory, quadrature="discrete_gradient").explain(queries, outputs="all")
        assert why.relative_residual < DOUBLE.residual
        bars.append(np.linalg.norm(why.quadrature_error * np.abs(why.output - why.initial)))
    assert abs(np.log2(bars[-2] / bars[-1]) - 2) < ORDER


# -- shorthand --------------------------------------------------------------------------------------------------------


def test_strings_are_shorthand() -> None:
    assert as_quadrature("left") == pk.LeftEndpoint()
    assert as_quadrature("trapezoid") == pk.Trapezoid()
    assert as_quadrature("midpoint") == pk.Midpoint()
    assert as_quadrature("gauss_legendre") == pk.GaussLegendre(4)
    assert as_quadrature("adaptive") == pk.Adaptive(1e-9)
    assert as_quadrature("auto") == as_quadrature("discrete_gradient") == pk.DiscreteGradient()
    own = pk.GaussLegendre(7)
    assert as_quadrature(own) is own


def test_quadratures_are_values() -> None:
    assert pk.GaussLegendre(3) == pk.GaussLegendre(3) != pk.GaussLegendre(4)
    assert len({pk.Adaptive(1e-9), pk.Adaptive(1e-9), pk.Adaptive(1e-6)}) == 2
    with pytest.raises(AttributeError):
        pk.GaussLegendre(3).n = 4  # type: ignore[misc]
    assert repr(pk.Adaptive(1e-6)) == "Adaptive(tolerance=1e-06)"
