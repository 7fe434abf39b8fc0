"""Muon, with the whitening of each step frozen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pathkernel.update_rules.adam import decoupled_decay
from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule


class Muon(UpdateRule):
    r"""`torch.optim.Muon`: momentum with its singular values brought near 1.

    .. math:: b^+ = \mu b + (1 - \mu) g,\qquad \tilde m = (1 - \mu) g + \mu b^+ \ \text{(Nesterov) or } b^+,\qquad
              \Delta = -\eta'\, \mathcal{W} \tilde m - \eta\lambda\theta

    Orthogonalisation is m̃ ↦ (m̃ m̃ᵀ)^{-1/2} m̃, here by the optimizer's Newton–Schulz polynomials: m̃ times a matrix W
    that depends on m̃ m̃ᵀ only (from the right and by m̃ᵀ m̃, where there are more rows than columns). W is frozen.
    torch iterates in bfloat16, so that W times the recorded m̃ₛ misses the recorded direction O by a percent or more.
    The linear map that is frozen is the one nearest to multiplication by W that hits it,

    .. math:: \mathcal{W} z = W z + (O - W \tilde m_s) \frac{\langle \tilde m_s, z\rangle}{\|\tilde m_s\|^2},

    which is Broyden's rank-one correction. A correction of W itself, (O − W m̃ₛ) m̃ₛ⁺, cannot reach an O outside the row
    space of m̃ₛ, and its pseudo-inverse magnifies the rounding of small singular values.

    References
    ----------
    Jordan et al. 2024, Muon; Broyden 1965, equation 4.5, for the correction.
    """

    name = "Muon"
    memory = ("momentum_buffer",)
    elementwise = False
    observes = Observes(after=("momentum_buffer",))

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """W, the missed direction O − W m̃ₛ, m̃ₛ / ‖m̃ₛ‖², and the decay."""
        buffer, momentum = observed.after["momentum_buffer"], float(settings["momentum"])
        combined = observed.gradient.lerp(buffer, momentum) if settings["nesterov"] else buffer
        combined = combined.double()
        factor = whitening(combined, settings)
        decay, rate = decoupled_decay(observed, settings), adjusted_rate(combined.shape, settings)
        missed = torch.zeros_like(combined)
        if rate:
            theta, displacement = observed.parameter.double(), observed.displacement.double()
            missed = (decay * theta - displacement) / rate - whitened(combined, factor)
        squared = combined.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        return {"whitening": factor, "missed": missed, "dual": combined / squared, "decay": decay}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """Momentum, whitened."""
        momentum = float(settings["momentum"])
        buffer = momentum * memory[0] + (1 - momentum) * gradient
        combined = (1 - momentum) * gradient + momentum * buffer if settings["nesterov"] else buffer
        direction = whitened(combined, frozen["whitening"]) + frozen["missed"] * (frozen["dual"] * combined).sum()
        return -adjusted_rate(gradient.shape, settings) * direction, (buffer,)

    def displacement_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Decoupled weight decay, at the rate that is not adjusted to the shape."""
        return {"weight_decay": frozen["decay"] * parameter} if settings["weight_decay"] else {}


def whitening(combined: Tensor, settings: Settings) -> Tensor:
    """W = Π_k (a I + b G_k + c G_k²) / ‖m̃‖ with G_k = X_k X_kᵀ, on the shorter side of m̃."""
    a, b, c = settings["ns_coefficients"]
    wide = combined.T if combined.shape[0] > combined.shape[1] else combined
    norm = wide.norm().clamp_min(float(settings["eps"]))
    x, identity = wide / norm, torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    factor = identity / norm
    for _ in range(int(settings["ns_steps"])):
        gram = x @ x.T
        polynomial = a * identity + b * gram + c * gram @ gram
        x, factor = polynomial @ x, polynomial @ factor
    return factor


def whitened(combined: Tensor, factor: Tensor) -> Tensor:
    """W m̃, or m̃ W where m̃ has more rows than columns."""
    factor = factor.to(combined.dtype)
    return combined @ factor if combined.shape[-2] > combined.shape[-1] else factor @ combined


def adjusted_rate(shape: torch.Size, settings: Settings) -> float:
    """η', the learning rate for a matrix of this shape."""
    rows, columns = shape[-2:]
    if settings["adjust_lr_fn"] == "match_rms_adamw":
        return float(settings["lr"]) * 0.2 * math.sqrt(max(rows, columns))
    return float(settings["lr"]) * math.sqrt(max(1, rows / columns))
