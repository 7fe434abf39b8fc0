"""Many runs trained again with other weights: in several processes, and kept in a store that is gone on with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import Tensor
from torch.optim import Optimizer

from pathkernel.errors import InputError, TrajectoryError, is_whole
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.pytrees import blocks
from pathkernel.storage.fingerprints import digest
from pathkernel.storage.question import identity_of
from pathkernel.trajectory.required import check_is_trajectory
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.trajectory.weighted_replay import Retraining
from pathkernel.trajectory.weighted_retraining import as_weights, prepared, retrained

BLOCK = 32
"""Runs in a block: what an interruption may cost, and what a process is given at once. Chosen, not measured."""

_proved: set[bytes] = set()
"""Ends of runs that have come out again to the last bit in this process."""


def retrain(
    trajectory: Trajectory,
    weights: Any,
    *,
    store: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    optimizer: type[Optimizer] | None = None,
    engine: str = "auto",
) -> Tensor:
    """θ_S of the same run with other weights of its samples, as `Trajectory.retrain`, in parallel and resumable.

    Parameters
    ----------
    trajectory
        The recorded run.
    weights, optimizer, engine
        As for `pathkernel.trajectory.weighted_retraining.retrain`.
    store
        A folder in which finished blocks of 32 runs are kept: the same call goes on from there after an interruption,
        and one with other weights or of another run is refused.
    jobs
        How many processes train, by joblib; -1 for as many as there are cores. Each proves for itself that the run
        comes out again, computes with as many threads as this one, and gets the run without its vectors.

    Returns
    -------
    torch.Tensor
        (R, P), as of `Trajectory.retrain`, the same to the last bit whatever ``store`` and ``jobs``.

    Raises
    ------
    InputError
        For no processes.
    TrajectoryError
        As `Trajectory.retrain` does, and where the run does not come out again in a process.
    StoreError
        Where another computation is kept in the store.

    Notes
    -----
    Time: that of `Trajectory.retrain`, divided by ``jobs``, and one training more in each process. Blocks of less than
    four runs are not stacked, whatever R.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> from pathkernel.influence.retraining import retrain
    >>> X, y = torch.randn(32, 4), torch.randn(32, 1)
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.MSELoss()
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for x, target in recorder.batches(batch_size=8):
    ...         optimizer.zero_grad()
    ...         loss(model(x), target).backward()
    ...         optimizer.step()
    >>> retrain(recorder.trajectory, torch.rand(10, 32)).shape
    torch.Size([10, 5])
    """
    if not is_whole(jobs) or jobs == 0:
        raise InputError(
            f"`jobs={jobs!r}` was given",
            "It is a number of processes, or -1 for as many as there are cores",
            "Write `jobs=1`",
        )
    check_is_trajectory(trajectory)
    rows = as_weights(weights, len(trajectory.data))
    with trajectory.lock:
        run = prepared(trajectory, optimizer)  # refuses what cannot be trained again, before anything is written
        pieces = list(blocks(len(rows), BLOCK))
        results = _Results(trajectory, run, [rows[piece] for piece in pieces], jobs, engine)
        sizes = [piece.stop - piece.start for piece in pieces]
        if not sizes:
            return trajectory.end_of_steps.new_empty(0, trajectory.layout.size)
        if store is None:
            return torch.cat([results.block(index) for index in range(len(sizes))])
        from pathkernel.storage import resumable  # not before it is needed: what writes to disk takes a second to load

        asked = {"computation": "retraining", "optimizer": run.kind.__name__, "engine": engine}
        identity = identity_of(trajectory, **asked, weights=digest([("", rows)]))
        arrays = lambda index: {"theta": results.block(index).cpu().numpy()}  # noqa: E731
        kept = resumable.resumable_blocks(store, identity, sizes, arrays)
        resumable.check_arrays(store, kept, len(rows), {"theta": (trajectory.layout.size,)}, "a retraining")
    found = torch.from_numpy(np.ascontiguousarray(kept["theta"]))  # float64, which holds float32 exactly
    return found.to(trajectory.end_of_steps)


class _Results:
    """Blocks of results in their order, from the first that is asked for."""

    def __init__(self, trajectory: Trajectory, run: Retraining, rows: list[Tensor], jobs: int, engine: str) -> None:
        self._final = trajectory.end_of_steps
        self._run = run
        self._rows = rows
        self._jobs = jobs
        self._engine = engine
        self._coming: Iterator[Tensor] | None = None

    def block(self, index: int) -> Tensor:
        """θ_S of a block; the blocks after it are asked for next."""
        if self._jobs == 1:
            with generators_untouched():
                return retrained(self._run, self._rows[index], self._final, self._engine)
        if self._coming is None:
            threads = torch.get_num_threads()
            calls = (
                delayed(_in_process)(self._run, rows, self._final, self._engine, threads) for rows in self._rows[index:]
            )
            self._coming = iter(Parallel(n_jobs=self._jobs, return_as="generator")(calls))
        return next(self._coming)


def _in_process(run: Retraining, rows: Tensor, final: Tensor, engine: str, threads: int) -> Tensor:
    """Train a block in another process, which has first trained the run itself to the last bit.

    Raises
    ------
    TrajectoryError
        Where that is not so.
    """
    torch.set_num_threads(threads)
    key = final.cpu().numpy().tobytes()
    if key not in _proved:
        if not torch.equal(run.trained(torch.ones(rows.shape[1], dtype=rows.dtype)), final):
            raise TrajectoryError(
                "The run did not come out again to the last bit in another process",
                "Each process that trains other weights trains the run itself first; rounding depends on threads and "
                "on settings of torch, which a process does not take over",
                "Write `jobs=1`",
            )
        _proved.add(key)
    return retrained(run, rows, final, engine)
