"""The forms that gradients of one parameter have: rows, outer products, and rows of a table that were read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathkernel._typing import Float, Int
from pathkernel.gradients.layers.factor import Factor
from pathkernel.gradients.matmul import product

NARROW = 16
"""Entries of a reading below which the wide matrix is the right factor of a product: (320, 784) by (784, 9) takes 1.4
times as long as the transposes of both the other way round (float32, one thread of MKL on an AMD EPYC)."""


@dataclass(frozen=True)
class Dense(Factor):
    """Gradients as rows, for small parameters and for whatever has no better form.

    Attributes
    ----------
    values
        (n, K, size).
    """

    fields = ("values",)
    form = "dense"
    formed = True

    values: Tensor

    @property
    def signals(self) -> Tensor:
        """The rows."""
        return self.values.unsqueeze(2)

    @property
    def readings(self) -> Tensor:
        """Ones."""
        return self.values.new_ones(()).expand(self.samples, 1, 1)

    @property
    def reading_size(self) -> int:
        """1."""
        return 1

    def with_signals(self, signals: Tensor) -> Dense:
        """Replace the rows."""
        return Dense(signals.squeeze(2))

    def rows_between(self, begin: int, end: int) -> Dense:
        """Restrict to a range of entries."""
        return Dense(self.values[:, :, begin:end])

    def rows(self) -> Tensor:
        """Gradients as they are stored."""
        return self.values

    def products(self, directions: Tensor) -> Tensor:
        """One matrix product, of rows that may be a part of longer ones: a stack of them would be copied."""
        n, k, _ = self.values.shape
        return (self.values.flatten(0, 1) @ directions.T).view(n, k, len(directions))

    def total(self) -> Tensor:
        """Sum over samples and components."""
        return self.values.sum(dim=(0, 1))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """One matrix product."""
        return weights.flatten(0, 1).T @ self.values.flatten(0, 1)


@dataclass(frozen=True)
class Outer(Factor):
    r"""Sums of outer products, :math:`G = \sum_t \delta_t a_t^\top`, of a weight (p, q).

    Attributes
    ----------
    signal
        δ, (n, K, T, p).
    activation
        a, (n, T, q).
    transposed
        Whether the parameter is laid out as (q, p).
    head
        Whether δ is the identity (K = p, T = 1): the weight's output is the network's own, component by component.
    joint
        s, (n, p), where sums over components are those of one: :math:`\sum_k \delta_{ikp} \delta_{jkp} = s_{ip} s_{jp}`
        for gradients at the same θ (T = 1). Another δ leaves it out.
    """

    fields = ("signal", "activation")
    form = "outer"

    signal: Tensor
    activation: Tensor
    transposed: bool = False
    head: bool = False
    joint: Tensor | None = None

    @property
    def reading_size(self) -> int:
        """q."""
        return self.activation.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes stored; an identity is stored once for all samples."""
        return self.activation.numel() * self.dtype.itemsize if self.head else super().nbytes

    def map(self, function: Callable[[Tensor], Tensor]) -> Outer:
        """Apply a function to every tensor; samples are on the first axis."""
        joint = None if self.joint is None else function(self.joint)
        return replace(self, signal=function(self.signal), activation=function(self.activation), joint=joint)

    def component(self, c: int) -> Outer:
        """Restrict to one component."""
        return replace(self, signal=self.signal[:, c : c + 1], joint=None)

    def with_signals(self, signals: Tensor) -> Outer:
        """Replace δ."""
        return replace(self, signal=signals, head=False, joint=None)

    def rows_between(self, begin: int, end: int) -> Outer:
        """Restrict to a range of the parameter's first axis."""
        if self.transposed:
            return replace(self, activation=self.activation[:, :, begin:end])
        return self.with_signals(self.signal[:, :, :, begin:end])

    def turned(self) -> Outer:
        """Gradients of the transposed parameter."""
        return replace(self, transposed=not self.transposed)

    def as_head(self) -> Outer:
        """Mark δ as the identity."""
        return replace(self, head=True)

    def with_joint(self, joint: Float[Tensor, "n p"]) -> Outer:
        """Tell what sums over components of products of δ are made of."""
        return replace(self, joint=joint)

    def joined(self, others: Sequence[Factor]) -> Outer | None:
        """Outer products put behind each other along T."""
        outers = [other for other in others if isinstance(other, Outer) and other._layout == self._layout]
        if len(outers) < len(others):
            return None
        every = (self, *outers)
        k = max(outer.components for outer in every)
        signals = torch.cat([outer.signal.expand(-1, k, -1, -1) for outer in every], 2)
        return Outer(signals, torch.cat([outer.activation for outer in every], 1), self.transposed)

    @property
    def _layout(self) -> tuple[bool, int, int]:
        return self.transposed, self.width, self.reading_size

    def rows(self) -> Tensor:
        """Σ_t δ_t a_tᵀ, one small matrix product a sample."""
        n, k, t, p = self.signal.shape
        if self.transposed:
            right = self.activation.transpose(1, 2).unsqueeze(1)  # (n, 1, q, T)
            return (right @ self.signal).reshape(n, k, -1)
        left = self.signal.permute(0, 1, 3, 2).reshape(n, k * p, t)
        return (left @ self.activation).reshape(n, k, -1)

    def _whole_rows(self, first: int, last: int) -> Tensor:
        if self.positions > 1 or self.transposed:
            return super()._whole_rows(first, last)
        # An outer product by broadcasting: three times as fast as a batched product.
        return (self.signal[:, :, 0, first:last].unsqueeze(3) * self.activation.unsqueeze(1)).flatten(2)

    def fill_columns(self, begin: int, end: int, into: Tensor) -> None:
        """Form entries in given memory, whole rows of the parameter without a copy in between."""
        q = self.reading_size
        if self.positions > 1 or self.transposed or begin % q or end % q or into.dtype != self.dtype:
            super().fill_columns(begin, end, into)
            return
        signals = self.signal[:, :, 0, begin // q : end // q].unsqueeze(3)
        torch.mul(signals, self.activation.unsqueeze(1), out=into.unflatten(2, (-1, q)))

    def write(self, into: Tensor, full: bool) -> None:
        """Form the rows in given memory, without a copy in between where the parameter lies as (p, q)."""
        if self.transposed:
            super().write(into, full)
            return
        n, k, _, p = self.signal.shape
        q = self.reading_size
        left = self.signal.transpose(2, 3)
        if full:
            for j in range(k):
                torch.bmm(left[:, j], self.activation, out=into[j].view(n, p, q))
        elif q < NARROW:
            found = torch.bmm(self.activation.mT, left.reshape(n, k * p, -1).mT)
            into[0].view(n, k * p, q).copy_(found.mT)
        else:
            torch.bmm(left.reshape(n, k * p, -1), self.activation, out=into[0].view(n, k * p, q))

    def products(self, directions: Tensor) -> Tensor:
        """Σ_t δ_tᵀ V a_t for each direction V."""
        n, k, t, p = self.signal.shape
        d, q = len(directions), self.reading_size
        matrices = self._matrices(directions)
        if d == t == 1:  # matrices of one row are multiplied slowly
            along = product(self.activation[:, 0], matrices[0])
            return torch.linalg.vecdot(self.signal[:, :, 0], along.unsqueeze(1)).unsqueeze(2)
        along = self.activation.reshape(n * t, q) @ matrices.permute(2, 0, 1).reshape(q, d * p)
        along = along.reshape(n, t, d, p).permute(0, 1, 3, 2).reshape(n, t * p, d)
        return self.signal.reshape(n, k, t * p) @ along

    def products_in_turn(self, directions: Tensor) -> Tensor:
        """Inner products one direction at a time; for a head, of a_i with the rows of V that its components are."""
        if not self.head:
            return torch.cat([self.products(direction.unsqueeze(0)) for direction in directions], dim=2)
        rows = self._matrices(directions)[:, self._head_rows]  # (D, K, q)
        products = self.activation.squeeze(1) @ rows.reshape(-1, self.reading_size).T
        return products.reshape(self.samples, len(directions), -1).transpose(1, 2)

    def total(self) -> Tensor:
        """Sum over samples and components."""
        return self._contracted(self.signal.sum(dim=1).flatten(0, 1))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Σ_ik v_ikd G_ik, one product of signals and activations for each d."""
        n, k, d = weights.shape
        if self.head:
            # δ is the identity: component k adds to row k alone.
            sums = self.activation.new_zeros(d, self.width, self.reading_size)
            weighted = weights.permute(2, 1, 0).reshape(d * k, n) @ self.activation.flatten(0, 1)
            sums[:, self._head_rows] = weighted.reshape(d, k, -1)
            return (sums.transpose(1, 2) if self.transposed else sums).reshape(d, -1)
        own = []
        for v in weights.unbind(dim=2):
            signals = self.signal[:, 0] * v[:, :, None] if k == 1 else torch.einsum("nktp,nk->ntp", self.signal, v)
            own.append(self._contracted(signals.flatten(0, 1)))
        return torch.stack(own)

    def weighted_squares(self, weights: Float[Tensor, " size"]) -> Float[Tensor, " n"]:
        """Σ_kpq w_pq (δ_kp a_q)² of each sample, float64, by two products: of one position (T = 1)."""
        (matrix,) = self._matrices(weights.unsqueeze(0))
        signals = self.signal[:, :, 0].double().square().sum(dim=1)
        return torch.linalg.vecdot(signals @ matrix, self.activation[:, 0].double().square())

    def _contracted(self, signals: Float[Tensor, "nT p"]) -> Float[Tensor, " size"]:
        """Σ_it δ_it a_itᵀ for signals of one component."""
        activations = self.activation.flatten(0, 1)
        return (activations.T @ signals if self.transposed else signals.T @ activations).reshape(-1)

    def _matrices(self, directions: Tensor) -> Float[Tensor, "D p q"]:
        d, p, q = len(directions), self.width, self.reading_size
        return directions.reshape(d, q, p).transpose(1, 2) if self.transposed else directions.reshape(d, p, q)

    @property
    def _head_rows(self) -> Tensor:
        """Row of the weight that each component is."""
        return self.signal[0, :, 0].argmax(dim=1)


@dataclass(frozen=True)
class Lookup(Factor):
    """Gradients of a table (vocabulary, q) of which each position reads one row.

    Attributes
    ----------
    signal
        δ, (n, K, T, q).
    indices
        Rows read, (n, T).
    vocabulary
        Rows of the table.
    """

    fields = ("signal", "indices")
    form = "lookup"
    transposed = True

    signal: Tensor
    indices: Int[Tensor, "n T"]
    vocabulary: int

    @property
    def reading_size(self) -> int:
        """Rows of the table: a reading is a unit vector."""
        return self.vocabulary

    @property
    def forming(self) -> int:
        """Entries of the row, of which most are zeros that are written."""
        return self.size

    def rows_between(self, begin: int, end: int) -> Lookup:
        """Restrict to a range of the table's rows."""
        inside = (self.indices >= begin) & (self.indices < end)
        indices = torch.where(inside, self.indices - begin, 0)
        return Lookup(self.signal * inside[:, None, :, None], indices, end - begin)

    def joined(self, others: Sequence[Factor]) -> Lookup | None:
        """Positions put behind each other along T."""
        lookups = [other for other in others if isinstance(other, Lookup)]
        if len(lookups) < len(others):
            return None
        every = (self, *lookups)
        signals = torch.cat([lookup.signal for lookup in every], 2)
        return Lookup(signals, torch.cat([lookup.indices for lookup in every], 1), self.vocabulary)

    def rows(self) -> Tensor:
        """Signals added into the rows that were read."""
        n, k, _, q = self.signal.shape
        return self._add_to(self.signal.new_zeros(n, k, self.vocabulary * q))

    def write(self, into: Tensor, full: bool) -> None:
        """Form the rows in given memory, without a copy in between for a trace."""
        if full:
            super().write(into, full)
        else:
            self._add_to(into[0].zero_())

    def _add_to(self, rows: Tensor) -> Tensor:
        n, k, t, q = self.signal.shape
        index = self.indices[:, None, :, None].expand(n, k, t, q)
        rows.view(n, k, self.vocabulary, q).scatter_add_(2, index, self.signal)
        return rows

    def products(self, directions: Tensor) -> Tensor:
        """Σ_t δ_t · V[index_t] for each direction V."""
        read = directions.reshape(len(directions), self.vocabulary, -1)[:, self.indices]  # (D, n, T, q)
        return torch.einsum("nktq,dntq->nkd", self.signal, read)

    def total(self) -> Tensor:
        """Sum over samples and components."""
        table = self.signal.new_zeros(self.vocabulary, self.width)
        return table.index_add_(0, self.indices.reshape(-1), self.signal.sum(dim=1).flatten(0, 1)).reshape(-1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Weighted signals added into the rows that were read."""
        n, _, d = weights.shape
        signals = torch.einsum("nkd,nktq->dntq", weights, self.signal).reshape(d, n * self.positions, self.width)
        table = signals.new_zeros(d, self.vocabulary, self.width)
        return table.index_add_(1, self.indices.reshape(-1), signals).reshape(d, -1)


@dataclass(frozen=True)
class Piece:
    """Gradients of a contiguous part of θ; the pieces of a tape are disjoint.

    Attributes
    ----------
    where
        The part of θ.
    factor
        Its gradients.
    bias
        The part of θ that is the bias of the same layer, whose gradient is Σ_t δ_t; or None.
    """

    where: slice
    factor: Factor
    bias: slice | None = None

    def bias_rows(self) -> Float[Tensor, "n K p"]:
        """Gradients of the bias."""
        signals = self.factor.signals
        return signals[:, :, 0] if self.factor.positions == 1 else signals.sum(dim=2)

    def take(self, piece: slice) -> Piece:
        """Restrict to a slice of the samples."""
        return replace(self, factor=self.factor.take(piece))

    def to(self, dtype: torch.dtype) -> Piece:
        """Convert to another floating type."""
        return self if dtype == self.factor.dtype else replace(self, factor=self.factor.to(dtype))

    def separated(self) -> list[tuple[slice, Factor]]:
        """Weight and bias, each with its part of θ."""
        weight = (self.where, self.factor)
        return [weight] if self.bias is None else [weight, (self.bias, Dense(self.bias_rows()))]

    def products(self, directions: Float[Tensor, "D P"]) -> Float[Tensor, "n K D"]:
        """Inner products with directions in the space of θ."""
        result = self.factor.products(directions[:, self.where])
        if self.bias is not None:
            result = result + self.bias_rows() @ directions[:, self.bias].T
        return result


def joined(factors: Sequence[Factor]) -> Factor:
    """Sum of gradients from several uses of one parameter, in their common form or as rows."""
    first, *others = factors
    if not others:
        return first
    found = first.joined(others)
    if found is not None:
        return found
    total = first.rows() + others[0].rows()  # in memory of its own: rows may be what is stored
    for factor in others[1:]:
        total += factor.rows()
    return Dense(total)
