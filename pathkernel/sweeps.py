r"""The two ways through a trajectory that a kernel machine needs.

Backward, for shares: one P-vector per query and memory slot is pulled through the adjoint of every step,

.. math:: \mathrm{share}_i = \sum_{r : i \in B_r} c_{r,i} \langle u_r, g_{r,i}\rangle,\qquad
          u_r = \sum_{s \ge r} A_{s,r}^\top q_s .

Forward, for predictions: since shares are linear in the samples' gradients, their sum needs only the displacement that
all samples together caused in each step, and one directional derivative along it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathkernel.errors import TrajectoryError
from pathkernel.functional import ModelFunction
from pathkernel.losses import batch_gradient, output_cotangents
from pathkernel.quadrature import Quadrature
from pathkernel.queries import ProductStep, Queries, RowStep
from pathkernel.trajectory.gradients import GRADIENT_TOLERANCE, mismatch, sample_rows, samples_of
from pathkernel.trajectory.step import Segment, Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import Memory, adjoint


@dataclass
class Account:
    """What a sweep adds up, for Q queries.

    Attributes
    ----------
    channels
        (Q,) by name; the forward sweep puts the sum over samples under ``"samples"``.
    missed
        What the quadrature missed, in absolute value and summed over the steps, (Q,).
    evaluations
        Query gradients taken per query, over all segments.
    shares
        (Q, N), backward only.
    modules, steps
        (Q, N) by module name and (Q, S), where asked.
    """

    channels: dict[str, Tensor]
    missed: Tensor
    evaluations: float = 0.0
    shares: Tensor | None = None
    modules: dict[str, Tensor] = field(default_factory=dict)
    steps: Tensor | None = None


class RecordedGradients:
    """Gradients of recorded batches, recomputed, and compared with what the optimizer received.

    Parameters
    ----------
    trajectory, function
        The record and the network.
    memory
        Bytes for rows of per-sample gradients.
    """

    def __init__(self, trajectory: Trajectory, function: ModelFunction, memory: int) -> None:
        self.trajectory, self.function, self.memory = trajectory, function, memory
        self.tolerance = max(GRADIENT_TOLERANCE[trajectory.dtype], GRADIENT_TOLERANCE[function.dtype])
        self.largest = max(step.gradient.norm().item() for step in trajectory.steps())

    def rows(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B,), rows c_i g_i (B, P) float64, and what no sample explains of the recorded gradient (P,)."""
        trajectory, pieces = self.trajectory, []
        for batch in step.batches:
            inputs, targets = samples_of(batch, trajectory.data)
            arguments = (trajectory.loss, inputs, targets, batch.weights, trajectory.reduction)
            cotangents = output_cotangents(self.function, step.before, *arguments)
            pieces.append(sample_rows(self.function, step.before, inputs, cotangents, self.memory).double())
        rows = torch.cat(pieces)
        self._silence(step, rows)
        scale, unexplained = self._compare(step, rows.sum(dim=0))
        return torch.cat([batch.ids for batch in step.batches]), rows.mul_(scale), unexplained

    def total(self, step: Step) -> tuple[Tensor, Tensor]:
        """Σ c_i g_i, (P,) float64, and what no sample explains of the recorded gradient, (P,)."""
        trajectory = self.trajectory
        total = torch.zeros(trajectory.layout.size, dtype=torch.float64)
        for batch in step.batches:
            inputs, targets = samples_of(batch, trajectory.data)
            arguments = (trajectory.loss, inputs, targets, batch.weights, trajectory.reduction)
            total += batch_gradient(self.function, step.before, *arguments).double()
        self._silence(step, total)
        scale, unexplained = self._compare(step, total)
        return scale * total, unexplained

    def _silence(self, step: Step, gradients: Tensor) -> None:
        """Set to zero what belongs to parameters without a gradient in this step, which the optimizer skipped."""
        for name, where in self.trajectory.layout.slices.items():
            if name not in step.active:
                gradients[..., where] = 0

    def _compare(self, step: Step, total: Tensor) -> tuple[float, Tensor]:
        recorded = step.gradient.double()
        scale, relative, by_name = mismatch(self.trajectory.layout, recorded, total)
        # Gradients far below the largest of the run are differences of nearly equal numbers: judged by its scale.
        significant = relative * recorded.norm().item() > self.tolerance * 1e-2 * self.largest
        if relative > self.tolerance and significant:
            worst = max(by_name, key=lambda name: by_name[name])
            raise TrajectoryError(
                f"At step {step.index} the samples on record explain the gradient only up to {relative:.1%}, worst in "
                f"`{worst}`",
                "The recorded gradient must be the sum over the recorded samples of the recorded loss, up to a factor",
                "Check that ids, augmented inputs and loss given to the recorder are those of the loop, and that the "
                "training data have not changed since; `KernelRecorder(..., audit_every=1)` tells at which step it "
                "begins",
            )
        return scale, recorded - scale * total


@dataclass(frozen=True)
class Part:
    """A range of θ that one evaluation of the update rule covers: a parameter, or neighbours that step alike."""

    where: slice
    shape: torch.Size
    frozen: Mapping[str, Any]
    settings: Mapping[str, Any]


def _parts(trajectory: Trajectory, step: Step) -> list[Part]:
    """Cut θ into parts; parameters that an elementwise rule treats alike are joined, inactive ones left out."""
    layout, rule = trajectory.layout, trajectory.rule
    parts: list[Part] = []
    names: list[list[str]] = []
    for (name, where), shape in zip(layout.slices.items(), layout.shapes, strict=True):
        if name not in step.active:
            continue
        settings, frozen = step.hyperparameters_of(name), step.frozen[name]
        numbers = {key: value for key, value in frozen.items() if not isinstance(value, Tensor)}
        last = parts[-1] if parts else None
        alike = last is not None and last.where.stop == where.start and last.settings is settings
        if rule.elementwise and alike and last is not None and last.frozen == numbers:
            parts[-1] = Part(slice(last.where.start, where.stop), torch.Size(), numbers, settings)
            names[-1].append(name)
        else:
            parts.append(Part(where, shape, numbers, settings))
            names.append([name])
    return [_with_tensors(part, step, members) for part, members in zip(parts, names, strict=True)]


def _with_tensors(part: Part, step: Step, members: list[str]) -> Part:
    """Put the frozen tensors of its members, end to end, into a part."""
    first = step.frozen[members[0]]
    tensors = {key: value for key, value in first.items() if isinstance(value, Tensor)}
    if len(members) == 1:
        return Part(part.where, part.shape, {**part.frozen, **tensors}, part.settings)
    joined = {key: torch.cat([step.frozen[name][key].reshape(-1) for name in members]).double() for key in tensors}
    size = part.where.stop - part.where.start
    return Part(part.where, torch.Size([size]), {**part.frozen, **joined}, part.settings)


def _modules(trajectory: Trajectory) -> dict[str, Tensor]:
    """Module name → which entries of θ are its own parameters, as indices."""
    ranges: dict[str, list[Tensor]] = defaultdict(list)
    for name, where in trajectory.layout.slices.items():
        ranges[name.rpartition(".")[0]].append(torch.arange(where.start, where.stop))
    return {module: torch.cat(indices) for module, indices in ranges.items()}


def backward_sweep(
    trajectory: Trajectory,
    queries: Queries,
    gradients: RecordedGradients,
    quadrature: Quadrature,
    by: str | None = None,
    progress: bool = False,
) -> Account:
    """Shares of all training samples in all queries.

    Time per step: the quadrature's query gradients, per-sample gradients of one batch, and their (Q, P) × (P, B)
    product. Memory O(Q · P · (2 + memory slots)), independent of N.
    """
    q_count, size = len(queries), trajectory.layout.size
    zeros = torch.zeros(q_count, dtype=torch.float64)
    account = Account({"initial": queries.values(trajectory.initial)}, zeros.clone())
    account.shares = torch.zeros(q_count, len(trajectory.data), dtype=torch.float64)
    modules = _modules(trajectory) if by == "module" else {}
    account.modules = {module: torch.zeros_like(account.shares) for module in modules}
    account.steps = torch.zeros(q_count, len(trajectory), dtype=torch.float64) if by == "step" else None
    channels: dict[str, Tensor] = defaultdict(zeros.clone)
    memory = [torch.zeros(q_count, size, dtype=torch.float64) for _ in trajectory.rule.memory]

    view: RowStep | None = None
    bar = tqdm(total=len(trajectory), desc="backward sweep", unit="step", disable=not progress)
    for segment in trajectory.segments(reverse=True):
        view = RowStep(queries, segment, view)
        average = quadrature.average(view)
        account.missed += average.error
        account.evaluations += average.evaluations
        step = segment.step
        if step is None:
            channels["external"] += average.gradient @ segment.displacement
            continue
        weight = _pull_back(trajectory, segment, step, average.gradient, memory, channels)
        ids, rows, unexplained = gradients.rows(step)
        contribution = weight @ rows.T
        account.shares.index_add_(1, ids, contribution)
        channels["unexplained"] += weight @ unexplained
        for module, own in modules.items():
            account.modules[module].index_add_(1, ids, weight[:, own] @ rows[:, own].T)
        if account.steps is not None:
            account.steps[:, step.index] = contribution.sum(dim=1)
        bar.update()
    bar.close()

    for name, held in trajectory.initial_memory.items():
        where = trajectory.layout.slices[name]
        for cotangent, start in zip(memory, held, strict=True):
            channels["memory"] += cotangent[:, where] @ start.double().reshape(-1)
    account.channels.update(channels)
    return account


def _pull_back(
    trajectory: Trajectory,
    segment: Segment,
    step: Step,
    average: Tensor,
    memory: list[Tensor],
    channels: dict[str, Tensor],
) -> Tensor:
    """u, the weight of this step's gradient, (Q, P); ``memory`` becomes that before the step, sources are booked."""
    rule, parts = trajectory.rule, _parts(trajectory, step)
    whole = len(parts) == 1 and parts[0].where == slice(0, average.shape[1])
    weight = average if whole else torch.zeros_like(average)
    for part in parts:
        q = average[:, part.where].reshape(-1, *part.shape)
        held = tuple(slot[:, part.where].reshape(-1, *part.shape) for slot in memory)
        u, held = adjoint(rule, part.frozen, part.settings, q, held)
        u = u.flatten(1)
        if whole:  # the common case needs no copies
            weight, memory[:] = u, [cotangent.flatten(1) for cotangent in held]
        else:
            weight[:, part.where] = u
            for slot, cotangent in zip(memory, held, strict=True):
                slot[:, part.where] = cotangent.flatten(1)
        parameter = segment.start[part.where].double().reshape(part.shape)
        for source, term in rule.gradient_sources(parameter, part.frozen, part.settings).items():
            channels[source] += u @ term.reshape(-1)
        for source, term in rule.displacement_sources(parameter, part.frozen, part.settings).items():
            channels[source] += average[:, part.where] @ term.reshape(-1)
    return weight


def forward_sweep(
    trajectory: Trajectory,
    queries: Queries,
    gradients: RecordedGradients,
    quadrature: Quadrature,
    progress: bool = False,
) -> Account:
    """What all samples together, and every channel, added to each query: a prediction without shares.

    Time per step: one batch gradient and as many directional derivatives as there are channels. Memory O(P).
    """
    size = trajectory.layout.size
    zeros = torch.zeros(len(queries), dtype=torch.float64)
    account = Account({"initial": queries.values(trajectory.initial)}, zeros.clone())
    channels: dict[str, Tensor] = defaultdict(zeros.clone)
    memory: dict[str, list[Tensor]] = defaultdict(
        lambda: [torch.zeros(size, dtype=torch.float64) for _ in trajectory.rule.memory]
    )
    for name, held in trajectory.initial_memory.items():
        for slot, start in zip(memory["memory"], held, strict=True):
            slot[trajectory.layout.slices[name]] = start.double().reshape(-1)

    view: ProductStep | None = None
    bar = tqdm(total=len(trajectory), desc="forward sweep", unit="step", disable=not progress)
    for segment in trajectory.segments():
        if segment.step is None:
            directions = {"external": segment.displacement}
        else:
            directions = _displacements(trajectory, segment, segment.step, gradients, memory)
        view = ProductStep(queries, segment, torch.stack(list(directions.values())), view)
        average = quadrature.average(view)
        account.missed += average.error
        account.evaluations += average.evaluations
        for column, name in enumerate(directions, start=1):
            channels[name] += average.gradient[:, column]
        bar.update(segment.step is not None)
    bar.close()
    account.channels.update(channels)
    return account


def _displacements(
    trajectory: Trajectory,
    segment: Segment,
    step: Step,
    gradients: RecordedGradients,
    memory: dict[str, list[Tensor]],
) -> dict[str, Tensor]:
    """Δ_s split by where it came from, (P,) each; ``memory`` becomes that after the step."""
    rule, size = trajectory.rule, trajectory.layout.size
    received: dict[str, Tensor] = defaultdict(lambda: torch.zeros(size, dtype=torch.float64))
    received["samples"], received["unexplained"] = gradients.total(step)
    moved: dict[str, Tensor] = defaultdict(lambda: torch.zeros(size, dtype=torch.float64))
    parts = _parts(trajectory, step)
    for part in parts:
        parameter = segment.start[part.where].double().reshape(part.shape)
        for source, term in rule.gradient_sources(parameter, part.frozen, part.settings).items():
            received[source][part.where] = term.reshape(-1)
        for source, term in rule.displacement_sources(parameter, part.frozen, part.settings).items():
            moved[source][part.where] += term.reshape(-1)
    for channel in dict.fromkeys((*received, *memory)):  # in the same order in every process
        for part in parts:
            held: Memory = tuple(slot[part.where].reshape(part.shape) for slot in memory[channel])
            gradient = received[channel][part.where].reshape(part.shape)
            delta, held = rule.step(gradient, held, part.frozen, part.settings)
            moved[channel][part.where] += delta.reshape(-1)
            for slot, after in zip(memory[channel], held, strict=True):
                slot[part.where] = after.reshape(-1)
    return moved
