"""Finite steps: modified flows by the order of their error, and ledgers of recorded runs by that of their remainder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dynamical
import numpy as np
import pytest
import torch
from dynamical import BATCHES, LOSS, RUNS, data, network, recorded
from torch import nn

import pathkernel as pk
from pathkernel import dynamics, reference
from pathkernel.errors import InputError, TrajectoryError

ORDER = 0.2
"""How far measured orders may be from those of theory: the next term of their expansion at the rates in use."""


# -- modified flows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [0, 1, 2])
def test_each_term_of_the_modified_flow_raises_the_order(terms: int) -> None:
    assert dynamical.local_order(terms) == pytest.approx(2 + terms, abs=ORDER)
    assert dynamical.global_order(terms) == pytest.approx(1 + terms, abs=ORDER)


@pytest.mark.parametrize("terms", [0, 1])
def test_the_heavy_ball_has_its_own_modified_flow(terms: int) -> None:
    assert dynamical.global_order(terms, momentum=0.5) == pytest.approx(1 + terms, abs=ORDER)


@pytest.mark.parametrize("ordering", ["given", "mean"])
def test_mini_batches_follow_theirs_in_order_and_in_the_mean(ordering: str) -> None:
    assert dynamical.epoch_order(ordering) == pytest.approx(3, abs=ORDER)


def test_the_order_of_batches_matters_at_second_order() -> None:
    # In the mean over orders without the term of the order, in one order with it: neither serves for the other.
    rate = 0.01
    end = dynamical.descended(lambda p: torch.optim.SGD(p, lr=rate), 3, ids=BATCHES)
    off = {}
    for ordering in ("given", "mean"):
        flow = dynamics.modified_flow(
            network(), LOSS, data(), 3 * rate, lr=rate, batches=BATCHES, ordering=ordering, points=2
        )
        off[ordering] = float((flow.theta[-1] - end).norm())
    assert off["given"] < off["mean"] / 3


def test_one_batch_of_all_samples_is_plain_gradient_descent() -> None:
    options: dict[str, Any] = {"lr": 0.05, "points": 2}
    plain = dynamics.modified_flow(network(), LOSS, data(), 0.1, **options)
    batch = dynamics.modified_flow(network(), LOSS, data(), 0.1, batches=[range(8)], ordering="given", **options)
    torch.testing.assert_close(batch.theta[-1], plain.theta[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0.0}, "The rate is above 0"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum from 0 up to 1"),
        ({"lr": 0.1, "order": 3}, r"`order=3` was asked for\. Known are"),
        ({"lr": 0.1, "order": 2, "momentum": 0.5}, "with momentum or mini-batches"),
        ({"lr": 0.1, "batches": BATCHES, "ordering": "random"}, "Orderings are 'mean', 'given'"),
        ({"lr": 0.1, "batches": BATCHES, "momentum": 0.5}, "of mini-batches without momentum"),
    ],
)
def test_modified_flows_that_are_not_known_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        dynamics.modified_flow(network(), LOSS, data(), **options)


# -- ledgers of recorded runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
def test_the_remainder_is_of_order_two(kind: str) -> None:
    loss, outputs = dynamical.remainder_orders(kind)
    assert loss == pytest.approx(2, abs=ORDER)
    assert outputs == pytest.approx(2, abs=ORDER)


def test_the_parts_are_what_their_names_say() -> None:
    X, y = data()
    trajectory = recorded(lambda p: torch.optim.SGD(p, lr=0.02, weight_decay=0.1), 2, size=4)
    ledger = dynamics.regularization_ledger(trajectory, X[:3])
    assert set(ledger.loss.parts) == {"flow", "batches", "regularization", "weight_decay"}
    np.testing.assert_allclose(ledger.times, 0.02 * np.arange(5), rtol=1e-12)
    for name, steps in ledger.steps.items():
        assert float(ledger.loss.parts[name]) == pytest.approx(steps.sum(), rel=1e-12)
    # By hand, from dense derivatives at both ends of each step.
    found = dict.fromkeys(ledger.loss.parts, 0.0)
    for s, rows in enumerate([slice(0, 4), slice(4, 8)] * 2):
        for theta in (trajectory.vector(s), trajectory.vector(s + 1)):
            full, _ = reference.gradient_and_hessian(network(), theta, LOSS, X, y)
            g, H = reference.gradient_and_hessian(network(), theta, LOSS, X[rows], y[rows])
            decayed = g + 0.1 * theta
            found["flow"] -= 0.01 * float(full @ full)
            found["batches"] -= 0.01 * float(full @ (g - full))
            found["weight_decay"] -= 0.01 * float(full @ (0.1 * theta))
            found["regularization"] -= 0.01 * 0.01 * float(full @ (H @ decayed + 0.1 * decayed))
    for name, value in found.items():
        assert float(ledger.loss.parts[name]) == pytest.approx(value, rel=1e-9)
    end, start = (LOSS(network_at(trajectory.vector(s))(X), y).item() for s in (4, 0))
    assert float(ledger.loss.change) == pytest.approx(end - start, rel=1e-10)
    assert abs(float(ledger.loss.remainder)) < 0.01 * abs(end - start)
    assert ledger.outputs.change.shape == (3, 1) and ledger.outputs.relative_remainder < 0.01
    assert "remainder" in repr(ledger)
    cut = dynamics.regularization_ledger(trajectory, X[:3], block=3)
    np.testing.assert_allclose(cut.outputs.remainder, ledger.outputs.remainder, rtol=1e-6, atol=1e-14)
    with pytest.raises(InputError, match="`regularization_ledger` was given no samples"):
        dynamics.regularization_ledger(trajectory, X[:0])
    with pytest.raises(InputError, match="`block=0` was given"):
        dynamics.regularization_ledger(trajectory, X[:3], block=0)


def network_at(theta: torch.Tensor) -> nn.Module:
    model = network()
    nn.utils.vector_to_parameters(theta, model.parameters())
    return model


def test_without_queries_there_is_the_loss_alone_and_the_model_stays() -> None:
    trajectory = RUNS["plain"](0.1)
    before = dynamical.vector(trajectory.model).clone()
    ledger = dynamics.regularization_ledger(trajectory)
    assert ledger.outputs is None and set(ledger.loss.parts) == {"flow", "regularization"}
    assert float(ledger.loss.parts["regularization"]) < 0
    assert torch.equal(dynamical.vector(trajectory.model), before)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def clipped() -> pk.Trajectory:
    return recorded(sgd, 1, before=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-2))


def edited() -> pk.Trajectory:
    model, (X, y) = network(), data()
    optimizer = sgd(model.parameters())
    with pk.KernelRecorder(model, optimizer, LOSS, data=(X, y)) as recorder:
        for x, target in recorder.batches(batch_size=8):
            optimizer.zero_grad()
            LOSS(model(x), target).backward()
            optimizer.step()
        with torch.no_grad():
            model[0].weight.mul_(0.9)
    return recorder.trajectory


def accumulated() -> pk.Trajectory:
    model, (X, y) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, LOSS, data=(X, y)) as recorder:
        for k, (x, target) in enumerate(recorder.batches(batch_size=4)):
            (LOSS(model(x), target) / 2).backward()
            if k == 1:
                optimizer.step()
    return recorder.trajectory


REFUSED: dict[str, tuple[Callable[[], pk.Trajectory], str]] = {
    "adaptive": (
        lambda: recorded(lambda p: torch.optim.Adam(p), 1),
        r"asked of a run of Adam.*a rate for each parameter.*loss_ledger\(trajectory\)",
    ),
    "sign": (lambda: recorded(lambda p: pk.optimizers.SignDescent(p), 1), "asked of a run of sign descent"),
    "nesterov": (
        lambda: recorded(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True), 1),
        "`nesterov` and `maximize` are off",
    ),
    "rolling in mini-batches": (
        lambda: recorded(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), 1, size=4),
        "heavy ball in mini-batches.*whose every step takes all samples",
    ),
    "clipped": (clipped, "the optimizer received another gradient.*without clipping"),
    "accumulated": (accumulated, "several backward passes to a step"),
    "edited": (edited, "more than the optimizer's steps changed the network"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runs_without_a_known_modified_flow_are_refused(name: str) -> None:
    make, said = REFUSED[name]
    with pytest.raises(InputError, match=said):
        dynamics.regularization_ledger(make())


def test_a_thinned_record_is_refused() -> None:
    with pytest.raises(TrajectoryError, match="needs the gradients of every step"):
        dynamics.regularization_ledger(recorded(sgd, 1, schedule=pk.WeightsOnly()))
