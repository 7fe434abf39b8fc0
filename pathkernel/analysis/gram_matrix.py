"""Definition of a Gram matrix: the checks that every analysis of one begins with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathkernel.errors import PathKernelError


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
    matrix = np.asarray(K, dtype=np.float64)
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
    given = np.asarray(K)
    matrix = as_kernel_matrix(given, name)
    if matrix.shape[0] != matrix.shape[1]:
        raise PathKernelError(
            f"`{name}` has shape {matrix.shape}",
            "A Gram matrix is square: the same samples on both sides",
            f"Pass {name} = kernel(X, X), not kernel(X_test, X_train)",
        )
    tolerance = relative_tolerance(given) * np.abs(matrix).max()
    asymmetry = np.abs(matrix - matrix.T).max()
    if asymmetry > tolerance:
        raise PathKernelError(
            f"`{name}` differs from its transpose by up to {asymmetry:.3g}",
            f"A Gram matrix is symmetric, here to {tolerance:.3g}",
            "Use PathKernel, which is symmetric; the weights of KernelMachine are not",
        )
    symmetric: NDArray[np.float64] = 0.5 * (matrix + matrix.T)
    return symmetric


def relative_tolerance(K: ArrayLike) -> float:
    """√ε of the dtype that ``K`` came in: what may be taken for rounding, relative to its size."""
    dtype = np.asarray(K).dtype
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
