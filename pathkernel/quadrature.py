r"""Quadratures on one optimizer step: how the gradient of a query is averaged between θ_s and θ_s + Δ_s.

.. math:: q_s(x) = \int_0^1 \nabla_\theta f(x; \theta_s + t \Delta_s)\, dt

Every class is a value: make one, pass it on. Strings are shorthand (see `as_quadrature`).
"""

from __future__ import annotations

import functools
import math
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pathkernel.errors import InputError


class Gradients(Protocol):
    """Gradients of Q query outputs, in whatever form: a quadrature takes weighted sums and products with Δ_s."""

    def __rmul__(self, weight: float, /) -> Any:
        """Each times a number."""

    def __add__(self, other: Any, /) -> Any:
        """Added one by one."""

    def __matmul__(self, change: Any, /) -> Tensor:
        """∇f·Δ_s, (Q,) float64."""


class QueryStep(Protocol):
    """Interface of one step to a quadrature, for Q query outputs at once.

    Gradients are in factored form, or D numbers a query (all P entries, or products with a few directions where only
    those are needed). In each case ``gradient @ change`` is ∇f·Δ_s.
    """

    change: Tensor
    """Turns a gradient into ∇f·Δ_s, (D,)."""
    start_value: Tensor
    """f(θ_s), (Q,) float64."""
    end_value: Tensor
    """f(θ_s + Δ_s), (Q,) float64."""
    scale: Tensor
    """Scale of the errors of this step: how far f moved in all of training, over the number of steps, (Q,)."""
    rounding: float
    """Machine epsilon of the arithmetic in which f is evaluated."""

    @property
    def squared_length(self) -> float:
        """‖Δ_s‖²; read from a device only where it is asked for."""

    def gradient(self, time: float) -> Any:
        """∇f at θ_s + tΔ_s, as `Gradients`."""

    def plus_displacement(self, gradient: Any, multiples: Tensor) -> Any:
        """Gradients with a multiple (Q,) of Δ_s added to each."""

    def value_and_gradient_at(self, times: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Values (n,) and gradients (n, D) float64 of the given queries, each at its own time."""


class Part:
    """A part of a step, as a quadrature sees it; see `QueryStep`.

    Parameters
    ----------
    step
        The whole step.
    lower, upper
        Where the part begins and ends, 0 ≤ lower < upper ≤ 1.
    start_value, end_value
        f there, (Q,).
    """

    def __init__(self, step: QueryStep, lower: float, upper: float, start_value: Tensor, end_value: Tensor) -> None:
        self.step = step
        self.lower = lower
        self.upper = upper
        self.width = upper - lower
        self.change = self.width * step.change
        self.scale = self.width * step.scale
        self.rounding = step.rounding
        self.start_value = start_value
        self.end_value = end_value

    @property
    def squared_length(self) -> float:
        """‖Δ‖² of the part."""
        return self.width**2 * self.step.squared_length

    def gradient(self, time: float) -> Any:
        """∇f at a time of the part."""
        return self.step.gradient(self.upper if time == 1 else self.lower + time * self.width)

    def plus_displacement(self, gradient: Any, multiples: Tensor) -> Any:
        """Gradients with a multiple of the part's displacement added to each."""
        return self.step.plus_displacement(gradient, self.width * multiples)

    def value_and_gradient_at(self, times: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients of some queries, each at its own time of the part."""
        return self.step.value_and_gradient_at(self.lower + times * self.width, queries)


@dataclass
class StepAverage:
    """The averaged query gradient of a step and what is known about its error."""

    gradient: Any
    """q_s, as `Gradients`."""
    error: Tensor
    """Part that the rule misses of f(θ_{s+1}) − f(θ_s) before any correction, in absolute value, (Q,)."""
    evaluations: float
    """Gradients taken per query."""
    short: Tensor | None = None
    """The part of the error that was accepted although it is above the rule's tolerance, (Q,); None without one."""


def missed(step: QueryStep, gradient: Gradients) -> Tensor:
    """Exact change of f less q·Δ, (Q,)."""
    return step.end_value - step.start_value - gradient @ step.change


class Quadrature(ABC):
    """Rule to average a query's gradient over one step."""

    arithmetic: torch.dtype | None = None
    """Floating type that the quadrature needs, or None for whatever was recorded."""
    relative: bool = False
    """Whether `QueryStep.scale` is used, which costs two evaluations of f."""

    @abstractmethod
    def average(self, step: QueryStep) -> StepAverage:
        """q_s for all queries of a step."""

    def finer(self) -> Quadrature:
        """Quadrature for the parts of a step when this one is checked: itself, on shorter pieces."""
        return self

    @property
    def nodes(self) -> tuple[tuple[float, float], ...]:
        """Fixed (time, weight) pairs on [0, 1], for integrals that are the same for every pair of samples."""
        raise InputError(
            f"`{self!r}` chooses its points for each query",
            "`PathKernel` must be one fixed symmetric function, so it takes a quadrature with fixed nodes",
            'Write for example `PathKernel(trajectory, quadrature="trapezoid")`, or `GaussLegendre(2)`',
        )


class FixedQuadrature(Quadrature):
    """A quadrature whose times and weights do not depend on the query."""

    def average(self, step: QueryStep) -> StepAverage:
        """Σ_n ω_n ∇f(θ_s + t_n Δ_s)."""
        first, *others = (
            step.gradient(time) if weight == 1 else weight * step.gradient(time) for time, weight in self.nodes
        )
        gradient = functools.reduce(operator.add, others, first)
        return StepAverage(gradient, missed(step, gradient).abs(), float(len(self.nodes)))


@dataclass(frozen=True)
class LeftEndpoint(FixedQuadrature):
    """The gradient at θ_s: first order, what TracIn and the continuous-time theory use."""

    @property
    def nodes(self) -> tuple[tuple[float, float], ...]:
        """(time, weight) pairs."""
        return ((0.0, 1.0),)


@dataclass(frozen=True)
class Trapezoid(FixedQuadrature):
    """Both ends: second order at the price of the left endpoint, since neighbouring steps share their ends."""

    @property
    def nodes(self) -> tuple[tuple[float, float], ...]:
        """(time, weight) pairs."""
        return ((0.0, 0.5), (1.0, 0.5))


@dataclass(frozen=True)
class Midpoint(FixedQuadrature):
    """The gradient at θ_s + Δ_s/2: second order."""

    @property
    def nodes(self) -> tuple[tuple[float, float], ...]:
        """(time, weight) pairs."""
        return ((0.5, 1.0),)


@dataclass(frozen=True)
class GaussLegendre(FixedQuadrature):
    """Gauss–Legendre with n nodes: order 2n on smooth networks; 4 reach rounding error on most of them."""

    n: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or not 1 <= self.n <= 64:
            raise InputError(
                f"`GaussLegendre({self.n!r})` was asked for",
                "The number of nodes is an integer from 1 to 64",
                "Write for example `GaussLegendre(4)`",
            )

    @property
    def nodes(self) -> tuple[tuple[float, float], ...]:
        """(time, weight) pairs."""
        times, weights = np.polynomial.legendre.leggauss(self.n)
        return tuple((float(t + 1) / 2, float(w) / 2) for t, w in zip(times, weights, strict=True))


@dataclass(frozen=True)
class Adaptive(Quadrature):
    r"""Bisection of a step until the change of f is met, query by query: for networks with kinks.

    An interval [a, b] of the step is accepted when its two-node Gauss–Legendre average meets the exactly known
    f(θ_s + bΔ) − f(θ_s + aΔ) to ``tolerance`` × the change of f in all of training / number of steps (at least to 16
    roundings of f); otherwise it is halved. Errors of either sign then leave a residual of about ``tolerance``. On the
    smooth side of a kink (a ReLU network is piecewise polynomial along a
    line in θ) the rule is exact or nearly so, and the interval that holds the kink shrinks. Works in float64: below
    float32's own rounding there is nothing to refine.

    Parameters
    ----------
    tolerance
        Residual to aim at, relative to the change of f in training.
    max_depth
        Halvings after which an interval is accepted as it is; what it misses stays in the certificate, and
        `KernelMachine.explain` warns where that is more than the tolerance.
    max_intervals
        Intervals in hand per query, on average, beyond which all are accepted as they are.
    """

    tolerance: float = 1e-9
    max_depth: int = field(default=48, repr=False)
    max_intervals: int = field(default=32, repr=False)

    arithmetic = torch.float64
    relative = True

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise InputError(
                f"`Adaptive({self.tolerance!r})` was asked for",
                "The tolerance is a relative error between 0 and 1",
                "Write for example `Adaptive(1e-9)`",
            )

    def finer(self) -> Adaptive:
        """The same with a tenth of the tolerance: on pieces alone it would stop at the same error."""
        return replace(self, tolerance=self.tolerance / 10)

    def average(self, step: QueryStep) -> StepAverage:
        """Bisect all queries level by level; each interval costs two gradients."""
        queries = torch.arange(len(step.start_value), device=step.start_value.device)
        lower, upper = torch.zeros_like(step.start_value), torch.ones_like(step.start_value)
        lower_value, upper_value = step.start_value, step.end_value
        # Differences of f below a few roundings of f itself cannot be met by any refinement.
        floor = 16 * step.rounding * torch.maximum(step.start_value.abs(), step.end_value.abs())
        allowed = torch.maximum(self.tolerance * step.scale, floor)
        allowed = allowed.clamp_min(torch.finfo(step.start_value.dtype).tiny)

        count = len(queries)
        gradient = torch.zeros(count, len(step.change), dtype=torch.float64, device=queries.device)
        error = torch.zeros_like(step.start_value)
        short = torch.zeros_like(step.start_value)
        evaluations = 0
        # One list of intervals for all queries, each with its own query: a query whose intervals were all met costs
        # nothing more, while another one is still halved around its kink.
        for depth in range(self.max_depth + 1):
            # After 48 halvings an interval is some roundings of time long; many kinks at once would fill memory.
            last = depth == self.max_depth or len(queries) > self.max_intervals * count
            width = upper - lower
            halved = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
            for start in range(0, len(queries), count):  # as many rows of gradients at once as there are queries
                piece = slice(start, start + count)
                average = _two_nodes(step, lower[piece], width[piece], queries[piece])
                left_over = upper_value[piece] - lower_value[piece] - width[piece] * (average @ step.change)
                met = left_over.abs() <= allowed[queries[piece]]
                # At the last level the rest is taken as it is, and said to be short of the tolerance.
                accepted = met | last
                short.index_add_(0, queries[piece][~met & last], left_over[~met & last].abs())
                gradient.index_add_(0, queries[piece][accepted], (width[piece, None] * average)[accepted])
                error.index_add_(0, queries[piece][accepted], left_over[accepted].abs())
                halved[piece] = ~accepted
            evaluations += 2 * len(queries)
            if not halved.any():
                break
            # f at the centre makes the change over each half exactly known again, which is what a half has to meet.
            queries = queries[halved]
            lower, upper = lower[halved], upper[halved]
            lower_value, upper_value = lower_value[halved], upper_value[halved]
            centre = lower + (upper - lower) / 2
            centre_value = torch.cat(
                [
                    step.value_and_gradient_at(centre[start : start + count], queries[start : start + count])[0]
                    for start in range(0, len(queries), count)
                ]
            )
            evaluations += len(queries)
            lower, upper = torch.cat([lower, centre]), torch.cat([centre, upper])
            lower_value, upper_value = torch.cat([lower_value, centre_value]), torch.cat([centre_value, upper_value])
            queries = torch.cat([queries, queries])
        return StepAverage(gradient, error, evaluations / max(1, count), short)


def _two_nodes(step: QueryStep, lower: Tensor, width: Tensor, queries: Tensor) -> Tensor:
    """Two-node Gauss–Legendre average of ∇f over an interval of its own for each query."""
    centre, offset = lower + width / 2, width / (2 * math.sqrt(3.0))
    before = step.value_and_gradient_at(centre - offset, queries)[1]
    return (before + step.value_and_gradient_at(centre + offset, queries)[1]) / 2


@dataclass(frozen=True)
class DiscreteGradient(Quadrature):
    r"""Midpoint gradient plus the smallest correction that makes the step exact: one gradient, no kink spoils it.

    .. math:: \hat q_s = \nabla f(m) + \frac{f(\theta_{s+1}) - f(\theta_s) - \nabla f(m)\cdot\Delta_s}
                                             {\lVert\Delta_s\rVert^2}\,\Delta_s ,\qquad m = \theta_s + \Delta_s / 2

    Notes
    -----
    The sum over steps is exact by construction, which says nothing about how it is split between samples; the size
    of all corrections is therefore reported as the quadrature error.

    References
    ----------
    O. Gonzalez, "Time integration and discrete Hamiltonian systems", J. Nonlinear Sci. 6 (1996), eq. (3.2).
    """

    def average(self, step: QueryStep) -> StepAverage:
        """Midpoint, then the rank-one correction along Δ_s."""
        gradient = step.gradient(0.5)
        error = missed(step, gradient)
        if step.squared_length > 0:
            gradient = step.plus_displacement(gradient, error / step.squared_length)
        return StepAverage(gradient, error.abs(), 1.0)


SHORTHAND = {
    "left": LeftEndpoint(),
    "trapezoid": Trapezoid(),
    "midpoint": Midpoint(),
    "gauss_legendre": GaussLegendre(4),
    "adaptive": Adaptive(),
    "discrete_gradient": DiscreteGradient(),
}


def as_quadrature(quadrature: str | Quadrature) -> Quadrature:
    """Turn shorthand into a value; ``"auto"`` is the discrete gradient, exact for every network at one gradient."""
    if isinstance(quadrature, Quadrature):
        return quadrature
    named = {**SHORTHAND, "auto": DiscreteGradient()}
    if quadrature not in named:
        raise InputError(
            f"`quadrature={quadrature!r}` was given",
            f"It must be a quadrature object or one of {', '.join(map(repr, named))}",
            'Write for example `quadrature="trapezoid"` or `quadrature=GaussLegendre(4)`',
        )
    return named[quadrature]
