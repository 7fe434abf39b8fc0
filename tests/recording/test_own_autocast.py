"""Mixed precision that a framework put around a network's `forward`, with outputs that come out as float32 copies."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.gradients.own_autocast import own_autocast, without_autocast
from pathkernel.gradients.structural_copy import StructuralCopy

N = 24


class WithLoss(nn.Module):
    """A network that computes its own loss, of logits that nobody outside has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.body(x)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def prepared(model: WithLoss) -> WithLoss:
    """As Accelerate prepares a model: autocast around `forward`, and float32 copies of what it returns."""
    inside = torch.autocast("cpu", dtype=torch.bfloat16)(type(model).forward)

    def converted(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value if value is None else value.float() for name, value in inside(*args, **kwargs).items()}

    model.forward = types.MethodType(functools.wraps(inside)(converted), model)  # type: ignore[method-assign]
    return model


def samples() -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(N, 6, generator=numbers), torch.randint(3, (N,), generator=numbers)


def recorded(model: nn.Module, beside: bool = False) -> pk.Trajectory:
    X, y = samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"returns": "logits", "task": "classification", "audit_every": 1}
    with pk.KernelRecorder(model, optimizer, "returned", data=N, **options) as recorder:
        for ids in torch.arange(N).split(8):
            optimizer.zero_grad()
            recorder.announce(ids)
            returned = model(x=X[ids], labels=y[ids])
            loss = returned["loss"]
            if beside:  # a part of the loss from what was returned, another from what the network has itself
                loss = loss + 0.1 * returned["logits"].square().mean()
            loss.backward()
            optimizer.step()
    return recorder.trajectory


@pytest.mark.parametrize("beside", [False, True])
def test_slopes_of_what_was_copied_are_those_of_the_copies(beside: bool) -> None:
    model = prepared(WithLoss())
    trajectory = recorded(model, beside)
    X, y = samples()
    step = trajectory.store.read(0)
    with torch.no_grad():
        first = WithLoss().body(X[:8])
    expected = (first.softmax(1) - nn.functional.one_hot(y[:8], 3)) / 8
    if beside:
        expected += 0.2 * first / first.numel()
    assert step.batches[0].cotangents is not None
    assert abs(step.batches[0].cotangents - expected).max() < 2e-2 * abs(expected).max()
    assert step.batches[0].state.autocast == ("cpu", torch.bfloat16)
    why = pk.KernelMachine(trajectory).explain({"x": X[:4]})
    assert why.relative_residual < 1e-5
    assert why.split_error < 2e-2


def test_the_network_that_is_explained_computes_in_float32() -> None:
    model = prepared(WithLoss())
    trajectory = recorded(model)
    X, _ = samples()
    again = WithLoss()
    again.load_state_dict(model.state_dict())
    why = pk.KernelMachine(trajectory).explain({"x": X[:4]}, outputs=1)
    assert abs(why.output - again(X[:4])["logits"][:, 1].detach().numpy()).max() < 1e-6
    assert model(X[:4])["logits"][:, 1].dtype == torch.float32
    assert abs(why.output - model(X[:4])["logits"][:, 1].detach().numpy()).max() > 1e-5


def test_float32_copies_without_such_a_loss_leave_slopes_as_they_are() -> None:
    class Copies(WithLoss):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            logits = super().forward(x.bfloat16())["logits"].float()
            return {"logits": logits, "loss": None if labels is None else nn.functional.cross_entropy(logits, labels)}

    model = Copies().bfloat16()
    X, y = samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, "returned", data=N, returns="logits", audit_every=0) as recorder:
        recorder.announce(range(8))
        returned = model(X[:8], labels=y[:8])
        returned["logits"].retain_grad()
        returned["loss"].backward()
        optimizer.step()
    kept = recorder.trajectory.store.read(0).batches[0].cotangents
    assert kept is not None
    assert torch.equal(kept, returned["logits"].grad.to(kept))


def test_autocast_is_found_and_taken_off() -> None:
    model = prepared(WithLoss())
    assert own_autocast(model) == ("cpu", torch.bfloat16)
    assert without_autocast(model) == types.MethodType(WithLoss.forward, model)
    assert own_autocast(WithLoss()) is without_autocast(WithLoss()) is None
    mine = WithLoss()
    mine.forward = torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)(mine.forward)  # type: ignore[method-assign]
    assert own_autocast(mine) is None
    copied = StructuralCopy(model).module
    assert copied.forward.__self__ is copied
    assert own_autocast(copied) is None


def test_autocast_that_a_class_was_written_with_is_its_own() -> None:
    class Mixed(WithLoss):
        @torch.autocast("cpu", dtype=torch.bfloat16)
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    assert own_autocast(Mixed()) is None
    assert StructuralCopy(Mixed()).module.forward.__func__ is Mixed.forward


def test_datasets_that_make_batches_are_asked_for_batches() -> None:
    asked = []

    class Batches(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return N

        def __getitems__(self, indices: list[int]) -> list[Tensor]:
            asked.append(list(indices))
            return [torch.tensor(float(i)) for i in indices]

        def __getitem__(self, index: int) -> Tensor:
            raise AssertionError("it was asked for one")

    loader = torch.utils.data.DataLoader(Batches(), batch_size=10)
    found = [(batch.ids.tolist(), batch.batch.tolist()) for batch in pk.indexed(loader)]
    assert asked == [ids for ids, _ in found] == [list(range(10)), list(range(10, 20)), list(range(20, N))]
    assert all(ids == items for ids, items in found)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """Distributed training of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_inside_the_wrapper_of_distributed_training(one_process: None) -> None:
    trajectory = recorded(nn.parallel.DistributedDataParallel(prepared(WithLoss())))
    assert trajectory.store.read(0).batches[0].state.autocast == ("cpu", torch.bfloat16)
    assert pk.KernelMachine(trajectory).explain({"x": samples()[0][:4]}).relative_residual < 1e-5
