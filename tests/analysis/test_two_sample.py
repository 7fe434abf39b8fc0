"""The kernel two-sample test: its statistic against the definition, its size, its power, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics.pairwise import rbf_kernel

from pathkernel.analysis import two_sample
from pathkernel.analysis.two_sample import TwoSampleTest, mmd_squared, two_sample_test
from pathkernel.errors import PathKernelError


def plain(K: np.ndarray, first: np.ndarray) -> float:
    """Gretton et al. 2012, equation 3, sum by sum."""
    x, y = np.flatnonzero(first), np.flatnonzero(~first)
    m, n = len(x), len(y)
    within = [sum(K[i, j] for i in part for j in part if i != j) / (len(part) * (len(part) - 1)) for part in (x, y)]
    return sum(within) - 2 * sum(K[i, j] for i in x for j in y) / (m * n)


def drawn(m: int, n: int, shift: float = 0.0, seed: Any = 0) -> tuple[np.ndarray, np.ndarray]:
    """The matrix of two sets of normal numbers, and which are of the first."""
    generator = np.random.default_rng(seed)
    X = generator.standard_normal((m + n, 2))
    X[m:, 0] += shift
    return rbf_kernel(X, gamma=0.5), np.arange(m + n) < m


def test_the_statistic_is_that_of_the_definition() -> None:
    K, first = drawn(5, 8)
    mixed = np.random.default_rng(1).permutation(13)
    assert mmd_squared(K, first) == pytest.approx(plain(K, first), rel=1e-12)
    assert mmd_squared(K[np.ix_(mixed, mixed)], first[mixed]) == pytest.approx(plain(K, first), rel=1e-12)
    assert mmd_squared(K, ~first) == pytest.approx(plain(K, first), rel=1e-12)
    # The diagonal and a constant part of the kernel say nothing about a difference of means.
    assert mmd_squared(K + 3.0 + np.diag(np.arange(13.0)), first) == pytest.approx(plain(K, first), rel=1e-10)


def test_its_mean_is_the_squared_distance_of_the_means() -> None:
    """Over all divisions of a linear kernel on numbers that are drawn from known distributions."""
    estimates = []
    for seed in range(800):
        generator = np.random.default_rng(seed)
        x = np.concatenate([generator.standard_normal(4), 0.8 + generator.standard_normal(3)])
        estimates.append(mmd_squared(np.outer(x, x), np.arange(7) < 4))
    deviation = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - 0.8**2) < 3 * deviation


def test_random_divisions_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    K, first = drawn(3, 4)
    all_divisions = [np.isin(np.arange(7), chosen) for chosen in itertools.combinations(range(7), 3)]
    possible = np.sort([plain(K, division) for division in all_divisions])
    test = two_sample_test(K, first, permutations=400)
    nearest = possible[np.abs(possible[:, None] - test.null).argmin(axis=0)]
    np.testing.assert_allclose(test.null, nearest, atol=1e-13)
    drawn_often = np.unique(nearest, return_counts=True)[1]
    assert len(drawn_often) == 35 and drawn_often.max() < 3 * 400 / 35
    # The p-value of all divisions is what the random ones are a sample of.
    exact = np.mean(possible >= plain(K, first) - 1e-12)
    assert abs(test.p_value - exact) < 4 * np.sqrt(exact * (1 - exact) / 400) + 1 / 400
    monkeypatch.setattr(two_sample, "COLUMNS", 64)
    again = two_sample_test(K, first, permutations=400)
    assert again.null.shape == (400,) and np.isin(np.round(again.null, 12), np.round(possible, 12)).all()


def test_the_size_at_five_percent_is_five_percent() -> None:
    """Of tests of one distribution, 5 % reject at 5 %, and 20 % at 20 %, within the error of counting them."""
    p = np.array([two_sample_test(*drawn(6, 9, seed=[7, s]), permutations=99, seed=s).p_value for s in range(500)])
    for level in (0.05, 0.2):
        low, high = binom.interval(0.997, len(p), level)
        assert low <= (p <= level + 1e-9).sum() <= high
    assert p.min() >= 1 / 100


def test_it_finds_a_difference() -> None:
    def rejections(shift: float) -> int:
        tests = (two_sample_test(*drawn(15, 15, shift, seed=[9, s]), permutations=99, seed=s) for s in range(60))
        return sum(test.p_value <= 0.05 for test in tests)

    assert rejections(2.0) > 55 > rejections(0.7) > rejections(0.0)


def test_the_same_seed_gives_the_same_result() -> None:
    K, first = drawn(5, 5, 1.0)
    state = np.random.get_state()[1].copy()
    one, other = (two_sample_test(K, first, seed=3) for _ in range(2))
    assert np.array_equal(one.null, other.null) and one.p_value == other.p_value
    assert not np.array_equal(one.null, two_sample_test(K, first, seed=4).null)
    assert np.array_equal(np.random.get_state()[1], state)
    assert isinstance(one, TwoSampleTest) and str(one) == f"MMD² = {one.statistic:.4g}, p = {one.p_value:.3g} (999 " \
        "permutations)"  # fmt: skip


K, FIRST = drawn(3, 3)
REFUSALS: dict[str, tuple[Any, str]] = {
    "no matrix": (lambda: two_sample_test(K[:3], FIRST), "Pass K = kernel(X, X)"),
    "NaN": (lambda: mmd_squared(np.full((6, 6), np.nan), FIRST), "leave its row and column out"),
    "as many as the first set": (lambda: two_sample_test(K, FIRST[:3]), "numpy.arange(len(K)) < m"),
    "numbers": (lambda: mmd_squared(K, FIRST.astype(int)), "numpy.arange(len(K)) < m"),
    "one sample": (lambda: two_sample_test(K, np.arange(6) < 1), "Pass more samples"),
    "one set": (lambda: mmd_squared(K, np.ones(6, bool)), "Pass more samples"),
    "no permutations": (lambda: two_sample_test(K, FIRST, permutations=0), "permutations=999"),
    "half a permutation": (lambda: two_sample_test(K, FIRST, permutations=9.5), "permutations=999"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name: str) -> None:
    act, write = REFUSALS[name]
    with pytest.raises(PathKernelError) as caught:
        act()
    assert write in caught.value.write
