"""`PathKernelSVC` and `PathKernelSVR`: support vector machines on the path kernel of a network trained in ``fit``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.svm import SVC, SVR

from pathkernel._typing import Loss
from pathkernel.estimators.network_estimator import all_or_nothing
from pathkernel.estimators.path_kernels import PathKernelEstimator
from pathkernel.estimators.tasks import NetworkClassification, NetworkRegression


class PathKernelSVC(ClassifierMixin, PathKernelEstimator, NetworkClassification):
    """Support vector classifier on the path kernel of a network that is trained on the samples of ``fit``.

    Cross-validation trains a network of its own on every fold: labels that are held out do not leak into the kernel.

    Parameters
    ----------
    module, hidden, optimizer, loss, epochs, batch_size, learning_rate, data, device, random_state, early_stopping
        Of the network and its training; see `pathkernel.KernelMachineClassifier`. Weights of classes and samples count
        for the support vector machine, too.
    validation_fraction, n_iter_no_change, tol, class_weight, callbacks, verbose, warm_start
        Of the same.
    C
        Penalty of `sklearn.svm.SVC`.
    steps
        Into how many stretches the path is cut, each of which its middle step stands for; None for every step. See
        `pathkernel.PathKernel`.
    normalization
        ``"mean"`` divides the kernel by its mean diagonal on the samples of ``fit``, ``"cosine"`` each value by the
        lengths of both samples; None leaves it as it is.
    solver_tol
        Tolerance at which `sklearn.svm.SVC` stops: at this one, weights are the same as repetitions.

    Attributes
    ----------
    network_, trajectory_, loss_curve_, validation_curve_, n_iter_, classes_, n_features_in_, feature_names_in_
        See `pathkernel.KernelMachineClassifier`.
    kernel_
        `pathkernel.PathKernel` of the network, before normalisation.
    solver_
        The fitted `sklearn.svm.SVC`.
    support_
        Rows of the X of ``fit`` that are support vectors.

    Notes
    -----
    Time N²: the matrix of N samples takes 8 N² bytes. Of the path about 64 points are kept.

    For probabilities write ``CalibratedClassifierCV(PathKernelSVC())``.

    Examples
    --------
    >>> import pathkernel as pk
    >>> from sklearn.datasets import load_wine
    >>> from sklearn.model_selection import cross_val_score
    >>> X, y = load_wine(return_X_y=True)
    >>> scores = cross_val_score(pk.PathKernelSVC(hidden=(16,), epochs=10, random_state=0), X, y, cv=3)
    >>> bool(scores.mean() > 0.9)
    True
    """

    def __init__(
        self,
        module: Any = None,
        *,
        C: float = 1.0,
        steps: int | None = 5,
        normalization: str | None = "mean",
        solver_tol: float = 1e-9,
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
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PathKernelSVC:
        """Train the network, and the support vector machine on its kernel; see `KernelMachineClassifier.fit`."""
        matrix, places, weights = self._fit_kernel(X, y, sample_weight)
        self.solver_ = self._unfitted().fit(matrix, places, sample_weight=weights)
        self.support_ = self._ids[self.solver_.support_]
        return self

    def _unfitted(self) -> SVC:
        # It draws a number for probabilities, which are not asked of it, from numpy's own generator otherwise.
        return SVC(kernel="precomputed", C=self.C, tol=self.solver_tol, random_state=0)

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores (n, C), or (n,) for two classes, of `sklearn.svm.SVC`, one class against the others."""
        matrix = self._to_references(X)
        return self.solver_.decision_function(matrix)

    def predict(self, X: Any) -> np.ndarray:
        """Labels, (n,)."""
        return self._labels(self.decision_function(X))


class PathKernelSVR(RegressorMixin, PathKernelEstimator, NetworkRegression):
    """Support vector regression on the path kernel of a network that is trained on the samples of ``fit``.

    Parameters
    ----------
    module, hidden, optimizer, loss, epochs, batch_size, learning_rate, data, device, random_state, early_stopping
        Of the network and its training; see `pathkernel.KernelMachineRegressor`.
    validation_fraction, n_iter_no_change, tol, callbacks, verbose, warm_start
        Of the same.
    C, epsilon
        Penalty and width of the tube of `sklearn.svm.SVR`, for targets that are standardised: ``epsilon`` is in units
        of their standard deviation.
    steps, normalization, solver_tol
        See `PathKernelSVC`.

    Attributes
    ----------
    network_, trajectory_, kernel_, solver_, support_, loss_curve_, validation_curve_, n_iter_
        See `PathKernelSVC`.

    Examples
    --------
    >>> import pathkernel as pk
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> regressor = pk.PathKernelSVR(hidden=(16,), epochs=10, random_state=0).fit(X[:300], y[:300])
    >>> bool(regressor.score(X[300:], y[300:]) > 0.3)
    True
    """

    _target_checks: ClassVar[Mapping[str, Any]] = {"y_numeric": True}  # scikit-learn's takes one target

    def __init__(
        self,
        module: Any = None,
        *,
        C: float = 1.0,
        epsilon: float = 0.1,
        steps: int | None = 5,
        normalization: str | None = "mean",
        solver_tol: float = 1e-9,
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
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> PathKernelSVR:
        """Train the network, and the support vector machine on its kernel; y is (n,)."""
        matrix, values, weights = self._fit_kernel(X, y, sample_weight)
        self._standardize(values, weights)
        targets = (values - self._mean) / self._scale
        self.solver_ = self._unfitted().fit(matrix, targets, sample_weight=weights)
        self.support_ = self._ids[self.solver_.support_]
        return self

    def _unfitted(self) -> SVR:
        return SVR(kernel="precomputed", C=self.C, epsilon=self.epsilon, tol=self.solver_tol)

    def predict(self, X: Any) -> np.ndarray:
        """Numbers, (n,)."""
        matrix = self._to_references(X)
        return self.solver_.predict(matrix) * self._scale + self._mean
