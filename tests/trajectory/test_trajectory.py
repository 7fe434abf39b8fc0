"""A trajectory is not written from outside."""

from __future__ import annotations

import torch
from cases import record


def test_what_is_done_to_parameters_does_not_reach_the_record() -> None:
    trajectory = record().trajectory
    kept = [trajectory.vector(s).clone() for s in range(len(trajectory) + 1)]
    for s in (0, 2, -1):
        for value in trajectory.parameters(s).values():
            value.zero_()
    trajectory.constants["another"] = kept[0]
    assert all(torch.equal(trajectory.vector(s), point) for s, point in enumerate(kept))
    assert "another" not in trajectory.constants
