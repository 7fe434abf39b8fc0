"""How a backward sweep is cut, and rows that are formed at once where a cut leaves room for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from pathkernel.kernel_machine.backward_sweep import FEW, Cuts

PASSES = (16, 4, 1)
"""Query samples that go through the network at once, where not all do; tried in turn."""

CHANNELS = 8
"""Rows beside those of a batch, for what came to a gradient under a name: rounding, decay, a few more. Chosen."""

POSITIONS = 8
"""Positions of a layer, on average over θ, from which on rows formed at once are less work than columns of pieces that
are formed at each use. Chosen: layers of 64 and more gain (`benchmarks/real_networks.py`), those of one cannot."""


@dataclass(frozen=True)
class Plan:
    """Cut of a backward sweep.

    Attributes
    ----------
    queries
        Samples in a block of queries.
    passes
        Samples of a block that go through the network at once, their gradients then kept as rows; None for a whole
        block, its gradients in pieces.
    cuts
        How the rest is cut.
    """

    queries: int
    passes: int | None
    cuts: Cuts


def with_rows(
    plan: Plan, needed: float, peak: Callable[[Plan], float], usable: float, of_queries: float, of_batch: float
) -> Plan:
    """The same sweep with rows formed at once, of the queries and of a batch, as far as there is room.

    Parameters
    ----------
    plan
        A sweep whose batches are taken whole.
    needed, peak
        Bytes that it takes, and what finds these of a sweep that is cut in another way.
    usable
        Bytes that there are.
    of_queries, of_batch
        Bytes of rows of a block of queries, and of the largest step; infinite where they are not to be formed.
    """
    if plan.passes is None and needed + of_queries <= usable:
        plan, needed = replace(plan, passes=plan.queries), needed + of_queries
    elif plan.passes is None:  # fewer samples at once leave room for the rows of all
        fewer = product((n for n in PASSES if n < plan.queries), (True, False))
        cut = (replace(plan, passes=n, cuts=replace(plan.cuts, roomy=roomy)) for n, roomy in fewer)
        taking = ((way, peak(way)) for way in cut)
        plan, needed = next((own for own in taking if own[1] <= usable), (plan, needed))
    batch = replace(plan.cuts.batch, rows=needed + of_batch <= usable)
    return replace(plan, cuts=replace(plan.cuts, batch=batch))


def in_step(plan: Plan, samples: int, peak: Callable[[Plan], float], usable: float, throughout: float) -> Plan:
    """Larger blocks of queries, whose parts walk the path in step: each block runs every batch once more.

    Parameters
    ----------
    plan
        A sweep whose batches are taken whole.
    samples
        Query samples in all.
    peak
        Bytes of a block that is one part.
    usable
        Bytes that there are.
    throughout
        Bytes of a sample in another part.

    Returns
    -------
    Plan
        The same plan, where it takes all queries at once, or parts make no larger blocks.
    """
    if plan.queries == samples and plan.passes in (None, samples):
        return plan
    for part in (n for n in PASSES if n > FEW):
        batch = replace(plan.cuts.batch, rows=True)
        way = replace(plan, queries=part, passes=part, cuts=replace(plan.cuts, batch=batch, roomy=True, part=part))
        free = usable - peak(way)
        most = min(samples, int(part + free // throughout)) if free >= 0 else 0
        if most > plan.queries or most == samples > part:
            return replace(way, queries=math.ceil(samples / math.ceil(samples / most)))
    return plan
