r"""Gradient flow followed more closely: Heun's and the classical Runge–Kutta method as optimizers.

Gradient descent is Euler's method for :math:`\dot\theta = -\nabla L(\theta)`. An explicit Runge–Kutta method evaluates
the gradient of the same batch at several points of a step,

.. math:: g_j = \nabla L\bigl(\theta - \eta \textstyle\sum_{k<j} a_{jk}\, g_k\bigr),\qquad
          \Delta = -\eta \sum_j b_j\, g_j ,

which is linear in the gradients, given where they were taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from pathkernel.optimizers.closure import Closure, evaluated, received, required
from pathkernel.update_rules.rule import Frozen, Memory, Observation, Settings, UpdateRule


def weighted(coefficients: Sequence[float], gradients: Sequence[Tensor]) -> Tensor:
    """Σ a_k g_k over the gradients that have a coefficient other than 0."""
    terms = [a * g for a, g in zip(coefficients, gradients, strict=True) if a != 0]
    return torch.stack(terms).sum(dim=0)


class RungeKuttaRule(UpdateRule):
    """The rule of a `RungeKutta` optimizer: linear in its gradients, which are taken at frozen points.

    Attributes
    ----------
    weights
        b_j, one for each stage.
    """

    weights: ClassVar[tuple[float, ...]]

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """Where the later gradients were taken, relative to θ_s."""
        # Not copied: the optimizer makes these tensors anew in each step.
        return {key: value for key, value in observed.after.items() if key.startswith("offset_")}

    def step(self, gradient: Any, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """The weighted gradients."""
        return -settings["lr"] * weighted(self.weights, gradient), memory

    def stage_offsets(self, frozen: Frozen, settings: Settings) -> tuple[Tensor | None, ...]:
        """None for the first gradient, which is that at θ_s."""
        return (None, *(frozen[f"offset_{stage}"] for stage in range(1, self.stages)))


class HeunRule(RungeKuttaRule):
    """The rule of `Heun`."""

    name, stages, weights = "Heun", 2, (1 / 2, 1 / 2)


class RungeKutta4Rule(RungeKuttaRule):
    """The rule of `RungeKutta4`."""

    name, stages, weights = "RungeKutta4", 4, (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class RungeKutta(Optimizer):
    """An explicit Runge–Kutta method; a subclass states its tableau.

    Parameters
    ----------
    params
        Parameters, or groups of them.
    lr
        η > 0, the time step.

    Attributes
    ----------
    tableau
        a_jk for k < j, one row for each stage after the first.
    rule
        The rule, which holds the weights b_j.
    """

    tableau: ClassVar[tuple[tuple[float, ...], ...]]
    rule: ClassVar[type[RungeKuttaRule]]

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step; the closure is evaluated once for each stage, on one and the same batch.

        Returns
        -------
        The closure's loss at θ_s. The gradients are left at Σ b_j g_j, that of the step as a whole.
        """
        closure = required(closure, self)
        loss = evaluated(closure)
        moved = [(p, p.clone(), [g.clone()], state, settings) for p, g, state, settings in received(self)]
        for stage, coefficients in enumerate(self.tableau, start=1):
            for p, start, gradients, state, settings in moved:
                state[f"offset_{stage}"] = -settings["lr"] * weighted(coefficients, gradients)
                p.copy_(start + state[f"offset_{stage}"])
            evaluated(closure)
            for p, _, gradients, _, _ in moved:
                gradients.append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
        for p, start, gradients, _, settings in moved:
            p.grad = weighted(self.rule.weights, gradients)
            p.copy_(start - settings["lr"] * p.grad)
        return loss


class Heun(RungeKutta):
    r"""Heun's method, of order 2: the mean of the gradients at both ends of Euler's step.

    .. math:: g_1 = \nabla L(\theta),\quad g_2 = \nabla L(\theta - \eta g_1),\qquad
              \Delta = -\tfrac{\eta}{2}(g_1 + g_2)

    Parameters
    ----------
    params
        Parameters, or groups of them.
    lr
        η > 0, the time step.

    Notes
    -----
    The recorder is given ``rule=Heun.rule()``.
    """

    tableau = ((1.0,),)
    rule = HeunRule


class RungeKutta4(RungeKutta):
    r"""The classical Runge–Kutta method, of order 4.

    .. math:: g_2 = \nabla L(\theta - \tfrac{\eta}{2} g_1),\quad g_3 = \nabla L(\theta - \tfrac{\eta}{2} g_2),\quad
              g_4 = \nabla L(\theta - \eta g_3),\qquad \Delta = -\tfrac{\eta}{6}(g_1 + 2 g_2 + 2 g_3 + g_4)

    Parameters
    ----------
    params
        Parameters, or groups of them.
    lr
        η > 0, the time step.

    Notes
    -----
    The recorder is given ``rule=RungeKutta4.rule()``.

    References
    ----------
    Hairer, Nørsett and Wanner 1993, Solving Ordinary Differential Equations I, section II.1.
    """

    tableau = ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0))
    rule = RungeKutta4Rule
