"""Contract of stores, checked: what was put in comes back to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pathkernel.errors import PathKernelError
from pathkernel.recording.recorder import KernelRecorder
from pathkernel.trajectory.run import Extension
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.store import Store
from pathkernel.trajectory.trajectory import Trajectory


class StoreContractError(PathKernelError, AssertionError):
    """A store does not keep its contract."""


def check_store(make_store: Callable[[], Store], *, steps: int = 11, seed: int = 0) -> None:
    """Check that a store gives back what was put into it, to the last bit.

    A small network with batch normalisation is trained in memory. Its steps are put into the store, and

    1. ``len`` counts them at once, and each can be read right after it was appended, and all of them again;
    2. vectors, ranges of them, batches, settings, frozen tensors and buffers come back with the same bits;
    3. where a step ends with the tensor that the next begins with, it does so again; buffers that have not changed are
       the same mapping again;
    4. `flush` and `close` lose nothing, and the steps stay readable;
    5. `extend` lengthens every vector, points by the given values and gradients by zeros.

    Parameters
    ----------
    make_store
        Makes an empty store.
    steps
        Steps to train.
    seed
        Of network and samples.

    Raises
    ------
    StoreContractError
        An `AssertionError` that says what came back otherwise, and at which step.

    Examples
    --------
    >>> from pathkernel.trajectory.memory import MemoryStore
    >>> check_store(MemoryStore)
    """
    trajectory = _small_run(steps, seed)
    expected, store = list(trajectory.steps()), make_store()
    store.note_end(trajectory.end)
    store.begin(trajectory.run)
    for step in expected:
        store.append(step)
        _require(len(store) == step.index + 1, f"`len` is {len(store)} after {step.index + 1} steps")
        _compare(step, store.read(step.index), "right after it was appended")
    store.flush()
    _compare_all(expected, store, "after `flush`")
    ranges = [slice(0, 3), slice(2, trajectory.layout.size)]
    for step in expected:
        _require(torch.equal(store.vector(step.index), step.before), f"`vector({step.index})` differs")
        pieces = store.columns(step.index, ranges)
        _require(
            all(torch.equal(piece, step.before[where]) for piece, where in zip(pieces, ranges, strict=True)),
            f"`columns` of step {step.index} differ",
        )
    pad = Extension(trajectory.run, {"late": torch.tensor([1.0, -2.0], dtype=trajectory.dtype)})
    store.extend(pad.tail, pad)
    longer = [_longer(step, pad.tail) for step in expected]
    _compare_all(longer, store, "after `extend`")
    store.close()
    _compare_all(longer, store, "after `close`")


def _small_run(steps: int, seed: int) -> Trajectory:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Linear(3, 4)
        model = nn.Sequential(first, nn.BatchNorm1d(4), nn.Linear(4, 2))
        X, y = torch.randn(12, 3), torch.randn(12, 2)
        optimizer, loss = torch.optim.Adam(model.parameters(), lr=0.01), nn.MSELoss()
        with KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=0) as recorder:
            for s in range(steps):
                model.train(s < steps // 2)
                x, target = recorder.announce([s % 12, (5 * s + 1) % 12], weights=None, inputs=X[[s % 12, 2]] + 1)
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
                if s % 3 == 2:
                    with torch.no_grad(), recorder.channel("clamp"):
                        first.weight.clamp_(-0.3, 0.3)
    return recorder.trajectory


def _longer(step: Step, tail: Tensor) -> Step:
    def pad(vector: Tensor) -> Tensor:
        return torch.cat([vector, tail])

    return replace(
        step,
        before=pad(step.before),
        after=pad(step.after),
        gradient=torch.cat([step.gradient, torch.zeros_like(tail)]),
        changes=tuple((name, pad(point)) for name, point in step.changes),
    )


def _compare_all(expected: list[Step], store: Store, when: str) -> None:
    read = [store.read(0)]
    _compare(expected[0], read[0], when)
    for index in range(1, len(expected)):
        before, now = store.read(index - 1), store.read(index)
        _compare(expected[index], now, when)
        shared = not expected[index].changes
        _require(
            not shared or before.after is now.before,
            f"{when}, the end of step {index - 1} is not the very tensor that step {index} begins with",
        )
        kept = expected[index - 1].buffers is expected[index].buffers
        _require(
            not kept or before.buffers is now.buffers,
            f"{when}, the buffers of steps {index - 1} and {index} are not the same mapping",
        )


def _compare(expected: Step, found: Step, when: str) -> None:
    for field_ in fields(Step):
        one, other = getattr(expected, field_.name), getattr(found, field_.name)
        _require(
            _equal_bits(one, other), f"{when}, `{field_.name}` of step {expected.index} is not what was put into it"
        )


def _equal_bits(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        alike = isinstance(other, Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and set(one) == set(other) and all(_equal_bits(one[k], other[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_equal_bits, one, other))
    if is_dataclass(one):
        return type(one) is type(other) and all(
            _equal_bits(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)
        )
    return type(one) is type(other) and repr(one) == repr(other)


def _require(holds: bool, found: str) -> None:
    if not holds:
        raise StoreContractError(
            found[0].upper() + found[1:],
            "A store gives back what was put into it, to the last bit",
            "Compare with `pathkernel.trajectory.memory.MemoryStore`, which keeps the contract in its plainest form",
        )
