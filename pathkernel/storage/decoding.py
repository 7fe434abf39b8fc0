"""One block of a store, read: its steps, each piece only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pathkernel.errors import SENSELESS, PathKernelError
from pathkernel.runtime.checksum import DTYPES
from pathkernel.storage.blocks import COLUMNS, Blocks, Region
from pathkernel.storage.encoding import BlockRows, accumulated, decode_step, from_bits
from pathkernel.storage.format import damaged
from pathkernel.trajectory.step import Step

if TYPE_CHECKING:
    from pathkernel.update_rules.rule import UpdateRule


class StoredBlock:
    """The steps of one block.

    Parameters
    ----------
    blocks, number, region
        Which one.
    tail
        Values of parameters that joined θ after it, or None.
    boundary
        The θ that a block begins with where it is shared with the block before: the tensor of a block's number, made
        by the function that is given where nobody has it; None where it is not shared.
    mapping
        Buffers by serial number, where a neighbour has them already.
    rule, thinned
        See `pathkernel.storage.encoding.decode_step`.
    device
        Where vectors are put when they are read: that of the network; None for the CPU.
    """

    def __init__(
        self,
        blocks: Blocks,
        number: int,
        region: Region,
        tail: Tensor | None,
        boundary: Callable[[int, Callable[[], Tensor]], Tensor | None],
        mapping: Callable[[int], Mapping[str, Tensor] | None],
        rule: UpdateRule | None,
        thinned: bool,
        device: torch.device | None = None,
    ) -> None:
        self.blocks, self.number, self.region, self.tail = blocks, number, region, tail
        self.commit = blocks.commit(number)
        self.boundary, self._known_mapping, self.rule, self.thinned = boundary, mapping, rule, thinned
        self.device = device or torch.device("cpu")
        self._steps: dict[int, Step] = {}
        self._frozen: dict[int, np.ndarray] = {}
        self._extras: dict[int, Tensor] = {}
        self.mappings: dict[int, Mapping[str, Tensor]] = {}

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything that is not a row."""
        return self.blocks.record(self.number)

    def step(self, index: int) -> Step:
        """A step by its number in the run."""
        if index not in self._steps:
            with self._checked(index):
                self._steps[index] = self._decoded(index, index - self.commit.first)
        return self._steps[index]

    @contextmanager
    def _checked(self, index: int) -> Iterator[None]:
        """Name the step whose record is of another form than the format's: checksums may be right, and it not."""
        try:
            yield
        except PathKernelError:
            raise
        except SENSELESS as error:
            with self.blocks.named(self.number):
                where = self.blocks.group.path / "log"
                raise damaged(where, f"the record of step {index} makes no sense ({str(error)[:100]})") from None

    def vector(self, index: int) -> Tensor:
        """θ before a step; gradients and frozen tensors are not read."""
        with self._checked(index):
            place = self.record["steps"][index - self.commit.first]["before"]
            return self.points[place] if place is not None and place >= 0 else self.step(index).before

    def columns(self, index: int, ranges: Sequence[slice]) -> list[Tensor]:
        """Ranges of θ before a step, reading only the pieces that they lie in."""
        with self._checked(index):
            place = self.record["steps"][index - self.commit.first]["before"]
            if place is None or place < 0 or "points" in vars(self):
                return [self.vector(index)[where] for where in ranges]
            return self._pieces(place, ranges)

    def _decoded(self, index: int, row: int) -> Step:
        entry = self.record["steps"][row]
        nothing, place = torch.empty(0, dtype=self.blocks.dtype, device=self.device), entry["before"]
        before = nothing if place is None else self._point(place)
        after = nothing if "after" in entry["left_out"] else self.points[row + 1]
        gradient = nothing if "gradient" in entry["left_out"] else self.gradients[row]
        written = (before, after, gradient)
        if self.tail is not None:
            written = tuple(vector[: self.region.layout.size] for vector in written)  # type: ignore[assignment]
        rows = BlockRows(
            self.region.layout,
            self._point,
            self._edit,
            *written,
            frozen=lambda stream: self._frozen_row(stream, row),
            mapping=self._mapping,
        )
        return decode_step(index, self.record, entry, rows, (before, after, gradient), self.rule, self.thinned)

    @cached_property
    def points(self) -> list[Tensor]:
        """θ before the first step and after each."""
        rows = self._rows(f"theta-{self.region.index}", self.commit.steps + 1)
        steps = self.record["steps"]
        kept = [steps[0]["before"] == 0, *("after" not in step["left_out"] for step in steps)]
        points: list[Tensor] = []
        for place, row in enumerate(accumulated(rows)):
            make = lambda row=row: self._padded(self._tensor(row))  # noqa: E731
            block = self.number if place == 0 else self.number + 1
            shared = self.boundary(block, make) if place in (0, self.commit.steps) and kept[place] else None
            points.append(make() if shared is None else shared)
        return points

    def _pieces(self, row: int, ranges: Sequence[slice]) -> list[Tensor]:
        size = self.region.layout.size
        taken = []
        for where in ranges:
            whole, inside = where.stop - where.start, slice(where.start, min(where.stop, size))
            values = torch.empty(0, dtype=self.blocks.dtype, device=self.device)
            if inside.start < inside.stop:
                first, last = inside.start // COLUMNS, (inside.stop - 1) // COLUMNS
                rows = self._rows(f"theta-{self.region.index}", row + 1, range(first, last + 1))
                begin = first * COLUMNS
                cut = np.ascontiguousarray(rows[:, inside.start - begin : inside.stop - begin])
                values = self._tensor(accumulated(cut)[row])
            if len(values) < whole and self.tail is not None:
                late = slice(max(where.start - size, 0), where.stop - size)
                values = torch.cat([values, self.tail[late].to(self.device)])
            taken.append(values)
        return taken

    @cached_property
    def gradients(self) -> list[Tensor]:
        """The gradient of each step."""
        rows = self._rows(f"gradient-{self.region.index}", self.commit.steps)
        return [self._padded(self._tensor(row), zeros=True) for row in rows]

    def _rows(self, name: str, count: int, pieces: range | None = None) -> np.ndarray:
        return self.blocks.rows(name, self.number, self.record, count, self.region.layout.size, pieces)

    def _tensor(self, row: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        return from_bits(row, dtype or self.blocks.dtype).to(self.device)

    def _type(self, stream: int) -> torch.dtype:
        return {number: DTYPES[dtype] for _, dtype, number in self.record["streams"]}[stream]

    def _frozen_row(self, stream: int, row: int) -> Tensor:
        if stream < 0:
            if stream not in self._extras:  # asked for once by each parameter
                self._extras[stream] = self._extra(stream)
            return self._extras[stream]
        return self._tensor(self._frozen_rows(stream)[row], self._type(stream))

    def _frozen_rows(self, stream: int) -> np.ndarray:
        if stream not in self._frozen:
            rows = self._rows(f"frozen-{int(stream)}-{self.region.index}", self.commit.steps)
            self._frozen[stream] = accumulated(rows)
        return self._frozen[stream]

    def _point(self, place: int) -> Tensor:
        if place >= 0:
            return self.points[place]
        if place not in self._extras:  # the same change may end one step and begin the next
            self._extras[place] = self._padded(self._extra(place))
        return self._extras[place]

    def _edit(self, place: int) -> Tensor:
        return self._padded(self._extra(place), zeros=True)

    def _extra(self, place: int) -> Tensor:
        return self._tensor(self.blocks.extra(self.region, self.number, self.record, -1 - place))

    def _mapping(self, serial: int) -> Mapping[str, Tensor]:
        if serial not in self.mappings:
            known = self._known_mapping(serial)
            self.mappings[serial] = self.record["mappings"][serial] if known is None else known
        return self.mappings[serial]

    def _padded(self, vector: Tensor, zeros: bool = False) -> Tensor:
        if self.tail is None:
            return vector
        tail = self.tail.to(self.device)
        return torch.cat([vector, torch.zeros_like(tail) if zeros else tail])
