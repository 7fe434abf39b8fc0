"""Spectrum of a Gram matrix: how many directions a kernel can tell apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigvalsh

from pathkernel.analysis.gram_matrix import as_gram_matrix, relative_tolerance
from pathkernel.errors import PathKernelError


def spectrum(K: ArrayLike) -> NDArray[np.float64]:
    """Eigenvalues of a symmetric matrix, largest first.

    Parameters
    ----------
    K
        Gram matrix, shape (n, n).

    Returns
    -------
    ndarray
        Shape (n,), descending. Values of the order of n · ε · λ₁ are rounding, of either
        sign. Time O(n³), memory O(n²).

    Raises
    ------
    PathKernelError
        If `K` is not a finite symmetric matrix.

    Examples
    --------
    >>> spectrum([[2.0, 1.0], [1.0, 2.0]]).round(12)
    array([3., 1.])
    """
    eigenvalues: NDArray[np.float64] = eigvalsh(as_gram_matrix(K))[::-1]
    return eigenvalues


def rounding_floor(eigenvalues: NDArray[np.float64]) -> float:
    """Size below which a computed eigenvalue is rounding: n · ε · max abs(λ).

    Parameters
    ----------
    eigenvalues
        Shape (n,).

    Returns
    -------
    float
        In units of the eigenvalues.
    """
    return float(len(eigenvalues) * np.finfo(np.float64).eps * np.abs(eigenvalues).max())


def effective_rank(K: ArrayLike) -> float:
    """Number of equally strong directions that would carry the same entropy.

    erank(K) = exp( - Σ_k p_k log p_k ),   p_k = σ_k / Σ_j σ_j

    with σ_k = abs(λ_k) the singular values of the symmetric matrix: the eigenvalues themselves
    for a positive semi-definite one. Nothing to tune, unlike a rank with a threshold.

    Parameters
    ----------
    K
        Gram matrix, shape (n, n).

    Returns
    -------
    float
        In [1, n]: 1 for a rank-one matrix, n for a multiple of the identity.

    Raises
    ------
    PathKernelError
        If `K` is not a finite symmetric matrix or is zero.

    References
    ----------
    Roy and Vetterli, "The effective rank: a measure of effective dimensionality",
    EUSIPCO 2007, definition 1.

    Examples
    --------
    >>> round(effective_rank([[1.0, 0.0], [0.0, 1.0]]), 12)
    2.0
    """
    return effective_rank_of(spectrum(K))


def effective_rank_of(eigenvalues: NDArray[np.float64]) -> float:
    """`effective_rank` for eigenvalues that are already at hand, shape (n,)."""
    strengths = np.abs(eigenvalues)
    if strengths.max() == 0.0:
        raise PathKernelError(
            "Every eigenvalue of `K` is zero",
            "An effective rank needs at least one direction",
            "Leave this kernel out",
        )
    p = strengths / strengths.sum()
    p = p[p > 0]  # p log p → 0
    return float(np.exp(-np.sum(p * np.log(p))))


def cumulative(K: ArrayLike) -> NDArray[np.float64]:
    """Part of the trace that the k largest eigenvalues carry.

    c_k = Σ_{j ≤ k} λ_j / Σ_j λ_j

    Parameters
    ----------
    K
        Positive semi-definite Gram matrix, shape (n, n).

    Returns
    -------
    ndarray
        c_1 … c_n, shape (n,), rising to 1.

    Raises
    ------
    PathKernelError
        If `K` is not a finite symmetric matrix, is zero, or has an eigenvalue that is
        negative beyond rounding: parts of a whole cannot be negative.

    Examples
    --------
    >>> cumulative([[2.0, 1.0], [1.0, 2.0]]).round(12)
    array([0.75, 1.  ])
    """
    eigenvalues = spectrum(K)
    tolerance = relative_tolerance(K) * np.abs(eigenvalues).max()
    if eigenvalues[0] <= 0.0 or eigenvalues[-1] < -tolerance:
        raise PathKernelError(
            f"The eigenvalues of `K` lie between {eigenvalues[-1]:.3g} and {eigenvalues[0]:.3g}",
            f"They are non-negative up to rounding ({tolerance:.2g}) and not all zero",
            "Use PathKernel, which is positive semi-definite; spectrum(K) accepts any symmetric matrix",
        )
    kept = np.clip(eigenvalues, 0.0, None)
    parts: NDArray[np.float64] = np.cumsum(kept) / kept.sum()
    return parts
