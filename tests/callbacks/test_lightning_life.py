"""`LightningRecorder` over a run's life: again, resumed, interrupted, averaged, tuned, logged."""

from __future__ import annotations

import copy
import csv
import logging
import pickle
import sys
from collections.abc import Iterator
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
from lightning_fits import (  # noqa: E402
    Classifier,
    WithForward,
    X,
    a_loader,
    a_trainer,
    both,
    ids_are_places,
    is_the_network,
    quiet,
    with_dropout,
)
from torch import Tensor, nn  # noqa: E402

import pathkernel as pk  # noqa: E402
from pathkernel.callbacks.lightning import LightningRecorder  # noqa: E402
from pathkernel.errors import (  # noqa: E402
    CertificateWarning,
    InputError,
    MissingExtraError,
    RecordingError,
    TrajectoryError,
)
from pathkernel.trajectory.trajectory import Trajectory  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


# -- fit twice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_trainer", [False, True])
@pytest.mark.parametrize("store", [False, True])
def test_a_second_fit_goes_on_in_the_record(same_trainer: bool, store: bool, tmp_path: Path) -> None:
    loader = a_loader()

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module, trainer = Classifier(), a_trainer(callback)
        trainer.fit(module, loader)
        if same_trainer:
            trainer.fit_loop.max_epochs = 4
        else:
            trainer = a_trainer(callback)
        trainer.fit(module, loader)
        return module

    options = {"store": tmp_path / "store"} if store else {}
    module, callback = both(fit, lambda: LightningRecorder(task="classification", **options))
    assert len(callback.trajectory) == 20
    is_the_network(callback, module.net)
    ids_are_places(callback)


def test_what_a_record_does_not_lead_to_begins_a_new_one() -> None:
    callback, module = LightningRecorder(task="classification"), Classifier()
    a_trainer(callback).fit(module, a_loader())
    with torch.no_grad():
        module.net[0].weight.mul_(1.5)
    start = copy.deepcopy(module.net.state_dict())
    a_trainer(callback).fit(module, a_loader())  # from other weights
    assert len(callback.trajectory) == 10
    assert all(torch.equal(start[name], value) for name, value in callback.trajectory.parameters(0).items())
    is_the_network(callback, module.net)
    other = Classifier()
    a_trainer(callback).fit(other, a_loader())  # another module
    assert len(callback.trajectory) == 10
    is_the_network(callback, other.net)
    a_trainer(callback).fit(other, a_loader(torch.utils.data.TensorDataset(-X, torch.ones(21, dtype=torch.int64))))
    assert len(callback.trajectory) == 10  # other data
    is_the_network(callback, other.net)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def resumed(
    folder: Path, callback: LightningRecorder | None, again: LightningRecorder | None, epochs: int
) -> nn.Module:
    """A run of three epochs, and a second one that goes on from a checkpoint of the first."""
    torch.manual_seed(0)
    module, saves = Classifier(), others.ModelCheckpoint(folder / "saved", save_top_k=-1)
    options: dict[str, Any] = {"logger": CSVLogger(folder), "enable_checkpointing": True}
    loader = a_loader(generator=torch.Generator().manual_seed(1))
    a_trainer(callback, saves, max_epochs=3, **options).fit(module, loader)
    saved = sorted((folder / "saved").iterdir())[epochs - 1]
    module, loader = Classifier(), a_loader(generator=torch.Generator().manual_seed(2))
    a_trainer(again, max_epochs=4, **options).fit(module, loader, ckpt_path=saved)
    return module


@pytest.mark.parametrize("another", [True, False], ids=["another callback", "the same callback"])
@pytest.mark.parametrize("in_run", [True, False], ids=["run's own folder", "path"])
def test_a_run_goes_on_in_the_store_of_its_checkpoint(another: bool, in_run: bool, tmp_path: Path) -> None:
    def callback() -> LightningRecorder:
        return LightningRecorder(store=True if in_run else tmp_path / "store", task="classification", certify=0)

    first = callback()
    second = callback() if another else first
    plain = resumed(tmp_path / "plain", None, None, 2)
    module = resumed(tmp_path / "recorded", first, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    assert len(second.trajectory) == 20
    is_the_network(second, module.net)
    ids_are_places(second)
    path = second.trajectory.store.path  # type: ignore[attr-defined]
    opened = Trajectory.open(path, model=module.net, data=second.trajectory.data.dataset)
    assert len(opened) == 20
    state = torch.load(sorted((tmp_path / "recorded/saved").iterdir())[1], weights_only=True)["callbacks"]
    assert state["LightningRecorder"] == {"steps": 10, "store": str(path)}


def test_a_run_in_memory_begins_where_its_checkpoint_is(tmp_path: Path) -> None:
    callback = LightningRecorder(task="classification", certify=0)
    module = resumed(tmp_path, None, callback, 2)
    assert len(callback.trajectory) == 10
    is_the_network(callback, module.net)
    assert "memory" in callback.machine.explain(X[:1]).channels  # what the optimizer remembers of the steps before


def test_a_checkpoint_that_is_loaded_in_mid_run_has_its_channel() -> None:
    class Reloads(others.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                self.kept = copy.deepcopy(pl_module.state_dict())
            else:
                pl_module.load_state_dict(self.kept)

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = WithForward(with_dropout())
        stops = others.EarlyStopping("validation", patience=1, min_delta=10.0)
        trainer = a_trainer(callback, Reloads(), stops, max_epochs=5)
        trainer.fit(module, a_loader(drop_last=True), a_loader(shuffle=False))
        assert trainer.current_epoch == 2  # stopped
        return module

    module, callback = both(fit)
    is_the_network(callback, module)
    # The machine is that of the step whose weights were loaded; the whole path takes the detour.
    assert len(callback.machine.trajectory) < len(callback.trajectory)
    assert "loaded" in pk.KernelMachine(callback.trajectory).explain(X[:1]).channels


# -- interruptions -----------------------------------------------------------------------------------------------------


class Breaks(Classifier):
    error: type[BaseException] = ValueError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 6:
            raise self.error("on purpose")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_fit_that_is_interrupted_leaves_nothing_behind(error: type[BaseException], tmp_path: Path) -> None:
    callback, module, loader = LightningRecorder(task="classification", store=True), Breaks(), a_loader()
    module.error = error
    trainer = a_trainer(callback, default_root_dir=tmp_path)
    collate = loader.collate_fn
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(module, loader)
    assert len(callback.trajectory) == 6
    is_the_network(callback, module.net)
    for owner in (trainer.strategy, trainer.precision_plugin):
        assert not {"process_dataloader", "convert_input"} & vars(owner).keys()
    assert loader.collate_fn is collate
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    before = len(callback.trajectory)
    Breaks.error = ValueError
    a_trainer().fit(Classifier(module.net), loader)  # without the callback
    assert len(callback.trajectory) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_callback_can_be_copied_while_it_records(copied: Any) -> None:
    class Copies(others.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                self.kept, self.network = copied(callback), copy.deepcopy(pl_module.net)

    callback, copies, module = LightningRecorder(task="classification"), Copies(), Classifier()
    a_trainer(callback, copies).fit(module, a_loader())
    is_the_network(callback, module.net)
    is_the_network(copies.kept, copies.network)
    assert (len(copies.kept.trajectory), len(callback.trajectory)) == (3, 10)


def test_the_module_can_be_copied_while_it_trains() -> None:
    class Copies(others.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            again = copy.deepcopy(pl_module)
            pickle.dumps(pl_module.net)
            again.net(X)  # no pass of the network that is recorded
            copy.deepcopy(trainer.optimizers[0])

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Classifier()
        a_trainer(callback, Copies()).fit(module, a_loader())
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)


def test_all_is_put_back_when_a_fit_ends() -> None:
    module = Classifier()
    callback, loader = LightningRecorder(task="classification", watch=module.net), a_loader()
    trainer = a_trainer(callback)
    order, before = trainer.callbacks, dict(vars(loader))
    trainer.fit(module, loader)
    assert trainer.callbacks is order
    assert {**vars(loader), "_iterator": None} == {**before, "_iterator": None}
    assert (
        not {"process_dataloader", "convert_input"} & (vars(trainer.strategy) | vars(trainer.precision_plugin)).keys()
    )
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters() if p._post_accumulate_grad_hooks)
    is_the_network(callback, module.net)


def test_a_fit_without_steps_leaves_the_record_as_it_was() -> None:
    callback, module = LightningRecorder(task="classification"), Classifier()
    a_trainer(callback, limit_train_batches=0).fit(module, a_loader())
    with pytest.raises(TrajectoryError, match="has not seen any training yet"):
        _ = callback.machine
    a_trainer(callback).fit(module, a_loader())
    trainer = a_trainer(callback)
    trainer.validate(WithForward(), a_loader(shuffle=False), verbose=False)
    assert len(callback.trajectory) == 10


# -- other callbacks ---------------------------------------------------------------------------------------------------

AVERAGES = {
    "EMAWeightAveraging": lambda: others.EMAWeightAveraging(decay=0.8),
    "StochasticWeightAveraging": lambda: others.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", AVERAGES)
def test_the_machine_is_the_averaged_network(name: str, first: bool) -> None:
    if not hasattr(others, name):
        pytest.skip("this version of Lightning has none")

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = WithForward(with_dropout() if name.startswith("EMA") else None)
        own = AVERAGES[name]()
        pair = (own, callback) if first else (callback, own)
        trainer = a_trainer(*pair, max_epochs=4)
        order = trainer.callbacks
        trainer.fit(module, a_loader(drop_last=True), a_loader(shuffle=False))
        assert trainer.callbacks is order
        return module

    module, callback = both(fit)
    is_the_network(callback, module)
    assert list(callback.trajectory.averages) == [name]


def test_an_averaged_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    if not hasattr(others, "EMAWeightAveraging"):
        pytest.skip("this version of Lightning has none")
    callback = LightningRecorder(task="classification", store=tmp_path / "store")
    average, saves = AVERAGES["EMAWeightAveraging"], others.ModelCheckpoint(tmp_path / "saved", save_top_k=-1)
    a_trainer(callback, average(), saves, enable_checkpointing=True, max_epochs=3).fit(WithForward(), a_loader())
    module, saved = WithForward(), sorted((tmp_path / "saved").iterdir())[1]
    a_trainer(callback, average(), max_epochs=4).fit(module, a_loader(), ckpt_path=saved)
    assert len(callback.trajectory) == 20
    is_the_network(callback, module)
    again = LightningRecorder(task="classification")
    a_trainer(again, average()).fit(module, a_loader())
    a_trainer(again, average()).fit(module, a_loader())  # from the average: no point of the first record
    assert len(again.trajectory) == 10
    is_the_network(again, module)


def test_an_average_with_statistics_found_anew_is_refused() -> None:
    with pytest.raises(RecordingError, match=r"StochasticWeightAveraging averages a Classifier that has BatchNorm"):
        a_trainer(LightningRecorder(), AVERAGES["StochasticWeightAveraging"]()).fit(
            Classifier(with_dropout()), a_loader()
        )


class Tuned(Classifier):
    lr, batch_size = 0.02, 5

    def train_dataloader(self) -> Any:
        return a_loader(batch_size=self.batch_size)


@pytest.mark.parametrize("how", ["tuner", "lr", "batch size"])
def test_trial_runs_of_the_tuner_are_not_recorded(how: str, tmp_path: Path) -> None:
    def fit(callback: LightningRecorder | None) -> nn.Module:
        module, more = Tuned(), None
        if how == "lr":
            more = others.LearningRateFinder(num_training_steps=5, update_attr=False)
        elif how == "batch size":
            more = others.BatchSizeFinder(steps_per_trial=2, max_trials=2, init_val=2)
        trainer = a_trainer(callback, more, default_root_dir=tmp_path)
        if how == "tuner":
            Tuner(trainer).lr_find(module, num_training=5, update_attr=False)
        trainer.fit(module)
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    ids_are_places(callback)
    assert len(callback.trajectory) == 2 * -(-21 // module.batch_size)


def test_the_finetuning_callback_brings_parameters_later() -> None:
    class Unfreezes(others.BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.01)

    class Head(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.02)

    def fit(callback: LightningRecorder | None) -> nn.Module:
        module = Head()
        a_trainer(callback, Unfreezes(), max_epochs=3).fit(module, a_loader())
        return module

    module, callback = both(fit)
    is_the_network(callback, module.net)
    assert len(callback.trajectory) == 15


# -- logs, options, versions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["dataset", "kept"])
def test_the_certificate_is_logged(data: str, tmp_path: Path) -> None:
    callback = LightningRecorder(task="classification", **({"data": None} if data == "kept" else {}))
    trainer = a_trainer(callback, logger=CSVLogger(tmp_path))
    trainer.fit(Classifier(), a_loader())
    with open(Path(trainer.log_dir) / "metrics.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["pathkernel/residual"]) < 1e-5
    assert float(row["pathkernel/split_error"]) < 1e-5
    assert float(row["pathkernel/quadrature_error"]) < 1
    assert row["step"] == "10"


def test_an_explanation_is_announced_before_it_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    for certify in (2, 0):
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            a_trainer(LightningRecorder(certify=certify), logger=CSVLogger(tmp_path)).fit(Classifier(), a_loader())
        told = [one.message for one in caplog.records if "2 training samples" in one.message]
        assert len(told) == bool(certify)
        assert all("all 10 steps" in one and "certify=0" in one for one in told)


def test_nothing_is_explained_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("explained")

    monkeypatch.setattr("pathkernel.callbacks.recording.FrameworkRecording.certificate", refuse)
    a_trainer(LightningRecorder(certify=0), logger=CSVLogger(tmp_path)).fit(Classifier(), a_loader())
    a_trainer(LightningRecorder()).fit(Classifier(), a_loader())


def test_an_explanation_that_fails_does_not_end_the_fit(tmp_path: Path) -> None:
    from pathkernel.trajectory.schedule import WeightsOnly

    callback = LightningRecorder(schedule=WeightsOnly(), data=None)
    with pytest.warns(CertificateWarning, match="No batch on record holds its inputs"):
        a_trainer(callback, logger=CSVLogger(tmp_path)).fit(Classifier(), a_loader())
    assert len(callback.trajectory) == 10


def test_a_store_in_the_run_s_own_folder(tmp_path: Path) -> None:
    callback = LightningRecorder(store=True, task="classification", certify=0)
    trainer = a_trainer(callback, logger=CSVLogger(tmp_path))
    trainer.fit(Classifier(), a_loader())
    assert (Path(trainer.log_dir) / "pathkernel").is_dir()
    assert np.isfinite(callback.machine(X[:2])).all()


def test_options_are_checked_at_construction() -> None:
    with pytest.raises(InputError, match="`storage=`"):
        LightningRecorder(storage="runs")  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"`certify=-1`"):
        LightningRecorder(certify=-1)


@pytest.mark.parametrize("version", ["2.1.9", "3.0"])
def test_a_version_that_is_not_known_is_named_at_construction(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(MissingExtraError, match=rf"lightning is of the version {version}.*2\.2 on.*before 3"):
        LightningRecorder()


def test_lightning_by_its_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `pytorch_lightning` alone is installed, its callbacks are what ours is made from."""
    import importlib

    import lightning.pytorch

    from pathkernel.callbacks import lightning as ours

    spec = importlib.util.spec_from_loader("pytorch_lightning", loader=None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", lightning.pytorch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "pytorch_lightning" else None)
    monkeypatch.setattr(metadata, "version", lambda name: {"pytorch-lightning": "2.6.6"}[name])
    try:
        again = importlib.reload(ours)
        assert again.DISTRIBUTION == "pytorch-lightning"
        callback, module = again.LightningRecorder(task="classification"), Classifier()
        a_trainer(callback).fit(module, a_loader())
        is_the_network(callback, module.net)
    finally:
        monkeypatch.undo()
        importlib.reload(ours)
