"""Data of the benchmarks that choose samples: public tables, and problems that are made."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_classification
from sklearn.preprocessing import StandardScaler


def loaded(name: str) -> tuple[np.ndarray, np.ndarray]:
    load = {"digits": load_digits, "breast cancer": load_breast_cancer, "wine": load_wine}[name.split(",")[0]]
    X, y = load(return_X_y=True)
    return X / 16 if name.startswith("digits") else StandardScaler().fit_transform(X), y


def synthetic(classes: int, flips: float, weights: list[float] | None) -> tuple[np.ndarray, np.ndarray]:
    X, y = make_classification(
        3000, 20, n_informative=12, n_redundant=3, n_classes=classes, class_sep=1.5, flip_y=flips, weights=weights,
        random_state=7,
    )  # fmt: skip
    return StandardScaler().fit_transform(X), y
