"""A small classifier recorded to disk, as commands take it: a store, the data, and the file that makes the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import pathkernel as pk

MODEL = "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))\n"


def samples(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(n, 4) and labels of 3 classes."""
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def recorded_on_disk(folder: Path, X: Tensor, y: Tensor, batch_size: int, epochs: int = 1) -> pk.Trajectory:
    """``folder/store``, ``train.npz`` and ``train.py:make``; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-2), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), store=folder / "store") as recorder:
        for _ in range(epochs):
            for x, target in recorder.batches(batch_size=batch_size):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    np.savez(folder / "train.npz", X=X.numpy(), y=y.numpy())
    (folder / "train.py").write_text(MODEL)
    return recorder.trajectory
