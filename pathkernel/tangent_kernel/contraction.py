r"""Inner products of gradients in factored form.

For :math:`G_i = \sum_t \delta_{it} a_{it}^\top` there are two ways to :math:`\langle G_i, G_j \rangle`, and the cheaper
one is taken, layer by layer: all pairs of positions, :math:`\sum_{ts} (a_{it} \cdot a_{js})(\delta_{it} \cdot
\delta_{js})`, with n m T² (p K + q) multiplications, or rows, n T p q K and then n m p q K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pathkernel.layers.factors import Dense, Factor, Lookup, Outer, Piece

Combine = Literal["sum", "full"]


def by_pairs(factor: Factor, n: int, m: int, full: bool = False) -> bool:
    """Whether all pairs of positions are cheaper than rows, for an (n, m) tile."""
    if isinstance(factor, Dense):
        return False
    k, t = factor.components, factor.signal.shape[2] if isinstance(factor, (Outer, Lookup)) else 1
    width = factor.signal.shape[3]
    other = factor.activation.shape[2] if isinstance(factor, Outer) else 1
    products = k * k if full else k
    pairs = n * m * t * t * (width * products + other + products)
    rows = (n + m) * k * (t * width * other if isinstance(factor, Outer) else factor.size) + n * m * products * factor.size
    return pairs <= rows


def pair_products(left: Piece, right: Piece, full: bool, weight: float = 1.0, bias: float = 1.0) -> Tensor:
    """Σ_k ⟨G_ik, G_jk⟩ by pairs of positions, (n, m); for ``full`` (n, K, m, K).

    ``weight`` and ``bias`` scale the parts of θ.
    """
    one, two = left.factor, right.factor
    inner = _readings(one, two)
    if weight != 1.0:
        inner = inner * weight
    if left.bias is not None:
        inner = inner + bias
    assert isinstance(one, (Outer, Lookup)) and isinstance(two, (Outer, Lookup))
    (n, k, t, p), (m, j, s, _) = one.signal.shape, two.signal.shape
    if isinstance(one, Outer) and one.head:
        # δ is the identity: δ_k · δ_l is 1 for k = l and 0 otherwise.
        return inner * k if not full else inner[:, None, :, None] * torch.eye(k, dtype=inner.dtype)[None, :, None, :]
    if not full:
        signals = _flat(one.signal) @ _flat(two.signal).T
        if t == s == 1:
            return signals.mul_(inner)
        return torch.einsum("itjs,itjs->ij", signals.reshape(n, t, m, s), inner.reshape(n, t, m, s))
    signals = one.signal.reshape(n * k * t, p) @ two.signal.reshape(m * j * s, p).T
    if t == s == 1:
        return signals.reshape(n, k, m, j).mul_(inner[:, None, :, None])
    return torch.einsum("iktjls,itjs->ikjl", signals.reshape(n, k, t, m, j, s), inner.reshape(n, t, m, s))


def _readings(one: Factor, two: Factor) -> Tensor:
    """a_it · a_js, (n T, m T)."""
    if isinstance(one, Lookup) and isinstance(two, Lookup):
        return (one.indices.reshape(-1, 1) == two.indices.reshape(1, -1)).to(one.signal)
    assert isinstance(one, Outer) and isinstance(two, Outer)
    return one.activation.flatten(0, 1) @ two.activation.flatten(0, 1).T


def _flat(signal: Tensor) -> Tensor:
    """δ with the components behind each other, (n T, K p): their products then add up over components."""
    n, k, t, p = signal.shape
    return signal.transpose(1, 2).reshape(n * t, k * p)


def row_products(left: Tensor, right: Tensor, full: bool) -> Tensor:
    """The same from rows (n, K, size) and (m, K, size)."""
    (n, k, size), (m, j, _) = left.shape, right.shape
    if full:
        return (left.reshape(n * k, size) @ right.reshape(m * j, size).T).reshape(n, k, m, j)
    return left.reshape(n, k * size) @ right.reshape(m, k * size).T


def parts(piece: Piece, bytes_per_sample: int) -> Iterator[tuple[slice, Piece]]:
    """A piece in parts along the first axis of its parameter whose rows take at most so many bytes a sample."""
    factor = piece.factor
    itemsize = factor.rows().element_size() if isinstance(factor, Dense) else factor.signal.element_size()
    row = factor.components * factor.size * itemsize
    if isinstance(factor, Dense):
        length, unit = factor.size, 1
    elif isinstance(factor, Outer):
        length = factor.activation.shape[2] if factor.transposed else factor.signal.shape[3]
        unit = factor.size // length
    else:
        length, unit = factor.vocabulary, factor.signal.shape[3]
    step = max(1, min(length, length * bytes_per_sample // max(1, row)))
    for begin in range(0, length, step):
        end = min(length, begin + step)
        where = slice(piece.where.start + begin * unit, piece.where.start + end * unit)
        yield where, Piece(where, _part(factor, begin, end))


def _part(factor: Factor, begin: int, end: int) -> Factor:
    if isinstance(factor, Dense):
        return Dense(factor.values[:, :, begin:end])
    if isinstance(factor, Outer) and factor.transposed:
        return replace(factor, activation=factor.activation[:, :, begin:end])
    if isinstance(factor, Outer):
        return replace(factor, signal=factor.signal[:, :, :, begin:end], head=False)
    assert isinstance(factor, Lookup)
    inside = (factor.indices >= begin) & (factor.indices < end)
    indices = torch.where(inside, factor.indices - begin, 0)
    return Lookup(factor.signal * inside[:, None, :, None], indices, end - begin)
