"""The points of a path at which tangent kernels are evaluated, and the weight of each; read when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.errors import InputError
from pathkernel.quadrature import Quadrature
from pathkernel.trajectory.step import Segment, Step
from pathkernel.trajectory.trajectory import Trajectory

MEASURES = ("learning_rate", "arc_length", "uniform")


@dataclass(frozen=True)
class PathMeasure:
    """The measure w_s and the metric M_s of every step.

    Attributes
    ----------
    trajectory
        The path.
    name
        ``"learning_rate"``, ``"arc_length"`` or ``"uniform"``.
    preconditioner
        None, or ``"optimizer"``.
    """

    trajectory: Trajectory = field(repr=False)
    name: str = "learning_rate"
    preconditioner: str | None = None

    def __post_init__(self) -> None:
        if self.name not in MEASURES:
            raise InputError(
                f"`measure={self.name!r}` was given",
                f"Measures are {', '.join(map(repr, MEASURES))}",
                'Write `measure="learning_rate"`',
            )
        if self.preconditioner not in (None, "optimizer"):
            raise InputError(
                f"`preconditioner={self.preconditioner!r}` was given",
                'Preconditioners are None and "optimizer"',
                'Write `preconditioner="optimizer"` for the scaling of the optimizer\'s own steps',
            )
        rule = self.trajectory.rule
        if self.preconditioner is not None and not rule.elementwise:
            raise InputError(
                f'`preconditioner="optimizer"` was asked of {rule.name}',
                "The optimizer's scaling must be a positive diagonal",
                "Write `preconditioner=None`",
            )

    @property
    def needs_points(self) -> bool:
        """True where w_s depends on θ at both ends of a step, beside its settings."""
        return self.name == "arc_length"

    def weight(self, step: Step) -> float:
        """w_s."""
        if self.name == "arc_length":
            return Segment(step.before, step.after, step).displacement.norm().item()
        if self.name == "learning_rate":
            return max(_rates(step))
        return float(step.length)

    def is_identity(self, step: Step) -> bool:
        """True where M_s is the identity."""
        return self.preconditioner is None and (self.name != "learning_rate" or len(set(_rates(step))) == 1)

    def preconditioner_of(self, step: Step) -> Float[Tensor, " P"] | None:
        """Diagonal of M_s, or None for the identity.

        Under several learning rates, each parameter's own relative to the largest.
        """
        if self.is_identity(step):
            return None
        found = self._scaling(step) if self.preconditioner == "optimizer" else None
        rates = _rates(step)
        if self.name == "learning_rate" and len(set(rates)) > 1:
            own = self._per_parameter(step, lambda name: float(step.hyperparameters_of(name)["lr"]) / max(rates))
            found = own if found is None else own * found
        return found

    def _per_parameter(self, step: Step, value: Callable[[str], Tensor | float]) -> Tensor:
        layout = self.trajectory.layout
        vector = torch.zeros(layout.size, dtype=torch.float64, device=self.trajectory.device)
        for name, where in layout.slices.items():
            if name in step.groups:
                vector[where] = value(name)
        return vector

    def _scaling(self, step: Step) -> Tensor:
        """Diagonal by which the optimizer scaled its gradients."""
        rule, layout = self.trajectory.rule, self.trajectory.layout
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        like = torch.zeros((), dtype=torch.float64, device=self.trajectory.device)

        def own(name: str) -> Tensor:
            if name not in step.active:
                return like
            settings = step.hyperparameters_of(name)
            return rule.preconditioner(shapes[name], step.frozen[name], settings, like).abs().reshape(-1)

        return self._per_parameter(step, own)


@dataclass(frozen=True)
class PathNode:
    """A point on the path at which the tangent kernel is evaluated; a few numbers, its θ is read on demand.

    Attributes
    ----------
    measure
        Of the path that it lies on.
    position, time
        θ = θ_s + time · (θ_{s+1} − θ_s) on the step at this position in the record.
    weight
        Its share ω of the measure.
    number
        What is drawn at random for a node follows from it, so it differs between nodes: 0, 2, 4 … count the nodes of
        every step of the run, and the end of a step has an odd number unless it is the start of the next.
    """

    measure: PathMeasure = field(repr=False)
    position: int
    time: float
    weight: float
    number: int

    @property
    def step(self) -> Step:
        """The step that it lies on."""
        return self.measure.trajectory.store.read(self.position)

    @property
    def theta(self) -> Float[Tensor, " P"]:
        """θ."""
        step = self.step
        if self.time in (0.0, 1.0):
            return step.after if self.time else step.before
        return (step.before.double() + self.time * (step.after.double() - step.before.double())).to(step.before.dtype)

    @property
    def preconditioner(self) -> Float[Tensor, " P"] | None:
        """d of the preconditioner M = diag(d), or None for the identity."""
        return self.measure.preconditioner_of(self.step)

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """Running statistics of the step, as far as they have changed in training."""
        return self.step.buffers


def path_nodes(measure: PathMeasure, quadrature: Quadrature, steps: Any = None) -> list[PathNode]:
    """All of `nodes_along`, of the path as it is now."""
    return list(nodes_along(measure, quadrature, stretches(len(measure.trajectory), steps)))


def nodes_along(measure: PathMeasure, quadrature: Quadrature, cut: Iterable[range]) -> Iterator[PathNode]:
    """Quadrature nodes on the middle step of each stretch of the path, with the weight of the whole stretch.

    The end of a step and the start of the next are one node where both are the same network under the same M.

    Parameters
    ----------
    measure
        The path, w_s and M_s.
    quadrature
        Nodes on each step.
    cut
        Stretches of neighbouring steps; see `stretches`.

    Yields
    ------
    PathNode
        One after the other, each when it is known whether the next step begins at it.

    Notes
    -----
    One pass over the record, two steps in memory at a time. Steps are trained again for it only where `PathMeasure`
    needs θ; whoever uses each node as it comes reads them while they are at hand.
    """
    store, times = measure.trajectory.store, quadrature.nodes
    inside = sum(time < 1 for time, _ in times) or 1
    latest: PathNode | None = None
    end: Step | None = None  # the step at whose end the latest node lies, if it lies at one
    for stretch in cut:
        weight = 0.0
        for position in stretch:
            step = store.read(position) if measure.needs_points else store.summary(position).record
            weight += measure.weight(step)
            if position == stretch[(len(stretch) - 1) // 2]:
                middle, represented = step, position
        if weight <= 0:
            continue
        identity = measure.is_identity(middle)
        for place, (time, omega) in enumerate(times):
            if time == 0 and identity and end is not None and latest is not None and _follows(middle, end):
                latest = replace(latest, weight=latest.weight + omega * weight, number=2 * middle.index * inside)
                continue
            if latest is not None:
                yield latest
            number = middle.index * inside + (place if time < 1 else inside)
            latest = PathNode(measure, represented, time, omega * weight, 2 * number + (time == 1))
        end = middle if identity and times[-1][0] == 1 else None
    if latest is None:
        raise InputError(
            f"The path has no length by `measure={measure.name!r}`",
            "At least one step must have a positive weight",
            'Write `measure="uniform"`, or record steps with a learning rate above 0',
        )
    yield latest


def _follows(step: Step, before: Step) -> bool:
    """Test that a step begins where another one ended, with the same running statistics."""
    if step.buffers is not before.buffers:
        return False
    if before.after.numel():
        return step.before is before.after
    # Training again goes on from the end of the step before, unless θ was changed in between.
    return step.index == before.index + 1 and not step.changes


def stretches(length: int, steps: Any) -> list[range]:
    """Cut a path of that many steps into stretches of neighbouring steps, after a look at what the user gave."""
    if steps is not None and not (isinstance(steps, int) and steps >= 1):
        raise InputError(
            f"`steps={steps!r}` was given",
            f"The number of steps to use is an integer from 1 to {length}, or None for every step",
            "Write for example `PathKernel(trajectory, steps=50)`",
        )
    edges = np.linspace(0, length, (length if steps is None else min(steps, length)) + 1).round().astype(int)
    return [range(first, last) for first, last in pairwise(edges.tolist())]


def _rates(step: Step) -> list[float]:
    """Learning rate of each parameter group."""
    return [float(settings["lr"]) for settings in step.hyperparameters]
