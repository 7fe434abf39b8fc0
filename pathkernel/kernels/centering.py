"""Kernel of features from which their mean over a set of samples is subtracted."""

from __future__ import annotations

import numpy as np

from pathkernel._typing import PyTree
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.kernels.kernel import (
    BLOCK,
    Kernel,
    KernelFunction,
    checked_kernel,
    kernel_diagonal,
    kernel_matrix,
    reference_samples,
)


class CenteredKernel(Kernel):
    r"""Kernel of centred features, φ(x) minus the mean of φ over N reference samples Z.

    .. math:: K(x, x') - \bar k(x) - \bar k(x') + \bar{\bar k}, \qquad
              \bar k(x) = \tfrac1N \sum_{z \in Z} K(x, z), \quad
              \bar{\bar k} = \tfrac1{N^2} \sum_{z, z' \in Z} K(z, z')

    On Z itself, it is what `sklearn.preprocessing.KernelCenterer` makes of the matrix.

    Parameters
    ----------
    kernel
        A kernel, or a callable ``(X, Y=None) -> (n, m)``.
    X
        Z, as a rule the training samples; copied.

    Notes
    -----
    Time N² kernel values when it is made, N for each sample of a call. Memory N for each row.
    """

    def __init__(self, kernel: KernelFunction, X: PyTree) -> None:
        self._parts = (checked_kernel(kernel, "CenteredKernel"),)
        self._reference = reference_samples(X, "CenteredKernel")
        n = count(self._reference)
        rows = (self._means(take(self._reference, block)).sum() for block in blocks(n, BLOCK))
        self._mean = float(sum(rows) / n)

    def _means(self, X: PyTree) -> np.ndarray:
        """k̄(x), (n,)."""
        return kernel_matrix(self._parts[0], X, self._reference).mean(axis=1)

    def __call__(self, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
        """Kernel matrix, float64 (n, m); Y None stands for X."""
        matrix, rows = kernel_matrix(self._parts[0], X, Y), self._means(X)
        columns = rows if Y is None or Y is X else self._means(Y)
        return matrix - (rows[:, None] + columns[None, :]) + self._mean

    def diagonal(self, X: PyTree) -> np.ndarray:
        """K(x, x) for every sample, float64 (n,)."""
        return kernel_diagonal(self._parts[0], X) - 2.0 * self._means(X) + self._mean

    def __repr__(self) -> str:
        return f"CenteredKernel({self._parts[0]!r}, {count(self._reference)} samples)"
