r"""Samples of a batch that is run together, met with directions: by forward sweeps, or by rows, whichever takes less.

Rows :math:`J_i^\top \lambda_i` of coupled samples take one reverse sweep of the whole batch each, B of them; their
products with Q directions can be had from Q forward sweeps as well (`pathkernel.gradients.pushed_shares`). What either
costs is measured once for each kind of batch, and kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.factored import accumulation_dtype
from pathkernel.gradients.forward_state import Modes, hashable
from pathkernel.gradients.losses import coupled_row_blocks, swept_rows, weighted_gradient
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import output_products, random_directions, without_dual_passes
from pathkernel.gradients.pushed_shares import pushed_shares, weighted_outputs
from pathkernel.gradients.pytrees import blocks
from pathkernel.trajectory.split_certificate import DIRECTIONS, row_limit
from pathkernel.trajectory.step import MicroBatch

ALWAYS_ROWS = 2**20
"""Numbers in the rows of a batch up to which they are formed without asking what that costs: it is some milliseconds,
and the last bits of the shares of a small run do not depend on a clock. Chosen, not measured."""

PROBED = 3
"""Samples of a batch whose rows are formed for the comparison of a forward sweep with them."""


WIDER = 0.6
"""Part of the time of a direction that it takes among more than were tried so far, about the least: the pass that all
share is theirs together. Measured on the networks of `benchmarks/real_networks.py` (3 directions against 16)."""


def normalises_batch(module: nn.Module, modes: Modes) -> bool:
    """True where a layer in train mode couples the samples of a batch."""
    return any(
        (modes if isinstance(modes, bool) else modes[name])
        and (isinstance(child, _BatchNorm) or getattr(child, "track_running_stats", False))
        for name, child in module.named_modules()
    )


@dataclass
class SweepCosts:
    """Costs of the two ways for one kind of batch, and whether the forward one is right.

    Attributes
    ----------
    reverse
        Seconds of a reverse sweep, the least that was measured, in every step anew, also while rows are formed; NaN
        before.
    forward
        Seconds of a forward sweep along one direction, by the number of directions at once; the same.
    refused
        Whether forward sweeps are not the rows' products, or torch has none.
    proved
        Numbers of directions at once for which they were seen to be.
    used
        Whether shares were made of them.
    """

    reverse: float = math.nan
    forward: dict[int, float] = field(default_factory=dict)
    refused: bool = False
    proved: set[int] = field(default_factory=set)
    used: bool = False

    def forward_pays(self, samples: int, directions: int, width: int) -> bool:
        """True where so many directions cost less than the rows of so many samples; and before that is known."""
        if self.refused or not self.forward:
            return not self.refused
        wanted = min(width, directions)
        seconds = self.forward.get(wanted, max(self.forward.values()))
        if wanted > max(self.forward):
            seconds *= WIDER  # tried where it might pay
        return not directions * seconds > samples * self.reverse

    def note_forward(self, seconds: float, directions: int) -> None:
        """Add what one pass along some directions took."""
        before = self.forward.get(directions, math.inf)
        self.forward[directions] = min(before, seconds / directions)

    def note_reverse(self, seconds: float, samples: int = 1) -> None:
        """Add what the reverse sweeps of some samples took."""
        each = seconds / samples
        self.reverse = each if math.isnan(self.reverse) else min(self.reverse, each)

    def timed(self, row_blocks: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """Blocks of rows, each timed while it is made."""
        began = seconds_now(device)
        for rows in row_blocks:
            self.note_reverse(seconds_now(device) - began, len(rows))
            yield rows
            began = seconds_now(device)


class CoupledSamples:
    r"""Gradients :math:`J_i^\top \lambda_i` of the samples of a batch that is run together, never formed at once.

    Parameters
    ----------
    costs
        Of this kind of batch; what is found out is added.
    function, point, inputs, cotangents
        The network as the batch ran, θ, its samples, and λ (B, C).
    width
        Directions that are pushed at once.
    first
        Place of the first of the samples whose rows are compared with a forward sweep.
    certify
        Given the error of the first forward sweep that is made, along directions in use, and its limit, where the
        certificate wants one: as `split_error`, which makes a sweep for it.
    """

    def __init__(
        self,
        costs: SweepCosts,
        function: ModelFunction,
        point: Float[Tensor, " P"],
        inputs: PyTree,
        cotangents: Float[Tensor, "B C"],
        width: int,
        first: int = 0,
        certify: Callable[[float, float], None] | None = None,
    ) -> None:
        self.costs = costs
        self.function = function
        self.point = point
        self.inputs = inputs
        self.cotangents = cotangents
        self.width = width
        self._first = first
        self._certify = certify

    def __len__(self) -> int:
        return len(self.cotangents)

    @cached_property
    def _total(self) -> Tensor:
        began = self._now()
        total = weighted_gradient(self.function, self.point, self.inputs, self.cotangents)
        # With its forward pass: no less than a reverse sweep, and no first measurement that something held up stays.
        self.costs.note_reverse(self._now() - began)
        return total.double()

    def total(self) -> Float[Tensor, " P"]:
        """The sum of all gradients, float64, by one reverse sweep."""
        return self._total.clone()

    def pushed(self, directions: Float[Tensor, "D P"], width: int) -> Float[Tensor, "B D"] | None:
        """Products of all samples with a few directions by forward sweeps, float64; None where torch has none."""
        return pushed_shares(self.function, self.point, self.inputs, self.cotangents, directions, width)

    def products(self, directions: Float[Tensor, "D P"]) -> Float[Tensor, "B D"]:
        """Products of all samples with some directions, float64, by the way that takes less.

        Every forward sweep is held against the gradient of the whole batch, and the first of each kind and width
        against rows of distinct samples; where it is something else, rows are formed.
        """
        n, many = len(self), len(directions)
        found = torch.empty(n, many, dtype=torch.float64, device=directions.device)
        costs = self.costs
        for piece in blocks(many, self.width):
            if not costs.forward_pays(n, many - piece.start, self.width):
                found[:, piece.start :] = self._by_rows(directions[piece.start :])
                break
            some = directions[piece]
            sweep = partial(self.pushed, some, len(some))
            shares, error, seconds = self._compared(sweep, some, lambda shares: shares)
            if shares is None or not self._right(error, len(some)):
                costs.refused = True
                found[:, piece.start :] = self._by_rows(directions[piece.start :])
                break
            costs.note_forward(seconds, len(some))
            costs.used = True
            found[:, piece] = shares
        if self._certify is not None:  # rows took less
            self._certified(self.split_error())
        return found

    def outputs(self, directions: Float[Tensor, "D P"]) -> Float[Tensor, "D B C"] | None:
        """J u of all outputs along some directions, float64; None where its products with λ are not those of rows."""
        found = []
        for piece in blocks(len(directions), self.width):
            some = directions[piece]
            sweep = partial(output_products, self.function, self.point, self.inputs, some, width=len(some))
            pushed, error, _ = self._compared(sweep, some, self.weighted)
            if pushed is None or not self._right(error, len(some)):
                self.costs.refused = True
                return None
            self.costs.used = True
            found.append(pushed)
        return torch.cat(found)

    def weighted(self, pushed: Float[Tensor, "D B C"]) -> Float[Tensor, "B D"]:
        """λ_i · (J u)_i, float64."""
        return weighted_outputs(pushed, self.cotangents)

    def _by_rows(self, directions: Tensor) -> Tensor:
        """The same by one reverse sweep for each sample."""
        found = []
        size = max(1, min(len(self), len(directions)))  # no more than the directions take
        row_blocks = coupled_row_blocks(self.function, self.point, self.inputs, self.cotangents, size)
        for rows in self.costs.timed(row_blocks, self.point.device):
            rows = rows.to(accumulation_dtype(self.function.dtype))
            found.append((rows @ directions.to(rows).T).double())
        return torch.cat(found)

    def _now(self) -> float:
        return seconds_now(self.point.device)

    # -- proofs ----------------------------------------------------------------------------------------------

    def split_error(self) -> float:
        r"""Largest difference of forward sweeps from rows along random directions, relative to the largest product.

        Of a few distinct samples, each by itself, and of the sum over all others: what remains of the gradient of the
        whole batch. Infinite where torch cannot differentiate the network forward.
        """
        v = random_directions(self.function.layout.size, DIRECTIONS).to(self.function.device)
        width = min(self.width, DIRECTIONS)
        shares, error, seconds = self._compared(partial(self.pushed, v, width), v, lambda shares: shares, True)
        if shares is not None and width == DIRECTIONS:
            self.costs.note_forward(seconds, DIRECTIONS)
        return error

    def _compared(
        self,
        sweep: Callable[[], Tensor | None],
        directions: Tensor,
        weighted: Callable[[Tensor], Tensor],
        rows: bool = False,
    ) -> tuple[Tensor | None, float, float]:
        """What a forward sweep along some directions gave, its error, and the seconds that it took.

        Its products are held against rows where that is asked (``rows``), for the certificate, and for the first sweep
        of so many directions; others against the gradient of the whole batch. A dual pass that is wrong is withdrawn.
        """
        rows = rows or self._certify is not None or len(directions) not in self.costs.proved
        while True:
            began = self._now()
            found = sweep()
            seconds = self._now() - began
            if found is None:
                return None, math.inf, seconds
            shares = weighted(found)
            error = self._error(shares, directions) if rows else self._error_of_sum(shares, directions)
            if error <= row_limit(self.function) or not without_dual_passes(self.function):
                return found, error, seconds

    def _right(self, error: float, directions: int) -> bool:
        """Test the error of a forward sweep along directions in use."""
        if self._certify is not None:
            return self._certified(error)
        right = error <= row_limit(self.function)
        if right:
            self.costs.proved.add(directions)
        return right

    def _certified(self, error: float) -> bool:
        """Tell the certificate, once, and whether forward sweeps are right."""
        limit, certify, self._certify = row_limit(self.function), self._certify, None
        self.costs.refused = not error <= limit
        if certify is not None:
            certify(error, limit)
        return not self.costs.refused

    def _along_total(self, directions: Tensor) -> Tensor:
        """Products of the gradient of the whole batch with some directions, (D,)."""
        found = torch.zeros(len(directions), dtype=torch.float64, device=directions.device)
        for where in self.function.layout.slices.values():
            found += directions[:, where].double() @ self._total[where]
        return found

    def _error_of_sum(self, shares: Tensor, directions: Tensor) -> float:
        off = (shares.sum(dim=0) - self._along_total(directions)).abs().max().item()
        largest = shares.abs().max().item()
        return off / largest if largest > 0 else off

    @cached_property
    def _samples(self) -> Sequence[int]:
        """A few distinct samples, spread over the batch."""
        n = len(self)
        return sorted({(self._first + place * n // PROBED) % n for place in range(min(PROBED, n))})

    @cached_property
    def _rows(self) -> Float[Tensor, "few P"]:
        """Rows of these samples, each reverse sweep timed."""
        rows = []
        sweeps = swept_rows(self.function, self.point, self.inputs, self.cotangents, self._samples)
        began = self._now()
        for place, row in enumerate(sweeps):
            if place or len(self) == 1:  # the first comes with the forward pass
                self.costs.note_reverse(self._now() - began)
            rows.append(row.to(accumulation_dtype(self.function.dtype)))
            began = self._now()
        return torch.stack(rows)

    def _error(self, shares: Tensor, directions: Tensor) -> float:
        own = (self._rows @ directions.to(self._rows).T).double()
        rest = self._along_total(directions) - own.sum(dim=0)
        others = shares.sum(dim=0) - shares[self._samples].sum(dim=0)
        off = torch.cat([own - shares[self._samples], (rest - others).unsqueeze(0)]).abs().max().item()
        largest = shares.abs().max().item()
        return off / largest if largest > 0 else off


def seconds_now(device: torch.device) -> float:
    """Seconds on a clock, once all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class CoupledSweeps:
    """Costs and proofs of all kinds of batches of a run."""

    def __init__(self) -> None:
        self.costs: dict[Any, SweepCosts] = {}

    def of(self, batch: MicroBatch, inputs: PyTree) -> SweepCosts:
        """Costs of batches like one: of so many samples, of their shapes and types, run in these modes."""
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
        kind = hashable(batch.state.modes), bool(batch.state.generators), len(batch.ids), *shapes
        return self.costs.setdefault(kind, SweepCosts())
