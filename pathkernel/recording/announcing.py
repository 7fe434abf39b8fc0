"""Announcement of samples: which of them the passes of a loop are of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.errors import RecordingError, SampleIdError
from pathkernel.gradients.pytrees import copied_samples
from pathkernel.recording.announced_batch import UNSAID, Delivery, checked_batch, checked_ids
from pathkernel.recording.indexed import IdsOf, IndexedBatch, NumberedBatch
from pathkernel.recording.kept_inputs import handed_out
from pathkernel.recording.made import Made
from pathkernel.recording.trial import check_network, is_at_hand
from pathkernel.runtime.threads import on_the_cpu
from pathkernel.trajectory.samples import samples_of
from pathkernel.trajectory.step import MicroBatch


class AnnouncesSamples(ABC):
    """Part of `pathkernel.KernelRecorder` by which sample ids arrive with the batch."""

    _keep: bool | None  # as given to the recorder
    _checked: bool  # whether the network has been looked at, on the first samples

    @property
    @abstractmethod
    def _parts(self) -> Made:
        """Parts that watch."""

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
        n = len(self._parts.trajectory.data)
        order = torch.randperm(n, generator=generator, device="cpu") if shuffle else torch.arange(n, device="cpu")
        for ids in order.split(batch_size):
            if drop_last and len(ids) < batch_size:
                break
            inputs, targets = self._parts.trajectory.data[ids]
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
        for batch in self._parts.loaders.batches(loader, ids):
            self._announce_indexed(batch, keep)
            yield batch.batch

    def take_ids(self, batch: IndexedBatch, *, keep: bool | None = None, rows: Any = None) -> Any:
        """Announce the samples of a batch of `pathkernel.indexed`, and return it without their ids.

        For loops that are not ours to write, where `track` has no place.

        Parameters
        ----------
        batch
            As the loader gave it.
        keep
            As for `track`.
        rows
            The batch as the loader gave it, where it was changed since: its rows are in the order of the ids.
        """
        if not isinstance(batch, IndexedBatch):
            raise SampleIdError(
                f"`take_ids` was given a {type(batch).__name__}",
                "Batches with the ids of their samples come from `pathkernel.indexed(loader)`",
                "Write `recorder.take_ids(batch)` for `batch in pk.indexed(loader)`",
            )
        self._announce_indexed(batch, keep, handed_out(rows))
        return batch.batch

    def _announce_indexed(self, batch: IndexedBatch, keep: bool | None, rows: Sequence[Tensor] = ()) -> None:
        found = MicroBatch(checked_ids(batch.ids, self._parts.trajectory.data.limit))
        # Ids that were counted, or stand in a field, may be of other samples: what differs is not kept by itself.
        tensors = handed_out(batch.batch)
        known = () if isinstance(batch, NumberedBatch) else tensors
        self._announce(found, Delivery(keep, known, rows or tensors))

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
        data = self._parts.trajectory.data
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
        pending = self._parts.capture.pending
        if not self._checked:
            pending.first = partial(check_network, self._parts.trajectory, self._parts.live.vector())
            self._checked = True
        copies, pending.watcher.copies = pending.watcher.copies, True
        try:
            with pending.sources.of(name):
                yield
        finally:
            pending.watcher.copies = copies

    def _announce(self, batch: MicroBatch, delivery: Delivery = UNSAID) -> None:
        with on_the_cpu():
            self._parts.trajectory.data.meet(batch.ids)
            delivery = delivery if batch.has_targets else replace(delivery, keep=True)
            keep = delivery.keep
            if not self._checked:
                trial = partial(check_network, self._parts.trajectory, self._parts.live.vector())
                wanted = self._keep if keep is None else keep
                if not wanted and is_at_hand(self._parts.trajectory.run, batch):
                    trial(batch)
                else:  # on what the network is given
                    self._parts.capture.pending.first = trial
                self._checked = True
            self._parts.capture.announce(batch, delivery)

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
        capture = self._parts.capture
        inside = capture.opened is not None  # in a closure: the optimizer may have moved the parameters to look ahead
        if not inside:
            capture.note_change("unexplained")
            capture.pending.forget_cleared()
        before = {n: gradient.clone() for n, gradient in self._parts.live.gradients().items()}
        watcher = capture.pending.watcher
        outer, watcher.channel = watcher.channel, name
        try:
            yield
        finally:
            watcher.channel = outer
        if not inside:
            capture.note_change(name)
        edits = {n: g - before.get(n, torch.zeros_like(g)) for n, g in self._parts.live.gradients().items()}
        if any(bool(edit.any()) for edit in edits.values()):
            self._check_one_stage(name)
            edit = self._parts.live.padded(edits)
            capture.gradient_changes[name] = capture.gradient_changes.get(name, torch.zeros_like(edit)) + edit

    def _check_one_stage(self, name: str) -> None:
        rule = self._parts.trajectory.rule
        if rule.stages > 1:
            raise RecordingError(
                f"Gradients were edited under the name `{name}`, and a step of {rule.name} takes {rule.stages} of them",
                "Edits of gradients are booked for optimizers that take one gradient in a step",
                "Edit the weights after the step instead, or train with an optimizer that has one stage",
            )
