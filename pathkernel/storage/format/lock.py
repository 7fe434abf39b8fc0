"""One writer at a time."""

from __future__ import annotations

import gc
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from pathkernel.errors import StoreError
from pathkernel.runtime.interrupts import defer_interrupts


class Lock:
    """Lock of a store, which has one writer: held on the file ``lock``, which names the holder.

    The operating system gives it up with the process; a forked child (worker processes of a loader are such) does not
    inherit it.

    Parameters
    ----------
    path
        The store's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / "lock"
        self._lock = FileLock(self.path, timeout=0, mode=0o644, thread_local=False, preserve_lock_file=True)

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        StoreError
            Where another recorder holds it, with its process and machine.
        """
        try:
            with defer_interrupts():
                self._acquire()
        except KeyboardInterrupt:
            self.release()
            raise

    def _acquire(self) -> None:
        try:
            try:
                self._lock.acquire()
            except Timeout:
                gc.collect()  # of this process, left behind by an error whose traceback refers to itself
                self._lock.acquire()
        except Timeout:
            holder = self.path.read_bytes()[:1000].decode("utf-8", "replace").strip()
            raise StoreError(
                f"`{self.path.parent}` is being written by another recorder ({holder})",
                "A store has one writer at a time",
                "End the other one, or give this one another path; a lock is given up when its process ends",
            ) from None
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        self.path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {began}\n")

    def release(self) -> None:
        """Give the lock up."""
        with defer_interrupts():
            self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()
