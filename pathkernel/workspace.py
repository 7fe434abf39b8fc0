"""Memory for large intermediate arrays that is used again, call after call."""

from __future__ import annotations

import math
import mmap
import sys
from threading import Lock

import torch
from torch import Tensor

SMALL = 1 << 20
"""Bytes up to which an array comes from the allocator, which has such memory at hand."""

LARGEST = 31 << 20
"""Bytes of the largest blocks that the C library keeps for later, once it has seen one freed."""

ROOM = 1.25
"""How much larger than asked for a block may be."""


def keep_freed_memory() -> None:
    """Let the C library keep the memory of intermediate results that are freed.

    glibc gives memory back to the system from the size of the largest block on that it has seen freed, up to 32 MB. A
    loop that frees a megabyte in each round would otherwise get every page of it anew.
    """
    torch.empty(LARGEST, dtype=torch.uint8)


PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Memory that is not shared with child processes; Windows has no other."""


class Workspace:
    """Memory for arrays, handed out again once nobody refers to them any more.

    Memory that a process touches for the first time costs up to a second a gigabyte (the system finds, clears and maps
    every page), which is longer than the arithmetic that is done on it; an allocator gives large arrays back to the
    system each time.

    Parameters
    ----------
    limit
        Bytes up to which memory is kept for later; arrays in use may take more.

    Notes
    -----
    Safe to use from several threads. An array may outlive its workspace.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        keep_freed_memory()
        self._blocks: list[mmap.mmap] = []
        self._lock = Lock()

    @property
    def size(self) -> int:
        """Bytes of all blocks, in use or kept."""
        return sum(map(len, self._blocks))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An array whose values are not set."""
        count = math.prod(shape)
        if count * dtype.itemsize < SMALL:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            block = self._block(count * dtype.itemsize)
            return torch.frombuffer(block, dtype=dtype, count=count).view(shape)

    def clear(self) -> None:
        """Keep nothing; arrays in use stay as they are."""
        with self._lock:
            self._blocks = []

    def __reduce__(self) -> tuple[type[Workspace], tuple[int]]:
        """A copy starts with nothing."""
        return Workspace, (self.limit,)

    def _block(self, size: int) -> mmap.mmap:
        free = self._free()
        fitting = [block for block in free if size <= len(block) <= ROOM * size]
        if fitting:
            return min(fitting, key=len)
        excess = self.size + size - self.limit
        for block in sorted(free, key=len, reverse=True):
            if excess <= 0:
                break
            excess -= len(block)
            self._blocks = [other for other in self._blocks if other is not block]
        del free, fitting
        try:
            self._blocks.append(mmap.mmap(-1, size, **PRIVATE))
        except OSError as error:
            raise MemoryError(f"{size / 1e6:.0f} MB for an array") from error
        return self._blocks[-1]

    def _free(self) -> list[mmap.mmap]:
        """Blocks that no array refers to: what is left are the list, the loop and the call that counts."""
        return [self._blocks[i] for i in range(len(self._blocks)) if sys.getrefcount(self._blocks[i]) == 2]
