"""Sketched gradients: unbiased for the oracle's kernel, the error falling like 1/√dim, the same whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import MODELS, generator, make_inputs, make_model
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import reference
from pathkernel.gradients.layers.factors import Lookup, Outer
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout, constants_of
from pathkernel.tangent_kernel.engines.projection import COLUMNS, KINDS, Projection, ProjectionEngine
from pathkernel.tangent_kernel.outputs import select_outputs


def relative(found, expected) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Shared(nn.Module):
    """One embedding used twice and again as the head, a scale without a layer: lookups, sums over uses, plain rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.scale = nn.Embedding(7, 4), nn.Parameter(torch.ones(3, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh((self.embedding(tokens) * self.scale).sum(1) + self.embedding(tokens[:, 0]))
        return x @ self.embedding.weight[:3].T


def engine(
    model: nn.Module, projection: Projection, outputs="trace", memory: int = 10**9
) -> tuple[ProjectionEngine, Tensor]:
    parameters = dict(model.named_parameters())
    layout = ParameterLayout.of(parameters)
    function = ModelFunction(model, layout, constants_of(model, layout), torch.float64)
    return projection.engine(function, select_outputs(outputs), memory), layout.flatten(parameters).detach()


def gram(model: nn.Module, X: Tensor, projection: Projection, diagonal: Tensor | None = None, **options) -> Tensor:
    own, theta = engine(model, projection, **options)
    return own.gram(theta, X, None, torch.zeros(len(X), 0), None, diagonal)


def networks():
    for name in MODELS:
        yield name, make_model(name), make_inputs(5, MODELS[name].sample)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield "shared", Shared().double(), torch.randint(7, (5, 3), generator=generator(0))


NETWORKS = {name: (model, X) for name, model, X in networks()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_unbiased_for_every_network(name: str, kind: str) -> None:
    model, X = NETWORKS[name]
    blocks = reference.tangent_kernel(model, dict(model.named_parameters()), X)
    exact = torch.einsum("nmcc->nm", blocks)
    drawn = [gram(model, X, Projection(128, kind, seed)) for seed in range(8)]
    one = np.sqrt(np.mean([relative(K, exact) ** 2 for K in drawn]))
    assert 0.01 < one < 4 / 128**0.5
    assert relative(sum(drawn) / 8, exact) < 2.2 * one / 8**0.5
    if kind == "tensor":
        full = [gram(model, X, Projection(128, kind, seed), outputs="full") for seed in range(8)]
        assert relative(sum(full) / 8, blocks) < 0.15
        assert full[0].shape == blocks.shape and torch.equal(full[0], full[0].permute(1, 0, 3, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_falls_like_the_root_of_the_dimension(kind: str) -> None:
    model, X = make_model("relu"), make_inputs(16)
    exact = pk.TangentKernel(model)(X)
    dims, seeds = (32, 512), range(16)
    squared = [[relative(gram(model, X, Projection(dim, kind, s)), exact) ** 2 for s in seeds] for dim in dims]
    slope = np.polyfit(np.log(dims), np.log(np.mean(squared, axis=1)) / 2, 1)[0]
    assert -0.65 < slope < -0.35


@pytest.mark.parametrize("spread", ["by_parameter", "by_entry"])
def test_in_the_metric_of_an_optimizer(spread: str) -> None:
    model, X = make_model("tanh"), make_inputs(5)
    layout = ParameterLayout.of(dict(model.named_parameters()))
    d = torch.rand(layout.size, dtype=torch.float64, generator=generator(4))
    if spread == "by_parameter":
        for place, where in enumerate(layout.slices.values()):
            d[where] = float(place)  # 0 for the first weight, not for its bias
    rows = reference.output_gradients(model, dict(model.named_parameters()), X)
    exact = torch.einsum("ncp,p,mcp->nm", rows, d, rows)
    drawn = [gram(model, X, Projection(256, seed=seed), d) for seed in range(8)]
    one = np.sqrt(np.mean([relative(K, exact) ** 2 for K in drawn]))
    assert relative(sum(drawn) / 8, exact) < 2.2 * one / 8**0.5 < 0.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sample_has_one_feature_vector(name: str, kind: str) -> None:
    model, X = NETWORKS[name]
    context = torch.zeros(5, 0)
    (whole, theta), (tight, _) = (engine(model, Projection(40, kind), memory=memory) for memory in (10**9, 4_000))
    phi = whole.features(theta, X, context, None)
    assert phi.shape == (5, 40) and phi.dtype == torch.float64
    for other in (tight.features(theta, X, context, None), whole.features(theta, X[[2, 0]], context[:2], None)):
        torch.testing.assert_close(other, phi if len(other) == 5 else phi[[2, 0]], rtol=1e-9, atol=1e-9)
    K = whole.gram(theta, X, None, context, None, None)
    torch.testing.assert_close(whole.gram(theta, X, X[:2], context, context[:2], None), K[:, :2])
    torch.testing.assert_close(whole.diagonal(theta, X, context, None), K.diagonal())
    whole.number = 1
    assert not torch.allclose(whole.features(theta, X, context, None), phi)


def test_draws_do_not_depend_on_how_a_large_layer_is_cut() -> None:
    # More columns than are drawn for at once: each part has a map of its own, whatever the samples in hand.
    width = 2 * COLUMNS // 10
    factor = Outer(*(torch.randn(*s, generator=generator(5)) for s in ((3, 2, 4, 20), (3, 4, width))))
    for own in (factor, factor.stacked()):
        sketched = Projection(2000, "sparse").apply(own, (0, 0))
        torch.testing.assert_close(Projection(2000, "sparse").apply(own.take(slice(1, 2)), (0, 0)), sketched[1:2])
        exact = own.rows().double().flatten(0, 1)
        assert relative(sketched.flatten(0, 1) @ sketched.flatten(0, 1).T, exact @ exact.T) < 0.15


def test_convolved_sketches_are_those_of_the_gradients() -> None:
    # The convolution of sketches of δ and a is a sketch of δ aᵀ: linear in both, with entries of unit variance.
    projection = Projection(64)
    signal, activation = torch.eye(3).reshape(3, 1, 1, 3), torch.eye(3).reshape(3, 1, 3)
    columns = torch.stack(
        [projection.apply(Outer(signal[[i]], activation[[j]]), (1, 2))[0, 0] for i in range(3) for j in range(3)]
    )
    factor = Outer(*(torch.randn(*s, generator=generator(6)) for s in ((2, 1, 1, 3), (2, 1, 3))))
    expected = factor.rows().double() @ columns
    torch.testing.assert_close(projection.apply(factor, (1, 2)), expected, rtol=1e-5, atol=1e-6)
    lookup = Lookup(factor.signal, torch.tensor([[1], [2]]), 3)
    one_hot = Outer(factor.signal, torch.eye(3)[lookup.indices])
    torch.testing.assert_close(projection.apply(lookup, (1, 2)), projection.apply(one_hot, (1, 2)))


def test_as_the_engine_of_a_tangent_kernel() -> None:
    model, X = make_model("relu"), make_inputs(6)
    kernel = pk.TangentKernel(model, engine=Projection(4096, seed=3))
    K = kernel(X)
    assert 0.001 < relative(K, pk.TangentKernel(model)(X)) < 0.08
    np.testing.assert_array_equal(K, K.T)
    np.testing.assert_array_equal(K, pk.TangentKernel(model, engine=Projection(4096, seed=3))(X))
    assert np.linalg.eigvalsh(K)[0] > -1e-10 * np.linalg.eigvalsh(K)[-1]
    np.testing.assert_allclose(kernel.diagonal(X), np.diag(K))
