"""Memory for large arrays that is used again, call after call."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import time
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 20
"""Bytes up to which an array comes from the allocator, which has such memory at hand. Chosen, not measured."""

ROOM = 1.25
"""How much larger than asked for a block may be: less finds no block for batches of a little fewer samples, more keeps
memory that nobody uses. Chosen, not measured."""

LARGEST = 31 << 20
"""Bytes of the largest blocks that the C library keeps for later, once it has seen one freed: just below glibc's own
limit (DEFAULT_MMAP_THRESHOLD_MAX, 32 MiB on 64 bits), from which on it never keeps one."""

KEPT = 0.75
"""Part of a budget up to which the process grows before what is free is given back; that the budget is kept is measured
by tests/kernel_machine/test_memory_budget.py."""

FASTEST = 16e9
"""Bytes a second that a process may grow by: between two looks at its size it stays within a sixteenth of the budget.
Chosen, to be above what several threads touch for the first time."""

MEASURED: ContextVar[bool] = ContextVar("MEASURED", default=False)
"""Whether allocations are being counted: all arrays then come from torch's allocator."""

CPU = torch.device("cpu")

PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Memory that is not shared with child processes; Windows has no other."""


def keep_freed_memory(largest: int = LARGEST) -> None:
    """Let the C library keep the memory of intermediate results that are freed.

    glibc gives memory back to the system from the size of the largest block on that it has seen freed, up to 32 MB. A
    loop that frees a megabyte in each round would otherwise get every page of it anew.

    Parameters
    ----------
    largest
        Bytes of the largest blocks to be kept.
    """
    torch.empty(max(1, min(LARGEST, largest)), dtype=torch.uint8, device=CPU)


class FreedMemory:
    """Memory of intermediate results that were freed: inside, kept for the next ones, within a budget.

    What is kept in pieces that fit nothing else adds up, to several times of what is in use. Once the process has grown
    by three quarters of the budget, which is a little more than is planned with, all that is free is given back to the
    system: what a pass then takes is fetched anew, page by page, which is a good part of its time.

    Parameters
    ----------
    budget
        Bytes by which the process may grow.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.start, self._left = budget, _resident(), 0
        self._wait, self._due = budget / 16 / FASTEST, 0.0

    def __enter__(self) -> FreedMemory:
        keep_freed_memory(self.budget // 32)
        self._token = _FREED.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _FREED.reset(self._token)

    def _grown(self) -> int:
        return (_resident() or 0) - (self.start or 0)

    def give_back(self) -> None:
        """Give free memory back where the process has grown by more than `KEPT` of the budget since it began."""
        now = time.monotonic()
        if now < self._due or self.start is None or (trim := _trim()) is None:
            return
        self._due = now + self._wait
        if self._grown() > max(KEPT * self.budget, self._left + self.budget // 16):
            trim(0)
            self._left = self._grown()


_FREED: ContextVar[FreedMemory | None] = ContextVar("_FREED", default=None)


def give_back_freed_memory() -> None:
    """Between two intermediate results: `FreedMemory.give_back` of whoever keeps a budget."""
    if (freed := _FREED.get()) is not None:
        freed.give_back()


def _resident() -> int | None:
    """Bytes of this process in memory, where the system tells."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return None


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None elsewhere."""
    try:
        return cast("Callable[[int], int]", ctypes.CDLL(None).malloc_trim)
    except (AttributeError, OSError, TypeError):
        return None


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
        self._free: list[mmap.mmap] = []
        self._used: dict[int, int] = {}

    @property
    def kept(self) -> int:
        """Bytes that nobody uses."""
        return sum(map(len, list(self._free)))

    @property
    def used(self) -> int:
        """Bytes of arrays in use."""
        return sum(list(self._used.values()))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
        """An array whose values are not set; elsewhere than on the CPU it is the allocator's."""
        count = math.prod(shape)
        if MEASURED.get() or device.type != "cpu" or count * dtype.itemsize < SMALL:
            return torch.empty(shape, dtype=dtype, device=device)
        block = self._block(count * dtype.itemsize)
        self._used[id(block)] = len(block)
        array = np.frombuffer(block, dtype=np.uint8)
        # Tensors and their views, and arrays that share their memory, all hold this one.
        weakref.finalize(array, _release, self._free, self._used, self.limit, block).atexit = False
        return torch.from_numpy(array)[: count * dtype.itemsize].view(dtype).view(shape)

    def clear(self) -> None:
        """Keep nothing; arrays in use stay as they are."""
        self._free.clear()

    def __reduce__(self) -> tuple[type[Workspace], tuple[int]]:
        """A copy starts with nothing."""
        return Workspace, (self.limit,)

    def _block(self, size: int) -> mmap.mmap:
        """One that is free, or a new one. Other threads may take and give meanwhile: what is gone is gone."""
        free = sorted(list(self._free), key=len)
        for block in free:
            if size <= len(block) <= ROOM * size:
                with contextlib.suppress(ValueError):
                    self._free.remove(block)
                    return block
        for block in reversed(free):
            if self.used + self.kept + size <= self.limit:
                break
            with contextlib.suppress(ValueError):
                self._free.remove(block)
        del free
        try:
            return mmap.mmap(-1, size, **PRIVATE)
        except OSError as error:
            raise MemoryError(f"{size / 1e6:.0f} MB for an array") from error


def _release(free: list[mmap.mmap], used: dict[int, int], limit: int, block: mmap.mmap) -> None:
    """Keep a block for the next arrays, up to a limit."""
    used.pop(id(block), None)
    if sum(map(len, list(free))) + len(block) <= limit:
        free.append(block)
