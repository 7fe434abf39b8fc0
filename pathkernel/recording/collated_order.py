"""Order of the rows of a collated batch, as far as the samples that it was made of tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel.errors import SampleIdError
from pathkernel.runtime.interrupts import result_or_error

Value = tuple[int, bytes]
"""A tensor as it is compared: how long it is, and its numbers."""


def check_order(items: Sequence[Any], batch: Any) -> None:
    """Refuse a batch whose rows stand in another order than the samples that it was made of, as where they are sorted.

    Nothing is collated again: rows are compared with the tensors and numbers of the samples, whole or padded at one
    end. A batch in which these are not found again, as after augmentation, is let through.

    Parameters
    ----------
    items
        Samples in the order of their ids.
    batch
        What the loader's collate function made of them.

    Raises
    ------
    SampleIdError
        Where a tensor holds a field of the samples in another order, and none holds such a field in theirs.
    """
    moved = result_or_error(lambda: _moved(items, batch), (Exception,))  # of whatever types the user's samples are
    if isinstance(moved, tuple):
        raise SampleIdError(
            f"The loader's `collate_fn` changed the order of samples: row {moved[0]} of a batch is that of the sample "
            f"in place {moved[1]}",
            "Ids are collected in the order in which samples are handed to `collate_fn`: rows have to be in it too",
            "Leave samples in their order (with `pack_padded_sequence(..., enforce_sorted=False)` they need not be "
            "sorted), or let a `batch_sampler` sort them",
        )


def _moved(items: Sequence[Any], batch: Any) -> tuple[int, int] | None:
    """A row that is not its own sample's, and the place of that which it is of; None where there is none."""
    fields, moved = _fields(items), None
    for rows in _rows(batch, len(items)):
        for field in fields:
            places = _places(rows, field)
            if places is None:
                continue
            if all(place == row for row, place in enumerate(places)):
                return None
            moved = moved or next((row, place) for row, place in enumerate(places) if place != row)
    return moved


def _fields(items: Sequence[Any]) -> list[list[Tensor]]:
    """Tensors, numbers and lists of numbers in the samples: each as a list with one for each sample."""
    found = [[_tensor(leaf) for leaf in pytree.tree_leaves(item, is_leaf=_is_numbers)] for item in items]
    if len({len(leaves) for leaves in found}) != 1:
        return []
    fields = []
    for leaves in zip(*found, strict=True):
        field = [leaf for leaf in leaves if leaf is not None]
        if len(field) == len(items) and len({leaf.ndim for leaf in field}) == 1:
            fields.append(field)
    return fields


def _rows(batch: Any, n: int) -> list[Tensor]:
    """Tensors of a batch with one row for each sample, along the first or the second axis."""
    found = []
    for leaf in pytree.tree_leaves(batch):
        rows = _tensor(leaf)
        if rows is not None:
            found += [rows.movedim(axis, 0) for axis, size in enumerate(rows.shape[:2]) if size == n]
    return found


def _is_numbers(leaf: Any) -> bool:
    return isinstance(leaf, list) and bool(leaf) and all(isinstance(number, (int, float)) for number in leaf)


def _tensor(leaf: Any) -> Tensor | None:
    if isinstance(leaf, Tensor):
        return leaf.detach().cpu() if leaf.layout == torch.strided and not leaf.is_complex() else None
    if isinstance(leaf, (int, float, np.number, np.ndarray)) or _is_numbers(leaf):
        numbers = np.array(leaf)
        return torch.from_numpy(numbers) if numbers.dtype.kind in "fiub" else None
    return None


def _places(rows: Tensor, field: Sequence[Tensor]) -> list[int] | None:
    """The sample whose field each row holds, the row's own where it does; None where rows are no permutation of them.

    Of fields with few values nothing is said: labels that were changed look like labels in another order.
    """
    scalar = field[0].ndim == 0
    if rows[0].numel() != 1 if scalar else rows.ndim != field[0].ndim + 1:
        return None
    if not scalar and len({leaf.shape[1:] for leaf in field} | {rows.shape[2:]}) != 1:
        return None
    every = [_value(leaf.to(rows.dtype)) for leaf in field]
    lengths = sorted({length for length, _ in every}, reverse=True)
    count = Counter(every)
    if len(count) < max(3 if scalar else 2, len(field) / 2):
        return None
    held = []
    for row, own in zip(rows.reshape(len(rows), *rows.shape[1:]), every, strict=True):
        values = _values(row.reshape(()) if scalar else row, lengths)
        found = own if own in values else next((value for value in values if value in count), None)
        if found is None:
            return None
        held.append(found)
    if Counter(held) != count:
        return None
    first = {value: place for place, value in reversed(list(enumerate(every)))}
    return [row if held[row] == own else first[held[row]] for row, own in enumerate(every)]


def _value(leaf: Tensor) -> Value:
    return len(leaf) if leaf.ndim else 0, leaf.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _values(row: Tensor, lengths: Sequence[int]) -> list[Value]:
    """What a row may hold: itself, or without a padding by one number at either end, the longest first."""
    if not row.ndim:
        return [_value(row)]
    found = []
    for length in lengths:
        parts = [(row[:length], row[length:]), (row[len(row) - length :], row[: len(row) - length])]
        if length <= len(row):
            found += [
                _value(kept) for kept, rest in parts if not rest.numel() or bool((rest == rest.flatten()[0]).all())
            ]
    return found
