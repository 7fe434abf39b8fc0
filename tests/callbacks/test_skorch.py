"""`SkorchRecorder` in the nets of skorch: what is recorded, and that training is what it would be without it."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pathkernel as pk
from pathkernel.errors import InputError, MissingExtraError, RecordingError, SampleIdError, TrajectoryError

skorch = pytest.importorskip("skorch")

from sklearn.base import clone  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import Pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from skorch.callbacks import (  # noqa: E402
    Callback,
    Checkpoint,
    EarlyStopping,
    Freezer,
    GradientNormClipping,
    Initializer,
    LRScheduler,
    Unfreezer,
)
from skorch.dataset import ValidSplit  # noqa: E402
from skorch.helper import SliceDict, predefined_split  # noqa: E402
from torch.utils.data import Dataset, TensorDataset  # noqa: E402

pytestmark = pytest.mark.frameworks

EXACT = 1e-5  # of the residual in float32
N = 60

_rng = np.random.default_rng(0)
X = _rng.normal(size=(N, 4)).astype("float32")
Y = (X[:, 0] * X[:, 1] > 0).astype("int64") + (X[:, 2] > 0.4).astype("int64")
TARGETS = np.stack([np.sin(X[:, 0]), X[:, 1] * X[:, 2]], 1).astype("float32")


def recording(**options: Any) -> pk.callbacks.SkorchRecorder:
    """A callback that certifies nothing by itself."""
    return pk.callbacks.SkorchRecorder(**{"certify": 0, **options})


class Net(nn.Module):
    """Two layers; the last function is a parameter."""

    def __init__(self, hidden: int = 8, outputs: int = 3, last: str = "") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
        self.last = nn.Softmax(dim=-1) if last == "softmax" else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(x))


def classifier(callbacks: list[Any], **options: Any) -> Any:
    given = {
        "criterion": nn.CrossEntropyLoss,
        "optimizer": torch.optim.Adam,
        "lr": 0.01,
        "max_epochs": 2,
        "batch_size": 16,
        "verbose": 0,
        "iterator_train__shuffle": True,
        "module": Net,
        **options,
    }
    return skorch.NeuralNetClassifier(callbacks=callbacks, **given)


def regressor(callbacks: list[Any], **options: Any) -> Any:
    given = {
        "module": Net,
        "module__outputs": 2,
        "lr": 0.05,
        "max_epochs": 2,
        "batch_size": 16,
        "verbose": 0,
        **options,
    }
    return skorch.NeuralNetRegressor(callbacks=callbacks, **given)


def trained(net: Any, X: Any = X, y: Any = Y) -> Any:
    torch.manual_seed(0)
    return net.fit(X, y)


def random_state() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def assert_explained(recorder: pk.callbacks.SkorchRecorder, net: Any, X: Any = X, exact: float = EXACT) -> Any:
    """The machine says what the net says, and its sum is exact."""
    outputs = net.forward(X)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    expected = outputs.reshape(len(outputs), -1).numpy()
    found = recorder.machine(X).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=exact * abs(expected).max())
    few = {key: value[:3] for key, value in X.items()} if isinstance(X, dict) else X[:3]
    why = recorder.machine.explain(few)
    assert why.relative_residual <= exact
    assert why.split_error <= exact
    return why


def in_training(net: Any, X: Any = X, y: Any = Y) -> np.ndarray:
    """Places in X of the samples that a net is trained on."""
    dataset, _ = net.get_split_datasets(X, y)
    return np.asarray(getattr(dataset, "indices", range(len(X))))


# -- the same training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"train_split": None, "optimizer": torch.optim.SGD}])
def test_training_is_to_the_last_bit_what_it_is_without_the_callback(options: dict[str, Any]) -> None:
    ends = []
    for callbacks in ([], [pk.callbacks.SkorchRecorder()]):
        net = trained(classifier(callbacks, **options))
        ends.append(
            (net.module_.state_dict(), net.optimizer_.state_dict(), net.history[:, "train_loss"], random_state())
        )
    (weights, state, losses, generators), (weights_, state_, losses_, generators_) = ends
    assert all(torch.equal(weights[name], weights_[name]) for name in weights)
    for place, own in state["state"].items():
        assert all(torch.equal(torch.as_tensor(own[key]), torch.as_tensor(state_["state"][place][key])) for key in own)
    assert losses == losses_
    assert generators == generators_


def test_nothing_stays_on_the_net() -> None:
    plain, recorder = classifier([]), recording()
    net = trained(classifier([recorder]))
    assert net.get_params(deep=False).keys() == trained(plain).get_params(deep=False).keys()
    assert not net.module_._forward_hooks and not net.module_._forward_pre_hooks
    assert not net.optimizer_._optimizer_step_pre_hooks and not net.optimizer_._optimizer_step_post_hooks


def test_nothing_stays_on_the_net_after_an_error() -> None:
    class Fails(Callback):
        def on_batch_end(self, net: Any, **kwargs: Any) -> None:
            if len(net.history[-1, "batches"]) == 2:
                raise ZeroDivisionError

    recorder = recording()
    net = classifier([recorder, Fails()])
    with pytest.raises(ZeroDivisionError):
        trained(net)
    assert not {"fit_loop", "get_iterator"} & vars(net).keys()
    assert not net.module_._forward_hooks and not net.optimizer_._optimizer_step_post_hooks
    assert len(recorder.trajectory) == 2
    assert_explained(recorder, net)


def test_nothing_stays_on_the_net_where_its_data_are_refused() -> None:
    net = classifier([recording()])
    with pytest.raises(ValueError, match="inconsistent lengths"):
        net.fit(X, Y[:-1])
    assert not {"fit_loop", "get_iterator"} & vars(net).keys()


# -- whose samples they are -------------------------------------------------------------------------------------


def test_ids_are_places_in_what_fit_was_given_and_held_out_samples_have_no_share() -> None:
    recorder = recording()
    net = trained(classifier([recorder]))
    why = assert_explained(recorder, net)
    used = in_training(net)
    assert why.shares.shape == (3, N) and len(used) == 48
    assert (why.shares[:, used] != 0).all()
    assert (np.delete(why.shares, used, axis=1) == 0).all()


def test_ids_are_right_by_an_independent_computation() -> None:
    recorder = recording()
    trained(classifier([recorder], train_split=None, optimizer=torch.optim.SGD, max_epochs=1, lr=0.1))
    step = recorder.trajectory.store.read(2)
    ids = step.batches[0].ids
    module = Net()
    module.load_state_dict(recorder.trajectory.parameters(2), strict=False)
    loss = nn.CrossEntropyLoss()(module(torch.from_numpy(X[ids])), torch.from_numpy(Y[ids]))
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    torch.testing.assert_close(torch.cat([g.flatten() for g in gradients]), step.gradient)
    assert not torch.equal(ids, ids.sort().values)  # in shuffled order


@pytest.mark.parametrize("workers", [{}, {"persistent_workers": True}], ids=["", "persistent"])
def test_ids_survive_worker_processes(workers: dict[str, Any]) -> None:
    recorder = recording(audit_every=1)
    options = {f"iterator_train__{name}": value for name, value in {"num_workers": 1, **workers}.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads beside a fork
        assert_explained(recorder, trained(classifier([recorder], **options)))


def test_a_predefined_split() -> None:
    recorder = recording()
    valid = skorch.dataset.Dataset(X[:9], Y[:9])
    net = trained(classifier([recorder], train_split=predefined_split(valid)))
    assert (assert_explained(recorder, net).shares != 0).all()


def test_a_random_split_is_known() -> None:
    recorder = recording(audit_every=1)
    net = trained(classifier([recorder], train_split=ValidSplit(0.3, random_state=1)))
    why, used = assert_explained(recorder, net), in_training(net)
    assert set(np.flatnonzero(why.shares[0])) == set(used)


class Pairs(Dataset):
    """A dataset of the user's own."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, place: int) -> tuple[np.ndarray, int]:
        return 2 * X[place], int(Y[place])


class Noisy(Pairs):
    """Its samples are others each time."""

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(X[place]) + 0.1 * torch.randn(4), int(Y[place])


@pytest.mark.parametrize("dataset", [Pairs(), Noisy(), TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))])
def test_a_dataset(dataset: Dataset) -> None:
    recorder = recording(audit_every=1)
    net = trained(classifier([recorder], train_split=ValidSplit(4), classes=[0, 1, 2]), dataset, None)
    why = assert_explained(recorder, net)
    assert why.shares.shape == (3, N)
    assert set(np.flatnonzero(why.shares[0])) == set(range(15, N))


def test_a_subset_has_ids_of_its_own() -> None:
    recorder = recording(audit_every=1)
    part = torch.utils.data.Subset(Pairs(), range(20, N))
    net = trained(classifier([recorder], train_split=ValidSplit(4), classes=[0, 1, 2]), part, None)
    why = recorder.machine.explain(X[:3])
    assert why.shares.shape == (3, 40) and (why.shares[:, 10:] != 0).all()
    assert why.relative_residual <= EXACT
    assert len(net.history) == 2


class Stream(torch.utils.data.IterableDataset):
    """Samples without places."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.from_numpy(x), int(y)) for x, y in zip(X, Y, strict=True)])


def test_a_stream_is_counted() -> None:
    recorder = recording(audit_every=1)
    options = {"train_split": None, "classes": [0, 1, 2], "iterator_train__shuffle": False}
    net = trained(classifier([recorder], module=Net, **options), Stream(), None)
    assert assert_explained(recorder, net).shares.shape == (3, 2 * N)  # in two epochs


class OwnLoader:
    """Batches of a loader that is none of torch's."""

    def __init__(self, dataset: Any, batch_size: int) -> None:
        self.batches = [slice(i, i + batch_size) for i in range(0, len(dataset), batch_size)]

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield torch.from_numpy(X[batch]), torch.from_numpy(Y[batch])


def test_a_loader_without_ids_is_refused_unless_samples_are_to_be_counted() -> None:
    options = {"iterator_train": OwnLoader, "train_split": None, "criterion": nn.CrossEntropyLoss, "verbose": 0}
    with pytest.raises(SampleIdError, match="`track` was given a OwnLoader"):
        trained(skorch.NeuralNetClassifier(Net, callbacks=[recording()], **options))
    recorder = recording(data=None)
    net = trained(skorch.NeuralNetClassifier(Net, callbacks=[recorder], max_epochs=1, **options))
    assert assert_explained(recorder, net).shares.shape == (3, N)


class TwoInputs(nn.Module):
    """Takes its inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return torch.tanh(self.a(left)) * scale + self.b(right)


@pytest.mark.parametrize("kind", [SliceDict, dict])
def test_inputs_by_name_and_further_arguments(kind: type) -> None:
    recorder = recording(audit_every=1)
    inputs = kind(left=X, right=X[:, :2].copy())
    torch.manual_seed(0)
    net = classifier([recorder], module=TwoInputs, train_split=None).fit(inputs, Y, scale=3.0)
    why = recorder.machine.explain({name: value[:3] for name, value in inputs.items()})
    assert why.shares.shape == (3, N) and why.relative_residual <= EXACT
    with torch.no_grad():  # queries are given what was shared in training; `net.predict` is not
        expected = net.module_(torch.from_numpy(X), torch.from_numpy(X[:, :2]), scale=3.0)
    np.testing.assert_allclose(recorder.machine(dict(inputs)), expected, atol=1e-5)


def test_data_frames_and_sparse_matrices() -> None:
    pandas, sparse = pytest.importorskip("pandas"), pytest.importorskip("scipy.sparse")
    recorder = recording()
    frame = pandas.DataFrame({"left": X[:, 0], "right": X[:, 1]})
    net = trained(classifier([recorder], module=Columns), frame.copy(), Y)
    columns = {name: frame[[name]].to_numpy().copy() for name in frame}
    np.testing.assert_allclose(recorder.machine(columns), net.forward(frame.copy()), atol=1e-5)
    assert_explained(recorder, trained(classifier([recorder]), sparse.csr_matrix(X), Y))


class Columns(nn.Module):
    """Takes columns of a data frame by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat([left, right], dim=1))


def test_tensors_and_one_batch_of_all() -> None:
    recorder = recording()
    net = trained(classifier([recorder], batch_size=-1), torch.from_numpy(X), torch.from_numpy(Y))
    assert_explained(recorder, net, torch.from_numpy(X))
    assert len(recorder.trajectory) == 2


def test_a_batch_of_another_loader_is_an_error() -> None:
    class Own(skorch.NeuralNetClassifier):
        def run_single_epoch(self, iterator: Any, training: bool, *args: Any, **kwargs: Any) -> None:
            super().run_single_epoch(
                [tuple(batch) for batch in iterator] if training else iterator, training, *args, **kwargs
            )

    net = Own(Net, criterion=nn.CrossEntropyLoss, callbacks=[recording()], verbose=0)
    with pytest.raises(RecordingError, match="a loader that SkorchRecorder has not seen"):
        trained(net)


# -- kinds of nets and losses -----------------------------------------------------------------------------------


def test_probabilities_of_a_module_with_a_softmax() -> None:
    """skorch takes the logarithm; the module returns probabilities."""
    recorder = recording()
    net = trained(classifier([recorder], module__last="softmax", criterion=nn.NLLLoss))
    assert_explained(recorder, net)
    np.testing.assert_allclose(recorder.machine.predict_proba(X), net.predict_proba(X), atol=1e-6)
    assert (recorder.machine.predict(X) == net.predict(X)).all()
    losses = recorder.machine.explain((X[:4], Y[:4]), outputs="loss")
    expected = [net.get_loss(net.forward(X[i : i + 1]), torch.from_numpy(Y[i : i + 1])).item() for i in range(4)]
    np.testing.assert_allclose(losses.output, expected, rtol=1e-5)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, nn.MultiMarginLoss])
def test_classes_and_probabilities_are_those_of_the_net(criterion: type) -> None:
    recorder = recording()
    net = trained(classifier([recorder], criterion=criterion))
    assert_explained(recorder, net)
    np.testing.assert_allclose(recorder.machine.predict_proba(X), net.predict_proba(X), atol=1e-5)
    assert (recorder.machine.predict(X) == net.predict(X)).all()


class Logit(Net):
    """One number for each sample, in a column or not."""

    def __init__(self, flat: bool) -> None:
        super().__init__(outputs=1)
        self.flat = flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = super().forward(x)
        return z.squeeze(1) if self.flat else z


@pytest.mark.parametrize("flat", [True, False])
def test_a_binary_classifier(flat: bool) -> None:
    recorder, y = recording(), (Y > 0).astype("float32")
    net = skorch.NeuralNetBinaryClassifier(Logit(flat), callbacks=[recorder], verbose=0, lr=0.5, batch_size=16)
    trained(net, X, y)
    np.testing.assert_allclose(recorder.machine.predict_proba(X), net.predict_proba(X), atol=1e-6)
    assert (recorder.machine.predict(X) == net.predict(X)).all()
    why = recorder.machine.explain((X[:4], y[:4]), outputs="loss")
    assert why.relative_residual <= EXACT
    expected = nn.functional.binary_cross_entropy_with_logits(
        net.forward(X[:4]), torch.from_numpy(y[:4]), reduction="none"
    )
    np.testing.assert_allclose(why.output, expected, rtol=1e-5)


def test_a_regressor() -> None:
    recorder = recording()
    net = trained(regressor([recorder]), X, TARGETS)
    assert_explained(recorder, net)
    np.testing.assert_allclose(recorder.machine.predict(X), net.predict(X), atol=1e-6)


def test_a_plain_net_in_double_precision() -> None:
    recorder = recording()
    module = Net(outputs=2).double()
    net = skorch.NeuralNet(module, nn.MSELoss, callbacks=[recorder], verbose=0, train_split=None, max_epochs=3)
    trained(net, X.astype("float64"), TARGETS.astype("float64"))
    assert_explained(recorder, net, X.astype("float64"), exact=1e-11)


def test_a_loss_of_the_nets_own_is_taken_from_the_pass() -> None:
    class Smooth(skorch.NeuralNetClassifier):
        def get_loss(self, y_pred: torch.Tensor, y_true: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().get_loss(y_pred, y_true, *args, **kwargs) + 0.1 * y_pred.square().mean()

    recorder = recording()
    net = trained(Smooth(Net, criterion=nn.CrossEntropyLoss, callbacks=[recorder], verbose=0, max_epochs=2))
    assert_explained(recorder, net)
    assert recorder.trajectory.loss is None
    assert (recorder.machine.predict(X) == net.predict(X)).all()


class Sparse(skorch.NeuralNetClassifier):
    """With an L1 term, as the documentation of skorch has it."""

    def get_loss(self, y_pred: torch.Tensor, y_true: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().get_loss(y_pred, y_true, *args, **kwargs) + 0.01 * sum(w.abs().sum() for w in weights(self))


def weights(net: Any) -> list[torch.Tensor]:
    return [p for name, p in net.module_.named_parameters() if name.endswith("weight")]


def l1(parameters: Any) -> torch.Tensor:
    return 0.01 * sum(p.abs().sum() for name, p in parameters.items() if name.endswith("weight"))


def test_terms_of_parameters_alone_have_a_name() -> None:
    options = {"criterion": nn.CrossEntropyLoss, "verbose": 0, "max_epochs": 2, "train_split": None}
    recorder = recording(regularizers={"l1": l1})
    why = assert_explained(recorder, trained(Sparse(Net, callbacks=[recorder], **options)))
    assert abs(why.channels["l1"]).max() > 0
    with pytest.raises(SampleIdError, match="regularizers="):
        trained(Sparse(Net, callbacks=[recording()], **options))


def test_accumulated_gradients_as_skorch_documents_them() -> None:
    class Accumulates(skorch.NeuralNetClassifier):
        def get_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().get_loss(*args, **kwargs) / 2

        def train_step(self, batch: Any, **fit_params: Any) -> Any:
            step = self.train_step_single(batch, **fit_params)
            if len(self.history[-1, "batches"]) % 2 == 0:
                self.optimizer_.step()
                self.optimizer_.zero_grad()
            return step

    recorder = recording(audit_every=1)
    net = Accumulates(
        Net, criterion=nn.CrossEntropyLoss, callbacks=[recorder], verbose=0, batch_size=10, train_split=None
    )
    assert_explained(recorder, trained(net))
    assert [len(step.batches) for step in recorder.trajectory.steps()] == [2] * 30


class TwoOptimizers(skorch.NeuralNetClassifier):
    """Each layer has an optimizer, which runs the closure of the step again."""

    def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.get_params_for_optimizer("optimizer", self.module_.body[0].named_parameters())
        self.optimizer_ = self.optimizer(*args, **kwargs)
        self.optimizer2_ = torch.optim.Adam(self.module_.body[2].parameters(), lr=0.01)
        return self


class OneBackward(TwoOptimizers):
    """Both step by one backward pass."""

    def train_step(self, batch: Any, **fit_params: Any) -> Any:
        self._zero_grad_optimizer()
        step = self.train_step_single(batch, **fit_params)
        self._step_optimizer(None)
        return step


@pytest.mark.parametrize(("kind", "steps"), [(TwoOptimizers, 6), (OneBackward, 3)])
def test_several_optimizers(kind: type, steps: int) -> None:
    recorder = recording(audit_every=1)
    options = {"criterion": nn.CrossEntropyLoss, "verbose": 0, "batch_size": 16, "max_epochs": 1}
    net = trained(kind(Net, callbacks=[recorder], **options))
    assert_explained(recorder, net)
    assert len(recorder.trajectory) == steps


def test_several_outputs_of_which_the_first_is_predicted() -> None:
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            code = torch.tanh(self.encode(x))
            return self.decode(code), code

    class AutoEncoder(skorch.NeuralNet):
        def get_loss(self, y_pred: Any, y_true: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().get_loss(y_pred[0], y_true, *args, **kwargs)

    recorder = recording(returns=0)
    net = trained(AutoEncoder(Coder, nn.MSELoss, callbacks=[recorder], verbose=0, lr=0.1, max_epochs=2), X, X)
    assert_explained(recorder, net)
    np.testing.assert_allclose(recorder.machine.predict(X), net.predict(X), atol=1e-6)


# -- other callbacks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_clipping_and_schedules(first: bool) -> None:
    recorder = recording(audit_every=1)
    others = [GradientNormClipping(0.3), LRScheduler("StepLR", step_size=1, gamma=0.5)]
    net = classifier([recorder, *others] if first else [*others, recorder], optimizer=torch.optim.SGD, lr=0.3)
    assert_explained(recorder, trained(net))
    rates = [step.hyperparameters[0]["lr"] for step in recorder.trajectory.steps()]
    assert rates == [0.3, 0.3, 0.3, 0.15, 0.15, 0.15]


def test_weights_that_callbacks_make_and_freeze_before_the_first_batch() -> None:
    recorder = recording(audit_every=1)
    others = [Initializer("body.2.weight", fn=nn.init.zeros_), Freezer("body.0.*"), Unfreezer("body.0.*", at=2)]
    net = classifier([recorder, *others], max_epochs=3)
    why = assert_explained(recorder, trained(net))
    assert not recorder.trajectory.parameters(0)["body.2.weight"].any()
    assert set(why.channels) <= {"initial", "rounding"}


def test_training_that_is_stopped_early() -> None:
    recorder = recording()
    net = trained(classifier([recorder, EarlyStopping(patience=1, threshold=1e3)], max_epochs=9))
    assert len(net.history) < 9 and len(recorder.trajectory) == 3 * len(net.history)
    assert_explained(recorder, net)


def test_training_that_is_interrupted() -> None:
    class Interrupts(Callback):
        def on_grad_computed(self, net: Any, *args: Any, **kwargs: Any) -> None:
            if len(net.history[-1, "batches"]) == 3:
                raise KeyboardInterrupt

    recorder = recording()
    net = trained(classifier([recorder, Interrupts()]))
    assert len(recorder.trajectory) == 2
    assert not net.optimizer_._optimizer_step_post_hooks and "get_iterator" not in vars(net)
    assert_explained(recorder, net)


@pytest.mark.parametrize("first", [True, False])
def test_the_best_weights_are_explained_where_the_net_goes_back_to_them(first: bool, tmp_path: Path) -> None:
    recorder = recording()
    best = Checkpoint(monitor="worse_best", dirname=str(tmp_path), load_best=True)

    class Worse(Callback):
        """Says that the second epoch is the best."""

        def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
            net.history.record("worse_best", len(net.history) == 2)

    callbacks = [Worse(), recorder, best] if first else [Worse(), best, recorder]
    net = trained(classifier(callbacks, max_epochs=4))
    assert len(recorder.trajectory) == 12
    why = assert_explained(recorder, net)
    assert len(recorder.machine.trajectory) == 6
    assert set(why.channels) <= {"initial", "rounding"}


# -- trained again ----------------------------------------------------------------------------------------------


def test_each_fit_has_its_own_record() -> None:
    recorder = recording()
    net = trained(classifier([recorder]))
    before = recorder.trajectory
    net.fit(X, Y)
    assert recorder.trajectory is not before
    assert len(recorder.trajectory) == len(before) == 6
    assert_explained(recorder, net)


@pytest.mark.parametrize("split", [None, ValidSplit(0.2)], ids=["", "another split each time"])
def test_a_net_that_is_trained_further_has_one_record(split: Any) -> None:
    recorder = recording(audit_every=1)
    net = trained(classifier([recorder], train_split=split, warm_start=True))
    steps = len(recorder.trajectory)
    net.fit(X, Y)
    net.partial_fit(X.copy(), Y.copy())
    assert len(recorder.trajectory) == 3 * steps
    assert_explained(recorder, net)


def test_other_data_begin_another_record() -> None:
    recorder = recording()
    net = trained(classifier([recorder], train_split=None))
    net.partial_fit(X[:30], Y[:30])
    assert len(recorder.trajectory) == 2 * 2
    assert assert_explained(recorder, net).shares.shape == (3, 30)


def test_samples_are_counted_over_chunks_where_data_are_not_kept() -> None:
    recorder = recording(data=None, certify=1)
    net = classifier([recorder], train_split=ValidSplit(5), max_epochs=1)
    torch.manual_seed(0)
    for start in (0, 20, 40):
        net.partial_fit(X[start : start + 20], Y[start : start + 20])
    why = assert_explained(recorder, net)
    held_out = [*range(0, 4), *range(20, 24), *range(40, 44)]
    assert why.shares.shape == (3, N)
    assert set(np.flatnonzero(why.shares[0] == 0)) == set(held_out)
    assert "residual" in net.history[-1]


def test_weights_that_were_loaded_between_begin_another_record() -> None:
    recorder = recording()
    net = trained(classifier([recorder], train_split=None, optimizer=torch.optim.SGD))
    net.module_.load_state_dict(Net().state_dict())
    net.partial_fit(X, Y)
    assert len(recorder.trajectory) == 8
    assert_explained(recorder, net)


def test_steps_that_were_not_recorded_begin_another_record() -> None:
    recorder = recording()
    net = trained(classifier([recorder], train_split=None))
    for p in net.module_.parameters():
        p.grad = torch.ones_like(p)
    net.optimizer_.step()
    net.partial_fit(X, Y)
    assert len(recorder.trajectory) == 8
    assert_explained(recorder, net)


def test_weights_that_changed_after_training_are_noticed() -> None:
    recorder = recording()
    net = trained(classifier([recorder]))
    with torch.no_grad():
        net.module_.body[0].bias += 1
    with pytest.raises(pk.errors.ModelMismatchError, match="differs by up to 1"):
        _ = recorder.machine


def test_a_callback_of_two_nets_has_the_record_of_the_last() -> None:
    recorder = recording()
    one, other = classifier([recorder]), classifier([recorder], max_epochs=3)
    trained(one)
    trained(other)
    assert_explained(recorder, other)
    one.partial_fit(X, Y)
    assert len(recorder.trajectory) == 6
    assert_explained(recorder, one)


# -- scikit-learn -----------------------------------------------------------------------------------------------


def test_two_nets_are_not_trained_at_once_with_one_callback() -> None:
    class Nested(Callback):
        def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
            if len(net.history) == 2:
                trained(classifier([recorder]))

    recorder = recording()
    net = classifier([recorder, Nested()])
    with pytest.raises(RecordingError, match=r"another net is trained with it.*A callback has one.*each of the"):
        trained(net)
    assert not net.module_._forward_hooks and not net.optimizer_._optimizer_step_post_hooks
    assert_explained(recorder, net)  # as far as it came
    trained(other := classifier([recorder]))
    assert_explained(recorder, other)


def test_two_callbacks_of_one_net() -> None:
    net = classifier([("one", recording()), ("other", recording())])
    with pytest.raises(RecordingError, match=r"has two different callbacks.*records all.*Give the net one"):
        trained(net)
    assert not {"fit_loop", "get_iterator"} & vars(net).keys()
    recorder = recording()
    trained(twice := classifier([recorder, recorder]))
    assert_explained(recorder, twice)
    assert len(recorder.trajectory) == 2 * 3


def test_ids_follow_batches_that_are_collated_in_another_order() -> None:
    found = []
    for options in ({"iterator_train__collate_fn": _largest_first}, {}):
        callback = recording()
        trained(classifier([callback], **options))
        found.append(callback.machine.explain(X[:3]).shares)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4 * abs(found[1]).max())


def _largest_first(items: list[Any]) -> Any:
    return torch.utils.data.default_collate(sorted(items, key=lambda item: -float(item[0][0])))


def test_modules_that_are_trained_beside_the_net_are_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs * self.scale, targets)

    class Taught(skorch.NeuralNetClassifier):
        def initialize_module(self) -> Any:
            super().initialize_module()
            self.teacher_ = Net()
            return self

        def get_loss(self, y_pred: Any, y_true: Any, X: Any = None, training: bool = False) -> Any:
            told = self.teacher_(X).detach()
            return super().get_loss(y_pred, y_true, X=X, training=training) + (y_pred - told).square().mean()

    class OfModule(Taught):
        def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer_ = torch.optim.SGD(self.module_.parameters(), lr=self.lr)
            return self

    with pytest.raises(RecordingError, match=r"holds parameters of `criterion_`.*training of `module_`.*make the opt"):
        trained(classifier([recording()], criterion=Scaled))
    options: dict[str, Any] = {"criterion": nn.CrossEntropyLoss, "max_epochs": 2, "verbose": 0}
    with pytest.raises(RecordingError, match="The optimizer of the Taught holds parameters of `teacher_`"):
        trained(Taught(Net, callbacks=[recording()], **options))
    recorder = recording()  # as it is advised
    net = trained(OfModule(Net, callbacks=[recorder], **options))
    assert_explained(recorder, net)


def test_clones_have_the_same_arguments_and_no_record() -> None:
    loss = nn.CrossEntropyLoss()
    recorder = recording(certify=0, audit_every=3, loss=loss, data=None)
    assert recorder.get_params() == {"certify": 0, "audit_every": 3, "loss": loss, "data": None}
    trained(classifier([recorder]))
    other = clone(recorder)
    assert other is not recorder and other.recorder is None
    params = other.get_params()
    assert isinstance(params.pop("loss"), nn.CrossEntropyLoss)
    assert params == {"certify": 0, "audit_every": 3, "data": None}


def test_parameters_are_set_by_name() -> None:
    net = classifier([pk.callbacks.SkorchRecorder], callbacks__SkorchRecorder__certify=0, max_epochs=1)
    net.set_params(callbacks__SkorchRecorder__audit_every=0)
    trained(net)
    recorder = dict(net.callbacks_)["SkorchRecorder"]
    assert recorder.get_params() == {"certify": 0, "audit_every": 0}
    assert recorder.recorder.audit_every == 0
    assert "residual" not in net.history[-1]
    with pytest.raises(InputError, match="`audit=`"):
        recorder.set_params(audit=1)


def test_cross_validation_and_grid_search() -> None:
    recorder = recording(certify=0)
    net = classifier([recorder])
    assert len(cross_val_score(net, X, Y, cv=2)) == 2
    search = GridSearchCV(net, {"lr": [0.01, 0.1], "module__hidden": [3]}, cv=2, error_score="raise")
    torch.manual_seed(0)
    search.fit(X, Y)
    best = search.best_estimator_
    own = dict(best.callbacks_)["SkorchRecorder"]
    assert_explained(own, best)
    assert (own.machine.predict(X) == search.predict(X)).all()
    with pytest.raises(TrajectoryError, match="has not seen any training yet"):
        _ = recorder.trajectory


def test_a_pipeline() -> None:
    recorder = recording()
    pipeline = Pipeline([("scale", StandardScaler()), ("net", classifier([recorder], train_split=None))])
    trained(pipeline)
    scaled = pipeline[:-1].transform(X)
    assert (recorder.machine.predict(scaled) == pipeline.predict(X)).all()
    np.testing.assert_allclose(recorder.machine.predict_proba(scaled), pipeline.predict_proba(X), atol=1e-6)
    assert recorder.machine.explain(scaled[:3]).relative_residual <= EXACT


# -- copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_holds_the_record(copied: Any) -> None:
    recorder = recording()
    net = trained(classifier([recorder]))
    other = copied(net)
    own = dict(other.callbacks_)["SkorchRecorder"]
    assert own.recorder is None
    assert_explained(own, other)
    again = dict(copied(other).callbacks_)["SkorchRecorder"]
    np.testing.assert_array_equal(again.machine(X), recorder.machine(X))
    other.partial_fit(X, Y)
    assert len(own.trajectory) == 6  # of its own training alone
    assert_explained(own, other)


def test_a_copy_of_what_cannot_be_pickled_says_so() -> None:
    recorder = recording(regularizers={"none": lambda parameters: torch.zeros(())}, certify=0)
    net = trained(classifier([recorder]))
    recorder._options = {}  # which skorch cannot pickle either
    own = pickle.loads(pickle.dumps(recorder))
    assert net is not None
    with pytest.raises(TrajectoryError, match=r"could not be copied: .*regularizers"):
        _ = own.trajectory


class Copies(Callback):
    """Copies the net at each batch."""

    def on_batch_begin(self, net: Any, **kwargs: Any) -> None:
        self.copy_ = None
        self.copy_ = copy.deepcopy(net)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def test_nets_are_copied_while_they_are_trained(tmp_path: Path) -> None:
    recorder = recording()

    copies = Copies()
    net = trained(classifier([recorder, copies, Checkpoint(monitor=None, dirname=str(tmp_path), f_pickle="net.pkl")]))
    assert_explained(recorder, net)
    own = dict(copies.copy_.callbacks_)["SkorchRecorder"]
    with pytest.raises(TrajectoryError, match="copied while it was trained"):
        _ = own.trajectory
    with open(tmp_path / "net.pkl", "rb") as file:
        other = pickle.load(file)
    other.partial_fit(X, Y)
    assert_explained(dict(other.callbacks_)["SkorchRecorder"], other)


# -- stores -----------------------------------------------------------------------------------------------------


def test_a_store_is_opened_with_the_nets_own_loss(tmp_path: Path) -> None:
    from pathkernel.callbacks.skorch_net import loss_of

    recorder = recording(store=tmp_path / "run")
    net = trained(classifier([recorder], module__last="softmax", criterion=nn.NLLLoss))
    path = pk.Trajectory.open(tmp_path / "run", model=net.module_, loss=loss_of(net), data=(X, Y))
    np.testing.assert_array_equal(pk.KernelMachine(path).predict_proba(X), recorder.machine.predict_proba(X))


def test_training_goes_on_in_the_store_from_a_checkpoint_of_skorch(tmp_path: Path) -> None:
    saved = Checkpoint(monitor=None, dirname=str(tmp_path / "saved"))
    straight = recording()
    options = {"optimizer": torch.optim.Adam, "iterator_train__shuffle": False, "train_split": None}
    torch.manual_seed(0)
    classifier([straight], max_epochs=5, **options).fit(X, Y)

    class Dies(Callback):
        def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
            if len(net.history) == 4:  # one epoch after the last checkpoint
                raise SystemExit

    torch.manual_seed(0)
    with pytest.raises(SystemExit):
        classifier([recording(store=tmp_path / "run"), saved, Dies()], max_epochs=5, **options).fit(X, Y)
    on = recording(store=tmp_path / "run")
    torch.manual_seed(7)
    net = classifier([on, skorch.callbacks.LoadInitState(saved)], max_epochs=2, **options).fit(X, Y)
    assert len(on.trajectory) == 20
    why = assert_explained(on, net)
    np.testing.assert_allclose(why.shares, straight.machine.explain(X[:3]).shares, rtol=1e-4, atol=1e-6)


def test_a_second_training_does_not_overwrite_a_store(tmp_path: Path) -> None:
    net = classifier([recording(store=tmp_path / "run")])
    trained(net)
    with pytest.raises(pk.errors.ModelMismatchError, match="nowhere on the path"):
        net.fit(X, Y)
    assert "fit_loop" not in vars(net)


# -- certificate ------------------------------------------------------------------------------------------------


def test_the_certificate_is_in_the_history() -> None:
    net = trained(classifier([recording(certify=3)]))
    last = net.history[-1]
    assert 0 < last["residual"] <= EXACT and 0 < last["split_error"] <= EXACT and last["quadrature_error"] >= 0
    assert "residual" not in net.history[-2]


def test_what_cannot_be_certified_is_said() -> None:
    with pytest.warns(UserWarning, match=r"could not be certified.*certify=0"):
        net = trained(classifier([recording(certify=2, schedule=pk.WeightsOnly())]))
    assert "residual" not in net.history[-1]


# -- refusals ---------------------------------------------------------------------------------------------------


def test_arguments_are_checked_when_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="`storage=`"):
        recording(storage="runs")
    with pytest.raises(InputError, match="`store=True`"):
        recording(store=True)
    for certify in (-1, "all", None):
        with pytest.raises(InputError, match="`certify="):
            recording(certify=certify)
    for version in ("0.15.0", "2.0"):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        with pytest.raises(MissingExtraError, match=f"skorch is of the version {version}"):
            recording()


def test_no_training_no_record() -> None:
    recorder = recording()
    with pytest.raises(TrajectoryError, match="SkorchRecorder has not seen any training yet"):
        _ = recorder.machine
    net = trained(classifier([recorder]))
    net.set_params(max_epochs=0).fit(X, Y)
    with pytest.raises(TrajectoryError, match="SkorchRecorder has not seen any training yet"):
        _ = recorder.machine  # of a net that was made anew, and not trained


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    return
