"""A block of steps as rows of bits and a record of everything else, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pathkernel.errors import TrajectoryError
from pathkernel.gradients.forward_state import ForwardState
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.runtime.checksum import row_major
from pathkernel.trajectory.frozen_state import FrozenOnReading, OptimizerState, frozen_in
from pathkernel.trajectory.step import NOTES, MicroBatch, Step, length_taken_out, notes_taken_out

if TYPE_CHECKING:
    from pathkernel.update_rules.rule import UpdateRule

DEVICES = re.compile(r"(cpu|cuda|mps|xpu|hpu|mtia|privateuseone)(:[0-9]{1,4})?")
"""Names of devices, as torch writes them."""
UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def bits(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor as unsigned integers, (n,); see `pathkernel.runtime.checksum.row_major`."""
    return row_major(tensor).view(UNSIGNED[tensor.itemsize])


def from_bits(row: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The tensor whose bits these are, (n,); shares memory."""
    signed = row.view(np.dtype(f"int{8 * row.itemsize}"))
    return torch.from_numpy(signed).view(dtype)


def whole(parts: Mapping[str, Tensor], layout: ParameterLayout, dtype: torch.dtype) -> Tensor:
    """A vector put together from the tensors of some parameters, zeros elsewhere; by numpy, see `row_major`."""
    row = np.zeros(layout.size, UNSIGNED[dtype.itemsize])
    for name, tensor in parts.items():
        row[layout.slices[name]] = bits(tensor)
    return from_bits(row, dtype)


def differences(vectors: Sequence[Tensor | None], out: np.ndarray) -> np.ndarray:
    """Bits of each vector but the first as their XOR with those of the one before: what has not changed becomes zeros.

    Parameters
    ----------
    vectors
        Rows, (n,) each; None stands for zeros.
    out
        Where to write them; further rows become zeros.
    """
    before = None
    for row, vector in enumerate(vectors):
        now = None if vector is None else bits(vector)
        if now is not None and before is not None:
            np.bitwise_xor(now, before, out=out[row])
        else:
            out[row] = now if now is not None else 0 if before is None else before
        before = now
    out[len(vectors) :] = 0
    return out


def accumulated(rows: np.ndarray) -> np.ndarray:
    """The reverse of `differences`, in place."""
    for i in range(1, len(rows)):
        np.bitwise_xor(rows[i], rows[i - 1], out=rows[i])
    return rows


class Serials:
    """Numbers mappings of buffers, and of shared arguments: the same object gets the same number while it is in use."""

    def __init__(self, following: int = 0) -> None:
        self.following = following
        self.current: list[tuple[Mapping[Any, Any], int]] = []
        self._used: set[int] = set()

    def of(self, mapping: Mapping[Any, Any]) -> int:
        """The number of a mapping."""
        for known, serial in self.current:
            if known is mapping:
                self._used.add(serial)
                return serial
        self.current.append((mapping, self.following))
        self._used.add(self.following)
        self.following += 1
        return self.following - 1

    def forget(self) -> None:
        """Let go of the mappings that were not asked for since the last call."""
        self.current = [(mapping, serial) for mapping, serial in self.current if serial in self._used]
        self._used = set()


@dataclass
class EncodedBlock:
    """Vectors and record of a block, as they are written.

    Attributes
    ----------
    points
        θ before the first step, and after each; of length 0 where it was not kept, none where it never was.
    gradients
        One for each step, of length 0 where it was not kept.
    extras
        Points between steps, edits of gradients, keyframes.
    frozen
        Stream number → for each step, tensors by parameter.
    record
        Everything else, for `pathkernel.storage.packing.pack`.
    joined
        Whether the block begins with the very tensor with which the one before ended.
    """

    points: list[Tensor]
    gradients: list[Tensor]
    extras: list[Tensor] = field(default_factory=list)
    frozen: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    joined: bool = False

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.gradients)


class BlockEncoder:
    """Encodes consecutive steps.

    Parameters
    ----------
    layout
        Of their vectors.
    streams
        (key, type) of frozen tensors → number of the array that they are written to; new ones are added.
    serials
        Numbers of the mappings of buffers.
    first_extra
        Number of the next extra vector.
    """

    def __init__(
        self, layout: ParameterLayout, streams: dict[tuple[str, str], int], serials: Serials, first_extra: int
    ) -> None:
        self.layout, self.shapes = layout, dict(zip(layout.names, layout.shapes, strict=True))
        self.streams, self.serials, self.first_extra = streams, serials, first_extra
        self._tables: dict[str, dict[str, int]] = {"groups": {}, "settings": {}, "modes": {}, "active": {}}
        self._values: dict[str, list[Any]] = {name: [] for name in self._tables}
        self._mappings: dict[int, Mapping[Any, Any]] = {}

    def encode(self, steps: Sequence[Step], previous: Tensor | None) -> EncodedBlock:
        """The block of some steps; ``previous`` is the end of the step before them."""
        kept = any(step.after.numel() for step in steps)  # where not, a keyframe's θ is an extra vector
        points = [steps[0].before, *(step.after for step in steps)] if kept else []
        joined = kept and previous is steps[0].before
        block = EncodedBlock(points, [step.gradient for step in steps], joined=joined)
        places = {id(steps[0].before): 0} if kept else {}

        def place(point: Tensor) -> int:
            if id(point) not in places:
                places[id(point)] = self._extra(block, point)
            return places[id(point)]

        entries = []
        for row, step in enumerate(steps):
            entries.append(
                {
                    "changes": [[name, place(point)] for name, point in step.changes],
                    "before": place(step.before) if step.before.numel() else None,
                    "left_out": [name for name in ("after", "gradient") if not getattr(step, name).numel()],
                    "gradient_changes": {
                        name: self._extra(block, change) for name, change in step.gradient_changes.items()
                    },
                    "active": self._shared("active", [name for name in self.shapes if name in step.active]),
                    "groups": self._shared("groups", dict(step.groups)),
                    "settings": self._shared("settings", tuple(dict(group) for group in step.hyperparameters)),
                    "batches": [self._batch(batch) for batch in step.batches],
                    "frozen": self._frozen(block, step, row),
                    "buffers": self._mapping(step.buffers),
                    "length": step.length,
                    "differentiated": sorted(step.differentiated),
                }
            )
            if step.after.numel():
                places[id(step.after)] = row + 1
        block.record = {
            "steps": entries,
            **self._values,
            "mappings": {serial: dict(mapping) for serial, mapping in self._mappings.items()},
            "streams": [[key, dtype, number] for (key, dtype), number in self.streams.items()],
        }
        return block

    def _extra(self, block: EncodedBlock, vector: Tensor) -> int:
        block.extras.append(vector)
        return -(self.first_extra + len(block.extras))

    def _shared(self, table: str, value: Any) -> int:
        """The place of a value in a table that the block's steps share."""
        places, text = self._tables[table], repr(value)  # which tells 1, 1.0 and True apart and is exact for floats
        if text not in places:
            places[text] = len(places)
            self._values[table].append(value)
        return places[text]

    def _mapping(self, mapping: Mapping[Any, Any]) -> int:
        serial = self.serials.of(mapping)
        self._mappings[serial] = mapping
        return serial

    def _batch(self, batch: MicroBatch) -> list[Any]:
        states = [self._state(state) for state in (batch.state, *batch.later)]
        later = list(batch.later_cotangents)
        captured = [batch.cotangents, batch.sampled_cotangents, batch.loss_slope, later, batch.channel]
        captured += [batch.source, batch.parts]
        return [batch.ids, batch.weights, batch.inputs, batch.targets, states, captured]

    def _state(self, state: ForwardState) -> list[Any]:
        modes = state.modes if isinstance(state.modes, bool) else dict(state.modes)
        buffers = None if state.buffers is None else self._mapping(state.buffers)
        shared = [self._mapping(state.arguments)] if state.arguments else []
        return [self._shared("modes", modes), dict(state.generators), state.autocast, buffers, *shared]

    def _frozen(self, block: EncodedBlock, step: Step, row: int) -> dict[str, Any]:
        """Frozen tensors, or the optimizer's state that they follow from.

        By parameter: [key, number of a stream] for a tensor of the parameter's shape, else [key, None, value].
        Keyframes are too rare for a stream: theirs lie in extra vectors, whose places are negative.
        """
        if isinstance(step.frozen, FrozenOnReading):
            state = step.frozen.state

            def rows(prefix: str, vectors: Mapping[str, Tensor]) -> list[list[Any]]:
                return [[key, self._stream(block, prefix + key, row, "", vectors[key])] for key in vectors]

            return {
                "before": rows("before ", state.before),
                "after": rows("", state.after),
                "numbers": dict(state.numbers),
                "fresh": self._shared("active", [name for name in self.shapes if name in state.fresh]),
                "device": state.device,
            }
        keyframe = {} if step.after.numel() else self._keyframe(block, step)
        encoded: dict[str, Any] = {}
        for name, values in step.frozen.items():
            encoded[name] = [
                [key, None, value]
                if name not in self.shapes or not _is_regular(value, self.shapes[name])
                else [key, keyframe[key, value.dtype]]
                if (key, value.dtype) in keyframe
                else [key, self._stream(block, key, row, name, value)]
                for key, value in values.items()
            ]
        if step.replay is not None:
            encoded[NOTES] = [[key, None, value] for key, value in vars(step.replay).items()]
        return {"parameters": encoded}

    def _keyframe(self, block: EncodedBlock, step: Step) -> dict[tuple[str, torch.dtype], int]:
        """Put the tensors of an optimizer's state into an extra vector for each key; returns their places."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, values in step.frozen.items():
            for key, value in values.items():
                if name in self.shapes and _is_regular(value, self.shapes[name]) and value.dtype == step.before.dtype:
                    parts.setdefault(key, {})[name] = value
        dtype = block.gradients[0].dtype
        return {(key, dtype): self._extra(block, whole(tensors, self.layout, dtype)) for key, tensors in parts.items()}

    def _stream(self, block: EncodedBlock, key: str, row: int, name: str, value: Tensor) -> int:
        """Put a tensor into the rows of its key; returns their number. Without a name it is a whole row."""
        dtype = str(value.dtype).removeprefix("torch.")
        number = self.streams.setdefault((key, dtype), len(self.streams))
        block.frozen.setdefault(number, [{} for _ in block.gradients])[row][name] = value
        return number


def _is_regular(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and value.is_floating_point() and value.numel() > 1


@dataclass(frozen=True)
class BlockRows:
    """Vectors that the record of one step refers to.

    Attributes
    ----------
    layout
        Where parameters lie in the vectors as they were written.
    point, edit
        θ, and changes of gradients, by place.
    before, after, gradient
        The step's own vectors as they were written, before θ was extended.
    frozen
        The step's row of a stream, by number, or an extra vector, by place.
    mapping
        Buffers by serial number.
    """

    layout: ParameterLayout
    point: Callable[[int], Tensor]
    edit: Callable[[int], Tensor]
    before: Tensor
    after: Tensor
    gradient: Tensor
    frozen: Callable[[int], Tensor]
    mapping: Callable[[int], Mapping[str, Tensor]]


def decode_step(
    index: int,
    record: Mapping[str, Any],
    entry: Mapping[str, Any],
    rows: BlockRows,
    ends: tuple[Tensor, Tensor, Tensor],
    rule: UpdateRule | None,
    thinned: bool,
) -> Step:
    """One step of a block.

    Parameters
    ----------
    index
        s.
    record, entry
        The block's record, and the step's own part of it.
    rows
        What they refer to.
    ends
        θ_s, θ_{s+1} and the gradient, as long as θ is now.
    rule
        For what is frozen, where that follows from the optimizer's state.
    thinned
        Whether the path is; see `pathkernel.trajectory.step.length_taken_out`.
    """
    before, after, gradient = ends
    active = frozenset(record["active"][entry["active"]])
    groups, settings = record["groups"][entry["groups"]], record["settings"][entry["settings"]]
    settings, length = (settings, entry["length"]) if "length" in entry else length_taken_out(settings, thinned)
    if type(length) is not int or length < 1:
        raise ValueError(f"a step of length {str(length)[:20]}")
    if not all(isinstance(group.get("lr", 0), (int, float)) for group in settings):
        raise ValueError("a learning rate that is no number")

    def state(encoded: list[Any]) -> ForwardState:
        modes, generators, autocast, buffers, *shared = encoded
        mapping = None if buffers is None else rows.mapping(buffers)
        mixed = () if autocast is None else (autocast[0],)
        if not all(DEVICES.fullmatch(name) for name in (*generators, *mixed)):  # torch looks their modules up by name
            raise ValueError("a device that there is not")
        if autocast is not None and not (len(autocast) == 2 and isinstance(autocast[1], torch.dtype)):
            raise ValueError("mixed precision of no floating type")
        arguments: Mapping[Any, Any] = rows.mapping(shared[0]) if shared else {}
        if not all(isinstance(key, (str, int)) for key in arguments):
            raise ValueError("arguments without names")
        return ForwardState(record["modes"][modes], generators, autocast, mapping, arguments)

    def batch(encoded: list[Any]) -> MicroBatch:
        ids, weights, inputs, targets, states, *rest = encoded
        first, *later = (state(one) for one in states)
        # Stores of versions 1 and 2 have nothing of their cotangents: the loss is evaluated again.
        cotangents, sampled, slope, others, channel, *owned = rest[0] if rest else (None, None, None, (), None)
        source, parts = owned or (None, None)
        if ids.dim() != (1 if parts is None else 2) or (parts is not None and parts.shape != ids.shape):
            raise ValueError(f"ids of shape {tuple(ids.shape)}")
        captured = cotangents, sampled, slope, tuple(others), channel, source, parts
        return MicroBatch(ids, weights, inputs, targets, first, tuple(later), *captured)

    def found() -> Mapping[str, Mapping[str, Any]]:
        encoded = entry["frozen"]
        if "parameters" in encoded:
            return {name: _frozen_of(name, pairs, rows) for name, pairs in encoded["parameters"].items()}
        kept = OptimizerState(
            {key: rows.frozen(number) for key, number in encoded["before"]},
            {key: rows.frozen(number) for key, number in encoded["after"]},
            encoded["numbers"],
            frozenset(record["active"][encoded["fresh"]]),
            encoded["device"],
        )
        evaluate = partial(_evaluate, rule, rows.layout)
        return FrozenOnReading(kept, evaluate, rows.before, rows.gradient, rows.after, active, groups, settings)

    frozen, replay = notes_taken_out(found())
    if rows.layout.size and not after.numel() and replay is None:
        raise ValueError("a step that neither has an end nor says how it is trained again")
    return Step(
        index=index,
        before=before,
        after=after,
        gradient=gradient,
        active=active,
        batches=tuple(batch(one) for one in entry["batches"]),
        groups=groups,
        hyperparameters=settings,
        frozen=frozen,
        changes=tuple((name, rows.point(place)) for name, place in entry["changes"]),
        gradient_changes={name: rows.edit(place) for name, place in entry["gradient_changes"].items()},
        buffers=rows.mapping(entry["buffers"]),
        length=length,
        differentiated=frozenset(entry.get("differentiated", ())),
        replay=replay,
    )


def _frozen_of(name: str, pairs: list[list[Any]], rows: BlockRows) -> dict[str, Any]:
    def tensor(number: int) -> Tensor:
        shape = rows.layout.shapes[rows.layout.names.index(name)]
        return rows.frozen(number)[rows.layout.slices[name]].reshape(shape)

    def plain(value: Any) -> Any:
        # Single numbers go with tensors anywhere; optimizers keep theirs on the CPU.
        return value.to(rows.before.device) if isinstance(value, Tensor) and value.dim() else value

    return {key: plain(rest[0]) if number is None else tensor(number) for key, number, *rest in pairs}


def _evaluate(rule: UpdateRule | None, layout: ParameterLayout, taken: FrozenOnReading) -> Any:
    if rule is None:
        raise TrajectoryError(
            "What is frozen in a step was asked of a store that was opened without its update rule",
            "It follows from the optimizer's state by the rule",
            "Write `Trajectory.open(path, model=model, loss=loss, data=data)`, with `rule=` for a rule of your own",
        )
    return frozen_in(rule, layout, taken)
