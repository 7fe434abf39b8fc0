"""One writer at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pathkernel.errors import StoreError

try:
    import fcntl
except ImportError:  # pragma: no cover - elsewhere than on Unix the lock file only informs
    fcntl = None  # type: ignore[assignment]


class Lock:
    """One writer for each store: a lock on the file ``lock``, which the operating system gives up with the process.

    Parameters
    ----------
    path
        The store's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor = path / "lock", -1

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        StoreError
            Where another recorder holds it, with its process and machine.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock up."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock inside."""
        self.acquire()
        try:
            yield
        finally:
            self.release()
