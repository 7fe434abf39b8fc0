"""Consecutive steps that are run together, against the oracle and against steps one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import IN_ORACLE, OPTIMIZERS, QUERIES, SAMPLES, Recording, record
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import reference
from pathkernel.gradients.layers.recorded_passes import RecordedPasses
from pathkernel.kernel_machine import memory_plan, queries
from pathkernel.kernel_machine.adjoint import StepAdjoint
from pathkernel.kernel_machine.block_memory import BlockMemory
from pathkernel.kernel_machine.memory_plan import LONG
from pathkernel.kernel_machine.memory_plan import STEPS as NUMBERS
from pathkernel.runtime.allocations import Allocations
from pathkernel.trajectory import alike

DOUBLE, SINGLE = TOLERANCES[torch.float64], TOLERANCES[torch.float32]
MOST, STEPS = NUMBERS
MANY = LONG * STEPS + 2


def batches(sizes: Callable[[int], int] = lambda s: 4) -> list[list[int]]:
    """As many batches as are run together, and a few more."""
    return [[(3 * s + i) % SAMPLES for i in range(sizes(s))] for s in range(MANY)]


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Points, samples, and whether the samples are the same at all points, of all passes that are run together."""
    found: list[tuple[int, int, bool]] = []
    pieces = RecordedPasses.pieces

    def noted(self: RecordedPasses, components: Tensor) -> Any:
        found.append((*self.outputs.shape[:2], self.shared))
        return pieces(self, components)

    monkeypatch.setattr(RecordedPasses, "pieces", noted)
    return found


def explained(run: Recording, together: bool, quadrature: Any = "auto", **asked: Any) -> Any:
    machine = pk.KernelMachine(run.trajectory, quadrature=quadrature)
    if not together:
        machine._plan = lambda *given: alone(pk.KernelMachine._plan(machine, *given))  # type: ignore[method-assign]
    return machine.explain(run.queries, outputs=asked.pop("outputs", 0), **asked)


def alone(plan: Any) -> Any:
    return replace(plan, cuts=replace(plan.cuts, steps=1))


def assert_alike(one: Any, other: Any, tolerance: float) -> None:
    scale = max(1e-3, np.abs(other.shares).max())
    np.testing.assert_allclose(one.shares, other.shares, rtol=0, atol=tolerance * scale)
    assert one.channels.keys() == other.channels.keys()
    for name, value in other.channels.items():
        np.testing.assert_allclose(one.channels[name], value, rtol=0, atol=tolerance * max(scale, np.abs(value).max()))
    np.testing.assert_array_equal(one.output, other.output)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_that_are_run_together_are_those_of_the_oracle(optimizer: str, stacks: list[Any]) -> None:
    assert optimizer in IN_ORACLE
    run = record(optimizer=optimizer, batches=batches())
    why = explained(run, True)
    case = OPTIMIZERS[optimizer]
    expected = reference.decompose(
        *(run.start, run.loss, run.X, run.y, run.batches, case.oracle, run.queries, 0, "discrete"), **run.settings
    )
    scale = expected.shares.abs().max()
    np.testing.assert_allclose(why.shares, expected.shares, rtol=0, atol=DOUBLE.shares * scale)
    # All but the last, and once for the proof.
    used = [stack for stack in stacks if stack[0] == STEPS]
    assert used.count((STEPS, QUERIES, True)) == used.count((STEPS, 4, False)) == MANY // STEPS + 1
    assert why.residual.max() < 1e-12


@pytest.mark.parametrize(
    ("quadrature", "asked", "dtype"),
    [
        (pk.GaussLegendre(2), {"outputs": "all"}, torch.float64),
        ("trapezoid", {"by": "module"}, torch.float64),
        ("midpoint", {"by": "step"}, torch.float32),
    ],
)
def test_every_way_of_asking_finds_the_same(quadrature: Any, asked: Any, dtype: torch.dtype) -> None:
    run = record("layer_norm", optimizer="momentum", dtype=dtype, batches=batches())
    together, one_by_one = (explained(run, way, quadrature, **asked) for way in (True, False))
    assert_alike(together, one_by_one, TOLERANCES[dtype].shares)
    for name, shares in one_by_one.modules.items():
        scale = max(1e-3, np.abs(shares).max())
        np.testing.assert_allclose(together.modules[name], shares, rtol=0, atol=TOLERANCES[dtype].shares * scale)
    if one_by_one.steps is not None:
        np.testing.assert_allclose(together.steps, one_by_one.steps, rtol=0, atol=TOLERANCES[dtype].shares)


def test_batches_of_other_sizes_are_run_by_themselves(stacks: list[Any]) -> None:
    run = record(batches=batches(lambda s: 3 if s == 20 else 4))
    together, one_by_one = explained(run, True), explained(run, False)
    assert_alike(together, one_by_one, DOUBLE.shares)
    # One group of steps has a batch of another size: 8 of them are run by themselves.
    assert [stack[1] for stack in stacks].count(4) == 2 * (MANY // STEPS + 1) - 1
    assert 3 not in {stack[1] for stack in stacks}


@pytest.mark.parametrize("layer", ["dropout", "batch norm"])
def test_random_and_coupled_batches_are_run_by_themselves(layer: str, stacks: list[Any]) -> None:
    torch.manual_seed(0)
    between = nn.Dropout(0.3) if layer == "dropout" else nn.BatchNorm1d(5, dtype=torch.float64)
    layers = nn.Linear(4, 5, dtype=torch.float64), between, nn.Linear(5, 2, dtype=torch.float64)
    run = trained(nn.Sequential(*layers))
    together, one_by_one = explained(run, True), explained(run, False)
    assert_alike(together, one_by_one, DOUBLE.shares)
    assert all(shared for *_, shared in stacks)  # queries, that are evaluated in evaluation mode
    # Running statistics change from step to step: the network is another one at each of them.
    assert bool(stacks) == (layer == "dropout")


def trained(model: nn.Module) -> Recording:
    """A recording of any network with two outputs."""
    X = torch.randn(SAMPLES, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    y, loss = torch.arange(SAMPLES) % 2, nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=0) as recorder:
        for ids in batches():
            x, target = recorder.batch(ids)
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    return Recording(model, model, optimizer, loss, X, y, X[:QUERIES] + 0.1, recorder.trajectory, {})


def test_values_of_long_passes_are_taken_one_after_another_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "LONG_PASS", 0)
    single: list[Tensor] = []
    values = queries.Queries.values
    monkeypatch.setattr(queries.Queries, "values", lambda self, theta: single.append(theta) or values(self, theta))
    run = record(batches=batches())
    together = explained(run, True)
    assert len(single) < MANY // 2
    one_by_one = explained(run, False)
    assert len(single) > MANY
    assert_alike(together, one_by_one, DOUBLE.shares)
    np.testing.assert_allclose(together.quadrature_error, one_by_one.quadrature_error, rtol=1e-9)


# -- what is planned --------------------------------------------------------------------------------------------------


def steps_of(run: Recording, memory: str = "1GB", **options: Any) -> int:
    machine = pk.KernelMachine(run.trajectory, memory=memory, **options)
    machine.explain(run.queries, outputs=0)
    (plan,) = machine._plans._plans[1].values()
    return plan.cuts.steps


def test_steps_are_run_together_where_there_is_room_and_gain() -> None:
    run = record(batches=batches())
    assert steps_of(run) == STEPS
    assert steps_of(run, quadrature="midpoint") == STEPS
    assert steps_of(run, quadrature=pk.Adaptive(1e-6)) == 1  # each query has points of its own
    assert steps_of(run, form="ensemble") == 1  # the weights of each step are held
    assert steps_of(run, form="chord") == 1
    assert steps_of(record(batches=2 * batches())) == MOST
    assert steps_of(record(batches=batches()[: LONG * STEPS - 1])) == 1  # the proof takes longer than it saves


def test_the_plan_counts_what_steps_take_together(monkeypatch: pytest.MonkeyPatch) -> None:
    run = record("relu", batches=batches())
    machine = pk.KernelMachine(run.trajectory)
    taken: list[float] = []
    pieces = RecordedPasses.__init__

    def measured(self: RecordedPasses, function: Any, program: Any, thetas: Tensor, *rest: Any) -> None:
        with Allocations() as allocations:
            pieces(self, function, program, thetas, *rest)
            with torch.enable_grad():
                found = self.pieces(self.outputs.sum(dim=2, keepdim=True))
        taken.append(allocations.peak / len(thetas))
        del found
        pieces(self, function, program, thetas, *rest)

    planned: list[Any] = []
    steps = memory_plan._Planner._steps

    def noted(self: Any, plan: Any) -> int:
        planned.append(max(self.query.peak(plan.queries), self.batches.separate.peak(self.batches.largest)))
        return steps(self, plan)

    monkeypatch.setattr(RecordedPasses, "__init__", measured)
    monkeypatch.setattr(memory_plan._Planner, "_steps", noted)
    machine.explain(run.queries, outputs=0)
    assert taken and max(taken) <= memory_plan.STACKING * planned[0]
    monkeypatch.undo()
    monkeypatch.setattr(memory_plan, "STACKED", int(STEPS * memory_plan.PASSING * max(taken)))
    assert steps_of(run) == 1


# -- parameters at once, and blocks in place --------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adam_decay", "amsgrad", "momentum"])
def test_coefficients_found_at_once_are_those_of_each_parameter(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = record("conv_group_norm", optimizer=optimizer)
    layout, found = run.trajectory.layout, []
    for most in (2**16, 0, 12):
        monkeypatch.setattr(alike, "JOINED", most)
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        of_steps = [StepAdjoint(run.trajectory.rule, step, shapes) for step in run.trajectory.steps()]
        found.append([[own.linear(name) for name in layout.names] for own in of_steps])
    together, *others = found
    for other in others:
        for steps, own in zip(together, other, strict=True):
            for one, two in zip(steps, own, strict=True):
                assert one is not None and two is not None and one.ratio == two.ratio
                for a, b in zip((*one.gradients, *one.memory), (*two.gradients, *two.memory), strict=True):
                    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True))


def test_blocks_come_one_after_another_in_the_same_place() -> None:
    memory, like = BlockMemory(), torch.empty(0, dtype=torch.float32)
    first = memory.empty(3, 4, like)
    assert first.is_contiguous() and first.dtype == torch.float32
    assert memory.empty(2, 5, like).data_ptr() == first.data_ptr()
    assert memory.empty(5, 5, like).shape == (5, 5)
    assert memory.empty(1, 2, like.double()).dtype == torch.float64
