"""Stochastic gradient descent: plain, with momentum (heavy ball), and with Nesterov's momentum as torch writes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule


def signed(gradient: Tensor, settings: Settings) -> Tensor:
    """The gradient as a descent direction: its sign is turned under ``maximize``."""
    return -gradient if settings.get("maximize", False) else gradient


def coupled_decay(parameter: Tensor, settings: Settings) -> dict[str, Tensor]:
    """λθ added to the gradient, after ``maximize`` has turned the gradient's sign."""
    decay = settings.get("weight_decay", 0.0)
    return {"weight_decay": signed(decay * parameter, settings)} if decay else {}


class SGD(UpdateRule):
    r"""`torch.optim.SGD`.

    .. math:: b^+ = \mu b + (1 - \tau) g,\qquad \Delta = -\eta\, b^+ \quad\text{or (Nesterov)}\quad
              \Delta = -\eta\,(g + \mu b^+)

    with :math:`b^+ = g`, undamped, on the first step of a parameter.
    """

    name = "SGD"
    memory = ("momentum_buffer",)
    observes = Observes()

    def keeps_memory(self, settings: Settings) -> bool:
        """True with momentum."""
        return float(settings.get("momentum", 1.0)) != 0

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """Flag of the step that makes the momentum buffer."""
        return {"first": observed.before.get("momentum_buffer") is None}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """Heavy ball or Nesterov."""
        (buffer,) = memory
        gradient = signed(gradient, settings)
        lr, momentum = float(settings["lr"]), float(settings["momentum"])
        if momentum == 0:
            return -lr * gradient, (buffer,)
        if frozen["first"]:
            buffer = gradient + 0 * buffer
        else:
            buffer = momentum * buffer + (1 - float(settings["dampening"])) * gradient
        direction = gradient + momentum * buffer if settings["nesterov"] else buffer
        return -lr * direction, (buffer,)

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Coupled weight decay."""
        return coupled_decay(parameter, settings)
