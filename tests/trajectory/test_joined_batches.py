"""Small passes of one step are computed as one batch, with the same shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import generator
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.trajectory import joined_batches
from pathkernel.trajectory.recomputed_batches import RecomputedBatches
from pathkernel.trajectory.step import MicroBatch


class Counted(nn.Module):
    """A network that returns single samples without their axis, or couples samples in training."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        if self.form == "coupled" and self.training:
            z = z - z.mean(dim=0) / 2
        return z.squeeze(0) if self.form == "squeezed" else z


def recorded(form: str = "plain", passes: int = 6) -> tuple[pk.Trajectory, Tensor]:
    """Policy gradient in small: many forward passes of one sample, one backward pass, one step."""
    g = generator(1)
    X = torch.randn(passes * 3, 4, generator=g).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Counted(form).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, data=(X, torch.zeros(len(X)))) as recorder:
        for ids in torch.arange(len(X)).split(passes):
            optimizer.zero_grad()
            terms = []
            for i in ids:
                recorder.announce(i[None])
                z = model(X[i][None]).reshape(-1)
                terms.append(torch.log_softmax(z, 0)[int(i) % 2] * (float(i) / 10 - 1))
            torch.stack(terms).sum().backward()
            optimizer.step()
    return recorder.trajectory, X[:3]


def explained(
    trajectory: pk.Trajectory, queries: Tensor, monkeypatch: pytest.MonkeyPatch, small: int
) -> tuple[pk.Attributions, list[int]]:
    """An explanation with passes of up to so many samples joined, and the sizes of the batches that were run."""
    sizes: list[int] = []
    rows = RecomputedBatches._rows

    def counted(self: RecomputedBatches, batch: MicroBatch, *rest: Any) -> Any:
        sizes.append(len(batch.ids))
        return rows(self, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(joined_batches, "SMALL", small)
        patch.setattr(RecomputedBatches, "_rows", counted)
        return pk.KernelMachine(trajectory).explain(queries), sizes


@pytest.mark.parametrize("form", ["plain", "squeezed", "coupled"])
def test_shares_are_those_of_single_passes(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, queries = recorded(form)
    assert [len(step.batches) for step in trajectory.steps()] == [6, 6, 6]
    why, _ = explained(trajectory, queries, monkeypatch, small=16)
    single, _ = explained(trajectory, queries, monkeypatch, small=0)
    np.testing.assert_allclose(why.shares, single.shares, atol=1e-14)
    assert why.residual.max() < 1e-10 and why.split_error < 1e-10


def test_passes_are_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, queries = recorded()
    _, together = explained(trajectory, queries, monkeypatch, small=16)
    _, single = explained(trajectory, queries, monkeypatch, small=0)
    assert together == [6, 6, 6]
    assert single == [1] * 18


def test_passes_that_couple_samples_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, queries = recorded("coupled")
    _, sizes = explained(trajectory, queries, monkeypatch, small=16)
    assert sizes == [1] * 18


class Scaled(nn.Module):
    """A network that is given a tensor which all samples of a pass share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.linear(x) * scale


@pytest.mark.parametrize("changes", [False, True])
def test_passes_that_were_given_other_shared_tensors_are_not_joined(
    changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = generator(4)
    X = torch.randn(6, 4, generator=g).double()
    model = Scaled().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, data=(X, torch.zeros(6))) as recorder:
        for ids in torch.arange(6).split(3):
            optimizer.zero_grad()
            for i in ids:
                recorder.announce(i[None])
                scale = torch.tensor([1.0, 2.0 + int(i) * changes]).double()
                model(X[i][None], scale).square().sum().backward()
            optimizer.step()
    why, sizes = explained(recorder.trajectory, X[:2], monkeypatch, small=16)
    single, _ = explained(recorder.trajectory, X[:2], monkeypatch, small=0)
    assert sizes == ([1] * 6 if changes else [3, 3])
    np.testing.assert_allclose(why.shares, single.shares, atol=1e-14)
