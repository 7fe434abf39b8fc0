r"""The two ways through a trajectory that a kernel machine needs.

Backward, for shares: one P-vector per query and memory slot is pulled through the adjoint of every step,

.. math:: \mathrm{share}_i = \sum_{r : i \in B_r} c_{r,i} \langle u_r, g_{r,i}\rangle,\qquad
          u_r = \sum_{s \ge r} A_{s,r}^\top q_s .

Forward, for predictions: since shares are linear in the samples' gradients, their sum needs only the displacement that
all samples together caused in each step, and one directional derivative along it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

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
        rows = torch.cat(pieces) * self._active(step)
        scale, unexplained = self._compare(step, rows.sum(dim=0))
        return torch.cat([batch.ids for batch in step.batches]), rows * scale, unexplained

    def total(self, step: Step) -> tuple[Tensor, Tensor]:
        """Σ c_i g_i, (P,) float64, and what no sample explains of the recorded gradient, (P,)."""
        trajectory = self.trajectory
        total = torch.zeros(trajectory.layout.size, dtype=torch.float64)
        for batch in step.batches:
            inputs, targets = samples_of(batch, trajectory.data)
            arguments = (trajectory.loss, inputs, targets, batch.weights, trajectory.reduction)
            total += batch_gradient(self.function, step.before, *arguments).double()
        total *= self._active(step)
        scale, unexplained = self._compare(step, total)
        return scale * total, unexplained

    def _active(self, step: Step) -> Tensor:
        """1 for parameters that had a gradient in this step, 0 for those that the optimizer skipped."""
        mask = torch.zeros(self.trajectory.layout.size, dtype=torch.float64)
        for name, where in self.trajectory.layout.slices.items():
            mask[where] = float(name in step.active)
        return mask

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


def _parameters(trajectory: Trajectory, step: Step) -> Iterator[tuple[str, slice, torch.Size]]:
    """Name, range and shape of the parameters that a step moved."""
    layout = trajectory.layout
    for (name, where), shape in zip(layout.slices.items(), layout.shapes, strict=True):
        if name in step.active:
            yield name, where, shape


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
        for module, where in modules.items():
            account.modules[module].index_add_(1, ids, weight[:, where] @ rows[:, where].T)
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
    rule, weight = trajectory.rule, torch.zeros_like(average)
    for name, where, shape in _parameters(trajectory, step):
        frozen, settings = step.frozen[name], step.hyperparameters_of(name)
        q = average[:, where].reshape(-1, *shape)
        held = tuple(slot[:, where].reshape(-1, *shape) for slot in memory)
        u, held = adjoint(rule, frozen, settings, q, held)
        weight[:, where] = u.reshape(len(u), -1)
        for slot, cotangent in zip(memory, held, strict=True):
            slot[:, where] = cotangent.reshape(len(u), -1)
        parameter = segment.start[where].double().reshape(shape)
        for source, term in rule.gradient_sources(parameter, frozen, settings).items():
            channels[source] += weight[:, where] @ term.reshape(-1)
        for source, term in rule.displacement_sources(parameter, frozen, settings).items():
            channels[source] += average[:, where] @ term.reshape(-1)
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
    for name, where, shape in _parameters(trajectory, step):
        frozen, settings = step.frozen[name], step.hyperparameters_of(name)
        parameter = segment.start[where].double().reshape(shape)
        for source, term in rule.gradient_sources(parameter, frozen, settings).items():
            received[source][where] = term.reshape(-1)
        for source, term in rule.displacement_sources(parameter, frozen, settings).items():
            moved[source][where] += term.reshape(-1)
    for channel in {*received, *memory}:
        for name, where, shape in _parameters(trajectory, step):
            frozen, settings = step.frozen[name], step.hyperparameters_of(name)
            held: Memory = tuple(slot[where].reshape(shape) for slot in memory[channel])
            delta, held = rule.step(received[channel][where].reshape(shape), held, frozen, settings)
            moved[channel][where] += delta.reshape(-1)
            for slot, after in zip(memory[channel], held, strict=True):
                slot[where] = after.reshape(-1)
    return moved
