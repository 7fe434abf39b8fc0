"""Record of one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.gradients.forward_state import EVALUATION, ForwardState

Settings = tuple[Mapping[str, Any], ...]
"""Numbers and flags of every parameter group."""


LOADED = "loaded"
"""The channel of weights that were loaded into the network, and of memory that was loaded into its optimizer."""


@dataclass(frozen=True)
class MicroBatch:
    r"""The samples of one forward and backward pass; a step owns one or, under gradient accumulation, many.

    Attributes
    ----------
    ids
        (B,) int64 sample ids; an id may occur twice. (B, k) where k samples share a row of the batch, as in mixup.
    weights
        (B,) coefficient of each sample's own loss in the batch loss where that is evaluated again, or None where the
        loss reduces the batch by itself.
    inputs, targets
        The samples as the network saw them, where that differs from the training data under the same ids.
    state
        How the forward pass ran: modes, random generators, mixed precision.
    later
        The same of the further passes that a step with several stages made of the batch.
    cotangents
        :math:`\lambda_i = \partial L / \partial z_i` as the backward pass of the loop brought it, (B, C) in the order
        of `pathkernel.gradients.returned.batch_outputs`; None where it was not seen, or takes too much room.
    sampled_cotangents
        Where it takes too much room: some of its entries, in the order of `sampled_places`, by which λ that is computed
        again is scaled and compared.
    loss_slope
        Derivative of what was differentiated in the loss that the network itself returned; a tensor of no axes.
    later_cotangents
        λ of the further passes of a step with several stages.
    channel
        Under which name the backward pass ran; None for no name.
    source
        Where its samples come from that are not of the training data, whose ids are counted; None for the data.
    parts
        (B, k) float64: which part of a row belongs to each of its samples, adding up to 1; None where each row is one
        sample's.
    """

    ids: Tensor
    weights: Tensor | None = None
    inputs: PyTree = None
    targets: PyTree = None
    state: ForwardState = EVALUATION
    later: tuple[ForwardState, ...] = ()
    cotangents: Tensor | None = None
    sampled_cotangents: Tensor | None = None
    loss_slope: Tensor | None = None
    later_cotangents: tuple[Tensor | None, ...] = ()
    channel: str | None = None
    source: str | None = None
    parts: Tensor | None = None

    def at_stage(self, stage: int) -> MicroBatch:
        """The micro-batch with the forward pass of a stage as its ``state``; stages not seen ran like the first."""
        if stage == 0:
            return self
        state = self.later[stage - 1] if stage <= len(self.later) else self.state
        own = self.later_cotangents[stage - 1] if stage <= len(self.later_cotangents) else None
        return replace(self, state=state, cotangents=own, sampled_cotangents=None)

    @property
    def has_targets(self) -> bool:
        """True where each row is one sample of the training data, with its target."""
        return self.parts is None and self.source is None

    @property
    def captured(self) -> bool:
        """True where something of its cotangents is on record."""
        return self.cotangents is not None or self.sampled_cotangents is not None or self.loss_slope is not None


SAMPLED_COTANGENTS = 256
"""Entries of λ that are kept where all of them take too much room."""


def sampled_places(numbers: int) -> Tensor:
    """Where the entries lie that are kept of so many, evenly spread."""
    return torch.linspace(0, numbers - 1, min(numbers, SAMPLED_COTANGENTS), dtype=torch.float64).round().long()


@dataclass(frozen=True)
class ReplayNotes:
    """How a step is trained again that was not kept whole; see `pathkernel.trajectory.replay`.

    Attributes
    ----------
    keyframe
        Index of the step with the keyframe that it is replayed from.
    checksum
        Of θ after the step.
    gradient
        Checksum of the gradient that the optimizer received; None where the gradient itself is kept.
    divisor
        By what the loop divided the loss of each micro-batch.
    """

    keyframe: int
    checksum: int
    gradient: int | None
    divisor: int = 1


NOTES = ""
"""Under this name, which no parameter has, the notes of a replay lie among what is frozen: in stores, and in pickles of
steps from before there was `Step.replay`."""


@dataclass(frozen=True)
class Step:
    """One optimizer step θ_s → θ_{s+1} with everything that is frozen in it.

    Attributes
    ----------
    index
        s, counted from 0.
    before, after
        θ_s and θ_{s+1}, (P,). Where nothing touched the parameters in between, ``after`` *is* the next ``before``.
    gradient
        The gradient that the optimizer received, (P,); zero where a parameter had none.
    active
        Names of the parameters that had a gradient; the others were skipped by the optimizer.
    batches
        The micro-batches whose gradients arrived.
    groups
        Parameter name → index of its parameter group.
    hyperparameters
        All numbers and flags of every parameter group.
    frozen
        Parameter name → what its update rule freezes (denominators, step counts …); a `FrozenOnReading` where that
        follows from the optimizer's state. With a keyframe it is that state before the step.
    changes
        (name, θ) after each change that was made outside the optimizer since the step before, in their order.
    gradient_changes
        What was done to the gradient under a name after the backward pass, (P,) each.
    buffers
        Buffers that have changed since recording began, as the step found them. The very same mapping as the
        step's before where none has changed in between.
    length
        How many steps of the optimizer it stands for: more than 1 on a thinned path.
    differentiated
        Which of ``gradient_changes`` backward passes have made: they hold what the samples of these passes contributed,
        and what was done to all gradients afterwards, such as clipping, was done to them.
    replay
        How it is trained again; None where it was kept whole.
    """

    index: int
    before: Tensor
    after: Tensor
    gradient: Tensor
    active: frozenset[str]
    batches: tuple[MicroBatch, ...]
    groups: Mapping[str, int]
    hyperparameters: tuple[Mapping[str, Any], ...]
    frozen: Mapping[str, Mapping[str, Any]] = field(repr=False, default_factory=dict)
    changes: tuple[tuple[str, Tensor], ...] = ()
    gradient_changes: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    length: int = 1
    differentiated: frozenset[str] = frozenset()
    replay: ReplayNotes | None = None

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        known = dict(state)
        if "length" not in known:  # pickled before there was the field
            thinned = bool(known["after"].numel()) and not known["gradient"].numel()
            known["hyperparameters"], known["length"] = length_taken_out(known["hyperparameters"], thinned)
        if "replay" not in known:
            known["frozen"], known["replay"] = notes_taken_out(known["frozen"])
        vars(self).update(known)

    def hyperparameters_of(self, name: str) -> Mapping[str, Any]:
        """The settings of the group that a parameter belongs to."""
        return self.hyperparameters[self.groups[name]]


def length_taken_out(settings: Settings, thinned: bool) -> tuple[Settings, int]:
    """The settings of a step as older versions wrote them, and its length.

    On a thinned path they hid the length among the settings of every group, under the key ``"steps"``.
    """
    if not thinned:
        return settings, 1
    own = tuple({key: value for key, value in group.items() if key != "steps"} for group in settings)
    return own, max((group.get("steps", 1) for group in settings), default=1)


def notes_taken_out(
    frozen: Mapping[str, Mapping[str, Any]],
) -> tuple[Mapping[str, Mapping[str, Any]], ReplayNotes | None]:
    """Split what lies under the names of parameters from the notes of a replay."""
    if isinstance(frozen, dict) and NOTES in frozen:
        return {name: own for name, own in frozen.items() if name != NOTES}, ReplayNotes(**frozen[NOTES])
    return frozen, None


@dataclass(frozen=True)
class Segment:
    """A straight piece of the path: an optimizer step, or a change made outside the optimizer (``step`` is None).

    Attributes
    ----------
    start, end
        θ at its ends, (P,).
    step
        The optimizer step, or None.
    channel
        Under which name a change outside the optimizer is booked.
    buffers
        The buffers under which it is walked; see `Step.buffers`.
    """

    start: Tensor
    end: Tensor
    step: Step | None
    channel: str = ""
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def displacement(self) -> Tensor:
        """Δ = end − start, (P,) float64: exact for float32 parameters."""
        return torch.sub(self.end.double(), self.start)

    def point(self, time: float, displacement: Tensor) -> Tensor:
        """start + time · Δ, (P,) float64, from Δ."""
        return torch.add(self.start.double(), displacement, alpha=time)


class MeasuredSegment(Segment):
    """A segment whose displacement is kept as long as it is."""

    @classmethod
    def of(cls, segment: Segment) -> Self:
        """The same segment."""
        return cls(segment.start, segment.end, segment.step, segment.channel, segment.buffers)

    @cached_property
    def displacement(self) -> Tensor:
        """Δ; as of `Segment.displacement`."""
        return super().displacement


class SharedSegment(MeasuredSegment):
    """A segment that several sweeps pass: the points between its ends are kept, too."""

    def point(self, time: float, displacement: Tensor) -> Tensor:
        """start + time · Δ; as of `Segment.point`."""
        if time not in self._points:
            self._points[time] = super().point(time, displacement)
        return self._points[time]

    @cached_property
    def _points(self) -> dict[float, Tensor]:
        return {}
