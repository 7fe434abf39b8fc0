"""Gradients of one step, as the samples and the named channels put them together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.gradients.factored import FactoredGradients
from pathkernel.trajectory.columns import Owners
from pathkernel.trajectory.coupled_samples import CoupledSamples
from pathkernel.trajectory.gradient_fit import Fit
from pathkernel.trajectory.step import MicroBatch

ROUNDING = "rounding"
"""Channel of the differences between recorded gradients and those of the recorded samples."""


@dataclass(frozen=True)
class Passes:
    """Cut of a batch into passes through the network.

    Attributes
    ----------
    samples
        How many at once; more than a batch has for whole batches.
    streamed
        Whether the gradients of a pass are used and dropped before the next.
    directions
        With how many directions the gradients of all samples are to be met, where nothing else is done with them:
        those of coupled samples need not be formed then. 0 where they are wanted as such.
    outputs
        Whether derivatives of all outputs along these directions are wanted as well, of whatever samples.
    width
        Directions that a batch may be pushed along at once; 0 where there is no memory for it.
    rows
        Whether gradients of a whole batch are formed as rows at once, where that is less work than each use of pieces.
    """

    samples: int
    streamed: bool = False
    directions: int = 0
    outputs: bool = False
    width: int = 16
    rows: bool = False

    def cut(self, batch: int) -> bool:
        """True where so many samples are taken in several passes."""
        return batch > self.samples


WHOLE = Passes(sys.maxsize)
"""Every batch in one pass, its gradients held at once."""


@dataclass(frozen=True)
class ComparedGradient:
    """A recorded gradient beside what it should follow from.

    Attributes
    ----------
    recorded
        What the optimizer received, without edits that have a name, (P,) float64.
    expected
        What the samples, named backward passes and regularisers add up to, (P,) float64.
    tolerance
        Relative difference that is rounding.
    fit
        How the one follows from the other; None where it does not.
    """

    recorded: Tensor
    expected: Tensor
    tolerance: float
    fit: Fit | None


@dataclass(frozen=True)
class StageGradients:
    """Origin of one gradient of a step.

    Attributes
    ----------
    total
        Σ_i c_i g_i without ``factor``, (P,) float64.
    parts
        The summands c_i g_i without ``factor``, where asked, in the order of the ids: of each micro-batch, or of each
        pass; streamed ones are made anew each time they are gone through.
    channels
        What came from elsewhere, (P,) each: regularisers, named changes, and what the rounding of gradients left.
    factor
        What accumulation, clipping and loss scaling made of the samples' gradient.
    point
        θ where the gradient was taken, (P,).
    batches
        The micro-batches, each with the forward pass of this stage.
    owners
        The columns of the shares that their samples belong to.
    """

    total: Tensor
    parts: Iterable[FactoredGradients | CoupledSamples]
    channels: Mapping[str, Tensor]
    factor: float | Tensor
    point: Tensor
    batches: tuple[MicroBatch, ...]
    owners: Owners

    @property
    def samples(self) -> Float[Tensor, " P"]:
        """The samples' gradient with the factor, float64."""
        return self.total * self.factor

    def columns(self, where: slice, dtype: torch.dtype) -> Float[Tensor, "B size"]:
        """Contributions of the samples to a part of θ; without those that are not formed."""
        rows = [part.columns(where, dtype) for part in self.parts if isinstance(part, FactoredGradients)]
        return self.scaled(rows[0] if len(rows) == 1 else torch.cat(rows), where)

    def fill_columns(self, where: slice, out: Float[Tensor, "B size"]) -> None:
        """The same, formed in given memory."""
        place = 0
        for part in self.parts:
            if isinstance(part, FactoredGradients):
                part.fill_columns(where, out[place : place + len(part)])
                place += len(part)
        if isinstance(self.factor, Tensor):
            out.mul_(self.factor[where].to(out.dtype))
        elif self.factor != 1.0:
            out.mul_(self.factor)

    def scaled(self, columns: Tensor, where: slice) -> Tensor:
        """A part of the summands with the factor."""
        if isinstance(self.factor, Tensor):
            return columns * self.factor[where].to(columns.dtype)
        return columns if self.factor == 1.0 else columns * self.factor


class Streamed:
    """Gradients made while they are gone through."""

    def __init__(self, begin: Callable[[], Iterator[FactoredGradients | CoupledSamples]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[FactoredGradients | CoupledSamples]:
        return self._begin()
