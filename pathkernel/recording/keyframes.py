"""Recording with keyframes: between them only what a replay needs, tried out before it is relied on."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel.errors import InputError
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.recording.audit import is_due
from pathkernel.recording.forward import others_listen
from pathkernel.recording.live import LiveParameters
from pathkernel.runtime.checksum import digest, finished
from pathkernel.runtime.transfers import on_the_host
from pathkernel.trajectory.replay import Replay, abridged, state_of
from pathkernel.trajectory.run import Run
from pathkernel.trajectory.step import MicroBatch, ReplayNotes, Step

STORED = 0
"""Divisor of steps whose gradient is stored, since a replay does not find it."""


def is_tried(index: int, every: int | None) -> bool:
    """True where a step of a known kind is tried out: where steps are audited; for None, at steps 0, 1, 4, 16, … ."""
    if every is None:
        return is_due(index, None) and index.bit_length() % 2 == (index > 0)
    return is_due(index, every)


class Mark(NamedTuple):
    """Knows a gradient again, unless it was written on."""

    tensor: weakref.ref[Tensor]
    version: int
    contents: int | Tensor | None = None

    def fits(self, gradient: Tensor) -> bool:
        """True while the gradient is still the same."""
        return self.tensor() is gradient and self.version == gradient._version


class Glance(NamedTuple):
    """Answers that are wanted before a step of θ and its gradient; off the CPU it is read in one transfer."""

    theta: int
    """Checksum of θ."""
    gradient: int
    """Checksum of the gradient."""
    finite: bool
    """Whether the gradient holds numbers alone, as `LiveParameters.gradient_is_finite` tells."""


class GradientWatch:
    """Tells whether gradients were touched between their arrival and the step.

    Clipping, unscaling, noise and the like write on gradients in place, or put others there. torch counts the former,
    but not through ``.data``, so checksums are compared, too. Normally one parameter has a hook, which has all
    gradients looked at when the backward pass ends. Where that does not tell (a pass that leaves it out, or gradients
    that are indeed touched), every parameter gets one.

    Parameters
    ----------
    live
        The parameters in training.
    """

    def __init__(self, live: LiveParameters) -> None:
        self.live = live
        self._everywhere = False
        self._handles: dict[int, Any] = {}
        self._arrived: dict[int, Mark] = {}
        self._old: dict[int, Mark] = {}
        self.contents: int | Tensor | None = None
        """Digest of the gradient when it had arrived."""

    def listen(self) -> None:
        """A step has been taken or will be: hook on to the parameters, and know gradients from before again."""
        parameters = self.live.named.values()
        if not self._handles:  # hooks of others may write on gradients before the backward pass ends
            self._everywhere = any(others_listen(p) for p in parameters)
        for p in parameters:
            if p.requires_grad:
                if id(p) not in self._handles:
                    self._handles[id(p)] = p.register_post_accumulate_grad_hook(self._arrive)
                if not self._everywhere:
                    break
        self._old = self._marks()

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._arrived, self._old, self.contents = {}, {}, {}, None

    def touched(self, checksum_now: int | None) -> bool:
        """True where some gradient is not what arrived; forgets what arrived.

        Parameters
        ----------
        checksum_now
            That of the gradient, None where it arrives inside the step.
        """
        arrived, self._arrived = self._arrived, {}
        contents, self.contents = self.contents, None
        present = self._present()
        for key, gradient in present:
            if key not in arrived or not arrived[key].fits(gradient):
                self._everywhere = True
                return True
            if key in self._old and self._old[key].fits(gradient):  # was there before
                return True
        if self._everywhere:
            came = [mark.contents for key, _ in present if (mark := arrived[key]).contents is not None]
            found = finished([*came, *(digest([gradient]) for _, gradient in present)])
            return found[: len(came)] != found[len(came) :]
        return contents is not None and checksum_now is not None and finished([contents]) != [checksum_now]

    def _present(self) -> list[tuple[int, Tensor]]:
        return [(id(p), p.grad) for p in self.live.named.values() if p.grad is not None]

    def _marks(self) -> dict[int, Mark]:
        return {key: Mark(weakref.ref(gradient), gradient._version) for key, gradient in self._present()}

    def _arrive(self, parameter: nn.Parameter) -> None:
        if not self._everywhere:
            torch.autograd.Variable._execution_engine.queue_callback(self._all_arrived)
        elif (gradient := parameter.grad) is not None:
            self._arrived[id(parameter)] = Mark(weakref.ref(gradient), gradient._version, digest([gradient]))

    def _all_arrived(self) -> None:
        self._arrived = self._marks()
        self.contents = self.live.gradient_digest()


class KeyframeKeeper:
    """Decides for every step what has to be kept of it, and tries out whether a replay gives it back.

    A step is tried out where it is of a new kind (number of micro-batches, modes, parameters with a gradient …) and
    now and then, see `is_tried`: it is recorded whole and taken once more, and has to agree to the last bit. Where
    gradients do not, they are stored; where the optimizer's step does not, steps are stored in full from there on. A
    warning tells of either.

    Parameters
    ----------
    run, live, optimizer
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
    Time per step: checksums of θ and of its gradient; per keyframe: a copy of θ and the optimizer's state.
    """

    def __init__(self, run: Run, live: LiveParameters, optimizer: Optimizer, every: int) -> None:
        self.live, self.optimizer, self.every = live, optimizer, every
        self.replay = Replay(run, optimizer)
        self.watch = GradientWatch(live)
        self.gave_up = self.is_open = False
        self._divisors: dict[Hashable, int] = {}
        self._warned: set[str] = set()
        self._start: int | None = None
        self._checksum: int | None = None
        self._opened = OpenReplay()

    # -- the life of a recording --------------------------------------------------------------------------------

    def start(self) -> None:
        """Recording begins or goes on: the next step is a keyframe."""
        self._start = None
        if self._checksum is None:  # else changes between two recordings are seen by it
            self._checksum = self.live.checksum()
        self.watch.listen()

    def stop(self) -> None:
        """Take the hooks off."""
        self.watch.stop()
        self.is_open = False

    def glance(self) -> Glance:
        """Read what a step whose gradient has arrived asks of the device."""
        contents = [] if self.watch.contents is None else [self.watch.contents]
        asked = [self.live.digest(), self.live.gradient_digest(), self.live.gradient_is_finite(), *contents]
        theta, gradient, finite, *contents = on_the_host(asked)
        if contents:
            (self.watch.contents,) = finished(contents)
        theta, gradient = finished([theta, gradient])
        return Glance(theta, gradient, bool(finite))

    def moved(self, now: int | None = None) -> bool:
        """True where θ is no longer what it was when this was last asked, or after the last step.

        Its checksum ``now`` is taken where it is not given. All of θ is looked at: torch does not count what is written
        through ``.data`` (nor what fused optimizers write), and a change that is missed cannot be replayed.
        """
        before, self._checksum = self._checksum, self.live.checksum() if now is None else now
        return before != self._checksum

    @property
    def checksum(self) -> int:
        """Checksum of θ when it was last looked at."""
        assert self._checksum is not None
        return self._checksum

    def warn_of_change(self, index: int) -> None:
        """Say once that θ is stored where it is changed outside the optimizer and under no name."""
        self._warn(
            "change",
            f"Weights were changed outside the optimizer before step {index}",
            "A replay cannot change them again; so θ is stored in full wherever that happens, and the change is booked "
            'as "unexplained" unless it is made inside `with recorder.channel("name")`',
        )

    # -- before the step ----------------------------------------------------------------------------------------

    def before(
        self,
        index: int,
        batches: Sequence[MicroBatch],
        received: int | None,
        due: bool,
        edited: bool,
        theta: Tensor | None,
        watched: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Take from before a step what a replay needs of it: θ and gradient, each empty where it is not needed.

        Parameters
        ----------
        index
            s.
        batches
            Those whose gradients have arrived.
        received
            Checksum of the gradient, None where it arrives inside the step.
        due
            Whether steps of a known kind are tried out, too.
        edited
            Whether the gradient was edited under a name.
        theta
            θ after changes that were made outside the optimizer, where there were any.
        watched
            Whether observers see every step, for which it has to be recorded whole.
        """
        if self._start is None or index - self._start >= self.every:
            self._start = index
        live = self.live
        known = received is not None
        touched = self.watch.touched(received) or edited
        kind = (touched, live.active(), *map(_kind, batches)) if known else None
        trial = due or kind not in self._divisors
        stored = known and (touched or self._divisors.get(kind) == STORED)
        whole = trial or watched
        self._opened = OpenReplay(kind, trial, whole, known, touched, stored)
        if whole or self._start == index:
            self._opened.before = live.vector() if theta is None else theta
        if trial or self._start == index:
            self._opened.state = state_of(self.optimizer, live.named)
        if stored or (whole and known):
            self._opened.gradient = live.gradient()
        self._opened.received = received
        self.is_open = not whole
        return self.vectors

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """θ and gradient from before the step that is being taken, each empty where it is not needed."""
        nothing = torch.empty(0, dtype=self.replay.run.dtype)
        theta, gradient = self._opened.before, self._opened.gradient
        return nothing if theta is None else theta, nothing if gradient is None else gradient

    @property
    def trial(self) -> bool:
        """True where the step that is being taken is tried out, for which it has to be recorded whole."""
        return self._opened.trial

    @property
    def whole(self) -> bool:
        """True where the step that is being taken is recorded whole."""
        return self._opened.whole

    def explains(self, step: Step) -> bool:
        """Try out whether the announced batches give the gradient at hand to the last bit.

        Where they do not, gradients of such steps are stored from now on.
        """
        opened = self._opened
        assert opened.state is not None
        for divisor in () if opened.touched else dict.fromkeys((1, len(step.batches))):
            self.replay.restore(step.before, opened.state)
            with generators_untouched():  # Python's and numpy's, too: a pass is the loop's again afterwards
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
        """The step as it is kept, in full where it was tried out."""
        self.is_open = False
        self._checksum = self.live.checksum()
        self.watch.listen()
        opened = self._opened
        assert self._start is not None
        divisor = self._divisors.setdefault(opened.kind, 1)
        # Where the gradient only arrives inside the step, it still lies there.
        received = opened.received if opened.known else self.live.gradient_checksum()
        notes = ReplayNotes(self._start, self._checksum, None if opened.stored else received, max(1, divisor))
        if opened.trial and not self._gives_back(step, notes):
            self.gave_up = True
            self._warn(
                "step",
                f"Step {step.index} of {self.replay.run.rule.name} does not come out again to the last bit",
                "A replay calls `optimizer.step()` on a copy of the optimizer, without a closure; so this step and "
                "those after it are stored in full",
            )
            return step
        keyframe = opened.state if self._start == step.index else None
        return abridged(step, notes, keyframe=keyframe, gradient=opened.stored)

    def _gives_back(self, step: Step, notes: ReplayNotes) -> bool:
        opened = self._opened
        assert opened.state is not None
        self.replay.restore(step.before, opened.state)
        try:  # a gradient that was there before the step has been tried out already
            with generators_untouched():
                again = self.replay.take(abridged(step, notes, keyframe=opened.state, gradient=opened.known))
        except (RuntimeError, TypeError, KeyError, AttributeError, InputError):
            return False  # an optimizer that does not step by itself, such as those of `pathkernel.optimizers`
        return torch.equal(again.gradient, step.gradient) and self.replay.checksum() == notes.checksum

    def _warn(self, what: str, found: str, reason: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"{found}. {reason}. Nothing is lost but room.", stacklevel=2)


@dataclass
class OpenReplay:
    """A step that is being taken, as far as a replay has to know it before.

    Attributes
    ----------
    kind
        Steps of one kind are replayed in one way.
    trial, whole, known, touched, stored
        Whether it is tried out; whether it is recorded whole; whether its gradient had arrived, has been touched since,
        and is kept.
    received
        Checksum of the gradient, where it had arrived.
    before, state, gradient
        θ, the optimizer's state and the gradient, where they are needed.
    """

    kind: Hashable = None
    trial: bool = False
    whole: bool = False
    known: bool = False
    touched: bool = False
    stored: bool = False
    received: int | None = None
    before: Tensor | None = None
    state: Mapping[str, Mapping[str, Any]] | None = None
    gradient: Tensor | None = None


def _kind(batch: MicroBatch) -> Hashable:
    return batch.weights is None, batch.inputs is None, repr(batch.state.modes), batch.state.autocast
