r"""Kernels as objects: what can be called for a matrix, has a diagonal, and can be added, multiplied and scaled.

.. math:: (a K + b L)(x, x') = a\, K(x, x') + b\, L(x, x'), \qquad (K L)(x, x') = K(x, x')\, L(x, x')

Positive semi-definite where the parts are and the factors are positive (Schur's product theorem for products).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import numpy as np

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, is_number
from pathkernel.gradients.pytrees import blocks, copied_samples, count, take

K = TypeVar("K", bound="Kernel")
KernelFunction = Callable[..., np.ndarray]
"""A kernel, or any callable ``(X, Y=None) -> (n, m)``, such as `sklearn.metrics.pairwise.rbf_kernel`."""

BLOCK = 256
"""Rows of the matrices from which the diagonal of a kernel that does not know its own is taken."""


class Kernel(ABC):
    """A positive semi-definite function K(x, x') of two samples, which does not change once it is made.

    ``K + L``, ``K * L`` and ``2.0 * K`` are kernels again, and so are `CosineKernel`, `CenteredKernel` and
    `RepairedKernel` of one; all of them can be called, have a diagonal, can be pickled, and are ``kernel=`` of `SVC`.
    """

    __array_ufunc__ = None  # numpy would multiply a kernel with each entry of an array, and leaves it to the kernel so
    _parts: tuple[KernelFunction, ...] = ()

    @property
    def parts(self) -> tuple[KernelFunction, ...]:
        """The kernels that this one is made of; none of a kernel of networks."""
        return self._parts

    @abstractmethod
    def __call__(self, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
        """Kernel matrix of n queries and m references, float64 (n, m); Y None stands for X."""

    @abstractmethod
    def diagonal(self, X: PyTree) -> np.ndarray:
        """K(x, x) for every sample, float64 (n,)."""

    def distance(self, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
        """Distances of samples in the kernel's feature space, float64 (n, m); see `distance`."""
        return distance(self, X, Y)

    def check_label_leak(self, X: PyTree) -> None:
        """Warn where this kernel, or a part of it, was made with labels by which a fit to X will be judged."""
        for part in self._parts:
            if isinstance(part, Kernel):
                part.check_label_leak(X)

    def __add__(self, other: Any) -> SumKernel:
        return SumKernel(self, other) if callable(other) else NotImplemented

    def __radd__(self, other: Any) -> SumKernel:
        return SumKernel(other, self) if callable(other) else NotImplemented

    def __mul__(self, other: Any) -> Kernel:
        if callable(other):
            return ProductKernel(self, other)
        return ScaledKernel(self, other) if np.ndim(other) == 0 else NotImplemented

    def __rmul__(self, other: Any) -> Kernel:
        if callable(other):
            return ProductKernel(other, self)
        return ScaledKernel(self, other) if np.ndim(other) == 0 else NotImplemented

    # Clones and deep copies would copy networks and whole trajectories, and a kernel does not change.

    def __sklearn_clone__(self: K) -> K:
        return self

    def __deepcopy__(self: K, memo: dict[int, Any]) -> K:
        return self


class _Combination(Kernel):
    """Kernel of the values of several kernels."""

    symbol: str

    def __init__(self, *kernels: KernelFunction) -> None:
        if len(kernels) < 2:
            raise InputError(
                f"`{type(self).__name__}` was given {len(kernels)} kernel(s)",
                "Two kernels or more are combined",
                f"Write `{type(self).__name__}(kernel, other)`",
            )
        self._parts = tuple(checked_kernel(kernel, type(self).__name__) for kernel in kernels)

    @staticmethod
    @abstractmethod
    def _combine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Values of the combination of two."""

    def __call__(self, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
        """Kernel matrix, float64 (n, m); Y None stands for X."""
        return reduce(self._combine, (kernel_matrix(kernel, X, Y) for kernel in self._parts))

    def diagonal(self, X: PyTree) -> np.ndarray:
        """K(x, x) for every sample, float64 (n,)."""
        return reduce(self._combine, (kernel_diagonal(kernel, X) for kernel in self._parts))

    def __repr__(self) -> str:
        return f"({f' {self.symbol} '.join(map(repr, self._parts))})"


class SumKernel(_Combination):
    r"""Sum of kernels: :math:`K(x, x') = \sum_k K_k(x, x')`, of which the features are those of all parts.

    Parameters
    ----------
    *kernels
        Two or more: kernels, or callables ``(X, Y=None) -> (n, m)``.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> from sklearn.metrics.pairwise import rbf_kernel
    >>> kernel = pk.TangentKernel(torch.nn.Linear(3, 1)) + rbf_kernel
    >>> kernel.diagonal(torch.eye(3).numpy()).tolist()  # ⟨x, x⟩ + 1, and 1
    [3.0, 3.0, 3.0]
    """

    symbol = "+"
    _combine = staticmethod(np.add)  # type: ignore[assignment]


class ProductKernel(_Combination):
    r"""Product of kernels: :math:`K(x, x') = \prod_k K_k(x, x')`.

    Parameters
    ----------
    *kernels
        Two or more: kernels, or callables ``(X, Y=None) -> (n, m)``.

    References
    ----------
    Schur 1911: the entry-wise product of positive semi-definite matrices is positive semi-definite.
    """

    symbol = "*"
    _combine = staticmethod(np.multiply)  # type: ignore[assignment]


class ScaledKernel(Kernel):
    r"""Positive multiple of a kernel: :math:`a\, K(x, x')`.

    Parameters
    ----------
    kernel
        A kernel, or a callable ``(X, Y=None) -> (n, m)``.
    scale
        a > 0.

    Raises
    ------
    InputError
        For a factor that is no positive number: the multiple is then no kernel.
    """

    def __init__(self, kernel: KernelFunction, scale: float) -> None:
        if not is_number(scale) or scale <= 0:
            raise InputError(
                f"A kernel was multiplied by {scale!r}",
                "A positive multiple of a kernel is a kernel; others are not positive semi-definite",
                "Write `2.0 * kernel`, with a positive number",
            )
        self._parts = (checked_kernel(kernel, "ScaledKernel"),)
        self._scale = float(scale)

    @property
    def scale(self) -> float:
        """The factor a."""
        return self._scale

    def __call__(self, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
        """Kernel matrix, float64 (n, m); Y None stands for X."""
        return self._scale * kernel_matrix(self._parts[0], X, Y)

    def diagonal(self, X: PyTree) -> np.ndarray:
        """K(x, x) for every sample, float64 (n,)."""
        return self._scale * kernel_diagonal(self._parts[0], X)

    def __repr__(self) -> str:
        return f"{self._scale:g} * {self._parts[0]!r}"


def distance(kernel: KernelFunction, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
    r"""Distance of samples in the feature space of a kernel.

    .. math:: d(x, x')^2 = K(x, x) + K(x', x') - 2 K(x, x')

    For ``metric="precomputed"``: t-SNE, UMAP, DBSCAN, nearest neighbours …

    Parameters
    ----------
    kernel
        A kernel, or a callable ``(X, Y=None) -> (n, m)``.
    X, Y
        n and m samples; Y None stands for X.

    Returns
    -------
    numpy.ndarray
        float64 (n, m), not negative; for Y None symmetric, with zeros on the diagonal.

    Notes
    -----
    A difference of numbers of the size of K(x, x): distances below √ε of its square root, ε of the kernel's floating
    type, are rounding.
    """
    matrix = kernel_matrix(kernel, X, Y)
    same = Y is None or Y is X
    rows = matrix.diagonal() if same else kernel_diagonal(kernel, X)
    columns = rows if same else kernel_diagonal(kernel, Y)
    squared = rows[:, None] + columns[None, :] - 2.0 * matrix
    return np.sqrt(np.maximum(squared, 0.0))


# -- what kernels are asked for ----------------------------------------------------------------------------------------


def checked_kernel(kernel: Any, asker: str) -> KernelFunction:
    """The kernel, if it is one; the asker is named in messages.

    Raises
    ------
    InputError
        For what cannot be called, and for classes in place of objects.
    """
    if not callable(kernel) or isinstance(kernel, type):
        raise InputError(
            f"`{asker}` was given {kernel!r} as a kernel",
            "A kernel is an object that can be called: `PathKernel(trajectory)`, `TangentKernel(model)`, a combination "
            "of these, or a function `(X, Y=None) -> (n, m)` such as `sklearn.metrics.pairwise.rbf_kernel`",
            f"Write for example `{asker}(PathKernel(trajectory), ...)`",
        )
    return kernel


def kernel_matrix(kernel: KernelFunction, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
    """K(X, Y), float64 (n, m).

    Raises
    ------
    InputError
        For a kernel whose values are blocks.
    """
    matrix = np.asarray(kernel(X) if Y is None or Y is X else kernel(X, Y), dtype=np.float64)
    if matrix.ndim != 2:
        raise _no_matrix(kernel, matrix.shape)
    return matrix


def kernel_diagonal(kernel: KernelFunction, X: PyTree) -> np.ndarray:
    """K(x, x), float64 (n,): the kernel's own, or that of its matrices of a few samples at a time.

    Raises
    ------
    InputError
        For a kernel whose values are blocks.
    """
    own = getattr(kernel, "diagonal", None) or getattr(kernel, "diag", None)  # scikit-learn's covariances: diag
    if own is not None:
        values = np.asarray(own(X), dtype=np.float64)
        if values.ndim != 1:
            raise _no_matrix(kernel, values.shape)
        return values
    samples = copied_samples(X)
    parts = [kernel_matrix(kernel, take(samples, block)).diagonal() for block in blocks(count(samples), BLOCK)]
    return np.concatenate(parts) if parts else np.zeros(0)


def reference_samples(X: PyTree, asker: str) -> PyTree:
    """A copy of the samples that a kernel refers to; the asker is named in messages.

    Raises
    ------
    InputError
        Where there is none.
    """
    samples = copied_samples(X)
    if not count(samples):
        raise InputError(
            f"`{asker}` was given no samples to refer to",
            "Means and eigenvalues are taken over one sample or more",
            f"Write `{asker}(kernel, X_train)`",
        )
    return samples


def _no_matrix(kernel: Any, shape: tuple[int, ...]) -> InputError:
    return InputError(
        f"A kernel of type {type(kernel).__name__} returned an array of shape {shape}",
        "Kernels that are combined return one number for each pair of samples: a matrix (n, m), a diagonal (n,)",
        'Make it with `outputs="trace"`, not `outputs="full"`',
    )
