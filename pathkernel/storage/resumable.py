"""Long computations that survive being killed: what is finished is on disk, and the same call goes on from there.

A Gram matrix along a path is a sum over nodes, tile by tile; an attribution is one block of queries after the other.
Both are kept in a zarr v3 group, each block written before the record that says so. Sums are taken in the same order
whether or not they were interrupted, so the result is the same to the last bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import isqrt, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathkernel.errors import SENSELESS, StoreError, check_instance, quoted
from pathkernel.gradients.pytrees import blocks
from pathkernel.storage.format import MAX_CHUNK_BYTES, ChunkedArray, Group, Lock, damaged
from pathkernel.storage.question import Identity, differences

FORMAT, VERSION = "pathkernel-computation", 2
TILE_BYTES = MAX_CHUNK_BYTES // 2
"""Largest tile of a Gram matrix."""
FINISHED = 2
"""In the record of a tile, in place of the place of a sum that still grows."""
WRITING = 0.05
"""Largest part of the time that is spent on writing sums that are not finished."""

Settle = Callable[[Sequence[tuple[int, int | None]], Mapping[str, str]], Mapping[str, str]]


@contextmanager
def opened(path: str | os.PathLike[str], kind: str, identity: Identity) -> Iterator[Group]:
    """The group of a computation, new or begun before, held by this process alone.

    Raises
    ------
    StoreError
        Where another computation is kept there, saying what differs; or another process is at work on it.
    """
    check_instance(
        "store",
        path,
        (str, os.PathLike),
        "It is the path of a folder, which may not be there yet",
        'Write `store="runs/results"`',
    )
    if Path(path).exists() and not Path(path).is_dir():
        raise StoreError(
            f"`{path}` is a file",
            f"A computation ({kind}) is kept in a folder of its own",
            "Give a path that does not exist yet",
        )
    folder, mine = Path(path), {"format": FORMAT, "version": VERSION, "kind": kind, "identity": dict(identity)}
    new = not (folder / "zarr.json").exists()
    if new and folder.exists() and not all(place.name.endswith(".partial") for place in folder.iterdir()):
        raise StoreError(
            f"`{folder}` holds other files",
            f"A computation ({kind}) is kept in a folder of its own",
            "Give a path that does not exist yet",
        )
    group = Group.create(folder, mine) if new else Group.open(folder)
    with _locked(folder):
        found = group.attributes()
        if found.get("format") != FORMAT or found.get("kind") != kind:
            raise StoreError(
                f"`{folder}` holds {quoted(found.get('kind', 'something else'))} of format "
                f"{quoted(found.get('format'))}",
                f"It must be new, or hold a computation of kind {kind!r}",
                "Give another path",
            )
        if found.get("version") != VERSION:
            raise StoreError(
                f"`{folder}` was written in version {quoted(found.get('version'))} of the format",
                f"This pathkernel reads version {VERSION}",
                "Finish it with the pathkernel that began it, or give another path",
            )
        group.check(found)
        try:
            other = differences(found.get("identity", {}), identity, kind)
        except SENSELESS as error:
            raise damaged(folder / "zarr.json", f"its identity makes no sense ({str(error)[:100]})") from None
        if other:
            raise StoreError(
                f"`{folder}` holds another computation. {'; '.join(other)}",
                "Going on needs the same trajectory, settings and samples",
                "Give another path, or delete this one",
            )
        yield group


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = Lock(folder)
    try:
        try:
            lock.acquire()
        except OSError as error:
            raise StoreError(
                f"`{folder}` cannot be written ({error.strerror})",
                "A computation is kept in a folder on a local file system that this process may write",
                "Give another path",
            ) from error
        yield
    finally:
        lock.release()


def resumable_gram(
    path: str | os.PathLike[str],
    identity: Identity,
    shape: tuple[int, ...],
    symmetric: bool,
    terms: int,
    term: Callable[[slice, slice, int], Tensor],
    settle: Settle | None = None,
    progress: bool = False,
) -> np.ndarray:
    """A Gram matrix that is a sum of terms, tile by tile.

    Parameters
    ----------
    path, identity
        Where it is kept, and what it is of; see `pathkernel.storage.question`.
    shape
        (n, m), or (n, m, K, K).
    symmetric
        Whether only tiles on and above the diagonal are computed.
    terms, term
        Number of terms, and the term ``s`` of the tile of rows i and columns j, float64.
    settle
        Decides how tiles of some sizes, (rows, columns) or (rows, None) on the diagonal, are computed, given what an
        earlier call decided; what it returns is kept for later ones.
    progress
        Show a bar over the terms, with the time left.

    Returns
    -------
    numpy.ndarray
        float64; its chunks stay in the array ``gram`` of the group.

    Notes
    -----
    An interruption loses at most the terms since the sum was last written, which is done as often as costs a
    twentieth of the time.
    """
    n, m, *block = shape
    edge = max(1, min(max(n, m), isqrt(TILE_BYTES // (8 * prod(block)))))
    rows, columns = list(blocks(n, edge)), list(blocks(m, edge))
    grid = len(rows), len(columns)
    with opened(path, "gram", identity) as group:
        chunks = (edge, edge, *block)
        final = group.create_array("gram", (grid[0] * edge, grid[1] * edge, *block), chunks, "float64")
        sums = [group.create_array(f"partial-{slot}", final.shape, chunks, "float64") for slot in "ab"]
        record = group.create_array("progress", (*grid, 3), (1, 1, 3), "uint64")
        places = [(i, j) for i in range(grid[0]) for j in range(grid[1]) if not symmetric or j >= i]
        tiles = [_Tile((i, j), rows[i], columns[j], final, sums, record) for i, j in places]
        if settle is not None:
            _settle(group, settle, [tile.kind(symmetric) for tile in tiles])
        bar = tqdm(total=len(tiles) * terms, desc="Gram matrix", unit="node", disable=not progress)
        result = np.empty(shape)
        for tile in tiles:
            values = tile.computed(terms, partial(term, tile.rows, tile.columns), bar)
            result[tile.rows, tile.columns] = values
            if symmetric and tile.rows != tile.columns:
                result[tile.columns, tile.rows] = values.swapaxes(0, 1) if not block else values.transpose(1, 0, 3, 2)
        bar.close()
    return result


def _settle(group: Group, settle: Settle, kinds: Iterable[tuple[int, int | None]]) -> None:
    attributes = group.attributes()
    before = attributes.get("settled", {})
    if not isinstance(before, dict) or not all(isinstance(name, str) for name in before.values()):
        raise damaged(group.path / "zarr.json", "what was settled makes no sense")
    settled = settle(list(dict.fromkeys(kinds)), before)
    if settled != before:
        group.set_attributes({**attributes, "settled": dict(settled)})


class _Tile:
    """One tile of a Gram matrix, its sum in one of two places while it grows."""

    def __init__(
        self,
        index: tuple[int, int],
        rows: slice,
        columns: slice,
        final: ChunkedArray,
        sums: Sequence[ChunkedArray],
        record: ChunkedArray,
    ) -> None:
        self.index, self.rows, self.columns = index, rows, columns
        self.final, self.sums, self.record = final, sums, record
        self.size = rows.stop - rows.start, columns.stop - columns.start

    def kind(self, symmetric: bool) -> tuple[int, int | None]:
        """Numbers of rows and columns, None for as many on the diagonal of a symmetric matrix."""
        return self.size[0], None if symmetric and self.rows == self.columns else self.size[1]

    def computed(self, terms: int, term: Callable[[int], Tensor], bar: Any) -> np.ndarray:
        """The whole sum, from where it stands."""
        done, slot, total = self._stand()
        bar.update(done)
        written, cost = time.monotonic(), 0.0
        for s in range(done, terms):
            addend = term(s)
            total = addend if total is None else total.add_(addend)
            bar.update()
            if s + 1 < terms and time.monotonic() - written > cost / WRITING:
                began = time.monotonic()
                slot = 1 - slot
                self._write(self.sums[slot], s + 1, slot, total)
                written = time.monotonic()
                cost = written - began
        assert total is not None
        if done < terms:
            self._write(self.final, terms, FINISHED, total)
            for array in self.sums:
                array.remove(self._place(array))
        return total.numpy()

    def _place(self, array: ChunkedArray) -> tuple[int, ...]:
        return (*self.index, *(0,) * (len(array.shape) - 2))

    def _stand(self) -> tuple[int, int, Tensor | None]:
        """How many terms are in the sum on disk, in which place it is, and the sum."""
        if not self.record.has((*self.index, 0)):
            return 0, 0, None
        done, slot, checksum = (int(v) for v in self.record.read((*self.index, 0)).reshape(-1))
        source = self.final if slot == FINISHED else self.sums[slot % 2]
        values = source.read(self._place(source), checksum)
        return done, slot, torch.from_numpy(values[: self.size[0], : self.size[1]].astype(np.float64))

    def _write(self, array: ChunkedArray, done: int, slot: int, total: Tensor) -> None:
        whole = np.zeros(array.chunks)
        whole[: self.size[0], : self.size[1]] = total.numpy()
        checksum = array.write(self._place(array), whole)
        # The record comes after what it speaks of: until then the other place holds the sum.
        self.record.write((*self.index, 0), np.array([[[done, slot, checksum]]], dtype=np.uint64))


def resumable_blocks(
    path: str | os.PathLike[str],
    identity: Identity,
    sizes: Sequence[int],
    block: Callable[[int], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Arrays with one row for each query, block of queries by block of queries.

    Parameters
    ----------
    path, identity
        Where they are kept, and what they are of.
    sizes
        Rows of each block.
    block
        Computes the arrays of a block by name; a name that a block does not have stands for zeros.

    Returns
    -------
    dict of str to numpy.ndarray
        float64.
    """
    with opened(path, "attributions", identity) as group:
        _check_blocks(group, len(sizes))
        for index in range(len(sizes)):
            if str(index) not in group.attributes().get("blocks", {}):
                _write_block(group, index, sizes, block(index))
        return _read_blocks(group, sizes)


def _check_blocks(group: Group, count: int) -> None:
    """Refuse attributes that say anything else than which arrays each block has."""
    attributes = group.attributes()
    names, held = attributes.get("names", []), attributes.get("blocks", {})
    right = isinstance(names, list) and isinstance(held, dict) and all(isinstance(name, str) for name in names)
    right = right and len(set(names)) == len(names) and held.keys() <= {str(index) for index in range(count)}
    right = right and all(isinstance(checksums, dict) for checksums in held.values())
    # each array is in some block, or zeros of any size could be asked for in its place
    if not right or set(names) != {name for checksums in held.values() for name in checksums}:
        raise damaged(group.path / "zarr.json", "its blocks make no sense")


def _write_block(group: Group, index: int, sizes: Sequence[int], arrays: Mapping[str, np.ndarray]) -> None:
    attributes = group.attributes()
    names = list(attributes.get("names", []))
    names += [name for name in arrays if name not in names]
    checksums = {}
    for name, values in arrays.items():
        chunk = (max(sizes), *values.shape[1:])
        array = group.create_array(f"array-{names.index(name)}", (len(sizes) * chunk[0], *chunk[1:]), chunk, "float64")
        whole = np.zeros(chunk)
        whole[: len(values)] = values
        checksums[name] = array.write((index, *(0,) * (values.ndim - 1)), whole)
    # What says that the block is finished comes after it.
    blocks = {**attributes.get("blocks", {}), str(index): checksums}
    group.set_attributes({**attributes, "names": names, "blocks": blocks})


def _read_blocks(group: Group, sizes: Sequence[int]) -> dict[str, np.ndarray]:
    result, attributes = {}, group.attributes()
    for place, name in enumerate(attributes.get("names", [])):
        array = group.array(f"array-{place}")
        if array.chunks[0] != max(sizes):
            raise damaged(group.path / array.name, "has chunks of another form")
        rows = []
        for index, size in enumerate(sizes):
            where, checksum = (index, *(0,) * (len(array.shape) - 1)), attributes["blocks"][str(index)].get(name)
            rows.append(np.zeros((size, *array.chunks[1:])) if checksum is None else array.read(where, checksum)[:size])
        result[name] = np.concatenate(rows)
    return result


def check_arrays(
    store: str | os.PathLike[str],
    kept: Mapping[str, np.ndarray],
    rows: int,
    named: Mapping[str, tuple[int, ...]],
    what: str,
) -> None:
    """Refuse a store whose arrays are none that a computation has: another number of rows, or some missing.

    Raises
    ------
    CorruptBlockError
        Naming the store.
    """
    right = all(name in kept and kept[name].shape == (rows, *shape) for name, shape in named.items())
    if not right or any(values.shape[:1] != (rows,) for values in kept.values()):
        raise damaged(Path(store), f"holds other arrays than {what} has")
