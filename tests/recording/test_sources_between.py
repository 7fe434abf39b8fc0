"""Passes of sources and of the training data in any order: each is of its own samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import generator
from torch import Tensor, nn

import pathkernel as pk

RATE, STEPS, N, B = 0.1, 4, 9, 3
Pass = tuple[Tensor, Callable[[Tensor], Tensor], Tensor | None]
"""Inputs, what the loop makes of the outputs, and ids; None for those of a source."""


def passes(step: int) -> tuple[list[Tensor], list[Callable[[Tensor], Tensor]]]:
    """Made samples of a step and the losses on real and made ones, by their places."""
    g = generator(step)
    made = [torch.randn(B, 2, generator=g).double() for _ in range(2)]
    return made, [lambda z: z.square().mean(), lambda z: z.sin().sum(), lambda z: 0.3 * z.cos().sum()]


def train(order: str, backward_at_once: bool = False) -> tuple[pk.Trajectory, np.ndarray, np.ndarray, Tensor]:
    """A linear network; "r" is a pass of announced samples, "m" one of made ones. Shares by closed form."""
    real = torch.randn(N, 2, generator=generator(7)).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Linear(2, 1).double()
    query = torch.tensor([[0.3, -0.7]]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    shares, made_shares = np.zeros(N), []
    with pk.KernelRecorder(model, optimizer, data=(real, real.sum(1))) as recorder:
        for step in range(STEPS):
            ids = (torch.arange(B) + 2 * step) % N
            recorder.announce(ids)
            optimizer.zero_grad()
            made, losses = passes(step)
            waiting = []
            for place, kind in enumerate(order):
                x = real[ids] if kind == "r" else made.pop()
                if kind == "r":
                    z = model(x)
                else:
                    with recorder.source("made"):
                        z = model(x)
                loss = losses[place](z)
                slope = torch.autograd.grad(loss, z, retain_graph=True)[0]
                moved = np.asarray((-RATE * slope * (x @ query.T + 1)).numpy()[:, 0])
                if kind == "r":
                    np.add.at(shares, ids.numpy(), moved)
                else:
                    made_shares.append(moved)
                waiting.append(loss)
                if backward_at_once:
                    loss.backward()
            if not backward_at_once:
                torch.stack(waiting).sum().backward()
            optimizer.step()
    return recorder.trajectory, shares, np.concatenate(made_shares), query


@pytest.mark.parametrize("backward_at_once", [False, True])
@pytest.mark.parametrize("order", ["mr", "rmr", "mmr", "mrm"])
def test_a_pass_outside_a_source_is_of_the_announced_samples(order: str, backward_at_once: bool) -> None:
    trajectory, shares, made, query = train(order, backward_at_once)
    why = pk.KernelMachine(trajectory).explain(query)
    np.testing.assert_allclose(why.shares[0, :N], shares, atol=1e-13)
    np.testing.assert_allclose(why.shares[0, why.sources["made"]], made, atol=1e-13)


def test_a_batch_waits_for_its_pass_while_a_source_is_stepped_by() -> None:
    """A step by made samples alone, between the announcement and its pass."""
    real = torch.randn(N, 2, generator=generator(7)).double()
    model = nn.Linear(2, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with pk.KernelRecorder(model, optimizer, data=(real, real.sum(1))) as recorder:
        recorder.announce([4, 5, 6])
        with recorder.source("made"):
            model(real[:3] + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model(real[4:7]).square().mean().backward()
        optimizer.step()
    batches = [step.batches for step in recorder.trajectory.steps()]
    assert [[(one.source, one.ids.tolist()) for one in own] for own in batches] == [
        [("made", [0, 1, 2])],
        [(None, [4, 5, 6])],
    ]


def test_a_pass_of_nobody_is_none_of_the_source_before() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    x = torch.randn(3, 2, generator=generator(0))
    with (
        pytest.raises(pk.errors.SampleIdError, match="not announced"),
        pk.KernelRecorder(model, optimizer, data=3) as recorder,
    ):
        with recorder.source("made"):
            z = model(x)
        (z.sum() + model(2 * x).sum()).backward()
        optimizer.step()


@pytest.mark.parametrize("ended", [True, False])
def test_ids_of_a_source_are_none_of_the_data(tmp_path: Path, ended: bool) -> None:
    """Where nobody says how many samples there are, a store that is read again counts those that were announced."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    x = torch.randn(3, 2, generator=generator(0))

    def step() -> None:
        optimizer.zero_grad()
        with recorder.source("made"):
            model(x).square().mean().backward()
        optimizer.step()

    with pk.KernelRecorder(model, optimizer, store=tmp_path / "run") as recorder:
        step()
        step()
    if not ended:
        with pk.KernelRecorder(model, optimizer, store=tmp_path / "run") as recorder:
            step()
    opened = pk.Trajectory.open(tmp_path / "run", model=model)
    why = pk.KernelMachine(opened).explain(x[:1])
    count = 6 if ended else 9
    assert why.shares.shape == (1, count)
    assert why.sources == {"made": slice(0, count)}
