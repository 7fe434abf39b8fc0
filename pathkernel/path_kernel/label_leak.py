"""Label leaks: an estimator is fitted with a path kernel to a part of the samples whose labels shaped the path.

Cross-validation does so: it judges a fit to a part A of the training samples by the rest, whose labels the kernel
K(A, A) knows already, and its scores are too good. Rows are compared by hash, and only where scikit-learn is fitting.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, LabelLeakWarning, PathKernelError
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.trajectory.samples import Samples

LEAKS = ("warn", "allow")

INSTEAD = {
    "SVC": "PathKernelSVC",
    "NuSVC": "PathKernelSVC",
    "SVR": "PathKernelSVR",
    "NuSVR": "PathKernelSVR",
    "KernelRidge": "PathKernelRidge",
    "GaussianProcessRegressor": "PathKernelGP",
    "GaussianProcessClassifier": "PathKernelGPClassifier",
}
"""Estimators that train their network within ``fit``, by the class of scikit-learn in whose place they stand."""
OTHERWISE = "PathKernelSVC, PathKernelRidge or KernelMachineClassifier"

FITS = frozenset({"fit", "fit_transform", "fit_predict", "partial_fit"})
"""Methods in which estimators learn from samples and labels."""

LIBRARIES = frozenset({"pathkernel", "sklearn", "joblib"})
"""Whose lines are not the user's."""

ROWS = 4096
"""Rows whose bytes are held at once."""

_unchecked: ContextVar[bool] = ContextVar("unchecked", default=False)
_said: list[type] = []  # classes of estimators for which the warning was given: one in all


def check_leak(leak: Any) -> bool:
    """True for ``"allow"``, False for ``"warn"``.

    Raises
    ------
    InputError
        For anything else.
    """
    if not (isinstance(leak, str) and leak in LEAKS):
        raise InputError(
            f"`leak={leak!r}` was given",
            "A path kernel that is fitted to a part of the samples which its path was trained on warns of the labels "
            'that it knows (`"warn"`), or does not (`"allow"`)',
            'Write `PathKernel(trajectory, leak="allow")` for a subset that is meant',
        )
    return leak == "allow"


@contextmanager
def unchecked() -> Iterator[None]:
    """Ask kernels for matrices inside that are no fit: those of landmarks, for example."""
    token = _unchecked.set(True)
    try:
        yield
    finally:
        _unchecked.reset(token)


@dataclass(frozen=True)
class Fit:
    """A fit of scikit-learn that is going on.

    Attributes
    ----------
    estimators
        Those that are being fitted, from the innermost outwards.
    samples
        What the innermost is being fitted to.
    stacklevel
        Of the user's line that began it, as `warnings.warn` counts from the caller of `fit_in_progress`.
    """

    estimators: list[Any]
    samples: Any
    stacklevel: int

    @property
    def instead(self) -> str:
        """The estimators to use in place of these."""
        pipelines = () if "sklearn.pipeline" not in sys.modules else sys.modules["sklearn.pipeline"].Pipeline
        last_steps = [each.steps[-1][1] for each in self.estimators if isinstance(each, pipelines)]
        for estimator in (*self.estimators, *last_steps):
            for base in type(estimator).__mro__:
                if base.__name__ in INSTEAD:
                    return INSTEAD[base.__name__]
        return OTHERWISE


def fit_in_progress() -> Fit | None:
    """The fit with labels that the calling line is part of; None outside of one.

    Found on the stack: whoever calls a kernel does not say what for. Only fits that were given labels count, so that
    clustering or novelty detection on a part of the samples is none.
    """
    base = sys.modules.get("sklearn.base")
    if base is None:  # nobody has imported it
        return None
    found: dict[int, tuple[Any, bool]] = {}
    frame: FrameType | None = sys._getframe(1)
    level = 0
    samples: Any = None
    user: int | None = None
    while frame is not None:
        level += 1
        if frame.f_code.co_name in FITS:
            own = frame.f_locals.get("self")
            if isinstance(own, base.BaseEstimator):
                if not found:
                    samples = frame.f_locals.get("X")
                # The outermost method says what the user gave: OneClassSVM hands labels of its own further in.
                found[id(own)] = own, frame.f_locals.get("y") is not None
                user = None
        if user is None and str(frame.f_globals.get("__name__")).partition(".")[0] not in LIBRARIES:
            user = level
        frame = frame.f_back
    if not any(labels for _, labels in found.values()):
        return None
    return Fit([estimator for estimator, _ in found.values()], samples, user or level)


@dataclass
class LabelLeak:
    """Watch over the fits that a path kernel is used in.

    Parameters
    ----------
    data
        The samples that the path was trained on.
    allowed
        Say nothing.
    """

    data: Samples
    allowed: bool

    def check(self, inputs: PyTree) -> None:
        """Warn, once per process, where an estimator is being fitted to a strict part of the training samples.

        Parameters
        ----------
        inputs
            The samples A of a symmetric matrix K(A, A), as the network takes them.

        Notes
        -----
        Nothing but a look at the stack outside of a fit with labels. Within one, the bytes of all training samples are
        hashed, once for each kernel, and those of A. Samples that a dataset loads one by one are not looked at, those
        whose numbers an earlier step of a pipeline changed are not known again, and a weight of zero leaves none out.
        """
        if self.allowed or _said or _unchecked.get():
            return
        fit = fit_in_progress()
        if fit is None or not self._is_strict_part(inputs) or self._holds_all(fit.samples):
            return
        _said.append(type(fit.estimators[0]))
        warnings.warn(
            LabelLeakWarning(
                f"`{type(fit.estimators[0]).__name__}` is being fitted to {count(inputs)} samples with a path kernel "
                f"that was trained on them and on others, {len(self.data)} in all",
                "The path depends on the labels of all of these: if the fit is judged by the others, as "
                "cross-validation does, its score is too good",
                f"Use an estimator that trains its network within `fit`, `pathkernel.{fit.instead}`; write "
                '`PathKernel(trajectory, leak="allow")` where the part is meant and other samples are the judge',
            ),
            stacklevel=fit.stacklevel,
        )

    def _is_strict_part(self, inputs: PyTree) -> bool:
        own = np.unique(row_hashes(inputs))
        return 0 < len(own) < len(self._trained) and bool(np.isin(own, self._trained, assume_unique=True).all())

    def _holds_all(self, samples: Any) -> bool:
        """True where a fit has all training samples and asks for a matrix of some: of landmarks, or of a batch."""
        try:
            inputs = self.data.queries(samples, "PathKernel")
        except PathKernelError:  # samples of another form, from which those of the matrix were made
            return False
        return bool(np.isin(self._trained, row_hashes(inputs)).all())

    @cached_property
    def _trained(self) -> np.ndarray:
        """Hashes of the training samples, sorted; none where they do not lie in memory."""
        held = self.data.inputs_in_memory
        return np.empty(0, np.int64) if held is None else np.unique(row_hashes(held))


def row_hashes(inputs: PyTree) -> np.ndarray:
    """Hash of each sample's numbers, (n,) int64, the same for those in another floating type; of this process alone.

    Notes
    -----
    Python's hash of bytes (SipHash): with 64 bits, two of a million different samples share one at odds of 3e-8.
    """
    n = count(inputs)
    hashes = np.empty(n, np.int64)
    for block in blocks(n, ROWS):
        leaves = pytree.tree_leaves(take(inputs, block))
        rows = np.concatenate([_bytes(leaf) for leaf in leaves], axis=1)
        hashes[block] = [hash(row.tobytes()) for row in rows]
    return hashes


def _bytes(leaf: torch.Tensor) -> np.ndarray:
    """Bytes of each row, (n, bytes) uint8: of floating-point numbers in single precision, with one zero."""
    numbers = leaf.detach().cpu()
    numbers = numbers.to(torch.float32) + 0.0 if numbers.is_floating_point() else numbers
    return numbers.reshape(len(numbers), -1).contiguous().numpy().view(np.uint8)
