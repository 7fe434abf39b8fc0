"""Samples that the rows of a collated batch are of, where a collate function sorts, drops or repeats its items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathkernel.errors import SampleIdError

KEEP_ORDER = ("torch.utils.data.", "transformers.data.", "datasets.")
"""Modules whose collate functions are known to make one row of each item, in their order."""
SAME = {"label": "labels", "label_ids": "labels"}
"""Names that collate functions change."""
Path = tuple[Any, ...]


class Items:
    """The items of a batch before they are collated.

    Parameters
    ----------
    ids
        Of the items, (B,).
    items
        What the dataset gave.

    Notes
    -----
    A row is of the items with the same numbers in it: as a whole, or before or behind padding. A collate function that
    masks, tokenizes or augments leaves few fields, or none, that can be compared; where none can, rows are in the order
    in which the items were left, by ``items.sort()`` too. Time and memory are those of collating once more.
    """

    def __init__(self, ids: Tensor, items: list[Any]) -> None:
        self.ids, self.items = ids, items
        self._given = [id(item) for item in items]
        # Collate functions take entries out of items.
        self._columns = _columns([dict(_leaves(item)) for item in items])

    def ids_of(self, batch: Any) -> Tensor:
        """The ids of the rows of the batch that was made of the items.

        Raises
        ------
        SampleIdError
            Where the rows are in another order, and it cannot be told in which.
        """
        ids = self.ids.tolist()
        certain: list[list[int]] = []
        possible: list[list[set[int]]] = []
        for path, rows in ((path, rows) for path, leaf in _leaves(batch) for rows in _samples_first(leaf, len(ids))):
            for own, values in self._columns.items():
                found = _matches(ids, values, rows)
                if found is None or (own != path and np.ndim(rows) < 2):  # few numbers are alike by chance
                    continue
                if all(len(each) == 1 for each in found):
                    certain.append([next(iter(each)) for each in found])
                    if certain[-1] == ids:
                        return self.ids
                elif own == path and _in_other_order(ids, found):
                    possible.append(found)
        if any(each != certain[0] for each in certain):
            raise _unclear()
        if certain:
            return torch.tensor(certain[0], dtype=torch.int64)
        return self._of_fields(ids, possible)

    def _of_fields(self, ids: list[int], possible: list[list[set[int]]]) -> Tensor:
        """The ids where no field tells them by itself."""
        as_left = self._left()
        if all(_in_order(as_left.tolist(), found) for found in possible):
            return as_left
        together = [set.intersection(*each) for each in zip(*possible, strict=True)]
        if any(_in_order(ids, found) for found in (together, *(possible if not all(together) else ()))):
            return self.ids
        if all(len(each) == 1 for each in together):
            return torch.tensor([next(iter(each)) for each in together], dtype=torch.int64)
        raise _unclear()

    def _left(self) -> Tensor:
        """Ids in the order in which the collate function left its items."""
        left = [id(item) for item in self.items]
        if left == self._given or sorted(left) != sorted(self._given) or len(set(left)) < len(left):
            return self.ids
        return self.ids[[self._given.index(item) for item in left]]


def keeps_order(collate: Callable[[list[Any]], Any]) -> bool:
    """True for collate functions of libraries that are known to keep the order of items."""
    own = getattr(collate, "__module__", None) or ""
    return own.startswith(KEEP_ORDER)


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The numbers in an item or in a batch, with their places."""
    if isinstance(value, Mapping):
        for name in list(value):
            yield from _leaves(value[name], (*path, SAME.get(name, name) if isinstance(name, str) else name))
    elif isinstance(value, (Tensor, np.ndarray, int, float, np.generic)):
        yield path, value
    elif isinstance(value, (list, tuple)) and value:
        if path and all(isinstance(each, (int, float)) for each in value):
            yield path, value
        else:
            for i, each in enumerate(value):
                yield from _leaves(each, (*path, i))


def _samples_first(rows: Any, n: int) -> Iterator[Any]:
    """A tensor as it is; and with its samples first, where they may lie along the second axis: (T, B, ...)."""
    yield rows
    if isinstance(rows, (Tensor, np.ndarray)) and rows.ndim > 1 and rows.shape[1] == n:
        yield rows.swapaxes(0, 1)


def _columns(items: Sequence[Mapping[Path, Any]]) -> dict[Path, list[Any]]:
    """Fields that all items have."""
    return {path: [item[path] for item in items] for path in items[0] if all(path in item for item in items)}


def _array(value: Any) -> np.ndarray | None:
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.dtype == torch.bfloat16 or value.layout != torch.strided:
            return None
        value = value.detach().numpy()
    found = np.asarray(value)
    return found if found.dtype.kind in "biuf" else None


def _matches(ids: list[int], values: Sequence[Any], rows: Any) -> list[set[int]] | None:
    """Items that each row may be of, by what one field of them holds; None where a row is of none of them."""
    table = _array(rows)
    if table is None or table.ndim == 0:
        return None
    items: dict[int, dict[bytes, set[int]]] = {}
    for i, value in zip(ids, values, strict=True):
        array = _array(value)
        if array is None or array.shape[1:] != table.shape[2:] or array.ndim != table.ndim - 1 or 0 in array.shape:
            return None
        array = array if array.ndim == 0 else array[: table.shape[1]]
        length = len(array) if array.ndim else 0
        items.setdefault(length, {}).setdefault(array.astype(table.dtype).tobytes(), set()).add(i)
    found = []
    for row in table:
        for length, known in sorted(items.items(), reverse=True):
            parts = (row[:length], row[len(row) - length :]) if row.ndim else (row,)
            own = set().union(*(known.get(part.tobytes(), ()) for part in parts))
            if own:
                found.append(own)
                break
        else:
            return None
    return found


def _in_order(ids: list[int], found: Sequence[set[int]]) -> bool:
    return len(found) == len(ids) and all(i in own for i, own in zip(ids, found, strict=True))


def _in_other_order(ids: list[int], found: Sequence[set[int]]) -> bool:
    """True where as many rows as items are of each of those that are alike: fields that were computed anew are not."""
    if len(found) != len(ids):
        return False
    alike = Counter(frozenset(own) for own in found)
    return all(rows <= sum(i in own for i in ids) for own, rows in alike.items())


def _unclear() -> SampleIdError:
    return SampleIdError(
        "The collate function made a batch whose rows are not in the order of its items",
        "Every row is of a sample, which is told by comparing the batch with its items; these differ too little, or "
        "one field is in another order than another",
        "Sort in the dataset or in the sampler instead, or let the items hold their ids, in a field that is collated "
        'with the others and named by `ids="index"`',
    )
