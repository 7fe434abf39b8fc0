"""How a flow is followed: what all flows are asked with, and from there to a `Flow`, or to where it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss, PyTree
from pathkernel.dynamics.flow import Flow, points_of, shown
from pathkernel.dynamics.integration import STIFF, Integration, Solver, Stopped
from pathkernel.dynamics.system import System
from pathkernel.dynamics.training_loss import TrainingLoss
from pathkernel.errors import FlowError, InputError, is_number, is_whole
from pathkernel.gradients.returned import Returns


class PathOptions(TypedDict, total=False):
    """Options of every flow, with noise or without.

    Attributes
    ----------
    times
        Points of time that are kept, from 0 upward, in place of ``time`` and ``points``.
    points
        How many are kept, evenly spread over [0, time]; 65 by default. An odd number lets path kernels take Simpson's
        rule.
    reduction, returns, dtype, block
        See `pathkernel.dynamics.training_loss.TrainingLoss.of`; float64 by default, whatever the model's type is.
    """

    times: ArrayLike | None
    points: int
    reduction: str
    returns: Returns
    dtype: torch.dtype
    block: int


class FlowOptions(PathOptions, total=False):
    """Options of flows without noise: beside those of `PathOptions`, how torchdiffeq follows them.

    Attributes
    ----------
    method, rtol, atol, step, max_steps
        See `pathkernel.dynamics.integration.Solver`.
    """

    method: str
    rtol: float
    atol: float
    step: float | None
    max_steps: int


def flow_of(
    make: Callable[[TrainingLoss], System], model: nn.Module, loss: Loss, data: Any, time: float, options: FlowOptions
) -> Flow:
    """Flow of a network on its data under the system that is made of its loss.

    Raises
    ------
    FlowError
        Where it comes to an end before its time; ``error.flow`` is the flow up to there.
    """
    times = grid_of(time, options, FlowOptions)
    given = _chosen(options, SOLVER)
    solver = Solver(**given if options.get("dtype", torch.float64) == torch.float64 else {**COARSER, **given})
    return follow(make(loss_of(model, loss, data, options)), times, solver)


def loss_of(model: nn.Module, loss: Loss, data: Any, options: PathOptions) -> TrainingLoss:
    """L of a network on its data, as the options say.

    Raises
    ------
    InputError
        Where L(θ(0)) is no finite number.
    """
    made = TrainingLoss.of(model, loss, data, **_chosen(options, LOSS))
    value = float(made.value(made.initial))
    if not math.isfinite(value):
        trees = {"the parameters": made.initial, "the inputs": made.inputs, "the targets": made.targets}
        broken = [name for name, tree in trees.items() if not _is_finite(tree)]
        raise InputError(
            f"The loss is {value} at t = 0; {' and '.join(broken) or 'no input, target or parameter'} "
            f"{'hold' if broken else 'holds'} NaN or infinity",
            "A flow starts where the loss is a finite number",
            "Look at `loss(model(X), y)` before, and leave samples out that are not finite: "
            "`torch.isfinite(X).flatten(1).all(dim=1)`",
        )
    return made


def _is_finite(tree: PyTree) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _chosen(options: PathOptions, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


COARSER = {"rtol": 1e-4, "atol": 1e-6}
"""Of adaptive methods in less than float64, whose rounding they would else try to resolve."""
SOLVER = ("method", "rtol", "atol", "step", "max_steps")
LOSS = ("reduction", "returns", "dtype", "block")


def follow(system: System, times: Sequence[float], solver: Solver) -> Flow:
    """The flow of a system through points of time; see `flow_of`."""
    integration = Integration(system.flat_velocity, solver)
    state = torch.cat(list(system.start))
    kept, reached = [state], [times[0]]
    try:
        with system.loss.held():
            for before, after in pairwise(times):
                state = integration.advance(before, after, state)
                kept.append(state)
                reached.append(after)
    except Stopped as stop:
        if integration.latest is not None and integration.latest[0] > reached[-1]:
            reached.append(integration.latest[0])
            kept.append(integration.latest[1])
        error = FlowError(
            f"The {system.name} came to its end at t = {reached[-1]:.6g}: {stop.reason}",
            f"It was to be followed to t = {times[-1]:.6g}",
            f"{stop.write}{system.advice if stop.write == STIFF else ''}",
        )
        error.flow = Flow(system, reached, torch.stack(kept), solver)
        raise error from None
    return Flow(system, reached, torch.stack(kept), solver)


def grid_of(time: float, options: PathOptions, kind: type[PathOptions]) -> list[float]:
    """Points of time that are kept, from 0 on.

    Raises
    ------
    InputError
        For times that do not rise from 0, and for unknown options.
    """
    known = kind.__annotations__  # of a TypedDict, with those of its bases
    if unknown := sorted(set(options) - known.keys()):
        raise InputError(
            f"`{unknown[0]}=` was given to a flow",
            f"Its options are {', '.join(f'`{name}`' for name in sorted(known))}",
            f"Leave `{unknown[0]}` out",
        )
    times, points = options.get("times"), options.get("points", 65)
    if times is None:
        if not (is_number(time) and time > 0 and is_whole(points) and points >= 2):
            raise InputError(
                f"A flow was asked for with `time={time!r}` and `points={points!r}`",
                "It lasts for a time above 0, and 2 points or more of it are kept",
                "Write for example `time=2.0, points=65`",
            )
        return [float(t) for t in np.linspace(0.0, time, points)]
    given = points_of(times)
    if given.ndim != 1 or len(given) < 2 or given[0] != 0 or not ((np.diff(given) > 0) & (given[1:] < np.inf)).all():
        raise InputError(
            f"A flow was asked for with `times={shown(given)}`",
            "Two or more points of time rise from 0",
            "Write for example `times=numpy.linspace(0, 2, 65)`",
        )
    return [float(t) for t in given]
