"""Steps whose forward and backward pass run inside of them, by a closure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from several import BATCH, CE, QUERIES, SAMPLES, X, Y
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import pathkernel as pk

RATE, MOMENTUM, DAMPENING = 0.1, 0.9, 0.2


def linear() -> nn.Sequential:
    """Linear in its parameters, so that a query moves by ⟨∇z(x), Δ⟩ with one gradient for all steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 3).double())


def damped(parameters: Sequence[Tensor]) -> Optimizer:
    return SGD(parameters, lr=RATE, momentum=MOMENTUM, dampening=DAMPENING)


def unrolled(batches: Sequence[Tensor]) -> np.ndarray:
    """Shares of the first output, (Q, N): heavy ball written out sample by sample with plain autograd."""
    model = linear()
    weight, bias = model.parameters()
    memory: list[Any] = [None] * SAMPLES
    shares = np.zeros((len(QUERIES), SAMPLES))
    for ids in batches:
        moves = []
        for i in range(SAMPLES):
            own = nn.functional.cross_entropy(model(X[i : i + 1]), Y[i : i + 1]) * float(i in ids) / len(ids)
            gradient = torch.autograd.grad(own, (weight, bias))
            if memory[i] is None:  # the first gradient is not damped
                memory[i] = gradient
            else:
                pairs = zip(memory[i], gradient, strict=True)
                memory[i] = tuple(MOMENTUM * m + (1 - DAMPENING) * g for m, g in pairs)
            moves.append([-RATE * m for m in memory[i]])
            shares[:, i] += (QUERIES @ moves[i][0][0] + moves[i][1][0]).numpy()
        with torch.no_grad():
            for p, moved in zip((weight, bias), zip(*moves, strict=True), strict=True):
                p += sum(moved)
    return shares


def alone(model: Any) -> Optimizer:
    return damped([*model.parameters()])


def two(model: Any) -> list[Optimizer]:
    return [damped([model[0].weight]), damped([model[0].bias])]


@pytest.mark.parametrize(("make", "schedule"), [(alone, pk.Every()), (alone, pk.Keyframes(2)), (two, pk.Every())])
def test_the_first_gradient_of_a_damped_memory(make: Callable[[Any], Any], schedule: Any) -> None:
    """It arrives inside the step: no parameter has one when the step begins, and none has a memory."""
    model, batches = linear(), torch.arange(2 * SAMPLES).remainder(SAMPLES).split(BATCH)
    optimizers = make(model)
    with pk.KernelRecorder(model, optimizers, CE, data=(X, Y), schedule=schedule) as recorder:
        for ids in batches:

            def closure(ids: Tensor = ids) -> Tensor:
                model.zero_grad()
                recorder.announce(ids)
                value = CE(model(X[ids]), Y[ids])
                value.backward()
                return value

            if isinstance(optimizers, list):  # both use the gradient of the first one's closure
                optimizers[0].step(closure)
                optimizers[1].step()
            else:
                optimizers.step(closure)
    why = pk.KernelMachine(recorder.trajectory).explain(QUERIES, outputs=0)
    np.testing.assert_allclose(why.shares, unrolled(batches), atol=1e-12)
    assert "unexplained" not in why.channels


@pytest.mark.parametrize("schedule", [None, pk.Keyframes(4)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_closure_without_a_backward_pass_makes_no_step(schedule: Any, decay: float) -> None:
    """As of frameworks that skip a batch: the optimizer is called, finds no gradient, and moves nothing."""
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay)
    batches = [torch.arange(k, k + BATCH) for k in range(0, SAMPLES - BATCH, 2)]
    taken = []
    with pk.KernelRecorder(model, optimizer, CE, data=(X, Y), schedule=schedule) as recorder:
        for k, ids in enumerate(batches):
            x, y = recorder.announce(ids)

            def closure(x: Tensor = x, y: Tensor = y, skipped: bool = k % 3 == 1) -> Tensor | None:
                optimizer.zero_grad()
                loss = CE(model(x), y)
                if skipped:
                    return None
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[call-overload]
            taken += [] if k % 3 == 1 else [ids]
    assert [batch.ids.tolist() for step in recorder.trajectory.steps() for batch in step.batches] == [
        ids.tolist() for ids in taken
    ]
    machine = pk.KernelMachine(recorder.trajectory)
    with torch.no_grad():
        np.testing.assert_allclose(machine.decision_function(QUERIES), model(QUERIES).numpy(), rtol=0, atol=1e-12)
