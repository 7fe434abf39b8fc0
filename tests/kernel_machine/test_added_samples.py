"""Further steps on new samples to first order, against steps that are really taken."""

from __future__ import annotations

import copy
import functools
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, generator, make_inputs, make_model, record
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import errors
from pathkernel.gradients.targets import check_as_in_training
from pathkernel.kernel_machine.added_samples import REMAINDER

CE = nn.CrossEntropyLoss()
NEW, QUERIES = 6, 12


def new_samples(seed: int = 9) -> tuple[Tensor, Tensor]:
    return make_inputs(NEW, seed=seed), torch.randint(3, (NEW,), generator=generator(seed))


def continued(recording: Any, X: Tensor, y: Tensor, steps: int) -> nn.Module:
    """The recorded network after further steps of its own optimizer, on copies."""
    model, optimizer = copy.deepcopy((recording.model, recording.optimizer))
    for _ in range(steps):
        optimizer.zero_grad()
        recording.loss(model(X), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "optimizer", ["sgd_decay", "momentum_dampening_decay", "nesterov_decay", "adam_decay", "adamw"]
)
def test_first_order_of_a_linear_network_is_what_training_does(optimizer: str) -> None:
    """A network that is linear in θ: nothing is left out, whatever the optimizer and the number of steps."""
    X, y = make_inputs(10), torch.randint(3, (10,), generator=generator(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
    opt = OPTIMIZERS[optimizer](model.parameters())
    with pk.KernelRecorder(model, opt, CE, data=(X, y), audit_every=0) as recorder:
        for ids in torch.arange(10).split(4):
            x, target = recorder.batch(ids)
            opt.zero_grad()
            CE(model(x), target).backward()
            opt.step()
    machine, (Xn, yn), Xq = pk.KernelMachine(recorder.trajectory), new_samples(), make_inputs(QUERIES, seed=4)
    before = model(Xq).detach().numpy()
    grown = machine.add_samples(Xn, yn, steps=7)
    for _ in range(7):
        opt.zero_grad()
        CE(model(Xn), yn).backward()
        opt.step()
    after = model(Xq).detach().numpy()
    assert np.abs(grown.decision_function(Xq) - after).max() <= 1e-9 * np.abs(after - before).max()
    assert np.abs(after - before).max() > 1e-3 and max(grown.remainder(Xq), grown.gradient_error) < 1e-9


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov_decay", "adam_decay", "adamw"])
def test_shares_and_channels_add_up(optimizer: str) -> None:
    recording = record(optimizer=optimizer)
    machine, Xq = pk.KernelMachine(recording.trajectory), make_inputs(QUERIES, seed=4)
    grown = machine.add_samples(*new_samples(), steps=4)
    why = grown.explain(Xq, outputs="all")
    assert why.shares.shape == (3 * QUERIES, NEW)
    total = why.shares.sum(axis=1) + sum(why.channels.values())
    assert np.abs(total - why.change).max() <= 1e-11 * np.abs(why.change).max()
    assert np.abs((why.output + why.change).reshape(-1, 3) - grown.decision_function(Xq)).max() < 1e-12
    assert ("weight_decay" in why.channels) == ("decay" in optimizer or optimizer == "adamw")


def test_a_share_is_what_its_sample_alone_adds() -> None:
    """One step of plain SGD: leaving a new sample's slope out changes the prediction by its share."""
    recording = record(optimizer="sgd")
    machine, (X, y), Xq = pk.KernelMachine(recording.trajectory), new_samples(), make_inputs(3, seed=4)
    why = machine.add_samples(X, y).explain(Xq, outputs=0)
    alone = machine.add_samples(X[2:3], y[2:3]).explain(Xq, outputs=0)
    assert np.allclose(why.shares[:, 2], alone.change / NEW, rtol=1e-10)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    X, y = load_digits(return_X_y=True)
    return torch.from_numpy(X[:400] / 16), torch.from_numpy(y[:400])


def on_digits(optimizer: str, seed: int) -> SimpleNamespace:
    """A network of 64-16-10 after 48 steps on 200 digits."""
    X, y = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    opt = OPTIMIZERS[optimizer](model.parameters())
    order = generator(seed)
    with pk.KernelRecorder(model, opt, CE, data=(X[:200], y[:200]), audit_every=0) as recorder:
        for _ in range(12):
            for ids in torch.randperm(200, generator=order).split(50):
                x, target = recorder.batch(ids)
                opt.zero_grad()
                CE(model(x), target).backward()
                opt.step()
    return SimpleNamespace(model=model, optimizer=opt, loss=CE, trajectory=recorder.trajectory)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2))])
def test_ranks_of_really_continued_steps(optimizer: str, seed: int) -> None:
    X, y = digits()
    recording, Xq = on_digits(optimizer, seed), X[300:]
    machine = pk.KernelMachine(recording.trajectory)
    before = recording.model(Xq).detach().numpy()
    for steps in (1, 5, 20):
        grown = machine.add_samples(X[200:230], y[200:230], steps=steps)
        true = continued(recording, X[200:230], y[200:230], steps)(Xq).detach().numpy() - before
        predicted = grown.decision_function(Xq) - before
        ranks = [spearmanr(predicted[:, c], true[:, c]).statistic for c in range(10)]
        assert np.mean(ranks) >= 0.9
        assert np.linalg.norm(true) > 1e-2


def test_where_ranks_are_lost_the_remainder_is_large() -> None:
    """Random labels and 20 long steps: not all that follows is of first order, and it says so."""
    lost = 0
    for seed in (0, 1, 2):
        recording, (X, y), Xq = record(optimizer="momentum"), new_samples(seed), make_inputs(40, seed=4 + seed)
        before = recording.model(Xq).detach().numpy()
        grown = pk.KernelMachine(recording.trajectory).add_samples(X, y, steps=20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.CertificateWarning)
            predicted = grown.decision_function(Xq) - before
        true = continued(recording, X, y, 20)(Xq).detach().numpy() - before
        ranks = [spearmanr(predicted[:, c], true[:, c]).statistic for c in range(3)]
        if np.mean(ranks) < 0.9:
            lost += 1
            assert max(grown.remainder(Xq), grown.gradient_error) > REMAINDER
    assert lost


def test_the_error_of_one_step_is_of_second_order() -> None:
    """Half the rate, a quarter of the error; and the remainder says how large it is."""
    recording = record(optimizer="sgd")
    machine, (X, y), Xq = pk.KernelMachine(recording.trajectory), new_samples(), make_inputs(QUERIES, seed=4)
    before = recording.model(Xq).detach().numpy()
    errors_found = []
    for rate in (0.1, 0.05, 0.025):
        grown = machine.add_samples(X, y, learning_rate=rate)
        recording.optimizer.param_groups[0]["lr"] = rate
        true = continued(recording, X, y, 1)(Xq).detach().numpy()
        error = np.linalg.norm(grown.decision_function(Xq) - true)
        assert error / np.linalg.norm(true - before) == pytest.approx(grown.remainder(Xq), rel=0.02)
        errors_found.append(error)
    assert np.log2(np.array(errors_found[:-1]) / errors_found[1:]) == pytest.approx([2, 2], abs=0.1)


def test_keyframes_know_the_state_of_every_optimizer() -> None:
    X, y = make_inputs(10), torch.randint(3, (10,), generator=generator(1))
    found = []
    for schedule in (pk.Schedule(every=1), pk.Schedule(keyframes=3)):
        model = make_model()
        opt = OPTIMIZERS["adamw"](model.parameters())
        with pk.KernelRecorder(model, opt, CE, data=(X, y), schedule=schedule) as recorder:
            for ids in torch.arange(10).split(2):
                x, target = recorder.batch(ids)
                opt.zero_grad()
                CE(model(x), target).backward()
                opt.step()
        grown = pk.KernelMachine(recorder.trajectory).add_samples(*new_samples(), steps=3)
        found.append(grown.displacement)
    assert (found[0] - found[1]).norm() <= 1e-9 * found[0].norm()


def test_a_state_that_a_replay_does_not_find_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = make_inputs(10), torch.randint(3, (10,), generator=generator(1))
    model = make_model()
    opt = OPTIMIZERS["adamw"](model.parameters())
    with pk.KernelRecorder(model, opt, CE, data=(X, y), schedule=pk.Schedule(keyframes=3)) as recorder:
        x, target = recorder.batch(range(10))
        CE(model(x), target).backward()
        opt.step()
    machine = pk.KernelMachine(recorder.trajectory)
    monkeypatch.setattr("pathkernel.trajectory.final_state.Replay.vector", lambda self: self._at + 1)
    with pytest.raises(errors.TrajectoryError, match="do not lead to the recorded end"):
        machine.add_samples(*new_samples())


def test_float32_and_the_network_stays() -> None:
    recording = record(optimizer="adamw", dtype=torch.float32)
    state = copy.deepcopy(recording.optimizer.state_dict())
    before = [p.detach().clone() for p in recording.model.parameters()]
    X, y = make_inputs(NEW, dtype=torch.float32), new_samples()[1]
    machine, Xq = pk.KernelMachine(recording.trajectory), make_inputs(QUERIES, dtype=torch.float32, seed=4)
    grown = machine.add_samples(X, y, steps=2)
    change = grown.decision_function(Xq) - recording.model(Xq).detach().numpy()
    true = (continued(recording, X, y, 2)(Xq) - recording.model(Xq)).detach().numpy()
    assert np.linalg.norm(change - true) <= 0.1 * np.linalg.norm(true)
    assert all(torch.equal(p, old) for p, old in zip(recording.model.parameters(), before, strict=True))
    assert str(recording.optimizer.state_dict()) == str(state)
    assert (grown.predict(Xq) == grown.decision_function(Xq).argmax(axis=1)).all() and "2 steps" in repr(grown)


def test_large_steps_are_doubted() -> None:
    recording = record(optimizer="sgd")
    grown = pk.KernelMachine(recording.trajectory).add_samples(*new_samples(), steps=20, learning_rate=3.0)
    with pytest.warns(errors.CertificateWarning, match="beyond first order"):
        grown.decision_function(make_inputs(QUERIES, seed=4))


def test_refusals() -> None:
    X, y = new_samples()
    machine = pk.KernelMachine(record().trajectory)
    with pytest.raises(errors.InputError, match="`steps=0`"):
        machine.add_samples(X, y, steps=0)
    with pytest.raises(errors.InputError, match="`steps='1'`"):
        machine.add_samples(X, y, steps="1")
    with pytest.raises(errors.InputError, match="`learning_rate=-1`"):
        machine.add_samples(X, y, learning_rate=-1)
    machine.average = "ema"
    with pytest.raises(errors.InputError, match="average 'ema'"):
        machine.add_samples(X, y)
    amsgrad = pk.KernelMachine(record(optimizer="amsgrad").trajectory)
    with pytest.raises(errors.TrajectoryError, match="not on record"):
        amsgrad.add_samples(X, y)


def test_a_memory_that_was_edited_is_refused() -> None:
    X, y = make_inputs(10), torch.randint(3, (10,), generator=generator(1))
    model = make_model()
    opt = OPTIMIZERS["momentum"](model.parameters())
    with pk.KernelRecorder(model, opt, CE, data=(X, y)) as recorder:
        for ids in torch.arange(10).split(5):
            x, target = recorder.batch(ids)
            opt.zero_grad()
            CE(model(x), target).backward()
            if opt.state:
                for own in opt.state.values():
                    own["momentum_buffer"].mul_(-3)
            opt.step()
    with pytest.raises(errors.TrajectoryError, match="not what the gradients on record lead to"):
        pk.KernelMachine(recorder.trajectory).add_samples(*new_samples())


def test_changes_after_the_last_step_and_other_returns_are_refused() -> None:
    X, y = make_inputs(10), torch.randint(3, (10,), generator=generator(1))
    model = make_model()
    opt = OPTIMIZERS["sgd"](model.parameters())
    with pk.KernelRecorder(model, opt, CE, data=(X, y)) as recorder:
        x, target = recorder.batch(range(10))
        CE(model(x), target).backward()
        opt.step()
        with torch.no_grad():
            model[0].weight.mul_(0.99)
    with pytest.raises(errors.TrajectoryError, match="changed after the last step"):
        pk.KernelMachine(recorder.trajectory, unexplained=2.0).add_samples(*new_samples())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


def test_a_network_that_returns_two_tensors_is_refused() -> None:
    X, y = make_inputs(10), torch.randint(3, (10,), generator=generator(1))
    model = Two()
    opt = OPTIMIZERS["sgd"](model.parameters())
    loss = lambda returned, target: CE(returned[0], target)  # noqa: E731
    with pk.KernelRecorder(model, opt, loss, data=(X, y)) as recorder:
        x, target = recorder.batch(range(10))
        loss(model(x), target).backward()
        opt.step()
    with pytest.raises(errors.TrajectoryError, match="returns a tuple"):
        pk.KernelMachine(recorder.trajectory).add_samples(*new_samples())


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.3)], ids=["batch statistics", "dropout"])
def test_networks_that_train_on_other_outputs_are_warned_of(layer: nn.Module) -> None:
    X, y = make_inputs(10), torch.randint(3, (10,), generator=generator(1))
    model = nn.Sequential(layer, nn.Linear(4, 3)).double()
    opt = OPTIMIZERS["sgd"](model.parameters())
    with pk.KernelRecorder(model, opt, CE, data=(X, y)) as recorder:
        for x, target in recorder.batches(batch_size=5):
            opt.zero_grad()
            CE(model(x), target).backward()
            opt.step()
    machine = pk.KernelMachine(recorder.trajectory)
    before = torch.random.get_rng_state()
    with pytest.warns(pk.errors.CertificateWarning, match="In train mode the network returns other outputs"):
        machine.add_samples(*new_samples())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_sample_has_no_batch_statistics() -> None:
    X, y = make_inputs(10), torch.randint(3, (10,), generator=generator(1))
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    opt = OPTIMIZERS["sgd"](model.parameters())
    with pk.KernelRecorder(model, opt, CE, data=(X, y)) as recorder:
        x, target = recorder.batch(range(10))
        CE(model(x), target).backward()
        opt.step()
    inputs, targets = new_samples()
    with pytest.warns(pk.errors.CertificateWarning, match="does not take the new samples"):
        pk.KernelMachine(recorder.trajectory).add_samples(inputs[:1], targets[:1])


def test_targets_of_another_form_are_told_from_all_of_those_in_training() -> None:
    example = {"kind": torch.zeros(1, dtype=torch.int64), "place": torch.ones(1, 2)}
    with pytest.raises(errors.InputError) as refused:
        check_as_in_training({"kind": torch.zeros(3, dtype=torch.int64), "place": torch.ones(3, 1)}, example, "it")
    assert "shape (3,) from 0 to 0 and of type float32 and shape (3, 1) from 1 to 1" in refused.value.found
    assert "type int64 and shape (1,) and of type float32 and shape (1, 2) for one sample" in refused.value.expected
