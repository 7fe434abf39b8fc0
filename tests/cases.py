"""Models × losses × optimizers, and recordings of small training runs over them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pathkernel as pk
from pathkernel.gradients.pytrees import memory_bytes

SAMPLES, QUERIES = 10, 4
# Ragged batches with an id twice in one batch, and ids that come back.
BATCHES = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9, 0, 1), (2, 2, 5, 7), (3, 9), (6, 8, 4, 1))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelCase:
    """A small network with a given number of outputs, and the shape of its samples."""

    make: Callable[[int], nn.Module]
    sample: tuple[int, ...] = (4,)
    smooth: bool = True


MODELS = {
    "tanh": ModelCase(lambda c: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, c))),
    "relu": ModelCase(lambda c: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, c)), smooth=False),
    "layer_norm": ModelCase(lambda c: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Softplus(), nn.Linear(5, c))),
    "conv_group_norm": ModelCase(
        lambda c: nn.Sequential(
            nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, c)
        ),
        sample=(2, 3, 3),
    ),
}
SMOOTH = [name for name, case in MODELS.items() if case.smooth]


def make_model(name: str = "tanh", outputs: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A `torch.nn.Sequential` of the table, the same for the same seed."""
    # Layers draw their first values from the global generator; its state is put back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name].make(outputs).to(dtype)


def make_inputs(n: int, sample: Sequence[int] = (4,), dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(n, *sample, dtype=torch.float64, generator=generator(seed)).to(dtype)


# -- losses ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCase:
    """A loss, how many outputs its network has, and targets for it; a sum has steeper gradients than a mean."""

    loss: nn.Module
    outputs: int
    classes: bool = True
    rate: float = 1.0

    def targets(self, n: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
        if isinstance(self.loss, nn.CrossEntropyLoss):
            return torch.randint(self.outputs, (n,), generator=generator(seed))
        if self.classes:
            return torch.randint(2, (n, self.outputs), generator=generator(seed)).to(dtype)
        return torch.randn(n, self.outputs, dtype=torch.float64, generator=generator(seed)).to(dtype)


LOSSES = {
    "ce_mean": LossCase(nn.CrossEntropyLoss(), 3),
    "ce_sum": LossCase(nn.CrossEntropyLoss(reduction="sum"), 3, rate=0.25),
    "bce": LossCase(nn.BCEWithLogitsLoss(), 1),
    "mse_mean": LossCase(nn.MSELoss(), 2, classes=False),
    "mse_sum": LossCase(nn.MSELoss(reduction="sum"), 2, classes=False, rate=0.1),
}


# -- optimizers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer with its settings, and what the oracle calls it (None where the oracle does not know it)."""

    make: type[Optimizer]
    settings: dict[str, Any]
    oracle: str | None = None

    def __call__(self, parameters: Any, rate: float = 1.0) -> Optimizer:
        return self.make(parameters, **self.settings_at(rate))

    def settings_at(self, rate: float) -> dict[str, Any]:
        return {**self.settings, "lr": rate * self.settings["lr"]}


SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS = {
    "sgd": OptimizerCase(SGD, {"lr": 0.1}, "sgd"),
    "sgd_decay": OptimizerCase(SGD, {"lr": 0.1, "weight_decay": 0.05}, "sgd"),
    "sgd_maximize_decay": OptimizerCase(
        SGD, {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.1, "maximize": True}, "sgd"
    ),
    "momentum": OptimizerCase(SGD, {"lr": 0.05, "momentum": 0.9}, "sgd"),
    "momentum_dampening_decay": OptimizerCase(
        SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}, "sgd"
    ),
    "nesterov": OptimizerCase(SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}, "sgd"),
    "nesterov_decay": OptimizerCase(SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}, "sgd"),
    "adam": OptimizerCase(Adam, {"lr": 0.01}, "adam"),
    "adam_decay": OptimizerCase(Adam, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.05}, "adam"),
    "amsgrad": OptimizerCase(Adam, {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.5)}),
    "amsgrad_decay": OptimizerCase(Adam, {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.5), "weight_decay": 0.05}),
    "adamw": OptimizerCase(AdamW, {"lr": 0.01, "weight_decay": 0.3}, "adamw"),
    "adamw_no_decay": OptimizerCase(AdamW, {"lr": 0.01, "weight_decay": 0.0, "betas": (0.8, 0.95)}, "adamw"),
    "adamw_amsgrad": OptimizerCase(AdamW, {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.5)}),
}
IN_ORACLE = [name for name, case in OPTIMIZERS.items() if case.oracle]


# -- recordings -----------------------------------------------------------------------------------------------------


@dataclass
class Recording:
    """A finished run with everything that an oracle needs to repeat it."""

    start: Any
    model: Any
    optimizer: Optimizer
    loss: Any
    X: Tensor
    y: Tensor
    queries: Tensor
    trajectory: pk.Trajectory
    settings: dict[str, Any]
    batches: Sequence[Sequence[int]] = field(default=BATCHES)


def record(
    model: str = "tanh",
    loss: str = "ce_mean",
    optimizer: str = "sgd",
    *,
    dtype: torch.dtype = torch.float64,
    batches: Sequence[Sequence[int]] = BATCHES,
    rule: pk.UpdateRule | None = None,
    data: tuple[Tensor, Tensor] | None = None,
    schedule: Callable[[Optimizer], Any] | None = None,
) -> Recording:
    """Train a row of the tables above over the given batches of ids, on record."""
    case, module = LOSSES[loss], make_model(model, LOSSES[loss].outputs, dtype)
    sample = MODELS[model].sample
    X, y = (make_inputs(SAMPLES, sample, dtype), case.targets(SAMPLES, dtype)) if data is None else data
    start, loss_module = copy.deepcopy(module), copy.deepcopy(case.loss)
    opt = OPTIMIZERS[optimizer](module.parameters(), case.rate)
    scheduler = schedule(opt) if schedule else None
    with pk.KernelRecorder(module, opt, loss_module, data=(X, y), rule=rule, audit_every=0) as recorder:
        for ids in batches:
            x, target = recorder.batch(list(ids))
            opt.zero_grad()
            loss_module(module(x), target).backward()
            opt.step()
            if scheduler is not None:
                scheduler.step()
    queries = make_inputs(QUERIES, sample, dtype, seed=3)
    used = OPTIMIZERS[optimizer].settings_at(case.rate)
    return Recording(start, module, opt, loss_module, X, y, queries, recorder.trajectory, used, batches)


def smallest_budget(call: Callable[[int], Any]) -> int:
    """Half more bytes than a call says that it can do with, when it is given next to nothing.

    What a pass takes is measured, and of some kilobytes the odd object makes a good part.
    """
    try:
        call(1000)
    except pk.errors.InputError as refusal:
        found = re.search(r'memory="([^"]+)"', refusal.write)
        assert found is not None
        return int(1.5 * memory_bytes(found[1]))
    raise AssertionError("1 kB was enough")
