"""Conjugate gradients of many right-hand sides, against a dense solution."""

from __future__ import annotations

import numpy as np

from pathkernel.influence.linear_systems import conjugate_gradients


def test_every_side_is_solved_to_the_same_relative_residual() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(12, 12))
    A = root @ root.T + 0.1 * np.eye(12)
    sides = rng.normal(size=(4, 12)) * np.array([[1.0], [1e-9], [1e6], [0.0]])
    found = conjugate_gradients(lambda rows: rows @ A, sides, residual=1e-6, most=500)
    assert found is not None
    assert (np.linalg.norm(found @ A - sides, axis=1) <= 1e-6 * np.linalg.norm(sides, axis=1)).all()
    assert conjugate_gradients(lambda rows: rows @ A, sides, residual=1e-6, most=1) is None
