"""Path kernels and their features for samples that are fixed in advance, added up while training runs.

A path kernel is a sum over steps for every optimizer, so nothing needs to be stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathkernel._typing import Float, PyTree
from pathkernel.errors import InputError, TrajectoryError
from pathkernel.gradients.pytrees import copied_samples, count, memory_bytes
from pathkernel.path_kernel.features import samples_of_path
from pathkernel.path_kernel.nodes import PathMeasure, PathNode, path_nodes
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.quadrature import Quadrature, as_quadrature
from pathkernel.tangent_kernel.engines.auto import EngineValue
from pathkernel.tangent_kernel.engines.engine import Engine
from pathkernel.tangent_kernel.engines.projection import Projection, ProjectionEngine
from pathkernel.tangent_kernel.output_probes import OutputProbes
from pathkernel.tangent_kernel.outputs import select_outputs
from pathkernel.tangent_kernel.tangent_kernel import no_samples
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.observer import StepObserver
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.trajectory import Trajectory

Settings = tuple[Mapping[str, Any], ...]


class StreamingGram(StepObserver):
    """A path kernel between two fixed sets of samples, for every optimizer.

    Parameters
    ----------
    X, Y
        n queries and m references; Y None stands for X.
    outputs, measure, quadrature, preconditioner, engine, memory, dtype
        As of `pathkernel.PathKernel`, but for what is drawn at random.
    steps, tolerance
        Refused: how many steps there will be is not known while training runs.

    Notes
    -----
    Time per step: a tangent kernel at each node of the quadrature. Memory O(n · m).
    """

    name = "PathKernel of fixed samples"

    def __init__(
        self,
        X: PyTree,
        Y: PyTree | None = None,
        *,
        outputs: Any = "trace",
        measure: str = "learning_rate",
        quadrature: str | Quadrature = "trapezoid",
        preconditioner: str | None = None,
        engine: str | EngineValue | type[Engine] = "auto",
        memory: int | str = "1GB",
        dtype: torch.dtype | str | None = None,
        steps: Any = None,
        tolerance: Any = None,
    ) -> None:
        self.X, self.Y = copied_samples(X), None if Y is X else copied_samples(Y)
        for name, value in (("steps", steps), ("tolerance", tolerance)):
            if value is not None:
                raise InputError(
                    f"`StreamingGram({name}=...)` was given",
                    "How many steps there will be is not known while training runs, so every step is used",
                    "Leave it out, or record with `Every(10)` and use `PathKernel`",
                )
        for value in (outputs, engine):
            if isinstance(value, (OutputProbes, Projection)):
                raise InputError(
                    f"`StreamingGram` was given {value}",
                    "Each step's kernel is computed by itself here, so nothing can be drawn afresh at every step",
                    "Leave it out, stream `StreamingFeatures(X, dim)`, or use `PathKernel` on a recorded path",
                )
        self.measure = measure
        self._kernel = partial(
            PathKernel,
            outputs=outputs,
            measure=measure,
            quadrature=quadrature,
            preconditioner=preconditioner,
            engine=engine,
            memory=memory,
            dtype=dtype,
        )
        self._trajectory: Trajectory | None = None
        self._sum: np.ndarray | None = None

    def begin(self, trajectory: Trajectory, settings: Settings) -> None:
        """Begin with nothing."""
        if self._trajectory is not trajectory:  # else recording goes on after a break
            self._trajectory = trajectory
            self._sum = self._missed = None

    def observe(self, step: Step) -> None:
        """Add the kernel of a step."""
        assert self._trajectory is not None
        still = all(float(group.get("lr", 0.0)) == 0 for group in step.hyperparameters)
        unmoved = self.measure == "arc_length" and torch.equal(step.before, step.after)
        if (still and self.measure == "learning_rate") or unmoved:
            return  # a step without length
        own = self._kernel(Trajectory.of_step(self._trajectory.run, step.before, step))(self.X, self.Y)
        self._sum = own if self._sum is None else self._sum + own

    @property
    def result(self) -> np.ndarray:
        """The kernel matrix of the path so far: float64 (n, m), or (n, m, C, C) for ``outputs="full"``.

        Of the parameters in training at each step; those that join later count from then on.

        Raises
        ------
        TrajectoryError
            Before a step with a positive weight, and where `observe` of a step ended in an error.
        """
        self.require_whole()
        if self._sum is None:
            raise TrajectoryError(
                "`StreamingGram` was asked for its result and has seen no step with a positive weight",
                "It looks on while training is recorded",
                "Write `KernelRecorder(..., observers=[gram])` and train first",
            )
        return self._sum.copy()

    matrix = result
    """Older name of `result`."""


class StreamingFeatures(StepObserver):
    """Features as of `pathkernel.PathKernel.features`, without a record.

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
        self._trajectory: Trajectory | None = None
        self._sum: Tensor | None = None
        self._end: PathNode | None = None  # a step's end, which may be the start of the next

    def begin(self, trajectory: Trajectory, settings: tuple[Mapping[str, Any], ...]) -> None:
        """Begin with nothing."""
        if self._trajectory is trajectory:  # recording goes on after a break
            return
        self._trajectory, self._missed = trajectory, None
        self._sum = self._end = None
        self._engine = self._engine_of(trajectory)
        selection, dtype = self._engine.selection, self._engine.function.dtype
        self._samples = samples_of_path(trajectory, self.X, selection, dtype, "StreamingFeatures")
        if not count(self._samples[0]):
            raise no_samples("StreamingFeatures")

    def _engine_of(self, trajectory: Trajectory) -> ProjectionEngine:
        selection = select_outputs(self.outputs, trajectory.objective.known, trajectory.objective.reduction)
        return ProjectionEngine(trajectory.function(), selection, self.memory, self.projection)

    def observe(self, step: Step) -> None:
        """Add the features at the nodes of a step."""
        assert self._trajectory is not None
        if self._engine.function.layout != self._trajectory.layout:  # parameters have joined
            if self._end is not None:
                self._add(self._end)
            self._end, self._engine = None, self._engine_of(self._trajectory)
        path = Trajectory(self._trajectory.run, MemoryStore([step]), self._trajectory.end)
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
        return self._engine.at(node).features(node.theta, *self._samples, node.preconditioner) * node.weight**0.5

    @property
    def result(self) -> Float[np.ndarray, "n ... dim"]:
        """φ of the path so far: float64 (n, dim), or (n, C, dim) for ``outputs="full"``.

        Raises
        ------
        TrajectoryError
            Before a step with a positive weight, and where `observe` of a step ended in an error.
        """
        self.require_whole()
        if self._sum is None and self._end is None:
            raise TrajectoryError(
                "`StreamingFeatures` was asked for its result and has seen no step with a positive weight",
                "It looks on while training is recorded",
                "Write `KernelRecorder(..., observers=[features])` and train first",
            )
        parts = [part for part in (self._sum, None if self._end is None else self._at(self._end)) if part is not None]
        return torch.stack(parts).sum(dim=0).cpu().numpy()

    values = result
    """Older name of `result`."""
