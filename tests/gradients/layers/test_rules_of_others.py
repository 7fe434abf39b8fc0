"""A layer's rule that somebody else wrote costs time where it is wrong, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import make_inputs
from tolerances import TOLERANCES
from torch import nn

import pathkernel as pk
from pathkernel.gradients.layers import Dense, NoRule, layer_rule
from pathkernel.gradients.layers.rules import RULES


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 5))

    def forward(self, x):
        return x * self.gain


def refuses(samples, module, x):
    raise NoRule


RIGHT = {"as it is": lambda samples, m, x: {"gain": lambda signal: Dense(signal * samples(x).unsqueeze(1))}}
WRONG: dict[str, Any] = {
    "twice": lambda samples, m, x: {"gain": lambda signal: Dense(2 * signal * samples(x).unsqueeze(1))},
    "other samples": lambda samples, m, x: {"gain": lambda signal: Dense(signal * samples(x).flip(0).unsqueeze(1))},
    "NaN": lambda samples, m, x: {"gain": lambda signal: Dense(signal * torch.nan)},
    "another shape": lambda samples, m, x: {"gain": lambda signal: Dense(signal[:, :, :2])},
    "no factor": lambda samples, m, x: {"gain": lambda signal: signal},
    "another name": lambda samples, m, x: {"gian": lambda signal: Dense(signal)},
    "nothing": lambda samples, m, x: None,
    "no rule here": refuses,
    "divides by zero": lambda samples, m, x: {"gain": lambda signal: Dense(signal * (1 / 0))},
    "divides by zero at once": lambda samples, m, x: {"gain": 1 / 0},
    "writes on the activation": lambda samples, m, x: {
        "gain": lambda signal: Dense(signal * samples(x).mul_(2).unsqueeze(1) / 2)
    },
}


@pytest.fixture(autouse=True)
def rules_as_before() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize("engine", ["auto", "layerwise"])
@pytest.mark.parametrize("rule", [*RIGHT, *WRONG])
def test_kernels_are_autograds(rule: str, engine: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), Scale(), nn.Tanh(), nn.Linear(5, 2)).double()
    X, parameters = make_inputs(12), list(model.parameters())

    def gradient(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(z, parameters, retain_graph=True)])

    J = torch.stack([torch.stack([gradient(z) for z in model(x)]) for x in X])
    expected = torch.einsum("ncp,mdp->nmcd", J, J).numpy()
    layer_rule(Scale)((RIGHT | WRONG)[rule])
    kernel = pk.TangentKernel(model, engine=engine, outputs="full")
    tolerance = TOLERANCES[torch.float64].rounding * np.abs(expected).max()
    np.testing.assert_allclose(kernel(X), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(kernel(X[:5], X[5:]), expected[:5, 5:], rtol=0, atol=tolerance)
    plain = [line for line in kernel.describe(X).splitlines() if "1.gain" in line and "plain" in line]
    assert bool(plain) == (rule in WRONG)
