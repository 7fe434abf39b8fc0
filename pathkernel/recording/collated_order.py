"""In which order a collate function laid the samples of a batch, which may sort them, by length for example."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel.errors import SampleIdError
from pathkernel.recording.row_order import numbers_of, occurrences, with_samples_first
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.runtime.threads import on_the_cpu


def collated_order(items: Sequence[Any], left: Sequence[Any], batch: Any) -> Tensor | None:
    """Places among the items of the samples of a batch.

    A sample is known by what of its item stands in its row, padded or not; and, where nothing does, by the list that
    the function was given and may have sorted.

    Parameters
    ----------
    items
        As the dataset gave them.
    left
        The list of them that the collate function was given, as it left it.
    batch
        What the collate function made of them.

    Returns
    -------
    (n,) int64; None where samples are in the order of their items, as far as can be told.

    Raises
    ------
    SampleIdError
        Where they are not, and it cannot be told which is which.
    """
    n = len(items)
    fits = _fits(items, batch)
    moved = _as_left(items, left)
    if moved is not None and (fits is None or bool(fits[torch.arange(n), moved].all())):
        return moved
    if fits is None or bool(fits.diagonal().all()):
        return None
    kinds = _kinds(items)
    found = fits.to(torch.int8).argmax(dim=1)
    if bool((fits & (kinds != kinds[found].unsqueeze(1))).any()):
        raise SampleIdError(
            "The collate function of the loader laid the samples of a batch in another order than their items, and "
            "some of them are alike in all that can be compared",
            "Ids are those of the items in their order, or of items that are known again in the rows of the batch",
            "Sort the list that the function is given in its place, `items.sort(key=...)`, whose order is seen; or "
            "have the dataset give each item its place, and say where it is in the batch, `ids=...`",
        )
    turn = occurrences(kinds[found])
    return torch.stack([_at(row, int(place)) for row, place in zip(fits, turn, strict=True)])


def _at(row: Tensor, place: int) -> Tensor:
    """One of the places that fit a row, which are as good as each other."""
    places = row.nonzero().flatten()
    return places[place % len(places)]


def _as_left(items: Sequence[Any], left: Sequence[Any]) -> Tensor | None:
    """The order of a list that was sorted where it is; None where it was not."""
    if len(left) != len(items) or all(one is other for one, other in zip(items, left, strict=True)):
        return None
    places: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        places.setdefault(id(item), []).append(place)
    found = [places[id(one)].pop(0) for one in left if places.get(id(one))]
    return torch.tensor(found, dtype=torch.int64) if len(found) == len(items) else None


def _fits(items: Sequence[Any], batch: Any) -> Tensor | None:
    """Whether each row (i) of a batch is of each of its items (k), (n, n); None where nothing can be compared."""
    n = len(items)
    parts = [[_tensor(leaf) for leaf in pytree.tree_leaves(item)] for item in items]
    if len({len(part) for part in parts}) != 1:
        return None
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    laid = [rows for leaf in leaves for rows in with_samples_first(leaf, n)]
    columns = [column for column in zip(*parts, strict=True) if all(isinstance(one, Tensor) for one in column)]
    found = [
        fits
        for column in columns
        for rows in laid
        for padded in ("behind", "in front")
        if (fits := _fit(rows, column, padded)) is not None
    ]
    if not found:
        return None
    # What tells most rows apart goes first, and what says otherwise than that is something else that looks like it.
    found.sort(key=lambda one: (-int((one.sum(dim=1) == 1).sum()), -int(one.diagonal().sum())))
    fits = found[0]
    for other in found[1:]:
        if bool((fits & other).any(dim=1).all()):
            fits = fits & other
    return fits


def _fit(rows: Tensor, column: Sequence[Any], padded: str) -> Tensor | None:
    """Whether each row holds a part of each item, padded along all axes; None unless each is of some item."""
    sizes = torch.zeros(len(rows), len(column), dtype=torch.int64)
    for shape in {one.shape for one in column}:
        fit = len(shape) == rows.dim() - 1 and all(a <= b for a, b in zip(shape, rows.shape[1:], strict=True))
        if not fit or 0 in shape:
            return None
        own = [k for k, one in enumerate(column) if one.shape == shape]
        longer = zip(shape, rows.shape[1:], strict=True)
        place = [slice(0, a) if padded == "behind" else slice(b - a, b) for a, b in longer]
        items = torch.stack([column[k].to(rows.dtype) for k in own])
        same = numbers_of(rows[(slice(None), *place)]).unsqueeze(1) == numbers_of(items)
        sizes[:, own] = same.cpu().to(torch.int64) * max(1, items[0].numel())
    most = sizes.max(dim=1, keepdim=True).values
    fits = sizes == most
    # Numbers of which many are alike are of the items where all of these are found, and by chance otherwise.
    told = 2 * int((fits.sum(dim=1) == 1).sum()) > len(rows) or bool(fits.any(dim=0).all())
    return fits if told and bool((most > 0).all()) else None


def _tensor(leaf: Any) -> Any:
    """Numbers as a tensor; anything else as it is."""
    if isinstance(leaf, Tensor):
        return leaf.detach()
    if isinstance(leaf, (Number, np.ndarray, np.generic)):
        with on_the_cpu():
            return result_or_error(lambda: torch.as_tensor(leaf), (Exception,))
    return leaf


def _kinds(items: Sequence[Any]) -> Tensor:
    """A number for each item, the same for those that are alike in everything."""
    known: dict[Any, int] = {}
    return torch.tensor([known.setdefault(_key(item), len(known)) for item in items])


def _key(item: Any) -> Any:
    leaves = [_tensor(leaf) for leaf in pytree.tree_leaves(item)]
    return tuple(
        (one.dtype, one.shape, int(numbers_of(one.unsqueeze(0)))) if isinstance(one, Tensor) else repr(one)
        for one in leaves
    )
