"""An engine of somebody else's that is wrong, or lacks a part, is refused by name before its numbers are used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import make_inputs, make_model, record

import pathkernel as pk
from pathkernel.tangent_kernel.engines import Engine, JacobianProducts
from pathkernel.tangent_kernel.engines.jacobian import JacobianEngine


class Mine(JacobianEngine):
    """Right, and written elsewhere."""

    name = "mine"


class Scaled(Mine):
    def gram(self, *asked):
        return 1.5 * super().gram(*asked)


class IgnoresPreconditioner(Mine):
    def gram(self, theta, X, Y, context_X, context_Y, preconditioner):
        return super().gram(theta, X, Y, context_X, context_Y, None)


class WrongDiagonal(Mine):
    def diagonal(self, *asked):
        return 2 * super().diagonal(*asked)


class NotANumber(Mine):
    def gram(self, *asked):
        return super().gram(*asked) * torch.nan


class StaysWhereItIs(Mine):
    def at(self, node, selection=None):
        return self


class Doubled(JacobianProducts):
    def __init__(self, plain, pull, push):
        self.plain, self.factors = plain, (pull, push)

    def pull(self, weights, components):
        return self.factors[0] * self.plain.pull(weights, components)

    def push(self, directions, components):
        return self.factors[1] * self.plain.push(directions, components)


class WrongPull(Mine):
    factors = (2, 1)

    def jacobian(self, theta, samples, memory):
        return Doubled(super().jacobian(theta, samples, memory), *self.factors)


class WrongPush(WrongPull):
    factors = (1, 2)


def with_running_statistics() -> pk.Trajectory:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2)).double()
    inputs, targets, loss = make_inputs(8), make_inputs(8, (2,)), torch.nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, loss, data=(inputs, targets)) as recorder:
        for x, y in recorder.batches(4):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return recorder.trajectory


X, Y = make_inputs(5), make_inputs(4, seed=4)
OFF = r"of engine 'mine' returned is off by .* compared with plain autograd"
USES = {
    "matrix": (Scaled, "`gram`", lambda engine: pk.TangentKernel(make_model("tanh"), engine=engine)(X)),
    "two sets": (Scaled, "`gram`", lambda engine: pk.TangentKernel(make_model("tanh"), engine=engine)(X, Y)),
    "blocks": (Scaled, "`gram`", lambda e: pk.TangentKernel(make_model("tanh"), engine=e, outputs="full")(X)),
    "NaN": (NotANumber, "`gram`", lambda engine: pk.TangentKernel(make_model("tanh"), engine=engine)(X)),
    "diagonal": (WrongDiagonal, "`diagonal`", lambda e: pk.TangentKernel(make_model("tanh"), engine=e).diagonal(X)),
    "pull": (WrongPull, "`jacobian`", lambda e: pk.TangentKernel(make_model("tanh"), engine=e).operator(X) @ np.eye(5)),
    "push": (WrongPush, "`jacobian`", lambda e: pk.TangentKernel(make_model("tanh"), engine=e).operator(X) @ np.eye(5)),
    "preconditioner": (
        IgnoresPreconditioner,
        "`gram`",
        lambda e: pk.PathKernel(record(optimizer="adam").trajectory, engine=e, preconditioner="optimizer")(X),
    ),
    "buffers": (
        StaysWhereItIs,
        "`gram`",
        lambda e: pk.PathKernel(with_running_statistics(), engine=e)(X),
    ),
    "tolerance": (Scaled, "`gram`", lambda e: pk.PathKernel(record().trajectory, engine=e, tolerance=0.1)),
}


@pytest.mark.parametrize("use", USES)
def test_a_wrong_engine_is_refused(use: str) -> None:
    engine, method, call = USES[use]
    with pytest.raises(pk.errors.InputError, match=f"What {method} {OFF}"):
        call(engine)
    call(Mine)


def test_an_engine_that_keeps_its_outputs_at_every_node_is_refused() -> None:
    kernel = pk.PathKernel(record().trajectory, engine=StaysWhereItIs, outputs=pk.OutputProbes(1))
    with pytest.raises(pk.errors.InputError, match="`at` of engine 'mine' returned an engine with other outputs"):
        kernel(X)


def test_an_engine_that_says_that_it_approximates_is_taken_at_its_word() -> None:
    class Approximate(Scaled):
        exact = False

    model = make_model("tanh")
    expected = 1.5 * pk.TangentKernel(model, engine="jacobian")(X)
    np.testing.assert_allclose(pk.TangentKernel(model, engine=Approximate)(X), expected)


def returning(form: Any) -> type[Engine]:
    class Odd(Mine):
        def gram(self, *asked):
            return form(super().gram(*asked))

        def diagonal(self, *asked):
            return form(super().diagonal(*asked))

    return Odd


def lopsided(K: torch.Tensor) -> torch.Tensor:
    K = K.clone()
    K[0, 1] += 1e-12
    return K


FORMS = {
    "another type": (lambda K: K.float(), r"returned torch.float32 \(5, 5\)"),
    "another library's": (lambda K: K.numpy(), "returned ndarray"),
    "rows missing": (lambda K: K[:3], r"returned torch.float64 \(3, 5\)"),
    "no symmetry": (lopsided, "returned a matrix that is not symmetric for Y None"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_result_of_another_form_is_refused(form: str) -> None:
    made, found = FORMS[form]
    with pytest.raises(pk.errors.InputError, match=f"`gram` of engine 'mine' {found}"):
        pk.TangentKernel(make_model("tanh"), engine=returning(made))(X)


def test_a_diagonal_of_another_form_is_refused() -> None:
    with pytest.raises(pk.errors.InputError, match=r"`diagonal` of engine 'mine' returned torch.float64 \(5, 1\)"):
        pk.TangentKernel(make_model("tanh"), engine=returning(lambda K: K[:, None])).diagonal(X)


class NoDiagonal(Engine):
    name = "half"

    def gram(self, *asked): ...


class Nameless(NoDiagonal):
    name: str  # said, and not given

    def diagonal(self, *asked): ...


del NoDiagonal.name


class Unmade(Mine):
    def __init__(self, function, selection, memory):
        self.function, self.selection = function, selection


class MakesNothing:
    def engine(self, function, selection, memory):
        return 3


PARTIAL = {
    "no diagonal": (NoDiagonal, "`engine=NoDiagonal` has no `diagonal`"),
    "no name": (Nameless, "Engine Nameless has no `name`"),
    "no attributes": (Unmade, "Engine Unmade has no `choices`, `memory`, `products`"),
    "no engine": (MakesNothing(), "made a int"),
}


@pytest.mark.parametrize("part", PARTIAL)
def test_an_engine_that_lacks_a_part_is_refused_where_the_kernel_is_made(part: str) -> None:
    engine, found = PARTIAL[part]
    with pytest.raises(pk.errors.InputError, match=found):
        pk.TangentKernel(make_model("tanh"), engine=engine)


def test_an_engine_may_keep_its_results() -> None:
    class Remembers(Mine):
        def gram(self, theta, *asked):
            self.known = getattr(self, "known", {})
            key = float(theta.sum()), asked[1] is None
            if key not in self.known:
                self.known[key] = super().gram(theta, *asked)
            return self.known[key]

    trajectory = record().trajectory
    expected, kernel = pk.PathKernel(trajectory, engine="jacobian")(X), pk.PathKernel(trajectory, engine=Remembers)
    np.testing.assert_array_equal(kernel(X), expected)
    np.testing.assert_array_equal(kernel(X), expected)
    at_end = pk.TangentKernel(make_model("tanh"), engine=Remembers)
    first = at_end(X)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(at_end(X), kept)
