"""Networks with several optimizers, and loops that train them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from cases import generator
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import pathkernel as pk

CE = nn.CrossEntropyLoss()
SAMPLES, BATCH = 24, 8
X = torch.randn(SAMPLES, 5, dtype=torch.float64, generator=generator(1))
Y = torch.randint(3, (SAMPLES,), generator=generator(2))
QUERIES = torch.randn(3, 5, dtype=torch.float64, generator=generator(3))


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [torch.optim.Muon(matrices, lr=0.02), AdamW([p for p in model.parameters() if p.ndim != 2], lr=3e-3)]


def body_and_head(model: Any) -> list[Optimizer]:
    body = SGD(model[:3].parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return [body, AdamW(model[3].parameters(), lr=1e-2)]


def three(model: Any) -> list[Optimizer]:
    return [
        SGD(model[0].parameters(), lr=0.1, momentum=0.9, nesterov=True),
        RMSprop(model[1].parameters(), lr=1e-3),
        Adam(model[3].parameters(), lr=1e-2, amsgrad=True, weight_decay=0.01),
    ]


def adafactor_and_sgd(model: Any) -> list[Optimizer]:
    return [torch.optim.Adafactor(model[0].parameters(), lr=1e-2), SGD(model[1:].parameters(), lr=0.1)]


def two_rates(model: Any) -> list[Optimizer]:
    return [AdamW(model[:3].parameters(), lr=1e-3), AdamW(model[3].parameters(), lr=1e-2)]


Step = Callable[[int, nn.Module, Sequence[Optimizer], Callable[[], Tensor]], None]


def all_step(k: int, model: nn.Module, optimizers: Sequence[Optimizer], loss: Callable[[], Tensor]) -> None:
    """All gradients are cleared, one backward pass, all step."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss().backward()
    for optimizer in optimizers:
        optimizer.step()


def one_after_the_other(k: int, model: nn.Module, optimizers: Sequence[Optimizer], loss: Callable[[], Tensor]) -> None:
    """Each clears its gradients before the next one steps."""
    loss().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def clipped_together(k: int, model: nn.Module, optimizers: Sequence[Optimizer], loss: Callable[[], Tensor]) -> None:
    model.zero_grad()
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.2)
    for optimizer in optimizers:
        optimizer.step()


def clipped_apart(k: int, model: nn.Module, optimizers: Sequence[Optimizer], loss: Callable[[], Tensor]) -> None:
    """Each optimizer's gradients have a norm of their own, and the second are clipped when the first has moved."""
    model.zero_grad()
    loss().backward()
    for bound, optimizer in zip((0.1, 0.05, 0.02), optimizers, strict=False):
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], bound)
        optimizer.step()


def at_other_rates(k: int, model: nn.Module, optimizers: Sequence[Optimizer], loss: Callable[[], Tensor]) -> None:
    """The second steps every other time; the gradients that it does not use are cleared or stay."""
    first, *others = optimizers
    first.zero_grad()
    if k % 3:
        others[0].zero_grad()
    loss().backward()
    first.step()
    if k % 2:
        for other in others:
            other.zero_grad()
        loss().backward()
        for other in others:
            other.step()


def by_closures(k: int, model: nn.Module, optimizers: Sequence[Optimizer], loss: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        model.zero_grad()
        value = loss()
        value.backward()
        return value

    for optimizer in optimizers:
        optimizer.step(closure)


def scaled(k: int, model: nn.Module, optimizers: Sequence[Optimizer], loss: Callable[[], Tensor]) -> None:
    scaler = SCALERS.setdefault(id(model), torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2))
    model.zero_grad()
    scaler.scale(loss()).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()


SCALERS: dict[int, Any] = {}


def train(
    make: Callable[[Any], Any],
    loop: Step = all_step,
    *,
    epochs: int = 2,
    recorded: bool = True,
    slower: float = 0.1,
    **options: Any,
) -> tuple[nn.Module, pk.Trajectory | None]:
    """Train, on record or not."""
    model = network()
    optimizers = make(model)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9 - slower * k) for k, one in enumerate(optimizers)]

    def run(announce: Callable[[Tensor], Any]) -> None:
        for k, ids in enumerate(torch.arange(epochs * SAMPLES).split(BATCH)):

            def loss(ids: Tensor = ids % SAMPLES) -> Tensor:
                announce(ids)
                return CE(model(X[ids]), Y[ids])

            loop(k, model, optimizers, loss)
            for scheduler in schedulers:
                scheduler.step()

    if not recorded:
        run(lambda ids: None)
        return model, None
    with pk.KernelRecorder(model, optimizers, CE, data=(X, Y), **{"audit_every": 1, **options}) as recorder:
        run(recorder.announce)
    return model, recorder.trajectory


def complete(trajectory: pk.Trajectory, **options: Any) -> pk.Attributions:
    """The explanation, whose sum is what the network returns and whose rows are their samples'."""
    machine = pk.KernelMachine(trajectory, **options)
    why = machine.explain(QUERIES, outputs=0)
    assert why.relative_residual <= 1e-10
    assert why.split_error <= 1e-10
    assert why.samples_checked == 1.0
    assert set(why.channels) <= {"initial", "weight_decay", "rounding", "unexplained"}
    assert np.abs(why.channels.get("unexplained", np.zeros(1))).max() <= 1e-14  # Muon's own rounding
    with torch.no_grad():
        live = trajectory.model(QUERIES).numpy()
    np.testing.assert_allclose(machine.decision_function(QUERIES), live, atol=1e-10)
    return why
