"""Steps kept on disk, written in blocks by a thread of their own while training goes on."""

from __future__ import annotations

import atexit
import os
import stat
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import SENSELESS, CorruptBlockError, InputError, StoreError
from pathkernel.runtime.workspace import keep_freed_memory
from pathkernel.storage import fingerprints as identity
from pathkernel.storage.blocks import COLUMNS, Blocks, Recent, Region, read_packed, write_packed
from pathkernel.storage.decoding import StoredBlock
from pathkernel.storage.encoding import BlockEncoder, Serials
from pathkernel.storage.format import MAX_CHUNK_BYTES, Compression, Group, Lock, damaged, synchronise
from pathkernel.storage.header import (
    Header,
    StoredEnd,
    checked_end,
    checked_start,
    end_values,
    region_array,
    start_values,
)
from pathkernel.storage.writer_thread import UnwrittenBlock, Writer
from pathkernel.trajectory.run import End, Extension, Run
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.store import Store
from pathkernel.update_rules.rule import UpdateRule

QUEUE = 4
"""Full blocks that may wait to be written before training waits for the disk."""
BLOCK_BYTES = 2**26
"""θ in a block; larger networks have fewer steps in each."""


class DiskStore(Store):
    """Steps in a folder, as written down in docs/reference/storage_format.md.

    As a value, given to `pathkernel.KernelRecorder`, it says where and how to write; the folder is made, or found and
    gone on with, when recording starts.

    Parameters
    ----------
    path
        The folder.
    flush_every
        Steps in a block; one that has not filled within a second is written as it is. A process that is killed loses
        the steps that were not written yet: those of the last second where the disk keeps up, and at most
        ``(4 + 2) * flush_every``. With 1, `append` returns when its step is written, and none is lost. Larger blocks
        compress better.
    durable
        Wait for the disk itself after every file: safe against loss of power, some milliseconds for each block.
    on_error
        When the disk gives out: ``"stop"`` warns once, stops recording and lets training go on; ``"raise"`` raises
        at the next step.
    compression
        ``"fast"`` or ``"small"``: about 6 % smaller for more than twice the time.

    Notes
    -----
    Time per step in the training thread: a list entry; the copies, compression and files are the writer thread's.
    Memory: at most 6 blocks while writing, 3 while reading.

    Examples
    --------
    >>> DiskStore("runs/digits", flush_every=1, durable=True)
    DiskStore('runs/digits', 0 steps)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        flush_every: int = 16,
        durable: bool = False,
        on_error: str = "stop",
        compression: str = "fast",
    ) -> None:
        if type(flush_every) is not int or not 1 <= flush_every <= 1024:
            raise InputError(
                f"`flush_every={flush_every!r}` was given",
                "A block has between 1 and 1024 steps",
                'Write `DiskStore("runs/name", flush_every=16)`',
            )
        for name, given, known in (
            ("on_error", on_error, ("stop", "raise")),
            ("compression", compression, ("fast", "small")),
        ):
            if given not in known:
                raise InputError(
                    f"`{name}={given!r}` was given",
                    f"It is one of {', '.join(map(repr, known))}",
                    f'Write `DiskStore("runs/name", {name}={known[0]!r})`',
                )
        self.path = Path(path)
        self.flush_every, self.durable, self.on_error, self.compression = flush_every, durable, on_error, compression
        self.header: Header | None = None
        self.rule: UpdateRule | None = None
        self._blocks: Blocks | None = None
        self._regions: list[Region] = []
        self._tails: list[Tensor] = []
        self.run: Run | None = None
        self._standing = End()
        self.device: torch.device | None = None  # where steps are put before there is a run
        self._lock: Lock | None = None
        self._writer: Writer | None = None
        self._end: tuple[int, Tensor] | None = None
        self._serials, self._streams = Serials(), {}  # type: ignore[var-annotated]
        self._noted: dict[str, int] = {}
        self._recent, self._boundaries = Recent(3), Recent(8)
        self._pinned: dict[int, Mapping[str, Tensor]] = {}
        self.stopped = self._orphaned = False

    def __repr__(self) -> str:
        return f"DiskStore({str(self.path)!r}, {len(self)} steps)"

    # -- travelling -----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Where it is, how it is read, and how to tell that it is the same."""
        if "_travelled" in vars(self):
            return vars(self)["_travelled"]
        options = {name: getattr(self, name) for name in ("flush_every", "durable", "on_error", "compression")}
        self.flush()
        last = self._last_commit()
        belongs = {"rule": self.rule, "run": self.run, "_pinned": self._pinned} if last else {}
        return {"path": self.path.absolute(), "options": options, "last": last, "belongs": belongs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["last"] is None:
            self.__init__(state["path"], **state["options"])  # type: ignore[misc]
        else:
            vars(self).update(path=state["path"], _travelled=state)  # read when somebody asks

    def __getattr__(self, name: str) -> Any:
        """Anything of a store that has travelled and was not read since."""
        state = vars(self).get("_travelled")
        if state is None or name.startswith("__"):
            raise AttributeError(f"'DiskStore' object has no attribute {name!r}")
        found = DiskStore.open(state["path"], **state["options"])
        if found._last_commit() != state["last"]:
            raise StoreError(
                f"`{found.path}` does not hold what it held when a trajectory or a kernel on it was saved",
                f"It held {state['last'][1] + state['last'][2]} steps then, with other contents or fewer or more than "
                "now",
                "Put the folder back from a copy, or make the kernel anew from `Trajectory.open(path, ...)`",
            )
        del vars(self)["_travelled"]
        belongs = state["belongs"]
        if "_trajectory" in belongs:  # saved by an earlier version
            belongs = {**belongs, "run": belongs["_trajectory"].run}
        vars(self).update({**vars(found), **belongs})
        return getattr(self, name)

    def _last_commit(self) -> tuple[int, ...] | None:
        """Last commit, which tells the content of a store from another's; None before it has any."""
        if self._blocks is None or not self._blocks.count:
            return None
        return tuple(vars(self._blocks.commit(self._blocks.count - 1)).values())

    # -- opening --------------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:  # type: ignore[override]
        """True where the folder holds a store that this object has not opened yet."""
        return self._blocks is None and (self.path / "zarr.json").exists()

    @classmethod
    def open(cls, path: str | os.PathLike[str], **options: Any) -> DiskStore:
        """A store that is there, for reading; nothing is changed on disk, and somebody may be writing.

        Reads the header and the last commit only.

        Raises
        ------
        StoreError
            Where there is none, or in a format that is not known.
        CorruptBlockError
            Where its header or its last commit are damaged.
        """
        store = cls(path, **options)
        store.load()
        return store

    def load(self) -> Header:
        """Read the header of the store that is there; see `open`."""
        group = Group.open(self.path, self.durable)
        header = Header.read(group)
        self.header = header
        self._regions = [Region(i, layout) for i, layout in enumerate(header.layouts)]
        self._blocks = Blocks(
            group, header.dtype, header.capacity, self._compression, start=header.checksums.get("start")
        )
        self._tails = [
            self._tensor(self._packed(region_array(i), length), group) for i, length in enumerate(header.tails, start=1)
        ]
        steps, end = self.refresh(), header.end
        if end is not None and end.steps > steps:
            raise damaged(group.path / "commit", f"steps {steps}–{end.steps - 1} are missing, of {end.steps} recorded")
        return header

    @staticmethod
    def _tensor(value: Any, group: Group) -> Tensor:
        if not isinstance(value, Tensor) or value.dim() != 1:
            raise damaged(group.path, "the values of parameters that joined are no vector")
        return value

    def _packed(self, name: str, length: int) -> Any:
        """A packed value, which must be the one that the header was written with."""
        assert self._blocks is not None and self.header is not None
        return read_packed(self._blocks.group, name, length, self.header.checksums.get(name))

    def _sensible(self, name: str, checked: Callable[[Any, Header], dict[str, Any]], values: Any) -> dict[str, Any]:
        """Packed values that have the form they should have."""
        assert self.header is not None
        try:
            return checked(values, self.header)
        except SENSELESS as error:
            raise damaged(self.path / name, f"it makes no sense ({str(error)[:100]})") from None

    @property
    def _compression(self) -> Compression:
        return Compression("lz4" if self.compression == "fast" else "zstd")

    def refresh(self) -> int:
        """Look for steps that were committed since, by another process; returns how many there are in all."""
        assert self._blocks is not None
        self._blocks.refresh()
        steps = self._blocks.steps
        if self.header is not None and self.header.end is not None and self.header.end.steps < steps:
            self.header = self.header.ended(None)  # it was written while recording went on, see `write_end`
        return steps

    @property
    def tails(self) -> list[Tensor]:
        """Values of the parameters that joined θ, in their order."""
        return self._tails

    def start_values(self) -> dict[str, Any]:
        """θ_0, constants, first optimizer memory and averages, as packed when recording began."""
        assert self._blocks is not None and self.header is not None
        return self._sensible("start", checked_start, self._packed("start", self.header.start))

    def optimizer_constants(self) -> dict[str, Any]:
        """Constants of the optimizer, for a recording with keyframes; see `Replay.constants`."""
        assert self._blocks is not None and self.header is not None and self.header.replay is not None
        constants = self._packed("optimizer", self.header.replay["constants"])
        right = isinstance(constants, dict) and set(constants) == {"groups", "made_of"}
        right = right and isinstance(constants["groups"], list) and isinstance(constants["made_of"], dict)
        right = right and all(isinstance(group, dict) for group in constants["groups"])
        if not right or not all(isinstance(name, str) for name in constants["made_of"]):
            raise damaged(self._blocks.group.path / "optimizer", "it makes no sense")
        return constants

    def end_values(self) -> dict[str, Any] | None:
        """Tail, final buffers and averages; None where recording was cut off."""
        assert self._blocks is not None and self.header is not None
        if (end := self.header.end) is None:
            return None
        values = self._sensible(end.values[0], checked_end, self._packed(*end.values))
        if end.buffers >= 0:
            self._pinned[end.buffers] = values["final_buffers"]
        return values

    # -- writing --------------------------------------------------------------------------------------------------

    def note_end(self, end: End) -> None:
        """Keep for `write_end`."""
        self._standing = end

    def begin(self, run: Run) -> None:
        """Make the folder for a run, or lock it again after `close`.

        Raises
        ------
        StoreError
            Where it cannot be written, is being written, or holds a store already.
        """
        if self._lock is not None:
            return
        if self._orphaned:
            raise StoreError(
                f"`{self.path}` is written by process {os.getppid()}, of which this one was forked",
                "A store has one writer, and its parent may have written further steps since",
                "Make a new KernelRecorder in this process, with another path",
            )
        if self.run is not None and self.run.data is run.data:  # every recording has its own
            self.lock()
        else:
            if self.exists:
                raise StoreError(
                    f"`{self.path}` holds a store already",
                    "A new recording goes into a folder of its own",
                    "Give another path, or delete this folder",
                )
            self.lock()
            try:
                self._create(run)
            except OSError as error:
                self.unlock()
                raise self._not_writable(error) from error
        self.run, self.rule = run, run.rule
        self._start_writing()

    def lock(self) -> None:
        """Be the only writer.

        Raises
        ------
        StoreError
            Where somebody else is, or the folder cannot be written.
        """
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.path)
            lock.acquire()
        except OSError as error:
            raise self._not_writable(error) from error
        self._lock = lock

    def _not_writable(self, error: OSError) -> StoreError:
        return StoreError(
            f"`{self.path}` cannot be written ({error.strerror})",
            "A store is a folder on a local file system that this process may write",
            'Write `store="runs/name"` with a folder of your own',
        )

    def unlock(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def drop_regions(self, last: int) -> None:
        """Leave out the steps since θ was extended for the first time after a region."""
        if last == len(self._regions) - 1:
            return
        assert self._blocks is not None and self.header is not None
        blocks = self._blocks
        while blocks.count and blocks.commit(blocks.count - 1).region > last:
            blocks.count -= 1
        self._regions, self._tails = self._regions[: last + 1], self._tails[:last]
        self.header = self.header.without_regions(last)
        self._clear()

    def resume(self, run: Run, standing: End, steps: int, end: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Go on after the first steps of a store that was loaded and locked; later ones are cut off.

        Parameters
        ----------
        run, standing
            What will be recorded, and where it stands.
        steps
            How many steps are kept.
        end
            θ after the last of them, with which the next step will begin.
        buffers
            Buffers that had changed by then.
        """
        assert self._blocks is not None and self.header is not None
        serial = next((n for n, mapping in self._mappings() if mapping is buffers), None)
        self._blocks.refresh()
        old = self.header.end
        try:
            self._write_header(self.header.ended(None))  # before a commit goes: the record is not finished any more
            self._blocks.truncate(steps)
        except OSError as error:
            raise self._not_writable(error) from error
        if old is not None:
            self._blocks.group.remove_array(old.values[0])
        self._clear()
        self._pinned = {}  # the numbers of what is cut off are given again
        following = 0
        if self._blocks.count:
            record = self._blocks.record(self._blocks.count - 1)
            self._streams = {(key, dtype): number for key, dtype, number in record["streams"]}
            following = 1 + max(record["mappings"])
        self._serials = Serials(max(following, 0 if serial is None else serial + 1))
        if serial is not None:
            self._serials.current = [(buffers, serial)]
        self._noted = {name: len(record.updates) for name, record in standing.averages.items()}
        self._end = (steps, end)
        self.run, self.rule, self._standing = run, run.rule, standing
        self._start_writing()

    def _create(self, run: Run) -> None:
        """Everything but the group's own zarr.json, and that last: before it, there is no store."""
        group, size = Group(self.path, self.durable), max(1, run.layout.size)
        in_chunk = MAX_CHUNK_BYTES // (8 * min(size, COLUMNS)) - 1
        in_memory = BLOCK_BYTES // (run.initial.itemsize * size)
        capacity = max(1, min(self.flush_every, in_chunk, in_memory))
        self._blocks = Blocks(group, run.dtype, capacity, self._compression)
        self._blocks.create()
        averages = self._standing.averages
        header = Header.of(run, averages, capacity)
        start = write_packed(group, "start", start_values(run, averages, header))
        self._blocks.start = start[1]
        self._regions = [Region(0, run.layout)]
        constants = None if run.optimizer is None else write_packed(group, "optimizer", run.optimizer.constants)
        self._write_header(header.started(start, constants))
        if self.durable:
            synchronise(self.path.resolve().parent)

    def _write_header(self, header: Header) -> None:
        assert self._blocks is not None
        self._blocks.group.set_attributes(header.to_json())
        self.header = header

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
        assert self.header is not None
        writer = self._writer
        assert writer is not None
        block = writer.filling
        if block is not None and block.early:  # steps came too slowly to fill it
            self._complete()
            block = None
        if block is None:
            block = UnwrittenBlock(step.index, [step], self._last_point(), self._regions[-1])
            writer.begin(block)
        else:
            block.steps.append(step)
        self._end = (step.index + 1, step.after)
        if len(block.steps) >= self.header.capacity:
            self._complete()
            writer.wait(QUEUE if self.flush_every > 1 else 0)  # with 1, a step that was acknowledged is on disk

    def _last_point(self) -> Tensor | None:
        """The very tensor that the path ended with so far."""
        length = len(self)
        if self._end is not None and self._end[0] == length:
            return self._end[1]
        if length:
            return self.read(length - 1).after
        return None if self.run is None else self.run.initial

    def _complete(self) -> None:
        """Let the steps that came last be written."""
        assert self._writer is not None
        if self._writer.filling is not None:
            self._writer.complete()

    def flush(self) -> None:
        """Write all steps that were appended, and wait for it."""
        if self._writer is None or self.stopped:
            return
        self._check_failure()
        self._complete()
        self._writer.wait()
        self._check_failure()

    def write_end(self) -> None:
        """Write all steps, and where the path ends now; see `Store.write_end`."""
        self.flush()
        if self._lock is not None and not self.stopped and self.run is not None:
            self._write_end(self.run, self._standing)

    def close(self) -> None:
        """Write all steps and the end of the trajectory, end the thread, give the lock up.

        The steps stay readable. `begin` locks the folder again, and `append` may follow.
        """
        if self._lock is None:
            return
        try:
            self.write_end()
        finally:
            self._stop_writing()
            self.unlock()

    def _write_end(self, run: Run, standing: End) -> None:
        assert self._blocks is not None and self.header is not None
        group = self._blocks.group
        earlier = [int(n[4:]) for n in group.arrays() if n.startswith("end-") and n[4:].isdigit()]
        name = f"end-{1 + max(earlier, default=0)}"
        try:
            length, checksum = write_packed(group, name, end_values(run, standing))
            serials = {id(mapping): serial for mapping, serial in self._serials.current}
            serial = serials.get(id(standing.final_buffers), -1)
            if serial >= 0:
                self._pinned[serial] = standing.final_buffers
            outputs = None if standing.outputs is None else standing.outputs.tolist()
            samples = 0 if run.data.limit is not None else len(run.data), list(run.data.lengths)
            end = StoredEnd((name, length), len(self), identity.weights(run.model), serial, outputs, samples)
            self._write_header(self.header.ended(end, checksum))
        except OSError as error:
            self._give_out(error)
        else:
            for number in earlier:
                group.remove_array(f"end-{number}")

    # -- the writer's part ----------------------------------------------------------------------------------------

    def _start_writing(self) -> None:
        keep_freed_memory()
        self._writer = Writer(self._write)
        me, process = weakref.ref(self), os.getpid()

        def at_exit() -> None:
            store = me()
            if store is not None and os.getpid() == process:
                outer = store if store.outer is None else store.outer
                outer.close()  # which may hold steps that it has not handed on yet

        self._at_exit = at_exit
        atexit.register(at_exit)
        _WRITING.add(self)

    def _stop_writing(self) -> None:
        if self._writer is None:
            return
        self._complete()  # where a second Ctrl-C interrupted `flush`
        self._writer.stop()
        atexit.unregister(self._at_exit)
        self._writer = None
        _WRITING.discard(self)

    def _leave_to_parent(self) -> None:
        """Leave the store to the parent, in a forked child: the thread that writes is not here.

        Steps that have not been written stay readable.
        """
        self.stopped = self._orphaned = True
        if self._writer is not None:
            self._writer.orphan()
        if self._lock is not None:
            self._lock.release()  # which leaves it with the parent
            self._lock = None
        atexit.unregister(self._at_exit)

    def _write(self, block: UnwrittenBlock, which: range) -> None:
        blocks = self._blocks
        assert blocks is not None
        extras = blocks.commit(blocks.count - 1).extras if blocks.count else 0
        encoder = BlockEncoder(block.region.layout, self._streams, self._serials, extras)
        steps = block.steps[which.start : which.stop]
        encoded = encoder.encode(steps, block.steps[which.start - 1].after if which.start else block.previous)
        encoded.record["averages"] = self._new_moves(block.first + which.stop)
        blocks.write(encoded, block.region, block.first + which.start)
        self._serials.forget()
        self._forget_end()

    def _new_moves(self, steps: int) -> dict[str, list[Any]]:
        """How averages moved up to a step, as far as that was not written before."""
        moves = {}
        for name, record in self._standing.averages.items():
            first = self._noted.get(name, 0)
            new = list(record.updates[first : max(first, steps)])
            moves[name] = [first, new]
            self._noted[name] = first + len(new)
        return moves

    def _forget_end(self) -> None:
        """Take the end out of the header, when further steps were committed after `write_end`.

        Not before they are, or else a process that is killed between them loses changes after the last step.
        """
        if self.header is not None and self.header.end is not None:
            self._write_header(self.header.ended(None))  # its values stay, for who reads them now, until the next end

    def _check_failure(self) -> None:
        """Raise what the writer thread met; a disk that gave out ends the recording instead, with one warning."""
        writer = self._writer
        if writer is None or (failure := writer.failure) is None:
            return
        self.stopped, self._end = True, None
        writer.discard()
        if not isinstance(failure, OSError):
            raise failure
        self._give_out(failure)

    def _give_out(self, error: OSError) -> None:
        self.stopped = True
        try:
            status = os.statvfs(self.path)
            free = f"{status.f_bavail * status.f_frsize / 1e6:.1f} MB free"
        except OSError:
            free = "free space unknown"
        message = (
            f"`{self.path}` cannot be written any more ({error.strerror}; {free}). Recording has stopped: the first "
            f"{len(self)} steps are kept and can be read. Training goes on unrecorded; make room and start again "
            "from a checkpoint at or before that step to go on recording."
        )
        if self.on_error == "raise":
            raise StoreError(*message.rstrip(".").split(". ", 2)) from error
        warnings.warn(message, RuntimeWarning, stacklevel=4)

    # -- reading --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        unwritten = None if self._writer is None else self._writer.last
        if unwritten is not None:
            return unwritten.stop
        return 0 if self._blocks is None else self._blocks.steps

    def read(self, index: int) -> Step:
        """A step; its whole block is read, and kept while its neighbours are.

        Raises
        ------
        CorruptBlockError
            Where the block is damaged, with its steps.
        """
        step = self._in_memory(index)
        return self._block(self._find(index)).step(index) if step is None else step

    def _in_memory(self, index: int) -> Step | None:
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of {len(self)}")
        for block in [] if self._writer is None else self._writer.unwritten():
            if block.first <= index < block.stop:
                return block.steps[index - block.first]
        return None

    def _find(self, index: int) -> int:
        assert self._blocks is not None
        return self._blocks.find(index)

    def _block(self, number: int) -> StoredBlock:
        def make() -> StoredBlock:
            blocks = self._blocks
            assert blocks is not None
            commit = blocks.commit(number)
            with blocks.named(number):
                if commit.region >= len(self._regions):
                    raise damaged(self.path / "zarr.json", f"lacks region {commit.region}")
            tails = self._tails[commit.region :]
            tail = torch.cat(tails) if tails else None
            device = self.device if self.run is None else self.run.device
            region = self._regions[commit.region]
            thinned = self.header is not None and self.header.schedule.weights_only
            known = self._boundary, self._known_mapping
            return StoredBlock(blocks, number, region, tail, *known, self.rule, thinned, device)

        return self._recent.get(number, make)

    def _boundary(self, number: int, make: Callable[[], Tensor]) -> Tensor | None:
        """The first θ of a block where it is also the last of the block before."""
        blocks = self._blocks
        assert blocks is not None
        if number < blocks.count:
            if not blocks.commit(number).joined:
                return None
            if number == 0 and self.run is not None and self.run.has_read_start:
                return self.run.initial
        else:
            steps = blocks.steps
            following = self._in_memory(steps) if steps < len(self) else None
            if following is not None:
                end = following.before
                return end if torch.equal(end, make()) else None
            if self._end is not None and self._end[0] == steps:
                return self._end[1]
        return self._boundaries.get(number, make)

    def _known_mapping(self, serial: int) -> Mapping[str, Tensor] | None:
        return next((mapping for number, mapping in self._mappings() if number == serial), None)

    def _mappings(self) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """Mappings of buffers that are at hand, with their serial numbers."""
        yield from self._pinned.items()
        yield from ((number, mapping) for mapping, number in list(self._serials.current))
        for block in self._recent.values():
            yield from block.mappings.items()

    def vector(self, index: int) -> Tensor:
        """θ before a step; gradients and frozen tensors are not read.

        Raises
        ------
        StoreError
            For a step between keyframes, which has to be trained again first.
        """
        step = self._in_memory(index)
        return self._kept(self._block(self._find(index)).vector(index) if step is None else step.before, index)

    def final(self) -> Tensor:
        """θ at the end of the path.

        Raises
        ------
        StoreError
            Where a recording with keyframes was cut off: the last steps have to be trained again first.
        """
        if (end := self.end_values()) is not None and (end["tail"] or end["final"] is not None):
            return end["tail"][-1][1] if end["tail"] else end["final"]
        steps = len(self)
        if not steps:
            return torch.cat([self.start_values()["initial"], *self._tails])
        return self._kept(self.read(steps - 1).after, steps)

    def _kept(self, vector: Tensor, index: int) -> Tensor:
        if not vector.numel():
            raise StoreError(
                f"θ at step {index} was asked of `{self.path}`, which keeps it at keyframes only",
                "Steps between keyframes are trained again, which takes the network, the loss and the data",
                f"Write `Trajectory.open(path, model=model, loss=loss, data=data).vector({index})`",
            )
        return vector

    def columns(self, index: int, ranges: Sequence[slice]) -> list[Tensor]:
        """Ranges of θ before a step, reading only the pieces of the block that they lie in."""
        step = self._in_memory(index)
        if step is not None:
            return [step.before[where] for where in ranges]
        return self._block(self._find(index)).columns(index, ranges)

    def extend(self, tail: Tensor, pad: Extension) -> None:
        """Begin a new region of blocks with longer vectors; what is written stays, and is lengthened when read."""
        self.flush()
        assert self._blocks is not None and self.header is not None
        layout, header = pad.run.layout, self.header
        try:
            length, checksum = write_packed(self._blocks.group, region_array(len(header.layouts)), tail)
            self._write_header(header.extended(layout, length, checksum))
        except OSError as error:
            self._give_out(error)
        self._regions.append(Region(len(self._regions), layout))
        self._tails.append(tail)
        self.run = pad.run
        self._end = None if self._end is None else (self._end[0], pad(self._end[1]))
        self._clear()

    def _clear(self) -> None:
        self._recent.clear()
        self._boundaries.clear()

    def updates(self) -> dict[str, list[tuple[float, bool]]]:
        """How the averages moved after each step, as far as that is committed; reads the record of every block."""
        assert self._blocks is not None and self.header is not None
        moves: dict[str, list[tuple[float, bool]]] = {name: [] for name in self.header.averages}
        for number in range(self._blocks.count if moves else 0):
            record = self._blocks.record(number)
            try:
                for name, (first, new) in record["averages"].items():
                    moves[name][first:] = new
            except SENSELESS as error:
                with self._blocks.named(number):
                    raise damaged(self.path / "log", f"an average makes no sense ({str(error)[:100]})") from None
        return moves

    # -- checking -------------------------------------------------------------------------------------------------

    def verify(self) -> list[CorruptBlockError]:
        """Read everything and list the damage, block by block."""
        assert self._blocks is not None
        problems = []
        replayed = self.header is not None and self.header.replay is not None
        for read in (self.start_values, self.end_values, *([self.optimizer_constants] if replayed else [])):
            try:
                read()
            except CorruptBlockError as error:
                problems.append(error)
        expected = 0
        for number in range(self._blocks.count):
            try:
                commit = self._blocks.commit(number)
                block = self._block(number)
                if commit.first != expected:
                    with self._blocks.named(number):
                        raise damaged(self.path / "commit", f"step {expected} should come here")
                for index in range(commit.first, commit.stop):
                    block.step(index)
                expected = commit.stop
            except CorruptBlockError as error:
                problems.append(error)
                expected = self._blocks._commits[number].stop if number in self._blocks._commits else expected
        self._clear()
        return problems

    def size_bytes(self) -> int:
        """Bytes that the folder takes on disk."""
        places = [os.path.join(folder, name) for folder, _, names in os.walk(self.path) for name in names]
        found = [status for status in map(os.lstat, places) if stat.S_ISREG(status.st_mode)]  # links lead elsewhere
        return sum(status.st_size for status in found)


_WRITING: weakref.WeakSet[DiskStore] = weakref.WeakSet()
"""Stores that are being written by this process."""


def _leave_to_parent() -> None:
    for store in list(_WRITING):
        store._leave_to_parent()
    _WRITING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
