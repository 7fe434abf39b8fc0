"""How far a run goes from its start: against the analyses of kernels that are computed one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import make_inputs, make_model, record
from torch import nn

import pathkernel as pk
from pathkernel import analysis, errors, reference


def kernels(run: Any, moments: list[int], X: torch.Tensor) -> list[np.ndarray]:
    found = [reference.tangent_kernel(run.start, run.trajectory.parameters(s), X) for s in moments]
    return [torch.einsum("nmcc->nm", K).numpy() for K in found]


def test_against_kernels_one_by_one() -> None:
    run = record(optimizer="adam")
    y = np.array([0, 1, 2, 0])
    regime = analysis.kernel_regime(run.trajectory, run.queries, y, moments=4)
    assert regime.steps.tolist() == [0, 2, 4, 6]
    Ks, theta = kernels(run, [0, 2, 4, 6], run.queries), run.trajectory.vector
    close = np.testing.assert_allclose
    moved = [((theta(s) - theta(0)).norm() / theta(0).norm()).item() for s in (0, 2, 4, 6)]
    close(regime.parameter_distance, moved, rtol=1e-10)
    close(regime.kernel_distance, [analysis.kernel_distance(K, Ks[0]) for K in Ks], atol=1e-13)
    close(regime.kernel_change, [np.linalg.norm(K - Ks[0]) / np.linalg.norm(Ks[0]) for K in Ks], atol=1e-12)
    close(regime.velocity, analysis.kernel_velocity(Ks, [0, 2, 4, 6]), rtol=1e-8)
    close(regime.alignment, [analysis.target_alignment(K, y) for K in Ks], rtol=1e-10)
    close(regime.effective_rank, [analysis.effective_rank(K) for K in Ks], rtol=1e-8)
    frame = regime.to_frame()
    assert frame["step"].tolist() == [0, 2, 4, 6] and np.isnan(frame["velocity"][0]) and "alignment" in frame


def test_training_samples_by_default() -> None:
    run = record()
    regime, given = analysis.kernel_regime(run.trajectory), analysis.kernel_regime(run.trajectory, run.X, run.y.numpy())
    np.testing.assert_array_equal(regime.kernel_distance, given.kernel_distance)
    np.testing.assert_array_equal(regime.alignment, given.alignment)
    assert regime.steps.tolist() == list(range(7))  # fewer moments than asked for
    without = analysis.kernel_regime(run.trajectory, run.X)
    assert without.alignment is None and "alignment" not in without.to_frame()


def test_a_thinned_path_counts_optimizer_steps() -> None:
    model, X, y = make_model(), make_inputs(6), torch.arange(6) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, nn.CrossEntropyLoss(), data=(X, y), schedule=pk.Every(2)) as recorder:
        for _ in range(3):
            for x, target in recorder.batches(3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), target).backward()
                optimizer.step()
    assert analysis.kernel_regime(recorder.trajectory, moments=2).steps.tolist() == [0, 6]


def test_refusals() -> None:
    run = record()
    with pytest.raises(errors.InputError, match=r"`moments=1` was given.*2 or more"):
        analysis.kernel_regime(run.trajectory, moments=1)
    with pytest.raises(errors.InputError, match="was given no samples"):
        analysis.kernel_regime(run.trajectory, run.X[:0])


def test_kernels_as_machines() -> None:
    generator = np.random.default_rng(0)
    X, X_test = generator.normal(size=(60, 2)), generator.normal(size=(40, 2))
    y, y_test = (own[:, 0] > 0 for own in (X, X_test))
    linear, noise = (X @ X.T, X_test @ X.T), (np.eye(60), np.zeros((40, 60)))
    rows = analysis.kernels_as_svm({"linear": linear, "noise": noise}, y, y_test)
    assert [row.name for row in rows] == ["linear", "noise"]
    assert rows[0].test_accuracy > 0.9 > rows[1].test_accuracy and rows[1].train_accuracy == 1
    assert rows[0].support_vectors < 0.5 and rows[1].support_vectors == 1
    assert rows[0].alignment == analysis.target_alignment(linear[0], y)
    assert rows[0].effective_rank == analysis.effective_rank(linear[0])
    scaled = analysis.kernels_as_svm({"linear": (7 * linear[0], 7 * linear[1])}, y, y_test)
    assert scaled[0].test_accuracy == rows[0].test_accuracy
    with pytest.raises(errors.PathKernelError, match=r"`linear` has shapes \(60, 60\) and \(40, 60\) for 60"):
        analysis.kernels_as_svm({"linear": linear}, y, y_test[:10])


EYE = np.eye(3)
REFUSED: dict[str, tuple[Any, str]] = {
    "a list": (([(EYE, EYE)], [0, 1, 1], [0, 1, 1]), "`kernels` is, or holds under None, a list"),
    "one matrix": (({"a": EYE}, [0, 1, 1], [0, 1, 1]), "holds under 'a', a ndarray"),
    "one class": (({"a": (EYE, EYE)}, [0, 0, 0], [0, 1, 1]), "with 1 classes"),
    "other names": (({"a": (EYE, EYE)}, [0, 1, 1], ["a", "b", "b"]), "both have the same names"),
    "one-hot": (({"a": (EYE, EYE)}, EYE, [0, 1, 1]), r"`y_train` has shape \(3, 3\)"),
    "labels with NaN": (({"a": (EYE, EYE)}, [0, np.nan, 1], [0, 1, 1]), "`y_train` is of type float64"),
    "zero": (({"a": (0 * EYE, EYE)}, [0, 1, 1], [0, 1, 1]), "`a` is zero on all training samples"),
    "indefinite": (({"a": (EYE - 1, EYE)}, [0, 1, 1], [0, 1, 1]), "`a` is -1 between samples 0 and 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_kernels_that_make_no_machine(name: str) -> None:
    arguments, said = REFUSED[name]
    with pytest.raises(errors.PathKernelError, match=said):
        analysis.kernels_as_svm(*arguments)


def test_a_penalty_that_is_none() -> None:
    with pytest.raises(errors.PathKernelError, match=r"`C=0` was given.*`C=10.0`"):
        analysis.kernels_as_svm({"a": (EYE, EYE)}, [0, 1, 1], [0, 1, 1], C=0)
