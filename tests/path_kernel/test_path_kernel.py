"""The path kernel: against the entry-by-entry oracle, as a kernel should be, and inside scikit-learn."""

from __future__ import annotations

import copy
import itertools
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCHES, SAMPLES, Recording, make_inputs, make_model, record
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.decomposition import KernelPCA
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC, SVR
from tolerances import TOLERANCES
from torch import nn

import pathkernel as pk
from pathkernel import reference
from pathkernel.estimators.gaussian_process import GaussianProcessKernel
from pathkernel.estimators.transformer import PathKernelTransformer

DOUBLE = TOLERANCES[torch.float64]
QUADRATURES = {
    "left": reference.left,
    "trapezoid": reference.trapezoid,
    "midpoint": reference.midpoint,
    pk.GaussLegendre(2): reference.gauss_legendre(2),
}
RATES = (0.1, 0.05, 0.2, 0.0, 0.1, 0.15)


def close(found: Any, expected: Any, tolerance: float = DOUBLE.rounding) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def with_rates(optimizer: torch.optim.Optimizer):
    """A schedule that visits RATES, one of them zero."""
    lr = optimizer.param_groups[0]["lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: RATES[min(s, len(RATES) - 1)] / lr)


@pytest.fixture(scope="module")
def run() -> Recording:
    return record(optimizer="momentum", schedule=with_rates)


def points(run: Recording) -> list[dict[str, torch.Tensor]]:
    return [run.trajectory.parameters(s) for s in range(len(run.trajectory) + 1)]


def between(start, end, t: float):
    return {name: (1 - t) * start[name] + t * end[name] for name in start}


def oracle_nodes(run: Recording, rule, weights) -> tuple[list, list[float]]:
    """Every node of every step, with its weight, written out."""
    path, nodes, node_weights = points(run), [], []
    for s, weight in enumerate(weights):
        for t, omega in zip(*rule, strict=True):
            nodes.append(between(path[s], path[s + 1], float(t)))
            node_weights.append(float(omega) * weight)
    return nodes, node_weights


def lengths(run: Recording) -> list[float]:
    flat = [reference.flatten(run.start, p) for p in points(run)]
    return [float((b - a).norm()) for a, b in itertools.pairwise(flat)]


MEASURES = {"learning_rate": lambda run: RATES, "arc_length": lengths, "uniform": lambda run: [1.0] * len(BATCHES)}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("quadrature", QUADRATURES, ids=repr)
def test_against_the_oracle(run: Recording, quadrature, measure: str) -> None:
    nodes, weights = oracle_nodes(run, QUADRATURES[quadrature], MEASURES[measure](run))
    kernel = pk.PathKernel(run.trajectory, quadrature=quadrature, measure=measure)
    close(kernel(run.queries, run.X[:3]), reference.path_kernel(run.start, nodes, weights, run.queries, run.X[:3]))
    close(kernel.total_weight, sum(MEASURES[measure](run)))
    close(kernel.diagonal(run.queries), np.diag(kernel(run.queries)))


def test_nodes_of_neighbouring_steps_are_shared(run: Recording) -> None:
    assert len(pk.PathKernel(run.trajectory, quadrature="trapezoid", measure="uniform").nodes) == len(BATCHES) + 1
    assert len(pk.PathKernel(run.trajectory, quadrature="left").nodes) == len(BATCHES) - 1  # one rate is zero


def test_few_steps_share_no_nodes_under_the_trapezoid() -> None:
    long = record(batches=BATCHES * 3)
    nodes = {quadrature: len(pk.PathKernel(long.trajectory, steps=6, quadrature=quadrature).nodes)
             for quadrature in ("trapezoid", "midpoint", pk.GaussLegendre(2))}  # fmt: skip
    assert list(nodes.values()) == [12, 6, 12]


# -- what makes it a kernel -------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"quadrature": "left", "measure": "arc_length"},
    {"outputs": "sum"},
    {"outputs": 1, "quadrature": "midpoint"},
    {"outputs": lambda z: torch.stack([z[0] * z[1], z[2]])},
    {"preconditioner": "optimizer"},
    {"dtype": torch.float32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
@pytest.mark.parametrize("memory", ["1GB", 10_000])
def test_symmetric_and_positive_semi_definite(options: dict, memory) -> None:
    recording = record("relu", optimizer="adam")
    K = pk.PathKernel(recording.trajectory, steps=3, memory=memory, **options)(recording.X)
    np.testing.assert_array_equal(K, K.T)
    eigenvalues = np.linalg.eigvalsh(K)
    assert eigenvalues[0] >= -TOLERANCES[options.get("dtype", torch.float64)].psd * eigenvalues[-1]


@settings(max_examples=10)
@given(order=st.permutations(range(SAMPLES)), columns=st.permutations(range(4)))
def test_samples_in_another_order(run: Recording, order: list[int], columns: list[int]) -> None:
    kernel = pk.PathKernel(run.trajectory, steps=2)
    close(kernel(run.X[order], run.queries[columns]), kernel(run.X, run.queries)[np.ix_(order, columns)])
    close(kernel(run.X[order]), kernel(run.X)[np.ix_(order, order)])


@settings(max_examples=6)
@given(memory=st.sampled_from([10_000, 30_000, 100_000]), n=st.integers(1, SAMPLES))
def test_blocks_make_the_whole(run: Recording, memory: int, n: int) -> None:
    blocks, whole = (pk.PathKernel(run.trajectory, steps=2, memory=m) for m in (memory, "1GB"))
    close(blocks(run.X[:n]), whole(run.X[:n]))
    close(blocks(run.X[:n], run.queries), whole(run.X[:n], run.queries))
    close(blocks.diagonal(run.X[:n]), whole.diagonal(run.X[:n]))


def test_a_block_of_a_matrix_is_the_matrix_of_a_block(run: Recording) -> None:
    kernel = pk.PathKernel(run.trajectory)
    both = torch.cat([run.X, run.queries])
    K = kernel(both)
    close(kernel(run.X), K[:SAMPLES, :SAMPLES])
    close(kernel(run.queries, run.X), K[SAMPLES:, :SAMPLES])
    close(kernel(run.X, run.queries), kernel(run.queries, run.X).T)
    np.testing.assert_array_equal(kernel(run.X.numpy()), kernel(run.X))
    # The very same object twice is recognised; an equal copy is not, and gives the same numbers.
    close(kernel(run.X, run.X), kernel(run.X, run.X.clone()))


def test_outputs_add_up(run: Recording) -> None:
    def kernel(outputs) -> np.ndarray:
        return pk.PathKernel(run.trajectory, outputs=outputs)(run.queries, run.X)

    full = kernel("full")
    assert full.shape == (4, SAMPLES, 3, 3)
    close(sum(kernel(c) for c in range(3)), kernel("trace"))
    close(np.einsum("nmcc->nm", full), kernel("trace"))
    close(kernel("trace") / 3, kernel("mean"))
    close(full.sum(axis=(2, 3)), kernel("sum"))
    close(full[:, :, 0, 0] - full[:, :, 0, 2] - full[:, :, 2, 0] + full[:, :, 2, 2], kernel(lambda z: z[0] - z[2]))


def test_the_kernel_of_losses(run: Recording) -> None:
    targets = torch.tensor([0, 2, 1, 1])
    kernel = pk.PathKernel(run.trajectory, outputs="loss", quadrature="left", measure="uniform")
    rows = [
        torch.stack(
            [
                reference.sample_gradients(run.start, p, run.loss, run.queries[i : i + 1], targets[i : i + 1])[0]
                for i in range(4)
            ]
        )
        for p in points(run)[:-1]
    ]
    close(kernel((run.queries, targets)), sum(g @ g.T for g in rows))
    np.testing.assert_array_equal(kernel((run.queries, targets), (run.queries, targets)).shape, (4, 4))


def test_float32_is_near_float64(run: Recording) -> None:
    found, expected = (pk.PathKernel(run.trajectory, dtype=dtype)(run.X) for dtype in (torch.float32, None))
    assert found.dtype == np.float64
    close(found, expected, TOLERANCES[torch.float32].rounding)


# -- the optimizer's own metric, parameter groups, thinning -----------------------------------------------------------


def test_preconditioned_by_adam() -> None:
    recording = record(optimizer="adam_decay")
    (beta, beta2), eps = (0.8, 0.95), 1e-8
    path = points(recording)
    v = K = torch.zeros(())
    for s, ids in enumerate(BATCHES):
        index = torch.tensor(ids)
        g = reference.sample_gradients(recording.start, path[s], recording.loss, recording.X[index], recording.y[index])
        g = g.sum(dim=0) + 0.05 * reference.flatten(recording.start, path[s])
        v = beta2 * v + (1 - beta2) * g**2
        D = (1 - beta) / (1 - beta ** (s + 1)) / ((v / (1 - beta2 ** (s + 1))).sqrt() + eps)
        G = reference.output_gradients(recording.start, path[s], recording.queries)
        K = K + 0.01 * torch.einsum("ncp,p,mcp->nm", G, D, G)
    kernel = pk.PathKernel(recording.trajectory, preconditioner="optimizer", quadrature="left")
    close(kernel(recording.queries), K, DOUBLE.shares)
    close(kernel(recording.queries, recording.queries.clone()), K, DOUBLE.shares)
    close(kernel.diagonal(recording.queries), K.diagonal(), DOUBLE.shares)


def test_the_preconditioner_of_plain_descent_is_the_identity() -> None:
    recording = record(optimizer="sgd")
    found, expected = (pk.PathKernel(recording.trajectory, preconditioner=p)(recording.X) for p in ("optimizer", None))
    close(found, expected)


def test_the_preconditioner_does_not_need_a_learning_rate() -> None:
    # A warm-up from zero: the scaling of that step is that of any other.
    still = record(optimizer="sgd", schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.0))
    found, expected = (
        pk.PathKernel(still.trajectory, preconditioner=p, measure="uniform")(still.X) for p in ("optimizer", None)
    )
    close(found, expected)


@pytest.mark.parametrize("rates", [(0.1, 0.02), (0.02, 0.1), (0.0, 0.1)])
def test_every_parameter_group_at_its_own_rate(rates: tuple[float, float]) -> None:
    base = record()
    model = make_model()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": rates[0]}, {"params": model[2].parameters(), "lr": rates[1]}]
    )
    with pk.KernelRecorder(model, optimizer, base.loss, data=(base.X, base.y)) as recorder:
        for x, y in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            base.loss(model(x), y).backward()
            optimizer.step()
    first = sum(p.numel() for p in model[0].parameters())
    own = torch.full((base.trajectory.layout.size,), rates[1], dtype=torch.float64)
    own[:first] = rates[0]
    K = torch.zeros(())
    for s in range(len(recorder.trajectory)):
        G = reference.output_gradients(model, recorder.trajectory.parameters(s), base.queries)
        K = K + torch.einsum("ncp,p,mcp->nm", G, own, G)
    close(pk.PathKernel(recorder.trajectory, quadrature="left")(base.queries), K)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 6, 100])
def test_thinning_keeps_the_total_weight(run: Recording, measure: str, steps: int) -> None:
    whole = pk.PathKernel(run.trajectory, measure=measure, quadrature="left")
    thinned = pk.PathKernel(run.trajectory, measure=measure, quadrature="left", steps=steps)
    assert thinned.total_weight == pytest.approx(whole.total_weight, rel=1e-14)
    assert len(thinned.nodes) <= steps
    if steps >= len(BATCHES):
        np.testing.assert_array_equal(thinned(run.queries), whole(run.queries))


@pytest.mark.parametrize("steps", [None, 2])
def test_a_model_linear_in_its_parameters_has_one_tangent_kernel(steps: int | None) -> None:
    model, base = nn.Linear(4, 3).double(), record()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, base.loss, data=(base.X, base.y)) as recorder:
        for x, y in recorder.batches(batch_size=3):
            optimizer.zero_grad()
            base.loss(model(x), y).backward()
            optimizer.step()
    kernel = pk.PathKernel(recorder.trajectory, steps=steps)
    assert kernel.total_weight == pytest.approx(0.1 * len(recorder.trajectory))
    close(kernel(base.X), kernel.total_weight * pk.TangentKernel(model)(base.X))
    close(kernel(base.X), kernel.total_weight * 3 * (base.X @ base.X.T + 1))


# -- inside scikit-learn ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem(run: Recording) -> tuple[pk.PathKernel, np.ndarray, np.ndarray]:
    X = make_inputs(24, seed=11).numpy()
    return pk.PathKernel(run.trajectory, steps=2), X, (X[:, 0] * X[:, 1] > 0).astype(int)


def test_a_support_vector_machine(problem) -> None:
    kernel, X, y = problem
    svc = SVC(kernel=kernel, C=10.0).fit(X, y)
    precomputed = SVC(kernel="precomputed", C=10.0).fit(kernel(X), y)
    np.testing.assert_array_equal(svc.predict(X), precomputed.predict(kernel(X)))
    np.testing.assert_allclose(svc.decision_function(X), precomputed.decision_function(kernel(X)), atol=1e-8)
    assert svc.score(X, y) > 0.7


def test_a_grid_search(problem) -> None:
    kernel, X, y = problem
    search = GridSearchCV(SVC(kernel=kernel), {"C": [0.1, 10.0]}, cv=2).fit(X, y)
    assert search.best_estimator_.kernel is kernel
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_a_clone_shares_the_kernel(problem, run: Recording) -> None:
    kernel, _, _ = problem
    assert clone(SVC(kernel=kernel)).kernel is kernel
    assert clone(kernel) is kernel
    tangent = pk.TangentKernel(run.model)
    assert clone(PathKernelTransformer(tangent)).kernel is tangent
    assert clone(GaussianProcessKernel(kernel) + WhiteKernel()).k1.kernel is kernel


@pytest.mark.parametrize("estimator", [KernelRidge(kernel="precomputed"), SVR(kernel="precomputed")], ids=repr)
def test_precomputed_kernels_in_a_pipeline(problem, estimator) -> None:
    kernel, X, _ = problem
    y = np.sin(X[:, 0])
    pipeline = make_pipeline(PathKernelTransformer(kernel), estimator).fit(X[:16], y[:16])
    direct = clone(estimator).fit(kernel(X[:16]), y[:16])
    np.testing.assert_allclose(pipeline.predict(X[16:]), direct.predict(kernel(X[16:], X[:16])), rtol=1e-8)
    assert clone(pipeline).fit(X, y).predict(X).shape == (24,)


def test_the_transformer_keeps_the_matrix_symmetric(problem) -> None:
    kernel, X, _ = problem
    transformer = PathKernelTransformer(kernel)
    K = transformer.fit_transform(X)
    np.testing.assert_array_equal(K, kernel(X))
    assert transformer.transform(X[:3]).shape == (3, 24)
    assert KernelPCA(n_components=2, kernel="precomputed").fit_transform(K).shape == (24, 2)


def test_gaussian_process_regression(problem) -> None:
    kernel, X, _ = problem
    y = np.sin(X[:, 0])
    covariance = GaussianProcessKernel(kernel) + WhiteKernel(0.1)
    process = GaussianProcessRegressor(covariance, optimizer=None).fit(X[:16], y[:16])
    mean, deviation = process.predict(X[16:], return_std=True)
    K = kernel(X[:16]) + 0.1 * np.eye(16)
    cross = kernel(X[16:], X[:16])
    np.testing.assert_allclose(mean, cross @ np.linalg.solve(K, y[:16]), rtol=1e-6)
    variance = kernel.diagonal(X[16:]) + 0.1 - np.einsum("ij,ij->i", cross, np.linalg.solve(K, cross.T).T)
    np.testing.assert_allclose(deviation**2, variance, rtol=1e-6)
    fitted = GaussianProcessRegressor(covariance).fit(X[:16], y[:16])
    assert fitted.log_marginal_likelihood_value_ > process.log_marginal_likelihood_value_
    assert fitted.kernel_.k1.kernel is kernel


def test_the_likelihood_gradient_of_the_gaussian_process(problem) -> None:
    kernel, X, _ = problem
    process = GaussianProcessRegressor(GaussianProcessKernel(kernel) + WhiteKernel(0.1), optimizer=None)
    process.fit(X, np.sin(X[:, 0]))
    theta, h = np.array([0.3, -1.0]), 1e-5
    _, gradient = process.log_marginal_likelihood(theta, eval_gradient=True)
    for i, step in enumerate(h * np.eye(2)):
        ahead, behind = (process.log_marginal_likelihood(theta + s) for s in (step, -step))
        assert gradient[i] == pytest.approx((ahead - behind) / (2 * h), rel=1e-6)


def test_a_fixed_scale_is_not_searched(problem) -> None:
    kernel, X, _ = problem
    covariance = GaussianProcessKernel(kernel, scale=2.0, scale_bounds="fixed")
    assert len(covariance.theta) == 0
    matrix, gradient = covariance(X, eval_gradient=True)
    np.testing.assert_allclose(matrix, 2 * kernel(X))
    assert gradient.shape == (24, 24, 0)
    np.testing.assert_allclose(covariance.diag(X), np.diag(matrix))
    assert not covariance.is_stationary()


def test_gaussian_process_classification(problem) -> None:
    kernel, X, y = problem
    process = GaussianProcessClassifier(GaussianProcessKernel(kernel) + WhiteKernel(0.1)).fit(X, y)
    assert process.score(X, y) > 0.7
    np.testing.assert_allclose(process.predict_proba(X).sum(axis=1), 1)


def test_repr_says_what_the_kernel_is(run: Recording) -> None:
    text = repr(pk.PathKernel(run.trajectory, steps=3, outputs=1))
    for part in ("6 steps of SGD", "output 1", "learning_rate", "Trapezoid()", "total weight 0.6", "engine"):
        assert part in text


def test_running_statistics_are_those_of_each_step() -> None:
    # BatchNorm evaluates by its running statistics, which move in training: each node has its own.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = make_inputs(8), torch.arange(8) % 3
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for x, target in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    trajectory = recorder.trajectory
    expected = np.zeros((8, 8))
    for index, step in enumerate(trajectory.steps()):
        then = copy.deepcopy(model).eval()
        then.load_state_dict({**trajectory.constants, **step.buffers, **trajectory.parameters(index)})
        expected += 0.1 * pk.TangentKernel(then)(X)
    for kernel in (pk.PathKernel(trajectory, quadrature="left"), pk.PathKernel(trajectory, quadrature="left", steps=2)):
        np.testing.assert_allclose(kernel(X), expected, rtol=1e-10)
        np.testing.assert_allclose(kernel.diagonal(X), np.diag(expected), rtol=1e-10)
    np.testing.assert_allclose(pk.PathKernel(trajectory)(X, X[:3]), pk.PathKernel(trajectory)(X)[:, :3], rtol=1e-10)


def test_nodes_are_numbers_until_they_are_used(tmp_path) -> None:
    def train(store) -> pk.Trajectory:
        model, X, y = make_model(), make_inputs(8), torch.arange(8) % 3
        optimizer, loss = torch.optim.Adam(model.parameters(), lr=0.01), nn.CrossEntropyLoss()
        with pk.KernelRecorder(model, optimizer, loss, data=(X, y), store=store) as recorder:
            for _ in range(3):
                for x, target in recorder.batches(batch_size=4):
                    optimizer.zero_grad()
                    loss(model(x), target).backward()
                    optimizer.step()
        return recorder.trajectory

    stored, held = train(tmp_path / "run"), train(None)
    for options in ({}, {"quadrature": "midpoint"}, {"preconditioner": "optimizer"}, {"tolerance": 1e-2}):
        kernel, expected = (pk.PathKernel(trajectory, **options) for trajectory in (stored, held))
        for node in kernel.nodes:
            assert all(isinstance(getattr(node, f.name), (int, float)) for f in fields(node) if f.name != "measure")
        assert len(kernel.nodes) == len(expected.nodes)
        np.testing.assert_array_equal(kernel(make_inputs(3)), expected(make_inputs(3)))
