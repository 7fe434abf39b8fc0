"""Whatever the optimizer, its settings, the groups, the batches and the loss: nothing is left over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import generator, make_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pathkernel as pk

SAMPLES = 6
LOSSES = {"ce": nn.CrossEntropyLoss(), "ce_sum": nn.CrossEntropyLoss(reduction="sum"), "mse": nn.MSELoss()}


@dataclass(frozen=True)
class Plan:
    """A training run: its optimizer with a setting for each group, and the micro-batches of each step."""

    optimizer: str
    groups: tuple[dict[str, Any], ...]
    steps: tuple[tuple[tuple[int, ...], ...], ...]
    loss: str
    smooth: bool
    seed: int


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


SETTINGS: dict[str, dict[str, st.SearchStrategy]] = {
    "sgd": {"lr": numbers(0.01, 0.2)},
    "momentum": {"lr": numbers(0.01, 0.1), "momentum": numbers(0.1, 0.95), "dampening": numbers(0.0, 0.9)},
    "nesterov": {"lr": numbers(0.01, 0.1), "momentum": numbers(0.1, 0.95), "nesterov": st.just(True)},
    "adam": {
        "lr": numbers(0.001, 0.05),
        "betas": st.tuples(numbers(0.0, 0.95), numbers(0.5, 0.999)),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "amsgrad": st.booleans(),
    },
}
SETTINGS["adamw"] = SETTINGS["adam"]
CLASSES = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@st.composite
def plans(draw: st.DrawFn, optimizer: str) -> Plan:
    decay = {"weight_decay": st.sampled_from([0.0, 0.01, 0.3])}
    group = st.fixed_dictionaries({**SETTINGS[optimizer], **decay})
    ids = st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=5).map(tuple)
    step = st.lists(ids, min_size=1, max_size=2).map(tuple)
    return Plan(
        optimizer,
        tuple(draw(st.lists(group, min_size=1, max_size=3))),
        tuple(draw(st.lists(step, min_size=1, max_size=4))),
        draw(st.sampled_from(sorted(LOSSES))),
        draw(st.booleans()),
        draw(st.integers(0, 3)),
    )


def network(plan: Plan) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh() if plan.smooth else nn.ReLU(), nn.Linear(4, 2)).double()


def samples(plan: Plan) -> tuple[Tensor, Tensor]:
    X = make_inputs(SAMPLES, (3,), seed=plan.seed)
    if plan.loss == "mse":
        return X, torch.randn(SAMPLES, 2, dtype=torch.float64, generator=generator(plan.seed))
    return X, torch.randint(2, (SAMPLES,), generator=generator(plan.seed))


def run(plan: Plan) -> tuple[nn.Module, pk.Trajectory]:
    model, loss = network(plan), LOSSES[plan.loss]
    parameters = list(model.parameters())
    split = [{"params": parameters[g :: len(plan.groups)], **group} for g, group in enumerate(plan.groups)]
    optimizer = CLASSES.get(plan.optimizer, torch.optim.SGD)(split)
    with pk.KernelRecorder(model, optimizer, loss, data=samples(plan), audit_every=1) as recorder:
        for micros in plan.steps:
            optimizer.zero_grad()
            for ids in micros:
                x, y = recorder.batch(list(ids))
                (loss(model(x), y) / len(micros)).backward()
            optimizer.step()
    return model, recorder.trajectory


@pytest.mark.parametrize("optimizer", SETTINGS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=st.data())
def test_nothing_is_left_over_and_the_machine_is_the_network(optimizer: str, drawn: st.DataObject) -> None:
    plan = drawn.draw(plans(optimizer))
    model, trajectory = run(plan)
    X = make_inputs(2, (3,), seed=9)
    machine = pk.KernelMachine(trajectory, quadrature=pk.DiscreteGradient())
    why = machine.explain(X, outputs="all")
    live = model(X).detach().numpy()
    size = max(1.0, np.abs(live).max())
    assert why.relative_residual <= 1e-9
    np.testing.assert_allclose(why.reconstruction.reshape(live.shape), live, rtol=0, atol=1e-9 * size)
    np.testing.assert_allclose(machine.decision_function(X), live, rtol=0, atol=1e-9 * size)
    np.testing.assert_allclose(
        machine.decision_function(X), why.reconstruction.reshape(live.shape), rtol=0, atol=1e-9 * size
    )
    moved = np.abs(why.output - why.initial).max()
    assert np.abs(why.channels["rounding"]).max() <= 1e-7 * max(moved, 1e-3)
    never = sorted(set(range(SAMPLES)) - {i for micros in plan.steps for ids in micros for i in ids})
    assert (why.shares[:, never] == 0).all()
    assert ("weight_decay" in why.channels) == any(group["weight_decay"] for group in plan.groups)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans("sgd"))
def test_a_step_of_gradient_descent_adds_the_same_whatever_comes_after_it(plan: Plan) -> None:
    # Without memory, a step adds the same whatever comes after it.
    group = {"lr": 0.05, "weight_decay": 0.1}
    whole = replace(plan, groups=(group,))
    X = make_inputs(2, (3,), seed=9)
    why = pk.KernelMachine(run(whole)[1]).explain(X, outputs=0, by="step")
    np.testing.assert_allclose(why.steps.sum(axis=1), why.shares.sum(axis=1), rtol=0, atol=1e-12)
    start = pk.KernelMachine(run(replace(whole, steps=plan.steps[:1]))[1]).explain(X, outputs=0, by="step")
    np.testing.assert_allclose(start.steps[:, 0], why.steps[:, 0], rtol=0, atol=1e-12)
