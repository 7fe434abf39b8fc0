"""Rule for optimizers that have none, on request: the ratio of displacement and gradient, entry by entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule


class Elementwise(UpdateRule):
    r"""A convention for sharing a step of any optimizer: by the gradient of this step alone, entry by entry.

    .. math:: \Delta = \frac{\Delta_s}{g_s}\, g

    The ratio is frozen. The total is exact whatever the optimizer does. The split is a convention: momentum is credited
    to the samples of the step in which it moves the parameters, weight decay to the samples that it moves along with,
    and a large ratio, where the batch's gradient nearly cancels, makes large shares of opposite sign. What moved
    without any gradient goes to the channel ``"unexplained"``.
    """

    name = "elementwise convention"
    observes = Observes()

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The displacement Δ_s, and the gradient g_s, infinite in place of 0 so that the ratio is 0 there."""
        return {
            "displacement": observed.displacement.detach().clone(),
            "gradient": nonzero(observed.gradient),
        }

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """Gradient times the frozen ratio; divided first, since the ratio itself may overflow."""
        return gradient / frozen["gradient"] * frozen["displacement"], memory

    def displacement_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Displacement where the gradient is 0."""
        alone = frozen["displacement"].where(frozen["gradient"].isinf(), 0.0)
        return {"unexplained": alone} if alone.any() else {}

    def refusal(self, settings: Settings) -> str | None:
        """Optimizers that take gradients elsewhere than at the start of their step."""
        if settings.get("line_search_fn") is not None or settings.get("max_iter", 1) > 1:
            return (
                "one step moves the parameters several times and takes a gradient at each place, while a step on "
                "record has one gradient, at its start; `max_iter=1` without a line search takes one"
            )
        return None

    def preconditioner(self, shape: torch.Size, frozen: Frozen, settings: Settings, like: Tensor) -> Tensor:
        """−Δ_s / g_s / learning rate."""
        return per_rate(super().preconditioner(shape, frozen, settings, like), settings)


def nonzero(gradient: Tensor) -> Tensor:
    """A copy that is infinite where the gradient is 0: to divide by."""
    return gradient.detach().where(gradient != 0, torch.inf)


def per_rate(scaling: Tensor, settings: Settings) -> Tensor:
    """Effect of a step on the gradient over the learning rate, for rules whose step is not written with it."""
    rate = float(settings.get("lr", 1.0))
    return scaling / rate if rate else torch.zeros_like(scaling)
