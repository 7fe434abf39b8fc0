"""Rows of `dynamics.py` about flows, steepest descent in a norm, finite steps and ledgers."""

from __future__ import annotations

from collections.abc import Iterator

from _dynamics_rows import Row


def rows(quick: bool) -> Iterator[Row]:
    """Every number of the flows; ``quick`` for fewer steps."""
    yield from ()
