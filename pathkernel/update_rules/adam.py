"""Adam and AdamW, with the denominator of each step frozen."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule
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
    # The second moment, or its running maximum.
    observes = Observes(
        after=lambda settings: ("max_exp_avg_sq",) if settings["amsgrad"] else ("exp_avg_sq",), numbers=("step",)
    )

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The denominator √v̂ + ε, the step count t, and the decay."""
        after = observed.after
        second_moment = after["max_exp_avg_sq"] if settings["amsgrad"] else after["exp_avg_sq"]
        t = step_count(observed, settings)
        correction = float(1 - float(settings["betas"][1]) ** t) ** 0.5
        denominator = second_moment.sqrt().div_(correction).add_(settings["eps"])
        return {"denominator": denominator, "t": float(t), "decay": decoupled_decay(observed, settings)}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """First moment over the frozen denominator."""
        beta = float(settings["betas"][0])
        moment = beta * memory[0] + (1 - beta) * signed(gradient, settings)
        rate = float(settings["lr"]) / (1 - beta ** frozen["t"])
        return -rate * moment / frozen["denominator"], (moment,)

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Weight decay of Adam, which enters the gradient."""
        return decay_of_gradient(parameter, settings)

    def displacement_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Weight decay of AdamW: −ηλθ."""
        return decay_of_displacement(parameter, frozen, settings)


class AdamW(Adam):
    """`torch.optim.AdamW`: Adam with decoupled weight decay, under its own name."""

    name = "AdamW"


def step_count(observed: Observation, settings: Settings) -> Any:
    """t of this step: a number, or a tensor where torch takes powers like β₂ᵗ in the tensor's type.

    1 − 0.999 is off by 5e-5 in float32, and so are the first steps.
    """
    t = observed.after["step"]
    in_tensors = settings.get("capturable", False) and not settings.get("fused", False)
    return t.detach().clone() if in_tensors else float(t)


def decoupled_decay(observed: Observation, settings: Settings) -> float:
    """−ηλ as torch applies it, by multiplying the parameter with 1 − ηλ in its own type.

    In float32, 1 − 3e-5 is off by a thousandth of the decay, in every step to the same side. Fused steps on
    accelerators subtract ηλθ instead. Types of half precision are multiplied in float32.
    """
    decay = float(settings["lr"]) * float(settings["weight_decay"])
    if settings.get("fused", False) and observed.device != "cpu":
        return -decay
    working = torch.promote_types(observed.parameter.dtype, torch.float32)
    return _rounded(1 - decay, working) - 1


@lru_cache(maxsize=64)
def _rounded(number: float, dtype: torch.dtype) -> float:
    """A number as it is in a floating type; every parameter of every step asks, nearly always for the same."""
    return float(torch.tensor(number, dtype=dtype).item())


def decay_of_gradient(parameter: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Weight decay, where it is coupled."""
    return {} if settings.get("decoupled_weight_decay", False) else coupled_decay(parameter, settings)


def decay_of_displacement(parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
    """Weight decay, where it is decoupled: the parameter times the frozen ``decay``."""
    decoupled = settings.get("decoupled_weight_decay", False) and settings["weight_decay"]
    return {"weight_decay": frozen["decay"] * parameter} if decoupled else {}
