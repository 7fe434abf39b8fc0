"""Estimators that train a network inside ``fit``: what they learn, of which inputs, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.kernel_ridge import KernelRidge
from sklearn.svm import SVC
from torch import nn

import pathkernel as pk

SMALL = {"hidden": (8,), "epochs": 6, "learning_rate": 0.02, "random_state": 0}
CLASSIFIERS = [pk.KernelMachineClassifier, pk.PathKernelSVC, pk.PathKernelRidgeClassifier, pk.PathKernelGPClassifier]
REGRESSORS = [pk.KernelMachineRegressor, pk.PathKernelSVR, pk.PathKernelRidge, pk.PathKernelGP]
MACHINES = [pk.KernelMachineClassifier, pk.KernelMachineRegressor]


def named(one: Any) -> str:
    return one.__name__


@pytest.fixture(scope="module")
def wine() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_wine(return_X_y=True)
    return X[::2], y[::2]


def images(n: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    return rng.standard_normal((n, 1, 6, 6)) + y[:, None, None, None], y


def small_cnn(n_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, n_outputs))


class BagOfTokens(nn.Module):
    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 4), nn.Linear(4, n_outputs)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        found = self.table(tokens)
        return self.head(found.mean(1) if mask is None else (found * mask[..., None]).sum(1))


class Texts(torch.utils.data.Dataset):
    """Dicts of tokens and masks, which scikit-learn cannot hold."""

    def __init__(self, n: int = 24) -> None:
        self.y = np.arange(n) % 2
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 6, (n, 5), generator=generator) + 6 * torch.from_numpy(self.y)[:, None]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return {"tokens": self.tokens[place], "mask": torch.full((5,), 0.2)}


# -- kernel machines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"early_stopping": True, "n_iter_no_change": 2, "epochs": 30, "learning_rate": 0.2},
        {"class_weight": "balanced"},
        {"schedule": pk.Keyframes(4)},
        {"optimizer": "sgd"},
        {"batch_size": 7},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_a_machine_says_what_its_network_says(options: dict[str, Any], wine) -> None:
    X, y = wine
    machine = pk.KernelMachineClassifier(**{**SMALL, **options}).fit(X, y)
    difference = machine.decision_function(X) - machine.decision_function(X, exact=False)
    assert abs(difference).max() < 1e-10
    assert np.allclose(machine.predict_proba(X).sum(axis=1), 1)
    with torch.no_grad():
        outputs = machine.network_(torch.from_numpy(X)).numpy()
    assert np.allclose(outputs, machine.decision_function(X), atol=1e-10)


def test_shares_are_of_the_rows_that_were_given(wine) -> None:
    X, y = wine
    weights = np.ones(len(y))
    weights[[3, 10]] = 0
    machine = pk.KernelMachineClassifier(**SMALL).fit(X, y, sample_weight=weights)
    why = machine.explain(X[:4], outputs="all")
    assert why.shares.shape == (12, len(X))
    assert not why.shares[:, [3, 10]].any() and why.shares[:, [2, 11]].all()
    assert abs(why.shares.sum(1) + sum(why.channels.values()) - why.output).max() < 1e-10
    assert machine.certificate_["residual"] < 1e-10 and machine.certificate_["split_error"] < 1e-10
    assert machine.kernel_(X[:3]).shape == (3, 3)


@pytest.mark.parametrize("kind", MACHINES, ids=named)
def test_a_fitted_machine_keeps_samples_of_its_own(kind: Any, wine) -> None:
    X, y = wine[0].copy(), wine[1].astype(float)
    machine = kind(schedule=pk.Keyframes(3), **SMALL).fit(X, y)
    shares = machine.explain(wine[0][:2]).shares
    X[:] = 0
    y[:] = 0
    assert np.array_equal(machine.explain(wine[0][:2]).shares, shares)
    assert machine.certificate_["residual"] < 1e-10


def test_early_stopping_keeps_the_epoch_of_the_lowest_loss(wine) -> None:
    X, y = wine
    options = {**SMALL, "epochs": 60, "learning_rate": 0.3}
    machine = pk.KernelMachineClassifier(early_stopping=True, n_iter_no_change=3, **options).fit(X, y)
    curve = machine.validation_curve_
    assert machine.n_iter_ == len(curve) == len(machine.loss_curve_) < 60
    best = int(np.argmin(curve))
    steps = -(-int(0.9 * len(X)) // 64)
    assert len(machine.trajectory_) == (best + 1) * steps
    held_out = ~machine.explain(X[:1]).shares.any(axis=0)
    assert held_out.sum() == pytest.approx(0.1 * len(X), abs=1)
    with torch.no_grad():
        outputs = machine.network_(torch.from_numpy(X[held_out]))
    loss = nn.CrossEntropyLoss()(outputs, torch.from_numpy(y[held_out]))
    assert float(loss) == pytest.approx(curve[best], rel=1e-6)


def test_warm_start_goes_on_and_names_what_was_learnt_before(wine) -> None:
    X, y = wine
    machine = pk.KernelMachineClassifier(warm_start=True, **SMALL).fit(X, y)
    first, outputs = machine.loss_curve_[-1], machine.decision_function(X)
    earlier = machine.machine_
    machine.fit(X, y)
    assert machine.loss_curve_[0] < first
    assert np.allclose(machine.explain(X[:5], outputs=0).channels["initial"], outputs[:5, 0])
    assert np.array_equal(earlier.decision_function(X), outputs), "a fit changed what the one before had made"
    with pytest.raises(pk.errors.InputError, match="holds the classes"):
        machine.fit(X, np.minimum(y, 1))


@pytest.mark.parametrize("kind", MACHINES, ids=named)
def test_partial_fit_is_one_sum_over_all_calls(kind: Any, wine) -> None:
    X, y = wine
    machine = kind(**SMALL)
    for part in range(3):
        also = {"classes": [0, 1, 2]} if kind is pk.KernelMachineClassifier else {}
        machine.partial_fit(X[part::3], y[part::3], **also)
    assert machine.n_iter_ == len(machine.loss_curve_) == 3 and len(machine.trajectory_) == 3
    why = machine.explain(X[:2])
    assert why.shares.shape[1] == len(X) and why.shares.all()
    difference = machine.predict(X) - machine.predict(X, exact=False)
    assert abs(difference).max() < 1e-10
    copied = pickle.loads(pickle.dumps(machine))
    assert np.array_equal(copied.predict(X), machine.predict(X))
    copied.partial_fit(X, y)
    assert len(copied.trajectory_) == 2 and np.allclose(copied.predict(X), copied.predict(X, exact=False))


# -- path kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["mean", "cosine", None])
def test_the_solver_is_scikit_learns_on_the_path_kernel(normalization: str | None, wine) -> None:
    X, y = wine
    A, B, a = X[:60], X[60:], y[:60]
    estimator = pk.PathKernelSVC(normalization=normalization, C=2.0, **SMALL).fit(A, a)
    kernel = pk.PathKernel(estimator.trajectory_, steps=5)
    K, against = kernel(A), kernel(B, A)
    if normalization == "cosine":
        lengths = np.sqrt(K.diagonal())
        K, against = K / np.outer(lengths, lengths), against / np.outer(np.sqrt(kernel.diagonal(B)), lengths)
    elif normalization == "mean":
        mean = K.diagonal().mean()
        K, against = K / mean, against / mean
    solver = SVC(kernel="precomputed", C=2.0, tol=1e-9).fit(K, a)
    assert np.allclose(solver.decision_function(against), estimator.decision_function(B), atol=1e-6)
    assert np.array_equal(solver.support_, estimator.support_)


def test_ridge_is_scikit_learns_on_centred_targets(wine) -> None:
    X, _ = wine
    Y = X[:, :2]
    estimator = pk.PathKernelRidge(alpha=0.3, normalization=None, **SMALL).fit(X, Y)
    K = pk.PathKernel(estimator.trajectory_, steps=5)(X)
    solver = KernelRidge(alpha=0.3, kernel="precomputed").fit(K, Y - Y.mean(axis=0))
    assert np.allclose(solver.predict(K[:4]) + Y.mean(axis=0), estimator.predict(X[:4]))


def test_few_points_of_a_long_path_are_kept(wine) -> None:
    X, y = wine
    estimator = pk.PathKernelSVC(**{**SMALL, "epochs": 100, "batch_size": 32}).fit(X, y)
    assert estimator.n_iter_ == 100 and 64 <= len(estimator.trajectory_) < 128


def test_a_gaussian_process_has_standard_deviations_in_the_units_of_the_targets(wine) -> None:
    X, _ = wine
    y = 100 * X[:, 0] + 7
    process = pk.PathKernelGP(**SMALL).fit(X[:60], y[:60])
    mean, deviation = process.predict(X[60:], return_std=True)
    same, covariance = process.predict(X[60:], return_cov=True)
    assert np.allclose(mean, process.predict(X[60:])) and np.allclose(mean, same)
    assert np.allclose(np.sqrt(covariance.diagonal()), deviation)
    other = pk.PathKernelGP(**SMALL).fit(X[:60], y[:60] / 100)
    assert np.allclose(other.predict(X[60:], return_std=True)[1] * 100, deviation, rtol=1e-3)


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSIFIERS[:2], ids=named)
def test_labels_may_be_text_and_samples_a_table(kind: Any, wine) -> None:
    X, y = wine
    names = np.array(["barolo", "grignolino", "barbera"])
    plain = kind(**SMALL).fit(X, y)
    told = kind(**SMALL).fit(pd.DataFrame(X, columns=[f"f{i}" for i in range(13)]), pd.Series(names[y]))
    assert sorted(told.classes_) == sorted(names) and list(told.feature_names_in_) == [f"f{i}" for i in range(13)]
    assert np.mean(told.predict(pd.DataFrame(X, columns=told.feature_names_in_)) == names[plain.predict(X)]) > 0.9
    with pytest.raises(pk.errors.InputError, match="feature names should match"):
        told.predict(pd.DataFrame(X, columns=told.feature_names_in_[::-1]))


@pytest.mark.parametrize("kind", [pk.KernelMachineClassifier, pk.PathKernelGPClassifier], ids=named)
def test_images_go_to_a_network_of_ones_own(kind: Any) -> None:
    X, y = images()
    estimator = kind(small_cnn, **{**SMALL, "epochs": 15}).fit(X, y)
    assert estimator.score(X, y) > 0.9
    with pytest.raises(pk.errors.InputError, match="shape"):
        kind(**SMALL).fit(X, y)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *((kind, "data set") for kind in CLASSIFIERS),
        *((pk.PathKernelSVC, form) for form in ("dict", "tensor", "array", "one tensor")),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_samples_may_be_places_in_a_data_set(kind: Any, form: str) -> None:
    texts = Texts()
    data = {
        "data set": texts,
        "tensor": texts.tokens,
        "dict": {"tokens": texts.tokens, "mask": torch.full((24, 5), 0.2)},
        "array": texts.tokens.flip(0).numpy()[::-1],  # with a negative stride, which no tensor has
        "one tensor": torch.utils.data.TensorDataset(texts.tokens),
    }
    places = np.arange(24)
    estimator = kind(BagOfTokens, data=data[form], **{**SMALL, "epochs": 20}).fit(places, texts.y)
    assert estimator.score(places, texts.y) > 0.9
    assert np.array_equal(estimator.predict(places[[5, 2]]), estimator.predict(places)[[5, 2]])
    assert clone(estimator).data is data[form]
    with pytest.raises(pk.errors.InputError, match="places from 3 to 24"):
        estimator.predict(np.array([3, 24]))


def test_two_classes_have_one_logit_or_two(wine) -> None:
    X, y = wine
    own = pk.KernelMachineClassifier(**SMALL).fit(X, y > 0)
    assert own.network_[-1].out_features == 1 and own.decision_function(X).shape == (len(X),)
    network = nn.Sequential(nn.Linear(13, 2)).double()
    two = pk.KernelMachineClassifier(network, **SMALL).fit(X, y > 0)
    outputs = two.machine_.decision_function(X)
    assert np.allclose(two.decision_function(X), outputs[:, 1] - outputs[:, 0])
    for one in (own, two):
        assert np.array_equal(one.predict(X), one.classes_[one.predict_proba(X).argmax(axis=1)])


def test_integers_become_floating_point_where_the_network_takes_none() -> None:
    X, y = np.arange(40).reshape(20, 2) % 7, np.arange(20) % 2
    estimator = pk.KernelMachineClassifier(nn.Linear(2, 2), **SMALL).fit(X, y)
    assert np.allclose(estimator.decision_function(X), estimator.decision_function(X.astype(float)))
    tokens = pk.KernelMachineClassifier(BagOfTokens, **SMALL).fit(X, y)
    assert tokens.predict(X).shape == (20,)


# -- what stays as it was ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pk.KernelMachineClassifier, pk.PathKernelSVC], ids=named)
def test_the_users_network_loss_and_random_states_stay_as_they_were(kind: Any, wine) -> None:
    X, y = wine
    network = nn.Sequential(nn.Linear(13, 6), nn.Dropout(0.3), nn.ReLU(), nn.Linear(6, 3)).double()
    loss = nn.CrossEntropyLoss()
    weights = copy.deepcopy(network.state_dict())
    np.random.seed(5)
    torch.manual_seed(5)
    state, own = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = kind(network, loss=loss, **SMALL).fit(X, y, sample_weight=np.ones(len(y)))
    assert np.array_equal(state, np.random.get_state()[1]) and torch.equal(own, torch.get_rng_state())
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    assert network.training and loss.reduction == "mean" and not network[0]._forward_hooks
    torch.manual_seed(6)
    second = kind(network, loss=loss, **SMALL).fit(X, y, sample_weight=np.ones(len(y)))
    assert np.array_equal(first.decision_function(X), second.decision_function(X))


def test_callbacks_see_every_epoch_and_may_stop(wine, capsys: pytest.CaptureFixture[str]) -> None:
    X, y = wine
    seen: list[int] = []

    def stop(estimator: Any) -> bool:
        seen.append(estimator.n_iter_)
        return estimator.n_iter_ == 3

    estimator = pk.PathKernelSVC(callbacks=[stop], verbose=True, **SMALL).fit(X, y)
    assert seen == [1, 2, 3] and estimator.n_iter_ == 3
    assert capsys.readouterr().out.count("Epoch") == 3


@pytest.mark.parametrize("kind", [pk.KernelMachineClassifier, pk.PathKernelSVC], ids=named)
def test_a_fit_that_fails_changes_nothing(kind: Any, wine) -> None:
    X, y = wine
    estimator = kind(**SMALL).fit(X, y)
    before, outputs = dict(vars(estimator)), estimator.decision_function(X)

    def fail(one: Any) -> None:
        if one.n_iter_ == 2:
            raise KeyError("in the second epoch")

    with pytest.raises(KeyError, match="second epoch"):
        estimator.set_params(callbacks=[fail]).fit(X[:, :3], y > 0)
    after = {**before, "callbacks": estimator.callbacks}
    assert after.keys() == vars(estimator).keys()
    assert all(value is vars(estimator)[name] for name, value in after.items())
    assert np.array_equal(estimator.decision_function(X), outputs)


# -- refusals ---------------------------------------------------------------------------------------------------------

X, y = load_wine(return_X_y=True)
WITH_NAN, WITH_INFINITY = X.copy(), X.copy()
WITH_NAN[[3, 7], 2] = np.nan
WITH_INFINITY[5, 0] = np.inf

REFUSALS: dict[str, tuple[Any, str]] = {
    "NaN in X": (lambda: pk.PathKernelSVC().fit(WITH_NAN, y), r"Input X contains NaN.*rows do: 3, 7\."),
    "infinity in X": (lambda: pk.PathKernelSVR().fit(WITH_INFINITY, y), r"Input X contains infinity.*rows do: 5\."),
    "NaN in y": (lambda: pk.PathKernelRidge().fit(X, WITH_NAN[:, 2]), r"Input y contains NaN.*rows do: 3, 7\."),
    "no y": (lambda: pk.PathKernelSVC().fit(X, None), "requires y to be passed, but the target y is None"),
    "another length": (lambda: pk.PathKernelSVC().fit(X, y[:5]), "inconsistent numbers of samples"),
    "one class": (lambda: pk.PathKernelSVC().fit(X, 0 * y), "holds 1 class"),
    "numbers for classes": (lambda: pk.PathKernelSVC().fit(X, X[:, 0]), "Unknown label type: continuous"),
    "no weight": (lambda: pk.PathKernelSVC().fit(X, y, 0.0 * y), "weights.*zero"),
    "negative weight": (lambda: pk.PathKernelSVC().fit(X, y, y - 1.0), "[Nn]egative values"),
    "class weights": (lambda: pk.PathKernelSVC(class_weight="even").fit(X, y), "balanced"),
    "negative class weight": (
        lambda: pk.KernelMachineClassifier(class_weight={0: -1, 1: 1, 2: 1}).fit(X, y),
        "class_weight=.* not negative",
    ),
    "NaN as class weight": (
        lambda: pk.PathKernelRidgeClassifier(class_weight={0: np.nan, 1: 1, 2: 1}).fit(X, y),
        "class_weight=.* finite",
    ),
    "no class weight": (
        lambda: pk.PathKernelSVC(class_weight=dict.fromkeys(range(3), 0)).fit(X, y),
        "class_weight=.* not all of them are zero",
    ),
    "one class with a weight": (
        lambda: pk.PathKernelSVC(class_weight={0: 1, 1: 0, 2: 0}).fit(X, y),
        "holds 1 class",
    ),
    "text for numbers": (
        lambda: pk.PathKernelRidge().fit(X, np.array(["a", "b", "c"])[y]),
        "could not convert string to float",
    ),
    "several targets": (lambda: pk.PathKernelSVR().fit(X, X[:, :2]), "y should be a 1d array"),
    "C": (lambda: pk.PathKernelSVC(C=-1).fit(X, y), "'C' parameter of SVC"),
    "epsilon": (lambda: pk.PathKernelSVR(epsilon=-1).fit(X, y), "'epsilon' parameter of SVR"),
    "alpha": (lambda: pk.PathKernelRidge(alpha=-1).fit(X, y), "'alpha' parameter of KernelRidge"),
    "alpha of a classifier": (lambda: pk.PathKernelRidgeClassifier(alpha="a").fit(X, y), "'alpha' parameter"),
    "tol": (lambda: pk.PathKernelSVC(tol="small").fit(X, y), "tol='small'"),
    "callbacks": (lambda: pk.PathKernelSVC(callbacks=print).fit(X, y), "callbacks=<built-in function print>"),
    "device": (lambda: pk.PathKernelSVC(device="nowhere").fit(X, y), "device='nowhere'"),
    "random state": (lambda: pk.PathKernelSVC(random_state="a").fit(X, y), "'a' cannot be used to seed"),
    "hidden": (lambda: pk.PathKernelSVC(hidden=(8, 0)).fit(X, y), r"hidden=\(8, 0\)"),
    "epochs": (lambda: pk.PathKernelSVC(epochs=0).fit(X, y), "epochs=0"),
    "rate": (lambda: pk.PathKernelSVC(learning_rate=-1).fit(X, y), "learning_rate=-1"),
    "steps": (lambda: pk.PathKernelSVC(steps=0).fit(X, y), "steps=0"),
    "normalization": (lambda: pk.PathKernelSVC(normalization="trace").fit(X, y), "normalization='trace'"),
    "loss": (lambda: pk.PathKernelSVC(loss=nn.CrossEntropyLoss).fit(X, y), "the class CrossEntropyLoss"),
    "optimizer": (lambda: pk.PathKernelSVC(optimizer="adamm").fit(X, y), "`optimizer` is 'adamm'"),
    "module": (lambda: pk.PathKernelSVC(3).fit(X, y), "`module` is a int"),
    "factory": (lambda: pk.PathKernelSVC(lambda n_outputs: n_outputs).fit(X, y), "factory that made a int"),
    "shape": (lambda: pk.PathKernelSVC(nn.Linear(4, 3)).fit(X, y), "could not be run on samples of shape"),
    "tuple": (lambda: pk.PathKernelSVC(nn.LSTM(13, 3)).fit(X, y), "The network returned a tuple"),
    "outputs": (lambda: pk.PathKernelSVC(nn.Linear(13, 2)).fit(X, y), "2 outputs, and `y` holds 3 classes"),
    "numbers": (lambda: pk.PathKernelSVR(nn.Linear(13, 2)).fit(X, y), r"2 outputs, and `y` is of shape \(178,\)"),
    "data": (lambda: pk.PathKernelSVC(BagOfTokens, data=3).fit(np.arange(4), y[:4]), "`data` is a int"),
    "places": (lambda: pk.PathKernelSVC(BagOfTokens, data=Texts()).fit(X, y), "other numbers than places"),
    "no module": (lambda: pk.PathKernelSVC(data=Texts()).fit(np.arange(24), Texts().y), "given no `module`"),
    "no classes": (lambda: pk.KernelMachineClassifier().partial_fit(X, y), "classes must be passed on the first call"),
    "another class": (
        lambda: pk.KernelMachineClassifier().partial_fit(X, y, classes=[0, 1]),
        r"classes \[2\], which are not among",
    ),
    "other classes": (
        lambda: pk.KernelMachineClassifier(**SMALL).fit(X, y).partial_fit(X, y, classes=[0, 1]),
        "is not the same as on the last call",
    ),
    "held out": (
        lambda: pk.PathKernelSVC(early_stopping=True, validation_fraction=2.0).fit(X, y),
        "validation_fraction=2.0",
    ),
    "too few": (
        lambda: pk.PathKernelSVC(early_stopping=True).fit(X[55:62], y[55:62]),
        "of 7 samples cannot be held out",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_fitted_is_refused_in_three_parts(name: str) -> None:
    call, said = REFUSALS[name]
    with pytest.raises(pk.errors.InputError, match=said) as caught:
        call()
    assert isinstance(caught.value, ValueError) and caught.value.write
