"""Samples that are not of the training data: those that a generator makes, and its latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import generator
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.recording.sources import Sources

RATE, STEPS, B = 0.05, 6, 4


def train(record: bool, **options: Any) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A linear critic and a linear generator in turns, by ordinary lines; with what each sample did by closed form."""
    g = generator(5)
    real = torch.randn(10, 2, generator=g).double() + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        critic, maker = nn.Linear(2, 1).double(), nn.Linear(3, 2).double()
    loss = nn.BCEWithLogitsLoss()
    of_critic, of_maker = (torch.optim.SGD(m.parameters(), lr=RATE) for m in (critic, maker))
    query, latent = torch.tensor([[0.3, -0.7]]).double(), torch.tensor([[0.1, 0.2, -0.4]]).double()
    told: dict[str, Any] = {"query": query, "latent": latent, "real": real}
    critic_recorder = pk.KernelRecorder(critic, of_critic, loss, data=(real, torch.ones(10, 1).double()), **options)
    maker_recorder = pk.KernelRecorder(maker, of_maker)
    if record:
        critic_recorder.start()
        maker_recorder.start()
    shares, fakes, latents = np.zeros(10), [], []
    for step in range(STEPS):
        ids = (torch.arange(B) + 3 * step) % 10
        noise = torch.randn(B, 3, generator=g).double()
        if record:
            critic_recorder.announce(ids)
        of_critic.zero_grad()
        z = critic(real[ids])
        loss(z, torch.ones_like(z)).backward()
        np.add.at(shares, ids.numpy(), moved(z, 1, real[ids], query))
        with maker_recorder.source("latents"):
            fake = maker(noise)
        with critic_recorder.source("generated"):
            z = critic(fake.detach())
            loss(z, torch.zeros_like(z)).backward()
        fakes.append(moved(z, 0, fake.detach(), query))
        of_critic.step()
        of_maker.zero_grad()
        with critic_recorder.source("generated"):  # whose gradients in the critic are cleared: nobody's
            z = critic(fake)
        slope = torch.autograd.grad(loss(z, torch.ones_like(z)), fake, retain_graph=True)[0]
        latents.append((-RATE * slope[:, :1] * (noise @ latent.T + 1)).numpy()[:, 0])  # of the first output
        loss(z, torch.ones_like(z)).backward()
        of_maker.step()
    told |= {"real shares": shares, "fakes": np.concatenate(fakes), "latents": np.concatenate(latents)}
    if record:
        told |= {"critic": critic_recorder.close(), "maker": maker_recorder.close()}
    return critic, maker, told


def moved(z: Tensor, target: int, x: Tensor, query: Tensor) -> np.ndarray:
    """What each row moved the linear critic's output for a query by: -rate λ (x q + 1)."""
    slope = (torch.sigmoid(z) - target).detach() / len(z)
    return np.asarray((-RATE * slope * (x @ query.T + 1)).numpy()[:, 0])


def test_both_players_are_kernel_machines_over_what_they_saw() -> None:
    _, _, told = train(record=True)
    why = pk.KernelMachine(told["critic"]).explain(told["query"])
    assert why.sources == {"generated": slice(10, 10 + STEPS * B)}
    np.testing.assert_allclose(why.shares[0, :10], told["real shares"], atol=1e-14)
    np.testing.assert_allclose(why.shares[0, why.sources["generated"]], told["fakes"], atol=1e-14)
    assert why.residual.max() < 1e-12 and "generated" in repr(why)
    assert why.by_class(np.zeros(10))[0.0] == pytest.approx(told["real shares"].sum())
    made = pk.KernelMachine(told["maker"]).explain(told["latent"], outputs=0)
    np.testing.assert_allclose(made.shares[0, made.sources["latents"]], told["latents"], atol=1e-14)
    assert made.residual.max() < 1e-12


def test_training_is_as_without() -> None:
    plain, recorded = train(record=False), train(record=True)
    for one, other in zip(plain[:2], recorded[:2], strict=True):
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_a_source_is_read_back_from_disk(tmp_path: Any) -> None:
    critic, _, told = train(record=True, store=tmp_path / "run")
    opened = pk.Trajectory.open(
        tmp_path / "run", model=critic, loss=nn.BCEWithLogitsLoss(), data=(told["real"], torch.ones(10, 1).double())
    )
    why = pk.KernelMachine(opened).explain(told["query"])
    np.testing.assert_allclose(why.shares[0, why.sources["generated"]], told["fakes"], atol=1e-14)


@pytest.mark.parametrize("number", [None, 10])
def test_a_source_without_data_is_read_back_from_disk(number: int | None, tmp_path: Any) -> None:
    """Its samples are none of the data's, whose number is given or counted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Linear(2, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    X = torch.randn(12, 2, generator=generator(5)).double()
    with (
        pk.KernelRecorder(model, optimizer, data=number, store=tmp_path / "run", task="regression") as recorder,
        recorder.source("rows"),
    ):
        for x in X.split(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    why = pk.KernelMachine(recorder.trajectory).explain(X[:2])
    opened = pk.Trajectory.open(tmp_path / "run", model=model, data=number)
    again = pk.KernelMachine(opened).explain(X[:2])
    assert why.shares.shape == (2, 12 + (number or 0)) and again.sources == why.sources
    np.testing.assert_array_equal(again.shares, why.shares)
    assert list(again.channels) == list(why.channels)


def test_a_frame_names_the_source() -> None:
    pytest.importorskip("pandas")
    _, _, told = train(record=True)
    frame = pk.KernelMachine(told["critic"]).explain(told["query"]).to_frame()
    rows = frame[frame.source == "generated"]
    assert rows.training_sample.tolist() == list(range(STEPS * B))
    np.testing.assert_allclose(rows.share, told["fakes"], atol=1e-14)


def test_streamed_shares_grow_with_the_source() -> None:
    query = torch.tensor([[0.3, -0.7]]).double()
    streamed = pk.StreamingShares(query)
    _, _, told = train(record=True, observers=[streamed])
    np.testing.assert_allclose(
        streamed.result.shares[0, streamed.result.sources["generated"]], told["fakes"], atol=1e-14
    )


@pytest.mark.parametrize("name", ["", 3])
def test_a_source_has_a_name(name: Any) -> None:
    model = nn.Linear(2, 1)
    recorder = pk.KernelRecorder(
        model, torch.optim.SGD(model.parameters(), lr=0.1), data=(torch.zeros(2, 2), torch.zeros(2))
    )
    with pytest.raises(pk.errors.InputError, match="was called"), recorder.source(name):
        pass


def test_recordings_without_sources_do_not_read_their_record() -> None:
    class Unread:
        def __len__(self) -> int:
            raise AssertionError("the record was read")

    assert Sources(Unread()).number([]) == []  # type: ignore[arg-type]
