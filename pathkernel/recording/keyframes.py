"""Recording with keyframes: between them only what a replay needs, tried out before it is relied on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel.recording.audit import is_due
from pathkernel.recording.live import LiveParameters
from pathkernel.trajectory.replay import Notes, Replay, abridged, checksum, state_of
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.trajectory import Trajectory

GLANCE = 256
"""Entries of each parameter that are compared before every step."""

STORED = 0
"""Divisor of steps whose gradient is stored, since a replay does not find it."""


def is_tried(index: int, every: int | None) -> bool:
    """Whether a step of a known kind is tried out: where steps are audited, or, for None, at steps 0, 1, 4, 16, … ."""
    if every is None:
        return is_due(index, None) and index.bit_length() % 2 == (index > 0)
    return is_due(index, every)


class GradientWatch:
    """Tells whether gradients are finite, and whether they were touched between their arrival and the step.

    Clipping, unscaling, noise and the like write on gradients in place, which torch counts, or put others there. They
    are added up when they arrive, while the processor still has them at hand.

    Parameters
    ----------
    live
        The parameters in training.
    """

    def __init__(self, live: LiveParameters) -> None:
        self.live = live
        self._handles: dict[int, Any] = {}
        self._arrived: dict[int, tuple[int, int]] = {}
        self._sums: dict[int, Tensor] = {}

    def listen(self) -> None:
        """Hook on to the parameters; those that are unfrozen later are met at the next call."""
        for p in self.live.named.values():
            if p.requires_grad and id(p) not in self._handles:
                self._handles[id(p)] = p.register_post_accumulate_grad_hook(self._arrive)

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._arrived, self._sums = {}, {}, {}

    def touched(self) -> bool:
        """Whether some gradient is not what arrived; forgets what arrived."""
        arrived, self._arrived = self._arrived, {}
        seen = [(id(p), p.grad) for p in self.live.named.values() if p.grad is not None]
        return any(arrived.get(key) != (id(gradient), gradient._version) for key, gradient in seen)

    def are_finite(self) -> bool:
        """Whether no gradient that arrived holds NaN or infinity, as far as its sum tells; forgets what arrived."""
        sums, self._sums = self._sums, {}
        return math.isfinite(sum(total.item() for total in sums.values()))

    def _arrive(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if gradient is not None:
            self._arrived[id(parameter)] = (id(gradient), gradient._version)
            self._sums[id(parameter)] = gradient.detach().sum(dtype=gradient.dtype)


class KeyframeKeeper:
    """Decides for every step what has to be kept of it, and tries out whether a replay gives it back.

    A step is tried out where it is of a new kind (number of micro-batches, modes, parameters with a gradient …) and
    now and then, see `is_tried`: it is recorded whole and taken once more, and has to agree to the last bit. Where
    gradients do not, they are stored; where the optimizer's step does not, steps are stored in full from there on. A
    warning tells of either.

    Parameters
    ----------
    trajectory, live, optimizer
        The run.
    every
        Steps from one keyframe to the next.

    Attributes
    ----------
    gave_up
        Whether steps have to be stored in full from now on.
    is_open
        Whether a step is being taken of which only what a replay needs is recorded.

    Notes
    -----
    Time per step: a checksum of θ, and the sum of its gradient; per keyframe: a copy of θ and the optimizer's state.
    """

    def __init__(self, trajectory: Trajectory, live: LiveParameters, optimizer: Optimizer, every: int) -> None:
        self.trajectory, self.live, self.optimizer, self.every = trajectory, live, optimizer, every
        self.replay = Replay(trajectory, optimizer)
        self.watch = GradientWatch(live)
        self.gave_up = self.is_open = False
        self._divisors: dict[Hashable, int] = {}
        self._warned: set[str] = set()
        self._start: int | None = None
        self._checksum: int | None = None
        self._seen: tuple[list[tuple[int, int]], Tensor] | None = None
        self._places: list[int] = []
        self._beginnings: list[Tensor] = []
        self._opened = OpenReplay()

    # -- the life of a recording --------------------------------------------------------------------------------

    def start(self) -> None:
        """Recording begins or goes on: the next step is a keyframe."""
        self._start = None
        if self._checksum is None:  # else changes between two recordings are seen by it
            self._checksum = checksum(self.live.named.values())
        self.watch.listen()

    def stop(self) -> None:
        """Take the hooks off."""
        self.watch.stop()

    def moved(self) -> bool:
        """Whether θ is no longer what it was when this was last asked, or after the last step.

        torch counts what is written on a tensor, but for what is written through ``.data``. That is looked for at the
        beginning of each parameter; elsewhere it is found when the step is replayed, and refused.
        """
        seen, self._seen = self._seen, self._glance()
        if seen is not None and seen[0] == self._seen[0] and torch.equal(seen[1], self._seen[1]):
            return False
        before, self._checksum = self._checksum, checksum(self.live.named.values())
        return before != self._checksum

    def _glance(self) -> tuple[list[tuple[int, int]], Tensor]:
        """Where parameters lie, how often they were written on, and how they begin."""
        parameters = list(self.live.named.values())
        places = [(p.data_ptr(), p._version) for p in parameters]
        if [place for place, _ in places] != self._places:
            self._places = [place for place, _ in places]
            self._beginnings = [
                p.detach().as_strided((min(GLANCE, p.numel()),), (1,), p.storage_offset()) for p in parameters
            ]
        return places, torch.cat(self._beginnings)

    # -- before the step ----------------------------------------------------------------------------------------

    def before(
        self, index: int, batches: Sequence[MicroBatch], known: bool, due: bool, edited: bool, theta: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Take from before a step what a replay needs of it: θ and gradient, each empty where it is not needed.

        Parameters
        ----------
        index
            s.
        batches
            Those whose gradients have arrived.
        known
            Whether the gradient has arrived, or does so inside the step.
        due
            Whether steps of a known kind are tried out, too.
        edited
            Whether the gradient was edited under a name.
        theta
            θ after changes that were made outside the optimizer, where there were any.
        """
        if self._start is None or index - self._start >= self.every:
            self._start = index
        live = self.live
        touched = self.watch.touched() or edited
        kind = (touched, live.active(), *map(_kind, batches)) if known else None
        trial = due or kind not in self._divisors
        stored = known and (touched or self._divisors.get(kind) == STORED)
        self._opened = OpenReplay(kind, trial, known, touched, stored)
        if trial or self._start == index:
            self._opened.before = live.vector() if theta is None else theta
            self._opened.state = state_of(self.optimizer, live.named)
        if stored or (trial and known):
            self._opened.gradient = live.gradient()
        self.is_open = not trial
        return self.vectors

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """θ and gradient from before the step that is being taken, each empty where it is not needed."""
        nothing = torch.empty(0, dtype=self.trajectory.dtype)
        theta, gradient = self._opened.before, self._opened.gradient
        return nothing if theta is None else theta, nothing if gradient is None else gradient

    @property
    def trial(self) -> bool:
        """Whether the step that is being taken is tried out, for which it has to be recorded whole."""
        return self._opened.trial

    def explains(self, step: Step) -> bool:
        """Try out whether the announced batches give the gradient at hand to the last bit.

        Where they do not, gradients of such steps are stored from now on.
        """
        opened = self._opened
        assert opened.state is not None
        for divisor in () if opened.touched else dict.fromkeys((1, len(step.batches))):
            self.replay.restore(step.before, opened.state)
            self.replay.differentiate(step, divisor)
            if torch.equal(self.replay.gradient(), step.gradient):
                self._divisors[opened.kind] = divisor
                return True
        opened.stored = True
        self._divisors[opened.kind] = STORED
        self._warn(
            "gradient",
            f"The batches of step {step.index} do not give its gradient again to the last bit",
            "A replay runs forward and backward passes as they were recorded, without what a loop does to gradients "
            "afterwards, such as clipping; so the gradients of such steps are stored",
        )
        return False

    # -- after the step -----------------------------------------------------------------------------------------

    def after(self, step: Step) -> Step:
        """What is kept of a step, in full where it was tried out."""
        self.is_open = False
        self._checksum, self._seen = checksum(self.live.named.values()), self._glance()
        self.watch.listen()
        opened = self._opened
        assert self._start is not None
        divisor = self._divisors.setdefault(opened.kind, 1)
        notes = Notes(self._start, self._checksum, max(1, divisor))
        if opened.trial and not self._gives_back(step, notes):
            self.gave_up = True
            self._warn(
                "step",
                f"Step {step.index} of {self.trajectory.rule.name} does not come out again to the last bit",
                "A replay calls `optimizer.step()` on a copy of the optimizer, without a closure; so this step and "
                "those after it are stored in full",
            )
            return step
        keyframe = opened.state if self._start == step.index else None
        return abridged(step, notes, keyframe=keyframe, gradient=opened.stored)

    def _gives_back(self, step: Step, notes: Notes) -> bool:
        opened = self._opened
        assert opened.state is not None
        self.replay.restore(step.before, opened.state)
        try:  # a gradient that was there before the step has been tried out already
            again = self.replay.take(abridged(step, notes, keyframe=opened.state, gradient=opened.known))
        except (RuntimeError, TypeError, KeyError, AttributeError):  # an optimizer that does not step by itself
            return False
        return torch.equal(again.gradient, step.gradient) and self.replay.checksum() == notes.checksum

    def _warn(self, what: str, found: str, reason: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"{found}. {reason}. Nothing is lost but room.", stacklevel=2)


@dataclass
class OpenReplay:
    """What is known of a step before it is taken.

    Attributes
    ----------
    kind
        Steps of one kind are replayed in one way.
    trial, known, touched, stored
        Whether it is tried out; whether its gradient had arrived, has been touched since, and is kept.
    before, state, gradient
        θ, the optimizer's state and the gradient, where they are needed.
    """

    kind: Hashable = None
    trial: bool = False
    known: bool = False
    touched: bool = False
    stored: bool = False
    before: Tensor | None = None
    state: Mapping[str, Mapping[str, Any]] | None = None
    gradient: Tensor | None = None


def _kind(batch: MicroBatch) -> Hashable:
    return batch.weights is None, batch.inputs is None, repr(batch.state.modes), batch.state.autocast
