"""Arrays that users give: real numbers, and class labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathkernel.errors import InputError

Floats = NDArray[np.float64]


def as_array(values: Any, name: str) -> NDArray[Any]:
    """Array as numpy reads it, of a tensor without its graph.

    Raises
    ------
    InputError
        For rows of different lengths.
    """
    try:
        return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (TypeError, ValueError):
        raise InputError(
            f"`{name}` is a {type(values).__name__}, which is no array",
            "Every row has as many entries as any other",
            f"Pass `{name}` as one array",
        ) from None


def real_numbers(values: ArrayLike, name: str, what: str = "Scores and outputs are real numbers") -> Floats:
    """Array of float64 numbers, any of which may be NaN or infinite.

    Parameters
    ----------
    values
        As the user gave them.
    name
        Of the parameter.
    what
        What they are, as a sentence without its full stop.

    Raises
    ------
    InputError
        For text, complex numbers and other objects, and for rows of different lengths.
    """
    try:
        given = as_array(values, name)
        array = None if given.dtype.kind not in "fiubO" else given.astype(np.float64)
    except (TypeError, ValueError):  # objects that are no numbers, and rows of different lengths
        array = None
    if array is None or values is None:
        raise InputError(
            f"`{name}` is {type(values).__name__}, which is no array of real numbers",
            what,
            f"Pass `{name}` as an array of floating point numbers",
        )
    return array


def class_labels(values: ArrayLike, name: str) -> NDArray[Any]:
    """Classes of n samples, or of several predictions of each: whole numbers, or text.

    Raises
    ------
    InputError
        For NaN, numbers with a fraction, and what is neither a number nor a text.
    """
    labels = as_array(values, name)
    fits = labels.dtype.kind in "iubUS"
    if labels.dtype.kind == "f":
        fits = bool(np.isfinite(labels).all() and (labels == np.floor(labels)).all())
    if labels.dtype.kind == "O":
        fits = labels.size > 0 and all(isinstance(one, str) for one in labels.flat)
    if not fits and labels.size:
        raise InputError(
            f"`{name}` is of type {labels.dtype} and holds {labels.flat[0]!r}, which may be no class",
            "Classes are whole numbers or names, without NaN",
            f"Pass for example `{name}.argmax(axis=-1)` where there are scores of the classes",
        )
    return labels
