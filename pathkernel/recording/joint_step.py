"""A step that several optimizers take: what each of them did with its own parameters, put together as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pathkernel.recording.live import LiveParameters
from pathkernel.recording.open_step import OpenStep
from pathkernel.recording.readings import Reading
from pathkernel.trajectory.frozen_state import FrozenOnReading, OptimizerState, frozen_in
from pathkernel.trajectory.step import Settings
from pathkernel.update_rules.rule import Frozen, UpdateRule


class Part:
    """One of several optimizers, with the parameters on record that it holds.

    Parameters
    ----------
    place, optimizer, rule
        Which one, the optimizer, and its rule.
    marks
        What joins the settings of its groups.
    every
        All parameters on record.

    Attributes
    ----------
    live
        Its own.
    runs
        Ranges of θ, each with the range of the part's own vector that it is.
    """

    def __init__(
        self, place: int, optimizer: Optimizer, rule: UpdateRule, marks: Mapping[str, int], every: LiveParameters
    ) -> None:
        self.place, self.optimizer, self.rule, self.marks = place, optimizer, rule, marks
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.live = LiveParameters({name: p for name, p in every.named.items() if id(p) in held}, optimizer)
        self.runs: list[tuple[slice, slice]] = []
        for name, own in self.live.layout.slices.items():
            where = every.layout.slices[name]
            if self.runs and self.runs[-1][0].stop == where.start:
                (before, mine) = self.runs.pop()
                where, own = slice(before.start, where.stop), slice(mine.start, own.stop)
            self.runs.append((where, own))

    def of(self, vector: Tensor, like: Tensor) -> Tensor:
        """The part's entries of a vector (P,), in the type of another one of its own."""
        pieces = [vector[where] for where, _ in self.runs]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(like.dtype)

    def into(self, vector: Tensor, own: Tensor) -> None:
        """Write the part's entries into a vector (P,)."""
        for where, mine in self.runs:
            vector[where] = own[mine]


@dataclass(frozen=True)
class OwnStep:
    """Part of a step that one of several optimizers took.

    Attributes
    ----------
    part, opened
        Which one, and its step as it was known before.
    after
        Its parameters after the step.
    reading
        The gradient and the settings that it used.
    frozen
        What its rule freezes.
    """

    part: Part
    opened: OpenStep
    after: Tensor
    reading: Reading
    frozen: Mapping[str, Frozen]


@dataclass
class JointStep:
    """A step that some of several optimizers have taken, and others may.

    Attributes
    ----------
    before
        θ_s, (P,).
    at
        θ by all that is known to have moved it since, (P,).
    in_backward
        Whether the optimizers step within a backward pass.
    own
        What each of them did that has stepped, by its place.
    between
        Displacements made outside the optimizers since the first of them stepped, by name, (P,) float64 each.
    audited
        Whether the gradient of the first has been compared with the samples'.
    """

    before: Tensor
    at: Tensor
    in_backward: bool
    own: dict[int, OwnStep] = field(default_factory=dict)
    between: list[tuple[str, Tensor]] = field(default_factory=list)
    audited: bool = False

    @property
    def active(self) -> frozenset[str]:
        """Parameters whose optimizer stepped and had a gradient of them."""
        return frozenset().union(*(own.reading.active for own in self.own.values()))

    def gradient(self) -> Tensor:
        """The gradient that they received, (P,); zero for the parameters of others."""
        gradient = torch.zeros_like(self.before)
        for own in self.own.values():
            own.part.into(gradient, own.reading.gradient)
        return gradient

    def after(self) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """θ after the step, and the points of the path that changes in between lead to from there.

        The step is the first piece of the path, whose gradients were all taken at θ_s, and the changes follow it.
        """
        if not self.between:
            return self.at, []
        after = self.before.clone()
        for own in self.own.values():
            began = own.part.of(self.before, own.opened.before)
            displaced = own.after if torch.equal(began, own.opened.before) else began + (own.after - own.opened.before)
            own.part.into(after, displaced)
        points, point = [], after.double()
        for name, displacement in self.between:
            point = point + displacement
            points.append((name, point.to(after.dtype)))
        points[-1] = points[-1][0], self.at  # to the last bit
        return after, points

    def settings(self, parts: list[Part]) -> Settings:
        """Settings of all parameter groups; the rate of optimizers that did not step is zero."""
        found: list[dict[str, Any]] = []
        for part in parts:
            own = self.own.get(part.place)
            for group in part.live.settings() if own is None else own.reading.settings:
                at_rest = {"lr": 0.0} if own is None and "lr" in group else {}
                found.append({**group, **at_rest, **part.marks})
        return tuple(found)

    def frozen(
        self, rule: UpdateRule, every: LiveParameters, gradient: Tensor, after: Tensor, settings: Settings
    ) -> Mapping[str, Frozen]:
        """Constants that are frozen in the step, by parameter name; found on reading where all rules allow it."""
        states = [own.frozen.state for own in self.own.values() if isinstance(own.frozen, FrozenOnReading)]
        own_types = {own.after.dtype for own in self.own.values()} | {self.before.dtype}
        if len(states) < len(self.own) or len(own_types) > 1:
            return {name: own.frozen[name] for own in self.own.values() for name in own.reading.active}
        active = self.active
        state = OptimizerState(
            before=self._joined({place: own.state.before for place, own in self._found()}),
            after=self._joined({place: own.state.after for place, own in self._found()}),
            numbers=self._numbers([name for name in every.layout.names if name in active]),
            fresh=frozenset().union(*(state.fresh for state in states)),
            device=states[0].device,
        )
        evaluate = partial(frozen_in, rule, every.layout)
        return FrozenOnReading(state, evaluate, self.before, gradient, after, active, every.groups, settings)

    def _found(self) -> list[tuple[int, FrozenOnReading]]:
        every = [(place, own.frozen) for place, own in self.own.items()]
        return [(place, frozen) for place, frozen in every if isinstance(frozen, FrozenOnReading)]

    def _joined(self, states: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """State tensors by their key, (P,) each, zero for parameters of optimizers that have none."""
        vectors: dict[str, Tensor] = {}
        for place, state in states.items():
            for key, own in state.items():
                if key not in vectors:
                    vectors[key] = torch.zeros_like(self.before, dtype=own.dtype)
                self.own[place].part.into(vectors[key], own)
        return vectors

    def _numbers(self, active: list[str]) -> dict[str, Tensor]:
        """Numbers of the state by their key, one for each active parameter, zero where an optimizer has none."""
        rows = {name: row for row, name in enumerate(active)}
        found: dict[str, Tensor] = {}
        for place, frozen in self._found():
            names = [name for name in self.own[place].part.live.layout.names if name in frozen.active]
            where = [rows[name] for name in names]
            for key, values in frozen.state.numbers.items():
                known = found.get(key, torch.zeros(len(active), dtype=values.dtype, device=values.device))
                found[key] = known.to(torch.promote_types(known.dtype, values.dtype))
                found[key][where] = values.to(found[key])
        return found
