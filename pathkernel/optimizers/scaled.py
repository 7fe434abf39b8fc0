r"""Steepest descent in other norms: steps whose length is set by a number or by each entry's own size.

The scale is computed from the gradient and then frozen, under which each step is linear in gradient and momentum:

- scalar RMSprop, :math:`-\eta\, g / (\sqrt{r} + \epsilon)`: one number, from the running average r of ‖g‖²;
- normalised descent, :math:`-\eta\, g / \lVert g\rVert`: one number;
- Polyak's step, :math:`-\eta\, g\,(L - L_*) / \lVert g\rVert^2`: one number;
- sign descent, :math:`-\eta \operatorname{sign} g`: 1/\|g\|, entry by entry;
- Lion, :math:`-\eta \operatorname{sign} c` with c a mixture of g and momentum: 1/\|c\|, entry by entry.

A number for all parameters is kept in the parameter groups, beside ``lr``, where the recorder reads it with the other
settings.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pathkernel.optimizers.closure import Closure, evaluated, received, required
from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule


def squared_norm(optimizer: Optimizer) -> float:
    """‖g‖² over all parameters of all groups."""
    return sum(gradient.double().square().sum().item() for _, gradient, _, _ in received(optimizer))


def reciprocal(number: float) -> float:
    """1/x, and 0 at 0: without a gradient there is no step."""
    return 1 / number if number else 0.0


def reciprocal_sizes(values: Tensor) -> Tensor:
    """1/|x| entry by entry, and 0 at 0."""
    return torch.where(values == 0, 0, 1 / values.abs())


# -- one number for all parameters -------------------------------------------------------------------------------------


class ScalarRule(UpdateRule):
    r"""The rule of steps :math:`\Delta = -\eta\,\sigma\,g` with one frozen number σ, the setting ``scale``."""

    name = "scaled gradient descent"

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """Gradient descent at the rate ησ."""
        return -settings["lr"] * settings["scale"] * gradient, memory


def _descend(optimizer: Optimizer) -> None:
    """θ⁺ = θ − ησg."""
    for p, gradient, _, settings in received(optimizer):
        p.sub_(gradient, alpha=settings["lr"] * settings["scale"])


class ScalarRMSprop(Optimizer):
    r"""RMSprop with one running average for all parameters: it sets the length of the step and leaves its direction.

    .. math:: r^+ = \alpha r + (1 - \alpha) \lVert g\rVert^2,\qquad \Delta = -\frac{\eta}{\sqrt{r^+} + \epsilon}\, g

    Parameters
    ----------
    params
        Parameters, or groups of them.
    lr
        η > 0, about the length of the step in θ.
    alpha
        Memory of the average, from 0 up to 1.
    eps
        ε ≥ 0, outside the root.

    Notes
    -----
    The recorder is given ``rule=ScalarRMSprop.rule()``. The average starts at 0 and is not corrected for it, as in
    `torch.optim.RMSprop`.
    """

    rule = ScalarRule

    def __init__(self, params: Any, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "square_average": 0.0, "scale": 0.0})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step; returns the closure's loss."""
        loss, squared = evaluated(closure), squared_norm(self)
        for group in self.param_groups:
            group["square_average"] = group["alpha"] * group["square_average"] + (1 - group["alpha"]) * squared
            group["scale"] = reciprocal(math.sqrt(group["square_average"]) + group["eps"])
        _descend(self)
        return loss


class NormalizedDescent(Optimizer):
    r"""Normalised gradient descent: steepest descent with steps of Euclidean length η.

    .. math:: \Delta = -\eta\, \frac{g}{\lVert g\rVert}

    Parameters
    ----------
    params
        Parameters, or groups of them; the norm is that of all together.
    lr
        η > 0, the length of the step in θ.

    Notes
    -----
    The recorder is given ``rule=NormalizedDescent.rule()``.
    """

    rule = ScalarRule

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "scale": 0.0})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step; returns the closure's loss."""
        loss, norm = evaluated(closure), math.sqrt(squared_norm(self))
        for group in self.param_groups:
            group["scale"] = reciprocal(norm)
        _descend(self)
        return loss


class PolyakStep(Optimizer):
    r"""Gradient descent with Polyak's step size, which would reach L_* in one step if the loss were linear.

    .. math:: \Delta = -\eta\, \frac{L - L_*}{\lVert g\rVert^2}\, g

    It discretises the flow :math:`\dot\theta = -(L - L_*)\,\nabla L/\lVert\nabla L\rVert^2`, along which
    :math:`L(t) - L_* = (L(0) - L_*)\, e^{-t}` whatever the loss.

    Parameters
    ----------
    params
        Parameters, or groups of them.
    lr
        η > 0, the time step: 1 is Polyak's method.
    minimum
        L_*, the smallest value of the loss.

    Notes
    -----
    The recorder is given ``rule=PolyakStep.rule()``.

    References
    ----------
    Polyak 1987, Introduction to Optimization, section 5.3.
    """

    rule = ScalarRule

    def __init__(self, params: Any, lr: float = 1.0, minimum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "minimum": minimum, "scale": 0.0})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step, whose size needs the closure's loss; returns that loss."""
        loss = evaluated(required(closure, self))
        for group in self.param_groups:
            group["scale"] = (float(loss) - group["minimum"]) * reciprocal(squared_norm(self))
        _descend(self)
        return loss


# -- one number for each entry -----------------------------------------------------------------------------------------


class SignDescentRule(UpdateRule):
    """The rule of `SignDescent`: sign g = g / abs(g), with 1 / abs(g) frozen."""

    name = "sign descent"

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """Scale 1 / abs(g)."""
        return {"scale": reciprocal_sizes(observed.gradient)}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """The gradient over its own size."""
        return -settings["lr"] * gradient * frozen["scale"], memory


class SignDescent(Optimizer):
    r"""Sign descent: steepest descent in the maximum norm, along which :math:`\dot L = -\lVert\nabla L\rVert_1`.

    .. math:: \Delta = -\eta \operatorname{sign} g

    Parameters
    ----------
    params
        Parameters, or groups of them.
    lr
        η > 0, how far each entry moves.

    Notes
    -----
    The recorder is given ``rule=SignDescent.rule()``.

    References
    ----------
    Bernstein et al. 2018 (1802.04434).
    """

    rule = SignDescentRule

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step; returns the closure's loss."""
        loss = evaluated(closure)
        for p, gradient, _, settings in received(self):
            p.sub_(gradient.sign(), alpha=settings["lr"])
        return loss


class LionRule(UpdateRule):
    """The rule of `Lion`: sign c = c / abs(c), with 1 / abs(c) frozen; c and m⁺ are linear in gradient and momentum."""

    name = "Lion"
    memory = ("exp_avg",)
    observes = Observes(before=("exp_avg",), after=None)

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """Scale 1 / abs(c)."""
        moment = observed.before.get("exp_avg", torch.zeros_like(observed.parameter))
        return {"scale": reciprocal_sizes(_mixed(moment, observed.gradient, settings["betas"][0]))}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """The mixture over its own size."""
        (moment,), (beta, memory_beta) = memory, settings["betas"]
        direction = _mixed(moment, gradient, beta) * frozen["scale"]
        return -settings["lr"] * direction, (_mixed(moment, gradient, memory_beta),)

    def displacement_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Decoupled weight decay: −ηλθ."""
        decay = settings["lr"] * settings["weight_decay"]
        return {"weight_decay": -decay * parameter} if decay else {}


class Lion(Optimizer):
    r"""Lion (evolved sign momentum), as published.

    .. math:: c = \beta_1 m + (1 - \beta_1) g,\qquad \Delta = -\eta\,(\operatorname{sign} c + \lambda\theta),\qquad
              m^+ = \beta_2 m + (1 - \beta_2) g

    Parameters
    ----------
    params
        Parameters, or groups of them.
    lr
        η > 0, how far each entry moves.
    betas
        β₁ of the direction and β₂ of the momentum.
    weight_decay
        λ ≥ 0, decoupled.

    Notes
    -----
    The recorder is given ``rule=Lion.rule()``.

    References
    ----------
    Chen et al. 2023 (2302.06675), Algorithm 2.
    """

    rule = LionRule

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step; returns the closure's loss."""
        loss = evaluated(closure)
        for p, gradient, state, settings in received(self):
            moment, (beta, memory_beta) = state.setdefault("exp_avg", torch.zeros_like(p)), settings["betas"]
            direction = _mixed(moment, gradient, beta).sign()
            p.sub_(direction + settings["weight_decay"] * p, alpha=settings["lr"])
            moment.copy_(_mixed(moment, gradient, memory_beta))
        return loss


def _mixed(moment: Tensor, gradient: Tensor, beta: float) -> Tensor:
    """βm + (1 − β)g."""
    return beta * moment + (1 - beta) * gradient
