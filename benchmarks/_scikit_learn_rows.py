"""Rows of `scikit_learn.py`: an estimator beside its peer on the same splits, measured alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.metrics import accuracy_score, r2_score

Row = dict[str, Any]
"""Flat: text, numbers, or None."""
Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""X_train, X_test, y_train, y_test."""
Estimators = dict[str, tuple[Callable[[int], Any], str, float | None]]
"""By name: made of the number of a split, the name of the peer, and the limit in points, if there is one."""


@dataclass(frozen=True)
class Measured:
    """One fit: the fitted estimator, its score on held-out samples, and CPU seconds."""

    estimator: Any
    score: float
    fit_seconds: float
    predict_seconds: float


def measured(estimator: Any, split: Split) -> Measured:
    """Fit on one part of a split, predict the other: accuracy, or R² of a regression.

    Seconds are those of the process with one thread, which do not depend on what else the machine does.
    """
    X_train, X_test, y_train, y_test = split
    start = time.process_time()
    estimator.fit(X_train, y_train)
    fitted = time.process_time()
    predicted = estimator.predict(X_test)
    predict_seconds = time.process_time() - fitted
    score = (accuracy_score if is_classifier(estimator) else r2_score)(y_test, predicted)
    return Measured(estimator, float(score), fitted - start, predict_seconds)


def row(
    table: str,
    data: str,
    metric: str,
    estimator: tuple[str, Sequence[float]],
    peer: tuple[str, Sequence[float]],
    seconds: tuple[Sequence[float], Sequence[float]] | None = None,
    at_least: float | None = None,
    lower_is_better: bool = False,
    **more: Any,
) -> Row:
    """Means over the splits, and the paired difference in points: hundredths, positive where the estimator is better.

    Parameters
    ----------
    table, data, metric
        What was measured, on which data.
    estimator, peer
        Names, and scores on the same splits.
    seconds
        Of fitting and predicting, (fit, predict) by split.
    at_least
        Limit of the mean difference in points, where there is one.
    lower_is_better
        Of an error, whose points are positive where it is smaller than the peer's.
    **more
        Further flat keys.
    """
    better = np.subtract(estimator[1], peer[1]) * (-100.0 if lower_is_better else 100.0)
    fit, predict = (None, None) if seconds is None else (float(np.mean(part)) for part in seconds)
    ok = True if at_least is None else bool(better.mean() >= at_least)
    return {
        "table": table,
        "estimator": estimator[0],
        "data": data,
        "metric": metric,
        "lower_is_better": lower_is_better,
        "score": float(np.mean(estimator[1])),
        "peer": peer[0],
        "peer_score": float(np.mean(peer[1])),
        "points": float(better.mean()),
        "points_error": float(better.std(ddof=1) / np.sqrt(len(better))) if len(better) > 1 else None,
        "splits": len(better),
        "fit_seconds": fit,
        "predict_seconds": predict,
        "at_least": at_least,
        "ok": ok,
        **more,
    }


def made(kind: Callable[..., Any], **options: Any) -> Callable[[int], Any]:
    """The estimator for a split, whose number is its seed."""
    return lambda seed: kind(random_state=seed, **options)


def compared(
    table: str,
    data: str,
    metric: str,
    splits: Sequence[Split],
    estimators: Estimators,
    peers: dict[str, Any],
) -> Iterator[Row]:
    """One row for each estimator on data: all of them, and their peers, on every split.

    Parameters
    ----------
    splits
        The same for all.
    estimators
        By name.
    peers
        By name: estimators of scikit-learn, which are tuned on the training part of each split alone.
    """
    scores = {name: [measured(clone(peer), split).score for split in splits] for name, peer in peers.items()}
    sizes = {"train": len(splits[0][2]), "test": len(splits[0][3])}
    for name, (make, peer, at_least) in estimators.items():
        found = [measured(make(number), split) for number, split in enumerate(splits)]
        own = name, [one.score for one in found]
        seconds = [one.fit_seconds for one in found], [one.predict_seconds for one in found]
        yield row(table, data, metric, own, (peer, scores[peer]), seconds, at_least, **sizes)
