"""Kernel matrices for estimators that take ``kernel="precomputed"``."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from pathkernel._typing import PyTree
from pathkernel.gradients.pytrees import copied_samples, same_samples


class PathKernelTransformer(TransformerMixin, BaseEstimator):
    """Turns samples into their rows of a kernel matrix against the samples of ``fit``.

    For KernelRidge, SVR, KernelPCA and others with ``kernel="precomputed"``.

    Parameters
    ----------
    kernel
        A `pathkernel.PathKernel` or `pathkernel.TangentKernel`, or any callable ``(X, Y=None) -> (n, m)``.

    Attributes
    ----------
    reference_
        The samples of ``fit``: columns of every matrix.

    Examples
    --------
    >>> from sklearn.kernel_ridge import KernelRidge
    >>> from sklearn.pipeline import make_pipeline
    >>> import torch, pathkernel as pk
    >>> kernel = pk.TangentKernel(torch.nn.Linear(2, 1))
    >>> ridge = make_pipeline(pk.PathKernelTransformer(kernel), KernelRidge(kernel="precomputed"))
    >>> ridge.fit(torch.eye(2).numpy(), [0.0, 1.0]).predict(torch.eye(2).numpy()).shape
    (2,)
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def fit(self, X: PyTree, y: Any = None) -> PathKernelTransformer:
        """Keep a copy of X as the columns."""
        self.reference_ = copied_samples(X)
        return self

    def transform(self, X: PyTree) -> np.ndarray:
        """K(X, reference), (n, m) float64; the symmetric matrix where X are the samples of the reference."""
        check_is_fitted(self)
        return self.kernel(X, None if same_samples(X, self.reference_) else self.reference_)

    def fit_transform(self, X: PyTree, y: Any = None, **fit_params: Any) -> np.ndarray:
        """K(X, X)."""
        return self.fit(X, y).transform(X)
