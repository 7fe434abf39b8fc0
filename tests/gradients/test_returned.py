"""What models return: losses, shares and kernels in whatever form, or a refusal before training."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pathkernel as pk
from pathkernel.errors import PathKernelError

T, VOCABULARY, LENGTH = torch.float64, 11, 5


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class LanguageModel(nn.Module):
    def __init__(self, form: Any) -> None:
        super().__init__()
        self.table, self.head, self.form = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY), form
        self.scale = nn.Parameter(torch.tensor(1.0))  # without axes

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.table(x)).cumsum(1)
        return self.form(self.scale * self.head(h), h)


def token_loss(z: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(z.reshape(-1, VOCABULARY), y.reshape(-1))


FORMS: dict[str, tuple[Any, Any]] = {
    "(B, T, V)": (lambda z, h: z, token_loss),
    "(B T, V)": (lambda z, h: z.reshape(-1, VOCABULARY), token_loss),
    "(B, V, T)": (lambda z, h: z.transpose(1, 2), nn.CrossEntropyLoss()),
    "dict": (lambda z, h: {"logits": z}, lambda out, y: token_loss(out["logits"], y)),
    "tuple": (lambda z, h: (z, h), lambda out, y: token_loss(out[0], y)),
    "dataclass": (Output, lambda out, y: token_loss(out.logits, y)),
    "dataclass in a list": (lambda z, h: [Output(z, h), len(z)], lambda out, y: token_loss(out[0].logits, y)),
}
REFUSED: dict[str, tuple[Any, Any]] = {
    "(T, B, V)": (lambda z, h: z.transpose(0, 1), lambda z, y: token_loss(z.transpose(0, 1), y)),
    "(T B, V)": (
        lambda z, h: z.transpose(0, 1).reshape(-1, VOCABULARY),
        lambda z, y: cross_entropy(z, y.T.reshape(-1)),
    ),
    "one number": (lambda z, h: z.mean(), lambda z, y: z),
}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(VOCABULARY, (12, LENGTH), generator=generator) for _ in range(2))  # type: ignore[return-value]


def train(form: Any, loss: Any) -> tuple[nn.Module, pk.KernelRecorder]:
    torch.manual_seed(0)
    model = LanguageModel(form).to(T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pk.KernelRecorder(model, optimizer, loss, data=data(), audit_every=1) as recorder:
        for x, y in recorder.batches(4):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return model, recorder


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    form, loss = FORMS[name]
    model, recorder = train(form, loss)
    (X, Y), parameters = data(), list(model.parameters())
    machine = pk.KernelMachine(recorder.trajectory)
    why = machine.explain(X[:2], outputs=3)
    assert why.residual.max() < 1e-11 and why.split_error < 1e-11
    losses = [loss(model(X[i : i + 1]), Y[i : i + 1]) for i in range(3)]
    why = machine.explain((X[:3], Y[:3]), outputs="loss")
    np.testing.assert_allclose(why.output, [value.item() for value in losses], rtol=1e-12)
    assert why.residual.max() < 1e-11
    rows = torch.stack([torch.cat([g.reshape(-1) for g in torch.autograd.grad(v, parameters)]) for v in losses])
    for engine in ("auto", "jacobian", "autograd"):
        K = pk.TangentKernel(model, outputs="loss", loss=loss, engine=engine)((X[:3], Y[:3]))
        np.testing.assert_allclose(K, (rows @ rows.T).numpy(), rtol=1e-10)
    assert pk.PathKernel(recorder.trajectory, outputs="loss")((X[:3], Y[:3])).shape == (3, 3)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training(name: str) -> None:
    form, loss = REFUSED[name]
    torch.manual_seed(0)
    model = LanguageModel(form).to(T)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PathKernelError), pk.KernelRecorder(model, optimizer, loss, data=data()) as recorder:
        next(iter(recorder.batches(4)))
    with pytest.raises(PathKernelError):
        pk.TangentKernel(model)(data()[0])


CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda i, h: nn.RNNCell(i, h, nonlinearity="relu")]


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("engine", ["auto", "layerwise", "jacobian", "products"])
def test_recurrent_cells(engine: str, kind: Any) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = kind(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    torch.manual_seed(0)
    model, X = Cell().to(T), torch.randn(6, 3, 4, dtype=T)
    parameters, rows = list(model.parameters()), []
    for x in X:
        own = [torch.autograd.grad(z, parameters, retain_graph=True) for z in model(x[None])[0]]
        rows.append(torch.stack([torch.cat([g.reshape(-1) for g in each]) for each in own]))
    J = torch.stack(rows)
    K = pk.TangentKernel(model, engine=engine)(X)
    np.testing.assert_allclose(K, torch.einsum("icp,jcp->ij", J, J).numpy(), rtol=1e-10)
    if engine in ("auto", "layerwise"):
        assert pk.TangentKernel(model, engine=engine).check(X) < 1e-12


def test_parameters_of_several_floating_types() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(4, 6), nn.Linear(6, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.trunk(x)).double())

    torch.manual_seed(1)
    model, X, y, loss = Mixed(), torch.randn(24, 4), torch.randint(2, (24,)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1) as recorder:
        for _ in range(10):
            for x, target in recorder.batches(8):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    why = pk.KernelMachine(recorder.trajectory).explain(X[:3])
    assert why.residual.max() < 1e-5
