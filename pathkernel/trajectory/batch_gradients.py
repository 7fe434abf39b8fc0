"""The gradient of a recorded batch, sample by sample, and how it compares with the one on record."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import TrajectoryError
from pathkernel.gradients.factored import FactoredGradients, accumulation_dtype
from pathkernel.gradients.forward_state import Modes, takes_tensor_floats
from pathkernel.gradients.gradient_source import BY_ROWS, GradientSource, weighted_sum
from pathkernel.gradients.layers.tape import Tape
from pathkernel.gradients.losses import (
    RETURNED,
    batch_gradient,
    batch_products,
    check_slopes,
    coupled_row_blocks,
    loss_slopes,
    weighted_gradient,
)
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import ROW_LIMIT, error_of_rows, random_directions
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.gradients.returned import batch_outputs, map_outputs, output_leaves
from pathkernel.runtime.interrupts import deliver_interrupt
from pathkernel.runtime.workspace import give_back_freed_memory
from pathkernel.trajectory.cotangents import cotangents_of, scaled
from pathkernel.trajectory.discrepancies import Discrepancies
from pathkernel.trajectory.gradient_fit import (
    CAPTURED_TOLERANCE,
    GRADIENT_TOLERANCE,
    Fit,
    fit_captured,
    fit_each,
    fit_gradient,
    left_over,
)
from pathkernel.trajectory.samples import samples_of
from pathkernel.trajectory.stage_gradients import WHOLE, ComparedGradient, Passes, StageGradients, Streamed
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.joint import OPTIMIZER
from pathkernel.update_rules.rule import UpdateRule


def _is_round_the_samples(step: Step) -> bool:
    """True where some samples came under a name alone: what they do not explain is booked under it, whatever it is."""
    named = [batch.ids for batch in step.batches if batch.channel in step.differentiated]
    unnamed = [batch.ids for batch in step.batches if batch.channel not in step.differentiated]
    return not all(any(torch.equal(ids, others) for others in unnamed) for ids in named)


def normalises_batch(module: nn.Module, modes: Modes) -> bool:
    """True where a layer in train mode couples the samples of a batch."""
    return any(
        (modes if isinstance(modes, bool) else modes[name])
        and (isinstance(child, _BatchNorm) or getattr(child, "track_running_stats", False))
        for name, child in module.named_modules()
    )


DIRECTIONS = 3
"""Random directions in which the rows of a batch are compared with the batch run forward."""

AUTOCAST_LIMIT = 5e-2
"""Difference of rows under automatic mixed precision that is rounding: forward and backward passes round apart."""


NORMED = 64
"""Samples whose gradients are held at once for their norms."""


class EngineReplaced(Exception):
    """Rows of a batch were seen not to be its samples': everything is to be computed again, with other rows."""


@dataclass
class SplitCertificate:
    r"""Measure of how well the rows of a run's batches belong to their samples, measured on some of them.

    .. math:: \max_i \lvert \langle row_i, v\rangle - \lambda_i \cdot (J v)_i \rvert
              \,/\, \max_i \lvert \lambda_i \cdot (J v)_i \rvert

    Attributes
    ----------
    error
        The worst of three random directions v and of all batches measured; NaN where torch has no way to J v.
    batches
        How many were measured.
    limit
        Up to which it is rounding, in the arithmetic of the batches.
    engines
        How rows were formed: ``"layerwise"``, ``"jacobian"``, ``"autograd"``.
    steps, told
        Gradients that were compared with those of their samples, and in how many of these a wrong sample would have
        been seen: not where clipping leaves signs alone, or where all came under the name of a channel.
    """

    error: float = math.nan
    batches: int = 0
    limit: float = 0.0
    engines: set[str] = field(default_factory=set)
    steps: int = 0
    told: int = 0

    def compared(self, told: bool) -> None:
        """Add a gradient."""
        self.steps, self.told = self.steps + 1, self.told + told

    @property
    def samples_checked(self) -> float:
        """Part of the gradients in which a wrong sample would have been seen; NaN where none was compared."""
        return self.told / self.steps if self.steps else math.nan

    def note(self, error: float, limit: float) -> None:
        """Add a batch."""
        self.limit = max(self.limit, limit)
        if math.isfinite(error):
            self.error = error if math.isnan(self.error) else max(self.error, error)
            self.batches += 1


class RecordedGradients:
    """Gradients of recorded batches, recomputed, and compared with what the optimizer received.

    Parameters
    ----------
    trajectory, function
        The record, and the network in the floating type of the arithmetic.
    memory
        Bytes for rows of per-sample gradients.
    engine
        How they are taken, see `pathkernel.gradients.gradient_source.GradientSource`.
    taken
        Whether the optimizer has taken the steps, so that they can be compared with their rule.
    largest_gradient
        Norm of the largest gradient of the run so far, where the record holds a part of the run.

    Attributes
    ----------
    most
        Samples in the largest step.
    keeps_memory
        Whether any gradient of the run went into the optimizer's memory.
    examples
        The largest batch of each kind of forward pass: its samples, its step, and its place in it.
    discrepancies
        Where steps are not what the update rule makes of the recorded gradients.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        function: ModelFunction,
        memory: int,
        engine: str = "auto",
        *,
        taken: bool = True,
        largest_gradient: float = 0.0,
    ) -> None:
        self.trajectory, self.function, self.memory = trajectory, function, memory
        self.recorded = trajectory.function()
        self.source = GradientSource(function, engine, memory)
        # Mixed precision rounds every product; rows by torch.func round as the loop did.
        self.rounded = GradientSource(self.recorded, "jacobian", memory)
        self.most = 0
        self.keeps_memory = False
        self.examples: dict[Any, tuple[int, int, int]] = {}
        self._largest_gradient = largest_gradient
        self.discrepancies = self._discrepancies(taken)
        self.certificate = SplitCertificate()
        self._coupled = engine == "autograd"
        self._separate: dict[Any, bool] = {}
        self._measured: set[Any] = set()

    def _discrepancies(self, taken: bool) -> Discrepancies:
        """Go through the record once, and compare its steps with their rule.

        Steps that are read by training them again are compared when a sweep comes to them; here, what is known of them
        without training is enough.
        """
        store = self.trajectory.store
        if store.replays:
            keyframes = []
            for index in range(len(store)):
                summary = store.summary(index)
                self._meet(summary.record)
                if summary.state is not None:
                    keyframes.append(index)
            return Discrepancies(self.trajectory, sorted({0, *keyframes}) if taken else ())
        found = Discrepancies(self.trajectory)
        met = self._met(self.trajectory.steps())
        found.meet(met if taken else list(met)[:0])
        return found

    def _met(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Steps as they are read, each taken note of."""
        for step in steps:
            self._meet(step)
            yield step

    def _meet(self, step: Step) -> None:
        """Take note of the largest step, of the largest batch of each kind (samples, step, place in it), of memory."""
        rule = self.trajectory.rule
        if rule.memory and not self.keeps_memory:
            # A rule that mixes entries is differentiated, in its memory too, whatever its settings are.
            self.keeps_memory = not rule.elementwise or any(map(rule.keeps_memory, step.hyperparameters))
        self.most = max(self.most, sum(len(batch.ids) for batch in step.batches))
        for place, batch in enumerate(step.batches):
            state, size = batch.state, len(batch.ids)
            kind = _hashable(state.modes), bool(state.generators), state.autocast
            if size > self.examples.get(kind, (0,))[0]:
                self.examples[kind] = size, step.index, place

    @cached_property
    def largest(self) -> float:
        """The largest norm of a recorded gradient, which few comparisons depend on: all steps are read for it."""
        return max([self._largest_gradient, *(step.gradient.norm().item() for step in self.trajectory.steps())])

    def stages(self, step: Step, rows: bool, passes: Passes = WHOLE) -> list[StageGradients]:
        """Contributions of the samples to each gradient of a step, one by one (``rows``) or in total only."""
        trajectory, stages = self.trajectory, []
        for index, offset in enumerate(self._offsets(step)):
            point = step.before if offset is None else step.before.double() + offset
            ran = replace(step, batches=tuple(batch.at_stage(index) for batch in step.batches))
            stages.append(self._stage(ran, point, rows, passes, compare=trajectory.rule.stages == 1))
        return stages

    def _offsets(self, step: Step) -> list[Tensor | None]:
        """Points at which the gradients of a step were taken, relative to θ_s, (P,) or None for θ_s itself."""
        layout, rule = self.trajectory.layout, self.trajectory.rule
        offsets: list[Tensor | None] = [None] * rule.stages
        if type(rule).stage_offsets is UpdateRule.stage_offsets:
            return offsets
        for name in step.active:
            taken = rule.stage_offsets(step.frozen[name], step.hyperparameters_of(name))
            for stage, offset in enumerate(taken):
                if offset is not None:
                    vector = offsets[stage]
                    if vector is None:
                        vector = offsets[stage] = torch.zeros(layout.size, dtype=torch.float64, device=offset.device)
                    vector[layout.slices[name]] = offset.double().reshape(-1)
        return offsets

    def _stage(self, step: Step, point: Tensor, rows: bool, passes: Passes, compare: bool) -> StageGradients:
        trajectory = self.trajectory
        named = {n: change.double() for n, change in step.gradient_changes.items() if n not in step.differentiated}
        regularizers = trajectory.objective.regularizer_gradients(self.function, point)
        parts: Iterable[FactoredGradients] = ()
        totals: Iterator[Tensor]  # one after the other: each is a vector of P numbers, and passes may be many
        if rows and not passes.streamed:
            parts = tuple(self._by_sample(step, point, passes))
            totals = (part.total() for part in parts)
        else:
            parts = Streamed(lambda: self._by_sample(step, point, passes)) if rows else ()
            totals = (self._in_total(step, batch, point, passes) for batch in step.batches)
        total = functools.reduce(operator.add, totals)
        self._silence(step, total)
        if not compare:
            named |= regularizers
            channels = {name: g.double() for name, g in named.items()}
            return StageGradients(total, parts, channels, 1.0, point, step.batches)

        round_outputs = self._round_outputs(step, point, passes)
        expected = functools.reduce(operator.add, round_outputs.values(), total)
        compared = self._compared(step, point, expected, regularizers)
        fit = compared.fit
        if fit is None:
            if rows and not self._coupled:
                raise self._replaced()  # perhaps samples are coupled by a layer that is not known to couple them
            raise self._unexplained(step, compared)
        scale = fit.factor if fit.regularizers is None else fit.regularizers
        self.certificate.compared(fit.checked and not _is_round_the_samples(step))
        channels = {**named, **{name: scale * g.double() for name, g in regularizers.items()}}
        channels |= {name: change * fit.factor for name, change in round_outputs.items()}
        channels["rounding"] = fit.difference
        return StageGradients(total * fit.factor, parts, channels, fit.factor, point, step.batches)

    def _round_outputs(self, step: Step, point: Tensor, passes: Passes) -> dict[str, Tensor]:
        """Parts of named backward passes that did not come through the outputs of samples, by name, (P,) each."""
        found = {}
        for name in sorted(step.differentiated & step.gradient_changes.keys()):
            found[name] = step.gradient_changes[name].double()
            for batch in step.batches:
                if batch.channel == name:
                    through = self._in_total(step, batch, point, passes)
                    self._silence(step, through)
                    found[name] = found[name] - through
        return found

    def compared(self, step: Step) -> ComparedGradient:
        """The gradient of a step that was taken at θ_s beside that of its samples, in total only."""
        point = step.before
        # What named backward passes added holds what came through the outputs of their samples.
        apart = [batch for batch in step.batches if batch.channel not in step.differentiated]
        totals = (self._in_total(step, batch, point, WHOLE) for batch in apart)
        total = functools.reduce(operator.add, totals, torch.zeros_like(point, dtype=torch.float64))
        named = (step.gradient_changes[name] for name in step.differentiated & step.gradient_changes.keys())
        total = functools.reduce(operator.add, named, total)
        self._silence(step, total)
        return self._compared(step, point, total, self.trajectory.objective.regularizer_gradients(self.function, point))

    def _compared(
        self, step: Step, point: Tensor, total: Tensor, regularizers: Mapping[str, Tensor]
    ) -> ComparedGradient:
        """The recorded gradient beside what the samples, and named backward passes, add up to."""
        edits = (c.double() for name, c in step.gradient_changes.items() if name not in step.differentiated)
        recorded = functools.reduce(operator.sub, edits, step.gradient.double())
        rest = functools.reduce(operator.add, (g.double() for g in regularizers.values())) if regularizers else None
        if rest is not None:
            self._silence(step, rest)
        expected, layout = total if rest is None else total + rest, self.trajectory.layout
        if all(batch.cotangents is not None for batch in step.batches):
            tolerance = max(CAPTURED_TOLERANCE[dtype] for dtype in self._types(step))
            norms = lambda: self._summed_norms(step, point)  # noqa: E731
            fit = fit_captured(layout, recorded, total, rest, tolerance, norms)
            if fit is None:
                fit = self._fit_of_each_optimizer(step, point, recorded, total, rest, tolerance)
            return ComparedGradient(recorded, expected, tolerance, fit)
        # The loss was evaluated again: near interpolation its slopes cancel.
        tolerance = max(GRADIENT_TOLERANCE[dtype] for dtype in self._types(step))
        found = fit_gradient(layout, recorded, expected, tolerance)
        if found.relative <= tolerance:
            return ComparedGradient(recorded, expected, tolerance, found)
        # Gradients far below the largest of the run are differences of nearly equal numbers: judged by its scale.
        rounding = found.relative * recorded.norm().item() <= tolerance * 1e-2 * self.largest
        return ComparedGradient(recorded, expected, tolerance, found if rounding else None)

    def _fit_of_each_optimizer(
        self, step: Step, point: Tensor, recorded: Tensor, total: Tensor, rest: Tensor | None, tolerance: float
    ) -> Fit | None:
        """The fit where a loop clipped the gradients of several optimizers one by one."""
        settings = {name: step.hyperparameters_of(name) for name in self.trajectory.layout.names if name in step.active}
        holders = {name: own[OPTIMIZER] for name, own in settings.items() if OPTIMIZER in own}
        norms = lambda names: self._summed_norms(replace(step, active=frozenset(names)), point)  # noqa: E731
        return fit_each(self.trajectory.layout, holders, recorded, total, rest, tolerance, norms)

    def _summed_norms(self, step: Step, point: Tensor) -> float:
        """Σ_i ‖J_iᵀ λ_i‖ of a step, by one reverse sweep for each sample."""
        summed = 0.0
        for batch in step.batches:
            function = self.replayed(step, batch)
            inputs, targets = samples_of(batch, self.trajectory.data)
            cotangents = cotangents_of(batch, function, point, self.trajectory.objective, inputs, targets)
            for rows in coupled_row_blocks(function, point, inputs, cotangents, NORMED):
                self._silence(step, rows)
                summed += rows.norm(dim=1).sum().item()
        return summed

    def _unexplained(self, step: Step, compared: ComparedGradient) -> TrajectoryError:
        fit = left_over(self.trajectory.layout, compared.recorded, compared.expected)
        return TrajectoryError(
            f"At step {step.index} the samples on record explain the gradient only up to {fit.relative:.2g} of its "
            f"norm, worst in `{fit.worst}`",
            "The recorded gradient must be the sum over the recorded samples of their part of the loss, clipped or "
            "scaled down as a whole",
            "Check that ids and augmented inputs given to the recorder are those of the loop, that random layers draw "
            "from torch's own generators, and that the training data have not changed since; "
            "`KernelRecorder(..., audit_every=1)` tells at which step it begins",
        )

    def _in_total(self, step: Step, batch: MicroBatch, point: Tensor, passes: Passes) -> Tensor:
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

    def _by_sample(self, step: Step, point: Tensor, passes: Passes) -> Iterator[FactoredGradients]:
        """The gradients of the samples of each micro-batch, run as it was: (B,), or a pass at a time."""
        for batch in step.batches:
            function = self.replayed(step, batch)
            inputs, targets = samples_of(batch, self.trajectory.data)
            measured = self._is_measured(step, batch, inputs)
            found: list[Tensor] = []
            for rows, piece, cotangents in self._rows(batch, function, point, inputs, targets, passes):
                if measured and piece is not None:
                    v = random_directions(function.layout.size, DIRECTIONS)
                    self._measure(function, batch, point, take(inputs, piece), cotangents[piece], rows @ v.T)
                elif measured:  # a part of the rows of a whole batch
                    found.append(rows @ random_directions(function.layout.size, DIRECTIONS).T)
                    if sum(len(part) for part in found) == len(cotangents):
                        self._measure(function, batch, point, inputs, cotangents, torch.cat(found))
                yield rows
                give_back_freed_memory()

    def _rows(
        self, batch: MicroBatch, function: ModelFunction, point: Tensor, inputs: PyTree, targets: PyTree, passes: Passes
    ) -> Iterator[tuple[FactoredGradients, slice | None, Tensor]]:
        """Gradients, the samples that they are of (None for the next of a batch run together), and λ (B, C) of all."""
        objective, n = self.trajectory.objective, len(batch.ids)
        source = self.source_of(batch)
        if self.together(batch, point, inputs):
            self.certificate.engines.add("autograd")
            cotangents = cotangents_of(batch, function, point, objective, inputs, targets)
            for rows in coupled_row_blocks(function, point, inputs, cotangents, min(n, passes.samples)):
                rows = rows.to(accumulation_dtype(function.dtype))
                yield FactoredGradients.dense(rows, function.layout), None, cotangents
        elif not passes.cut(n) or self.inseparable(batch, point, inputs):
            slopes: list[Tensor] = []

            def of_outputs(outputs: PyTree) -> Tensor:
                slopes.append(self._slopes(batch, function, point, outputs, inputs, targets))
                return slopes[-1]

            found = source.pulled_back(point, inputs, of_outputs, function)
            self.certificate.engines |= source.engines
            yield found, slice(0, n), slopes[-1]
        else:
            cotangents = self._cotangents(batch, function, point, inputs, targets, passes)
            for piece in blocks(n, passes.samples):
                own = take(inputs, piece)
                found = source.gradients(point, own, weighted_sum, cotangents[piece], None, function).as_rows()
                self.certificate.engines |= source.engines
                yield found, piece, cotangents

    def _is_measured(self, step: Step, batch: MicroBatch, inputs: PyTree) -> bool:
        """True where the rows of a batch are compared with the batch run forward.

        At steps 0, 16, 256, … and the last, and wherever samples of another shape or number, or another mode, come
        first; once for each batch, however often the record is passed.
        """
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        kind = _hashable(batch.state.modes), self._coupled, *((leaf.shape, leaf.dtype) for leaf in leaves)
        power = step.index > 1 and step.index & (step.index - 1) == 0 and step.index.bit_length() % 4 == 1
        due = step.index == 0 or power or step.index == len(self.trajectory) - 1 or kind not in self._measured
        if not due or (key := (step.index, tuple(batch.ids.tolist()))) in self._measured:
            return False
        self._measured |= {key, kind}
        return True

    def _measure(
        self,
        function: ModelFunction,
        batch: MicroBatch,
        point: Tensor,
        inputs: PyTree,
        cotangents: Tensor,
        found: Tensor,
    ) -> None:
        """Compare ⟨row, v⟩, (n, D), with the same samples run forward.

        Raises
        ------
        EngineReplaced
            When rows are not their samples'; they come from reverse sweeps of whole batches then.
        """
        v = random_directions(function.layout.size, DIRECTIONS)
        error = error_of_rows(function, point, inputs, v, found.unsqueeze(1), cotangents.unsqueeze(1))
        exact = ROW_LIMIT[torch.promote_types(function.dtype, torch.float32)]
        limit = exact if batch.state.autocast is None else AUTOCAST_LIMIT
        if error > limit and not self._coupled:
            raise self._replaced()
        self.certificate.note(error, limit)

    @property
    def coupled(self) -> bool:
        """True where rows are formed by reverse sweeps of whole batches, wherever samples come from."""
        return self._coupled

    def _replaced(self) -> EngineReplaced:
        """Form rows by reverse sweeps of whole batches from now on, which are right for every network."""
        self._coupled, self.certificate, self._measured = True, SplitCertificate(), set()
        return EngineReplaced()

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
                deliver_interrupt()
                give_back_freed_memory()
        parts = [iter(output_leaves(one)) for one in returned]

        def joined(_: Any) -> Any:
            pieces = [next(part) for part in parts]
            return torch.cat(pieces) if isinstance(pieces[0], Tensor) else pieces[0]

        return self._slopes(batch, function, point, map_outputs(joined, returned[0]), inputs, targets)

    def source_of(self, batch: MicroBatch) -> GradientSource:
        """Source of the gradients of a batch."""
        return self.rounded if batch.state.autocast else self.source

    def inseparable(self, batch: MicroBatch, point: Tensor, inputs: PyTree) -> bool:
        """True where a batch cannot be run a few samples at a time: samples are coupled, or the pass is random."""
        return bool(batch.state.generators) or self.together(batch, point, inputs)

    def together(self, batch: MicroBatch, point: Tensor, inputs: PyTree) -> bool:
        """True where the samples of a batch have to be run together, one reverse sweep for each."""
        if self._coupled or normalises_batch(self.function.module, batch.state.modes):
            return True
        if not batch.state.generators:
            return False
        # What is random in training is proved as it is in evaluation, where each sample can be run by itself. That its
        # training mode couples no samples is seen once.
        if batch.state.autocast or self.source.engine in BY_ROWS:
            return True
        key = _hashable(batch.state.modes)
        if key not in self._separate:
            self.source.tapes.record(point, inputs, self.function)
            tape = self.source.tapes.record(point, inputs, self.function.with_(state=batch.state))
            self._separate[key] = not self.source.plain and _separate(tape)
        return not self._separate[key]

    def kernel(
        self, step: Step, stage: StageGradients, weight: Tensor, passes: Passes = WHOLE
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Ids (B,), slopes λ (B, C) and kernel values k = −⟨u, ∇z⟩ (Q, B, C) of each micro-batch of a step.

        One directional derivative of the whole batch, run as it was, for each query.
        """
        directions = weight * stage.factor
        self._silence(step, directions)
        objective = self.trajectory.objective
        for batch in stage.batches:
            function = self.replayed(step, batch)
            inputs, targets = samples_of(batch, self.trajectory.data)
            if not passes.cut(len(batch.ids)) or self.inseparable(batch, stage.point, inputs):
                slopes = cotangents_of(batch, function, stage.point, objective, inputs, targets)
                products = batch_products(function, stage.point, inputs, directions)
                yield batch.ids.cpu(), slopes.double().cpu(), -products.cpu()
                continue
            slopes = self._cotangents(batch, function, stage.point, inputs, targets, passes)
            found = [
                batch_products(function, stage.point, take(inputs, piece), directions)
                for piece in blocks(len(batch.ids), passes.samples)
            ]
            yield batch.ids.cpu(), slopes.double().cpu(), -torch.cat(found, dim=1).cpu()

    def replayed(self, step: Step, batch: MicroBatch) -> ModelFunction:
        """The network as a micro-batch ran it."""
        # Mixed precision is entered again from the recorded type: other types would not be rounded alike.
        function = self.recorded if batch.state.autocast else self.function
        buffers = step.buffers if batch.state.buffers is None else batch.state.buffers
        return function.with_(constants=buffers, state=batch.state)

    def _types(self, step: Step) -> set[torch.dtype]:
        """Floating types in which the gradients of a step have been rounded."""
        types = {self.trajectory.precision, self.function.dtype}
        if takes_tensor_floats(self.trajectory.model, self.trajectory.precision):
            types.add(torch.float16)  # which has as many bits
        return types | {batch.state.autocast[1] for batch in step.batches if batch.state.autocast}

    def _silence(self, step: Step, gradients: Tensor) -> None:
        """Set to zero what belongs to parameters without a gradient in this step, which the optimizer skipped."""
        for name, where in self.trajectory.layout.slices.items():
            if name not in step.active:
                gradients[..., where] = 0


def _hashable(modes: Modes) -> Any:
    return modes if isinstance(modes, bool) else tuple(modes.items())


def _separate(tape: Tape) -> bool:
    """True where the outputs of the first sample depend on the first sample alone, in every layer."""
    first = torch.zeros_like(tape.outputs)
    first[0] = 1.0
    pieces = tape.pieces((tape.outputs * first).sum(dim=1, keepdim=True))
    found = FactoredGradients(tape.function.layout, tape.n, tuple(pieces))
    return not any(found.columns(where, torch.float64)[1:].any() for where in found.layout.slices.values())
