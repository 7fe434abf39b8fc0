"""Kernel distance and velocity: how far and how fast a tangent kernel turns in training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathkernel.analysis.arrays import real_numbers
from pathkernel.analysis.gram_matrix import as_kernel_matrix, check_same_shape, unit_norm
from pathkernel.errors import PathKernelError


def kernel_distance(K: ArrayLike, L: ArrayLike) -> float:
    """Scale-free distance between two kernel matrices.

    S(K, L) = 1 - ⟨K, L⟩_F / (‖K‖_F ‖L‖_F)

    Computed as ½ ‖K/‖K‖ - L/‖L‖‖², which is the same number: the difference of two unit
    vectors keeps its digits where 1 minus a cosine near 1 loses them, as late in training.

    Parameters
    ----------
    K, L
        Kernel matrices of the same samples, shape (n, m) each.

    Returns
    -------
    float
        In [0, 2]; in [0, 1] for two positive semi-definite matrices, 0 when one is a
        positive multiple of the other.

    Raises
    ------
    PathKernelError
        If the shapes differ, or a matrix is not finite or is zero.

    References
    ----------
    Fort, Dziugaite, Paul, Kharaghani, Roy and Ganguli, "Deep learning versus kernel
    learning", NeurIPS 2020 (arXiv 2010.15110), kernel distance.

    Examples
    --------
    >>> round(kernel_distance([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]), 12)
    1.0
    """
    K, L = as_kernel_matrix(K, "K"), as_kernel_matrix(L, "L")
    check_same_shape(K, L)
    difference = unit_norm(K, "K") - unit_norm(L, "L")
    return float(0.5 * np.vdot(difference, difference))


def kernel_velocity(grams: Sequence[ArrayLike], times: ArrayLike) -> NDArray[np.float64]:
    """Kernel distance travelled per unit of training time.

    v_i = S(K_{i+1}, K_i) / (t_{i+1} - t_i)

    Parameters
    ----------
    grams
        Kernel matrices of the same samples at T ≥ 2 moments, shape (T, n, m).
    times
        The moments, shape (T,), strictly increasing: steps, epochs or Σ learning rate.

    Returns
    -------
    ndarray
        Shape (T - 1,), per unit of `times`.

    Raises
    ------
    PathKernelError
        If there are fewer than two kernels, not one time for each, or times that do not
        increase, or as `kernel_distance`.

    References
    ----------
    Fort et al. 2020 (arXiv 2010.15110), kernel velocity.

    Notes
    -----
    S is quadratic in small changes, so v shrinks with the spacing of `times`: compare
    velocities at one spacing only.

    Examples
    --------
    >>> identity, swap = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    >>> kernel_velocity([identity, identity, swap], times=[0, 10, 14]).round(12)
    array([0.  , 0.25])
    """
    times = real_numbers(times, "times", "Times are real numbers")
    if not hasattr(grams, "__len__"):
        raise PathKernelError(
            f"`grams` is a {type(grams).__name__}",
            "It is a sequence of kernel matrices of the same samples",
            "Pass a list of matrices (n, m), or an array (T, n, m)",
        )
    if times.shape != (len(grams),) or len(grams) < 2:
        raise PathKernelError(
            f"There are {len(grams)} kernels and `times` has shape {times.shape}",
            "A velocity needs at least two kernels and one time for each",
            "Pass times of shape (len(grams),), e.g. the step numbers",
        )
    durations = np.diff(times)
    if not (np.isfinite(times).all() and (durations > 0).all()):
        raise PathKernelError(
            f"`times` is {np.array2string(times, threshold=8)}",
            "Times are finite and strictly increasing",
            "Sort the kernels by time and keep one kernel per moment",
        )
    distances = [kernel_distance(after, before) for before, after in pairwise(grams)]
    velocities: NDArray[np.float64] = np.asarray(distances) / durations
    return velocities
