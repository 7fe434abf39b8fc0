"""RMSprop: plain, centered, and with momentum, with the denominator of each step frozen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule
from pathkernel.update_rules.sgd import coupled_decay, signed


class RMSprop(UpdateRule):
    r"""`torch.optim.RMSprop`.

    .. math:: b^+ = \mu b + \frac{g}{\sqrt{v} + \epsilon},\qquad \Delta = -\eta\, b^+

    with v the running average of g², less the square of the running average of g if ``centered``.

    References
    ----------
    Tieleman & Hinton 2012, lecture 6.5; Graves 2013 (1308.0850), equations 38–45, for the centered form.
    """

    name = "RMSprop"
    memory = ("momentum_buffer",)
    # The average of g², and that of g if it is subtracted.
    observes = Observes(after=lambda settings: ("square_avg", "grad_avg") if settings["centered"] else ("square_avg",))

    def keeps_memory(self, settings: Settings) -> bool:
        """True with momentum."""
        return float(settings.get("momentum", 1.0)) != 0

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The denominator √v + ε."""
        v = observed.after["square_avg"]
        if settings["centered"]:
            # As torch computes it: the difference cancels, and another rounding would be another denominator.
            mean = observed.after["grad_avg"]
            v = v.addcmul(mean, mean, value=-1)
        return {"denominator": v.sqrt().add_(settings["eps"])}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """Gradient over the frozen denominator, through the momentum buffer."""
        lr, momentum = float(settings["lr"]), float(settings["momentum"])
        scaled = signed(gradient, settings) / frozen["denominator"]
        if momentum == 0:
            return -lr * scaled, memory
        buffer = momentum * memory[0] + scaled
        return -lr * buffer, (buffer,)

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Coupled weight decay."""
        return coupled_decay(parameter, settings)
