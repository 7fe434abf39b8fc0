"""Fit of the gradient that the optimizer received by those of the samples: clipping, scaling, accumulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.runtime.transfers import numbers

GRADIENT_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative difference between a recorded gradient and one from a loss that is evaluated again that is still rounding.

Near interpolation the residuals p − y of a softmax cancel: in float32 a correct recomputation is then off by up to a
percent, while a single wrong sample in a batch of 64 moves the gradient by far more.
"""

CAPTURED_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}
r"""Difference between a recorded gradient and :math:`\sum_i J_i^\top \lambda_i`, λ from the training pass itself, in
units of :math:`\sum_i \lVert J_i^\top \lambda_i \rVert`, that is still rounding. Under mixed precision every product is
rounded to eight or eleven bits."""


@dataclass(frozen=True)
class Fit:
    """Relation of a recorded gradient to its recomputation.

    Attributes
    ----------
    factor
        What accumulation, clipping and loss scaling made of it: a number, or (P,) where it differs by entry.
    relative
        ‖recorded − factor · recomputed‖ / ‖recorded‖.
    difference
        recorded − factor · recomputed, (P,).
    layout
        Where each parameter lies in it.
    regularizers
        The factor of the regularisers, which loss scaling leaves as they are; None for the same.
    checked
        Whether a wrong sample would have been seen: not where the factors alone could have made any gradient.
    """

    factor: float | Tensor
    relative: float
    difference: Tensor
    layout: ParameterLayout
    regularizers: float | None = None
    checked: bool = True

    @property
    def parameters(self) -> dict[str, float]:
        """``relative`` by parameter name: each one's part of the difference over the whole ‖recorded‖."""
        whole = max(self.difference.norm().item(), torch.finfo(torch.float64).tiny)
        slices = self.layout.slices.items()
        return {name: self.difference[where].norm().item() * self.relative / whole for name, where in slices}

    @property
    def worst(self) -> str:
        """The parameter that fits worst."""
        parameters = self.parameters
        return max(parameters, key=lambda name: parameters[name])


def _fit(layout: ParameterLayout, found: Tensor, expected: Tensor, factor: float | Tensor) -> Fit:
    if isinstance(factor, Tensor):
        difference = torch.addcmul(found, factor, expected, value=-1)
    else:
        difference = torch.sub(found, expected, alpha=factor)
    norm = max(found.norm().item(), torch.finfo(torch.float64).tiny)
    return Fit(factor, difference.norm().item() / norm, difference, layout)


def _multiple(found: Tensor, expected: Tensor) -> float:
    """κ that minimises ‖found − κ expected‖."""
    squared = (expected @ expected).item()
    return (found @ expected).item() / squared if squared > 0 else 1.0


def _left_by_multiple(found: Tensor, expected: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """κ as of `_multiple` where the tensors lie, and found − κ expected, given ‖expected‖: nothing of it is read."""
    squared = norm.square()
    kappa = torch.where(squared > 0, (found @ expected) / squared, 1.0)
    return kappa, torch.addcmul(found, kappa, expected, value=-1)


def left_over(layout: ParameterLayout, found: Tensor, expected: Tensor) -> Fit:
    """Remainder after one factor between 0 and 1: how far a gradient that nothing explains is off, for messages.

    More and larger factors would make the difference look small where they are what is refused.
    """
    found, expected = found.double(), expected.double()
    return _fit(layout, found, expected, min(1.0, max(0.0, _multiple(found, expected))))


def fit_gradient(layout: ParameterLayout, found: Tensor, expected: Tensor, tolerance: float) -> Fit:
    """Find what was done to a gradient between the backward pass and the step, from a loss that is evaluated again.

    Tried in this order, the first that leaves no more than ``tolerance`` wins: one factor for all (clipping by norm,
    accumulation with a divided loss), one for each parameter (clipping parameter by parameter), and clipping by value
    (entries at the bound, the others untouched). Otherwise the single factor is returned with what it leaves.
    """
    found, expected = found.double(), expected.double()
    kappa, difference = _left_by_multiple(found, expected, expected.norm())
    multiple, norm, left = numbers([kappa, found.norm(), difference.norm()])
    single = Fit(multiple, left / max(norm, torch.finfo(torch.float64).tiny), difference, layout)
    if single.relative <= tolerance:
        return single
    each = torch.ones_like(found)
    for where in layout.slices.values():
        each[where] = _multiple(found[where], expected[where])
    bound = found.abs().max()
    at_bound = found.abs() >= bound * (1 - 1e-6)
    inner = _multiple(found[~at_bound], expected[~at_bound]) if not at_bound.all() else 1.0
    safe = torch.where(expected == 0, torch.ones_like(expected), expected)
    clipped = torch.where(at_bound, found / safe, torch.full_like(found, inner))
    # A clipped entry was at least as large before, and had the same sign.
    plausible = bool((clipped[at_bound] > 0).all() and (clipped[at_bound] <= inner * (1 + 1e-3)).all())
    # Clipping turns no sign and wipes nothing out.
    for factor, fits in ((each, bool((each > 0).all())), (clipped, plausible)):
        candidate = _fit(layout, found, expected, factor)
        if fits and candidate.relative <= tolerance:
            return candidate
    return single


def fit_captured(
    layout: ParameterLayout,
    found: Tensor,
    samples: Tensor,
    regularizers: Tensor | None,
    tolerance: float,
    summed_norms: Callable[[], float],
) -> Fit | None:
    r"""Find what was done to a gradient between the backward pass and the step, λ being that of the pass itself.

    Parameters
    ----------
    layout
        Where each parameter lies.
    found
        The recorded gradient without what was done to it under a name, (P,).
    samples
        :math:`\sum_i J_i^\top \lambda_i`, (P,).
    regularizers
        The gradient of the named regularisers, (P,), which λ knows nothing of.
    tolerance
        See `CAPTURED_TOLERANCE`.
    summed_norms
        :math:`\sum_i \lVert J_i^\top \lambda_i \rVert`, asked for only where ‖samples‖ does not decide.

    Returns
    -------
    Fit or None
        One factor of at most 1 for all (clipping by norm, the mean over ranks, loss scaling, which regularisers do not
        share); one for each parameter, as clipping each of them by norm gives; or clipping by value, which leaves
        entries below the bound as they are. None where none of these explains the gradient.
    """
    found, samples = found.double(), samples.double()
    rest = None if regularizers is None else regularizers.double()
    expected, of_samples = samples if rest is None else samples + rest, samples.norm()
    of_rest = torch.zeros_like(of_samples) if rest is None else rest.norm()
    multiple, difference = _left_by_multiple(found, expected, of_samples if rest is None else expected.norm())
    # Nearly always one factor for all explains the gradient: what that takes is read at once. Entries are counted where
    # that is asked, unless reading the number then would be a transfer more.
    counted = () if expected.is_cpu else (expected.count_nonzero(),)
    asked = [of_samples + of_rest, of_rest, multiple, found.norm(), difference.norm(), *counted]
    own, beside, kappa, norm, left_single, *entries = numbers(asked)
    # Norms of finite numbers are finite, unless they overflow.
    if not math.isfinite(own + norm) and not all(one is None or one.isfinite().all() for one in (found, samples, rest)):
        return None
    known: list[float] = []

    def fits(candidate: Fit, factor: float = 1.0, left: float | None = None) -> bool:
        left = candidate.difference.norm().item() if left is None else left
        floor = torch.finfo(torch.float32).tiny * found.numel()
        if left <= tolerance * factor * own + floor:
            return True
        if not known:
            known.append(summed_norms() + beside)
        return left <= tolerance * factor * known[0] + floor

    largest = 1.0 + max(1e-3, tolerance)
    single = Fit(kappa, left_single / max(norm, torch.finfo(torch.float64).tiny), difference, layout)
    if 0 < kappa <= largest and fits(single, kappa, left_single):
        told = abs(kappa - 1.0) <= tolerance or (entries or [expected.count_nonzero().item()])[0] > 1
        return replace(single, checked=told)
    if not found.any():  # clipped to nothing, or gradients that cancel
        nothing = _fit(layout, found, expected, 1.0)
        return nothing if fits(nothing) else None
    if rest is not None:
        a, b = torch.linalg.lstsq(torch.stack([samples, rest], 1), found[:, None]).solution[:, 0].tolist()
        both = _fit(layout, found - b * rest, samples, a)
        if 0 < a <= b * largest and b <= largest and fits(both, max(a, b)):
            return Fit(a, both.relative, both.difference, layout, regularizers=b)
    each = _clipped_each(layout, found, expected, tolerance)
    if each is not None and fits(each, each.factor.max().item()):  # type: ignore[union-attr]
        return each
    value = _clipped_by_value(layout, found, expected, largest)
    return value if value is not None and fits(value, value.factor.max().item()) else None  # type: ignore[union-attr]


def fit_each(
    layout: ParameterLayout,
    holders: Mapping[str, int],
    found: Tensor,
    samples: Tensor,
    regularizers: Tensor | None,
    tolerance: float,
    summed_norms: Callable[[Sequence[str]], float],
) -> Fit | None:
    """Find what was done to the gradients of several optimizers, to those of each by itself; see `fit_captured`.

    Parameters
    ----------
    layout, found, samples, regularizers, tolerance
        As there.
    holders
        Which optimizer each parameter with a gradient has.
    summed_norms
        As there, of some parameters alone.

    Returns
    -------
    Fit or None
        A factor for each entry; None where there are not several optimizers, or for one of them nothing explains it.
    """
    places = sorted(set(holders.values()))
    if len(places) < 2:
        return None
    factor, difference = torch.ones_like(samples), (found - samples).double()
    checked, shapes = True, dict(zip(layout.names, layout.shapes, strict=True))
    for place in places:
        names = tuple(name for name in layout.names if holders.get(name) == place)
        where = torch.cat([torch.arange(layout.slices[name].start, layout.slices[name].stop) for name in names])
        where = where.to(found.device)
        rest = None if regularizers is None else regularizers[where]
        own = ParameterLayout(names, tuple(shapes[name] for name in names))
        fit = fit_captured(own, found[where], samples[where], rest, tolerance, partial(summed_norms, names))
        if fit is None or fit.regularizers is not None:
            return None
        factor[where] = torch.as_tensor(fit.factor, dtype=factor.dtype, device=factor.device)
        difference[where], checked = fit.difference.to(difference), checked and fit.checked
    norm = max(found.norm().item(), torch.finfo(torch.float64).tiny)
    return Fit(factor, difference.norm().item() / norm, difference, layout, checked=checked)


def _clipped_each(layout: ParameterLayout, found: Tensor, expected: Tensor, tolerance: float) -> Fit | None:
    """Each parameter clipped by its own norm: those clipped lie at one norm, all others share one factor."""
    factors = {name: _multiple(found[where], expected[where]) for name, where in layout.slices.items()}
    moved = {name for name, where in layout.slices.items() if bool(expected[where].any())}
    if not moved or any(factors[name] <= 0 for name in moved):
        return None
    base, bound = max(factors[name] for name in moved), max(found[layout.slices[name]].norm().item() for name in moved)
    if base > 1.0 + 1e-3:
        return None
    slack = 1e-3 + tolerance
    # What a single number was multiplied with is known only where it lies at the common norm.
    for name in moved:
        where = layout.slices[name]
        untouched = abs(factors[name] - base) <= slack * base
        at_bound = abs(found[where].norm().item() - bound) <= slack * bound
        if not untouched and not at_bound and where.stop - where.start == 1:
            return None
    each = torch.full_like(found, base)
    for name in moved:
        each[layout.slices[name]] = factors[name]
    # Directions of parameters of several numbers, and the size of what was not clipped, have been compared.
    free = sum(abs(factors[name] - base) > slack * base for name in moved)
    entries = sum(layout.slices[name].stop - layout.slices[name].start for name in moved)
    fit = _fit(layout, found, expected, each)
    return Fit(fit.factor, fit.relative, fit.difference, layout, checked=entries - free > 1)


def _clipped_by_value(layout: ParameterLayout, found: Tensor, expected: Tensor, largest: float) -> Fit | None:
    """Entries at the bound, all others with one factor."""
    bound = found.abs().max()
    at_bound = found.abs() >= bound * (1 - 1e-6)
    inside = ~at_bound & (expected != 0)
    inner = _multiple(found[inside], expected[inside]) if inside.any() else 1.0
    if not 0 < inner <= largest:
        return None
    safe = torch.where(expected == 0, torch.ones_like(expected), expected)
    clipped = torch.where(at_bound, found / safe, torch.full_like(found, inner))
    # A clipped entry was at least as large before, and had the same sign.
    if not bool((clipped[at_bound] > 0).all() and (clipped[at_bound] <= inner * (1 + 1e-3)).all()):
        return None
    fit = _fit(layout, found, expected, clipped)
    return Fit(fit.factor, fit.relative, fit.difference, layout, checked=bool(inside.sum() > 1))
