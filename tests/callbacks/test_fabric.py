"""Loops written with Lightning Fabric: recorded by `KernelRecorder` and `track`, on what it set up or took."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk

pytest.importorskip("lightning")

from lightning.fabric import Fabric

pytestmark = pytest.mark.frameworks

EXACT = 1e-5
ROUNDED = 2e-2  # some roundings of bfloat16, which has 8 bits
N = 28
_generator = torch.Generator().manual_seed(0)
X = torch.randn(N, 4, generator=_generator)
Y = (X[:, 0] * X[:, 1] > 0).long() + (X[:, 2] > 0.4).long()
DATA = TensorDataset(X, Y)
CE = nn.CrossEntropyLoss()


class Run:
    """A loop as Fabric documents it: accumulation, clipping."""

    def __init__(
        self, precision: str = "32-true", given: str = "set up", momentum: float = 0.0, **loading: Any
    ) -> None:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few workers
            self.fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
            module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
            if momentum:
                inner: Any = torch.optim.SGD(module.parameters(), lr=0.3, momentum=momentum)
            else:
                inner = torch.optim.AdamW(module.parameters(), lr=1e-2)
            loader = DataLoader(DATA, batch_size=6, shuffle=True, **loading)
            self.model, self.optimizer = self.fabric.setup(module, inner)
            self.loader = self.fabric.setup_dataloaders(loader)
        self.given = {
            "set up": (self.model, self.optimizer, self.loader),
            "raw": (module, inner, self.loader),
            "raw loader": (self.model, inner, loader),
        }[given]

    def __call__(self, batches: Any) -> None:
        for place, (x, y) in enumerate(batches):
            last = place % 2 == 1 or place == 4
            with self.fabric.no_backward_sync(self.model, enabled=not last):
                self.fabric.backward(CE(self.model(x), y) / 2)
            if last:
                self.fabric.clip_gradients(self.model, self.optimizer, max_norm=0.3)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def plain(self, epochs: int = 2) -> Run:
        for _ in range(epochs):
            self(self.loader)
        return self

    def recorded(self, epochs: int = 2, **options: Any) -> pk.Trajectory:
        model, optimizer, loader = self.given
        with pk.KernelRecorder(model, optimizer, CE, data=DATA, **{"audit_every": 1, **options}) as recorder:
            for _ in range(epochs):
                self(recorder.track(loader))
        return recorder.trajectory

    def end(self) -> tuple[list[Any], Any]:
        return [p.tolist() for p in self.model.parameters()], torch.get_rng_state().tolist()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        yield


def assert_explained(trajectory: pk.Trajectory, model: Any) -> Any:
    machine = pk.KernelMachine(trajectory)
    why = machine.explain(X[:3])
    assert why.relative_residual <= EXACT
    with torch.no_grad():
        expected = model(X)
    assert abs(machine(X) - expected.numpy()).max() <= EXACT * expected.abs().max().item()
    return why


@pytest.mark.parametrize("given", ["set up", "raw", "raw loader"])
def test_a_loop_with_accumulation_and_clipping(given: str) -> None:
    run = Run(given=given)
    trajectory = run.recorded()
    why = assert_explained(trajectory, run.model)
    assert why.split_error <= EXACT
    assert [len(step.batches) for step in trajectory.steps()] == [2, 2, 1] * 2
    assert (why.shares != 0).all()
    assert run.end() == Run().plain().end()


def test_ids_are_those_of_the_samples() -> None:
    run, seen = Run(), []
    with pk.KernelRecorder(run.model, run.optimizer, CE, data=DATA) as recorder:
        for _ in range(2):
            run(seen.append(batch[0]) or batch for batch in recorder.track(run.loader))
    ids = [each.ids for step in recorder.trajectory.steps() for each in step.batches]
    assert all(torch.equal(X[each], x) for each, x in zip(ids, seen, strict=True))
    assert sorted(torch.cat(ids[:5]).tolist()) == list(range(N))


def test_workers() -> None:
    run = Run(num_workers=1, persistent_workers=True)
    assert_explained(run.recorded(), run.model)


@pytest.mark.parametrize("given", ["set up", "raw"])
def test_bfloat16_mixed(given: str) -> None:
    run = Run("bf16-mixed", given, momentum=0.5)
    trajectory = run.recorded()
    states = {each.state.autocast for step in trajectory.steps() for each in step.batches}
    assert states == {("cpu", torch.bfloat16)}
    # The machine is the network in float32, after the steps that mixed precision took.
    why = assert_explained(trajectory, run.model.module)
    assert why.split_error <= ROUNDED
    with torch.no_grad():
        rounded = run.model(X)
    assert abs(pk.KernelMachine(trajectory)(X) - rounded.numpy()).max() <= ROUNDED * rounded.abs().max().item()
    assert run.end() == Run("bf16-mixed", momentum=0.5).plain().end()


def test_a_checkpoint(tmp_path: Path) -> None:
    whole = Run(momentum=0.5)
    expected = whole.recorded(epochs=4)
    first = Run(momentum=0.5)
    first.recorded(store=tmp_path / "run")
    generator = torch.get_rng_state()
    first.fabric.save(tmp_path / "saved.ckpt", {"model": first.model, "optimizer": first.optimizer})
    other = Run(momentum=0.5)
    other.fabric.load(tmp_path / "saved.ckpt", {"model": other.model, "optimizer": other.optimizer})
    torch.set_rng_state(generator)
    on = other.recorded(store=tmp_path / "run")
    assert len(on) == len(expected) == 12 and other.end() == whole.end()
    why = assert_explained(on, other.model)
    assert abs(why.shares - pk.KernelMachine(expected).explain(X[:3]).shares).max() <= 1e-6


def test_a_loader_that_was_indexed_before_it_was_set_up() -> None:
    run = Run()
    loader = run.fabric.setup_dataloaders(pk.indexed(DataLoader(DATA, batch_size=6)))
    with pk.KernelRecorder(run.model, run.optimizer, CE, data=DATA) as recorder:
        run(recorder.take_ids(batch) for batch in loader)
    assert [step.batches[0].ids[0].item() for step in recorder.trajectory.steps()] == [0, 12, 24]
    assert_explained(recorder.trajectory, run.model)


def test_an_error_leaves_the_loader_as_it_was() -> None:
    run = Run()
    held = run.loader._dataloader
    with contextlib.suppress(ZeroDivisionError), pk.KernelRecorder(run.model, run.optimizer, CE, data=DATA) as recorder:
        for _ in recorder.track(run.loader):
            raise ZeroDivisionError
    assert run.loader._dataloader is held and isinstance(next(iter(run.loader)), list)
