"""Adam and AdamW, with the denominator of each step frozen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pathkernel.update_rules.rule import Frozen, Memory, Observation, Settings, UpdateRule
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

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The denominator √v̂ + ε, the step count t, and the decay −ηλ as the parameter's own type rounds 1 − ηλ."""
        after = observed.after
        second_moment = after["max_exp_avg_sq"] if settings["amsgrad"] else after["exp_avg_sq"]
        t = float(after["step"])
        correction = math.sqrt(1 - float(settings["betas"][1]) ** t)
        denominator = second_moment.sqrt().div_(correction).add_(settings["eps"])
        decay = float(settings["lr"]) * float(settings["weight_decay"])
        # In float32, 1 − 3e-5 is off by a thousandth of the decay in every step, always to the same side.
        rounded = torch.tensor(1 - decay, dtype=second_moment.dtype).item() - 1
        return {"denominator": denominator, "t": t, "decay": rounded}

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
        decoupled = settings.get("decoupled_weight_decay", False) and settings["weight_decay"]
        return {"weight_decay": frozen["decay"] * parameter} if decoupled else {}


class AdamW(Adam):
    """`torch.optim.AdamW`: Adam with decoupled weight decay, under its own name."""

    name = "AdamW"
