"""Adadelta, with both averages of each step frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule
from pathkernel.update_rules.sgd import coupled_decay, signed


class Adadelta(UpdateRule):
    r"""`torch.optim.Adadelta`.

    .. math:: \Delta = -\eta\,\frac{\sqrt{u + \epsilon}}{\sqrt{v^+ + \epsilon}}\, g

    with v⁺ the average of g² after the step and u that of the squared steps (at rate 1) before it.

    References
    ----------
    Zeiler 2012 (1212.5701), Algorithm 1.
    """

    name = "Adadelta"
    observes = Observes(before=("acc_delta",), after=("square_avg",))

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The ratio of the two roots."""
        v, eps = observed.after["square_avg"], settings["eps"]
        u = observed.before.get("acc_delta", torch.zeros_like(v))
        return {"ratio": u.add(eps).sqrt_().div(v.add(eps).sqrt_())}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """Gradient times the frozen ratio."""
        return -float(settings["lr"]) * frozen["ratio"] * signed(gradient, settings), memory

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Coupled weight decay."""
        return coupled_decay(parameter, settings)
