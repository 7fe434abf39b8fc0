"""Forward passes of a training step: which samples each of them is of, where a batch does not tell by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel.errors import SampleIdError
from pathkernel.recording.forward import Hook
from pathkernel.recording.indexed import IndexedBatch, NumberedBatch
from pathkernel.recording.recorder import KernelRecorder


class PassesOfBatches:
    """Announces the samples of each pass right before it, by the tensors that the network is given.

    A pass is of the batch one of whose tensors it is given, or a view of it. Of several batches it is of the one that
    has as many samples as it has rows, or of all of them joined. Passes that are given nothing of any batch are of a
    source, where that has a name.

    Parameters
    ----------
    recorder
        The recorder.
    called
        What is called first in a forward pass.
    source
        Name of the source; None for none.
    """

    def __init__(self, recorder: KernelRecorder, called: nn.Module, source: str | None) -> None:
        self._recorder, self._source = recorder, source
        self._batches: list[IndexedBatch] = []
        self._came: list[Any] = []
        self._of: list[set[int]] = []
        self._last: Any = None
        self._inside = ExitStack()
        self._handle = called.register_forward_pre_hook(Hook(self._enter), prepend=True, with_kwargs=True)

    def expect(self, batches: Sequence[IndexedBatch], came: Sequence[Any]) -> None:
        """Take note of the batches of a training step, and of how they came from their loaders."""
        self.leave()
        self._batches, self._came, self._last = list(batches), list(came), None
        self._of = [{_memory(leaf) for leaf in _tensors(one.batch)} for one in batches]

    def leave(self) -> None:
        """Passes to come are of nothing that is known."""
        self._inside.close()
        self._batches, self._came, self._of, self._last = [], [], [], None

    def remove(self) -> None:
        """Take the hook off."""
        self.leave()
        self._handle.remove()

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() >= 0:
            return
        self._inside.close()
        given = _tensors((arguments, named))
        memory = {_memory(leaf) for leaf in given}
        hits = [k for k, own in enumerate(self._of) if own & memory]
        if self._source is not None and not hits:
            self._last = None
            self._inside.enter_context(self._recorder.source(self._source))
            return
        one = self._batches[hits[0]] if len(hits) == 1 else self._by_rows(given)
        if one is not self._last:
            rows = next((own for each, own in zip(self._batches, self._came, strict=True) if each is one), None)
            self._recorder.take_ids(one, rows=rows)
            self._last = one

    def _by_rows(self, given: Sequence[Tensor]) -> IndexedBatch:
        """The batch, or all of them joined, that has as many samples as a pass has rows.

        Raises
        ------
        SampleIdError
            Where that does not tell.
        """
        rows = next((leaf.shape[0] for leaf in given if leaf.dim()), 0)
        sizes = [len(one.ids) for one in self._batches]
        if sizes.count(rows) == 1:
            return self._batches[sizes.index(rows)]
        if sizes and rows == sum(sizes):
            if self._joined is None or self._joined[0] is not self._batches:
                ids = torch.cat([one.ids for one in self._batches])
                self._joined = self._batches, NumberedBatch(ids, _joined(self._came))
            return self._joined[1]
        raise SampleIdError(
            f"The network was given {rows} rows, none of them in the memory of a batch, and the loaders' batches have "
            f"{', '.join(map(str, sizes)) or 'no'} samples",
            "Samples of a pass are those of the batch whose tensors it is given, or of the only one with as many "
            "samples, or of all, in the order of the loaders",
            "Hand the loaders' tensors to the network as they are, or joined by `torch.cat`; or announce the samples "
            "right before the pass, `callback.recorder.announce(ids)`",
        )

    _joined: tuple[list[IndexedBatch], IndexedBatch] | None = None


def _joined(batches: Sequence[Any]) -> list[Tensor]:
    """Tensors of several batches one after the other, where they have the same shape for a sample."""
    parts = zip(*[_tensors(batch) for batch in batches], strict=False)
    alike = [part for part in parts if len({(leaf.dim(), leaf.shape[1:], leaf.dtype) for leaf in part}) == 1]
    return [torch.cat(part) for part in alike if part[0].dim()]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """Where a tensor and its views lie."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


class CalledParts:
    """Notes which parts of a module are called, for messages.

    Parameters
    ----------
    module
        The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names: list[str] = []
        self._handles = [
            child.register_forward_pre_hook(Hook(self._note(name)))
            for name, child in [("", module), *module.named_children()]
        ]

    def _note(self, name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if torch.is_grad_enabled() and name not in self.names:
                self.names.append(name)

        return note

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
