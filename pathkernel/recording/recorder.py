"""`KernelRecorder`: watches an ordinary training loop through the optimizer's own step hooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel._typing import Loss, Parameters
from pathkernel.errors import RecordingError
from pathkernel.gradients.batch_axes import BatchAxis
from pathkernel.gradients.returned import Returns, one_of_two
from pathkernel.recording.announcing import AnnouncesSamples
from pathkernel.recording.attaching import joined, others_of
from pathkernel.recording.joint_capture import JointCapture
from pathkernel.recording.live import LiveParameters
from pathkernel.recording.made import Given, Made, made_for
from pathkernel.recording.open_recorders import OPEN, caller, make_way, say_that_it_was_forked
from pathkernel.recording.optimizers import JointOptimizer, unwrapped_optimizers
from pathkernel.recording.readings import StepHooks
from pathkernel.recording.step_capture import StepCapture
from pathkernel.recording.validation import check_optimizer, inside_fabric, refuse_several_processes, unwrapped
from pathkernel.recording.watched import Watch, watched_parts
from pathkernel.runtime.interrupts import defer_interrupts
from pathkernel.runtime.threads import made_on_the_cpu, on_the_cpu
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.observer import StepObserver
from pathkernel.trajectory.reference_outputs import ReferenceOutputs
from pathkernel.trajectory.replay import ReplayStore
from pathkernel.trajectory.run import End, RecordedOptimizer, Start
from pathkernel.trajectory.schedule import RecordingLevel
from pathkernel.trajectory.store import Store
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.joint import JointRule
from pathkernel.update_rules.rule import UpdateRule
from pathkernel.update_rules.table import rule_of

T = TypeVar("T")


class KernelRecorder(AnnouncesSamples):
    """Watch a training loop and keep its parameter trajectory.

    The loop stays as it is and trains to the same bits; only the sample ids have to arrive with the batch, by
    `batches`, `track` or `announce`.

    Parameters
    ----------
    model
        The network in training.
    optimizer
        A `torch.optim` optimizer over the model's parameters, or a list of several that train it together, each
        parameter by one of them: ``[muon, adamw]``. Their steps by one backward pass are one step on record. None where
        it is made later, see `attach`.
    loss
        Batch loss ``(output, target)`` as the loop computes it: a scalar, or one number per sample. It is not evaluated
        while recording: its slopes at the network's outputs are taken from the training pass itself. Only
        ``outputs="loss"``, probabilities and batches whose slopes take too much room need it. ``"returned"`` for a
        network that returns its own loss.
    data
        The training samples: ``(X, y)`` of arrays or tensors, or a map-style dataset of ``(input, target)``. Their
        number, or nothing, where the network is given something else, which is kept.
    returns, outputs
        What the network's outputs are among all that it returns: a key or attribute, an index, or a function of it;
        everything by default. Two names of one argument.
    watch
        What the loop calls, where that is not ``model`` itself: the name of a submodule, the submodule, or several
        names of parts that are called one after the other, each with what the one before returned.
    batch_axis
        Where samples lie in what the network takes and returns: an axis for all, a tuple by the place of an argument,
        or a dict by its name, with ``"outputs"``, and None for an argument that all samples share. Outputs
        (T·B, …) of a network that takes (T, B, …) are those of (T, B, …), flattened. Everywhere outside the network's
        own call (data, kept inputs, queries, slopes) samples are first.
    keep
        Whether arguments of the network are kept that are not what ``data`` hold; see `track`. By default, what batches
        of `track` give the network differently, and everything where the data are not at hand.
    task
        ``"classification"`` or ``"regression"``: what `KernelMachine.predict` returns, and which outputs it explains by
        default; by default, as the loss and the targets tell.
    rule
        How the optimizer turns gradients into displacement; known by itself for the optimizers in
        `pathkernel.update_rules`. ``"elementwise"`` shares each step entry by entry in proportion to the gradient,
        for optimizers without a rule: exact in total, a convention in the split. For several optimizers a list of
        rules, None for those that are known, or one for all.
    reduction
        For a loss that returns one number per sample: how the loop reduces it, ``"mean"`` or ``"sum"``; used where the
        loss is evaluated again.
    regularizers
        Terms that the loop adds to the loss and that depend on the parameters alone, by name: functions of the dict
        of parameters. Each gets its own channel.
    averages
        Averages of the weights that the loop keeps, by name: `torch.optim.swa_utils.AveragedModel`, a copy of the
        model that the loop averages itself, or a dict of tensors. `KernelMachine` explains them with ``average=``.
    audit_every
        At which steps the gradient is recomputed from the announced samples and compared with the one that the
        optimizer is about to use, before it is used: every so many steps, never (0), or, by default, at steps
        0, 1, 2, 4, 8, … . Unless it is never, the first step is also taken apart as an explanation will do it, so that
        what cannot be explained is refused before it is trained.

    store
        Where the steps are kept: None for memory, a path for a folder, or a store of your own such as
        `pathkernel.storage.disk.DiskStore`. A folder that holds the record of this training run already is gone on
        with, from where the weights lie on its path.
    schedule
        What is kept of each step, and when: every step in full by default; `Keyframes(32)` keeps little and trains
        again what is asked for, `Every(10)` thins, `WeightsOnly()` keeps θ alone, `Nothing()` leaves it to observers.
    observers
        Who sees every step while training runs, beside what is kept of it: `pathkernel.StreamingShares`,
        `pathkernel.StreamingGram`, `pathkernel.StreamingFeatures`, or your own. Each has its ``result``.

    Raises
    ------
    UnsupportedOptimizerError, RecordingError
        At construction, with what to do instead.

    Notes
    -----
    Time per step: one comparison and a few copies of the P parameters; memory: about 2 P numbers per step for SGD,
    3 P for Adam.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X, y = torch.randn(32, 4), torch.randn(32, 1)
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.MSELoss()
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for x, target in recorder.batches(batch_size=8, shuffle=True):
    ...         optimizer.zero_grad()
    ...         loss(model(x), target).backward()
    ...         optimizer.step()
    >>> len(recorder.trajectory)
    4
    """

    @made_on_the_cpu
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        loss: Loss | str | None = None,
        data: Any = None,
        *,
        returns: Returns = None,
        outputs: Returns = None,
        watch: Watch = None,
        batch_axis: BatchAxis = 0,
        keep: bool | None = None,
        task: str | None = None,
        rule: UpdateRule | str | Sequence[UpdateRule | str | None] | None = None,
        reduction: str = "mean",
        regularizers: Mapping[str, Callable[[Parameters], Tensor]] | None = None,
        averages: Mapping[str, nn.Module | Mapping[str, Tensor]] | None = None,
        audit_every: int | None = None,
        store: str | os.PathLike[str] | Store | None = None,
        schedule: RecordingLevel | None = None,
        observers: Sequence[StepObserver] = (),
    ) -> None:
        outer = inside_fabric(model)
        refuse_several_processes(outer)
        model = unwrapped(outer)
        self.model = model
        self.optimizer: Optimizer | JointOptimizer | None = None
        self._given = Given(
            outer=outer,
            model=model,
            loss=loss,
            data=data,
            returns=one_of_two(returns, outputs),
            watch=watched_parts(model, watch),
            batch_axis=batch_axis,
            keep=keep,
            task=task,
            rule=rule,
            reduction=reduction,
            regularizers=regularizers,
            averages=averages,
            audit_every=audit_every,
            store=store,
            schedule=schedule,
            observers=observers,
        )
        self._made: Made | None = None
        self._memory_at_close: dict[str, tuple[Tensor, ...]] = {}
        self._checked = self._waits = False
        self._keep = keep
        self._process, self._begun, self._in_with, self._told = os.getpid(), "", False, False
        if optimizer is not None:
            self._make(unwrapped_optimizers(optimizer, rule))

    def _make(self, optimizers: list[Optimizer]) -> None:
        # The optimizer's hooks keep a recorder alive by this that nobody else names any more.
        self._made = made_for(self._given, optimizers, stopped=partial(say_that_it_was_forked, self))
        self.optimizer = self._made.capture.optimizer

    @property
    def _parts(self) -> Made:
        if self._made is None:
            raise RecordingError(
                "The recorder has no optimizer yet",
                "What is recorded are the steps of optimizers",
                "Write `KernelRecorder(model, optimizer, ...)`, or `recorder.attach(optimizer)` before training",
            )
        return self._made

    @property
    def _capture(self) -> StepCapture:
        return self._parts.capture

    @property
    def _trajectory(self) -> Trajectory:
        return self._parts.trajectory

    @property
    def _live(self) -> LiveParameters:
        return self._parts.live

    # -- the life of a recording ------------------------------------------------------------------------------

    def __enter__(self) -> KernelRecorder:
        self.start()
        self._in_with = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._made is None and kind is not None:
            return
        try:
            self.close()
        except KeyboardInterrupt:  # it may have come before the first line of `close`
            self.close()
            raise

    def start(self) -> None:
        """Hook into the optimizer; the first call fixes θ_0."""
        if self._handles:
            return
        if self._made is None:  # `attach` goes on
            self._waits = True
            return
        make_way(self)
        self._begun, self._process, self._in_with = caller(), os.getpid(), False
        try:
            with defer_interrupts(), on_the_cpu():
                self._start()
        except KeyboardInterrupt:  # it came at the end, and nobody will call `close`
            with defer_interrupts():
                self._detach()
            raise

    def _start(self) -> None:
        trajectory = self._trajectory
        if not len(trajectory):
            self._begin()
        elif not _equal(self._live.memory(trajectory.rule), self._memory_at_close):
            raise RecordingError(
                "The optimizer stepped between `close()` and `start()`, which changed its momentum",
                "What recorded samples left in the optimizer's memory must still be there when recording goes on",
                "Keep recording without a break, or make a new KernelRecorder here",
            )
        else:
            trajectory.begin(trajectory.run, replace(trajectory.end, outputs=None))
        for observer in self._parts.observers:
            observer.begin(trajectory, self._live.settings())
        self._capture.start()
        OPEN.add(self)

    def close(self) -> Trajectory:
        """Let go of the optimizer and return the trajectory; recording may be started again."""
        with defer_interrupts(), on_the_cpu():
            # A step that Ctrl-C came into: how far it got is a change outside the optimizer.
            self._capture.opened = None
            try:
                self._capture.record_end_state()
                self._note_outputs()
                self._memory_at_close = self._live.memory(self._trajectory.rule)
            finally:
                self._detach()
        return self._trajectory

    def flush(self) -> int:
        """Wait until all that was recorded is on disk, as before a checkpoint is saved; recording goes on.

        A process that is killed later can go on from here: steps, changes outside the optimizer since the last of them,
        averages and buffers are written. Where steps are kept in memory there is nothing to wait for.

        Returns
        -------
        How many steps are on record, and on disk where there is a store; fewer than were taken where the disk gave out,
        or where `Every(n)` joins them: the stretch at hand ends here.
        """
        with defer_interrupts(), on_the_cpu():
            self._capture.record_end_state()
            if self._handles:
                self._trajectory.store.write_end()
        return len(self._trajectory)

    def _note_outputs(self) -> None:
        """Put on record what the network makes of a few samples at the end."""
        trajectory, reference = self._trajectory, self._trajectory.run.reference
        if self._handles and reference is not None and not trajectory.store.stopped:
            function = trajectory.run.function().with_(constants=trajectory.final_buffers)
            trajectory.stand(replace(trajectory.end, outputs=reference.at(function, self._live.vector())))

    def _detach(self) -> None:
        OPEN.discard(self)
        self._capture.stop()
        self._trajectory.store.close()

    def _begin(self) -> None:
        """Make the store, or go on with what is in it."""
        trajectory, run = self._trajectory, self._trajectory.run
        if not trajectory.store.exists:
            self._capture.end_of_steps = initial = self._live.vector()
            run = replace(run, start=Start(initial, run.constants, self._live.memory(run.rule)))
            reference = ReferenceOutputs.of(run.data, run.function(), initial)
            trajectory.begin(replace(run, reference=reference, optimizer=self._replayed()), trajectory.end)
            return
        from pathkernel.recording.resume import resume  # not before it is needed

        run = replace(run, optimizer=self._replayed())
        place = resume(run, trajectory.store, self._live, self._parts.averages)
        if self._capture.keyframes is not None:
            self._capture.taken = place.steps  # abridged steps are counted by it
        self._capture.changes, self._capture.end_of_steps = place.changes, place.end
        self._capture.modules.resume(place.run.constants, place.buffers)
        trajectory.begin(place.run, End(averages=place.averages))

    def _replayed(self) -> RecordedOptimizer | None:
        """The optimizer, where steps are trained again when they are read."""
        store = self._trajectory.store
        if not isinstance(store, ReplayStore):
            return None
        return RecordedOptimizer(store.replay.kind, store.replay.constants, store.threads)

    @property
    def audit_every(self) -> int | None:
        """Steps from one audit to the next, as given."""
        return self._capture.audit_every

    @property
    def _handles(self) -> list[StepHooks]:
        return [] if self._made is None else self._made.capture.hooks

    @property
    def trajectory(self) -> Trajectory:
        """The path recorded so far."""
        self._capture.record_end_state()
        return self._trajectory

    def attach(self, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        """Watch an optimizer that was made later, beside those that are watched.

        Before the first recorded step any optimizers join; also where the recorder was made without one. Later, one may
        take the place of another, as the copies do that frameworks make of optimizers (hooks are lost in them), or
        bring parameters that had no optimizer, under an update rule that is in use.

        Parameters
        ----------
        optimizer
            The optimizer, or a list of them.

        Raises
        ------
        RecordingError
            Where the record would have to begin anew.
        """
        given: Any = self._given.rule
        rule = None if isinstance(given, (list, tuple, JointRule)) else given
        new = unwrapped_optimizers(optimizer, rule)
        if self._made is None or self._may_begin_anew(self._made.capture):
            self._begin_anew(new, given)
            return
        for one in new:
            now = joined(self._capture.optimizer, self._trajectory.rule, one, rule_of(one, rule))
            check_optimizer(self.model, now, self._trajectory.rule)
            if isinstance(now, JointOptimizer) and not isinstance(self._capture, JointCapture):
                self._made = replace(self._parts, capture=JointCapture.instead_of(self._capture, now))
            else:
                self._capture.take_over(now)
            self.optimizer = now

    def _may_begin_anew(self, capture: StepCapture) -> bool:
        """True where nothing is on record yet, nor on disk."""
        trajectory = self._trajectory
        written = bool(self._handles) and not isinstance(trajectory.store, MemoryStore)
        return not (len(trajectory) or written or capture.pending.in_flight)

    def _begin_anew(self, new: list[Optimizer], given: Any) -> None:
        """Make everything anew with further optimizers."""
        last = None
        kept: list[Optimizer] = []
        if self._made is not None:
            capture = self._made.capture
            kept, given = others_of(capture.optimizer, new, given)
            last = capture.pending.last if self._handles else None
            self._waits = self._waits or bool(self._handles)
            self._detach()
        self._given = replace(self._given, rule=given)
        self._make([*kept, *new])
        if self._waits:
            in_with, self._waits = self._in_with, False
            self.start()
            self._in_with = in_with
        if last is not None:
            self._announce(last.batch, last.delivery)


def _equal(one: dict[str, tuple[Tensor, ...]], other: dict[str, tuple[Tensor, ...]]) -> bool:
    """True where two copies of an optimizer's memory hold the same numbers."""
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )
