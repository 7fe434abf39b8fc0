r"""Flows of second order: a body that −∇L pulls, with friction.

.. math:: \dot\theta = v,\qquad \dot v = -\lambda(t)\, v - \nabla L(\theta)

Constant λ is the flow of the heavy ball, and of Nesterov's method with constant momentum; λ = 3/t that of Nesterov's
method with momentum (k − 1)/(k + 2). The energy :math:`L + \tfrac12 \lVert v\rVert^2` falls by what friction takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from pathkernel._typing import Loss
from pathkernel.dynamics.flow import Flow
from pathkernel.dynamics.following import FlowOptions, flow_of
from pathkernel.dynamics.system import System
from pathkernel.dynamics.training_loss import TrainingLoss
from pathkernel.errors import InputError, is_number, is_whole
from pathkernel.optimizers.momentum import leapfrog


class MomentumFlow(System):
    """The body with friction, at rest at t = 0, and the energy that friction has taken from it.

    Parameters
    ----------
    loss
        L.
    friction
        λ; None for 3/t.
    """

    name = "momentum flow"
    parts = ("theta", "velocity", "dissipated")

    def __init__(self, loss: TrainingLoss, friction: float | None) -> None:
        super().__init__(loss, torch.zeros_like(loss.initial), loss.initial.new_zeros(1))
        if friction is not None and not (is_number(friction) and friction >= 0):
            raise InputError(
                f"`friction={friction!r}` was given",
                "Friction is 0 or more, in inverse time; None stands for 3/t",
                "Write for example `friction=1.0`",
            )
        self.friction = friction

    def velocity(self, time: float, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """(v, −λv − ∇L, λ‖v‖²)."""
        theta, v, _ = parts
        gradient = self.loss.gradient(theta)
        if self.friction is None and time == 0:
            # From rest v = at, and a = −3a − ∇L: a quarter of the pull.
            return v, -gradient / 4, torch.zeros_like(parts[2])
        friction = 3 / time if self.friction is None else self.friction
        return v, -friction * v - gradient, friction * (v @ v).reshape(1)

    def time_of_step(self, settings: Mapping[str, Any]) -> float:
        """√α under friction 3/t, else that of the leapfrog scheme."""
        if self.friction is None:
            return math.sqrt(float(settings["lr"]))
        return body_of(float(settings["lr"]), float(settings.get("momentum", 0.0)))["time_step"]


class NesterovFlow(MomentumFlow):
    """The same under the name of Nesterov's method."""

    name = "Nesterov flow"


def momentum_flow(
    model: nn.Module,
    loss: Loss,
    data: Any,
    time: float = 1.0,
    *,
    friction: float = 1.0,
    **options: Unpack[FlowOptions],
) -> Flow:
    r"""Flow of the heavy ball, :math:`\ddot\theta + \lambda\dot\theta = -\nabla L(\theta)`, from rest.

    ``torch.optim.SGD(parameters, **leapfrog(time_step, friction))`` discretises it by the leapfrog scheme.

    Parameters
    ----------
    model, loss, data, time
        As for `gradient_flow`.
    friction
        λ ≥ 0, in inverse time.
    **options
        See `pathkernel.dynamics.following.FlowOptions`.

    Returns
    -------
    Flow
        With the parts ``"velocity"`` and ``"dissipated"``, and an `energy_ledger`.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X, y = torch.randn(16, 4), torch.randn(16, 1)
    >>> flow = pk.dynamics.momentum_flow(torch.nn.Linear(4, 1), torch.nn.MSELoss(), (X, y), time=2.0, friction=0.5)
    >>> bool(pk.dynamics.energy_ledger(flow).residual < 1e-6)
    True
    """
    return flow_of(lambda own: MomentumFlow(own, friction), model, loss, data, time, options)


def nesterov_flow(
    model: nn.Module,
    loss: Loss,
    data: Any,
    time: float = 1.0,
    *,
    friction: float | None = None,
    **options: Unpack[FlowOptions],
) -> Flow:
    r"""Flow of Nesterov's method, :math:`\ddot\theta + \tfrac3t\dot\theta = -\nabla L(\theta)`, from rest.

    Its discrete map takes time steps √α: ``Momentum(parameters, lr=α, look_ahead=1)``, whose momentum is set to
    `nesterov_momentum` (k) before step k = 1, 2, …

    Parameters
    ----------
    model, loss, data, time
        As for `gradient_flow`.
    friction
        None for 3/t; a number for Nesterov's method with constant momentum, whose flow is that of the heavy ball.
    **options
        See `pathkernel.dynamics.following.FlowOptions`.

    Returns
    -------
    Flow
        With the parts ``"velocity"`` and ``"dissipated"``, and an `energy_ledger`.

    References
    ----------
    Su, Boyd and Candès 2014 (1503.01243), equation 3.
    """
    return flow_of(lambda own: NesterovFlow(own, friction), model, loss, data, time, options)


@dataclass(frozen=True)
class EnergyLedger:
    r"""Energies of a body with friction, whose sum is constant.

    .. math:: L + \tfrac12\lVert v\rVert^2 + \int_0^t \lambda\lVert v\rVert^2 dt = L(0)

    Attributes
    ----------
    times
        (T,).
    potential
        L, (T,).
    kinetic
        ½‖v‖², (T,).
    dissipated
        What friction has taken so far, (T,).
    """

    times: np.ndarray
    potential: np.ndarray
    kinetic: np.ndarray
    dissipated: np.ndarray

    @property
    def residual(self) -> float:
        """Largest difference of the sum from L(0), relative to the largest amount that went from one to another."""
        total = self.potential + self.kinetic + self.dissipated
        moved = max(np.abs(self.potential - self.potential[0]).max(), np.finfo(float).tiny)
        return float(np.abs(total - total[0]).max() / moved)


def energy_ledger(flow: Flow) -> EnergyLedger:
    """Energies along a momentum flow.

    Parameters
    ----------
    flow
        Of `momentum_flow` or `nesterov_flow`.

    Raises
    ------
    InputError
        For a flow without inertia, and for what is no flow.
    """
    if not (isinstance(flow, Flow) and isinstance(flow.system, MomentumFlow)):
        asked = flow.system.name if isinstance(flow, Flow) else type(flow).__name__
        raise InputError(
            f"An energy ledger was asked of a {asked}",
            "Kinetic energy is that of flows with inertia",
            "Write `momentum_flow(...)` or `nesterov_flow(...)`",
        )
    velocity, dissipated = flow.part("velocity"), flow.part("dissipated")
    kinetic = velocity.square().sum(dim=1) / 2
    return EnergyLedger(flow.times, flow.losses, kinetic.cpu().numpy(), dissipated[:, 0].cpu().numpy())


# -- discrete maps -----------------------------------------------------------------------------------------------------


def body_of(lr: float, momentum: float) -> dict[str, float]:
    r"""The body with friction that a heavy ball follows, the inverse of `pathkernel.optimizers.leapfrog`.

    .. math:: \gamma = \sqrt{\frac{2\alpha}{1 + \beta}},\qquad \lambda = \frac2\gamma\,\frac{1 - \beta}{1 + \beta}

    Parameters
    ----------
    lr
        α > 0.
    momentum
        β, from 0 to 1.

    Returns
    -------
    ``time_step``, which is γ, and ``friction``, which is λ.

    Examples
    --------
    >>> from pathkernel.optimizers import leapfrog
    >>> body = body_of(**leapfrog(time_step=0.5, friction=0.8))
    >>> round(body["time_step"], 6), round(body["friction"], 6)
    (0.5, 0.8)
    """
    if not (is_number(lr) and lr > 0 and is_number(momentum) and 0 <= momentum <= 1):
        raise InputError(
            f"`body_of(lr={lr!r}, momentum={momentum!r})` was asked for",
            "A heavy ball has a rate above 0 and a momentum from 0 to 1",
            "Write for example `body_of(lr=0.1, momentum=0.9)`",
        )
    time_step = math.sqrt(2 * lr / (1 + momentum))
    return {"time_step": time_step, "friction": 2 / time_step * (1 - momentum) / (1 + momentum)}


def momentum_at_rate(lr: float, momentum: float, new_lr: float) -> dict[str, float]:
    r"""The β-rule: what momentum becomes when the rate changes and the friction stays what it is.

    .. math:: \gamma' = \frac{\alpha'\lambda}{4} + \sqrt{\Bigl(\frac{\alpha'\lambda}{4}\Bigr)^2 + \alpha'},\qquad
              \beta' = \frac{1 - \lambda\gamma'/2}{1 + \lambda\gamma'/2}

    with λ of `body_of`: γ' solves α' = γ'² / (1 + λγ'/2). The last displacement v = θ_s − θ_{s−1}, which is a velocity
    times γ, is multiplied by γ'/γ.

    Parameters
    ----------
    lr, momentum
        α and β so far.
    new_lr
        α'.

    Returns
    -------
    ``lr`` and ``momentum`` for the optimizer's groups; ``velocity_factor``, γ'/γ, for the state ``velocity`` of
    `pathkernel.optimizers.Momentum`; ``buffer_factor``, that times α/α', for the ``momentum_buffer`` of
    `torch.optim.SGD`, which is −v/α.
    """
    if not (is_number(new_lr) and new_lr > 0):
        raise InputError(
            f"`new_lr={new_lr!r}` was given", "A rate is a number above 0", "Write for example `new_lr=0.01`"
        )
    body = body_of(lr, momentum)
    quarter = new_lr * body["friction"] / 4
    time_step = quarter + math.sqrt(quarter**2 + new_lr)
    factor = time_step / body["time_step"]
    changed = leapfrog(time_step, body["friction"])
    return {
        "lr": new_lr,
        "momentum": changed["momentum"],
        "velocity_factor": factor,
        "buffer_factor": factor * lr / new_lr,
    }


def nesterov_momentum(step: int) -> float:
    """Momentum (k − 1)/(k + 2) before step k = 1, 2, … of Nesterov's method, under which its friction is 3/t.

    Raises
    ------
    InputError
        For what is no number of a step, counted from 1.
    """
    if not (is_whole(step) and step >= 1):
        raise InputError(
            f"`nesterov_momentum({step!r})` was asked for", "Steps are counted from 1", "Write `nesterov_momentum(1)`"
        )
    return (step - 1) / (step + 2)
