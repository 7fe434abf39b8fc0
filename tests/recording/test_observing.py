"""Those who look on see every step, whatever the others do, and nobody's result lacks a step in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import make_inputs
from tolerances import TOLERANCES
from torch import nn

import pathkernel as pk

ROUNDING = TOLERANCES[torch.float64].rounding
X, y = make_inputs(12), make_inputs(12, (2,), seed=2)
LOSS = nn.MSELoss()
LEVELS = [pk.Every(), pk.Every(3), pk.Keyframes(2), pk.WeightsOnly(), pk.Nothing()]


class Noting(pk.StepObserver):
    """Keeps what it is shown, and does something to it or the other way round."""

    name = "notes"

    def __init__(self, act: Any = None) -> None:
        self.act, self.seen = act, []

    def begin(self, trajectory, settings):
        self.trajectory = trajectory

    def observe(self, step):
        self.seen.append(step.index)
        if self.act is not None:
            self.act(self, step)


class Loop:
    """A network in training, watched."""

    def __init__(self, observers: Any = (), schedule: Any = None, head: bool = False) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.optimizer = torch.optim.SGD(self.model[2].parameters() if head else self.model.parameters(), lr=0.1)
        self.model[0].requires_grad_(not head)
        self.recorder = pk.KernelRecorder(
            self.model, self.optimizer, LOSS, data=(X, y), observers=observers, schedule=schedule
        )

    def epoch(self) -> Loop:
        for x, target in self.recorder.batches(4):
            self.optimizer.zero_grad()
            LOSS(self.model(x), target).backward()
            self.optimizer.step()
        return self


def whole() -> pk.Trajectory:
    loop = Loop()
    with loop.recorder:
        loop.epoch().epoch()
    return loop.recorder.trajectory


@pytest.mark.parametrize("schedule", LEVELS, ids=repr)
def test_a_break_is_no_new_beginning(schedule: Any) -> None:
    features, gram, shares = pk.StreamingFeatures(X[:5], 32), pk.StreamingGram(X[:5]), pk.StreamingShares(X[:3])
    loop = Loop([features, gram, shares], schedule)
    for _ in range(2):
        with loop.recorder:
            loop.epoch()
    trajectory = whole()
    kernel = pk.PathKernel(trajectory)
    np.testing.assert_allclose(features.result, kernel.features(X[:5], 32), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(gram.result, kernel(X[:5]), rtol=0, atol=ROUNDING)
    why = pk.KernelMachine(trajectory).explain(X[:3], outputs="all")
    np.testing.assert_allclose(shares.result.shares, why.shares, rtol=0, atol=ROUNDING)


def fail_at(place: int) -> Any:
    def act(observer, step):
        if step.index == place:
            raise RuntimeError("a fault of its own")

    return act


@pytest.mark.parametrize("schedule", LEVELS, ids=repr)
@pytest.mark.parametrize("place", [0, 2])
def test_an_error_of_one_observer_keeps_no_step_from_the_others(schedule: Any, place: int) -> None:
    first, gram, last = Noting(fail_at(place)), pk.StreamingGram(X[:5]), Noting()
    loop, raised = Loop([first, gram, last], schedule), 0
    with loop.recorder:
        for x, target in loop.recorder.batches(4):
            loop.optimizer.zero_grad()
            LOSS(loop.model(x), target).backward()
            try:
                loop.optimizer.step()
            except RuntimeError as error:
                assert str(error) == "a fault of its own"
                raised += 1
        loop.epoch() if place else None
    assert raised == 1 and first.seen == last.seen == list(range(6 if place else 3))
    expected = Loop()
    with expected.recorder:
        expected.epoch()
        expected.epoch() if place else None
    kernel = pk.PathKernel(expected.recorder.trajectory)
    np.testing.assert_allclose(gram.result, kernel(X[:5]), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", [pk.StreamingGram, pk.StreamingFeatures, pk.StreamingShares])
def test_a_result_that_lacks_a_step_is_refused(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    observer, observe = kind(X[:3]), kind.observe

    def out_of_memory(self, step):
        if step.index == 1:
            raise MemoryError
        observe(self, step)

    monkeypatch.setattr(kind, "observe", out_of_memory)
    loop = Loop([observer])
    with loop.recorder:
        for x, target in loop.recorder.batches(4):
            loop.optimizer.zero_grad()
            LOSS(loop.model(x), target).backward()
            try:
                loop.optimizer.step()
            except MemoryError:
                continue
    with pytest.raises(pk.errors.TrajectoryError, match=f"`{kind.__name__}` was asked .* error at step 1"):
        observer.result  # noqa: B018
    again = Loop([observer])
    monkeypatch.setattr(kind, "observe", observe)
    with again.recorder:
        again.epoch()
    observer.result  # noqa: B018  # another run, of which it has seen all


WRITES = {
    "initial": lambda o, step: o.trajectory.initial.zero_(),
    "before": lambda o, step: step.before.zero_(),
    "after": lambda o, step: step.after.mul_(2),
    "gradient": lambda o, step: step.gradient.clamp_(-0.1, 0.1),
    "hyperparameters": lambda o, step: step.hyperparameters[0].update(lr=1.0),
    r"batches\[0\].cotangents": lambda o, step: step.batches[0].cotangents.zero_(),
    r"batches\[0\].ids": lambda o, step: step.batches[0].ids.zero_(),
}


@pytest.mark.parametrize("schedule", LEVELS, ids=repr)
@pytest.mark.parametrize("what", WRITES)
def test_an_observer_that_writes_on_what_it_is_shown_is_named(schedule: Any, what: str) -> None:
    loop = Loop([Noting(WRITES[what])], schedule)
    with (
        loop.recorder,
        pytest.raises(pk.errors.RecordingError, match=rf"Noting.observe changed .*`{what}`.* of step 0"),
    ):
        loop.epoch()


@pytest.mark.parametrize("schedule", [pk.Every(), pk.Nothing()], ids=repr)
def test_parameters_may_join_while_somebody_looks_on(schedule: Any) -> None:
    shares, features = pk.StreamingShares(X[:3]), pk.StreamingFeatures(X[:5], 32)

    def train(observers: Any, schedule: Any) -> pk.Trajectory:
        loop = Loop(observers, schedule, head=True)
        with loop.recorder:
            loop.epoch()
            loop.model[0].requires_grad_(True)
            loop.optimizer.add_param_group({"params": list(loop.model[0].parameters())})
            loop.epoch()
        return loop.recorder.trajectory

    train([shares, features], schedule)
    why = pk.KernelMachine(train([], None)).explain(X[:3], outputs="all")
    np.testing.assert_allclose(shares.result.shares, why.shares, rtol=0, atol=ROUNDING)
    assert shares.result.residual.max() < ROUNDING
    assert features.result.shape == (5, 32)
