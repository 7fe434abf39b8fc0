"""Gaussian processes under the path kernel and under an RBF kernel: likelihood of held-out samples, and calibration.

negative log-likelihood
    mean over held-out targets: the log loss of a classifier; of a regression the negative log density of the normal
    distributions that are predicted, in units of the training targets' standard deviation
expected calibration error
    mean distance of confidence and accuracy over ten bins of equal width by confidence, weighted by how many samples
    are in them (Guo et al. 2017, 1706.04599, eq. 3)
coverage
    part of the held-out targets within the central interval of 90 %; its error is the distance from 90 %
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from _scikit_learn_defaults import splits
from _scikit_learn_rows import Row, Split, measured, row
from scipy.stats import norm
from sklearn.base import clone
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.metrics import log_loss, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pathkernel as pk

INTERVAL = 0.9
BINS = 10
LIKELIHOOD, CALIBRATION = "negative log-likelihood", "expected calibration error"
COVERAGE, COVERAGE_ERROR = "coverage", "distance of coverage from 90 %"
ERRORS = {LIKELIHOOD, CALIBRATION, COVERAGE_ERROR}
"""Measures that are better where they are lower."""
DIGITS = 500
"""Training digits of a classification, whose time is N³ for each class."""


def expected_calibration_error(probabilities: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    r""":math:`\sum_b \frac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|`.

    Parameters
    ----------
    probabilities
        (n, C).
    right
        (n,), whether the most probable class is the true one.
    bins
        Of equal width, by the largest probability.
    """
    confidence = probabilities.max(axis=1)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(place, weights=right - confidence, minlength=bins)  # n_b (accuracy_b − confidence_b)
    return float(np.abs(gap).sum() / len(confidence))


def of_classifier(classifier: Any, split: Split) -> dict[str, float]:
    """Accuracy, likelihood and calibration on the held-out part."""
    _, X, _, y = split
    probabilities = classifier.predict_proba(X)
    right = classifier.classes_[probabilities.argmax(axis=1)] == y
    return {
        "accuracy": float(right.mean()),
        LIKELIHOOD: float(log_loss(y, probabilities, labels=classifier.classes_)),
        CALIBRATION: expected_calibration_error(probabilities, right),
    }


def of_regressor(regressor: Any, split: Split) -> dict[str, float]:
    """R², likelihood and coverage on the held-out part."""
    _, X, y_train, y = split
    mean, deviation = regressor.predict(X, return_std=True)
    within = np.abs(y - mean) <= norm.ppf((1 + INTERVAL) / 2) * deviation
    negative_log_density = -norm.logpdf(y, mean, deviation).mean()
    return {
        "R²": float(r2_score(y, mean)),
        LIKELIHOOD: float(negative_log_density - np.log(y_train.std())),
        COVERAGE_ERROR: float(abs(within.mean() - INTERVAL)),
        COVERAGE: float(within.mean()),
    }


def classification(quick: bool = False) -> Iterator[Row]:
    """A row for each measure on digits."""
    drawn = splits("digits", 1 if quick else 3, 60 if quick else DIGITS)
    # An amplitude of largest marginal likelihood makes one-against-rest probabilities too even: the other peer has the
    # amplitude that `PathKernelGPClassifier` has by default.
    peers = {
        "GP classifier(rbf)": GaussianProcessClassifier(ConstantKernel(10.0) * RBF(5.0)),
        "GP classifier(10 rbf)": GaussianProcessClassifier(ConstantKernel(10.0, "fixed") * RBF(5.0)),
    }
    options = {"epochs": 2} if quick else {}
    yield from _rows("digits", drawn, pk.PathKernelGPClassifier, options, peers, of_classifier)


def regression(quick: bool = False) -> Iterator[Row]:
    """A row for each measure on diabetes."""
    drawn = splits("diabetes", 1 if quick else 5, 60 if quick else None)
    rbf = ConstantKernel(1.0) * RBF(3.0) + WhiteKernel(0.5)
    peers = {"GP regressor(rbf)": GaussianProcessRegressor(rbf, normalize_y=True)}
    yield from _rows("diabetes", drawn, pk.PathKernelGP, {"epochs": 2} if quick else {}, peers, of_regressor)


def _rows(
    data: str,
    drawn: list[Split],
    kind: Callable[..., Any],
    options: dict[str, Any],
    peers: dict[str, Any],
    measure: Callable[[Any, Split], dict[str, float]],
) -> Iterator[Row]:
    fits = [measured(kind(random_state=seed, **options), split) for seed, split in enumerate(drawn)]
    seconds = [one.fit_seconds for one in fits], [one.predict_seconds for one in fits]
    own = [measure(one.estimator, split) for one, split in zip(fits, drawn, strict=True)]
    for peer, process in peers.items():
        model = make_pipeline(StandardScaler(), process)
        theirs = [measure(clone(model).fit(split[0], split[2]), split) for split in drawn]
        # Neither more nor less coverage is better: it goes with its error.
        for metric in (metric for metric in own[0] if metric != COVERAGE):
            more: dict[str, Any] = {"train": len(drawn[0][2]), "test": len(drawn[0][3])}
            if metric == COVERAGE_ERROR:
                more |= {COVERAGE: _mean(own, COVERAGE), f"peer_{COVERAGE}": _mean(theirs, COVERAGE)}
            scores = (kind.__name__, [one[metric] for one in own]), (peer, [one[metric] for one in theirs])
            better = {"lower_is_better": metric in ERRORS}
            yield row("Gaussian processes", data, metric, *scores, seconds, **better, **more)


def _mean(measures: list[dict[str, float]], name: str) -> float:
    return float(np.mean([one[name] for one in measures]))
