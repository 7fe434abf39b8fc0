"""The training runs that faults are put into, and their uninterrupted records to compare with."""

from __future__ import annotations

import copy
import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import ModelMismatchError
from pathkernel.storage.disk import DiskStore
from pathkernel.trajectory.frozen_state import FrozenOnReading

SAMPLES = 64
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


class Training:
    """A run with dropout and batch normalisation, of which the loop clamps a weight now and then."""

    loss = nn.CrossEntropyLoss()

    def __init__(self, optimizer: str = "momentum") -> None:
        self.name = optimizer
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4)
        )  # fmt: skip
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        self.X = torch.randn(SAMPLES, 8, generator=generator)
        self.y = torch.randint(4, (SAMPLES,), generator=generator)
        self.step = 0

    def checkpoint(self) -> dict[str, Any]:
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy({**states, "step": self.step, "generator": torch.get_rng_state()})

    def restore(self, checkpoint: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        self.step = checkpoint["step"]
        torch.set_rng_state(checkpoint["generator"])

    def recorder(self, store: Any = None, **options: Any) -> pk.KernelRecorder:
        return pk.KernelRecorder(
            self.model, self.optimizer, self.loss, data=(self.X, self.y), store=store, **{"audit_every": 0, **options}
        )

    def ids(self) -> Tensor:
        return torch.randint(SAMPLES, (8,), generator=torch.Generator().manual_seed(self.step))

    def train(self, recorder: pk.KernelRecorder, until: int) -> Iterator[int]:
        """Train on record; tells after each step how many were taken."""
        while self.step < until:
            x, y = recorder.batch(self.ids())
            self.take(x, y)
            if self.step % 7 == 0:
                with recorder.channel("clamp"), torch.no_grad():
                    self.model[0].weight.clamp_(-0.3, 0.3)
            self.step += 1
            yield self.step

    def take(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model(x), y).backward()
        self.optimizer.step()

    def recorded(self, store: Any, until: int, **options: Any) -> pk.Trajectory:
        """The trajectory of the whole run."""
        with self.recorder(store, **options) as recorder:
            for _ in self.train(recorder, until):
                pass
        return recorder.trajectory

    def opened(self, path: Path) -> pk.Trajectory:
        return pk.Trajectory.open(path, model=self.model, loss=self.loss, data=(self.X, self.y))


def bits(*values: Any) -> str:
    """Digest of all bits of nested values: types, shapes, numbers."""
    state = hashlib.blake2b(digest_size=12)
    _add(values, state)
    return state.hexdigest()


def _add(value: Any, state: Any) -> None:
    if isinstance(value, FrozenOnReading):
        value = value.state  # all else in it belongs to the step, and is in there once more
    if isinstance(value, (Tensor, np.ndarray)):
        array = value.detach().contiguous().numpy() if isinstance(value, Tensor) else value
        state.update(f"|{array.dtype}{array.shape}|".encode() + array.tobytes())
    elif is_dataclass(value):
        _add([getattr(value, each.name) for each in fields(value)], state)
    elif isinstance(value, Mapping):
        state.update(b"|mapping|")
        for key in sorted(value, key=repr):
            _add((key, value[key]), state)
    elif isinstance(value, (frozenset, set)):
        _add(sorted(value), state)
    elif isinstance(value, (list, tuple)):
        state.update(f"|{len(value)}|".encode())
        for each in value:
            _add(each, state)
    else:
        text = struct.pack(">d", value) if isinstance(value, float) else repr(value).encode()
        state.update(type(value).__name__.encode() + text)


@dataclass(frozen=True)
class Reference:
    """Digests of an uninterrupted run that was recorded in memory."""

    steps: list[str]
    ends: str
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, trajectory: pk.Trajectory) -> Reference:
        steps = [bits(step) for step in trajectory.steps()]
        weights = copy.deepcopy(trajectory.model.state_dict())
        return cls(steps, ends_of(trajectory), weights)

    def wrong(self, trajectory: pk.Trajectory) -> list[str]:
        """Which parts of a trajectory are not those of the run; fewer steps are not wrong."""
        found = [i for i in range(len(trajectory)) if bits(trajectory.store.read(i)) != self.steps[i]]
        names = [f"step {i}" for i in found]
        if len(trajectory) == len(self.steps) and ends_of(trajectory) != self.ends:
            names.append("start or end")
        return names


def ends_of(trajectory: pk.Trajectory) -> str:
    names = ("layout", "initial", "constants", "initial_memory", "tail", "final_buffers", "averages")
    return bits(*(getattr(trajectory, name) for name in names))


@cache
def reference(optimizer: str, steps: int) -> Reference:
    """The uninterrupted run."""
    return Reference.of(Training(optimizer).recorded(None, steps))


class Checkpoints:
    """A user's own checkpoints, one for each of some steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, training: Training) -> None:
        place = self.folder / f"{training.step}.pt"
        torch.save(training.checkpoint(), place.with_suffix(".partial"))
        os.replace(place.with_suffix(".partial"), place)

    def goes_on(self, optimizer: str, path: Path, **options: Any) -> tuple[Training, pk.KernelRecorder]:
        """Start recording from the last checkpoint whose place on the path is on disk, or else from the beginning."""
        committed = len(DiskStore.open(path)) if (path / "zarr.json").exists() else 0
        steps = sorted(int(place.stem) for place in self.folder.glob("*.pt"))
        for step in [*(s for s in reversed(steps) if s <= committed), 0]:
            training = Training(optimizer)
            if step:
                training.restore(torch.load(self.folder / f"{step}.pt"))
            elif committed and DiskStore.open(path).header.end is not None:  # type: ignore[union-attr]
                # As the refusal says: Ctrl-C came before any checkpoint, and closed the record. At one stroke, for it
                # may come again while files are deleted.
                path.rename(path.with_suffix(f".{time.monotonic_ns()}"))
            recorder = training.recorder(DiskStore(path, **options))
            try:
                recorder.start()
            except ModelMismatchError:  # the clamp after the last step on disk was not written yet
                continue
            return training, recorder
        raise AssertionError("a recording can go on from its beginning")
