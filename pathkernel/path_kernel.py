"""`PathKernel`: tangent kernels integrated along the path, symmetric and positive semi-definite."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, check
from pathkernel.quadrature import Quadrature, as_quadrature
from pathkernel.tangent_kernel.engine import Engine
from pathkernel.tangent_kernel.outputs import select_outputs
from pathkernel.tangent_kernel.tangent_kernel import make_engine, split_samples
from pathkernel.trajectory.step import Segment, Step
from pathkernel.trajectory.trajectory import Trajectory

MEASURES = ("learning_rate", "arc_length", "uniform")


@dataclass(frozen=True)
class PathNode:
    """A point on the path at which the tangent kernel is evaluated.

    Attributes
    ----------
    segment, time
        θ = start + time · (end − start).
    weight
        Its share ω of the measure.
    diagonal
        d of the preconditioner M = diag(d), (P,), or None.
    """

    segment: Segment
    time: float
    weight: float
    diagonal: Tensor | None

    @property
    def theta(self) -> Tensor:
        """θ, (P,)."""
        if self.time in (0.0, 1.0):
            return self.segment.end if self.time else self.segment.start
        return (self.segment.start.double() + self.time * self.segment.displacement).to(self.segment.start.dtype)


class PathKernel:
    r"""Tangent kernels integrated along the recorded path: a kernel in the sense of scikit-learn.

    .. math:: K(x, x') = \sum_s w_s \sum_n \omega_n
              \langle M_s \nabla f(x; \theta_{s,n}), \nabla f(x'; \theta_{s,n})\rangle,
              \qquad w_s, \omega_n \ge 0,\ M_s \succeq 0

    Symmetric and positive semi-definite by construction; nodes and weights are fixed when the kernel is made, so that
    one object is one function. It is not the exact equivalent of the network (that is `KernelMachine`), but what an
    SVM, kernel ridge regression or a Gaussian process can be trained with.

    Parameters
    ----------
    trajectory
        The recorded path, thinned or whole.
    outputs
        ``"trace"`` over the outputs (default), ``"mean"``, ``"sum"``, an index, ``"full"``, ``"loss"`` (samples are
        then pairs ``(X, y)``) or a callable of one sample's outputs.
    measure
        w_s: ``"learning_rate"`` (the time of gradient flow; parameter groups each at their own rate),
        ``"arc_length"`` (‖Δ_s‖) or ``"uniform"`` (1).
    quadrature
        Nodes on each step: ``"left"``, ``"trapezoid"`` (default), ``"midpoint"`` or ``GaussLegendre(n)``.
    preconditioner
        M_s: None for the identity, ``"optimizer"`` for the positive diagonal by which the optimizer scaled its
        gradients in that step (Adam's 1/(√v̂ + ε), for example).
    steps
        How many steps to use: the path is cut into that many stretches, each represented by its middle step with
        the weight of the whole stretch. None for every step.
    engine, memory, dtype
        As for `pathkernel.TangentKernel`.
    progress
        Show a progress bar over the nodes.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> from sklearn.svm import SVC
    >>> X, y = torch.randn(32, 4), torch.randint(2, (32,))
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.CrossEntropyLoss()
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for x, target in recorder.batches(batch_size=8):
    ...         optimizer.zero_grad()
    ...         loss(model(x), target).backward()
    ...         optimizer.step()
    >>> svc = SVC(kernel=pk.PathKernel(recorder.trajectory)).fit(X.numpy(), y.numpy())

    Notes
    -----
    The path depends on all training labels: cross-validating an estimator over a kernel made from them leaks.

    References
    ----------
    Domingos 2020 (2012.00152), Definition 3; Chen et al. 2023 for the kernel of losses.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        *,
        outputs: Any = "trace",
        measure: str = "learning_rate",
        quadrature: str | Quadrature = "trapezoid",
        preconditioner: str | None = None,
        steps: int | None = None,
        engine: str = "auto",
        memory: int | str = "1GB",
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> None:
        trajectory.require_steps("PathKernel")
        check(
            measure in MEASURES,
            InputError,
            f"`measure={measure!r}` was given",
            f"Measures are {', '.join(map(repr, MEASURES))}",
            'Write `measure="learning_rate"`',
        )
        check(
            preconditioner in (None, "optimizer"),
            InputError,
            f"`preconditioner={preconditioner!r}` was given",
            'Preconditioners are None and "optimizer"',
            'Write `preconditioner="optimizer"` for the scaling of the optimizer\'s own steps',
        )
        self.trajectory, self.measure, self.quadrature = trajectory, measure, as_quadrature(quadrature)
        self.preconditioner, self.progress = preconditioner, progress
        self.selection = select_outputs(outputs, trajectory.loss, trajectory.objective.reduction)
        self.function = trajectory.function(dtype)
        self.engine = make_engine(engine, self.function, self.selection, memory)
        self.nodes = _merge(self._nodes(_thin(trajectory, steps)))
        check(
            len(self.nodes) > 0,
            InputError,
            f"The path has no length by `measure={measure!r}`",
            "At least one step must have a positive weight",
            'Write `measure="uniform"`, or record steps with a learning rate above 0',
        )

    @property
    def total_weight(self) -> float:
        """Σ w_s: a constant tangent kernel times this is the path kernel."""
        return sum(node.weight for node in self.nodes)

    def __call__(self, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
        """Kernel matrix.

        Parameters
        ----------
        X, Y
            n queries and m references; Y None stands for X.

        Returns
        -------
        numpy.ndarray
            float64 (n, m), or (n, m, C, C) for ``outputs="full"``.
        """
        same = Y is None or Y is X
        x, context_x = self._samples(X)
        y, context_y = (None, None) if same else self._samples(Y)
        total = None
        for node in tqdm(self.nodes, desc="path kernel", unit="node", disable=not self.progress):
            tile = node.weight * self._engine_at(node).gram(node.theta, x, y, context_x, context_y, node.diagonal)
            total = tile if total is None else total.add_(tile)
        assert total is not None
        return total.numpy()

    def diagonal(self, X: PyTree) -> np.ndarray:
        """K(x, x) for every sample: (n,), or (n, C, C) for ``outputs="full"``."""
        x, context = self._samples(X)
        pieces = [
            node.weight * self._engine_at(node).diagonal(node.theta, x, context, node.diagonal) for node in self.nodes
        ]
        return torch.stack(pieces).sum(dim=0).numpy()

    def _engine_at(self, node: PathNode) -> Engine:
        """The engine, for the network with the running statistics that it had at a node."""
        if not node.segment.buffers:
            return self.engine
        engine = copy.copy(self.engine)
        engine.function = self.engine.function.replaced(constants=node.segment.buffers)
        return engine

    def _samples(self, X: PyTree) -> tuple[PyTree, PyTree]:
        if self.selection.with_targets:
            x, context = split_samples(X, self.selection, self.function.dtype)
            return self.trajectory.data.queries(x, "PathKernel"), context
        return split_samples(
            self.trajectory.data.queries(X, "PathKernel"), self.selection, self.function.dtype
        )

    def _nodes(self, stretches: list[list[Segment]]) -> list[PathNode]:
        """Quadrature nodes on the middle step of each stretch, with the weight of the whole stretch."""
        nodes = []
        for stretch in stretches:
            middle = stretch[(len(stretch) - 1) // 2]
            weight = sum(self._weight(segment) for segment in stretch)
            diagonal = self._diagonal(middle)
            nodes += [PathNode(middle, t, omega * weight, diagonal) for t, omega in self.quadrature.nodes]
        return [node for node in nodes if node.weight > 0]

    def _weight(self, segment: Segment) -> float:
        """w_s of a step."""
        assert segment.step is not None
        if self.measure == "arc_length":
            return segment.displacement.norm().item()
        return max(_rates(segment.step)) if self.measure == "learning_rate" else 1.0

    def _diagonal(self, segment: Segment) -> Tensor | None:
        """Diagonal of M_s; under several learning rates, each parameter's own relative to the largest."""
        step = segment.step
        assert step is not None
        diagonal = self._preconditioner(step) if self.preconditioner == "optimizer" else None
        rates = _rates(step)
        if self.measure == "learning_rate" and len(set(rates)) > 1:
            own = self._per_parameter(step, lambda name: float(step.hyperparameters_of(name)["lr"]) / max(rates))
            diagonal = own if diagonal is None else own * diagonal
        return diagonal

    def _per_parameter(self, step: Step, value: Any) -> Tensor:
        layout = self.trajectory.layout
        vector = torch.zeros(layout.size, dtype=torch.float64)
        for name, where in layout.slices.items():
            if name in step.groups:
                vector[where] = value(name)
        return vector

    def _preconditioner(self, step: Step) -> Tensor:
        rule, layout = self.trajectory.rule, self.trajectory.layout
        check(
            rule.elementwise,
            InputError,
            f'`preconditioner="optimizer"` was asked of {rule.name}',
            "The optimizer's scaling must be a positive diagonal",
            "Write `preconditioner=None`",
        )
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        like = torch.zeros((), dtype=torch.float64)

        def diagonal(name: str) -> Tensor:
            if name not in step.active:
                return like
            settings = step.hyperparameters_of(name)
            return rule.preconditioner(shapes[name], step.frozen[name], settings, like).abs().reshape(-1)

        return self._per_parameter(step, diagonal)

    def __repr__(self) -> str:
        return (
            f"PathKernel({self.trajectory!r}, outputs={self.selection.name!r}, measure={self.measure!r}, "
            f"quadrature={self.quadrature!r}, preconditioner={self.preconditioner!r}: {len(self.nodes)} nodes, "
            f"total weight {self.total_weight:.4g}, engine {self.engine.name!r})"
        )

    def __sklearn_clone__(self) -> PathKernel:
        # A deep copy would copy the whole trajectory; the kernel is immutable.
        return self


def _rates(step: Step) -> list[float]:
    """Learning rate of each parameter group."""
    return [float(settings["lr"]) for settings in step.hyperparameters]


def _thin(trajectory: Trajectory, steps: int | None) -> list[list[Segment]]:
    """Cut the path into that many stretches of neighbouring steps."""
    segments = [segment for segment in trajectory.segments() if segment.step is not None]
    check(
        steps is None or (isinstance(steps, int) and steps >= 1),
        InputError,
        f"`steps={steps!r}` was given",
        f"The number of steps to use is an integer from 1 to {len(segments)}, or None for every step",
        "Write for example `PathKernel(trajectory, steps=50)`",
    )
    stretches = len(segments) if steps is None else min(steps, len(segments))
    edges = np.linspace(0, len(segments), stretches + 1).round().astype(int)
    return [segments[first:last] for first, last in pairwise(edges)]


def _merge(nodes: list[PathNode]) -> list[PathNode]:
    """Join the end of a step with the start of the next where both are the same network under the same M."""
    merged: list[PathNode] = []
    for node in nodes:
        last = merged[-1] if merged else None
        if last is not None and _same_network(last, node):
            merged[-1] = PathNode(last.segment, last.time, last.weight + node.weight, None)
        else:
            merged.append(node)
    return merged


def _same_network(one: PathNode, other: PathNode) -> bool:
    plain = one.diagonal is None and other.diagonal is None
    return plain and one.theta is other.theta and one.segment.buffers is other.segment.buffers
