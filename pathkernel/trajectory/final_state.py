"""The optimizer's state at the end of a recorded run, so that it can go on from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import TrajectoryError
from pathkernel.trajectory.retraining import Replay
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.trajectory.weighted_retraining import class_of
from pathkernel.update_rules.adam import Adam
from pathkernel.update_rules.rule import Memory
from pathkernel.update_rules.sgd import SGD

FOLLOWED = 1e-3
"""Part of the last displacement up to which the state found is the one that made it; a wrong one is off by all of it.
In float32 a displacement is rounded at the size of θ."""


def replay_at_end(trajectory: Trajectory) -> Replay:
    """A replay that stands at the end of the last step, in float64, and can take further ones.

    The optimizer's state is that of the last keyframe and the steps since; without keyframes, of SGD and Adam, it is
    found from the recorded gradients by the update rule.

    Raises
    ------
    TrajectoryError
        Where the state is not on record; and for changes of the weights after the last step.

    Notes
    -----
    Time: reading every step, without keyframes; else the steps since the last keyframe.
    """
    if trajectory.tail:
        raise TrajectoryError(
            f"The weights were changed after the last step ({trajectory.tail[0][0]!r})",
            "Further steps of the optimizer begin where its last step ended",
            f"Write `trajectory.until({len(trajectory)})`, which ends there",
        )
    recorded = trajectory.run.optimizer
    if recorded is not None:
        replay = _from_keyframe(trajectory, Replay(trajectory.run, recorded.kind, recorded.constants))
        state = _in_double(replay.state())
    else:
        replay = Replay(trajectory.run, class_of(trajectory, "Adding samples"))
        state = _from_gradients(trajectory)
    replay.restore(trajectory.end_of_steps.double(), state)
    return replay


def _from_keyframe(trajectory: Trajectory, replay: Replay) -> Replay:
    store = trajectory.store
    summaries = [store.summary(index) for index in range(len(trajectory))]
    start = max((index for index, one in enumerate(summaries) if one.state is not None), default=None)
    if start is None:
        raise TrajectoryError(
            "No keyframe is on record, and the optimizer's state is known from these alone",
            "A recording with keyframes begins with one",
            "Record the run again",
        )
    replay.restore(summaries[start].record.before, summaries[start].state or {})
    for one in summaries[start:]:
        replay.take(one.record)
    if not torch.equal(replay.vector(), trajectory.end_of_steps):  # an optimizer that a copy does not step like
        raise TrajectoryError(
            f"The steps from keyframe {start} on do not lead to the recorded end",
            "The optimizer's state at the end is found by taking the steps since the last keyframe once more",
            "Call it on the machine of the recording, with as many threads",
        )
    return replay


def _in_double(state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same state for parameters in float64; numbers of steps keep their type."""

    def double(key: str, value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() and key != "step" else value

    return {name: {key: double(key, value) for key, value in own.items()} for name, own in state.items()}


def _from_gradients(trajectory: Trajectory) -> dict[str, dict[str, Any]]:
    """State of SGD, Adam or AdamW by parameter name, float64, carried through the record by the rule."""
    rule = trajectory.rule
    if not isinstance(rule, (SGD, Adam)) or any(group.get("amsgrad") for group in _last(trajectory).hyperparameters):
        raise TrajectoryError(
            f"The state of {rule.name} at the end of training is not on record",
            "Without keyframes it is found for SGD, Adam and AdamW, without `amsgrad`, from what their rules read",
            "Record with `Schedule(keyframes=32)`, which keeps the optimizer's whole state",
        )
    memory: dict[str, Memory] = {
        name: tuple(slot.double().reshape(shape) for slot in trajectory.initial_memory[name])
        for name, shape in zip(trajectory.layout.names, trajectory.layout.shapes, strict=True)
        if name in trajectory.initial_memory
    }
    state: dict[str, dict[str, Any]] = {}
    for step in trajectory.steps():
        for name in step.active:
            delta, memory[name] = _carried(trajectory, step, name, memory.get(name))
            if step.index == len(trajectory) - 1:
                _check_followed(trajectory, step, name, delta)
            state[name] = _entry(trajectory, step, name, memory[name])
    return state


def _last(trajectory: Trajectory) -> Step:
    return trajectory.store.summary(len(trajectory) - 1).record


def _carried(trajectory: Trajectory, step: Step, name: str, memory: Memory | None) -> tuple[Tensor, Memory]:
    """Displacement of a parameter, sources included, and its memory after the step, as the rule has them."""
    layout = trajectory.layout
    theta, gradient = layout.unflatten(step.before)[name].double(), layout.unflatten(step.gradient)[name].double()
    settings, frozen = step.hyperparameters_of(name), step.frozen[name]
    gradient, added = trajectory.rule.sourced(gradient, theta, frozen, settings)
    held = memory or tuple(torch.zeros_like(theta) for _ in trajectory.rule.memory)
    delta, held = trajectory.rule.step(gradient, held, frozen, settings)
    return delta + added, held


def _check_followed(trajectory: Trajectory, step: Step, name: str, delta: Tensor) -> None:
    where = trajectory.layout.slices[name]
    moved = (step.after[where].double() - step.before[where]).reshape(delta.shape)
    rounding = torch.finfo(trajectory.precision).eps * step.before[where].double().norm()
    if not bool((delta - moved).norm() <= FOLLOWED * moved.norm() + 2 * rounding):
        raise TrajectoryError(
            f"The last displacement of `{name}` is not what the gradients on record lead to",
            "The optimizer's memory at the end is carried there from gradient to gradient, and so must not have been "
            "edited or loaded in between",
            "Record with `Schedule(keyframes=32)`, which keeps the optimizer's whole state",
        )


def _entry(trajectory: Trajectory, step: Step, name: str, memory: Memory) -> dict[str, Any]:
    """A parameter's entry in ``optimizer.state`` after a step."""
    settings = step.hyperparameters_of(name)
    if not isinstance(trajectory.rule, Adam):
        return {"momentum_buffer": memory[0]} if float(settings["momentum"]) else {}
    frozen = step.frozen[name]
    t, beta = float(frozen["t"]), float(settings["betas"][1])
    root = (frozen["denominator"].double() - float(settings["eps"])).clamp_min(0)
    return {"step": torch.tensor(t), "exp_avg": memory[0], "exp_avg_sq": root.square() * (1 - beta**t)}
