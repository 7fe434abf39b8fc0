"""Steps scaled by a number or entry by entry: as published, as flows, and as a kernel machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import ORDER, TOLERANCES

import pathkernel as pk
from pathkernel.errors import InputError
from pathkernel.optimizers.scaled import Lion, NormalizedDescent, PolyakStep, ScalarRMSprop, SignDescent
from pathkernel.testing import check_update_rule

DOUBLE = TOLERANCES[torch.float64]
OPTIMIZERS = {
    "scalar_rmsprop": lambda p: ScalarRMSprop(p, lr=0.02, alpha=0.9),
    "normalized": lambda p: NormalizedDescent(p, lr=0.03),
    "polyak": lambda p: PolyakStep(p, lr=0.1, minimum=0.01),
    "sign": lambda p: SignDescent(p, lr=0.005),
    "lion": lambda p: Lion(p, lr=0.005, betas=(0.8, 0.9)),
    "lion_decay": lambda p: Lion(p, lr=0.005, weight_decay=0.5),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


# -- the published equations, written once more ------------------------------------------------------------------------


def rmsprop_path(potential, steps, average=0.0):
    theta = potential.start
    for _ in range(steps):
        g = potential.gradient(theta)
        average = 0.9 * average + 0.1 * (g @ g)
        theta = theta - 0.02 * g / (np.sqrt(average) + 1e-8)
        yield theta


def normalized_path(potential, steps):
    theta = potential.start
    for _ in range(steps):
        g = potential.gradient(theta)
        theta = theta - 0.03 * g / np.linalg.norm(g)
        yield theta


def polyak_path(potential, steps):
    theta = potential.start
    for _ in range(steps):
        g = potential.gradient(theta)
        theta = theta - 0.1 * (potential.value(theta) - 0.01) / (g @ g) * g
        yield theta


def sign_path(potential, steps):
    theta = potential.start
    for _ in range(steps):
        theta = theta - 0.005 * np.sign(potential.gradient(theta))
        yield theta


def lion_path(potential, steps, betas=(0.9, 0.99), decay=0.5):
    theta, m = potential.start, np.zeros(3)
    for _ in range(steps):
        g = potential.gradient(theta)
        c = betas[0] * m + (1 - betas[0]) * g
        theta = theta - 0.005 * (np.sign(c) + decay * theta)
        m = betas[1] * m + (1 - betas[1]) * g
        yield theta


PATHS = {
    "scalar_rmsprop": rmsprop_path,
    "normalized": normalized_path,
    "polyak": polyak_path,
    "sign": sign_path,
    "lion": lambda potential, steps: lion_path(potential, steps, (0.8, 0.9), 0.0),
    "lion_decay": lion_path,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_is_the_published_one(potential, name: str) -> None:
    path = potential.descend(OPTIMIZERS[name], 20)
    np.testing.assert_allclose(path[1:], list(PATHS[name](potential, 20)), rtol=DOUBLE.rounding)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"polyak"}))
def test_steps_need_no_closure(potential, name: str) -> None:
    class Plain(torch.optim.Optimizer):
        """Calls the closure itself, as an ordinary loop would, and steps without one."""

        def __init__(self, parameters) -> None:
            super().__init__(parameters, {})
            self.inner = OPTIMIZERS[name](parameters)

        def step(self, closure=None) -> None:
            closure()
            self.inner.step()

    np.testing.assert_array_equal(potential.descend(Plain, 5), potential.descend(OPTIMIZERS[name], 5))


def test_polyak_without_a_closure_says_what_to_write() -> None:
    with pytest.raises(InputError, match=r"`PolyakStep\.step\(\)` was called without a closure"):
        PolyakStep([torch.zeros(1, requires_grad=True)]).step()


@each_optimizer
def test_where_the_gradient_is_zero_nothing_moves(make) -> None:
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = make([theta])

    def closure():
        optimizer.zero_grad()
        value = theta.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert torch.equal(theta, torch.zeros(3, dtype=torch.float64))


# -- the flows that they discretise ------------------------------------------------------------------------------------


def test_polyak_flow_lowers_any_loss_exponentially(potential) -> None:
    errors = []
    for steps in (50, 100, 200):
        end = potential.descend(lambda p, steps=steps: PolyakStep(p, lr=1.0 / steps), steps)[-1]
        errors.append(abs(potential.value(end) - np.exp(-1) * potential.value(potential.start)))
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1, atol=ORDER)


@pytest.mark.parametrize(("make", "order"), [(SignDescent, 1), (NormalizedDescent, 2)])
def test_the_loss_falls_by_the_dual_norm_of_the_gradient(potential, make, order: int) -> None:
    def error(rate: float) -> float:
        start, end = potential.descend(lambda p: make(p, lr=rate), 1)
        slope = (potential.value(end) - potential.value(start)) / rate
        return abs(slope + np.linalg.norm(potential.gradient(start), order))

    np.testing.assert_allclose(np.log2(error(2e-4) / error(1e-4)), 1, atol=ORDER)


# -- the kernel machine ------------------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_rule_keeps_its_contract(make, dtype: torch.dtype) -> None:
    rule = make([torch.zeros(1)]).rule()
    check_update_rule(rule, make, closure=True, dtype=dtype)


@each_optimizer
@pytest.mark.parametrize("quadrature", [pk.GaussLegendre(4), pk.DiscreteGradient()], ids=str)
def test_nothing_is_left_over(record, assert_complete, make, quadrature) -> None:
    assert_complete(*record(make), quadrature, DOUBLE.residual)


@each_optimizer
def test_path_kernel_takes_the_scale_as_preconditioner(record, make) -> None:
    trajectory, _, queries = record(make)
    gram = pk.PathKernel(trajectory, preconditioner="optimizer")(queries)
    assert np.linalg.eigvalsh(gram).min() > -DOUBLE.psd * np.linalg.norm(gram)
    assert not np.allclose(gram, pk.PathKernel(trajectory)(queries))


def test_lion_decay_has_its_channel(record) -> None:
    trajectory, _, queries = record(OPTIMIZERS["lion_decay"])
    why = pk.KernelMachine(trajectory).explain(queries, outputs=0)
    assert np.abs(why.channels["weight_decay"]).min() > 1e-5
