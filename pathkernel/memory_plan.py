r"""How sweeps are cut so that what they hold fits a memory budget.

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

What a pass takes depends on the network, and is seen by taking a small one (`pathkernel.allocations`). What does not
fit is cut: queries into blocks, each of them a sweep of its own; both sides into passes of fewer samples, whose
gradients are then kept as rows where these are smaller; a batch's gradients, at last, into portions that are contracted
before the next is made.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.accounts import Account
from pathkernel.allocations import Allocations, Footprint, footprint
from pathkernel.curves import Curve
from pathkernel.errors import InputError
from pathkernel.factored import piece_dtype, working
from pathkernel.functional import ModelFunction
from pathkernel.layers.factors import device_of_factor
from pathkernel.losses import coupled_row_blocks, weighted_gradient
from pathkernel.pull_back import Adjoint
from pathkernel.pytrees import count, take
from pathkernel.quadrature import Adaptive, Quadrature
from pathkernel.queries import ProductStep, Queries
from pathkernel.returned import batch_outputs
from pathkernel.sweeps import BLOCK, FEW, Cuts
from pathkernel.trajectory.gradients import Passes, RecordedGradients, samples_of
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.trajectory import Trajectory

SHARE = 0.75
"""Part of a budget that is planned with: the rest is for gaps between tensors."""

PASSING = 1.6
"""What a process grows by in a pass through a network over what its tensors take at once: operations need memory
inside, and many results of many sizes leave gaps. Measured on convolutional networks, where it is largest."""

RUNTIME = 24 << 20
"""Bytes that code and Python's own objects take when they are first used, measured on three networks by
tests/test_memory_budget.py."""

OF_SMALL = 0.6
"""Of a small budget they take this part at most."""

STAGE = 6
"""Vectors of P numbers in float64 by which a recorded gradient is compared with its recomputation."""

HELD = 5
"""Vectors of P numbers in float64 that are held while gradients are contracted."""

WITHOUT_GRAPH = 2.5
"""The same for a pass without a graph, in which little else is held than what an operation works on."""

AT_ONCE = 4096
"""Samples that go through a network at once, at most, for nothing but their outputs."""

COLUMNS = (2**16, 2**14, 2**12, 2**10, 2**9, 2**8)
"""Entries of θ that may be formed at once."""

PASS = 4
"""Cost of a pass through the network by itself, in samples that go through it."""


@dataclass(frozen=True)
class Plan:
    """How a backward sweep is cut.

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


@dataclass(frozen=True)
class BatchSizes:
    """What the batches of a run take.

    Attributes
    ----------
    most, largest
        Samples in the largest step, and in the largest batch.
    separate
        Samples that may go through the network a few at a time.
    whole, held
        Bytes of the largest batch that goes through it whole, during the pass and afterwards; 0 where there is none.
    rows
        Whether the gradients of such a batch are rows that are made one by one.
    inputs
        Bytes of a sample.
    proof
        Bytes in which it was proved how gradients are to be taken.
    """

    most: int
    largest: int
    separate: Footprint
    whole: float
    held: float
    rows: bool
    inputs: float
    proof: int

    @classmethod
    def of(cls, gradients: RecordedGradients, pushed: int = 1, total: bool = False) -> BatchSizes:
        """By a few samples of one batch of each kind.

        Parameters
        ----------
        gradients
            Of the recorded batches.
        pushed
            Directions along which a batch is pushed at once.
        total
            Whether only the sum of the gradients is wanted.
        """
        separate, whole, held, rows, inputs, proof = [NOTHING], 0.0, 0.0, False, 0.0, 0
        for size, index, place in gradients.examples.values():
            step = gradients.trajectory.store.read(index)
            one = _Batch(gradients, step, step.batches[place], pushed)
            inputs = max(inputs, one.bytes)
            if not one.coupled and not total:
                with Allocations() as allocations:
                    one.pieces(3)
                proof = max(proof, allocations.peak)
            found = footprint(one.total if total else one.rows if one.coupled else one.pieces)
            if one.coupled or one.random:
                whole, held = max(whole, found.peak(size)), max(held, found.held(size))
            else:
                separate.append(found)
            rows = rows or one.coupled
        largest = max(size for size, _, _ in gradients.examples.values())
        widest = max(separate, key=lambda found: found.peak(64))
        return cls(gradients.most, largest, widest, whole, held, rows, inputs, proof)


class _Batch:
    """A few samples of a batch, to be tried out."""

    def __init__(self, gradients: RecordedGradients, step: Step, batch: MicroBatch, pushed: int) -> None:
        index = torch.arange(4) % len(batch.ids)
        inputs, targets = (None if own is None else take(own, index) for own in (batch.inputs, batch.targets))
        few = MicroBatch(batch.ids[index], None, inputs, targets)
        self.inputs, _ = samples_of(few, gradients.trajectory.data)
        self.point, self.pushed, self.function = step.before, pushed, gradients.replayed(step, batch)
        self.source, self.random = gradients.source_of(batch), bool(batch.state.generators)
        self.coupled = gradients.together(batch, step.before, self.inputs)

    @property
    def bytes(self) -> float:
        """Of a sample."""
        return sum(leaf.nbytes for leaf in pytree.tree_leaves(self.inputs)) / 4

    def pieces(self, n: int) -> Any:
        """Gradients of n samples, and a product with each of a few directions."""
        ones = lambda outputs: torch.ones_like(batch_outputs(outputs, n))  # noqa: E731
        part = self.source.pulled_back(self.point, take(self.inputs, slice(0, n)), ones, self.function)
        for piece in part.pieces:
            piece.factor.products(torch.zeros(
                self.pushed, piece.factor.size, dtype=piece_dtype(piece), device=device_of_factor(piece.factor)
            ))
        return part

    def rows(self, n: int) -> None:
        """Rows of n samples, one by one."""
        for _ in coupled_row_blocks(self.function, self.point, *self._weighted(n), 1):
            pass

    def total(self, n: int) -> Tensor:
        """The sum of the gradients of n samples."""
        return weighted_gradient(self.function, self.point, *self._weighted(n)).double()

    def _weighted(self, n: int) -> tuple[PyTree, Tensor]:
        inputs = self.function.cast(take(self.inputs, slice(0, n)))
        with self.function.running(gradients=False):
            outputs = self.function.batch(self.function.parameters(self.point), inputs)
        return inputs, torch.ones_like(outputs)


NOTHING = Footprint(np.zeros(1), np.zeros(1))


def plan_backward(
    curve_of: Callable[[Queries], Curve],
    queries: Queries,
    gradients: RecordedGradients,
    memory: int,
    by: str | None,
    dense: bool,
    matrices: int = 0,
) -> Plan:
    """Cut a backward sweep to a budget.

    Parameters
    ----------
    curve_of
        Lays a curve through queries.
    queries
        All that are asked for.
    gradients
        Of the recorded batches.
    memory
        Bytes, beside trajectory, inputs and result.
    by
        Whether shares are split, see `pathkernel.kernel_machine.KernelMachine.explain`.
    dense
        Whether the weights of each step are wanted as a matrix.
    matrices
        Further rows of P numbers that each query takes.

    Raises
    ------
    InputError
        With both sizes, where the budget does not hold a single query and the least of a batch.
    """
    return _Planner(curve_of, queries, gradients, by, dense, matrices, memory).plan(memory)


class _Planner:
    def __init__(
        self,
        curve_of: Callable[[Queries], Curve],
        queries: Queries,
        gradients: RecordedGradients,
        by: str | None,
        dense: bool,
        matrices: int,
        memory: int,
    ) -> None:
        self.curve_of, self.queries, self.gradients, self.dense = curve_of, queries, gradients, dense
        self.trajectory = trajectory = gradients.trajectory
        self.rule, self.k, self.size = trajectory.rule, queries.components, trajectory.layout.size
        self.samples = count(queries.inputs)
        self.largest = max(where.stop - where.start for where in trajectory.layout.slices.values())
        elementwise = self.rule.elementwise
        self.itemsize = working(queries.function.dtype).itemsize if elementwise else 8
        self.row = self.size * working(queries.function.dtype).itemsize
        self.step = self._step_footprint()
        self.by_query = self._by_query(by) + float(matrices * self.k * self.size * self.itemsize)
        with Allocations() as proof:  # of the network, once
            self._swept(2)
        self.ample = self._ample(float(proof.peak))
        if self.ample <= usable_bytes(memory):  # small beside the budget, as mostly: no more need be known
            return
        self.query = footprint(self._swept)
        self.batches = BatchSizes.of(gradients, pushed=FEW if self.samples * self.k <= FEW else 1)
        gradients.proof = max(gradients.proof, proof.peak, self.batches.proof)
        self.proof = float(gradients.proof)

    def _ample(self, two: float) -> float:
        """More bytes than a sweep in one piece takes, from what two queries take while the network is being proved."""
        samples = self.samples + self.gradients.most
        rows = self.row * (self.k * self.samples * (2 + self.rule.stages + 3 * self.dense) + 2 * self.gradients.most)
        vectors = 8.0 * self.size * (STAGE + HELD + 16) + 3.0 * self.itemsize * BLOCK + self.step[0]
        return 2 * PASSING * samples * two + rows + vectors + self.samples * self.by_query

    # -- what is measured ------------------------------------------------------------------------------------

    def _swept(self, n: int, passes: int | None = None) -> Any:
        """Gradients of a few queries, on the curve's last two segments."""
        few = self.queries.block(torch.arange(n) % self.samples)
        few.passes = passes
        curve = self.curve_of(few)
        if isinstance(curve.quadrature, Adaptive):  # every level of halving takes the same
            curve.quadrature = replace(curve.quadrature, max_depth=1)
        account = Account.opened(curve.initial())
        segments = curve.backward(account)
        q = [q for _, q in islice(segments, 2)][-1:]
        return segments, account, q

    def _step_footprint(self) -> tuple[float, float]:
        """Bytes of an optimizer step's coefficients, at most and while it is used."""
        trajectory = self.trajectory
        shapes = dict(zip(trajectory.layout.names, trajectory.layout.shapes, strict=True))
        step = trajectory.store.read(len(trajectory) - 1)
        with Allocations() as allocations:
            adjoint = Adjoint(self.rule, step, shapes)
            for name in step.active:
                adjoint.linear(name)
            found = float(allocations.peak), float(allocations.held)
        casts = 2.0 * self.itemsize * self.largest
        return found[0] + casts, found[1] + casts

    def _by_query(self, by: str | None) -> float:
        """Bytes of a query sample throughout: cotangents of the optimizer's memory, shares, sums of a step."""
        trajectory, most = self.trajectory, self.gradients.most
        slots = len(self.rule.memory) if keeps_memory(trajectory) else 0
        held = slots * self.size * self.itemsize + 8 * len(trajectory.data) + 8 * self.rule.stages * most
        return float(self.k * (held + 16 * most))

    # -- what follows ----------------------------------------------------------------------------------------

    def _phases(self, passes: int | None, cuts: Cuts, samples: int) -> Iterator[Footprint]:
        """Bytes of query samples in each part of a step; ``samples`` is what a block has at most."""
        batches, streamed = self.batches, cuts.batch.streamed
        at_most, coefficients = self.step
        vector = 8.0 * self.size
        yield Footprint(np.array([PASSING * self.proof]), np.zeros(1))
        query = self.query if passes is None else self.rows
        taking = 0.0 if passes is None else PASSING * (query.peak(passes) - query.held(passes))
        during = query.times(PASSING) if passes is None else query.at_the_end.plus(taking)
        yield during.plus(coefficients, self.by_query)

        m = min(batches.largest, cuts.batch.samples)
        own, whole = float(self.row), m == batches.largest
        pieces = batches.separate.held(1) - batches.separate.held(0)
        formed = 0.0 if whole and not batches.rows else m * own
        of_one = own if batches.rows else pieces if whole else min(pieces, own)
        held = (m if streamed else batches.most) * of_one + batches.most * batches.inputs
        taking = PASSING * max(batches.whole, batches.separate.peak(m)) + formed
        between = query.at_the_end.plus(0.0, self.by_query)
        yield between.plus(STAGE * vector + taking + (0.0 if streamed else max(0.0, held - m * of_one)))

        held = max(held, batches.held)
        columns = min(self.largest, cuts.columns)
        scratch = 3.0 * self.itemsize * columns * (m if streamed else batches.most)
        inside = between.plus(at_most + HELD * vector + held + scratch)
        by_query = float(self.k * self.itemsize)
        if streamed:
            inside = inside.plus(0.0, by_query * self.size * self.rule.stages)
        if self.dense:
            inside = inside.plus(0.0, 24.0 * self.k * self.size * self.rule.stages)
        if not self.rule.elementwise:
            inside = inside.plus(0.0, self.k * self.adjoint)
            yield inside
        elif self.k * samples * columns > BLOCK:
            yield inside.plus(3.0 * self.itemsize * BLOCK)
        else:
            yield inside.plus(0.0, 3.0 * by_query * columns)

    def _most(self, passes: int | None, cuts: Cuts, memory: float) -> int:
        """Query samples in a block that fit."""
        def fits(bound: int) -> int:
            return min(phase.most(memory, self.samples) for phase in self._phases(passes, cuts, bound))

        return max(fits(self.samples), min(fits(1), BLOCK // (self.k * min(self.largest, cuts.columns))))

    def plan(self, memory: int) -> Plan:
        """The cheapest way that fits."""
        usable, n = usable_bytes(memory), self.samples
        whole = Plan(n, None, Cuts(scratch=int(usable) // 4))
        if self.ample <= usable:
            return whole
        columns = max(1, BLOCK // (n * self.k))
        if self._most(None, replace(whole.cuts, columns=columns), usable) >= n:
            return whole
        best: tuple[float, Plan] | None = None
        for plan in self._ways(int(usable) // 16):
            most = self._most(plan.passes, plan.cuts, usable)
            if most == 0:
                continue
            even = math.ceil(n / math.ceil(n / most))  # as many blocks, but none much smaller than the others
            cost = self._cost(even, plan)
            if best is None or cost < best[0]:
                best = cost, replace(plan, queries=even)
        if best is None:
            least = min(
                max(phase.peak(1) for phase in self._phases(way.passes, way.cuts, 1)) for way in self._ways(0)
            )
            raise refusal(least, memory)
        return best[1]

    def _ways(self, scratch: int) -> Iterator[Plan]:
        """All that may be tried, without the size of a block."""
        most, largest = self.batches.most, self.batches.largest
        sizes = [largest, *(size for power in range(1, 11) if (size := largest >> power))]
        for passes, size, streamed, columns in product((None, 16, 4, 1), sizes, (False, True), COLUMNS):
            if streamed and size == most:
                continue
            batch = Passes(sys.maxsize if size == largest else size, streamed)
            yield Plan(1, passes, Cuts(batch, columns, max(1, scratch), push=False))

    def _cost(self, block: int, plan: Plan) -> float:
        """In samples that go through the network."""
        most, columns = self.batches.most, max(1, self.size // plan.cuts.columns)
        passes = math.ceil(most / min(most, plan.cuts.batch.samples))
        sweeps = math.ceil(self.samples / block)
        batch = most + PASS * passes + 2 * columns * (passes if plan.cuts.batch.streamed else 1)
        return sweeps * batch + self.samples * (1 + PASS / (plan.passes or block))

    @property
    def rows(self) -> Footprint:
        """Of queries whose gradients are kept as rows."""
        if not hasattr(self, "_rows"):
            self._rows = footprint(lambda n: self._swept(n, passes=n))
        return self._rows

    @property
    def adjoint(self) -> float:
        """Bytes of a query in the adjoint of a rule that takes whole parameters."""
        if not hasattr(self, "_adjoint"):
            step = self.trajectory.store.read(len(self.trajectory) - 1)
            shapes = dict(zip(self.trajectory.layout.names, self.trajectory.layout.shapes, strict=True))
            name = max(step.active, key=lambda name: shapes[name].numel())
            size, adjoint = shapes[name].numel(), Adjoint(self.rule, step, shapes)
            slots, device = len(self.rule.memory), self.trajectory.device
            found = footprint(
                lambda n: adjoint.on(name, torch.float64)(
                    slice(0, size), torch.ones(n, size, dtype=torch.float64, device=device), [None] * slots
                )
            )
            self._adjoint = found.peak(4) / 4 + 16.0 * size
        return self._adjoint


def outputs_at_once(function: ModelFunction, theta: Tensor, inputs: PyTree, memory: int) -> int:
    """Samples that go through a network at once for nothing but their outputs, at least one."""
    few = lambda n: take(inputs, torch.arange(n) % count(inputs))  # noqa: E731
    found = footprint(lambda n: function.outputs(theta, few(n))).times(WITHOUT_GRAPH)
    return max(1, found.most(usable_bytes(memory) / 2, AT_ONCE))


def plan_forward(
    queries: Queries, gradients: RecordedGradients, quadrature: Quadrature, memory: int
) -> tuple[int, Passes]:
    """Query samples, and samples of a batch, that go through the network at once in a forward sweep.

    Raises
    ------
    InputError
        With both sizes, where the budget does not hold one of each.
    """
    trajectory, samples, usable = gradients.trajectory, count(queries.inputs), usable_bytes(memory)
    segment = next(iter(trajectory.segments()))
    channels, vector = _channels(gradients), 8.0 * trajectory.layout.size

    def pushed(n: int) -> Any:
        few = queries.block(torch.arange(n) % samples)
        step = ProductStep(few, segment, torch.zeros(
            channels, trajectory.layout.size, dtype=torch.float64, device=trajectory.device
        ))
        return quadrature.average(step)

    # Gradients, displacement, memory and directions of each channel.
    rule, values = trajectory.rule, 8.0 * queries.components * (channels + 8)
    fixed = vector * (STAGE + channels * (2 * rule.stages + len(rule.memory) + 2))
    query = footprint(pushed).times(PASSING).plus(fixed - vector * channels)
    batches = BatchSizes.of(gradients, total=True)
    resting = fixed + values * samples
    separate = batches.separate.times(PASSING)
    least = max(query.peak(1) + values * samples, resting + max(PASSING * batches.whole, separate.peak(1)))
    if least > usable:
        raise refusal(least, memory)
    passes = separate.most(usable - resting, batches.largest)
    return query.most(usable - values * samples, samples), Passes(sys.maxsize if passes == batches.largest else passes)


def _channels(gradients: RecordedGradients) -> int:
    """How many channels a displacement is split into, with that of the samples."""
    trajectory = gradients.trajectory
    step, names = trajectory.store.read(len(trajectory) - 1), {"samples", "rounding"}
    names |= {*trajectory.objective.regularizers, *step.gradient_changes}
    if trajectory.initial_memory:
        names.add("memory")
    if gradients.discrepancies:
        names.add("unexplained")
    for name in list(step.active)[:1]:
        parameter = trajectory.layout.unflatten(step.before)[name].double()
        for of in (trajectory.rule.gradient_sources, trajectory.rule.displacement_sources):
            names |= of(parameter, step.frozen[name], step.hyperparameters_of(name)).keys()
    return len(names)


def usable_bytes(memory: float) -> float:
    """What tensors may take of a budget."""
    return SHARE * (memory - min(OF_SMALL * memory, RUNTIME))


def refusal(least: float, memory: int) -> InputError:
    """That a budget is too small, with one that is not."""
    needed = least / SHARE + min(least / SHARE * OF_SMALL / (1 - OF_SMALL), RUNTIME)
    digits = max(0, 1 - math.floor(math.log10(needed / 1e6)))
    enough = math.ceil(needed / 1e6 * 10**digits) / 10**digits
    return InputError(
        f"One query and the least part of a batch take {enough:.{max(0, digits)}f} MB beside the trajectory and the "
        f"result, and the budget is {memory / 1e6:.3g} MB",
        "A budget has to hold at least these; it is kept, not exceeded in silence",
        f'Write `memory="{enough:.{max(0, digits)}f}MB"` or more',
    )


def keeps_memory(trajectory: Trajectory) -> bool:
    """Whether any gradient of the run went into the optimizer's memory."""
    rule, layout = trajectory.rule, trajectory.layout
    if not rule.memory:
        return False
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    for step in trajectory.steps():
        adjoint = Adjoint(rule, step, shapes)
        for name in {group: name for name, group in step.groups.items() if name in step.active}.values():
            linear = adjoint.linear(name)
            if linear is None or linear.rate is None:
                return True
    return False
