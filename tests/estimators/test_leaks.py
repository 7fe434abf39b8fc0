"""Cross-validation on coin flips: estimators that train their network within `fit` say chance; a kernel of all labels
says more, and warns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC
from torch import nn

import pathkernel as pk
from pathkernel.path_kernel import label_leak

SAMPLES, FEATURES = 150, 20
CHANCE = binom.ppf(0.999, SAMPLES, 0.5) / SAMPLES
"""Accuracy that coin flips exceed once in a thousand draws: 0.627. Honest scores lie rather below one half, because a
fold that holds out more of one class trains on more of the other."""
OPTIONS = {"hidden": 32, "epochs": 20, "learning_rate": 1e-2, "batch_size": 50, "random_state": 0}
ESTIMATORS = {
    "svc": lambda: pk.PathKernelSVC(**OPTIONS),
    "ridge": lambda: pk.PathKernelRidgeClassifier(**OPTIONS),
    "process": lambda: pk.PathKernelGPClassifier(**OPTIONS),
    "machine": lambda: pk.KernelMachineClassifier(**OPTIONS),
}


@pytest.fixture(scope="module")
def coin_flips() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((SAMPLES, FEATURES)), generator.integers(2, size=SAMPLES)


@pytest.fixture
def leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[warnings.WarningMessage]]:
    """Warnings of leaks, as a process hears them that has heard none."""
    monkeypatch.setattr(label_leak, "_said", [])
    with warnings.catch_warnings(record=True, category=pk.LabelLeakWarning, action="always") as caught:
        yield caught


def kernel_of_all_labels(X: np.ndarray, y: np.ndarray) -> pk.PathKernel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 2)).double()
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-2), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for _ in range(40):
            for x, target in recorder.batches(50, shuffle=True, generator=torch.Generator().manual_seed(0)):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    return pk.PathKernel(recorder.trajectory, steps=4)


def test_a_kernel_of_all_labels_scores_above_chance_and_warns(coin_flips, leaks) -> None:
    X, y = coin_flips
    score = cross_val_score(SVC(kernel=kernel_of_all_labels(X, y)), X, y, cv=3).mean()
    assert score > CHANCE
    assert [one.category for one in leaks] == [pk.LabelLeakWarning]
    assert "PathKernelSVC" in str(leaks[0].message)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_that_train_within_fit_are_at_chance_and_silent(name, coin_flips, leaks) -> None:
    X, y = coin_flips
    score = cross_val_score(ESTIMATORS[name](), X, y, cv=3).mean()
    assert score <= CHANCE
    assert not leaks
    # It is not for want of fitting: the same estimator knows the labels that it was given.
    assert ESTIMATORS[name]().fit(X, y).score(X, y) > CHANCE
