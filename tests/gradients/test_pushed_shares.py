"""Derivatives of a batch along several directions in one pass, against one pass for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pathkernel.gradients import pushed_shares
from pathkernel.gradients.losses import batch_products
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout
from tests.cases import generator

D = torch.float64
DIRECTIONS = 5


class Case:
    """A network, a batch and directions, and how many of them each pass took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, samples: int = 7) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        layout = ParameterLayout.of(dict(model.named_parameters()))
        self.function = ModelFunction(model, layout, dtype=D)
        self.theta = layout.flatten({name: value.detach() for name, value in model.named_parameters()})
        self.inputs = torch.randn(samples, 4, dtype=D, generator=generator(1))
        self.directions = torch.randn(DIRECTIONS, layout.size, dtype=D, generator=generator(2))
        self.ids = torch.arange(samples)
        self.widths: list[int] = []
        self.mistaken = False
        taken = pushed_shares.output_products

        def watched(*arguments: Any, width: int = 0) -> Tensor | None:
            found = taken(*arguments, width=width)
            self.widths.append(width)
            return found.flip(1) if self.mistaken and width > 1 and found is not None else found

        monkeypatch.setattr(pushed_shares, "output_products", watched)

    def together(self, width: int) -> Tensor:
        arguments = self.function, self.theta, self.inputs, self.directions
        return pushed_shares.products_together(*arguments, width, self.ids)

    @property
    def expected(self) -> Tensor:
        """Differences of the network's outputs, (D, n, C), to second order."""
        h = 1e-5
        along = [
            self.function.outputs(self.theta + h * u, self.inputs)
            - self.function.outputs(self.theta - h * u, self.inputs)
            for u in self.directions
        ]
        return torch.stack(along) / (2 * h)

    @property
    def one_by_one(self) -> Tensor:
        return torch.cat(
            [batch_products(self.function, self.theta, self.inputs, own) for own in self.directions.split(1)]
        )


@pytest.mark.parametrize("width", [0, 1, 2, 3, 16])
def test_directions_together_give_what_each_gives_alone(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    found = case.together(width)
    torch.testing.assert_close(found, case.expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(found, case.one_by_one, rtol=0, atol=1e-13)


def test_each_size_of_a_pass_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    case.together(3)
    assert case.widths == [3, 3, 2, 2]  # a proof, and its use
    case.widths.clear()
    case.together(3)
    assert case.widths == [3, 2]


def test_a_pass_that_mixes_samples_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    case.mistaken = True
    torch.testing.assert_close(case.together(3), case.expected, rtol=0, atol=1e-8)
    case.widths.clear()
    case.together(3)
    assert case.widths == []


def test_nothing_is_proved_on_samples_that_are_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    case.mistaken = True
    case.inputs[1:] = case.inputs[0]
    case.ids = torch.zeros(len(case.inputs), dtype=torch.int64)
    torch.testing.assert_close(case.together(3), case.expected, rtol=0, atol=1e-8)
    assert case.widths == [] and "together" not in case.function.row_routes.values()
