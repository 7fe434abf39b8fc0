"""Norms and their duals; steepest descent in each as steps, as a flow, and as a kernel machine."""

from __future__ import annotations

import re
from typing import Any

import dynamical
import numpy as np
import pytest
import torch
from dynamical import LOSS, data, network, recorded

import pathkernel as pk
from pathkernel import dynamics
from pathkernel.errors import FlowError, InputError
from pathkernel.optimizers.norms import NORMS, norm_of
from pathkernel.optimizers.steepest import STEEPEST, CoordinateDescent, SpectralDescent
from pathkernel.testing import check_update_rule

SIZES = {
    "l2": lambda ds: torch.cat([d.reshape(-1) for d in ds]).norm(),
    "linf": lambda ds: max(d.abs().max() for d in ds),
    "l1": lambda ds: sum(d.abs().sum() for d in ds),
    "spectral": lambda ds: max(torch.linalg.matrix_norm(d.reshape(len(d), -1), 2) for d in ds),
}
"""The norms themselves, of matrices and vectors."""
each_norm = pytest.mark.parametrize("norm", NORMS)


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((4, 3), (4,), (2, 3, 2), (1,))]


@each_norm
def test_the_direction_has_norm_one_and_meets_the_dual(norm: str) -> None:
    gs = gradients()
    ascent, dual = NORMS[norm].ascent(gs), float(NORMS[norm].dual(gs))
    assert float(SIZES[norm](ascent)) == pytest.approx(1, rel=1e-12)
    assert sum(float((g * d).sum()) for g, d in zip(gs, ascent, strict=True)) == pytest.approx(dual, rel=1e-12)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):  # no other direction of norm 1 rises faster
        others = [torch.randn(g.shape, dtype=torch.float64, generator=generator) for g in gs]
        size = float(SIZES[norm](others))
        assert sum(float((g * d).sum()) for g, d in zip(gs, others, strict=True)) / size < dual


@each_norm
def test_where_there_is_no_gradient_nothing_moves(norm: str) -> None:
    zeros = [torch.zeros_like(g) for g in gradients()]
    assert float(NORMS[norm].dual(zeros)) == 0
    assert all(not direction.any() for direction in NORMS[norm].ascent(zeros))


@each_norm
def test_the_loss_falls_by_the_dual_norm_of_the_gradient(norm: str) -> None:
    assert dynamical.slope_error(norm) < 1e-6


@each_norm
def test_a_step_goes_where_the_flow_does(norm: str) -> None:
    flow = dynamics.steepest_flow(network(), LOSS, data(), 0.01, norm=norm, points=2, method="euler")
    step = dynamical.descended(lambda p: STEEPEST[norm](p, lr=0.01), 1)
    torch.testing.assert_close(step, flow.theta[-1], rtol=1e-12, atol=1e-12)


def test_sign_flow_is_that_of_the_maximum_norm() -> None:
    one = dynamics.sign_flow(network(), LOSS, data(), 0.01, points=2, method="rk4")
    other = dynamics.steepest_flow(network(), LOSS, data(), 0.01, norm="linf", points=2, method="rk4")
    assert torch.equal(one.theta, other.theta)


def test_a_flow_of_unit_speed_cannot_stop() -> None:
    with pytest.raises(FlowError, match=r"flow of steepest descent came to its end.*more than 60 steps"):
        dynamics.steepest_flow(network(), LOSS, data(), 20.0, norm="linf", max_steps=60)


@pytest.mark.parametrize("name", ["l3", ["l2"], None])
def test_an_unknown_norm_is_refused(name: Any) -> None:
    with pytest.raises(InputError, match=rf"`norm={re.escape(repr(name))}` was given.*norm=\"spectral\""):
        norm_of(name)


# -- the new optimizers ------------------------------------------------------------------------------------------------


def test_spectral_descent_moves_all_singular_directions_by_the_rate() -> None:
    model = network()
    before = model[0].weight.detach().clone()
    LOSS(model(data()[0]), data()[1]).backward()
    SpectralDescent(model.parameters(), lr=0.1).step()
    moved = before - model[0].weight.detach()
    torch.testing.assert_close(torch.linalg.svdvals(moved), torch.full((3,), 0.1, dtype=torch.float64))
    assert (moved * model[0].weight.grad).sum() > 0


def test_directions_below_rounding_do_not_move() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 3))
    weight.grad = torch.outer(torch.tensor([1.0, 2.0, 0.1]), torch.tensor([0.3, 0.2, 0.7]))  # of rank one
    SpectralDescent([weight], lr=1.0).step()
    np.testing.assert_allclose(torch.linalg.svdvals(weight.detach()).numpy(), [1, 0, 0], atol=1e-6)


def test_coordinate_descent_moves_one_entry_of_all() -> None:
    model = network()
    before = dynamical.vector(model)
    LOSS(model(data()[0]), data()[1]).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    CoordinateDescent(model.parameters(), lr=0.1).step()
    moved = dynamical.vector(model) - before
    place = int(gradient.abs().argmax())
    assert (moved != 0).sum() == 1 and float(moved[place]) == pytest.approx(-0.1 * float(gradient[place].sign()))


@pytest.mark.parametrize("make", [CoordinateDescent, SpectralDescent])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_rule_keeps_its_contract(make: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
    check_update_rule(make.rule(), lambda p: make(p, lr=0.02), dtype=dtype, steps=4)


@pytest.mark.parametrize("make", [CoordinateDescent, SpectralDescent])
def test_its_networks_are_explained_exactly_without_a_rule_being_named(make: type[torch.optim.Optimizer]) -> None:
    trajectory = recorded(lambda p: make(p, lr=0.02), 2, size=4)
    why = pk.KernelMachine(trajectory, quadrature=pk.GaussLegendre(4)).explain(data()[0][:3])
    assert why.relative_residual < 1e-6 and why.split_error < 1e-10 and np.abs(why.shares).max() > 1e-3
