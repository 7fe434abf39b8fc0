"""Measured error of an approximate kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pathkernel._typing import Float


@dataclass(frozen=True)
class MeasuredError:
    """Relative Frobenius error of a kernel matrix of samples that had no part in the approximation.

    Attributes
    ----------
    relative
        ‖K̃ − K‖ / ‖K‖.
    deviation
        Its standard deviation over the choice of these samples, by leaving out one at a time.
    samples
        How many samples there were.
    against
        What K is.
    aim
        The bound that was asked for, or None.
    """

    relative: float
    deviation: float
    samples: int
    against: str
    aim: float | None = None

    @classmethod
    def between(
        cls, found: Float[np.ndarray, "n n ..."], exact: Float[np.ndarray, "n n ..."], against: str
    ) -> MeasuredError:
        """The error of an approximate matrix (or one of blocks)."""
        squared, size = ((values**2).reshape(*values.shape[:2], -1).sum(axis=2) for values in (found - exact, exact))
        n, left, whole = len(found), _without_each(squared), _without_each(size)
        ratios = np.sqrt(left / np.maximum(whole, np.finfo(float).tiny))
        deviation = float(np.sqrt((n - 1) * ratios.var())) if n > 1 else float("nan")
        return cls(float(np.sqrt(squared.sum() / size.sum())), deviation, n, against)

    def __float__(self) -> float:
        return self.relative

    def __str__(self) -> str:
        aim = "" if self.aim is None else f" (asked for: {self.aim:.2g})"
        return (
            f"{self.relative:.2g} ± {self.deviation:.1g} relative to {self.against}, on {self.samples} "
            f"held-out samples{aim}"
        )


def _without_each(squared: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """Sums over a symmetric matrix without the row and column of one sample."""
    return np.maximum(squared.sum() - squared.sum(axis=0) - squared.sum(axis=1) + squared.diagonal(), 0.0)
