"""Functions of torch by what they do to a batch, and the tensors among their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _named(*names: str) -> set[Any]:
    """Functions of torch, and methods of tensors, of these names."""
    return {getattr(holder, name) for name in names for holder in (torch, Tensor) if hasattr(holder, name)}


REARRANGING = frozenset(
    _named("argsort", "sort", "msort", "unique", "unique_consecutive", "nonzero", "argwhere", "flip", "roll")
    | _named("randperm")
    | _named("bincount", "bucketize", "searchsorted", "masked_select", "masked_scatter", "index_select", "index_add")
    | _named("index_copy", "index_put", "index_add_", "index_copy_", "index_put_", "take", "repeat_interleave")
    | _named("gather", "take_along_dim", "topk", "scatter", "scatter_add", "scatter_reduce", "scatter_", "scatter_add_")
    | {torch.functional.unique, torch.functional.unique_consecutive}
)
"""Functions that may put samples in another order, or pick some of them, as their values have it."""

GETITEM, SETITEM = Tensor.__getitem__, Tensor.__setitem__


def picks(args: Any) -> bool:
    """Test that an index picks from the first axis by a tensor."""
    index = args[1] if len(args) > 1 else None
    first = index[0] if isinstance(index, tuple) and index else index
    return isinstance(first, Tensor) and first.dim() > 0


def tensors_of(tree: Any) -> list[Tensor]:
    """Tensors in nested tuples, lists and dicts; every call of a pass comes by here, so it is not a generator."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    found: list[Tensor] = []
    for node in tree:
        if isinstance(node, Tensor):
            found.append(node)
        elif isinstance(node, (tuple, list, dict)):
            found += tensors_of(node)
    return found


RANDOM = frozenset(
    _named("dropout", "dropout_", "feature_dropout", "feature_dropout_", "alpha_dropout", "alpha_dropout_")
    | _named("feature_alpha_dropout", "feature_alpha_dropout_")
)
"""Functions of (tensor, probability, mode) that draw random numbers in train mode."""


def draws(function: Any, args: Any) -> bool:
    """Test that a call draws random numbers, so that another one has another result."""
    return function in RANDOM and not (len(args) == 3 and (not args[1] or not args[2]))


def filled(target: Tensor, value: Tensor) -> Tensor:
    """Value that takes the place of all entries of a tensor."""
    return value.to(target).expand_as(target).clone()


def mask_of(index: Any, target: Tensor, value: Tensor) -> Tensor | None:
    """Mask of the entries that a boolean index picks for one value; None for others."""
    if not isinstance(index, Tensor) or index.dtype != torch.bool or index.shape != target.shape[: index.dim()]:
        return None
    if value.dim() > target.dim() - index.dim():  # a value for each entry
        return None
    return index.reshape(*index.shape, *(1,) * (target.dim() - index.dim()))


IN_PLACE = {
    getattr(Tensor, name): function
    for names, function in (
        (("add_", "__iadd__"), torch.add),
        (("sub_", "__isub__"), torch.sub),
        (("mul_", "__imul__"), torch.mul),
        (("div_", "__itruediv__"), torch.div),
    )
    for name in names
} | {Tensor.copy_: filled, Tensor.__setitem__: filled}
"""Functions that write their result on their first argument → the same without."""
