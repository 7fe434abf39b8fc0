r"""Generalisation bound from the loss path kernel.

Along gradient flow the loss of any sample is a kernel machine in the loss path kernel K of the training samples,

.. math:: \ell(\theta_T, z) = \ell(\theta_0, z) - \frac1n \sum_{i=1}^n K(z, z_i),\qquad
          K(z, z') = \int_0^T \langle \nabla \ell(\theta_t, z), \nabla \ell(\theta_t, z')\rangle\, dt ,

so that the complexity of all networks that training may come to is that of such machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathkernel.analysis.arrays import real_numbers
from pathkernel.analysis.gram_matrix import as_gram_matrix, check_pairs
from pathkernel.errors import PathKernelError, is_number


@dataclass(frozen=True)
class LossPathBound:
    r"""Upper bound of the gap between the loss of a population and that of the training samples.

    With probability 1 − δ over the training samples,

    .. math:: L_\mu(\theta_T) - L_S(\theta_T) \le 2 \min(U_1, U_2) + 3 \sqrt{\frac{\log(2 / \delta)}{2 n}}

    Attributes
    ----------
    by_kernel
        :math:`U_1 = \frac{B}{n} \sqrt{\sup_K \operatorname{tr} K + \sum_{i \ne j} \Delta_{ij}}`, with
        :math:`B^2 = \sup (L(\theta_0) - L(\theta_T))` and 2Δ the spread of an entry of K over the trainings.
    by_losses
        :math:`U_2 = \epsilon / n`, with ε the largest distance ‖·‖₁ between the losses of the samples after two of the
        trainings; None where no losses were given.
    confidence
        The last term.
    trainings
        How many trainings the suprema were taken over.
    """

    by_kernel: float
    by_losses: float | None
    confidence: float
    trainings: int

    @property
    def rademacher(self) -> float:
        """The smaller of U_1 and U_2: a bound of the empirical Rademacher complexity."""
        return self.by_kernel if self.by_losses is None else min(self.by_kernel, self.by_losses)

    @property
    def gap(self) -> float:
        """2 min(U_1, U_2): the part of the bound that depends on the training."""
        return 2 * self.rademacher

    def __float__(self) -> float:
        return self.gap + self.confidence


def loss_path_bound(
    kernels: Sequence[ArrayLike],
    decreases: ArrayLike,
    losses: ArrayLike | None = None,
    *,
    delta: float = 0.01,
) -> LossPathBound:
    """Generalisation bound from loss path kernels of several trainings.

    Parameters
    ----------
    kernels
        Loss path kernels (n, n) of one and the same n samples, along R trainings: those of
        ``PathKernel(trajectory, outputs="loss", measure="learning_rate")``, in the time of gradient flow.
    decreases
        (R,) by how much each training lowered the mean loss of its own training samples.
    losses
        (R, n) losses of the n samples after each training; None to leave U_2 out.
    delta
        δ, the probability that the bound does not hold.

    Returns
    -------
    LossPathBound

    Raises
    ------
    PathKernelError
        For kernels, decreases and losses that do not fit together, or a loss that was not lowered.

    Notes
    -----
    The suprema of the theorem are over all training sets that might have been drawn; here they are over those that
    were, which the paper does as well, with 20 to 100 of them. With one training it is an estimate and no bound. The
    last term holds for losses in [0, 1]. Momentum and mini-batches follow gradient flow but for terms of the order of
    the learning rate; under momentum μ its time runs 1/(1 − μ) times as fast, by which K is to be multiplied.

    References
    ----------
    Chen, Huang, Wang, Yang and Liang 2023, "Analyzing generalization of neural networks through loss path kernels",
    NeurIPS, theorems 3 and 5 and section 5.

    Examples
    --------
    >>> bound = loss_path_bound([[[4.0, 0.0], [0.0, 5.0]]], [1.0])
    >>> bound.by_kernel, bound.gap  # 1/2 · √9, and twice that
    (1.5, 3.0)
    """
    grams = _grams(kernels)
    decreases = real_numbers(decreases, "decreases", "Losses are real numbers")
    trainings, n = len(grams), grams.shape[1]
    if decreases.shape != (trainings,) or not (np.isfinite(decreases).all() and (decreases >= 0).all()):
        raise PathKernelError(
            f"`decreases` is {np.array2string(decreases, threshold=8)} for {trainings} kernels",
            "Each training has lowered the mean loss of its samples by some number, 0 or more",
            "Pass the mean loss before training less that after it, one for each kernel",
        )
    if not (is_number(delta) and 0 < delta < 1):
        raise PathKernelError(
            f"`delta={delta!r}` was given", "It is a probability between 0 and 1", "Write `delta=0.01`"
        )
    spread = (grams.max(axis=0) - grams.min(axis=0)) / 2
    trace = np.trace(grams, axis1=1, axis2=2).max()
    by_kernel = math.sqrt(decreases.max() * (trace + spread.sum() - np.trace(spread))) / n
    by_losses = None
    if losses is not None:
        after = real_numbers(losses, "losses", "Losses are real numbers")
        if after.shape != (trainings, n) or not np.isfinite(after).all():
            raise PathKernelError(
                f"`losses` has shape {after.shape} for {trainings} kernels of {n} samples",
                "They are the finite losses of the samples of the kernels after each training",
                "Pass an array (trainings, samples)",
            )
        # One training says nothing about how far two lie apart.
        by_losses = np.abs(after[:, None] - after[None]).sum(axis=2).max() / n if trainings > 1 else None
    confidence = 3 * math.sqrt(math.log(2 / delta) / (2 * n))
    return LossPathBound(by_kernel, None if by_losses is None else float(by_losses), confidence, trainings)


def _grams(kernels: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Loss path kernels of R trainings, (R, n, n)."""
    grams = []
    listed = hasattr(kernels, "__iter__") and not isinstance(kernels, (str, dict))
    for place, K in enumerate(kernels if listed else ()):
        grams.append(as_gram_matrix(K, f"kernels[{place}]"))
        check_pairs(grams[-1], f"kernels[{place}]")
    if not grams or len({K.shape for K in grams}) > 1:
        shapes = ", ".join(str(K.shape) for K in grams)
        raise PathKernelError(
            f"`kernels` is a {type(kernels).__name__} of {len(grams)} matrices, of shapes {shapes or 'none'}",
            "It is a sequence of loss path kernels, one for each training, of the same samples",
            "Pass `[K]` for one training",
        )
    return np.stack(grams)
