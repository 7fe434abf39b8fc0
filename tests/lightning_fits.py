"""Fits by Lightning that the tests of its callback share, and what is asked of their records."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

L = pytest.importorskip("lightning")

from pathkernel.callbacks.lightning import LightningRecorder  # noqa: E402

RESIDUAL = 1e-5
"""What rounding in float32 may leave, relative to the largest output: networks, losses and steps are of size one."""

N = 21


def samples(n: int = N, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.randint(2, (n,), generator=generator)


X, Y = samples()
DATA = TensorDataset(X, Y)


class Classifier(L.LightningModule):
    """A module without ``forward``: its only part is called."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class WithForward(Classifier):
    """A module that is called itself, and validates."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", F.cross_entropy(self(batch[0]), batch[1]))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def a_loader(data: Any = DATA, **options: Any) -> DataLoader:
    return DataLoader(data, **{"batch_size": 5, "shuffle": True, **options})


def a_trainer(*callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 2}
    return L.Trainer(callbacks=[one for one in callbacks if one is not None], **{**quiet, **options})


Fit = Callable[[LightningRecorder | None], nn.Module]
"""A program: trains a module with the callback, or without it, and returns it."""


def both(fit: Fit, make: Callable[[], LightningRecorder] | None = None) -> tuple[nn.Module, LightningRecorder]:
    """Run a program without the callback and with it: weights, buffers and generators end with the same bits."""
    callback = (make or (lambda: LightningRecorder(task="classification")))()
    ends = []
    for one in (None, callback):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        module = fit(one)
        ends.append((module.state_dict(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1]))
    (plain, *generators), (recorded, *after) = ends
    assert plain.keys() == recorded.keys()
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    assert torch.equal(generators[0], after[0])
    assert generators[1] == after[1]
    assert np.array_equal(generators[2], after[2])
    return module, callback


def is_the_network(
    callback: LightningRecorder, network: nn.Module, queries: Any = X[:3], tolerance: float = RESIDUAL, **asked: Any
) -> None:
    """The machine says what the network says, and its parts add up to it."""
    machine = callback.machine
    why = machine.explain(queries, **asked)
    scale = abs(why.output).max()
    assert abs(why.left_over).max() <= tolerance * max(scale, 1)
    assert why.split_error <= tolerance
    assert why.shares.any()
    network.eval()
    with torch.no_grad():
        outputs = network(*queries) if isinstance(queries, tuple) else network(queries)
    outputs = outputs.double().numpy()
    np.testing.assert_allclose(machine(queries).reshape(outputs.shape), outputs, rtol=0, atol=tolerance)


def inputs_on_record(callback: LightningRecorder) -> list[tuple[Tensor, Any]]:
    return [(batch.ids, batch.inputs) for step in callback.trajectory.steps() for batch in step.batches]


def ids_are_places(callback: LightningRecorder) -> None:
    """Each batch was what the data hold under its ids, to the last bit: otherwise it had been kept."""
    assert all(inputs is None for _, inputs in inputs_on_record(callback))
    assert len({int(i) for ids, _ in inputs_on_record(callback) for i in ids}) > 10


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says of loaders, logs and hardware."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*(LeafSpec|does not have many workers|tensorboardX).*")
        yield
