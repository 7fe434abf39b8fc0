r"""Ordinary differential equations :math:`\dot y = F(t, y)` by torchdiffeq, and how they come to an end before time.

Between two points of a flow that are kept the solver runs anew, with the step that it had found, and meets the second
point with a step of its own: points are as accurate as the solver, not as its interpolation, and those before a failure
are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import InputError, is_number, is_whole
from pathkernel.runtime.extras import require_extra

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")

GROWTH = 1e6
"""Times by which a state grows, beyond its size at the start or 1, before it counts as divergent."""


def pieces_of(length: float, step: float) -> int:
    """How many equal steps no longer than ``step`` make up a length, a rounding beyond it aside."""
    return max(1, math.ceil(length / step - 1e-9))


Velocity = Callable[[float, Tensor], Tensor]
"""F(t, y)."""


class Stopped(Exception):
    """A solver that cannot go on.

    Parameters
    ----------
    reason
        What happened, as the end of a sentence.
    write
        What to write instead.
    """

    def __init__(self, reason: str, write: str) -> None:
        super().__init__(reason)
        self.reason, self.write = reason, write


@dataclass(frozen=True)
class Solver:
    """A method of torchdiffeq with its accuracy.

    Attributes
    ----------
    method
        An adaptive method (``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"``, ``"adaptive_heun"``) or one of
        fixed steps (``"euler"``, ``"midpoint"``, ``"heun2"``, ``"heun3"``, ``"rk4"``).
    rtol, atol
        Error of one step, relative and absolute, of adaptive methods: 1e-8 and 1e-10 by default, in float32 1e-4 and
        1e-6.
    step
        Largest step of a method of fixed steps; None for one step between two kept points.
    max_steps
        Steps, tried ones included, of a whole flow.
    """

    method: str = "dopri5"
    rtol: float = 1e-8
    atol: float = 1e-10
    step: float | None = None
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        if self.method not in ADAPTIVE + FIXED:
            raise InputError(
                f"`method={self.method!r}` was given",
                f"Methods are {', '.join(map(repr, ADAPTIVE))}, and of fixed steps {', '.join(map(repr, FIXED))}",
                'Write `method="dopri5"`',
            )
        if self.step is not None and (self.method in ADAPTIVE or not (is_number(self.step) and self.step > 0)):
            raise InputError(
                f'`step={self.step!r}` was given with `method="{self.method}"`',
                f"Steps above 0 are fixed by {', '.join(map(repr, FIXED))}; the other methods choose theirs",
                'Write `method="rk4", step=0.01`, or `rtol=` and `atol=`',
            )
        errors = self.rtol, self.atol
        if not (all(is_number(error) and error >= 0 for error in errors) and any(errors)):
            raise InputError(
                f"`rtol={self.rtol!r}` and `atol={self.atol!r}` were given",
                "Errors are 0 or more, and one of them above 0",
                "Write for example `rtol=1e-8, atol=1e-10`",
            )
        if not (is_whole(self.max_steps) and self.max_steps >= 1):
            raise InputError(
                f"`max_steps={self.max_steps!r}` was given",
                "Steps are counted: a whole number from 1 on",
                "Write for example `max_steps=10_000`",
            )


class Integration:
    """One flow under way.

    Parameters
    ----------
    velocity
        F(t, y).
    solver
        How it is followed.

    Attributes
    ----------
    steps
        Steps tried so far.
    latest
        (time, state) where the latest of them began.
    """

    def __init__(self, velocity: Velocity, solver: Solver) -> None:
        require_extra("dynamics", "`pathkernel.dynamics`", "torchdiffeq")
        self.velocity, self.solver = velocity, solver
        self.steps = 0
        self.latest: tuple[float, Tensor] | None = None
        self._size = self._speed = 1.0
        self._longest: float | None = None

    def advance(self, start: float, end: float, state: Tensor) -> Tensor:
        """y(end) from y(start), (Y,).

        Raises
        ------
        Stopped
            Where the state becomes infinite or grows without bound, where steps become too small or too many; see
            `latest`.
        """
        from torchdiffeq import odeint  # not before it is needed

        if self.latest is None:
            self.latest = start, state
            self._size = max(1.0, state.norm().item())
            self._speed = max(1.0, self.velocity(start, state).norm().item())
        self._longest, first = None, self._longest
        times = torch.tensor([start, end], dtype=torch.float64, device=state.device)
        options: dict[str, Any] = {}
        if self.solver.method in FIXED:
            pieces = 1 if self.solver.step is None else pieces_of(end - start, self.solver.step)
            grid = torch.linspace(start, end, pieces + 1, dtype=torch.float64, device=state.device)
            options["grid_constructor"] = lambda func, y, t: grid.to(t)
        else:
            options["step_t"] = times[1:]
            options["first_step"] = first
        how: dict[str, Any] = {"method": self.solver.method, "rtol": self.solver.rtol, "atol": self.solver.atol}
        try:
            found: Tensor = odeint(_Watched(self), state, times.to(state.dtype), options=options, **how)[-1]
        except AssertionError:  # torchdiffeq's own, of steps that time no longer tells from 0
            assert self.latest is not None
            if not self.velocity(*self.latest).norm().item() <= GROWTH * self._speed:
                raise Stopped("it diverged", DIVERGED) from None
            raise Stopped("steps became too small to go on", STIFF) from None
        self.check(found)
        return found

    def check(self, state: Tensor) -> None:
        """Refuse a state that is infinite, or grew without bound."""
        if not state.norm().item() <= GROWTH * self._size:  # NaN is not
            raise Stopped("it diverged", DIVERGED)

    def count(self, time: float, state: Tensor) -> None:
        """Take note of a step."""
        self.check(state)
        self.latest = time, state
        self.steps += 1
        if self.steps > self.solver.max_steps:
            raise Stopped(f"it took more than {self.solver.max_steps} steps", STIFF)

    def accept(self, length: float) -> None:
        """Take note of how long an accepted step was."""
        self._longest = max(self._longest or 0.0, length)


DIVERGED = (
    "Look at the flow up to there, `error.flow`; take a smaller `step` if the method has fixed steps, or a shorter "
    "`time`"
)
STIFF = (
    "Look at the flow up to there, `error.flow`; write a larger `max_steps=`, larger `rtol=` and `atol=`, or a shorter "
    "`time`; at kinks, where gradients jump (as those of ReLU networks do, or signs), take fixed steps: "
    '`method="rk4", step=0.01`'
)


class _Watched:
    """F as torchdiffeq calls it, with what it calls around each step."""

    def __init__(self, integration: Integration) -> None:
        self.integration = integration
        if integration.solver.method in ADAPTIVE:
            self.callback_accept_step = lambda t, y, dt: integration.accept(float(dt))

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        velocity = self.integration.velocity(float(t), y)
        if not torch.isfinite(velocity).all():
            raise Stopped("it diverged", DIVERGED)
        return velocity

    def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.integration.count(float(t), y)
