"""Loops as they are written in practice: accumulation, clipping, groups, mixed precision, noise, weights."""

from __future__ import annotations

import copy
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


def complete(trajectory: pk.Trajectory, channels: Sequence[str] = (), **options: Any) -> pk.Attributions:
    """Explain output 0 after checking that nothing is left over and that the machine says what the live network says."""
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
        assert np.abs(why.channels["unexplained"]).max() <= residual * moved
    assert set(why.channels) == {"initial", "unexplained", *channels}
    return why


def oracle(
    trajectory: pk.Trajectory, rows: Sequence[tuple[Sequence[int], Tensor]], rate: Any, decay: Any = 0.0, mu: Any = 0.9
) -> tuple[np.ndarray, np.ndarray]:
    """Shares (Q, N) and the decay's channel (Q,) of output 0 under SGD, with a momentum buffer for every sample.

    `rows` are ids and weighted gradients (B, P) of each step; rate, decay and mu are numbers, or one for each step or
    each entry of θ.
    """
    steps, size = len(trajectory), trajectory.layout.size
    every = lambda setting: setting if isinstance(setting, list) else [setting] * steps  # noqa: E731
    buffers = torch.zeros(SAMPLES + 1, size, dtype=torch.float64)
    shares = torch.zeros(len(queries()), SAMPLES + 1, dtype=torch.float64)
    for s, (ids, gradients) in enumerate(rows):
        received = torch.zeros_like(buffers)
        received.index_add_(0, torch.tensor(list(ids)), gradients)
        received[-1] = every(decay)[s] * trajectory.vector(s)
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


# -- gradient accumulation ----------------------------------------------------------------------------------------------


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


def test_many_micro_batches() -> None:
    order = torch.randperm(SAMPLES, generator=generator(4)).tolist()
    run = accumulate([[(i,) for i in order] * 2] * 3, lambda micro, micros: 1 / len(micros))
    assert [len(step.batches) for step in run.steps()] == [24] * 3
    rows = rows_of(run, CE, [tuple(order)] * 3)
    np.testing.assert_allclose(complete(run).shares, oracle(run, rows, 0.1)[0], atol=DOUBLE.shares)


# -- clipping -------------------------------------------------------------------------------------------------------------


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


# -- parameter groups -----------------------------------------------------------------------------------------------------


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
    first = torch.cat([torch.full((p.numel(),), float(n.startswith("0"))) for n, p in model.named_parameters()])
    order = torch.cat([first[: 0], *(torch.full((run.layout.shapes[i].numel(),), float(name.startswith("0")))
                                     for i, name in enumerate(run.layout.names))]).double()
    X, y = data()
    rows = []
    for s, ids in enumerate(BATCHES):
        # The oracle lays θ out as the model does; the record has late parameters at its end.
        gradients = reference.sample_gradients(model, run.parameters(s), CE, X[list(ids)], y[list(ids)])
        rows.append((ids, gradients * (first * (s >= 2) + (1 - first))))
    assert first.sum() == order.sum()
    shares, decayed = late_oracle(run, rows, 0.05 * first + 0.1 * (1 - first), 0.2 * first)
    np.testing.assert_allclose(why.shares, shares, atol=DOUBLE.shares)
    np.testing.assert_allclose(why.channels["weight_decay"], decayed, atol=DOUBLE.shares)
