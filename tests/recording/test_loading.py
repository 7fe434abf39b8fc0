"""Weights loaded in mid-run, and averages swapped in and out: a named event, or none at all."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import generator, make_inputs
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import RecordingError
from pathkernel.recording.forward import Hook

CE = nn.CrossEntropyLoss()
SAMPLES = 12
QUERIES = make_inputs(4, dtype=torch.float64, seed=8)
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
}
LEVELS = {"every": pk.Every(), "keyframes": pk.Keyframes(3)}


class Run:
    """A loop with batch normalisation, step by step."""

    def __init__(self, optimizer: Any = "momentum", dtype: torch.dtype = torch.float64, **options: Any) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
        self.model = nn.Sequential(*layers).to(dtype)
        self.data = make_inputs(SAMPLES, dtype=dtype), torch.randint(3, (SAMPLES,), generator=generator(2))
        make = OPTIMIZERS.get(optimizer, optimizer)
        self.optimizer = make(self.model.parameters())
        self.recorder = pk.KernelRecorder(self.model, self.optimizer, CE, data=self.data, **options)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x, y = self.recorder.batch((torch.arange(5) + 2 * self.step) % SAMPLES)
            self.optimizer.zero_grad()
            CE(self.model.train()(x), y).backward()
            self.optimizer.step()
            self.step += 1

    def states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict())

    @contextmanager
    def weights(self, state: dict[str, Tensor]) -> Iterator[None]:
        """Swap other weights in, and back."""
        kept = copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(state)
        yield
        self.model.load_state_dict(kept)


def outputs(model: nn.Module, state: dict[str, Tensor]) -> np.ndarray:
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    with torch.no_grad():
        return model.eval()(QUERIES).numpy()


def check(machine: pk.KernelMachine, expected: np.ndarray) -> dict[str, np.ndarray]:
    """The machine is exact, and nothing is left without a name; returns its channels."""
    np.testing.assert_allclose(machine.decision_function(QUERIES), expected, atol=1e-12)
    why = machine.explain(QUERIES, outputs=1)
    np.testing.assert_allclose(why.reconstruction, expected[:, 1], atol=1e-12)
    assert np.abs(why.channels.get("unexplained", np.zeros(1))).max() < 1e-12
    return why.channels


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("level", LEVELS)
def test_best_reloaded_at_the_end(optimizer: str, level: str, tmp_path: Path) -> None:
    """Early stopping: either end is explained, from memory and from disk."""
    run = Run(optimizer, schedule=LEVELS[level], store=tmp_path / "run")
    with run.recorder:
        run.train(4)
        best = run.states()[0]
        run.train(3)
        run.model.load_state_dict(best)
    expected = outputs(run.model, best)
    opened = pk.Trajectory.open(tmp_path / "run", model=run.model, loss=CE, data=run.data)
    for trajectory in (run.recorder.trajectory, opened):
        assert [name for name, _ in trajectory.tail] == ["loaded"]
        assert np.abs(check(pk.KernelMachine(trajectory), expected)["loaded"]).max() > 1e-3
        assert "loaded" not in check(pk.KernelMachine(trajectory, at=4), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("level", LEVELS)
def test_reloaded_in_mid_run(optimizer: str, level: str) -> None:
    """Weights alone, then weights with the optimizer's state; training goes on."""
    run = Run(optimizer, schedule=LEVELS[level])
    with run.recorder:
        run.train(2)
        weights, state = run.states()
        run.train(2)
        run.model.load_state_dict(weights)
        run.train(2)
        run.model.load_state_dict(weights)
        run.optimizer.load_state_dict(state)
        run.train(2)
    trajectory = run.recorder.trajectory
    assert [name for s in trajectory.segments() if s.step is None for name in [s.channel]] == ["loaded", "loaded"]
    assert "loaded" in check(pk.KernelMachine(trajectory), outputs(run.model, run.model.state_dict()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("level", LEVELS)
def test_state_of_the_optimizer_alone(optimizer: str, level: str) -> None:
    """Its memory is then not the samples': what it adds is in the channel."""
    run = Run(optimizer, schedule=LEVELS[level])
    with run.recorder:
        run.train(2)
        state = run.states()[1]
        run.train(3)
        run.optimizer.load_state_dict(state)
        run.train(2)
    channels = check(pk.KernelMachine(run.recorder.trajectory), outputs(run.model, run.model.state_dict()))
    assert np.abs(channels["loaded"]).max() > 1e-4


def test_submodule() -> None:
    """A part of the network that is loaded by itself."""
    run = Run()
    with run.recorder:
        run.train(2)
        part = copy.deepcopy(run.model[0].state_dict())
        run.train(2)
        with torch.no_grad():
            run.model[3].bias.add_(0.01)
        run.model[0].load_state_dict(part)
        run.train(1)
    changes = run.recorder.trajectory.store.read(4).changes
    assert [name for name, _ in changes] == ["unexplained", "loaded"]


@pytest.mark.parametrize("level", LEVELS)
def test_average_swapped_in_and_out(level: str) -> None:
    """Validation with averaged weights, looked at from the recorder in between, leaves nothing on record."""
    run = Run(schedule=LEVELS[level])
    average = {name: 0.5 * value for name, value in run.model.state_dict().items()}
    with run.recorder:
        run.train(2)
        with run.weights(average):
            assert [name for name, _ in run.recorder.trajectory.tail] == ["loaded"]
        assert run.recorder.trajectory.tail == ()
        run.train(2)
        kept = copy.deepcopy(run.model.state_dict())
        with torch.no_grad():  # as by `copy_to` and `restore` of averaging libraries
            for name, value in run.model.named_parameters():
                value.copy_(average[name])
        run.recorder.flush()
        with torch.no_grad():
            for name, value in run.model.named_parameters():
                value.copy_(kept[name])
        run.train(2)
    trajectory = run.recorder.trajectory
    assert all(segment.step is not None for segment in trajectory.segments())
    assert trajectory.store.read(2).before is trajectory.store.read(1).after
    check(pk.KernelMachine(trajectory), outputs(run.model, run.model.state_dict()))


@pytest.mark.parametrize("level", LEVELS)
def test_change_before_a_swap_stays(level: str) -> None:
    """What was loaded before an average was swapped in is still there afterwards."""
    run = Run(schedule=LEVELS[level])
    first = run.states()[0]
    with run.recorder:
        run.train(3)
        run.model.load_state_dict(first)
        with run.weights({name: 0.5 * value for name, value in first.items()}):
            pass
        run.train(1)
    assert [name for name, _ in run.recorder.trajectory.store.read(3).changes] == ["loaded"]


def test_load_that_fails() -> None:
    """What an error leaves loaded is booked as loaded, and later changes are not."""
    run = Run()
    with run.recorder:
        run.train(1)
        wrong = {**run.states()[0], "0.weight": torch.zeros(8, 4).double(), "3.bias": torch.zeros(9).double()}
        with pytest.raises(RuntimeError, match="size mismatch"):
            run.model.load_state_dict(wrong)
        run.train(1)
    assert [name for name, _ in run.recorder.trajectory.store.read(1).changes] == ["loaded"]


def test_other_tensors_are_noticed() -> None:
    """`assign=True` puts other Parameters into the network, which the optimizer does not hold."""
    run = Run()
    with run.recorder, pytest.raises(RecordingError, match="without `assign=True`"):
        run.train(2)
        run.model.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)
        run.train(1)


def test_memory_that_nobody_can_tell() -> None:
    """Muon mixes the entries of its momentum: refused before the step."""
    run = Run(lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01))
    for p in run.model.parameters():
        p.requires_grad_(p.dim() == 2)
    with run.recorder, pytest.raises(RecordingError, match=r"`optimizer.load_state_dict.*before step 2 of Muon.*alone"):
        run.train(2)
        run.optimizer.load_state_dict(run.states()[1])
        run.train(1)


def test_hooks_are_off_copies_and_afterwards() -> None:
    """Copies and pickles carry dead hooks, and a closed recorder leaves none."""
    run = Run()
    with run.recorder:
        for other in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
            other.load_state_dict({name: 0 * value for name, value in other.state_dict().items()})
        assert run.recorder.trajectory.tail == ()
        wrapped = next(iter(run.model._load_state_dict_pre_hooks.values()))
        assert isinstance(wrapped.hook, Hook)
    for module in run.model.modules():
        assert not module._load_state_dict_pre_hooks and not module._load_state_dict_post_hooks
    assert not run.optimizer._optimizer_load_state_dict_post_hooks
