"""What a tape sees is what autograd sees, parameter by parameter; and what it does not see is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import NETWORKS, PLAIN, network
from torch import Tensor, nn

from pathkernel.gradients.forward_state import ForwardState
from pathkernel.gradients.layers.coverage import ProvedTapes, prove
from pathkernel.gradients.layers.factors import Dense
from pathkernel.gradients.layers.proofs import Coverage
from pathkernel.gradients.layers.rules import RULES, layer_rule, linear
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout, constants_of, named_trainable
from pathkernel.tangent_kernel.tangent_kernel import TangentKernel


def function_of(model: nn.Module) -> tuple[ModelFunction, Tensor]:
    named = named_trainable(model)
    layout = ParameterLayout.of(named)
    theta = layout.flatten({name: p.detach() for name, p in named.items()})
    return ModelFunction(model, layout, constants_of(model, layout), theta.dtype), theta


def proof(model: nn.Module, inputs: Any) -> Coverage:
    return prove(*function_of(model), inputs)


def autograd_rows(function: ModelFunction, theta: Tensor, inputs: Tensor, cotangents: Tensor) -> Tensor:
    rows = []
    for i in range(len(inputs)):
        point = theta.clone().requires_grad_(True)
        with function.evaluating():
            value = (function.batch(function.layout.unflatten(point), inputs[i : i + 1])[0] * cotangents[i]).sum()
        rows.append(torch.autograd.grad(value + 0 * point.sum(), point)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_covered_or_named(name: str) -> None:
    coverage = proof(*network(name))
    assert set(coverage.plain) == PLAIN.get(name, set())
    assert coverage.largest < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_pieces_are_the_gradients_of_each_sample(name: str) -> None:
    model, inputs = network(name)
    function, theta = function_of(model)
    tapes = ProvedTapes(function)
    tape = tapes.record(theta, inputs)
    cotangents = torch.randn(tape.outputs.shape, generator=torch.Generator().manual_seed(2), dtype=theta.dtype)
    expected = autograd_rows(function, theta, inputs, cotangents)
    found, seen = torch.zeros_like(expected), torch.zeros(theta.shape, dtype=torch.int64)
    pieces = tape.pieces((tape.outputs * cotangents).sum(dim=1, keepdim=True))
    for piece in pieces:
        for where, factor in piece.separated():
            found[:, where] = factor.rows()[:, 0]
            seen[where] += 1
    assert seen.max() <= 1, "pieces are disjoint"
    for left_out in PLAIN.get(name, set()):
        expected[:, function.layout.slices[left_out]] = 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    directions = torch.randn(2, theta.numel(), generator=torch.Generator().manual_seed(3), dtype=theta.dtype)
    products = sum(piece.products(directions)[:, 0] for piece in pieces)
    torch.testing.assert_close(products, expected @ directions.T, rtol=1e-10, atol=1e-10)


class Square(torch.autograd.Function):
    """An operation that torch functions do not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient * weight**2, (2 * gradient * x * weight).sum(0)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(self.layer(x), self.scale)


def test_a_parameter_used_where_nobody_sees_it_is_named() -> None:
    coverage = proof(Hidden().double(), torch.randn(4, 6, dtype=torch.float64))
    assert set(coverage.plain) == {"scale"}
    assert "differ from autograd's" in coverage.plain["scale"]


def test_a_wrong_rule_is_found_out_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network("mlp")
    right = TangentKernel(model, engine="jacobian")(inputs)

    def twice(samples: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        gradients = linear(samples, input, weight, bias)
        return {**gradients, "weight": lambda signal: gradients["weight"](2 * signal)}

    monkeypatch.setitem(RULES, torch.nn.functional.linear, twice)
    assert set(proof(model, inputs).plain) == {"0.weight", "2.weight", "0.bias", "2.bias"}  # biases go with weights
    assert abs(TangentKernel(model, engine="layerwise")(inputs) - right).max() <= 1e-12 * abs(right).max()


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x, self.gain)


def test_a_users_own_layer_by_a_registered_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = nn.Sequential(nn.Linear(6, 6), Gain(), nn.Linear(6, 3)).double(), torch.randn(4, 6).double()
    assert set(proof(model, inputs).plain) == {"1.gain"}

    @layer_rule(Gain)
    def gain(samples: Any, module: Gain, x: Tensor) -> Any:
        return {"gain": lambda signal: Dense(2 * signal * (samples(x) * module.gain).unsqueeze(1))}

    monkeypatch.delitem(RULES, Gain)
    monkeypatch.setitem(RULES, Gain, gain)
    assert not proof(model, inputs).plain


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z - z.mean(dim=0)


def test_samples_that_depend_on_each_other_are_not_taken_apart() -> None:
    coverage = proof(Coupled().double(), torch.randn(4, 6, dtype=torch.float64))
    assert set(coverage.plain) == {"layer.weight", "layer.bias"}


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.inner, self.head = reentrant, nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = lambda y: torch.tanh(self.inner(y))  # noqa: E731
        return self.head(torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_checkpointed_activations_are_right_or_left_to_the_plain_engine(reentrant: bool) -> None:
    model, inputs = Checkpointed(reentrant).double(), torch.randn(4, 6, dtype=torch.float64)
    coverage = proof(model, inputs)
    assert set(coverage.plain) <= {f"{layer}.{name}" for layer in ("inner", "head") for name in ("weight", "bias")}
    if not coverage.plain:
        assert coverage.largest < 1e-12


def test_another_sequence_of_calls_is_proved_again() -> None:
    model, inputs = network("conditional")
    function, theta = function_of(model)
    tapes = ProvedTapes(function)
    tapes.record(theta, inputs)
    assert len(tapes.proofs.coverages) == 1
    tapes.record(theta, inputs[:2])
    assert len(tapes.proofs.coverages) == 1
    function.module.chosen = 2  # of the copy that passes run on
    tape = tapes.record(theta, inputs)
    assert len(tapes.proofs.coverages) == 2
    used = {name for call in tape.calls for handle in call.handles.values() for name in handle.names()}
    assert used == {"branches.2.weight", "branches.2.bias", "head.weight", "head.bias"}


def test_a_network_is_proved_once_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network("mlp")
    function, theta = function_of(model)
    ProvedTapes(function).record(theta, inputs)
    monkeypatch.setattr("pathkernel.gradients.layers.coverage.prove", None)
    tape = ProvedTapes(function.with_(state=ForwardState(modes=True))).record(theta, inputs)
    assert tape.calls and not tape.plain
    with pytest.raises(TypeError):  # of another floating type, nothing is known
        ProvedTapes(function.converted(torch.float32)).record(theta, inputs)


class Rolled(nn.Linear):
    """Other samples' outputs in training, by the same sequence of calls."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return torch.cat([z[1:], z[:1]]) if self.training else z


def test_rows_are_held_against_the_batch_in_each_mode() -> None:
    function, theta = function_of(Rolled(6, 3).double())
    inputs = torch.randn(4, 6, dtype=torch.float64)
    tapes = ProvedTapes(function)
    assert not tapes.record(theta, inputs).plain
    training = function.with_(state=ForwardState(modes=True))
    assert not tapes.record(theta, inputs, training, rows=False).plain  # of which no rows are made
    assert set(tapes.record(theta, inputs, training).plain) == {"weight", "bias"}


@pytest.mark.parametrize("first", [False, True])
def test_samples_that_are_mixed_in_training_are_not_in_evaluation(first: bool) -> None:
    function, theta = function_of(Rolled(6, 3).double())
    inputs = torch.randn(4, 6, dtype=torch.float64)
    for modes in (first, not first, first, not first):  # by tapes of their own, as of batches and of queries
        tape = ProvedTapes(function).record(theta, inputs, function.with_(state=ForwardState(modes=modes)))
        assert set(tape.plain) == ({"weight", "bias"} if modes else set())


def test_a_network_that_cannot_run_under_a_tape_goes_to_the_plain_engine() -> None:
    class Fussy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.overrides._get_current_function_mode() is not None:
                raise RuntimeError("no modes here")
            return super().forward(x)

    function, theta = function_of(Fussy(6, 3).double())
    tapes = ProvedTapes(function)
    tape = tapes.record(theta, torch.randn(4, 6, dtype=torch.float64))
    assert tape.outputs.shape == (4, 3) and not tape.calls
    assert tapes.coverage is not None and set(tapes.coverage.plain) == {"weight", "bias"}


def test_rows_of_a_trial_are_proved_when_they_are_used() -> None:
    model, inputs = network("conditional")
    function, theta = function_of(model)
    tapes = ProvedTapes(function)
    with tapes.trying():
        tapes.record(theta, inputs)
    assert len(tapes.proofs.coverages) == 1 and not tapes.proofs.met
    tapes.record(theta, inputs)
    assert len(tapes.proofs.met) == 1
