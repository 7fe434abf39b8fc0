"""Blocks of steps on their way to the disk: they wait in a short queue, and a thread of its own writes them.

Ctrl-C interrupts the training thread between any two operations here. Each change of state is therefore a single one,
an item that joins or leaves a queue, and no lock is held that an interrupted thread would never give back.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pathkernel.trajectory.blocks import Region
from pathkernel.trajectory.step import Step

NICENESS = 10
"""Of the writer's thread: where training keeps all cores busy, a third runner among threads that wait for each other at
every operation would hold all of them up."""

LOOK = 0.05
"""Seconds after which a thread that waits looks by itself: word of a block may be lost to Ctrl-C."""


def give_way() -> None:
    """Let other threads go first; only Linux has priorities of single threads."""
    if sys.platform == "linux":
        me = threading.get_native_id()
        with contextlib.suppress(OSError):  # a container may forbid it
            os.setpriority(os.PRIO_PROCESS, me, max(NICENESS, os.getpriority(os.PRIO_PROCESS, me)))


@dataclass
class UnwrittenBlock:
    """Steps that are not on disk yet.

    Attributes
    ----------
    first, steps
        Index of the first step, and the steps; more may join until it is complete.
    previous
        θ at the end of the step before them.
    region
        Which θ they have.
    averages
        How averages moved, as far as that was not written before.
    complete
        Whether it is to be written.
    """

    first: int
    steps: list[Step]
    previous: Tensor | None
    region: Region
    averages: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @property
    def stop(self) -> int:
        """The step after its last."""
        return self.first + len(self.steps)


class Writer:
    """Writes blocks in their order, one at a time, while training goes on.

    Parameters
    ----------
    write
        Called in the writer's thread; the block leaves the queue when it returns.

    Attributes
    ----------
    failure
        What ``write`` raised; nothing is written afterwards, until `discard`.
    """

    def __init__(self, write: Callable[[UnwrittenBlock], None]) -> None:
        self._write = write
        self._blocks: deque[UnwrittenBlock] = deque()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # which can be interrupted at any point
        self._written: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="pathkernel writer", daemon=True)
        self._thread.start()

    def unwritten(self) -> list[UnwrittenBlock]:
        """All blocks that are not on disk; a block is there before it leaves."""
        return list(self._blocks)

    @property
    def last(self) -> UnwrittenBlock | None:
        """The block that came last, if it is not on disk."""
        try:
            return self._blocks[-1]
        except IndexError:
            return None

    @property
    def filling(self) -> UnwrittenBlock | None:
        """The block that further steps may join."""
        last = self.last
        return None if last is None or last.complete else last

    def begin(self, block: UnwrittenBlock) -> None:
        """Put a block behind the others."""
        self._blocks.append(block)

    def complete(self) -> None:
        """Let the last block be written."""
        if (block := self.last) is not None:
            block.complete = True
            self._wake.put(True)

    def wait(self, allowed: int = 0) -> None:
        """Wait until no more than so many complete blocks are left, or writing has failed."""
        while self.failure is None and sum(block.complete for block in self.unwritten()) > allowed:
            try:
                self._written.get(timeout=LOOK)
            except queue.Empty:
                self._wake.put(True)  # Ctrl-C may have come between the mark on a block and the word of it

    def discard(self) -> None:
        """Forget what was not written, and why."""
        self._blocks.clear()
        self.failure = None

    def stop(self) -> None:
        """Write the blocks that are complete, and end the thread."""
        self._wake.put(False)
        self._thread.join()

    def _work(self) -> None:
        give_way()
        going_on = True
        while going_on:
            going_on = self._wake.get()
            while self.failure is None and self._blocks and self._blocks[0].complete:
                try:
                    self._write(self._blocks[0])
                except BaseException as error:  # it surfaces at the next step
                    self.failure = error
                else:
                    self._blocks.popleft()
                self._written.put(None)
