"""Scores in the forms that other libraries' judges and users take: dattri's metrics, captum's influence interface.

Neither library is imported: what is made here has the arguments and results that they document, and is theirs to use.
Scores are (Q, N) as everywhere in `pathkernel.analysis.evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pathkernel.analysis.arrays import Floats
from pathkernel.analysis.evaluation_checks import check_agreement, checked_suspicion, finite, matrix, sample_ids
from pathkernel.errors import InputError, is_whole


def dattri_lds(scores: ArrayLike, subsets: ArrayLike, outputs: ArrayLike) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Arguments of ``dattri.metric.lds(score, ground_truth)``.

    Parameters
    ----------
    scores, subsets, outputs
        As for `pathkernel.analysis.evaluation.linear_datamodeling_score`; subsets of zeros and ones, each of one size.

    Returns
    -------
    score
        (N, Q).
    ground_truth
        Outputs (R, Q), and the samples of each subset, (R, size) int64.

    Raises
    ------
    InputError
        For weights that are no subsets of one size, and as of `linear_datamodeling_score`.

    Examples
    --------
    >>> score, truth = dattri_lds([[1.0, 2.0, 3.0]], [[1, 1, 0], [1, 0, 1]], [[0.1], [0.5]])
    >>> score.shape, truth[1].tolist()
    (torch.Size([3, 1]), [[0, 1], [0, 2]])
    """
    s, weights, truth = matrix(scores, "scores"), matrix(subsets, "subsets"), finite(outputs, "outputs")
    truth = truth.mean(axis=0) if truth.ndim == 3 else truth
    check_agreement({"scores": (s, "QN"), "subsets": (weights, "RN"), "outputs": (truth, "RQ")})
    sizes = {int(row.sum()) for row in weights}
    if not np.isin(weights, (0, 1)).all() or len(sizes) != 1:
        raise InputError(
            f"`subsets` holds subsets of {len(sizes)} sizes, or other weights than 0 and 1",
            "dattri takes the ids of each subset, all of one number",
            "Judge them by `pathkernel.analysis.evaluation.linear_datamodeling_score`, or draw subsets by "
            "`random_subsets`",
        )
    ids = torch.from_numpy(np.stack([np.flatnonzero(row) for row in weights]))
    return _transposed(s), (torch.from_numpy(truth), ids)


def dattri_loo_corr(scores: ArrayLike, removed: ArrayLike, changes: ArrayLike) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Arguments of ``dattri.metric.loo_corr(score, ground_truth)``.

    Parameters
    ----------
    scores, removed, changes
        As for `pathkernel.analysis.evaluation.leave_one_out_correlation`.

    Returns
    -------
    score
        (K, Q) of the removed samples: dattri reads the rows of scores and truth side by side.
    ground_truth
        By how much a sample's presence raised the outputs, (K, Q), and the removed samples, (K,).

    Raises
    ------
    InputError
        For shapes that do not belong together, ids that there are none of, and numbers that are not finite.
    """
    s, f = matrix(scores, "scores"), matrix(changes, "changes")
    ids = sample_ids(removed, s.shape[1])
    check_agreement({"scores": (s, "QN"), "removed": (ids, "K"), "changes": (f, "KQ")})
    return _transposed(s)[ids], (torch.from_numpy(-f), torch.from_numpy(ids))


def dattri_mislabel(suspicion: ArrayLike, flipped: ArrayLike) -> tuple[Tensor, Tensor]:
    """Arguments of ``dattri.metric.mislabel_detection_auc(score, ground_truth)``.

    Parameters
    ----------
    suspicion, flipped
        As for `pathkernel.analysis.evaluation.mislabel_auc`.

    Returns
    -------
    score, ground_truth
        (N,) float64, and (N,) booleans.

    Raises
    ------
    InputError
        As `mislabel_auc` does.
    """
    score, wrong = checked_suspicion(suspicion, flipped)
    return torch.from_numpy(score), torch.from_numpy(wrong)


class KMostInfluentialResults(NamedTuple):
    """Samples of highest or lowest scores for each query, in the form of captum's result of that name.

    Attributes
    ----------
    indices
        (Q, k) int64, the strongest first.
    influence_scores
        (Q, k).
    """

    indices: Tensor
    influence_scores: Tensor


class InfluenceInterface:
    """Scores behind the methods of captum's ``DataInfluence``, for code that was written for `captum.influence`.

    Parameters
    ----------
    scores
        Makes scores (Q, N) of a batch ``(inputs, ..., labels)``, as `influence` is given it.
    self_scores
        Makes the samples' scores for themselves, (N,); None where there are none.

    Examples
    --------
    >>> import torch
    >>> ours = InfluenceInterface(lambda x, y: x @ torch.ones(2, 5).cumsum(1))
    >>> ours.influence((torch.ones(1, 2), torch.zeros(1)), k=2).indices
    tensor([[4, 3]])
    """

    def __init__(self, scores: Callable[..., ArrayLike], self_scores: Callable[[], ArrayLike] | None = None) -> None:
        for name, made in (("scores", scores), ("self_scores", self_scores)):
            if made is not None and not callable(made):
                raise InputError(
                    f"`{name}` is a {type(made).__name__}",
                    "It is a function: scores are of the queries that `influence` is given",
                    f"Write `{name}=lambda *batch: ...`",
                )
        self._scores, self._self_scores = scores, self_scores

    def influence(
        self,
        inputs: Any = None,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor | KMostInfluentialResults:
        """Scores of all samples, or of the strongest; arguments as of ``TracInCP.influence``.

        Parameters
        ----------
        inputs
            A batch as a tuple, or an iterable of batches such as a DataLoader.
        k
            How many samples are returned; None for the scores of all.
        proponents
            Highest scores first, or lowest.
        show_progress
            Not used.
        aggregate
            Sum over the queries.

        Returns
        -------
        torch.Tensor or KMostInfluentialResults
            (Q, N), or (1, N) summed; with ``k`` the strongest, (Q, k) each.

        Raises
        ------
        InputError
            Without inputs, for a number of samples that there are none of, and scores that are none.
        """
        if inputs is None:
            raise InputError(
                "`influence` was called without inputs",
                "Scores are of the queries that it is given",
                "Pass a batch as a tuple `(inputs, labels)`, or a DataLoader",
            )
        one = isinstance(inputs, (tuple, list))
        several = hasattr(inputs, "__iter__") and not torch.is_tensor(inputs)
        batches = [inputs] if one else list(inputs) if several else []
        if not batches or not all(isinstance(batch, (tuple, list)) and len(batch) for batch in batches):
            raise InputError(
                f"`influence` was called with a {type(inputs).__name__} that holds no batches",
                "A batch is a tuple of inputs and labels",
                "Pass `(inputs, labels)`, or a DataLoader",
            )
        found = torch.cat([torch.from_numpy(matrix(self._scores(*batch), "scores(*batch)")) for batch in batches])
        found = found.sum(dim=0, keepdim=True) if aggregate else found
        if k is None:
            return found
        if not (is_whole(k) and 1 <= k <= found.shape[1]):
            raise InputError(
                f"`k={k!r}` was given for {found.shape[1]} training samples",
                f"It lies between 1 and {found.shape[1]}",
                "Leave it out for the scores of all samples",
            )
        order = found.argsort(dim=1, descending=proponents, stable=True)[:, :k]
        return KMostInfluentialResults(order, found.gather(1, order))

    def self_influence(self, inputs: Any = None, show_progress: bool = False) -> Tensor:
        """The samples' scores for themselves, (N,), as of ``TracInCP.self_influence`` without ``inputs``.

        Raises
        ------
        InputError
            Where they were not given, or of other samples.
        """
        if self._self_scores is None or inputs is not None:
            raise InputError(
                "`self_influence` was asked of other samples, or of scores that have none",
                "Scores of the training samples for themselves are there where `self_scores=` makes them",
                "Write `InfluenceInterface(scores, self_scores=...)`, and call `self_influence()`",
            )
        return torch.from_numpy(np.asarray(self._self_scores(), dtype=np.float64))

    @classmethod
    def get_name(cls) -> str:
        """Name of the class, as captum's ``get_name``."""
        return cls.__name__


def _transposed(scores: Floats) -> Tensor:
    """(Q, N) as (N, Q), contiguous."""
    return torch.from_numpy(np.ascontiguousarray(scores.T))
