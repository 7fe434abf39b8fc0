"""The contract check: it passes for every rule of the package, and names what is wrong with a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import optim
from torch.optim import Optimizer

from pathkernel.errors import PathKernelError
from pathkernel.testing import UpdateRuleError, check_update_rule
from pathkernel.testing import update_rules as contract
from pathkernel.update_rules.adam import Adam, AdamW
from pathkernel.update_rules.elementwise import Elementwise
from pathkernel.update_rules.joint import JointRule
from pathkernel.update_rules.muon import Muon
from pathkernel.update_rules.rmsprop import RMSprop
from pathkernel.update_rules.rule import UpdateRule
from pathkernel.update_rules.sgd import SGD
from pathkernel.update_rules.table import RULES

Make = Callable[[Any], Optimizer]


def with_options(make: type[Optimizer]) -> Make:
    """An optimizer with decay wherever it has one; of matrices only where it takes no others."""
    if make is optim.Muon:
        return lambda parameters: optim.Muon([p for p in parameters if p.ndim == 2], lr=0.01)
    options: dict[str, Any] = {"lr": 0.01} if make is optim.Rprop else {"lr": 0.01, "weight_decay": 0.1}
    return lambda parameters: make(parameters, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("make", RULES, ids=lambda make: make.__name__)
def test_every_rule_of_the_package_keeps_the_contract(make: type[Optimizer], dtype: torch.dtype) -> None:
    check_update_rule(RULES[make](), with_options(make), dtype=dtype)


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.Adagrad], ids=lambda make: make.__name__)
def test_training_by_closures(make: type[Optimizer]) -> None:
    check_update_rule(RULES[make](), with_options(make), closure=True, steps=3, seed=5)


def test_the_convention_keeps_the_contract() -> None:
    check_update_rule(Elementwise(), with_options(optim.SGD), steps=4)


def muon_and_adamw(parameters: Any) -> list[Optimizer]:
    every = list(parameters)
    matrices, others = [p for p in every if p.ndim == 2], [p for p in every if p.ndim != 2]
    return [optim.Muon(matrices, lr=0.02), optim.AdamW(others, lr=0.01)]


def sgd_and_rmsprop(parameters: Any) -> list[Optimizer]:
    every = list(parameters)
    return [optim.SGD(every[:2], lr=0.1, momentum=0.9), optim.RMSprop(every[2:], lr=0.01, momentum=0.3)]


@pytest.mark.parametrize(
    ("rule", "make"),
    [(JointRule([Muon(), AdamW()]), muon_and_adamw), (JointRule([SGD(), RMSprop()]), sgd_and_rmsprop)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_joint_rules_keep_the_contract(rule: JointRule, make: Any) -> None:
    check_update_rule(rule, make, steps=4)
    check_update_rule(rule, make, steps=3, closure=True, dtype=torch.float32)


def test_a_joint_rule_with_a_wrong_part_is_named() -> None:
    class Tripled(SGD):
        def step(self, gradient, memory, frozen, settings):
            delta, memory = super().step(gradient, memory, frozen, settings)
            return 3 * delta, memory

    with pytest.raises(UpdateRuleError, match=r"`0\.\w+` was moved"):
        check_update_rule(JointRule([Tripled(), RMSprop()]), sgd_and_rmsprop, steps=2)


# -- rules that are wrong ----------------------------------------------------------------------------------------------


def momentum(parameters: Any) -> Optimizer:
    return optim.SGD(parameters, lr=0.05, momentum=0.9)


class Constant(SGD):
    """Adds what belongs into the sources."""

    def step(self, gradient, memory, frozen, settings):
        delta, memory = super().step(gradient, memory, frozen, settings)
        return delta + 0.01, memory


class Sign(SGD):
    """Not linear."""

    def step(self, gradient, memory, frozen, settings):
        return -0.1 * gradient.sign(), memory


class CutOff(SGD):
    """Right, but with a gradient that autograd cannot follow to the memory."""

    def step(self, gradient, memory, frozen, settings):
        return super().step(gradient, tuple(m.detach() for m in memory), frozen, settings)


class Reversed(UpdateRule):
    """Calls itself elementwise, while every row goes the way of another."""

    name = "Reversed"

    def step(self, gradient, memory, frozen, settings):
        return -0.1 * gradient.flip(0), memory


class Misshapen(SGD):
    """Freezes a tensor that cannot be joined with those of other parameters."""

    def frozen(self, observed, settings):
        return {**super().frozen(observed, settings), "rate": torch.ones(1)}


class TooShort(Adam):
    """Without Adam's bias correction of the first moment."""

    def frozen(self, observed, settings):
        return {**super().frozen(observed, settings), "t": 10_000.0}


class Live(Adam):
    """Keeps the optimizer's own tensor in place of a copy: every step sees the last one's."""

    def frozen(self, observed, settings):
        found = super().frozen(observed, settings)
        return {**found, "denominator": observed.after["exp_avg_sq"], "eps": float(settings["eps"])}

    def step(self, gradient, memory, frozen, settings):
        correction = (1 - settings["betas"][1] ** frozen["t"]) ** 0.5
        denominator = frozen["denominator"].sqrt() / correction + frozen["eps"]
        return super().step(gradient, memory, {**frozen, "denominator": denominator}, settings)


class Undamped(SGD):
    """Forgets its memory: only the second step shows it."""

    def step(self, gradient, memory, frozen, settings):
        return super().step(gradient, tuple(0 * m for m in memory), frozen, settings)


class NoDecay(SGD):
    """Forgets the weight decay."""

    def gradient_sources(self, parameter, frozen, settings):
        return {}


WRONG: dict[str, tuple[type[UpdateRule], Make, tuple[str, str, str]]] = {
    "a constant term": (
        Constant,
        momentum,
        ("At step 0, for `0.weight`, `Constant.step` is not linear: Δ is off by", "without a constant", "`frozen`"),
    ),
    "not linear": (Sign, momentum, ("`Sign.step` is not linear: Δ is off by", "linear in", "displacement_sources")),
    "no derivative": (
        CutOff,
        momentum,
        ("At step 1, for `0.weight`, the adjoint of `CutOff.step` fails", "⟨u, g⟩ + ⟨μ, m⟩", "Leave out `detach`"),
    ),
    "not elementwise": (
        Reversed,
        momentum,
        ("`Reversed` calls itself elementwise, but as one vector the parameter has Δ off by", "one vector", "= False"),
    ),
    "frozen shape": (Misshapen, momentum, ("has frozen `rate` of another shape", "joined", "elementwise = False")),
    "missing factor": (
        TooShort,
        with_options(optim.Adam),
        ("`0.weight` was moved by up to 0.01, and `TooShort` is off by 9.0e-03", "to rounding", "term by term"),
    ),
    "live tensor": (
        Live,
        with_options(optim.Adam),
        ("At step 0, `0.weight` was moved", "to rounding", "copy what the"),
    ),
    "lost memory": (Undamped, momentum, ("At step 1, `0.weight` was moved", "carried memory", "`keep_before`")),
    "lost decay": (
        NoDecay,
        with_options(optim.SGD),
        ("At step 0, `0.weight` was moved", "Step, sources", "Compare `step`"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_named_with_step_and_parameter(name: str) -> None:
    rule, make, words = WRONG[name]
    with pytest.raises(UpdateRuleError) as caught:
        check_update_rule(rule(), make, steps=3)
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, PathKernelError)
    for part, word in zip((caught.value.found, caught.value.expected, caught.value.write), words, strict=True):
        assert word in part


class ByHand(Optimizer):
    """Gradient descent."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


class Descent(UpdateRule):
    """The rule of `ByHand`."""

    name = "descent"

    def step(self, gradient, memory, frozen, settings):
        return -float(settings["lr"]) * gradient, memory


def test_what_is_left_over_at_the_end() -> None:
    check_update_rule(Descent(), lambda parameters: ByHand(parameters, 0.1))
    with pytest.raises(UpdateRuleError) as caught:
        check_update_rule(Descent(), lambda parameters: ByHand(parameters, 5.0), steps=2)
    words = (
        "Under `Descent`, shares and channels miss outputs that moved by",
        "At most 1e-06 of it is left over",
        "the steps are small",
    )
    for part, word in zip((caught.value.found, caught.value.expected, caught.value.write), words, strict=True):
        assert word in part


def test_the_training_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    check_update_rule(SGD(), momentum, steps=2)
    assert torch.equal(torch.randn(3), expected)


# -- several gradients a step ------------------------------------------------------------------------------------------


class Heun(ByHand):
    """Δ = −η/2 (g(θ) + g(θ − η g(θ)))."""

    def step(self, closure: Any) -> None:
        held = [(group["lr"], p, p.detach().clone()) for group in self.param_groups for p in group["params"]]
        closure()
        with torch.no_grad():
            for lr, p, _ in held:
                self.state[p]["first"] = p.grad.clone()
                p.sub_(lr * p.grad)
        closure()
        with torch.no_grad():
            for lr, p, start in held:
                p.copy_(start - lr / 2 * (self.state[p]["first"] + p.grad))


class HeunRule(UpdateRule):
    """The rule of `Heun`."""

    name, stages = "Heun", 2

    def frozen(self, observed, settings):
        return {"offset": -float(settings["lr"]) * observed.after["first"]}

    def step(self, gradient, memory, frozen, settings):
        return -float(settings["lr"]) / 2 * (gradient[0] + gradient[1]), memory

    def stage_offsets(self, frozen, settings):
        return None, frozen["offset"]


def test_a_rule_of_two_stages() -> None:
    check_update_rule(HeunRule(), lambda parameters: Heun(parameters, 0.1))


def test_the_steps_of_a_rule_of_two_stages() -> None:
    trajectory, _ = contract._train(HeunRule(), lambda p: Heun(p, 0.1), 4, 0, torch.float64, by_closure=True)
    contract._check_steps(HeunRule(), trajectory)
