"""Batches of consecutive steps that ran alike, run again in one pass: `pathkernel.gradients.layers.stacked_passes`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils import _pytree as pytree

from pathkernel.gradients.arguments import same_arguments
from pathkernel.gradients.gradient_source import BY_ROWS
from pathkernel.gradients.pytrees import alike, take
from pathkernel.trajectory.recomputed_batches import RecomputedBatches
from pathkernel.trajectory.samples import samples_of
from pathkernel.trajectory.stage_gradients import Passes
from pathkernel.trajectory.step import MicroBatch, Step


def run_together(batches: RecomputedBatches, steps: Sequence[Step], passes: Passes) -> None:
    """Take the gradients of some steps at θ_s in one pass, for `RecomputedBatches.by_sample` to find.

    Of none, where one of the steps is of several batches, ran otherwise than the first, couples its samples or draws
    random numbers, and where it is not proved that one pass says the same. What was found before is forgotten.
    """
    batches.held.clear()
    ran = [step.batches[0] for step in steps if len(step.batches) == 1]
    if not steps or len(ran) < len(steps) or not _may_be_joined(batches, steps, ran, passes):
        return
    samples = [samples_of(batch, batches.trajectory.data) for batch in ran]
    inputs = [own for own, _ in samples]
    if not all(alike(inputs[0], own) for own in inputs[1:]):
        return
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *inputs)
    thetas = torch.stack([step.before for step in steps])
    cotangents = torch.stack([batch.cotangents for batch in ran if batch.cotangents is not None]).to(thetas.device)
    function = batches.replayed(steps[0], ran[0])
    found = batches.source.pulled_back_at_points(thetas, stacked, cotangents, function)
    for place, own in enumerate(found or ()):
        step, seen = steps[place], (take(stacked, place), samples[place][1])
        batches.held[step.index] = ran[place], step.before, seen, own


def _may_be_joined(
    batches: RecomputedBatches, steps: Sequence[Step], ran: Sequence[MicroBatch], passes: Passes
) -> bool:
    """True where every batch runs as the first, whole, in full precision and each of its samples by itself."""
    first = ran[0]
    if passes.streamed or passes.outputs or passes.cut(len(first.ids)):
        return False
    if batches.check.coupled or batches.source.engine in BY_ROWS or batches.low(first):
        return False
    if not all(step.buffers is steps[0].buffers and _alike(first, own) for step, own in zip(steps, ran, strict=True)):
        return False
    inputs, _ = samples_of(first, batches.trajectory.data)
    return not batches.together(first, steps[0].before, inputs)


def _alike(one: MicroBatch, other: MicroBatch) -> bool:
    """True where a pass, all of whose cotangents are on record, ran as another one did and drew nothing."""
    a, b = one.state, other.state
    return (
        one.cotangents is not None
        and other.cotangents is not None
        and one.cotangents.shape == other.cotangents.shape
        and other.loss_slope is None
        and not other.later
        and not b.generators
        and (a.modes is b.modes or a.modes == b.modes)
        and a.autocast == b.autocast
        and a.buffers is b.buffers
        and same_arguments(a.arguments, b.arguments)
    )
