r"""Measures of data attributions: how well scores of training samples foresee what retraining says.

Scores of any tool are judged, as an array ``scores`` of shape (Q, N): how much the presence of training sample i
raises the output f(q) of query q, such as the margin of its class, or its negative loss. So removing i is predicted to
change f(q) by ``-scores[q, i]``, and a subset with weights w to bring :math:`\sum_i w_i\, \mathrm{scores}_{qi}`, up to
a constant. The truth comes from networks that were trained again, such as those of
`pathkernel.trajectory.weighted_retraining.retrain`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from pathkernel.analysis.arrays import Floats, class_labels
from pathkernel.analysis.evaluation_checks import (
    check_agreement,
    check_several,
    checked_suspicion,
    finite,
    matrix,
    numbers_of_samples,
    sample_ids,
)
from pathkernel.errors import InputError, check_choice, check_instance, check_number, is_number, is_whole

CORRELATIONS = ("spearman", "pearson")


# -- what retraining says -------------------------------------------------------------------------------------------


def random_subsets(samples: int, removed: float, count: int, generator: np.random.Generator) -> Floats:
    """Weights of subsets from which a part of the samples was left out at random.

    Parameters
    ----------
    samples
        N.
    removed
        α, the part that is left out, above 0 and below 1; at least one sample is, and one stays.
    count
        R, how many subsets.
    generator
        Source of randomness.

    Returns
    -------
    numpy.ndarray
        (R, N) of zeros and ones, each row with the same number of zeros.

    Raises
    ------
    InputError
        For a part outside (0, 1), other numbers of samples and subsets, and what is no generator.
    """
    check_number("samples", samples, positive=True, whole=True, example=1000)
    check_number("count", count, whole=True, example=60)
    check_instance(
        "generator",
        generator,
        (np.random.Generator, np.random.RandomState),
        "Subsets are drawn by a generator of numpy",
        "Write `generator=numpy.random.default_rng(0)`",
    )
    if samples < 2:
        raise InputError(
            "Subsets of one sample were asked for",
            "A subset lacks one sample at least and keeps one",
            "Write the number of the training samples",
        )
    if not (is_number(removed) and 0 < removed < 1):
        raise InputError(
            f"`removed={removed!r}` was given",
            "The part of the samples that a subset lacks lies between 0 and 1, both excluded",
            "Write `removed=0.5` for halves",
        )
    left_out = min(max(1, round(float(removed) * samples)), samples - 1)
    weights = np.ones((count, samples))
    for row in weights:
        row[generator.permutation(samples)[:left_out]] = 0
    return weights


def linear_datamodeling_score(scores: ArrayLike, subsets: ArrayLike, outputs: ArrayLike) -> Floats:
    r"""Linear datamodeling score (LDS): rank correlation of predicted and true outputs over subsets.

    .. math:: \mathrm{LDS}_q = \rho\bigl([\textstyle\sum_i w_{ri}\, s_{qi}]_{r},\; [f_{rq}]_{r}\bigr)

    with Spearman's ρ over the R subsets. Which question is answered depends on how the networks of ``outputs`` were
    trained: with the initialisation and the order of the run that is explained and the samples outside a subset left
    out (leave-α-out, one model; what `pathkernel.trajectory.weighted_retraining.retrain` trains), or with fresh
    initialisations and orders on halves of the data, averaged over several (the protocol of TRAK).

    Parameters
    ----------
    scores
        (Q, N).
    subsets
        (R, N) weights, 0 and 1, or any others.
    outputs
        (R, Q) f of the networks that were trained with these weights, or (M, R, Q) of M trainings each, which are
        averaged.

    Returns
    -------
    numpy.ndarray
        (Q,), in [-1, 1]; NaN for a query whose predictions or outputs are all the same. Their mean over queries is the
        usual figure.

    Raises
    ------
    InputError
        For shapes that do not belong together, fewer than three subsets, and numbers that are not finite.

    References
    ----------
    Park et al. 2023, "TRAK" (2303.14186), section 2; Ilyas et al. 2022, "Datamodels" (2202.00622).

    Examples
    --------
    >>> scores = np.array([[1.0, 2.0, 3.0]])
    >>> subsets = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
    >>> linear_datamodeling_score(scores, subsets, [[0.1], [0.5], [0.9]])
    array([1.])
    """
    s, w = matrix(scores, "scores"), matrix(subsets, "subsets")
    f = finite(outputs, "outputs")
    f = f.mean(axis=0) if f.ndim == 3 else f
    check_agreement({"scores": (s, "QN"), "subsets": (w, "RN"), "outputs": (f, "RQ")})
    check_several(len(w), "subsets")
    predicted = w @ s.T
    # Sums that differ by their rounding alone, such as those of equal scores over subsets of one size, have no order.
    rounding = np.finfo(np.float64).eps * s.shape[1] * (np.abs(w) @ np.abs(s).T).max(axis=0)
    predicted[:, np.ptp(predicted, axis=0) <= rounding] = 0.0
    return correlation(predicted, f)


def leave_one_out_correlation(
    scores: ArrayLike,
    removed: ArrayLike,
    changes: ArrayLike,
    method: Literal["spearman", "pearson"] = "spearman",
) -> Floats:
    r"""Correlation of predicted and true changes by the removal of single samples.

    .. math:: \rho\bigl([-s_{q i}]_{i},\; [f_q(\text{without } i) - f_q]_{i}\bigr)

    Parameters
    ----------
    scores
        (Q, N).
    removed
        (K,) which sample was removed in each of K trainings.
    changes
        (K, Q) by how much that changed f.
    method
        ``"spearman"`` for ranks, ``"pearson"`` for values, as dattri has it.

    Returns
    -------
    numpy.ndarray
        (Q,), in [-1, 1]; NaN where all predictions or changes are the same.

    Raises
    ------
    InputError
        For shapes that do not belong together, fewer than three removals, ids that there are none of, an unknown
        method, and numbers that are not finite.

    References
    ----------
    Koh and Liang 2017 (1703.04730), figure 2.
    """
    s, f = matrix(scores, "scores"), matrix(changes, "changes")
    ids = sample_ids(removed, s.shape[1])
    check_agreement({"scores": (s, "QN"), "removed": (ids, "K"), "changes": (f, "KQ")})
    check_several(len(ids), "removals")
    return correlation(-s[:, ids].T, f, method)


def correlation(predicted: ArrayLike, true: ArrayLike, method: Literal["spearman", "pearson"] = "spearman") -> Floats:
    """Correlation over the first axis, column by column.

    Parameters
    ----------
    predicted, true
        (R, Q) each.
    method
        ``"spearman"``, of ranks with ties at their mean, or ``"pearson"``.

    Returns
    -------
    numpy.ndarray
        (Q,); NaN for a column of equal numbers.

    Raises
    ------
    InputError
        For other shapes, numbers that are not finite, and an unknown method.
    """
    check_choice("method", method, CORRELATIONS, "Correlations")
    a, b = finite(predicted, "predicted"), finite(true, "true")
    if not a.ndim or a.shape != b.shape:
        raise InputError(
            f"`predicted` has shape {a.shape}, and `true` {b.shape}",
            "Both have a row for each training, and as many columns",
            "Pass two arrays (R, Q)",
        )
    if method == "spearman":
        a, b = rankdata(a, axis=0), rankdata(b, axis=0)
    # Equal numbers minus their mean are not always 0.
    vary = (np.ptp(a, axis=0) > 0) & (np.ptp(b, axis=0) > 0) if len(a) else np.zeros(a.shape[1:], dtype=bool)
    a, b = _centred(a), _centred(b)
    norms = vary * np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(norms > 0, (a * b).sum(axis=0), np.nan) / np.where(norms > 0, norms, 1.0))


def _centred(columns: Floats) -> Floats:
    """Columns less their means, scaled to entries of at most 2: squares of small or large ones are not lost."""
    largest = np.abs(columns).max(axis=0, initial=0.0)
    # By the power of two next above it, which rounds nothing that counts beside it.
    _, exponent = np.frexp(largest)
    scaled = np.ldexp(columns, -exponent)
    return np.asarray(scaled - scaled.mean(axis=0)) if len(columns) else scaled


def top_removals(scores: ArrayLike, sizes: ArrayLike) -> Floats:
    """Weights that leave out each query's strongest proponents.

    Parameters
    ----------
    scores
        (Q, N).
    sizes
        (K,) how many are left out.

    Returns
    -------
    numpy.ndarray
        (Q, K, N) of zeros and ones; ``.reshape(-1, N)`` are rows for `Trajectory.retrain`. Samples with negative scores
        are left out, too, where there are not enough others; among equal scores the first.

    Raises
    ------
    InputError
        For sizes that are no numbers of samples.
    """
    s = matrix(scores, "scores")
    n = numbers_of_samples(sizes, s.shape[1])
    places = np.argsort(np.argsort(-s, axis=1, kind="stable"), axis=1)  # 0 for the strongest
    return (places[:, None, :] >= n[None, :, None]).astype(np.float64)


def query_loss_difference(before: ArrayLike, after: ArrayLike) -> Floats:
    r"""Rise of each query's own loss by leaving out what a method calls its strongest proponents.

    .. math:: \Delta_{qk} = \ell_q(\theta_{-\mathrm{top}_k(q)}) - \ell_q(\theta)

    The larger, the better the proponents were found; random removal is what to compare it with.

    Parameters
    ----------
    before
        (Q,) loss of each query under the network that is explained.
    after
        (Q, K) its loss after each of the removals of `top_removals` that are its own.

    Returns
    -------
    numpy.ndarray
        (K,) mean over the queries.

    Raises
    ------
    InputError
        For shapes that do not belong together, and numbers that are not finite.

    References
    ----------
    Park et al. 2023, "TRAK" (2303.14186), removes proponents in this way and counts flips, see `brittleness`; the loss
    says the same of a query that does not flip.
    """
    a, b = finite(before, "before"), matrix(after, "after")
    check_agreement({"before": (a, "Q"), "after": (b, "QK")})
    return np.asarray((b - a[:, None]).mean(axis=0))


def brittleness(labels: ArrayLike, predictions: ArrayLike, sizes: ArrayLike) -> tuple[Floats, Floats]:
    """Smallest removals by which predictions flip.

    Parameters
    ----------
    labels
        (Q,) predicted class of each query under the network that is explained.
    predictions
        (Q, K) its predicted class after each of the removals of `top_removals` that are its own.
    sizes
        (K,) how many samples were left out.

    Returns
    -------
    smallest
        (Q,) the smallest of the sizes that flipped it, infinity where none did.
    flipped
        (K,) part of the queries that a removal of this size or a smaller one flipped.

    Raises
    ------
    InputError
        For shapes that do not belong together, classes that are none (NaN, scores), and sizes that are no numbers of
        samples.

    References
    ----------
    Ilyas et al. 2022, "Datamodels" (2202.00622); Park et al. 2023, "TRAK" (2303.14186).

    Examples
    --------
    >>> smallest, flipped = brittleness([0, 1], [[0, 2], [1, 1]], [10, 20])
    >>> smallest.tolist(), flipped.tolist()
    ([20.0, inf], [0.0, 0.5])
    """
    own, after = class_labels(labels, "labels"), class_labels(predictions, "predictions")
    n = numbers_of_samples(sizes)
    check_agreement({"labels": (own, "Q"), "predictions": (after, "QK"), "sizes": (n, "K")})
    if own.size and after.size and (own.dtype.kind in "USO") != (after.dtype.kind in "USO"):
        raise InputError(
            f"`labels` is of type {own.dtype}, and `predictions` of type {after.dtype}",
            "A prediction is compared with the one before: both are numbers of classes, or both are names",
            "Pass both as `argmax` gives them, or map both to names",
        )
    smallest = np.where(after != own[:, None], n.astype(np.float64), np.inf).min(axis=1, initial=np.inf)
    return smallest, (smallest[:, None] <= n).mean(axis=0)


# -- wrong labels ---------------------------------------------------------------------------------------------------


def mislabel_auc(suspicion: ArrayLike, flipped: ArrayLike) -> float:
    """Area under the ROC curve of finding wrong labels: the chance that a wrong one is suspected more than a right one.

    Parameters
    ----------
    suspicion
        (N,), the higher, the more suspect.
    flipped
        (N,) true for the wrong labels.

    Returns
    -------
    float
        In [0, 1]; 0.5 for chance.

    Raises
    ------
    InputError
        For shapes that do not belong together, numbers that are not finite, and where all labels are right, or wrong.

    References
    ----------
    Pruthi et al. 2020, "TracIn" (2002.08484), section 4; `sklearn.metrics.roc_auc_score`.
    """
    score, wrong = checked_suspicion(suspicion, flipped)
    return float(roc_auc_score(wrong, score))


def mislabel_precision(suspicion: ArrayLike, flipped: ArrayLike, inspected: int | None = None) -> float:
    """Part of wrong labels among the most suspect.

    Parameters
    ----------
    suspicion, flipped
        As for `mislabel_auc`.
    inspected
        How many of the most suspect are looked at; as many as there are wrong labels by default, where precision and
        recall are the same.

    Returns
    -------
    float
        In [0, 1]. Among equal suspicions the first samples count as the more suspect.

    Raises
    ------
    InputError
        As `mislabel_auc` does, and for a number of samples that there are none of.
    """
    score, wrong = checked_suspicion(suspicion, flipped)
    n = int(wrong.sum()) if inspected is None else inspected
    if not (is_whole(n) and 1 <= n <= len(wrong)):
        raise InputError(
            f"`inspected={inspected!r}` was given",
            f"Between 1 and all {len(wrong)} samples are looked at",
            "Leave it out for as many as there are wrong labels",
        )
    return float(wrong[np.argsort(-score, kind="stable")[:n]].mean())


# -- smoothness -----------------------------------------------------------------------------------------------------


def metasmoothness(start: ArrayLike, middle: ArrayLike, end: ArrayLike) -> float:
    r"""Empirical metasmoothness of training: how far small changes of the samples' weights foresee larger ones.

    .. math:: S_{h, v} = \mathrm{sign}(\Delta_0)^\top\,
              \mathrm{diag}\!\Bigl(\frac{\lvert\Delta_0\rvert}{\lVert\Delta_0\rVert_1}\Bigr)\, \mathrm{sign}(\Delta_1),
              \qquad \Delta_0 = \theta(w + h v) - \theta(w),\quad \Delta_1 = \theta(w + 2 h v) - \theta(w + h v)

    Parameters
    ----------
    start, middle, end
        What training with weights w, w + h v and w + 2 h v gives: parameters or outputs, (P,) each, or (D, P) for
        several directions v, over which the mean is taken.

    Returns
    -------
    float
        In [-1, 1]: 1 where all entries go on in their direction, 0 where the second step has nothing to do with the
        first.

    Raises
    ------
    InputError
        For other shapes, numbers that are not finite, and where the first step changes nothing.

    References
    ----------
    Engstrom et al. 2025 (2503.13751), definition 2.
    """
    points = [np.atleast_2d(finite(v, name)) for v, name in ((start, "start"), (middle, "middle"), (end, "end"))]
    check_agreement({name: (v, "DP") for name, v in zip(("start", "middle", "end"), points, strict=True)})
    first, second = points[1] - points[0], points[2] - points[1]
    size = np.abs(first).sum(axis=1)
    if (size == 0).any():
        raise InputError(
            "`start` and `middle` are the same",
            "Metasmoothness compares a second step in the weights of samples with a first that changed something",
            "Take another direction, or a larger step",
        )
    return float(((np.abs(first) * np.sign(first) * np.sign(second)).sum(axis=1) / size).mean())
