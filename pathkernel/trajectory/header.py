"""Everything of a trajectory that is not a step: parameters, start and end, versions, fingerprints.

What can be read without tensors stands as JSON in the attributes of the store's group; see
docs/reference/storage_format.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel import __version__
from pathkernel.errors import InputError, StoreError, check
from pathkernel.parameters import ParameterLayout
from pathkernel.storage import Group, damaged
from pathkernel.trajectory import identity
from pathkernel.trajectory.packing import DTYPES
from pathkernel.trajectory.replay import ReplayStore
from pathkernel.trajectory.schedule import EVERY_STEP, Schedule

if TYPE_CHECKING:
    from pathkernel.trajectory.reference_outputs import ReferenceOutputs
    from pathkernel.trajectory.trajectory import Trajectory

FORMAT, VERSION = "pathkernel trajectory", 2
"""Version 2 gives a step its length, which thinned paths need; all others are readable as version 1."""
MAX_NUMBERS = 2**44
"""No θ is longer."""


@dataclass(frozen=True)
class End:
    """How a recording was left.

    Attributes
    ----------
    values
        Name of the array with the packed tail, final buffers and averages, and its length in bytes.
    steps
        How many steps there were.
    weights
        Digest of the model's parameters and buffers.
    buffers
        Serial number of the final buffers, as in the blocks' records.
    outputs
        `ReferenceOutputs.final` as lists; None where it is not known.
    """

    values: tuple[str, int]
    steps: int
    weights: str
    buffers: int
    outputs: list[list[float]] | None = None


@dataclass(frozen=True)
class Header:
    """What a store says of its trajectory.

    Attributes
    ----------
    dtype
        Floating type of θ.
    capacity
        Most steps in a block.
    layouts
        Parameters of θ, one layout for each time that it was extended.
    tails
        Lengths in bytes of the packed values of the parameters that joined, one for each layout but the first.
    start
        Length in bytes of the packed start values.
    rule
        Name, class and memory of the update rule.
    reduction, regularizers, averages
        As given to the recorder; the last two by name.
    versions
        Of the libraries that wrote it.
    fingerprints
        Of ``"model"``, ``"loss"`` and ``"data"``.
    schedule
        What was kept of each step.
    replay
        Where steps are trained again: class of the optimizer, length in bytes of its packed constants, and number of
        threads.
    outputs
        Of `ReferenceOutputs`, what is known when recording begins: ``samples``, ``varying`` and ``values``, the outputs
        at θ_0 as lists. None where there are none.
    end
        None while the recording goes on, or where it was cut off.
    """

    dtype: torch.dtype
    capacity: int
    layouts: tuple[ParameterLayout, ...]
    tails: tuple[int, ...]
    start: int
    rule: Mapping[str, Any]
    reduction: str
    regularizers: tuple[str, ...]
    averages: tuple[str, ...]
    versions: Mapping[str, str]
    fingerprints: Mapping[str, Any]
    schedule: Schedule = EVERY_STEP
    replay: Mapping[str, Any] | None = None
    outputs: Mapping[str, Any] | None = None
    end: End | None = None

    @classmethod
    def of(cls, trajectory: Trajectory, capacity: int, start: int, constants: int = 0) -> Header:
        """The header of a trajectory that begins; see `start` and `replay` for the lengths of packed values."""
        store, schedule, replay = trajectory.store, trajectory.schedule, None
        if isinstance(store, ReplayStore):
            kind = identity.named(store.replay.kind)
            replay = {"optimizer": kind, "constants": constants, "threads": store.threads or 0}
        thinned = isinstance(schedule, Schedule) and schedule.weights_only
        return cls(
            dtype=trajectory.dtype,
            capacity=capacity,
            layouts=(trajectory.layout,),
            tails=(),
            start=start,
            rule=rule_identity(trajectory.rule),
            reduction=trajectory.objective.reduction,
            regularizers=tuple(trajectory.objective.regularizers),
            averages=tuple(trajectory.averages),
            versions=versions(),
            fingerprints=fingerprints(trajectory),
            schedule=schedule if isinstance(schedule, Schedule) and (thinned or replay) else EVERY_STEP,
            replay=replay,
            outputs=reference_identity(trajectory.reference),
        )

    def to_json(self) -> dict[str, Any]:
        """The group's attributes."""
        end = None if self.end is None else {**vars(self.end), "values": list(self.end.values)}
        return {
            "format": FORMAT,
            "version": VERSION if self.schedule.weights_only else 1,
            "dtype": str(self.dtype).removeprefix("torch."),
            "steps_per_block": self.capacity,
            "regions": [_table(layout) for layout in self.layouts],
            "tails": list(self.tails),
            "start": self.start,
            "rule": dict(self.rule),
            "reduction": self.reduction,
            "regularizers": list(self.regularizers),
            "averages": list(self.averages),
            "versions": dict(self.versions),
            "fingerprints": dict(self.fingerprints),
            "schedule": dict(vars(self.schedule)),
            "replay": None if self.replay is None else dict(self.replay),
            "outputs": None if self.outputs is None else dict(self.outputs),
            "end": end,
        }

    @classmethod
    def read(cls, group: Group) -> Header:
        """The header of a store.

        Raises
        ------
        StoreError
            For another format, or a newer version of it.
        CorruptBlockError
            Where it makes no sense.
        """
        attributes, where = group.attributes(), group.path / "zarr.json"
        check(
            attributes.get("format") == FORMAT,
            StoreError,
            f"`{group.path}` holds {str(attributes.get('format'))[:100]!r}",
            f"A recorded trajectory says {FORMAT!r} in its attributes",
            "Give the path that was given to `KernelRecorder(..., store=path)`",
        )
        version = attributes.get("version")
        libraries = attributes.get("versions")
        written_by = str(libraries.get("pathkernel", "?") if isinstance(libraries, dict) else "?")[:40]
        check(
            type(version) is int and 1 <= version <= VERSION,
            StoreError,
            f"`{group.path}` has version {str(version)[:20]} of the format, written by pathkernel {written_by}",
            f"pathkernel {__version__} reads versions 1 to {VERSION}",
            f"Install pathkernel {written_by} or later",
        )
        group.check(attributes)
        try:
            return cls._of_json(attributes)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
            raise damaged(where, f"the header makes no sense ({str(error)[:200]})") from None

    @classmethod
    def _of_json(cls, content: dict[str, Any]) -> Header:
        end = content["end"]
        if end is not None:
            name, length = end["values"]
            values = _text(name), _count(length)
            final = None if end.get("outputs") is None else _matrix(end["outputs"])
            end = End(values, _count(end["steps"]), _text(end["weights"]), int(end["buffers"]), final)
        layouts = tuple(_layout(table) for table in content["regions"])
        tails = tuple(_count(n) for n in content["tails"])
        if not layouts or len(tails) != len(layouts) - 1:
            raise ValueError("regions and tails")
        dtype = DTYPES[content["dtype"]]
        if not dtype.is_floating_point or not 1 <= _count(content["steps_per_block"]) <= 2**20:
            raise ValueError("type or steps per block")
        if content["reduction"] not in ("mean", "sum"):
            raise ValueError("reduction")
        schedule, replay = _schedule(content["schedule"]), content["replay"]
        if replay is not None:
            counts = {key: _count(replay[key]) for key in ("constants", "threads")}
            replay = {"optimizer": _text(replay["optimizer"]), **counts}
        if (replay is None) != (schedule.keyframes is None):
            raise ValueError("schedule and replay")
        outputs = content.get("outputs")  # optional: stores that were written before there were any lack it
        if outputs is not None:
            samples = [_count(sample) for sample in outputs["samples"]]
            outputs = {"samples": samples, "varying": bool(outputs["varying"]), "values": _matrix(outputs["values"])}
        return cls(
            dtype=dtype,
            capacity=content["steps_per_block"],
            layouts=layouts,
            tails=tails,
            start=_count(content["start"]),
            rule={key: content["rule"][key] for key in ("name", "class", "memory")},
            reduction=_text(content["reduction"]),
            regularizers=tuple(_text(name) for name in content["regularizers"]),
            averages=tuple(_text(name) for name in content["averages"]),
            versions={_text(key): _text(value) for key, value in content["versions"].items()},
            fingerprints={key: dict(content["fingerprints"][key]) for key in ("model", "loss", "data")},
            schedule=schedule,
            replay=replay,
            outputs=outputs,
            end=end,
        )

    def ended(self, end: End | None) -> Header:
        """The same header with another end."""
        return replace(self, end=end)


def _table(layout: ParameterLayout) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(shape), "offset": layout.slices[name].start}
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    ]


def _layout(table: list[dict[str, Any]]) -> ParameterLayout:
    names = tuple(_text(row["name"]) for row in table)
    sizes = [[_count(n) for n in row["shape"]] for row in table]
    if len(set(names)) != len(names) or sum(int(np.prod(s, dtype=object)) for s in sizes) > MAX_NUMBERS:
        raise ValueError("parameter table")
    return ParameterLayout(names, tuple(torch.Size(size) for size in sizes))


def _schedule(content: dict[str, Any]) -> Schedule:
    try:
        return Schedule(**content)
    except InputError as error:
        raise ValueError(error.found) from None


def _live_parameters(trajectory: Trajectory) -> Tensor:
    """θ at the end, which would take a replay to be found from the record."""
    live = dict(trajectory.model.named_parameters(remove_duplicate=False))
    return trajectory.layout.flatten({name: live[name].detach() for name in trajectory.layout.names}, trajectory.dtype)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBERS:
        raise ValueError(f"{str(value)[:40]} is no size")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{str(value)[:40]} is no text")
    return value


def _matrix(rows: Any) -> list[list[float]]:
    matrix = [[float(value) for value in row] for row in rows]
    if not matrix or len({len(row) for row in matrix}) != 1:
        raise ValueError("no matrix")
    return matrix


def versions() -> dict[str, str]:
    """Of the libraries at hand."""
    return {
        "pathkernel": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def rule_identity(rule: Any) -> dict[str, Any]:
    """Name, class and memory of an update rule."""
    return {"name": rule.name, "class": identity.named(type(rule)), "memory": list(rule.memory)}


def fingerprints(trajectory: Trajectory) -> dict[str, Any]:
    """Of model, loss and data."""
    return {
        "model": identity.architecture(trajectory.model),
        "loss": identity.loss_identity(trajectory.objective.loss),
        "data": identity.data_identity(trajectory.data),
    }


def reference_identity(reference: ReferenceOutputs | None) -> dict[str, Any] | None:
    """What is known of the reference outputs when a recording begins."""
    if reference is None:
        return None
    samples, values = list(reference.samples), reference.initial.tolist()
    return {"samples": samples, "varying": reference.varying, "values": values}


def start_values(trajectory: Trajectory) -> dict[str, Any]:
    """What is packed when a recording begins."""
    return {
        "initial": trajectory.initial,
        "constants": trajectory.constants,
        "initial_memory": trajectory.initial_memory,
        "averages": {name: record.initial for name, record in trajectory.averages.items()},
        "reference_inputs": (
            pytree.tree_leaves(trajectory.reference.inputs)
            if trajectory.reference is not None and trajectory.reference.varying
            else None
        ),
    }


def end_values(trajectory: Trajectory) -> dict[str, Any]:
    """What is packed when it ends."""
    return {
        "final": _live_parameters(trajectory) if isinstance(trajectory.store, ReplayStore) else None,
        "tail": trajectory.tail,
        "final_buffers": dict(trajectory.final_buffers),
        "averages": {
            name: {"updates": list(record.updates), "last": record.last}
            for name, record in trajectory.averages.items()
        },
    }
