"""Recorded batches run again as they ran: their gradients in total, sample by sample, and along directions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Parameters, PyTree
from pathkernel.gradients.factored import FactoredGradients, accumulation_dtype
from pathkernel.gradients.forward_state import generators_untouched, hashable
from pathkernel.gradients.gradient_source import BY_ROWS, GradientSource, weighted_sum
from pathkernel.gradients.layers.tape import FAILURES, Tape
from pathkernel.gradients.losses import (
    RETURNED,
    batch_gradient,
    batch_products,
    check_slopes,
    coupled_row_blocks,
    loss_slopes,
    weighted_gradient,
)
from pathkernel.gradients.low_types import low_types
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import random_directions
from pathkernel.gradients.pushed_shares import products_together
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.gradients.returned import batch_outputs, map_outputs, output_leaves
from pathkernel.gradients.sample_wise import ComparedSamples, check_sample_wise
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.runtime.workspace import give_back_freed_memory
from pathkernel.trajectory.cotangents import cotangents_of, scaled
from pathkernel.trajectory.coupled_samples import ALWAYS_ROWS, CoupledSamples, CoupledSweeps, normalises_batch
from pathkernel.trajectory.joined_batches import joined_batches
from pathkernel.trajectory.samples import samples_of
from pathkernel.trajectory.split_certificate import DIRECTIONS, SplitCheck, row_limit
from pathkernel.trajectory.stage_gradients import WHOLE, Passes, StageGradients
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.trajectory import Trajectory

NORMED = 64
"""Samples whose gradients are held at once for their norms."""


class RecomputedBatches:
    """Gradients of the batches on record, each run as it ran.

    Parameters
    ----------
    trajectory, function
        The record, and the network in the floating type of the arithmetic.
    memory
        Bytes for rows of per-sample gradients.
    engine
        How they are taken, see `pathkernel.gradients.gradient_source.GradientSource`.

    Attributes
    ----------
    check
        Whether rows are formed by reverse sweeps of whole batches, and what was measured of them.
    sweeps
        What forward and reverse sweeps of whole batches cost.
    held
        Gradients of batches that were run with others, by the index of their step: the batch, where, samples, and what.
    """

    def __init__(self, trajectory: Trajectory, function: ModelFunction, memory: int, engine: str) -> None:
        self.trajectory = trajectory
        self.function = function
        # A copy of the module takes as long as a small network's step.
        same = function.dtype == trajectory.dtype
        self.recorded = function.converted(function.dtype) if same else trajectory.function()
        self.source = GradientSource(function, engine, memory)
        # Mixed precision rounds every product; rows by torch.func round as the loop did.
        self.rounded = GradientSource(self.recorded, "jacobian", memory)
        self.check = SplitCheck(trajectory, coupled=engine == "autograd")
        self.sweeps = CoupledSweeps()
        self.held: dict[int, tuple[MicroBatch, Tensor, tuple[PyTree, PyTree], FactoredGradients]] = {}
        self._low: dict[Any, frozenset[torch.dtype]] = {}
        self._separate: dict[Any, bool] = {}
        self._joinable: dict[Any, bool] = {}
        self._comparing: dict[Any, bool] = {}

    def replayed(self, step: Step, batch: MicroBatch) -> ModelFunction:
        """The network as a micro-batch ran it."""
        # Mixed precision is entered again from the recorded type: other types would not be rounded alike.
        function = self.recorded if self.low(batch) else self.function
        buffers = step.buffers if batch.state.buffers is None else batch.state.buffers
        return function.with_(constants=buffers, state=batch.state)

    def low(self, batch: MicroBatch) -> frozenset[torch.dtype]:
        """Floating types of few bits that a pass rounded to: under autocast around the network, or inside it."""
        key = hashable(batch.state.modes), batch.state.autocast
        if batch.state.autocast:
            self._low[key] = frozenset({batch.state.autocast[1]})
        if key not in self._low:
            with generators_untouched():
                inputs, _ = samples_of(batch, self.trajectory.data)
                function = self.recorded.with_(constants=batch.state.buffers, state=batch.state)
                self._low[key] = low_types(function, self.trajectory.initial, inputs)
        return self._low[key]

    @property
    def met_low(self) -> frozenset[torch.dtype]:
        """Floating types of few bits of all passes that were run again."""
        return frozenset().union(*self._low.values())

    def joined(self, step: Step) -> Step:
        """A step with runs of small passes as one pass each, where the network gives the same for them together."""
        several = len(step.batches) > 1
        return replace(step, batches=joined_batches(step.batches, partial(self._may_join, step))) if several else step

    def _may_join(self, step: Step, run: Sequence[MicroBatch]) -> bool:
        """True where the outputs for some passes together are those of each; seen once for each kind."""
        first = run[0]
        if self.check.coupled or normalises_batch(self.function.module, first.state.modes):
            return False
        single = any(len(batch.ids) == 1 for batch in run)  # which some networks return without its axis
        outputs = None if first.cotangents is None else first.cotangents.shape[1:]
        key = hashable(first.state.modes), first.state.autocast, outputs, single
        if key not in self._joinable:
            function = self.replayed(step, first)
            samples = [function.cast(samples_of(batch, self.trajectory.data)[0]) for batch in run]
            kinds = {str(pytree.tree_structure(own)) for own in samples}
            shapes = {tuple(leaf.shape[1:] for leaf in pytree.tree_leaves(own)) for own in samples}
            parameters = function.parameters(self.trajectory.initial)
            self._joinable[key] = len(kinds) == len(shapes) == 1 and _same_together(function, parameters, samples)
        return self._joinable[key]

    def silence(self, step: Step, gradients: Tensor) -> None:
        """Set to zero what belongs to parameters without a gradient in this step, which the optimizer skipped."""
        for name, where in self.trajectory.layout.slices.items():
            if name not in step.active:
                gradients[..., where] = 0

    def summed_norms(self, step: Step, point: Tensor) -> float:
        """Σ_i ‖J_iᵀ λ_i‖ of a step, by one reverse sweep for each sample."""
        summed = 0.0
        for batch in step.batches:
            function = self.replayed(step, batch)
            inputs, targets = samples_of(batch, self.trajectory.data)
            cotangents = cotangents_of(batch, function, point, self.trajectory.objective, inputs, targets)
            for rows in coupled_row_blocks(function, point, inputs, cotangents, NORMED):
                self.silence(step, rows)
                summed += rows.norm(dim=1).sum().item()
        return summed

    def in_total(self, step: Step, batch: MicroBatch, point: Tensor, passes: Passes) -> Tensor:
        """The gradient of a micro-batch, run as it was, (P,) float64."""
        inputs, targets = samples_of(batch, self.trajectory.data)
        function = self.replayed(step, batch)
        whole = not passes.cut(len(batch.ids)) or self.inseparable(batch, point, inputs)
        if whole and not batch.captured:
            return batch_gradient(function, point, self.trajectory.objective, inputs, targets, batch.weights).double()
        if whole:
            cotangents = cotangents_of(batch, function, point, self.trajectory.objective, inputs, targets)
            return weighted_gradient(function, point, inputs, cotangents).double()
        cotangents = self._cotangents(batch, function, point, inputs, targets, passes)
        total = torch.zeros(function.layout.size, dtype=torch.float64, device=function.device)
        for piece in blocks(len(batch.ids), passes.samples):
            total += weighted_gradient(function, point, take(inputs, piece), cotangents[piece])
            give_back_freed_memory()
        return total

    def by_sample(self, step: Step, point: Tensor, passes: Passes) -> Iterator[FactoredGradients | CoupledSamples]:
        """The gradients of the samples of each micro-batch, run as it was: (B,), or a pass at a time."""
        for batch in step.batches:
            function = self.replayed(step, batch)
            samples, held = self._taken(step, batch, point)
            inputs, targets = samples_of(batch, self.trajectory.data) if samples is None else samples
            measured, low = self.check.is_due(step, batch, inputs), bool(self.low(batch))
            # Samples whose gradients are at hand were seen not to be coupled.
            pushed = None
            if held is None:
                pushed = self._pushed(step, batch, function, point, inputs, targets, passes, measured)
            if pushed is not None:
                self.check.certificate.engines.add("autograd")
                yield pushed
                continue
            found: list[Tensor] = []
            for rows, piece, cotangents in self._rows(batch, function, point, inputs, targets, passes, held):
                if measured:
                    v = random_directions(function.layout.size, DIRECTIONS)
                    whole = piece is not None
                    found = [rows @ v.T] if whole else [*found, rows @ v.T]  # a part of the rows of a whole batch
                    if whole or sum(len(part) for part in found) == len(cotangents):
                        own = slice(None) if piece is None else piece
                        measured_on = take(inputs, own), cotangents[own]
                        self.check.measure(function, point, *measured_on, v, torch.cat(found), low)
                    del v
                yield rows
                give_back_freed_memory()

    def _taken(
        self, step: Step, batch: MicroBatch, point: Tensor
    ) -> tuple[tuple[PyTree, PyTree], FactoredGradients] | tuple[None, None]:
        """Inputs and targets of a batch and its gradients at a point that are at hand, once; None of others."""
        held = self.held.pop(step.index, None)
        if held is None or held[0] is not batch or held[1] is not point or self.check.coupled:
            return None, None
        return held[2:]

    def _pushed(
        self,
        step: Step,
        batch: MicroBatch,
        function: ModelFunction,
        point: Tensor,
        inputs: PyTree,
        targets: PyTree,
        passes: Passes,
        measured: bool,
    ) -> CoupledSamples | None:
        """Samples whose rows are not formed, as forward sweeps take less; None where rows are to be formed."""
        n = len(batch.ids)
        if not self._may_push(batch, passes):
            return None
        costs = self.sweeps.of(batch, inputs)
        if passes.outputs:  # they are had from forward sweeps alone
            wanted = not costs.refused
        else:
            pays = costs.forward_pays(n, passes.directions, passes.width)
            wanted = pays and self.together(batch, point, inputs)
        if not wanted:
            return None
        cotangents = cotangents_of(batch, function, point, self.trajectory.objective, inputs, targets)
        # Sweeps whose shares are used already are measured along the directions in use, which takes none of its own.
        certify = self.check.certify if measured and costs.used else None
        own = CoupledSamples(costs, function, point, inputs, cotangents, passes.width, step.index, certify)
        if measured and certify is None:
            error, limit = own.split_error(), row_limit(function)
            if not error <= limit:
                costs.refused = True
                return None
            # Both ways have been timed now. Rows are measured by themselves.
            if not (passes.outputs or costs.forward_pays(n, passes.directions, passes.width)):
                return None
            self.check.certificate.note(error, limit)
        return own

    def _may_push(self, batch: MicroBatch, passes: Passes) -> bool:
        """True where products are asked for, and forward sweeps may be what takes less."""
        # Mixed precision rounds forward and reverse sweeps apart: shares would not add up to the gradient.
        allowed = passes.directions and passes.width and not (self.check.coupled or self.low(batch))
        return bool(allowed) and len(batch.ids) * self.function.layout.size >= ALWAYS_ROWS

    def _rows(
        self,
        batch: MicroBatch,
        function: ModelFunction,
        point: Tensor,
        inputs: PyTree,
        targets: PyTree,
        passes: Passes,
        held: FactoredGradients | None = None,
    ) -> Iterator[tuple[FactoredGradients, slice | None, Tensor]]:
        """Gradients, the samples that they are of (None for the next of a batch run together), and λ (B, C) of all.

        ``held`` are those that were taken with other batches.
        """
        objective, n = self.trajectory.objective, len(batch.ids)
        if held is not None:
            self.check.certificate.engines |= self.source.engines
            yield held, slice(0, n), self._slopes(batch, function, point, None, inputs, targets)
            return
        source = self.source_of(batch)
        if self.together(batch, point, inputs):
            self.check.certificate.engines.add("autograd")
            cotangents = cotangents_of(batch, function, point, objective, inputs, targets)
            row_blocks = coupled_row_blocks(function, point, inputs, cotangents, min(n, passes.samples))
            if self._may_push(batch, passes):
                row_blocks = self.sweeps.of(batch, inputs).timed(row_blocks, point.device)
            for rows in row_blocks:
                rows = rows.to(accumulation_dtype(function.dtype))
                yield FactoredGradients.dense(rows, function.layout), None, cotangents
        elif not passes.cut(n) or self.inseparable(batch, point, inputs):
            slopes: list[Tensor] = []

            def of_outputs(outputs: PyTree) -> Tensor:
                slopes.append(self._slopes(batch, function, point, outputs, inputs, targets))
                return slopes[-1]

            found = source.pulled_back(point, inputs, of_outputs, function)
            self.check.certificate.engines |= source.engines
            yield found.formed(source.workspace) if passes.rows else found, slice(0, n), slopes[-1]
        else:
            cotangents = self._cotangents(batch, function, point, inputs, targets, passes)
            for piece in blocks(n, passes.samples):
                own = take(inputs, piece)
                found = source.gradients(point, own, weighted_sum, cotangents[piece], None, function).as_rows()
                self.check.certificate.engines |= source.engines
                yield found, piece, cotangents

    def _slopes(
        self,
        batch: MicroBatch,
        function: ModelFunction,
        point: Tensor,
        outputs: PyTree,
        inputs: PyTree,
        targets: PyTree,
    ) -> Tensor:
        """λ (B, C) of a batch whose outputs are at hand."""
        objective = self.trajectory.objective
        if batch.cotangents is not None or objective.loss == RETURNED:
            found = cotangents_of(batch, function, point, objective, inputs, targets)
            if outputs is not None:
                check_slopes(batch_outputs(outputs, len(batch.ids)), found)
        else:
            found = scaled(batch, loss_slopes(function, objective, outputs, targets, batch.weights, len(batch.ids)))
        return function.cast(found)

    def _cotangents(
        self,
        batch: MicroBatch,
        function: ModelFunction,
        point: Tensor,
        inputs: PyTree,
        targets: PyTree,
        passes: Passes,
    ) -> Tensor:
        """λ = ∂L/∂z of a batch whose samples are run a few at a time, (B, C)."""
        if batch.cotangents is not None or self.trajectory.objective.loss == RETURNED:
            return self._slopes(batch, function, point, None, inputs, targets)
        returned, parameters = [], function.parameters(point)
        with function.evaluating(gradients=False):
            for piece in blocks(count(inputs), passes.samples):
                returned.append(function.call(parameters, function.cast(take(inputs, piece))))
                give_back_freed_memory()
        parts = [iter(output_leaves(one)) for one in returned]

        def joined(_: Any) -> Any:
            pieces = [next(part) for part in parts]
            return torch.cat(pieces) if isinstance(pieces[0], Tensor) else pieces[0]

        return self._slopes(batch, function, point, map_outputs(joined, returned[0]), inputs, targets)

    def source_of(self, batch: MicroBatch) -> GradientSource:
        """Source of the gradients of a batch."""
        return self.rounded if self.low(batch) else self.source

    def inseparable(self, batch: MicroBatch, point: Tensor, inputs: PyTree) -> bool:
        """True where a batch cannot be run a few samples at a time: samples are coupled, or the pass is random."""
        return bool(batch.state.generators) or self.together(batch, point, inputs)

    def together(self, batch: MicroBatch, point: Tensor, inputs: PyTree) -> bool:
        """True where the samples of a batch have to be run together, one reverse sweep for each."""
        if self.check.coupled or normalises_batch(self.function.module, batch.state.modes):
            return True
        if self._compares_samples(batch, inputs):
            return True
        if not batch.state.generators:
            return False
        # What is random in training is proved as it is in evaluation, where each sample can be run by itself. That its
        # training mode couples no samples is seen once.
        if self.low(batch) or self.source.engine in BY_ROWS:
            return True
        key = hashable(batch.state.modes)
        if key not in self._separate:
            self.source.tapes.record(point, inputs, self.function)
            tape = self.source.tapes.record(point, inputs, self.function.with_(state=batch.state))
            self._separate[key] = not self.source.plain and _separate(tape)
        return not self._separate[key]

    def _compares_samples(self, batch: MicroBatch, inputs: PyTree) -> bool:
        """True where the outputs of a sample are one for each sample of the batch, as similarities; seen once."""
        n = len(batch.ids)
        if batch.cotangents is None or n == 1 or batch.cotangents.shape[1] % n:
            return False
        key = n, batch.cotangents.shape[1]
        if key not in self._comparing:
            ran = result_or_error(
                lambda: check_sample_wise(self.function, self.trajectory.initial, inputs), (Exception,)
            )
            self._comparing[key] = isinstance(ran, ComparedSamples)
        return self._comparing[key]

    def kernel(
        self,
        step: Step,
        stage: StageGradients,
        directions: Tensor,
        passes: Passes = WHOLE,
        done: Collection[int] = (),
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Columns (B,), slopes λ (B, C) and kernel values k = −⟨u, ∇z⟩ (Q, B, C) of each micro-batch of a step.

        By directional derivatives of the whole batch, run as it was; ``directions`` are u, (Q, P), with the factor of
        the stage. Those whose first sample has one of the places in ``done`` are left out.
        """
        objective = self.trajectory.objective
        begin = 0
        for batch in stage.batches:
            owners = stage.owners.part(slice(begin, begin + len(batch.ids)))
            begin += len(batch.ids)
            if begin - len(batch.ids) in done:
                continue
            function = self.replayed(step, batch)
            inputs, targets = samples_of(batch, self.trajectory.data)
            if not passes.cut(len(batch.ids)) or self.inseparable(batch, stage.point, inputs):
                slopes = cotangents_of(batch, function, stage.point, objective, inputs, targets)
                width = passes.width if passes.directions and not self.low(batch) else 0  # 0: it was not planned
                products = products_together(function, stage.point, inputs, directions, width, batch.ids)
                yield owners.spread(slopes.double().cpu(), -products.cpu())
                continue
            slopes = self._cotangents(batch, function, stage.point, inputs, targets, passes)
            parts = (take(inputs, piece) for piece in blocks(len(batch.ids), passes.samples))
            found = [batch_products(function, stage.point, part, directions) for part in parts]
            yield owners.spread(slopes.double().cpu(), -torch.cat(found, dim=1).cpu())


def _same_together(function: ModelFunction, parameters: Parameters, samples: Sequence[PyTree]) -> bool:
    """True where the outputs for all samples together are those for each part of them."""
    together = pytree.tree_map(lambda *leaves: torch.cat(leaves), *samples)

    def outputs(inputs: PyTree) -> Tensor:
        with function.evaluating(gradients=False):
            return function.batch(parameters, inputs)

    each = result_or_error(lambda: torch.cat([outputs(own) for own in samples]), (Exception,))
    whole = result_or_error(lambda: outputs(together), (Exception,))
    if not (isinstance(each, Tensor) and isinstance(whole, Tensor)) or each.shape != whole.shape:
        return False
    limit = 64 * torch.finfo(whole.dtype).eps * whole.abs().max().clamp_min(torch.finfo(whole.dtype).tiny)
    return bool(((each - whole).abs() <= limit).all())


def _separate(tape: Tape) -> bool:
    """True where the outputs of the first sample depend on the first sample alone, in every layer."""
    first = torch.zeros_like(tape.outputs)
    first[0] = 1.0
    # A call that draws random numbers cannot be differentiated by itself, where it is given a function of parameters.
    pieces = result_or_error(lambda: tape.pieces((tape.outputs * first).sum(dim=1, keepdim=True)), FAILURES)
    if isinstance(pieces, BaseException):
        return False
    found = FactoredGradients(tape.function.layout, tape.n, tuple(pieces))
    return not any(found.columns(where, torch.float64)[1:].any() for where in found.layout.slices.values())
