"""Groups of arrays in a folder, in the format of zarr v3."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pathkernel.errors import StoreError
from pathkernel.runtime.checksum import crc32c
from pathkernel.storage.format.arrays import PLAIN, ChunkedArray, Compression, declaration, declared
from pathkernel.storage.format.files import damaged, make_folders, read_json, synchronise, write_atomically

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,3}")


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
            if durable:
                synchronise(folder.resolve().parent)
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

    def check(self, attributes: Mapping[str, Any]) -> None:
        """Compare attributes that were read with the checksum among them.

        Raises
        ------
        CorruptBlockError
            Where they are not what was written.
        """
        try:
            right = attributes.get("checksum") == checksum(attributes)
        except RecursionError:
            right = False
        if not right:
            raise damaged(self.path / "zarr.json", "its checksum is wrong")

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Replace the attributes, all at once, and add a checksum to them."""
        attributes = {**attributes, "checksum": checksum(attributes)}
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
        shutil.rmtree(self.path / name, ignore_errors=True)  # another layout, left behind by a process that was killed
        make_folders(self.path, name, self.durable)
        content = declaration(shape, chunks, dtype, compression)
        write_atomically(self.path / name / "zarr.json", [json.dumps(content).encode()], self.durable)
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
            shape, chunks, dtype, compression = declared(content)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise damaged(where, f"is not that of an array of this format ({error})") from None
        return ChunkedArray(self.path, name, shape, chunks, dtype, compression, self.durable)

    def remove_array(self, name: str) -> None:
        """Delete an array with its chunks."""
        _check_name(self.path, name)
        shutil.rmtree(self.path / name, ignore_errors=True)

    def arrays(self) -> list[str]:
        """Names of the arrays at the top of the group."""
        return sorted(p.name for p in self.path.iterdir() if _NAME.fullmatch(p.name) and (p / "zarr.json").is_file())


def checksum(attributes: Mapping[str, Any]) -> int:
    """CRC32C of all attributes but the checksum itself, as JSON text with sorted keys and no spaces."""
    content = {key: value for key, value in attributes.items() if key != "checksum"}
    return crc32c(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _check_name(path: Path, name: str) -> None:
    if not _NAME.fullmatch(name) or ".." in name:
        raise damaged(path, f"{name[:100]!r} is no name of an array")
