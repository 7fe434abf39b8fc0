"""Signals of the layer before the output layer are products of its weight: used where proved, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import reference
from pathkernel.gradients.layers.factors import Outer
from pathkernel.tangent_kernel.engines import auto

DOUBLE = TOLERANCES[torch.float64]


class Swapping(nn.Module):
    """The identity; of samples whose first entry is large, the entries in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 3, x.flip(1), x)


class Conditional(nn.Module):
    """Mixes entries of samples whose first one is large; of those whose second one is, gradients are no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.layer(x))
        z = z + (x[:, :1] > 3) * z.sum(dim=1, keepdim=True)
        return self.head(torch.sqrt((z.abs() + 1.0) * (x[:, 1:2] < 3)))


class Twice(nn.Module):
    """A layer that is used two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Unused(nn.Module):
    """A layer whose outputs look like what the output layer reads, and go nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return self.head(x)


class Tokens(nn.Module):
    """A perceptron of the mean of what tokens are embedded as."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(8, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(self.embed(tokens).mean(dim=1))))


class Residual(nn.Module):
    """The output layer reads a layer's outputs and what that layer read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.head(z + torch.nn.functional.gelu(self.second(z)))


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), *between, nn.Linear(6, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "relu": (lambda: mlp(nn.ReLU()), True),
    "several": (lambda: mlp(nn.Tanh(), nn.ELU()), True),
    "nothing": (lambda: mlp(nn.Identity()), True),
    "residual": (Residual, True),
    "norm": (lambda: mlp(nn.LayerNorm(6, elementwise_affine=False), nn.ReLU()), False),
    "softmax": (lambda: mlp(nn.Softmax(dim=1)), False),
    "twice": (Twice, False),
    "unused": (Unused, False),
    "no hidden layer": (lambda: nn.Sequential(nn.Linear(5, 3)), False),
}


def made(make: Callable[[], nn.Module], n: int = 7) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return make().double(), torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reference_of(model: nn.Module, X: Tensor) -> np.ndarray:
    blocks = reference.tangent_kernel(model, {name: p.detach() for name, p in model.named_parameters()}, X)
    return np.einsum("nmcc->nm", blocks.numpy())


def joint_factors(kernel: pk.TangentKernel, X: Tensor, components: slice = slice(None)) -> list[Outer]:
    pieces, _ = kernel.engine.pieces(kernel.theta, X, torch.zeros(len(X), 0), components, joint=True)
    factors = [piece.factor for piece in pieces]
    return [factor for factor in factors if isinstance(factor, Outer) and factor.joint is not None]


@pytest.mark.parametrize("name", CASES)
def test_the_trace_is_the_kernel_with_and_without(name: str) -> None:
    make, elementwise = CASES[name]
    model, X = made(make)
    kernel = pk.TangentKernel(model, engine="layerwise")
    expected = reference_of(model, X)
    np.testing.assert_allclose(kernel(X), expected, rtol=0, atol=DOUBLE.rounding * np.abs(expected).max())
    np.testing.assert_allclose(kernel(X, X[:2]), expected[:, :2], rtol=0, atol=DOUBLE.rounding * np.abs(expected).max())
    assert len(joint_factors(kernel, X)) == elementwise


@pytest.mark.parametrize("components", [slice(None), slice(1, 3)])
def test_sums_over_components_are_those_of_one(components: slice) -> None:
    model, X = made(CASES["several"][0])
    (factor,) = joint_factors(pk.TangentKernel(model, engine="layerwise"), X, components)
    assert factor.joint is not None and factor.components == len(range(3)[components])
    torch.testing.assert_close(
        torch.einsum("ikp,jkp->ijp", factor.signal[:, :, 0], factor.signal[:, :, 0]),
        factor.joint[:, None] * factor.joint[None],
        rtol=0,
        atol=DOUBLE.rounding * factor.signal.abs().max().item() ** 2,
    )


def test_a_factor_with_other_signals_does_not_keep_it() -> None:
    model, X = made(CASES["relu"][0])
    (factor,) = joint_factors(pk.TangentKernel(model, engine="layerwise"), X)
    others = (factor.component(1), factor.scaled(2.0), factor.rows_between(0, 2))
    assert all(other.joint is None for other in others)
    assert factor.joint is not None and torch.equal(factor.take(slice(2, 4)).joint, factor.joint[2:4])


def test_rows_and_columns_of_different_types_are_formed_alike() -> None:
    torch.manual_seed(0)
    X = torch.randint(8, (6, 3), generator=torch.Generator().manual_seed(1))
    model = Tokens().double()
    kernel, plain = (pk.TangentKernel(model, engine=engine) for engine in ("layerwise", "jacobian"))
    expected = plain(X, X[:4])
    found = kernel(X, X[:4].to(torch.int32))  # types that differ make a pass each
    np.testing.assert_allclose(found, expected, rtol=0, atol=DOUBLE.rounding * np.abs(expected).max())


def test_one_output_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model, X = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1)).double(), torch.randn(4, 5).double()
    assert not joint_factors(pk.TangentKernel(model, engine="layerwise"), X)


def swapping() -> tuple[nn.Module, Tensor, Tensor]:
    """A network, samples of which it holds, and some of which it does not."""
    model, X = made(lambda: mlp(nn.ReLU(), Swapping()), n=12)
    with torch.no_grad():
        model[2].weight[0] += 40 * X[11] @ model[0].weight.T
    held = model[:4](X)[:, 0] < 3
    assert 2 < held.sum() < 12
    return model, X[held], X[~held]


def test_samples_of_which_it_does_not_hold_are_seen() -> None:
    model, held, others = swapping()
    kernel, X = pk.TangentKernel(model, engine="layerwise"), torch.cat([held, others])
    kernel(held)
    assert kernel.engine.tapes.coverage.before_head is not None and kernel.engine._elementwise
    expected = reference_of(model, X)
    np.testing.assert_allclose(kernel(X), expected, rtol=0, atol=DOUBLE.rounding * np.abs(expected).max())
    assert not kernel.engine._elementwise


def test_costs_of_such_samples_are_known_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "WORTH_CHOOSING", 0)
    model, held, others = swapping()
    for ask in (lambda kernel: kernel.cost(others), lambda kernel: kernel(others)):
        kernel = pk.TangentKernel(model)
        kernel(held)
        assert kernel.engine._elementwise
        assert len(ask(kernel)) and not kernel.engine._elementwise


def test_a_sample_without_a_gradient_does_not_hide_others() -> None:
    model, X = made(Conditional)
    kernel = pk.TangentKernel(model, engine="layerwise")
    kernel(X)
    assert kernel.engine.tapes.coverage.before_head is not None
    X[3, 0] = X[5, 1] = 4.0
    found, expected = kernel(X), reference_of(model, X)
    assert np.isnan(expected[5]).all() and np.isnan(expected).sum() == 2 * len(X) - 1
    scale = np.nanmax(np.abs(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=DOUBLE.rounding * scale)
