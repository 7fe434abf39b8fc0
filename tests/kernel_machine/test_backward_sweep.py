"""Fast ways through a trajectory against the plain one: rows of gradients, and adjoints by differentiation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, make_inputs, record, smallest_budget
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.gradient_source import GradientSource
from pathkernel.gradients.inner_products import contracted, paired_names
from pathkernel.gradients.layers.factors import Dense, Lookup, Outer, Piece
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.kernel_machine.adjoint import StepAdjoint
from pathkernel.kernel_machine.backward_sweep import BackwardSweep, Cuts
from pathkernel.update_rules.rule import adjoint

DOUBLE = TOLERANCES[torch.float64]


def close(found: Any, expected: Any, tolerance: float = DOUBLE.shares) -> None:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1e-3, float(expected.abs().max())))


# -- gradients in factored form ---------------------------------------------------------------------------------------


def factored(n: int = 4, k: int = 1, seed: int = 0) -> tuple[FactoredGradients, Tensor]:
    """Every kind of piece, with the same gradients as rows formed one by one."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    shapes = {"w": (3, 5), "b": (3,), "t": (4, 2), "e": (6, 2), "s": (7,)}
    layout = ParameterLayout.of({name: torch.zeros(shape) for name, shape in shapes.items()})
    index = torch.randint(6, (n, 3), generator=generator)
    outer, transposed = Outer(draw(n, k, 1, 3), draw(n, 1, 5)), Outer(draw(n, k, 2, 2), draw(n, 2, 4), True)
    lookup, dense = Lookup(draw(n, k, 3, 2), index, 6), Dense(draw(n, k, 7))
    where = layout.slices
    pieces = (
        Piece(where["w"], outer, where["b"]),
        Piece(where["t"], transposed),
        Piece(where["e"], lookup),
        Piece(where["s"], dense),
    )
    rows = torch.zeros(n, k, layout.size, dtype=torch.float64)
    for i in range(n):
        for c in range(k):
            rows[i, c, where["w"]] = torch.outer(outer.signal[i, c, 0], outer.activation[i, 0]).reshape(-1)
            rows[i, c, where["b"]] = outer.signal[i, c, 0]
            pairs = zip(transposed.signal[i, c], transposed.activation[i], strict=True)
            rows[i, c, where["t"]] = sum(torch.outer(a, s) for s, a in pairs).reshape(-1)
            table = torch.zeros(6, 2, dtype=torch.float64)
            for t in range(3):
                table[index[i, t]] += lookup.signal[i, c, t]
            rows[i, c, where["e"]] = table.reshape(-1)
            rows[i, c, where["s"]] = dense.values[i, c]
    return FactoredGradients(layout, n * k, pieces), rows.reshape(n * k, -1)


def separated(gradients: FactoredGradients) -> FactoredGradients:
    """The same with biases as pieces of their own."""
    parts = [part for piece in gradients.pieces for part in piece.separated()]
    return replace(gradients, pieces=tuple(Piece(where, factor) for where, factor in parts))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_columns_formed_in_given_memory_are_the_same(dtype: torch.dtype) -> None:
    gradients, rows = factored(k=2)
    combined = (0.5 * gradients).plus(torch.arange(len(rows), dtype=torch.float64), torch.ones(rows.shape[1]))
    doubled = gradients + gradients
    where = gradients.layout.slices
    parts = [*where.values(), slice(5, 10), slice(3, 11), slice(where["t"].start + 2, where["t"].stop)]
    for own in (gradients, combined, doubled, replace(gradients, pieces=())):
        for part in parts:
            out = torch.full((len(rows), part.stop - part.start), torch.nan, dtype=dtype)
            assert own.fill_columns(part, out) is out
            torch.testing.assert_close(out, own.columns(part, dtype))


@pytest.mark.parametrize("k", [1, 3])
def test_factored_gradients_are_their_rows(k: int) -> None:
    gradients, rows = factored(k=k)
    direction = torch.linspace(-1, 1, rows.shape[1], dtype=torch.float64)
    multiples = torch.arange(len(rows), dtype=torch.float64)
    other, other_rows = factored(k=k, seed=1)
    combined = (0.25 * gradients + 0.5 * other).plus(multiples, direction)
    expected = 0.25 * rows + 0.5 * other_rows + torch.outer(multiples, direction)
    for found, plain in ((gradients, rows), (combined, expected), (separated(combined), expected)):
        close(found @ direction, plain @ direction)
        close(found @ torch.stack([direction, direction**2], dim=1), plain @ torch.stack([direction, direction**2], 1))
        close(found.total(), plain.sum(dim=0))
        for name, where in found.layout.slices.items():
            for start, stop in ((0, None), (1, None), (0, -1), (1, 3)):
                part = slice(where.start + start, where.stop if stop is None else where.start + stop % 7)
                part = slice(part.start, min(max(part.stop, part.start), where.stop))
                close(found.columns(part, torch.float64), plain[:, part]), name
            close(found.directional_products(where, plain[:2, where]), plain[:2, where] @ plain[:, where].T)
    close((2.0 * combined) @ direction, 2 * expected @ direction)
    close(FactoredGradients.dense(rows, gradients.layout) @ direction, rows @ direction)


def test_pieces_that_meet_are_their_rows() -> None:
    left, left_rows = factored(n=9, k=2)
    right, right_rows = factored(n=6, seed=1)
    names = paired_names(left, [right])
    assert {"w", "b"} <= names and "s" not in names, "rows are no pairs"
    for rates in ({name: -0.5 for name in names}, {name: 0.1 * i for i, name in enumerate(sorted(names), 1)}):
        scale = torch.zeros(left.layout.size, dtype=torch.float64)
        for name, rate in rates.items():
            scale[left.layout.slices[name]] = rate
        for memory in (2**20, 1):
            close(contracted(left, right, rates, memory), left_rows * scale @ right_rows.T)


def test_pieces_of_different_parts_do_not_meet() -> None:
    left, _ = factored()
    right = separated(left)
    assert not {"w", "b"} & paired_names(left, [right])


# -- a step's adjoint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_coefficients_are_the_adjoint_by_differentiation(optimizer: str) -> None:
    trajectory = record(optimizer=optimizer).trajectory
    rule, shapes = trajectory.rule, dict(zip(trajectory.layout.names, trajectory.layout.shapes, strict=True))
    for step in trajectory.steps():
        mine = StepAdjoint(rule, step, shapes)
        for name, shape in shapes.items():
            q, held = make_inputs(5, shape, seed=1), [make_inputs(5, shape, seed=2) for _ in rule.memory]
            pulled, before = adjoint(rule, step.frozen[name], step.hyperparameters_of(name), q, tuple(held))
            own = [cotangent.reshape(5, -1).clone() for cotangent in held]
            found = mine.of(name, torch.float64)(slice(0, shape.numel()), q.reshape(5, -1), own)
            for (u, scale), expected in zip(found, pulled, strict=True):
                close(u * scale, expected.reshape(5, -1), 1e-14)
            for cotangent, expected in zip(own, before, strict=True):
                zero = torch.zeros(5, shape.numel(), dtype=torch.float64)
                close(zero if cotangent is None else cotangent, expected.flatten(1), 1e-14)


@pytest.mark.parametrize(
    ("optimizer", "expected"), [("sgd", False), ("sgd_decay", False), ("momentum", True), ("adam", True)]
)
def test_only_steps_with_a_memory_keep_one(optimizer: str, expected: bool) -> None:
    assert pk.KernelMachine(record(optimizer=optimizer).trajectory)._recorded.keeps_memory is expected


# -- whole sweeps -----------------------------------------------------------------------------------------------------


def assert_same(found: pk.KernelMachine, expected: pk.KernelMachine, X: Tensor, **asked: Any) -> None:
    tolerance, mine, plain = DOUBLE.shares, found.explain(X, **asked), expected.explain(X, **asked)
    close(mine.shares, plain.shares, tolerance)
    assert set(mine.channels) == set(plain.channels)
    for name, channel in plain.channels.items():
        # What is rounding by itself is judged by the outputs.
        scale = np.abs(plain.output).max()
        np.testing.assert_allclose(mine.channels[name], channel, rtol=0, atol=tolerance * scale, err_msg=name)
    for name, shares in plain.modules.items():
        close(mine.modules[name], shares, tolerance)
    if plain.steps is not None:
        close(mine.steps, plain.steps, tolerance)


@pytest.mark.parametrize("quadrature", ["discrete_gradient", "trapezoid", pk.GaussLegendre(3)], ids=repr)
@pytest.mark.parametrize("optimizer", ["sgd_decay", "nesterov_decay", "adamw"])
@pytest.mark.parametrize("model", ["tanh", "conv_group_norm"])
def test_layer_by_layer_is_the_plain_way(model: str, optimizer: str, quadrature: str) -> None:
    run = record(model, optimizer=optimizer)
    fast = pk.KernelMachine(run.trajectory, quadrature=quadrature)
    plain = pk.KernelMachine(run.trajectory, quadrature=quadrature, engine="jacobian")
    assert_same(fast, plain, X=run.queries)
    assert_same(fast, plain, X=run.queries, outputs="all")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("by", ["module", "step"])
def test_splits_are_those_of_the_plain_way(optimizer: str, by: str) -> None:
    run = record("relu", optimizer=optimizer)
    fast, plain = (pk.KernelMachine(run.trajectory, engine=engine) for engine in ("layerwise", "jacobian"))
    assert_same(fast, plain, X=run.queries, by=by)
    why = fast.explain(run.queries, by=by)
    parts = sum(why.modules.values()).sum(axis=1) if by == "module" else why.steps.sum(axis=1)
    close(parts, why.shares.sum(axis=1))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("queries", [1, 3, 12])
def test_blocks_of_columns_and_of_queries_change_nothing(monkeypatch, optimizer: str, queries: int) -> None:
    run = record("relu", optimizer=optimizer)
    X = make_inputs(queries, tuple(run.queries.shape[1:]), seed=8)
    whole = pk.KernelMachine(run.trajectory).explain(X, outputs=0)
    monkeypatch.setattr("pathkernel.kernel_machine.backward_sweep.BLOCK", 8 * queries)
    least = smallest_budget(lambda memory: pk.KernelMachine(run.trajectory, memory=memory).explain(X, outputs=0))
    blocks = pk.KernelMachine(run.trajectory, memory=least).explain(X, outputs=0)
    close(blocks.shares, whole.shares)
    close(blocks.channels["rounding"] + 1, whole.channels["rounding"] + 1)


class Shifted(nn.Module):
    """A multiple of a parameter that is added in place, which is not covered layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden.add_(self.shift, alpha=1.5)
        return self.last(torch.tanh(hidden))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_parameters_without_a_rule_take_the_plain_way_by_themselves(optimizer: Any) -> None:
    torch.manual_seed(0)
    model, loss = Shifted().double(), nn.CrossEntropyLoss()
    opt = optimizer(model.parameters(), lr=0.05)
    X, y = make_inputs(12), torch.arange(12) % 3
    with pk.KernelRecorder(model, opt, loss, data=(X, y)) as recorder:
        for _ in range(4):
            for x, target in recorder.batches(batch_size=5):
                opt.zero_grad()
                loss(model(x), target).backward()
                opt.step()
    fast = pk.KernelMachine(recorder.trajectory)
    assert_same(fast, pk.KernelMachine(recorder.trajectory, engine="jacobian"), X=make_inputs(3, seed=4), outputs="all")
    assert fast.explain(make_inputs(3, seed=4)).relative_residual <= DOUBLE.residual


def test_what_no_tape_covers_is_rows_and_the_rest_is_not() -> None:
    model = Shifted().double()
    layout = ParameterLayout.of(dict(model.named_parameters()))
    source = GradientSource(ModelFunction(model, layout, {}, torch.float64), "auto", 2**20)
    theta = layout.flatten({n: p.detach() for n, p in model.named_parameters()})
    found = source.gradients(theta, make_inputs(3), lambda z, _: z, torch.zeros(3, 0), 3)
    plain = GradientSource(source.function, "jacobian", 2**20)
    expected = plain.gradients(theta, make_inputs(3), lambda z, _: z, torch.zeros(3, 0), 3)
    for where in layout.slices.values():
        close(found.columns(where, torch.float64), expected.columns(where, torch.float64))
    dense = {name for p in found.pieces if isinstance(p.factor, Dense) for name in found.names(p)}
    assert source.plain and set(source.plain) <= dense and len(dense) < len(layout.names)


def test_a_memory_is_kept_in_the_working_type_and_only_where_there_is_one() -> None:
    for optimizer, kept in (("sgd", False), ("momentum", True)):
        run = record(optimizer=optimizer, dtype=torch.float32)
        machine = pk.KernelMachine(run.trajectory)
        queries, _, _ = machine._selection.select(run.queries, 0)
        curve = machine._curve(queries)
        sweep = BackwardSweep(curve, machine._recorded, None, None, Cuts())
        segment, q = next(curve.backward(sweep.accumulator))
        sweep.step(segment, segment.step, q)
        held = [cotangent for slots in sweep.memory.values() for cotangent in slots if cotangent is not None]
        assert bool(held) is kept
        assert all(cotangent.dtype == torch.float32 for cotangent in held)


def test_an_engine_that_does_not_exist() -> None:
    message = "Engines are 'auto', 'layerwise', 'jacobian', 'autograd'. Write `engine=\"auto\"`"
    with pytest.raises(pk.errors.InputError, match=message):
        pk.KernelMachine(record().trajectory, engine="fast")
