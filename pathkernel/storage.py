"""Arrays on disk that survive crashes and distrust what they read: zarr v3, and the only module that imports it.

A store is a zarr v3 group on a local file system, which any reader of zarr opens (`Group.as_zarr`). Metadata and chunks
are written and read here, in that format (bytes, Blosc, CRC32C), for four reasons: zarr's own path costs about a
millisecond of interpreter time for each chunk, as much as a training step; it runs in an event loop, which is gone when
the interpreter exits and in forked workers; importing it takes a second; and nothing is allocated here before the
declared sizes were checked.

Every file is written beside its place and then moved there, so that a reader sees the old file or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import struct
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from pathkernel.errors import CorruptBlockError, StoreError

try:
    import fcntl
except ImportError:  # pragma: no cover - elsewhere than on Unix the lock file only informs
    fcntl = None  # type: ignore[assignment]

MAX_CHUNK_BYTES = 2**28
"""No chunk is larger, and none that claims to be is read."""
MAX_METADATA_BYTES = 2**24
DTYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int64", "float32", "float64")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,3}")
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


def crc32c(data: Any) -> int:
    """CRC32C checksum of bytes."""
    return int(google_crc32c.value(data))


def damaged(path: Path, what: str) -> CorruptBlockError:
    """The error for a file that does not hold what it should."""
    return CorruptBlockError(
        f"{path}: {what}",
        "Every file of a store carries a checksum and the sizes that its metadata declare",
        "List all damage with `pathkernel verify`, and put the file back from a copy",
    )


def write_atomically(path: Path, pieces: Sequence[Any], durable: bool = False) -> None:
    """Write a file beside its place and move it there.

    Parameters
    ----------
    path
        Its place.
    pieces
        Bytes that follow each other.
    durable
        Wait until file and name are on the disk, which protects against loss of power.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(beside, "wb", buffering=0) as file:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while view:
                    view = view[file.write(view) :]
            if durable:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    if durable:
        synchronise(path.parent)


def synchronise(place: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(root: Path, relative: str, limit: int) -> bytes:
    """The content of a regular file below a root, without following links out of their place.

    Raises
    ------
    CorruptBlockError
        Where it is missing, a link, no regular file, or larger than ``limit`` bytes.
    """
    path = root / relative
    if os.path.realpath(path) != os.path.join(os.path.realpath(root), *relative.split("/")):
        raise damaged(path, "is a link or lies behind one")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise damaged(path, f"has {status.st_size} bytes, or is no regular file; at most {limit} are expected")
        pieces = []
        while piece := file.read(status.st_size + 1):
            pieces.append(piece)
    return b"".join(pieces)


def read_json(root: Path, relative: str) -> dict[str, Any]:
    """A JSON object from a file below a root."""
    raw = read_file(root, relative, MAX_METADATA_BYTES)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise damaged(root / relative, "is not JSON") from None
    if not isinstance(content, dict):
        raise damaged(root / relative, "is not a JSON object")
    return content


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
        self._folders: set[Path] = set()

    def file(self, index: Sequence[int]) -> str:
        """Where a chunk lies, relative to the group."""
        return "/".join((self.name, "c", *map(str, index)))

    def write(self, index: Sequence[int], values: np.ndarray) -> int:
        """Write one whole chunk; returns its checksum."""
        values = np.ascontiguousarray(values, dtype=self.dtype)
        assert values.shape == self.chunks
        codec = self.compression
        packed = blosc.compress(values, codec.name.encode(), codec.level, _SHUFFLES[codec.shuffle], 0)
        checksum = crc32c(packed)
        path = self.root / self.file(index)
        if path.parent not in self._folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(path.parent)
            if self.durable:
                synchronise(path.parent.parent)
        write_atomically(path, (packed, struct.pack("<I", checksum)), self.durable)
        return checksum

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
            blosc.decompress(packed, out)
        except (RuntimeError, ValueError):
            raise damaged(path, "cannot be decompressed") from None
        return out

    def has(self, index: Sequence[int]) -> bool:
        """Whether a chunk was written."""
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
        path.unlink(missing_ok=True)
        if self.durable:
            synchronise(path.parent)


class Group:
    """A zarr v3 group in a folder, with attributes.

    Parameters
    ----------
    path
        The folder.
    durable
        See `write_atomically`; for everything written through this object.
    """

    def __init__(self, path: Path, durable: bool = False) -> None:
        self.path, self.durable = path, durable

    @classmethod
    def create(cls, path: str | os.PathLike[str], attributes: dict[str, Any], durable: bool = False) -> Group:
        """Make a new group; the folder may exist, but holds no group yet."""
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            group = cls(folder, durable)
            group.set_attributes(attributes)
        except OSError as error:
            raise StoreError(
                f"`{folder}` cannot be written ({error.strerror})",
                "A store is a folder on a local file system that this process may write",
                'Write `store="runs/name"` with a folder of your own',
            ) from error
        return group

    @classmethod
    def open(cls, path: str | os.PathLike[str], durable: bool = False) -> Group:
        """An existing group, its metadata checked.

        Raises
        ------
        StoreError
            Where there is none.
        CorruptBlockError
            Where its metadata are damaged.
        """
        folder = Path(path)
        if not (folder / "zarr.json").is_file():
            raise StoreError(
                f"`{folder}` holds no store",
                "A store is a folder with a file zarr.json",
                "Give the path that was given to `KernelRecorder(..., store=path)`",
            )
        group = cls(folder, durable)
        group.attributes()
        return group

    def attributes(self) -> dict[str, Any]:
        """The group's attributes, read anew."""
        content = read_json(self.path, "zarr.json")
        attributes = content.get("attributes")
        if content.get("zarr_format") != 3 or content.get("node_type") != "group" or not isinstance(attributes, dict):
            raise damaged(self.path / "zarr.json", "is not that of a zarr v3 group")
        return attributes

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        """Replace the attributes, all at once."""
        content = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        write_atomically(self.path / "zarr.json", [json.dumps(content, allow_nan=False).encode()], self.durable)

    def create_array(
        self,
        name: str,
        shape: Sequence[int],
        chunks: Sequence[int],
        dtype: str,
        compression: Compression = PLAIN,
    ) -> ChunkedArray:
        """Make an array, or take the one that is there with the same layout.

        Parameters
        ----------
        name
            Letters, digits, ``_``, ``-``, ``.``; ``/`` for arrays in subgroups.
        shape
            May be larger than what is written: chunks that were not are missing, never zeros.
        chunks
            At most `MAX_CHUNK_BYTES`.
        dtype
            One of `DTYPES`.
        compression
            Of its chunks.
        """
        _check_name(self.path, name)
        if (self.path / name / "zarr.json").exists():
            array = self.array(name)
            if array.chunks == tuple(chunks) and array.dtype == np.dtype(dtype):
                return array
        content = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": False if dtype == "bool" else 0,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "blosc", "configuration": {**_blosc(compression), "typesize": np.dtype(dtype).itemsize}},
                {"name": "crc32c", "configuration": {}},
            ],
            "attributes": {},
        }
        shutil.rmtree(self.path / name, ignore_errors=True)  # another layout, left behind by a process that was killed
        (self.path / name).mkdir(parents=True)
        write_atomically(self.path / name / "zarr.json", [json.dumps(content).encode()], self.durable)
        if self.durable:
            synchronise(self.path)
        return self.array(name)

    def array(self, name: str) -> ChunkedArray:
        """An array of the group, its metadata checked before anything is allocated.

        Raises
        ------
        CorruptBlockError
            For another format, type, codec, or sizes beyond all limits.
        """
        _check_name(self.path, name)
        where = self.path / name / "zarr.json"
        content = read_json(self.path, f"{name}/zarr.json")
        try:
            shape, chunks, dtype, compression = _array_metadata(content)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise damaged(where, f"is not that of an array of this format ({error})") from None
        return ChunkedArray(self.path, name, shape, chunks, dtype, compression, self.durable)

    def as_zarr(self) -> Any:
        """The group for reading with zarr itself: a `zarr.Group`."""
        import zarr  # not before it is needed: it takes a second

        return zarr.open_group(zarr.storage.LocalStore(self.path, read_only=True), mode="r", zarr_format=3)

    def remove_array(self, name: str) -> None:
        """Delete an array with its chunks."""
        _check_name(self.path, name)
        shutil.rmtree(self.path / name, ignore_errors=True)

    def arrays(self) -> list[str]:
        """Names of the arrays at the top of the group."""
        return sorted(p.name for p in self.path.iterdir() if _NAME.fullmatch(p.name) and (p / "zarr.json").is_file())


def _blosc(compression: Compression) -> dict[str, Any]:
    return {
        "cname": compression.name,
        "clevel": compression.level,
        "shuffle": compression.shuffle,
        "blocksize": 0,
    }


def _check_name(path: Path, name: str) -> None:
    if not _NAME.fullmatch(name) or ".." in name:
        raise damaged(path, f"{name[:100]!r} is no name of an array")


def _array_metadata(content: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype, Compression]:
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


class Lock:
    """One writer for each store: a lock on the file ``lock``, which the operating system gives up with the process.

    Parameters
    ----------
    path
        The store's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor = path / "lock", -1

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        StoreError
            Where another recorder holds it, with its process and machine.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise StoreError(
                f"`{self.path.parent}` is being written by another recorder ({holder})",
                "A store has one writer at a time",
                "End the other one, or give this one another path; a lock is given up when its process ends",
            ) from None
        os.ftruncate(descriptor, 0)
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {began}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock up."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock inside."""
        self.acquire()
        try:
            yield
        finally:
            self.release()
