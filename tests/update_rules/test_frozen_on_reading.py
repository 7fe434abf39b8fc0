"""What is found when a step is read is what was there when the step was taken, to the last bit."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

import pathkernel as pk
from pathkernel.trajectory.frozen_state import FrozenOnReading
from pathkernel.trajectory.step import Step
from pathkernel.update_rules.adam import Adam
from pathkernel.update_rules.rule import Observation
from pathkernel.update_rules.sgd import SGD
from pathkernel.update_rules.table import rule_of

LOSS = nn.MSELoss()
OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam_fused": lambda p: optim.Adam(p, lr=0.01, fused=True),
    "amsgrad": lambda p: optim.Adam(p, lr=0.01, betas=(0.9, 0.5), amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
    "adamax": lambda p: optim.Adamax(p, lr=0.01),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "radam": lambda p: optim.RAdam(p, lr=0.01, betas=(0.9, 0.99)),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.01, lr_decay=0.1),
    "adadelta": lambda p: optim.Adadelta(p),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01),
    "rmsprop_centered": lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "asgd": lambda p: optim.ASGD(p, lr=0.01),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01),
    "muon": lambda p: optim.Muon([q for q in p if q.dim() == 2], lr=0.01),
    "two_groups": lambda p: optim.Adam(
        [{"params": q, "amsgrad": k % 2 == 0, "betas": (0.9, 0.5)} for k, q in enumerate(p)], lr=0.01
    ),
}


class Witness:
    """Calls the rule right after every step, with the live state."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.rule, self.named, self.optimizer = rule_of(optimizer), dict(model.named_parameters()), optimizer
        self.frozen: list[dict[str, dict[str, Any]]] = []
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def before(self, *_: Any) -> None:
        self.state = copy.deepcopy({name: dict(self.optimizer.state.get(p, {})) for name, p in self.named.items()})
        self.theta = {name: p.detach().clone() for name, p in self.named.items()}
        self.gradient = {name: p.grad.clone() for name, p in self.named.items() if p.grad is not None}

    def after(self, *_: Any) -> None:
        group = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        found = {}
        for name, p in self.named.items():
            if id(p) in group and name in self.gradient:
                moved = p.detach() - self.theta[name]
                numbers = {key: v.item() for key, v in self.state[name].items() if v is not None and v.numel() == 1}
                observed = Observation(
                    {**self.state[name], **numbers},
                    self.optimizer.state[p],
                    self.theta[name],
                    self.gradient[name],
                    moved,
                )
                found[name] = copy.deepcopy(self.rule.frozen(observed, dict(group[id(p)])))
        self.frozen.append(found)


def trained(make: Any, steps: int = 7) -> tuple[pk.Trajectory, Witness]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, X, y = make(model.parameters()), torch.randn(12, 3), torch.randn(12, 2)
    witness = Witness(model, optimizer)
    with pk.KernelRecorder(model, optimizer, LOSS, data=(X, y)) as recorder:
        for s in range(steps):
            x, target = recorder.batch(torch.arange(s, s + 4))
            optimizer.zero_grad()
            LOSS(model(x), target).backward()
            optimizer.step()
    return recorder.trajectory, witness


def assert_same(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert set(found[name]) == set(expected[name])
        for key, value in expected[name].items():
            if isinstance(value, Tensor):
                assert torch.equal(found[name][key], value)
                assert found[name][key].dtype == value.dtype
            else:
                assert found[name][key] == value


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_it_was_when_the_step_was_taken(name: str) -> None:
    trajectory, witness = trained(OPTIMIZERS[name])
    for step, expected in zip(trajectory.steps(), witness.frozen, strict=True):
        assert_same(step.frozen, expected)


def test_denominators_are_not_kept() -> None:
    trajectory, _ = trained(OPTIMIZERS["adamw"])
    step = next(trajectory.steps())
    assert isinstance(step.frozen, FrozenOnReading)
    assert set(step.frozen.state.after) == {"exp_avg_sq"}
    assert step.frozen.state.after["exp_avg_sq"].shape == step.before.shape
    assert step.frozen.state.numbers["step"].tolist() == [1.0] * 4
    assert step.frozen.state.fresh == step.active
    denominator = weakref.ref(step.frozen["0.weight"]["denominator"])
    list(map(dict, (step.frozen for step in trajectory.steps())))  # another step is read
    gc.collect()
    assert denominator() is None


class Either(nn.ModuleList):
    """Parts of which the loop calls one at a time."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


def test_without_a_gradient() -> None:
    torch.manual_seed(0)
    model = Either([nn.Linear(3, 1), nn.Linear(3, 1)])
    optimizer, X, y = torch.optim.Adam(model.parameters(), lr=0.1), torch.randn(4, 3), torch.randn(4, 1)
    witness = Witness(model, optimizer)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=0) as recorder:
        for used in (0, 1, 0):
            x, target = recorder.batch([0, 1, 2])
            optimizer.zero_grad()
            loss(model[used](x), target).backward()
            optimizer.step()
    for step, expected in zip(recorder.trajectory.steps(), witness.frozen, strict=True):
        assert set(step.frozen) == step.active
        assert_same(step.frozen, expected)
    assert [len(step.active) for step in recorder.trajectory.steps()] == [2, 2, 2]


def test_parameters_of_several_types_are_looked_at_at_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    steps: list[Step] = []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    recorder = pk.KernelRecorder(model, optimizer, LOSS, data=(torch.randn(4, 3), torch.randn(4, 2)), audit_every=0)
    with recorder:
        recorder.batch([0])
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        steps.extend(recorder.trajectory.steps())
    assert isinstance(steps[0].frozen, dict)
    assert steps[0].frozen["0.weight"]["denominator"].dtype == torch.float32


def test_a_subclass_with_a_frozen_of_its_own_is_asked_right_after_the_step() -> None:
    class Extended(Adam):
        def frozen(self, observed: Observation, settings: Any) -> dict[str, Any]:
            return {**super().frozen(observed, settings), "moment": observed.after["exp_avg"].clone()}

    class Aware(Extended):
        def keep_after(self, settings: Any) -> tuple[str, ...]:
            return ("exp_avg_sq", "exp_avg")

    class Renamed(SGD):
        name = "renamed"

    assert Extended().keep_after({"amsgrad": False}) is None
    assert Aware().keep_after({"amsgrad": False}) == ("exp_avg_sq", "exp_avg")
    assert Renamed().keep_after({}) == ()
