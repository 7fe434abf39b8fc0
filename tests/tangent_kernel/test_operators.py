"""Kernels as linear operators, against the matrices that they stand for."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cases import MODELS, SAMPLES, generator, make_inputs, make_model, record
from scipy.sparse.linalg import LinearOperator, cg, eigsh, lobpcg
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.tangent_kernel.engines.projection import Projection
from pathkernel.tangent_kernel.kernel_products import Point
from pathkernel.tangent_kernel.operators import KernelOperator

DOUBLE, SINGLE = TOLERANCES[torch.float64], TOLERANCES[torch.float32]
OUTPUTS = {"trace": "trace", "mean": "mean", "sum": "sum", "full": "full", "1": 1, "callable": torch.square}


def close(found: Any, expected: Any, tolerance: float = DOUBLE.rounding) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def flat(K: np.ndarray) -> np.ndarray:
    """(n, m) as it is; (n, m, C, C) as (n C, m C)."""
    if K.ndim == 2:
        return K
    n, m, c, _ = K.shape
    return K.transpose(0, 2, 1, 3).reshape(n * c, m * c)


class Odd(nn.Module):
    """A table, a weight used twice, tokens, and a parameter that no layer accounts for."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(7, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor([0.7, 1.3]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = self.inner(torch.tanh(self.inner(x)))
        return self.head(x).mean(dim=1) * torch.cumsum(self.scale, 0) + torch.linalg.vector_norm(self.scale)


def odd() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Odd().double()
    tokens = torch.randint(7, (9, 4), generator=generator(3))
    return module, tokens[:5], tokens[5:]


def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    if name == "odd":
        return odd()
    sample = MODELS[name].sample
    return make_model(name), make_inputs(5, sample), make_inputs(4, sample, seed=2)


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("name", ["relu", "conv_group_norm", "layer_norm", "odd"])
def test_the_operator_is_the_matrix(name: str, outputs: str, engine: str) -> None:
    module, X, Y = network(name)
    kernel = pk.TangentKernel(module, outputs=OUTPUTS[outputs], engine=engine)
    K, R = flat(kernel(X)), flat(kernel(X, Y))
    operator, rectangular = kernel.operator(X), kernel.operator(X, Y)
    assert operator.shape == K.shape and rectangular.shape == R.shape
    assert operator.dtype == rectangular.dtype == np.float64
    for _ in range(2):  # what is held between products changes nothing
        close(operator @ np.eye(len(K)), K)
        close(rectangular @ np.eye(R.shape[1]), R)
    close(operator.T @ np.eye(len(K)), K)
    close(rectangular.T @ np.eye(len(R)), R.T)
    v = np.arange(1.0, len(K) + 1)
    close(operator.matvec(v), K @ v)
    close(operator.rmatvec(v), operator.matvec(v))
    product = kernel.matvec(X, v.reshape(len(X), -1) if outputs == "full" else v)
    close(product.reshape(-1), K @ v)


@pytest.mark.parametrize("memory", [1, 3000, 30_000])
@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_any_budget_gives_the_same_product(outputs: str, memory: int) -> None:
    for name in ("relu", "odd"):
        module, X, _ = network(name)
        K = flat(pk.TangentKernel(module, outputs=outputs)(X))
        close(pk.TangentKernel(module, outputs=outputs, memory=memory).operator(X) @ np.eye(len(K)), K)


@pytest.mark.parametrize("name", ["tanh", "conv_group_norm", "odd"])
def test_both_maps_of_a_factor_against_its_rows(name: str) -> None:
    """Σ v G and ⟨G, U⟩ of every kind of factor, head, table and transposed ones among them."""
    module, X, _ = network(name)
    kernel = pk.TangentKernel(module)
    pieces, tape = kernel.engine.pieces(kernel.theta, X, torch.zeros(len(X), 0))
    k = tape.outputs.shape[1]
    for piece in pieces:
        rows = piece.factor.rows()
        weights = torch.randn(len(X), k, 2, dtype=torch.float64, generator=generator(0))
        close(piece.factor.weighted_sum(weights), torch.einsum("nkd,nkp->dp", weights, rows))
        directions = torch.randn(2, rows.shape[2], dtype=torch.float64, generator=generator(1))
        close(piece.factor.products_in_turn(directions), torch.einsum("dp,nkp->nkd", directions, rows))


@pytest.mark.parametrize("outputs", ["trace", "mean", "full", "1"])
@pytest.mark.parametrize("memory", ["1GB", "1kB"])
def test_the_operator_of_a_projection_is_that_of_its_sketch(outputs: str, memory: str) -> None:
    for name in ("relu", "odd"):
        module, X, Y = network(name)
        kernel = pk.TangentKernel(module, outputs=OUTPUTS[outputs], engine=Projection(64), memory=memory)
        K, R = flat(kernel(X)), flat(kernel(X, Y))
        close(kernel.operator(X) @ np.eye(len(K)), K)
        close(kernel.operator(X, Y) @ np.eye(R.shape[1]), R)
        close(kernel.operator(X, Y).T @ np.eye(len(R)), R.T)


def test_activations_are_passed_once_where_they_fit() -> None:
    module, X = make_model("relu"), make_inputs(6)
    for memory, passes in (("1GB", 1), (500, 2)):
        kernel = pk.TangentKernel(module, memory=memory)
        products = kernel.engine.jacobian(kernel.theta, (X, torch.zeros(6, 0)), kernel.engine.memory)
        seen = []
        pieces = products.pieces
        products.pieces = lambda x, *other, pieces=pieces, seen=seen: (seen.append(len(x)), pieces(x, *other))[1]
        for _ in range(2):
            products.pull(torch.ones(6, 1), slice(0, 3))
        assert sum(seen) == 6 * passes


def test_float32_products_are_as_good_as_float32() -> None:
    module, X = make_model(dtype=torch.float32), make_inputs(6, dtype=torch.float32)
    kernel = pk.TangentKernel(module)
    close(kernel.operator(X) @ np.eye(6), kernel(X), SINGLE.rounding)


def test_an_operator_that_holds_a_module_is_pickled() -> None:
    """As scipy's do in versions that know several kinds of arrays."""
    operator = pk.TangentKernel(make_model("tanh", 2, torch.float64)).operator(
        make_inputs(SAMPLES, MODELS["tanh"].sample)
    )
    operator._arrays = np
    again = pickle.loads(pickle.dumps(operator))
    assert again.shape == operator.shape and again.dtype == operator.dtype
    v = np.arange(operator.shape[1], dtype=float)
    assert np.array_equal(again @ v, operator @ v)


def test_the_spectrum_without_the_matrix() -> None:
    """Lanczos and block iterations: the eigenvalues of the Gram that was never formed."""
    module, X = make_model("relu"), make_inputs(60)
    kernel = pk.TangentKernel(module)
    expected = np.linalg.eigvalsh(kernel(X))[::-1]
    found, vectors = eigsh(kernel.operator(X), k=5)
    close(np.sort(found)[::-1], expected[:5], 1e-10)
    close(kernel(X) @ vectors, vectors * found, 1e-10)
    start = np.random.default_rng(0).standard_normal((60, 3))
    close(lobpcg(kernel.operator(X), start, tol=1e-8, maxiter=200)[0], expected[:3], 1e-8)


def test_ridge_regression_beyond_the_budget_of_the_matrix() -> None:
    """2000 samples: the matrix takes 32 MB, the kernel has 2."""
    module, X = make_model("relu"), make_inputs(2000)
    y = np.sin(X.sum(dim=1).numpy())
    kernel, ridge = pk.TangentKernel(module, outputs=0, memory="2MB"), 10.0
    operator = kernel.operator(X)
    assert operator.shape[0] ** 2 * 8 > 10 * kernel.engine.memory
    shifted = KernelShift(operator, ridge)
    alpha, info = cg(shifted, y, rtol=1e-10, maxiter=200)
    assert info == 0
    G = np.asarray(_rows(module, X))  # (n, P): the same system by the push-through identity, in P unknowns
    primal = np.linalg.solve(G.T @ G + ridge * np.eye(G.shape[1]), G.T @ y)
    close(alpha, (y - G @ primal) / ridge, 1e-7)
    test = make_inputs(7, seed=5)
    close(kernel.operator(test, X) @ alpha, np.asarray(_rows(module, test)) @ primal, 1e-7)


class KernelShift(LinearOperator):
    """K + λ."""

    def __init__(self, operator: KernelOperator, ridge: float) -> None:
        self.operator, self.ridge = operator, ridge
        super().__init__(np.float64, operator.shape)

    def _matvec(self, v: np.ndarray) -> np.ndarray:
        return self.operator.matvec(v.reshape(-1)) + self.ridge * v.reshape(-1)


def _rows(module: nn.Module, X: Tensor) -> Tensor:
    """∇f₀ of each sample by autograd, one after the other."""
    rows = [torch.autograd.grad(module(x[None])[0, 0], list(module.parameters())) for x in X]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


# -- sums along a path ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", [None, "optimizer"])
@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_path_kernels(preconditioner: str | None, outputs: str) -> None:
    recording = record(model="tanh", optimizer="adam", loss="ce_mean")
    kernel = pk.PathKernel(recording.trajectory, preconditioner=preconditioner, outputs=outputs)
    X, Y = make_inputs(SAMPLES), make_inputs(3, seed=4)
    K, R = flat(kernel(X)), flat(kernel(X, Y))
    close(kernel.operator(X) @ np.eye(len(K)), K)
    close(kernel.operator(X, Y) @ np.eye(R.shape[1]), R)
    close(kernel.operator(X, Y).T @ np.eye(len(R)), R.T)


def test_weights_and_diagonals_of_a_sum() -> None:
    module, X, _ = network("odd")
    kernel = pk.TangentKernel(module)
    rows = pk.TangentKernel(module, outputs="full").function
    d = torch.rand(rows.layout.size, dtype=torch.float64, generator=generator(7))
    terms = [Point(kernel.theta, 0.5), Point(kernel.theta + 0.1, 2.0, d)]
    context = torch.zeros(len(X), 0)
    expected = sum(
        term.weight * kernel.engine.gram(term.theta, X, None, context, None, term.preconditioner) for term in terms
    )
    close(KernelOperator(terms, lambda _: kernel.engine, (X, context)) @ np.eye(len(X)), expected)


class Stopped(nn.Module):
    """Takes a part of the mean away, which is a constant to reverse sweeps."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = x.mean(dim=1, keepdim=True)
        return x - 0.7 * mean


@pytest.mark.parametrize("engine", ["layerwise", "jacobian", "products"])
def test_networks_that_stop_gradients_have_one_kernel(engine: str) -> None:
    """Torch's forward differentiation goes on inside `torch.no_grad()`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 6), Stopped(), nn.Tanh(), nn.Linear(6, 3)).double()
    X, v = make_inputs(5), np.arange(5.0)
    rows = [torch.autograd.grad(network(x[None])[0, c], list(network.parameters())) for x in X for c in range(3)]
    J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).view(5, 3, -1).flatten(1).numpy()
    kernel = pk.TangentKernel(network, engine=engine)
    close(kernel(X), J @ J.T)
    close(kernel.operator(X) @ v, J @ J.T @ v)
