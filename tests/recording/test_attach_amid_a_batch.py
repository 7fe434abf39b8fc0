"""Optimizers that join between a batch and its pass leave what was said of the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk


@pytest.mark.parametrize("joins", ["a copy", "another"])
def test_what_the_network_is_given_is_kept_all_the_same(joins: str) -> None:
    torch.manual_seed(0)
    X, y = torch.randn(12, 4), torch.randint(3, (12,))
    model, loss = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    first = torch.optim.SGD(model[0].parameters() if joins == "another" else model.parameters(), lr=0.1)
    optimizers, dataset = [first], TensorDataset(X, y)
    with pk.KernelRecorder(model, first, loss, data=dataset, audit_every=1) as recorder:
        for turn, (x, target) in enumerate(recorder.track(DataLoader(dataset, 4, shuffle=True), keep=True)):
            if turn == 0:
                joined = copy.deepcopy(first) if joins == "a copy" else torch.optim.SGD(model[2].parameters(), lr=0.1)
                if joins == "a copy":
                    joined.param_groups[0]["params"] = list(model.parameters())
                optimizers = [joined] if joins == "a copy" else [first, joined]
                recorder.attach(joined)
            model.zero_grad()
            loss(model(x + torch.randn_like(x)), target).backward()  # nothing like it is in the data
            for one in optimizers:
                one.step()
    assert all(batch.inputs is not None for step in recorder.trajectory.steps() for batch in step.batches)
    assert pk.KernelMachine(recorder.trajectory).explain(X[:3]).relative_residual < 1e-5
