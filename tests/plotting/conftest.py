"""Figures without a screen, and attributions to draw: digits with shares at random."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pytest
from sklearn.datasets import load_digits

from pathkernel.kernel_machine.attributions import Attributions

mpl.use("Agg")

SAMPLES, QUERIES = 40, 6


@pytest.fixture(autouse=True)
def figures_closed() -> Iterator[None]:
    """Close what a test drew."""
    from matplotlib import pyplot

    yield
    pyplot.close("all")


@pytest.fixture
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (40, 8, 8) and labels (40,)."""
    bunch = load_digits()
    return bunch.images[:SAMPLES], bunch.target[:SAMPLES]


@pytest.fixture
def gram(digits: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """A Gaussian kernel of the digits, (40, 40)."""
    X = digits[0].reshape(SAMPLES, -1)
    return np.exp(-((X[:, None] - X[None]) ** 2).sum(axis=-1) / 2000)


@pytest.fixture
def attributions() -> Attributions:
    """An account that closes to rounding: Σ shares + Σ channels = output."""
    generator = np.random.default_rng(0)
    shares = generator.normal(size=(QUERIES, SAMPLES))
    channels = {name: generator.normal(size=QUERIES) for name in ("initial", "weight_decay", "external")}
    return Attributions(
        shares=shares,
        channels=channels,
        output=shares.sum(axis=1) + sum(channels.values()),
        query_index=np.arange(QUERIES) + 100,
        output_index=np.array([3, 1, 4, 1, 5, -1]),
        quadrature_error=np.full(QUERIES, 1e-6),
    )
