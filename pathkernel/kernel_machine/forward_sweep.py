r"""Forward through a trajectory, for predictions.

Shares are linear in the samples' gradients: their sum needs only the displacement that all samples together caused in
each step, and one directional derivative along it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathkernel.kernel_machine.accumulator import Accumulator
from pathkernel.kernel_machine.curves import Curve
from pathkernel.runtime.interrupts import defer_interrupts, deliver_interrupt
from pathkernel.runtime.workspace import give_back_freed_memory
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.discrepancies import Discrepancy
from pathkernel.trajectory.stage_gradients import WHOLE, Passes
from pathkernel.trajectory.step import Segment, Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import Memory


@defer_interrupts(divisible=True)
def forward_sweep(
    curve: Curve,
    gradients: RecordedGradients,
    progress: bool = False,
    passes: Passes = WHOLE,
) -> Accumulator:
    """Sum over all samples, and of every channel, for each query: a prediction without shares.

    Time per step: one batch gradient and as many directional derivatives as there are channels. Memory O(P).
    """
    trajectory = curve.trajectory
    size = curve.trajectory.layout.size
    memory: dict[str, list[Tensor]] = defaultdict(
        lambda: [torch.zeros(size, dtype=torch.float64, device=trajectory.device) for _ in trajectory.rule.memory]
    )
    for name, held in trajectory.initial_memory.items():
        for slot, start in zip(memory["memory"], held, strict=True):
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
    curve.forward(accumulator, displacements)
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
    """Δ_s split by where it came from, (P,) each; ``memory`` becomes that after the step."""
    rule = trajectory.rule
    size = trajectory.layout.size
    none = [torch.zeros(size, dtype=torch.float64, device=trajectory.device) for _ in range(rule.stages)]
    received: dict[str, list[Tensor]] = defaultdict(lambda: [vector.clone() for vector in none])
    for index, stage in enumerate(gradients.stages(step, rows=False, passes=passes)):
        for channel, gradient in {"samples": stage.samples, **stage.channels}.items():
            received[channel][index] = gradient
    moved: dict[str, Tensor] = defaultdict(lambda: torch.zeros(size, dtype=torch.float64, device=trajectory.device))
    parts = _parts(trajectory, step)
    _beyond_the_rule(trajectory, gradients.discrepancies.of(step), memory, moved)
    for part in parts:
        parameter = segment.start[part.where].double().reshape(part.shape)
        for source, term in rule.gradient_sources(parameter, part.frozen, part.settings).items():
            for vector in received[source]:
                vector[part.where] += term.reshape(-1)
        for source, term in rule.displacement_sources(parameter, part.frozen, part.settings).items():
            moved[source][part.where] += term.reshape(-1)
    for channel in dict.fromkeys((*received, *memory)):  # in the same order in every process
        for part in parts:
            held: Memory = tuple(slot[part.where].reshape(part.shape) for slot in memory[channel])
            taken = tuple(vector[part.where].reshape(part.shape) for vector in received[channel])
            delta, held = rule.step(taken if rule.stages > 1 else taken[0], held, part.frozen, part.settings)
            moved[channel][part.where] += delta.reshape(-1)
            for slot, after in zip(memory[channel], held, strict=True):
                slot[part.where] = after.reshape(-1)
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
    return [_with_tensors(part, step, members) for part, members in zip(parts, names, strict=True)]


def _with_tensors(part: Part, step: Step, members: list[str]) -> Part:
    """Put the frozen tensors of its members, end to end, into a part."""
    first = step.frozen[members[0]]
    tensors = {key: value for key, value in first.items() if isinstance(value, Tensor)}
    if len(members) == 1:
        return Part(part.where, part.shape, {**part.frozen, **tensors}, part.settings)
    joined = {key: torch.cat([step.frozen[name][key].reshape(-1) for name in members]).double() for key in tensors}
    size = part.where.stop - part.where.start
    return Part(part.where, torch.Size([size]), {**part.frozen, **joined}, part.settings)
