"""Batches whose rows are in another order than the samples that the loader handed to its collate function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset, default_collate

import pathkernel as pk
from pathkernel.recording.indexed import IndexedCollate, IndexedSample

N = 8
_numbers = torch.Generator().manual_seed(0)
PAIRS = [(torch.randn(5, generator=_numbers), place % 3) for place in range(N)]
LENGTHS = [3, 7, 2, 5, 5, 8, 4, 6]
SEQUENCES = [
    {"x": torch.randint(1, 9, (length,), generator=_numbers), "y": place % 2} for place, length in enumerate(LENGTHS)
]
TOKENS = [{"input_ids": list(range(place, place + length))} for place, length in enumerate(LENGTHS)]


def padded(items: list[Any]) -> dict[str, Tensor]:
    return {
        "x": pad_sequence([item["x"] for item in items], batch_first=True),
        "y": torch.tensor([item["y"] for item in items]),
    }


def padded_left(items: list[Any]) -> Tensor:
    longest = max(len(item["input_ids"]) for item in items)
    return torch.tensor([[-1] * (longest - len(item["input_ids"])) + item["input_ids"] for item in items])


def by_length(items: list[Any]) -> list[Any]:
    return sorted(items, key=lambda item: -len(next(iter(item.values()))))


def sorted_in_place(items: list[Any]) -> dict[str, Tensor]:
    items.sort(key=lambda item: -len(item["x"]))
    return padded(items)


def largest_first(items: list[Any]) -> Any:
    return default_collate(sorted(items, key=lambda item: -float(item[0][0])))


OTHER_ORDER: dict[str, tuple[list[Any], Callable[[list[Any]], Any]]] = {
    "rows": (PAIRS, largest_first),
    "padded": (SEQUENCES, lambda items: padded(by_length(items))),
    "in place": (SEQUENCES, sorted_in_place),
    "padded at the front": (TOKENS, lambda items: padded_left(by_length(items))),
    "time first": (SEQUENCES, lambda items: padded(by_length(items))["x"].T),
    "numbers": (list(range(N)), lambda items: torch.tensor(items[::-1])),
}
SAME_ORDER: dict[str, tuple[list[Any], Callable[[list[Any]], Any]]] = {
    "rows": (PAIRS, default_collate),
    "padded": (SEQUENCES, padded),
    "padded at the front": (TOKENS, padded_left),
    "other numbers": (PAIRS, lambda items: (default_collate(items)[0] + 1, default_collate(items)[1])),
    "other numbers beside labels in another order": (
        PAIRS,
        lambda items: (default_collate(items)[0] + 1, 2 - default_collate(items)[1]),
    ),
    "beside another sample": (
        PAIRS,
        lambda items: (default_collate(items)[0].roll(1, 0), default_collate(items)[0]),
    ),
    "another type": (PAIRS, lambda items: default_collate(items)[0].double()),
    "the same sample twice": ([*PAIRS, PAIRS[3]], default_collate),
    "names": ([("a", float(place)) for place in range(N)], default_collate),
    "no tensors": ([object() for _ in range(N)], lambda items: [str(item) for item in items]),
}


def ids_of(items: list[Any], collate: Callable[[list[Any]], Any]) -> list[int]:
    return IndexedCollate(collate)([IndexedSample(i, item) for i, item in enumerate(items)]).ids.tolist()


def key(item: Any) -> float:
    """What the functions above sort by."""
    return item if isinstance(item, int) else -float(item[0][0] if isinstance(item, tuple) else len(first_of(item)))


def first_of(item: dict[str, Any]) -> Any:
    return next(iter(item.values()))


@pytest.mark.parametrize("case", OTHER_ORDER)
def test_ids_follow_rows_in_another_order(case: str) -> None:
    items, collate = OTHER_ORDER[case]
    expected = sorted(range(N), key=lambda place: key(items[place]))
    assert ids_of(items, collate) == (expected[::-1] if case == "numbers" else expected)


@pytest.mark.parametrize("case", SAME_ORDER)
def test_the_same_order_and_other_samples_are_let_through(case: str) -> None:
    items, collate = SAME_ORDER[case]
    assert ids_of(items, collate) == list(range(len(items)))


@pytest.mark.parametrize("options", [{}, {"keep": True}, {"audit_every": 0}])
def test_a_loader_that_sorts_its_batches_is_recorded_rightly(options: dict[str, Any]) -> None:
    """The ids of a batch were right as a set, and each of them another sample's: no gradient told."""
    X, y = torch.stack([x for x, _ in PAIRS]), torch.tensor([label for _, label in PAIRS])
    data = TensorDataset(X, y)
    found = []
    for collate in (largest_first, default_collate):
        torch.manual_seed(0)
        model = nn.Linear(5, 3, dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(data, batch_size=4, collate_fn=collate)
        with pk.KernelRecorder(model, optimizer, nn.CrossEntropyLoss(), data=data, **options) as recorder:
            for inputs, targets in recorder.track(loader):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
        found.append(pk.KernelMachine(recorder.trajectory).explain(X[:3]).shares)
    assert abs(found[0] - found[1]).max() < 1e-5
