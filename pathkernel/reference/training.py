"""Optimizers as in the textbook.

A step is written in two halves. The *denominator* is the nonlinear one: the statistics of the run and, from them, what
is divided by. *displace* is the linear one: given the denominator D, displacement and memory are linear in gradient g
and memory m, with one vector (P,) for the run, or one row per source (N + 1, P) for its decomposition. Steps are
counted by k = 1, 2, …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pathkernel.reference.gradients import (
    Loss,
    Parameters,
    double,
    double_loss,
    flatten,
    gradient,
    module_at,
    unflatten,
)

Hyper = dict[str, Any]
Statistics = dict[str, Tensor]


def _sgd_denominator(g: Tensor, stat: Statistics, k: int, h: Hyper) -> Tensor:
    return torch.ones_like(g)


def _sgd_displace(g: Tensor, m: Tensor, D: Tensor, lr: float, k: int, h: Hyper) -> tuple[Tensor, Tensor]:
    mu, tau = h["momentum"], h["dampening"]
    if mu == 0:
        return -lr * g, m
    m = g if k == 1 else mu * m + (1 - tau) * g  # torch: the first buffer is g itself, undamped
    return (-lr * (g + mu * m) if h["nesterov"] else -lr * m), m


def _adam_denominator(g: Tensor, stat: Statistics, k: int, h: Hyper) -> Tensor:
    beta: float = h["betas"][1]
    v = stat["v"] = beta * stat.get("v", torch.zeros_like(g)) + (1 - beta) * g**2
    return (v / (1 - beta**k)).sqrt() + float(h["eps"])


def _adam_displace(g: Tensor, m: Tensor, D: Tensor, lr: float, k: int, h: Hyper) -> tuple[Tensor, Tensor]:
    beta: float = h["betas"][0]
    m = beta * m + (1 - beta) * g
    return -lr * m / (1 - beta**k) / D, m


def _rmsprop_denominator(g: Tensor, stat: Statistics, k: int, h: Hyper) -> Tensor:
    alpha: float = h["alpha"]
    v = stat["v"] = alpha * stat.get("v", torch.zeros_like(g)) + (1 - alpha) * g**2
    if h["centered"]:
        a = stat["a"] = alpha * stat.get("a", torch.zeros_like(g)) + (1 - alpha) * g
        v = v - a**2
    return v.sqrt() + float(h["eps"])


def _rmsprop_displace(g: Tensor, m: Tensor, D: Tensor, lr: float, k: int, h: Hyper) -> tuple[Tensor, Tensor]:
    m = h["momentum"] * m + g / D
    return -lr * m, m


def _adagrad_denominator(g: Tensor, stat: Statistics, k: int, h: Hyper) -> Tensor:
    initial = torch.full_like(g, h["initial_accumulator_value"])
    v = stat["v"] = stat.get("v", initial) + g**2
    return v.sqrt() + float(h["eps"])


def _adagrad_displace(g: Tensor, m: Tensor, D: Tensor, lr: float, k: int, h: Hyper) -> tuple[Tensor, Tensor]:
    return -lr / (1 + (k - 1) * h["lr_decay"]) * g / D, m


class Optimizer(NamedTuple):
    """The two halves of a step, and what `torch.optim` uses when nothing is said."""

    denominator: Callable[[Tensor, Statistics, int, Hyper], Tensor]
    displace: Callable[[Tensor, Tensor, Tensor, float, int, Hyper], tuple[Tensor, Tensor]]
    defaults: Hyper
    decoupled: bool = False  # weight decay as a displacement −lr·wd·θ rather than a gradient wd·θ


_ADAM: Hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}

_OPTIMIZERS = {
    "sgd": Optimizer(
        _sgd_denominator,
        _sgd_displace,
        {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "nesterov": False},
    ),
    "adam": Optimizer(_adam_denominator, _adam_displace, _ADAM),
    "adamw": Optimizer(_adam_denominator, _adam_displace, {**_ADAM, "weight_decay": 1e-2}, decoupled=True),
    "rmsprop": Optimizer(
        _rmsprop_denominator,
        _rmsprop_displace,
        {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "centered": False, "momentum": 0.0},
    ),
    "adagrad": Optimizer(
        _adagrad_denominator,
        _adagrad_displace,
        {"lr": 1e-2, "eps": 1e-10, "lr_decay": 0.0, "initial_accumulator_value": 0.0},
    ),
}


def prepare(optimizer: str, hyperparameters: Hyper, steps: int) -> tuple[Optimizer, Hyper, list[float]]:
    """Look up the optimizer, complete its hyperparameters, and give the learning rate of every step."""
    if optimizer not in _OPTIMIZERS:
        raise ValueError(f"Unknown optimizer {optimizer!r}; expected one of {sorted(_OPTIMIZERS)}.")
    rule = _OPTIMIZERS[optimizer]
    h = {"weight_decay": 0.0, "maximize": False, **rule.defaults}
    unknown = sorted(set(hyperparameters) - set(h))
    if unknown:
        raise ValueError(f"Unknown hyperparameters {unknown} of {optimizer!r}; expected some of {sorted(h)}.")
    h.update(hyperparameters)
    if h.get("nesterov") and (h["momentum"] <= 0 or h["dampening"] != 0):
        raise ValueError(
            "`nesterov=True` needs a momentum and no dampening. Write `momentum=0.9, dampening=0, nesterov=True`."
        )
    lr = h["lr"]
    rates = [float(r) for r in lr] if isinstance(lr, Sequence) else [float(lr)] * steps
    if len(rates) != steps:
        raise ValueError(f"`lr` has {len(rates)} values for {steps} batches; give one number, or one per batch.")
    return rule, h, rates


def loss_gradient(model: nn.Module, parameters: Parameters, loss: Loss, X: Tensor, y: Tensor) -> Tensor:
    """Differentiate the loss of a whole batch, ∇_θ loss(model(X), y), (P,)."""
    twin = module_at(model, parameters)
    return gradient(double_loss(loss)(twin(double(X)), double(y)), twin)


def train(
    model: nn.Module,
    loss: Loss,
    X: Tensor,
    y: Tensor,
    batches: Sequence[Sequence[int]],
    optimizer: str,
    **hyperparameters: Any,
) -> list[Parameters]:
    """Train a copy of the model and return every point of the path, θ_0 … θ_S.

    Parameters
    ----------
    model : nn.Module
        Holds θ_0; left unchanged.
    loss : callable
        (output, target) -> scalar.
    X : Tensor of shape (N, ...)
    y : Tensor of shape (N, ...)
    batches : sequence of S sequences of int
        The sample ids of every step.
    optimizer : {"sgd", "adam", "adamw", "rmsprop", "adagrad"}
    **hyperparameters
        Names, meaning and defaults of `torch.optim`; all take ``lr`` (a number, or a sequence with one per step),
        ``weight_decay`` (coupled; decoupled for "adamw") and ``maximize``. "sgd": ``momentum``, ``dampening``,
        ``nesterov``. "adam", "adamw": ``betas``, ``eps``. "rmsprop": ``alpha``, ``eps``, ``centered``, ``momentum``.
        "adagrad": ``eps``, ``lr_decay``, ``initial_accumulator_value``.

    Returns
    -------
    list of S + 1 dict of str to Tensor
        The trainable parameters, float64.

    Raises
    ------
    ValueError
        For an unknown optimizer or hyperparameter, Nesterov without momentum or with dampening, or a schedule
        ``lr`` that does not have one value per batch.
    """
    rule, h, rates = prepare(optimizer, hyperparameters, len(batches))
    sign = -1.0 if h["maximize"] else 1.0
    theta = flatten(model, dict(model.named_parameters()))
    memory, statistics = torch.zeros_like(theta), Statistics()
    path = [unflatten(model, theta)]
    for k, (ids, lr) in enumerate(zip(batches, rates, strict=True), start=1):
        index = torch.as_tensor(ids)
        g = sign * loss_gradient(model, path[-1], loss, X[index], y[index])
        decay = h["weight_decay"] * theta
        if not rule.decoupled:
            g = g + decay
        D = rule.denominator(g, statistics, k, h)
        delta, memory = rule.displace(g, memory, D, lr, k, h)
        if rule.decoupled:
            delta = delta - lr * decay
        theta = theta + delta
        path.append(unflatten(model, theta))
    return path
