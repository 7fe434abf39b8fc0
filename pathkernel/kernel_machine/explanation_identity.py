"""Everything that an explanation depends on, by which one that is kept in a store is known again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import InputError
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.kernel_machine.curves import Curve
from pathkernel.kernel_machine.queries import GradientStep
from pathkernel.quadrature import Quadrature
from pathkernel.storage import question
from pathkernel.trajectory.trajectory import Trajectory


@dataclass(frozen=True)
class Asked:
    """Requests of an explanation beside the shares."""

    by: str | None = None
    verify: bool = False

    @classmethod
    def of(cls, by: str | None, verify: str | None) -> Asked:
        """Requests as a user writes them.

        Raises
        ------
        InputError
            For others, with those that there are.
        """
        if by not in (None, "module", "step"):
            raise InputError(
                f"`by={by!r}` was given",
                'Shares are split by "module" or by "step"',
                'Write `machine.explain(X, by="module")`',
            )
        if verify not in (None, "shares"):
            raise InputError(
                f"`verify={verify!r}` was given",
                'What can be verified are the "shares"',
                'Write `machine.explain(X, verify="shares")`, or leave it out',
            )
        return cls(by, verify is not None)


def explanation_identity(
    curve: Curve, quadrature: Quadrature, form: str, engine: str, average: str | None, wanted: Asked
) -> dict[str, Any]:
    """Everything that an explanation depends on; not the budget, and not what is only checked afterwards."""
    trajectory, queries = curve.trajectory, curve.queries
    function = queries.function
    aside = question.nearby(trajectory)
    points = _points(trajectory, average, function, aside)
    asked = question.behaviour(queries.functional, points, queries.inputs, queries.context)
    if not question.is_ours(quadrature):
        segment = next(trajectory.segments(reverse=True))
        gradient = quadrature.average(GradientStep(queries.block(slice(0, 1)), segment)).gradient
        directions = [torch.nn.functional.normalize(v.double(), dim=0) for v in (segment.displacement, aside)]
        mean = torch.stack([gradient @ direction for direction in directions])
        asked["averages"] = question.numbers([mean], question.NETWORK_ROUNDING[function.dtype])
    return question.identity_of(
        trajectory,
        machine=f"{form}, {engine}, {function.dtype}, {wanted!r}",
        quadrature=question.described(quadrature, "quadrature"),
        weights=question.described(average and trajectory.averages[average], "average"),
        module=function.submodule,
        components=None if queries.scalar else queries.components,
        queries=question.samples_identity((queries.inputs, queries.context)),
        **asked,
    )


def _points(
    trajectory: Trajectory, average: str | None, function: ModelFunction, aside: Tensor
) -> list[tuple[ModelFunction, Tensor]]:
    """The explained network at its start, at its end, and elsewhere."""
    if average is None:
        trained = function.with_(constants=trajectory.final_buffers)
        return [(function, trajectory.initial), (trained, trajectory.final), (trained, aside)]
    record = trajectory.averages[average]
    averaged = function.with_(constants=record.constants(trajectory.constants))
    first, last = (trajectory.layout.flatten(values) for values in (record.initial, record.last))
    return [(averaged, first), (averaged, last), (averaged, aside)]
