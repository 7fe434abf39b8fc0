"""Optimizers that join a recording later, and those that the recorder was never given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import generator
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import pathkernel as pk
from pathkernel import errors
from pathkernel.recording import strangers

CE = nn.CrossEntropyLoss()
SAMPLES, BATCH = 16, 4
X = torch.randn(SAMPLES, 5, dtype=torch.float64, generator=generator(1))
Y = torch.randint(3, (SAMPLES,), generator=generator(2))


def network() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def epoch(recorder: pk.KernelRecorder, model: nn.Module, *optimizers: Optimizer) -> None:
    for x, y in recorder.batches(BATCH):
        model.zero_grad()
        CE(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()


def complete(trajectory: pk.Trajectory, steps: int) -> pk.Attributions:
    assert len(trajectory) == steps
    why = pk.KernelMachine(trajectory).explain(X[:2], outputs=0)
    assert why.relative_residual <= 1e-10
    assert why.split_error <= 1e-10
    assert "unexplained" not in why.channels
    return why


# -- attach ------------------------------------------------------------------------------------------------------------


def test_a_recorder_without_optimizer_gets_one_before_training() -> None:
    model = network()
    with pk.KernelRecorder(model, None, CE, data=(X, Y)) as recorder:
        with torch.no_grad():
            model[0].weight.mul_(0.5)  # where recording begins: with the optimizer
        optimizer = Adam(model.parameters(), lr=0.01)
        recorder.attach(optimizer)
        epoch(recorder, model, optimizer)
    complete(recorder.trajectory, 4)
    assert torch.equal(recorder.trajectory.parameters(0)["2.bias"], network()[2].bias)


def test_a_recorder_without_optimizer_says_so() -> None:
    recorder = pk.KernelRecorder(network(), loss=CE, data=(X, Y))
    for call in (lambda: recorder.trajectory, recorder.close, lambda: recorder.announce([0, 1])):
        with pytest.raises(errors.RecordingError, match="no optimizer yet"):
            call()
    with pytest.raises(ValueError, match="of the loop"), recorder:
        raise ValueError("of the loop")


@pytest.mark.parametrize("started", [False, True])
def test_another_rule_joins_before_the_first_step(started: bool) -> None:
    model = network()
    body = SGD(model[0].parameters(), lr=0.1)
    recorder = pk.KernelRecorder(model, body, CE, data=(X, Y), observers=[gram := pk.StreamingGram(X[:2])])
    if started:
        recorder.start()
    head = AdamW(model[2].parameters(), lr=0.01)
    recorder.attach(head)
    with recorder:
        epoch(recorder, model, body, head)
    complete(recorder.trajectory, 4)
    assert recorder.trajectory.rule.name == "SGD and AdamW"
    assert gram.result.shape == (2, 2)


def test_a_batch_that_was_announced_stays_announced() -> None:
    model = network()
    optimizer = SGD(model[0].parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, Y)) as recorder:
        x, y = recorder.announce(torch.arange(4))
        head = AdamW(model[2].parameters(), lr=0.01)
        recorder.attach(head)
        CE(model(x), y).backward()
        optimizer.step()
        head.step()
    complete(recorder.trajectory, 1)


@pytest.mark.parametrize("several", [False, True])
def test_a_copy_takes_the_place_of_an_optimizer(several: bool) -> None:
    """Hooks are lost in copies, as frameworks make them."""
    model = network()
    every = [SGD(model[0].parameters(), lr=0.1, momentum=0.9)]
    if several:
        every.append(Adam(model[2].parameters(), lr=0.01))
    with pk.KernelRecorder(model, every, CE, data=(X, Y), audit_every=1) as recorder:
        epoch(recorder, model, *every)
        states = [one.state_dict() for one in every]
        every = [type(one)(one.param_groups[0]["params"], lr=0.3) for one in every]
        for one, state in zip(every, states, strict=True):
            one.load_state_dict(state)
        with pytest.raises(errors.RecordingError, match="attach"):
            epoch(recorder, model, *every)
        recorder.attach(every)
        epoch(recorder, model, *every)
    complete(recorder.trajectory, 8)


def test_new_parameters_join_under_a_rule_that_is_in_use() -> None:
    """Between two batches, from one optimizer to two; a third then joins these."""
    model = network()
    first = SGD([model[0].weight], lr=0.1, momentum=0.9)
    with pk.KernelRecorder(model, first, CE, data=(X, Y), audit_every=1) as recorder:
        epoch(recorder, model, first)
        second = SGD(model[2].parameters(), lr=0.05)
        recorder.attach(second)
        epoch(recorder, model, first, second)
        third = SGD([model[0].bias], lr=0.2)
        recorder.attach(third)
        epoch(recorder, model, third, second, first)
    active = [len(step.active) for step in recorder.trajectory.steps()]
    assert active == [1] * 4 + [3] * 4 + [4] * 4
    complete(recorder.trajectory, 12)


def test_frozen_parameters_join_with_their_optimizer() -> None:
    model = network()
    model[0].requires_grad_(False)
    head = Adam(model[2].parameters(), lr=0.01)
    with pk.KernelRecorder(model, head, CE, data=(X, Y), audit_every=1) as recorder:
        epoch(recorder, model, head)
        model[0].requires_grad_(True)
        body = Adam(model[0].parameters(), lr=0.001)
        recorder.attach(body)
        epoch(recorder, model, body, head)
    complete(recorder.trajectory, 8)


def test_what_cannot_join_is_refused() -> None:
    model = network()
    body = SGD(model[0].parameters(), lr=0.1)
    with pk.KernelRecorder(model, body, CE, data=(X, Y)) as recorder:
        epoch(recorder, model, body)
        with pytest.raises(errors.RecordingError, match=r"AdamW follows the rule of AdamW.*under SGD"):
            recorder.attach(AdamW(model[2].parameters(), lr=0.01))
        with pytest.raises(errors.RecordingError, match="some of the parameters of SGD, not all"):
            recorder.attach(SGD([model[0].bias, *model[2].parameters()], lr=0.1))
        with pytest.raises(errors.RecordingError, match="not the model's"):
            recorder.attach(SGD(network().parameters(), lr=0.1))
        x, y = recorder.announce(torch.arange(4))
        loss = CE(model(x), y)
        with pytest.raises(errors.RecordingError, match="between forward pass and step"):
            recorder.attach(SGD(model[2].parameters(), lr=0.1))
        body.zero_grad()
        loss.backward()
        body.step()
    complete(recorder.trajectory, 5)


def test_a_store_that_was_begun_keeps_its_rule(tmp_path: Any) -> None:
    model = network()
    body = SGD(model[0].parameters(), lr=0.1)
    with pk.KernelRecorder(model, body, CE, data=(X, Y), store=tmp_path / "run") as recorder:
        with pytest.raises(errors.RecordingError, match="under SGD"):
            recorder.attach(AdamW(model[2].parameters(), lr=0.01))
        recorder.attach(head := SGD(model[2].parameters(), lr=0.01))
        epoch(recorder, model, body, head)
    complete(recorder.trajectory, 4)
    complete(pk.Trajectory.open(tmp_path / "run", model=model, loss=CE, data=(X, Y)), 4)


# -- strangers ---------------------------------------------------------------------------------------------------------


def unchanged(model: nn.Module, step: Callable[[], None], match: str) -> None:
    """A step is refused before it has moved anything."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(errors.RecordingError, match=match):
        step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def recording() -> Iterator[tuple[Any, SGD, pk.KernelRecorder]]:
    model = network()
    body = SGD(model[0].parameters(), lr=0.1)
    with pk.KernelRecorder(model, body, CE, data=(X, Y)) as recorder:
        epoch(recorder, model, body)
        x, y = recorder.announce(torch.arange(4))
        model.zero_grad()
        CE(model(x), y).backward()
        yield model, body, recorder


def test_a_second_optimizer_is_noticed_before_it_moves_anything(recording: Any) -> None:
    model, body, _ = recording
    head = AdamW(model[2].parameters(), lr=0.01)
    unchanged(model, head.step, r"AdamW, is about to move `2\.weight`, `2\.bias`.*model, \[sgd, adamw\]")
    body.step()


def test_one_on_parameters_that_were_frozen_is_noticed() -> None:
    model = network()
    model[2].requires_grad_(False)
    body = SGD(model[0].parameters(), lr=0.1)
    with pk.KernelRecorder(model, body, CE, data=(X, Y)) as recorder:
        epoch(recorder, model, body)
        model[2].requires_grad_(True)
        CE(model(X), Y).backward()
        unchanged(model, SGD(model[2].parameters(), lr=0.1).step, r"`2\.weight`")


def test_one_with_a_closure_is_noticed(recording: Any) -> None:
    model, _, _ = recording
    model.zero_grad()
    unchanged(model, lambda: SGD(model[2].parameters(), lr=0.1).step(lambda: 0.0), r"`2\.weight`")


def test_others_may_step(recording: Any) -> None:
    """On other networks, without gradients, inside a channel, and after the recording."""
    model, body, recorder = recording
    other = network()
    CE(other(X), Y).backward()
    SGD(other.parameters(), lr=0.1).step()
    head = SGD(model[2].parameters(), lr=0.1)
    body.step()
    with recorder.channel("by hand"):
        head.step()
    model.zero_grad()
    head.step()
    trajectory = recorder.close()
    CE(model(X), Y).backward()
    SGD(model.parameters(), lr=0.1).step()
    assert [name for name, _ in trajectory.tail] == ["by hand"]
    assert not strangers.WATCHES


class Both(Optimizer):
    """An optimizer that is put together of others, which step inside its own step."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Both step."""
        for part in self.parts:
            part.step()


def test_optimizers_inside_an_optimizer_are_its_own() -> None:
    model = network()
    both = Both(SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.2))
    with pk.KernelRecorder(model, both, CE, data=(X, Y), rule="elementwise") as recorder:
        epoch(recorder, model, both)
    assert len(recorder.trajectory) == 4


def test_two_recorders_do_not_disturb_each_other() -> None:
    """Two networks of one game, each with its own optimizer and recorder."""
    one, other = network(), network()
    optimizers = SGD(one.parameters(), lr=0.1), Adam(other.parameters(), lr=0.01)
    mse = nn.MSELoss()
    goal = torch.zeros(SAMPLES, 3, dtype=torch.float64)
    first = pk.KernelRecorder(one, optimizers[0], mse, data=(X, goal), audit_every=1)
    second = pk.KernelRecorder(other, optimizers[1], mse, data=(X, goal), audit_every=1)
    with first, second:
        for ids in torch.arange(SAMPLES).split(BATCH):
            x, y = first.announce(ids)
            second.announce(ids)
            one.zero_grad()
            other.zero_grad()
            (mse(one(x), y) + mse(other(x), y)).backward()
            for optimizer in optimizers:
                optimizer.step()
    complete(first.trajectory, 4)
    complete(second.trajectory, 4)
    assert not strangers.WATCHES
