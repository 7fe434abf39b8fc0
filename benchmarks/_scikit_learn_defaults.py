"""Estimators with their defaults on four data sets that come with scikit-learn, beside tuned RBF kernels.

Defaults were chosen on one half of each data set (`development`). Test samples are of the other half alone, whose
predictions took no part in that choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from _scikit_learn_peers import tuned_ridge, tuned_svc, tuned_svr
from _scikit_learn_rows import Estimators, Row, Split, compared, made
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.model_selection import train_test_split

import pathkernel as pk

DATA = {"digits": load_digits, "breast cancer": load_breast_cancer, "wine": load_wine, "diabetes": load_diabetes}
REGRESSIONS = ("diabetes",)
HALVES = 18
"""Seed of the halves."""
WITHIN = -1.0
"""Points that an estimator with its defaults may lie below its tuned peer."""
FIT_SECONDS, PREDICT_RATIO = 20.0, 2.0
"""Limits on digits: CPU seconds of a fit, and seconds to predict a fifth of the data over those of the fit."""


def development(y: np.ndarray, classes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the half on which defaults were chosen, and of the one that tests are drawn from."""
    return train_test_split(np.arange(len(y)), test_size=0.5, random_state=HALVES, stratify=classes)


def splits(name: str, count: int, train: int | None = None) -> list[Split]:
    """Repeated held-out splits: the test part, a fifth of all samples, is drawn from the half that chose nothing.

    Parameters
    ----------
    name
        Of the data.
    count
        How many splits.
    train
        How many of the other samples train; None for all of them.
    """
    X, y = DATA[name](return_X_y=True)
    classes = None if name in REGRESSIONS else y
    chosen_on, unseen = development(y, classes)
    drawn = []
    for seed in range(count):
        rest, test = train_test_split(
            unseen, test_size=len(y) // 5, random_state=seed, stratify=None if classes is None else y[unseen]
        )
        ids = np.concatenate([chosen_on, rest])
        if train is not None:
            strata = None if classes is None else y[ids]
            ids, _ = train_test_split(ids, train_size=train, random_state=seed, stratify=strata)
        drawn.append((X[ids], X[test], y[ids], y[test]))
    return drawn


def rows(name: str, quick: bool = False) -> Iterator[Row]:
    """A row for each estimator on data; the quick ones have no limits, and prove nothing."""
    count, train, within = (1, 120, None) if quick else (5, None, WITHIN)
    options = {"epochs": 3} if quick else {}
    drawn = splits(name, count, train)
    features = drawn[0][0].shape[1]
    if name in REGRESSIONS:
        metric = "R²"
        estimators: Estimators = {
            "PathKernelSVR": (made(pk.PathKernelSVR, **options), "SVR(rbf)", within),
            "PathKernelRidge": (made(pk.PathKernelRidge, **options), "KernelRidge(rbf)", within),
            "PathKernelGP": (made(pk.PathKernelGP, **options), "KernelRidge(rbf)", None),
            "KernelMachineRegressor": (made(pk.KernelMachineRegressor, **options), "KernelRidge(rbf)", None),
        }
        peers = {"SVR(rbf)": tuned_svr(features, quick), "KernelRidge(rbf)": tuned_ridge(features, quick)}
    else:
        metric = "accuracy"
        estimators = {
            "PathKernelSVC": (made(pk.PathKernelSVC, **options), "SVC(rbf)", within),
            "PathKernelRidgeClassifier": (made(pk.PathKernelRidgeClassifier, **options), "SVC(rbf)", within),
            "KernelMachineClassifier": (made(pk.KernelMachineClassifier, **options), "SVC(rbf)", None),
        }
        peers = {"SVC(rbf)": tuned_svc(features, quick)}
    for row in compared("defaults", name, metric, drawn, estimators, peers):
        yield _with_time(row) if name == "digits" else row


def _with_time(row: Row) -> Row:
    """A row of digits, judged by its time, too."""
    fit, predict = row["fit_seconds"], row["predict_seconds"]
    in_time = fit <= FIT_SECONDS and predict <= PREDICT_RATIO * fit
    return row | {"predict_over_fit": predict / fit, "ok": row["ok"] and in_time}
