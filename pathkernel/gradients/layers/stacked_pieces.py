r"""Pieces of the gradients at several points, stacked: what is asked of all of them is one batched product a layer.

For :math:`G_{si} = \sum_t \delta_{sit} a_{sit}^\top` at k points s,

.. math:: \langle G_{si}, V_s \rangle = \sum_t \delta_{sit} \cdot V_s\, a_{sit},\qquad
          \sum_i G_{si} = \Delta_s^\top A_s,\qquad
          \langle G_{si}, H_{sj} \rangle = (a_{si} \cdot a'_{sj})(\delta_{si} \cdot \delta'_{sj}) .
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.gradients.layers.factors import Dense, Outer, Piece

AtPoints = Sequence[Tensor]
"""The same tensor of a factor at each of k points."""


class StackedPieces:
    """Pieces of n samples' gradients in K components at each of k points; results are computed once, for all points.

    Parameters
    ----------
    forms
        Pieces of one of the points, for their forms and places.
    tensors
        What the factor of each piece stores, one for each of the k points.

    Notes
    -----
    Results are None where a piece has a form without a batched product; single points are then asked one by one.
    """

    def __init__(self, forms: Sequence[Piece], tensors: Sequence[Sequence[AtPoints]]) -> None:
        self.forms, self.tensors = tuple(forms), tuple(tuple(own) for own in tensors)
        self.directions: Directions | None = None
        self._along: tuple[Tensor | None] | None = None
        self._totals: tuple[list[tuple[slice, Tensor]] | None] | None = None
        self._pairs: tuple[StackedPieces, frozenset[int], Tensor | None] | None = None

    @classmethod
    def of(cls, pieces: Sequence[Piece], tensors: Sequence[Sequence[AtPoints]]) -> StackedPieces:
        """Stacked pieces, of which those of one point are known but for their numbers."""
        first = [_with_tensors(piece, [t[0] for t in own]) for piece, own in zip(pieces, tensors, strict=True)]
        return cls(first, tensors)

    def __len__(self) -> int:
        return len(self.tensors[0][0]) if self.tensors else 0

    def at(self, place: int) -> tuple[Piece, ...]:
        """Pieces of one point."""
        return tuple(
            _with_tensors(piece, [tensor[place] for tensor in own])
            for piece, own in zip(self.forms, self.tensors, strict=True)
        )

    def to(self, dtype: torch.dtype) -> StackedPieces:
        """Convert to another floating type."""
        if all(piece.factor.dtype == dtype for piece in self.forms):
            return self
        cast = [
            [[t.to(dtype) if t.is_floating_point() else t for t in points] for points in own] for own in self.tensors
        ]
        return StackedPieces([piece.to(dtype) for piece in self.forms], cast)

    def first_component(self) -> StackedPieces:
        """Restrict to the first component."""
        tensors = [[[t[:, :1] for t in own[0]], *own[1:]] for own in self.tensors]
        return StackedPieces([replace(piece, factor=piece.factor.component(0)) for piece in self.forms], tensors)

    # -- inner products with a direction of each point ---------------------------------------------------------

    def meet(self, directions: Directions) -> None:
        """Tell a direction of each point, with which `along` takes the inner products of all of them."""
        if self.directions is not directions and len(directions) == len(self):
            self.directions = directions
            self._along = None

    def along(self, place: int, direction: Tensor) -> Float[Tensor, " nK"] | None:
        """Inner products of a point's gradients with its direction, float64; None of another one."""
        if self.directions is None or self.directions.rows[place] is not direction:
            return None
        if self._along is None:
            self._along = (self._products(self.directions),)
        (found,) = self._along
        return None if found is None else found[place]

    def _products(self, directions: Directions) -> Float[Tensor, "k nK"] | None:
        total: Tensor | None = None
        for piece, own in zip(self.forms, self.tensors, strict=True):
            found = _products(piece, own, directions.to(piece.factor.dtype))
            if found is None:
                return None
            total = found.double() if total is None else total.add_(found)
        return None if total is None else total.flatten(1)

    # -- sums over samples -------------------------------------------------------------------------------------

    def total(self, place: int, size: int) -> Float[Tensor, " P"] | None:
        """Sum of a point's gradients, float64; None where a piece has no batched sum."""
        if self._totals is None:
            self._totals = (self._summed(),)
        (found,) = self._totals
        if found is None:
            return None
        covered = sum(where.stop - where.start for where, _ in found)
        made = torch.empty if covered == size else torch.zeros
        result = made(size, dtype=torch.float64, device=found[0][1].device)
        for where, sums in found:
            result[where] = sums[place]
        return result

    def _summed(self) -> list[tuple[slice, Tensor]] | None:
        """Parts of θ, no two of which overlap, with the sums of all points in them, (k, size)."""
        parts: dict[int, tuple[slice, Tensor]] = {}
        for piece, own in zip(self.forms, self.tensors, strict=True):
            found = _sums(piece, own)
            if found is None:
                return None
            for where, sums in found:
                if where.start in parts:  # sums of sums are rounded to float64
                    return None
                parts[where.start] = where, sums
        return list(parts.values()) or None

    # -- inner products of pairs -------------------------------------------------------------------------------

    def pairs(self, other: StackedPieces, wanted: Collection[int], place: int) -> Float[Tensor, "m nK"] | None:
        """Inner products of gradients of both at one point, over the pieces that begin at ``wanted``.

        ``other`` has one component a sample. None where one of these pieces has several positions in a sample.
        """
        key = frozenset(wanted)
        if self._pairs is None or self._pairs[0] is not other or self._pairs[1] != key:
            self._pairs = other, key, self._paired(other, key) if len(other) == len(self) else None
        found = self._pairs[2]
        return None if found is None else found[place]

    def _paired(self, other: StackedPieces, wanted: frozenset[int]) -> Float[Tensor, "k m nK"] | None:
        total: Tensor | None = None
        for piece, own in zip(self.forms, self.tensors, strict=True):
            if piece.where.start not in wanted:
                continue
            for second, others in zip(other.forms, other.tensors, strict=True):
                if (second.where, second.bias) != (piece.where, piece.bias):
                    continue
                if not (_is_outer(piece) and _is_outer(second)):
                    return None
                total = _added_pairs(total, others, own, piece.bias is not None)
        return None if total is None else total.flatten(2)


class Directions:
    """A direction in the space of θ for each of k points.

    Attributes
    ----------
    matrix
        (k, P).
    rows
        The same, one by one: a direction is known again by being one of these tensors.
    """

    def __init__(self, matrix: Float[Tensor, "k P"]) -> None:
        self.matrix, self.rows = matrix, matrix.unbind()
        self._cast = {matrix.dtype: matrix}

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, dtype: torch.dtype) -> Float[Tensor, "k P"]:
        """The directions in another floating type; found once, for all pieces that meet them."""
        if dtype not in self._cast:
            self._cast[dtype] = self.matrix.to(dtype)
        return self._cast[dtype]


def _with_tensors(piece: Piece, tensors: Sequence[Tensor]) -> Piece:
    """The piece with other numbers, in the order of the fields of its factor."""
    own = iter(tensors)
    return replace(piece, factor=piece.factor.map(lambda _: next(own)))


def _is_outer(piece: Piece) -> bool:
    """True for outer products of one position in a sample."""
    factor = piece.factor
    return isinstance(factor, Outer) and factor.positions == 1 and not factor.transposed


def _sums(piece: Piece, own: Sequence[AtPoints]) -> list[tuple[slice, Tensor]] | None:
    """Parts of θ with the sums over samples and components, (k, size); None where the form has no batched sum."""
    if isinstance(piece.factor, Dense):
        return [(piece.where, torch.stack([values.sum(dim=(0, 1)) for values in own[0]]))]
    if not isinstance(piece.factor, Outer) or piece.factor.transposed:
        return None
    k, p, q = len(own[0]), own[0][0].shape[3], own[1][0].shape[2]
    weights, biases = own[0][0].new_empty(k, p, q), own[0][0].new_empty(k, p)
    for s, (signal, activation) in enumerate(zip(*own, strict=True)):
        signals = (signal.sum(dim=1) if signal.shape[1] > 1 else signal[:, 0]).flatten(0, 1)  # (nT, p)
        torch.mm(signals.T, activation.flatten(0, 1), out=weights[s])
        if piece.bias is not None:
            torch.sum(signals, dim=0, out=biases[s])
    weight = piece.where, weights.flatten(1)
    return [weight] if piece.bias is None else [weight, (piece.bias, biases)]


def _products(piece: Piece, own: Sequence[AtPoints], directions: Float[Tensor, "k P"]) -> Float[Tensor, "k n K"] | None:
    """Inner products of a piece with a direction of each point; None where its form has no batched product."""
    weight = directions[:, piece.where]
    if isinstance(piece.factor, Dense):
        return torch.stack([values @ direction for values, direction in zip(own[0], weight, strict=True)])
    if not isinstance(piece.factor, Outer) or piece.factor.transposed:
        return None
    n, components, _, p = own[0][0].shape  # of signals (n, K, T, p), beside activations (n, T, q)
    weight = weight.unflatten(1, (p, -1))
    bias = None if piece.bias is None else directions[:, piece.bias]
    found = own[0][0].new_empty(len(own[0]), n, components)
    # Point by point: V a is met with δ while it is in cache, which it is not as one batched product.
    for s, (signal, activation) in enumerate(zip(*own, strict=True)):
        readings = activation.flatten(0, 1)  # (nT, q)
        along = readings @ weight[s].T if bias is None else torch.addmm(bias[s], readings, weight[s].T)
        torch.linalg.vecdot(signal.flatten(2), along.view(n, 1, -1), out=found[s])
    return found


def _added_pairs(
    total: Tensor | None, left: Sequence[AtPoints], right: Sequence[AtPoints], bias: bool
) -> Float[Tensor, "k m n K"]:
    """``total`` plus (a · a' + 1)(δ · δ') of one layer, without the 1 where it has no bias."""
    (n, components), m = right[0][0].shape[:2], len(left[0][0])
    begins = total is None
    if total is None:
        total = right[0][0].new_empty(len(right[0]), m, n, components)
    for s, own in enumerate(total):
        readings = left[1][s].flatten(1) @ right[1][s].flatten(1).T
        signals = left[0][s].flatten(1) @ right[0][s].reshape(n * components, -1).T
        if bias:
            readings += 1.0
        if begins:
            torch.mul(signals.view(m, n, components), readings.unsqueeze(2), out=own)
        else:
            own.addcmul_(signals.view(m, n, components), readings.unsqueeze(2))
    return total
