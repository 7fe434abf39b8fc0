"""Is a learnt kernel a better judge of whether two sets of images are of one kind? Rows for `scikit_learn.py`.

Digits 3 against digits 8, a few of each, by the permutation test of `pathkernel.analysis.two_sample_test`: under path
kernels of networks that were trained on the *other* half of the data, and under an RBF kernel on pixels whose width is
the median distance of the samples at hand. One of the networks has seen neither a 3 nor an 8.

`size` is how often 3s against other 3s are rejected at 5 %: it has to be 5 %, within the binomial error of as many
tests. `power` is how often 3s are rejected against samples of which a given share are 8s.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from _trained_path import trained
from scipy.stats import binom
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import train_test_split

import pathkernel as pk
from pathkernel.analysis import two_sample_test

LEVEL = 0.05
PAIR = (3, 8)
CASES = ((4, 1.0), (6, 1.0), (20, 0.3), (30, 0.3))
"""Samples of each set, and the share of 8s in the second."""
Gram = Callable[[np.ndarray], np.ndarray]


def path_kernel(X: np.ndarray, y: np.ndarray, epochs: int, seed: int) -> pk.kernels.Kernel:
    """The cosine of the path kernel of a multilayer perceptron that is trained here."""
    trajectory = trained(X, y, epochs, hidden=64, seed=seed)
    return pk.kernels.CosineKernel(pk.PathKernel(trajectory, steps=10, quadrature="midpoint"))


def median_rbf(distances: np.ndarray) -> np.ndarray:
    """exp(-d² / 2 h²) with h the median distance of different samples."""
    width = np.median(distances[np.triu_indices_from(distances, 1)])
    return np.exp(-(distances**2) / (2 * width**2))


def rejections(
    gram: Gram, pools: dict[int, np.ndarray], samples: int, share: float, tests: int, permutations: int, seed: int
) -> float:
    """Part of the tests that reject at `LEVEL`: 3s against 3s of which a share, as drawn, are replaced by 8s."""
    generator, first, count = np.random.default_rng(seed), np.arange(2 * samples) < samples, 0
    for test in range(tests):
        ids = generator.choice(pools[PAIR[0]], 2 * samples, replace=False)
        of_other_kind = generator.binomial(samples, share)
        ids[2 * samples - of_other_kind :] = generator.choice(pools[PAIR[1]], of_other_kind, replace=False)
        count += two_sample_test(gram(ids), first, permutations=permutations, seed=test).p_value <= LEVEL
    return count / tests


def rows(quick: bool = False, seed: int = 0) -> list[dict[str, object]]:
    """One row for each kernel and number of samples.

    Keys: `table`, `data`, `kernel`, `samples` (of each set), `share` (of 8s in the second), `size` with the interval
    from `size_low` to `size_high` in which 99 % of such counts of a 5 % test lie, `size_ok`, `power`, `tests`,
    `permutations`.
    """
    tests, permutations, epochs = (60, 99, 3) if quick else (1000, 199, 20)
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X / 16, y, test_size=0.5, random_state=seed, stratify=y)
    others = ~np.isin(y_train, PAIR)
    chosen = np.isin(y_test, PAIR)
    X_test, y_test = X_test[chosen], y_test[chosen]
    pools = {digit: np.flatnonzero(y_test == digit) for digit in PAIR}
    distances = euclidean_distances(X_test)
    grams: dict[str, Gram] = {"RBF, median distance": lambda ids: median_rbf(distances[np.ix_(ids, ids)])}
    for name, seen in (("path kernel", slice(None)), ("path kernel that saw neither", others)):
        K = path_kernel(X_train[seen], y_train[seen], epochs, seed)(X_test)
        grams[name] = lambda ids, K=K: K[np.ix_(ids, ids)]
    low, high = (float(bound) / tests for bound in binom.interval(0.99, tests, LEVEL))
    table: list[dict[str, object]] = []
    for samples, share in CASES[1:2] if quick else CASES:
        for name, gram in grams.items():
            drawn = {"tests": tests, "permutations": permutations, "seed": seed}
            size = rejections(gram, pools, samples, 0.0, **drawn)
            table.append(
                {
                    "table": "two-sample test",
                    "data": "digits 3 against 8",
                    "kernel": name,
                    "samples": samples,
                    "share": share,
                    "size": size,
                    "size_low": low,
                    "size_high": high,
                    "size_ok": low <= size <= high,
                    "power": rejections(gram, pools, samples, share, **drawn),
                    "tests": tests,
                    "permutations": permutations,
                }
            )
    return table


if __name__ == "__main__":
    for row in rows():
        print(
            f"{row['samples']:3d} of each, {row['share']:.0%} 8s  {row['kernel']:30s} size {row['size']:.3f} "
            f"(5 % is {row['size_low']:.3f} to {row['size_high']:.3f})  power {row['power']:.3f}"
        )
