"""Adafactor, with its factored denominator, clipping and relative step size frozen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pathkernel.update_rules.adam import decoupled_decay
from pathkernel.update_rules.rule import Frozen, Memory, Observation, Settings, UpdateRule
from pathkernel.update_rules.sgd import signed


class Adafactor(UpdateRule):
    r"""`torch.optim.Adafactor`.

    .. math:: \Delta = -\alpha_t\, \frac{g / D}{\max(1, \mathrm{RMS}(g_s / D) / d)} - \eta\lambda\theta,\qquad
              \alpha_t = \max(\epsilon_2, \mathrm{RMS}(\theta_s)) \min(\eta, t^{-1/2}),\qquad
              D = \max(\sqrt{\hat V}, \epsilon_1)

    with :math:`\hat V` the product of a row and a column factor for parameters of two axes and more. The denominator D,
    the clipping and α_t are frozen, as computed from the optimizer's state: the ratio of displacement and gradient
    would say the same, but is mostly rounding where both are small.

    References
    ----------
    Shazeer & Stern 2018 (1804.04235), Algorithms 4 and 5; η, ε₁ and ε₂ as in torch.
    """

    name = "Adafactor"

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The denominator D, the scale α_t / η over the clipping, and the decay."""
        theta, after, lr = observed.parameter, observed.after, float(settings["lr"])
        eps1, eps2 = settings["eps"]
        eps1 = torch.finfo(theta.dtype).eps if eps1 is None else float(eps1)
        t = float(after["step"])
        # α_t / η rather than α_t, since a schedule may pass through η = 0.
        relative = max(float(eps2), root_mean_square(theta)) * (min(1.0, 1 / (lr * math.sqrt(t))) if lr else 1.0)
        if "variance" in after:
            variance = after["variance"].clone()
        else:
            row, column = after["row_var"], after["col_var"]
            variance = (row @ column).div_(row.mean(dim=-2, keepdim=True).clamp_(min=eps1))
        denominator = variance.clamp_(min=eps1 * eps1).sqrt_()
        clipping = max(1.0, root_mean_square(observed.gradient / denominator) / float(settings["d"]))
        return {
            "denominator": denominator.reshape(theta.shape),
            "scale": relative / clipping,
            "decay": decoupled_decay(observed, settings),
        }

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """Gradient over the frozen denominator, at the frozen scale."""
        rate = float(settings["lr"]) * frozen["scale"]
        return -rate * signed(gradient, settings) / frozen["denominator"], memory

    def displacement_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Decoupled weight decay."""
        return {"weight_decay": frozen["decay"] * parameter} if settings["weight_decay"] else {}


def root_mean_square(tensor: Tensor) -> float:
    """‖x‖ / √n; 0 of an empty tensor."""
    return tensor.norm(2).item() / math.sqrt(max(1, tensor.numel()))
