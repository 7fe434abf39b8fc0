"""Everything of a trajectory that is not a step: parameters, start and end, versions, fingerprints.

What can be read without tensors stands as JSON in the attributes of the store's group; see
docs/reference/storage_format.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pathkernel._version import __version__
from pathkernel.errors import InputError, StoreError
from pathkernel.gradients.batch_axes import BatchAxis, batch_axis_of_json, batch_axis_to_json
from pathkernel.gradients.losses import check_task
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.runtime.checksum import DTYPES
from pathkernel.storage import fingerprints as identity
from pathkernel.storage.format import Group, damaged
from pathkernel.trajectory.reference_outputs import ReferenceOutputs
from pathkernel.trajectory.run import Run
from pathkernel.trajectory.schedule import EVERY_STEP, Nothing, Schedule
from pathkernel.update_rules.joint import JointRule

FORMAT, VERSION = "pathkernel trajectory", 4
"""Version 2 gives a step its length, which thinned paths need; version 3 keeps the slopes of the loss at the outputs of
each batch, and what of the returned the outputs are; version 4 keeps what networks were given beside samples."""
FUNCTION = "<function>"
"""Stands in a header for a ``returns=`` that is a function, which has to be passed again."""
MAX_NUMBERS = 2**44
"""No θ is longer."""
END = re.compile(r"end-[0-9]{1,9}")
"""Names of arrays with the values at the end."""


@dataclass(frozen=True)
class StoredEnd:
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
    samples
        How many there were, where they were counted, else 0; and `pathkernel.trajectory.samples.Samples.lengths`.
    """

    values: tuple[str, int]
    steps: int
    weights: str
    buffers: int
    outputs: list[list[float]] | None = None
    samples: tuple[int, list[list[int]]] = field(default_factory=lambda: (0, []))


@dataclass(frozen=True)
class Header:
    """Description of its trajectory that a store begins with.

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
        Name, class and memory of the update rule; of a joint one also those of its ``parts``.
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
    checksums
        CRC32C of packed values, by the name of their array; stores of earlier versions lack them.
    end
        None while the recording goes on, or where it was cut off.
    returns, task
        As given to the recorder; `FUNCTION` in place of a function.
    watch, batch_axis
        See `pathkernel.trajectory.run.Run`.
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
    checksums: Mapping[str, int] = field(default_factory=dict)
    end: StoredEnd | None = None
    returns: str | int | None = None
    task: str | None = None
    watch: tuple[str, ...] = ()
    batch_axis: BatchAxis = 0

    @classmethod
    def of(cls, run: Run, averages: Iterable[str], capacity: int) -> Header:
        """The header of a run that begins, of which nothing is packed yet; see `started`."""
        schedule, replay = run.schedule, None
        if run.optimizer is not None:
            kind = identity.named(run.optimizer.kind)
            replay = {"optimizer": kind, "constants": 0, "threads": run.optimizer.threads or 0}
        thinned = isinstance(schedule, Schedule) and schedule.weights_only
        return cls(
            dtype=run.dtype,
            capacity=capacity,
            layouts=(run.layout,),
            tails=(),
            start=0,
            rule=rule_identity(run.rule),
            reduction=run.objective.reduction,
            regularizers=tuple(run.objective.regularizers),
            averages=tuple(averages),
            versions=versions(),
            fingerprints=fingerprints(run),
            schedule=schedule if isinstance(schedule, Schedule) and (thinned or replay) else EVERY_STEP,
            replay=replay,
            outputs=reference_identity(run.reference),
            returns=FUNCTION if callable(run.returns) else run.returns,
            task=run.task,
            watch=run.watch,
            batch_axis=run.batch_axis,
        )

    def to_json(self) -> dict[str, Any]:
        """The group's attributes."""
        end = None
        if self.end is not None:
            end = {**vars(self.end), "values": list(self.end.values), "samples": list(self.end.samples)}
        return {
            "format": FORMAT,
            "version": VERSION,
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
            "schedule": self.schedule.settings,
            "replay": None if self.replay is None else dict(self.replay),
            "outputs": None if self.outputs is None else dict(self.outputs),
            "returns": self.returns,
            "task": self.task,
            "watch": list(self.watch),
            "batch_axis": batch_axis_to_json(self.batch_axis),
            "checksums": dict(self.checksums),
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
        if attributes.get("format") != FORMAT:
            raise StoreError(
                f"`{group.path}` holds {str(attributes.get('format'))[:100]!r}",
                f"A recorded trajectory says {FORMAT!r} in its attributes",
                "Give the path that was given to `KernelRecorder(..., store=path)`",
            )
        version = attributes.get("version")
        libraries = attributes.get("versions")
        written_by = str(libraries.get("pathkernel", "?") if isinstance(libraries, dict) else "?")[:40]
        if type(version) is not int or not 1 <= version <= VERSION:
            raise StoreError(
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
            if not END.fullmatch(name):  # it is deleted when the recording goes on
                raise ValueError(f"{name[:40]!r} is no name of an array with an end")
            values = name, _count(length)
            final = None if end.get("outputs") is None else _matrix(end["outputs"])
            number, lengths = end.get("samples", (0, []))  # missing before version 4
            seen = _count(number), [[int(length) for length in own] for own in lengths]
            end = StoredEnd(values, _count(end["steps"]), _text(end["weights"]), int(end["buffers"]), final, seen)
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
            rule=_rule(content["rule"]),
            reduction=_text(content["reduction"]),
            regularizers=tuple(_text(name) for name in content["regularizers"]),
            averages=tuple(_text(name) for name in content["averages"]),
            versions=_texts(content["versions"]),
            fingerprints=_fingerprints(content["fingerprints"]),
            schedule=schedule,
            replay=replay,
            outputs=outputs,
            # optional, as the outputs
            checksums={_text(name): _count(n) for name, n in content.get("checksums", {}).items()},
            end=end,
            returns=_returns(content.get("returns")),
            task=check_task(content.get("task")),
            watch=tuple(_text(name) for name in content.get("watch", [])),
            batch_axis=batch_axis_of_json(content.get("batch_axis", 0)),
        )

    def digest(self) -> str:
        """BLAKE2b of what says how the steps are to be read, none of which changes while they are recorded."""
        content = self.to_json()
        said = {key: content[key] for key in ("dtype", "rule", "reduction", "regularizers", "averages", "fingerprints")}
        said["optimizer"] = None if self.replay is None else self.replay["optimizer"]
        if self.returns is not None:
            said["returns"] = self.returns
        if self.watch or self.batch_axis:
            said["call"] = [content["watch"], content["batch_axis"]]
        text = json.dumps(said, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def started(self, start: tuple[int, int], constants: tuple[int, int] | None) -> Header:
        """The same header with lengths and checksums of the start values and, with keyframes, of the optimizer's."""
        checksums, replay = {"start": start[1]}, self.replay
        if constants is not None and replay is not None:
            checksums["optimizer"], replay = constants[1], {**replay, "constants": constants[0]}
        return replace(self, start=start[0], replay=replay, checksums=checksums)

    def ended(self, end: StoredEnd | None, checksum: int | None = None) -> Header:
        """The same header with another end, and the checksum of its values."""
        old = None if self.end is None else self.end.values[0]
        checksums = {name: value for name, value in self.checksums.items() if name != old}
        if end is not None and checksum is not None:
            checksums[end.values[0]] = checksum
        return replace(self, checksums=checksums, end=end)

    def extended(self, layout: ParameterLayout, length: int, checksum: int) -> Header:
        """The same header where parameters join θ, with the length and the checksum of their packed values."""
        checksums = {**self.checksums, region_array(len(self.layouts)): checksum}
        return replace(self, layouts=(*self.layouts, layout), tails=(*self.tails, length), checksums=checksums)

    def without_regions(self, last: int) -> Header:
        """The same header without what followed a region, and without an end."""
        header, late = self.ended(None), {region_array(i) for i in range(last + 1, len(self.layouts))}
        checksums = {name: value for name, value in header.checksums.items() if name not in late}
        return replace(header, layouts=self.layouts[: last + 1], tails=self.tails[:last], checksums=checksums)


def region_array(index: int) -> str:
    """Name of the array with the values of the parameters that joined θ at the beginning of a region."""
    return f"region-{index}"


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
        schedule = Schedule(**content)
    except InputError as error:
        raise ValueError(error.found) from None
    if isinstance(schedule, Nothing):
        raise ValueError("nothing is kept")
    return schedule


def _rule(content: dict[str, Any]) -> dict[str, Any]:
    memory = [_text(key) for key in content["memory"]]
    found = {"name": _text(content["name"]), "class": _text(content["class"]), "memory": memory}
    return {**found, "parts": [_rule(part) for part in content["parts"]]} if "parts" in content else found


def _fingerprints(content: dict[str, Any]) -> dict[str, Any]:
    model, loss, data = (dict(content[key]) for key in ("model", "loss", "data"))
    _texts(model["modules"]), _texts(model["state"]), _text(loss["name"]), _texts(loss["settings"])
    _count(data["count"]), _text(data["digest"]), [_text(shape) for shape in data["shapes"]]
    return {"model": model, "loss": loss, "data": data}


def _texts(content: dict[str, Any]) -> dict[str, str]:
    return {_text(key): _text(value) for key, value in content.items()}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBERS:
        raise ValueError(f"{str(value)[:40]} is no size")
    return value


def _returns(value: Any) -> str | int | None:
    if value is not None and type(value) not in (str, int):
        raise ValueError(f"{str(value)[:40]} is no part of what a network returns")
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
    """Versions of the libraries at hand."""
    return {
        "pathkernel": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def rule_identity(rule: Any) -> dict[str, Any]:
    """Name, class and memory of an update rule, and of the parts of a joint one."""
    found = {"name": rule.name, "class": identity.named(type(rule)), "memory": list(rule.memory)}
    return {**found, "parts": list(map(rule_identity, rule.rules))} if isinstance(rule, JointRule) else found


def fingerprints(run: Run) -> dict[str, Any]:
    """Fingerprints of model, loss and data."""
    return {
        "model": identity.architecture(run.model),
        "loss": identity.loss_identity(run.objective.loss),
        "data": identity.data_identity(run.data),
    }


def reference_identity(reference: ReferenceOutputs | None) -> dict[str, Any] | None:
    """Samples and outputs of the reference outputs that are known when a recording begins."""
    if reference is None:
        return None
    samples, values = list(reference.samples), reference.initial.tolist()
    return {"samples": samples, "varying": reference.varying, "values": values}
