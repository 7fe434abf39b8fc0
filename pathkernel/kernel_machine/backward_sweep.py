r"""Backward through a trajectory, for shares.

.. math:: \mathrm{share}_i = \sum_{r : i \in B_r} c_{r,i} \langle u_r, g_{r,i}\rangle,\qquad
          u_r = \sum_{s \ge r} A_{s,r}^\top q_s

A step that only scales the gradient needs no P numbers a query: pieces of the queries' gradients meet those of the
batch. Otherwise one cotangent of the optimizer's memory, (Q, P), is pulled through the adjoint of every step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathkernel.gradients.factored import FactoredGradients, accumulation_dtype
from pathkernel.gradients.pytrees import blocks
from pathkernel.kernel_machine.accumulator import Accumulator
from pathkernel.kernel_machine.adjoint import Linear, StepAdjoint
from pathkernel.kernel_machine.block_memory import BlockMemory
from pathkernel.kernel_machine.curves import Curve
from pathkernel.kernel_machine.forms import FormBuilder
from pathkernel.kernel_machine.scaled_steps import ScaledSteps
from pathkernel.kernel_machine.step_contributions import Contributions, StepGradients, module_of
from pathkernel.runtime.interrupts import defer_interrupts, deliver_interrupt
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.runtime.workspace import give_back_freed_memory
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.coupled_samples import CoupledSamples
from pathkernel.trajectory.stage_gradients import WHOLE, Passes
from pathkernel.trajectory.step import Segment, Step

BLOCK = 2**19
"""Entries of a block of columns for all queries: three of them stay in cache, and products run at full speed. By which
script it was found is not on record; `benchmarks/engines.py` times shares that are made with it."""

FEW = 4
"""Queries up to which a batch is pushed along each, in place of forming rows of the batch. Chosen, not measured."""


@dataclass(frozen=True)
class Cuts:
    """Sizes of what a sweep does at once.

    Attributes
    ----------
    batch
        How the samples of a batch go through the network.
    columns
        Entries of θ at once, for all queries and all samples held.
    scratch
        Bytes for inner products of pairs.
    roomy
        Whether there is memory for what is faster: a batch is pushed along few queries at once, and each block of the
        memory's cotangents has a place of its own.
    steps
        How many consecutive steps are run together, where they are alike.
    part
        Samples of a block of queries whose gradients are there at once, the parts of a block walking the path in step
        (`pathkernel.kernel_machine.sweeps_in_step`); None for all.
    """

    batch: Passes = WHOLE
    columns: int = sys.maxsize
    scratch: int = 2**28
    roomy: bool = True
    steps: int = 1
    part: int | None = None

    @property
    def scattered(self) -> bool:
        """Whether cotangents lie wherever there is room: those of parts would leave gaps for each other."""
        return self.roomy and self.part is None


class TakenApart(NamedTuple):
    """What a sweep needs of a step, whatever its queries are.

    Attributes
    ----------
    adjoint
        The adjoint of the step.
    in_displacement
        Terms that the optimizer added to the displacement, (P,) each.
    received
        Each gradient of the step.
    """

    adjoint: StepAdjoint
    in_displacement: dict[str, Tensor]
    received: list[StepGradients]


@defer_interrupts(divisible=True)
@EXACT_PRODUCTS
def backward_sweep(
    curve: Curve,
    gradients: RecordedGradients,
    by: str | None = None,
    builder: FormBuilder | None = None,
    progress: bool = False,
    cuts: Cuts | None = None,
) -> Accumulator:
    """Shares of all training samples in all queries.

    Time per step: the quadrature's query gradients and those of one batch, and their inner products: Q · B · (p + q)
    for each layer (p, q) where the step only scales the gradient, otherwise Q · B · P and one pass over the memory's
    cotangents. Memory O(Q · P · memory slots) where the optimizer has a memory, independent of N; see
    `pathkernel.kernel_machine.memory_plan`.
    """
    sweep = BackwardSweep(curve, gradients, by, builder, cuts or Cuts())
    bar = tqdm(total=len(curve.trajectory), desc="backward sweep", unit="step", disable=not progress)
    for segment in sweep.walk(curve):
        bar.update(segment.step is not None)
    bar.close()
    return sweep.finish()


class BackwardSweep:
    """A backward sweep: the accumulator, and the memory's cotangents in blocks of columns."""

    def __init__(
        self,
        curve: Curve,
        gradients: RecordedGradients,
        by: str | None,
        builder: FormBuilder | None,
        cuts: Cuts,
    ) -> None:
        self.trajectory = curve.trajectory
        self.gradients = gradients
        self.by = by
        self.builder = builder
        self.cuts = cuts
        self._pushed = cuts.roomy and len(curve.queries) <= FEW
        # Shares of each module take rows; streamed passes have no whole weights to be met with.
        whole = by != "module" and not cuts.batch.streamed
        directions = len(curve.queries) if whole else 0
        self.passes = replace(cuts.batch, directions=directions, outputs=builder is not None)
        trajectory = self.trajectory
        count = len(curve.queries)
        self.layout = trajectory.layout
        self.rule = trajectory.rule
        self.count = count
        self.shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        # Rules that mix entries are differentiated, and add up rounding along the way.
        self.dtype = accumulation_dtype(curve.queries.function.dtype) if self.rule.elementwise else torch.float64
        self.accumulator = accumulator = Accumulator.start(curve.initial)
        self.scaled = ScaledSteps(self.layout, accumulator, cuts.scratch)
        self._coefficients: dict[Any, Linear] = {}
        self.shares = self._start_shares()
        modules = dict.fromkeys(module_of(name) for name in self.layout.names) if by == "module" else ()
        self.modules = {module: torch.zeros_like(self.shares) for module in modules}
        accumulator.steps = self._zeros(count, len(trajectory)) if by == "step" else None
        self.memory: dict[int, list[Tensor | None]] = {}
        """Cotangents by where a block starts: one (Q, size) for each slot, None while it is zero."""
        self._cotangents: dict[int, Tensor] = {}
        # Rules that mix entries take whole parameters, and may return what they were given.
        reused = cuts.roomy and self.rule.elementwise and not cuts.batch.streamed
        self._of_queries = BlockMemory() if reused else None
        self._of_batch = BlockMemory() if reused else None

    def walk(self, curve: Curve, taken_apart: Callable[[Segment, Step], TakenApart] | None = None) -> Iterator[Segment]:
        """Walk back along the curve, whose steps this sweep or another takes apart; each segment once it is booked."""
        curve.stack = self.cuts.steps
        for segment, q in self.prepared(curve.backward(self.accumulator)):
            if segment.step is None:
                self.accumulator.channels[segment.channel] += q @ segment.displacement
            else:
                self.step(segment, segment.step, q, taken_apart)
            del q  # not beside the gradients of the next segment
            deliver_interrupt()
            yield segment

    def prepared(
        self, weighted: Iterator[tuple[Segment, FactoredGradients]]
    ) -> Iterator[tuple[Segment, FactoredGradients]]:
        """Segments and their weights, the batches of a few of which are run together before the first is used."""
        if self.cuts.steps < 2:
            yield from weighted
            return
        try:
            while ahead := list(islice(weighted, self.cuts.steps)):
                steps = [segment.step for segment, _ in ahead if segment.step is not None]
                if len(steps) == self.cuts.steps:
                    self.gradients.prepare(steps, self.passes)
                ahead.reverse()
                while ahead:
                    yield ahead.pop()
        finally:
            self.gradients.prepare((), self.passes)

    def _start_shares(self) -> Tensor:
        """Zeros (N, Q), so that a batch adds to whole rows."""
        device = self.trajectory.device
        return torch.zeros(len(self.gradients.columns), self.count, dtype=torch.float64, device=device)

    # -- one step --------------------------------------------------------------------------------------------

    def step(
        self,
        segment: Segment,
        step: Step,
        q: FactoredGradients,
        taken_apart: Callable[[Segment, Step], TakenApart] | None = None,
    ) -> None:
        """Book what a step did to the queries, and pull the memory's cotangents back through it."""
        if q.zero and not self.memory:
            return
        give_back_freed_memory()
        adjoint, in_displacement, received = (taken_apart or self.take_apart)(segment, step)
        give_back_freed_memory()
        totals = [Contributions(self.accumulator, self.shares, self.modules, step.index, one) for one in received]
        built: list[set[int]] = [set() for _ in totals]
        if self.cuts.batch.streamed:
            self._book_added(in_displacement, q)
            self._streamed(step, adjoint, q, received, totals)
        else:
            rates = self._scalar_rates(adjoint, step, q, received[0], received[0].stage.parts)
            if rates:
                self._book_added(in_displacement, q)
                self.scaled.contract(step, q, rates, received[0], totals[0])
            added = {} if rates else in_displacement  # met with columns while these are in cache, where all are formed
            for name, where, pulled in self._pull_back_memory(step, adjoint, q, rates, added):
                deliver_interrupt()
                for place, u, scale in pulled:
                    totals[place].add(name, received[place].products(where, u, self._pushed), scale)
                    received[place].keep(where, u, scale)
            built = [total.add_coupled(self.builder) for total in totals]
        self._beyond_the_rule(step, q)
        for total in totals:
            total.add_to_accumulator()
        for one, done in zip(received, built, strict=True):
            if self.builder is not None:
                self._build(self.builder, step, one, done)

    def _book_added(self, in_displacement: Mapping[str, Tensor], q: FactoredGradients) -> None:
        """Book what the optimizer added to the displacement."""
        if in_displacement:
            products = q @ torch.stack(list(in_displacement.values()), dim=1)
            for column, name in enumerate(in_displacement):
                self.accumulator.channels[name] += products[:, column]

    def take_apart(self, segment: Segment, step: Step) -> TakenApart:
        """Adjoint of a step, what the optimizer added, and the gradients of its samples."""
        adjoint = StepAdjoint(self.rule, step, self.shapes, self._coefficients)
        stages = self.gradients.stages(step, rows=True, passes=self.passes)
        in_gradient, in_displacement = self._sources(segment, step)
        dtype, form = accumulation_dtype(self.gradients.function.dtype), self.builder is not None
        received = [
            StepGradients(stage, [*stage.channels.items(), *in_gradient.items()], dtype, form, self._of_batch)
            for stage in stages
        ]
        return TakenApart(adjoint, in_displacement, received)

    def _build(self, builder: FormBuilder, step: Step, received: StepGradients, done: set[int]) -> None:
        """Give a form the kernels of the micro-batches that it does not have."""
        if len(done) == len(received.stage.batches):
            return
        size = self.count, self.layout.size
        weights = self._zeros(*size) if received.weights is None else received.weights
        batches = self.gradients.batches
        for ids, slopes, kernel in batches.kernel(step, received.stage, weights, self.passes, done):
            builder.add(step.index, ids, slopes, kernel)

    def _beyond_the_rule(self, step: Step, q: FactoredGradients) -> None:
        """Book what a step did otherwise than its rule says, and pull the cotangents through edits of the memory."""
        found = self.gradients.discrepancies.of(step)
        if found.displacement:
            vector = self._zeros(self.layout.size)
            for name, shift in found.displacement.items():
                vector[self.layout.slices[name]] = shift.reshape(-1)
            self.accumulator.channels[found.channel] += q @ vector
        for name in {**found.memory, **found.scale}:
            own = self.layout.slices[name]
            for where in self.blocks(name):
                (cotangent,) = self.memory.get(where.start, [None])
                if cotangent is None:
                    continue
                if name in found.memory:
                    added = found.memory[name].reshape(-1)[where.start - own.start : where.stop - own.start]
                    self.accumulator.channels[found.channel] += cotangent.double() @ added
                if name in found.scale:
                    self.memory[where.start] = [self._keep(0, where, cotangent * found.scale[name])]

    def _sources(self, segment: Segment, step: Step) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms that the optimizer added to the gradient and to the displacement, (P,) each."""
        sources: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        asked = (self.rule.gradient_sources, self.rule.displacement_sources)
        for name, where in self.layout.slices.items():
            if name not in step.active:
                continue
            parameter, told = segment.start[where].view(self.shapes[name]), step.hyperparameters_of(name)
            for found, of in zip(sources, asked, strict=True):
                if not of(parameter, step.frozen[name], told):  # as nearly always: nothing to be converted for
                    continue
                for source, term in of(parameter.double(), step.frozen[name], told).items():
                    if source not in found:
                        found[source] = self._zeros(self.layout.size)
                    found[source][where] = term.reshape(-1)
        return sources

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.shares.device)

    # -- steps that only scale the gradient: no P numbers a query ---------------------------------------------

    def _scalar_rates(
        self,
        adjoint: StepAdjoint,
        step: Step,
        q: FactoredGradients,
        received: StepGradients,
        parts: Iterable[FactoredGradients | CoupledSamples],
    ) -> dict[str, float]:
        """The rate of each parameter that is only scaled and met in pairs; see `ScaledSteps.rates`."""
        if isinstance(received.stage.factor, Tensor) or self.memory or self.by == "module" or self.builder is not None:
            return {}
        # Samples that are not formed are met with the weights of all parameters.
        return {} if received.coupled else self.scaled.rates(adjoint, step, q, parts)

    # -- all other steps: columns of the queries' cotangents, block by block ----------------------------------

    def _pull_back_memory(
        self,
        step: Step,
        adjoint: StepAdjoint,
        q: FactoredGradients,
        rates: dict[str, float],
        added: Mapping[str, Tensor],
    ) -> Iterator[tuple[str, slice, list[tuple[int, Tensor, float]]]]:
        """Pull the columns of all parameters but the scaled ones back; (stage, u, scale) while they are in cache.

        What the optimizer ``added`` to the displacement of these parameters is booked.
        """
        like = torch.empty(0, dtype=self.dtype, device=self.shares.device)
        for name in self.layout.names:
            if name not in step.active or name in rates:
                continue
            pull = adjoint.of(name, self.dtype)
            own = self.layout.slices[name]
            for where in self.blocks(name):
                held = self.memory.get(where.start, [None] * len(self.rule.memory))
                inside = slice(where.start - own.start, where.stop - own.start)
                if self._of_queries is None:
                    columns = q.columns(where, self.dtype)
                else:  # what the adjoint returns is never what it was given
                    columns = q.fill_columns(where, self._of_queries.empty(self.count, where.stop - where.start, like))
                for channel, vector in added.items():
                    self.accumulator.channels[channel] += columns @ vector[where].to(self.dtype)
                found = pull(inside, columns, held)
                kept = held
                if any(cotangent is not None for cotangent in held):
                    self.memory[where.start] = kept = [self._keep(slot, where, own) for slot, own in enumerate(held)]
                # Where u is a cotangent of the memory itself, it is held once, in the place that this has now.
                same = {id(own): now for own, now in zip(held, kept, strict=True) if now is not None}
                pulled = [(stage, same.get(id(u), u), scale) for stage, (u, scale) in enumerate(found) if u is not None]
                for part in blocks(where.stop - where.start, self.cuts.columns):  # a whole parameter may be too long
                    if not self.cuts.roomy:
                        give_back_freed_memory()
                    cut = [(stage, u[:, part], scale) for stage, u, scale in pulled]
                    yield name, slice(where.start + part.start, where.start + part.stop), cut

    def _keep(self, slot: int, where: slice, cotangent: Tensor | None) -> Tensor | None:
        """A block of the memory's cotangents, where memory is tight in one place with the others.

        Allocated one by one, they lie where intermediate results have been, and the next of those finds no room between
        them.
        """
        if cotangent is None or self.cuts.scattered:
            return cotangent
        if slot not in self._cotangents:
            self._cotangents[slot] = torch.empty(
                self.count * self.layout.size, dtype=self.dtype, device=self.shares.device
            )
        block = self._cotangents[slot][self.count * where.start : self.count * where.stop].view(self.count, -1)
        return cotangent if cotangent.data_ptr() == block.data_ptr() else block.copy_(cotangent)

    def _streamed(
        self,
        step: Step,
        adjoint: StepAdjoint,
        q: FactoredGradients,
        received: list[StepGradients],
        totals: list[Contributions],
    ) -> None:
        """Pull all columns back first, (Q, P) of each stage, then contract the passes of the batch one by one."""
        rates: dict[str, float] | None = None
        for stage, (one, total) in enumerate(zip(received, totals, strict=True)):
            parts = iter(one.stage.parts)
            begin = 0
            part = next(parts, None)
            while part is not None:
                assert isinstance(part, FactoredGradients)  # streamed ones are formed
                if rates is None:
                    rates = self._scalar_rates(adjoint, step, q, one, [part])
                    columns = list(self._pull_back_memory(step, adjoint, q, rates, {}))
                    rate = self.scaled.scale(rates)
                    for where, own, u, scale in ((w, *one_pulled) for _, w, pulled in columns for one_pulled in pulled):
                        received[own].keep(where, u, scale)
                if rates:
                    self.scaled.contract_part(q, rates, rate, one, total, begin, part)
                for name, where, pulled in columns:
                    for u, scale in ((u, scale) for own, u, scale in pulled if own == stage):
                        total.add_samples(name, begin, one.part_products(part, where, u, self._pushed), scale)
                begin += len(part)
                part = None  # not beside the next
                give_back_freed_memory()
                part = next(parts, None)
            if rates:
                self.scaled.contract_channels(step, q, rate, one, total)
            for _, where, pulled in columns:
                for u, scale in ((u, scale) for own, u, scale in pulled if own == stage):
                    total.add_rows(begin, one.channel_products(where, u), scale)

    def blocks(self, name: str) -> Iterator[slice]:
        """A parameter in blocks of whole rows; in one where the rule needs it whole."""
        own = self.layout.slices[name]
        shape = self.shapes[name]
        if not self.rule.elementwise:
            yield own
            return
        size = own.stop - own.start
        row = size // shape[0] if len(shape) > 1 and shape[0] else 1
        columns = max(1, min(BLOCK // self.count, self.cuts.columns))
        for block in blocks(size, max(row, columns // row * row) if row <= columns else columns):
            yield slice(own.start + block.start, own.start + block.stop)

    def finish(self) -> Accumulator:
        """Book what was in the optimizer's memory before the first recorded step, and close the accumulator."""
        self.scaled.settle()
        self.accumulator.shares = self.shares.T.contiguous()
        del self.shares
        for module in list(self.modules):  # one at a time, so that only one is there twice
            self.accumulator.modules[module] = self.modules.pop(module).T.contiguous()
        for name, start in self.trajectory.initial_memory.items():
            own = self.layout.slices[name]
            for where in self.blocks(name):
                held = self.memory.get(where.start, [None] * len(start))
                for cotangent, slot in zip(held, start, strict=True):
                    if cotangent is not None:
                        values = slot.reshape(-1)[where.start - own.start : where.stop - own.start]
                        self.accumulator.channels["memory"] += cotangent.double() @ values.to(cotangent.device).double()
        return self.accumulator.on_cpu()
