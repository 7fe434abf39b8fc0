"""Steps kept on disk, written in blocks by a thread of their own while training goes on."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import CorruptBlockError, InputError, StoreError
from pathkernel.storage import being_written
from pathkernel.storage.format import Compression, Lock
from pathkernel.storage.header import Header
from pathkernel.storage.step_writer import StepWriter, create_store, not_writable
from pathkernel.storage.stored_steps import StoredSteps
from pathkernel.trajectory.run import End, Extension, Run
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.store import Store
from pathkernel.update_rules.rule import UpdateRule


def check_options(flush_every: int, on_error: str, compression: str) -> None:
    """Refuse options of a `DiskStore` that are none."""
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
        check_options(flush_every, on_error, compression)
        self.path = Path(path)
        self.flush_every = flush_every
        self.durable = durable
        self.on_error = on_error
        self.compression = compression
        self._stored: StoredSteps | None = None
        self._writing: StepWriter | None = None
        self._standing = End()
        self._lock: Lock | None = None
        self._orphaned = False

    def __repr__(self) -> str:
        return f"DiskStore({str(self.path)!r}, {len(self)} steps)"

    # -- travelling -----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Where it is, how it is read, and how to tell that it is the same."""
        if "_travelled" in vars(self):
            return vars(self)["_travelled"]
        options = {name: getattr(self, name) for name in ("flush_every", "durable", "on_error", "compression")}
        self.flush()
        stored = self._stored
        last = None if stored is None else stored.last_commit()  # which tells the content of a store from another's
        belongs = {}
        if stored is not None and last is not None:
            belongs = {"rule": stored.rule, "run": stored.run, "_pinned": stored.pinned}
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
        found._there.require_unchanged(state["last"])
        del vars(self)["_travelled"]
        belongs = state["belongs"]
        if "_trajectory" in belongs:  # saved by an earlier version
            belongs = {**belongs, "run": belongs["_trajectory"].run}
        vars(self).update(vars(found))
        stored = self._there
        stored.rule, stored.run, stored.pinned = belongs["rule"], belongs["run"], belongs["_pinned"]
        return getattr(self, name)

    # -- opening --------------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:  # type: ignore[override]
        """True where the folder holds a store that this object has not opened yet."""
        return self._stored is None and (self.path / "zarr.json").exists()

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
        self._stored = StoredSteps.load(self.path, self.durable, self._compression)
        return self._stored.header

    @property
    def _there(self) -> StoredSteps:
        """The steps in the folder, once it was opened or made."""
        assert self._stored is not None
        return self._stored

    @property
    def _compression(self) -> Compression:
        return Compression("lz4" if self.compression == "fast" else "zstd")

    @property
    def header(self) -> Header | None:
        """Everything that is not a step; None before the store is opened or made."""
        return None if self._stored is None else self._stored.header

    @property
    def run(self) -> Run | None:
        """The run that the steps belong to, where it is known."""
        return None if self._stored is None else self._stored.run

    @run.setter
    def run(self, run: Run) -> None:
        self._there.run = run

    @property
    def rule(self) -> UpdateRule | None:
        """The update rule, where it is known."""
        return None if self._stored is None else self._stored.rule

    @rule.setter
    def rule(self, rule: UpdateRule) -> None:
        self._there.rule = rule

    @property
    def device(self) -> torch.device:
        """Where steps are put when they are read before there is a run."""
        return self._there.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self._there.device = device

    @property
    def stopped(self) -> bool:  # type: ignore[override]
        """True where steps are no longer taken, because the disk gave out or another process writes."""
        return self._writing is not None and self._writing.stopped

    def refresh(self) -> int:
        """Look for steps that were committed since, by another process; returns how many there are in all."""
        return self._there.refresh()

    @property
    def tails(self) -> list[Tensor]:
        """Values of the parameters that joined θ, in their order."""
        return self._there.tails

    def start_values(self) -> dict[str, Any]:
        """θ_0, constants, first optimizer memory and averages, as packed when recording began."""
        return self._there.start_values()

    def optimizer_constants(self) -> dict[str, Any]:
        """Constants of the optimizer, for a recording with keyframes; see `Replay.constants`."""
        return self._there.optimizer_constants()

    def end_values(self) -> dict[str, Any] | None:
        """Tail, final buffers and averages; None where recording was cut off."""
        return self._there.end_values()

    def updates(self) -> dict[str, list[tuple[float, bool]]]:
        """How the averages moved after each step, as far as that is committed; reads the record of every block."""
        return self._there.updates()

    # -- writing --------------------------------------------------------------------------------------------------

    def note_end(self, end: End) -> None:
        """Keep for `write_end`."""
        self._standing = end
        if self._writing is not None:
            self._writing.standing = end

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
        stored = self._stored
        if stored is not None and stored.run is not None and stored.run.data is run.data:  # every recording has its own
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
                stored = create_store(
                    self.path, run, self._standing.averages, self.flush_every, self._compression, self.durable
                )
            except OSError as error:
                self.unlock()
                raise not_writable(self.path, error) from error
            self._stored = stored
            self._writing = StepWriter(stored, self._standing, self.flush_every, self.on_error)
        stored.run, stored.rule = run, run.rule
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
            raise not_writable(self.path, error) from error
        self._lock = lock

    def unlock(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def drop_regions(self, last: int) -> None:
        """Leave out the steps since θ was extended for the first time after a region."""
        self._there.drop_regions(last)

    def resume(self, run: Run, standing: End, steps: int, end: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Go on after the first steps of a store that was loaded and locked; later ones are cut off.

        See `StepWriter.resume`; ``run`` will be recorded, and stands at ``standing``.
        """
        writing = StepWriter(self._there, standing, self.flush_every, self.on_error)
        writing.resume(steps, end, buffers)
        self._there.run, self._there.rule = run, run.rule
        self._writing, self._standing = writing, standing
        self._start_writing()

    def append(self, step: Step) -> None:
        """Take a step; it is written when its block is full.

        Raises
        ------
        Exception
            What the writer thread met before, unless the disk gave out and training is to go on.
        """
        assert self._writing is not None
        self._writing.append(step)

    def extend(self, tail: Tensor, pad: Extension) -> None:
        """Begin a new region of blocks with longer vectors; what is written stays, and is lengthened when read."""
        assert self._writing is not None
        self._writing.extend(tail, pad)

    def flush(self) -> None:
        """Write all steps that were appended, and wait for it."""
        if self._writing is not None:
            self._writing.flush()

    def write_end(self) -> None:
        """Write all steps, and where the path ends now; see `Store.write_end`."""
        self.flush()
        if self._lock is not None and not self.stopped and self._writing is not None and self.run is not None:
            self._writing.write_end(self.run)

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

    # -- processes that end or fork while a store is written ------------------------------------------------------

    def _start_writing(self) -> None:
        assert self._writing is not None
        self._writing.start()
        being_written.add(self)

    def _stop_writing(self) -> None:
        if self._writing is not None and self._writing.thread is not None:
            self._writing.stop()
            being_written.remove(self)

    def leave_to_parent(self) -> None:
        """Leave the store to the parent, in a forked child: the thread that writes is not here.

        Steps that have not been written stay readable.
        """
        self._orphaned = True
        if self._writing is not None:
            self._writing.leave_to_parent()
        if self._lock is not None:
            self._lock.release()  # which leaves it with the parent
            self._lock = None

    # -- reading --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return 0 if self._stored is None else len(self._stored)

    def read(self, index: int) -> Step:
        """A step; its whole block is read, and kept while its neighbours are.

        Raises
        ------
        CorruptBlockError
            Where the block is damaged, with its steps.
        """
        if self._stored is None:
            raise IndexError(f"step {index} of 0")
        return self._stored.read(index)

    def vector(self, index: int) -> Tensor:
        """θ before a step; gradients and frozen tensors are not read.

        Raises
        ------
        StoreError
            For a step between keyframes, which has to be trained again first.
        """
        return self._there.vector(index)

    def final(self) -> Tensor:
        """θ at the end of the path.

        Raises
        ------
        StoreError
            Where a recording with keyframes was cut off: the last steps have to be trained again first.
        """
        return self._there.final()

    def columns(self, index: int, ranges: Sequence[slice]) -> list[Tensor]:
        """Ranges of θ before a step, reading only the pieces of the block that they lie in."""
        return self._there.columns(index, ranges)

    # -- checking -------------------------------------------------------------------------------------------------

    def verify(self) -> list[CorruptBlockError]:
        """Read everything and list the damage, block by block."""
        return self._there.verify()

    def size_bytes(self) -> int:
        """Bytes that the folder takes on disk."""
        places = [os.path.join(folder, name) for folder, _, names in os.walk(self.path) for name in names]
        found = [status for status in map(os.lstat, places) if stat.S_ISREG(status.st_mode)]  # links lead elsewhere
        return sum(status.st_size for status in found)
