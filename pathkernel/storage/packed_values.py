"""Values that are packed when a recording begins and when it ends, and the form that they have when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel.storage.header import Header
from pathkernel.trajectory.averages import AverageRecord
from pathkernel.trajectory.run import End, Run


def start_values(run: Run, averages: Mapping[str, AverageRecord], header: Header) -> dict[str, Any]:
    """Values that are packed when a recording begins."""
    return {
        "header": header.digest(),
        "initial": run.initial,
        "constants": run.constants,
        "initial_memory": run.initial_memory,
        "averages": {name: record.initial for name, record in averages.items()},
        "reference_inputs": (
            pytree.tree_leaves(run.reference.inputs) if run.reference is not None and run.reference.varying else None
        ),
    }


def checked_start(values: Any, header: Header) -> dict[str, Any]:
    """Values that were read, if they have the form of `start_values`.

    Raises
    ------
    ValueError, TypeError, KeyError, AttributeError
        Where they have not.
    """
    initial, records = values["initial"], values["averages"]
    if values.get("header", header.digest()) != header.digest():  # stores of earlier versions do not say
        raise ValueError("it was written with another header")
    if initial.shape != (header.layouts[0].size,) or initial.dtype != header.dtype:
        raise ValueError(f"θ of shape {tuple(initial.shape)}")
    _tensors(values["constants"])
    for memory in values["initial_memory"].values():
        _tensors(dict(enumerate(memory)))
    for record in records.values():
        _tensors(record)
    if set(records) != set(header.averages):
        raise ValueError("other averages")
    return values


def checked_end(values: Any, header: Header) -> dict[str, Any]:
    """The same for `end_values`."""
    size = (header.layouts[-1].size,)
    points = [] if values["final"] is None else [values["final"]]
    points += [point for _, point in values["tail"]]
    if any(point.shape != size or point.dtype != header.dtype for point in points):
        raise ValueError("a point of another size")
    _tensors(values["final_buffers"])
    for record in values["averages"].values():
        _tensors(record["last"])
        list(record["updates"])
    if set(values["averages"]) != set(header.averages):
        raise ValueError("other averages")
    return values


def _tensors(values: Mapping[Any, Any]) -> None:
    if not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError("something else than tensors")


def end_values(run: Run, end: End) -> dict[str, Any]:
    """Values that are packed when it ends; θ where it would take a replay to be found from the record."""
    return {
        "final": None if run.optimizer is None else run.live_parameters(),
        "tail": end.tail,
        "final_buffers": dict(end.final_buffers),
        "averages": {
            name: {"updates": list(record.updates), "last": record.last} for name, record in end.averages.items()
        },
    }
