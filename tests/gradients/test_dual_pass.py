"""Derivatives along a few directions by a dual pass, against those of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F

from pathkernel.gradients import dual_pass, per_sample
from pathkernel.gradients.dual_pass import dual_outputs
from pathkernel.gradients.forward_state import ForwardState
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.trajectory.coupled_samples import CoupledSamples, SweepCosts
from tests.cases import generator

D = torch.float64
DIRECTIONS = 3


class Residual(nn.Module):
    """Branches that are added and joined, in place and not, with layers of many kinds."""

    def __init__(self, activation: Callable[[Tensor], Tensor], training: bool = True) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.two, self.bare = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4, affine=False)
        self.pool, self.inplace, self.head = nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Linear(8, 3)
        self.scale, self.activation = nn.Parameter(torch.ones(1, 4, 1, 1)), activation
        self.bare.train(training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.one(x)))
        inner = self.bare(self.two(x))
        inner += x
        inner = self.inplace(inner) * self.scale
        joined = torch.cat([self.pool(inner), F.avg_pool2d(x, 2) / 2 - 0.5], dim=1)
        return self.head(F.adaptive_avg_pool2d(joined, 1).flatten(1))


class Reversed(torch.autograd.Function):
    """Nothing forward, and the sign of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -gradients[0]


def stopped(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return function(x)


def case(network: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], Tensor]:
    network.double()
    drawn = generator(0)
    theta = {name: torch.randn(p.shape, dtype=D, generator=drawn) for name, p in network.named_parameters()}
    along = [
        {name: torch.randn(p.shape, dtype=D, generator=drawn) for name, p in theta.items()} for _ in range(DIRECTIONS)
    ]
    return theta, along, torch.randn(5, 2, 6, 6, dtype=D, generator=drawn)


ACTIVATIONS = [F.relu, F.leaky_relu, F.silu, F.gelu, torch.tanh, torch.sigmoid, F.hardtanh, F.hardswish]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_it_says_what_torch_says(activation: Callable[[Tensor], Tensor], training: bool) -> None:
    network = Residual(activation)
    network.bare.train(training)
    theta, along, x = case(network)
    buffers = {name: value.clone() for name, value in network.named_buffers()}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(network, ({**{k: v.clone() for k, v in buffers.items()}, **parameters}), (x,))

    found = dual_outputs(run, theta, along)
    for tangent, own in zip(found, along, strict=True):
        torch.testing.assert_close(tangent, jvp(run, (theta,), (own,))[1], rtol=1e-10, atol=1e-10)


def test_a_network_without_parameters_in_use_has_zeros() -> None:
    found = dual_outputs(lambda _: torch.ones(2, 3), {"w": torch.ones(2)}, [{"w": torch.ones(2)}])
    assert len(found) == 1 and not found[0].any()


def test_tangents_are_kept_from_the_second_time_on() -> None:
    made: list[int] = []

    def make(place: int) -> Tensor:
        made.append(place)
        return torch.full((2,), float(place))

    tangents = dual_pass.Tangents(3, make)
    for _ in range(3):
        assert [tangent[0].item() for tangent in tangents] == [0.0, 1.0, 2.0]
    assert made == [0, 1, 2] * 2


@pytest.mark.parametrize(
    "run",
    [
        lambda p: p["w"].softmax(0),  # no rule
        lambda p: p["w"].view(2, 2).relu_(),  # others see the same memory
        lambda p: torch.ones(4).add_(p["w"]),  # a constant would become a function of parameters
        lambda p: F.dropout(p["w"], 0.5),
        lambda p: p["w"] - stopped(torch.mean, p["w"]),  # a constant to reverse sweeps
        lambda p: Reversed.apply(p["w"]),  # whose derivative it would not ask for
        lambda p: (lambda x: x.detach() * x.relu_())(p["w"] * 2.0),  # what is detached lies in the same memory
    ],
)
def test_what_it_does_not_cover_is_refused(run: Callable[[dict[str, Tensor]], Tensor]) -> None:
    with pytest.raises((NotImplementedError, RuntimeError)):
        dual_outputs(run, {"w": torch.ones(4)}, [{"w": torch.ones(4)}])


def test_a_detached_value_is_a_constant() -> None:
    found = dual_outputs(lambda p: p["w"] * p["w"].detach(), {"w": torch.full((2,), 3.0)}, [{"w": torch.ones(2)}])
    assert found[0].tolist() == [3.0, 3.0]


def test_what_pads_a_value_has_no_tangent() -> None:
    found = dual_outputs(lambda p: F.pad(p["w"] * 2.0, (1, 2), value=7.0), {"w": torch.ones(2)}, [{"w": torch.ones(2)}])
    assert found[0].tolist() == [0.0, 2.0, 2.0, 0.0, 0.0]


def samples_of(network: nn.Module) -> tuple[CoupledSamples, Tensor]:
    theta, _, x = case(network)
    layout = ParameterLayout.of(dict(network.named_parameters()))
    function = ModelFunction(network, layout, dtype=D, state=ForwardState(modes=True))
    cotangents = torch.randn(len(x), 3, dtype=D, generator=generator(1))
    directions = torch.randn(DIRECTIONS, layout.size, dtype=D, generator=generator(2))
    return CoupledSamples(SweepCosts(), function, layout.flatten(theta), x, cotangents, DIRECTIONS), directions


def test_a_dual_pass_that_is_wrong_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are those of torch's own way then, and forward sweeps go on."""
    samples, directions = samples_of(Residual(F.relu))
    expected = samples._by_rows(directions)
    taken: list[int] = []

    def wrong(*arguments: object) -> list[Tensor]:
        taken.append(1)
        return [tangent.flip(0) for tangent in dual_outputs(*arguments)]  # type: ignore[arg-type]

    monkeypatch.setattr(per_sample, "dual_outputs", wrong)
    for _ in range(2):
        torch.testing.assert_close(samples.products(directions), expected, rtol=1e-8, atol=1e-8)
    assert taken == [1]
    assert not samples.costs.refused and samples.costs.proved == {DIRECTIONS}


def test_products_of_coupled_samples_are_those_of_rows() -> None:
    samples, directions = samples_of(Residual(F.relu))
    torch.testing.assert_close(samples.products(directions), samples._by_rows(directions), rtol=1e-8, atol=1e-8)
    assert per_sample.without_dual_passes(samples.function)  # one was taken


class Particular(nn.Module):
    """Has an exception of its own for tensors of classes that it does not know."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, dual_pass.Dual):
            raise ArithmeticError("no tensor of this class")
        return x


def test_a_network_that_refuses_a_dual_pass_in_its_own_words_goes_on_without() -> None:
    samples, directions = samples_of(nn.Sequential(Residual(F.relu), Particular()))
    torch.testing.assert_close(samples.products(directions), samples._by_rows(directions), rtol=1e-8, atol=1e-8)
    assert not samples.costs.refused and not per_sample.without_dual_passes(samples.function)
