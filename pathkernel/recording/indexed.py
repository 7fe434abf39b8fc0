"""Sample ids that survive samplers, worker processes and ``drop_last``: they travel inside the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pathkernel.errors import SampleIdError


class IndexedSample(NamedTuple):
    """One item of a dataset and its id."""

    id: int
    item: Any


class IndexedBatch(NamedTuple):
    """A collated batch and the ids of its samples, (B,) int64."""

    ids: Tensor
    batch: Any


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


class IndexedCollate:
    """The user's own collate function, with the ids set apart; picklable, for worker processes."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[IndexedSample]) -> IndexedBatch:
        """Collate items as the user does, and their ids into a tensor."""
        ids = torch.tensor([sample.id for sample in samples], dtype=torch.int64)
        return IndexedBatch(ids, self.collate([sample.item for sample in samples]))


def indexed_loader(loader: DataLoader) -> DataLoader:
    """Make a loader over an `IndexedDataset` yield `IndexedBatch`, once.

    Raises
    ------
    SampleIdError
        When the loader's dataset carries no ids, or the loader does not batch.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, IndexedDataset):
        raise SampleIdError(
            f"`track` was given a {type(loader).__name__} over a {type(dataset).__name__}",
            "Its samples must carry their ids through samplers and worker processes",
            "Write `recorder.track(DataLoader(pk.IndexedDataset(dataset), ...))`",
        )
    if loader.batch_sampler is None:
        raise SampleIdError(
            "`track` was given a DataLoader with `batch_size=None`",
            "Ids are collected while samples are collated into batches",
            "Give the DataLoader a `batch_size`, or announce batches yourself with `recorder.batch(ids)`",
        )
    if not isinstance(loader.collate_fn, IndexedCollate):
        loader.collate_fn = IndexedCollate(loader.collate_fn)
    return loader
