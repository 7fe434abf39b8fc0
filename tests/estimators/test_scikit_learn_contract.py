"""scikit-learn's own checks of an estimator: none fails, and none is expected to."""

from __future__ import annotations

import os

os.environ["SCIPY_ARRAY_API"] = "1"  # before scipy is imported; without it, checks of array types are skipped

import pytest
from sklearn.base import BaseEstimator
from sklearn.utils.estimator_checks import estimator_checks_generator

import pathkernel as pk

# Networks as small, and trainings as short, as the checks that ask for accuracy allow.
SMALL = {"hidden": (8,), "epochs": 8, "learning_rate": 0.02, "batch_size": 100}

ESTIMATORS = [
    pk.KernelMachineClassifier(**SMALL),
    pk.KernelMachineRegressor(**SMALL),
    pk.PathKernelSVC(steps=2, **SMALL),
    pk.PathKernelSVR(steps=2, **SMALL),
    pk.PathKernelRidge(steps=2, **SMALL),
    pk.PathKernelRidgeClassifier(steps=2, **SMALL),
    pk.PathKernelGP(steps=2, **SMALL),
    pk.PathKernelGPClassifier(steps=2, **SMALL),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda one: type(one).__name__)
def test_estimator_passes_every_check(estimator: BaseEstimator) -> None:
    for own, check in estimator_checks_generator(estimator, mark=None):
        check(own)
