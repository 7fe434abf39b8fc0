"""Loss ledgers: exact sums over samples, modules and steps, whatever the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dynamical import data, recorded
from torch import nn

import pathkernel as pk
from pathkernel import dynamics
from pathkernel.errors import InputError

MAKE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
}


@pytest.mark.parametrize("name", MAKE)
def test_sums_are_the_measured_change(name: str) -> None:
    trajectory = recorded(MAKE[name], 3, size=4)
    ledger, (X, y) = dynamics.loss_ledger(trajectory), data()
    assert ledger.end == pytest.approx(nn.functional.mse_loss(trajectory.model(X), y).item(), rel=1e-12)
    assert ledger.end < ledger.start and ledger.residual < 1e-10
    channels = sum(ledger.channels.values())
    for total in (ledger.samples.sum(), sum(ledger.modules.values()), ledger.steps.sum(), ledger.table.sum()):
        assert total + channels == pytest.approx(ledger.end - ledger.start, rel=1e-9)
    assert ledger.samples.shape == (8,) and ledger.steps.shape == (6,) and set(ledger.modules) == {"0", "2"}
    np.testing.assert_allclose(ledger.table.sum(axis=1), ledger.samples, atol=1e-12)
    np.testing.assert_allclose(ledger.table.sum(axis=0), list(ledger.modules.values()), atol=1e-12)
    assert ("weight_decay" in ledger.channels) == (name == "momentum")
    assert "LossLedger" in repr(ledger) and ledger.change == ledger.end - ledger.start


def trained(loss: nn.Module) -> pk.Trajectory:
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.arange(6) % 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
    return recorded(lambda p: torch.optim.SGD(p, lr=0.1), 1, 6, model, (X, y), loss)


def test_a_sum_over_samples_is_one_too() -> None:
    ledger = dynamics.loss_ledger(trained(nn.CrossEntropyLoss(reduction="sum")))
    mean = dynamics.loss_ledger(trained(nn.CrossEntropyLoss()))
    assert ledger.residual < 1e-10 and ledger.start == pytest.approx(6 * mean.start, rel=1e-12)


def test_a_loss_that_is_no_sum_over_samples_is_refused() -> None:
    with pytest.raises(InputError, match=r"not the mean, nor the sum.*reduction=\"sum\""):
        dynamics.loss_ledger(trained(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0]).double())))
