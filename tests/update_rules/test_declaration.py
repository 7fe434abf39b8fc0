"""A rule says once what it reads of the optimizer's state; what it has not said is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_inputs
from torch import nn

import pathkernel as pk
from pathkernel.testing import check_update_rule
from pathkernel.update_rules.adam import Adam
from pathkernel.update_rules.rule import Observes, UpdateRule, kept_after
from pathkernel.update_rules.sgd import SGD


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


class Declares(UpdateRule):
    """Adam, as a user writes it."""

    name, memory = "mine", ("exp_avg",)
    observes = Observes(after=("exp_avg_sq",), numbers=("step",))

    def frozen(self, observed, settings):
        t = float(observed.after["step"])
        correction = (1 - settings["betas"][1] ** t) ** 0.5
        return {"t": t, "denominator": observed.after["exp_avg_sq"].sqrt() / correction + settings["eps"]}

    def step(self, gradient, memory, frozen, settings):
        beta = settings["betas"][0]
        moment = beta * memory[0] + (1 - beta) * gradient
        return -settings["lr"] / (1 - beta ** frozen["t"]) * moment / frozen["denominator"], (moment,)


class BySettings(Declares):
    observes = Observes(after=lambda settings: ("exp_avg_sq",), numbers=("step",))


class OneByOne(Declares):
    """As rules said it before; what a class says itself counts."""

    numbers_after = ("step",)

    def keep_after(self, settings):
        return ("exp_avg_sq",)


class SaysNothing(Declares):
    observes = None

    def frozen(self, observed, settings):
        return super().frozen(observed, settings)


class Adds(OneByOne):
    def keep_after(self, settings):
        return (*super().keep_after(settings), "exp_avg")


@pytest.mark.parametrize("rule", [Declares, BySettings, OneByOne, SaysNothing, Adds])
def test_all_ways_of_saying_it(rule: type[UpdateRule]) -> None:
    check_update_rule(rule(), adam)


def test_a_frozen_of_its_own_needs_a_declaration_of_its_own() -> None:
    class Own(Adam):
        def frozen(self, observed, settings):
            return super().frozen(observed, settings)

    class OwnAfterOlder(OneByOne):
        def frozen(self, observed, settings):
            return super().frozen(observed, settings)

    class Renamed(Adam):
        name = "renamed"

    plain = {"amsgrad": False}
    assert kept_after(Own(), plain) is None and kept_after(OwnAfterOlder(), plain) is None
    assert kept_after(Renamed(), plain) == ("exp_avg_sq",) == Renamed().keep_after(plain)
    assert kept_after(Adam(), {"amsgrad": True}) == ("max_exp_avg_sq",)
    assert kept_after(SGD(), {}) == () and Adam.numbers_after == ("step",) and SGD().keep_before == ()
    assert kept_after(Adds(), plain) == ("exp_avg_sq", "exp_avg")


class ForgotNumber(Declares):
    observes = Observes(after=("exp_avg_sq",))


class ForgotTensor(Declares):
    observes = Observes(numbers=("step",))


class ForgotBefore(Declares):
    observes = Observes(after=("exp_avg_sq",), numbers=("step",))

    def frozen(self, observed, settings):
        return {**super().frozen(observed, settings), "size": observed.before["exp_avg_sq"]}


FORGOTTEN = {
    "number": (ForgotNumber, "`ForgotNumber.frozen` reads 'step' .* after a step.*`numbers`"),
    "tensor": (ForgotTensor, "`ForgotTensor.frozen` reads 'exp_avg_sq' .* after a step"),
    "before": (ForgotBefore, "`ForgotBefore.frozen` reads 'exp_avg_sq' .* before a step.*to `before`"),
}


def recorded(rule: UpdateRule) -> pk.Trajectory:
    model, X, y, loss = nn.Linear(4, 2).double(), make_inputs(4), make_inputs(4, (2,)), nn.MSELoss()
    optimizer = adam(model.parameters())
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), rule=rule) as recorder:
        for x, target in recorder.batches(2):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    return recorder.trajectory


@pytest.mark.parametrize("part", FORGOTTEN)
def test_what_was_not_declared_is_named(part: str) -> None:
    rule, found = FORGOTTEN[part]
    with pytest.raises(pk.errors.RecordingError, match=found):
        pk.KernelMachine(recorded(rule())).explain(make_inputs(1))


class Twice(Declares):
    observes = Observes()
    keep_before = ("exp_avg",)


class Texts(Declares):
    observes = Observes(before="exp_avg")  # type: ignore[arg-type]


class Other(Declares):
    observes = ("exp_avg",)  # type: ignore[assignment]


REFUSED = {
    "twice": (Twice, "`Twice` has `observes` and `keep_before`"),
    "text": (Texts, r"`Texts.observes` has `before='exp_avg'`.*Write `before=\('exp_avg',\)`"),
    "another thing": (Other, "`Other.observes` is a tuple"),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_a_declaration_that_is_none_is_refused_where_the_recorder_is_made(rule: str) -> None:
    kind, found = REFUSED[rule]
    model = nn.Linear(4, 2).double()
    with pytest.raises(pk.errors.RecordingError, match=found):
        pk.KernelRecorder(
            model, adam(model.parameters()), nn.MSELoss(), data=(make_inputs(4), make_inputs(4, (2,))), rule=kind()
        )
