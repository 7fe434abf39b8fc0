"""Adam and AdamW, with the denominator of each step frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pathkernel.update_rules.rule import Frozen, Memory, Settings, UpdateRule
from pathkernel.update_rules.sgd import coupled_decay, signed


class Adam(UpdateRule):
    r"""`torch.optim.Adam` and `torch.optim.AdamW`, AMSGrad included.

    .. math:: m^+ = \beta_1 m + (1 - \beta_1) g,\qquad
              \Delta = -\frac{\eta}{1 - \beta_1^t}\,\frac{m^+}{\sqrt{\hat v} + \epsilon}

    The denominator is frozen. It depends on the training samples too: holding it fixed is a convention for sharing
    credit, under which the total stays exact.
    """

    name = "Adam"
    memory = ("exp_avg",)

    def frozen(self, before: Mapping[str, Any], after: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
        """The denominator √v̂ + ε and the step count t."""
        second_moment = after["max_exp_avg_sq"] if settings["amsgrad"] else after["exp_avg_sq"]
        t = float(after["step"])
        correction = math.sqrt(1 - float(settings["betas"][1]) ** t)
        return {"denominator": second_moment.sqrt().div_(correction).add_(settings["eps"]), "t": t}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """First moment over the frozen denominator."""
        beta = float(settings["betas"][0])
        moment = beta * memory[0] + (1 - beta) * signed(gradient, settings)
        rate = float(settings["lr"]) / (1 - beta ** frozen["t"])
        return -rate * moment / frozen["denominator"], (moment,)

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Weight decay of Adam, which enters the gradient."""
        return {} if settings.get("decoupled_weight_decay", False) else coupled_decay(parameter, settings)

    def displacement_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Weight decay of AdamW: −ηλθ."""
        decay = settings["weight_decay"] if settings.get("decoupled_weight_decay", False) else 0
        return {"weight_decay": -float(settings["lr"]) * decay * parameter} if decay else {}


class AdamW(Adam):
    """`torch.optim.AdamW`: Adam with decoupled weight decay, under its own name."""

    name = "AdamW"
