r"""Inner products of two sets of gradients in factored form, piece by piece where these are cheap.

Where an optimizer step only scales the gradient, shares are :math:`a\,\langle q, g_i\rangle`: for a layer (p, q) and
one position each, p + q multiplications for a query and a sample in place of p · q.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.gradients.contraction import by_pairs, pair_products
from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.layers.factors import Piece
from pathkernel.gradients.pytrees import blocks

TILE = 256
"""Query samples contracted at once. Chosen, not measured."""


def paired_names(left: FactoredGradients, others: Sequence[FactoredGradients]) -> set[str]:
    """Parameters whose pieces are the same parts of θ on both sides, and cheaper in pairs than as rows."""
    expected = _places(left)
    found = set(expected)
    for other in others:
        places = _places(other)
        found &= {name for name, keys in places.items() if expected.get(name) == keys}
    changed = True
    while changed:  # a weight goes with its bias
        changed = False
        for gradients in (left, *others):
            for piece in gradients.pieces:
                names = set(gradients.names(piece))
                cheap = by_pairs(piece.factor, len(left), max(map(len, others)))
                if names & found and not (cheap and names <= found):
                    found, changed = found - names, True
    return found


def _places(gradients: FactoredGradients) -> dict[str, set[tuple[int, int, int]]]:
    places: dict[str, set[tuple[int, int, int]]] = {}
    for piece in gradients.pieces:
        for name in gradients.names(piece):
            places.setdefault(name, set()).add(_key(piece))
    return places


def _key(piece: Piece) -> tuple[int, int, int]:
    return piece.where.start, piece.where.stop, -1 if piece.bias is None else piece.bias.start


def contracted(left: FactoredGradients, right: FactoredGradients, rates: Mapping[str, float], memory: int) -> Tensor:
    """Σ over paired parameters of rate · ⟨G_q, G_i⟩, (Q, B): multiples of a direction are left out.

    Parameters
    ----------
    left, right
        Gradients of Q queries and B samples; those of ``right`` have one component a sample.
    rates
        By the name of each parameter to be contracted; see `paired_names`.
    memory
        Bytes for a tile of pairs.
    """
    alike = len(set(rates.values())) == 1
    if alike and (found := _taken_together(left, right, rates)) is not None:
        return found.T.double() * next(iter(rates.values()))
    total: Tensor | None = None
    for piece in left.pieces:
        names = left.names(piece)
        if names[0] not in rates:
            continue
        weight, bias = (1.0, 1.0) if alike else (rates[names[0]], rates[names[-1]])
        for other in right.pieces:
            if _key(other) != _key(piece):
                continue
            products = _tiled(piece, other, weight, bias, memory)
            total = products if total is None else total.add_(products)
    if total is None:
        return torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    return total.double() * (next(iter(rates.values())) if alike else 1.0)


def _taken_together(
    left: FactoredGradients, right: FactoredGradients, names: Collection[str]
) -> Float[Tensor, "B Q"] | None:
    """Inner products of pairs that are taken with those of other points; None where the two are not of one stack."""
    if left.stack is None or right.stack is None or left.stack[1] != right.stack[1]:
        return None
    stack, place = left.stack
    wanted = {piece.where.start for piece in left.pieces if left.names(piece)[0] in names}
    return stack.pairs(right.stack[0], wanted, place)


def _tiled(left: Piece, right: Piece, weight: float, bias: float, memory: int) -> Tensor:
    n, k, m = left.factor.samples, left.factor.components, right.factor.samples
    per_sample = 4 * left.factor.positions * m * right.factor.positions * k * left.factor.dtype.itemsize
    tiles = []
    for own in blocks(n, min(TILE, memory // per_sample) if left.factor.positions > 1 else n):
        tile = pair_products(left.take(own) if own != slice(0, n) else left, right, k > 1, weight, bias)
        tiles.append(tile.reshape(-1, m))
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)
