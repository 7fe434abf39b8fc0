"""An engine as its author outside of the package writes it takes full part in kernels, operators and features."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from cases import make_inputs, make_model, record
from tolerances import TOLERANCES
from torch import Tensor

import pathkernel as pk
from pathkernel import reference
from pathkernel.tangent_kernel.engines import Engine, JacobianProducts

ROUNDING = TOLERANCES[torch.float64].rounding
REDUCTIONS = {
    "trace": lambda blocks: np.einsum("nmkk->nm", blocks),
    "mean": lambda blocks: np.einsum("nmkk->nm", blocks) / blocks.shape[2],
    "full": lambda blocks: blocks,
    1: lambda blocks: blocks[:, :, 1, 1],
}


class LoopEngine(Engine):
    """Rows of plain autograd, one sample and output after the other: the two methods that every engine has."""

    name = "loop"

    def rows(self, theta: Tensor, X: Tensor, context: Tensor) -> Tensor:
        """∇h, (n, K, P)."""
        found = []
        for x, own in zip(X, context, strict=True):
            point = theta.detach().clone().requires_grad_(True)
            z = self.function.batch(self.function.layout.unflatten(point), x[None])[0]
            values = self.selection.function(z, own).reshape(-1)
            found.append(torch.stack([torch.autograd.grad(v, point, retain_graph=True)[0] for v in values]))
        return torch.stack(found).double()

    def combined(self, blocks: Tensor) -> Tensor:
        """(…, K, K) blocks as the kernel has them."""
        if self.selection.combine == "full":
            return blocks
        trace = blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
        return trace / blocks.shape[-1] if self.selection.combine == "mean" else trace

    def gram(self, theta, X, Y, context_X, context_Y, preconditioner):
        left = self.rows(theta, X, context_X)
        right = left if Y is None else self.rows(theta, Y, context_Y)
        weighted = left if preconditioner is None else left * preconditioner.double()
        found = torch.einsum("nkp,mjp->nmkj", weighted, right)
        return self.combined(found if Y is not None else (found + found.permute(1, 0, 3, 2)) / 2)

    def diagonal(self, theta, X, context, preconditioner):
        rows = self.rows(theta, X, context)
        weighted = rows if preconditioner is None else rows * preconditioner.double()
        return self.combined(weighted @ rows.mT)


class StoredJacobian(JacobianProducts):
    """J as a matrix."""

    made = 0

    def __init__(self, rows: Tensor, full: bool) -> None:
        self.rows, self.full, self.holds = rows, full, True
        type(self).made += 1

    def pull(self, weights, components):
        if self.full:
            return torch.einsum("nkd,nkp->dp", weights, self.rows).unsqueeze(0)
        return torch.einsum("nd,nkp->kdp", weights, self.rows[:, components])

    def push(self, directions, components):
        if self.full:
            return torch.einsum("dp,nkp->nkd", directions[0], self.rows)
        return torch.einsum("kdp,nkp->nd", directions, self.rows[:, components])


class MatrixEngine(LoopEngine):
    """The same with a Jacobian of its own."""

    name = "matrix"

    def jacobian(self, theta, samples, memory):
        return StoredJacobian(self.rows(theta, *samples), self.selection.combine == "full")


class Value:
    """A value that makes an engine."""

    def engine(self, function: Any, selection: Any, memory: int) -> Engine:
        return MatrixEngine(function, selection, memory)


GIVEN = {"class": LoopEngine, "with a Jacobian": MatrixEngine, "value": Value()}


def close(found: Any, expected: Any, tolerance: float = ROUNDING) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def flat(K: np.ndarray) -> np.ndarray:
    return K if K.ndim == 2 else K.transpose(0, 2, 1, 3).reshape(K.shape[0] * K.shape[2], -1)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("outputs", REDUCTIONS)
def test_a_tangent_kernel(outputs: Any, given: str) -> None:
    module, X, Y = make_model("tanh"), make_inputs(5), make_inputs(3, seed=4)
    values = {name: p.detach() for name, p in module.named_parameters()}
    reduce = REDUCTIONS[outputs]
    K = reduce(reference.tangent_kernel(module, values, X).numpy())
    R = reduce(reference.tangent_kernel(module, values, X, Y).numpy())
    kernel = pk.TangentKernel(module, outputs=outputs, engine=GIVEN[given])
    close(kernel(X), K)
    close(kernel(X, Y), R)
    close(kernel.diagonal(X), np.stack([K[i, i] for i in range(len(K))]))
    close(kernel.operator(X) @ np.eye(len(flat(K))), flat(K))
    close(kernel.operator(X, Y) @ np.eye(flat(R).shape[1]), flat(R))
    close(kernel.operator(X, Y).T @ np.eye(len(flat(R))), flat(R).T)
    v = np.arange(1.0, len(flat(K)) + 1)
    close(kernel.matvec(X, v.reshape(5, -1) if outputs == "full" else v).reshape(-1), flat(K) @ v)
    assert kernel.check(X) < ROUNDING
    assert f"engine {kernel.engine.name!r}" in kernel.explain(X)
    assert {row.engine for row in kernel.cost(X)} == {"layerwise", "jacobian", "products"}
    close(copy.deepcopy(kernel)(X), K)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("preconditioner", [None, "optimizer"])
def test_a_path_kernel(preconditioner: str | None, given: str) -> None:
    run = record(model="tanh", optimizer="adam")
    X, Y = make_inputs(5), make_inputs(3, seed=4)
    expected = pk.PathKernel(run.trajectory, preconditioner=preconditioner, engine="jacobian")
    kernel = pk.PathKernel(run.trajectory, preconditioner=preconditioner, engine=GIVEN[given])
    if preconditioner is None:
        points = [run.trajectory.parameters(s) for s in range(len(run.trajectory) + 1)]
        rates = [float(step.hyperparameters[0]["lr"]) for step in run.trajectory.steps()]
        weights = (np.r_[rates, 0] + np.r_[0, rates]) / 2
        close(kernel(X), reference.path_kernel(run.start, points, weights.tolist(), X))
    K, R = expected(X), expected(X, Y)
    close(kernel(X), K)
    close(kernel(X, Y), R)
    close(kernel.diagonal(X), np.diag(K))
    close(kernel.operator(X) @ np.eye(5), K)
    close(kernel.operator(X, Y) @ np.eye(3), R)
    close(kernel.features(X, 32), expected.features(X, 32))
    assert kernel.error.relative == 0


def test_the_jacobian_of_the_engine_is_used() -> None:
    before = StoredJacobian.made
    kernel = pk.TangentKernel(make_model("tanh"), engine=MatrixEngine)
    operator = kernel.operator(make_inputs(5))
    operator @ np.eye(5)
    operator @ np.eye(5)
    assert StoredJacobian.made == before + 1, "made once, as it says that it holds"


class RoundedEngine(LoopEngine):
    """An engine that says of itself that its matrices are not the kernel's to rounding."""

    name = "rounded"
    exact = False


def test_products_with_a_kernel_that_is_not_exact_are_refused_whoever_wrote_its_engine() -> None:
    run = record(model="tanh", optimizer="adam")
    with pytest.raises(pk.errors.InputError, match="`operator` was asked of a kernel of sketched gradients"):
        pk.PathKernel(run.trajectory, engine=RoundedEngine).operator(make_inputs(5))
