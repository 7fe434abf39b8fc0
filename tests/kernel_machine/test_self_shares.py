"""Shares of samples in their own losses, and of what sees a target: against the forward oracle, and `explain`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCHES, IN_ORACLE, LOSSES, OPTIMIZERS, SAMPLES, Recording, make_inputs, make_model, record
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import errors, reference

DOUBLE = TOLERANCES[torch.float64]


def close(found: Any, expected: Any, tolerance: float = DOUBLE.rounding) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1e-3, np.abs(expected).max()))


def margins(labels: Tensor) -> list[Any]:
    return [lambda z, y=y: reference.margin(z, y) for y in labels.reshape(-1).int().tolist()]


def decomposed(run: Recording, optimizer: str, X: Tensor, of: list[Any]) -> reference.Decomposition:
    oracle = OPTIMIZERS[optimizer].oracle
    assert oracle is not None
    return reference.decompose(
        run.start, run.loss, run.X, run.y, run.batches, oracle, X, of, "discrete", **run.settings
    )


@pytest.mark.parametrize(("loss", "optimizer"), [("ce_mean", "adamw"), ("bce", "momentum_dampening_decay")])
def test_margins_of_all_queries_in_one_call(loss: str, optimizer: str) -> None:
    run = record(loss=loss, optimizer=optimizer)
    labels = LOSSES[loss].targets(len(run.queries), seed=7)
    why = pk.KernelMachine(run.trajectory).explain((run.queries, labels), outputs="margin")
    oracle = decomposed(run, optimizer, run.queries, margins(labels))
    close(why.shares, oracle.shares)
    close(why.output, oracle.final)
    assert why.residual.max() < 1e-10


MOVING = ("sgd_maximize_decay", "nesterov_decay", "adam_decay", "adamw")


@pytest.mark.parametrize(
    "optimizer", [o if o in MOVING else pytest.param(o, marks=pytest.mark.exhaustive) for o in IN_ORACLE]
)
def test_self_shares_are_the_diagonal(optimizer: str) -> None:
    run = record(optimizer=optimizer)
    machine = pk.KernelMachine(run.trajectory)
    losses = [lambda z, y=y: nn.functional.cross_entropy(z[None], y[None]) for y in run.y]
    close(machine.self_shares(), decomposed(run, optimizer, run.X, losses).shares.diagonal())
    close(machine.self_shares("margin"), machine.explain((run.X, run.y), outputs="margin").shares.diagonal())


OPTIONS = {
    "chord": ("adam", {"form": "chord"}),
    "each query alone": ("sgd", {"quadrature": pk.Adaptive(1e-2)}),
    "rows": ("adam", {"engine": "jacobian"}),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_self_shares_of_any_machine(options: str) -> None:
    optimizer, given = OPTIONS[options]
    run = record("relu", optimizer=optimizer)
    machine = pk.KernelMachine(run.trajectory, **given)
    close(machine.self_shares(), machine.explain((run.X, run.y), outputs="loss").shares.diagonal(), 1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_self_shares_in_blocks(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(optimizer=optimizer)
    whole, machine = pk.KernelMachine(run.trajectory).self_shares(), pk.KernelMachine(run.trajectory)
    plan, asked = machine._plan, []

    def few(*given: Any) -> Any:
        asked.append(pk.kernel_machine.memory_plan.replace(plan(*given), queries=3))
        return asked[-1]

    monkeypatch.setattr(machine, "_plan", few)
    close(machine.self_shares(), whole)
    assert asked


def test_self_shares_where_rows_have_several_owners() -> None:
    torch.manual_seed(0)
    model, X, y = make_model(), make_inputs(SAMPLES), torch.arange(SAMPLES) % 3
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=0.01), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=0) as recorder:
        for ids in BATCHES:
            partners = list(reversed(ids))
            mixed = 0.7 * X[list(ids)] + 0.3 * X[partners]
            inputs, targets = recorder.announce(
                np.stack([ids, partners], axis=1), weights=[0.7, 0.3], inputs=mixed, targets=y[list(ids)]
            )
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()
    machine = pk.KernelMachine(recorder.trajectory)
    close(machine.self_shares(), machine.explain((X, y), outputs="loss").shares.diagonal())


def test_what_has_no_self_share() -> None:
    run = record()
    with pytest.raises(
        errors.InputError, match=r"`outputs=0` was given.*'loss' or 'margin'.*`machine.self_shares\(\)`"
    ):
        pk.KernelMachine(run.trajectory).self_shares(0)  # type: ignore[arg-type]
