"""Stores that this process is writing: closed when it ends, left to the parent where it forks."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Protocol

from pathkernel.trajectory.store import Store


class Written(Protocol):
    """A store that has a writer."""

    outer: Store | None

    def close(self) -> None:
        """Write everything, and end."""

    def leave_to_parent(self) -> None:
        """Write nothing any more, in a forked child."""


_AT_EXIT: dict[Written, Callable[[], None]] = {}
"""Functions that close each of them when the process ends. A store is held here until it is closed: one that everybody
else has dropped still has steps to write."""


def add(store: Written) -> None:
    """Close a store when this process ends, unless it is closed before."""
    process = os.getpid()

    def at_exit() -> None:
        if os.getpid() == process:
            outer = store if store.outer is None else store.outer
            outer.close()  # which may hold steps that it has not handed on yet

    _AT_EXIT[store] = at_exit
    atexit.register(at_exit)


def remove(store: Written) -> None:
    """Leave out a store that is closed."""
    if (at_exit := _AT_EXIT.pop(store, None)) is not None:
        atexit.unregister(at_exit)


def _leave_to_parent() -> None:
    for store in list(_AT_EXIT):
        store.leave_to_parent()
        remove(store)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
