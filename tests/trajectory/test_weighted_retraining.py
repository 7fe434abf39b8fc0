"""Runs trained again with other weights, against loops written by hand; and what cannot be trained again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, generator, make_inputs, record
from torch import Tensor, nn
from torch.nn import functional

import pathkernel as pk
from pathkernel import errors
from pathkernel.trajectory.stacked_retraining import stacked
from pathkernel.trajectory.weighted_retraining import as_weights, prepared

N, BATCH, EPOCHS = 24, 6, 3
CE = nn.CrossEntropyLoss()
ROUNDING = 1e-11  # some 12 steps, the loss summed in another order


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def data() -> tuple[Tensor, Tensor]:
    return make_inputs(N), torch.randint(3, (N,), generator=generator(3))


def network(dropout: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6), nn.Tanh(), *([nn.Dropout(0.3)] * dropout), nn.Linear(6, 3)]
        return nn.Sequential(*layers).double()


def train(
    optimizer: str = "adamw",
    *,
    schedule: Any = None,
    dropout: bool = False,
    accumulate: int = 1,
    store: Any = None,
    loss: Callable[..., Tensor] = CE,
    edit: Callable[[nn.Module], Any] | None = None,
) -> tuple[pk.Trajectory, nn.Module, nn.Module]:
    """A recording, the network before and after; and with weights of one it is what `by_hand` trains."""
    X, y = data()
    model = network(dropout)
    start = copy.deepcopy(model)
    opt = OPTIMIZERS[optimizer](model.parameters())
    torch.manual_seed(5)
    options = {} if schedule is None else {"schedule": schedule}
    with pk.KernelRecorder(model, opt, loss, data=(X, y), store=store, audit_every=0, **options) as recorder:
        for _ in range(EPOCHS):
            for k, ids in enumerate(torch.arange(N).split(BATCH)):
                x, target = recorder.batch(ids)
                if k % accumulate == 0:
                    opt.zero_grad()
                (loss(model(x), target) / accumulate).backward()
                if (k + 1) % accumulate == 0:
                    if edit is not None:
                        edit(model)
                    opt.step()
    return recorder.trajectory, start, model


def by_hand(start: nn.Module, optimizer: str, weights: Tensor, accumulate: int = 1) -> Tensor:
    """The loop of `train` with a weighted loss, without the package."""
    X, y = data()
    model = copy.deepcopy(start)
    opt = OPTIMIZERS[optimizer](model.parameters())
    torch.manual_seed(5)
    for _ in range(EPOCHS):
        for k, ids in enumerate(torch.arange(N).split(BATCH)):
            if k % accumulate == 0:
                opt.zero_grad()
            losses = functional.cross_entropy(model(X[ids]), y[ids], reduction="none")
            (weights[ids] @ losses / len(ids) / accumulate).backward()
            if (k + 1) % accumulate == 0:
                opt.step()
    return flat(model)


def some_weights(rows: int) -> Tensor:
    weights = torch.rand(rows, N, dtype=torch.float64, generator=generator(7))
    return torch.where(weights < 0.3, torch.zeros_like(weights), 2 * weights)


OTHERS = ["sgd_decay", "momentum_dampening_decay", "nesterov_decay", "adam_decay", "amsgrad", "adamw"]


@pytest.mark.parametrize("engine", ["plain", "stacked"])
@pytest.mark.parametrize("optimizer", OTHERS)
def test_as_by_hand(optimizer: str, engine: str) -> None:
    trajectory, start, _ = train(optimizer)
    weights = some_weights(2)
    for own, theta in zip(weights, trajectory.retrain(weights, engine=engine), strict=True):
        expected = by_hand(start, optimizer, own)
        assert (theta - expected).norm() <= ROUNDING * expected.norm()
        assert (theta - trajectory.final).norm() > 1e-4 * expected.norm()


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("accumulate", [1, 2], ids=["one_batch", "accumulated"])
@pytest.mark.parametrize("keyframes", [None, 5], ids=["full", "keyframes"])
def test_weights_of_one_are_the_run_to_the_last_bit(keyframes: int | None, accumulate: int, dropout: bool) -> None:
    schedule = None if keyframes is None else pk.Schedule(keyframes=keyframes)
    trajectory, start, model = train(schedule=schedule, dropout=dropout, accumulate=accumulate)
    assert torch.equal(trajectory.retrain(torch.ones(1, N))[0], flat(model))
    assert torch.equal(prepared(trajectory).trained(torch.ones(N, dtype=torch.float64)), flat(model))  # trained indeed
    weights = some_weights(5)
    plain, together = trajectory.retrain(weights, engine="plain"), stacked(prepared(trajectory), weights)
    assert together is not None and (together - plain).norm() <= ROUNDING * plain.norm()
    expected = by_hand(start, "adamw", weights[0], accumulate)
    assert (plain[0] - expected).norm() <= ROUNDING * expected.norm()


def test_float32_and_a_store_on_disk(tmp_path: Any) -> None:
    trajectory, _, model = train(store=tmp_path / "run")
    weights = some_weights(1)
    opened = pk.Trajectory.open(tmp_path / "run", model=model, loss=CE, data=data())
    assert torch.equal(opened.retrain(weights), trajectory.retrain(weights))
    recording = record(dtype=torch.float32, optimizer="momentum")
    assert torch.equal(recording.trajectory.retrain(np.ones((2, 10)))[1], recording.trajectory.final)


def test_samples_that_come_twice_and_other_losses() -> None:
    """Ids twice in a batch, a loss that is a sum, several outputs: weights of two count the batch's slopes twice."""
    for loss in ("ce_sum", "bce", "mse_mean"):
        trajectory = record(loss=loss, optimizer="sgd").trajectory
        again = trajectory.until(1).retrain(torch.full((1, 10), 2.0))[0]
        moved = trajectory.vector(1) - trajectory.vector(0)
        assert (again - trajectory.vector(0) - 2 * moved).norm() <= 1e-12 * moved.norm()


def test_the_users_model_and_generators_stay() -> None:
    trajectory, _, model = train(dropout=True)
    before, state = flat(model), torch.get_rng_state()
    trajectory.retrain(some_weights(2))
    assert torch.equal(flat(model), before) and torch.equal(torch.get_rng_state(), state)


def test_stacking_is_given_up_where_gradients_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, _, _ = train()
    weights = some_weights(4)
    plain = trajectory.retrain(weights, engine="plain")
    monkeypatch.setattr("pathkernel.trajectory.stacked_retraining.weighed", lambda outputs, rows: outputs)
    assert stacked(prepared(trajectory), weights) is None
    assert torch.equal(trajectory.retrain(weights), plain)
    with pytest.raises(errors.TrajectoryError, match="can be stacked"):
        trajectory.retrain(weights, engine="stacked")


def test_an_optimizer_whose_step_mixes_entries_is_not_stacked() -> None:
    X, y = data()
    model = network()
    hidden = [p for p in model.parameters() if p.dim() == 2]
    opt = torch.optim.Muon(hidden, lr=0.01)
    with pk.KernelRecorder(model, opt, CE, data=(X, y)) as recorder:
        for ids in torch.arange(N).split(BATCH):
            x, target = recorder.batch(ids)
            opt.zero_grad()
            CE(model(x), target).backward()
            opt.step()
    trajectory = recorder.trajectory
    weights = some_weights(4)
    assert stacked(prepared(trajectory), weights) is None
    assert trajectory.retrain(weights).shape == (4, trajectory.layout.size)


# -- refusals -------------------------------------------------------------------------------------------------------


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    return CE(outputs, targets) + (outputs.mean(0) ** 2).sum()


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def with_norm() -> pk.Trajectory:
    X, y = data()
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, opt, CE, data=(X, y)) as recorder:
        for x, target in recorder.batches(batch_size=BATCH):
            opt.zero_grad()
            CE(model(x), target).backward()
            opt.step()
    return recorder.trajectory


def warm() -> pk.Trajectory:
    X, y = data()
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    CE(model(X), y).backward()
    opt.step()
    opt.zero_grad()
    with pk.KernelRecorder(model, opt, CE, data=(X, y)) as recorder:
        x, target = recorder.batch(range(N))
        CE(model(x), target).backward()
        opt.step()
    return recorder.trajectory


def moved_outside() -> pk.Trajectory:
    X, y = data()
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, opt, CE, data=(X, y)) as recorder:
        for ids in torch.arange(N).split(BATCH):
            x, target = recorder.batch(ids)
            opt.zero_grad()
            CE(model(x), target).backward()
            opt.step()
            with torch.no_grad():
                model[0].weight.mul_(0.9)
    return recorder.trajectory


def without_loss() -> pk.Trajectory:
    X, y = data()
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, opt, data=(X, y)) as recorder:
        x, target = recorder.batch(range(N))
        CE(model(x), target).backward()
        opt.step()
    return recorder.trajectory


def without_targets() -> pk.Trajectory:
    """Only the number of samples is known, and what the network saw of them."""
    X, y = data()
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, opt, CE, data=N) as recorder:
        recorder.batch(range(N), inputs=X)
        CE(model(X), y).backward()
        opt.step()
    return recorder.trajectory


REFUSED: dict[str, tuple[Callable[[], pk.Trajectory], str]] = {
    "thinned": (lambda: train(schedule=pk.Schedule(every=2))[0], "needs every step"),
    "no_steps": (lambda: train()[0].until(0), "no steps"),
    "no_loss": (without_loss, "needs the loss"),
    "coupled": (lambda: train(loss=contrastive)[0], "couples samples"),
    "clipped": (lambda: train(edit=clip)[0], "step 0 has another gradient"),
    "clipped_keyframes": (lambda: train(edit=clip, schedule=pk.Schedule(keyframes=4))[0], "gradient that is not"),
    "running_statistics": (with_norm, "running statistics"),
    "no_targets": (without_targets, "no targets are on record"),
    "warm": (warm, "had a state when recording began"),
    "moved": (moved_outside, "change of the weights"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_trained_again(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(errors.PathKernelError, match=message):
        make().retrain(torch.zeros(1, N))


def test_an_optimizer_of_ones_own() -> None:
    class Own(torch.optim.SGD):
        """Steps as torch's."""

    X, y = data()
    model = network()
    opt = Own(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, opt, CE, data=(X, y), rule="elementwise") as recorder:
        x, target = recorder.batch(range(N))
        CE(model(x), target).backward()
        opt.step()
    with pytest.raises(errors.TrajectoryError, match="follow the rule 'elementwise convention'"):
        recorder.trajectory.retrain(torch.zeros(1, N))
    assert torch.equal(recorder.trajectory.retrain(torch.ones(1, N), optimizer=Own)[0], flat(model))
    with pytest.raises(errors.TrajectoryError, match=r"step 0 (ends elsewhere|cannot be taken)"):
        recorder.trajectory.retrain(torch.ones(1, N), optimizer=torch.optim.Adam)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones((1, 5)), r"shape \(1, 5\)"),
        (np.ones(10), r"weights\[None\]"),
        (np.full((1, 10), np.nan), "holds nan for sample 0 in row 0"),
    ],
    ids=["samples", "one_run", "nan"],
)
def test_weights_of_another_form(weights: np.ndarray, message: str) -> None:
    with pytest.raises(errors.InputError, match=message):
        record().trajectory.retrain(weights)


def test_an_engine_that_there_is_none_of() -> None:
    with pytest.raises(errors.InputError, match="Engines are"):
        record().trajectory.retrain(np.ones((1, 10)), engine="fast")


def test_a_model_of_several_kinds_of_layers() -> None:
    """Convolutions and group norms stacked."""
    recording = record("conv_group_norm", optimizer="adamw")
    weights = some_weights(4)[:, :10]
    plain = recording.trajectory.retrain(weights, engine="plain")
    assert (recording.trajectory.retrain(weights, engine="stacked") - plain).norm() <= ROUNDING * plain.norm()


@pytest.mark.parametrize(
    "weights", ["text", None, [[1.0], [1.0, 2.0]], 1j * np.ones((1, 3))], ids=["text", "none", "ragged", "complex"]
)
def test_weights_that_are_no_real_numbers_are_refused(weights: Any) -> None:
    with pytest.raises(errors.InputError, match="no array of real numbers"):
        as_weights(weights, 3)
