"""Stores that are left open are closed when the process ends."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import nn

import pathkernel as pk
from pathkernel.storage import being_written
from pathkernel.storage.disk import DiskStore


def left_open(path: Path) -> None:
    """Put two steps into a store to which nothing refers afterwards."""
    model = nn.Linear(3, 2)
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(torch.randn(4, 3), torch.randn(4, 2))) as recorder:
        for ids in ([0, 1], [2, 3]):
            x, y = recorder.batch(ids)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    store = DiskStore(path)
    store.note_end(recorder.trajectory.end)
    store.begin(recorder.trajectory.run)
    for step in recorder.trajectory.steps():
        store.append(step)


def test_a_store_that_everybody_dropped_is_closed_at_the_end(tmp_path: Path) -> None:
    left_open(tmp_path / "run")
    gc.collect()
    (store,) = [store for store in being_written._AT_EXIT if Path(store.path) == tmp_path / "run"]  # type: ignore[attr-defined]
    being_written._AT_EXIT[store]()
    assert store not in being_written._AT_EXIT
    opened = DiskStore.open(tmp_path / "run")
    assert len(opened) == 2
    assert opened.end_values() is not None
