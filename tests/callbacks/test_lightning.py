"""`LightningRecorder`: a fit is recorded as it is, trains to the same bits, and its machine is the trained network."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.frameworks
L = pytest.importorskip("lightning")

import torch  # noqa: E402
from lightning.pytorch import callbacks as others  # noqa: E402
from lightning_fits import (  # noqa: E402
    Classifier,
    N,
    WithForward,
    X,
    Y,
    a_loader,
    a_trainer,
    both,
    ids_are_places,
    inputs_on_record,
    is_the_network,
    quiet,
    with_dropout,
)
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from pathkernel.callbacks.lightning import LightningRecorder  # noqa: E402
from pathkernel.errors import InputError, RecordingError  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


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

KINDS = (WithForward, Classifier)


@pytest.mark.parametrize(
    ("options", "kind"), list(zip(TRAINERS.values(), itertools.cycle(KINDS), strict=False)), ids=TRAINERS
)
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

    _, callback = both(fit)
    why = callback.machine.explain(X[:3])
    assert abs(why.left_over).max() <= 2e-3 * abs(why.output).max()
    assert inputs_on_record(callback)[0][1] is None


def test_ids_are_found_where_batches_are_drawn() -> None:
    """The record's gradient is that of the samples whose ids it has: computed by autograd alone."""
    module, callback = Classifier(), LightningRecorder()
    a_trainer(callback, max_epochs=1).fit(module, a_loader())
    for step in callback.trajectory.steps():
        own = copy.deepcopy(module.net)
        own.load_state_dict(callback.trajectory.parameters(step.index))
        (ids,) = (batch.ids for batch in step.batches)
        own.zero_grad()
        F.cross_entropy(own(X[ids]), Y[ids]).backward()
        expected = torch.cat([p.grad.flatten() for p in own.parameters()])
        torch.testing.assert_close(step.gradient, expected, rtol=1e-5, atol=1e-7)


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


def test_strategies_of_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"):  # which the strategy sets, for good
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    try:
        with pytest.raises(RecordingError, match=r"DDPStrategy, for 1 process.*devices=1"):
            a_trainer(LightningRecorder(), strategy="ddp", devices=1).fit(Classifier(), a_loader())
    finally:
        torch.distributed.destroy_process_group()
        torch.set_num_threads(1)


def test_a_module_that_is_compiled_as_a_whole_is_refused() -> None:
    compiled = torch.compile(WithForward(), backend="eager")
    with pytest.raises(RecordingError, match=r"WithForward is compiled with its `training_step`.*self\.net\.compile"):
        a_trainer(LightningRecorder()).fit(compiled, a_loader())


@pytest.mark.parametrize("in_place", [False, True])
def test_a_network_that_is_compiled_alone(in_place: bool) -> None:
    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Classifier()
        if in_place:
            module.net.compile(backend="eager")
        else:
            module.net = torch.compile(module.net, backend="eager")
        a_trainer(callback).fit(module, a_loader())
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    ids_are_places(callback)


def test_batches_that_are_skipped_are_nobody_s() -> None:
    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 4 else None

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Skips()
        a_trainer(callback, max_epochs=4).fit(module, a_loader())
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    assert len(callback.trajectory) == 12


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
