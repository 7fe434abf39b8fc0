"""Heun and the classical Runge–Kutta method: orders, the published equations, and several gradients on record."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import make_model
from scipy.linalg import expm
from tolerances import ORDER, TOLERANCES
from torch import nn

import pathkernel as pk
from pathkernel.errors import InputError, RecordingError
from pathkernel.optimizers.runge_kutta import Heun, RungeKutta4
from pathkernel.testing import check_update_rule

DOUBLE = TOLERANCES[torch.float64]
METHODS = {"heun": (Heun, 2), "runge_kutta_4": (RungeKutta4, 4)}
each_method = pytest.mark.parametrize("method", [Heun, RungeKutta4])


# -- the published equations -------------------------------------------------------------------------------------------


def test_heun_as_published(potential) -> None:
    theta, g = potential.start, potential.gradient
    for point in potential.descend(lambda p: Heun(p, lr=0.1), 8)[1:]:
        predicted = theta - 0.1 * g(theta)
        theta = theta - 0.05 * (g(theta) + g(predicted))
        np.testing.assert_allclose(point, theta, rtol=DOUBLE.rounding)


def test_runge_kutta_4_as_published(potential) -> None:
    theta, h = potential.start, 0.1
    for point in potential.descend(lambda p: RungeKutta4(p, lr=h), 8)[1:]:
        k1 = -potential.gradient(theta)
        k2 = -potential.gradient(theta + h / 2 * k1)
        k3 = -potential.gradient(theta + h / 2 * k2)
        k4 = -potential.gradient(theta + h * k3)
        theta = theta + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        np.testing.assert_allclose(point, theta, rtol=DOUBLE.rounding)


# -- problems with known solutions -------------------------------------------------------------------------------------

HESSIAN = np.array([[1.5, 0.4], [0.4, 0.7]])
FLOWS = {
    "quadratic": (lambda x: x @ torch.tensor(HESSIAN) @ x / 2, lambda x, t: expm(-t * HESSIAN) @ x),
    "quartic": (lambda x: (x**4).sum() / 4, lambda x, t: x / np.sqrt(1 + 2 * t * x**2)),
}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(("method", "order"), METHODS.values(), ids=METHODS)
def test_gradient_flow_is_followed_to_the_order_of_the_method(method, order: int, flow: str) -> None:
    (loss, solution), errors, start = FLOWS[flow], [], np.array([0.8, 0.5])
    for steps in (64, 128):
        theta = torch.tensor(start, requires_grad=True)
        optimizer = method([theta], lr=1.0 / steps)

        def closure(theta=theta, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(theta)
            value.backward()
            return value

        for _ in range(steps):
            optimizer.step(closure)
        errors.append(np.linalg.norm(theta.detach().numpy() - solution(start, 1.0)))
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order, atol=ORDER)


@each_method
def test_it_leaves_the_gradient_of_the_whole_step_and_returns_the_first_loss(method) -> None:
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer, before, losses = method([theta, unused], lr=0.1), theta.detach().clone(), []

    def closure():
        optimizer.zero_grad()
        value = (theta**4).sum()
        value.backward()
        losses.append(value.item())
        return value

    assert optimizer.step(closure).item() == 17.0
    assert len(losses) == method.rule.stages
    torch.testing.assert_close(theta.detach(), before - 0.1 * theta.grad, rtol=1e-15, atol=0)
    assert unused.grad is None and not unused.any()


@each_method
def test_a_step_without_a_closure_says_what_to_write(method) -> None:
    with pytest.raises(InputError, match=r"without a closure.*in the middle of its step.*Write `optimizer\.step\("):
        method([torch.zeros(1, requires_grad=True)], lr=0.1).step()


# -- the kernel machine ------------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_rule_keeps_its_contract(method, dtype: torch.dtype) -> None:
    check_update_rule(method.rule(), lambda p: method(p, lr=0.1), dtype=dtype)


@each_method
@pytest.mark.parametrize("quadrature", [pk.GaussLegendre(4), pk.DiscreteGradient()], ids=str)
def test_nothing_is_left_over(record, assert_complete, method, quadrature) -> None:
    assert_complete(*record(lambda p: method(p, lr=0.1)), quadrature, DOUBLE.residual)


@each_method
def test_every_form_takes_several_gradients_in_a_step(record, method) -> None:
    trajectory, _, queries = record(lambda p: method(p, lr=0.1))
    folded = pk.KernelMachine(trajectory).explain(queries, outputs=0)
    average = pk.KernelMachine(trajectory, form="average").explain(queries, outputs=0)
    np.testing.assert_allclose(average.shares, folded.shares, atol=1e-12)
    gram = pk.PathKernel(trajectory, preconditioner="optimizer")(queries)
    np.testing.assert_allclose(gram, pk.PathKernel(trajectory)(queries), rtol=1e-12)  # b_j sum to 1


@each_method
def test_random_layers_draw_anew_in_every_stage(record, assert_complete, method) -> None:
    model = nn.Sequential(*make_model(), nn.Dropout(0.3))
    torch.manual_seed(4)
    run = record(lambda p: method(p, lr=0.1), model=model)
    (batch,) = next(iter(run[0].steps())).batches
    states = [batch.state.generators["cpu"], *(state.generators["cpu"] for state in batch.later)]
    assert len({tuple(state.tolist()) for state in states}) == method.rule.stages
    assert_complete(*run, "auto", DOUBLE.residual)


@each_method
def test_edits_of_single_gradients_are_refused(record, method) -> None:
    def halve(recorder: pk.KernelRecorder, model: nn.Module) -> None:
        with recorder.channel("noise"):
            for p in model.parameters():
                p.grad *= 0.5

    with pytest.raises(RecordingError, match=r"edited under the name `noise`.*takes \d of them.*one stage"):
        record(lambda p: method(p, lr=0.1), edit=halve)
