r"""Momentum as the motion of a body with friction: heavy ball, Nesterov, and the look-ahead halfway between.

A body at θ that is pulled by −∇L and slowed by friction λ moves by

.. math:: \ddot\theta + \lambda\dot\theta = -\nabla L(\theta) .

With central differences over time steps γ,

.. math:: \frac{\theta_{s+1} - 2\theta_s + \theta_{s-1}}{\gamma^2} +
          \lambda\,\frac{\theta_{s+1} - \theta_{s-1}}{2\gamma} = -\nabla L(\theta_s) ,

it becomes the leapfrog scheme

.. math:: \theta_{s+1} = \theta_s + \beta (\theta_s - \theta_{s-1}) - \alpha \nabla L(\theta_s),\qquad
          \beta = \frac{1 - \lambda\gamma/2}{1 + \lambda\gamma/2},\quad
          \alpha = \frac{\gamma^2}{1 + \lambda\gamma/2},

which is the heavy ball. Nesterov's method takes the gradient at :math:`\theta_s + \beta(\theta_s - \theta_{s-1})`,
where inertia alone would carry the body in the whole step; the "β/2" form takes it at
:math:`\theta_s + \tfrac{\beta}{2}(\theta_s - \theta_{s-1})`, the middle of that way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pathkernel.errors import InputError, is_number
from pathkernel.optimizers.closure import Closure, evaluated, received, required
from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule

ROUNDING = 1e-12
"""How far a product of friction and time step may be beyond 2, where momentum is 0."""


def leapfrog(time_step: float, friction: float) -> dict[str, float]:
    """Rate α and momentum β that follow the body with friction: ``Momentum(parameters, **leapfrog(0.3, 1.0))``.

    Parameters
    ----------
    time_step
        γ > 0.
    friction
        λ ≥ 0, in inverse time; λγ ≤ 2 keeps β from falling below 0.

    Returns
    -------
    ``lr``, which is α, and ``momentum``, which is β.

    Raises
    ------
    InputError
        For other values.

    Examples
    --------
    >>> leapfrog(time_step=0.5, friction=0.8)
    {'lr': 0.208..., 'momentum': 0.666...}
    """
    if not (is_number(time_step) and time_step > 0 and is_number(friction) and friction >= 0):
        raise InputError(
            f"`leapfrog(time_step={time_step!r}, friction={friction!r})` was asked for",
            "A time step is above 0, and friction 0 or more",
            "Write for example `leapfrog(time_step=0.1, friction=1.0)`",
        )
    if friction * time_step > 2 + ROUNDING:
        raise InputError(
            f"`leapfrog(time_step={time_step!r}, friction={friction!r})` was asked for",
            "Their product is 2 or less: beyond, momentum would be below 0",
            f"Write a time step of {2 / friction:.4g} or less",
        )
    slowed = 1 + friction * time_step / 2
    return {"lr": time_step**2 / slowed, "momentum": max(0.0, 1 - friction * time_step / 2) / slowed}


class MomentumRule(UpdateRule):
    """The rule of `Momentum`: linear in the gradient, which is taken ahead of θ_s, and in the velocity."""

    name = "Momentum"
    memory = ("velocity",)
    observes = Observes(before=("velocity",), after=None)

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """How far ahead the gradient was taken: κμv."""
        velocity = observed.before.get("velocity")
        if velocity is None:
            return {"ahead": torch.zeros_like(observed.parameter)}
        return {"ahead": _ahead(velocity, settings)}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """The new velocity is the displacement."""
        velocity = settings["momentum"] * memory[0] - settings["lr"] * gradient
        return velocity, (velocity,)

    def stage_offsets(self, frozen: Frozen, settings: Settings) -> tuple[Tensor | None, ...]:
        """Ahead along the velocity."""
        return (frozen["ahead"],)


class Momentum(Optimizer):
    r"""Heavy ball, Nesterov, or in between, by where the gradient is taken.

    .. math:: v^+ = \mu v - \eta\,\nabla L(\theta + \kappa\mu v),\qquad \theta^+ = \theta + v^+

    Parameters
    ----------
    params
        Parameters, or groups of them.
    lr
        η > 0.
    momentum
        μ, from 0 up to 1.
    look_ahead
        κ: 1 is Nesterov's method, ½ the "β/2" form, 0 the heavy ball.

    Notes
    -----
    `torch.optim.SGD(nesterov=True)` is another form: it takes the gradient at θ_s itself, and equals this one in the
    variable θ + μv.

    The recorder is given ``rule=Momentum.rule()``.

    References
    ----------
    Polyak 1964; Nesterov 1983; Sutskever et al. 2013, section 2, equations 3–4.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> from pathkernel.optimizers.momentum import Momentum
    >>> X, y = torch.randn(32, 4), torch.randn(32, 1)
    >>> model, loss = torch.nn.Linear(4, 1), torch.nn.MSELoss()
    >>> nesterov = Momentum(model.parameters(), lr=0.1, momentum=0.9)
    >>> with pk.KernelRecorder(model, nesterov, loss, data=(X, y), rule=Momentum.rule()) as recorder:
    ...     for x, target in recorder.batches(batch_size=8):
    ...         def closure():
    ...             nesterov.zero_grad()
    ...             value = loss(model(x), target)
    ...             value.backward()
    ...             return value
    ...         value = nesterov.step(closure)
    """

    rule = MomentumRule

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, look_ahead: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "look_ahead": look_ahead})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step; the closure is evaluated once, at the look-ahead point.

        Returns
        -------
        The closure's loss there.
        """
        start = self._coast()
        loss = evaluated(required(closure, self))
        for p, before in start.items():
            p.copy_(before)
        for p, gradient, state, settings in received(self):
            velocity = state.setdefault("velocity", torch.zeros_like(p))
            velocity.mul_(settings["momentum"]).sub_(gradient, alpha=settings["lr"])
            p.add_(velocity)
        return loss

    def _coast(self) -> dict[Tensor, Tensor]:
        """Move on to where the gradient is taken, and return where that began."""
        start = {}
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].get("velocity") if p in self.state else None
                if velocity is not None and p.requires_grad:
                    start[p] = p.clone()
                    p.add_(_ahead(velocity, group))
        return start


def _ahead(velocity: Tensor, settings: Settings) -> Tensor:
    """κμv, by the same operations for the optimizer and for its record."""
    return settings["look_ahead"] * settings["momentum"] * velocity
