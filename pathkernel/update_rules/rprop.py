"""Resilient propagation, with the step sizes and the magnitude of the gradient frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathkernel.update_rules.elementwise import nonzero, per_rate
from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule
from pathkernel.update_rules.sgd import signed


class Rprop(UpdateRule):
    r"""`torch.optim.Rprop`.

    .. math:: \Delta = -\sigma\,\mathrm{sign}(g_s) = -\frac{\sigma}{|g_s|}\, g

    with σ the step sizes, each of which grows while its gradient keeps its sign and shrinks when it turns; an entry
    whose gradient has just turned does not move. Step sizes and \|g_s\| are frozen: the samples of a batch share a step
    of fixed size in proportion to their gradients, which is a convention. An entry with g_s = 0 does not move.

    References
    ----------
    Riedmiller & Braun 1993, A direct adaptive method for faster backpropagation learning.
    """

    name = "Rprop"
    # The step sizes, and the gradient as it was followed.
    observes = Observes(after=("prev", "step_size"))

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The step sizes, and the magnitude of the gradient, infinite where the entry did not move."""
        followed = observed.after["prev"]  # the gradient, with 0 where it has turned
        return {"step_size": observed.after["step_size"].detach().clone(), "magnitude": nonzero(followed).abs_()}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """The gradient over its frozen magnitude, times the step sizes."""
        return -signed(gradient, settings) / frozen["magnitude"] * frozen["step_size"], memory

    def preconditioner(self, shape: torch.Size, frozen: Frozen, settings: Settings, like: Tensor) -> Tensor:
        """σ / |g_s| / learning rate, which is but the first step size."""
        return per_rate(super().preconditioner(shape, frozen, settings, like), settings)
