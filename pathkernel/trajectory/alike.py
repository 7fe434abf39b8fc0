"""Parameters that step alike as one vector: networks have many small ones, and each takes as long as its calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pathkernel.trajectory.step import Step
from pathkernel.update_rules.rule import Frozen, Memory, UpdateRule

JOINED = 2**16
"""Entries of θ up to which parameters are taken together. More would take more memory at once than one large parameter
does. Chosen."""


def stepping_alike(step: Step, shapes: Mapping[str, torch.Size]) -> list[tuple[str, ...]]:
    """Active parameters in the order of θ, those in one tuple that lie end to end and step alike.

    That is: they are of one group, and have equal numbers and tensors of equal types frozen. Rules that are not
    elementwise have use for the names alone.
    """
    found: list[tuple[str, ...]] = []
    run: list[str] = []
    kind, entries = None, 0
    for name, shape in shapes.items():
        if name not in step.active:
            own, size = None, JOINED + 1
        else:
            own, size = _kind(step, name, shape), shape.numel()
            if run and own is not None and own == kind and entries + size <= JOINED:
                run.append(name)
                entries += size
                continue
        if run:
            found.append(tuple(run))
        run, kind, entries = [name] if name in step.active else [], own, size
    return [*found, tuple(run)] if run else found


def _kind(step: Step, name: str, shape: torch.Size) -> Any:
    """Group, frozen numbers, and types of frozen tensors of a parameter; None where these have another shape."""
    values: dict[str, Any] = {}
    for key, value in step.frozen[name].items():
        if not isinstance(value, Tensor):
            values[key] = value
        elif value.shape != shape:
            return None
        else:
            values[key] = value.dtype
    return step.groups[name], values


def frozen_of(step: Step, names: Sequence[str]) -> Frozen:
    """What is frozen of parameters that step alike: of several, tensors end to end."""
    first = step.frozen[names[0]]
    if len(names) == 1:
        return first
    return {
        key: torch.cat([step.frozen[name][key].reshape(-1) for name in names]) if isinstance(value, Tensor) else value
        for key, value in first.items()
    }


class Moved(NamedTuple):
    """Parameters that step alike in one step, as their rule has them and as they were.

    Attributes
    ----------
    names, where
        The parameters, and where they lie in θ.
    sizes
        ‖θ‖, ‖Δ‖ and ‖Δ − step(g, m)‖ of the first, of the second, and so on.
    difference
        Δ − step(g, m), float64.
    after
        m⁺.
    """

    names: tuple[str, ...]
    where: slice
    sizes: list[Tensor]
    difference: Tensor
    after: Memory


def moved_alike(
    rule: UpdateRule,
    step: Step,
    slices: Mapping[str, slice],
    shapes: Mapping[str, torch.Size],
    memory: Mapping[str, Memory],
    joined: Mapping[tuple[str, ...], Memory],
) -> Iterator[Moved]:
    """Parameters under an elementwise rule beside that rule, those that step alike at once.

    ``memory`` is that before the step, zero where there is none; ``joined`` is the same of those that were taken
    together before, as it was left then.
    """
    norm = torch.linalg.vector_norm  # a third of the calls of `Tensor.norm`
    for names in stepping_alike(step, shapes):
        where = slice(slices[names[0]].start, slices[names[-1]].stop)
        own = [shapes[name] for name in names]
        shape = own[0] if len(names) == 1 else torch.Size([where.stop - where.start])
        settings, frozen = step.hyperparameters_of(names[0]), frozen_of(step, names)
        theta = step.before[where].double().reshape(shape)
        moved = step.after[where].reshape(shape) - theta
        gradient, sources = rule.sourced(step.gradient[where].double().reshape(shape), theta, frozen, settings)
        held = joined.get(names)
        if held is None:
            held = _joined(rule, [memory.get(name) for name in names], own, theta)
        delta, after = rule.step(gradient, held, frozen, settings)
        difference = (moved - delta).sub_(sources).reshape(-1)
        counts = [one.numel() for one in own]
        parts = [vector.reshape(-1).split(counts) for vector in (theta, moved, difference)]
        sizes = [norm(part) for of_one in zip(*parts, strict=True) for part in of_one]
        yield Moved(names, where, sizes, difference, after)


def _joined(
    rule: UpdateRule, memory: Sequence[Memory | None], shapes: Sequence[torch.Size], like: Tensor
) -> tuple[Tensor, ...]:
    """Memory of several parameters end to end, or of one in its shape."""
    if all(own is None for own in memory):
        return tuple(torch.zeros_like(like) for _ in rule.memory)
    filled = [
        tuple(like.new_zeros(shape) for _ in rule.memory) if own is None else own
        for own, shape in zip(memory, shapes, strict=True)
    ]
    return tuple(
        torch.cat([slot.reshape(-1) for slot in slots]).reshape(like.shape) for slots in zip(*filled, strict=True)
    )


def apart(memory: Memory, names: Sequence[str], shapes: Mapping[str, torch.Size]) -> dict[str, Memory]:
    """Memory of several parameters, end to end, by the name of each."""
    if len(names) == 1:
        return {names[0]: memory}
    counts = [shapes[name].numel() for name in names]
    slots = [slot.split(counts) for slot in memory]
    return {name: tuple(slot[place].view(shapes[name]) for slot in slots) for place, name in enumerate(names)}
