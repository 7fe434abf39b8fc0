"""Train loaders of a trainer whose batches are as they were, and whose samples' ids are known when they arrive."""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from pathkernel.errors import SampleIdError
from pathkernel.recording.indexed import (
    CountedBatches,
    IdsOf,
    IndexedBatch,
    is_map_style,
    places_in,
    with_ids,
)
from pathkernel.trajectory.samples import Samples

AHEAD = 8
"""Batches of one iteration that are known at a time: loops fetch one ahead where they cannot know which is the last."""


class Arrived:
    """A batch of one loader that has reached the training loop.

    Parameters
    ----------
    loader
        The loader.
    found
        Its batch, with ids.
    way
        Keys that lead to it in what the loop got: empty where it is that itself.
    """

    def __init__(self, loader: Any, found: IndexedBatch, way: tuple[Any, ...]) -> None:
        self.loader, self.found, self.way = loader, found, way

    def in_(self, batch: Any) -> Any:
        """The same part of what became of the batch on its way to the device."""
        for key in self.way:
            try:
                batch = batch[key]
            except (KeyError, IndexError, TypeError):
                return self.found.batch
        return batch


class TrainLoaders:
    """The train loaders of one ``fit``.

    Batches come out of a loader as the user's own code knows them; the ids that travelled with them are looked up by
    the identity of the batch.

    Parameters
    ----------
    ids
        Where ids are in a batch, as `pathkernel.KernelRecorder.track` takes it.
    anew
        Whether samples that are counted are counted from 0 in each iteration.

    Attributes
    ----------
    fetched
        Called with each batch as it is fetched; None where nobody asks.
    """

    def __init__(self, ids: IdsOf = None, anew: bool = False) -> None:
        self._ids, self._anew = ids, anew
        self._going: weakref.WeakKeyDictionary[CarriedBatches, deque[IndexedBatch]] = weakref.WeakKeyDictionary()
        self.fetched: Callable[[Arrived], None] | None = None

    def carrying(self, loader: Any) -> Any:
        """A loader like another one, of the same batches in the same order; see `pathkernel.indexed`.

        Raises
        ------
        SampleIdError
            Where samples cannot be told.
        """
        found = loader if isinstance(loader, _CarriesIds) else _carrying(loader, self._ids, self._anew)
        found._listeners.append(weakref.ref(self))
        return found

    def see(self, batches: CarriedBatches, found: IndexedBatch) -> None:
        """Take note of a batch that is handed out."""
        if self.fetched is not None:
            self.fetched(Arrived(batches.loader, found, ()))
        else:
            self._going.setdefault(batches, deque(maxlen=AHEAD)).append(found)

    def arrived(self, batch: Any) -> list[Arrived]:
        """The batches that something fetched is, or consists of, in its order."""
        known = [(batches, found) for batches, handed_out in self._going.items() for found in handed_out]
        arrived = []
        for way, part in _parts(batch, (), lambda one: any(one is found.batch for _, found in known)):
            batches, found = next(pair for pair in known if pair[1].batch is part)
            while self._going[batches].popleft() is not found:
                pass  # somebody else asked for those
            arrived.append(Arrived(batches.loader, found, way))
        return arrived


def _parts(batch: Any, way: tuple[Any, ...], known: Callable[[Any], bool]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Known parts of a nested batch, with the keys that lead to them."""
    if known(batch):
        yield way, batch
    elif isinstance(batch, (Mapping, list, tuple)):
        pairs = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        for key, part in pairs:
            yield from _parts(part, (*way, key), known)


class CarriedBatches:
    """An iteration over a loader of `IndexedBatch` that yields plain batches.

    Parameters
    ----------
    batches
        Yields them.
    loader
        As the trainer knows it.

    Attributes
    ----------
    loader
        As given.
    """

    def __init__(self, batches: Iterator[IndexedBatch], loader: Any) -> None:
        self._batches, self.loader = batches, loader

    def __iter__(self) -> CarriedBatches:
        return self

    def __next__(self) -> Any:
        found = next(self._batches)
        for listener in self.loader._listeners:
            one = listener()
            if one is not None and found.batch is not None:
                one.see(self, found)
        return found.batch

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # as Lightning does with torch's own when a trainer is copied


class _CarriesIds:
    """Part of a loader that is made from another one: it yields its batches, whose ids are noted."""

    _within: Any
    _listeners: list[weakref.ref[TrainLoaders]]

    def __iter__(self) -> Iterator[Any]:
        return CarriedBatches(iter(self._within), self)


class _CarryingLoader(_CarriesIds):
    """Part of a `torch.utils.data.DataLoader` that is made from another one.

    Its dataset and its ``collate_fn`` are the user's: those with ids are of a loader within, which does the work.
    """

    _works: DataLoader

    def __iter__(self) -> Iterator[Any]:
        # Frameworks set these on loaders that they were given.
        for name in ("worker_init_fn", "generator"):
            setattr(self._works, name, getattr(self, name))
        return super().__iter__()

    @property
    def _iterator(self) -> Any:
        """Worker processes that persist: a framework ends them."""
        return self._works._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._works._iterator = iterator


class _CarryingIterable(_CarriesIds):
    """Any other iterable of batches."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_loader"], name)


class _StatefulIterable(_CarryingIterable):
    """One whose state is in checkpoints; protocols are looked for in the class."""

    def state_dict(self) -> dict[str, Any]:
        """The state of the iterable."""
        return self._loader.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._loader.load_state_dict(state)  # type: ignore[attr-defined]


def _carrying(loader: Any, ids: IdsOf, anew: bool) -> Any:
    counted = _start_at_zero if anew else None
    if not isinstance(loader, DataLoader):
        stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        other = (_StatefulIterable if stateful else _CarryingIterable)(loader)
        other._within = loader if isinstance(loader, CountedBatches) else CountedBatches(loader, ids, start=counted)
        other._listeners = []
        return other
    kind = type(loader)
    works = copy.copy(loader)
    if ids is None and is_map_style(loader):
        if kind.__iter__ is not DataLoader.__iter__:
            raise SampleIdError(
                f"The train loader is a {kind.__name__}, which has an `__iter__` of its own",
                "Ids are put into batches as they are collated, and such a loader would meet them",
                "Say where ids are in its batches, `LightningRecorder(ids=...)` with a key, a place, or a function of "
                "the batch",
            )
        if loader.batch_sampler is None:
            raise SampleIdError(
                f"The train loader is a {kind.__name__} with `batch_size=None`",
                "Ids are put into batches as they are collated, which such a loader does not do",
                "Give the loader a `batch_size`; or say where ids are in its batches, `LightningRecorder(ids=...)`",
            )
        works = with_ids(works)
        within: Any = works
    else:
        within = CountedBatches(works, ids, start=counted)
    made: Any = type(kind.__name__, (_CarryingLoader, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    again = made.__new__(made)  # a DataLoader takes no new dataset, so that none is made from its arguments
    vars(again).update({name: value for name, value in vars(loader).items() if name != "_iterator"})
    vars(again).update(_within=within, _works=works, _listeners=[])
    return again


def _start_at_zero() -> int:
    return 0


class Wrapped:
    """A method of an object with something around it, until it is removed.

    Parameters
    ----------
    owner, name
        The object, and the name of its method.
    around
        Called with the method and the arguments.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        self._owner, self._name, self._around = owner, name, around
        self._inner, self._is_own = getattr(owner, name), name in vars(owner)
        setattr(owner, name, self)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call what is around the method."""
        return self._around(self._inner, *arguments, **named)

    def remove(self) -> None:
        """Put the method back, whatever was put around it since."""
        outer = vars(self._owner).get(self._name)
        if outer is self:
            delattr(self._owner, self._name)
            if self._is_own:
                setattr(self._owner, self._name, self._inner)
        while isinstance(outer, Wrapped) and outer is not self:
            if outer._inner is self:
                outer._inner, outer._is_own = self._inner, self._is_own
            outer = outer._inner


class Numbering:
    """Ids of the samples of one or several loaders: places in the training data, one loader after the other.

    Parameters
    ----------
    loaders
        The loaders, in their order.

    Attributes
    ----------
    data
        What the recorder is told of the training data: the dataset of the only loader, the number of samples of
        several, None where they have none.
    """

    def __init__(self, loaders: list[Any]) -> None:
        sizes = [_size(loader) for loader in loaders]
        self._first = {id(loader): sum(filter(None, sizes[:k])) for k, loader in enumerate(loaders)}
        self._loaders = loaders  # an identity is only good for as long as its object lives
        known = all(size is not None for size in sizes)
        self.data: Any = (loaders[0].dataset if len(loaders) == 1 else sum(filter(None, sizes))) if known else None
        self._places: dict[int, Tensor | None] = {}

    def batch(self, one: Arrived, batch: Any, data: Samples) -> IndexedBatch:
        """A batch as it became on its way to the device, with ids that are places in the data.

        Parameters
        ----------
        one
            The batch that arrived.
        batch
            What became of it.
        data
            The training data.
        """
        key = id(one.loader)
        if key not in self._places:
            mapped = len(self._loaders) == 1 and is_map_style(one.loader)
            self._places[key] = places_in(data, one.loader.dataset) if mapped else None
        places, ids = self._places[key], one.found.ids
        ids = ids + self._first.get(key, 0) if places is None else places[ids]
        return type(one.found)(ids, batch)


def _size(loader: Any) -> int | None:
    return len(loader.dataset) if is_map_style(loader) and hasattr(loader.dataset, "__len__") else None


def flattened(loaders: Any) -> list[Any]:
    """Loaders in a nested collection of them, in their order."""
    if isinstance(loaders, Mapping):
        return [one for part in loaders.values() for one in flattened(part)]
    if isinstance(loaders, (list, tuple)):
        return [one for part in loaders for one in flattened(part)]
    return [] if loaders is None else [loaders]
