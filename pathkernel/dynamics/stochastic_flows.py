r"""Flows with noise: Langevin's and Kramers' equations of a network on its data.

==========  ==========================================================  ===============================================
equation                                                                stationary density of θ
==========  ==========================================================  ===============================================
Langevin    :math:`d\theta = -\nabla L\, dt + \sigma\, dW`              :math:`\propto e^{-2L/\sigma^2}`
Kramers     :math:`dv = (-\lambda v - \nabla L)\, dt + \sigma\, dW`     :math:`\propto e^{-2\lambda L/\sigma^2}`
==========  ==========================================================  ===============================================

with :math:`d\theta = v\, dt` in the second. Where L is quadratic with curvature h, θ has the variances σ²/(2h) and
σ²/(2λh).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pathkernel._typing import Loss
from pathkernel.dynamics.flow import Flow, check_options
from pathkernel.dynamics.following import GRID, PathOptions, chosen, loss_of
from pathkernel.dynamics.integration import DIVERGED, GROWTH, pieces_of
from pathkernel.dynamics.system import System
from pathkernel.dynamics.times import grid_of
from pathkernel.dynamics.training_loss import TrainingLoss
from pathkernel.errors import FlowError, InputError, is_number


class StochasticSystem(System):
    """A flow with noise, by steps of its own.

    Parameters
    ----------
    loss
        L.
    others
        The parts of y beside θ at t = 0.
    noise
        σ ≥ 0.
    generator
        Where random numbers come from, on the CPU; None for one of its own with the seed 0.
    """

    def __init__(self, loss: TrainingLoss, *others: Tensor, noise: float, generator: torch.Generator | None) -> None:
        super().__init__(loss, *others)
        if not (is_number(noise) and noise >= 0):
            raise InputError(f"`noise={noise!r}` was given", "σ is 0 or more", "Write for example `noise=0.1`")
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise InputError(
                f"`generator={generator!r}` was given",
                "Random numbers are drawn on the CPU, by a generator of torch",
                "Write for example `generator=torch.Generator().manual_seed(0)`",
            )
        self.noise, self.generator = noise, generator

    def drawn(self, like: Tensor) -> Tensor:
        """Standard normal numbers, drawn on the CPU."""
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like)

    @abstractmethod
    def advance(self, parts: Sequence[Tensor], step: float) -> Sequence[Tensor]:
        """The parts of y a step later."""


class Langevin(StochasticSystem):
    """Langevin's equation by the method of Euler and Maruyama."""

    name = "Langevin flow"

    def velocity(self, time: float, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """−∇L, without the noise."""
        return (-self.loss.gradient(parts[0]),)

    def advance(self, parts: Sequence[Tensor], step: float) -> Sequence[Tensor]:
        """θ − h∇L + σ√h ξ."""
        (theta,) = parts
        return (theta - step * self.loss.gradient(theta) + self.noise * math.sqrt(step) * self.drawn(theta),)


class Kramers(StochasticSystem):
    """Kramers' equation by BAOAB: half a kick, half a move, friction and noise, half a move, half a kick.

    Parameters
    ----------
    loss
        L.
    friction
        λ > 0.
    noise, generator
        As for `StochasticSystem`.
    """

    name = "Kramers flow"
    parts = ("theta", "velocity")

    def __init__(self, loss: TrainingLoss, friction: float, noise: float, generator: torch.Generator | None) -> None:
        super().__init__(loss, torch.zeros_like(loss.initial), noise=noise, generator=generator)
        if not (is_number(friction) and friction > 0):
            raise InputError(
                f"`friction={friction!r}` was given",
                "Without friction the noise heats the body for ever: λ is above 0",
                "Write for example `friction=1.0`",
            )
        self.friction = friction
        self._pull: Tensor | None = None

    def velocity(self, time: float, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """(v, −λv − ∇L), without the noise."""
        theta, v = parts
        return v, -self.friction * v - self.loss.gradient(theta)

    def advance(self, parts: Sequence[Tensor], step: float) -> Sequence[Tensor]:
        """One gradient a step: the last kick of a step is of the same gradient as the first of the next."""
        theta, v = parts
        pull = -self.loss.gradient(theta) if self._pull is None else self._pull
        kept = math.exp(-self.friction * step)
        v = v + step / 2 * pull
        theta = theta + step / 2 * v
        heat = self.noise * math.sqrt((1 - kept**2) / (2 * self.friction))
        v = kept * v + heat * self.drawn(v)
        theta = theta + step / 2 * v
        self._pull = -self.loss.gradient(theta)
        return theta, v + step / 2 * self._pull


def langevin(
    model: nn.Module,
    loss: Loss,
    data: Any,
    time: float = 1.0,
    *,
    step: float,
    noise: float,
    generator: torch.Generator | None = None,
    **options: Unpack[PathOptions],
) -> Flow:
    r"""Langevin's equation :math:`d\theta = -\nabla L\, dt + \sigma\, dW` of a network, by Euler and Maruyama.

    What mini-batch noise of constant size would make of gradient descent at the rate ``step``.

    Parameters
    ----------
    model, loss, data, time
        As for `pathkernel.dynamics.gradient_flow`.
    step
        h > 0, the largest step; the variance at a minimum of curvature c comes out larger by 1/(1 − ch/2).
    noise
        σ ≥ 0.
    generator
        Where random numbers come from, on the CPU; None for one of its own with the seed 0, which gives the same path
        every time. The generators of torch and numpy are not touched.
    **options
        See `pathkernel.dynamics.following.PathOptions`.

    Returns
    -------
    Flow
        One path.

    References
    ----------
    Kloeden and Platen 1992, section 10.2.
    """
    times = _times(time, step, options)
    system = Langevin(loss_of(model, loss, data, options), noise=noise, generator=generator)
    return _followed(system, times, step)


def kramers(
    model: nn.Module,
    loss: Loss,
    data: Any,
    time: float = 1.0,
    *,
    step: float,
    friction: float,
    noise: float,
    generator: torch.Generator | None = None,
    **options: Unpack[PathOptions],
) -> Flow:
    r"""Kramers' equation :math:`\ddot\theta + \lambda\dot\theta = -\nabla L + \sigma\xi` of a network, by BAOAB.

    Parameters
    ----------
    model, loss, data, time
        As for `pathkernel.dynamics.gradient_flow`.
    step
        h > 0, the largest step. The variance of θ at a quadratic minimum is exact for every stable h.
    friction
        λ > 0.
    noise
        σ ≥ 0.
    generator
        Where random numbers come from, on the CPU; None for one of its own with the seed 0, which gives the same path
        every time. The generators of torch and numpy are not touched.
    **options
        As for `langevin`.

    Returns
    -------
    Flow
        One path, from rest, with the part ``"velocity"``.

    References
    ----------
    Leimkuhler and Matthews 2013 (1203.5428), section 3.
    """
    times = _times(time, step, options)
    system = Kramers(loss_of(model, loss, data, options), friction, noise, generator)
    return _followed(system, times, step)


def _times(time: float, step: float, options: PathOptions) -> list[float]:
    """Points of time that are kept.

    Raises
    ------
    InputError
        For unknown options, and for times and a step that are none.
    """
    check_options(options, PathOptions, "a flow with noise")
    if not (is_number(step) and step > 0):
        raise InputError(f"`step={step!r}` was given", "A step is a time above 0", "Write for example `step=0.01`")
    return grid_of(time, **chosen(options, GRID))


def _followed(system: StochasticSystem, times: Sequence[float], step: float) -> Flow:
    """One path through the points of time, each reached by equal steps no larger than asked for."""
    parts: Sequence[Tensor] = system.start
    kept, limit = [torch.cat(list(parts))], GROWTH * max(1.0, float(torch.cat(list(parts)).norm()))
    with system.loss.held():
        for before, after in pairwise(times):
            pieces = pieces_of(after - before, step)
            for _ in range(pieces):
                parts = system.advance(parts, (after - before) / pieces)
            state = torch.cat(list(parts))
            if not float(state.norm()) <= limit:
                error = FlowError(
                    f"The {system.name} came to its end between t = {before:.6g} and {after:.6g}: it diverged",
                    f"It was to be followed to t = {times[-1]:.6g}",
                    DIVERGED,
                )
                error.flow = Flow(system, times[: len(kept)], torch.stack(kept), None)
                raise error
            kept.append(state)
    return Flow(system, times, torch.stack(kept), None)
