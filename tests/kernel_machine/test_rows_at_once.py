"""Rows formed once a step, where pieces would be formed at each use: the same shares, and within the budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.gradients.factored import FactoredGradients
from pathkernel.kernel_machine import memory_plan
from pathkernel.kernel_machine.backward_sweep import Cuts
from pathkernel.kernel_machine.sweep_plan import Plan, with_rows

TOKENS, WIDTH = 12, 16


class Tied(nn.Module):
    """A table that is its own head, and a layer that is used at every position and once more."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.norm = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        mixed = torch.cumsum(torch.tanh(self.layer(torch.tanh(self.layer(x)))), 1)
        return mixed[:, -1] @ self.table.weight.T


def convolutional() -> nn.Module:
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.AvgPool2d(6)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 9))


def recorded(kind: str, optimizer: str) -> tuple[pk.Trajectory, Tensor]:
    torch.manual_seed(0)
    model = (Tied() if kind == "tied" else convolutional()).double()
    X = torch.randint(9, (20, TOKENS)) if kind == "tied" else torch.randn(20, 1, 8, 8, dtype=torch.float64)
    y, loss = torch.randint(9, (20,)), nn.CrossEntropyLoss()
    made: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if optimizer != "adamw":
        made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if optimizer == "momentum" else 0.0)
    with pk.KernelRecorder(model, made, loss, data=(X, y)) as recorder:
        for ids in torch.arange(20).split(5):
            x, target = recorder.batch(ids)
            made.zero_grad()
            loss(model(x), target).backward()
            made.step()
    return recorder.trajectory, X[:3]


def explained(trajectory: pk.Trajectory, X: Tensor, **asked: Any) -> tuple[pk.Attributions, Plan]:
    machine, plans = pk.KernelMachine(trajectory), []
    planned = machine._plan

    def noted(*given: Any) -> Plan:
        plans.append(planned(*given))
        return plans[-1]

    machine._plan = noted  # type: ignore[method-assign]
    return machine.explain(X, outputs=asked.pop("outputs", 0), **asked), plans[0]


@pytest.mark.parametrize(
    ("kind", "asked"),
    [("tied", {"by": "module"}), ("tied", {"outputs": "all"}), ("convolutional", {})],
    ids=["tied by module", "tied all", "convolutional"],
)
def test_shares_are_those_of_pieces(kind: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, X = recorded(kind, "adamw")
    why, plan = explained(trajectory, X, **asked)
    assert plan.passes == plan.queries == len(X) and plan.cuts.batch.rows
    monkeypatch.setattr(memory_plan, "POSITIONS", 1e9)
    expected, plan = explained(trajectory, X, **asked)
    assert plan.passes is None and not plan.cuts.batch.rows
    scale = abs(expected.shares).max()
    np.testing.assert_allclose(why.shares, expected.shares, rtol=0, atol=1e-12 * scale)
    for module, own in expected.modules.items() if "by" in asked else ():
        np.testing.assert_allclose(why.modules[module], own, rtol=0, atol=1e-12 * scale)
    assert why.split_error < 1e-12 and abs(why.residual).max() < 1e-12


def test_pieces_stay_where_columns_need_not_be_formed() -> None:
    trajectory, X = recorded("convolutional", "sgd")
    _, plan = explained(trajectory, X)
    assert plan.passes is None and not plan.cuts.batch.rows
    _, plan = explained(recorded("convolutional", "momentum")[0], X)
    assert plan.passes == len(X) and plan.cuts.batch.rows


def test_rows_are_the_columns_of_the_pieces() -> None:
    trajectory, X = recorded("tied", "adamw")
    machine = pk.KernelMachine(trajectory)
    queries, _, _ = machine._selection.select(X, "all")
    found = queries.gradients(trajectory.final)
    rows = found.formed(queries.source.workspace)
    assert found.positions > 8 and rows.positions == 1.0 and len(rows) == len(found)
    for where in trajectory.layout.slices.values():
        torch.testing.assert_close(rows.columns(where, torch.float64), found.columns(where, torch.float64))
    v = torch.randn(trajectory.layout.size, 2, dtype=torch.float64)
    torch.testing.assert_close(rows @ v, found @ v)
    torch.testing.assert_close(rows.total(), found.total())
    assert isinstance(rows, FactoredGradients)


@pytest.mark.parametrize(
    ("usable", "passes", "rows"),
    [(200, 50, True), (175, 50, False), (135, 16, True), (120, 16, False), (99, None, False)],
)
def test_rows_are_formed_as_far_as_there_is_room(usable: float, passes: int | None, rows: bool) -> None:
    plan = Plan(50, None, Cuts())
    found = with_rows(plan, 100.0, lambda way: 110.0 + way.cuts.roomy, usable, 70.0, 20.0)
    assert (found.passes, found.cuts.batch.rows) == (passes, rows)
