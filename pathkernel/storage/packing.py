"""Nested values with tensors in them as bytes, and back to the last bit: JSON, followed by the tensors.

Eight bytes (little-endian) give the length of the JSON text ``{"tensors": [[dtype, shape, offset], …], "value": …}``;
offsets count from the end of the text, rounded up to 16. In ``value`` numbers, text, true, false, null and lists stand
for themselves, and an object with a single key for everything else; see `_Packer` and `_Unpacker`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathkernel.errors import RecordingError
from pathkernel.runtime.checksum import DTYPES, row_major

ALIGNMENT = 16
THEMSELVES = frozenset({type(None), bool, int, str})
"""Types of what is JSON already."""
MAX_TEXT = 2**27
"""Bytes of JSON text, which takes up to twenty times as much memory when it is read."""


class PackingError(ValueError):
    """Bytes that are no packed value."""


def as_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor in row-major order; see `row_major`."""
    return row_major(tensor).view(np.uint8)


class _Packer:
    """Turns values into what JSON can hold, and collects their tensors, each once."""

    def __init__(self) -> None:
        self.table: list[list[Any]] = []
        self.pieces: list[np.ndarray] = []
        self.size = 0
        self._places: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is only good as long as its object lives

    def tensor(self, tensor: Tensor, key: Any) -> int:
        if id(key) not in self._places:
            name = str(tensor.dtype).removeprefix("torch.")
            if name not in DTYPES or tensor.layout != torch.strided:
                raise unstorable(f"a tensor of type {tensor.dtype}, {tensor.layout}")
            raw = as_bytes(tensor)
            self._places[id(key)] = len(self.table)
            self._alive.append(key)
            self.table.append([name, list(tensor.shape), self.size])
            self.pieces += [raw, np.zeros(-len(raw) % ALIGNMENT, np.uint8)]
            self.size += len(raw) + len(self.pieces[-1])
        return self._places[id(key)]

    def value(self, value: Any) -> Any:
        kind = type(value)
        if kind in THEMSELVES:
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value, value)}
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            return {"array": self.tensor(torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape), value)}
        if kind is list:
            return self.values(value)
        if kind is tuple or kind is torch.Size:
            return {"tuple": self.values(value)}
        if kind is dict or isinstance(value, Mapping):
            return {"dict": [self.values(pair) for pair in value.items()]}
        if isinstance(value, np.generic) and value.dtype.kind in "fiub":
            return self.value(value.item())
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        raise unstorable(f"a {kind.__module__}.{kind.__qualname__}")

    def values(self, values: Iterable[Any]) -> list[Any]:
        # Most of what a step holds stands for itself; the training thread waits for Python while this runs.
        return [v if type(v) in THEMSELVES else self.value(v) for v in values]


def unstorable(what: str) -> RecordingError:
    """The refusal of a value that a store has no form for."""
    return RecordingError(
        f"A step holds {what}, which a store on disk has no form for",
        "What is stored are numbers, text, None, dense tensors, numpy arrays, and tuples, lists and dicts of them",
        "Take it out of the optimizer's settings, the update rule's `frozen` or the batch, or record in memory",
    )


def pack(value: Any) -> bytes:
    """Bytes of a nested value: numbers, text, None, tuples, lists, dicts, tensors, numpy arrays.

    Raises
    ------
    RecordingError
        For anything else.
    """
    packer = _Packer()
    encoded = packer.value(value)
    text = json.dumps({"tensors": packer.table, "value": encoded}, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > MAX_TEXT:
        raise RecordingError(
            f"A value of {len(text)} bytes besides its tensors was to be stored",
            f"At most {MAX_TEXT} are",
            "Keep long lists of numbers as tensors",
        )
    padding = bytes(-(8 + len(text)) % ALIGNMENT)
    return b"".join([struct.pack("<q", len(text)), text, padding, *(piece.data for piece in packer.pieces)])


class _Unpacker:
    """The reverse of `_Packer`; believes nothing."""

    def __init__(self, raw: bytes, start: int, table: list[Any]) -> None:
        self.raw, self.start, self.table = raw, start, table
        self._read: dict[int, Tensor] = {}
        self._left = len(raw)  # tensors do not overlap, or a small record would fill the memory

    def tensor(self, place: int) -> Tensor:
        if place not in self._read:
            name, shape, offset = self.table[place]
            dtype = DTYPES[name]
            if not all(type(n) is int and 0 <= n < 2**48 for n in shape) or type(offset) is not int or offset < 0:
                raise PackingError("sizes of a tensor")
            count = prod(shape)
            begin, size = self.start + offset, count * dtype.itemsize
            self._left -= size
            if begin + size > len(self.raw) or self._left < 0:
                raise PackingError("a tensor outside the record, or over another")
            copy = np.frombuffer(self.raw, np.uint8, size, begin).copy()
            flat = torch.from_numpy(copy).view(dtype) if count else torch.empty(0, dtype=dtype)
            self._read[place] = flat.reshape(shape)
        return self._read[place]

    def value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.value(v) for v in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "dict":
            return {self.value(k): self.value(v) for k, v in content}
        if kind == "tuple":
            return tuple(self.value(v) for v in content)
        if kind == "float":
            return struct.unpack(">d", bytes.fromhex(content))[0]
        if kind == "tensor":
            return self.tensor(content)
        if kind == "array":
            return self.tensor(content).numpy()
        if kind == "dtype":
            return DTYPES[content]
        raise PackingError(f"a value of kind {kind!r}")


def unpack(raw: bytes) -> Any:
    """The value that was packed.

    Raises
    ------
    PackingError
        Where the bytes are no packed value; nothing larger than they are is allocated.
    """
    try:
        (length,) = struct.unpack("<q", raw[:8])
        if not 0 <= length <= min(len(raw) - 8, MAX_TEXT):
            raise PackingError("length of the text")
        content = json.loads(raw[8 : 8 + length])
        return _Unpacker(raw, 8 + length + -(8 + length) % ALIGNMENT, content["tensors"]).value(content["value"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, ArithmeticError, RuntimeError) as error:
        raise PackingError(str(error)[:200]) from None
    except struct.error as error:
        raise PackingError(str(error)) from None
