"""`LightningRecorder` and loaders: ids survive what a trainer does with batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.frameworks
L = pytest.importorskip("lightning")

import torch  # noqa: E402
from lightning_fits import (  # noqa: E402
    DATA,
    Classifier,
    N,
    X,
    Y,
    a_loader,
    a_trainer,
    both,
    ids_are_places,
    inputs_on_record,
    is_the_network,
    quiet,
    samples,
)
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import (  # noqa: E402
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from pathkernel.callbacks.lightning import LightningRecorder  # noqa: E402
from pathkernel.errors import SampleIdError  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def test_worker_processes_that_persist() -> None:
    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Classifier()
        a_trainer(callback).fit(module, a_loader(num_workers=1, persistent_workers=True))
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    ids_are_places(callback)


def testsamples_of_a_subset_have_their_places_in_the_data() -> None:
    part = Subset(DATA, list(range(N - 1, 4, -1)))

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Classifier()
        a_trainer(callback).fit(module, a_loader(part))
        return module

    module, callback = both(fit, lambda: LightningRecorder(data=DATA, task="classification"))
    is_the_network(callback, module.net)
    ids_are_places(callback)
    assert min(int(ids.min()) for ids, _ in inputs_on_record(callback)) == 5


class DataModule(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return a_loader()


class OwnLoader(Classifier):
    def train_dataloader(self) -> DataLoader:
        return a_loader()


def test_data_modules_and_loaders_of_the_module() -> None:
    for module, given in ((Classifier(), {"datamodule": DataModule()}), (OwnLoader(), {})):
        callback = LightningRecorder(task="classification")
        a_trainer(callback).fit(module, **given)
        is_the_network(callback, module.net)
        ids_are_places(callback)


X2, Y2 = samples(12, 8)
EVERY = torch.cat([X, X2])


class TwoSources(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (u, _) = batch["labelled"], batch["unlabelled"]
        return F.cross_entropy(self.net(x), y) + 0.1 * self.net(u.view(-1, 3)).square().mean()


class Joined(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (u, _) = batch
        z = self.joined(x, u)
        return F.cross_entropy(z[: len(x)], y) + 0.1 * z[len(x) :].square().mean()

    def joined(self, x: Tensor, u: Tensor) -> Tensor:
        return self.net(torch.cat([x, u]))


class JoinedAnotherWay(Joined):
    def joined(self, x: Tensor, u: Tensor) -> Tensor:
        z = self.net(torch.cat([u, x]))
        return torch.cat([z[len(u) :], z[: len(u)]])


@pytest.mark.parametrize("joined", [None, Joined, JoinedAnotherWay])
def test_several_loaders_have_theirsamples_one_after_the_other(joined: type[Joined] | None) -> None:
    second = TensorDataset(X2, Y2)

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module: Classifier = joined() if joined else TwoSources()
        one, two = a_loader(batch_size=7 if joined else 5), a_loader(second, batch_size=5)
        a_trainer(callback).fit(module, [one, two] if joined else {"labelled": one, "unlabelled": two})
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    assert len(callback.trajectory.data) == N + 12
    for ids, inputs in inputs_on_record(callback):
        torch.testing.assert_close(EVERY[ids], inputs, rtol=0, atol=0)


def test_a_pass_of_which_the_loader_is_not_known_is_refused() -> None:
    class Scaled(TwoSources):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(2 * batch["labelled"][0]), batch["labelled"][1])

    loaders = {"labelled": a_loader(), "unlabelled": a_loader(TensorDataset(X2, Y2))}
    with pytest.raises(SampleIdError, match=r"5 rows.*batches have 5, 5 samples.*torch\.cat"):
        a_trainer(LightningRecorder()).fit(Scaled(), loaders)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(X, Y, strict=True)))


class Batches:
    """An iterable of batches, whose state is in checkpoints."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[:10], Y[:10]), (X[10:], Y[10:])])

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.mark.parametrize("data", [None, N, DATA], ids=["counted", "number", "data"])
@pytest.mark.parametrize("batches", [False, True])
def test_streams_are_counted(data: Any, batches: bool) -> None:
    options = {} if data is None else {"data": data}

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Classifier()
        a_trainer(callback).fit(module, Batches() if batches else DataLoader(Stream(), batch_size=5))
        return module

    module, callback = both(fit, lambda: LightningRecorder(task="classification", **options))
    is_the_network(callback, module.net)
    assert len(callback.trajectory.data) == (2 * N if data is None else N)
    for ids, inputs in inputs_on_record(callback):
        assert inputs is None if data is DATA else torch.equal(X[ids % N], inputs)


class FetchesItself(Classifier):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


def test_a_step_that_asks_for_its_batches() -> None:
    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = FetchesItself()
        a_trainer(callback).fit(module, a_loader())
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    ids_are_places(callback)


class Augmented(Classifier):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]]


def test_what_the_network_saw_is_kept() -> None:
    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Augmented()
        a_trainer(callback).fit(module, a_loader())
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    for ids, inputs in inputs_on_record(callback):
        assert 0 < (inputs - X[ids]).std() < 0.3


def _places_of(inputs: Tensor) -> Tensor:
    return (inputs[:, None] == X).all(dim=2).to(torch.int8).argmax(dim=1)


class Moves(Classifier):
    """Rows are put into another order, in one of the places where people do."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.seen = where, []

    def _moved(self, batch: Any, where: str) -> Any:
        if where != self.where:
            return batch
        order = torch.randperm(len(batch[0]))
        return [batch[0][order], batch[1][order]]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._moved(batch, "before")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._moved(batch, "after")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.where == "in place":
            order = torch.randperm(len(batch[0]))
            for part in batch:
                part.copy_(part[order].clone())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self._moved(batch, "step")
        self.seen.append(_places_of(batch[0]))
        return super().training_step(batch, batch_idx)


def _by_size(items: list[Any]) -> Any:
    return default_collate(sorted(items, key=lambda item: float(item[0].sum())))


@pytest.mark.parametrize("where", ["before", "after", "in place", "step", "collate"])
def test_rows_in_another_order_have_their_ids(where: str) -> None:
    def fit(callback: LightningRecorder | None) -> Moves:
        module = Moves(where)
        a_trainer(callback).fit(module, a_loader(collate_fn=_by_size if where == "collate" else None))
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    ids_are_places(callback)
    found = [ids for ids, _ in inputs_on_record(callback)]
    assert all(torch.equal(ids, places) for ids, places in zip(found, module.seen, strict=True))


class Words(Dataset):
    """Items of another form than (input, target), of any length."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": X[i].repeat(1 + i % 3), "y": Y[i]}


def _padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    x = nn.utils.rnn.pad_sequence([item["x"] for item in items], batch_first=True)
    return {"x": x.unsqueeze(2), "y": torch.stack([item["y"] for item in items])}


class Reads(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.AdaptiveAvgPool2d((1, 6)), nn.Flatten()))
        self.net.append(nn.Linear(6, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["y"])


def test_padded_batches_of_dicts() -> None:
    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Reads()
        a_trainer(callback).fit(module, a_loader(Words(), collate_fn=_padded))
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net, X[:3, :, None])
    assert all(len(ids) == len(inputs) for ids, inputs in inputs_on_record(callback))


def test_the_module_meets_the_loader_that_it_gave() -> None:
    class Looks(OwnLoader):
        def on_train_batch_end(self, *_: Any) -> None:
            loader = self.trainer.train_dataloader
            assert isinstance(loader, DataLoader)
            assert loader.dataset is DATA
            assert isinstance(next(iter(loader)), list)  # it may go through it, too

    callback = LightningRecorder()
    module = Looks()
    a_trainer(callback).fit(module)
    is_the_network(callback, module.net)
    ids_are_places(callback)


class OwnIteration(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in super().__iter__())


def test_a_loader_with_an_iteration_of_its_own_says_where_ids_are() -> None:
    numbered = TensorDataset(X, Y, torch.arange(N))
    with pytest.raises(SampleIdError, match=r"OwnIteration, which has an `__iter__` of its own.*ids="):
        a_trainer(LightningRecorder()).fit(Classifier(), OwnIteration(numbered, batch_size=5, shuffle=True))
    callback, module = LightningRecorder(ids=2, data=DATA, task="classification"), Classifier()
    a_trainer(callback).fit(module, OwnIteration(numbered, batch_size=5, shuffle=True))
    is_the_network(callback, module.net)
    ids_are_places(callback)


def test_a_loader_that_does_not_batch_is_refused() -> None:
    with pytest.raises(SampleIdError, match=r"DataLoader with `batch_size=None`.*ids="):
        a_trainer(LightningRecorder()).fit(Classifier(), DataLoader(DATA, batch_size=None))


def test_a_batch_that_no_loader_gave_is_refused() -> None:
    class Other(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    callback = LightningRecorder()
    trainer = a_trainer(callback)
    convert = trainer.precision_plugin.convert_input
    trainer.precision_plugin.convert_input = convert  # one that was put there
    trainer.fit(Other(), a_loader())
    assert vars(trainer.precision_plugin)["convert_input"] is convert
    with pytest.raises(SampleIdError, match="none of those that the train loaders gave"):
        callback._announce(trainer, [])
