"""Path kernel matrices that are kept in a store, and everything they depend on, by which they are known again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import take
from pathkernel.path_kernel.nodes import PathMeasure, PathNode
from pathkernel.storage import question
from pathkernel.tangent_kernel.engines.engine import Engine, Samples
from pathkernel.tangent_kernel.output_probes import OutputProbes
from pathkernel.tangent_kernel.outputs import OutputSelection


@dataclass(frozen=True)
class Made:
    """Parts that a path kernel is made of.

    Attributes
    ----------
    measure, nodes
        The weights of steps, and the points of the path.
    selection, probes
        The function of the outputs, and random outputs where they are drawn.
    engine, engine_at
        The engine as given, and the one that is used at a node.
    dtype, tensor_floats
        Floating type of the arithmetic, and whether products are in TensorFloat-32.
    """

    measure: PathMeasure
    nodes: list[PathNode]
    selection: OutputSelection
    probes: OutputProbes | None
    engine: Any
    engine_at: Callable[[PathNode], Engine]
    dtype: torch.dtype
    tensor_floats: bool


def matrix_identity(made: Made, function: ModelFunction, rows: Samples, columns: Samples | None) -> dict[str, Any]:
    """Everything that a matrix depends on; not the budget. How its nodes were chosen, they say themselves."""
    nodes, selection, trajectory = made.nodes, made.selection, made.measure.trajectory
    ends = (nodes[0], nodes[-1])
    points = [(function.with_(constants=node.buffers), node.theta) for node in ends]
    points.append((points[1][0], question.nearby(trajectory)))
    asked = question.behaviour(selection.function, points, *rows)
    if not question.is_ours(made.engine):
        first, context = take(rows, slice(0, 2))
        entries = [
            made.engine_at(node).gram(node.theta, first, None, context, None, node.preconditioner) for node in ends
        ]
        asked["entries"] = question.numbers(entries, question.NETWORK_ROUNDING[made.dtype])
    weights = torch.tensor([(node.time, node.weight) for node in nodes], dtype=torch.float64)
    return question.identity_of(
        trajectory,
        outputs=f"{selection.combine}, {selection.scalar}, {question.described(made.probes, 'outputs')}",
        measure=f"{made.measure.name}, {made.measure.preconditioner}",
        engine=question.described(made.engine, "engine") + (" in TensorFloat-32" if made.tensor_floats else ""),
        dtype=made.dtype,
        nodes=question.samples_identity(torch.tensor([(node.position, node.number) for node in nodes])),
        weights=question.numbers(weights.T, question.NETWORK_ROUNDING[torch.float64]),
        rows=question.samples_identity(rows),
        columns=question.samples_identity(columns),
        **asked,
    )


def stored_gram(
    store: str | os.PathLike[str],
    made: Made,
    function: ModelFunction,
    rows: Samples,
    columns: Samples | None,
    shape: tuple[int, ...],
    progress: bool,
) -> np.ndarray:
    """Kernel matrix that is kept in a store while it grows.

    Parameters
    ----------
    store
        Its folder.
    made, function
        What the kernel is made of, and the network.
    rows, columns
        n and m samples; None for the symmetric matrix.
    shape
        Of the matrix: (n, m), or (n, m, C, C).
    progress
        Show a progress bar.

    Returns
    -------
    numpy.ndarray
        float64, of this shape.
    """
    from pathkernel.storage import resumable  # not before it is needed: what writes to disk takes a second to load

    def term(i: slice, j: slice, s: int) -> Tensor:
        node, one = made.nodes[s], take(rows, i)
        x, context = one
        y, context_y = (None, None) if columns is None and i == j else take(columns or rows, j)
        tile = made.engine_at(node).gram(node.theta, x, y, context, context_y, node.preconditioner)
        return tile.mul_(node.weight).cpu()

    def fix_engines(sizes: Iterable[tuple[int, int | None]], before: Mapping[str, str]) -> dict[str, str]:
        node = made.nodes[0]
        return made.engine_at(node).fix_choices(node.theta, rows, sizes, before)

    identity = matrix_identity(made, function, rows, columns)
    return resumable.resumable_gram(
        store, identity, shape, columns is None, len(made.nodes), term, fix_engines, progress
    )
