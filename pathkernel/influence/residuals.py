"""Residuals of training samples along a path, and which functions of the queries' outputs they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, check_instance
from pathkernel.gradients.forward_derivatives import REFUSALS
from pathkernel.gradients.losses import output_cotangents
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import slopes_of, values_of
from pathkernel.gradients.pytrees import count
from pathkernel.kernel_machine.classification import is_classifier
from pathkernel.path_kernel.features import samples_of_path
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.tangent_kernel.outputs import OneOutput, OutputSelection, select_outputs
from pathkernel.tangent_kernel.tangent_kernel import TangentKernel, no_samples
from pathkernel.trajectory.trajectory import Trajectory

Kernel = PathKernel | TangentKernel
"""A kernel along a path, or at one θ."""


@dataclass(frozen=True)
class Explained:
    """Samples as a kernel takes them, with what ridge regression on it needs of each.

    Attributes
    ----------
    samples, queries
        Training samples and queries, as the kernel takes them.
    residuals
        r, averaged over the points of the kernel: (N,) for margins, weighted as the loss weights their labels; (N, C)
        for outputs.
    of_query
        r of each training sample in the function that a query is asked about, (1, N) or (Q, N).
    output
        That function at the end of the path, (Q,).
    curvatures
        h, slope of minus the residual in the margin, averaged as the residuals are, (N,); None for other outputs.
    moved
        By how much the margins of the training samples changed from the beginning of the path to its end, (N,); None
        for other outputs and kernels without a path.
    """

    samples: Any
    queries: Any
    residuals: np.ndarray
    of_query: np.ndarray
    output: np.ndarray
    curvatures: np.ndarray | None = None
    moved: np.ndarray | None = None


def explained(kernel: Kernel, X: PyTree, y: PyTree, X_query: PyTree, outputs: Any) -> Explained:
    """Residuals of training samples, and what is asked about the queries; see `pathkernel.datamodel`.

    Raises
    ------
    InputError
        For kernels of other functions than outputs and margins.
    """
    check_instance(
        "kernel",
        kernel,
        (PathKernel, TangentKernel),
        "Residuals are known along a path, and at one θ: those of sums of kernels and of matrices are not",
        'Write `PathKernel(trajectory, outputs="margin", measure="uniform", steps=20)`',
    )
    of_margins = kernel.selection.name == "margin"
    if of_margins:
        if outputs is not None:
            raise InputError(
                f"`outputs={outputs!r}` was given with a kernel of margins",
                "The function of a query's outputs is the margin of its label then",
                "Leave `outputs` out, or pass a kernel of outputs",
            )
        return _margins(kernel, X, y, X_query)
    if not isinstance(kernel, PathKernel) or not (kernel.probes is not None or _of_outputs(kernel.selection)):
        raise InputError(
            f"`datamodel` was given a {type(kernel).__name__} of {kernel.selection.name!r}",
            'Residuals are known in margins, and along a path in outputs: "trace", "mean", an index, or `OutputProbes`',
            'Write `PathKernel(trajectory, outputs="margin", measure="uniform", steps=20)`',
        )
    return _outputs(kernel, X, y, X_query, outputs)


def _of_outputs(selection: OutputSelection) -> bool:
    """True for one output, and for what adds all of them up."""
    every = selection.identity and selection.combine in ("sum", "mean")
    return every or isinstance(selection.function, OneOutput)


def _margins(kernel: Kernel, X: PyTree, y: PyTree, X_query: PyTree) -> Explained:
    """r = w (1 − p) of the label, h = w p (1 − p), with w the weight that the loss gives to the sample's label."""
    (inputs, labels), queries = (_with_targets(kernel, kernel.selection, own) for own in ((X, y), X_query))
    margin = kernel.selection.function
    of_labels = _weights_of_labels(kernel, inputs, labels) if isinstance(kernel, PathKernel) else 1.0
    r, h = torch.zeros(()), torch.zeros(())
    for function, theta, weight in _points(kernel):
        wrong = torch.sigmoid(-_values(function, theta, inputs, labels, margin))
        r, h = r + weight * of_labels * wrong, h + weight * of_labels * wrong * (1 - wrong)
    output = _values(*_end(kernel), *queries, margin).numpy()
    moved = None
    if isinstance(kernel, PathKernel):
        before, after = (_values(*at(kernel), inputs, labels, margin) for at in (_beginning, _end))
        moved = (after - before).numpy()
    return Explained((X, y), X_query, r.numpy(), r.numpy()[None], output, h.numpy(), moved)


WEIGHTED = 1e-3
"""How far from 1 a weight lies, relative, that is not taken for rounding; and how far the slopes of a loss may be from
those of the margin."""


def _weights_of_labels(kernel: PathKernel, inputs: PyTree, labels: PyTree) -> Tensor | float:
    """w with −∂ℓ/∂z = w (1 − p) ∂m/∂z, of mean 1, (n,): class weights; 1 where the loss has none, or is another.

    At the beginning of the path, where p is not yet near 1, and of all samples as one batch: a weighted mean divides by
    the weights of its batch.
    """
    objective, margin = kernel.trajectory.objective, kernel.selection.function
    if objective.known is None:
        return 1.0
    function, theta = _beginning(kernel)
    z, targets = function.outputs(theta, inputs), function.cast(labels)
    along = slopes_of(margin, z, targets)[:, 0].double()
    try:
        slopes = -output_cotangents(function, theta, objective, inputs, labels).double()
    except REFUSALS:  # the labels are those of the margin, which the loss may take in another form
        return 1.0
    size = (slopes * along).sum(1) / along.square().sum(1)
    weights = size / torch.sigmoid(-values_of(margin, z, targets).reshape(-1).double())
    apart = (slopes - size[:, None] * along).abs().max()
    if not bool((weights >= 0).all()) or not apart <= WEIGHTED * slopes.abs().max() or not weights.mean() > 0:
        return 1.0
    weights = (weights / weights.mean()).cpu()
    return weights if bool(((weights - 1).abs() > WEIGHTED).any()) else 1.0


def _outputs(kernel: PathKernel, X: PyTree, y: PyTree, X_query: PyTree, outputs: Any) -> Explained:
    """r = −∂ℓ/∂z of each output."""
    objective = kernel.trajectory.objective
    loss = objective.function("A datamodel of outputs")
    selection = select_outputs("loss", loss, objective.reduction)
    inputs, targets = _with_targets(kernel, selection, (X, y))
    R = torch.zeros(())
    for function, theta, weight in _points(kernel):
        slopes = slopes_of(selection.function, function.outputs(theta, inputs), function.cast(targets))
        R = R - weight * slopes[:, 0].double().cpu()
    function, theta = _end(kernel)
    queries = kernel.trajectory.queries(X_query, "datamodel")
    if not count(queries):
        raise no_samples("datamodel")
    z = function.outputs(theta, queries).double().cpu()
    chosen = _chosen(kernel, z, outputs)
    residuals = R.numpy()
    return Explained(X, X_query, residuals, residuals[:, chosen.numpy()].T, z[torch.arange(len(z)), chosen].numpy())


def _chosen(kernel: PathKernel, z: Tensor, outputs: Any) -> Tensor:
    """Index of the output that each query is asked about, (Q,)."""
    q, c = z.shape
    one = kernel.selection.function
    if isinstance(one, OneOutput) and outputs is None:
        outputs = one.index
    if outputs is None and c == 1:
        outputs = 0
    if outputs is None and is_classifier(kernel.trajectory):
        return z.argmax(dim=1)
    try:
        chosen = torch.as_tensor(outputs)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.zeros(())
    whole = not chosen.is_floating_point() and chosen.dtype != torch.bool and chosen.shape in ((), (q,))
    fits = whole and bool(((chosen >= -c) & (chosen < c)).all())
    if fits and isinstance(one, OneOutput):
        fits = bool((chosen.remainder(c) == one.index % c).all())
    if not fits:
        raise InputError(
            f"`outputs={outputs!r}` was given for {q} queries of a network with {c} outputs, and a kernel of "
            f"{kernel.selection.name!r}",
            "It is the output that the scores are for: one index, or one for each query, among those of the kernel",
            "Write for example `outputs=0`",
        )
    return chosen.expand(q).remainder(c)


def _with_targets(kernel: Kernel, selection: OutputSelection, samples: Any) -> tuple[PyTree, PyTree]:
    """Inputs and targets as tensors, checked as the kernel does."""
    if isinstance(kernel, TangentKernel):
        return kernel._some_samples(samples)
    found = samples_of_path(kernel.trajectory, samples, selection, kernel.function.dtype, "datamodel")
    if not count(found[0]):
        raise no_samples("datamodel")
    return found


def _points(kernel: Kernel) -> Iterator[tuple[ModelFunction, Tensor, float]]:
    """The network and θ at every point of a kernel, with their part of its weight."""
    if isinstance(kernel, TangentKernel):
        yield kernel.function, kernel.theta, 1.0
        return
    total = kernel.total_weight
    for node in kernel.nodes:
        yield _under(kernel.function, node.buffers), node.theta, node.weight / total


def _beginning(kernel: PathKernel) -> tuple[ModelFunction, Tensor]:
    """The network and θ at the beginning of the path, whose first step need not be the kernel's first point."""
    trajectory: Trajectory = kernel.trajectory
    return _under(kernel.function, trajectory.store.read(0).buffers), trajectory.initial


def _end(kernel: Kernel) -> tuple[ModelFunction, Tensor]:
    """The network and θ at the end of the path."""
    if isinstance(kernel, TangentKernel):
        return kernel.function, kernel.theta
    trajectory: Trajectory = kernel.trajectory
    return _under(kernel.function, trajectory.final_buffers), trajectory.final


def _under(function: ModelFunction, buffers: Mapping[str, Tensor]) -> ModelFunction:
    return function.with_(constants=buffers) if buffers else function


def _values(function: ModelFunction, theta: Tensor, inputs: PyTree, targets: PyTree, functional: Any) -> Tensor:
    """(n,) float64 of a function of outputs and targets at θ."""
    return values_of(functional, function.outputs(theta, inputs), function.cast(targets)).reshape(-1).double().cpu()
