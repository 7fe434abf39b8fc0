"""The cost of recording a run, before anyone trains: the levels of record side by side."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pathkernel.errors import InputError
from pathkernel.recording.recorder import KernelRecorder
from pathkernel.trajectory.frozen_state import FrozenOnReading
from pathkernel.trajectory.schedule import PRECONDITIONED, RunSize, Schedule
from pathkernel.trajectory.step import Step
from pathkernel.update_rules.table import RULES

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
PROBE = 16
"""Width of the layer on which an optimizer's state is counted."""
EXTRA_SETTINGS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "amsgrad": {"amsgrad": True},
}
"""Common names for an optimizer with one of its options: SGD for the first two, Adam for the last."""


@dataclass(frozen=True)
class PlanRow:
    """One level of record for a run of a given size.

    Attributes
    ----------
    level
        What to write for ``schedule=``.
    serves
        What can be computed from it.
    bytes_per_step, total_bytes
        Stored, before compression.
    working_bytes
        Held while the record is read; for streaming, while training runs.
    extra_compute
        What it costs besides.
    """

    level: str
    serves: tuple[str, ...]
    bytes_per_step: float
    total_bytes: float
    working_bytes: float
    extra_compute: str

    def to_json(self) -> dict[str, Any]:
        """The row as numbers and text."""
        return {**asdict(self), "serves": list(self.serves)}


def plan_table(
    parameters: int | str,
    steps: int | str,
    *,
    optimizer: str = "adamw",
    batch_size: int = 64,
    bytes_per_number: int = 4,
    every: int = 10,
    queries: int = 100,
) -> list[PlanRow]:
    """The levels of record for a run that has not begun.

    Parameters
    ----------
    parameters, steps
        P and S, as numbers or as text such as ``"85k"``, ``"1.2M"``, ``"124M"``, ``"1.5B"``.
    optimizer
        Name of a class of `torch.optim`, or ``"momentum"``, ``"nesterov"``, ``"amsgrad"``, in any case.
    batch_size
        Samples per step.
    bytes_per_number
        4 for float32, 2 for half precision, 8 for float64.
    every
        For the thinned path.
    queries
        How many queries stream along, or are in a streamed Gram matrix.

    Returns
    -------
    list of PlanRow
        Every step in full; keyframes; weights alone; thinned; streaming.

    Examples
    --------
    >>> row = plan_table("85k", 10_000, optimizer="adamw")[1]
    >>> row.level, round(row.total_bytes / 1e6)
    ('Keyframes(100)', 107)
    """
    counts = {"batch_size": batch_size, "bytes_per_number": bytes_per_number, "every": every, "queries": queries}
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(
                f"`{name}={value!r}` was given",
                "It is an integer from 1 upwards",
                "Write for example `plan_table('1.2M', 10_000, batch_size=64)`",
            )
    length = parse_size(steps)
    statistics, frozen = state_numbers(optimizer)
    run = RunSize(parse_size(parameters), length, batch_size, bytes_per_number, statistics, frozen)
    schedules = [Schedule(), Schedule.keyframes_for(length), Schedule(keep="weights"), Schedule(every=every)]
    rows = [
        PlanRow(
            repr(schedule),
            tuple(name for name in schedule.serves if name != PRECONDITIONED),
            schedule.bytes_per_step(run),
            schedule.bytes_per_step(run) * length,
            schedule.working_bytes(run),
            schedule.extra_compute,
        )
        for schedule in schedules
    ]
    if statistics == 0:  # with memory, shares need a sweep backward over what is on record
        working, extra = 3.0 * 8 * run.parameters * queries, f"training: gradients of {queries} queries a step"
        rows.append(PlanRow("Streaming(StreamingShares(X))", ("shares of fixed queries",), 0.0, 0.0, working, extra))
    working, extra = 8.0 * queries**2, f"training: two tangent kernels of {queries} samples a step"
    rows.append(PlanRow("Streaming(StreamingGram(X))", ("PathKernel of fixed samples",), 0.0, 0.0, working, extra))
    return rows


def format_plan(rows: Sequence[PlanRow]) -> str:
    """The table as text, with a line on what to make of it."""
    head = ("schedule", "serves", "per step", "whole run", "to read", "extra compute")
    cells = [
        (
            row.level,
            ", ".join(row.serves),
            as_bytes(row.bytes_per_step),
            as_bytes(row.total_bytes),
            as_bytes(row.working_bytes),
            row.extra_compute,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (head, *cells)) for column in range(len(head))]
    right = (2, 3, 4)
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *cells)
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join(
        [lines[0], rule, *lines[1:], "", "Before compression, which on disk leaves about half of the weights."]
    )


def as_bytes(size: float) -> str:
    """A size that a person can read: three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}" if size else "0"
        size /= 1000
    return ""


def parse_size(text: int | str) -> int:
    """A whole number of things, from text such as ``"85k"``, ``"1.2M"``, ``"124M"``, ``"10_000"``."""
    plain = str(text).strip().lower().replace("_", "").replace(",", "")
    number, unit = (plain[:-1], plain[-1]) if plain and plain[-1].isalpha() else (plain, "")
    try:
        value = round(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value < 1:
        raise InputError(
            f"The size {text!r} was given",
            "Sizes are positive numbers, with k, M or B for thousands, millions and billions",
            "Write for example 85k, 1.2M or 124M",
        )
    return value


def state_numbers(optimizer: str) -> tuple[float, float]:
    """Numbers for each parameter that an optimizer keeps, and that a step on record freezes: counted, not assumed."""
    name = optimizer.lower()
    base = {"momentum": "sgd", "nesterov": "sgd", "amsgrad": "adam"}.get(name, name)
    known = {cls.__name__.lower(): cls for cls in RULES}
    if base not in known:
        raise InputError(
            f"`optimizer={optimizer!r}` was given",
            f"Optimizers are {', '.join([*sorted(known), *EXTRA_SETTINGS])}",
            'Write for example `optimizer="adamw"`; one of your own takes as much as one that keeps as many tensors',
        )
    settings: dict[str, Any] = {"lr": 1e-3} if base == "sgd" else {}
    X = torch.ones(2, PROBE)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        model = nn.Linear(PROBE, PROBE, bias=False)
        live = known[base](model.parameters(), **settings, **EXTRA_SETTINGS.get(name, {}))
        warnings.simplefilter("ignore")
        with KernelRecorder(model, live, nn.MSELoss(), data=(X, X), audit_every=0) as recorder:
            for _ in range(2):
                x, y = recorder.batch([0, 1])
                live.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                live.step()
    kept = [v for v in live.state[model.weight].values() if isinstance(v, torch.Tensor)]
    size = model.weight.numel()
    return _counted(kept) / size, _frozen_numbers(recorder.trajectory.store.read(1)) / size


def _frozen_numbers(step: Step) -> int:
    """Numbers that a step keeps besides θ and gradient, single ones left out."""
    if isinstance(step.frozen, FrozenOnReading):
        return _counted([*step.frozen.state.before.values(), *step.frozen.state.after.values()])
    return _counted([v for own in step.frozen.values() for v in own.values() if isinstance(v, torch.Tensor)])


def _counted(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors if tensor.numel() > 1)
