"""Alignment: closed forms, invariances, and the labels' own kernel."""

from __future__ import annotations

import numpy as np
import pytest

from pathkernel.analysis.alignment import centered_kernel_alignment, kernel_alignment, target_alignment, target_kernel
from pathkernel.errors import PathKernelError


@pytest.fixture
def grams() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(2, 12, 5))
    return features[0] @ features[0].T, features[1] @ features[1].T


def test_a_scaled_kernel_is_aligned_with_itself(grams):
    K, _ = grams
    assert kernel_alignment(K, 7.5 * K) == pytest.approx(1.0, abs=1e-14)
    assert kernel_alignment(K, -K) == pytest.approx(-1.0, abs=1e-14)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e200])
def test_alignment_neither_overflows_nor_underflows(grams, scale):
    K, L = grams
    assert kernel_alignment(scale * K, L) == pytest.approx(kernel_alignment(K, L), rel=1e-12)


def test_alignment_of_identity_and_ones_is_one_over_root_n():
    n = 9
    assert kernel_alignment(np.eye(n), np.ones((n, n))) == pytest.approx(1 / 3, abs=1e-14)


def test_centred_alignment_is_alignment_of_kernels_with_centred_features():
    generator = np.random.default_rng(1)
    A, B = generator.normal(size=(2, 10, 4)) + 3.0
    centred_A, centred_B = A - A.mean(axis=0), B - B.mean(axis=0)
    expected = kernel_alignment(centred_A @ centred_A.T, centred_B @ centred_B.T)
    assert centered_kernel_alignment(A @ A.T, B @ B.T) == pytest.approx(expected, rel=1e-12)


def test_centred_alignment_ignores_factor_and_constant(grams):
    K, L = grams
    assert centered_kernel_alignment(3.0 * K + 100.0, L) == pytest.approx(centered_kernel_alignment(K, L), rel=1e-11)


def test_alignment_does_not_depend_on_the_order_of_samples(grams):
    K, L = grams
    order = np.random.default_rng(2).permutation(len(K))
    shuffled = centered_kernel_alignment(K[np.ix_(order, order)], L[np.ix_(order, order)])
    assert shuffled == pytest.approx(centered_kernel_alignment(K, L), rel=1e-12)


@pytest.mark.parametrize(
    "y", [[2, 0, 2], [True, False, True], ["b", "a", "b"], np.array(["b", "a", "b"], dtype=object)]
)
def test_class_labels_become_one_hot_products(y):
    np.testing.assert_array_equal(target_kernel(y), [[1, 0, 1], [0, 1, 0], [1, 0, 1]])


def test_floating_point_targets_are_used_as_they_are():
    np.testing.assert_array_equal(target_kernel([1.0, -2.0]), [[1.0, -2.0], [-2.0, 4.0]])
    Y = np.array([[1.0, 2.0], [0.0, 3.0]])
    np.testing.assert_array_equal(target_kernel(Y), Y @ Y.T)


def test_the_labels_kernel_is_aligned_with_the_labels_and_noise_is_not():
    generator = np.random.default_rng(3)
    y = np.repeat([0, 1, 2], 40)
    noise = generator.normal(size=(120, 400))
    assert target_alignment(5.0 * target_kernel(y) + 2.0, y) == pytest.approx(1.0, abs=1e-12)
    assert abs(target_alignment(noise @ noise.T, y)) < 0.2


def refusal(call, *arguments) -> PathKernelError:
    with pytest.raises(PathKernelError) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((np.eye(2), np.eye(3)), r"The kernels have shapes (2, 2) and (3, 3)"),
        ((np.zeros((2, 2)), np.eye(2)), "`K` is zero everywhere"),
        ((np.eye(2), np.zeros((2, 2))), "`L` is zero everywhere"),
        ((np.ones(3), np.ones(3)), "`K` has shape (3,)"),
        ((np.ones((0, 0)), np.ones((0, 0))), "`K` has shape (0, 0)"),
        ((np.array([[1.0, np.nan], [0.0, 1.0]]), np.eye(2)), "`K` holds nan at row 0, column 1"),
    ],
)
def test_alignment_refuses_in_three_parts(arguments, found):
    error = refusal(kernel_alignment, *arguments)
    assert error.found == found
    assert error.expected
    assert error.write


def test_centred_alignment_refuses_a_constant_kernel():
    error = refusal(target_alignment, np.eye(5), np.zeros(5, dtype=int))
    assert error.found == "`L` is constant once its row and column means are taken out"
    assert "at least two classes" in error.write
    assert "`K` is constant" in str(refusal(centered_kernel_alignment, np.full((7, 7), 0.1), np.eye(7)))


@pytest.mark.parametrize("y", [[], [[0, 1], [1, 0]], np.zeros((2, 2, 2))])
def test_target_kernel_refuses_what_is_not_one_target_per_sample(y):
    error = refusal(target_kernel, y)
    assert error.found.startswith("`y` has shape")
    assert "argmax" in error.write
