"""The steps of several optimizers on one network: those that use one backward pass are put together as one `Step`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pathkernel.errors import RecordingError
from pathkernel.recording.announced_batch import Delivery
from pathkernel.recording.joint_step import JointStep, OwnStep, Part
from pathkernel.recording.keyframes import Glance
from pathkernel.recording.loss_scale import loss_scale
from pathkernel.recording.open_step import OpenStep
from pathkernel.recording.optimizers import JointOptimizer, refuse_shared
from pathkernel.recording.readings import Reading, StepHooks
from pathkernel.recording.step_capture import StepCapture, is_scaled
from pathkernel.runtime.interrupts import defer_interrupts
from pathkernel.trajectory.step import MicroBatch, Step


class JointCapture(StepCapture):
    """Puts the steps of several optimizers on record.

    A step begins where the first optimizer is about to move, and ends where the last of them has; or, where some do not
    step, with the next forward or backward pass in training, the next announcement, or the second step of one of them.
    Parameters of those that did not step are inactive in it, whatever gradient they have. Where optimizers step within
    a backward pass, the step ends with that.

    Parameters are those of `StepCapture`; the optimizer is a `JointOptimizer`, and there are no keyframes.

    Attributes
    ----------
    joint
        The step that some of them have taken; None where none has.
    """

    joint: JointStep | None = None
    _stepping: Part | None = None
    _stepped: frozenset[int] = frozenset()
    _members: Any = None
    _has_closure = False

    def _hook(self) -> None:
        optimizers = self._both().optimizers
        self.hooks = [
            StepHooks(one, partial(self._before_own, place), partial(self._after_own, place))
            for place, one in enumerate(optimizers)
        ]
        watcher = self.pending.watcher
        watcher.enters = self._pass_enters
        watcher.ended = partial(self.settle, ended=True)
        if not isinstance(watcher.begins, _Settling):
            watcher.begins = _Settling(self, watcher.begins)
        self.pending.several = True

    @classmethod
    def instead_of(cls, one: StepCapture, optimizer: JointOptimizer) -> JointCapture:
        """Go on from where the only optimizer so far was watched, with another one beside it.

        Raises
        ------
        RecordingError
            In the middle of a batch, and with keyframes.
        """
        if one.keyframes is not None or one.pending.in_flight:
            raise RecordingError(
                "A second optimizer joined "
                + ("a recording with keyframes" if one.keyframes is not None else "between forward pass and step"),
                "It joins between two batches, in a recording that keeps every step",
                "Write `recorder.attach(optimizer)` before the forward pass, or give the recorder both optimizers at "
                "the start",
            )
        last = one.pending.last
        one.live.optimizer = optimizer
        both = cls(
            one._outer,
            one._model,
            optimizer,
            one.live,
            one._trajectory,
            None,
            one._observers,
            one._averages,
            one.audit_every,
            one.pending.inputs.keep,
            one._stopped,
        )
        both.taken, both.changes, both.gradient_changes = one.taken, one.changes, one.gradient_changes
        both.end_of_steps, both._announced, both._tried = one.end_of_steps, one._announced, one._tried
        both.modules.resume(one.modules.constants, one.modules.changed_buffers())
        if one.hooks:
            one.stop()
            both.start()
            if last is not None:
                both.announce(last.batch, last.delivery)
        return both

    def take_over(self, optimizer: Optimizer | JointOptimizer) -> None:
        """Watch other optimizers from now on, of the same rules."""
        self.settle()
        super().take_over(optimizer)

    def _both(self) -> JointOptimizer:
        assert isinstance(self.optimizer, JointOptimizer)
        return self.optimizer

    def parts(self) -> list[Part]:
        """The optimizers, each with its own parameters; listed again only where these change."""
        members = self.live.members
        if members is not self._members:
            both = self._both()
            refuse_shared(both.optimizers)
            found = enumerate(zip(both.optimizers, both.rules, strict=True))
            self._parts = [Part(place, one, rule, both.marks(place), self.live) for place, (one, rule) in found]
            self._members = members
        return self._parts

    # -- between steps ------------------------------------------------------------------------------------------

    def announce(self, batch: MicroBatch, delivery: Delivery) -> None:
        """Take note of the samples of the next backward passes: each optimizer may step once by them."""
        self.settle()
        self._stepped = frozenset()
        super().announce(batch, delivery)

    def record_end_state(self) -> None:
        """Put on record where parameters and buffers stand while the recorder watches."""
        if self.hooks:
            self.settle()
        super().record_end_state()

    def note_change(self, name: str, glance: Glance | None = None) -> None:
        """Put a change of the parameters since they were last seen on record."""
        if self.joint is None:
            super().note_change(name, glance)
        elif self.opened is None and not self.live.is_at(self.joint.at):
            self._note_between(self.joint, name)

    def _note_between(self, joint: JointStep, name: str) -> None:
        now = self.live.vector()
        joint.between.append((name, now.double() - joint.at.double()))
        joint.at = now

    # -- the optimizers' own hooks ------------------------------------------------------------------------------

    def _before_own(self, place: int, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with defer_interrupts():
            self._see_before_own(place, optimizer, args, kwargs)

    def _see_before_own(self, place: int, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last = self.hooks[place].step_begins()
        if self.opened is not None:  # a step that ended with an error
            self.opened, self._stepping = None, None
            if self.joint is not None and not self.joint.own:
                self.joint, self.pending.in_use = None, False
        if self._trajectory.store.stopped:
            self._stopped()
            self._let_go()
            return
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # torch passes the optimizer first
        in_backward = self.pending.watcher.in_backward
        if self.joint is not None:
            again = place in self.joint.own or self.joint.in_backward != in_backward
            if again or closure is not None:  # a closure makes a backward pass of its own
                self.settle()
        if self.joint is None and place in self._stepped:
            self.pending.release()
        # Within a backward pass it is known when that ends which samples it is of.
        known = closure is None and not in_backward
        if self.joint is None:
            joint = self._begun(in_backward, known)
        else:
            joint = self.joint
            if self._loads.state:
                self._check_loads()
                self._loads.state = True  # it may be that of one that has stepped, and then tells of the next step
        part = self.parts()[place]
        before = part.live.vector()
        seen = part.of(joint.at, before)
        gradient = total = unmoved = None
        if closure is None and not is_scaled(optimizer):
            gradient = part.live.gradient()
            total, unmoved = self._sum_and(gradient, lambda: (seen == before).all())
        if not (torch.equal(seen, before) if unmoved is None else unmoved):
            self._note_between(joint, "unexplained")
        if gradient is not None:
            self._check_gradient(gradient, part.live, total)
            if known and not joint.own:
                self._check_first(joint, part, gradient)
        self.joint, self._stepping, self._has_closure = joint, part, closure is not None
        self.pending.in_use = known
        self.opened = OpenStep.of(part.live, part.rule, before, gradient, last)

    def _begun(self, in_backward: bool, known: bool) -> JointStep:
        """A step that the first optimizer is about to begin."""
        self._check_parameters()
        self._check_loads()
        self.pending.scale_of_loss(loss_scale())
        if known:
            self._check_pending()
        self.note_change("unexplained")
        self._observe_averages()
        before = self._last_point()
        return JointStep(before, before.clone(), in_backward)

    def _check_first(self, joint: JointStep, part: Part, gradient: Tensor) -> None:
        """Audit the gradient of the optimizer that moves first, before it does."""
        whole, active = torch.zeros_like(joint.before), part.live.active()
        part.into(whole, gradient)
        self._audit(joint.before, whole, active=active)
        joint.audited = True
        if active:
            self._try_out(self.slim_step(joint.before, whole, active))

    def _after_own(self, place: int, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with defer_interrupts():
            self._see_after_own(place, optimizer)

    def _see_after_own(self, place: int, optimizer: Optimizer) -> None:
        self.hooks[place].step_ended()
        opened, joint, part = self.opened, self.joint, self._stepping
        if opened is None or joint is None or part is None or part.place != place:
            return
        self.opened = self._stepping = None
        live = part.live
        if getattr(optimizer, "found_inf", None) is not None and live.is_at(opened.before):
            return  # a fused optimizer skipped a step that overflowed under loss scaling
        gradient, active = opened.gradient, opened.active
        if gradient is None:
            gradient, active = live.gradient(), live.active()
        reading = Reading(gradient, active, live.settings())
        after = live.vector()
        if reading.settings is not opened.settings or opened.memory is not None:
            reading = self._as_used(opened, after, reading, live, part.rule)
        frozen = opened.frozen(live, part.rule, live.layout, after, reading)
        joint.own[place] = OwnStep(part, opened, after, reading, frozen)
        part.into(joint.at, after)
        if len(joint.own) == len(self.hooks) and not joint.in_backward:
            self.settle()

    def _pass_enters(self) -> None:
        """End the step before a forward pass; not before one with other tensors, which `functional_call` lends."""
        if self.joint is not None:
            found = dict(self._model.named_parameters())
            if all(found.get(name) is p for name, p in self.live.named.items()):
                self.settle()

    # -- the step is put together -------------------------------------------------------------------------------

    def settle(self, ended: bool = False) -> None:
        """End the step that some of the optimizers have taken.

        Parameters
        ----------
        ended
            Whether a backward pass has just ended. One that did not end is none: what optimizers did within it is a
            change outside of them.
        """
        if self.joint is None or self._in_closure or (self.joint.in_backward and self._is_in_backward(ended)):
            return
        self.opened = self._stepping = None  # passes and announcements inside a step come from closures alone
        # It may be called from a forward pass, which the loop makes in mixed precision.
        with defer_interrupts(), torch.autocast(self._trajectory.device.type, enabled=False):
            joint, self.joint, self.pending.in_use = self.joint, None, False
            if joint.own and not self._trajectory.store.stopped:
                if ended or not joint.in_backward:
                    self._settle(joint)
            else:  # all of them skipped a step that overflowed
                self._let_go()

    @property
    def _in_closure(self) -> bool:
        return self.opened is not None and self._has_closure

    def _is_in_backward(self, ended: bool) -> bool:
        return not ended and self.pending.watcher.in_backward

    def _drop_batches(self) -> tuple[MicroBatch, ...]:
        """The batches of a step that is not taken by one optimizer; what others did with them is on record."""
        batches = self.pending.batches
        self.settle()
        self.pending.forget()
        return batches

    def _let_go(self) -> None:
        self.joint, self.pending.in_use = None, False
        self.pending.forget()
        self._forget_edits()

    def _settle(self, joint: JointStep) -> None:
        trajectory, live = self._trajectory, self.live
        self._check_pending(taken=True)
        gradient, active, settings = joint.gradient(), joint.active, joint.settings(self.parts())
        if len(joint.own) > 1 or not joint.audited:
            self._audit(joint.before, gradient, taken=True, active=active)
        after, changes = joint.after()
        step = Step(
            index=len(trajectory),
            before=joint.before,
            after=after,
            gradient=gradient,
            active=active,
            batches=self.pending.batches,
            groups=live.groups,
            hyperparameters=settings,
            frozen=joint.frozen(trajectory.rule, live, gradient, after, settings),
            changes=tuple(self.changes),
            gradient_changes=self._edits(active),
            differentiated=self.pending.differentiated,
            buffers=self.modules.changed_buffers(),
        )
        self._try_out(step)
        self.pending.take()
        self._stepped |= joint.own.keys()
        self.changes, self.gradient_changes, self.end_of_steps = changes, {}, after
        self._keep(step)


class _Settling:
    """Ends a step before a backward pass begins.

    Parameters
    ----------
    capture
        Whose.
    then
        What is called afterwards.
    """

    def __init__(self, capture: JointCapture, then: Any) -> None:
        self._capture, self._then = capture, then

    def __call__(self) -> None:
        self._capture.settle()
        self._then()
