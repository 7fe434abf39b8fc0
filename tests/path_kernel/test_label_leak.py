"""Label leaks: who is warned, who is not, and what it costs those who are not concerned."""

from __future__ import annotations

import pickle
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.decomposition import KernelPCA
from sklearn.ensemble import BaggingClassifier
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import SVC, SVR, NuSVC, OneClassSVM
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import pathkernel as pk
from pathkernel.errors import InputError, LabelLeakWarning
from pathkernel.kernels import CosineKernel, RepairedKernel
from pathkernel.path_kernel import label_leak
from pathkernel.path_kernel.label_leak import LabelLeak, row_hashes, unchecked

N, CE = 12, nn.CrossEntropyLoss()
X = np.random.default_rng(0).standard_normal((N, 3))
Y = np.arange(N) % 2


class Loaded(Dataset):
    """Samples that are loaded one by one."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor(X[index], dtype=torch.float32), int(Y[index])


def train(data: Any = (X, Y), dtype: torch.dtype = torch.float32) -> pk.Trajectory:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=data) as recorder:
        for x, y in recorder.batches(6):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    return recorder.trajectory


@pytest.fixture(scope="module")
def trajectory() -> pk.Trajectory:
    return train()


@pytest.fixture
def kernel(trajectory: pk.Trajectory) -> pk.PathKernel:
    return pk.PathKernel(trajectory)


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which nobody has been warned yet."""
    monkeypatch.setattr(label_leak, "_said", [])


def warned(act: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [each for each in caught if issubclass(each.category, LabelLeakWarning)]


# -- who is warned -----------------------------------------------------------------------------------------------------

FITS = {
    "SVC": (lambda k: SVC(kernel=k), "PathKernelSVC"),
    "NuSVC": (lambda k: NuSVC(kernel=k), "PathKernelSVC"),
    "SVR": (lambda k: SVR(kernel=k), "PathKernelSVR"),
    "ridge": (
        lambda k: make_pipeline(pk.PathKernelTransformer(k), KernelRidge(kernel="precomputed")),
        "PathKernelRidge",
    ),
    "process": (lambda k: GaussianProcessRegressor(pk.GaussianProcessKernel(k), alpha=1.0), "PathKernelGP"),
    "classifying process": (
        lambda k: GaussianProcessClassifier(pk.GaussianProcessKernel(k), optimizer=None),
        "PathKernelGPClassifier",
    ),
    "components": (
        lambda k: make_pipeline(pk.PathKernelTransformer(k), KernelPCA(2, kernel="precomputed"), SVC()),
        "PathKernelSVC",
    ),
    "combination": (lambda k: SVC(kernel=CosineKernel(k) * (2.0 * k)), "PathKernelSVC"),
    "repaired": (lambda k: SVC(kernel=RepairedKernel(k, X)), "PathKernelSVC"),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_to_a_part_of_the_training_samples(name: str, kernel: pk.PathKernel) -> None:
    make, instead = FITS[name]
    (warning,) = warned(lambda: make(kernel).fit(X[:8], Y[:8]))
    assert warning.filename == __file__
    message = warning.message
    assert isinstance(message, LabelLeakWarning)
    assert "to 8 samples" in message.found and "12 in all" in message.found
    assert "cross-validation" in message.expected
    assert f"`pathkernel.{instead}`" in message.write and 'leak="allow"' in message.write


def test_cross_validation_is_warned_of_once(kernel: pk.PathKernel) -> None:
    search = GridSearchCV(SVC(kernel=kernel), {"C": [0.1, 1.0]}, cv=3)
    assert len(warned(lambda: search.fit(X, Y))) == 1
    assert not warned(lambda: cross_val_score(SVC(kernel=kernel), X, Y, cv=3))


def test_cross_validation_by_a_function(kernel: pk.PathKernel) -> None:
    (warning,) = warned(lambda: cross_val_score(SVC(kernel=kernel), X, Y, cv=3))
    assert warning.filename == __file__


def test_samples_that_are_drawn_with_replacement(kernel: pk.PathKernel) -> None:
    bag = BaggingClassifier(OwnClassifier(kernel), n_estimators=2, random_state=0)
    assert len(warned(lambda: bag.fit(X, Y))) == 1


class OwnClassifier(ClassifierMixin, BaseEstimator):
    """Somebody's own, which asks a kernel within its ``fit``."""

    def __init__(self, kernel: Any = None, steps: int = 8) -> None:
        self.kernel, self.steps = kernel, steps  # which are not those of a pipeline

    def fit(self, X: Any, y: Any) -> OwnClassifier:
        self.matrix_ = self.kernel(X)
        return self

    def predict(self, X: Any) -> Any:
        return np.zeros(len(X))


def test_an_estimator_that_nobody_knows(kernel: pk.PathKernel) -> None:
    (warning,) = warned(lambda: OwnClassifier(kernel).fit(X[:5], Y[:5]))
    assert "`OwnClassifier` is being fitted" in warning.message.found
    assert "PathKernelSVC, PathKernelRidge or KernelMachineClassifier" in warning.message.write


KINDS = {
    "arrays of double precision": X,
    "arrays of single precision": X.astype(np.float32),
    "a table": pd.DataFrame(X),
    "tensors": torch.tensor(X),
    "the negative zero": np.where(X[0, 0] == X, -0.0, X),
}


@pytest.mark.parametrize("given", KINDS)
@pytest.mark.parametrize("trained", [torch.float32, torch.float64])
def test_samples_are_known_again_in_another_type(given: str, trained: torch.dtype) -> None:
    data = np.where(X[0, 0] == X, 0.0, X) if given == "the negative zero" else X
    kernel = pk.PathKernel(train((data, Y), trained))
    assert len(warned(lambda: SVC(kernel=kernel).fit(KINDS[given][:8], Y[:8]))) == 1


def test_samples_of_a_dataset_in_memory() -> None:
    data = TensorDataset(torch.tensor(X, dtype=torch.float32), torch.tensor(Y))
    assert len(warned(lambda: SVC(kernel=pk.PathKernel(train(data))).fit(X[:8], Y[:8]))) == 1


def test_the_warning_as_an_error_stops_the_fit(kernel: pk.PathKernel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LabelLeakWarning)
        with pytest.raises(LabelLeakWarning):
            SVC(kernel=kernel).fit(X[:8], Y[:8])


# -- who is not --------------------------------------------------------------------------------------------------------

FRESH = np.random.default_rng(1).standard_normal((9, 3))


class OfLandmarks(OwnClassifier):
    """Asks for the matrix of a few of the samples that it is fitted to."""

    def fit(self, X: Any, y: Any) -> OfLandmarks:
        self.matrix_ = self.kernel(X[:4])
        return self


QUIET = {
    "landmarks": lambda k: OfLandmarks(k).fit(X, Y),
    "the whole": lambda k: SVC(kernel=k).fit(X, Y),
    "the whole in another order": lambda k: SVC(kernel=k).fit(X[::-1].copy(), Y[::-1].copy()),
    "the whole, some of it twice": lambda k: SVC(kernel=k).fit(np.vstack([X, X[:3]]), np.hstack([Y, Y[:3]])),
    "other samples": lambda k: SVC(kernel=k).fit(FRESH, Y[:9]),
    "some of them others": lambda k: SVC(kernel=k).fit(np.vstack([X[:5], FRESH]), np.hstack([Y[:5], Y[:9]])),
    "cross-validation of other samples": lambda k: cross_val_score(SVC(kernel=k), FRESH, Y[:9], cv=2),
    "predictions": lambda k: SVC(kernel=k).fit(X, Y).predict(X[:5]),
    "a matrix outside of a fit": lambda k: SVC(kernel="precomputed").fit(k(X[:8]), Y[:8]),
    "queries against a part": lambda k: pk.PathKernelTransformer(k).fit(X[:8], Y[:8]).transform(X),
    "no labels": lambda k: OneClassSVM(kernel=k).fit(X[:8]),
    "no labels in a pipeline": lambda k: make_pipeline(
        FunctionTransformer(), pk.PathKernelTransformer(k), KernelPCA(2, kernel="precomputed")
    ).fit(X[:8]),
}


@pytest.mark.parametrize("name", QUIET)
def test_nobody_else_is_warned(name: str, kernel: pk.PathKernel) -> None:
    assert not warned(lambda: QUIET[name](kernel))


def test_a_part_that_is_meant(trajectory: pk.Trajectory) -> None:
    kernel = pk.PathKernel(trajectory, leak="allow")
    for same in (kernel, pickle.loads(pickle.dumps(kernel))):
        assert not warned(lambda same=same: SVC(kernel=same).fit(X[:8], Y[:8]))


def test_a_kernel_that_was_saved_goes_on_warning(kernel: pk.PathKernel) -> None:
    same = pickle.loads(pickle.dumps(kernel))
    assert len(warned(lambda: SVC(kernel=same).fit(X[:8], Y[:8]))) == 1


def test_a_kernel_that_was_saved_before_there_was_a_warning(kernel: pk.PathKernel) -> None:
    state = kernel.__getstate__()
    del state["leak_allowed"]
    older = pk.PathKernel.__new__(pk.PathKernel)
    older.__setstate__(state)
    np.testing.assert_array_equal(older(X), kernel(X))


def test_landmarks_of_a_part_are_those_of_a_fit_to_a_part(kernel: pk.PathKernel) -> None:
    assert len(warned(lambda: OfLandmarks(kernel).fit(X[:8], Y[:8]))) == 1


def test_a_fit_to_something_else_than_samples(kernel: pk.PathKernel) -> None:
    class OfTexts(OwnClassifier):
        def fit(self, X: Any, y: Any) -> OfTexts:
            self.matrix_ = self.kernel(self.samples)
            return self

    texts, OfTexts.samples = [str(row) for row in X], X[:4]
    assert len(warned(lambda: OfTexts(kernel).fit(texts, Y))) == 1


class Unchecked(OwnClassifier):
    """Says that its matrix is no fit."""

    def fit(self, X: Any, y: Any) -> Unchecked:
        with unchecked():
            self.matrix_ = self.kernel(X)
        return self


def test_matrices_that_are_no_fit(kernel: pk.PathKernel) -> None:
    assert not warned(lambda: Unchecked(kernel).fit(X[:4], Y[:4]))
    assert len(warned(lambda: OwnClassifier(kernel).fit(X[:4], Y[:4]))) == 1  # what was asked for has ended


def test_samples_that_are_loaded_one_by_one_are_not_looked_at() -> None:
    assert not warned(lambda: SVC(kernel=pk.PathKernel(train(Loaded()))).fit(X[:8], Y[:8]))


@pytest.mark.parametrize("leak", ["silent", None, True, 1])
def test_what_is_no_choice(leak: Any, trajectory: pk.Trajectory) -> None:
    with pytest.raises(InputError) as caught:
        pk.PathKernel(trajectory, leak=leak)
    assert f"`leak={leak!r}` was given" in caught.value.found and 'leak="allow"' in caught.value.write


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_told_apart_by_any_of_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, (50, 4), generator=generator).float()
    expected = torch.unique(rows, dim=0, return_inverse=True)[1].numpy()
    whole = row_hashes(rows)
    assert np.array_equal(whole[:, None] == whole, expected[:, None] == expected)
    assert np.array_equal(row_hashes(rows.double()), whole)
    monkeypatch.setattr(label_leak, "ROWS", 7)
    assert np.array_equal(row_hashes(rows), whole)
    flags, tokens = rows > 1, rows.long()
    parts = {"a": flags.reshape(50, 2, 2), "b": tokens[:, :1]}
    of_parts = torch.unique(torch.cat([flags, tokens[:, :1]], 1), dim=0, return_inverse=True)[1].numpy()
    found = row_hashes(parts)
    assert np.array_equal(found[:, None] == found, of_parts[:, None] == of_parts)


def test_samples_are_looked_at_within_fits_alone(kernel: pk.PathKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(label_leak, "row_hashes", lambda inputs: asked.append(len(inputs)) or row_hashes(inputs))
    kernel(X[:5])
    kernel(X, X[:5])
    kernel.diagonal(X)
    assert not asked
    fitted = SVC(kernel=kernel).fit(X, Y)
    assert asked == [N, N]  # what it was trained on, and what is fitted
    fitted.predict(X[:5])
    assert asked == [N, N]
    warned(lambda: fitted.fit(X[:5], Y[:5]))
    fitted.fit(X[:5], Y[:5])
    assert asked == [N, N, 5, 5]  # of the matrix and of the fit; and once in a process is enough


def test_a_watch_costs_little_beside_the_smallest_kernel(kernel: pk.PathKernel) -> None:
    watch, inputs = LabelLeak(kernel.trajectory.data, allowed=False), torch.tensor(X, dtype=torch.float32)

    def seconds(act: Any) -> float:
        begun = time.process_time()
        for _ in range(5):
            act()
        return time.process_time() - begun

    kernel(inputs)
    turns = [(seconds(lambda: watch.check(inputs)), seconds(lambda: kernel(inputs))) for _ in range(3)]
    assert min(own for own, _ in turns) < 0.1 * min(whole for _, whole in turns)
