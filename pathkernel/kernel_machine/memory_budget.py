"""The part of a memory budget that tensors may take, and the refusal of one that is too small."""

from __future__ import annotations

import math

from pathkernel.errors import InputError

SHARE = 0.7
"""Part of a budget that is planned with: the rest is for gaps between tensors. That it suffices is measured by
tests/kernel_machine/test_memory_budget.py, in fresh processes."""

RUNTIME = 24 << 20
"""Bytes that code and Python's own objects take when they are first used, measured on three networks by
tests/kernel_machine/test_memory_budget.py."""

OF_SMALL = 0.6
"""Part of a small budget that they take at most. Chosen, so that a small budget is refused by what tensors take."""


def usable_bytes(memory: float) -> float:
    """Part of a budget that tensors may take."""
    return SHARE * (memory - min(OF_SMALL * memory, RUNTIME))


def refusal(least: float, memory: int) -> InputError:
    """Error that names a budget which is too small, and one that is not."""
    needed = least / SHARE + min(least / SHARE * OF_SMALL / (1 - OF_SMALL), RUNTIME)
    digits = max(0, 1 - math.floor(math.log10(needed / 1e6)))
    enough = math.ceil(needed / 1e6 * 10**digits) / 10**digits
    return InputError(
        f"One query and the least part of a batch take {enough:.{max(0, digits)}f} MB beside the trajectory and the "
        f"result, and the budget is {memory / 1e6:.3g} MB",
        "A budget has to hold at least these; it is kept, not exceeded in silence",
        f'Write `memory="{enough:.{max(0, digits)}f}MB"` or more',
    )
