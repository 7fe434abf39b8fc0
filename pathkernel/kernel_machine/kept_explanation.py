"""An explanation that is kept in a store while it is computed, and goes on where it was stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pathkernel.gradients.pytrees import blocks
from pathkernel.kernel_machine.accumulator import Accumulator, accumulator_of, arrays_of
from pathkernel.kernel_machine.curves import Curve

KEPT_QUERIES = 64
"""Samples in a block of a computation that is kept in a store: what an interruption may cost. Chosen, not measured."""


def kept_explanation(
    store: str | os.PathLike[str],
    identity: dict[str, Any],
    curve: Curve,
    columns: int,
    compute: Callable[[Curve], Accumulator],
) -> Accumulator:
    """Sums of a sweep over all queries, block by block in a store.

    Parameters
    ----------
    store
        The folder.
    identity
        What the explanation depends on, by which it is known again.
    curve
        Of all queries.
    columns
        Of the shares.
    compute
        The sweep of a block of them.
    """
    from pathkernel.storage import resumable  # not before it is needed: what writes to disk takes a second to load

    queries = curve.queries
    # The same blocks whatever the budget, which another call may give otherwise: it cuts them further.
    pieces = list(blocks(len(queries) // queries.components, KEPT_QUERIES))
    sizes = [(piece.stop - piece.start) * queries.components for piece in pieces]
    kept = resumable.resumable_blocks(
        store, identity, sizes, lambda index: arrays_of(compute(curve.block(pieces[index])))
    )
    named = {"missed": (), "short": (), "evaluations": (), "shares": (columns,)}
    resumable.check_arrays(store, kept, len(queries), named, "an explanation")
    return accumulator_of(kept)
