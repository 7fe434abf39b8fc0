"""The gradient of a recorded batch, sample by sample, and how it compares with the one on record."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import TrajectoryError
from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.forward_state import hashable, takes_tensor_floats
from pathkernel.gradients.gradient_source import GradientSource
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.trajectory.columns import Columns
from pathkernel.trajectory.coupled_samples import CoupledSamples
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
from pathkernel.trajectory.joined_batches import runs_of
from pathkernel.trajectory.recomputed_batches import RecomputedBatches
from pathkernel.trajectory.split_certificate import EngineReplaced as EngineReplaced
from pathkernel.trajectory.split_certificate import SplitCertificate
from pathkernel.trajectory.stacked_batches import run_together
from pathkernel.trajectory.stage_gradients import ROUNDING, WHOLE, ComparedGradient, Passes, StageGradients, Streamed
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.joint import OPTIMIZER
from pathkernel.update_rules.rule import UpdateRule


def _is_round_the_samples(step: Step) -> bool:
    """True where some samples came under a name alone: what they do not explain is booked under it, whatever it is."""
    named = [batch for batch in step.batches if batch.channel in step.differentiated]
    unnamed = [batch for batch in step.batches if batch.channel not in step.differentiated]
    return not all(
        any(one.source == other.source and torch.equal(one.ids, other.ids) for other in unnamed) for one in named
    )


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
    batches
        The batches, run again as they ran.
    most
        Samples in the largest step.
    keeps_memory
        Whether any gradient of the run went into the optimizer's memory.
    columns
        Columns of the shares.
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
        self.trajectory = trajectory
        self.batches = RecomputedBatches(trajectory, function, memory, engine)
        self.most = 0
        self.keeps_memory = False
        self.columns = Columns(len(trajectory.data))
        self.examples: dict[Any, tuple[int, int, int]] = {}
        self._largest_gradient = largest_gradient
        self._normed = 0  # steps whose gradients are in it
        self._every_captured = True
        self.discrepancies = self._discrepancies(taken)

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
        for batch in step.batches:
            self.columns.meet(batch)
            self._every_captured &= batch.captured
        place = 0
        for run in runs_of(step.batches):
            state, size = run[0].state, sum(len(batch.ids) for batch in run)
            kind = hashable(state.modes), bool(state.generators), state.autocast
            if size > self.examples.get(kind, (0,))[0]:
                self.examples[kind] = size, step.index, place
            place += len(run)

    @property
    def rounded_to(self) -> frozenset[torch.dtype]:
        """Floating types of few bits that passes rounded to; empty where some have no slopes on record."""
        return self.batches.met_low if self._every_captured else frozenset()

    def _is_rounding(self, difference: float, tolerance: float) -> bool:
        """True where a difference is rounding beside the largest gradient of the run.

        Few comparisons ask, and the first steps often answer, where gradients are large. Reading a step may mean to
        train it again: they are read until one of them is large enough, and none of them twice.
        """
        while not difference <= tolerance * self._largest_gradient:
            if self._normed == len(self.trajectory):
                return False
            step = self.trajectory.store.read(self._normed)
            self._largest_gradient = max(self._largest_gradient, step.gradient.norm().item())
            self._normed += 1
        return True

    def prepare(self, steps: Sequence[Step], passes: Passes) -> None:
        """Run the batches of consecutive steps together, where they ran alike; `stages` then finds their gradients."""
        rule = self.trajectory.rule
        if rule.stages == 1 and type(rule).stage_offsets is UpdateRule.stage_offsets:
            run_together(self.batches, steps, passes)

    def stages(self, step: Step, rows: bool, passes: Passes = WHOLE) -> list[StageGradients]:
        """Contributions of the samples to each gradient of a step, one by one (``rows``) or in total only."""
        trajectory, stages = self.trajectory, []
        for index, offset in enumerate(self._offsets(step)):
            point = step.before if offset is None else step.before.double() + offset
            own = replace(step, batches=tuple(batch.at_stage(index) for batch in step.batches)) if index else step
            ran = self.batches.joined(own)
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
        parts: Iterable[FactoredGradients | CoupledSamples] = ()
        totals: Iterator[Tensor]  # one after the other: each is a vector of P numbers, and passes may be many
        if rows and not passes.streamed:
            parts = tuple(self.batches.by_sample(step, point, passes))
            totals = (part.total() for part in parts)
        else:
            parts = Streamed(lambda: self.batches.by_sample(step, point, passes)) if rows else ()
            totals = (self.batches.in_total(step, batch, point, passes) for batch in step.batches)
        total = functools.reduce(operator.add, totals)
        self.batches.silence(step, total)
        if not compare:
            named |= regularizers
            channels = {name: g.double() for name, g in named.items()}
            return StageGradients(total, parts, channels, 1.0, point, step.batches, self.columns.owners(step.batches))

        round_outputs = self._round_outputs(step, point, passes)
        expected = functools.reduce(operator.add, round_outputs.values(), total)
        compared = self._compared(step, point, expected, regularizers)
        fit = compared.fit
        if fit is None:
            if rows and not self.coupled:
                # Perhaps samples are coupled by a layer that is not known to couple them.
                raise self.batches.check.replaced()
            raise self._unexplained(step, compared)
        scale = fit.factor if fit.regularizers is None else fit.regularizers
        self.certificate.compared(fit.checked and not _is_round_the_samples(step))
        channels = {**named, **{name: scale * g.double() for name, g in regularizers.items()}}
        channels |= {name: change * fit.factor for name, change in round_outputs.items()}
        channels[ROUNDING] = fit.difference
        owners = self.columns.owners(step.batches)
        return StageGradients(total, parts, channels, fit.factor, point, step.batches, owners)

    def _round_outputs(self, step: Step, point: Tensor, passes: Passes) -> dict[str, Tensor]:
        """Parts of named backward passes that did not come through the outputs of samples, by name, (P,) each."""
        found = {}
        for name in sorted(step.differentiated & step.gradient_changes.keys()):
            found[name] = step.gradient_changes[name].double()
            for batch in step.batches:
                if batch.channel == name:
                    through = self.batches.in_total(step, batch, point, passes)
                    self.batches.silence(step, through)
                    found[name] = found[name] - through
        return found

    def compared(self, step: Step) -> ComparedGradient:
        """The gradient of a step that was taken at θ_s beside that of its samples, in total only."""
        point = step.before
        # What named backward passes added holds what came through the outputs of their samples.
        apart = [batch for batch in step.batches if batch.channel not in step.differentiated]
        totals = (self.batches.in_total(step, batch, point, WHOLE) for batch in apart)
        total = functools.reduce(operator.add, totals, torch.zeros_like(point, dtype=torch.float64))
        named = (step.gradient_changes[name] for name in step.differentiated & step.gradient_changes.keys())
        total = functools.reduce(operator.add, named, total)
        self.batches.silence(step, total)
        return self._compared(step, point, total, self.trajectory.objective.regularizer_gradients(self.function, point))

    def _compared(
        self, step: Step, point: Tensor, total: Tensor, regularizers: Mapping[str, Tensor]
    ) -> ComparedGradient:
        """The recorded gradient beside what the samples, and named backward passes, add up to."""
        edits = (c.double() for name, c in step.gradient_changes.items() if name not in step.differentiated)
        recorded = functools.reduce(operator.sub, edits, step.gradient.double())
        rest = functools.reduce(operator.add, (g.double() for g in regularizers.values())) if regularizers else None
        if rest is not None:
            self.batches.silence(step, rest)
        expected, layout = total if rest is None else total + rest, self.trajectory.layout
        if all(batch.cotangents is not None for batch in step.batches):
            tolerance = max(CAPTURED_TOLERANCE[dtype] for dtype in self._types(step))
            norms = lambda: self.batches.summed_norms(step, point)  # noqa: E731
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
        rounding = self._is_rounding(found.relative * recorded.norm().item(), tolerance * 1e-2)
        return ComparedGradient(recorded, expected, tolerance, found if rounding else None)

    def _fit_of_each_optimizer(
        self, step: Step, point: Tensor, recorded: Tensor, total: Tensor, rest: Tensor | None, tolerance: float
    ) -> Fit | None:
        """The fit where a loop clipped the gradients of several optimizers one by one."""
        settings = {name: step.hyperparameters_of(name) for name in self.trajectory.layout.names if name in step.active}
        holders = {name: own[OPTIMIZER] for name, own in settings.items() if OPTIMIZER in own}
        norms = lambda names: self.batches.summed_norms(replace(step, active=frozenset(names)), point)  # noqa: E731
        return fit_each(self.trajectory.layout, holders, recorded, total, rest, tolerance, norms)

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

    @property
    def function(self) -> ModelFunction:
        """The network in the floating type of the arithmetic."""
        return self.batches.function

    @property
    def source(self) -> GradientSource:
        """Source of the gradients of batches in that type."""
        return self.batches.source

    def replayed(self, step: Step, batch: MicroBatch) -> ModelFunction:
        """The network as a micro-batch ran it."""
        return self.batches.replayed(step, batch)

    @property
    def certificate(self) -> SplitCertificate:
        """How well rows belong to their samples, as far as that was measured."""
        return self.batches.check.certificate

    @property
    def coupled(self) -> bool:
        """True where rows are formed by reverse sweeps of whole batches, wherever samples come from."""
        return self.batches.check.coupled

    def _types(self, step: Step) -> set[torch.dtype]:
        """Floating types in which the gradients of a step have been rounded."""
        precision = self.trajectory.precision
        types = {precision, self.function.dtype}
        if self.function.device.type == "cuda" and takes_tensor_floats(self.trajectory.model, precision):
            types.add(torch.float16)  # which has as many bits
        return types.union(*(self.batches.low(batch) for batch in step.batches))
