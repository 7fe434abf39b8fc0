"""Kernel matrices and explicit features as transformers: scikit-learn's checks, against kernels, and refusals."""

from __future__ import annotations

import os

os.environ["SCIPY_ARRAY_API"] = "1"  # before scipy is imported; without it, checks of array types are skipped

import pickle
import warnings
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, RidgeCV, SGDClassifier
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import InputError, LabelLeakWarning
from pathkernel.estimators.features import inverse_square_root
from pathkernel.path_kernel import label_leak

N, CE = 30, nn.CrossEntropyLoss()
X = np.random.default_rng(0).standard_normal((N, 3))
Y = (X[:, 0] > 0).astype(int)
FRESH = np.random.default_rng(1).standard_normal((9, 3))
SHORT = {"hidden": (4,), "epochs": 2}


class OfAnyWidth(nn.Module):
    """A network of the moments of a row, which takes rows of any width: checks have data of several."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.stack([x.double().mean(1), x.double()[:, 0], x.double().square().mean(1)], 1))


def of_any_width() -> pk.TangentKernel:
    torch.manual_seed(0)
    return pk.TangentKernel(OfAnyWidth())


@pytest.fixture(scope="module")
def trajectory() -> pk.Trajectory:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, Y)) as recorder:
        for x, y in recorder.batches(10):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    return recorder.trajectory


@pytest.fixture(scope="module")
def kernel(trajectory: pk.Trajectory) -> pk.PathKernel:
    return pk.PathKernel(trajectory)


# -- scikit-learn's own checks -----------------------------------------------------------------------------------------

CHECKED = {
    "matrix of a given kernel": lambda: pk.PathKernelTransformer(of_any_width()),
    "matrix of a combination": lambda: pk.PathKernelTransformer(pk.kernels.CosineKernel(of_any_width()) + rbf_kernel),
    "Nyström features of a given kernel": lambda: pk.PathKernelFeatures(of_any_width(), 5),
    "projected features of a given kernel": lambda: pk.PathKernelFeatures(of_any_width(), 5, method="projection"),
    "projected features of a network": lambda: pk.PathKernelFeatures(
        pk.KernelMachineClassifier(**SHORT), 5, method="projection"
    ),
}
AT_LENGTH = {
    "matrix of a network": lambda: pk.PathKernelTransformer(pk.KernelMachineRegressor(**SHORT)),
    "matrix as it comes": pk.PathKernelTransformer,
    "features as they come": pk.PathKernelFeatures,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHECKED)
def test_every_check_is_passed(name: str) -> None:
    results = check_estimator(CHECKED[name](), on_skip=None, on_fail=None)
    assert len(results) > 40
    assert not [(each["check_name"], each["exception"]) for each in results if each["status"] != "passed"]


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AT_LENGTH)
def test_every_check_is_passed_by_more(name: str) -> None:
    results = check_estimator(AT_LENGTH[name](), on_skip=None, on_fail=None)
    assert not [(each["check_name"], each["exception"]) for each in results if each["status"] != "passed"]


# -- features ----------------------------------------------------------------------------------------------------------


def test_nystroem_features(kernel: pk.PathKernel) -> None:
    few = pk.PathKernelFeatures(kernel, 8, random_state=0).fit(X)
    chosen, phi = few.component_indices_, few.transform(FRESH)
    assert len(set(chosen)) == 8 and np.array_equal(few.components_, X[chosen])
    K = kernel(X[chosen])
    eigenvalues, vectors = np.linalg.eigh(K)
    np.testing.assert_allclose(few.normalization_, (vectors / np.sqrt(eigenvalues)) @ vectors.T, rtol=1e-6)
    right = kernel(FRESH, X[chosen]) @ np.linalg.solve(K, kernel(X[chosen], FRESH))
    np.testing.assert_allclose(phi @ phi.T, right, atol=1e-8 * np.abs(right).max())
    of_landmarks = few.transform(X[chosen])
    np.testing.assert_allclose(of_landmarks @ of_landmarks.T, K, atol=1e-9 * K.max())
    other = pk.PathKernelFeatures(kernel, 8, random_state=1).fit(X)
    assert set(other.component_indices_) != set(chosen)
    assert pk.PathKernelFeatures(kernel, 400).fit_transform(X).shape == (N, N)


def test_nystroem_features_where_the_kernel_has_few_directions() -> None:
    """In single precision, eigenvalues that are rounding are of either sign, and are left out."""
    kernel = pk.TangentKernel(nn.Linear(3, 1))
    phi = pk.PathKernelFeatures(kernel, 20, random_state=0).fit(X).transform(FRESH)
    np.testing.assert_allclose(phi @ phi.T, FRESH @ FRESH.T + 1, atol=1e-5)
    root = inverse_square_root(np.diag([4.0, 1e-3, -2e-3, 0.0]))
    np.testing.assert_allclose(root, np.diag([0.5, 0.0, 0.0, 0.0]), atol=1e-15)


@pytest.mark.parametrize("kind", ["tensor", "sparse", "gaussian"])
def test_projected_features(kind: str, kernel: pk.PathKernel) -> None:
    features = pk.PathKernelFeatures(kernel, 4096, method="projection", kind=kind, random_state=3).fit(X)
    phi, K = features.transform(FRESH), kernel(FRESH)
    assert np.array_equal(phi, kernel.features(FRESH, 4096, kind=kind, seed=features.seed_))
    assert np.linalg.norm(phi @ phi.T - K) < 0.2 * np.linalg.norm(K)
    assert not np.array_equal(clone(features).set_params(random_state=4).fit(X).transform(FRESH), phi)


def test_features_of_a_tangent_kernel() -> None:
    kernel = of_any_width()
    errors = []
    for dim in (256, 4096):
        phi = kernel.features(X, dim, seed=1)
        assert phi.shape == (N, dim) and phi.dtype == np.float64
        assert np.array_equal(phi[:4], kernel.features(X[:4], dim, seed=1))
        errors.append(np.linalg.norm(phi @ phi.T - kernel(X)) / np.linalg.norm(kernel(X)))
    assert errors[1] < errors[0] < 0.1
    with pytest.raises(InputError) as caught:
        kernel.features(X[:0])
    assert "no samples" in caught.value.found


def test_the_error_of_features_is_measured_once(trajectory: pk.Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, training_samples = [], pk.PathKernel._training_samples
    monkeypatch.setattr(
        pk.PathKernel, "_training_samples", lambda self, ids: asked.append(ids) or training_samples(self, ids)
    )
    kernel = pk.PathKernel(trajectory)
    errors = [kernel.features(FRESH, 16, seed=seed).error for seed in (0, 0, 0, 1)]
    assert errors[0] == errors[1] == errors[2] != errors[3]
    assert len(asked) == 3  # the kernel of these samples, and features under two maps


@pytest.mark.parametrize("method", ["nystroem", "projection"])
def test_linear_estimators_on_features(method: str, kernel: pk.PathKernel) -> None:
    features = pk.PathKernelFeatures(kernel, 200, method=method, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LabelLeakWarning)
        ridge = make_pipeline(features, RidgeCV(np.logspace(-8, 0, 5))).fit(X, X[:, 0])
        linear = make_pipeline(clone(features), StandardScaler(), SGDClassifier(random_state=0)).fit(X, Y)
    assert ridge.score(X, X[:, 0]) > 0.9 and linear.score(FRESH, FRESH[:, 0] > 0) > 0.8
    assert np.array_equal(pickle.loads(pickle.dumps(linear)).predict(FRESH), linear.predict(FRESH))


# -- networks that are trained in fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pk.PathKernelTransformer, pk.PathKernelFeatures])
def test_a_network_for_the_targets(make: Any) -> None:
    for estimator, y in ((pk.KernelMachineClassifier, Y), (pk.KernelMachineRegressor, X[:, 0])):
        given = make(estimator(random_state=0, **SHORT), random_state=0).fit(X, y)
        assert isinstance(given.kernel_, pk.PathKernel) and given.estimator_ is not given.kernel
        assert not hasattr(given.kernel, "kernel_")  # a clone of it was fitted
        right = pk.PathKernelTransformer(given.kernel_).fit(X).transform(FRESH)
        if make is pk.PathKernelTransformer:
            assert np.array_equal(given.transform(FRESH), right)
    assert given.estimator_.get_params()["hidden"] == (4,)


def test_a_network_where_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KernelMachineClassifier", "KernelMachineRegressor"):
        estimator = getattr(pk, name)
        monkeypatch.setattr(f"pathkernel.estimators.transformer.{name}", lambda estimator=estimator: estimator(**SHORT))
    for y, kind in (
        (Y, pk.KernelMachineClassifier),
        (np.where(Y, "yes", "no"), pk.KernelMachineClassifier),
        (X[:, 0], pk.KernelMachineRegressor),
        (X[:, :2], pk.KernelMachineRegressor),
    ):
        made = pk.PathKernelTransformer(random_state=5).fit(X, y).estimator_
        assert isinstance(made, kind) and made.random_state == 5


def test_cross_validation_does_not_leak() -> None:
    """Labels are coin flips: what is trained within the folds is at chance, and nobody is warned."""
    generator = np.random.default_rng(3)
    n = 60
    samples, flips = generator.standard_normal((n, 20)), generator.integers(2, size=n)
    network = pk.KernelMachineClassifier(hidden=(16,), epochs=20, learning_rate=0.05, batch_size=30)
    honest = make_pipeline(pk.PathKernelFeatures(network, 40, random_state=0), LogisticRegression(C=10.0))
    label_leak._said.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LabelLeakWarning)
        scores = cross_val_score(honest, samples, flips, cv=3)
    assert abs(scores.mean() - 0.5) < 3 * 0.5 / np.sqrt(n)
    once = clone(honest[0]).fit(samples, flips).kernel_
    leaking = make_pipeline(pk.PathKernelFeatures(once, 40, random_state=0), LogisticRegression(C=10.0))
    with pytest.warns(LabelLeakWarning):
        scores = cross_val_score(leaking, samples, flips, cv=3)
    assert scores.mean() > 0.5 + 3 * 0.5 / np.sqrt(n)


def test_options_of_the_network_are_searched(kernel: pk.PathKernel) -> None:
    features = pk.PathKernelFeatures(pk.KernelMachineRegressor(**SHORT), 10, random_state=0)
    grid = {"pathkernelfeatures__n_components": [5], "pathkernelfeatures__kernel__hidden": [(2,), (4,)]}
    search = GridSearchCV(make_pipeline(features, RidgeCV()), grid, cv=2).fit(X, X[:, 0])
    assert len(search.cv_results_["mean_test_score"]) == 2 and np.isfinite(search.best_score_)


# -- label leaks -------------------------------------------------------------------------------------------------------


def leaks(act: Any) -> int:
    label_leak._said.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return sum(issubclass(each.category, LabelLeakWarning) for each in caught)


@pytest.mark.parametrize("method", ["nystroem", "projection"])
def test_features_of_a_part_of_the_training_samples(method: str, kernel: pk.PathKernel) -> None:
    features = pk.PathKernelFeatures(kernel, 6, method=method, random_state=0)
    assert leaks(lambda: make_pipeline(features, RidgeCV()).fit(X[:20], Y[:20])) == 1
    assert leaks(lambda: cross_val_score(make_pipeline(features, RidgeCV()), X, Y, cv=3)) == 1
    # Landmarks are a part of the samples, and no fit to it; nor is a choice of them.
    assert leaks(lambda: make_pipeline(features, RidgeCV()).fit(X, Y)) == 0
    assert leaks(lambda: features.fit(X[:20], Y[:20]).transform(FRESH)) == 0
    mixed = pk.PathKernelFeatures(kernel + rbf_kernel, 6, random_state=0)
    assert leaks(lambda: make_pipeline(mixed, RidgeCV()).fit(X[:20], Y[:20])) == 1


# -- samples -----------------------------------------------------------------------------------------------------------


def test_columns_of_a_table_in_another_order_are_refused(kernel: pk.PathKernel) -> None:
    table = pd.DataFrame(X, columns=["a", "b", "c"])
    for make in (pk.PathKernelTransformer, pk.PathKernelFeatures):
        fitted = make(kernel).fit(table)
        assert np.array_equal(fitted.feature_names_in_, ["a", "b", "c"]) and fitted.n_features_in_ == 3
        assert np.array_equal(fitted.transform(table), fitted.transform(table[["a", "b", "c"]]))
        with pytest.raises(InputError, match="same order"):
            fitted.transform(table[["c", "b", "a"]])


def test_output_as_a_table(kernel: pk.PathKernel) -> None:
    fitted = pk.PathKernelFeatures(kernel, 4, random_state=0).set_output(transform="pandas").fit(X)
    table = fitted.transform(pd.DataFrame(FRESH, index=list("abcdefghi")))
    assert list(table.columns) == [f"pathkernelfeatures{i}" for i in range(4)] and list(table.index) == list(
        "abcdefghi"
    )
    assert list(pk.PathKernelTransformer(kernel).fit(X).get_feature_names_out())[-1] == f"pathkerneltransformer{N - 1}"


def test_a_clone_shares_the_kernel_and_what_is_fitted_can_be_saved(kernel: pk.PathKernel, tmp_path: Any) -> None:
    for transformer in (pk.PathKernelTransformer(kernel), pk.PathKernelFeatures(kernel, 5, random_state=0)):
        assert clone(transformer).kernel is kernel
        fitted = transformer.fit(X)
        joblib.dump(fitted, tmp_path / "fitted.joblib")
        for again in (pickle.loads(pickle.dumps(fitted)), joblib.load(tmp_path / "fitted.joblib")):
            assert np.array_equal(again.transform(FRESH), fitted.transform(FRESH))


def test_images_tensors_and_trees() -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 1, 5, 5)
    kernel = pk.TangentKernel(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 1)))
    for given in (images, images.numpy()):
        for transformer in (pk.PathKernelTransformer(kernel), pk.PathKernelFeatures(kernel, 4, random_state=0)):
            transformed = transformer.fit(given).transform(given[:2])
            assert transformed.shape == (2, 6 if isinstance(transformer, pk.PathKernelTransformer) else 4)
    losses = pk.TangentKernel(nn.Linear(3, 2).double(), outputs="loss", loss=CE)
    pairs = (X, Y)
    assert np.array_equal(pk.PathKernelTransformer(losses).fit(pairs).transform(pairs), losses(pairs))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "NaN": (lambda t: t.fit(np.where(X > 2, np.nan, X)), InputError, "Input X contains NaN. Of `X`, these rows do: "),
    "no samples": (lambda t: t.fit(X[:0]), InputError, r"Found array with 0 sample\(s\)"),
    "one sample": (lambda t: t.fit(X[0]), InputError, "Expected 2D array, got 1D array instead"),
    "complex": (lambda t: t.fit(X * 1j), InputError, "Complex data not supported"),
    "sparse": (lambda t: t.fit(scipy.sparse.csr_array(X)), TypeError, "dense data is required"),
    "sparse by keys": (lambda t: t.fit(scipy.sparse.dok_array(X)), TypeError, "dense data is required"),
    "words": (lambda t: t.fit(np.array([["a", "b", "c"]])), InputError, "not compatible with arrays of bytes/strings"),
    "fewer features": (lambda t: t.fit(X).transform(X[:, :2]), InputError, "X has 2 features, but"),
    "NaN to transform": (lambda t: t.fit(X).transform(X * np.nan), InputError, "Input X contains NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("make", [pk.PathKernelTransformer, pk.PathKernelFeatures])
def test_samples_that_are_refused(make: Any, name: str, kernel: pk.PathKernel) -> None:
    act, error, said = REFUSED[name]
    with pytest.raises(error, match=said):
        act(make(kernel))


@pytest.mark.parametrize("wrong", ["rbf", 3, pk.PathKernel, pk.KernelMachineClassifier], ids=["text", "3", "a", "b"])
@pytest.mark.parametrize("make", [pk.PathKernelTransformer, pk.PathKernelFeatures])
def test_what_is_no_kernel(make: Any, wrong: Any) -> None:
    with pytest.raises(InputError) as caught:
        make(wrong).fit(X, Y)
    assert f"kernel={wrong!r}" in caught.value.found and "PathKernel(trajectory)" in caught.value.write


def test_networks_that_are_not_trained() -> None:
    for make in (pk.PathKernelTransformer, pk.PathKernelFeatures):
        with pytest.raises(InputError, match="requires y to be passed, but the target y is None"):
            make().fit(X)
        with pytest.raises(InputError) as caught:
            make(KernelRidge()).fit(X, Y)
        assert "has no `kernel_` once it is fitted" in caught.value.found
        with pytest.raises(InputError, match="Unknown label type"):
            make().fit(X, [{"a": 1}] * N)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_components": 0}, "n_components=0"),
        ({"n_components": 2.5}, "n_components=2.5"),
        ({"method": "fourier"}, "method='fourier'"),
        ({"method": "projection", "kind": "dense"}, "kind='dense'"),
    ],
    ids=str,
)
def test_options_that_are_none(options: dict[str, Any], said: str, kernel: pk.PathKernel) -> None:
    with pytest.raises(InputError) as caught:
        pk.PathKernelFeatures(kernel, **options).fit(X).transform(X)
    assert said in caught.value.found and caught.value.write


def test_projections_of_what_has_no_gradients() -> None:
    with pytest.raises(InputError) as caught:
        pk.PathKernelFeatures(rbf_kernel, method="projection").fit(X)
    assert 'method="nystroem"' in caught.value.write
