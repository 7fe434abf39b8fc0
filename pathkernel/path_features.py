r"""Features of a path kernel: a vector φ(x) of chosen dimension for every sample, added up over the nodes of the path.

.. math:: \varphi(x) = \sum_s \sqrt{\omega_s}\, S_s\, \nabla f(x; \theta_s), \qquad E[\varphi(x) \cdot \varphi(x')] =
          K(x, x')

with an independent random map S_s at every node, so that what different nodes have in common is zero in expectation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pathkernel._typing import Float, PyTree
from pathkernel.errors import TrajectoryError, check
from pathkernel.path_nodes import PathMeasure, PathNode, path_nodes
from pathkernel.pytrees import copied_samples, count, memory_bytes
from pathkernel.quadrature import Quadrature, as_quadrature
from pathkernel.tangent_kernel.engine import Engine
from pathkernel.tangent_kernel.measured_error import MeasuredError
from pathkernel.tangent_kernel.outputs import OutputSelection, select_outputs
from pathkernel.tangent_kernel.projection import Projection, ProjectionEngine
from pathkernel.tangent_kernel.tangent_kernel import learn_structure, no_samples, split_samples
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.schedule import StepObserver
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.trajectory import Trajectory


class Features(np.ndarray):
    """An array φ (n, dim) float64 with φφᵀ ≈ K, or (n, C, dim) for ``outputs="full"``; any numpy array otherwise.

    Attributes
    ----------
    error
        How far φφᵀ is from the kernel's own matrix, measured on training samples; None of arrays made from this one.
    """

    error: MeasuredError | None

    @classmethod
    def of(cls, values: np.ndarray, error: MeasuredError | None) -> Features:
        """An array with its error."""
        features = values.view(cls)
        features.error = error
        return features

    def __array_finalize__(self, made_from: Any) -> None:
        self.error = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Features.of, (np.asarray(self), self.error)

    def __deepcopy__(self, memo: dict[int, Any] | None) -> Features:
        return Features.of(np.array(self), self.error)


E = TypeVar("E", bound=Engine)


def at_node(engine: E, node: PathNode, selection: OutputSelection | None = None) -> E:
    """An engine as it is at a node: with the running statistics of then, a random map of its own, other outputs."""
    buffers = node.buffers
    if not buffers and selection is None and not isinstance(engine, ProjectionEngine):
        return engine
    engine = copy.copy(engine)
    if buffers:
        engine.function = engine.function.replaced(constants=buffers)
    if selection is not None:
        engine.selection = selection
    if isinstance(engine, ProjectionEngine):
        engine.number = node.number
    return engine


def features_of(
    nodes: Iterable[tuple[ProjectionEngine, PathNode]], X: PyTree, context: PyTree
) -> Float[Tensor, "n ... dim"]:
    """Σ_s √ω_s φ_s(X), float64."""
    total: Tensor | None = None
    for engine, node in nodes:
        own = engine.features(node.theta, X, context, node.diagonal) * node.weight**0.5
        total = own if total is None else total.add_(own)
    assert total is not None
    return total


def samples_of_path(
    trajectory: Trajectory, X: PyTree, selection: OutputSelection, dtype: torch.dtype, asker: str
) -> tuple[PyTree, PyTree]:
    """Inputs, shaped and typed as in training, and the context of the output function."""
    if selection.with_targets:
        inputs, targets = split_samples(X, selection, dtype, asker)
        inputs = trajectory.queries(inputs, asker)
        learn_structure(selection, trajectory.function(dtype), trajectory.initial, inputs)
        return inputs, targets
    return split_samples(trajectory.queries(X, asker), selection, dtype, asker)


class StreamingFeatures(StepObserver):
    """What `pathkernel.PathKernel.features` gives of a recorded path, without the record.

    Parameters
    ----------
    X
        n samples; pairs ``(inputs, targets)`` for ``outputs="loss"``.
    dim, kind, seed
        As of `pathkernel.PathKernel.features`.
    outputs, measure, quadrature, preconditioner, memory
        As of `pathkernel.PathKernel`.

    Notes
    -----
    Time per step: a sketch of n gradients at each node of the quadrature. Memory O(n · dim).
    """

    name = "features of fixed samples"

    def __init__(
        self,
        X: PyTree,
        dim: int = 1024,
        *,
        kind: str = "tensor",
        seed: int = 0,
        outputs: Any = "trace",
        measure: str = "learning_rate",
        quadrature: str | Quadrature = "trapezoid",
        preconditioner: str | None = None,
        memory: int | str = "1GB",
    ) -> None:
        self.X, self.projection = copied_samples(X), Projection(dim, kind, seed)
        self.outputs, self.quadrature, self.memory = outputs, as_quadrature(quadrature), memory_bytes(memory)
        self.measure, self.preconditioner = measure, preconditioner
        self._sum: Tensor | None = None
        self._end: PathNode | None = None  # a step's end, which may be the start of the next

    def begin(self, trajectory: Trajectory, settings: tuple[Mapping[str, Any], ...]) -> None:
        """Begin with nothing."""
        self._trajectory, self._sum, self._end = trajectory, None, None
        function = trajectory.function()
        selection = select_outputs(self.outputs, trajectory.objective.known, trajectory.objective.reduction)
        self._engine = ProjectionEngine(function, selection, self.memory, self.projection)
        self._samples = samples_of_path(trajectory, self.X, selection, function.dtype, "StreamingFeatures")
        if not count(self._samples[0]):
            raise no_samples("StreamingFeatures")

    def observe(self, step: Step) -> None:
        """Add the features at the nodes of a step."""
        path = copy.copy(self._trajectory)
        path.store = MemoryStore()
        path.store.append(step)
        measure = PathMeasure(path, self.measure, self.preconditioner)
        if measure.weight(step) <= 0:
            return  # a step without length
        first, *others = path_nodes(measure, self.quadrature)
        if self._end is not None and self._joins(self._end, first):
            first = replace(first, weight=first.weight + self._end.weight)
        elif self._end is not None:
            self._add(self._end)
        nodes = [first, *others]
        self._end = nodes.pop() if nodes[-1].time == 1 else None
        for node in nodes:
            self._add(node)

    def _joins(self, end: PathNode, start: PathNode) -> bool:
        before, after = end.step, start.step
        return (
            start.time == 0
            and before.after is after.before
            and before.buffers is after.buffers
            and end.measure.is_identity(before)
            and start.measure.is_identity(after)
        )

    def _add(self, node: PathNode) -> None:
        own = self._at(node)
        self._sum = own if self._sum is None else self._sum.add_(own)

    def _at(self, node: PathNode) -> Tensor:
        return at_node(self._engine, node).features(node.theta, *self._samples, node.diagonal) * node.weight**0.5

    @property
    def values(self) -> Float[np.ndarray, "n ... dim"]:
        """φ of the path so far: float64 (n, dim), or (n, C, dim) for ``outputs="full"``.

        Raises
        ------
        TrajectoryError
            Before a step with a positive weight.
        """
        check(
            self._sum is not None or self._end is not None,
            TrajectoryError,
            "`StreamingFeatures` was asked for its result and has seen no step with a positive weight",
            "It looks on while training is recorded",
            "Write `KernelRecorder(..., schedule=Streaming(features))` and train first",
        )
        parts = [part for part in (self._sum, None if self._end is None else self._at(self._end)) if part is not None]
        return torch.stack(parts).sum(dim=0).cpu().numpy()
