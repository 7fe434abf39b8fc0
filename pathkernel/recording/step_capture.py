"""The steps of a recording: what the optimizer's own hooks find before and after each, put together as a `Step`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel.recording.announced_batch import Delivery
from pathkernel.recording.audit import is_due
from pathkernel.recording.compiled import check_random_numbers
from pathkernel.recording.kept_inputs import KeptInputs
from pathkernel.recording.keyframes import Glance, KeyframeKeeper, is_tried
from pathkernel.recording.live import LiveParameters
from pathkernel.recording.loading import LoadWatch, check_memory_is_told
from pathkernel.recording.loss_scale import loss_scale
from pathkernel.recording.micro_batches import PendingBatches
from pathkernel.recording.modules import WatchedModules
from pathkernel.recording.observing import show
from pathkernel.recording.open_step import OpenStep
from pathkernel.recording.optimizers import JointOptimizer, held
from pathkernel.recording.readings import Reading, StepHooks, TakenStep, best_reading, readings
from pathkernel.recording.sources import Sources
from pathkernel.recording.step_checks import StepChecks
from pathkernel.recording.strangers import StrangerWatch
from pathkernel.runtime.interrupts import defer_interrupts
from pathkernel.runtime.threads import on_the_cpu
from pathkernel.trajectory.cotangents import kept_cotangents
from pathkernel.trajectory.observer import StepObserver
from pathkernel.trajectory.step import LOADED, MicroBatch, Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import Frozen, UpdateRule


class StepCapture(StepChecks):
    """Puts steps on record, as two hooks on the optimizer find them, and what changes between them.

    Parameters
    ----------
    outer, model
        The module that the loop calls, and the network inside it.
    optimizer, live
        The optimizer, and its parameters.
    trajectory
        The record.
    keyframes
        The keeper of what a replay needs, where steps are trained again when they are read; else None.
    observers, averages, audit_every, keep
        As `pathkernel.KernelRecorder` takes them.
    stopped
        Called before a step that is not recorded, since the disk gave out or this is a forked child.

    Attributes
    ----------
    hooks
        Those on the optimizer, while it is watched.
    opened
        The step that is being taken.
    taken
        Number of steps taken.
    changes, gradient_changes
        What was done outside the optimizer since the last step; see `pathkernel.trajectory.step.Step`.
    end_of_steps
        θ after the last step, (P,).
    """

    def __init__(
        self,
        outer: nn.Module,
        model: nn.Module,
        optimizer: Optimizer | JointOptimizer,
        live: LiveParameters,
        trajectory: Trajectory,
        keyframes: KeyframeKeeper | None,
        observers: Sequence[StepObserver],
        averages: Mapping[str, nn.Module | Mapping[str, Tensor]],
        audit_every: int | None,
        keep: bool | None,
        stopped: Callable[[], None],
    ) -> None:
        self.live, self.keyframes, self.audit_every = live, keyframes, audit_every
        self._outer, self._model, self.optimizer, self._trajectory = outer, model, optimizer, trajectory
        self._observers, self._averages, self._stopped = observers, averages, stopped
        run = trajectory.run
        self.modules = WatchedModules(model, run.constants)
        function = run.function()
        parts = [outer] if not run.watch else [model.get_submodule(name) for name in run.watch]
        self.pending = PendingBatches(
            parts,
            run.watch,
            live,
            run.rule.stages,
            self.modules,
            function,
            KeptInputs(run.data, function, keep),
            Sources(trajectory),
            self._kept,
            self._forget_edits,
        )
        self.hooks: list[StepHooks] = []
        self.opened: OpenStep | None = None
        self.taken = 0
        self.changes: list[tuple[str, Tensor]] = []
        self.gradient_changes: dict[str, Tensor] = {}
        self.end_of_steps = trajectory.initial
        self._loads = LoadWatch(
            model,
            before=partial(self._note_load, "unexplained"),
            after=partial(self._note_load, LOADED),
            of_optimizer=self._note_loaded_state,
        )
        self._marks: list[int | None] = []  # checksums of θ before each of the changes, with keyframes
        self._announced: tuple[MicroBatch | None, MicroBatch | None] = None, None  # last, and the one before
        self._tried = False
        self._strangers = StrangerWatch(model, self._is_idle)

    def start(self) -> None:
        """Hook into the optimizer."""
        self._hook()
        self._strangers.start(held(self.optimizer))
        self.pending.start()
        self._loads.start(held(self.optimizer))
        if self.keyframes is not None:
            self.keyframes.start()

    def _hook(self) -> None:
        (optimizer,) = held(self.optimizer)
        self.hooks = [StepHooks(optimizer, self._before_step, self._after_step)]

    def _unhook(self) -> None:
        for hooks in self.hooks:
            hooks.remove()
        self.hooks = []

    def take_over(self, optimizer: Optimizer | JointOptimizer) -> None:
        """Watch another optimizer from now on, of the same rule."""
        self.optimizer = self.live.optimizer = optimizer
        if self.keyframes is not None and isinstance(optimizer, Optimizer):
            self.keyframes.optimizer = optimizer
        if self.hooks:
            self._unhook()
            self._hook()
            self._strangers.start(held(optimizer))
            self._loads.start(held(optimizer))

    def stop(self) -> None:
        """Take all hooks off."""
        self._unhook()
        self._strangers.stop()
        self.pending.stop()
        self._loads.stop()
        if self.keyframes is not None:
            self.keyframes.stop()

    def _is_idle(self) -> bool:
        """True where a step of an optimizer that is not the recorder's own would go unseen."""
        in_step = self.opened is not None or (self.keyframes is not None and self.keyframes.is_open)
        return not in_step and self.pending.watcher.channel is None and not self._trajectory.store.stopped

    # -- between steps ------------------------------------------------------------------------------------------

    def announce(self, batch: MicroBatch, delivery: Delivery) -> None:
        """Take note of the samples of the next backward pass; see `PendingBatches.announce`."""
        self._announced = self._announced[1], batch
        # Where the gradient will be audited, θ at the forward pass is known again at the step.
        due = self.hooks and is_due(self.taken, self.audit_every)
        self.pending.watcher.checked = self.live.checksum if due else None
        self.pending.announce(batch, delivery)

    def _kept(self, cotangents: Tensor, batch: MicroBatch) -> tuple[Tensor | None, Tensor | None]:
        """The part of λ that is kept, whole or sampled."""
        run = self._trajectory.run
        # Of samples whose targets are not at hand no loss is evaluated again.
        unknown = run.objective.known is not None and (run.data.announced or not batch.has_targets)
        objective = replace(run.objective, loss=None) if unknown else run.objective
        return kept_cotangents(cotangents, run.layout.size, objective)

    def _forget_edits(self) -> None:
        self.gradient_changes = {}

    def record_end_state(self) -> None:
        """Put on record where parameters and buffers stand while the recorder watches."""
        if self.hooks and self.opened is None and not self._trajectory.store.stopped:
            self.note_change("unexplained")
            self._observe_averages()
            end, buffers = self._trajectory.end, self.modules.changed_buffers()
            self._trajectory.stand(replace(end, tail=tuple(self.changes), final_buffers=buffers))

    def _observe_averages(self) -> None:
        """Observe how the averages moved after the last step."""
        trajectory = self._trajectory
        for name, source in self._averages.items():
            record, last = trajectory.averages[name], len(trajectory) - 1
            if len(record.updates) == last:
                record.observe(source, trajectory.layout, last, self.end_of_steps, self._last_point())

    def note_change(self, name: str, glance: Glance | None = None) -> None:
        """Put a change of the parameters since they were last seen on record.

        One that ends where another began takes that one and all between them back: averages that are swapped in for
        validation leave nothing.
        """
        keeper = self.keyframes
        if keeper is None:
            if self.live.is_at(self._last_point()):
                return
            points = [self.end_of_steps, *(point for _, point in self.changes[:-1])]
            back = [place for place, point in enumerate(points) if self.changes and self.live.is_at(point)]
        else:
            unknown = [None] * (len(self.changes) - len(self._marks))
            self._marks = [*unknown, *self._marks[: len(self.changes)], keeper.checksum]
            if not keeper.moved(None if glance is None else glance.theta):
                self._marks.pop()
                return
            back = [place for place, mark in enumerate(self._marks) if mark == keeper.checksum]
            del self._marks[back[-1] if back else len(self._marks) :]
        if back:
            del self.changes[back[-1] :]
            return
        self.changes.append((name, self.live.vector()))
        if keeper is not None and name == "unexplained":
            keeper.warn_of_change(self.taken)

    def _note_load(self, name: str) -> None:
        """Note what changed before weights are loaded, and what was loaded."""
        if self.opened is None and not self._trajectory.store.stopped:
            self.note_change(name)

    def _note_loaded_state(self) -> None:
        """The next step begins from another state of the optimizer, which a replay has to be given."""
        if self.keyframes is not None:
            self.keyframes.start()

    def _check_loads(self) -> None:
        """Before a step: what was loaded since the last one is on record, and can be."""
        self._loads.finish()
        if self._loads.parameters:
            self._check_same()
        if self._loads.state:
            check_memory_is_told(self._trajectory.rule, self.taken)
            self.note_change("unexplained")
            if all(name != LOADED for name, _ in self.changes):  # tells whose the memory is
                known = self.changes or self.keyframes is None
                self.changes.append((LOADED, self._last_point() if known else self.live.vector()))
        self._loads.reset()

    def _last_point(self) -> Tensor:
        return self.changes[-1][1] if self.changes else self.end_of_steps

    # -- the optimizer's own hooks ----------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with defer_interrupts(), on_the_cpu():
            self._see_before(optimizer, args, kwargs)

    def _see_before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last = all([hooks.step_begins() for hooks in self.hooks])
        if self._trajectory.store.stopped:  # the disk gave out, or this is a forked child; training goes on
            self._stopped()
            self.pending.forget()
            return
        self._check_parameters()
        self._check_loads()
        self.pending.scale_of_loss(loss_scale())
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # torch passes the optimizer first
        scaled = is_scaled(optimizer)
        keeper, gradient, glance, unmoved = self.keyframes, None, None, None
        # With a closure, forward and backward run inside the step: gradient and batch are only known afterwards.
        if closure is None:
            self._check_pending()
            if not self._tried:
                check_random_numbers(self._outer, self.pending.batches)
            # Now, where the gradient is there already: some implementations (SGD's foreach Nesterov) write on it. A
            # fused optimizer under loss scaling skips overflowed steps and divides by the scale by itself.
            if not scaled and keeper is not None:
                glance = keeper.glance()
            if not scaled and (glance is None or not glance.finite):
                gradient = self.live.gradient()
                compared = partial(self.live.seems_at, self._last_point()) if keeper is None else None
                total, unmoved = self._sum_and(gradient, compared)
                self._check_gradient(gradient, self.live, total)
        if unmoved is not True:
            self.note_change("unexplained", glance)
        self._observe_averages()
        explained = False
        if keeper is None:
            before = self._last_point()  # one tensor for the end of a step and the start of the next
        else:
            known = glance is not None
            before, gradient = self._before_replayed(keeper, glance)
            if not keeper.whole:
                return
            explained = known and keeper.trial and keeper.explains(self.slim_step(before, gradient))
            gradient = gradient if known else None
        if gradient is not None and not explained:
            self._audit(before, gradient)
        if gradient is not None and self._is_untried and not self._gradient_is_elsewhere:
            self._try_out(self.slim_step(before, gradient))
        self.opened = OpenStep.of(self.live, self._trajectory.rule, before, gradient, last)

    def _before_replayed(self, keeper: KeyframeKeeper, glance: Glance | None) -> tuple[Tensor, Tensor]:
        """θ and gradient as far as a replay needs them."""
        return keeper.before(
            self.taken,
            self.pending.batches,
            None if glance is None else glance.gradient,
            due=is_tried(self.taken, self.audit_every),
            edited=bool(self.gradient_changes),
            # Observed steps are all recorded whole, so that the end of the last one is at hand.
            theta=self._last_point() if self.changes or self._observers else None,
            watched=bool(self._observers),
        )

    def slim_step(self, before: Tensor, gradient: Tensor, active: frozenset[str] | None = None) -> Step:
        """The step at hand as far as a replay, or an audit of some parameters, needs it."""
        return Step(
            index=self.taken,
            before=before,
            after=before[:0],
            gradient=gradient,
            active=self.live.active() if active is None else active,
            batches=self.pending.batches,
            groups=self.live.groups,
            hyperparameters=self.live.settings(),
            changes=tuple(self.changes),
            gradient_changes=self._edits(active),
            differentiated=self.pending.differentiated,
            buffers=self.modules.changed_buffers(),
        )

    def _edits(self, active: frozenset[str] | None) -> dict[str, Tensor]:
        """Changes of gradients under a name, of some parameters or of all."""
        if active is None or not self.gradient_changes:
            return self.gradient_changes
        mask = torch.zeros_like(self.end_of_steps)
        for name in active:
            mask[self.live.layout.slices[name]] = 1.0
        return {name: change * mask for name, change in self.gradient_changes.items()}

    def _is_empty(self, optimizer: Any, closure: bool) -> bool:
        """True for a step that may have moved nothing: it overflowed, or its closure made no backward pass."""
        return getattr(optimizer, "found_inf", None) is not None or (closure and not self.live.active())

    def _after_replayed(self, keeper: KeyframeKeeper) -> None:
        if self._is_empty(self.optimizer, closure=True) and not keeper.moved():
            self.pending.forget()
            self._forget_edits()
            return
        self._check_pending(taken=True)
        step = self.slim_step(*keeper.vectors)
        self.pending.take()
        self.changes, self.gradient_changes = [], {}
        if self._averages:  # how they move is seen from θ
            self.end_of_steps = self.live.vector()
        self._keep(step)

    def _keep(self, step: Step) -> None:
        """Put a step on record."""
        keeper = self.keyframes
        # Where steps are joined, the record counts fewer.
        whole = replace(step, index=self.taken) if self._observers else step
        if keeper is not None:
            step = keeper.after(step)
            if keeper.gave_up:
                keeper.stop()
                self.keyframes = None
        self.taken += 1
        self._trajectory.store.append(step)
        show(whole, self._observers, self._trajectory)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with defer_interrupts(), on_the_cpu():  # a step is on record whole, or not at all
            self._see_after(optimizer)

    def _see_after(self, optimizer: Optimizer) -> None:
        for hooks in self.hooks:
            hooks.step_ended()
        if self.keyframes is not None and self.keyframes.is_open:
            self._after_replayed(self.keyframes)
            return
        if self.opened is None:
            return
        opened, self.opened = self.opened, None
        before = opened.before
        trajectory = self._trajectory
        if self._is_empty(optimizer, closure=opened.gradient is None) and self.live.is_at(before):
            # A fused optimizer skipped a step that overflowed under loss scaling, or a framework a batch.
            self.pending.forget()
            self._forget_edits()
            return
        self._check_pending(taken=True)
        live, gradient, active = self.live, opened.gradient, opened.active
        if gradient is None:
            gradient, active = live.gradient(), live.active()
        reading = Reading(gradient, active, live.settings())
        after = live.vector()
        if reading.settings is not opened.settings or opened.memory is not None:
            reading = self._as_used(opened, after, reading, live, trajectory.rule)
        if opened.gradient is None:
            self._audit(before, reading.gradient, taken=True)
        step = Step(
            index=len(trajectory),
            before=before,
            after=after,
            gradient=reading.gradient,
            active=reading.active,
            batches=self.pending.batches,
            groups=live.groups,
            hyperparameters=reading.settings,
            frozen=opened.frozen(live, trajectory.rule, trajectory.layout, after, reading),
            changes=tuple(self.changes),
            gradient_changes=self.gradient_changes,
            differentiated=self.pending.differentiated,
            buffers=self.modules.changed_buffers(),
        )
        self._try_out(step)
        self.pending.take()
        self.changes, self.gradient_changes, self.end_of_steps = [], {}, after
        self._keep(step)

    def _as_used(
        self, opened: OpenStep, after: Tensor, reading: Reading, live: LiveParameters, rule: UpdateRule
    ) -> Reading:
        """Gradient and settings of a step around which one of them changed, or which another pre-hook came before."""
        layout = live.layout
        first = Reading(reading.gradient, reading.active, opened.settings)
        if opened.memory is not None:
            reading = Reading(live.gradient(), live.active(), reading.settings)
        taken = TakenStep(opened.before, after, opened.memory, live.memory(rule), live.groups)

        def frozen(of: Reading) -> Mapping[str, Frozen]:
            return opened.frozen(live, rule, layout, after, of)

        return best_reading(rule, layout, taken, readings(first, reading), frozen)


def is_scaled(optimizer: Optimizer) -> bool:
    """True where a fused optimizer was told by how much to divide its gradients, or that they overflowed.

    It does so, or skips the step, by itself.
    """
    overflowed = getattr(optimizer, "found_inf", None)
    return getattr(optimizer, "grad_scale", None) is not None or (overflowed is not None and bool(overflowed))
