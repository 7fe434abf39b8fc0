"""Engines that are broken on purpose, below the certificate: rows of other samples, with the right sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pathkernel.gradients.losses
import pathkernel.gradients.per_sample
import pathkernel.trajectory.recomputed_batches
from pathkernel.gradients.layers.factors import Dense, Piece
from pathkernel.gradients.layers.tape import Tape
from pathkernel.gradients.pytrees import count

BATCH = 8
"""Batches of as many samples get wrong rows; queries and proofs have other sizes."""


def permuted(n: int) -> Tensor:
    return torch.eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(3))]


def rolled(n: int) -> Tensor:
    return torch.eye(n).roll(1, 0)


def swapped(n: int) -> Tensor:
    return torch.eye(n)[[1, 0, *range(2, n)]]


def scaled(n: int, factor: float = 1.01) -> Tensor:
    """One row times a factor; the next one pays for it."""
    mixing = torch.eye(n)
    mixing[0, 0], mixing[1, 0] = factor, 1 - factor
    return mixing


def zeroed(n: int) -> Tensor:
    """One row missing; the next one has it as well."""
    return scaled(n, 0.0)


def averaged(n: int) -> Tensor:
    return torch.full((n, n), 1 / n)


def neighbours(n: int) -> Tensor:
    """A little of the next row in each."""
    return 0.9 * torch.eye(n) + 0.1 * torch.eye(n).roll(1, 0)


def duplicated(n: int) -> Tensor:
    """The first row again in place of the second; the last one pays for it."""
    mixing = torch.eye(n)
    mixing[1, 0], mixing[1, 1] = 1.0, 0.0
    mixing[-1, 0], mixing[-1, 1] = -1.0, 1.0
    return mixing


@dataclass(frozen=True)
class Fault:
    """Row i becomes Σ_j mixing_ij row_j.

    Attributes
    ----------
    mixing
        (n, n), whose columns sum to one where the sum is kept.
    first_only
        Whether in the first parameter only.
    slopes
        Whether λ is mixed rather than the rows.
    """

    mixing: Callable[[int], Tensor]
    first_only: bool = False
    slopes: bool = False


FAULTS = {
    "rows permuted": Fault(permuted),
    "rows rolled by one": Fault(rolled),
    "two samples swapped": Fault(swapped),
    "one row zeroed": Fault(zeroed),
    "one row scaled by 1.01": Fault(scaled),
    "one parameter's rows permuted": Fault(permuted, first_only=True),
    "rows averaged over the batch": Fault(averaged),
    "a tenth of the neighbour's row": Fault(neighbours),
    "slopes shifted": Fault(rolled, slopes=True),
    "first row twice": Fault(duplicated),
}


def mixed(fault: Fault, values: Tensor) -> Tensor:
    """Rows (n, ...) of a wrong engine."""
    mixing = fault.mixing(len(values)).to(values)
    return torch.einsum("ij,j...->i...", mixing, values)


def _broken_pieces(fault: Fault) -> Callable[..., list[Piece]]:
    right = Tape.pieces

    def pieces(
        tape: Tape, components: Tensor, identity: slice | None = None, before_head: int | None = None
    ) -> list[Piece]:
        if tape.n != BATCH or not components.requires_grad:
            return right(tape, components, identity, before_head)
        if fault.slopes:
            with torch.enable_grad():
                slopes = [
                    mixed(fault, torch.autograd.grad(components[:, k].sum(), tape.outputs, retain_graph=True)[0])
                    for k in range(components.shape[1])
                ]
                components = torch.stack([(tape.outputs * slope).sum(1) for slope in slopes], 1)
            return right(tape, components)
        first = tape.function.layout.slices[tape.function.layout.names[0]]
        parts = [part for piece in right(tape, components, identity) for part in piece.separated()]
        spared = first.stop if fault.first_only else tape.function.layout.size
        return [
            Piece(where, factor if where.start >= spared else Dense(mixed(fault, factor.rows())))
            for where, factor in parts
        ]

    return pieces


def _broken_rows(fault: Fault, right: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A way to form the rows of all samples."""

    def rows(
        function: Any, vector: Tensor, inputs: Any, functional: Any, context: Any, scalar: bool
    ) -> dict[str, Tensor]:
        if count(inputs) != BATCH:
            return right(function, vector, inputs, functional, context, scalar)
        if fault.slopes:  # λ is what the functional needs of each sample
            return right(function, vector, inputs, functional, mixed(fault, context), scalar)
        names = function.layout.names[:1] if fault.first_only else function.layout.names
        found = right(function, vector, inputs, functional, context, scalar)
        return {name: mixed(fault, values) if name in names else values for name, values in found.items()}

    return rows


def _broken_coupled_rows(fault: Fault) -> Callable[..., Iterator[Tensor]]:
    """Rows of a batch that is run as a whole."""
    right = pathkernel.gradients.losses.coupled_row_blocks

    def coupled_rows(function: Any, vector: Tensor, inputs: Any, cotangents: Tensor, size: int) -> Iterator[Tensor]:
        given = mixed(fault, cotangents) if fault.slopes else cotangents
        for rows in right(function, vector, inputs, given, len(given)):
            if not fault.slopes:
                first = function.layout.slices[function.layout.names[0]]
                where = first if fault.first_only else slice(None)
                rows[:, where] = mixed(fault, rows[:, where])
            yield rows

    return coupled_rows


@contextmanager
def broken(fault: Fault, everywhere: bool) -> Iterator[None]:
    """The layer-wise engine broken inside, or, ``everywhere``, every way to form rows."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tape, "pieces", _broken_pieces(fault)))
        if everywhere:
            for name in ("_gradients_at_once", "_gradients_in_turn"):
                rows = _broken_rows(fault, getattr(pathkernel.gradients.per_sample, name))
                stack.enter_context(mock.patch.object(pathkernel.gradients.per_sample, name, rows))
            coupled = _broken_coupled_rows(fault)
            sweeps = mock.patch.object(pathkernel.trajectory.recomputed_batches, "coupled_row_blocks", coupled)
            stack.enter_context(sweeps)
        yield
