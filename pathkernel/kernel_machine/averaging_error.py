r"""Error of a quadrature's average of a query's gradient, found by laying the same rule on ever more pieces.

.. math:: \delta q_s = \hat q_s - q_s ,\qquad
          \mathrm{share}_i(\hat q) - \mathrm{share}_i(q) = \mathrm{share}_i(\delta q)

Shares are linear in the averaged gradients, so the sweep that adds up shares adds up their errors when it is given the
errors of the averages. What a rule misses of f along the step is one component of δq; the shares are products with the
gradients of the batch, which point elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pathkernel.gradients.factored import FactoredGradients, accumulation_dtype
from pathkernel.kernel_machine.accumulator import Accumulator
from pathkernel.kernel_machine.queries import GradientStep
from pathkernel.quadrature import Part, Quadrature, QueryStep, StepAverage

PIECES_VERIFIED = 64
"""Pieces of the path on which a query is checked, about: all of a short run, some of a long one."""

FIRST = 2
"""Pieces of the coarser of the two finer rules at first; the other has twice as many."""

MOST = 64
"""Gradients a query in a finer rule after which it is not refined further."""

SETTLED = 0.5
"""The finer rules are believed where they differ by less than this part of what they say the rule is off by."""

ROUNDINGS = 64
"""Roundings of f below which two rules cannot be told apart."""

SAFETY = 2.0
"""Times the error that a finer rule finds."""

ROUNDINGS_OF_SHARES = 32
"""Roundings of all shares together that their error is not below."""


class Noted(Quadrature):
    """A quadrature, and what it missed of f on each piece of a path.

    Parameters
    ----------
    rule
        The quadrature.
    """

    def __init__(self, rule: Quadrature) -> None:
        self.rule, self.relative, self.arithmetic = rule, rule.relative, rule.arithmetic
        self.missed: list[Tensor] = []

    def average(self, step: QueryStep) -> StepAverage:
        """Average of the quadrature; its error is noted."""
        average = self.rule.average(step)
        self.missed.append(average.error)
        return average


class AveragingError(Quadrature):
    """The error of another quadrature's averages, each as a quadrature would give an average.

    The step is cut into 2, 4, 8, … pieces by cuts drawn at random, so that no rhythm in the gradient can hide from
    the nodes. Queries for which the last two subdivisions differ by more than half of what they correct, or which still
    miss half as much of f along the step, are refined further, unless that is little beside what is usual on the path.
    What the last two subdivisions differ by is added to the error found.

    Parameters
    ----------
    noted
        The quadrature in question, and what it missed on every piece of the same path.

    Notes
    -----
    ``StepAverage.error`` is what the finer rule still misses of f. It stays where gradients are no derivatives.

    On a long path each query is checked on about `PIECES_VERIFIED` pieces, drawn with probabilities of which one half
    is even and the other in proportion to what the rule missed there: pieces that miss much are checked for certain.
    Errors are divided by the probability: an unbiased estimate of the error of each share, and therefore one that is
    not too small on average for the sum of their sizes. The draws are the same in every call.
    """

    def __init__(self, noted: Noted) -> None:
        self.rule, self.relative, self.arithmetic = noted.rule, noted.relative, noted.arithmetic
        self.random = np.random.default_rng(0)
        start = float(self.random.uniform())
        missed = torch.stack(noted.missed) if noted.missed else torch.zeros(1, 0)
        self.weights = iter(_weights(missed, start))
        self.missed, self.off = missed.mean(dim=0), torch.zeros_like(missed[0])
        self.checked = torch.zeros_like(self.off)

    def average(self, step: GradientStep) -> StepAverage:  # type: ignore[override]
        """δq of one piece of the path, or nothing where it is not among those drawn."""
        layout, weights = step.queries.function.layout, next(self.weights)
        missed = torch.zeros_like(step.start_value)
        samples = (weights.reshape(-1, step.queries.components) > 0).any(dim=1).nonzero()[:, 0]
        if step.segment.channel or not len(samples):  # what is booked under a name is no part of a share
            return StepAverage(FactoredGradients(layout, len(weights), (), place=missed.device), missed, 0.0)
        part = step if len(samples) * step.queries.components == len(weights) else step.of(samples)
        rows, error = step.rows_of(samples), _matrix(step)
        usual = self.missed[rows], self.off[rows] / self.checked[rows].clamp_min(1)
        found, still_missed = self._error(part, self.rule.average(part), *usual)
        self.off[rows] += found.norm(dim=1).double() * step.squared_length**0.5
        self.checked[rows] += 1
        error[rows], missed[rows] = found * weights[rows, None].to(found), still_missed * weights[rows]
        return StepAverage(FactoredGradients.dense(error, layout), missed, 0.0)

    def _error(
        self, step: GradientStep, average: StepAverage, usual_missed: Tensor, usual_off: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The average less a finer one, lengthened by how uncertain that one is, (Q, P), and what it misses of f."""
        given = _add(_matrix(step), average.gradient, 1.0)
        result, left = torch.empty_like(given), torch.empty_like(step.start_value)
        pieces, width = 2 * FIRST, step.squared_length**0.5
        rounding = ROUNDINGS * step.rounding * torch.maximum(step.start_value.abs(), step.end_value.abs())
        # What is usual on the path is small enough: no step is refined for errors that others make anyway.
        enough = torch.maximum(SETTLED * torch.maximum(average.error, usual_missed), rounding)
        small = torch.maximum(SETTLED * usual_off, rounding)
        samples = torch.arange(len(given) // step.queries.components, device=given.device)
        open_ = step
        before = self._subdivided(step, FIRST)[0]
        while True:
            now, missed, evaluations = self._subdivided(open_, pieces)
            rows = step.rows_of(samples)
            off, apart = given[rows] - now, now - before
            found, doubt, left[rows] = off.norm(dim=1), apart.norm(dim=1), missed
            result[rows] = torch.where((found > 0)[:, None], off * (1 + doubt / found)[:, None], apart)
            unsettled = (doubt > SETTLED * found) & (doubt * width > small[rows]) | (missed > enough[rows])
            again = unsettled.reshape(len(samples), -1).any(dim=1)
            if evaluations >= MOST or not again.any():
                return result, left
            samples, before = samples[again], now[open_.rows_of(again.nonzero()[:, 0])]
            open_, pieces = step.of(samples), 2 * pieces

    def _subdivided(self, step: GradientStep, pieces: int) -> tuple[Tensor, Tensor, float]:
        """The rule on pieces of the step: average, what they miss of f, and gradients taken."""
        # Denser towards the ends, where a rule of few nodes has none: kinks there would be seen by neither.
        angles = np.pi * (np.arange(1, pieces) + self.random.uniform(-0.3, 0.3, size=pieces - 1)) / pieces
        cuts = [0.0, *((1 - np.cos(angles)) / 2).tolist(), 1.0]
        values = [step.start_value, *(step.value(cut) for cut in cuts[1:-1]), step.end_value]
        total, missed, evaluations = _matrix(step), torch.zeros_like(step.start_value), 0.0
        finer = self.rule.finer()
        for lower, upper, start_value, end_value in zip(cuts[:-1], cuts[1:], values[:-1], values[1:], strict=True):
            average = finer.average(Part(step, lower, upper, start_value, end_value))
            _add(total, average.gradient, upper - lower)
            missed += average.error
            evaluations += average.evaluations
        return total, missed, evaluations


def shares_error(errors: Accumulator, found: Accumulator, dtype: torch.dtype) -> Tensor:
    """Σ_i of the sizes of the errors of the shares, (Q,).

    Parameters
    ----------
    errors
        The sweep of what the averaged gradients are off by.
    found
        The sweep of the averaged gradients.
    dtype
        Floating type of the gradients.
    """
    assert errors.shares is not None and found.shares is not None
    rounding = ROUNDINGS_OF_SHARES * torch.finfo(dtype).eps * found.shares.abs().sum(dim=1)
    return SAFETY * errors.shares.abs().sum(dim=1) + errors.quadrature_error + rounding


def _weights(missed: Tensor, start: float) -> Tensor:
    """Inverse of the probability with which a piece is drawn for a query, or 0 where it is not, both (pieces, Q)."""
    pieces = len(missed)
    if pieces <= PIECES_VERIFIED:
        return torch.ones_like(missed)
    total = missed.sum(dim=0)
    even = torch.full_like(missed, 1 / pieces)
    proportional = torch.where(total > 0, missed / total, even)
    probability = (PIECES_VERIFIED * (even + proportional) / 2).clamp_max(1.0)
    passed = (probability.cumsum(dim=0) + start).floor()
    drawn = passed.diff(dim=0, prepend=torch.zeros_like(passed[:1])) > 0
    return torch.where(drawn, 1 / probability, 0.0)


def _matrix(step: GradientStep) -> Tensor:
    """Zeros (Q, P)."""
    function = step.queries.function
    dtype = accumulation_dtype(function.dtype)
    return torch.zeros(len(step.start_value), function.layout.size, dtype=dtype, device=step.start_value.device)


def _add(total: Tensor, gradient: FactoredGradients | Tensor, weight: float) -> Tensor:
    """total ← total + weight · gradient, parameter by parameter."""
    if isinstance(gradient, Tensor):  # of a quadrature that treats each query by itself
        return total.add_(gradient, alpha=weight)
    for where in gradient.layout.slices.values():
        total[:, where].add_(gradient.columns(where, total.dtype), alpha=weight)
    return total
