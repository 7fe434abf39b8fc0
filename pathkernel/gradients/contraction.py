r"""Inner products of gradients in factored form.

For :math:`G_i = \sum_t \delta_{it} a_{it}^\top` there are two ways to :math:`\langle G_i, G_j \rangle`, and the cheaper
one is taken, layer by layer: all pairs of positions, :math:`\sum_{ts} (a_{it} \cdot a_{js})(\delta_{it} \cdot
\delta_{js})`, with n m T² (p K + q) multiplications, or rows, n T p q K and then n m p q K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.gradients.layers.factor import Factor
from pathkernel.gradients.layers.factors import Piece
from pathkernel.gradients.matmul import product


def by_pairs(factor: Factor, n: int, m: int, full: bool = False, components: int | None = None) -> bool:
    """Test that all pairs of positions are cheaper than rows, for n × m pairs of samples.

    ``components`` says how many there will be, where the factor is of a few of them.
    """
    if factor.formed:
        return False
    k, t = components or factor.components, factor.positions
    products = k * k if full else k
    signals = 0 if factor.head else factor.width * products
    pairs = n * m * t * t * (signals + factor.comparing + products)
    rows = (n + m) * k * factor.forming + n * m * products * factor.size
    return pairs <= rows


def pair_products(left: Piece, right: Piece, full: bool, weight: float = 1.0, bias: float = 1.0) -> Tensor:
    """Σ_k ⟨G_ik, G_jk⟩ by pairs of positions, (n, m); for ``full`` (n, K, m, K).

    ``weight`` and ``bias`` scale the parts of θ.
    """
    units = left.factor.head and right.factor.head
    one, two = (Pairs.of(piece, full, weight, bias, units) for piece in (left, right))
    everything = slice(None), slice(None)
    products = one.added(None, two, one.readings(two, *everything), everything, everything)
    return products.permute(1, 0, 3, 2) if full else products[0, :, 0]


@dataclass(frozen=True)
class Pairs:
    r"""A layer's gradients as δ and a, contracted by all pairs of positions.

    Attributes
    ----------
    signal
        δ, (J, n, T, p): J = K components for blocks of all pairs of components; for their trace J = 1 with the
        components side by side, so that their products add up inside one matrix product. None for an output layer
        whose δ is the identity.
    activation
        a, (n, T, q), or the rows read from a table, (n, T) integers.
    weight, bias
        Metric of the weight and of the bias; 0 without one.
    components
        J.
    alike
        Components that are one in J.
    """

    signal: Tensor | None
    activation: Tensor
    weight: float
    bias: float
    components: int
    alike: int

    @classmethod
    def of(
        cls,
        piece: Piece,
        full: bool,
        weight: float = 1.0,
        bias: float = 1.0,
        unit: bool = False,
        same_point: bool = False,
    ) -> Pairs:
        """Pairs of a piece of a tape.

        ``unit``: δ is the identity on both sides. ``same_point``: both sides are at the same θ (`Outer.joint`).
        """
        own, joint = piece.factor.signals, piece.factor.joint if same_point and not full else None
        n, k, t, p = own.shape
        signal: Tensor | None = None
        if joint is not None:
            signal = joint.view(1, n, 1, p)
        elif not unit:
            signal = own.transpose(0, 1).contiguous() if full else own.transpose(1, 2).reshape(1, n, t, k * p)
        count, alike = (k, 1) if full else (1, k)
        readings = piece.factor.readings.contiguous()
        return cls(signal, readings, weight, bias if piece.bias is not None else 0.0, count, alike)

    @property
    def width(self) -> int:
        """Entries of a signal, 0 for the identity."""
        return 0 if self.signal is None else self.signal.shape[3]

    def readings(self, other: Pairs, rows: slice, columns: slice) -> Float[Tensor, "nT mT"]:
        """The metric's a_it · a_js for some samples of each side."""
        one, two = self.activation[rows], other.activation[columns]
        if not one.is_floating_point():
            assert self.signal is not None
            found = (one.reshape(-1, 1) == two.reshape(1, -1)).to(self.signal)
        else:
            found = product(one.flatten(0, 1), two.flatten(0, 1))
        if self.weight != 1.0:
            found *= self.weight
        return found.add_(self.bias) if self.bias else found

    def added(
        self,
        total: Tensor | None,
        other: Pairs,
        readings: Tensor,
        own: tuple[slice, slice],
        others: tuple[slice, slice],
    ) -> Float[Tensor, "J n L m"]:
        """``total`` plus Σ_ts (a_it · a_js)(δ_it · δ_js), for components and samples of each side."""
        if self.signal is None or other.signal is None:
            return self._head(total, readings, range(self.components)[own[0]], range(other.components)[others[0]])
        one, two = self.signal[own], other.signal[others]
        (k, n, t, _), (j, m, s, _) = one.shape, two.shape
        signals = product(one.flatten(0, 2), two.flatten(0, 2))
        if t == s == 1:
            signals, readings = signals.view(k, n, j, m), readings.view(1, n, 1, m)
            if total is None:
                return signals.mul_(readings)
            return total.addcmul_(signals, readings)
        signals = signals.view(k, n, t, j, m, s).mul_(readings.view(1, n, t, 1, m, s)).sum(dim=(2, 5))
        return signals if total is None else total.add_(signals)

    def own(self) -> Float[Tensor, "n J J"]:
        """Each sample with itself."""
        assert self.signal is not None
        count, n, t, p = self.signal.shape
        flat = self.signal.transpose(0, 1).reshape(n, count * t, p)
        signals = (flat @ flat.mT).view(n, count, t, count, t)
        if self.activation.is_floating_point():
            readings = self.activation @ self.activation.mT
        else:
            readings = (self.activation.unsqueeze(2) == self.activation.unsqueeze(1)).to(signals)
        return torch.einsum("njtls,nts->njl", signals, readings * self.weight + self.bias)

    def _head(self, total: Tensor | None, readings: Tensor, own: range, others: range) -> Tensor:
        """δ_k · δ_l is 1 for k = l and 0 otherwise."""
        if total is None:
            total = readings.new_zeros(len(own), readings.shape[0], len(others), readings.shape[1])
        first, end = max(own.start, others.start), min(own.stop, others.stop)
        if first < end:
            both = total[first - own.start : end - own.start, :, first - others.start : end - others.start]
            both.diagonal(dim1=0, dim2=2).add_(readings.unsqueeze(2), alpha=self.alike)
        return total


def parts(piece: Piece, bytes_per_sample: int) -> Iterator[tuple[slice, Piece]]:
    """A piece in parts along the first axis of its parameter whose rows take at most so many bytes a sample."""
    factor = piece.factor
    row = factor.components * factor.size * factor.dtype.itemsize
    length = factor.length
    unit = factor.size // length
    step = max(1, min(length, length * bytes_per_sample // max(1, row)))
    for begin in range(0, length, step):
        end = min(length, begin + step)
        where = slice(piece.where.start + begin * unit, piece.where.start + end * unit)
        yield where, Piece(where, factor if step == length else factor.rows_between(begin, end))
