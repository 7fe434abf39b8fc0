r"""The adjoint of one optimizer step, applied to blocks of columns.

Of Q cotangents, a block of columns at a time:

.. math:: u_s = a_s \circ q + \sum_k c_{sk} \circ \mu_k^+,\qquad
          \mu_j = b_j \circ q + \sum_k d_{jk} \circ \mu_k^+

For an elementwise rule the coefficients are what the step makes of a vector of ones in each of its inputs, found once
a step for all queries; other rules are differentiated (`pathkernel.update_rules.rule.adjoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathkernel.trajectory.step import Step
from pathkernel.update_rules.rule import Frozen, Settings, UpdateRule, adjoint

Coefficient = float | Tensor
"""Number for all entries of a parameter, or a tensor with one for each."""

Scaled = tuple[Tensor | None, float]
"""Cotangents as a matrix times a number; None where they are zero."""


@dataclass(frozen=True)
class Linear:
    """Coefficients by which an elementwise step multiplies each of its inputs.

    Attributes
    ----------
    gradients
        For each gradient of the step, a and then c for each memory slot.
    memory
        For each memory slot, b and then d for each memory slot.
    """

    gradients: tuple[tuple[Coefficient, ...], ...]
    memory: tuple[tuple[Coefficient, ...], ...]

    @property
    def rate(self) -> float | None:
        """A scalar a of a step that takes one gradient and puts nothing into its memory; else None."""
        forgets = all(row[0] == 0.0 for row in self.memory if not isinstance(row[0], Tensor))
        dense = any(isinstance(row[0], Tensor) for row in self.memory)
        a = self.gradients[0][0]
        return a if len(self.gradients) == 1 and forgets and not dense and isinstance(a, float) else None

    @property
    def ratio(self) -> float | None:
        """ρ where u = ρ μ: one gradient, one slot, and both rows proportional; else None."""
        if len(self.gradients) != 1 or len(self.memory) != 1:
            return None
        (a, c), (b, d) = self.gradients[0], self.memory[0]
        if isinstance(c, Tensor) or isinstance(d, Tensor) or d == 0.0:
            return None
        rho = c / d
        return rho if _close(a, b, rho) else None


def _close(a: Coefficient, b: Coefficient, rho: float) -> bool:
    """A = ρ b, to a few roundings of float64."""
    left, right = (torch.as_tensor(value, dtype=torch.float64) for value in (a, b))
    right = right * rho
    return bool(((left - right).abs() <= 1e-14 * left.abs()).all())


def linear(rule: UpdateRule, frozen: Frozen, settings: Settings, shape: torch.Size) -> Linear:
    """The coefficients of one parameter's step under an elementwise rule, float64."""
    # Where nothing frozen has the parameter's shape, one entry stands for all.
    shaped = [value for value in frozen.values() if isinstance(value, Tensor) and value.numel() > 1]
    device = shaped[0].device if shaped else None
    one = torch.ones(shape if shaped else (), dtype=torch.float64, device=device)
    zero = torch.zeros_like(one)
    slots = len(rule.memory)
    rows = []
    for place in range(rule.stages + slots):
        inputs = [one if place == other else zero for other in range(rule.stages + slots)]
        gradients = inputs[: rule.stages]
        memory = tuple(inputs[rule.stages :])
        delta, after = rule.step(gradients[0] if rule.stages == 1 else tuple(gradients), memory, frozen, settings)
        rows.append(tuple(_coefficient(value) for value in (delta, *after)))
    return Linear(tuple(rows[: rule.stages]), tuple(rows[rule.stages :]))


def _coefficient(values: Tensor) -> Coefficient:
    flat = values.reshape(-1)
    first = flat[0].item()
    return first if len(flat) == 1 or bool((flat == first).all()) else flat


class StepAdjoint:
    """The adjoint of one step, parameter by parameter.

    Parameters
    ----------
    rule, step
        The step, and its optimizer's rule.
    shapes
        Shape of each parameter by name.
    """

    def __init__(self, rule: UpdateRule, step: Step, shapes: dict[str, torch.Size]) -> None:
        self.rule = rule
        self.step = step
        self.shapes = shapes
        self._linear: dict[Any, Linear] = {}

    def linear(self, name: str) -> Linear | None:
        """The coefficients of a parameter, found once; None where the rule is not elementwise."""
        frozen = self.step.frozen[name]
        settings = self.step.hyperparameters_of(name)
        rule = self.rule.of(settings)
        if not rule.elementwise:
            return None
        shared = all(isinstance(value, (bool, int, float)) for value in frozen.values())
        # Parameters of one group in which only numbers are frozen step alike.
        key = (self.step.groups[name], tuple(sorted(frozen.items()))) if shared else name
        if key not in self._linear:
            self._linear[key] = linear(rule, frozen, settings, self.shapes[name])
        return self._linear[key]

    def of(self, name: str, dtype: torch.dtype) -> Callable[[slice, Tensor, list[Tensor | None]], list[Scaled]]:
        """A function that pulls blocks of columns of a parameter back.

        It takes the block (within the parameter), q (Q, size) and the memory's cotangents (None for zero), which it
        replaces by those before the step, and returns u for each gradient.
        """
        coefficients = self.linear(name)
        if coefficients is None:
            return self._differentiated(name)
        gradients = [[_cast(c, dtype) for c in row] for row in coefficients.gradients]
        memory = [[_cast(c, dtype) for c in row] for row in coefficients.memory]
        ratio = coefficients.ratio

        def pull(where: slice, q: Tensor, held: list[Tensor | None]) -> list[Scaled]:
            if ratio is not None:
                b, d = (_part(c, where) for c in memory[0])
                held[0] = _accumulated(held[0], d, q, b)
                return [(held[0], ratio)]
            slots = held[: len(memory)]  # other optimizers may have more
            pulled: list[Scaled] = [(_combined([_part(c, where) for c in row], [q, *slots]), 1.0) for row in gradients]
            held[: len(memory)] = [_combined([_part(c, where) for c in row], [q, *slots]) for row in memory]
            return pulled

        return pull

    def _differentiated(self, name: str) -> Callable[[slice, Tensor, list[Tensor | None]], list[Scaled]]:
        frozen = self.step.frozen[name]
        settings = self.step.hyperparameters_of(name)
        shape = self.shapes[name]
        rule = self.rule.of(settings)
        count = len(rule.memory)

        def pull(where: slice, q: Tensor, held: list[Tensor | None]) -> list[Scaled]:
            assert where == slice(0, shape.numel()), "a rule that is not elementwise takes whole parameters"
            filled = tuple((torch.zeros_like(q) if m is None else m).reshape(-1, *shape) for m in held[:count])
            pulled, before = adjoint(rule, frozen, settings, q.reshape(-1, *shape), filled)
            held[:count] = [m.flatten(1) for m in before]
            return [(u.flatten(1), 1.0) for u in pulled]

        return pull


def _cast(coefficient: Coefficient, dtype: torch.dtype) -> Coefficient:
    return coefficient.to(dtype) if isinstance(coefficient, Tensor) else coefficient


def _part(coefficient: Coefficient, where: slice) -> Coefficient:
    return coefficient[where] if isinstance(coefficient, Tensor) else coefficient


def _accumulated(held: Tensor | None, scale: Coefficient, q: Tensor, weight: Coefficient) -> Tensor | None:
    """scale · held + weight · q, in place: one reading and one writing of the block."""
    if held is None:
        return _combined([weight], [q])
    held.mul_(scale)
    return held.addcmul_(q, weight) if isinstance(weight, Tensor) else held.add_(q, alpha=weight)


def _combined(coefficients: Sequence[Coefficient], matrices: Sequence[Tensor | None]) -> Tensor | None:
    """Σ coefficient ∘ matrix; None where every term is zero."""
    total: Tensor | None = None
    for coefficient, matrix in zip(coefficients, matrices, strict=True):
        if matrix is None or (not isinstance(coefficient, Tensor) and coefficient == 0.0):
            continue
        if total is None:
            total = matrix * coefficient
        elif isinstance(coefficient, Tensor):
            total.addcmul_(matrix, coefficient)
        else:
            total.add_(matrix, alpha=coefficient)
    return total
