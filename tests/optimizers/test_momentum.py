"""Heavy ball, Nesterov and the β/2 form: as published, as a body with friction, and as a kernel machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tolerances import ORDER, TOLERANCES
from torch import nn

import pathkernel as pk
from pathkernel.errors import InputError, TrajectoryError
from pathkernel.optimizers.momentum import Momentum, leapfrog
from pathkernel.testing import check_update_rule

DOUBLE = TOLERANCES[torch.float64]
LOOK_AHEAD = {"heavy_ball": 0.0, "half": 0.5, "nesterov": 1.0}
each_look_ahead = pytest.mark.parametrize("look_ahead", LOOK_AHEAD.values(), ids=LOOK_AHEAD)


# -- the published equations -------------------------------------------------------------------------------------------


@each_look_ahead
def test_the_step_is_the_published_one(potential, look_ahead: float) -> None:
    path = potential.descend(lambda p: Momentum(p, lr=0.05, momentum=0.8, look_ahead=look_ahead), 12)
    theta, velocity = potential.start, np.zeros(3)
    for point in path[1:]:
        velocity = 0.8 * velocity - 0.05 * potential.gradient(theta + look_ahead * 0.8 * velocity)
        theta = theta + velocity
        np.testing.assert_allclose(point, theta, rtol=DOUBLE.rounding)


def test_the_half_form_looks_ahead_by_half_of_beta_times_the_last_step(potential) -> None:
    coefficients = leapfrog(time_step=0.3, friction=0.9)
    alpha, beta = coefficients["lr"], coefficients["momentum"]
    path = potential.descend(lambda p: Momentum(p, **coefficients, look_ahead=0.5), 12)
    before = now = potential.start
    for point in path[1:]:
        pulled = potential.gradient(now + beta / 2 * (now - before))
        before, now = now, now + beta * (now - before) - alpha * pulled
        np.testing.assert_allclose(point, now, rtol=DOUBLE.rounding)


def test_without_look_ahead_it_is_the_heavy_ball_of_torch(potential) -> None:
    mine = potential.descend(lambda p: Momentum(p, lr=0.05, momentum=0.8, look_ahead=0), 12)
    torchs = potential.descend(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8), 12)
    np.testing.assert_allclose(mine, torchs, rtol=DOUBLE.rounding)


def test_nesterov_of_torch_is_this_one_seen_from_the_look_ahead_point(potential) -> None:
    mine = potential.descend(lambda p: Momentum(p, lr=0.05, momentum=0.8), 12)
    torchs = potential.descend(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True), 12)
    assert np.abs(mine - torchs).max() > 1e-2
    np.testing.assert_allclose(mine[1:] + 0.8 * np.diff(mine, axis=0), torchs[1:], rtol=DOUBLE.rounding)


def test_the_parameters_are_back_to_the_bit_and_frozen_ones_stay() -> None:
    torch.manual_seed(0)
    moving, still = (torch.randn(5, requires_grad=True) for _ in range(2))
    optimizer, seen = Momentum([moving, still], lr=0.1), []

    def closure():
        optimizer.zero_grad()
        seen.append((moving.detach().clone(), still.detach().clone()))
        value = (moving**4).sum() + ((still**4).sum() if still.requires_grad else 0)
        value.backward()
        return value

    optimizer.step(closure)
    still.requires_grad_(False)
    start, rest = moving.detach().clone(), still.clone()
    velocity = optimizer.state[moving]["velocity"].clone()
    optimizer.step(closure)
    assert torch.equal(seen[1][0], start + 0.9 * velocity)
    assert torch.equal(moving, start + optimizer.state[moving]["velocity"])
    assert torch.equal(seen[1][1], rest) and torch.equal(still, rest)


def test_a_step_without_a_closure_says_what_to_write() -> None:
    with pytest.raises(InputError, match=r"`Momentum\.step\(\)` was called without a closure.*Write `optimizer"):
        Momentum([torch.zeros(1, requires_grad=True)], lr=0.1).step()


# -- the body with friction --------------------------------------------------------------------------------------------


def test_the_heavy_ball_is_the_leapfrog_scheme(potential) -> None:
    step, friction = 0.2, 1.5
    path = potential.descend(lambda p: Momentum(p, **leapfrog(step, friction), look_ahead=0), 15)
    for before, now, after in zip(path, path[1:], path[2:], strict=False):
        acceleration = (after - 2 * now + before) / step**2
        velocity = (after - before) / (2 * step)
        np.testing.assert_allclose(acceleration + friction * velocity, -potential.gradient(now), atol=1e-12)


def oscillator(t: float, friction: float, stiffness: float) -> float:
    """θ(t) of θ̈ + λθ̇ + kθ = 0 from 1, at rest."""
    frequency = np.sqrt(stiffness - friction**2 / 4)
    return np.exp(-friction * t / 2) * (np.cos(frequency * t) + friction / (2 * frequency) * np.sin(frequency * t))


def test_leapfrog_follows_a_damped_oscillator_to_second_order() -> None:
    friction, stiffness, errors = 0.7, 2.0, []
    for steps in (40, 80, 160):
        h = 2.0 / steps
        theta = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
        optimizer = Momentum([theta], **leapfrog(h, friction), look_ahead=0)
        optimizer.state[theta]["velocity"] = torch.tensor([1 - oscillator(-h, friction, stiffness)]).double()

        def closure(theta=theta, optimizer=optimizer):
            optimizer.zero_grad()
            value = stiffness * theta.square().sum() / 2
            value.backward()
            return value

        for _ in range(steps):
            optimizer.step(closure)
        errors.append(abs(theta.item() - oscillator(2.0, friction, stiffness)))
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 2, atol=ORDER)


# -- the kernel machine ------------------------------------------------------------------------------------------------


@each_look_ahead
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_rule_keeps_its_contract(look_ahead: float, dtype: torch.dtype) -> None:
    def make(p):
        return Momentum(p, lr=0.05, momentum=0.8, look_ahead=look_ahead)

    check_update_rule(Momentum.rule(), make, closure=True, dtype=dtype)


@each_look_ahead
@pytest.mark.parametrize("quadrature", [pk.GaussLegendre(4), pk.DiscreteGradient()], ids=str)
def test_nothing_is_left_over(record, assert_complete, look_ahead: float, quadrature) -> None:
    run = record(lambda p: Momentum(p, lr=0.05, look_ahead=look_ahead))
    assert_complete(*run, quadrature, DOUBLE.residual)


def test_where_gradients_were_taken_matters(record) -> None:
    class AtTheParameters(Momentum.rule):
        def stage_offsets(self, frozen, settings):
            return (None,)

    trajectory, _, queries = record(lambda p: Momentum(p, lr=0.05))
    run = replace(trajectory.run, rule=AtTheParameters())
    trajectory = pk.Trajectory(run, trajectory.store, trajectory.end)
    with pytest.raises(TrajectoryError, match="explain the gradient only up to"):
        pk.KernelMachine(trajectory).explain(queries)


def test_groups_have_their_own_settings(record, assert_complete) -> None:
    def make(parameters):
        first, *others = parameters
        return Momentum([{"params": [first], "lr": 0.1, "look_ahead": 0.5}, {"params": others}], lr=0.03)

    assert_complete(*record(make), "auto", DOUBLE.residual)


def test_noise_on_gradients_inside_the_closure_has_its_channel(record, assert_complete) -> None:
    generator = torch.Generator().manual_seed(0)

    def add_noise(recorder: pk.KernelRecorder, model: nn.Module) -> None:
        with recorder.channel("noise"):
            for p in model.parameters():
                p.grad += 0.01 * torch.randn(p.shape, dtype=p.dtype, generator=generator)

    run = record(lambda p: Momentum(p, lr=0.05), edit=add_noise)
    assert_complete(*run, "auto", DOUBLE.residual)
    assert not any(step.changes for step in run[0].steps())  # looking ahead is no change of the weights
    why = pk.KernelMachine(run[0]).explain(run[2], outputs=0)
    assert set(why.channels) <= {"initial", "noise", "rounding"}
    assert np.abs(why.channels["noise"]).min() > 1e-5
