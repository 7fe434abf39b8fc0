"""`KernelRecorder`: watches an ordinary training loop through the optimizer's own step hooks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from pathkernel._typing import Loss, Parameters, PyTree
from pathkernel.errors import InputError, NonFiniteStepError, PathKernelError, RecordingError, SampleIdError
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.losses import Objective, check_recorded_loss, check_reduction, check_task
from pathkernel.gradients.parameters import ParameterLayout, constants_of, named_trainable
from pathkernel.gradients.pytrees import as_tensors, copied_samples, count, spread
from pathkernel.gradients.returned import Returns, check_returns
from pathkernel.gradients.sample_wise import SAMPLES, check_sample_wise
from pathkernel.recording.audit import Circumstances, audit, check_captured, check_outputs, is_due
from pathkernel.recording.indexed import indexed_loader
from pathkernel.recording.keyframes import KeyframeKeeper, is_tried
from pathkernel.recording.live import LiveParameters
from pathkernel.recording.loss_scale import loss_scale
from pathkernel.recording.micro_batches import PendingBatches, checked_ids
from pathkernel.recording.modules import WatchedModules
from pathkernel.recording.open_recorders import OPEN, caller, make_way, say_that_it_was_forked
from pathkernel.recording.readings import Reading, StepHooks, TakenStep, best_reading, readings
from pathkernel.recording.trial import try_out
from pathkernel.recording.validation import check_optimizer, unwrapped
from pathkernel.runtime.checksum import checksum
from pathkernel.runtime.interrupts import defer_interrupts, result_or_error
from pathkernel.trajectory.averages import AverageRecord
from pathkernel.trajectory.cotangents import kept_cotangents
from pathkernel.trajectory.frozen_state import FrozenOnReading, OptimizerState, frozen_in
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.reference_outputs import ReferenceOutputs
from pathkernel.trajectory.replay import ReplayStore
from pathkernel.trajectory.run import End, RecordedOptimizer, Run, Start
from pathkernel.trajectory.samples import Samples, samples_of
from pathkernel.trajectory.schedule import EVERY_STEP, RecordingLevel, Schedule, StepObserver, Streaming, as_schedule
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.store import Store
from pathkernel.trajectory.thinned import LastStepStore, ThinnedStore
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import Observation, UpdateRule
from pathkernel.update_rules.table import rule_of


@dataclass(frozen=True)
class OpenStep:
    """What is known of a step before it is taken.

    Attributes
    ----------
    before
        θ_s, (P,).
    keys
        Keys of the state tensors to keep after the step; None where the rule looks at the live state.
    vectors, fresh
        Of the state before the step, where it does not; see `pathkernel.trajectory.frozen_state.OptimizerState`.
    states
        Where it does: the optimizer's state by parameter; see `pathkernel.update_rules.rule.Observation`.
    active
        Parameters with a gradient.
    gradient
        (P,), or None where it only arrives inside the step.
    settings
        Numbers and flags of every parameter group, as the pre-hook found them.
    memory
        The optimizer's memory, where another pre-hook ran after the recorder's; else None.
    """

    before: Tensor
    keys: tuple[str, ...] | None
    vectors: Mapping[str, Tensor]
    fresh: frozenset[str]
    states: Mapping[str, Mapping[str, Any]]
    active: frozenset[str]
    gradient: Tensor | None
    settings: tuple[Mapping[str, Any], ...]
    memory: Mapping[str, tuple[Tensor, ...]] | None


class KernelRecorder:
    """Watch a training loop and keep its parameter trajectory.

    The loop stays as it is and trains to the same bits; only the sample ids have to arrive with the batch, by
    `batches`, `track` or `announce`.

    Parameters
    ----------
    model
        The network in training.
    optimizer
        A `torch.optim` optimizer over the model's parameters.
    loss
        Batch loss ``(output, target)`` as the loop computes it: a scalar, or one number per sample. It is not evaluated
        while recording: its slopes at the network's outputs are taken from the training pass itself. Only
        ``outputs="loss"``, probabilities and batches whose slopes take too much room need it. ``"returned"`` for a
        network that returns its own loss.
    data
        The training samples: ``(X, y)`` of arrays or tensors, or a map-style dataset of ``(input, target)``.
    returns
        What the network's outputs are among all that it returns: a key or attribute, an index, or a function of it;
        everything by default.
    task
        ``"classification"`` or ``"regression"``: what `KernelMachine.predict` returns, and which outputs it explains by
        default; by default, as the loss and the targets tell.
    rule
        How the optimizer turns gradients into displacement; known by itself for the optimizers in
        `pathkernel.update_rules`. ``"elementwise"`` shares each step entry by entry in proportion to the gradient,
        for optimizers without a rule: exact in total, a convention in the split.
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

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss | str | None = None,
        data: Any = None,
        *,
        returns: Returns = None,
        task: str | None = None,
        rule: UpdateRule | str | None = None,
        reduction: str = "mean",
        regularizers: Mapping[str, Callable[[Parameters], Tensor]] | None = None,
        averages: Mapping[str, nn.Module | Mapping[str, Tensor]] | None = None,
        audit_every: int | None = None,
        store: str | os.PathLike[str] | Store | None = None,
        schedule: RecordingLevel | None = None,
        observers: Sequence[StepObserver] = (),
    ) -> None:
        outer, model = model, unwrapped(model)
        if data is None:
            raise InputError(
                "`data` is missing",
                "The recorder needs the training samples, whose ids the batches are announced with",
                "Write `KernelRecorder(model, optimizer, loss, data=(X_train, y_train))`",
            )
        rule = rule_of(optimizer, rule)
        check_optimizer(model, optimizer, rule)
        self.model, self.optimizer, self.audit_every = model, optimizer, audit_every
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        named = named_trainable(model, also=trained)
        layout = ParameterLayout.of(named)
        initial = layout.flatten({name: p.detach() for name, p in named.items()})
        level = as_schedule(schedule, observers)
        run = Run(
            model=model,
            objective=Objective(check_recorded_loss(loss), check_reduction(reduction), dict(regularizers or {})),
            data=Samples(data, initial.dtype),
            rule=rule,
            layout=layout,
            start=Start(initial, constants_of(model, layout)),
            returns=check_returns(returns),
            task=check_task(task),
            schedule=level,
        )
        if run.data.holds_integers:
            run.data.suit(run.function(), initial)
        self._live = LiveParameters(named, optimizer)
        self._taken = 0
        self._keyframes: KeyframeKeeper | None = None
        self._observers = level.observers if isinstance(level, Streaming) else tuple(observers)
        self._trajectory = Trajectory(run, self._kept_in(store_at(store), run, bool(averages)))
        self._modules = WatchedModules(model, run.constants)
        self._pending = PendingBatches(
            outer, self._live, rule.stages, self._modules, self._trajectory.returns, self._kept, self._forget_edits
        )
        self._outer = outer
        self._announced: tuple[MicroBatch | None, MicroBatch | None] = None, None  # last, and the one before
        self._open: OpenStep | None = None
        self._handles: list[StepHooks] = []
        self._memory_at_close: dict[str, tuple[Tensor, ...]] = {}
        self._averages = dict(averages or {})
        records = {name: AverageRecord.begin(name, source, layout) for name, source in self._averages.items()}
        self._trajectory.stand(End(averages=records))
        self._changes: list[tuple[str, Tensor]] = []
        self._gradient_changes: dict[str, Tensor] = {}
        self._end_of_steps = initial
        self._checked = self._tried = False
        self._process, self._begun, self._in_with, self._told = os.getpid(), "", False, False

    # -- the life of a recording ------------------------------------------------------------------------------

    def __enter__(self) -> KernelRecorder:
        self.start()
        self._in_with = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except KeyboardInterrupt:  # it may have come before the first line of `close`
            self.close()
            raise

    def start(self) -> None:
        """Hook into the optimizer; the first call fixes θ_0."""
        if self._handles:
            return
        make_way(self)
        self._begun, self._process, self._in_with = caller(), os.getpid(), False
        try:
            with defer_interrupts():
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
        for observer in self._observers:
            observer.begin(trajectory, self._live.settings())
        self._handles = [StepHooks(self.optimizer, self._before_step, self._after_step)]
        self._pending.start()
        if self._keyframes is not None:
            self._keyframes.start()
        OPEN.add(self)

    def _kept_in(self, store: Store, run: Run, averages: bool) -> Store:
        """The store that keeps what the schedule says."""
        schedule = run.schedule
        if self._observers and store.exists:
            raise RecordingError(
                "`store=` holds steps of an earlier run, and `observers` were given",
                "Observers see steps as they are taken, and those of the earlier run have been",
                "Give `store=` another path, or leave out `observers` and ask the trajectory after training",
            )
        if schedule == EVERY_STEP:
            return store
        if averages:
            raise RecordingError(
                f"`averages` were given, and `schedule={schedule!r}`",
                "How an average moved is seen from θ at every step",
                "Leave out `schedule`, or leave out `averages`",
            )
        if store.exists:
            raise RecordingError(
                f"`store=` holds steps of an earlier run, and `schedule={schedule!r}`",
                "A recording that goes on in a store keeps every step in full",
                "Give `store=` another path, or leave out `schedule`",
            )
        if isinstance(schedule, Streaming):
            return LastStepStore()
        if isinstance(schedule, Schedule) and schedule.keyframes is not None:
            self._keyframes = KeyframeKeeper(run, self._live, self.optimizer, schedule.keyframes)
            return ReplayStore(store, self._keyframes.replay, torch.get_num_threads())
        return ThinnedStore(store, schedule.every) if isinstance(schedule, Schedule) else store

    def close(self) -> Trajectory:
        """Let go of the optimizer and return the trajectory; recording may be started again."""
        with defer_interrupts():
            self._open = None  # a step that Ctrl-C came into: how far it got is a change outside the optimizer
            try:
                self._record_end_state()
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
        with defer_interrupts():
            self._record_end_state()
            if self._handles:
                self._trajectory.store.write_end()
        return len(self._trajectory)

    def _note_outputs(self) -> None:
        """Put on record what the network makes of a few samples at the end."""
        trajectory, reference = self._trajectory, self._trajectory.run.reference
        if self._handles and reference is not None and not trajectory.store.stopped:
            function = trajectory.function().with_(constants=trajectory.final_buffers)
            trajectory.stand(replace(trajectory.end, outputs=reference.at(function, self._live.vector())))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        OPEN.discard(self)
        self._pending.stop()
        if self._keyframes is not None:
            self._keyframes.stop()
        self._trajectory.store.close()

    def _begin(self) -> None:
        """Make the store, or go on with what is in it."""
        trajectory, run = self._trajectory, self._trajectory.run
        if not trajectory.store.exists:
            self._end_of_steps = initial = self._live.vector()
            run = replace(run, start=Start(initial, run.constants, self._live.memory(run.rule)))
            reference = ReferenceOutputs.of(run.data, run.function(), initial)
            trajectory.begin(replace(run, reference=reference, optimizer=self._replayed()), trajectory.end)
            return
        from pathkernel.recording.resume import resume  # not before it is needed

        place = resume(run, trajectory.store, self._live, self._averages)
        self._changes, self._end_of_steps = place.changes, place.end
        self._modules.resume(place.run.constants, place.buffers)
        trajectory.begin(place.run, End(averages=place.averages))

    def _replayed(self) -> RecordedOptimizer | None:
        """The optimizer, where steps are trained again when they are read."""
        store = self._trajectory.store
        if not isinstance(store, ReplayStore):
            return None
        return RecordedOptimizer(store.replay.kind, store.replay.constants, store.threads)

    @property
    def trajectory(self) -> Trajectory:
        """The path recorded so far."""
        self._record_end_state()
        return self._trajectory

    # -- sample ids arrive with the batch ----------------------------------------------------------------------

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[PyTree, PyTree]]:
        """One epoch of mini-batches ``(x, y)`` of the training data.

        Parameters
        ----------
        batch_size
            Samples per batch.
        shuffle
            Draw a new order.
        drop_last
            Leave out a last batch that is not full.
        generator
            Source of the order; torch's global one by default, as in `torch.utils.data.DataLoader`.
        """
        n = len(self._trajectory.data)
        order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
        for ids in order.split(batch_size):
            if drop_last and len(ids) < batch_size:
                break
            inputs, targets = self._trajectory.data[ids]
            self._announce(MicroBatch(ids))
            yield inputs, targets

    def track(self, loader: DataLoader) -> Iterator[Any]:
        """Iterate over a loader on an `IndexedDataset`; the loop sees the batches as without ids.

        Ids travel inside the batch, so samplers, worker processes, pre-fetching and an early ``break`` cannot
        detach them.
        """
        for ids, batch in indexed_loader(loader):
            self._announce(MicroBatch(checked_ids(ids, len(self._trajectory.data))))
            yield batch

    def announce(
        self, ids: Any, weights: Any = None, inputs: PyTree = None, targets: PyTree = None
    ) -> tuple[PyTree, PyTree]:
        """Announce the samples of the next forward pass, for loops that know their ids.

        A second pass after one announcement is another one of the same samples; announced after the forward pass, it
        holds for that pass if the batch announced before has had its own.

        Parameters
        ----------
        ids
            (B,) sample ids.
        weights
            (B,) coefficient of each sample's loss in the batch loss; None where the recorded loss reduces the batch.
            Used only where that is evaluated again: slopes from the training pass hold them already.
        inputs, targets
            What the network sees where it differs from the training data, such as augmented images.

        Returns
        -------
        The inputs and targets to train on.
        """
        ids = checked_ids(torch.as_tensor(ids), len(self._trajectory.data))
        if weights is not None:
            weights = torch.as_tensor(weights).detach().clone()
            if weights.shape != ids.shape:
                raise SampleIdError(
                    f"{len(ids)} ids came with weights of shape {tuple(weights.shape)}",
                    "Every sample of a batch has one weight",
                    "Write `recorder.announce(ids, weights=w)` with `len(w) == len(ids)`",
                )
        for name, given in (("inputs", inputs), ("targets", targets)):
            if given is not None and count(given) != len(ids):
                raise SampleIdError(
                    f"{len(ids)} ids came with {count(given)} {name}",
                    "Ids and samples of a batch correspond one to one",
                    f"Write `recorder.announce(ids, {name}={name})` with one row for each id",
                )
        # Copies: the loop may fill the same arrays with its next batch.
        self._announce(MicroBatch(ids, weights, copied_samples(inputs), copied_samples(targets)))
        return samples_of(MicroBatch(ids, weights, inputs, targets), self._trajectory.data)

    batch = announce
    """Older name of `announce`."""

    def _announce(self, batch: MicroBatch) -> None:
        if not self._checked:
            self._check_network(batch)
            self._checked = True
        self._announced = self._announced[1], batch
        # Where the gradient will be audited, θ at the forward pass is known again at the step.
        due = self._handles and is_due(self._taken, self.audit_every)
        self._pending.watcher.checked = self._live.checksum if due else None
        self._pending.announce(batch)

    def _kept(self, cotangents: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is kept of λ."""
        return kept_cotangents(cotangents, self._trajectory.layout.size, self._trajectory.objective)

    def _check_network(self, batch: MicroBatch) -> None:
        """Refuse a network that cannot be explained before it has been trained."""
        trajectory = self._trajectory
        few = batch.ids[spread(len(batch.ids), SAMPLES)]
        with generators_untouched():
            inputs = trajectory.data[few][0] if batch.inputs is None else batch.inputs
        inputs = as_tensors(inputs, trajectory.dtype)
        function, theta = trajectory.function(), self._live.vector()
        ran = result_or_error(lambda: check_sample_wise(function, theta, inputs), (Exception,))
        # Where the loop gives the network something else than these samples, the audit says so.
        if isinstance(ran, PathKernelError):
            raise ran

    @contextmanager
    def channel(self, name: str) -> Iterator[None]:
        r"""Book what is done inside under a name: edits of weights and gradients, gradients that go round the outputs.

        Parameters
        ----------
        name
            The channel of the explanation. Changes of parameters outside the optimizer that are not made in such a
            block are booked as ``"unexplained"``; changes of gradients that are not are refused by the audit.

        Notes
        -----
        Where a backward pass runs inside, the channel gets what it added to the gradients minus the announced samples'
        part :math:`\sum_i J_i^\top \lambda_i` that came through the outputs: a gradient penalty, a loss on a hidden
        layer, a regulariser on the weights. What is done to all gradients afterwards, such as clipping, is done to it.
        """
        inside = self._open is not None  # in a closure: the optimizer may have moved the parameters to look ahead
        if not inside:
            self._note_change("unexplained")
            self._pending.forget_cleared()
        before = {n: gradient.clone() for n, gradient in self._live.gradients().items()}
        watcher = self._pending.watcher
        outer, watcher.channel = watcher.channel, name
        try:
            yield
        finally:
            watcher.channel = outer
        if not inside:
            self._note_change(name)
        edits = {n: g - before.get(n, torch.zeros_like(g)) for n, g in self._live.gradients().items()}
        if any(bool(edit.any()) for edit in edits.values()):
            self._check_one_stage(name)
            edit = self._live.padded(edits)
            self._gradient_changes[name] = self._gradient_changes.get(name, torch.zeros_like(edit)) + edit

    def _check_one_stage(self, name: str) -> None:
        rule = self._trajectory.rule
        if rule.stages > 1:
            raise RecordingError(
                f"Gradients were edited under the name `{name}`, and a step of {rule.name} takes {rule.stages} of them",
                "Edits of gradients are booked for optimizers that take one gradient in a step",
                "Edit the weights after the step instead, or train with an optimizer that has one stage",
            )

    def _forget_edits(self) -> None:
        self._gradient_changes = {}

    def _record_end_state(self) -> None:
        """Put on record where parameters and buffers stand while the recorder watches."""
        if self._handles and self._open is None and not self._trajectory.store.stopped:
            self._note_change("unexplained")
            self._observe_averages()
            end, buffers = self._trajectory.end, self._modules.changed_buffers()
            self._trajectory.stand(replace(end, tail=tuple(self._changes), final_buffers=buffers))

    def _observe_averages(self) -> None:
        """See how the averages moved after the last step."""
        trajectory = self._trajectory
        for name, source in self._averages.items():
            record, last = trajectory.averages[name], len(trajectory) - 1
            if len(record.updates) == last:
                record.observe(source, trajectory.layout, last, self._end_of_steps, self._last_point())

    def _note_change(self, name: str) -> None:
        """Put a change of the parameters since they were last seen on record."""
        keeper = self._keyframes
        if keeper.moved() if keeper is not None else not self._live.is_at(self._last_point()):
            self._changes.append((name, self._live.vector()))
            if keeper is not None and name == "unexplained":
                keeper.warn_of_change(self._taken)

    def _last_point(self) -> Tensor:
        return self._changes[-1][1] if self._changes else self._end_of_steps

    # -- the optimizer's own hooks ----------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with defer_interrupts():
            self._see_before(optimizer, args, kwargs)

    def _see_before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last = all([hooks.step_begins() for hooks in self._handles])
        if self._trajectory.store.stopped:  # the disk gave out, or this is a forked child; training goes on
            say_that_it_was_forked(self)
            self._pending.forget()
            return
        self._check_parameters()
        self._pending.scale_of_loss(loss_scale())
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # torch passes the optimizer first
        scaled = getattr(optimizer, "grad_scale", None) is not None or _is_skipped(optimizer)
        gradient = None
        # With a closure, forward and backward run inside the step: gradient and batch are only known afterwards.
        if closure is None:
            self._check_pending()
            # Now, where the gradient is there already: some implementations (SGD's foreach Nesterov) write on it. A
            # fused optimizer under loss scaling skips overflowed steps and divides by the scale by itself.
            if not scaled and (self._keyframes is None or not self._live.gradient_is_finite()):
                gradient = self._live.gradient()
                self._check_gradient(gradient)
        self._note_change("unexplained")
        self._observe_averages()
        keeper, explained = self._keyframes, False
        if keeper is None:
            before = self._last_point()  # one tensor for the end of a step and the start of the next
        else:
            known = closure is None and not scaled
            before, gradient = self._before_replayed(keeper, known)
            if not keeper.whole:
                return
            explained = known and keeper.trial and keeper.explains(self._slim_step(before, gradient))
            gradient = gradient if known else None
        if gradient is not None and not explained:
            self._audit(before, gradient)
        if gradient is not None and not self._gradient_is_elsewhere:
            self._try_out(self._slim_step(before, gradient))
        rule, live = self._trajectory.rule, self._live
        keys = live.kept_keys(rule)
        vectors = {} if keys is None else live.state_vectors(rule.keep_before)
        fresh = frozenset() if keys is None else live.fresh(rule)
        states = live.states(rule) if keys is None else {}
        memory, settings = None if last else live.memory(rule), live.settings()
        self._open = OpenStep(before, keys, vectors, fresh, states, live.active(), gradient, settings, memory)

    def _before_replayed(self, keeper: KeyframeKeeper, known: bool) -> tuple[Tensor, Tensor]:
        """θ and gradient as far as a replay needs them."""
        return keeper.before(
            self._taken,
            self._pending.batches,
            known,
            due=is_tried(self._taken, self.audit_every),
            edited=bool(self._gradient_changes),
            # Observed steps are all recorded whole, so that the end of the last one is at hand.
            theta=self._last_point() if self._changes or self._observers else None,
            watched=bool(self._observers),
        )

    def _slim_step(self, before: Tensor, gradient: Tensor) -> Step:
        """The step at hand as far as a replay needs it."""
        return Step(
            index=self._taken,
            before=before,
            after=before[:0],
            gradient=gradient,
            active=self._live.active(),
            batches=self._pending.batches,
            groups=self._live.groups,
            hyperparameters=self._live.settings(),
            changes=tuple(self._changes),
            gradient_changes=self._gradient_changes,
            differentiated=self._pending.differentiated,
            buffers=self._modules.changed_buffers(),
        )

    def _after_replayed(self, keeper: KeyframeKeeper) -> None:
        if getattr(self.optimizer, "found_inf", None) is not None and not keeper.moved():
            self._pending.forget()
            self._forget_edits()
            return
        self._check_pending(taken=True)
        step = self._slim_step(*keeper.vectors)
        self._pending.take()
        self._changes, self._gradient_changes = [], {}
        self._keep(step)

    def _keep(self, step: Step) -> None:
        """Put a step on record."""
        keeper = self._keyframes
        # Where steps are joined, the record counts fewer.
        whole = replace(step, index=self._taken) if self._observers else step
        if keeper is not None:
            step = keeper.after(step)
            if keeper.gave_up:
                keeper.stop()
                self._keyframes = None
        self._taken += 1
        self._trajectory.store.append(step)
        for observer in self._observers:
            observer.observe(whole)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with defer_interrupts():  # a step is on record whole, or not at all
            self._see_after(optimizer)

    def _see_after(self, optimizer: Optimizer) -> None:
        for hooks in self._handles:
            hooks.step_ended()
        if self._keyframes is not None and self._keyframes.is_open:
            self._after_replayed(self._keyframes)
            return
        if self._open is None:
            return
        opened, self._open = self._open, None
        before = opened.before
        trajectory = self._trajectory
        if getattr(optimizer, "found_inf", None) is not None and self._live.is_at(before):
            # A fused optimizer skipped a step that overflowed under loss scaling.
            self._pending.forget()
            self._forget_edits()
            return
        self._check_pending(taken=True)
        live, gradient, active = self._live, opened.gradient, opened.active
        if gradient is None:
            gradient, active = live.gradient(), live.active()
        settings: tuple[Mapping[str, Any], ...] = live.settings()
        after = live.vector()
        if settings is not opened.settings or opened.memory is not None:
            gradient, active, settings = self._as_used(opened, after, Reading(gradient, active, settings))
        if opened.gradient is None:
            self._audit(before, gradient, taken=True)
        step = Step(
            index=len(trajectory),
            before=before,
            after=after,
            gradient=gradient,
            active=active,
            batches=self._pending.batches,
            groups=live.groups,
            hyperparameters=settings,
            frozen=self._frozen(opened, after, gradient, active, settings),
            changes=tuple(self._changes),
            gradient_changes=self._gradient_changes,
            differentiated=self._pending.differentiated,
            buffers=self._modules.changed_buffers(),
        )
        self._try_out(step)
        self._pending.take()
        self._changes, self._gradient_changes, self._end_of_steps = [], {}, after
        self._keep(step)

    def _as_used(self, opened: OpenStep, after: Tensor, reading: Reading) -> Reading:
        """Gradient and settings of a step around which one of them changed, or which another pre-hook came before."""
        live, trajectory = self._live, self._trajectory
        first = Reading(reading.gradient, reading.active, opened.settings)
        if opened.memory is not None:
            reading = Reading(live.gradient(), live.active(), reading.settings)
        taken = TakenStep(opened.before, after, opened.memory, live.memory(trajectory.rule), live.groups)

        def frozen(of: Reading) -> Mapping[str, Mapping[str, Any]]:
            return self._frozen(opened, after, of.gradient, of.active, of.settings)

        return best_reading(trajectory.rule, trajectory.layout, taken, readings(first, reading), frozen)

    def _frozen(
        self,
        opened: OpenStep,
        after: Tensor,
        gradient: Tensor,
        active: frozenset[str],
        settings: tuple[Mapping[str, Any], ...],
    ) -> Mapping[str, Mapping[str, Any]]:
        """What the rule freezes: found now from the live state, or kept as what it is found from on reading."""
        live, rule, layout = self._live, self._trajectory.rule, self._trajectory.layout
        before, device = opened.before, opened.before.device.type
        if opened.keys is not None:
            vectors = live.state_vectors(opened.keys)
            numbers = live.state_numbers(rule.numbers_after, active)
            state = OptimizerState(opened.vectors, vectors, numbers, opened.fresh, device)
            evaluate = partial(frozen_in, rule, layout)
            return FrozenOnReading(state, evaluate, before, gradient, after, active, live.groups, settings)
        at, received, moved = (layout.unflatten(v) for v in (before, gradient, after - before))
        observed = {
            name: Observation(
                before=opened.states.get(name, {}),
                after=self.optimizer.state[live.named[name]],
                parameter=at[name],
                gradient=received[name],
                displacement=moved[name],
                device=device,
            )
            for name in active
        }
        return {name: rule.frozen(seen, settings[live.groups[name]]) for name, seen in observed.items()}

    def _check_parameters(self) -> None:
        """Take parameters into the record that the optimizer was given after recording began."""
        strangers = self._live.strangers()
        if not strangers:
            return
        check_optimizer(self.model, self.optimizer, self._trajectory.rule)
        wanted = {id(p) for p in strangers}
        new = {name: p for name, p in self.model.named_parameters() if id(p) in wanted}
        constants = self._trajectory.constants
        self._check_same([name for name in new if name not in constants])
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
        self._changes = [(name, torch.cat([point, pad])) for name, point in self._changes]
        self._gradient_changes = {
            name: torch.cat([change, torch.zeros_like(pad)]) for name, change in self._gradient_changes.items()
        }
        self._live.add(new)
        self._end_of_steps = self._trajectory.end_of_steps

    def _check_same(self, others: Sequence[str] | None = None) -> None:
        """Refuse parameters that are other tensors than on record; looked for unless they are given by name."""
        if others is None:
            live = dict(self.model.named_parameters())
            others = [name for name, p in self._live.named.items() if live.get(name) is not p]
        if others:
            raise RecordingError(
                f"The network's parameters {', '.join(f'`{name}`' for name in others)} are not those that it had when "
                "recording began",
                "A record is of one network: its parameters are the same tensors from start to end, some of which may "
                "stay frozen until later",
                "Write new values into the parameters (`load_state_dict` without `assign=True`), or make optimizer and "
                "KernelRecorder after the network has been changed",
            )

    def _check_pending(self, taken: bool = False) -> None:
        batches = self._pending.batches
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
            check_captured(self._trajectory, batches, type(self._outer).__name__, taken)

    def _check_gradient(self, gradient: Tensor) -> None:
        if math.isfinite(gradient.sum().item()):  # NaN and infinity do not cancel
            return
        named = self._live.gradients()
        finite = torch.stack([value.isfinite().all() for value in named.values()])
        if not finite.all():
            bad = [name for name, good in zip(named, finite.tolist(), strict=True) if not good]
            ids = torch.cat([batch.ids for batch in self._pending.take()]).tolist()
            index = len(self._trajectory)
            raise NonFiniteStepError(
                f"At step {index} the gradient of {', '.join(f'`{n}`' for n in bad)} holds NaN or infinity; "
                f"its samples are {ids[:16]}{' …' if len(ids) > 16 else ''}",
                f"Gradients are finite numbers; the optimizer has not moved, and the {index} steps before stay valid",
                "Look at these samples, lower the learning rate, or skip the step when the loss is not finite",
            )

    @property
    def _gradient_is_elsewhere(self) -> bool:
        """Whether only the optimizer knows where the gradient was taken: look-ahead and multi-stage methods."""
        rule = self._trajectory.rule
        return type(rule).stage_offsets is not UpdateRule.stage_offsets or rule.stages > 1

    def _try_out(self, step: Step) -> None:
        """Explain the first step of all, so that what cannot be explained is refused before training."""
        if not self._tried and self.audit_every != 0:
            reference = self._trajectory.run.reference
            if reference is not None:  # hooks may have been put on the network since recording began
                reference.check("KernelRecorder", (self._trajectory.function(), self._trajectory.initial), None)
            try_out(self._trajectory, step)
            self._tried = True

    def _audit(self, before: Tensor, gradient: Tensor, taken: bool = False) -> None:
        """Compare the gradient at hand with that of the announced samples, before the optimizer uses it if possible."""
        trajectory, index = self._trajectory, len(self._trajectory)
        if self._gradient_is_elsewhere or not is_due(index, self.audit_every):
            return
        self._check_same()
        step, live, passes = replace(self._slim_step(before, gradient), index=index), self._live, self._pending.passes
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
        )
        with generators_untouched():  # a network may draw from Python's or numpy's generator
            audit(trajectory, step, seen)
            for batch, outputs in self._pending.named:
                check_outputs(trajectory, step, batch, outputs, taken)


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer was told that gradients overflowed: it skips the step by itself."""
    overflowed = getattr(optimizer, "found_inf", None)
    return overflowed is not None and bool(overflowed)


def _equal(one: dict[str, tuple[Tensor, ...]], other: dict[str, tuple[Tensor, ...]]) -> bool:
    """Whether two copies of an optimizer's memory hold the same numbers."""
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )


def store_at(store: str | os.PathLike[str] | Store | None) -> Store:
    """The store that ``store=`` stands for."""
    if isinstance(store, Store):
        return store
    if store is None:
        return MemoryStore()
    from pathkernel.storage.disk import DiskStore  # not before it is needed

    return DiskStore(store)
