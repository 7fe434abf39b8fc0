"""The tangent kernel against the entry-by-entry oracle, for all it may be of and any module."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from cases import LOSSES, MODELS, generator, make_inputs, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import reference
from pathkernel.tangent_kernel.products import kernel_vector_product

DOUBLE, SINGLE = TOLERANCES[torch.float64], TOLERANCES[torch.float32]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def oracle(model: nn.Module, X: Tensor, Y: Tensor | None = None) -> np.ndarray:
    """(n, m, C, C)."""
    return reference.tangent_kernel(model, values(model), X, Y).numpy()


def close(found: Any, expected: Any, tolerance: float = DOUBLE.rounding) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


REDUCTIONS = {
    "trace": lambda K: np.einsum("nmcc->nm", K),
    "mean": lambda K: np.einsum("nmcc->nm", K) / K.shape[-1],
    "sum": lambda K: K.sum(axis=(2, 3)),
    "full": lambda K: K,
    0: lambda K: K[:, :, 0, 0],
    -1: lambda K: K[:, :, -1, -1],
}


@pytest.mark.parametrize("outputs", REDUCTIONS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_against_the_oracle(model: str, outputs) -> None:
    module, sample = make_model(model), MODELS[model].sample
    X, Y = make_inputs(4, sample), make_inputs(3, sample, seed=2)
    kernel, reduce = pk.TangentKernel(module, outputs=outputs), REDUCTIONS[outputs]
    symmetric = kernel(X)
    close(symmetric, reduce(oracle(module, X)))
    close(kernel(X, Y), reduce(oracle(module, X, Y)))
    close(kernel(X, X), symmetric)
    diagonal = np.arange(len(X))
    close(kernel.diagonal(X), symmetric[diagonal, diagonal])
    np.testing.assert_array_equal(symmetric, symmetric.transpose(1, 0, 3, 2) if outputs == "full" else symmetric.T)
    assert symmetric.dtype == np.float64


@pytest.mark.parametrize(
    "outputs",
    ["trace", "mean", "sum", "full", 1, torch.square],
    ids=["trace", "mean", "sum", "full", "1", "callable"],  # a callable's address would differ between processes
)
@pytest.mark.parametrize("block", [1, 3, 256])
def test_products_with_vectors(outputs, block: int) -> None:
    module, X = make_model(), make_inputs(5)
    kernel = pk.TangentKernel(module, outputs=outputs)
    v = torch.randn(5, 3, generator=generator(0), dtype=torch.float64)
    K = kernel(X)
    if outputs == "full":
        close(kernel.matvec(X, v), np.einsum("nmcd,md->nc", K, v))
    else:
        close(kernel.matvec(X, v[:, 0].numpy()), K @ v[:, 0].numpy())
    w = v if outputs == "full" else v[:, 0]
    arguments = (kernel.function, kernel.selection, kernel.theta, X, torch.zeros(5, 0), w)
    close(kernel_vector_product(*arguments, block=block), kernel.matvec(X, w))


def test_any_function_of_the_outputs() -> None:
    module, X = make_model(), make_inputs(4)
    G = reference.output_gradients(module, values(module), X)
    z = module(X).detach()
    # ∇(z₀ z₁) = z₁ ∇z₀ + z₀ ∇z₁
    rows = z[:, 1, None] * G[:, 0] + z[:, 0, None] * G[:, 1]
    close(pk.TangentKernel(module, outputs=lambda z: z[0] * z[1])(X), rows @ rows.T)
    # Several numbers: the sum of their kernels.
    K = pk.TangentKernel(module, outputs=lambda z: torch.stack([z[0] * z[1], z[2]]))(X)
    close(K, rows @ rows.T + G[:, 2] @ G[:, 2].T)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_kernel_of_losses(loss: str) -> None:
    case, n = LOSSES[loss], 4
    module, X, y = make_model(outputs=case.outputs), make_inputs(n), case.targets(n)
    kernel = pk.TangentKernel(module, outputs="loss", loss=case.loss)
    rows = torch.cat(
        [reference.sample_gradients(module, values(module), case.loss, X[i : i + 1], y[i : i + 1]) for i in range(n)]
    )
    close(kernel((X, y)), rows @ rows.T)
    close(kernel((X[:2], y[:2]), (X, y)), rows[:2] @ rows.T)
    close(kernel.diagonal((X, y)), (rows**2).sum(dim=1))
    v = torch.randn(n, generator=generator(1), dtype=torch.float64)
    close(kernel.matvec((X, y), v), rows @ rows.T @ v)


@settings(max_examples=12)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 40_000), st.sampled_from(["trace", "full", 1]))
def test_blocks_make_the_whole(n: int, m: int, memory: int, outputs) -> None:
    module, X, Y = make_model("relu"), make_inputs(n), make_inputs(m, seed=2)
    blocks, whole = (pk.TangentKernel(module, outputs=outputs, memory=budget) for budget in (memory, "1GB"))
    K = blocks(X)
    close(K, whole(X))
    np.testing.assert_array_equal(K, K.transpose(1, 0, 3, 2) if outputs == "full" else K.T)
    close(blocks(X, Y), whole(X, Y))
    close(blocks.diagonal(X), whole.diagonal(X))


def test_float32_arithmetic() -> None:
    module, X = make_model(dtype=torch.float32), make_inputs(6, dtype=torch.float32)
    kernel = pk.TangentKernel(module)
    close(kernel(X), REDUCTIONS["trace"](oracle(module, X)), SINGLE.rounding)
    assert kernel(X).dtype == np.float64
    np.testing.assert_array_equal(kernel(X), kernel(X).T)
    close(kernel.matvec(X, np.ones(6)), kernel(X).sum(axis=1), SINGLE.rounding)
    # Asked for more digits than the parameters have, it gives them.
    close(pk.TangentKernel(module, dtype=torch.float64)(X), REDUCTIONS["trace"](oracle(module, X)))
    close(kernel(X.double().numpy()), kernel(X), SINGLE.rounding)


def test_frozen_parameters_take_no_part() -> None:
    module, X = make_model(), make_inputs(4)
    module[0].requires_grad_(False)
    close(pk.TangentKernel(module)(X), REDUCTIONS["trace"](oracle(module, X)))
    hidden = module[1](module[0](X))
    close(pk.TangentKernel(module)(X), 3 * (hidden @ hidden.T + 1))


def test_parameters_can_be_chosen_and_given_other_values() -> None:
    module, X = make_model(), make_inputs(4)
    kernel = pk.TangentKernel(module, {"2.bias": torch.zeros(3, dtype=torch.float64)})
    close(kernel(X), np.full((4, 4), 3.0))
    others = {name: p.detach() + 0.1 for name, p in module.named_parameters()}
    expected = REDUCTIONS["trace"](reference.tangent_kernel(module, others, X).numpy())
    close(pk.TangentKernel(module, others)(X), expected)
    parts = [pk.TangentKernel(module, {name: p.detach()})(X) for name, p in module.named_parameters()]
    close(sum(parts), pk.TangentKernel(module)(X))


def test_later_training_does_not_change_a_kernel() -> None:
    module, X = make_model("conv_group_norm"), make_inputs(3, MODELS["conv_group_norm"].sample)
    kernel = pk.TangentKernel(module)
    before = kernel(X)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    np.testing.assert_array_equal(kernel(X), before)


def test_the_mode_and_the_gradients_of_the_model_are_left_alone() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    module[1].eval()
    module(make_inputs(5)).sum().backward()
    gradients = [copy.deepcopy(p.grad) for p in module.parameters()]
    kernel = pk.TangentKernel(module)
    np.testing.assert_array_equal(kernel(make_inputs(5)), kernel(make_inputs(5)))  # eval mode: no dropout inside
    assert [m.training for m in module] == [True, False, True, True]
    for p, gradient in zip(module.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=0)
    module.eval()
    close(kernel(make_inputs(5)), REDUCTIONS["trace"](oracle(module, make_inputs(5))))


# -- any module -------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.cell = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.cell(self.embedding(tokens))[0][:, -1])


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens))).mean(dim=1)


class Sequences(nn.Module):
    """Outputs of shape (n, tokens, classes), flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh())


@pytest.mark.parametrize("make", [Recurrent, Attentive, Sequences])
@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_recurrent_attentive_and_embedded(make, outputs: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().double().eval()
    tokens = torch.randint(7, (4, 5), generator=generator(3))
    kernel = pk.TangentKernel(module, outputs=outputs)
    expected = REDUCTIONS[outputs](oracle(module, tokens))
    close(kernel(tokens), expected)
    close(kernel(tokens[:2], tokens), expected[:2])
    v = np.ones((4, expected.shape[-1])) if outputs == "full" else np.ones(4)
    close(kernel.matvec(tokens, v), expected.sum(axis=(1, 3) if outputs == "full" else 1))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("make", [Recurrent, Attentive])
def test_the_machine_of_recurrent_and_attentive_networks(make, dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().to(dtype)
    tokens, y = torch.randint(7, (6, 5), generator=generator(3)), torch.tensor([0, 1, 1, 0, 0, 1])
    optimizer, loss = torch.optim.Adam(module.parameters(), lr=0.01), nn.CrossEntropyLoss()
    with pk.KernelRecorder(module, optimizer, loss, data=(tokens, y), audit_every=1) as recorder:
        for x, target in recorder.batches(batch_size=3):
            optimizer.zero_grad()
            loss(module(x), target).backward()
            optimizer.step()
    for quadrature, tolerance in (("discrete_gradient", 1e2 * TOLERANCES[dtype].residual), (pk.Adaptive(1e-5), 1e-3)):
        machine = pk.KernelMachine(recorder.trajectory, quadrature=quadrature)
        assert machine.explain(tokens[:1], outputs=0).relative_residual < tolerance
        close(machine.decision_function(tokens[:1]), module(tokens[:1]).detach(), tolerance)
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled


def test_it_says_how_it_is_computed() -> None:
    kernel = pk.TangentKernel(make_model(), outputs=1, memory="2 MiB")
    assert kernel.explain() == (
        "TangentKernel of 'output 1': P = 43 parameters, engine 'jacobian', float64 products accumulated in float64, "
        "memory budget 2 MB"
    )
    assert repr(kernel) == f"<{kernel.explain()}>"
