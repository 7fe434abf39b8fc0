"""Rows of a batch in another order than its ids: they are known again, or the step is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pathkernel as pk
from pathkernel.errors import SampleIdError
from pathkernel.recording.indexed import IndexedCollate, IndexedSample
from pathkernel.recording.row_order import order_of

N = 12
A, B = torch.randn(2, N, 5, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(N) % 3
ORDER = torch.randperm(N, generator=torch.Generator().manual_seed(4))
TWICE = torch.cat([A[:6], A[:6]])
NOTHING = torch.zeros(N, 5)

Cases = dict[str, tuple[list[Tensor], list[Tensor], Any]]

KNOWN: Cases = {
    "as they came": ([A], [A, LABELS], None),
    "moved": ([A[ORDER]], [A, LABELS], ORDER),
    "in another shape and type": ([A[ORDER].double().view(N, 5, 1)], [A, LABELS], ORDER),
    "samples along the second axis of the batch": ([A[ORDER]], [A.T], ORDER),
    "two arguments": ([A[ORDER], B[ORDER]], [A, B], ORDER),
    "a mask that is the same for all": ([A[ORDER], torch.ones(N, 5)], [A, torch.ones(N, 5)], ORDER),
    "one row in the place of another": ([A[[0, 0, *range(2, N)]]], [A], torch.tensor([0, 0, *range(2, N)])),
    "another argument is of other samples": ([A, B[ORDER]], [A, B], None),
    "augmented": ([A + 0.1], [A, LABELS], None),
    "augmented, with labels that were drawn": ([A + 0.1, LABELS[ORDER]], [A, LABELS], None),
    "some rows are zero": ([A * (torch.arange(N) > 2)[:, None]], [torch.cat([A[:-1], NOTHING[:1]])], None),
    "moved, with labels handed over as they came": ([A[ORDER], LABELS], [A, LABELS], None),
}


@pytest.mark.parametrize("case", KNOWN)
def test_rows_are_known_again(case: str) -> None:
    given, known, expected = KNOWN[case]
    found = order_of(given, known, N)
    assert (found is None) == (expected is None)
    assert found is None or torch.equal(found, expected)


def test_rows_that_are_alike_in_everything_take_turns() -> None:
    found = order_of([TWICE[ORDER]], [TWICE, LABELS[:6].repeat(2)], N)
    assert found is not None
    assert torch.equal(TWICE[found], TWICE[ORDER])
    assert len(found.unique()) == N


@pytest.mark.parametrize(
    ("given", "known", "why"),
    [
        (TWICE[ORDER], [TWICE, torch.arange(N)], "alike in what it was given"),
        (torch.where(torch.arange(N)[:, None] % 2 > 0, A[ORDER], A[ORDER] + 1), [A], "none of its rows"),
    ],
)
def test_rows_that_cannot_be_told_are_refused(given: Tensor, known: list[Tensor], why: str) -> None:
    with pytest.raises(SampleIdError, match=why):
        order_of([given], known, N)


# -- collate functions -------------------------------------------------------------------------------------------------

LENGTHS = torch.randint(1, 7, (N,), generator=torch.Generator().manual_seed(5))
ITEMS = [(torch.randn(int(n), 2, generator=torch.Generator().manual_seed(i)), i % 3) for i, n in enumerate(LENGTHS)]
BY_LENGTH = sorted(range(N), key=lambda i: -LENGTHS[i])


def _padded(items: list[Any], in_front: bool = False) -> tuple[Tensor, Tensor]:
    rows = [x.flip(0) if in_front else x for x, _ in items]
    padded = pad_sequence(rows, batch_first=True)
    return padded.flip(1) if in_front else padded, torch.tensor([y for _, y in items])


def _sorted(items: list[Any], in_front: bool = False) -> tuple[Tensor, Tensor]:
    return _padded(sorted(items, key=lambda item: -len(item[0])), in_front)


def _tokens(items: list[Any]) -> tuple[Tensor, Tensor]:
    """Of whose numbers nothing is left."""
    items.sort(key=lambda item: -len(item[0]))
    return torch.tensor([[len(x)] for x, _ in items]) + 100, torch.zeros(len(items))


COLLATED: dict[str, tuple[Callable[[list[Any]], Any], Any]] = {
    "in their order": (_padded, None),
    "padded in front": (lambda items: _padded(items, in_front=True), None),
    "sorted": (_sorted, BY_LENGTH),
    "sorted, padded in front": (lambda items: _sorted(items, in_front=True), BY_LENGTH),
    "samples along the second axis": (lambda items: _sorted(items)[0].transpose(0, 1), BY_LENGTH),
    "a list that was sorted": (_tokens, BY_LENGTH),
}


@pytest.mark.parametrize("case", COLLATED)
def test_samples_are_known_again_in_what_was_collated(case: str) -> None:
    collate, expected = COLLATED[case]
    found = IndexedCollate(collate)([IndexedSample(i, item) for i, item in enumerate(ITEMS)])
    assert found.ids.tolist() == (list(range(N)) if expected is None else expected)


class _Words(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return ITEMS[i]


class _Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)).sum(1)


def _train(loader: DataLoader, model: nn.Module, move: bool = False, ids: Any = None, **options: Any) -> pk.Trajectory:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, **options) as recorder:
        for _ in range(2):
            for x, y in recorder.track(loader, ids=ids):
                order = torch.randperm(len(x)) if move else torch.arange(len(x))
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[order]), y[order]).backward()
                optimizer.step()
    return recorder.trajectory


def test_a_loader_that_sorts_by_length() -> None:
    record = _train(DataLoader(_Words(), batch_size=5, shuffle=True, collate_fn=_sorted), _Mean(), data=N)
    for step in record.steps():
        for i, row in zip(step.batches[0].ids, step.batches[0].inputs, strict=True):
            own = ITEMS[int(i)][0]
            assert torch.equal(row[: len(own)], own)
            assert not row[len(own) :].any()


@pytest.mark.parametrize("data", ["at hand", "kept"])
def test_a_loop_that_moves_rows(data: str) -> None:
    dataset = TensorDataset(A, LABELS)
    options = {"data": dataset, "keep": True} if data == "at hand" else {"data": N}
    record = _train(DataLoader(dataset, batch_size=5, shuffle=True), nn.Linear(5, 3), move=True, **options)
    for step in record.steps():
        (batch,) = step.batches
        assert (batch.inputs is None) == (data == "at hand")
        assert batch.inputs is None or torch.equal(batch.inputs, A[batch.ids])
        # One step of gradient descent, taken apart by hand: the split is right where the ids are.
        weight, bias = step.before.split([15, 3])
        p = (A[batch.ids] @ weight.view(3, 5).T + bias).softmax(1)
        slopes = (p - nn.functional.one_hot(LABELS[batch.ids], 3)) / len(batch.ids)
        torch.testing.assert_close(batch.cotangents.view_as(slopes), slopes)


def test_a_loader_that_sorts_whole_samples_of_data_at_hand() -> None:
    def collate(items: list[Any]) -> Any:
        return torch.utils.data.default_collate(sorted(items, key=lambda item: float(item[0][0])))

    dataset = TensorDataset(A, LABELS)
    record = _train(DataLoader(dataset, batch_size=5, shuffle=True, collate_fn=collate), nn.Linear(5, 3), data=dataset)
    assert all(batch.inputs is None for step in record.steps() for batch in step.batches)


def _first(batch: Any) -> Tensor:
    """Ids that a field of a batch might hold, and that are wrong."""
    return torch.arange(len(batch[0]))


@pytest.mark.parametrize("stream", [True, False])
def test_data_in_another_order_than_the_loader_are_refused(stream: bool) -> None:
    rows = torch.randn(200, 5, generator=torch.Generator().manual_seed(6))
    labels, moved = torch.arange(200) % 3, torch.arange(200).roll(70)
    dataset = TensorDataset(rows[moved], labels[moved])
    loader: Any = DataLoader(dataset, batch_size=5)
    with pytest.raises(SampleIdError, match="in other places than under the announced ids"):
        _train(
            list(loader) if stream else loader,
            nn.Linear(5, 3),
            data=(rows, labels),
            keep=True,
            ids=_first if stream else None,
        )
