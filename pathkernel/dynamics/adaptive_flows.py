r"""Flows of methods with a rate for each parameter: RMSprop and Adam.

Averages with a memory of time τ, :math:`\tau\dot r = g^2 - r`, are what exponential averages with the factor
:math:`e^{-\gamma/\tau}` become when the step γ goes to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pathkernel._typing import Loss
from pathkernel.dynamics.flow import Flow
from pathkernel.dynamics.following import FlowOptions, flow_of
from pathkernel.dynamics.system import System
from pathkernel.dynamics.training_loss import TrainingLoss
from pathkernel.errors import InputError, brief, is_number

SMALL_EPS = (
    "; rates g / (√r + ε) turn as fast as signs where gradients pass through 0, most of all while averages are young: "
    "a larger `eps=`, such as 1e-3, smooths them"
)
"""What makes flows of adaptive methods stiff."""


def check_memory(*memories: float) -> None:
    """Refuse memories that are no times."""
    if not all(is_number(memory) and memory > 0 for memory in memories):
        raise InputError(
            f"`memory={memories if len(memories) > 1 else memories[0]!r}` was given",
            "The memory of an average is a time above 0",
            "Write `memory=1.0`, which steps of 0.01 average over about a hundred steps",
        )


def pair_of(memory: tuple[float, float]) -> tuple[float, float]:
    """τ₁ and τ₂ of Adam.

    Raises
    ------
    InputError
        For what is no pair of times.
    """
    if not isinstance(memory, tuple | list) or len(memory) != 2:
        raise InputError(
            f"`memory={brief(memory)}` was given",
            "Adam averages g over one time and g² over another: a pair",
            "Write for example `memory=(0.1, 1.0)`",
        )
    first, second = memory
    check_memory(first, second)
    return first, second


def check_eps(eps: float) -> None:
    """Refuse an ε that is below 0 or no number."""
    if not (is_number(eps) and eps >= 0):
        raise InputError(f"`eps={eps!r}` was given", "ε is 0 or more", "Write `eps=1e-8`")


def check_time_step(time_step: float) -> None:
    """Refuse a time step that is no time."""
    if not (is_number(time_step) and time_step > 0):
        raise InputError(
            f"`time_step={time_step!r}` was given", "A time step is above 0", "Write for example `time_step=0.01`"
        )


class RMSpropFlow(System):
    """Flow of RMSprop.

    Parameters
    ----------
    loss
        L.
    memory
        τ > 0.
    eps
        ε ≥ 0.
    """

    name = "RMSprop flow"
    parts = ("theta", "square_average")
    advice = SMALL_EPS

    def __init__(self, loss: TrainingLoss, memory: float, eps: float) -> None:
        check_memory(memory)
        check_eps(eps)
        super().__init__(loss, loss.gradient(loss.initial).square())
        self.memory, self.eps = memory, eps

    def velocity(self, time: float, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """(−g / (√r + ε), (g² − r) / τ)."""
        theta, average = parts
        gradient = self.loss.gradient(theta)
        # An error of the solver may leave an average that is 0 a rounding below it.
        return -gradient / (average.clamp_min(0).sqrt() + self.eps), (gradient.square() - average) / self.memory


def rmsprop_flow(
    model: nn.Module,
    loss: Loss,
    data: Any,
    time: float = 1.0,
    *,
    memory: float = 1.0,
    eps: float = 1e-8,
    **options: Unpack[FlowOptions],
) -> Flow:
    r"""Flow of RMSprop.

    .. math:: \dot\theta = -\frac{g}{\sqrt r + \epsilon},\qquad \tau\dot r = g^2 - r,\qquad r(0) = g(\theta(0))^2

    ``torch.optim.RMSprop(parameters, **rmsprop_settings(time_step, memory))`` discretises it, with its state
    ``square_avg`` set to g² before the first step. From r(0) = 0, where torch starts, the flow would begin at infinite
    speed.

    Parameters
    ----------
    model, loss, data, time
        As for `gradient_flow`.
    memory
        τ > 0, the time over which g² is averaged.
    eps
        ε ≥ 0, outside the root.
    **options
        See `pathkernel.dynamics.following.FlowOptions`.

    Returns
    -------
    Flow
        With the part ``"square_average"``, r.
    """
    return flow_of(lambda own: RMSpropFlow(own, memory, eps), model, loss, data, time, options)


class AdamFlow(System):
    """Flow of Adam.

    Parameters
    ----------
    loss
        L.
    memory
        (τ₁, τ₂) > 0.
    eps
        ε ≥ 0.
    """

    name = "Adam flow"
    parts = ("theta", "average", "square_average")
    advice = SMALL_EPS

    def __init__(self, loss: TrainingLoss, memory: tuple[float, float], eps: float) -> None:
        pair = pair_of(memory)
        check_eps(eps)
        zero = torch.zeros_like(loss.initial)
        super().__init__(loss, zero, zero)
        self.memory, self.eps = pair, eps

    def velocity(self, time: float, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """(−m̂ / (√r̂ + ε), (g − m) / τ₁, (g² − r) / τ₂)."""
        theta, average, square_average = parts
        gradient = self.loss.gradient(theta)
        first, second = self.memory
        changes = (gradient - average) / first, (gradient.square() - square_average) / second
        if time == 0:  # where both averages are of one gradient
            return -gradient / (gradient.abs() + self.eps), *changes
        corrected = average / -math.expm1(-time / first)
        corrected_square = square_average.clamp_min(0) / -math.expm1(-time / second)
        return -corrected / (corrected_square.sqrt() + self.eps), *changes


def adam_flow(
    model: nn.Module,
    loss: Loss,
    data: Any,
    time: float = 1.0,
    *,
    memory: tuple[float, float] = (0.1, 1.0),
    eps: float = 1e-8,
    **options: Unpack[FlowOptions],
) -> Flow:
    r"""Flow of Adam, with its corrections of the start.

    .. math:: \dot\theta = -\frac{\hat m}{\sqrt{\hat r} + \epsilon},\qquad
              \tau_1\dot m = g - m,\quad \tau_2\dot r = g^2 - r,\qquad
              \hat m = \frac{m}{1 - e^{-t/\tau_1}},\quad \hat r = \frac{r}{1 - e^{-t/\tau_2}}

    ``torch.optim.Adam(parameters, **adam_settings(time_step, memory))`` discretises it.

    Parameters
    ----------
    model, loss, data, time
        As for `gradient_flow`.
    memory
        (τ₁, τ₂), the times over which g and g² are averaged: at a rate of 0.01, torch's β = (0.9, 0.999) are about
        (0.1, 10).
    eps
        ε ≥ 0, outside the root.
    **options
        See `pathkernel.dynamics.following.FlowOptions`.

    Returns
    -------
    Flow
        With the parts ``"average"``, m, and ``"square_average"``, r.
    """
    return flow_of(lambda own: AdamFlow(own, memory, eps), model, loss, data, time, options)


# -- discrete maps -----------------------------------------------------------------------------------------------------


def rmsprop_settings(time_step: float, memory: float) -> dict[str, Any]:
    """Settings of `torch.optim.RMSprop` that follow `rmsprop_flow`: ``lr``, which is γ, and ``alpha``, e^(−γ/τ)."""
    check_time_step(time_step)
    check_memory(memory)
    return {"lr": time_step, "alpha": math.exp(-time_step / memory)}


def adam_settings(time_step: float, memory: tuple[float, float]) -> dict[str, Any]:
    """Settings of `torch.optim.Adam` that follow `adam_flow`: ``lr``, which is γ, and ``betas``, e^(−γ/τ) of each."""
    check_time_step(time_step)
    first, second = pair_of(memory)
    return {"lr": time_step, "betas": (math.exp(-time_step / first), math.exp(-time_step / second))}
