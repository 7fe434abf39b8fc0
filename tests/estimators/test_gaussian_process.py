"""The covariance of Gaussian processes: amplitude, noise, and its own gradient in their logarithms."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.metrics.pairwise import rbf_kernel
from torch import nn

import pathkernel as pk
from pathkernel.errors import InputError

N = 15
X = np.random.default_rng(0).standard_normal((N, 3))
Y = np.random.default_rng(1).standard_normal((4, 3))
TARGETS = np.sin(X[:, 0]) + 0.1 * np.random.default_rng(2).standard_normal(N)


@pytest.fixture(scope="module")
def kernel() -> pk.TangentKernel:
    torch.manual_seed(0)
    return pk.TangentKernel(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double())


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_covariances_and_variances(noise: float, kernel: pk.TangentKernel) -> None:
    covariance = pk.GaussianProcessKernel(kernel, scale=2.0, noise=noise)
    np.testing.assert_allclose(covariance(X), 2.0 * kernel(X) + noise * np.eye(N), rtol=1e-14)
    np.testing.assert_allclose(covariance(Y, X), 2.0 * kernel(Y, X), rtol=1e-14)
    np.testing.assert_allclose(covariance.diag(X), covariance(X).diagonal(), rtol=1e-13)
    assert len(covariance.theta) == (2 if noise else 1)
    assert repr(covariance) == f"GaussianProcessKernel(TangentKernel, scale=2{', noise=0.3' if noise else ''})"


def test_it_is_the_sum_with_a_white_kernel(kernel: pk.TangentKernel) -> None:
    own = pk.GaussianProcessKernel(kernel, noise=0.2)
    of_two = pk.GaussianProcessKernel(kernel) + WhiteKernel(0.2)
    for optimizer, close in ((None, 1e-9), ("fmin_l_bfgs_b", 1e-3)):
        one, other = (GaussianProcessRegressor(k, optimizer=optimizer).fit(X, TARGETS) for k in (own, of_two))
        for found, right in zip(one.predict(Y, return_std=True), other.predict(Y, return_std=True), strict=True):
            np.testing.assert_allclose(found, right, rtol=close)
    assert one.log_marginal_likelihood_value_ == pytest.approx(other.log_marginal_likelihood_value_, rel=1e-6)
    assert one.kernel_.noise == pytest.approx(other.kernel_.k2.noise_level, rel=1e-2)


BOUNDS = {
    "both": {},
    "noise alone": {"scale_bounds": "fixed"},
    "scale alone": {"noise_bounds": "fixed"},
    "no noise": {"noise": 0.0},
    "neither": {"scale_bounds": "fixed", "noise_bounds": "fixed"},
}


@pytest.mark.parametrize("free", BOUNDS)
def test_gradients_against_finite_differences(free: str, kernel: pk.TangentKernel) -> None:
    covariance = pk.GaussianProcessKernel(kernel, **{"scale": 1.7, "noise": 0.2, **BOUNDS[free]})
    _, gradient = covariance(X, eval_gradient=True)
    theta, h = covariance.theta, 1e-5
    assert gradient.shape == (N, N, len(theta)) and len(covariance.bounds) == len(theta)
    for place, step in enumerate(h * np.eye(len(theta))):
        ahead, behind = (covariance.clone_with_theta(theta + sign * step)(X) for sign in (1, -1))
        np.testing.assert_allclose(gradient[:, :, place], (ahead - behind) / (2 * h), atol=1e-8)
    process = GaussianProcessRegressor(covariance, optimizer=None).fit(X, TARGETS)
    likelihood, slope = process.log_marginal_likelihood(theta, eval_gradient=True)
    for place, step in enumerate(h * np.eye(len(theta))):
        ahead, behind = (process.log_marginal_likelihood(theta + sign * step) for sign in (1, -1))
        assert slope[place] == pytest.approx((ahead - behind) / (2 * h), rel=1e-5, abs=1e-6)
    assert np.isfinite(likelihood)


def test_the_most_likely_amplitude_and_noise(kernel: pk.TangentKernel) -> None:
    """Drawn from a process of known amplitude and noise, and found again."""
    generator = np.random.default_rng(3)
    many = generator.standard_normal((150, 3))
    true = pk.GaussianProcessKernel(kernel, scale=3.0, noise=0.05)
    y = np.linalg.cholesky(true(many)) @ generator.standard_normal(150)
    fitted = GaussianProcessRegressor(pk.GaussianProcessKernel(kernel, noise=1.0)).fit(many, y)
    # Of 150 targets, the noise is known to √(2/150) = 12 %, the amplitude by as many directions as the kernel has.
    assert fitted.kernel_.noise == pytest.approx(0.05, rel=0.4)
    assert 1.0 < fitted.kernel_.scale < 9.0
    likelihood = fitted.log_marginal_likelihood
    assert fitted.log_marginal_likelihood_value_ >= likelihood(true.theta) - 1e-9


def test_one_matrix_serves_all_trials() -> None:
    asked = []

    def counting(X: np.ndarray, Y: np.ndarray | None = None) -> np.ndarray:
        asked.append(len(X))
        return rbf_kernel(X, Y)

    covariance = pk.GaussianProcessKernel(counting, noise=0.1)
    covariance(X, eval_gradient=True)
    for value in (0.1, 0.2, 0.3):
        covariance.clone_with_theta(np.array([value, -value]))(X.copy(), eval_gradient=True)
    assert asked == [N]
    buffer = X.copy()
    buffer *= 2
    np.testing.assert_allclose(covariance(buffer), rbf_kernel(buffer) + 0.1 * np.eye(N), rtol=1e-14)


def test_what_is_learnt_goes_back_into_the_parameters(kernel: pk.TangentKernel) -> None:
    covariance = pk.GaussianProcessKernel(kernel, noise=0.1)
    other = covariance.clone_with_theta(np.log([0.5, 4.0]))  # in the order of the names
    assert (other.noise, other.scale) == (pytest.approx(0.5), pytest.approx(4.0)) and other.kernel is kernel
    assert (covariance.noise, covariance.scale) == (0.1, 1.0)
    assert clone(covariance).get_params() == covariance.get_params()
    process = GaussianProcessRegressor(covariance).fit(X, TARGETS)
    again = pickle.loads(pickle.dumps(process))
    assert "_held" in vars(process.kernel_) and "_held" not in vars(again.kernel_)
    assert np.array_equal(again.predict(Y), process.predict(Y))


def test_it_composes_and_classifies(kernel: pk.TangentKernel) -> None:
    mixed = pk.GaussianProcessKernel(kernel + 0.5 * kernel * rbf_kernel, noise=0.1) + RBF(1.0)
    mean = GaussianProcessRegressor(mixed, optimizer=None).fit(X, TARGETS).predict(Y)
    plain = lambda X, Y: kernel(X, Y) * (1 + 0.5 * rbf_kernel(X, Y)) + RBF(1.0)(X, Y)  # noqa: E731
    K = plain(X, X) + 0.1 * np.eye(N)
    np.testing.assert_allclose(mean, plain(Y, X) @ np.linalg.solve(K, TARGETS), rtol=1e-6)
    labels = (X[:, 0] > 0).astype(int)
    classifier = GaussianProcessClassifier(pk.GaussianProcessKernel(kernel, noise=0.1, noise_bounds="fixed"))
    assert classifier.fit(X, labels).score(X, labels) > 0.8


@pytest.mark.filterwarnings("ignore", category=ConvergenceWarning)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"scale": 0.0}, "`scale` is a number that is positive"),
        ({"scale": -1.0}, "`scale` is a number that is positive"),
        ({"scale": "one"}, "`scale` is a number that is positive"),
        ({"noise": -0.1}, "`noise` is a number that is not negative"),
        ({"noise": float("nan")}, "`noise` is a number that is not negative"),
        ({"scale_bounds": (2.0, 1.0)}, "two positive numbers, the lower first"),
        ({"scale_bounds": (0.0, 1.0)}, "two positive numbers, the lower first"),
        ({"noise_bounds": "free"}, "two positive numbers, the lower first"),
    ],
    ids=str,
)
def test_what_is_no_variance(wrong: dict[str, Any], said: str, kernel: pk.TangentKernel) -> None:
    (name, value), covariance = *wrong.items(), pk.GaussianProcessKernel(kernel, **wrong)
    fit = GaussianProcessRegressor(covariance).fit
    for act in (lambda: covariance(X), lambda: covariance.diag(X), lambda: fit(X, TARGETS)):
        with pytest.raises(InputError) as caught:
            act()
        assert f"{name}={value!r}" in caught.value.found and said in caught.value.expected


def test_gradients_are_those_of_one_set_of_samples(kernel: pk.TangentKernel) -> None:
    with pytest.raises(InputError) as caught:
        pk.GaussianProcessKernel(kernel)(Y, X, eval_gradient=True)
    assert "covariance(X, eval_gradient=True)" in caught.value.write
