r"""Averages of the weights that were kept beside training: EMA, SWA, or any other affine average of the path.

An average is updated by :math:`\Theta^+ = \Theta + a\,(\theta - \Theta)`: a = 1 − decay for an exponential average,
1/(n + 1) for an equal one, 1 for a first copy. Only a is kept; the averaged path follows from it and the trajectory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pathkernel.errors import RecordingError, TrajectoryError
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.trajectory.step import Segment


def averaged_values(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of an averaged model under the trained model's names."""
    if not isinstance(source, nn.Module):
        return dict(source)
    inner = source.module if isinstance(source, torch.optim.swa_utils.AveragedModel) else source
    return {**dict(inner.named_parameters()), **dict(inner.named_buffers())}


@dataclass
class AverageRecord:
    """How one average moved, as seen before every step.

    Attributes
    ----------
    name
        As given in ``averages=``.
    initial
        Its values when recording began.
    updates
        After each optimizer step: a, and whether the average was taken after changes made outside the optimizer.
    last
        Its values when last seen: those of the averaged network at the end.
    unknown
        Buffers that are not known there: of an earlier point of the path, where the record does not tell what they did.
    """

    name: str
    initial: dict[str, Tensor]
    updates: list[tuple[float, bool]] = field(default_factory=list)
    last: dict[str, Tensor] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @classmethod
    def begin(cls, name: str, source: nn.Module | Mapping[str, Tensor], layout: ParameterLayout) -> AverageRecord:
        """Look at an average for the first time."""
        values = {key: value.detach().clone() for key, value in averaged_values(source).items()}
        missing = [parameter for parameter in layout.names if parameter not in values]
        if missing:
            raise RecordingError(
                f"The average {name!r} lacks {', '.join(f'`{m}`' for m in missing)}",
                "An average has the trained model's parameter names",
                "Pass an `AveragedModel`, a copy of the model, or a dict of tensors by parameter name",
            )
        return cls(name, values, [], values)

    def constants(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The averaged network's own buffers by these names, as they were at the end.

        Raises
        ------
        TrajectoryError
            Where they are not known.
        """
        if self.unknown:
            raise TrajectoryError(
                f"{', '.join(f'`{name}`' for name in self.unknown)} of the average {self.name!r} in mid-run was asked "
                "for",
                "On record are the buffers of an average at the start and at the end; these neither stayed, nor "
                "followed the network's own, nor were averaged as the weights are (`torch.optim.swa_utils.update_bn` "
                "finds them anew)",
                "Explain the average at the end of the record, or the network itself at this step",
            )
        return {name: self.last[name] for name in names if name in self.last}

    def observe(
        self,
        source: nn.Module | Mapping[str, Tensor],
        layout: ParameterLayout,
        step: int,
        after_step: Tensor,
        after_changes: Tensor,
    ) -> None:
        """Find a from how the average moved since it was last seen.

        Raises
        ------
        RecordingError
            When the average did not move towards the weights.
        """
        values = {key: value.detach() for key, value in averaged_values(source).items()}
        old, new = layout.flatten(self.last, torch.float64), layout.flatten(values, torch.float64)
        moved, rounding = new - old, torch.finfo(after_step.dtype).eps * 8 * new.norm().item()
        best: tuple[float, float, bool] | None = None
        for theta, changed in ((after_step, False), (after_changes, True)):
            towards = theta.double() - old
            squared = (towards @ towards).item()
            a = (moved @ towards).item() / squared if squared > 0 else 0.0
            miss = (moved - a * towards).norm().item()
            if best is None or miss < best[0]:
                best = (miss, a, changed)
        assert best is not None
        miss, a, changed = best
        if not miss <= rounding + 1e-3 * moved.norm().item():
            raise RecordingError(
                f"After step {step} the average {self.name!r} did not move towards the weights: "
                f"{miss / max(moved.norm().item(), 1e-300):.1%} of its change is something else",
                "An average is updated by Θ + a (θ − Θ) with one number a for all parameters, once for each step",
                "Update it right after `optimizer.step()`, or leave it out of `averages=`",
            )
        self.updates.append((0.0 if moved.norm().item() == 0 else a, changed))
        self.last = {key: value.clone() for key, value in values.items()}


@dataclass(frozen=True)
class Update:
    """A move of the average: Θ → Θ + a (θ − Θ)."""

    a: float
    segment: Segment


def averaged_events(
    segments: Iterable[Segment], layout: ParameterLayout, record: AverageRecord
) -> list[Segment | Update]:
    """Moves of the weights and of their average, in their order; the averaged path is made in float64.

    Memory: one vector of P numbers for each update, as the trajectory itself.
    """
    events: list[Segment | Update] = []
    average = layout.flatten(record.initial, torch.float64)
    waiting: tuple[float, Tensor] | None = None

    def update(a: float, theta: Tensor) -> Iterator[Update]:
        nonlocal average
        if a:
            after = average + a * (theta.double() - average)
            yield Update(a, Segment(average, after, None))
            average = after

    for segment in segments:
        if waiting is not None and segment.step is not None:
            events += update(*waiting)
            waiting = None
        events.append(segment)
        if segment.step is not None:
            a, after_changes = record.updates[segment.step.index]
            waiting = (a, segment.end)
            if not after_changes:
                events += update(*waiting)
                waiting = None
        elif waiting is not None:
            waiting = (waiting[0], segment.end)
    if waiting is not None:
        events += update(*waiting)
    final = layout.flatten(record.last, torch.float64)
    if not torch.equal(final, average):  # rounding of the average itself, in its own floating type
        events.append(Update(0.0, Segment(average, final, None, "rounding")))
    return events
