"""Public architectures are covered by the layer-wise engine, and their kernels are the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from networks import OwnFunction
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import reference

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


def covered(kernel: pk.TangentKernel) -> float:
    layout = kernel.function.layout
    plain = sum(layout.slices[name].stop - layout.slices[name].start for name in kernel.engine.tapes.coverage.plain)
    return 1 - plain / layout.size


def error(kernel: pk.TangentKernel, model: nn.Module, X: Tensor, Y: Tensor) -> float:
    blocks = reference.tangent_kernel(model, dict(model.named_parameters()), X, Y)
    expected = torch.einsum("nmcc->nm", blocks).numpy()
    return abs(kernel(X, Y) - expected).max() / abs(expected).max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_covered_and_the_kernel_is_the_references(name: str) -> None:
    for dtype, limit in LIMITS.items():
        model, samples = ARCHITECTURES[name].build(dtype), ARCHITECTURES[name].samples(3, dtype)
        kernel = pk.TangentKernel(model, engine="layerwise")
        assert error(kernel, model, samples, samples[:1]) <= limit
        assert covered(kernel) == 1, kernel.engine.tapes.coverage.plain


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "Perceiver", "Swin", "GRU sequence", "recommender"])
def test_as_many_samples_as_there_are_positions_are_taken_apart(name: str) -> None:
    """A length inside the network that is the number of samples does not take their place."""
    model = ARCHITECTURES[name].build()
    X = ARCHITECTURES[name].samples(8)
    rows = pk.TangentKernel(model, engine="jacobian")(X)
    for n in (1, 4, 7):
        kernel = pk.TangentKernel(model, engine="layerwise")
        assert abs(kernel(X[:n]) - rows[:n, :n]).max() <= 1e-10 * abs(rows).max()
        assert covered(kernel) == 1


class Places(nn.Module):
    """Positions from a table, by something that is done with them; a layer follows."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.table, self.inner = way, nn.Embedding(9, 6), nn.Linear(6, 6)
        self.normed, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1])
        if self.way == "layer":
            x = x + self.inner(self.table(t)).tanh()
        elif self.way == "norm":
            x = self.normed(self.table(t)) + self.inner(x)
        elif self.way == "in place":
            x = self.inner(x)
            x += self.table(t)
        elif self.way == "product":
            x = self.inner(x) * self.table(t.flip(0))
        elif self.way == "repeated":
            x = self.inner(x) + self.table(t).repeat(len(x), 1, 1)
        elif self.way == "expanded after a layer":
            x = self.inner(self.table(t)).expand(len(x), -1, -1) * x
        elif self.way == "of every sample":
            x = self.inner(x) + self.table(t.expand(len(x), -1))
        elif self.way == "attended":
            x = self.inner(x)
            weights = (self.table(t[:2]) @ x.transpose(1, 2)).softmax(-1)
            x = weights @ x
        elif self.way == "a learned mask":
            x = self.inner(x) * torch.sigmoid(self.table.weight[: x.shape[1], :1].masked_fill(t[:, None] == 1, -1e9))
        return self.head(x.tanh().mean(1))


WAYS = [
    *("layer", "norm", "in place", "product", "repeated", "expanded after a layer", "of every sample", "attended"),
    "a learned mask",
]


@pytest.mark.parametrize("way", WAYS)
def test_what_no_sample_has_a_part_in_is_a_function_of_parameters(way: str) -> None:
    torch.manual_seed(0)
    model, X = Places(way).double(), torch.randn(5, 4, 6, dtype=torch.float64)
    kernel = pk.TangentKernel(model, engine="layerwise")
    assert error(kernel, model, X, X) <= 1e-10
    assert not kernel.engine.tapes.coverage.plain


class Query(nn.Module):
    """A learned query, seen by attention through a layer, and by nobody else."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.hidden = nn.Parameter(torch.randn(2, 5)), OwnFunction()
        self.q, self.k = nn.Linear(5, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        squared = self.hidden(x[:, 0])
        scale = torch.outer(self.hidden.scale, self.hidden.head.weight[0])
        return squared + ((self.q(self.query) @ scale) @ self.k(x).transpose(1, 2)).mean((1, 2))[:, None]


def test_a_plain_parameter_leaves_others_of_the_same_call_and_is_counted_once() -> None:
    torch.manual_seed(0)
    model, X = Query().double(), torch.randn(4, 3, 6, dtype=torch.float64)
    kernel = pk.TangentKernel(model, engine="layerwise")
    assert error(kernel, model, X, X) <= 1e-10
    assert set(kernel.engine.tapes.coverage.plain) == {"hidden.scale"}


class Overwritten(nn.Module):
    """What one layer reads is overwritten afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.gain = nn.Linear(6, 6), nn.Linear(6, 3), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        z = 2 * y
        w = z + self.gain
        z.zero_()
        return self.two((y + w).tanh())


def test_an_overwritten_input_is_its_own_layers_affair() -> None:
    torch.manual_seed(0)
    model, X = Overwritten().double(), torch.randn(4, 6, dtype=torch.float64)
    kernel = pk.TangentKernel(model, engine="layerwise")
    assert error(kernel, model, X, X) <= 1e-10
    assert set(kernel.engine.tapes.coverage.plain) == {"gain"}


class Bag(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, **options), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        weights = (1.0 + ids).double() if self.bag.mode == "sum" else None
        return self.head(self.bag(ids, per_sample_weights=weights))


@pytest.mark.parametrize("options", [{"mode": "sum"}, {"mode": "mean", "padding_idx": 0}, {"mode": "max"}], ids=str)
def test_bags_of_embeddings(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, ids = Bag(**options).double(), torch.randint(9, (5, 6))
    kernel = pk.TangentKernel(model, engine="layerwise")
    assert error(kernel, model, ids, ids) <= 1e-10
    assert not kernel.engine.tapes.coverage.plain or options["mode"] == "max"
