"""What a loop carries from one step to the next: hidden states, graphs, schedules, and errors that it goes on from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pathkernel as pk
from pathkernel.errors import SampleIdError, UnsupportedModelError

N, LENGTH, CHUNK, H = 6, 12, 4, 5
T = torch.float64


def sequences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, LENGTH, 4, generator=generator, dtype=T), torch.randint(3, (N, LENGTH), generator=generator)


def loss(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), t.flatten())


def mapped(state: Any, change: Any) -> Any:
    return tuple(change(part) for part in state) if isinstance(state, (tuple, list)) else change(state)


class Recurrent(nn.Module):
    """Takes its state with the samples first, and returns it so."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.out = kind(4, H, batch_first=True, dtype=T), nn.Linear(H, 3, dtype=T)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        z, state = self.rnn(x, mapped(state, lambda part: part.transpose(0, 1).contiguous()))
        return self.out(z), mapped(state, lambda part: part.transpose(0, 1))


def fresh(kind: type[nn.RNNBase], n: int = N) -> Any:
    zeros = torch.zeros(n, 1, H, dtype=T)
    return (zeros, zeros) if kind is nn.LSTM else zeros


@pytest.mark.parametrize("level", [pk.Every(), pk.Keyframes(2)], ids=["every", "keyframes"])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_state_is_an_input(kind: type[nn.RNNBase], level: Any) -> None:
    """Truncated back-propagation through time: the detached state is announced with the chunk."""
    model, (S, targets) = Recurrent(kind), sequences()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    data = ((S[:, :CHUNK], fresh(kind)), targets[:, :CHUNK])
    with pk.KernelRecorder(model, optimizer, loss, data=data, returns=0, audit_every=1, schedule=level) as recorder:
        for _ in range(2):
            state = fresh(kind)
            for x, t in zip(S.split(CHUNK, 1), targets.split(CHUNK, 1), strict=True):
                recorder.announce(range(N), inputs=(x, state), targets=t)
                optimizer.zero_grad()
                z, state = model(x, state)
                loss(z, t).backward()
                optimizer.step()
                state = mapped(state, Tensor.detach)
    queries = S[:2, CHUNK : 2 * CHUNK], mapped(state, lambda part: part[:2])
    machine = pk.KernelMachine(recorder.trajectory)
    with torch.no_grad():
        expected = model(*queries)[0].flatten(1).numpy()
    np.testing.assert_allclose(machine.decision_function(queries), expected, atol=1e-12)
    why = machine.explain(queries, outputs=1)
    assert why.relative_residual < 1e-9 and why.split_error < 1e-9


def test_state_that_lies_across() -> None:
    """torch's own axis for states is named, with what to write."""
    recorder = pk.KernelRecorder(
        model := Recurrent(nn.GRU), torch.optim.SGD(model.parameters(), lr=0.1), loss, data=sequences(), returns=0
    )
    with pytest.raises(SampleIdError, match=r"shape \(1, 6, 5\), whose samples lie along the second.*transpose"):
        recorder.announce(range(N), inputs=(sequences()[0], torch.zeros(1, N, H, dtype=T)))


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(4, H, batch_first=True, dtype=T), nn.Linear(H, 3, dtype=T)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        z, state = self.rnn(x, self.state)
        self.state = state.detach()
        return self.out(z)


def test_state_in_an_attribute() -> None:
    """Refused before training, with the cure."""
    model, (S, targets) = Stateful(), sequences()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pk.KernelRecorder(model, optimizer, loss, data=(S, targets)) as recorder,
        pytest.raises(UnsupportedModelError, match=r"be an input and an output.*announce\(ids, inputs=\(x, h\)\)"),
    ):
        next(recorder.batches(N))


@pytest.mark.parametrize("audit_every", [0, 1])
def test_graph_that_was_kept(audit_every: int) -> None:
    """A loss of an earlier pass that is differentiated again is named as such, not as unannounced samples."""
    model, X, y = nn.Linear(4, 3, dtype=T), torch.randn(8, 4, dtype=T), torch.randint(3, (8,))
    optimizer, ce = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    total: Any = 0.0
    with (
        pk.KernelRecorder(model, optimizer, ce, data=(X, y), audit_every=audit_every) as recorder,
        pytest.raises(SampleIdError, match=r"from before the last step, which was kept.*total \+= loss.item\(\)"),
    ):
        for x, t in recorder.batches(4):
            optimizer.zero_grad()
            total = total + ce(model(x), t)
            total.backward(retain_graph=True)
            optimizer.step()


def test_warm_up_from_zero_and_loss_weights_that_change() -> None:
    """A step at learning rate 0, and a loss whose terms are weighted anew at each step."""
    model, X, y = nn.Linear(4, 3, dtype=T), torch.randn(8, 4, dtype=T), torch.randint(3, (8,))
    optimizer, ce = torch.optim.AdamW(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
    with pk.KernelRecorder(model, optimizer, data=(X, y), task="classification", audit_every=1) as recorder:
        for step in range(5):
            x, t = recorder.announce(torch.arange(4) + step % 2)
            optimizer.zero_grad()
            z = model(x)
            (ce(z, t) / (1 + step) + step * z.square().mean()).backward()
            optimizer.step()
            schedule.step()
    trajectory = recorder.trajectory
    assert torch.equal(trajectory.vector(0), trajectory.vector(1))
    machine = pk.KernelMachine(trajectory)
    np.testing.assert_allclose(machine.decision_function(X), model(X).detach().numpy(), atol=1e-12)
    assert set(machine.explain(X[:2]).channels) <= {"initial", "weight_decay", "rounding"}
    assert np.isfinite(pk.PathKernel(trajectory)(X)).all()


# -- as in a notebook -----------------------------------------------------------------------------------------------


class Cells:
    """A model and a loop in cells of their own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5, dtype=T), nn.Tanh(), nn.Linear(5, 3, dtype=T))
        self.X, self.y = torch.randn(8, 4, dtype=T), torch.randint(3, (8,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def recorder(self, **options: Any) -> pk.KernelRecorder:
        return pk.KernelRecorder(
            self.model, self.optimizer, nn.CrossEntropyLoss(), data=(self.X, self.y), audit_every=1, **options
        )

    def train(self, *recorders: pk.KernelRecorder, steps: int = 2, fails: str = "") -> None:
        for step in range(steps):
            for recorder in recorders:
                x, t = recorder.announce((torch.arange(4) + step) % 8)
            for moment in ("announced", "forward", "backward", "stepped"):
                if moment == "forward":
                    self.optimizer.zero_grad()
                    value = nn.functional.cross_entropy(self.model(x), t)
                elif moment == "backward":
                    value.backward()
                elif moment == "stepped":
                    self.optimizer.step()
                if moment == fails:
                    raise ZeroDivisionError

    def check(self, recorder: pk.KernelRecorder, steps: int) -> None:
        machine = pk.KernelMachine(recorder.trajectory)
        assert len(recorder.trajectory) == steps
        np.testing.assert_allclose(machine.decision_function(self.X), self.model(self.X).detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("level", [pk.Every(), pk.Keyframes(2)], ids=["every", "keyframes"])
def test_errors_in_the_loop_and_going_on(level: Any) -> None:
    """Whatever the loop had come to: the batch that it left is nobody's."""
    cells = Cells()
    recorder = cells.recorder(schedule=level)
    recorder.start()
    for moment in ("announced", "forward", "backward", "stepped"):
        with pytest.raises(ZeroDivisionError):
            cells.train(recorder, fails=moment)
        cells.train(recorder)
    cells.check(recorder, 9)  # never closed
    recorder.close()
    cells.check(recorder, 9)


def test_cell_that_is_run_again() -> None:
    """A recorder in place of one that was never closed, which keeps what it has seen."""
    cells = Cells()
    first = cells.recorder()
    first.start()
    cells.train(first)
    second = cells.recorder()
    with pytest.warns(RuntimeWarning, match="still open"):
        second.start()
    cells.train(second)
    cells.check(second, 2)
    assert len(first.trajectory) == 2
    first.close()
    second.close()


def test_one_model_under_two_recorders() -> None:
    """Both see every step."""
    cells = Cells()
    with cells.recorder() as one, cells.recorder(schedule=pk.Keyframes(2)) as other:
        cells.train(one, other, steps=3)
    cells.check(one, 3)
    cells.check(other, 3)
