"""Memory for the vectors of a recording: large pages, used again once nobody holds what was in them."""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

SLAB = 4 << 20
"""Bytes of a slab. Small, so that memory which has just been let go of is still in the processor's cache."""

FREE = 128 << 20
"""Bytes that are kept for the next vectors: a store lets go of many steps at once, when a block has been written."""

SMALLEST = 64 << 10
"""Bytes of a vector below which the allocator's own memory is used: it is there already."""

LINE = 64
"""Bytes at whose multiples vectors begin, as in torch's own allocations."""


class Slabs:
    """Cuts vectors from slabs of memory.

    Touching a new page of memory costs more than copying into it: a vector of 85,000 numbers in pages of 4 KiB took
    215 µs, in pages of 2 MiB 52 µs, and in memory that had been used before 28 µs. A slab is used again when the last
    of its vectors has gone, as with a store that writes them to disk.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._slab: Tensor | None = None
        self._used = self._room = 0

    def empty(self, size: int, like: Tensor) -> Tensor:
        """An uninitialised vector (size,) of the type and on the device of another."""
        length = size * like.element_size()
        if like.device.type != "cpu" or length < SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(size, dtype=like.dtype, device=like.device)
        if self._slab is None or self._slab.dtype != like.dtype or self._used + size > self._room:
            self._slab = None  # let go of the old one first: it may be the one that becomes free
            self._slab = self._next_slab(length).view(like.dtype)
            self._used, self._room = 0, self._slab.numel()
        start, step = self._used, LINE // like.element_size()
        self._used = start + -(-size // step) * step
        return self._slab[start : start + size]

    def _next_slab(self, length: int) -> Tensor:
        while self._free:
            memory = self._free.pop()
            if len(memory) >= length:
                break
        else:
            # A vector that would leave much of a slab over gets one of its own size.
            memory = mmap.mmap(-1, SLAB if length <= SLAB // 4 else length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(memory, dtype=np.uint8)
        weakref.finalize(array, _release, self._free, memory).atexit = False
        return torch.from_numpy(array)


def _release(free: list[mmap.mmap], memory: mmap.mmap) -> None:
    """Keep a slab for the next vectors, up to a limit."""
    if len(memory) * (len(free) + 1) <= FREE:
        free.append(memory)
