"""Two threads ask one object at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pathkernel as pk

THREADS, INTERVAL = 2, 1e-5


def recorded() -> tuple[nn.Module, pk.Trajectory, Tensor]:
    torch.manual_seed(0)
    X = torch.randn(60, 4)
    y = (X[:, 0] > 0).long()
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer, loss = torch.optim.AdamW(net.parameters(), lr=1e-2), nn.CrossEntropyLoss()
    with pk.KernelRecorder(net, optimizer, loss, data=(X, y)) as recorder:
        for _ in range(3):
            for x, target in recorder.batches(batch_size=20):
                optimizer.zero_grad()
                loss(net(x), target).backward()
                optimizer.step()
    return net, recorder.trajectory, X


def asked(quantity: str, net: nn.Module, trajectory: pk.Trajectory, X: Tensor) -> Callable[[], np.ndarray]:
    if quantity == "kernel":
        kernel = pk.TangentKernel(net)
        return lambda: kernel(X)
    if quantity == "path kernel":
        path_kernel = pk.PathKernel(trajectory)
        return lambda: path_kernel(X[:20])
    machine = pk.KernelMachine(trajectory)
    return lambda: np.concatenate([machine.decision_function(X), machine.explain(X[:3], outputs=0).shares.T])


def at_once(ask: Callable[[], np.ndarray], calls: int) -> tuple[list[np.ndarray], list[str]]:
    """What the calls of every thread returned, and what they raised."""
    answers: list[np.ndarray] = []
    raised: list[str] = []

    def work() -> None:
        for _ in range(calls):
            try:
                answers.append(ask())
            except Exception as error:
                raised.append(f"{type(error).__name__}: {error}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(INTERVAL)
    workers = [threading.Thread(target=work) for _ in range(THREADS)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    return answers, raised


def state_of(net: nn.Module) -> list[Any]:
    """Parameters and buffers: which objects, and which values."""
    return [(id(value), value.detach().clone()) for value in (*net.parameters(), *net.buffers())]


def threaded(quantity: str, calls: int) -> tuple[int, bool, str | None]:
    """Wrong answers, whether the network changed, and the first error, of two threads with so many calls each."""
    net, trajectory, X = recorded()
    ask = asked(quantity, net, trajectory, X)
    right, before = ask(), state_of(net)
    answers, raised = at_once(ask, calls)
    after = state_of(net)
    changed = any(one != two or not torch.equal(a, b) for (one, a), (two, b) in zip(before, after, strict=True))
    wrong = sum(bool(abs(answer - right).max() > 1e-6 * abs(right).max()) for answer in answers)
    return wrong, changed, raised[0] if raised else None
