r"""A few nodes of a path that stand for all of them, to a tolerance: a quadrature fitted to the path itself.

The tangent kernel moves fast for a few epochs and slowly after, and mini-batches add noise that averages out. So the
kernels of a small block of samples at every node are taken as vectors :math:`v_s`, and nodes with weights
:math:`\omega \ge 0` are sought one by one such that :math:`\sum_s \omega_s v_s` is :math:`\sum_s w_s v_s`. Samples that
had no part in it say how good the result is.

References
----------
Bruckstein, Elad & Zibulevsky 2008 on non-negative sparse solutions; Chen, Billings & Luo 1989 for orthogonal least
squares, which takes at each turn the vector that lowers the remaining error most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.errors import InputError
from pathkernel.gradients.pytrees import blocks
from pathkernel.path_kernel.nodes import PathNode
from pathkernel.runtime.lazy import imported
from pathkernel.tangent_kernel.measured_error import MeasuredError

SAMPLES = 48
"""To choose nodes by; as many again are held out. More lowers the number of nodes by little."""
ROWS = 160
"""Rows of a probe kernel: fewer samples where each has a large block of its own."""
WINDOW = 512
"""Nodes whose probe kernels are held at once; on longer paths, what was chosen among them goes on to the next."""
WINDOW_BYTES = 2**27
"""Bytes of a window of large probe kernels."""
DEPENDENT = 1e-12
"""Part of a kernel that the chosen ones leave, squared and relative, below which it is rounding."""


def check_tolerance(tolerance: float, also_given: str | None, samples: int) -> None:
    """Refuse a tolerance that no choice of nodes can be held to.

    Parameters
    ----------
    tolerance
        As given.
    also_given
        The argument that a tolerance excludes, where it was given.
    samples
        N.

    Raises
    ------
    InputError
    """
    if also_given is not None:
        raise InputError(
            f"`tolerance={tolerance!r}` was given together with {also_given}",
            "A tolerance chooses the steps itself, and over few steps the errors of random outputs do not average out",
            f"Write `PathKernel(trajectory, tolerance={tolerance!r})`",
        )
    if not isinstance(tolerance, float) or not 0 < tolerance < 1:
        raise InputError(
            f"`tolerance={tolerance!r}` was given",
            "The tolerance is a relative error between 0 and 1",
            "Write for example `PathKernel(trajectory, tolerance=1e-3)`",
        )
    if samples < 2:
        raise InputError(
            f"`tolerance={tolerance!r}` was given for a trajectory with one training sample",
            "Nodes are chosen by some of the training samples, and the error is measured on others",
            "Leave out `tolerance`",
        )


def probe_samples(available: int, components: int) -> tuple[Tensor, Tensor]:
    """Ids of the training samples to choose by, and of those held out: drawn once from a fixed seed.

    Parameters
    ----------
    available
        N.
    components
        Rows of the block that a pair of samples has in the kernel matrix.
    """
    wanted = max(4, min(SAMPLES, ROWS // components))
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(0))[: 2 * wanted]
    return drawn[: (len(drawn) + 1) // 2], drawn[(len(drawn) + 1) // 2 :]


@dataclass
class _Candidates:
    """Nodes and their probe kernels: ``chosen_by`` as vectors (nodes, D), ``held_out`` (nodes, n, n, ...)."""

    nodes: list[PathNode]
    chosen_by: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of(cls, nodes: Sequence[PathNode], gram: Callable[[PathNode], Tensor], split: int) -> _Candidates:
        first, second = [], []
        for node in nodes:
            kernel = gram(node).cpu()
            first.append(as_vector(kernel[:split, :split]))
            second.append(kernel[split:, split:])
        return cls(list(nodes), torch.stack(first).numpy(), torch.stack(second).numpy())

    def and_then(self, later: _Candidates) -> _Candidates:
        return _Candidates(
            self.nodes + later.nodes,
            np.concatenate([self.chosen_by, later.chosen_by]),
            np.concatenate([self.held_out, later.held_out]),
        )

    def only(self, places: Sequence[int]) -> _Candidates:
        return _Candidates([self.nodes[i] for i in places], self.chosen_by[places], self.held_out[places])

    @property
    def weights(self) -> np.ndarray:
        return np.array([node.weight for node in self.nodes])


def select_nodes(
    nodes: Sequence[PathNode], gram: Callable[[PathNode], Tensor], split: int, tolerance: float, entries: int
) -> tuple[list[PathNode], MeasuredError]:
    """Few nodes with new weights whose kernel is that of all nodes, to a relative error.

    Parameters
    ----------
    nodes
        Every node of the path.
    gram
        Kernel of the probe samples at a node.
    split
        How many of them to choose by; the others are held out.
    tolerance
        What the error on the held-out samples and its standard deviation may come to together.
    entries
        Of the probe samples' kernel.

    Returns
    -------
    The nodes, and the error on the held-out samples. All nodes, with an error of zero, where no fewer will do.

    Notes
    -----
    Time: one small kernel for each node of the path.
    """
    target: np.ndarray = np.zeros(())
    exact: np.ndarray = np.zeros(())
    pool: _Candidates | None = None
    window = max(16, min(WINDOW, WINDOW_BYTES // (8 * entries)))
    for block in blocks(len(nodes), window):
        own = _Candidates.of(nodes[block], gram, split)
        target = target + own.weights @ own.chosen_by
        exact = exact + np.tensordot(own.weights, own.held_out, axes=1)
        pool = own if pool is None else pool.and_then(own)
        if block.stop < len(nodes):  # a tighter fit than in the end: what is dropped here is gone
            pool = pool.only(_fitted(pool.chosen_by, target, tolerance / 4))
    assert pool is not None
    against, held_out = f"all {len(nodes)} nodes of the path", pool.held_out

    def measured(places: list[int], weights: np.ndarray) -> MeasuredError:
        return MeasuredError.between(np.tensordot(weights, held_out[places], axes=1), exact, against)

    found = _smallest(pool.chosen_by, target, measured, tolerance, len(nodes))
    if found is None:
        return list(nodes), MeasuredError(0.0, 0.0, exact.shape[0], against, tolerance)
    places, weights, error = found
    chosen = [replace(pool.nodes[i], weight=float(w)) for i, w in sorted(zip(places, weights, strict=True))]
    return chosen, replace(error, aim=tolerance)


Found = tuple[list[int], np.ndarray, MeasuredError]


def _smallest(
    vectors: np.ndarray,
    target: np.ndarray,
    measured: Callable[[list[int], np.ndarray], MeasuredError],
    tolerance: float,
    most: int,
) -> Found | None:
    """Fewer than ``most`` vectors with an error within the tolerance, or None.

    Three times as many are added as would do, and then taken away again: fewer are left than by adding alone.
    """
    best: Found | None = None
    many: list[int] = []
    for places, weights in nonnegative_pursuit(vectors, target):
        many = places
        if best is None and len(places) < most:
            error = measured(places, weights)
            best = (places, weights, error) if error.relative + error.deviation <= tolerance else None
        if best is not None and len(places) >= 3 * len(best[0]):
            break
    if best is None:
        return None
    for places, weights in nonnegative_elimination(vectors, target, many):
        error = measured(places, weights)
        if error.relative + error.deviation <= tolerance and len(places) < len(best[0]):
            best = places, weights, error
        elif error.relative > 2 * tolerance:
            break
    return best


def _fitted(vectors: np.ndarray, target: np.ndarray, tolerance: float) -> list[int]:
    """Places of the vectors that make up the target to a relative error, in their order."""
    places: list[int] = list(range(len(vectors)))
    for chosen, weights in nonnegative_pursuit(vectors, target):
        if np.linalg.norm(target - weights @ vectors[chosen]) <= tolerance * np.linalg.norm(target):
            return sorted(chosen)
    return places


def as_vector(kernel: Float[Tensor, "n n ..."]) -> Float[Tensor, " D"]:
    """A symmetric matrix (or one of blocks) as a vector with the same inner products."""
    n = len(kernel)
    i, j = torch.triu_indices(n, n)
    scale = torch.where(i == j, 1.0, 2**0.5).to(kernel).reshape(-1, *(1,) * (kernel.dim() - 2))
    return (kernel[i, j] * scale).reshape(-1)


def nonnegative_pursuit(
    vectors: Float[np.ndarray, "N D"], target: Float[np.ndarray, " D"]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Ever more vectors with weights ≥ 0 whose sum approaches the target.

    Each turn adds the vector that lowers the error most, fits all weights anew, and drops vectors of weight zero. Ends
    when no vector lowers the error.

    Yields
    ------
    Places of the chosen vectors, and their weights.
    """
    inner, with_target = vectors @ vectors.T, vectors @ target
    squared = inner.diagonal()
    places: list[int] = []
    weights = np.zeros(0)
    basis = _Orthogonal(inner)
    for _ in range(4 * len(vectors)):
        gain = with_target - inner[:, places] @ weights
        score = np.where(basis.rest > DEPENDENT * squared, gain / np.sqrt(np.maximum(basis.rest, 1e-300)), -np.inf)
        score[places] = -np.inf
        best = int(score.argmax())
        if not score[best] > 1e-12 * np.sqrt(target @ target):
            return
        try:
            kept, weights = _nonnegative_weights(inner, with_target, [*places, best])
        except np.linalg.LinAlgError:  # dependent to rounding: no more can be told apart
            return
        if len(kept) > len(places):
            basis.add(best)
        else:
            basis = _Orthogonal(inner, kept)
        places = kept
        yield places, weights


def nonnegative_elimination(
    vectors: Float[np.ndarray, "N D"], target: Float[np.ndarray, " D"], places: Sequence[int]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Ever fewer vectors: each turn drops the one that raises the error least, and fits all weights anew.

    Yields
    ------
    Places of the vectors that are left, and their weights.
    """
    inner, with_target = vectors @ vectors.T, vectors @ target
    left, weights = _nonnegative_weights(inner, with_target, places)
    while len(left) > 1:
        # Taking vector i out of least squares adds ω_i² / (C⁻¹)_ii to the squared error.
        raised = weights**2 / np.linalg.inv(inner[np.ix_(left, left)]).diagonal()
        left, weights = _nonnegative_weights(inner, with_target, np.delete(left, int(raised.argmin())))
        yield left, weights


def _nonnegative_weights(
    inner: np.ndarray, with_target: np.ndarray, places: Sequence[int] | np.ndarray
) -> tuple[list[int], np.ndarray]:
    """Least squares with weights ≥ 0 from inner products: the places with positive weights, and these."""
    linalg, optimize = imported("scipy.linalg"), imported("scipy.optimize")  # kernels of all nodes need neither
    chosen = np.asarray(places, dtype=int)
    factor = linalg.cholesky(inner[np.ix_(chosen, chosen)], lower=True)
    weights = linalg.cho_solve((factor, True), with_target[chosen])
    if weights.min() <= 0:
        weights = optimize.nnls(factor.T, linalg.solve_triangular(factor, with_target[chosen], lower=True))[0]
    return chosen[weights > 0].tolist(), weights[weights > 0]


class _Orthogonal:
    """Remainder of all vectors after projection on the chosen ones, by Gram–Schmidt in the matrix of inner products."""

    def __init__(self, inner: np.ndarray, places: Sequence[int] = ()) -> None:
        self.inner = inner
        self.rest = inner.diagonal().copy()
        self.columns = np.empty((0, len(inner)))
        for place in places:
            self.add(place)

    def add(self, place: int) -> None:
        """Take the direction of a further vector out of all."""
        column = self.inner[place] - self.columns[:, place] @ self.columns
        column /= np.sqrt(max(self.rest[place], 1e-300))
        self.columns = np.vstack([self.columns, column])
        self.rest = np.maximum(self.rest - column**2, 0.0)
