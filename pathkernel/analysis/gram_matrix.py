"""Definition of a Gram matrix: the checks that every analysis of one begins with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathkernel.analysis.arrays import as_array, real_numbers
from pathkernel.errors import PathKernelError

ROUNDING = 1e-2
"""What is taken for rounding in a matrix that may have been computed in any type: products of factors in bfloat16 have
errors of 4e-3 (`benchmarks/engines.py`), and come as float64."""


def as_kernel_matrix(K: ArrayLike, name: str = "K") -> NDArray[np.float64]:
    """Return a kernel matrix as a finite float64 array.

    Parameters
    ----------
    K
        Kernel values, shape (n, m), anything ``numpy.asarray`` reads.
    name
        How error messages call the matrix.

    Returns
    -------
    ndarray
        Shape (n, m), float64.

    Raises
    ------
    PathKernelError
        If `K` is not a matrix, is empty, or holds NaN or infinity.
    """
    matrix = real_numbers(K, name, "A kernel matrix holds real numbers")
    if matrix.ndim != 2 or matrix.size == 0:
        raise PathKernelError(
            f"`{name}` has shape {matrix.shape}",
            "A kernel matrix has shape (n, m), queries by references, with at least one entry",
            'Pass K = kernel(X, X); sum full output blocks first, e.g. with outputs="trace"',
        )
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise PathKernelError(
            f"`{name}` holds {matrix[row, column]} at row {row}, column {column}",
            "Every kernel value is finite",
            "Look for a sample whose output or gradient overflows, and leave its row and column out",
        )
    return matrix


def as_gram_matrix(K: ArrayLike, name: str = "K") -> NDArray[np.float64]:
    """Return a Gram matrix as a finite, exactly symmetric float64 array.

    The two triangles may differ by rounding, at most √ε · max|K| with ε of the dtype that
    `K` came in; the mean of both is returned.

    Parameters
    ----------
    K
        Kernel of a sample with itself, shape (n, n).
    name
        How error messages call the matrix.

    Returns
    -------
    ndarray
        (K + Kᵀ) / 2, shape (n, n), float64.

    Raises
    ------
    PathKernelError
        If `K` is not square, not symmetric, or fails `as_kernel_matrix`.
    """
    matrix = as_kernel_matrix(K, name)
    if matrix.shape[0] != matrix.shape[1]:
        raise PathKernelError(
            f"`{name}` has shape {matrix.shape}",
            "A Gram matrix is square: the same samples on both sides",
            f"Pass {name} = kernel(X, X), not kernel(X_test, X_train)",
        )
    tolerance = relative_tolerance(K) * np.abs(matrix).max()
    asymmetry = np.abs(matrix - matrix.T).max()
    if asymmetry > tolerance:
        raise PathKernelError(
            f"`{name}` differs from its transpose by up to {asymmetry:.3g}",
            f"A Gram matrix is symmetric, here to {tolerance:.3g}",
            "Use PathKernel, which is symmetric; the weights of KernelMachine are not",
        )
    symmetric: NDArray[np.float64] = 0.5 * (matrix + matrix.T)
    return symmetric


def check_pairs(K: NDArray[np.float64], name: str = "K") -> None:
    """Refuse a Gram matrix in which two samples show that it is not positive semi-definite.

    Of such a matrix the diagonal is no lower than 0, and K_ij² ≤ K_ii K_jj for all pairs; time O(n²). Eigenvalues below
    0 that only more samples together have go unnoticed.

    Parameters
    ----------
    K
        As of `as_gram_matrix`.
    name
        How error messages call the matrix.

    Raises
    ------
    PathKernelError
        With the entries.
    """
    diagonal, rounding = K.diagonal(), ROUNDING * np.abs(K).max()
    lowest = int(diagonal.argmin())
    sizes = np.sqrt(np.maximum(diagonal, 0.0))
    i, j = np.unravel_index(int((np.abs(K) - sizes[:, None] * sizes).argmax()), K.shape)
    if diagonal[lowest] < -rounding:
        found = f"`{name}` is {diagonal[lowest]:.3g} between sample {lowest} and itself"
    elif np.abs(K[i, j]) > (1 + ROUNDING) * sizes[i] * sizes[j] + rounding:
        alone = f"{K[i, i]:.3g} and {K[j, j]:.3g}"
        found = f"`{name}` is {K[i, j]:.3g} between samples {i} and {j}, and {alone} between each and itself"
    else:
        return
    raise PathKernelError(
        found,
        "A kernel is positive semi-definite: no diagonal entry is below 0, and K_ij² is at most K_ii K_jj",
        "Use `PathKernel`, or `kernels.RepairedKernel` for a kernel that is not",
    )


def relative_tolerance(K: ArrayLike) -> float:
    """√ε of the dtype that ``K`` came in: what may be taken for rounding, relative to its size."""
    dtype = as_array(K, "K").dtype
    return float(np.sqrt(np.finfo(dtype if np.issubdtype(dtype, np.floating) else np.float64).eps))


def unit_norm(matrix: NDArray[np.float64], name: str = "K") -> NDArray[np.float64]:
    """Return ``matrix`` divided by its Frobenius norm.

    Dividing by the largest entry first keeps the squares from overflow and underflow.

    Raises
    ------
    PathKernelError
        If every entry is zero: such a kernel has no direction.
    """
    largest = np.abs(matrix).max()
    if largest == 0.0:
        raise PathKernelError(
            f"`{name}` is zero everywhere",
            "A kernel is compared by direction, so its Frobenius norm must be positive",
            "Leave this kernel out; after centring, every constant kernel is zero",
        )
    scaled = matrix / largest
    unit: NDArray[np.float64] = scaled / np.linalg.norm(scaled)
    return unit


def check_same_shape(K: NDArray[np.float64], L: NDArray[np.float64]) -> None:
    """Refuse to compare kernels of different samples."""
    if K.shape != L.shape:
        raise PathKernelError(
            f"The kernels have shapes {K.shape} and {L.shape}",
            "Two kernels are compared on the same samples, in the same order",
            "Evaluate both on the same X",
        )
