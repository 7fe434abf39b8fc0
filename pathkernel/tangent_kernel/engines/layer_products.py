r"""The same products layer by layer, as matrix products of activations and back-propagated signals.

For :math:`G_{ik} = \sum_t \delta_{ikt} a_{it}^\top` both maps are two matrix products over all samples and positions,
:math:`\sum_i v_i G_i = (v \odot \Delta)^\top A` and :math:`\langle G_i, U \rangle = \sum_t \delta_{it}^\top U a_{it}`,
and the same activations and signals serve every vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.func import vmap

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.layers.factor import Factor
from pathkernel.gradients.layers.factors import Piece
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
        per_sample = max(1, sum(factor.nbytes for _, factor in parts) // min(2, count(X)))
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
                        result[c, :, place] += factor.weighted_sum(v)
                    else:
                        result[c, :, place] += factor.component(c).weighted_sum(v.unsqueeze(1))
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
                        total += factor.products_in_turn(along)
                    else:
                        total += factor.component(c).products_in_turn(along).squeeze(1)
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
                yield block, _separated(tape.pieces(tape.outputs[:, chosen], chosen))
                continue
            with torch.enable_grad():
                context = moved(take(self.context, block), tape.outputs.device)
                h = vmap(selection.function)(tape.outputs, context).reshape(tape.n, -1)
            yield block, _separated(tape.pieces(h if components is None else h[:, components]))


def _separated(pieces: Iterable[Piece]) -> list[Part]:
    return [part for piece in pieces for part in piece.separated()]
