r"""`System`: a flow's right-hand side :math:`\dot y = F(t, y)`, of which θ is the first part of y."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from pathkernel.dynamics.training_loss import TrainingLoss


class System(ABC):
    """Dynamics of a network on its data.

    Parameters
    ----------
    loss
        L, with its derivatives.
    others
        The parts of y beside θ at t = 0, vectors.

    Attributes
    ----------
    name
        What the flow is called.
    parts
        Names of the parts of y, θ first.
    is_gradient_flow
        Whether it is θ̇ = −∇L.
    advice
        What else to write where a solver's steps become too small or too many; empty where there is nothing.
    start
        The parts of y at t = 0.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("theta",)
    is_gradient_flow: ClassVar[bool] = False
    advice: ClassVar[str] = ""

    def __init__(self, loss: TrainingLoss, *others: Tensor) -> None:
        self.loss = loss
        self.start: tuple[Tensor, ...] = (loss.initial, *others)

    @abstractmethod
    def velocity(self, time: float, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Derivatives of the parts of y.

        Raises
        ------
        Stopped
            Where there is none.
        """

    def time_of_step(self, settings: Mapping[str, Any]) -> float:
        """Time that a step of the discrete map takes under an optimizer's settings: the learning rate."""
        return float(settings["lr"])

    def split(self, states: Tensor) -> tuple[Tensor, ...]:
        """The parts of flat states, (..., Y)."""
        return states.split([len(part) for part in self.start], dim=-1)

    def flat_velocity(self, time: float, state: Tensor) -> Tensor:
        """F(t, y) of a flat state, (Y,)."""
        return torch.cat(list(self.velocity(time, self.split(state))))
