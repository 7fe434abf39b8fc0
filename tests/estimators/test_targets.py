"""Targets and weights of estimators: weights of zero, forms of arrays, and that the user's arrays are not held."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pathkernel as pk

ONE_BATCH = {"hidden": (4,), "epochs": 3, "learning_rate": 0.02, "batch_size": 64, "random_state": 0}
WEIGHTED = [pk.KernelMachineClassifier, pk.PathKernelSVC, pk.PathKernelRidgeClassifier]
REGRESSORS = [pk.KernelMachineRegressor, pk.PathKernelSVR, pk.PathKernelRidge, pk.PathKernelGP]
MACHINES = [pk.KernelMachineClassifier, pk.KernelMachineRegressor]

RNG = np.random.default_rng(0)
LABELS = np.arange(30) % 3
X = RNG.standard_normal((30, 4)) + 2.0 * np.eye(3, 4)[LABELS]
NUMBERS = X[:, 0] - X[:, 1]


def named(one: Any) -> str:
    return one.__name__


@pytest.mark.parametrize("kind", WEIGHTED, ids=named)
def test_a_class_of_weight_zero_is_as_if_it_were_not_there(kind: Any) -> None:
    without = LABELS != 0
    ignored = kind(class_weight={0: 0, 1: 1, 2: 1}, **ONE_BATCH).fit(X, LABELS)
    removed = kind(**ONE_BATCH).fit(X[without], LABELS[without])
    assert ignored.classes_.tolist() == [1, 2]
    assert np.allclose(ignored.decision_function(X), removed.decision_function(X), rtol=0, atol=1e-8)
    assert np.array_equal(ignored.predict(X), removed.predict(X))


@pytest.mark.parametrize("kind", WEIGHTED, ids=named)
def test_classes_are_balanced_over_the_samples_with_a_weight(kind: Any) -> None:
    # More of one class than of the others among the samples that count, and the rest of another class.
    weights = np.where((LABELS == 2) & (np.arange(30) > 8), 0.0, 1.0)
    kept = weights > 0
    balanced = {"class_weight": "balanced", **ONE_BATCH}
    weighted = kind(**balanced).fit(X, LABELS, sample_weight=weights)
    removed = kind(**balanced).fit(X[kept], LABELS[kept])
    assert np.allclose(weighted.decision_function(X), removed.decision_function(X), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", REGRESSORS, ids=named)
def test_targets_may_be_reversed_read_only_or_of_another_byte_order(kind: Any) -> None:
    read_only = NUMBERS.copy()
    read_only.flags.writeable = False
    reversed_twice = NUMBERS[::-1].copy()[::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = kind(**ONE_BATCH).fit(X, NUMBERS).predict(X)
        for form in (read_only, reversed_twice, NUMBERS.astype(">f8")):
            assert np.array_equal(kind(**ONE_BATCH).fit(X, form).predict(X), expected)


@pytest.mark.parametrize("kind", WEIGHTED, ids=named)
def test_weights_of_a_loss_take_the_networks_floating_type(kind: Any) -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0]))
    single = kind(loss=loss, **ONE_BATCH).fit(X, LABELS)
    double = kind(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0]).double()), **ONE_BATCH).fit(X, LABELS)
    assert np.array_equal(single.decision_function(X), double.decision_function(X))
    assert loss.weight is not None and loss.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", WEIGHTED + REGRESSORS, ids=named)
def test_data_by_place_may_be_of_another_byte_order(kind: Any) -> None:
    y = LABELS if kind in WEIGHTED else NUMBERS
    network = nn.Linear(4, 3 if kind in WEIGHTED else 1).double()
    places = np.arange(30)
    found = [kind(network, data=data, **ONE_BATCH).fit(places, y).predict(places) for data in (X, X.astype(">f8"))]
    assert np.array_equal(*found)


@pytest.mark.parametrize("kind", MACHINES, ids=named)
@pytest.mark.parametrize("own", [False, True], ids=["perceptron", "own network"])
def test_what_happens_to_the_arrays_after_fit_changes_nothing(kind: Any, own: bool) -> None:
    samples, targets = X.copy(), (LABELS if kind is MACHINES[0] else NUMBERS).copy()
    module = nn.Linear(4, 3 if kind is MACHINES[0] else 1).double() if own else None
    machine = kind(module, **ONE_BATCH).fit(samples, targets)
    before = machine.explain(X[:3]).shares
    samples[:] = 0
    targets[:] = 0
    assert np.array_equal(machine.explain(X[:3]).shares, before)


@pytest.mark.parametrize(
    ("name", "several"),
    [("KernelMachineRegressor", True), ("PathKernelRidge", True), ("PathKernelGP", True), ("PathKernelSVR", False)],
)
def test_regressors_say_whether_they_take_several_targets(name: str, several: bool) -> None:
    # scikit-learn's checks of several targets are made of those alone that say so.
    assert getattr(pk, name)().__sklearn_tags__().target_tags.multi_output is several
