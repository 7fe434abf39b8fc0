"""Flows with noise: stationary variances, the limit without noise, and whose random numbers they take."""

from __future__ import annotations

from typing import Any

import dynamical
import pytest
import torch
from dynamical import LOSS, data, network

from pathkernel import dynamics
from pathkernel.errors import FlowError, InputError

NOISE, CURVATURE, FRICTION = 0.5, 1.5, 2.0


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_langevin_has_the_variance_of_ornstein_and_uhlenbeck() -> None:
    found, error = dynamical.variance(dynamics.langevin, 2000, CURVATURE, NOISE, time=20.0, step=0.02, points=16)
    assert found == pytest.approx(NOISE**2 / (2 * CURVATURE) / (1 - CURVATURE * 0.02 / 2), rel=4 * error)


def test_kramers_has_the_variance_of_its_temperature() -> None:
    found, error = dynamical.variance(
        dynamics.kramers, 2000, CURVATURE, NOISE, friction=FRICTION, time=60.0, step=0.2, points=16
    )
    assert found == pytest.approx(NOISE**2 / (2 * FRICTION * CURVATURE), rel=4 * error)


def test_without_noise_they_are_euler_and_a_momentum_flow() -> None:
    quiet: dict[str, Any] = {"noise": 0.0, "generator": generator()}
    flow = dynamics.langevin(network(), LOSS, data(), 0.2, step=0.05, points=2, **quiet)
    steps = dynamical.descended(lambda p: torch.optim.SGD(p, lr=0.05), 4)
    torch.testing.assert_close(flow.theta[-1], steps, rtol=1e-12, atol=1e-12)
    truth = dynamics.momentum_flow(network(), LOSS, data(), 0.4, friction=1.0, points=2).theta[-1]
    errors = []
    for step in (0.1, 0.05):
        flow = dynamics.kramers(network(), LOSS, data(), 0.4, step=step, friction=1.0, points=2, **quiet)
        errors.append((flow.theta[-1] - truth).norm())
    assert 3 < errors[0] / errors[1] < 5  # of order 2


def test_the_same_generator_gives_the_same_path_and_others_stay() -> None:
    state = torch.get_rng_state()
    options: dict[str, Any] = {"step": 0.01, "noise": 0.1, "points": 3}
    one, other = (dynamics.langevin(network(), LOSS, data(), 0.05, generator=generator(), **options) for _ in range(2))
    assert torch.equal(one.theta, other.theta) and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InputError, match="A flow that draws random numbers has the points that were kept"):
        one.at([0.01])


def test_without_a_generator_one_of_its_own_is_taken() -> None:
    state = torch.get_rng_state()
    options: dict[str, Any] = {"step": 0.01, "noise": 0.1, "points": 3}
    one, other = (dynamics.langevin(network(), LOSS, data(), 0.05, generator=own, **options) for own in (None, None))
    assert torch.equal(one.theta, other.theta) and torch.equal(torch.get_rng_state(), state)
    seeded = torch.Generator().manual_seed(0)
    assert torch.equal(dynamics.langevin(network(), LOSS, data(), 0.05, generator=seeded, **options).theta, one.theta)
    assert dynamics.kramers(network(), LOSS, data(), 0.05, friction=1.0, **options).theta.shape == one.theta.shape
    with pytest.raises(InputError, match="by a generator of torch"):
        dynamics.langevin(network(), LOSS, data(), 0.05, generator=3, **options)  # type: ignore[arg-type]


def test_what_makes_no_sense_is_refused() -> None:
    options: dict[str, Any] = {"step": 0.01, "noise": 0.1, "generator": generator()}
    with pytest.raises(InputError, match="σ is 0 or more"):
        dynamics.langevin(network(), LOSS, data(), **{**options, "noise": -1.0})
    with pytest.raises(InputError, match="A step is a time above 0"):
        dynamics.langevin(network(), LOSS, data(), **{**options, "step": 0.0})
    with pytest.raises(InputError, match="Without friction the noise heats"):
        dynamics.kramers(network(), LOSS, data(), friction=0.0, **options)
    with pytest.raises(InputError, match="`method=` was given"):
        dynamics.langevin(network(), LOSS, data(), method="rk4", **options)


def test_a_path_that_diverges_keeps_what_was_computed() -> None:
    with pytest.raises(FlowError, match=r"Langevin flow came to its end between t = .* it diverged") as caught:
        dynamics.langevin(network(), LOSS, data(), 100.0, step=5.0, noise=0.1, generator=generator(), points=21)
    assert 1 <= len(caught.value.flow) < 21
