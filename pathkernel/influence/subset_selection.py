r"""Greedy choice of a few samples that stand for all, by a positive semi-definite kernel between them.

Written in features φ with K = φφᵀ: *herding* keeps the mean of φ over the samples that were chosen near the mean over
all; *experimental design* keeps what the φ of the samples that were chosen span near the φ of all, or takes whatever is
farthest from it.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg


def herding(K: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    r"""Samples chosen one by one so that their mean is near that of all, and what speaks for each of the others.

    .. math:: i_{k+1} = \arg\max_{i \notin S_k} \Bigl[ \frac1n \sum_j K_{ij} - \frac{1}{k+1} \sum_{j \in S_k} K_{ij}
              \Bigr]

    Parameters
    ----------
    K
        (n, n) positive semi-definite.
    count
        How many samples, from 0 to n.

    Returns
    -------
    ids
        (count,) int64, in the order in which they were chosen, each once; of equal samples, the first.
    score
        (n,) the bracket for S the samples that were chosen.

    Notes
    -----
    Time O(n²) for the mean and O(n · count) for the choice.

    References
    ----------
    Chen, Welling and Smola 2010, "Super-samples from kernel herding" (1203.3472), equation 8, without replacement.
    """
    n = len(K)
    mean, total = K.mean(axis=0), np.zeros(n)
    chosen, free = np.empty(count, dtype=np.int64), np.ones(n, dtype=bool)
    score = mean
    for k in range(count):
        i = chosen[k] = int(np.argmax(np.where(free, score, -np.inf)))
        free[i] = False
        total += K[i]
        score = mean - total / (k + 2)
    return chosen, score


def greedy_design(
    K: np.ndarray, count: int, noise: float, criterion: str = "total variance"
) -> tuple[np.ndarray, np.ndarray]:
    r"""Samples chosen one by one, and the variance that they leave.

    .. math:: i_{k+1} = \arg\max_i \sum_j \bigl[V_j(S_k) - V_j(S_k \cup \{i\})\bigr]
              \quad\text{or}\quad \arg\max_i V_i(S_k)

    Parameters
    ----------
    K
        (n, n) positive semi-definite; it is left as it is.
    count
        How many samples, from 0 to n.
    noise
        μ > 0.
    criterion
        The first for ``"total variance"`` (A-optimal), the second for ``"own variance"`` (the pivots of a Cholesky
        factorisation; D-optimal). Of equal samples, the first.

    Returns
    -------
    ids
        (count,) int64, in the order in which they were chosen.
    variance
        (n,) V(S) of all samples, 0 or more.

    Notes
    -----
    Time O(n² · count) for the first criterion, O(n · count²) for the second; memory n · count numbers.

    References
    ----------
    Yu, Bi and Tresp 2006, "Active learning via transductive experimental design", section 4, for the first; for the
    second, greedy maximisation of the information, Krause, Singh and Guestrin 2008 (JMLR 9), and pivoted Cholesky.
    """
    n = len(K)
    chosen = np.empty(count, dtype=np.int64)
    factor = np.empty((n, count), order="F")  # K − L Lᵀ is what is left of K
    variance = K.diagonal().copy()
    free = np.ones(n, dtype=bool)
    total = criterion == "total variance"
    squares = (K**2).sum(axis=0) if total else variance  # Σ_j of the entries left in each column
    for k in range(count):
        gain = squares / (variance + noise) if total else variance
        i = chosen[k] = int(np.argmax(np.where(free, gain, -np.inf)))
        free[i] = False
        L = factor[:, :k]
        left = (K[:, i] - L @ L[i]) / np.sqrt(variance[i] + noise)
        if total:
            products = K @ left - L @ (L.T @ left)
            squares = np.maximum(squares - 2 * left * products + left**2 * (left @ left), 0.0)
        factor[:, k] = left
        variance = np.maximum(variance - left**2, 0.0)  # of what is known to the last bit, rounding can be negative
    return chosen, variance


def conditional_covariance(K: np.ndarray, given: int, noise: float) -> np.ndarray:
    """What is left of K (m, m) of all but the first samples, once these were observed with noise μ.

    Parameters
    ----------
    K
        (given + m, given + m) positive semi-definite.
    given
        How many samples were observed; they are the first.
    noise
        μ > 0.
    """
    factor = scipy.linalg.cholesky(K[:given, :given] + noise * np.eye(given), lower=True)
    seen = scipy.linalg.solve_triangular(factor, K[:given, given:], lower=True)
    return np.asarray(K[given:, given:] - seen.T @ seen)


def normalised(K: np.ndarray, floor: float) -> np.ndarray:
    r"""K of features that were brought to nearly the same length: :math:`K_{ij} / \sqrt{(K_{ii} + c)(K_{jj} + c)}`.

    Parameters
    ----------
    K
        (n, n) positive semi-definite.
    floor
        c as a multiple of the mean of K_ii: samples whose own value is far below it come out short.
    """
    diagonal = K.diagonal()
    scale = diagonal + floor * diagonal.mean()
    scale = 1 / np.sqrt(np.where(scale > 0, scale, 1.0))  # a kernel that is zero on all samples stays so
    return np.asarray(K * scale * scale[:, None])
