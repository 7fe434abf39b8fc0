"""Averaged stochastic gradient descent: its steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathkernel.update_rules.rule import Frozen, Memory, Observation, Settings, UpdateRule
from pathkernel.update_rules.sgd import coupled_decay, signed


class ASGD(UpdateRule):
    r"""`torch.optim.ASGD`.

    .. math:: \Delta = -\eta_t\,(g + \lambda\theta) ,\qquad
              \eta_{t+1} = \frac{\eta}{(1 + \lambda\eta t)^\alpha}

    with λ the setting ``lambd``, whose decay is the channel ``"lambd"``; coupled weight decay is another. The average
    that the optimizer keeps under ``"ax"`` is not what the network computes with: the path is that of the parameters.

    References
    ----------
    Polyak & Juditsky 1992, Acceleration of stochastic approximation by averaging.
    """

    name = "ASGD"

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The rate η_t, which the step before has left, and the decay −λη_t."""
        eta = observed.after["eta"]
        rate = torch.tensor(observed.before.get("eta", settings["lr"]), dtype=eta.dtype).item()
        decay = float(settings["lambd"]) * rate
        foreach = settings["foreach"]
        if foreach is None:  # torch's own choice
            foreach = eta.device.type != "cpu" or observed.after["ax"].device.type != "cpu"
        if not foreach:  # θ is multiplied by 1 − λη_t in its own type, which rounds; see `decoupled_decay`
            working = torch.promote_types(observed.parameter.dtype, torch.float32)
            decay = 1 - torch.tensor(1 - decay, dtype=eta.dtype if settings["capturable"] else working).item()
        return {"rate": rate, "decay": -decay}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """Gradient descent at the frozen rate."""
        return -frozen["rate"] * signed(gradient, settings), memory

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Coupled weight decay."""
        return coupled_decay(parameter, settings)

    def displacement_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """The decay by ``lambd``."""
        return {"lambd": frozen["decay"] * parameter} if settings["lambd"] else {}

    def preconditioner(self, shape: torch.Size, frozen: Frozen, settings: Settings, like: Tensor) -> Tensor:
        """η_t / η: the step's rate follows its own schedule."""
        rate = float(settings["lr"])
        return torch.full(shape, frozen["rate"] / rate if rate else 0.0, dtype=like.dtype)
