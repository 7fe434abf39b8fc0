r"""Which training samples can be left out with least loss, from one recorded run.

What a sample teaches a network is the gradient of its loss, along the path, and what training follows is the mean of
these. A few samples with nearly the same mean gradient teach nearly the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathkernel.errors import InputError, check_choice, check_number, is_number, is_whole
from pathkernel.influence.labels import LabelQuality, label_quality
from pathkernel.influence.subset_selection import herding, normalised
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.trajectory.required import required_path
from pathkernel.trajectory.trajectory import Trajectory

NODES = 10
"""Points of the path at which gradients are taken."""

BLOCK = 2000
"""Samples that are compared with each other; a training set of more is divided at random."""

SCORES: dict[str, Callable[[LabelQuality], np.ndarray]] = {
    "self_influence": lambda quality: quality.self_influence,
    "area_under_margin": lambda quality: -quality.area_under_margin,
    "final_loss": lambda quality: quality.final_loss,
}
"""Criteria that keep the samples with the largest scores, each judged by itself."""

CRITERIA = ("gradient_herding", *SCORES)
"""How the samples that are kept are chosen."""


@dataclass(frozen=True)
class Coreset:
    """The training samples that are kept of a recorded run, and those that are left out.

    Attributes
    ----------
    ids
        (k,) ids of the samples that are kept, in the order in which they were chosen. For fewer, choose anew: how
        gradients are weighed depends on k.
    left_out
        (N − k,) the other ids, those that are least missed first.
    criterion
        How they were chosen.
    """

    ids: np.ndarray
    left_out: np.ndarray
    criterion: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def weights(self) -> np.ndarray:
        """(N,) 1 for the samples that are kept and 0 for the others, as `pathkernel.Trajectory.retrain` takes them."""
        weights = np.zeros(len(self.ids) + len(self.left_out))
        weights[self.ids] = 1.0
        return weights

    def __repr__(self) -> str:
        n = len(self.ids) + len(self.left_out)
        return f"Coreset({len(self.ids)} of {n} training samples, by {self.criterion!r})"


def prune(
    trajectory: Trajectory,
    keep: float = 0.5,
    *,
    criterion: str = "gradient_herding",
    nodes: int = NODES,
    block: int = BLOCK,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    memory: int | str = "1GB",
    progress: bool = False,
) -> Coreset:
    r"""Training samples to keep, of a recorded run, so that training again on them alone loses least.

    .. math:: \min_{|S| = k} \Bigl\lVert \frac1N \sum_i \hat g_i - \frac1k \sum_{i \in S} \hat g_i \Bigr\rVert^2,
              \qquad \hat g_i \cdot \hat g_j = \frac{K_{ij}}{\sqrt{(K_{ii} + c)(K_{jj} + c)}},
              \quad c = 10^{5 k / N - 2}\, \overline{K_{ii}}

    with the loss path kernel K: inner products of the gradients of the samples' losses, averaged along the path.

    Parameters
    ----------
    trajectory
        The recorded path, thinned or whole.
    keep
        The part of the training samples that is kept, a number between 0 and 1, or how many, a whole one.
    criterion
        ``"gradient_herding"`` (default): the minimum above, sought by kernel herding. Or the samples with the largest
        ``"self_influence"``, the smallest ``"area_under_margin"`` or the largest ``"final_loss"``, as
        `pathkernel.label_quality` has them: each for itself, the hardest are kept.
    nodes
        At how many points of the path gradients are taken.
    block
        How many samples are compared with each other: more training samples than that are divided into parts at random,
        each of which is pruned alone.
    seed
        Of that division.
    store
        A folder in which the kernel matrices of ``"gradient_herding"`` are kept: the same call goes on from there after
        an interruption.
    memory
        Budget for what is held at once beside the matrix of a part, as bytes or text.
    progress
        Show a progress bar.

    Returns
    -------
    Coreset

    Raises
    ------
    InputError
        For other numbers and criteria, and where there is no loss, or are no targets, to take gradients of.

    Notes
    -----
    A sample that the network finds hard has a long gradient. Where most samples are kept, the hard ones must not be
    missing, and lengths are left nearly as they are (c far above the mean of K_ii); where few are kept, a network
    trained on hard samples alone does not find what is common, and gradients are brought to nearly the same length (c
    far below it): what Sorscher et al. found of scores of single samples, as one formula. It was chosen on other data
    than those on which `benchmarks/pruning.py` judges it, which ``--choose`` prints.

    A wrong label is hard to learn, and a score of single samples keeps it before all others; herding less so. Look at
    `pathkernel.label_quality` first.

    Time O(N · block · nodes · P) for the kernel, whose matrix takes block² numbers, twice.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X, y = torch.randn(60, 4), torch.randint(3, (60,))
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> optimizer, loss = torch.optim.Adam(model.parameters(), lr=0.05), torch.nn.CrossEntropyLoss()
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for epoch in range(3):
    ...         for x, target in recorder.batches(batch_size=10):
    ...             optimizer.zero_grad()
    ...             loss(model(x), target).backward()
    ...             optimizer.step()
    >>> kept = pk.influence.prune(recorder.trajectory, keep=0.4)
    >>> X[kept.ids].shape, len(kept.left_out)
    (torch.Size([24, 4]), 36)

    References
    ----------
    Chen, Welling and Smola 2010 (1203.3472) for herding; matching the gradient of all samples by that of a few:
    Mirzasoleiman, Bilmes and Leskovec 2020 (1906.01827), Killamsetty et al. 2021 (2103.00123). Paul, Ganguli and
    Dziugaite 2021 (2107.07075) for the length of single gradients, of whose square ``"self_influence"`` is the average
    along the path; Sorscher et al. 2022 (2206.14486).
    """
    check_choice("criterion", criterion, CRITERIA, "Criteria")
    check_number("nodes", nodes, positive=True, whole=True, example=NODES)
    check_number("block", block, positive=True, whole=True, example=BLOCK)
    check_number("seed", seed, whole=True, example=0)
    required_path(trajectory, "PathKernel")
    n = len(trajectory.data)
    k = _count(keep, n)
    if criterion == "gradient_herding":
        kernel = PathKernel(
            trajectory,
            outputs="loss",
            measure="uniform",
            quadrature="left",
            steps=int(nodes),
            memory=memory,
            progress=progress,
            leak="allow",  # part of the samples is no fold here
        )
        return _by_herding(kernel, n, k, int(block), int(seed), store)
    quality = label_quality(trajectory, nodes=int(nodes), memory=memory, progress=progress)
    order = np.argsort(-SCORES[criterion](quality), kind="stable")
    return Coreset(order[:k], order[k:][::-1], criterion)


def _by_herding(
    kernel: PathKernel, n: int, k: int, block: int, seed: int, store: str | os.PathLike[str] | None
) -> Coreset:
    """Choose within each part, and put the parts together by the place that a sample has in its own."""
    parts = _parts(n, block, seed)
    ids, places, score = [], [], np.empty(n)
    for number, (part, count) in enumerate(zip(parts, _counts(k, [len(part) for part in parts]), strict=True)):
        samples = kernel.trajectory.data[torch.from_numpy(part)]
        K = kernel(samples, store=None if store is None else Path(store) / f"part-{number}")
        chosen, score[part] = herding(normalised(K, floor(k / n)), count)
        ids.append(part[chosen])
        places.append((np.arange(count) + 0.5) / max(1, count))
    kept = np.concatenate(ids)[np.argsort(np.concatenate(places), kind="stable")]
    others = np.setdiff1d(np.arange(n), kept)
    return Coreset(kept, others[np.argsort(score[others], kind="stable")], "gradient_herding")


def floor(kept: float) -> float:
    """c as a multiple of the mean of K_ii, where that part of the samples is kept."""
    return float(10 ** (5 * kept - 2))


def _parts(n: int, block: int, seed: int) -> list[np.ndarray]:
    """Ids in as few parts of nearly one size as hold at most ``block``: all in order, or divided at random."""
    count = -(-n // block)
    ids = np.arange(n) if count == 1 else np.random.default_rng(seed).permutation(n)
    return np.array_split(ids, count)


def _counts(k: int, sizes: list[int]) -> list[int]:
    """How many of the k samples come from each part: in proportion, to one."""
    edges = np.cumsum([0, *sizes]) * k / sum(sizes)
    return [int(count) for count in np.diff(np.floor(edges + 1e-9).astype(int))]


def _count(keep: Any, n: int) -> int:
    """How many samples are kept."""
    if is_whole(keep) and 1 <= keep <= n:
        return int(keep)
    if is_number(keep) and 0 < keep < 1:
        return max(1, round(float(keep) * n))
    raise InputError(
        f"`keep={keep!r}` was given for {n} training samples",
        f"It is the part that is kept, between 0 and 1, or how many, a whole number from 1 to {n}",
        "Write `keep=0.5`",
    )
