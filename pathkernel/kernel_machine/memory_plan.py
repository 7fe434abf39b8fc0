r"""Cutting of sweeps, so that what they hold fits a memory budget.

A backward sweep holds, beside the trajectory and the result,

===========  ===========================================================  =======================================
of           what                                                         while
===========  ===========================================================  =======================================
θ            vectors of P numbers; an optimizer step's coefficients       throughout
queries      gradients, in pieces or as rows of P numbers                 from their pass until the next step's
             one cotangent of P numbers for each of the optimizer's       throughout
             memory slots; shares of the block
batch        gradients of its samples, in pieces or as rows               from their pass until they are contracted
either       activations, signals and graph of the samples in a pass      during the pass
both         columns in hand                                              while they are contracted
===========  ===========================================================  =======================================

What a pass takes depends on the network, and is seen by taking a small one (`pathkernel.runtime.allocations`). What
does not fit is cut: queries into blocks, each of them a sweep of its own; both sides into passes of fewer samples,
whose gradients are then kept as rows where these are smaller; a batch's gradients, at last, into portions that are
contracted before the next is made.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch

from pathkernel.gradients.factored import accumulation_dtype
from pathkernel.gradients.pytrees import count, take
from pathkernel.kernel_machine.accumulator import Accumulator
from pathkernel.kernel_machine.adjoint import StepAdjoint
from pathkernel.kernel_machine.backward_sweep import BLOCK, FEW, Cuts
from pathkernel.kernel_machine.batch_sizes import BatchSizes, SmallBatch, kinds_of_batches, pushed_at_once
from pathkernel.kernel_machine.curves import Curve
from pathkernel.kernel_machine.memory_budget import refusal, usable_bytes
from pathkernel.kernel_machine.sweep_plan import CHANNELS, PASSES, POSITIONS, Plan, in_step, with_rows
from pathkernel.quadrature import Adaptive, DiscreteGradient, FixedQuadrature, Quadrature
from pathkernel.runtime.allocations import (
    TRIED,
    Allocations,
    Footprint,
    allocated,
    footprint,
    footprint_of,
    proportional,
)
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.coupled_samples import ALWAYS_ROWS, PROBED
from pathkernel.trajectory.stage_gradients import Passes
from pathkernel.trajectory.step import Step

PASSING = 1.6
"""Growth of a process in a pass through a network, over what its tensors take at once: operations need memory
inside, and many results of many sizes leave gaps. Measured on convolutional networks, where it is largest; that it
suffices, tests/kernel_machine/test_memory_budget.py measures."""

STAGE = 6
"""Vectors of P numbers in float64 by which a recorded gradient is compared with its recomputation."""

HELD = 5
"""Vectors of P numbers in float64 that are held while gradients are contracted."""

FORWARD = 1.4
"""Reverse sweeps of a whole batch that take as long as a forward sweep along one of several directions. Measured on the
ResNet of `benchmarks/real_networks.py`; what a sweep does is decided by what it measures itself."""

LARGE = 1000
"""Times the bytes of θ that a budget holds where a proof is not measured while it is made: it can be made once more.
Chosen, not measured."""

COLUMNS = (2**16, 2**14, 2**12, 2**10, 2**9, 2**8)
"""Entries of θ that may be formed at once; tried in turn, so that their spacing alone is chosen."""

STEPS = (16, 8)
"""Steps that are run together, the most that there is room for: on a network of 85,000 parameters 16 take 3 % less time
than 8, and twice the memory. `benchmarks/engines.py` times shares that are made so."""

STACKED = 2**29
"""Bytes that steps may take together: beyond it they leave the processor's cache, and gain nothing. Chosen, not
measured."""

STACKING = 2.0
"""Growth of what a pass takes where several are run together: zeros are added to each result. Chosen, to be above what
`tests/kernel_machine/test_stacked_steps.py` measures."""

PAIRED = 12.0
"""Bytes of a query and a sample of steps together, met in pairs: products of readings, of signals, and their sum."""

LONG = 4
"""Times as many steps a path has as are run together, at least: the proof takes as long as twice these. Chosen."""

PASS, BLOCK_OF_COLUMNS = 1e6, 5e4
"""Cost of a pass through the network, and of a block of columns, by itself: in entries of a sample's gradient. Chosen,
not measured: they rank ways to cut a sweep that all fit."""


def shortened(quadrature: Quadrature) -> Quadrature:
    """Quadrature that takes the same memory in less time: every level of halving takes the same."""
    return replace(quadrature, max_depth=1) if isinstance(quadrature, Adaptive) else quadrature


def plan_backward(
    curve: Curve,
    gradients: RecordedGradients,
    memory: int,
    by: str | None,
    dense: bool,
    matrices: int = 0,
) -> Plan:
    """Cut a backward sweep to a budget.

    Parameters
    ----------
    curve
        Of all queries that are asked for.
    gradients
        Of the recorded batches.
    memory
        Bytes, beside trajectory, inputs and result.
    by
        Whether shares are split, see `pathkernel.kernel_machine.kernel_machine.KernelMachine.explain`.
    dense
        Whether the weights of each step are wanted as a matrix.
    matrices
        Further rows of P numbers that each query takes.

    Raises
    ------
    InputError
        With both sizes, where the budget does not hold a single query and the least of a batch.
    """
    return _Planner(curve, gradients, memory, by, dense, matrices).plan()


class _Planner:
    """Memory that a backward sweep would take, cut in one way or another."""

    def __init__(
        self,
        curve: Curve,
        gradients: RecordedGradients,
        memory: int,
        by: str | None,
        dense: bool,
        matrices: int,
    ) -> None:
        self.curve = curve
        self.queries = queries = curve.queries
        self.gradients = gradients
        self.memory = memory
        self.by = by
        self.dense = dense
        self.matrices = matrices
        self.samples = count(queries.inputs)
        self.trajectory = trajectory = gradients.trajectory
        self.rule, self.k, self.size = trajectory.rule, queries.components, trajectory.layout.size
        self.vector = 8.0 * self.size
        self.shapes = dict(zip(trajectory.layout.names, trajectory.layout.shapes, strict=True))
        self.widest = max(shape.numel() for shape in trajectory.layout.shapes)
        dtype = accumulation_dtype(queries.function.dtype)
        self.row, self.itemsize = self.size * dtype.itemsize, dtype.itemsize if self.rule.elementwise else 8
        # Throughout, of each query sample: cotangents of the optimizer's memory, shares, sums over a step, and what
        # else is asked for.
        slots = len(self.rule.memory) if gradients.keeps_memory else 0
        sums = 8 * len(gradients.columns) + (16 + 8 * self.rule.stages) * gradients.most
        self.throughout = float(self.k * ((slots + matrices) * self.size * self.itemsize + sums))
        # As many samples for all that is held of a batch while one block of columns after the other is contracted.
        self.gaps = 2.0 * gradients.most * self.row if slots else 0.0
        # The weights of a step as a matrix, and what the gradients of every output of a batch make of them.
        c = queries.function.outputs(trajectory.initial, take(queries.inputs, slice(0, 1))).shape[1] if dense else 0
        self.weights = float(self.k * c * (24 * self.size * self.rule.stages / max(1, c) + 40 * gradients.most))
        self.pushed = FEW if self.samples * self.k <= FEW else 1
        self._few: dict[int, np.ndarray] = {}
        self.positions = 0.0
        self.needed: float | None = None

    def plan(self) -> Plan:
        """Choose everything at once where there is ample room, else the cheapest way that fits."""
        plan = self._cut()
        width, steps = self._width(plan), self._steps(plan)
        plan = plan if steps > 1 else self._with_rows(plan)
        batch = replace(plan.cuts.batch, width=width)
        return replace(plan, cuts=replace(plan.cuts, batch=batch, steps=steps))

    def _with_rows(self, plan: Plan) -> Plan:
        """The same with rows formed at once, where the optimizer has a memory, so that all columns are formed."""
        self._allocated(TRIED)
        whole = not plan.cuts.batch.streamed and plan.cuts.batch.samples >= self.gradients.most
        if not (whole and self.gradients.keeps_memory) or self.dense or self.positions < POSITIONS:
            return plan
        rows = self.k * plan.queries * self.row, math.inf if self.batches.rows else self.gradients.most * self.row
        needed = self.needed or self._needed(plan)
        return self._in_step(with_rows(plan, needed, self._needed, usable_bytes(self.memory), *rows))

    def _needed(self, plan: Plan) -> float:
        """Bytes of a block of queries, at most."""
        return max(phase.peak(plan.queries) for phase in self._phases(plan, plan.queries))

    def _in_step(self, plan: Plan) -> Plan:
        """The same with larger blocks, whose parts walk the path in step, where gradients leave no room for them."""
        quadrature = self.curve.quadrature
        times = [time for time, _ in quadrature.nodes] if isinstance(quadrature, FixedQuadrature) else [0.5]
        # Gradients at the ends of a step would stay until the next, those of all parts.
        alone = isinstance(quadrature, FixedQuadrature | DiscreteGradient) and all(0 < time < 1 for time in times)
        apart = self.by == "module" or self.matrices or self.curve.dense or self.batches.rows
        if apart or not (alone and self.rule.elementwise):
            return plan
        stay = (self.gradients.most + CHANNELS) * self.row  # for all parts; beside it, Δ and points of two segments

        def peak(way: Plan) -> float:
            proof, query, batch, columns = (phase.peak(way.queries) for phase in self._phases(way, way.queries))
            return max(proof, batch, max(query, columns) + stay) + (2 + 2 * len(times)) * self.vector

        return in_step(plan, self.samples, peak, usable_bytes(self.memory), self.throughout)

    def _steps(self, plan: Plan) -> int:
        """Steps that are run together in what a sweep leaves free: one, where that gains nothing or few are alike."""
        known = self.rule.elementwise and isinstance(self.curve.quadrature, FixedQuadrature | DiscreteGradient)
        whole = plan.passes is None and not plan.cuts.batch.streamed and plan.cuts.batch.samples >= self.gradients.most
        # Where matrices are held, each step is noted, which is to be of its own pass.
        alike = known and whole and not (self.dense or self.curve.dense or self.matrices)
        if not alike or len(self.trajectory) < LONG * STEPS[-1] or self.batches.rows:
            return 1
        peak = self._needed(plan)
        passes = max(self.query.peak(plan.queries), self.batches.separate.peak(self.batches.largest))
        held = self.query.held(plan.queries) + self.batches.separate.held(self.batches.largest)
        # Those of the steps before are there until the first of these is used.
        paired = PAIRED * self.k * plan.queries * self.gradients.most
        of_step = PASSING * (STACKING * passes + 2 * held) + HELD * self.vector + paired
        most = min(min(usable_bytes(self.memory) - peak, STACKED) / of_step, len(self.trajectory) / LONG)
        return next((steps for steps in STEPS if steps <= most), 1)

    def _width(self, plan: Plan) -> int:
        """Directions along which a whole batch is pushed at once in what its rows leave free, with their weights."""
        large = [one for one in self.kinds if self.dense or (one.coupled and one.size * self.size >= ALWAYS_ROWS)]
        if self.by == "module" or plan.cuts.batch.streamed or not large:
            return plan.cuts.batch.width
        query = self.query if plan.passes is None else self.rows
        held = query.at_the_end.plus(0.0, self.throughout + self.weights + self.k * self.row).peak(plan.queries)
        fixed = self.coefficients[1] + (STAGE + HELD) * self.vector + PROBED * self.row
        free = (usable_bytes(self.memory) - held - fixed) / PASSING
        return min(pushed_at_once(one.size, one, free, plan.cuts.batch.width) for one in large)

    def _cut(self) -> Plan:
        usable, n = usable_bytes(self.memory), self.samples
        whole = Plan(n, None, Cuts(scratch=int(usable) // 4))
        few = self.queries.block(torch.arange(2) % n)
        # Measured while it is made, unless it is hardly needed: of a small network there is room for everything.
        large = LARGE * few.function.dtype.itemsize * self.size > usable
        few.source.prove(self.trajectory.final, few.inputs, few.function, measured=large, trial=True)
        if self._ample(usable):
            return whole
        exactly = replace(whole.cuts, columns=max(1, BLOCK // (n * self.k)))
        if self._most(Plan(n, None, exactly), usable) == n:
            return whole
        best: tuple[float, Plan] | None = None
        for way in self._ways(int(usable) // 16):
            if (most := self._most(way, usable)) > 0:
                even = math.ceil(n / math.ceil(n / most))  # as many blocks, but none much smaller than the others
                cost = self._cost(even, way)
                if best is None or cost < best[0]:
                    best = cost, replace(way, queries=even)
        if best is None:
            least = min(max(phase.peak(1) for phase in self._phases(way, 1)) for way in self._ways(0))
            raise refusal(least, self.memory)
        return best[1]

    # -- what is measured ------------------------------------------------------------------------------------

    def _swept(self, n: int, passes: int | None = None) -> Any:
        """Gradients of a few queries, on the curve's last segment."""
        curve = self.curve.block(torch.arange(n) % self.samples)
        curve.queries.passes = passes
        curve.queries.forward = None
        curve.quadrature = shortened(curve.quadrature)
        accumulator = Accumulator.start(curve.initial)
        segments = curve.backward(accumulator)
        with curve.queries.source.tapes.trying():
            last = next(segments, None)
        if last is not None and passes is None:
            self.positions = last[1].positions
        return segments, accumulator, last

    @cached_property
    def query(self) -> Footprint:
        """Footprint of queries whose gradients are kept in pieces, with the displacement of the segment before."""
        return footprint_of(self._allocated).plus(self.vector)

    def _allocated(self, n: int) -> np.ndarray:
        """Bytes allocated and freed by the gradients of a few queries that are kept in pieces; seen once."""
        if n not in self._few:
            self._few[n] = allocated(self._swept, n)
        return self._few[n]

    @cached_property
    def kinds(self) -> list[SmallBatch]:
        """A few samples of each kind of batch."""
        return kinds_of_batches(self.gradients, self.pushed)

    @cached_property
    def rows(self) -> Footprint:
        """Footprint of queries whose gradients are kept as rows."""
        return footprint(lambda n: self._swept(n, passes=n)).plus(self.vector)

    @cached_property
    def batches(self) -> BatchSizes:
        """Memory that the batches take."""
        return BatchSizes.of(self.gradients, self.kinds)

    @cached_property
    def proof(self) -> float:
        """Bytes in which it is proved how gradients are taken, whether that is still to come or not."""
        few = self.queries.block(torch.arange(2) % self.samples)
        met = [(few.source, self.trajectory.final, few.inputs, few.function)]
        for one in self.kinds:
            if not one.coupled:
                met.append((one.source, one.point, take(one.inputs, slice(0, 2)), one.function))
        return max(source.proof_bytes(*asked) for source, *asked in met)

    @cached_property
    def coefficients(self) -> tuple[float, float]:
        """Bytes of an optimizer step's coefficients, at most and while they are used."""
        with Allocations() as allocations:
            adjoint = StepAdjoint(self.rule, self._last, self.shapes)
            for name in self._last.active:
                adjoint.linear(name)
            found = allocations.peak, allocations.held
        casts = 2.0 * self.itemsize * self.widest
        return found[0] + casts, found[1] + casts

    @cached_property
    def in_place(self) -> bool:
        """True where what meets the rows of a batch lies where the memory's cotangents do, as at both ends.

        Where forward sweeps may take less than rows, which portions need, it is not counted on.
        """
        if FORWARD * self.samples * self.k < self.batches.most:
            return False
        ends = self.trajectory.store.read(0), self._last
        coefficients = (StepAdjoint(self.rule, step, self.shapes).linear(name) for step in ends for name in step.active)
        return all(own is not None and own.in_place for own in coefficients)

    @cached_property
    def adjoint(self) -> float:
        """Bytes of a query in the adjoint of a rule that takes whole parameters."""
        name = max(self._last.active, key=lambda name: self.shapes[name].numel())
        size, pull = self.shapes[name].numel(), StepAdjoint(self.rule, self._last, self.shapes).of(name, torch.float64)

        def pulled(n: int) -> Any:
            ones = torch.ones(n, size, dtype=torch.float64, device=self.trajectory.device)
            return pull(slice(0, size), ones, [None] * len(self.rule.memory))

        return footprint(pulled).peak(4) / 4 + 16.0 * size

    @property
    def _last(self) -> Step:
        return self.trajectory.store.read(len(self.trajectory) - 1)

    # -- what follows ----------------------------------------------------------------------------------------

    def _ample(self, usable: float) -> bool:
        """Test that all fits at once even if all that a few samples take grew with their number and came together."""
        quadrature = self.curve.quadrature
        if not (self.rule.elementwise and isinstance(quadrature, FixedQuadrature | DiscreteGradient)):
            return False
        query = proportional(self._allocated, self.vector).peak(self.samples)
        peak, held = BatchSizes.of_trial(self.kinds, self.gradients.most)
        columns = min(self.widest, BLOCK // (self.samples * self.k) + 1)
        moved = (STAGE + HELD + 2 * (2 + len(self.rule.memory)) * self.rule.stages) * self.vector
        together = 3.0 * self.itemsize * (BLOCK + columns * self.gradients.most) + self.gaps + moved
        of_query = PASSING * self.curve.dense * self.k * self.row + self.throughout + self.weights
        needed = PASSING * (query + peak + held) + of_query * self.samples + together
        self.needed = needed if needed <= usable else None
        return needed <= usable

    def _phases(self, way: Plan, samples: int) -> Iterator[Footprint]:
        """Bytes of query samples in each part of a step; ``samples`` is what a block has at most."""
        batches, cuts, vector, (at_most, used) = self.batches, way.cuts, self.vector, self.coefficients
        streamed, passes, most = cuts.batch.streamed, way.passes, batches.most
        query = self.query if passes is None else self.rows

        # The proof that a tape is right.
        yield Footprint(np.array([PASSING * self.proof]), np.zeros(1))

        # The queries' passes.
        if passes is None:
            yield query.times(PASSING).plus(used, self.throughout)
        else:
            taking = PASSING * (query.peak(passes) - query.held(passes))
            yield query.at_the_end.plus(used + taking, self.throughout)

        # Those of the batch.
        m, between = min(batches.largest, cuts.batch.samples), query.at_the_end.plus(0.0, self.throughout)
        pieces, whole = batches.separate.held(1) - batches.separate.held(0), m == batches.largest
        of_one = self.row if batches.rows else pieces if whole else min(pieces, self.row)
        held = (m if streamed else most) * of_one + most * batches.inputs
        formed = 0.0 if whole and not batches.rows else m * self.row
        taking = PASSING * max(batches.whole, batches.separate.peak(m)) + formed
        yield between.plus(used + STAGE * vector + taking + (0.0 if streamed else max(0.0, held - m * of_one)))

        # Both sides' columns.
        columns = min(self.widest, cuts.columns)
        formed = 3.0 * self.itemsize * columns * (m if streamed else most) + self.gaps * cuts.scattered
        inside = between.plus(at_most + HELD * vector + max(held, batches.held) + formed)
        if streamed and not self.in_place:
            inside = inside.plus(0.0, float(self.k * self.itemsize * self.size * self.rule.stages))
        inside = inside.plus(0.0, self.weights)
        if not self.rule.elementwise:
            yield inside.plus(0.0, self.k * self.adjoint)
        elif self.k * samples * columns > BLOCK:
            yield inside.plus(3.0 * self.itemsize * BLOCK)
        else:
            yield inside.plus(0.0, 3.0 * self.k * self.itemsize * columns)

    def _most(self, way: Plan, memory: float) -> int:
        """Query samples in a block that fit."""

        def fits(bound: int) -> int:
            return min(phase.most(memory, self.samples) for phase in self._phases(way, bound))

        return max(fits(self.samples), min(fits(1), BLOCK // (self.k * min(self.widest, way.cuts.columns))))

    def _ways(self, scratch: int) -> Iterator[Plan]:
        """Candidates, without the size of a block."""
        most, largest = self.batches.most, self.batches.largest
        for columns in COLUMNS:
            yield Plan(1, None, Cuts(columns=columns, scratch=max(1, scratch)))
        sizes = list(dict.fromkeys(-(-largest >> power) for power in range(11)))  # rounded up: no small rest
        for passes, size, streamed, columns in product((None, *PASSES), sizes, (False, True), COLUMNS):
            if not (streamed and size == most):
                batch = Passes(sys.maxsize if size == largest else size, streamed)
                yield Plan(1, passes, Cuts(batch, columns, max(1, scratch), roomy=False))

    def _cost(self, block: int, way: Plan) -> float:
        """Cost of a step, in entries of a sample's gradient."""
        most, columns = self.batches.most, math.ceil(self.size / way.cuts.columns)
        passes = math.ceil(most / min(most, way.cuts.batch.samples))
        portions = passes if way.cuts.batch.streamed else 1
        sweeps = most if self.batches.rows else 0  # of a whole batch each, for every block of queries
        batch = most * self.size + PASS * (passes + sweeps) + BLOCK_OF_COLUMNS * columns * portions
        query = self.size + PASS / (way.passes or block)
        return math.ceil(self.samples / block) * batch + self.samples * query
