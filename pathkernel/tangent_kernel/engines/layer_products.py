r"""Products with a Jacobian layer by layer, as matrix products of activations and back-propagated signals.

For :math:`G_{ik} = \sum_t \delta_{ikt} a_{it}^\top` both maps are two matrix products over all samples and positions,
:math:`\sum_i v_i G_i = (v \odot \Delta)^\top A` and :math:`\langle G_i, U \rangle = \sum_t \delta_{it}^\top U a_{it}`,
and the same activations and signals serve every vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.gradients.layers.factor import Factor
from pathkernel.gradients.layers.factors import Piece
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.runtime.interrupts import deliver_interrupt
from pathkernel.tangent_kernel.engines.engine import Samples
from pathkernel.tangent_kernel.engines.jacobian_products import JacobianProducts

Part = tuple[slice, Factor]
"""A part of θ, and gradients in it."""

LARGEST_BLOCK = 1024
"""Samples in one sweep, however large the budget: products are at full speed by then. Chosen, not measured."""


class LayerJacobianProducts(JacobianProducts):
    """Products from activations and signals, kept between products where they fit into the budget.

    Parameters
    ----------
    function
        The network. Parameters that its tapes do not cover are left out here.
    pieces
        Gradients of some components of h for samples with their contexts, as pieces of a tape.
    samples
        n samples and what h needs of each.
    full
        Blocks of all pairs of components rather than their trace.
    budget
        Bytes for what is in hand at once.
    memory
        Bytes that may be held between products.
    """

    def __init__(
        self,
        function: ModelFunction,
        pieces: Callable[[PyTree, PyTree, slice], list[Piece]],
        samples: Samples,
        full: bool,
        budget: int,
        memory: int,
    ) -> None:
        self.function, self.pieces, self.samples, self.full = function, pieces, samples, full
        self.n = count(samples[0])
        few = min(2, self.n)
        parts = self._recorded(slice(0, few), slice(None))
        per_sample = max(1, sum(factor.nbytes for _, factor in parts) // few)
        self.size = max(1, min(LARGEST_BLOCK, budget // (4 * per_sample)))
        self.holds = per_sample * self.n <= memory
        self._held: dict[tuple[int, int], list[tuple[slice, list[Part]]]] = {}

    def pull(self, weights: Tensor, components: slice) -> Tensor:
        """Gradients added up, layer by layer."""
        own, d = 1 if self.full else components.stop - components.start, weights.shape[-1]
        shape = own, d, self.function.layout.size
        result = torch.zeros(shape, dtype=torch.float64, device=self.function.device)
        for where, parts in self._parts(components):
            v = self.function.cast(weights[where])
            for place, factor in parts:
                deliver_interrupt()
                for c in range(own):
                    if self.full:
                        result[c, :, place] += factor.weighted_sum(v)
                    else:
                        result[c, :, place] += factor.component(c).weighted_sum(v.unsqueeze(1))
        return result

    def push(self, directions: Tensor, components: slice) -> Tensor:
        """Derivatives along directions, layer by layer."""
        directions, results = self.function.cast(directions), []
        for where, parts in self._parts(components):
            shape = where.stop - where.start, *(components.stop,) * self.full, directions.shape[1]
            total = torch.zeros(shape, dtype=torch.float64, device=directions.device)
            for place, factor in parts:
                deliver_interrupt()
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
        for where in blocks(self.n, self.size):
            block = where, self._recorded(where, components)
            if self.holds:
                kept.append(block)
            yield block
        if self.holds:
            self._held = {key: kept}

    def _recorded(self, where: slice, components: slice) -> list[Part]:
        X, context = self.samples
        pieces = self.pieces(take(X, where), take(context, where), components)
        return [part for piece in pieces for part in piece.separated()]


class DividedJacobianProducts(JacobianProducts):
    """A Jacobian whose columns are divided between two ways.

    Parameters
    ----------
    most
        J, with zeros in the columns of ``rest``.
    rest
        J of some of the parameters.
    where
        Their places in θ.
    """

    def __init__(self, most: JacobianProducts, rest: JacobianProducts, where: Tensor) -> None:
        self.most, self.rest, self.where, self.holds = most, rest, where, most.holds

    def pull(self, weights: Tensor, components: slice) -> Tensor:
        """Gradients added up, each way in its columns."""
        result = self.most.pull(weights, components)
        result[..., self.where] = self.rest.pull(weights, components)
        return result

    def push(self, directions: Tensor, components: slice) -> Tensor:
        """Derivatives along directions, the sum of both ways."""
        found = self.most.push(directions, components)
        return found + self.rest.push(directions[..., self.where], components)
