"""Steps on their way to a store on disk: gathered in blocks, written by a thread while training goes on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pathkernel.errors import StoreError
from pathkernel.runtime.workspace import keep_freed_memory
from pathkernel.storage import fingerprints as identity
from pathkernel.storage.blocks import COLUMNS, Blocks, write_packed
from pathkernel.storage.encoding import BlockEncoder, Serials
from pathkernel.storage.format import MAX_CHUNK_BYTES, Compression, Group, synchronise
from pathkernel.storage.header import Header, StoredEnd, region_array
from pathkernel.storage.packed_values import end_values, start_values
from pathkernel.storage.stored_steps import StoredSteps
from pathkernel.storage.writer_thread import UnwrittenBlock, Writer
from pathkernel.trajectory.run import End, Extension, Run
from pathkernel.trajectory.step import Step

QUEUE = 4
"""Full blocks that may wait to be written before training waits for the disk."""
BLOCK_BYTES = 2**26
"""θ in a block; larger networks have fewer steps in each."""


def not_writable(path: Path, error: OSError) -> StoreError:
    """Refusal of a folder in which nothing can be written."""
    return StoreError(
        f"`{path}` cannot be written ({error.strerror})",
        "A store is a folder on a local file system that this process may write",
        'Write `store="runs/name"` with a folder of your own',
    )


def create_store(
    path: Path, run: Run, averages: Mapping[str, Any], flush_every: int, compression: Compression, durable: bool
) -> StoredSteps:
    """Make the folder for a run: the group's own zarr.json last, before which there is no store."""
    group, size = Group(path, durable), max(1, run.layout.size)
    in_chunk = MAX_CHUNK_BYTES // (8 * min(size, COLUMNS)) - 1
    in_memory = BLOCK_BYTES // (run.initial.itemsize * size)
    capacity = max(1, min(flush_every, in_chunk, in_memory))
    blocks = Blocks(group, run.dtype, capacity, compression)
    blocks.create()
    header = Header.of(run, averages, capacity)
    start = write_packed(group, "start", start_values(run, averages, header))
    blocks.start = start[1]
    constants = None if run.optimizer is None else write_packed(group, "optimizer", run.optimizer.constants)
    header = header.started(start, constants)
    group.set_attributes(header.to_json())
    if durable:
        synchronise(path.resolve().parent)
    return StoredSteps(path, blocks, header)


class StepWriter:
    """Writes steps behind those that a store holds.

    Parameters
    ----------
    stored
        Where they are written.
    standing
        Where the path ends, which `write_end` writes down; `standing` is replaced as training goes on.
    flush_every, on_error
        See `pathkernel.storage.disk.DiskStore`.

    Attributes
    ----------
    stopped
        Whether steps are no longer taken.
    """

    def __init__(self, stored: StoredSteps, standing: End, flush_every: int, on_error: str) -> None:
        self.stored = stored
        self.standing = standing
        self.flush_every = flush_every
        self.on_error = on_error
        self.stopped = False
        self._streams: dict[Any, int] = {}
        self._noted: dict[str, int] = {}

    @property
    def thread(self) -> Writer | None:
        """The thread that writes, between `start` and `stop`."""
        return self.stored.uncommitted.thread

    def start(self) -> None:
        """Begin to write, in a thread of its own."""
        keep_freed_memory()
        self.stored.uncommitted.thread = Writer(self._write)

    def stop(self) -> None:
        """Write what is complete, and end the thread."""
        if self.thread is not None:
            self._complete()  # where a second Ctrl-C interrupted `flush`
            self.thread.stop()
            self.stored.uncommitted.thread = None

    def leave_to_parent(self) -> None:
        """Neither write nor wait any more, in a forked child: the thread is not here."""
        self.stopped = True
        if self.thread is not None:
            self.thread.orphan()

    def resume(self, steps: int, end: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Go on after the first steps of a store that was loaded and locked; later ones are cut off.

        Parameters
        ----------
        steps
            How many steps are kept.
        end
            θ after the last of them, with which the next step will begin.
        buffers
            Buffers that had changed by then.
        """
        stored = self.stored
        blocks = stored.blocks
        serial = next((n for n, mapping in stored.mappings() if mapping is buffers), None)
        blocks.refresh()
        old = stored.header.end
        try:
            self._write_header(stored.header.ended(None))  # before a commit goes: the record is not finished any more
            blocks.truncate(steps)
        except OSError as error:
            raise not_writable(stored.path, error) from error
        if old is not None:
            blocks.group.remove_array(old.values[0])
        stored.clear()
        stored.pinned = {}  # the numbers of what is cut off are given again
        following = 0
        if blocks.count:
            record = blocks.record(blocks.count - 1)
            self._streams = {(key, dtype): number for key, dtype, number in record["streams"]}
            following = 1 + max(record["mappings"])
        serials = Serials(max(following, 0 if serial is None else serial + 1))
        if serial is not None:
            serials.current = [(buffers, serial)]
        self._noted = {name: len(record.updates) for name, record in self.standing.averages.items()}
        stored.uncommitted.serials = serials
        stored.uncommitted.end = steps, end

    def _write_header(self, header: Header) -> None:
        self.stored.blocks.group.set_attributes(header.to_json())
        self.stored.header = header

    def append(self, step: Step) -> None:
        """Take a step; it is written when its block is full.

        Raises
        ------
        Exception
            What the writer thread met before, unless the disk gave out and training is to go on.
        """
        self._check_failure()
        if self.stopped:
            return
        stored, writer = self.stored, self.thread
        assert writer is not None
        block = writer.filling
        if block is not None and block.early:  # steps came too slowly to fill it
            self._complete()
            block = None
        if block is None:
            block = UnwrittenBlock(step.index, [step], self._last_point(), stored.regions[-1])
            writer.begin(block)
        else:
            block.steps.append(step)
        stored.uncommitted.end = step.index + 1, step.after
        if len(block.steps) >= stored.header.capacity:
            self._complete()
            writer.wait(QUEUE if self.flush_every > 1 else 0)  # with 1, a step that was acknowledged is on disk

    def _last_point(self) -> Tensor | None:
        """The very tensor that the path ended with so far."""
        stored, length = self.stored, len(self.stored)
        end = stored.uncommitted.end
        if end is not None and end[0] == length:
            return end[1]
        if length:
            return stored.read(length - 1).after
        return None if stored.run is None else stored.run.initial

    def _complete(self) -> None:
        """Let the steps that came last be written."""
        writer = self.thread
        assert writer is not None
        if writer.filling is not None:
            writer.complete()

    def flush(self) -> None:
        """Write all steps that were appended, and wait for it."""
        writer = self.thread
        if writer is None or self.stopped:
            return
        self._check_failure()
        self._complete()
        writer.wait()
        self._check_failure()

    def extend(self, tail: Tensor, pad: Extension) -> None:
        """Write all steps, and begin a new region of blocks with longer vectors."""
        self.flush()
        stored, layout = self.stored, pad.run.layout
        header = stored.header
        try:
            length, checksum = write_packed(stored.blocks.group, region_array(len(header.layouts)), tail)
            self._write_header(header.extended(layout, length, checksum))
        except OSError as error:
            self._give_out(error)
        stored.run = pad.run
        end = stored.uncommitted.end
        stored.uncommitted.end = None if end is None else (end[0], pad(end[1]))
        stored.lengthen(layout, tail)

    def write_end(self, run: Run) -> None:
        """Write where the path ends now, beside the end that is there, which is removed after that."""
        stored, standing = self.stored, self.standing
        group = stored.blocks.group
        earlier = [int(n[4:]) for n in group.arrays() if n.startswith("end-") and n[4:].isdigit()]
        name = f"end-{1 + max(earlier, default=0)}"
        try:
            length, checksum = write_packed(group, name, end_values(run, standing))
            serials = {id(mapping): serial for mapping, serial in stored.uncommitted.serials.current}
            serial = serials.get(id(standing.final_buffers), -1)
            if serial >= 0:
                stored.pinned[serial] = standing.final_buffers
            outputs = None if standing.outputs is None else standing.outputs.tolist()
            samples = 0 if run.data.limit is not None else len(run.data), list(run.data.lengths)
            end = StoredEnd((name, length), len(stored), identity.weights(run.model), serial, outputs, samples)
            self._write_header(stored.header.ended(end, checksum))
        except OSError as error:
            self._give_out(error)
        else:
            for number in earlier:
                group.remove_array(f"end-{number}")

    # -- the thread's part, and what it met -----------------------------------------------------------------------

    def _write(self, block: UnwrittenBlock, which: range) -> None:
        blocks, serials = self.stored.blocks, self.stored.uncommitted.serials
        extras = blocks.commit(blocks.count - 1).extras if blocks.count else 0
        encoder = BlockEncoder(block.region.layout, self._streams, serials, extras)
        steps = block.steps[which.start : which.stop]
        encoded = encoder.encode(steps, block.steps[which.start - 1].after if which.start else block.previous)
        encoded.record["averages"] = self._new_moves(block.first + which.stop)
        blocks.write(encoded, block.region, block.first + which.start)
        serials.forget()
        self._forget_end()

    def _new_moves(self, steps: int) -> dict[str, list[Any]]:
        """How averages moved up to a step, as far as that was not written before."""
        moves = {}
        for name, record in self.standing.averages.items():
            first = self._noted.get(name, 0)
            new = list(record.updates[first : max(first, steps)])
            moves[name] = [first, new]
            self._noted[name] = first + len(new)
        return moves

    def _forget_end(self) -> None:
        """Take the end out of the header, when further steps were committed after `write_end`.

        Not before they are, or else a process that is killed between them loses changes after the last step.
        """
        header = self.stored.header
        if header.end is not None:
            self._write_header(header.ended(None))  # its values stay, for who reads them now, until the next end

    def _check_failure(self) -> None:
        """Raise what the writer thread met; a disk that gave out ends the recording instead, with one warning."""
        writer = self.thread
        if writer is None or (failure := writer.failure) is None:
            return
        self.stopped = True
        self.stored.uncommitted.end = None
        writer.discard()
        if not isinstance(failure, OSError):
            raise failure
        self._give_out(failure)

    def _give_out(self, error: OSError) -> None:
        self.stopped = True
        path = self.stored.path
        try:
            status = os.statvfs(path)
            free = f"{status.f_bavail * status.f_frsize / 1e6:.1f} MB free"
        except OSError:
            free = "free space unknown"
        message = (
            f"`{path}` cannot be written any more ({error.strerror}; {free}). Recording has stopped: the first "
            f"{len(self.stored)} steps are kept and can be read. Training goes on unrecorded; make room and start "
            "again from a checkpoint at or before that step to go on recording."
        )
        if self.on_error == "raise":
            raise StoreError(*message.rstrip(".").split(". ", 2)) from error
        warnings.warn(message, RuntimeWarning, stacklevel=5)  # whoever calls the store
