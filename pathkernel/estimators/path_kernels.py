"""What estimators share that put the path kernel of a network, trained in ``fit``, into a solver of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np

from pathkernel._typing import PyTree
from pathkernel.errors import check_choice, check_number
from pathkernel.estimators.network_estimator import FittedOn, NetworkEstimator
from pathkernel.estimators.samples import in_three_parts
from pathkernel.gradients.pytrees import take
from pathkernel.kernels.cosine import CosineKernel
from pathkernel.kernels.kernel import Kernel, ScaledKernel
from pathkernel.path_kernel.label_leak import unchecked
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.trajectory.schedule import Every, RecordingLevel, RunSize, WeightsOnly

POINTS = 64
"""Points of a path that are kept, about: a kernel of few stretches takes the middle of each. Chosen, not measured."""

NORMALIZATIONS = ("mean", "cosine", None)


class PathKernelEstimator(NetworkEstimator):
    """Estimator whose kernel is the path kernel of a network that was trained on the same samples."""

    steps: int | None
    normalization: str | None

    kernel_: PathKernel
    solver_: Any

    _kernel: Kernel
    _references: PyTree

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
        self._references = take(fitted.inputs, fitted.ids)
        with unchecked():  # the network has seen the labels of these samples alone
            if self.normalization == "cosine":
                self._kernel = CosineKernel(self.kernel_)
                return self._kernel(self._references)
            matrix = self.kernel_(self._references)
        _, weights = self._counted(fitted)
        mean = float(np.average(matrix.diagonal(), weights=weights))
        scale = 1.0 if self.normalization is None or mean <= 0 else 1 / mean
        self._kernel = ScaledKernel(self.kernel_, scale)
        return scale * matrix

    @staticmethod
    def _counted(fitted: FittedOn) -> tuple[np.ndarray, np.ndarray | None]:
        return fitted.values[fitted.ids], None if fitted.weights is None else fitted.weights[fitted.ids]

    def _to_references(self, X: Any) -> np.ndarray:
        """Matrix between samples and those of ``fit``, (n, m)."""
        queries = self._queries(X)
        return self._kernel(queries, self._references)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.steps is not None:
            check_number("steps", self.steps, positive=True, whole=True, example=8)
        check_choice("normalization", self.normalization, NORMALIZATIONS, "Normalizations")
        solver = self._unfitted()
        if solver is not None:  # refused before the network is trained, not after
            with in_three_parts():
                solver._validate_params()

    def _unfitted(self) -> Any:
        """The solver before it is fitted; None for those that are made with the matrix."""
        return None
