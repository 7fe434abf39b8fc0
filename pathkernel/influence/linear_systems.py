"""Solutions of one positive definite system for many right-hand sides, each to the same relative residual."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg


def conjugate_gradients(
    product: Callable[[np.ndarray], np.ndarray], sides: np.ndarray, *, residual: float, most: int
) -> np.ndarray | None:
    r"""A⁻¹ b of several b, by conjugate gradients on all of them at once.

    Every b is divided by its length before: a residual of the whole system says nothing of a short b beside long ones,
    such as the gradient of a query that the network is sure of.

    Parameters
    ----------
    product
        A b of the rows b of an array, (Q, n) to (Q, n); A is symmetric and positive definite.
    sides
        b, (Q, n) float64.
    residual
        Bound of :math:`\lVert A x - b \rVert / \lVert b \rVert` of every row.
    most
        At most so many products.

    Returns
    -------
    numpy.ndarray or None
        x, (Q, n); None where the bound was not reached. Rows of zeros have zeros.
    """
    if sides.size == 0:
        return np.zeros_like(sides)
    lengths = np.linalg.norm(sides, axis=1, keepdims=True)
    lengths[lengths == 0] = 1.0
    scaled = sides / lengths
    system = LinearOperator(
        (sides.size, sides.size), matvec=lambda v: product(v.reshape(sides.shape)).ravel(), dtype=np.float64
    )
    # The residuals of Q rows of length 1 add up to a length of √Q: each is within the bound where all together are.
    found, failed = cg(system, scaled.ravel(), rtol=residual / np.sqrt(len(sides)), maxiter=most)
    return None if failed else found.reshape(sides.shape) * lengths
