r"""Recorded runs trained again with other weights of their samples: the counterfactual itself, not an estimate of it.

The run is taken again from θ_0 with the same batches in the same order, the same random numbers and the same settings;
only the slope of the loss at the outputs of sample i is multiplied by w_i,

.. math:: g_s(w) = \sum_{i \in B_s} w_i\, J_i^\top \lambda_i,\qquad \lambda_i = \partial L_s / \partial z_i ,

so that what divides the batch loss (its size, a sum of class weights) stays as it was. With w = 1 the run itself must
come out to the last bit, which is tried before any other weights are believed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from pathkernel.errors import SENSELESS, InputError, PathKernelError, TrajectoryError, brief, check_choice
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.losses import loss_slopes
from pathkernel.gradients.returned import map_outputs
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.runtime.precision import EXACT_PRODUCTS
from pathkernel.runtime.threads import one_at_a_time
from pathkernel.trajectory.samples import samples_of
from pathkernel.trajectory.stacked_retraining import WORTH_STACKING, stacked
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.weighted_replay import Retraining, WeightedReplay
from pathkernel.update_rules.table import RULES

if TYPE_CHECKING:
    from pathkernel.trajectory.trajectory import Trajectory

ASKER = "Trajectory.retrain"

ENGINES = ("auto", "plain", "stacked")


@one_at_a_time
def retrain(
    trajectory: Trajectory,
    weights: Any,
    *,
    optimizer: type[Optimizer] | None = None,
    engine: str = "auto",
) -> Tensor:
    r"""θ_S of the same run with other weights of its training samples.

    Initialisation, batches, their order, random numbers and settings are those on record. The slope of the loss at the
    outputs of sample i is multiplied by w_i: 0 leaves its loss out, 1 is the recorded run, 2 counts it twice. What the
    loss of a batch was divided by stays as it was (``batch loss / B``, not a mean over those that remain).

    Parameters
    ----------
    weights
        (R, N), one row for each run that is trained, by sample id; any finite numbers.
    optimizer
        Class of the optimizer, where it is one of the user's own. Those of torch are known by their rule, and a
        recording with keyframes says it.
    engine
        ``"plain"`` takes the recorded steps one run after the other, as they were taken; ``"stacked"`` all runs at
        once, by `torch.func.vmap` over networks, which rounds otherwise; ``"auto"`` (default) is stacked for four runs
        or more where the gradients of every run are found equal to the plain ones, to rounding, at the first step of
        each kind and at the end, and plain otherwise.

    Returns
    -------
    torch.Tensor
        (R, P), θ_S of each run, in the order of ``trajectory.layout``; a row of ones is the recorded θ_S, bit for bit.

    Raises
    ------
    TrajectoryError
        For a run that is not determined by its batches, settings and loss, naming what else there was: changes from
        outside, gradients that were changed between backward pass and step, running statistics, rows of several
        samples, steps of several stages, an optimizer with a state of before, a loss that couples samples; and where
        the run itself, trained again with weights of one, does not come out to the last bit.
    InputError
        For weights of another shape, or that are not finite; for a recording without a loss.

    Notes
    -----
    Time: R trainings, without the recording, and one more the first time, which tries whether the run comes out again.
    A sample of weight 0 stays in its batches: it still enters what couples samples in the network, such as the
    statistics of batch normalisation. Parallel runs, and such as go on after an interruption, are in
    `pathkernel.influence.retraining`.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X, y = torch.randn(32, 4), torch.randn(32, 1)
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.MSELoss()
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for x, target in recorder.batches(batch_size=8):
    ...         optimizer.zero_grad()
    ...         loss(model(x), target).backward()
    ...         optimizer.step()
    >>> weights = torch.ones(2, 32)
    >>> weights[1, 5] = 0  # without sample 5
    >>> theta = recorder.trajectory.retrain(weights)
    >>> bool((theta[0] == recorder.trajectory.final).all()), bool((theta[1] == theta[0]).all())
    (True, False)

    References
    ----------
    Ilyas et al. 2022, "Datamodels" (2202.00622), section 2, for training on subsets; Engstrom et al. 2025 (2503.13751)
    for one fixed order and initialisation.
    """
    rows = as_weights(weights, len(trajectory.data))
    with generators_untouched():
        return retrained(prepared(trajectory, optimizer), rows, trajectory.end_of_steps, engine)


def retrained(run: Retraining, rows: Tensor, final: Tensor, engine: str) -> Tensor:
    """θ_S of a run that is proved to come out again, (R, P).

    Parameters
    ----------
    run
        See `prepared`.
    rows
        (R, N) weights.
    final
        θ_S on record, which is that of weights of one.
    engine
        See `retrain`.
    """
    check_choice("engine", engine, ENGINES, "Engines")
    found = final.repeat(len(rows), 1)
    others = (rows != 1).any(dim=1).nonzero()[:, 0].tolist()
    if others:
        found[others] = _trained(run, rows[others].to(final.device), engine)
    return found


def _trained(run: Retraining, rows: Tensor, engine: str) -> Tensor:
    """θ_S of each row, (R, P)."""
    if engine == "stacked" or (engine == "auto" and len(rows) >= WORTH_STACKING):
        at_once = stacked(run, rows)
        if at_once is not None:
            return at_once
        if engine == "stacked":
            raise TrajectoryError(
                'Runs were to be trained at once by `engine="stacked"`, and their gradients are not those of one run '
                "after the other",
                "Networks that `torch.func.vmap` runs many of, and optimizers whose steps go entry by entry, can be "
                "stacked",
                'Write `engine="auto"`, which trains these one after the other',
            )
    return torch.stack([run.trained(row) for row in rows])


def as_weights(weights: Any, samples: int) -> Tensor:
    """Rows of sample weights as a float64 tensor (R, N).

    Raises
    ------
    InputError
        For another shape, and for what is not real and finite.
    """
    try:
        given = torch.as_tensor(np.asarray(weights) if not isinstance(weights, Tensor) else weights.detach())
    except (TypeError, ValueError):  # text, objects, rows of different lengths
        given = None
    if given is None or given.is_complex():
        raise InputError(
            f"`weights` is {type(weights).__name__}, which is no array of real numbers",
            f"There is one row for each run, with one weight for each of the {samples} training samples",
            f"Pass an array of shape (R, {samples})",
        )
    if given.dim() != 2 or given.shape[1] != samples:
        one = f", or `weights[None]` for the {samples} weights of one run" if given.shape == (samples,) else ""
        raise InputError(
            f"`weights` has shape {tuple(given.shape)}",
            f"There is one row for each run, with one weight for each of the {samples} training samples",
            f"Pass an array of shape (R, {samples}){one}",
        )
    given = given.to(torch.float64)
    if not bool(given.isfinite().all()):
        row, sample = (~given.isfinite()).nonzero()[0].tolist()
        raise InputError(
            f"`weights` holds {given[row, sample].item()} for sample {sample} in row {row}",
            "Weights multiply the samples' losses: finite numbers, 0 for a sample that is left out",
            "Pass `numpy.nan_to_num(weights)`, or look for what made them",
        )
    return given


# -- what can be trained again ------------------------------------------------------------------------------------


def prepared(trajectory: Trajectory, optimizer: type[Optimizer] | None = None) -> Retraining:
    """The run, found to come out again to the last bit with weights of one; once for each trajectory and optimizer.

    Raises
    ------
    TrajectoryError, InputError
        See `retrain`.
    """
    if optimizer is not None and not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise InputError(
            f"`optimizer` is a {type(optimizer).__name__}",
            "It is the class of the optimizer that took the steps; its settings are on record",
            "Leave it out for those of torch, or write `optimizer=YourOptimizer`, without making one",
        )
    known = vars(trajectory).get("_retraining")
    if known is not None and known[:2] == (len(trajectory), optimizer):
        return known[2]
    if "KernelMachine" not in trajectory.schedule.serves:  # which needs the same: every step
        trajectory.schedule.require(ASKER)
    if not len(trajectory):
        raise TrajectoryError(
            f"`{ASKER}` was given a trajectory with no steps",
            "A run that is trained again has at least one optimizer step",
            "Call `optimizer.step()` inside `with KernelRecorder(...) as recorder:` before",
        )
    trajectory.objective.function(f"`{ASKER}`")
    run = _described(trajectory, optimizer)
    _check_loss(trajectory, run.steps[0].batches)
    run = _proved(run, trajectory)
    vars(trajectory)["_retraining"] = len(trajectory), optimizer, run
    return run


def _described(trajectory: Trajectory, optimizer: type[Optimizer] | None) -> Retraining:
    summaries = [trajectory.store.summary(index) for index in range(len(trajectory))]
    if problem := next(_problems(trajectory, [one.record for one in summaries]), None):
        raise TrajectoryError(
            f"`{ASKER}` found {problem}",
            "A run is trained again from its batches, its settings and its loss alone; anything else would stay what "
            "it was with the recorded weights of the samples",
            "Train the networks by hand, or record a run without it",
        )
    recorded = trajectory.run.optimizer
    kind = optimizer or (None if recorded is None else recorded.kind) or class_of(trajectory, f"`{ASKER}`")
    first = summaries[0].state
    if first is None and trajectory.run.initial_memory:
        raise TrajectoryError(
            f"`{ASKER}` found an optimizer that had a state when recording began",
            "What is on record of that state is its linear memory; a run is trained again from all of it",
            "Record from the first step on, or with `Schedule(keyframes=32)`, which keeps the optimizer's whole state",
        )
    constants = None if recorded is None or optimizer is not None else recorded.constants
    steps = tuple(_recipe(one.record) for one in summaries)
    return Retraining(trajectory.run, kind, constants, first or {}, steps)


def _problems(trajectory: Trajectory, records: Sequence[Step]) -> Iterator[str]:
    """What else moved θ, or what weights of samples do not say, in the order of the steps."""
    if trajectory.rule.stages > 1:
        yield f"an optimizer whose steps have {trajectory.rule.stages} stages"
    for step in records:
        where = f"in step {step.index}"
        if step.changes:
            yield f"a change of the weights from outside the optimizer, {step.changes[0][0]!r}, {where}"
        if step.gradient_changes:
            yield f"a change of the gradient, {next(iter(step.gradient_changes))!r}, {where}"
        if step.replay is not None and step.replay.gradient is None:
            yield f"a gradient that is not that of its batches, such as a clipped one, {where}"
        if step.buffers:
            yield f"running statistics, `{next(iter(step.buffers))}`, that had moved {where}"
        for batch in step.batches:
            if batch.ids.dim() > 1 or batch.parts is not None:
                yield f"rows that are of several samples each, {where}"
            if batch.targets is None and (trajectory.data.announced or batch.source is not None):
                yield f"a batch of which no targets are on record, {where}"
            if batch.channel is not None:
                yield f"a backward pass under the name {batch.channel!r} {where}"
    if trajectory.final_buffers:
        yield f"running statistics, `{next(iter(trajectory.final_buffers))}`, that moved during training"
    if trajectory.tail:
        yield f"a change of the weights after the last step, {trajectory.tail[0][0]!r}"


def class_of(trajectory: Trajectory, asker: str) -> type[Optimizer]:
    """The optimizer's class, by its rule.

    Raises
    ------
    TrajectoryError
        Where the rule is not that of one class.
    """
    kinds = [kind for kind, rule in RULES.items() if rule is type(trajectory.rule)]
    if len(kinds) != 1:
        raise TrajectoryError(
            f"{asker} found a run whose steps follow the rule {trajectory.rule.name!r}",
            "Classes of optimizers are known by their rule where they are torch's, and one rule is one class's",
            "Record with `Schedule(keyframes=32)`, which notes the class, or write `trajectory.retrain(weights, "
            "optimizer=...)` with it",
        )
    return kinds[0]


def _recipe(step: Step) -> Step:
    """A step without its vectors, its slopes of the loss computed again."""
    nothing = torch.empty(0, dtype=step.before.dtype)
    batches = tuple(replace(one, cotangents=None, sampled_cotangents=None) for one in step.batches)
    return replace(step, before=nothing, after=nothing, gradient=nothing, frozen={}, batches=batches)


def _check_loss(trajectory: Trajectory, batches: Sequence[MicroBatch]) -> None:
    """Refuse a loss whose slope at one sample depends on the outputs of others: weights do not say what that means."""
    batch = max(batches, key=lambda one: len(one.ids))
    n = len(batch.ids)
    if n < 2:
        return
    function = trajectory.run.function().with_(state=batch.state)
    inputs, targets = samples_of(batch, trajectory.data)
    with function.evaluating(gradients=False):
        outputs = function.call(function.parameters(trajectory.initial), function.cast(inputs))
    half = n // 2

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.shape[:1] != (n,):
            return leaf
        return torch.cat([leaf[:half], 0.5 * leaf[half:] + 0.25])

    slopes = [
        loss_slopes(function, trajectory.objective, z, targets, batch.weights, n)[:half].double()
        for z in (outputs, map_outputs(moved, outputs))
    ]
    size = slopes[0].abs().max().item()
    if (slopes[1] - slopes[0]).abs().max().item() > math.sqrt(torch.finfo(trajectory.dtype).eps) * size:
        raise TrajectoryError(
            f"`{ASKER}` found a loss that couples samples: its slope at some moves with the outputs of others",
            "Weights multiply the losses of single samples, which such a loss does not have",
            "Train the networks by hand, leaving samples out of the batches",
        )


# -- the run itself, once more ------------------------------------------------------------------------------------


def _proved(run: Retraining, trajectory: Trajectory) -> Retraining:
    """The run with what its losses were divided by, after it has come out to the last bit with weights of one.

    Raises
    ------
    TrajectoryError
        Naming the first step that does not.
    """
    replay = run.replay(WeightedReplay)
    divisors = []
    with EXACT_PRODUCTS.lifted():
        for step in run.steps:
            record = trajectory.store.summary(step.index).record
            taken = result_or_error(partial(_divisor_of, replay, step, record), (*SENSELESS, NotImplementedError))
            if isinstance(taken, PathKernelError):
                raise taken
            if isinstance(taken, Exception):  # another class of optimizer, or one that needs a closure
                why = f"{type(taken).__name__}: {brief(taken)}"
                raise _differs(step.index, f"cannot be taken again ({why})") from taken
            divisors.append(taken)
    return replace(run, divisors=tuple(divisors))


def _divisor_of(replay: WeightedReplay, step: Step, record: Step) -> int:
    """Divisor of the losses by which a step comes out; the replay stands at its end afterwards."""
    notes = record.replay
    # A replay that reads slopes from the record needs no divisor where one that computes them does.
    for divisor in dict.fromkeys((1 if notes is None else notes.divisor, 1, len(step.batches))):
        replay.differentiate(step, divisor)
        if notes is not None and replay.gradient_checksum() == notes.gradient:
            break
        if notes is None and torch.equal(replay.gradient(), record.gradient):
            break
    else:
        raise _differs(step.index, "has another gradient than its batches give: clipped, say, or with other parts")
    replay.step_optimizer(step)
    theta = replay.vector()
    if not (torch.equal(theta, record.after) if notes is None else replay.checksum() == notes.checksum):
        raise _differs(step.index, f"ends elsewhere when `{replay.kind.__name__}.step()` is called on a copy")
    return divisor


def _differs(index: int, how: str) -> TrajectoryError:
    return TrajectoryError(
        f"`{ASKER}` tried the run with weights of one, and step {index} {how}",
        "Weights of one give the recorded run to the last bit; else what other weights change is not what they do. "
        "Rounding depends on the number of threads, the machine and the versions of torch",
        "Look at what the loop does between `backward()` and `step()`, and call it where it was recorded, with as many "
        "threads",
    )
