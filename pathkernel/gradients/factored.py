r"""Gradients of many functions in factored form.

.. math:: G_q = \sum_{\text{pieces}} G_q^{\text{piece}} + c_q\, v

Whatever is done with the gradients of a step (weighted sums, inner products with a few directions, a multiple of the
step's own displacement) leaves them in this form: (Q, P) numbers are never needed, and a range of columns is formed
where it is used.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.gradients.layers.factors import Dense, Piece
from pathkernel.gradients.layers.stacked_pieces import StackedPieces
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.runtime.workspace import Workspace


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Floating type in which products of gradients are formed: float32 for types of half precision."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class FactoredGradients:
    """Gradients of Q functions of θ: sums of pieces, and for each a multiple of one direction.

    Attributes
    ----------
    layout
        Where each parameter lies in θ.
    count
        Q; function q is component q % K of sample q // K of the pieces.
    pieces
        Their sum is the gradient; pieces of the same part of θ add up, and what none covers is zero.
    multiples, direction
        c, (Q,), and v, (P,), or None.
    place
        Where there are no pieces: the device of the zeros that stand for them, by default the CPU.
    stack
        The pieces of other points that these were taken with, and which of them they are; or None.
    known
        A direction and the inner products of the pieces with it, (Q,) float64, that were taken on the way; or None.
    """

    layout: ParameterLayout
    count: int
    pieces: tuple[Piece, ...]
    multiples: Tensor | None = None
    direction: Tensor | None = None
    place: torch.device | None = None
    stack: tuple[StackedPieces, int] | None = None
    known: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the pieces."""
        if self.pieces:
            return self.pieces[0].factor.device
        return self.place or torch.device("cpu") if self.direction is None else self.direction.device

    @classmethod
    def of_rows(cls, rows: Mapping[str, Tensor], layout: ParameterLayout) -> FactoredGradients:
        """Gradients (Q, size) by parameter name."""
        pieces = [Piece(layout.slices[name], Dense(own.unsqueeze(1))) for name, own in rows.items()]
        return cls(layout, len(next(iter(rows.values()))), tuple(pieces))

    @classmethod
    def dense(cls, matrix: Float[Tensor, "Q P"], layout: ParameterLayout) -> FactoredGradients:
        """A matrix of gradients, whose columns are then taken as they are."""
        return cls.of_rows({name: matrix[:, where] for name, where in layout.slices.items()}, layout)

    def __len__(self) -> int:
        return self.count

    @property
    def zero(self) -> bool:
        """True where there is nothing in them at all."""
        return not self.pieces and self.multiples is None

    def rows(self, out: Tensor) -> Tensor:
        """The gradients themselves, (Q, P), in a matrix that is given."""
        for where in self.layout.slices.values():
            out[:, where] = self.columns(where, out.dtype)
        return out

    def as_rows(self) -> FactoredGradients:
        """Rows in place of pieces, where these take less memory."""
        dtype = self.pieces[0].factor.dtype if self.pieces else torch.float32
        if self.count * self.layout.size >= sum(sum(piece.factor.numbers) for piece in self.pieces):
            return self
        rows = torch.empty(self.count, self.layout.size, dtype=dtype, device=self.device)
        return FactoredGradients.dense(self.rows(rows), self.layout)

    @property
    def positions(self) -> float:
        """Positions that a gradient is a sum over, on average over its entries: what forming it takes, by its size."""
        size = sum(piece.factor.size for piece in self.pieces)
        return sum(piece.factor.forming for piece in self.pieces) / size if size else 0.0

    def formed(self, workspace: Workspace, along: Float[Tensor, " P"] | None = None) -> FactoredGradients:
        """The same gradients as rows of each parameter, (Q, size), in memory of a workspace.

        Pieces that are sums over many positions are formed anew, in as many operations, by each of a total, a product
        with a direction and a range of columns; rows are read. Products with the direction ``along`` are taken of each
        parameter when it is formed, while its rows are in cache.
        """
        dtype = self.pieces[0].factor.dtype if self.pieces else torch.float32
        rows = row_memory(self.layout, self.count, dtype, self.device, workspace)
        products = self.write(rows, along)
        found = FactoredGradients.of_rows(rows, self.layout)
        return found if along is None or products is None else replace(found, known=(along, products))

    def write(self, rows: Mapping[str, Tensor], along: Float[Tensor, " P"] | None = None) -> Tensor | None:
        """Form the gradients of each parameter in given rows (Q, size), which are contiguous.

        Returns the products with a direction, where one is given, (Q,) float64.
        """
        products = None if along is None else torch.zeros(self.count, dtype=torch.float64, device=self.device)
        for name, own in rows.items():
            where, covering = self.layout.slices[name], self._by_name.get(name, [])
            factors = [piece.factor for part, piece in covering if part == where == piece.where]
            alone = len(covering) == len(factors) == 1 and self.multiples is None
            if alone and factors[0].dtype == own.dtype:
                factors[0].write(own.view(1, factors[0].samples, -1), full=False)
            else:
                own.copy_(self.columns(where, own.dtype))
            if products is not None and along is not None:
                products += own @ along[where].to(own)
        return products

    # -- linear combinations ---------------------------------------------------------------------------------

    def __rmul__(self, weight: float) -> FactoredGradients:
        """Every gradient times a number."""
        pieces = tuple(replace(piece, factor=piece.factor.scaled(weight)) for piece in self.pieces)
        multiples = None if self.multiples is None else weight * self.multiples
        return replace(self, pieces=pieces, multiples=multiples, stack=None, known=None)

    def __add__(self, other: FactoredGradients) -> FactoredGradients:
        """Gradients added one by one; neither may hold a multiple of a direction."""
        assert self.multiples is None and other.multiples is None
        return replace(self, pieces=(*self.pieces, *other.pieces), stack=None, known=None)

    def plus(self, multiples: Float[Tensor, " Q"], direction: Float[Tensor, " P"]) -> FactoredGradients:
        """A multiple of one direction added to each."""
        assert self.multiples is None
        return replace(self, multiples=multiples, direction=direction)

    # -- what is asked of them -------------------------------------------------------------------------------

    def __matmul__(self, directions: Tensor) -> Tensor:
        """Inner products with a direction (P,) or several (P, D): float64 (Q,) or (Q, D)."""
        several = directions.unsqueeze(1) if directions.dim() == 1 else directions
        several = several.to(self.device)
        result = self._products_at_hand(directions)
        if result is None:
            result = self._products(several)
        if self.multiples is not None and self.direction is not None:
            result.addr_(self.multiples, self.direction @ several.to(self.direction))
        return result[:, 0] if directions.dim() == 1 else result

    def _products_at_hand(self, directions: Tensor) -> Float[Tensor, "Q 1"] | None:
        """Inner products of the pieces with a direction that were taken with those of other points, or on the way."""
        if self.known is not None and directions is self.known[0]:
            return self.known[1].clone().unsqueeze(1)
        if self.stack is None or directions.dim() > 1:
            return None
        stack, place = self.stack
        found = stack.along(place, directions)
        return None if found is None else found.clone().unsqueeze(1)

    def _products(self, several: Float[Tensor, "P D"]) -> Float[Tensor, "Q D"]:
        """Inner products of the pieces, float64."""
        result = torch.zeros(self.count, several.shape[1], dtype=torch.float64, device=self.device)
        cast: dict[torch.dtype, Tensor] = {}
        for piece in self.pieces:
            dtype = piece.factor.dtype
            if dtype not in cast:
                cast[dtype] = several.T.to(dtype)
            result += piece.products(cast[dtype]).reshape(self.count, -1)
        return result

    def columns(self, where: slice, dtype: torch.dtype) -> Float[Tensor, "Q size"]:
        """The entries of a part of θ that lies within one parameter, formed; do not change them in place."""
        size = where.stop - where.start
        total: Tensor | None = None
        own = False  # whether the entries are not those of a piece itself
        for piece, begin, end, offset in self._covering(where):
            found = piece.factor.columns(begin, end).reshape(self.count, -1).to(dtype)
            if total is None and found.shape[1] == size:
                total, own = found, not piece.factor.formed
                continue
            if total is None or not own:
                total, own = found.new_zeros(self.count, size) if total is None else total.clone(), True
            total[:, offset : offset + found.shape[1]] += found
        if total is None:
            total, own = torch.zeros(self.count, size, dtype=dtype, device=self.device), True
        if self.multiples is not None and self.direction is not None:
            total = total if own else total.clone()
            total.addcmul_(self.multiples.to(dtype).unsqueeze(1), self.direction[where].to(dtype))
        return total

    def fill_columns(self, where: slice, out: Float[Tensor, "Q size"]) -> Tensor:
        """The same entries, formed in given memory, which is returned."""
        formed, covering = False, list(self._covering(where))
        if self.multiples is not None and self.direction is not None and len(covering) == 1:
            piece, begin, end, _ = covering[0]
            own = piece.factor
            if isinstance(own, Dense) and end - begin == out.shape[1] and own.dtype == out.dtype:  # read once
                multiples, along = self.multiples.to(out.dtype).unsqueeze(1), self.direction[where].to(out.dtype)
                return torch.addcmul(own.values[:, :, begin:end].reshape(self.count, -1), multiples, along, out=out)
        for piece, begin, end, offset in covering:
            if not formed and end - begin == out.shape[1]:
                piece.factor.fill_columns(begin, end, out.unflatten(0, (piece.factor.samples, -1)))
            else:
                if not formed:
                    out.zero_()
                out[:, offset : offset + end - begin] += piece.factor.columns(begin, end).reshape(self.count, -1)
            formed = True
        if not formed:
            out.zero_()
        if self.multiples is not None and self.direction is not None:
            out.addcmul_(self.multiples.to(out.dtype).unsqueeze(1), self.direction[where].to(out.dtype))
        return out

    def directional_products(self, where: slice, directions: Tensor) -> Float[Tensor, "D Q"]:
        """Inner products over a part of θ with a few directions (D, size) in it."""
        covering = list(self._covering(where))
        if len(covering) == 1 and self.multiples is None:
            ((piece, begin, end, _),) = covering
            whole = begin == 0 and end == piece.factor.size == directions.shape[1]
            if whole and piece.factor.dtype == directions.dtype:
                return piece.factor.products(directions).reshape(self.count, -1).T
        return directions @ self.columns(where, directions.dtype).T

    def total(self) -> Float[Tensor, " P"]:
        """The sum of all gradients, float64."""
        result = None if self.stack is None else self.stack[0].total(self.stack[1], self.layout.size)
        if result is None:
            result = torch.zeros(self.layout.size, dtype=torch.float64, device=self.device)
            for piece in self.pieces:
                for where, factor in piece.separated():
                    result[where] += factor.total()
        if self.multiples is not None and self.direction is not None:
            result += self.multiples.sum() * self.direction
        return result

    def names(self, piece: Piece) -> tuple[str, ...]:
        """The parameters that a piece belongs to: its weight's and its bias's."""
        starts = [piece.where.start] if piece.bias is None else [piece.where.start, piece.bias.start]
        return tuple(self.layout.names[bisect_right(self._starts, start) - 1] for start in starts)

    @cached_property
    def _starts(self) -> list[int]:
        return [where.start for where in self.layout.slices.values()]

    @cached_property
    def _by_name(self) -> dict[str, list[tuple[slice, Piece]]]:
        """Parameter → the parts of it that have gradients, and their pieces (a bias: under the bias's own range)."""
        found: dict[str, list[tuple[slice, Piece]]] = {}
        for piece in self.pieces:
            for name, where in zip(self.names(piece), (piece.where, piece.bias), strict=False):
                assert where is not None
                found.setdefault(name, []).append((where, piece))
        return found

    def _covering(self, where: slice) -> Iterator[tuple[Piece, int, int, int]]:
        """Pieces that reach into a part of θ: from where to where in the piece, and where that is in the part."""
        name = self.layout.names[bisect_right(self._starts, where.start) - 1]
        for own, piece in self._by_name.get(name, ()):
            start, stop = max(own.start, where.start), min(own.stop, where.stop)
            if start < stop:
                part = piece if own == piece.where else Piece(own, Dense(piece.bias_rows()))
                yield part, start - own.start, stop - own.start, start - where.start


def row_memory(
    layout: ParameterLayout, count: int, dtype: torch.dtype, device: torch.device, workspace: Workspace
) -> dict[str, Tensor]:
    """Rows (Q, size) of each parameter whose values are not set, contiguous, one after the other in one block."""
    memory = workspace.empty((count * layout.size,), dtype, device)
    return {
        name: memory[count * where.start : count * where.stop].view(count, -1) for name, where in layout.slices.items()
    }
