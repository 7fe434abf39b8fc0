"""Few nodes in place of all, random outputs in place of all: near the whole path, by as much as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import Recording, generator, make_inputs, record
from scipy.optimize import nnls
from tolerances import TOLERANCES
from torch import nn

import pathkernel as pk
from pathkernel import errors, reference
from pathkernel.path_kernel import node_selection as path_selection
from pathkernel.path_kernel.node_selection import as_vector, nonnegative_pursuit, probe_samples
from pathkernel.tangent_kernel.measured_error import MeasuredError
from pathkernel.tangent_kernel.output_probes import OutputProbes

ROUNDING = TOLERANCES[torch.float64].rounding
OTHERS = make_inputs(8, seed=21)


@pytest.fixture(scope="module")
def run() -> Recording:
    """A path long enough to leave most of it out."""
    X, y = make_inputs(40, seed=7), torch.randint(3, (40,), generator=generator(8))
    order = generator(9)
    batches = [torch.randint(40, (5,), generator=order).tolist() for _ in range(100)]
    return record(optimizer="momentum", data=(X, y), batches=batches)


@pytest.fixture(scope="module")
def exact(run: Recording) -> np.ndarray:
    """Every step by the entry-by-entry oracle, trapezoid, learning rate 0.05."""
    points = [run.trajectory.parameters(s) for s in range(101)]
    weights = [0.05 * (0.5 if s in (0, 100) else 1.0) for s in range(101)]
    return reference.path_kernel(run.start, points, weights, OTHERS).numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# -- a tolerance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tolerance", "most"), [(1e-2, 10), (1e-3, 25), (1e-4, 60)])
def test_fewer_nodes_to_a_tolerance(run: Recording, exact: np.ndarray, tolerance: float, most: int) -> None:
    kernel = pk.PathKernel(run.trajectory, tolerance=tolerance)
    assert len(kernel.nodes) <= most and all(node.weight > 0 for node in kernel.nodes)
    assert kernel.error.relative + kernel.error.deviation <= tolerance == kernel.error.aim
    # Eight samples that nobody has seen: not more than the tolerance, but for the luck of the draw.
    assert 0.1 * kernel.error.relative < relative(kernel(OTHERS), exact) < 1.5 * tolerance
    assert kernel.total_weight == pytest.approx(5.0, rel=5 * tolerance)


def test_the_error_is_that_of_the_samples_held_out(run: Recording) -> None:
    kernel, whole = pk.PathKernel(run.trajectory, tolerance=1e-2), pk.PathKernel(run.trajectory)
    chosen_by, held_out = probe_samples(40, 1)
    assert sorted(torch.cat([chosen_by, held_out]).tolist()) == list(range(40))
    X = run.X[held_out]
    assert kernel.error.relative == pytest.approx(relative(kernel(X), whole(X)), rel=1e-9)
    assert whole.error.relative == 0 and kernel.error.samples == 20
    assert f"{kernel.error.relative:.2g}" in repr(kernel)


def test_one_kernel_is_one_function(run: Recording) -> None:
    one, two = (pk.PathKernel(run.trajectory, tolerance=1e-3) for _ in range(2))
    assert one.nodes == two.nodes
    K = one(OTHERS)
    np.testing.assert_array_equal(K, two(OTHERS))
    np.testing.assert_array_equal(K, K.T)
    np.testing.assert_allclose(one(OTHERS[:5], OTHERS[3:]), K[:5, 3:], rtol=0, atol=ROUNDING * np.abs(K).max())
    eigenvalues = np.linalg.eigvalsh(K)
    assert eigenvalues[0] >= -TOLERANCES[torch.float64].psd * eigenvalues[-1]


def test_long_paths_window_by_window(run: Recording, exact: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_selection, "WINDOW", 30)
    kernel = pk.PathKernel(run.trajectory, tolerance=1e-2)
    assert len(kernel.nodes) <= 15
    assert kernel.error.relative <= 1e-2 and relative(kernel(OTHERS), exact) < 1.5e-2


@pytest.mark.parametrize("outputs", ["full", "loss", 1, "sum"])
def test_for_other_functions_of_the_outputs(run: Recording, outputs) -> None:
    few, whole = (pk.PathKernel(run.trajectory, outputs=outputs, tolerance=t) for t in (1e-2, None))
    X = (OTHERS, torch.arange(8) % 3) if outputs == "loss" else OTHERS
    assert len(few.nodes) <= 30
    assert relative(few(X), whole(X)) < 2e-2


def test_the_whole_path_where_no_fewer_nodes_will_do(run: Recording) -> None:
    short = record().trajectory
    kernel = pk.PathKernel(short, tolerance=1e-9)
    assert kernel.nodes == pk.PathKernel(short).nodes
    assert kernel.error.relative == 0


def test_a_path_that_does_not_move_has_one_node() -> None:
    # A model linear in its parameters has one tangent kernel.
    model, base = nn.Linear(4, 3).double(), record()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, base.loss, data=(base.X, base.y)) as recorder:
        for _ in range(4):
            for x, y in recorder.batches(batch_size=5):
                optimizer.zero_grad()
                base.loss(model(x), y).backward()
                optimizer.step()
    kernel = pk.PathKernel(recorder.trajectory, tolerance=1e-6)
    assert len(kernel.nodes) == 1
    np.testing.assert_allclose(kernel(base.X), pk.PathKernel(recorder.trajectory)(base.X), rtol=1e-10)
    # … and eight nodes' random combinations of three outputs, two rounds of a Hadamard matrix, have no error either.
    probes = pk.PathKernel(recorder.trajectory, outputs=OutputProbes(1), quadrature="left")
    assert len(probes.nodes) == 8
    np.testing.assert_allclose(probes(base.X), pk.PathKernel(recorder.trajectory)(base.X), rtol=1e-10)


# -- the pursuit ----------------------------------------------------------------------------------------------------


def test_a_few_vectors_are_found_again() -> None:
    random = np.random.default_rng(0)
    vectors, weights = random.standard_normal((30, 200)), np.zeros(30)
    weights[[3, 11, 20]] = 1.0, 0.3, 2.0
    *_, (places, found) = nonnegative_pursuit(vectors, weights @ vectors)
    assert sorted(places) == [3, 11, 20]
    np.testing.assert_allclose(found[np.argsort(places)], [1.0, 0.3, 2.0], rtol=1e-8)


def test_it_ends_at_the_best_nonnegative_weights_and_never_gets_worse() -> None:
    random = np.random.default_rng(1)
    vectors, target = random.standard_normal((20, 15)), random.standard_normal(15)
    left = []
    for places, weights in nonnegative_pursuit(vectors, target):
        assert (weights > 0).all() and len(set(places)) == len(places)
        left.append(np.linalg.norm(target - weights @ vectors[places]))
    assert (np.diff(left) < 1e-12).all()
    assert left[-1] == pytest.approx(nnls(vectors.T, target)[1], abs=1e-7)


def test_a_symmetric_matrix_as_a_vector() -> None:
    A, B = (torch.randn(5, 5, 2, 2, dtype=torch.float64, generator=generator(s)) for s in (1, 2))
    A, B = A + A.permute(1, 0, 3, 2), B + B.permute(1, 0, 3, 2)
    assert as_vector(A) @ as_vector(B) == pytest.approx(float((A * B).sum()))


def test_the_deviation_of_an_error_is_the_jackknife() -> None:
    random = np.random.default_rng(2)
    exact, found = random.standard_normal((2, 6, 6))
    exact, found = exact + exact.T, found + found.T
    others = [np.ix_(*[np.delete(np.arange(6), i)] * 2) for i in range(6)]
    without = [relative(found[five], exact[five]) for five in others]
    error = MeasuredError.between(found, exact, "it")
    assert float(error) == pytest.approx(relative(found, exact))
    assert error.deviation == pytest.approx(np.sqrt(5 * np.var(without)))
    assert "6 held-out samples" in str(error) and "asked" not in str(error)


# -- random combinations of the outputs -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_signs_are_orthogonal_over_a_round(count: int) -> None:
    probes, outputs = OutputProbes(count), 6
    rows = torch.cat([probes.signs(node, outputs) for node in range(8)], dim=1)  # count rounds of 8
    assert rows.abs().eq(1).all()
    torch.testing.assert_close(rows @ rows.T, 8.0 * count * torch.eye(outputs, dtype=torch.float64))
    assert not torch.equal(rows[:, :8], OutputProbes(count, seed=1).signs(0, outputs).expand(6, -1)[:, :8])


def test_random_outputs_are_the_trace_in_expectation(run: Recording) -> None:
    trace = pk.PathKernel(run.trajectory, steps=2, quadrature="left")(OTHERS)
    drawn = [
        pk.PathKernel(run.trajectory, steps=2, quadrature="left", outputs=OutputProbes(1, seed))(OTHERS)
        for seed in range(64)
    ]
    one = np.mean([relative(K, trace) for K in drawn])
    assert one > 0.1  # each by itself is far off
    assert relative(np.mean(drawn, axis=0), trace) < 2 * one / 64**0.5


def test_random_outputs_average_out_over_a_path(run: Recording, exact: np.ndarray) -> None:
    kernel = pk.PathKernel(run.trajectory, outputs=OutputProbes(1))
    K = kernel(OTHERS)
    assert relative(K, exact) < 2e-2
    assert kernel.error.relative == pytest.approx(relative(K, exact), rel=1.0)
    np.testing.assert_array_equal(K, K.T)
    np.testing.assert_array_equal(K, kernel(OTHERS))
    np.testing.assert_allclose(kernel.diagonal(OTHERS), np.diag(K), rtol=1e-10)
    two = pk.PathKernel(run.trajectory, outputs=OutputProbes(2))
    np.testing.assert_allclose(two(OTHERS[:4], OTHERS), two(OTHERS)[:4], rtol=0, atol=ROUNDING * np.abs(K).max())
    assert "2 random combinations" in repr(two)


# -- refusals -------------------------------------------------------------------------------------------------------


def single() -> pk.Trajectory:
    return record(data=(make_inputs(1), torch.zeros(1, dtype=torch.int64)), batches=[[0], [0]]).trajectory


REFUSALS = {
    "negative": (lambda t: pk.PathKernel(t, tolerance=-1.0), "`tolerance=-1.0`", "between 0 and 1", "tolerance=1e-3"),
    "a flag": (lambda t: pk.PathKernel(t, tolerance=True), "`tolerance=True`", "between 0 and 1", "tolerance=1e-3"),
    "steps": (lambda t: pk.PathKernel(t, tolerance=1e-3, steps=2), "together with `steps`", "chooses", "=0.001"),
    "probes": (
        lambda t: pk.PathKernel(t, tolerance=1e-3, outputs=OutputProbes()),
        "together with `OutputProbes`",
        "do not average out",
        "tolerance=0.001",
    ),
    "one sample": (lambda t: pk.PathKernel(single(), tolerance=0.1), "one training sample", "others", "Leave out"),
    "no probes": (lambda t: OutputProbes(0), "`OutputProbes(count=0, seed=0)`", "from 1 upwards", "OutputProbes(1)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(run: Recording, name: str) -> None:
    act, *parts = REFUSALS[name]
    with pytest.raises(errors.InputError) as caught:
        act(run.trajectory)
    for part in parts:
        assert part in str(caught.value)
