"""Sample ids that travel as one more entry of a batch of named inputs, from the loader to the network's call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pathkernel.errors import SampleIdError
from pathkernel.recording.indexed import IndexedCollate, IndexedDataset, IndexedSample, inner_name

ENTRY = "pathkernel_ids"
"""Name of the entry."""


class CollateWithIds:
    """The user's own collate function, with the ids of the samples as one more entry of the batch; picklable.

    Parameters
    ----------
    collate
        Makes a batch, which is a dict, of the items of a dataset.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[IndexedSample]) -> MutableMapping[str, Any]:
        """Collate items as the user does, and put their ids in.

        Raises
        ------
        SampleIdError
            Where a batch is no dict.
        """
        ids, batch = IndexedCollate(self.collate)(samples)
        if not isinstance(batch, MutableMapping):
            raise SampleIdError(
                f"The data collator made a {type(batch).__name__}",
                "The Trainer calls the model with the entries of a batch as named arguments, and ids travel as one of "
                "them",
                "Write a `data_collator` that returns a dict of the model's inputs",
            )
        batch[ENTRY] = ids
        return batch


class WatchedBatches:
    """A sampler of batches that tells when somebody lets go of an epoch that he goes through.

    Parameters
    ----------
    batches
        The sampler.
    let_go
        Called then: where the epoch is over, or its loop has been left, by whatever error.
    """

    def __init__(self, batches: Any, let_go: Callable[[], None]) -> None:
        self.batches, self.let_go = batches, let_go

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return _Epoch(iter(self.batches), self.let_go)

    def __getattr__(self, name: str) -> Any:
        if name in ("batches", "let_go"):  # of one that is being copied
            raise AttributeError(name)
        return getattr(self.batches, name)


class _Epoch:
    """The batches of one epoch."""

    def __init__(self, batches: Iterator[Any], let_go: Callable[[], None]) -> None:
        self._batches, self._let_go = batches, let_go

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def __del__(self) -> None:
        self._let_go()


class LoaderWithIds:
    """A `torch.utils.data.DataLoader` that is made to yield batches with their ids, in place, until it is put back.

    In place, since the loop holds it already; its sampler, generator and worker processes stay what they are.

    Parameters
    ----------
    loader
        The loader, or what Accelerate wrapped around it.
    let_go
        Called when somebody lets go of an epoch; see `WatchedBatches`.
    """

    def __init__(self, loader: Any, let_go: Callable[[], None]) -> None:
        self.loader = base_loader(loader)
        own = vars(self.loader)
        self._own = {name: own.get(name) for name in ("dataset", "collate_fn", "batch_sampler", "_iterator")}
        # A DataLoader takes no new dataset, which might be of another length.
        own.update(
            dataset=IndexedDataset(own["dataset"]),
            collate_fn=CollateWithIds(own["collate_fn"]),
            batch_sampler=WatchedBatches(own["batch_sampler"], let_go),
            _iterator=None,
        )

    def put_back(self) -> None:
        """Make it what it was."""
        vars(self.loader).update(self._own)


def base_loader(loader: Any) -> Any:
    """The `torch.utils.data.DataLoader` inside what Accelerate wrapped around it; anything else as it is."""
    name = inner_name(loader)
    return loader if name is None else getattr(loader, name)


class TakesIds:
    """Forward pre-hook that takes an entry off the inputs of a network, and hands it on.

    Parameters
    ----------
    entry
        Its name.
    taken
        Called with the ids, None where there are none, and with the other inputs, by name or by place; None on copies
        of the network, which are not being recorded.
    """

    of_training: ClassVar[bool] = True
    """Tells `pathkernel.gradients.structural_copy` to leave it out."""

    def __init__(self, entry: str, taken: Callable[[Tensor | None, dict[str, Any]], None] | None = None) -> None:
        self.entry, self.taken = entry, taken

    def __call__(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take it off."""
        others = {name: value for name, value in named.items() if name != self.entry}
        if self.taken is not None and torch.is_grad_enabled():
            self.taken(named.get(self.entry), {**others, **{str(i): given for i, given in enumerate(arguments)}})
        return arguments, others

    def __reduce__(self) -> tuple[type[TakesIds], tuple[str]]:
        return TakesIds, (self.entry,)  # the whole record would come along


class TakesIdsOfCompiled:
    """Takes ids off in the calls of a module that was compiled in place (`torch.nn.Module.compile`), from outside.

    Parameters
    ----------
    module
        The module.
    hook
        What takes them off.
    """

    def __init__(self, module: nn.Module, hook: TakesIds) -> None:
        self._module = module
        self._compiled = compiled = module._compiled_call_impl
        assert compiled is not None

        @functools.wraps(compiled)
        def called(*arguments: Any, **named: Any) -> Any:
            arguments, named = hook(module, arguments, named)
            return compiled(*arguments, **named)

        self._called = module._compiled_call_impl = called  # copies and pickles of a module leave it out

    def remove(self) -> None:
        """Call the module as before, unless it was compiled anew since."""
        if self._module._compiled_call_impl is self._called:
            self._module._compiled_call_impl = self._compiled
