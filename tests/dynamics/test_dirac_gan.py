"""The Dirac GAN: eigenvalues against closed forms, periods, radii and decay as theory says them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pathkernel as pk
from pathkernel.dynamics import dirac_gan
from pathkernel.dynamics.dirac_gan import UPDATES, DiracGAN
from pathkernel.reference.two_players import (
    alternating_eigenvalues,
    flow_eigenvalues,
    simultaneous_eigenvalues,
)

VARIANTS = {variant.name: variant for variant in dirac_gan.variants()}
DAMPED: dict[str, tuple[float, ...]] = {
    "GAN": (0.0, 0.5),
    "non-saturating": (0.0, 0.5),
    "WGAN, clipped": (0.0, 1.0),
    "WGAN-GP, centre 0": (0.5, 1.0),
    "GAN-QP": (0.0, 1.0),
    "instance noise": (0.5, 0.5),  # s²/2, of a deviation of 1
    "R1, γ = 0.3": (0.3, 0.5),
    "R1, γ = 1": (1.0, 0.5),
    "R1, γ = 1.5": (1.5, 0.5),
    "consensus": (0.25, 0.5, 0.25),  # γ/4 of both players
}
"""Damping of the discriminator, frequency, and damping of the generator where it has one."""


def apart(found: np.ndarray, expected: tuple[complex, complex]) -> float:
    """Distance of two pairs of eigenvalues, whatever their order."""
    one, other = np.asarray(found), np.asarray(expected)
    return float(min(np.abs(one - other).max(), np.abs(one[::-1] - other).max()))


@pytest.mark.parametrize("name", DAMPED)
@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_eigenvalues_are_those_of_the_closed_forms(name: str, rate: float) -> None:
    damping, frequency, *rest = DAMPED[name]
    of_generator = rest[0] if rest else 0.0
    expected = {
        "simultaneous": simultaneous_eigenvalues(rate, damping, frequency, of_generator),
        "alternating 1": alternating_eigenvalues(rate, damping, frequency, of_generator),
        "alternating 5": alternating_eigenvalues(rate, damping, frequency, of_generator, repeats=5),
    }
    for updates, values in expected.items():
        report = VARIANTS[name].stability(rate, UPDATES[updates])
        assert report is not None and report.speed == 0
        assert apart(report.flow, flow_eigenvalues(damping, frequency, of_generator)) < 1e-6
        assert apart(report.map, values) < 1e-6


def test_theory_states_these_numbers() -> None:
    """Those of the project's page of mathematics, as a second hand on the closed forms."""
    assert flow_eigenvalues(0.3, 0.5) == pytest.approx((-0.15 + 0.477j, -0.15 - 0.477j), abs=1e-3)
    assert flow_eigenvalues(1.0, 0.5) == pytest.approx((-0.5, -0.5))
    assert flow_eigenvalues(1.5, 0.5) == pytest.approx((-0.191, -1.309), abs=1e-3)
    for h in (0.5, 3.9, 4.1):
        assert abs(simultaneous_eigenvalues(h, 0, 0.5)[0]) == pytest.approx(np.sqrt(1 + h**2 / 4))
        largest = max(map(abs, alternating_eigenvalues(h, 0, 0.5)))
        assert largest == pytest.approx(1) if h <= 4 else largest > 1.1


def test_variants_without_an_equilibrium_have_no_eigenvalues() -> None:
    assert set(VARIANTS) - set(DAMPED) == {"WGAN, spectral", "WGAN-GP, centre 1"}
    for row in dirac_gan.eigenvalue_table(0.2, [VARIANTS["WGAN, spectral"], VARIANTS["R1, γ = 1"]]):
        assert (row.flow.size, len(row.radii)) == ((2, 3) if row.name in DAMPED else (0, 0))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda gan: gan.name)
def test_a_field_is_minus_the_gradients_of_the_losses(variant: DiracGAN) -> None:
    points = np.random.default_rng(0).normal(size=(5, 2))
    grid = np.stack(variant.field(points[:, 0], points[:, 1]), axis=1)
    for point, at_once in zip(points, grid, strict=True):
        phi, theta = (torch.tensor(value, requires_grad=True) for value in point)
        of_d, of_g = variant.losses(phi, theta)
        gradients = torch.autograd.grad(of_d, phi, retain_graph=True) + torch.autograd.grad(of_g, theta)
        expected = [-float(gradient) for gradient in gradients]
        np.testing.assert_allclose(variant.field(*point), expected, atol=1e-10)  # torch cuts softplus off at 20
        np.testing.assert_allclose(at_once, expected, atol=1e-10)


# -- motion ----------------------------------------------------------------------------------------------------------


def crossings(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Times at which values pass zero upward, by linear interpolation."""
    up = np.flatnonzero((values[:-1] < 0) & (values[1:] >= 0))
    return times[up] - values[up] * (times[up + 1] - times[up]) / (values[up + 1] - values[up])


def test_the_period_of_the_gan_is_four_pi_where_it_is_linear() -> None:
    times = np.linspace(0, 60, 1201)
    path = VARIANTS["GAN"].flow((0.05, 0.0), times)
    periods = np.diff(crossings(times, path[:, 0]))
    assert len(periods) >= 3 and periods == pytest.approx(4 * np.pi, rel=0.01)
    np.testing.assert_allclose(np.hypot(*path.T), 0.05, rtol=1e-6)


def test_the_saturating_flow_conserves_the_radius_and_the_other_does_not() -> None:
    times = np.linspace(0, 50, 51)
    np.testing.assert_allclose(np.hypot(*VARIANTS["GAN"].flow((1.0, 0.5), times).T), np.hypot(1, 0.5), rtol=1e-8)
    assert (np.diff(np.hypot(*VARIANTS["non-saturating"].flow((1.0, 0.5), times).T)) < 0).all()


def decay(variant: DiracGAN, first: float, last: float) -> float:
    """Exponent of the radius as a power of time."""
    times = np.concatenate([[0.0], np.geomspace(first, last, 60)])
    radius = np.hypot(*variant.flow((1.0, 0.0), times, 1e-7).T)[1:]
    return float(np.polyfit(np.log(times[1:]), np.log(radius), 1)[0])


def test_the_radius_of_the_non_saturating_flow_decays_like_one_over_the_root_of_time() -> None:
    assert decay(VARIANTS["non-saturating"], 300, 1500) == pytest.approx(-0.5, abs=0.05)


def test_the_radius_of_the_qp_flow_decays_like_one_over_time() -> None:
    assert decay(VARIANTS["GAN-QP"], 100, 400) == pytest.approx(-1.0, abs=0.05)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_steps_at_once_spiral_outward_as_their_eigenvalues_say(rate: float) -> None:
    path = VARIANTS["GAN"].trajectory((1e-6, 0.0), rate, 40)
    expected = 1e-6 * np.sqrt(1 + rate**2 / 4) ** np.arange(41)
    np.testing.assert_allclose(np.hypot(*path.T), expected, rtol=1e-9)


@pytest.mark.parametrize("updates", ["alternating", UPDATES["alternating 5"]], ids=["by name", "alternating 5"])
def test_steps_in_turns_stay_on_their_ellipse(updates: Any) -> None:
    path = VARIANTS["GAN"].trajectory((0.01, 0.0), 0.2, 2000, updates)
    radius = np.hypot(*path.T)
    assert radius[1000:].max() == pytest.approx(radius[:1000].max(), rel=1e-3)


def turns(path: np.ndarray) -> float:
    """How many times a path goes round the origin."""
    return float(np.abs(np.diff(np.unwrap(np.arctan2(path[:, 1], path[:, 0])))).sum() / (2 * np.pi))


@pytest.mark.parametrize("updates", UPDATES)
def test_a_penalty_around_zero_converges_and_one_around_one_circles(updates: str) -> None:
    ends = {
        centre: dirac_gan.wgan_gp(centre).trajectory((0.5, 0.5), 0.02, 4000, UPDATES[updates])[-2000:]
        for centre in (0.0, 1.0)
    }
    assert np.hypot(*ends[0.0].T).max() < 1e-4
    assert np.hypot(*ends[1.0].T).min() > 0.5 and turns(ends[1.0]) > 5


def test_a_strong_penalty_around_one_ends_at_a_wrong_sample() -> None:
    """Five steps of the discriminator to one of the generator, and 5 γ² > 4."""
    path = dirac_gan.wgan_gp(1.0, weight=1.0).trajectory((0.5, 0.5), 0.02, 2000, UPDATES["alternating 5"])
    np.testing.assert_allclose(np.abs(path[-1]), [0.0, 1.0], atol=1e-9)


def test_the_circle_around_one_has_the_radius_four_over_pi_for_weak_penalties() -> None:
    path = dirac_gan.wgan_gp(1.0, weight=0.05).flow((1.0, 0.0), np.linspace(0, 300, 3001), 1e-7)
    assert np.hypot(*path[2000:].T).mean() == pytest.approx(4 / np.pi, rel=0.01)


def test_projections_keep_the_critic_bounded_and_it_does_not_converge() -> None:
    for projection in ("clipped", "spectral"):
        path = dirac_gan.wgan(projection).trajectory((0.3, 0.2), 0.1, 1000)
        assert np.abs(path[:, 0]).max() <= 1 and np.hypot(*path[-300:].T).max() > 0.5


@pytest.mark.parametrize("name", ["R1, γ = 1", "consensus", "instance noise"])
def test_damped_variants_converge(name: str) -> None:
    for updates in UPDATES.values():
        path = VARIANTS[name].trajectory((0.5, 0.5), 0.2, 400, updates)
        assert np.hypot(*path[-1]) < 1e-6


# -- refusals --------------------------------------------------------------------------------------------------------


def test_players_that_diverge_leave_the_rounds_before() -> None:
    with pytest.raises(pk.errors.GameError, match=r"WGAN-GP, centre 0 left .* in round \d+") as found:
        VARIANTS["WGAN-GP, centre 0"].trajectory((1.0, 0.0), 3.0, 200)
    path = found.value.path
    assert 5 < len(path) < 200 and np.hypot(*path[-1]) < dirac_gan.FARTHEST
    assert "error.path" in found.value.write


def test_a_flow_that_ends_leaves_what_there_is_of_it() -> None:
    running_away = DiracGAN("running away", lambda phi, theta: (phi**2, 0.0), VARIANTS["GAN"].losses)
    times = np.linspace(0, 2, 20)
    with pytest.raises(pk.errors.GameError, match=r"The flow of running away came to an end after 0\.947368") as found:
        running_away.flow((1.0, 0.0), times)  # φ = 1 / (1 - t)
    np.testing.assert_allclose(found.value.path[:, 0], 1 / (1 - times[:10]), rtol=1e-7)


def test_what_is_no_variant_is_refused() -> None:
    with pytest.raises(pk.errors.InputError, match=r"`wgan\('cut'\)`"):
        dirac_gan.wgan("cut")
    with pytest.raises(pk.errors.InputError, match=r"`updates=\('E',\)`"):
        VARIANTS["GAN"].trajectory((1.0, 0.0), 0.1, 3, ("E",))
    refusals: list[tuple[str, Callable[[], Any]]] = [
        ("`weight=0`", lambda: dirac_gan.gan_qp(0)),
        ("`weight=-1.0`", lambda: dirac_gan.r1(-1.0)),
        ("`weight=nan`", lambda: dirac_gan.consensus(float("nan"))),
        ("`centre=inf`", lambda: dirac_gan.wgan_gp(float("inf"))),
        ("`deviation=nan`", lambda: dirac_gan.instance_noise(float("nan"))),
        ("`rate=-0.1`", lambda: VARIANTS["GAN"].trajectory((1.0, 0.0), -0.1, 3)),
        ("`rate=nan`", lambda: VARIANTS["GAN"].trajectory((1.0, 0.0), float("nan"), 3)),
        ("`steps=2.5` was given. It is a whole number", lambda: VARIANTS["GAN"].trajectory((1.0, 0.0), 0.1, 2.5)),  # type: ignore[arg-type]
        ("`rate='x'`", lambda: VARIANTS["GAN"].trajectory((1.0, 0.0), "x", 3)),  # type: ignore[arg-type]
        ("`nodes=0`", lambda: dirac_gan.instance_noise(1.0, 0)),
        ("`steps=-1`", lambda: VARIANTS["GAN"].trajectory((1.0, 0.0), 0.1, -1)),
        ("The rate of 'D' is nan", lambda: VARIANTS["GAN"].stability(float("nan"))),
        (r"1 times \[0.0\]", lambda: VARIANTS["GAN"].flow((1.0, 0.0), np.array([0.0]))),
        (r"2 times \[1.0, 0.0\]", lambda: VARIANTS["GAN"].flow((1.0, 0.0), np.array([1.0, 0.0]))),
        (r"2 times \[0.0, inf\]", lambda: VARIANTS["GAN"].flow((1.0, 0.0), np.array([0.0, np.inf]))),
        (r"2 times \[0.0, nan\]", lambda: VARIANTS["GAN"].flow((1.0, 0.0), np.array([0.0, np.nan]))),
    ]
    for said, refused in refusals:
        with pytest.raises(pk.errors.InputError, match=said) as found:
            refused()
        assert found.value.expected and found.value.write
    with pytest.raises(pk.errors.InputError, match="The flow of WGAN, clipped"):
        VARIANTS["WGAN, clipped"].flow((1.0, 0.0), np.linspace(0, 1, 3))
