"""Kernels as objects: combinations against numpy, inside scikit-learn, saved, and what they refuse."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cases import Recording, record
from sklearn.base import clone
from sklearn.cluster import DBSCAN, SpectralClustering
from sklearn.decomposition import KernelPCA
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.manifold import TSNE
from sklearn.metrics.pairwise import cosine_similarity, rbf_kernel, sigmoid_kernel
from sklearn.preprocessing import KernelCenterer
from sklearn.svm import SVC, SVR, OneClassSVM

import pathkernel as pk
from pathkernel.errors import InputError
from pathkernel.kernels import (
    CenteredKernel,
    CosineKernel,
    Kernel,
    ProductKernel,
    RepairedKernel,
    ScaledKernel,
    SumKernel,
    distance,
)
from pathkernel.kernels.kernel import BLOCK


def sigmoid(X: np.ndarray, Y: np.ndarray | None = None) -> np.ndarray:
    """Symmetric, and not positive semi-definite."""
    return sigmoid_kernel(X, Y, gamma=1.0, coef0=-1.0)


@pytest.fixture(scope="module")
def run() -> Recording:
    return record()


@pytest.fixture(scope="module")
def path(run: Recording) -> pk.PathKernel:
    return pk.PathKernel(run.trajectory, steps=2, leak="allow")


@pytest.fixture(scope="module")
def tangent(run: Recording) -> pk.TangentKernel:
    return pk.TangentKernel(run.model)


@pytest.fixture(scope="module")
def samples(run: Recording) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((14, 4)), generator.standard_normal((5, 4))


def centred(K: np.ndarray, K_xz: np.ndarray, K_yz: np.ndarray, K_zz: np.ndarray) -> np.ndarray:
    """⟨φ(x) − mean φ, φ(y) − mean φ⟩, multiplied out."""
    return K - K_xz.mean(1)[:, None] - K_yz.mean(1)[None, :] + K_zz.mean()


COMBINATIONS: dict[str, Any] = {
    "sum": (lambda k, m, X: k + m, lambda K, L: K + L),
    "sum with a function": (lambda k, m, X: rbf_kernel + k, None),
    "product": (lambda k, m, X: k * m, lambda K, L: K * L),
    "scaled": (lambda k, m, X: 2.5 * k, lambda K, L: 2.5 * K),
    "scaled from behind": (lambda k, m, X: k * np.float32(0.5), lambda K, L: 0.5 * K),
    "polynomial": (lambda k, m, X: 0.5 * k * k + m, lambda K, L: 0.5 * K**2 + L),
    "three": (lambda k, m, X: SumKernel(k, m, k), lambda K, L: 2 * K + L),
    "cosine": (lambda k, m, X: CosineKernel(k), None),
    "centred": (lambda k, m, X: CenteredKernel(k, X), None),
    "repaired": (lambda k, m, X: RepairedKernel(sigmoid, X), None),
}


@pytest.fixture(params=COMBINATIONS)
def combined(request: pytest.FixtureRequest, path: Any, tangent: Any, samples: Any) -> Kernel:
    return COMBINATIONS[request.param][0](path, tangent, samples[0])


@pytest.mark.parametrize("name", [name for name, (_, plain) in COMBINATIONS.items() if plain])
def test_values_against_numpy(name: str, path: Any, tangent: Any, samples: Any) -> None:
    X, Y = samples
    make, plain = COMBINATIONS[name]
    kernel = make(path, tangent, X)
    np.testing.assert_allclose(kernel(X), plain(path(X), tangent(X)), rtol=1e-14)
    np.testing.assert_allclose(kernel(X, Y), plain(path(X, Y), tangent(X, Y)), rtol=1e-14)
    np.testing.assert_allclose(kernel.diagonal(X), plain(path.diagonal(X), tangent.diagonal(X)), rtol=1e-14)


def test_a_sum_with_a_function_of_scikit_learn(path: pk.PathKernel, samples: Any) -> None:
    X, Y = samples
    for kernel in (path + rbf_kernel, rbf_kernel + path):
        np.testing.assert_allclose(kernel(X, Y), path(X, Y) + rbf_kernel(X, Y), rtol=1e-14)
        np.testing.assert_allclose(kernel.diagonal(X), path.diagonal(X) + 1.0, rtol=1e-14)
    with_covariance = path * (RBF(2.0) + WhiteKernel(0.5))  # scikit-learn's own, which call their diagonal diag
    np.testing.assert_allclose(with_covariance.diagonal(X), path.diagonal(X) * 1.5, rtol=1e-14)
    np.testing.assert_allclose(with_covariance(X).diagonal(), with_covariance.diagonal(X), rtol=1e-12)
    np.testing.assert_allclose((rbf_kernel * path)(X, Y), path(X, Y) * rbf_kernel(X, Y), rtol=1e-14)


def test_the_diagonal_of_a_function_is_taken_in_blocks(path: pk.PathKernel) -> None:
    asked = []

    def linear(X: np.ndarray, Y: np.ndarray | None = None) -> np.ndarray:
        asked.append(len(X))
        return X @ (X if Y is None else Y).T

    X = np.random.default_rng(0).standard_normal((2 * BLOCK + 3, 4))
    np.testing.assert_allclose(ScaledKernel(linear, 2.0).diagonal(X), 2.0 * (X**2).sum(1), rtol=1e-13)
    assert asked == [BLOCK, BLOCK, 3]
    assert ScaledKernel(linear, 2.0).diagonal(X[:0]).shape == (0,)


def test_cosine_normalisation(path: pk.PathKernel, samples: Any) -> None:
    X, Y = samples
    kernel = CosineKernel(path)
    K, rows, columns = path(X, Y), path.diagonal(X), path.diagonal(Y)
    np.testing.assert_allclose(kernel(X, Y), K / np.sqrt(np.outer(rows, columns)), rtol=1e-13)
    np.testing.assert_allclose(kernel(X), path(X) / np.sqrt(np.outer(rows, rows)), rtol=1e-12)
    assert np.array_equal(kernel(X).diagonal(), np.ones(len(X))) and np.array_equal(kernel.diagonal(X), np.ones(len(X)))

    def linear(X: np.ndarray, Y: np.ndarray | None = None) -> np.ndarray:
        return X @ (X if Y is None else Y).T

    with_nothing = np.vstack([X, np.zeros(4)])
    of_vectors = CosineKernel(linear)
    np.testing.assert_allclose(of_vectors(with_nothing), cosine_similarity(with_nothing), atol=1e-14)
    np.testing.assert_allclose(of_vectors(with_nothing, Y), cosine_similarity(with_nothing, Y), atol=1e-14)
    assert of_vectors.diagonal(with_nothing)[-1] == 0


def test_centring(path: pk.PathKernel, samples: Any) -> None:
    X, Y = samples
    kernel, K = CenteredKernel(path, X), path(X)
    size = np.abs(K).max()
    np.testing.assert_allclose(kernel(X), KernelCenterer().fit_transform(K.copy()), atol=1e-13 * size)
    right = centred(path(Y, X), path(Y, X), K, K)
    np.testing.assert_allclose(kernel(Y, X), right, atol=1e-13 * size)
    np.testing.assert_allclose(kernel(Y, X), KernelCenterer().fit(K).transform(path(Y, X)), atol=1e-13 * size)
    np.testing.assert_allclose(kernel.diagonal(Y), kernel(Y).diagonal(), atol=1e-13 * size)
    np.testing.assert_allclose(kernel(X).mean(axis=0), 0, atol=1e-13 * size)
    buffer = X.copy()
    of_buffer = CenteredKernel(path, buffer)
    buffer *= 2
    assert np.array_equal(of_buffer(Y), kernel(Y))


def test_repair(samples: Any) -> None:
    X, Y = samples
    K = sigmoid(X)
    eigenvalues, vectors = np.linalg.eigh(K)
    assert eigenvalues[0] < -0.1
    nearest = (vectors * np.maximum(eigenvalues, 0)) @ vectors.T
    kernel = RepairedKernel(sigmoid, X)
    np.testing.assert_allclose(kernel(X), nearest, atol=1e-12)
    onto_positive = vectors[:, eigenvalues > 0] @ vectors[:, eigenvalues > 0].T
    np.testing.assert_allclose(kernel(Y, X), sigmoid(Y, X) @ onto_positive, atol=1e-12)
    np.testing.assert_allclose(kernel.diagonal(Y), kernel(Y).diagonal(), rtol=1e-12)
    both = kernel(np.vstack([X, Y]))
    assert np.array_equal(both, both.T) and np.linalg.eigvalsh(both)[0] > -1e-12
    change = kernel.change
    assert change.negative == (eigenvalues < 0).sum() and change.samples == len(X)
    assert change.smallest == pytest.approx(eigenvalues[0]) and change.largest == pytest.approx(eigenvalues[-1])
    assert change.relative == pytest.approx(np.linalg.norm(nearest - K) / np.linalg.norm(K))
    assert str(change) in repr(kernel) and f"{change.negative} of 14 eigenvalues were negative" in str(change)


def test_nothing_is_changed_where_nothing_is_negative(path: pk.PathKernel, samples: Any) -> None:
    X, _ = samples
    kernel, K = RepairedKernel(path, X), path(X)
    assert kernel.change.negative == 0 and kernel.change.relative < 1e-13
    np.testing.assert_allclose(kernel(X), K, atol=1e-12 * np.abs(K).max())


# -- as kernels should be ----------------------------------------------------------------------------------------------


def test_symmetric_positive_semi_definite_and_the_same_when_saved(combined: Kernel, samples: Any) -> None:
    X, Y = samples
    K = combined(X)
    assert K.dtype == np.float64
    if rbf_kernel in combined.parts:  # which is symmetric to rounding
        np.testing.assert_allclose(K, K.T, rtol=1e-14)
    else:
        assert np.array_equal(K, K.T)
    assert np.linalg.eigvalsh(K)[0] > -1e-12 * np.abs(K).max()
    np.testing.assert_allclose(combined.diagonal(X), K.diagonal(), atol=1e-12 * np.abs(K).max())
    assert clone(combined) is combined and combined.parts
    assert np.array_equal(pickle.loads(pickle.dumps(combined))(X, Y), combined(X, Y))


def test_a_combination_in_a_support_vector_machine(combined: Kernel, samples: Any) -> None:
    X, Y = samples
    y = np.arange(len(X)) % 2
    fitted = SVC(kernel=combined).fit(X, y)
    precomputed = SVC(kernel="precomputed").fit(combined(X), y)
    np.testing.assert_allclose(fitted.decision_function(Y), precomputed.decision_function(combined(Y, X)), atol=1e-9)
    assert np.array_equal(pickle.loads(pickle.dumps(fitted)).predict(Y), fitted.predict(Y))


def test_distances(path: pk.PathKernel, samples: Any) -> None:
    X, Y = samples
    K = path(np.vstack([X, Y]))
    squared = K.diagonal()[:, None] + K.diagonal() - 2 * K
    np.testing.assert_allclose(path.distance(X, Y) ** 2, squared[:14, 14:], rtol=1e-10)
    D = path.distance(X)
    np.testing.assert_allclose(D**2, squared[:14, :14], atol=1e-12 * K.max())
    assert np.array_equal(D, D.T) and not D.diagonal().any()
    linear = distance(lambda X, Y=None: X @ (X if Y is None else Y).T, X, Y)
    np.testing.assert_allclose(linear, np.linalg.norm(X[:, None] - Y[None], axis=2), rtol=1e-12)
    assert np.array_equal(path.distance(X, X.copy()[[0]]) == 0, [[True]] + [[False]] * 13)


@pytest.mark.parametrize("which", ["path", "tangent"])
def test_where_scikit_learn_takes_kernels(which: str, path: Any, tangent: Any, samples: Any) -> None:
    kernel, (X, Y) = {"path": path, "tangent": tangent}[which], samples
    K, cross = kernel(X), kernel(Y, X)
    targets = {SVC: np.arange(14) % 2, SVR: X[:, 0], OneClassSVM: None}
    for estimator, y in targets.items():
        fitted = estimator(kernel=kernel).fit(X, y)
        matrix = estimator(kernel="precomputed").fit(K, y)
        np.testing.assert_allclose(fitted.predict(Y), matrix.predict(cross), atol=1e-7)
    ridge = KernelRidge(kernel="precomputed", alpha=0.1).fit(K, X[:, 0]).predict(cross)
    np.testing.assert_allclose(ridge, cross @ np.linalg.solve(K + 0.1 * np.eye(14), X[:, 0]), rtol=1e-6)
    components = KernelPCA(n_components=2, kernel="precomputed").fit_transform(K)
    variances = np.linalg.eigvalsh(CenteredKernel(kernel, X)(X))[::-1][:2]
    np.testing.assert_allclose((components**2).sum(0), variances, rtol=1e-9)


def test_clusters_and_maps_by_kernel_and_by_distance(path: pk.PathKernel) -> None:
    generator = np.random.default_rng(0)
    centres = np.repeat(np.array([[3.0, 0, 0, 0], [-3.0, 0, 0, 0]]), 8, axis=0)
    X, own = centres + 0.1 * generator.standard_normal((16, 4)), np.repeat([0, 1], 8)
    affinities = 1.0 + CosineKernel(path)(X)  # which are not negative
    clusters = SpectralClustering(2, affinity="precomputed", random_state=0).fit_predict(affinities)
    assert np.array_equal(clusters == clusters[0], own == 0)
    D = path.distance(X)
    grouped = DBSCAN(eps=np.median(D) / 2, metric="precomputed").fit_predict(D)
    assert np.array_equal(grouped, own)
    places = TSNE(2, metric="precomputed", init="random", perplexity=4, random_state=0, max_iter=250).fit_transform(D)
    between = np.linalg.norm(places[:, None] - places[None], axis=2)
    same = own[:, None] == own[None]
    assert between[same].max() < between[~same].min()


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(act: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        act()
    return caught.value


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_multiples_that_are_no_kernels(scale: float, path: pk.PathKernel) -> None:
    error = refusal(lambda: scale * path)
    assert f"multiplied by {scale!r}" in error.found and "positive" in error.write
    refusal(lambda: path * scale)


@pytest.mark.parametrize("other", ["rbf", None, [1.0, 2.0], 3])
def test_sums_with_what_is_no_kernel(other: Any, path: pk.PathKernel) -> None:
    with pytest.raises(TypeError):
        path + other
    with pytest.raises(TypeError):
        other + path
    assert "as a kernel" in refusal(lambda: SumKernel(path, other)).found
    for make in (CosineKernel, lambda k: CenteredKernel(k, np.eye(4)), lambda k: RepairedKernel(k, np.eye(4))):
        assert "can be called" in refusal(lambda make=make: make(other)).expected


def test_products_with_what_is_no_kernel(path: pk.PathKernel) -> None:
    for other in ([1.0, 2.0], np.eye(2)):
        with pytest.raises(TypeError):
            path * other
    assert "`ProductKernel(kernel, other)`" in refusal(lambda: ProductKernel(path)).write
    assert "as a kernel" in refusal(lambda: CosineKernel(pk.TangentKernel)).found


def test_blocks_of_outputs_are_not_combined(run: Recording) -> None:
    full = pk.PathKernel(run.trajectory, outputs="full")
    for act in (lambda: (full + full)(run.X), lambda: CosineKernel(full).diagonal(run.X), lambda: full.distance(run.X)):
        error = refusal(act)
        assert "shape (10, " in error.found and 'outputs="trace"' in error.write


def test_samples_that_are_referred_to(path: pk.PathKernel) -> None:
    for make in (CenteredKernel, RepairedKernel):
        error = refusal(lambda make=make: make(path, np.zeros((0, 4))))
        assert "no samples" in error.found and f"{make.__name__}(kernel, X_train)" in error.write


def test_functions_that_cannot_be_repaired() -> None:
    X = np.arange(8.0).reshape(4, 2)
    lopsided = refusal(lambda: RepairedKernel(lambda X, Y=None: np.arange(16.0).reshape(4, 4), X))
    assert "differs from its transpose by up to 9" in lopsided.found
    negative = refusal(lambda: RepairedKernel(lambda X, Y=None: -np.eye(4), X))
    assert "No eigenvalue of the matrix of 4 samples is positive" in negative.found
    broken = refusal(lambda: RepairedKernel(lambda X, Y=None: np.diag([1.0, np.nan, 1.0, 1.0]), X))
    assert "nan at row 1, column 1" in broken.found


def test_combinations_say_what_they_are() -> None:
    kernel = pk.TangentKernel(torch.nn.Linear(4, 1))
    text = repr(0.5 * CosineKernel(kernel) * rbf_kernel + kernel)
    assert text.startswith("((0.5 * CosineKernel(<TangentKernel of") and " * <function rbf_kernel" in text
    assert "CenteredKernel(" in repr(CenteredKernel(kernel, np.eye(4))) and kernel.parts == ()
