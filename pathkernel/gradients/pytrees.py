"""Samples as nested tensors: conversion, indexing, and blocks that fit a memory budget."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.runtime.transfers import sent


def _is_array_like(node: Any) -> bool:
    # A list of numbers (or of rows of numbers) is one array; a list of tensors or arrays is a tree.
    return isinstance(node, list) and not any(isinstance(v, (Tensor, np.ndarray)) for v in node)


def as_tensors(tree: PyTree, dtype: torch.dtype) -> PyTree:
    """Tensors for arrays: floating numpy arrays take the model's type, tensors are left as they are.

    They may share memory with what was given, and are not written to.

    Raises
    ------
    InputError
        For what holds no numbers, leaves some of them out, or is sparse.
    """
    return pytree.tree_map(lambda leaf: _as_tensor(leaf, dtype), tree, is_leaf=_is_array_like)


def _as_tensor(leaf: Any, dtype: torch.dtype) -> Tensor:
    dense = "to_dense" if isinstance(leaf, Tensor) else "toarray"
    if leaf.layout != torch.strided if isinstance(leaf, Tensor) else hasattr(leaf, dense):
        raise InputError(
            f"Samples came as a sparse {type(leaf).__name__} of shape {tuple(leaf.shape)}",
            "Networks take dense arrays",
            f"Write `X.{dense}()` in place of X",
        )
    if isinstance(leaf, Tensor):
        if leaf.is_complex():
            raise _no_numbers(leaf.dtype)
        return leaf.detach()
    if np.ma.is_masked(leaf):
        raise InputError(
            "Samples came as a masked array with entries that are masked",
            "A network takes every entry",
            "Write `X.filled(value)` with a value for what is missing",
        )
    array = _as_array(leaf)
    if array.dtype.kind == "f":
        wide = array.dtype.itemsize > 8  # torch has no type for it
        return _shared(array.astype(np.float64) if wide else array, leaf).to(dtype)
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    if array.dtype.kind == "b":
        return _shared(array, leaf)
    raise _no_numbers(array.dtype)


def _as_array(leaf: Any) -> np.ndarray:
    try:
        array = np.asarray(leaf)
        if array.dtype == object and _has_columns_of_numbers(leaf):
            return leaf.to_numpy(dtype=np.float64, na_value=np.nan)
        return array
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"Samples came as a {type(leaf).__name__} that is no array ({error})",
            "Samples are rows of the same length",
            "Pass an array or a tensor with one row for each sample",
        ) from None


def _has_columns_of_numbers(leaf: Any) -> bool:
    """Test for a table of pandas with columns of different types, or of types that may be missing."""
    types = getattr(leaf, "dtypes", ())
    kinds = [getattr(each, "kind", "") for each in (types if hasattr(types, "__iter__") else [types])]
    return bool(kinds) and set(kinds) <= set("fiub")


def _no_numbers(dtype: Any) -> InputError:
    return InputError(
        f"Samples of type {dtype} were given",
        "Samples are numbers: floating point, integers or booleans",
        "Encode text as token ids and categories as integers first; write `X.astype(float)` for numbers in an array of "
        "objects",
    )


def _shared(array: np.ndarray, leaf: Any) -> Tensor:
    """A tensor of the same numbers, in the same memory where torch can use it as it is."""
    uneven = any(stride < 0 or stride % array.itemsize for stride in array.strides)  # a reversed view, or a field
    if uneven or not array.dtype.isnative:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    if array.flags.writeable:
        return torch.from_numpy(array)
    if not isinstance(leaf, np.memmap):
        return torch.from_numpy(array.copy())
    with warnings.catch_warnings():  # a file larger than memory is not copied; nobody here writes to it
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        return torch.from_numpy(array)


def copied_samples(tree: PyTree) -> PyTree:
    """Samples that stay what they are when the arrays that they came in are filled anew."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        return leaf if leaf is None else np.array(_as_array(leaf))

    return pytree.tree_map(copied, tree, is_leaf=_is_array_like)


def same_samples(one: PyTree, other: PyTree) -> bool:
    """Test that two sets of samples hold the same numbers of the same types."""
    (leaves, tree), (others, other_tree) = (pytree.tree_flatten(t, is_leaf=_is_array_like) for t in (one, other))
    return tree == other_tree and all(map(_same, leaves, others))


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        alike = isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype
        return alike and one.device == other.device and torch.equal(one, other)
    one, other = _as_array(one), _as_array(other)
    return one.dtype == other.dtype and np.array_equal(one, other)


def check_rows(inputs: PyTree, asker: str) -> None:
    """Refuse tensors that do not have the same number of samples along their first axis."""
    leaves = pytree.tree_leaves(inputs)
    if not leaves or not all(leaf.dim() for leaf in leaves) or len({len(leaf) for leaf in leaves}) > 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or "none"
        raise InputError(
            f"`{asker}` was given arrays of shape {shapes}",
            "Every array has one row for each sample along its first axis, and all have as many",
            "Write `X[None]` for a single sample",
        )


def take(tree: PyTree, index: Any) -> PyTree:
    """Index the first axis of every leaf, wherever the index is."""
    if isinstance(tree, Tensor):  # most are, and torch's own way through a tree takes longer than the samples
        return tree[sent(index, tree.device) if isinstance(index, Tensor) else index]
    if isinstance(index, Tensor):
        return pytree.tree_map(lambda leaf: leaf[sent(index, leaf.device)], tree)
    return pytree.tree_map(lambda leaf: leaf[index], tree)


def spread(n: int, few: int) -> Tensor:
    """Up to a few of the places 0 … n − 1, evenly spread over them."""
    return torch.linspace(0, n - 1, min(n, few)).round().to(torch.int64)


def alike(one: PyTree, other: PyTree) -> bool:
    """Test that samples have the same structure, and each the same shape, type and device."""
    leaves, tree = pytree.tree_flatten(one)
    others, same = pytree.tree_flatten(other)
    kinds = [[(leaf.shape[1:], leaf.dtype, leaf.device) for leaf in own] for own in (leaves, others)]
    return bool(tree == same and kinds[0] == kinds[1])


def joined_samples(one: PyTree, other: PyTree) -> PyTree:
    """The samples of both, which are `alike`."""
    return pytree.tree_map(lambda *leaves: torch.cat(leaves), one, other)


def count(tree: PyTree) -> int:
    """The number of samples along the first axis."""
    return len(pytree.tree_leaves(tree)[0])


def cast_floating(tree: PyTree, dtype: torch.dtype, device: torch.device | None = None) -> PyTree:
    """Convert the floating leaves, and move all to a device; integers (token ids, masks) keep their type."""

    def cast(leaf: Tensor) -> Tensor:
        own = leaf.to(dtype) if torch.is_floating_point(leaf) else leaf
        return own if device is None else sent(own, device)

    return pytree.tree_map(cast, tree)


def moved(tree: PyTree, device: torch.device) -> PyTree:
    """The tensors of a tree on a device; the tree itself where they are there."""
    if all(leaf.device == device for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)):
        return tree
    return pytree.tree_map(lambda leaf: sent(leaf, device) if isinstance(leaf, Tensor) else leaf, tree)


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
