"""Rows of `recording/test_refusals.py` for several optimizers, those that join later, and those that nobody gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import make_inputs
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import pathkernel as pk
from pathkernel import errors
from pathkernel.optimizers import Momentum
from pathkernel.update_rules.adam import AdamW as AdamWRule
from pathkernel.update_rules.joint import JointRule
from pathkernel.update_rules.sgd import SGD as SGDRule

Row = tuple[Callable[[], Any], type[Exception], tuple[str, str, str]]
CE = nn.CrossEntropyLoss()
X, Y = make_inputs(6), torch.tensor([0, 1, 2, 0, 1, 2])


def network() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def recorder(make: Callable[[Any], Any], **options: Any) -> pk.KernelRecorder:
    model = network()
    return pk.KernelRecorder(model, make(model), CE, data=(X, Y), **options)


def body(model: Any) -> SGD:
    return SGD(model[0].parameters(), lr=0.1)


def head(model: Any, kind: type[Any] = SGD) -> Any:
    return kind(model[2].parameters(), lr=0.1)


def both(model: Any) -> list[Optimizer]:
    return [body(model), head(model, AdamW)]


def joining(make: Callable[[Any], Any], *, at_rest: bool = True, step: bool = False) -> None:
    """Another optimizer joins, or steps, after one step of the first."""
    model = network()
    optimizer = body(model)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, Y)) as recorder:
        x, y = recorder.announce([0, 1])
        CE(model(x), y).backward()
        optimizer.step()
        other = make(model)
        if not at_rest:
            x, _ = recorder.announce([2, 3])
            waits = model(x)
            assert waits.requires_grad
        if step:
            other.step()
        recorder.attach(other)


class SAM(SGD):
    """Sharpness-aware minimisation, as far as it tells what it is."""

    def first_step(self) -> None:
        """To the worst place nearby."""

    def second_step(self) -> None:
        """Back, and one step."""


OF_OPTIMIZERS: dict[str, Row] = {
    "a recorder that has none yet": (
        lambda: pk.KernelRecorder(network(), loss=CE, data=(X, Y)).announce([0]),
        errors.RecordingError,
        ("has no optimizer yet", "are the steps of optimizers", "`recorder.attach(optimizer)`"),
    ),
    "a number among optimizers": (
        lambda: recorder(lambda model: [body(model), 1]),
        errors.InputError,
        ("holds, a int", "those of `torch.optim`", "[muon, adamw]"),
    ),
    "no optimizer": (
        lambda: recorder(lambda model: []),
        errors.InputError,
        ("a list of 0", "each of them once", "[muon, adamw]"),
    ),
    "two passes for a step": (
        lambda: recorder(lambda model: SAM(model.parameters(), lr=0.1)),
        errors.UnsupportedOptimizerError,
        ("`SAM` takes two passes", "the parameters that the step begins with", "optimizer inside alone"),
    ),
    "a parameter that two optimizers hold": (
        lambda: recorder(lambda model: [SGD(model.parameters(), lr=0.1), head(model)]),
        errors.RecordingError,
        ("held by two of the optimizers, SGD and SGD", "Each parameter has one optimizer", "Split the parameters"),
    ),
    "rules of other optimizers": (
        lambda: recorder(both, rule=["elementwise"]),
        errors.InputError,
        ("has 1 rules for 2 optimizers", "in their order", "rule=[None, YourRule()]"),
    ),
    "a look-ahead beside another": (
        lambda: recorder(
            lambda model: [Momentum(model[0].parameters(), lr=0.1), head(model)], rule=[Momentum.rule(), None]
        ),
        errors.UnsupportedOptimizerError,
        ("was given beside other optimizers", "take one gradient each", "this optimizer alone"),
    ),
    "settings that name no rule": (
        lambda: JointRule([SGDRule(), AdamWRule()]).of({"rule": 2}),
        errors.TrajectoryError,
        ("name the rule '2'", "which of its 2 rules", "`pathkernel verify`"),
    ),
    "keyframes of several optimizers": (
        lambda: recorder(both, schedule=pk.Keyframes(4)),
        errors.RecordingError,
        ("Several optimizers were given", "by one optimizer", "Leave out `schedule`"),
    ),
    "a second optimizer that nobody gave": (
        lambda: joining(head, step=True),
        errors.RecordingError,
        ("about to move `2.weight`, `2.bias`", "knows every optimizer", "model, [sgd, sgd]"),
    ),
    "an optimizer that joins under another rule": (
        lambda: joining(lambda model: head(model, AdamW)),
        errors.RecordingError,
        ("follows the rule of AdamW", "those that it began with", "a new KernelRecorder here"),
    ),
    "an optimizer that takes over under another rule": (
        lambda: joining(lambda model: AdamW(model[0].parameters())),
        errors.RecordingError,
        ("follows the rule of AdamW", "a parameter keeps its own", "at the start"),
    ),
    "an optimizer that takes over in part": (
        lambda: joining(lambda model: SGD([model[0].weight, *model[2].parameters()], lr=0.1)),
        errors.RecordingError,
        ("some of the parameters of SGD, not all", "takes over all that it has", "holds the same parameters"),
    ),
    "an optimizer that joins in the middle of a batch": (
        lambda: joining(head, at_rest=False),
        errors.RecordingError,
        ("between forward pass and step", "between two batches", "before the forward pass"),
    ),
}
