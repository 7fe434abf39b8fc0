"""The layer-wise engine: activations × back-propagated signals, contracted without forming a Jacobian."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import vmap

from pathkernel._typing import PyTree
from pathkernel.functional import ModelFunction
from pathkernel.layers.factors import Dense, Outer, Piece
from pathkernel.layers.proved import ProvedTapes
from pathkernel.layers.tape import Tape
from pathkernel.parameters import ParameterLayout
from pathkernel.pytrees import blocks, count, take
from pathkernel.tangent_kernel.contraction import by_pairs, pair_products, parts, row_products
from pathkernel.tangent_kernel.engine import Engine
from pathkernel.tangent_kernel.jacobian import JacobianEngine
from pathkernel.tangent_kernel.outputs import OutputSelection

TILE = 256
"""Samples on each side of a tile: large enough for matrix products at full speed, small enough to leave out half."""


class LayerwiseEngine(Engine):
    r"""Layer by layer, :math:`(A A^\top) \odot (\Delta \Delta^\top)` or rows of one layer at a time, as is cheaper.

    Time O(n K · backward + Σ_layers n² (q + K p)) in place of n² K P; memory: activations and signals of the samples
    in hand, within the budget, never n × P. Parameters that the layers do not account for (`coverage`) go to the plain
    engine, parameter by parameter.
    """

    name = "layerwise"

    def __init__(self, function: ModelFunction, selection: OutputSelection, memory: int) -> None:
        super().__init__(function, selection, memory)
        self.tapes = ProvedTapes(function)

    @property
    def full(self) -> bool:
        """Whether blocks of all pairs of components are asked for."""
        return self.selection.combine == "full"

    # -- pieces of a block of samples ------------------------------------------------------------------------

    def pieces(self, theta: Tensor, X: PyTree, context: PyTree) -> tuple[list[Piece], Tape]:
        """Gradients of h in factored form, and the tape they come from."""
        tape = self.tapes.record(theta, X, self.function)
        if self.selection.identity:
            return tape.pieces(tape.outputs, slice(0, tape.outputs.shape[1])), tape
        with torch.enable_grad():
            h = vmap(self.selection.function)(tape.outputs, context)
        return tape.pieces(h.reshape(tape.n, -1)), tape

    def _bytes_per_sample(self, theta: Tensor, X: PyTree, context: PyTree) -> int:
        """Activations, signals and graph that one sample keeps alive."""
        few = min(2, count(X))
        pieces, tape = self.pieces(theta, take(X, slice(0, few)), take(context, slice(0, few)))
        held = sum(_numel(piece) for piece in pieces)
        graph = 4 * sum(shape.numel() for shape in tape.shapes)
        return (held + graph) * torch.finfo(self.function.dtype).bits // 8 // few

    # -- the contract ----------------------------------------------------------------------------------------

    def gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, diagonal: Tensor | None
    ) -> Tensor:
        """K(X, Y); with Y None only tiles on and above the diagonal are computed."""
        n, m = count(X), count(X if Y is None else Y)
        per_sample = self._bytes_per_sample(theta, X, context_X)
        size = max(1, self.memory // (4 * per_sample))
        result: Tensor | None = None
        for i in blocks(n, size):
            left, tape = self.pieces(theta, take(X, i), take(context_X, i))
            if result is None:
                shape = (n, m) if not self.full else (n, left_components(left, tape), m, left_components(left, tape))
                result = torch.zeros(shape, dtype=torch.float64)
            for j in blocks(m, size):
                if Y is None and j.start < i.start:
                    continue
                if Y is None and i == j:
                    self._symmetric(left, result[i][..., j, :] if self.full else result[i, j], diagonal)
                    continue
                Z, context_Z = (X, context_X) if Y is None else (Y, context_Y)
                right, _ = self.pieces(theta, take(Z, j), take(context_Z, j))
                tile = result[i][..., j, :] if self.full else result[i, j]
                self._rectangular(left, right, tile, diagonal)
                if Y is None:
                    mirrored = result[j][..., i, :] if self.full else result[j, i]
                    mirrored.copy_(_mirror(tile))
        assert result is not None
        if self.full:
            result = result.transpose(1, 2)
        if self.selection.combine == "mean":
            result /= left_components(left, tape)
        plain = self._plain_engine(theta)
        if plain is not None:
            engine, own, where = plain
            result += engine.gram(own, X, Y, context_X, context_Y, None if diagonal is None else diagonal[where])
        return result

    def _symmetric(self, pieces: list[Piece], result: Tensor, diagonal: Tensor | None) -> None:
        """A block with itself: tiles above the diagonal, and their mirror images."""
        n = result.shape[0]
        for i in blocks(n, TILE):
            left = [piece.take(i) for piece in pieces]
            for j in blocks(n, TILE):
                if j.start < i.start:
                    continue
                right = left if i == j else [piece.take(j) for piece in pieces]
                tile = result[i][..., j, :] if self.full else result[i, j]
                self._pairs(left, right, tile, diagonal)
        for piece in pieces:
            for left_rows in self._rows(piece, piece, diagonal):
                for i in blocks(n, TILE):
                    for j in blocks(n, TILE):
                        if j.start >= i.start:
                            tile = result[i][..., j, :] if self.full else result[i, j]
                            tile += row_products(left_rows[0][i], left_rows[1][j], self.full)
        for i in blocks(n, TILE):
            for j in blocks(n, TILE):
                tile = result[i][..., j, :] if self.full else result[i, j]
                if i == j:
                    tile.copy_((tile + _mirror(tile)) / 2)
                elif j.start > i.start:
                    mirrored = result[j][..., i, :] if self.full else result[j, i]
                    mirrored.copy_(_mirror(tile))

    def _rectangular(self, left: list[Piece], right: list[Piece], result: Tensor, diagonal: Tensor | None) -> None:
        n, m = result.shape[0], result.shape[2 if self.full else 1]
        for i in blocks(n, TILE):
            for j in blocks(m, TILE):
                tile = result[i][..., j, :] if self.full else result[i, j]
                self._pairs([piece.take(i) for piece in left], [piece.take(j) for piece in right], tile, diagonal)
        for one, two in zip(left, right, strict=True):
            for left_rows, right_rows in self._rows(one, two, diagonal):
                result += row_products(left_rows, right_rows, self.full)

    def _pairs(self, left: list[Piece], right: list[Piece], tile: Tensor, diagonal: Tensor | None) -> None:
        """Add the pieces that are contracted by pairs of positions."""
        total: Tensor | None = None
        for one, two in zip(left, right, strict=True):
            scales = _scales(one, diagonal)
            if scales is None or not by_pairs(one.factor, one.factor.samples, two.factor.samples, self.full):
                continue
            products = pair_products(one, two, self.full, *scales)
            total = products if total is None else total.add_(products)
        if total is not None:
            tile += total

    def _rows(self, left: Piece, right: Piece, diagonal: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the pieces that are not, part by part within the budget."""
        n, m = left.factor.samples, right.factor.samples
        tile = min(n, TILE), min(m, TILE)
        if _scales(left, diagonal) is not None and by_pairs(left.factor, *tile, self.full):
            return
        limit = self.memory // (8 * (n + m))
        for (where, one), (_, two) in zip(parts(left, limit), parts(right, limit), strict=True):
            yield self._weighted(one, two, where, diagonal)
        if left.bias is not None:
            one, two = Piece(left.bias, Dense(left.bias_rows())), Piece(right.bias or left.bias, Dense(right.bias_rows()))
            yield self._weighted(one, two, left.bias, diagonal)

    def _weighted(self, one: Piece, two: Piece, where: slice, diagonal: Tensor | None) -> tuple[Tensor, Tensor]:
        left = one.factor.rows()
        right = left if one.factor is two.factor else two.factor.rows()
        if diagonal is None:
            return left, right
        # √d on both sides keeps every tile a product of a matrix with its own transpose.
        root = diagonal[where].sqrt().to(left)
        return left * root, right * root

    def diagonal(self, theta: Tensor, X: PyTree, context: PyTree, diagonal: Tensor | None) -> Tensor:
        """K(x, x), sample by sample."""
        size = max(1, self.memory // (4 * self._bytes_per_sample(theta, X, context)))
        found = []
        for piece in blocks(count(X), min(size, TILE)):
            pieces, tape = self.pieces(theta, take(X, piece), take(context, piece))
            found.append(self._diagonal(pieces, tape, diagonal))
        result = torch.cat(found)
        plain = self._plain_engine(theta)
        if plain is not None:
            engine, own, where = plain
            result += engine.diagonal(own, X, context, None if diagonal is None else diagonal[where])
        return result

    def _diagonal(self, pieces: list[Piece], tape: Tape, diagonal: Tensor | None) -> Tensor:
        k = left_components(pieces, tape)
        total = torch.zeros((tape.n, k, k) if self.full else (tape.n,), dtype=torch.float64)
        for piece in pieces:
            limit = self.memory // (8 * tape.n)
            own = [*parts(piece, limit)]
            if piece.bias is not None:
                own.append((piece.bias, Piece(piece.bias, Dense(piece.bias_rows()))))
            for where, part in own:
                rows = part.factor.rows().double()
                weighted = rows if diagonal is None else rows * diagonal[where].double()
                total += torch.einsum("nkp,njp->nkj", weighted, rows) if self.full else (weighted * rows).sum(dim=(1, 2))
        return total / k if self.selection.combine == "mean" else total

    def _plain_engine(self, theta: Tensor) -> tuple[JacobianEngine, Tensor, Tensor] | None:
        """The plain engine for the parameters that the tape does not cover, their values, and where they are."""
        coverage, layout = self.tapes.coverage, self.function.layout
        names = [name for name in layout.names if coverage is not None and name in coverage.plain]
        if not names:
            return None
        values = layout.unflatten(theta)
        own = ParameterLayout.of({name: values[name] for name in names})
        rest = {name: value for name, value in values.items() if name not in own.slices}
        function = ModelFunction(
            self.function.module, own, {**self.function.constants, **rest}, self.function.dtype, self.function.state,
            self.function.tap,
        )
        where = torch.cat([torch.arange(layout.slices[name].start, layout.slices[name].stop) for name in names])
        return JacobianEngine(function, self.selection, self.memory), theta[where], where


def left_components(pieces: list[Piece], tape: Tape) -> int:
    """K."""
    return pieces[0].factor.components if pieces else tape.outputs.shape[1]


def _scales(piece: Piece, diagonal: Tensor | None) -> tuple[float, float] | None:
    """d on weight and bias where it is constant on each, or None."""
    if diagonal is None:
        return 1.0, 1.0
    scales = []
    for where in (piece.where, piece.bias or piece.where):
        own = diagonal[where]
        if not bool((own == own[0]).all()):
            return None
        scales.append(float(own[0]))
    return scales[0], scales[1]


def _numel(piece: Piece) -> int:
    factor = piece.factor
    if isinstance(factor, Dense):
        return factor.values.numel()
    return factor.signal.numel() + (factor.activation.numel() if isinstance(factor, Outer) else 0)  # type: ignore[attr-defined]


def _mirror(tile: Tensor) -> Tensor:
    return tile.transpose(0, 1) if tile.dim() == 2 else tile.permute(2, 3, 0, 1)
