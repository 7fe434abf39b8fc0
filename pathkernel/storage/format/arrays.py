"""Arrays in the format of zarr v3, read and written chunk by chunk."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc

from pathkernel.runtime.checksum import crc32c
from pathkernel.runtime.interrupts import defer_interrupts
from pathkernel.storage.format.files import damaged, make_folders, read_file, synchronise, write_atomically

MAX_CHUNK_BYTES = 2**28
"""No chunk is larger, and none that claims to be is read."""
DTYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int64", "float32", "float64")
_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}


@dataclass(frozen=True)
class Compression:
    """How chunks are compressed, by Blosc.

    Attributes
    ----------
    name
        ``"lz4"`` (fast) or ``"zstd"`` (smaller).
    level
        0 (stored) to 9.
    shuffle
        ``"bitshuffle"`` for numbers of which some bits agree, ``"noshuffle"`` for what does not compress.
    """

    name: str = "lz4"
    level: int = 1
    shuffle: str = "bitshuffle"


PLAIN = Compression(shuffle="noshuffle")
"""For what hardly compresses: almost the speed of a copy, and runs of zeros vanish."""


class ChunkedArray:
    """A zarr v3 array whose chunks are read and written one by one.

    Parameters
    ----------
    root, name
        The group's folder, and the array's path inside it.
    shape, chunks
        Of the whole, and of one chunk.
    dtype
        One of `DTYPES`.
    compression
        Of its chunks.
    durable
        See `write_atomically`.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype,
        compression: Compression,
        durable: bool = False,
    ) -> None:
        self.root, self.name, self.shape, self.chunks, self.durable = root, name, shape, chunks, durable
        self.dtype, self.compression = dtype, compression
        self.chunk_bytes = prod(chunks) * dtype.itemsize
        self._folders: set[str] = set()

    def file(self, index: Sequence[int]) -> str:
        """Where a chunk lies, relative to the group."""
        return "/".join((self.name, "c", *map(str, index)))

    def write(self, index: Sequence[int], values: np.ndarray) -> int:
        """Write one whole chunk; returns its checksum."""
        values = np.ascontiguousarray(values, dtype=self.dtype)
        assert values.shape == self.chunks
        codec = self.compression
        with defer_interrupts():  # or else a lock that Blosc takes stays taken, and the next call waits for it for ever
            packed = blosc.compress(values, codec.name.encode(), codec.level, _SHUFFLES[codec.shuffle], 0)
        checksum = crc32c(packed)
        path = self.root / self.file(index)
        self._make_folder(index)
        write_atomically(path, (packed, struct.pack("<I", checksum)), self.durable)
        return checksum

    def _make_folder(self, index: Sequence[int]) -> None:
        """Make the folder of a chunk; not the array's own."""
        relative = "/".join(("c", *map(str, index[:-1])))
        if relative not in self._folders:
            make_folders(self.root / self.name, relative, self.durable)
            self._folders.add(relative)

    def read(self, index: Sequence[int], checksum: int | None = None) -> np.ndarray:
        """One chunk.

        Parameters
        ----------
        index
            Its place in the grid of chunks.
        checksum
            What `write` returned, where that is known: another chunk in its place is then noticed.

        Raises
        ------
        CorruptBlockError
            Where it is missing, damaged, or another one.
        """
        relative = self.file(index)
        path = self.root / relative
        raw = read_file(self.root, relative, self.chunk_bytes + self.chunk_bytes // 64 + 4096)
        if len(raw) < 20:
            raise damaged(path, f"has only {len(raw)} bytes")
        packed, (found,) = raw[:-4], struct.unpack("<I", raw[-4:])
        if crc32c(packed) != found:
            raise damaged(path, "its checksum is wrong")
        if checksum is not None and found != checksum:
            raise damaged(path, "it is not the chunk that was committed here")
        size, compressed = struct.unpack("<4xI4xI", packed[:16])
        if size != self.chunk_bytes or compressed != len(packed):
            raise damaged(path, f"declares {size} bytes where a chunk has {self.chunk_bytes}")
        out = np.empty(self.chunks, self.dtype)
        try:
            with defer_interrupts():
                blosc.decompress(packed, out)
        except (RuntimeError, ValueError):
            raise damaged(path, "cannot be decompressed") from None
        return out

    def has(self, index: Sequence[int]) -> bool:
        """True where a chunk was written."""
        return (self.root / self.file(index)).is_file()

    def written(self) -> list[int]:
        """Places along the first axis at which something was written, in their order."""
        try:
            names = os.listdir(self.root / self.name / "c")
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 18)

    def remove(self, index: Sequence[int]) -> None:
        """Delete a chunk."""
        path = self.root / self.file(index)
        self._make_folder(index)
        path.unlink(missing_ok=True)
        if self.durable:
            synchronise(path.parent)


def declaration(shape: Sequence[int], chunks: Sequence[int], dtype: str, compression: Compression) -> dict[str, Any]:
    """The content of an array's zarr.json."""
    blosc_settings = {
        "cname": compression.name,
        "clevel": compression.level,
        "shuffle": compression.shuffle,
        "blocksize": 0,
        "typesize": np.dtype(dtype).itemsize,
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": False if dtype == "bool" else 0,
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "blosc", "configuration": blosc_settings},
            {"name": "crc32c", "configuration": {}},
        ],
        "attributes": {},
    }


def declared(content: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype, Compression]:
    """Shape, chunks, type and compression as declared by an array's zarr.json."""
    if content["zarr_format"] != 3 or content["node_type"] != "array":
        raise ValueError("no zarr v3 array")
    grid, keys = content["chunk_grid"], content["chunk_key_encoding"]
    if grid["name"] != "regular" or keys["name"] != "default":
        raise ValueError("another grid of chunks")
    if keys.get("configuration", {}).get("separator", "/") != "/" or content.get("storage_transformers"):
        raise ValueError("another encoding of chunk keys")
    shape, chunks = tuple(content["shape"]), tuple(grid["configuration"]["chunk_shape"])
    integers = all(type(n) is int for n in (*shape, *chunks))
    if not integers or len(shape) != len(chunks) or not 1 <= len(shape) <= 4:
        raise ValueError("shapes are not shapes")
    if min(shape) < 0 or max(shape) > 2**50 or min(chunks) < 1 or content["data_type"] not in DTYPES:
        raise ValueError("sizes or type outside the limits")
    dtype = np.dtype(content["data_type"]).newbyteorder("<")
    if max(chunks) > MAX_CHUNK_BYTES or prod(chunks) * dtype.itemsize > MAX_CHUNK_BYTES:
        raise ValueError(f"a chunk of {chunks} {dtype} is larger than {MAX_CHUNK_BYTES} bytes")
    names = [codec["name"] for codec in content["codecs"]]
    if names != ["bytes", "blosc", "crc32c"]:
        raise ValueError(f"codecs {names}")
    if content["codecs"][0].get("configuration", {}).get("endian", "little") != "little":
        raise ValueError("big-endian")
    settings = content["codecs"][1]["configuration"]
    if settings["cname"] not in ("lz4", "zstd") or settings["shuffle"] not in _SHUFFLES:
        raise ValueError("another compressor")
    return shape, chunks, dtype, Compression(settings["cname"], int(settings["clevel"]), settings["shuffle"])
