r"""The same products layer by layer, as matrix products of activations and back-propagated signals.

For :math:`G_{ik} = \sum_t \delta_{ikt} a_{it}^\top` both maps are two matrix products over all samples and positions,
:math:`\sum_i v_i G_i = (v \odot \Delta)^\top A` and :math:`\langle G_i, U \rangle = \sum_t \delta_{it}^\top U a_{it}`,
and the same activations and signals serve every vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import vmap

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.layers.factors import Dense, Factor, Lookup, Outer, Piece
from pathkernel.gradients.pytrees import blocks, count, moved, take
from pathkernel.tangent_kernel.engines.layerwise import LayerwiseEngine
from pathkernel.tangent_kernel.engines.products import JacobianProducts

Part = tuple[slice, Factor]
"""A part of θ, and gradients in it."""

LARGEST_BLOCK = 1024
"""Samples in one sweep, however large the budget: products are at full speed by then."""


class LayerJacobianProducts(JacobianProducts):
    """From activations and signals, kept between products where they fit into the budget.

    Parameters
    ----------
    engine
        The layer-wise engine of the kernel: its tapes, h, and budget. Parameters that its tapes do not cover are left
        out here.
    theta
        θ.
    X, context
        n samples and what h needs of each.
    memory
        Bytes that may be held between products.
    """

    def __init__(
        self, engine: LayerwiseEngine, theta: Float[Tensor, " P"], X: PyTree, context: PyTree, memory: int
    ) -> None:
        self.engine, self.theta, self.X, self.context = engine, theta, X, context
        self.full = engine.full
        parts = next(iter(self._recorded([slice(0, min(2, count(X)))], None)))[1]
        per_sample = max(1, sum(_bytes(factor) for _, factor in parts) // min(2, count(X)))
        self.size = max(1, min(LARGEST_BLOCK, engine.memory // (4 * per_sample)))
        self.holds = per_sample * count(X) <= memory
        self._held: dict[tuple[int, int], list[tuple[slice, list[Part]]]] = {}

    def pull(self, weights: Tensor, components: slice) -> Tensor:
        """See `JacobianProducts.pull`."""
        own, d = 1 if self.full else components.stop - components.start, weights.shape[-1]
        result = torch.zeros(
            own, d, self.engine.function.layout.size, dtype=torch.float64, device=self.engine.function.device
        )
        for where, parts in self._parts(components):
            v = self.engine.function.cast(weights[where])
            for place, factor in parts:
                for c in range(own):
                    if self.full:
                        result[c, :, place] += weighted_sum(factor, v)
                    else:
                        result[c, :, place] += weighted_sum(_component(factor, c), v.unsqueeze(1))
        return result

    def push(self, directions: Tensor, components: slice) -> Tensor:
        """See `JacobianProducts.push`."""
        directions, results = self.engine.function.cast(directions), []
        for where, parts in self._parts(components):
            total = torch.zeros(
                where.stop - where.start, *(components.stop,) * self.full, directions.shape[1], dtype=torch.float64,
                device=directions.device,
            )
            for place, factor in parts:
                for c, along in enumerate(directions[:, :, place]):
                    if self.full:
                        total += along_directions(factor, along)
                    else:
                        total += along_directions(_component(factor, c), along).squeeze(1)
            results.append(total)
        return torch.cat(results)

    # -- activations and signals -----------------------------------------------------------------------------

    def _parts(self, components: slice) -> Iterator[tuple[slice, list[Part]]]:
        key = components.start, components.stop
        if key in self._held:
            yield from self._held[key]
            return
        kept: list[tuple[slice, list[Part]]] = []
        for block in self._recorded(list(blocks(count(self.X), self.size)), components):
            if self.holds:
                kept.append(block)
            yield block
        if self.holds:
            self._held = {key: kept}

    def _recorded(self, where: list[slice], components: slice | None) -> Iterator[tuple[slice, list[Part]]]:
        selection = self.engine.selection
        for block in where:
            tape = self.engine.tapes.record(self.theta, take(self.X, block), self.engine.function)
            if selection.identity:
                chosen = components or slice(0, tape.outputs.shape[1])
                yield block, _split(tape.pieces(tape.outputs[:, chosen], chosen))
                continue
            with torch.enable_grad():
                context = moved(take(self.context, block), tape.outputs.device)
                h = vmap(selection.function)(tape.outputs, context).reshape(tape.n, -1)
            yield block, _split(tape.pieces(h if components is None else h[:, components]))


def weighted_sum(factor: Factor, weights: Float[Tensor, "n K D"]) -> Float[Tensor, "D size"]:
    """Σ_ik v_ikd G_ik: the adjoint of inner products with directions."""
    d = weights.shape[2]
    if isinstance(factor, Dense):
        return weights.flatten(0, 1).T @ factor.values.flatten(0, 1)
    if isinstance(factor, Lookup):
        n, _, t, q = factor.signal.shape
        signals = torch.einsum("nkd,nktq->dntq", weights, factor.signal).reshape(d, n * t, q)
        table = signals.new_zeros(d, factor.vocabulary, q)
        return table.index_add_(1, factor.indices.reshape(-1), signals).reshape(d, -1)
    assert isinstance(factor, Outer)
    n, k, t, p = factor.signal.shape
    activations, own = factor.activation.reshape(n * t, -1), []
    if factor.head:
        # δ is the identity: component k adds to row k alone.
        sums = activations.new_zeros(d, p, activations.shape[1])
        sums[:, _heads(factor)] = (weights.permute(2, 1, 0).reshape(d * k, n) @ activations).reshape(d, k, -1)
        return (sums.transpose(1, 2) if factor.transposed else sums).reshape(d, -1)
    for v in weights.unbind(dim=2):
        signals = factor.signal[:, 0] * v[:, :, None] if k == 1 else torch.einsum("nktp,nk->ntp", factor.signal, v)
        signals = signals.reshape(n * t, p)
        product = activations.T @ signals if factor.transposed else signals.T @ activations
        own.append(product.reshape(-1))
    return torch.stack(own)


def along_directions(factor: Factor, directions: Float[Tensor, "D size"]) -> Float[Tensor, "n K D"]:
    """⟨G_ik, u_d⟩, one direction at a time where positions would multiply the memory."""
    if isinstance(factor, Outer) and factor.head:
        d, p, q = len(directions), factor.signal.shape[3], factor.activation.shape[2]
        matrices = directions.reshape(d, q, p).transpose(1, 2) if factor.transposed else directions.reshape(d, p, q)
        rows = matrices[:, _heads(factor)]  # (D, K, q)
        products = factor.activation.squeeze(1) @ rows.reshape(-1, q).T
        return products.reshape(factor.samples, d, -1).transpose(1, 2)
    if isinstance(factor, Outer):
        return torch.cat([factor.products(u.unsqueeze(0)) for u in directions], dim=2)
    return factor.products(directions)


def _heads(factor: Outer) -> Tensor:
    """Which row of the weight each component is."""
    return factor.signal[0, :, 0].argmax(dim=1)


def _split(pieces: list[Piece]) -> list[Part]:
    """Weights and biases, each by itself."""
    parts: list[Part] = []
    for piece in pieces:
        parts.append((piece.where, piece.factor))
        if piece.bias is not None:
            parts.append((piece.bias, Dense(piece.bias_rows())))
    return parts


def _component(factor: Factor, c: int) -> Factor:
    """The gradients of one component."""
    if isinstance(factor, Dense):
        return Dense(factor.values[:, c : c + 1])
    assert isinstance(factor, (Outer, Lookup))
    return replace(factor, signal=factor.signal[:, c : c + 1])


def _bytes(factor: Factor) -> int:
    if isinstance(factor, Dense):
        return factor.values.numel() * factor.values.element_size()
    assert isinstance(factor, (Outer, Lookup))
    signal = 0 if isinstance(factor, Outer) and factor.head else factor.signal.numel()
    other = factor.activation.numel() if isinstance(factor, Outer) else 2 * factor.indices.numel()
    return (signal + other) * factor.signal.element_size()
