"""Blocks of steps in the files of a store: written one after the other, committed last, read by themselves.

The layout is written down in docs/reference/storage_format.md.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathkernel.errors import CorruptBlockError
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.runtime.checksum import DTYPES, crc32c
from pathkernel.storage.encoding import UNSIGNED, EncodedBlock, bits, differences, whole
from pathkernel.storage.format import PLAIN, ChunkedArray, Compression, Group, damaged, drop_page_cache
from pathkernel.storage.packing import PackingError, pack, unpack

RECORD_CHUNK = 2**18
"""Bytes in a chunk of the log and of other packed values; each begins at a chunk of its own."""
LARGE = 2**18
"""Bytes of rows from which their file is let go of by the system's cache once it is on disk."""
LEAVING = 4
"""Files that may be on their way to disk meanwhile."""
COLUMNS = 2**20
"""Numbers in a row of a chunk: what a partial read by parameter reads of a row."""
UNLIMITED = 2**40
"""Declared length of arrays that grow; how much of them is valid, the commits say."""


@dataclass(frozen=True)
class Commit:
    """A row of the array ``commit``: the block is complete.

    Attributes
    ----------
    block, first, steps
        Its number, its first step, and how many it has.
    log_start, log_bytes, log_checksum
        First chunk of its record, its length, and the CRC32C of it.
    extras
        Number of extra vectors up to its end.
    region
        Which θ it has; see `Region`.
    joined
        1 where its first θ is the very tensor with which the block before ended.
    """

    block: int
    first: int
    steps: int
    log_start: int
    log_bytes: int
    log_checksum: int
    extras: int
    region: int
    joined: int

    @property
    def stop(self) -> int:
        """The step after its last."""
        return self.first + self.steps

    @property
    def log_stop(self) -> int:
        """The chunk of the log after its record."""
        return self.log_start + -(-self.log_bytes // RECORD_CHUNK)


FIELDS = len(Commit.__dataclass_fields__)


@dataclass(frozen=True)
class Region:
    """Blocks with the same parameters in θ.

    Attributes
    ----------
    index
        0, 1, …
    layout
        Where each parameter lies.
    """

    index: int
    layout: ParameterLayout


def write_packed(group: Group, name: str, value: Any) -> tuple[int, int]:
    """Write a packed value as an array of bytes of its own; returns its length and the CRC32C of it."""
    raw = pack(value)
    array = group.create_array(name, [-(-len(raw) // RECORD_CHUNK) * RECORD_CHUNK], [RECORD_CHUNK], "uint8")
    _write_bytes(array, 0, raw)
    return len(raw), crc32c(raw)


def read_packed(group: Group, name: str, length: int, checksum: int | None = None) -> Any:
    """Read a packed value.

    Parameters
    ----------
    group, name
        Where it is.
    length, checksum
        What `write_packed` returned; the checksum of every chunk is right in another recording's file, too. None for
        one that was written before there were any.
    """
    array = group.array(name)
    raw = _read_bytes(array, 0, length)
    if checksum is not None and crc32c(raw) != checksum:
        raise damaged(group.path / name, "it is not what was written with this header")
    try:
        return unpack(raw)
    except PackingError as error:
        raise damaged(group.path / name, f"holds no packed value ({error})") from None


def _write_bytes(array: ChunkedArray, start: int, raw: bytes) -> None:
    for number in range(-(-len(raw) // RECORD_CHUNK)):
        piece = np.frombuffer(raw[number * RECORD_CHUNK : (number + 1) * RECORD_CHUNK], np.uint8)
        chunk = np.zeros(RECORD_CHUNK, np.uint8)
        chunk[: len(piece)] = piece
        array.write([start + number], chunk)


def _read_bytes(array: ChunkedArray, start: int, length: int) -> bytes:
    """Bytes from the beginning of a chunk; no more is allocated than the chunks that are there hold."""
    pieces = [array.read([start + number]).tobytes() for number in range(-(-length // RECORD_CHUNK))]
    return b"".join(pieces)[:length]


class Blocks:
    """The blocks of a trajectory on disk.

    Parameters
    ----------
    group
        Where they lie.
    dtype
        Floating type of θ.
    capacity
        Most steps in a block.
    compression
        Of what changes slowly.
    start
        Checksum of the start values, which every record repeats; None where it is not known.
    """

    def __init__(
        self, group: Group, dtype: torch.dtype, capacity: int, compression: Compression, start: int | None = None
    ) -> None:
        self.group, self.dtype, self.capacity, self.compression = group, dtype, capacity, compression
        self._arrays: dict[str, ChunkedArray] = {}
        self._commits: dict[int, Commit] = {}
        self._memory = np.empty(0, np.uint8)
        self._leaving: deque[Path] = deque()
        self.start = start
        self.count = 0

    # -- arrays -------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the arrays that do not depend on the parameters."""
        self.group.create_array("commit", [UNLIMITED], [FIELDS], "int64")  # a file for each block, not a folder
        self.group.create_array("log", [UNLIMITED], [RECORD_CHUNK], "uint8")

    def array(self, name: str) -> ChunkedArray:
        """An array that is there."""
        if name not in self._arrays:
            self._arrays[name] = self.group.array(name)
        return self._arrays[name]

    def _vectors(self, name: str, region: Region, rows: int, dtype: torch.dtype, compression: Compression) -> str:
        """Make the array of some vectors of a region, if it is not there yet."""
        if name not in self._arrays:
            columns = min(max(1, region.layout.size), COLUMNS)
            shape = [UNLIMITED, -(-region.layout.size // columns) * columns]
            self._arrays[name] = self.group.create_array(
                name, shape, [rows, columns], UNSIGNED[dtype.itemsize], compression
            )
        return name

    # -- writing ------------------------------------------------------------------------------------------------

    def write(self, block: EncodedBlock, region: Region, first: int) -> Commit:
        """Write a block behind the others: rows, record, and last the commit."""
        number, steps = self.count, block.steps
        before = self.commit(number - 1) if number else Commit(-1, 0, 0, 0, 0, 0, 0, 0, 0)
        suffix, checksums = f"-{region.index}", {}
        if block.points:
            rows = self._scratch(self.capacity + 1, region.layout.size, self.dtype)
            differences([point if point.numel() else None for point in block.points], rows)
            name = self._vectors("theta" + suffix, region, self.capacity + 1, self.dtype, self.compression)
            checksums[name] = self._write_rows(name, number, rows)
        if any(gradient.numel() for gradient in block.gradients):
            rows = self._scratch(self.capacity, region.layout.size, self.dtype)
            for row, vector in enumerate(block.gradients):
                rows[row] = bits(vector) if vector.numel() else 0
            rows[steps:] = 0
            name = self._vectors("gradient" + suffix, region, self.capacity, self.dtype, PLAIN)
            checksums[name] = self._write_rows(name, number, rows)
        types = {stream: dtype for _, dtype, stream in block.record["streams"]}
        for stream, by_step in block.frozen.items():
            dtype = DTYPES[types[stream]]  # a recording that goes on has them from the store
            name = self._vectors(f"frozen-{stream}{suffix}", region, self.capacity, dtype, self.compression)
            rows = self._scratch(self.capacity, region.layout.size, dtype)
            # A row is whole already, under no name, or put together from some parameters.
            vectors = [t[""] if "" in t else whole(t, region.layout, dtype) if t else None for t in by_step]
            differences(vectors, rows)
            checksums[name] = self._write_rows(name, number, rows)
        extra_checksums = []
        for place, vector in enumerate(block.extras, start=before.extras):
            name = self._vectors("extra" + suffix, region, 1, self.dtype, self.compression)
            extra_checksums.append(self._write_rows(name, place, bits(vector)[None]))
        record = {
            **block.record, "block": number, "first": first, "checksums": checksums,
            "extra_checksums": extra_checksums, "first_extra": before.extras,
            **({} if self.start is None else {"start": self.start}),
        }  # fmt: skip
        raw = pack(record)
        _write_bytes(self.array("log"), before.log_stop, raw)
        commit = Commit(
            number, first, steps, before.log_stop, len(raw), crc32c(raw), before.extras + len(block.extras),
            region.index, int(block.joined),
        )  # fmt: skip
        self._write_commit(commit)
        self.count += 1
        return commit

    def _scratch(self, rows: int, size: int, dtype: torch.dtype) -> np.ndarray:
        """Memory for rows, used again and again: touching new pages costs more than copying."""
        length = rows * size * dtype.itemsize
        if len(self._memory) < length:
            self._memory = np.empty(length, np.uint8)
        return self._memory[:length].view(UNSIGNED[dtype.itemsize]).reshape(rows, size)

    def _write_rows(self, name: str, number: int, rows: np.ndarray) -> list[int]:
        array, size = self._arrays[name], rows.shape[1]
        height, columns = array.chunks
        checksums = []
        for j in range(-(-size // columns)):
            piece = rows[:, j * columns : (j + 1) * columns]
            if piece.shape != (height, columns):
                whole = np.zeros((height, columns), rows.dtype)
                whole[:, : piece.shape[1]] = piece
                piece = whole
            checksums.append(array.write([number, j], piece))
            if piece.nbytes >= LARGE:
                self._let_go(array.root / array.file([number, j]))
        return checksums

    def _let_go(self, path: Path) -> None:
        """Begin to move a file to disk, and let go of one for which that was begun some files ago."""
        drop_page_cache(path)
        self._leaving.append(path)
        if len(self._leaving) > LEAVING:
            drop_page_cache(self._leaving.popleft())

    def _write_commit(self, commit: Commit) -> None:
        self.array("commit").write([commit.block], np.array(astuple(commit), np.int64))
        self._commits[commit.block] = commit

    def truncate(self, steps: int) -> None:
        """Keep the first steps only: later commits are removed, the last one first, and one is shortened."""
        while self.count and self.commit(self.count - 1).first >= steps:
            self.array("commit").remove([self.count - 1])
            self.count -= 1
            self._commits.pop(self.count)
        if self.count and self.commit(self.count - 1).stop > steps:
            last = self.commit(self.count - 1)
            self._write_commit(Commit(**{**vars(last), "steps": steps - last.first}))

    # -- reading ------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look how many blocks are committed.

        Raises
        ------
        CorruptBlockError
            Where one between them is missing.
        """
        commits = self.array("commit")
        written = set(commits.written())
        count = max(written, default=-1) + 1
        if count != len(written):  # a listing may lack what was made while it was taken
            for block in range(min(count, UNLIMITED)):
                if block not in written and not commits.has([block]):
                    raise damaged(self.group.path / commits.file([block]), "is missing")
        self.count = count

    @property
    def steps(self) -> int:
        """How many steps are committed."""
        return self.commit(self.count - 1).stop if self.count else 0

    def commit(self, block: int) -> Commit:
        """The commit of a block."""
        if block not in self._commits:
            array = self.array("commit")
            if array.chunks != (FIELDS,) or array.dtype != np.int64:
                raise damaged(self.group.path / "commit", "has another form")
            row = Commit(*map(int, array.read([block])))
            plausible = row.block == block and 0 < row.steps <= self.capacity and 0 <= row.first <= UNLIMITED
            if not plausible or min(astuple(row)) < 0 or row.log_bytes > 2**31 or max(astuple(row)) > UNLIMITED:
                raise damaged(self.group.path / array.file([block]), "is no commit of this block")
            self._commits[block] = row
        return self._commits[block]

    def find(self, index: int) -> int:
        """The block that holds a step."""
        low, high = 0, self.count - 1
        guess = min(index // self.capacity, high)
        while low < high:
            commit = self.commit(guess)
            if commit.first <= index < commit.stop:
                return guess
            low, high = (guess + 1, high) if index >= commit.stop else (low, guess - 1)
            guess = (low + high) // 2
        return low

    @contextlib.contextmanager
    def named(self, block: int) -> Any:
        """Say in errors which steps are hit."""
        try:
            yield
        except CorruptBlockError as error:
            if "(steps " in error.found:
                raise
            commit = self._commits.get(block)
            which = f"steps {commit.first}–{commit.stop - 1}" if commit else f"steps of block {block}"
            raise CorruptBlockError(f"{error.found} ({which})", error.expected, error.write) from None

    def record(self, block: int) -> dict[str, Any]:
        """The record of a block, checked against its commit."""
        with self.named(block):
            commit, log = self.commit(block), self.array("log")
            if log.chunks != (RECORD_CHUNK,) or log.dtype != np.uint8:
                raise damaged(self.group.path / "log", "has another form")
            raw = _read_bytes(log, commit.log_start, commit.log_bytes)
            where = self.group.path / log.file([commit.log_start])
            if crc32c(raw) != commit.log_checksum:
                raise damaged(where, "it is not the record that was committed")
            try:
                record = unpack(raw)
                if not isinstance(record, dict) or not isinstance(record["steps"], list):
                    raise PackingError("of another form")
                if record["block"] != block or record["first"] != commit.first or len(record["steps"]) < commit.steps:
                    raise PackingError("of another block")
                if record.get("start", self.start) != self.start:  # blocks of earlier versions do not say
                    raise PackingError("of another recording")
            except (PackingError, KeyError, TypeError, RuntimeError) as error:
                raise damaged(where, f"holds no record of block {block} ({error})") from None
            return record

    def rows(
        self, name: str, block: int, record: dict[str, Any], count: int, size: int, pieces: Sequence[int] | None = None
    ) -> np.ndarray:
        """Rows of a block as they were written, (count, size) or only some pieces of their columns.

        Parameters
        ----------
        name
            Of the array.
        block, record
            Which block.
        count, size
            Rows that are wanted, and their length.
        pieces
            Which chunks, side by side; all by default.
        """
        with self.named(block):
            array = self.array(name)
            height, columns = array.chunks
            if count > height or columns != min(size, COLUMNS):
                raise damaged(self.group.path / name, "has chunks of another form")
            every = range(-(-size // columns)) if pieces is None else pieces
            try:
                checksums = [record["checksums"][name][j] for j in every]
            except (KeyError, IndexError, TypeError):
                raise damaged(self.group.path / name, f"block {block} has no such rows") from None
            read = [array.read([block, j], c)[:count] for j, c in zip(every, checksums, strict=True)]
            return read[0] if len(read) == 1 else np.concatenate(read, axis=1)

    def extra(self, region: Region, block: int, record: dict[str, Any], place: int) -> np.ndarray:
        """An extra vector by its number."""
        with self.named(block):
            array, size = self.array(f"extra-{region.index}"), region.layout.size
            checksums = record["extra_checksums"][place - record["first_extra"]]
            pieces = [array.read([place, j], checksum)[0] for j, checksum in enumerate(checksums)]
            return np.concatenate(pieces)[:size]


class Recent:
    """A few things that were used last, by key."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """Value under a key, made where there is none."""
        return self.put(key, self._held[key] if key in self._held else make())

    def put(self, key: Any, value: Any) -> Any:
        """Hold a value under a key, and return it."""
        self._held[key] = value
        self._held.move_to_end(key)
        while len(self._held) > self.size:
            self._held.popitem(last=False)
        return value

    def values(self) -> list[Any]:
        """All that is held."""
        return list(self._held.values())

    def clear(self) -> None:
        """Let everything go."""
        self._held.clear()
