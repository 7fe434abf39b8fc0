"""Checks of the arrays that attributions are judged by: finite, of agreeing shapes, enough of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathkernel.analysis.arrays import Floats, as_array, real_numbers
from pathkernel.errors import InputError, quoted


def finite(values: ArrayLike, name: str) -> Floats:
    """Array of finite float64 numbers; what is no array of real numbers is refused."""
    array = real_numbers(values, name)
    if not np.isfinite(array).all():
        raise InputError(
            f"`{name}` holds NaN or infinity, {int((~np.isfinite(array)).sum())} of {array.size} numbers",
            "Scores and outputs are finite numbers",
            f"Look for what made them, or leave these rows out of `{name}` and of what belongs to them",
        )
    return array


def matrix(values: ArrayLike, name: str) -> Floats:
    """The same with two axes."""
    array = finite(values, name)
    if array.ndim != 2:
        raise InputError(
            f"`{name}` has shape {array.shape}",
            "It is a matrix: scores (Q, N), subsets (R, N), changes (K, Q), losses after removals (Q, K)",
            f"Pass `{name}` with two axes, `{name}[None]` where there is one query or subset",
        )
    return array


def numbers_of_samples(sizes: ArrayLike, samples: int | None = None) -> NDArray[np.int64]:
    """How many samples are left out, (K,) int64, no more than there are where that is known.

    Raises
    ------
    InputError
        For other numbers.
    """
    given = as_array(sizes, "sizes")
    whole = given.ndim == 1 and (given.size == 0 or np.issubdtype(given.dtype, np.integer))
    if not whole or (given < 0).any() or (samples is not None and (given > samples).any()):
        most = "" if samples is None else f" to the {samples} samples that there are"
        raise InputError(
            f"`sizes={quoted(sizes)}` was given",
            f"Sizes are whole numbers from 0{most or ' upwards'}",
            "Write for example `sizes=[10, 20, 40]`",
        )
    return given.astype(np.int64)


def check_agreement(arrays: dict[str, tuple[NDArray[Any], str]]) -> None:
    """Refuse arrays whose axes of one name have different lengths."""
    lengths: dict[str, int] = {}
    for array, axes in arrays.values():
        known = {axis: lengths.get(axis, size) for axis, size in zip(axes, array.shape, strict=False)}
        if array.ndim != len(axes) or tuple(known[axis] for axis in axes) != array.shape:
            shapes = ", ".join(f"`{name}` {one.shape}" for name, (one, _) in arrays.items())
            expected = ", ".join(f"`{name}` ({', '.join(own)})" for name, (_, own) in arrays.items())
            raise InputError(
                f"The shapes are {shapes}",
                f"Axes of one name are as long in all of them: {expected}",
                "Pass scores with one row for each query and one column for each training sample, and transpose the "
                "others where their axes are the other way round",
            )
        lengths |= known


def check_several(count: int, what: str) -> None:
    """Refuse a correlation of fewer than three numbers."""
    if count < 3:
        raise InputError(
            f"{count} {what} were given",
            "A correlation of one or two says nothing",
            "Train 30 or more networks: its standard error is about 1 over the root of their number",
        )


def sample_ids(removed: ArrayLike, samples: int) -> NDArray[np.int64]:
    """Sample ids, (K,) int64."""
    ids = as_array(removed, "removed")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or (ids < 0).any() or (ids >= samples).any():
        raise InputError(
            f"`removed` holds other things than ids of the {samples} samples",
            f"Ids are whole numbers from 0 to {samples - 1}",
            "Pass the id of the sample that each training went without",
        )
    return ids.astype(np.int64)


def checked_suspicion(suspicion: ArrayLike, flipped: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """Suspicions (N,) and whether labels are wrong, (N,), some of either."""
    score, marks = finite(suspicion, "suspicion"), finite(flipped, "flipped")
    if not np.isin(marks, (0, 1)).all():
        raise InputError(
            "`flipped` holds other things than true and false",
            "There is one mark for each sample, true where its label is wrong",
            "Write `flipped != 0`, or `numpy.isin(numpy.arange(N), ids)` for the ids of wrong labels",
        )
    wrong = marks.astype(bool)
    check_agreement({"suspicion": (score, "N"), "flipped": (wrong, "N")})
    if wrong.all() or not wrong.any():
        raise InputError(
            f"`flipped` says that {int(wrong.sum())} of {len(wrong)} labels are wrong",
            "Finding wrong labels is judged where there are wrong and right ones",
            "Pass true for the samples whose labels were flipped, and false for the others",
        )
    return score, wrong
