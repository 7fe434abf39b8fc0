"""Many small networks trained at once, each on a subset of its own: one batched product where there would be a loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn, optim

import pathkernel as pk

HIDDEN, RATE, BATCH = 64, 3e-3, 50


def network(inputs: int, classes: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))


def recorded(X: Tensor, y: Tensor, classes: int, steps: int, seed: int) -> pk.Trajectory:
    """One run on record: AdamW, batches of 50 in random order."""
    model, loss = network(X.shape[1], classes, seed), nn.CrossEntropyLoss()
    optimizer = optim.AdamW(model.parameters(), lr=RATE)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for ids in batches(len(X), steps, seed):
            x, target = recorder.announce(ids)
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    return recorder.trajectory


def batches(n: int, steps: int, seed: int) -> list[Tensor]:
    """As many batches as there are steps, epoch by epoch."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    while len(found) < steps:
        found += torch.randperm(n, generator=generator).split(BATCH)
    return found[:steps]


def accuracies(
    X: Tensor, y: Tensor, subsets: Tensor, test: tuple[Tensor, Tensor], classes: int, steps: int, seed: int
) -> Tensor:
    """Test accuracy (R,) of R networks, trained from the same start in the same order, each on its own n samples.

    Parameters
    ----------
    X, y
        All training samples.
    subsets
        (R, n) ids of those that each network is trained on.
    test
        Samples and labels.
    classes, steps, seed
        How many classes, how many steps of AdamW, and the seed of weights and order.
    """
    runs, n = subsets.shape
    first, _, second = network(X.shape[1], classes, seed)
    W, b, V, c = (
        part.detach().expand(runs, *part.shape).clone().requires_grad_()
        for part in (first.weight.T, first.bias[None], second.weight.T, second.bias[None])
    )

    def outputs(x: Tensor) -> Tensor:
        return torch.bmm(torch.relu(torch.bmm(x, W) + b), V) + c

    optimizer = optim.AdamW([W, b, V, c], lr=RATE)
    for ids in batches(n, steps, seed):
        own = subsets[:, ids]
        z = outputs(X[own])
        # The sum over networks of each one's mean: no network's gradient knows of the others.
        loss = nn.functional.cross_entropy(z.flatten(0, 1), y[own].flatten(), reduction="sum") / len(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        z = outputs(test[0].expand(runs, *test[0].shape))
    return (z.argmax(dim=2) == test[1]).double().mean(dim=1)
