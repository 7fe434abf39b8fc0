"""Kernel–target alignment: how well a kernel's idea of similarity matches the labels'."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathkernel.analysis.arrays import as_array, class_labels
from pathkernel.analysis.gram_matrix import as_kernel_matrix, check_same_shape, unit_norm
from pathkernel.errors import PathKernelError


def kernel_alignment(K: ArrayLike, L: ArrayLike) -> float:
    """Cosine of the angle between two kernel matrices.

    A(K, L) = ⟨K, L⟩_F / (‖K‖_F ‖L‖_F)

    Parameters
    ----------
    K, L
        Kernel matrices of the same samples, shape (n, m) each.

    Returns
    -------
    float
        In [-1, 1]; in [0, 1] for two positive semi-definite matrices. Unchanged when
        either kernel is multiplied by a positive number.

    Raises
    ------
    PathKernelError
        If the shapes differ, or a matrix is not finite or is zero.

    References
    ----------
    Cristianini, Shawe-Taylor, Elisseeff and Kandola, "On kernel-target alignment", NIPS 2001,
    definition 1.

    Examples
    --------
    >>> round(kernel_alignment([[2.0, 1.0], [1.0, 2.0]], [[4.0, 2.0], [2.0, 4.0]]), 12)
    1.0
    """
    K, L = as_kernel_matrix(K, "K"), as_kernel_matrix(L, "L")
    check_same_shape(K, L)
    return _cosine(K, L)


def centered_kernel_alignment(K: ArrayLike, L: ArrayLike) -> float:
    """Cosine of the angle between two kernel matrices with centred features.

    CKA(K, L) = A(H K H, H L H),   H = I - 1 1ᵀ / n

    Centring removes the kernels' common constant part, which otherwise makes any two
    kernels with positive entries look alike.

    Parameters
    ----------
    K, L
        Kernel matrices of the same samples, shape (n, m) each; rows and columns are centred.

    Returns
    -------
    float
        In [-1, 1]; unchanged by positive factors and by added constants.

    Raises
    ------
    PathKernelError
        If the shapes differ, or a matrix is not finite or is constant.

    References
    ----------
    Cortes, Mohri and Rostamizadeh, "Algorithms for learning kernels based on centered
    alignment", JMLR 13, 2012, definition 4.

    Examples
    --------
    >>> round(centered_kernel_alignment([[2.0, 1.0], [1.0, 2.0]], [[9.0, 8.0], [8.0, 9.0]]), 12)
    1.0
    """
    K, L = as_kernel_matrix(K, "K"), as_kernel_matrix(L, "L")
    check_same_shape(K, L)
    return _cosine(_centred(K, "K"), _centred(L, "L"))


def target_kernel(y: ArrayLike) -> NDArray[np.float64]:
    """The kernel that knows the labels: Y Yᵀ.

    Class labels (integers, booleans, strings) become one-hot rows, so an entry is 1 for two
    samples of one class and 0 otherwise. Floating-point targets are used as they are. The
    dtype decides, not the values: class labels stored as floats want ``y.astype(int)``.

    Parameters
    ----------
    y
        Class labels, shape (n,), or floating-point targets, shape (n,) or (n, C).

    Returns
    -------
    ndarray
        Shape (n, n), float64.

    Raises
    ------
    PathKernelError
        If `y` has no samples or the wrong number of dimensions, or holds NaN or infinity.

    Examples
    --------
    >>> target_kernel(["cat", "dog", "cat"])
    array([[1., 0., 1.],
           [0., 1., 0.],
           [1., 0., 1.]])
    """
    y = as_array(y, "y")
    regression = np.issubdtype(y.dtype, np.floating)
    if not regression:
        y = class_labels(y, "y")
    if y.size == 0 or y.ndim not in ((1, 2) if regression else (1,)):
        raise PathKernelError(
            f"`y` has shape {y.shape} and dtype {y.dtype}",
            "Class labels have shape (n,), floating-point targets (n,) or (n, C)",
            "Pass one label per sample, e.g. y.argmax(axis=1) for one-hot labels",
        )
    if not regression:
        _, classes = np.unique(y, return_inverse=True)
        same_class: NDArray[np.float64] = (classes[:, None] == classes[None, :]).astype(np.float64)
        return same_class
    targets = as_kernel_matrix(y.reshape(len(y), -1), "y")
    outer: NDArray[np.float64] = targets @ targets.T
    return outer


def target_alignment(K: ArrayLike, y: ArrayLike) -> float:
    """Centred alignment of a Gram matrix with the kernel of its labels.

    CKA(K, Y Yᵀ): one number for how far a kernel has turned towards the task.

    Parameters
    ----------
    K
        Gram matrix, shape (n, n).
    y
        Labels or targets of the same samples, as in `target_kernel`.

    Returns
    -------
    float
        In [0, 1] for a positive semi-definite `K`.

    Raises
    ------
    PathKernelError
        As `centered_kernel_alignment` and `target_kernel`; among others when all labels are
        the same, for then there is no task to align with.

    References
    ----------
    Cortes, Mohri and Rostamizadeh 2012, section 2.3; Baratin et al., "Implicit regularization
    via neural feature alignment", AISTATS 2021, for tangent kernels in training.

    Examples
    --------
    >>> y = [0, 0, 1, 1]
    >>> round(target_alignment(3.0 * target_kernel(y), y), 12)
    1.0
    """
    return centered_kernel_alignment(K, target_kernel(y))


def _cosine(K: NDArray[np.float64], L: NDArray[np.float64]) -> float:
    return float(np.clip(np.vdot(unit_norm(K, "K"), unit_norm(L, "L")), -1.0, 1.0))


def _centred(matrix: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """H K H, with what only rounding left set to zero so that a constant kernel is recognised."""
    centred: NDArray[np.float64] = (
        matrix - matrix.mean(axis=0, keepdims=True) - matrix.mean(axis=1, keepdims=True) + matrix.mean()
    )
    rounding = 64.0 * np.finfo(np.float64).eps * np.abs(matrix).max()
    if np.abs(centred).max() <= rounding:
        raise PathKernelError(
            f"`{name}` is constant once its row and column means are taken out",
            "Centred alignment compares how similarity varies between samples",
            "Pass samples of at least two classes, or use kernel_alignment",
        )
    return centred
