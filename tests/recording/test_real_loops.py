"""Loops as they are written in practice: accumulation, clipping, groups, mixed precision, noise, weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import generator, make_inputs, make_model
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import errors, reference

CE, CE_SUM, CE_NONE = (nn.CrossEntropyLoss(reduction=reduction) for reduction in ("mean", "sum", "none"))
SAMPLES = 12
BATCHES = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9, 10, 11), (2, 9), (5, 0, 1, 7))
DOUBLE = TOLERANCES[torch.float64]


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return make_inputs(SAMPLES, dtype=dtype), torch.randint(3, (SAMPLES,), generator=generator(2))


def queries(dtype: torch.dtype = torch.float64) -> Tensor:
    return make_inputs(3, dtype=dtype, seed=8)


def momentum(model: nn.Module, **settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    loss: Callable[..., Tensor] = CE,
    before: Callable[[int, pk.KernelRecorder], None] | None = None,
    edit: Callable[[int, pk.KernelRecorder], None] | None = None,
    after: Callable[[int, pk.KernelRecorder], None] | None = None,
    batches: Sequence[Sequence[int]] = BATCHES,
    **options: Any,
) -> pk.Trajectory:
    """Train on record: something may happen before each batch, to each gradient, and after each step."""
    nothing = lambda k, recorder: None  # noqa: E731
    with pk.KernelRecorder(model, optimizer, loss, data=data(), **{"audit_every": 1, **options}) as recorder:
        for k, ids in enumerate(batches):
            (before or nothing)(k, recorder)
            x, y = recorder.batch(list(ids))
            optimizer.zero_grad()
            loss(model(x), y).backward()
            (edit or nothing)(k, recorder)
            optimizer.step()
            (after or nothing)(k, recorder)
    return recorder.trajectory


def complete(
    trajectory: pk.Trajectory, channels: Sequence[str] = (), unexplained_up_to: float | None = None, **options: Any
) -> pk.Attributions:
    """Explain output 0, once nothing is left over and the machine says what the live network says."""
    machine, X = pk.KernelMachine(trajectory, **options), queries(trajectory.dtype)
    why = machine.explain(X, outputs=0)
    residual = 1e-10 if trajectory.dtype == torch.float64 else TOLERANCES[torch.float32].residual
    assert why.relative_residual <= residual
    with torch.no_grad():
        live = trajectory.model(X).numpy()
    np.testing.assert_allclose(machine.decision_function(X), live, atol=residual * np.abs(live).max())
    np.testing.assert_allclose(why.reconstruction, live[:, 0], atol=residual * np.abs(live).max())
    moved = np.abs(why.output - why.initial).max()
    for name in channels:
        assert np.abs(why.channels[name]).max() > 1e-4 * moved
    if "unexplained" not in channels:
        assert np.abs(why.channels["rounding"]).max() <= (unexplained_up_to or residual) * moved
    assert set(why.channels) == {"initial", "rounding", *channels}
    return why


def oracle(
    trajectory: pk.Trajectory, rows: Sequence[tuple[Sequence[int], Tensor]], rate: Any, decay: Any = 0.0, mu: Any = 0.9
) -> tuple[np.ndarray, np.ndarray]:
    """Shares (Q, N) and the decay's channel (Q,) of output 0 under SGD, with a momentum buffer for every sample.

    θ is laid out in the model's own order. `rows` are ids and weighted gradients (B, P) of each step; rate, decay and
    mu are numbers or (P,), or a list of these with one for each step.
    """
    steps, size = len(trajectory), trajectory.layout.size
    every = lambda setting: setting if isinstance(setting, list) else [setting] * steps  # noqa: E731
    buffers = torch.zeros(SAMPLES + 1, size, dtype=torch.float64)
    shares = torch.zeros(len(queries()), SAMPLES + 1, dtype=torch.float64)
    for s, (ids, gradients) in enumerate(rows):
        received = torch.zeros_like(buffers)
        received.index_add_(0, torch.tensor(list(ids)), gradients)
        received[-1] = every(decay)[s] * reference.flatten(trajectory.model, trajectory.parameters(s))
        buffers = every(mu)[s] * buffers + received
        for q, x in enumerate(queries()):
            ends = trajectory.parameters(s), trajectory.parameters(s + 1)
            average = reference.discrete_gradient(trajectory.model, *ends, x, 0)
            shares[q] -= (every(rate)[s] * buffers) @ average
    return shares[:, :-1].numpy(), shares[:, -1].numpy()


def rows_of(
    trajectory: pk.Trajectory, loss: Callable[..., Tensor] = CE, batches: Sequence[Sequence[int]] = BATCHES
) -> list[tuple[Sequence[int], Tensor]]:
    """Weighted per-sample gradients of each step, by plain autograd."""
    (X, y), model = data(), trajectory.model
    return [
        (ids, reference.sample_gradients(model, trajectory.parameters(s), loss, X[list(ids)], y[list(ids)]))
        for s, ids in enumerate(batches)
    ]


# -- gradient accumulation --------------------------------------------------------------------------------------------


def accumulate(
    steps: Sequence[Sequence[Sequence[int]]],
    scale: Callable[[Sequence[int], Sequence[Sequence[int]]], float],
    loss: nn.Module = CE,
    make: Callable[[nn.Module], torch.optim.Optimizer] = momentum,
    weights: bool = False,
) -> pk.Trajectory:
    """One step for each list of micro-batches; each one's loss is multiplied by ``scale(micro, all of them)``."""
    model = make_model()
    optimizer = make(model)
    with pk.KernelRecorder(model, optimizer, loss, data=data(), audit_every=1) as recorder:
        for micros in steps:
            for micro in micros:
                n = sum(map(len, micros))
                x, y = recorder.batch(list(micro), weights=[1 / n] * len(micro) if weights else None)
                (loss(model(x), y) * scale(micro, micros)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return recorder.trajectory


@pytest.mark.parametrize("make", [momentum, adam])
def test_micro_batches_of_equal_size_are_one_batch(make) -> None:
    steps = [[(0, 1), (2, 3), (4, 5)], [(6, 7), (8, 9), (10, 11)], [(1, 1), (0, 7), (9, 2)]]
    parts = accumulate(steps, lambda micro, micros: 1 / len(micros), make=make)
    whole = accumulate([[sum(micros, ())] for micros in steps], lambda micro, micros: 1.0, make=make)
    assert [len(step.batches) for step in parts.steps()] == [3, 3, 3]
    np.testing.assert_allclose(complete(parts).shares, complete(whole).shares, rtol=0, atol=1e-12)


RAGGED = [[(0, 1, 2), (3,), (4, 5)], [(6,), (7, 8, 9, 10)], [(11, 0), (3, 1, 2), (5,), (5, 7)]]
NORMALISATIONS = {
    "sum of losses over n": (CE_SUM, lambda micro, micros: 1 / sum(map(len, micros)), False),
    "means by their size": (CE, lambda micro, micros: len(micro) / sum(map(len, micros)), True),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_ragged_micro_batches_that_are_one_mean(name: str) -> None:
    loss, scale, weights = NORMALISATIONS[name]
    parts = accumulate(RAGGED, scale, loss, weights=weights)
    whole = accumulate([[sum(micros, ())] for micros in RAGGED], lambda micro, micros: 1.0)
    np.testing.assert_allclose(complete(parts).shares, complete(whole).shares, rtol=0, atol=1e-12)


def test_ragged_means_divided_by_their_number_weigh_small_micro_batches_more() -> None:
    run = accumulate(RAGGED, lambda micro, micros: 1 / len(micros))
    X, y = data()
    rows = []
    for s, micros in enumerate(RAGGED):
        pieces = [
            reference.sample_gradients(run.model, run.parameters(s), CE, X[list(m)], y[list(m)]) / len(micros)
            for m in micros
        ]
        rows.append((sum(micros, ()), torch.cat(pieces)))
    np.testing.assert_allclose(complete(run).shares, oracle(run, rows, 0.1)[0], atol=DOUBLE.shares)


AHEAD = [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9], [10, 11, 0], [2, 5]]


@pytest.mark.parametrize("by_loader", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_next_batch_may_come_while_one_is_under_way(ahead: bool, by_loader: bool) -> None:
    """As where the next batch is fetched between forward and backward pass, also the last one before a step."""
    X, y = data()
    model = make_model()
    optimizer = adam(model)
    dataset = torch.utils.data.TensorDataset(X, y)
    loader = pk.indexed(torch.utils.data.DataLoader(dataset, batch_sampler=AHEAD))  # type: ignore[arg-type]
    with pk.KernelRecorder(model, optimizer, CE, data=dataset, audit_every=1) as recorder:
        given = (recorder.take_ids(batch) for batch in loader) if by_loader else map(recorder.announce, AHEAD)
        batch = next(given)
        for k in range(len(AHEAD)):
            value = CE(model(batch[0]), batch[1]) / 2
            if ahead:
                batch = next(given, None)
            value.backward()
            if k % 2:
                optimizer.step()
                optimizer.zero_grad()
            if not ahead:
                batch = next(given, None)
    why = complete(recorder.trajectory)
    steps = list(recorder.trajectory.steps())
    assert [[batch.ids.tolist() for batch in step.batches] for step in steps] == [AHEAD[:2], AHEAD[2:4], AHEAD[4:]]
    assert why.samples_checked == 1


def test_a_batch_that_came_ahead_and_is_never_run_is_not_blamed() -> None:
    def fetch(k: int, recorder: pk.KernelRecorder) -> None:
        recorder.announce([11, 10])  # between the backward pass and the step

    trajectory = train(model := make_model(), momentum(model), edit=fetch)
    assert [[batch.ids.tolist() for batch in step.batches] for step in trajectory.steps()] == [
        [list(ids)] for ids in BATCHES
    ]
    complete(trajectory)


def test_many_micro_batches() -> None:
    order = torch.randperm(SAMPLES, generator=generator(4)).tolist()
    run = accumulate([[(i,) for i in order] * 2] * 3, lambda micro, micros: 1 / len(micros))
    assert [len(step.batches) for step in run.steps()] == [24] * 3
    rows = rows_of(run, CE, [tuple(order)] * 3)
    np.testing.assert_allclose(complete(run).shares, oracle(run, rows, 0.1)[0], atol=DOUBLE.shares)


# -- clipping ---------------------------------------------------------------------------------------------------------


def clip_by_norm(parameters: list[Tensor]) -> None:
    nn.utils.clip_grad_norm_(parameters, 0.2)


def clip_by_value(parameters: list[Tensor]) -> None:
    nn.utils.clip_grad_value_(parameters, 0.03)


def clip_each(parameters: list[Tensor]) -> None:
    for p in parameters:
        nn.utils.clip_grad_norm_([p], 0.05)


@pytest.mark.parametrize("clip", [clip_by_norm, clip_by_value, clip_each])
def test_clipping_scales_what_every_sample_did(clip) -> None:
    model = make_model()
    factors = []

    def edit(k: int, recorder: pk.KernelRecorder) -> None:
        gradient = torch.cat([p.grad.reshape(-1).clone() for p in model.parameters()])
        clip(list(model.parameters()))
        clipped = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        factors.append(clipped / gradient)

    run = train(model, momentum(model), edit=edit)
    assert all((factor < 0.9).any() for factor in factors), "nothing was clipped: the test says nothing"
    rows = [(ids, factor * gradients) for factor, (ids, gradients) in zip(factors, rows_of(run), strict=True)]
    np.testing.assert_allclose(complete(run).shares, oracle(run, rows, 0.1)[0], atol=DOUBLE.shares)


# -- parameter groups -------------------------------------------------------------------------------------------------


def test_groups_with_rates_and_decays_of_their_own() -> None:
    model = make_model()
    groups = [
        {"params": [model[0].weight], "lr": 0.05, "weight_decay": 0.3, "momentum": 0.5},
        {"params": [model[2].weight, model[2].bias], "lr": 0.2, "weight_decay": 0.1},
        {"params": [model[0].bias]},
    ]
    run = train(model, torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    each = {"0.weight": (0.05, 0.3, 0.5), "0.bias": (0.1, 0.0, 0.9)}
    settings = [(p.numel(), each.get(name, (0.2, 0.1, 0.9))) for name, p in model.named_parameters()]
    rate, decay, mu = (
        torch.cat([torch.full((n,), s[which], dtype=torch.float64) for n, s in settings]) for which in range(3)
    )
    why = complete(run, ["weight_decay"])
    shares, decayed = oracle(run, rows_of(run), rate, decay, mu)
    np.testing.assert_allclose(why.shares, shares, atol=DOUBLE.shares)
    np.testing.assert_allclose(why.channels["weight_decay"], decayed, atol=DOUBLE.shares)


@pytest.mark.parametrize("frozen_before", [True, False])
def test_a_group_added_on_the_way(frozen_before: bool) -> None:
    model = make_model()
    late = list(model[0].parameters())
    for p in late:
        p.requires_grad_(not frozen_before)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)

    def before(k: int, recorder: pk.KernelRecorder) -> None:
        if k == 2:
            for p in late:
                p.requires_grad_(True)
            optimizer.add_param_group({"params": late, "lr": 0.05, "weight_decay": 0.2})

    run = train(model, optimizer, before=before)
    assert run.layout.size == sum(p.numel() for p in model.parameters())
    why = complete(run, ["weight_decay"])
    late_entries = torch.cat(
        [torch.full((p.numel(),), float(name.startswith("0"))) for name, p in model.named_parameters()]
    ).double()
    joined = [late_entries * (s >= 2) for s in range(len(BATCHES))]
    rows = [
        (ids, gradients * (1 - late_entries + active))
        for active, (ids, gradients) in zip(joined, rows_of(run), strict=True)
    ]
    rate = 0.1 - 0.05 * late_entries
    shares, decayed = oracle(run, rows, rate, [0.2 * active for active in joined])
    np.testing.assert_allclose(why.shares, shares, atol=DOUBLE.shares)
    np.testing.assert_allclose(why.channels["weight_decay"], decayed, atol=DOUBLE.shares)


def test_gradients_of_parameters_that_nobody_trains_do_not_matter() -> None:
    # They require gradients, but the optimizer neither moves them nor sets their gradients to zero.
    model = make_model()
    run = train(model, torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9))
    assert model[0].weight.grad is not None
    nothing = torch.cat([torch.full((p.numel(),), float(n[0] == "2")) for n, p in model.named_parameters()]).double()
    rows = [(ids, gradients * nothing) for ids, gradients in rows_of(run)]
    np.testing.assert_allclose(complete(run).shares, oracle(run, rows, 0.1)[0], atol=DOUBLE.shares)


def test_a_skipped_batch_is_found_although_some_gradients_are_never_cleared() -> None:
    model, ids = make_model(), []
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=data()) as recorder:
        for k in range(4):
            x, y = recorder.batch([2 * k, 2 * k + 1])
            optimizer.zero_grad()
            CE(model(x), y).backward()
            if k % 2:
                optimizer.step()
                ids.append([2 * k, 2 * k + 1])
    assert [torch.cat([b.ids for b in step.batches]).tolist() for step in recorder.trajectory.steps()] == ids
    complete(recorder.trajectory)


@pytest.mark.parametrize("make", [momentum, adam])
def test_parameters_frozen_and_unfrozen_on_the_way(make) -> None:
    model = make_model()
    model[2].weight.requires_grad_(False)

    def before(k: int, recorder: pk.KernelRecorder) -> None:
        model[2].weight.requires_grad_(k >= 2)
        if k == 3:  # gradients of None are skipped, so that momentum does not move it either
            model[0].weight.requires_grad_(False).grad = None

    run = train(model, make(model), before=before)
    model[0].weight.requires_grad_(True)
    active = [step.active for step in run.steps()]
    assert ["2.weight" in names for names in active] == [False, False, True, True, True]
    assert ["0.weight" in names for names in active] == [True, True, True, False, False]
    assert torch.equal(run.parameters(2)["2.weight"], run.parameters(0)["2.weight"])
    assert torch.equal(run.parameters(5)["0.weight"], run.parameters(3)["0.weight"])
    complete(run)


def test_a_parameter_that_changed_before_it_joined_is_refused() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([model[0].bias, *model[2].parameters()], lr=0.1)

    def before(k: int, recorder: pk.KernelRecorder) -> None:
        if k == 2:
            with torch.no_grad():
                model[0].weight.mul_(2)
            optimizer.add_param_group({"params": [model[0].weight.requires_grad_(True)]})

    with pytest.raises(errors.RecordingError) as caught:
        train(model, optimizer, before=before)
    assert caught.value.found == "Parameters `0.weight` joined the optimizer and had changed before"
    assert "a constant since recording began" in caught.value.expected
    assert "make a new KernelRecorder here" in caught.value.write


def put_another_layer_in(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[2] = copy.deepcopy(model[2])


def put_one_more_layer_in(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.append(nn.Linear(3, 3).double())
    optimizer.add_param_group({"params": list(model[3].parameters())})


def load_with_assign(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("loss", [CE, None], ids=["loss", "no loss"])
@pytest.mark.parametrize(
    "change, named",
    [
        (put_another_layer_in, "`2.weight`, `2.bias`"),
        (put_one_more_layer_in, "`3.weight`, `3.bias`"),
        (load_with_assign, "`0.weight`, `0.bias`, `2.weight`, `2.bias`"),
    ],
)
def test_parameters_that_the_network_did_not_have_are_refused_by_name(change: Any, named: str, loss: Any) -> None:
    model, (X, y) = make_model(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {} if loss is not None else {"task": "classification"}
    with (
        pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1, **options) as recorder,
        pytest.raises(errors.RecordingError) as caught,
    ):
        for k, ids in enumerate(BATCHES):
            if k == 2:
                change(model, optimizer)
            x, target = recorder.batch(list(ids))
            optimizer.zero_grad()
            CE(model(x), target).backward()
            before = copy.deepcopy(model.state_dict())
            optimizer.step()
    assert f"parameters {named} are not those that it had when recording began" in caught.value.found
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- tied weights -----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An autoencoder with one weight for both ways, and a free output bias."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.down, self.up = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.up.weight = self.down.weight if tied else nn.Parameter(self.down.weight.detach().clone())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(x)))


def test_tied_weights_count_once() -> None:
    X, loss, model = data()[0], nn.MSELoss(), Tied()
    optimizer = momentum(model, weight_decay=0.1)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, X), audit_every=1) as recorder:
        for ids in BATCHES:
            x, y = recorder.batch(list(ids))
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    run = recorder.trajectory
    assert run.layout.names == ("down.weight", "up.bias") and run.layout.size == 20
    rows = []
    for s, ids in enumerate(BATCHES):
        # An untied twin: the gradient of the shared weight is the sum over both places.
        values, twin = run.parameters(s), Tied(tied=False)
        with torch.no_grad():
            twin.down.weight.copy_(values["down.weight"])
            twin.up.weight.copy_(values["down.weight"])
            twin.up.bias.copy_(values["up.bias"])
        gradients = []
        for i in ids:
            single = loss(twin(X[[i]]), X[[i]]) / len(ids)
            down, up, bias = torch.autograd.grad(single, [twin.down.weight, twin.up.weight, twin.up.bias])
            gradients.append(torch.cat([(down + up).reshape(-1), bias]))
        rows.append((ids, torch.stack(gradients)))
    why = complete(run, ["weight_decay"])
    shares, decayed = oracle(run, rows, 0.1, 0.1)
    np.testing.assert_allclose(why.shares, shares, atol=DOUBLE.shares)
    np.testing.assert_allclose(why.channels["weight_decay"], decayed, atol=DOUBLE.shares)


# -- schedules --------------------------------------------------------------------------------------------------------


def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=len(BATCHES), div_factor=4)


def test_one_cycle_moves_rate_and_momentum_of_sgd() -> None:
    model = make_model()
    optimizer, used = momentum(model), []
    scheduler = one_cycle(optimizer)

    def after(k: int, recorder: pk.KernelRecorder) -> None:
        used.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        if k < len(BATCHES) - 1:
            scheduler.step()

    run = train(model, optimizer, after=after)
    rates, momenta = ([u[which] for u in used] for which in (0, 1))
    assert len(set(rates)) > 3 and len(set(momenta)) > 3
    shares, _ = oracle(run, rows_of(run), rates, mu=momenta)
    np.testing.assert_allclose(complete(run).shares, shares, atol=DOUBLE.shares)


def test_one_cycle_moves_rate_and_betas_of_adam() -> None:
    model = make_model()
    optimizer, used = torch.optim.Adam(model.parameters()), []
    scheduler = one_cycle(optimizer)

    def after(k: int, recorder: pk.KernelRecorder) -> None:
        used.append(optimizer.param_groups[0]["betas"])
        if k < len(BATCHES) - 1:
            scheduler.step()

    run = train(model, optimizer, after=after)
    assert len({betas[0] for betas in used}) > 3
    assert [step.hyperparameters[0]["betas"] for step in run.steps()] == used
    complete(run)


# -- mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The batches of step 0 do not give its gradient again")  # unscaled, or clipped
@pytest.mark.parametrize("level", ["every step", "keyframes"])
@pytest.mark.parametrize("clipped", [False, True], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_a_step_that_overflows_under_loss_scaling_is_not_blamed_on_anybody(
    fused: bool, clipped: bool, level: str
) -> None:
    (X, y), model = data(torch.float32), make_model(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    options = {"schedule": pk.Schedule(keyframes=2)} if level == "keyframes" else {}
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y), **options) as recorder:
        for k, ids in enumerate(BATCHES):
            x, target = recorder.batch(list(ids))
            optimizer.zero_grad()
            loss = CE(model(x), target)
            scaler.scale(loss * float("inf") if k == 2 else loss).backward()
            if clipped:  # the norm of an overflowed gradient is infinite, and the gradient is NaN then
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            scaler.step(optimizer)
            scaler.update()
    run = recorder.trajectory
    assert len(run) == len(BATCHES) - 1
    ids = [tuple(torch.cat([batch.ids for batch in step.batches]).tolist()) for step in run.steps()]
    assert ids == [batch for k, batch in enumerate(BATCHES) if k != 2]
    why = complete(run)
    blamed = set(np.flatnonzero(np.abs(why.shares).max(axis=0)))
    assert blamed == {0, 1, 2, 3, 4, 5, 6, 7, 9}  # 8, 10 and 11 were in the skipped batch alone
    # Once unscaled, these are the gradients of an ordinary run.
    rows = rows_of(run, CE, ids)
    for step, (_, gradients) in zip(run.steps(), rows, strict=True):
        expected = gradients.sum(dim=0)
        assert (step.gradient.double() - expected).norm() < 1e-5 * expected.norm()


def test_training_under_bfloat16_autocast() -> None:
    (X, y), model = data(torch.float32), make_model("relu", dtype=torch.float32)
    optimizer = momentum(model)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y), audit_every=1) as recorder:
        for ids in BATCHES:
            x, target = recorder.batch(list(ids))
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = CE(model(x), target)
            loss.backward()
            optimizer.step()
    run = recorder.trajectory
    assert {batch.state.autocast for step in run.steps() for batch in step.batches} == {("cpu", torch.bfloat16)}
    # Single samples and whole batches are rounded to bfloat16 one by one: so much stays unexplained, and no more.
    why = complete(run, unexplained_up_to=2e-3)
    # What float32 would have done differs by bfloat16's rounding, a few thousandths; the record reproduces bfloat16.
    exact = [gradients.sum(dim=0) for _, gradients in rows_of(run)]
    off = [((step.gradient.double() - g).norm() / g.norm()).item() for step, g in zip(run.steps(), exact, strict=True)]
    assert 1e-4 < max(off) < 0.05
    assert np.abs(why.shares).sum() > np.abs(why.output - why.initial).min() / 2


# -- changes that no sample made --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [momentum, adam])
def test_noise_on_the_weights_in_a_channel(make) -> None:
    model, draws = make_model(), generator(6)

    def after(k: int, recorder: pk.KernelRecorder) -> None:
        with recorder.channel("noise"), torch.no_grad():
            for p in model.parameters():
                p.add_(1e-2 * torch.randn(p.shape, generator=draws, dtype=p.dtype))

    run = train(model, make(model), after=after)
    why = complete(run, ["noise"])
    # Each push moves f by the difference of two forward passes, which the kernel machine never takes by itself.
    pushes = [(s.start, s.end) for s in run.segments() if s.step is None]
    assert len(pushes) == len(BATCHES)
    moved = sum(outputs(run, end) - outputs(run, start) for start, end in pushes)
    np.testing.assert_allclose(why.channels["noise"], moved, atol=DOUBLE.shares)


def outputs(trajectory: pk.Trajectory, theta: Tensor) -> np.ndarray:
    twin = copy.deepcopy(trajectory.model)
    for name, value in trajectory.layout.unflatten(theta).items():
        twin.get_parameter(name).data.copy_(value)
    return twin(queries())[:, 0].detach().numpy()


def test_projection_and_noise_in_channels_of_their_own() -> None:
    model, draws = make_model(), generator(6)

    def after(k: int, recorder: pk.KernelRecorder) -> None:
        with torch.no_grad():
            with recorder.channel("noise"):
                model[0].weight.add_(1e-2 * torch.randn(5, 4, generator=draws, dtype=torch.float64))
            with recorder.channel("projection"):
                model[0].weight.clamp_(-0.3, 0.3)
                model[2].weight.mul_(0.5 / model[2].weight.norm())

    run = train(model, momentum(model), after=after)
    assert [s.channel for s in run.segments()] == ["", "noise", "projection"] * len(BATCHES)
    why = complete(run, ["noise", "projection"])
    for name in ("noise", "projection"):
        pieces = [s for s in run.segments() if s.channel == name]
        moved = sum(outputs(run, s.end) - outputs(run, s.start) for s in pieces)
        np.testing.assert_allclose(why.channels[name], moved, atol=DOUBLE.shares)


def test_unnamed_changes_are_unexplained_and_refused_when_large() -> None:
    model = make_model()

    def after(k: int, recorder: pk.KernelRecorder) -> None:
        if k in (1, 2):
            with torch.no_grad():
                model[2].weight.mul_(1.01 if k == 1 else 1.2)

    run = train(model, momentum(model), after=after)
    X = queries()
    machine = pk.KernelMachine(run)
    for ask in (machine.decision_function, machine.explain, machine.predict):
        with pytest.raises(errors.TrajectoryError) as caught:
            ask(X)
        error = caught.value
        change = run.parameters(3)["2.weight"] * (1 - 1 / 1.2)
        assert "% of what moved these outputs is unexplained" in error.found
        assert f"a change of `2.weight` by {change.norm().item():.2g} before step 3" in error.found
        assert "No more than 1.0% may come from changes that no sample" in error.expected
        assert 'recorder.channel("projection")' in error.write
        assert "`KernelMachine(..., unexplained=1.0)`" in error.write
    why = complete(run, ["unexplained"], unexplained=1.0)
    moved = sum(outputs(run, s.end) - outputs(run, s.start) for s in run.segments() if s.step is None)
    np.testing.assert_allclose(why.channels["unexplained"], moved, atol=DOUBLE.shares)


def test_an_unnamed_change_after_the_last_step_is_found_too() -> None:
    model = make_model()

    def after(k: int, recorder: pk.KernelRecorder) -> None:
        if k == len(BATCHES) - 1:
            with torch.no_grad():
                model[0].bias.add_(0.5)

    run = train(model, momentum(model), after=after)
    with pytest.raises(errors.TrajectoryError, match=r"a change of `0.bias` by 1.1 after the last step"):
        pk.KernelMachine(run).explain(queries())
    complete(run, ["unexplained"], unexplained=10.0)


def test_what_is_advised_lets_through_changes_larger_than_what_is_left() -> None:
    """Weights set most of the way back by hand took more than training left."""
    model = make_model()
    start = [p.detach().clone() for p in model.parameters()]

    def after(k: int, recorder: pk.KernelRecorder) -> None:
        if k == len(BATCHES) - 1:
            with torch.no_grad():
                for p, before in zip(model.parameters(), start, strict=True):
                    p.lerp_(before, 0.8)

    run = train(model, momentum(model), after=after)
    with pytest.raises(errors.TrajectoryError, match=r"[1-9]\d\d\.\d% of what moved these outputs is unexpl") as caught:
        pk.KernelMachine(run).explain(queries())
    advised = re.search(r"unexplained=([\d.]+)\)", caught.value.write)
    assert advised is not None
    complete(run, ["unexplained"], unexplained=float(advised[1]))


def test_small_unnamed_changes_are_let_through() -> None:
    model = make_model()

    def after(k: int, recorder: pk.KernelRecorder) -> None:
        with torch.no_grad():
            model[0].bias.add_(1e-6)

    why = pk.KernelMachine(train(model, momentum(model), after=after)).explain(queries(), outputs=0)
    assert why.relative_residual <= 1e-10
    assert 0 < np.abs(why.channels["unexplained"]).max() < 1e-3 * np.abs(why.output - why.initial).max()


@pytest.mark.parametrize("edits", [1, 2])
def test_gradient_noise_in_a_channel(edits: int) -> None:
    model, draws, added = make_model(), generator(6), []

    def edit(k: int, recorder: pk.KernelRecorder) -> None:
        noise = [0.05 * torch.randn(p.shape, generator=draws, dtype=p.dtype) for p in model.parameters()]
        for _ in range(edits):
            with recorder.channel("gradient noise"):
                for p, n in zip(model.parameters(), noise, strict=True):
                    p.grad.add_(n / edits)
        added.append(torch.cat([n.reshape(-1) for n in noise]))

    run = train(model, momentum(model), edit=edit)
    why = complete(run, ["gradient noise"])
    np.testing.assert_allclose(why.shares, oracle(run, rows_of(run), 0.1)[0], atol=DOUBLE.shares)
    noise = [((0,), row[None]) for row in added]  # as if a sample of its own had sent it
    np.testing.assert_allclose(why.channels["gradient noise"], oracle(run, noise, 0.1)[0][:, 0], atol=DOUBLE.shares)


def test_gradient_noise_without_a_name_is_refused() -> None:
    model = make_model()

    def edit(k: int, recorder: pk.KernelRecorder) -> None:
        for p in model.parameters():
            p.grad.add_(0.1 * torch.randn(p.shape, generator=generator(k), dtype=p.dtype))

    with pytest.raises(errors.SampleIdError) as caught:
        train(model, momentum(model), edit=edit)
    assert "At step 0 the gradient differs from that of the announced samples by" in caught.value.found
    assert "the optimizer has not moved" in caught.value.expected
    assert "edits of gradients stand inside" in caught.value.write and "`regularizers=`" in caught.value.write
    run = train(model, momentum(model), edit=edit, audit_every=0)
    with pytest.raises(errors.TrajectoryError) as later:
        pk.KernelMachine(run).explain(queries())
    assert "the samples on record explain the gradient only up to" in later.value.found
    assert "the sum over the recorded samples of their part of the loss" in later.value.expected
    assert "`KernelRecorder(..., audit_every=1)` tells at which step it begins" in later.value.write


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_noise_of_a_skipped_step_is_forgotten(fused: bool) -> None:
    (X, y), model = data(torch.float32), make_model(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y)) as recorder:
        for k, ids in enumerate(BATCHES):
            x, target = recorder.batch(list(ids))
            optimizer.zero_grad()
            loss = CE(model(x), target)
            scaler.scale(loss * float("inf") if k == 2 else loss).backward()
            if k == 2:
                with recorder.channel("noise"):
                    model[0].weight.grad.add_(1.0)
            scaler.step(optimizer)
            scaler.update()
    complete(recorder.trajectory)


# -- which samples, and how much of each ------------------------------------------------------------------------------


def test_samples_drawn_with_replacement_count_as_often_as_they_were_drawn() -> None:
    draws = generator(7)
    batches = [torch.randint(SAMPLES, (5,), generator=draws).tolist() for _ in range(4)]
    assert any(len(set(ids)) < 5 for ids in batches)
    model = make_model()
    run = train(model, momentum(model), batches=batches)
    (X, y), rows = data(), []
    for s, ids in enumerate(batches):
        kinds, counts = np.unique(ids, return_counts=True)
        gradients = reference.sample_gradients(model, run.parameters(s), CE_SUM, X[kinds], y[kinds])
        rows.append((kinds.tolist(), gradients * torch.from_numpy(counts / 5)[:, None]))
    np.testing.assert_allclose(complete(run).shares, oracle(run, rows, 0.1)[0], atol=DOUBLE.shares)


def test_samples_left_out_by_drop_last_have_no_share() -> None:
    model, seen = make_model(), []
    optimizer = momentum(model)
    with pk.KernelRecorder(model, optimizer, CE, data=data(), audit_every=1) as recorder:
        for x, y in recorder.batches(5, shuffle=True, drop_last=True, generator=generator(9)):
            seen.append(x)
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    assert [len(x) for x in seen] == [5, 5]
    shares = complete(recorder.trajectory).shares
    left_out = [i for i in range(SAMPLES) if not any((x == data()[0][i]).all(dim=1).any() for x in seen)]
    assert len(left_out) == 2
    assert set(np.flatnonzero((shares == 0).all(axis=0))) == set(left_out)


@pytest.mark.parametrize("loss", [CE_NONE, CE, CE_SUM], ids=["none", "mean", "sum"])
def test_weights_for_every_sample(loss: nn.Module) -> None:
    model, (X, y) = make_model(), data()
    optimizer, rows = momentum(model), []
    weights = torch.rand(SAMPLES, generator=generator(3), dtype=torch.float64)
    weights[5] = 0
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1) as recorder:
        for batch in BATCHES:
            ids = list(batch)
            w = weights[ids] / weights[ids].sum()
            x, target = recorder.batch(ids, weights=w)
            optimizer.zero_grad()
            (CE_NONE(model(x), target) * w).sum().backward()
            here = {name: p.detach().clone() for name, p in model.named_parameters()}
            rows.append((ids, w[:, None] * reference.sample_gradients(model, here, CE_SUM, X[ids], y[ids])))
            optimizer.step()
    why = complete(recorder.trajectory)
    np.testing.assert_allclose(why.shares, oracle(recorder.trajectory, rows, 0.1)[0], atol=DOUBLE.shares)
    assert (why.shares[:, 5] == 0).all()


def test_regularizers_have_channels_of_their_own() -> None:
    model = make_model()
    terms = {
        "ridge": lambda p: 0.05 * sum(v.square().sum() for v in p.values()),
        "lasso": lambda p: 0.02 * p["0.weight"].abs().sum(),
        "constant": lambda p: torch.ones((), dtype=torch.float64),
    }
    optimizer, factors = momentum(model), []
    with pk.KernelRecorder(model, optimizer, CE, data=data(), regularizers=terms, audit_every=1) as recorder:
        for ids in BATCHES:
            x, y = recorder.batch(list(ids))
            optimizer.zero_grad()
            named = dict(model.named_parameters())
            (CE(model(x), y) + sum(term(named) for term in terms.values())).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            factors.append(min(1.0, 0.3 / (norm.item() + 1e-6)))
            optimizer.step()
    run = recorder.trajectory
    machine, X = pk.KernelMachine(run), queries()
    why = machine.explain(X, outputs=0)
    assert why.relative_residual <= 1e-10 and (why.channels["constant"] == 0).all()
    np.testing.assert_allclose(machine.decision_function(X), model(X).detach(), atol=DOUBLE.shares)
    assert min(factors) < 0.7
    clipped = [(ids, factor * rows) for factor, (ids, rows) in zip(factors, rows_of(run), strict=True)]
    np.testing.assert_allclose(why.shares, oracle(run, clipped, 0.1)[0], atol=DOUBLE.shares)
    pulls = {"ridge": [], "lasso": []}
    for s in range(len(run)):
        values = {name: v.clone().requires_grad_(True) for name, v in run.parameters(s).items()}
        for name, rows in pulls.items():
            gradient = torch.autograd.grad(
                terms[name](values), list(values.values()), allow_unused=True, materialize_grads=True
            )
            rows.append(((0,), factors[s] * torch.cat([g.reshape(-1) for g in gradient])[None]))
    for name, rows in pulls.items():
        np.testing.assert_allclose(why.channels[name], oracle(run, rows, 0.1)[0][:, 0], atol=DOUBLE.shares)


def test_a_regularizer_that_is_not_named_is_refused() -> None:
    model = make_model()
    optimizer = momentum(model)
    with pk.KernelRecorder(model, optimizer, CE, data=data()) as recorder:
        x, y = recorder.batch([0, 1])
        (CE(model(x), y) + 0.1 * model[0].weight.square().sum()).backward()
        with pytest.raises(errors.SampleIdError, match=r"`0.weight` .*regularizers="):
            optimizer.step()


# -- what cannot be put on record -------------------------------------------------------------------------------------


def test_lbfgs_is_refused() -> None:
    model = make_model()
    with pytest.raises(errors.UnsupportedOptimizerError) as caught:
        pk.KernelRecorder(model, torch.optim.LBFGS(model.parameters()), CE, data=data())
    assert "LBFGS` has no update rule" in caught.value.found
    assert "a step on record has one gradient" in caught.value.expected
    assert "rule=" in caught.value.write
