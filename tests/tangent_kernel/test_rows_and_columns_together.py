"""Rows and columns of a small kernel matrix go through the network in one pass, where they can."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.gradients.layers.coverage import ProvedTapes
from pathkernel.gradients.pytrees import count

ROUNDING, LONG = TOLERANCES[torch.float64].rounding, torch.int64


class Mean(nn.Module):
    """Outputs from the mean of what tokens are embedded as."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(8, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))).mean(dim=1))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of each pass of which gradients were taken."""
    found: list[int] = []
    record = ProvedTapes.record

    def noted(self: ProvedTapes, theta: Tensor, inputs: Any, *others: Any, **options: Any) -> Any:
        found.append(count(inputs))
        return record(self, theta, inputs, *others, **options)

    monkeypatch.setattr(ProvedTapes, "record", noted)
    return found


def samples(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randint(8, (n, 3), generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(outputs: str, dtypes: tuple[torch.dtype, torch.dtype], passes: list[int]) -> None:
    """Compare the kernel matrix with plain rows, and leave the passes of a second call alone in the list."""
    torch.manual_seed(0)
    model, X, Y = Mean().double(), samples(6, dtypes[0], 1), samples(9, dtypes[1], 2)
    kernel, plain = (pk.TangentKernel(model, outputs=outputs, engine=engine) for engine in ("layerwise", "jacobian"))
    kernel(X, Y)
    passes.clear()
    found, expected = kernel(X, Y), plain(X, Y)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


def test_samples_alike_make_one_pass(passes: list[int]) -> None:
    check("trace", (LONG, LONG), passes)
    assert passes == [15]


@pytest.mark.parametrize(("outputs", "dtypes"), [("trace", (LONG, torch.int32)), ("full", (LONG, LONG))])
def test_others_make_one_each(outputs: str, dtypes: tuple[torch.dtype, torch.dtype], passes: list[int]) -> None:
    check(outputs, dtypes, passes)
    assert passes == [6, 9]


def test_so_do_those_of_which_no_pass_holds_all(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathkernel.tangent_kernel.engines.blocking.PASS", 1)
    check("trace", (LONG, LONG), passes)
    assert passes == [1] * 15
