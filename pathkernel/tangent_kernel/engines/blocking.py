"""Cuts of a kernel matrix such that everything in hand fits into a memory budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt

import torch

from pathkernel.gradients.pytrees import blocks

PASS = 256 << 20
"""Bytes of one pass through the network: what it leaves behind should still be near when it is used. By which script it
was found is not on record; `benchmarks/engines.py` times matrices that are made with it."""

TILE = 128
"""Rows of a trace kernel computed at once: enough for products at full speed, few enough to leave out nearly half.

By which script this number and the three below were found is not on record. They change how long a matrix takes, and
its last bits; `benchmarks/engines.py` times the matrices.
"""

HIGH = 512
"""Rows of a trace kernel computed at once where nothing is left out. Provenance as of `TILE`."""

PART = 32 << 20
"""Bytes of rows formed at once where they are not kept: few, for memory, but each part passes over the result once
more. Provenance as of `TILE`."""

MIRRORED = 512
"""Rows and columns that are transposed at once: so many stay in the processor's cache. Provenance as of `TILE`."""

MIRRORED_AWAY = 1024
"""The same on an accelerator, where they only have to fit into memory beside the result. Chosen, not measured."""

ALLOCATOR = 14 << 20
"""Bytes that are not given back between passes, measured on three networks; by which script is not on record.

Where they are too few, `test_measured_peak_is_within_the_budget` in tests/tangent_kernel/test_layerwise.py fails.
"""

BLOCKS = 256
"""Samples on each side of a tile of blocks of all pairs of components. Chosen, not measured."""


def is_away(device: torch.device) -> bool:
    """Test that operations are started on one device and done on another, an accelerator.

    There each costs the time of starting it, which is the longer one for blocks that fit into a processor's cache: as
    much is computed at once as the budget holds, and what symmetry would spare is computed too.
    """
    return device.type != "cpu"


@dataclass(frozen=True)
class Sizes:
    """Bytes that a sample takes, as a number and so much more for each component.

    Attributes
    ----------
    components
        K.
    passing
        While it passes through the network.
    held
        From then until it is contracted.
    """

    components: int
    passing: tuple[float, float]
    held: tuple[float, float]

    def least(self, full: bool) -> float:
        """Bytes that one sample takes with the fewest components at once: one for a trace, all for full blocks."""
        components = self.components if full else 1
        return self.passing[0] + self.held[0] + components * (self.passing[1] + self.held[1])


@dataclass(frozen=True)
class Plan:
    """Cut of a kernel matrix that fits into a budget.

    Attributes
    ----------
    components
        Components in hand at once.
    passing
        Samples in one pass through the network.
    left, right
        Samples held on each side.
    tile
        Samples that are contracted together.
    scratch
        Bytes for tiles.
    """

    components: int
    passing: int
    left: int
    right: int
    tile: int
    scratch: int

    @classmethod
    def of(cls, sizes: Sizes, memory: int, n: int, m: int | None, full: bool, away: bool = False) -> Plan:
        """Plan for n × m samples, m None for a symmetric matrix: half of the budget is held, the rest is in motion.

        ``away`` as of `is_away`: passes are then given what is not held as well, in blocks as large as that allows.
        """
        memory -= min(memory // 4, ALLOCATOR)
        held, passing, scratch = memory // 2, memory // 4, memory // 8
        samples, chosen = n + (m or 0), sizes.components
        if not full:  # the trace is a sum over components, a few at a time
            spare = held / samples - sizes.held[0]
            chosen = max(1, min(chosen, int(spare // max(1.0, sizes.held[1]))))
        each = max(1.0, sizes.held[0] + chosen * sizes.held[1])
        left, right = n, n if m is None else m
        if each * samples > held:
            left, right = (max(1, int(part * held / each)) for part in (0.75, 0.25))
        if away:
            passing += held - int(min(held, each * samples))
        else:
            passing = min(passing, PASS)
        pass_size = max(1, int(passing / max(1.0, sizes.passing[0] + chosen * sizes.passing[1])))
        tile = max(1, isqrt(scratch // (24 * chosen))) if full else max(n, m or 0)
        if full and not away:
            tile = min(BLOCKS, tile)
        return cls(chosen, pass_size, min(left, n), right, tile, scratch)

    def holds(self, samples: int) -> bool:
        """Test that so many pass through the network and are held at once."""
        return samples <= min(self.passing, self.left + self.right)


def cuts(block: slice, size: int) -> Iterator[slice]:
    """Consecutive parts of a block."""
    for part in blocks(block.stop - block.start, size):
        yield slice(block.start + part.start, block.start + part.stop)
