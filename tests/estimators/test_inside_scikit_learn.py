"""Estimators inside scikit-learn's own tools: searches, pipelines, calibration, stacking, copies on disk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_wine
from sklearn.ensemble import StackingClassifier
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

import pathkernel as pk

SMALL = {"hidden": (8,), "epochs": 5, "learning_rate": 0.05, "random_state": 0}
ALL = [
    pk.KernelMachineClassifier,
    pk.KernelMachineRegressor,
    pk.PathKernelSVC,
    pk.PathKernelSVR,
    pk.PathKernelRidge,
    pk.PathKernelRidgeClassifier,
    pk.PathKernelGP,
    pk.PathKernelGPClassifier,
]
X, y = (part[::2] for part in load_wine(return_X_y=True))


@pytest.mark.slow
def test_a_search_over_a_pipeline_in_two_processes() -> None:
    pipeline = make_pipeline(MinMaxScaler().set_output(transform="pandas"), pk.PathKernelSVC(**SMALL))
    grid = {"pathkernelsvc__C": [0.1, 1.0], "pathkernelsvc__hidden": [(4,), (8,)]}
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2).fit(X, y)
    alone = GridSearchCV(pipeline, grid, cv=2).fit(X, y)
    assert np.array_equal(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
    assert search.best_score_ > 0.8


@pytest.mark.slow
def test_machines_that_other_processes_fitted_predict_here() -> None:
    # Steps between keyframes are trained once more here, with as many threads as there.
    machine = pk.KernelMachineClassifier(schedule=pk.Keyframes(4), **SMALL)
    stacked = StackingClassifier(
        [("machine", machine), ("svc", pk.PathKernelSVC(**SMALL))],
        LogisticRegression(),
        cv=2,
        n_jobs=2,
    ).fit(X, y)
    assert stacked.score(X, y) > 0.8


def test_cross_validation_trains_a_network_for_each_fold() -> None:
    trained: list[int] = []

    def note(estimator: Any) -> None:
        trained.append(len(estimator.trajectory_.data) if hasattr(estimator, "trajectory_") else 0)

    scores = cross_val_score(pk.PathKernelRidgeClassifier(callbacks=[note], **SMALL), X, y, cv=3)
    assert scores.mean() > 0.8 and len(trained) == 3 * SMALL["epochs"]


def test_probabilities_by_calibration() -> None:
    calibrated = CalibratedClassifierCV(pk.PathKernelSVC(**SMALL), cv=2).fit(X, y)
    assert np.allclose(calibrated.predict_proba(X).sum(axis=1), 1) and calibrated.score(X, y) > 0.8


def test_importance_of_features() -> None:
    noise = np.random.default_rng(0).standard_normal((len(X), 1))
    estimator = pk.PathKernelSVC(**SMALL).fit(np.hstack([X, noise]), y)
    found = permutation_importance(estimator, np.hstack([X, noise]), y, n_repeats=2, random_state=0)
    assert found.importances_mean.argmin() != 12 and abs(found.importances_mean[-1]) < found.importances_mean.max()


def test_weights_of_samples_are_routed_through_a_pipeline() -> None:
    weights = np.where(y == 0, 0.0, 1.0)
    with sklearn.config_context(enable_metadata_routing=True):
        estimator = pk.KernelMachineClassifier(**SMALL)
        estimator.set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        pipeline = make_pipeline(MinMaxScaler(), estimator).fit(X, y, sample_weight=weights)
        scores = cross_val_score(estimator, X, y, cv=2, params={"sample_weight": np.ones(len(y))})
    assert list(pipeline[-1].classes_) == [1, 2]
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("kind", ALL, ids=lambda one: one.__name__)
def test_fitted_estimators_are_saved_and_shown(kind: Any, tmp_path: Path) -> None:
    estimator = kind(**SMALL).fit(X, y)
    joblib.dump(estimator, tmp_path / "fitted.joblib")
    for copied in (pickle.loads(pickle.dumps(estimator)), joblib.load(tmp_path / "fitted.joblib")):
        assert np.array_equal(copied.predict(X), estimator.predict(X))
    again = clone(estimator)
    assert again.get_params() == estimator.get_params() and not hasattr(again, "network_")
    assert kind.__name__ in estimator._repr_html_() and "hidden=(8,)" in repr(estimator)
