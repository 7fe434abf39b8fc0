"""Peers of `scikit_learn.py`: RBF kernels, tuned by cross-validation on the training part of a split."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.compose import TransformedTargetRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC, SVR

FOLDS = 3
SCALERS = [StandardScaler(), MinMaxScaler()]
"""Of which the better one is chosen, too: digits are better off in one unit for all pixels, most tables are not."""
WIDTHS = np.array([0.1, 0.3, 1.0, 3.0, 10.0])
"""γ of exp(-γ ‖x - x'‖²), in units of one over the number of features."""


def tuned_svc(features: int, quick: bool = False) -> GridSearchCV:
    """`SVC` with an RBF kernel: scaler, C and γ by cross-validation."""
    grid = {"scaler": SCALERS, "model__C": [1.0, 10.0, 100.0], "model__gamma": WIDTHS / features}
    return _search(SVC(), grid, quick)


def tuned_svr(features: int, quick: bool = False) -> GridSearchCV:
    """`SVR` with an RBF kernel on standardised targets: scaler, C, ε and γ by cross-validation."""
    grid = {
        "scaler": SCALERS,
        "model__regressor__C": [0.3, 1.0, 3.0, 10.0],
        "model__regressor__epsilon": [0.1, 0.3],
        "model__regressor__gamma": WIDTHS / features,
    }
    return _search(TransformedTargetRegressor(SVR(), transformer=StandardScaler()), grid, quick)


def tuned_ridge(features: int, quick: bool = False) -> GridSearchCV:
    """`KernelRidge` with an RBF kernel on standardised targets: scaler, α and γ by cross-validation."""
    grid = {
        "scaler": SCALERS,
        "model__regressor__alpha": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
        "model__regressor__gamma": WIDTHS / features,
    }
    return _search(TransformedTargetRegressor(KernelRidge(kernel="rbf"), transformer=StandardScaler()), grid, quick)


def _search(model: Any, grid: dict[str, Any], quick: bool) -> GridSearchCV:
    if quick:
        grid = {name: list(values)[1:3] if "gamma" in name else list(values)[:1] for name, values in grid.items()}
    return GridSearchCV(Pipeline([("scaler", StandardScaler()), ("model", model)]), grid, cv=FOLDS)
