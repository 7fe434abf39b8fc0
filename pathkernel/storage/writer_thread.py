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
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pathkernel.storage.blocks import Region
from pathkernel.trajectory.step import Step

NICENESS = 10
"""Of the writer's thread: where training keeps all cores busy, a third runner among threads that wait for each other at
every operation would hold all of them up."""

PERIOD = 1.0
"""Seconds that a step waits at most for its block to fill, where the disk keeps up."""

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
    complete
        Whether it is to be written.
    early
        How many of its steps were, or are being, written before it was complete.
    """

    first: int
    steps: list[Step]
    previous: Tensor | None
    region: Region
    complete: bool = False
    early: int = 0

    @property
    def stop(self) -> int:
        """The step after its last."""
        return self.first + len(self.steps)


class Writer:
    """Writes blocks in their order, one at a time, while training goes on.

    Steps whose block has not filled within `PERIOD` are written without waiting for the others: in a loop with few
    steps a second a process that is killed would lose minutes. Fast loops fill their blocks before.

    Parameters
    ----------
    write
        Called in the writer's thread with a block and the range of its steps to write; the block leaves the queue when
        it is complete and all of its steps are written.

    Attributes
    ----------
    failure
        What ``write`` raised; nothing is written afterwards, until `discard`.
    """

    def __init__(self, write: Callable[[UnwrittenBlock, range], None]) -> None:
        self._write = write
        self._blocks: deque[UnwrittenBlock] = deque()
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()  # which can be interrupted at any point
        self._written: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.failure: BaseException | None = None
        self._looked: tuple[UnwrittenBlock | None, int] = None, 0
        self._orphaned = False
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
        """The block that further steps may join, and that is not complete."""
        last = self.last
        return None if last is None or last.complete else last

    def orphan(self) -> None:
        """Neither write nor wait any more: a forked child has no copy of the thread."""
        self._orphaned = True

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
        if self._orphaned:
            return
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
        if self._orphaned:
            return
        self._wake.put(False)
        self._thread.join()

    def _work(self) -> None:
        give_way()
        going_on, look = True, time.monotonic() + PERIOD / 2
        while going_on:
            try:
                going_on = self._wake.get(timeout=max(0.0, look - time.monotonic()))
            except queue.Empty:
                look = time.monotonic() + PERIOD / 2
                self._write_late_steps()
            while self.failure is None and self._blocks and self._blocks[0].complete:
                block = self._blocks[0]
                if self._attempt(block, range(block.early, len(block.steps))):
                    self._blocks.popleft()
                self._written.put(None)

    def _write_late_steps(self) -> None:
        """Write what a look half a period ago found waiting already, and all that has come since."""
        block = self._blocks[0] if self._blocks else None
        waiting = self._looked[1] if block is self._looked[0] else 0
        if block is not None and self.failure is None and not block.complete and waiting > block.early:
            # Whoever appends sees the mark and begins another block; what slips in before is written with the rest.
            first, block.early = block.early, len(block.steps)
            self._attempt(block, range(first, block.early))
        self._looked = block, 0 if block is None else len(block.steps)

    def _attempt(self, block: UnwrittenBlock, steps: range) -> bool:
        try:
            if steps:
                self._write(block, steps)
        except BaseException as error:  # it surfaces at the next step
            self.failure = error
            return False
        return True
