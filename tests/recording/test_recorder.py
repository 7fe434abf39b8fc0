"""Watching changes nothing, and what was watched is what happened."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCHES, IN_ORACLE, LOSSES, OPTIMIZERS, SAMPLES, generator, make_inputs, make_model, record
from tolerances import TOLERANCES
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pathkernel as pk
from pathkernel import errors, reference
from pathkernel.recording.indexed import IndexedBatch
from pathkernel.trajectory.step import Step

DOUBLE = TOLERANCES[torch.float64]
CE = nn.CrossEntropyLoss()


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return make_inputs(SAMPLES, dtype=dtype), LOSSES["ce_mean"].targets(SAMPLES)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, loss=CE) -> None:
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


def setting(optimizer: str = "momentum", dtype: torch.dtype = torch.float64, **options: Any):
    """A model, its optimizer, a recorder, and the training data."""
    model, (X, y) = make_model(dtype=dtype), data(dtype)
    opt = OPTIMIZERS[optimizer](model.parameters())
    return model, opt, pk.KernelRecorder(model, opt, CE, data=(X, y), **options), X, y


def ids_of(trajectory: pk.Trajectory) -> list[list[int]]:
    return [[i for batch in step.batches for i in batch.ids.tolist()] for step in trajectory.steps()]


def oracle_gradient(model: nn.Module, trajectory: pk.Trajectory, step: Step, loss=CE) -> Tensor:
    """The gradient of a step's samples from the training data under its ids, without the package."""
    ids = torch.cat([batch.ids for batch in step.batches])
    parameters = trajectory.layout.unflatten(step.before)
    X, y = trajectory.data[torch.arange(len(trajectory.data))]
    return reference.sample_gradients(model, parameters, loss, X[ids], y[ids]).sum(dim=0)


def assert_ids_reproduce_gradients(model: nn.Module, trajectory: pk.Trajectory) -> None:
    for step in trajectory.steps():
        expected = oracle_gradient(model, trajectory, step)
        tolerance = TOLERANCES[trajectory.dtype].gradient
        assert (step.gradient.double() - expected).norm() <= tolerance * expected.norm()


def assert_complete(model: nn.Module, trajectory: pk.Trajectory, channels: Collection[str] = ()) -> None:
    """Shares and channels add up to what the live network says; all of the named channels take part."""
    X = make_inputs(3, dtype=trajectory.dtype, seed=8)
    why = pk.KernelMachine(trajectory).explain(X, outputs=0)
    assert why.relative_residual <= TOLERANCES[trajectory.dtype].residual
    with torch.no_grad():
        np.testing.assert_allclose(why.output, model(X)[:, 0], rtol=1e-5)
    assert set(why.channels) == {"initial", "rounding", *channels}
    for name in channels:
        assert np.abs(why.channels[name]).max() > 1e-4 * np.abs(why.output - why.initial).max()
    unexplained = np.abs(why.channels["rounding"]).max()
    assert unexplained <= TOLERANCES[trajectory.dtype].residual * np.abs(why.output - why.initial).max()


# -- watching changes nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same_to_the_bit(name: str, dtype: torch.dtype) -> None:
    plain, watched = make_model("relu", dtype=dtype), make_model("relu", dtype=dtype)
    X, y = data(dtype)
    opt_plain, opt_watched = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](watched.parameters())
    with pk.KernelRecorder(watched, opt_watched, CE, data=(X, y), audit_every=1) as recorder:
        for ids in BATCHES:
            update(plain, opt_plain, X[list(ids)], y[list(ids)])
            update(watched, opt_watched, *recorder.batch(list(ids)))
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in opt_plain.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(opt_watched.state[q][key]))
    assert torch.equal(recorder.trajectory.final, nn.utils.parameters_to_vector(watched.parameters()))


def test_shuffled_batches_and_audits_leave_the_random_state_alone() -> None:
    model, optimizer, recorder, X, _ = setting(audit_every=1)
    state = torch.random.get_rng_state()
    with recorder:
        for x, y in recorder.batches(batch_size=4, shuffle=True, generator=generator(0)):
            update(model, optimizer, x, y)
    pk.KernelMachine(recorder.trajectory).explain(X[:1])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", IN_ORACLE)
def test_the_path_is_that_of_the_textbook_optimizer(name: str) -> None:
    run = record(optimizer=name)
    oracle = OPTIMIZERS[name].oracle
    assert oracle is not None
    path = reference.train(run.start, run.loss, run.X, run.y, BATCHES, oracle, **run.settings)
    for s, expected in enumerate(path):
        for key, value in run.trajectory.parameters(s).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-12)


# -- three ways in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_of_the_training_data(drop_last: bool) -> None:
    model, optimizer, recorder, X, y = setting()
    seen: list[tuple[Tensor, Tensor]] = []
    with recorder:
        for _ in range(2):
            for x, target in recorder.batches(4, shuffle=True, drop_last=drop_last, generator=generator(len(seen))):
                seen.append((x, target))
                update(model, optimizer, x, target)
    recorded = ids_of(recorder.trajectory)
    assert [len(ids) for ids in recorded] == ([4, 4] if drop_last else [4, 4, 2]) * 2
    for ids, (x, target) in zip(recorded, seen, strict=True):
        assert torch.equal(x, X[ids]) and torch.equal(target, y[ids])
    if not drop_last:
        assert sorted(recorded[0] + recorded[1] + recorded[2]) == list(range(SAMPLES))
        assert recorded[:3] != recorded[3:]
    assert_ids_reproduce_gradients(model, recorder.trajectory)


def test_batches_in_order_without_shuffling() -> None:
    model, optimizer, recorder, _, _ = setting()
    with recorder:
        for x, y in recorder.batches(batch_size=6):
            update(model, optimizer, x, y)
    assert ids_of(recorder.trajectory) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loader_of_the_user(workers: int, drop_last: bool) -> None:
    model, optimizer, recorder, X, y = setting(audit_every=1)
    loader = DataLoader(
        pk.IndexedDataset(TensorDataset(X, y)),
        batch_size=3,
        shuffle=True,
        drop_last=drop_last,
        num_workers=workers,
        generator=generator(0),
    )
    with recorder:
        for _ in range(2):
            for x, target in recorder.track(loader):
                assert isinstance(x, Tensor) and isinstance(target, Tensor)
                update(model, optimizer, x, target)
    recorded = ids_of(recorder.trajectory)
    assert [len(ids) for ids in recorded] == ([3, 3, 3] if drop_last else [3, 3, 3, 1]) * 2
    assert recorded[0] != [0, 1, 2]
    assert_ids_reproduce_gradients(model, recorder.trajectory)
    assert_complete(model, recorder.trajectory)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_early_break_leaves_no_ids_behind(workers: int) -> None:
    # With workers, batches were fetched ahead; and the loop stops where the batch has arrived but was not used.
    model, optimizer, recorder, X, y = setting(audit_every=0)
    loader = DataLoader(
        pk.IndexedDataset(TensorDataset(X, y)), batch_size=2, shuffle=True, num_workers=workers, generator=generator(1)
    )
    with recorder:
        for _ in range(2):
            for count, (x, target) in enumerate(recorder.track(loader)):
                if count == 3:
                    break
                update(model, optimizer, x, target)
    assert [len(ids) for ids in ids_of(recorder.trajectory)] == [2] * 6
    assert_ids_reproduce_gradients(model, recorder.trajectory)


def test_a_batch_skipped_after_its_backward_pass_is_not_recorded() -> None:
    model, optimizer, recorder, _, _ = setting(audit_every=0)
    with recorder:
        for count, (x, y) in enumerate(recorder.batches(batch_size=2)):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            if count in (1, 2):
                continue  # as after a loss that looked odd; the next round clears the gradient
            optimizer.step()
    assert ids_of(recorder.trajectory) == [[0, 1], [6, 7], [8, 9]]
    assert_ids_reproduce_gradients(model, recorder.trajectory)


def test_a_batch_that_was_cleared_is_not_recorded() -> None:
    model, optimizer, recorder, _, _ = setting()
    with recorder:
        recorder.batch([7, 8])
        for set_to_none in (True, False):
            x, y = recorder.batch([3, 4])
            CE(model(x), y).backward()
            optimizer.zero_grad(set_to_none=set_to_none)
            update(model, optimizer, *recorder.batch([0, 1, 2]))
    assert ids_of(recorder.trajectory) == [[0, 1, 2], [0, 1, 2]]


class Items(Dataset):
    """A map-style dataset of numpy arrays, computed when asked."""

    def __init__(self, X: Tensor, y: Tensor) -> None:
        self.X, self.y = X.numpy(), y.numpy()

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.X[i], int(self.y[i])


def test_training_data_as_a_dataset() -> None:
    model, (X, y) = make_model(), data()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with pk.KernelRecorder(model, optimizer, CE, data=Items(X, y), audit_every=1) as recorder:
        for x, target in recorder.batches(batch_size=4):
            update(model, optimizer, x, target)
        for x, target in recorder.track(DataLoader(pk.IndexedDataset(Items(X, y)), batch_size=5)):
            update(model, optimizer, x, target)
    assert_ids_reproduce_gradients(model, recorder.trajectory)
    assert_complete(model, recorder.trajectory)


def test_training_data_as_numpy_arrays_take_the_type_of_the_model() -> None:
    model, (X, y) = make_model(dtype=torch.float32), data()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pk.KernelRecorder(model, optimizer, CE, data=(X.numpy(), y.numpy().astype(np.int32))) as recorder:
        for x, target in recorder.batches(batch_size=4):
            assert x.dtype == torch.float32 and target.dtype == torch.int64
            update(model, optimizer, x, target)
    assert_complete(model, recorder.trajectory)


def test_a_tracked_loader_can_be_tracked_again() -> None:
    dataset = pk.IndexedDataset(TensorDataset(torch.arange(4.0)))
    model, _, recorder, _, _ = setting()
    loader = DataLoader(dataset, batch_size=2)
    for _ in range(2):
        assert [x[0].tolist() for x in recorder.track(loader)] == [[0.0, 1.0], [2.0, 3.0]]
    assert isinstance(next(iter(loader)), IndexedBatch)
    assert len(dataset) == 4 and dataset[2].id == 2
    assert not list(model.buffers())


# -- what a batch may be ----------------------------------------------------------------------------------------------


def test_an_id_that_occurs_twice_counts_twice() -> None:
    model, optimizer, recorder, _, _ = setting("sgd", audit_every=1)
    with recorder:
        update(model, optimizer, *recorder.batch([3, 3, 3, 5]))
    assert_ids_reproduce_gradients(model, recorder.trajectory)
    twin = make_model()
    optimizer = OPTIMIZERS["sgd"](twin.parameters())
    X, y = data()
    with pk.KernelRecorder(twin, optimizer, CE, data=(X, y)) as once:
        x, target = once.batch([3, 5], weights=[0.75, 0.25])
        per_sample = nn.functional.cross_entropy(twin(x), target, reduction="none")
        (per_sample @ torch.tensor([0.75, 0.25], dtype=torch.float64)).backward()
        optimizer.step()
    queries = make_inputs(2, seed=8)
    twice, weighted = (pk.KernelMachine(r.trajectory).explain(queries, outputs=0) for r in (recorder, once))
    np.testing.assert_allclose(twice.shares, weighted.shares, rtol=1e-10)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="none"), CE, nn.CrossEntropyLoss(reduction="sum")])
def test_weights_of_the_samples(loss: nn.Module) -> None:
    model, (X, y) = make_model(), data()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1) as recorder:
        for ids in ([0, 1, 2], [2, 5, 9]):
            x, target = recorder.batch(ids, weights=weights)
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), target, reduction="none") @ weights).backward()
            optimizer.step()
    assert_complete(model, recorder.trajectory)
    why = pk.KernelMachine(recorder.trajectory).explain(X[:2], outputs=0)
    assert (why.shares[:, [1, 3, 4, 6, 7, 8]] == 0).all()
    assert (why.shares[:, [0, 2, 9]] != 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_with_one_number_per_sample(reduction: str) -> None:
    model, (X, y) = make_model(), data()
    loss, optimizer = nn.CrossEntropyLoss(reduction="none"), OPTIMIZERS["sgd"](model.parameters())
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), reduction=reduction, audit_every=1) as recorder:
        for x, target in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            getattr(loss(model(x), target), reduction)().backward()
            optimizer.step()
    assert_complete(model, recorder.trajectory)


def test_losses_that_couple_their_samples() -> None:
    # Class weights: a mean over the weights in the batch, so that samples matter for each other's coefficient.
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64), label_smoothing=0.1)
    model, (X, y) = make_model(), data()
    optimizer = OPTIMIZERS["nesterov"](model.parameters())
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1) as recorder:
        for ids in BATCHES:
            x, target = recorder.batch(list(ids))
            update(model, optimizer, x, target, loss)
    assert_complete(model, recorder.trajectory)
    run = reference.decompose(
        make_model(), loss, X, y, BATCHES, "sgd", X[:2], 0, "discrete", lr=0.05, momentum=0.9, nesterov=True
    )
    why = pk.KernelMachine(recorder.trajectory).explain(X[:2], outputs=0)
    np.testing.assert_allclose(why.shares, run.shares, atol=DOUBLE.shares)


def test_augmented_inputs_and_targets() -> None:
    model, optimizer, recorder, X, y = setting(audit_every=1)
    noise = 0.3 * torch.randn(4, 4, dtype=torch.float64, generator=generator(5))
    with recorder:
        x, target = recorder.batch([0, 1, 2, 3], inputs=X[:4] + noise)
        assert torch.equal(x, X[:4] + noise) and torch.equal(target, y[:4])
        update(model, optimizer, x, target)
        x, target = recorder.batch([4, 5], targets=torch.tensor([0, 0]))
        assert torch.equal(x, X[4:6])
        update(model, optimizer, x, target)
    assert_complete(model, recorder.trajectory)


# -- what happens between batch and step ------------------------------------------------------------------------------


def test_learning_rate_schedules() -> None:
    def schedule(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)

    for name in ("adamw", "momentum_dampening_decay"):
        run = record(optimizer=name, schedule=schedule)
        rates = [step.hyperparameters[0]["lr"] for step in run.trajectory.steps()]
        lr = OPTIMIZERS[name].settings["lr"]
        np.testing.assert_allclose(rates, lr * 0.7 ** np.arange(len(BATCHES)))
        assert_complete(run.model, run.trajectory, {"weight_decay"})


def test_a_learning_rate_held_in_a_tensor() -> None:
    model, (X, y) = make_model(), data()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01, dtype=torch.float64), capturable=False)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y)) as recorder:
        for x, target in recorder.batches(batch_size=4):
            update(model, optimizer, x, target)
            optimizer.param_groups[0]["lr"].mul_(0.5)
    rates = [step.hyperparameters[0]["lr"] for step in recorder.trajectory.steps()]
    assert rates == pytest.approx([0.01, 0.005, 0.0025])
    assert_complete(model, recorder.trajectory)


def test_two_parameter_groups() -> None:
    model, (X, y) = make_model(), data()
    groups = [
        {"params": model[0].parameters(), "lr": 0.02, "weight_decay": 0.1},
        {"params": model[2].parameters(), "momentum": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y)) as recorder:
        for x, target in recorder.batches(batch_size=4):
            update(model, optimizer, x, target)
    assert_complete(model, recorder.trajectory, {"weight_decay"})


def test_gradient_accumulation() -> None:
    model, optimizer, recorder, X, _ = setting("adam", audit_every=1)
    with recorder:
        for first, second in (([0, 1], [2, 3]), ([4, 5], [6, 7])):
            optimizer.zero_grad()
            for ids in (first, second):
                x, y = recorder.batch(ids)
                (CE(model(x), y) / 2).backward()
            optimizer.step()
    assert ids_of(recorder.trajectory) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(step.batches) for step in recorder.trajectory.steps()] == [2, 2]
    assert_ids_reproduce_gradients(model, recorder.trajectory)  # two halves are the mean over four
    assert_complete(model, recorder.trajectory)
    whole = record(optimizer="adam", batches=((0, 1, 2, 3), (4, 5, 6, 7)))
    found, expected = (pk.KernelMachine(t).explain(X[:2], outputs=0) for t in (recorder.trajectory, whole.trajectory))
    np.testing.assert_allclose(found.shares, expected.shares, atol=DOUBLE.shares)


def test_clipping_by_norm() -> None:
    model, optimizer, recorder, _, _ = setting("momentum", audit_every=1)
    norms = []
    with recorder:
        for x, y in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.2)))
            optimizer.step()
    assert min(norms) > 0.3, "nothing was clipped: the test says nothing"
    assert_complete(model, recorder.trajectory)
    for step, norm in zip(recorder.trajectory.steps(), norms, strict=True):
        expected = oracle_gradient(model, recorder.trajectory, step)
        torch.testing.assert_close(step.gradient, 0.2 / norm * expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", ["sgd", "adam", "nesterov_decay"])
def test_a_step_with_a_closure(name: str) -> None:
    model, optimizer, recorder, _, _ = setting(name)
    with recorder:
        for x, y in recorder.batches(batch_size=4):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                value = CE(model(x), y)
                value.backward()
                return value

            optimizer.step(closure)
    assert_ids_reproduce_gradients(model, recorder.trajectory)
    assert_complete(model, recorder.trajectory, {"weight_decay"} if name == "nesterov_decay" else set())
    plain = make_model()
    opt, (X, y) = OPTIMIZERS[name](plain.parameters()), data()
    for ids in ids_of(recorder.trajectory):
        update(plain, opt, X[ids], y[ids])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_an_edit_by_hand_has_its_own_channel(name: str) -> None:
    model, optimizer, recorder, _, _ = setting(name)
    with recorder:
        for count, (x, y) in enumerate(recorder.batches(batch_size=2)):
            update(model, optimizer, x, y)
            if count in (0, 2):
                with torch.no_grad():
                    model[2].weight.mul_(1.1)
                    model[0].bias.add_(0.05)
    pieces = list(recorder.trajectory.segments())
    assert [segment.step is None for segment in pieces] == [False, True, False, False, True, False, False]
    for left, right in itertools.pairwise(pieces):
        assert torch.equal(left.end, right.start)
    backwards = list(recorder.trajectory.segments(reverse=True))
    assert [s.step is None for s in backwards] == [segment.step is None for segment in reversed(pieces)]
    with pytest.raises(errors.TrajectoryError, match=r"a change of `(0\.bias|2\.weight)` by .* before step"):
        pk.KernelMachine(recorder.trajectory).explain(make_inputs(3), outputs=0)
    X = make_inputs(3)
    machine = pk.KernelMachine(recorder.trajectory, unexplained=np.inf)
    assert machine.explain(X, outputs=0).relative_residual < 1e-12
    np.testing.assert_allclose(machine.decision_function(X), model(X).detach(), atol=DOUBLE.shares)


def test_what_happens_between_start_and_the_recorder_belongs_to_the_start() -> None:
    model, optimizer, recorder, _, _ = setting()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with recorder:
        update(model, optimizer, *recorder.batch([0, 1]))
    assert_complete(model, recorder.trajectory)


def test_frozen_parameters_are_constants() -> None:
    model, (X, y) = make_model(), data()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y)) as recorder:
        for x, target in recorder.batches(batch_size=4):
            update(model, optimizer, x, target)
    assert recorder.trajectory.layout.names == ("2.weight", "2.bias")
    assert set(recorder.trajectory.constants) == {"0.weight", "0.bias"}
    assert_complete(model, recorder.trajectory)


def test_parameters_unfrozen_on_the_way() -> None:
    model, optimizer, recorder, _, _ = setting("adam_decay")
    with recorder:
        model[0].requires_grad_(False)
        for count, (x, y) in enumerate(recorder.batches(batch_size=3)):
            if count == 2:
                model[0].requires_grad_(True)
            update(model, optimizer, x, y)
    active = [step.active for step in recorder.trajectory.steps()]
    assert active[0] == active[1] == {"2.weight", "2.bias"}
    assert active[2] == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert_complete(model, recorder.trajectory, {"weight_decay"})


class Tied(nn.Module):
    """Token ids in, an embedding that is used again on the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.out = nn.Linear(4, 3, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embedding(tokens).mean(dim=1).tanh())


def test_tied_parameters_and_token_ids() -> None:
    model = Tied().double()
    tokens, y = torch.randint(3, (SAMPLES, 5), generator=generator(0)), data()[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with pk.KernelRecorder(model, optimizer, CE, data=(tokens, y), audit_every=1) as recorder:
        for x, target in recorder.batches(batch_size=4):
            update(model, optimizer, x, target)
    assert recorder.trajectory.layout.names == ("embedding.weight",)
    why = pk.KernelMachine(recorder.trajectory).explain(tokens[:3], outputs=0)
    assert why.relative_residual <= DOUBLE.residual


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.left(a).tanh() * self.right(b)

    model = Two().double()
    pair, y = (make_inputs(SAMPLES), make_inputs(SAMPLES, (2,), seed=4)), data()[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=(pair, y), audit_every=1) as recorder:
        for x, target in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            CE(model(*x), target).backward()
            optimizer.step()
    why = pk.KernelMachine(recorder.trajectory).explain((pair[0][:2], pair[1][:2]), outputs=0)
    assert why.relative_residual <= DOUBLE.residual
    assert pk.PathKernel(recorder.trajectory)(pair).shape == (SAMPLES, SAMPLES)


# -- the life of a recording ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_recording_that_begins_in_the_middle(name: str, dtype: torch.dtype) -> None:
    model, optimizer, recorder, X, y = setting(name, dtype)
    batches = [list(ids) for ids in BATCHES]
    for ids in batches[:3]:
        update(model, optimizer, X[ids], y[ids])
    with recorder:
        for ids in batches[3:]:
            update(model, optimizer, *recorder.batch(ids))
    settings = OPTIMIZERS[name].settings
    channels = set()
    if settings.get("momentum") or "adam" in name or "amsgrad" in name:
        channels.add("memory")  # momentum that samples before the recording left behind
    if settings.get("weight_decay", 0.01 if "adamw" in name else 0):
        channels.add("weight_decay")
    assert_complete(model, recorder.trajectory, channels)
    both = pk.KernelMachine(recorder.trajectory).decision_function(X[:2])
    np.testing.assert_allclose(both, model(X[:2]).detach(), rtol=TOLERANCES[dtype].residual, atol=1e-6)


def test_start_and_close_without_a_with_block() -> None:
    model, optimizer, recorder, X, y = setting("sgd")
    update(model, optimizer, X[:2], y[:2])  # not started: not recorded
    recorder.start()
    recorder.start()  # twice is once
    update(model, optimizer, *recorder.batch([0, 1]))
    trajectory = recorder.close()
    assert trajectory is recorder.trajectory and len(trajectory) == 1
    update(model, optimizer, X[:2], y[:2])
    assert len(trajectory) == 1
    recorder.start()
    update(model, optimizer, *recorder.batch([2, 3]))
    recorder.close()
    assert len(trajectory) == 2
    why = pk.KernelMachine(trajectory, unexplained=np.inf).explain(X, outputs=0)
    assert why.relative_residual < 1e-12 and np.abs(why.channels["unexplained"]).max() > 1e-3  # the step in between


def test_an_exception_inside_the_block_keeps_what_was_recorded() -> None:
    model, optimizer, recorder, X, y = setting()
    with pytest.raises(KeyboardInterrupt), recorder:
        for count, (x, target) in enumerate(recorder.batches(batch_size=2)):
            update(model, optimizer, x, target)
            if count == 2:
                raise KeyboardInterrupt
    assert len(recorder.trajectory) == 3
    assert_complete(model, recorder.trajectory)
    update(model, optimizer, X, y)  # the optimizer is free again
    assert len(recorder.trajectory) == 3


def test_two_recorders_see_the_same_steps() -> None:
    model, optimizer, recorder, X, y = setting("adamw")
    other = pk.KernelRecorder(model, optimizer, CE, data=(X, y))
    with recorder, other:
        for ids in BATCHES:
            other.batch(list(ids))
            update(model, optimizer, *recorder.batch(list(ids)))
    for mine, theirs in zip(recorder.trajectory.steps(), other.trajectory.steps(), strict=True):
        assert torch.equal(mine.after, theirs.after) and torch.equal(mine.gradient, theirs.gradient)


def test_a_closed_recorder_does_not_keep_the_optimizer_busy() -> None:
    model, optimizer, recorder, _, _ = setting()
    with recorder:
        update(model, optimizer, *recorder.batch([0, 1]))
    trajectory, alive = recorder.trajectory, weakref.ref(recorder)
    del recorder
    gc.collect()
    assert alive() is None
    assert_complete(model, trajectory)


def test_the_ends_of_neighbouring_steps_are_one_tensor() -> None:
    steps = list(record().trajectory.steps())
    assert all(a.after is b.before for a, b in itertools.pairwise(steps))
    assert all(step.index == s for s, step in enumerate(steps))


def test_points_of_the_path() -> None:
    run = record()
    trajectory = run.trajectory
    for name, value in trajectory.parameters(0).items():
        assert torch.equal(value, run.start.get_parameter(name))
    for name, value in trajectory.parameters(-1).items():
        assert torch.equal(value, run.model.get_parameter(name))
    assert torch.equal(trajectory.vector(2), next(iter(s.before for s in trajectory.steps() if s.index == 2)))
    assert torch.equal(trajectory.vector(-2), trajectory.vector(len(trajectory) - 1))
    assert repr(trajectory) == "Trajectory(6 steps of SGD, P = 43, N = 10, float64)"


def test_later_changes_of_the_model_do_not_reach_the_record() -> None:
    run = record()
    before = copy.deepcopy([s.after for s in run.trajectory.steps()])
    with torch.no_grad():
        for p in run.model.parameters():
            p.zero_()
    assert all(torch.equal(a, s.after) for a, s in zip(before, run.trajectory.steps(), strict=True))
