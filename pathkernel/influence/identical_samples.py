"""Samples that are the same numbers: found by hash, and compared."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.gradients.pytrees import blocks, take
from pathkernel.path_kernel.label_leak import row_hashes

ROWS = 1024
"""Pairs that are compared at once."""


def first_identical(samples: PyTree) -> np.ndarray:
    """(n,) the first sample with the same numbers, which is the sample itself where there is none before it."""
    firsts: dict[int, int] = {}
    found = np.array([firsts.setdefault(code, i) for i, code in enumerate(row_hashes(samples).tolist())], np.int64)
    later = np.flatnonzero(found != np.arange(len(found)))
    different = later[~same_rows(samples, found[later], samples, later)]
    found[different] = different
    return found


def first_identical_of(samples: PyTree, others: PyTree) -> np.ndarray:
    """(Q,) the first of n samples with the same numbers as each of the others; −1 where there is none."""
    firsts: dict[int, int] = {}
    for i, code in enumerate(row_hashes(samples).tolist()):
        firsts.setdefault(code, i)
    found = np.array([firsts.get(code, -1) for code in row_hashes(others).tolist()], np.int64)
    hit = np.flatnonzero(found >= 0)
    found[hit[~same_rows(samples, found[hit], others, hit)]] = -1
    return found


def same_rows(one: PyTree, at: np.ndarray, other: PyTree, there: np.ndarray) -> np.ndarray:
    """(n,) True where rows hold the same numbers, to single precision: two hashes may agree by chance."""
    equal = np.ones(len(at), dtype=bool)
    for block in blocks(len(at), ROWS):
        leaves, others = (
            pytree.tree_leaves(take(tree, torch.from_numpy(ids[block]))) for tree, ids in ((one, at), (other, there))
        )
        alike = [a.shape == b.shape for a, b in zip(leaves, others, strict=False)]
        if len(leaves) != len(others) or not all(alike):
            equal[block] = False
            continue
        for a, b in zip(leaves, others, strict=True):
            equal[block] &= (_single(a) == _single(b)).reshape(len(a), -1).all(dim=1).numpy()
    return equal


def _single(leaf: torch.Tensor) -> torch.Tensor:
    leaf = leaf.detach().cpu()
    return leaf.float() if leaf.is_floating_point() else leaf
