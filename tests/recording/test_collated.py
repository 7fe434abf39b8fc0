"""Rows of a batch belong to their samples where a collate function sorts, drops or repeats its items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

import pathkernel as pk
from pathkernel.errors import SampleIdError
from pathkernel.recording.indexed import IndexedCollate, IndexedSample

LENGTHS = (2, 5, 3, 6, 4, 1, 3, 2)


def words(i: int) -> str:
    return " ".join(["word"] * LENGTHS[i])


def items(label: Callable[[int], int] = lambda i: i % 3) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {"tokens": torch.randint(1, 9, (n,), generator=draw).tolist(), "label": label(i), "text": words(i)}
        for i, n in enumerate(LENGTHS)
    ]


def length(item: dict[str, Any]) -> int:
    return len(item["text"])


def padded(batch: list[dict[str, Any]], left: bool = False) -> dict[str, Tensor]:
    table = torch.zeros(len(batch), max(map(len, (item["tokens"] for item in batch))), dtype=torch.int64)
    for row, item in zip(table, batch, strict=True):
        n = len(item["tokens"])
        row[len(row) - n if left else 0 :][:n] = torch.tensor(item["tokens"])
    return {"tokens": table, "labels": torch.tensor([item.pop("label") for item in batch])}


def ids_of(collate: Callable[[list[Any]], Any], given: list[Any], first: int = 10) -> list[int]:
    batch = IndexedCollate(collate)([IndexedSample(i, item) for i, item in enumerate(given, first)])
    return batch.ids.tolist()


BY_LENGTH = [10 + i for i in sorted(range(8), key=lambda i: LENGTHS[i])]


@pytest.mark.parametrize("left", [False, True], ids=["padded behind", "padded before"])
def test_items_that_are_sorted_keep_their_ids(left: bool) -> None:
    assert ids_of(lambda batch: padded(sorted(batch, key=length), left), items()) == BY_LENGTH


def test_items_that_are_sorted_in_place_and_made_unlike() -> None:
    def collate(batch: list[dict[str, Any]]) -> Tensor:
        batch.sort(key=length)
        return torch.rand(len(batch), 3)

    assert ids_of(collate, items()) == BY_LENGTH

    def labelled(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"seen": collate(batch), "labels": torch.tensor([item["label"] for item in batch])}

    assert ids_of(labelled, items()) == BY_LENGTH


def test_items_that_are_dropped_and_repeated() -> None:
    def collate(batch: list[Any]) -> Any:
        return default_collate([batch[3], *batch[1:3], batch[3]])

    draw = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(2, generator=draw), i % 2) for i in range(4)]
    assert ids_of(collate, pairs) == [13, 11, 12, 13]
    assert ids_of(lambda batch: {"pixel_values": collate(batch)[0]}, pairs) == [13, 11, 12, 13]


def test_rows_that_were_computed_keep_the_order() -> None:
    masked = padded(items())["tokens"]
    masked[:, 0] = 77
    given = list(range(10, 18))
    assert ids_of(lambda batch: {"tokens": masked, "labels": torch.rand(8)}, items()) == given
    assert ids_of(lambda batch: {"labels": torch.tensor([int(i["label"] > 1) for i in batch])}, items()) == given
    assert ids_of(lambda batch: {"x": torch.rand(8, 2), "order": torch.arange(8).flip(0)}, items()) == given


def test_a_second_view_in_another_order_leaves_the_first() -> None:
    def collate(batch: list[Any]) -> dict[str, Tensor]:
        x, y = default_collate(batch)
        return {"others": x.flip(0), "x": x, "y": y}

    assert ids_of(collate, [(torch.randn(3), i % 2) for i in range(4)]) == [10, 11, 12, 13]


def test_the_same_sample_twice() -> None:
    same = items()[1]
    batch = IndexedCollate(lambda batch: padded(batch[::-1]))([IndexedSample(4, dict(same)), IndexedSample(4, same)])
    assert batch.ids.tolist() == [4, 4]


def test_an_order_that_nothing_tells_is_refused() -> None:
    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = sorted(batch, key=length)
        return {"seen": torch.rand(len(batch), 4), "labels": torch.tensor([item["label"] for item in batch])}

    with pytest.raises(SampleIdError, match=r"not in the order of its items.*told by comparing.*`ids=\"index\"`"):
        ids_of(collate, items())
    with pytest.raises(SampleIdError, match="one field is in another order than another"):
        draw = torch.Generator().manual_seed(0)
        pairs = [tuple(torch.randn(2, 3, generator=draw)) for _ in range(4)]
        ids_of(lambda batch: [part.roll(k, 0) for k, part in enumerate(default_collate(batch), 1)], pairs)
    # Where the labels are one for each, they tell it.
    assert ids_of(collate, items(lambda i: i)) == BY_LENGTH


class Sequences(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        return items()[i]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_sorts_its_batches(workers: int) -> None:
    """Against the same in a loop that knows its ids."""
    loader = DataLoader(
        Sequences(),
        4,
        collate_fn=_sorted,
        shuffle=True,
        num_workers=workers,
        generator=torch.Generator().manual_seed(1),
    )
    for batch in pk.indexed(loader):
        for i, row in zip(batch.ids.tolist(), batch.batch["tokens"], strict=True):
            assert row[: LENGTHS[i]].tolist() == items()[i]["tokens"]


def _sorted(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    return padded(sorted(batch, key=length))
