"""Bytes that a computation takes, counted while it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jvp

from pathkernel.runtime.allocations import Allocations


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
