"""The bound from loss path kernels: its terms by hand, and the identity that it rests on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import make_inputs, make_model
from torch import nn

import pathkernel as pk
from pathkernel import analysis, errors


def test_terms_by_hand() -> None:
    one, two = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[3.0, -0.5], [-0.5, 1.0]])
    losses = [[0.1, 0.4], [0.3, 0.1]]
    bound = analysis.loss_path_bound([one, two], [0.5, 2.0], losses, delta=0.05)
    # sup tr K = 4, both off-diagonal entries spread over 1: Δ = ½ each; ε = 0.2 + 0.3.
    assert bound.by_kernel == pytest.approx(math.sqrt(2.0 * (4 + 1)) / 2)
    assert bound.by_losses == pytest.approx(0.25) == bound.rademacher
    assert bound.gap == pytest.approx(0.5) and bound.trainings == 2
    assert float(bound) == pytest.approx(0.5 + 3 * math.sqrt(math.log(40) / 4))
    alone = analysis.loss_path_bound([one], [0.5], losses[:1])
    assert alone.by_losses is None and alone.rademacher == alone.by_kernel == pytest.approx(math.sqrt(0.5 * 3) / 2)


def off_by(rate: float, steps: int) -> tuple[float, float]:
    """How far losses after full-batch steps are from the kernel machine, in the largest, and B² from the mean of K."""
    model, X, y = make_model(), make_inputs(6), torch.arange(6) % 3
    per_sample, loss = nn.CrossEntropyLoss(reduction="none"), nn.CrossEntropyLoss()
    before = per_sample(model(X), y).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=0) as recorder:
        for _ in range(steps):
            x, target = recorder.announce(range(6))
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    K = pk.PathKernel(recorder.trajectory, outputs="loss", measure="learning_rate")((X, y))
    fell = (before - per_sample(model(X), y).detach()).numpy()
    return float(np.abs(fell - K.mean(axis=1)).max() / fell.max()), float(abs(fell.mean() - K.mean()) / fell.mean())


def test_losses_are_kernel_machines_as_the_learning_rate_falls() -> None:
    """ℓ_T = ℓ_0 − mean_i K(z, z_i) along gradient flow: of the order of the learning rate along its steps."""
    coarse, fine = off_by(0.1, 12), off_by(0.05, 24)
    assert max(coarse) < 0.05
    for one, half in zip(coarse, fine, strict=True):
        assert 1.6 < one / half < 2.4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([np.eye(2)], [0.1, 0.2]), r"`decreases` is \[0.1 0.2\] for 1 kernels"),
        (([np.eye(2)], [-0.1]), "0 or more"),
        (([np.eye(2)], [0.1], [[0.1, 0.2, 0.3]]), r"`losses` has shape \(1, 3\) for 1 kernels of 2 samples"),
        (([], []), "`kernels` is a list of 0 matrices, of shapes none"),
        ((None, [0.1]), "`kernels` is a NoneType of 0 matrices"),
        (([np.eye(2), np.eye(3)], [0.1, 0.1]), r"of shapes \(2, 2\), \(3, 3\)"),
        (([np.eye(2)], ["a"]), "`decreases` is list, which is no array of real numbers"),
        (([np.eye(2)], [0.1], [[1], [1, 2]]), "`losses` is list, which is no array of real numbers"),
        (([1j * np.eye(2)], [0.1]), r"`kernels\[0\]` is ndarray, which is no array of real numbers"),
        (([np.eye(2) - 2], [0.1]), r"`kernels\[0\]` is -1 between sample 0 and itself"),
        (([np.ones((2, 2)) - 0.5 * np.eye(2)], [0.1]), "is 1 between samples 0 and 1, and 0.5 and 0.5 between each"),
    ],
    ids=[
        "too many decreases",
        "a loss that grew",
        "losses of others",
        "no kernels",
        "nothing",
        "other samples",
        "text",
        "ragged",
        "complex",
        "a negative diagonal",
        "a pair",
    ],
)
def test_refusals(arguments: tuple, said: str) -> None:
    with pytest.raises(errors.PathKernelError, match=said):
        analysis.loss_path_bound(*arguments)


def test_a_probability_of_one() -> None:
    with pytest.raises(errors.PathKernelError, match=r"`delta=1` was given.*between 0 and 1"):
        analysis.loss_path_bound([np.eye(2)], [0.1], delta=1)
    with pytest.raises(errors.PathKernelError, match="`delta='a'` was given"):
        analysis.loss_path_bound([np.eye(2)], [0.1], delta="a")  # type: ignore[arg-type]


def test_kernels_may_be_rounded() -> None:
    """Products of factors in bfloat16 are off by some 4e-3; two alike samples are as far from each other's bound."""
    rounded = np.array([[1.0, 1.004], [1.004, 1.0]])
    assert analysis.loss_path_bound([rounded], [0.1]).by_kernel > 0
