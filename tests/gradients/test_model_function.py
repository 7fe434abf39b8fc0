"""A module as a pure function: layout, blocks, memory, and shapes that are checked while testing."""

from __future__ import annotations

from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from cases import MODELS, make_inputs, make_model
from hypothesis import given
from hypothesis import strategies as st
from tolerances import TOLERANCES
from torch import nn

from pathkernel import reference
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout, constants_of, named_trainable
from pathkernel.gradients.per_sample import gradients_along, sample_gradients
from pathkernel.gradients.pytrees import as_tensors, blocks, memory_bytes, take

DOUBLE = TOLERANCES[torch.float64]


def function_of(model: nn.Module) -> tuple[ModelFunction, torch.Tensor]:
    named = named_trainable(model)
    layout = ParameterLayout.of(named)
    return ModelFunction(model, layout, constants_of(model, layout), torch.float64), layout.flatten(named).detach()


def test_shapes_are_checked_in_the_tests() -> None:
    function, theta = function_of(make_model())
    with pytest.raises(jaxtyping.TypeCheckError):
        function.outputs(theta[None], make_inputs(2))


@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_the_module(name: str) -> None:
    model, X = make_model(name), make_inputs(5, MODELS[name].sample)
    function, theta = function_of(model)
    expected = model(X).detach()
    for block in (1, 2, 4096):
        torch.testing.assert_close(function.outputs(theta, X, block=block), expected, rtol=0, atol=1e-14)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(function.outputs(theta, X), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_sample(name: str) -> None:
    model, X = make_model(name), make_inputs(3, MODELS[name].sample)
    function, theta = function_of(model)
    expected = reference.output_gradients(model, dict(model.named_parameters()), X)
    rows = sample_gradients(function, theta, X, lambda z, _: z, torch.zeros(3, 0), scalar=False)
    torch.testing.assert_close(function.layout.flatten(rows), expected, rtol=0, atol=DOUBLE.rounding)
    one = sample_gradients(function, theta, X, lambda z, c: z[0] * c, torch.arange(3.0), scalar=True)
    weighted = expected[:, 0] * torch.arange(3.0)[:, None]
    torch.testing.assert_close(function.layout.flatten(one), weighted, rtol=0, atol=DOUBLE.rounding)


def test_gradients_at_a_time_of_their_own() -> None:
    model, X = make_model(), make_inputs(3)
    function, theta = function_of(model)
    delta, times = torch.linspace(-1, 1, len(theta), dtype=torch.float64), torch.tensor([0.0, 0.3, 1.0])
    values, rows = gradients_along(function, theta, delta, times.double(), X, lambda z, _: z[1], torch.zeros(3, 0))
    for i, t in enumerate(times.tolist()):
        point = function.layout.unflatten(theta + times.double()[i] * delta)
        expected = reference.output_gradients(model, point, X[i : i + 1])[0, 1]
        torch.testing.assert_close(rows[i], expected, rtol=0, atol=DOUBLE.rounding, msg=f"at {t}")
        torch.testing.assert_close(values[i], function.outputs(theta + times.double()[i] * delta, X)[i, 1])


def test_gradients_at_a_time_of_their_own_are_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return sample_gradients(*arguments, **options)

    monkeypatch.setattr("pathkernel.gradients.per_sample.sample_gradients", counted)
    X = make_inputs(3)
    function, theta = function_of(make_model())
    for _ in range(3):
        gradients_along(function, theta, theta, torch.zeros(3).double(), X, lambda z, _: z[1], torch.zeros(3, 0))
    assert len(calls) == 1


def test_another_function_of_the_outputs_is_proved_anew() -> None:
    """`vmap` of PReLU is wrong for as many samples as channels; that plain outputs were right says nothing of it."""
    model, X, slope = make_model(), make_inputs(3), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    function, theta = function_of(model)
    context = torch.zeros(3, 0)

    def bent(z: torch.Tensor, _: Any) -> torch.Tensor:
        return nn.functional.prelu(z[None] - 10, slope)[0]

    for functional in (lambda z, _: z, bent):
        found = function.layout.flatten(sample_gradients(function, theta, X, functional, context, scalar=False))
        in_turn = sample_gradients(function, theta, X, functional, context, scalar=False, route="autograd")
        torch.testing.assert_close(found, function.layout.flatten(in_turn), rtol=0, atol=DOUBLE.rounding)
    known = len(function.row_routes)
    sample_gradients(function, theta, X, lambda z, _: z + 0, context, scalar=False)
    assert len(function.row_routes) > known


def test_gradients_at_times_are_compared_with_those_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformation that is right for one θ may be wrong for a θ of each sample: then a loop."""
    X = make_inputs(3)
    function, theta = function_of(make_model())
    times, context = torch.tensor([0.0, 0.3, 1.0]).double(), torch.zeros(3, 0)
    right = gradients_along(function, theta, theta, times, X, lambda z, _: z[1], context)
    vmap = torch.func.vmap

    def broken(call: Any, in_dims: Any = 0, **options: Any) -> Any:
        mapped = vmap(call, in_dims=in_dims, **options)

        def at(*arguments: Any) -> Any:
            found = mapped(*arguments)
            return (found[0].roll(1, 0), found[1]) if call.__name__ == "at" else found

        return at

    monkeypatch.setattr("pathkernel.gradients.per_sample.vmap", broken)
    function, theta = function_of(make_model())
    found = gradients_along(function, theta, theta, times, X, lambda z, _: z[1], context)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=DOUBLE.rounding)


def test_flat_and_named_are_the_same_numbers() -> None:
    named = dict(make_model("conv_group_norm").named_parameters())
    layout = ParameterLayout.of(named)
    vector = layout.flatten(named)
    assert vector.shape == (layout.size,) == (sum(p.numel() for p in named.values()),)
    for name, value in layout.unflatten(vector).items():
        assert torch.equal(value, named[name])
    stacked = torch.stack([vector, 2 * vector])
    assert torch.equal(layout.flatten(layout.unflatten(stacked)), stacked)


@given(n=st.integers(0, 30), size=st.integers(0, 12))
def test_blocks_cover_everything_once(n: int, size: int) -> None:
    pieces = list(blocks(n, size))
    assert [i for piece in pieces for i in range(n)[piece]] == list(range(n))
    assert all(0 < piece.stop - piece.start <= max(1, size) for piece in pieces)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [(12, 12), ("512MB", 512_000_000), ("2 GiB", 2**31), ("1.5kB", 1500), ("3 kib", 3072), ("0.5 TB", 5 * 10**11)],
)
def test_budgets(text, bytes_: int) -> None:
    assert memory_bytes(text) == bytes_


def test_samples_become_tensors() -> None:
    pair = np.zeros(2, dtype=np.int32), [[1.0], [2.0]]
    tree = {"x": np.ones((2, 3)), "pair": pair, "mask": np.array([True, False])}
    found = as_tensors(tree, torch.float32)
    assert found["x"].dtype == torch.float32 and found["pair"][0].dtype == torch.int64
    assert found["pair"][1].shape == (2, 1) and found["mask"].dtype == torch.bool
    double = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    kept = as_tensors(double, torch.float32)
    assert kept.dtype == torch.float64 and not kept.requires_grad
    assert take(found, slice(0, 1))["pair"][1].tolist() == [[1.0]]


def test_frozen_and_tied_parameters_in_the_layout() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(first, second)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    assert list(named_trainable(model)) == ["0.weight", "0.bias"]
    assert list(named_trainable(model, also=[second.bias])) == ["0.weight", "0.bias", "1.bias"]
    assert list(constants_of(model, ParameterLayout.of(named_trainable(model)))) == ["1.bias"]
