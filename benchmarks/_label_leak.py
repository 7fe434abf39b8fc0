"""Who is warned of a label leak, how often wrongly, and what looking out for it costs? Rows for `scikit_learn.py`.

A path kernel is made from all training samples, and used in ways that leak their labels and in ways that do not, each
with several random choices; `warned` is in how many of them `LabelLeakWarning` came (told anew for each: a process
hears of it once). A part that is meant is fitted, and judged by samples that training never saw: nothing leaks, and the
warning is a false alarm, which `leak="allow"` ends.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _trained_path import trained
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC, OneClassSVM

import pathkernel as pk
from pathkernel.path_kernel import label_leak


class PlainNystroem(TransformerMixin, BaseEstimator):
    """Nyström features as a user writes them, who asks the kernel for the matrix of landmarks within ``fit``."""

    def __init__(self, kernel: Any, landmarks: int) -> None:
        self.kernel, self.landmarks = kernel, landmarks

    def fit(self, X: np.ndarray, y: Any = None) -> PlainNystroem:
        self.chosen_ = X[: self.landmarks]
        self.inverse_ = np.linalg.pinv(np.linalg.cholesky(self.kernel(self.chosen_) + 1e-6 * np.eye(self.landmarks)))
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        return self.kernel(X, self.chosen_) @ self.inverse_.T


def is_warned(act: Callable[[], object]) -> bool:
    """Whether the warning comes in a process that has not heard of it yet."""
    label_leak._said.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return any(issubclass(each.category, pk.LabelLeakWarning) for each in caught)


def by_hand(kernel: Any, X: np.ndarray, y: np.ndarray, seed: int) -> None:
    for part, rest in KFold(3, shuffle=True, random_state=seed).split(X):
        SVC(kernel=kernel).fit(X[part], y[part]).score(X[rest], y[rest])


Use = Callable[[Any, np.ndarray, np.ndarray, np.random.Generator], object]
LEAKING: dict[str, Use] = {
    "cross_val_score": lambda k, X, y, g: cross_val_score(SVC(kernel=k), X, y, cv=3),
    "GridSearchCV": lambda k, X, y, g: GridSearchCV(SVC(kernel=k), {"C": [1.0, 10.0]}, cv=3).fit(X, y),
    "folds by hand": lambda k, X, y, g: by_hand(k, X, y, int(g.integers(1000))),
    "cross_val_score of PathKernelFeatures": lambda k, X, y, g: cross_val_score(
        make_pipeline(pk.PathKernelFeatures(k, 20, random_state=int(g.integers(1000))), RidgeClassifier()), X, y, cv=3
    ),
}
HONEST: dict[str, Use] = {
    "fit to all samples": lambda k, X, y, g: SVC(kernel=k).fit(X, y).predict(X[:20]),
    "PathKernelFeatures (Nyström) of all samples": lambda k, X, y, g: make_pipeline(
        pk.PathKernelFeatures(k, 20, random_state=int(g.integers(1000))), RidgeClassifier()
    ).fit(X, y),
    "features by landmarks, then a fit": lambda k, X, y, g: RidgeClassifier().fit(
        PlainNystroem(k, 20).fit(X).transform(X), y
    ),
    "novelty detection on a part": lambda k, X, y, g: OneClassSVM(kernel=k).fit(X[y == int(g.integers(10))]),
    "a Nyström transformer of one's own, in a pipeline": lambda k, X, y, g: make_pipeline(
        PlainNystroem(k, 20), RidgeClassifier()
    ).fit(X, y),
    "fit to a part that is meant": lambda k, X, y, g: SVC(kernel=k).fit(*some(X, y, g)),
}


def some(X: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    ids = generator.permutation(len(X))[: len(X) // 2]
    return X[ids], y[ids]


def rows(quick: bool = False, seed: int = 0) -> list[dict[str, object]]:
    """One row for each use, and one for the cost.

    Keys: `table`, `use`, `leaks`, `leak` (the argument), `warned` of `trials`; of the cost: `samples`, `features`,
    `hash_seconds` of all rows, `kernel_seconds` of their matrix, `share`.
    """
    n, trials, epochs = (200, 2, 2) if quick else (600, 20, 5)
    X, y = load_digits(return_X_y=True)
    X, y = X[:n] / 16, y[:n]
    trajectory, table = trained(X, y, epochs, hidden=32), []
    for leak in ("warn", "allow"):
        kernel = pk.PathKernel(trajectory, steps=2, quadrature="midpoint", leak=leak)
        for leaks, uses in ((True, LEAKING), (False, HONEST)):
            for use, act in uses.items():
                draws = [np.random.default_rng([seed, trial]) for trial in range(trials)]
                found = sum(is_warned(lambda act=act, g=g, k=kernel: act(k, X, y, g)) for g in draws)
                table.append(
                    {
                        "table": "label leak",
                        "use": use,
                        "leaks": leaks,
                        "leak": leak,
                        "warned": found,
                        "trials": trials,
                    }
                )
    kernel, inputs = pk.PathKernel(trajectory, steps=2, quadrature="midpoint"), torch.tensor(X)
    kernel(X)
    # In turns, the smaller of each.
    turns = [(_seconds(lambda: label_leak.row_hashes(inputs)), _seconds(lambda: kernel(X))) for _ in range(3)]
    hashing, computing = (min(times) for times in zip(*turns, strict=True))
    table.append(
        {
            "table": "cost of looking out for a label leak",
            "samples": n,
            "features": X.shape[1],
            "hash_seconds": hashing,
            "kernel_seconds": computing,
            "share": 2 * hashing / computing,  # of what was trained on and of what is fitted
        }
    )
    return table


def _seconds(act: Callable[[], object]) -> float:
    begun = time.process_time()
    act()
    return time.process_time() - begun


if __name__ == "__main__":
    for row in rows():
        print(", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
