"""How a flow is followed: what all flows are asked with, and from there to a `Flow`, or to where it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypedDict

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss, PyTree
from pathkernel.dynamics.flow import Flow, check_options
from pathkernel.dynamics.integration import STIFF, Integration, Solver, Stopped
from pathkernel.dynamics.system import System
from pathkernel.dynamics.times import grid_of
from pathkernel.dynamics.training_loss import TrainingLoss
from pathkernel.errors import FlowError, InputError
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
    check_options(options, FlowOptions, "a flow")
    times = grid_of(time, **chosen(options, GRID))
    given = chosen(options, SOLVER)
    solver = Solver(**given if options.get("dtype", torch.float64) == torch.float64 else {**COARSER, **given})
    return follow(make(loss_of(model, loss, data, options)), times, solver)


def loss_of(model: nn.Module, loss: Loss, data: Any, options: PathOptions) -> TrainingLoss:
    """L of a network on its data, as the options say.

    Raises
    ------
    InputError
        Where L(θ(0)) is no finite number.
    """
    made = TrainingLoss.of(model, loss, data, **chosen(options, LOSS))
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


def chosen(options: PathOptions, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the options that are given under these names."""
    return {name: value for name, value in options.items() if name in names}


COARSER = {"rtol": 1e-4, "atol": 1e-6}
"""Of adaptive methods in less than float64, whose rounding they would else try to resolve."""
GRID = ("times", "points")
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
