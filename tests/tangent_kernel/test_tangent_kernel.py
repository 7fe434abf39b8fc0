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
from pathkernel.errors import InputError
from pathkernel.tangent_kernel.engines.engine import Engine
from pathkernel.tangent_kernel.engines.jacobian import JacobianEngine

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


@pytest.mark.parametrize("engine", ["layerwise", "jacobian", "products"])
@pytest.mark.parametrize("outputs", REDUCTIONS, ids=str)
def test_every_engine_against_the_oracle(outputs, engine: str) -> None:
    module, X, Y = make_model("layer_norm"), make_inputs(4), make_inputs(3, seed=2)
    kernel, reduce = pk.TangentKernel(module, outputs=outputs, engine=engine), REDUCTIONS[outputs]
    symmetric = kernel(X)
    close(symmetric, reduce(oracle(module, X)))
    close(kernel(X, Y), reduce(oracle(module, X, Y)))
    diagonal = np.arange(len(X))
    close(kernel.diagonal(X), symmetric[diagonal, diagonal])
    np.testing.assert_array_equal(symmetric, symmetric.transpose(1, 0, 3, 2) if outputs == "full" else symmetric.T)
    assert kernel.engine.name == engine


def test_any_value_that_makes_an_engine() -> None:
    class Doubled(Engine):
        name = "doubled"
        exact = False  # or it is compared with autograd, and refused

        def gram(self, theta, X, Y, context_X, context_Y, diagonal):
            plain = JacobianEngine(self.function, self.selection, self.memory)
            return 2 * plain.gram(theta, X, Y, context_X, context_Y, diagonal)

        def diagonal(self, theta, X, context, diagonal):
            raise NotImplementedError

    class Value:
        def engine(self, function, selection, memory):
            return Doubled(function, selection, memory)

    module, X = make_model(), make_inputs(4)
    kernel = pk.TangentKernel(module, engine=Value(), memory="3 MB")
    close(kernel(X), 2 * REDUCTIONS["trace"](oracle(module, X)))
    assert kernel.engine.memory == 3_000_000 and "'doubled'" in repr(kernel)


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


class Tokens(nn.Module):
    """Two outputs of different forms: scores of every token, and one number in a dict."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.inner, self.plain = nn.Linear(3, 4), plain

    def forward(self, x: Tensor) -> Any:
        scores = self.inner(x).tanh()
        return scores if self.plain else {"scores": scores, "length": x.sum(dim=(1, 2))}


@pytest.mark.parametrize("plain", [True, False])
def test_a_loss_sees_outputs_as_the_network_returns_them(plain: bool) -> None:
    def loss(output: Any, target: Tensor) -> Tensor:
        scores = output if plain else output["scores"] + output["length"][:, None, None]
        return nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Tokens(plain).double()
    X, y = make_inputs(4, (5, 3)), torch.randint(4, (4, 5), generator=generator(5))
    rows = []
    for x, target in zip(X, y, strict=True):
        gradients = torch.autograd.grad(loss(module(x[None]), target[None]), list(module.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    G = torch.stack(rows)
    for engine in ("auto", "jacobian"):
        kernel = pk.TangentKernel(module, outputs="loss", loss=loss, engine=engine)
        close(kernel((X, y)), G @ G.T)
        close(kernel.matvec((X, y), np.ones(4)), (G @ G.T).sum(dim=1))


@settings(max_examples=12)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(2_000, 40_000), st.sampled_from(["trace", "full", 1]))
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


def test_parameters_can_be_chosen_by_name_and_by_pattern() -> None:
    module, X = make_model("layer_norm"), make_inputs(4)
    chosen = {
        "0.weight": ["0.weight"],
        "*.weight": ["0.weight", "1.weight", "3.weight"],
        ("3.*", "0.bias"): ["0.bias", "3.weight", "3.bias"],
        "[!1].*": ["0.weight", "0.bias", "3.weight", "3.bias"],
    }
    for pattern, names in chosen.items():
        kernel = pk.TangentKernel(module, list(pattern) if isinstance(pattern, tuple) else pattern)
        assert kernel.function.layout.names == tuple(names)
        close(kernel(X), pk.TangentKernel(module, {name: values(module)[name] for name in names})(X))
    head = {f"3.{name}": p for name, p in module[3].named_parameters()}
    for several in (head.keys(), np.array([*head]), (name for name in head)):
        assert pk.TangentKernel(module, several).function.layout.names == ("3.weight", "3.bias")
    matrices = pk.TangentKernel(module, lambda name, p: p.dim() == 2)
    assert matrices.function.layout.names == ("0.weight", "3.weight")
    module[0].weight.requires_grad_(False)
    assert pk.TangentKernel(module, "*.weight").function.layout.names == ("1.weight", "3.weight")


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ("5.*", "`parameters` has '5.*', which matches no trainable parameter."),
        (["2.*", "o.*", "x"], "`parameters` has 'o.*', 'x', which matches no trainable parameter."),
        ("0.*", "`parameters` has '0.*', which matches no trainable parameter (only frozen ones: 0.weight, 0.bias)."),
        ([], "`parameters` has no pattern, which matches no trainable parameter."),
        (lambda name, p: False, "`parameters` said no to each of 2 trainable parameters."),
    ],
)
def test_a_choice_of_nothing_is_refused(parameters, found: str) -> None:
    module = make_model()
    module[0].requires_grad_(False)
    with pytest.raises(InputError) as caught:
        pk.TangentKernel(module, parameters)
    assert str(caught.value).startswith(found)
    assert "2.weight" in str(caught.value)


def test_products_in_bfloat16() -> None:
    """Passes in float32, so that only the factors of products are rounded: to 8 bits, 2⁻⁹ each."""
    module, X = make_model("relu", dtype=torch.float32), make_inputs(40, dtype=torch.float32)
    kernel = pk.TangentKernel(module, dtype=torch.bfloat16, engine="layerwise")
    expected, found = pk.TangentKernel(module)(X), kernel(X)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-6 < error < 4e-3
    np.testing.assert_array_equal(found, found.T)
    assert "passes in float32, products in bfloat16, sums in float32, matrix in float64" in kernel.explain()


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64], ids=str)
def test_other_floating_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=rf"`dtype={dtype}` was given\. .* Write `dtype=torch.float32`\."):
        pk.TangentKernel(make_model(), dtype=dtype)


@pytest.mark.parametrize("engine", ["fastest", None, 3])
def test_other_engines_are_refused(engine) -> None:
    with pytest.raises(InputError, match="'jacobian', 'products', 'autograd', a subclass of `Engine`, or a value"):
        pk.TangentKernel(make_model(), engine=engine)


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
        "TangentKernel of 'output 1': P = 43 parameters, engine 'auto', passes in float64, products in float64, "
        "sums in float64, matrix in float64, memory budget 2 MB"
    )
    assert repr(kernel) == f"<{kernel.explain()}>"
