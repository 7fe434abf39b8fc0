"""Features of path kernels: unbiased, the same for a sample wherever it stands, with an error that is true.

That the error falls like 1/√dim is tested where one map is: in tangent_kernel/test_projection.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import Recording, make_inputs, record
from scipy.sparse.linalg import cg, eigsh
from torch import nn

import pathkernel as pk
from pathkernel import errors
from pathkernel.path_kernel.features import Features
from pathkernel.path_kernel.streaming import StreamingFeatures
from pathkernel.tangent_kernel.engines.projection import Projection

TARGETS = torch.tensor([0, 2, 1, 1])


@pytest.fixture(scope="module")
def run() -> Recording:
    return record(optimizer="momentum")


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def gram(phi: np.ndarray) -> np.ndarray:
    return np.einsum("nkd,mjd->nmkj", phi, phi) if phi.ndim == 3 else phi @ phi.T


OPTIONS = [{}, {"tolerance": 1e-2}, *({"outputs": o, "steps": 2} for o in ("mean", "full", 1, "loss"))]
OPTIONS += [{"preconditioner": "optimizer"}, {"quadrature": pk.GaussLegendre(2), "steps": 2}]
OPTIONS += [{"measure": "arc_length", "steps": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_unbiased_and_the_reported_error_is_true(options: dict) -> None:
    recording = record(optimizer="adam")
    X = (recording.queries, TARGETS) if options.get("outputs") == "loss" else recording.queries
    kernel = pk.PathKernel(recording.trajectory, **options)
    K = kernel(X)
    drawn = [kernel.features(X, 256, seed=seed) for seed in range(8)]
    one = np.mean([relative(gram(phi), K) for phi in drawn])
    assert 0.01 < one < 4 / 256**0.5
    assert relative(np.mean([gram(phi) for phi in drawn], axis=0), K) < 2.5 * one / 8**0.5
    assert np.mean([phi.error.relative for phi in drawn]) == pytest.approx(one, rel=0.6)


def test_a_sample_has_the_same_features_in_every_block(run: Recording) -> None:
    kernel, tight = pk.PathKernel(run.trajectory), pk.PathKernel(run.trajectory, memory=20_000)
    phi = kernel.features(run.X, 64)
    assert isinstance(phi, Features) and phi.shape == (10, 64) and phi.dtype == np.float64
    np.testing.assert_array_equal(phi, kernel.features(run.X, 64))
    for other in (kernel.features(run.X[3:7], 64), tight.features(run.X, 64)[3:7]):
        np.testing.assert_allclose(other, phi[3:7], rtol=1e-5, atol=1e-6 * np.abs(phi).max())
    assert not np.allclose(phi, kernel.features(run.X, 64, seed=1))
    assert phi.error.samples == 5 and phi[:3].error is None and (2 * phi).error is None


def test_an_engine_of_sketches(run: Recording) -> None:
    exact = pk.PathKernel(run.trajectory)
    kernel = pk.PathKernel(run.trajectory, engine=Projection(2048))
    K = kernel(run.X)
    np.testing.assert_array_equal(K, K.T)
    assert 0.001 < relative(K, exact(run.X)) < 0.1
    assert kernel.error.relative == pytest.approx(relative(K, exact(run.X)), rel=1.0)
    np.testing.assert_allclose(kernel.diagonal(run.X), np.diag(K), rtol=1e-6)
    np.testing.assert_allclose(kernel(run.X[:3], run.X), K[:3], rtol=0, atol=1e-6 * np.abs(K).max())


# -- streamed while training -----------------------------------------------------------------------------------------


def normalised() -> pk.Trajectory:
    """A network whose running statistics move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = make_inputs(8), torch.arange(8) % 3
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for _ in range(2):
            for x, target in recorder.batches(batch_size=4):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    return recorder.trajectory


def with_rates(optimizer: torch.optim.Optimizer):
    """A schedule of which two rates are zero."""
    rates = (1.0, 0.0, 0.5, 1.0, 0.0, 1.0)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rates[min(s, 5)])


PATHS = {
    "plain": lambda: record(optimizer="momentum").trajectory,
    "rates": lambda: record(optimizer="sgd", schedule=with_rates).trajectory,
    "statistics": normalised,
}


@pytest.mark.parametrize("quadrature", ["trapezoid", "left", pk.GaussLegendre(2)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_streamed_features_are_those_of_the_record(path: str, quadrature) -> None:
    trajectory, X = PATHS[path](), make_inputs(4, seed=3)
    streaming = StreamingFeatures(X, 64, quadrature=quadrature)
    streaming.begin(trajectory, ())
    for step in trajectory.steps():
        streaming.observe(step)
    expected = pk.PathKernel(trajectory, quadrature=quadrature).features(X, 64)
    np.testing.assert_allclose(streaming.values, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


# -- the kernel as an operator, and kept while it grows ----------------------------------------------------------------


def test_the_kernel_as_a_linear_operator(run: Recording) -> None:
    kernel = pk.PathKernel(run.trajectory)
    K, operator = kernel(run.X), kernel.operator(run.X)
    v = np.random.default_rng(0).standard_normal(10)
    np.testing.assert_allclose(operator @ v, K @ v, rtol=1e-10)
    np.testing.assert_allclose(kernel.operator(run.queries, run.X) @ v, kernel(run.queries, run.X) @ v, rtol=1e-10)
    assert eigsh(operator, k=1, return_eigenvectors=False)[0] == pytest.approx(np.linalg.eigvalsh(K)[-1])
    # Ten samples of a small network: the kernel is far from singular after a little regularisation.
    solved, failed = cg(operator, v, rtol=1e-12, maxiter=500)
    assert failed == 0
    np.testing.assert_allclose(K @ solved, v, rtol=1e-6)


@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_a_matrix_kept_while_it_grows(run: Recording, outputs: str, tmp_path, monkeypatch) -> None:
    kernel = pk.PathKernel(run.trajectory, outputs=outputs)
    found = kernel(run.X, store=tmp_path / "gram")
    np.testing.assert_allclose(found, kernel(run.X), rtol=1e-12)
    monkeypatch.setattr(type(kernel.engine), "gram", None)  # nothing is computed again
    np.testing.assert_array_equal(kernel(run.X, store=tmp_path / "gram"), found)
    with pytest.raises(errors.StoreError, match="holds another computation"):
        kernel(run.queries, run.X, store=tmp_path / "gram")


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSALS = {
    "dim": (lambda k: k.features(make_inputs(2), 0), "`Projection(dim=0", "from 1 upwards", "Projection(dim=1024)"),
    "kind": (lambda k: k.features(make_inputs(2), kind="hash"), "kind='hash'", "'sparse'", 'kind="tensor"'),
    "operator": (
        lambda k: pk.PathKernel(k.trajectory, engine=Projection(8)).operator(make_inputs(2)),
        "sketched gradients",
        "no more than φ",
        "features(X, dim)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(run: Recording, name: str) -> None:
    act, *parts = REFUSALS[name]
    with pytest.raises(errors.InputError) as caught:
        act(pk.PathKernel(run.trajectory))
    for part in parts:
        assert part in str(caught.value)


def test_nothing_streamed_yet(run: Recording) -> None:
    streaming = StreamingFeatures(run.queries)
    streaming.begin(run.trajectory, ())
    with pytest.raises(errors.TrajectoryError) as caught:
        _ = streaming.values
    for part in ("seen no step", "looks on", "observers=[features]"):
        assert part in str(caught.value)
