"""Symmetric functions made positive semi-definite, and how much that changes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.acceptance import single_sample
from pathkernel.gradients.pytrees import count
from pathkernel.kernels.kernel import Kernel, KernelFunction, checked_kernel, kernel_matrix, reference_samples


@dataclass(frozen=True)
class SpectrumChange:
    """What was taken from a matrix to make it positive semi-definite.

    Attributes
    ----------
    negative
        How many eigenvalues were negative beyond rounding, of how many samples.
    samples
        N.
    smallest
        The smallest eigenvalue.
    largest
        The largest eigenvalue.
    relative
        ‖K₊ − K‖ / ‖K‖ (Frobenius).
    """

    negative: int
    samples: int
    smallest: float
    largest: float
    relative: float

    def __str__(self) -> str:
        return (
            f"{self.negative} of {self.samples} eigenvalues were negative, down to {self.smallest:.3g} (the largest is "
            f"{self.largest:.3g}); the matrix changed by {self.relative:.2g} relative"
        )


class RepairedKernel(Kernel):
    r"""Positive semi-definite kernel nearest to a symmetric function on N reference samples Z.

    .. math:: K_+(x, x') = k(x, Z)\, U_+ \Lambda_+^{-1} U_+^\top k(Z, x'), \qquad
              k(Z, Z) = U \Lambda U^\top,\ \Lambda_+ \text{ the positive eigenvalues}

    On Z it is :math:`U_+ \Lambda_+ U_+^\top`, the nearest positive semi-definite matrix in the Frobenius norm
    ("spectrum clip"); elsewhere, its extension by features of Z alone, of rank N at most (Nyström).

    Parameters
    ----------
    kernel
        A symmetric callable ``(X, Y=None) -> (n, m)``, such as `sklearn.metrics.pairwise.sigmoid_kernel`. `PathKernel`
        and `TangentKernel` need no repair.
    X
        Z, as a rule the training samples; copied.

    Attributes
    ----------
    change
        `SpectrumChange`: how many eigenvalues were negative, and how much that was.

    Raises
    ------
    InputError
        Where k(Z, Z) is not symmetric, not finite, or has no positive eigenvalue.

    Notes
    -----
    Time N³ and memory N² when it is made. Where nothing is negative, K₊ is K on Z, but not elsewhere.

    References
    ----------
    Higham 1988, "Computing a nearest symmetric positive semidefinite matrix"; Chen, Garcia, Gupta, Rahimi and
    Cazzanti 2009, "Similarity-based classification", JMLR 10, section 4.1, for test samples.
    """

    def __init__(self, kernel: KernelFunction, X: PyTree) -> None:
        self._parts = (checked_kernel(kernel, "RepairedKernel"),)
        self._reference = reference_samples(X, "RepairedKernel")
        matrix = _symmetric(kernel_matrix(self._parts[0], self._reference))
        eigenvalues, vectors = eigh(matrix)
        largest = float(eigenvalues[-1])
        floor = len(eigenvalues) * np.finfo(np.float64).eps * float(np.abs(eigenvalues).max())
        if largest <= floor:
            raise InputError(
                f"No eigenvalue of the matrix of {len(matrix)} samples is positive; the largest is {largest:.3g}",
                "A function that is repaired is positive for some combination of samples",
                "Look whether it is a distance: `lambda X, Y=None: -distances(X, Y) ** 2` may become a kernel once "
                "centred",
            )
        kept = eigenvalues > floor
        # U₊ Λ₊^(-1/2): the kernel is the scalar product of features k(x, Z) times this.
        self._map = vectors[:, kept] / np.sqrt(eigenvalues[kept])
        size = float(np.linalg.norm(eigenvalues))
        self._change = SpectrumChange(
            negative=int((eigenvalues < -floor).sum()),
            samples=len(eigenvalues),
            smallest=float(eigenvalues[0]),
            largest=largest,
            relative=float(np.linalg.norm(eigenvalues[~kept])) / size,
        )

    @property
    def change(self) -> SpectrumChange:
        """What was taken from the matrix of Z."""
        return self._change

    def features(self, X: PyTree) -> np.ndarray:
        """φ with K₊ = φφᵀ, float64 (n, positive eigenvalues)."""
        shapes = [tuple(getattr(leaf, "shape", ())) for leaf in pytree.tree_leaves(X)]
        if shapes == [tuple(leaf.shape[1:]) for leaf in pytree.tree_leaves(self._reference)]:
            raise single_sample("RepairedKernel", "Kernels", shapes[0])
        return kernel_matrix(self._parts[0], X, self._reference) @ self._map

    def __call__(self, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
        """Kernel matrix, float64 (n, m); Y None stands for X."""
        rows = self.features(X)
        if Y is not None and Y is not X:
            return rows @ self.features(Y).T
        self.check_label_leak(X)  # the function itself is asked for X against Z alone
        return rows @ rows.T

    def diagonal(self, X: PyTree) -> np.ndarray:
        """K₊(x, x) for every sample, float64 (n,)."""
        return (self.features(X) ** 2).sum(axis=1)

    def __repr__(self) -> str:
        return f"RepairedKernel({self._parts[0]!r}, {count(self._reference)} samples: {self._change})"


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    """(K + Kᵀ) / 2 of a matrix whose triangles differ by rounding at most.

    Raises
    ------
    InputError
        For one that is not finite, or not symmetric.
    """
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise InputError(
            f"The matrix to be repaired holds {matrix[row, column]} at row {row}, column {column}",
            "Every value of a kernel is finite",
            "Look for a sample whose values overflow, and leave it out",
        )
    asymmetry = float(np.abs(matrix - matrix.T).max(initial=0.0))
    if asymmetry > np.sqrt(np.finfo(np.float64).eps) * np.abs(matrix).max(initial=0.0):
        raise InputError(
            f"The matrix to be repaired differs from its transpose by up to {asymmetry:.3g}",
            "A repair clips the eigenvalues of a symmetric function",
            "Write `RepairedKernel(lambda X, Y=None: (k(X, Y) + k(Y, X).T) / 2, X)` if the mean of both is meant",
        )
    return 0.5 * (matrix + matrix.T)
