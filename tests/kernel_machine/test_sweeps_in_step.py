"""Parts of a block of queries that walk the path in step: the shares of a single sweep, and each batch run once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.gradients.layers.tracing import ParameterTracer
from pathkernel.kernel_machine import memory_plan
from pathkernel.kernel_machine.backward_sweep import BackwardSweep, Cuts
from pathkernel.kernel_machine.curves import PathCurve
from pathkernel.kernel_machine.sweep_plan import Plan, in_step
from pathkernel.kernel_machine.sweeps_in_step import passed_by_all
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.stage_gradients import WHOLE
from pathkernel.trajectory.step import SharedSegment

TOKENS, WIDTH = 6, 8


class Positions(nn.Module):
    """A table that is its own head, positions that all samples share, and a layer that is used at each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(9, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.norm(torch.tanh(self.layer(x)).cumsum(1))[:, -1] @ self.table.weight.T


def recorded(optimizer: str) -> tuple[pk.Trajectory, Tensor]:
    """Four steps, of two micro-batches each, clipped entry by entry."""
    torch.manual_seed(0)
    model, X, y, loss = (
        Positions().double(),
        torch.randint(9, (16, TOKENS)),
        torch.arange(16) % 9,
        nn.CrossEntropyLoss(),
    )
    own: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if optimizer != "adamw":
        own = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9 * (optimizer == "momentum"), weight_decay=0.01)
    with pk.KernelRecorder(model, own, loss, data=(X, y), audit_every=0) as recorder:
        for ids in torch.arange(16).split(4):
            own.zero_grad()
            for few in ids.split(2):
                x, target = recorder.batch(few)
                loss(model(x), target).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.02)
            own.step()
    return recorder.trajectory, X[:7]


@pytest.fixture(scope="module", params=["adamw", "momentum", "sgd"])
def run(request: pytest.FixtureRequest) -> tuple[pk.Trajectory, Tensor]:
    return recorded(request.param)


@pytest.mark.parametrize("asked", [{"outputs": 0}, {"outputs": "all", "by": "step"}], ids=["one", "all by step"])
def test_shares_are_those_of_a_single_sweep(
    run: tuple[pk.Trajectory, Tensor], asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory, X = run
    expected = pk.KernelMachine(trajectory).explain(X, **asked)
    plan = Plan(7, 3, Cuts(batch=replace(WHOLE, rows=True), part=3))
    monkeypatch.setattr("pathkernel.kernel_machine.kernel_machine.plan_backward", lambda *_: plan)
    taken, stages = [], RecordedGradients.stages
    monkeypatch.setattr(
        RecordedGradients, "stages", lambda own, step, **how: taken.append(step.index) or stages(own, step, **how)
    )
    why = pk.KernelMachine(trajectory).explain(X, **asked)
    assert taken == [3, 2, 1, 0]  # once for three parts
    scale = abs(expected.shares).max()
    np.testing.assert_allclose(why.shares, expected.shares, rtol=0, atol=1e-12 * scale)
    assert why.channels.keys() == expected.channels.keys()
    for name, value in expected.channels.items():
        np.testing.assert_allclose(why.channels[name], value, rtol=0, atol=1e-12 * max(1.0, abs(value).max()))
    if expected.steps is not None:
        np.testing.assert_allclose(why.steps, expected.steps, rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(why.quadrature_error, expected.quadrature_error, rtol=1e-6, atol=1e-12)
    assert abs(why.residual).max() < 1e-12 and why.split_error < 1e-12


@pytest.mark.parametrize(
    ("usable", "queries", "part"),
    [(300.0, 100, 16), (250.0, 50, 16), (110.0, 20, None)],
    ids=["all in step", "two blocks in step", "blocks one after the other"],
)
def test_blocks_are_as_large_as_cotangents_leave_room_for(usable: float, queries: int, part: int | None) -> None:
    plan = Plan(20, 16, Cuts())
    found = in_step(plan, 100, lambda way: 100.0 + way.queries, usable, 2.0)
    assert (found.queries, found.cuts.part) == (queries, part)
    assert found is plan if part is None else found.passes == part and found.cuts.batch.rows
    whole = Plan(100, None, Cuts())
    assert in_step(whole, 100, lambda way: 0.0, usable, 2.0) is whole


def test_segments_are_let_go_when_all_parts_have_passed_them() -> None:
    found: list[weakref.ref[SharedSegment]] = []

    def made() -> Iterator[SharedSegment]:
        for _ in range(5):
            segment = SharedSegment(torch.zeros(1), torch.ones(1), None)
            found.append(weakref.ref(segment))
            yield segment
            del segment

    walks = passed_by_all(made(), 3)
    for place, met in enumerate(zip(*walks, strict=True)):
        assert met[0] is met[1] is met[2]
        del met
        assert len(found) == place + 1 and sum(one() is not None for one in found) <= 2
    assert len(found) == 5


def test_a_pass_with_shared_positions_is_let_go_with_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, X = recorded("adamw")
    queries, _, _ = pk.KernelMachine(trajectory)._selection.select(X, 0)
    queries.gradients(trajectory.final)  # proved
    tracers, begin = [], ParameterTracer.__init__
    monkeypatch.setattr(
        ParameterTracer, "__init__", lambda own, *given: tracers.append(weakref.ref(own)) or begin(own, *given)
    )
    gc.disable()
    try:
        found = queries.gradients(trajectory.final)
        del found
        assert tracers and all(tracer() is None for tracer in tracers)
    finally:
        gc.enable()


@pytest.mark.parametrize("part", [None, 3])
def test_cotangents_are_let_go_with_the_sweep(part: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, X = recorded("adamw")
    plan = Plan(7, part, Cuts(batch=replace(WHOLE, rows=True), part=part))
    monkeypatch.setattr("pathkernel.kernel_machine.kernel_machine.plan_backward", lambda *_: plan)
    sweeps, begin = [], BackwardSweep.__init__
    monkeypatch.setattr(
        BackwardSweep, "__init__", lambda own, *given: sweeps.append(weakref.ref(own)) or begin(own, *given)
    )
    gc.disable()
    try:
        pk.KernelMachine(trajectory).explain(X, outputs=0)
        assert sweeps and all(sweep() is None for sweep in sweeps)
    finally:
        gc.enable()


def test_points_that_parts_share_are_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, X = recorded("adamw")
    peaks: list[float] = []
    monkeypatch.setattr(memory_plan, "POSITIONS", 0)
    monkeypatch.setattr(
        memory_plan, "in_step", lambda plan, samples, peak, *rest: peaks.append(peak(replace(plan, queries=3))) or plan
    )
    for nodes in (1, 5):
        machine = pk.KernelMachine(trajectory, quadrature=pk.GaussLegendre(nodes))
        curve = PathCurve(trajectory, machine._selection.select(X, 0)[0], machine.quadrature)
        memory_plan._Planner(curve, machine._recorded, 2**30, None, False, 0)._with_rows(Plan(7, 3, Cuts()))
    few, many = peaks
    assert many - few == pytest.approx(2 * 4 * 8 * trajectory.layout.size)
