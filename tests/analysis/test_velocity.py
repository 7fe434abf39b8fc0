"""Kernel distance and velocity: closed forms, digits kept, and times checked."""

from __future__ import annotations

import numpy as np
import pytest

from pathkernel.analysis.alignment import kernel_alignment
from pathkernel.analysis.velocity import kernel_distance, kernel_velocity
from pathkernel.errors import PathKernelError


def random_gram(seed: int) -> np.ndarray:
    features = np.random.default_rng(seed).normal(size=(15, 6))
    return features @ features.T


def test_distance_is_one_minus_the_cosine():
    K, L = random_gram(0), random_gram(1)
    assert kernel_distance(K, L) == pytest.approx(1.0 - kernel_alignment(K, L), rel=1e-12)
    assert kernel_distance(K, L) == kernel_distance(L, K)


def test_distance_ignores_scale_and_vanishes_on_itself():
    K = random_gram(0)
    assert kernel_distance(K, K) == 0.0
    assert kernel_distance(K, 1e6 * K) == pytest.approx(0.0, abs=1e-30)
    assert kernel_distance(K, -K) == pytest.approx(2.0, rel=1e-14)


def test_a_small_distance_keeps_its_digits():
    # K = diag(1, 1), L = diag(1 + ε, 1 - ε): the cosine is 1/√(1 + ε²), the distance ε²/2 to first order.
    epsilon = 1e-9
    distance = kernel_distance(np.eye(2), np.diag([1 + epsilon, 1 - epsilon]))
    assert distance == pytest.approx(0.5 * epsilon**2, rel=1e-6)  # 1 - cosine would give 0 or 1e-16


def test_velocity_is_distance_over_time():
    grams = [random_gram(seed) for seed in range(3)]
    expected = [kernel_distance(grams[1], grams[0]) / 2.0, kernel_distance(grams[2], grams[1]) / 0.5]
    np.testing.assert_allclose(kernel_velocity(grams, [0.0, 2.0, 2.5]), expected, rtol=1e-15)


def test_velocity_takes_one_stacked_array():
    grams = np.stack([random_gram(0)] * 4)
    np.testing.assert_array_equal(kernel_velocity(grams, range(4)), np.zeros(3))


@pytest.mark.parametrize(
    ("count", "times", "found"),
    [
        (3, [0, 1], r"There are 3 kernels and `times` has shape \(2,\)"),
        (1, [0], r"There are 1 kernels and `times` has shape \(1,\)"),
        (3, [0, 2, 2], r"`times` is \[0\. 2\. 2\.\]"),
        (3, [0, 2, 1], r"`times` is \[0\. 2\. 1\.\]"),
        (2, [0, np.inf], r"`times` is \[ 0\. inf\]"),
    ],
)
def test_velocity_refuses_times_that_do_not_fit(count, times, found):
    with pytest.raises(PathKernelError, match=found) as caught:
        kernel_velocity([np.eye(2)] * count, times)
    assert caught.value.expected
    assert caught.value.write


def test_distance_refuses_kernels_of_different_samples():
    with pytest.raises(PathKernelError, match="same samples, in the same order"):
        kernel_distance(np.eye(2), np.eye(3))
