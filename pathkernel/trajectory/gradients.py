"""The gradient of a recorded batch, sample by sample, and how it compares with the one on record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pathkernel._typing import Float, PyTree
from pathkernel.errors import TrajectoryError
from pathkernel.functional import ModelFunction, Modes, sample_gradients
from pathkernel.losses import batch_gradient, batch_products, coupled_rows, output_cotangents
from pathkernel.parameters import ParameterLayout
from pathkernel.pytrees import as_tensors, blocks, take
from pathkernel.trajectory.samples import Samples
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.trajectory import Trajectory

GRADIENT_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative difference between a recorded gradient and its recomputation that is still rounding.

Near interpolation the residuals p − y of a softmax cancel: in float32 a correct recomputation is then off by up to a
percent, while a single wrong sample in a batch of 64 moves the gradient by far more.
"""


def samples_of(batch: MicroBatch, data: Samples) -> tuple[PyTree, PyTree]:
    """Inputs and targets as the network saw them."""
    inputs, targets = (batch.inputs, batch.targets)
    if inputs is None or targets is None:
        stored_inputs, stored_targets = data[batch.ids]
        inputs = stored_inputs if inputs is None else inputs
        targets = stored_targets if targets is None else targets
    return as_tensors(inputs, data.dtype), as_tensors(targets, data.dtype)


def sample_rows(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    cotangents: Float[Tensor, "B C"],
    memory: int,
) -> Float[Tensor, "B P"]:
    """Rows c_i g_i = J_iᵀ λ_i of a batch, (B, P), in pieces that fit a memory budget in bytes."""
    row_bytes = 4 * function.layout.size * torch.finfo(function.dtype).bits // 8
    pieces = []
    for piece in blocks(len(cotangents), memory // row_bytes):
        gradients = sample_gradients(
            function,
            vector,
            take(inputs, piece),
            lambda outputs, weight: outputs @ weight,
            cotangents[piece],
            scalar=True,
        )
        pieces.append(function.layout.flatten(gradients))
    return torch.cat(pieces)


def normalises_batch(module: nn.Module, modes: Modes) -> bool:
    """Whether a layer in train mode couples the samples of a batch."""
    return any(
        (modes if isinstance(modes, bool) else modes[name])
        and (isinstance(child, _BatchNorm) or getattr(child, "track_running_stats", False))
        for name, child in module.named_modules()
    )


@dataclass(frozen=True)
class Fit:
    """How a recorded gradient follows from its recomputation.

    Attributes
    ----------
    factor
        What accumulation, clipping and loss scaling made of it: a number, or (P,) where it differs by entry.
    relative
        ‖recorded − factor · recomputed‖ / ‖recorded‖.
    parameters
        The same by parameter name, relative to the whole ‖recorded‖.
    """

    factor: float | Tensor
    relative: float
    parameters: Mapping[str, float]

    @property
    def worst(self) -> str:
        """The parameter that fits worst."""
        return max(self.parameters, key=lambda name: self.parameters[name])


def _fit(layout: ParameterLayout, found: Tensor, expected: Tensor, factor: float | Tensor) -> Fit:
    difference = found - factor * expected
    norm = max(found.norm().item(), torch.finfo(torch.float64).tiny)
    by_name = {name: difference[where].norm().item() / norm for name, where in layout.slices.items()}
    return Fit(factor, difference.norm().item() / norm, by_name)


def _multiple(found: Tensor, expected: Tensor) -> float:
    """κ that minimises ‖found − κ expected‖."""
    squared = (expected @ expected).item()
    return (found @ expected).item() / squared if squared > 0 else 1.0


def fit_gradient(layout: ParameterLayout, found: Tensor, expected: Tensor, tolerance: float) -> Fit:
    """Find what was done to a gradient between the backward pass and the step.

    Tried in this order, the first that leaves no more than ``tolerance`` wins: one factor for all (clipping by norm,
    accumulation with a divided loss), one for each parameter (clipping parameter by parameter), and clipping by value
    (entries at the bound, the others untouched). Otherwise the single factor is returned with what it leaves.
    """
    found, expected = found.double(), expected.double()
    single = _fit(layout, found, expected, _multiple(found, expected))
    if single.relative <= tolerance:
        return single
    each = torch.ones_like(found)
    for where in layout.slices.values():
        each[where] = _multiple(found[where], expected[where])
    bound = found.abs().max()
    at_bound = found.abs() >= bound * (1 - 1e-6)
    inner = _multiple(found[~at_bound], expected[~at_bound]) if not at_bound.all() else 1.0
    safe = torch.where(expected == 0, torch.ones_like(expected), expected)
    clipped = torch.where(at_bound, found / safe, torch.full_like(found, inner))
    # A clipped entry was at least as large before, and had the same sign.
    plausible = bool((clipped[at_bound] > 0).all() and (clipped[at_bound] <= inner * (1 + 1e-3)).all())
    # Clipping turns no sign and wipes nothing out.
    for factor, fits in ((each, bool((each > 0).all())), (clipped, plausible)):
        candidate = _fit(layout, found, expected, factor)
        if fits and candidate.relative <= tolerance:
            return candidate
    return single


class RecordedGradients:
    """Gradients of recorded batches, recomputed, and compared with what the optimizer received.

    Parameters
    ----------
    trajectory, function
        The record, and the network in the floating type of the arithmetic.
    memory
        Bytes for rows of per-sample gradients.
    """

    def __init__(self, trajectory: Trajectory, function: ModelFunction, memory: int) -> None:
        self.trajectory, self.function, self.memory = trajectory, function, memory
        self.recorded = trajectory.function()
        self.largest = max(step.gradient.norm().item() for step in trajectory.steps())
        self._coupled = False

    def stages(self, step: Step, rows: bool) -> list[StageGradients]:
        """What the samples contributed to each gradient of a step, by row or in total."""
        trajectory, stages = self.trajectory, []
        for index, offset in enumerate(self._offsets(step)):
            point = step.before if offset is None else step.before.double() + offset
            ran = replace(step, batches=tuple(batch.at_stage(index) for batch in step.batches))
            stages.append(self._stage(ran, point, rows, compare=trajectory.rule.stages == 1))
        return stages

    def _offsets(self, step: Step) -> list[Tensor | None]:
        """Where the gradients of a step were taken, relative to θ_s, (P,) or None for θ_s itself."""
        layout, rule = self.trajectory.layout, self.trajectory.rule
        offsets: list[Tensor | None] = [None] * rule.stages
        for name in step.active:
            taken = rule.stage_offsets(step.frozen[name], step.hyperparameters_of(name))
            for stage, offset in enumerate(taken):
                if offset is not None:
                    vector = offsets[stage]
                    if vector is None:
                        vector = offsets[stage] = torch.zeros(layout.size, dtype=torch.float64)
                    vector[layout.slices[name]] = offset.double().reshape(-1)
        return offsets

    def _stage(self, step: Step, point: Tensor, rows: bool, compare: bool) -> StageGradients:
        trajectory = self.trajectory
        named = {**step.gradient_changes}
        regularizers = trajectory.objective.regularizer_gradients(self.function, point)
        ids = torch.cat([batch.ids for batch in step.batches])
        pieces = [self._batch(step, batch, point, rows) for batch in step.batches]
        gradients = torch.cat(pieces).double() if rows else torch.stack(pieces).sum(dim=0).double()
        self._silence(step, gradients)
        total = gradients.sum(dim=0) if rows else gradients
        if not compare:
            named |= regularizers
            channels = {name: g.double() for name, g in named.items()}
            return StageGradients(ids, gradients, channels, 1.0, point, step.batches)

        recorded = step.gradient.double() - sum((change.double() for change in named.values()), torch.zeros(()))
        explained = total + sum((g.double() for g in regularizers.values()), torch.zeros(()))
        self._silence(step, explained)
        tolerance = self._tolerance(step)
        fit = fit_gradient(trajectory.layout, recorded, explained, tolerance)
        # Gradients far below the largest of the run are differences of nearly equal numbers: judged by its scale.
        if fit.relative > tolerance and fit.relative * recorded.norm().item() > tolerance * 1e-2 * self.largest:
            if rows and not self._coupled:
                self._coupled = True  # perhaps samples are coupled by a layer that is not known to couple them
                return self._stage(step, point, rows, compare)
            raise TrajectoryError(
                f"At step {step.index} the samples on record explain the gradient only up to {fit.relative:.1%}, worst "
                f"in `{fit.worst}`",
                "The recorded gradient must be the sum over the recorded samples of the recorded loss, up to a factor",
                "Check that ids, augmented inputs and loss given to the recorder are those of the loop, that random "
                "layers draw from torch's own generators, and that the training data have not changed since; "
                "`KernelRecorder(..., audit_every=1)` tells at which step it begins",
            )
        channels = {name: change.double() for name, change in named.items()}
        channels |= {name: fit.factor * g.double() for name, g in regularizers.items()}
        channels["rounding"] = recorded - fit.factor * explained
        return StageGradients(ids, gradients.mul_(fit.factor), channels, fit.factor, point, step.batches)

    def _batch(self, step: Step, batch: MicroBatch, point: Tensor, rows: bool) -> Tensor:
        """Rows (B, P) or total (P,) of a micro-batch, run as it was."""
        objective = self.trajectory.objective
        function = self._replayed(step, batch)
        inputs, targets = samples_of(batch, self.trajectory.data)
        if not rows:
            return batch_gradient(function, point, objective, inputs, targets, batch.weights)
        cotangents = output_cotangents(function, point, objective, inputs, targets, batch.weights)
        coupled = self._coupled or batch.state.generators or normalises_batch(function.module, batch.state.modes)
        if coupled:
            return coupled_rows(function, point, inputs, cotangents)
        return sample_rows(function, point, inputs, cotangents, self.memory)

    def kernel(self, step: Step, stage: StageGradients, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Ids (B,), slopes λ (B, C) and kernel values k = −⟨u, ∇z⟩ (Q, B, C) of each micro-batch of a step.

        One directional derivative of the whole batch, run as it was, for each query.
        """
        directions = weight * stage.factor
        self._silence(step, directions)
        objective = self.trajectory.objective
        for batch in stage.batches:
            function = self._replayed(step, batch)
            inputs, targets = samples_of(batch, self.trajectory.data)
            slopes = output_cotangents(function, stage.point, objective, inputs, targets, batch.weights)
            products = batch_products(function, stage.point, inputs, directions)
            yield batch.ids, slopes.double(), -products

    def _replayed(self, step: Step, batch: MicroBatch) -> ModelFunction:
        """The network as a micro-batch ran it."""
        # Mixed precision is entered again from the recorded type: other types would not be rounded alike.
        function = self.recorded if batch.state.autocast else self.function
        buffers = step.buffers if batch.state.buffers is None else batch.state.buffers
        return function.replaced(constants=buffers, state=batch.state)

    def _tolerance(self, step: Step) -> float:
        types = {self.trajectory.dtype, self.function.dtype}
        types |= {batch.state.autocast[1] for batch in step.batches if batch.state.autocast}
        return max(GRADIENT_TOLERANCE[dtype] for dtype in types)

    def _silence(self, step: Step, gradients: Tensor) -> None:
        """Set to zero what belongs to parameters without a gradient in this step, which the optimizer skipped."""
        for name, where in self.trajectory.layout.slices.items():
            if name not in step.active:
                gradients[..., where] = 0


@dataclass(frozen=True)
class StageGradients:
    """Where one gradient of a step came from.

    Attributes
    ----------
    ids
        (B,) sample ids, repeated ones included.
    samples
        c_i g_i by row, (B, P), or their total, (P,); float64.
    channels
        What came from elsewhere, (P,) each: regularisers, named changes, and what the rounding of gradients left.
    factor
        What accumulation, clipping and loss scaling made of the samples' gradient; included in ``samples``.
    point
        θ where the gradient was taken, (P,).
    batches
        The micro-batches, each with the forward pass of this stage.
    """

    ids: Tensor
    samples: Tensor
    channels: Mapping[str, Tensor]
    factor: float | Tensor
    point: Tensor
    batches: tuple[MicroBatch, ...]
