"""Kernel two-sample test of whether two sets of samples come from one distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathkernel.analysis.arrays import as_array
from pathkernel.analysis.gram_matrix import as_gram_matrix
from pathkernel.errors import PathKernelError, check_number, is_whole

COLUMNS = 1024
"""Permutations whose sums are computed at once."""


@dataclass(frozen=True)
class TwoSampleTest:
    """Result of `two_sample_test`.

    Attributes
    ----------
    statistic
        Unbiased MMD², in units of the kernel; may be negative.
    p_value
        In [1 / (permutations + 1), 1].
    permutations
        How many random divisions the observed one was compared with.
    null
        MMD² of each of these, shape (permutations,).
    """

    statistic: float
    p_value: float
    permutations: int
    null: NDArray[np.float64]

    def __str__(self) -> str:
        return f"MMD² = {self.statistic:.4g}, p = {self.p_value:.3g} ({self.permutations} permutations)"


def mmd_squared(K: ArrayLike, first: ArrayLike) -> float:
    r"""Unbiased estimate of the squared maximum mean discrepancy of two sets of samples.

    MMD² = Σ_{i≠j} K(x_i, x_j) / m(m-1) + Σ_{i≠j} K(y_i, y_j) / n(n-1) - 2 Σ_{ij} K(x_i, y_j) / mn

    The squared distance of the two means in the kernel's feature space, which is zero for one distribution.

    Parameters
    ----------
    K
        Gram matrix of both sets together, shape (m + n, m + n).
    first
        For each sample, whether it is of the first set: shape (m + n,), booleans.

    Returns
    -------
    float
        In units of the kernel; its mean over draws is MMD², so that it may be negative.

    Raises
    ------
    PathKernelError
        If `K` is not a finite symmetric matrix, or a set has fewer than two samples.

    References
    ----------
    Gretton, Borgwardt, Rasch, Schölkopf and Smola, "A kernel two-sample test", JMLR 13, 2012, lemma 6.

    Examples
    --------
    >>> K = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    >>> mmd_squared(K, [True, True, False, False])
    2.0
    """
    matrix = as_gram_matrix(K)
    division = _division(first, len(matrix))
    return float(_discrepancies(_without_diagonal(matrix), division[:, None].astype(np.float64))[0])


def two_sample_test(K: ArrayLike, first: ArrayLike, *, permutations: int = 999, seed: int = 0) -> TwoSampleTest:
    r"""Permutation test of whether two sets of samples come from one distribution.

    p = (1 + number of random divisions with MMD² not below the observed) / (1 + permutations)

    Under the null hypothesis every division of the samples is as likely as the observed one: the probability of
    p ≤ α is at most α, whatever the kernel and however few the samples.

    Parameters
    ----------
    K
        Gram matrix of both sets together, shape (m + n, m + n), such as ``kernel(numpy.concatenate([X, Y]))``.
    first
        For each sample, whether it is of the first set: shape (m + n,), booleans.
    permutations
        How many random divisions into m and n samples.
    seed
        Of the random divisions.

    Returns
    -------
    TwoSampleTest
        MMD², its p-value, and MMD² of the random divisions.

    Raises
    ------
    PathKernelError
        As `mmd_squared`; and for a number of permutations that is not positive.

    Notes
    -----
    A learnt kernel has to be learnt from *other* samples: the network that was trained on one of the sets, or to tell
    them apart, remembers its samples, and the test is then no longer one of the null hypothesis. Train on one half of
    the data and test on the other.

    Time O(permutations · (m + n)²), memory O((m + n) · 1024).

    References
    ----------
    Gretton et al. 2012, sections 3 and 5; Phipson and Smyth, "Permutation p-values should never be zero", 2010, for p;
    Liu, Xu, Lu, Zhang, Gretton and Sutherland, "Learning deep kernels for non-parametric two-sample tests", ICML 2020.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.concatenate([np.zeros(8), np.ones(8)]) + np.linspace(0, 0.1, 16)
    >>> two_sample_test(np.exp(-np.subtract.outer(x, x) ** 2), x < 0.5).p_value
    0.001
    """
    if seed is not None:
        check_number("seed", seed, whole=True, example=0)
    if not is_whole(permutations) or permutations < 1:
        raise PathKernelError(
            f"`permutations={permutations!r}` was given",
            "The observed division is compared with one random division or more",
            "Write `two_sample_test(K, first, permutations=999)`",
        )
    matrix = _without_diagonal(as_gram_matrix(K))
    observed = _division(first, len(matrix))
    generator = np.random.default_rng(seed)
    statistic = float(_discrepancies(matrix, observed[:, None].astype(np.float64))[0])
    null = np.empty(permutations)
    for start in range(0, permutations, COLUMNS):
        part = null[start : start + COLUMNS]
        divisions = np.repeat(observed[:, None].astype(np.float64), len(part), axis=1)
        part[:] = _discrepancies(matrix, generator.permuted(divisions, axis=0))
    # Divisions that are the observed one, or its mirror image, are found again to rounding.
    rounding = len(matrix) * np.finfo(np.float64).eps * float(np.abs(matrix).max())
    reached = int((null >= statistic - rounding).sum())
    return TwoSampleTest(statistic, (1 + reached) / (1 + permutations), int(permutations), null)


def _division(first: ArrayLike, samples: int) -> NDArray[np.bool_]:
    """Membership of the first set, shape (samples,)."""
    division = as_array(first, "first")
    if division.dtype != np.bool_ or division.shape != (samples,):
        raise PathKernelError(
            f"`first` has shape {division.shape} and dtype {division.dtype}, for {samples} samples",
            "It says of each sample whether it is of the first set",
            "Write `first = numpy.arange(len(K)) < m` where the first m samples are the first set",
        )
    sizes = int(division.sum()), int((~division).sum())
    if min(sizes) < 2:
        raise PathKernelError(
            f"The two sets have {sizes[0]} and {sizes[1]} samples",
            "Two samples of each set or more are compared",
            "Pass more samples",
        )
    return division


def _without_diagonal(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return matrix - np.diag(matrix.diagonal())


def _discrepancies(matrix: NDArray[np.float64], divisions: NDArray[np.float64]) -> NDArray[np.float64]:
    """MMD² of several divisions of equal sizes, shape (divisions,), from a matrix with a zero diagonal.

    With s the indicator of the first set: Σ_{i≠j} K(x_i, x_j) = sᵀ K s, and the other sums from the rows' sums r = K 1.
    """
    m = int(divisions[:, 0].sum())
    n = len(matrix) - m
    rows = matrix.sum(axis=1)
    within_first = np.einsum("ib,ib->b", divisions, matrix @ divisions)
    of_first = rows @ divisions
    between = of_first - within_first
    within_second = rows.sum() - 2.0 * of_first + within_first
    found: NDArray[np.float64] = within_first / (m * (m - 1)) + within_second / (n * (n - 1)) - 2.0 * between / (m * n)
    return found
