"""Steps of a store on disk as they are read: blocks that are committed, and what this process is still to write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import SENSELESS, CorruptBlockError, StoreError
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.storage.blocks import Blocks, Recent, Region, read_packed
from pathkernel.storage.decoding import StoredBlock
from pathkernel.storage.encoding import Serials
from pathkernel.storage.format import Compression, Group, damaged
from pathkernel.storage.header import Header, region_array
from pathkernel.storage.packed_values import checked_end, checked_start
from pathkernel.storage.writer_thread import Writer
from pathkernel.trajectory.run import Run
from pathkernel.trajectory.step import Step
from pathkernel.update_rules.rule import UpdateRule


@dataclass
class Uncommitted:
    """Knowledge of this process about a path beyond what its store has committed.

    Attributes
    ----------
    thread
        The thread that writes, with the steps that wait for it; None where nobody writes.
    end
        How many steps there are, and θ after the last: the very tensor that the next one begins with.
    serials
        Numbers of the buffers at hand.
    """

    thread: Writer | None = None
    end: tuple[int, Tensor] | None = None
    serials: Serials = field(default_factory=Serials)


class StoredSteps:
    """The steps in a folder, and the values that every one of them needs.

    Parameters
    ----------
    path
        The folder.
    blocks, header
        What it holds.

    Attributes
    ----------
    regions, tails
        Each θ that blocks have, and the values of the parameters that joined it, in their order.
    run, rule, device
        The run that the steps belong to; the rule, and where vectors are put, before it is known.
    pinned
        Buffers that are held, by serial number.
    uncommitted
        What this process is still to write.
    """

    def __init__(self, path: Path, blocks: Blocks, header: Header) -> None:
        self.path = path
        self.blocks = blocks
        self.header = header
        self.regions = [Region(i, layout) for i, layout in enumerate(header.layouts)]
        self.tails: list[Tensor] = []
        self.run: Run | None = None
        self.rule: UpdateRule | None = None
        self.device = torch.device("cpu")
        self.pinned: dict[int, Mapping[str, Tensor]] = {}
        self.uncommitted = Uncommitted()
        self._recent = Recent(3)
        self._boundaries = Recent(8)

    # -- what is there --------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: Path, durable: bool, compression: Compression) -> StoredSteps:
        """The store that is there; reads the header and the last commit."""
        group = Group.open(path, durable)
        header = Header.read(group)
        blocks = Blocks(group, header.dtype, header.capacity, compression, start=header.checksums.get("start"))
        stored = cls(path, blocks, header)
        stored.tails = [stored._tail(i, length) for i, length in enumerate(header.tails, start=1)]
        steps = stored.refresh()
        if header.end is not None and header.end.steps > steps:
            missing = f"steps {steps}–{header.end.steps - 1} are missing, of {header.end.steps} recorded"
            raise damaged(group.path / "commit", missing)
        return stored

    def _tail(self, region: int, length: int) -> Tensor:
        value = self._packed(region_array(region), length)
        if not isinstance(value, Tensor) or value.dim() != 1:
            raise damaged(self.blocks.group.path, "the values of parameters that joined are no vector")
        return value

    def refresh(self) -> int:
        """Look for steps that were committed since, by another process; returns how many there are in all."""
        self.blocks.refresh()
        steps = self.blocks.steps
        if self.header.end is not None and self.header.end.steps < steps:
            self.header = self.header.ended(None)  # it was written while recording went on, see `write_end`
        return steps

    def last_commit(self) -> tuple[int, ...] | None:
        """Last commit, which tells the content of a store from another's; None before it has any."""
        if not self.blocks.count:
            return None
        return tuple(vars(self.blocks.commit(self.blocks.count - 1)).values())

    def require_unchanged(self, last: tuple[int, ...]) -> None:
        """Refuse a store whose last commit is another one than when something that reads it was saved."""
        if self.last_commit() != last:
            raise StoreError(
                f"`{self.path}` does not hold what it held when a trajectory or a kernel on it was saved",
                f"It held {last[1] + last[2]} steps then, with other contents or fewer or more than now",
                "Put the folder back from a copy, or make the kernel anew from `Trajectory.open(path, ...)`",
            )

    # -- values that belong to all steps --------------------------------------------------------------------------

    def _packed(self, name: str, length: int) -> Any:
        """A packed value, which must be the one that the header was written with."""
        return read_packed(self.blocks.group, name, length, self.header.checksums.get(name))

    def _sensible(self, name: str, checked: Callable[[Any, Header], dict[str, Any]], values: Any) -> dict[str, Any]:
        """Packed values that have the form they should have."""
        try:
            return checked(values, self.header)
        except SENSELESS as error:
            raise damaged(self.path / name, f"it makes no sense ({str(error)[:100]})") from None

    def start_values(self) -> dict[str, Any]:
        """θ_0, constants, first optimizer memory and averages, as packed when recording began."""
        return self._sensible("start", checked_start, self._packed("start", self.header.start))

    def optimizer_constants(self) -> dict[str, Any]:
        """Constants of the optimizer, for a recording with keyframes; see `Replay.constants`."""
        assert self.header.replay is not None
        constants = self._packed("optimizer", self.header.replay["constants"])
        right = isinstance(constants, dict) and set(constants) == {"groups", "made_of"}
        right = right and isinstance(constants["groups"], list) and isinstance(constants["made_of"], dict)
        right = right and all(isinstance(group, dict) for group in constants["groups"])
        if not right or not all(isinstance(name, str) for name in constants["made_of"]):
            raise damaged(self.blocks.group.path / "optimizer", "it makes no sense")
        return constants

    def end_values(self) -> dict[str, Any] | None:
        """Tail, final buffers and averages; None where recording was cut off."""
        if (end := self.header.end) is None:
            return None
        values = self._sensible(end.values[0], checked_end, self._packed(*end.values))
        if end.buffers >= 0:
            self.pinned[end.buffers] = values["final_buffers"]
        return values

    def updates(self) -> dict[str, list[tuple[float, bool]]]:
        """How the averages moved after each step, as far as that is committed; reads the record of every block."""
        moves: dict[str, list[tuple[float, bool]]] = {name: [] for name in self.header.averages}
        for number in range(self.blocks.count if moves else 0):
            record = self.blocks.record(number)
            try:
                for name, (first, new) in record["averages"].items():
                    moves[name][first:] = new
            except SENSELESS as error:
                with self.blocks.named(number):
                    raise damaged(self.path / "log", f"an average makes no sense ({str(error)[:100]})") from None
        return moves

    # -- reading --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        thread = self.uncommitted.thread
        unwritten = None if thread is None else thread.last
        return self.blocks.steps if unwritten is None else unwritten.stop

    def read(self, index: int) -> Step:
        """A step; its whole block is read, and kept while its neighbours are.

        Raises
        ------
        CorruptBlockError
            Where the block is damaged, with its steps.
        """
        step = self._in_memory(index)
        return self._block(self.blocks.find(index)).step(index) if step is None else step

    def _in_memory(self, index: int) -> Step | None:
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of {len(self)}")
        thread = self.uncommitted.thread
        for block in [] if thread is None else thread.unwritten():
            if block.first <= index < block.stop:
                return block.steps[index - block.first]
        return None

    def _block(self, number: int) -> StoredBlock:
        def make() -> StoredBlock:
            blocks = self.blocks
            commit = blocks.commit(number)
            with blocks.named(number):
                if commit.region >= len(self.regions):
                    raise damaged(self.path / "zarr.json", f"lacks region {commit.region}")
            tails = self.tails[commit.region :]
            tail = torch.cat(tails) if tails else None
            device = self.device if self.run is None else self.run.device
            region = self.regions[commit.region]
            thinned = self.header.schedule.weights_only
            known = self._boundary, self._known_mapping
            return StoredBlock(blocks, number, region, tail, *known, self.rule, thinned, device)

        return self._recent.get(number, make)

    def _boundary(self, number: int, make: Callable[[], Tensor]) -> Tensor | None:
        """The first θ of a block where it is also the last of the block before."""
        blocks = self.blocks
        if number < blocks.count:
            if not blocks.commit(number).joined:
                return None
            if number == 0 and self.run is not None and self.run.has_read_start:
                return self.run.initial
        else:
            steps = blocks.steps
            following = self._in_memory(steps) if steps < len(self) else None
            if following is not None:
                end = following.before
                return self._boundaries.put(number, end) if torch.equal(end, make()) else None
            end_of_path = self.uncommitted.end
            if end_of_path is not None and end_of_path[0] == steps:
                return self._boundaries.put(number, end_of_path[1])  # the next block may begin with it
        return self._boundaries.get(number, make)

    def _known_mapping(self, serial: int) -> Mapping[str, Tensor] | None:
        return next((mapping for number, mapping in self.mappings() if number == serial), None)

    def mappings(self) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """Mappings of buffers that are at hand, with their serial numbers."""
        yield from self.pinned.items()
        yield from ((number, mapping) for mapping, number in list(self.uncommitted.serials.current))
        for block in self._recent.values():
            yield from block.mappings.items()

    def vector(self, index: int) -> Tensor:
        """θ before a step; gradients and frozen tensors are not read.

        Raises
        ------
        StoreError
            For a step between keyframes, which has to be trained again first.
        """
        step = self._in_memory(index)
        return self._kept(self._block(self.blocks.find(index)).vector(index) if step is None else step.before, index)

    def final(self) -> Tensor:
        """θ at the end of the path.

        Raises
        ------
        StoreError
            Where a recording with keyframes was cut off: the last steps have to be trained again first.
        """
        if (end := self.end_values()) is not None and (end["tail"] or end["final"] is not None):
            return end["tail"][-1][1] if end["tail"] else end["final"]
        steps = len(self)
        if not steps:
            return torch.cat([self.start_values()["initial"], *self.tails])
        return self._kept(self.read(steps - 1).after, steps)

    def _kept(self, vector: Tensor, index: int) -> Tensor:
        if not vector.numel():
            raise StoreError(
                f"θ at step {index} was asked of `{self.path}`, which keeps it at keyframes only",
                "Steps between keyframes are trained again, which takes the network, the loss and the data",
                f"Write `Trajectory.open(path, model=model, loss=loss, data=data).vector({index})`",
            )
        return vector

    def columns(self, index: int, ranges: Sequence[slice]) -> list[Tensor]:
        """Ranges of θ before a step, reading only the pieces of the block that they lie in."""
        step = self._in_memory(index)
        if step is not None:
            return [step.before[where] for where in ranges]
        return self._block(self.blocks.find(index)).columns(index, ranges)

    # -- another θ, and blocks that were read ---------------------------------------------------------------------

    def drop_regions(self, last: int) -> None:
        """Leave out the steps since θ was extended for the first time after a region."""
        if last == len(self.regions) - 1:
            return
        blocks = self.blocks
        while blocks.count and blocks.commit(blocks.count - 1).region > last:
            blocks.count -= 1
        self.regions = self.regions[: last + 1]
        self.tails = self.tails[:last]
        self.header = self.header.without_regions(last)
        self.clear()

    def lengthen(self, layout: ParameterLayout, tail: Tensor) -> None:
        """Begin a new region: what is stored is lengthened by the tail when it is read."""
        self.regions.append(Region(len(self.regions), layout))
        self.tails.append(tail)
        self.clear()

    def clear(self) -> None:
        """Let go of all blocks that were read."""
        self._recent.clear()
        self._boundaries.clear()

    # -- checking -------------------------------------------------------------------------------------------------

    def verify(self) -> list[CorruptBlockError]:
        """Read everything and list the damage, block by block."""
        problems = []
        replayed = self.header.replay is not None
        for read in (self.start_values, self.end_values, *([self.optimizer_constants] if replayed else [])):
            try:
                read()
            except CorruptBlockError as error:
                problems.append(error)
        expected = 0
        for number in range(self.blocks.count):
            try:
                commit = self.blocks.commit(number)
                block = self._block(number)
                if commit.first != expected:
                    with self.blocks.named(number):
                        raise damaged(self.path / "commit", f"step {expected} should come here")
                for index in range(commit.first, commit.stop):
                    block.step(index)
                expected = commit.stop
            except CorruptBlockError as error:
                problems.append(error)
                expected = self.blocks._commits[number].stop if number in self.blocks._commits else expected
        self.clear()
        return problems
