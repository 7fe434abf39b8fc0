r"""Forward through a trajectory, for predictions.

Shares are linear in the samples' gradients, and channels in what they add: their sum needs only the displacement that
all of them together caused in each step, and one directional derivative along it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathkernel.gradients.pytrees import blocks
from pathkernel.kernel_machine.accumulator import Accumulator
from pathkernel.kernel_machine.curves import TOGETHER, Curve
from pathkernel.kernel_machine.kept_displacements import KeptDisplacements
from pathkernel.runtime.interrupts import defer_interrupts, deliver_interrupt
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.runtime.workspace import give_back_freed_memory
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.discrepancies import Discrepancy
from pathkernel.trajectory.stage_gradients import ROUNDING, WHOLE, Passes
from pathkernel.trajectory.step import Segment, Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import Memory

TRIFLE = 1e-3
"""Part of a displacement up to which that of rounding is no channel of its own: `check_unexplained` allows it a tenth
of what moved the outputs. Chosen, not measured."""

BLOCK = 2**15
"""Entries of θ that go through an elementwise rule at once. Chosen, not measured."""


@defer_interrupts(divisible=True)
@EXACT_PRODUCTS
def forward_sweep(
    curve: Curve,
    gradients: RecordedGradients,
    progress: bool = False,
    passes: Passes = WHOLE,
    kept: KeptDisplacements | None = None,
) -> Accumulator:
    """Sum over all samples and channels for each query: a prediction without shares.

    Time per step: one batch gradient, and one directional derivative of the queries along what samples and channels add
    up to. What a prediction is checked by stays apart and takes a derivative of its own: changes without a name, and
    differences between recorded and recomputed gradients while they are more than a trifle. Memory O(P). Where ``kept``
    holds the displacements already, their computation is left out.
    """
    trajectory = curve.trajectory
    size = curve.trajectory.layout.size
    memory: dict[str, list[Tensor]] = defaultdict(
        lambda: [torch.zeros(size, dtype=torch.float64, device=trajectory.device) for _ in trajectory.rule.memory]
    )
    for name, held in trajectory.initial_memory.items():
        for slot, start in zip(memory[TOGETHER], held, strict=True):
            slot[trajectory.layout.slices[name]] = start.double().reshape(-1)

    bar = tqdm(total=len(trajectory), desc="forward sweep", unit="step", disable=not progress)

    def displacements(segment: Segment) -> dict[str, Tensor]:
        deliver_interrupt()
        if segment.step is None:
            return {segment.channel: segment.displacement}
        bar.update()
        give_back_freed_memory()
        return _displacements(trajectory, segment, segment.step, gradients, memory, passes)

    accumulator = Accumulator.start(curve.initial)
    curve.forward(accumulator, displacements if kept is None else kept.through(gradients, displacements))
    if kept is not None:
        kept.finish()
    bar.close()
    return accumulator.on_cpu()


def _displacements(
    trajectory: Trajectory,
    segment: Segment,
    step: Step,
    gradients: RecordedGradients,
    memory: dict[str, list[Tensor]],
    passes: Passes,
) -> dict[str, Tensor]:
    """Δ_s as samples and channels make it, and apart from it what has no name; ``memory`` becomes that after the step.

    All that is added up goes through the rule at once, which is linear.
    """
    rule = trajectory.rule
    zeros = partial(torch.zeros, trajectory.layout.size, dtype=torch.float64, device=trajectory.device)
    received: dict[str, list[Tensor]] = defaultdict(lambda: [zeros() for _ in range(rule.stages)])
    for index, stage in enumerate(gradients.stages(step, rows=False, passes=passes)):
        rest = dict(stage.channels)
        apart = {ROUNDING: rest.pop(ROUNDING)} if ROUNDING in rest else {}
        together = stage.samples
        for gradient in rest.values():
            together += gradient
        for channel, gradient in {TOGETHER: together, **apart}.items():
            if rule.stages == 1:
                received[channel] = [gradient]
            else:
                received[channel][index] = gradient
    moved: dict[str, Tensor] = defaultdict(zeros)
    _beyond_the_rule(trajectory, gradients.discrepancies.of(step), memory, moved)
    for part in _parts(trajectory, step):
        parameter = segment.start[part.where].double().reshape(part.shape)
        for term in rule.gradient_sources(parameter, part.frozen, part.settings).values():
            for vector in received[TOGETHER]:
                vector[part.where] += term.reshape(-1)
        for term in rule.displacement_sources(parameter, part.frozen, part.settings).values():
            moved[TOGETHER][part.where] += term.reshape(-1)
        for channel in dict.fromkeys((*received, *memory)):  # in the same order in every process
            held: Memory = tuple(slot[part.where].reshape(part.shape) for slot in memory[channel])
            taken = tuple(vector[part.where].reshape(part.shape) for vector in received[channel])
            delta, held = rule.step(taken if rule.stages > 1 else taken[0], held, part.frozen, part.settings)
            moved[channel][part.where] += delta.reshape(-1)
            for slot, after in zip(memory[channel], held, strict=True):
                slot[part.where] = after.reshape(-1)
    if ROUNDING in moved and moved[ROUNDING].norm() <= TRIFLE * moved[TOGETHER].norm():
        moved[TOGETHER] += moved.pop(ROUNDING)
    return moved


def _beyond_the_rule(
    trajectory: Trajectory, found: Discrepancy, memory: dict[str, list[Tensor]], moved: dict[str, Tensor]
) -> None:
    """Edit every channel's memory as it was edited before a step, and book what has no name."""
    slices = trajectory.layout.slices
    for name, scale in found.scale.items():
        for slots in memory.values():
            for slot in slots:
                slot[slices[name]] *= scale
    for name, added in found.memory.items():
        memory[found.channel][0][slices[name]] += added.reshape(-1)
    for name, shift in found.displacement.items():
        moved[found.channel][slices[name]] += shift.reshape(-1)


@dataclass(frozen=True)
class Part:
    """A range of θ that one evaluation of the update rule covers: a parameter, or neighbours that step alike."""

    where: slice
    shape: torch.Size
    frozen: Mapping[str, Any]
    settings: Mapping[str, Any]


def _parts(trajectory: Trajectory, step: Step) -> list[Part]:
    """Cut θ into parts; parameters that an elementwise rule treats alike are joined, inactive ones left out."""
    layout = trajectory.layout
    rule = trajectory.rule
    parts: list[Part] = []
    names: list[list[str]] = []
    for (name, where), shape in zip(layout.slices.items(), layout.shapes, strict=True):
        if name not in step.active:
            continue
        settings = step.hyperparameters_of(name)
        frozen = step.frozen[name]
        numbers = {key: value for key, value in frozen.items() if not isinstance(value, Tensor)}
        last = parts[-1] if parts else None
        alike = last is not None and last.where.stop == where.start and last.settings is settings
        if alike and rule.of(settings).elementwise and last is not None and last.frozen == numbers:
            parts[-1] = Part(slice(last.where.start, where.stop), torch.Size(), numbers, settings)
            names[-1].append(name)
        else:
            parts.append(Part(where, shape, numbers, settings))
            names.append([name])
    found: list[Part] = []
    for part, members in zip(parts, names, strict=True):
        whole = _with_tensors(part, step, members)
        found += _blocks(whole) if rule.of(part.settings).elementwise else [whole]
    return found


def _blocks(part: Part) -> list[Part]:
    """A part cut to lengths of which all that a step takes stays in cache."""
    size = part.where.stop - part.where.start
    if size <= BLOCK:
        return [part]
    flat = {
        key: value.reshape(-1) if isinstance(value, Tensor) and value.numel() == size else value
        for key, value in part.frozen.items()
    }
    found = []
    for piece in blocks(size, BLOCK):
        own = {key: v[piece] if isinstance(v, Tensor) and v.numel() == size else v for key, v in flat.items()}
        where = slice(part.where.start + piece.start, part.where.start + piece.stop)
        found.append(Part(where, torch.Size([piece.stop - piece.start]), own, part.settings))
    return found


def _with_tensors(part: Part, step: Step, members: list[str]) -> Part:
    """Put the frozen tensors of its members, end to end, into a part."""
    first = step.frozen[members[0]]
    tensors = {key: value for key, value in first.items() if isinstance(value, Tensor)}
    if len(members) == 1:
        return Part(part.where, part.shape, {**part.frozen, **tensors}, part.settings)
    joined = {key: torch.cat([step.frozen[name][key].reshape(-1) for name in members]).double() for key in tensors}
    size = part.where.stop - part.where.start
    return Part(part.where, torch.Size([size]), {**part.frozen, **joined}, part.settings)
