"""The store that a recording writes to, as `KernelRecorder`'s ``store=`` and ``schedule=`` say."""

from __future__ import annotations

import os

import torch
from torch.optim import Optimizer

from pathkernel.errors import RecordingError
from pathkernel.recording.keyframes import KeyframeKeeper
from pathkernel.recording.live import LiveParameters
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.replay import ReplayStore
from pathkernel.trajectory.run import Run
from pathkernel.trajectory.schedule import EVERY_STEP, KEYFRAMES, Keyframes, Schedule, Streaming
from pathkernel.trajectory.store import Store
from pathkernel.trajectory.thinned import LastStepStore, ThinnedStore


def store_at(store: str | os.PathLike[str] | Store | None) -> Store:
    """The store that ``store=`` stands for."""
    if isinstance(store, Store):
        return store
    if store is None:
        return MemoryStore()
    from pathkernel.storage.disk import DiskStore  # not before it is needed

    return DiskStore(store)


def store_for(
    store: Store, run: Run, live: LiveParameters, averages: bool, observed: bool
) -> tuple[Store, KeyframeKeeper | None]:
    """The store that keeps what the schedule says, and the keeper of keyframes where there are any.

    Parameters
    ----------
    store
        Where the steps go.
    run, live
        The run that is about to be recorded, and its parameters.
    averages, observed
        Whether the recorder was given averages of the weights, and observers that need the whole run.

    Raises
    ------
    RecordingError
        Where these and the schedule, or the steps that are in the store already, do not go together.
    """
    schedule = run.schedule
    if observed and store.exists:
        raise RecordingError(
            "`store=` holds steps of an earlier run, and `observers` were given",
            "Observers see steps as they are taken, and those of the earlier run have been",
            "Give `store=` another path, or leave out `observers` and ask the trajectory after training",
        )
    if schedule == EVERY_STEP:
        return store, None
    if averages and not isinstance(schedule, Keyframes):
        raise RecordingError(
            f"`averages` were given, and `schedule={schedule!r}`",
            "How an average moved is seen from θ at every step, and its machine needs all of them",
            f"Write `schedule=Keyframes({KEYFRAMES})`, leave out `schedule`, or leave out `averages`",
        )
    if isinstance(schedule, Streaming):
        return LastStepStore(), None
    if isinstance(schedule, Schedule) and schedule.keyframes is not None:
        if not isinstance(live.optimizer, Optimizer):
            raise RecordingError(
                f"Several optimizers were given, and `schedule={schedule!r}`",
                "From a keyframe steps are trained again by one optimizer",
                "Leave out `schedule`, and give `store=` a path where the record does not fit in memory",
            )
        keeper = KeyframeKeeper(run, live, live.optimizer, schedule.keyframes)
        return ReplayStore(store, keeper.replay, torch.get_num_threads()), keeper
    return ThinnedStore(store, schedule.every) if isinstance(schedule, Schedule) else store, None
