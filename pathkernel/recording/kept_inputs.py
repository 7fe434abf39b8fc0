"""Inputs of the network in training, kept where they are not what the data hold under the announced ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import SampleIdError
from pathkernel.gradients.arguments import Key, arguments_of, keyed
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.recording.calls import CallReader, SeenCall, changed_since, differing, identical
from pathkernel.recording.row_order import numbers_of, order_of, tells
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.trajectory.samples import Samples
from pathkernel.trajectory.step import MicroBatch

if TYPE_CHECKING:
    from pathkernel.recording.announced_batch import Delivery


class KeptInputs:
    """Decides what is kept of the arguments of forward passes.

    Without data, all that is of the samples. With data, where inputs are to be kept (``keep=True``), what is not the
    data's to the last bit. Otherwise passes are compared with the data when their step is audited: batches that reached
    the network as `KernelRecorder.track` handed them out, with their ids in them, are kept from there on where they
    differ; all others are noted, since their ids may be wrong.

    Parameters
    ----------
    data
        The training samples.
    function
        The network.
    keep
        What holds for batches that say nothing of it.

    Attributes
    ----------
    differences
        What was noted since they were taken last.
    """

    def __init__(self, data: Samples, function: ModelFunction, keep: bool | None) -> None:
        self.data, self.keep, self.dtype = data, keep, function.dtype
        self.forward = function.called[0].forward
        self._axes = function.axes
        self._reader = None if data.announced else self._read_data()
        self._always = self._other_data = self._searched = False
        self.differences: list[str] = []
        self._handed_out: tuple[Sequence[Tensor], Sequence[Tensor]] = (), ()  # with the batch before, and with the last

    def announced(self, handed_out: Sequence[Tensor]) -> None:
        """Take note of what `KernelRecorder.track` hands out with a batch."""
        self._handed_out = self._handed_out[1], handed_out

    def _read_data(self) -> CallReader:
        example = result_or_error(lambda: self.data.example[0], (Exception,))
        return CallReader(self.forward, self._axes, None if isinstance(example, Exception) else example)

    @property
    def reader(self) -> CallReader:
        """Takes calls apart."""
        if self._reader is None:
            self._reader = CallReader(self.forward, self._axes, None)
        return self._reader

    def copies(self, keep: bool | None) -> bool:
        """True where arguments are copied before the pass: somebody may write on them."""
        return bool(self.keep if keep is None else keep) or self._always or self.data.announced

    def of(
        self, batch: MicroBatch, call: SeenCall, delivery: Delivery, due: bool
    ) -> tuple[MicroBatch, PyTree, Mapping[Key, Any]]:
        """A batch with its ids in the order of its rows, its inputs as they are kept, or None, and what samples shared.

        Parameters
        ----------
        batch
            As announced.
        call
            What the network was given.
        delivery
            How it came to the loop.
        due
            Whether the step is audited.
        """
        n, reader = len(batch.ids), self.reader
        samples, shared = reader.read(call, n)
        if not samples:
            if self.data.announced and batch.inputs is None:
                raise _without_samples(call, n)
            return batch, batch.inputs, shared
        if call.copied:
            batch = _in_order(batch, samples, delivery.rows)
        return *self._inputs(batch, call, samples, delivery, due), shared

    def _inputs(
        self, batch: MicroBatch, call: SeenCall, samples: Mapping[Key, Any], delivery: Delivery, due: bool
    ) -> tuple[MicroBatch, PyTree]:
        keep, handed_out, reader = delivery.keep, delivery.handed_out, self.reader
        if due and self._came_before(samples, handed_out):
            self.differences.append(
                "they were handed out by `track` with the batch before, as where batches are fetched ahead of their "
                "pass"
            )
        if not batch.has_targets and batch.inputs is None:  # rows that are none of the data's
            return batch, self._kept(samples, call)
        alike = samples.keys() == set(reader.in_data)
        if batch.inputs is not None and not self.data.announced:
            return batch, batch.inputs if alike else self._kept(samples, call)
        if self.data.announced:
            return batch, self._kept(samples, call)
        wanted = bool(self.keep if keep is None else keep)
        if not (wanted or self._always or due):
            return batch, None if samples.keys() <= set(reader.in_data) else self._kept(samples, call)
        expected = None if self._other_data else self._in_data(batch.ids)
        if expected is not None and identical(samples, expected, self.dtype):
            return batch, None
        own = {key: value for key, value in samples.items() if key in reader.in_data}
        difference = ""
        if not (wanted or self._always):
            difference = differing(own, expected, self.dtype) if expected else "the data cannot be read as a batch"
            if difference and self._was_handed_out(own or samples, handed_out):
                self._always = True
                batch = _in_order(batch, samples, delivery.rows)
        if wanted or self._always:
            try:
                moved = batch if expected is None else _in_order(batch, own, self._rows_in_data(batch.ids))
            except SampleIdError:
                self._refuse_other_places(own)
                raise
            if moved is not batch and own.keys() == samples.keys():
                return moved, None
            if due and moved is batch and expected:
                self._refuse_other_places(own)
            # Items of a dataset are not fetched twice for every batch, once they have been seen to be others.
            self._other_data = self.data.dataset is not None
            if due and not wanted and not self._was_handed_out(own or samples, handed_out):
                self.differences.append("they are not what `track` handed out under these ids")
            return moved, self._kept(samples, call)
        if difference:
            self.differences.append(difference)
        return batch, None if alike or not samples.keys() - own.keys() else self._kept(samples, call)

    def _refuse_other_places(self, samples: Mapping[Key, Any]) -> None:
        """Refuse samples that arrays of data hold to the last bit, though not under the announced ids.

        Raises
        ------
        SampleIdError
            For the first batch of which that holds; later ones are not looked for.
        """
        if self._searched or self.differences or self.data.dataset is not None or not samples:
            return
        self._searched = True
        places = torch.arange(len(self.data)).split(4096)
        for leaf in pytree.tree_leaves(dict(samples)):
            known = [one for part in places for one in pytree.tree_leaves(self._in_data(part))]
            alike = [one.to(leaf) for one in known if one.shape[1:] == leaf.shape[1:]]
            if not alike or not tells(leaf):
                return
            if not torch.isin(numbers_of(leaf), torch.cat([numbers_of(one) for one in alike])).all():
                return
        raise SampleIdError(
            "The network was given samples that `data` holds in other places than under the announced ids",
            "Ids are places in `data`, and those of a stream are counted as its samples come, as if it were in order",
            'Have each item bring its place, and say where it is in the batch, `ids="index"`; or give the dataset of '
            "the loader as `data=`, or leave `data=` out, and samples are counted",
        )

    def _rows_in_data(self, ids: Tensor) -> list[Tensor]:
        """All that the data hold under some ids."""
        with generators_untouched():
            return [leaf for leaf in pytree.tree_leaves(self.data[ids]) if isinstance(leaf, Tensor)]

    def _in_data(self, ids: Tensor) -> dict[Key, Any] | None:
        """Arguments that the data hold for some ids; None where they are no batch."""

        def fetched() -> dict[Key, Any]:
            with generators_untouched():
                arguments, named = arguments_of(self.forward, self.data[ids][0])
            return keyed(self.reader.places, arguments, named)

        found = result_or_error(fetched, (Exception,))
        return None if isinstance(found, Exception) else found

    def _kept(self, samples: Mapping[Key, Any], call: SeenCall) -> PyTree:
        if not call.is_intact:
            raise changed_since()
        inputs = self.reader.inputs(samples, call)
        self.data.note(inputs)
        return pytree.tree_map(lambda leaf: leaf.contiguous() if call.copied else leaf.clone(), inputs)

    def _was_handed_out(self, samples: Mapping[Key, Any], handed_out: Sequence[Tensor]) -> bool:
        """True where all that the network saw of the samples are tensors that came with their ids."""
        leaves = pytree.tree_leaves(dict(samples))
        return all(any(self._is(leaf, other) for other in handed_out) for leaf in leaves)

    def _came_before(self, samples: Mapping[Key, Any], handed_out: Sequence[Tensor]) -> bool:
        """True where what the network saw was handed out with the batch before this one, and not with this."""
        before = self._handed_out[0]
        if not (before and handed_out is self._handed_out[1]) or self._was_handed_out(samples, handed_out):
            return False
        return self._was_handed_out(samples, before)

    def _is(self, leaf: Tensor, other: Tensor) -> bool:
        same = leaf.data_ptr() == other.data_ptr() and leaf.shape == other.shape
        return same or not differing({"": leaf}, {"": other}, self.dtype)

    def take_differences(self) -> list[str]:
        """Differences that were noted; they are noted no more."""
        found, self.differences = self.differences, []
        return found


def _in_order(batch: MicroBatch, samples: Mapping[Key, Any], rows: Sequence[Tensor]) -> MicroBatch:
    """A batch with its ids in the order of the rows that the network was given, where these lie in another one."""
    n = len(batch.ids)
    given = [leaf for leaf in pytree.tree_leaves(dict(samples)) if isinstance(leaf, Tensor) and leaf.shape[:1] == (n,)]
    if not rows or not given or batch.weights is not None or batch.inputs is not None or batch.ids.dim() > 1:
        return batch
    order = order_of(given, rows, n)
    return batch if order is None else replace(batch, ids=batch.ids[order])


def _without_samples(call: SeenCall, n: int) -> SampleIdError:
    """The refusal of a pass none of whose arguments has a row for each announced sample."""
    leaves = [leaf for leaf in pytree.tree_leaves(dict(call.arguments)) if isinstance(leaf, Tensor)]
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or "none"
    return SampleIdError(
        f"{n} samples were announced, and the network was given no tensor with {n} rows (shapes: {shapes})",
        "Where the data are not at hand, what the network is given is kept: tensors with one row for each sample",
        "Say along which axis samples lie, `KernelRecorder(..., batch_axis=1)`, or announce the ids of the samples "
        "that this pass is of",
    )


def handed_out(batch: Any) -> tuple[Tensor, ...]:
    """Tensors of a batch, however they are nested."""
    leaves = pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)  # of all kinds of mappings
    return tuple(leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor))
