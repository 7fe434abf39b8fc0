"""`KernelRecorder`: watches an ordinary training loop through the optimizer's own step hooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel._typing import Loss, Parameters, PyTree
from pathkernel.errors import RecordingError, SampleIdError
from pathkernel.gradients.batch_axes import BatchAxis, check_batch_axis
from pathkernel.gradients.losses import Objective, check_recorded_loss, check_reduction, check_task
from pathkernel.gradients.parameters import ParameterLayout, constants_of, named_trainable
from pathkernel.gradients.pytrees import copied_samples
from pathkernel.gradients.returned import Returns, check_returns, one_of_two
from pathkernel.recording.attaching import joined, others_of
from pathkernel.recording.indexed import IdsOf, IndexedBatch, NumberedBatch, TrackedLoaders
from pathkernel.recording.joint_capture import JointCapture
from pathkernel.recording.kept_inputs import handed_out
from pathkernel.recording.live import LiveParameters
from pathkernel.recording.micro_batches import PendingBatches, checked_batch, checked_ids
from pathkernel.recording.open_recorders import OPEN, caller, make_way, say_that_it_was_forked
from pathkernel.recording.optimizers import JointOptimizer, rules_of, unwrapped_optimizers
from pathkernel.recording.readings import StepHooks
from pathkernel.recording.step_capture import StepCapture
from pathkernel.recording.store_choice import store_at, store_for
from pathkernel.recording.trial import check_network, is_at_hand
from pathkernel.recording.validation import check_optimizer, unwrapped
from pathkernel.recording.watched import Watch, watched_parts
from pathkernel.runtime.interrupts import defer_interrupts
from pathkernel.runtime.threads import made_on_the_cpu, on_the_cpu
from pathkernel.trajectory.averages import AverageRecord
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.observer import StepObserver
from pathkernel.trajectory.reference_outputs import ReferenceOutputs
from pathkernel.trajectory.replay import ReplayStore
from pathkernel.trajectory.run import End, RecordedOptimizer, Run, Start
from pathkernel.trajectory.samples import Samples, samples_of
from pathkernel.trajectory.schedule import RecordingLevel, Streaming, as_schedule
from pathkernel.trajectory.step import MicroBatch
from pathkernel.trajectory.store import Store
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.joint import JointRule
from pathkernel.update_rules.rule import UpdateRule
from pathkernel.update_rules.table import rule_of

T = TypeVar("T")


class KernelRecorder:
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
        or a dict by its name, with ``"outputs"``, and None for an argument that all samples share. Everywhere outside
        the network's own call (data, kept inputs, queries, slopes) samples are first.
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
        outer, model = model, unwrapped(model)
        returns, parts = one_of_two(returns, outputs), watched_parts(model, watch)
        self.model = model
        self.optimizer: Optimizer | JointOptimizer | None = None
        self._made: StepCapture | None = None
        self._path: Trajectory | None = None
        self._memory_at_close: dict[str, tuple[Tensor, ...]] = {}
        self._checked = self._waits = False
        self._keep = keep
        self._process, self._begun, self._in_with, self._told = os.getpid(), "", False, False
        self._make = partial(
            self._make_for,
            outer=outer,
            loss=loss,
            data=data,
            returns=returns,
            parts=parts,
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
        if optimizer is not None:
            self._make(unwrapped_optimizers(optimizer, rule))

    def _make_for(
        self,
        optimizers: list[Optimizer],
        *,
        outer: nn.Module,
        loss: Loss | str | None,
        data: Any,
        returns: Returns,
        parts: tuple[str, ...],
        batch_axis: BatchAxis,
        keep: bool | None,
        task: str | None,
        rule: UpdateRule | str | Sequence[UpdateRule | str | None] | None,
        reduction: str,
        regularizers: Mapping[str, Callable[[Parameters], Tensor]] | None,
        averages: Mapping[str, nn.Module | Mapping[str, Tensor]] | None,
        audit_every: int | None,
        store: str | os.PathLike[str] | Store | None,
        schedule: RecordingLevel | None,
        observers: Sequence[StepObserver],
    ) -> None:
        """Make everything that follows from the optimizers: the rule, the run, the record and what watches."""
        model = self.model
        rules = rules_of(optimizers, rule)
        alone = len(optimizers) == 1
        optimizer: Optimizer | JointOptimizer = optimizers[0] if alone else JointOptimizer(optimizers, rules)
        rule = optimizer.rule if isinstance(optimizer, JointOptimizer) else rules[0]
        check_optimizer(model, optimizer, rule)
        self.optimizer = optimizer
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
            watch=parts,
            batch_axis=check_batch_axis(batch_axis),
        )
        if run.data.holds_integers:
            run.data.suit(run.function(), initial)
        self._live = live = LiveParameters(named, optimizer)
        self._observers = level.observers if isinstance(level, Streaming) else tuple(observers)
        if run.data.limit is None and self._observers:
            raise RecordingError(
                f"{type(self._observers[0]).__name__} was given to a recorder that counts samples as they come",
                "What watches training adds up shares while it runs, and has to know how many samples there are",
                "Write `KernelRecorder(..., data=number_of_samples)`",
            )
        self._averages = dict(averages or {})
        kept, keyframes = store_for(store_at(store), run, live, bool(self._averages), bool(self._observers))
        self._path = path = Trajectory(run, kept)
        records = {name: AverageRecord.begin(name, source, layout) for name, source in self._averages.items()}
        path.stand(End(averages=records))
        capture = StepCapture if isinstance(optimizer, Optimizer) else JointCapture
        self._made = capture(
            outer,
            model,
            optimizer,
            live,
            path,
            keyframes,
            self._observers,
            self._averages,
            audit_every,
            keep,
            # The optimizer's hooks keep a recorder alive by this that nobody else names any more.
            stopped=partial(say_that_it_was_forked, self),
        )
        self._loaders = TrackedLoaders(run.data, run.batch_axis)

    @property
    def _capture(self) -> StepCapture:
        return self._with_optimizer(self._made)

    @property
    def _trajectory(self) -> Trajectory:
        return self._with_optimizer(self._path)

    @staticmethod
    def _with_optimizer(part: T | None) -> T:
        if part is None:
            raise RecordingError(
                "The recorder has no optimizer yet",
                "What is recorded are the steps of optimizers",
                "Write `KernelRecorder(model, optimizer, ...)`, or `recorder.attach(optimizer)` before training",
            )
        return part

    @property
    def _pending(self) -> PendingBatches:
        return self._capture.pending

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
        for observer in self._observers:
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
        place = resume(run, trajectory.store, self._live, self._averages)
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
        return [] if self._made is None else self._made.hooks

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
        given = self._make.keywords["rule"]
        rule = None if isinstance(given, (list, tuple, JointRule)) else given
        new = unwrapped_optimizers(optimizer, rule)
        if self._made is None or self._may_begin_anew(self._made):
            self._begin_anew(new, given)
            return
        for one in new:
            now = joined(self._capture.optimizer, self._trajectory.rule, one, rule_of(one, rule))
            check_optimizer(self.model, now, self._trajectory.rule)
            if isinstance(now, JointOptimizer) and not isinstance(self._capture, JointCapture):
                self._made = JointCapture.instead_of(self._capture, now)
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
        capture, last = self._made, None
        kept: list[Optimizer] = []
        if capture is not None:
            kept, given = others_of(capture.optimizer, new, given)
            last = capture.pending.last if self._handles else None
            self._waits = self._waits or bool(self._handles)
            self._detach()
        self._make([*kept, *new], rule=given)
        if self._waits:
            in_with, self._waits = self._in_with, False
            self.start()
            self._in_with = in_with
        if last is not None:
            self._announce(last)

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
        order = torch.randperm(n, generator=generator, device="cpu") if shuffle else torch.arange(n, device="cpu")
        for ids in order.split(batch_size):
            if drop_last and len(ids) < batch_size:
                break
            inputs, targets = self._trajectory.data[ids]
            self._announce(MicroBatch(ids))
            yield inputs, targets

    def track(self, loader: Iterable[Any], *, keep: bool | None = None, ids: IdsOf = None) -> Iterator[Any]:
        """Iterate over a loader; the loop sees its batches as they are.

        Ids travel inside the batch, so samplers, worker processes, pre-fetching and an early ``break`` cannot
        detach them.

        Parameters
        ----------
        loader
            A `torch.utils.data.DataLoader` over a map-style dataset, whose samples have their places in it as ids (in
            the data, where it is a `torch.utils.data.Subset` of these); or any iterable of batches, whose samples are
            counted as they come (anew for each loader where ``data`` is their number, on and on where it is not given).
        keep
            True keeps the arguments that the network is given, and ids alone where ``data`` hold the same to the last
            bit: for random augmentation, scaling in the loop, padding. By default, the first batches and audited ones
            are compared: where the network was given the loader's own tensors and these differ from the data, they are
            kept from there on; where it was given something else, or ids are from a field, the step is refused, since
            ids may be wrong.
        ids
            Where ids are in a batch: a key, a place, or a function of the batch.
        """
        for batch in self._loaders.batches(loader, ids):
            self._announce_indexed(batch, keep)
            yield batch.batch

    def take_ids(self, batch: IndexedBatch, *, keep: bool | None = None) -> Any:
        """Announce the samples of a batch of `pathkernel.indexed`, and return it without their ids.

        For loops that are not ours to write, where `track` has no place.

        Parameters
        ----------
        batch
            As the loader gave it.
        keep
            As for `track`.
        """
        if not isinstance(batch, IndexedBatch):
            raise SampleIdError(
                f"`take_ids` was given a {type(batch).__name__}",
                "Batches with the ids of their samples come from `pathkernel.indexed(loader)`",
                "Write `recorder.take_ids(batch)` for `batch in pk.indexed(loader)`",
            )
        self._announce_indexed(batch, keep)
        return batch.batch

    def _announce_indexed(self, batch: IndexedBatch, keep: bool | None) -> None:
        found = MicroBatch(checked_ids(batch.ids, self._trajectory.data.limit))
        # Ids that were counted, or stand in a field, may be of other samples: what differs is not kept by itself.
        self._announce(found, keep, () if isinstance(batch, NumberedBatch) else handed_out(batch.batch))

    def announce(
        self, ids: Any, weights: Any = None, inputs: PyTree = None, targets: PyTree = None
    ) -> tuple[PyTree, PyTree]:
        """Announce the samples of the next forward pass, for loops that know their ids.

        A second pass after one announcement is another one of the same samples; announced after the forward pass, it
        holds for that pass if the batch announced before has had its own.

        Parameters
        ----------
        ids
            (B,) sample ids; (B, k) where k samples share each row, as in mixup.
        weights
            (B,) coefficient of each sample's loss in the batch loss; None where the recorded loss reduces the batch.
            Used only where that is evaluated again: slopes from the training pass hold them already. With ids (B, k):
            (B, k) or (k,), which part of what a row contributed is booked under each of its samples, a convention; they
            add up to 1, so that the total stays exact.
        inputs, targets
            What the network sees where it differs from the training data, such as augmented images.

        Returns
        -------
        The inputs and targets to train on, as far as they are at hand.
        """
        data = self._trajectory.data
        with on_the_cpu():
            batch = checked_batch(data.limit, ids, weights, inputs, targets)
            # Copies: the loop may fill the same arrays with its next batch.
            kept = replace(batch, inputs=copied_samples(inputs), targets=copied_samples(targets))
        self._announce(kept)
        return (batch.inputs, batch.targets) if data.announced else samples_of(batch, data)

    batch = announce
    """Older name of `announce`."""

    @contextmanager
    def source(self, name: str) -> Iterator[None]:
        """Take the forward passes inside for passes of samples that are not of the training data.

        Their samples are counted as they come, what the network was given is kept, and they have columns of their own
        behind those of the training samples: ``why.shares[:, why.sources[name]]``. For what a generator makes, for
        latents, for rows that nobody can number.

        Parameters
        ----------
        name
            Of the source, such as ``"generated"``.

        Examples
        --------
        >>> import torch, pathkernel as pk
        >>> real, critic, loss = torch.randn(8, 2), torch.nn.Linear(2, 1), torch.nn.BCEWithLogitsLoss()
        >>> optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
        >>> with pk.KernelRecorder(critic, optimizer, data=(real, torch.ones(8, 1))) as recorder:
        ...     for x, one in recorder.batches(4):
        ...         optimizer.zero_grad()
        ...         loss(critic(x), one).backward()
        ...         with recorder.source("generated"):
        ...             loss(critic(torch.randn(4, 2)), torch.zeros(4, 1)).backward()
        ...         optimizer.step()
        >>> why = pk.KernelMachine(recorder.trajectory).explain(real[:1])
        >>> why.shares.shape, why.sources
        ((1, 16), {'generated': slice(8, 16, None)})
        """
        pending = self._pending
        if not self._checked:
            pending.first = partial(check_network, self._trajectory, self._live.vector())
            self._checked = True
        copies, pending.watcher.copies = pending.watcher.copies, True
        try:
            with pending.sources.of(name):
                yield
        finally:
            pending.watcher.copies = copies

    def _announce(self, batch: MicroBatch, keep: bool | None = None, handed_out: Sequence[Tensor] = ()) -> None:
        with on_the_cpu():
            self._trajectory.data.meet(batch.ids)
            keep = keep if batch.has_targets else True
            if not self._checked:
                trial = partial(check_network, self._trajectory, self._live.vector())
                wanted = self._keep if keep is None else keep
                if not wanted and is_at_hand(self._trajectory.run, batch):
                    trial(batch)
                else:  # on what the network is given
                    self._pending.first = trial
                self._checked = True
            self._capture.announce(batch, keep, handed_out)

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
        capture = self._capture
        inside = capture.opened is not None  # in a closure: the optimizer may have moved the parameters to look ahead
        if not inside:
            capture.note_change("unexplained")
            capture.pending.forget_cleared()
        before = {n: gradient.clone() for n, gradient in self._live.gradients().items()}
        watcher = capture.pending.watcher
        outer, watcher.channel = watcher.channel, name
        try:
            yield
        finally:
            watcher.channel = outer
        if not inside:
            capture.note_change(name)
        edits = {n: g - before.get(n, torch.zeros_like(g)) for n, g in self._live.gradients().items()}
        if any(bool(edit.any()) for edit in edits.values()):
            self._check_one_stage(name)
            edit = self._live.padded(edits)
            capture.gradient_changes[name] = capture.gradient_changes.get(name, torch.zeros_like(edit)) + edit

    def _check_one_stage(self, name: str) -> None:
        rule = self._trajectory.rule
        if rule.stages > 1:
            raise RecordingError(
                f"Gradients were edited under the name `{name}`, and a step of {rule.name} takes {rule.stages} of them",
                "Edits of gradients are booked for optimizers that take one gradient in a step",
                "Edit the weights after the step instead, or train with an optimizer that has one stage",
            )


def _equal(one: dict[str, tuple[Tensor, ...]], other: dict[str, tuple[Tensor, ...]]) -> bool:
    """True where two copies of an optimizer's memory hold the same numbers."""
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)
    )
