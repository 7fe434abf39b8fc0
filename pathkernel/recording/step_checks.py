"""Checks of a step before the optimizer takes it, and of what it was given."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel.errors import NonFiniteStepError, RecordingError, SampleIdError
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.recording.audit import Circumstances, audit, check_captured, check_inputs, check_outputs, is_due
from pathkernel.recording.live import LiveParameters
from pathkernel.recording.micro_batches import PendingBatches
from pathkernel.recording.optimizers import JointOptimizer
from pathkernel.recording.trial import try_out
from pathkernel.recording.validation import check_optimizer, refuse_other_tensors
from pathkernel.recording.watched import check_others_are_at_rest
from pathkernel.runtime.checksum import checksum
from pathkernel.runtime.transfers import numbers
from pathkernel.trajectory.observer import StepObserver
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import UpdateRule


class StepChecks(ABC):
    """Part of `pathkernel.recording.step_capture.StepCapture`, whose attributes these are."""

    live: LiveParameters
    optimizer: Optimizer | JointOptimizer
    pending: PendingBatches
    audit_every: int | None
    changes: list[tuple[str, Tensor]]
    gradient_changes: dict[str, Tensor]
    end_of_steps: Tensor
    _outer: nn.Module
    _model: nn.Module
    _trajectory: Trajectory
    _observers: Sequence[StepObserver]
    _announced: tuple[MicroBatch | None, MicroBatch | None]
    _tried: bool

    @abstractmethod
    def slim_step(self, before: Tensor, gradient: Tensor, active: frozenset[str] | None = None) -> Step:
        """The step at hand as far as a replay needs it."""

    def _check_parameters(self) -> None:
        """Take parameters into the record that the optimizer was given after recording began."""
        strangers = self.live.strangers()
        if not strangers:
            return
        check_optimizer(self._model, self.optimizer, self._trajectory.rule)
        wanted = {id(p) for p in strangers}
        new = {name: p for name, p in self._model.named_parameters() if id(p) in wanted}
        constants = self._trajectory.constants
        refuse_other_tensors([name for name in new if name not in constants])
        moved = [name for name, p in new.items() if not torch.equal(p.detach(), constants[name])]
        if moved:
            raise RecordingError(
                f"Parameters {', '.join(f'`{name}`' for name in moved)} joined the optimizer and had changed before",
                "A parameter that joins later has been a constant since recording began",
                "Give the optimizer this parameter first (it may stay frozen until later), or make a new "
                "KernelRecorder here",
            )
        self._trajectory.extend({name: p.detach() for name, p in new.items()})
        pad = torch.cat([p.detach().reshape(-1) for p in new.values()])
        self.changes = [(name, torch.cat([point, pad])) for name, point in self.changes]
        self.gradient_changes = {
            name: torch.cat([change, torch.zeros_like(pad)]) for name, change in self.gradient_changes.items()
        }
        self.live.add(new)
        self.end_of_steps = self._trajectory.end_of_steps

    def _check_same(self) -> None:
        """Refuse parameters that are other tensors than on record."""
        found = dict(self._model.named_parameters())
        refuse_other_tensors([name for name, p in self.live.named.items() if found.get(name) is not p])

    def _check_pending(self, taken: bool = False) -> None:
        batches = self.pending.batches
        if not batches:
            raise SampleIdError(
                f"`optimizer.step()` number {len(self._trajectory)} came without sample ids",
                "Every step must know which training samples its gradient came from",
                "Iterate over `recorder.batches(...)` or `recorder.track(loader)`, or call `recorder.announce(ids)` "
                "before the backward pass; step outside the `with` block to train unrecorded",
            )
        if self._observers or not getattr(self._trajectory.schedule, "weights_only", False):
            if not all(batch.captured for batch in batches):
                self._check_same()  # the outputs of other tensors lead to no gradient that is on record
            check_others_are_at_rest(self._model, self._trajectory.run.watch, self.live)
            check_captured(self._trajectory, batches, type(self._outer).__name__, taken)

    def _check_gradient(self, gradient: Tensor, live: LiveParameters, total: float | None = None) -> None:
        if math.isfinite(gradient.sum().item() if total is None else total):  # NaN and infinity do not cancel
            return
        named = live.gradients()
        finite = torch.stack([value.isfinite().all() for value in named.values()])
        if not finite.all():
            bad = [name for name, good in zip(named, finite.tolist(), strict=True) if not good]
            index, batches = len(self._trajectory), self._drop_batches()
            ids = torch.cat([batch.ids for batch in batches]).tolist()
            raise NonFiniteStepError(
                f"At step {index} the gradient of {', '.join(f'`{n}`' for n in bad)} holds NaN or infinity; "
                f"its samples are {ids[:16]}{' …' if len(ids) > 16 else ''}",
                f"Gradients are finite numbers; the optimizer has not moved, and the {index} steps before stay valid",
                "Look at these samples, lower the learning rate, or skip the step when the loss is not finite",
            )

    def _sum_and(self, gradient: Tensor, unmoved: Callable[[], Tensor] | None) -> tuple[float, bool | None]:
        """Sum of the gradient and, where asked, whether θ has not moved since it was last seen; in one transfer.

        None instead of the latter on the CPU, where it is cheaper to compare bytes.
        """
        if gradient.is_cpu or unmoved is None:
            return gradient.sum().item(), None
        total, stayed = numbers([gradient.sum(), unmoved()])
        return total, bool(stayed)

    def _drop_batches(self) -> tuple[MicroBatch, ...]:
        """The batches of a step that is not taken; nothing is pending afterwards."""
        return self.pending.take()

    @property
    def _gradient_is_elsewhere(self) -> bool:
        """True where only the optimizer knows where the gradient was taken: look-ahead and multi-stage methods."""
        rule = self._trajectory.rule
        return type(rule).stage_offsets is not UpdateRule.stage_offsets or rule.stages > 1

    @property
    def _is_untried(self) -> bool:
        """True while no step has been explained, where steps are audited."""
        return not self._tried and self.audit_every != 0

    def _try_out(self, step: Step) -> None:
        """Explain the first step of all, so that what cannot be explained is refused before training."""
        if self._is_untried:
            reference = self._trajectory.run.reference
            if reference is not None:  # hooks may have been put on the network since recording began
                run = self._trajectory.run
                reference.check("KernelRecorder", (run.function(), run.initial), None)
            try_out(self._trajectory, step)
            self._tried = True

    def _audit(
        self, before: Tensor, gradient: Tensor, taken: bool = False, active: frozenset[str] | None = None
    ) -> None:
        """Compare the gradient at hand with that of the announced samples, before the optimizer uses it if possible."""
        trajectory, index = self._trajectory, len(self._trajectory)
        if self._gradient_is_elsewhere or not is_due(index, self.audit_every):
            return
        self._check_same()
        step, live = replace(self.slim_step(before, gradient, active), index=index), self.live
        passes = self.pending.passes
        checksums = {one.checksum for one in passes if one.checksum is not None}
        now = checksum(live.layout.unflatten(before).values()) if taken else live.checksum()
        seen = Circumstances(
            unseen=sum(not batch.captured for batch in step.batches),
            watched=type(self._outer).__name__,
            moved=bool(checksums - {now}),
            compiled=hasattr(self._outer, "_orig_mod"),
            drew_from=tuple(dict.fromkeys(name for one in passes for name in one.drew_from)),
            announced_before=self._announced[0],
            taken=taken,
            differs=next(iter(self.pending.inputs.differences), ""),
            several=isinstance(self.optimizer, JointOptimizer),
        )
        with generators_untouched():  # a network may draw from Python's or numpy's generator
            audit(trajectory, step, seen)
            check_inputs(trajectory, self.pending.inputs.take_differences(), taken)
            for batch, outputs in self.pending.named:
                check_outputs(trajectory, step, batch, outputs, taken)
