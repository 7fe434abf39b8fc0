"""How near is near enough: one table per floating type, every number with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """Relative unless said otherwise.

    Attributes
    ----------
    rounding
        The same formula in another order of operations.
    shares
        Shares and channels against the forward oracle: two long sums in different orders. In float32 the oracle trains
        in float64, so that the two paths differ as well.
    residual
        What the kernel machine may leave of f_S − f_0 where the theory says nothing is left: exact quadratures, or
        Gauss–Legendre with 4 nodes on a smooth network.
    gradient
        A recorded gradient against the oracle's.
    psd
        How negative the smallest eigenvalue of a positive semi-definite matrix may come out, relative to the largest.
    """

    rounding: float
    shares: float
    residual: float
    gradient: float
    psd: float


TOLERANCES = {
    torch.float64: Tolerance(rounding=1e-12, shares=1e-10, residual=1e-12, gradient=1e-12, psd=1e-10),
    torch.float32: Tolerance(rounding=2e-6, shares=1e-4, residual=1e-5, gradient=1e-5, psd=1e-5),
}

ORDER = 0.25
"""How far a measured convergence order may be from the theoretical one (absolute)."""
