"""Spectrum: known eigenvalues, ranks with closed forms, and the matrices that are refused."""

from __future__ import annotations

import numpy as np
import pytest

from pathkernel.analysis.spectrum import cumulative, effective_rank, rounding_floor, spectrum
from pathkernel.errors import PathKernelError


def with_eigenvalues(eigenvalues: list[float], seed: int = 0) -> np.ndarray:
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
    K = (rotation * np.asarray(eigenvalues)) @ rotation.T
    return 0.5 * (K + K.T)


def test_spectrum_finds_planted_eigenvalues_largest_first():
    np.testing.assert_allclose(spectrum(with_eigenvalues([0.5, 4.0, -1.0, 2.0])), [4.0, 2.0, 0.5, -1.0], atol=1e-13)


def test_spectrum_sums_to_the_trace():
    K = with_eigenvalues(list(np.geomspace(1, 1e-6, 30)))
    assert spectrum(K).sum() == pytest.approx(np.trace(K), rel=1e-13)
    assert (np.diff(spectrum(K)) <= 0).all()


def test_spectrum_allows_the_asymmetry_of_single_precision():
    K = with_eigenvalues([3.0, 2.0, 1.0]).astype(np.float32)
    K[0, 1] *= np.float32(1 + 1e-6)
    np.testing.assert_allclose(spectrum(K), [3, 2, 1], atol=1e-5)
    with pytest.raises(PathKernelError, match="differs from its transpose"):
        spectrum(K.astype(np.float64))


@pytest.mark.parametrize("n", [1, 4, 25])
def test_effective_rank_of_identity_is_n(n):
    assert effective_rank(3.0 * np.eye(n)) == pytest.approx(n, rel=1e-13)


def test_effective_rank_of_rank_one_is_one():
    v = np.random.default_rng(1).normal(size=20)
    assert effective_rank(np.outer(v, v)) == pytest.approx(1.0, abs=1e-11)


def test_effective_rank_of_two_eigenvalues_is_the_exponential_of_their_entropy():
    p = 0.9
    expected = np.exp(-(p * np.log(p) + (1 - p) * np.log(1 - p)))
    assert effective_rank(with_eigenvalues([9.0, 1.0])) == pytest.approx(expected, rel=1e-12)


def test_effective_rank_uses_singular_values_where_eigenvalues_are_negative():
    assert effective_rank(np.diag([1.0, -1.0, 1.0])) == pytest.approx(3.0, rel=1e-13)


def test_cumulative_rises_to_one():
    np.testing.assert_allclose(cumulative(with_eigenvalues([5.0, 3.0, 2.0])), [0.5, 0.8, 1.0], atol=1e-14)
    rank_one = np.ones((6, 6))
    np.testing.assert_allclose(cumulative(rank_one), np.ones(6), atol=1e-14)


def test_rounding_floor_lies_above_the_zeros_of_a_low_rank_matrix():
    features = np.random.default_rng(2).normal(size=(50, 3))
    eigenvalues = spectrum(features @ features.T)
    assert (eigenvalues > rounding_floor(eigenvalues)).sum() == 3


@pytest.mark.parametrize(
    ("call", "K", "found"),
    [
        (spectrum, np.array([[1.0, 2.0], [0.0, 1.0]]), "`K` differs from its transpose by up to 2"),
        (spectrum, np.ones((2, 3)), "`K` has shape (2, 3)"),
        (spectrum, np.array([[np.inf]]), "`K` holds inf at row 0, column 0"),
        (effective_rank, np.zeros((3, 3)), "Every eigenvalue of `K` is zero"),
        (cumulative, np.diag([2.0, -1.0]), "The eigenvalues of `K` lie between -1 and 2"),
        (cumulative, np.zeros((2, 2)), "The eigenvalues of `K` lie between 0 and 0"),
    ],
)
def test_refusals_have_three_parts(call, K, found):
    with pytest.raises(PathKernelError) as caught:
        call(K)
    assert caught.value.found == found
    assert caught.value.expected
    assert caught.value.write


def test_an_asymmetric_matrix_is_told_where_to_turn():
    with pytest.raises(PathKernelError, match="Use PathKernel, which is symmetric"):
        spectrum(np.triu(np.ones((3, 3))))
