"""Parts of a recorder, made from what the user gave it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel._typing import Loss, Parameters
from pathkernel.errors import RecordingError
from pathkernel.gradients.batch_axes import BatchAxis, check_batch_axis
from pathkernel.gradients.losses import Objective, check_recorded_loss, check_reduction, check_task
from pathkernel.gradients.parameters import ParameterLayout, constants_of, named_trainable
from pathkernel.gradients.returned import Returns, check_returns
from pathkernel.recording.indexed import TrackedLoaders
from pathkernel.recording.joint_capture import JointCapture
from pathkernel.recording.live import LiveParameters
from pathkernel.recording.optimizers import JointOptimizer, rules_of
from pathkernel.recording.step_capture import StepCapture
from pathkernel.recording.store_choice import store_at, store_for
from pathkernel.recording.validation import check_optimizer
from pathkernel.trajectory.averages import AverageRecord
from pathkernel.trajectory.observer import StepObserver
from pathkernel.trajectory.run import End, Run, Start
from pathkernel.trajectory.samples import Samples
from pathkernel.trajectory.schedule import RecordingLevel, Streaming, as_schedule
from pathkernel.trajectory.store import Store
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import UpdateRule


@dataclass(frozen=True)
class Given:
    """Arguments of `pathkernel.KernelRecorder`, all but the optimizers.

    Attributes
    ----------
    outer, model
        The module that the loop calls, and the network inside its wrappers.
    watch
        Names of the parts that are called in place of the network.
    loss, data, returns, batch_axis, keep, task, rule, reduction, regularizers, averages, audit_every, store, schedule
        As the recorder takes them.
    observers
        Who sees every step.
    """

    outer: nn.Module
    model: nn.Module
    loss: Loss | str | None
    data: Any
    returns: Returns
    watch: tuple[str, ...]
    batch_axis: BatchAxis
    keep: bool | None
    task: str | None
    rule: UpdateRule | str | Sequence[UpdateRule | str | None] | None
    reduction: str
    regularizers: Mapping[str, Callable[[Parameters], Tensor]] | None
    averages: Mapping[str, nn.Module | Mapping[str, Tensor]] | None
    audit_every: int | None
    store: str | os.PathLike[str] | Store | None
    schedule: RecordingLevel | None
    observers: Sequence[StepObserver]


@dataclass(frozen=True)
class Made:
    """Parts of a recorder that follow from the optimizers.

    Attributes
    ----------
    live
        The parameters in training.
    capture
        Puts steps on record.
    trajectory
        The record.
    observers, averages
        As they are used.
    loaders
        Loaders that the recorder goes through.
    """

    live: LiveParameters
    capture: StepCapture
    trajectory: Trajectory
    observers: tuple[StepObserver, ...]
    averages: dict[str, nn.Module | Mapping[str, Tensor]]
    loaders: TrackedLoaders


def made_for(given: Given, optimizers: list[Optimizer], stopped: Callable[[], None]) -> Made:
    """The rule, the run, the record and what watches.

    Parameters
    ----------
    given
        What the user gave.
    optimizers
        Those that train the network.
    stopped
        As `StepCapture` takes it.

    Raises
    ------
    PathKernelError
        For what cannot be recorded.
    """
    rules = rules_of(optimizers, given.rule)
    alone = len(optimizers) == 1
    optimizer: Optimizer | JointOptimizer = optimizers[0] if alone else JointOptimizer(optimizers, rules)
    rule = optimizer.rule if isinstance(optimizer, JointOptimizer) else rules[0]
    check_optimizer(given.model, optimizer, rule)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    named = named_trainable(given.model, also=trained)
    layout = ParameterLayout.of(named)
    initial = layout.flatten({name: p.detach() for name, p in named.items()})
    level = as_schedule(given.schedule, given.observers)
    run = Run(
        model=given.model,
        objective=Objective(
            check_recorded_loss(given.loss), check_reduction(given.reduction), dict(given.regularizers or {})
        ),
        data=Samples(given.data, initial.dtype),
        rule=rule,
        layout=layout,
        start=Start(initial, constants_of(given.model, layout)),
        returns=check_returns(given.returns),
        task=check_task(given.task),
        schedule=level,
        watch=given.watch,
        batch_axis=check_batch_axis(given.batch_axis),
    )
    if run.data.holds_integers:
        run.data.suit(run.function(), initial)
    live = LiveParameters(named, optimizer)
    observers = level.observers if isinstance(level, Streaming) else tuple(given.observers)
    adding = [one for one in observers if one.needs_whole_run]
    if run.data.limit is None and adding:
        raise RecordingError(
            f"{type(adding[0]).__name__} was given to a recorder that counts samples as they come",
            "What watches training adds up shares while it runs, and has to know how many samples there are",
            "Write `KernelRecorder(..., data=number_of_samples)`",
        )
    averages = dict(given.averages or {})
    kept, keyframes = store_for(store_at(given.store), run, live, bool(averages), bool(adding))
    path = Trajectory(run, kept)
    records = {name: AverageRecord.begin(name, source, layout) for name, source in averages.items()}
    path.stand(End(averages=records))
    capture = StepCapture if isinstance(optimizer, Optimizer) else JointCapture
    made = capture(
        given.outer,
        given.model,
        optimizer,
        live,
        path,
        keyframes,
        observers,
        averages,
        given.audit_every,
        given.keep,
        stopped=stopped,
    )
    return Made(live, made, path, observers, averages, TrackedLoaders(run.data, run.batch_axis))
