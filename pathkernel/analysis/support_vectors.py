"""Kernels as support vector machines: what a kernel of the network is worth for the task, in one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.svm import SVC

from pathkernel.analysis.alignment import target_alignment
from pathkernel.analysis.arrays import class_labels
from pathkernel.analysis.gram_matrix import as_gram_matrix, as_kernel_matrix, check_pairs
from pathkernel.analysis.spectrum import effective_rank
from pathkernel.errors import PathKernelError, is_positive


@dataclass(frozen=True)
class KernelRow:
    """A kernel as a support vector machine.

    Attributes
    ----------
    name
        As it was given.
    train_accuracy, test_accuracy
        Parts of the samples that the machine classifies rightly.
    support_vectors
        Part of the training samples that are support vectors.
    alignment
        Centred alignment with the training labels, `pathkernel.analysis.target_alignment`.
    effective_rank
        Of the training matrix, `pathkernel.analysis.effective_rank`.
    """

    name: str
    train_accuracy: float
    test_accuracy: float
    support_vectors: float
    alignment: float
    effective_rank: float


def kernels_as_svm(
    kernels: Mapping[str, tuple[ArrayLike, ArrayLike]], y_train: ArrayLike, y_test: ArrayLike, *, C: float = 10.0
) -> list[KernelRow]:
    """Support vector machines of several kernels: the initial, the path and the after-kernel of a network, for example.

    Parameters
    ----------
    kernels
        By name the matrices K (N, N) of the training samples and (n, N) of the test samples with them.
    y_train, y_test
        Class labels, (N,) and (n,).
    C
        The penalty of the machine, for kernels that are divided by their mean diagonal. It is one for all and not
        chosen by cross-validation: kernels along a path, and after it, know the labels of all training samples, and
        folds of these would leak.

    Returns
    -------
    list of KernelRow
        In the given order.

    Raises
    ------
    PathKernelError
        For matrices and labels that do not fit together.

    References
    ----------
    Fort et al. 2020 (2010.15110), where the after-kernel is called the data-dependent one; Long 2021 (2105.10585), "the
    after kernel".

    Examples
    --------
    >>> K = [[2.0, 0.0], [0.0, 2.0]]
    >>> (row,) = kernels_as_svm({"identity": (K, K)}, [0, 1], [0, 1])
    >>> row.test_accuracy, round(row.alignment, 3)
    (1.0, 1.0)
    """
    y_train, y_test = _labels(y_train, "y_train"), _labels(y_test, "y_test")
    if not is_positive(C):
        raise PathKernelError(f"`C={C!r}` was given", "The penalty is a number above 0", "Write `C=10.0`")
    classes = len(np.unique(y_train))
    if classes < 2 or (y_train.dtype.kind in "USO") != (y_test.dtype.kind in "USO"):
        raise PathKernelError(
            f"`y_train` is of type {y_train.dtype} with {classes} classes, and `y_test` of type {y_test.dtype}",
            "A machine tells two classes or more apart, which both have the same names",
            "Pass the labels of the training and of the test samples as they are in one array",
        )
    rows = []
    for name, pair in _pairs(kernels):
        K, K_test = as_gram_matrix(pair[0], name), as_kernel_matrix(pair[1], name)
        if K.shape != (len(y_train),) * 2 or K_test.shape != (len(y_test), len(y_train)):
            raise PathKernelError(
                f"The kernel `{name}` has shapes {K.shape} and {K_test.shape} for {len(y_train)} training labels and "
                f"{len(y_test)} test labels",
                "The first is square over the training samples, the second has a row for each test sample",
                "Pass `(kernel(X_train), kernel(X_test, X_train))`",
            )
        check_pairs(K, name)
        scale = K.diagonal().mean()
        if not scale > 0:
            raise PathKernelError(
                f"The kernel `{name}` is zero on all training samples",
                "A machine tells samples apart by a kernel that is larger than 0",
                "Leave this kernel out",
            )
        machine = SVC(kernel="precomputed", C=C).fit(K / scale, y_train)
        rows.append(
            KernelRow(
                name,
                float(machine.score(K / scale, y_train)),
                float(machine.score(K_test / scale, y_test)),
                len(machine.support_) / len(y_train),
                target_alignment(K, y_train),
                effective_rank(K),
            )
        )
    return rows


def _labels(y: ArrayLike, name: str) -> NDArray[Any]:
    """Class labels, one for each sample."""
    labels = class_labels(y, name)
    if labels.ndim != 1 or not len(labels):
        raise PathKernelError(
            f"`{name}` has shape {labels.shape}",
            "There is one class label for each sample",
            f"Pass `{name}` as an array (n,), `argmax(axis=1)` of one-hot rows",
        )
    return labels


def _pairs(kernels: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Iterator[tuple[str, tuple[ArrayLike, ArrayLike]]]:
    """Names of kernels with their two matrices."""
    for name, pair in kernels.items() if isinstance(kernels, Mapping) else ((None, kernels),):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(name, str)):
            raise PathKernelError(
                f"`kernels` is, or holds under {name!r}, a {type(pair).__name__}",
                "It is a mapping of names to pairs of matrices, (N, N) and (n, N)",
                'Write `{"path": (kernel(X_train), kernel(X_test, X_train))}`',
            )
        yield name, (pair[0], pair[1])
