"""Bytes that a computation takes, counted while it runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from pathkernel.runtime.allocations import Allocations, footprint_of, proportional


def test_a_multiple_of_what_has_no_tangent_is_added_in_place() -> None:
    """On its own, torch 2.13 ends the process here."""
    x, shift = torch.randn(3, 4), torch.randn(4)

    def shifted(weight: Tensor) -> Tensor:
        return (x @ weight).add_(shift, alpha=2.0)

    weight, along = torch.randn(4, 4), torch.randn(4, 4)
    with Allocations() as allocations:
        found = jvp(shifted, (weight,), (along,))
    torch.testing.assert_close(found[0], x @ weight + 2 * shift)
    torch.testing.assert_close(found[1], x @ along)
    assert allocations.peak > 0


def test_a_single_trial_tells_vectors_of_parameters_from_what_samples_take() -> None:
    size = 2**18

    def changes(n: int) -> np.ndarray:
        return np.array([0.0, 8 * size, 100 * n, 4 * size, 300 * n, -8 * size, -100 * n])

    exact, once = footprint_of(changes), proportional(changes, 8.0 * size)
    for n in (3, 10, 1000):
        assert once.peak(n) == exact.peak(n) and once.held(n) == exact.held(n)
    # Of small vectors it is not told: they are taken to grow.
    assert proportional(lambda n: np.array([0.0, 800.0, 100 * n]), 800.0).peak(30) == 8000.0 + 3000.0
