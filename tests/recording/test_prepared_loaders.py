"""Loaders and networks that accelerate and Fabric have wrapped, by stand-ins: ids are found in what they go through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import pathkernel as pk
from pathkernel.errors import SampleIdError

N = 20
torch.manual_seed(0)
X, Y = torch.randn(N, 4), torch.randint(3, (N,))
DATA = TensorDataset(X, Y)
CE = nn.CrossEntropyLoss()


class Ahead:
    """Goes through its DataLoader one batch ahead, as accelerate does, and counts its epochs."""

    __module__ = "accelerate.data_loader"

    def __init__(self, loader: DataLoader) -> None:
        self.base_dataloader, self.iteration, self.end_of_dataloader = loader, 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["base_dataloader"], name)

    def __len__(self) -> int:
        return len(self.base_dataloader)

    @property
    def __class__(self) -> type:
        return DataLoader

    def __iter__(self) -> Iterator[Any]:
        self.end_of_dataloader = False
        batches = iter(self.base_dataloader)
        current = next(batches)
        for following in batches:
            yield current
            current = following
        self.end_of_dataloader = True
        yield current
        self.iteration += 1


class Moves:
    """Hands on what its DataLoader gives, as Fabric does."""

    __module__ = "lightning.fabric.wrappers"

    def __init__(self, loader: DataLoader) -> None:
        vars(self).update(vars(loader))
        self._dataloader = loader

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self) -> Iterator[Any]:
        yield from self._dataloader


def ids_of(loader: Any, data: Any = DATA) -> tuple[list[list[int]], list[Any]]:
    """The ids of the batches, and the batches."""
    model = nn.Linear(4, 3)
    recorder = pk.KernelRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), CE, data)
    batches = []
    with recorder:
        for batch in recorder.track(loader):
            batches.append(batch)
            CE(model(batch[0]), batch[1]).backward()
            recorder.optimizer.step()
            recorder.optimizer.zero_grad()
    return [step.batches[0].ids.tolist() for step in recorder.trajectory.steps()], batches


@pytest.mark.parametrize("prepared", [Ahead, Moves])
def test_ids_are_found_in_the_loader_inside(prepared: type) -> None:
    torch.manual_seed(1)
    own = prepared(DataLoader(DATA, batch_size=6, shuffle=True))
    ids, batches = ids_of(own)
    assert [len(each) for each in ids] == [6, 6, 6, 2]
    assert sorted(i for each in ids for i in each) == list(range(N))
    for each, batch in zip(ids, batches, strict=True):
        assert type(batch) is list
        assert torch.equal(batch[0], X[each]) and torch.equal(batch[1], Y[each])


@pytest.mark.parametrize("prepared", [Ahead, Moves])
def test_the_users_loader_is_gone_through_and_left_as_it_was(prepared: type) -> None:
    inner = DataLoader(DATA, batch_size=6)
    own = prepared(inner)
    torch.manual_seed(2)
    ids_of(own)
    held = own.base_dataloader if prepared is Ahead else own._dataloader
    assert held is inner and inner.dataset is DATA
    assert all(isinstance(batch, list) for batch in own)
    if prepared is Ahead:
        assert own.iteration == 2 and own.end_of_dataloader


@pytest.mark.parametrize("prepared", [Ahead, Moves])
def test_an_early_break_puts_the_loader_back(prepared: type) -> None:
    inner = DataLoader(DATA, batch_size=6)
    own = prepared(inner)
    model = nn.Linear(4, 3)
    with pk.KernelRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), CE, DATA) as recorder:
        for x, y in recorder.track(own):
            CE(model(x), y).backward()
            recorder.optimizer.step()
            break
    assert (own.base_dataloader if prepared is Ahead else own._dataloader) is inner


@pytest.mark.parametrize("prepared", [Ahead, Moves])
def test_a_subset_and_persistent_workers(prepared: type) -> None:
    part = Subset(DATA, [7, 3, 11, 2])
    own = prepared(DataLoader(part, batch_size=2))
    assert ids_of(own)[0] == [[7, 3], [11, 2]]
    own = prepared(DataLoader(part, batch_size=2, num_workers=1, persistent_workers=True))
    assert ids_of(own)[0] == [[7, 3], [11, 2]]


@pytest.mark.parametrize("prepared", [Ahead, Moves])
def test_a_loader_that_was_indexed_before_it_was_prepared(prepared: type) -> None:
    own = prepared(pk.indexed(DataLoader(DATA, batch_size=6)))
    assert ids_of(own)[0][1] == [6, 7, 8, 9, 10, 11]


class Stream(IterableDataset):
    """Samples without places."""

    def __iter__(self) -> Iterator[Any]:
        return zip(X, Y, strict=True)


@pytest.mark.parametrize("prepared", [Ahead, Moves])
def test_a_stream_is_counted_and_what_does_not_batch_is_refused(prepared: type) -> None:
    assert ids_of(prepared(DataLoader(Stream(), batch_size=10)), data=None)[0] == [list(range(10)), list(range(10, 20))]
    with pytest.raises(SampleIdError, match="batch_size=None"):
        ids_of(prepared(DataLoader(DATA, batch_size=None)))


class Wrapper(nn.Module):
    """Calls a module in bfloat16 and returns float32, as Fabric's wrapper does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module, self._original_module = module, module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self._forward_module(x).float()


def autocast_around(module: nn.Module) -> nn.Module:
    """The module with a decorated ``forward``, as accelerate prepares it."""
    module.forward = torch.autocast("cpu", dtype=torch.bfloat16)(module.forward)
    return module


@pytest.mark.parametrize("prepared", [Wrapper, autocast_around])
def test_mixed_precision_inside_the_networks_own_call_is_on_record(prepared: Any) -> None:
    torch.manual_seed(0)
    inside = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    model = prepared(inside)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pk.KernelRecorder(model, optimizer, CE, DATA, audit_every=1) as recorder:
        for x, y in recorder.track(DataLoader(DATA, batch_size=5)):
            CE(model(x).float(), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert recorder.model is inside
    assert {step.batches[0].state.autocast for step in recorder.trajectory.steps()} == {("cpu", torch.bfloat16)}
    machine = pk.KernelMachine(recorder.trajectory)
    why = machine.explain(X[:3])
    assert why.relative_residual <= 1e-5 and why.split_error <= 1e-2
    assert abs(machine(X) - model(X).detach().float().numpy()).max() <= 1e-2
