"""`PathKernelGP` and `PathKernelGPClassifier`: Gaussian processes on the path kernel of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Kernel as Covariance

from pathkernel._typing import Loss, PyTree
from pathkernel.estimators.gaussian_process import GaussianProcessKernel
from pathkernel.estimators.network_estimator import all_or_nothing
from pathkernel.estimators.path_kernels import PathKernelEstimator
from pathkernel.estimators.tasks import NetworkClassification, NetworkRegression
from pathkernel.kernels.kernel import Kernel


class RowKernel:
    """A kernel of samples as the rows of numbers that a Gaussian process of scikit-learn keeps.

    Copies of it are itself: scikit-learn clones covariances for every class.

    Parameters
    ----------
    kernel
        The kernel, normalised.
    inputs
        Turns rows into samples as the network takes them.
    rows, references
        Of the samples of ``fit``, (m, d), and these as the network takes them.
    matrix
        Their matrix, (m, m), while a process is fitted.
    """

    def __init__(
        self,
        kernel: Kernel,
        inputs: Callable[[np.ndarray], PyTree],
        rows: np.ndarray,
        references: PyTree,
        matrix: np.ndarray | None,
    ) -> None:
        self.kernel, self.inputs = kernel, inputs
        self.rows, self.references, self.matrix = rows, references, matrix
        self._asked: tuple[np.ndarray, tuple[np.ndarray, np.ndarray]] | None = None

    def __call__(self, X: np.ndarray, Y: np.ndarray | None = None) -> np.ndarray:
        """K(X, Y), (n, m)."""
        first, second = (np.array_equal(own, self.rows) for own in (X, X if Y is None else Y))
        if first and second and self.matrix is not None:
            return self.matrix
        if first and Y is not None:
            return self._of_queries(Y)[0].T
        if second:
            return self._of_queries(X)[0]
        return self.kernel(self.inputs(X), None if Y is None else self.inputs(Y))

    def diagonal(self, X: np.ndarray) -> np.ndarray:
        """K(x, x), (n,)."""
        return self._of_queries(X)[1]

    def _of_queries(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Matrix between samples and those of ``fit``, and their diagonal: once for all classes."""
        asked = self._asked
        if asked is None or not np.array_equal(asked[0], X):
            inputs = self.inputs(X)
            self._asked = asked = X.copy(), (self.kernel(inputs, self.references), self.kernel.diagonal(inputs))
        return asked[1]

    def __deepcopy__(self, memo: Any) -> RowKernel:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "matrix": None, "_asked": None}


class PathKernelProcess(PathKernelEstimator):
    """Part of both Gaussian processes: their covariance, and samples as rows."""

    noise: float
    noise_bounds: Any
    scale_bounds: Any

    def _conditioned(self, make: Callable[[Covariance], Any], X: Any, matrix: np.ndarray, targets: np.ndarray) -> Any:
        """A process of scikit-learn that ``make`` makes of σ² K, fitted."""
        rows = self._rows(X)
        kernel = RowKernel(self._kernel, self._inputs_of_rows, rows, self._references, matrix)
        process = make(GaussianProcessKernel(kernel, scale_bounds=self.scale_bounds)).fit(rows, targets)
        kernel.matrix = None  # predictions are the same bits before saving and after loading
        return process

    def _rows(self, X: Any) -> np.ndarray:
        """Checked samples as rows of numbers, (n, d): places in a data set are rows of one."""
        checked = self._samples.checked(self, X)
        self._shape = checked.shape[1:]
        return checked.reshape(len(checked), -1)

    def _inputs_of_rows(self, rows: np.ndarray) -> PyTree:
        return self._samples.inputs(rows.reshape(len(rows), *self._shape))


class PathKernelGP(RegressorMixin, PathKernelProcess, NetworkRegression):
    r"""Gaussian process regression whose covariance is the path kernel of a network trained on the samples of ``fit``.

    .. math:: y \sim \mathcal N(\bar y, \sigma^2 K + \nu\, W^{-1})

    in units of the targets' standard deviation, with amplitude σ² and noise ν of largest marginal likelihood.

    Parameters
    ----------
    module, hidden, optimizer, loss, epochs, batch_size, learning_rate, data, device, random_state, early_stopping
        Of the network and its training; see `pathkernel.KernelMachineRegressor`.
    validation_fraction, n_iter_no_change, tol, callbacks, verbose, warm_start
        Of the same.
    steps, normalization
        See `PathKernelSVC`.
    noise, noise_bounds
        ν from which its maximum is searched, and between what; ``"fixed"`` keeps it.
    scale_bounds
        Between what σ² is searched; ``"fixed"`` keeps 1.
    process_optimizer
        ``optimizer`` of `sklearn.gaussian_process.GaussianProcessRegressor`; None searches nothing.

    Attributes
    ----------
    network_, trajectory_, kernel_, solver_, loss_curve_, validation_curve_, n_iter_
        See `PathKernelSVC`; the solver is a `sklearn.gaussian_process.GaussianProcessRegressor`.

    Notes
    -----
    The network has seen the targets: its kernel explains the samples of ``fit`` better than new ones, so that noise and
    intervals are somewhat too small.

    Examples
    --------
    >>> import pathkernel as pk
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> process = pk.PathKernelGP(hidden=(16,), epochs=10, random_state=0).fit(X[:200], y[:200])
    >>> mean, deviation = process.predict(X[200:], return_std=True)
    >>> mean.shape, bool((deviation > 0).all())
    ((242,), True)
    """

    def __init__(
        self,
        module: Any = None,
        *,
        steps: int | None = 5,
        normalization: str | None = "mean",
        noise: float = 0.1,
        noise_bounds: Any = (1e-5, 1e5),
        scale_bounds: Any = (1e-10, 1e10),
        process_optimizer: Any = "fmin_l_bfgs_b",
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
    def fit(self, X: Any, y: Any) -> PathKernelGP:
        """Train the network, and condition the process on the samples; y is (n,) or (n, k)."""
        matrix, values, _ = self._fit_kernel(X, y, None)
        self._standardize(values, None)

        def process(covariance: Covariance) -> Any:
            covariance.set_params(noise=self.noise, noise_bounds=self.noise_bounds)
            return GaussianProcessRegressor(covariance, optimizer=self.process_optimizer)

        self.solver_ = self._conditioned(process, X, matrix, (values - self._mean) / self._scale)
        return self

    def predict(self, X: Any, return_std: bool = False, return_cov: bool = False) -> Any:
        """Mean (n,) or (n, k) of new observations; with their standard deviations, or covariances (n, n).

        Parameters
        ----------
        X
            n samples.
        return_std, return_cov
            What is returned beside the mean; noise is part of both.
        """
        self._check_fitted()
        rows = self._rows(X)
        found = self.solver_.predict(rows, return_std=return_std, return_cov=return_cov)
        if not (return_std or return_cov):
            return found * self._scale + self._mean
        mean, spread = found
        return mean * self._scale + self._mean, spread * (self._scale if return_std else self._scale**2)


class PathKernelGPClassifier(ClassifierMixin, PathKernelProcess, NetworkClassification):
    """Gaussian process classification whose covariance is the path kernel of a network trained on those samples.

    Parameters
    ----------
    module, hidden, optimizer, loss, epochs, batch_size, learning_rate, data, device, random_state, early_stopping
        Of the network and its training; see `pathkernel.KernelMachineClassifier`.
    validation_fraction, n_iter_no_change, tol, callbacks, verbose, warm_start
        Of the same.
    steps, normalization
        See `PathKernelSVC`.
    scale, scale_bounds
        Amplitude σ², and between what it is searched where there is a ``process_optimizer``.
    process_optimizer
        ``optimizer`` of `sklearn.gaussian_process.GaussianProcessClassifier`; None (default) keeps ``scale``. A search
        takes some dozen Cholesky decompositions for each class.

    Attributes
    ----------
    network_, trajectory_, kernel_, solver_, loss_curve_, validation_curve_, n_iter_, classes_
        See `PathKernelSVC`; the solver is a `sklearn.gaussian_process.GaussianProcessClassifier`.

    Examples
    --------
    >>> import pathkernel as pk
    >>> from sklearn.datasets import load_wine
    >>> X, y = load_wine(return_X_y=True)
    >>> process = pk.PathKernelGPClassifier(hidden=(16,), epochs=10, random_state=0).fit(X[::2], y[::2])
    >>> process.predict_proba(X[1::2]).shape
    (89, 3)
    """

    class_weight = None  # the approximation of scikit-learn weighs no samples

    def __init__(
        self,
        module: Any = None,
        *,
        steps: int | None = 5,
        normalization: str | None = "mean",
        scale: float = 10.0,
        scale_bounds: Any = (1e-10, 1e10),
        process_optimizer: Any = None,
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
    def fit(self, X: Any, y: Any) -> PathKernelGPClassifier:
        """Train the network, and condition the process on the samples; see `KernelMachineClassifier.fit`."""
        matrix, places, _ = self._fit_kernel(X, y, None)

        def process(covariance: Covariance) -> Any:
            return GaussianProcessClassifier(covariance.set_params(scale=self.scale), optimizer=self.process_optimizer)

        self.solver_ = self._conditioned(process, X, matrix, places)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, C), averaged over the posterior."""
        self._check_fitted()
        return self.solver_.predict_proba(self._rows(X))

    def predict(self, X: Any) -> np.ndarray:
        """Labels (n,) of the largest probability."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]
