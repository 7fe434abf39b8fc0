"""Kernel matrices for estimators that take ``kernel="precomputed"``, and what transformers with a kernel share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin, clone
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.estimators.kernel_machines import KernelMachineClassifier, KernelMachineRegressor
from pathkernel.estimators.samples import in_three_parts
from pathkernel.gradients.pytrees import copied_samples, count, same_samples
from pathkernel.kernels.kernel import KernelFunction, kernel_matrix


class KernelTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Transformer whose features are made with a kernel: one that is given, or that of a network trained in ``fit``.

    Attributes
    ----------
    kernel_
        The kernel in use.
    estimator_
        The estimator whose network was trained in ``fit``; None where a kernel was given.
    """

    kernel: Any
    random_state: Any
    kernel_: KernelFunction
    estimator_: Any

    def _fit_kernel(self, X: PyTree, y: Any) -> PyTree:
        """The samples as they are checked; sets the kernel."""
        trains = self._trains
        if trains and y is None:
            raise InputError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y is None",
                "Its kernel is that of a network, which is trained in `fit` on samples with their targets",
                "Write `fit(X, y)`, or give a kernel: `kernel=PathKernel(trajectory)`",
            )
        samples = self._samples(X, reset=True)
        self.estimator_ = self._network_estimator(y).fit(samples, y) if trains else None
        self.kernel_ = self._kernel_of(self.estimator_) if trains else self.kernel
        return samples

    def _kernel_of(self, estimator: Any) -> KernelFunction:
        """The kernel of a fitted estimator."""
        if not hasattr(estimator, "kernel_"):
            raise InputError(
                f"`{type(self).__name__}(kernel={estimator!r})` was given, which has no `kernel_` once it is fitted",
                "The estimators of this library that train a network in `fit` have the path kernel of it",
                f"Write for example `{type(self).__name__}(KernelMachineClassifier(hidden=(64,)))`",
            )
        return estimator.kernel_

    @property
    def _trains(self) -> bool:
        """True where a network is trained in ``fit``.

        Raises
        ------
        InputError
            For what is neither a kernel nor an estimator that has one.
        """
        if self.kernel is None or (hasattr(self.kernel, "fit") and not isinstance(self.kernel, type)):
            return True
        if callable(self.kernel) and not isinstance(self.kernel, type):
            return False
        raise InputError(
            f"`{type(self).__name__}(kernel={self.kernel!r})` was given",
            "A kernel is `PathKernel(trajectory)`, `TangentKernel(model)`, a combination of these, or a callable "
            "`(X, Y=None) -> (n, m)`; or an estimator that trains a network in `fit`, whose kernel is then used; None "
            "for one of this library's",
            f"Write for example `{type(self).__name__}(PathKernel(trajectory))`, or leave the kernel out",
        )

    def _network_estimator(self, y: Any) -> Any:
        """The estimator that trains the network: a clone of the one that is given, or one for these targets."""
        if self.kernel is None:
            with in_three_parts(y=y):
                regression = type_of_target(y, input_name="y", raise_unknown=True).startswith("continuous")
            made = KernelMachineRegressor() if regression else KernelMachineClassifier()
        else:
            made = clone(self.kernel)
        if made.get_params().get("random_state", 0) is None:
            made.set_params(random_state=self.random_state)
        return made

    def _samples(self, X: PyTree, reset: bool = False) -> PyTree:
        """The samples as scikit-learn checks them; tensors, and trees of arrays, as they are."""
        # A sparse matrix may be a Mapping.
        if not issparse(X) and isinstance(X, (Tensor, Mapping, tuple)):
            return validate_data(self, X, reset=reset, skip_check_array=True)
        with in_three_parts(X=X):
            return validate_data(self, X, reset=reset, allow_nd=True, dtype="numeric")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.kernel is None or hasattr(self.kernel, "fit")
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = []  # kernels are computed in the network's type, and summed in float64
        return tags


class PathKernelTransformer(KernelTransformer):
    """Turns samples into their rows of a kernel matrix against the samples of ``fit``.

    For KernelRidge, SVR, KernelPCA and others with ``kernel="precomputed"``.

    Parameters
    ----------
    kernel
        A `pathkernel.PathKernel` or `pathkernel.TangentKernel`, a combination of these, or any callable
        ``(X, Y=None) -> (n, m)``: used as it is. Or an estimator that trains a network in ``fit`` and has its
        ``kernel_`` afterwards, such as `pathkernel.KernelMachineClassifier`, of which a clone is fitted. None (default)
        for such an estimator with its defaults, a classifier or a regressor as the targets have it: the network is then
        trained on the very samples of ``fit``, and cross-validation leaks no labels.
    random_state
        Of the network, where one is trained and its estimator has none of its own.

    Attributes
    ----------
    kernel_
        The kernel in use.
    estimator_
        The estimator whose network was trained in ``fit``; None where a kernel was given.
    reference_
        The samples of ``fit``: columns of every matrix.
    n_features_in_, feature_names_in_
        As of scikit-learn's transformers; of arrays.

    Raises
    ------
    InputError
        From ``fit``, for samples that scikit-learn refuses, in its words; for what is no kernel; and without targets
        where a network is to be trained.

    Notes
    -----
    Time and memory O(n · m) for n samples against the m of ``fit``. For more samples than a matrix holds, see
    `pathkernel.PathKernelFeatures`.

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

    def __init__(self, kernel: Any = None, *, random_state: Any = None) -> None:
        self.kernel = kernel
        self.random_state = random_state

    def fit(self, X: PyTree, y: Any = None) -> PathKernelTransformer:
        """Keep a copy of X as the columns, and train a network on X and y where no kernel was given."""
        self.reference_ = copied_samples(self._fit_kernel(X, y))
        self._n_features_out = count(self.reference_)
        return self

    def transform(self, X: PyTree) -> np.ndarray:
        """K(X, reference), (n, m) float64; the symmetric matrix where X are the samples of the reference."""
        check_is_fitted(self)
        samples = self._samples(X)
        same = same_samples(samples, self.reference_)
        return kernel_matrix(self.kernel_, samples, None if same else self.reference_)

    def fit_transform(self, X: PyTree, y: Any = None, **fit_params: Any) -> np.ndarray:
        """K(X, X)."""
        return self.fit(X, y, **fit_params).transform(X)
