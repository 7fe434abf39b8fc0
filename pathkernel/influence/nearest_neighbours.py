"""Nearest neighbours under a kernel, and which of them stand apart from all others.

The formulas are those of `pathkernel.influence.duplicates.near_duplicates`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm.auto import tqdm

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.pytrees import blocks, copied_samples, count, spread, take
from pathkernel.kernels.cosine import inverse_norms
from pathkernel.kernels.kernel import KernelFunction, kernel_diagonal, kernel_matrix

MATRICES = 4
"""Arrays of the size of a block of the kernel matrix that are held at once."""

PROBES = 16
"""Samples whose cosine with themselves says how far a kernel's cosines are rounded."""

MARGIN = 4
"""Rounding of cosines of different samples, in units of the largest that is seen of samples with themselves."""


def resolution(kernel: KernelFunction, samples: PyTree) -> float:
    """How far from 1 rounding takes a cosine that is 1."""
    few = take(samples, spread(count(samples), PROBES).numpy())
    inverse = inverse_norms(kernel_diagonal(kernel, few))
    own = kernel_matrix(kernel, few, copied_samples(few)).diagonal() * inverse**2
    return max(MARGIN * float(np.abs(own - (inverse > 0)).max()), float(np.finfo(np.float64).eps))


def nearest(
    kernel: KernelFunction, references: PyTree, rows: PyTree | None, k: int, memory: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (n, k) of the k nearest references of each row, and their places (n, k); None for the references."""
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for matrix in _cosines(kernel, references, rows, memory, progress):
        if np.isnan(matrix).any():
            raise InputError(
                "The kernel has values that are not finite",
                "Distances of samples are compared, which are finite",
                "Look for samples with NaN or infinite entries, and for parameters that diverged",
            )
        part = np.argpartition(-matrix, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(matrix, part, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        kept.append((np.take_along_axis(values, order, axis=1), np.take_along_axis(part, order, axis=1)))
    if not kept:
        return np.empty((0, k)), np.empty((0, k), dtype=np.int64)
    cosine, places = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    return cosine, places


def _cosines(
    kernel: KernelFunction, references: PyTree, rows: PyTree | None, memory: int, progress: bool
) -> Iterator[np.ndarray]:
    """Blocks of rows of the matrix of cosines; those of a sample with itself are −∞."""
    m, n = count(references), count(references if rows is None else rows)
    size = max(1, memory // (8 * MATRICES * m))
    if rows is None and n <= size:
        matrix = kernel_matrix(kernel, references)
        inverse = inverse_norms(matrix.diagonal())
        np.fill_diagonal(matrix := matrix * inverse[:, None] * inverse[None, :], -np.inf)
        yield matrix
        return
    columns = inverse_norms(kernel_diagonal(kernel, references))
    own = columns if rows is None else inverse_norms(kernel_diagonal(kernel, rows)) if n else np.zeros(0)
    cuts = list(blocks(n, size))
    for block in tqdm(cuts, desc="near-duplicates", unit="block", disable=not progress):
        part = take(references if rows is None else rows, block)
        matrix = kernel_matrix(kernel, part, references) * own[block, None] * columns[None, :]
        if rows is None:
            matrix[np.arange(len(matrix)), np.arange(n)[block]] = -np.inf
        yield matrix


def separation(
    cosine: np.ndarray, rounding: float, dimension: float | None, kernel: KernelFunction
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """ln p (n,) of the widest gap of every row, after how many neighbours (n,) it comes, and the dimensions."""
    n, c = len(cosine), cosine.shape[1] - 1
    if not n:
        return np.zeros(0), np.zeros(0, dtype=np.int64), () if dimension is None else (float(dimension),) * c
    log_r = 0.5 * np.log(np.maximum(2.0 - 2.0 * cosine, 2.0 * rounding))
    gaps, k = np.diff(log_r, axis=1), np.arange(1, c + 1)
    if dimension is None:
        medians = np.median(gaps, axis=0)
        if not (medians > 0).all():
            raise InputError(
                f"Under a kernel of type {type(kernel).__name__} more than half of {n} samples have neighbours at one "
                f"distance, to its rounding of {rounding:.0e}",
                "It tells most samples apart",
                "Pass another kernel or `dtype=torch.float64` to it, or `dimension=` where ties belong to the data",
            )
        estimates = np.log(2.0) / (k * medians)
        dimensions = np.maximum.accumulate(estimates[::-1])[::-1]  # duplicates only lower those of the first gaps
    else:
        dimensions = np.full(c, float(dimension))
    log_p = -dimensions * gaps
    return np.minimum(0.0, np.log(c) + log_p.min(axis=1)), log_p.argmin(axis=1) + 1, tuple(map(float, dimensions))


def agreed(log_p: np.ndarray, sizes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """ln p (n,) of groups of a sample and its nearest that all their samples see alike: the largest; 0 for others."""
    nearer = np.arange(places.shape[1]) < sizes[:, None]
    groups = np.column_stack([np.arange(len(places)), np.where(nearer, places, -1)])
    _, of, members = np.unique(np.sort(groups, axis=1), axis=0, return_inverse=True, return_counts=True)
    of = of.reshape(-1)  # numpy 2.0 gives it another axis
    largest = np.full(len(members), -np.inf)
    np.maximum.at(largest, of, log_p)
    return np.where(members[of] == sizes + 1, largest[of], 0.0)


def discoveries(log_p: np.ndarray, rate: float) -> tuple[np.ndarray, float]:
    """Places that pass the procedure of Benjamini and Hochberg, and the largest p among them."""
    n, ordered = len(log_p), np.sort(log_p)
    passing = np.flatnonzero(ordered <= np.log(rate * np.arange(1, n + 1) / max(1, n)))
    if not len(passing):
        return np.empty(0, dtype=np.int64), 0.0
    largest = ordered[passing[-1]]
    return np.flatnonzero(log_p <= largest), float(np.exp(largest))
