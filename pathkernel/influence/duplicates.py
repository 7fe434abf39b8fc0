r"""Near-duplicates among samples, and between training and test samples, under a kernel.

A pair is one where a sample is far nearer to its neighbour than that neighbour's distance to the next would make
likely. That is a ratio of distances at one place, so that it needs no threshold on the cosine, whose usual values
differ between kernels, networks and regions of the data, and no examples of duplicates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pathkernel._typing import PyTree
from pathkernel.analysis.arrays import as_array
from pathkernel.errors import InputError, check_number, is_number
from pathkernel.gradients.pytrees import as_tensors, check_rows, copied_samples, count, memory_bytes, take
from pathkernel.influence.identical_samples import first_identical, first_identical_of
from pathkernel.influence.nearest_neighbours import agreed, discoveries, nearest, resolution, separation
from pathkernel.kernels.kernel import KernelFunction, checked_kernel
from pathkernel.runtime.extras import require_extra

if TYPE_CHECKING:
    import pandas

FEWEST, FEWEST_OTHERS = 20, 100
"""Training samples, and others, from which a dimension is estimated, at least: its standard error is 1.44 / √n of it.

Where it comes out too large, too much is found. Within, groups must agree about themselves; among fewer than 100 others
something is found where there is nothing more often than the rate says: `benchmarks/near_duplicates.py` counts.
"""

IDENTICAL = (1.0, float("nan"), 0.0)
"""Cosine, next cosine and p-value of identical samples."""


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of samples that are nearer to each other than neighbours are there, the least likely by chance first.

    Attributes
    ----------
    pairs
        (M, 2) ids. Of training samples i < j; in a group of identical samples, each with the first of them. Where other
        samples were given: a training sample, and one of the others.
    cosine
        (M,) cosine under the kernel; 1 for identical samples.
    next_cosine
        (M,) largest cosine of the sample with one that does not belong to its near-duplicates, for comparison; NaN for
        identical samples, which are not compared.
    p_value
        (M,) how likely neighbours stand so far apart from all others where there are no duplicates; 0 for identical
        samples.
    identical
        (M,) True where the two samples are the same numbers, to single precision.
    labels
        Labels of the first and of the second sample of each pair, (M, ...) each; None where none were given.
    threshold
        The largest p-value that counts; 0 where none does.
    dimensions
        Dimension d of the data under the kernel at its smallest distances, as found for 1, 2, … near-duplicates.
    resolution
        Differences from a cosine of 1 that are rounding.
    tested
        How many samples were tested: different training samples, or other samples that are no training sample.
    across
        True for pairs of training samples and others.

    References
    ----------
    As of `near_duplicates`.
    """

    pairs: np.ndarray
    cosine: np.ndarray
    next_cosine: np.ndarray
    p_value: np.ndarray
    identical: np.ndarray
    labels: tuple[np.ndarray, np.ndarray] | None
    threshold: float
    dimensions: tuple[float, ...]
    resolution: float
    tested: int
    across: bool

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def conflicts(self) -> np.ndarray:
        """(M,) True where the labels of a pair disagree.

        Raises
        ------
        InputError
            Where no labels were given.
        """
        if self.labels is None:
            raise InputError(
                "`conflicts` was asked of near-duplicates that were found without labels",
                "Labels of both samples of each pair are compared",
                "Write `near_duplicates(kernel, X, labels=y)`, and `other_labels=` where there are other samples",
            )
        one, other = self.labels
        differs = (one != other) & ~((one != one) & (other != other))  # NaN and NaN, no label in either, agree
        return np.asarray(differs.any(axis=tuple(range(1, one.ndim))))

    @property
    def redundant(self) -> np.ndarray:
        """Ids without which no pair is left: of training samples all but the first of each group, else all others."""
        if self.across or not len(self):
            return np.unique(self.pairs[:, 1])
        return np.sort(np.concatenate([group[1:] for group in self.groups]))

    @property
    def groups(self) -> list[np.ndarray]:
        """Ids of samples that pairs join, in ascending order, the groups in that of their first.

        Raises
        ------
        InputError
            For pairs of training samples and others, whose ids count apart.
        """
        if self.across:
            raise InputError(
                "`groups` was asked of pairs of training samples and others",
                "Groups are of samples of one set",
                "Read `pairs`, whose second column holds the ids of the others",
            )
        ids, places = np.unique(self.pairs, return_inverse=True)
        one, other = places.reshape(-1, 2).T
        joined = coo_array((np.ones(len(self)), (one, other)), shape=(len(ids), len(ids)))
        number, of = connected_components(joined, directed=False)
        return sorted((ids[of == group] for group in range(number)), key=lambda group: int(group[0]))

    def to_frame(self) -> pandas.DataFrame:
        """One row for each pair, the least likely by chance first.

        Columns ``sample, other, cosine, next_cosine, p_value, identical``, and ``label``, ``other_label`` where these
        are single numbers or names.
        """
        require_extra("pandas", "`to_frame`", "pandas")
        import pandas

        columns = {"sample": self.pairs[:, 0], "other": self.pairs[:, 1]}
        columns |= {name: getattr(self, name) for name in ("cosine", "next_cosine", "p_value", "identical")}
        if self.labels is not None and self.labels[0].ndim == 1:
            columns |= dict(zip(("label", "other_label"), self.labels, strict=True))
        return pandas.DataFrame(columns)

    def __repr__(self) -> str:
        what = "a training sample and another" if self.across else "training samples"
        first = ", ".join(f"{i}–{j}" for i, j in self.pairs[:5])
        return (
            f"NearDuplicates({len(self)} pairs of {what}, {int(self.identical.sum())} of them identical, {self.tested} "
            f"samples tested{': ' if first else ''}{first}{' …' if len(self) > 5 else ''})"
        )


def near_duplicates(
    kernel: KernelFunction,
    X: PyTree,
    X_other: PyTree | None = None,
    *,
    labels: Any = None,
    other_labels: Any = None,
    copies: int = 3,
    false_discovery_rate: float = 0.05,
    dimension: float | None = None,
    memory: int | str = "1GB",
    progress: bool = False,
) -> NearDuplicates:
    r"""Pairs of samples that are near-duplicates under a kernel: within X, or between X and others.

    With the distances :math:`r_k` of a sample to its k-th nearest of different samples,
    :math:`r^2 = 2 - 2\cos`, the k nearest are its near-duplicates where they stand apart from the next:

    .. math:: p_k = \Bigl(\frac{r_k}{r_{k+1}}\Bigr)^{d_k}, \qquad p = \min\bigl(1, c \min_{k \le c} p_k\bigr)

    :math:`p_1` is the probability of so large a gap where samples lie with a density that is constant as far as the
    next neighbour, in d dimensions, whatever that density is. So is :math:`p_k` where the k nearest are copies of each
    other and count as one; where they are not, it is larger than the probability, which is its k-th power.
    d follows from the median gap, :math:`d_k = \ln 2 / (k \ln \mathrm{median}\, r_{k+1}/r_k)`. Within X a group counts
    where all its samples find the same one, with the largest p among them. Samples count whose p passes the procedure
    of Benjamini and Hochberg. Identical samples are found by their numbers, and one of each group is compared.

    Parameters
    ----------
    kernel
        A `PathKernel` for similarity to the network along its training, a `TangentKernel` for that of one θ, or any
        callable ``(X, Y=None) -> (n, m)``.
    X
        N training samples, as the kernel takes them.
    X_other
        Q other samples, of which those are looked for that have a near-duplicate among X: test samples that leaked.
        None for pairs within X.
    labels, other_labels
        Labels (N, ...) and (Q, ...), to be compared in each pair; they have no part in what is a pair.
    copies
        How many near-duplicates of a sample are looked for, besides identical ones: c. A sample with more has none that
        stand apart.
    false_discovery_rate
        Which part of the samples that are found may be there by chance, on average, between 0 and 1.
    dimension
        d, where few other samples are given: ``near_duplicates(kernel, X).dimensions[0]``. None (default) estimates it
        from the samples that are tested.
    memory
        Budget for blocks of the kernel matrix, as bytes or text.
    progress
        Show a progress bar over the blocks.

    Returns
    -------
    NearDuplicates

    Raises
    ------
    InputError
        For fewer than 3 different samples, fewer than 20, or 100 others, to estimate d from, kernels under which most
        samples have their nearest at one distance, and what does not fit together.

    Notes
    -----
    Time N² (or Q N) kernel values, in one symmetric matrix where 32 N² bytes fit ``memory``, else in blocks of rows,
    each of which passes X through the network again. Memory: the budget, the samples, and O(N c).

    Duplicates raise the median gap, which lowers d and hides them; where half of all samples have one, d is taken from
    the gap behind the second or third neighbour, which only more copies widen.

    The rate holds as far as the density does not change between neighbours; `benchmarks/near_duplicates.py` measures
    it on normal data. Tables of categories with few numeric columns, rounded or sparse rows, heavy tails, tight
    clusters and kernels under which nearly all samples are at one distance hold many pairs that stand apart without
    being copies: there the pairs are a list to look through, and the rate says nothing.

    References
    ----------
    Facco et al. 2017 (1803.06992), equations 1 to 5, for the ratio of distances and the dimension; Denti et al. 2022
    (Scientific Reports 12, 20005) for neighbours beyond the second; Benjamini and Hochberg 1995 for the threshold.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    >>> X[7] = X[3] + 1e-3
    >>> kernel = pk.TangentKernel(torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)))
    >>> pk.influence.near_duplicates(kernel, X).pairs.tolist()
    [[3, 7]]
    """
    checked_kernel(kernel, "near_duplicates")
    _check(copies, false_discovery_rate, dimension)
    samples, others = _Set.of(X, labels, "labels"), None
    if X_other is not None:
        others = _Set.of(X_other, other_labels, "other_labels")
    if others is not None and (samples.labels is None) != (others.labels is None):
        raise InputError(
            f"`{'labels' if others.labels is None else 'other_labels'}` was given alone",
            "Labels of both samples of each pair are compared",
            "Write `near_duplicates(kernel, X, X_other, labels=y, other_labels=y_other)`",
        )
    if others is not None and samples.labels is not None and others.labels is not None:
        _check_comparable(samples.labels, others.labels)
    firsts = first_identical(samples.leaves)
    distinct = np.flatnonzero(firsts == np.arange(len(firsts)))
    if others is None:
        tested, twins = distinct, np.flatnonzero(firsts != np.arange(len(firsts)))
    else:
        firsts = first_identical_of(samples.leaves, others.leaves)
        tested, twins = np.flatnonzero(firsts < 0), np.flatnonzero(firsts >= 0)
    c = min(copies, len(distinct) - (2 if others is None else 1))
    if c < 1:
        raise InputError(
            f"`near_duplicates` was given {len(distinct)} different samples",
            "A pair stands apart from a third sample",
            "Pass 3 different samples or more",
        )
    fewest = FEWEST if others is None else FEWEST_OTHERS
    if dimension is None and 0 < len(tested) < fewest:
        raise InputError(
            f"{len(tested)} {'training' if others is None else 'other'} samples are tested, those left out that are "
            "identical with one before",
            f"The dimension of the data is estimated from {fewest} or more",
            "Pass more, or write `dimension=near_duplicates(kernel, X).dimensions[0]` with many training samples; "
            "`pathkernel duplicates` prints it without `--test`, and takes it as `--dimension`",
        )
    references = take(samples.inputs, distinct)
    rounding = resolution(kernel, references)
    rows = None if others is None else take(others.inputs, tested)
    cosine, places = nearest(kernel, references, rows, c + 1, memory_bytes(memory), progress)
    log_p, best, dimensions = separation(cosine, rounding, dimension, kernel)
    if others is None:
        log_p = agreed(log_p, best, places)
    chosen, threshold = discoveries(log_p, false_discovery_rate)
    found: dict[tuple[int, int], tuple[float, float, float]] = {(int(firsts[j]), int(j)): IDENTICAL for j in twins}
    for row in chosen[np.argsort(log_p[chosen], kind="stable")]:
        for place in range(best[row]):
            pair = int(distinct[places[row, place]]), int(tested[row])
            measured = float(cosine[row, place]), float(cosine[row, best[row]]), float(np.exp(log_p[row]))
            found.setdefault(pair if others is not None else (min(pair), max(pair)), measured)
    pairs = np.array([*found], dtype=np.int64).reshape(-1, 2)
    values = np.array([*found.values()]).reshape(-1, 3)
    return NearDuplicates(
        pairs=pairs,
        cosine=values[:, 0],
        next_cosine=values[:, 1],
        p_value=values[:, 2],
        identical=np.arange(len(pairs)) < len(twins),
        labels=_labels_of(pairs, samples, samples if others is None else others),
        threshold=threshold,
        dimensions=dimensions,
        resolution=rounding,
        tested=len(tested),
        across=others is not None,
    )


@dataclass(frozen=True)
class _Set:
    """Samples as the kernel takes them and as tensors, and their labels."""

    inputs: PyTree
    leaves: PyTree
    labels: np.ndarray | None

    @classmethod
    def of(cls, X: PyTree, labels: Any, name: str) -> _Set:
        inputs = copied_samples(X)
        leaves = as_tensors(inputs, torch.float32)
        check_rows(leaves, "near_duplicates")
        if labels is None:
            return cls(inputs, leaves, None)
        written = as_array(labels, name)
        if written.ndim == 0 or len(written) != count(leaves):
            raise InputError(
                f"`{name}` of shape {written.shape} were given for {count(leaves)} samples",
                "There is one label for each sample, in their order",
                "Pass the labels of these samples, or none",
            )
        # Targets are often columns (N, 1) where labels from a file are (Q,).
        return cls(inputs, leaves, written.reshape(len(written), *(size for size in written.shape[1:] if size != 1)))


def _check_comparable(one: np.ndarray, other: np.ndarray) -> None:
    """Refuse labels that numpy would repeat, or call different whatever they say."""
    numbers = [np.issubdtype(labels.dtype, np.number) or labels.dtype == bool for labels in (one, other)]
    if one.shape[1:] != other.shape[1:] or numbers[0] != numbers[1]:
        raise InputError(
            f"`labels` of shape {one.shape} {one.dtype} and `other_labels` of shape {other.shape} {other.dtype} were "
            "given",
            "Labels of the two samples of each pair are compared, in the same form",
            "Pass both as numbers, or both as names, of the same shape for each sample",
        )


def _check(copies: int, rate: float, dimension: float | None) -> None:
    check_number("copies", copies, positive=True, whole=True, example=3)
    if not (is_number(rate) and 0 < rate < 1):
        raise InputError(
            f"`false_discovery_rate={rate!r}` was given",
            "It is the part of what is found that may be there by chance, between 0 and 1",
            "Write `false_discovery_rate=0.05`",
        )
    if dimension is not None:
        check_number("dimension", dimension, positive=True, example=8.0)


def _labels_of(pairs: np.ndarray, samples: _Set, others: _Set) -> tuple[np.ndarray, np.ndarray] | None:
    if samples.labels is None or others.labels is None:
        return None
    return samples.labels[pairs[:, 0]], others.labels[pairs[:, 1]]
