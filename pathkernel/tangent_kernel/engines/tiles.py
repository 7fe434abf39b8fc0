"""Gradients of a group of samples in the form in which they are contracted, and the contraction of two groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from math import isqrt

import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.gradients.contraction import Pairs, by_pairs, parts
from pathkernel.gradients.layers.factor import Factor, side_by_side
from pathkernel.gradients.layers.factors import Dense, Outer, Piece
from pathkernel.gradients.layers.tape import NotElementwise
from pathkernel.gradients.matmul import product
from pathkernel.gradients.pytrees import blocks
from pathkernel.runtime.interrupts import deliver_interrupt
from pathkernel.runtime.workspace import Workspace
from pathkernel.tangent_kernel.engines.blocking import HIGH, MIRRORED, MIRRORED_AWAY, PART, TILE, is_away

WIDE = 4096
"""Columns from which rows are contracted by themselves; narrower ones are put beside each other, so that one product
pays for one pass over the tile. Provenance as of `blocking.TILE`."""

EVEN = 64
"""Columns of a product come in multiples of this: odd shapes are slower. Provenance as of `blocking.TILE`."""


class Metric:
    """d of the preconditioner diag(d), or the identity."""

    def __init__(self, preconditioner: Float[Tensor, " P"] | None) -> None:
        self.preconditioner = preconditioner
        self._constants: dict[tuple[int, int], float | None] = {}

    def constant(self, where: slice) -> float | None:
        """d on a part of θ where it is one number, else None."""
        if self.preconditioner is None:
            return 1.0
        key = where.start, where.stop
        if key not in self._constants:
            own = self.preconditioner[where]
            self._constants[key] = float(own[0]) if bool((own == own[0]).all()) else None
        return self._constants[key]

    def constants(self, piece: Piece) -> tuple[float, float] | None:
        """d on weight and bias, or None where it is not one number on each."""
        weight, bias = self.constant(piece.where), self.constant(piece.bias or piece.where)
        return None if weight is None or bias is None else (weight, bias)

    def applied(self, rows: Float[Tensor, "n K size"], where: slice) -> Tensor:
        """√d · rows: on both sides, so that every tile is a product of a matrix with its own transpose."""
        return rows if self.preconditioner is None else rows * self.preconditioner[where].sqrt().to(rows)


@dataclass(frozen=True)
class Form:
    """Form in which gradients are contracted.

    Attributes
    ----------
    pairs
        Samples on each side in all, over which what is formed once is spread.
    full
        Blocks of all pairs of components rather than their trace.
    metric
        d.
    dtype
        Of the factors of matrix products.
    workspace
        Memory for what is held.
    alike
        Whether rows and columns have the same shapes. Else what is cheaper for one of a layer's sides may not be so for
        the other, and both sides are formed as rows.
    """

    pairs: tuple[int, int]
    full: bool
    metric: Metric
    dtype: torch.dtype
    workspace: Workspace
    alike: bool = True

    def by_pairs(self, piece: Piece, components: int | None = None) -> bool:
        """Test that all pairs of positions are contracted, of as many components as the piece has or as are told."""
        constant = self.metric.constants(piece) is not None
        return self.alike and constant and by_pairs(piece.factor, *self.pairs, self.full, components)

    def by_kept_rows(self, piece: Piece, components: int | None = None) -> bool:
        """Test that rows take no more memory than δ and a (by 5 %), and so are formed at once and kept."""
        factor = piece.factor
        times = (components or factor.components) / factor.components
        signals, others = factor.numbers
        return not self.alike or factor.formed or times * factor.row_numbers <= 1.05 * (times * signals + others)

    def plain(self, factor: Factor) -> bool:
        """Test that nothing is to be done to rows."""
        return self.metric.preconditioner is None and factor.dtype == self.dtype

    def rows(self, rows: Float[Tensor, "n K size"], where: slice) -> Float[Tensor, "J n w"]:
        """Rows in the layout of products; see `Pairs`."""
        return side_by_side(self.metric.applied(rows, where).to(self.dtype), self.full)


@dataclass(frozen=True)
class Rows:
    """Rows of some samples that are to be kept, not formed yet.

    Attributes
    ----------
    shape
        (J, n, w).
    write
        Forms them in the memory that it is given.
    device
        Where that is.
    """

    shape: tuple[int, int, int]
    write: Callable[[Tensor], object]
    device: torch.device

    @classmethod
    def of(cls, factor: Factor, where: slice, form: Form) -> Rows:
        """Rows of a part of θ."""
        n, k, size = factor.samples, factor.components, factor.size
        shape = (k, n, size) if form.full else (1, n, k * size)
        if form.plain(factor):
            return cls(shape, lambda into: factor.write(into, form.full), factor.device)
        return cls(shape, lambda into: into.copy_(form.rows(factor.rows(), where)), factor.device)

    def formed(self, form: Form) -> Float[Tensor, "J n w"]:
        """Form them in memory of their own."""
        into = form.workspace.empty(self.shape, form.dtype, self.device)
        self.write(into)
        return into

    @classmethod
    def beside(cls, rows: list[Rows]) -> Rows:
        """Several beside each other."""
        widths = [own.shape[2] for own in rows]

        def write(into: Tensor) -> None:
            for own, part in zip(rows, into.split(widths, dim=2), strict=True):
                own.write(part)

        return cls((*rows[0].shape[:2], sum(widths)), write, rows[0].device)


@dataclass(frozen=True)
class Group:
    """Gradients of some samples.

    Attributes
    ----------
    pairs
        Layers contracted by pairs of positions.
    rows
        Rows of others, (J, n, w).
    unformed
        Layers whose rows are formed, part by part, each time that they are contracted.
    """

    pairs: list[Pairs]
    rows: list[Tensor]
    unformed: list[Piece]

    @classmethod
    def joined(cls, n: int, passes: Iterator[tuple[slice, list[Piece]]], form: Form) -> Group:
        """n samples from the pieces of several tapes, each at its place."""
        whole: Group | None = None
        for where, pieces in passes:
            pairs, rows, unformed = _sorted(pieces, form)
            group = cls(pairs, [], unformed)
            if whole is None:
                whole = group if where.stop == n else group._mapped(lambda own, axis: _longer(own, axis, n, form))
                whole.rows.extend(
                    form.workspace.empty((own.shape[0], n, own.shape[2]), form.dtype, own.device) for own in rows
                )
            if whole is not group:  # one of several passes: the first made room for all of them
                for (into, axis), (tensor, _) in zip(whole._tensors(), group._tensors(), strict=True):
                    into.narrow(axis, where.start, where.stop - where.start).copy_(tensor)
            for place, own in zip(whole.rows, rows, strict=True):
                own.write(place[:, where])
            del pieces, pairs, rows, unformed, group
        assert whole is not None
        return whole

    def _tensors(self) -> list[tuple[Tensor, int]]:
        """δ and a, and which axis of each is that of samples."""
        found: list[tuple[Tensor, int]] = []

        def note(tensor: Tensor, axis: int) -> Tensor:
            found.append((tensor, axis))
            return tensor

        self._mapped(note)
        return found

    def _mapped(self, function: Callable[[Tensor, int], Tensor]) -> Group:
        """Apply a function to δ and a, rows aside."""
        pairs = [
            replace(
                own,
                signal=None if own.signal is None else function(own.signal, 1),
                activation=function(own.activation, 0),
            )
            for own in self.pairs
        ]
        unformed = [replace(piece, factor=piece.factor.map(lambda own: function(own, 0))) for piece in self.unformed]
        return Group(pairs, [], unformed)


def _sorted(pieces: list[Piece], form: Form) -> tuple[list[Pairs], list[Rows], list[Piece]]:
    """Pieces of a tape by the way in which they are contracted."""
    pairs: list[Pairs] = []
    rows: list[Rows] = []
    unformed: list[Piece] = []
    for piece in pieces:
        factor = piece.factor
        if form.by_pairs(piece):
            constants = form.metric.constants(piece)
            assert constants is not None
            pairs.append(Pairs.of(piece.to(form.dtype), form.full, *constants, unit=factor.head, same_point=True))
            continue
        if form.by_kept_rows(piece):
            rows.append(Rows.of(factor, piece.where, form))
        else:
            unformed.append(replace(piece, bias=None))
        if piece.bias is not None:
            rows.append(Rows.of(Dense(piece.bias_rows()), piece.bias, form))
    # A product of few columns is a call's overhead: biases and small layers make one product together.
    wide = [own for own in rows if own.shape[2] >= WIDE]
    narrow = [own for own in rows if own.shape[2] < WIDE]
    return pairs, wide + ([Rows.beside(narrow)] if narrow else []), unformed


def contract(
    left: Group,
    right: Group,
    result: Float[Tensor, "J n L m"],
    form: Form,
    *,
    same: bool,
    first: bool,
    scratch: int,
) -> None:
    """Inner products of two groups into a part of a kernel matrix.

    Parameters
    ----------
    left, right
        n and m samples.
    result
        float64, to be overwritten if ``first``, or added to.
    form
        By which both were made.
    same
        Whether the groups are the same: then of blocks of equal components only entries on and above their diagonals
        are sure to be computed.
    scratch
        Bytes for a tile.

    Raises
    ------
    NotElementwise
        Where one of the groups alone has `Outer.joint` of a layer.
    """
    if any(one.width != two.width for one, two in zip(left.pairs, right.pairs, strict=True)):
        raise NotElementwise
    count, n, _, m = result.shape
    away = is_away(result.device)
    shape = Extent(count, n, m, same, away, 3 * max(4, form.dtype.itemsize))
    widest = max([_row_bytes(own.signal) for own in right.pairs] + [_row_bytes(own) for own in right.rows], default=1)
    # Blocks below the diagonal are transposed while their tile is in the cache, unless more is added to it later.
    near = same and count > 1 and first and not left.unformed and not away
    # Activations meet once a panel for all components; only signals differ from one component to the next.
    for rows, columns in _panels(shape, _positions(left.pairs), widest, scratch):
        deliver_interrupt()
        readings = [one.readings(two, rows, columns) for one, two in zip(left.pairs, right.pairs, strict=True)]
        for components, columns_of in _steps(shape, columns, widest, scratch):
            own, others = (components, rows), (columns_of, columns)
            total: Tensor | None = None
            for one, two, inner in zip(left.pairs, right.pairs, readings, strict=True):
                total = one.added(total, two, inner, own, others)
            for mine, theirs in zip(left.rows, right.rows, strict=True):
                total = _row_products(total, mine, theirs, own, others)
            tile = result[components, rows, columns_of, columns]
            if total is None:
                total = tile.new_zeros(()).expand(tile.shape)
            tile.copy_(total) if first else tile.add_(total)
            if near:
                later = slice(max(columns_of.start, components.stop), columns_of.stop)
                across = total[0, :, later.start - columns_of.start :].permute(1, 2, 0)
                result[later, columns, components.start, rows].copy_(across)
    for piece, other in zip(left.unformed, right.unformed, strict=True):
        for mine, theirs in _formed(piece, other, same, form, scratch):
            deliver_interrupt()
            for rows, columns in _panels(shape, 1, _row_bytes(theirs), scratch):
                for components, columns_of in _steps(shape, columns, _row_bytes(theirs), scratch):
                    own, others = (components, rows), (columns_of, columns)
                    result[components, rows, columns_of, columns] += _row_products(None, mine, theirs, own, others)
    for k in range(count - 1 if same and not near else 0):
        result[k + 1 :, :, k].copy_(result[k, :, k + 1 :].permute(1, 2, 0))


def own_products(piece: Piece, form: Form, limit: int, *, squares: bool = False) -> Tensor:
    """Inner products of each sample's gradients with themselves: (n,), or (n, K, K) for blocks; float64.

    ``limit`` is how many bytes of rows a sample may have at a time. ``squares`` contracts a layer of one position with
    the preconditioner without rows, by squares of its factors, which rounds in another order.
    """
    if form.by_pairs(piece):
        constants = form.metric.constants(piece)
        assert constants is not None
        found = Pairs.of(piece.to(torch.float64), form.full, *constants).own()
        return found if form.full else found[:, 0, 0]
    factor = piece.factor
    shape = (factor.samples, *(factor.components,) * 2 * form.full)
    total = torch.zeros(shape, dtype=torch.float64, device=factor.device)
    d = form.metric.preconditioner
    if squares and d is not None and not form.full and isinstance(factor, Outer) and factor.positions == 1:
        total += factor.weighted_squares(d[piece.where].double())
        rows: Iterator[tuple[slice, Tensor]] = iter(())
    else:
        rows = ((where, part.factor.rows()) for where, part in parts(piece, limit))
    for where, own in chain(rows, () if piece.bias is None else ((piece.bias, piece.bias_rows()),)):
        weighted = form.metric.applied(own.double(), where)
        total += weighted @ weighted.mT if form.full else weighted.square().sum(dim=(1, 2))
    return total


def mirror(result: Float[Tensor, "J n J n"], groups: list[slice]) -> None:
    """Fill in the entries that `contract` and the choice of groups left out, from those across the diagonal."""
    count, away = result.shape[0], is_away(result.device)
    tile = min(MIRRORED_AWAY if away else MIRRORED, result.shape[1])
    above = torch.ones(tile, tile, dtype=torch.bool, device=result.device).triu().unsqueeze(2)
    for place, i in enumerate(groups):
        for j in groups[place + 1 :]:
            for k in range(count):  # one matrix at a time: a transposition within the cache
                result[:, j, k, i].copy_(result[k, i, :, j].permute(1, 2, 0))
        for several in blocks(count, count if away else 1):
            equal = result[several, i, several, i].diagonal(dim1=0, dim2=2)  # (n, n, K)
            for a in blocks(i.stop - i.start, tile):
                own = equal[a, a]
                own.copy_(torch.where(above[: len(own), : len(own)], own, own.transpose(0, 1)))
                for b in blocks(i.stop - i.start, tile):
                    if b.start > a.start:
                        equal[b, a] = equal[a, b].transpose(0, 1)


@dataclass(frozen=True)
class Extent:
    """What two groups are contracted into.

    Attributes
    ----------
    count, n, m
        J, and samples on each side.
    same
        Whether the groups are the same.
    away
        As of `blocking.is_away`.
    entry
        Bytes that an entry takes while its tile is made.
    """

    count: int
    n: int
    m: int
    same: bool
    away: bool
    entry: int


def _panels(shape: Extent, positions: int, widest: int, scratch: int) -> Iterator[tuple[slice, slice]]:
    """Tiles of samples, together all n × m; for a trace of a group with itself those on and above the diagonal."""
    n, m = shape.n, shape.m
    if shape.count > 1:
        yield slice(0, n), slice(0, m)
        return
    # Low panels leave out more of what lies below the diagonal; high ones are multiplied faster.
    height = max(1, (min(TILE, max(32, n // 4)) if shape.same else HIGH) // positions)
    if shape.away:
        height = min(n, max(1, isqrt(scratch // (24 * positions**2))))
    # A tile is made three times over, and a product may copy its right factor into an order of its own.
    width = max(1, min(scratch // (24 * height * positions**2), scratch // widest))
    if width > EVEN:  # products of odd shapes are up to a third slower
        width -= width % EVEN
    for rows in blocks(n, height):
        start = rows.start if shape.same else 0
        for columns in blocks(m - start, width):
            yield rows, slice(start + columns.start, start + columns.stop)


def _steps(shape: Extent, columns: slice, widest: int, scratch: int) -> Iterator[tuple[slice, slice]]:
    """Components of each side, together all pairs; of a group with itself those with k ≤ l, and others beside them."""
    count, width = shape.count, columns.stop - columns.start
    step = max(1, scratch // (widest * width))
    # Away, as many rows of blocks as a tile of all components may have.
    high = max(1, scratch // (shape.entry * shape.n * width * count)) if shape.away else 1
    for own in blocks(count, high):
        start = own.start if shape.same else 0
        for others in blocks(count - start, step):
            yield own, slice(start + others.start, start + others.stop)


def _row_bytes(values: Tensor | None) -> int:
    """Bytes of one sample and component."""
    return 1 if values is None else max(1, values.element_size() * values.shape[2:].numel())


def _positions(pairs: list[Pairs]) -> int:
    return max((own.activation.shape[1] for own in pairs), default=1)


def _row_products(
    total: Tensor | None, left: Tensor, right: Tensor, own: tuple[slice, slice], others: tuple[slice, slice]
) -> Tensor:
    one, two = left[own], right[others]
    found = product(one.flatten(0, 1), two.flatten(0, 1)).view(*one.shape[:2], *two.shape[:2])
    return found if total is None else total.add_(found)


def _formed(left: Piece, right: Piece, same: bool, form: Form, scratch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a layer, part by part."""
    n, m = left.factor.samples, 0 if same else right.factor.samples
    # Every part is one pass over the result: its products have to be long enough to make up for that.
    long = WIDE * left.factor.components * 4 if form.full else 0
    part = scratch if is_away(left.factor.device) else PART
    limit = max(1, min(scratch // (n + m), max(part // (n + m), long)))
    for (where, one), (_, two) in zip(parts(left, limit), parts(right, limit), strict=True):
        mine = Rows.of(one.factor, where, form).formed(form)
        yield mine, mine if same else Rows.of(two.factor, where, form).formed(form)


def _longer(tensor: Tensor, axis: int, n: int, form: Form) -> Tensor:
    """Memory for n samples of the same."""
    return form.workspace.empty((*tensor.shape[:axis], n, *tensor.shape[axis + 1 :]), tensor.dtype, tensor.device)
