"""Rows of a batch that belong to several samples (mixup): what each of them gets of the row's contribution."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cases import generator
from torch import Tensor, nn

import pathkernel as pk

RATE, STEPS = 0.1, 5


def mixed_run(
    store: str | None = None, inputs: bool = True, as_dataset: bool = False, **options: object
) -> tuple[pk.KernelRecorder, Tensor, np.ndarray]:
    """A linear network trained on mixed rows, queries, and the shares by the closed form of a linear network.

    ``f(x) = w x + b`` has the gradient ``(x, 1)``, so that a row r moves ``f(q)`` by ``-rate λ_r (x_r q + 1)``.
    """
    g = generator(3)
    X, y = torch.randn(12, 3, generator=g).double(), torch.randn(12, 1, generator=g).double()
    queries = torch.randn(4, 3, generator=g).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=RATE), nn.MSELoss()
    shares = np.zeros((4, 12))
    data = torch.utils.data.TensorDataset(X, y) if as_dataset else (X, y)
    with pk.KernelRecorder(model, optimizer, loss, data=data, store=store, **options) as recorder:  # type: ignore[arg-type]
        for _ in range(STEPS):
            first = torch.randperm(12, generator=g)[:6]
            second, part = first[torch.randperm(6, generator=g)], torch.rand((), generator=g).double().item()
            x = part * X[first] + (1 - part) * X[second]
            given = {"inputs": x} if inputs else {}
            recorder.announce(torch.stack([first, second], 1), weights=[part, 1 - part], **given)
            optimizer.zero_grad()
            z = model(x)
            (part * loss(z, y[first]) + (1 - part) * loss(z, y[second])).backward()
            slope = 2 / 6 * (z - part * y[first] - (1 - part) * y[second]).detach()
            moved = -RATE * slope * (x @ queries.T + 1)  # (rows, queries)
            np.add.at(shares.T, first.numpy(), part * moved.numpy())
            np.add.at(shares.T, second.numpy(), (1 - part) * moved.numpy())
            optimizer.step()
    return recorder, queries, shares


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("form", ["folded", "average", "ensemble"])
def test_each_sample_gets_its_part_of_the_row(form: str, inputs: bool, as_dataset: bool) -> None:
    recorder, queries, expected = mixed_run(inputs=inputs, as_dataset=as_dataset)
    why = pk.KernelMachine(recorder.trajectory, form=form).explain(queries)
    np.testing.assert_allclose(why.shares, expected, atol=1e-14)
    assert why.residual.max() < 1e-12
    assert why.form is None or np.allclose(why.form.shares, expected, atol=1e-14)


def test_by_module_and_streamed() -> None:
    shares = pk.StreamingShares(torch.zeros(1, 3).double())
    recorder, queries, expected = mixed_run(observers=[shares])
    why = pk.KernelMachine(recorder.trajectory).explain(queries, by="module")
    np.testing.assert_allclose(sum(why.modules.values()), expected, atol=1e-14)
    streamed = pk.KernelMachine(recorder.trajectory).explain(torch.zeros(1, 3).double())
    np.testing.assert_allclose(shares.result.shares, streamed.shares, atol=1e-14)


def test_shared_rows_are_read_back_from_disk(tmp_path: object) -> None:
    recorder, queries, expected = mixed_run(store=str(tmp_path) + "/run")
    trajectory = recorder.trajectory
    opened = pk.Trajectory.open(
        str(tmp_path) + "/run", model=trajectory.model, loss=nn.MSELoss(), data=(trajectory.data[torch.arange(12)])
    )
    np.testing.assert_allclose(pk.KernelMachine(opened).explain(queries).shares, expected, atol=1e-14)


@pytest.mark.parametrize("weights", [None, [0.5, 0.6], [[0.5, 0.5]]])
def test_parts_that_do_not_add_up_are_refused(weights: object) -> None:
    model = nn.Linear(3, 1)
    recorder = pk.KernelRecorder(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), data=(torch.zeros(4, 3), torch.zeros(4, 1))
    )
    with pytest.raises(pk.errors.SampleIdError, match=re.escape("Ids of shape (2, 2) were announced with")):
        recorder.announce([[0, 1], [1, 2]], weights=weights, inputs=torch.zeros(2, 3))
