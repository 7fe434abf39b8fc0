"""Gradient and settings as a step really used them, where other hooks may change both around it.

The recorder's pre-hook is to run last and its post-hook first, so that nothing comes between them but the step itself.
Hooks that others add are noticed at the next step. For that one step, and for optimizers that change their settings
while they step, gradient and settings are read on both sides; of readings that differ, those count with which the rule
gives the displacement.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.trajectory.step import Settings
from pathkernel.update_rules.rule import Frozen, Memory, UpdateRule

ALIKE = 10.0
"""Times the smallest difference between rule and displacement up to which another one says the same: both round."""


class StepHooks:
    """A pre-hook that runs after all others of an optimizer, and a post-hook that runs before them.

    Parameters
    ----------
    optimizer
        Whose steps are watched.
    before, after
        The hooks.
    """

    def __init__(self, optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]) -> None:
        self._before = optimizer.register_step_pre_hook(before)
        self._after = optimizer.register_step_post_hook(after)

    def step_begins(self) -> bool:
        """Have the post-hook run first; returns whether the pre-hook, which calls this, runs last."""
        _move(self._after, last=False)
        hooks = _hooks(self._before)
        return not hooks or next(reversed(hooks)) == self._before.id

    def step_ended(self) -> None:
        """Have the pre-hook run last from the next step on: hooks that are running keep their order."""
        _move(self._before, last=True)

    def remove(self) -> None:
        """Take both off."""
        self._before.remove()
        self._after.remove()


def _hooks(handle: RemovableHandle) -> OrderedDict[int, Any] | None:
    hooks = handle.hooks_dict_ref()
    return hooks if isinstance(hooks, OrderedDict) else None


def _move(handle: RemovableHandle, last: bool) -> None:
    hooks = _hooks(handle)
    if hooks and next(reversed(hooks) if last else iter(hooks)) != handle.id and handle.id in hooks:
        hooks.move_to_end(handle.id, last=last)


class Reading(NamedTuple):
    """A gradient (P,), the parameters that had one, and the settings of every parameter group."""

    gradient: Tensor
    active: frozenset[str]
    settings: Settings


def readings(before: Reading, after: Reading) -> list[Reading]:
    """Both readings of a step in every combination that differs, that from after the step first."""
    same_gradient = before.active == after.active and torch.equal(before.gradient, after.gradient)
    gradients = [after] if same_gradient else [after, before]
    settings = [after] if before.settings == after.settings else [after, before]
    return [Reading(g.gradient, g.active, s.settings) for g, s in itertools.product(gradients, settings)]


class TakenStep(NamedTuple):
    """A step as far as its rule is to be compared with it.

    Attributes
    ----------
    before, after
        θ_s and θ_{s+1}, (P,).
    memory_before, memory_after
        The optimizer's memory, by parameter name; None before the step where it was not looked at, and then what
        becomes that after the step counts.
    groups
        Parameter name → index of its parameter group.
    """

    before: Tensor
    after: Tensor
    memory_before: Mapping[str, Memory] | None
    memory_after: Mapping[str, Memory]
    groups: Mapping[str, int]


def best_reading(
    rule: UpdateRule,
    layout: ParameterLayout,
    taken: TakenStep,
    candidates: list[Reading],
    frozen: Callable[[Reading], Mapping[str, Frozen]],
) -> Reading:
    """The reading with which the rule gives Δ_s; the first where the rule cannot tell.

    The gradient is told by the memory before the step: from that after the step alone, a rule that moves along its
    memory (heavy ball, Adam) gives the same displacement for every gradient.
    """
    invertible = rule.elementwise and len(rule.memory) == 1
    tells = rule.stages == 1 and (not rule.memory or taken.memory_before is not None or invertible)
    if len(candidates) == 1 or not tells:
        return candidates[0]
    missed = [_missed(rule, layout, taken, reading, frozen(reading)) for reading in candidates]
    return candidates[0 if missed[0] <= ALIKE * min(missed) else missed.index(min(missed))]


def _missed(
    rule: UpdateRule, layout: ParameterLayout, taken: TakenStep, reading: Reading, frozen: Mapping[str, Frozen]
) -> float:
    """‖Δ_s − step(g, m)‖, with the m that becomes the memory after the step; infinite where that is no number."""
    squared = 0.0
    for name, where in layout.slices.items():
        theta = taken.before[where].double()
        moved = taken.after[where].double() - theta
        if name in reading.active:
            shape = layout.shapes[layout.names.index(name)]
            theta, moved = theta.reshape(shape), moved.reshape(shape)
            settings = reading.settings[taken.groups[name]]
            gradient = reading.gradient[where].double().reshape(shape)
            gradient, sources = rule.sourced(gradient, theta, frozen[name], settings)
            if taken.memory_before is not None:
                nothing = tuple(torch.zeros_like(gradient) for _ in rule.memory)
                memory = tuple(slot.double() for slot in taken.memory_before.get(name, nothing))
            else:
                memory = _memory_before(rule, gradient, taken.memory_after.get(name), frozen[name], settings)
            moved = moved - sources - rule.step(gradient, memory, frozen[name], settings)[0]
        squared += moved.square().sum().item()
    return squared**0.5 if squared == squared else float("inf")


def _memory_before(
    rule: UpdateRule, gradient: Tensor, after: Memory | None, frozen: Frozen, settings: Mapping[str, Any]
) -> Memory:
    """m of m⁺ = c g + d m; zero where the step forgets it."""
    nothing = torch.zeros_like(gradient)
    if not rule.memory or after is None:
        return tuple(nothing for _ in rule.memory)
    given = rule.step(gradient, (nothing,), frozen, settings)[1][0]
    kept = rule.step(nothing, (torch.ones_like(gradient),), frozen, settings)[1][0]
    found = (after[0].double() - given) / kept.where(kept != 0, 1.0)
    return (found.where(kept != 0, 0.0),)
