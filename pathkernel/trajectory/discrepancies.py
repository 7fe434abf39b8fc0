r"""Steps on record that are not what their update rule makes of the recorded gradients, and what was done instead.

The rule carries the optimizer's memory m from gradient to gradient. Whoever edits that memory between two steps
(sets momentum to zero, loads an older state), or moves the weights inside a step, leaves a difference

.. math:: e_s = \Delta_s - \mathrm{step}(g_s, m_s)

between the recorded displacement and the rule's. Beyond rounding it is found here and put down to one of three:

- the memory was multiplied by one number κ before the step, zero included: the samples' part of it is multiplied as
  well, and nothing is left without a name;
- something was added to the memory: what the difference says, r with :math:`e_s = \partial\Delta/\partial m\; r`. It
  acts on in the later steps as memory does, and what it does is ``"unexplained"``;
- where the displacement does not tell what the memory was (a rule without memory, with several slots, or that mixes
  entries), e_s itself is ``"unexplained"``.

Where a state was loaded before the step, which its changes tell, both are ``"loaded"``.

Gradients are those on record, not recomputed ones: what samples add up to is still to be compared with Δ_s.

Where steps are trained again from keyframes, m is on record at each of these. So the path falls into stretches that are
followed one by one, each when a sweep asks for its steps, which are trained once for both; the first step of a stretch
is compared with the m that the stretch before it ends with.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from tempfile import SpooledTemporaryFile
from typing import IO

import numpy as np
import torch
from torch import Tensor

from pathkernel.runtime.transfers import numbers
from pathkernel.trajectory.alike import apart, moved_alike
from pathkernel.trajectory.step import LOADED, Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import Frozen, Memory, Settings, UpdateRule

HELD = 2**24
"""Bytes of differences that are held in memory; more of them lie in a temporary file."""

ROUNDINGS = 128.0
"""Roundings of a displacement, of the size that displacements had lately, up to which a difference is rounding.

Moments and denominators are rounded several times a step, and a moment carries its roundings on for some 10 steps.
"""

ROUNDINGS_OF_PARAMETERS = 2.0
"""Roundings of the parameters: of θ once when the displacement is added, and once more where decay multiplies it."""

FORGOTTEN = 0.999
"""Rate at which the size of earlier displacements is forgotten from step to step: as slowly as any memory."""

PLAUSIBLE = 1e6
"""Sizes of the memory beyond which what was added to it is not found from the displacement.

Where the step hardly depends on its memory (a learning rate near 0), the memory that would explain a difference is
huge, and would cancel in the next step at the cost of all digits.
"""


@dataclass(frozen=True)
class Discrepancy:
    """Difference between a step and its rule, by parameter name.

    Attributes
    ----------
    scale
        By what the memory was multiplied before the step.
    memory
        What was added to the memory (after that), in the parameter's shape, float64.
    displacement
        What was added to the displacement.
    channel
        Under which name these are booked: ``"loaded"`` where a state was loaded before the step.
    """

    scale: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    displacement: Mapping[str, Tensor] = field(default_factory=dict)
    channel: str = "unexplained"

    def __bool__(self) -> bool:
        return bool(self.scale or self.memory or self.displacement)


@dataclass
class _Move:
    """Parameter in one step, as its rule has it and as it was.

    Attributes
    ----------
    rule, frozen, settings, gradient, memory
        Arguments of the rule, float64.
    sources, moved
        What the optimizer adds to the displacement, and the displacement itself.
    theta
        ‖θ‖ of the parameter, where its values lie.
    epsilon
        Machine epsilon of what was recorded.
    rounding, size
        Difference up to which it is rounding, and ‖Δ − step(g, m)‖; NaN until they are read.
    """

    rule: UpdateRule
    frozen: Frozen
    settings: Settings
    gradient: Tensor
    sources: Tensor
    moved: Tensor
    memory: Memory
    theta: Tensor
    epsilon: float
    rounding: float = math.nan
    size: float = math.nan

    @cached_property
    def found(self) -> tuple[Tensor, Memory]:
        """Δ − step(g, m) and m⁺, with the memory that was carried here."""
        return self.difference(self.memory)

    def difference(self, memory: Memory) -> tuple[Tensor, Memory]:
        """Δ − step(g, m), and m⁺."""
        delta, after = self.rule.step(self.gradient, memory, self.frozen, self.settings)
        return self.moved - delta - self.sources, after

    def of_memory(self, memory: Tensor) -> Tensor:
        """Effect of memory in the one slot on the displacement: step(0, m)."""
        return self.rule.step(torch.zeros_like(self.gradient), (memory,), self.frozen, self.settings)[0]


@dataclass
class _Followed:
    """The optimizer's memory along a stretch, and the size that displacements had lately, by parameter name.

    ``joined`` is the same memory of parameters that were compared as one vector in the step before.
    """

    memory: dict[str, Memory]
    lately: dict[str, float] = field(default_factory=dict)
    joined: dict[tuple[str, ...], Memory] = field(default_factory=dict)

    def rounding(self, name: str, theta: float, moved: float, epsilon: float) -> float:
        """Difference up to which it is rounding, from ‖θ‖ and ‖Δ‖, which is taken note of."""
        self.lately[name] = lately = max(FORGOTTEN * self.lately.get(name, 0.0), moved)
        return epsilon * (ROUNDINGS_OF_PARAMETERS * theta + ROUNDINGS * lately)


class Discrepancies:
    """Compares the steps of a record with their rule.

    Parameters
    ----------
    trajectory
        The record.
    starts
        Steps before which the optimizer's memory is on record, step 0 among them: the stretches that begin there are
        followed when they are asked for. Empty where `meet` is called instead, or nothing is to be found.

    Attributes
    ----------
    length
        Steps of the record when it was met.
    rounding
        Size of the differences that were rounding, added up over the steps as vectors: ‖Σ_s e_s‖.

    Notes
    -----
    Time per step: one evaluation of the rule. Memory: that of the optimizer, and θ once more, while steps are met.
    """

    def __init__(self, trajectory: Trajectory, starts: Sequence[int] = ()) -> None:
        self.trajectory = trajectory
        self.length = len(trajectory)
        self.rounding = 0.0
        self._comparable = trajectory.rule.stages == 1  # gradients at further stages are not on record
        self._starts = starts if self._comparable else ()
        self._ends = dict(pairwise((*self._starts, self.length)))
        layout = trajectory.layout
        self._shapes = dict(zip(layout.names, layout.shapes, strict=True))
        self._epsilon = torch.finfo(trajectory.precision).eps
        self._scales: dict[int, Mapping[str, float]] = {}
        self._places: dict[int, dict[str, list[tuple[str, int]]]] = {}
        self._file: IO[bytes] | None = None
        self._left: Tensor | None = None
        self._sizes: dict[int, dict[str, float]] = {}

    def __bool__(self) -> bool:
        """True where there are any, and while that is not known."""
        return bool(self._sizes or self._ends)

    def meet(self, steps: Iterable[Step]) -> None:
        """Compare all steps of the record, in their order."""
        followed = _Followed(self._tensors(self.trajectory.initial_memory))
        for step in steps:
            if self._comparable:
                self._compare(step, followed)
        self._sum_up()

    def _follow(self, first: int) -> None:
        """Compare the steps of a stretch with their rule, and the first of the next one, with the memory that it has.

        The first of this one is passed: it is compared when the stretch before is followed.
        """
        store, end = self.trajectory.store, self._ends.pop(first)
        followed = _Followed(self._memory_before(first))
        for index in range(first, min(end + 1, self.length)):
            step = store.read(index)
            if first == index > 0:
                for name, move in self._moves(step, followed).items():
                    followed.memory[name] = move.found[1]
            else:
                self._compare(step, followed)
        self._sum_up()

    @property
    def _difference(self) -> Tensor:
        """Differences of all steps so far, added up, (P,)."""
        if self._left is None:
            size, device = self.trajectory.layout.size, self.trajectory.device
            self._left = torch.zeros(size, dtype=torch.float64, device=device)
        return self._left

    def _sum_up(self) -> None:
        if self._left is not None:
            self.rounding = self._left.norm().item()
        if not self._ends:  # a vector of P numbers is not held for longer than it is needed
            self._left = None

    def _memory_before(self, first: int) -> dict[str, Memory]:
        if first == 0:
            return self._tensors(self.trajectory.initial_memory)
        found: dict[str, Memory] = {}
        summary = self.trajectory.store.summary(first)
        for name, own in (summary.state or {}).items():
            slots = [own.get(key) for key in self.trajectory.rule.of(summary.record.hyperparameters_of(name)).memory]
            if any(isinstance(slot, Tensor) for slot in slots):
                like = torch.zeros(self._shapes[name])
                found[name] = tuple(slot if isinstance(slot, Tensor) else like for slot in slots)
        return self._tensors(found)

    def _tensors(self, memory: Mapping[str, Memory]) -> dict[str, Memory]:
        device = self.trajectory.device
        return {
            name: tuple(slot.double().to(device).reshape(self._shapes[name]) for slot in held)
            for name, held in memory.items()
        }

    def of(self, step: Step) -> Discrepancy:
        """Difference between a step and its rule: usually none."""
        place = bisect_right(self._starts, step.index) - 1
        for stretch in (place, place - 1):
            if stretch >= 0 and self._starts[stretch] in self._ends and self._ends[self._starts[stretch]] >= step.index:
                self._follow(self._starts[stretch])
        if step.index not in self._sizes:
            return Discrepancy()
        found = {
            kind: {name: self._read(name, place) for name, place in places}
            for kind, places in self._places.get(step.index, {}).items()
        }
        loaded = any(name == LOADED for name, _ in step.changes)
        return Discrepancy(self._scales.get(step.index, {}), **found, channel=LOADED if loaded else "unexplained")

    def largest(self) -> tuple[float, int, str]:
        """Largest displacement of a parameter beyond the rule that has no name, its step, and the parameter."""
        sizes = [(size, s, name) for s, own in self._sizes.items() for name, size in own.items() if s in self._places]
        return max(sizes, default=(0.0, -1, ""))

    # -- one step --------------------------------------------------------------------------------------------------

    def _moves(self, step: Step, followed: _Followed) -> dict[str, _Move]:
        """The parameters with a gradient in one step, and what rounding may have done to each.

        Sizes of all of them are read at once: off the CPU each reading waits for the device.
        """
        moves = {name: self._move(name, step, followed) for name in self._shapes if name in step.active}
        asked = (norm for move in moves.values() for norm in (move.theta, move.moved.norm(), move.found[0].norm()))
        sizes = iter(numbers(list(asked)))
        for name, move in moves.items():
            move.rounding = followed.rounding(name, next(sizes), next(sizes), self._epsilon)
            move.size = next(sizes)
        return moves

    def _alike(self, step: Step, followed: _Followed) -> bool:
        """Compare parameters that step alike as one vector; False, and nothing noted, where any is beyond rounding."""
        layout, rule = self.trajectory.layout, self.trajectory.rule
        if not rule.elementwise or len(step.active) < len(layout.names):
            return False
        known = followed.memory, followed.joined
        found = list(moved_alike(rule, step, layout.slices, self._shapes, *known))
        sizes = iter(numbers([size for own in found for size in own.sizes]))
        lately = dict(followed.lately)
        for name in (name for own in found for name in own.names):
            rounding = followed.rounding(name, next(sizes), next(sizes), self._epsilon)
            if not next(sizes) <= rounding:
                followed.lately = lately
                return False
        followed.joined = {}
        for own in found:
            followed.joined[own.names] = own.after
            followed.memory |= apart(own.after, own.names, self._shapes)
            self._difference[own.where] += own.difference
        return True

    def _compare(self, step: Step, followed: _Followed) -> None:
        if self._alike(step, followed):
            return
        followed.joined = {}
        moves = self._moves(step, followed)
        differences = {name: move.found[0] for name, move in moves.items()}
        carried = {name: move.found[1] for name, move in moves.items()}
        beyond = {name: move.size for name, move in moves.items() if not move.size <= move.rounding}
        found = Discrepancy()
        if beyond:
            found = self._explained(moves, differences, tuple(beyond))
            for name in {*found.scale, *found.memory}:
                differences[name], carried[name] = moves[name].difference(_edited(found, name, moves[name].memory))
            differences |= {name: differences[name] - shift for name, shift in found.displacement.items()}
        still = self._moved_without_gradient(step)
        found = Discrepancy(found.scale, found.memory, {**found.displacement, **still})
        followed.memory |= carried
        for name, difference in differences.items():
            self._difference[self.trajectory.layout.slices[name]] += difference.reshape(-1)
        if found:
            self._keep(step.index, found, beyond | {name: shift.norm().item() for name, shift in still.items()})

    def _move(self, name: str, step: Step, followed: _Followed) -> _Move:
        rule, where, shape = self.trajectory.rule, self.trajectory.layout.slices[name], self._shapes[name]
        settings, frozen = step.hyperparameters_of(name), step.frozen[name]
        theta = step.before[where].double().reshape(shape)
        moved = step.after[where].double().reshape(shape) - theta
        gradient = step.gradient[where].double().reshape(shape)
        gradient, sources = rule.sourced(gradient, theta, frozen, settings)
        memory = followed.memory.get(name) or tuple(torch.zeros_like(theta) for _ in rule.memory)
        return _Move(rule, frozen, settings, gradient, sources, moved, memory, theta.norm(), self._epsilon)

    def _moved_without_gradient(self, step: Step) -> dict[str, Tensor]:
        """Displacements of parameters that the optimizer skips."""
        slices = {name: where for name, where in self.trajectory.layout.slices.items() if name not in step.active}
        alike = numbers([(step.after[where] == step.before[where]).all() for where in slices.values()])
        return {
            name: (step.after[where].double() - step.before[where].double()).reshape(self._shapes[name])
            for (name, where), same in zip(slices.items(), alike, strict=True)
            if not same
        }

    def _explained(
        self, moves: Mapping[str, _Move], differences: Mapping[str, Tensor], beyond: tuple[str, ...]
    ) -> Discrepancy:
        """Put differences beyond rounding down to the memory, as far as they tell what it was."""
        rule = self.trajectory.rule
        if not rule.elementwise or len(rule.memory) != 1:
            return Discrepancy(displacement={name: differences[name] for name in beyond})
        scale = _common_scale(moves, differences, beyond)
        if scale:
            return Discrepancy(scale)
        memory: dict[str, Tensor] = {}
        displacement: dict[str, Tensor] = {}
        for name in beyond:
            added, rest = _added(moves[name], differences[name])
            memory |= {} if added is None else {name: added}
            displacement |= {} if rest is None else {name: rest}
        return Discrepancy({}, memory, displacement)

    # -- what was found lies in a file ---------------------------------------------------------------------------------

    def _keep(self, index: int, found: Discrepancy, sizes: Mapping[str, float]) -> None:
        self._sizes[index] = dict(sizes)
        if found.scale:
            self._scales[index] = found.scale
        if self._file is None:
            self._file = SpooledTemporaryFile(HELD)  # noqa: SIM115  # for as long as this object lives
        for kind in ("memory", "displacement"):
            for name, vector in getattr(found, kind).items():
                place = self._file.seek(0, 2)
                self._file.write(vector.contiguous().cpu().numpy().tobytes())
                self._places.setdefault(index, {}).setdefault(kind, []).append((name, place))

    def _read(self, name: str, place: int) -> Tensor:
        assert self._file is not None
        shape = self._shapes[name]
        self._file.seek(place)
        values = np.frombuffer(bytearray(self._file.read(8 * shape.numel())), dtype=np.float64)
        return torch.from_numpy(values).reshape(shape).to(self.trajectory.device)


def _edited(found: Discrepancy, name: str, memory: Memory) -> Memory:
    """The memory that a step really began with."""
    edited = tuple(found.scale.get(name, 1.0) * slot for slot in memory)
    return (edited[0] + found.memory[name],) if name in found.memory else edited


def _common_scale(
    moves: Mapping[str, _Move], differences: Mapping[str, Tensor], beyond: tuple[str, ...]
) -> dict[str, float]:
    """κ by parameter, where one number for all that differ leaves rounding alone; empty where none does.

    One number alone: every single entry could be multiplied by a number of its own.
    """
    acted = {name: moves[name].of_memory(moves[name].memory[0]) for name in moves}
    squared = sum(acted[name].square().sum().item() for name in beyond)
    if not (squared > 0 and sum(acted[name].numel() for name in beyond) > 1):
        return {}
    excess = sum((acted[name] * differences[name]).sum().item() for name in beyond) / squared

    def rest(name: str, excess: float) -> float:
        """Remainder of a difference beyond what the memory's own roundings leave."""
        left = (differences[name] - excess * acted[name]).norm().item()
        return left - ROUNDINGS * moves[name].epsilon * acted[name].norm().item()

    for value in (-1.0, excess):  # set to zero; or any other number
        if all(rest(name, value) <= moves[name].rounding for name in beyond):
            found = dict.fromkeys(beyond, 1.0 + value)
            # Where the memory hardly acts, both hypotheses leave rounding: an edit of all parameters is likelier.
            for name in moves.keys() - found.keys():
                left = (differences[name] - value * acted[name]).norm().item()
                if left <= differences[name].norm().item():
                    found[name] = 1.0 + value
            return found
    return {}


def _added(move: _Move, difference: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Addition to the memory, and the rest of the difference where the step does not depend on it."""
    rate = move.of_memory(torch.ones_like(difference))
    added = torch.where(rate == 0, 0.0, difference / torch.where(rate == 0, 1.0, rate))
    after = move.rule.step(move.gradient, move.memory, move.frozen, move.settings)[1]
    size = move.memory[0].norm().item() + after[0].norm().item()
    if not (math.isfinite(added.norm().item()) and 0 < added.norm().item() <= PLAUSIBLE * size):
        return None, difference
    rest = torch.where(rate == 0, difference, 0.0)
    return added, rest if rest.any() else None
