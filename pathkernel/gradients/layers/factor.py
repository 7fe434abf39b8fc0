r"""Per-sample gradients of one parameter in the form in which back-propagation leaves them.

For :math:`y_t = W a_t` at positions t (time steps, pixels) the gradient of sample i and component k is a sum of outer
products, :math:`G_{ik} = \sum_t \delta_{ikt} a_{it}^\top`: T(p + q) numbers in place of p·q.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from pathkernel._typing import Float, Int


class Factor(ABC):
    r"""Gradients of one parameter (or a contiguous part of it) for n samples and K components.

    Every form is a sum of outer products, :math:`G = \sum_t \delta_t a_t^\top`, of signals δ (p numbers) and readings
    a (q numbers): rows that are formed already have T = 1, δ the row itself, and a = 1.
    """

    fields: ClassVar[tuple[str, ...]]
    """Names of the tensors, samples on the first axis of each: first that with the components, then what they share."""

    form: ClassVar[str]
    """Name of the form in the table of costs."""

    formed: ClassVar[bool] = False
    """True where rows are what is stored."""

    head: bool = False
    """True where δ is the identity, component by component."""

    joint: Tensor | None = None
    """Numbers whose products are those of δ summed over components, where there are such; see `Outer`."""

    transposed: bool = False
    """True where the parameter is laid out as (q, p) in place of (p, q)."""

    # -- sizes -----------------------------------------------------------------------------------------------

    @property
    def signals(self) -> Float[Tensor, "n K T p"]:
        """δ."""
        return self._first

    @property
    def readings(self) -> Float[Tensor, "n T q"] | Int[Tensor, "n T"]:
        """a, or the places of the ones where a is a unit vector."""
        return self.tensors[1]

    @property
    @abstractmethod
    def reading_size(self) -> int:
        """q, entries of a."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored, in the order of `fields`."""
        return tuple(getattr(self, name) for name in self.fields)

    @property
    def _first(self) -> Tensor:
        """The tensor with the components; every step of a sweep asks for it many times."""
        first: Tensor = getattr(self, self.fields[0])
        return first

    @property
    def samples(self) -> int:
        """n."""
        return self._first.shape[0]

    @property
    def components(self) -> int:
        """K."""
        return self._first.shape[1]

    @property
    def positions(self) -> int:
        """T."""
        return self.signals.shape[2]

    @property
    def width(self) -> int:
        """p, entries of δ."""
        return self.signals.shape[3]

    @property
    def size(self) -> int:
        """Entries of the parameter."""
        return self.width * self.reading_size

    @property
    def length(self) -> int:
        """Entries of the parameter's first axis."""
        return self.reading_size if self.transposed else self.width

    @property
    def dtype(self) -> torch.dtype:
        """Floating type."""
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self._first.device

    @property
    def numbers(self) -> tuple[int, int]:
        """Numbers stored: those of the components, and those that all components share."""
        own, *shared = (tensor.numel() for tensor in self.tensors)
        return own, sum(shared)

    @property
    def row_numbers(self) -> int:
        """Numbers in the rows."""
        return self.samples * self.components * self.size

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def takes_bias(self) -> bool:
        """True where δ are the signals of the layer's output, so that the gradient of its bias is Σ_t δ_t."""
        return not self.transposed and not self.formed

    @property
    def comparing(self) -> int:
        """Multiplications for the inner product of two readings; those of unit vectors are compared."""
        return self.readings.shape[2:].numel()

    @property
    def forming(self) -> int:
        """Multiplications for the row of one sample and component."""
        return self.positions * self.size

    # -- the same in another form ----------------------------------------------------------------------------

    def map(self, function: Callable[[Tensor], Tensor]) -> Factor:
        """Apply a function to every tensor; samples are on the first axis."""
        return replace(self, **{name: function(getattr(self, name)) for name in self.fields})  # type: ignore[type-var]

    def to(self, dtype: torch.dtype) -> Factor:
        """Convert to another floating type."""
        if dtype == self.dtype:
            return self
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def take(self, piece: slice) -> Factor:
        """Restrict to a slice of the samples."""
        return self.map(lambda tensor: tensor[piece])

    def component(self, c: int) -> Factor:
        """Restrict to one component."""
        own = self.fields[0]
        return replace(self, **{own: getattr(self, own)[:, c : c + 1]})  # type: ignore[type-var]

    def scaled(self, weights: Float[Tensor, " n"] | float) -> Factor:
        """Multiply each sample's gradient by a number."""
        column = weights.reshape(-1, 1, 1, 1) if isinstance(weights, Tensor) else weights
        return self.with_signals(self.signals * column)

    def stacked(self) -> Factor:
        """Put all components behind each other as one; its inner products are the trace over components."""
        n, k, t, p = self.signals.shape
        return self.with_signals(self.signals.transpose(1, 2).reshape(n, 1, t, k * p))

    def with_signals(self, signals: Float[Tensor, "n K T p"]) -> Factor:
        """Replace δ."""
        return replace(self, **{self.fields[0]: signals})  # type: ignore[type-var]

    @abstractmethod
    def rows_between(self, begin: int, end: int) -> Factor:
        """Restrict to a range of the parameter's first axis."""

    def turned(self) -> Factor | None:
        """Gradients of the transposed parameter, or None where that takes another form."""
        return None

    def as_head(self) -> Factor:
        """Mark δ as the identity, where the form makes use of it."""
        return self

    def joined(self, others: Sequence[Factor]) -> Factor | None:
        """Sum with the gradients of other uses of the parameter in this form, or None where they have another."""
        return None

    # -- results ---------------------------------------------------------------------------------------------

    @abstractmethod
    def rows(self) -> Float[Tensor, "n K size"]:
        """Gradients as rows."""

    def columns(self, begin: int, end: int) -> Float[Tensor, "n K w"]:
        """Entries ``begin`` to ``end`` of the rows."""
        unit = self.size // self.length
        first = begin // unit
        rows = self._whole_rows(first, -(-end // unit))
        return rows[:, :, begin - first * unit : end - first * unit]

    def _whole_rows(self, first: int, last: int) -> Tensor:
        return self.rows_between(first, last).rows()

    def fill_columns(self, begin: int, end: int, into: Float[Tensor, "n K w"]) -> None:
        """Form the same entries in given memory."""
        into.copy_(self.columns(begin, end))

    def write(self, into: Float[Tensor, "J n w"], full: bool) -> None:
        """Form the rows in given memory; see `side_by_side` for their order."""
        into.copy_(side_by_side(self.rows(), full))

    @abstractmethod
    def products(self, directions: Float[Tensor, "D size"]) -> Float[Tensor, "n K D"]:
        """Inner products with a few directions, rows never formed where that is cheaper."""

    def products_in_turn(self, directions: Float[Tensor, "D size"]) -> Float[Tensor, "n K D"]:
        """Inner products with directions, one at a time where positions would multiply the memory."""
        return self.products(directions)

    @abstractmethod
    def total(self) -> Float[Tensor, " size"]:
        """Sum over samples and components."""

    @abstractmethod
    def weighted_sum(self, weights: Float[Tensor, "n K D"]) -> Float[Tensor, "D size"]:
        r"""Adjoint of inner products with directions, :math:`\sum_{ik} v_{ikd} G_{ik}`."""


def side_by_side(rows: Float[Tensor, "n K size"], full: bool) -> Float[Tensor, "J n w"]:
    """Rows in the order of matrix products: component by component for ``full``, else beside each other (J = 1)."""
    return rows.transpose(0, 1) if full else rows.flatten(1).unsqueeze(0)
