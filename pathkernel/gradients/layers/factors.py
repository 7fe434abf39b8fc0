r"""Per-sample gradients of one parameter in the form in which back-propagation leaves them.

For :math:`y_t = W a_t` at positions t (time steps, pixels) the gradient of sample i and component k is a sum of outer
products, :math:`G_{ik} = \sum_t \delta_{ikt} a_{it}^\top`: T(p + q) numbers in place of p·q.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathkernel._typing import Float, Int


class Factor(ABC):
    """Gradients of one parameter (or a contiguous part of it) for n samples and K components."""

    @property
    @abstractmethod
    def samples(self) -> int:
        """n."""

    @property
    @abstractmethod
    def components(self) -> int:
        """K."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Entries of the parameter."""

    @abstractmethod
    def rows(self) -> Float[Tensor, "n K size"]:
        """The gradients themselves."""

    @abstractmethod
    def products(self, directions: Float[Tensor, "D size"]) -> Float[Tensor, "n K D"]:
        """Inner products with a few directions, rows never formed where that is cheaper."""

    @abstractmethod
    def take(self, piece: slice) -> Factor:
        """Those of some of the samples."""

    @abstractmethod
    def scaled(self, weights: Float[Tensor, " n"] | float) -> Factor:
        """Each sample's gradient times a number."""


@dataclass(frozen=True)
class Dense(Factor):
    """Gradients as rows, for small parameters and for whatever has no better form.

    Attributes
    ----------
    values
        (n, K, size).
    """

    values: Tensor

    @property
    def samples(self) -> int:
        """n."""
        return self.values.shape[0]

    @property
    def components(self) -> int:
        """K."""
        return self.values.shape[1]

    @property
    def size(self) -> int:
        """Entries of the parameter."""
        return self.values.shape[2]

    def rows(self) -> Tensor:
        """The gradients themselves."""
        return self.values

    def products(self, directions: Tensor) -> Tensor:
        """One matrix product."""
        return self.values @ directions.T

    def take(self, piece: slice) -> Dense:
        """Those of some of the samples."""
        return Dense(self.values[piece])

    def scaled(self, weights: Tensor | float) -> Dense:
        """Each sample's gradient times a number."""
        return Dense(self.values * _column(weights, 3))


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
    """

    signal: Tensor
    activation: Tensor
    transposed: bool = False
    head: bool = False

    @property
    def samples(self) -> int:
        """n."""
        return self.activation.shape[0]

    @property
    def components(self) -> int:
        """K."""
        return self.signal.shape[1]

    @property
    def positions(self) -> int:
        """T."""
        return self.activation.shape[1]

    @property
    def size(self) -> int:
        """Entries of the parameter."""
        return self.signal.shape[3] * self.activation.shape[2]

    def rows(self) -> Tensor:
        """Σ_t δ_t a_tᵀ, one small matrix product a sample."""
        n, k, t, p = self.signal.shape
        if self.transposed:
            right = self.activation.transpose(1, 2).unsqueeze(1)  # (n, 1, q, T)
            return (right @ self.signal).reshape(n, k, -1)
        left = self.signal.permute(0, 1, 3, 2).reshape(n, k * p, t)
        return (left @ self.activation).reshape(n, k, -1)

    def products(self, directions: Tensor) -> Tensor:
        """Σ_t δ_tᵀ V a_t for each direction V."""
        n, k, t, p = self.signal.shape
        d, q = len(directions), self.activation.shape[2]
        matrices = directions.reshape(d, q, p).transpose(1, 2) if self.transposed else directions.reshape(d, p, q)
        if d == t == 1:  # matrices of one row are multiplied slowly
            pushed = self.activation[:, 0] @ matrices[0].T
            return torch.linalg.vecdot(self.signal[:, :, 0], pushed.unsqueeze(1)).unsqueeze(2)
        pushed = self.activation.reshape(n * t, q) @ matrices.permute(2, 0, 1).reshape(q, d * p)
        pushed = pushed.reshape(n, t, d, p).permute(0, 1, 3, 2).reshape(n, t * p, d)
        return self.signal.reshape(n, k, t * p) @ pushed

    def take(self, piece: slice) -> Outer:
        """Those of some of the samples."""
        return replace(self, signal=self.signal[piece], activation=self.activation[piece])

    def scaled(self, weights: Tensor | float) -> Outer:
        """Each sample's gradient times a number."""
        return replace(self, signal=self.signal * _column(weights, 4), head=False)


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

    signal: Tensor
    indices: Int[Tensor, "n T"]
    vocabulary: int

    @property
    def samples(self) -> int:
        """n."""
        return self.indices.shape[0]

    @property
    def components(self) -> int:
        """K."""
        return self.signal.shape[1]

    @property
    def size(self) -> int:
        """Entries of the parameter."""
        return self.vocabulary * self.signal.shape[3]

    def rows(self) -> Tensor:
        """Signals added into the rows that were read."""
        n, k, _, q = self.signal.shape
        return self.add_to(self.signal.new_zeros(n, k, self.vocabulary * q))

    def add_to(self, rows: Float[Tensor, "n ..."]) -> Tensor:
        """The gradients added to what is there."""
        n, k, t, q = self.signal.shape
        index = self.indices[:, None, :, None].expand(n, k, t, q)
        rows.view(n, k, self.vocabulary, q).scatter_add_(2, index, self.signal)
        return rows

    def products(self, directions: Tensor) -> Tensor:
        """Σ_t δ_t · V[index_t] for each direction V."""
        read = directions.reshape(len(directions), self.vocabulary, -1)[:, self.indices]  # (D, n, T, q)
        return torch.einsum("nktq,dntq->nkd", self.signal, read)

    def take(self, piece: slice) -> Lookup:
        """Those of some of the samples."""
        return replace(self, signal=self.signal[piece], indices=self.indices[piece])

    def scaled(self, weights: Tensor | float) -> Lookup:
        """Each sample's gradient times a number."""
        return replace(self, signal=self.signal * _column(weights, 4))


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
        The part of θ that is the bias of the same layer, whose gradient is Σ_t δ_t of an `Outer`; or None.
    """

    where: slice
    factor: Factor
    bias: slice | None = None

    def bias_rows(self) -> Float[Tensor, "n K p"]:
        """Gradients of the bias."""
        assert isinstance(self.factor, Outer)
        return self.factor.signal.sum(dim=2)

    def take(self, piece: slice) -> Piece:
        """Those of some of the samples."""
        return replace(self, factor=self.factor.take(piece))

    def dense(self) -> list[tuple[slice, Tensor]]:
        """Where in θ, and rows (n, K, size), of weight and bias."""
        parts = [(self.where, self.factor.rows())]
        return parts if self.bias is None else [*parts, (self.bias, self.bias_rows())]

    def products(self, directions: Float[Tensor, "D P"]) -> Float[Tensor, "n K D"]:
        """Inner products with directions in the space of θ."""
        result = self.factor.products(directions[:, self.where])
        if self.bias is not None:
            result = result + self.bias_rows() @ directions[:, self.bias].T
        return result


def device_of_factor(factor: Factor) -> torch.device:
    """Where the numbers of a factor are."""
    return factor.values.device if isinstance(factor, Dense) else factor.signal.device  # type: ignore[attr-defined]


def joined(factors: list[Factor]) -> Factor:
    """The sum of gradients from several uses of one weight: outer products are put behind each other along T."""
    first = factors[0]
    if len(factors) == 1:
        return first
    if isinstance(first, Outer) and all(
        isinstance(f, Outer) and f.transposed == first.transposed and f.signal.shape[3] == first.signal.shape[3]
        and f.activation.shape[2] == first.activation.shape[2]
        for f in factors
    ):
        outers = [f for f in factors if isinstance(f, Outer)]
        k = max(f.components for f in outers)
        signals = [f.signal.expand(-1, k, -1, -1) for f in outers]
        return Outer(torch.cat(signals, 2), torch.cat([f.activation for f in outers], 1), first.transposed)
    if isinstance(first, Lookup) and all(isinstance(f, Lookup) for f in factors):
        lookups = [f for f in factors if isinstance(f, Lookup)]
        return Lookup(
            torch.cat([f.signal for f in lookups], 2), torch.cat([f.indices for f in lookups], 1), first.vocabulary
        )
    return Dense(torch.stack([f.rows() for f in factors]).sum(dim=0))


def _column(weights: Tensor | float, dimensions: int) -> Tensor | float:
    return weights.reshape(-1, *(1,) * (dimensions - 1)) if isinstance(weights, Tensor) else weights
