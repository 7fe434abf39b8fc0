"""Passes that draw random numbers, run forward along directions: the same function as in training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import generator
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.gradients import forward_derivatives, per_sample
from pathkernel.trajectory.samples import samples_of


class Encoder(nn.Module):
    """A transformer's layer, whose first dropout sees a tensor with its axes out of the order of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).mean(dim=1))


@pytest.fixture(scope="module")
def recorded() -> tuple[pk.Trajectory, Tensor]:
    g = generator(2)
    X, y = torch.randn(16, 5, 8, generator=g).double(), torch.randint(3, (16,), generator=g)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, loss = Encoder().double(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
            for x, target in recorder.batches(8):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    return recorder.trajectory, X


def test_rows_agree_with_the_batch_run_forward(recorded: tuple[pk.Trajectory, Tensor]) -> None:
    why = pk.KernelMachine(recorded[0]).explain(recorded[1][:2])
    assert why.split_error < 1e-10 and why.residual.max() < 1e-8


def test_forms_by_forward_products_have_the_shares(recorded: tuple[pk.Trajectory, Tensor]) -> None:
    folded = pk.KernelMachine(recorded[0]).explain(recorded[1][:2])
    form = pk.KernelMachine(recorded[0], form="average").explain(recorded[1][:2]).form
    np.testing.assert_allclose(form.shares, folded.shares, atol=1e-10 * np.abs(folded.shares).max())


@pytest.mark.parametrize("push", ["push_forward", "push_by_reversing"])
def test_products_are_differences(recorded: tuple[pk.Trajectory, Tensor], push: str) -> None:
    trajectory = recorded[0]
    step = next(iter(trajectory.steps()))
    batch = step.batches[0]
    function = trajectory.function().with_(state=batch.state)
    inputs, theta = samples_of(batch, trajectory.data)[0], step.before
    direction = torch.randn(theta.shape, generator=generator(1), dtype=theta.dtype)
    before = torch.get_rng_state()
    found: Any = per_sample.output_products(
        function, theta, inputs, direction[None], getattr(forward_derivatives, push)
    )

    def outputs(point: Tensor) -> Tensor:
        with function.evaluating(gradients=False):
            return function.batch(function.parameters(point), inputs)

    difference = (outputs(theta + 1e-6 * direction) - outputs(theta - 1e-6 * direction)) / 2e-6
    assert (found[0] - difference).abs().max() < 1e-6 * difference.abs().max()
    assert torch.equal(torch.get_rng_state(), before)
