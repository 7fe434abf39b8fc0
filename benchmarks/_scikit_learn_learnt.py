"""Data on which a kernel that is learnt should beat one that is given: irrelevant features, and shifted digits.

Options of the estimators below were chosen on other draws of the same data (seeds from 100 on), those of the peers by
cross-validation within each training part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from _scikit_learn_peers import tuned_svc
from _scikit_learn_rows import Estimators, Row, Split, compared, made
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

import pathkernel as pk

ABOVE = 3.0
"""Points that the learnt kernel should lie above the tuned RBF kernel."""
FEATURES, SHIFT, SEEDS = 30, 2, 5


def sphere(X: np.ndarray) -> np.ndarray:
    """Whether the first three features lie outside of a sphere that holds half of all samples."""
    return ((X[:, :3] ** 2).sum(axis=1) > 2.366).astype(int)  # the median of χ² with three degrees of freedom


def product(X: np.ndarray) -> np.ndarray:
    """The sign of x₀ x₁ + x₂."""
    return (X[:, 0] * X[:, 1] + X[:, 2] > 0).astype(int)


def few_informative(rule: Callable[[np.ndarray], np.ndarray], seed: int, train: int, test: int) -> Split:
    """Normal features, of which the labels depend on three."""
    X = np.random.default_rng(seed).standard_normal((train + test, FEATURES))
    y = rule(X)
    return X[:train], X[train:], y[:train], y[train:]


def shifted_digits(seed: int, train: int, test: int) -> Split:
    """Digits moved by up to two pixels in each direction, (n, 1, 12, 12): training digits and test digits alike."""
    X, y = load_digits(return_X_y=True)
    side = 8 + 2 * SHIFT
    images = np.zeros((len(X), 1, side, side), dtype=np.float32)
    for image, digit, (down, right) in zip(
        images, X, np.random.default_rng(seed).integers(0, 2 * SHIFT + 1, (len(X), 2)), strict=True
    ):
        image[0, down : down + 8, right : right + 8] = digit.reshape(8, 8) / 16
    return tuple(train_test_split(images, y, train_size=train, test_size=test, stratify=y, random_state=seed))


def small_cnn(n_outputs: int) -> nn.Module:
    """Two convolutions, each with a maximum over 2 × 2 pixels, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 9, n_outputs),
    )


def flattened(images: np.ndarray) -> np.ndarray:
    """Images as rows of pixels."""
    return images.reshape(len(images), -1)


def irrelevant_features(quick: bool = False) -> Iterator[Row]:
    """A row for each rule and estimator; the quick ones have no limits, and prove nothing."""
    train, test = (200, 100) if quick else (1000, 1000)
    network = {"hidden": 128, "learning_rate": 3e-3, "epochs": 3 if quick else 50, "batch_size": 32}
    estimators: Estimators = {
        "PathKernelSVC": (made(pk.PathKernelSVC, **network), "SVC(rbf)", None if quick else ABOVE),
        "KernelMachineClassifier": (made(pk.KernelMachineClassifier, **network), "SVC(rbf)", None),
    }
    peers = {"SVC(rbf)": tuned_svc(FEATURES, quick)}
    for name, rule in {"x₀² + x₁² + x₂²": sphere, "x₀ x₁ + x₂": product}.items():
        splits = [few_informative(rule, seed, train, test) for seed in range(1 if quick else SEEDS)]
        data = f"{name}, 3 of {FEATURES} features"
        yield from compared("learnt kernel", data, "accuracy", splits, estimators, peers)


def shifted(quick: bool = False) -> Iterator[Row]:
    """A row for each estimator on shifted digits; the quick ones have no limits, and prove nothing."""
    train, test = (100, 50) if quick else (1000, 360)
    network = {"module": small_cnn, "learning_rate": 3e-3, "epochs": 1 if quick else 20}
    estimators: Estimators = {
        "PathKernelSVC(CNN)": (made(pk.PathKernelSVC, steps=4, **network), "SVC(rbf)", None if quick else ABOVE),
        "KernelMachineClassifier(CNN)": (made(pk.KernelMachineClassifier, **network), "SVC(rbf)", None),
    }
    splits = [shifted_digits(seed, train, test) for seed in range(1 if quick else SEEDS)]
    peers = {"SVC(rbf)": make_pipeline(FunctionTransformer(flattened), tuned_svc(splits[0][0][0].size, quick))}
    yield from compared("learnt kernel", f"digits shifted by {SHIFT} pixels", "accuracy", splits, estimators, peers)
