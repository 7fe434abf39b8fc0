"""Memory for blocks of columns that are formed one after another, each in the place of the one before."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockMemory:
    """One piece of memory that is handed out again and again; whoever had it before finds other numbers in it.

    A block is overwritten while it is still in the processor's cache; a fresh one would be fetched into it first.
    """

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """A contiguous matrix whose numbers are not set, of the type and on the device of another tensor."""
        size, held = rows * columns, self._held
        if held is None or len(held) < size or held.dtype != like.dtype or held.device != like.device:
            held = self._held = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(rows, columns)
