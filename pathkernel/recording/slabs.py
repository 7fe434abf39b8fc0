"""Memory for the vectors of a recording, used again once nobody holds what was in it."""

from __future__ import annotations

import torch
from torch import Tensor

from pathkernel.runtime.workspace import Workspace

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

    A slab is used again when the last of its vectors has gone, as with a store that writes them to disk; see
    `pathkernel.runtime.workspace.Workspace` for what that saves.
    """

    def __init__(self) -> None:
        self.workspace = Workspace(FREE)
        self._slab: Tensor | None = None
        self._used = self._room = 0

    def empty(self, size: int, like: Tensor) -> Tensor:
        """An uninitialised vector (size,) of the type and on the device of another."""
        length = size * like.element_size()
        if like.device.type != "cpu" or length < SMALLEST:
            return torch.empty(size, dtype=like.dtype, device=like.device)
        if self._slab is None or self._slab.dtype != like.dtype or self._used + size > self._room:
            self._slab = None  # let go of the old one first: it may be the one that becomes free
            # A vector that would leave much of a slab over gets one of its own size.
            slab = self.workspace.empty((SLAB if length <= SLAB // 4 else length,), torch.uint8)
            self._slab = slab.view(like.dtype)
            self._used, self._room = 0, self._slab.numel()
        start, step = self._used, LINE // like.element_size()
        self._used = start + -(-size // step) * step
        return self._slab[start : start + size]
