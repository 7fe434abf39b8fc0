"""Sample ids that survive samplers, worker processes and ``drop_last``: they travel inside the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from pathkernel.errors import SampleIdError
from pathkernel.gradients.batch_axes import BatchAxis
from pathkernel.recording.collated_order import collated_order
from pathkernel.trajectory.samples import Samples


class IndexedSample(NamedTuple):
    """One item of a dataset and its id."""

    id: int
    item: Any


class IndexedBatch(NamedTuple):
    """A collated batch and the ids of its samples, (B,) int64."""

    ids: Tensor
    batch: Any


class NumberedBatch(IndexedBatch):
    """A batch whose ids were not collected with its samples: they were counted, or are what a field of it says."""


class IndexedDataset(Dataset):
    """A map-style dataset whose items carry their ids.

    Wrap the dataset before giving it to a `torch.utils.data.DataLoader`, and the loader to `KernelRecorder.track`,
    which takes the ids off again before the training loop sees the batch.

    Parameters
    ----------
    dataset
        Any map-style dataset; item i has id i.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4))
    >>> pk.IndexedDataset(data)[3].id
    3
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> IndexedSample:
        return IndexedSample(int(index), self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[IndexedSample]:
        """The samples of a batch, fetched at once where the dataset does so by itself, as loaders ask it to."""
        at_once = getattr(self.dataset, "__getitems__", None)
        items = at_once(indices) if at_once else [self.dataset[index] for index in indices]
        return [IndexedSample(int(index), item) for index, item in zip(indices, items, strict=True)]


class IndexedCollate:
    """The user's own collate function, with the ids set apart; picklable, for worker processes."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[IndexedSample]) -> IndexedBatch:
        """Collate items as the user does, and their ids into a tensor, in the order of the batch."""
        ids = torch.tensor([sample.id for sample in samples], dtype=torch.int64)
        items = [sample.item for sample in samples]
        given = list(items)
        batch = self.collate(given)
        if self.collate is default_collate or len(items) < 2:
            return IndexedBatch(ids, batch)
        order = collated_order(items, given, batch)
        return IndexedBatch(ids if order is None else ids[order], batch)


IdsOf = str | int | Callable[[Any], Any] | None
"""Where ids are in a batch: a key, a place, or a function of it; None where they are not in it."""


INNER = {"accelerate": "base_dataloader", "lightning": "_dataloader", "lightning_fabric": "_dataloader"}
"""Under which name the loaders of a framework hold the DataLoader that they go through."""


def inner_name(loader: Any) -> str | None:
    """Name under which a loader that a framework prepared holds the DataLoader that it goes through; None for others.

    Those of accelerate call themselves DataLoaders, and their type tells.
    """
    name = INNER.get(type(loader).__module__.partition(".")[0])
    return name if name is not None and isinstance(vars(loader).get(name), DataLoader) else None


class PreparedLoader:
    """A loader that a framework prepared, whose batches carry ids while it is gone through.

    The framework's own loader is gone through, which counts epochs, moves batches and knows when it is at its end.

    Parameters
    ----------
    loader
        Loader of accelerate or Fabric.
    name
        See `inner_name`.
    """

    def __init__(self, loader: Any, name: str) -> None:
        self.loader, self._name = loader, name
        self._inner = getattr(loader, name)
        self._indexed = with_ids(self._inner)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[IndexedBatch]:
        setattr(self.loader, self._name, self._indexed)
        try:
            yield from self.loader
        finally:
            setattr(self.loader, self._name, self._inner)


def with_ids(loader: DataLoader) -> Any:
    """A loader like another one that yields `IndexedBatch`: of the same sampler, generator and worker processes.

    Raises
    ------
    SampleIdError
        When the loader does not batch.
    """
    name = inner_name(loader)
    if name is not None:
        return PreparedLoader(loader, name)
    dataset = loader.dataset
    if loader.batch_sampler is None:
        raise SampleIdError(
            "`track` was given a DataLoader with `batch_size=None`",
            "Ids are collected while samples are collated into batches",
            "Give the DataLoader a `batch_size`, or announce batches yourself with `recorder.batch(ids)`",
        )
    if isinstance(dataset, IndexedDataset):
        if not isinstance(loader.collate_fn, IndexedCollate):
            loader.collate_fn = IndexedCollate(loader.collate_fn)
        return loader
    again = copy.copy(loader)
    # A DataLoader takes no new dataset, which might be of another length.
    vars(again).update(dataset=IndexedDataset(dataset), collate_fn=IndexedCollate(loader.collate_fn), _iterator=None)
    return again


class CountedBatches:
    """An iterable of batches whose samples are counted as they come, or have their ids in a field.

    Parameters
    ----------
    loader
        The iterable.
    ids
        Where ids are in a batch.
    axis
        Along which samples lie in the first tensor of a batch.
    start
        Called where it is gone through, for the first id; by default, ids go on from where they were.
    """

    def __init__(
        self, loader: Iterable[Any], ids: IdsOf, axis: int = 0, start: Callable[[], int] | None = None
    ) -> None:
        self.loader, self.ids, self.axis, self.start = loader, ids, axis, start
        self.counted = 0

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[IndexedBatch]:
        if self.start is not None:
            self.counted = self.start()
        for batch in self.loader:
            if isinstance(batch, IndexedBatch):
                yield batch
                continue
            if self.ids is not None:
                yield NumberedBatch(ids_in(batch, self.ids), batch)
                continue
            first, self.counted = self.counted, self.counted + self._samples(batch)
            yield NumberedBatch(torch.arange(first, self.counted), batch)

    def _samples(self, batch: Any) -> int:
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim]
        if not leaves:
            raise SampleIdError(
                f"`track` was given a loader whose batches are a {type(batch).__name__} without any tensor",
                "Samples are counted along the first axis of a batch's first tensor, where ids are not in the batch",
                "Write `recorder.track(loader, ids=...)` with a key, a place, or a function of the batch",
            )
        return leaves[0].shape[self.axis if leaves[0].ndim > self.axis else 0]


def ids_in(batch: Any, ids: IdsOf) -> Tensor:
    """The ids of a batch that has them in a field, (B,).

    Raises
    ------
    SampleIdError
        Where there is no such field.
    """
    if callable(ids):
        return torch.as_tensor(ids(batch))
    try:
        named = isinstance(ids, str) and not isinstance(batch, Mapping)
        return torch.as_tensor(getattr(batch, ids) if named else batch[ids])  # type: ignore[arg-type]
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError):
        keys = f" with the keys {', '.join(map(repr, list(batch)[:8]))}" if isinstance(batch, Mapping) else ""
        raise SampleIdError(
            f"`ids={ids!r}` was given, and a batch is a {type(batch).__name__}{keys}",
            "It names the field of a batch that holds its samples' ids: a key, a place, or a function of the batch",
            'Write for example `recorder.track(loader, ids="index")`',
        ) from None


def is_map_style(loader: Any) -> bool:
    """True for a DataLoader, prepared by a framework or not, over a dataset whose items have places."""
    loads = isinstance(loader, DataLoader) or inner_name(loader) is not None
    return loads and not isinstance(loader.dataset, IterableDataset)


def indexed(loader: Iterable[Any], ids: IdsOf = None) -> Any:
    """A loader whose batches carry the ids of their samples, for loops that `KernelRecorder.track` has no place in.

    `KernelRecorder.take_ids` takes them off again, right before the forward pass.

    Parameters
    ----------
    loader
        A `torch.utils.data.DataLoader`, of which a copy with the same sampler and workers is returned; or any iterable
        of batches, whose samples are counted as they come.
    ids
        Where ids are in a batch: a key, a place, or a function of it.

    Returns
    -------
    DataLoader or iterable
        Its batches are pairs ``(ids, batch)``.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4))
    >>> next(iter(pk.indexed(torch.utils.data.DataLoader(data, batch_size=2)))).ids.tolist()
    [0, 1]
    """
    return with_ids(loader) if ids is None and is_map_style(loader) else CountedBatches(loader, ids)  # type: ignore[arg-type]


def levels_of(dataset: Any, until: Any = None) -> list[tuple[Any, Tensor | None]]:
    """A dataset and those that it is a `torch.utils.data.Subset` of, each with the places of its items there.

    Parameters
    ----------
    dataset
        The outermost.
    until
        The last that is asked for; by default, the first that is no subset.

    Returns
    -------
    Datasets, each with (n,) int64; None for places in the outermost itself.
    """
    dataset = dataset.dataset if isinstance(dataset, IndexedDataset) else dataset
    levels: list[tuple[Any, Tensor | None]] = [(dataset, None)]
    while isinstance(dataset, Subset) and dataset is not until:
        indices = torch.as_tensor([int(place) for place in dataset.indices], dtype=torch.int64)
        last = levels[-1][1]
        dataset = dataset.dataset
        levels.append((dataset, indices if last is None else indices[last]))
    return levels


def places_in(data: Samples, dataset: Any) -> Tensor | None:
    """Places in the training data of the items of a `torch.utils.data.Subset` of them, as `random_split` makes it.

    None where the items have their own places there: the dataset is the data, or is as long as these.
    """
    levels = levels_of(dataset)
    of_data = data.dataset.dataset if isinstance(data.dataset, IndexedDataset) else data.dataset
    known = [places for level, places in levels if level is of_data]
    alike = [places for level, places in levels if hasattr(level, "__len__") and len(level) == data.limit]
    return next(iter((*known, *alike)), None)


class PartOfData:
    """A loader over a subset of the training data, with ids that are places in all of them.

    Parameters
    ----------
    loader
        Yields `IndexedBatch`.
    places
        In the data, of the items of the loader's dataset.
    """

    def __init__(self, loader: Iterable[IndexedBatch], places: Tensor) -> None:
        self.loader, self.places = loader, places

    def __iter__(self) -> Iterator[IndexedBatch]:
        for ids, batch in self.loader:
            yield IndexedBatch(self.places[ids], batch)


class TrackedLoaders:
    """Loaders that a recorder goes through, each of which is made to yield ids once.

    Parameters
    ----------
    data
        The training samples.
    batch_axis
        As given to the recorder.
    """

    def __init__(self, data: Samples, batch_axis: BatchAxis) -> None:
        self.data, self._axis = data, batch_axis if isinstance(batch_axis, int) else 0
        self._known: dict[int, tuple[Any, Any]] = {}

    def batches(self, loader: Iterable[Any], ids: IdsOf) -> Iterable[IndexedBatch]:
        """The batches of a loader, with their ids.

        Raises
        ------
        SampleIdError
            Where they have none, and counted ones would not be places in the data.
        """
        if not getattr(loader, "persistent_workers", False):
            return self._with_ids(loader, ids)
        if id(loader) not in self._known:  # worker processes that persist belong to one object
            self._known[id(loader)] = loader, self._with_ids(loader, ids)
        return self._known[id(loader)][1]

    def _with_ids(self, loader: Any, ids: IdsOf) -> Iterable[IndexedBatch]:
        if ids is None and is_map_style(loader):
            places = places_in(self.data, loader.dataset)
            found = loader if isinstance(loader.collate_fn, IndexedCollate) else with_ids(loader)
            return found if places is None else PartOfData(found, places)
        if isinstance(loader, CountedBatches):
            return loader
        if ids is None and not self.data.announced:
            dataset = getattr(loader, "dataset", None)
            raise SampleIdError(
                f"`track` was given a {type(loader).__name__}"
                + ("" if dataset is None else f" over a {type(dataset).__name__}"),
                "Ids are the samples' places in `data`, and travel in the batch through samplers and worker processes",
                "Give it a DataLoader over a map-style dataset; say where ids are, `track(loader, ids=...)`; or leave "
                "`data=` out, and samples are counted as they come",
            )
        return CountedBatches(loader, ids, self._axis, lambda: len(self.data) if self.data.limit is None else 0)
