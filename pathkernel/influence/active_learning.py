r"""Which samples to label next: candidates without labels, ranked from one recorded run on those that have some.

A candidate that the network is sure of teaches it nothing, and neither does one like those that have just been chosen.
Experimental design on gradients weighs both: how long the gradient of a candidate's loss would be, and how much of it,
and of those of all other candidates, is told by the samples that are labelled already or chosen before it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, check_choice, check_number
from pathkernel.gradients.pytrees import count as count_of
from pathkernel.gradients.pytrees import take
from pathkernel.influence.subset_selection import conditional_covariance, greedy_design
from pathkernel.kernel_machine.classification import classes_of, is_classifier, probabilities
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.trajectory.required import required_path
from pathkernel.trajectory.trajectory import Trajectory

NODES = 10
"""Points of the path at which gradients are taken."""

BLOCK = 2000
"""Labelled samples, and candidates, that are compared with each other."""

GREEDY = {"experimental_design": ("loss", "total variance", 0.01), "variance": ("trace", "own variance", 0.1)}
"""Outputs of the kernel, criterion, and μ as a multiple of the mean of K_ii."""


def _margin(p: Tensor) -> Tensor:
    """Minus the difference of the two largest probabilities."""
    largest = p.topk(2, dim=1).values
    return largest[:, 1] - largest[:, 0]


UNCERTAINTY: dict[str, Callable[[Tensor], Tensor]] = {
    "margin": _margin,
    "entropy": lambda p: -torch.special.xlogy(p, p).sum(dim=1),
}
"""Scores of single candidates from their probabilities (M, C), large where the network is not sure."""

CRITERIA = (*GREEDY, *UNCERTAINTY)
"""How candidates are chosen."""


@dataclass(frozen=True)
class Acquisition:
    """The candidates that are labelled next.

    Attributes
    ----------
    ids
        (count,) rows of the candidates that were chosen, the first to label first.
    score
        (M,) what each candidate is worth by itself: of ``"margin"``, minus the difference of its two largest
        probabilities; of ``"entropy"``, their entropy; otherwise K(x, x), the squared length of its gradient averaged
        along the path, whatever is labelled already.
    predictions
        Classes (M,), or outputs (M, C), of the network at the end of the run.
    criterion
        How they were chosen.
    """

    ids: np.ndarray
    score: np.ndarray
    predictions: np.ndarray
    criterion: str

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.ids[:5]))
        return (
            f"Acquisition({len(self.ids)} of {len(self.score)} candidates, by {self.criterion!r}: {first}"
            f"{' …' if len(self.ids) > 5 else ''})"
        )


def label_next(
    trajectory: Trajectory,
    candidates: PyTree,
    count: int = 20,
    *,
    criterion: str | None = None,
    nodes: int = NODES,
    block: int = BLOCK,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    memory: int | str = "1GB",
    progress: bool = False,
) -> Acquisition:
    r"""Candidates to label next, so that training again with their labels gains most.

    .. math:: \min_{|S| = \mathrm{count}} \sum_i \bigl[K_{ii} - K_{iA} (K_{AA} + \mu I)^{-1} K_{Ai}\bigr], \qquad
              A = \text{labelled} \cup S

    over the candidates i, taken greedily.

    Parameters
    ----------
    trajectory
        The recorded path of a run on the samples that are labelled, thinned or whole.
    candidates
        M samples without labels, as inputs of the training data.
    count
        How many of them are chosen, from 1 to M.
    criterion
        ``"experimental_design"``, the default for classifiers: the minimum above with the loss path kernel K, the inner
        products of the gradients of the losses averaged along the path, where a candidate's label is taken to be what
        the network says at the end. ``"variance"``, the default for all other networks: K of the outputs, and always
        the candidate with the largest variance K_ii − … of a Gaussian process, given those before it; no label is
        needed. ``"margin"`` and ``"entropy"``: those about which a classifier is least sure, each for itself.
    nodes
        At how many points of the path gradients are taken.
    block
        How many samples are compared with each other, of the labelled ones (at random, where there are more), and of
        the candidates (those with the longest gradients).
    seed
        Of that choice among the labelled samples.
    store
        A folder in which the kernel matrix of the first two criteria is kept: the same call goes on from there after an
        interruption.
    memory
        Budget for what is held at once beside the matrix, as bytes or text.
    progress
        Show a progress bar.

    Returns
    -------
    Acquisition

    Raises
    ------
    InputError
        For other numbers and criteria, candidates of another form than the training samples, and a criterion for
        classifiers where the training targets are no classes.

    Notes
    -----
    ``benchmarks/active_learning.py`` compares the criteria. Where few samples are added at a time, ``"margin"`` costs a
    forward pass and is often as good; it chooses every copy of a candidate that comes several times.

    Time O((N + M)² · nodes · P) for the kernel, whose matrix takes (N + M)² numbers, N and M at most ``block``; then
    O(M² · count).

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X, y = torch.randn(30, 4), torch.randint(3, (30,))
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> optimizer, loss = torch.optim.Adam(model.parameters(), lr=0.05), torch.nn.CrossEntropyLoss()
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for epoch in range(3):
    ...         for x, target in recorder.batches(batch_size=10):
    ...             optimizer.zero_grad()
    ...             loss(model(x), target).backward()
    ...             optimizer.step()
    >>> unlabelled = torch.randn(100, 4)
    >>> pk.influence.label_next(recorder.trajectory, unlabelled, count=5).ids.shape
    (5,)

    References
    ----------
    Yu, Bi and Tresp 2006, "Active learning via transductive experimental design"; gradients under the network's own
    labels: Ash et al. 2020 (1906.03671), BADGE; the same criterion with Fisher information: Ash et al. 2021
    (2106.09675), BAIT; variances of a Gaussian process with a tangent kernel: Holzmüller et al. 2023 (2203.09410).
    Scheffer, Decomain and Wrobel 2001 for margins.
    """
    check_number("count", count, positive=True, whole=True, example=20)
    check_number("nodes", nodes, positive=True, whole=True, example=NODES)
    check_number("block", block, positive=True, whole=True, example=BLOCK)
    check_number("seed", seed, whole=True, example=0)
    if criterion is not None:
        check_choice("criterion", criterion, CRITERIA, "Criteria")
    required_path(trajectory, "PathKernel")
    classifier = is_classifier(trajectory)
    if criterion is None:
        criterion = "experimental_design" if classifier else "variance"
    if criterion != "variance" and not classifier:
        raise InputError(
            f"`criterion={criterion!r}` was given for a network whose training targets are no classes",
            "It asks which class a candidate may be of",
            'Write `criterion="variance"`',
        )
    inputs = trajectory.queries(candidates, "label_next")
    m = count_of(inputs)
    if count > m:
        raise InputError(
            f"`count={count!r}` was given for {m} candidates",
            "So many of them are chosen, each once",
            f"Write `count={m}`" if m else "Pass the samples that may be labelled as `candidates`",
        )
    z = trajectory.function().with_(constants=trajectory.final_buffers).outputs(trajectory.final, inputs)
    predictions = classes_of(z) if classifier else z
    if criterion in UNCERTAINTY:
        p = probabilities(trajectory.objective.function("`label_next`"), z)
        score = UNCERTAINTY[criterion](p).double().cpu().numpy()
        ids = np.argsort(-score, kind="stable")[: int(count)]
        return Acquisition(ids, score, predictions.cpu().numpy(), criterion)
    outputs, gain, noise = GREEDY[criterion]
    kernel = PathKernel(
        trajectory,
        outputs=outputs,
        measure="uniform",
        quadrature="left",
        steps=int(nodes),
        memory=memory,
        progress=progress,
        leak="allow",  # nobody is judged by these labels
    )
    with_targets = outputs == "loss"
    labelled = _labelled(trajectory, int(block), int(seed), with_targets)
    unlabelled = (inputs, _as_targets(trajectory, predictions)) if with_targets else inputs
    score = kernel.diagonal(unlabelled)
    looked_at = np.sort(np.argsort(-score, kind="stable")[: max(int(block), int(count))])
    K = kernel(_joined(labelled, take(unlabelled, torch.from_numpy(looked_at))), store=store)
    mu = noise * max(float(K.diagonal().mean()), np.finfo(float).tiny)
    left = conditional_covariance(K, count_of(labelled), mu)
    chosen, _ = greedy_design(left, int(count), mu, gain)
    return Acquisition(looked_at[chosen], score, predictions.cpu().numpy(), criterion)


def _labelled(trajectory: Trajectory, block: int, seed: int, with_targets: bool) -> PyTree:
    """The training samples that are compared with candidates: all, or some at random."""
    n = len(trajectory.data)
    ids = np.arange(n) if n <= block else np.sort(np.random.default_rng(seed).permutation(n)[:block])
    X, y = trajectory.data[torch.from_numpy(ids)]
    return (X, y) if with_targets else X


def _as_targets(trajectory: Trajectory, classes: Tensor) -> PyTree:
    """Classes (M,) as targets of the form that the training samples have."""
    (_, example) = trajectory.data[torch.zeros(1, dtype=torch.int64)]
    leaves, form = pytree.tree_flatten(example)
    if len(leaves) != 1 or leaves[0].numel() != 1:
        shapes = " and ".join(str(tuple(leaf.shape[1:])) for leaf in leaves)
        raise InputError(
            f"The targets of a training sample have the shape {shapes}",
            "A candidate is taken to be of one class, as a number",
            'Write `criterion="variance"`, which needs no labels',
        )
    (leaf,) = leaves
    return pytree.tree_unflatten([classes.to(leaf).reshape(-1, *leaf.shape[1:])], form)


def _joined(one: PyTree, other: PyTree) -> PyTree:
    """Samples after others of the same form."""
    return pytree.tree_map(lambda a, b: torch.cat([a, b.to(a)]), one, other)
