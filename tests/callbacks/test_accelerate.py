"""Loops written with accelerate: recorded by `KernelRecorder` and `track`, on what `prepare` returned or took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk

accelerate = pytest.importorskip("accelerate")

from accelerate import Accelerator, skip_first_batches  # noqa: E402
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, prepare_data_loader  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import DataLoaderConfiguration, set_seed  # noqa: E402

pytestmark = pytest.mark.frameworks

EXACT = 1e-5
ROUNDED = 2e-2  # some roundings of bfloat16, which has 8 bits
N = 28
_generator = torch.Generator().manual_seed(0)
X = torch.randn(N, 4, generator=_generator)
Y = (X[:, 0] * X[:, 1] > 0).long() + (X[:, 2] > 0.4).long()
DATA = TensorDataset(X, Y)
CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """accelerate keeps what it is set to in the process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def reset() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Run:
    """A loop as accelerate documents it: accumulation, clipping, a schedule."""

    def __init__(self, epochs: int = 2, clip: float = 0.3, raw: bool = False, momentum: float = 0.0, **options: Any):
        reset()
        set_seed(0)
        self.epochs, self.clip = epochs, clip
        self.accelerator = Accelerator(cpu=True, **{"gradient_accumulation_steps": 2, **options})
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        if momentum:
            optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
        loader = DataLoader(DATA, batch_size=6, shuffle=True)
        prepared = self.accelerator.prepare(model, optimizer, loader, schedule)
        self.model, self.optimizer, self.loader, self.schedule = prepared
        self.given = (model, optimizer, self.loader) if raw else (self.model, self.optimizer, self.loader)

    def __call__(self, batches: Any) -> None:
        for x, y in batches:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(CE(self.model(x), y))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()

    def plain(self) -> Run:
        for _ in range(self.epochs):
            self(self.loader)
        return self

    def recorded(self, **options: Any) -> pk.Trajectory:
        model, optimizer, loader = self.given
        with pk.KernelRecorder(model, optimizer, CE, data=DATA, **{"audit_every": 1, **options}) as recorder:
            for _ in range(self.epochs):
                self(recorder.track(loader))
        return recorder.trajectory

    def end(self) -> tuple[list[Any], Any]:
        return [p.tolist() for p in self.model.parameters()], torch.get_rng_state().tolist()


def assert_explained(trajectory: pk.Trajectory, model: nn.Module, exact: float = EXACT) -> Any:
    machine = pk.KernelMachine(trajectory)
    why = machine.explain(X[:3])
    assert why.relative_residual <= exact
    with torch.no_grad():
        expected = model(X).float()
    assert abs(machine(X) - expected.numpy()).max() <= exact * expected.abs().max().item()
    return why


LOADERS = {
    "shards": {},
    "dispatched": {"dataloader_config": DataLoaderConfiguration(dispatch_batches=True)},
    "seeded": {"dataloader_config": DataLoaderConfiguration(use_seedable_sampler=True)},
    "split": {"dataloader_config": DataLoaderConfiguration(split_batches=True, dispatch_batches=True)},
}


@pytest.mark.parametrize("raw", [False, True], ids=["prepared", "raw"])
@pytest.mark.parametrize("loaders", LOADERS)
def test_a_loop_with_accumulation_clipping_and_a_schedule(loaders: str, raw: bool) -> None:
    run = Run(raw=raw, **LOADERS[loaders])
    assert type(run.loader) is (DataLoaderDispatcher if loaders in ("dispatched", "split") else DataLoaderShard)
    trajectory = run.recorded()
    why = assert_explained(trajectory, run.model)
    assert why.split_error <= EXACT
    # Five batches of an epoch; the last one alone, since accelerate does not accumulate over the end of a loader.
    assert [len(step.batches) for step in trajectory.steps()] == [2, 2, 1] * 2
    assert [len(each.ids) for step in trajectory.steps() for each in step.batches] == [6, 6, 6, 6, 4] * 2
    assert (why.shares != 0).all()
    assert run.end() == Run(raw=raw, **LOADERS[loaders]).plain().end()


def test_ids_are_those_of_the_samples() -> None:
    run, seen = Run(gradient_accumulation_steps=1), []
    with pk.KernelRecorder(run.model, run.optimizer, CE, data=DATA) as recorder:
        for _ in range(2):
            for batch in recorder.track(run.loader):
                seen.append(batch[0])
                run([batch])
    ids = [each.ids for step in recorder.trajectory.steps() for each in step.batches]
    assert all(torch.equal(X[each], x) for each, x in zip(ids, seen, strict=True))
    assert sorted(torch.cat(ids[:5]).tolist()) == list(range(N))
    assert not torch.equal(torch.cat(ids[:5]), torch.cat(ids[5:]))  # another order in the second epoch


def test_even_batches_repeat_samples_under_their_own_ids() -> None:
    """What each of two processes is given, here one after the other; the last batch is filled up from the first."""
    for process in (0, 1):
        loader = prepare_data_loader(
            DataLoader(DATA, batch_size=8),
            num_processes=2,
            process_index=process,
            put_on_device=False,
            even_batches=True,
        )
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pk.KernelRecorder(model, optimizer, CE, data=DATA, audit_every=1) as recorder:
            for x, y in recorder.track(loader):
                CE(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        ids = [step.batches[0].ids.tolist() for step in recorder.trajectory.steps()]
        last = [*range(24, 28), *range(4)] if process else [*range(16, 24)]
        assert ids == [[*range(8 * process, 8 * process + 8)], last]
        assert_explained(recorder.trajectory, model)


def test_workers_that_persist() -> None:
    run = Run(epochs=2)
    loader = DataLoader(DATA, batch_size=6, shuffle=True, num_workers=1, persistent_workers=True)
    run.given = (run.model, run.optimizer, run.accelerator.prepare(loader))
    assert_explained(run.recorded(), run.model)


@pytest.mark.parametrize("raw", [False, True], ids=["prepared", "raw"])
def test_bfloat16(raw: bool) -> None:
    run = Run(raw=raw, momentum=0.5, mixed_precision="bf16")
    trajectory = run.recorded()
    states = {each.state.autocast for step in trajectory.steps() for each in step.batches}
    assert states == {("cpu", torch.bfloat16)}
    machine = pk.KernelMachine(trajectory)
    why = machine.explain(X[:3])
    assert why.relative_residual <= EXACT
    assert why.split_error <= ROUNDED
    with torch.no_grad():
        rounded, exact = run.model(X), type(run.model).forward(run.model, X)
    # The machine is the network in float32, after the steps that mixed precision took.
    assert abs(machine(X) - exact.numpy()).max() <= EXACT * exact.abs().max().item()
    assert abs(machine(X) - rounded.numpy()).max() <= ROUNDED * exact.abs().max().item()
    assert run.end() == Run(raw=raw, momentum=0.5, mixed_precision="bf16").plain().end()


def test_saved_and_loaded_states(tmp_path: Path) -> None:
    straight = Run(epochs=4, momentum=0.5, gradient_accumulation_steps=1)
    whole = straight.recorded()
    run = Run(epochs=2, momentum=0.5, gradient_accumulation_steps=1)
    run.recorded(store=tmp_path / "run")
    run.accelerator.save_state(str(tmp_path / "saved"))
    other = Run(epochs=2, momentum=0.5, gradient_accumulation_steps=1)
    other.accelerator.load_state(str(tmp_path / "saved"))
    on = other.recorded(store=tmp_path / "run")
    assert len(on) == len(whole) == 20
    assert other.end() == straight.end()
    why, expected = assert_explained(on, other.model), assert_explained(whole, straight.model)
    assert abs(why.shares - expected.shares).max() <= 1e-6


def test_training_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """`skip_first_batches` makes another loader, with the places of the samples that are left."""
    run = Run(epochs=1, gradient_accumulation_steps=1)
    rest = skip_first_batches(run.accelerator.prepare(DataLoader(DATA, batch_size=6)), 3)
    with pk.KernelRecorder(run.model, run.optimizer, CE, data=DATA) as recorder:
        run(recorder.track(rest))
    ids = [step.batches[0].ids.tolist() for step in recorder.trajectory.steps()]
    assert ids == [[*range(18, 24)], [*range(24, 28)]]


def test_states_loaded_while_it_is_recorded_are_a_channel(tmp_path: Path) -> None:
    run = Run(gradient_accumulation_steps=1, momentum=0.5)
    run.accelerator.save_state(str(tmp_path))
    with pk.KernelRecorder(run.model, run.optimizer, CE, data=DATA) as recorder:
        run(recorder.track(run.loader))
        run.accelerator.load_state(str(tmp_path))
        run(recorder.track(run.loader))
    why = pk.KernelMachine(recorder.trajectory).explain(X[:3])
    assert why.relative_residual <= EXACT and abs(why.channels["loaded"]).max() > 0


def test_several_optimizers() -> None:
    reset()
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2].parameters(), lr=0.01)]
    model, one, other, loader = accelerator.prepare(model, *optimizers, DataLoader(DATA, batch_size=7))
    with pk.KernelRecorder(model, [one, other], CE, data=DATA) as recorder:
        for x, y in recorder.track(loader):
            accelerator.backward(CE(model(x), y))
            for optimizer in (one, other):
                optimizer.step()
                optimizer.zero_grad()
    assert len(recorder.trajectory) == 4
    assert_explained(recorder.trajectory, model)


def test_a_loader_that_was_indexed_before_it_was_prepared() -> None:
    run = Run(gradient_accumulation_steps=1)
    loader = run.accelerator.prepare(pk.indexed(DataLoader(DATA, batch_size=6)))
    with pk.KernelRecorder(run.model, run.optimizer, CE, data=DATA) as recorder:
        for batch in loader:
            run([recorder.take_ids(batch)])
    assert len(recorder.trajectory) == 5
    assert_explained(recorder.trajectory, run.model)
