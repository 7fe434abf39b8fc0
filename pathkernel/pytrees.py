"""Samples as nested tensors: conversion, indexing, and blocks that fit a memory budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError


def as_tensors(tree: PyTree, dtype: torch.dtype) -> PyTree:
    """Tensors for arrays: floating numpy arrays take the model's type, tensors are left as they are."""

    def convert(leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            return leaf.detach()
        array = np.asarray(leaf)
        if array.dtype.kind == "f":
            return torch.as_tensor(array, dtype=dtype)
        if array.dtype.kind in "iub":
            return torch.as_tensor(array.astype(np.int64) if array.dtype.kind != "b" else array)
        raise InputError(
            f"Samples of type {array.dtype} were given",
            "Samples are numbers: floating point, integers or booleans",
            "Encode text as token ids and categories as integers first",
        )

    def is_array_like(node: Any) -> bool:
        # A list of numbers (or of rows of numbers) is one array; a list of tensors is a tree.
        return isinstance(node, list) and not any(isinstance(v, (Tensor, np.ndarray)) for v in node)

    return pytree.tree_map(convert, tree, is_leaf=is_array_like)


def take(tree: PyTree, index: Any) -> PyTree:
    """Index the first axis of every leaf."""
    return pytree.tree_map(lambda leaf: leaf[index], tree)


def spread(n: int, few: int) -> Tensor:
    """Up to a few of the places 0 … n − 1, evenly spread over them."""
    return torch.linspace(0, n - 1, min(n, few)).round().to(torch.int64)


def count(tree: PyTree) -> int:
    """The number of samples along the first axis."""
    return len(pytree.tree_leaves(tree)[0])


def cast_floating(tree: PyTree, dtype: torch.dtype) -> PyTree:
    """Convert the floating leaves; integers (token ids, masks) stay as they are."""
    return pytree.tree_map(lambda leaf: leaf.to(dtype) if torch.is_floating_point(leaf) else leaf, tree)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(n)``."""
    for start in range(0, n, max(1, size)):
        yield slice(start, min(n, start + max(1, size)))


def memory_bytes(memory: int | str) -> int:
    """Bytes of a budget given as a number or as text such as ``"512MB"`` or ``"2 GiB"``."""
    if isinstance(memory, int) and memory > 0:
        return memory
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    text = str(memory).strip().lower()
    for unit, size in units.items():
        if text.endswith(unit):
            try:
                if (budget := int(float(text[: -len(unit)]) * size)) > 0:
                    return budget
            except ValueError:
                pass
            break
    raise InputError(
        f"`memory={memory!r}` was given",
        "It must be a positive number of bytes, or text with one of the units kB, MB, GB, KiB, MiB, GiB",
        'Write for example `memory="512MB"`',
    )
