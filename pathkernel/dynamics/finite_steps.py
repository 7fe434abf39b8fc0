r"""Effects of finite steps on a recorded run of gradient descent: implicit regularisation, as a ledger.

Each step follows, up to γ³, the first modified flow of its own batch's loss (`pathkernel.dynamics.modified_flows`).
Along it a function f of θ changes by

.. math:: \dot f = \underbrace{-\langle\nabla f, \nabla L\rangle}_{\text{flow}}
          \underbrace{- \langle\nabla f, \nabla L_B - \nabla L\rangle}_{\text{batches}}
          \underbrace{- \langle\nabla f, \nabla \tfrac\gamma4 \lVert\nabla L_B\rVert^2\rangle}_{\text{regularization}} ,

which is integrated over each step by the trapezoid rule, at the recorded points. What is left of f(θ_S) − f(θ_0), the
remainder, is of order γ² in a run of given length Σγ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pathkernel._typing import PyTree
from pathkernel.dynamics.training_loss import TrainingLoss
from pathkernel.errors import InputError
from pathkernel.gradients.losses import batch_products
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.tangent_kernel.tangent_kernel import no_samples
from pathkernel.trajectory.samples import samples_of
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.sgd import SGD

RECEIVED = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative difference between the gradient that the optimizer received and that of the batch's loss up to which they
are one; passes may have run in another order, and with TensorFloat-32."""


@dataclass(frozen=True)
class Ledger:
    r"""The change of something over a run, as a sum.

    .. math:: f(\theta_S) - f(\theta_0) = \sum \text{parts} + \text{remainder}

    Attributes
    ----------
    change
        f(θ_S) − f(θ_0): a number for the loss, (n, C) for outputs.
    parts
        What each cause contributed, shaped like ``change``.
    """

    change: np.ndarray
    parts: dict[str, np.ndarray]

    @property
    def remainder(self) -> np.ndarray:
        """The part of the change that no cause accounts for."""
        return self.change - sum(self.parts.values(), np.zeros_like(self.change))

    @property
    def relative_remainder(self) -> float:
        """‖remainder‖ / ‖change‖."""
        return float(np.linalg.norm(self.remainder) / max(np.linalg.norm(self.change), np.finfo(float).tiny))


@dataclass(frozen=True)
class RegularizationLedger:
    """Result of `regularization_ledger`.

    Attributes
    ----------
    loss
        Of the loss of all training samples.
    outputs
        Of the network's outputs on some samples, (n, C); None where none were asked for.
    steps
        What each step contributed to the loss by each cause, (S,): ``loss.parts`` without ``"start"`` are their sums.
    times
        Of the recorded points, (S + 1,): Σγ, with momentum Σγ/(1 − β).

    Notes
    -----
    Parts, as far as they occur:

    ``"flow"``
        the gradient of the loss of all samples;
    ``"batches"``
        what the gradients of the batches, in the order in which they came, did beyond that;
    ``"regularization"``
        the gradient of (γ/4)‖∇L_B‖² of each step's batch, with momentum γ(1 + β)/(4(1 − β)²)‖∇L‖²;
    ``"weight_decay"``
        coupled weight decay;
    ``"start"``
        the lag γβ/(1 − β)² ∇L of a ball that starts at rest behind one that has always been rolling.
    """

    loss: Ledger
    outputs: Ledger | None
    steps: dict[str, np.ndarray] = field(repr=False)
    times: np.ndarray = field(repr=False)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {float(value):+.3g}" for name, value in self.loss.parts.items())
        left = f"remainder {float(self.loss.remainder):+.1e}"
        return (
            f"RegularizationLedger(loss {float(self.loss.change):+.3g} = {parts}, {left}; {len(self.times) - 1} steps)"
        )


def regularization_ledger(
    trajectory: Trajectory, X: PyTree = None, *, block: int = 4096, progress: bool = False
) -> RegularizationLedger:
    r"""Ledger of a recorded run of gradient descent: what its loss and outputs owe to finite steps.

    .. math:: f(\theta_S) - f(\theta_0) = \text{flow} + \text{batches} + \text{regularization} + O(\gamma^2)

    Parameters
    ----------
    trajectory
        A run of `torch.optim.SGD` without dampening: plain, in mini-batches or not, or with momentum and all samples in
        each step; with or without weight decay and schedules of the rate (not with momentum).
    X
        n samples whose outputs are explained; None for the loss alone.
    block
        Samples that go through the network at once.
    progress
        Show a progress bar over the steps.

    Returns
    -------
    RegularizationLedger
        For the loss of all training samples, and the outputs.

    Raises
    ------
    InputError
        For other optimizers: with a rate for each parameter, finite steps follow other flows. And where gradients were
        clipped or changed, where batches were accumulated, and where the network has running statistics that moved.

    Notes
    -----
    All is computed in float64. Each step takes the gradient of its batch and its product with the Hessian at both ends,
    the gradient of all samples, and forward derivatives of X along them.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X, y = torch.randn(16, 4), torch.randn(16, 1)
    >>> model, loss = torch.nn.Linear(4, 1), torch.nn.MSELoss()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for x, target in recorder.batches(batch_size=16):
    ...         optimizer.zero_grad()
    ...         loss(model(x), target).backward()
    ...         optimizer.step()
    >>> ledger = pk.dynamics.regularization_ledger(recorder.trajectory, X[:3])
    >>> sorted(ledger.loss.parts)
    ['flow', 'regularization']

    References
    ----------
    Barrett and Dherin 2021 (2009.11162); Smith et al. 2021 (2101.12176); Ghosh et al. 2023 (2302.00849).
    """
    trajectory.require_steps("KernelMachine")  # which needs as much of a record
    kind = _kind(trajectory)
    function = trajectory.function(torch.float64)
    whole = TrainingLoss(trajectory.run, function, *trajectory.data.everything(), block).in_blocks()
    inputs = None if X is None else function.cast(trajectory.queries(X, "regularization_ledger"))
    if inputs is not None and not count(inputs):
        raise no_samples("regularization_ledger")
    sweep = _Sweep(trajectory, whole, inputs, kind, block)
    steps = sweep.run(progress)

    first, last = function.cast(trajectory.initial), function.cast(trajectory.final)
    lagging = sweep.lagging(first) if kind.momentum else None

    def ledger(f: Callable[[Tensor], np.ndarray], parts: dict[str, np.ndarray]) -> Ledger:
        start = f(first)
        lag = {} if lagging is None else {"start": np.asarray(f(lagging) - start)}
        return Ledger(np.asarray(f(last) - start), {**parts, **lag})

    of_loss = ledger(lambda theta: whole.value(theta).cpu().numpy(), {name: own.sum() for name, own in steps.items()})
    of_outputs = None
    if inputs is not None:
        parts = {name: own.cpu().numpy() for name, own in sweep.outputs.items()}
        of_outputs = ledger(lambda theta: function.outputs(theta, inputs, block).cpu().numpy(), parts)
    return RegularizationLedger(of_loss, of_outputs, steps, np.array(sweep.times))


@dataclass(frozen=True)
class _Kind:
    """Kind of gradient descent that a run is."""

    momentum: float
    decay: float
    whole: bool
    """Whether every step takes all samples."""


def _kind(trajectory: Trajectory) -> _Kind:
    """The kind of a run, after a look at whether it is one that a modified flow is known of.

    Raises
    ------
    InputError
        Where it is not.
    """
    if not isinstance(trajectory.rule, SGD):
        raise InputError(
            f"A regularization ledger was asked of a run of {trajectory.rule.name}",
            "It is known of `torch.optim.SGD`, plain or with momentum: under a rate for each parameter, or a step of "
            "fixed length, finite steps follow another flow than that of L + (γ/4)‖∇L‖²",
            "Ask for `pathkernel.dynamics.loss_ledger(trajectory)`, which is exact for every optimizer",
        )
    records = [trajectory.store.summary(s).record for s in range(len(trajectory))]
    settings = [record.hyperparameters for record in records]
    used = {(g.get("momentum", 0.0), g.get("weight_decay", 0.0)) for groups in settings for g in groups}
    rates = {tuple(float(g["lr"]) for g in groups) for groups in settings}
    odd = any(g.get(name) for groups in settings for g in groups for name in ("dampening", "nesterov", "maximize"))
    (momentum, decay), n = next(iter(used)), len(trajectory.data)
    if odd or len(used) > 1 or any(len(set(own)) > 1 for own in rates) or (momentum and len(rates) > 1):
        raise InputError(
            "A regularization ledger was asked of a run whose settings are not those of plain gradient descent or of a "
            "heavy ball",
            "Parameters share rate, momentum and weight decay; dampening, `nesterov` and `maximize` are off; and with "
            "momentum the rate does not change",
            "Record a run of `torch.optim.SGD(parameters, lr=..., momentum=...)`",
        )
    batches = [one for record in records for one in record.batches]
    whole = all(torch.equal(batch.ids.flatten().sort().values.cpu(), torch.arange(n)) for batch in batches)
    if any(len(record.batches) != 1 for record in records) or not all(batch.has_targets for batch in batches):
        raise InputError(
            "A regularization ledger was asked of a run with several backward passes to a step, or samples that share "
            "rows or come from elsewhere",
            "Each step is of the loss of one batch",
            "Record a run with one `loss.backward()` before each `optimizer.step()`",
        )
    if momentum and (not whole or trajectory.initial_memory):
        raise InputError(
            "A regularization ledger was asked of a heavy ball in mini-batches, or of one that was rolling already",
            "With momentum the modified flow is known of runs from rest whose every step takes all samples",
            "Record with `recorder.batches(batch_size=len(X))` and a fresh optimizer, or train without momentum",
        )
    moved = any(segment.step is None for segment in trajectory.segments())
    if moved or trajectory.final_buffers:
        raise InputError(
            "A regularization ledger was asked of a run in which more than the optimizer's steps changed the network",
            "Parameters move by steps alone, and running statistics not at all",
            "Record with BatchNorm layers in evaluation mode, and without changes outside the optimizer",
        )
    return _Kind(float(momentum), float(decay), whole)


@dataclass(frozen=True)
class _Rates:
    """How fast each cause moves the loss, a number, and the outputs, (n, C), at a point of the path.

    ``gradient`` is that of the batch, (P,).
    """

    gradient: Tensor
    loss: dict[str, float]
    outputs: dict[str, Tensor]


class _Sweep:
    """One pass over a run, in which the parts of every step are added up.

    Parameters
    ----------
    trajectory, whole, inputs, kind, block
        The run, the loss of all samples, those whose outputs are explained, the kind of run, samples at once.

    Attributes
    ----------
    outputs
        Parts of the outputs so far, (n, C) each.
    times
        Of the points so far.
    """

    def __init__(self, trajectory: Trajectory, whole: TrainingLoss, inputs: PyTree, kind: _Kind, block: int) -> None:
        self.trajectory, self.whole, self.inputs, self.kind, self.block = trajectory, whole, inputs, kind, block
        self.outputs: dict[str, Tensor] = {}
        self.times = [0.0]
        self._latest: tuple[Tensor, float, _Rates] | None = None

    def run(self, progress: bool) -> dict[str, np.ndarray]:
        """Parts of the loss, step by step, (S,) each."""
        steps: dict[str, list[float]] = {}
        total = len(self.trajectory)
        for step in tqdm(self.trajectory.steps(), total=total, desc="ledger", unit="step", disable=not progress):
            rate = float(step.hyperparameters[0]["lr"])
            length, loss = rate / (1 - self.kind.momentum), self._loss_of(step)
            ends = [self._rates(loss, loss.function.cast(theta), rate) for theta in (step.before, step.after)]
            _check_received(step, ends[0].gradient)
            for name in ends[0].loss:
                change = length / 2 * sum(end.loss[name] for end in ends)
                steps.setdefault(name, []).append(change)
            for name in ends[0].outputs:
                moved = length / 2 * (ends[0].outputs[name] + ends[1].outputs[name])
                self.outputs[name] = self.outputs[name] + moved if name in self.outputs else moved
            self.times.append(self.times[-1] + length)
        return {name: np.array(values) for name, values in steps.items()}

    def lagging(self, theta: Tensor) -> Tensor:
        """Where a ball that has always been rolling starts that one starting from rest at θ comes to follow."""
        momentum, rate = self.kind.momentum, float(self.trajectory.store.read(0).hyperparameters[0]["lr"])
        gradient = self.whole.gradient(theta) + self.kind.decay * theta
        return theta + rate * momentum / (1 - momentum) ** 2 * gradient

    def _loss_of(self, step: Step) -> TrainingLoss:
        (batch,) = step.batches
        function = self.whole.function.with_(state=batch.state)
        inputs, targets = samples_of(batch, self.trajectory.data)
        if targets is None:  # they are not asked for where the slopes of the loss are on record
            targets = self.trajectory.data.targets(batch.ids)
        return TrainingLoss(self.trajectory.run, function, inputs, targets, self.block, batch.weights)

    def _rates(self, loss: TrainingLoss, theta: Tensor, rate: float) -> _Rates:
        """How fast each cause moves loss and outputs at one end of a step.

        Where all steps take all samples at one rate, the end of a step is the start of the next.
        """
        if self._latest is not None and self._latest[1] == rate and torch.equal(self._latest[0], theta):
            return self._latest[2]
        full = self.whole.gradient(theta)
        own = full if self.kind.whole else loss.gradient(theta)
        directions = self._directions(loss, theta, full, own, rate)
        of_loss = {name: float(full @ direction) for name, direction in directions.items()}
        found = _Rates(own, of_loss, self._moved(theta, directions))
        if self.kind.whole:
            self._latest = theta, rate, found
        return found

    def _directions(
        self, loss: TrainingLoss, theta: Tensor, full: Tensor, own: Tensor, rate: float
    ) -> dict[str, Tensor]:
        """Where each cause pushes θ, given the gradients of all samples and of the batch."""
        momentum, decay = self.kind.momentum, self.kind.decay
        pulled = own + decay * theta
        bent = loss.products(theta, pulled)[1] + decay * pulled
        directions = {
            "flow": -full,
            "regularization": -rate * (1 + momentum) / (2 * (1 - momentum) ** 2) * bent,
        }
        if not self.kind.whole:
            directions["batches"] = full - own
        if decay:
            directions["weight_decay"] = -decay * theta
        return directions

    def _moved(self, theta: Tensor, directions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Derivatives of the outputs along the directions, (n, C) each."""
        if self.inputs is None:
            return {}
        stacked = torch.stack(list(directions.values()))
        pieces = [
            batch_products(self.whole.function, theta, take(self.inputs, piece), stacked)
            for piece in blocks(count(self.inputs), self.block)
        ]
        return dict(zip(directions, torch.cat(pieces, dim=1), strict=True))


def _check_received(step: Step, found: Tensor) -> None:
    """Refuse a step whose gradient is not that of its batch's loss."""
    recorded = step.gradient.to(found)
    off = float((recorded - found).norm() / found.norm().clamp_min(torch.finfo(found.dtype).tiny))
    if not off <= RECEIVED.get(step.gradient.dtype, 1e-2):
        raise InputError(
            f"In step {step.index} the optimizer received another gradient than that of its batch's loss: they "
            f"differ by {off:.1e} of its length",
            "A regularization ledger takes steps of the loss as it is, without clipping, noise or other changes",
            "Record a run without them, and with `data=` and `loss=` as the loop uses them",
        )
