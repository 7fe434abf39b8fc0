"""What estimators share that put the path kernel of a network, trained in ``fit``, into a solver of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, is_whole
from pathkernel.estimators.network_estimator import FittedOn, NetworkEstimator
from pathkernel.gradients.pytrees import take
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.trajectory.schedule import Every, RecordingLevel, RunSize, WeightsOnly

POINTS = 64
"""Points of a path that are kept, about: a kernel of few stretches takes the middle of each. Chosen, not measured."""

NORMALIZATIONS = ("mean", "cosine", None)


class FittedKernel:
    r"""A kernel whose values are of order 1, so that penalties and noise mean the same for every network.

    .. math:: K(x, x') / \overline{K(x_i, x_i)} \quad\text{or}\quad K(x, x') / \sqrt{K(x, x)\, K(x', x')}

    Parameters
    ----------
    kernel
        The path kernel.
    references
        m samples of ``fit``.
    scale
        Mean of their K(x_i, x_i); None for the cosine.
    diagonal
        Their K(x_i, x_i), (m,).
    """

    def __init__(self, kernel: PathKernel, references: PyTree, scale: float | None, diagonal: np.ndarray) -> None:
        self.kernel, self.references = kernel, references
        self.scale, self._diagonal = scale, diagonal

    @classmethod
    def of(
        cls, kernel: PathKernel, references: PyTree, normalization: str | None, weights: np.ndarray | None
    ) -> tuple[FittedKernel, np.ndarray]:
        """The kernel, and its matrix of the samples of ``fit``, (m, m)."""
        matrix = kernel(references)
        diagonal = matrix.diagonal().copy()
        if normalization == "cosine":
            return cls(kernel, references, None, diagonal), _cosine(matrix, diagonal, diagonal)
        mean = 1.0 if normalization is None else float(np.average(diagonal, weights=weights))
        scale = mean if mean > 0 else 1.0
        return cls(kernel, references, scale, diagonal), matrix / scale

    def to_references(self, X: PyTree) -> np.ndarray:
        """Matrix between samples and those of ``fit``, (n, m)."""
        matrix = self.kernel(X, self.references)
        return matrix / self.scale if self.scale else _cosine(matrix, self.kernel.diagonal(X), self._diagonal)

    def between(self, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
        """Matrix between any samples, (n, m)."""
        matrix = self.kernel(X, Y)
        if self.scale:
            return matrix / self.scale
        return _cosine(matrix, self.kernel.diagonal(X), self.kernel.diagonal(X if Y is None else Y))

    def diagonal(self, X: PyTree) -> np.ndarray:
        """K(x, x), (n,)."""
        found = self.kernel.diagonal(X)
        return found / self.scale if self.scale else (found > 0).astype(np.float64)


def _cosine(matrix: np.ndarray, diagonal: np.ndarray, other: np.ndarray) -> np.ndarray:
    lengths = [np.sqrt(np.where(own > 0, own, 1.0)) for own in (diagonal, other)]
    return matrix / lengths[0][:, None] / lengths[1]


class PathKernelEstimator(NetworkEstimator):
    """Estimator whose kernel is the path kernel of a network that was trained on the same samples."""

    steps: int | None
    normalization: str | None

    kernel_: PathKernel
    solver_: Any

    def _schedule(self, run: RunSize) -> RecordingLevel:
        every = 1 if self.early_stopping or self.steps is None else run.steps // POINTS
        return Every(every) if every > 1 else WeightsOnly()

    def _fit_kernel(self, X: Any, y: Any, sample_weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Matrix (m, m) of the samples with a weight, their targets and their weights."""
        fitted = self._fit_network(X, y, sample_weight)
        self._ids = fitted.ids
        return self._matrix_of(fitted), *self._counted(fitted)

    def _matrix_of(self, fitted: FittedOn) -> np.ndarray:
        steps = None if self.steps is None else min(self.steps, len(self.trajectory_))
        self.kernel_ = PathKernel(self.trajectory_, steps=steps)
        _, weights = self._counted(fitted)
        references = take(fitted.inputs, fitted.ids)
        self._kernel, matrix = FittedKernel.of(self.kernel_, references, self.normalization, weights)
        return matrix

    @staticmethod
    def _counted(fitted: FittedOn) -> tuple[np.ndarray, np.ndarray | None]:
        return fitted.values[fitted.ids], None if fitted.weights is None else fitted.weights[fitted.ids]

    def _to_references(self, X: Any) -> np.ndarray:
        """Matrix between samples and those of ``fit``, (n, m)."""
        queries = self._queries(X)
        return self._kernel.to_references(queries)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.steps is not None and (not is_whole(self.steps) or self.steps < 1):
            raise InputError(
                f"`steps={self.steps!r}` was given",
                "The path is cut into that many stretches, a whole number from 1 upwards; None takes every step",
                "Write `steps=8`",
            )
        if self.normalization not in NORMALIZATIONS:
            raise InputError(
                f"`normalization={self.normalization!r}` was given",
                f"It is one of {', '.join(map(repr, NORMALIZATIONS))}",
                'Write `normalization="mean"`',
            )
