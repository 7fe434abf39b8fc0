r"""Shares for query sets that are fixed in advance, added up while training runs; nothing is stored.

A share needs the later steps through the optimizer's memory, hence a sweep backward over a record. Without memory
(plain SGD, and every rule whose step depends on the present gradient alone) each step stands for itself:

.. math:: \mathrm{share}_i(x) = \sum_r c_{r,i}\, \langle A_r^\top q_r(x), g_{r,i}\rangle

and the sum may run forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, TrajectoryError
from pathkernel.gradients.per_sample import ROW_LIMIT
from pathkernel.gradients.pytrees import copied_samples, memory_bytes
from pathkernel.kernel_machine.attributions import Attributions, warn_of_doubts
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.quadrature import Quadrature, as_quadrature
from pathkernel.trajectory.columns import Columns
from pathkernel.trajectory.observer import StepObserver
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.trajectory import Trajectory

Settings = tuple[Mapping[str, Any], ...]

ANYTHING = 1e300
"""Part of one step that may be unexplained: it is the whole run that counts."""


def has_memory(trajectory: Trajectory, settings: Settings) -> bool:
    """Test that a step depends on earlier gradients other than through what is frozen."""
    memories = [(trajectory.rule.of(group).memory, group.get("momentum", 1)) for group in settings]
    return any(memory and not (memory == ("momentum_buffer",) and momentum == 0) for memory, momentum in memories)


class StreamingShares(StepObserver):
    """The shares of all training samples in some query outputs, for optimizers without memory.

    Parameters
    ----------
    X
        The queries; pairs ``(X, y)`` for ``outputs="loss"``.
    outputs
        ``"all"`` (default), an index, one index for each query, ``"loss"``, or a callable of one sample's outputs.
        What the trained network will predict is not known in advance.
    quadrature
        As for `pathkernel.KernelMachine`; not `Adaptive`, whose tolerance is relative to the whole run.
    memory
        Budget for rows of gradients.

    Notes
    -----
    Time per step: as one step of `KernelMachine.explain`. Memory O(Q · (P + N)).

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> from pathkernel.kernel_machine.streaming import StreamingShares
    >>> X, y = torch.randn(32, 4), torch.randn(32, 1)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.MSELoss()
    >>> shares = StreamingShares(X[:3])
    >>> watching = {"observers": [shares], "schedule": pk.Nothing()}
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y), **watching) as recorder:
    ...     for x, target in recorder.batches(batch_size=8):
    ...         optimizer.zero_grad()
    ...         loss(model(x), target).backward()
    ...         optimizer.step()
    >>> shares.result.shares.shape
    (3, 32)
    """

    name = "shares of fixed queries"

    def __init__(
        self,
        X: PyTree,
        outputs: Any = "all",
        *,
        quadrature: str | Quadrature = "auto",
        memory: int | str = "1GB",
    ) -> None:
        self.X, self.outputs = copied_samples(X), outputs
        self.quadrature, self.memory = as_quadrature(quadrature), memory_bytes(memory)
        if self.quadrature.relative:
            raise InputError(
                f"`{self.quadrature!r}` was asked to work while training runs",
                "Its tolerance is relative to how far outputs move in all of training, which is not known yet",
                "Write `quadrature=DiscreteGradient()` or `quadrature=GaussLegendre(4)`",
            )
        self._trajectory: Trajectory | None = None

    def begin(self, trajectory: Trajectory, settings: Settings) -> None:
        """Refuse optimizers with memory.

        Raises
        ------
        TrajectoryError
            Naming the optimizer.
        """
        self._check(trajectory, settings)
        if self._trajectory is not trajectory:  # else recording goes on after a break
            self._trajectory, self._at = trajectory, trajectory.initial
            self._last: Step | None = None
            self._largest = 0.0
            self._sum: Attributions | None = None
            self._steps = 0
            self._missed = None

    @staticmethod
    def _check(trajectory: Trajectory, settings: Settings) -> None:
        if has_memory(trajectory, settings):
            raise TrajectoryError(
                f"`StreamingShares` was given to a recorder of {trajectory.rule.name}, which remembers earlier "
                "gradients",
                "What a sample left in the optimizer's memory moves the outputs in later steps; only a sweep backward "
                "over the record of all steps follows it",
                "Record with `Keyframes(32)` and use `KernelMachine`, or train with plain SGD",
            )

    def observe(self, step: Step) -> None:
        """Add the shares of the step before: what was changed after it is known now."""
        assert self._trajectory is not None
        self._check(self._trajectory, step.hyperparameters)
        if self._last is not None:
            self._sum = self._with(self._explained(self._last))
            self._at = self._last.after
        # Parameters may have joined: until now they were constants, at the values that the step finds.
        self._at = torch.cat([self._at, step.before[len(self._at) :]]) if len(self._at) < len(step.before) else self._at
        self._last, self._run, self._steps = step, self._trajectory.run, self._steps + 1
        self._largest = max(self._largest, step.gradient.norm().item())

    def _explained(self, step: Step, *, last: bool = False) -> Attributions:
        """The account of one step; of the last, with the changes after it."""
        assert self._trajectory is not None
        end = self._trajectory.end if last else None
        piece = Trajectory.of_step(self._run, self._at, step, end)
        machine = KernelMachine(piece, quadrature=self.quadrature, memory=self.memory, unexplained=ANYTHING)
        machine._largest_gradient = self._largest
        # One step moves outputs so little that its own certificate says nothing about the run's.
        return machine._explained(self.X, outputs=self.outputs)[0]

    def _with(self, own: Attributions) -> Attributions:
        """The account so far and that of the step after it as one."""
        before = self._sum
        if before is None:
            return own
        channels = {name: value.copy() for name, value in before.channels.items()}
        # The same weights under the running statistics before and after.
        changed = own.initial - before.output
        if changed.any():
            channels["buffers"] = channels.get("buffers", 0) + changed
        for name, value in own.channels.items():
            if name != "initial":
                channels[name] = channels.get(name, 0) + value
        missed = _missed(before) + _missed(own)
        moved = np.maximum(np.abs(own.output - channels["initial"]), np.finfo(float).tiny)
        shares, sources = _summed(before, own)
        return replace(
            own,
            shares=shares,
            sources=sources,
            channels=channels,
            quadrature_error=missed / moved,
            gradients_per_step=before.gradients_per_step + own.gradients_per_step,
            split_error=float(np.fmax(before.split_error, own.split_error)),
            samples_checked=before.samples_checked + (own.samples_checked - before.samples_checked) / self._steps,
        )

    @property
    def result(self) -> Attributions:
        """Attributions as of `KernelMachine.explain`, for the path so far.

        Raises
        ------
        TrajectoryError
            Before the first step, and where `observe` of a step ended in an error.
        """
        if self._trajectory is None or self._last is None:
            raise TrajectoryError(
                "`StreamingShares` was asked for its result and has not seen a step",
                "It looks on while training is recorded",
                "Write `KernelRecorder(..., observers=[shares])` and train first",
            )
        self.require_whole()
        total = self._with(self._explained(self._last, last=True))
        why = replace(total, gradients_per_step=total.gradients_per_step / self._steps)
        limit = ROW_LIMIT[torch.promote_types(self._trajectory.dtype, torch.float32)]
        warn_of_doubts(why, np.zeros(len(why.output), dtype=bool), limit)
        return why

    attributions = result
    """Older name of `result`."""


def _summed(one: Attributions, other: Attributions) -> tuple[np.ndarray, dict[str, slice]]:
    """Shares of two accounts, whose sources may have given more samples in one of them, and the columns of these."""
    if one.sources == other.sources:
        return one.shares + other.shares, one.sources
    counts: dict[str, int] = {}
    for sources in (one.sources, other.sources):
        for name, where in sources.items():
            counts[name] = max(counts.get(name, 0), where.stop - where.start)
    samples = min(where.start for own in (one, other) for where in own.sources.values())
    columns = Columns(samples, counts)
    total, places = np.zeros((len(one.shares), len(columns))), columns.slices
    for own in (one, other):
        total[:, :samples] += own.shares[:, :samples]
        for name, where in own.sources.items():
            begin = places[name].start
            total[:, begin : begin + where.stop - where.start] += own.shares[:, where]
    return total, dict(places)


def _missed(account: Attributions) -> np.ndarray:
    """Quadrature error in absolute value, (Q,)."""
    moved = np.abs(account.output - account.initial)
    return account.quadrature_error * np.maximum(moved, np.finfo(float).tiny)
