"""Trajectories on disk, and their equality to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Recording
from torch import Tensor

import pathkernel as pk
from pathkernel.storage.disk import DiskStore
from pathkernel.trajectory.frozen_state import FrozenOnReading


def same(one: Any, other: Any, where: str = "") -> None:
    """Fail unless two nested values agree in types, shapes and bits."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor), where
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        raw, again = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
        assert torch.equal(raw, again), where
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes(), where
    elif isinstance(one, FrozenOnReading):
        assert isinstance(other, FrozenOnReading), where
        same(one.state, other.state, f"{where}.state")
        same(dict(one), dict(other), f"{where} evaluated")
    elif is_dataclass(one) and not isinstance(one, type):
        assert type(one) is type(other), where
        for each in fields(one):
            same(getattr(one, each.name), getattr(other, each.name), f"{where}.{each.name}")
    elif isinstance(one, Mapping):
        assert isinstance(other, Mapping) and set(one) == set(other), where
        for key in one:
            same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, frozenset):
        assert one == other, where
    elif isinstance(one, (tuple, list)):
        assert type(one) is type(other) and len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{where}[{place}]")
    else:
        assert type(one) is type(other) and repr(one) == repr(other), f"{where}: {one!r} and {other!r}"


def same_trajectories(one: pk.Trajectory, other: pk.Trajectory) -> None:
    assert len(one) == len(other)
    for name in ("initial", "constants", "initial_memory", "tail", "final_buffers", "averages", "layout"):
        same(getattr(one, name), getattr(other, name), name)
    for index in range(len(one)):
        same(one.store.read(index), other.store.read(index), f"step {index}")
    for before, after in zip(range(len(one) - 1), range(1, len(one)), strict=True):
        shared = [t.store.read(before).after is t.store.read(after).before for t in (one, other)]
        assert shared[0] == shared[1], f"shared end of step {before}"
        kept = [t.store.read(before).buffers is t.store.read(after).buffers for t in (one, other)]
        assert kept[0] == kept[1], f"buffers of steps {before} and {after}"


def written(trajectory: pk.Trajectory, path: Path, **options: Any) -> DiskStore:
    """The same steps, put into a store on disk."""
    store = DiskStore(path, **options)
    store.note_end(trajectory.end)
    store.begin(replace(trajectory.run, optimizer=None))
    for step in trajectory.steps():
        store.append(step)
    store.close()
    return store


def opened(run: Recording | pk.Trajectory, path: Path, **options: Any) -> pk.Trajectory:
    trajectory = getattr(run, "trajectory", run)
    data = trajectory.data
    return pk.Trajectory.open(
        path,
        model=trajectory.model,
        loss=trajectory.loss,
        data=data.dataset or (data._inputs, data._targets),
        regularizers=trajectory.objective.regularizers,
        **options,
    )
