"""`PathKernelRidge` and `PathKernelRidgeClassifier`: kernel ridge regression on the path kernel of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.kernel_ridge import KernelRidge

from pathkernel._typing import Loss
from pathkernel.estimators.network_estimator import all_or_nothing
from pathkernel.estimators.path_kernels import PathKernelEstimator
from pathkernel.estimators.tasks import NetworkClassification, NetworkRegression


class RidgeEstimator(PathKernelEstimator):
    """Part of both: kernel ridge regression of centred targets."""

    alpha: float

    def _unfitted(self) -> KernelRidge:
        return KernelRidge(alpha=self.alpha, kernel="precomputed")

    def _solve(self, matrix: np.ndarray, targets: np.ndarray, weights: np.ndarray | None) -> None:
        self._mean = np.average(targets, axis=0, weights=weights)
        self.solver_ = self._unfitted().fit(matrix, targets - self._mean, sample_weight=weights)

    def _regressed(self, X: Any) -> np.ndarray:
        matrix = self._to_references(X)
        return self.solver_.predict(matrix) + self._mean


class PathKernelRidge(RegressorMixin, RidgeEstimator, NetworkRegression):
    r"""Kernel ridge regression on the path kernel of a network that is trained on the samples of ``fit``.

    .. math:: f(x) = \bar y + \sum_i a_i K(x, x_i), \qquad (K + \alpha W^{-1})\, a = y - \bar y

    Parameters
    ----------
    module, hidden, optimizer, loss, epochs, batch_size, learning_rate, data, device, random_state, early_stopping
        Of the network and its training; see `pathkernel.KernelMachineRegressor`.
    validation_fraction, n_iter_no_change, tol, callbacks, verbose, warm_start
        Of the same.
    alpha
        Penalty α of `sklearn.kernel_ridge.KernelRidge`.
    steps, normalization
        See `PathKernelSVC`.

    Attributes
    ----------
    network_, trajectory_, kernel_, solver_, loss_curve_, validation_curve_, n_iter_
        See `PathKernelSVC`; the solver is a `sklearn.kernel_ridge.KernelRidge`.

    Examples
    --------
    >>> import pathkernel as pk
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> regressor = pk.PathKernelRidge(hidden=(16,), epochs=10, random_state=0).fit(X[:300], y[:300])
    >>> bool(regressor.score(X[300:], y[300:]) > 0.3)
    True
    """

    def __init__(
        self,
        module: Any = None,
        *,
        alpha: float = 1.0,
        steps: int | None = 5,
        normalization: str | None = "mean",
        hidden: int | Sequence[int] = (256,),
        optimizer: Any = "adamw",
        loss: Loss | None = None,
        epochs: int = 30,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        data: Any = None,
        device: str | torch.device | None = None,
        random_state: Any = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        callbacks: Any = None,
        verbose: bool | int = False,
        warm_start: bool = False,
    ) -> None:
        self._keep(locals())

    @all_or_nothing
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PathKernelRidge:
        """Train the network, and solve for the coefficients; y is (n,) or (n, k)."""
        self._solve(*self._fit_kernel(X, y, sample_weight))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Numbers, (n,) or (n, k)."""
        return self._regressed(X)


class PathKernelRidgeClassifier(ClassifierMixin, RidgeEstimator, NetworkClassification):
    """Kernel ridge regression of labels, on the path kernel of a network that is trained on the samples of ``fit``.

    Each class is told from the others by a regression of +1 and −1, as in `sklearn.linear_model.RidgeClassifier`.

    Parameters
    ----------
    module, hidden, optimizer, loss, epochs, batch_size, learning_rate, data, device, random_state, early_stopping
        Of the network and its training; see `pathkernel.KernelMachineClassifier`.
    validation_fraction, n_iter_no_change, tol, class_weight, callbacks, verbose, warm_start
        Of the same.
    alpha
        Penalty α of `sklearn.kernel_ridge.KernelRidge`.
    steps, normalization
        See `PathKernelSVC`.

    Attributes
    ----------
    network_, trajectory_, kernel_, solver_, loss_curve_, validation_curve_, n_iter_, classes_
        See `PathKernelSVC`; the solver is a `sklearn.kernel_ridge.KernelRidge`.

    Examples
    --------
    >>> import pathkernel as pk
    >>> from sklearn.datasets import load_wine
    >>> X, y = load_wine(return_X_y=True)
    >>> classifier = pk.PathKernelRidgeClassifier(hidden=(16,), epochs=10, random_state=0).fit(X[::2], y[::2])
    >>> bool(classifier.score(X[1::2], y[1::2]) > 0.9)
    True
    """

    def __init__(
        self,
        module: Any = None,
        *,
        alpha: float = 0.1,
        steps: int | None = 5,
        normalization: str | None = "mean",
        hidden: int | Sequence[int] = (256,),
        optimizer: Any = "adamw",
        loss: Loss | None = None,
        epochs: int = 30,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        data: Any = None,
        device: str | torch.device | None = None,
        random_state: Any = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        class_weight: Any = None,
        callbacks: Any = None,
        verbose: bool | int = False,
        warm_start: bool = False,
    ) -> None:
        self._keep(locals())

    @all_or_nothing
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PathKernelRidgeClassifier:
        """Train the network, and solve for the coefficients; see `KernelMachineClassifier.fit`."""
        matrix, places, weights = self._fit_kernel(X, y, sample_weight)
        signs = 2.0 * (places[:, None] == np.arange(len(self.classes_))) - 1.0
        signs = signs[:, 1:] if len(self.classes_) == 2 else signs
        self._solve(matrix, signs, weights)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Regressed signs (n, C), or (n,) for two classes."""
        found = self._regressed(X)
        return found[:, 0] if found.shape[1] == 1 else found

    def predict(self, X: Any) -> np.ndarray:
        """Labels, (n,)."""
        return self._labels(self.decision_function(X))
