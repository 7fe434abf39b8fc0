"""Adagrad, with the accumulated squares of each step frozen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule
from pathkernel.update_rules.sgd import coupled_decay, signed


class Adagrad(UpdateRule):
    r"""`torch.optim.Adagrad`.

    .. math:: \Delta = -\frac{\eta}{1 + (t - 1) \delta}\,\frac{g}{\sqrt{\Sigma} + \epsilon},\qquad
              \Sigma = \Sigma_0 + \sum_{s \le t} g_s^2

    with δ the ``lr_decay`` and Σ₀ the ``initial_accumulator_value``.

    References
    ----------
    Duchi et al. 2011, Adaptive subgradient methods.
    """

    name = "Adagrad"
    observes = Observes(after=("sum",), numbers=("step",))

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The denominator √Σ + ε and the step count t."""
        return {
            "denominator": observed.after["sum"].sqrt().add_(settings["eps"]),
            "t": float(observed.after["step"]),
        }

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """Gradient over the frozen denominator, at a decaying rate."""
        rate = float(settings["lr"]) / (1 + (frozen["t"] - 1) * float(settings["lr_decay"]))
        return -rate * signed(gradient, settings) / frozen["denominator"], memory

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Coupled weight decay."""
        return coupled_decay(parameter, settings)
