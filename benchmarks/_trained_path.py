"""The path of a small network that is trained on all samples, as several benchmarks of path kernels need it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import pathkernel as pk


def trained(X: np.ndarray, y: np.ndarray, epochs: int, hidden: int, seed: int = 0) -> pk.Trajectory:
    """Path of a multilayer perceptron of one hidden layer and ten outputs, of which the weights are kept."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(X.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, 10)).double()
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=3e-3), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), schedule=pk.WeightsOnly()) as recorder:
        for _ in range(epochs):
            for inputs, targets in recorder.batches(64, shuffle=True):
                optimizer.zero_grad()
                loss(model(inputs), targets).backward()
                optimizer.step()
    return recorder.trajectory
