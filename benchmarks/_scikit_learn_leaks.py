"""Does cross-validation leak? Labels are coin flips, so that an honest estimate is chance.

`PathKernelSVC` and its kin train their network on the training part of each fold. The leaking use trains one network
on all labels, and cross-validates a support vector machine on its kernel: it says more than chance, and warns.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _scikit_learn_rows import Row
from scipy.stats import binom
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import SVC
from torch import nn

import pathkernel as pk

FEATURES, FOLDS = 20, 5
CONFIDENCE = 0.999
"""Of the binomial interval that a score at chance lies in, over all draws of the labels."""


def coin_flips(seed: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal features, and labels that have nothing to do with them."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((samples, FEATURES)), generator.integers(2, size=samples)


def kernel_of_all(X: np.ndarray, y: np.ndarray, epochs: int, seed: int) -> pk.PathKernel:
    """The path kernel of a network that was trained on all samples with their labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 2)).double()
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-2), nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(seed)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for _ in range(epochs):
            for x, target in recorder.batches(50, shuffle=True, generator=generator):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    return pk.PathKernel(recorder.trajectory, steps=8)


def leaking(X: np.ndarray, y: np.ndarray, epochs: int, seed: int) -> float:
    """What a grid search says of a support vector machine on `kernel_of_all`."""
    search = GridSearchCV(SVC(kernel=kernel_of_all(X, y, epochs, seed)), {"C": [0.1, 1.0, 10.0]}, cv=FOLDS)
    return float(search.fit(X, y).best_score_)


def rows(quick: bool = False) -> Iterator[Row]:
    """A row for each estimator, and for the leaking use, which comes first."""
    draws, samples, epochs = (1, 150, 40) if quick else (5, 150, 40)
    data = [coin_flips(seed, samples) for seed in range(draws)]
    low, high = (bound / (draws * samples) for bound in binom.interval(CONFIDENCE, draws * samples, 0.5))
    bounds = {"chance_low": float(low), "chance_high": float(high), "draws": draws, "samples": samples}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score, seconds = _mean_score(lambda X, y, seed: leaking(X, y, epochs, seed), data)
    warned = sum(issubclass(one.category, pk.LabelLeakWarning) for one in caught)
    ok = score > high and warned == 1  # once per process
    yield _row("SVC(PathKernel of all labels), leaking", score, seconds, warnings=warned, ok=ok, **bounds)

    own = {"hidden": 32, "epochs": epochs, "learning_rate": 1e-2, "batch_size": 50}
    kinds = (pk.PathKernelSVC, pk.PathKernelRidgeClassifier, pk.PathKernelGPClassifier, pk.KernelMachineClassifier)
    for kind in kinds[:1] if quick else kinds:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            score, seconds = _mean_score(_cross_validated(kind, own), data)
        warned = sum(issubclass(one.category, pk.LabelLeakWarning) for one in caught)
        # Folds that hold out more of one class train on more of the other: honest scores lie rather below one half.
        yield _row(kind.__name__, score, seconds, warnings=warned, ok=score <= high and not warned, **bounds)


def _cross_validated(kind: Callable[..., Any], options: dict[str, Any]) -> Callable[..., float]:
    return lambda X, y, seed: float(cross_val_score(kind(random_state=seed, **options), X, y, cv=FOLDS).mean())


def _mean_score(score: Callable[..., float], data: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Mean over draws of the labels, and CPU seconds of one."""
    start = time.process_time()
    mean = float(np.mean([score(X, y, seed) for seed, (X, y) in enumerate(data)]))
    return mean, (time.process_time() - start) / len(data)


def _row(estimator: str, score: float, seconds: float, **more: Any) -> Row:
    return {
        "table": "coin flips",
        "estimator": estimator,
        "data": "labels are coin flips",
        "metric": "accuracy, cross-validated",
        "score": score,
        "peer": "chance",
        "peer_score": 0.5,
        "points": 100 * (score - 0.5),
        "fit_seconds": seconds,
        "predict_seconds": None,
        **more,
    }
