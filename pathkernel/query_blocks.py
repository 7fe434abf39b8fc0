"""How many queries a backward sweep takes at once."""

from __future__ import annotations

import torch

from pathkernel.curves import Curve
from pathkernel.factored import working
from pathkernel.pull_back import Adjoint
from pathkernel.quadrature import FixedQuadrature
from pathkernel.queries import Queries
from pathkernel.sweeps import BLOCK
from pathkernel.tangent_kernel.engine import check_budget
from pathkernel.trajectory.trajectory import Trajectory

VECTORS = 16
"""Vectors of P numbers in float64 that a sweep has in hand, whatever the number of queries."""


def samples_at_once(curve: Curve, queries: Queries, memory: int, dense: int) -> int:
    """Query samples whose gradients and cotangents of the optimizer's memory fit a budget in bytes.

    Parameters
    ----------
    curve, queries
        What is swept, and for whom.
    memory
        Bytes, of which vectors of P numbers and columns in hand take a part.
    dense
        Matrices (Q, P) that are formed beside what the sweep needs.

    Raises
    ------
    InputError
        With both sizes, where the budget does not hold a single one.
    """
    trajectory = curve.trajectory
    itemsize = torch.finfo(working(queries.function.dtype)).bits // 8 if trajectory.rule.elementwise else 8
    size = trajectory.layout.size
    fixed = 8 * VECTORS * size + 4 * BLOCK * itemsize
    matrices = curve.dense + (len(trajectory.rule.memory) if keeps_memory(trajectory) else 0)
    matrices += dense + (4 if curve.quadrature.arithmetic is not None else 0)
    nodes = 2 + (len(curve.quadrature.nodes) if isinstance(curve.quadrature, FixedQuadrature) else 1)
    per_sample = matrices * itemsize * size * queries.components
    per_sample += nodes * queries.block(slice(0, 2)).bytes_per_sample(trajectory.final)
    check_budget(per_sample, memory, "one query's gradients and its part of the optimizer's memory")
    return max(1, max(memory // 4, memory - fixed) // per_sample)


def keeps_memory(trajectory: Trajectory) -> bool:
    """Whether any gradient of the run went into the optimizer's memory."""
    rule, layout = trajectory.rule, trajectory.layout
    if not rule.memory:
        return False
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    for step in trajectory.steps():
        adjoint = Adjoint(rule, step, shapes)
        for name in {group: name for name, group in step.groups.items() if name in step.active}.values():
            linear = adjoint.linear(name)
            if linear is None or linear.rate is None:
                return True
    return False
