"""Gradients of recorded batches beside those on record."""

from __future__ import annotations

from typing import Any

import pytest

from pathkernel.trajectory.batch_gradients import RecordedGradients
from tests.cases import record

TOLERANCE = 1e-6


def test_rounding_is_judged_by_the_largest_gradient_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more steps are read for it than it takes to find one that is large enough."""
    trajectory = record(optimizer="sgd").trajectory
    gradients = RecordedGradients(trajectory, trajectory.function(), 2**20)
    norms = [step.gradient.norm().item() for step in trajectory.steps()]
    place = max(range(len(norms)), key=norms.__getitem__)
    assert 0 < place < len(norms) - 1  # neither the first step nor the last tells
    read: list[int] = []
    store = type(trajectory.store)
    reading = store.read

    def watched(self: Any, index: int) -> Any:
        read.append(index)
        return reading(self, index)

    monkeypatch.setattr(store, "read", watched)
    assert gradients._is_rounding(0.0, TOLERANCE) and read == []
    assert gradients._is_rounding(TOLERANCE * norms[0], TOLERANCE) and read == [0]
    assert gradients._is_rounding(TOLERANCE * max(norms), TOLERANCE) and read == list(range(place + 1))
    for _ in range(2):
        assert not gradients._is_rounding(TOLERANCE * max(norms) * 1.001, TOLERANCE)
        assert not gradients._is_rounding(float("nan"), TOLERANCE)
    assert read == list(range(len(norms)))  # none of them twice


def test_rounding_is_judged_by_the_run_that_a_path_is_a_part_of() -> None:
    trajectory = record(optimizer="sgd").trajectory
    largest = 1e3 * max(step.gradient.norm().item() for step in trajectory.steps())
    gradients = RecordedGradients(trajectory, trajectory.function(), 2**20, largest_gradient=largest)
    assert gradients._is_rounding(TOLERANCE * largest, TOLERANCE)
    assert not gradients._is_rounding(TOLERANCE * largest * 1.001, TOLERANCE)
