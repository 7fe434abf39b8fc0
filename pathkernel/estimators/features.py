"""Explicit features of a kernel, for linear estimators at more samples than a Gram matrix holds."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import eigh
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, is_whole
from pathkernel.estimators.transformer import KernelTransformer
from pathkernel.gradients.pytrees import copied_samples, count, take
from pathkernel.kernels.kernel import Kernel, kernel_matrix
from pathkernel.path_kernel.label_leak import unchecked

METHODS = ("nystroem", "projection")


class PathKernelFeatures(KernelTransformer):
    r"""Features φ with :math:`\varphi(x) \cdot \varphi(x') \approx K(x, x')`, for linear estimators.

    .. math:: \varphi(x) = K(x, Z)\, K(Z, Z)^{-1/2} \qquad\text{(``"nystroem"``, Z some samples of ``fit``)}

    or the gradients along the path under a random map (``"projection"``, `pathkernel.PathKernel.features`).

    Parameters
    ----------
    kernel
        As of `pathkernel.PathKernelTransformer`: a kernel, which is used as it is; or an estimator that trains a
        network in ``fit``; or None (default) for one with its defaults.
    n_components
        Length of φ(x); of Nyström features at most the number of samples.
    method
        ``"nystroem"`` (default): exact on the samples Z, and good where the kernel has few large eigenvalues, as
        learnt ones have. ``"projection"``: independent of the samples, with a relative error of the matrix near
        :math:`1 / \sqrt{\text{n\_components}}`; for `PathKernel` and `TangentKernel` alone.
    kind
        The random map of ``"projection"``, as of `pathkernel.Projection`.
    random_state
        Of the choice of Z, of the random map, and of the network, where one is trained and its estimator has none.

    Attributes
    ----------
    kernel_
        The kernel in use.
    estimator_
        The estimator whose network was trained in ``fit``; None where a kernel was given.
    components_
        Z, and ``component_indices_`` their rows in ``fit``; of Nyström features.
    normalization_
        :math:`K(Z, Z)^{-1/2}`, (n_components, n_components); of Nyström features.
    seed_
        Of the random map; of projections.
    n_features_in_, feature_names_in_
        As of scikit-learn's transformers; of arrays.

    Raises
    ------
    InputError
        From ``fit``, as of `pathkernel.PathKernelTransformer`, and for options that are none.

    Notes
    -----
    With m components, Nyström features take O(n · m) kernel values and O(m³) once; projections O(n · m) times the nodes
    of the path. Memory O(n · m). Only ``fit_transform`` warns of a label leak (`pathkernel.errors.LabelLeakWarning`),
    of all of its samples, not of Z.

    References
    ----------
    Williams and Seeger 2001, "Using the Nyström method to speed up kernel machines"; for projections see
    `pathkernel.Projection`.

    Examples
    --------
    >>> from sklearn.linear_model import RidgeCV
    >>> from sklearn.pipeline import make_pipeline
    >>> import numpy, torch, pathkernel as pk
    >>> X = numpy.random.default_rng(0).standard_normal((500, 2))
    >>> network = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).double()
    >>> features = pk.PathKernelFeatures(pk.TangentKernel(network), n_components=50, random_state=0)
    >>> ridge = make_pipeline(features, RidgeCV(numpy.logspace(-6, 0, 7))).fit(X[:400], numpy.sin(X[:400, 0]))
    >>> bool(ridge.score(X[400:], numpy.sin(X[400:, 0])) > 0.95)
    True
    """

    def __init__(
        self,
        kernel: Any = None,
        n_components: int = 100,
        *,
        method: str = "nystroem",
        kind: str = "tensor",
        random_state: Any = None,
    ) -> None:
        self.kernel = kernel
        self.n_components = n_components
        self.method = method
        self.kind = kind
        self.random_state = random_state

    def fit(self, X: PyTree, y: Any = None) -> PathKernelFeatures:
        """Choose landmarks or a random map, and train a network on X and y where no kernel was given."""
        self._check_options()
        samples = self._fit_kernel(X, y)
        generator = check_random_state(self.random_state)
        if self.method == "projection":
            self._check_projects()
            self.seed_ = int(generator.randint(np.iinfo(np.int32).max))
            self._n_features_out = int(self.n_components)
            return self
        chosen = generator.permutation(count(samples))[: int(self.n_components)]
        self.component_indices_ = chosen
        self.components_ = copied_samples(take(samples, chosen))
        with unchecked():  # landmarks are no fit to a part of the samples
            self.normalization_ = inverse_square_root(kernel_matrix(self.kernel_, self.components_))
        self._n_features_out = len(chosen)
        return self

    def transform(self, X: PyTree) -> np.ndarray:
        """φ(X), (n, components) float64."""
        check_is_fitted(self)
        samples = self._samples(X)
        if self.method == "projection":
            kernel: Any = self.kernel_
            return np.asarray(kernel.features(samples, self._n_features_out, kind=self.kind, seed=self.seed_))
        return kernel_matrix(self.kernel_, samples, self.components_) @ self.normalization_

    def fit_transform(self, X: PyTree, y: Any = None, **fit_params: Any) -> np.ndarray:
        """φ(X) of the samples of ``fit``."""
        self.fit(X, y, **fit_params)
        if isinstance(self.kernel_, Kernel):
            self.kernel_.check_label_leak(self._samples(X))
        return self.transform(X)

    def _check_options(self) -> None:
        if not is_whole(self.n_components) or self.n_components < 1:
            raise InputError(
                f"`PathKernelFeatures(n_components={self.n_components!r})` was given",
                "It is the length of the features, a whole number from 1 upwards",
                "Write for example `n_components=100`",
            )
        if self.method not in METHODS:
            raise InputError(
                f"`PathKernelFeatures(method={self.method!r})` was given",
                f"Methods are {' and '.join(map(repr, METHODS))}",
                'Write `method="nystroem"`',
            )

    def _check_projects(self) -> None:
        if not hasattr(self.kernel_, "features"):
            raise InputError(
                f'`PathKernelFeatures(method="projection")` was given a kernel of type {type(self.kernel_).__name__}',
                "Gradients are projected, which `PathKernel` and `TangentKernel` have",
                'Write `method="nystroem"`, which takes any kernel',
            )


def inverse_square_root(matrix: np.ndarray) -> np.ndarray:
    """K^(-1/2) on the directions whose eigenvalue is more than rounding, (m, m).

    Of a positive semi-definite matrix, an eigenvalue that is not larger than the most negative one is rounding too: in
    single precision, that is how large it is.
    """
    eigenvalues, vectors = eigh(matrix)
    floor = max(len(matrix) * np.finfo(np.float64).eps * float(eigenvalues[-1]), -float(eigenvalues[0]))
    kept = eigenvalues > floor
    return (vectors[:, kept] / np.sqrt(eigenvalues[kept])) @ vectors[:, kept].T
