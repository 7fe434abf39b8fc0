"""Cosine of the angle between samples in the feature space of a kernel."""

from __future__ import annotations

import numpy as np

from pathkernel._typing import PyTree
from pathkernel.kernels.kernel import (
    Kernel,
    KernelFunction,
    checked_kernel,
    kernel_diagonal,
    kernel_matrix,
)


class CosineKernel(Kernel):
    r"""Kernel of normalised features: the cosine of the angle between them.

    .. math:: \frac{K(x, x')}{\sqrt{K(x, x)\, K(x', x')}}

    One on the diagonal, whatever the length of a sample's features, which for path and tangent kernels is the length
    of a gradient; zero for samples without any, K(x, x) = 0.

    Parameters
    ----------
    kernel
        A kernel, or a callable ``(X, Y=None) -> (n, m)``.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> kernel = pk.kernels.CosineKernel(pk.TangentKernel(torch.nn.Linear(3, 1)))
    >>> kernel(torch.eye(3)).round(6).tolist()  # (⟨x, x'⟩ + 1) / 2
    [[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]
    """

    def __init__(self, kernel: KernelFunction) -> None:
        self._parts = (checked_kernel(kernel, "CosineKernel"),)

    def __call__(self, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
        """Kernel matrix, float64 (n, m); Y None stands for X."""
        matrix = kernel_matrix(self._parts[0], X, Y)
        if Y is None or Y is X:
            inverse = inverse_norms(matrix.diagonal())
            cosines = matrix * (inverse[:, None] * inverse[None, :])
            np.fill_diagonal(cosines, inverse > 0)  # exactly, and not to rounding
            return cosines
        rows, columns = (inverse_norms(kernel_diagonal(self._parts[0], samples)) for samples in (X, Y))
        return matrix * (rows[:, None] * columns[None, :])

    def diagonal(self, X: PyTree) -> np.ndarray:
        """One for every sample, zero for those with K(x, x) = 0; float64 (n,)."""
        return (kernel_diagonal(self._parts[0], X) > 0).astype(np.float64)

    def __repr__(self) -> str:
        return f"CosineKernel({self._parts[0]!r})"


def inverse_norms(diagonal: np.ndarray) -> np.ndarray:
    """1 / √K(x, x), zero where there is no length."""
    return np.divide(1.0, np.sqrt(np.maximum(diagonal, 0.0)), out=np.zeros(len(diagonal)), where=diagonal > 0)
