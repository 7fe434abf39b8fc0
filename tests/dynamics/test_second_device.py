"""Flows and ledgers off the CPU say what they say on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerator import DEVICE, accelerator
from dynamical import LOSS, data, network

import pathkernel as pk
from pathkernel import dynamics

X, Y = data()
SHORT: dict[str, Any] = {"points": 3, "method": "dopri8"}


def recorded(model: torch.nn.Module, device: torch.device) -> pk.Trajectory:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, LOSS, data=(X, Y)) as recorder:
        for x, y in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            LOSS(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
    return recorder.trajectory


def energies(model: torch.nn.Module, device: torch.device) -> np.ndarray:
    return dynamics.energy_ledger(dynamics.momentum_flow(model, LOSS, (X, Y), 0.2, **SHORT)).kinetic


def ledgers(model: torch.nn.Module, device: torch.device) -> np.ndarray:
    trajectory = recorded(model, device)
    ledger = dynamics.regularization_ledger(trajectory, X[:2])
    flow = dynamics.gradient_flow(network().to(device), LOSS, (X, Y), 0.2, **SHORT)
    outputs = [part.reshape(-1) for part in ledger.outputs.parts.values()]
    return np.concatenate([*outputs, flow.distance(trajectory).distance])


ASKED: dict[str, Callable[[torch.nn.Module, torch.device], np.ndarray]] = {
    "flow": lambda model, _: dynamics.gradient_flow(model, LOSS, (X, Y), 0.2, **SHORT).explain(X[:2]).shares,
    "energy": energies,
    "batches": lambda model, _: (
        dynamics.modified_flow(
            model, LOSS, (X, Y), 0.2, lr=0.1, batches=[[0, 1, 2], [3, 4, 5, 6, 7]], ordering="given", **SHORT
        ).losses
    ),
    "ledgers": ledgers,
}


RARER = [pytest.param(what, marks=pytest.mark.exhaustive) for what in ASKED if what != "ledgers"]


@pytest.mark.parametrize("what", ["ledgers", *RARER])
def test_another_device_says_the_same(what: str) -> None:
    here = ASKED[what](network(), torch.device("cpu"))
    with accelerator():
        there = ASKED[what](network().to(DEVICE), DEVICE)
    np.testing.assert_allclose(there, here, rtol=1e-9, atol=1e-12)
