"""`PathKernel`: tangent kernels integrated along the path, symmetric and positive semi-definite."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.pytrees import copied_samples, count, memory_bytes
from pathkernel.gradients.sample_wise import check_sample_wise
from pathkernel.kernels.kernel import Kernel
from pathkernel.path_kernel.features import Features, features_of, samples_of_path
from pathkernel.path_kernel.label_leak import LabelLeak, check_leak
from pathkernel.path_kernel.matrix_identity import Made, stored_gram
from pathkernel.path_kernel.node_selection import check_tolerance, probe_samples, select_nodes
from pathkernel.path_kernel.nodes import PathMeasure, PathNode, nodes_along, path_nodes, stretches
from pathkernel.quadrature import Quadrature, as_quadrature
from pathkernel.runtime.pickling import check_picklable
from pathkernel.runtime.threads import one_at_a_time
from pathkernel.runtime.transfers import received
from pathkernel.tangent_kernel.engines.auto import EngineValue, make_engine
from pathkernel.tangent_kernel.engines.engine import Engine, Samples
from pathkernel.tangent_kernel.engines.products import error_of_engine
from pathkernel.tangent_kernel.engines.projection import Projection, ProjectionEngine, products
from pathkernel.tangent_kernel.lazy_operator import kernel_operator
from pathkernel.tangent_kernel.measured_error import MeasuredError
from pathkernel.tangent_kernel.output_probes import OutputProbes
from pathkernel.tangent_kernel.outputs import OneOutput, OutputSelection, select_outputs
from pathkernel.tangent_kernel.precision import asked_precision
from pathkernel.tangent_kernel.tangent_kernel import no_samples
from pathkernel.trajectory.required import required_path
from pathkernel.trajectory.schedule import PRECONDITIONED
from pathkernel.trajectory.trajectory import Trajectory

if TYPE_CHECKING:
    from pathkernel.tangent_kernel.operators import KernelOperator


class PathKernel(Kernel):
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
        ``"trace"`` over the outputs (default), ``"mean"``, ``"sum"``, an index, ``"full"``, ``"loss"`` or
        ``"margin"`` of labels (samples are then pairs ``(X, y)``), a callable of one sample's outputs, or
        `OutputProbes`: random combinations of the outputs, drawn afresh at every node, whose kernel is the trace in
        expectation.
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
        the weight of the whole stretch. None for every step. The number of nodes is that times the quadrature's on a
        step: under the trapezoid up to twice as many, since the ends of middle steps are shared by no neighbours.
    tolerance
        Relative Frobenius error against every step for which few nodes are chosen, with weights of their own, from the
        kernels of 48 training samples at every step; `error` is measured on 48 others. None for every step.
    engine, memory, dtype
        As for `pathkernel.TangentKernel`; at every node a `Projection` draws a map of its own.
    progress
        Show a progress bar over the nodes.
    leak
        The path depends on all training labels, so that cross-validation over its kernel leaks: ``"warn"`` (default)
        of an estimator that is fitted to a part of the training samples (`pathkernel.errors.LabelLeakWarning`);
        ``"allow"`` where that is meant.

    Attributes
    ----------
    nodes
        The points of the path that are used, as `pathkernel.path_kernel.nodes.PathNode`.
    error
        How far this is from the kernel of every step and all outputs, not projected, in the same arithmetic.

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
        tolerance: float | None = None,
        engine: str | EngineValue | type[Engine] = "auto",
        memory: int | str = "1GB",
        dtype: torch.dtype | str | None = None,
        progress: bool = False,
        leak: str = "warn",
    ) -> None:
        required_path(trajectory, "PathKernel" if preconditioner is None else PRECONDITIONED)
        floating, tensor_floats = asked_precision(dtype, trajectory.device)
        self._make(
            {
                "measure": PathMeasure(trajectory, measure, preconditioner),
                "outputs": outputs,
                "quadrature": as_quadrature(quadrature),
                "steps": steps,
                "tolerance": tolerance,
                "engine": engine,
                "memory": memory_bytes(memory),
                "dtype": floating,
                "tensor_floats": tensor_floats,
                "progress": progress,
                "leak_allowed": check_leak(leak),
            }
        )
        if isinstance(self.selection.function, OneOutput):
            self.selection.function.check(self._outputs)
        self._cut = stretches(len(trajectory), steps)
        # Where each of them takes training its step again, they are found while the kernel is first computed.
        if tolerance is not None or not (self.measure.needs_points and trajectory.store.replays):
            self.nodes = list(nodes_along(self.measure, self.quadrature, self._cut))
        if tolerance is not None:
            self.nodes, self.error = self._chosen(tolerance)

    def _make(self, made_of: dict[str, Any]) -> None:
        """Everything but the nodes from what a kernel is made of, which is with them all that is saved of it."""
        self._made_of, self.measure, self.quadrature = made_of, made_of["measure"], made_of["quadrature"]
        self.trajectory, self.progress, self.memory = self.measure.trajectory, made_of["progress"], made_of["memory"]
        self.steps, self.tolerance = made_of["steps"], made_of["tolerance"]
        self._feature_errors: dict[Projection, MeasuredError] = {}
        self._leak = LabelLeak(self.trajectory.data, made_of.get("leak_allowed", False))  # pickles of before lack it
        self.function = self.trajectory.function(made_of["dtype"])
        outputs, engine, objective = made_of["outputs"], made_of["engine"], self.trajectory.objective
        self.probes = outputs if isinstance(outputs, OutputProbes) else None
        exact = select_outputs(outputs if self.probes is None else "trace", objective.known, objective.reduction)
        self.selection = exact if self.probes is None else self.probes.selection(0, self._outputs)
        tensor_floats = made_of.get("tensor_floats", False)
        self.engine = make_engine(engine, self.function, self.selection, self.memory, tensor_floats)
        itself = self.probes is None and self.engine.exact
        self._exact = self.engine if itself else make_engine("auto", self.function, exact, self.memory)

    def __getstate__(self) -> dict[str, Any]:
        made_of = self._made_of
        check_picklable(outputs=made_of["outputs"], quadrature=made_of["quadrature"], engine=made_of["engine"])
        known = {name: vars(self)[name] for name in ("error", "_outputs") if name in vars(self)}
        return {**made_of, "nodes": self.nodes, "known": known, "chosen": dict(self.engine.choices)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        made_of = dict(state)
        self.nodes, known, chosen = (made_of.pop(name) for name in ("nodes", "known", "chosen"))
        vars(self).update(known)
        self._make(made_of)
        self.engine.choices.update(chosen)

    def _chosen(self, tolerance: float) -> tuple[list[PathNode], MeasuredError]:
        """Fewer nodes, and the error that this makes."""
        over_few = "`steps`" if self.steps else None if self.probes is None else "`OutputProbes`"
        check_tolerance(tolerance, over_few, len(self.trajectory.data))
        chosen_by, held_out = self._probe_ids
        samples = self._training_samples(torch.cat([chosen_by, held_out]))
        with tqdm(self.nodes, desc="choosing nodes", unit="node", disable=not self.progress) as bar:

            def gram(node: PathNode) -> Tensor:
                bar.update()
                return self._exact_gram(node, *samples)

            entries = (count(samples[0]) * (self._outputs if self.selection.combine == "full" else 1)) ** 2
            return select_nodes(self.nodes, gram, len(chosen_by), tolerance, entries)

    @cached_property
    def nodes(self) -> list[PathNode]:
        """The points of the path that are used, with their weights."""
        return list(nodes_along(self.measure, self.quadrature, self._cut))

    def _nodes_in_turn(self) -> Iterator[PathNode]:
        """The nodes, each as soon as it is known; all are known afterwards."""
        if "nodes" in vars(self):
            yield from self.nodes
            return
        found = []
        for node in nodes_along(self.measure, self.quadrature, self._cut):
            found.append(node)
            yield node
        self.nodes = found

    @property
    def total_weight(self) -> float:
        """Σ w_s: a constant tangent kernel times this is the path kernel."""
        return sum(node.weight for node in self.nodes)

    @cached_property
    def error(self) -> MeasuredError:
        """Distance of this kernel from that of every step and all outputs, not projected, in the same arithmetic.

        Measured on up to 48 training samples when it is first asked for (by a kernel with a tolerance when its nodes
        are chosen); takes a small kernel at every step.
        """
        samples = self._training_samples(self._probe_ids[1])
        every = path_nodes(self.measure, self.quadrature)
        against = f"all {len(every)} nodes of the path"
        if self.engine is self._exact and every == self.nodes:
            return MeasuredError(0.0, 0.0, count(samples[0]), against)
        exact = sum(node.weight * self._exact_gram(node, *samples) for node in self._progress(every))
        found = self._gram(samples, None).cpu().numpy()
        return MeasuredError.between(found, torch.as_tensor(exact).cpu().numpy(), against)

    @property
    def lock(self) -> Any:
        """Held by one thread at a time."""
        return self.trajectory.lock

    @one_at_a_time
    def __call__(
        self, X: PyTree, Y: PyTree | None = None, *, store: str | os.PathLike[str] | None = None
    ) -> np.ndarray:
        """Kernel matrix.

        Parameters
        ----------
        X, Y
            n queries and m references; Y None stands for X.
        store
            A folder in which the matrix is kept while it grows: the same call goes on from there after an interruption,
            and another question is refused, by what ``outputs`` does.

        Returns
        -------
        numpy.ndarray
            float64 (n, m), or (n, m, C, C) for ``outputs="full"``.
        """
        rows, columns = self._samples(X), None if Y is None or Y is X else self._samples(Y)
        if not count(rows[0]) or (columns is not None and not count(columns[0])):
            return np.zeros(self._shape(rows, columns))
        if columns is None:
            self._leak.check(rows[0])
        if store is not None:
            return self._stored_gram(store, rows, columns)
        return received(self._gram(rows, columns), self.engine.workspace)

    def _gram(self, rows: Samples, columns: Samples | None) -> Tensor:
        (x, context_x), (y, context_y) = rows, columns or (None, None)
        total: Tensor | None = None
        for node in self._progress(self._nodes_in_turn()):
            tile = self._engine_at(node).gram(node.theta, x, y, context_x, context_y, node.preconditioner)
            tile.mul_(node.weight)
            total = tile if total is None else total.add_(tile)
        assert total is not None
        return total

    def _shape(self, rows: Samples, columns: Samples | None) -> tuple[int, ...]:
        sides = (self._outputs,) * 2 if self.selection.combine == "full" else ()
        return (count(rows[0]), count((columns or rows)[0]), *sides)

    def _stored_gram(self, store: str | os.PathLike[str], rows: Samples, columns: Samples | None) -> np.ndarray:
        how = self._made_of["engine"], self._engine_at, self.function.dtype, self.engine.tensor_floats
        made = Made(self.measure, self.nodes, self.selection, self.probes, *how)
        return stored_gram(store, made, self.engine.function, rows, columns, self._shape(rows, columns), self.progress)

    @one_at_a_time
    def diagonal(self, X: PyTree) -> np.ndarray:
        """K(x, x) for every sample: (n,), or (n, C, C) for ``outputs="full"``."""
        x, context = self._samples(X)
        if not count(x):
            return np.zeros((0, *(self._outputs, self._outputs) * (self.selection.combine == "full")))

        def at(node: PathNode) -> Tensor:
            return node.weight * self._engine_at(node).diagonal(node.theta, x, context, node.preconditioner)

        return torch.stack([at(node) for node in self.nodes]).sum(dim=0).cpu().numpy()

    def operator(self, X: PyTree, Y: PyTree | None = None) -> KernelOperator:
        """K(X, Y) as a linear operator that is never formed, for `scipy.sparse.linalg`.

        Parameters
        ----------
        X, Y
            n and m samples; Y None stands for X.

        Returns
        -------
        KernelOperator
            float64 (n, m), or (n C, m C) for ``outputs="full"``; symmetric for Y None.
        """
        if not self.engine.exact:
            raise InputError(
                "`operator` was asked of a kernel of sketched gradients",
                "Products with K = φφᵀ need no more than φ",
                "Write `phi = PathKernel(trajectory).features(X, dim)` and `phi @ (phi.T @ v)`",
            )
        rows, columns = copied_samples((self._some_samples(X), None if Y is None or Y is X else self._some_samples(Y)))
        return kernel_operator(self.nodes, self._engine_at, rows, columns, self.lock)

    @one_at_a_time
    def features(self, X: PyTree, dim: int = 1024, *, kind: str = "tensor", seed: int = 0) -> Features:
        """Features φ with φφᵀ ≈ K, for N beyond what a Gram matrix holds.

        The same sample has the same features in every call.

        Parameters
        ----------
        X
            n samples.
        dim
            Length of φ(x); the relative error falls like 1/√dim.
        kind, seed
            The random map, as of `pathkernel.tangent_kernel.engines.projection.Projection`.

        Returns
        -------
        Features
            float64 (n, dim), or (n, C, dim) for ``outputs="full"``: a numpy array whose ``error`` says how far φφᵀ is
            from this kernel on up to 48 training samples.

        Notes
        -----
        Time O(nodes · n · dim), memory O(n · dim).
        """
        samples, projection = self._some_samples(X), Projection(dim, kind, seed)
        engine = ProjectionEngine(self.function, self.selection, self.memory, projection)

        def of(samples: Samples) -> Tensor:
            nodes = self._progress(self.nodes)
            return features_of(((engine.at(node, self._selection_at(node)), node) for node in nodes), *samples)

        if projection not in self._feature_errors:
            probe = of(self._training_samples(self._probe_ids[1]))
            found, own = (matrix.cpu().numpy() for matrix in (products(probe, probe), self._probe_kernel))
            self._feature_errors[projection] = MeasuredError.between(found, own, "the kernel's own matrix")
        return Features.of(of(samples).cpu().numpy(), self._feature_errors[projection])

    @one_at_a_time
    def check_label_leak(self, X: PyTree) -> None:
        """Warn where an estimator is being fitted to X, a part of the training samples; see ``leak``."""
        self._leak.check(self._samples(X)[0])

    @one_at_a_time
    def check(self, X: PyTree) -> float:
        """Distance of the tangent kernels of some samples from autograd's: the worst of first, middle and last node.

        Parameters
        ----------
        X
            n samples.

        Returns
        -------
        float
            As of `pathkernel.TangentKernel.check`.
        """
        samples, last = self._samples(X), len(self.nodes) - 1
        nodes = [self.nodes[place] for place in sorted({0, last // 2, last})]
        return max(error_of_engine(self._engine_at(n), n.theta, *samples, n.preconditioner) for n in nodes)

    # -- engines and samples ---------------------------------------------------------------------------------

    def _engine_at(self, node: Any) -> Engine:
        """The engine at a node: with its running statistics, random outputs and random map."""
        return self.engine.at(node, self._selection_at(node))

    def _selection_at(self, node: PathNode) -> OutputSelection | None:
        # Half the number: consecutive nodes take consecutive rows of the Hadamard matrix.
        return None if self.probes is None else self.probes.selection(node.number // 2, self._outputs)

    def _exact_gram(self, node: PathNode, x: PyTree, context: PyTree) -> Tensor:
        """The tangent kernel of all outputs at a node, symmetric."""
        return self._exact.at(node).gram(node.theta, x, None, context, None, node.preconditioner)

    @cached_property
    def _outputs(self) -> int:
        """C."""
        return self.function.outputs(self.trajectory.initial, self.trajectory.data.example[0]).shape[1]

    @cached_property
    def _probe_ids(self) -> tuple[Tensor, Tensor]:
        """Training samples to choose nodes by, and to measure errors on."""
        return probe_samples(len(self.trajectory.data), self._outputs if self.selection.combine == "full" else 1)

    @cached_property
    def _probe_kernel(self) -> Tensor:
        """K of the samples that errors are measured on."""
        return self._gram(self._training_samples(self._probe_ids[1]), None)

    def _training_samples(self, ids: Tensor) -> Samples:
        inputs, targets = self.trajectory.data[ids]
        return self._samples((inputs, targets) if self.selection.with_targets else inputs)

    def _samples(self, X: PyTree) -> Samples:
        samples = samples_of_path(self.trajectory, X, self.selection, self.function.dtype, "PathKernel")
        check_sample_wise(self.function, self.trajectory.initial, samples[0])
        return samples

    def _some_samples(self, X: PyTree) -> Samples:
        samples = self._samples(X)
        if not count(samples[0]):
            raise no_samples("PathKernel")
        return samples

    def _progress(self, nodes: Iterable[PathNode]) -> Iterable[PathNode]:
        return tqdm(nodes, desc="path kernel", unit="node", disable=not self.progress)

    @one_at_a_time
    def describe(self) -> str:
        """Description of the kernel, and of the parameters that no layer accounts for once gradients were taken."""
        return "\n".join([repr(self), *self.engine.describe()])

    def __repr__(self) -> str:
        return (
            f"PathKernel({self.trajectory!r}, outputs={self.selection.name!r}, measure={self.measure.name!r}, "
            f"quadrature={self.quadrature!r}, preconditioner={self.measure.preconditioner!r}: {len(self.nodes)} nodes, "
            f"total weight {self.total_weight:.4g}, engine {self.engine.name!r}"
            f"{'' if self.tolerance is None else f', error {self.error}'})"
        )
