"""`LightningRecorder`: a fit is recorded as it is, trains to the same bits, and its machine is the trained network."""

from __future__ import annotations

import copy
import csv
import logging
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.frameworks
L = pytest.importorskip("lightning")

import torch  # noqa: E402
from lightning.pytorch import callbacks as others  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset  # noqa: E402

from pathkernel.callbacks.lightning import LightningRecorder  # noqa: E402
from pathkernel.errors import (  # noqa: E402
    CertificateWarning,
    InputError,
    MissingExtraError,
    RecordingError,
    SampleIdError,
)
from pathkernel.trajectory.trajectory import Trajectory  # noqa: E402

RESIDUAL = 1e-5
"""What rounding in float32 may leave, relative to the largest output: networks, losses and steps are of size one."""

N = 21


def _samples(n: int = N, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.randint(2, (n,), generator=generator)


X, Y = _samples()
DATA = TensorDataset(X, Y)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*(LeafSpec|does not have many workers|tensorboardX).*")
        yield


class Classifier(L.LightningModule):
    """A module without ``forward``: its only part is called."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class WithForward(Classifier):
    """A module that is called itself, and validates."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", F.cross_entropy(self(batch[0]), batch[1]))


def with_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2)
    )


def a_loader(data: Any = DATA, **options: Any) -> DataLoader:
    return DataLoader(data, **{"batch_size": 5, "shuffle": True, **options})


def a_trainer(*callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 2}
    return L.Trainer(callbacks=[one for one in callbacks if one is not None], **{**quiet, **options})


Fit = Callable[[LightningRecorder | None], nn.Module]
"""A program: trains a module with the callback, or without it, and returns it."""


def both(fit: Fit, make: Callable[[], LightningRecorder] | None = None) -> tuple[nn.Module, LightningRecorder]:
    """Run a program without the callback and with it: weights, buffers and generators end with the same bits."""
    callback = (make or (lambda: LightningRecorder(task="classification")))()
    ends = []
    for one in (None, callback):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        module = fit(one)
        ends.append((module.state_dict(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1]))
    (plain, *generators), (recorded, *after) = ends
    assert plain.keys() == recorded.keys()
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    assert torch.equal(generators[0], after[0])
    assert generators[1] == after[1]
    assert np.array_equal(generators[2], after[2])
    return module, callback


def is_the_network(
    callback: LightningRecorder, network: nn.Module, queries: Any = X[:3], tolerance: float = RESIDUAL, **asked: Any
) -> None:
    """The machine says what the network says, and its parts add up to it."""
    machine = callback.machine
    why = machine.explain(queries, **asked)
    scale = abs(why.output).max()
    assert abs(why.left_over).max() <= tolerance * max(scale, 1)
    assert why.split_error <= tolerance
    assert why.shares.any()
    network.eval()
    with torch.no_grad():
        outputs = network(*queries) if isinstance(queries, tuple) else network(queries)
    outputs = outputs.double().numpy()
    np.testing.assert_allclose(machine(queries).reshape(outputs.shape), outputs, rtol=0, atol=tolerance)


def inputs_on_record(callback: LightningRecorder) -> list[tuple[Tensor, Any]]:
    return [(batch.ids, batch.inputs) for step in callback.trajectory.steps() for batch in step.batches]


def ids_are_places(callback: LightningRecorder) -> None:
    """Each batch was what the data hold under its ids, to the last bit: otherwise it had been kept."""
    assert all(inputs is None for _, inputs in inputs_on_record(callback))
    assert len({int(i) for ids, _ in inputs_on_record(callback) for i in ids}) > 10


# -- the plain case ----------------------------------------------------------------------------------------------------

TRAINERS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "accumulation, clipping by norm": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
    "clipping by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "a part of the batches": {"limit_train_batches": 3, "val_check_interval": 2},
    "loaders made anew": {"reload_dataloaders_every_n_epochs": 1},
    "steps counted": {"max_steps": 7, "max_epochs": -1},
    "double precision": {"precision": "64-true"},
    "anomalies detected": {"detect_anomaly": True},
}


@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("kind", [Classifier, WithForward], ids=["part", "forward"])
def test_a_fit_is_recorded(kind: type[Classifier], options: dict[str, Any]) -> None:
    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = kind(with_dropout())
        a_trainer(callback, **options).fit(module, a_loader(drop_last=True), a_loader(shuffle=False))
        return module

    module, callback = both(fit)
    queries = X[:3].to(next(module.parameters()).dtype)
    is_the_network(callback, module.net if kind is Classifier else module, queries)
    if "precision" not in options:
        ids_are_places(callback)


def test_bfloat16() -> None:
    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Classifier()
        a_trainer(callback, precision="bf16-mixed").fit(module, a_loader())
        return module

    module, callback = both(fit)
    why = callback.machine.explain(X[:3])
    assert abs(why.left_over).max() <= 2e-3 * abs(why.output).max()
    assert inputs_on_record(callback)[0][1] is None


def test_ids_are_found_where_batches_are_drawn(subtests: Any = None) -> None:
    """The record's gradient is that of the samples whose ids it has: computed by autograd alone."""
    module, callback = Classifier(), LightningRecorder()
    a_trainer(callback, max_epochs=1).fit(module, a_loader(num_workers=0))
    for step in callback.trajectory.steps():
        own = copy.deepcopy(module.net)
        own.load_state_dict(callback.trajectory.parameters(step.index))
        (ids,) = (batch.ids for batch in step.batches)
        own.zero_grad()
        F.cross_entropy(own(X[ids]), Y[ids]).backward()
        expected = torch.cat([p.grad.flatten() for p in own.parameters()])
        torch.testing.assert_close(step.gradient, expected, rtol=1e-5, atol=1e-7)


# -- loaders -----------------------------------------------------------------------------------------------------------


def test_worker_processes_that_persist() -> None:
    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Classifier()
        a_trainer(callback).fit(module, a_loader(num_workers=1, persistent_workers=True))
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    ids_are_places(callback)


def test_samples_of_a_subset_have_their_places_in_the_data() -> None:
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


X2, Y2 = _samples(12, 8)
EVERY = torch.cat([X, X2])


class TwoSources(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (u, _) = batch["labelled"], batch["unlabelled"]
        return F.cross_entropy(self.net(x), y) + 0.1 * self.net(u.view(-1, 3)).square().mean()


class Joined(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), (u, _) = batch
        z = self.net(torch.cat([x, u]))
        return F.cross_entropy(z[: len(x)], y) + 0.1 * z[len(x) :].square().mean()


@pytest.mark.parametrize("joined", [False, True])
def test_several_loaders_have_their_samples_one_after_the_other(joined: bool) -> None:
    second = TensorDataset(X2, Y2)

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module: Classifier = Joined() if joined else TwoSources()
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


# -- several optimizers, several networks ------------------------------------------------------------------------------


class Manual(Classifier):
    """Two optimizers of one network, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        body, head = self.optimizers()
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(body, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
        body.step()
        head.step()

    def configure_optimizers(self) -> Any:
        body = torch.optim.SGD(self.net[0].parameters(), lr=0.1, momentum=0.9)
        return body, torch.optim.AdamW(self.net[2].parameters(), lr=0.01)


def test_two_optimizers_of_one_network(tmp_path: Path) -> None:
    def fit(callback: LightningRecorder | None) -> nn.Module:
        module, saves = Manual(), others.ModelCheckpoint(tmp_path, every_n_train_steps=1)
        a_trainer(callback, saves, enable_checkpointing=True).fit(module, a_loader())
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    ids_are_places(callback)
    assert "SGD and AdamW" in repr(callback.trajectory)
    assert len(callback.trajectory) == 10


class Gan(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        x, bce = batch[0], F.binary_cross_entropy_with_logits
        real, false = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        self.toggle_optimizer(generator)
        made = self.generator(torch.randn(len(x), 2))
        self.manual_backward(bce(self.critic(made), real))
        generator.step()
        generator.zero_grad()
        self.untoggle_optimizer(generator)
        self.toggle_optimizer(critic)
        self.manual_backward(bce(self.critic(x), real) + bce(self.critic(made.detach()), false))
        critic.step()
        critic.zero_grad()
        self.untoggle_optimizer(critic)

    def configure_optimizers(self) -> Any:
        parts = (self.critic, self.generator)
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in parts]


def test_each_network_of_a_gan_has_a_callback(tmp_path: Path) -> None:
    of_critic = LightningRecorder(watch="critic", source="generated", store=True, task="classification")
    of_generator = LightningRecorder(watch="generator", source="noise", data=None, store=True, task="regression")

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Gan()
        a_trainer(callback, callback and of_generator, default_root_dir=tmp_path).fit(module, a_loader())
        return module

    module, _ = both(fit, lambda: of_critic)
    is_the_network(of_critic, module.critic)
    is_the_network(of_generator, module.generator, X[:3, :2], outputs=0)
    real, made = [batch for step in of_critic.trajectory.steps() for batch in step.batches][:2]
    assert (real.source, real.inputs, made.source) == (None, None, "generated")
    assert of_critic.machine.explain(X[:1]).sources == {"generated": slice(N, 3 * N)}
    assert of_generator.machine.explain(X[:1, :2], outputs=0).sources == {"noise": slice(0, 2 * N)}
    assert {path.name for path in tmp_path.iterdir()} == {"pathkernel-critic", "pathkernel-generator"}


class Autoencoder(L.LightningModule):
    """As in Lightning's own first example: parts are called, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(len(batch[0]), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def test_parts_that_are_called_one_after_the_other() -> None:
    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Autoencoder()
        a_trainer(callback).fit(module, a_loader())
        return module

    module, callback = both(fit, lambda: LightningRecorder(watch=("encoder", "decoder"), task="regression"))
    is_the_network(callback, nn.Sequential(module.encoder, module.decoder), outputs=0)
    ids_are_places(callback)


def test_parts_of_some_of_the_optimizers() -> None:
    class Beside(Autoencoder):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization, self.other = False, nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            own, other = self.optimizers()
            for loss, one in ((super().training_step(batch, 0), own), (self.other(batch[0]).square().mean(), other)):
                one.zero_grad()
                self.manual_backward(loss)
                one.step()

        def configure_optimizers(self) -> Any:
            own = [*self.encoder.parameters(), *self.decoder.parameters()]
            return torch.optim.Adam(own, lr=0.02), torch.optim.SGD(self.other.parameters(), lr=0.1)

    callback, module = LightningRecorder(watch=("encoder", "decoder"), task="regression"), Beside()
    a_trainer(callback).fit(module, a_loader())
    is_the_network(callback, nn.Sequential(module.encoder, module.decoder), outputs=0)


def test_a_module_without_forward_and_with_several_parts_says_what_to_watch() -> None:
    with pytest.raises(InputError, match=r"2 parts.*'encoder', 'decoder'.*watch=\('encoder', 'decoder'\)"):
        a_trainer(LightningRecorder()).fit(Autoencoder(), a_loader())


def test_parts_that_are_called_in_place_of_forward_are_named() -> None:
    class Embeds(Autoencoder):
        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x)

    with pytest.raises(RecordingError) as caught:
        a_trainer(LightningRecorder()).fit(Embeds(), a_loader())
    assert "LightningRecorder(watch=('encoder', 'decoder'))" in caught.value.__notes__[0]


def test_no_optimizer_is_named() -> None:
    class Still(Classifier):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.raises(RecordingError, match=r"No optimizer of the trainer.*configure_optimizers"):
        a_trainer(LightningRecorder(watch="net")).fit(Still(), a_loader())


def test_strategies_of_several_processes_are_refused() -> None:
    with pytest.raises(RecordingError, match=r"DDPStrategy, for 1 process.*devices=1"):
        a_trainer(LightningRecorder(), strategy="ddp", devices=1).fit(Classifier(), a_loader())


def test_an_optimizer_that_was_copied_is_attached_again() -> None:
    class Copies(others.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                own = trainer.optimizers[0]
                again = type(own)(pl_module.parameters(), lr=0.02)
                again.load_state_dict(own.state_dict())
                trainer.optimizers = [again]

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Classifier()
        a_trainer(Copies(), callback).fit(module, a_loader())
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    assert len(callback.trajectory) == 10
