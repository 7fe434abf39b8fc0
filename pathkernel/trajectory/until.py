"""The first part of a path: where it ends, and what the network's buffers and its averages were there."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pathkernel.errors import InputError
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.trajectory.averages import AverageRecord
from pathkernel.trajectory.run import End
from pathkernel.trajectory.schedule import Nothing, RecordingLevel
from pathkernel.trajectory.step import Segment, Step
from pathkernel.trajectory.store import Store

FOLLOWED = 1e-3
"""By what a buffer of an average may differ from a rule that it is said to follow, relative to its change."""

ROUNDING = 1e-6
"""Rounding of an average before it is cut to a whole number, as torch does where a buffer is one."""


class Path(Protocol):
    """A recorded path, as far as its first part depends on it; `pathkernel.Trajectory` is one."""

    @property
    def store(self) -> Store:
        """Steps on record."""

    @property
    def schedule(self) -> RecordingLevel:
        """Level of record."""

    @property
    def model(self) -> nn.Module:
        """Network of the run."""

    @property
    def layout(self) -> ParameterLayout:
        """Where each parameter lies in θ."""

    @property
    def constants(self) -> dict[str, Tensor]:
        """Parameters outside θ and buffers at its start."""

    @property
    def final_buffers(self) -> Mapping[str, Tensor]:
        """Buffers at its end that have changed."""

    @property
    def averages(self) -> dict[str, AverageRecord]:
        """Averages of the weights, by name."""

    def __len__(self) -> int: ...

    def segments(self) -> Iterator[Segment]:
        """Straight pieces of the path."""


def records_until(trajectory: Path, step: int) -> int:
    """How many records the first ``step`` optimizer steps of a path take; on a thinned one these join several each.

    Raises
    ------
    InputError
        Unless ``step`` is a whole number from 0 to the length of the run, and one at which θ was kept.
    TrajectoryError
        Where nothing was kept.
    """
    store, schedule = trajectory.store, trajectory.schedule
    if isinstance(schedule, Nothing):
        schedule.require("Trajectory.until")
    step = step_number(step)
    whole = isinstance(step, int) and not isinstance(step, bool)
    thinned = getattr(schedule, "every", 1) > 1
    nodes = steps_taken(store) if thinned else range(len(store) + 1)
    if whole and step in nodes:
        return nodes.index(step)
    where = f"at the steps {_listed(nodes)} only, as `{schedule!r}` keeps it" if thinned else f"0 to {nodes[-1]}"
    below = max((node for node in nodes if not whole or node <= step), default=0)
    raise InputError(
        f"The trajectory until step {step!r} was asked for",
        f"θ is on record {where}; steps are counted from the start, and what was changed after the last of them is the "
        "end of the whole trajectory",
        f"Write `trajectory.until({below})`; for the end of the record, leave `until` and `at=` out",
    )


def step_number(given: Any) -> Any:
    """An integer of numpy or a tensor of one as Python's own, as ``argmin`` gives them; anything else as it is."""
    if isinstance(given, (np.integer, Tensor)) and getattr(given, "dtype", None) != torch.bool:
        with contextlib.suppress(TypeError):  # of a tensor that is no whole number
            return operator.index(given)
    return given


def steps_taken(store: Store) -> list[int]:
    """Count the optimizer steps up to each point of a path, (S + 1,): a record of a thinned one joins several."""
    nodes = [0]
    for index in range(len(store)):
        nodes.append(nodes[-1] + store.summary(index).record.length)
    return nodes


def _listed(nodes: range | list[int]) -> str:
    shown = [*nodes] if len(nodes) <= 8 else [*nodes[:4], "…", *nodes[-2:]]
    return ", ".join(map(str, shown))


def end_after(whole: Path, first: Path) -> End:
    """Where the first part of a path ends: right after its last step, before anything else was changed.

    Parameters
    ----------
    whole
        The path.
    first
        Its first steps, of which everything but the end is known.
    """
    buffers = first.store.summary(len(first) - 1).record.buffers if len(first) else {}
    averages = {name: _average_after(record, whole, first) for name, record in whole.averages.items()}
    return End(final_buffers=buffers, averages=averages, is_live=False)


def _average_after(record: AverageRecord, whole: Path, first: Path) -> AverageRecord:
    """An average as it was after the first steps of a path, its buffers as far as the record tells."""
    layout, updates = whole.layout, list(record.updates[: len(first)])
    if updates and updates[-1][1]:  # taken after changes that were made after the last of these steps
        updates[-1] = (0.0, True)
    average = layout.flatten(record.initial, torch.float64)
    waiting: tuple[float, Tensor] | None = None
    # The first part has no changes after its last step, so that none waits in the end.
    for segment in first.segments():
        if segment.step is None:
            waiting = waiting and (waiting[0], segment.end)
            continue
        if waiting is not None:
            average += waiting[0] * (waiting[1].double() - average)
        a, after_changes = updates[segment.step.index]
        waiting = (a, segment.end) if after_changes else None
        if not after_changes:
            average += a * (segment.end.double() - average)
    values = layout.unflatten(average)
    last = {name: values[name].to(record.last[name].dtype) for name in layout.names}
    buffers, unknown = _buffers_after(record, whole, len(first))
    return replace(record, updates=updates, last={**record.last, **last, **buffers}, unknown=unknown)


def _buffers_after(record: AverageRecord, whole: Path, steps: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Buffers of an average after some steps, and the names of those of which that is not known.

    On record are their first and their last values. They stay what they were, follow the network's own, or are averaged
    as the weights are: whichever of the three leads to the last values is what they did.
    """
    names = [name for name in record.last if name not in whole.layout.slices and name in whole.constants]
    moving = [name for name in names if not _close(record.last[name], record.initial[name], record.initial[name])]
    found = {name: record.initial[name] for name in names if name not in moving}
    if not moving:
        return found, ()
    last = len(record.updates) - 1
    ends = (whole.store.summary(last).record.buffers if last >= 0 else {}, whole.final_buffers)
    copied = [
        name
        for name in moving
        if any(_close(_own(name, end, whole), record.last[name], record.initial[name]) for end in ends)
    ]
    here = whole.store.summary(steps - 1).record.buffers if steps else {}
    found |= {name: _own(name, here, whole) if steps else record.initial[name] for name in copied}
    rest = [name for name in moving if name not in copied]
    if not rest:
        return found, ()
    steps_of = (whole.store.summary(index).record for index in range(len(record.updates)))
    then, end = _averaged(record, rest, steps_of, whole, steps)
    counters = _counters(whole.model)
    unknown = tuple(
        name
        for name in rest
        if name not in counters and not _close(end[name], record.last[name].double(), record.initial[name])
    )
    return found | {name: then[name].to(record.last[name].dtype) for name in rest}, unknown


def _counters(model: nn.Module) -> set[str]:
    """Counters of batches in batch normalisation, which no evaluation reads.

    Averaged and cut to a whole number at each update, they come out one less or more by rounding alone, and differ from
    then on.
    """
    return {
        f"{name}.num_batches_tracked" if name else "num_batches_tracked"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


def _averaged(
    record: AverageRecord, names: Iterable[str], steps: Iterable[Step], whole: Path, until: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Buffers averaged as the weights are: after some steps, and after all of them."""
    now = {name: record.initial[name].double() for name in names}
    then = dict(now)
    for step, (a, _) in zip(steps, record.updates, strict=True):
        for name, value in now.items():
            moved = value + a * (_own(name, step.buffers, whole).double() - value)
            now[name] = moved if record.initial[name].is_floating_point() else (moved + ROUNDING).trunc()
        then = dict(now) if step.index < until else then
    return then, now


def _own(name: str, buffers: Mapping[str, Tensor], whole: Path) -> Tensor:
    """A buffer of the network itself, where those that have changed are given."""
    return buffers.get(name, whole.constants[name])


def _close(one: Tensor, other: Tensor, start: Tensor) -> bool:
    """True where two values of a buffer are the same, but for the rounding of its change."""
    if torch.equal(one.double(), other.double()):
        return True
    moved = (other.double() - start.double()).norm().item()
    return (one.double() - other.double()).norm().item() <= FOLLOWED * moved
