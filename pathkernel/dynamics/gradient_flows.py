r"""Flows of first order: gradient flow, steepest descent in a norm, Polyak's flow.

=========================  =================================================  ==========================
flow                       :math:`\dot\theta`                                 :math:`\dot L`
=========================  =================================================  ==========================
gradient flow              −∇L                                                −‖∇L‖²
steepest descent           d(∇L), the steepest direction of norm 1            −‖∇L‖_*
Polyak                     −(L − L_*) ∇L / ‖∇L‖²                              −(L − L_*)
=========================  =================================================  ==========================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pathkernel._typing import Loss
from pathkernel.dynamics.flow import Flow
from pathkernel.dynamics.following import FlowOptions, flow_of
from pathkernel.dynamics.integration import Stopped
from pathkernel.dynamics.system import System
from pathkernel.dynamics.training_loss import TrainingLoss
from pathkernel.errors import InputError, is_number
from pathkernel.optimizers.norms import Norm, norm_of


class GradientFlow(System):
    r"""Gradient flow, :math:`\dot\theta = -\nabla L`."""

    name, is_gradient_flow = "gradient flow", True

    def velocity(self, time: float, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """−∇L."""
        return (-self.loss.gradient(parts[0]),)


def gradient_flow(model: nn.Module, loss: Loss, data: Any, time: float = 1.0, **options: Unpack[FlowOptions]) -> Flow:
    r"""Gradient flow :math:`\dot\theta = -\nabla L(\theta)` of a network on its data, from where it stands.

    Gradient descent at a rate η is Euler's method for it, with time steps η.

    Parameters
    ----------
    model
        The network, in the modes that it is to run in; it is left as it is.
    loss
        ``(output, target)`` to a scalar, or one number per sample.
    data
        ``(X, y)``, or a map-style Dataset of (input, target): all samples count at once.
    time
        How long.
    **options
        See `pathkernel.dynamics.following.FlowOptions`.

    Returns
    -------
    Flow
        θ, loss, outputs and path kernel along it.

    Raises
    ------
    FlowError
        Where it diverges, or needs more steps than allowed; ``error.flow`` is the flow up to there.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X, y = torch.randn(16, 4), torch.randn(16, 1)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> flow = pk.dynamics.gradient_flow(model, torch.nn.MSELoss(), (X, y), time=2.0)
    >>> bool(flow.losses[-1] < flow.losses[0])
    True
    >>> flow.path_kernel(X[:3]).shape
    (3, 3)
    """
    return flow_of(GradientFlow, model, loss, data, time, options)


class SteepestDescent(System):
    r"""Steepest descent in a norm, :math:`\dot\theta = d(\nabla L)`, a direction of norm 1.

    Parameters
    ----------
    loss
        L.
    norm
        The norm.
    """

    name = "flow of steepest descent"

    def __init__(self, loss: TrainingLoss, norm: Norm) -> None:
        super().__init__(loss)
        self.norm = norm

    def velocity(self, time: float, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """The steepest direction, 0 where ∇L is."""
        layout = self.loss.function.layout
        gradients = list(layout.unflatten(self.loss.gradient(parts[0])).values())
        ascent = self.norm.ascent(gradients)
        return (-torch.cat([direction.reshape(-1) for direction in ascent]),)

    def slope(self, theta: Tensor) -> float:
        r"""Rate −‖∇L‖_* at which L falls."""
        gradients = self.loss.function.layout.unflatten(self.loss.gradient(theta))
        return -float(self.norm.dual(list(gradients.values())))


def steepest_flow(
    model: nn.Module,
    loss: Loss,
    data: Any,
    time: float = 1.0,
    *,
    norm: str = "l2",
    **options: Unpack[FlowOptions],
) -> Flow:
    r"""Steepest descent in a norm as a flow, along which :math:`\dot L = -\lVert\nabla L\rVert_*`.

    ========================  ==========================================================
    norm                      its steps at a rate η: an optimizer of `pathkernel.optimizers`
    ========================  ==========================================================
    ``"l2"``                  `NormalizedDescent`
    ``"linf"``                `SignDescent`
    ``"l1"``                  `CoordinateDescent`
    ``"spectral"``            `SpectralDescent`, which is Muon without momentum
    ========================  ==========================================================

    Parameters
    ----------
    model, loss, data, time
        As for `gradient_flow`.
    norm
        See `pathkernel.optimizers.norms`.
    **options
        See `pathkernel.dynamics.following.FlowOptions`.

    Returns
    -------
    Flow
        Its speed has norm 1 throughout: where L is least it cannot stop, and an adaptive method takes ever smaller
        steps there, up to ``max_steps``.

    Raises
    ------
    FlowError
        With the flow up to where it could not go on.
    """
    chosen = norm_of(norm)
    return flow_of(lambda own: SteepestDescent(own, chosen), model, loss, data, time, options)


def sign_flow(model: nn.Module, loss: Loss, data: Any, time: float = 1.0, **options: Unpack[FlowOptions]) -> Flow:
    r"""Sign flow :math:`\dot\theta = -\operatorname{sign}\nabla L`: steepest descent in the maximum norm.

    Parameters
    ----------
    model, loss, data, time, **options
        As for `steepest_flow`.

    Returns
    -------
    Flow
        Along it :math:`\dot L = -\lVert\nabla L\rVert_1`. `pathkernel.optimizers.SignDescent` discretises it.
    """
    return steepest_flow(model, loss, data, time, norm="linf", **options)


STATIONARY = 1e-12
"""Part of ‖∇L‖² / (L − L_*) at the start below which Polyak's flow is at a stationary point: its speed has no bound."""


class PolyakFlow(System):
    r"""Polyak's flow, :math:`\dot\theta = -(L - L_*)\,\nabla L / \lVert\nabla L\rVert^2`.

    Parameters
    ----------
    loss
        L.
    minimum
        L_*.
    """

    name = "Polyak flow"

    def __init__(self, loss: TrainingLoss, minimum: float = 0.0) -> None:
        super().__init__(loss)
        self.minimum = minimum
        value, gradient = loss.value_and_gradient(loss.initial)
        if not (is_number(minimum) and minimum <= float(value)):
            raise InputError(
                f"`minimum={minimum!r}` was given, and the loss starts at {float(value):.6g}",
                "L_* is the smallest value of the loss, a number no larger than any",
                "Write `minimum=0.0`, or what is known of the loss",
            )
        self._steepness = self._ratio(value, gradient)

    def _ratio(self, value: Tensor, gradient: Tensor) -> float:
        excess = abs(float(value) - self.minimum)
        return float(gradient @ gradient) / excess if excess else float("inf")

    def velocity(self, time: float, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """The direction of the gradient, as fast as makes L − L_* fall like its own size."""
        value, gradient = self.loss.value_and_gradient(parts[0])
        excess = value - self.minimum
        if excess == 0:  # where the flow has come to its end
            return (torch.zeros_like(gradient),)
        if not self._ratio(value, gradient) > STATIONARY * self._steepness:
            raise Stopped(
                f"θ is at a stationary point, where ∇L is 0 and L = {float(value):.6g}, above L_* = {self.minimum:.6g}",
                "Look at the flow up to there, `error.flow`; write `minimum=` if L is not 0 at its least. The discrete "
                "`pathkernel.optimizers.PolyakStep` may step across",
            )
        return (-excess / (gradient @ gradient) * gradient,)


def polyak_flow(
    model: nn.Module,
    loss: Loss,
    data: Any,
    time: float = 1.0,
    *,
    minimum: float = 0.0,
    **options: Unpack[FlowOptions],
) -> Flow:
    r"""Polyak's flow, along which :math:`L(t) - L_* = (L(0) - L_*)\, e^{-t}` whatever the loss.

    .. math:: \dot\theta = -\frac{L - L_*}{\lVert\nabla L\rVert^2}\, \nabla L

    Parameters
    ----------
    model, loss, data, time
        As for `gradient_flow`.
    minimum
        L_*, the smallest value of the loss.
    **options
        See `pathkernel.dynamics.following.FlowOptions`.

    Returns
    -------
    Flow
        `pathkernel.optimizers.PolyakStep` discretises it.

    Raises
    ------
    FlowError
        At a stationary point above L_*, which the flow reaches in finite time: at log((L(0) − L_*) / (L − L_*)).
    """
    return flow_of(lambda own: PolyakFlow(own, minimum), model, loss, data, time, options)
