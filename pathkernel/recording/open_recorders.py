"""Recorders that have been started and not closed: what another one on the same training, or a forked child, does."""

from __future__ import annotations

import os
import sys
import time
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.optim import Optimizer

from pathkernel.errors import StoreError
from pathkernel.recording.optimizers import JointOptimizer
from pathkernel.trajectory.trajectory import Trajectory


class Opened(Protocol):
    """`pathkernel.KernelRecorder`, as far as another one has to know it."""

    optimizer: Optimizer | JointOptimizer | None
    _begun: str
    _process: int
    _in_with: bool
    _told: bool

    @property
    def _trajectory(self) -> Trajectory: ...

    @property
    def _handles(self) -> Sequence[Any]: ...

    def close(self) -> Trajectory:
        """End the recording."""


OPEN: weakref.WeakSet[Opened] = weakref.WeakSet()
"""Recorders of this process; it keeps none of them alive."""
PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


def caller() -> str:
    """Time and line of the user's code that is running, for messages."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{time.strftime('%H:%M:%S')} at {frame.f_code.co_filename}:{frame.f_lineno}"


def described(recorder: Opened) -> str:
    """Name a recorder in a message: when and where it was started, how much it has, and where."""
    path = _path(recorder)
    kept = "in memory" if path is None else f"in `{path}`"
    return f"a KernelRecorder that was started {recorder._begun} ({len(recorder._trajectory)} steps, {kept})"


def make_way(new: Opened) -> None:
    """Close recorders that were left open on the parameters or the store that another one is about to begin with.

    That is how a cell of a notebook that is run twice finds them, often when nothing names the old one any more. Within
    its ``with`` block a recorder stays open: two may watch one loop, each with its own store.

    Raises
    ------
    StoreError
        Where the store is being written within such a block, which is to end first.
    """
    trained, store = _parameters(new), _path(new)
    for old in list(OPEN):
        if old is new or not old._handles:
            continue
        if old._process != os.getpid():  # the parent's: its copies of model and optimizer are ours
            if trained & _parameters(old):
                old.close()
            continue
        same_store = store is not None and store == _path(old)
        if old._in_with:
            if same_store:
                raise StoreError(
                    f"`{store}` is being written by another recorder (process {os.getpid()} on this machine): "
                    f"{described(old)}",
                    "A store has one writer at a time",
                    "Leave the `with` block of the other one first, or write `recorder.close()` with it, or give this "
                    "one another path",
                )
            continue
        if same_store or trained & _parameters(old):
            what = described(old)
            old.close()
            warnings.warn(
                f"{what[0].upper()}{what[1:]} was still open on the same training or store. It has been closed, and "
                "its record is complete. Write `recorder.close()`, or record inside `with pk.KernelRecorder(...)`, so "
                "that recording ends where you mean it to.",
                RuntimeWarning,
                stacklevel=3,
            )


def say_that_it_was_forked(recorder: Opened) -> None:
    """Warn once, in a forked child, that its parent alone records."""
    if recorder._process != os.getpid() and not recorder._told:
        recorder._told = True
        warnings.warn(
            f"This process was forked from process {recorder._process}, which records to `{_path(recorder)}` and alone "
            "goes on doing so. Training goes on here unrecorded; to record it, make a new KernelRecorder in this "
            "process, with another path.",
            RuntimeWarning,
            stacklevel=4,
        )


def _parameters(recorder: Opened) -> set[int]:
    groups = [] if recorder.optimizer is None else recorder.optimizer.param_groups
    return {id(p) for group in groups for p in group["params"]}


def _path(recorder: Opened) -> Path | None:
    """The folder that a recorder writes to."""
    store = recorder._trajectory.store
    path = getattr(getattr(store, "inner", store), "path", None)
    return None if path is None else Path(path).resolve()
