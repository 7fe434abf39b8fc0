"""Kernels of networks that write on what their output layer returned, and of rows and columns of different lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk


def divided(z: Tensor) -> Tensor:
    z /= 3.0
    return z


def first_cleared(z: Tensor) -> Tensor:
    z[:, 0] = 0.0
    return z


def scaled_by_a_view(z: Tensor) -> Tensor:
    z.view(-1).mul_(2.0)
    return z


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "divided": divided,
    "an entry": first_cleared,
    "clamped": lambda z: z.clamp_(-0.1, 0.1),
    "by a view": scaled_by_a_view,
    "ReLU": nn.ReLU(inplace=True),
}


class Written(nn.Module):
    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.write = nn.Linear(5, 8), nn.Linear(8, 3), write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.last(torch.relu(self.first(x))))


class TwoSets(nn.Module):
    """Two layers of one size: for samples of (S, T) positions one is of S, the other of T."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x.mean(2))).mean(1) + torch.tanh(self.b(x.mean(1))).mean(1))


class OfSequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 3)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.table(x)).mean(1))


def jacobian(model: nn.Module, X: Tensor) -> Tensor:
    """(n, C, P), sample by sample and output by output."""
    model.eval()
    rows = [torch.autograd.grad(model(x[None])[0, c], tuple(model.parameters())) for x in X for c in range(3)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(len(X), 3, -1)


@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_on_the_outputs_counts(write: str, outputs: str) -> None:
    model, X = Written(WRITES[write]).double(), torch.randn(6, 5, dtype=torch.float64)
    J = jacobian(model, X)
    blocks = torch.einsum("icp,jdp->ijcd", J, J)
    expected = blocks.diagonal(dim1=2, dim2=3).sum(-1) if outputs == "trace" else blocks
    found = torch.as_tensor(pk.TangentKernel(model, outputs=outputs)(X))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


SHAPES = [((5, 7), (7, 5)), ((2, 40), (40, 2)), ((1, 7), (7, 1))]


@pytest.mark.parametrize("shapes", SHAPES)
def test_layers_of_one_size_are_not_mixed_up(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    model = TwoSets().double()
    X, Y = (torch.randn(n, *shape, 4, dtype=torch.float64) for n, shape in zip((6, 4), shapes, strict=True))
    expected = torch.einsum("icp,jcp->ij", jacobian(model, X), jacobian(model, Y))
    found = torch.as_tensor(pk.TangentKernel(model)(X, Y))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_sequences_of_different_lengths_meet(outputs: str) -> None:
    model = OfSequences().double()
    X, Y = torch.randint(0, 11, (6, 5)), torch.randint(0, 11, (4, 7))
    blocks = torch.einsum("icp,jdp->ijcd", jacobian(model, X), jacobian(model, Y))
    expected = blocks.diagonal(dim1=2, dim2=3).sum(-1) if outputs == "trace" else blocks
    found = torch.as_tensor(pk.TangentKernel(model, outputs=outputs)(X, Y))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
