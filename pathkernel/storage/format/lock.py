"""One writer at a time."""

from __future__ import annotations

import gc
import os
import socket
import time
import weakref
from pathlib import Path

from pathkernel.errors import StoreError
from pathkernel.runtime.interrupts import held

try:
    import fcntl
except ImportError:  # pragma: no cover - elsewhere than on Unix the lock file only informs
    fcntl = None  # type: ignore[assignment]


class Lock:
    """One writer for each store: a lock on the file ``lock``, which the operating system gives up with the process.

    A forked child (worker processes of a loader are such) inherits the open file, and with it the lock, for as long as
    it lives. So it closes its copy at once, which leaves the lock with its parent, and the parent unlocks expressly.

    Parameters
    ----------
    path
        The store's folder.
    """

    _descriptor = -1
    _process = -1

    def __init__(self, path: Path) -> None:
        self.path = path / "lock"

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        StoreError
            Where another recorder holds it, with its process and machine.
        """
        try:
            with held():
                self._acquire()
        except KeyboardInterrupt:
            self.release()
            raise

    def _acquire(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            try:
                self._take(descriptor)
            except OSError:
                gc.collect()  # of this process, left behind by an error whose traceback refers to itself
                self._take(descriptor)
        except OSError:
            holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise StoreError(
                f"`{self.path.parent}` is being written by another recorder ({holder})",
                "A store has one writer at a time",
                "End the other one, or give this one another path; a lock is given up when its process ends",
            ) from None
        os.ftruncate(descriptor, 0)
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {began}\n".encode(), 0)
        self._descriptor, self._process = descriptor, os.getpid()
        _HELD.add(self)

    @staticmethod
    def _take(descriptor: int) -> None:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Give the lock up."""
        with held():
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        if fcntl is not None and self._process == os.getpid():  # closing alone leaves it with whoever else has it open
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def __del__(self) -> None:
        self._close()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()
"""Locks of this process."""


def _leave_to_parent() -> None:
    for lock in list(_HELD):
        lock._close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
